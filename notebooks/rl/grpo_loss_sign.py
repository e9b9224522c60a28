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
# # GRPO 的损失为什么从 0 开始、为什么会为负：实验
#
# 页面 `docs/rl/grpo-loss-sign.md` 的实验：第一步的值与梯度、同一批更新多步碰到的下界、每批只更新一次时损失的符号、组被拆到微批里之后日志里的数。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clip_fraction, clipped_surrogate_loss
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.grpo_loss_sign import first_step_policy_loss, policy_loss_lower_bound
from snippets.rl.kl_estimators import kl_k3
from snippets.rl.masking import aggregate_loss
from snippets.rl.ppo import whiten

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
MODES = ["seq-mean-token-mean", "token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
NAMES = ["按条平均（GRPO）", "token 平均（DAPO）", "按条求和", "除以常数（Dr. GRPO）"]


def policy_loss(log_probs, old_log_probs, advantages, mask, *, mode, beta=0.0, ref_log_probs=None):
    """任意聚合方式的 GRPO 损失；常数取 8。"""
    losses = clipped_surrogate_loss(log_probs, old_log_probs, advantages[:, None])
    if beta:
        losses = losses + beta * kl_k3(log_probs, ref_log_probs)
    return aggregate_loss(losses, mask, mode=mode, max_response_length=8)


def shown(value):
    """小于 1e-12 的写 0。"""
    return "0" if abs(value) < 1e-12 else f"{value:+.4f}"


# %%
#| label: first-step
#| caption: 一组四条、长度 2、3、6、4，更新前的第一步：按条平均的值是零或 β 乘平均 KL，另外三种不是；梯度全都不是零
#| echo: fold
generator = torch.Generator().manual_seed(0)
VOCAB_SIZE, T = 7, 6
lengths = torch.tensor([2, 3, 6, 4])
mask = torch.arange(T) < lengths[:, None]
rewards = torch.tensor([1.0, 0.0, 0.0, 1.0])  # 最长的那条错了
advantages = group_advantages(rewards, group_size=4)
logits = torch.randn(4, T, VOCAB_SIZE, generator=generator)
ref_logits = logits + 0.4 * torch.randn(4, T, VOCAB_SIZE, generator=generator)
tokens = torch.randint(VOCAB_SIZE, (4, T, 1), generator=generator)


def token_log_probs(logits):
    return logits.log_softmax(-1).gather(-1, tokens).squeeze(-1)  # (B, T)


old_log_probs, ref_log_probs = token_log_probs(logits), token_log_probs(ref_logits)


def value_and_grad(*, mode, beta, ref=ref_log_probs, weights=advantages, keep=mask):
    leaf = logits.clone().requires_grad_()
    options = {"mode": mode, "beta": beta, "ref_log_probs": ref}
    loss = policy_loss(token_log_probs(leaf), old_log_probs, weights, keep, **options)
    return loss.item(), torch.autograd.grad(loss, leaf)[0]


rows, values, norms = [], {}, {}
for mode, name in zip(MODES, NAMES, strict=True):
    for beta in (0.0, 0.04):
        value, grad = value_and_grad(mode=mode, beta=beta)
        closed = first_step_policy_loss(advantages, lengths, mode=mode, max_response_length=8)
        mean_kl = aggregate_loss(kl_k3(old_log_probs, ref_log_probs), mask, mode=mode, max_response_length=8)
        assert abs(value - (closed + beta * mean_kl).item()) < 1e-12
        values[mode, beta], norms[mode, beta] = value, grad.norm().item()
    rows.append(
        [
            name,
            *(shown(values[mode, b]) for b in (0.0, 0.04)),
            *(f"{norms[mode, b]:.3f}" for b in (0.0, 0.04)),
        ]
    )
assert [row[1] for row in rows] == ["0", "+0.1732", "+0.6495", "+0.0812"]
assert rows[0][2] == "+0.0039" and rows[0][3] == "0.259" and min(norms.values()) > 0.1
# 训练刚开始 π_θ=π_ref：KL 的值与梯度都是 0，总损失恰为 0，梯度与 β=0 时一样
start, start_grad = value_and_grad(mode=MODES[0], beta=0.04, ref=old_log_probs)
plain, plain_grad = value_and_grad(mode=MODES[0], beta=0.0)
assert abs(start) < 1e-12 and (start_grad - plain_grad).abs().max() < 1e-12
# 优势的正负对调（最长的那条对了），另外三种都变号
for mode in MODES:
    flipped = first_step_policy_loss(-advantages, lengths, mode=mode, max_response_length=8)
    assert abs(flipped.item() + values[mode, 0.0]) < 1e-12
# 值等于负的相关系数乘优势的标准差乘长度的变异系数
spread = lengths.double().std(correction=0) / lengths.double().mean()
corr = torch.corrcoef(torch.stack([lengths.double(), advantages]))[0, 1]
assert abs((-corr * advantages.std(correction=0) * spread).item() - values[MODES[1], 0.0]) < 1e-12
# 沿负梯度走一小步，值就变负：L(θ-ηg) = -η|g|² + O(η²)
moved = policy_loss(
    token_log_probs(logits - 1e-4 * plain_grad), old_log_probs, advantages, mask, mode=MODES[0]
)
assert moved.item() < 0 and abs(moved.item() / (-1e-4 * plain_grad.square().sum().item()) - 1) < 1e-3
# 写成 -A·logπ：梯度一样，值不一样
leaf = logits.clone().requires_grad_()
reinforce = aggregate_loss(-advantages[:, None] * token_log_probs(leaf), mask, mode=MODES[0])
assert (torch.autograd.grad(reinforce, leaf)[0] - plain_grad).abs().max() < 1e-12
assert abs(reinforce.item()) > 0.05
# 一条回答被整条遮住（例如遮掉被截断的回答），其余的优势和不再是 0
hidden = mask & (torch.arange(4) != 2)[:, None]
assert f"{value_and_grad(mode=MODES[0], beta=0.0, keep=hidden)[0]:+.3f}" == "-0.289"
# PPO：整批 token 白化之后，token 平均的第一步也恰好是 0
token_advantages = torch.randn(4, T, generator=generator)
whitened = -aggregate_loss(whiten(token_advantages, mask), mask, mode=MODES[1])
assert abs(whitened.item()) < 1e-12 < 0.05 < abs(aggregate_loss(token_advantages, mask, mode=MODES[1]).item())
Markdown(
    tabulate(
        rows,
        headers=["聚合", "值，β=0", "值，β=0.04", "梯度范数，β=0", "梯度范数，β=0.04"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: inner-steps
#| caption: 同一批更新 40 步：每条各有自己的参数时，损失从零降到下界 -0.1811 停住，裁剪比例同时升到一；八条共用参数时停在下界之上
#| echo: fold
ROWS, T2, STEPS = 8, 6, 40
rewards8 = torch.tensor([1.0] * 3 + [0.0] * 5)
advantages8 = group_advantages(rewards8, group_size=ROWS, eps=0.0)
mask8 = torch.ones(ROWS, T2, dtype=torch.bool)
lengths8 = mask8.sum(1)
bound = policy_loss_lower_bound(advantages8, lengths8, mode=MODES[0]).item()
generator = torch.Generator().manual_seed(1)
tokens8 = torch.randint(VOCAB_SIZE, (ROWS, T2, 1), generator=generator)
start_logits = 0.3 * torch.randn(1, T2, VOCAB_SIZE, generator=generator)


def inner_steps(logits, *, lr, beta=0.0):
    """在同一批上做 STEPS 次梯度下降；logits 的第一轴是 8（各自的参数）或 1（共用）。返回每步之前的损失、裁剪比例。"""
    old = logits.log_softmax(-1).expand(ROWS, -1, -1).gather(-1, tokens8).squeeze(-1)
    history = []
    for _ in range(STEPS + 1):
        leaf = logits.clone().requires_grad_()
        log_probs = leaf.log_softmax(-1).expand(ROWS, -1, -1).gather(-1, tokens8).squeeze(-1)
        loss = grpo_loss(log_probs, old, old, advantages8, mask8, beta=beta)  # 参考策略就是起点
        fraction = clip_fraction(log_probs, old, advantages8[:, None], mask8.double())
        history.append((loss.item(), fraction.item()))
        logits = logits - lr * torch.autograd.grad(loss, leaf)[0]
    return torch.tensor(history)


own = inner_steps(start_logits.repeat(ROWS, 1, 1), lr=2.0)
shared = inner_steps(start_logits, lr=1.0)
fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True, height_ratios=[3, 2])
top.plot(own[:, 0], "C0-", label="每条各有参数")
top.plot(shared[:, 0], "C1--", label="八条共用参数")
top.axhline(bound, color="C3", linestyle=":", label="下界")
top.set_ylabel("策略损失")
top.legend(loc="upper right")
bottom.plot(own[:, 1], "C0-")
bottom.plot(shared[:, 1], "C1--")
bottom.set_ylabel("裁剪比例")
bottom.set_xlabel("在同一批上更新的步数")
bottom.set_ylim(-0.05, 1.05)

assert abs(own[0, 0].item()) < 1e-12 and f"{bound:.4f}" == "-0.1811"
# 优势和为 0 时就是 -ε·mean|A|；3 对 5 错的 mean|A| 是 0.906
assert abs(bound + 0.2 * advantages8.abs().mean().item()) < 1e-12
assert f"{advantages8.abs().mean():.3f}" == "0.906"
assert (own[1:, 0] <= own[:-1, 0] + 1e-12).all() and (own[:, 0] >= bound - 1e-12).all()  # 一路下降，不穿过
assert abs(own[20, 0].item() - bound) < 1e-12 and own[20, 1] == 1  # 到 20 步已恰好是下界，全被裁剪
assert [f"{own[k, 0]:.3f}" for k in (1, 2, 5, 10)] == ["-0.032", "-0.064", "-0.144", "-0.180"]
assert [f"{own[k, 1]:.2f}" for k in (2, 5, 10)] == ["0.00", "0.38", "0.92"]
# 共用参数：同一位置上同一个 token 对错两边都有，比值只有一个。逐 token 求最小值，得到更紧的界
weight = advantages8[:, None] / (ROWS * T2)
right = torch.zeros(T2, VOCAB_SIZE).index_put_(
    (torch.arange(T2).repeat(ROWS), tokens8.flatten()),
    weight.clamp(min=0).expand(-1, T2).flatten(),
    accumulate=True,
)
wrong = torch.zeros(T2, VOCAB_SIZE).index_put_(
    (torch.arange(T2).repeat(ROWS), tokens8.flatten()),
    -weight.clamp(max=0).expand(-1, T2).flatten(),
    accumulate=True,
)
tighter = ((wrong - right) * torch.where(right > wrong, 1.2, 0.8)).sum().item()
assert f"{tighter:.3f} {shared[:, 0].min():.3f}" == "-0.119 -0.117" and tighter <= shared[:, 0].min().item()
# 加上 KL（β=0.04）：总损失照样为负，也不低于策略项的下界
with_kl = inner_steps(start_logits.repeat(ROWS, 1, 1), lr=2.0, beta=0.04)
assert bound <= with_kl[:, 0].min().item() and f"{with_kl[-1, 0]:.3f}" == "-0.180"
# 任何奖励：mean|A| 不超过 sqrt((G-1)/G)，所以按条平均的策略损失低不过 -0.187（G=8、ε=0.2）
half = group_advantages(torch.tensor([1.0] * 4 + [0.0] * 4), group_size=8, eps=0.0)
assert abs(half.abs().mean().item() - math.sqrt(7 / 8)) < 1e-12 and f"{0.2 * math.sqrt(7 / 8):.3f}" == "0.187"

# %%
#| label: one-update-per-batch
#| caption: 每批只更新一次，五个种子：token 平均的损失在长答更对时为负、短答更对时为正、无关时在零附近；按条平均恒为零，加了 KL 就从零往上走；除无关的任务外奖励都在涨
#| echo: fold
CAP, PROMPTS, TRAIN_STEPS, SEEDS = 60, 32, 120, 5
positions = torch.arange(1, CAP + 1)


def answer_log_probs(params, style, lengths, drawn):
    """(B, CAP + 1)：第一个 token 是写法，其余每步停或不停；到上限被截断的那条最后一步没有停。"""
    choose = torch.nn.functional.logsigmoid(torch.where(style == 0, params[0], -params[0]))
    z = params[1:][style][:, None]
    stops = (positions == lengths[:, None]) & (drawn <= CAP)[:, None]
    body = torch.nn.functional.logsigmoid(torch.where(stops, z, -z))
    return torch.cat([choose[:, None], body], dim=1)


def train(seed, *, right_when, mode, beta=0.0, lr=2.0):
    """先掷一枚硬币选写法（长或短），再逐 token 决定停不停；三个参数：选长的 logit、两种写法停的 logit。

    right_when 为 "long" 或 "short"：选了这种写法答对的概率是 0.8，另一种 0.2；None：总是 0.5。
    """
    generator = torch.Generator().manual_seed(seed)
    params = torch.tensor([0.0, -2.4, -0.8])
    start, history = params.clone(), []
    for _ in range(TRAIN_STEPS):
        uniform = torch.rand(PROMPTS * 8, 3, generator=generator)
        style = (uniform[:, 0] > params[0].sigmoid()).long()  # 0 长、1 短
        stop = params[1:].sigmoid()[style]
        drawn = (uniform[:, 1].log() / torch.log1p(-stop)).ceil().clamp(min=1)
        lengths = drawn.clamp(max=CAP).long()
        right = {"long": 0.8 - 0.6 * style, "short": 0.2 + 0.6 * style, None: torch.full_like(stop, 0.5)}
        rewards = (uniform[:, 2] < right[right_when]).double()

        mask = torch.arange(CAP + 1) <= lengths[:, None]
        leaf = params.clone().requires_grad_()
        log_probs, ref_log_probs = (answer_log_probs(p, style, lengths, drawn) for p in (leaf, start))
        advantages = group_advantages(rewards, group_size=8)
        options = {"mode": mode, "beta": beta, "ref_log_probs": ref_log_probs}
        loss = policy_loss(log_probs, log_probs.detach(), advantages, mask, **options)
        closed = first_step_policy_loss(advantages, lengths + 1, mode=mode)
        kl = aggregate_loss(kl_k3(log_probs.detach(), ref_log_probs), mask, mode=mode)
        assert abs((loss - closed - beta * kl).item()) < 1e-12
        history.append((loss.item(), rewards.mean().item()))
        params = params - lr * torch.autograd.grad(loss, leaf)[0]
    return torch.tensor(history)


runs = {
    "长的更对": {"right_when": "long", "mode": "token-mean"},
    "短的更对": {"right_when": "short", "mode": "token-mean"},
    "对错与长度无关": {"right_when": None, "mode": "token-mean"},
    "β=0": {"right_when": "long", "mode": "seq-mean-token-mean"},
    "β=0.04": {"right_when": "long", "mode": "seq-mean-token-mean", "beta": 0.04},
}
curves = {name: torch.stack([train(s, **options) for s in range(SEEDS)]) for name, options in runs.items()}
reward = {name: (c[:, :10, 1].mean().item(), c[:, -10:, 1].mean().item()) for name, c in curves.items()}
fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True, height_ratios=[3, 2])
steps = torch.arange(0, TRAIN_STEPS, 2)
for axis, name, style in [
    (top, "短的更对", "C3--"),
    (top, "对错与长度无关", "C2:"),
    (top, "长的更对", "C0-"),
    (bottom, "β=0.04", "C1-"),
    (bottom, "β=0", "C4--"),
]:
    curve = curves[name][:, steps, 0]
    axis.plot(steps, curve.mean(0), style, label=name)
    axis.fill_between(steps, curve.min(0)[0], curve.max(0)[0], color=style[:2], alpha=0.2, linewidth=0)
top.set_ylim(-0.4, 0.62)
bottom.set_ylim(-0.002, 0.013)
top.set_ylabel("损失\n（token 平均）")
bottom.set_ylabel("损失\n（按条平均）")
bottom.set_xlabel("更新步数（每步换一批）")
top.legend(loc="upper right", ncols=3, fontsize=10, frameon=False)
bottom.legend(loc="upper left", ncols=2, fontsize=10, frameon=False)

loss = {name: c[..., 0] for name, c in curves.items()}
negative = {name: (x < 0).double().mean(1) for name, x in loss.items()}  # 每个种子里为负的批占多少
assert negative["长的更对"].min() > 0.85 and negative["短的更对"].max() < 0.15
assert 0.4 < negative["对错与长度无关"].min() and negative["对错与长度无关"].max() < 0.6
early, late = (
    {name: x[:, part].mean().item() for name, x in loss.items()} for part in (slice(10), slice(-10, None))
)
# 抽样次数有限，读数只取两位；容差 0.01 留给别的 CPU 上个别样本的翻转
for name, first, last in [("长的更对", -0.25, -0.04), ("短的更对", 0.28, 0.06)]:
    assert abs(early[name] - first) < 0.01 and abs(late[name] - last) < 0.01, name
assert abs(loss["长的更对"].min().item() + 0.33) < 0.01  # 低于按条平均的下界 -0.187
assert loss["β=0"].abs().max() < 1e-12  # 每个种子每一批都恰好是 0
assert abs(early["β=0.04"] - 0.0006) < 1e-4 and abs(late["β=0.04"] - 0.0070) < 2e-4
for name in ("长的更对", "短的更对", "β=0", "β=0.04"):  # 奖励都在涨
    assert abs(reward[name][0] - 0.55) < 0.04 and abs(reward[name][1] - 0.78) < 0.02, name

# %%
#| label: split-groups
#| caption: 两组共八条、拆成两个微批时每个微批的第一步损失：按条平均只在整组不拆时逐个为零，打乱之后一正一负、平均仍为零；token 平均要用整批的分母才与整批一次算相同
#| echo: fold
generator = torch.Generator().manual_seed(3)
pair_rewards = torch.tensor([1.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0])
pair_advantages = group_advantages(pair_rewards, group_size=4)
pair_lengths = torch.tensor([12, 30, 25, 40, 10, 14, 8, 35])
width = 40
pair_mask = torch.arange(width) < pair_lengths[:, None]
pair_logits = torch.randn(8, width, generator=generator)
whole = torch.arange(8)
shuffled = torch.tensor([0, 4, 5, 3, 1, 2, 6, 7])


def micro_losses(order, *, mode, global_tokens=False):
    """两个微批各 4 行的损失与累加的梯度；global_tokens 时分子只求和，除以整批的 token 数。"""
    leaf = pair_logits.clone().requires_grad_()
    parts = []
    for rows in order.split(4):
        losses = clipped_surrogate_loss(leaf[rows], pair_logits[rows], pair_advantages[rows][:, None])
        if global_tokens:
            parts.append((losses * pair_mask[rows]).sum() / pair_mask.sum())
        else:
            parts.append(aggregate_loss(losses, pair_mask[rows], mode=mode) / 2)  # 除以累积步数
    (grad,) = torch.autograd.grad(sum(parts), leaf)
    scale = 1 if global_tokens else 2
    return [part.item() * scale for part in parts], sum(parts).item(), grad


rows, logged = [], {}
for name, order, mode, shared_count in [
    ("按条平均，整组", whole, MODES[0], False),
    ("按条平均，打乱", shuffled, MODES[0], False),
    ("token 平均，各除各的", shuffled, MODES[1], False),
    ("token 平均，整批分母", shuffled, MODES[1], True),
]:
    parts, total, grad = micro_losses(order, mode=mode, global_tokens=shared_count)
    leaf = pair_logits.clone().requires_grad_()
    once = policy_loss(leaf, pair_logits, pair_advantages, pair_mask, mode=mode)
    same = (grad - torch.autograd.grad(once, leaf)[0]).abs().max().item() < 1e-12
    assert same == (name != "token 平均，各除各的")  # 梯度与整批一次算是否相同
    assert (abs(total - once.item()) < 1e-12) == same
    logged[name] = (*parts, total, once.item())
    rows.append([name, *(shown(x) for x in logged[name])])
assert [row[1:] for row in rows] == [
    ["0", "0", "0", "0"],
    ["-0.5000", "+0.5000", "0", "0"],
    ["-0.1316", "+0.7755", "+0.3220", "+0.3793"],
    ["-0.0575", "+0.4368", "+0.3793", "+0.3793"],
]
Markdown(
    tabulate(
        rows,
        headers=["平均与切法", "微批 1", "微批 2", "累积后", "整批一次算"],
        tablefmt="github",
        disable_numparse=True,
    )
)
