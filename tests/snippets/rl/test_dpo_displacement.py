"""likelihood displacement 的一阶条件与两种带锚的损失。真值来源：

1. 手算：对数概率取整数，损失能写成 ln(1 + e^k)。
2. 真走一步：用 PyTorch 自动微分对完整的 DPO 损失做一小步梯度下降，有限差分量两个对数概率的变化。
3. TRL 1.16 的 `DPOTrainer`：`loss_type=["sigmoid", "sft"]`，真调用 `compute_loss`，比较损失与全部参数梯度。
4. 论文公式按概率直接写（不取对数、不用 logsigmoid）。

最后一组把流传的错误写法逐个写出来，断言它们与真值相差一个说得出的量。
"""

import copy
import math
import socket

import pytest
import torch
import torch.nn.functional as F
from tiny_models import tiny_llama, word_tokenizer

from snippets.rl.dpo import dpo_loss
from snippets.rl.dpo_displacement import displacement_rates, dpo_nll_loss, dpop_loss
from snippets.rl.log_probs import log_probs_from_logits, sequence_log_probs


def pair(*values):
    """(chosen, rejected, ref_chosen, ref_rejected)，每个是形状 (1,) 的双精度张量。"""
    return [torch.tensor([float(v)], dtype=torch.float64) for v in values]


UP = pair(-2, -3, -4, -1)  # Δ_w = +2，Δ_l = -2
DOWN = pair(-5, -9, -4, -2)  # Δ_w = -1，Δ_l = -7：两者都降


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# 手算 ----------------------------------------------------------------------------------------------


def test_dpop_equals_dpo_while_the_chosen_is_above_the_reference():
    """Δ_w = 2 > 0，罚为 0：β = 0.5 时 ln(1 + e^-2) = 0.126928。"""
    assert dpop_loss(*UP, beta=0.5).item() == pytest.approx(0.126928, abs=1e-6)


def test_dpop_by_hand_when_the_chosen_fell():
    """β = 0.5、λ = 4：0.5 × (-1 + 7 - 4 × 1) = 1，损失 ln(1 + e^-1) = 0.313262。"""
    assert dpop_loss(*DOWN, beta=0.5, penalty_weight=4.0).item() == pytest.approx(0.313262, abs=1e-6)


def test_dpop_defaults_by_hand():
    """β = 0.1、λ = 50：0.1 × (6 - 50) = -4.4，损失 ln(1 + e^4.4) = 4.412203。"""
    assert dpop_loss(*DOWN).item() == pytest.approx(4.412203, abs=1e-6)


def test_dpop_gradient_by_hand():
    """对 chosen -β(1+λ)σ(-1) = -0.5 × 5 × 0.268941，对 rejected +βσ(-1)：罚只放大 chosen 一侧。"""
    inputs = [x.clone().requires_grad_() for x in DOWN[:2]]
    dpop_loss(*inputs, *DOWN[2:], beta=0.5, penalty_weight=4.0).backward()
    assert inputs[0].grad.item() == pytest.approx(-0.6723536, abs=1e-7)
    assert inputs[1].grad.item() == pytest.approx(+0.1344707, abs=1e-7)


def test_dpop_starts_with_exactly_the_dpo_gradient():
    """起点 Δ_w = 0：relu 的导数取 0，两个损失的梯度都是 ∓β/2。"""
    for loss in (dpo_loss, dpop_loss):
        inputs = [x.requires_grad_() for x in pair(-7, -11)]
        loss(*inputs, *pair(-7, -11), beta=0.3).backward()
        assert [x.grad.item() for x in inputs] == pytest.approx([-0.15, 0.15], rel=1e-12)


def test_nll_by_hand():
    """β = 0.5 的 DPO 0.126928，加 α × 2 / 4：α = 3 时 1.626928。"""
    value = dpo_nll_loss(*UP, torch.tensor([4]), beta=0.5, alpha=3.0)
    assert value.item() == pytest.approx(1.626928, abs=1e-6)


def test_nll_defaults_by_hand():
    """β = 0.1、α = 1：ln(1 + e^-0.4) + 2/4 = 1.013015。"""
    assert dpo_nll_loss(*UP, torch.tensor([4])).item() == pytest.approx(1.013015, abs=1e-6)


def test_nll_divides_each_pair_by_its_own_length():
    """三对相同、长度 2、8 与 1：NLL 分别是 2/2、2/8 与 2/1，不是除以平均长度。"""
    value = dpo_nll_loss(*[x.repeat(3) for x in UP], torch.tensor([2, 8, 1]), beta=0.5)
    assert value.tolist() == pytest.approx([1.126928, 0.376928, 2.126928], abs=1e-6)


