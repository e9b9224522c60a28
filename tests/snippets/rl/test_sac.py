r"""snippets/rl/sac.py 的测试。

真值互相独立：(1) 手算；(2) `torch.distributions` 的 TanhTransform；(3) 对动作直接做数值积分，与 60 位有效数字的 cosh；
(4) 确定性转移时枚举全部路径（概率与 $e^{R/\alpha}$ 成正比）；一般情形用线性方程组精确评估策略，再与梯度上升找到的最优比；
(5) 有限差分。最后一节把流传的错误写法逐个写出来，断言上面的真值不认它们。
全部用 float64，除非写明；容差是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import math
from decimal import Decimal, localcontext

import jaxtyping
import pytest
import torch
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution

from snippets.rl.sac import (
    polyak_update,
    sac_actor_loss,
    sac_temperature_loss,
    soft_backup,
    soft_policy_log_probs,
    soft_q_target,
    soft_value,
    tanh_gaussian_log_prob,
)


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 手算 ----


def test_q_target_by_hand():
    """r=1，min(5, 4)=4，−α·logπ=−0.5·(−2)=+1，y=1+0.9·5=5.5；终止的一行只剩 r。"""
    y = soft_q_target(
        tensor([1.0, 1.0]),
        tensor([5.0, 5.0]),
        tensor([4.0, 6.0]),
        tensor([-2.0, -2.0]),
        torch.tensor([False, True]),
        alpha=0.5,
        gamma=0.9,
    )
    torch.testing.assert_close(y, tensor([5.5, 1.0]))


def test_zero_discount_leaves_the_reward():
    args = tensor([1.0]), tensor([5.0]), tensor([4.0]), tensor([-2.0]), torch.tensor([False])
    torch.testing.assert_close(soft_q_target(*args, alpha=0.5, gamma=0.0), tensor([1.0]))


def test_actor_loss_by_hand():
    """0.5·(−2)−min(3, 1)=−2 与 0.5·1−min(0, 4)=0.5，平均 −0.75。"""
    loss = sac_actor_loss(tensor([-2.0, 1.0]), tensor([3.0, 0.0]), tensor([1.0, 4.0]), alpha=0.5)
    torch.testing.assert_close(loss, tensor(-0.75))


def test_temperature_loss_and_gradient_by_hand():
    """logπ 平均 0.5，即熵 −0.5；目标 −1；α=2：损失 −2·(0.5−1)=1，对 log α 的导数也是 α(H−H̄)=1。"""
    log_alpha = tensor(2.0).log().requires_grad_()
    loss = sac_temperature_loss(log_alpha, tensor([0.0, 1.0]), target_entropy=-1.0)
    (grad,) = torch.autograd.grad(loss, log_alpha)
    torch.testing.assert_close(loss.detach(), tensor(1.0))
    torch.testing.assert_close(grad, tensor(1.0))


def test_soft_value_by_hand():
    """Q=(0, α·log 3)：α·log(1+3)；均匀参考再减 α·log 2。"""
    q = tensor([[0.0, 0.2 * math.log(3)]])
    torch.testing.assert_close(soft_value(q, alpha=0.2), tensor([0.2 * math.log(4)]))
    uniform = torch.full((1, 2), -math.log(2), dtype=torch.float64)
    torch.testing.assert_close(soft_value(q, alpha=0.2, ref_log_probs=uniform), tensor([0.2 * math.log(2)]))
    torch.testing.assert_close(soft_policy_log_probs(q, alpha=0.2).exp(), tensor([[0.25, 0.75]]))


# ---- 压缩高斯 ----


def test_log_prob_and_gradients_match_torch_distributions():
    mean, log_std = randn(5, 3).requires_grad_(), (0.4 * randn(5, 3, seed=1)).requires_grad_()
    noise, weights = randn(5, 3, seed=2), randn(5, seed=3)
    ours = tanh_gaussian_log_prob(mean, log_std, mean + log_std.exp() * noise)
    base = Normal(mean, log_std.exp())
    squashed = TransformedDistribution(Independent(base, 1), TanhTransform(cache_size=1))
    action = (mean + log_std.exp() * noise).tanh()
    theirs = squashed.log_prob(action)  # 由 a 反求 u
    torch.testing.assert_close(ours, theirs)
    for a, b in zip(
        torch.autograd.grad((weights * ours).sum(), (mean, log_std)),
        torch.autograd.grad((weights * theirs).sum(), (mean, log_std)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)


def integral(log_prob_fn, mean, std, *, count=200_000):
    """在动作 a 的中点网格上积分 exp(log_prob)；u 由 atanh 得到。"""
    a = (torch.arange(count, dtype=torch.float64) + 0.5) * (2 / count) - 1
    u = a.atanh()[:, None]
    density = log_prob_fn(torch.full_like(u, mean), torch.full_like(u, math.log(std)), u).exp()
    return (density.sum() * 2 / count).item()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 0.5), (0.0, 1.0), (1.0, 0.7), (-0.5, 1.3)])
def test_density_integrates_to_one(mean, std):
    """中点网格在端点附近有 1e-5 量级的截断误差。"""
    assert integral(tanh_gaussian_log_prob, mean, std) == pytest.approx(1, abs=1e-4)


def test_two_dimensions_multiply():
    mean, log_std, u = randn(4, 2), 0.3 * randn(4, 2, seed=1), randn(4, 2, seed=2)
    parts = [
        tanh_gaussian_log_prob(mean[:, i : i + 1], log_std[:, i : i + 1], u[:, i : i + 1]) for i in (0, 1)
    ]
    torch.testing.assert_close(tanh_gaussian_log_prob(mean, log_std, u), parts[0] + parts[1])


@pytest.mark.parametrize("u", ["-30", "-9.5", "-0.3", "0", "1", "8", "30"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_stable_jacobian_matches_sixty_digits(u, dtype):
    """减去高斯部分就是 −log(1−tanh²u)=2·log cosh u；真值用 60 位有效数字算。"""
    with localcontext() as context:
        context.prec = 60
        exact = float(2 * ((Decimal(u).exp() + (-Decimal(u)).exp()) / 2).ln())
    x = torch.tensor([[float(u)]], dtype=dtype, requires_grad=True)
    ours = tanh_gaussian_log_prob(x.detach(), torch.zeros_like(x), x) + 0.5 * math.log(2 * math.pi)
    assert ours.dtype == dtype
    # float32 在 u=0 附近靠两个 log 2 相消，绝对误差几个 1e-7
    assert ours.item() == pytest.approx(exact, rel=1e-6, abs=1e-6 if dtype == torch.float32 else 1e-12)
    (grad,) = torch.autograd.grad(ours.sum(), x)
    assert grad.item() == pytest.approx(2 * math.tanh(float(u)), abs=1e-6)


# ---- 目标、策略、温度 ----


def test_target_has_no_gradient_and_ignores_terminal_values():
    q1 = tensor([1.0, math.nan]).requires_grad_()
    log_probs, done = tensor([0.1, math.inf]).requires_grad_(), torch.tensor([False, True])
    log_alpha = tensor(0.0).requires_grad_()
    y = soft_q_target(tensor([0.0, 7.0]), q1, q1, log_probs, done, alpha=log_alpha.exp())
    assert not y.requires_grad and y[1].item() == 7
    assert y[0].item() == pytest.approx(0.99 * 0.9)  # 默认折扣 0.99


def test_expected_target_is_the_soft_bellman_equation():
    """离散动作时对 a' 求期望：E[y]=r+γ(E[Q]+αH)，熵用定义另算。"""
    q, logits = randn(6), randn(6, seed=1)
    log_probs, zeros = logits.log_softmax(0), torch.zeros(6, dtype=torch.float64)
    y = soft_q_target(zeros + 0.3, q, q, log_probs, zeros.bool(), alpha=0.7, gamma=0.8)
    probs = log_probs.exp()
    entropy = torch.distributions.Categorical(logits=logits).entropy()
    torch.testing.assert_close((probs * y).sum(), 0.3 + 0.8 * ((probs * q).sum() + 0.7 * entropy))


