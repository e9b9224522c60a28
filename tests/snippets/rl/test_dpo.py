"""DPO 及变体的真值有四个来源。

1. 手算：对数概率取整数，损失能写成 ln(1 + e^k)。
2. 论文公式按概率直接写（2305.18290 式 3–7）：答案可枚举，奖励、配分函数、Bradley–Terry 概率都精确求和。
3. TRL 1.16 的 `DPOTrainer`：真的建一个随机初始化的小 Llama、4 条数据，调用 `compute_loss`，比较损失与参数梯度。
4. PyTorch 的 `binary_cross_entropy_with_logits`（cDPO 就是软标签的二分类交叉熵）。

最后一组把流传的错误写法逐个写出来，断言它们与真值相差一个说得出的量。
"""

import copy
import math
import socket

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_llama, word_tokenizer

from snippets.rl.dpo import dpo_loss, dpo_loss_smoothed, implicit_rewards, ipo_loss, kl_regularized_optimum
from snippets.rl.log_probs import log_probs_from_logits, sequence_log_probs

P, V = 3, 4
LN2 = math.log(2)


def pair(*values):
    """(chosen, rejected, ref_chosen, ref_rejected)，每个是形状 (1,) 的双精度张量。"""
    return [torch.tensor([float(v)], dtype=torch.float64) for v in values]


# 对数比 +2 与 -2，差为 4；beta = 0.5 时隐式奖励 +1 与 -1，差为 2
HAND = pair(-2, -3, -4, -1)


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def world(generator):
    """P 个提示、V 个答案，全部可枚举：参考策略、奖励、beta，以及全部有序答案对。"""
    ref = torch.randn(P, V, generator=generator, dtype=torch.float64).log_softmax(-1)
    rewards = torch.randn(P, V, generator=generator, dtype=torch.float64) + torch.tensor(
        [[0.0], [3.0], [-2.0]]
    )
    first, second = torch.where(~torch.eye(V, dtype=torch.bool))
    return ref, rewards, 0.3, first, second


def population_loss(world, log_probs, loss_fn):
    """无穷多条标签的期望损失：每个有序对按 Bradley–Terry 概率 σ(r_i - r_j) 加权（式 1）。"""
    ref, rewards, beta, first, second = world
    preference = torch.sigmoid(rewards[:, first] - rewards[:, second]).flatten()
    pairs = [x[:, i].flatten() for x in (log_probs, ref) for i in (first, second)]
    return (preference * loss_fn(*pairs, beta=beta)).mean()


def optimize(world, loss_fn):
    """从参考策略出发，用 L-BFGS 把总体损失解到底，返回概率。"""
    logits = world[0].clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = population_loss(world, logits.log_softmax(-1), loss_fn)
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


# 手算 ----------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """β = 0.5，差为 0.5 × 4 = 2，损失 ln(1 + e^-2) = 0.126928。"""
    assert dpo_loss(*HAND, beta=0.5).item() == pytest.approx(0.126928, abs=1e-6)


def test_implicit_rewards_by_hand_and_detached():
    """0.5 × (±2) = ±1；用于日志，不带梯度。"""
    inputs = [x.clone().requires_grad_() for x in HAND]
    chosen, rejected = implicit_rewards(*inputs, beta=0.5)
    assert (chosen.item(), rejected.item()) == (1.0, -1.0)
    assert not chosen.requires_grad and not rejected.requires_grad


def test_gradient_by_hand():
    """对 chosen 的导数 -β σ(-2) = -0.5 × 0.119203，对 rejected 相反。"""
    inputs = [x.clone().requires_grad_() for x in HAND[:2]]
    dpo_loss(*inputs, *HAND[2:], beta=0.5).backward()
    assert inputs[0].grad.item() == pytest.approx(-0.0596015, abs=1e-7)
    assert inputs[1].grad.item() == pytest.approx(+0.0596015, abs=1e-7)


def test_ipo_by_hand():
    """对数比之差 4，τ = 0.5 时目标 1/(2τ) = 1，损失 (4 - 1)² = 9。"""
    assert ipo_loss(*HAND, tau=0.5).item() == 9.0


def test_smoothed_by_hand():
    """ε = 0.1：0.9 × ln(1 + e^-2) + 0.1 × ln(1 + e^2) = 0.326928。"""
    assert dpo_loss_smoothed(*HAND, label_smoothing=0.1, beta=0.5).item() == pytest.approx(0.326928, abs=1e-6)


