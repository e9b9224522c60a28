# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Adam 与 AdamW：实验
#
# 页面 `docs/training/adamw.md` 的实验：偏差校正、衰减的快慢、停在哪里、各种错误写法与 `torch.optim` 的差，以及 bf16 的状态为什么会停住。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.training.adamw import adam_direction, adam_l2_step, adamw_step
from snippets.training.memory import model_state_bytes

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
assert model_state_bytes(1) == 16 and model_state_bytes(1, optimizer_bytes=0) == 8


def run(step_fn, param, gradient, *, num_steps, **options):
    """从零状态跑 num_steps 步，返回每一步之后的参数；gradient(参数) 给出这一步的梯度。"""
    exp_avg, exp_avg_sq = torch.zeros_like(param), torch.zeros_like(param)
    for step in range(1, num_steps + 1):
        param, exp_avg, exp_avg_sq = step_fn(
            param, gradient(param), exp_avg, exp_avg_sq, step=step, **options
        )
        yield param


def last(trajectory):
    *_, param = trajectory
    return param


# %%
#| label: bias-correction
#| caption: 梯度恒为 1 时每一步的更新量，以学习率为单位：有偏差校正恒为 1，没有时第一步就不对，第二个衰减率 0.999 时先涨到 6.57 倍
#| echo: fold
one, num_steps = torch.ones(1), 100
steps = range(1, num_steps + 1)
raw, corrected = {}, {}
for beta2 in (0.999, 0.95):
    exp_avg, exp_avg_sq = torch.zeros(1), torch.zeros(1)
    raw[beta2], corrected[beta2] = [], []
    for step in steps:
        update, exp_avg, exp_avg_sq = adam_direction(
            one, exp_avg, exp_avg_sq, step=step, betas=(0.9, beta2), eps=0.0
        )
        raw[beta2].append((exp_avg / exp_avg_sq.sqrt()).item())
        corrected[beta2].append(update.item())
fig, ax = plt.subplots(figsize=(6.0, 3.4))
ax.plot(steps, raw[0.999], "-", color="C0", label="不校正，β2=0.999")
ax.plot(steps, raw[0.95], "--", color="C1", label="不校正，β2=0.95")
ax.plot(steps, corrected[0.999], ":", color="C2", linewidth=2.5, label="有校正")
ax.set_xlabel("步数")
ax.set_ylabel("更新量 / 学习率")
ax.set_ylim(0, 7.2)
ax.legend(frameon=False)
assert all(abs(u - 1) < 1e-12 for us in corrected.values() for u in us)
assert f"{raw[0.999][0]:.2f} {raw[0.95][0]:.3f}" == "3.16 0.447"
assert f"{max(raw[0.999]):.2f}" == "6.57" and raw[0.999].index(max(raw[0.999])) + 1 == 12
assert f"{raw[0.999][-1]:.2f}" == "3.24" and max(raw[0.95]) < 1.1
# 求和的上限：权重之和恰是 1 - β^t；上限写成 t 就多一项
beta, t = 0.9, 5
right, wrong = sum(beta**k for k in range(t)), sum(beta**k for k in range(t + 1))
assert f"{right:.3f} {wrong:.3f}" == "4.095 4.686" and abs(right - (1 - beta**t) / (1 - beta)) < 1e-12
# 半衰期（步）
assert [f"{math.log(0.5) / math.log(b):.1f}" for b in (0.95, 0.999)] == ["13.5", "692.8"]
# 第一步几乎只看符号；长期为零之后来一个梯度，一步超过学习率
for g, expected in ((1e-6, "0.990"), (1e4, "1.000")):
    assert f"{adam_direction(torch.tensor([g]), 0 * one, 0 * one, step=1)[0].item():.3f}" == expected
assert f"{adam_direction(one, 0 * one, 0 * one, step=10**6)[0].item():.2f}" == "3.16"
# 零均值噪声：方向的均方根约 sqrt((1-β1)/(1+β1))
generator = torch.Generator().manual_seed(0)
mean, mean_square = torch.zeros(4000), torch.zeros(4000)
for step in range(1, 201):
    noise = torch.randn(4000, generator=generator)
    update, mean, mean_square = adam_direction(noise, mean, mean_square, step=step)
assert abs(update.square().mean().sqrt().item() - math.sqrt(0.1 / 1.9)) < 0.01
assert f"{math.sqrt(0.1 / 1.9):.2f}" == "0.23"

# %%
#| label: decay-rates
#| caption: 梯度是零均值噪声，权重从 1 出发走 2000 步，200 份的均值：Adam+L2 的衰减随噪声大小变，AdamW 不变
#| echo: fold
STD = torch.tensor([0.01, 0.1, 1.0, 10.0])[:, None]


def decayed(step_fn):
    generator = torch.Generator().manual_seed(0)
    param = torch.ones(4, 200)
    noise = lambda p: STD * torch.randn(p.shape, generator=generator)  # noqa: E731
    return last(run(step_fn, param, noise, num_steps=2000, lr=1e-3, weight_decay=0.1)).mean(1)


