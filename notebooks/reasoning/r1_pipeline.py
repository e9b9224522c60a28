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
# # DeepSeek-R1 的训练流程：实验
#
# 页面 `docs/reasoning/r1-pipeline.md` 的实验：报告里的各阶段成绩、语言奖励在优势里占多少、拒绝采样给每道题的权重与它学到的分布、16 个小批里裁剪拿掉多少 token。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.r1_pipeline import component_advantages, expected_kept, rejection_sample
from snippets.rl.clip import clip_fraction, clipped_surrogate_loss
from snippets.rl.grpo import group_advantages

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# R1 v2 表 3，依次是 R1-Zero、Dev1、Dev2、Dev3、R1（Codeforces 的百分位与等级分各一行）
TABLE_3 = {
    "MMLU": [88.8, 89.1, 91.2, 91.0, 90.8],
    "MMLU-Redux": [85.6, 90.0, 93.0, 93.1, 92.9],
    "MMLU-Pro": [68.9, 74.1, 83.8, 83.1, 84.0],
    "DROP": [89.1, 89.8, 91.1, 88.7, 92.2],
    "IF-Eval": [46.6, 71.7, 72.0, 78.1, 83.3],
    "GPQA Diamond": [75.8, 66.1, 70.7, 71.2, 71.5],
    "SimpleQA": [30.3, 17.8, 28.2, 24.9, 30.1],
    "FRAMES": [82.3, 78.5, 81.8, 81.9, 82.5],
    "AlpacaEval 2.0": [24.7, 50.1, 55.8, 62.1, 87.6],
    "ArenaHard": [53.6, 77.0, 73.2, 75.6, 92.3],
    "LiveCodeBench": [50.0, 57.5, 63.5, 64.6, 65.9],
    "Codeforces 百分位": [80.4, 84.5, 90.5, 92.1, 96.3],
    "Codeforces 等级分": [1444, 1534, 1687, 1746, 2029],
    "SWE Verified": [43.2, 39.6, 44.6, 45.6, 49.2],
    "Aider-Polyglot": [12.2, 6.7, 25.6, 44.8, 53.3],
    "AIME 2024": [77.9, 59.0, 74.0, 78.1, 79.8],
    "MATH-500": [95.9, 94.2, 95.9, 95.4, 97.3],
    "CNMO 2024": [88.1, 58.0, 73.9, 77.3, 78.8],
    "CLUEWSC": [93.1, 92.8, 92.6, 91.6, 92.8],
    "C-Eval": [92.8, 85.7, 91.9, 86.4, 91.8],
    "C-SimpleQA": [66.4, 58.8, 64.2, 66.9, 63.7],
}
# R1 v2 表 5：（条数，平均 token 数）
TABLE_5 = {
    "Math": (395285, 6094.2),
    "Code": (211129, 7435.7),
    "STEM": (10124, 4928.8),
    "Logic": (10395, 2739.0),
    "General": (177812, 1419.8),
}

# %%
#| label: scores-by-stage
#| caption: R1 报告更新版表 3 的四项成绩：Dev1 的 AIME 与 CNMO 远低于 R1-Zero、指令类更高，推理 RL 把推理拉回来，最后一轮 RL 主要抬高 ArenaHard
#| echo: fold
stages = ["R1-Zero", "Dev1", "Dev2", "Dev3", "R1"]
fig, ax = plt.subplots(figsize=(6.0, 3.7))
for name, style, marker, color in [
    ("AIME 2024", "-", "o", "C0"),
    ("CNMO 2024", "--", "s", "C1"),
    ("ArenaHard", "-.", "^", "C2"),
    ("IF-Eval", ":", "D", "C3"),
]:
    ax.plot(range(1, 5), TABLE_3[name][1:], style, marker=marker, color=color, label=name)
    ax.plot([0], TABLE_3[name][:1], marker=marker, color=color, markerfacecolor="none", linestyle="none")
ax.axvline(0.5, color="C4", linewidth=1)
ax.set_xticks(range(5), stages)
ax.set_ylim(40, 100)
ax.set_ylabel("分数（%）")
ax.legend(loc="lower right", frameon=False, ncols=2)