def test_default_beta_is_the_paper_s():
    """论文附录 B 的 β = 0.1：差为 0.4，损失 ln(1 + e^-0.4) = 0.513015，隐式奖励 ±0.2。"""
    assert dpo_loss(*HAND).item() == pytest.approx(0.513015, abs=1e-6)
    assert dpo_loss_smoothed(*HAND, label_smoothing=0.0).item() == pytest.approx(0.513015, abs=1e-6)
    assert [x.item() for x in implicit_rewards(*HAND)] == pytest.approx([0.2, -0.2], rel=1e-12)


@pytest.mark.parametrize("beta", [0.01, 0.1, 0.5, 5.0])
def test_initial_loss_is_ln2_and_initial_slope_is_half_beta(beta):
    chosen, rejected, ref_chosen, ref_rejected = pair(-7, -11, -7, -11)
    chosen.requires_grad_()
    loss = dpo_loss(chosen, rejected, ref_chosen, ref_rejected, beta=beta)
    loss.backward()
    assert loss.item() == pytest.approx(LN2, abs=1e-15)
    assert chosen.grad.item() == pytest.approx(-beta / 2, rel=1e-15)


# 论文公式，穷举 ------------------------------------------------------------------------------------


def test_closed_form_maximizes_the_kl_regularized_objective(world, generator):
    """式 3 在 π* 处的值恰是 β log Z；500 个随机策略都更低。"""
    ref, rewards, beta, *_ = world
    best, log_partition = kl_regularized_optimum(ref, rewards, beta=beta)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(P, dtype=torch.float64))

    def objective(log_probs):
        return (log_probs.exp() * (rewards - beta * (log_probs - ref))).sum(-1)

    torch.testing.assert_close(objective(best), beta * log_partition)
    noise = torch.randn(500, P, V, generator=generator, dtype=torch.float64)
    assert (objective((best + noise).log_softmax(-1)) < objective(best)).all()


def test_partition_function_cancels_in_differences_but_not_pointwise(world):
    """式 5：隐式奖励与真实奖励差 β log Z(x)，与答案无关；作差后消失。"""
    ref, rewards, beta, first, second = world
    best, log_partition = kl_regularized_optimum(ref, rewards, beta=beta)
    pairs = [x[:, i].flatten() for x in (best, ref) for i in (first, second)]
    chosen, rejected = implicit_rewards(*pairs, beta=beta)
    offset = (beta * log_partition).repeat_interleave(len(first))
    torch.testing.assert_close(rewards[:, first].flatten() - chosen, offset)
    assert offset.abs().min() > 0.1 and offset.unique().numel() == P
    torch.testing.assert_close(chosen - rejected, (rewards[:, first] - rewards[:, second]).flatten())


def test_population_dpo_converges_to_the_closed_form(world):
    ref, rewards, beta, *_ = world
    best, _ = kl_regularized_optimum(ref, rewards, beta=beta)
    torch.testing.assert_close(optimize(world, dpo_loss), best.exp(), rtol=0, atol=1e-6)


def test_population_gradient_is_zero_at_the_closed_form(world):
    ref, rewards, beta, *_ = world
    best, _ = kl_regularized_optimum(ref, rewards, beta=beta)
    logits = best.clone().requires_grad_()
    population_loss(world, logits.log_softmax(-1), dpo_loss).backward()
    torch.testing.assert_close(logits.grad, torch.zeros(P, V, dtype=torch.float64), rtol=0, atol=1e-15)


def test_matches_the_paper_formula_written_with_probabilities(generator):
    """式 6、7 不取对数、不用 logsigmoid，直接按概率写：-ln(1 / (1 + (比_l / 比_w)^β))。"""
    policy, reference = torch.rand(2, 2, 5, generator=generator, dtype=torch.float64) * 0.2 + 0.01
    beta = 0.7
    ratio_w, ratio_l = policy / reference
    expected = -(1 / (1 + (ratio_l / ratio_w) ** beta)).log()
    torch.testing.assert_close(dpo_loss(*policy.log(), *reference.log(), beta=beta), expected)


