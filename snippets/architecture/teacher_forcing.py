r"""教师强制与自由运行：逐步的训练损失、计划采样的最优解、错误能否恢复时的偏离概率。

页面：docs/architecture/teacher-forcing.md
不包含：一次并行前向的教师强制损失（`softmax_cross_entropy.py` 的 `causal_lm_loss`）、提示与填充的掩码、KV cache、
对采样求导的得分函数项。

轴：`B` 序列数，`T` 每条的 token 数，`V` 词表大小。$y^*$ 是数据里的序列，$z$ 是真正喂进模型的前缀，
$\epsilon$ 是喂真实 token 的概率：1 是教师强制，0 是自由运行，中间是计划采样。

References:
    Williams and Zipser, "A Learning Algorithm for Continually Running Fully Recurrent Neural Networks", 1989
    Bengio et al., "Scheduled Sampling", §2.4，https://arxiv.org/abs/1506.03099
    Huszár, "How (not) to Train your Generative Model"，https://arxiv.org/abs/1511.05101
    Ross et al., "DAgger"，https://arxiv.org/abs/1011.0686
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snippets.architecture.softmax_cross_entropy import log_softmax

__all__ = ["sequential_loss", "scheduled_sampling_optimum", "off_track_probability"]


# --8<-- [start:loss]
def sequential_loss(
    model: Callable[[Tensor], Tensor],
    input_ids: Int[Tensor, "B T"],
    *,
    gold_prob: float = 1.0,
    expert: Callable[[Tensor], Tensor] | None = None,
    generator: torch.Generator | None = None,
) -> Float[Tensor, ""]:
    r"""逐步喂前缀的损失：前缀里每个 token 以 `gold_prob` 的概率取真实的，否则由模型采样。

    $$
    \frac1{B(T-1)}\sum_{b,t\ge1}-\log\pi_\theta(y^*_{b,t}\mid z_{b,<t})
    $$

    注意：采样不传梯度。给了 `expert`，目标换成老师在 $z$ 处的分布，而不是数据里的下一个 token。

    Args:
        model: 输入前缀 `(B, t)`，返回 logits `(B, t, V)`。
        input_ids: 数据；第 0 列总是原样喂入，不计损失。
        gold_prob: $\epsilon$；1 是教师强制，0 是自由运行。
        expert: 输入前缀，返回下一个 token 的概率 `(B, V)`。
        generator: 随机数发生器。

    Returns:
        标量（奈特），对序列与位置取平均。
    """
    if not 0 <= gold_prob <= 1:
        raise ValueError(f"gold_prob={gold_prob} 不是概率；请给 0 到 1 之间的数，1 是教师强制。")
    prefix, losses = input_ids[:, :1], []
    for t in range(1, input_ids.shape[1]):
        gold = input_ids[:, t : t + 1]  # (B, 1)
        log_probs = log_softmax(model(prefix)[:, -1])  # (B, V)
        if expert is None:
            losses.append(-log_probs.gather(-1, gold)[:, 0])
        else:
            losses.append(-(expert(prefix) * log_probs).sum(-1))
        sampled = torch.multinomial(log_probs.exp(), 1, generator=generator)
        keep = torch.bernoulli(torch.full(gold.shape, gold_prob), generator=generator).bool()
        prefix = torch.cat((prefix, torch.where(keep, gold, sampled)), dim=1)
    return torch.stack(losses).mean()


# --8<-- [end:loss]
# --8<-- [start:optimum]
def scheduled_sampling_optimum(joint: Float[Tensor, "V V2"], *, gold_prob: float) -> Float[Tensor, "V V2"]:
    r"""两个 token 的序列上，计划采样收敛到的第二步条件分布（采样不传梯度，表格模型）。

    $$
    q(b\mid a)=\epsilon\,P(b\mid a)+(1-\epsilon)\,P_2(b)
    $$

    注意：$P_2$ 是第二个 token 的边缘分布。$\epsilon<1$ 时它不等于 $P(b\mid a)$。

    Args:
        joint: 数据的联合分布 $P(a,b)$，行是第一个 token，每行之和大于 0。
        gold_prob: $\epsilon$，喂真实 token 的概率。

    Returns:
        每行之和为 1 的条件分布。

    References:
        Huszár 2015 的两个符号的例子。
    """
    conditional = joint / joint.sum(dim=1, keepdim=True)
    return gold_prob * conditional + (1 - gold_prob) * joint.sum(dim=0)


# --8<-- [end:optimum]
# --8<-- [start:off-track]
def off_track_probability(
    num_steps: int, *, error_rate: float, recovery_rate: float = 0.0
) -> Float[Tensor, " T"]:
    r"""走了 1 到 `num_steps` 步之后，处在出错状态的概率。

    $$
    d_t=(1-r)\,d_{t-1}+e\,(1-d_{t-1}),\qquad d_0=0
    $$

    注意：$r=0$ 时 $1-d_t=(1-e)^t$；$r>0$ 时趋于 $e/(e+r)$，不再随长度恶化。

    Args:
        num_steps: 步数 $T$。
        error_rate: 正常状态下每步出错的概率 $e$。
        recovery_rate: 出错状态下每步恢复的概率 $r$。

    Returns:
        $d_1,\dots,d_T$，float64。
    """
    probs = [0.0]
    for _ in range(num_steps):
        probs.append((1 - recovery_rate) * probs[-1] + error_rate * (1 - probs[-1]))
    return torch.tensor(probs[1:], dtype=torch.float64)


# --8<-- [end:off-track]
