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
# # 注意力为什么除以根号 d（scaled dot-product attention）：实验
#
# 页面 `docs/architecture/attention-scaling.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.attention_scaling import (
    attention_scores,
    qk_norm_logits,
    scaled_dot_product_attention,
    softmax_jacobian,
    stable_softmax,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

NUM_KEYS = 128


def random_scores(head_dim, num_keys=NUM_KEYS):
    """分量独立、零均值、单位方差的 q 与 k：16 组 key，每组 64 个 query，未缩放。"""
    q = torch.randn(1, 16, 64, head_dim)
    k = torch.randn(1, 16, num_keys, head_dim)
    return attention_scores(q, k, scale=1.0)


def entropy(p):
    return torch.special.entr(p).sum(dim=-1)


# %%
#| label: max-prob-by-dim
#| caption: 128 个 key 时未缩放打分的方差，以及三种缩放下每个 query 的最大注意力权重的均值
rows, max_prob = [], {}
for head_dim in (4, 16, 64, 256, 1024):
    scores = random_scores(head_dim)
    row = [head_dim, f"{scores.var():.1f}"]
    for name, scale in (("none", 1.0), ("sqrt", head_dim**-0.5), ("linear", 1 / head_dim)):
        max_prob[name, head_dim] = stable_softmax(scores * scale).amax(dim=-1).mean().item()
        row.append(f"{max_prob[name, head_dim]:.3f}")
    rows.append(row)
    assert abs(scores.var() / head_dim - 1) < 0.05  # 方差就是 d