def smooth_q(action):
    return 1.5 * torch.cos(2 * action - 0.4) + 0.3 * action


def quadrature_objective(mean, std, alpha):
    """−E[Q]−αH，对 u 求和，密度用 torch.distributions 另算。"""
    u = torch.linspace(mean - 10 * std, mean + 10 * std, 20001, dtype=torch.float64)
    gaussian = Normal(tensor(mean), tensor(std)).log_prob(u)  # 传 float 会变成 float32
    weights = gaussian.exp() * (u[1] - u[0])
    log_pi = gaussian + 2 * torch.cosh(u).log()
    return (weights * (alpha * log_pi - smooth_q(u.tanh()))).sum().item()


def test_reparameterised_gradient_matches_finite_differences_of_the_exact_objective():
    eps = torch.linspace(-10, 10, 4001, dtype=torch.float64)
    weights = (-0.5 * eps.square()).exp()
    weights = weights / weights.sum() * len(eps)  # 损失里取平均，所以乘回点数
    mean, std, alpha, h = 0.3, 0.6, 0.4, 1e-4
    m, s = tensor(mean).requires_grad_(), tensor(math.log(std)).requires_grad_()
    mu, ls = m.expand(len(eps), 1), s.expand(len(eps), 1)
    u = mu + ls.exp() * eps[:, None]
    q = smooth_q(u.tanh())[:, 0]
    log_probs = tanh_gaussian_log_prob(mu, ls, u)
    loss = sac_actor_loss(weights * log_probs, weights * q, weights * (q + 1), alpha=alpha)
    actual = torch.autograd.grad(loss, (m, s))
    expected = (
        (quadrature_objective(mean + h, std, alpha) - quadrature_objective(mean - h, std, alpha)) / (2 * h),
        (
            quadrature_objective(mean, std * math.exp(h), alpha)
            - quadrature_objective(mean, std * math.exp(-h), alpha)
        )
        / (2 * h),
    )
    for a, b in zip(actual, expected, strict=True):
        assert a.item() == pytest.approx(b, abs=1e-6)  # 中心差分的误差


