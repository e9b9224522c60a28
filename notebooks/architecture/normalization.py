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
# # 手撕 LayerNorm 与 RMSNorm（Pre-LN, Post-LN）：实验
#
# 页面 `docs/architecture/normalization.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.attention_scaling import scaled_dot_product_attention
from snippets.architecture.normalization import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

B, T, C, H, V = 2, 16, 64, 4, 64


def table(rows, headers):
    return Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


# %%
#| label: invariance-and-orthogonality
#| caption: 两种归一化各自对什么不变，以及输入的梯度与哪个方向正交
x, gain, shift, g = torch.randn(8, C) + 0.5, torch.rand(C) + 0.5, torch.randn(C), torch.randn(8, C)
tiny = 1e-12  # 不变性只在 eps 可以忽略时成立
forward = {
    "LayerNorm": lambda x: layer_norm(x, gain, shift, eps=tiny),
    "RMSNorm": lambda x: rms_norm(x, gain, eps=tiny),
}
grad_x = {
    "LayerNorm": layer_norm_backward(g, x, gain, eps=tiny)[0],
    "RMSNorm": rms_norm_backward(g, x, gain, eps=tiny)[0],
}
ones = torch.ones_like(x)


def cosine(a, b):
    return F.cosine_similarity(a, b, dim=-1).abs().max().item()


checks = {
    "输入平移 $x+3$：输出变化": lambda name: (forward[name](x + 3) - forward[name](x)).abs().max().item(),
    "输入放大 $10x$：输出变化": lambda name: (forward[name](10 * x) - forward[name](x)).abs().max().item(),
    r"$\cos(\partial\mathcal L/\partial x,\,\mathbf 1)$": lambda name: cosine(grad_x[name], ones),
    r"$\cos(\partial\mathcal L/\partial x,\,x)$": lambda name: cosine(grad_x[name], x),
}
value = {(text, name): check(name) for text, check in checks.items() for name in forward}
shift_text, scale_text, ones_text, x_text = checks
zero = [(t, "LayerNorm") for t in checks] + [(scale_text, "RMSNorm"), (x_text, "RMSNorm")]
assert all(value[key] < 1e-9 for key in zero)
assert value[shift_text, "RMSNorm"] > 1 and value[ones_text, "RMSNorm"] > 0.1
table(
    [[t, *("0" if value[t, n] < 1e-9 else f"{value[t, n]:.2f}" for n in forward)] for t in checks],
    ["绝对值的最大值", "LayerNorm", "RMSNorm"],
)

# %%
#| label: bf16-cast-order
#| caption: bf16 下三种舍入顺序与 float64 真值的差：先乘增益再转、先转再乘、全程 bf16
width = 1024
x16, gain16 = (3 * torch.randn(1024, width)).bfloat16(), (1 + 0.3 * torch.randn(width)).bfloat16()
unit = torch.ones(width, dtype=torch.bfloat16)
exact = rms_norm(x16.double(), gain16.double())
outputs = {
    "先乘增益再转（`F.rms_norm`）": rms_norm(x16, gain16),
    "先转再乘增益（`LlamaRMSNorm`）": gain16 * rms_norm(x16, unit),
    "全程 bf16": gain16 * (x16 * torch.rsqrt(x16.square().mean(dim=-1, keepdim=True) + 1e-6)),
}
first = outputs["先乘增益再转（`F.rms_norm`）"]
assert torch.equal(first, F.rms_norm(x16, (width,), gain16, 1e-6))
different = [(y != first).double().mean().item() for y in outputs.values()]
errors = [(y.double() - exact).abs().mean().item() for y in outputs.values()]
assert different[0] == 0 and 0.25 < different[1] < 0.27 and 0.3 < different[2] < 0.5
assert (
    abs(errors[0] - 1.13e-3) < 2e-5 and abs(errors[1] - 1.53e-3) < 2e-5 and 1.8e-3 < errors[2] < 2.4e-3
)  # bf16 求和的次序随机器变
assert torch.equal(rms_norm(x16, unit), unit * rms_norm(x16, unit))  # 增益为 1 时顺序无所谓
table(
    [[n, f"{100 * d:.0f}%", f"{1e3 * e:.1f}"] for n, d, e in zip(outputs, different, errors, strict=True)],
    ["顺序", "与第一行不同", r"平均误差 $\times10^3$"],
)

# %%
#| label: gradient-at-init
#| caption: 初始化时各层前馈输出矩阵的梯度范数：Post-LN 顶层的梯度不随总层数变，Pre-LN 顶层的按根号层数变小
SEEDS, DEPTHS = range(5), (6, 12, 24, 48)
unit_gain, no_bias = torch.ones(C), torch.zeros(C)


def xavier(rows, cols, generator):
    return (torch.randn(rows, cols, generator=generator) * math.sqrt(2 / (rows + cols))).requires_grad_()


