r"""snippets/reasoning/r1_zero.py 的测试。

真值与被测代码无关：(1) pass@k 用全部 k 元子集的枚举，以及全部 $2^n$ 种对错序列的概率加权；(2) 标准误与 z 用有理数手算，
并用全部二项结果的枚举核对方差；(3) 有对有错的概率枚举全部序列，小概率用 Fraction 精确算。
"""

import itertools
import math
from fractions import Fraction

import pytest

from snippets.reasoning.r1_zero import (
    accuracy_standard_error,
    mixed_group_probability,
    pass_at_k,
    two_proportion_z,
)


def subset_average(num_samples, num_correct, k):
    """枚举全部 k 元子集，数出至少含一条对的比例。"""
    subsets = list(itertools.combinations(range(num_samples), k))
    return Fraction(sum(min(subset) < num_correct for subset in subsets), len(subsets))


@pytest.mark.parametrize(("num_samples", "k"), [(1, 1), (5, 1), (6, 3), (7, 7), (9, 4)])
def test_pass_at_k_is_the_average_over_all_subsets(num_samples, k):
    for num_correct in range(num_samples + 1):
        expected = float(subset_average(num_samples, num_correct, k))
        assert pass_at_k(num_samples, num_correct, k=k) == pytest.approx(expected, abs=1e-14)


def expectation(estimate, num_samples, rate):
    """对全部 2^n 种对错序列求期望。"""
    total = 0.0
    for outcome in itertools.product((0, 1), repeat=num_samples):
        correct = sum(outcome)
        total += rate**correct * (1 - rate) ** (num_samples - correct) * estimate(num_samples, correct)
    return total


def plug_in(num_samples, num_correct, k):
    return 1 - (1 - num_correct / num_samples) ** k


def any_correct(num_samples, num_correct, k):
    """误传：n 条里有一条对就算通过，不管 k。"""
    return float(num_correct > 0)


@pytest.mark.rejects
@pytest.mark.parametrize("rate", [0.05, 0.3, 0.8])
def test_pass_at_k_is_unbiased_and_wrong_versions_are_not(rate):
    num_samples, k = 8, 3
    truth = 1 - (1 - rate) ** k
    assert expectation(lambda n, c: pass_at_k(n, c, k=k), num_samples, rate) == pytest.approx(
        truth, abs=1e-12
    )
    assert expectation(lambda n, c: plug_in(n, c, k), num_samples, rate) < truth - 0.005
    assert expectation(lambda n, c: any_correct(n, c, k), num_samples, rate) > truth + 0.005


def test_pass_at_1_is_the_fraction_correct():
    assert pass_at_k(64, 17, k=1) == pytest.approx(17 / 64, abs=1e-15)


def test_pass_at_k_is_certain_when_too_few_are_wrong():
    assert pass_at_k(10, 6, k=5) == 1.0
    assert pass_at_k(10, 5, k=5) < 1.0
    assert pass_at_k(10, 0, k=10) == 0.0


def test_pass_at_k_does_not_overflow():
    """C(5000, 2500) 超过 float 的上限；真值用大整数的 Fraction。"""
    exact = 1 - Fraction(math.comb(4997, 2500), math.comb(5000, 2500))
    assert pass_at_k(5000, 3, k=2500) == pytest.approx(float(exact), rel=1e-10)
    with pytest.raises(OverflowError):
        float(math.comb(5000, 2500))


@pytest.mark.parametrize("arguments", [(4, 5, 1), (4, -1, 1), (4, 2, 0), (4, 2, 5)])
def test_impossible_counts_are_refused(arguments):
    num_samples, num_correct, k = arguments
    with pytest.raises(ValueError, match="k=|条数不合理"):
        pass_at_k(num_samples, num_correct, k=k)


def test_standard_error_by_hand():
    """9 题对 3 题：1/3·2/3/9 = 2/81，开方；除以 N−1 的写法（2/72）不同。"""
    assert accuracy_standard_error(3, 9) == pytest.approx(math.sqrt(2) / 9, rel=1e-14)
    assert abs(accuracy_standard_error(3, 9) - math.sqrt(2 / 72)) > 0.009
    assert accuracy_standard_error(0, 9) == accuracy_standard_error(9, 9) == 0.0


