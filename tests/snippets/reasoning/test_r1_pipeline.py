r"""snippets/reasoning/r1_pipeline.py 的测试。

真值与被测代码无关：(1) 有理数手算（标准库 statistics 与 Fraction）；(2) 全部有序采样结果的枚举；
(3) autograd 的得分函数与有限差分；(4) TRL 1.16 的 `_compute_loss`，真实调用，看宽度 10 时哪些 token 没有梯度。
"""

import itertools
import math
import statistics
from fractions import Fraction

import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.reasoning.r1_pipeline import (
    combine_rewards,
    component_advantages,
    expected_kept,
    rejection_sample,
)
from snippets.rl.clip import clipped_surrogate_loss


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


# 一、奖励的合成与优势的拆分


def test_combine_rewards_by_hand():
    """推理行取规则分，通用行取奖励模型分，两类都加语言分；不用的那一格是 NaN 也不泄漏。"""
    nan = float("nan")
    total = combine_rewards(
        tensor([2.0, nan, 0.0]),
        tensor([nan, -0.7, nan]),
        tensor([0.5, 0.25, 1.0]),
        torch.tensor([True, False, True]),
    )
    torch.testing.assert_close(total, tensor([2.5, -0.45, 1.0]))


def test_component_advantages_by_hand():
    """正确 (1,1,0,0)、语言 (1,0,1,0)：总分 2,1,1,0，均值 1，样本方差 2/3；两项都是 ±½ 除以 √(2/3)。"""
    parts = component_advantages(tensor([[1, 1, 0, 0], [1, 0, 1, 0]]), group_size=4, eps=0.0)
    half = 0.5 / math.sqrt(2 / 3)
    torch.testing.assert_close(parts, tensor([[half, half, -half, -half], [half, -half, half, -half]]))


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_components_add_up_to_the_advantage_of_the_total(scale_by_std):
    """三项、两组、每组五条，与 statistics 逐组算的总分优势比较。"""
    generator = torch.Generator().manual_seed(3)
    components = torch.randn(3, 10, generator=generator, dtype=torch.float64)
    parts = component_advantages(components, group_size=5, eps=0.25, scale_by_std=scale_by_std)
    expected = []
    for start in (0, 5):
        group = [sum(column) for column in components[:, start : start + 5].T.tolist()]
        scale = statistics.stdev(group) + 0.25 if scale_by_std else 1.0
        expected += [(r - statistics.fmean(group)) / scale for r in group]
    torch.testing.assert_close(parts.sum(0), tensor(expected))
    torch.testing.assert_close(
        parts.view(3, 2, 5).sum(2), torch.zeros(3, 2, dtype=torch.float64), atol=1e-12, rtol=0
    )


@pytest.mark.rejects
def test_rejects_normalising_each_component_by_its_own_std():
    """「各项先各自归一化再相加」：语言分差 0.01 与对错差 1 变成一样重，符号可以与总分的优势相反。"""
    components = tensor([[1, 1, 0, 0], [0.90, 0.89, 0.91, 0.90]])
    ours = component_advantages(components, group_size=4, eps=0.0).sum(0)
    own = (components - components.mean(1, keepdim=True)) / components.std(1, keepdim=True)
    assert ours[1] > 0.8 and own.sum(0)[1] < -0.3


def test_correct_answer_is_pushed_down_exactly_when_language_gap_exceeds_wrong_rate():
    """枚举六条一组的全部对错与三档语言分，用 Fraction 判断 ℓ̄−ℓ>w，与优势的符号逐条比较；相等时优势是 0。"""
    levels, pushed = (Fraction(0), Fraction(1, 2), Fraction(1)), 0
    for right in range(1, 7):
        for languages in itertools.product(levels, repeat=6):
            wrong_rate = Fraction(6 - right, 6)
            gap = sum(languages) / 6 - languages[0]  # 第 0 条是对的
            values = [[1.0] * right + [0.0] * (6 - right), [float(x) for x in languages]]
            advantage = component_advantages(tensor(values), group_size=6).sum(0)[0].item()
            if gap == wrong_rate:
                assert abs(advantage) < 1e-8
            else:
                assert (advantage < 0) == (gap > wrong_rate)
                pushed += gap > wrong_rate
    assert pushed > 100


def test_language_coefficient_cancels_when_all_are_correct():
    """全对的组：语言项乘 1 或 0.001，优势相同；不除标准差时差 1000 倍。"""
    language = tensor([1.0, 0.9, 0.95, 0.7])
    both = [torch.stack([torch.ones(4).double(), c * language]) for c in (1.0, 0.001)]
    a, b = (component_advantages(x, group_size=4, eps=0.0)[1] for x in both)
    torch.testing.assert_close(a, b)
    a, b = (component_advantages(x, group_size=4, scale_by_std=False)[1] for x in both)
    torch.testing.assert_close(a, 1000 * b)


