r"""REINFORCE++ 与它的 baseline 变体：没有价值模型，优势由全批统计量归一化。

页面：docs/rl/reinforce-plus-plus.md

不包含：采样与打分、优化器与小批切分、跨卡汇总统计量（这里假定传进来的就是整批）、自适应 KL 系数。
数据类型：输入什么精度就用什么精度算，不静默转换。
约定：掩码为真表示策略生成的 token。为假的是工具返回与填充，回报原样跨过它们，统计量也不数它们。
全批是一次采样得到的全部回答，不是一个微批，也不是一张卡上的那一份。优势一批只算一次，多次更新里固定不变。

统计量有两处选择，论文没有写明，各实现不同：均值与方差在有效 token 上求，长回答的票数多（按条求的是
`whiten_per_sequence`）；方差除以 $n-1$（verl、slime），OpenRLHF 与 NeMo-RL 除以 $n$，优势只差常数 $\sqrt{n/(n-1)}$。

References:
    REINFORCE++ v9（2025-11-10）式 (4)–(8)、附录 A、B，https://arxiv.org/abs/2501.03262
    v1（2025-01-04）没有 baseline 变体
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.kl_estimators import kl_k2
from snippets.rl.masking import aggregate_loss
from snippets.rl.ppo import kl_shaped_rewards, whiten

__all__ = [
    "returns_to_go",
    "reinforce_plus_plus_advantages",
    "reinforce_plus_plus_baseline_advantages",
    "whiten_per_sequence",
    "reinforce_plus_plus_baseline_loss",
]


# --8<-- [start:returns]
@torch.no_grad()
def returns_to_go(
    token_rewards: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"], *, gamma: float = 1.0
) -> Float[Tensor, "B T"]:
    r"""从每个 token 到结尾的折扣回报，从后往前累加。

    $$A_t=r_t+\gamma\,A_{t+1}$$

    注意：$t+1$ 是下一个有效的 token，中间的工具返回不打折、也不清零。

    Args:
        token_rewards: 逐 token 奖励 $r_t$。
        mask: 真表示策略生成的 token。
        gamma: 折扣 $\gamma$；论文取 1。

    Returns:
        回报，掩码为假处是 0。

    References:
        verl 0.9.1 一致；OpenRLHF 0.11.2 在中间的掩码位置也打折，只在 $\gamma=1$ 时一致。
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} 应在 0 与 1 之间；论文取 1。")
    returns = torch.zeros_like(token_rewards)
    running = token_rewards.new_zeros(token_rewards.shape[0])  # (B)
    for t in reversed(range(token_rewards.shape[1])):
        running = torch.where(mask[:, t], token_rewards[:, t] + gamma * running, running)
        returns[:, t] = running
    return returns.masked_fill(~mask, 0.0)


# --8<-- [end:returns]


# --8<-- [start:advantages]
def reinforce_plus_plus_advantages(
    rewards: Float[Tensor, " B"],
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float = 0.01,
    gamma: float = 1.0,
) -> Float[Tensor, "B T"]:
    r"""REINFORCE++：得分放在最后一个 token、逐 token 扣 KL，累加成回报，再用全批归一化。

    $$A_t=r-\beta\sum_{i\ge t}k_1(i),\qquad\hat A_t=\frac{A_t-\operatorname{mean}_{\text{batch}}A}{\operatorname{std}_{\text{batch}}A}$$

    注意：不按提示分组，每个提示可以只有一条回答。

    Args:
        rewards: 每条回答的得分。
        log_probs: 采样这批回答的策略给出的对数概率。
        ref_log_probs: 参考策略给同一批 token 的对数概率。
        mask: 真表示策略生成的 token。
        kl_coef: KL 的系数 $\beta$；v1 表 1 在通用任务取 0.01、数学取 0.001。
        gamma: 折扣；公式是 $\gamma=1$ 的情形。

    Returns:
        逐 token 的优势，不带梯度，掩码为假处是 0。

    References:
        v9 式 (4)(5)；verl 0.9.1 `reinforce_plus_plus`，OpenRLHF 0.11.2 `reinforce`（除以 $n$）。
    """
    token_rewards = kl_shaped_rewards(rewards, log_probs, ref_log_probs, mask, kl_coef=kl_coef)
    return whiten(returns_to_go(token_rewards, mask, gamma=gamma), mask)