# 与独立实现一致 ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 0.4])
def test_smoothed_matches_soft_label_cross_entropy(generator, label_smoothing):
    inputs = [torch.randn(6, generator=generator, requires_grad=True) for _ in range(4)]
    ours = dpo_loss_smoothed(*inputs, label_smoothing=label_smoothing, beta=0.8)
    chosen, rejected, ref_chosen, ref_rejected = inputs
    margin = 0.8 * ((chosen - rejected) - (ref_chosen - ref_rejected))
    target = torch.full_like(margin, 1 - label_smoothing)
    theirs = F.binary_cross_entropy_with_logits(margin, target, reduction="none")
    torch.testing.assert_close(ours, theirs)
    for x in inputs:
        torch.testing.assert_close(
            torch.autograd.grad(ours.sum(), x, retain_graph=True),
            torch.autograd.grad(theirs.sum(), x, retain_graph=True),
        )


# transformers 5.23 把这个属性标为弃用，TRL 1.16 的 `_compute_loss` 仍在读它
trl_warning = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def trl_setup(tmp_path_factory):
    """真的 `DPOTrainer`：词表 14、两层的随机 Llama，策略与参考不同；数据 4 条，长度各不相同；断网。"""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    words = "<pad> <eos> <unk> a b c d e f g h i j k".split()
    tokenizer = word_tokenizer(words, unknown="<unk>")
    torch.manual_seed(0)
    model, ref_model = (tiny_llama(len(words), num_hidden_layers=2) for _ in range(2))
    dataset = Dataset.from_dict(
        {
            "prompt": ["a b ", "c ", "d e f ", "g h "],
            "chosen": ["c d e", "d", "g h i j", "k a"],
            "rejected": ["f", "e f g h", "k", "b c d"],
        }
    )

    def build(ref_model, **options):
        args = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            **options,
        )
        trainer = DPOTrainer(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(ref_model),
            args=args,
            train_dataset=dataset,
            processing_class=tokenizer,
        )
        return trainer, trainer.data_collator(list(trainer.train_dataset))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", _no_network)
        yield model, ref_model, build


def _no_network(*_):
    raise AssertionError("测试不应联网")


def pair_from_models(model, ref_model, batch, mask=None):
    """用本项目的函数从 logits 算出四个 (B,)，以及 chosen、rejected 的回答长度。"""
    input_ids, attention_mask = batch["input_ids"], batch["attention_mask"]
    mask = batch["completion_mask"][:, 1:].bool() if mask is None else mask
    logps = []
    for m, grad in ((model, True), (ref_model, False)):
        with torch.set_grad_enabled(grad):
            logits = m(input_ids=input_ids, attention_mask=attention_mask).logits
            per_token = log_probs_from_logits(logits[:, :-1], input_ids[:, 1:])
            logps += sequence_log_probs(per_token, mask).chunk(2)  # 前一半 chosen，后一半 rejected
    return logps, mask.sum(-1).chunk(2)


@trl_warning
@pytest.mark.parametrize("beta", [0.1, 0.5])
def test_matches_trl_trainer_loss_and_parameter_gradients(trl_setup, beta):
    model, ref_model, build = trl_setup
    trainer, batch = build(ref_model, beta=beta)
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()

    ours_model = copy.deepcopy(model)
    logps, _ = pair_from_models(ours_model, ref_model, batch)
    ours = dpo_loss(*logps, beta=beta).mean()
    ours.backward()

    torch.testing.assert_close(ours, theirs)
    assert abs(ours.item() - LN2) > 0.005  # 不是碰巧停在起点
    their_grads = dict(trainer.model.named_parameters())
    for name, parameter in ours_model.named_parameters():
        torch.testing.assert_close(parameter.grad, their_grads[name].grad, msg=lambda m, n=name: f"{n}: {m}")

    logged = {k: v[-1] for k, v in trainer._metrics["train"].items()}
    chosen, rejected = implicit_rewards(*logps, beta=beta)
    assert logged["rewards/chosen"] == pytest.approx(chosen.mean().item(), rel=1e-4)
    assert logged["rewards/margins"] == pytest.approx((chosen - rejected).mean().item(), rel=1e-4)


