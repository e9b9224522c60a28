r"""从零写一个 LLaMA 结构的小模型：GELU、SwiGLU、解码层、整个模型、初始化与贪心生成。

页面：docs/architecture/transformer-from-scratch.md
不包含：注意力（attention.py）、RMSNorm（normalization.py）、RoPE（rope.py）、KV cache 的存放（kv_cache.py）、
采样（sampling.py）、损失（softmax_cross_entropy.py）、dropout、填充掩码。

轴：`B` 序列数，`T` 这次送入的 token 数，`V` 词表大小，`C` 模型宽度，`F` 前馈的内部宽度。
参数名与 transformers 5.23.0 的 `LlamaForCausalLM` 相同，只少一层 `model.` 前缀，可以互相装载权重。

References:
    Touvron et al., "LLaMA", §2.2（前置归一化、SwiGLU、RoPE），https://arxiv.org/abs/2302.13971
    Shazeer, "GLU Variants Improve Transformer", §2，https://arxiv.org/abs/2002.05202
    Hendrycks and Gimpel, "GELU", §2，https://arxiv.org/abs/1606.08415
    Radford et al., "GPT-2", §2.3（残差层的权重初始化乘 1/√N，N 是残差层数）
"""

import math
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from snippets.architecture.attention import Attention
from snippets.architecture.normalization import rms_norm
from snippets.architecture.rope import rope_cos_sin, rope_inverse_frequencies

__all__ = [
    "gelu_tanh",
    "swiglu",
    "swiglu_width",
    "SwiGLU",
    "RMSNorm",
    "DecoderBlock",
    "MiniLlama",
    "init_weights",
    "generate_greedy",
]


# --8<-- [start:gelu]
def gelu_tanh(x: Float[Tensor, "*batch"]) -> Float[Tensor, "*batch"]:
    r"""GELU 的 tanh 近似，GPT-2 用的就是它。

    $$
    \tfrac12x\Big(1+\tanh\big(\sqrt{2/\pi}\,(x+0.044715\,x^3)\big)\Big)
    $$

    Args:
        x: 任意形状。

    Returns:
        形状不变；精确的 GELU 是 $x\,\Phi(x)$，$\Phi$ 是标准正态的分布函数。
    """
    return 0.5 * x * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (x + 0.044715 * x**3)))


# --8<-- [end:gelu]
# --8<-- [start:swiglu]
def swiglu(
    x: Float[Tensor, "*batch C"],
    gate_weight: Float[Tensor, "F C"],
    up_weight: Float[Tensor, "F C"],
    down_weight: Float[Tensor, "C F"],
) -> Float[Tensor, "*batch C"]:
    r"""门控前馈：门过 SiLU，逐元素乘升维的一支，再降回模型宽度。

    $$
    \big(\operatorname{SiLU}(xW_g^\top)\odot xW_u^\top\big)W_d^\top,\qquad\operatorname{SiLU}(z)=z\,\sigma(z)
    $$

    注意：SiLU 只在门这一支；两支的形状相同，对调了也不报错。

    Args:
        x: 已归一化的输入。
        gate_weight: 门 $W_g$，按 `nn.Linear` 的 (出, 入) 存放。
        up_weight: 升维 $W_u$。
        down_weight: 降维 $W_d$。

    Returns:
        与 `x` 同形。
    """
    gate = x @ gate_weight.T  # (*batch, F)
    return (gate * torch.sigmoid(gate) * (x @ up_weight.T)) @ down_weight.T


