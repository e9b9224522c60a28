r"""同一个逐 token 的 KL，放进奖励（PPO）与放进损失（GRPO）之后，各落到哪些 token 的梯度上。

页面：docs/rl/ppo-vs-grpo.md

不包含：优势与损失本身（见 snippets/rl/ppo.py、snippets/rl/grpo.py），奖励与价值那一部分的信用。
数据类型：输入什么精度就用什么精度算，不静默转换。

约定：信用（credit）$c_t$ 是目标（损失的相反数）的梯度里 $\nabla\log\pi_\theta(a_t)$ 的系数中属于 KL 的那一份，取第一次更新
（$\rho=1$）、聚合之前；$c_t<0$ 表示 KL 把这个 token 的概率往下压。
PPO 的优势对逐 token 奖励是线性的，所以价值固定时 $\hat A=\hat A^{R}+c$，$\hat A^{R}$ 是不含 KL 的优势。
价值模型学的回报也含 KL，它预料到的那部分在 $\hat A^{R}$ 里减掉，不算在 $c$ 里。
之后的更新里 PPO 的这一份随优势一起乘 $\rho$、一起被裁剪，GRPO 的不乘 $\rho$、不受裁剪，但每步用新的 $\pi_\theta$ 重算。

References:
    DeepSeekMath 式 2（PPO 的逐 token 奖励）、式 3 与式 4（GRPO），https://arxiv.org/abs/2402.03300
    GAE，式 (16)，https://arxiv.org/abs/1506.02438
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards

__all__ = ["reward_kl_credit", "loss_kl_credit"]


# --8<-- [start:reward_kl_credit]
def reward_kl_credit(
    old_log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float = 0.02,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> Float[Tensor, "B T"]:
    r"""PPO：k1 放进奖励，经 GAE 传给自己和前面的 token。

    $$c_t=-\beta\sum_{l\ge0}(\gamma\lambda)^l\,k_{1,t+l}$$

    注意：$l$ 数的是策略生成的 token，掩掉的不算一步；优势白化之后还要减均值、除以全批的标准差。

    Args:
        old_log_probs: 采样这批回答的策略给出的对数概率，几轮更新里不变。
        ref_log_probs: 参考策略给同一批 token 的对数概率。
        mask: 真表示策略生成的 token。
        kl_coef: KL 的系数 $\beta$，单位是「分每 nat」；InstructGPT 取 0.02。
        gamma: 折扣 $\gamma$。
        lam: GAE 的 $\lambda$；1 时一路传到开头，0 时只留在自己。

    Returns:
        未白化的优势里属于 KL 的那一份，掩码为假处是 0。

    References:
        GAE 式 (16)：得分与价值都取 0，GAE 里剩下的就是 KL 的那一份。
    """
    zeros = torch.zeros_like(old_log_probs)
    rewards = kl_shaped_rewards(zeros[:, 0], old_log_probs, ref_log_probs, mask, kl_coef=kl_coef)
    return generalized_advantage(rewards, zeros, mask, gamma=gamma, lam=lam)[0]  # (B, T)


# --8<-- [end:reward_kl_credit]


# --8<-- [start:loss_kl_credit]
def loss_kl_credit(
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    beta: float = 0.04,
) -> Float[Tensor, "B T"]:
    r"""GRPO：k3 单列进损失，只作用于自己。

    $$c_t=-\beta\,\big(1-\pi_{\text{ref}}/\pi_\theta\big)$$

    注意：往下压最多 $\beta$，往上拉没有上限；优势怎么归一化都不影响它。

    Args:
        log_probs: 当前策略的对数概率，每次更新都重算。
        ref_log_probs: 参考策略给同一批 token 的对数概率。
        mask: 真表示策略生成的 token。
        beta: KL 的系数 $\beta$，乘在损失上；DeepSeekMath 取 0.04。

    Returns:
        聚合之前每个 token 的系数，掩码为假处是 0。

    References:
        DeepSeekMath 式 4 对 $\log\pi_\theta$ 求导；TRL 1.16.0 默认还给 k3 乘可导的 $\rho$，那时 $\rho=1$ 处的系数是 $-\beta k_1$。
    """
    return (beta * torch.expm1(ref_log_probs - log_probs)).masked_fill(~mask, 0.0)


# --8<-- [end:loss_kl_credit]
