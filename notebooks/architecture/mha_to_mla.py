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
# # 从 MHA 到 MLA（MQA, GQA, Multi-head Latent Attention）：实验
#
# 页面 docs/architecture/mha-to-mla.md 里的表与图。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.attention import grouped_query_attention
from snippets.architecture.mha_to_mla import (
    LatentCache,
    MultiHeadLatentAttention,
    gqa_as_mla_projections,
    gqa_cache_elements,
    mla_absorbed,
    mla_absorbed_flops,
    mla_cache_elements,
    mla_naive,
    mla_naive_flops,
)
from snippets.architecture.rope import apply_rope, rope_cos_sin, rope_inverse_frequencies

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def largest(x):
    return x.abs().max().item()


def rotate(x, positions):
    """最后一维按位置旋转；x 的形状是 (1, 头, 位置, 维)。"""
    cos, sin = rope_cos_sin(positions[None], rope_inverse_frequencies(x.shape[-1]))
    return apply_rope(x, x, cos, sin)[0]


# %%
#| label: cache-per-token
#| caption: DeepSeek-V2 的 60 层、128 头、每头 128 维，分别配四种注意力时每个 token 缓存的元素数与 bf16 字节数
layers, heads, head_dim = 60, 128, 128
per_layer = {
    r"MHA，$2Hd_h$": gqa_cache_elements(num_kv_heads=heads, head_dim=head_dim),
    r"GQA-8，$2Kd_h$": gqa_cache_elements(num_kv_heads=8, head_dim=head_dim),
    r"MQA，$2d_h$": gqa_cache_elements(num_kv_heads=1, head_dim=head_dim),
    r"MLA，$d_c+d_h^R$": mla_cache_elements(latent_dim=4 * head_dim, rope_dim=head_dim // 2),
}
rows = [
    [name, f"{n:,}", f"{n / (2 * head_dim):g}", f"{n * layers * 2 / 1024:,.1f}"]
    for name, n in per_layer.items()
]
counts = list(per_layer.values())
assert counts == [32768, 2048, 256, 576] and counts[3] == 4.5 * head_dim == 512 + 64
assert [r[2] for r in rows] == ["128", "8", "1", "2.25"] and counts[3] * layers == 34560
assert [r[3] for r in rows] == ["3,840.0", "240.0", "30.0", "67.5"]
assert f"{1 - 576 / 32768:.1%}" == "98.2%" and round(32768 / 576, 1) == 56.9
# 摘要的 93.3%：V2（6 bit，60 层）对 DeepSeek 67B（GQA-8，95 层，16 bit）；只数元素是 82.2%
assert f"{1 - 576 * 60 * 6 / (2048 * 95 * 16):.1%}" == "93.3%"
assert f"{1 - 576 * 60 / (2048 * 95):.1%}" == "82.2%"
Markdown(
    tabulate(
        rows,
        headers=["每层每 token", "元素", "合 GQA 几组", "整个模型 KiB"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: naive-equals-absorbed
#| caption: 同一层 MLA 用展开与吸收两种算法的最大差别，以及四种写错的吸收与展开的最大差别
H, DC, DR, DN, DV = 4, 32, 8, 16, 16
layer = MultiHeadLatentAttention(
    64, num_heads=H, q_lora_rank=48, kv_lora_rank=DC, qk_nope_head_dim=DN, qk_rope_head_dim=DR, v_head_dim=DV
)
for p in layer.parameters():
    p.requires_grad_(False)
layer.q_b_proj.weight.mul_(4)  # 让打分不至于太平
frequencies = rope_inverse_frequencies(DR)


def angles(start, stop):
    return rope_cos_sin(torch.arange(start, stop)[None], frequencies)


rows, errors = [], []
for length in (1, 16, 128):
    x = torch.randn(1, length, 64)
    gap = largest(layer(x, cos_sin=angles(0, length)) - layer(x, cos_sin=angles(0, length), absorb=True))
    errors.append(gap)
    rows.append([f"吸收，整段 {length}", "小于 1e-12"])
full, cache = layer(x, cos_sin=angles(0, 128)), LatentCache()
steps = [layer(x[:, :96], cos_sin=angles(0, 96), cache=cache)]  # 预填充用展开
for t in range(96, 128):  # 解码用吸收
    steps.append(layer(x[:, t : t + 1], cos_sin=angles(t, t + 1), cache=cache, absorb=True))
errors.append(largest(torch.cat(steps, dim=1) - full))
rows.append(["展开预填充 96，再吸收解码 32 步", "小于 1e-12"])
assert max(errors) < 1e-12 and cache.entries.numel() == 128 * (DC + DR)

generator = torch.Generator().manual_seed(1)
shapes = [(1, H, 64, DN), (1, H, 64, DR), (1, 64, DC), (1, 64, DR), (H, DN, DC), (H, DV, DC)]
q_nope, q_rope, latent, k_rope, k_up, v_up = (torch.randn(s, generator=generator) for s in shapes)
k_up, v_up = k_up / DC**0.5, v_up / DC**0.5
truth = mla_naive(q_nope, q_rope, latent, k_rope, k_up, v_up)
shrink = ((DN + DR) / (DC + DR)) ** 0.5
wrong = {
    "系数按缩并的维数 $d_c+d_h^R$": mla_absorbed(
        q_nope * shrink, q_rope * shrink, latent, k_rope, k_up, v_up
    ),
    "只缓存潜向量，丢掉旋转键": mla_absorbed(q_nope, q_rope, latent, 0 * k_rope, k_up, v_up),
    "所有头共用一个升维矩阵": mla_absorbed(
        q_nope, q_rope, latent, k_rope, k_up[:1].expand_as(k_up), v_up[:1].expand_as(v_up)
    ),
    "潜向量没归一化（这里放大 2 倍）": mla_absorbed(q_nope, q_rope, 2 * latent, k_rope, k_up, v_up),
}
for name, out in wrong.items():
    gap = largest(out - truth)
    assert gap > 0.3
    rows.append([name, f"{gap:.2f}"])
assert [r[1] for r in rows[4:]] == ["0.52", "0.95", "3.31", "3.54"]
Markdown(tabulate(rows, headers=["写法", "与展开的最大差"], tablefmt="github", disable_numparse=True))

# %%
#| label: rope-blocks-absorption
#| caption: 把旋转加在升维后的键上，几种算打分的办法与真值的相对误差、每个 token 要缓存多少、每步的代价
dim, num_keys = 64, 256
generator = torch.Generator().manual_seed(2)
w = torch.randn(dim, 128, generator=generator) / 128**0.5  # 一个头的 W^{UK}
q = torch.randn(1, 1, 1, dim, generator=generator)
c = torch.randn(1, 1, num_keys, 128, generator=generator)
now, positions = torch.tensor([num_keys - 1]), torch.arange(num_keys)
exact = (rotate(q, now) @ rotate(c @ w.T, positions).mT).flatten()


def relative(scores):
    return ((scores - exact).norm() / exact.norm()).item()


offsets = {}
for delta in range(num_keys):  # R_δ W^{UK}，δ = j - t；M(δ) = W^{UK}ᵀ R_δ W^{UK} 随 δ 变
    turned = rotate((w.T)[None, None], torch.full((128,), -delta))[0, 0]  # 行是 (R_{-δ} w_i)ᵀ
    offsets[delta] = turned.T
per_offset = torch.stack([(q.flatten() @ offsets[num_keys - 1 - j]) @ c[0, 0, j] for j in range(num_keys)])
best = sum(offsets.values()) / num_keys  # 不随偏移变的矩阵里，误差平方和最小的那个
fixed = (q @ best @ c.mT).flatten()
ignored = (q @ w @ c.mT).flatten()
moved = (rotate(q @ w, now) @ rotate(c, positions).mT).flatten()
pinv = torch.linalg.pinv(w)  # 单个头的 W^{UK} 是扁的：W⁺R_jW 就能在潜空间里代替 R_j，但每个头不同
own = rotate(c @ w.T, positions) @ pinv.T
own_query = rotate(q, now) @ w
errors = [relative(x) for x in (per_offset, ignored, moved, fixed, (own_query @ own.mT).flatten())]
rows = [
    ["展开，再旋转键", "0", "$d_c$", "每步重升全部键"],
    ["吸收，每个偏移一个查询", "0", "$d_c$", "每步 $S$ 个查询"],
    ["吸收，不管旋转", f"{errors[1]:.2f}", "$d_c$", "—"],
    ["吸收，改转潜向量", f"{errors[2]:.2f}", "$d_c$", "—"],
    ["吸收，对偏移取平均", f"{errors[3]:.2f}", "$d_c$", "—"],
    ["每个头各转一份潜向量", "0", "$Hd_c$", "缓存又有了头数"],
    ["缓存旋转后的键", "0", "$Hd_h+d_c$", "缓存又有了头数"],
]
assert errors[0] < 1e-12 and errors[4] < 1e-12 and [r[1] for r in rows[2:5]] == ["0.96", "1.29", "0.67"]
# 所有头共用一个 R'：把各头的 W^{UK} 竖着叠起来，最小二乘的残差；行数 H·d_h 不超过 d_c 时为 0
residual = {}
for num_heads in (1, 2, 4, 8):
    stacked = torch.randn(num_heads, dim, 128, generator=generator) / 128**0.5
    turned = rotate(stacked.mT[None], torch.full((128,), 5)).mT.flatten(0, 2)
    flat = stacked.flatten(0, 1)
    shared = torch.linalg.pinv(flat) @ turned
    residual[num_heads] = ((flat @ shared - turned).norm() / turned.norm()).item()
assert residual[1] < 1e-9 and residual[2] < 1e-9
assert [f"{residual[n]:.2f}" for n in (4, 8)] == ["0.48", "0.59"]
# M(δ) = W^{UK}ᵀ R_δ W^{UK} 相对于 δ = 0 变了多少
gap = {d: ((w.T @ offsets[d] - w.T @ w).norm() / (w.T @ w).norm()).item() for d in (1, 5, 50)}
assert [f"{gap[d]:.2f}" for d in (1, 5, 50)] == ["0.20", "0.61", "0.89"]
Markdown(
    tabulate(
        rows, headers=["做法", "打分的相对误差", "缓存", "代价"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: flops-crossover
#| caption: 缓存 4096 个 token 时一层的计算量随新 token 数变化：现展开与吸收约在 164 个处相交，缓存展开结果的写法总是最少
prefix = 4096
ts = [2**i for i in range(0, 13)]
naive = [mla_naive_flops(num_queries=t, num_keys=prefix + t, num_expanded=prefix + t) for t in ts]
kept = [mla_naive_flops(num_queries=t, num_keys=prefix + t, num_expanded=t) for t in ts]
absorbed = [mla_absorbed_flops(num_queries=t, num_keys=prefix + t) for t in ts]
fig, ax = plt.subplots(figsize=(6.0, 3.6))
ax.plot(ts, [x / 1e9 for x in naive], "s-", color="C1", markersize=4, label="展开，缓存潜向量（576 个元素）")
ax.plot(ts, [x / 1e9 for x in absorbed], "o--", color="C0", markersize=4, label="吸收（576 个元素）")
ax.plot(ts, [x / 1e9 for x in kept], "^:", color="C2", markersize=4, label="缓存展开的键值（40,960 个元素）")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks([1, 16, 256, 4096], ["1", "16", "256", "4096"])
ax.axvline(164, color="C4", linewidth=1)
ax.annotate("164", (180, 3), fontsize=10)
ax.set(xlabel="新 token 数 T", ylabel="十亿次浮点运算")
ax.legend(loc="upper left", fontsize=10)


def gap(t, p):
    return mla_naive_flops(num_queries=t, num_keys=p + t, num_expanded=p + t) - mla_absorbed_flops(
        num_queries=t, num_keys=p + t
    )


assert gap(164, prefix) > 0 > gap(165, prefix)  # 164 个及以下吸收更省
assert gap(1, 0) < 0 and gap(4096, 0) < 0  # 没有前缀的预填充：展开总是更省
assert all(k < min(a, n) for k, a, n in zip(kept, absorbed, naive, strict=True) if k != n)
assert gap(170, 10**7) > 0 > gap(171, 10**7)  # 前缀很长时的极限 131072/768 = 170.7
assert 131072 / 768 == 512 / 3 and round(512 / 3, 1) == 170.7
# 解码一步：吸收的打分与加权是缓存展开结果的 3.4 倍，读的字节却是 1/71；现展开是吸收的 117 倍
one = dict(num_queries=1, num_keys=prefix + 1)
assert 128 * (192 + 128) == 40960 and round(40960 / 576, 1) == 71.1 and 1088 / 320 == 3.4
assert round(mla_naive_flops(**one, num_expanded=prefix + 1) / mla_absorbed_flops(**one)) == 117
assert round(2 * 128 * 1088 / (576 * 2)) == 242 and 2 * 128 * 320 / (40960 * 2) == 1.0  # FLOP/byte

# %%
#| label: tensor-parallel-cache
#| caption: 61 层、bf16、32K 上下文的一条序列在每张卡上的缓存随张量并行度的变化：GQA-8 按头切开，MLA 每张卡一份完整的
rows = []
for tp in (1, 2, 4, 8, 16):
    gqa = gqa_cache_elements(num_kv_heads=max(8 / tp, 1), head_dim=128)
    mla = mla_cache_elements(latent_dim=512, rope_dim=64)
    gib = [n * 61 * 32768 * 2 / 2**30 for n in (gqa, mla)]
    rows.append([tp, f"{gqa:g}", f"{mla}", f"{gib[0]:.2f}", f"{gib[1]:.2f}"])
assert [r[1] for r in rows] == ["2048", "1024", "512", "256", "256"] and {r[2] for r in rows} == {"576"}
assert [r[3] for r in rows] == ["7.62", "3.81", "1.91", "0.95", "0.95"] and rows[0][4] == "2.14"
Markdown(
    tabulate(
        rows,
        headers=["TP", "GQA-8 元素", "MLA 元素", "GQA-8 GiB", "MLA GiB"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: gqa-inside-mla
#| caption: 缓存同为 2KD 个元素：挑选矩阵让 MLA 重现 GQA；换成一般的升维矩阵后，全部头的键张成的维数翻倍
H, K, D, S = 8, 2, 16, 200
q, k, v = (torch.randn(1, n, S, D) for n in (H, K, K))
k_sel, v_sel = gqa_as_mla_projections(num_heads=H, num_kv_heads=K, head_dim=D)
latent = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)
empty = torch.empty(1, H, S, 0)
same = largest(
    mla_absorbed(q, empty, latent, empty[:, 0], k_sel, v_sel)
    - grouped_query_attention(q, k, v, is_causal=True)
)
k_gen = torch.randn(H, D, 2 * K * D)


def key_rank(up):
    keys = torch.einsum("bsc,hnc->bshn", latent, up).flatten(2)[0]
    return torch.linalg.matrix_rank(keys).item()


def commute_error(up):  # 先升维再旋转，与先逐段旋转潜向量再升维
    positions = torch.arange(S)
    after = rotate(torch.einsum("bsc,hnc->bhsn", latent, up), positions)
    segments = rotate(latent.unflatten(-1, (-1, D)).transpose(1, 2), positions)
    before = torch.einsum("bsc,hnc->bhsn", segments.transpose(1, 2).flatten(2), up)
    return (after - before).norm().item() / after.norm().item()


ranks, commute = [key_rank(k_sel), key_rank(k_gen)], [commute_error(k_sel), commute_error(k_gen)]
assert same < 1e-12 and ranks == [K * D, 2 * K * D] and commute[0] < 1e-12 and commute[1] > 1
rows = [
    ["挑选（即 GQA）", latent.shape[-1], ranks[0], "0"],
    ["一般的矩阵（MLA）", latent.shape[-1], ranks[1], f"{commute[1]:.1f}"],
]
assert f"{commute[1]:.1f}" == "1.2"
Markdown(
    tabulate(
        rows,
        headers=["$W^{UK}$", "缓存元素", "键的秩", "与旋转交换的误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)
