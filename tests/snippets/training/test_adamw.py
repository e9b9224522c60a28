"""Adam 与 AdamW 的真值：`torch.optim.Adam`、`torch.optim.AdamW`（torch 2.13，float64 逐步比参数与两个矩）、
用 `Fraction` 的手算、把指数滑动平均展开成显式加权和的闭式。错误写法定义在本文件末尾，断言它们被同一个真值拒绝。
"""

import re
from fractions import Fraction

import pytest
import torch

from snippets.training.adamw import adam_direction, adam_l2_step, adamw_step

DTYPE = torch.float64
NUM_STEPS = 7
# 互不相同、每一项都看得见的超参数
CASES = [
    {"lr": 3e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0},
    {"lr": 1e-2, "betas": (0.9, 0.95), "eps": 1e-3, "weight_decay": 0.1},
    {"lr": 0.5, "betas": (0.6, 0.7), "eps": 0.2, "weight_decay": 0.3},
    {"lr": 1e-3, "betas": (0.0, 0.99), "eps": 1e-12, "weight_decay": 5.0},
]
OPTIMIZERS = {adam_l2_step: torch.optim.Adam, adamw_step: torch.optim.AdamW}


def tensor(values):
    return torch.tensor(values, dtype=DTYPE)


def problem(seed=0, scale=None):
    """起点 (2, 3) 与逐步的梯度 (7, 2, 3)；三列的梯度大小相差很多。"""
    generator = torch.Generator().manual_seed(seed)
    start = torch.randn(2, 3, generator=generator, dtype=DTYPE)
    grads = torch.randn(NUM_STEPS, 2, 3, generator=generator, dtype=DTYPE)
    return start, grads * (tensor([1.0, 1e-2, 1e-5]) if scale is None else scale)


def ours(step_fn, start, grads, **options):
    """逐步的 (参数, 一阶矩, 二阶矩)。"""
    state = (start, torch.zeros_like(start), torch.zeros_like(start))
    history = []
    for step, grad in enumerate(grads, start=1):
        state = step_fn(state[0], grad, state[1], state[2], step=step, **options)
        history.append(state)
    return history


def torchs(optimizer_class, start, grads, **options):
    param = torch.nn.Parameter(start.clone())
    optimizer = optimizer_class([param], foreach=False, **options)
    history = []
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        state = optimizer.state[param]
        history.append((param.detach().clone(), state["exp_avg"].clone(), state["exp_avg_sq"].clone()))
    return history


def assert_same(actual, expected, rtol=1e-12):
    for left, right in zip(actual, expected, strict=True):
        for a, b in zip(left, right, strict=True):
            torch.testing.assert_close(a, b, rtol=rtol, atol=1e-15)


# ---- 手算 ----


def test_two_steps_by_hand():
    """θ=2，g=(3,−1)，β=(1/2,3/4)，ε=0，η=1/10，λ=1/5。

    m₁=3/2，m₂=1/4；v₁=9/4，v₂=3/4·9/4+1/4=31/16；校正后 m̂=(3, 1/3)，v̂=(9, 31/7)。
    AdamW：θ₁=2·(1−1/50)−1/10=1.86；θ₂=1.86·0.98−(1/10)(1/3)/√(31/7)。
    """
    m1 = Fraction(1, 2) * 3
    m2 = Fraction(1, 2) * m1 + Fraction(1, 2) * -1
    v1 = Fraction(1, 4) * 9
    v2 = Fraction(3, 4) * v1 + Fraction(1, 4) * 1
    assert (m2, v2) == (Fraction(1, 4), Fraction(31, 16))
    assert m2 / (1 - Fraction(1, 4)) == Fraction(1, 3) and v2 / (1 - Fraction(9, 16)) == Fraction(31, 7)
    history = ours(
        adamw_step,
        tensor([2.0]),
        tensor([[3.0], [-1.0]]),
        lr=0.1,
        betas=(0.5, 0.75),
        eps=0.0,
        weight_decay=0.2,
    )
    assert history[0][0].item() == pytest.approx(1.86, rel=1e-14)
    assert history[1][0].item() == pytest.approx(1.86 * 0.98 - 0.1 / 3 / (31 / 7) ** 0.5, rel=1e-14)
    assert [x.item() for x in history[1][1:]] == pytest.approx([0.25, 31 / 16], rel=1e-14)


