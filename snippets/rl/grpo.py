r"""GRPO：组内归一化的优势，以及裁剪代理损失加 KL、按条平均的完整损失。

页面：docs/rl/grpo.md

不包含：采样与打分、过程监督版的优势、动态采样等改进（各有页面）、参考策略的定期更新。
数据类型：奖励与对数概率用 float32 或 float64，输入什么精度就用什么精度算。

约定：$B=P\cdot G$ 行，同一个提示的 $G$ 条回答必须相邻（第 $gG$ 到 $gG+G-1$ 行是第 $g$ 组）。

References:
    DeepSeekMath §4.1 式 3、式 4 与 §4.1.2，https://arxiv.org/abs/2402.03300
    DeepSeek-R1 式 1 至 3（同一目标，印的是整条回答的比值），https://arxiv.org/abs/2501.12948
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.kl_estimators import kl_k3
from snippets.rl.masking import aggregate_loss

__all__ = ["group_advantages", "grpo_loss"]


# --8<-- [start:group_advantages]
def group_advantages(
    rewards: Float[Tensor, " B"], *, group_size: int, eps: float = 1e-6, scale_by_std: bool = True
) -> Float[Tensor, " B"]:
    r"""组内归一化的优势：减去组均值，再除以组标准差。

    $$\hat A_i=\frac{r_i-\operatorname{mean}(r_1,\dots,r_G)}{\operatorname{std}(r_1,\dots,r_G)+\varepsilon}$$

    注意：std 是样本标准差（除以 $G-1$），论文没有写明是哪一种；同组的行必须相邻。全组同分时优势为 0。

    Args:
        rewards: 每条回答一个标量奖励，按组相邻排列。
        group_size: 每个提示的回答数 $G$，至少为 2。
        eps: 加在标准差上的 $\varepsilon$，与奖励同单位；论文没有这一项。
        scale_by_std: 为假时只减均值，即 Dr. GRPO 的优势。

    Returns:
        每条回答一个优势；使用时广播到它的每个 token。

    References:
        verl 0.9.1 `compute_grpo_outcome_advantage`（1e-6）；TRL 1.16（1e-4）与 OpenRLHF 0.11.2（1e-9）只差 $\varepsilon$。
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}：只有一条回答时没有组可比，至少要 2。")
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} 行不能分成每组 {group_size} 条，请检查排列与补齐。")
    groups = rewards.view(-1, group_size)  # (P, G)
    advantages = groups - groups.mean(dim=1, keepdim=True)
    if scale_by_std:
        advantages = advantages / (groups.std(dim=1, keepdim=True) + eps)
    return advantages.flatten()  # (B)


# --8<-- [end:group_advantages]


# --8<-- [start:grpo_loss]
def grpo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"] | None,
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.04,
) -> Float[Tensor, ""]:
    r"""GRPO 的损失：裁剪代理损失加 $\beta k_3$，每条先对 token 平均，再对回答平均。

    $$
    \mathcal L=\frac1B\sum_i\frac1{\lvert o_i\rvert}\sum_t\Big[-\min\big(\rho\hat A,\
    \operatorname{clip}(\rho,1-\epsilon_{\text{low}},1+\epsilon_{\text{high}})\hat A\big)+\beta k_3\Big]
    $$

    注意：KL 是损失里单独一项，不进奖励，也不进优势。

    Args:
        log_probs: 当前策略对已采样 token 的对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给的对数概率，不带梯度。
        ref_log_probs: 参考策略给的对数概率；`beta=0` 时可为 None。
        advantages: 每条回答一个优势，来自 `group_advantages`。
        loss_mask: 真表示回答里的 token；提示与填充为假。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$；论文没有给数值，0.2 是各库的默认值。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。
        beta: KL 系数 $\beta$；DeepSeekMath 取 0.04。

    Returns:
        标量损失，越小越好（目标函数的相反数）。

    References:
        DeepSeekMath 式 3。TRL 1.16 `loss_type="grpo"`，`use_bias_correction_kl=False` 时一致；默认还给 KL 乘 $\rho$。
    """
    token_losses = clipped_surrogate_loss(
        log_probs, old_log_probs, advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )
    if beta != 0:
        if ref_log_probs is None:
            raise ValueError(f"beta={beta} 需要 ref_log_probs；不要 KL 就传 beta=0。")
        token_losses = token_losses + beta * kl_k3(log_probs, ref_log_probs)
    return aggregate_loss(token_losses, loss_mask, mode="seq-mean-token-mean")


# --8<-- [end:grpo_loss]
