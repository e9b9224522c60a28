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
# # FP16 与 BF16：实验
#
# 页面 `docs/training/fp16-bf16.md` 的实验：六种格式的极限、相对误差随大小的变化、损失缩放、小更新为什么会丢、累加器与分块的 FP8。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.training.fp16_bf16 import (
    FORMATS,
    DynamicLossScaler,
    chunked_sum,
    format_limits,
    quantize_e4m3_blocks,
    round_to_format,
    stochastic_to_bf16,
    to_bf16,
)

torch.manual_seed(0)


def uniform(*shape, seed=0):
    """0 到 1 之间的均匀数，由整数除以 2 的幂得到，各种 CPU 上相同。"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 2**20, shape, generator=generator).double() / 2**20


def scientific(value):
    mantissa, exponent = f"{value:.2e}".split("e")
    return rf"${mantissa}\times10^{{{int(exponent)}}}$"


# %%
#| label: format-limits
#| caption: 六种格式的位数与极限，都由位模式算出；BF16 的最小正规数与 FP32 相同，eps 是 FP32 的 65536 倍
#| echo: fold
finfos = {"FP32": torch.float32, "FP16": torch.float16, "BF16": torch.bfloat16}
finfos |= {"FP8 E4M3": torch.float8_e4m3fn, "FP8 E5M2": torch.float8_e5m2}
rows = []
for name, fmt in FORMATS.items():
    limits = format_limits(fmt)
    if name in finfos:
        finfo = torch.finfo(finfos[name])
        assert limits["max"] == finfo.max and limits["eps"] == finfo.eps
        assert limits["smallest_normal"] == finfo.smallest_normal
    rows.append(
        [
            f"{name}<br>1/{fmt.exponent_bits}/{fmt.mantissa_bits}",
            scientific(limits["max"]) if limits["max"] > 1e5 else f"{limits['max']:.0f}",
            scientific(limits["smallest_normal"]),
            scientific(limits["smallest_subnormal"]),
            f"$2^{{{int(math.log2(limits['eps']))}}}$",
        ]
    )
limits = {name: format_limits(fmt) for name, fmt in FORMATS.items()}
binades = [math.log2(limits[name]["max"] / limits[name]["smallest_subnormal"]) for name in ("FP16", "BF16")]
assert [round(number) for number in binades] == [40, 261] and limits["FP8 E4M3"]["max"] == 448
assert limits["FP16"]["max"] == 65504 and limits["FP16"]["smallest_subnormal"] == 2**-24
assert (
    f"{limits['FP16']['smallest_normal']:.2e} {limits['FP16']['smallest_subnormal']:.2e}"
    == "6.10e-05 5.96e-08"
)
assert limits["BF16"]["eps"] == 8 * limits["FP16"]["eps"] == 65536 * limits["FP32"]["eps"]
assert (
    limits["BF16"]["smallest_normal"]
    == limits["FP32"]["smallest_normal"]
    == limits["TF32"]["smallest_normal"]
)
assert limits["TF32"]["eps"] == limits["FP16"]["eps"]
Markdown(tabulate(rows, headers=["格式", "最大", "最小正规", "最小次正规", "eps"], tablefmt="github"))

# %%
#| label: relative-error
#| caption: 每个二倍区间里最坏的相对误差：FP16 在 6e-5 到 65504 之间是 BF16 的八分之一，往下逐渐变差直到全部归零，往上是无穷；BF16 一直平
#| echo: fold
exponents = range(-30, 21)
grid = 1 + torch.arange(1, 4096, dtype=torch.float64) / 4096
styles = {"FP16": ("C0", "-"), "BF16": ("C1", "--"), "FP8 E4M3": ("C2", ":"), "FP8 E5M2": ("C3", "-.")}
worst = {}
fig, ax = plt.subplots(figsize=(6.0, 3.6))
for name, (color, line) in styles.items():
    errors = []
    for exponent in exponents:
        x = grid * 2.0**exponent
        errors.append(((round_to_format(x, FORMATS[name]) - x).abs() / x).max().item())
    worst[name] = dict(zip(exponents, errors, strict=True))
    shown = [error if math.isfinite(error) else math.nan for error in errors]
    ax.plot([2.0**e for e in exponents], shown, color=color, linestyle=line, label=name)
ax.set_xscale("log", base=10)
ax.set_yscale("log", base=10)
ax.set_xlabel("数的大小")
ax.set_ylabel("最坏的相对误差")
ax.legend(loc="upper right", ncol=2, fontsize=10)
ax.set_ylim(2e-4, 60)
assert all(0.97 * 2**-8 < error <= 2**-8 for error in worst["BF16"].values())
assert all(0.97 * 2**-11 < worst["FP16"][e] <= 2**-11 for e in range(-14, 15))
assert worst["FP16"][-26] == 1 and worst["FP16"][-27] == 1 and worst["FP16"][15] == math.inf
assert (round_to_format(grid * 2.0**-26, FORMATS["FP16"]) == 0).all()
assert (round_to_format(grid * 2.0**-25, FORMATS["FP16"]) == 2**-24).all()  # 还没归零
assert [e for e in exponents if worst["FP16"][e] > worst["BF16"][e]] == [*range(-30, -17), *range(15, 21)]
tiny = torch.tensor([1e-8])
assert tiny.half().item() == 0 and f"{to_bf16(tiny).item():.4e}" == "1.0012e-08"
assert torch.tensor([65520.0]).half().item() == math.inf and torch.tensor([65519.0]).half().item() == 65504

# %%
#| label: loss-scaling
#| caption: 同一个二次损失训练 60 步的终点：不缩放时 fp16 的梯度全是零，固定的大倍数每步都溢出，动态缩放跳过 12 步之后走到目标
#| echo: fold
target, curvature, num_steps = torch.tensor([1.0, -2.0]), 1e-9, 60
lr = 0.5 / curvature


def train(scaler, dtype, *, skip=True):
    """梯度 curvature·(w-target) 先乘倍数再存成 dtype；返回终点、跳过的步数、最后的倍数。"""
    param, skipped = torch.zeros(2), 0
    for _ in range(num_steps):
        scaled = ((param - target) * (curvature * scaler.scale)).to(dtype)
        if not skip:
            param = param - lr * scaled.float() / scaler.scale
            continue
        skipped += int(not scaled.isfinite().all())
        param = scaler.step(param, scaled, lr=lr, max_norm=math.inf)
    return param, skipped, scaler.scale


off = {"growth_interval": 10**9, "backoff_factor": 1.0}
runs = {
    "BF16，不缩放": train(DynamicLossScaler(init_scale=1.0, **off), torch.bfloat16),
    "FP16，不缩放": train(DynamicLossScaler(init_scale=1.0, **off), torch.float16),
    "FP16，固定 $2^{16}$": train(DynamicLossScaler(init_scale=2.0**16, **off), torch.float16),
    "FP16，固定 $2^{56}$，跳过": train(DynamicLossScaler(init_scale=2.0**56, **off), torch.float16),
    "FP16，固定 $2^{56}$，不跳过": train(
        DynamicLossScaler(init_scale=2.0**56, **off), torch.float16, skip=False
    ),
    "FP16，动态，从 $2^{56}$ 起": train(DynamicLossScaler(init_scale=2.0**56), torch.float16),
}
rows = []
for name, (param, skipped, scale) in runs.items():
    distance = (param - target).norm().item()
    rows.append(
        [
            name,
            f"{distance:.3f}" if math.isfinite(distance) else "NaN",
            skipped,
            rf"$2^{{{int(math.log2(scale))}}}$",
        ]
    )
print_rows = {row[0]: row[1:] for row in rows}
assert print_rows["BF16，不缩放"][:2] == ["0.000", 0] and print_rows["FP16，不缩放"][:2] == ["2.236", 0]
assert print_rows["FP16，固定 $2^{16}$"][:2] == ["0.000", 0]
assert print_rows["FP16，固定 $2^{56}$，跳过"][:2] == ["2.236", 60]
assert print_rows["FP16，固定 $2^{56}$，不跳过"][0] == "NaN"
assert print_rows["FP16，动态，从 $2^{56}$ 起"] == ["0.000", 12, "$2^{44}$"]
Markdown(
    tabulate(
        rows,
        headers=["梯度的格式与倍数", "离目标", "跳过的步数", "最后的倍数"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: small-updates
#| caption: 权重从 1 起每步加 0.001：FP32 到 2，FP16 到 1.98，BF16 就近舍入一步不动，随机舍入的五次平均跟着 FP32
#| echo: fold
update, num_steps = 1e-3, 1000
paths = {name: [1.0] for name in ("FP32", "FP16", "BF16")}
for name, path in paths.items():
    weight = torch.ones(1, dtype=torch.float64)
    for _ in range(num_steps):
        weight = round_to_format(weight + update, FORMATS[name])
        path.append(weight.item())
weights, stochastic = torch.ones(5), [torch.ones(5)]
generator = torch.Generator().manual_seed(0)
for _ in range(num_steps):
    noise = torch.randint(0, 65536, (5,), generator=generator, dtype=torch.int32)
    weights = stochastic_to_bf16(weights + update, noise).float()
    stochastic.append(weights)
stochastic = torch.stack(stochastic)  # (1001, 5)
mean = stochastic.mean(dim=1)
shown = list(range(0, num_steps + 1, 20))
fig, ax = plt.subplots(figsize=(6.0, 3.4))
lines = [("FP32", "C0", "-"), ("FP16", "C2", "--"), ("BF16", "C3", ":")]
for name, color, line in lines:
    label = "BF16，就近舍入" if name == "BF16" else name
    ax.plot(shown, [paths[name][i] for i in shown], color=color, linestyle=line, label=label)
ax.plot(shown, mean[shown].tolist(), color="C1", linestyle="-.", label="BF16，随机舍入（5 次平均）")
ax.set_xlabel("步数")
ax.set_ylabel("权重")
ax.legend(loc="upper left", fontsize=10)
assert abs(paths["FP32"][-1] - 2) < 1e-4 and f"{paths['FP16'][-1]:.2f}" == "1.98"
assert set(paths["BF16"]) == {1.0} and update < 2**-8
assert 1.9 < mean[-1] < 2.1 and stochastic[-1].min() > 1.7 and stochastic[-1].max() < 2.3
# 0.02 处的半格：格距 2⁻¹³，减 1e-5 不动
assert 2**-6 < 0.02 < 2**-5 and f"{2**-14:.1e}" == "6.1e-05"
weight = to_bf16(torch.tensor([0.02])).float()
assert torch.equal(to_bf16(weight - 1e-5).float(), weight) and to_bf16(weight - 1e-4).item() < weight.item()
# 随机舍入的方差：500 次的均值更贴近 2，标准差约 0.09
many = torch.ones(500)
generator = torch.Generator().manual_seed(1)
for _ in range(num_steps):
    many = stochastic_to_bf16(
        many + update, torch.randint(0, 65536, (500,), generator=generator, dtype=torch.int32)
    ).float()
assert abs(many.mean().item() - 2) < 0.02 and 0.08 < many.std().item() < 0.095

# %%
#| label: accumulators
#| caption: 4096 项的累加：BF16 数到 256、FP16 数到 2048 就停；点积的误差随累加器的位数变小，每 128 项提升到 FP32 能救回来
#| echo: fold
num_terms = 4096
ones = torch.ones(num_terms, dtype=torch.float64)
a, b = (to_bf16(uniform(num_terms, 20, seed=seed).float()).double() for seed in (1, 2))
products = a * b  # 两个 bf16 的积，float32 也能精确表示
assert torch.equal(products.float().double(), products)
exact = products.sum(0)
accumulators = {
    "BF16": (FORMATS["BF16"], num_terms),
    "FP16": (FORMATS["FP16"], num_terms),
    "14 位有效数字": (FORMATS["FP32"]._replace(mantissa_bits=13), num_terms),
    "14 位，每 128 项提升": (FORMATS["FP32"]._replace(mantissa_bits=13), 128),
    "FP32": (FORMATS["FP32"], num_terms),
}
rows, errors = [], {}
for name, (fmt, interval) in accumulators.items():
    count = chunked_sum(ones, fmt, interval=interval).item()
    total = chunked_sum(products, fmt, interval=interval)
    errors[name] = ((total - exact).abs() / exact).max().item()
    rows.append([name, f"{count:.0f}", f"{errors[name]:.1e}"])
assert [row[1] for row in rows] == ["256", "2048", "4096", "4096", "4096"]
assert f"{errors['BF16']:.0%}" == "76%" and [row[2] for row in rows[2:]] == ["3.7e-03", "5.1e-05", "1.8e-06"]
Markdown(
    tabulate(
        rows, headers=["累加器", "4096 个 1", "点积的最大相对误差"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: fp8-blocks
#| caption: 一个离群值对 E4M3 的影响：整个张量一个缩放时，离群值越大归零的越多；每 128 个一个缩放时只伤到同一块
#| echo: fold
rows = []
for outlier in (1.0, 1e4, 1e6):
    x = (2 * uniform(16, 1024, seed=3) - 1).float()
    x[0, 0] = outlier
    record = []
    for block in ((16, 1024), (1, 128)):
        values, _ = quantize_e4m3_blocks(x, block=block)
        others = torch.ones_like(x, dtype=torch.bool)
        others[0, 0] = False
        zeros = (values == 0)[others].double().mean().item()
        error = ((values - x)[others].norm() / x[others].norm()).item()
        record += [f"{zeros:.1%}", f"{error:.3f}"]
    rows.append([f"{outlier:,.0f}", *record])
assert rows[0][1:] == ["0.0%", "0.026", "0.0%", "0.025"]
assert rows[1][1:] == ["2.1%", "0.030", "0.0%", "0.025"]
assert rows[2][1:] == ["100.0%", "1.000", "0.8%", "0.096"]
assert 448 * 2**9 == 229376  # E4M3 从最大到最小次正规数的倍数
Markdown(
    tabulate(
        rows,
        headers=["离群值", "整张量：归零", "相对误差", "1×128：归零", "相对误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)
