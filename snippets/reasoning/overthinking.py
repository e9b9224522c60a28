r"""过度思考：结果效率 $\xi_O$，以及三种把长度写进奖励的办法（Kimi k1.5、L1 的 LCPO、余弦奖励）。

页面：docs/reasoning/overthinking.md

不包含：判对错（见 rule_based_reward）、把一条回答切成多个「解」的分段器、优势与损失（见 snippets/rl）、DAPO 的软超长惩罚（见 snippets/rl/dapo.py）。
数据类型：长度用浮点张量传入，单位是 token；输入什么精度就用什么精度算。

组内归一化的后果：全对的组里奖励是 $1+w\lambda_i$，减均值再除标准差，$w$ 上下相消，优势等于 $-(\ell_i-\bar\ell)/\operatorname{std}(\ell)$；
全错的组里奖励是 $w\min(0,\lambda_i)$，$w$ 同样相消。所以这里的奖励要与「除不除标准差」一起设计。

References:
    结果效率：2412.21187 式 1，https://arxiv.org/abs/2412.21187
    Kimi k1.5 §2.3.3，https://arxiv.org/abs/2501.12599
    L1（LCPO）式 1、式 2，https://arxiv.org/abs/2503.04697
    余弦奖励：2502.03373 §4.2、附录 C.1 式 1，https://arxiv.org/abs/2502.03373
"""

import math
from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["outcome_efficiency", "kimi_length_reward", "lcpo_exact", "lcpo_max", "cosine_length_reward"]


# --8<-- [start:outcome_efficiency]
def outcome_efficiency(
    solution_lengths: Sequence[Sequence[int]], solution_correct: Sequence[Sequence[bool]]
) -> float:
    r"""结果效率：到第一个正确的解为止的 token 占整条回答的比例，对题目取平均。

    $$\xi_O=\frac1N\sum_i\sigma_i\frac{\hat T_i}{T_i}$$

    注意：$\sigma_i$ 看的是「出现过正确的解」，不看最后交的答案；一个解也没对记 0。

    Args:
        solution_lengths: 每道题一列，回答里各个解的 token 数，按出现次序。
        solution_correct: 与上面同形，各个解的答案对不对。

    Returns:
        0 到 1 之间的数。

    References:
        2412.21187 式 1。
    """
    if not solution_lengths:
        raise ValueError("一道题也没有，比例没有定义；请至少传入一条回答。")
    total = 0.0
    for lengths, correct in zip(solution_lengths, solution_correct, strict=True):
        if len(lengths) != len(correct) or sum(lengths) <= 0:
            raise ValueError(f"解的长度 {list(lengths)} 与对错 {list(correct)} 必须等长，且总长大于 0。")
        if any(correct):
            total += sum(lengths[: list(correct).index(True) + 1]) / sum(lengths)
    return total / len(solution_lengths)


# --8<-- [end:outcome_efficiency]


# --8<-- [start:kimi_length_reward]
def kimi_length_reward(
    lengths: Float[Tensor, " B"], correct: Bool[Tensor, " B"], *, group_size: int
) -> Float[Tensor, " B"]:
    r"""k1.5 的组内长度奖励，乘权重 $w$ 之后加到对错奖励上。

    $$\lambda_i=0.5-\frac{\ell_i-\min\ell}{\max\ell-\min\ell}$$

    答对得 $\lambda_i$，答错得 $\min(0,\lambda_i)$，全组等长得 0。

    注意：最短与最长取自整组，不只答对的；答错的短回答不加分，长的照扣。

    Args:
        lengths: 回答的 token 数，同组相邻。
        correct: 答案对不对。
        group_size: 每个提示的回答数 $G$。

    Returns:
        每条回答一个数，在 -0.5 与 0.5 之间，未乘权重。

    References:
        2501.12599 §2.3.3；与 open-r1 `len_reward` 同式，后者数的是字符。
    """
    if group_size < 1 or len(lengths) % group_size:
        raise ValueError(f"{len(lengths)} 行不能分成每组 {group_size} 条，请检查排列与补齐。")
    groups = lengths.view(-1, group_size)  # (P, G)
    shortest = groups.min(dim=1, keepdim=True).values
    spread = groups.max(dim=1, keepdim=True).values - shortest
    same = spread == 0
    lam = 0.5 - (groups - shortest) / spread.masked_fill(same, 1.0)
    lam = torch.where(correct.view_as(groups), lam, lam.clamp(max=0.0))
    return lam.masked_fill(same, 0.0).flatten()  # (B)


