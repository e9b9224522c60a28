r"""训推不一致的修正：引擎的 logp 与训练端重算的 logp 之间的权重（截断、掩码）与监控指标。

页面：docs/systems/rollout-logprobs.md

不包含：三种粒度的连乘本身、截断与掩码的逐元素操作、乘上权重之后的裁剪损失，都在 snippets/rl/on_off_policy.py。
数据类型：float32 或 float64，原样计算，不截断对数比；库里的截断写在各函数的 References。

四个策略：$\mu$ 是推理引擎采样时的概率（权重 $\theta_{\text{old}}$），$\pi_{\text{old}}$ 是训练引擎用同一组权重重算的概率，
$\pi_\theta$ 是正在更新的策略，$\pi_{\text{ref}}$ 是冻结的参考。这里的权重一律是 $\pi_{\text{old}}/\mu$：
分子不是 $\pi_\theta$（那样 $\rho=\pi_\theta/\pi_{\text{old}}$ 会被算两遍），也不是倒数。

References:
    解耦的三策略目标，https://arxiv.org/abs/2110.00641
    IcePop，https://arxiv.org/abs/2510.18855
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.kl_estimators import kl_k3
from snippets.rl.on_off_policy import (
    effective_sample_size,
    importance_weights,
    mask_weights,
    truncate_weights,
)

__all__ = ["truncated_importance_weights", "masked_importance_weights", "mismatch_metrics"]


# --8<-- [start:truncated]
def truncated_importance_weights(
    old_log_probs: Float[Tensor, "B T"],
    rollout_log_probs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    level: str = "token",
    cap: float = 2.0,
) -> Float[Tensor, "B T"]:
    r"""截断重要性采样（TIS）的权重：过大的降到上限，样本留着。

    $$\min\Big(\frac{\pi_{\text{old}}}{\mu},\ C\Big)$$

    注意：权重已切断梯度，要乘在裁剪之后的损失上。

    Args:
        old_log_probs: 训练引擎重算的对数概率。
        rollout_log_probs: 推理引擎采样时返回的对数概率，须是温度、top-p 处理之后的。
        loss_mask: 真表示策略生成的 token；假的位置权重为 0。
        level: "token" 或 "sequence"（整条连乘，先乘再截断）。
        cap: 上限 $C$。

    Returns:
        权重 `(B, T)`，无单位，不带梯度。

    References:
        verl 0.9.1 `compute_rollout_correction_weights`（先把对数比截到 ±20）；TRL 1.16 的 `*_truncate` 模式。
    """
    weights = importance_weights(old_log_probs, rollout_log_probs, loss_mask, level=level)
    return truncate_weights(weights, cap=cap)


# --8<-- [end:truncated]


# --8<-- [start:masked]
def masked_importance_weights(
    old_log_probs: Float[Tensor, "B T"],
    rollout_log_probs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    level: str = "token",
    low: float = 0.5,
    high: float = 5.0,
) -> Float[Tensor, "B T"]:
    r"""掩码重要性采样（MIS，IcePop）的权重：区间外的归零。

    $$w\,\mathbb 1[C_{\text{low}}\le g\le C_{\text{high}}]$$

    注意：token、sequence 两级的 $g$ 就是 $w$；geometric 用整条的几何平均作门，留下的仍乘逐 token 的比值。

    Args:
        old_log_probs: 训练引擎重算的对数概率。
        rollout_log_probs: 推理引擎采样时返回的对数概率，须是温度、top-p 处理之后的。
        loss_mask: 真表示策略生成的 token；假的位置权重为 0，也不进平均。
        level: "token"、"sequence" 或 "geometric"。
        low: 下界 $C_{\text{low}}$，设 0 即没有。
        high: 上界 $C_{\text{high}}$。

    Returns:
        权重 `(B, T)`，无单位，不带梯度。归零的 token 还算不算进分母由调用者定。

    References:
        TRL 1.16 的 `*_mask` 模式（默认 sequence、上界 3、无下界）；verl 0.9.1 的 `"low_high"` 阈值；
        OpenRLHF 0.11.2 的 token 与 seq 两级 mask，后者即 geometric。
    """
    if level != "geometric":
        weights = importance_weights(old_log_probs, rollout_log_probs, loss_mask, level=level)
        return mask_weights(weights, low=low, high=high)
    log_ratio = (old_log_probs - rollout_log_probs).detach().masked_fill(~loss_mask, 0.0)
    gate = (log_ratio.sum(1, keepdim=True) / loss_mask.sum(1, keepdim=True).clamp(min=1)).exp()
    keep = mask_weights(gate, low=low, high=high) > 0
    return importance_weights(old_log_probs, rollout_log_probs, loss_mask, level="token") * keep


# --8<-- [end:masked]


def mismatch_metrics(
    old_log_probs: Float[Tensor, "B T"],
    rollout_log_probs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
) -> dict[str, float]:
    r"""监控训推差距的几个数，样本来自 $\mu$。

    $$\mathrm{KL}(\mu\Vert\pi_{\text{old}})\approx\overline{\log\mu-\log\pi_{\text{old}}}$$

    注意：均值会被大量几乎相等的 token 冲淡，要与最大值、整条连乘的范围一起看。

    Args:
        old_log_probs: 训练引擎重算的对数概率。
        rollout_log_probs: 推理引擎采样时返回的对数概率。
        loss_mask: 真表示策略生成的 token，至少有一个。

    Returns:
        `mean_abs`、`max_abs`：对数概率之差的绝对值（nat）；`kl`、`kl_k3`：$\mathrm{KL}(\mu\Vert\pi_{\text{old}})$
        的 k1、k3 估计（nat/token）；`seq_ratio_min`、`seq_ratio_max`：整条连乘的范围；`ess`：有效样本量除以条数。

    References:
        TRL 1.16 记录前两项（`sampling/sampling_logp_difference/*`）；verl 0.9.1 `compute_offpolicy_metrics` 的
        `kl`、`k3_kl`。
    """
    if not loss_mask.any():
        raise ValueError("loss_mask 全为假：没有 token 可比。检查掩码是否用反，或这一批是否全被过滤。")
    old, rollout = old_log_probs.detach()[loss_mask], rollout_log_probs.detach()[loss_mask]
    gap = old - rollout
    log_ratio = (old_log_probs - rollout_log_probs).detach().masked_fill(~loss_mask, 0.0)
    sequence = log_ratio.sum(1)[loss_mask.any(1)].exp()
    values = {
        "mean_abs": gap.abs().mean(),
        "max_abs": gap.abs().max(),
        "kl": -gap.mean(),
        "kl_k3": kl_k3(rollout, old).mean(),
        "seq_ratio_min": sequence.min(),
        "seq_ratio_max": sequence.max(),
        "ess": effective_sample_size(sequence) / len(sequence),
    }
    return {name: value.item() for name, value in values.items()}