def test_actor_gradient_flows_through_the_smaller_q_only_and_not_into_alpha():
    q1, q2 = tensor([1.0, 5.0]).requires_grad_(), tensor([2.0, 3.0]).requires_grad_()
    log_alpha = tensor(0.3).requires_grad_()
    log_probs = tensor([0.1, 0.2]).requires_grad_()
    loss = sac_actor_loss(log_probs, q1, q2, alpha=log_alpha.exp())
    grads = torch.autograd.grad(loss, (q1, q2, log_probs, log_alpha), allow_unused=True)
    torch.testing.assert_close(grads[0], tensor([-0.5, 0.0]))
    torch.testing.assert_close(grads[1], tensor([0.0, -0.5]))
    torch.testing.assert_close(grads[2], torch.full((2,), math.exp(0.3) / 2, dtype=torch.float64))
    assert grads[3] is None


def test_temperature_does_not_touch_the_policy():
    log_alpha, log_probs = tensor(0.0).requires_grad_(), tensor([0.5]).requires_grad_()
    loss = sac_temperature_loss(log_alpha, log_probs, target_entropy=-1.0)
    assert torch.autograd.grad(loss, log_probs, allow_unused=True, retain_graph=True)[0] is None
    assert torch.autograd.grad(loss, log_alpha)[0].item() == pytest.approx(0.5)


