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
# # 手撕注意力（causal mask, MHA, GQA, MQA）：实验
#
# 页面 `docs/architecture/attention.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.attention import (
    Attention,
    causal_padding_mask,
    grouped_query_attention,
    merge_heads,
    repeat_kv,
    split_heads,
)
from snippets.architecture.attention_scaling import attention_scores, causal_mask, stable_softmax

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: wrong-versions
#| caption: 错误写法与 SDPA 的最大误差，以及改最后一个 token 会不会动到之前的输出；取模映射只在 GQA 一列露馅，直接 view、打分乘 0、先 softmax 后掩码都会漏看未来
B, H, D = 2, 8, 16
T, S = 8, 12  # 8 个新 query，另有 4 个 key 在缓存里


def wrong_split(x, num_heads):
    return x.view(x.shape[0], num_heads, x.shape[1], -1)


def attend(
    q, k, v, *, split=None, order="block", scale=D**-0.5, diagonal=S - T, dim=-1, late=None, flip=False
):
    """错误写法的模板：输入是投影之后、切头之前的 (B, T, H·D) 与 (B, S, K·D)。"""
    num_kv_heads = k.shape[-1] // D
    split = split or (lambda x, n: split_heads(x, num_heads=n))
    q, k, v = split(q, H), split(k, num_kv_heads), split(v, num_kv_heads)
    groups = H // num_kv_heads
    k, v = (
        repeat_kv(x, num_groups=groups) if order == "block" else x.repeat(1, groups, 1, 1) for x in (k, v)
    )
    visible = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool).tril(diagonal)
    if flip:  # 把「True 是挡住」的掩码交给 SDPA
        return merge_heads(F.scaled_dot_product_attention(q, k, v, attn_mask=~visible, scale=scale))
    scores = q @ k.transpose(-2, -1) * scale
    if late == "zero":  # 打分乘 0，而不是填负无穷
        weights = torch.softmax(scores * visible, dim=dim)
    elif late is None:
        weights = torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=dim).nan_to_num()
    else:
        weights = torch.softmax(scores, dim=dim) * visible
        weights = weights / weights.sum(-1, keepdim=True) if late == "renormalised" else weights
    return merge_heads(weights @ v)


def oracle(q, k, v):
    """PyTorch 自己的实现：enable_gqa 加显式的右下角掩码。"""
    q = q.unflatten(-1, (H, D)).transpose(1, 2)
    k, v = (x.unflatten(-1, (-1, D)).transpose(1, 2) for x in (k, v))
    visible = torch.ones(T, S, dtype=torch.bool).tril(S - T)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
    return out.transpose(1, 2).flatten(2)


def reference(q, k, v):
    num_kv_heads = k.shape[-1] // D
    q = split_heads(q, num_heads=H)
    k, v = (split_heads(x, num_heads=num_kv_heads) for x in (k, v))
    return merge_heads(grouped_query_attention(q, k, v, is_causal=True))


versions = {
    "参考实现": None,
    "直接 view": dict(split=wrong_split),
    "取模映射": dict(order="modulo"),
    r"没有除以 $\sqrt d$": dict(scale=1.0),
    "掩码多看一个": dict(diagonal=S - T + 1),
    "掩码少看一个": dict(diagonal=S - T - 1),
    "左上角对齐": dict(diagonal=0),
    "布尔掩码反了": dict(flip=True),
    "对 query 轴 softmax": dict(dim=-2),
    "打分乘 0": dict(late="zero"),
    "先 softmax 后掩码": dict(late="plain"),
    "同上，再归一": dict(late="renormalised"),
}
flat = {n: torch.randn(B, S, n * D) for n in (8, 2, 1)}, {n: torch.randn(B, S, n * D) for n in (8, 2, 1)}
queries = torch.randn(B, T, H * D)
rows, error, leak = [], {}, {}
for name, options in versions.items():
    function = reference if options is None else lambda q, k, v, o=options: attend(q, k, v, **o)
    row = [name]
    for K in (8, 2, 1):
        k, v = flat[0][K], flat[1][K]
        error[name, K] = (function(queries, k, v) - oracle(queries, k, v)).abs().max().item()
        row.append(f"{error[name, K]:.2f}" if error[name, K] > 1e-12 else "0")
        edited = [x.clone() for x in (queries, k, v)]
        for x in edited:
            x[:, -1] += 1.0  # 只改最后一个 token
        change = (function(*edited) - function(queries, k, v))[:, :-1].abs().max().item()
        leak[name, K] = change > 1e-12
    assert len({leak[name, K] for K in (8, 2, 1)}) == 1  # 三种头数结论一样
    row.append("漏" if leak[name, 8] else "不漏")
    rows.append(row)