def test_l2_step_by_hand():
    """θ=2，g=3，λ=1/5：g+λθ=3.4；第一步校正之后是 3.4/(3.4+ε)，ε=0.6 时恰是 0.85；两个矩里都有衰减。"""
    param, exp_avg, exp_avg_sq = adam_l2_step(
        tensor([2.0]),
        tensor([3.0]),
        tensor([0.0]),
        tensor([0.0]),
        step=1,
        lr=0.1,
        betas=(0.5, 0.75),
        eps=0.6,
        weight_decay=0.2,
    )
    assert param.item() == pytest.approx(2 - 0.1 * 0.85, rel=1e-14)
    assert exp_avg.item() == pytest.approx(1.7, rel=1e-14)
    assert exp_avg_sq.item() == pytest.approx(0.25 * 3.4**2, rel=1e-14)


def test_direction_is_a_ratio_of_weighted_averages():
    """展开滑动平均：m̂、v̂ 是 g、g² 的加权平均，权 β^(t−i)，i=1…t，权的和是 (1−β^t)/(1−β)。"""
    _, grads = problem()
    beta1, beta2, eps = 0.6, 0.9, 0.05
    exp_avg, exp_avg_sq = torch.zeros(2, 3, dtype=DTYPE), torch.zeros(2, 3, dtype=DTYPE)
    for t in range(1, NUM_STEPS + 1):
        update, exp_avg, exp_avg_sq = adam_direction(
            grads[t - 1], exp_avg, exp_avg_sq, step=t, betas=(beta1, beta2), eps=eps
        )
        w1 = tensor([beta1 ** (t - i) for i in range(1, t + 1)])
        w2 = tensor([beta2 ** (t - i) for i in range(1, t + 1)])
        mean = torch.einsum("i,ijk->jk", w1 / w1.sum(), grads[:t])
        mean_square = torch.einsum("i,ijk->jk", w2 / w2.sum(), grads[:t].square())
        torch.testing.assert_close(update, mean / (mean_square.sqrt() + eps), rtol=1e-12, atol=0)
        torch.testing.assert_close(exp_avg, (1 - beta1) * torch.einsum("i,ijk->jk", w1, grads[:t]))


# ---- 与 torch.optim 逐步相等 ----


@pytest.mark.parametrize("options", CASES)
@pytest.mark.parametrize("step_fn", OPTIMIZERS)
def test_matches_torch_step_by_step(step_fn, options):
    start, grads = problem()
    assert_same(ours(step_fn, start, grads, **options), torchs(OPTIMIZERS[step_fn], start, grads, **options))


@pytest.mark.parametrize("step_fn", OPTIMIZERS)
def test_defaults_are_those_of_torch(step_fn):
    """梯度约 1e-8，ε 与它同大，默认的 ε 差一点就看得出；70 步让两个 β 与衰减都看得出。"""
    start, grads = problem(scale=3e-8)
    grads = grads.repeat(10, 1, 1)
    assert_same(ours(step_fn, start, grads), torchs(OPTIMIZERS[step_fn], start, grads))


def test_direction_defaults():
    """默认 β=(0.9, 0.999)、ε=1e-8，在 ε 与梯度同大的输入上写死数值。"""
    grad, exp_avg, exp_avg_sq = tensor([2e-8]), tensor([1e-8]), tensor([4e-16])
    update, new_avg, new_sq = adam_direction(grad, exp_avg, exp_avg_sq, step=3)
    assert new_avg.item() == pytest.approx(1.1e-8, rel=1e-12)
    assert new_sq.item() == pytest.approx(0.999 * 4e-16 + 0.001 * 4e-16, rel=1e-12)
    mean, mean_square = 1.1e-8 / (1 - 0.729), 4e-16 / (1 - 0.997002999)
    assert update.item() == pytest.approx(mean / (mean_square**0.5 + 1e-8), rel=1e-9)
    other = adam_direction(tensor([1.0]), tensor([0.0]), tensor([0.0]), step=1)
    assert [x.item() for x in other[1:]] == pytest.approx([0.1, 0.001], rel=1e-12)


def test_adamw_is_torch_adam_with_the_decoupled_flag():
    start, grads = problem()
    options = CASES[2]
    expected = torchs(torch.optim.Adam, start, grads, decoupled_weight_decay=True, **options)
    assert_same(ours(adamw_step, start, grads, **options), expected)


