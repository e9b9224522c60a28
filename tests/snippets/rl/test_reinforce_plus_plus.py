r"""REINFORCE++ 与 baseline 变体：优势、偏差、损失。

真值来自与公式无关的地方：手算；`torch.distributions` 的精确 KL 与对 J 的自动微分（枚举全部序列）；对全部批的精确枚举；
价值恒为 0、λ=1 的 GAE；以及 verl 0.9.1 与 OpenRLHF 0.11.2 的冻结数值（`tests/golden/make_reinforce_plus_plus.py` 生成）。
期望一律精确求和，没有采样误差。
"""

import itertools
import json
import math
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from torch.distributions import Categorical, kl_divergence

from snippets.rl.grpo import group_advantages
from snippets.rl.kl_estimators import kl_k1
from snippets.rl.masking import aggregate_loss
from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards, whiten
from snippets.rl.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    reinforce_plus_plus_baseline_loss,
    returns_to_go,
    whiten_per_sequence,
)
from snippets.rl.rloo import leave_one_out_advantages

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "reinforce_plus_plus.json").read_text())
F64 = torch.float64


def tensor(values):
    return torch.tensor(values, dtype=F64)


def golden_inputs():
    return (tensor(GOLDEN[name]) for name in ("rewards", "log_probs", "ref_log_probs"))


def mask_of(lengths, width=None):
    return torch.arange(width or max(lengths))[None, :] < torch.tensor(lengths)[:, None]


def random_batch(seed=0, lengths=(3, 5, 2, 4, 5, 1)):
    """六条长短不一的回答：得分、采样策略、参考策略、掩码。"""
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of(lengths)
    rewards = torch.randn(len(lengths), generator=generator, dtype=F64)
    ref = -torch.rand(mask.shape, generator=generator, dtype=F64) - 0.5
    return rewards, ref + 0.3 * torch.randn(mask.shape, generator=generator, dtype=F64), ref, mask


# ---------------------------------------------------------------- 手算


def test_two_by_three_by_hand():
    """两条回答，长 3 与 2，得分 1 与 0，β = 0.1，k1 = (1, -1, 2) 与 (2, 3)。

    逐 token 奖励：-0.1, 0.1, 1 - 0.2 = 0.8；-0.2, -0.3。从后往前累加：0.8, 0.9, 0.8；-0.5, -0.3。
    五个 token 的均值 1.7/5 = 0.34，离差 0.46, 0.56, 0.46, -0.84, -0.64，平方和 1.852，样本方差 1.852/4 = 0.463。
    """
    mask = mask_of([3, 2])
    ref = torch.full((2, 3), -2.0, dtype=F64)
    log_probs = ref + tensor([[1.0, -1.0, 2.0], [2.0, 3.0, 9.0]])
    token_rewards = kl_shaped_rewards(tensor([1.0, 0.0]), log_probs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(
        returns_to_go(token_rewards, mask), tensor([[0.8, 0.9, 0.8], [-0.5, -0.3, 0.0]])
    )
    advantages = reinforce_plus_plus_advantages(tensor([1.0, 0.0]), log_probs, ref, mask, kl_coef=0.1)
    expected = tensor([[0.46, 0.56, 0.46], [-0.84, -0.64, 0.0]]) / math.sqrt(0.463)
    torch.testing.assert_close(advantages, expected)


def test_discounted_returns_by_hand():
    """奖励 (1, 2, 4)，γ = 1/2：4；2 + 2 = 4；1 + 2 = 3。"""
    returns = returns_to_go(tensor([[1.0, 2.0, 4.0]]), mask_of([3]), gamma=0.5)
    torch.testing.assert_close(returns, tensor([[3.0, 4.0, 4.0]]))


def test_baseline_variant_by_hand():
    """两题各两条，得分 (1, 0)、(1, 1)，长度 1, 2, 3, 1。A' = 1/2, -1/2, 0, 0，按长度重复成七个数。

    均值 (1/2 - 1)/7 = -1/14；离差 4/7、-3/7（两个）、1/14（四个）；平方和 16/49 + 18/49 + 4/196 = 5/7；样本方差 5/42。
    全对的第二题得到 1/14 ÷ √(5/42) > 0，不是 0：回答不等长时，全批再减一次均值会移动它。
    """
    mask = mask_of([1, 2, 3, 1])
    scale = math.sqrt(Fraction(42, 5))
    expected = torch.zeros(4, 3, dtype=F64)
    expected[0, :1], expected[1, :2] = 4 / 7 * scale, -3 / 7 * scale
    expected[2], expected[3, :1] = scale / 14, scale / 14
    advantages = reinforce_plus_plus_baseline_advantages(tensor([1.0, 0.0, 1.0, 1.0]), mask, group_size=2)
    torch.testing.assert_close(advantages, expected)


def test_one_short_correct_answer_by_hand():
    """长 2, 6, 6, 6，只有短的答对：A' = 3/4 与 -1/4，token 均值 -0.15，离差 0.9 与 -0.1。

    平方和 2·0.81 + 18·0.01 = 1.8，方差 1.8/19，优势 0.9·√(19/1.8) = 2.924 与 -0.325。
    按条：均值 0，方差 (9/16 + 3/16)/3 = 1/4，优势 1.5 与 -0.5。
    """
    mask, rewards = mask_of([2, 6, 6, 6]), tensor([1.0, 0.0, 0.0, 0.0])
    advantages = reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=4)
    torch.testing.assert_close(advantages[:, 0], tensor([0.9, -0.1, -0.1, -0.1]) * math.sqrt(19 / 1.8))
    assert f"{advantages[0, 0]:.3f}" == "2.924"
    torch.testing.assert_close(whiten_per_sequence(rewards, mask)[:, 0], tensor([1.5, -0.5, -0.5, -0.5]))