class SwiGLU(nn.Module):
    """前馈层：三个矩阵，都不带偏置，同 `LlamaMLP`。

    Args:
        hidden_size: 模型宽度 `C`。
        intermediate_size: 内部宽度 `F`。
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        super().__init__()
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """`swiglu`，权重取自三个投影。

        Args:
            x: 已归一化的输入。

        Returns:
            与输入同形，残差由调用者加。
        """
        return swiglu(x, self.gate_proj.weight, self.up_proj.weight, self.down_proj.weight)


# --8<-- [end:swiglu]
def swiglu_width(hidden_size: int, *, multiplier: float = 1.0, multiple_of: int = 256) -> int:
    r"""Llama 官方代码的内部宽度：$8h/3$ 取整，乘倍数再取整，最后向上凑整。

    Args:
        hidden_size: 模型宽度 $h$。
        multiplier: 官方配置的 `ffn_dim_multiplier`。
        multiple_of: 凑成它的整数倍。

    Returns:
        内部宽度 `F`。
    """
    width = int(multiplier * int(2 * 4 * hidden_size / 3))
    return math.ceil(width / multiple_of) * multiple_of


# --8<-- [start:block]
class RMSNorm(nn.Module):
    """带增益的 RMSNorm，增益初值为 1，eps 取 1e-6。

    Args:
        hidden_size: 模型宽度 `C`。
    """

    def __init__(self, hidden_size: int):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))

    def forward(self, x: Float[Tensor, "*batch C"]) -> Float[Tensor, "*batch C"]:
        """归一化最后一维。

        Args:
            x: 任意批次形状。

        Returns:
            与输入同形。
        """
        return rms_norm(x, self.weight)


class DecoderBlock(nn.Module):
    r"""前置归一化（pre-norm）的一层：$x\leftarrow x+f(\operatorname{norm}(x))$ 做两次，归一化各有各的增益。

    Args:
        hidden_size: 模型宽度 `C`。
        intermediate_size: 前馈的内部宽度 `F`。
        num_heads: 查询头数。
        num_kv_heads: 键值头数；默认等于 `num_heads`。
    """

    def __init__(
        self, hidden_size: int, intermediate_size: int, *, num_heads: int, num_kv_heads: int | None = None
    ):
        super().__init__()
        self.input_layernorm = RMSNorm(hidden_size)
        self.self_attn = Attention(hidden_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
        self.post_attention_layernorm = RMSNorm(hidden_size)
        self.mlp = SwiGLU(hidden_size, intermediate_size)

    def forward(
        self,
        x: Float[Tensor, "B T C"],
        *,
        cos_sin: tuple[Float[Tensor, "B T D"], Float[Tensor, "B T D"]],
        kv_cache: Any = None,
    ) -> Float[Tensor, "B T C"]:
        """残差加的是归一化之前的 x。

        Args:
            x: 残差流。
            cos_sin: 旋转角的余弦与正弦。
            kv_cache: 这一层的缓存。

        Returns:
            新的残差流。
        """
        x = x + self.self_attn(self.input_layernorm(x), cos_sin=cos_sin, kv_cache=kv_cache)
        return x + self.mlp(self.post_attention_layernorm(x))


# --8<-- [end:block]
# --8<-- [start:model]
class MiniLlama(nn.Module):
    """嵌入、若干解码层、末尾的归一化、输出矩阵；权重已按 `init_weights` 的默认值初始化。

    Args:
        vocab_size: 词表大小 `V`。
        hidden_size: 模型宽度 `C`。
        intermediate_size: 前馈的内部宽度 `F`。
        num_layers: 层数。
        num_heads: 查询头数。
        num_kv_heads: 键值头数；默认等于 `num_heads`。
        rope_theta: RoPE 的底数。
        tie_embeddings: 输出矩阵与嵌入共用同一份权重。
    """

    def __init__(
        self,
        *,
        vocab_size: int,
        hidden_size: int,
        intermediate_size: int,
        num_layers: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        rope_theta: float = 10000.0,
        tie_embeddings: bool = False,
    ):
        super().__init__()
        self.head_dim, self.rope_theta = hidden_size // num_heads, rope_theta
        self.embed_tokens = nn.Embedding(vocab_size, hidden_size)
        self.layers = nn.ModuleList(
            DecoderBlock(hidden_size, intermediate_size, num_heads=num_heads, num_kv_heads=num_kv_heads)
            for _ in range(num_layers)
        )
        self.norm = RMSNorm(hidden_size)
        self.lm_head = nn.Linear(hidden_size, vocab_size, bias=False)
        if tie_embeddings:
            self.lm_head.weight = self.embed_tokens.weight
        init_weights(self)

    def forward(
        self,
        input_ids: Int[Tensor, "B T"],
        *,
        kv_caches: list | None = None,
        position_ids: Int[Tensor, "B T"] | None = None,
    ) -> Float[Tensor, "B T V"]:
        """每个位置对下一个 token 的 logit。

        Args:
            input_ids: 这次送入的 token；有缓存时只送新的。
            kv_caches: 一层一个缓存，有 `length` 属性与 `update(k, v)` 方法。
            position_ids: 位置；默认从缓存的长度（没有缓存就是 0）数起。

        Returns:
            没有归一化的 logit。
        """
        if kv_caches is None:
            kv_caches = [None] * len(self.layers)
        if position_ids is None:
            start = 0 if kv_caches[0] is None else kv_caches[0].length
            steps = torch.arange(start, start + input_ids.shape[1], device=input_ids.device)
            position_ids = steps.expand_as(input_ids)
        inv_freq = rope_inverse_frequencies(self.head_dim, rope_theta=self.rope_theta)
        cos_sin = rope_cos_sin(position_ids, inv_freq.to(input_ids.device))
        x = self.embed_tokens(input_ids)  # (B, T, C)
        for layer, kv_cache in zip(self.layers, kv_caches, strict=True):
            x = layer(x, cos_sin=cos_sin, kv_cache=kv_cache)
        return self.lm_head(self.norm(x))


# --8<-- [end:model]
# --8<-- [start:init]
def init_weights(model: nn.Module, *, std: float = 0.02, residual_scale: float = 1.0) -> None:
    r"""所有矩阵取 $\mathcal N(0,\text{std}^2)$，写回残差的 `o_proj`、`down_proj` 再乘一个系数。

    Args:
        model: 就地改写；增益与偏置不动。
        std: 标准差。
        residual_scale: 系数；GPT-2 取 $1/\sqrt{2L}$，$L$ 是层数，Llama 取 1。
    """
    for name, weight in model.named_parameters():
        if weight.ndim == 2:
            is_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            nn.init.normal_(weight, std=std * residual_scale if is_residual else std)


# --8<-- [end:init]
# --8<-- [start:generate]
@torch.no_grad()
def generate_greedy(
    model: MiniLlama, input_ids: Int[Tensor, "B T"], *, max_new_tokens: int, kv_caches: list | None = None
) -> Int[Tensor, "B T_new"]:
    """每步取最大的 logit；有缓存时第一步送整段，以后只送新 token。

    Args:
        model: 语言模型。
        input_ids: 前缀，至少一个 token，没有填充。
        max_new_tokens: 生成几个 token。
        kv_caches: 空的缓存，一层一个；`None` 表示每步重算整段。

    Returns:
        前缀接上生成的 token。
    """
    step_input = input_ids
    for _ in range(max_new_tokens):
        logits = model(step_input, kv_caches=kv_caches)
        new_ids = logits[:, -1].argmax(dim=-1, keepdim=True)  # (B, 1)
        input_ids = torch.cat((input_ids, new_ids), dim=-1)
        step_input = input_ids if kv_caches is None else new_ids
    return input_ids


# --8<-- [end:generate]
