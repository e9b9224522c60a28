r"""snippets/reasoning/overthinking.py 的测试。

真值的来源：(1) 手算，推导写在各测试里，含 2412.21187 §2.2 印出的例子（39/901）；
(2) TRL 1.16 的 `get_cosine_scaled_reward`，真的调用；(3) 性质（平移、缩放、次序）；
(4) k1.5 与 L1 的式子用 Python 标量逐条另写一遍（Fraction，不用张量）。
最后一节把流传的错误写法写出来，断言它们与手算不同。全部用 float64，容差是 `assert_close` 的默认值。
"""

import math
from fractions import Fraction

import pytest
import torch
from trl.rewards import get_cosine_scaled_reward

from snippets.reasoning.overthinking import (
    cosine_length_reward,
    kimi_length_reward,
    lcpo_exact,
    lcpo_max,
    outcome_efficiency,
)
from snippets.rl.grpo import group_advantages


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def random_batch(seed, rows, longest=4000):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, longest, (rows,), generator=generator).double()
    return lengths, torch.rand(rows, generator=generator) < 0.5


# ---- 结果效率 ----


def test_outcome_efficiency_by_hand():
    """40/200、120/200、0、1，平均 0.45；每道题等权，不是按 token 加权（那是 260/600）。"""
    lengths = [[40, 60, 100], [50, 70, 80], [90, 10], [100]]
    correct = [[True, True, True], [False, True, True], [False, False], [True]]
    assert outcome_efficiency(lengths, correct) == pytest.approx(0.45, abs=1e-12)
    assert outcome_efficiency(lengths[:1], correct[:1]) == pytest.approx(0.2, abs=1e-12)


def test_outcome_efficiency_matches_the_printed_example():
    assert round(100 * outcome_efficiency([[39, 862]], [[True, True]]), 1) == 4.3


def test_outcome_efficiency_is_accuracy_when_there_is_one_solution():
    """论文 §2.4：只有一个解时等于正确率。"""
    assert outcome_efficiency([[7], [900], [30], [4]], [[True], [False], [True], [True]]) == 0.75


def test_outcome_efficiency_ignores_the_final_answer():
    assert outcome_efficiency([[60, 140]], [[True, False]]) == pytest.approx(0.3, abs=1e-12)


def test_outcome_efficiency_of_the_shortest_answer():
    """一个 token 就对：第一个正确的解就是整条回答。"""
    assert outcome_efficiency([[1]], [[True]]) == 1.0


@pytest.mark.parametrize(
    ("message", "lengths", "correct"),
    [
        ("一道题也没有", [], []),
        ("总长大于 0", [[]], [[]]),
        ("必须等长", [[3, 4]], [[True]]),
        ("总长大于 0", [[0]], [[True]]),
        ("zip", [[3]], [[True], [True]]),
    ],
)
def test_outcome_efficiency_rejects_bad_input(message, lengths, correct):
    with pytest.raises(ValueError, match=message):
        outcome_efficiency(lengths, correct)


# ---- k1.5 ----


def test_kimi_by_hand():
    """长度 100、200、300、500：进度 0、1/4、1/2、1，λ 为 0.5、0.25、0、−0.5；答错的截到不超过 0。"""
    lengths = tensor([100, 200, 300, 500])
    right = torch.tensor([True, True, True, True])
    torch.testing.assert_close(kimi_length_reward(lengths, right, group_size=4), tensor([0.5, 0.25, 0, -0.5]))
    torch.testing.assert_close(kimi_length_reward(lengths, ~right, group_size=4), tensor([0, 0, 0, -0.5]))
    mixed = torch.tensor([False, True, False, True])
    torch.testing.assert_close(kimi_length_reward(lengths, mixed, group_size=4), tensor([0, 0.25, 0, -0.5]))


def test_kimi_extremes_come_from_the_whole_group():
    """最短的是答错的 100：答对的 200 得 0.5 − 100/200 = 0，不是 0.5。"""
    reward = kimi_length_reward(tensor([100, 200, 300]), torch.tensor([False, True, True]), group_size=3)
    torch.testing.assert_close(reward, tensor([0, 0, -0.5]))


def test_kimi_equal_lengths_give_zero_and_groups_do_not_mix():
    lengths, correct = tensor([7, 7, 10, 30]), torch.tensor([True, False, True, True])
    torch.testing.assert_close(kimi_length_reward(lengths, correct, group_size=2), tensor([0, 0, 0.5, -0.5]))
    torch.testing.assert_close(kimi_length_reward(lengths, correct, group_size=1), tensor([0, 0, 0, 0]))


