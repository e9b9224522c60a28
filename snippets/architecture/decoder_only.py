r"""三种架构只差一张掩码：前缀语言模型的掩码、注意力矩阵、有效秩、因果注意力的行列式。

页面：docs/architecture/decoder-only.md
不包含：因果掩码与 softmax（attention_scaling.py）、多头注意力（attention.py）、缓存的存放（kv_cache.py）、交叉注意力。

轴：`T` query 位置数，`S` key 位置数，`M`、`N` 任意矩阵的行数与列数。
前缀长度取 0 就是因果解码器，取全长就是双向注意力；权重完全相同。

References:
    Wang et al., "What Language Model Architecture and Pretraining Objective Work Best for Zero-Shot
    Generalization?"（因果、非因果解码器与编码器–解码器），https://arxiv.org/abs/2204.05832
    Raffel et al., "T5", §3.2（三种注意力掩码），https://arxiv.org/abs/1910.10683
    Roy and Vetterli, "The Effective Rank", EUSIPCO 2007（有效秩的定义）
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.architecture.attention_scaling import causal_mask, stable_softmax

__all__ = ["prefix_lm_mask", "attention_matrix", "effective_rank", "log_det_causal"]


# --8<-- [start:mask]
def prefix_lm_mask(*, num_tokens: int, prefix_length: int = 0) -> Bool[Tensor, "T T"]:
    r"""前缀内互相看得见，前缀之后只看不晚于自己的。

    $$
    M_{ij}=\text{True}\iff j\le i\ \text{或}\ j\le P
    $$

    注意：式中位置从 1 数起，$P$ 是前缀长度；$P=0$ 与 $P=1$ 都是因果掩码，$P=T$ 是双向。

    Args:
        num_tokens: 序列长度 $T$。
        prefix_length: 前缀长度 $P$，从 0 到 $T$。

    Returns:
        布尔掩码，行是 query，列是 key，`True` 表示看得见。
    """
    if not 0 <= prefix_length <= num_tokens:
        raise ValueError(f"prefix_length={prefix_length} 不在 0 到 {num_tokens} 之间；请传前缀的 token 数。")
    visible = causal_mask(num_queries=num_tokens, num_keys=num_tokens)
    visible[:, :prefix_length] = True  # 前缀的列对所有人可见
    return visible


# --8<-- [end:mask]
# --8<-- [start:matrix]
def attention_matrix(
    scores: Float[Tensor, "*batch T S"], mask: Bool[Tensor, "T S"]
) -> Float[Tensor, "*batch T S"]:
    r"""先掩码再 softmax，每行之和是 1。

    Args:
        scores: 缩放后的打分。
        mask: `True` 表示看得见，每行至少一个。

    Returns:
        注意力权重，看不见的位置恰为 0。
    """
    return stable_softmax(scores.masked_fill(~mask, float("-inf")))


# --8<-- [end:matrix]
# --8<-- [start:rank]
def effective_rank(matrix: Float[Tensor, "*batch M N"]) -> Float[Tensor, "*batch"]:
    r"""有效秩：奇异值归一成分布，取熵的指数。

    $$
    \exp\Big(-\sum_i p_i\ln p_i\Big),\qquad p_i=\frac{\sigma_i}{\sum_j\sigma_j}
    $$

    注意：$r$ 个相等的奇异值给出 $r$；不需要像数值秩那样选阈值，也与整体缩放无关。

    Args:
        matrix: 不全为零的矩阵。

    Returns:
        1 与 $\min(M,N)$ 之间的实数。
    """
    singular_values = torch.linalg.svdvals(matrix)
    p = singular_values / singular_values.sum(dim=-1, keepdim=True)
    return torch.special.entr(p).sum(dim=-1).exp()


# --8<-- [end:rank]
# --8<-- [start:det]
def log_det_causal(attention: Float[Tensor, "*batch T T"]) -> Float[Tensor, "*batch"]:
    r"""因果注意力矩阵的行列式的自然对数：下三角，所以只看对角线。

    $$
    \ln\det A=\sum_i\ln A_{ii}
    $$

    注意：看得见自己时 $A_{ii}>0$，结果有限，矩阵可逆；对角线有 0（掩码少看一个）时是 $-\infty$。
    行列式的大小不说明条件数：均匀的因果注意力 $\det A=1/T!$，条件数却不超过 $4T$。

    Args:
        attention: 下三角的注意力权重。

    Returns:
        行列式的对数。
    """
    if attention.triu(diagonal=1).any():
        raise ValueError("attention 的对角线以上不全是 0，不是因果注意力；请用 torch.linalg.slogdet。")
    return attention.diagonal(dim1=-2, dim2=-1).log().sum(dim=-1)


# --8<-- [end:det]
