r"""PPO 的裁剪代理损失，以及双侧裁剪（dual clip）、裁剪比例、CISPO 和价值裁剪。

页面：docs/rl/clip.md

不包含：优势的计算（GAE、组内归一化）、KL 项、熵项，以及把逐 token 损失聚合成标量的那一步。
所有损失都不做归约，返回形状 `(B, T)`；输入的对数概率是 float32 或 float64，原样计算，不转换类型。

记号：$\rho=\pi_\theta/\pi_{\text{old}}$ 是逐 token 的重要性比值，$\hat A$ 是优势，$\epsilon_{\text{low}}$、
$\epsilon_{\text{high}}$ 是裁剪宽度，区间为 $[1-\epsilon_{\text{low}},1+\epsilon_{\text{high}}]$。

References:
    PPO，https://arxiv.org/abs/1707.06347 ，式 (7)。
    DAPO，https://arxiv.org/abs/2503.14476 ，式 (10)：上下宽度不同。
    MiniMax-M1，https://arxiv.org/abs/2506.13585 ，式 (4)(5) 是 CISPO，式 (7) 是 PPO 隐含的掩码。
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "clipped_surrogate_loss",
    "dual_clip_loss",
    "clipped_tokens",
    "clip_fraction",
    "cispo_loss",
    "clipped_value_loss",
]


def _check_widths(clip_low: float, clip_high: float) -> None:
    if clip_low < 0 or clip_high < 0:
        raise ValueError(
            f"裁剪宽度不能为负：clip_low={clip_low}，clip_high={clip_high}。"
            "它们是 ε 而不是区间端点，区间是 [1 - clip_low, 1 + clip_high]。"
        )


# --8<-- [start:clipped_surrogate_loss]
def clipped_surrogate_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, "B T"]:
    r"""PPO 的裁剪代理损失（逐 token，不归约）。

    $$
    \ell=-\min\big(\rho\hat A,\ \operatorname{clip}(\rho,1-\epsilon_{\text{low}},1+\epsilon_{\text{high}})\hat A\big)
    $$

    注意：先各自乘优势再取 min，顺序不能换。梯度只在 $\hat A>0,\rho>1+\epsilon_{\text{high}}$ 与
    $\hat A<0,\rho<1-\epsilon_{\text{low}}$ 两种情形为零，其余处处是 $-\rho\hat A$；
    $\rho$ 恰好等于端点时，PyTorch 给出的也是 $-\rho\hat A$。

    Args:
        log_probs: 当前策略对已采样 token 的对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给同一批 token 的对数概率，不带梯度。
        advantages: 优势，每个 token 一个值 `(B, T)`，或每条回答一个值 `(B, 1)`。
            一维的 `(B,)` 不接受：当 B 等于 T 时它会沿着错误的轴广播而不报错，请先写成 `advantages[:, None]`。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$，无单位。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$，无单位；DAPO 取 0.28。

    Returns:
        逐 token 的损失 `(B, T)`；掩码与平均由调用者完成。

    References:
        PPO 式 (7)，https://arxiv.org/abs/1707.06347 。与 TRL 1.16 `GRPOTrainer._compute_loss`
        （`loss_type="grpo"`、`delta=None`）的逐 token 损失一致。verl 0.9.0 的 `vanilla` 与 OpenRLHF 0.11.0
        另外把 $\log\rho$ 截到 ±20；verl 还总是叠加 `dual_clip_loss` 的上限。
    """
    _check_widths(clip_low, clip_high)
    ratio = (log_probs - old_log_probs).exp()
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    return -torch.minimum(ratio * advantages, clipped_ratio * advantages)


# --8<-- [end:clipped_surrogate_loss]


# --8<-- [start:dual_clip_loss]
def dual_clip_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float = 3.0,
) -> Float[Tensor, "B T"]:
    r"""在 PPO 裁剪之上，给负优势 token 的损失再加一个上限 $c\lvert\hat A\rvert$，即双侧裁剪（dual clip）。

    $$
    \ell=\begin{cases}
    \min\big(\ell_{\text{PPO}},\ c\lvert\hat A\rvert\big) & \hat A<0\\
    \ell_{\text{PPO}} & \hat A\ge 0
    \end{cases}
    $$

    注意：对目标函数而言它是下限，写成损失就是上限，所以这里是 min 而不是 max；正优势不受影响。
    $\rho$ 恰好等于 $c$ 时 `torch.minimum` 把梯度平分，得到 $-\rho\hat A/2$。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        old_log_probs: 更新前策略的对数概率，不带梯度。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。
        dual_clip: 上限系数 $c$，必须大于 1。

    Returns:
        逐 token 的损失 `(B, T)`。

    References:
        https://arxiv.org/abs/1912.09729 。与 verl 0.9.0 的 `vanilla`（`clip_ratio_c`，默认 3.0）和 OpenRLHF 0.11.0
        的 `PolicyLoss(dual_clip=...)` 一致（除 $\lvert\log\rho\rvert>20$ 外）。TRL 1.16 的 `delta` 先把 $\rho$ 截到 $\delta$
        再取 min：$\delta\ge1+\epsilon_{\text{high}}$ 时与 $c=\delta$ 等价（只有恰好 $\rho=\delta$ 处它给完整的梯度），更小则不等价。
    """
    if dual_clip <= 1:
        raise ValueError(
            f"dual_clip={dual_clip}：上限系数必须大于 1，否则 ρ=1 的 token 也拿不到梯度。常用 3.0。"
        )
    loss = clipped_surrogate_loss(
        log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high
    )
    return torch.where(advantages < 0, torch.minimum(loss, -dual_clip * advantages), loss)


# --8<-- [end:dual_clip_loss]


# --8<-- [start:clip_fraction]
def clipped_tokens(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Bool[Tensor, "B T"]:
    r"""哪些 token 的梯度被 PPO 裁剪拿掉。

    $$
    \big(\hat A>0\ \land\ \rho>1+\epsilon_{\text{high}}\big)\ \lor\ \big(\hat A<0\ \land\ \rho<1-\epsilon_{\text{low}}\big)
    $$

    注意：不是「比值落在区间外」的 token。另外两种区间外的情形梯度还在，不算。

    Args:
        log_probs: 当前策略的对数概率。
        old_log_probs: 更新前策略的对数概率。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。

    Returns:
        布尔张量 `(B, T)`，真表示 `clipped_surrogate_loss` 在该处的梯度因裁剪而为零。

    References:
        MiniMax-M1 式 (7) 的掩码取反，https://arxiv.org/abs/2506.13585 。
    """
    _check_widths(clip_low, clip_high)
    ratio = (log_probs - old_log_probs).exp()
    return ((advantages > 0) & (ratio > 1 + clip_high)) | ((advantages < 0) & (ratio < 1 - clip_low))


def clip_fraction(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    loss_mask: Float[Tensor, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> Float[Tensor, ""]:
    r"""裁剪比例：计入损失的 token 中，梯度被裁剪拿掉的占多少。

    $$
    \frac{\sum_{b,t} m_{b,t}\,\mathbb 1[\text{token }(b,t)\text{ 被裁剪}]}{\sum_{b,t} m_{b,t}}
    $$

    注意：双侧裁剪拿掉的梯度不在内（verl 单独记 `pg_clipfrac_lower`）；掩码全零时结果是 NaN。

    Args:
        log_probs: 当前策略的对数概率。
        old_log_probs: 更新前策略的对数概率。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。
        loss_mask: 1 表示该 token 计入损失，0 表示不计。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。

    Returns:
        标量，介于 0 与 1 之间，不带梯度。

    References:
        与 TRL 1.16 的 `clip_ratio/region_mean`、verl 0.9.0 的 `actor/pg_clipfrac`、OpenRLHF 0.11.0 的 `clip_ratio`
        同一口径。OpenAI baselines、Spinning Up、Stable-Baselines3 数的是 $\lvert\rho-1\rvert>\epsilon$，包括梯度还在的 token。
    """
    clipped = clipped_tokens(log_probs, old_log_probs, advantages, clip_low=clip_low, clip_high=clip_high)
    return (clipped * loss_mask).sum() / loss_mask.sum()


# --8<-- [end:clip_fraction]


# --8<-- [start:cispo_loss]
def cispo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, "B T"] | Float[Tensor, "B 1"],
    *,
    clip_high: float,
    clip_low: float = 1.0,
) -> Float[Tensor, "B T"]:
    r"""CISPO：裁剪的是停了梯度的重要性权重，任何 token 的梯度都不会消失。

    $$
    \ell=-\operatorname{sg}\big[\operatorname{clip}(\rho,1-\epsilon_{\text{low}},1+\epsilon_{\text{high}})\big]\,
    \hat A\,\log\pi_\theta
    $$

    注意：损失的数值没有意义（它随 $\log\pi_\theta$ 平移），有意义的只是梯度 $-\operatorname{clip}(\rho)\hat A$。

    Args:
        log_probs: 当前策略的对数概率，带梯度。
        old_log_probs: 更新前策略的对数概率，不带梯度。
        advantages: 优势，`(B, T)` 或 `(B, 1)`。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$；论文第 3.1 节没有给数值，所以没有默认值。
        clip_low: 下侧宽度；默认 1.0 即不设下界（$\rho$ 总是正的），与论文的做法相同。

    Returns:
        逐 token 的损失 `(B, T)`。

    References:
        MiniMax-M1 式 (4)(5)，https://arxiv.org/abs/2506.13585 。verl 0.9.0 的 `cispo` 两侧都截，
        对应 `clip_low=clip_ratio_low`；TRL 1.16 的 `epsilon_high` 是权重上限本身，对应 `clip_high=epsilon_high - 1`。
    """
    _check_widths(clip_low, clip_high)
    ratio = (log_probs - old_log_probs).exp()
    weight = ratio.clamp(1 - clip_low, 1 + clip_high).detach()
    return -weight * advantages * log_probs


# --8<-- [end:cispo_loss]


# --8<-- [start:clipped_value_loss]
def clipped_value_loss(
    values: Float[Tensor, "B T"],
    old_values: Float[Tensor, "B T"],
    returns: Float[Tensor, "B T"],
    *,
    value_clip: float = 0.2,
) -> Float[Tensor, "B T"]:
    r"""价值函数的裁剪损失（逐 token，不归约，没有 1/2）。

    $$
    \ell=\max\Big((V-R)^2,\ \big(\operatorname{clip}(V,V_{\text{old}}-\epsilon_v,V_{\text{old}}+\epsilon_v)-R\big)^2\Big)
    $$

    注意：这里是损失，所以悲观的一侧是 max。$\epsilon_v$ 与价值同单位，随奖励的尺度变化。

    Args:
        values: 当前价值估计 $V$，带梯度。
        old_values: 更新前的价值估计 $V_{\text{old}}$，不带梯度。
        returns: 回归目标 $R$，与价值同单位。
        value_clip: 允许价值移动的宽度 $\epsilon_v$，与价值同单位。

    Returns:
        逐 token 的损失 `(B, T)`。

    References:
        PPO 论文的公式里没有这一项；它来自 OpenAI baselines `ppo2/model.py`（与策略共用 cliprange）。
        verl 0.9.0 的 `compute_value_loss` 是它的一半，`cliprange_value` 默认 0.5；OpenRLHF 0.11.0 的 `ValueLoss` 同样取 max。
    """
    if value_clip < 0:
        raise ValueError(f"value_clip={value_clip} 不能为负：它是价值允许移动的宽度。")
    clipped_values = old_values + (values - old_values).clamp(-value_clip, value_clip)
    return torch.maximum((values - returns) ** 2, (clipped_values - returns) ** 2)


# --8<-- [end:clipped_value_loss]
