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
# # DAPO：实验
#
# 页面 docs/rl/dapo.md 的数字和图都在这里算出来。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.dapo import (
    dapo_advantages,
    dapo_loss,
    keep_groups,
    soft_overlong_penalty,
    wasted_group_probability,
)
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: clip-higher-exploration
#| caption: 同一任务下四组裁剪宽度的训练过程，五次独立重复的平均：只放宽上侧时，低概率的好 token 涨得最快，熵也降得最慢
RUNS, CONTEXTS, GROUP, ACTIONS = 5, 64, 16, 10
SUCCESS = torch.tensor([0.5, 0.9] + [0.3] * 8)  # 主流 token、罕见的好 token、其余八个
START = torch.tensor([0.6, 0.02] + [0.38 / 8] * 8)


def train(clip_low, clip_high, *, inner_steps=16, lr=20.0, rounds=40, seed=0):
    """每轮给每个情境采 16 个 token，同一批上做若干步更新；返回每轮开始时各次重复的熵与好 token 的概率。"""
    generator = torch.Generator().manual_seed(seed)
    logits = START.log().expand(RUNS, CONTEXTS, ACTIONS).clone()
    entropy, good = [], []
    for _ in range(rounds + 1):
        log_pi = logits.log_softmax(-1)
        entropy.append(-(log_pi.exp() * log_pi).sum(-1).mean(1))
        good.append(log_pi.exp()[..., 1].mean(1))
        flat = log_pi.exp().view(-1, ACTIONS)
        actions = torch.multinomial(flat, GROUP, replacement=True, generator=generator)
        actions = actions.view(RUNS, CONTEXTS, GROUP)
        success = torch.rand(actions.shape, generator=generator) < SUCCESS[actions]
        advantages = group_advantages(success.flatten() * 2.0 - 1, group_size=GROUP)
        old = log_pi.gather(-1, actions).view(-1, 1)
        for _ in range(inner_steps):
            leaf = logits.clone().requires_grad_()
            new = leaf.log_softmax(-1).gather(-1, actions).view(-1, 1)
            mask = torch.ones_like(new, dtype=torch.bool)
            loss = dapo_loss(new, old, advantages, mask, clip_low=clip_low, clip_high=clip_high)
            logits = logits - lr * RUNS * torch.autograd.grad(loss, leaf)[0]
    return torch.stack(entropy), torch.stack(good)


WIDTHS = {
    "0.2 / 0.2": (0.2, 0.2, "C0-"),
    "0.2 / 0.28（DAPO）": (0.2, 0.28, "C1--"),
    "0.28 / 0.2（反了）": (0.28, 0.2, "C2:"),
    "0.28 / 0.28": (0.28, 0.28, "C3-."),
}
runs = {name: train(low, high) for name, (low, high, _) in WIDTHS.items()}

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.4))
for axis, index, title in zip(axes, [1, 0], ["好 token 的平均概率", "平均熵（nat）"], strict=True):
    for name, (_, _, style) in WIDTHS.items():
        axis.plot(runs[name][index].mean(1), style, label=name)
    axis.set_xlabel("轮（每轮 16 步）")
    axis.set_title(title)
axes[1].legend(title="下侧 / 上侧宽度")

entropy, good = ({name: run[k][30] for name, run in runs.items()} for k in (0, 1))
symmetric, higher, swapped, both = WIDTHS
assert [f"{good[name].mean():.2f}" for name in WIDTHS] == ["0.09", "0.22", "0.06", "0.14"]
assert [f"{entropy[name].mean():.2f}" for name in WIDTHS] == ["0.45", "0.54", "0.29", "0.34"]
assert (f"{good[higher].min():.2f}", f"{good[symmetric].max():.2f}") == ("0.19", "0.13")
assert all(good[higher].min() > good[name].max() for name in WIDTHS if name != higher)
# 五次重复里，反了的与两侧都放宽的，熵全都低于两种下侧 0.2 的写法
low_entropy = torch.cat([entropy[swapped], entropy[both]]).max()
assert low_entropy < torch.cat([entropy[symmetric], entropy[higher]]).min()
# 对照：每批只更新一步时比值是 1，没有 token 被裁，四种宽度逐位相同
one_step = [train(low, high, inner_steps=1, lr=320.0, rounds=10) for low, high, _ in WIDTHS.values()]
assert all(torch.equal(run[k], one_step[0][k]) for run in one_step for k in (0, 1))
# 每轮恰好涨到上限时，从 0.01 到 0.5 要几轮
assert [math.ceil(math.log(50) / math.log(1 + e)) for e in (0.2, 0.28)] == [22, 16]

