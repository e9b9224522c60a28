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
# # 为什么不在 rollout 阶段保存 logp（训推不一致）：实验
#
# 页面 `docs/systems/rollout-logprobs.md` 里的数字都由下面的单元算出。低精度是模拟的：用 float64 计算，每一步把结果舍入到 bf16 或 fp16 能表示的数。恰好落在两个可表示数正中间的值，float64 的末位差一点就舍向另一边，所以换一台机器末位数字可能不同；断言都留了余地。

# %%
#| label: setup
import itertools
import math
from statistics import NormalDist

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.on_off_policy import decoupled_ppo_loss, effective_sample_size, importance_weights
from snippets.systems.rollout_logprobs import (
    masked_importance_weights,
    mismatch_metrics,
    truncated_importance_weights,
)

torch.manual_seed(0)
torch.set_num_threads(1)  # 求和次序不随线程数变
torch.set_default_dtype(torch.float64)


class TinyTransformer:
    """4 层、宽 64 的随机 Transformer；`dtype` 是每一步舍入到的格式，`fused` 表示算子融合、中间结果少舍入几次。"""

    def __init__(self, *, vocab_size=256, width=64, heads=4, layers=4, max_length=32, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def matrix(rows, columns, sd):
            return sd * torch.randn(rows, columns, generator=generator)

        self.heads, sd = heads, width**-0.5
        self.embedding, self.positions = matrix(vocab_size, width, 1.0), matrix(max_length, width, 0.5)
        self.blocks = [
            (
                matrix(width, 3 * width, sd),
                matrix(width, width, sd),
                matrix(width, 4 * width, sd),
                matrix(4 * width, width, sd / 2),
            )
            for _ in range(layers)
        ]
        self.head = matrix(width, vocab_size, 3 * sd)

    def log_probs(self, tokens, *, dtype, fused=False):
        def store(x):  # 舍入到 dtype，再回到 float64 继续算
            return x.to(dtype).to(torch.float64)

        inner = (lambda x: x) if fused else store  # 融合的核把这些中间结果留在高精度里

        def norm(x):
            return store(inner(x) / inner(x.square().mean(-1, keepdim=True) + 1e-6).sqrt())

        batch, length = tokens.shape
        hidden = store(store(self.embedding)[tokens] + store(self.positions)[:length])
        future = torch.ones(length, length, dtype=torch.bool).triu(1)
        for qkv, out, up, down in self.blocks:
            query, key, value = (
                store(norm(hidden) @ store(qkv))
                .reshape(batch, length, 3, self.heads, -1)
                .permute(2, 0, 3, 1, 4)
            )
            scores = inner(query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5)
            attention = inner(scores.masked_fill(future, -math.inf).softmax(-1)) @ value
            attention = store(attention.transpose(1, 2).reshape(batch, length, -1))
            hidden = store(hidden + inner(attention @ store(out)))
            gate = inner(torch.nn.functional.silu(inner(norm(hidden) @ store(up))))
            hidden = store(hidden + inner(gate @ store(down)))
        return store(norm(hidden) @ store(self.head)).log_softmax(-1)  # 词表上的 log softmax 不再舍入


def sample_rows(log_probs, generator):
    """逐行按分布采样（逆累积分布），形状 (N, V) -> (N,)。"""
    uniform = torch.rand(len(log_probs), 1, generator=generator)
    return (log_probs.exp().cumsum(-1) < uniform).sum(-1).clamp(max=log_probs.shape[-1] - 1)


# 三个随机初始化，各采 24 条、每条 32 个 token；采样用不舍入的模型，五种算法给同一批 token 打分
LENGTH, ROWS = 32, 24
engines = {
    "float32": (torch.float32, False),
    "bf16": (torch.bfloat16, False),
    "bf16 融合": (torch.bfloat16, True),
    "fp16": (torch.float16, False),
    "fp16 融合": (torch.float16, True),
}
scored = {name: [] for name in engines}
for seed in range(3):
    model, generator = TinyTransformer(seed=seed), torch.Generator().manual_seed(100 + seed)
    tokens = torch.zeros(ROWS, 1, dtype=torch.long)  # 第 0 个 token 是起始符
    for _ in range(LENGTH):
        tokens = torch.cat(
            [tokens, sample_rows(model.log_probs(tokens, dtype=torch.float64)[:, -1], generator)[:, None]], 1
        )
    for name, (dtype, fused) in engines.items():
        every = model.log_probs(tokens[:, :-1], dtype=dtype, fused=fused)
        scored[name].append(every.gather(-1, tokens[:, 1:, None])[..., 0])
scored = {name: torch.cat(parts) for name, parts in scored.items()}  # 每个 (72, 32)
all_tokens = torch.ones(3 * ROWS, LENGTH, dtype=torch.bool)
PAIRS = [  # 训练端，推理引擎
    ("float32", "bf16"),
    ("bf16", "bf16 融合"),
    ("float32", "fp16"),
    ("fp16", "fp16 融合"),
]

# %%
#| label: precision-gap
#| caption: 同一组权重、同一批 token，训练端与推理端对数概率之差的分布：bf16 比 fp16 整体大约八倍；两端都是 bf16、只有舍入的位置不同，差距仍然相近
#| echo: fold
gaps = {pair: (scored[pair[0]] - scored[pair[1]]).abs().flatten() for pair in PAIRS}
fig, ax = plt.subplots(figsize=(6.0, 3.3))
bins = torch.logspace(-5, 0, 41)
for pair, style, color, label in [
    (PAIRS[0], "-", "C0", "float32 对 bf16"),
    (PAIRS[1], "--", "C3", "bf16 对 bf16（融合）"),
    (PAIRS[2], "-", "C1", "float32 对 fp16"),
    (PAIRS[3], "--", "C2", "fp16 对 fp16（融合）"),
]:
    counts = torch.histogram(gaps[pair].clamp(1e-5, 1), bins)[0] / gaps[pair].numel() * 100
    ax.stairs(counts.tolist(), bins.tolist(), ls=style, color=color, label=label, lw=1.6)
ax.set_xscale("log")
ax.set_xlim(1e-5, 1)
ax.set_ylim(0, 17)
ax.set_xlabel("同一个 token 的对数概率之差（nat，绝对值，对数轴）")
ax.set_ylabel("占比（%）")
ax.legend(fontsize=10, loc="upper left")
mean_gap = {pair: gap.mean().item() for pair, gap in gaps.items()}
for wide, narrow in [(PAIRS[0], PAIRS[2]), (PAIRS[1], PAIRS[3])]:
    assert 7 < mean_gap[wide] / mean_gap[narrow] < 9  # bf16 存 7 位尾数，fp16 存 10 位：2³ = 8
    assert 7 < (gaps[wide].median() / gaps[narrow].median()).item() < 9
assert 0.9 < mean_gap[PAIRS[1]] / mean_gap[PAIRS[0]] < 1.3
assert all(0.015 < mean_gap[pair] < 0.025 for pair in PAIRS[:2])
rare = scored["float32"].flatten() < scored["float32"].median()  # 概率低的一半 token
assert 1.4 < (gaps[PAIRS[0]][rare].mean() / gaps[PAIRS[0]][~rare].mean()).item() < 1.7

# %%
#| label: precision-table
#| caption: 四种组合的对数概率之差、单个 token 的比值范围与 32 个 token 连乘的比值范围，样本是 72 条各 32 个 token
#| echo: fold
rows, spread = [], {}
for old, rollout in PAIRS:
    metrics = mismatch_metrics(scored[old], scored[rollout], all_tokens)
    token = importance_weights(scored[old], scored[rollout], all_tokens, level="token")
    log_ratio = scored[old] - scored[rollout]
    spread[old, rollout] = log_ratio.std().item()
    # 连乘的对数方差除以 T·σ²：1 表示各位置像独立的一样累加
    growth = (log_ratio.sum(1).var() / (LENGTH * log_ratio.var())).item()
    assert 0.7 < growth < 1.4, growth
    rows.append(
        [
            f"{old} 对 {rollout}",
            f"{metrics['mean_abs']:.2g}",
            f"{spread[old, rollout]:.1g}",
            f"{token.min().item():.2f}–{token.max().item():.2f}",
            f"{metrics['seq_ratio_min']:.2f}–{metrics['seq_ratio_max']:.2f}",
        ]
    )
assert all(0.02 < spread[pair] < 0.03 for pair in PAIRS[:2])  # bf16
assert all(0.0025 < spread[pair] < 0.0035 for pair in PAIRS[2:])  # fp16
for row, expected in [(0, (0.75, 1.4)), (2, (0.97, 1.04))]:  # float32 对 bf16、对 fp16
    ends = [float(x) for x in rows[row][4].split("–")]
    assert all(abs(math.log(x / y)) < 4 * spread[PAIRS[row]] for x, y in zip(ends, expected, strict=True))
Markdown(
    tabulate(
        rows,
        headers=["训练端对引擎", "平均差", "标准差", "token 比值", "连乘比值"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: ess-vs-length
#| caption: 每 token 噪声的标准差为 0.02 时，整条权重的有效样本比例随长度指数下降；截断与掩码把它托住，代价是权重的均值一路低于一
#| echo: fold
phi = NormalDist().cdf


def moments(variance, cap, *, keep):
    """W = exp(−s²/2 + sZ)：截断（keep 为真）或掩码（keep 为假）之后的均值与二阶矩。"""
    s = math.sqrt(variance)
    d = (math.log(cap) + variance / 2) / s
    mean, second = phi(d - s), math.exp(variance) * phi(d - 2 * s)
    if keep:  # 超过上限的样本留着，权重是 cap
        mean, second = mean + cap * phi(-d), second + cap**2 * phi(-d)
    return mean, second


SIGMA = 0.02
lengths = [round(10 ** (1 + k / 12)) for k in range(43)]  # 10 到约 31,600
curves = {"不截断": [], "截断到 2": [], "超过 3 归零": []}
for length in lengths:
    variance = length * SIGMA**2
    curves["不截断"].append((math.exp(-variance), 1.0))
    for name, cap, keep in [("截断到 2", 2.0, True), ("超过 3 归零", 3.0, False)]:
        mean, second = moments(variance, cap, keep=keep)
        curves[name].append((mean**2 / second, mean))
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.3), sharey=True)
for index, (ax, title) in enumerate(zip(axes, ("有效样本比例", "权重的均值"), strict=True)):
    for (name, values), style, color in zip(
        curves.items(), ("-", "--", "-."), ("C0", "C1", "C2"), strict=True
    ):
        ax.plot(lengths, [value[index] for value in values], style, color=color, label=name)
    ax.set_xscale("log")
    ax.set_xlim(10, 30000)
    ax.set_ylim(0, 1.08)
    ax.set_xticks([10, 100, 1000, 10000], ["10", "100", "1千", "1万"])
    ax.set_title(title, fontsize=11)
    ax.set_xlabel("回答长度（token）")
axes[0].legend(fontsize=10, loc="lower left")


def at(name, variance):
    cap, keep = (2.0, True) if name == "截断到 2" else (3.0, False)
    mean, second = moments(variance, cap, keep=keep)
    return f"{mean**2 / second:.2f} {mean:.2f}"


law = {(s, t): math.exp(-t * s**2) for s in (0.02, 0.05, 0.003) for t in (100, 1000, 5000, 10000)}
assert [f"{law[0.02, t]:.2f}" for t in (100, 1000, 5000)] == ["0.96", "0.67", "0.14"]
assert [f"{law[0.05, t]:.2f}" for t in (100, 1000)] == ["0.78", "0.08"] and law[0.05, 5000] < 1e-5
assert f"{law[0.003, 10000]:.2f}" == "0.91"
assert [at(name, 0.4) for name in ("截断到 2", "超过 3 归零")] == ["0.77 0.94", "0.73 0.92"]  # 1,000 个 token
assert [at(name, 2.0) for name in ("截断到 2", "超过 3 归零")] == ["0.49 0.65", "0.42 0.53"]  # 5,000 个
# 用参考实现与 20 万条样本核对闭式
noise = torch.randn(200_000, 1, generator=torch.Generator().manual_seed(3))
for variance in (0.4, 2.0):
    log_w = -variance / 2 + math.sqrt(variance) * noise
    one, zero = torch.ones_like(log_w, dtype=torch.bool), torch.zeros_like(log_w)
    sampled = {
        "截断到 2": truncated_importance_weights(log_w, zero, one, level="sequence", cap=2.0),
        "超过 3 归零": masked_importance_weights(log_w, zero, one, level="sequence", low=0.0, high=3.0),
    }
    for name, weights in sampled.items():
        ess, mean = (float(x) for x in at(name, variance).split())
        assert abs(effective_sample_size(weights[:, 0]).item() / len(weights) - ess) < 0.01
        assert abs(weights.mean().item() - mean) < 0.01

# %%
#| label: gradient-error
#| caption: 长度 5、词表 3 的全部 243 条序列，20 对策略的中位数：几种修正的期望梯度的相对偏差，以及 64 条、4096 条平均之后的相对总误差
#| echo: fold
sequences = torch.tensor(list(itertools.product(range(3), repeat=5)))  # (243, 5)
offsets = [(3**t - 1) // 2 for t in range(5)]  # 每个前缀一行 logits，共 121 行
codes = [sum(sequences[:, k] * 3 ** (t - 1 - k) for k in range(t)) for t in range(5)]
prefixes = torch.stack([torch.full((243,), 0) + offsets[t] + codes[t] for t in range(5)], 1)
every = torch.ones_like(sequences, dtype=torch.bool)


def tokens_of(logits):
    return logits.log_softmax(-1)[prefixes, sequences]  # (243, 5)


def scores_of(logits):
    """每个 token 的得分函数，(243, 5, 363)。"""
    index, time = torch.arange(243)[:, None], torch.arange(5)
    scores = torch.zeros(243, 5, *logits.shape)
    scores[index, time, prefixes, sequences] = 1.0
    scores[index, time, prefixes] -= logits.softmax(-1)[prefixes]
    return scores.flatten(2)


def coefficients_of(loss, log_probs):
    leaf = log_probs.clone().requires_grad_(True)
    return -torch.autograd.grad(loss(leaf).sum(), leaf)[0]


def engine_policies(seed, outliers):
    """训练端的 logits，与加了引擎误差的：处处 N(0, 0.02²)，再有 outliers 比例的前缀加 N(0, 2²)。"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(121, 3, generator=generator)
    small = 0.02 * torch.randn(121, 3, generator=generator)
    hit = torch.rand(121, 1, generator=generator) < outliers
    large = 2.0 * torch.randn(121, 3, generator=generator)
    rewards = (torch.rand(243, generator=generator) < 0.3).double()
    return logits, logits + small + hit * large, rewards


def weights_of(old, rollout):
    pair = (old, rollout, every)
    return {
        "只重算，不修正": torch.ones_like(old),
        "token，截断到 2": truncated_importance_weights(*pair, cap=2.0),
        "token，IcePop": masked_importance_weights(*pair),
        "几何平均作门": masked_importance_weights(*pair, level="geometric"),
        "整条，截断到 2": truncated_importance_weights(*pair, level="sequence", cap=2.0),
        "整条，超过 3 归零": masked_importance_weights(*pair, level="sequence", low=0.0, high=3.0),
        "整条，不截断": importance_weights(*pair, level="sequence"),
    }


def coefficients_by_use(old, rollout, advantages):
    """第一步（当前策略就是 π_old）上，每种写法给每个 token 的系数。"""
    uses = {
        name: coefficients_of(lambda lp, w=w: decoupled_ppo_loss(lp, old, w, advantages), old)
        for name, w in weights_of(old, rollout).items()
    }
    uses["旁路：旧策略取 μ"] = coefficients_of(
        lambda lp: clipped_surrogate_loss(lp, rollout, advantages), old
    )
    return uses


def errors(outliers):
    table = {}
    for seed in range(20):
        logits, rollout_logits, rewards = engine_policies(seed, outliers)
        old, rollout = tokens_of(logits), tokens_of(rollout_logits)
        sampling, target = rollout.sum(1).exp(), old.sum(1).exp()  # 真正采样的、想要的
        advantages = (rewards - sampling @ rewards)[:, None]
        scores = scores_of(logits)
        truth = (target * advantages[:, 0]) @ scores.sum(1)
        uses = coefficients_by_use(old, rollout, advantages)
        for name, coefficients in uses.items():
            estimates = (coefficients[..., None] * scores).sum(1)
            mean = sampling @ estimates
            variance = (sampling @ (estimates - mean).square().sum(1)) / truth.square().sum()
            bias = (mean - truth).norm() / truth.norm()
            totals = [(bias.square() + variance / count).sqrt().item() for count in (64, 4096)]
            table.setdefault(name, []).append([bias.item(), *totals])
    return {name: torch.tensor(values).quantile(0.5, 0).tolist() for name, values in table.items()}


rounding, heavy = errors(0.0), errors(0.05)
order = list(heavy)[:1] + list(heavy)[-1:] + list(heavy)[1:-1]


def shown(value):
    return "0" if value < 1e-10 else f"{value:.2f}"


def close(rows, expected):
    """表中第二列起与给定的数相差不到 0.015（末位可能进退一格）；"0" 必须恰为 0。"""
    return all(
        abs(float(cell) - float(number)) < 0.015 and (number != "0" or cell == "0")
        for row, numbers in zip(rows, expected, strict=True)
        for cell, number in zip(row[1:], numbers, strict=True)
    )


rows = [[name, shown(rounding[name][0]), *map(shown, heavy[name])] for name in order]
expected = [
    ["0.03", "0.26", "1.11", "0.29"],
    ["0.02", "0.22", "1.13", "0.28"],
    ["0.02", "0.21", "1.10", "0.24"],
    ["0.02", "0.21", "1.10", "0.25"],
    ["0.02", "0.21", "1.19", "0.27"],
    ["0", "0.11", "1.08", "0.16"],
    ["0", "0.14", "1.08", "0.19"],
    ["0", "0", "1.64", "0.20"],
]
assert close(rows, expected)
Markdown(
    tabulate(
        rows,
        headers=["写法", "舍入：偏差", "重尾：偏差", "64 条误差", "4096 条误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: top-p-ratio
#| caption: 引擎用 top-p 采样而训练端在整个词表上归一化时，64 个 token 连乘的比值系统地偏小；温度没对上也一样
#| echo: fold
chain = 2.0 * torch.randn(64, 64, generator=torch.Generator().manual_seed(5))  # 一阶马尔可夫链，词表 64
full = chain.log_softmax(-1)


def nucleus(log_probs, top_p):
    """保留概率最大的、累计刚达到 top_p 的那些 token，再归一化。"""
    probs, order = log_probs.exp().sort(-1, descending=True)
    outside = (probs.cumsum(-1) - probs >= top_p).gather(-1, order.argsort(-1))
    return log_probs.masked_fill(outside, -math.inf).log_softmax(-1)


rows, ratios = [], {}
for name, engine in [
    ("top-p 1", nucleus(full, 1.0)),
    ("top-p 0.99", nucleus(full, 0.99)),
    ("top-p 0.95", nucleus(full, 0.95)),
    ("top-p 0.9", nucleus(full, 0.9)),
    ("温度 0.8，训练端没除", (chain / 0.8).log_softmax(-1)),
]:
    generator = torch.Generator().manual_seed(6)
    state, old, rollout = torch.zeros(1000, dtype=torch.long), [], []
    for _ in range(64):
        token = sample_rows(engine[state], generator)
        old.append(full[state, token])
        rollout.append(engine[state, token])
        state = token
    pair = (torch.stack(old, 1), torch.stack(rollout, 1), torch.ones(1000, 64, dtype=torch.bool))
    token, sequence = (importance_weights(*pair, level=level) for level in ("token", "sequence"))
    ratios[name] = (token.mean().item(), sequence[:, 0].median().item())
    kept = masked_importance_weights(*pair, level="sequence", low=0.5, high=2.0)[:, 0] > 0
    rows.append(
        [
            name,
            f"{ratios[name][0]:.2f}",
            f"{ratios[name][1]:.1g}",
            f"{100 * kept.double().mean().item():.0f}%",
        ]
    )
for top_p in (0.99, 0.95, 0.9):  # 比值就是候选集的总概率 Z，必在 [top_p, 1]
    engine = nucleus(full, top_p)
    inside = engine.isfinite()
    mass = (full.exp() * inside).sum(-1, keepdim=True)
    torch.testing.assert_close((full - engine)[inside], mass.log().expand_as(full)[inside])
    assert (mass >= top_p - 1e-12).all() and (mass < 1).all()
for name, mean, median in [
    ("top-p 1", 1.0, 1.0),
    ("top-p 0.99", 0.99, 0.55),
    ("top-p 0.95", 0.952, 0.0435),
    ("top-p 0.9", 0.905, 0.00166),
    ("温度 0.8，训练端没除", 1.0, 0.042),
]:
    assert abs(ratios[name][0] - mean) < 0.003 and abs(ratios[name][1] / median - 1) < 0.1
assert [row[3] for row in rows[:4]] == ["100%", "100%", "0%", "0%"] and 5 < float(rows[4][3][:-1]) < 13
Markdown(
    tabulate(
        rows,
        headers=["引擎的采样", "token 比值均值", "连乘中位数", "落在 0.5–2"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: wrong-weights
#| caption: 一对策略、已更新几步之后，几种权重的期望梯度与样本真来自训练端旧策略时的梯度相比，只有第一行相同
#| echo: fold
logits, rollout_logits, rewards = engine_policies(0, 0.05)
old, rollout = tokens_of(logits), tokens_of(rollout_logits)
current_logits = logits + 0.3 * torch.randn(121, 3, generator=torch.Generator().manual_seed(9))
current, advantages = tokens_of(current_logits), rewards[:, None] - 0.3
wide = {"clip_low": 1e6, "clip_high": 1e6}  # 不裁剪，只看权重


def product(numerator, denominator):
    return importance_weights(numerator, denominator, every, level="sequence")


def attached(lp):
    """权重里的训练端概率没有切断梯度。"""
    weight = (lp - rollout).sum(1, keepdim=True).exp() * (old - current).sum(1, keepdim=True).exp()
    return weight * clipped_surrogate_loss(lp, old, advantages, **wide)


right = product(old, rollout)
uses = {
    "旧策略比 μ（正确）": lambda lp: decoupled_ppo_loss(lp, old, right, advantages, **wide),
    "不修正": lambda lp: clipped_surrogate_loss(lp, old, advantages, **wide),
    "取倒数": lambda lp: decoupled_ppo_loss(lp, old, 1 / right, advantages, **wide),
    "分子用当前策略": lambda lp: decoupled_ppo_loss(lp, old, product(current, rollout), advantages, **wide),
    "比的是旧策略，不是 μ": lambda lp: decoupled_ppo_loss(lp, old, product(current, old), advantages, **wide),
    "旁路之后又乘一次": lambda lp: decoupled_ppo_loss(lp, rollout, right, advantages, **wide),
    "权重没有切断": attached,
}
scores = scores_of(current_logits)
wanted = coefficients_of(uses["不修正"], current)
truth = old.sum(1).exp() @ (wanted[..., None] * scores).sum(1)  # 样本真来自 π_old 时的梯度
rows = []
for name, loss in uses.items():
    gradient = rollout.sum(1).exp() @ (coefficients_of(loss, current)[..., None] * scores).sum(1)
    cosine = torch.cosine_similarity(gradient, truth, 0).item()
    rows.append([name, shown(((gradient - truth).norm() / truth.norm()).item()), f"{cosine:.2f}"])
expected = [
    ["0", "1.00"],
    ["1.22", "0.49"],
    ["4.06", "0.17"],
    ["0.43", "0.92"],
    ["1.18", "0.51"],
    ["9.80", "0.37"],
    ["4.93", "0.98"],
]
assert close(rows, expected)
Markdown(tabulate(rows, headers=["权重", "偏差", "余弦"], tablefmt="github", disable_numparse=True))
