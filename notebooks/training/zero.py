# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kb:
#     tcp: true
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # DeepSpeed ZeRO 与 ZeRO-3（FSDP）：实验
#
# 页面 `docs/training/zero.md` 里的每个数字都由下面的单元算出。训练真的起三个进程，经 gloo 通信；GB 是 $10^9$ 字节。

# %%
#| label: setup
import math
from dataclasses import asdict

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.training.adamw import adamw_step
from snippets.training.zero import (
    fetch_seconds,
    launch,
    pad_flat,
    zero_model_state_bytes,
    zero_sent_bytes,
    zero_train,
)

torch.manual_seed(0)
generator = torch.Generator().manual_seed(0)
STAGES = (0, 1, 2, 3)
NAMES = ("数据并行", "ZeRO-1", "ZeRO-2", "ZeRO-3")

# %%
#| label: memory-vs-gpus
#| caption: 7.5B 参数时每张卡的模型状态随卡数变化，双对数轴：第 1 级停在 30 GB，第 2 级停在 15 GB，只有第 3 级一直按卡数下降
#| echo: fold
fig, ax = plt.subplots(figsize=(6.0, 3.6))
counts = [2**i for i in range(11)]
memory = {s: [zero_model_state_bytes(7.5e9, stage=s, dp_size=n) / 1e9 for n in counts] for s in STAGES}
styles = [("-", "o"), ("--", "s"), ("-.", "^"), (":", "D")]
for stage, (line, marker) in zip(STAGES, styles, strict=True):
    ax.plot(counts, memory[stage], line, marker=marker, color=f"C{stage}", markersize=5)
for stage, text, x, y in [
    (0, "数据并行 120", 1024, 185),
    (1, "ZeRO-1 → 30", 1024, 47),
    (2, "ZeRO-2 → 15", 1024, 10),
    (3, "ZeRO-3 → 0", 260, 0.28),
]:
    ax.text(x, y, text, color=f"C{stage}", fontsize=10.5, ha="right", va="center")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks([1, 4, 16, 64, 256, 1024], ["1", "4", "16", "64", "256", "1024"])
ax.set_yticks([0.1, 1, 10, 100], ["0.1", "1", "10", "100"])
ax.set_ylim(0.08, 320)
ax.set_xlabel("分片的卡数（对数轴）")
ax.set_ylabel("每张卡的模型状态（GB，对数轴）")

at_64 = [memory[s][counts.index(64)] for s in STAGES]
assert [f"{x:.1f}" for x in at_64] == ["120.0", "31.4", "16.6", "1.9"]
assert abs(memory[1][-1] - 30) < 0.1 and abs(memory[2][-1] - 15) < 0.2 and memory[3][-1] < 0.12
assert f"{memory[3][counts.index(8)]:.1f}" == "15.0"  # 混合分片：64 张卡，每 8 张一组

# %%
#| label: paper-table-at-64
#| caption: 64 张卡时三种大小的模型每张卡的模型状态，单位 GB，对应论文表 1 的 64 一行
#| echo: fold
rows = []
for name, num_params in (("7.5B", 7.5e9), ("128B", 128e9), ("1T", 1e12)):
    values = [zero_model_state_bytes(num_params, stage=s, dp_size=64) / 1e9 for s in STAGES]
    # 论文把一百以上的数截去小数
    rows.append([name] + [f"{x:.3g}" if x < 100 else f"{math.floor(x)}" for x in values])
assert rows[0][1:] == ["120", "31.4", "16.6", "1.88"]
assert rows[1][1:] == ["2048", "536", "284", "32"]
assert rows[2][1:] == ["16000", "4187", "2218", "250"]
Markdown(tabulate(rows, headers=["参数", *NAMES], tablefmt="github", disable_numparse=True))

# %%
#| label: three-real-processes
#| caption: 三个 gloo 进程上真的训练：状态字节、每次更新发出几趟、最终参数与单进程的最大差；一趟是参数字节乘三分之二，M 是梯度累积的步数，0 表示小于 1e-12
#| echo: fold
DP_SIZE, WIDTHS, UPDATES = 3, [5, 7, 3, 2], 2
EPS = 0.1  # Adam 对梯度的倍数不敏感；eps 取大，忘了除以卡数就看得出来


