r"""从 MHA 到 MLA（multi-head latent attention）：展开与吸收两种算法、只存潜向量的缓存、缓存与计算量的公式。

页面：docs/architecture/mha-to-mla.md
不包含：MHA、GQA、MQA 本身（见 attention.py）、不压缩 query 的版本（V2-Lite）、YaRN 的系数、低精度、稀疏选择（DSA）。

轴：`B` 序列数，`H` 头数，`T` query 位置数，`S` key 位置数，`C` 模型宽度；`DC` 潜向量维数 $d_c$，
`DR` 旋转维数 $d_h^R$，`DN` 每头不旋转的维数 $d_h$，`DV` 值的每头维数。
DeepSeek-V2 与 V3：$d_c=512$，$d_h^R=64$，其余两个 128，头数 128。
大小与计算量的函数只做四则运算，传 SymPy 符号就得到公式；计算量是浮点运算次数，乘加算两次，不扣因果掩码。

References:
    DeepSeek-AI, "DeepSeek-V2", §2.1、附录 C 式 (37)–(47)，https://arxiv.org/abs/2405.04434
    Meng et al., "TransMLA"，https://arxiv.org/abs/2502.07864
"""

import torch
from jaxtyping import Float
from torch import Tensor, nn

from snippets.architecture.attention import merge_heads, split_heads
from snippets.architecture.attention_scaling import causal_mask, stable_softmax
from snippets.architecture.rope import apply_rope_interleaved
from snippets.scalars import Scalar

__all__ = [
    "mla_naive",
    "mla_absorbed",
    "LatentCache",
    "MultiHeadLatentAttention",
    "gqa_as_mla_projections",
    "gqa_cache_elements",
    "mla_cache_elements",
    "mla_naive_flops",
    "mla_absorbed_flops",
]


def _causal_probs(scores: Float[Tensor, "B H T S"]) -> Float[Tensor, "B H T S"]:
    mask = causal_mask(num_queries=scores.shape[2], num_keys=scores.shape[3], device=scores.device)
    return stable_softmax(scores.masked_fill(~mask, float("-inf")))


# --8<-- [start:two-ways]
def mla_naive(
    q_nope: Float[Tensor, "B H T DN"],
    q_rope: Float[Tensor, "B H T DR"],
    latent: Float[Tensor, "B S DC"],
    k_rope: Float[Tensor, "B S DR"],
    k_up: Float[Tensor, "H DN DC"],
    v_up: Float[Tensor, "H DV DC"],
) -> Float[Tensor, "B H T DV"]:
    """展开：把潜向量升回每个头的键与值，再做普通的因果注意力。

    Args:
        q_nope: 查询里不旋转的部分。
        q_rope: 查询里已旋转的部分。
        latent: 缓存的潜向量，已归一化。
        k_rope: 缓存的旋转键，所有头共用。
        k_up: $W^{UK}$，按头切开。
        v_up: $W^{UV}$，按头切开。

    Returns:
        每个头的输出，还没乘 $W^O$。
    """
    k_nope = torch.einsum("bsc,hnc->bhsn", latent, k_up)
    v = torch.einsum("bsc,hvc->bhsv", latent, v_up)
    k = torch.cat((k_nope, k_rope.unsqueeze(1).expand(-1, k_nope.shape[1], -1, -1)), dim=-1)
    q = torch.cat((q_nope, q_rope), dim=-1)  # (B, H, T, DN + DR)
    return _causal_probs(q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5) @ v


def mla_absorbed(
    q_nope: Float[Tensor, "B H T DN"],
    q_rope: Float[Tensor, "B H T DR"],
    latent: Float[Tensor, "B S DC"],
    k_rope: Float[Tensor, "B S DR"],
    k_up: Float[Tensor, "H DN DC"],
    v_up: Float[Tensor, "H DV DC"],
) -> Float[Tensor, "B H T DV"]:
    """吸收：升的是查询与输出，不是缓存；等价于只有一个键值头的 MQA，参数同 `mla_naive`。

    注意：点积在 DC + DR 维上求和，系数仍是 (DN + DR) 的 -1/2 次方。

    Args:
        q_nope: 查询里不旋转的部分。
        q_rope: 查询里已旋转的部分。
        latent: 缓存的潜向量。
        k_rope: 缓存的旋转键。
        k_up: $W^{UK}$。
        v_up: $W^{UV}$。

    Returns:
        与 `mla_naive` 逐元素相等，差别只在舍入。
    """
    scale = (q_nope.shape[-1] + q_rope.shape[-1]) ** -0.5
    q_latent = torch.einsum("bhtn,hnc->bhtc", q_nope, k_up)
    scores = torch.einsum("bhtc,bsc->bhts", q_latent, latent)
    scores = scores + torch.einsum("bhtr,bsr->bhts", q_rope, k_rope)
    mixed = torch.einsum("bhts,bsc->bhtc", _causal_probs(scores * scale), latent)
    return torch.einsum("bhtc,hvc->bhtv", mixed, v_up)


