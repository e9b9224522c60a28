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
# # R1-Zero：实验
#
# 页面 `docs/reasoning/r1-zero.md` 的实验：玩具 R1-Zero 的格式分与正确分、训练前后的 pass@k、pass@k 两种估计的偏差、两次 GSM8K 成绩之差的噪声、多难的题才有组内信号。

# %%
#| label: setup
import functools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.r1_zero import (
    accuracy_standard_error,
    mixed_group_probability,
    pass_at_k,
    two_proportion_z,
)
from snippets.reasoning.rule_based_reward import accuracy_reward, format_reward
from snippets.rl.grpo import group_advantages, grpo_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# 词表：起始、停、四个标签、两种语言的思考词、框里的 0 到 9
TOKENS = [
    "",
    "",
    "<think>",
    "</think>",
    "<answer>",
    "</answer>",
    "想",
    "so",
    *(rf"\boxed{{{d}}}" for d in range(10)),
]
START, STOP, THINK, THINK_END, ANSWER, ANSWER_END, ZH, EN, BOX = range(9)
QUESTIONS, GROUP_SIZE, HORIZON, STEPS, SEEDS = 24, 16, 9, 120, 3
CONTROL_STEPS = 80
gold = torch.arange(QUESTIONS) % 10
question = torch.arange(QUESTIONS).repeat_interleave(GROUP_SIZE)


@functools.cache
def score(tokens, answer):
    text = "".join(TOKENS[token] for token in tokens)
    return accuracy_reward(text, str(answer)), format_reward(text)


def base_model():
    """没训练过的策略：二元转移表（各题共用，格式只是偶尔完整）加每题一行答案偏好（与标准答案无关的随机数）。"""
    table = torch.full((len(TOKENS), len(TOKENS)), -1.5)
    table[:, START] = -30.0
    table[START, THINK] = 1.0
    table[THINK, [ZH, EN]] = 2.0
    table[[ZH, EN], THINK_END] = 1.8
    for word in (ZH, EN):
        table[word, [ZH, EN]] = 0.8
    table[THINK_END, ANSWER] = 1.5
    table[ANSWER, BOX:] = 0.5
    table[BOX:, [ANSWER_END, STOP]] = 1.0
    table[ANSWER_END, STOP] = 2.0
    uniform = torch.rand(QUESTIONS, 10, generator=torch.Generator().manual_seed(0))
    answers = 2.5 * torch.special.ndtri(uniform)  # 标准正态的 2.5 倍
    return table.repeat(1, 1, 1), answers  # (1, V, V)、(题, 10)


def next_logits(policy, which, previous):
    table, answers = policy
    bias = torch.nn.functional.pad(answers, (BOX, 0))[which]  # (B, V)
    rows = which if len(table) > 1 else torch.zeros_like(which)
    if previous.dim() == 2:
        return table[rows[:, None], previous] + bias[:, None]
    return table[rows, previous] + bias


@torch.no_grad()
def sample(policy, which, generator):
    previous = torch.full_like(which, START)
    alive, tokens, mask = torch.ones_like(which, dtype=torch.bool), [], []
    for _ in range(HORIZON):
        cumulative = next_logits(policy, which, previous).softmax(-1).cumsum(-1)
        uniform = torch.rand(len(which), 1, generator=generator)
        drawn = (uniform > cumulative).sum(-1).clamp(max=len(TOKENS) - 1)  # 逆变换采样
        previous = torch.where(alive, drawn, STOP)
        tokens.append(previous)
        mask.append(alive)
        alive = alive & (previous != STOP)
    return torch.stack(tokens, 1), torch.stack(mask, 1)


def log_probs(policy, which, tokens):
    previous = torch.cat([torch.full((len(which), 1), START), tokens[:, :-1]], 1)
    return next_logits(policy, which, previous).log_softmax(-1).gather(2, tokens[..., None])[..., 0]


def rewards_of(tokens, which):
    return torch.tensor(
        [score(tuple(row), answer) for row, answer in zip(tokens.tolist(), gold[which].tolist(), strict=True)]
    )


def train(seed, *, steps=STEPS, shared=True):
    """GRPO：正确分加格式分，每题 16 条，KL 系数 0.001，每 40 步换参考策略；shared=False 时每题一张转移表。"""
    table, answers = base_model()
    table = table if shared else table.repeat(QUESTIONS, 1, 1)
    policy = (table.requires_grad_(), answers.requires_grad_())
    optimizer = torch.optim.Adam(policy, lr=0.05)
    generator, history = torch.Generator().manual_seed(seed), []
    for step in range(steps):
        if step % 40 == 0:
            reference = tuple(p.detach().clone() for p in policy)
        tokens, mask = sample(policy, question, generator)
        parts = rewards_of(tokens, question)  # (B, 2)：正确、格式
        history.append(parts.mean(0))
        advantages = group_advantages(parts.sum(1), group_size=GROUP_SIZE)
        new = log_probs(policy, question, tokens)
        ref = log_probs(reference, question, tokens)
        loss = grpo_loss(new, new.detach(), ref, advantages, mask, beta=0.001)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.stack(history), tuple(p.detach() for p in policy)


