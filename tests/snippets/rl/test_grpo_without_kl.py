r"""snippets/rl/grpo_without_kl.py 与页面 docs/rl/grpo-without-kl.md 的测试。

真值的来源：(1) 手算；(2) 枚举全部的组，用 `grpo_loss` 的自动微分加权求和；(3) 只减均值时目标有闭式，对它做中心差分；
(4) 数值优化：从参考策略一步步走到不动；(5) TRL 1.16 的损失与梯度；再真的构造 `GRPOTrainer`，看参考模型在不在。
最后一节把流传的错误写法逐个写出来，断言上面的真值不认它们。全部用 float64（TRL 的小模型除外）。
"""

import itertools
import math

import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clip_fraction
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.grpo_without_kl import expected_advantages, fixed_point_success_rate, grpo_direction
from snippets.rl.kl_estimators import kl_k3_importance_weighted

REF = [0.12, 0.05, 0.03, 0.30, 0.20, 0.15, 0.10, 0.05]
CORRECT = [1.0, 1, 1, 0, 0, 0, 0, 0]
# group_advantages 的 ε=1e-6 加在标准差上，手算里没有它
EPS_TOLERANCE = {"rtol": 1e-5, "atol": 1e-6}


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def random_case(vocab_size, seed):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64)
    ref = torch.randn(vocab_size, generator=generator, dtype=torch.float64).log_softmax(-1)
    return logits, ref


def walk(ref, rewards, *, steps, lr=1.0, **options):
    logits = ref.log()
    for _ in range(steps):
        logits = logits + lr * grpo_direction(logits, ref.log(), rewards, **options)
    return logits.softmax(-1)


def kl(p, q):
    return (torch.xlogy(p, p) - torch.xlogy(p, q)).sum()


# ---- 手算 ----


def test_expected_advantages_by_hand():
    """G=2，对的概率 1/4：抽到对的，另一条也对（1/4）优势 0，另一条错（3/4）优势 1/√2，期望 3/(4√2)；
    抽到错的，另一条对（1/4）优势 −1/√2，期望 −1/(4√2)。
    """
    u = expected_advantages(tensor([0.25, 0.45, 0.30]), tensor([1.0, 0.0, 0.0]), group_size=2)
    root = math.sqrt(0.5)
    torch.testing.assert_close(u, tensor([0.75 * root, -0.25 * root, -0.25 * root]), **EPS_TOLERANCE)


def test_expected_advantages_follow_the_binomial_sum_in_double_precision():
    """G=12，对的概率 0.3：其余 11 条里对 k 条的概率是二项分布；逐项手写，float64 全精度。"""
    size, p, expected = 12, 0.3, 0.0
    for k in range(size):
        right = k + 1  # 自己也对
        mean = right / size
        std = math.sqrt(right * (size - right) / (size * (size - 1)))
        expected += math.comb(size - 1, k) * p**k * (1 - p) ** (size - 1 - k) * (1 - mean) / (std + 1e-6)
    u = expected_advantages(tensor([0.3, 0.7]), tensor([1.0, 0.0]), group_size=size)
    torch.testing.assert_close(u[0], tensor(expected), rtol=1e-12, atol=0)


def test_fixed_point_by_hand():
    """G=2 时 w=1/√2 是常数。取 β=1/√2，方程成为 p − p_ref = p(1−p)，即 p = √p_ref。"""
    ref = tensor([0.25, 0.01, 0.81])
    actual = fixed_point_success_rate(ref, beta=math.sqrt(0.5), group_size=2)
    torch.testing.assert_close(actual, tensor([0.5, 0.1, 0.9]))


# ---- 对照：枚举全部的组，真的反向传播 ----