def test_loss_gradient_at_the_old_policy_by_hand():
    """ρ = 1 时裁剪不起作用：∂L/∂logπ = (-Â + λ·log(π/π_ref)) / n，n 是有效 token 数；另与有限差分对照。"""
    rewards, log_probs, ref, mask = random_batch()
    advantages = reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=2)
    leaf = log_probs.clone().requires_grad_(True)

    def loss(current):
        return reinforce_plus_plus_baseline_loss(current, log_probs, ref, advantages, mask, kl_loss_coef=0.3)

    (grad,) = torch.autograd.grad(loss(leaf), leaf)
    expected = (-advantages + 0.3 * (log_probs - ref)).masked_fill(~mask, 0.0) / mask.sum()
    torch.testing.assert_close(grad, expected)
    step = torch.zeros_like(log_probs)
    step[1, 3] = 1e-6
    difference = (loss(log_probs + step) - loss(log_probs - step)) / 2e-6
    torch.testing.assert_close(difference, grad[1, 3], rtol=1e-5, atol=1e-9)  # 有限差分的截断与舍入


# ---------------------------------------------------------------- 对照独立实现


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_advantages_match_verl(name):
    case = GOLDEN["cases"][name]
    rewards, log_probs, ref = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    actual = reinforce_plus_plus_advantages(
        rewards, log_probs, ref, mask, kl_coef=case["kl_coef"], gamma=case["gamma"]
    )
    torch.testing.assert_close(actual, tensor(case["verl"]))


@pytest.mark.parametrize("name", GOLDEN["cases"])
def test_advantages_match_openrlhf_up_to_the_variance_convention(name):
    """OpenRLHF 除以 n：乘 √(n/(n-1)) 后一致。它在中间的掩码上也打折，所以 γ<1 且有工具返回时不一致。"""
    case = GOLDEN["cases"][name]
    rewards, log_probs, ref = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    n = mask.sum().item()
    ours = reinforce_plus_plus_advantages(
        rewards, log_probs, ref, mask, kl_coef=case["kl_coef"], gamma=case["gamma"]
    )
    theirs = tensor(case["openrlhf"]).masked_fill(~mask, 0.0)  # 它不清零填充处，留给损失的掩码
    assert (ours - theirs).abs().max() > 0.01
    gap = (ours * math.sqrt(n / (n - 1)) - theirs).abs().max()
    if name.startswith("tool") and case["gamma"] != 1:
        assert gap > 0.01
    else:
        assert gap < 1e-6  # 它的均值与方差用 float32


@pytest.mark.parametrize("name", [k for k, v in GOLDEN["cases"].items() if v["kl_coef"] == 0])
def test_baseline_variant_matches_verl_and_openrlhf_without_kl_in_reward(name):
    case = GOLDEN["cases"][name]
    rewards, _, _ = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    n = mask.sum().item()
    ours = reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=GOLDEN["group_size"])
    torch.testing.assert_close(ours, tensor(case["verl_baseline"]))
    theirs = tensor(case["openrlhf_baseline"]).masked_fill(~mask, 0.0)
    torch.testing.assert_close(ours * math.sqrt(n / (n - 1)), theirs, rtol=0, atol=1e-6)  # float32 的统计量


