r"""大模型里的 PPO：KL 进奖励、广义优势估计（GAE）、优势白化、三项损失。

页面：docs/rl/ppo.md

不包含：采样、奖励模型、优化器与小批切分；裁剪本身见 snippets/rl/clip.py，聚合方式见 snippets/rl/masking.py。
数据类型：输入什么精度就用什么精度算，不静默转换。

约定（全文件只用这一种）：$T$ 轴上的第 $t$ 个位置对应回答的第 $t$ 个 token $a_t$；`values[:, t]` 是选出 $a_t$ **之前**
的状态价值 $V(s_t)$，即语言模型在上一个位置的输出，不能看见 $a_t$。掩码为真表示 $a_t$ 由策略生成；
为假的是提示、工具返回和 EOS 之后的填充，它们不是动作，没有优势，递推原样跨过去。

References:
    GAE，式 (11)–(18)，https://arxiv.org/abs/1506.02438
    PPO，式 (7)、(9)–(12)，https://arxiv.org/abs/1707.06347
    InstructGPT，§3.5 与式 (2)、附录 C.4，https://arxiv.org/abs/2203.02155
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss, clipped_value_loss
from snippets.rl.kl_estimators import kl_k1
from snippets.rl.masking import aggregate_loss, masked_mean

__all__ = ["kl_shaped_rewards", "generalized_advantage", "whiten", "ppo_loss"]


# --8<-- [start:kl_shaped_rewards]
def kl_shaped_rewards(
    rewards: Float[Tensor, " B"],
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float = 0.02,
) -> Float[Tensor, "B T"]:
    r"""逐 token 奖励：每个 token 扣 KL，最后一个生成的 token 再加整条回答的得分。

    $$r_t=-\beta\log\frac{\pi_{\text{old}}(a_t\mid s_t)}{\pi_{\text{ref}}(a_t\mid s_t)}+\mathbb 1[t=t_{\text{last}}]\,R$$

    注意：得分放在最后一个掩码为真的位置，不是最后一列。整行为假时没有地方放得分，返回全零。

    Args:
        rewards: 整条回答的得分 $R$，来自奖励模型或规则。
        log_probs: 采样这批回答的策略给出的对数概率；奖励是常数，这里切断梯度。
        ref_log_probs: 参考策略给同一批 token 的对数概率。
        mask: 真表示策略生成的 token。
        kl_coef: KL 的系数 $\beta$，每 nat 扣多少奖励；InstructGPT 取 0.02。

    Returns:
        逐 token 奖励，掩码为假处是 0。

    References:
        InstructGPT §3.5、式 (2)。verl 0.9.1 `apply_kl_penalty` 一致；OpenRLHF 0.11.2 `compute_reward`
        在掩码为真处一致，只是传进去的 k1 已截到 $[-10,10]$。
    """
    if kl_coef < 0:
        raise ValueError(f"kl_coef={kl_coef} 不能为负：负号已经写在公式里，负系数会奖励远离参考策略。")
    penalty = kl_coef * kl_k1(log_probs, ref_log_probs).detach()
    is_last = mask & (mask.flip(1).cumsum(1).flip(1) == 1)  # 从右往左数的第一个真
    score = torch.where(is_last, rewards[:, None], torch.zeros_like(penalty))
    return score - penalty.masked_fill(~mask, 0.0)


# --8<-- [end:kl_shaped_rewards]


# --8<-- [start:generalized_advantage]
@torch.no_grad()
def generalized_advantage(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
) -> tuple[Float[Tensor, "B T"], Float[Tensor, "B T"]]:
    r"""广义优势估计（GAE）与价值模型的回归目标。

    $$\hat A_t=\delta_t+\gamma\lambda\hat A_{t+1},\qquad\delta_t=r_t+\gamma V(s_{t+1})-V(s_t),\qquad\hat R_t=\hat A_t+V(s_t)$$

    注意：$t+1$ 是下一个掩码为真的位置，后面没有就取 0（回合终止）；掩码为假处的奖励与价值不参与。

    Args:
        token_rewards: 逐 token 奖励 $r_t$。
        values: 采样时价值模型给出的 $V(s_t)$，选出第 $t$ 个 token 之前的价值。
        mask: 真表示策略生成的 token。
        gamma: 折扣 $\gamma$，改变的是目标本身；大模型里取 1。
        lam: 混合系数 $\lambda$，只管怎么估；0 是一步 TD 误差，1 是回报减价值。

    Returns:
        优势（未白化）与回归目标，都不带梯度，掩码为假处是 0。

    References:
        GAE 式 (16)–(18)，PPO 式 (11)(12)。verl 0.9.1 `compute_gae_advantage_return` 在掩码为真处一致，
        只是它返回白化过的优势；OpenRLHF 0.11.2 把中间的掩码位置当成价值为 0 的一步，只在 $\gamma=\lambda=1$ 时一致。
    """
    if not (0 <= gamma <= 1 and 0 <= lam <= 1):
        raise ValueError(f"gamma={gamma}、lam={lam} 都应在 0 与 1 之间；常用 gamma=1、lam=0.95 到 1。")
    advantages = torch.zeros_like(values)
    next_value = next_advantage = values.new_zeros(values.shape[0])  # (B)，终止之后都是 0
    for t in reversed(range(values.shape[1])):
        delta = token_rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = advantage.masked_fill(~mask[:, t], 0.0)
    return advantages, advantages + values.masked_fill(~mask, 0.0)


# --8<-- [end:generalized_advantage]


# --8<-- [start:whiten]
def whiten(
    advantages: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, eps: float = 1e-8
) -> Float[Tensor, "B T"]:
    r"""把整批有效 token 的优势变成均值 0、方差 1。

    $$\tilde A_{i,t}=\frac{\hat A_{i,t}-\bar A}{\sqrt{s^2+\varepsilon}},\qquad s^2=\frac{1}{n-1}\sum_{i,t}m_{i,t}(\hat A_{i,t}-\bar A)^2$$

    注意：均值与方差都在全批的有效 token 上求，不是逐行；要在算完回归目标之后做，不能拿白化后的优势去算目标。

    Args:
        advantages: 优势 $\hat A$。
        mask: 真表示计入统计的 token，共 $n$ 个。
        eps: 加在方差上的小量 $\varepsilon$。

    Returns:
        白化后的优势，掩码为假处是 0。

    References:
        verl 0.9.1 `masked_whiten` 一致（掩码为真处）；OpenRLHF 0.11.2 用总体方差（除以 $n$）并把方差的下限取为 1e-8。
    """
    count = mask.sum()
    if count < 2:
        raise ValueError(f"只有 {int(count)} 个有效 token，样本方差没有定义；请把整批一起传进来。")
    centered = advantages - masked_mean(advantages, mask)
    variance = masked_mean(centered.square(), mask) * count / (count - 1)
    return (centered * (variance + eps).rsqrt()).masked_fill(~mask, 0.0)


# --8<-- [end:whiten]


# --8<-- [start:ppo_loss]
def ppo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    entropy: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    value_clip: float = 0.2,
    value_coef: float = 0.5,
    entropy_coef: float = 0.0,
) -> Float[Tensor, ""]:
    r"""PPO 的完整损失：裁剪代理损失加价值损失减熵。

    $$\mathcal L=\mathcal L_{\text{clip}}+c_v\,\mathcal L_{\text{value}}-c_e\,\mathcal H$$

    注意：三项都在全批有效 token 上平均；优势与回归目标在一批数据的多次更新里固定不变，这里切断梯度。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        old_log_probs: 采样时策略的对数概率。
        advantages: 优势，通常已白化。
        values: 当前价值估计，带梯度。
        old_values: 采样时的价值估计，价值裁剪以它为中心。
        returns: 价值模型的回归目标。
        entropy: 当前策略在每个位置上整个词表的熵（nat），带梯度。
        mask: 真表示策略生成的 token。
        clip_low: 下侧裁剪宽度。
        clip_high: 上侧裁剪宽度。
        value_clip: 价值裁剪宽度，与价值同单位。
        value_coef: 价值损失的系数 $c_v$；0.5 补上平方误差前的二分之一。
        entropy_coef: 熵的系数 $c_e$，大模型框架默认 0。

    Returns:
        标量损失。

    References:
        PPO 式 (9)，原文写成要最大化的目标；Atari 实验取 $c_1=1$、$c_2=0.01$（表 5）。价值裁剪不在论文的公式里。
        verl 0.9.1 与 OpenRLHF 0.11.2 的策略与价值是两个模型、两个优化器，两项损失分开反传。
    """
    policy = clipped_surrogate_loss(
        log_probs, old_log_probs.detach(), advantages.detach(), clip_low=clip_low, clip_high=clip_high
    )
    value = clipped_value_loss(values, old_values.detach(), returns.detach(), value_clip=value_clip)
    return aggregate_loss(policy + value_coef * value - entropy_coef * entropy, mask, mode="token-mean")


# --8<-- [end:ppo_loss]
