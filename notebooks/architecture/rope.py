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
# # 旋转位置编码（rotary position embedding, RoPE）：实验
#
# 页面 `docs/architecture/rope.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.rope import (
    apply_rope,
    linear_scaled_frequencies,
    llama3_scaled_frequencies,
    ntk_scaled_frequencies,
    rope_cos_sin,
    rope_inverse_frequencies,
    yarn_attention_factor,
    yarn_scaled_frequencies,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def rotated(x, position_ids, inv_freq):
    """把同一个向量放到一串位置上：返回 (位置数, D)。"""
    x = x.expand(1, 1, len(position_ids), -1)
    return apply_rope(x, x, *rope_cos_sin(position_ids.unsqueeze(0), inv_freq))[0][0, 0]


# %%
#| label: relative-scores
#| caption: 同一对 q、k 固定偏移、整体平移：左边角度正比于位置，每条线都是平的；右边角度正比于位置的平方，只有偏移 0 是平的
torch.manual_seed(0)
D = 64
q, k = torch.randn(D), torch.randn(D)
inv_freq = rope_inverse_frequencies(D)
key_positions = torch.arange(0, 2001, 20)
offsets = (0, 1, 7, 100)


def scores_at(offset, positions_to_angle_units):
    q_rot = rotated(q, positions_to_angle_units(key_positions + offset), inv_freq)
    k_rot = rotated(k, positions_to_angle_units(key_positions), inv_freq)
    return (q_rot * k_rot).sum(-1)


fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.2), sharey=True)
spread, value = {}, {}
for ax, name, units in ((axes[0], "角度 ∝ 位置", lambda m: m), (axes[1], "角度 ∝ 位置²", lambda m: m**2)):
    for offset, style in zip(offsets, ("C0-", "C1--", "C2-.", "C3:"), strict=True):
        scores = scores_at(offset, units)
        spread[name, offset] = (scores.max() - scores.min()).item()
        value[name, offset] = scores[0].item()
        ax.plot(key_positions, scores, style, linewidth=1.3, label=f"偏移 {offset}")
    ax.set(title=name, xlabel="key 的位置 n")
axes[0].set(ylabel="打分（未缩放）")
axes[1].legend(loc="lower right", ncols=2, fontsize=10)
axes[0].set_ylim(-48, 34)

assert all(spread["角度 ∝ 位置", offset] < 1e-10 for offset in offsets)
assert len({round(value["角度 ∝ 位置", offset], 2) for offset in offsets}) == 4  # 偏移确实有影响
assert spread["角度 ∝ 位置²", 0] < 1e-10  # 弱检查放过它
assert all(spread["角度 ∝ 位置²", offset] > 35 for offset in (1, 7, 100))

# %%
#| label: wavelengths-in-models
#| caption: 几个模型的底数、训练长度、最长波长与训练长度之比，以及训练中转不满一圈的平面数
models = [  # 底数、旋转的维数、训练长度（来源见页面）
    ("Llama 2", 1e4, 128, 4096),
    ("Llama 3", 5e5, 128, 8192),
    ("Qwen2.5", 1e6, 128, 32768),
    ("DeepSeek-V3", 1e4, 64, 4096),
]
rows, incomplete = [], {}
for name, base, dim, length in models:
    wavelength = 2 * math.pi / rope_inverse_frequencies(dim, rope_theta=base)
    incomplete[name] = int((wavelength > length).sum())
    rows.append(
        [
            name,
            f"{base:.0e}".replace("e+0", "e"),
            length,
            f"{wavelength[-1] / length:.1f}",
            f"{incomplete[name]} / {dim // 2}",
        ]
    )
    assert abs(wavelength[0] - 2 * math.pi) < 1e-12  # 约 6.3 个位置一圈
    assert base ** ((dim - 2) / dim) > 1000  # 指数写成正的：最后一个平面每步转上千弧度

