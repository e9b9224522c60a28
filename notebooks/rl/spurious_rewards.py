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
# # Qwen 为什么用随机奖励也能涨分（spurious rewards）：实验
#
# 页面 `docs/rl/spurious-rewards.md` 的实验：随机奖励下裁剪留下的期望系数（枚举全部奖励），十臂老虎机上八种写法的走向，以及效应消失的条件。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.spurious_rewards import expected_clipped_coefficient, mean_abs_group_advantage

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
INF = math.inf

# %%
#| label: expected-coefficient
#| caption: 随机奖励下一个 token 的期望梯度系数随比值变化：区间内恒为零，越过上界为负，越过下界为正；圆点与方块是枚举一组 8 条回答全部奖励的结果
#| echo: fold
GROUP, RATE = 8, 0.3  # 故意取不对称的奖励概率
patterns = torch.tensor(list(itertools.product([0.0, 1.0], repeat=GROUP)))  # (256, 8)
weights = RATE ** patterns.sum(1) * (1 - RATE) ** (GROUP - patterns.sum(1))
advantages = torch.stack([group_advantages(p, group_size=GROUP, eps=1e-12) for p in patterns])
assert abs((weights @ advantages).abs().max().item()) < 1e-12  # 均值是零
assert (weights @ advantages**3)[0].item() > 0.1  # 但不对称


def enumerated_coefficient(ratio, clip_low, clip_high):
    """组里第一条回答的比值是 ratio：对每种奖励反向传播，按概率加权。"""
    log_probs = torch.full((len(patterns), 1), math.log(ratio), requires_grad=True)
    loss = clipped_surrogate_loss(
        log_probs, torch.zeros_like(log_probs), advantages[:, :1], clip_low=clip_low, clip_high=clip_high
    )
    (grad,) = torch.autograd.grad(loss.sum(), log_probs)
    return -(weights @ grad[:, 0]).item()


mean_abs = mean_abs_group_advantage(group_size=GROUP, probability=RATE)
assert abs((weights @ advantages.abs())[0].item() - mean_abs) < 1e-9
fig, ax = plt.subplots(figsize=(6.0, 3.4))
dots = torch.linspace(0.45, 1.65, 13)
for name, high, style, color, marker in [
    ("0.2 / 0.2", 0.2, "-", "C0", "o"),
    ("0.2 / 0.4", 0.4, "--", "C1", "s"),
]:
    ends = [0.4, 1 - 0.2, 1 - 0.2 + 1e-9, 1 + high, 1 + high + 1e-9, 1.7]
    line = torch.tensor(ends)
    line[1] -= 1e-9
    values = expected_clipped_coefficient(line, mean_abs_advantage=mean_abs, clip_high=high)
    ax.plot(line, values, style, color=color, label=f"公式，裁剪 {name}")
    exact = torch.tensor([enumerated_coefficient(r.item(), 0.2, high) for r in dots])
    formula = expected_clipped_coefficient(dots, mean_abs_advantage=mean_abs, clip_high=high)
    torch.testing.assert_close(exact, formula, atol=1e-9, rtol=0)
    ax.plot(dots, exact, marker, color=color, markersize=5, fillstyle="none")
ax.axhline(0.0, linestyle=":", linewidth=1, color="C5")
ax.set_xlabel("比值（新概率 / 旧概率）")
ax.set_ylabel("期望梯度系数")
ax.legend(frameon=False)
for ratio in dots.tolist():  # 不裁剪：处处为零
    assert abs(enumerated_coefficient(ratio, 1.0, INF)) < 1e-12
point = enumerated_coefficient(1.5, 0.2, 0.2), enumerated_coefficient(0.5, 0.2, 0.2)
assert f"{mean_abs:.3f} {point[0]:.3f} {point[1]:.3f}" == "0.771 -0.578 0.193"


