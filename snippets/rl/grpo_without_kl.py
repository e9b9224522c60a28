r"""GRPO 一步的精确期望方向（带或不带 KL），以及它在 0/1 奖励下停在多高的成功率。

页面：docs/rl/grpo-without-kl.md

不包含：采样、裁剪（每批只更新一次时比值恒为 1，裁剪不起作用）、多 token 的回答。
数据类型：输入什么精度就用什么精度算；页面与测试用 float64。

设定：一个提示，$V$ 条可能的回答，策略是 logits 上的 softmax。$\pi$、$\pi_{\text{ref}}$、奖励 $r$ 的形状都是 $(V,)$，
$u(a)=\mathbb E[\hat A_i\mid o_i=a]$ 是抽到回答 $a$ 时优势的期望（对同组其余 $G-1$ 条取期望）。

- 策略项对 logits 的期望方向是 $\pi\odot u$（组内优势和为 0，所以 $\sum_a\pi(a)u(a)=0$）。
- $k_3$ 当损失，期望梯度是前向 KL 的梯度 $\pi-\pi_{\text{ref}}$；乘上可导比值的 $\rho k_3$ 是反向 KL 的梯度。
- 方向为零给出不动点：前向 $\pi=\pi_{\text{ref}}/(1-u/\beta)$，反向 $\pi\propto\pi_{\text{ref}}e^{u/\beta}$，$u$ 在不动点处取值。
- $\beta=0$ 时只剩 $\pi\odot u=0$：内部的点只有奖励处处相等时才满足，参考策略不再出现在方程里。

References:
    DeepSeekMath 式 3、式 4，https://arxiv.org/abs/2402.03300
    0/1 奖励下成功率的不动点：https://arxiv.org/abs/2503.06639 （反向 KL、组无穷大）
"""

import math
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from snippets.rl.dr_grpo import question_weight
from snippets.rl.grpo import group_advantages

__all__ = ["expected_advantages", "grpo_direction", "fixed_point_success_rate"]


# --8<-- [start:expected_advantages]
def expected_advantages(
    probs: Float[Tensor, " V"],
    rewards: Float[Tensor, " V"],
    *,
    group_size: int,
    scale_by_std: bool = True,
) -> Float[Tensor, " V"]:
    r"""抽到回答 $a$ 时，它的组内优势的期望 $u(a)=\mathbb E[\hat A_i\mid o_i=a]$。

    $$u(a)=\sum_{c}\Pr(c)\;\frac{r(a)-\operatorname{mean}(r(a),c)}{\operatorname{std}(r(a),c)}$$

    $c$ 遍历其余 $G-1$ 条回答的奖励：奖励相同的回答合并，按多项分布加权。

    注意：除以标准差之后 $u$ 与奖励的尺度无关，$\beta$ 的松紧也就与奖励的尺度无关。

    Args:
        probs: 每条回答的概率。
        rewards: 每条回答的奖励；不同的取值越多，枚举越慢。
        group_size: 每个提示的回答数 $G$，至少为 2。
        scale_by_std: 为假时只减均值。

    Returns:
        每条回答一个期望优势，不带梯度。

    References:
        DeepSeekMath §4.1.2 的优势取条件期望；优势由 `group_advantages` 计算。
    """
    values, index = rewards.unique(return_inverse=True)  # (K)、(V)
    value_probs = torch.zeros_like(values).index_add(0, index, probs.detach())  # (K)
    num_values, num_others = len(values), group_size - 1
    draws = list(combinations_with_replacement(range(num_values), num_others))
    rows = torch.tensor(draws, dtype=torch.long)  # (N, G-1)
    counts = torch.stack([(rows == k).sum(dim=1) for k in range(num_values)], dim=1)  # (N, K)
    log_ways = math.lgamma(group_size) - (counts.to(probs.dtype) + 1).lgamma().sum(dim=1)  # 多项系数的对数
    chance = log_ways.exp() * (value_probs**counts).prod(dim=1)  # (N)
    own = values[:, None, None].expand(-1, len(rows), 1)  # (K, N, 1)
    groups = torch.cat([own, values[rows].expand(num_values, -1, -1)], dim=2)  # (K, N, G)
    advantages = group_advantages(groups.flatten(), group_size=group_size, scale_by_std=scale_by_std)
    expected = advantages.view(num_values, -1, group_size)[:, :, 0] @ chance  # (K)，第 0 列是自己
    return expected[index]