# --8<-- [end:advantages]
# --8<-- [start:baseline]
def reinforce_plus_plus_baseline_advantages(
    rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B T"], *, group_size: int
) -> Float[Tensor, "B T"]:
    r"""REINFORCE++-baseline：先减组均值，再用全批的均值与标准差归一化。

    $$A'=r-\operatorname{mean}_{\text{group}}(r),\qquad\hat A=\frac{A'-\operatorname{mean}_{\text{batch}}A'}{\operatorname{std}_{\text{batch}}A'}$$

    注意：分母是 $A'$ 的全批标准差，既不是组内标准差，也不是原始奖励的标准差。

    Args:
        rewards: 每条回答的得分，同一个提示的回答相邻。
        mask: 真表示策略生成的 token。
        group_size: 每个提示的回答数 $G$，至少为 2。

    Returns:
        逐 token 的优势（同一条回答里相同），掩码为假处是 0。

    References:
        v9 式 (6)(7)；verl 0.9.1 `reinforce_plus_plus_baseline`（组内只有一条时它用原始奖励），
        OpenRLHF 0.11.2 `reinforce_baseline`（除以 $n$；不许只有一条）。
    """
    centered = group_advantages(rewards, group_size=group_size, scale_by_std=False)
    return whiten(centered[:, None].expand(mask.shape), mask)


# --8<-- [end:baseline]
# --8<-- [start:per-sequence]
def whiten_per_sequence(rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r"""对照：均值与标准差在 $B$ 条回答上求，每条一票，再广播到 token。

    $$\hat A_i=\frac{r_i-\bar r}{\sqrt{s_r^2+10^{-8}}},\qquad s_r^2=\frac1{B-1}\sum_i(r_i-\bar r)^2$$

    Args:
        rewards: 每条回答的得分，或减过组均值的得分。
        mask: 真表示策略生成的 token。

    Returns:
        逐 token 的优势；按条平均是 0，按 token 平均一般不是。

    References:
        v9 附录 B.2 的文字；ms-swift 的 `scale_rewards="batch"` 在减过组均值的得分上这样求标准差。
    """
    if len(rewards) < 2:
        raise ValueError(f"只有 {len(rewards)} 条回答，样本方差没有定义；请把整批一起传进来。")
    normalized = (rewards - rewards.mean()) * (rewards.var() + 1e-8).rsqrt()
    return normalized[:, None].expand(mask.shape).masked_fill(~mask, 0.0)


# --8<-- [end:per-sequence]
# --8<-- [start:baseline-loss]
def reinforce_plus_plus_baseline_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    kl_loss_coef: float,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, ""]:
    r"""baseline 变体的损失：PPO 的裁剪代理损失，加上单独一项 $k_2$。

    $$\mathcal L=\operatorname{mean}_{\text{token}}\Big[\ell_{\text{clip}}+\beta\,\tfrac12\Big(\log\frac{\pi_\theta}{\pi_{\text{ref}}}\Big)^2\Big]$$

    注意：式 (8) 是要最大化的目标，所以那里是减号。`kl_loss_coef=0` 就是 REINFORCE++ 自己的损失（KL 已在优势里）。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        old_log_probs: 采样这批回答的策略的对数概率。
        ref_log_probs: 参考策略的对数概率。
        advantages: 归一化过的优势，这里切断梯度。
        mask: 真表示策略生成的 token。
        kl_loss_coef: $k_2$ 项的系数 $\beta$（论文记作 $\lambda$，没有报告数值）；OpenRLHF 的示例脚本取 1e-5。
        clip_low: 下侧裁剪宽度。
        clip_high: 上侧裁剪宽度。

    Returns:
        标量损失。

    References:
        v9 式 (1)(8)。聚合取 OpenRLHF 0.11.2 的默认值 token-mean；式 (1) 写的是每条先除以 $\lvert o\rvert$。
    """
    if kl_loss_coef < 0:
        raise ValueError(f"kl_loss_coef={kl_loss_coef} 不能为负：这里写的是损失，负系数会奖励远离参考策略。")
    policy = clipped_surrogate_loss(
        log_probs, old_log_probs.detach(), advantages.detach(), clip_low=clip_low, clip_high=clip_high
    )
    penalty = kl_loss_coef * kl_k2(log_probs, ref_log_probs)
    return aggregate_loss(policy + penalty, mask, mode="token-mean")


# --8<-- [end:baseline-loss]
