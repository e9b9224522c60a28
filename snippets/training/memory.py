r"""显存的公式：训练时的模型状态、激活、输出层，推理时的权重、KV cache、工作区与 logits；另附数激活的工具。

页面：docs/training/memory.md
不包含：分片（ZeRO、FSDP）、卸载、流水线在途的微批、LayerNorm 的均值与方差（每个 token 8 字节）、
分配器的碎片、CUDA 上下文与通信缓冲。

单位都是字节。公式只做四则运算，传 SymPy 符号就得到公式。
记号：$L$ 层，$B$ 条序列，每条 $T$ 个 token，宽度 $C$，头数 $H$，前馈内宽 $F$，词表 $V$，张量并行 $t$ 路，
每个元素 $c$ 字节。论文里的 s、b、h、a 就是这里的 $T$、$B$、$C$、$H$。

References:
    Korthikanti et al., "Reducing Activation Recomputation", §4、表 2，https://arxiv.org/abs/2205.05198
    Rajbhandari et al., "ZeRO", §3.1，https://arxiv.org/abs/1910.02054
"""

import torch
from torch import nn

from snippets.architecture.kv_cache import kv_cache_bytes
from snippets.scalars import Scalar

__all__ = [
    "model_state_bytes",
    "activation_bytes",
    "llama_activation_bytes",
    "output_bytes",
    "inference_bytes",
    "saved_bytes",
]


# --8<-- [start:states]
def model_state_bytes(
    num_params: Scalar,
    *,
    weight_bytes: Scalar = 2,
    grad_bytes: Scalar = 2,
    master_bytes: Scalar = 4,
    optimizer_bytes: Scalar = 8,
) -> Scalar:
    r"""模型状态的字节数：每个参数的权重、梯度、主权重、优化器状态各几字节，相加再乘参数个数。

    注意：默认是 16 位混合精度的 Adam，合计 16 字节；冻结的参数后三项是 0，与可训练的分开算再相加。

    Args:
        num_params: 参数个数。
        weight_bytes: 前向用的权重。
        grad_bytes: 梯度；Megatron-LM 的梯度缓冲是 float32，取 4。
        master_bytes: float32 主权重；权重本身就是 float32 时取 0。
        optimizer_bytes: 优化器状态；Adam 的两个 float32 矩是 8，SGD 不带动量是 0。

    Returns:
        字节数。
    """
    return num_params * (weight_bytes + grad_bytes + master_bytes + optimizer_bytes)


# --8<-- [end:states]
# --8<-- [start:activation]
def activation_bytes(
    *,
    num_layers: Scalar,
    batch_size: Scalar,
    num_tokens: Scalar,
    hidden_size: Scalar,
    num_heads: Scalar,
    tp_size: Scalar = 1,
    sequence_parallel: bool = False,
    recompute: str = "none",
    has_dropout: bool = True,
    bytes_per_element: Scalar = 2,
) -> Scalar:
    r"""GPT 块（LayerNorm、GELU、内宽 $4C$）为反向保存的字节数；默认值下每层是 $TBC(34+5HT/C)$。

    Args:
        num_layers: 层数 $L$。
        batch_size: 微批里的序列条数 $B$。
        num_tokens: 每条的 token 数 $T$。
        hidden_size: 宽度 $C$。
        num_heads: 头数 $H$。
        tp_size: 张量并行的路数 $t$。
        sequence_parallel: 归一化、dropout 的激活是否也沿序列切成 $t$ 份。
        recompute: `"none"`；`"selective"` 不存 $T\times T$ 的三个张量，FlashAttention 同此（另有 $4LBTH$ 的 log-sum-exp）；
            `"full"` 每层只存输入，不含反向时正在重算的那一层。
        has_dropout: 没有 dropout 就没有掩码，注意力也少存一份输出。
        bytes_per_element: 每个元素几字节 $c$；dropout 的掩码总是 1 字节。

    Returns:
        每张卡上的字节数。
    """
    c, mask = bytes_per_element, 1 if has_dropout else 0
    # 两个 LayerNorm 的输入、QKV 与 fc1 的输入；两个残差 dropout 的掩码
    replicated = 4 * c + 2 * mask
    # Q、K、V、输出投影的输入；GELU 与 fc2 的输入各 4C
    sharded = 4 * c + 8 * c
    # softmax 的输出；dropout 的掩码与输出
    scores = c + mask * (1 + c)
    shards = tp_size if sequence_parallel else 1
    tokens = num_layers * batch_size * num_tokens
    if recompute == "full":
        return tokens * hidden_size * c / shards
    linear = tokens * hidden_size * (replicated / shards + sharded / tp_size)
    if recompute == "selective":
        return linear
    if recompute != "none":
        raise ValueError(f"recompute={recompute!r}，没有这种重算；请用 none、selective、full。")
    return linear + tokens * num_tokens * num_heads * scores / tp_size