# %%
#| label: groups-per-kept
#| caption: 每留下一组平均要生成几组，随通过率变化：曲线是公式，标记是模拟；越接近全对或全错越贵，组越大越便宜
fig, axis = plt.subplots(figsize=(6.0, 3.2))
pass_rates = torch.linspace(0.01, 0.99, 99)
checked = torch.tensor([0.02, 0.1, 0.3, 0.5, 0.7, 0.9, 0.98])
for group_size, line, marker in [(8, "C0-", "C0o"), (16, "C1--", "C1s")]:
    exact = 1 / (1 - wasted_group_probability(pass_rates, group_size=group_size))
    axis.semilogy(pass_rates, exact, line, label=f"一组 {group_size} 条")
    generator = torch.Generator().manual_seed(group_size)
    draws = torch.rand(len(checked), 20000, group_size, generator=generator) < checked[:, None, None]
    kept = keep_groups(draws.double().flatten(), group_size=group_size)[::group_size]
    kept_share = kept.double().view(len(checked), -1).mean(1)
    axis.semilogy(checked, 1 / kept_share, marker, markersize=5)
    # 模拟的留下比例与公式相差不到 4 个标准误
    truth = 1 - wasted_group_probability(checked, group_size=group_size)
    assert ((kept_share - truth).abs() < 4 * (truth * (1 - truth) / 20000).sqrt()).all()
axis.set_yticks([1, 2, 5, 10], ["1", "2", "5", "10"])
axis.set_xlabel("这道题的通过率")
axis.set_ylabel("每留下一组要生成的组数")
axis.legend()

cost = {
    (p, size): (1 / (1 - wasted_group_probability(torch.tensor([p]), group_size=size))).item()
    for p in (0.5, 0.9, 0.98)
    for size in (8, 16)
}
assert [f"{cost[p, 8]:.2f}" for p in (0.5, 0.9, 0.98)] == ["1.01", "1.76", "6.70"]
assert [f"{cost[p, 16]:.2f}" for p in (0.5, 0.9, 0.98)] == ["1.00", "1.23", "3.62"]
waste = wasted_group_probability(torch.tensor([0.5, 0.9]), group_size=8)
assert [f"{w:.3f}" for w in waste] == ["0.008", "0.430"]

# %%
#| label: token-weights
#| caption: 一组里一条 50 个、一条 2000 个 token，优势大小相同：四种写法给单个 token 的权重，用自动求导量出
LENGTHS = torch.tensor([50, 2000])
mask = torch.arange(2000)[None, :] < LENGTHS[:, None]


def token_weights(mode, *, divide_by_length=False):
    """每个 token 的损失在总损失里占的权重；优势先除以长度时，权重也跟着除。"""
    token_losses = torch.zeros(2, 2000, requires_grad=True)
    scaled = token_losses / LENGTHS[:, None] if divide_by_length else token_losses
    aggregate_loss(scaled, mask, mode=mode).backward()
    weights = token_losses.grad
    return weights[0, 0].item(), weights[1, 0].item(), (weights[1].sum() / weights.sum()).item()


rows, ratios, shares = [], {}, {}
for name, mode, divide in [
    ("逐条平均（GRPO）", "seq-mean-token-mean", False),
    ("优势除以长度", "token-mean", True),
    ("两样都做", "seq-mean-token-mean", True),
    ("token 平均（DAPO）", "token-mean", False),
]:
    short, long, share = token_weights(mode, divide_by_length=divide)
    ratios[name], shares[name] = short / long, share
    rows.append([name, f"{short:.2g}", f"{long:.2g}", f"{short / long:.0f} 倍", f"{share:.1%}"])

assert [round(r, 6) for r in ratios.values()] == [40, 40, 1600, 1]
assert [f"{s:.1%}" for s in shares.values()] == ["50.0%", "50.0%", "2.4%", "97.6%"]
# 整批作分母时，长组的份额随 token 数走：两个组共 100 与 1900 个 token
assert [f"{n / 2000:.0%}" for n in (100, 1900)] == ["5%", "95%"]