def test_without_decay_the_three_are_one():
    start, grads = problem()
    adam = torchs(torch.optim.Adam, start, grads, lr=0.02)
    assert_same(ours(adam_l2_step, start, grads, lr=0.02), adam)
    assert_same(ours(adamw_step, start, grads, lr=0.02, weight_decay=0.0), adam)


# ---- 性质 ----


def test_paper_algorithm_2_is_a_change_of_lambda():
    """论文：θ ← θ − η_t(α·u + λ'θ)。令 lr=η_t·α、weight_decay=λ'/α，逐步相同，日程 η_t 每步都变。"""
    start, grads = problem()
    alpha, paper_decay = 0.05, 0.002
    schedule = [1.0, 0.9, 0.7, 0.5, 0.3, 0.2, 0.1]
    param, exp_avg, exp_avg_sq = start, torch.zeros_like(start), torch.zeros_like(start)
    paper, m, v = start, torch.zeros_like(start), torch.zeros_like(start)
    for t, (grad, eta) in enumerate(zip(grads, schedule, strict=True), start=1):
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad**2
        u = m / (1 - 0.9**t) / ((v / (1 - 0.999**t)).sqrt() + 1e-8)
        paper = paper - eta * (alpha * u + paper_decay * paper)
        param, exp_avg, exp_avg_sq = adamw_step(
            param, grad, exp_avg, exp_avg_sq, step=t, lr=eta * alpha, weight_decay=paper_decay / alpha
        )
    torch.testing.assert_close(param, paper, rtol=1e-12, atol=0)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_for_sgd_the_two_decays_agree_only_without_momentum(momentum):
    """SGD 的 weight_decay 是 L2；不带动量时与 (1−ηλ)θ−ηg 逐步相等，带动量就不等。"""
    start, grads = problem()
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.SGD([param], lr=0.1, momentum=momentum, weight_decay=0.3)
    manual, buffer = start, torch.zeros_like(start)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
        buffer = momentum * buffer + grad
        manual = (1 - 0.1 * 0.3) * manual - 0.1 * buffer
    gap = (param.detach() - manual).abs().max().item()
    assert gap < 1e-14 if momentum == 0 else gap > 0.05


def test_multiplying_the_loss_changes_only_the_l2_variant():
    """ε=0 时方向与梯度的正倍数无关，AdamW 的轨迹不变；Adam+L2 里衰减相对变小，轨迹变了。"""
    start, grads = problem()
    options = {"lr": 0.1, "eps": 0.0, "weight_decay": 0.5}
    for factor in (1e-3, 64.0):
        a, b = (ours(adamw_step, start, k * grads, **options)[-1][0] for k in (1.0, factor))
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)
        a, b = (ours(adam_l2_step, start, k * grads, **options)[-1][0] for k in (1.0, factor))
        assert (a - b).abs().max() > 0.05


def test_constant_gradient_moves_exactly_one_learning_rate():
    start = tensor([0.3, -0.4])
    grads = tensor([2.5, -1e-4]).repeat(50, 1)
    history = ours(adam_l2_step, start, grads, lr=0.01, eps=0.0)
    for step, (param, _, _) in enumerate(history, start=1):
        torch.testing.assert_close(param, start - 0.01 * step * tensor([1.0, -1.0]), rtol=1e-12, atol=1e-14)


def test_a_lone_gradient_moves_more_than_one_learning_rate():
    """之前全是 0，校正也已消失：方向是 (1−β₁)/√(1−β₂)=3.162，不是 1。"""
    zero = tensor([0.0])
    update, _, _ = adam_direction(tensor([7.0]), zero, zero, step=10**6, eps=0.0)
    assert update.item() == pytest.approx(0.1 / 0.001**0.5, rel=1e-9)


def test_zero_gradient_decay():
    """AdamW 每步恰乘 1−ηλ；Adam+L2 第一步恰走一个学习率，与 λ 的大小无关。"""
    zeros = torch.zeros(20, 1, dtype=DTYPE)
    for param, expected in zip(
        ours(adamw_step, tensor([2.0]), zeros, lr=0.1, weight_decay=0.3),
        [2 * 0.97 ** (t + 1) for t in range(20)],
        strict=True,
    ):
        assert param[0].item() == pytest.approx(expected, rel=1e-13)
    for decay in (1e-3, 10.0):
        first = ours(adam_l2_step, tensor([2.0]), zeros[:1], lr=0.1, eps=0.0, weight_decay=decay)[0][0]
        assert first.item() == pytest.approx(1.9, rel=1e-13)