zero, dev1, dev2, dev3, final = (
    dict(zip(TABLE_3, column, strict=True)) for column in zip(*TABLE_3.values(), strict=True)
)
assert (
    f"{dev1['AIME 2024'] - zero['AIME 2024']:.1f} {dev1['CNMO 2024'] - zero['CNMO 2024']:.1f}"
    == "-18.9 -30.1"
)
assert f"{dev1['IF-Eval'] - zero['IF-Eval']:.1f} {dev1['ArenaHard'] - zero['ArenaHard']:.1f}" == "25.1 23.4"
assert (
    f"{dev2['AIME 2024'] - dev1['AIME 2024']:.1f} {dev2['ArenaHard'] - dev1['ArenaHard']:.1f}" == "15.0 -3.8"
)
assert f"{dev3['Aider-Polyglot'] - dev2['Aider-Polyglot']:.1f}" == "19.2"
assert (
    f"{final['AIME 2024'] - dev3['AIME 2024']:.1f} {final['ArenaHard'] - dev3['ArenaHard']:.1f}" == "1.7 16.7"
)
assert f"{final['AlpacaEval 2.0'] - dev3['AlpacaEval 2.0']:.1f}" == "25.5"
assert (
    f"{final['AlpacaEval 2.0'] / dev3['AlpacaEval 2.0'] - 1:.0%} {final['ArenaHard'] / dev3['ArenaHard'] - 1:.0%}"
    == "41% 22%"
)
lower = [name for name in TABLE_3 if final[name] < zero[name]]
assert (
    lower == ["GPQA Diamond", "SimpleQA", "CNMO 2024", "CLUEWSC", "C-Eval", "C-SimpleQA"]
    and len(TABLE_3) == 21
)
assert sum(zero[name] - final[name] < 0.5 for name in lower) == 2
assert (
    f"{final['CNMO 2024'] - zero['CNMO 2024']:.1f} {final['GPQA Diamond'] - zero['GPQA Diamond']:.1f}"
    == "-9.3 -4.3"
)
# 表 5：80 万条里推理与通用各多少，按条数与按 token 数
counts = {name: n for name, (n, _) in TABLE_5.items()}
tokens = {name: n * length for name, (n, length) in TABLE_5.items()}
assert sum(counts.values()) == 804745 and sum(counts.values()) - counts["General"] == 626933
assert abs(sum(tokens.values()) / 804745 - 5355.3) < 0.5  # 与表里的总平均相符
assert f"{counts['General'] / 804745:.0%} {tokens['General'] / sum(tokens.values()):.0%}" == "22% 6%"

# %%
#| label: language-in-the-advantage
#| caption: 每组 16 条，对错与语言是否混杂独立，枚举全部的组：太易太难的题优势里语言项的份额大；通过率 0.99 时，对而混杂的回答八成七被往下压
#| echo: fold
GROUP_SIZE, MIXED, PURE_RATIO, MIXED_RATIO = 16, 0.5, 1.0, 0.9
# 四种回答：对而纯、对而混、错而纯、错而混
accuracy = torch.tensor([1.0, 1.0, 0.0, 0.0])
language = torch.tensor([PURE_RATIO, MIXED_RATIO, PURE_RATIO, MIXED_RATIO])
compositions = torch.tensor(
    [
        (a, b, c, GROUP_SIZE - a - b - c)
        for a in range(GROUP_SIZE + 1)
        for b in range(GROUP_SIZE + 1 - a)
        for c in range(GROUP_SIZE + 1 - a - b)
    ]
)
kinds = torch.arange(4).repeat(len(compositions)).repeat_interleave(compositions.flatten())  # 每组 16 个
orders = torch.exp(math.lgamma(GROUP_SIZE + 1) - torch.lgamma(compositions + 1.0).sum(1))


def split(weight):
    parts = component_advantages(
        torch.stack([accuracy[kinds], weight * language[kinds]]), group_size=GROUP_SIZE, eps=1e-12
    )
    total = group_advantages(accuracy[kinds] + weight * language[kinds], group_size=GROUP_SIZE, eps=1e-12)
    assert (parts.sum(0) - total).abs().max().item() < 1e-9
    return parts[0], parts[1], total


by_accuracy, by_language, total = split(1.0)
rows = []
for p in (0.1, 0.5, 0.9, 0.99):
    kind_probs = torch.tensor([p, p, 1 - p, 1 - p]) * torch.tensor([1 - MIXED, MIXED] * 2)
    group_probs = orders * (kind_probs**compositions).prod(1)
    assert abs(group_probs.sum().item() - 1) < 1e-12
    weights = group_probs.repeat_interleave(GROUP_SIZE)
    here = weights * (kinds == 1)  # 对而混杂的回答
    flat = p**GROUP_SIZE + (1 - p) ** GROUP_SIZE
    share = (weights * by_language.abs()).sum() / (weights * (by_language.abs() + by_accuracy.abs())).sum()
    pushed_down = (here * (total < -1e-9)).sum() / here.sum()
    mean_advantage = (here * total).sum() / here.sum()
    rows.append([f"{p}", f"{flat:.2f}", f"{share:.2f}", f"{mean_advantage:+.2f}", f"{pushed_down:.2f}"])
