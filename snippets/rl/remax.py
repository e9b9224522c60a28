r"""ReMax：用同一提示的贪心回答的奖励当基线的 REINFORCE，以及基线对梯度方差的精确公式。

页面：docs/rl/remax.md

不包含：采样、贪心解码与打分；KL 惩罚（要罚就先扣进奖励，采样回答与贪心回答一起扣或只扣前者都无偏）。
数据类型：输入什么精度就用什么精度算，不静默转换。

记号：$x$ 是提示，$y\sim\pi_\theta(\cdot\mid x)$ 是采样的回答，$\hat y$ 是逐 token 取 argmax 的贪心回答，
$b=r(x,\hat y)$ 是基线，$s=\nabla_\theta\log\pi_\theta(y\mid x)$ 是得分函数。「方差」一律指协方差矩阵的迹。

References:
    ReMax，Algorithm 1，https://arxiv.org/abs/2310.10505 ，官方代码 https://github.com/liziniu/ReMax
    同一个基线更早用于图像描述：自批评序列训练（SCST），https://arxiv.org/abs/1612.00563
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.rloo import reinforce_loss

__all__ = [
    "remax_advantages",
    "remax_token_advantages",
    "remax_loss",
    "baseline_gradient_variance",
    "leave_one_out_gradient_variance",
]


# --8<-- [start:advantages]
def remax_advantages(
    rewards: Float[Tensor, " B"],
    greedy_rewards: Float[Tensor, " B"],
) -> Float[Tensor, " B"]:
    r"""ReMax 的优势：采样回答的奖励减去贪心回答的奖励。

    $$\hat A_i=r(x_i,y_i)-r(x_i,\hat y_i)$$

    注意：基线当常数用，这里切断梯度；不除以标准差。一个提示采 $n$ 条时，先把贪心奖励 `repeat_interleave(n)`。

    Args:
        rewards: 采样回答的奖励，每条一个。
        greedy_rewards: 同一提示、当前策略的贪心回答的奖励，次序与 `rewards` 对齐。

    Returns:
        每条回答一个优势；使用时广播到它的每个 token。

    References:
        2310.10505 Algorithm 1 第 4 行。
    """
    return (rewards - greedy_rewards).detach()


# --8<-- [end:advantages]


# --8<-- [start:token_advantages]
def remax_token_advantages(
    token_rewards: Float[Tensor, "B T"],
    greedy_rewards: Float[Tensor, " B"],
    response_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, "B T"]:
    r"""奖励逐 token 给出（例如含 KL）时的优势：从当前 token 累加到结尾，再减一次基线。

    $$\hat A_t=\sum_{t'\ge t}r_{t'}-r(x,\hat y)$$

    注意：先累加再减。每个 token 先减 $b$ 再累加，会多扣 $b$ 乘剩余长度，与采样到的长度有关，有偏。

    Args:
        token_rewards: 逐 token 的奖励；只有整条分数时放在最后一个 token 上。
        greedy_rewards: 贪心回答的总奖励，每个提示一个数。
        response_mask: 真表示模型生成的 token；填充与工具返回为假。

    Returns:
        逐 token 的优势，掩码为假处是 0。

    References:
        verl 0.9.1 `compute_remax_outcome_advantage`，掩码为真处一致；夹在中间的假位置，它留下未减基线的回报。
    """
    rewards = token_rewards.masked_fill(~response_mask, 0.0)
    returns = rewards.flip(-1).cumsum(-1).flip(-1)  # (B, T)
    advantages = returns - greedy_rewards[:, None]
    return advantages.masked_fill(~response_mask, 0.0).detach()


# --8<-- [end:token_advantages]


# --8<-- [start:loss]
def remax_loss(
    log_probs: Float[Tensor, "B T"],
    rewards: Float[Tensor, " B"],
    greedy_rewards: Float[Tensor, " B"],
    response_mask: Bool[Tensor, "B T"],
) -> Float[Tensor, ""]:
    r"""论文里的 ReMax 损失：优势乘整条回答的对数概率，再对回答平均。

    $$\mathcal L=-\frac1B\sum_i\big(r(x_i,y_i)-r(x_i,\hat y_i)\big)\sum_t\log\pi_\theta(y_{i,t}\mid x_i,y_{i,<t})$$

    注意：对 token 求和，不按长度平均；按长度平均后，减基线会改变期望梯度。

    Args:
        log_probs: 当前策略对采样 token 的对数概率，带梯度；贪心回答不进这里。
        rewards: 采样回答的奖励。
        greedy_rewards: 贪心回答的奖励。
        response_mask: 真表示回答里的 token。

    Returns:
        标量；数值没有意义，梯度的期望是 $-\nabla_\theta\mathbb E[r]$。

    References:
        2310.10505 Algorithm 1 第 4 至 6 行。官方代码改为除以全批 token 数，并带折扣。
    """
    advantages = remax_advantages(rewards, greedy_rewards)
    return reinforce_loss(log_probs, advantages, response_mask).mean()


# --8<-- [end:loss]


# --8<-- [start:variance]
def baseline_gradient_variance(
    probs: Float[Tensor, " V"],
    rewards: Float[Tensor, " V"],
    scores: Float[Tensor, "V D"],
    *,
    baseline: float,
) -> Float[Tensor, ""]:
    r"""一条样本的梯度估计 $(r-b)\,s$ 的方差，对全部回答精确求和。

    $$\mathbb E[(r-b)^2\lVert s\rVert^2]-\lVert\nabla J\rVert^2$$

    注意：$b$ 必须与采到哪条回答无关。它是 $b$ 的二次函数，超出最小值的部分是 $\mathbb E\lVert s\rVert^2\,(b-b^*)^2$。

    Args:
        probs: 每种回答的概率，和为 1。
        rewards: 每种回答的奖励。
        scores: 每种回答的得分函数，第二轴是参数。
        baseline: 常数基线 $b$，与奖励同单位。

    Returns:
        协方差矩阵的迹。

    References:
        最小值点见 `snippets.rl.rloo.optimal_constant_baseline`。
    """
    true_gradient = (probs * rewards) @ scores  # (D)
    second_moment = (probs * (rewards - baseline).square() * scores.square().sum(dim=1)).sum()
    return second_moment - true_gradient.square().sum()


def leave_one_out_gradient_variance(
    probs: Float[Tensor, " V"],
    rewards: Float[Tensor, " V"],
    scores: Float[Tensor, "V D"],
    *,
    group_size: int,
) -> Float[Tensor, ""]:
    r"""RLOO 一组 $G$ 条的平均梯度的方差，闭式，用来在同样的生成量下与 ReMax 比。

    $$\frac1G\Big[\operatorname{Var}_{\bar r}+\frac{\mathbb E\lVert s\rVert^2\operatorname{Var}r+\lVert\nabla J\rVert^2}{G-1}\Big]$$

    注意：$\operatorname{Var}_{\bar r}$ 是以 $\mathbb E[r]$ 为基线的单样本方差；后一项是基线自身的噪声。

    Args:
        probs: 每种回答的概率，和为 1。
        rewards: 每种回答的奖励。
        scores: 每种回答的得分函数，第二轴是参数。
        group_size: 每个提示采样的条数 $G$，至少为 2。

    Returns:
        协方差矩阵的迹。

    References:
        推导见页面；测试逐一枚举所有的组来核对。
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}：留一基线至少要 2 条回答；只采 1 条请用贪心基线。")
    mean = (probs * rewards).sum()
    per_sample = baseline_gradient_variance(probs, rewards, scores, baseline=mean.item())
    reward_variance = (probs * (rewards - mean).square()).sum()
    score_square = (probs * scores.square().sum(dim=1)).sum()
    gradient_square = ((probs * rewards) @ scores).square().sum()
    noise = (score_square * reward_variance + gradient_square) / (group_size - 1)
    return (per_sample + noise) / group_size


# --8<-- [end:variance]
