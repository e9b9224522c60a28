r"""异策略数据的三种权重（逐 token、前缀积、整条积）、有效样本量，以及解耦的 PPO 损失。

页面：docs/rl/on-off-policy.md

不包含：优势的计算、KL 与熵、聚合成标量的那一步（见 snippets/rl/masking.py）、异步调度本身。
数据类型：float32 或 float64，原样计算，不截断对数比；库里的截断写在各函数的 References。

记号：$\mu$ 是真正采样的策略，$\pi$ 是要改进的策略，$\rho_t=\pi(a_t\mid s_t)/\mu(a_t\mid s_t)$，状态 $s_t$ 就是前缀。
整条积是三段：$\prod_{k<t}\rho_k$ 把状态换成 $\pi$ 走到的，$\rho_t$ 换动作，$\prod_{k>t}\rho_k$ 把后续回报换成 $\pi$ 的。

References:
    TRPO，式 3、4（代理目标与一阶相同）、定理 1，https://arxiv.org/abs/1502.05477
    解耦的 PPO 目标，https://arxiv.org/abs/2110.00641 ；AReaL 式 5，https://arxiv.org/abs/2505.24298
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss

__all__ = [
    "importance_weights",
    "effective_sample_size",
    "truncate_weights",
    "mask_weights",
    "weighted_policy_gradient_loss",
    "decoupled_ppo_loss",
]


# --8<-- [start:importance_weights]
def importance_weights(
    log_probs: Float[Tensor, "B T"],
    rollout_log_probs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    level: str,
) -> Float[Tensor, "B T"]:
    r"""每个 token 的重要性权重，分子是 `log_probs`，分母是采样策略。

    $$w_t=\rho_t\ (\text{token}),\qquad\prod_{k\le t}\rho_k\ (\text{prefix}),\qquad\prod_{k}\rho_k\ (\text{sequence})$$

    注意：权重已切断梯度；只有末尾一个奖励时，三种里只有 sequence 无偏。

    Args:
        log_probs: 目标策略对已采样 token 的对数概率。
        rollout_log_probs: 真正采样的策略 $\mu$ 给的对数概率。
        loss_mask: 真表示策略生成的 token；假的位置不进乘积，权重为 0。
        level: "token"、"prefix" 或 "sequence"。

    Returns:
        权重 `(B, T)`，无单位，不带梯度。

    References:
        verl 0.9.1 `compute_rollout_correction_weights` 的 "token"、"sequence"（先把对数比截到 ±20）；
        TRL 1.16 的 `sequence_*` 模式是同一个乘积，形状 `(B, 1)`。
    """
    log_ratio = (log_probs - rollout_log_probs).detach().masked_fill(~loss_mask, 0.0)
    if level == "prefix":
        log_ratio = log_ratio.cumsum(dim=1)
    elif level == "sequence":
        log_ratio = log_ratio.sum(dim=1, keepdim=True).expand_as(log_ratio)
    elif level != "token":
        raise ValueError(f"不认识的 level={level!r}，可用的有：token、prefix、sequence。")
    return log_ratio.exp().masked_fill(~loss_mask, 0.0)


# --8<-- [end:importance_weights]


def effective_sample_size(weights: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    r"""有效样本量：$N$ 个带权样本相当于多少个等权样本。

    $$\mathrm{ESS}=\frac{\big(\sum_i w_i\big)^2}{\sum_i w_i^2}\in[1,N]$$

    注意：它只看已经采到的权重。$\mu$ 没采到 $\pi$ 喜欢的回答时，权重看起来很均匀，ESS 照样很高。

    Args:
        weights: 每条样本一个非负权重，不全为 0。

    Returns:
        有效样本量（条）。样本很多时，除以 $N$ 趋于 $1/\mathbb E_\mu[w^2]$。

    References:
        verl 0.9.1 的 `rollout_is_eff_sample_size` 是它除以 $N$，权重先截断，并在全部 token 上平均。
    """
    return weights.sum().square() / weights.square().sum()


def truncate_weights(weights: Float[Tensor, "B T"], *, cap: float) -> Float[Tensor, "B T"]:
    r"""截断重要性采样（TIS）：超过上限的权重降到上限，样本留着。

    $$\min(w,\ C)$$

    注意：截断之后有偏，偏差来自被截掉的那部分概率；不设下限，小权重照旧。

    Args:
        weights: 重要性权重。
        cap: 上限 $C$，必须不小于 1，否则同策略的样本也被缩小。

    Returns:
        截断后的权重。

    References:
        verl 0.9.1 `rollout_is_threshold`（默认 2.0；配置文件里 `rollout_is` 默认关）；TRL 1.16 的 `*_truncate` 模式。
    """
    if cap < 1:
        raise ValueError(f"cap={cap}：上限小于 1 时，权重恰为 1 的同策略样本也会被缩小。常用 2。")
    return weights.clamp(max=cap)


def mask_weights(weights: Float[Tensor, "B T"], *, high: float, low: float = 0.0) -> Float[Tensor, "B T"]:
    r"""掩码重要性采样（MIS，IcePop）：区间外的权重变成 0，样本丢掉。

    $$w\,\mathbb 1[C_{\text{low}}\le w\le C_{\text{high}}]$$

    注意：它只把权重变成 0，丢掉的 token 还算不算进平均的分母，由调用者决定。

    Args:
        weights: 重要性权重。
        high: 上界 $C_{\text{high}}$。
        low: 下界 $C_{\text{low}}$；权重非负，默认 0 即不设。

    Returns:
        掩码后的权重。

    References:
        TRL 1.16 的默认模式 `sequence_mask`（`vllm_importance_sampling_clip_max=3.0`，无下界）。
    """
    if high <= low:
        raise ValueError(f"high={high} 不大于 low={low}：区间里最多一个点，样本几乎全被丢掉。")
    return weights.masked_fill((weights < low) | (weights > high), 0.0)


def weighted_policy_gradient_loss(
    log_probs: Float[Tensor, "B T"],
    weights: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
) -> Float[Tensor, "B T"]:
    r"""加权的策略梯度损失（逐 token，不归约）。

    $$\ell_t=-\operatorname{sg}(w_t)\,\hat A_t\,\log\pi_\theta(a_t\mid s_t)$$

    注意：值没有意义，只用梯度。不切断 $w_t$，梯度会多出 $\hat A\log\pi_\theta\,\nabla w_t$。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        weights: 来自 `importance_weights`；在这里再切断一次梯度。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。

    Returns:
        逐 token 的损失。

    References:
        $w_t=\rho_t$ 时，期望梯度是 TRPO 式 3 的代理目标的梯度。
    """
    return -weights.detach() * advantages * log_probs


# --8<-- [start:decoupled_ppo_loss]
def decoupled_ppo_loss(
    log_probs: Float[Tensor, "B T"],
    proximal_log_probs: Float[Tensor, "B T"],
    behavior_weights: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "B T"]:
    r"""解耦的 PPO 损失：裁剪相对近端策略，异策略修正相对采样策略（逐 token，不归约）。

    $$\ell=-\operatorname{sg}\Big(\frac{\pi_{\text{prox}}}{\mu}\Big)\min\big(u\hat A,\ \operatorname{clip}(u)\hat A\big),
    \qquad u=\frac{\pi_\theta}{\pi_{\text{prox}}}$$

    注意：权重的分子是 $\pi_{\text{prox}}$ 而不是 $\pi_\theta$，否则 $u$ 里的 $\pi_\theta$ 被算了两遍。

    Args:
        log_probs: 当前策略 $\pi_\theta$ 的对数概率，带梯度。
        proximal_log_probs: 近端策略：更新前在训练引擎里重算的对数概率，在这里切断梯度。
        behavior_weights: $\pi_{\text{prox}}/\mu$，来自 `importance_weights`，可先截断或掩码。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。
        clip_low: 下侧宽度。
        clip_high: 上侧宽度。

    Returns:
        逐 token 的损失 `(B, T)`。

    References:
        2110.00641 的 $L^{\text{CLIP}}_{\text{decoupled}}$，AReaL 式 5。TRL 1.16 `GRPOTrainer` 把
        `importance_sampling_ratio` 乘在裁剪之后，与此一致。
    """
    loss = clipped_surrogate_loss(
        log_probs, proximal_log_probs.detach(), advantages, clip_low=clip_low, clip_high=clip_high
    )
    return behavior_weights.detach() * loss


# --8<-- [end:decoupled_ppo_loss]
