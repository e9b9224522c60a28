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
# # 为什么大模型都是 Decoder-Only 架构（Causal LM）：实验
#
# 页面 `docs/architecture/decoder-only.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.decoder_only import (
    attention_matrix,
    effective_rank,
    log_det_causal,
    prefix_lm_mask,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def rms(x):
    """没有增益的 RMSNorm。"""
    return x * x.square().mean(-1, keepdim=True).rsqrt()


# %%
#| label: effective-rank-by-logit-std
#| caption: 256 个 token、每头 64 维，五组随机的 q 与 k：打分标准差小时因果注意力的有效秩高，0.4 以上双向的高，两条曲线交叉
T, D = 256, 64
CAUSAL, FULL = prefix_lm_mask(num_tokens=T), prefix_lm_mask(num_tokens=T, prefix_length=T)
stds = [0.01, 0.03, 0.1, 0.2, 0.3, 0.4, 0.5, 1.0, 2.0, 4.0]


def unit_scores(seed):
    """标准正态的 q、k，除以根号 d 之后标准差约为 1。"""
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(T, D, generator=generator) for _ in range(2))
    return q @ k.T / math.sqrt(D)


ranks = {"full": [], "causal": []}
for seed in range(5):
    scores = torch.stack([std * unit_scores(seed) for std in stds])
    ranks["full"].append(effective_rank(attention_matrix(scores, FULL)))
    ranks["causal"].append(effective_rank(attention_matrix(scores, CAUSAL)))
ranks = {name: torch.stack(values) for name, values in ranks.items()}  # (种子, 标准差)

fig, ax = plt.subplots(figsize=(6.0, 3.2))
for name, color, line, text in (("full", "C1", "s--", "双向"), ("causal", "C0", "o-", "因果")):
    low, mid, high = ranks[name].amin(0), ranks[name].quantile(0.5, dim=0), ranks[name].amax(0)
    ax.fill_between(stds, low, high, color=color, alpha=0.25, linewidth=0)
    ax.plot(stds, mid, line, color=color, markersize=4, label=text)
ax.set(xscale="log", xlabel="打分的标准差", ylabel="注意力矩阵的有效秩", ylim=(0, 185))
ax.set_xticks([0.01, 0.1, 1], ["0.01", "0.1", "1"])
ax.legend(loc="upper left")

at = {std: i for i, std in enumerate(stds)}
gap = ranks["full"] - ranks["causal"]
assert (gap[:, : at[0.3] + 1] < 0).all() and (gap[:, at[0.4] :] > 0).all()  # 五个种子都在 0.3 与 0.4 之间交叉
for name, std, low, high in (
    ("full", 0.01, 1.6, 1.8),
    ("causal", 0.01, 47, 49),
    ("full", 1.0, 155, 159),
    ("causal", 1.0, 112, 120),
):
    assert ((low < ranks[name][:, at[std]]) & (ranks[name][:, at[std]] < high)).all()

# %%
#| label: determinant-is-not-conditioning
#| caption: 打分标准差 0.01 与 1 的双向、因果注意力以及单位矩阵：行列式的对数、最小与最大奇异值之比、有效秩、乘上值之后的秩
value = torch.randn(T, D, generator=torch.Generator().manual_seed(9))
matrices = {
    f"{name}，{std}": attention_matrix(std * unit_scores(0), mask)
    for std in (0.01, 1)
    for name, mask in (("双向", FULL), ("因果", CAUSAL))
} | {"单位矩阵": torch.eye(T)}
rows, log_det, ratio, output_rank = [], {}, {}, {}
for name, a in matrices.items():
    sigma = torch.linalg.svdvals(a)
    log_det[name] = torch.linalg.slogdet(a).logabsdet.item() / math.log(10)
    ratio[name] = (sigma[-1] / sigma[0]).item()
    output_rank[name] = int(torch.linalg.matrix_rank(a @ value, rtol=1e-9))
    shown = "小于 1e-13" if ratio[name] < 1e-13 else f"{ratio[name]:.0e}"
    rows.append([name, f"{log_det[name]:.0f}", shown, f"{effective_rank(a):.0f}", output_rank[name]])

for name in ("因果，0.01", "因果，1"):  # 行列式就是对角线之积
    assert abs(log_det_causal(matrices[name]).item() / math.log(10) - log_det[name]) < 1e-6
