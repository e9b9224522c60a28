r"""DAPO 的四处改动：更高裁剪、动态采样、token 级损失、软超长惩罚。

页面：docs/rl/dapo.md

不包含：采样与补采的循环（`keep_groups` 只回答哪些组该留）、判分、过长过滤（把截断回答的 `loss_mask` 置假即可）。
裁剪、组内归一化与聚合直接用 clip.py、grpo.py、masking.py，所以这里只剩 DAPO 与 GRPO 不同的几行。

约定：$B=P\cdot G$ 行，同一个提示的 $G$ 条回答必须相邻。对数概率与奖励输入什么精度就用什么精度算；
$\lvert y\rvert$ 是回答的 token 数，$L_{\max}$ 是生成上限，$L_{\text{cache}}$ 是上限之前的缓冲区长度。

References:
    DAPO，https://arxiv.org/abs/2503.14476 ：目标式 8、9，更高裁剪式 10，动态采样式 11，token 级损失式 12，
    软超长惩罚式 13，超参数第 4.1 节。
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss

__all__ = [
    "dapo_loss",
    "keep_groups",
    "dapo_advantages",
    "soft_overlong_penalty",
    "wasted_group_probability",
]


# --8<-- [start:dapo_loss]
def dapo_loss(
    log_probs: Float[Tensor, "B T"],
    old_log_probs: Float[Tensor, "B T"],
    advantages: Float[Tensor, " B"],
    loss_mask: Bool[Tensor, "B T"],
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.28,
) -> Float[Tensor, ""]:
    r"""DAPO 的损失：上侧放宽的裁剪，所有 token 一起平均，没有 KL。

    $$
    -\frac1{\sum_i\lvert o_i\rvert}\sum_{i,t}\min\big(\rho\hat A,\
    \operatorname{clip}(\rho,1-\epsilon_{\text{low}},1+\epsilon_{\text{high}})\hat A\big)
    $$

    注意：分母是传入的全部 token；一次更新分成几个微批时要换成全局的 token 数。

    Args:
        log_probs: 当前策略对已采样 token 的对数概率，带梯度。
        old_log_probs: 采样后、更新前的策略给的对数概率，不带梯度。
        advantages: 每条回答一个优势，来自 `dapo_advantages`。
        loss_mask: 真表示回答里的 token。
        clip_low: 下侧宽度 $\epsilon_{\text{low}}$。
        clip_high: 上侧宽度 $\epsilon_{\text{high}}$。

    Returns:
        标量损失，越小越好。

    References:
        式 8 的分母是一个组的 token 数，再对提示取期望；这里按整批，同 verl 0.9.0 与 TRL 1.16 的 "dapo"。
    """
    token_losses = clipped_surrogate_loss(
        log_probs, old_log_probs, advantages[:, None], clip_low=clip_low, clip_high=clip_high
    )
    return aggregate_loss(token_losses, loss_mask, mode="token-mean")


# --8<-- [end:dapo_loss]


# --8<-- [start:sampling]
def keep_groups(rewards: Float[Tensor, " B"], *, group_size: int) -> Bool[Tensor, " B"]:
    r"""动态采样留下哪些行：组内奖励不全相同。

    $$0<\lvert\{o_i:\ o_i\text{ 正确}\}\rvert<G$$

    注意：传判分的结果，不要传加过长度惩罚的奖励。比较最大与最小值，因为相同小数的标准差可能不是 0。

    Args:
        rewards: 每条回答的正确性得分，取两个值（如 ±1），按组相邻排列。
        group_size: 每个提示的回答数 $G$，至少为 2。

    Returns:
        每行一个布尔值，同组相同。

    References:
        DAPO 式 11；verl 0.9.0 `filter_groups` 丢掉 `np.std` 为 0 的组。
    """
    if group_size < 2 or len(rewards) % group_size:
        raise ValueError(f"{len(rewards)} 行、group_size={group_size}：每组至少 2 条，且行数要能整除。")
    groups = rewards.view(-1, group_size)  # (P, G)
    return (groups.amax(dim=1) > groups.amin(dim=1)).repeat_interleave(group_size)  # (B)


def dapo_advantages(
    rewards: Float[Tensor, " B"],
    lengths: Int[Tensor, " B"],
    *,
    group_size: int,
    max_length: int = 20480,
    buffer: int = 4096,
) -> tuple[Float[Tensor, " B"], Bool[Tensor, " B"]]:
    r"""先按正确性过滤，再把长度惩罚加进奖励，最后组内归一化。

    注意：没有留下的行由调用者丢掉，并继续采样补满一批。

    Args:
        rewards: 正确性得分，对为 1、错为 -1（式 7），按组相邻排列。
        lengths: 每条回答的 token 数。
        group_size: 每个提示的回答数 $G$。
        max_length: 生成上限 $L_{\max}$，token 数。
        buffer: 缓冲区长度 $L_{\text{cache}}$，token 数。

    Returns:
        （优势，是否留下），各是每行一个值。
    """
    keep = keep_groups(rewards, group_size=group_size)
    penalty = soft_overlong_penalty(lengths, max_length=max_length, buffer=buffer)
    return group_advantages(rewards + penalty.to(rewards.dtype), group_size=group_size), keep


# --8<-- [end:sampling]


# --8<-- [start:soft_overlong_penalty]
def soft_overlong_penalty(
    lengths: Int[Tensor, " B"], *, max_length: int = 20480, buffer: int = 4096
) -> Float[Tensor, " B"]:
    r"""软超长惩罚：缓冲区之前是 0，缓冲区内线性降到 -1，再长也是 -1。

    $$
    \begin{cases}
    0 & \lvert y\rvert\le L_{\max}-L_{\text{cache}}\\
    \dfrac{(L_{\max}-L_{\text{cache}})-\lvert y\rvert}{L_{\text{cache}}} &
    L_{\max}-L_{\text{cache}}<\lvert y\rvert\le L_{\max}\\
    -1 & L_{\max}<\lvert y\rvert
    \end{cases}
    $$

    注意：$L_{\max}$ 是生成上限 20480，不是「期望最大长度」16384。三段就是把同一条直线截到 [-1, 0]。

    Args:
        lengths: 每条回答的 token 数 $\lvert y\rvert$。
        max_length: 生成上限 $L_{\max}$，token 数。
        buffer: 缓冲区长度 $L_{\text{cache}}$，token 数。

    Returns:
        每条回答的惩罚，介于 -1 与 0，加到正确性得分上。

    References:
        式 13。与 TRL 1.16 `get_soft_overlong_punishment` 一致；OpenRLHF 0.11.0 相同；verl 0.9.0 没有 -1 的下限。
    """
    if not 0 < buffer <= max_length:
        raise ValueError(
            f"buffer={buffer}、max_length={max_length}：缓冲区是上限之内的一段，应有 0 < buffer ≤ max_length。"
        )
    return ((max_length - buffer - lengths) / buffer).clamp(-1.0, 0.0)


# --8<-- [end:soft_overlong_penalty]


def wasted_group_probability(pass_rates: Float[Tensor, " P"], *, group_size: int) -> Float[Tensor, " P"]:
    r"""一组回答全对或全错、因而优势全为零的概率。

    $$p^G+(1-p)^G$$

    注意：它的补的倒数是每留下一组平均要生成的组数；$p$ 为 0 或 1 时那个数是无穷。

    Args:
        pass_rates: 每个提示的通过率 $p$，介于 0 与 1；同组的回答独立采样。
        group_size: 每个提示的回答数 $G$。

    Returns:
        每个提示一个概率。

    References:
        由 DAPO 式 11 的条件直接得到，论文没有写出这个式子。
    """
    if group_size < 2:
        raise ValueError(f"group_size={group_size}：一条回答总是全同，至少要 2。")
    return torch.pow(pass_rates, group_size) + torch.pow(1 - pass_rates, group_size)