def test_rates_by_hand():
    """g_w = (1, 0)、g_l = (3, 1)：1 - 3 = -2（chosen 降），3 - 10 = -7。"""
    rates = displacement_rates(torch.tensor([1.0, 0.0]), torch.tensor([3.0, 1.0]))
    assert [x.item() for x in rates] == [-2.0, -7.0]


# 独立实现 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(6))
def test_rates_predict_a_real_gradient_step_of_a_shared_network(seed):
    """两层网络、整条损失的自动微分、中心差分；六个种子里 chosen 升降都有（见下一条）。"""
    chosen_rate, measured_chosen, rejected_rate, measured_rejected = predicted_and_measured(seed)
    assert measured_chosen == pytest.approx(chosen_rate, rel=1e-5, abs=1e-6)
    assert measured_rejected == pytest.approx(rejected_rate, rel=1e-5, abs=1e-6)


def predicted_and_measured(seed):
    g = torch.Generator().manual_seed(seed)
    features = torch.randn(2, 6, generator=g, dtype=torch.float64)
    features[1] = 2.0 * features[0] + 0.3 * features[1]  # 两条回答的特征同向
    theta = torch.randn(6 * 5 + 5 * 4, generator=g, dtype=torch.float64).requires_grad_()

    def logps(vector):
        hidden = torch.tanh(features @ vector[:30].view(6, 5))
        return (hidden @ vector[30:].view(5, 4)).log_softmax(-1)[:, 0]  # 不同上下文里的同一个 token

    ref = logps(theta).detach() + torch.tensor([0.4, -0.3])
    chosen, rejected = logps(theta)
    loss = dpo_loss(chosen[None], rejected[None], ref[:1], ref[1:], beta=0.7).sum()
    (grad,) = torch.autograd.grad(loss, theta, retain_graph=True)
    ratio_w, ratio_l = (torch.stack([chosen, rejected]).detach() - ref).exp()
    weight = (1 / (1 + (ratio_w / ratio_l) ** 0.7)).item()  # σ(r̂_l - r̂_w)，按概率写
    step = 1e-4
    with torch.no_grad():
        difference = (logps(theta - step * grad) - logps(theta + step * grad)) / (2 * step * 0.7 * weight)
    grads = [torch.autograd.grad(x, theta, retain_graph=True)[0] for x in (chosen, rejected)]
    chosen_rate, rejected_rate = displacement_rates(*grads)
    return chosen_rate.item(), difference[0].item(), rejected_rate.item(), difference[1].item()


def test_both_signs_occur_so_the_previous_test_is_not_vacuous():
    signs = {predicted_and_measured(seed)[1] > 0 for seed in range(6)}
    assert signs == {True, False}


@pytest.mark.parametrize("penalty_weight", [0.0, 2.0, 50.0])
def test_dpop_matches_the_paper_formula_written_with_probabilities(generator, penalty_weight):
    """-ln(1 / (1 + (比_l / 比_w · max(1, 1/比_w)^λ)^β))，比 = π / π_ref。"""
    policy, reference = torch.rand(2, 2, 7, generator=generator, dtype=torch.float64) * 0.2 + 0.01
    beta = 0.3
    ratio_w, ratio_l = policy / reference
    assert (ratio_w > 1).any() and (ratio_w < 1).any()
    inner = ratio_l / ratio_w * (1 / ratio_w).clamp(min=1) ** penalty_weight
    expected = -(1 / (1 + inner**beta)).log()
    ours = dpop_loss(*policy.log(), *reference.log(), beta=beta, penalty_weight=penalty_weight)
    torch.testing.assert_close(ours, expected)


# transformers 5.23 把这个属性标为弃用，TRL 1.16 的 `_compute_loss` 仍在读它
trl_warning = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")