def test_with_kl_in_reward_the_two_libraries_disagree_on_the_baseline_variant():
    """verl 先把 KL 加进整条得分再减组均值；OpenRLHF 先减组均值，KL 另外逐 token 累加。"""
    case = GOLDEN["cases"]["padded/kl=0.1/gamma=1.0"]
    rewards, log_probs, ref = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    n = mask.sum().item()
    shaped = kl_shaped_rewards(rewards, log_probs, ref, mask, kl_coef=0.1)
    like_verl = reinforce_plus_plus_baseline_advantages(shaped.sum(1), mask, group_size=2)
    torch.testing.assert_close(like_verl, tensor(case["verl_baseline"]))
    centered = group_advantages(rewards, group_size=2, scale_by_std=False)
    like_openrlhf = reinforce_plus_plus_advantages(centered, log_probs, ref, mask, kl_coef=0.1)
    theirs = tensor(case["openrlhf_baseline"]).masked_fill(~mask, 0.0)
    torch.testing.assert_close(like_openrlhf * math.sqrt(n / (n - 1)), theirs, rtol=0, atol=1e-6)  # 同上
    assert (like_verl - like_openrlhf).abs().max() > 0.1


def test_whitening_is_the_z_score_of_the_flattened_tokens():
    rewards, log_probs, ref, mask = random_batch()
    shaped = kl_shaped_rewards(rewards, log_probs, ref, mask, kl_coef=0.1)
    flat = torch.cat([returns_to_go(shaped, mask)[i][mask[i]] for i in range(len(rewards))])
    advantages = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(advantages[mask], (flat - flat.mean()) / flat.std())


@pytest.mark.parametrize("gamma", [1.0, 0.7])
def test_returns_are_gae_with_zero_values_and_lambda_one(gamma):
    """去掉价值模型之后剩下的就是 V = 0、λ = 1 的 GAE，中间有工具返回时也是。"""
    generator = torch.Generator().manual_seed(3)
    token_rewards = torch.randn(3, 7, generator=generator, dtype=F64)
    mask = torch.rand(3, 7, generator=generator) < 0.7
    expected, _ = generalized_advantage(
        token_rewards, torch.zeros_like(token_rewards), mask, gamma=gamma, lam=1.0
    )
    assert (~mask[:, 1:-1]).any()
    torch.testing.assert_close(returns_to_go(token_rewards, mask, gamma=gamma), expected)


# ---------------------------------------------------------------- 精确枚举：梯度与偏差


def all_sequences(logits):
    """词表 3、长 2：logits[0] 给第一个 token，logits[1 + a] 给前缀为 a 时的第二个。全部九条的对数概率 (9, 2)。"""
    table = logits.log_softmax(-1)
    pairs = itertools.product(range(3), repeat=2)
    return torch.stack([torch.stack([table[0, a], table[1 + a, b]]) for a, b in pairs])


def exact_sequence_kl(logits, ref_logits):
    first = kl_divergence(Categorical(logits=logits[0]), Categorical(logits=ref_logits[0]))
    rest = kl_divergence(Categorical(logits=logits[1:]), Categorical(logits=ref_logits[1:]))
    return first + (logits[0].softmax(-1) * rest).sum()


def test_expected_gradient_before_whitening_is_the_gradient_of_reward_minus_kl():
    """归一化之前，E[Σ_t A_t ∇logπ_t] = ∇(E[r] - β·KL)：真值对 J 自动微分，KL 来自 torch.distributions。"""
    generator = torch.Generator().manual_seed(0)
    logits, ref_logits = torch.randn(2, 4, 3, generator=generator, dtype=F64)
    scores = torch.randn(9, generator=generator, dtype=F64)
    theta = logits.clone().requires_grad_(True)
    log_probs = all_sequences(theta)
    objective = (log_probs.sum(1).exp() * scores).sum() - 0.4 * exact_sequence_kl(theta, ref_logits)
    (truth,) = torch.autograd.grad(objective, theta)

    log_probs = all_sequences(theta)
    ref = all_sequences(ref_logits)
    mask = torch.ones(9, 2, dtype=torch.bool)
    returns = returns_to_go(kl_shaped_rewards(scores, log_probs, ref, mask, kl_coef=0.4), mask)
    probs = log_probs.sum(1).exp().detach()
    surrogate = (probs[:, None] * returns * log_probs).sum()
    (estimate,) = torch.autograd.grad(surrogate, theta, retain_graph=True)
    torch.testing.assert_close(estimate, truth)
    # 只扣当前 token 的 KL、不累加到结尾，梯度就不对
    local = scores[:, None] - 0.4 * kl_k1(log_probs, ref).detach()
    (wrong,) = torch.autograd.grad((probs[:, None] * local * log_probs).sum(), theta)
    assert (wrong - truth).norm() / truth.norm() > 0.05


