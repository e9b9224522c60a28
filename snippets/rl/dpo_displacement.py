r"""likelihood displacement：DPO 让 chosen 与 rejected 同时下降的一阶条件，以及两种带锚的损失。

页面：docs/rl/dpo-displacement.md

不包含：DPO 与 IPO 的损失（见 `snippets/rl/dpo.py`）、逐 token 对数概率（见 `snippets/rl/log_probs.py`）、批次平均。

一阶条件的由来：DPO 损失对参数的负梯度是 $\beta\sigma(-m)(g_w-g_l)$，其中 $m$ 是隐式奖励之差，
$g_w,g_l$ 是两条回答的 $\nabla_\theta\log\pi_\theta$。沿它走一小步，$\log\pi_\theta(y_w)$ 的变化与
$\lVert g_w\rVert^2-\langle g_w,g_l\rangle$ 成正比，$\log\pi_\theta(y_l)$ 与 $\langle g_w,g_l\rangle-\lVert g_l\rVert^2$
成正比，两者之差是 $\lVert g_w-g_l\rVert^2\ge0$。

dtype：输入什么返回什么；对数概率应是 float32 或 float64。

References:
    - Pal et al. 2024（DPOP），[2402.13228](https://arxiv.org/abs/2402.13228) 式 3。
    - Pang et al. 2024（Iterative RPO），[2404.19733](https://arxiv.org/abs/2404.19733) 式 1。
    - Razin et al. 2024，[2410.08847](https://arxiv.org/abs/2410.08847)。
"""

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from snippets.rl.dpo import dpo_loss

__all__ = ["displacement_rates", "dpo_nll_loss", "dpop_loss"]


def displacement_rates(
    chosen_grad: Float[Tensor, " N"], rejected_grad: Float[Tensor, " N"]
) -> tuple[Float[Tensor, ""], Float[Tensor, ""]]:
    r"""沿 DPO 的负梯度走无穷小一步，两个对数概率的变化率。

    $$
    \lVert g_w\rVert^2-\langle g_w,g_l\rangle,\qquad \langle g_w,g_l\rangle-\lVert g_l\rVert^2
    $$

    注意：是梯度下降的一阶结论，Adam 的步子不沿这个方向。单位是「学习率乘 $\beta\sigma(-m)$」，这个因子恒正，
    不影响符号。多个偏好对时，只有权重都相等（例如起点）才能传批次平均的梯度。

    Args:
        chosen_grad: $\nabla_\theta\log\pi_\theta(y_w)$，全部参数展平；是对数概率的梯度，不是损失的。
        rejected_grad: $\nabla_\theta\log\pi_\theta(y_l)$，同样展平。

    Returns:
        `(chosen_rate, rejected_rate)`；chosen_rate 小于 0 就是 chosen 要下降，此时 rejected 必然也下降。

    References:
        [2305.18290](https://arxiv.org/abs/2305.18290) 第 4 节的梯度，代入一阶展开。
    """
    # --8<-- [start:rates]
    margin_direction = chosen_grad - rejected_grad  # DPO 的负梯度，只差正的系数
    return chosen_grad @ margin_direction, rejected_grad @ margin_direction
    # --8<-- [end:rates]


def dpop_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
    penalty_weight: float = 50.0,
) -> Float[Tensor, " B"]:
    r"""DPO-Positive（DPOP）：chosen 低于参考时，在 $\sigma$ 里面扣分。

    $$
    \ell=-\log\sigma\big(\beta(\Delta_w-\Delta_l-\lambda\max(0,-\Delta_w))\big),\qquad
    \Delta=\log\pi_\theta-\log\pi_{\text{ref}}
    $$

    注意：用 relu，不用 `clamp(min=0)`。起点 $\Delta_w=0$，PyTorch 的 clamp 在边界上导数是 1，
    一开始就会把 chosen 的系数放大到 $1+\lambda$ 倍；relu 在 0 处导数是 0，起点与 DPO 相同。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        beta: KL 的权重，必须大于 0。
        penalty_weight: $\lambda$，不小于 0；0 就是 DPO。

    Returns:
        每对一个损失。

    References:
        [2402.13228](https://arxiv.org/abs/2402.13228) 式 3；TRL 1.16 没有这个损失。
    """
    if not penalty_weight >= 0:
        raise ValueError(f"penalty_weight={penalty_weight}：小于 0 会奖励 chosen 下降，应不小于 0")
    # --8<-- [start:dpop]
    drop = F.relu(ref_chosen_logps - chosen_logps)  # chosen 比参考低了多少，只罚下降
    # 从 chosen 里扣掉 λ·drop，等价于写在 β 的括号里
    return dpo_loss(
        chosen_logps - penalty_weight * drop, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta
    )
    # --8<-- [end:dpop]


def dpo_nll_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    chosen_lengths: Int[Tensor, " B"],
    *,
    beta: float = 0.1,
    alpha: float = 1.0,
) -> Float[Tensor, " B"]:
    r"""DPO 加 chosen 的负对数似然（Iterative RPO）。

    $$
    \ell=\ell_{\text{DPO}}-\alpha\,\frac{\log\pi_\theta(y_w\mid x)}{\lvert y_w\rvert}
    $$

    注意：DPO 一项用和，NLL 一项除以回答长度；NLL 只加在 chosen 上，也不减参考。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        chosen_lengths: chosen 回答的 token 数，至少 1。
        beta: KL 的权重，必须大于 0。
        alpha: NLL 的权重，不小于 0；0 就是 DPO。

    Returns:
        每对一个损失。

    References:
        - [2404.19733](https://arxiv.org/abs/2404.19733) 式 1，论文取 $\alpha=1$。
        - TRL 1.16 `loss_type=["sigmoid", "sft"]`：NLL 按整批 token 平均，chosen 等长时才与本式的批次平均相同。
    """
    if not alpha >= 0:
        raise ValueError(f"alpha={alpha}：小于 0 会压低 chosen，应不小于 0")
    if not (chosen_lengths > 0).all():
        raise ValueError("chosen_lengths 里有 0：没有 token 的回答没有平均对数概率，请先滤掉")
    # --8<-- [start:nll]
    preference = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    return preference - alpha * chosen_logps / chosen_lengths
    # --8<-- [end:nll]