@pytest.mark.parametrize("scale_by_std", [True, False])
@pytest.mark.parametrize("beta", [0.0, 0.3])
@pytest.mark.parametrize("rewards", [[1.0, 0.0, 0.0, 1.0], [0.2, -1.0, 2.0, 0.7]])
def test_direction_equals_enumerated_gradient_of_the_loss(rewards, beta, scale_by_std):
    """V=4、G=3：64 种组，每组算 `grpo_loss` 的梯度，按出现的概率加权。"""
    rewards, group_size = tensor(rewards), 3
    logits, ref = random_case(4, seed=1)
    leaf = logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(-1)
    total = 0.0
    for group in itertools.product(range(4), repeat=group_size):
        picks = torch.tensor(group)
        advantages = group_advantages(rewards[picks], group_size=group_size, scale_by_std=scale_by_std)
        loss = grpo_loss(
            log_probs[picks, None],
            log_probs[picks, None].detach(),
            ref[picks, None],
            advantages,
            torch.ones(group_size, 1, dtype=torch.bool),
            beta=beta,
        )
        total = total + log_probs[picks].sum().exp().detach() * loss
    expected = -torch.autograd.grad(total, leaf)[0]
    actual = grpo_direction(logits, ref, rewards, group_size=group_size, beta=beta, scale_by_std=scale_by_std)
    torch.testing.assert_close(actual, expected)


def test_reverse_direction_equals_gradient_of_ratio_weighted_k3():
    logits, ref = random_case(5, seed=2)
    leaf = logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(-1)
    penalty = kl_k3_importance_weighted(log_probs[:, None], log_probs[:, None], ref[:, None])[:, 0]
    expected = -torch.autograd.grad((log_probs.exp().detach() * penalty).sum(), leaf)[0]
    actual = grpo_direction(logits, ref, torch.zeros(5).double(), group_size=3, beta=1.0, reverse_kl=True)
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("reverse_kl", [False, True])
def test_mean_only_direction_is_the_gradient_of_a_closed_objective(reverse_kl):
    """只减均值时目标是 (G−1)/G·E[r] − β·KL；对它做中心差分，不经过本模块的任何公式。"""
    logits, ref = random_case(5, seed=3)
    rewards, beta, group_size = tensor([0.3, -0.5, 1.0, 0.0, 2.0]), 0.4, 4

    def objective(x):
        p, q = x.softmax(-1), ref.exp()
        penalty = kl(p, q) if reverse_kl else kl(q, p)
        return (group_size - 1) / group_size * (p * rewards).sum() - beta * penalty

    step = 1e-6
    numeric = torch.stack(
        [(objective(logits + d) - objective(logits - d)) / (2 * step) for d in torch.eye(5).double() * step]
    )
    actual = grpo_direction(
        logits,
        ref,
        rewards,
        group_size=group_size,
        beta=beta,
        reverse_kl=reverse_kl,
        scale_by_std=False,
    )
    torch.testing.assert_close(actual, numeric, rtol=1e-6, atol=1e-8)  # 差分的舍入误差约 1e-10


# ---- 性质：不动点 ----


