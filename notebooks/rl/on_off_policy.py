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
# # on-policy 与 off-policy、online 与 offline：实验
#
# 页面 `docs/rl/on-off-policy.md` 里的数字都由下面的单元算出。期望与方差都对全部序列精确求和，没有采样误差。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss, clipped_tokens
from snippets.rl.on_off_policy import (
    decoupled_ppo_loss,
    effective_sample_size,
    importance_weights,
    truncate_weights,
    weighted_policy_gradient_loss,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


class Problem:
    """词表 2、长 T 的全部序列；`rows[b, t]` 是第 t 个 token 用哪一行 logits，只有末尾有奖励。"""

    def __init__(self, sequences, rows, rewards):
        self.sequences, self.rows, self.rewards = sequences, rows, rewards
        self.mask = torch.ones_like(sequences, dtype=torch.bool)

    def log_probs(self, logits):
        return logits.log_softmax(-1)[self.rows, self.sequences]  # (N, T)

    def true_gradient(self, logits):
        logits = logits.clone().requires_grad_(True)
        value = (self.log_probs(logits).sum(1).exp() * self.rewards).sum()
        return torch.autograd.grad(value, logits)[0].flatten()

    def scores(self, logits):
        """每个 token 的得分函数 ∇log π，softmax 的导数是 one-hot 减概率。"""
        index, time = torch.arange(len(self.rows))[:, None], torch.arange(self.rows.shape[1])
        scores = torch.zeros(*self.rows.shape, *logits.shape)
        scores[index, time, self.rows, self.sequences] = 1.0
        scores[index, time, self.rows] -= logits.softmax(-1)[self.rows]
        return scores.flatten(2)  # (N, T, 参数个数)

    def error(self, logits, rollout_logits, coefficients):
        """逐 token 系数 c 给出的估计 Σ c_t·∇log π_t：相对真梯度的偏差，与单条序列的标准差。"""
        truth = self.true_gradient(logits)
        probs = self.log_probs(rollout_logits).sum(1).exp()
        estimates = (coefficients[..., None] * self.scores(logits)).sum(1)
        mean = probs @ estimates
        sd = (probs @ (estimates - mean).square().sum(1)).sqrt()
        return ((mean - truth).norm() / truth.norm()).item(), (sd / truth.norm()).item()

    def advantages(self, rollout_logits):
        baseline = self.log_probs(rollout_logits).sum(1).exp() @ self.rewards
        return (self.rewards - baseline)[:, None]  # (N, 1)


def coefficients_of(loss, log_probs, *others):
    """任何逐 token 损失，对 log π 求导再取负，就是它给每个 token 的系数。"""
    leaf = log_probs.detach().clone().requires_grad_(True)
    return -torch.autograd.grad(loss(leaf, *others).sum(), leaf)[0]


def shown(value):
    return "0" if abs(value) < 1e-12 else f"{value:.2f}"


# 两步的例子：第二个 token 与第一个相同才得分，(0,0) 得 1，(1,1) 得 0.5
pairs = torch.tensor(list(itertools.product(range(2), repeat=2)))
two_step = Problem(
    pairs, torch.stack([torch.zeros(4, dtype=torch.long), 1 + pairs[:, 0]], 1), torch.tensor([1.0, 0, 0, 0.5])
)
rollout_two = torch.zeros(3, 2)  # 采样策略 μ：均匀
direction = torch.tensor([[1.0, 0], [1, 0], [0, 1]])  # 新策略朝得分高的方向走

# %%
#| label: two-step-bias
#| caption: 两步的例子上，五种权重的期望梯度与真梯度的相对偏差；越往右新旧策略相差越大，只有整条积处处为零
#| echo: fold
distances = (0.4, 1.0, 2.0)
columns, no_baseline = [], []
for distance in distances:
    logits = distance * direction
    log_probs, rollout_log_probs = two_step.log_probs(logits), two_step.log_probs(rollout_two)
    weights = {
        level: importance_weights(log_probs, rollout_log_probs, two_step.mask, level=level)
        for level in ("token", "prefix", "sequence")
    }
    weights["none"] = torch.ones_like(log_probs)
    weights["suffix"] = weights["sequence"] * weights["token"] / weights["prefix"]  # ρ_t 与它之后的
    advantages = two_step.advantages(rollout_two)
    column = {}
    for name, weight in weights.items():
        coefficients = coefficients_of(weighted_policy_gradient_loss, log_probs, weight, advantages)
        column[name] = two_step.error(logits, rollout_two, coefficients)[0]
    columns.append(column)
    no_baseline.append(two_step.error(logits, rollout_two, two_step.rewards[:, None].expand(4, 2))[0])
    no_baseline_token = two_step.error(logits, rollout_two, weights["token"] * two_step.rewards[:, None])[0]
    assert abs(no_baseline_token - column["token"]) < 1e-12  # 逐 token 比值的偏差与基线无关

first_kl = [  # 第一个 token 的 KL(μ‖π)
    (rollout_two[0].softmax(-1) @ (rollout_two.log_softmax(-1) - (d * direction).log_softmax(-1))[0]).item()
    for d in distances
]
assert [f"{kl:.2f}" for kl in first_kl] == ["0.02", "0.12", "0.43"]
rows = [
    [name, whose] + [shown(column[key]) for column in columns]
    for name, whose, key in [
        ("1（不修正）", "旧、旧", "none"),
        (r"$\rho_t$（逐 token）", "旧、旧", "token"),
        (r"$\prod_{k\le t}\rho_k$（前缀积）", "新、旧", "prefix"),
        (r"$\prod_{k\ge t}\rho_k$（后缀积）", "旧、新", "suffix"),
        (r"$\prod_k\rho_k$（整条积）", "新、新", "sequence"),
    ]
]
assert [row[2:] for row in rows] == [
    ["0.20", "0.38", "0.79"],
    ["0.17", "0.34", "0.47"],
    ["0.07", "0.14", "0.19"],
    ["0.16", "0.31", "0.43"],
    ["0", "0", "0"],
]
assert [f"{bias:.2f}" for bias in no_baseline] == ["0.38", "0.76", "1.37"]  # 不修正又不减基线
Markdown(
    tabulate(
        rows,
        headers=["权重", "状态、回报", "KL 0.02", "KL 0.12", "KL 0.43"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: ess-vs-length
#| caption: 整条积的有效样本比例随长度指数下降，每个 token 的 KL 越大降得越快；逐 token 比值的有效样本比例与长度无关，一直是 0.99
#| echo: fold
generator = torch.Generator().manual_seed(0)
rollout_logits = torch.randn(8, generator=generator)
step = torch.randn(8, generator=generator)


def second_moment(scale):
    """一个 token 的 KL(π‖μ) 与 E_μ[ρ²]，词表 8，精确求和。"""
    log_rollout, log_policy = rollout_logits.log_softmax(-1), (rollout_logits + scale * step).log_softmax(-1)
    log_ratio = log_policy - log_rollout
    return (log_policy.exp() @ log_ratio).item(), (log_rollout.exp() @ (2 * log_ratio).exp()).item()


def scale_for(target, kl_of_scale):
    low, high = 0.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if kl_of_scale(middle) < target else (low, middle)
    return low


lengths = [round(10 ** (k / 12)) for k in range(49)]  # 1 到 10,000
fig, ax = plt.subplots(figsize=(6.0, 3.4))
ess = {}
for target, style, color in [(0.0002, "-", "C0"), (0.001, "--", "C1"), (0.005, "-.", "C2")]:
    kl, moment = second_moment(scale_for(target, lambda scale: second_moment(scale)[0]))
    assert abs(kl - target) < 1e-9
    ess[target] = [moment**-length for length in lengths]  # 各位置独立：E[w²] 是逐位置相乘
    for length, fraction in zip(lengths, ess[target], strict=True):
        assert fraction <= math.exp(-length * kl)  # 页面里的上界
    ax.plot(lengths, ess[target], style, color=color, label=f"整条积，每 token KL {target:g}")
token_fraction = 1 / moment
ax.plot(lengths, [token_fraction] * len(lengths), ":", color="C3", label=f"逐 token，KL {target:g}")
ax.set_xscale("log")
ax.set_xlim(1, 10000)
ax.set_ylim(0, 1.05)
ax.set_xticks([1, 10, 100, 1000, 10000], ["1", "10", "100", "1,000", "10,000"])
ax.set_xlabel("回答长度（token，对数轴）")
ax.set_ylabel("有效样本比例")
ax.legend(fontsize=10, loc="lower left")
at = {target: dict(zip(lengths, values, strict=True)) for target, values in ess.items()}
assert f"{token_fraction:.2f}" == "0.99"
assert [f"{at[target][1000]:.2f}" for target in (0.0002, 0.001)] == ["0.67", "0.13"]
assert f"{at[0.005][100]:.2f}" == "0.36" and at[0.005][1000] < 1e-4
# 采到的样本也是这样：1,000 个 token、每 token KL 0.0002，4,096 条里的有效样本
counts = torch.distributions.Multinomial(1000, probs=rollout_logits.softmax(-1)).sample((4096,))
scale = scale_for(0.0002, lambda scale: second_moment(scale)[0])
log_ratio = (rollout_logits + scale * step).log_softmax(-1) - rollout_logits.log_softmax(-1)
sampled = effective_sample_size((counts @ log_ratio).exp()).item() / 4096
assert abs(sampled - at[0.0002][1000]) < 0.05

# %%
#| label: error-at-fixed-batch
#| caption: 一批 64 条时整条积在短序列上误差最小，长了反而最大；4096 条时整条积始终最小，逐 token 停在自己的偏差上
#| echo: fold
SEEDS, TOKEN_KL = 20, 0.05


def chain(length):
    """策略只看上一个 token（开头单独一行），1 的个数过半得 1 分。"""
    sequences = torch.tensor(list(itertools.product(range(2), repeat=length)))
    rows = torch.cat([torch.full((len(sequences), 1), 2), sequences[:, :-1]], 1)
    return Problem(sequences, rows, (2 * sequences.sum(1) > length).double())


def random_policies(problem, seed):
    """随机的一对策略，平均每个 token 的 KL(π‖μ) 恰为 0.05。"""
    generator = torch.Generator().manual_seed(seed)
    rollout, step = 0.5 * torch.randn(3, 2, generator=generator), torch.randn(3, 2, generator=generator)
    rollout_logps = problem.log_probs(rollout).sum(1)

    def kl_of_scale(scale):
        logps = problem.log_probs(rollout + scale * step).sum(1)
        return (logps.exp() @ (logps - rollout_logps)).item() / problem.rows.shape[1]

    return rollout + scale_for(TOKEN_KL, kl_of_scale) * step, rollout


chain_lengths = (2, 4, 6, 8, 10, 12)
errors = {"不修正": [], "逐 token": [], "整条积": []}  # 每个长度：20 对策略的（偏差，单条标准差）
for length in chain_lengths:
    problem = chain(length)
    results = {name: [] for name in errors}
    for seed in range(SEEDS):
        logits, rollout = random_policies(problem, seed)
        log_probs, rollout_log_probs = problem.log_probs(logits), problem.log_probs(rollout)
        for name, weight in [
            ("不修正", torch.ones_like(log_probs)),
            ("逐 token", importance_weights(log_probs, rollout_log_probs, problem.mask, level="token")),
            ("整条积", importance_weights(log_probs, rollout_log_probs, problem.mask, level="sequence")),
        ]:
            results[name].append(problem.error(logits, rollout, weight * problem.advantages(rollout)))
    for name, values in results.items():
        errors[name].append(torch.tensor(values))

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.4), sharey=True)
total = {}
for ax, count in zip(axes, (64, 4096), strict=True):
    for (name, values), style, color in zip(
        errors.items(), (":", "--", "-"), ("C3", "C1", "C0"), strict=True
    ):
        # 总误差：偏差与 count 条平均之后的噪声，平方和开方
        root = torch.stack([(v[:, 0].square() + v[:, 1].square() / count).sqrt() for v in values])
        total[name, count] = root.quantile(0.5, 1).tolist()  # 20 个数的中位数：中间两个的平均
        ax.plot(chain_lengths, total[name, count], style, color=color, label=name)
        if name != "不修正":
            ax.fill_between(
                chain_lengths, root.quantile(0.25, 1), root.quantile(0.75, 1), color=color, alpha=0.15, lw=0
            )
    ax.set_title(f"一批 {count} 条", fontsize=11)
    ax.set_xlabel("回答长度（token）")
    ax.set_xticks(chain_lengths)
axes[0].set_ylim(0, 0.9)
axes[0].set_ylabel("相对总误差（中位数）")
axes[1].legend(fontsize=10, loc="upper left")
token64, sequence64 = total["逐 token", 64], total["整条积", 64]
token4096, sequence4096 = total["逐 token", 4096], total["整条积", 4096]
assert sequence64[0] < token64[0] and sequence64[-1] > token64[-1]  # 64 条：短的整条积好，长的逐 token 好
assert all(s < t for s, t in zip(sequence4096, token4096, strict=True))  # 4,096 条：整条积都好
none64, none4096 = total["不修正", 64], total["不修正", 4096]
assert sequence64[0] < none64[0] and sequence64[-1] > none64[-1]
assert all(s < n for s, n in zip(sequence4096, none4096, strict=True))
assert [f"{v:.2f}" for v in (sequence64[0], token64[0], sequence64[-1], token64[-1])] == [
    "0.25",
    "0.40",
    "0.59",
    "0.43",
]
assert [f"{v:.2f}" for v in (sequence4096[-1], token4096[-1])] == ["0.07", "0.34"]
assert max(v[:, 0].max().item() for v in errors["整条积"]) < 1e-10  # 偏差恒为 0

# %%
#| label: first-step-on-stale-data
#| caption: 陈旧数据上的第一步，20 对随机策略的中位数：合用一个旧策略时约四分之一的 token 一开始就没有梯度，解耦之后为零，偏差只由权重决定
#| echo: fold
problem = chain(8)
methods = {
    "合用：$\\pi_{\\text{old}}=\\mu$": None,
    "重算 $\\pi_{\\text{old}}$，不加权": "none",
    "解耦，逐 token": "token",
    "解耦，整条积": "sequence",
    "解耦，整条积截断到 2": "truncated",
}
table = {name: [] for name in methods}
for seed in range(SEEDS):
    logits, rollout = random_policies(problem, seed)
    log_probs, rollout_log_probs = problem.log_probs(logits), problem.log_probs(rollout)
    advantages = problem.advantages(rollout)
    probs = rollout_log_probs.sum(1).exp()
    sequence_weights = importance_weights(log_probs, rollout_log_probs, problem.mask, level="sequence")
    weights = {
        "none": torch.ones_like(log_probs),
        "token": importance_weights(log_probs, rollout_log_probs, problem.mask, level="token"),
        "sequence": sequence_weights,
        "truncated": truncate_weights(sequence_weights, cap=2.0),
    }
    for name, level in methods.items():
        if level is None:  # 把 μ 同时当作裁剪的中心
            anchor = rollout_log_probs
            coefficients = coefficients_of(clipped_surrogate_loss, log_probs, rollout_log_probs, advantages)
        else:  # 第一步：π_prox 就是当前策略
            anchor = log_probs
            coefficients = coefficients_of(
                decoupled_ppo_loss, log_probs, log_probs, weights[level], advantages
            )
        clipped = (probs @ clipped_tokens(log_probs, anchor, advantages).double().mean(1)).item()
        table[name].append((clipped, *problem.error(logits, rollout, coefficients)))
medians = {name: torch.tensor(values).quantile(0.5, 0).tolist() for name, values in table.items()}
rows = [
    [name, f"{100 * clipped:.0f}%", shown(bias), f"{sd / 8:.2f}"]
    for name, (clipped, bias, sd) in medians.items()
]
fractions = [row[0] for row in table["合用：$\\pi_{\\text{old}}=\\mu$"]]
assert [row[1:] for row in rows] == [
    ["24%", "1.30", "0.21"],
    ["0%", "0.45", "0.32"],
    ["0%", "0.29", "0.25"],
    ["0%", "0", "0.41"],
    ["0%", "0.22", "0.29"],
]
assert [f"{100 * f(fractions):.0f}" for f in (min, max)] == ["15", "50"]  # 20 对策略：被裁的占 15% 到 50%
# 不裁剪时，合用 μ 与逐 token 的权重是同一个梯度：多出来的偏差全来自裁剪
unclipped = coefficients_of(
    lambda *xs: clipped_surrogate_loss(*xs, clip_low=1e6, clip_high=1e6),
    log_probs,
    rollout_log_probs,
    advantages,
)
torch.testing.assert_close(unclipped, weights["token"] * advantages)
Markdown(
    tabulate(
        rows,
        headers=["写法", "被裁的 token", "偏差", "64 条的噪声"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: wrong-weights
#| caption: 两步的例子上，五种写法的期望梯度与真梯度的相对偏差和夹角余弦，只有第一行的偏差为零
#| echo: fold
logits = 1.0 * direction
log_probs, rollout_log_probs = two_step.log_probs(logits), two_step.log_probs(rollout_two)
advantages = two_step.advantages(rollout_two)
right = importance_weights(log_probs, rollout_log_probs, two_step.mask, level="sequence")
token = importance_weights(log_probs, rollout_log_probs, two_step.mask, level="token")
rollout_logps = rollout_log_probs.sum(1, keepdim=True)
wrong = {
    "整条积（正确）": lambda lp: weighted_policy_gradient_loss(lp, right, advantages),
    "比值取倒数": lambda lp: weighted_policy_gradient_loss(lp, 1 / right, advantages),
    "权重没有切断梯度": lambda lp: -(lp.sum(1, keepdim=True) - rollout_logps).exp() * advantages * lp,
    "每条的几何平均": lambda lp: weighted_policy_gradient_loss(lp, right.sqrt(), advantages),
    "逐 token 比值": lambda lp: weighted_policy_gradient_loss(lp, token, advantages),
}
probs, truth = rollout_log_probs.sum(1).exp(), two_step.true_gradient(logits)
rows = []
for name, loss in wrong.items():
    coefficients = coefficients_of(loss, log_probs)
    gradient = probs @ (coefficients[..., None] * two_step.scores(logits)).sum(1)
    cosine = torch.cosine_similarity(gradient, truth, 0).item()
    rows.append([name, shown(two_step.error(logits, rollout_two, coefficients)[0]), f"{cosine:.2f}"])
assert [row[1:] for row in rows] == [
    ["0", "1.00"],
    ["1.57", "0.66"],
    ["1.01", "0.11"],
    ["0.20", "0.99"],
    ["0.34", "0.97"],
]
Markdown(tabulate(rows, headers=["写法", "偏差", "余弦"], tablefmt="github", disable_numparse=True))
