r"""SAC（Soft Actor-Critic）的零件：压缩高斯的对数密度、三个损失、目标网络、表格情形的软备份。

页面：docs/rl/sac.md。不包含：网络、回放缓存、环境与训练循环。
约定：`log_probs` 是动作的对数密度，已按动作维求和，可以为正；输入什么浮点类型就返回什么类型。温度 `alpha` 可以是数或标量张量，除了温度损失一律当常数。
压缩：$a=\tanh u$ 逐维可逆，$1-\tanh^2u=4e^{-2u}/(1+e^{-2u})^2$，取对数得 $2\,(\log2-u-\mathrm{softplus}(-2u))$，不会算到 $\log0$。

References:
    - 1801.01290 式 2–4（软备份与软改进）、式 21（压缩的对数密度）。https://arxiv.org/abs/1801.01290
    - 1812.05905 式 5、6（目标）、式 9（策略）、式 18（温度）。https://arxiv.org/abs/1812.05905
    - cleanrl `sac_continuous_action.py`（提交 fe8d8a0）：三个损失一致；压缩项它写 `log(1 - tanh² + 1e-6)`。
"""

import math
from collections.abc import Iterable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "polyak_update",
    "sac_actor_loss",
    "sac_temperature_loss",
    "soft_backup",
    "soft_policy_log_probs",
    "soft_q_target",
    "soft_value",
    "tanh_gaussian_log_prob",
]


# --8<-- [start:log_prob]
def tanh_gaussian_log_prob(
    mean: Float[Tensor, "B A"], log_std: Float[Tensor, "B A"], pre_tanh: Float[Tensor, "B A"]
) -> Float[Tensor, " B"]:
    r"""压缩高斯 $a=\tanh u$ 的对数密度：$\sum_i[\log\mathcal N(u_i)-\log(1-\tanh^2u_i)]$。

    注意：传 $u$，不传 $a$。由 $a$ 反求 $u$，$a$ 舍入成 ±1 时得到无穷。

    Args:
        mean: 高斯的均值。
        log_std: 高斯标准差的对数。
        pre_tanh: 压缩之前的样本 $u$；重参数化时是均值与标准差的函数，要留在图里。
    """
    noise = (pre_tanh - mean) * torch.exp(-log_std)
    gaussian = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_jacobian = 2 * (math.log(2) - pre_tanh - F.softplus(-2 * pre_tanh))  # log(1 − tanh²u)
    return (gaussian - log_jacobian).sum(-1)


# --8<-- [end:log_prob]


# --8<-- [start:losses]
def soft_q_target(
    rewards: Float[Tensor, " B"],
    next_q1: Float[Tensor, " B"],
    next_q2: Float[Tensor, " B"],
    next_log_probs: Float[Tensor, " B"],
    terminated: Bool[Tensor, " B"],
    *,
    alpha: float | Float[Tensor, ""],
    gamma: float = 0.99,
) -> Float[Tensor, " B"]:
    r"""两个 critic 共用的回归目标，不带梯度。

    $$y=r+\gamma(1-d)\big(\min_j\bar Q_j(s',a')-\alpha\log\pi(a'|s')\big)$$

    注意：$a'$ 由当前策略现采，不取回放里的动作；超时截断不算终止。

    Args:
        rewards: 回放里的奖励。
        next_q1: 第一个目标网络在 $(s',a')$ 的值。
        next_q2: 第二个目标网络在 $(s',a')$ 的值。
        next_log_probs: $\log\pi(a'|s')$。
        terminated: 这一步是否真的终止。
        alpha: 温度。
        gamma: 折扣。
    """
    if not 0 <= gamma <= 1:
        raise ValueError(f"gamma={gamma} 不在 [0, 1] 里；折扣通常取 0.99。")
    next_value = torch.minimum(next_q1, next_q2) - alpha * next_log_probs
    return (rewards + gamma * torch.where(terminated, 0.0, next_value)).detach()


def sac_actor_loss(
    log_probs: Float[Tensor, " B"],
    q1: Float[Tensor, " B"],
    q2: Float[Tensor, " B"],
    *,
    alpha: float | Float[Tensor, ""],
) -> Float[Tensor, ""]:
    r"""策略的损失：$\mathbb E[\alpha\log\pi(a|s)-\min_jQ_j(s,a)]$，$a$ 是重参数化的样本。

    注意：梯度也会流进两个 Q 的参数，优化器里只放策略的参数。

    Args:
        log_probs: 现采动作的对数密度，带梯度。
        q1: 第一个 critic（不是目标网络）在现采动作上的值，带梯度。
        q2: 第二个 critic 的值。
        alpha: 温度，当常数。
    """
    if isinstance(alpha, Tensor):
        alpha = alpha.detach()
    return (alpha * log_probs - torch.minimum(q1, q2)).mean()


