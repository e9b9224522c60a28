r"""算法地图用到的两样东西：GSPO 的整条比值与损失，以及「每个 token 分到多大权重」。

页面：docs/rl/rlhf.md

不包含：别的算法，各在自己的文件里：PPO、GRPO、RLOO、ReMax、REINFORCE++、DAPO、Dr. GRPO、GPG，CISPO 在 clip.py。
数据类型：对数概率与优势用 float32 或 float64，输入什么精度就用什么精度算。

GSPO 的比值是逐 token 比值的几何平均 $s_i=\big(\prod_t\rho_{i,t}\big)^{1/\lvert y_i\rvert}$，在对数里就是算术平均。
它不是整条的重要性比值（那是乘积，不开方），也不是逐 token 比值的算术平均。裁剪对象是 $s_i$：一出界，整条回答都没有梯度。

References:
    GSPO，https://arxiv.org/abs/2507.18071 ：目标式 5，优势式 6，比值式 7，梯度式 10，逐 token 写法式 13、14。
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.log_probs import sequence_log_probs
from snippets.rl.masking import aggregate_loss

__all__ = ["log_sequence_ratio", "gspo_loss", "policy_weights"]


# --8<-- [start:gspo]
def log_sequence_ratio(
    log_probs: Float[Tensor, "B T"], old_log_probs: Float[Tensor, "B T"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    r"""GSPO 整条比值的对数：逐 token 对数比值的平均。

    $$\log s_i=\frac1{\lvert y_i\rvert}\sum_t\log\frac{\pi_\theta(y_{i,t})}{\pi_{\text{old}}(y_{i,t})}$$

    注意：分母是这条回答自己的 token 数。不除就是 RLOO（TRL）用的乘积，长回答一步就出界。

    Args:
        log_probs: 当前策略的逐 token 对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给的对数概率。
        loss_mask: 真表示回答里的 token；整行为假时结果是 0。

    Returns:
        每条回答一个 $\log s_i$。

    References:
        式 7。
    """
    logps = sequence_log_probs(log_probs, loss_mask)
    old_logps = sequence_log_probs(old_log_probs, loss_mask).detach()
    return (logps - old_logps) / loss_mask.sum(dim=1).clamp(min=1)


def gspo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float = 3e-4,
    clip_high: float = 4e-4,
) -> Float[Tensor, ""]:
    r"""GSPO 的损失：对整条比值裁剪，一条回答一票。

    $$\mathcal L=-\frac1B\sum_i\min\big(s_i\hat A_i,\ \operatorname{clip}(s_i,1-\epsilon_{\text{low}},1+\epsilon_{\text{high}})\hat A_i\big)$$

    注意：宽度比逐 token 的 0.2 小近三个数量级，不能混用。

    Args:
        log_probs: 当前策略的逐 token 对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给的对数概率。
        advantages: 每条回答一个优势，来自 `group_advantages`。
        loss_mask: 真表示回答里的 token；整行为假的不算一条。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$，论文 §5.1。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$，论文 §5.1。

    Returns:
        标量损失。

    References:
        式 5。TRL 1.16 `importance_sampling_level="sequence"`、`loss_type="grpo"` 一致；verl 0.9.1 `gspo` 用式 13、14。
    """
    log_ratio = log_sequence_ratio(log_probs, old_log_probs, loss_mask)[:, None]  # (B, 1)
    losses = clipped_surrogate_loss(
        log_ratio, torch.zeros_like(log_ratio), advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )
    return aggregate_loss(losses.expand(loss_mask.shape), loss_mask, mode="seq-mean-token-mean")


# --8<-- [end:gspo]


# --8<-- [start:policy_weights]
def policy_weights(loss: Float[Tensor, ""], log_probs: Float[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r"""每个 token 的权重：更新方向写成 $\sum_{i,t}w_{i,t}\nabla_\theta\log\pi_\theta(y_{i,t})$ 时的 $w$。

    $$w_{i,t}=-\frac{\partial\mathcal L}{\partial\log\pi_\theta(y_{i,t})}$$

    注意：正的把这个 token 推高。损失里若还有不经过 `log_probs` 的项（熵、价值），不在里面。

    Args:
        loss: 由 `log_probs` 算出的标量损失。
        log_probs: 当前策略的逐 token 对数概率，要求梯度。

    Returns:
        权重，不带梯度；损失与某个 token 无关时是 0。

    References:
        链式法则，由页面的推导第一步给出。
    """
    (grad,) = torch.autograd.grad(loss, log_probs, retain_graph=True)
    return -grad


# --8<-- [end:policy_weights]