@pytest.mark.parametrize("beta", [0.6, 3.0])
def test_training_stops_at_the_fixed_point_and_keeps_the_mix_of_correct_answers(beta):
    """走到不动为止：成功率等于方程的根；对的几条之间、错的几条之间的比例都与参考相同；KL 恰是下界。"""
    ref, correct = tensor(REF), tensor(CORRECT)
    p = walk(ref, correct, steps=400, lr=1.5, group_size=4, beta=beta)
    rate = (p * correct).sum()
    root = fixed_point_success_rate(tensor([0.2]), beta=beta, group_size=4)[0]
    torch.testing.assert_close(rate, root, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(p[:3] / rate, ref[:3] / 0.2, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(p[3:] / (1 - rate), ref[3:] / 0.8, rtol=1e-3, atol=1e-5)
    floor = rate * (rate / 0.2).log() + (1 - rate) * ((1 - rate) / 0.8).log()
    torch.testing.assert_close(kl(p, ref), floor, rtol=1e-3, atol=1e-5)


def test_reverse_kl_fixed_point_is_an_exponential_tilt_by_the_expected_advantage():
    ref, rewards = tensor([0.5, 0.3, 0.2]), tensor([0.0, 1.0, 0.4])
    p = walk(ref, rewards, steps=250, lr=1.5, group_size=4, beta=2.0, reverse_kl=True)
    u = expected_advantages(p, rewards, group_size=4)
    torch.testing.assert_close(p, (ref.log() + u / 2.0).softmax(-1), rtol=1e-6, atol=1e-8)


def test_reverse_kl_shifts_the_logit_of_the_success_rate_by_weight_over_beta():
    """0/1 奖励：logit p − logit p_ref = w_G(p)/β；w 用枚举得到的 u(对)−u(错)，不调用 question_weight。"""
    ref, correct = tensor([0.2, 0.1, 0.7]), tensor([1.0, 1.0, 0.0])
    p = walk(ref, correct, steps=250, lr=1.5, group_size=5, beta=1.5, reverse_kl=True)
    u = expected_advantages(p, correct, group_size=5)
    shift = torch.logit(p[:2].sum()) - torch.logit(ref[:2].sum())
    torch.testing.assert_close(shift, (u[0] - u[2]) / 1.5, rtol=1e-6, atol=1e-8)


def test_fixed_point_is_monotone_in_beta_and_has_the_right_limits():
    ref = tensor([0.1, 0.5, 0.9])
    rates = [fixed_point_success_rate(ref, beta=beta, group_size=8) for beta in (1e-6, 0.04, 0.2, 1.0, 1e6)]
    assert all((a > b).all() for a, b in itertools.pairwise(rates))
    torch.testing.assert_close(rates[0], torch.ones(3).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(rates[-1], ref, rtol=0, atol=1e-5)


@pytest.mark.parametrize("group_size", [2, 3, 8])
def test_root_balances_the_pull_against_the_expected_group_standard_deviation(group_size):
    """w_G(p)·p(1−p) = (G−1)/G·E[σ_K]，K~Bin(G,p)：对 G 次试验逐项求和，不调用 question_weight。"""
    ref, beta = tensor([0.001, 0.2, 0.7]), 0.9
    p = fixed_point_success_rate(ref, beta=beta, group_size=group_size)
    spread = sum(
        math.comb(group_size, k)
        * p**k
        * (1 - p) ** (group_size - k)
        * math.sqrt(k * (group_size - k) / (group_size * (group_size - 1)))
        for k in range(group_size + 1)
    )
    torch.testing.assert_close(
        beta * (p - ref), (group_size - 1) / group_size * spread, rtol=1e-12, atol=1e-14
    )


def test_strong_kl_bounds_the_amplification_of_rare_successes():
    """β > w(0)=(G−1)/√G：p ≤ p_ref·β/(β−w(0))，p_ref→0 时取等；β 更小则停在与 p_ref 无关的高度。"""
    rare = tensor([1e-3, 1e-9])
    ceiling = 2.6 / (2.6 - 7 / math.sqrt(8))
    gain = fixed_point_success_rate(rare, beta=2.6, group_size=8) / rare
    assert (gain < ceiling).all()
    torch.testing.assert_close(gain[1].item(), ceiling, rtol=1e-4, atol=0)
    assert fixed_point_success_rate(rare, beta=1.0, group_size=8).min() > 0.4


def test_rare_exploit_flips_late_without_kl_and_earlier_with_it():
    """漏洞（代理 1.2、真实 0）参考只给 0.005：β=0 先被压低，之后仍翻过来；加 KL 翻得更早。"""
    ref, proxy = tensor([0.2, 0.005, 0.795]), tensor([1.0, 1.2, 0.0])
    options = {"lr": 2.0, "group_size": 8}
    assert walk(ref, proxy, steps=50, beta=0.0, **options)[1] < 0.002
    assert walk(ref, proxy, steps=200, beta=0.0, **options)[0] > 0.99
    assert walk(ref, proxy, steps=280, beta=0.0, **options)[1] > 0.95
    assert walk(ref, proxy, steps=100, beta=0.2, **options)[1] > 0.85


def test_lost_accuracy_is_beta_times_the_reference_error_over_the_weight():
    """β 小时 1 − p ≈ β(1 − p_ref)/w，p→1 处 w=(G−1)/√G。"""
    ref = tensor([0.2, 0.7])
    lost = 1 - fixed_point_success_rate(ref, beta=1e-4, group_size=8)
    torch.testing.assert_close(lost, 1e-4 * (1 - ref) * math.sqrt(8) / 7, rtol=1e-3, atol=0)


def test_reaching_certainty_costs_at_least_minus_log_reference_success():
    """KL(π‖π_ref) ≥ −log p_ref，等号只在把参考限制到对的回答时成立；β=0 走出来的比它大。"""
    ref, correct = tensor(REF), tensor(CORRECT)
    restricted = ref * correct / 0.2
    torch.testing.assert_close(kl(restricted, ref), tensor(-math.log(0.2)))
    p = walk(ref, correct, steps=250, lr=2.0, group_size=4, beta=0.0)
    assert (p * correct).sum() > 0.998 and kl(p, ref) > -math.log(0.2) + 0.3


def test_without_kl_the_reference_drops_out():
    logits, ref = random_case(4, seed=5)
    _, other = random_case(4, seed=6)
    rewards = tensor([1.0, 0.0, 1.0, 0.0])
    torch.testing.assert_close(
        grpo_direction(logits, ref, rewards, group_size=4),
        grpo_direction(logits, other, rewards, group_size=4),
    )


def test_std_scaling_makes_beta_independent_of_the_reward_scale():
    """除以标准差：奖励乘 10 方向不变。只减均值：奖励乘 10 等于 β 除以 10。"""
    logits, ref = random_case(4, seed=7)
    rewards = tensor([1.0, 0.0, 0.3, 0.0])
    options = {"group_size": 4, "beta": 0.5}
    one = grpo_direction(logits, ref, rewards, **options)
    torch.testing.assert_close(grpo_direction(logits, ref, 10 * rewards, **options), one, **EPS_TOLERANCE)
    plain = grpo_direction(logits, ref, 10 * rewards, scale_by_std=False, **options)
    weaker = grpo_direction(logits, ref, rewards, group_size=4, beta=0.05, scale_by_std=False)
    torch.testing.assert_close(plain, 10 * weaker)
    assert (plain - one).abs().max() > 0.1


def test_group_advantage_expectations_sum_to_zero_and_vanish_for_equal_rewards():
    probs = tensor([0.1, 0.2, 0.3, 0.4])
    u = expected_advantages(probs, tensor([1.0, -0.5, 0.25, 0.25]), group_size=5)
    assert abs((probs * u).sum()) < 1e-12 and u[2] == u[3]
    assert not expected_advantages(probs, torch.ones(4).double(), group_size=5).any()


def test_float32_probabilities_stay_float32():
    u = expected_advantages(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0]), group_size=8)
    assert u.dtype == torch.float32


# ---- 性质：KL 项、裁剪、范数裁剪各管什么 ----


def one_batch(seed=0):
    generator = torch.Generator().manual_seed(seed)
    log_probs = -torch.rand(8, 3, generator=generator, dtype=torch.float64)
    advantages = group_advantages(tensor([1.0, 0, 0, 1, 0, 0, 1, 0]), group_size=4)
    return log_probs, advantages, torch.ones(8, 3, dtype=torch.bool)


def test_kl_term_does_nothing_on_the_very_first_update():
    """π=π_ref 处 k3 的值与梯度逐 token 都是 0，β 取多大都一样。"""
    log_probs, advantages, mask = one_batch()
    leaf = log_probs.clone().requires_grad_()
    grads = [
        torch.autograd.grad(grpo_loss(leaf, log_probs, log_probs, advantages, mask, beta=beta), leaf)[0]
        for beta in (0.0, 5.0)
    ]
    torch.testing.assert_close(*grads)


def test_beta_zero_needs_no_reference_and_ignores_it():
    log_probs, advantages, mask = one_batch()
    loss = grpo_loss(log_probs, log_probs, None, advantages, mask, beta=0.0)
    torch.testing.assert_close(
        loss, grpo_loss(log_probs, log_probs, log_probs - 9, advantages, mask, beta=0.0)
    )
    with pytest.raises(ValueError, match="ref_log_probs"):
        grpo_loss(log_probs, log_probs, None, advantages, mask, beta=0.04)


def test_clip_never_acts_with_one_update_per_batch_whatever_the_distance_to_the_reference():
    """比值恒为 1：裁剪宽度 0.2 与无穷大的梯度逐位相同，而一步之后的比值可以远在区间之外。"""
    log_probs, advantages, mask = one_batch()
    grads = []
    for width in (0.2, math.inf):
        leaf = log_probs.clone().requires_grad_()
        loss = grpo_loss(leaf, log_probs, None, advantages, mask, beta=0.0, clip_low=width, clip_high=width)
        grads.append(torch.autograd.grad(loss, leaf)[0])
    assert torch.equal(*grads)
    assert clip_fraction(log_probs, log_probs, advantages[:, None], mask.double()) == 0
    after = log_probs - 40 * grads[0]
    assert ((after - log_probs).exp() - 1).abs().max() > 1


def trajectory(optimizer, lr, max_norm, steps):
    ref, correct = tensor(REF), tensor(CORRECT)
    theta = ref.log().requires_grad_()
    opt = optimizer([theta], lr=lr)
    for _ in range(steps):
        theta.grad = -grpo_direction(theta.detach(), ref.log(), correct, group_size=4)
        norm = torch.nn.utils.clip_grad_norm_([theta], max_norm)
        assert norm > max_norm  # 每一步都被裁
        opt.step()
    return theta.detach().softmax(-1), ref


def test_gradient_norm_clipping_does_not_bound_the_kl():
    """SGD：阈值小 10 倍，走 10 倍的步数到同样远（步子都很小，比较的是同一条路径）。"""
    near, ref = trajectory(torch.optim.SGD, 6.0, 0.02, 10)
    far, _ = trajectory(torch.optim.SGD, 6.0, 0.002, 100)
    farther, _ = trajectory(torch.optim.SGD, 6.0, 0.002, 250)
    torch.testing.assert_close(kl(near, ref), kl(far, ref), rtol=0.05, atol=0)
    assert kl(farther, ref) > 2 * kl(far, ref)


def test_adam_cancels_the_clipping_threshold():
    """每一步都被裁时，换阈值等于梯度乘常数，Adam 的更新不变（只差分母里的 1e-8）。"""
    one, ref = trajectory(torch.optim.Adam, 0.02, 0.01, 60)
    other, _ = trajectory(torch.optim.Adam, 0.02, 0.001, 60)
    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5)
    assert kl(one, ref) > 0.2


