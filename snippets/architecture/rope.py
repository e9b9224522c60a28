r"""旋转位置编码（rotary position embedding, RoPE）：频率、旋转、两种配对约定、四种改频率的扩展方法。

页面：docs/architecture/rope.md
不包含：cos/sin 的缓存、部分维数旋转、LongRoPE、多维位置（M-RoPE）、YaRN 的整数取整开关。

轴：`B` 序列数，`T` token 数，`H` 查询头数，`K` 键值头数，`D` 每头维数；`D/2` 个平面各有一个频率。
精度：频率在 float64 里求；角度与 cos、sin 的精度跟 `inv_freq` 走（float64 或 float32，不会更低），
`apply_rope` 在至少 float32 里旋转，最后转回 q、k 各自的类型。transformers 在 float32 里求频率。

References:
    Su et al., "RoFormer", §3.2.2 式 (15)、§3.4.2 式 (34)，https://arxiv.org/abs/2104.09864
    Peng et al., "YaRN", §3.1–3.4，https://arxiv.org/abs/2309.00071
"""

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "rope_inverse_frequencies",
    "rope_cos_sin",
    "rotate_half",
    "apply_rope",
    "apply_rope_interleaved",
    "half_split_permutation",
    "linear_scaled_frequencies",
    "ntk_scaled_frequencies",
    "yarn_scaled_frequencies",
    "yarn_attention_factor",
    "llama3_scaled_frequencies",
]


# --8<-- [start:frequencies]
def rope_inverse_frequencies(head_dim: int, *, rope_theta: float = 10000.0) -> Float[Tensor, " half"]:
    r"""每个平面每走一个位置转过的弧度，float64，从快到慢。

    $$
    \theta_i=b^{-2i/D},\qquad i=0,\dots,D/2-1
    $$

    注意：指数是负的，分母是 $D$ 不是 $D/2$；$i=0$ 恒为 1。

    Args:
        head_dim: 旋转的维数 $D$，必须是偶数。
        rope_theta: 底数 $b$。

    Returns:
        $D/2$ 个频率，单位是弧度每位置。

    References:
        RoFormer 式 (15) 以 1 开始数 $i$，写成 $-2(i-1)/d$。
    """
    if head_dim % 2:
        raise ValueError(f"head_dim={head_dim} 是奇数，维数配不成对；请只旋转其中偶数个维。")
    return rope_theta ** -(torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim)


# --8<-- [end:frequencies]


# --8<-- [start:rope]
def rope_cos_sin(
    position_ids: Int[Tensor, "B T"], inv_freq: Float[Tensor, " half"]
) -> tuple[Float[Tensor, "B T 2*half"], Float[Tensor, "B T 2*half"]]:
    r"""角度 $m\theta_i$ 的余弦与正弦，$D/2$ 个角各重复一遍（前半、后半）。

    Args:
        position_ids: 每个 token 的位置 $m$，整数。
        inv_freq: 频率 $\theta_i$，float32 或 float64。

    Returns:
        cos 与 sin，类型与 `inv_freq` 相同。
    """
    if inv_freq.dtype not in (torch.float32, torch.float64):
        raise ValueError(f"inv_freq 是 {inv_freq.dtype}，位置一大角度就错了；请用 float32 或 float64。")
    angles = position_ids.unsqueeze(-1) * inv_freq  # (B, T, D/2)
    angles = torch.cat((angles, angles), dim=-1)  # (B, T, D)
    return angles.cos(), angles.sin()


