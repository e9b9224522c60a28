r"""snippets/reasoning/aha_moment.py 的测试。

真值的来源：(1) 手算；(2) 对 logit 的 autograd 加有限差分，不用被测的式子；
(3) 用四阶龙格—库塔法积分 logit 的常微分方程，得到起飞时间；(4) 首次采样的组数由几何级数逐项求和。
最后一节写出流传的错误写法，断言它们与真值不同。全部用 float64。
"""

import math

import pytest
import torch

from snippets.reasoning.aha_moment import (
    expected_groups_until_sampled,
    reflection_flags,
    reflection_rate,
    softmax_policy_gradient_flow,
    time_to_takeoff,
)


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


PROBS, REWARDS = tensor([0.5, 0.2, 0.25, 0.05]), tensor([0.3, 0.9, -0.4, 2.0])


def autograd_velocity(probs, rewards):
    """先求期望奖励对 logit 的梯度，再沿它走极小一步，对 log softmax 做中心差分。"""
    logits = probs.log().requires_grad_()
    (gradient,) = torch.autograd.grad(logits.softmax(0) @ rewards, logits)
    h = 1e-5
    ahead = (logits + h * gradient).log_softmax(0)
    behind = (logits - h * gradient).log_softmax(0)
    return ((ahead - behind) / (2 * h)).detach()


def integrate(prior, gain, threshold, natural, dt=1e-3):
    """两种行为的 logit 各走各的梯度，直到概率过线；真值只用梯度的定义。"""

    def slope(u):
        p = 1 / (1 + math.exp(-u))
        up = gain * p * (1 - p)  # d r̄/d z1；d r̄/d z0 是它的相反数
        return gain if natural else up - (-up)

    u, t, target = math.log(prior / (1 - prior)), 0.0, math.log(threshold / (1 - threshold))
    while u < target:
        k1 = slope(u)
        k2 = slope(u + dt / 2 * k1)
        k3 = slope(u + dt / 2 * k2)
        k4 = slope(u + dt * k3)
        step = dt * (k1 + 2 * k2 + 2 * k3 + k4) / 6
        if u + step >= target:
            return t + dt * (target - u) / step
        u, t = u + step, t + dt


# ---- 梯度流 ----


def test_flow_matches_autograd_and_finite_differences():
    torch.testing.assert_close(
        softmax_policy_gradient_flow(PROBS, REWARDS), autograd_velocity(PROBS, REWARDS), rtol=1e-7, atol=1e-9
    )


def test_two_behaviours_by_hand():
    """p=0.2，Δ=1：d log(p)/dt = p(1-p)²·2 = 0.256；另一种是 -2p²(1-p) = -0.064。"""
    flow = softmax_policy_gradient_flow(tensor([0.2, 0.8]), tensor([1.0, 0.0]))
    torch.testing.assert_close(flow, tensor([0.256, -0.064]))
    natural = softmax_policy_gradient_flow(tensor([0.2, 0.8]), tensor([1.0, 0.0]), natural=True)
    torch.testing.assert_close(natural, tensor([0.8, -0.2]))


@pytest.mark.parametrize("natural", [False, True])
def test_flow_keeps_total_probability_and_ignores_reward_shift(natural):
    flow = softmax_policy_gradient_flow(PROBS, REWARDS, natural=natural)
    assert (PROBS @ flow).abs() < 1e-14
    torch.testing.assert_close(flow, softmax_policy_gradient_flow(PROBS, REWARDS + 3, natural=natural))
    assert PROBS @ (flow * REWARDS) > 0  # 期望奖励不降


def test_natural_flow_is_the_limit_of_exponential_tilting():
    """p ∝ p0·exp(r·t) 在 t=0 的对数导数。"""
    h = 1e-5
    ahead, behind = ((PROBS.log() + s * h * REWARDS).log_softmax(0) for s in (1, -1))
    torch.testing.assert_close(
        softmax_policy_gradient_flow(PROBS, REWARDS, natural=True),
        (ahead - behind) / (2 * h),
        rtol=1e-7,
        atol=1e-9,
    )


@pytest.mark.parametrize("natural", [False, True])
def test_zero_prior_stays_zero(natural):
    probs = tensor([0.0, 0.4, 0.6])
    flow = softmax_policy_gradient_flow(probs, tensor([5.0, 1.0, 0.0]), natural=natural)
    assert torch.isfinite(flow).all() and (probs * flow)[0] == 0


# ---- 起飞时间 ----


@pytest.mark.parametrize("natural", [False, True])
@pytest.mark.parametrize(
    ("prior", "gain", "threshold"), [(0.1, 0.6, 0.5), (0.03, 1.0, 0.8), (0.3, 0.25, 0.9)]
)
def test_takeoff_matches_the_integrated_ode(prior, gain, threshold, natural):
    expected = integrate(prior, gain, threshold, natural)
    assert time_to_takeoff(prior, gain=gain, threshold=threshold, natural=natural) == pytest.approx(
        expected, abs=2e-3
    )


def test_takeoff_by_hand():
    """p0=0.1 到 0.5、Δ=1：F(0.5)=0，F(0.1)=10/9-10-2ln9；自然梯度是 ln 9。"""
    assert time_to_takeoff(0.1, gain=1.0) == pytest.approx((80 / 9 + 2 * math.log(9)) / 2, rel=1e-12)
    assert time_to_takeoff(0.1, gain=1.0, natural=True) == pytest.approx(math.log(9), rel=1e-12)
    assert time_to_takeoff(0.0, gain=1.0) == math.inf == time_to_takeoff(0.0, gain=1.0, natural=True)
    assert time_to_takeoff(0.3, gain=1.0, threshold=0.3) == 0