assert all(abs(max_prob["none", d] - x) < 0.005 for d, x in ((4, 0.221), (64, 0.768), (1024, 0.942)))
assert all(0.065 < max_prob["sqrt", d] < 0.075 for d in (4, 16, 64, 256, 1024))  # 与 d 无关
assert abs(max_prob["sqrt", 64] - 0.068) < 0.001 and abs(max_prob["linear", 64] - 0.011) < 0.001
assert max_prob["linear", 1024] < 1.2 / NUM_KEYS  # 几乎就是均匀分布的 1/128
Markdown(
    tabulate(
        rows,
        headers=["$d$", "点积方差", "不缩放", r"除以 $\sqrt d$", "除以 $d$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: entropy-and-trace
#| caption: 三种缩放下注意力的熵与 softmax 雅可比矩阵的迹随每头维数的变化：不缩放时两者都塌下去，除以根号 d 时熵是平的且低于均匀分布
dims = [4, 16, 64, 256, 1024]
curves = {name: ([], []) for name in ("none", "sqrt", "linear")}
for head_dim in dims:
    scores = random_scores(head_dim)
    for name, scale in (("none", 1.0), ("sqrt", head_dim**-0.5), ("linear", 1 / head_dim)):
        p = stable_softmax(scores * scale)
        trace = softmax_jacobian(p[:, :4, :16]).diagonal(dim1=-2, dim2=-1).sum(-1)
        torch.testing.assert_close(trace, 1 - p[:, :4, :16].square().sum(-1))  # tr J = 1 - |p|^2
        curves[name][0].append(entropy(p).mean().item())
        curves[name][1].append((1 - p.square().sum(-1)).mean().item())

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.2))
styles = {"none": ("C1", "s-", "不缩放"), "sqrt": ("C0", "o-", "除以 √d"), "linear": ("C2", "^--", "除以 d")}
for name, (color, line, text) in styles.items():
    for ax, values in zip(axes, curves[name], strict=True):
        ax.plot(dims, values, line, color=color, markersize=4, label=text)
axes[0].axhline(math.log(NUM_KEYS), color="C4", linewidth=1, linestyle=":")
axes[0].annotate("均匀分布 ln 128", (4, 5.0), fontsize=10)
axes[0].set(xlabel="每头维数 d", ylabel="熵（奈特）", ylim=(0, 5.5))
axes[1].set(xlabel="每头维数 d", ylabel="雅可比矩阵的迹", ylim=(0, 1.05))
for ax in axes:
    ax.set_xscale("log", base=2)
    ax.set_xticks(dims, dims)
axes[1].legend(loc="lower left")

at = {d: i for i, d in enumerate(dims)}
assert max(curves["sqrt"][0]) - min(curves["sqrt"][0]) < 0.06  # 熵是平的
assert abs(curves["sqrt"][0][at[64]] - 4.37) < 0.005 and abs(curves["sqrt"][1][at[64]] - 0.98) < 0.002
assert abs(curves["none"][0][at[64]] - 0.66) < 0.005 and abs(curves["none"][0][at[1024]] - 0.14) < 0.005
assert abs(curves["none"][1][at[64]] - 0.32) < 0.005 and abs(curves["none"][1][at[1024]] - 0.08) < 0.005
assert curves["linear"][0][at[64]] > 4.83 and abs(math.log(NUM_KEYS) - 4.852) < 0.001

# %%
#| label: gradient-by-logit-std
#| caption: 打分的标准差超过 8 之后，流向 q 的梯度的中位数骤降，流向 v 的不降；q 的均值由少数打分并列的 query 撑住
torch.manual_seed(0)
stds = [2.0**i for i in range(-1, 7)]
B, D = 512, 64
q0, k0, v0 = torch.randn(B, 1, 1, D), torch.randn(B, 1, NUM_KEYS, D), torch.randn(B, 1, NUM_KEYS, D)
upstream = torch.nn.functional.normalize(torch.randn(B, 1, 1, D), dim=-1)
median, mean_q, share = {"q": [], "k": [], "v": []}, [], []
for std in stds:
    q, k, v = (x.clone().requires_grad_() for x in (q0, k0, v0))
    out = scaled_dot_product_attention(q, k, v, scale=std / math.sqrt(D))  # 打分的标准差 = std
    (out * upstream).sum().backward()  # 各样本互不相干，每个只有一个 query
    norms = {name: x.grad.flatten(1).norm(dim=-1) for name, x in (("q", q), ("k", k), ("v", v))}
    for name in median:
        median[name].append(norms[name].median().item())
    mean_q.append(norms["q"].mean().item())
    share.append((norms["q"].topk(B // 10).values.sum() / norms["q"].sum()).item())

fig, ax = plt.subplots(figsize=(6.0, 3.5))
ax.plot(stds, median["v"], "^-", color="C2", label="v，中位数")
ax.plot(stds, mean_q, "x:", color="C4", label="q，均值")
ax.plot(stds, median["q"], "o-", color="C0", label="q，中位数（k 与它重合）")
ax.set_xscale("log", base=2)
ax.set_xticks(stds, ["½", "1", "2", "4", "8", "16", "32", "64"])
ax.set(yscale="log", xlabel="打分的标准差 σ（不缩放时 σ = √d）", ylabel="每个 query 的梯度范数")
ax.minorticks_off()
ax.axvline(1, color="C4", linewidth=1)
ax.annotate("除以 √d", (1.06, 1.4e-5), fontsize=10)
ax.legend(loc="center left", bbox_to_anchor=(0.19, 0.36))

at_q, i1 = dict(zip(stds, median["q"], strict=True)), stds.index(1.0)
for std, expected in {1: 0.125, 8: 1.01, 16: 0.38, 32: 0.0133, 64: 1.0e-5}.items():
    assert abs(at_q[std] / expected - 1) < 0.02
assert abs(at_q[8] / at_q[1] - 8) < 0.2  # 恰是系数 1/c 之比：除去它，两者相等
assert all(0.8 < a / b < 1.25 for a, b in zip(median["q"], median["k"], strict=True))
assert median["v"] == sorted(median["v"]) and abs(median["v"][i1] - 0.14) < 0.005
assert median["v"][-1] > 0.99
assert mean_q == sorted(mean_q) and abs(mean_q[-1] - 2.2) < 0.05
assert abs(share[i1] - 0.16) < 0.01 and abs(share[-1] - 0.92) < 0.01  # 前 10% 的 query 占的份额
# σ = 64 时梯度大的正是前两名打分接近的 query
first, second = attention_scores(q0, k0, scale=64 / math.sqrt(D)).topk(2).values[:, 0, 0].T
large = torch.zeros(B, dtype=torch.bool).scatter(0, norms["q"].topk(B // 10).indices, True)
assert (first - second)[large].max() < 4.1 and abs((first - second)[~large].median() - 17.4) < 0.1

# %%
#| label: correlated-scores
#| caption: k 与 q 的相关系数为 0.5 时打分的均值，以及除以根号 d 时配对的 key 在 128 个 key 里得到的平均权重
torch.manual_seed(0)
rows, mean_score, weight = [], {}, {}
for head_dim in (16, 64, 256, 1024):
    q = torch.randn(1, 1, 1000, head_dim)
    paired = 0.5 * q + math.sqrt(0.75) * torch.randn_like(q)  # 分量仍是零均值、单位方差
    others = torch.randn(1, 1, NUM_KEYS - 1, head_dim)  # 与 q 无关的 127 个 key
    own = (q * paired).sum(-1, keepdim=True)
    scores = torch.cat([own, attention_scores(q, others, scale=1.0)], dim=-1)
    mean_score[head_dim] = own.mean().item()
    weight[head_dim] = stable_softmax(scores / math.sqrt(head_dim))[..., 0].mean().item()
    means = [own.mean() * c for c in (1.0, head_dim**-0.5, 1 / head_dim)]
    rows.append(
        [head_dim, f"{means[0]:.0f}", f"{means[1]:.1f}", f"{means[2]:.2f}", f"{weight[head_dim]:.3f}"]
    )
    assert abs(mean_score[head_dim] / (head_dim / 2) - 1) < 0.03  # 均值是 d/2

assert [r[2] for r in rows] == ["2.0", "4.0", "8.0", "16.0"]
assert {r[3] for r in rows} <= {"0.49", "0.50", "0.51"}
assert rows[0][4] == "0.051" and rows[-1][4] == "1.000"
Markdown(
    tabulate(
        rows,
        headers=["$d$", "不缩放", r"除以 $\sqrt d$", "除以 $d$", "配对权重"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: overflow-is-not-the-reason
#| caption: float32 下两个 key 的点积为 8000 与 7992，三种缩放直接取指数都溢出，先减最大值都不溢出
raw = torch.tensor([8000.0, 7992.0], dtype=torch.float32)
rows = []
for name, scale in (("不缩放", 1.0), (r"除以 $\sqrt{64}$", 1 / 8), ("除以 64", 1 / 64)):
    scores = raw * scale
    naive = scores.exp() / scores.exp().sum()
    stable = stable_softmax(scores)
    assert scores.exp().isinf().all() and naive.isnan().all()  # float32 的 exp 在 88.8 处已经溢出
    assert stable.isfinite().all() and abs(stable.sum() - 1) < 1e-6
    rows.append([name, f"{scores[0]:g}", f"{scores.exp()[0]:g}", f"{naive[0]:g}", f"{stable[0]:.4f}"])
assert [r[-1] for r in rows] == ["0.9997", "0.7311", "0.5312"]
assert (
    torch.tensor(88.7, dtype=torch.float32).exp().isfinite()
    and torch.tensor(88.8, dtype=torch.float32).exp().isinf()
)
Markdown(
    tabulate(
        rows,
        headers=["缩放", "打分", "直接取指数", "直接算的权重", "先减最大值"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: scale-in-models
#| caption: 几个模型代码里乘在点积上的系数，以及它等效于除以哪个 d 的平方根
#| echo: hide
mscale = 0.1 * math.log(40) + 1  # YaRN，扩展倍数 40
settings = [
    ("GPT-2", 64, 64**-0.5),
    ("Llama", 128, 128**-0.5),
    ("DeepSeek-V3", 192, 192**-0.5),
    ("同上，YaRN", 192, 192**-0.5 * mscale**2),
    ("Gemma 2 27B", 128, 144**-0.5),
    ("Granite 8B", 128, 1 / 128),
    ("T5", 64, 1.0),
]
assert abs(mscale - 1.3689) < 1e-4 and abs(mscale**2 - 1.8739) < 1e-4
rows = [[name, dim, f"{scale:.4f}", f"{round(scale**-2, 1):g}"] for name, dim, scale in settings]
assert [r[2] for r in rows] == ["0.1250", "0.0884", "0.0722", "0.1352", "0.0833", "0.0078", "1.0000"]
assert rows[3][3] == "54.7"
Markdown(
    tabulate(
        rows, headers=["模型", "被缩并的维数", "系数", "等效的 $d$"], tablefmt="github", disable_numparse=True
    )
)

# %%
# 页面正文里的其他数字。
# float16 的点积本身会溢出：乘完再缩放来不及，先缩放就没事。
x = torch.full((1, 128), 30.0, dtype=torch.float16)
assert (x @ x.T).isinf().all() and ((x @ x.T) * 128**-0.5).isinf().all()
assert ((x * 128**-0.5) @ x.T).isfinite().all() and (x.float() @ x.float().T).item() == 115200

# QK-norm：增益为 1 时打分不超过 √128，与权重放大多少无关；没有 QK-norm 时放大 100² 倍。
q, k, ones = torch.randn(1, 1, 200, 128), torch.randn(1, 1, 300, 128), torch.ones(128)
bound = math.sqrt(128)
assert abs(bound - 11.31) < 0.01
normed = qk_norm_logits(q, k, ones, ones)
torch.testing.assert_close(qk_norm_logits(100 * q, 100 * k, ones, ones), normed, atol=1e-4, rtol=0)  # eps
assert qk_norm_logits(100 * q, 100 * q, ones, ones).max() <= bound
assert qk_norm_logits(100 * q, 100 * q, ones, ones).max() > 0.9999 * bound
assert abs(normed.var() - 1) < 0.02  # 随机方向时方差仍是 1
torch.testing.assert_close(attention_scores(100 * q, 100 * k), 1e4 * attention_scores(q, k))

# 初始化 N(0, 0.02²)、输入每维均方为 1：缩放后打分的方差是 (C · 0.02²)²，不是 1。
for width, expected in ((768, 0.094), (4096, 2.68)):
    x = torch.nn.functional.rms_norm(torch.randn(400, width), (width,))
    q, k = (x @ (0.02 * torch.randn(width, 64)) for _ in range(2))
    off_diagonal = ~torch.eye(400, dtype=torch.bool)
    var = (q @ k.T / math.sqrt(64))[off_diagonal].var()
    assert abs((width * 0.02**2) ** 2 / expected - 1) < 0.01 and abs(var / expected - 1) < 0.15
assert abs(math.sqrt(64) * 768 * 0.02**2 - 2.5) < 0.05  # 宽 768、d = 64，不缩放时的标准差

# σ = 1 时熵跟着 ln n 走：亏空一直是 ½ 左右。
for num_keys, expected in ((128, 4.37), (8192, 8.51)):
    mean_entropy = entropy(stable_softmax(torch.randn(400, num_keys))).mean()
    assert abs(mean_entropy - expected) < 0.02 and abs(math.log(num_keys) - mean_entropy - 0.5) < 0.05

# 熵的近似 ln n - σ²/2 降到 0 的地方：σ = √(2 ln n)，n = 128 时 3.1，不缩放的话 d = σ² ≈ 10。
assert round(math.sqrt(2 * math.log(128)), 1) == 3.1 and round(2 * math.log(128), 1) == 9.7