ARM_REWARDS = (1.0, 0.2, -0.5)
ARM_LOGITS = (0.4, -0.3, 0.1)


def expected_batch_gradient(advantage_fn, n):
    """三臂老虎机，枚举 3^n 个批：E[-∇loss]，损失是被测的 token-mean 裁剪损失。"""
    theta = tensor(ARM_LOGITS).requires_grad_(True)
    table = theta.log_softmax(-1)
    mask = torch.ones(n, 1, dtype=torch.bool)
    total = 0.0
    for batch in itertools.product(range(3), repeat=n):
        log_probs = table[list(batch)][:, None]
        advantages = advantage_fn(tensor(ARM_REWARDS)[list(batch)], mask)
        loss = reinforce_plus_plus_baseline_loss(
            log_probs, log_probs.detach(), log_probs.detach(), advantages, mask, kl_loss_coef=0.0
        )
        total = total - log_probs.sum().exp().detach() * loss
    return torch.autograd.grad(total, theta)[0]


def exact_gradient_and_std():
    theta = tensor(ARM_LOGITS).requires_grad_(True)
    probs, rewards = theta.softmax(-1), tensor(ARM_REWARDS)
    mean = (probs * rewards).sum()
    std = (probs * (rewards - mean).square()).sum().sqrt()
    return torch.autograd.grad(mean, theta)[0], std.detach()


@pytest.mark.parametrize("n", [2, 3, 4])
def test_own_mean_shrinks_the_gradient_by_exactly_one_over_n(n):
    """自己也在均值里：E[(r_i - r̄)s_i] = (1 - 1/n)∇J。"""
    truth, _ = exact_gradient_and_std()
    centered = expected_batch_gradient(lambda r, mask: (r - r.mean())[:, None], n)
    torch.testing.assert_close(centered, (1 - 1 / n) * truth)


def test_batch_whitening_bias_vanishes_like_one_over_n():
    """与 ∇J/σ 的相对误差：n 翻倍，误差减半（精确枚举 n = 3 与 6，容许高阶项）。"""
    truth, std = exact_gradient_and_std()
    errors = []
    for n in (3, 6):
        estimate = expected_batch_gradient(lambda r, mask: whiten(r[:, None], mask), n)
        errors.append(((estimate - truth / std).norm() / (truth / std).norm()).item())
    assert 0.1 < errors[1] < errors[0] < 0.6
    assert 1.6 < errors[0] / errors[1] < 2.6


def prompt_weights(advantage_fn, ps, group_size):
    """两题各 group_size 条，枚举全部奖励：E[Σ A s]/group_size = w·∇p 里的 w，s 在二值奖励下可换成 (r-p)/p(1-p)。"""
    out = torch.zeros(2, dtype=F64)
    p = tensor(ps).repeat_interleave(group_size)
    for outcome in itertools.product((0.0, 1.0), repeat=2 * group_size):
        rewards = tensor(outcome)
        prob = (p * rewards + (1 - p) * (1 - rewards)).prod()
        out += prob * (advantage_fn(rewards) * (rewards - p) / (p * (1 - p))).view(2, -1).mean(1)
    return out


def test_binary_reward_lets_the_score_be_replaced_by_the_centred_reward():
    """E[s | r=1] = ∇p/p，E[s | r=0] = -∇p/(1-p)：对五臂 softmax 逐臂核对，所以权重 w 与策略的参数化无关。"""
    theta = torch.randn(5, generator=torch.Generator().manual_seed(0), dtype=F64).requires_grad_(True)
    right = torch.tensor([True, False, True, False, False])
    p = theta.softmax(-1)[right].sum()
    (gradient,) = torch.autograd.grad(p, theta)
    probs = theta.softmax(-1).detach()
    scores = torch.eye(5, dtype=F64) - probs  # 第 y 行是 ∇logπ(y)
    for part, expected in [(right, gradient / p), (~right, -gradient / (1 - p))]:
        actual = (probs[part, None] * scores[part]).sum(0) / probs[part].sum()
        torch.testing.assert_close(actual, expected.detach())


