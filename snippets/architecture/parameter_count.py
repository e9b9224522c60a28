r"""参数量与计算量：GPT-2、LLaMA 式（GQA、SwiGLU）、MLA、MoE 的闭式，前向与训练的浮点运算数。

页面：docs/architecture/parameter-count.md
不包含：逐元素运算（归一化、激活、softmax）的计算量、查表、优化器、MTP 模块、不进 `Parameter` 的缓冲区。

全部只做四则运算，传 SymPy 符号就得到公式。参数的名字同 Hugging Face 的配置，`DenseConfig` 的字段可以直接展开传入。
记号：$L$ 层，$C$ 模型宽度，$F$ 前馈内宽，$H$、$K$ 查询头与键值头数，$d$ 每头维数，$V$ 词表，$E$ 专家数；
$N$ 参数个数，$D$ token 数。一次乘加算两次浮点运算。

References:
    Kaplan et al., "Scaling Laws for Neural Language Models", §2.1，https://arxiv.org/abs/2001.08361
    Chowdhery et al., "PaLM", 附录 B，https://arxiv.org/abs/2204.02311
    DeepSeek-AI, "DeepSeek-V3 Technical Report", §2.1、§4.2，https://arxiv.org/abs/2412.19437
"""

from snippets.scalars import Scalar

__all__ = [
    "gpt2_num_params",
    "gqa_params",
    "mla_params",
    "swiglu_params",
    "moe_params",
    "decoder_params",
    "llama_num_params",
    "llama_matmul_params",
    "forward_flops",
    "training_flops",
    "attention_crossover",
]


def gpt2_num_params(
    *, hidden_size: Scalar, num_layers: Scalar, vocab_size: Scalar, max_positions: Scalar = 1024
) -> Scalar:
    r"""GPT-2：每个线性层有偏置，LayerNorm 有偏置，输出头与词嵌入共享。

    $$
    L(12C^2+13C)+2C+(V+S_{\max})C
    $$

    Args:
        hidden_size: 模型宽度 $C$；前馈内宽固定为 $4C$。
        num_layers: 层数 $L$。
        vocab_size: 词表大小 $V$。
        max_positions: 位置嵌入的行数 $S_{\max}$。

    Returns:
        参数个数，共享的权重只数一次。
    """
    C = hidden_size
    attention = 4 * C**2 + 4 * C
    ffn = 2 * C * (4 * C) + 4 * C + C
    layer_norms = 4 * C
    return num_layers * (attention + ffn + layer_norms) + 2 * C + (vocab_size + max_positions) * C


# --8<-- [start:layer]
def gqa_params(
    *, hidden_size: Scalar, num_heads: Scalar, num_kv_heads: Scalar, head_dim: Scalar, qkv_bias: bool = False
) -> Scalar:
    r"""一层 GQA：$2CHd+2CKd$，带偏置再加 $(H+2K)d$；输出投影没有偏置。

    Args:
        hidden_size: 模型宽度 $C$。
        num_heads: 查询头数 $H$；$Hd$ 不必等于 $C$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        qkv_bias: 查询、键、值的投影有没有偏置（Qwen2.5 有）。

    Returns:
        参数个数。
    """
    q_width, kv_width = num_heads * head_dim, num_kv_heads * head_dim
    weights = hidden_size * (2 * q_width + 2 * kv_width)
    return weights + q_width + 2 * kv_width if qkv_bias else weights


def swiglu_params(*, hidden_size: Scalar, intermediate_size: Scalar) -> Scalar:
    """一个 SwiGLU：gate、up、down 三个矩阵，没有偏置。

    Args:
        hidden_size: 模型宽度 $C$。
        intermediate_size: 内宽 $F$。

    Returns:
        参数个数 $3CF$。
    """
    return 3 * hidden_size * intermediate_size


# --8<-- [end:layer]


# --8<-- [start:mla]
def mla_params(
    *,
    hidden_size: Scalar,
    num_heads: Scalar,
    q_lora_rank: Scalar,
    kv_lora_rank: Scalar,
    qk_nope_head_dim: Scalar,
    qk_rope_head_dim: Scalar,
    v_head_dim: Scalar,
) -> Scalar:
    r"""一层 MLA：查询与键值各有降维、RMSNorm、升维；旋转的键所有头共用一份。

    Args:
        hidden_size: 模型宽度 $C$。
        num_heads: 头数 $H$。
        q_lora_rank: 查询的潜变量维数。
        kv_lora_rank: 键值的潜变量维数。
        qk_nope_head_dim: 每头不旋转的维数。
        qk_rope_head_dim: 每头旋转的维数。
        v_head_dim: 每头的值的维数。

    Returns:
        参数个数，含两个 RMSNorm 的增益。
    """
    q_down = hidden_size * q_lora_rank + q_lora_rank
    q_up = q_lora_rank * num_heads * (qk_nope_head_dim + qk_rope_head_dim)
    kv_down = hidden_size * (kv_lora_rank + qk_rope_head_dim) + kv_lora_rank
    kv_up = kv_lora_rank * num_heads * (qk_nope_head_dim + v_head_dim)
    return q_down + q_up + kv_down + kv_up + num_heads * v_head_dim * hidden_size


# --8<-- [end:mla]


