r"""后训练各方法的参照：best-of-n 的精确分布、奖励模型的损失、同策略蒸馏的损失。

页面：docs/rl/post-training.md

不包含：KL 正则的最优策略（`snippets/rl/dpo.py` 的 `kl_regularized_optimum`）、DPO、PPO、GRPO 的损失
（`dpo.py`、`ppo.py`、`grpo.py`）、采样与打分、SFT 的交叉熵。
数据类型：输入什么精度就用什么精度算，不静默转换。

best-of-n 的闭式只在答案可以枚举时算得出来，语言模型枚举不完；它的用处是给小例子一个精确的真值。

best-of-n 的推导：记 $F(y)$ 为参考策略抽到奖励不超过 $r(y)$ 的概率，$F^-(y)$ 为严格小于的概率。
$n$ 条里的最高分恰是 $r(y)$ 的概率是 $F(y)^n-F^-(y)^n$；给定最高分，同分的胜者独立地服从
$\pi_{\text{ref}}$ 在这一档上的条件分布，所以再乘 $\pi_{\text{ref}}(y)/(F(y)-F^-(y))$。

References:
    - Ouyang et al. 2022，[2203.02155](https://arxiv.org/abs/2203.02155)：式 1（奖励模型）。
    - Beirami et al. 2024，[2401.01879](https://arxiv.org/abs/2401.01879)：best-of-n 的 KL 公式只是上界。
    - Agarwal et al. 2024，[2306.13649](https://arxiv.org/abs/2306.13649)：在学生自己的样本上蒸馏（GKD）。
"""

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.kl_estimators import kl_categorical
from snippets.rl.masking import masked_mean

__all__ = ["best_of_n_policy", "bradley_terry_loss", "distillation_loss"]


# --8<-- [start:best_of_n_policy]
def best_of_n_policy(
    ref_probs: Float[Tensor, " V"], rewards: Float[Tensor, " V"], *, n: int
) -> Float[Tensor, " V"]:
    r"""从参考策略独立抽 n 个、留下奖励最高的一个（同分随机），这样得到的分布。

    $$\pi_n(y)=\big(F(y)^n-F^-(y)^n\big)\,\frac{\pi_{\text{ref}}(y)}{F(y)-F^-(y)}$$

    注意：只看奖励的次序，不看数值；同分的答案之间保持参考策略的比例。

    Args:
        ref_probs: 参考策略的概率，和为 1。
        rewards: 每个答案的奖励，可以有同分。
        n: 抽几个，至少为 1；1 就是参考策略。

    Returns:
        精确的概率，没有蒙特卡洛误差。

    References:
        2401.01879；推导见模块说明。
    """
    if n < 1:
        raise ValueError(f"n={n}：至少要抽 1 个。")
    same = (rewards[:, None] == rewards).to(ref_probs)  # (V, V)
    lower = (rewards[:, None] > rewards).to(ref_probs)
    below, tie = lower @ ref_probs, same @ ref_probs  # F⁻ 与这一档的概率 F − F⁻
    top = (below + tie) ** n - below**n
    # 这一档概率为 0 时分子恰好是 0，分母换成 1，避免 0/0
    return top * ref_probs / tie.where(tie > 0, 1)


# --8<-- [end:best_of_n_policy]


# --8<-- [start:bradley_terry_loss]
def bradley_terry_loss(rewards: Float[Tensor, "P K"]) -> Float[Tensor, ""]:
    r"""奖励模型的损失：每个提示 K 条回答已按偏好从好到坏排好，对全部 $\binom K2$ 对取平均。

    $$\mathcal L=-\frac1{\binom K2}\sum_{i<j}\log\sigma(r_i-r_j)$$

    注意：只由同一提示内的差决定，每个提示加一个常数不变，所以分数没有绝对零点。

    Args:
        rewards: 奖励模型的标量输出，第 0 列最好。

    Returns:
        对提示与回答对取平均的损失。

    References:
        2203.02155 式 1；K=2 时与 TRL 1.16 `RewardTrainer`（无 margin、无 centering）相同。
    """
    num_ranked = rewards.shape[1]
    if num_ranked < 2:
        raise ValueError(f"K={num_ranked}：至少要两条回答才能比较。")
    better, worse = torch.triu_indices(num_ranked, num_ranked, offset=1)
    return -F.logsigmoid(rewards[:, better] - rewards[:, worse]).mean()


# --8<-- [end:bradley_terry_loss]


# --8<-- [start:distillation_loss]
def distillation_loss(
    logits: Float[Tensor, "B T V"], teacher_logits: Float[Tensor, "B T V"], loss_mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    r"""同策略蒸馏：前缀由学生采样，每个位置对整个词表算学生到老师的反向 KL，再对 token 平均。

    $$\mathcal L=\frac1N\sum_{t}\mathrm{KL}\big(\pi_\theta(\cdot\mid y_{<t})\,\Vert\,\pi_T(\cdot\mid y_{<t})\big)$$

    注意：前缀当常数，不为「现在的 token 会改变后面的前缀」负责；老师不带梯度。

    Args:
        logits: 学生的 logits，带梯度。
        teacher_logits: 老师在同样前缀上的 logits，在这里切断梯度。
        loss_mask: 真表示学生生成的 token；N 是它们的个数。

    Returns:
        标量损失（nat）。

    References:
        2306.13649 的反向 KL 情形；TRL 1.16 `generalized_jsd_loss(beta=1)` 除以 token 数时相同。
    """
    return masked_mean(kl_categorical(logits, teacher_logits.detach()), loss_mask)


# --8<-- [end:distillation_loss]
