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
# # 顿悟时刻（aha moment）是 RL 训出来的吗：实验
#
# 页面 `docs/reasoning/aha-moment.md` 的实验：起飞曲线、先验与起飞时间、频率升而正确率不动、数关键词的误差。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import numpy as np
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.aha_moment import (
    expected_groups_until_sampled,
    reflection_flags,
    reflection_rate,
    time_to_takeoff,
)
from snippets.rl.grpo import group_advantages

# 均匀数用 numpy 的 float64，与机器无关
GROUP, PROMPTS = 8, 16


def spread(values, digits):
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low}–{high}"


# %%
#| label: takeoff-curves
#| caption: 反思概率随梯度流时间的变化，奖励差为 1：普通梯度先长时间贴着零再陡升，先验越小等得越久；自然梯度的虚线很早就升
#| echo: fold
log_odds = np.linspace(math.log(0.003 / 0.997), 5.0, 150)
grid = 1 / (1 + np.exp(-log_odds))
fig, ax = plt.subplots(figsize=(6.0, 3.4))
for prior, color in [(0.03, "C0"), (0.01, "C1"), (0.003, "C3")]:
    levels = grid[grid >= prior * (1 - 1e-9)]
    times = [time_to_takeoff(prior, gain=1.0, threshold=float(max(p, prior))) for p in levels]
    ax.plot(times, levels, "-", color=color, label=f"普通梯度，先验 {prior}")
times = [time_to_takeoff(0.003, gain=1.0, threshold=float(max(p, 0.003)), natural=True) for p in grid]
ax.plot(times, grid, "--", color="C3", label="自然梯度，先验 0.003")
ax.set_xlim(0, 220)
ax.set_ylim(0, 1)
ax.set_xlabel("梯度流的时间")
ax.set_ylabel("反思的概率")
ax.legend(loc="upper center", bbox_to_anchor=(0.45, 1.3), ncols=2, frameon=False, fontsize=10)

wait = time_to_takeoff(0.003, gain=1.0, threshold=0.1)
rise = time_to_takeoff(0.1, gain=1.0, threshold=0.9)
assert round(wait) == 165 and round(rise) == 13 and 12 < wait / rise < 13  # 0.003→0.1 与 0.1→0.9
wait_natural = time_to_takeoff(0.003, gain=1.0, threshold=0.1, natural=True)
rise_natural = time_to_takeoff(0.1, gain=1.0, threshold=0.9, natural=True)
assert round(wait_natural, 1) == 3.6 and round(rise_natural, 1) == 4.4

# %%
#| label: prior-and-takeoff
#| caption: 先验与起飞：先验为零时永远不起飞；每小十倍，普通梯度慢八到九倍多，自然梯度只多加近似相同的一截
#| echo: fold
WITH, WITHOUT, SEEDS, STEPS, LR = 0.9, 0.3, 8, 2500, 1.0  # 反思与不反思时的正确率
priors = [0.1, 0.01, 0.001, 0.0]


def sampled_grpo():
    """四种先验各八个种子并行；返回概率第一次超过一半的步数，没有就是 inf。"""
    runs = len(priors) * SEEDS
    start = np.repeat(np.array(priors), SEEDS)
    with np.errstate(divide="ignore"):
        odds = np.log(start) - np.log1p(-start)  # 对数几率，先验 0 是 -inf
    rng = np.random.default_rng(0)
    reached = np.full(runs, np.inf)
    for step in range(1, STEPS + 1):
        probs = 1 / (1 + np.exp(-odds))
        draws = rng.random((2, runs, PROMPTS * GROUP))
        reflect = draws[0] < probs[:, None]
        correct = draws[1] < np.where(reflect, WITH, WITHOUT)
        rewards = torch.from_numpy(correct.astype(np.float64).ravel())
        advantages = group_advantages(rewards, group_size=GROUP).numpy().reshape(runs, -1)
        # 两个 logit 各走一步，方向相反，所以对数几率走两倍
        odds = odds + 2 * LR * (advantages * (reflect - probs[:, None])).mean(1)
        reached = np.where((reached == np.inf) & (odds > 0), step, reached)
    return reached.reshape(len(priors), SEEDS), odds.reshape(len(priors), SEEDS)