right = {"参考实现", "同上，再归一"}
assert all(error[n, K] < 1e-12 for n in right for K in (8, 2, 1))
assert all(error["取模映射", K] < 1e-12 for K in (8, 1)) and abs(error["取模映射", 2] - 2.65) < 0.005
assert all(error["布尔掩码反了", K] > 2.8 for K in (8, 2, 1))
assert all(e > 0.1 for (n, K), e in error.items() if n not in right and n != "取模映射")
assert {n for n in versions if leak[n, 8]} == {
    "直接 view",
    "掩码多看一个",
    "布尔掩码反了",
    "对 query 轴 softmax",
    "打分乘 0",
    "先 softmax 后掩码",
}
Markdown(
    tabulate(
        rows,
        headers=["写法", "MHA", "GQA", "MQA", "未来"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: causality-map
#| caption: 左图是参考实现，改第 t 个 token 只影响 t 及之后的输出，呈下三角；右图直接 view 成目标形状，叉号处是被未来的 token 影响的输出
num_tokens, num_heads, head_dim = 8, 2, 4
hidden = torch.randn(1, num_tokens, 8)
weights = [torch.randn(8, 8) for _ in range(3)]


def layer(x, split):
    q, k, v = (split(x @ w) for w in weights)
    return merge_heads(grouped_query_attention(q, k, v, is_causal=True))


def influence(split):
    """changed[i, t]：改第 t 个 token，第 i 个输出变不变。"""
    columns = []
    for t in range(num_tokens):
        edited = hidden.clone()
        edited[:, t] += 1.0
        columns.append((layer(edited, split) - layer(hidden, split)).abs().amax(dim=(0, 2)) > 0)
    return torch.stack(columns, dim=1)


maps = {
    "先拆再换轴": influence(lambda x: split_heads(x, num_heads=num_heads)),
    "直接 view": influence(lambda x: wrong_split(x, num_heads)),
}
future = torch.ones(num_tokens, num_tokens, dtype=torch.bool).triu(1)
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.3), sharey=True)
for ax, (title, changed) in zip(axes, maps.items(), strict=True):
    i, t = (changed & ~future).nonzero(as_tuple=True)
    ax.plot(t, i, "s", color="C0", markersize=8, label="当前与过去")
    i, t = (changed & future).nonzero(as_tuple=True)
    ax.plot(t, i, "x", color="C1", markersize=8, markeredgewidth=2, label="未来")
    ax.set(title=title, xlabel="被改的位置 t", xlim=(-0.6, 7.6), ylim=(7.6, -0.6), aspect="equal")
    ax.set_xticks(range(8))
    ax.set_yticks(range(8))
axes[0].set_ylabel("输出的位置 i")
handles, labels = axes[1].get_legend_handles_labels()
fig.legend(handles, labels, loc="outside lower center", ncols=2)

assert torch.equal(maps["先拆再换轴"], ~future)  # 恰是下三角
leaked, lost = (maps["直接 view"] & future).sum().item(), (~maps["直接 view"] & ~future).sum().item()
assert (leaked, lost) == (10, 6)
assert maps["直接 view"][0].nonzero().flatten().tolist() == [0, 4]  # 第 0 个输出看见了第 4 个 token

# %%
#| label: padding-sides
#| caption: 左右填充、有无填充掩码时，真实位置的输出与单独计算那一条的最大误差，以及整行被挡的行数：右填充不加掩码也是 0
pad, length = 3, 7
q, k, v = (torch.randn(1, heads, length, D) for heads in (8, 2, 2))
rows, padding = [], {}
for side in ("左", "右"):
    real = slice(pad, length) if side == "左" else slice(0, length - pad)
    attention_mask = torch.zeros(1, length, dtype=torch.bool)
    attention_mask[:, real] = True
    alone = grouped_query_attention(q[:, :, real], k[:, :, real], v[:, :, real], is_causal=True)
    for masked in (False, True):
        visible = causal_padding_mask(
            attention_mask if masked else torch.ones_like(attention_mask), num_queries=length
        )
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, enable_gqa=True)
        gap = (out[:, :, real] - alone).abs().max().item()
        empty = (~visible.any(dim=-1)).sum().item()
        padding[side, masked] = gap, empty
        rows.append(
            [side, "因果 + 填充" if masked else "只有因果", f"{gap:.2f}" if gap > 1e-12 else "0", empty]
        )