@pytest.fixture(scope="module")
def trl_setup(tmp_path_factory):
    """真的 `DPOTrainer`：词表 14 的随机 Llama，策略与参考不同；chosen 等长、不等长两份数据；断网。"""
    from datasets import Dataset, disable_progress_bars
    from trl import DPOConfig, DPOTrainer

    disable_progress_bars()
    words = "<pad> <eos> <unk> a b c d e f g h i j k".split()
    tokenizer = word_tokenizer(words, unknown="<unk>")
    torch.manual_seed(0)
    model, ref_model = (tiny_llama(len(words), num_hidden_layers=1) for _ in range(2))
    chosen = {"equal": ["c d e", "d d k", "g h i"], "unequal": ["c d e f g", "d", "g h"]}

    def build(kind, **options):
        args = DPOConfig(
            output_dir=str(tmp_path_factory.mktemp("dpo")),
            report_to=[],
            use_cpu=True,
            bf16=False,
            activation_checkpointing=False,
            beta=0.5,
            **options,
        )
        data = {"prompt": ["a b ", "c ", "d e f "], "chosen": chosen[kind], "rejected": ["f", "e f g h", "k"]}
        trainer = DPOTrainer(
            model=copy.deepcopy(model),
            ref_model=copy.deepcopy(ref_model),
            args=args,
            train_dataset=Dataset.from_dict(data),
            processing_class=tokenizer,
        )
        return trainer, trainer.data_collator(list(trainer.train_dataset))

    def no_network(*_):
        raise AssertionError("测试不应联网")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", no_network)
        yield model, ref_model, build