# ---- 边界 ----


@pytest.mark.parametrize("beta", [0.0, -0.1])
def test_fixed_point_needs_a_positive_beta(beta):
    with pytest.raises(ValueError, match="没有内部的不动点|没有 KL"):
        fixed_point_success_rate(tensor([0.2]), beta=beta, group_size=8)


def test_expected_advantages_carry_no_gradient():
    probs = tensor([0.4, 0.6]).requires_grad_()
    assert not expected_advantages(probs, tensor([1.0, 0.0]), group_size=4).requires_grad


def test_group_of_one_is_refused():
    with pytest.raises(ValueError, match="group_size=1"):
        expected_advantages(tensor([0.5, 0.5]), tensor([1.0, 0.0]), group_size=1)


# ---- 对照：TRL 1.16 ----

# TRL 1.16 自己还在读旧名字 gradient_checkpointing，transformers 5.23 对此发 FutureWarning
TRL_OLD_NAMES = pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    path = tmp_path_factory.mktemp("model")
    vocab = {word: i for i, word in enumerate(["<pad>", "<eos>", "a", "b", "c", "d"])}
    words = Tokenizer(WordLevel(vocab, unk_token="a"))
    words.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="<eos>")
    size = {"vocab_size": 6, "n_positions": 32, "n_embd": 8, "n_layer": 1, "n_head": 2}
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**size, bos_token_id=1, eos_token_id=1, pad_token_id=0)).save_pretrained(path)
    return str(path), tokenizer