# %%
#| label: bandit-prior-mass
#| caption: 十臂老虎机，奖励是与臂无关的硬币，64 个种子的平均：上下界都是 0.2 时主臂概率从 0.5 涨到 0.7 左右，只留下界则降到 0.3 左右
#| echo: fold
def run_bandit(
    *,
    clip_low=0.2,
    clip_high=0.2,
    prior=0.5,
    minibatches=8,
    epochs=1,
    rollouts=60,
    groups=64,
    learning_rate=2.0,
    probability=0.5,
    seeds=64,
):
    """softmax 老虎机，一个主臂、九个等概率的旁臂；返回主臂概率的轨迹 (rollouts+1, seeds)、末尾分布、越界的平均概率、每次更新各臂越上界的比例。"""
    generator = torch.Generator().manual_seed(0)
    start = torch.full((10,), (1 - prior) / 9)
    start[0] = prior
    logits = start.log().repeat(seeds, 1)
    track, above, below, hits = [logits.softmax(1)[:, 0]], [], [], []
    for _ in range(rollouts):
        old = logits.log_softmax(1)
        arms = torch.multinomial(old.exp(), groups * 16, replacement=True, generator=generator)  # (seeds, N)
        rewards = (torch.rand(arms.shape, generator=generator) < probability).double()  # 与臂无关
        scores = group_advantages(rewards.flatten(), group_size=16).view_as(arms)
        batches = list(zip(arms.chunk(minibatches, 1), scores.chunk(minibatches, 1), strict=True))
        for arm, score in batches * epochs:
            logits.requires_grad_()
            log_probs = logits.log_softmax(1)
            losses = clipped_surrogate_loss(
                log_probs.gather(1, arm), old.gather(1, arm), score, clip_low=clip_low, clip_high=clip_high
            )
            (grad,) = torch.autograd.grad(losses.mean(1).sum(), logits)  # 每个种子各自平均
            with torch.no_grad():
                probs, ratio = log_probs.exp(), (log_probs - old).exp()
                above.append((probs * (ratio > 1 + clip_high)).sum(1).mean())
                below.append((probs * (ratio < 1 - clip_low)).sum(1).mean())
                hits.append((ratio > 1 + clip_high).double().mean(0))  # (10,)
                logits = logits.detach() - learning_rate * grad
        track.append(logits.softmax(1)[:, 0])
    above, below = torch.stack(above).mean(), torch.stack(below).mean()
    return torch.stack(track), logits.softmax(1), above, below, torch.stack(hits)


variants = {
    "裁剪 0.2 / 0.2": {},
    "更高裁剪 0.2 / 0.28": {"clip_high": 0.28},
    "更高裁剪 0.2 / 0.4": {"clip_high": 0.4},
    "只留上界 0.2": {"clip_low": 1.0},
    "只留下界 0.2": {"clip_high": INF},
    "不裁剪": {"clip_low": 1.0, "clip_high": INF},
    "同策略，轮数相同": {"minibatches": 1},
    "同策略，更新次数相同": {"minibatches": 1, "groups": 8, "rollouts": 480},
}
results = {name: run_bandit(**options) for name, options in variants.items()}
fig, ax = plt.subplots(figsize=(6.0, 3.8))
shown = [
    ("只留上界 0.2", "--", "C1"),
    ("裁剪 0.2 / 0.2", "-", "C0"),
    ("同策略，轮数相同", ":", "C5"),
    ("更高裁剪 0.2 / 0.28", "-.", "C2"),
    ("不裁剪", (0, (1, 1)), "C4"),
    ("只留下界 0.2", "--", "C3"),
]
for name, style, color in shown:
    track = results[name][0].mean(1)
    ax.plot(track, linestyle=style, color=color, label=name)
ax.set_xlabel("轮数（一轮：采样一次，更新 8 次；同策略更新 1 次）")
ax.set_ylabel("主臂的概率（种子平均）")
ax.set_ylim(0, 1)
ax.legend(frameon=False, ncols=2, loc="lower left", fontsize=10)
for track, *_ in results.values():
    assert (track[0] - 0.5).abs().max() < 1e-12
assert (results["裁剪 0.2 / 0.2"][0][:11] < 1 / 1.2).all()  # 前 10 轮（80 次更新）没有种子到门槛
early = results["裁剪 0.2 / 0.2"][4][:80].mean(0)  # 各臂越上界的比例
assert abs(early[0] - 0.005) < 0.002 and abs(early[1:].mean() - 0.027) < 0.006

# %%
#| label: bandit-table
#| caption: 八种写法的末尾状态，64 个种子的平均加减标准误；后两列是越过上界、下界的臂在当前策略下的平均总概率
#| echo: hide
rows, summary = [], {}
for name, (track, final, above, below, _) in results.items():
    top = track[-1]
    mean, error = top.mean().item(), (top.std() / math.sqrt(len(top))).item()
    entropy = torch.special.entr(final).sum(1).mean().item()
    summary[name] = (mean, error, entropy, above.item(), below.item())
    rows.append(
        [name, f"{mean:.2f}±{error:.2f}", f"{entropy:.2f}", f"{100 * above:.2f}%", f"{100 * below:.2f}%"]
    )