def test_small_prior_scaling():
    """普通梯度按 1/p0 增长，自然梯度每小十倍多 ln10/Δ。"""
    plain = [time_to_takeoff(p, gain=1.0) for p in (1e-5, 1e-6)]
    natural = [time_to_takeoff(p, gain=1.0, natural=True) for p in (1e-5, 1e-6)]
    assert plain[1] / plain[0] == pytest.approx(10, rel=1e-3)
    assert natural[1] - natural[0] == pytest.approx(math.log(10), rel=1e-4)


@pytest.mark.parametrize("gain", [0.0, -1.0])
def test_takeoff_rejects_useless_behaviour(gain):
    with pytest.raises(ValueError, match=f"gain={gain}：行为没有好处"):
        time_to_takeoff(0.1, gain=gain)


# 终点是 1；已经过线；终点是 0
@pytest.mark.parametrize(("prior", "threshold"), [(0.1, 1.0), (0.6, 0.5), (0.0, 0.0)])
def test_takeoff_rejects_impossible_thresholds(prior, threshold):
    with pytest.raises(ValueError, match=f"收到 {prior} 与 {threshold}。"):
        time_to_takeoff(prior, gain=1.0, threshold=threshold)


# ---- 首次采到 ----


@pytest.mark.parametrize(("prior", "group_size"), [(0.2, 3), (0.05, 8), (0.7, 1)])
def test_first_sample_matches_the_series(prior, group_size):
    """Σ n·(没采到)^(n-1)·(采到)。"""
    miss = (1 - prior) ** group_size
    series = sum(n * miss ** (n - 1) * (1 - miss) for n in range(1, 3000))
    assert expected_groups_until_sampled(prior, group_size=group_size) == pytest.approx(series, rel=1e-9)


def test_first_sample_edges():
    assert expected_groups_until_sampled(0.0, group_size=8) == math.inf
    assert expected_groups_until_sampled(1.0, group_size=8) == 1
    assert expected_groups_until_sampled(1e-18, group_size=8) == pytest.approx(1e18 / 8, rel=1e-9)  # 不丢精度
    for prior, group_size in [(-0.1, 8), (1.1, 8), (0.1, 0)]:
        with pytest.raises(ValueError, match=f"收到 {prior} 与 {group_size}。"):
            expected_groups_until_sampled(prior, group_size=group_size)


# ---- 数关键词 ----


def test_flags_by_hand():
    texts = ["Wait, no.", "They waited, we await.", "checkout", "please CHECK it", "a.b", "axb", ""]
    assert reflection_flags(texts, ["wait", "check", "a.b"]) == [True, False, False, True, True, False, False]
    assert reflection_flags(["Wait wait", "so let me check"], ["let me check"]) == [False, True]
    assert reflection_rate(["wait wait wait", "x", "y", "z"], ["wait"]) == 0.25  # 数条数，不数次数


def test_empty_inputs_are_rejected():
    with pytest.raises(ValueError, match="一条回答也没有"):
        reflection_rate([], ["wait"])
    with pytest.raises(ValueError, match="关键词表是空的"):
        reflection_flags(["x"], [])


# ---- 被拒绝的错误写法 ----


@pytest.mark.rejects
def test_wrong_flows_are_rejected():
    """把自然梯度当成 logit 的普通梯度；忘了归一化的那一项。"""
    truth = autograd_velocity(PROBS, REWARDS)
    centered = REWARDS - PROBS @ REWARDS
    for wrong in (centered, PROBS * centered):
        assert (wrong - truth).abs().max() > 1e-2


@pytest.mark.rejects
def test_log_odds_linear_growth_is_wrong_for_plain_gradient():
    """「对数几率线性增长，起飞时间正比于 log(1/p0)」只对自然梯度成立。"""
    truth = integrate(0.01, 1.0, 0.5, False, dt=5e-3)
    assert math.log(99) / 1.0 < truth / 10
    assert time_to_takeoff(0.01, gain=1.0) == pytest.approx(truth, abs=2e-2)


@pytest.mark.rejects
def test_substring_count_is_rejected():
    """子串匹配把 waiter、checkout 也算成反思。"""
    texts = ["the waiter", "checkout page"]
    assert sum("wait" in t or "check" in t for t in texts) == 2
    assert reflection_rate(texts, ["wait", "check"]) == 0


@pytest.mark.rejects
def test_an_unsampled_behaviour_gets_exactly_no_gradient():
    """页面的断言：组内优势和为零，没采到的行为的 logit 梯度为零；换成不减基线的奖励就不是。"""
    logits = tensor([0.3, -0.2, -6.0]).requires_grad_()
    actions, rewards = torch.tensor([0, 1, 1, 0]), tensor([1.0, 0.0, 1.0, 1.0])
    for weights, is_zero in [(rewards - rewards.mean(), True), (rewards, False)]:
        (gradient,) = torch.autograd.grad((weights * logits.log_softmax(0)[actions]).mean(), logits)
        assert (gradient[2].abs() < 1e-15) == is_zero


def test_unequal_weights_leave_a_term_proportional_to_the_probability():
    """优势 1/4、-3/4、1/4、1/4 除以长度 1、3、1、1：平均是 1/8，没采到的行为剩下 -p/8。"""
    logits = tensor([0.3, -0.2, -6.0]).requires_grad_()
    weights = tensor([1 / 4, -3 / 4, 1 / 4, 1 / 4]) / tensor([1.0, 3.0, 1.0, 1.0])
    actions = torch.tensor([0, 1, 1, 0])
    (gradient,) = torch.autograd.grad((weights * logits.log_softmax(0)[actions]).mean(), logits)
    torch.testing.assert_close(gradient[2], -logits.detach().softmax(0)[2] / 8)