def test_squared_error_matches_the_enumerated_variance():
    """二项分布的枚举：标准误的平方期望是 (N−1)/N 乘正确率的真方差。"""
    num, rate = 12, 0.35
    weights = [math.comb(num, c) * rate**c * (1 - rate) ** (num - c) for c in range(num + 1)]
    mean = sum(w * c / num for c, w in enumerate(weights))
    variance = sum(w * (c / num - mean) ** 2 for c, w in enumerate(weights))
    squared = sum(w * accuracy_standard_error(c, num) ** 2 for c, w in enumerate(weights))
    assert squared == pytest.approx(variance * (num - 1) / num, rel=1e-12)


def test_two_proportion_z_by_hand():
    """2/8 与 6/8：合并 1/2，方差 1/4·(1/8+1/8)=1/16，z = (1/2)/(1/4) = 2；反过来是 −2。"""
    assert two_proportion_z((2, 6), (8, 8)) == pytest.approx(2.0, rel=1e-14)
    assert two_proportion_z((6, 2), (8, 8)) == pytest.approx(-2.0, rel=1e-14)


def test_two_proportion_z_with_unequal_sizes():
    """1/4 与 6/8：合并 7/12，方差 7/12·5/12·(1/4+1/8) = 35/384，z = (1/2)/√(35/384)。"""
    expected = 0.5 / math.sqrt(35 / 384)
    assert two_proportion_z((1, 6), (4, 8)) == pytest.approx(expected, rel=1e-14)
    swapped_sizes = 0.5 / math.sqrt(35 / 144 * (1 / 8 + 1 / 8))  # 两边都用 8
    assert abs(two_proportion_z((1, 6), (4, 8)) - swapped_sizes) > 0.1


def test_square_of_z_is_the_chi_square_of_the_two_by_two_table():
    """独立的公式：2×2 列联表的卡方 N(ad−bc)²/(行列和之积)。"""
    (a, c), (n1, n2) = (600, 630), (1319, 1319)
    b, d = n1 - a, n2 - c
    chi = Fraction((n1 + n2) * (a * d - b * c) ** 2, n1 * n2 * (a + c) * (b + d))
    assert two_proportion_z((a, c), (n1, n2)) ** 2 == pytest.approx(float(chi), rel=1e-12)


def test_degenerate_comparisons_are_refused():
    with pytest.raises(ValueError, match="方差为 0"):
        two_proportion_z((8, 8), (8, 8))
    with pytest.raises(ValueError, match="方差为 0"):
        two_proportion_z((0, 0), (8, 8))
    with pytest.raises(ValueError, match="题数不合理"):
        accuracy_standard_error(3, 2)
    with pytest.raises(ValueError, match="题数不合理"):
        accuracy_standard_error(0, 0)
    assert accuracy_standard_error(1, 1) == accuracy_standard_error(0, 1) == 0  # 只有一题：比例是 1 或 0


@pytest.mark.parametrize("group_size", [2, 3, 7])
def test_mixed_group_probability_by_enumeration(group_size):
    rate, total = 0.3, 0.0
    for outcome in itertools.product((0, 1), repeat=group_size):
        if len(set(outcome)) == 2:
            total += rate ** sum(outcome) * (1 - rate) ** (group_size - sum(outcome))
    assert mixed_group_probability(rate, group_size=group_size) == pytest.approx(total, rel=1e-13)


def test_mixed_group_probability_keeps_precision_for_tiny_rates():
    """p=1e-18 时 1-(1-p)^16 直接算是 0，真值约 1.6e-17。"""
    rate = Fraction(1, 10**18)
    exact = 1 - (1 - rate) ** 16 - rate**16
    assert mixed_group_probability(1e-18) == pytest.approx(float(exact), rel=1e-12, abs=0.0)
    assert 1 - (1 - 1e-18) ** 16 == 0.0


def test_mixed_group_probability_edges():
    assert mixed_group_probability(0.0) == mixed_group_probability(1.0) == 0.0
    assert mixed_group_probability(0.5, group_size=2) == pytest.approx(0.5)
    assert mixed_group_probability(0.2) != mixed_group_probability(0.2, group_size=8)
    for rate, group_size in [(-0.1, 4), (1.1, 4), (0.5, 1)]:
        with pytest.raises(ValueError, match="应为概率"):
            mixed_group_probability(rate, group_size=group_size)


def test_default_group_size_is_sixteen():
    assert mixed_group_probability(0.156) == mixed_group_probability(0.156, group_size=16)
