r"""GRPO 策略损失的数值：第一步恰好是多少，多步之后最低能到多少（不含 KL 项）。

页面：docs/rl/grpo-loss-sign.md

不包含：KL 项（$k_3\ge0$，只会把损失往上抬）、梯度、跨微批与跨卡的分母（见 snippets/training/loss_averaging.py）。
数据类型：输入什么精度就用什么精度算。

记号：$n_i$ 是第 $i$ 条回答计入损失的 token 数，$B'$ 是 $n_i>0$ 的条数，$L_{\max}$ 是常数（生成长度上限）。
优势逐条一个数，聚合又是线性的，所以一条回答只通过它的总权重 $w_i$ 起作用：

$$
\begin{aligned}
\text{token-mean}&:\ w_i=n_i/\textstyle\sum_jn_j\\
\text{seq-mean-token-mean}&:\ w_i=1/B'\\
\text{seq-mean-token-sum}&:\ w_i=n_i/B'\\
\text{seq-mean-token-sum-norm}&:\ w_i=n_i/(B'L_{\max})
\end{aligned}
$$

下界的来历（逐 token）：$\hat A>0$ 时 $\min(\rho\hat A,\operatorname{clip}(\rho)\hat A)\le(1+\epsilon_{\text{high}})\hat A$；
$\hat A<0$ 时它等于 $-\max(\rho,\operatorname{clip}(\rho))\lvert\hat A\rvert\le-\max(1-\epsilon_{\text{low}},0)\lvert\hat A\rvert$，
后一个 max 是因为 $\rho>0$。乘 $-w_i$ 求和就是 `policy_loss_lower_bound`。反方向没有界：$\hat A<0$、$\rho\to\infty$。

References:
    DeepSeekMath 式 3（按条平均），https://arxiv.org/abs/2402.03300
    DAPO 式 8（token 平均），https://arxiv.org/abs/2503.14476
    四种方式的名字取自 verl 0.9.1 `agg_loss`。
"""

from jaxtyping import Float, Int
from torch import Tensor

from snippets.rl.masking import AGGREGATION_MODES

__all__ = ["first_step_policy_loss", "policy_loss_lower_bound"]


# --8<-- [start:sequence_weights]
def _weighted_advantages(
    advantages: Float[Tensor, " B"], lengths: Int[Tensor, " B"], mode: str, max_response_length: int | None
) -> Float[Tensor, " B"]:
    """每条回答的总权重乘它的优势。"""
    if mode not in AGGREGATION_MODES:
        raise ValueError(f"不认识的聚合方式 mode={mode!r}，可用的有：{'、'.join(AGGREGATION_MODES)}。")
    num_sequences = (lengths > 0).sum()
    if mode == "token-mean":
        return advantages * lengths / lengths.sum()
    if mode == "seq-mean-token-mean":
        return advantages * (lengths > 0) / num_sequences
    if mode == "seq-mean-token-sum":
        return advantages * lengths / num_sequences
    if max_response_length is None or max_response_length < 1:
        raise ValueError(f"max_response_length={max_response_length}：请传生成长度上限，一个正的常数。")
    return advantages * lengths / (num_sequences * max_response_length)


# --8<-- [end:sequence_weights]


# --8<-- [start:first_step_policy_loss]
def first_step_policy_loss(
    advantages: Float[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    *,
    mode: str,
    max_response_length: int | None = None,
) -> Float[Tensor, ""]:
    r"""第一步（$\rho=1$）策略损失的值：加权平均优势的相反数。

    $$\mathcal L_{\text{pol}}=-\sum_iw_i\hat A_i$$

    注意：值为 0 不等于梯度为 0；这里只有数值。

    Args:
        advantages: 每条回答一个优势。
        lengths: 每条回答计入损失的 token 数；0 表示整条被遮住。
        mode: 聚合方式，同 `aggregate_loss`。
        max_response_length: 常数 $L_{\max}$，只有 "seq-mean-token-sum-norm" 用到。

    Returns:
        标量。

    References:
        TRL 1.16 的 "dapo"、"bnpo" 是 "token-mean"；"grpo"、"dr_grpo" 用全部行数代替 $B'$。
    """
    return -_weighted_advantages(advantages, lengths, mode, max_response_length).sum()


# --8<-- [end:first_step_policy_loss]


# --8<-- [start:policy_loss_lower_bound]
def policy_loss_lower_bound(
    advantages: Float[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    mode: str,
    max_response_length: int | None = None,
) -> Float[Tensor, ""]:
    r"""比值任意变化时，裁剪代理损失的下确界。

    $$\mathcal L_{\text{pol}}\ge\max(1-\epsilon_{\text{low}},0)\,A^--(1+\epsilon_{\text{high}})\,A^+$$

    $A^+$、$A^-$ 是 $w_i\lvert\hat A_i\rvert$ 在正、负优势上的和。

    注意：两者相等时才化成 $-\frac{\epsilon_{\text{low}}+\epsilon_{\text{high}}}2\sum_iw_i\lvert\hat A_i\rvert$
    （$\epsilon_{\text{low}}\le1$）。没有上界。

    Args:
        advantages: 每条回答一个优势。
        lengths: 每条回答计入损失的 token 数。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。
        mode: 聚合方式，同 `aggregate_loss`。
        max_response_length: 常数 $L_{\max}$，只有 "seq-mean-token-sum-norm" 用到。

    Returns:
        标量；每个 token 的比值都能自由取值时取得到（$\epsilon_{\text{low}}\ge1$ 时只能逼近）。

    References:
        由 PPO 式 7 逐 token 取下界推出，https://arxiv.org/abs/1707.06347 。
    """
    if clip_low < 0 or clip_high < 0:
        raise ValueError(f"裁剪宽度不能为负：clip_low={clip_low}，clip_high={clip_high}。")
    weighted = _weighted_advantages(advantages, lengths, mode, max_response_length)
    positive, negative = weighted.clamp(min=0).sum(), -weighted.clamp(max=0).sum()
    return max(1 - clip_low, 0.0) * negative - (1 + clip_high) * positive


# --8<-- [end:policy_loss_lower_bound]