def test_decay_rate_under_noise():
    """零均值噪声、标准差 σ≫λθ：Adam+L2 每步约衰减 ηλ/σ，AdamW 是 ηλ；1000 步、σ=(1, 5)。"""
    generator = torch.Generator().manual_seed(0)
    std = tensor([1.0, 5.0])[:, None]
    noise = std * torch.randn(1000, 2, 400, generator=generator, dtype=DTYPE)
    start = torch.ones(2, 400, dtype=DTYPE)
    options = {"lr": 1e-3, "weight_decay": 0.3}
    l2 = ours(adam_l2_step, start, noise, **options)[-1][0].mean(1)
    decoupled = ours(adamw_step, start, noise, **options)[-1][0].mean(1)
    # 400 份的均值，标准误差约 0.002；容差再放宽给 v̂ 里 (λθ)² 的那一份
    torch.testing.assert_close(l2, torch.exp(-0.3 / std[:, 0]), rtol=0, atol=0.02)
    torch.testing.assert_close(decoupled, torch.full((2,), 0.74, dtype=DTYPE), rtol=0, atol=0.01)


def test_fixed_points_without_noise():
    """损失 (θ−a)²/2，λ=1/2：Adam+L2 停在 a/(1+λ)；AdamW 停在 a，但不超过 1/λ=2。"""
    target = tensor([1.0, 6.0])
    ends = {}
    for step_fn in OPTIMIZERS:
        state = (torch.zeros(2, dtype=DTYPE),) * 3
        for step in range(1, 1501):
            state = step_fn(
                state[0],
                state[0] - target,
                state[1],
                state[2],
                step=step,
                lr=0.02,
                betas=(0.9, 0.95),
                weight_decay=0.5,
            )
        ends[step_fn] = state[0]
    torch.testing.assert_close(ends[adam_l2_step], target / 1.5, rtol=0, atol=0.01)
    torch.testing.assert_close(ends[adamw_step], tensor([1.0, 2.0]), rtol=0, atol=0.01)


# ---- 边界 ----


@pytest.mark.parametrize("step_fn", OPTIMIZERS)
@pytest.mark.parametrize("step", [0, -1])
def test_steps_count_from_one(step_fn, step):
    ones = tensor([1.0])
    message = f"^step={step}：步数从 1 数起，否则偏差校正的分母是 0。$"
    with pytest.raises(ValueError, match=message):
        step_fn(ones, ones, ones, ones, step=step)


@pytest.mark.parametrize("step_fn", OPTIMIZERS)
def test_inputs_are_not_modified(step_fn):
    inputs = [tensor([1.0, -2.0]), tensor([0.5, 0.25]), tensor([0.1, 0.2]), tensor([0.3, 0.4])]
    copies = [x.clone() for x in inputs]
    step_fn(*inputs, step=2, weight_decay=0.1)
    assert all(torch.equal(a, b) for a, b in zip(inputs, copies, strict=True))


def test_the_dtype_is_kept_and_bf16_states_stall():
    """bf16 的 1 附近下方间隔 2⁻⁸：v 从 1 向 0.25，每步少 0.00075，不到半格，一直是 1；float32 是 0.25+0.75·0.999^t。"""
    for dtype, expected in ((torch.float32, 0.25 + 0.75 * 0.999**400), (torch.bfloat16, 1.0)):
        exp_avg_sq = torch.ones(1, dtype=dtype)
        for _ in range(400):
            update, _, exp_avg_sq = adam_direction(
                torch.full((1,), 0.5, dtype=dtype), torch.ones(1, dtype=dtype), exp_avg_sq, step=400
            )
        assert update.dtype == exp_avg_sq.dtype == dtype
        assert exp_avg_sq.item() == pytest.approx(expected, rel=1e-4)
    assert torch.tensor(1e-8, dtype=torch.float16) == 0 < torch.tensor(1e-8, dtype=torch.bfloat16)


