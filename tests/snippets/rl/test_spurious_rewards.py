r"""snippets/rl/spurious_rewards.py 的测试。

真值与公式无关：枚举一组里全部 $2^G$ 种 0/1 奖励，各自用 `group_advantages` 算优势、用 `clipped_surrogate_loss`
反向传播，再按概率加权。期望的 logits 梯度还枚举抽到的 token，另用「目标的期望」的有限差分核对一遍。
一条测试真实调用 TRL 1.16 的 `_compute_loss`。最后一节是流传的错误说法，断言枚举的真值不认它们。
"""

import itertools
import math

import jaxtyping
import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.spurious_rewards import (
    expected_clipped_coefficient,
    expected_logit_gradient,
    mean_abs_group_advantage,
)

INF = math.inf
RATIOS = [0.31, 0.5, 0.79, 0.81, 1.0, 1.19, 1.21, 1.29, 1.7, 3.0]
WIDTHS = [(0.2, 0.2), (0.2, 0.28), (0.1, 0.4), (1.0, 0.2), (0.2, INF), (1.0, INF)]


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def enumerate_rewards(group_size, probability):
    """全部奖励模式的（优势 (2^G, G)，概率 (2^G,)）。"""
    patterns = tensor(list(itertools.product([0.0, 1.0], repeat=group_size)))
    ones = patterns.sum(1)
    chance = probability**ones * (1 - probability) ** (group_size - ones)
    advantages = group_advantages(patterns.flatten(), group_size=group_size, eps=1e-13)
    return advantages.view_as(patterns), chance


def enumerated_coefficients(ratios, group_size, probability, low, high, member=0):
    """组里第 member 条回答的期望梯度系数：逐个奖励模式反向传播。"""
    advantages, chance = enumerate_rewards(group_size, probability)
    results = []
    for ratio in ratios:
        leaf = torch.full((len(chance), 1), math.log(ratio), dtype=torch.float64, requires_grad=True)
        loss = clipped_surrogate_loss(
            leaf,
            torch.zeros_like(leaf),
            advantages[:, member : member + 1],
            clip_low=low,
            clip_high=high,
        )
        (grad,) = torch.autograd.grad((chance @ loss).sum(), leaf)
        results.append(-grad.sum())
    return torch.stack(results)


# ---- 手算 ----


def test_group_of_two_by_hand():
    """G=2、γ=½：一半的组同分，优势 0；另一半优势 ±1/√2（样本标准差 1/√2，离均值 ½）。E|Â|=1/(2√2)。"""
    assert mean_abs_group_advantage(group_size=2, probability=0.5) == pytest.approx(1 / (2 * math.sqrt(2)))


def test_coefficient_by_hand():
    """E|Â|=0.8：ρ=1.5 只有负优势的一半通过，-0.4×1.5；ρ=0.5 只有正优势的一半通过，+0.4×0.5。"""
    coefficient = expected_clipped_coefficient(tensor([0.5, 1.0, 1.5]), mean_abs_advantage=0.8)
    torch.testing.assert_close(coefficient, tensor([0.2, 0.0, -0.6]))


def test_logit_gradient_by_hand():
    """旧 (½,¼,¼)、新 (½,0.4,0.1)：U={1}（1.6），L={2}（0.4）；E|Â|=2，g=π·(1[L]-1[U]+0.4-0.1)。"""
    gradient = expected_logit_gradient(
        tensor([0.5, 0.4, 0.1]).log(), tensor([0.5, 0.25, 0.25]).log(), mean_abs_advantage=2.0
    )
    torch.testing.assert_close(gradient, tensor([0.5 * 0.3, 0.4 * (-0.7), 0.1 * 1.3]))


# ---- 枚举 ----