headers = ["写法", "短的每 token", "长的每 token", "短 / 长", "长的份额"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: overlong-penalty
#| caption: 软超长惩罚随回答长度的变化：16384 之前为零，到 20480 线性降到负一，再长封底；把上限错填成 16384 时从 12288 就开始罚
lengths = torch.arange(10240, 23553, 128)
fig, axis = plt.subplots(figsize=(6.0, 3.2))
paper = soft_overlong_penalty(lengths)
misread = soft_overlong_penalty(lengths, max_length=16384)
no_floor = ((20480 - 4096 - lengths) / 4096).clamp(max=0)  # verl 的式子
axis.plot(lengths, no_floor, "C2:", label="verl 的式子（不封底）")
axis.plot(lengths, misread, "C1--", label="把上限错填成 16384")
axis.plot(lengths, paper, "C0-", label="式 13")
axis.set_xticks([12288, 16384, 20480])
axis.set_xlabel("回答长度（token）")
axis.set_ylabel("惩罚")
axis.legend(loc="lower left")

knees = torch.tensor([16384, 16385, 17408, 18432, 20480, 20481])
values = soft_overlong_penalty(knees)
assert values.tolist() == [0.0, -1 / 4096, -0.25, -0.5, -1.0, -1.0]
assert lengths[misread < 0].min() == 12288 + 128 and (misread[lengths == 16384] == -1).all()
inside = lengths <= 20480
assert torch.equal(no_floor[inside], paper[inside]) and no_floor.min() < -1.7

# %%
#| label: filter-and-refill
#| caption: 同一串生成上的四种做法：只过滤不补，方向与不过滤相同；补满一批后方向更准，但同样多的生成不过滤也一样准
POOL, FEATURES, CHOICES, BATCH, STREAM, REPEATS = 400, 24, 8, 32, 240, 100
generator = torch.Generator().manual_seed(0)
features = torch.randn(POOL, FEATURES, generator=generator) / FEATURES**0.5
start = 4 * torch.randn(FEATURES, CHOICES, generator=generator)
policy = (features @ start).softmax(-1)
answers = torch.multinomial(policy**0.8, 1, generator=generator)[:, 0]  # 有易有难
pass_rate = policy.gather(1, answers[:, None])[:, 0]


def batch_gradient(prompts, choices, rows):
    """选中的组按 DAPO 的损失求梯度；每条回答只有一个 token，刚采样完，比值是 1。"""
    leaf = start.clone().requires_grad_()
    log_probs = (features[prompts] @ leaf).log_softmax(-1).gather(1, choices)  # (组数, 8)
    rewards = (choices == answers[prompts][:, None]) * 2.0 - 1
    advantages = group_advantages(rewards.flatten(), group_size=8)
    flat = log_probs.view(-1, 1)[rows]
    loss = dapo_loss(flat, flat.detach(), advantages[rows], torch.ones_like(flat, dtype=torch.bool))
    return -torch.autograd.grad(loss, leaf)[0].flatten()


def expected_gradient():
    """不过滤时梯度的期望：对组内答对的条数 k 精确求和。"""
    k = torch.arange(9.0)
    choose = torch.tensor([math.comb(8, i) for i in range(9)], dtype=torch.float64)
    prob = choose * pass_rate[:, None] ** k * (1 - pass_rate[:, None]) ** (8 - k)
    size = (prob * (k / 8 * (1 - k / 8) * 7 / 8).sqrt()).sum(1)  # 样本标准差
    one_hot = torch.nn.functional.one_hot(answers, CHOICES)
    away = (policy - policy * one_hot) / (1 - pass_rate)[:, None]  # 给定答错时的分布
    score = size[:, None] * (one_hot - away)
    return (features.T @ score / POOL).flatten()


truth = expected_gradient()
plans = ["不过滤，32 组", "只过滤，不补", "过滤并补满 32 组", "不过滤，同样多的生成"]
stats = {name: [] for name in plans}
for _ in range(REPEATS):
    prompts = torch.randint(POOL, (STREAM,), generator=generator)
    choices = torch.multinomial(policy[prompts], 8, replacement=True, generator=generator)
    correct = (choices == answers[prompts][:, None]).double()
    alive = keep_groups(correct.flatten(), group_size=8)[::8]
    full = int((alive.cumsum(0) == BATCH).nonzero()[0]) + 1  # 补满时一共生成了几组
    order = torch.arange(STREAM)
    chosen = [order < BATCH, (order < BATCH) & alive, (order < full) & alive, order < full]
    grads = [batch_gradient(prompts, choices, rows.repeat_interleave(8)) for rows in chosen]
    # 恒等式：扔掉零优势的组只改分母
    torch.testing.assert_close(grads[1], grads[0] * BATCH / chosen[1].sum())
    torch.testing.assert_close(grads[2], grads[3] * full / BATCH)
    for name, rows, grad in zip(plans, chosen, grads, strict=True):
        cosine = torch.cosine_similarity(grad, truth, dim=0)
        stats[name].append(
            torch.stack(
                [
                    rows.sum(),
                    (rows & alive).sum(),
                    grad @ truth / truth.dot(truth),
                    cosine,
                    correct[rows].mean(),
                ]
            )
        )
means = {name: torch.stack(rows).mean(0) for name, rows in stats.items()}
rows = [
    [name, f"{n:.0f}（{live:.0f}）", f"{scale:.2f}", f"{cosine:.2f}", f"{accuracy:.2f}"]
    for name, (n, live, scale, cosine, accuracy) in means.items()
]

assert [f"{m[1]:.0f}" for m in means.values()] == ["18", "18", "32", "32"]
assert f"{means[plans[3]][0]:.0f}" == "55"
assert [f"{m[2]:.2f}" for m in means.values()] == ["1.03", "1.77", "1.76", "1.04"]
assert [f"{m[3]:.2f}" for m in means.values()] == ["0.26", "0.26", "0.33", "0.33"]
assert [f"{m[4]:.2f}" for m in means.values()] == ["0.62", "0.56", "0.56", "0.62"]
# 批里题目的难度：通过率 0.2–0.8 的题从 36% 升到 60%，高于 0.95 的从 23% 降到 5%
kept = 1 - wasted_group_probability(pass_rate, group_size=8)
for picked, before, after in [
    ((pass_rate > 0.2) & (pass_rate < 0.8), "36%", "60%"),
    (pass_rate > 0.95, "23%", "5%"),
]:
    assert f"{picked.double().mean():.0%}" == before and f"{(kept * picked).sum() / kept.sum():.0%}" == after

headers = ["做法", "组数（有效）", "沿期望方向的长度", "余弦", "记录的正确率"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: reward-composition
#| caption: 惩罚与正确性得分的三种合成：相加时又长又错的最低；两种相乘都让越长的错误回答得分越高
rows, scores = [], {}
for name, correct, length in [
    ("对，短", 1.0, 1000),
    ("对，18432", 1.0, 18432),
    ("错，短", -1.0, 1000),
    ("错，18432", -1.0, 18432),
    ("错，20480", -1.0, 20480),
]:
    penalty = soft_overlong_penalty(torch.tensor([length])).item()
    scores[name] = (correct + penalty, correct * penalty, correct * (1 + penalty))
    rows.append([name, *(f"{score + 0.0:.1f}" for score in scores[name])])

added, multiplied, scaled = zip(*scores.values(), strict=True)
assert added == (1.0, 0.5, -1.0, -1.5, -2.0)
assert multiplied[3:] == (0.5, 1.0) and scaled[2:] == (-1.0, -0.5, 0.0)
# 全对的一组里有一条超了 40 个 token：惩罚只有 -0.01，归一化之后优势是 -2.47，与超了多少无关
for extra in (40, 400):
    lengths = torch.tensor([1000] * 7 + [16384 + extra])
    advantages, keep = dapo_advantages(torch.ones(8), lengths, group_size=8)
    assert f"{advantages[-1]:.2f}" == "-2.47" and not keep.any()
assert f"{soft_overlong_penalty(torch.tensor([16424])).item():.2f}" == "-0.01"
assert f"{-7 / 8**0.5:.2f}" == "-2.47"

headers = ["回答", "相加", "得分乘惩罚", "得分乘（1 + 惩罚）"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
