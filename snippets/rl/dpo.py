r"""直接偏好优化（Direct Preference Optimization, DPO）的损失、隐式奖励与两个变体。

页面：docs/rl/dpo.md

不包含：逐 token 对数概率与求和（见 `snippets/rl/log_probs.py`）、批次平均、日志指标、
参考模型的前向（由调用者在 `torch.no_grad()` 里算好）。

dtype：输入什么返回什么；四个对数概率应是 float32 或 float64。

References:
    - Rafailov et al. 2023, [2305.18290](https://arxiv.org/abs/2305.18290)：式 3–7，附录 A.1、A.2、A.4。
    - Azar et al. 2023, [2310.12036](https://arxiv.org/abs/2310.12036)：式 17（IPO）。
    - Mitchell 2023, [cDPO 短文](https://ericmitchell.ai/cdpo.pdf)：式 3（标签平滑）。
"""

import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

__all__ = ["kl_regularized_optimum", "dpo_loss", "implicit_rewards", "ipo_loss", "dpo_loss_smoothed"]


def kl_regularized_optimum(
    ref_log_probs: Float[Tensor, "P V"], rewards: Float[Tensor, "P V"], *, beta: float
) -> tuple[Float[Tensor, "P V"], Float[Tensor, " P"]]:
    r"""可枚举答案时，KL 正则目标的闭式最优策略与配分函数。

    $$
    \log\pi^*(y\mid x)=\log\pi_{\text{ref}}(y\mid x)+\tfrac1\beta r(x,y)-\log Z(x)
    $$

    注意：这里的 V 是全部可能的答案。语言模型的答案空间枚举不完，$Z(x)$ 算不出来，这正是 DPO 要绕开它的原因。

    Args:
        ref_log_probs: 参考策略对每个答案的对数概率，每行已归一化。
        rewards: 每个答案的奖励。
        beta: KL 的权重，必须大于 0。

    Returns:
        `(log_probs, log_partition)`：最优策略的对数概率，以及每个提示的 $\log Z(x)$。

    References:
        [2305.18290](https://arxiv.org/abs/2305.18290) 式 4，推导在附录 A.1。
    """
    _require_positive("beta", beta)
    unnormalized = ref_log_probs + rewards / beta
    log_partition = unnormalized.logsumexp(-1)  # (P,)
    return unnormalized - log_partition.unsqueeze(-1), log_partition