@pytest.mark.parametrize("probability", [0.5, 0.7, 0.3, 0.05])
@pytest.mark.parametrize("group_size", [2, 5, 8])
def test_mean_abs_advantage_matches_enumeration(group_size, probability):
    advantages, chance = enumerate_rewards(group_size, probability)
    torch.testing.assert_close(chance @ advantages, torch.zeros(group_size).double(), atol=1e-12, rtol=0)
    expected = mean_abs_group_advantage(group_size=group_size, probability=probability)
    torch.testing.assert_close(chance @ advantages.abs(), torch.full((group_size,), expected).double())


@pytest.mark.parametrize("probability", [0.5, 0.2])
@pytest.mark.parametrize(("low", "high"), WIDTHS)
def test_coefficient_matches_enumeration_even_when_skewed(low, high, probability):
    """γ=0.2 时优势不对称，公式仍精确：只用到均值为零。"""
    exact = enumerated_coefficients(RATIOS, 6, probability, low, high, member=2)
    ours = expected_clipped_coefficient(
        tensor(RATIOS),
        mean_abs_advantage=mean_abs_group_advantage(group_size=6, probability=probability),
        clip_low=low,
        clip_high=high,
    )
    torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-9)


def random_policies(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(size, generator=generator, dtype=torch.float64)
    return old + 0.4 * torch.randn(size, generator=generator, dtype=torch.float64), old.log_softmax(0)


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize(("low", "high"), WIDTHS)
def test_logit_gradient_matches_enumeration_and_finite_differences(low, high, seed):
    """枚举抽到的 token 与全部奖励，得到期望目标 J(θ)；它的自动微分与中心差分都等于公式。"""
    logits, old = random_policies(seed)
    advantages, chance = enumerate_rewards(5, 0.3)

    def objective(z):
        log_probs = z.log_softmax(0).expand(len(chance), -1)  # (奖励模式, token)
        loss = clipped_surrogate_loss(
            log_probs, old.expand(len(chance), -1), advantages[:, :1], clip_low=low, clip_high=high
        )
        return -(chance @ loss) @ old.exp()

    leaf = logits.clone().requires_grad_()
    (exact,) = torch.autograd.grad(objective(leaf), leaf)
    step = 1e-6
    numeric = torch.stack(
        [
            (objective(logits + step * e) - objective(logits - step * e)) / (2 * step)
            for e in torch.eye(5).double()
        ]
    )
    ours = expected_logit_gradient(
        logits.log_softmax(0),
        old,
        mean_abs_advantage=mean_abs_group_advantage(group_size=5, probability=0.3),
        clip_low=low,
        clip_high=high,
    )
    torch.testing.assert_close(ours, exact, atol=1e-10, rtol=1e-8)
    torch.testing.assert_close(ours, numeric, atol=1e-8, rtol=1e-5)  # 差分误差


def test_trl_has_the_same_bias():
    """TRL 1.16 真实的损失：枚举 G=4 的 16 种奖励，一个 token 的平均梯度就是公式（损失对 4 条平均）。"""
    advantages, chance = enumerate_rewards(4, 0.5)
    ratios = tensor([0.5, 1.1, 1.5, 2.0])
    total = torch.zeros(4, 1, dtype=torch.float64)
    for advantage, weight in zip(advantages, chance, strict=True):
        _, grad, _ = trl_grpo_loss(
            ratios.log()[:, None], torch.zeros(4, 1).double(), advantage, torch.ones(4, 1, dtype=torch.bool)
        )
        total += weight * grad
    expected = expected_clipped_coefficient(
        ratios, mean_abs_advantage=mean_abs_group_advantage(group_size=4, probability=0.5)
    )
    torch.testing.assert_close(-4 * total[:, 0], expected)


# ---- 性质 ----


def test_nothing_happens_without_clipping_or_on_policy():
    logits, old = random_policies(3)
    free = expected_logit_gradient(logits.log_softmax(0), old, clip_low=1.0, clip_high=INF)
    fresh = expected_logit_gradient(old, old)
    assert not free.any() and not fresh.any()


@pytest.mark.parametrize("seed", range(5))
def test_only_the_upper_bound_feeds_tokens_inside_and_only_the_lower_drains_them(seed):
    """只留上界：区间内的 token 都被推高，多少与 π 成正比；只留下界：都被压低。"""
    logits, old = random_policies(seed, size=30)
    log_probs = logits.log_softmax(0)
    ratio = (log_probs - old).exp()
    upper = expected_logit_gradient(log_probs, old, clip_low=1.0, clip_high=0.2)
    lower = expected_logit_gradient(log_probs, old, clip_low=0.2, clip_high=INF)
    assert (ratio > 1.2).any() and (ratio < 0.8).any()
    assert (upper[ratio <= 1.2] > 0).all() and (lower[ratio >= 0.8] < 0).all()
    share = upper[ratio <= 1.2] / log_probs.exp()[ratio <= 1.2]
    torch.testing.assert_close(share, share[:1].expand_as(share))
    both = expected_logit_gradient(log_probs, old)
    torch.testing.assert_close(both, upper + lower)


def test_gradient_sums_to_zero_and_scales_with_the_advantage():
    logits, old = random_policies(4)
    one = expected_logit_gradient(logits.log_softmax(0), old, mean_abs_advantage=1.0)
    torch.testing.assert_close(expected_logit_gradient(logits.log_softmax(0), old), one)  # 1 是默认值
    assert abs(one.sum()) < 1e-12 and one.abs().max() > 0.01
    three = expected_logit_gradient(logits.log_softmax(0), old, mean_abs_advantage=3.0)
    torch.testing.assert_close(three, 3 * one)


def test_a_likely_token_can_never_pass_the_upper_bound():
    """π_old > 1/(1+ε) 时 ρ ≤ 1/π_old < 1+ε：系数只能是零或正。"""
    old = 1 / 1.2 + 1e-3
    ratios = torch.linspace(1e-3, 1 / old, 200).double()
    assert (expected_clipped_coefficient(ratios) >= 0).all()
    assert expected_clipped_coefficient(tensor([1 / (1 / 1.2 - 1e-3)])).item() < 0


# ---- 边界 ----


def test_no_advantage_no_gradient():
    """每组都同分时 E|Â|=0：裁剪照旧，系数处处是 0。"""
    assert not expected_clipped_coefficient(tensor([0.5, 1.0, 1.5]), mean_abs_advantage=0.0).any()


def test_defaults_are_unit_advantage_and_point_two():
    torch.testing.assert_close(
        expected_clipped_coefficient(tensor([0.79, 0.81, 1.19, 1.21])), tensor([0.395, 0.0, 0.0, -0.605])
    )


def test_exactly_on_the_bound_nothing_is_clipped():
    """ρ 恰在端点（可精确表示的 0.5 与 1.5）：两种优势都通过，期望系数是 0。"""
    ends = expected_clipped_coefficient(tensor([0.5, 1.5]), clip_low=0.5, clip_high=0.5)
    assert not ends.any()


def test_zero_width_is_allowed():
    """宽度为 0：一离开 1 就只剩往回拉的力。"""
    coefficient = expected_clipped_coefficient(tensor([0.9, 1.0, 1.1]), clip_low=0.0, clip_high=0.0)
    torch.testing.assert_close(coefficient, tensor([0.45, 0.0, -0.55]))


@pytest.mark.parametrize("probability", [0.0, 1.0])
def test_a_constant_reward_gives_no_force(probability):
    assert mean_abs_group_advantage(group_size=8, probability=probability) == 0


def test_float32_in_float32_out():
    logits, old = random_policies(0)
    single = expected_logit_gradient(logits.log_softmax(0).float(), old.float())
    assert single.dtype == torch.float32
    torch.testing.assert_close(single, expected_logit_gradient(logits.log_softmax(0), old).float())


@pytest.mark.parametrize("options", [{"clip_low": -0.1}, {"clip_high": -0.1}, {"clip_high": math.nan}])
def test_negative_widths_are_refused(options):
    with pytest.raises(ValueError, match="裁剪宽度"):
        expected_clipped_coefficient(tensor([1.0]), **options)


def test_other_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="mean_abs_advantage"):
        expected_clipped_coefficient(tensor([1.0]), mean_abs_advantage=-1.0)
    with pytest.raises(ValueError, match="mean_abs_advantage"):
        expected_clipped_coefficient(tensor([1.0]), mean_abs_advantage=math.nan)
    with pytest.raises(ValueError, match="group_size=1"):
        mean_abs_group_advantage(group_size=1, probability=0.5)
    for probability in (-0.1, 1.1):
        with pytest.raises(ValueError, match="probability"):
            mean_abs_group_advantage(group_size=4, probability=probability)
    with pytest.raises(jaxtyping.TypeCheckError):
        expected_clipped_coefficient(tensor([[1.0]]))


