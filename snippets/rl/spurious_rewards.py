r"""随机奖励下裁剪留下的偏置：奖励与回答无关时，裁剪代理目标的期望梯度系数与期望梯度。

页面：docs/rl/spurious-rewards.md

不包含：裁剪损失本身（`clip.py`）、组内归一化（`grpo.py`）、采样与训练循环（在页面的实验里）。

前提只有两条：$\mathbb E[\hat A]=0$，且 $\hat A$ 与重要性比值 $\rho$ 独立。奖励与回答无关、组完整地落在一个小批里、
每条样本只用一次时，两条都成立，与奖励的概率是不是 ½ 无关；同一批样本用第二遍，独立就不成立了。

References:
    Spurious Rewards，https://arxiv.org/abs/2506.10947 （裁剪偏置；这里写成对优势的一般分布成立的形式）。
    Clip-Low Increases Entropy and Clip-High Decreases Entropy，https://arxiv.org/abs/2509.26114 。
"""

import math

from jaxtyping import Float
from torch import Tensor

__all__ = ["mean_abs_group_advantage", "expected_clipped_coefficient", "expected_logit_gradient"]


def _check(mean_abs_advantage: float, clip_low: float, clip_high: float) -> None:
    if not (clip_low >= 0 and clip_high >= 0):
        raise ValueError(
            f"裁剪宽度不能为负：clip_low={clip_low}，clip_high={clip_high}。它们是 ε，不是区间端点。"
        )
    if not mean_abs_advantage >= 0:
        raise ValueError(f"mean_abs_advantage={mean_abs_advantage}：优势绝对值的期望不能为负。")


def mean_abs_group_advantage(*, group_size: int, probability: float) -> float:
    r"""奖励为 0/1、与回答无关时，组内归一化优势的 $\mathbb E\lvert\hat A\rvert$。

    $$
    \mathbb E\lvert\hat A\rvert=\sum_{k=0}^{G}\binom Gk\gamma^k(1-\gamma)^{G-k}\cdot
    2\sqrt{\frac{k(G-k)(G-1)}{G^3}}
    $$

    注意：$k$ 是组里得 1 分的条数；全对全错的组优势为 0。标准差是样本标准差，没有加 $\varepsilon$。

    Args:
        group_size: 每组的回答数 $G$，至少为 2。
        probability: 每条回答得 1 分的概率 $\gamma$，0 到 1。

    Returns:
        $\mathbb E\lvert\hat A\rvert$，无量纲。

    References:
        优势的定义见 `grpo.py` 的 `group_advantages`（这里 $\varepsilon=0$）。
    """
    if group_size < 2 or not 0 <= probability <= 1:
        raise ValueError(
            f"group_size={group_size}，probability={probability}：组至少 2 条，概率在 0 与 1 之间。"
        )
    return sum(
        math.comb(group_size, k)
        * probability**k
        * (1 - probability) ** (group_size - k)
        * 2
        * math.sqrt(k * (group_size - k) * (group_size - 1) / group_size**3)
        for k in range(group_size + 1)
    )


# --8<-- [start:expected_clipped_coefficient]
def expected_clipped_coefficient(
    ratio: Float[Tensor, " V"],
    *,
    mean_abs_advantage: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " V"]:
    r"""随机奖励下，一个已采样 token 的期望梯度系数（目标对 $\log\pi_\theta$ 求导，正数是推高）。

    $$
    c(\rho)=\begin{cases}
    +\tfrac12\mathbb E\lvert\hat A\rvert\,\rho & \rho<1-\epsilon_{\text{low}}\\
    0 & \text{区间内}\\
    -\tfrac12\mathbb E\lvert\hat A\rvert\,\rho & \rho>1+\epsilon_{\text{high}}
    \end{cases}
    $$

    注意：要求 $\mathbb E[\hat A]=0$ 且 $\hat A$ 与 $\rho$ 独立，不要求对称。

    Args:
        ratio: 重要性比值 $\rho$。
        mean_abs_advantage: $\mathbb E\lvert\hat A\rvert$。
        clip_low: 下侧宽度；1 表示没有下界。
        clip_high: 上侧宽度；无穷表示没有上界。

    Returns:
        每个比值一个系数；损失的系数是它的相反数。

    References:
        2506.10947（裁剪偏置的推导）；系数的逐样本版本见 `clip.py`。
    """
    _check(mean_abs_advantage, clip_low, clip_high)
    below, above = ratio < 1 - clip_low, ratio > 1 + clip_high
    return 0.5 * mean_abs_advantage * ratio * (below.to(ratio.dtype) - above.to(ratio.dtype))


# --8<-- [end:expected_clipped_coefficient]


# --8<-- [start:expected_logit_gradient]
def expected_logit_gradient(
    log_probs: Float[Tensor, " V"],
    old_log_probs: Float[Tensor, " V"],
    *,
    mean_abs_advantage: float = 1.0,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, " V"]:
    r"""随机奖励下，目标对 softmax 的 logits 的期望梯度。

    $$
    g_k=\tfrac12\mathbb E\lvert\hat A\rvert\;\pi_k\big(\mathbb 1[k\in L]-\mathbb 1[k\in U]+\pi(U)-\pi(L)\big)
    $$

    注意：$U$、$L$ 是越过上、下界的 token，$\pi(U)$、$\pi(L)$ 是它们在当前策略下的总概率。

    Args:
        log_probs: 当前策略在整个词表上的对数概率。
        old_log_probs: 采样时的策略在整个词表上的对数概率。
        mean_abs_advantage: $\mathbb E\lvert\hat A\rvert$。
        clip_low: 下侧宽度；1 表示没有下界。
        clip_high: 上侧宽度；无穷表示没有上界。

    Returns:
        每个 logit 一个分量，总和为 0；沿它走是上升。

    References:
        由 `expected_clipped_coefficient` 对采样分布求和得到。
    """
    coefficient = expected_clipped_coefficient(
        (log_probs - old_log_probs).exp(),
        mean_abs_advantage=mean_abs_advantage,
        clip_low=clip_low,
        clip_high=clip_high,
    )
    weight = old_log_probs.exp() * coefficient  # 抽到 k 的概率 × 系数
    return weight - log_probs.exp() * weight.sum()  # Σ_k weight_k ∇log π_k


# --8<-- [end:expected_logit_gradient]
