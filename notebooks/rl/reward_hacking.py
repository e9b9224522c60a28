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
# # reward hacking（奖励欺骗）怎么解决：实验
#
# 页面 `docs/rl/reward-hacking.md` 的实验：代理奖励等于真实奖励加误差，误差的尾巴、KL、集成与规则门各改变什么。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch.distributions import Normal, StudentT

from snippets.rl.dpo import kl_regularized_optimum
from snippets.rl.post_training import best_of_n_policy
from snippets.rl.reward_hacking import (
    adaptive_kl_coef,
    best_of_n_kl_bound,
    best_of_n_mean,
    ensemble_reward,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
DEGREES = 2.5  # t 分布的自由度：方差有限，尾巴是幂律
ERRORS = {"高斯": Normal(0.0, 1.0), "重尾": StudentT(DEGREES)}
SEEDS = 6


def conditional_gold(error):
    """代理奖励 r 的网格、每格的概率、E[真实奖励 | r]；真实奖励是 N(0,1)，对它数值积分。"""
    steps = torch.linspace(-9.9, 9.9, 3001)
    proxy, width = steps.sinh(), steps.cosh() * (steps[1] - steps[0])  # 两端到 ±1e4
    gold = torch.linspace(-8, 8, 401)
    weight = (error.log_prob(proxy[:, None] - gold) + Normal(0.0, 1.0).log_prob(gold)).exp()
    density = weight.sum(1)
    mean = (weight * gold).sum(1) / density.clamp(min=1e-300)
    mass = density * (gold[1] - gold[0]) * width
    assert abs(mass.sum().item() - 1) < 1e-6
    return proxy, mass, mean


worlds = {name: conditional_gold(error) for name, error in ERRORS.items()}


def selected(world, n):
    """best-of-n 之后的（代理奖励，真实奖励）期望，数值积分，没有抽样误差。"""
    proxy, mass, mean = world
    above = mass.flip(0).cumsum(0).flip(0) - mass  # P(代理更高)：从尾部累加，n 上亿也不丢精度
    top = (n * torch.log1p(-above.clamp(max=1 - 1e-16))).exp().diff(prepend=torch.zeros(1))
    return (top * proxy).sum().item(), (top * mean).sum().item()


def student_t(*shape, generator):
    chi2 = 2 * torch._standard_gamma(torch.full(shape, DEGREES / 2), generator=generator)
    return torch.randn(*shape, generator=generator) / (chi2 / DEGREES).sqrt()


class MinOfFour:
    """四个独立 t 误差的最小值：密度 4·f·S³，S 是 P(e > x) 的数值积分；尾指数 10，仍是幂律。"""

    def __init__(self):
        self.grid = torch.linspace(-12, 12, 40001)
        log_density = ERRORS["重尾"].log_prob(self.grid.sinh())
        mass = log_density.exp() * self.grid.cosh() * (self.grid[1] - self.grid[0])
        survival = mass.flip(0).cumsum(0).flip(0) - mass / 2
        self.log_density = math.log(4) + log_density + 3 * survival.log()

    def log_prob(self, x):
        return torch.from_numpy(np.interp(x.asinh().numpy(), self.grid.numpy(), self.log_density.numpy()))


# 自适应 KL：KL 是目标的 10 倍，每批 1024 条，系数翻倍要 35 批
coef = [1.0]
for _ in range(35):
    coef.append(adaptive_kl_coef(coef[-1], 1.0, target_kl=0.1, num_samples=1024))
assert coef[34] < 2 < coef[35]

# %%
#| label: best-of-n-goodhart
#| caption: 按代理奖励做 best-of-n：误差是高斯时真实奖励一直升，误差重尾时在 n 为 16 附近到顶，之后跌向起点，代理奖励却越升越快
#| echo: fold
ns = [2**i for i in range(15)]
kl = [best_of_n_kl_bound(n) for n in ns]
curves = {name: [selected(world, n) for n in ns] for name, world in worlds.items()}

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.2), layout="constrained")
for name, color, style in [("高斯", "C0", "-"), ("重尾", "C1", "--")]:
    proxy, gold = zip(*curves[name], strict=True)
    axes[0].plot(kl, gold, style, color=color, marker="o", markersize=3)
    axes[1].plot(kl, proxy, style, color=color, marker="o", markersize=3)
axes[0].text(4.6, 2.35, "高斯误差", color="C0", ha="right")
axes[0].text(4.4, 0.62, "重尾误差", color="C1", ha="left")
axes[1].text(8.2, 9.0, "高斯误差", color="C0", ha="right")
axes[1].text(6.0, 40.0, "重尾误差", color="C1", ha="right")
axes[0].set_title("真实奖励")
axes[1].set_title("代理奖励")
for ax in axes:
    ax.set_xlabel("KL（nat）")

