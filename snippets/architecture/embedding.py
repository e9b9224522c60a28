r"""把语言模型的隐藏状态变成文本向量：池化、对比损失（InfoNCE）、套娃损失，以及各向异性、对齐与均匀、召回率。

页面：docs/architecture/embedding.md
不包含：模型本身（transformer_from_scratch.py）、交叉熵（softmax_cross_entropy.py）、双向化的训练、向量索引。

轴：`B` 查询数，`N` 文档数（第 $i$ 篇是第 $i$ 个查询的正例，多出的是难负例），`T` token 数，`C` 向量维数。
相似度一律是余弦：函数内部归一化，调用者不必先做。

References:
    van den Oord et al., "CPC", §2.3 式 (4)（InfoNCE 与互信息的下界），https://arxiv.org/abs/1807.03748
    Wang and Isola, §4.1（对齐与均匀），https://arxiv.org/abs/2005.10242
    Kusupati et al., "Matryoshka Representation Learning", §3 式 (1)，https://arxiv.org/abs/2205.13147
    Ethayarajh, 各向异性，https://arxiv.org/abs/1909.00512
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import normalize

from snippets.architecture.softmax_cross_entropy import cross_entropy

__all__ = [
    "mean_pool",
    "last_token_pool",
    "cosine_matrix",
    "info_nce",
    "symmetric_info_nce",
    "likely_negatives",
    "matryoshka_info_nce",
    "mean_cosine",
    "alignment",
    "uniformity",
    "recall_at_k",
]


# --8<-- [start:pooling]
def mean_pool(
    hidden_states: Float[Tensor, "B T C"], attention_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B C"]:
    r"""只对真实 token 取平均。

    $$
    e_b=\frac{\sum_ta_{b,t}\,h_{b,t}}{\sum_ta_{b,t}}
    $$

    注意：填充处的状态不是 0，必须挡掉；分母是真实 token 数，不是 $T$。整行都是填充时得到 NaN。

    Args:
        hidden_states: 最后一层的隐藏状态。
        attention_mask: 真实 token 为 `True`，左填充、右填充都可以。

    Returns:
        每条序列一个向量，没有归一化。
    """
    kept = hidden_states.masked_fill(~attention_mask.unsqueeze(-1), 0.0)  # 填充处即使是 NaN 也不泄漏
    return kept.sum(dim=1) / attention_mask.sum(dim=1, keepdim=True)


def last_token_pool(
    hidden_states: Float[Tensor, "B T C"], attention_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, "B C"]:
    """取每条序列最后一个真实 token 的状态。

    注意：右填充时它不在下标 -1，左填充时它不在「长度减一」；从掩码里找才两边都对。

    Args:
        hidden_states: 最后一层的隐藏状态。
        attention_mask: 真实 token 为 `True`，每行至少一个。

    Returns:
        每条序列一个向量，没有归一化。
    """
    positions = torch.arange(attention_mask.shape[1], device=attention_mask.device)
    last = positions.masked_fill(~attention_mask, -1).amax(dim=1)  # (B,)
    if (last < 0).any():
        raise ValueError("有一行全是填充，没有最后一个 token；请去掉空文本，或至少放一个 EOS。")
    return hidden_states[torch.arange(len(last), device=last.device), last]


# --8<-- [end:pooling]
# --8<-- [start:info-nce]
def cosine_matrix(queries: Float[Tensor, "B C"], documents: Float[Tensor, "N C"]) -> Float[Tensor, "B N"]:
    """两两余弦。

    Args:
        queries: 行。
        documents: 列。

    Returns:
        第 i 行第 j 列是两者的余弦。
    """
    return normalize(queries, dim=-1) @ normalize(documents, dim=-1).T


def info_nce(
    queries: Float[Tensor, "B C"],
    documents: Float[Tensor, "N C"],
    *,
    temperature: float = 0.05,
    negative_mask: Bool[Tensor, "B N"] | None = None,
) -> Float[Tensor, ""]:
    r"""批内负例的对比损失：把「第几篇是正例」当作 $N$ 类分类。

    $$
    \mathcal L=-\frac1B\sum_i\log\frac{e^{s_{ii}/\tau}}{\sum_{j}e^{s_{ij}/\tau}},\qquad s_{ij}=\cos(q_i,d_j)
    $$

    注意：先归一化，再除以 $\tau$。

    Args:
        queries: 查询向量，不必归一化。
        documents: 前 $B$ 篇按序是正例，其余是难负例。
        temperature: 温度 $\tau$。
        negative_mask: `False` 的负例不进分母；正例总在分母里。`None` 表示都算。

    Returns:
        标量（奈特）。
    """
    if not temperature > 0:
        raise ValueError(f"temperature 是 {temperature}，应大于 0：除以它才是放大差距。")
    logits = cosine_matrix(queries, documents) / temperature  # (B, N)
    labels = torch.arange(len(queries), device=queries.device)
    if negative_mask is not None:
        positive = torch.arange(len(documents), device=queries.device) == labels[:, None]
        logits = logits.masked_fill(~(negative_mask | positive), float("-inf"))
    return cross_entropy(logits, labels)


# --8<-- [end:info-nce]
# --8<-- [start:variants]
def symmetric_info_nce(
    queries: Float[Tensor, "B C"], documents: Float[Tensor, "B C"], *, temperature: float = 0.05
) -> Float[Tensor, ""]:
    """查询找文档、文档找查询，两个方向各算一次再平均。

    Args:
        queries: 查询向量。
        documents: 同序的正例。
        temperature: 温度。

    Returns:
        标量；两个方向的 softmax 沿不同的轴，不能把相似度矩阵先平均再算一次。
    """
    forward = info_nce(queries, documents, temperature=temperature)
    return 0.5 * (forward + info_nce(documents, queries, temperature=temperature))


def likely_negatives(
    queries: Float[Tensor, "B C"], documents: Float[Tensor, "N C"], *, margin: float = 0.1
) -> Bool[Tensor, "B N"]:
    r"""比正例还像、超出间隔的「负例」多半是漏标的正例：标成 `False`。

    $$
    m_{ij}=\mathbf 1[s_{ij}\le s_{ii}+\text{margin}]
    $$

    Args:
        queries: 查询向量。
        documents: 前 $B$ 篇按序是正例。
        margin: 余弦的间隔；Qwen3-Embedding 取 0.1。

    Returns:
        交给 `info_nce` 的 `negative_mask`。
    """
    similarities = cosine_matrix(queries, documents)
    return similarities <= similarities.diagonal().unsqueeze(-1) + margin


def matryoshka_info_nce(
    queries: Float[Tensor, "B C"],
    documents: Float[Tensor, "N C"],
    *,
    dims: tuple[int, ...],
    temperature: float = 0.05,
) -> Float[Tensor, ""]:
    r"""套娃损失：每个前缀长度各算一次，相加；每个前缀各自归一化。

    $$
    \sum_{m\in\text{dims}}\mathcal L\big(q_{1:m},\,d_{1:m}\big)
    $$

    Args:
        queries: 查询向量。
        documents: 文档向量。
        dims: 要保留的前缀维数，都不超过 `C`。
        temperature: 温度。

    Returns:
        标量，权重都是 1。
    """
    if not all(0 < dim <= queries.shape[-1] for dim in dims):
        raise ValueError(f"dims={dims} 里有的不在 1 到 {queries.shape[-1]} 之间；前缀不能比向量长。")
    losses = [info_nce(queries[:, :dim], documents[:, :dim], temperature=temperature) for dim in dims]
    return torch.stack(losses).sum()


# --8<-- [end:variants]
# --8<-- [start:geometry]
def mean_cosine(embeddings: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
    r"""不同两条之间的平均余弦，衡量各向异性；方向均匀时期望为 0。

    $$
    \frac1{N(N-1)}\sum_{i\ne j}\cos(e_i,e_j)
    $$

    Args:
        embeddings: 互不相干的文本的向量，至少两条。

    Returns:
        标量。
    """
    similarities, count = cosine_matrix(embeddings, embeddings), len(embeddings)
    return (similarities.sum() - similarities.trace()) / (count * (count - 1))


def alignment(queries: Float[Tensor, "B C"], documents: Float[Tensor, "B C"]) -> Float[Tensor, ""]:
    r"""正例对在球面上的平方距离，$\mathbb E\lVert q-d\rVert^2=2-2\,\mathbb E\cos$。

    Args:
        queries: 查询向量。
        documents: 同序的正例。

    Returns:
        标量，越小越齐。
    """
    return (normalize(queries, dim=-1) - normalize(documents, dim=-1)).square().sum(dim=-1).mean()


def uniformity(embeddings: Float[Tensor, "N C"]) -> Float[Tensor, ""]:
    r"""不同两条的高斯势的对数，$\log\mathbb E\,e^{-2\lVert x-y\rVert^2}$。

    Args:
        embeddings: 互不相干的文本的向量，至少两条。

    Returns:
        标量，越小越散；都重合时是 0。
    """
    squared_distances = torch.pdist(normalize(embeddings, dim=-1)).square()
    return (-2 * squared_distances).exp().mean().log()


# --8<-- [end:geometry]
def recall_at_k(
    queries: Float[Tensor, "B C"], documents: Float[Tensor, "N C"], *, k: int = 1
) -> Float[Tensor, ""]:
    """余弦最大的 k 篇里有正例的查询占多少。

    Args:
        queries: 查询向量。
        documents: 前 $B$ 篇按序是正例。
        k: 取几篇。

    Returns:
        0 与 1 之间的标量；并列按 `topk` 的顺序。
    """
    top = cosine_matrix(queries, documents).topk(k, dim=-1).indices  # (B, k)
    hits = top == torch.arange(len(queries), device=queries.device)[:, None]
    return hits.any(dim=-1).double().mean().to(queries.dtype)