def trl_trainer(tiny_model, tmp_path, peft_config=None, **options):
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    path, tokenizer = tiny_model
    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=4,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )

    def reward(completions, **kwargs):
        return [float(len(text.split()) % 2) for text in completions]

    data = Dataset.from_dict({"prompt": ["a b", "c d"]})
    return GRPOTrainer(
        path, reward, args=args, train_dataset=data, processing_class=tokenizer, peft_config=peft_config
    )


@TRL_OLD_NAMES
@pytest.mark.parametrize("reverse_kl", [False, True])
def test_direction_equals_the_expected_gradient_of_trl(reverse_kl):
    """每条回答单独算 TRL 的损失与梯度，按概率加权；`use_bias_correction_kl` 打开就是反向 KL。"""
    logits, ref = random_case(5, seed=8)
    rewards, log_probs = tensor([1.0, 0.0, 0.0, 1.0, 0.5]), logits.log_softmax(-1)
    u = expected_advantages(log_probs.exp(), rewards, group_size=4)
    expected = torch.zeros(5).double()
    for a in range(5):
        row = log_probs[a].reshape(1, 1)
        _, grad, _ = trl_grpo_loss(
            row,
            row,
            u[a : a + 1],
            torch.ones(1, 1, dtype=torch.bool),
            ref_log_probs=ref[a].reshape(1, 1),
            beta=0.3,
            bias_correction_kl=reverse_kl,
        )
        score = torch.eye(5).double()[a] - log_probs.exp()  # ∇log π(a)
        expected -= log_probs[a].exp() * grad.item() * score
    actual = grpo_direction(logits, ref, rewards, group_size=4, beta=0.3, reverse_kl=reverse_kl)
    torch.testing.assert_close(actual, expected)


