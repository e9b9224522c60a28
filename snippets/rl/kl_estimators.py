r"""KL 的三个单样本估计 k1、k2、k3，以及把它们写进损失或奖励时真正得到的梯度。

页面：docs/rl/kl-estimators.md

不包含：掩码与求平均、$\beta$、自适应系数、策略梯度损失。
数据类型：输入什么精度就用什么精度算，不静默转换；建议传 float32 及以上的对数概率。

方向（全文件只用这一种）：样本 $x\sim\pi_\theta$，$r=\pi_{\text{ref}}(x)/\pi_\theta(x)$，
$\log r=\log\pi_{\text{ref}}-\log\pi_\theta$，要估计的是反向 KL，即 $\mathrm{KL}(\pi_\theta\Vert\pi_{\text{ref}})$。
函数参数的次序也固定：先当前策略，后参考策略。

References:
    J. Schulman, Approximating KL Divergence (2020), http://joschu.net/blog/kl-approx.html
    DeepSeekMath, 式 4, https://arxiv.org/abs/2402.03300
    DeepSeek-V3.2, §3.1 "Unbiased KL Estimate", 式 7, https://arxiv.org/abs/2512.02556
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = [
    "kl_categorical",
    "kl_k1",
    "kl_k2",
    "kl_k3",
    "kl_k3_importance_weighted",
    "kl_k3_straight_through",
    "kl_reward_surrogate",
]


# --8<-- [start:exact]
def kl_categorical(logits: Float[Tensor, "*B V"], ref_logits: Float[Tensor, "*B V"]) -> Float[Tensor, "*B"]:
    r"""对整个词表求和的精确 KL，三个估计都拿它当真值。

    $$\mathrm{KL}(\pi_\theta\Vert\pi_{\text{ref}})=\sum_{v=1}^{V}\pi_\theta(v)\log\frac{\pi_\theta(v)}{\pi_{\text{ref}}(v)}$$

    注意：第一个参数是被求期望的那一边；要前向 KL，即 $\mathrm{KL}(\pi_{\text{ref}}\Vert\pi_\theta)$，把两个参数对调。

    Args:
        logits: 当前策略在每个位置上的 logits。
        ref_logits: 参考策略在同一位置上的 logits。

    Returns:
        每个位置的 KL（nat）。

    References:
        与 `torch.distributions.kl_divergence(Categorical, Categorical)` 一致（torch 2.13.0）。
    """
    log_probs = logits.log_softmax(-1)
    ref_log_probs = ref_logits.log_softmax(-1)
    return (log_probs.exp() * (log_probs - ref_log_probs)).sum(-1)  # (*B)


# --8<-- [end:exact]


# --8<-- [start:estimators]
def kl_k1(log_probs: Float[Tensor, "*B T"], ref_log_probs: Float[Tensor, "*B T"]) -> Float[Tensor, "*B T"]:
    r"""$k_1$：对数概率之差，无偏，可以为负。

    $$k_1=-\log r=\log\pi_\theta(x)-\log\pi_{\text{ref}}(x)$$

    注意：只能放进奖励。直接当损失求导，得到的是 $\nabla\log\pi_\theta$，期望为 0，等于没有正则。

    Args:
        log_probs: 当前策略给采样到的 token 的对数概率。
        ref_log_probs: 参考策略给同一批 token 的对数概率。

    Returns:
        逐 token 的估计（nat）。

    References:
        Schulman (2020)；verl 0.9.1 `kl_penalty(..., "k1")`、OpenRLHF 0.11.2 `compute_approx_kl(..., "k1")`
        （后者再截到 $[-10,10]$）；TRL 1.16.0 `RLOOTrainer` 放进奖励的正是它。
    """
    return log_probs - ref_log_probs


def kl_k2(log_probs: Float[Tensor, "*B T"], ref_log_probs: Float[Tensor, "*B T"]) -> Float[Tensor, "*B T"]:
    r"""$k_2$：对数比平方的一半，值有偏，当损失时梯度是对的。

    $$k_2=\tfrac12(\log r)^2$$

    注意：前面的 $\tfrac12$ 不能丢，丢了梯度就是 2 倍；样本必须来自当前策略，旧样本要再乘不求导的 $\pi_\theta/\pi_{\text{old}}$。

    Args:
        log_probs: 当前策略给采样到的 token 的对数概率。
        ref_log_probs: 参考策略给同一批 token 的对数概率。

    Returns:
        逐 token 的估计（nat），非负。

    References:
        Schulman (2020)；verl 0.9.1 `kl_penalty(..., "k2")`、OpenRLHF 0.11.2 `compute_approx_kl(..., "k2")`（截到 10）。
    """
    return 0.5 * (log_probs - ref_log_probs).square()


def kl_k3(log_probs: Float[Tensor, "*B T"], ref_log_probs: Float[Tensor, "*B T"]) -> Float[Tensor, "*B T"]:
    r"""$k_3$：给 $k_1$ 加上期望为 0 的 $r-1$，无偏且非负。

    $$k_3=r-1-\log r,\qquad r=\frac{\pi_{\text{ref}}(x)}{\pi_\theta(x)}$$

    注意：值估计反向 KL，当损失求导却是前向 KL 的梯度。这里不截断，$\log r$ 超过约 88 时 float32 会溢出成 inf。

    Args:
        log_probs: 当前策略给采样到的 token 的对数概率。
        ref_log_probs: 参考策略给同一批 token 的对数概率。

    Returns:
        逐 token 的估计（nat），非负。

    References:
        DeepSeekMath 式 4，https://arxiv.org/abs/2402.03300 。TRL 1.16.0 `GRPOTrainer` 用同一式（默认再乘重要性比值）；
        verl 0.9.1 `kl_penalty(..., "low_var_kl")` 先把 $\log r$ 截到 $\pm20$、再把结果截到 $[-10,10]$；
        OpenRLHF 0.11.2 `compute_approx_kl(..., "k3")` 把结果截到 10。
    """
    log_r = ref_log_probs - log_probs
    # expm1：两个策略很接近时 exp(log_r) - 1 会把有效数字减光
    return torch.expm1(log_r) - log_r


# --8<-- [end:estimators]


# --8<-- [start:corrected]
def kl_k3_importance_weighted(
    log_probs: Float[Tensor, "*B T"],
    old_log_probs: Float[Tensor, "*B T"],
    ref_log_probs: Float[Tensor, "*B T"],
) -> Float[Tensor, "*B T"]:
    r"""乘上重要性比值的 $k_3$：样本来自旧策略时，值与梯度都对应反向 KL。

    $$\rho\,k_3=\rho\,(r-1-\log r),\qquad\rho=\frac{\pi_\theta(x)}{\pi_{\text{old}}(x)}$$

    注意：比值必须留在计算图里。同策略时它的值恒为 1，梯度却不为 0，少了它就退回 $k_3$ 的前向 KL 梯度。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        old_log_probs: 采样时策略的对数概率，在这里切断梯度。
        ref_log_probs: 参考策略的对数概率。

    Returns:
        逐 token 的损失（nat）。

    References:
        DeepSeek-V3.2 §3.1 式 7，https://arxiv.org/abs/2512.02556 ；TRL 1.16.0 `GRPOConfig.use_bias_correction_kl=True`
        （`importance_sampling_level="token"`）时的 KL 项。
    """
    ratio = (log_probs - old_log_probs.detach()).exp()
    return ratio * kl_k3(log_probs, ref_log_probs)


def kl_k3_straight_through(
    log_probs: Float[Tensor, "*B T"], ref_log_probs: Float[Tensor, "*B T"]
) -> Float[Tensor, "*B T"]:
    r"""直通（straight-through）写法：前向是 $k_3$ 的值，反向是 $k_2$ 的梯度。

    $$k_2-\operatorname{sg}(k_2)+\operatorname{sg}(k_3),\qquad\operatorname{sg}\ \text{切断梯度}$$

    注意：不含重要性比值，只在样本来自当前策略时梯度无偏。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        ref_log_probs: 参考策略的对数概率。

    Returns:
        逐 token 的损失（nat）。

    References:
        verl 0.9.1 `kl_penalty(..., "k3+")`（前向另有截断）；OpenRLHF 0.11.2 `compute_approx_kl(unbiased_gradient=True)`
        在此之上再乘截断且不求导的重要性比值。
    """
    k2 = kl_k2(log_probs, ref_log_probs)
    return k2 - k2.detach() + kl_k3(log_probs, ref_log_probs).detach()


# --8<-- [end:corrected]


# --8<-- [start:in-reward]
def kl_reward_surrogate(kl: Float[Tensor, "*B T"], log_probs: Float[Tensor, "*B T"]) -> Float[Tensor, "*B T"]:
    r"""「KL 放进奖励」对应的等价损失：KL 当常数，乘对数概率。

    $$\operatorname{sg}(k)\,\log\pi_\theta(x),\qquad\nabla=k\,\nabla\log\pi_\theta(x)$$

    注意：多 token 序列里，第 $t$ 个 token 要乘从 $t$ 到结尾的 KL 之和（reward-to-go），由调用者先累加好再传进来。

    Args:
        kl: 逐 token 的 KL 估计，或它的 reward-to-go；在这里切断梯度。
        log_probs: 当前策略的对数概率，带梯度。

    Returns:
        逐 token 的损失；值没有意义，只用它的梯度。

    References:
        策略梯度定理；「k_n in reward」的说法见 https://arxiv.org/abs/2510.01555 。
    """
    return kl.detach() * log_probs


# --8<-- [end:in-reward]