def test_kimi_matches_exact_fractions():
    lengths, correct = random_batch(0, 30)
    truth = []
    for start in range(0, 30, 5):
        group = [int(x) for x in lengths[start : start + 5]]
        for offset, length in enumerate(group):
            lam = Fraction(1, 2) - Fraction(length - min(group), max(group) - min(group))
            truth.append(float(lam if correct[start + offset] else min(Fraction(0), lam)))
    torch.testing.assert_close(kimi_length_reward(lengths, correct, group_size=5), tensor(truth))


def test_kimi_is_invariant_to_affine_lengths_and_keeps_dtype():
    lengths, correct = random_batch(1, 12)
    one = kimi_length_reward(lengths, correct, group_size=4)
    torch.testing.assert_close(kimi_length_reward(3 * lengths + 50, correct, group_size=4), one)
    assert kimi_length_reward(lengths.float(), correct, group_size=4).dtype == torch.float32


@pytest.mark.parametrize("group_size", [0, 5])
def test_kimi_rejects_bad_groups(group_size):
    with pytest.raises(ValueError, match="每组"):
        kimi_length_reward(tensor([1, 2, 3]), torch.tensor([True, True, True]), group_size=group_size)


@pytest.mark.parametrize("weight", [1e-3, 0.1, 1.0, 50.0])
def test_weight_cancels_in_all_correct_and_all_wrong_groups(weight):
    """全对：Â = −(ℓ−ℓ̄)/std(ℓ)。长度 2、4、6、8：均值 5，样本方差 20/3。
    全错：奖励 w·(0, 0, −1/6, −1/2)，均值 −w/6，减去后 w·(1, 1, 0, −2)/6，样本标准差 w·√2/6。
    """
    lengths = tensor([2, 4, 6, 8])
    right = torch.ones(4, dtype=torch.bool)
    reward = 1 + weight * kimi_length_reward(lengths, right, group_size=4)
    by_hand = -(lengths - 5) / math.sqrt(20 / 3)
    torch.testing.assert_close(group_advantages(reward, group_size=4, eps=0.0), by_hand, rtol=1e-6, atol=1e-9)
    reward = weight * kimi_length_reward(lengths, ~right, group_size=4)
    wrong = tensor([1, 1, 0, -2]) / math.sqrt(2)
    torch.testing.assert_close(group_advantages(reward, group_size=4, eps=0.0), wrong)
    only_mean = group_advantages(reward, group_size=4, scale_by_std=False)
    torch.testing.assert_close(only_mean, weight * tensor([1, 1, 0, -2]) / 6)  # 只减均值时与 w 成正比


# ---- L1 ----


def test_lcpo_by_hand():
    """n_gold=1000：写 1000、2000、400；α=0.0003。Exact：1、0.7、0.82，答错再减 1；Max：0.5、0.2、0.68，答错为 0。"""
    lengths, target = tensor([1000, 2000, 400]), tensor([1000, 1000, 1000])
    right = torch.ones(3, dtype=torch.bool)
    torch.testing.assert_close(lcpo_exact(lengths, right, target), tensor([1.0, 0.7, 0.82]))
    torch.testing.assert_close(lcpo_exact(lengths, ~right, target), tensor([0.0, -0.3, -0.18]))
    torch.testing.assert_close(lcpo_max(lengths, right, target), tensor([0.5, 0.2, 0.68]))
    torch.testing.assert_close(lcpo_max(lengths, ~right, target), tensor([0.0, 0.0, 0.0]))


def test_lcpo_max_is_clipped_on_both_sides():
    lengths, target = tensor([100, 3900]), tensor([3900, 100])
    right = torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(lcpo_max(lengths, right, target), tensor([1.0, 0.0]))
    torch.testing.assert_close(
        lcpo_max(lengths, right, target, alpha=0.0001, delta=0.4), tensor([0.78, 0.02])
    )
    torch.testing.assert_close(lcpo_exact(lengths, right, target, alpha=0.0001), tensor([0.62, 0.62]))


# ---- 余弦 ----