# %%
#| label: toy-training-curves
#| caption: 玩具 R1-Zero，三个种子的范围：格式分先到 0.8 以上，正确分全程在 0.6 以下；格式参数不再由各题共用时（点线，只跑 80 步），格式分慢得多
#| echo: fold
runs = [train(seed) for seed in range(SEEDS)]
separate = [train(seed, steps=CONTROL_STEPS, shared=False)[0] for seed in range(2)]
curves = torch.stack([history for history, _ in runs])  # (种子, 步, 2)
control = torch.stack(separate)


def smooth(curve):
    return curve.unfold(-1, 5, 1).mean(-1)  # 5 步滑动平均


fig, ax = plt.subplots(figsize=(6.0, 3.5))
x = torch.arange(STEPS - 4) + 2
for name, which, style, color in [("格式分", 1, "-", "C0"), ("正确分", 0, "--", "C3")]:
    curve = smooth(curves[..., which])
    ax.plot(x, curve.mean(0), style, color=color, label=name)
    ax.fill_between(x, curve.min(0)[0], curve.max(0)[0], color=color, alpha=0.2, linewidth=0)
ax.plot(
    x[: CONTROL_STEPS - 4], smooth(control[..., 1]).mean(0), ":", color="C1", label="格式分，每题各学各的"
)
ax.set_xlim(0, STEPS)
ax.set_ylim(0, 1)
ax.set_xlabel("更新步数")
ax.set_ylabel("平均得分（0 到 1）")
ax.legend(loc="upper left", frameon=False)

start, end = curves[:, 0], curves[:, -10:].mean(1)  # (种子, 2)；末 10 步
assert start[:, 1].max() < 0.015 < start[:, 0].min() and start[:, 0].max() < 0.06
assert end[:, 1].min() > 0.85 and 0.35 < end[:, 0].min() and end[:, 0].max() < 0.6
for curve in smooth(curves.transpose(1, 2)):  # 每个种子：前 20 步正确分在上，格式分先到 0.8
    assert (curve[0, :20] > curve[1, :20]).all()
    first = int((curve[1] > 0.8).nonzero()[0])
    assert 60 <= first <= 90 and curve[0].max() < 0.6
apart, together = (h[:, CONTROL_STEPS - 10 : CONTROL_STEPS].mean(1) for h in (control, curves))  # 同一段步数
assert apart[:, 1].max() < 0.3 < 0.6 < together[:, 1].min()
assert apart[:, 0].min() > together[:, 0].max()  # 正确分没有跟着变慢

# %%
#| label: pass-at-k-before-and-after
#| caption: 玩具上训练前后的 pass@k（24 题平均，每题采样 512 条，三个种子的范围）：单次尝试的差距最大，尝试次数越多差距越小
#| echo: fold
SAMPLES = 512
many = torch.arange(QUESTIONS).repeat_interleave(SAMPLES)


def correct_counts(policy):
    """每题 512 条里对的条数，以及思考词里中文的占比。"""
    tokens, _ = sample(policy, many, torch.Generator().manual_seed(7))
    words = torch.stack([(tokens == word).sum() for word in (ZH, EN)]).double()
    correct = rewards_of(tokens, many)[:, 0].view(QUESTIONS, SAMPLES).sum(1).int()
    return correct.tolist(), (words[0] / words.sum()).item()


def mean_pass(counts, k):
    return sum(pass_at_k(SAMPLES, count, k=k) for count in counts) / QUESTIONS


before, share_before = correct_counts(base_model())
after, shares = zip(*(correct_counts(policy) for _, policy in runs), strict=True)
rows, gains = [], []
for k in (1, 4, 16, 64, 256, 512):
    base, trained = mean_pass(before, k), [mean_pass(counts, k) for counts in after]
    gains.append([value - base for value in trained])
    rows.append([k, f"{base:.2f}", f"{min(trained):.2f}–{max(trained):.2f}"])