def four_logps(model, ref_model, batch):
    mask = batch["completion_mask"][:, 1:].bool()
    logps = []
    for m, grad in ((model, True), (ref_model, False)):
        with torch.set_grad_enabled(grad):
            logits = m(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
            per_token = log_probs_from_logits(logits[:, :-1], batch["input_ids"][:, 1:])
            logps += sequence_log_probs(per_token, mask).chunk(2)
    return logps, mask.sum(-1).chunk(2)[0]


@trl_warning
@pytest.mark.parametrize("alpha", [1.0, 0.2])
def test_nll_matches_trl_sigmoid_plus_sft_when_chosen_lengths_are_equal(trl_setup, alpha):
    model, ref_model, build = trl_setup
    trainer, batch = build("equal", loss_type=["sigmoid", "sft"], loss_weights=[1.0, alpha])
    theirs = trainer.compute_loss(trainer.model, batch)
    theirs.backward()
    ours_model = copy.deepcopy(model)
    logps, lengths = four_logps(ours_model, ref_model, batch)
    assert lengths.unique().numel() == 1
    ours = dpo_nll_loss(*logps, lengths, beta=0.5, alpha=alpha).mean()
    ours.backward()
    torch.testing.assert_close(ours, theirs)
    their_grads = dict(trainer.model.named_parameters())
    for name, parameter in ours_model.named_parameters():
        torch.testing.assert_close(parameter.grad, their_grads[name].grad, msg=lambda m, n=name: f"{n}: {m}")


@trl_warning
def test_trl_averages_the_nll_over_all_chosen_tokens_of_the_batch(trl_setup):
    """chosen 不等长：TRL 是 Σlogπ / Σ长度，论文是每条先平均；两个值不同。"""
    model, ref_model, build = trl_setup
    trainer, batch = build("unequal", loss_type=["sigmoid", "sft"], loss_weights=[1.0, 1.0])
    theirs = trainer.compute_loss(trainer.model, batch)
    logps, lengths = four_logps(model, ref_model, batch)
    token_mean = dpo_loss(*logps, beta=0.5).mean() - logps[0].sum() / lengths.sum()
    torch.testing.assert_close(theirs, token_mean)
    paper = dpo_nll_loss(*logps, lengths, beta=0.5, alpha=1.0).mean()
    assert abs(paper.item() - theirs.item()) > 0.05


# 性质 ----------------------------------------------------------------------------------------------


def test_when_the_chosen_falls_the_rejected_falls_faster(generator):
    """⟨g_w,g_l⟩ > ‖g_w‖² 蕴含 ‖g_l‖ > ‖g_w‖（柯西–施瓦茨）；两个变化率之差是 ‖g_w - g_l‖²。"""
    fell = 0
    for _ in range(500):
        g_w, g_l = torch.randn(2, 3, generator=generator, dtype=torch.float64)
        chosen, rejected = displacement_rates(g_w, g_l)
        torch.testing.assert_close(chosen - rejected, (g_w - g_l).square().sum())
        if chosen < 0:
            fell += 1
            assert rejected < chosen and g_l.norm() > g_w.norm()
    assert fell > 20


def test_tabular_chosen_cannot_fall(generator):
    """g = e_y - π：变化率恰为 1 - π_w + π_l；π_w = 0.2、π_l = 0.05 时按概率计 chosen 升的是 rejected 降的 2.96 倍。"""
    for _ in range(50):
        probs = (3 * torch.randn(6, generator=generator, dtype=torch.float64)).softmax(-1)
        one_hot = torch.eye(6, dtype=torch.float64)
        chosen, rejected = displacement_rates(one_hot[0] - probs, one_hot[1] - probs)
        torch.testing.assert_close(chosen, 1 - probs[0] + probs[1])
        assert chosen > 0 > rejected
    probs = torch.tensor([0.2, 0.05, 0.25, 0.25, 0.25], dtype=torch.float64)
    one_hot = torch.eye(5, dtype=torch.float64)
    chosen, rejected = displacement_rates(one_hot[0] - probs, one_hot[1] - probs)
    assert (0.2 * chosen / (-0.05 * rejected)).item() == pytest.approx(2.9565, abs=1e-4)


def test_pushing_down_an_unlikely_answer_squeezes_the_others_towards_the_largest():
    """只压第 0 个（概率 0.01）：最大的升，中间的反而降；最大的相对每个其他答案都变大。"""
    logits = torch.tensor([0.01, 0.6, 0.2, 0.19], dtype=torch.float64).log().requires_grad_()
    before = logits.detach().softmax(-1)
    (grad,) = torch.autograd.grad(logits.log_softmax(-1)[0], logits)
    after = (logits.detach() - 0.5 * grad).softmax(-1)
    assert after[1] > before[1] and (after[[0, 2, 3]] < before[[0, 2, 3]]).all()
    assert (after[1] / after[[0, 2, 3]] > before[1] / before[[0, 2, 3]]).all()


def test_common_prefix_cancels_in_the_margin_gradient(generator):
    """两条回答共有的项加到两边，方向不变：前缀没有被 DPO 损失直接训练。"""
    g_w, g_l, prefix = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    bare, shared = displacement_rates(g_w, g_l), displacement_rates(g_w + prefix, g_l + prefix)
    torch.testing.assert_close(shared[0] - bare[0], prefix @ (g_w - g_l))
    torch.testing.assert_close(shared[0] - shared[1], bare[0] - bare[1])


def test_beta_scales_the_first_step_without_turning_it(generator):
    """起点权重都是 1/2：不同 β 的梯度平行，所以加大 β 改不了起点的方向。"""
    chosen = torch.randn(4, generator=generator, dtype=torch.float64)
    rejected = torch.randn(4, generator=generator, dtype=torch.float64)
    grads = []
    for beta in (0.1, 5.0):
        inputs = [chosen.clone().requires_grad_(), rejected.clone().requires_grad_()]
        dpo_loss(*inputs, chosen, rejected, beta=beta).sum().backward()
        grads.append(torch.cat([x.grad for x in inputs]))
    torch.testing.assert_close(grads[1], 50 * grads[0])


def test_zero_weights_reduce_both_losses_to_dpo(generator):
    four = list(torch.randn(4, 5, generator=generator, dtype=torch.float64))
    plain = dpo_loss(*four, beta=0.3)
    torch.testing.assert_close(dpop_loss(*four, beta=0.3, penalty_weight=0.0), plain)
    torch.testing.assert_close(dpo_nll_loss(*four, torch.full((5,), 3), beta=0.3, alpha=0.0), plain)


def test_lowering_both_by_the_same_amount_costs_nothing_in_dpo_but_does_in_the_others():
    lower = [DOWN[0] - 10, DOWN[1] - 10, *DOWN[2:]]
    assert dpo_loss(*lower).item() == pytest.approx(dpo_loss(*DOWN).item(), rel=1e-12)
    assert (dpop_loss(*lower) - dpop_loss(*DOWN)).item() > 40
    length = torch.tensor([5])
    assert (dpo_nll_loss(*lower, length) - dpo_nll_loss(*DOWN, length)).item() == pytest.approx(2.0)


# 边界 ----------------------------------------------------------------------------------------------


def test_huge_drops_stay_finite():
    """Δ_w = -1e4、λ = 50：罚 5e5，损失约 5.1e4 而不是无穷大。"""
    chosen = torch.tensor([-1e4], requires_grad=True)
    zero = torch.zeros(1)
    loss = dpop_loss(chosen, zero, zero, zero)
    loss.sum().backward()
    assert loss.item() == pytest.approx(5.1e4, rel=1e-6) and chosen.grad.item() == pytest.approx(-5.1)


def test_losses_are_not_reduced_and_gradients_reach_both_sides():
    four = [torch.zeros(4, requires_grad=True) for _ in range(4)]
    for loss in (dpop_loss(*four), dpo_nll_loss(*four, torch.full((4,), 2))):
        assert loss.shape == (4,)


@pytest.mark.parametrize("bad", [-0.1, math.nan])
def test_negative_weights_are_refused(bad):
    with pytest.raises(ValueError, match="不小于 0"):
        dpop_loss(*UP, penalty_weight=bad)
    with pytest.raises(ValueError, match="不小于 0"):
        dpo_nll_loss(*UP, torch.tensor([4]), alpha=bad)


def test_empty_answers_and_bad_beta_are_refused():
    with pytest.raises(ValueError, match="没有 token"):
        dpo_nll_loss(*UP, torch.tensor([0]))
    for call in (lambda: dpop_loss(*UP, beta=0.0), lambda: dpo_nll_loss(*UP, torch.tensor([4]), beta=0.0)):
        with pytest.raises(ValueError, match="必须大于 0"):
            call()


# 必须拒绝的错误写法 --------------------------------------------------------------------------------


def dpop_wrong(chosen, rejected, ref_chosen, ref_rejected, *, kind, beta=0.5, lam=4.0):
    up, low = chosen - ref_chosen, rejected - ref_rejected
    if kind == "罚的符号反":
        return -F.logsigmoid(beta * (up - low + lam * F.relu(-up)))
    if kind == "罚在 β 外面":
        return -F.logsigmoid(beta * (up - low) - lam * F.relu(-up))
    if kind == "罚在 σ 外面":
        return -F.logsigmoid(beta * (up - low)) + lam * F.relu(-up)
    if kind == "罚的是 rejected":
        return -F.logsigmoid(beta * (up - low - lam * F.relu(-low)))
    if kind == "罚的是上涨":
        return -F.logsigmoid(beta * (up - low - lam * F.relu(up)))
    raise AssertionError(kind)


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        ("罚的符号反", 0.006715),  # ln(1 + e^-5)
        ("罚在 β 外面", 1.313262),  # ln(1 + e^1)
        ("罚在 σ 外面", 4.048587),  # ln(1 + e^-3) + 4
        ("罚的是 rejected", 11.000017),  # ln(1 + e^11)
        ("罚的是上涨", 0.048587),  # ln(1 + e^-3)，等于没罚
    ],
)
def test_rejects_wrong_dpop(kind, wrong):
    """DOWN 上正确值 0.313262（手算见上），每个错误写法至少差 0.2。"""
    value = dpop_wrong(*DOWN, kind=kind).item()
    assert value == pytest.approx(wrong, abs=1e-5)
    assert abs(value - 0.313262) > 0.2