# 页面引用的数：主臂概率、熵、越上下界的百分比
quoted = {
    "裁剪 0.2 / 0.2": (0.71, 1.01, 1.37, 0.57),
    "更高裁剪 0.2 / 0.28": (0.48, 1.48, 0.81, 0.90),
    "只留上界 0.2": (0.83, 0.62, 1.08, 0.0),
    "只留下界 0.2": (0.31, 1.66, 0.0, 1.24),
    "不裁剪": (0.43, 1.32, 0.0, 0.0),
    "同策略，轮数相同": (0.50, 1.78, 0.0, 0.0),
    "同策略，更新次数相同": (0.46, 1.30, 0.0, 0.0),
}
for name, (mean, entropy, above, below) in quoted.items():
    got = summary[name]
    assert abs(got[0] - mean) < 0.03 and abs(got[2] - entropy) < 0.1, (name, got)
    assert abs(100 * got[3] - above) < 0.2 and abs(100 * got[4] - below) < 0.2, (name, got)
base, high, free = (summary[name] for name in ("裁剪 0.2 / 0.2", "更高裁剪 0.2 / 0.28", "不裁剪"))
assert base[3] > 2 * base[4] and base[0] - free[0] > 4 * math.hypot(base[1], free[1])
assert abs(high[0] - free[0]) < 2 * math.hypot(high[1], free[1])
assert abs(summary["同策略，更新次数相同"][0] - 0.5) < 2 * summary["同策略，更新次数相同"][1]
assert summary["同策略，轮数相同"][1] < 0.02
prior = torch.tensor([0.5] + [0.5 / 9] * 9)
assert abs(torch.special.entr(prior).sum().item() - 1.79) < 0.01
# 期望梯度为零时的二阶漂移：主臂概率的 Hessian 与噪声协方差 diag(π) − ππᵀ 的内积，起点处为负
hessian = torch.autograd.functional.hessian(lambda z: z.softmax(0)[0], prior.log())
assert abs((hessian * (prior.diag() - prior[:, None] * prior)).sum().item() + 1 / 81) < 1e-9
Markdown(
    tabulate(
        rows, headers=["写法", "主臂概率", "熵", "越上界", "越下界"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: when-it-fails
#| caption: 裁剪都是 0.2 / 0.2，各换一种设置：先验低、步长小、或同一批样本反复用时，主臂不再增长
#| echo: hide
changes = {
    "不改（先验 0.5）": results["裁剪 0.2 / 0.2"],
    "先验 0.2": run_bandit(prior=0.2),
    "先验 0.7": run_bandit(prior=0.7),
    "学习率 0.5": run_bandit(learning_rate=0.5),
    "同一批连用 8 次": run_bandit(groups=8, minibatches=1, epochs=8),
}
rows, limits = [], {}
for name, (track, _, above, below, _) in changes.items():
    start, top = track[0].mean().item(), track[-1]
    mean, error = top.mean().item(), (top.std() / math.sqrt(len(top))).item()
    limits[name] = (start, mean, error, above.item(), below.item())
    rows.append(
        [name, f"{start:.2f}", f"{mean:.2f}±{error:.2f}", f"{100 * above:.2f}%", f"{100 * below:.2f}%"]
    )
for name in ("先验 0.2", "学习率 0.5", "同一批连用 8 次"):  # 平均没有可分辨的移动
    assert abs(limits[name][1] - limits[name][0]) < 2 * limits[name][2], (name, limits[name])
assert limits["先验 0.7"][1] - limits["先验 0.7"][0] > 4 * limits["先验 0.7"][2]
assert limits["学习率 0.5"][3] < 5e-5 and limits["学习率 0.5"][4] < 5e-5
assert abs(100 * limits["同一批连用 8 次"][3] - 6.47) < 0.5
Markdown(
    tabulate(
        rows, headers=["改动", "起点", "末尾", "越上界", "越下界"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: reward-rates
#| caption: 随机奖励得 1 分的概率只改变优势的大小：均值都是零，绝对值的期望在 0.3 到 0.7 之间只差一成左右，常数奖励时是零
#| echo: hide
rows, sizes = [], {}
for rate in (0.5, 0.7, 0.3, 0.1, 0.001, 0.0):
    chance = rate ** patterns.sum(1) * (1 - rate) ** (GROUP - patterns.sum(1))
    assert (chance @ advantages).abs().max().item() < 1e-12
    size = (chance @ advantages.abs())[0].item()
    assert abs(size - mean_abs_group_advantage(group_size=GROUP, probability=rate)) < 1e-9
    sizes[rate] = size
    rows.append(
        [f"{rate:g}", "0", f"{size:.3f}", f"{mean_abs_group_advantage(group_size=16, probability=rate):.3f}"]
    )
assert f"{sizes[0.5]:.3f} {sizes[0.3]:.3f} {sizes[0.001]:.3f} {sizes[0.0]:.3f}" == "0.868 0.771 0.005 0.000"
Markdown(
    tabulate(
        rows,
        headers=["得 1 分的概率", "优势的均值", "绝对值的期望（G=8）", "绝对值的期望（G=16）"],
        tablefmt="github",
        disable_numparse=True,
    )
)
