r"""多头注意力的三种写法：MHA、GQA、MQA，以及头的切分、键值头的复制和带填充的因果掩码。

页面：docs/architecture/attention.md
不包含：缩放点积与因果掩码本身（见 attention_scaling.py）、旋转位置编码（见 rope.py）、KV cache 的存放、
dropout、交叉注意力、MLA。

轴：`B` 序列数，`T` query 位置数，`S` key 位置数，`C` 模型宽度，`H` 查询头数，`K` 键值头数，`D` 每头维数。
三者只差 $K$：$K=H$ 是 MHA，$1<K<H$ 是 GQA，$K=1$ 是 MQA。第 $h$ 个查询头用第 $\lfloor hK/H\rfloor$ 个键值头。

References:
    Vaswani et al., §3.2.2（多头），https://arxiv.org/abs/1706.03762
    Shazeer, §3（MQA），https://arxiv.org/abs/1911.02150
    Ainslie et al., §2（GQA），https://arxiv.org/abs/2305.13245
"""

from typing import Any

from jaxtyping import Bool, Float
from torch import Tensor, nn

from snippets.architecture.attention_scaling import causal_mask, scaled_dot_product_attention
from snippets.architecture.rope import apply_rope

__all__ = [
    "split_heads",
    "merge_heads",
    "repeat_kv",
    "grouped_query_attention",
    "causal_padding_mask",
    "Attention",
]


# --8<-- [start:heads]
def split_heads(x: Float[Tensor, "B T HD"], *, num_heads: int) -> Float[Tensor, "B H T D"]:
    r"""把最后一维切成头：先拆 `HD`，再换轴。

    $$
    \text{out}_{b,h,t,j}=x_{b,\,t,\,hD+j}
    $$

    注意：直接 `view(B, H, T, D)` 形状也对，却把别的位置拼进来。

    Args:
        x: 投影的输出。
        num_heads: 头数；必须整除最后一维。

    Returns:
        按头切开的张量（不连续的视图）。
    """
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def merge_heads(x: Float[Tensor, "B H T D"]) -> Float[Tensor, "B T HD"]:
    """`split_heads` 的逆：先换轴，再合并最后两维。

    注意：换轴之后不连续，用 `view` 要先 `contiguous()`；`flatten` 会自己复制。

    Args:
        x: 各头的输出。

    Returns:
        各头首尾相接，交给输出投影。
    """
    return x.transpose(1, 2).flatten(start_dim=-2)


# --8<-- [end:heads]
# --8<-- [start:gqa]
def repeat_kv(x: Float[Tensor, "B K S D"], *, num_groups: int) -> Float[Tensor, "B H S D"]:
    r"""把每个键值头复制 `num_groups` 份，按块排列：0 0 1 1，不是 0 1 0 1。

    $$
    \text{out}_{b,h}=x_{b,\lfloor h/g\rfloor},\qquad g=H/K
    $$

    Args:
        x: 键或值。
        num_groups: 每个键值头服务几个查询头，即 $g$；GQA 论文的组数是 $K$，不是它。

    Returns:
        头数为 $K\cdot g$ 的键或值，同 `torch.repeat_interleave` 与 transformers 5.23.0 的 `repeat_kv`。
    """
    return x.unsqueeze(2).expand(-1, -1, num_groups, -1, -1).flatten(1, 2)


def grouped_query_attention(
    q: Float[Tensor, "B H T D"],
    k: Float[Tensor, "B K S D"],
    v: Float[Tensor, "B K S DV"],
    *,
    is_causal: bool,
    scale: float | None = None,
) -> Float[Tensor, "B H T DV"]:
    r"""分组查询注意力；$K=H$ 时就是 MHA，$K=1$ 时就是 MQA。

    Args:
        q: 查询。
        k: 键，头数整除 `q` 的头数。
        v: 值，头数与 `k` 相同。
        is_causal: 是否只看不晚于自己的 key；右下角对齐。
        scale: 乘在点积上的系数；默认 $1/\sqrt D$。

    Returns:
        每个查询头的输出；与 `F.scaled_dot_product_attention(enable_gqa=True)`（2.13.0）只差掩码的对齐。
    """
    num_heads, num_kv_heads = q.shape[1], k.shape[1]
    if num_heads % num_kv_heads != 0:
        raise ValueError(f"查询头数 {num_heads} 不是键值头数 {num_kv_heads} 的整数倍；请改成能整除的头数。")
    num_groups = num_heads // num_kv_heads
    k, v = repeat_kv(k, num_groups=num_groups), repeat_kv(v, num_groups=num_groups)
    return scaled_dot_product_attention(q, k, v, scale=scale, is_causal=is_causal)


