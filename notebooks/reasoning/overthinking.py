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
# # overthinking（过度思考）怎么解决：实验
#
# 页面 `docs/reasoning/overthinking.md` 的实验：结果效率、正确率随 token 预算的变化、长度奖励遇上组标准差。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.overthinking import (
    cosine_length_reward,
    kimi_length_reward,
    lcpo_exact,
    lcpo_max,
    outcome_efficiency,
)
from snippets.rl.grpo import group_advantages

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: outcome-efficiency
#| caption: 五条构造的回答各自的结果效率：先对后改错的也拿到 0.3，一个解也没对的是 0
#| echo: fold
transcripts = [  # 名字、各个解的 token 数、各个解对不对
    ("一遍就对，停", [100], [True]),
    ("第一遍就对，又验两遍", [40, 60, 100], [True, True, True]),
    ("第二遍才对", [50, 70, 80], [False, True, True]),
    ("先对，后来改错", [60, 140], [True, False]),
    ("没有一遍对", [90, 110], [False, False]),
]
rows = []
for name, lengths, correct in transcripts:
    efficiency = outcome_efficiency([lengths], [correct])
    final = "对" if correct[-1] else "错"
    rows.append([name, " + ".join(map(str, lengths)), final, f"{efficiency:.2f}"])
assert [row[3] for row in rows] == ["1.00", "0.20", "0.60", "0.30", "0.00"]
mean = outcome_efficiency([t[1] for t in transcripts], [t[2] for t in transcripts])
assert abs(mean - (1 + 0.2 + 0.6 + 0.3 + 0) / 5) < 1e-12 and f"{mean:.2f}" == "0.42"
assert f"{outcome_efficiency([[39, 862]], [[True, True]]):.3f}" == "0.043"  # 论文的例子：39/901
Markdown(
    tabulate(
        rows, headers=["回答", "各解的 token", "最后答案", "效率"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: budget-curve
#| caption: 总预算相同时单条链与五条链投票的正确率，横轴取对数：单条链先升后降；预算约 40 以上时易题投票更高，难题要到约 450 以上
#| echo: fold
APPROACH, FLIP = 0.8, 0.002  # 思路对的概率（整条链一次）；算出来之后每个 token 改错的概率
EASY, HARD = 0.2, 0.01  # 思路对时，每个 token 算出答案的概率


def chain_accuracy(budget, solve):
    """一条链写满 budget 个 token 时的正确率：在第 k 个 token 算出来，之后没有改错。"""
    return APPROACH * solve * ((1 - FLIP) ** budget - (1 - solve) ** budget) / (solve - FLIP)


def vote_accuracy(total, solve, chains=5):
    """chains 条链平分预算、多数票；错的链都投同一个错误答案（最不利的情形）。"""
    p = chain_accuracy(total // chains, solve)
    return sum(
        math.comb(chains, k) * p**k * (1 - p) ** (chains - k) for k in range(chains // 2 + 1, chains + 1)
    )


# 闭式对照逐 token 的马尔可夫递推
for solve in (EASY, HARD):
    unsolved, solved = APPROACH, 0.0
    for budget in range(1, 401):
        unsolved, solved = unsolved * (1 - solve), solved * (1 - FLIP) + unsolved * solve
        assert abs(solved - chain_accuracy(budget, solve)) < 1e-12

budgets = list(range(5, 1001, 5))
single = {s: [chain_accuracy(b, s) for b in budgets] for s in (EASY, HARD)}
voted = {s: [vote_accuracy(b, s) for b in budgets] for s in (EASY, HARD)}
fig, ax = plt.subplots(figsize=(6.0, 3.6))
for solve, color, name in [(EASY, "C0", "易题"), (HARD, "C3", "难题")]:
    ax.plot(budgets, single[solve], "-", color=color, label=f"{name}，一条长链")
    ax.plot(budgets, voted[solve], "--", color=color, label=f"{name}，五条短链投票")
ax.set_xscale("log")
ax.set_xticks([10, 30, 100, 300, 1000], ["10", "30", "100", "300", "1000"])
ax.minorticks_off()
ax.set_xlim(5, 1000)
ax.set_ylim(0, 1)
ax.set_xlabel("总预算（token）")
ax.set_ylabel("正确率")
ax.legend(loc="upper center", bbox_to_anchor=(0.45, 1.3), ncols=2, frameon=False, fontsize=10)

peak = {s: max(range(1, 1001), key=lambda b: chain_accuracy(b, s)) for s in (EASY, HARD)}
assert peak == {EASY: 21, HARD: 200}
assert (
    f"{chain_accuracy(21, EASY):.2f} {chain_accuracy(200, EASY):.2f} {chain_accuracy(1000, EASY):.2f}"
    == "0.77 0.54 0.11"
)
assert f"{chain_accuracy(200, HARD):.2f} {chain_accuracy(21, HARD):.2f}" == "0.54 0.15"
assert f"{vote_accuracy(100, EASY):.2f} {chain_accuracy(100, EASY):.2f}" == "0.91 0.66"
assert f"{vote_accuracy(200, HARD):.2f}" == "0.11"
crossing = {
    s: next(b for b, v, c in zip(budgets, voted[s], single[s], strict=True) if v > c) for s in (EASY, HARD)
}
assert 35 <= crossing[EASY] <= 45 and 430 <= crossing[HARD] <= 480

# %%
#| label: length-reward-and-std
#| caption: 长度奖励与组标准差：除以标准差时权重 0.01 与 0.1 的长度、正确率几乎一样低；只在全对的组里关掉长度项，正确率就回到 0.99
#| echo: fold
LONGEST, PROMPTS, GROUP, TAU, LR = 60, 32, 8, 8.0, 8.0
all_lengths = torch.arange(1, LONGEST + 1).double()
accuracy = 1 - torch.exp(-all_lengths / TAU)  # 想得越久越容易对，收益递减


def train(seed, *, weight, mode="std", start=0, steps=300, lr=LR):
    """策略是 60 种长度上的分类分布；返回期望长度、期望正确率、最大的那一种长度的概率。"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.zeros(LONGEST)
    for step in range(steps):
        probs = logits.softmax(0)
        drawn = torch.multinomial(probs, PROMPTS * GROUP, replacement=True, generator=generator)
        correct = torch.rand(PROMPTS * GROUP, generator=generator) < accuracy[drawn]
        bonus = weight * kimi_length_reward(all_lengths[drawn], correct, group_size=GROUP)
        if step < start:
            bonus = torch.zeros_like(bonus)
        if mode == "muted":  # 全对的组不加长度项，其余不变
            bonus = bonus * (~correct.view(-1, GROUP).all(1)).repeat_interleave(GROUP)
        if mode == "separate":  # 对错除以标准差，长度项只减均值
            advantages = group_advantages(correct.double(), group_size=GROUP)
            advantages = advantages + group_advantages(bonus, group_size=GROUP, scale_by_std=False)
        else:
            advantages = group_advantages(correct + bonus, group_size=GROUP, scale_by_std=mode != "mean")
        pull = torch.zeros(LONGEST).index_add(0, drawn, advantages) / (PROMPTS * GROUP)
        logits = logits + lr * (pull - probs * pull.sum())  # 同策略，ρ=1 的策略梯度
    probs = logits.softmax(0)
    return (probs @ all_lengths).item(), (probs @ accuracy).item(), probs.max().item()


runs = {
    "不加长度奖励": {"weight": 0.0},
    "$w=0.01$，除标准差": {"weight": 0.01},
    "$w=0.1$，除标准差": {"weight": 0.1},
    "$w=1$，除标准差": {"weight": 1.0},
    "$w=0.1$，只减均值": {"weight": 0.1, "mode": "mean"},
    "$w=0.1$，对错与长度分开": {"weight": 0.1, "mode": "separate"},
    "$w=0.1$，全对的组关掉长度": {"weight": 0.1, "mode": "muted"},
    "$w=0.1$，第 200 步才加": {"weight": 0.1, "start": 200},
}


def spread(values, digits):
    return f"{min(values):.{digits}f}–{max(values):.{digits}f}"


rows, result = [], {}
for name, options in runs.items():
    outcomes = [train(seed, **options) for seed in range(5)]
    result[name] = outcomes
    rows.append([name, spread([o[0] for o in outcomes], 0), spread([o[1] for o in outcomes], 2)])
assert [row[1] for row in rows] == ["51–54", "12–17", "11–17", "10–11", "29–32", "34–38", "41–46", "29–37"]
assert [row[2] for row in rows] == [
    "1.00–1.00",
    "0.78–0.88",
    "0.75–0.88",
    "0.71–0.75",
    "0.97–0.98",
    "0.99–0.99",
    "0.99–0.99",
    "0.97–0.99",
]
# 对照：只减均值、不加长度奖励，长度不降，所以 29–32 不是学习率造成的
plain = [train(seed, weight=0.0, mode="mean") for seed in range(5)]
assert spread([o[0] for o in plain], 0) == "45–46"
# 只减均值也会继续缩：1500 步
slow = [train(seed, weight=0.1, mode="mean", steps=1500) for seed in range(5)]
assert spread([o[0] for o in slow], 0) == "23–27" and spread([o[1] for o in slow], 2) == "0.94–0.97"
assert min(o[2] for o in slow) > 0.99  # 停下来是因为只剩一种长度
# 除以标准差时策略几乎缩到一种长度，之后没有信号；第 200 步才加的再训 200 步也不动
for name in ("$w=0.01$，除标准差", "$w=0.1$，除标准差", "$w=1$，除标准差", "$w=0.1$，第 200 步才加"):
    assert min(o[2] for o in result[name]) > 0.95, name
assert max(o[2] for o in result["$w=0.1$，全对的组关掉长度"]) < 0.7
later = [train(seed, weight=0.1, start=200, steps=500) for seed in range(5)]
assert spread([o[0] for o in later], 0) == "29–37"
# 对照：学习率降到 1、步数乘 8，结果不变
gentle = [train(seed, weight=w, steps=2400, lr=1.0) for w in (0.01, 0.1) for seed in range(2)]
assert spread([o[0] for o in gentle], 0) == "13–15" and spread([o[1] for o in gentle], 2) == "0.80–0.85"
# 恒等式：全对的组里优势等于负的标准化长度，与权重无关
lengths, right = torch.tensor([3.0, 9.0, 4.0, 12.0]), torch.ones(4, dtype=torch.bool)
standard = -(lengths - lengths.mean()) / lengths.std()
for weight in (0.01, 0.1, 1.0, 100.0):
    reward = 1 + weight * kimi_length_reward(lengths, right, group_size=4)
    assert (group_advantages(reward, group_size=4, eps=0.0) - standard).abs().max().item() < 1e-12
Markdown(tabulate(rows, headers=["写法", "期望长度", "正确率"], tablefmt="github", disable_numparse=True))

# %%
#| label: rewards-compared
#| caption: 五条回答在三种长度奖励下的总奖励，k1.5 取权重 0.5：答错的短回答在 k1.5 与 L1-Max 里得 0，在余弦奖励里比答错的长回答扣得多
#| echo: fold
lengths = torch.tensor([400.0, 1000.0, 3600.0, 400.0, 3600.0])
correct = torch.tensor([True, True, True, False, False])
target = torch.full((5,), 1000.0)
kimi = correct + 0.5 * kimi_length_reward(lengths, correct, group_size=5)
exact, maximum = lcpo_exact(lengths, correct, target), lcpo_max(lengths, correct, target)
cosine = cosine_length_reward(lengths, correct, max_length=4000)
rows = []
for i in range(5):
    name = f"{'对' if correct[i] else '错'}，{int(lengths[i])}"
    rows.append([name, *(f"{value[i].item():.2f}" for value in (kimi, exact, maximum, cosine))])
assert [row[1] for row in rows] == ["1.25", "1.16", "0.75", "0.00", "-0.25"]
assert [row[2] for row in rows] == ["0.82", "1.00", "0.22", "-0.18", "-0.78"]
assert [row[3] for row in rows] == ["0.68", "0.50", "0.00", "0.00", "0.00"]
assert [row[4] for row in rows] == ["0.99", "0.93", "0.51", "-0.99", "-0.51"]
assert f"{(cosine[4] - cosine[3]).item():.2f}" == "0.48"
# 论文的取值（表 9）：错 −10→0，400 与 3600 差 9.51
paper = cosine_length_reward(
    lengths, correct, max_length=4000, correct_short=2.0, correct_long=1.0, wrong_short=-10.0, wrong_long=0.0
)
assert f"{(paper[4] - paper[3]).item():.2f}" == "9.51"
# k1.5：全错的组里短回答的优势是正的，与权重无关
four = torch.tensor([100.0, 200.0, 300.0, 400.0])
bonus = kimi_length_reward(four, torch.zeros(4, dtype=torch.bool), group_size=4)
all_wrong = [group_advantages(w * bonus, group_size=4, eps=0.0) for w in (0.1, 1.0)]
assert (all_wrong[0] - all_wrong[1]).abs().max().item() < 1e-12
assert [f"{a:.2f}" for a in all_wrong[0].tolist()] == ["0.71", "0.71", "0.00", "-1.41"]
# L1 的默认系数：多省或多写 1667 个 token 才到顶、到底；偏 3334 个 token 的对答不如长度正好的错答
assert f"{0.5 / 0.0003:.0f}" == "1667" and 1 - 0.0003 * 3334 < 0 < 1 - 0.0003 * 3333
Markdown(
    tabulate(
        rows, headers=["回答", "k1.5", "L1-Exact", "L1-Max", "余弦"], tablefmt="github", disable_numparse=True
    )
)