# --8<-- [end:two-ways]
# --8<-- [start:module]
class LatentCache:
    """一层的缓存：每个 token 一个 DC + DR 维的向量，没有头这一维。"""

    def __init__(self):
        self.entries: Tensor | None = None

    def update(self, entry: Float[Tensor, "B T D"]) -> Float[Tensor, "B S D"]:
        """接在后面，返回全部。

        Args:
            entry: 归一化后的潜向量与旋转后的键，首尾相接。

        Returns:
            从第 0 个 token 起的全部。
        """
        self.entries = entry if self.entries is None else torch.cat((self.entries, entry), dim=1)
        return self.entries


class MultiHeadLatentAttention(nn.Module):
    """一层因果 MLA，参数名与计算同 transformers 5.23.0 的 `DeepseekV3Attention`（默认没有 `absorb`）。

    Args:
        hidden_size: 模型宽度。
        num_heads: 头数。
        q_lora_rank: 查询的潜向量维数。
        kv_lora_rank: 键值的潜向量维数 DC。
        qk_nope_head_dim: DN。
        qk_rope_head_dim: DR。
        v_head_dim: DV。
    """

    def __init__(
        self,
        hidden_size: int,
        *,
        num_heads: int,
        q_lora_rank: int,
        kv_lora_rank: int,
        qk_nope_head_dim: int,
        qk_rope_head_dim: int,
        v_head_dim: int,
    ):
        super().__init__()
        self.num_heads = num_heads
        self.qk_dims = (qk_nope_head_dim, qk_rope_head_dim)
        self.kv_dims = (kv_lora_rank, qk_rope_head_dim)
        self.up_dims = (qk_nope_head_dim, v_head_dim)
        self.q_a_proj = nn.Linear(hidden_size, q_lora_rank, bias=False)
        self.q_a_layernorm = nn.RMSNorm(q_lora_rank, eps=1e-6)
        self.q_b_proj = nn.Linear(q_lora_rank, num_heads * sum(self.qk_dims), bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden_size, sum(self.kv_dims), bias=False)
        self.kv_a_layernorm = nn.RMSNorm(kv_lora_rank, eps=1e-6)
        self.kv_b_proj = nn.Linear(kv_lora_rank, num_heads * sum(self.up_dims), bias=False)
        self.o_proj = nn.Linear(num_heads * v_head_dim, hidden_size, bias=False)

    def forward(
        self,
        hidden_states: Float[Tensor, "B T C"],
        *,
        cos_sin: tuple[Float[Tensor, "B T DR"], Float[Tensor, "B T DR"]],
        cache: LatentCache | None = None,
        absorb: bool = False,
    ) -> Float[Tensor, "B T C"]:
        """前向。

        Args:
            hidden_states: 这次新算的位置，已归一化。
            cos_sin: 这些位置的旋转角，来自 `rope_cos_sin`，维数是 DR。
            cache: 一层一个；`None` 表示不缓存。
            absorb: 用吸收还是展开；结果相同。

        Returns:
            与 `hidden_states` 同形。
        """
        q = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        q_nope, q_rope = split_heads(q, num_heads=self.num_heads).split(self.qk_dims, dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split(self.kv_dims, dim=-1)
        q_rope, k_rope = apply_rope_interleaved(q_rope, k_rope.unsqueeze(1), *cos_sin)  # 只转这两段
        entry = torch.cat((self.kv_a_layernorm(latent), k_rope.squeeze(1)), dim=-1)  # (B, T, DC + DR)
        if cache is not None:
            entry = cache.update(entry)
        latent, k_rope = entry.split(self.kv_dims, dim=-1)
        k_up, v_up = self.kv_b_proj.weight.unflatten(0, (self.num_heads, -1)).split(self.up_dims, dim=1)
        attend = mla_absorbed if absorb else mla_naive
        return self.o_proj(merge_heads(attend(q_nope, q_rope, latent, k_rope, k_up, v_up)))


# --8<-- [end:module]
# --8<-- [start:gqa]
def gqa_as_mla_projections(
    *, num_heads: int, num_kv_heads: int, head_dim: int
) -> tuple[Float[Tensor, "H D DC"], Float[Tensor, "H D DC"]]:
    """把 GQA 写成 MLA：潜向量就是全部键值头首尾相接，升维矩阵只做挑选。

    Args:
        num_heads: 查询头数 $H$。
        num_kv_heads: 键值头数 $K$，整除 $H$。
        head_dim: 每头维数 $D$。

    Returns:
        `(k_up, v_up)`，float64 的 0/1 矩阵；潜向量 2KD 维，前一半是键，后一半是值。
    """
    group = torch.arange(num_heads) * num_kv_heads // num_heads  # 第 h 个查询头用哪个键值头
    select = torch.eye(2 * num_kv_heads * head_dim, dtype=torch.float64).unflatten(0, (2, num_kv_heads, -1))
    return select[0, group], select[1, group]


# --8<-- [end:gqa]
# --8<-- [start:sizes]
def gqa_cache_elements(*, num_kv_heads: Scalar, head_dim: Scalar) -> Scalar:
    """MHA、GQA、MQA 每层每个 token 缓存的元素数，$2Kd_h$。

    Args:
        num_kv_heads: 键值头数 $K$；MHA 是 $H$，MQA 是 1。
        head_dim: 每头维数 $d_h$。

    Returns:
        元素数，与存储精度无关。
    """
    return 2 * num_kv_heads * head_dim


def mla_cache_elements(*, latent_dim: Scalar, rope_dim: Scalar) -> Scalar:
    """MLA 每层每个 token 缓存的元素数，$d_c+d_h^R$。

    Args:
        latent_dim: $d_c$。
        rope_dim: $d_h^R$；漏掉它，模型就没有位置了。

    Returns:
        元素数，与头数无关，也不能按头切给张量并行。
    """
    return latent_dim + rope_dim


def mla_naive_flops(
    *,
    num_queries: Scalar,
    num_keys: Scalar,
    num_expanded: Scalar,
    num_heads: Scalar = 128,
    latent_dim: Scalar = 512,
    rope_dim: Scalar = 64,
    nope_dim: Scalar = 128,
    value_dim: Scalar = 128,
) -> Scalar:
    """展开：先升 `num_expanded` 个潜向量，再在 192 维上打分、128 维上加权（一层，不含公共的投影）。

    Args:
        num_queries: $T$。
        num_keys: $S$，含这次的。
        num_expanded: 要升维的 key 数；缓存里只有潜向量时是 $S$，缓存了展开后的键值时是 $T$。
        num_heads: 头数。
        latent_dim: DC。
        rope_dim: DR。
        nope_dim: DN。
        value_dim: DV。

    Returns:
        浮点运算次数。
    """
    expand = num_expanded * latent_dim * (nope_dim + value_dim)
    attend = num_queries * num_keys * (nope_dim + rope_dim + value_dim)
    return 2 * num_heads * (expand + attend)


def mla_absorbed_flops(
    *,
    num_queries: Scalar,
    num_keys: Scalar,
    num_heads: Scalar = 128,
    latent_dim: Scalar = 512,
    rope_dim: Scalar = 64,
    nope_dim: Scalar = 128,
    value_dim: Scalar = 128,
) -> Scalar:
    """吸收：升 $T$ 个查询与输出，在 576 维上打分、512 维上加权（一层，不含公共的投影）。

    Args:
        num_queries: $T$。
        num_keys: $S$，含这次的。
        num_heads: 头数。
        latent_dim: DC。
        rope_dim: DR。
        nope_dim: DN。
        value_dim: DV。

    Returns:
        浮点运算次数。
    """
    absorb = num_queries * latent_dim * (nope_dim + value_dim)
    attend = num_queries * num_keys * (latent_dim + rope_dim + latent_dim)
    return 2 * num_heads * (absorb + attend)


# --8<-- [end:sizes]