def rotate_half(x: Float[Tensor, "*batch D"]) -> Float[Tensor, "*batch D"]:
    r"""每个平面逆时针转 90°：$(a,b)\mapsto(-b,a)$，$a$ 是前半，$b$ 是后半。

    Args:
        x: 最后一维是每头维数。

    Returns:
        形状不变。
    """
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def apply_rope(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K T D"],
    cos: Float[Tensor, "B T D"],
    sin: Float[Tensor, "B T D"],
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B K T D"]]:
    r"""旋转 q 与 k（不转 v）：第 $i$ 维与第 $i+D/2$ 维配成一个平面。

    Args:
        q: 查询。
        k: 键；头数可以少于 `q`。
        cos: `rope_cos_sin` 的第一项。
        sin: `rope_cos_sin` 的第二项。

    Returns:
        旋转后的 q 与 k，类型不变。
    """
    cos, sin = cos.unsqueeze(1), sin.unsqueeze(1)  # (B, 1, T, D)

    def rotate(x: Tensor) -> Tensor:
        return (x * cos + rotate_half(x) * sin).to(x.dtype)

    return rotate(q), rotate(k)


# --8<-- [end:rope]


# --8<-- [start:interleaved]
def apply_rope_interleaved(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K T D"],
    cos: Float[Tensor, "B T D"],
    sin: Float[Tensor, "B T D"],
) -> tuple[Float[Tensor, "B H T D"], Float[Tensor, "B K T D"]]:
    r"""另一种约定：第 $2i$ 维与第 $2i+1$ 维配成一个平面，即复数乘 $e^{\mathrm i m\theta_i}$。

    Args:
        q: 查询，相邻两维是一对。
        k: 键。
        cos: 与 `apply_rope` 相同，即 `rope_cos_sin` 的第一项。
        sin: 第二项。

    Returns:
        旋转后的 q 与 k，仍按相邻配对排列，类型不变。

    References:
        Llama 官方代码的 `apply_rotary_emb`。transformers 5.23.0 的 `apply_rotary_pos_emb_interleave`
        读入相邻配对、写出前后配对，相差一个 `half_split_permutation`。
    """
    order = half_split_permutation(q.shape[-1])
    q, k = apply_rope(q[..., order], k[..., order], cos, sin)
    back = order.argsort()
    return q[..., back], k[..., back]


def half_split_permutation(head_dim: int) -> Int[Tensor, " D"]:
    r"""把相邻配对排成前后配对的下标：$0,2,4,\dots,1,3,5,\dots$

    Args:
        head_dim: 每头维数 $D$。

    Returns:
        `x[..., order]` 把 $(x_{2i},x_{2i+1})$ 移到第 $i$、$i+D/2$ 维。
    """
    return torch.arange(head_dim).view(-1, 2).T.flatten()


# --8<-- [end:interleaved]


# --8<-- [start:scaling]
def linear_scaled_frequencies(inv_freq: Float[Tensor, " half"], *, factor: float) -> Float[Tensor, " half"]:
    r"""位置插值（position interpolation, PI）：$\theta_i/s$，等价于位置除以 $s$。

    Args:
        inv_freq: 原频率。
        factor: 倍数 $s$，新长度除以原长度。

    Returns:
        新频率。
    """
    return inv_freq / factor


def ntk_scaled_frequencies(
    head_dim: int, *, factor: float, rope_theta: float = 10000.0
) -> Float[Tensor, " half"]:
    r"""NTK-aware：只改底数，$b'=b\,s^{D/(D-2)}$，最快的不动，最慢的恰好除以 $s$。

    Args:
        head_dim: 每头维数 $D$，大于 2。
        factor: 倍数 $s$。
        rope_theta: 原底数 $b$。

    Returns:
        新频率。
    """
    return rope_inverse_frequencies(head_dim, rope_theta=rope_theta * factor ** (head_dim / (head_dim - 2)))


def yarn_scaled_frequencies(
    head_dim: int,
    *,
    factor: float,
    original_length: int,
    rope_theta: float = 10000.0,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
) -> Float[Tensor, " half"]:
    r"""YaRN 的频率：转够 `beta_fast` 圈的不动，不到 `beta_slow` 圈的除以 $s$，中间按平面的序号线性过渡。

    注意：论文的斜坡对圈数线性，作者的代码与 transformers 对平面的序号线性并取整，这里跟代码。

    Args:
        head_dim: 每头维数 $D$。
        factor: 倍数 $s$。
        original_length: 预训练长度 $L$。
        rope_theta: 底数 $b$。
        beta_fast: 不动的圈数下限。
        beta_slow: 完全插值的圈数上限。

    Returns:
        新频率；注意力的温度另见 `yarn_attention_factor`。
    """
    inv_freq = rope_inverse_frequencies(head_dim, rope_theta=rope_theta)

    def plane_with_turns(turns: float) -> float:  # 解 L·θ_i = 2π·turns，得到 i
        return head_dim * math.log(original_length / (2 * math.pi * turns)) / (2 * math.log(rope_theta))

    low = max(math.floor(plane_with_turns(beta_fast)), 0)
    high = min(math.ceil(plane_with_turns(beta_slow)), head_dim - 1)
    if low >= high:
        raise ValueError(
            f"过渡区是空的（{low} 到 {high}）：original_length={original_length} 太短，"
            "或 beta_fast 不大于 beta_slow；请核对这三个数。"
        )
    ramp = ((torch.arange(head_dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    return inv_freq / factor * ramp + inv_freq * (1 - ramp)


def yarn_attention_factor(*, factor: float) -> float:
    r"""YaRN 的 mscale，$0.1\ln s+1$：cos 与 sin 都乘它，于是打分乘它的平方。

    Args:
        factor: 倍数 $s$。

    Returns:
        乘在 cos、sin 上的系数。
    """
    if factor < 1:
        raise ValueError(f"factor={factor} 小于 1：YaRN 只用来延长，不延长就传 1。")
    return 0.1 * math.log(factor) + 1.0


def llama3_scaled_frequencies(
    inv_freq: Float[Tensor, " half"],
    *,
    factor: float = 8.0,
    low_freq_factor: float = 1.0,
    high_freq_factor: float = 4.0,
    original_length: int = 8192,
) -> Float[Tensor, " half"]:
    r"""Llama 3.1 的频率：与 YaRN 同样三段，但中间对圈数（而不是序号）线性过渡。

    Args:
        inv_freq: 原频率。
        factor: 倍数 $s$。
        low_freq_factor: 完全插值的圈数上限。
        high_freq_factor: 不动的圈数下限。
        original_length: 预训练长度 $L$。

    Returns:
        新频率。
    """
    turns = original_length * inv_freq / (2 * math.pi)
    keep = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return inv_freq / factor * (1 - keep) + inv_freq * keep


# --8<-- [end:scaling]