with np.errstate(over="ignore"):
    reached, final_odds = sampled_grpo()
rows, flow, natural = [], [], []
for prior, steps in zip(priors, reached, strict=True):
    flow.append(time_to_takeoff(prior, gain=WITH - WITHOUT))
    natural.append(time_to_takeoff(prior, gain=WITH - WITHOUT, natural=True))
    groups = expected_groups_until_sampled(prior, group_size=GROUP)
    text = [f"{v:.1f}" if math.isfinite(v) else "∞" for v in (groups, flow[-1], natural[-1])]
    done = [s for s in steps if math.isfinite(s)]
    text.append(f"{spread(done, 0)}（{len(done)}/{SEEDS}）" if done else f"没有（0/{SEEDS}）")
    rows.append([f"{prior:g}", *text])
assert [row[1] for row in rows] == ["1.8", "12.9", "125.4", "∞"]
assert [row[2] for row in rows] == ["11.1", "90.2", "844.0", "∞"]
assert [row[3] for row in rows] == ["3.7", "7.7", "11.5", "∞"]
assert np.all(np.isfinite(reached[:3]))  # 三种非零先验、八个种子都起飞
slowest, fastest = reached[:3].max(1), reached[:3].min(1)
assert slowest[0] <= 8 and 45 <= fastest[1] and slowest[1] <= 59 and 395 <= fastest[2] and slowest[2] <= 527
middle = np.median(reached[:3], axis=1)
ratios = middle[1:] / middle[:-1]  # 先验每小十倍，慢多少倍
assert 6.2 < ratios[0] < 6.4 and 9.2 < ratios[1] < 9.4
assert round(flow[1] / flow[0], 1) == 8.1 and round(flow[2] / flow[1], 1) == 9.4
assert 10_400 * 32 * 16 == 5_324_800  # R1-Zero 总共采的回答数，按报告的设置
assert np.all(final_odds[3] == -np.inf) and np.all(np.isinf(reached[3]))  # 先验为零：原地不动
Markdown(
    tabulate(
        rows,
        headers=["先验", "首次采到（组）", "普通梯度", "自然梯度", "采样 GRPO（步）"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: rate-without-accuracy
#| caption: 反思频率升而正确率不动：反思没用时，按长度平均把频率推高，正确率仍是 0.30；反思有用时两者一起升
#| echo: fold
FIRST, START, SHORT, LONG = 0.3, 0.2, 100.0, 300.0  # 第一遍就对的概率、起始频率、不反思与反思的长度


def train(*, fix, by_length, steps=600, lr=2.0, seeds=8):
    """反思的概率分两个 logit：第一遍错了时、对了时；反思把错的改对的概率是 fix。返回精确的四个比例。"""
    odds = np.full((seeds, 2), math.log(START / (1 - START)))
    rng = np.random.default_rng(1)
    for _ in range(steps):
        probs = 1 / (1 + np.exp(-odds))
        draws = rng.random((3, seeds, PROMPTS * GROUP))
        state = (draws[0] < FIRST).astype(int)
        chosen = np.take_along_axis(probs, state, axis=1)
        reflect = draws[1] < chosen
        correct = (state == 1) | (reflect & (draws[2] < fix))
        rewards = torch.from_numpy(correct.astype(np.float64).ravel())
        advantages = group_advantages(rewards, group_size=GROUP).numpy().reshape(seeds, -1)
        # 决定反思的那个 token 的权重：按条平均是 1/长度；常数取起始的平均长度
        length = np.where(reflect, LONG, SHORT) if by_length else START * LONG + (1 - START) * SHORT
        pull = advantages * (reflect - chosen) * (SHORT / length)
        for which in (0, 1):
            odds[:, which] += lr * np.where(state == which, pull, 0.0).mean(1)
    return summary(1 / (1 + np.exp(-odds)), fix)


def summary(probs, fix):
    joint = np.array([1 - FIRST, FIRST]) * probs  # 反思且第一遍错、反思且第一遍对
    rate = joint.sum(1)
    right_reflect = joint[:, 1] + fix * joint[:, 0]
    right_plain = FIRST - joint[:, 1]
    return rate, right_reflect + right_plain, right_reflect / rate, right_plain / (1 - rate)


cases = {
    "起点": summary(np.full((1, 2), START), 0.0),
    "没用，按条平均": train(fix=0.0, by_length=True),
    "没用，除以常数": train(fix=0.0, by_length=False),
    "能改对一半，除以常数": train(fix=0.5, by_length=False),
}
rows = [[name, *(spread(v, 2) for v in values)] for name, values in cases.items()]
for name, (rate, accuracy, with_reflection, without) in cases.items():
    useful = name.startswith("能改对")
    assert np.allclose(accuracy, 0.65 if useful else 0.30, atol=0.006), name
    if name == "没用，按条平均":
        assert np.all((0.69 < rate) & (rate < 0.71)) and with_reflection.max() < 0.01 and without.min() > 0.98
    if name == "没用，除以常数":
        assert 0.10 < rate.min() and rate.max() < 0.32
    if useful:
        assert np.all((0.73 < rate) & (rate < 0.80))
        assert with_reflection.max() < 0.57 and without.min() > 0.98  # 反思者更差，反思却有用
Markdown(
    tabulate(
        rows,
        headers=["反思", "频率", "正确率", "反思者", "不反思者"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: keyword-detectors
#| caption: 三种关键词表在十四句构造的句子上的精确率与召回率：宽的词表误报多，只数 wait 两头都差
#| echo: fold
sentences = [  # 句子、是不是在回头检查自己（构造的，标注按这个定义）
    ("Wait, I squared the wrong side. Let me redo this step.", True),
    ("Hmm, 12 does not divide 50, so the factorisation above is off.", True),
    ("Let me double-check: 17 * 3 = 51, which matches.", True),
    ("That can't be right, a probability above 1. Going back to line 2.", True),
    ("Let me verify by substituting x = 3 into the equation.", True),
    ("I made a mistake in the sign; it should be +4.", True),
    ("Alternatively, restart from the second equation, since the first try failed.", True),
    ("The customers wait 5 minutes on average.", False),
    ("Wait times follow an exponential distribution.", False),
    ("We evaluate the integral from 0 to 1.", False),
    ("The standard error of the mean is 0.2.", False),
    ("He paid by check, but kept the receipt.", False),
    ("However, n is even, so n + 1 is odd.", False),
    ("The final answer is 42.", False),
]
# 第二张表是 R1 的 Nature 版扩展数据图 1 列出的词
detectors = {
    "只数 wait": ["wait"],
    "R1 的十个词": "wait mistake however but retry error verify wrong evaluate check".split(),
    "短语": ["let me verify", "let me double-check", "let me redo", "i made a mistake", "can't be right"],
}
rows = []
texts, labels = [s for s, _ in sentences], [flag for _, flag in sentences]
for name, keywords in detectors.items():
    flags = reflection_flags(texts, keywords)
    hits = sum(f and y for f, y in zip(flags, labels, strict=True))
    rows.append(
        [
            name,
            f"{reflection_rate(texts, keywords):.2f}",
            f"{hits}/{sum(flags)}",
            f"{hits}/{sum(labels)}",
        ]
    )
assert [row[2] for row in rows] == ["1/3", "4/10", "5/5"]
assert [row[3] for row in rows] == ["1/7", "4/7", "5/7"]
assert reflection_rate(texts, detectors["R1 的十个词"]) == 10 / 14 and sum(labels) == 7
Markdown(
    tabulate(
        rows, headers=["词表", "数出的频率", "精确率", "召回率"], tablefmt="github", disable_numparse=True
    )
)