@pytest.mark.parametrize("bounds", [{}, {"short": 2.0, "long": 1.0, "wshort": -10.0, "wlong": 0.0}])
def test_cosine_matches_trl(bounds):
    lengths, correct = random_batch(2, 40, longest=150)  # 有超过上限 100 的
    names = {"short": "max_value_correct", "long": "min_value_correct"}
    names |= {"wshort": "min_value_wrong", "wlong": "max_value_wrong"}
    ours = {"short": "correct_short", "long": "correct_long", "wshort": "wrong_short", "wlong": "wrong_long"}
    reward_fn = get_cosine_scaled_reward(max_len=100, **{names[k]: v for k, v in bounds.items()})
    completions = [[{"content": r"\boxed{3}" if c else r"\boxed{4}"}] for c in correct]
    truth = reward_fn(completions, ["$3$"] * 40, [[0] * int(n) for n in lengths])
    actual = cosine_length_reward(lengths, correct, max_length=100, **{ours[k]: v for k, v in bounds.items()})
    assert (lengths > 100).any() and correct.any() and (~correct).any()
    torch.testing.assert_close(actual, tensor(truth))


def test_cosine_by_hand():
    """cos 在 0、1/3、1/2、1 处是 1、1/2、0、−1：对 1、0.875、0.75、0.5；错 −1、−0.875、−0.75、−0.5。"""
    lengths = tensor([0, 100, 150, 300])
    right = torch.ones(4, dtype=torch.bool)
    torch.testing.assert_close(
        cosine_length_reward(lengths, right, max_length=300), tensor([1, 0.875, 0.75, 0.5])
    )
    wrong = cosine_length_reward(lengths, ~right, max_length=300)
    torch.testing.assert_close(wrong, tensor([-1, -0.875, -0.75, -0.5]))


def test_cosine_with_the_smallest_limit():
    """上限 1：长度 0 是满分，1 就到头。"""
    right = torch.ones(2, dtype=torch.bool)
    torch.testing.assert_close(cosine_length_reward(tensor([0, 1]), right, max_length=1), tensor([1, 0.5]))


def test_cosine_exceed_branch_is_the_papers():
    """论文：长度等于上限时给 r_e，与对错无关。"""
    lengths, correct = tensor([299, 300, 301, 300, 150]), torch.tensor([True, True, False, False, False])
    reward = cosine_length_reward(lengths, correct, max_length=300, exceed=-10.0)
    torch.testing.assert_close(reward[1:4], tensor([-10, -10, -10]))
    torch.testing.assert_close(reward[4], tensor(-0.75))  # 没到上限的错答不受影响
    assert reward[0] > 0.49


def test_cosine_rejects_bad_limit():
    with pytest.raises(ValueError, match="max_length"):
        cosine_length_reward(tensor([1.0]), torch.tensor([True]), max_length=0)


# ---- 错误写法 ----


@pytest.mark.rejects
def test_rejects_paying_wrong_answers_for_being_short():
    """不截的 λ 给最短的错答 +0.5：w=1.5 时总分 0.75，超过最长的对答 1 − 0.75 = 0.25；截了之后是 0。"""
    lengths, correct = tensor([100, 500]), torch.tensor([False, True])
    unclipped = 0.5 - (lengths - 100) / 400
    wrong_version, ours = (
        correct + 1.5 * unclipped,
        correct + 1.5 * kimi_length_reward(lengths, correct, group_size=2),
    )
    assert wrong_version[0] - wrong_version[1] > 0.4
    torch.testing.assert_close(ours, tensor([0.0, 0.25]))


@pytest.mark.rejects
def test_rejects_extremes_of_the_correct_answers_only():
    lengths, correct = tensor([100, 200, 300]), torch.tensor([False, True, True])
    only_correct = 0.5 - (200 - 200) / (300 - 200)
    assert abs(only_correct - kimi_length_reward(lengths, correct, group_size=3)[1].item()) > 0.4


@pytest.mark.rejects
def test_rejects_adding_instead_of_multiplying_in_lcpo_max():
    """相加时，错而短的回答得 clip(0.5+α·900)=0.77，与对错无关。"""
    added = 0.0 + min(max(0.0003 * 900 + 0.5, 0.0), 1.0)
    assert added > 0.7
    assert lcpo_max(tensor([100.0]), torch.tensor([False]), tensor([1000.0])).item() == 0.0


@pytest.mark.rejects
def test_rejects_cosine_without_the_clamp():
    """不截断时余弦在 2 倍上限处回到 1：写两倍长反而满分。"""
    unclamped = 0.5 + 0.25 * (1 + math.cos(math.pi * 200 / 100))
    assert unclamped == pytest.approx(1.0)
    assert cosine_length_reward(
        tensor([200.0]), torch.tensor([True]), max_length=100
    ).item() == pytest.approx(0.5)
