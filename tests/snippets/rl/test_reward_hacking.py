"""奖励欺骗的参考实现：best-of-n 的期望、集成、自适应 KL 系数。

真值：best-of-n 用全部 n 元组的暴力枚举（同分平分），并对照 `best_of_n_policy`；KL 的上界用均匀分布最大值的
数值积分；集成用手算与 `statistics` 标准库；自适应系数对照 verl（提交见 JSON）`AdaptiveKLController`
真实运行后冻结的数。被拒绝的错误写法在各测试里给出差距。
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
import torch

from snippets.rl.post_training import best_of_n_policy
from snippets.rl.reward_hacking import adaptive_kl_coef, best_of_n_kl_bound, best_of_n_mean, ensemble_reward

GOLDEN = json.loads((Path(__file__).parents[2] / "golden/reward_hacking.json").read_text(encoding="utf-8"))


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def enumerated_mean(scores, values, n):
    """全部 n 元组等概率；最高分的几次抽样平分。"""
    total, count = 0.0, 0
    for draw in itertools.product(range(len(scores)), repeat=n):
        best = max(scores[i] for i in draw)
        winners = [values[i] for i in draw if scores[i] == best]
        total, count = total + sum(winners) / len(winners), count + 1
    return total / count


@pytest.mark.parametrize("n", [1, 2, 3, 4])
@pytest.mark.parametrize(
    "scores", [[0.3, -1.0, 2.0, 0.5, 1.1], [1.0, 0.0, 1.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0, 2.0]]
)
def test_best_of_n_mean_equals_brute_force_with_and_without_ties(scores, n):
    values = [0.7, 5.0, -2.0, 1.0, 0.25]
    expected = tensor(enumerated_mean(scores, values, n))
    torch.testing.assert_close(best_of_n_mean(tensor(scores), tensor(values), n=n), expected)


def test_best_of_n_mean_equals_the_exact_policy_on_a_larger_set():
    generator = torch.Generator().manual_seed(0)
    scores = torch.randint(0, 30, (200,), generator=generator).double()
    values = torch.randn(200, generator=generator, dtype=torch.float64)
    policy = best_of_n_policy(torch.full((200,), 1 / 200, dtype=torch.float64), scores, n=7)
    torch.testing.assert_close(best_of_n_mean(scores, values, n=7), policy @ values)


def test_best_of_n_only_depends_on_the_order_of_the_scores():
    scores, values = tensor([0.1, 3.0, -2.0, 0.4]), tensor([1.0, 2.0, 4.0, 8.0])
    transformed = best_of_n_mean(scores**3, values, n=3)
    torch.testing.assert_close(best_of_n_mean(scores, values, n=3), transformed)


def test_best_of_n_maximises_rather_than_minimises():
    scores = tensor([0.0, 1.0, 2.0])
    # n 很大时只剩最高分；选最低分的错误写法会给 0
    assert best_of_n_mean(scores, scores, n=200) > 1.99


def test_best_of_n_mean_keeps_dtype():
    scores = torch.tensor([0.0, 1.0, 2.0], dtype=torch.float32)
    assert best_of_n_mean(scores, scores, n=2).dtype == torch.float32
    mixed = best_of_n_mean(scores, tensor([0.1, 0.2, 0.3]), n=2)  # 精度随 values：(0.1 + 0.2·3 + 0.3·5)/9
    torch.testing.assert_close(mixed, tensor(2.2 / 9))


@pytest.mark.rejects
@pytest.mark.parametrize("n", [1, 2, 5, 64])
def test_kl_bound_is_the_kl_of_the_maximum_of_n_uniforms(n):
    """n 个均匀随机数的最大值密度 n·u^(n−1)，对均匀分布的 KL 用中点法积分。"""
    u = (torch.arange(400_000, dtype=torch.float64) + 0.5) / 400_000
    density = n * u ** (n - 1)
    integral = (density * density.clamp(min=1e-300).log()).mean().item()
    assert best_of_n_kl_bound(n) == pytest.approx(integral, abs=1e-4)
    if n > 1:
        for wrong in (math.log(n), math.log(n) - n / (n - 1), math.log(n) + (n - 1) / n):
            assert abs(wrong - integral) > 0.02


def test_kl_bound_is_not_exceeded_and_is_loose_with_ties():
    ref = torch.full((6,), 1 / 6, dtype=torch.float64)
    for rewards in (tensor([0, 1, 2, 3, 4, 5]), tensor([0, 0, 0, 1, 1, 1])):
        policy = best_of_n_policy(ref, rewards, n=64)
        kl = torch.where(policy > 0, policy * (policy / ref).log(), 0).sum().item()
        assert kl < best_of_n_kl_bound(64) - 1.3


MEMBERS = tensor([[1.0, 0.0, -2.0], [2.0, 0.0, 5.0], [6.0, 0.0, 1.0], [3.0, 0.0, 0.0]])


def test_ensemble_modes_match_hand_arithmetic():
    """第一列 1、2、6、3：均值 3，中位数 2.5，最小 1，总体方差 14/4；第三列 −2、5、1、0：均值 1，方差 26/4。"""
    expected = {"mean": [3, 0, 1], "median": [2.5, 0, 0.5], "min": [1, 0, -2]}
    for mode, values in expected.items():
        torch.testing.assert_close(ensemble_reward(MEMBERS, mode=mode), tensor(values).double())
    lcb = [3 - 2 * math.sqrt(3.5), 0, 1 - 2 * math.sqrt(6.5)]
    torch.testing.assert_close(ensemble_reward(MEMBERS, mode="lcb", penalty=2.0), tensor(lcb))
    uwo = [3 - 0.5 * 3.5, 0, 1 - 0.5 * 6.5]
    torch.testing.assert_close(ensemble_reward(MEMBERS, mode="uwo", penalty=0.5), tensor(uwo))


@pytest.mark.rejects
def test_default_penalty_is_one_and_std_is_population():
    column = MEMBERS[:, 0].tolist()
    population = statistics.mean(column) - statistics.pstdev(column)
    assert ensemble_reward(MEMBERS, mode="lcb")[0].item() == pytest.approx(population)
    assert ensemble_reward(MEMBERS, mode="lcb", penalty=0.0)[0].item() == statistics.mean(column)
    sample = statistics.mean(column) - statistics.stdev(column)  # 错误写法：除以 K−1
    assert abs(population - sample) > 0.2


@pytest.mark.parametrize("size", [2, 3, 4, 8])
def test_one_fooled_member_helps_unless_the_penalty_exceeds_the_threshold(size):
    """一个成员多给 e：均值涨 e/k，lcb 的涨幅是 e(1 − λ√(k−1))/k；大家一起多给 e，任何聚合都涨 e。"""
    base = torch.zeros(size, 1, dtype=torch.float64)
    fooled = base.clone()
    fooled[0] = 12.0
    threshold = 1 / math.sqrt(size - 1)
    for penalty in (0.9 * threshold, 1.1 * threshold):
        gain = ensemble_reward(fooled, mode="lcb", penalty=penalty).item()
        assert gain == pytest.approx(12 * (1 - penalty / threshold) / size)
    assert ensemble_reward(fooled, mode="min").item() == 0
    for mode in ("mean", "median", "min", "lcb", "uwo"):
        assert ensemble_reward(base + 12, mode=mode).item() == pytest.approx(12)


def test_adaptive_coefficient_matches_verl():
    for case in GOLDEN["cases"]:
        coef = case["start"]
        for (kl, count), expected in zip(case["updates"], case["values"], strict=True):
            coef = adaptive_kl_coef(
                coef, kl, target_kl=case["target"], num_samples=count, horizon=case["horizon"]
            )
            assert coef == pytest.approx(expected, rel=1e-14)


@pytest.mark.rejects
def test_adaptive_coefficient_moves_towards_the_budget():
    """KL 超出目标系数变大，不足变小，相等不变；默认视野 10000、一批 1000 条，截断后每次至多 2%。"""
    update = {kl: adaptive_kl_coef(1.0, kl, target_kl=0.1, num_samples=1000) for kl in (0.0, 0.1, 0.11, 9.0)}
    assert update == pytest.approx({0.0: 0.98, 0.1: 1.0, 0.11: 1.01, 9.0: 1.02})
    # 不截断的错误写法会把系数一次乘到 9.9
    assert abs(1 + (9.0 / 0.1 - 1) * 0.1 - update[9.0]) > 8


def test_the_shortest_horizon_moves_by_the_clipped_error():
    """H=N=1：KL 高出一成，系数就乘 1.1。"""
    updated = adaptive_kl_coef(2.0, 1.1, target_kl=1.0, num_samples=1, horizon=1)
    assert updated == pytest.approx(2.2)


@pytest.mark.parametrize(
    "call",
    [
        lambda: best_of_n_kl_bound(0),
        lambda: best_of_n_mean(tensor([0.0]), tensor([0.0]), n=0),
        lambda: ensemble_reward(MEMBERS, mode="max"),
        lambda: ensemble_reward(MEMBERS, mode="lcb", penalty=-1.0),
        lambda: adaptive_kl_coef(0.1, 1.0, target_kl=0.0, num_samples=8),
        lambda: adaptive_kl_coef(0.1, 1.0, target_kl=1.0, num_samples=8, horizon=0),
    ],
)
def test_nonsense_arguments_are_refused(call):
    with pytest.raises(ValueError, match=r"至少|应"):
        call()
