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
# # FlashAttention：分块与在线 softmax（Online Softmax）：实验
#
# 页面 `docs/architecture/flash-attention.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.attention_scaling import causal_mask, scaled_dot_product_attention
from snippets.architecture.flash_attention import (
    HbmTraffic,
    flash_attention_backward,
    flash_attention_forward,
    merge,
    online_softmax_step,
    three_pass_attention,
)

torch.manual_seed(0)


def random_qkv(n, d, dtype=torch.float64):
    return [torch.randn(1, 1, n, d, dtype=dtype) for _ in range(4)]


def full_attention(q, k, v, grad, *, is_causal=False):
    """一次算完整个 N×N 的注意力：输出、lse 与自动求导的梯度。"""
    q, k, v = (x.clone().requires_grad_() for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, is_causal=is_causal)
    scores = (q @ k.mT / math.sqrt(q.shape[-1])).detach()
    if is_causal:
        scores = scores.masked_fill(~causal_mask(num_queries=q.shape[2], num_keys=k.shape[2]), -math.inf)
    return out.detach(), scores.logsumexp(-1), *torch.autograd.grad((out * grad).sum(), (q, k, v))


def count(function, *args, **kwargs):
    with HbmTraffic() as traffic:
        function(*args, **kwargs)
    return traffic.loads + traffic.stores


# %%
#| label: exact
#| caption: 分块的前向与反向同整张矩阵一次算完之间的最大绝对误差，float64，含因果、不整除的块与大小不同的块
n, d = 200, 32
q, k, v, grad = random_qkv(n, d)
rows, worst = [], 0.0
for block_q, block_k, is_causal in ((64, 64, False), (48, 80, False), (64, 64, True), (80, 48, True)):
    kwargs = dict(block_q=block_q, block_k=block_k, is_causal=is_causal)
    out, lse = flash_attention_forward(q, k, v, **kwargs)
    mine = (out, lse, *flash_attention_backward(grad, q, k, v, out, lse, **kwargs))
    expected = full_attention(q, k, v, grad, is_causal=is_causal)
    errors = [(a - b).abs().max().item() for a, b in zip(mine, expected, strict=True)]
    worst = max(worst, *errors)
    shown = [f"{e:.0e}" if e > 1e-14 else "< 1e-14" for e in (errors[0], errors[1], max(errors[2:]))]
    rows.append([f"{block_q}×{block_k}", "是" if is_causal else "否", *shown])