# ---- 流传的错误说法 ----


@pytest.mark.rejects
def test_rejects_zero_mean_means_zero_gradient():
    """「优势均值是零，期望梯度就是零」：越界之后不是。"""
    exact = enumerated_coefficients([0.5, 1.5], 8, 0.5, 0.2, 0.2)
    assert exact[0] > 0.2 and exact[1] < -0.6


@pytest.mark.rejects
def test_rejects_a_symmetric_bias():
    """「上下对称，互相抵消」：到 1 等距的两侧系数不相反，比值是 ρ 之比 3。"""
    exact = enumerated_coefficients([0.5, 1.5], 8, 0.5, 0.2, 0.2)
    assert (-exact[1] / exact[0]).item() == pytest.approx(3.0)


@pytest.mark.rejects
def test_rejects_a_bias_that_pushes_outwards():
    """「越过上界的继续往上推」：符号反了，枚举的系数把它拉回来。"""
    exact = enumerated_coefficients(RATIOS, 6, 0.5, 0.2, 0.2)
    outward = 0.5 * mean_abs_group_advantage(group_size=6, probability=0.5) * tensor(RATIOS)
    outward = outward * ((tensor(RATIOS) > 1.2).double() - (tensor(RATIOS) < 0.8).double())
    assert (outward - exact).abs().max() > 2