def test_default_eps_and_bad_groups():
    """默认 ε 是 1e-6：标准差也是 1e-6 量级时看得出来。不能整除、组大小 1 报错。"""
    tiny = tensor([[0.0, 2e-6]])
    scale = statistics.stdev([0.0, 2e-6]) + 1e-6
    torch.testing.assert_close(
        component_advantages(tiny, group_size=2), tensor([[-1e-6 / scale, 1e-6 / scale]])
    )
    for size in (1, 3):
        with pytest.raises(ValueError, match="分组"):
            component_advantages(torch.zeros(2, 4), group_size=size)


# 二、拒绝采样


def test_rejection_sample_by_hand():
    prompts = ["a", "b", "a", "a", "b", "a", "a"]
    responses = ["x", "x", "x", "y", "z", "z", "w"]
    accepted = [True, True, True, False, True, True, True]
    assert rejection_sample(prompts, responses, accepted) == [0, 1, 4, 5, 6]  # 第 2 行重复，第 3 行没通过
    assert rejection_sample(prompts, responses, accepted, dedupe=False) == [0, 1, 2, 4, 5, 6]
    assert rejection_sample(prompts, responses, accepted, max_per_prompt=2) == [0, 1, 4, 5]  # 重复的不占名额
    assert rejection_sample(prompts, responses, accepted, max_per_prompt=2, dedupe=False) == [0, 1, 2, 4]
    assert rejection_sample([], [], []) == []
    with pytest.raises(ValueError, match="至少为 1"):
        rejection_sample(prompts, responses, accepted, max_per_prompt=0)
    with pytest.raises(ValueError):
        rejection_sample(prompts, responses[:-1], accepted)


PROBS = (Fraction(1, 2), Fraction(1, 8), Fraction(3, 8))  # 错、对 A、对 B；p = 1/2
RIGHT = (False, True, True)


def enumerate_kept(num_samples, cap, dedupe=False):
    """全部有序的 N 条：返回期望留下的 A、B 条数（精确有理数）。"""
    totals = [Fraction(0)] * 3
    for draw in itertools.product(range(3), repeat=num_samples):
        probability = math.prod((PROBS[i] for i in draw), start=Fraction(1))
        rows = rejection_sample(
            ["q"] * num_samples,
            [str(i) for i in draw],
            [RIGHT[i] for i in draw],
            max_per_prompt=cap,
            dedupe=dedupe,
        )
        for row in rows:
            totals[draw[row]] += probability
    return totals


@pytest.mark.parametrize("cap", [None, 1, 2, 5])
def test_kept_samples_follow_the_conditional_distribution(cap):
    """不论上限多少，留下的 A : B 恰是 1 : 3（条件分布），总数恰是 E[min(m,K)]。"""
    wrong, a, b = enumerate_kept(5, cap)
    assert wrong == 0 and b == 3 * a
    ours = expected_kept(tensor([0.5]), num_samples=5, max_per_prompt=cap)
    torch.testing.assert_close(ours, tensor([float(a + b)]))


@pytest.mark.rejects
def test_rejects_dedupe_keeps_the_conditional_distribution():
    """「去重不影响分布」：短回答去重之后 A : B 不再是 1 : 3，采得越多越接近 1 : 1。"""
    ratios = [b / a for _, a, b in (enumerate_kept(n, None, dedupe=True) for n in (1, 3, 6))]
    assert ratios[0] == 3 and 1 < ratios[2] < ratios[1] < 3
    assert float(ratios[2]) < 1.75


@pytest.mark.rejects
def test_rejects_keeping_the_shortest():
    """「只留最短的一条」：按别的标准挑，就不再是条件分布。这里 A 比 B 短，每题留一条时 A 的份额高于 1/4。"""
    totals = [Fraction(0)] * 3
    for draw in itertools.product(range(3), repeat=4):
        right = [i for i in draw if RIGHT[i]]
        if right:
            totals[min(right)] += math.prod((PROBS[i] for i in draw), start=Fraction(1))
    _, a, b = enumerate_kept(4, 1)
    assert a / (a + b) == Fraction(1, 4)
    assert totals[1] / (totals[1] + totals[2]) > Fraction(2, 5)