@pytest.mark.parametrize("group_size", [2, 4])
def test_group_std_gives_prompts_different_weights(group_size):
    """独立闭式：w(p) = E[s_pop²/s]/p(1-p)，K(G-K)/G² = s_pop²。G=2 时两题权重相同，G=4 起易题更重，极限是 1/√(p(1-p))。"""
    ps = (0.5, 0.9)

    def closed_form(p):
        total = 0.0
        for k in range(1, group_size):
            prob = math.comb(group_size, k) * p**k * (1 - p) ** (group_size - k)
            total += prob * math.sqrt(k * (group_size - k) * (group_size - 1) / group_size)
        return total / group_size / (p * (1 - p))

    actual = prompt_weights(lambda r: group_advantages(r, group_size=group_size), ps, group_size)
    # 默认 eps=1e-6 加在标准差上
    torch.testing.assert_close(actual, tensor([closed_form(p) for p in ps]), rtol=1e-5, atol=0)
    ratio = (actual[1] / actual[0]).item()
    assert abs(ratio - 1) < 1e-6 if group_size == 2 else 1.04 < ratio < 0.5 / 0.3


def test_centred_only_weights_are_exactly_equal():
    """只减组均值（自己在内）：w = (G-1)/G，两题相同；这个因子不随批变大而消失。"""
    centered = prompt_weights(lambda r: group_advantages(r, group_size=4, scale_by_std=False), (0.5, 0.9), 4)
    torch.testing.assert_close(centered, tensor([0.75, 0.75]))


@pytest.mark.parametrize("variant", ["plain", "baseline"])
def test_batch_statistics_give_prompts_the_same_weight_up_to_one_over_n(variant):
    """两题各 n 条，N = 2n 翻倍，权重比偏离 1 的量减半（精确求和：只依赖两题各对几条，或各有几个一对一错的组）。"""
    ps, gaps = (0.5, 0.9), []
    for n in (16, 32):
        mask, out = torch.ones(2 * n, 1, dtype=torch.bool), torch.zeros(2, dtype=F64)
        units = n if variant == "plain" else n // 2
        chance = ps if variant == "plain" else [2 * p * (1 - p) for p in ps]
        for counts in itertools.product(range(units + 1), repeat=2):
            prob = math.prod(
                math.comb(units, k) * c**k * (1 - c) ** (units - k)
                for k, c in zip(counts, chance, strict=True)
            )
            if variant == "plain":
                rewards = tensor([x for k in counts for x in [1.0] * k + [0.0] * (n - k)])
                advantages = whiten(rewards[:, None], mask)[:, 0]
            else:
                rewards = tensor([x for k in counts for x in [1.0, 0.0] * k + [0.0] * (n - 2 * k)])
                advantages = reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=2)[:, 0]
            p = tensor(ps).repeat_interleave(n)
            out += prob * (advantages * (rewards - p) / (p * (1 - p))).view(2, -1).mean(1)
        gaps.append((out[1] / out[0] - 1).abs().item())
    assert 1.6 < gaps[0] / gaps[1] < 2.4, gaps


# ---------------------------------------------------------------- 性质


def test_token_mean_is_zero_and_variance_one_so_the_first_loss_is_zero():
    rewards, log_probs, ref, mask = random_batch()
    advantages = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    loss = reinforce_plus_plus_baseline_loss(log_probs, log_probs, ref, advantages, mask, kl_loss_coef=0.0)
    torch.testing.assert_close(loss, torch.zeros_like(loss))
    torch.testing.assert_close(advantages[mask].var(), torch.ones_like(loss))
    by_sequence = whiten_per_sequence(rewards, mask)
    zero = aggregate_loss(by_sequence, mask, mode="seq-mean-token-mean")
    torch.testing.assert_close(zero, torch.zeros_like(zero))
    assert aggregate_loss(by_sequence, mask, mode="token-mean").abs() > 0.01


def test_padding_and_empty_rows_change_nothing():
    """右边多补三列（里面是 NaN）、再多一条整行被遮住的回答：有效 token 的优势与损失都不变。"""
    rewards, log_probs, ref, mask = random_batch()

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 3, 0, 1), value=value)

    wide = (pad(log_probs, math.nan), pad(ref, math.nan), pad(mask, False))
    more = torch.cat([rewards, tensor([7.0])])
    plain = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    padded = reinforce_plus_plus_advantages(more, *wide, kl_coef=0.1)
    torch.testing.assert_close(padded, pad(plain, 0.0))
    losses = [
        reinforce_plus_plus_baseline_loss(0.9 * lp, lp, r, a, m, kl_loss_coef=0.1)
        for lp, r, a, m in [(log_probs, ref, plain, mask), (*wide[:2], padded, wide[2])]
    ]
    torch.testing.assert_close(*losses)


