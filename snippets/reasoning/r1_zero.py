r"""读 R1-Zero 一类实验要用的三个小统计量：pass@k、正确率的标准误、组里有没有学习信号。

页面：docs/reasoning/r1-zero.md

不包含：奖励（`rule_based_reward.py`）、GRPO 的优势与损失（`snippets/rl/grpo.py`）、采样、配对检验。
只用标准库的浮点数；$n$ 次独立采样里对了 $c$ 次，单次的正确率是 $p$。

pass@k 的真值是 $1-(1-p)^k$。把 $\hat p=c/n$ 代进去有偏：$(1-x)^k$ 是凸函数，由 Jensen 不等式
$\mathbb E[(1-c/n)^k]\ge(1-p)^k$，所以代入法平均偏低（$k\ge2$ 且 $0<p<1$）。对全部 $k$ 元子集求平均则无偏，
因为每个子集都是 $k$ 次独立采样。

References:
    Codex 论文式 1（pass@k 的无偏估计），https://arxiv.org/abs/2107.03374
    DeepSeek-R1 v2（R1-Zero 的设置，每题 16 条），https://arxiv.org/abs/2501.12948
"""

import math

__all__ = ["pass_at_k", "accuracy_standard_error", "two_proportion_z", "mixed_group_probability"]


# --8<-- [start:pass_at_k]
def pass_at_k(num_samples: int, num_correct: int, *, k: int) -> float:
    r"""pass@k 的无偏估计：从 $n$ 条里不放回地取 $k$ 条，至少一条对的概率。

    $$\widehat{\text{pass@}k}=1-\binom{n-c}{k}\Big/\binom{n}{k}$$

    注意：要求 $n\ge k$；逐因子连乘，不出现大组合数；错的不足 $k$ 条时有一个因子是 0。

    Args:
        num_samples: 一道题采样的条数 $n$。
        num_correct: 其中对的条数 $c$。
        k: 允许尝试的次数 $k$。

    Returns:
        0 到 1 的概率；多道题再取平均。

    References:
        Codex 论文式 1 与图 3 的连乘写法。
    """
    if not 0 <= num_correct <= num_samples:
        raise ValueError(f"对了 {num_correct} 条、共 {num_samples} 条：条数不合理。")
    if not 1 <= k <= num_samples:
        raise ValueError(f"k={k}，只采样了 {num_samples} 条：无偏估计要求 1 ≤ k ≤ n，请多采样。")
    wrong = num_samples - num_correct
    return 1.0 - math.prod((wrong - i) / (num_samples - i) for i in range(k))


# --8<-- [end:pass_at_k]


# --8<-- [start:standard_error]
def accuracy_standard_error(num_correct: int, num_questions: int) -> float:
    r"""正确率的标准误：把题目看作独立抽取的样本。

    $$\mathrm{SE}=\sqrt{\hat p(1-\hat p)/N}$$

    注意：只用于每题一次作答；每题多次取平均时它偏大。不含换种子重训的随机。

    Args:
        num_correct: 答对的题数。
        num_questions: 题目总数 $N$。

    Returns:
        标准误，与正确率同单位（0.014 即 1.4 个百分点）。
    """
    if num_questions < 1 or not 0 <= num_correct <= num_questions:
        raise ValueError(f"答对 {num_correct} 题、共 {num_questions} 题：题数不合理。")
    rate = num_correct / num_questions
    return math.sqrt(rate * (1 - rate) / num_questions)


def two_proportion_z(num_correct: tuple[int, int], num_questions: tuple[int, int]) -> float:
    r"""两个独立正确率之差的 z 值（合并方差），第二个减第一个。

    $$z=\frac{\hat p_2-\hat p_1}{\sqrt{\hat p(1-\hat p)(1/N_1+1/N_2)}},\quad\hat p=\frac{c_1+c_2}{N_1+N_2}$$

    注意：两次用的是同一批题时，应改用逐题配对的检验；这里当作两批独立的题。

    Args:
        num_correct: 两次各答对的题数。
        num_questions: 两次各自的题目总数。

    Returns:
        z 值；双侧 5% 的界限是 1.96。
    """
    total = sum(num_questions)
    pooled = sum(num_correct) / total
    if not 0 < pooled < 1:
        raise ValueError("两次全对或全错，方差为 0，z 没有定义。")
    rates = [c / n for c, n in zip(num_correct, num_questions, strict=True)]
    variance = pooled * (1 - pooled) * sum(1 / n for n in num_questions)
    return (rates[1] - rates[0]) / math.sqrt(variance)


# --8<-- [end:standard_error]


# --8<-- [start:mixed_group]
def mixed_group_probability(pass_rate: float, *, group_size: int = 16) -> float:
    r"""一组里有对有错的概率：0/1 奖励时，只有这样的组才有组内优势。

    $$1-(1-p)^G-p^G$$

    注意：$p$ 很小时约等于 $Gp$，用 expm1 与 log1p 避免相减失真。

    Args:
        pass_rate: 这道题单次答对的概率 $p$。
        group_size: 每题采样的条数 $G$；R1-Zero 是 16。

    Returns:
        0 到 1 的概率。
    """
    if not 0 <= pass_rate <= 1 or group_size < 2:
        raise ValueError(f"pass_rate={pass_rate}、group_size={group_size}：应为概率，且组至少两条。")
    if pass_rate == 1:
        return 0.0
    return -math.expm1(group_size * math.log1p(-pass_rate)) - pass_rate**group_size


# --8<-- [end:mixed_group]
