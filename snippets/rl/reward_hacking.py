r"""奖励欺骗（reward hacking）的参照：best-of-n 的期望与 KL 上界、奖励模型集成、自适应 KL 系数。

页面：docs/rl/reward-hacking.md

不包含：KL 正则的最优策略（`snippets/rl/dpo.py` 的 `kl_regularized_optimum`）、best-of-n 的整个分布
（`snippets/rl/post_training.py` 的 `best_of_n_policy`）、奖励模型的训练、采样。
数据类型：输入什么精度就用什么精度算，不静默转换。

`best_of_n_mean` 与 `best_of_n_policy` 求的是同一个分布，前者只要排序，几十万个答案也算得动：按分数从低到高
排好，前 j 档的概率为 $F_j$，最高分落在第 j 档的概率是 $F_j^n-F_{j-1}^n$，档内平均。

集成的一笔账：k 个成员里只有一个多给 $e$ 分，均值涨 $e/k$，总体标准差涨到 $e\sqrt{k-1}/k$，
所以「均值减 λ 倍标准差」在 $\lambda>1/\sqrt{k-1}$ 时反而扣分；成员一起多给 $e$ 分，标准差不动，怎么聚合都涨 $e$。

References:
    - Gao et al. 2023，[2210.10760](https://arxiv.org/abs/2210.10760)：过度优化的函数形式。
    - Coste et al. 2024，[2310.02743](https://arxiv.org/abs/2310.02743)：取最小（WCO）、按分歧扣分（UWO）。
    - Eisenstein et al. 2024，[2312.09244](https://arxiv.org/abs/2312.09244)：成员一起犯的错，集成去不掉。
    - Ziegler et al. 2019，[1909.08593](https://arxiv.org/abs/1909.08593) 第 2.2 节：自适应 KL 系数。
"""

import math

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["best_of_n_kl_bound", "best_of_n_mean", "ensemble_reward", "adaptive_kl_coef"]


def best_of_n_kl_bound(n: int) -> float:
    r"""best-of-n 相对参考策略的 KL 的上界。

    $$\mathrm{KL}(\pi_n\Vert\pi_{\text{ref}})\le\log n-\frac{n-1}n$$

    注意：没有同分、每个答案的概率都趋于 0 时取等；有成块的同分时远大于真值。

    Args:
        n: 抽几个，至少为 1。

    Returns:
        上界，单位奈特。

    References:
        2401.01879（只是上界）；2210.10760 用它当横轴。
    """
    if n < 1:
        raise ValueError(f"n={n}：至少要抽 1 个。")
    return math.log(n) - (n - 1) / n


# --8<-- [start:best_of_n_mean]
def best_of_n_mean(scores: Float[Tensor, " V"], values: Float[Tensor, " V"], *, n: int) -> Float[Tensor, ""]:
    r"""按 scores 做 best-of-n，选中的答案在 values 上的期望；V 个答案等概率，同分随机选。

    $$\mathbb E[v]=\sum_j\big(F_j^n-F_{j-1}^n\big)\,\bar v_j$$

    注意：V 个答案的集合是有限的，n 接近 V 时量到的是这个集合，不是背后的连续分布。

    Args:
        scores: 用来选的分数（代理奖励），可以有同分。
        values: 想知道期望的量（真实奖励，或分数自己）。
        n: 抽几个，至少为 1。

    Returns:
        精确的期望，没有抽样误差。

    References:
        推导见模块说明；与 `best_of_n_policy` 的期望相同。
    """
    if n < 1:
        raise ValueError(f"n={n}：至少要抽 1 个。")
    _, level, count = torch.unique(scores, return_inverse=True, return_counts=True)  # 升序
    total = torch.zeros(len(count), dtype=values.dtype).index_add_(0, level, values)
    power = (count.cumsum(0).to(values) / len(scores)) ** n
    return (power.diff(prepend=power.new_zeros(1)) * total / count).sum()


# --8<-- [end:best_of_n_mean]


# --8<-- [start:ensemble_reward]
def ensemble_reward(
    member_rewards: Float[Tensor, "K B"], *, mode: str, penalty: float = 1.0
) -> Float[Tensor, " B"]:
    r"""把 K 个奖励模型的分数合成一个。

    $$\text{lcb}=\bar r-\lambda s,\qquad \text{uwo}=\bar r-\lambda s^2$$

    注意：$s$ 是总体标准差（除以 K）。先把各成员的分数放到同一个尺度，否则 min 只看尺度最小的那个。

    Args:
        member_rewards: 每行一个成员。
        mode: mean、median（偶数个取中间两个的平均）、min、lcb 或 uwo。
        penalty: $\lambda$，只用于 lcb 与 uwo，不小于 0。

    Returns:
        每个回答一个分数。

    References:
        2310.02743：min 是 WCO，uwo 是 UWO。
    """
    mean = member_rewards.mean(0)
    if mode == "mean":
        return mean
    if mode == "median":
        return member_rewards.quantile(0.5, dim=0)
    if mode == "min":
        return member_rewards.amin(0)
    if mode not in ("lcb", "uwo"):
        raise ValueError(f"mode={mode!r}：应是 mean、median、min、lcb、uwo 之一。")
    if penalty < 0:
        raise ValueError(f"penalty={penalty}：负数会奖励分歧，应不小于 0。")
    variance = (member_rewards - mean).square().mean(0)
    return mean - penalty * (variance.sqrt() if mode == "lcb" else variance)


# --8<-- [end:ensemble_reward]


# --8<-- [start:adaptive_kl_coef]
def adaptive_kl_coef(
    kl_coef: float, current_kl: float, *, target_kl: float, num_samples: int, horizon: int = 10000
) -> float:
    r"""自适应 KL 系数的一次更新：KL 高于目标就加大惩罚，低于就减小。

    $$\beta\leftarrow\beta\Big(1+\operatorname{clip}\big(\tfrac{\mathrm{KL}}{\mathrm{KL}_{\text{target}}}-1,-0.2,0.2\big)\tfrac{N}{H}\Big)$$

    注意：相对误差先截到 ±0.2，所以 KL 突然失控时追得很慢。

    Args:
        kl_coef: 现在的系数 $\beta$。
        current_kl: 这一批量到的 KL，单位奈特。
        target_kl: KL 的预算，必须大于 0。
        num_samples: 这一批的回答数 $N$，不是优化器步数。
        horizon: $H$，越大变得越慢。

    Returns:
        更新后的系数。

    References:
        1909.08593 第 2.2 节；与 verl `AdaptiveKLController`（提交 1dda039b9）相同。
    """
    if not target_kl > 0 or not horizon > 0:
        raise ValueError(f"target_kl={target_kl}，horizon={horizon}：都应大于 0。")
    error = min(max(current_kl / target_kl - 1, -0.2), 0.2)
    return kl_coef * (1 + error * num_samples / horizon)


# --8<-- [end:adaptive_kl_coef]