# --8<-- [end:activation]
def llama_activation_bytes(
    *,
    num_layers: Scalar,
    batch_size: Scalar,
    num_tokens: Scalar,
    hidden_size: Scalar,
    intermediate_size: Scalar,
    num_heads: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    bytes_per_element: Scalar = 2,
) -> Scalar:
    r"""LLaMA 式的块：融合的 RMSNorm、GQA、FlashAttention、SwiGLU，没有 dropout，单卡、不重算。

    $$
    LBT\big(c\,(4C+2Hd+2Kd+4F)+4H\big)
    $$

    注意：最后的 $4H$ 是 FlashAttention 每行的 log-sum-exp；不含旋转的余弦、正弦表与 RMSNorm 的统计量。

    Args:
        num_layers: 层数 $L$。
        batch_size: 微批里的序列条数 $B$。
        num_tokens: 每条的 token 数 $T$。
        hidden_size: 宽度 $C$。
        intermediate_size: 前馈内宽 $F$。
        num_heads: 查询头数 $H$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        bytes_per_element: 每个元素几字节 $c$。

    Returns:
        字节数。
    """
    norms_and_inputs = 4 * hidden_size  # 两个 RMSNorm 的输入、QKV 的输入、gate 与 up 的输入
    attention = 2 * num_heads * head_dim + 2 * num_kv_heads * head_dim  # Q 与输出；K、V
    ffn = 4 * intermediate_size  # gate、SiLU 的输出、up、两者的积
    elements = norms_and_inputs + attention + ffn
    return num_layers * batch_size * num_tokens * (elements * bytes_per_element + 4 * num_heads)


def output_bytes(
    *,
    batch_size: Scalar,
    num_tokens: Scalar,
    hidden_size: Scalar,
    vocab_size: Scalar,
    tp_size: Scalar = 1,
) -> Scalar:
    r"""最后的归一化、输出头与交叉熵为反向保存的字节数：$4TB(C+V)/t$。

    注意：输出头的输入、归一化的输入是 16 位，logits 是 float32，所以都是 4；反向还要一份同样大的梯度。

    Args:
        batch_size: 微批里的序列条数 $B$。
        num_tokens: 每条的 token 数 $T$。
        hidden_size: 宽度 $C$。
        vocab_size: 词表 $V$。
        tp_size: 张量并行加序列并行的路数 $t$。

    Returns:
        字节数。
    """
    return 4 * batch_size * num_tokens * (hidden_size + vocab_size) / tp_size


# --8<-- [start:inference]
def inference_bytes(
    *,
    num_params: Scalar,
    num_layers: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    num_tokens: Scalar,
    batch_size: Scalar = 1,
    hidden_size: Scalar = 0,
    intermediate_size: Scalar = 0,
    step_tokens: Scalar = 0,
    vocab_size: Scalar = 0,
    num_logits: Scalar = 0,
    weight_bytes: Scalar = 2,
    cache_element_bytes: Scalar = 2,
) -> Scalar:
    r"""推理的字节数：权重、KV cache、一层的工作区、logits 四项之和。

    注意：工作区与 logits 不同时到峰值，相加是上界；宽度、步长、词表不给就不算这两项。

    Args:
        num_params: 参数个数；混合专家是总参数，不是激活参数。
        num_layers: 层数 $L$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        num_tokens: 每条序列缓存的 token 数，提示与生成都算。
        batch_size: 序列条数 $B$。
        hidden_size: 宽度 $C$。
        intermediate_size: SwiGLU 的内宽 $F$。
        step_tokens: 一步送进模型的 token 总数 $n$：预填充是提示，解码是 $B$。
        vocab_size: 词表 $V$。
        num_logits: 一步算几行 float32 的 logits；只要最后一个位置就是 $B$。
        weight_bytes: 每个权重几字节；int8、fp8 是 1。
        cache_element_bytes: 缓存每个元素几字节。

    Returns:
        字节数，不含 CUDA 上下文、CUDA graph、通信缓冲与分配器的空隙。
    """
    weights = num_params * weight_bytes
    cache = kv_cache_bytes(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_tokens=num_tokens,
        batch_size=batch_size,
        bytes_per_element=cache_element_bytes,
    )
    workspace = 2 * step_tokens * (2 * hidden_size + 3 * intermediate_size)  # 残差、归一化后；SiLU、up、积
    return weights + cache + workspace + 4 * num_logits * vocab_size


# --8<-- [end:inference]
# --8<-- [start:saved]
def saved_bytes(module: nn.Module, *inputs: torch.Tensor) -> int:
    """真的跑一次前向，数自动求导为反向保存了多少字节；参数不算，同一块存储只数一次。

    Args:
        module: 模型或一层。
        inputs: 输入；被保存时也算，与论文一致。

    Returns:
        字节数。
    """
    parameters = {p.untyped_storage().data_ptr() for p in module.parameters()}
    storages = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in parameters:
            storages[storage.data_ptr()] = storage  # 留住引用，地址就不会被别的张量重用
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        module(*inputs)
    return sum(storage.nbytes() for storage in storages.values())


# --8<-- [end:saved]