# --8<-- [end:gqa]
# --8<-- [start:padding]
def causal_padding_mask(attention_mask: Bool[Tensor, "B S"], *, num_queries: int) -> Bool[Tensor, "B 1 T S"]:
    r"""因果掩码与填充掩码取「与」，`True` 表示看得见（SDPA 的约定）。

    $$
    M_{b,t,s}=\big(s\le t+S-T\big)\wedge a_{b,s}
    $$

    注意：挡的是 key 那一维。左填充时，填充位置自己的那几行整行都是 `False`。

    Args:
        attention_mask: 真实 token 为 `True`，填充为 `False`，长度含缓存里的 key。
        num_queries: query 位置数 $T$。

    Returns:
        可直接传给 `F.scaled_dot_product_attention` 的 `attn_mask`，对头广播。
    """
    num_keys, device = attention_mask.shape[1], attention_mask.device
    causal = causal_mask(num_queries=num_queries, num_keys=num_keys, device=device)
    return causal & attention_mask[:, None, None, :]


# --8<-- [end:padding]
# --8<-- [start:module]
class Attention(nn.Module):
    """一层因果自注意力，参数名与计算同 transformers 5.23.0 的 `LlamaAttention`。

    Args:
        hidden_size: 模型宽度 `C`。
        num_heads: 查询头数 `H`。
        num_kv_heads: 键值头数 `K`；默认等于 `num_heads`，即 MHA。
        head_dim: 每头维数 `D`；默认 `hidden_size // num_heads`，可以另给（Qwen3）。
        bias: 四个投影是否带偏置；Llama 都不带。
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        bias: bool = False,
    ):
        super().__init__()
        if head_dim is None and hidden_size % num_heads != 0:
            raise ValueError(f"模型宽度 {hidden_size} 不能被头数 {num_heads} 整除；请显式给出 head_dim。")
        self.num_heads = num_heads
        self.num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = hidden_size // num_heads if head_dim is None else head_dim
        self.q_proj = nn.Linear(hidden_size, num_heads * head_dim, bias=bias)
        self.k_proj = nn.Linear(hidden_size, self.num_kv_heads * head_dim, bias=bias)
        self.v_proj = nn.Linear(hidden_size, self.num_kv_heads * head_dim, bias=bias)
        self.o_proj = nn.Linear(num_heads * head_dim, hidden_size, bias=bias)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        *,
        cos_sin: tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]] | None = None,
        kv_cache: Any = None,
        is_causal: bool = True,
    ) -> Float[Tensor, "B T C"]:
        """前向。

        Args:
            hidden_states: 这次新算的 `T` 个位置，已归一化。
            cos_sin: 这 `T` 个位置的旋转角；`None` 表示不旋转。
            kv_cache: 有 `update(k, v) -> (all_k, all_v)` 的对象，一层一个；存旋转之后、复制之前的键值。
            is_causal: 是否因果；缓存非空时按右下角对齐。

        Returns:
            与 `hidden_states` 同形，残差由调用者加。
        """
        q = split_heads(self.q_proj(hidden_states), num_heads=self.num_heads)  # (B, H, T, D)
        k = split_heads(self.k_proj(hidden_states), num_heads=self.num_kv_heads)  # (B, K, T, D)
        v = split_heads(self.v_proj(hidden_states), num_heads=self.num_kv_heads)
        if cos_sin is not None:
            q, k = apply_rope(q, k, *cos_sin)
        if kv_cache is not None:
            k, v = kv_cache.update(k, v)  # (B, K, S, D)
        out = grouped_query_attention(q, k, v, is_causal=is_causal)
        return self.o_proj(merge_heads(out))


# --8<-- [end:module]