def test_tool_tokens_in_the_middle_are_skipped():
    """在回答中间插入两个工具返回的 token，有效 token 的回报不变，打折时也不变。"""
    compact = returns_to_go(tensor([[0.1, 0.2, 0.3, 1.0]]), torch.ones(1, 4, dtype=torch.bool), gamma=0.9)
    mask = torch.tensor([[True, True, False, False, True, True]])
    expanded = returns_to_go(tensor([[0.1, 0.2, 9.0, math.nan, 0.3, 1.0]]), mask, gamma=0.9)
    torch.testing.assert_close(expanded[mask], compact[0])


def test_leave_one_out_baseline_gives_the_same_advantages_after_whitening():
    """留一均值的优势是组均值的 G/(G-1) 倍，全批归一化把常数除掉，所以换不换都一样。"""
    rewards, _, _, mask = random_batch()
    leave_one_out = leave_one_out_advantages(rewards, group_size=3)
    expected = whiten(leave_one_out[:, None].expand(mask.shape), mask)
    actual = reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=3)
    torch.testing.assert_close(actual, expected)


def test_without_kl_affine_rewards_give_the_same_advantages():
    """0/1 与 -1/1 没有区别：归一化吃掉了平移与正的缩放；取反则变号。"""
    _, log_probs, ref, mask = random_batch()
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    one = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.0)
    two = reinforce_plus_plus_advantages(2 * rewards - 1, log_probs, ref, mask, kl_coef=0.0)
    torch.testing.assert_close(one, two)
    torch.testing.assert_close(
        reinforce_plus_plus_advantages(-rewards, log_probs, ref, mask, kl_coef=0.0), -one
    )


def test_with_kl_doubling_the_reward_halves_the_coefficient():
    """有 KL 时，把 0/1 换成 -1/1 恰好等于把 β 减半。"""
    _, log_probs, ref, mask = random_batch()
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    signed = reinforce_plus_plus_advantages(2 * rewards - 1, log_probs, ref, mask, kl_coef=0.2)
    halved = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(signed, halved)
    same = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.2)
    assert (signed - same).abs().max() > 0.05


def test_equal_rewards_give_zero_without_kl_and_pure_kl_with_it():
    """全批同分：没有 KL 时优势全零；有 KL 时优势与 β 的大小无关，只剩被放大的 KL。"""
    _, log_probs, ref, mask = random_batch()
    rewards = torch.ones(6, dtype=F64)
    zero = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.0)
    assert (zero == 0).all()
    assert (reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=3) == 0).all()
    small = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.01)
    large = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=1.0)
    torch.testing.assert_close(small, large, rtol=0, atol=5e-3)  # eps=1e-8 对 β=0.01 还有一点影响
    assert large[mask].std() > 0.99


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_standardised_values_are_bounded_however_small_the_std_is(scale):
    """样本标准差的 z 分数不超过 (n-1)/√n：组内几乎同分时噪声被放大到单位尺度，但不会爆炸。全批的上界反而更大。"""
    generator = torch.Generator().manual_seed(0)
    rewards = 0.5 + scale * torch.randn(4 * 8, generator=generator, dtype=F64).exp()
    grouped = group_advantages(rewards, group_size=8)
    assert 1.5 < grouped.abs().max() <= 7 / math.sqrt(8)
    outlier = torch.zeros(8, dtype=F64)
    outlier[0] = scale
    torch.testing.assert_close(
        group_advantages(outlier, group_size=8)[0].item(), 7 / math.sqrt(8), rtol=0.05, atol=0
    )  # scale=1e-4 时 eps=1e-6 有 3% 的影响
    flat = torch.cat([outlier, torch.zeros(24, dtype=F64)])[:, None]
    whitened = whiten(flat, torch.ones_like(flat).bool())
    bound = 31 / math.sqrt(32)
    assert whitened.max() <= bound and (scale < 1 or whitened.max() > 0.99 * bound)


def test_whitening_in_chunks_is_another_estimator():
    """统计量要在整批上求：拆成两个微批分别归一化，结果不同，且各自均值为 0。"""
    rewards, log_probs, ref, mask = random_batch()
    whole = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    parts = [
        reinforce_plus_plus_advantages(rewards[s], log_probs[s], ref[s], mask[s], kl_coef=0.1)
        for s in (slice(0, 3), slice(3, 6))
    ]
    assert (torch.cat(parts) - whole).abs().max() > 0.1
    assert whole[:3][mask[:3]].mean().abs() > 0.1