@trl_warning
def test_trl_ipo_divides_by_length_and_calls_tau_beta(trl_setup):
    model, ref_model, build = trl_setup
    trainer, batch = build(ref_model, beta=0.5, loss_type="ipo")
    theirs = trainer.compute_loss(trainer.model, batch)
    (chosen, rejected, ref_chosen, ref_rejected), (n_w, n_l) = pair_from_models(model, ref_model, batch)
    averaged = ipo_loss(chosen / n_w, rejected / n_l, ref_chosen / n_w, ref_rejected / n_l, tau=0.5)
    torch.testing.assert_close(averaged.mean(), theirs)
    summed = ipo_loss(chosen, rejected, ref_chosen, ref_rejected, tau=0.5)
    assert abs(summed.mean().item() - theirs.item()) > 1


@trl_warning
def test_trl_sigmoid_ignores_label_smoothing(trl_setup):
    model, ref_model, build = trl_setup
    trainer, batch = build(ref_model, beta=0.5, label_smoothing=0.2)
    theirs = trainer.compute_loss(trainer.model, batch).item()
    logps, _ = pair_from_models(model, ref_model, batch)
    assert theirs == pytest.approx(dpo_loss(*logps, beta=0.5).mean().item(), rel=1e-5)
    smoothed = dpo_loss_smoothed(*logps, label_smoothing=0.2, beta=0.5).mean().item()
    assert abs(smoothed - theirs) > 0.05


@trl_warning
def test_trl_robust_is_not_cdpo(trl_setup):
    """TRL 的 robust：((1-ε) ℓ(w,l) - ε ℓ(l,w)) / (1-2ε)，第二项是减号。"""
    model, ref_model, build = trl_setup
    trainer, batch = build(ref_model, beta=0.5, label_smoothing=0.2, loss_type="robust")
    theirs = trainer.compute_loss(trainer.model, batch)
    logps, _ = pair_from_models(model, ref_model, batch)
    observed = dpo_loss(*logps, beta=0.5)
    flipped = dpo_loss(logps[1], logps[0], logps[3], logps[2], beta=0.5)
    torch.testing.assert_close(((0.8 * observed - 0.2 * flipped) / 0.6).mean(), theirs)
    smoothed = dpo_loss_smoothed(*logps, label_smoothing=0.2, beta=0.5).mean()
    assert abs(smoothed.item() - theirs.item()) > 0.05


@trl_warning
def test_trl_initial_accuracy_is_zero_not_one_half(trl_setup):
    """策略等于参考时两个隐式奖励都是 0，`chosen > rejected` 不成立，平局记为错。"""
    model, _, build = trl_setup
    trainer, batch = build(model)
    assert trainer.compute_loss(trainer.model, batch).item() == pytest.approx(LN2, abs=1e-6)
    assert trainer._metrics["train"]["rewards/accuracies"] == [0.0]


@trl_warning
def test_common_prompt_tokens_cancel_in_the_loss_but_not_in_the_log(trl_setup):
    """mask 误含提示：求和的 DPO 损失不变（两边的提示项相同，作差抵消），但记录的奖励变了，除以长度的损失也变了。"""
    model, ref_model, build = trl_setup
    _, batch = build(ref_model)
    right, right_lengths = pair_from_models(model, ref_model, batch)
    everything = batch["attention_mask"][:, 1:].bool()
    wrong, wrong_lengths = pair_from_models(model, ref_model, batch, mask=everything)
    torch.testing.assert_close(dpo_loss(*wrong), dpo_loss(*right))
    assert (implicit_rewards(*wrong)[0] - implicit_rewards(*right)[0]).abs().max() > 0.05

    def per_token(logps, lengths):
        return dpo_loss(*[x / lengths[i % 2] for i, x in enumerate(logps)], beta=5.0)

    assert (per_token(wrong, wrong_lengths) - per_token(right, right_lengths)).abs().max() > 0.1


# 性质 ----------------------------------------------------------------------------------------------