# --8<-- [end:expected_advantages]


# --8<-- [start:grpo_direction]
def grpo_direction(
    logits: Float[Tensor, " V"],
    ref_log_probs: Float[Tensor, " V"],
    rewards: Float[Tensor, " V"],
    *,
    group_size: int,
    beta: float = 0.0,
    reverse_kl: bool = False,
    scale_by_std: bool = True,
) -> Float[Tensor, " V"]:
    r"""一次 GRPO 更新对 logits 的期望上升方向（负的损失梯度，$\rho=1$）。

    $$\pi\odot u-\beta\,(\pi-\pi_{\text{ref}})$$

    注意：第二项是 $k_3$ 当损失的梯度，即前向 KL；`reverse_kl=True` 换成 $\rho k_3$ 的反向 KL。

    Args:
        logits: 当前策略的 logits。
        ref_log_probs: 参考策略的对数概率；`beta=0` 时不影响结果。
        rewards: 每条回答的奖励。
        group_size: 每个提示的回答数 $G$。
        beta: KL 系数。
        reverse_kl: 为真时用反向 KL 的梯度。
        scale_by_std: 为假时优势只减均值。

    Returns:
        与 `logits` 同形的上升方向。

    References:
        DeepSeekMath 式 3、式 4；`reverse_kl=True` 对应 TRL 1.16.0 默认的 `use_bias_correction_kl=True`。
    """
    log_probs = logits.log_softmax(dim=-1)
    probs = log_probs.exp()
    u = expected_advantages(probs, rewards, group_size=group_size, scale_by_std=scale_by_std)
    log_ratio = log_probs - ref_log_probs
    if reverse_kl:
        kl_grad = probs * (log_ratio - (probs * log_ratio).sum())
    else:
        kl_grad = probs - ref_log_probs.exp()
    return probs * u - beta * kl_grad


# --8<-- [end:grpo_direction]


# --8<-- [start:fixed_point_success_rate]
def fixed_point_success_rate(
    ref_success_rates: Float[Tensor, " P"], *, beta: float, group_size: int
) -> Float[Tensor, " P"]:
    r"""0/1 奖励、除以标准差、$k_3$ 当损失时，成功率停在哪里。

    $$\beta\,(p-p_{\text{ref}})=w_G(p)\;p\,(1-p)$$

    注意：左边是直线，右边是凹函数，$(p_{\text{ref}},1)$ 里恰有一个根，二分即可；$\beta\to0$ 时根趋于 1。

    Args:
        ref_success_rates: 参考策略的成功率，严格在 0 与 1 之间。
        beta: KL 系数，必须为正。
        group_size: 每个提示的回答数 $G$。

    Returns:
        不动点处的成功率。

    References:
        由 `grpo_direction` 的方向为零推出；反向 KL 的对应式见 https://arxiv.org/abs/2503.06639 。
    """
    if beta <= 0:
        raise ValueError(f"beta={beta}：没有 KL 就没有内部的不动点，成功率趋于 1；请传正数。")
    low, high = ref_success_rates, torch.ones_like(ref_success_rates)
    for _ in range(60):  # 区间每次减半，60 次已到 float64 的精度
        p = (low + high) / 2
        rising = question_weight(p, group_size=group_size) * p * (1 - p) > beta * (p - ref_success_rates)
        low, high = torch.where(rising, p, low), torch.where(rising, high, p)
    return (low + high) / 2


# --8<-- [end:fixed_point_success_rate]