def test_conditional_is_the_nearest_policy_that_is_always_right():
    """KL(π'‖π) 在「全对」的分布上枚举网格：最小值在 1 : 3，恰是 log(1/p)。"""
    grid = [i / 1000 for i in range(1, 1000)]
    divergence = [x * math.log(x / 0.125) + (1 - x) * math.log((1 - x) / 0.375) for x in grid]
    best = min(range(len(grid)), key=divergence.__getitem__)
    assert grid[best] == 0.25 and divergence[best] == pytest.approx(math.log(2))


@pytest.mark.parametrize("cap", [None, 1, 2])
def test_first_sft_step_is_expected_kept_over_p_times_the_gradient_of_p(cap):
    """枚举 N=4 的全部采样，SFT 的梯度由 autograd 给出；∇p 由中心差分给出。"""
    logits = tensor([0.3, -0.4, 0.1, 0.6]).requires_grad_()
    right = [True, False, True, False]
    probs = logits.detach().softmax(0).tolist()
    expected_loss = 0.0
    log_probs = logits.log_softmax(0)
    for draw in itertools.product(range(4), repeat=4):
        rows = rejection_sample(
            ["q"] * 4, [str(i) for i in draw], [right[i] for i in draw], max_per_prompt=cap, dedupe=False
        )
        expected_loss = expected_loss + math.prod(probs[i] for i in draw) * sum(
            log_probs[draw[r]] for r in rows
        )
    (sft,) = torch.autograd.grad(expected_loss, logits)

    def pass_rate(z):
        return z.softmax(0)[[0, 2]].sum()

    base, step = logits.detach(), 1e-6
    slope = torch.stack(
        [
            (pass_rate(base + step * e) - pass_rate(base - step * e)) / (2 * step)
            for e in torch.eye(4).double()
        ]
    )
    p = pass_rate(base)
    weight = expected_kept(p[None], num_samples=4, max_per_prompt=cap)[0] / p
    torch.testing.assert_close(sft, weight * slope, atol=1e-8, rtol=1e-6)


def test_expected_kept_edges():
    """p=0 与 p=1、上限 1 的闭式、很大的 N；下侧的极限：m=1 时除以 p，N 大了趋于 1/p。"""
    p = tensor([0.0, 0.01, 0.3, 1.0])
    torch.testing.assert_close(expected_kept(p, num_samples=16), 16 * p)
    torch.testing.assert_close(expected_kept(p, num_samples=16, max_per_prompt=1), 1 - (1 - p) ** 16)
    torch.testing.assert_close(
        expected_kept(p[1:], num_samples=5000, max_per_prompt=1), torch.ones(3).double()
    )
    torch.testing.assert_close(expected_kept(p, num_samples=3, max_per_prompt=99), 3 * p)
    torch.testing.assert_close(expected_kept(p, num_samples=1), p)
    for bad in ({"num_samples": 0}, {"num_samples": 4, "max_per_prompt": 0}):
        with pytest.raises(ValueError, match="至少为 1"):
            expected_kept(p, **bad)


@pytest.mark.rejects
def test_rejects_capping_the_expectation():
    """「期望留下 min(m, Np) 条」：上限在期望里面，p=½、N=5、m=2 时是 1.78 条，不是 2 条。"""
    ours = expected_kept(tensor([0.5]), num_samples=5, max_per_prompt=2).item()
    assert ours == pytest.approx(2 - (2 * 1 + 1 * 5) / 32) and min(2, 2.5) - ours > 0.2


# 三、裁剪宽度 10


def test_width_ten_clips_only_positive_advantages_above_eleven():
    """TRL 1.16 真实的损失：负优势的 token 比值再小也有梯度，正优势只有比值超过 11 才没有。"""
    ratios = tensor([1e-6, 0.05, 0.5, 1.0, 5.0, 10.9, 11.1, 50.0])
    log_probs, old = ratios.log().expand(2, -1), torch.zeros(2, 8, dtype=torch.float64)
    advantages, mask = tensor([1.0, -1.0]), torch.ones(2, 8)
    _, grad, _ = trl_grpo_loss(log_probs, old, advantages, mask, epsilon_low=10.0, epsilon_high=10.0)
    assert (grad[0] != 0).tolist() == [True] * 6 + [False] * 2
    assert (grad[1] != 0).all()
    leaf = log_probs.clone().requires_grad_()
    loss = clipped_surrogate_loss(leaf, old, advantages[:, None], clip_low=10.0, clip_high=10.0).mean()
    (ours,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(ours, grad)
    _, narrow, _ = trl_grpo_loss(log_probs, old, advantages, mask)  # 宽度 0.2
    assert (narrow != 0).sum() == 4 + 5