gaussian, heavy = dict(zip(ns, curves["高斯"], strict=True)), dict(zip(ns, curves["重尾"], strict=True))
assert all(abs(g / p - 0.5) < 1e-6 for p, g in curves["高斯"][1:])  # 等方差：恰好一半
assert max(heavy, key=lambda n: heavy[n][1]) == 16
assert f"{heavy[16][1]:.2f} {heavy[1024][1]:.2f} {heavy[16384][1]:.2f}" == "0.79 0.22 0.07"
assert f"{heavy[16][0]:.1f} {heavy[1024][0]:.1f} {heavy[16384][0]:.1f}" == "4.1 20.9 63.3"
assert f"{gaussian[16][1]:.2f} {gaussian[1024][1]:.2f} {gaussian[16384][1]:.2f}" == "1.25 2.30 2.81"
assert f"{best_of_n_kl_bound(16):.2f} {best_of_n_kl_bound(1024):.2f}" == "1.84 5.93"
# 独立的一条路：抽出来的 20 万个答案上 best-of-n，多个种子
for name in ERRORS:
    sampled = []
    for seed in range(SEEDS):
        generator = torch.Generator().manual_seed(seed)
        gold = torch.randn(200_000, generator=generator)
        noise = torch.randn if name == "高斯" else student_t
        sampled.append(best_of_n_mean(gold + noise(200_000, generator=generator), gold, n=64).item())
    sampled = torch.tensor(sampled)
    exact = selected(worlds[name], 64)[1]
    assert abs(sampled.mean() - exact) < 4 * sampled.std() / math.sqrt(SEEDS) and sampled.std() < 0.03
small = torch.randn(40, generator=torch.Generator().manual_seed(1))
policy = best_of_n_policy(torch.full((40,), 1 / 40), small, n=5)
assert abs(policy @ small.square() - best_of_n_mean(small, small.square(), n=5)) < 1e-12

# %%
#| label: kl-same-curve
#| caption: 对有长度偏好的代理奖励做优化：不加 KL 早停、加 KL 收敛，落在同一条先升后降的曲线上；普通梯度走的是另一条路
#| echo: fold
axis = torch.linspace(-9, 9, 73)
quality, length = (grid.flatten() for grid in torch.meshgrid(axis, axis, indexing="ij"))
ref = (-(quality.square() + length.square()) / 2).log_softmax(0)  # 质量与长度：独立的标准正态
proxy = quality + length  # 奖励模型：越长越好
gold = quality + 0.5 * length - 0.5 * length.square()  # 真的：长到 0.5 之后变差
gold = gold - ref.exp() @ gold  # 参考策略记为 0


def measure(log_probs):
    probs = log_probs.exp()
    return (probs @ (log_probs - ref)).item(), (probs @ gold).item(), (probs @ proxy).item()


def natural_gradient(*, beta, lr=0.01, steps):
    """自然策略梯度：log π 每步加 lr·(r − β·log(π/π_ref))，再归一化。"""
    log_probs = ref.clone()
    for _ in range(steps):
        log_probs = (log_probs + lr * (proxy - beta * (log_probs - ref))).log_softmax(0)
    return log_probs


def gibbs(beta):
    return kl_regularized_optimum(ref[None], proxy[None], beta=beta)[0][0]


strengths = [3.2 * i / 60 for i in range(1, 61)]  # 1/β
frontier = [(0.0, 0.0, 0.0)] + [measure(gibbs(1 / s)) for s in strengths]
for s, (d2, g, _) in zip(strengths, frontier[1:], strict=True):  # 闭式：KL = d²，真实 = d(1.5 − 0.5d)
    assert abs(d2 - s**2) < 1e-3 and abs(g - s * (1.5 - 0.5 * s)) < 1e-3

early, late = natural_gradient(beta=0.0, steps=150), natural_gradient(beta=0.0, steps=300)
for stopped, beta in ((early, 1 / 1.5), (late, 1 / 3)):  # 不加 KL、第 t 步停下，恰是 β = 1/(t·lr)
    assert (stopped - gibbs(beta)).exp().sub(1).abs().max() < 1e-9
penalised = natural_gradient(beta=1 / 1.5, steps=3000)  # 加 KL、走到收敛，是同一个策略
assert (penalised - early).exp().sub(1).abs().max() < 1e-6
halfway = natural_gradient(beta=1 / 1.5, steps=100)  # 半路上也在这条线上，只是 1/β 更小
strength = 1.5 * (1 - (1 - 0.01 / 1.5) ** 100)
assert (halfway - gibbs(1 / strength)).exp().sub(1).abs().max() < 1e-9

