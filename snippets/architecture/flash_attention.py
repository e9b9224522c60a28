r"""FlashAttention：在线 softmax、分块的前向与反向、部分结果的合并，以及数 HBM 读写的计数器。

页面：docs/architecture/flash-attention.md
不包含：GPU 内核（并行、流水、低精度矩阵乘）、dropout、GQA、任意掩码、滑动窗口、变长打包。

轴：`B` 序列数，`H` 头数，`T` query 位置数，`S` key 位置数，`D` 每头维数，`DV` 值的每头维数；
`TQ`、`SK` 是一块里的 query 数与 key 数，最后一块可以不满。
约定：一次下标读取是从 HBM 载入一块，一次下标赋值是写回一块，其余运算都在片上；`HbmTraffic` 据此计数。
精度：输入低于 float32 时升到 float32 计算并累加，最后转回输入的类型；`lse` 至少是 float32。
因果掩码右下角对齐；一个 key 也看不见的行输出 0，`lse` 是 $-\infty$，梯度是 0。

References:
    Milakov & Gimelshein, 2018, 算法 3，https://arxiv.org/abs/1805.02867
    Dao et al., 2022, "FlashAttention", 算法 0、1、4，https://arxiv.org/abs/2205.14135
    Dao, 2023, "FlashAttention-2", 算法 1、2，https://arxiv.org/abs/2307.08691
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.overrides import TorchFunctionMode

from snippets.architecture.attention_scaling import attention_scores, stable_softmax

__all__ = [
    "HbmTraffic",
    "three_pass_attention",
    "online_softmax_step",
    "flash_attention_forward",
    "flash_attention_backward",
    "merge",
]


class HbmTraffic(TorchFunctionMode):
    """数 HBM 读写的上下文：下标读取计入 `loads`，下标赋值计入 `stores`，单位是元素个数。

    注意：数的是这段 Python 代码实际执行的读写，不是 GPU 的硬件计数器；不含寄存器溢出与缓存命中。
    """

    def __init__(self):
        super().__init__()
        self.loads = self.stores = 0

    def __torch_function__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if func is Tensor.__getitem__:
            self.loads += result.numel()
        elif func is Tensor.__setitem__:
            self.stores += args[2].numel()
        return result


def three_pass_attention(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], v: Float[Tensor, "B H S DV"]
) -> Float[Tensor, "B H T DV"]:
    r"""标准注意力：三个内核，打分矩阵与概率矩阵各写回 HBM 一次、读出一次。

    $$
    S=QK^\top/\sqrt D,\qquad P=\operatorname{softmax}(S),\qquad O=PV
    $$

    注意：把每个矩阵乘当成只读一遍输入，这是对标准写法最有利的数法。

    Args:
        q: 查询。
        k: 键。
        v: 值。

    Returns:
        输出，类型与 `q` 相同。

    References:
        Dao et al. 2022 算法 0；与 `F.scaled_dot_product_attention`（2.13.0）的结果相同。
    """
    scores = torch.empty(q.shape[:-1] + k.shape[-2:-1], dtype=q.dtype)  # 与输入同类型，写回 HBM
    probs, out = torch.empty_like(scores), torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype)
    scores[:] = attention_scores(q[:], k[:])
    probs[:] = stable_softmax(scores[:])
    out[:] = torch.matmul(probs[:], v[:])
    return out


# --8<-- [start:step]
def online_softmax_step(
    m: Float[Tensor, "B H TQ 1"],
    total: Float[Tensor, "B H TQ 1"],
    acc: Float[Tensor, "B H TQ DV"],
    scores: Float[Tensor, "B H TQ SK"],
    v: Float[Tensor, "B H SK DV"],
) -> tuple[Float[Tensor, "B H TQ 1"], Float[Tensor, "B H TQ 1"], Float[Tensor, "B H TQ DV"]]:
    r"""并入一块打分：更新最大值 $m$、指数和 $\ell$（`total`）与未归一化的输出 $A$（`acc`）。

    $$
    m'=\max(m,\max_j s_j),\quad \ell'=e^{m-m'}\ell+\sum_je^{s_j-m'},\quad A'=e^{m-m'}A+\sum_je^{s_j-m'}v_j
    $$

    注意：初值是 $-\infty,0,0$。至今什么也没看见的行，$m'$ 换成 0 再相减，否则是 $-\infty-(-\infty)$。

    Args:
        m: 至今的最大值。
        total: 至今的 $\sum e^{s-m}$。
        acc: 至今的 $\sum e^{s-m}v$。
        scores: 这一块打分；看不见的填 $-\infty$。
        v: 这一块的值。

    Returns:
        更新后的 $(m',\ell',A')$。
    """
    new_m = torch.maximum(m, scores.amax(dim=-1, keepdim=True))
    safe_m = new_m.masked_fill(new_m == float("-inf"), 0.0)
    weights, rescale = torch.exp(scores - safe_m), torch.exp(m - safe_m)
    new_total = rescale * total + weights.sum(dim=-1, keepdim=True)
    return new_m, new_total, rescale * acc + torch.matmul(weights, v.to(weights.dtype))


# --8<-- [end:step]


def _plan(
    q: Tensor, k: Tensor, *, block_q: int, block_k: int, is_causal: bool
) -> tuple[int, int, int, torch.dtype]:
    """检查块的大小，返回 (T, S, 对角线的偏移, 计算的类型)；偏移等于 S 时处处可见。"""
    if block_q < 1 or block_k < 1:
        raise ValueError(f"block_q、block_k 至少是 1，现在是 {block_q}、{block_k}；常用 64 或 128。")
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    offset = num_keys - num_queries if is_causal else num_keys
    return num_queries, num_keys, offset, torch.promote_types(q.dtype, torch.float32)


def _visible(scores: Tensor, *, i: int, j: int, offset: int) -> Bool[Tensor, "TQ SK"]:
    """左上角在 (i, j) 的一块里，哪些位置看得见：列号不超过行号加 `offset`。"""
    return torch.ones(scores.shape[-2:], dtype=torch.bool).tril(i + offset - j)


# --8<-- [start:forward]
def flash_attention_forward(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S DV"],
    *,
    block_q: int,
    block_k: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T DV"], Float[Tensor, "B H T"]]:
    r"""分块前向：外层是 query 块，内层扫过 key 块，只写回输出与每行的 $L$（`lse`）。

    $$
    O_i=A_i/\ell_i,\qquad L_i=m_i+\ln\ell_i
    $$

    Args:
        q: 查询。
        k: 键。
        v: 值。
        block_q: 一块的 query 数 $B_r$。
        block_k: 一块的 key 数 $B_c$。
        is_causal: 是否只看不晚于自己的 key（右下角对齐）。
        scale: 乘在点积上的系数；默认 $1/\sqrt D$。

    Returns:
        `(out, lse)`；与 `torch.logsumexp` 及 `F.scaled_dot_product_attention`（2.13.0）一致。
    """
    num_queries, num_keys, offset, dtype = _plan(q, k, block_q=block_q, block_k=block_k, is_causal=is_causal)
    out, lse = torch.empty(q.shape[:-1] + v.shape[-1:], dtype=q.dtype), torch.empty(q.shape[:-1], dtype=dtype)
    for i in range(0, num_queries, block_q):
        q_tile = q[..., i : i + block_q, :]
        m = torch.full(q_tile.shape[:-1] + (1,), float("-inf"), dtype=dtype)
        total, acc = torch.zeros_like(m), torch.zeros(q_tile.shape[:-1] + v.shape[-1:], dtype=dtype)
        last = i + q_tile.shape[-2] - 1 + offset  # 这一块里最后一行看得见的最后一个 key
        for j in range(0, min(num_keys, last + 1), block_k):  # 对角线右上方的块不读
            scores = attention_scores(q_tile, k[..., j : j + block_k, :], scale=scale)
            scores = scores.masked_fill(~_visible(scores, i=i, j=j, offset=offset), float("-inf"))
            m, total, acc = online_softmax_step(m, total, acc, scores, v[..., j : j + block_k, :])
        out[..., i : i + block_q, :] = acc / total.masked_fill(total == 0, 1.0)
        lse[..., i : i + block_q] = (m + total.log()).squeeze(-1)
    return out, lse


# --8<-- [end:forward]


# --8<-- [start:backward]
def flash_attention_backward(
    grad_out: Float[Tensor, "B H T DV"],
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S DV"],
    out: Float[Tensor, "B H T DV"],
    lse: Float[Tensor, "B H T"],
    *,
    block_q: int,
    block_k: int,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B H S D"], Float[Tensor, "B H S DV"]]:
    r"""分块反向：用 $L$ 重算每一块的 $P$，外层是 key 块，$dQ$ 在 HBM 里累加。

    $$
    P=e^{S-L},\quad dV=P^\top dO,\quad dS=P\odot(dO\,V^\top-\Delta),\quad \Delta_i=dO_i\cdot O_i
    $$

    Args:
        grad_out: 输出的梯度 $dO$。
        q: 查询。
        k: 键。
        v: 值。
        out: 前向的输出。
        lse: 前向的 $L$。
        block_q: 一块的 query 数。
        block_k: 一块的 key 数。
        is_causal: 与前向相同。
        scale: 与前向相同。

    Returns:
        `(dq, dk, dv)`，与自动求导一致。
    """
    num_queries, num_keys, offset, dtype = _plan(q, k, block_q=block_q, block_k=block_k, is_causal=is_causal)
    tau = q.shape[-1] ** -0.5 if scale is None else scale
    grad_q, grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype) for x in (q, k, v))
    delta = torch.empty_like(lse)
    delta[:] = (grad_out[:].to(dtype) * out[:].to(dtype)).sum(dim=-1)
    for j in range(0, num_keys, block_k):
        k_tile, v_tile = k[..., j : j + block_k, :].to(dtype), v[..., j : j + block_k, :].to(dtype)
        dk, dv = torch.zeros_like(k_tile), torch.zeros_like(v_tile)
        first = max(0, j - offset)  # 看得见这一块的第一行
        for i in range(first // block_q * block_q, num_queries, block_q):
            rows = slice(i, i + block_q)
            q_tile, do_tile = q[..., rows, :].to(dtype), grad_out[..., rows, :].to(dtype)
            scores = attention_scores(q_tile, k_tile, scale=scale)
            hidden = ~_visible(scores, i=i, j=j, offset=offset)
            p = torch.exp(scores - lse[..., rows].unsqueeze(-1)).masked_fill(hidden, 0.0)
            dv = dv + torch.matmul(p.transpose(-2, -1), do_tile)
            dp = torch.matmul(do_tile, v_tile.transpose(-2, -1))
            ds = p * (dp - delta[..., rows].unsqueeze(-1))
            grad_q[..., rows, :] = grad_q[..., rows, :] + tau * torch.matmul(ds, k_tile)
            dk = dk + tau * torch.matmul(ds.transpose(-2, -1), q_tile)
        grad_k[..., j : j + block_k, :], grad_v[..., j : j + block_k, :] = dk, dv
    return grad_q.to(q.dtype), grad_k.to(k.dtype), grad_v.to(v.dtype)


# --8<-- [end:backward]


# --8<-- [start:merge]
def merge(
    out_a: Float[Tensor, "B H T DV"],
    lse_a: Float[Tensor, "B H T"],
    out_b: Float[Tensor, "B H T DV"],
    lse_b: Float[Tensor, "B H T"],
) -> tuple[Float[Tensor, "B H T DV"], Float[Tensor, "B H T"]]:
    r"""合并同一批 query 在两段不相交的 key 上的注意力。

    $$
    L=\ln(e^{L_a}+e^{L_b}),\qquad O=e^{L_a-L}O_a+e^{L_b-L}O_b
    $$

    注意：权重是 $e^{L}$，不是各一半，也不是按 key 的个数；两段都是空的（$L=-\infty$）时输出 0。

    Args:
        out_a: 第一段归一化后的输出。
        lse_a: 第一段的 $L$。
        out_b: 第二段的输出。
        lse_b: 第二段的 $L$。

    Returns:
        `(out, lse)`，与在全部 key 上一次算完相同；可结合、可交换。
    """
    lse = torch.logaddexp(lse_a, lse_b)
    safe = lse.masked_fill(lse == float("-inf"), 0.0)
    weight_a, weight_b = (torch.exp(x - safe).unsqueeze(-1) for x in (lse_a, lse_b))
    return (weight_a * out_a + weight_b * out_b).to(out_a.dtype), lse


# --8<-- [end:merge]