assert abs(padding["左", False][0] - 2.76) < 0.005 and padding["左", True] == (padding["左", True][0], 3)
assert all(padding[key][0] < 1e-12 for key in padding if key != ("左", False))
assert [padding[key][1] for key in (("左", False), ("右", False), ("右", True))] == [0, 0, 0]
# 右填充之后接着解码：新 token 排在填充之后，不加填充掩码就看得见它们
new_q, new_k, new_v = (torch.randn(1, heads, 1, D) for heads in (8, 2, 2))
all_k, all_v = torch.cat([k, new_k], dim=2), torch.cat([v, new_v], dim=2)
keep = [*range(length - pad), length]
alone = grouped_query_attention(new_q, all_k[:, :, keep], all_v[:, :, keep], is_causal=True)
assert (grouped_query_attention(new_q, all_k, all_v, is_causal=True) - alone).abs().max() > 0.1
Markdown(
    tabulate(
        rows, headers=["填充", "掩码", "真实位置的误差", "整行被挡"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: cost-by-kv-heads
#| caption: Llama-3-8B 的一层，键值头从 32 减到 1：缓存与键值投影等比例缩小，打分与加权的计算量不变
hidden_size, length = 4096, 8192
rows, cost = [], {}
for K in (32, 8, 1):
    with torch.device("meta"):
        module = Attention(hidden_size, num_heads=32, num_kv_heads=K, head_dim=128)
        x = torch.empty(1, length, hidden_size)
    with FlopCounterMode(display=False) as counter:
        module(x)
    by_op = {str(op): n for op, n in counter.get_flop_counts()["Global"].items()}
    projections = sum(n for op, n in by_op.items() if op in ("aten.mm", "aten.addmm"))
    core = counter.get_total_flops() - projections
    params = module.k_proj.weight.numel() + module.v_proj.weight.numel()
    cache = 2 * K * 128
    assert core == 4 * length * length * 32 * 128  # QKᵀ 与 PV 各 2·T·S·H·D，与 K 无关
    assert projections == 2 * length * sum(p.numel() for p in module.parameters())
    assert params == hidden_size * cache  # 键值投影的参数也正比于 K
    cost[K] = cache, params, projections, core
    rows.append([K, f"{cache:,}", f"{params / 1e6:.1f}", f"{projections / 1e12:.2f}", f"{core / 1e12:.2f}"])

assert cost[32][0] == 8192 and cost[8][0] == 2048 and cost[1][0] == 256
assert [round(cost[K][1] / 1e6, 1) for K in (32, 8, 1)] == [33.6, 8.4, 1.0]
assert [round(cost[K][2] / 1e12, 2) for K in (32, 8, 1)] == [1.10, 0.69, 0.57]
assert round(cost[32][3] / 1e12, 2) == 1.10 and cost[32][3] == cost[8][3] == cost[1][3]
Markdown(
    tabulate(
        rows,
        headers=["$K$", "缓存元素", "键值参数 M", "投影 TFLOP", "注意力 TFLOP"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: head-mapping
#| caption: 8 个查询头、2 个键值头：把键值头的编号写进 v，从输出读出每个查询头实际用了哪一个
H, K, D = 8, 2, 4
q, k = torch.randn(1, H, 1, D), torch.randn(1, K, 3, D)
v = torch.arange(K, dtype=q.dtype).view(1, K, 1, 1).expand(1, K, 3, 1)  # 第 j 个键值头的值处处是 j
block = grouped_query_attention(q, k, v, is_causal=False).flatten()
torch_gqa = F.scaled_dot_product_attention(q, k, v, enable_gqa=True).flatten()
modulo = F.scaled_dot_product_attention(q, k.repeat(1, H // K, 1, 1), v.repeat(1, H // K, 1, 1)).flatten()
used = {
    "按块（参考实现）": block.round().int().tolist(),
    "SDPA `enable_gqa`": torch_gqa.round().int().tolist(),
    "取模（`repeat`）": modulo.round().int().tolist(),
}
assert used["按块（参考实现）"] == used["SDPA `enable_gqa`"] == [0, 0, 0, 0, 1, 1, 1, 1]
assert used["取模（`repeat`）"] == [0, 1, 0, 1, 0, 1, 0, 1]
rows = [[name, " ".join(map(str, heads))] for name, heads in used.items()]
Markdown(tabulate(rows, headers=["写法", "查询头 0–7 用的键值头"], tablefmt="github", disable_numparse=True))

# %%
#| label: fully-masked-row
#| caption: 一行全被挡时五种写法的输出，以及损失不取那一行时 k 与 v 的梯度：前向里的 NaN 会在反向传播中传出去
q, k, v = (torch.randn(1, 1, 4, 8, requires_grad=True) for _ in range(3))
attention_mask = torch.tensor([[False, True, True, True]])  # 左填充 1 个，第 0 行全被挡
visible = causal_padding_mask(attention_mask, num_queries=4)
additive = torch.zeros(visible.shape).masked_fill(~visible, torch.finfo(q.dtype).min)
module = nn.MultiheadAttention(8, 1, bias=False, batch_first=True)
blocked = {"attn_mask": ~causal_mask(num_queries=4, num_keys=4), "key_padding_mask": ~attention_mask}


def by_hand():
    return stable_softmax(attention_scores(q, k).masked_fill(~visible, float("-inf"))) @ v


def torch_module(need_weights):
    out, _ = module(q[0], k[0], v[0], need_weights=need_weights, **blocked)
    return out.unsqueeze(1)


cases = {
    r"手写，填 $-\infty$": by_hand,
    "手写，加 `finfo.min`": lambda: stable_softmax(attention_scores(q, k) + additive) @ v,
    "SDPA，布尔掩码": lambda: F.scaled_dot_product_attention(q, k, v, attn_mask=visible),
    "MHA 模块（默认）": lambda: torch_module(True),
    "同上，`need_weights=False`": lambda: torch_module(False),
}
rows, result = [], {}
for name, function in cases.items():
    out = function()
    row = out[0, 0, 0]
    if row.isnan().all():
        kind = "NaN"
    elif (row == 0).all():
        kind = "0"
    else:
        torch.testing.assert_close(row, v[0, 0].mean(dim=0))  # 填充与未来在内，全部 v 的平均
        kind = "均匀平均"
    grads = torch.autograd.grad(out[:, :, 1:].square().sum(), (k, v))  # 损失不取第 0 行
    result[name] = kind, *("NaN" if grad.isnan().any() else "有限" for grad in grads)
    assert out[:, :, 1:].isfinite().all()
    rows.append([name, *result[name]])

assert [kind for kind, *_ in result.values()] == ["NaN", "均匀平均", "0", "NaN", "0"]
assert [grads for _, *grads in result.values()] == [
    ["有限", "NaN"],
    ["有限"] * 2,
    ["有限"] * 2,
    ["NaN"] * 2,
    ["有限"] * 2,
]
try:  # float16 装不下 -1e9
    torch.zeros(1, dtype=torch.float16).masked_fill(torch.tensor([True]), -1e9)
except RuntimeError as error_message:
    assert "overflow" in str(error_message)
else:
    raise AssertionError
lowest_half = torch.finfo(torch.float16).min
assert torch.tensor(-1e9).half().item() == float("-inf") and lowest_half == -65504
assert (torch.tensor(-50.0).half() + lowest_half).item() == float("-inf")  # 加 finfo.min 也会溢出
Markdown(
    tabulate(rows, headers=["写法", "那一行", "k 梯度", "v 梯度"], tablefmt="github", disable_numparse=True)
)