def randn(*size):
    return torch.randn(*size, generator=generator, dtype=torch.float64)


layers = [randn(o, i + 1) / i**0.5 for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)]
inputs, targets = randn(DP_SIZE, 8, 2, WIDTHS[0]), randn(DP_SIZE, 8, 2, WIDTHS[-1])  # (卡，微批，B，宽)


def train_all_stages(rank, dp_size, x, y):
    return {
        (stage, m): zero_train(
            rank,
            dp_size,
            layers,
            x[: UPDATES * m],
            y[: UPDATES * m],
            stage=stage,
            num_micro_batches=m,
            eps=EPS,
        )
        for stage in STAGES
        for m in (1, 4)
    }


runs = launch(train_all_stages, [(inputs[rank], targets[rank]) for rank in range(DP_SIZE)])


def single_process(m, *, scale=1, eps=EPS):
    """一个进程吃下所有卡的样本：整批的梯度，整个的 AdamW。"""
    weights = [layer.clone() for layer in layers]
    moments = [(torch.zeros_like(w), torch.zeros_like(w)) for w in weights]
    for step in range(UPDATES):
        x, y = (t[:, step * m : (step + 1) * m].flatten(0, 2) for t in (inputs, targets))
        leaves = [w.requires_grad_() for w in weights]
        for w in leaves:
            x = torch.tanh(x @ w[:, :-1].T + w[:, -1])
        grads = torch.autograd.grad(scale * F.mse_loss(x, y), leaves)
        stepped = [
            adamw_step(w.detach(), g, *s, step=step + 1, eps=eps)
            for w, g, s in zip(leaves, grads, moments, strict=True)
        ]
        weights, moments = [s[0] for s in stepped], [s[1:] for s in stepped]
    return weights


truth = {m: single_process(m) for m in (1, 4)}
num_params = sum(pad_flat(layer, dp_size=DP_SIZE).numel() for layer in layers)
assert (sum(layer.numel() for layer in layers), num_params) == (74, 75)  # 8 个参数的那层补一个零
trip = num_params * 8 * (DP_SIZE - 1) / DP_SIZE
rows, eight = [], dict(weight_bytes=8, grad_bytes=8)
for stage, name in zip(STAGES, NAMES, strict=True):
    formula = zero_model_state_bytes(num_params, stage=stage, dp_size=DP_SIZE, optimizer_bytes=24, **eight)
    trips, gap = {}, 0.0
    for m in (1, 4):
        sent = zero_sent_bytes(num_params, stage=stage, dp_size=DP_SIZE, num_micro_batches=m, **eight)
        for run in runs:
            result = run[stage, m]
            assert abs(result["held"] - formula) < 1e-6 and abs(result["sent"] - UPDATES * sent) < 1e-6
            pairs = zip(result["parameters"], truth[m], strict=True)
            gap = max([gap] + [(a - b).abs().max().item() for a, b in pairs])
        trips[m] = runs[0][stage, m]["sent"] / UPDATES / trip
    assert gap < 1e-12
    rows.append([name, runs[0][stage, 1]["held"], f"{trips[1]:.0f}", f"{trips[4]:.0f}", "0"])
assert [row[1] for row in rows] == [3000, 1800, 1400, 1000]


def tripled(eps):
    """归约后忘了除以 3：最终参数与正确的最大差。"""
    pairs = zip(single_process(1, scale=3, eps=eps), single_process(1, eps=eps), strict=True)
    return max((a - b).abs().max().item() for a, b in pairs)


