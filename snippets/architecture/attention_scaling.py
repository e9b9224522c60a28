r"""缩放点积注意力（scaled dot-product attention）：打分、因果掩码、稳定的 softmax，以及 softmax 的雅可比。

页面：docs/architecture/attention-scaling.md
不包含：GQA（要求 q、k、v 的头数相同）、RoPE、dropout、任意掩码、KV cache 的管理、FlashAttention 的分块。

轴：`B` 序列数，`H` 头数，`T` query 位置数，`S` key 位置数，`D` 被缩并的每头维数，`DV` 值的每头维数。
精度：输入低于 float32 时升到 float32 计算，最后转回输入的类型；float64 保持 float64。

References:
    Vaswani et al., "Attention Is All You Need", §3.2.1 式 (1) 与脚注 4，https://arxiv.org/abs/1706.03762
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "attention_scores",
    "causal_mask",
    "stable_softmax",
    "scaled_dot_product_attention",
    "softmax_jacobian",
    "qk_norm_logits",
]


# --8<-- [start:scores]
def attention_scores(
    q: Float[Tensor, "B H T D"], k: Float[Tensor, "B H S D"], *, scale: float | None = None
) -> Float[Tensor, "B H T S"]:
    r"""缩放后的打分：每个 query 与每个 key 的点积乘以 `scale`。

    $$
    s_{ij}=c\,q_i^\top k_j,\qquad c=1/\sqrt D
    $$

    注意：$D$ 是点积里真正求和的那一维（每头维数），不是模型宽度，也不是值的维数。
    先升精度再做乘法：float16 的 $QK^\top$ 超过 65504 就成为无穷大，乘完再缩放已经来不及。

    Args:
        q: 查询，已经按头切开。
        k: 键，头数与 `q` 相同。
        scale: 乘在点积上的系数 $c$；默认 $1/\sqrt D$。

    Returns:
        打分，至少是 float32。

    References:
        Vaswani et al. §3.2.1；默认值与 `torch.nn.functional.scaled_dot_product_attention`（2.13.0）的
        `scale=None` 相同。
    """
    if scale is None:
        scale = 1.0 / math.sqrt(q.shape[-1])
    if not (math.isfinite(scale) and scale > 0):
        raise ValueError(f"scale 必须是正的有限数，现在是 {scale}；要用默认的 1/√D 就传 None。")
    dtype = torch.promote_types(q.dtype, torch.float32)
    return torch.matmul(q.to(dtype), k.to(dtype).transpose(-2, -1)) * scale  # (B, H, T, S)


# --8<-- [end:scores]


# --8<-- [start:mask]
def causal_mask(
    *, num_queries: int, num_keys: int, device: torch.device | None = None
) -> Bool[Tensor, "T S"]:
    r"""因果掩码，`True` 表示看得见，右下角对齐：最后一个 query 看得见全部 key。

    $$
    M_{ij}=\text{True}\iff j\le i+(S-T)
    $$

    注意：`torch` 的 `is_causal=True` 是左上角对齐（$j\le i$）。$T=S$ 时两者相同；
    用 KV cache 解码时 $T<S$，左上角对齐会让新 token 只看见最早的几个 key。

    Args:
        num_queries: query 位置数 $T$。
        num_keys: key 位置数 $S$，含缓存里的；不小于 $T$。
        device: 掩码所在的设备。

    Returns:
        布尔掩码，形状 `(T, S)`。

    References:
        与 `torch.nn.attention.bias.causal_lower_right(T, S)`（2.13.0）及 flash-attn 2.1 起的
        `causal=True` 对齐方式相同。
    """
    if num_queries > num_keys:
        raise ValueError(
            f"num_queries={num_queries} 大于 num_keys={num_keys}：前面的 query 一个 key 也看不见；"
            "请把这些 query 去掉，或补上它们的 key。"
        )
    everything = torch.ones(num_queries, num_keys, dtype=torch.bool, device=device)
    return everything.tril(diagonal=num_keys - num_queries)


# --8<-- [end:mask]


# --8<-- [start:softmax]
def stable_softmax(scores: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch S"]:
    r"""对最后一维（key）做 softmax，先减去最大值。

    $$
    p_j=\frac{e^{s_j-m}}{\sum_l e^{s_l-m}},\qquad m=\max_l s_l
    $$

    注意：softmax 对整体平移不变，减 $m$ 不改变结果，却使指数的参数不大于 0，于是打分多大都不溢出。
    这件事与 $1/\sqrt D$ 无关。整行都是 $-\infty$ 时得到 NaN；
    `F.scaled_dot_product_attention`（2.13.0）此时返回 0。

    Args:
        scores: 打分；被掩码的位置填 $-\infty$。

    Returns:
        概率，形状与 `scores` 相同，最后一维之和为 1。

    References:
        与 `torch.softmax(scores, dim=-1)` 相同。
    """
    exp = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return exp / exp.sum(dim=-1, keepdim=True)


# --8<-- [end:softmax]


# --8<-- [start:attention]
def scaled_dot_product_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    v: Float[Tensor, "B H S DV"],
    *,
    scale: float | None = None,
    is_causal: bool = False,
) -> Float[Tensor, "B H T DV"]:
    r"""缩放点积注意力。

    $$
    O=\operatorname{softmax}\Big(\frac{QK^\top}{\sqrt D}+M\Big)V
    $$

    注意：顺序是缩放、掩码、softmax；softmax 之后再缩放只会让每行之和不再是 1。
    `is_causal` 用右下角对齐（见 `causal_mask`），$T\ne S$ 时与 `torch` 的同名参数不同。

    Args:
        q: 查询。
        k: 键。
        v: 值；每头维数可以与 `q` 不同（MLA 是 192 与 128）。
        scale: 乘在点积上的系数；默认 $1/\sqrt D$，$D$ 取 `q` 的最后一维。
        is_causal: 是否只看不晚于自己的 key。

    Returns:
        每个 query 的输出，类型与 `q` 相同。

    References:
        Vaswani et al. 式 (1)；与 `torch.nn.functional.scaled_dot_product_attention`（2.13.0）一致，
        只差因果掩码的对齐。`transformers` 5.23.0 的 `LlamaAttention` 同样在 float32 里做 softmax，
        但先把概率转回输入类型再乘 `v`；这里最后才转。
    """
    scores = attention_scores(q, k, scale=scale)  # (B, H, T, S)
    if is_causal:
        visible = causal_mask(num_queries=q.shape[-2], num_keys=k.shape[-2], device=q.device)
        scores = scores.masked_fill(~visible, float("-inf"))
    return torch.matmul(stable_softmax(scores), v.to(scores.dtype)).to(q.dtype)


# --8<-- [end:attention]


# --8<-- [start:jacobian]
def softmax_jacobian(p: Float[Tensor, "*batch S"]) -> Float[Tensor, "*batch S S"]:
    r"""softmax 的雅可比矩阵，用输出概率写出。

    $$
    J_{ij}=\frac{\partial p_i}{\partial s_j}=p_i(\delta_{ij}-p_j),\qquad J=\operatorname{diag}(p)-pp^\top
    $$

    注意：$\operatorname{tr}J=1-\lVert p\rVert_2^2$，$\lVert J\rVert_2\le\frac12$（两个并列时取到）；
    $p$ 趋于 one-hot 时 $J\to0$，这就是饱和。对 $v$ 的导数里没有 $J$。

    Args:
        p: softmax 的输出，最后一维之和为 1。

    Returns:
        对称半正定矩阵，每行之和为 0。

    References:
        与 `torch.autograd.functional.jacobian` 求 `torch.softmax` 的结果相同。
    """
    return torch.diag_embed(p) - p.unsqueeze(-1) * p.unsqueeze(-2)


# --8<-- [end:jacobian]


# --8<-- [start:qk-norm]
def qk_norm_logits(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B H S D"],
    q_gain: Float[Tensor, " D"],
    k_gain: Float[Tensor, " D"],
    *,
    scale: float | None = None,
    eps: float = 1e-6,
) -> Float[Tensor, "B H T S"]:
    r"""QK-norm 的打分：q、k 先在每头维上做 RMSNorm，再算缩放点积。

    $$
    s_{ij}=\frac{(\gamma_q\odot\hat q_i)^\top(\gamma_k\odot\hat k_j)}{\sqrt D},\qquad
    \hat x=\frac{x}{\sqrt{\tfrac1D\lVert x\rVert_2^2+\epsilon}}
    $$

    注意：增益全为 1 时 $\lVert\hat q\rVert,\lVert\hat k\rVert\le\sqrt D$，由柯西不等式
    $\lvert s_{ij}\rvert\le\sqrt D$，与权重多大无关；增益可学习，上界随
    $\max_i\lvert\gamma_{q,i}\gamma_{k,i}\rvert$ 放大。归一化之后仍要乘 $1/\sqrt D$。

    Args:
        q: 查询，已经按头切开，RoPE 之前。
        k: 键。
        q_gain: q 的增益 $\gamma_q$，各头共用。
        k_gain: k 的增益 $\gamma_k$，各头共用。
        scale: 乘在点积上的系数；默认 $1/\sqrt D$。
        eps: 均方值上加的稳定项；Qwen3 的 `rms_norm_eps` 默认 1e-6。

    Returns:
        打分，至少是 float32。

    References:
        `transformers` 5.23.0 `models/qwen3/modeling_qwen3.py` 的 `q_norm`、`k_norm`（只在每头维上；
        它在乘增益之前先转回输入类型，这里不转）。
        Henry et al. 用 $\ell_2$ 归一化加可学习的标量代替 $1/\sqrt D$，https://arxiv.org/abs/2010.04245
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    q, k = q.to(dtype), k.to(dtype)
    q_hat = q * torch.rsqrt(q.square().mean(dim=-1, keepdim=True) + eps) * q_gain
    k_hat = k * torch.rsqrt(k.square().mean(dim=-1, keepdim=True) + eps) * k_gain
    return attention_scores(q_hat, k_hat, scale=scale)


# --8<-- [end:qk-norm]