assert round(log_det["因果，0.01"]) == -507 and round(log_det["因果，1"]) == -572
assert abs(log_det["因果，0.01"] + math.lgamma(T + 1) / math.log(10)) < 1  # 均匀时恰是 1/T!
assert 1 / (4 * T) < ratio["因果，0.01"] < 2e-3 and ratio["因果，1"] < 1e-13
assert 1e-5 < ratio["双向，1"] < 1e-3 and 1e-10 < ratio["双向，0.01"] < 1e-6
assert torch.linalg.matrix_rank(matrices["因果，1"]) < T == torch.linalg.matrix_rank(matrices["双向，1"])
assert all(math.isfinite(x) for x in log_det.values())  # 双向的行列式也不是 0
assert all(rank == D for rank in output_rank.values())  # 上限就是 D
Markdown(
    tabulate(
        rows,
        headers=[
            "注意力，标准差",
            r"$\log_{10}\lvert\det A\rvert$",
            r"$\sigma_{\min}/\sigma_{\max}$",
            "有效秩",
            r"$\operatorname{rank}(AV)$",
        ],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: collapse-by-depth
#| caption: 随机权重、64 个 token：纯注意力时双向六层就塌到同一行，因果慢得多；加上残差之后两者接近，第十二层都还留着一大截
tokens = width = 64
depth = 12


def residual_by_layer(mask, *, skip, seed):
    """各层之后，去掉行均值剩下的比例；每层先 RMSNorm，只有一个头，没有前馈。"""
    generator = torch.Generator().manual_seed(seed)
    x, out = torch.randn(tokens, width, generator=generator), []
    for _ in range(depth + 1):
        out.append(((x - x.mean(0)).norm() / x.norm()).item())
        w_q, w_k, w_v = (torch.randn(width, width, generator=generator) / math.sqrt(width) for _ in range(3))
        h = rms(x)
        update = attention_matrix((h @ w_q) @ (h @ w_k).T / math.sqrt(width), mask) @ (h @ w_v)
        x = x + update if skip else update
    return out


curves = {}
for name, prefix in (("双向", tokens), ("因果", 0)):
    mask = prefix_lm_mask(num_tokens=tokens, prefix_length=prefix)
    for skip in (False, True):
        runs = [residual_by_layer(mask, skip=skip, seed=seed) for seed in range(7)]
        curves[name, skip] = torch.tensor(runs)

fig, ax = plt.subplots(figsize=(6.0, 3.4))
for (name, skip), runs in curves.items():
    color, line = ("C1" if name == "双向" else "C0"), ("--" if skip else "-")
    label = f"{name}，{'有残差' if skip else '纯注意力'}"
    shown = runs.clamp(min=1e-16)
    ax.fill_between(range(depth + 1), shown.amin(0), shown.amax(0), color=color, alpha=0.2, linewidth=0)
    marker = "s" if name == "双向" else "o"
    ax.plot(shown.quantile(0.5, dim=0), line, color=color, marker=marker, markersize=4, label=label)
ax.set(yscale="log", xlabel="层数", ylabel="去掉行均值后剩下的比例", ylim=(1e-17, 10))
ax.legend(loc="lower left", bbox_to_anchor=(0.4, 0.26), fontsize=10, handlelength=3.5)

pure_full, pure_causal = curves["双向", False], curves["因果", False]
assert (pure_full[:, 6] < 1e-13).all() and (pure_full[:, 4] < 1e-3).all()
assert ((0.05 < pure_causal[:, 6]) & (pure_causal[:, 6] < 0.2)).all()
assert (pure_causal[:, 12] < 0.03).all()
assert (curves["双向", True][:, 12] > 0.4).all() and (curves["因果", True][:, 12] > 0.4).all()
medians = {key: runs.quantile(0.5, dim=0) for key, runs in curves.items()}
assert 1e-7 < medians["双向", False][4] < 2e-6
assert abs(medians["因果", False][6] - 0.10) < 0.02 and abs(medians["因果", False][12] - 0.006) < 0.002
assert all(abs(medians[name, True][12] - 0.54) < 0.02 for name in ("双向", "因果"))

# %%
#| label: cache-rows-changed
#| caption: 十个 token 的三层模型，第十一个 token 到来之后，各层缓存的十行键值里有几行变了
layers, hidden, heads = 3, 32, 4


class Stack(nn.Module):
    """多头注意力加前馈，前置 RMSNorm，没有位置编码；掩码从外面传入，返回输出与各层的键值。"""

    def __init__(self, num_layers):
        super().__init__()
        self.qkv = nn.ModuleList(nn.Linear(hidden, 3 * hidden, bias=False) for _ in range(num_layers))
        self.up = nn.ModuleList(nn.Linear(hidden, 4 * hidden) for _ in range(num_layers))
        self.down = nn.ModuleList(nn.Linear(4 * hidden, hidden) for _ in range(num_layers))

    @torch.no_grad()
    def forward(self, x, mask):
        cache = []
        for qkv, up, down in zip(self.qkv, self.up, self.down, strict=True):
            q, k, v = (
                y.unflatten(-1, (heads, -1)).transpose(0, 1) for y in qkv(rms(x)).chunk(3, dim=-1)
            )  # (H, T, D)
            cache.append(torch.cat((k, v), dim=-1).transpose(0, 1).flatten(1))  # (T, 2·H·D)
            weights = attention_matrix(q @ k.transpose(-2, -1) / math.sqrt(hidden // heads), mask)
            x = x + (weights @ v).transpose(0, 1).flatten(1)
            x = x + down(torch.relu(up(rms(x))))
        return x, cache


torch.manual_seed(1)
model, x = Stack(layers), torch.randn(11, hidden)
cases = {
    "因果": (0, 0),
    "前缀 6，新 token 在前缀之后": (6, 6),
    "前缀 10，新 token 并入前缀": (10, 11),
    "前缀 6，只把前缀改成 7": (6, 7),
}
rows, changed = [], {}
for name, (before, after) in cases.items():
    _, old = model(x[:10], prefix_lm_mask(num_tokens=10, prefix_length=before))
    _, new = model(x, prefix_lm_mask(num_tokens=11, prefix_length=after))
    changed[name] = [int(((b[:10] - a).abs().amax(-1) > 1e-9).sum()) for a, b in zip(old, new, strict=True)]
    rows.append([name, *changed[name]])
assert changed["因果"] == changed["前缀 6，新 token 在前缀之后"] == [0, 0, 0]
assert changed["前缀 10，新 token 并入前缀"] == [0, 10, 10]
assert changed["前缀 6，只把前缀改成 7"] == [0, 6, 10]
Markdown(tabulate(rows, headers=["掩码", "第 1 层", "第 2 层", "第 3 层"], tablefmt="github"))

# %%
#| label: order-from-the-mask
#| caption: 没有位置编码时打乱顺序：末位输出的最大变化，以及整体打乱之后输出是否只是跟着换位
rows, last, equivariant = [], {}, {}
shuffle = torch.randperm(10, generator=torch.Generator().manual_seed(2))
shuffle = torch.cat((shuffle, torch.tensor([10])))  # 末位不动
for num_layers in (1, 2):
    torch.manual_seed(3)
    model = Stack(num_layers)
    for name, prefix in (("双向", 11), ("因果", 0)):
        mask = prefix_lm_mask(num_tokens=11, prefix_length=prefix)
        (plain, _), (moved, _) = model(x, mask), model(x[shuffle], mask)
        last[name, num_layers] = (moved[-1] - plain[-1]).abs().max().item()
        equivariant[name, num_layers] = (moved - plain[shuffle]).abs().max().item()
        shown = [
            "0" if v < 1e-12 else f"{v:.2f}" for v in (last[name, num_layers], equivariant[name, num_layers])
        ]
        rows.append([f"{name}，{num_layers} 层", *shown])
assert all(last["双向", n] < 1e-12 and equivariant["双向", n] < 1e-12 for n in (1, 2))
assert last["因果", 1] < 1e-12 and abs(last["因果", 2] - 0.209) < 0.003
assert equivariant["因果", 1] > 0.5 and equivariant["因果", 2] > 0.5
Markdown(
    tabulate(
        rows,
        headers=["注意力", "末位的变化", "与「输出跟着换位」之差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: encoder-decoder-flops
#| caption: 每个栈两层、同样的宽度：编码器加解码器的矩阵参数与浮点运算，各是单个解码器的几倍，两者相除恰是 2
C, L = 32, 2
shape = dict(nhead=4, dim_feedforward=4 * C, dropout=0.0, batch_first=True, bias=False)
decoder_only = nn.TransformerEncoder(nn.TransformerEncoderLayer(C, **shape), L, enable_nested_tensor=False)
encoder_decoder = nn.ModuleList(
    (
        nn.TransformerEncoder(nn.TransformerEncoderLayer(C, **shape), L, enable_nested_tensor=False),
        nn.TransformerDecoder(nn.TransformerDecoderLayer(C, **shape), L),
    )
)


def matrix_parameters(module):
    return sum(p.numel() for p in module.parameters() if p.ndim == 2)


def encode_decode(source, target):
    encoder, decoder = encoder_decoder
    return decoder(target, encoder(source))


def matmul_flops(function, *inputs):
    """线性层的浮点运算；注意力的打分与加权走 SDPA，不计入。"""
    with FlopCounterMode(display=False) as counter:
        function(*inputs)
    return counter.get_flop_counts()["Global"][torch.ops.aten.mm]


rows, ratios = [], []
parameters = matrix_parameters(encoder_decoder) / matrix_parameters(decoder_only)
for n, m in ((40, 24), (8, 56), (56, 8)):
    source, target = torch.randn(1, n, C), torch.randn(1, m, C)
    single = matmul_flops(decoder_only, torch.cat((source, target), 1))
    double = matmul_flops(encode_decode, source, target)
    assert single == 2 * 12 * C * C * L * (n + m) and double == 2 * 14 * C * C * L * (n + m)
    ratios.append(parameters / (double / single))
    rows.append([f"{n}、{m}", f"{parameters:.3f}", f"{double / single:.3f}", f"{ratios[-1]:.3f}"])
assert matrix_parameters(decoder_only) == 12 * C * C * L and parameters == 28 / 12
assert all(abs(r - 2) < 1e-12 for r in ratios)
Markdown(
    tabulate(
        rows,
        headers=["输入、输出长度", "参数之比", "运算之比", "相除"],
        tablefmt="github",
        disable_numparse=True,
    )
)
