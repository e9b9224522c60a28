r"""RLOO：留一基线的优势，以及把整条回答当成一个动作的 REINFORCE 损失。

页面：docs/rl/rloo.md

不包含：采样与打分、对提示求平均、优势的再归一化（TRL 的 `normalize_advantages` 用批标准差，默认关）。
数据类型：奖励与对数概率用 float32 或 float64，输入什么精度就用什么精度算。

约定：$B=P\cdot G$ 行，同一个提示的 $G$ 条回答必须相邻。$\pi(y\mid x)=\prod_t\pi(y_t\mid x,y_{<t})$ 是整条回答的概率，
所以对数概率一律对 token 求和，不求平均；一条回答一个比值、一个优势、一个损失，形状都是 `(B,)`。

References:
    RLOO，https://arxiv.org/abs/2402.14740 ，§2.3（估计量没有编号）；KL 进奖励是式 (3)，REINFORCE 是式 (6)、(7)。
    留一基线出自 Kool et al. 2019，https://openreview.net/forum?id=r1lgTGL5DE 。
    方差最小的常数基线：Greensmith, Bartlett & Baxter, NeurIPS 2001（期刊版 JMLR 5, 2004）。
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.kl_estimators import kl_k1
from snippets.rl.log_probs import sequence_log_probs

__all__ = [
    "kl_penalized_rewards",
    "leave_one_out_advantages",
    "optimal_constant_baseline",
    "reinforce_loss",
    "rloo_loss",
]


# --8<-- [start:leave_one_out_advantages]
def leave_one_out_advantages(rewards: Float[Tensor, " B"], *, group_size: int) -> Float[Tensor, " B"]:
    r"""留一优势：自己的奖励减去同组其余 $G-1$ 条的平均。

    $$\hat A_i=r_i-\frac1{G-1}\sum_{j\ne i}r_j=\frac{G}{G-1}(r_i-\bar r)$$

    注意：分母是 $G-1$，和里不含自己；也不除以标准差。同组的行必须相邻。

    Args:
        rewards: 每条回答一个标量奖励；要罚 KL 就先减掉，见 `kl_penalized_rewards`。
        group_size: 每个提示的回答数 $G$，至少为 2。

    Returns:
        每条回答一个优势，与奖励同单位；每组之和为 0。

    References:
        2402.14740 §2.3。TRL 1.16 `RLOOTrainer`、verl 0.9.1、OpenRLHF 0.11.2 的 `rloo` 一致（整组都有分时）。
    """
    if group_size < 2:
        raise ValueError(
            f"group_size={group_size}：留一基线是同组其他回答的平均，至少要 2 条。"
            "每个提示只想采 1 条时，改用 ReMax 的贪心基线或整批的平均。"
        )
    if len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} 行不能分成每组 {group_size} 条，请检查排列与补齐。")
    groups = rewards.view(-1, group_size)  # (P, G)
    baselines = (groups.sum(dim=1, keepdim=True) - groups) / (group_size - 1)
    return (groups - baselines).flatten()  # (B)


# --8<-- [end:leave_one_out_advantages]


# --8<-- [start:kl_penalized_rewards]
def kl_penalized_rewards(
    rewards: Float[Tensor, " B"],
    log_probs: Float[Tensor, "B T"],
    ref_log_probs: Float[Tensor, "B T"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    kl_coef: float = 0.05,
) -> Float[Tensor, " B"]:
    r"""把整条回答的 KL 罚进奖励，在减基线之前用。

    $$R_i=r_i-\beta\sum_t k_{1,t}=r_i-\beta\log\frac{\pi(y_i\mid x)}{\pi_{\text{ref}}(y_i\mid x)}$$

    注意：逐 token 的 $k_1$ 求和而不是平均，可以为负；结果当常数用，不带梯度。

    Args:
        rewards: 奖励模型或规则给的分。
        log_probs: 采样时的策略对已采样 token 的对数概率。
        ref_log_probs: 参考策略的对数概率。
        loss_mask: 真表示回答里的 token。
        kl_coef: $\beta$，每奈特扣多少奖励；论文取 0.03 或 0.10，默认值是 TRL 1.16 的 0.05。

    Returns:
        每条回答一个扣过 KL 的奖励。

    References:
        2402.14740 式 (3)；TRL 1.16 `RLOOTrainer._generate_and_score_completions`。OpenRLHF 0.11.2 在减基线之后才扣。
    """
    k1 = kl_k1(log_probs, ref_log_probs).masked_fill(~loss_mask, 0.0)
    return rewards - kl_coef * k1.sum(dim=1).detach()


# --8<-- [end:kl_penalized_rewards]


# --8<-- [start:losses]
def reinforce_loss(
    log_probs: Float[Tensor, "B T"], advantages: Float[Tensor, " B"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, " B"]:
    r"""论文里的 RLOO：整条回答一个动作的 REINFORCE，没有比值也没有裁剪。

    $$\ell_i=-\hat A_i\log\pi_\theta(y_i\mid x)$$

    注意：损失的数值没有意义，有意义的只是梯度；样本必须来自当前策略。

    Args:
        log_probs: 当前策略的逐 token 对数概率，带梯度。
        advantages: 每条回答一个优势，在这里切断梯度。
        loss_mask: 真表示回答里的 token。

    Returns:
        每条回答一个损失，由调用者对 B 平均。

    References:
        2402.14740 式 (6)、(7) 与 §2.3。
    """
    return -advantages.detach() * sequence_log_probs(log_probs, loss_mask)


def rloo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " B"]:
    r"""TRL 的 RLOO：整条回答的重要性比值加 PPO 裁剪，一条回答就是「一个 token」。

    $$
    \ell_i=-\min\big(\rho_i\hat A_i,\ \operatorname{clip}(\rho_i)\hat A_i\big),\qquad
    \rho_i=\exp\sum_t\log\frac{\pi_\theta(y_{i,t})}{\pi_{\text{old}}(y_{i,t})}
    $$

    注意：比值是逐 token 比值的乘积，越长越容易出界；一出界，整条回答都没有梯度。

    Args:
        log_probs: 当前策略的逐 token 对数概率，带梯度。
        old_log_probs: 采样时策略的逐 token 对数概率。
        advantages: 每条回答一个优势。
        loss_mask: 真表示回答里的 token。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。

    Returns:
        每条回答一个损失；$\rho=1$ 时梯度与 `reinforce_loss` 相同。

    References:
        TRL 1.16 `RLOOTrainer._compute_loss`（再对 B 平均）。论文没有比值与裁剪。
    """
    logps = sequence_log_probs(log_probs, loss_mask)[:, None]  # (B, 1)
    old_logps = sequence_log_probs(old_log_probs, loss_mask)[:, None].detach()
    losses = clipped_surrogate_loss(
        logps, old_logps, advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )
    return losses[:, 0]


# --8<-- [end:losses]


def optimal_constant_baseline(
    probs: Float[Tensor, " V"], rewards: Float[Tensor, " V"], scores: Float[Tensor, "V D"]
) -> Float[Tensor, ""]:
    r"""让梯度估计的总方差最小的常数基线，需要知道全部动作。

    $$b^*=\frac{\mathbb E[\lVert s\rVert^2 r]}{\mathbb E[\lVert s\rVert^2]},\qquad s=\nabla_\theta\log\pi_\theta(y)$$

    注意：它不是 $\mathbb E[r]$，是按得分的范数加权的平均；「总方差」是协方差矩阵的迹。

    Args:
        probs: 每个动作的概率，和为 1。
        rewards: 每个动作的奖励。
        scores: 每个动作的得分函数 $s$，第二轴是参数。

    Returns:
        标量 $b^*$，与奖励同单位。

    References:
        对 $b$ 求导 $\mathbb E[\lVert s\rVert^2(r-b)^2]$ 即得；任一 $b$ 的方差是
        最优方差加 $(b-b^*)^2\,\mathbb E[\lVert s\rVert^2]/G$（Greensmith et al. 2001）。
    """
    weights = probs * scores.square().sum(dim=1)
    return (weights * rewards).sum() / weights.sum()
