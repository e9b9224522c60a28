r"""Dr. GRPO（GRPO Done Right）：GRPO 的损失去掉两处除法，外加「除以标准差」等于给每道题乘多大权重。

页面：docs/rl/dr-grpo.md

不包含：采样与打分、KL 项（论文取 $\beta=0$）、跨微批与跨卡的分母（分母是常数，各微批条数相同时直接平均即可）。
数据类型：输入什么精度就用什么精度算，不静默转换。

两处改动：优势 $\tilde A_i=r_i-\bar r$ 不再除以组标准差；token 损失求和，除以常数 $L_{\max}$，不再除以 $\lvert o_i\rvert$。
组大小为 $G$、$\rho=1$ 时，组均值可以拆成配对：$r_i-\bar r=\frac1G\sum_j(r_i-r_j)$。同组回答独立同分布，于是
$\mathbb E\big[\frac1G\sum_i\tilde A_i f_i s_i\big]=\frac{G-1}G\,\mathbb E[(R-J)\,f\,s]$，其中 $s=\nabla_\theta\log\pi_\theta(o)$，
$f$ 是这条回答的长度权重，$J=\mathbb E[R]$。$f$ 取常数得到 $\frac{G-1}{G}f\,\nabla J$；$f=1/\lvert o\rvert$ 得到的是
$\frac{G-1}G\nabla\mathbb E\big[\frac{R-J}{\lvert o\rvert}\big]$（求导时 $J$ 当常数），不再与 $\nabla J$ 平行。

References:
    Dr. GRPO v2，式 3、§3.2、清单 1、附录 A，https://arxiv.org/abs/2503.20783
    作者的实现：sail-sg/understand-r1-zero `train_zero_math.py`（提交 dfca49d）与 sail-sg/oat `oat/utils/ops.py`（提交 c1a074c）
"""

import math

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss

__all__ = ["dr_grpo_loss", "question_weight"]


# --8<-- [start:dr_grpo_loss]
def dr_grpo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    group_size: int,
    max_response_length: int,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, ""]:
    r"""Dr. GRPO 的损失：优势只减组均值，token 求和后除以常数。

    $$
    \mathcal L=-\frac1{B\,L_{\max}}\sum_{i,t}\min\big(\rho\tilde A_i,\
    \operatorname{clip}(\rho)\tilde A_i\big),\qquad\tilde A_i=r_i-\bar r
    $$

    注意：收的是奖励，两处改动不会只做一半；$L_{\max}$ 整个训练不变。

    Args:
        log_probs: 当前策略的逐 token 对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给的对数概率，不带梯度。
        rewards: 每条回答一个标量奖励，同组相邻。
        loss_mask: 真表示回答里的 token。
        group_size: 每个提示的回答数 $G$。
        max_response_length: 常数 $L_{\max}$（token 数），取生成长度上限；论文是 3000。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$；论文上下都是 0.2（表 6）。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。

    Returns:
        标量损失。

    References:
        2503.20783 §3.2、清单 1。TRL 1.16 要两个开关：`loss_type="dr_grpo"` 与 `scale_rewards="none"`。
    """
    advantages = group_advantages(rewards, group_size=group_size, scale_by_std=False)
    token_losses = clipped_surrogate_loss(
        log_probs, old_log_probs, advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )
    return aggregate_loss(
        token_losses, loss_mask, mode="seq-mean-token-sum-norm", max_response_length=max_response_length
    )


# --8<-- [end:dr_grpo_loss]


# --8<-- [start:question_weight]
def question_weight(success_rates: Float[Tensor, " P"], *, group_size: int) -> Float[Tensor, " P"]:
    r"""0/1 奖励下，除以组标准差相当于给正确率为 $p$ 的题乘多大的权重。

    $$
    w_G(p)=\frac{G-1}{G}\,\mathbb E_{M}\Big[\frac1{\sigma_{M+1}}\Big],\qquad
    \sigma_k=\sqrt{\frac{k(G-k)}{G(G-1)}}
    $$

    其中 $M\sim\operatorname{Bin}(G-2,p)$；不除标准差时权重恒为 $\frac{G-1}{G}$。

    注意：是相对真实梯度 $\nabla p$ 的权重，全对全错的组已算在内；只对 0/1 奖励成立。

    Args:
        success_rates: 每道题的正确率 $p$，在 0 与 1 之间。
        group_size: 每个提示的回答数 $G$。

    Returns:
        每道题的权重 $w_G(p)$。

    References:
        由 2503.20783 式 3 的优势取期望推出；$\sigma_k$ 是样本标准差，与 `group_advantages` 相同（这里没有 $\varepsilon$）。
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}：一组至少要 2 条回答才有标准差。")
    num_others = group_size - 2  # 先取一对一错的两条，其余的 G-2 条独立
    weights = torch.zeros_like(success_rates)
    for m in range(num_others + 1):
        pmf = float(math.comb(num_others, m)) * success_rates**m * (1 - success_rates) ** (num_others - m)
        sigma = math.sqrt((m + 1) * (group_size - m - 1) / (group_size * (group_size - 1)))
        weights = weights + pmf / sigma
    return (group_size - 1) / group_size * weights  # (P)


# --8<-- [end:question_weight]