def dual_descent(loss_fn, q_values, *, steps=400, lr=0.3):
    """离散 bandit：每步取精确的 Boltzmann 策略，再对 log α 走一步；返回最后的温度与熵。"""
    log_alpha = tensor(0.0)
    for _ in range(steps):
        log_probs = (q_values / log_alpha.exp()).log_softmax(0)
        probs = log_probs.exp()
        leaf = log_alpha.clone().requires_grad_()
        (grad,) = torch.autograd.grad(loss_fn(leaf, probs * log_probs * len(probs)), leaf)
        log_alpha = (log_alpha - lr * grad.clamp(-1, 1)).clamp(-20, 20)
    log_probs = (q_values / log_alpha.exp()).log_softmax(0)
    return log_alpha.exp().item(), -(log_probs.exp() * log_probs).sum().item()


def test_temperature_descends_to_the_target_entropy():
    """目标熵 1.0 nat；真值是二分法解出的 α，使 Boltzmann 策略的熵等于目标。"""
    q = randn(5)
    low, high = 1e-3, 1e3
    for _ in range(100):
        middle = math.sqrt(low * high)
        entropy = torch.distributions.Categorical(logits=q / middle).entropy().item()
        low, high = (middle, high) if entropy < 1.0 else (low, middle)
    alpha, entropy = dual_descent(lambda la, lp: sac_temperature_loss(la, lp, target_entropy=1.0), q)
    assert entropy == pytest.approx(1.0, abs=1e-6)
    assert alpha == pytest.approx(low, rel=1e-5)


# ---- 目标网络 ----


def test_polyak_closed_form_in_place_without_graph():
    """当前网络不动时，k 步后 θ̄=θ+(1−τ)^k(θ̄₀−θ)。"""
    source, target = randn(3).requires_grad_(), randn(3, seed=1).requires_grad_()
    start, pointer = target.detach().clone(), target.data_ptr()
    for _ in range(7):
        polyak_update([target], iter([source]), tau=0.2)
    torch.testing.assert_close(target.detach(), (source + 0.8**7 * (start - source)).detach())
    assert target.data_ptr() == pointer and target.is_leaf and target.grad_fn is None
    copy = torch.zeros(3, dtype=torch.float64)
    polyak_update([copy], [source])
    torch.testing.assert_close(copy, 0.005 * source.detach())  # 默认 0.005
    polyak_update([copy], [source], tau=1.0)
    assert torch.equal(copy, source)


# ---- 表格：软值迭代 ----


def random_mdp(seed=0):
    """4 个状态、3 个动作，每步以 0.1 的概率终止。"""
    return randn(4, 3, seed=seed), 0.9 * randn(4, 3, 4, seed=seed + 1).softmax(-1)


def solve(rewards, transitions, *, alpha, gamma, ref_log_probs=None, sweeps=500):
    values = torch.zeros(len(rewards), dtype=torch.float64)
    for _ in range(sweeps):
        q = soft_backup(values, rewards, transitions, gamma=gamma)
        values = soft_value(q, alpha=alpha, ref_log_probs=ref_log_probs)
    return q, values


def evaluate(log_probs, rewards, transitions, *, alpha, gamma, ref_log_probs=None):
    """策略的软值，解线性方程组：V=Σπ(r−α(logπ−logπ_ref))+γPV。"""
    probs = log_probs.exp()
    penalty = log_probs if ref_log_probs is None else log_probs - ref_log_probs
    step = (probs * (rewards - alpha * penalty)).sum(-1)
    moves = torch.einsum("sa,sax->sx", probs, transitions)
    return torch.linalg.solve(torch.eye(len(rewards), dtype=torch.float64) - gamma * moves, step)