logits, plain = ref.clone(), []  # 普通的 softmax 梯度
for step in range(1, 6001):
    probs = logits.softmax(0)
    logits = logits + 0.5 * probs * (proxy - probs @ proxy)
    if step % (10 if step < 400 else 80) == 0:
        plain.append(measure(logits.log_softmax(0)))

fig, ax = plt.subplots(figsize=(6.0, 3.4), layout="constrained")
ax.plot([p[0] for p in frontier], [p[1] for p in frontier], color="C0", label="带 KL 的最优策略，β 从大到小")
ax.plot([p[0] for p in plain], [p[1] for p in plain], ":", color="C2", label="普通梯度，不加 KL")
for point, marker, color, label in [
    (early, "s", "C1", "自然梯度，不加 KL，第 150 步停"),
    (penalised, "+", "C3", "自然梯度，β 为 0.67，收敛"),
    (late, "^", "C1", "自然梯度，不加 KL，第 300 步"),
]:
    x, y, _ = measure(point)
    ax.plot(
        [x], [y], marker, color=color, markersize=12 if marker == "+" else 7, label=label, linestyle="none"
    )
ax.set_xlim(0, 10.3)
ax.set_ylim(-0.45, 1.9)
ax.set_xlabel("到参考策略的 KL（nat）")
ax.set_ylabel("真实奖励（参考为 0）")
ax.legend(loc="upper right", frameon=False, ncols=1, fontsize=10)


peak, far, detour = measure(early), measure(late), plain[-1]
assert [f"{v:.3f}" for v in peak[:2]] == ["2.250", "1.125"]
assert abs(far[0] - 9) < 1e-3 and abs(far[1]) < 1e-3
assert max(g for _, g, _ in frontier) < 1.1255  # 线上的最高点就是 d = 1.5
assert [f"{v:.2f}" for v in detour] == ["4.68", "1.42", "1.75"]
same_kl = measure(gibbs(1 / math.sqrt(detour[0])))  # 同样的 KL，最优线上的点
assert abs(same_kl[0] - detour[0]) < 1e-3
assert [f"{v:.2f}" for v in same_kl[1:]] == ["0.90", "4.33"]

# %%
#| label: mitigations
#| caption: 重尾误差下各种做法在 best-of-n 之后的真实奖励，六个种子的均值，标准误不超过 0.04；误差独立时取最小与按分歧扣分在这三列里最高，误差共有时取最小与单个相差无几
#| echo: fold
SIZE, DRAWS = 100_000, (16, 64, 1024)


def schemes(seed):
    """每种做法用来挑选的分数；真实奖励 gold 是 N(0,1)，误差是 t 分布。"""
    generator = torch.Generator().manual_seed(seed)
    gold = torch.randn(SIZE, generator=generator)
    errors = student_t(4, SIZE, generator=generator)
    common = student_t(SIZE, generator=generator)
    luck = torch.rand(SIZE, generator=generator)
    single, four = gold + errors[0], gold + errors
    passed = torch.where(gold > 0, luck < 0.9, luck < 0.05)  # 规则：漏判 0.1，误判 0.05
    scores = {"单个 RM": single, "误差减半": gold + errors[0] / 2, "分数截到 ±3": single.clamp(-3, 3)}
    scores["四个取均值"] = ensemble_reward(four, mode="mean")
    scores["四个取最小"] = ensemble_reward(four, mode="min")
    scores["四个，减标准差"] = ensemble_reward(four, mode="lcb")
    scores["四个，减方差"] = ensemble_reward(four, mode="uwo")
    shared = gold + common + 0.5 * errors
    scores["单个，错在一处"] = shared[0]
    scores["四个取最小，错在一处"] = ensemble_reward(shared, mode="min")
    scores["规则门，过了才看 RM"] = torch.where(passed, single, single.min() - 1)
    return gold, scores


table = {}
for seed in range(SEEDS):
    gold_rewards, scores = schemes(seed)
    for name, score in scores.items():
        means = [best_of_n_mean(score, gold_rewards, n=n).item() for n in DRAWS]
        table.setdefault(name, []).append(means)