assert round(2 * math.pi / rope_inverse_frequencies(128)[-1].item(), -2) == 54400
assert round(2 * math.pi / rope_inverse_frequencies(128, rope_theta=5e5)[-1].item(), -4) == 2560000
assert incomplete == {"Llama 2": 18, "Llama 3": 29, "Qwen2.5": 24, "DeepSeek-V3": 9}
assert [row[3] for row in rows] == ["13.3", "312.4", "154.5", "11.5"]
Markdown(
    tabulate(
        rows,
        headers=["模型", "$b$", "训练长度 $L$", "最长波长 / $L$", "转不满一圈"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: extrapolation-fit
#| caption: 用距离小于 512 的打分拟合指数衰减：训练距离内重合，之外直接外推乱摆；位置插值不越界，但训练距离内不再重合
L, S, RIDGE = 512, 4, 1e-8
base = rope_inverse_frequencies(64)
slow = L * base < 2 * math.pi  # 训练距离里转不满一圈的平面
inside, outside = torch.arange(L), torch.arange(L, S * L)


def basis(distances, inv_freq):
    """打分是距离的 cos、sin 的线性组合：系数由 q、k 决定，64 个。"""
    cos, sin = rope_cos_sin(distances.unsqueeze(0), inv_freq)
    return torch.cat((cos[0, :, :32], sin[0, :, :32]), dim=-1)


def fit(target, ridge=RIDGE, keep=1.0):
    """岭回归；keep 是 64 个 0/1，取 0 的列不用。"""
    design = torch.cat((basis(inside, base) * keep, math.sqrt(ridge) * torch.eye(64)))
    return torch.linalg.lstsq(design, torch.cat((target, torch.zeros(64))), driver="gelsd").solution


x = inside.double()
target = torch.exp(-x / 50)
weights = fit(target)
every = torch.arange(0, S * L, 12)
fig, ax = plt.subplots(figsize=(6.0, 3.2))
ax.plot(every, basis(every, base) @ weights, "-", color="C1", linewidth=1.2, label="直接外推")
ax.plot(every, basis(every, base / S) @ weights, "--", color="C0", linewidth=1.8, label="位置插值（PI）")
ax.plot(every, torch.exp(-every / 50), ":", color="C2", linewidth=2.2, label="目标 exp(−距离/50)")
ax.axvline(L, color="C4", linewidth=1)
ax.set(xlabel="相对距离", ylabel="打分", ylim=(-7, 11))
ax.legend(loc="upper left", fontsize=10, ncols=2)

assert slow.sum() == 16
assert (basis(inside, base) @ weights - target).abs().max() < 1e-3  # 训练距离内重合
worst = {  # 同一组系数，只换频率
    "直接外推": base,
    "PI": base / S,
    "NTK": ntk_scaled_frequencies(64, factor=float(S)),
    "YaRN": yarn_scaled_frequencies(64, factor=float(S), original_length=L),
}
worst = {name: (basis(outside, freq) @ weights).abs().max().item() for name, freq in worst.items()}
assert abs(worst["直接外推"] - 5.9) < 0.05 and worst["PI"] < 0.1
assert abs(worst["NTK"] - 6.1) < 0.05 and abs(worst["YaRN"] - 3.8) < 0.05
assert abs((basis(inside, base / S) @ weights - target).abs().max() - 0.47) < 0.005  # PI 在训练距离内的偏差
assert abs(weights.abs().sum() - 20) < 0.5  # 系数比打分大得多：靠相消
full_turn = torch.cat((~slow, ~slow)).double()  # 只留转满一圈的 16 个平面：单个角度都见过
for goal in (torch.exp(-x / 20), torch.exp(-x / 50), torch.exp(-((x - 100) ** 2) / 2000)):
    for ridge in (1e-8, 1e-6, 1e-4):
        w = fit(goal, ridge)
        top = (basis(inside, base) @ w).abs().max()
        assert (basis(outside, base) @ w).abs().max() > 1.15 * top  # 越界
        assert (basis(outside, base / S) @ w).abs().max() < 1.02 * top  # PI 不越界
        w = fit(goal, ridge, keep=full_turn)
        assert (basis(inside, base) @ w - goal).abs().max() < 0.14
        assert (basis(outside, base) @ w).abs().max() > 2.7  # 没有慢的平面也越界
assert (basis(outside, base) @ fit(torch.exp(-x / 200))).abs().max() < 0.6  # 平缓的目标不越界

# %%
#| label: scaled-frequencies
#| caption: 四种扩展方法把每个平面的频率乘以多少：PI 全部除以 4，NTK 从不动渐变到除以 4，YaRN 与 llama3 只动慢的平面；括号里是转到没见过的角度的平面数
HEAD, LENGTH, FACTOR = 128, 4096, 4.0
default = rope_inverse_frequencies(HEAD)
scaled = {
    "不改": default,
    "PI": linear_scaled_frequencies(default, factor=FACTOR),
    "NTK": ntk_scaled_frequencies(HEAD, factor=FACTOR),
    "YaRN": yarn_scaled_frequencies(HEAD, factor=FACTOR, original_length=LENGTH),
    "llama3": llama3_scaled_frequencies(default, factor=FACTOR, original_length=LENGTH),
}
not_full_turn = LENGTH * default < 2 * math.pi
unseen = {  # 训练中见过的角是 [0, L·θ)；新长度下转过了头的平面
    name: int((not_full_turn & (FACTOR * new > default * (1 + 1e-9))).sum()) for name, new in scaled.items()
}
fig, ax = plt.subplots(figsize=(6.0, 3.4))
for name, style in (("不改", "C4-"), ("PI", "C1--"), ("NTK", "C2-."), ("YaRN", "C0-"), ("llama3", "C3:")):
    ax.plot(range(64), scaled[name] / default, style, linewidth=2, label=f"{name}（{unseen[name]}）")
ax.axvline(45.5, color="C4", linewidth=1)
ax.annotate("右边转不满一圈", (46.5, 0.86), fontsize=10)
ax.set(xlabel="平面的序号 i（左快右慢）", ylabel="新频率 / 原频率", ylim=(0.15, 1.08))
ax.legend(loc="lower left", bbox_to_anchor=(0.0, 0.1), fontsize=10)

assert not_full_turn.sum() == 18 and not_full_turn[46:].all()
assert unseen == {"不改": 18, "PI": 0, "NTK": 17, "YaRN": 0, "llama3": 0}
yarn_ratio = scaled["YaRN"] / default
assert (yarn_ratio[:21] == 1).all() and (yarn_ratio[21:] < 1).all()  # 0 到 20 不动
torch.testing.assert_close(yarn_ratio[46:], torch.full((18,), 0.25))  # 46 起除以 4
turns = LENGTH * default / (2 * math.pi)
paper_ramp = ((turns - 1) / 31).clamp(0, 1)  # 论文式 (18)：对圈数线性
gap = (yarn_ratio - (paper_ramp + (1 - paper_ramp) / FACTOR)).abs().max()
assert abs(gap - 0.2754) < 1e-4
assert scaled["PI"][0] == 0.25 and scaled["llama3"][0] == 1  # 相邻 token 的夹角，弧度
assert scaled["NTK"][0] == 1 and abs(scaled["NTK"][-1] / default[-1] - 0.25) < 1e-12
new_base = 1e4 * FACTOR ** (HEAD / (HEAD - 2))
assert round(new_base) == 40890
for s, expected in ((4, 1.139), (16, 1.277), (40, 1.369)):
    assert abs(yarn_attention_factor(factor=float(s)) - expected) < 5e-4

# %%
#| label: decay-bound
#| caption: 左边是论文的上界，大体下降；右边是真实打分：全 1 的 q、k 边摆边降，另一对 q、k 的峰值在距离 500
D = 128
inv_freq = rope_inverse_frequencies(D)
distances = torch.arange(0, 1001)
phases = torch.polar(torch.ones(1001, D // 2), distances[:, None] * inv_freq)
partial_sums = phases.cumsum(-1)  # S_1 … S_{D/2}
bound = partial_sums.abs().sum(-1) / (D // 2)  # 与论文图 2 同一个量
ones = torch.ones(D)
flat = (rotated(ones, distances, inv_freq) * ones).sum(-1) / D
far_key = rotated(ones, torch.tensor([500]), inv_freq)  # 学到的 k 可以先转好 500 步
peaked = (rotated(ones, distances, inv_freq) * far_key).sum(-1) / D
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.1))
show = distances[::5]
axes[0].plot(show, bound[::5], color="C1")
axes[0].set(xlabel="相对距离", ylabel="上界（距离 0 的打分 = 1）", ylim=(0, 34))
axes[1].plot(show, flat[::5], "-", color="C0", label="q = k = 全 1")
axes[1].plot(show, peaked[::5], "--", color="C3", label="峰值在 500")
axes[1].set(xlabel="相对距离", ylabel="打分", ylim=(0, 1.4))
axes[1].legend(loc="upper right", fontsize=10)

rises = int((flat[:300].diff() > 0).sum())
assert rises == 134  # 299 步里有 134 步是升的
for curve in (bound, flat):  # 大体下降：每 250 步的平均逐段变小
    assert (curve[:1000].view(4, 250).mean(-1).diff() < 0).all()
assert abs(bound[0] - 32.5) < 1e-9 and abs(bound[1000] - 4.47) < 0.01
assert abs(flat[1000] - 0.159) < 1e-3 and (bound > flat.abs()).all()
assert abs(peaked[500] - 1) < 1e-9 and peaked.argmax() == 500 and abs(peaked[0] - 0.298) < 1e-3
a, c = torch.randn(D), torch.randn(D)  # 上界对任意 q、k 成立
h = torch.complex(a[:64], a[64:]) * torch.complex(c[:64], -c[64:])
exact = (rotated(a, distances, inv_freq) * c).sum(-1)
torch.testing.assert_close(exact, (phases * h).sum(-1).real)
steps = torch.cat((h.diff(), -h[-1:])).abs().max()
assert (exact.abs() <= steps * partial_sums.abs().sum(-1) + 1e-9).all()

# %%
#| label: bf16-angles
#| caption: 位置或频率存成 bfloat16 时 cos 的最大误差；在 float32 里算完再转，误差只有一次舍入
default32 = rope_inverse_frequencies(128).float()
rows, errors = [], {}
for position in (257, 1001, 4097, 32769):
    ids = torch.tensor([[position]])
    truth = rope_cos_sin(ids, rope_inverse_frequencies(128))[0]
    rounded = int(torch.tensor(position, dtype=torch.bfloat16))
    wrong_ids = rope_cos_sin(torch.tensor([[rounded]]), default32)[0]
    wrong_freq = rope_cos_sin(ids, default32.bfloat16().float())[0]
    right = rope_cos_sin(ids, default32)[0].bfloat16()
    errors[position] = [(x.double() - truth).abs().max().item() for x in (wrong_ids, wrong_freq, right)]
    rows.append([f"{position} → {rounded}", *(f"{e:.3f}" for e in errors[position])])

assert [row[0] for row in rows] == ["257 → 256", "1001 → 1000", "4097 → 4096", "32769 → 32768"]
assert all(e[0] > 0.4 and e[2] < 0.0025 for e in errors.values())
assert rows[0][1:] == ["0.859", "0.105", "0.002"] and rows[2][1:] == ["0.449", "1.735", "0.002"]
Markdown(
    tabulate(
        rows,
        headers=["位置 → bf16", "位置用 bf16", "频率用 bf16", "算完再转"],
        tablefmt="github",
        disable_numparse=True,
    )
)