@pytest.mark.parametrize("with_ref", [False, True])
def test_soft_value_iteration_is_the_best_policy(with_ref):
    """不动点就是 Boltzmann 策略的精确值；对 logits 做梯度上升也爬到同一个值，随机策略都不超过它。"""
    rewards, transitions = random_mdp()
    ref = randn(4, 3, seed=9).log_softmax(-1) if with_ref else None
    options = {"alpha": 0.5, "gamma": 0.95, "ref_log_probs": ref}
    q, values = solve(rewards, transitions, **options)
    best = soft_policy_log_probs(q, alpha=0.5, ref_log_probs=ref)
    torch.testing.assert_close(best.exp().sum(-1), torch.ones(4, dtype=torch.float64))
    torch.testing.assert_close(evaluate(best, rewards, transitions, **options), values)
    logits = torch.zeros(4, 3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=200, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = -evaluate(logits.log_softmax(-1), rewards, transitions, **options).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    climbed = evaluate(logits.detach().log_softmax(-1), rewards, transitions, **options)
    torch.testing.assert_close(climbed, values, atol=1e-6, rtol=0)
    for seed in range(20):
        other = evaluate(randn(4, 3, seed=seed).log_softmax(-1), rewards, transitions, **options)
        assert (other < values).all()


def test_deterministic_dynamics_give_boltzmann_paths():
    """确定性、定长 3 步：路径的概率是 softmax(R/α)，根的软值是 α·logsumexp(R/α)；真值枚举 8 条路径。"""
    alpha, rewards = 0.3, randn(7, 2)  # 完全二叉树，节点 i 的孩子是 2i+1、2i+2；第 3 步之后结束
    transitions = torch.zeros(7, 2, 7, dtype=torch.float64)
    for i, a in itertools.product(range(3), range(2)):
        transitions[i, a, 2 * i + 1 + a] = 1
    q, values = solve(rewards, transitions, alpha=alpha, gamma=1.0, sweeps=3)
    log_probs = soft_policy_log_probs(q, alpha=alpha)
    returns, ours = [], []
    for path in itertools.product(range(2), repeat=3):
        node, total, log_prob = 0, 0.0, 0.0
        for a in path:
            total, log_prob = total + rewards[node, a], log_prob + log_probs[node, a]
            node = 2 * node + 1 + a
        returns.append(total)
        ours.append(log_prob)
    truth = torch.stack(returns) / alpha
    torch.testing.assert_close(torch.stack(ours), truth.log_softmax(0))
    torch.testing.assert_close(values[0], alpha * truth.logsumexp(0))


def test_soft_improvement_is_monotone():
    """任意策略，Q 精确评估后取 e^{Q/α}，新策略的软值处处不低于旧的。"""
    rewards, transitions = random_mdp(3)
    for seed in range(10):
        log_probs = (2 * randn(4, 3, seed=seed)).log_softmax(-1)
        for _ in range(4):
            values = evaluate(log_probs, rewards, transitions, alpha=0.4, gamma=0.95)
            q = soft_backup(values, rewards, transitions, gamma=0.95)
            log_probs = soft_policy_log_probs(q, alpha=0.4)
            new = evaluate(log_probs, rewards, transitions, alpha=0.4, gamma=0.95)
            assert (new >= values - 1e-12).all()


def test_kl_regularised_is_sac_with_the_reference_in_the_reward():
    """KL(π‖π_ref) 正则 = 最大熵 + 奖励 r+β·logπ_ref：策略与软值都相同。"""
    rewards, transitions = random_mdp(5)
    ref = randn(4, 3, seed=8).log_softmax(-1)
    q_kl, v_kl = solve(rewards, transitions, alpha=0.6, gamma=0.9, ref_log_probs=ref)
    q_sac, v_sac = solve(rewards + 0.6 * ref, transitions, alpha=0.6, gamma=0.9)
    torch.testing.assert_close(v_kl, v_sac)
    torch.testing.assert_close(
        soft_policy_log_probs(q_kl, alpha=0.6, ref_log_probs=ref), soft_policy_log_probs(q_sac, alpha=0.6)
    )


def test_unavailable_actions_and_small_alpha():
    q = tensor([[1.0, -math.inf, 0.5]])
    assert soft_value(q, alpha=1e-4).item() == pytest.approx(1.0, abs=1e-12)  # 不上溢，趋于最大值
    log_probs = soft_policy_log_probs(q, alpha=0.5)
    assert log_probs[0, 1] == -math.inf
    torch.testing.assert_close(log_probs.exp()[0, [0, 2]], tensor([2.0, 1.0]).softmax(0))


# ---- 边界 ----


def test_bad_scalars_are_refused():
    x, done = tensor([0.0]), torch.tensor([False])
    for gamma in (-0.1, 1.5):
        with pytest.raises(ValueError, match="gamma"):
            soft_q_target(x, x, x, x, done, alpha=0.2, gamma=gamma)
    for tau in (0.0, 1.2):
        with pytest.raises(ValueError, match="tau"):
            polyak_update([x], [x], tau=tau)
    for alpha in (0.0, -1.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            soft_value(x[None], alpha=alpha)
    with pytest.raises(ValueError, match="zip"):
        polyak_update([x, x], [x])


def test_shapes_are_checked():
    with pytest.raises(jaxtyping.TypeCheckError):  # (B, 1) 与 (B,) 相减会悄悄广播成 (B, B)
        sac_actor_loss(randn(3), randn(3, 1), randn(3), alpha=0.2)


def test_float32_in_float32_out():
    x = randn(2, 1).float()
    log_probs = tanh_gaussian_log_prob(x, x, x)
    assert log_probs.dtype == torch.float32
    y = soft_q_target(log_probs, log_probs, log_probs, log_probs, torch.tensor([True, False]), alpha=0.2)
    assert y.dtype == torch.float32


# ---- 流传的错误写法 ----


@pytest.mark.rejects
def test_rejects_the_missing_jacobian():
    """不减 log(1−tanh²u)：μ=0、σ=1 时「密度」的积分是 0.606，不是 1。"""

    def wrong(mean, log_std, u):
        return Normal(mean, log_std.exp()).log_prob(u).sum(-1)

    assert integral(wrong, 0.0, 1.0) == pytest.approx(0.606, abs=1e-3)
    assert integral(tanh_gaussian_log_prob, 0.0, 1.0) == pytest.approx(1, abs=1e-4)


@pytest.mark.rejects
def test_rejects_the_jacobian_with_a_plus_sign():
    def wrong(mean, log_std, u):
        gaussian = Normal(mean, log_std.exp()).log_prob(u)
        return (gaussian + (1 - u.tanh().square()).log()).sum(-1)

    assert abs(integral(wrong, 0.0, 1.0) - 1) > 0.4


@pytest.mark.rejects
def test_rejects_adding_1e_minus_6_inside_the_log():
    """log(1−tanh²u+1e-6)：float32、u=10 时得到 −13.8，真值 −18.6；梯度 0，真值 −2。"""
    u = torch.tensor([[10.0]], requires_grad=True)
    (wrong,) = torch.autograd.grad((1 - u.tanh().square() + 1e-6).log().sum(), u)
    assert wrong.item() == 0
    ours = tanh_gaussian_log_prob(u.detach(), torch.zeros_like(u), u)
    assert torch.autograd.grad(ours.sum(), u)[0].item() == pytest.approx(2)


@pytest.mark.rejects
def test_rejects_the_maximum_of_the_twins():
    """两个估计各带独立的 N(0,1) 误差：取小偏低 1/√π=0.564，取大偏高同样多。"""
    noise = torch.randn(2, 200_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    zeros, done = torch.zeros_like(noise[0]), torch.zeros(200_000, dtype=torch.bool)
    ours = soft_q_target(zeros, noise[0], noise[1], zeros, done, alpha=0.2, gamma=1.0).mean().item()
    assert ours == pytest.approx(-(math.pi**-0.5), abs=0.01)
    assert torch.maximum(noise[0], noise[1]).mean().item() > 0.55


@pytest.mark.rejects
def test_rejects_the_entropy_with_the_wrong_sign():
    """+α·logπ 会惩罚随机：备份出的值低于 E[Q]，与精确评估差 2αγH。"""
    rewards, transitions = random_mdp()
    log_probs = torch.zeros(4, 3, dtype=torch.float64).log_softmax(-1)
    values = evaluate(log_probs, rewards, transitions, alpha=0.5, gamma=0.95)
    q = soft_backup(values, rewards, transitions, gamma=0.95)
    zeros, done = torch.zeros(3, dtype=torch.float64), torch.zeros(3, dtype=torch.bool)
    ours = soft_q_target(zeros, q[0], q[0], log_probs[0], done, alpha=0.5, gamma=1.0).mean()
    torch.testing.assert_close(ours, values[0])
    wrong = (q[0] + 0.5 * log_probs[0]).mean()
    assert (ours - wrong).item() == pytest.approx(2 * 0.5 * math.log(3))


@pytest.mark.rejects
def test_rejects_bootstrapping_through_termination():
    """一步就终止、奖励恒为 1：真值 1；乘 γ 继续自举会收敛到 1/(1−γ)=10。"""
    x, one = tensor([0.0]), tensor([1.0])
    ours, wrong = tensor([0.0]), tensor([0.0])
    for _ in range(300):
        ours = soft_q_target(one, ours, ours, x, torch.tensor([True]), alpha=0.2, gamma=0.9)
        wrong = soft_q_target(one, wrong, wrong, x, torch.tensor([False]), alpha=0.2, gamma=0.9)
    assert ours.item() == 1 and wrong.item() == pytest.approx(10)


@pytest.mark.rejects
def test_rejects_the_temperature_sign():
    """梯度反号：熵不停在目标 1.0，温度跑到截断值。"""
    q = randn(5)
    alpha, entropy = dual_descent(lambda la, lp: -sac_temperature_loss(la, lp, target_entropy=1.0), q)
    assert (alpha > 1e8 or alpha < 1e-8) and abs(entropy - 1.0) > 0.5


@pytest.mark.rejects
def test_rejects_plus_the_dimension_as_target():
    """(−1,1) 上每维的熵至多 log 2=0.693（均匀分布）；目标 +1 达不到，温度的梯度永远让它升。"""
    widest = -math.inf
    for std in (0.3, 0.6, 0.8, 0.9, 1.0, 1.3, 2.0, 4.0):
        u = torch.linspace(-10 * std, 10 * std, 20001, dtype=torch.float64)[:, None]
        zeros = torch.zeros_like(u)
        weights = Normal(tensor(0.0), tensor(std)).log_prob(u[:, 0]).exp() * (u[1] - u[0])
        log_probs = tanh_gaussian_log_prob(zeros, zeros + math.log(std), u)
        widest = max(widest, -(weights * log_probs).sum().item())
        log_alpha = tensor(0.0).requires_grad_()
        weighted = weights * log_probs * len(u)
        loss = sac_temperature_loss(log_alpha, weighted, target_entropy=1.0)
        assert torch.autograd.grad(loss, log_alpha)[0].item() < -0.3
    assert 0.66 < widest < math.log(2)


@pytest.mark.rejects
def test_rejects_uniform_reference_as_maximum_entropy_when_action_counts_differ():
    """「均匀参考就是最大熵」：每个状态差 α·log|A|，可用动作数不同时策略也不同。"""
    rewards = tensor([[0.0, 0.0, -math.inf, -math.inf], [1.0] + [-math.inf] * 3, [0.8] * 4])
    transitions = torch.zeros(3, 4, 3, dtype=torch.float64)
    transitions[0, 0, 1] = transitions[0, 1, 2] = 1
    ref = torch.zeros_like(rewards).masked_fill(rewards.isinf(), -math.inf).log_softmax(-1)
    q, _ = solve(rewards, transitions, alpha=0.3, gamma=1.0, sweeps=2)
    q_kl, _ = solve(rewards, transitions, alpha=0.3, gamma=1.0, ref_log_probs=ref, sweeps=2)
    wide = soft_policy_log_probs(q, alpha=0.3)[0, 1].exp().item()
    wide_kl = soft_policy_log_probs(q_kl, alpha=0.3, ref_log_probs=ref)[0, 1].exp().item()
    assert wide == pytest.approx(1 / (1 + math.exp(0.2 / 0.3 - math.log(4))))
    assert wide_kl == pytest.approx(1 / (1 + math.exp(0.2 / 0.3)))
    assert wide > 0.6 > 0.4 > wide_kl