table = {name: torch.tensor(runs) for name, runs in table.items()}
means = {name: [f"{v:.2f}" for v in runs.mean(0)] for name, runs in table.items()}
assert max((runs.std(0) / SEEDS**0.5).max().item() for runs in table.values()) < 0.04  # 标准误
assert means["单个 RM"] == ["0.79", "0.65", "0.28"] and means["误差减半"] == ["1.25", "1.27", "0.53"]
assert means["四个取均值"] == ["1.22", "1.31", "0.65"] and means["四个取最小"] == ["1.35", "1.85", "2.60"]
assert means["四个，减标准差"][2] == "2.61" and means["四个，减方差"][2] == "2.58"
assert means["四个取最小，错在一处"] == ["0.77", "0.65", "0.19"]
assert means["单个，错在一处"] == ["0.71", "0.59", "0.19"]
assert means["分数截到 ±3"] == ["0.82", "0.81", "0.80"]
assert means["规则门，过了才看 RM"] == ["1.11", "1.13", "0.91"]
minimum = conditional_gold(MinOfFour())  # 取最小也有顶，只是晚得多
late_gold = {p: f"{selected(minimum, 2**p)[1]:.1f}" for p in (10, 18, 20, 26, 30)}
assert late_gold == {10: "2.6", 18: "3.4", 20: "3.4", 26: "2.5", 30: "1.7"}, late_gold
assert max(range(31), key=lambda p: selected(minimum, 2**p)[1]) == 19
assert f"{best_of_n_kl_bound(2**19):.1f}" == "12.2"
# 规则门的尽头是过门答案的平均：φ(0)·(0.9 − 0.05) / P(过门)
assert f"{0.85 / math.sqrt(2 * math.pi) / 0.475:.2f}" == "0.71"
for a, b in [("四个取最小", "四个取均值"), ("四个，减标准差", "四个取均值"), ("四个取均值", "单个 RM")]:
    assert (table[a][:, 2] > table[b][:, 2]).all()  # 每个种子都是这个次序
Markdown(
    tabulate(
        [[name, *row] for name, row in means.items()],
        headers=["做法", *(f"$n={n}$" for n in DRAWS)],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: gold-given-proxy
#| caption: 代理奖励已经是 r 时真实奖励的期望：高斯误差是 r 的一半，重尾误差先升后降，尾部按 3.5 除以 r 衰减
#| echo: fold
rows = []
for r in (2.0, 4.0, 8.0, 16.0, 32.0):
    row = [f"{r:.0f}"]
    for error in ERRORS.values():
        grid = torch.linspace(-10, 30, 40001)
        weight = (error.log_prob(r - grid) + Normal(0.0, 1.0).log_prob(grid)).exp()
        row.append(f"{(weight @ grid / weight.sum()).item():.3f}")
    rows.append([*row, f"{(DEGREES + 1) / r:.3f}"])
assert [row[2] for row in rows] == ["0.809", "0.884", "0.451", "0.220", "0.110"]
assert [row[1] for row in rows] == ["1.000", "2.000", "4.000", "8.000", "16.000"]
Markdown(
    tabulate(
        rows,
        headers=["代理 r", "高斯误差", "重尾误差", "$(\\nu+1)/r$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: held-out-monitor
#| caption: 不知道真实奖励时的监控：误差独立的留出奖励模型跟着真实奖励走，误差共有的跟着代理奖励走；集成的分歧在升
#| echo: fold
columns = {"代理": [], "真实": [], "留出，独立": [], "留出，共有": [], "分歧": []}
for seed in range(SEEDS):
    generator = torch.Generator().manual_seed(100 + seed)
    gold_rewards = torch.randn(SIZE, generator=generator)
    errors = student_t(4, SIZE, generator=generator)
    score = gold_rewards + errors[0]
    watched = [score, gold_rewards, gold_rewards + errors[1]]
    watched += [gold_rewards + 0.8 * errors[0] + 0.6 * errors[2], errors.std(0, correction=0)]
    for values, runs in zip(watched, columns.values(), strict=True):
        runs.append([best_of_n_mean(score, values, n=n).item() for n in (1, *DRAWS)])
columns = {name: torch.tensor(runs) for name, runs in columns.items()}
monitor = {name: [f"{v:.2f}" for v in runs.mean(0)] for name, runs in columns.items()}
monitor = {name: [cell.replace("-0.0", "0.0") for cell in cells] for name, cells in monitor.items()}
gap = columns["留出，独立"] - columns["真实"]  # 独立误差的均值是 0，期望相等
assert (gap.mean(0).abs() < 3 * gap.std(0) / SEEDS**0.5 + 1e-9).all()
assert monitor["真实"][1:] == ["0.79", "0.64", "0.18"] and monitor["留出，独立"][1:] == [
    "0.78",
    "0.60",
    "0.20",
]
assert monitor["留出，共有"][3] == "16.86" and monitor["代理"][3] == "21.00"
assert monitor["分歧"] == ["1.33", "1.99", "3.15", "9.15"]
rows = [[n, *(cells[i] for cells in monitor.values())] for i, n in enumerate((1, *DRAWS))]
Markdown(tabulate(rows, headers=["n", *monitor], tablefmt="github", disable_numparse=True))
