r"""Adam、Adam+L2 与 AdamW 的一步更新：三者只差权重衰减放在哪里。

页面：docs/training/adamw.md
不包含：AMSGrad、学习率日程、梯度裁剪、参数分组、8 位状态、fused 与 foreach 的实现。
数据类型：输入是什么精度就用什么精度算，不做静默转换。

三个函数都不改输入，返回新的张量；状态 $m$、$v$ 初始为 0，`step` 从 1 数起。
记号：参数 $\theta$，梯度 $g$，一阶矩 $m$，二阶矩 $v$，学习率 $\eta$，衰减系数 $\lambda$。

References:
    Kingma & Ba, "Adam", 算法 1、§3，https://arxiv.org/abs/1412.6980
    Loshchilov & Hutter, "Decoupled Weight Decay Regularization", 算法 2，https://arxiv.org/abs/1711.05101
    torch 2.13.0 `torch/optim/adam.py` 的 `_single_tensor_adam`，逐步一致（float64）。
"""

from jaxtyping import Float
from torch import Tensor

__all__ = ["adam_direction", "adam_l2_step", "adamw_step"]


# --8<-- [start:direction]
def adam_direction(
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    *,
    step: int,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""更新两个矩，返回还没有乘学习率的方向。

    $$u_t=\frac{m_t/(1-\beta_1^t)}{\sqrt{v_t/(1-\beta_2^t)}+\epsilon}$$

    注意：`eps` 在根号外、偏差校正之后；`step` 从 1 数起，从 0 数会除以 0。

    Args:
        grad: 这一步的梯度。
        exp_avg: 上一步的一阶矩 $m_{t-1}$。
        exp_avg_sq: 上一步的二阶矩 $v_{t-1}$。
        step: 第几步 $t$。
        betas: 两个矩的衰减率 $(\beta_1,\beta_2)$。
        eps: 分母里的小量 $\epsilon$。

    Returns:
        方向 $u_t$、新的 $m_t$、新的 $v_t$。
    """
    if step < 1:
        raise ValueError(f"step={step}：步数从 1 数起，否则偏差校正的分母是 0。")
    beta1, beta2 = betas
    exp_avg = beta1 * exp_avg + (1 - beta1) * grad
    exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * grad * grad
    mean = exp_avg / (1 - beta1**step)
    mean_square = exp_avg_sq / (1 - beta2**step)
    return mean / (mean_square.sqrt() + eps), exp_avg, exp_avg_sq


# --8<-- [end:direction]
# --8<-- [start:l2]
def adam_l2_step(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""Adam；衰减加在梯度里（L2 惩罚），于是也进了两个矩。

    $$g_t\leftarrow g_t+\lambda\theta_{t-1},\qquad\theta_t=\theta_{t-1}-\eta u_t$$

    Args:
        param: 参数 $\theta_{t-1}$。
        grad: 损失的梯度，不含衰减。
        exp_avg: 上一步的一阶矩。
        exp_avg_sq: 上一步的二阶矩。
        step: 第几步，从 1 数起。
        lr: 学习率 $\eta$。
        betas: 两个矩的衰减率。
        eps: 分母里的小量。
        weight_decay: 衰减系数 $\lambda$；0 就是原始的 Adam。

    Returns:
        新的参数、一阶矩、二阶矩。
    """
    grad = grad + weight_decay * param
    update, exp_avg, exp_avg_sq = adam_direction(grad, exp_avg, exp_avg_sq, step=step, betas=betas, eps=eps)
    return param - lr * update, exp_avg, exp_avg_sq


# --8<-- [end:l2]
# --8<-- [start:adamw]
def adamw_step(
    param: Float[Tensor, "*shape"],
    grad: Float[Tensor, "*shape"],
    exp_avg: Float[Tensor, "*shape"],
    exp_avg_sq: Float[Tensor, "*shape"],
    *,
    step: int,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Float[Tensor, "*shape"], Float[Tensor, "*shape"], Float[Tensor, "*shape"]]:
    r"""AdamW；衰减直接作用在参数上，不进两个矩。

    $$\theta_t=(1-\eta\lambda)\,\theta_{t-1}-\eta u_t$$

    注意：与 PyTorch 一样乘学习率；论文每步减 $\eta_t\lambda'\theta$（$\eta_t$ 是日程的倍数），$\eta=\eta_t\alpha$，换算是 $\lambda=\lambda'/\alpha$。

    Args:
        param: 参数 $\theta_{t-1}$。
        grad: 损失的梯度。
        exp_avg: 上一步的一阶矩。
        exp_avg_sq: 上一步的二阶矩。
        step: 第几步，从 1 数起。
        lr: 学习率 $\eta$。
        betas: 两个矩的衰减率。
        eps: 分母里的小量。
        weight_decay: 衰减系数 $\lambda$，默认值同 `torch.optim.AdamW`。

    Returns:
        新的参数、一阶矩、二阶矩。
    """
    update, exp_avg, exp_avg_sq = adam_direction(grad, exp_avg, exp_avg_sq, step=step, betas=betas, eps=eps)
    return param * (1 - lr * weight_decay) - lr * update, exp_avg, exp_avg_sq


# --8<-- [end:adamw]