def run(depth, placement, *, seed, norm, final_norm=True, branch_scale=1.0):
    """一次前向与反向；返回各层 W_2 的梯度范数、各层的均方、logits 的标准差、损失。"""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(B, T, C, generator=generator)
    labels = torch.randint(V, (B * T,), generator=generator)
    head = xavier(V, C, generator)
    grads, mean_squares = [], []
    for _ in range(depth):
        wq, wk, wv, wo, w1, w2 = (xavier(C, C, generator) for _ in range(6))

        def attention(h, wq=wq, wk=wk, wv=wv, wo=wo):
            q, k, v = ((h @ w.T).view(B, T, H, C // H).transpose(1, 2) for w in (wq, wk, wv))
            heads = scaled_dot_product_attention(q, k, v, is_causal=True)
            return heads.transpose(1, 2).reshape(B, T, C) @ wo.T

        def feed_forward(h, w1=w1, w2=w2):
            return F.relu(h @ w1.T) @ w2.T

        for branch in (attention, feed_forward):
            if placement == "post":
                x = norm(x + branch_scale * branch(x))
            else:
                x = x + branch_scale * branch(norm(x))
        mean_squares.append(x.square().mean().item())
        grads.append(w2)
    if placement == "pre" and final_norm:
        x = norm(x)
    logits = x.reshape(-1, C) @ head.T
    loss = F.cross_entropy(logits, labels)
    norms = [grad.norm().item() for grad in torch.autograd.grad(loss, grads)]
    return norms, mean_squares, logits.std().item(), loss.item()


def mean_of(runs, index):
    return torch.tensor([r[index] for r in runs]).mean(dim=0)


norms = {
    "LayerNorm": lambda x: layer_norm(x, unit_gain, no_bias),
    "RMSNorm": lambda x: rms_norm(x, unit_gain),
}
runs = {
    (name, placement, depth): [run(depth, placement, seed=s, norm=norm) for s in SEEDS]
    for name, norm in norms.items()
    for placement in ("post", "pre")
    for depth in DEPTHS
}
curve = {key: mean_of(value, 0) for key, value in runs.items()}
top = {key: value[-1].item() for key, value in curve.items()}

bare = [
    mean_of([run(n, "pre", seed=s, norm=norms["LayerNorm"], final_norm=False) for s in SEEDS], 0)[-1].item()
    for n in DEPTHS
]  # 对照：只去掉最后的归一化

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.3))
styles = {"post": ("C1", "s-", "Post-LN"), "pre": ("C0", "o-", "Pre-LN")}
for placement, (color, line, text) in styles.items():
    axes[0].plot(range(1, 25), curve["LayerNorm", placement, 24], line, color=color, markersize=3, label=text)
    axes[1].plot(DEPTHS, [top["LayerNorm", placement, n] for n in DEPTHS], line, color=color, markersize=5)
axes[1].plot(DEPTHS, bare, "^--", color="C2", label="Pre-LN，无最后归一化")
guide = [top["LayerNorm", "pre", 6] * math.sqrt(6 / n) for n in DEPTHS]
axes[1].plot(DEPTHS, guide, ":", color="C4", linewidth=3, label="正比于 1/√L")
axes[0].set(xlabel="层号（共 24 层）", ylabel="该层 W2 的梯度范数", ylim=(0, 1.9))
axes[1].set(xlabel="总层数 L", ylabel="最后一层 W2 的梯度范数", xscale="log", yscale="log", ylim=(0.1, 16))
axes[1].set_xticks(DEPTHS, DEPTHS)
axes[1].set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
axes[1].minorticks_off()
axes[0].legend(loc="upper right")
axes[1].legend(loc="upper left", fontsize=10)
for name in norms:  # 两种归一化结论相同
    post, pre = ([top[name, p, n] for n in DEPTHS] for p in ("post", "pre"))
    assert all(0.79 < v < 0.95 for v in post)  # 不随层数变
    assert all(abs(v * math.sqrt(n / 6) / pre[0] - 1) < 0.1 for v, n in zip(pre, DEPTHS, strict=True))
    assert 3 < curve[name, "pre", 24][0] / pre[2] < 5  # Pre-LN 的底层反而大
    assert curve[name, "post", 24].min() > 0.8 * post[2]  # Post-LN 没有向底层衰减
for value, expected in zip(
    [top["LayerNorm", "pre", n] for n in DEPTHS], (0.39, 0.27, 0.19, 0.13), strict=True
):
    assert abs(value - expected) < 0.006
assert abs(curve["LayerNorm", "pre", 24][0] - 0.82) < 0.005
assert bare == sorted(bare) and abs(bare[0] - 1.5) < 0.1 and 2.8 < bare[-1] < 3.5