# --8<-- [end:kimi_length_reward]


# --8<-- [start:lcpo]
def lcpo_exact(
    lengths: Float[Tensor, " B"],
    correct: Bool[Tensor, " B"],
    target_lengths: Float[Tensor, " B"],
    *,
    alpha: float = 0.0003,
) -> Float[Tensor, " B"]:
    r"""L1-Exact：对错减去与目标长度的偏差，$\mathbf 1[\text{对}]-\alpha\lvert n_{\text{gold}}-n_y\rvert$。

    注意：答错也扣偏差，答错而长度正好得 0。

    Args:
        lengths: 回答的 token 数 $n_y$。
        correct: 答案对不对。
        target_lengths: 提示里要求的 token 数 $n_{\text{gold}}$。
        alpha: 每偏一个 token 扣多少；论文 0.0003。

    Returns:
        每条回答的总奖励（已含对错）。

    References:
        2503.04697 式 1。
    """
    return correct.to(lengths.dtype) - alpha * (target_lengths - lengths).abs()


def lcpo_max(
    lengths: Float[Tensor, " B"],
    correct: Bool[Tensor, " B"],
    target_lengths: Float[Tensor, " B"],
    *,
    alpha: float = 0.0003,
    delta: float = 0.5,
) -> Float[Tensor, " B"]:
    r"""L1-Max：$\mathbf 1[\text{对}]\cdot\operatorname{clip}(\alpha(n_{\text{gold}}-n_y)+\delta,0,1)$。

    注意：相乘，所以答错恒为 0；正好用满预算只得 $\delta$。

    Args:
        lengths: 回答的 token 数 $n_y$。
        correct: 答案对不对。
        target_lengths: 预算 $n_{\text{gold}}$，token 数。
        alpha: 斜率，每 token；论文 0.0003。
        delta: 正好用满预算时的得分；论文 0.5。

    Returns:
        每条回答的总奖励（已含对错）。

    References:
        2503.04697 式 2。
    """
    return correct.to(lengths.dtype) * (alpha * (target_lengths - lengths) + delta).clamp(0.0, 1.0)


# --8<-- [end:lcpo]


# --8<-- [start:cosine_length_reward]
def cosine_length_reward(
    lengths: Float[Tensor, " B"],
    correct: Bool[Tensor, " B"],
    *,
    max_length: int,
    correct_short: float = 1.0,
    correct_long: float = 0.5,
    wrong_short: float = -1.0,
    wrong_long: float = -0.5,
    exceed: float | None = None,
) -> Float[Tensor, " B"]:
    r"""余弦奖励：长度从 0 到上限，奖励沿半个余弦从「短」的值走到「长」的值。

    $$r=v_{\text{long}}+\tfrac12(v_{\text{short}}-v_{\text{long}})\big(1+\cos\tfrac{\pi\ell}{L_{\max}}\big)$$

    注意：答错时越长扣得越少；超过上限要先截断，否则余弦会折返。

    Args:
        lengths: 回答的 token 数。
        correct: 答案对不对。
        max_length: $L_{\max}$，token 数。
        correct_short: 答对、长度 0 的奖励；默认值同 TRL。
        correct_long: 答对、长度到上限的奖励。
        wrong_short: 答错、长度 0 的奖励。
        wrong_long: 答错、长度到上限的奖励。
        exceed: 到上限的另给这个值（论文的 $r_e$）；TRL 没有这一支。

    Returns:
        每条回答的总奖励（已含对错）。

    References:
        2502.03373 附录 C.1 式 1；TRL 1.16 `get_cosine_scaled_reward`。
    """
    if max_length <= 0:
        raise ValueError(f"max_length={max_length}：上限要大于 0，否则进度没有定义。")
    wave = 0.5 * (1 + torch.cos(math.pi * (lengths / max_length).clamp(max=1.0)))
    right = correct_long + (correct_short - correct_long) * wave
    wrong = wrong_long + (wrong_short - wrong_long) * wave
    rewards = torch.where(correct, right, wrong)
    return rewards if exceed is None else rewards.masked_fill(lengths >= max_length, exceed)


# --8<-- [end:cosine_length_reward]