def sac_temperature_loss(
    log_alpha: Float[Tensor, ""], log_probs: Float[Tensor, " B"], *, target_entropy: float
) -> Float[Tensor, ""]:
    r"""温度的损失：$-\alpha\,\mathbb E[\log\pi+\bar{\mathcal H}]=\alpha(\mathcal H-\bar{\mathcal H})$。

    注意：熵高于目标时梯度为正，下降一步就降温；符号写反会发散。

    Args:
        log_alpha: 温度的对数，被优化的参数。
        log_probs: 现采动作的对数密度，当常数。
        target_entropy: 目标熵，单位 nat，通常取动作维数的相反数。
    """
    return -(log_alpha.exp() * (log_probs.detach() + target_entropy)).mean()


# --8<-- [end:losses]


@torch.no_grad()
def polyak_update(targets: Iterable[Tensor], sources: Iterable[Tensor], *, tau: float = 0.005) -> None:
    r"""目标网络向当前网络原地走一小步：$\bar\theta\leftarrow\tau\theta+(1-\tau)\bar\theta$。

    注意：`tau` 乘的是当前网络；Spinning Up 的 `polyak` 乘的是旧目标，默认 0.995。

    Args:
        targets: 目标网络的参数，原地修改。
        sources: 当前网络的参数，次序相同。
        tau: 步长，1 表示直接复制。
    """
    if not 0 < tau <= 1:
        raise ValueError(f"tau={tau} 不在 (0, 1] 里；若按旧目标的权重给出，请传 1 减去它。")
    for target, source in zip(targets, sources, strict=True):
        target.lerp_(source, tau)


# --8<-- [start:soft_backup]
def soft_value(
    q_values: Float[Tensor, "states actions"],
    *,
    alpha: float,
    ref_log_probs: Float[Tensor, "states actions"] | None = None,
) -> Float[Tensor, " states"]:
    r"""软最优值：$\alpha\log\sum_a\pi_{\text{ref}}(a|s)\,e^{Q(s,a)/\alpha}$，不给参考时权重是 1。

    注意：不给参考是最大熵；给均匀分布的参考，每个状态还要减去 $\alpha\log\lvert\mathcal A\rvert$。

    Args:
        q_values: 软 Q，不可用的动作给负无穷。
        alpha: 温度，KL 正则时就是 $\beta$。
        ref_log_probs: 参考策略的对数概率。
    """
    if not alpha > 0:
        raise ValueError(f"alpha={alpha} 不为正；要贪心策略请直接取最大值。")
    logits = q_values / alpha + (0.0 if ref_log_probs is None else ref_log_probs)
    return alpha * logits.logsumexp(-1)


def soft_policy_log_probs(
    q_values: Float[Tensor, "states actions"],
    *,
    alpha: float,
    ref_log_probs: Float[Tensor, "states actions"] | None = None,
) -> Float[Tensor, "states actions"]:
    r"""软改进的解：$\pi(a|s)\propto\pi_{\text{ref}}(a|s)\,e^{Q(s,a)/\alpha}$ 的对数。

    Args:
        q_values: 软 Q，不可用的动作给负无穷。
        alpha: 温度。
        ref_log_probs: 参考策略的对数概率，不给就是最大熵。
    """
    value = soft_value(q_values, alpha=alpha, ref_log_probs=ref_log_probs)
    return (q_values - value[:, None]) / alpha + (0.0 if ref_log_probs is None else ref_log_probs)


def soft_backup(
    values: Float[Tensor, " states"],
    rewards: Float[Tensor, "states actions"],
    transitions: Float[Tensor, "states actions states"],
    *,
    gamma: float,
) -> Float[Tensor, "states actions"]:
    r"""一次备份：$Q(s,a)=r(s,a)+\gamma\sum_{s'}p(s'|s,a)V(s')$，熵在 $V$ 里；与 `soft_value` 交替就是软值迭代。

    Args:
        values: 下一个状态的软值。
        rewards: 奖励。
        transitions: 转移概率；一行之和小于 1 的部分是终止。
        gamma: 折扣。
    """
    return rewards + gamma * transitions @ values


# --8<-- [end:soft_backup]