def test_gradient_equals_the_formula(generator):
    """∇ℓ = -β σ(r̂_l - r̂_w)(∇log π(y_w) - ∇log π(y_l))，对共享参数的 softmax 模型逐元素核对。"""
    features = torch.randn(V, 6, generator=generator, dtype=torch.float64)
    theta = torch.randn(6, generator=generator, dtype=torch.float64, requires_grad=True)
    ref = torch.randn(V, generator=generator, dtype=torch.float64).log_softmax(-1)
    beta, i, j = 0.4, 1, 3  # 第 1 个答案是 chosen，第 3 个是 rejected
    log_probs = (features @ theta).log_softmax(-1)
    inputs = [log_probs[i : i + 1], log_probs[j : j + 1], ref[i : i + 1], ref[j : j + 1]]
    (actual,) = torch.autograd.grad(dpo_loss(*inputs, beta=beta).sum(), theta, retain_graph=True)
    chosen_reward, rejected_reward = implicit_rewards(*inputs, beta=beta)
    (up,) = torch.autograd.grad(log_probs[i], theta, retain_graph=True)
    (down,) = torch.autograd.grad(log_probs[j], theta)
    weight = torch.sigmoid(rejected_reward - chosen_reward)
    torch.testing.assert_close(actual, -beta * weight * (up - down))
    assert abs(weight.item() - 0.5) > 0.05  # 权重写反也测得出


@pytest.mark.parametrize(("a", "b"), [(2, -2), (0, -4), (-6, -10)])
def test_loss_depends_only_on_the_difference(a, b):
    """a - b = 4 的三个点损失都是 ln(1 + e^-4) = 0.01815，不论 chosen 升还是降。"""
    assert dpo_loss(*pair(a, b, 0, 0), beta=1.0).item() == pytest.approx(0.01815, abs=5e-6)


def test_swapping_the_pair_changes_the_loss_by_the_margin():
    """ℓ(w, l) - ℓ(l, w) = -(r̂_w - r̂_l)。"""
    swapped = [HAND[i] for i in (1, 0, 3, 2)]
    gap = dpo_loss(*HAND, beta=0.5) - dpo_loss(*swapped, beta=0.5)
    assert gap.item() == pytest.approx(-2.0, abs=1e-12)


def test_rejected_gradient_is_larger_in_probability_space():
    """π_w = 0.2、π_l = 0.05、β = 0.1 的起点：-0.25 与 +1.0，比值等于 π_w / π_l = 4。"""
    probs = torch.tensor([0.2, 0.05], dtype=torch.float64, requires_grad=True)
    chosen, rejected = probs.log().unsqueeze(-1)
    dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1).sum().backward()
    torch.testing.assert_close(probs.grad, torch.tensor([-0.25, 1.0], dtype=torch.float64))


def test_one_step_on_one_pair_of_a_tabular_softmax_always_raises_the_chosen(generator):
    """logits 的梯度方向是 e_w - e_l，log π_w 的变化正比于 1 - π_w + π_l > 0：chosen 下降需要参数共享。"""
    logits = 3 * torch.randn(200, V, generator=generator, dtype=torch.float64)
    logits.requires_grad_()
    log_probs = logits.log_softmax(-1)
    ref = torch.zeros(200, dtype=torch.float64)
    dpo_loss(log_probs[:, 0], log_probs[:, 1], ref, ref).sum().backward()
    moved = (logits - 1e-3 * logits.grad).log_softmax(-1)
    assert (moved[:, 0] > log_probs[:, 0]).all() and (moved[:, 1] < log_probs[:, 1]).all()


@pytest.mark.parametrize("label_smoothing", [0.1, 0.3])
def test_smoothed_stops_where_the_confidence_is_reached_and_plain_does_not(label_smoothing):
    """σ(margin) = 1 - ε 处 cDPO 的梯度为零；同一点普通 DPO 的梯度是 -βε。"""
    margin = math.log((1 - label_smoothing) / label_smoothing)
    slopes = []
    for epsilon in (label_smoothing, 0.0):
        chosen, *rest = pair(margin / 0.2, 0, 0, 0)
        chosen.requires_grad_()
        dpo_loss_smoothed(chosen, *rest, label_smoothing=epsilon, beta=0.2).backward()
        slopes.append(chosen.grad.item())
    assert slopes[0] == pytest.approx(0, abs=1e-15)
    assert slopes[1] == pytest.approx(-0.2 * label_smoothing, rel=1e-12)