# 翻号的条件：对的回答优势为负，当且仅当它的语言分比组均值低出的量超过组内答错的比例
wrong_rate = (compositions[:, 2:].sum(1) / GROUP_SIZE).repeat_interleave(GROUP_SIZE)
below = language[kinds].view(-1, GROUP_SIZE).mean(1).repeat_interleave(GROUP_SIZE) - language[kinds]
flips, gap = accuracy[kinds] == 1, below - wrong_rate
clear = gap.abs() > 1e-9
assert ((total < 0) == (gap > 0))[flips & clear].all()
# 全对的组：语言项的权重从 1 降到 0.001，优势不变
all_right = (wrong_rate == 0) & (compositions[:, :2].prod(1) > 0).repeat_interleave(GROUP_SIZE)
assert (split(0.001)[2] - total)[all_right].abs().max().item() < 1e-6
assert [row[1] for row in rows] == ["0.19", "0.00", "0.19", "0.85"]
assert [row[2] for row in rows] == ["0.38", "0.09", "0.38", "0.92"]
assert [row[3] for row in rows] == ["+2.39", "+0.84", "-0.04", "-0.80"]
assert [row[4] for row in rows] == ["0.00", "0.00", "0.23", "0.87"]
Markdown(
    tabulate(
        rows,
        headers=["通过率", "无对错信号的组", "语言项份额", "对而混：平均优势", "对而混：被压下"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: what-rejection-sampling-keeps
#| caption: 不同通过率的题要采多少条、每题采 16 条时留下几条：全部留下时容易题占大头，每题至多留 4 条时差距缩小
#| echo: fold
p = torch.tensor([0.9, 0.5, 0.1, 0.01])
everything = expected_kept(p, num_samples=16)
capped = expected_kept(p, num_samples=16, max_per_prompt=4)
single = expected_kept(p, num_samples=16, max_per_prompt=1)
assert (single - (1 - (1 - p) ** 16)).abs().max().item() < 1e-12
needed = [math.ceil(math.log(0.05) / math.log(1 - rate)) for rate in p.tolist()]
assert needed == [2, 5, 29, 299]
rows = [
    [f"{rate:g}", f"{1 / rate:.1f}", n, f"{kept:.2f}", f"{some:.2f}"]
    for rate, n, kept, some in zip(p.tolist(), needed, everything.tolist(), capped.tolist(), strict=True)
]
assert [row[3] for row in rows] == ["14.40", "8.00", "1.60", "0.16"]
assert [row[4] for row in rows] == ["4.00", "3.99", "1.58", "0.16"]
# 乘在 ∇p 上的倍数：全留是常数 16，上限 4 时难题的倍数更大
assert (everything / p - 16).abs().max().item() < 1e-9
assert f"{everything[0] / everything[-1]:.0f} {capped[0] / capped[-1]:.0f}" == "90 25"
assert [f"{x:.1f}" for x in (capped / p).tolist()] == ["4.4", "8.0", "15.8", "16.0"]
assert f"{single[-1]:.2f}" == "0.15"  # 通过率 0.01：采 16 条，85% 的题一条都留不下
Markdown(
    tabulate(
        rows,
        headers=["通过率", "平均采几条得一条", "95% 至少一条", "采 16：全留", "采 16：至多 4"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: sft-on-kept-samples
#| caption: 六种回答的策略，采 20 万条、只留正确的做 SFT：得到原策略限制在正确回答上的条件分布；逐字去重之后却学成正确回答上的均匀分布
#| echo: fold
NAMES = ["对，短", "对，长", "对，罕见", "错，常见", "错，中等", "错，少见"]
base = torch.tensor([0.20, 0.08, 0.02, 0.45, 0.15, 0.10])
correct = torch.tensor([True, True, True, False, False, False])
conditional = base * correct / (base * correct).sum()
draws = torch.multinomial(
    base, 200_000, replacement=True, generator=torch.Generator().manual_seed(0)
).tolist()


def fit(kept):
    """对留下的样本做最大似然（SFT），从原策略的 logits 出发，全量梯度下降。"""
    target = torch.bincount(torch.tensor([draws[row] for row in kept]), minlength=6) / len(kept)
    logits = base.log().clone()
    for _ in range(2000):
        logits = logits + 2.0 * (target - logits.softmax(0))  # 交叉熵的负梯度
    return logits.softmax(0)


responses, accepted = [NAMES[i] for i in draws], [bool(correct[i]) for i in draws]
kept = rejection_sample(["题"] * len(draws), responses, accepted, dedupe=False)
unique = rejection_sample(["题"] * len(draws), responses, accepted, dedupe=True)
sft, deduped = fit(kept), fit(unique)
assert f"{len(kept) / len(draws):.2f}" == "0.30" and len(unique) == 3
assert (sft - conditional).abs().max().item() < 0.005
assert (deduped[:3] - 1 / 3).abs().max().item() < 0.001 and sft[3:].sum().item() < 0.001
kl = (conditional[correct] * (conditional[correct] / base[correct]).log()).sum().item()
assert abs(kl + math.log(0.3)) < 1e-12 and f"{kl:.2f}" == "1.20"
rows = [
    [name, *(f"{x:.3f}" for x in values)]
    for name, *values in zip(
        NAMES, base.tolist(), conditional.tolist(), sft.tolist(), deduped.tolist(), strict=True
    )
]
Markdown(
    tabulate(
        rows,
        headers=["回答", "原策略", "条件分布", "SFT", "去重后 SFT"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: clip-over-minibatches
#| caption: 玩具里 8192 条分成 16 个小批只过一遍：裁剪宽度 0.2 时后面的小批有一部分 token 被拿掉梯度，步长大时更多，宽度 10 时始终为零
#| echo: fold
CLASSES, VOCAB, LENGTH, PROMPTS = 8, 32, 8, 512


def one_rollout(seed, *, lr, width):
    """采 512 题 × 16 条，随机分成 16 个小批，Adam 各更新一步；返回每个小批更新前被裁剪的比例。"""
    generator = torch.Generator().manual_seed(seed)
    logits = (2.0 * torch.randn(CLASSES, VOCAB, generator=generator)).requires_grad_()
    good = torch.rand(CLASSES, VOCAB, generator=generator) < 0.3
    classes = torch.arange(PROMPTS).remainder(CLASSES).repeat_interleave(16)  # (8192,)
    old = logits.detach().log_softmax(1)
    drawn = torch.multinomial(old.exp()[classes], LENGTH, replacement=True, generator=generator)  # (8192, 8)
    hits = good[classes[:, None], drawn].sum(1)
    advantages = group_advantages((hits >= 3).double(), group_size=16)
    old_log_probs = old[classes[:, None], drawn]
    optimizer = torch.optim.Adam([logits], lr=lr)
    fractions, ratios = [], []
    for rows in torch.randperm(len(classes), generator=generator).chunk(16):
        now = logits.log_softmax(1)[classes[rows][:, None], drawn[rows]]
        before, weights = old_log_probs[rows], advantages[rows][:, None]
        mask = (weights != 0).double().expand_as(now)  # 优势为 0 的本来就没有梯度
        cut = {"clip_low": width, "clip_high": width}
        fractions.append(clip_fraction(now.detach(), before, weights, mask, **cut).item())
        ratios.append((now.detach() - before).exp().max().item())
        loss = (clipped_surrogate_loss(now, before, weights, **cut)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return torch.tensor(fractions), max(ratios)


settings = {
    (lr, width): [one_rollout(s, lr=lr, width=width) for s in range(5)]
    for lr in (0.01, 0.03)
    for width in (0.2, 10.0)
}
fig, ax = plt.subplots(figsize=(6.0, 3.4))
batches = torch.arange(1, 17)
for (lr, width), style, color in [
    ((0.03, 0.2), "-", "C0"),
    ((0.01, 0.2), "--", "C1"),
    ((0.03, 10.0), ":", "C2"),
]:
    curves = 100 * torch.stack([fractions for fractions, _ in settings[lr, width]])
    ax.plot(batches, curves.mean(0), style, color=color, label=f"宽度 {width:g}，学习率 {lr:g}")
    ax.fill_between(batches, curves.min(0)[0], curves.max(0)[0], color=color, alpha=0.2, linewidth=0)
ax.set_xlim(1, 16)
ax.set_xlabel("第几个小批")
ax.set_ylabel("被裁剪的 token（%）")
ax.legend(loc="upper left", frameon=False)
spans = {}
for key, runs in settings.items():
    assert all(fractions[0] == 0 for fractions, _ in runs)  # 第一个小批比值都是 1
    last, whole = (
        [fractions[-1].item() for fractions, _ in runs],
        [fractions.mean().item() for fractions, _ in runs],
    )
    spans[key] = [min(last), max(last), min(whole), max(whole)]


def near(values, expected):
    """页面只印整数百分比；随机运行的末位留 1 个百分点。"""
    return all(abs(v - e) < 0.01 for v, e in zip(values, expected, strict=True))


assert near(spans[0.03, 0.2], [0.10, 0.29, 0.05, 0.16]) and near(spans[0.01, 0.2][:2], [0.03, 0.06])
assert spans[0.03, 10.0] == spans[0.01, 10.0] == [0.0] * 4
assert 1.5 < max(largest for _, largest in settings[0.03, 10.0]) < 2.5  # 离上端点 11 还很远
# 宽度 10：区间是 [-9, 11]，比值恒正，优势为负的 token 永远不被裁剪
log_ratio = torch.linspace(-20, 20, 401)[None]
never = clip_fraction(
    log_ratio, 0 * log_ratio, -torch.ones(1, 1), torch.ones(1, 401), clip_low=10.0, clip_high=10.0
)
assert never == 0
