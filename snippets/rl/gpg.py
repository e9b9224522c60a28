r"""GPG（Group Policy Gradient）：组均值基线的策略梯度，加上零方差组的修正系数 $\alpha$。

页面：docs/rl/gpg.md

不包含：采样与打分、有效组比例低于 $\beta_{\text{th}}$ 时的补采、任何比值、裁剪、KL、价值模型。
数据类型：奖励与对数概率用 float32 或 float64，输入什么精度就用什么精度算。

约定：每 $G$ 行是同一道题的一组，同组相邻。本页沿用论文的字母：$B$ 是一批里的**组数**（别页写 $P$；代码里行数仍写 `B`），
$M$ 是其中奖励全部相同、优势为 0 的组数。每组都是 $G$ 条，所以按组数还是按「组里的样本数」算，$B/(B-M)$ 是同一个数。

三件容易说错的事（推导与枚举见页面和测试）：

1. 不修正时 $\mathbb E[g]=\frac{G-1}G\nabla J$：无效组的 0 是估计的一部分，它不让方向变偏，只是一批里有效组少时步子小。
   $\alpha g$ 估计的是「给定有效」的条件均值；题目独立同分布抽取时它等于 $\nabla J$ 乘一个正数。
2. 式 5 的分母是一个组自己的 token 数，再对组平均，这时 $\alpha$ 恰好抵消无效组。换成整批的 token 平均，无效组占的是
   token 份额而不是组数份额，$\alpha$ 只在各组 token 数相同时才对得上。
3. 没有重要性比值，梯度只在样本来自当前策略时才对：一批样本只更新一次。

References:
    GPG，https://arxiv.org/abs/2504.02546 ：目标式 5，优势式 6，$\alpha$ 式 7、8，算法 1。
    作者的实现：AMAP-ML/GPG（提交 e096da8）；verl 0.9.1 `compute_gpg_outcome_advantage`、`compute_policy_loss_gpg`。
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.dapo import keep_groups
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss

__all__ = ["gpg_alpha", "gpg_advantages", "policy_gradient_loss", "gpg_loss", "nonzero_reward_alpha"]


# --8<-- [start:advantages]
def gpg_alpha(rewards: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, ""]:
    r"""零方差组的修正系数：总组数除以有效组数。

    $$\alpha=\frac{B}{B-M}$$

    注意：一个有效组都没有时返回 0（这批没有信号，应跳过更新或补采），不是 inf，也不是 1。

    Args:
        rewards: 每条回答一个标量奖励，同组相邻。
        group_size: 每组的回答数 $G$，至少为 2。

    Returns:
        标量 $\alpha$：有有效组时不小于 1。

    References:
        式 7。奖励整体加常数、乘非零数时不变；全批都是无效组时论文没有规定。
    """
    informative = keep_groups(rewards, group_size=group_size)  # (B)
    if not informative.any():
        return rewards.new_zeros(())
    return 1 / informative.to(rewards.dtype).mean()


def gpg_advantages(
    rewards: Float[Tensor, " B"], *, group_size: int, scale_by_std: bool = False, eps: float = 1e-6
) -> Float[Tensor, " B"]:
    r"""GPG 的优势：减组均值，除以 $F_{\text{norm}}$，再乘 $\alpha$。

    $$\alpha\hat A_i=\alpha\,\frac{r_i-\operatorname{mean}(r_1,\dots,r_G)}{F_{\text{norm}}}$$

    注意：不要 $\alpha$ 就直接用 `group_advantages`。无效组的优势是精确的 0：相同的小数减均值可能剩下舍入误差。

    Args:
        rewards: 每条回答一个标量奖励，同组相邻。
        group_size: 每组的回答数 $G$。
        scale_by_std: 假是 $F_{\text{norm}}=1$（论文的最终配方），真是组标准差。
        eps: 加在标准差上的数，只在 `scale_by_std` 为真时用到。

    Returns:
        每条回答一个优势，广播到它的每个 token。

    References:
        式 6、7。verl 0.9.1 的 $\alpha$ 是另一个量，见 `nonzero_reward_alpha`。
    """
    alpha = gpg_alpha(rewards, group_size=group_size)
    advantages = group_advantages(rewards, group_size=group_size, eps=eps, scale_by_std=scale_by_std)
    return alpha * advantages.masked_fill(~keep_groups(rewards, group_size=group_size), 0.0)


# --8<-- [end:advantages]


# --8<-- [start:loss]
def policy_gradient_loss(
    log_probs: Float[Tensor, "B T"], advantages: Float[Tensor, " B"]
) -> Float[Tensor, "B T"]:
    r"""逐 token 的策略梯度损失，不归约。

    $$\ell_{i,t}=-\hat A_i\log\pi_\theta(o_{i,t}\mid q,o_{i,<t})$$

    注意：没有比值，损失的数值没有意义，有意义的只是梯度；样本必须来自当前策略。

    Args:
        log_probs: 当前策略对已采样 token 的对数概率，带梯度。
        advantages: 每条回答一个优势，不带梯度。

    Returns:
        逐 token 的损失。

    References:
        式 5 方括号里的一项；verl 0.9.1 的 `gpg` 损失逐 token 与此相同。
    """
    return -advantages[:, None] * log_probs


def gpg_loss(
    log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    group_size: int,
) -> Float[Tensor, ""]:
    r"""GPG 的损失：每组对自己的全部 token 平均，再对组平均。

    $$\frac1B\sum_{b=1}^{B}\frac1{\sum_{i\in b}\lvert o_i\rvert}\sum_{i\in b}\sum_t\ell_{i,t}$$

    注意：作者的数学训练代码与 verl 的默认值都是整批 token 平均，那时 $\alpha$ 与无效组的 token 份额对不上。

    Args:
        log_probs: 当前策略对已采样 token 的对数概率，带梯度。
        advantages: 来自 `gpg_advantages`（已乘 $\alpha$）。
        loss_mask: 真表示回答里的 token。整组被遮住时这组不进分母，而 $\alpha$ 仍数它，请先丢掉。
        group_size: 每组的回答数 $G$。

    Returns:
        要最小化的标量（论文把式 5 写作 $\mathcal J$，里面已带负号）。

    References:
        式 5、8。
    """
    token_losses = policy_gradient_loss(log_probs, advantages)
    tokens_per_group = group_size * log_probs.shape[1]
    return aggregate_loss(
        token_losses.reshape(-1, tokens_per_group),  # 一行是一组：(B/G, G·T)
        loss_mask.reshape(-1, tokens_per_group),
        mode="seq-mean-token-mean",
    )


# --8<-- [end:loss]


# --8<-- [start:nonzero_reward_alpha]
def nonzero_reward_alpha(rewards: Float[Tensor, " B"]) -> Float[Tensor, ""]:
    r"""verl 的系数：总样本数除以奖励非零的样本数。只供对照，不是论文的 $\alpha$。

    $$\frac{\text{样本数}}{\max(1,\ \text{奖励非零的样本数})}$$

    注意：0/1 奖励时它是正确率的倒数，±1 奖励时恒为 1；与组无关，奖励加一个常数它就变。

    Args:
        rewards: 每条回答一个标量奖励。

    Returns:
        标量系数。

    References:
        verl 0.9.1 `compute_gpg_outcome_advantage` 里的 `bsz / count_nonzero(scores)`。
    """
    return rewards.new_tensor(len(rewards)) / rewards.count_nonzero().clamp(min=1)


# --8<-- [end:nonzero_reward_alpha]