def test_row_order_does_not_matter_without_groups():
    rewards, log_probs, ref, mask = random_batch()
    order = torch.tensor([4, 0, 5, 2, 1, 3])
    whole = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    shuffled = reinforce_plus_plus_advantages(
        rewards[order], log_probs[order], ref[order], mask[order], kl_coef=0.1
    )
    torch.testing.assert_close(shuffled, whole[order])


def test_advantages_carry_no_gradient_and_only_the_policy_gets_one():
    rewards, log_probs, ref, mask = random_batch()
    leaf = log_probs.clone().requires_grad_(True)
    assert not reinforce_plus_plus_advantages(rewards, leaf, ref, mask, kl_coef=0.1).requires_grad
    assert not returns_to_go(leaf, mask).requires_grad
    advantages = reinforce_plus_plus_advantages(rewards, leaf, ref, mask, kl_coef=0.1)
    others = [log_probs.clone().requires_grad_(True), advantages.requires_grad_(True)]
    loss = reinforce_plus_plus_baseline_loss(leaf, others[0], ref, others[1], mask, kl_loss_coef=0.1)
    grads = torch.autograd.grad(loss, [leaf, *others], allow_unused=True)
    assert grads[0] is not None and grads[1] is None and grads[2] is None


def test_epsilon_is_added_to_the_variance_of_two_sequences():
    """两条 ±1e-4：s² = 2e-8，加上 1e-8 是 3e-8，优势 ±1e-4/√3e-8 = ±1/√3；全部同分时是 0，不是 NaN。"""
    mask = torch.ones(2, 1, dtype=torch.bool)
    advantages = whiten_per_sequence(tensor([1e-4, -1e-4]), mask)
    torch.testing.assert_close(advantages, tensor([[1.0], [-1.0]]) / math.sqrt(3))
    assert not whiten_per_sequence(tensor([0.7, 0.7]), mask).any()


def test_per_sequence_whitening_is_zero_on_padding():
    rewards, _, _, mask = random_batch()
    assert (whiten_per_sequence(rewards, mask)[~mask] == 0).all()


def test_clip_stops_tokens_that_already_moved_with_the_advantage():
    """PPO 的裁剪还在：上下宽度取 0.1 与 0.6，ρ=1.5、优势为正的 token 没出界；ρ=0.85、优势为负的已出界，梯度是 0。"""
    old = torch.full((4, 1), -1.0, dtype=F64)
    ratio = tensor([[1.5], [0.85], [1.5], [0.85]])
    advantages = tensor([[1.0], [-1.0], [-1.0], [1.0]])
    mask = torch.ones(4, 1, dtype=torch.bool)

    def policy_gradient(**widths):
        leaf = (old + ratio.log()).requires_grad_(True)
        loss = reinforce_plus_plus_baseline_loss(leaf, old, old, advantages, mask, kl_loss_coef=0.0, **widths)
        return torch.autograd.grad(loss, leaf)[0] * 4

    wide = policy_gradient(clip_low=0.1, clip_high=0.6)
    torch.testing.assert_close(wide, tensor([[-1.5], [0.0], [1.5], [-0.85]]))
    default = policy_gradient()
    torch.testing.assert_close(default, tensor([[0.0], [0.85], [1.5], [-0.85]]))
    ratio = tensor([[1.19], [0.81], [1.21], [0.79]])  # 默认宽度两侧都是 0.2
    advantages = tensor([[1.0], [-1.0], [1.0], [-1.0]])
    torch.testing.assert_close(policy_gradient(), tensor([[-1.19], [0.81], [0.0], [0.0]]))


def test_default_kl_coefficient_is_the_papers():
    rewards, log_probs, ref, mask = random_batch()
    torch.testing.assert_close(
        reinforce_plus_plus_advantages(rewards, log_probs, ref, mask),
        reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.01, gamma=1.0),
        rtol=0,
        atol=0,
    )


# ---------------------------------------------------------------- 边界


def test_float32_in_float32_out():
    rewards, log_probs, ref, mask = random_batch()
    advantages = reinforce_plus_plus_advantages(
        rewards.float(), log_probs.float(), ref.float(), mask, kl_coef=0.1
    )
    assert advantages.dtype == torch.float32
    expected = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(advantages.double(), expected, rtol=1e-4, atol=1e-5)  # float32 的舍入