# %%
#| label: residual-growth
#| caption: Pre-LN 的残差流均方随层数线性增长；没有最后的归一化，初始损失跟着变大
rows, growth = [], {}
for depth, scaled in ((6, False), (12, False), (24, False), (48, False), (48, True)):
    scale = 1 / math.sqrt(2 * depth) if scaled else 1.0
    kwargs = dict(norm=norms["RMSNorm"], branch_scale=scale)
    kept, dropped = (
        [run(depth, "pre", seed=s, final_norm=f, **kwargs) for s in SEEDS] for f in (True, False)
    )
    growth[depth, scaled] = [
        mean_of(dropped, 1)[-1].item(),
        mean_of(kept, 3).item(),
        mean_of(dropped, 3).item(),
    ]
    name = f"{depth}，分支乘 $1/\\sqrt{{2L}}$" if scaled else f"{depth}"
    rows.append([name, *(f"{v:.1f}" for v in growth[depth, scaled])])
for (depth, scaled), (mean_square, loss_with, loss_without) in growth.items():
    assert scaled or 1 + depth / 2 < mean_square < 1 + 3 * depth / 2  # 正文推出的上下界
    assert 4.5 < loss_with < 4.7 and (scaled or loss_without > loss_with + 2)
for key, expected in {(6, False): (6.8, 6.9), (48, False): (66.8, 19.4), (48, True): (1.4, 4.9)}.items():
    assert abs(growth[key][0] - expected[0]) < 0.06 and abs(growth[key][2] - expected[1]) < 0.06
assert abs(math.log(V) - 4.16) < 0.01
table(rows, ["$L$", "末层均方", "损失，有最后归一化", "损失，无"])

# %%
#| label: wrong-versions
#| caption: 五种错误写法与正确值的对照；每种都要在它会露馅的输入上比
line = torch.tensor([[1.0, -1.0, 3.0, 5.0]])  # 均值 2，有偏方差 5，均方 9
faint = torch.full((1, 4), 1e-3)
far = torch.tensor([[10001.0, 9999.0, 10001.0, 9999.0]])  # 方差恰为 1
gain4, bias4 = torch.ones(4), torch.zeros(4)
two_moments = (far.float().square().mean() - far.float().mean().square()).double()
cases = [
    (
        "LayerNorm 用无偏方差",
        "$(1,-1,3,5)$ 的第 4 个",
        layer_norm(line, gain4, bias4)[0, 3],
        ((line - line.mean()) / (line.var() + 1e-5).sqrt())[0, 3],
    ),
    (
        "RMSNorm 减了均值",
        "$(1,-1,3,5)$ 的第 4 个",
        rms_norm(line, gain4)[0, 3],
        rms_norm(line - line.mean(), gain4)[0, 3],
    ),
    (
        "eps 放在根号外",
        "全为 $10^{-3}$，$\\epsilon=10^{-6}$",
        rms_norm(faint, gain4)[0, 0],
        (faint / (faint.square().mean().sqrt() + 1e-6))[0, 0],
    ),
    (
        "漏了 eps",
        "全零",
        rms_norm(0 * faint, gain4)[0, 0],
        (0 * faint / (0 * faint).square().mean().sqrt())[0, 0],
    ),
    (
        "float32 里用 $\\overline{x^2}-\\bar x^2$",
        r"$10000\pm1$",
        layer_norm(far.float(), gain4.float(), bias4.float())[0, 0].double(),
        ((far - far.mean()) / (two_moments + 1e-5).sqrt())[0, 0],
    ),
]
answers = torch.stack([torch.stack(case[2:]) for case in cases])
expected = torch.tensor([[1.342, 1.162], [1.667, 1.342], [0.707, 0.999], [0.0, math.nan], [1.0, 316.2]])
assert torch.allclose(answers, expected, rtol=1e-3, equal_nan=True)
table([[a, b, f"{c:.3f}", f"{d:.3f}"] for a, b, c, d in cases], ["写法", "输入", "正确", "写错"])

# %%
#| label: batch-dependence
#| caption: BatchNorm 的输出随同批的其他序列与后面的位置而变，两种逐位置的归一化不变
x = torch.randn(B, T, C)
other, later = x.clone(), x.clone()
other[1] = 3 * other[1] + 1  # 只改同批的另一条
later[:, -1] += 5  # 只改最后一个位置


def batch_norm(x):
    return F.batch_norm(x.reshape(-1, C), None, None, training=True).view_as(x)


change = {
    name: (
        (norm(other) - norm(x))[0].abs().max().item(),
        (norm(later) - norm(x))[:, :-1].abs().max().item(),
    )
    for name, norm in {"BatchNorm（训练模式）": batch_norm, **norms}.items()
}
assert change["LayerNorm"] == change["RMSNorm"] == (0, 0)
assert min(change["BatchNorm（训练模式）"]) > 1
table(
    [[name, *(f"{v:.2f}" if v else "0" for v in values)] for name, values in change.items()],
    ["输出的最大变化", "改同批另一条", "改后面的位置"],
)