@pytest.mark.parametrize("tau", [0.1, 1.0, 4.0])
def test_ipo_optimum_for_a_certain_preference_is_finite(tau):
    """论文 5.3.1 节：两个答案、均匀参考、y1 必胜，最优 π(y1) = σ(1 / (2τ))；DPO 在同样的数据上没有有限最优点。"""
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=100, tolerance_grad=1e-12, line_search_fn="strong_wolfe")
    uniform = torch.full((1,), -LN2, dtype=torch.float64)

    def closure():
        optimizer.zero_grad()
        chosen, rejected = logits.log_softmax(-1).unsqueeze(-1)
        loss = ipo_loss(chosen, rejected, uniform, uniform, tau=tau).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert logits.detach().softmax(-1)[0].item() == pytest.approx(
        1 / (1 + math.exp(-1 / (2 * tau))), abs=1e-9
    )

    chosen, rejected = (logits.detach() + torch.tensor([50.0, 0.0])).log_softmax(-1).unsqueeze(-1)
    chosen.requires_grad_()
    dpo_loss(chosen, rejected, uniform, uniform, beta=tau).sum().backward()
    assert chosen.grad.item() < 0  # 已经几乎确定，仍要继续推


# 边界 ----------------------------------------------------------------------------------------------


def test_huge_margins_stay_finite():
    """差为 ±1e4：损失 1e4 与 0，梯度 -1 与 0；先 sigmoid 再 log 会得到无穷大。"""
    chosen = torch.tensor([-1e4, 1e4], requires_grad=True)
    zero = torch.zeros(2)
    loss = dpo_loss(chosen, zero, zero, zero, beta=1.0)
    torch.testing.assert_close(loss, torch.tensor([1e4, 0.0]))
    loss.sum().backward()
    torch.testing.assert_close(chosen.grad, torch.tensor([-1.0, 0.0]))
    assert torch.sigmoid(chosen.detach()).log()[0] == -math.inf


def test_losses_are_not_reduced():
    four = [torch.zeros(4) for _ in range(4)]
    for loss in (dpo_loss(*four), ipo_loss(*four, tau=0.1), dpo_loss_smoothed(*four, label_smoothing=0.1)):
        assert loss.shape == (4,)


@pytest.mark.parametrize("bad", [0.0, -0.1, math.nan])
def test_non_positive_kl_weight_is_refused_by_name(bad):
    ref = torch.zeros(1, 2)
    for name, call in (
        ("beta", lambda: dpo_loss(*HAND, beta=bad)),
        ("beta", lambda: implicit_rewards(*HAND, beta=bad)),
        ("beta", lambda: dpo_loss_smoothed(*HAND, label_smoothing=0.1, beta=bad)),
        ("tau", lambda: ipo_loss(*HAND, tau=bad)),
        ("beta", lambda: kl_regularized_optimum(ref, ref, beta=bad)),
    ):
        with pytest.raises(ValueError, match=f"^{name}={bad}：.*必须大于 0"):
            call()


@pytest.mark.parametrize("bad", [-0.1, 0.5, 1.0, math.nan])
def test_label_smoothing_outside_its_range_is_refused(bad):
    with pytest.raises(ValueError, match=r"\[0, 0\.5\)"):
        dpo_loss_smoothed(*HAND, label_smoothing=bad)


# 必须拒绝的错误写法 --------------------------------------------------------------------------------
# 真值是式 4 的闭式最优策略；下面每个错误损失的总体最优点都离它至少 0.05（某个答案的概率）。