def test_bad_scalars_are_rejected():
    rewards, log_probs, ref, mask = random_batch()
    with pytest.raises(ValueError, match="kl_coef"):
        reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=-0.1)
    with pytest.raises(ValueError, match="gamma"):
        reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, gamma=1.1)
    with pytest.raises(ValueError, match="kl_loss_coef"):
        reinforce_plus_plus_baseline_loss(log_probs, log_probs, ref, log_probs, mask, kl_loss_coef=-1e-5)


def test_groups_of_one_and_single_responses_are_rejected():
    """组内只有一条时组均值就是它自己，优势恒为 0；verl 改用原始奖励，这里报错。"""
    rewards, _, _, mask = random_batch()
    with pytest.raises(ValueError, match="group_size"):
        reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=1)
    with pytest.raises(ValueError, match="1 条回答"):
        whiten_per_sequence(rewards[:1], mask[:1])


# ---------------------------------------------------------------- 流传的误写被拒绝


def wrong_versions(rewards, log_probs, ref, mask, kl_coef):
    """键是误写的名字，值是它给出的优势；前两行是一题，后两行是另一题。"""
    token_rewards = kl_shaped_rewards(rewards, log_probs, ref, mask, kl_coef=kl_coef)
    returns = returns_to_go(token_rewards, mask)
    penalty = (kl_coef * kl_k1(log_probs, ref)).masked_fill(~mask, 0.0)
    count = mask.sum()
    spread = (rewards[:, None] - penalty).masked_fill(~mask, 0.0)
    last_column = -penalty
    last_column = torch.cat([last_column[:, :-1], last_column[:, -1:] + rewards[:, None]], dim=1)
    return {
        "每题各自归一化": torch.cat([whiten(returns[:2], mask[:2]), whiten(returns[2:], mask[2:])]),
        "每条各自归一化": torch.cat([whiten(returns[i : i + 1], mask[i : i + 1]) for i in range(4)]),
        "按条归一化": whiten_per_sequence(rewards, mask),
        "得分放在每个 token": whiten(returns_to_go(spread, mask), mask),
        "得分放在最后一列": whiten(returns_to_go(last_column, mask), mask),
        "KL 的符号反了": whiten(returns_to_go(token_rewards + 2 * penalty, mask), mask),
        "不累加，只用当前的 token 奖励": whiten(token_rewards, mask),
        "填充计入统计量": whiten(returns, torch.ones_like(mask)).masked_fill(~mask, 0.0),
        "从前往后累加": whiten(token_rewards.cumsum(1).masked_fill(~mask, 0.0), mask),
        "只减均值": (returns - returns[mask].mean()).masked_fill(~mask, 0.0),
        "只除标准差": (returns / returns[mask].std()).masked_fill(~mask, 0.0),
        "除以方差": (returns - returns[mask].mean()).masked_fill(~mask, 0.0) / returns[mask].var(),
        "总体方差": whiten(returns, mask) * (count / (count - 1)).sqrt(),
    }


WRONG = list(
    wrong_versions(
        tensor([1.0] * 4), torch.zeros(4, 2).double(), torch.zeros(4, 2).double(), mask_of([2] * 4), 0.1
    )
)


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG)
def test_the_frozen_verl_values_reject(name):
    """对照的真值是 verl 的冻结数值：正确的写法差不到 1e-8，每种误写至少差 0.03。"""
    case = GOLDEN["cases"]["padded/kl=0.1/gamma=1.0"]
    rewards, log_probs, ref = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    truth = tensor(case["verl"])
    right = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.1)
    assert (right - truth).abs().max() < 1e-8
    wrong = wrong_versions(rewards, log_probs, ref, mask, 0.1)[name]
    assert (wrong - truth).abs().max() > 0.03


@pytest.mark.rejects
def test_the_frozen_baseline_values_reject_group_std_and_raw_reward_std():
    case = GOLDEN["cases"]["padded/kl=0.0/gamma=1.0"]
    rewards, _, _ = golden_inputs()
    mask = torch.tensor(case["mask"]).bool()
    truth = tensor(case["verl_baseline"])
    centered = group_advantages(rewards, group_size=2, scale_by_std=False)
    wrong = {
        "组标准差（GRPO）": group_advantages(rewards, group_size=2)[:, None].expand(mask.shape),
        "原始奖励的标准差": (centered / rewards.std())[:, None].expand(mask.shape),
        "没有组均值": whiten(rewards[:, None].expand(mask.shape), mask),
        "全批不再减均值": (
            centered[:, None].expand(mask.shape) / centered.repeat_interleave(mask.sum(1)).std()
        ),
    }
    for name, value in wrong.items():
        assert (value.masked_fill(~mask, 0.0) - truth).abs().max() > 0.05, name