def dpo_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""每个偏好对的 DPO 损失，不做批次平均。

    $$
    \ell=-\log\sigma\Big(\beta\log\frac{\pi_\theta(y_w\mid x)}{\pi_{\text{ref}}(y_w\mid x)}
    -\beta\log\frac{\pi_\theta(y_l\mid x)}{\pi_{\text{ref}}(y_l\mid x)}\Big)
    $$

    注意：四个输入都是整条回答的对数概率之和；$\beta$ 在 $\sigma$ 里面；参考的两项不带梯度。
    损失只看两个隐式奖励之差，两个概率一起下降也能让它变小。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        beta: KL 的权重；越大越贴近参考策略，必须大于 0。

    Returns:
        每对一个损失。

    References:
        - [2305.18290](https://arxiv.org/abs/2305.18290) 式 7；论文附录 B 默认 $\beta=0.1$。
        - 与 TRL 1.16 `DPOTrainer` 的 `loss_type="sigmoid"` 相同（它再取批次平均）。
    """
    _require_positive("beta", beta)
    # --8<-- [start:loss]
    chosen_log_ratio = chosen_logps - ref_chosen_logps
    rejected_log_ratio = rejected_logps - ref_rejected_logps
    margin = beta * (chosen_log_ratio - rejected_log_ratio)
    # 不写 log(sigmoid)：margin 很负时 sigmoid 下溢成 0，log 得 -inf
    return -F.logsigmoid(margin)
    # --8<-- [end:loss]


def implicit_rewards(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    beta: float = 0.1,
) -> tuple[Float[Tensor, " B"], Float[Tensor, " B"]]:
    r"""两条回答的隐式奖励，只用于日志，不带梯度。

    $$
    \hat r_\theta(x,y)=\beta\log\frac{\pi_\theta(y\mid x)}{\pi_{\text{ref}}(y\mid x)}
    $$

    注意：它与真实奖励差一个只和提示有关的 $\beta\log Z(x)$，所以只能在同一个提示内比较。
    两者之差（margin）变大不代表 chosen 的概率上升，要另看 `chosen_logps`。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        beta: KL 的权重，必须大于 0。

    Returns:
        `(chosen_rewards, rejected_rewards)`，都已 detach。

    References:
        - [2305.18290](https://arxiv.org/abs/2305.18290) 第 4 节，式 5 去掉 $\beta\log Z(x)$。
        - TRL 1.16 记录的 `rewards/chosen`、`rewards/rejected` 是它们的批次平均。
    """
    _require_positive("beta", beta)
    chosen_rewards = beta * (chosen_logps - ref_chosen_logps)
    rejected_rewards = beta * (rejected_logps - ref_rejected_logps)
    return chosen_rewards.detach(), rejected_rewards.detach()


def ipo_loss(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    tau: float,
) -> Float[Tensor, " B"]:
    r"""IPO（Identity Preference Optimization）：把对数比之差回归到一个有限的目标。

    $$
    \ell=\Big(h-\frac{1}{2\tau}\Big)^2,\qquad
    h=\log\frac{\pi_\theta(y_w\mid x)}{\pi_{\text{ref}}(y_w\mid x)}
    -\log\frac{\pi_\theta(y_l\mid x)}{\pi_{\text{ref}}(y_l\mid x)}
    $$

    注意：目标是 $1/(2\tau)$，不是 $1/\tau$（两种排列各取一半，见式 17 上方的推导）；$h$ 不乘 $\tau$。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特；要与 TRL 一致则传每 token 平均。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        tau: KL 的权重，必须大于 0；论文没有给语言模型的默认值，所以不设默认。

    Returns:
        每对一个损失。

    References:
        - [2310.12036](https://arxiv.org/abs/2310.12036) 式 17。
        - TRL 1.16 `loss_type="ipo"` 先把对数比除以回答长度（`beta` 即 τ）；OpenRLHF 0.11.0 用和。
    """
    _require_positive("tau", tau)
    # --8<-- [start:ipo]
    log_ratio_gap = (chosen_logps - ref_chosen_logps) - (rejected_logps - ref_rejected_logps)
    return (log_ratio_gap - 1 / (2 * tau)) ** 2
    # --8<-- [end:ipo]


def dpo_loss_smoothed(
    chosen_logps: Float[Tensor, " B"],
    rejected_logps: Float[Tensor, " B"],
    ref_chosen_logps: Float[Tensor, " B"],
    ref_rejected_logps: Float[Tensor, " B"],
    *,
    label_smoothing: float,
    beta: float = 0.1,
) -> Float[Tensor, " B"]:
    r"""cDPO（conservative DPO）：假设标签有一定比例被标反的 DPO 损失。

    $$
    \ell=-(1-\varepsilon)\log\sigma(m)-\varepsilon\log\sigma(-m),\qquad m=\hat r_w-\hat r_l
    $$

    注意：在 $\sigma(m)=1-\varepsilon$ 处梯度为零，再往外走会被拉回；普通 DPO 的梯度永远不为零。
    它和 TRL 的 `"robust"`（分母有 $1-2\varepsilon$、第二项变号）不是同一个损失。

    Args:
        chosen_logps: 当前策略对 chosen 回答的对数概率之和，单位奈特。
        rejected_logps: 当前策略对 rejected 回答的对数概率之和。
        ref_chosen_logps: 参考策略对 chosen 回答的对数概率之和。
        ref_rejected_logps: 参考策略对 rejected 回答的对数概率之和。
        label_smoothing: 标签被标反的概率 ε，取值 [0, 0.5)；0 就是 DPO。
        beta: KL 的权重，必须大于 0。

    Returns:
        每对一个损失。

    References:
        - [cDPO 短文](https://ericmitchell.ai/cdpo.pdf) 式 3；与作者代码 `preference_loss` 的 `label_smoothing` 相同。
        - TRL 1.16 的 `loss_type="sigmoid"` 会忽略 `label_smoothing`；OpenRLHF 0.11.0 `DPOLoss` 实现的是本式。
    """
    if not 0 <= label_smoothing < 0.5:
        raise ValueError(f"label_smoothing={label_smoothing}：它是标签标反的概率，应在 [0, 0.5)")
    # --8<-- [start:smoothed]
    observed = dpo_loss(chosen_logps, rejected_logps, ref_chosen_logps, ref_rejected_logps, beta=beta)
    flipped = dpo_loss(rejected_logps, chosen_logps, ref_rejected_logps, ref_chosen_logps, beta=beta)
    return (1 - label_smoothing) * observed + label_smoothing * flipped
    # --8<-- [end:smoothed]


def _require_positive(name: str, value: float) -> None:
    if not value > 0:
        raise ValueError(f"{name}={value}：它是 KL 的权重，必须大于 0；想减弱约束请取小的正数")
