r"""带掩码的平均，以及把逐 token 损失 `(B, T)` 聚合成一个标量的四种方式。

页面：docs/rl/grpo.md

不包含：跨微批、跨卡的全局分母（见 snippets/training/loss_averaging.py），以及逐 token 损失本身。
数据类型：输入什么精度就用什么精度算。被遮住的位置用 `masked_fill` 置零而不是乘 0，那里的 NaN 或 inf 不会传出来。

记号：$m_{i,t}\in\{0,1\}$ 是损失掩码，$n_i=\sum_t m_{i,t}$ 是第 $i$ 条回答计入损失的 token 数，
$B'$ 是 $n_i>0$ 的行数，$L_{\max}$ 是常数（生成长度上限）。

References:
    DeepSeekMath 式 3（每条先平均），https://arxiv.org/abs/2402.03300
    DAPO §3.3 式 12（全部 token 平均），https://arxiv.org/abs/2503.14476
    Dr. GRPO（除以常数），https://arxiv.org/abs/2503.20783
    模式的名字取自 verl 0.9.1 `agg_loss`。
"""

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["AGGREGATION_MODES", "masked_mean", "aggregate_loss"]

AGGREGATION_MODES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm")


def masked_mean(
    values: Float[Tensor, "*B"], mask: Bool[Tensor, "*B"], *, dim: int | None = None
) -> Float[Tensor, "..."]:
    r"""只在掩码为真的位置上求平均。

    $$\frac{\sum_t m_t\,x_t}{\sum_t m_t}$$

    注意：分母是掩码为真的个数，不是该轴的长度；一个真都没有时结果是 NaN。

    Args:
        values: 要平均的值。
        mask: 与 `values` 同形状，真表示计入。
        dim: 沿哪一轴平均；不给就对全部元素平均，返回标量。

    Returns:
        少了 `dim` 这一轴的张量，或标量。

    References:
        verl 0.9.1 `masked_mean` 的分母另加 1e-8；OpenRLHF 0.11.2 `masked_mean` 乘掩码而不是填零。
    """
    return values.masked_fill(~mask, 0.0).sum(dim=dim) / mask.sum(dim=dim)


# --8<-- [start:aggregate_loss]
def aggregate_loss(
    token_losses: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    mode: str,
    max_response_length: int | None = None,
) -> Float[Tensor, ""]:
    r"""把逐 token 损失聚合成标量；四种方式的差别只在每个 token 的权重。

    $$
    \begin{aligned}
    \text{token-mean}&:\ \tfrac{1}{\sum_i n_i}\sum_{i,t}m_{i,t}\ell_{i,t}\\
    \text{seq-mean-token-mean}&:\ \tfrac1{B'}\sum_i\tfrac1{n_i}\sum_t m_{i,t}\ell_{i,t}\\
    \text{seq-mean-token-sum}&:\ \tfrac1{B'}\sum_{i,t}m_{i,t}\ell_{i,t}\\
    \text{seq-mean-token-sum-norm}&:\ \tfrac1{B'L_{\max}}\sum_{i,t}m_{i,t}\ell_{i,t}
    \end{aligned}
    $$

    注意：整行被遮住时贡献 0，也不算进 $B'$；掩码全假时是 NaN。

    Args:
        token_losses: 逐 token 损失 $\ell_{i,t}$。
        loss_mask: 真表示该 token 计入损失。
        mode: 四种方式之一，名字同 verl。
        max_response_length: 常数 $L_{\max}$（token 数），只有 "seq-mean-token-sum-norm" 用到。

    Returns:
        标量损失。

    References:
        verl 0.9.1 `agg_loss`（不传全局分母时一致）。TRL 1.16 的 "grpo"、"dr_grpo" 用全部行数 $B$ 代替 $B'$。
    """
    token_losses = token_losses.masked_fill(~loss_mask, 0.0)
    lengths = loss_mask.sum(dim=1)  # (B)
    num_sequences = (lengths > 0).sum()
    if mode == "token-mean":
        return token_losses.sum() / lengths.sum()
    if mode == "seq-mean-token-mean":
        # 整行被遮住时分子已经是 0，分母取 1 避免 0/0
        return (token_losses.sum(dim=1) / lengths.clamp(min=1)).sum() / num_sequences
    if mode == "seq-mean-token-sum":
        return token_losses.sum() / num_sequences
    if mode == "seq-mean-token-sum-norm":
        if max_response_length is None or max_response_length < 1:
            raise ValueError(
                f"max_response_length={max_response_length}：这个模式要除以一个正的常数，"
                "请传生成长度上限，不要传本批的最大长度（它逐批变化）。"
            )
        return token_losses.sum() / (num_sequences * max_response_length)
    raise ValueError(f"不认识的聚合方式 mode={mode!r}，可用的有：{'、'.join(AGGREGATION_MODES)}。")


# --8<-- [end:aggregate_loss]