assert [row[1] for row in rows] == ["0.04", "0.11", "0.20", "0.32", "0.50", "0.58"]
assert min(gains[0]) > 0.35 and max(gains[-1]) < 0.2  # 差距：k=1 时大，k=512 时小
assert all(max(low) < max(high) for high, low in zip(gains, gains[1:], strict=False))  # 差距随 k 缩小
easy = [i for i, count in enumerate(before) if count >= 5]
never = [i for i, count in enumerate(before) if count == 0]
assert len(easy) == 8 and len(never) == 10
for counts in after:
    assert all(counts[i] > SAMPLES // 2 for i in easy)
    assert sum(counts[i] > SAMPLES // 2 for i in never) <= 2
assert any(counts[i] > SAMPLES // 2 for counts in after for i in never)
assert f"{share_before:.2f}" == "0.49" and min(shares) < 0.6 and max(shares) > 0.9
Markdown(tabulate(rows, headers=["k", "训练前", "训练后"], tablefmt="github", disable_numparse=True))

# %%
#| label: groups-with-signal
#| caption: 一组里有对有错的概率：通过率 0.001 的题采 16 条，只有百分之二的组有信号；通过率居中时两条一组也会浪费一半
#| echo: fold
rows = []
for rate in (0.001, 0.01, 0.156, 0.45, 0.9):
    rows.append([f"{rate:g}", *(f"{mixed_group_probability(rate, group_size=g):.3f}" for g in (2, 4, 16))])
assert rows[0][3] == "0.016" and rows[1][3] == "0.149" and rows[2][3] == "0.934"
assert rows[3][1:] == ["0.495", "0.867", "1.000"] and rows[4][3] == "0.815"
Markdown(tabulate(rows, headers=["通过率", "G=2", "G=4", "G=16"], tablefmt="github", disable_numparse=True))

# %%
#| label: noise-of-two-scores
#| caption: 成绩之差的 z 值：GSM8K 差 2.3 个点，z 是 1.17；AIME 差 6.9 个点，当作每题一次是 0.61，固定这 30 题、每题 16 次时至少 2.46
#| echo: fold
TEST = 1319
scores = (0.45489006823351025, 0.47763457164518575)  # 组大小 2 与 4，各一次运行
counts = tuple(round(score * TEST) for score in scores)
assert counts == (600, 630) and all(c / TEST == s for c, s in zip(counts, scores, strict=True))
errors = [100 * accuracy_standard_error(c, TEST) for c in counts]
z = two_proportion_z(counts, (TEST, TEST))
p_value = math.erfc(abs(z) / math.sqrt(2))
difference = 100 * (scores[1] - scores[0])
half_width = 1.96 * math.hypot(*errors)
assert f"{difference:.2f} {half_width:.1f} {z:.2f} {p_value:.2f}" == "2.27 3.8 1.17 0.24"
# 若有逐题结果可配对：只有一边对的题共 d 道时 z = 30 / sqrt(d)
largest_d = math.floor((30 / 1.96) ** 2)
independent_d = TEST * sum(scores[i] * (1 - scores[1 - i]) for i in (0, 1))
assert largest_d == 234 and round(independent_d) == 657
# 显著性 5%、把握 80% 分辨 2.27 个点要多少题（每次）
mean = sum(scores) / 2
needed = 2 * (1.96 + 0.8416) ** 2 * mean * (1 - mean) / (scores[1] - scores[0]) ** 2
assert 7500 < needed < 7600
once, fixed = (  # 题目固定时各题方差之和不超过 30 p(1-p)，所以 fixed 是标准误的上界
    [100 * math.sqrt(rate * (1 - rate) / (30 * repeats)) for rate in (0.710, 0.779)] for repeats in (1, 16)
)
rows = [
    ["GSM8K，组大小 2 与 4", "45.5 → 47.8", f"{errors[0]:.1f}、{errors[1]:.1f}", f"{z:.2f}"],
    ["AIME，每题一次", "71.0 → 77.9", f"{once[0]:.1f}、{once[1]:.1f}", f"{6.9 / math.hypot(*once):.2f}"],
    [
        "AIME，同 30 题各 16 次",
        "71.0 → 77.9",
        "≤{:.1f}、≤{:.1f}".format(*fixed),
        f"≥{6.9 / math.hypot(*fixed):.2f}",
    ],
]
assert rows[0][2] == "1.4、1.4" and rows[1][2:] == ["8.3、7.6", "0.61"]
assert rows[2][2:] == ["≤2.1、≤1.9", "≥2.46"]
Markdown(
    tabulate(
        rows, headers=["比较", "正确率（%）", "标准误（点）", "z"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: pass-at-k-estimators
#| caption: 每题采 16 条估 pass@8，对全部可能的条数求期望：子集平均恰等于真值，把频率代进去偏低
#| echo: fold
n, k = 16, 8
rows = []
for rate in (0.02, 0.1, 0.3):
    weights = [math.comb(n, c) * rate**c * (1 - rate) ** (n - c) for c in range(n + 1)]
    truth = 1 - (1 - rate) ** k
    unbiased = sum(w * pass_at_k(n, c, k=k) for c, w in enumerate(weights))
    plug_in = sum(w * (1 - (1 - c / n) ** k) for c, w in enumerate(weights))
    assert abs(unbiased - truth) < 1e-12 and plug_in < truth - 0.01
    rows.append([f"{rate:g}", f"{truth:.3f}", f"{unbiased:.3f}", f"{plug_in:.3f}"])
assert [row[1] for row in rows] == [row[2] for row in rows] == ["0.149", "0.570", "0.942"]
assert [row[3] for row in rows] == ["0.122", "0.491", "0.894"]
Markdown(
    tabulate(
        rows, headers=["单次正确率", "真值", "子集平均", "代入频率"], tablefmt="github", disable_numparse=True
    )
)
