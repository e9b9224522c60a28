r"""多轮对话的 SFT 样本：标签怎么遮、拆成多条与整段一条各给每个 token 多大权重、打包时怎么隔开。

页面：docs/training/multi-turn-sft.md

不包含：对话模板与分词器、损失的分母（见 snippets/training/loss_averaging.py）、装箱算法。

记号：一段对话有 $K$ 个助手轮，第 $k$ 轮有 $n_k$ 个计入损失的 token，$N=\sum_k n_k$。标签与输入同位置，移位在损失里做。

两条约定，都与推理时的分工一致：消息头（`<|im_start|>assistant\n`）由程序写好，不计；正文与结束符由模型生成，要计。
结束符之后的换行推理时轮不到模型生成，这里不计；TRL 1.16 的 Qwen3 训练模板与 verl 把它也计入。

References:
    transformers 5.23.0 `apply_chat_template`、`masking_utils.py`；TRL 1.16.0 `trl/trainer/sft_trainer.py`。
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = [
    "IGNORE_INDEX",
    "Turn",
    "build_labels",
    "split_turns",
    "token_weights",
    "pack_documents",
    "position_ids_from_documents",
    "block_diagonal_causal_mask",
]

IGNORE_INDEX = -100


# --8<-- [start:labels]
class Turn(NamedTuple):
    """一条消息切成三段 token：头由模板写，正文连同结束符是说话的人写的，尾是结束符之后的分隔。"""

    role: str
    header: Sequence[int]
    body: Sequence[int]
    trailer: Sequence[int] = ()


def build_labels(turns: Sequence[Turn], *, train_roles: Sequence[str] = ("assistant",)) -> tuple[list, list]:
    r"""整段对话拼成一条样本：只有 `train_roles` 的正文（含结束符）留标签，其余填 -100。

    注意：工具返回（tool）是环境写的，不训练；标签没有移位。

    Args:
        turns: 按时间排列的消息。
        train_roles: 计入损失的角色。

    Returns:
        等长的输入与标签。

    References:
        TRL 1.16.0 `assistant_only_loss=True` 的 labels，只差尾部的分隔是否计入（由模板决定）。
    """
    input_ids, labels = [], []
    for turn in turns:
        ids = [*turn.header, *turn.body, *turn.trailer]
        kept = turn.body if turn.role in train_roles else [IGNORE_INDEX] * len(turn.body)
        input_ids += ids
        labels += [IGNORE_INDEX] * len(turn.header) + [*kept] + [IGNORE_INDEX] * len(turn.trailer)
    return input_ids, labels


def split_turns(turns: Sequence[Turn], *, mask_history: bool = True) -> list[tuple[list, list]]:
    r"""拆成 $K$ 条样本：第 $k$ 条到第 $k$ 个助手轮为止，历史只作前文。

    注意：`mask_history=False` 是错法，第 $k$ 轮会被训练 $K-k+1$ 次。

    Args:
        turns: 按时间排列的消息。
        mask_history: 遮住前面各轮的标签。

    Returns:
        每条样本的输入与标签；（前文，目标）的集合与 `build_labels` 相同，前提是模板不改写历史。
    """
    samples = []
    for end, turn in enumerate(turns):
        if turn.role == "assistant":
            history_ids, history_labels = build_labels(turns[:end])
            if mask_history:
                history_labels = [IGNORE_INDEX] * len(history_ids)
            ids, labels = build_labels([turn])
            samples.append((history_ids + ids, history_labels + labels))
    return samples


# --8<-- [end:labels]


# --8<-- [start:weights]
def token_weights(
    turn_lengths: Sequence[Sequence[int]], *, construction: str, reduction: str
) -> list[Float[Tensor, " K"]]:
    r"""一批对话里，每一轮的单个 token 在损失里的权重。

    $$w_{b,k}=\sum_{\text{含这一轮的样本 }s}\ \begin{cases}1/\sum_{s'}n_{s'}&\text{token 平均}\\1/(S\,n_s)&\text{按条平均}\end{cases}$$

    $n_s$ 是样本 $s$ 计入损失的 token 数，$S$ 是样本条数。注意：各 token 的权重之和总是 1。

    Args:
        turn_lengths: 每段对话各助手轮计入损失的 token 数。
        construction: "session"（整段一条）、"split"（拆开，遮住历史）、"split-unmasked"（拆开，不遮历史）。
        reduction: "token-mean"（全批 token 平均）或 "sample-mean"（先按条平均）。

    Returns:
        与 `turn_lengths` 对应的权重，每段对话一个张量。
    """
    spans = {  # K 轮的对话变成哪几条样本：每条计入损失的是 [第一轮, 末轮之后)
        "session": lambda K: [(0, K)],
        "split": lambda K: [(k, k + 1) for k in range(K)],
        "split-unmasked": lambda K: [(0, k + 1) for k in range(K)],
    }
    if construction not in spans:
        raise ValueError(f"不认识的构造 construction={construction!r}，可用的有：{'、'.join(spans)}。")
    if reduction not in ("token-mean", "sample-mean"):
        raise ValueError(f"不认识的归一 reduction={reduction!r}，可用的有：token-mean、sample-mean。")
    samples = [
        (b, *span) for b, lengths in enumerate(turn_lengths) for span in spans[construction](len(lengths))
    ]
    counts = [sum(turn_lengths[b][start:end]) for b, start, end in samples]
    weights = [torch.zeros(len(lengths), dtype=torch.float64) for lengths in turn_lengths]
    for (b, start, end), count in zip(samples, counts, strict=True):
        weights[b][start:end] += 1 / sum(counts) if reduction == "token-mean" else 1 / (len(samples) * count)
    return weights


# --8<-- [end:weights]


def pack_documents(
    samples: Sequence[tuple[Sequence[int], Sequence[int]]],
) -> tuple[Int[Tensor, "1 T"], Int[Tensor, "1 T"], Int[Tensor, "1 T"]]:
    r"""把几条样本首尾相接装进一行，并记下每个 token 属于第几条。

    注意：每条的首 token 不能作目标，否则上一条的末 token 会被训练去预测它；这里一律填 -100。

    Args:
        samples: 每条样本的输入与标签（未移位）。

    Returns:
        输入、标签、文档编号，形状都是 (1, T)。

    References:
        TRL 1.16.0 `DataCollatorForLanguageModeling(padding_free=True)`。
    """
    input_ids = [token for ids, _ in samples for token in ids]
    labels = [token for _, kept in samples for token in [IGNORE_INDEX, *kept[1:]]]
    document_ids = [index for index, (ids, _) in enumerate(samples) for _ in ids]
    return torch.tensor([input_ids]), torch.tensor([labels]), torch.tensor([document_ids])


# --8<-- [start:packing]
def position_ids_from_documents(document_ids: Int[Tensor, "B T"]) -> Int[Tensor, "B T"]:
    r"""每条文档从 0 重新数的位置：$t$ 减去本文档第一个 token 的下标。

    注意：同一文档的 token 必须相邻；补齐给一个自己的编号。

    Args:
        document_ids: 每个 token 属于第几条文档。

    Returns:
        位置编号。

    References:
        TRL 1.16.0 `DataCollatorForLanguageModeling(padding_free=True)` 的 `position_ids`。
    """
    index = torch.arange(document_ids.shape[1], device=document_ids.device).expand_as(document_ids)
    starts = torch.ones_like(document_ids, dtype=torch.bool)
    starts[:, 1:] = document_ids[:, 1:] != document_ids[:, :-1]
    return index - (index * starts).cummax(dim=1).values


def block_diagonal_causal_mask(document_ids: Int[Tensor, "B T"]) -> Bool[Tensor, "B T T"]:
    r"""块对角因果掩码：同一文档、且不在未来，才能看。

    $$\text{mask}_{b,t,s}=[\,d_{b,t}=d_{b,s}\,]\wedge[\,s\le t\,]$$

    注意：真表示可以看，同 `F.scaled_dot_product_attention`；用时补一个头的轴。

    Args:
        document_ids: 每个 token 属于第几条文档 $d_{b,t}$。

    Returns:
        掩码，第二轴是查询，第三轴是键。

    References:
        transformers 5.23.0 在 `attention_mask=None` 且位置编号重置时自动生成的 SDPA 掩码。
    """
    same = document_ids[:, :, None] == document_ids[:, None, :]
    return same.tril()


# --8<-- [end:packing]