def test_amsgrad_keeps_one_more_state_and_muon_one_less():
    """页面的状态个数：AMSGrad 多一份最大值，Muon 只有一份动量、只收矩阵。"""
    param = torch.nn.Parameter(torch.ones(2, 3))
    counts = {}
    for name, make in {
        "adam": lambda: torch.optim.AdamW([param]),
        "amsgrad": lambda: torch.optim.AdamW([param], amsgrad=True),
        "muon": lambda: torch.optim.Muon([param]),
    }.items():
        optimizer = make()
        param.grad = torch.ones(2, 3)
        optimizer.step()
        counts[name] = sum(x.numel() == 6 for x in optimizer.state[param].values())
    assert counts == {"adam": 2, "amsgrad": 3, "muon": 1}
    with pytest.raises(ValueError, match=re.compile("2D", re.IGNORECASE)):
        torch.optim.Muon([torch.nn.Parameter(torch.ones(3))])


# ---- 流传的错误写法：同一个真值拒绝它们 ----


def final_gap(rule):
    """rule(θ, g, m, v, t) → (θ, m, v)；与 torch.optim.AdamW 七步后的最大差。"""
    start, grads = problem()
    options = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    truth = torchs(torch.optim.AdamW, start, grads, **options)[-1][0]
    state = (start, torch.zeros_like(start), torch.zeros_like(start))
    for step, grad in enumerate(grads, start=1):
        state = rule(state[0], grad, state[1], state[2], step)
    return (state[0] - truth).abs().max().item()


def variant(*, shift=0, inside=False, correct=True, decay="before"):
    def rule(p, g, m, v, t):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        c1, c2 = (1 - 0.9 ** (t + shift), 1 - 0.99 ** (t + shift)) if correct else (1.0, 1.0)
        u = m / c1 / ((v / c2 + 1e-6).sqrt() if inside else (v / c2).sqrt() + 1e-6)
        new = {
            "before": (1 - 0.01 * 0.1) * p - 0.01 * u,
            "after-old": p - 0.01 * u - 0.01 * 0.1 * p,
            "after-new": (1 - 0.01 * 0.1) * (p - 0.01 * u),
            "no-lr": (1 - 0.1) * p - 0.01 * u,
        }[decay]
        return new, m, v

    return rule


def test_the_two_right_orders_are_the_same():
    assert final_gap(variant()) < 1e-14
    assert final_gap(variant(decay="after-old")) < 1e-14  # 作者的 Lua 代码存了旧权重
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    assert final_gap(lambda p, g, m, v, t: adamw_step(p, g, m, v, step=t, **settings)) < 1e-14


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("wrong", "margin"),
    [
        ({"shift": 1}, 1e-3),  # 步数差一
        ({"inside": True}, 1e-2),  # ε 在根号内
        ({"correct": False}, 1e-2),  # 不做偏差校正
        ({"decay": "no-lr"}, 0.1),  # 衰减不乘学习率
        ({"decay": "after-new"}, 1e-5),  # 衰减用更新之后的权重：差 η²λu，一步约 1e-5
    ],
)
def test_rejects(wrong, margin):
    assert final_gap(variant(**wrong)) > margin


@pytest.mark.rejects
def test_rejects_decay_through_the_gradient():
    settings = {"lr": 0.01, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
    assert final_gap(lambda p, g, m, v, t: adam_l2_step(p, g, m, v, step=t, **settings)) > 1e-2


@pytest.mark.rejects
def test_rejects_epsilon_before_the_correction():
    """ε 加在没有校正的 √v 上（论文 §2 末的等价写法用的是另一个 ε̂）：等于把 ε 放大 1/√(1−β₂^t)。"""

    def hat(p, g, m, v, t):
        m, v = 0.9 * m + 0.1 * g, 0.99 * v + 0.01 * g**2
        size = 0.01 * (1 - 0.99**t) ** 0.5 / (1 - 0.9**t)
        return (1 - 0.01 * 0.1) * p - size * m / (v.sqrt() + 1e-6), m, v

    assert final_gap(hat) > 1e-3


@pytest.mark.rejects
def test_rejects_the_sum_up_to_t():
    """「Σ_{i=0}^{t} β^i=(1−β^t)/(1−β)」：多一项；滑动平均里恰有 t 个梯度，权的和由恒定梯度量出。"""
    beta, t = 0.9, 5
    exp_avg = tensor([0.0])
    for step in range(1, t + 1):
        _, exp_avg, _ = adam_direction(tensor([1.0]), exp_avg, exp_avg, step=step)
    assert exp_avg.item() / (1 - beta) == pytest.approx(sum(beta**i for i in range(t)), rel=1e-13)
    assert sum(beta**i for i in range(t + 1)) - exp_avg.item() / (1 - beta) == pytest.approx(0.59049)