def sign_flipped(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return -F.logsigmoid(beta * ((rejected - ref_rejected) - (chosen - ref_chosen)))


def without_reference(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return -F.logsigmoid(beta * (chosen - rejected))


def reference_with_wrong_sign(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return -F.logsigmoid(beta * ((chosen + ref_chosen) - (rejected + ref_rejected)))


def beta_outside_the_sigmoid(chosen, rejected, ref_chosen, ref_rejected, *, beta):
    return -beta * F.logsigmoid((chosen - ref_chosen) - (rejected - ref_rejected))


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong", [sign_flipped, without_reference, reference_with_wrong_sign, beta_outside_the_sigmoid]
)
def test_rejects_losses_whose_optimum_is_not_the_closed_form(world, wrong):
    ref, rewards, beta, *_ = world
    best, _ = kl_regularized_optimum(ref, rewards, beta=beta)
    assert (optimize(world, wrong) - best.exp()).abs().max().item() > 0.05


@pytest.mark.rejects
def test_beta_outside_the_sigmoid_finds_the_optimum_of_beta_one(world):
    """β 放到 σ 外面只缩放梯度，收敛到的是 β = 1 的最优策略，与给的 β 无关。"""
    ref, rewards, *_ = world
    best_at_one, _ = kl_regularized_optimum(ref, rewards, beta=1.0)
    found = optimize(world, beta_outside_the_sigmoid)
    torch.testing.assert_close(found, best_at_one.exp(), rtol=0, atol=1e-6)


@pytest.mark.rejects
def test_without_reference_finds_the_optimum_of_a_uniform_reference(world):
    ref, rewards, beta, *_ = world
    best, _ = kl_regularized_optimum(torch.full_like(ref, -math.log(V)), rewards, beta=beta)
    torch.testing.assert_close(optimize(world, without_reference), best.exp(), rtol=0, atol=1e-6)


@pytest.mark.rejects
def test_rejects_mean_instead_of_sum():
    """chosen 2 个 token 各涨 1，rejected 10 个 token 各涨 0.5：求和差 -3，平均差 +0.5，符号相反。"""
    gains = torch.zeros(2, 10)
    gains[0, :2], gains[1] = 1.0, 0.5
    lengths = torch.tensor([2, 10])
    chosen, rejected = sequence_log_probs(gains, torch.arange(10) < lengths[:, None]).unsqueeze(-1)
    zero = torch.zeros(1)
    assert dpo_loss(chosen, rejected, zero, zero, beta=1.0).item() == pytest.approx(math.log1p(math.exp(3)))
    mean_loss = dpo_loss(chosen / 2, rejected / 10, zero, zero, beta=1.0).item()
    assert mean_loss == pytest.approx(math.log1p(math.exp(-0.5)))


@pytest.mark.rejects
@trl_warning
def test_rejects_forgetting_the_shift_and_averaging_against_trl(trl_setup):
    model, ref_model, build = trl_setup
    trainer, batch = build(ref_model, beta=0.5)
    theirs = trainer.compute_loss(trainer.model, batch).item()
    input_ids, mask = batch["input_ids"], batch["completion_mask"].bool()
    unshifted = []
    for m in (model, ref_model):
        logits = m(input_ids=input_ids, attention_mask=batch["attention_mask"]).logits
        unshifted += sequence_log_probs(log_probs_from_logits(logits, input_ids), mask).chunk(2)
    assert abs(dpo_loss(*unshifted, beta=0.5).mean().item() - theirs) > 0.05

    logps, lengths = pair_from_models(model, ref_model, batch)
    averaged = [x / lengths[i % 2] for i, x in enumerate(logps)]
    assert abs(dpo_loss(*averaged, beta=0.5).mean().item() - theirs) > 0.05


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("wrong", "value"),
    [
        pytest.param(lambda beta, m: -1 / (1 + math.exp(m)), -0.0179862, id="没有因子 beta"),
        pytest.param(lambda beta, m: -beta / (1 + math.exp(-m)), -0.0982014, id="权重写成 σ(r_w - r_l)"),
    ],
)
def test_rejects_wrong_gradients(wrong, value):
    """margin = 4、β = 0.1：正确的是 -0.1 × σ(-4) = -0.0017986，两个错误写法分别大 10 倍和 55 倍。"""
    chosen, *rest = pair(4 / 0.1, 0, 0, 0)
    chosen.requires_grad_()
    dpo_loss(chosen, *rest, beta=0.1).backward()
    assert chosen.grad.item() == pytest.approx(-0.00179862, rel=1e-5)
    assert wrong(0.1, 4) == pytest.approx(value, rel=1e-5)
    assert wrong(0.1, 4) / chosen.grad.item() > 9


@pytest.mark.rejects
@pytest.mark.parametrize("wrong_target", [lambda tau: 1 / tau, lambda tau: tau / 2, lambda tau: 2 * tau])
def test_rejects_wrong_ipo_targets(wrong_target):
    """最优点由论文 5.3.1 节给出：τ = 0.1 时 h = 1/(2τ) = 5；目标写成 1/τ 会停在 10。"""
    truth = 5.0
    h = torch.tensor([truth], dtype=torch.float64)
    zero = torch.zeros(1, dtype=torch.float64)
    assert ipo_loss(h, zero, zero, zero, tau=0.1).item() == pytest.approx(0, abs=1e-20)
    assert abs(wrong_target(0.1) - truth) > 1