@pytest.mark.rejects
def test_rejects_clamp_instead_of_relu_at_the_start():
    """起点 Δ_w = 0：clamp(min=0) 的导数取 1，chosen 的系数变成 (1 + 50) 倍。"""
    chosen, *rest = pair(-7, -11, -7, -11)
    chosen.requires_grad_()
    shifted = chosen - 50 * (rest[1] - chosen).clamp(min=0)
    dpo_loss(shifted, *rest, beta=0.3).backward()
    assert chosen.grad.item() == pytest.approx(-0.15 * 51)


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("kind", "wrong"), [("求和不除长度", 2.126928), ("加在 rejected 上", 0.876928), ("减去参考", -0.373072)]
)
def test_rejects_wrong_nll(kind, wrong):
    """UP、长度 4、β = 0.5、α = 1：正确值 0.126928 + 0.5 = 0.626928。"""
    chosen, rejected, ref_chosen, _ = UP
    plain = dpo_loss(*UP, beta=0.5)
    value = {
        "求和不除长度": plain - chosen,
        "加在 rejected 上": plain - rejected / 4,
        "减去参考": plain - (chosen - ref_chosen) / 4,
    }[kind].item()
    truth = dpo_nll_loss(*UP, torch.tensor([4]), beta=0.5).item()
    assert truth == pytest.approx(0.626928, abs=1e-6)
    assert value == pytest.approx(wrong, abs=1e-6) and abs(value - truth) > 0.2


@pytest.mark.rejects
def test_rejects_the_ratio_of_partial_derivatives_as_the_ratio_of_updates():
    """对概率的偏导之比是 π_w/π_l = 4；表格式上真走一步，chosen 升、rejected 降之比却是 2.96，倒过来也不是 4。"""
    logits = torch.tensor([0.2, 0.05, 0.25, 0.25, 0.25], dtype=torch.float64).log().requires_grad_()
    log_probs = logits.log_softmax(-1)
    ref = log_probs.detach()
    loss = dpo_loss(log_probs[:1], log_probs[1:2], ref[:1], ref[1:2])
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    moved = (logits.detach() - 1e-5 * grad).softmax(-1) - logits.detach().softmax(-1)
    assert (moved[0] / -moved[1]).item() == pytest.approx(2.9565, abs=1e-3)