@TRL_OLD_NAMES
def test_trl_loads_no_reference_model_by_default_and_logs_no_kl(tiny_model, tmp_path):
    without = trl_trainer(tiny_model, tmp_path)
    assert without.args.beta == 0.0 and without.ref_model is None
    without.train()
    assert not any(key.endswith("kl") for row in without.state.log_history for key in row)
    with_kl = trl_trainer(tiny_model, tmp_path, beta=0.04)
    assert with_kl.ref_model is not None
    with_kl.train()
    assert any(key.endswith("kl") for row in with_kl.state.log_history for key in row)


@TRL_OLD_NAMES
def test_trl_refuses_to_refresh_a_reference_that_does_not_exist(tiny_model, tmp_path):
    with pytest.raises(ValueError, match="sync_ref_model"):
        trl_trainer(tiny_model, tmp_path, sync_ref_model=True)


@TRL_OLD_NAMES
def test_trl_with_lora_has_no_second_model_even_with_kl(tiny_model, tmp_path):
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    assert trl_trainer(tiny_model, tmp_path, peft_config=lora, beta=0.04).ref_model is None


# ---- 流传的错误写法：真值不认它们 ----


@pytest.mark.rejects
def test_exponential_tilt_by_the_reward_is_not_where_grpo_with_k3_stops():
    """π* ∝ π_ref·e^{r/β} 处，k3 与标准差的 GRPO 还在动；在 `fixed_point_success_rate` 给的点上才不动。"""
    ref, correct, beta = tensor(REF), tensor(CORRECT), 0.5
    tilt = (ref.log() + correct / beta).log_softmax(-1)
    assert grpo_direction(tilt, ref.log(), correct, group_size=8, beta=beta).abs().max() > 0.05
    rate = fixed_point_success_rate(tensor([0.2]), beta=beta, group_size=8)
    ours = ref * torch.where(correct > 0, rate / 0.2, (1 - rate) / 0.8)
    still = grpo_direction(ours.log(), ref.log(), correct, group_size=8, beta=beta)
    assert still.abs().max() < 1e-6


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [
        lambda p, p_ref, w, beta: beta * (p - p_ref) - w * (1 - p),  # 漏了 p
        lambda p, p_ref, w, beta: beta * (p_ref - p) - w * p * (1 - p),  # KL 的符号反了
        lambda p, p_ref, w, beta: beta * (p - p_ref) - p * (1 - p) * 7 / 8,  # 当成没有除以标准差
        lambda p, p_ref, w, beta: torch.logit(p) - torch.logit(p_ref) - w / beta,  # 反向 KL 的方程
    ],
)
def test_wrong_fixed_point_equations_fail_where_training_really_stops(wrong):
    ref, correct, beta = tensor(REF), tensor(CORRECT), 0.5
    p = walk(ref, correct, steps=250, lr=1.5, group_size=8, beta=beta)
    u = expected_advantages(p, correct, group_size=8)
    rate, w = (p * correct).sum(), u[0] - u[-1]
    right = beta * (rate - 0.2) - w * rate * (1 - rate)
    assert abs(right) < 2e-4 and abs(wrong(rate, tensor(0.2), w, beta)) > 0.02