@pytest.mark.rejects
def test_rejects_counting_clipped_tokens_as_pushed():
    """「被裁剪就没有作用」：把越界的 token 两种优势都丢掉，期望是零，与真实的裁剪不同。"""
    exact = enumerated_coefficients([1.5], 8, 0.5, 0.2, 0.2)
    assert exact.abs().item() > 0.6


@pytest.mark.rejects
def test_rejects_needing_a_fair_coin():
    """「只有概率 ½ 才成立」：γ=0.2 的优势偏斜明显，均值仍是零，公式仍与枚举一致（见上）。"""
    advantages, chance = enumerate_rewards(6, 0.2)
    assert abs(chance @ advantages[:, 0]) < 1e-12
    assert chance @ advantages[:, 0] ** 3 > 0.3


def test_formula_fails_when_the_advantage_made_the_ratio():
    """独立性是必要的：同一条样本先更新一次再用，ρ 与 Â 同号变动，期望系数与公式差很多。"""
    advantages, chance = enumerate_rewards(6, 0.5)
    leaf = (0.3 * advantages[:, :1]).requires_grad_()  # 优势为正的 ρ>1，为负的 ρ<1
    loss = clipped_surrogate_loss(leaf, torch.zeros_like(leaf), advantages[:, :1])
    (grad,) = torch.autograd.grad((chance @ loss).sum(), leaf)
    size = mean_abs_group_advantage(group_size=6, probability=0.5)
    ours = chance @ expected_clipped_coefficient(leaf.detach().exp()[:, 0], mean_abs_advantage=size)
    assert abs(-grad.sum() - ours) > 0.05