l2, decoupled = decayed(adam_l2_step), decayed(adamw_step)
rows = [
    [f"{s:g}", f"{a:.2f}", f"{math.exp(-0.2 / s):.2f}", f"{b:.2f}", f"{(1 - 1e-4) ** 2000:.2f}"]
    for s, a, b in zip(STD[:, 0].tolist(), l2.tolist(), decoupled.tolist(), strict=True)
]
assert [row[1] for row in rows] == ["0.02", "0.19", "0.82", "0.98"]
assert [row[3] for row in rows] == ["0.82"] * 4
# 梯度恒为零：Adam+L2 变成每步走一个学习率的符号下降
zero = lambda p: torch.zeros_like(p)  # noqa: E731
still_l2, *others = (
    last(run(adam_l2_step, torch.ones(1), zero, num_steps=100, weight_decay=decay)).item()
    for decay in (0.1, 1e-3, 10.0)
)
assert all(abs(other - still_l2) < 1e-5 for other in others)
still_w = last(run(adamw_step, torch.ones(1), zero, num_steps=100, weight_decay=0.1)).item()
assert f"{still_l2:.3f} {still_w:.3f}" == "0.902 0.990"
Markdown(
    tabulate(
        rows,
        headers=["噪声标准差", "Adam+L2", "预测", "AdamW", "预测"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: fixed-points
#| caption: 最小点在 1 的二次损失加噪声，最后停在哪里：Adam+L2 与噪声无关但随损失的倍数变，AdamW 随噪声变但与损失的倍数无关；线是推导的预测
#| echo: fold
SIGMA = torch.tensor([0.1, 0.3, 1.0, 3.0, 10.0])[:, None]


def resting_point(step_fn, scale):
    """损失 scale·(θ-1)²/2，梯度噪声 scale·SIGMA；后一半步数的平均。"""
    generator = torch.Generator().manual_seed(1)
    gradient = lambda p: scale * (p - 1 + SIGMA * torch.randn(p.shape, generator=generator))  # noqa: E731
    trajectory = run(step_fn, torch.ones(5, 200), gradient, num_steps=3000, lr=1e-2, weight_decay=0.1)
    return torch.stack([p.mean(1) for p in trajectory])[1500:].mean(0)


axis = torch.logspace(-1, 1, 50)
fig, ax = plt.subplots(figsize=(6.0, 3.6))
ax.plot(axis, torch.full_like(axis, 1 / 1.1), "--", color="C0")
ax.plot(axis, torch.full_like(axis, 1 / 1.001), ":", color="C0")
ax.plot(axis, 1 / (1 + 0.1 * axis), "-", color="C1")
points = {}
for name, step_fn, scale, marker, color in (
    ("Adam+L2", adam_l2_step, 1.0, "o", "C0"),
    ("Adam+L2，损失乘 100", adam_l2_step, 100.0, "^", "C0"),
    ("AdamW", adamw_step, 1.0, "s", "C1"),
    ("AdamW，损失乘 100", adamw_step, 100.0, "x", "C2"),
):
    points[name] = resting_point(step_fn, scale)
    ax.plot(SIGMA[:, 0], points[name], marker, color=color, label=name, markersize=8)
ax.set_xscale("log")
ax.set_ylim(0.4, 1.05)
ax.set_xlabel("梯度噪声的标准差")
ax.set_ylabel("停下的位置")
ax.legend(frameon=False, loc="lower left")
assert (points["Adam+L2"] - 1 / 1.1).abs().max() < 0.03
assert (points["Adam+L2，损失乘 100"] - 1 / 1.001).abs().max() < 0.03
assert (points["AdamW"] - 1 / (1 + 0.1 * SIGMA[:, 0])).abs().max() < 0.03
assert (points["AdamW"] - points["AdamW，损失乘 100"]).abs().max() < 1e-5
# 没有噪声：AdamW 只保证不超过 1/λ=10，Adam+L2 停在 L2 的解
target = torch.tensor([5.0, 20.0])
options = {"num_steps": 3000, "lr": 0.05, "betas": (0.9, 0.95), "weight_decay": 0.1}
exact_l2 = last(run(adam_l2_step, torch.zeros(2), lambda p: p - target, **options))
exact_w = last(run(adamw_step, torch.zeros(2), lambda p: p - target, **options))
assert (exact_l2 - torch.tensor([4.55, 18.18])).abs().max() < 0.02
assert (exact_w - torch.tensor([5.0, 10.0])).abs().max() < 0.02

# %%
#| label: wrong-versions
#| caption: 五步之后总位移与 torch.optim.AdamW 的相对误差，三个坐标的梯度大小相差十万倍
#| echo: fold
generator = torch.Generator().manual_seed(0)
start = torch.tensor([1.0, -2.0, 3.0])
grads = torch.randn(5, 3, generator=generator) * torch.tensor([1.0, 1e-2, 1e-5])
LR, DECAY = 1e-2, 0.1


def oracle():
    param = torch.nn.Parameter(start.clone())
    optimizer = torch.optim.AdamW([param], lr=LR, weight_decay=DECAY)
    for grad in grads:
        param.grad = grad.clone()
        optimizer.step()
    return param.detach() - start


def displacement(rule):
    """rule(θ, u, m, v, t) → 新的 θ；u 是校正过的方向。"""
    param, exp_avg, exp_avg_sq = start, torch.zeros(3), torch.zeros(3)
    for step, grad in enumerate(grads, start=1):
        update, exp_avg, exp_avg_sq = adam_direction(grad, exp_avg, exp_avg_sq, step=step)
        param = rule(param, update, exp_avg, exp_avg_sq, step)
    return param - start


def shrink(param):
    return (1 - LR * DECAY) * param


def off_by_one(p, u, m, v, t):
    return shrink(p) - LR * m / (1 - 0.9 ** (t + 1)) / ((v / (1 - 0.999 ** (t + 1))).sqrt() + 1e-8)


def eps_inside(p, u, m, v, t):
    return shrink(p) - LR * m / (1 - 0.9**t) / (v / (1 - 0.999**t) + 1e-8).sqrt()


truth = oracle()
order = iter(grads)
results = {
    "adamw_step": last(run(adamw_step, start, lambda p: next(order), num_steps=5, lr=LR, weight_decay=DECAY))
    - start,
    "先更新，衰减量用旧权重": displacement(lambda p, u, m, v, t: p - LR * u - LR * DECAY * p),
    "先更新，衰减量用新权重": displacement(lambda p, u, m, v, t: shrink(p - LR * u)),
    "衰减不乘学习率": displacement(lambda p, u, m, v, t: (1 - DECAY) * p - LR * u),
    "步数从 2 数起": displacement(off_by_one),
    "ε 在根号内": displacement(eps_inside),
    "不做偏差校正": displacement(lambda p, u, m, v, t: shrink(p) - LR * m / (v.sqrt() + 1e-8)),
}
order = iter(grads)
results["衰减加进梯度"] = (
    last(run(adam_l2_step, start, lambda p: next(order), num_steps=5, lr=LR, weight_decay=DECAY)) - start
)
errors = {name: ((value - truth).norm() / truth.norm()).item() for name, value in results.items()}
assert errors["adamw_step"] < 1e-12 and errors["先更新，衰减量用旧权重"] < 1e-12
assert 1e-4 < errors["先更新，衰减量用新权重"] < 1e-2
assert all(error > 0.1 for error in list(errors.values())[3:])
rows = [[name, "0" if error < 1e-12 else f"{error:.3g}"] for name, error in errors.items()]
assert [row[1] for row in rows] == ["0", "0", "0.00102", "26.1", "0.145", "0.614", "3.47", "1.37"]
Markdown(tabulate(rows, headers=["写法", "相对误差"], tablefmt="github", disable_numparse=True))

# %%
#| label: lr-and-decay
#| caption: 梯度为零、1000 步之后权重还剩多少：PyTorch 的写法随学习率变，论文的写法不变
#| echo: fold
rows = []
for name, decay in (("PyTorch，λ=0.1", lambda lr: 0.1), ("论文，每步减 0.001", lambda lr: 1e-3 / lr)):
    left = [
        last(run(adamw_step, torch.ones(1), zero, num_steps=1000, lr=lr, weight_decay=decay(lr))).item()
        for lr in (1e-2, 1e-3)
    ]
    rows.append([name, *(f"{x:.3f}" for x in left)])
assert [row[1:] for row in rows] == [["0.368", "0.905"], ["0.368", "0.368"]]
assert abs(3e-4 * 0.1 - 3e-5) < 1e-18 and round(1 / 3e-5) == 33333
Markdown(
    tabulate(
        rows,
        headers=["写法", "学习率 0.01", "学习率 0.001"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: low-precision-states
#| caption: 同样的更新换成 bf16 存储：二阶矩停在 1，权重一步也没有动
#| echo: fold
rows = []
for name, dtype in (("float32", torch.float32), ("bf16", torch.bfloat16)):
    moment = mean = torch.ones(1, dtype=dtype)
    half = torch.full((1,), 0.5, dtype=dtype)
    for _ in range(1000):
        _, mean, moment = adam_direction(half, mean, moment, step=1000)
    weight = last(
        run(
            adamw_step,
            torch.ones(1, dtype=dtype),
            torch.ones_like,
            num_steps=100,
            lr=1e-3,
            weight_decay=0.0,
        )
    )
    rows.append([name, f"{moment.item():.3f}", f"{weight.item():.3f}"])
assert rows == [["float32", "0.526", "0.900"], ["bf16", "1.000", "1.000"]]
# 第二个衰减率 0.95 时每步走差距的 5%，远大于半格，bf16 也跟得上
mean = moment = torch.ones(1, dtype=torch.bfloat16)
for _ in range(1000):
    _, mean, moment = adam_direction(half, mean, moment, step=1000, betas=(0.9, 0.95))
assert f"{moment.item():.3f}" == "0.262"
assert torch.tensor(1e-8, dtype=torch.float16) == 0 and torch.tensor(1e-8, dtype=torch.bfloat16) > 0
Markdown(
    tabulate(
        rows,
        headers=["存储", "二阶矩（应到 0.526）", "权重（应到 0.900）"],
        tablefmt="github",
        disable_numparse=True,
    )
)