assert [f"{tripled(eps):.1e}" for eps in (1e-8, EPS)] == ["1.1e-09", "5.3e-04"]
assert [row[2:4] for row in rows] == [["2", "2"], ["2", "2"], ["2", "5"], ["3", "12"]]
Markdown(
    tabulate(
        rows,
        headers=["级别", "状态（字节）", "M=1（趟）", "M=4（趟）", "与单进程差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: broadcast-vs-all-gather
#| caption: 同一层参数送到所有卡的时间，与最重的卡分到的参数；左列整层归一张卡并广播，右列逐张量切开再收集
#| echo: fold
config = DENSE_CONFIGS["Llama-2-7B"]
embedding = config.vocab_size * config.hidden_size
total = llama_num_params(**asdict(config))
layer_params = (total - 2 * embedding - config.hidden_size) // config.num_layers  # 减去最后的归一化
units = [embedding, *[layer_params] * config.num_layers, embedding]
bandwidth = dict(dp_size=8, link_bandwidth=300e9)  # 假设：卡间每个方向 300 GB/s，每张卡 PCIe 32 GB/s
rows = []
for name, host in (("参数在显存，取一层（ms）", math.inf), ("参数在内存，取一层（ms）", 32e9)):
    whole, split = (
        1e3 * fetch_seconds(2 * layer_params, host_bandwidth=host, is_split=is_split, **bandwidth)
        for is_split in (False, True)
    )
    rows.append([name, whole, split, whole / split])


def heaviest(sizes, num_ranks):
    """从大到小，每层给当前最轻的卡。"""
    loads = [0] * num_ranks
    for size in sorted(sizes, reverse=True):
        loads[loads.index(min(loads))] += size
    return max(loads), loads.count(0)


for num_ranks in (8, 64):
    whole, idle = heaviest(units, num_ranks)
    split = sum(units) / num_ranks
    rows.append([f"{num_ranks} 张卡，最重的卡（百万）", whole / 1e6, split / 1e6, whole / split])
assert idle == 30  # 64 张卡只有 34 个单元可分
assert [f"{row[3]:.2f}" for row in rows] == ["1.14", "5.07", "1.12", "1.92"]
assert [f"{row[1]:.2f} {row[2]:.2f}" for row in rows[:2]] == ["1.35 1.18", "14.00 2.76"]
Markdown(
    tabulate(
        rows,
        headers=["比什么", "归一张卡", "切开", "倍数"],
        tablefmt="github",
        floatfmt=("", ".2f", ".2f", ".2f"),
    )
)

# %%
#| label: wrong-formulas
#| caption: 7.5B、64 张卡，几种流传的算法与论文的数对照，单位 GB
#| echo: fold
psi, n = 7.5, 64
rows = [
    ["ZeRO-1 连权重、梯度也除以卡数", 16 * psi / n, zero_model_state_bytes(psi, stage=1, dp_size=n)],
    ["ZeRO-1 漏了 4 字节主权重", 4 * psi + 8 * psi / n, zero_model_state_bytes(psi, stage=1, dp_size=n)],
    ["ZeRO-2 只切优化器", 4 * psi + 12 * psi / n, zero_model_state_bytes(psi, stage=2, dp_size=n)],
    ["ZeRO-3 是 12/N", 12 * psi / n, zero_model_state_bytes(psi, stage=3, dp_size=n)],
]
assert [f"{row[1]:.2f} {row[2]:.2f}" for row in rows] == [
    "1.88 31.41",
    "30.94 31.41",
    "31.41 16.64",
    "1.41 1.88",
]
Markdown(tabulate(rows, headers=["流传的算法", "得到", "应为"], tablefmt="github", floatfmt=".2f"))

# %%
#| label: seven-b-on-eight-gpus
#| caption: Llama-2-7B 放在 8 张卡上：每张卡的模型状态，与一次更新里每张卡发出的数据，M 是梯度累积的步数，单位 GB
#| echo: fold
rows = []
for stage, name in zip(STAGES, NAMES, strict=True):
    states = zero_model_state_bytes(total, stage=stage, dp_size=8) / 1e9
    traffic = [zero_sent_bytes(total, stage=stage, dp_size=8, num_micro_batches=m) / 1e9 for m in (1, 8)]
    rows.append([name, states, *traffic])
assert [f"{row[1]:.1f}" for row in rows] == ["107.8", "37.1", "25.3", "13.5"]
assert [f"{row[2]:.1f} {row[3]:.1f}" for row in rows] == [
    "23.6 23.6",
    "23.6 23.6",
    "23.6 106.1",
    "35.4 283.0",
]
# DeepSpeed 的估计多算一份 float32 梯度
assert f"{zero_model_state_bytes(total, stage=2, dp_size=8, grad_bytes=6) / 1e9:.1f}" == "28.6"
Markdown(
    tabulate(rows, headers=["级别", "模型状态", "发出，M=1", "发出，M=8"], tablefmt="github", floatfmt=".1f")
)