assert worst < 1e-14
Markdown(
    tabulate(
        rows, headers=["$B_r×B_c$", "因果", "$O$", "$L$", "梯度"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: traffic-by-sram
#| caption: 一个头、1024 个位置、每头 64 维的前向：片上存储越大，分块算法的 HBM 读写越少，重读 K、V 的部分斜率为负一；标准算法与它无关
n, d = 1024, 64
q, k, v, _ = random_qkv(n, d, torch.float32)
standard = count(three_pass_attention, q, k, v)
sizes, total, reload_kv = [2**i for i in range(13, 19)], [], []
for m in sizes:
    block_q, block_k = m // (4 * d), min(m // (8 * d), d)
    # Q、O 各 Br·d，K、V 各 Bc·d，打分 Br·Bc：不超过 M
    assert 2 * block_q * d + 2 * block_k * d + block_q * block_k <= m
    total.append(count(flash_attention_forward, q, k, v, block_q=block_q, block_k=block_k))
    reload_kv.append(total[-1] - (2 * n * d + n))  # 去掉 Q 读一遍、O 与 lse 各写一遍
    assert reload_kv[-1] == 2 * n * d * n // block_q == 8 * n * n * d * d // m


def slope(x, y):
    x, y = (torch.tensor(z, dtype=torch.float64).log() for z in (x, y))
    return (((x - x.mean()) * (y - y.mean())).sum() / (x - x.mean()).square().sum()).item()


fig, ax = plt.subplots(figsize=(6.0, 3.4))
ax.axhline(standard / 1e6, color="C1", linestyle="--", label="标准算法（三个内核）")
ax.plot(sizes, [x / 1e6 for x in total], "o-", color="C0", label="分块，全部读写")
ax.plot(sizes, [x / 1e6 for x in reload_kv], "^:", color="C2", label="其中重读 K、V")
ax.set(xscale="log", yscale="log", xlabel="片上存储 M（元素个数）", ylabel="HBM 读写（百万个元素）")
ax.set_xticks(sizes, [f"{m // 1024}K" for m in sizes])
ax.set_yticks([0.1, 0.3, 1, 3], ["0.1", "0.3", "1", "3"])
ax.minorticks_off()
ax.legend(loc="lower left")

assert standard == 4 * n * d + 4 * n * n == 4456448
assert [round(x / 1e6, 2) for x in total] == [4.33, 2.23, 1.18, 0.66, 0.39, 0.26]
assert abs(slope(sizes, reload_kv) + 1) < 1e-9  # 重读的部分恰是 M^-1
assert abs(slope(sizes, total) + 0.82) < 0.01
assert abs(standard / total[sizes.index(2**16)] - 6.8) < 0.05
# 对 N、d 的指数：重读的部分恰是 N²、d²
by_n, by_d = [], []
for n2 in (256, 512, 1024):
    x = torch.randn(1, 1, n2, 64)
    by_n.append(count(flash_attention_forward, x, x, x, block_q=64, block_k=32) - (2 * n2 * 64 + n2))
for d2 in (16, 32, 64):
    x = torch.randn(1, 1, 512, d2)
    by_d.append(
        count(flash_attention_forward, x, x, x, block_q=2**14 // (4 * d2), block_k=16) - (2 * 512 * d2 + 512)
    )
assert abs(slope((256, 512, 1024), by_n) - 2) < 1e-9 and abs(slope((16, 32, 64), by_d) - 2) < 1e-9

# %%
#| label: what-is-saved
#| caption: 一个头、1024 个位置、每头 64 维：分块算法省了读写与保存的激活，矩阵乘的次数反而更多
n, d = 1024, 64
q, k, v, grad = random_qkv(n, d, torch.float32)


def flops(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops() / (n * n * d), result


kwargs = dict(block_q=256, block_k=32)
leaves = [x.clone().requires_grad_() for x in (q, k, v)]
saved = []
with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x) or x, lambda x: x):
    forward_std, out_std = flops(lambda: scaled_dot_product_attention(*leaves))
backward_std, _ = flops(lambda: torch.autograd.grad((out_std * grad).sum(), leaves))
forward_flash, (out, lse) = flops(lambda: flash_attention_forward(q, k, v, **kwargs))
backward_flash, _ = flops(lambda: flash_attention_backward(grad, q, k, v, out, lse, **kwargs))
square = {x.data_ptr() for x in saved if x.shape[-2:] == (n, n)}  # 保存下来的 N×N 矩阵
assert len(square) >= 1 and lse.numel() == n  # 分块的前向只多存 lse
# 对照：分块的前向若交给自动求导，每一块的权重都被存下，加起来又是 N²
naive = []
with torch.autograd.graph.saved_tensors_hooks(lambda x: naive.append(x) or x, lambda x: x):
    flash_attention_forward(*leaves, **kwargs)[0].sum()
tiles = {x.data_ptr(): x.numel() for x in naive if x.shape[-2:] == (256, 32) and x.dtype == torch.float32}
assert sum(tiles.values()) >= n * n
assert (forward_std, backward_std, forward_flash, backward_flash) == (4, 8, 4, 10)
assert abs((forward_flash + backward_flash) / (forward_std + backward_std) - 14 / 12) < 1e-12
causal = count(flash_attention_forward, q, k, v, block_q=64, block_k=64, is_causal=True)
full = count(flash_attention_forward, q, k, v, block_q=64, block_k=64)
assert abs(causal / full - 0.56) < 0.005
rows = [
    ["前向矩阵乘", r"$4N^2d$", r"$4N^2d$"],
    ["反向矩阵乘", r"$8N^2d$", r"$10N^2d$"],
    ["前向 HBM 读写", f"{standard / 1e6:.2f} M", f"{total[sizes.index(2**16)] / 1e6:.2f} M"],
    ["反向另存", r"$P$：$N^2$", r"$L$：$N$"],
]
Markdown(tabulate(rows, headers=["一个头", "标准", "分块"], tablefmt="github", disable_numparse=True))

# %%
#| label: wrong-versions
#| caption: 常见错误写法对输出、lse 或梯度造成的最大误差，float32，前四行打分的标准差为 3，正确写法在 1e-4 以内
torch.manual_seed(0)
n, d, block = 128, 16, 32
q, k, v, grad = random_qkv(n, d, torch.float32)
q = 3 * q
truth = full_attention(*(x.double() for x in (q, k, v, grad)))


def tiled(*, initial=-math.inf, rescale=1.0, divide=False, k=k):
    """只有前向、query 不分块的短版；rescale=0 就是不乘；divide 取逆，但放过第一块（照字面是 ∞·0）。"""
    m = torch.full((1, 1, n, 1), initial)
    total, acc = torch.zeros(1, 1, n, 1), torch.zeros(1, 1, n, d)
    for j in range(0, n, block):
        scores = q @ k[:, :, j : j + block].mT / math.sqrt(d)
        new_m, new_total, right = online_softmax_step(m, total, acc, scores, v[:, :, j : j + block])
        factor = (m - new_m).exp()
        power = -1.0 if divide and j > 0 else rescale
        acc = right - factor * acc + factor**power * acc
        m, total = new_m, new_total
    return acc / total, (m + total.log()).squeeze(-1)


def error(x, y):
    return (x.double() - y).abs().max().item()


out, lse = tiled()
assert error(out, truth[0]) < 1e-4 and error(lse, truth[1]) < 1e-4
no_rescale, inverse = error(tiled(rescale=0.0)[0], truth[0]), error(tiled(divide=True)[0], truth[0])
total_only = error(lse - (q @ k.mT / math.sqrt(d)).amax(-1), truth[1])  # 只存 ln ℓ
p = torch.softmax(q @ k.mT / math.sqrt(d), dim=-1)
without_delta = error((p * (grad @ v.mT)) @ k / math.sqrt(d), truth[2])
with_delta = error((p * (grad @ v.mT - (grad * out).sum(-1, keepdim=True))) @ k / math.sqrt(d), truth[2])
assert with_delta < 1e-4

# m 从 0 起：所有打分都低于 -104 时，float32 的指数全部下溢成 0
low = torch.randn(16, 16) - 200
assert low.max() < -104 and (low.exp().sum(-1) == 0).all() and torch.softmax(low, -1).isfinite().all()
assert torch.tensor(-104.0).exp() == 0
assert (0 * (torch.tensor(-math.inf) - low.max()).exp() ** -1).isnan()  # 逐字取逆的第一块
nan = (torch.tensor(-math.inf) - torch.tensor(-math.inf)).exp()
assert nan.isnan()
rows = [
    ["不乘 $e^{m-m'}$", "$O$", f"{no_rescale:.1f}"],
    ["乘成它的倒数", "$O$", "> 100"],
    [r"只存 $\ln\ell$，漏了 $m$", "$L$", f"{total_only:.1f}"],
    [r"反向漏了 $\Delta$", "$dQ$", f"{without_delta:.1f}"],
    ["$m$ 从 0 起，打分低于 −104", "$O$", "0/0"],
    ["全遮住的行不设防", "$O$", "nan"],
]
assert abs(no_rescale - 2.8) < 0.1 and inverse > 100 and abs(total_only - 13.3) < 0.1
assert abs(without_delta - 5.0) < 0.1
Markdown(tabulate(rows, headers=["错误写法", "错在", "最大误差"], tablefmt="github", disable_numparse=True))

# %%
#| label: split-kv
#| caption: 一个 query、4096 个 key 切成几段各自计算再合并：按 lse 合并与一次算完相同，直接平均不同
torch.manual_seed(0)
q1, keys, values = (torch.randn(1, 1, s, 64, dtype=torch.float64) for s in (1, 4096, 4096))
q1 = 3 * q1  # 打分的标准差约为 3
whole, whole_lse = flash_attention_forward(q1, keys, values, block_q=1, block_k=128)
rows, worst, averages = [], 0.0, []
for parts in (2, 4, 8, 16):
    pieces = [
        flash_attention_forward(q1, a, b, block_q=1, block_k=128)
        for a, b in zip(keys.chunk(parts, dim=2), values.chunk(parts, dim=2), strict=True)
    ]
    merged = pieces[0]
    for piece in pieces[1:]:
        merged = merge(*merged, *piece)
    worst = max(worst, error(merged[0], whole), error(merged[1], whole_lse))
    averages.append(error(torch.stack([o for o, _ in pieces]).mean(0), whole) / whole.abs().max().item())
    rows.append([parts, 4096 // parts, "< 1e-14", f"{averages[-1]:.0%}"])
assert worst < 1e-14 and averages == sorted(averages)
assert [f"{x:.0%}" for x in averages] == ["24%", "61%", "83%", "88%"]
Markdown(
    tabulate(
        rows,
        headers=["段数", "每段 key 数", "按 $L$ 合并", "直接平均"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
# 页面正文里的其他数字。
# m 不必是最大值：只要 ℓ、A 用同一个 m，结果在实数里不变；落后至多 8（以 2 为底）时指数不超过 256。
x = torch.randn(50, dtype=torch.float64)
w = torch.randn(50, dtype=torch.float64)
for stale in (x.max() - 8 * math.log(2), x.max(), x.max() + 3):
    e = (x - stale).exp()
    torch.testing.assert_close((e * w).sum() / e.sum(), (torch.softmax(x, 0) * w).sum())
assert abs((8 * torch.tensor(2.0).log()).exp().item() - 256) < 1e-3

# 显存：每个头 bf16 的 N×N 与 float32 的 lse
for n, mib, kib in ((1024, 2, 4), (4096, 32, 16), (16384, 512, 64)):
    assert n * n * 2 == mib * 2**20 and n * 4 == kib * 2**10

# 论文图 2 左（A100，GPT-2 medium，前向加反向）：运算多 13%，读写少 9 倍，时间少 5.7 倍；按矩阵乘计是 14/12
assert abs(75.2 / 66.6 - 1.13) < 0.005 and abs(40.3 / 4.4 - 9.2) < 0.05 and abs(41.7 / 7.3 - 5.7) < 0.02
assert abs(14 / 12 - 1.17) < 0.005
# 解码：一个 query，K、V 各读一遍，分块与标准几乎一样多
dec_q, dec_k = torch.randn(1, 1, 1, 64), torch.randn(1, 1, 4096, 64)
decode_flash = count(flash_attention_forward, dec_q, dec_k, dec_k, block_q=1, block_k=128)
decode_std = count(three_pass_attention, dec_q, dec_k, dec_k)
assert abs(decode_std / decode_flash - 1.03) < 0.005