# --8<-- [start:moe]
def moe_params(
    *,
    hidden_size: Scalar,
    intermediate_size: Scalar,
    num_experts: Scalar,
    experts_per_token: Scalar,
    num_shared_experts: Scalar = 0,
) -> tuple[Scalar, Scalar]:
    """一层 MoE 的总参数与激活参数：路由器 $CE$ 整个参与每个 token，两边都算。

    Args:
        hidden_size: 模型宽度 $C$。
        intermediate_size: 一个专家的内宽。
        num_experts: 路由专家数 $E$，不含共享专家。
        experts_per_token: 每个 token 选几个路由专家。
        num_shared_experts: 共享专家数。

    Returns:
        总参数个数、激活参数个数。
    """
    expert = swiglu_params(hidden_size=hidden_size, intermediate_size=intermediate_size)
    common = num_shared_experts * expert + hidden_size * num_experts
    return num_experts * expert + common, experts_per_token * expert + common


# --8<-- [end:moe]


# --8<-- [start:decoder]
def decoder_params(
    *,
    layers: Scalar,
    num_layers: Scalar,
    hidden_size: Scalar,
    vocab_size: Scalar,
    tie_embeddings: bool = False,
) -> Scalar:
    """把各层合成整个模型：每层两个 RMSNorm，末尾一个，词嵌入与输出头。

    Args:
        layers: 全部层的注意力与前馈之和，不含归一化。
        num_layers: 层数 $L$。
        hidden_size: 模型宽度 $C$。
        vocab_size: 词表大小 $V$。
        tie_embeddings: 输出头与词嵌入是否共享；共享只数一次。

    Returns:
        参数个数。
    """
    tables = 1 if tie_embeddings else 2
    return layers + (2 * num_layers + 1) * hidden_size + tables * vocab_size * hidden_size


def llama_num_params(
    *,
    hidden_size: Scalar,
    intermediate_size: Scalar,
    num_layers: Scalar,
    num_heads: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    vocab_size: Scalar,
    tie_embeddings: bool = False,
    qkv_bias: bool = False,
) -> Scalar:
    r"""LLaMA 式稠密模型（Llama 2/3、Qwen2.5）的参数量。

    $$
    L(2CHd+2CKd+3CF+2C)+C+2VC
    $$

    Args:
        hidden_size: 模型宽度 $C$。
        intermediate_size: 前馈内宽 $F$。
        num_layers: 层数 $L$。
        num_heads: 查询头数 $H$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        vocab_size: 词表大小 $V$，取权重的行数（含补齐）。
        tie_embeddings: 共享词嵌入时最后一项是 $VC$。
        qkv_bias: 查询、键、值的投影有没有偏置。

    Returns:
        参数个数。
    """
    layer = swiglu_params(hidden_size=hidden_size, intermediate_size=intermediate_size) + gqa_params(
        hidden_size=hidden_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        qkv_bias=qkv_bias,
    )
    return decoder_params(
        layers=num_layers * layer,
        num_layers=num_layers,
        hidden_size=hidden_size,
        vocab_size=vocab_size,
        tie_embeddings=tie_embeddings,
    )


# --8<-- [end:decoder]


def llama_matmul_params(
    *,
    hidden_size: Scalar,
    intermediate_size: Scalar,
    num_layers: Scalar,
    num_heads: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    vocab_size: Scalar,
) -> Scalar:
    r"""真正做矩阵乘的参数：各层的矩阵加输出头 $VC$；查表、偏置、归一化的增益不算。

    注意：共享词嵌入时输出头仍做矩阵乘，所以与是否共享无关。

    Args:
        hidden_size: 模型宽度 $C$。
        intermediate_size: 前馈内宽 $F$。
        num_layers: 层数 $L$。
        num_heads: 查询头数 $H$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        vocab_size: 词表大小 $V$。

    Returns:
        参数个数，代入 `forward_flops` 的 `num_params`。
    """
    layer = swiglu_params(hidden_size=hidden_size, intermediate_size=intermediate_size) + gqa_params(
        hidden_size=hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads, head_dim=head_dim
    )
    return num_layers * layer + vocab_size * hidden_size


# --8<-- [start:flops]
def forward_flops(
    *,
    num_params: Scalar,
    num_tokens: Scalar,
    num_layers: Scalar,
    attention_width: Scalar,
    visible_keys: Scalar,
) -> Scalar:
    r"""前向的浮点运算数 $D(2N+4LHd\,\bar S)$：参数的矩阵乘，加打分与加权求和。

    Args:
        num_params: 做矩阵乘的参数 $N$；MoE 用激活参数。
        num_tokens: token 数 $D$。
        num_layers: 层数 $L$。
        attention_width: $Hd$；键与值的维数不同时取两者的平均（乘 $H$）。
        visible_keys: 每个 token 的打分要算几个键 $\bar S$。

    Returns:
        浮点运算数，乘加算两次。
    """
    return num_tokens * (2 * num_params + 4 * num_layers * attention_width * visible_keys)


def training_flops(*, forward: Scalar, recompute: bool = False) -> Scalar:
    """训练一遍：反向对每个乘法算两个梯度，是前向的两倍；全量重算再加一次前向。

    Args:
        forward: 前向的浮点运算数。
        recompute: 是否全量重算激活。

    Returns:
        浮点运算数：前向的 3 倍，重算时 4 倍。
    """
    return 4 * forward if recompute else 3 * forward


def attention_crossover(*, num_params: Scalar, num_layers: Scalar, attention_width: Scalar) -> Scalar:
    r"""打分要算多少个键时，注意力的运算量与参数的矩阵乘相等：$\bar S=N/(2LHd)$。

    Args:
        num_params: 做矩阵乘的参数 $N$。
        num_layers: 层数 $L$。
        attention_width: $Hd$。

    Returns:
        键的个数。
    """
    return num_params / (2 * num_layers * attention_width)


# --8<-- [end:flops]
