r"""反思频率怎么数，一个行为在策略梯度下多久起飞，要采多少组才第一次见到它。

页面：docs/reasoning/aha-moment.md

不包含：采样与训练循环、优势（`snippets/rl/grpo.py`）、判断一次反思有没有用。

设定：互斥的几种行为各有一个 logit，概率是 softmax，行为 $a$ 的期望奖励是 $r_a$，$\bar r=\sum_bp_br_b$。
对 logit 的梯度是 $\partial\bar r/\partial z_a=p_a(r_a-\bar r)$，代回 $\log p_a=z_a-\log\sum_be^{z_b}$ 就是梯度流。
只有两种行为、奖励差 $\Delta=r_1-r_0>0$ 时，对数几率 $u=\log\frac p{1-p}$ 满足 $\dot u=2\Delta p(1-p)$；
自然梯度（也是每步加 KL 惩罚的乘法更新的小步极限）是 $\dot u=\Delta$。前者积分用到
$\int\frac{dp}{p^2(1-p)^2}=\frac1{1-p}-\frac1p+2\log\frac p{1-p}$。

References:
    Dr. GRPO §2.3（基座里已有反思词），https://arxiv.org/abs/2503.20783
    DeepSeek-R1 的 Nature 版扩展数据图 1（反思词的词表），https://www.nature.com/articles/s41586-025-09422-z
"""

import math
import re
from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor

__all__ = [
    "reflection_flags",
    "reflection_rate",
    "softmax_policy_gradient_flow",
    "time_to_takeoff",
    "expected_groups_until_sampled",
]


# --8<-- [start:reflection_rate]
def reflection_flags(texts: Sequence[str], keywords: Sequence[str]) -> list[bool]:
    r"""每条文本里有没有出现任一关键词：整词匹配，不分大小写。

    注意：整词才算，`check` 不匹配 checkout；这只是数词，不是判断有没有反思。

    Args:
        texts: 回答。
        keywords: 词或短语；不是正则。

    Returns:
        与 texts 等长的布尔列表。
    """
    if not keywords:
        raise ValueError("关键词表是空的，频率恒为 0；请至少给一个词。")
    pattern = re.compile(r"(?<!\w)(?:" + "|".join(map(re.escape, keywords)) + r")(?!\w)", re.IGNORECASE)
    return [pattern.search(text) is not None for text in texts]


def reflection_rate(texts: Sequence[str], keywords: Sequence[str]) -> float:
    r"""反思频率：出现过关键词的回答占多少；一条里出现十次也只算一条。

    Args:
        texts: 回答，至少一条。
        keywords: 词或短语。

    Returns:
        0 到 1 的比例。
    """
    if not texts:
        raise ValueError("一条回答也没有，频率没有定义。")
    return sum(reflection_flags(texts, keywords)) / len(texts)


# --8<-- [end:reflection_rate]


# --8<-- [start:flow]
def softmax_policy_gradient_flow(
    probs: Float[Tensor, " A"], rewards: Float[Tensor, " A"], *, natural: bool = False
) -> Float[Tensor, " A"]:
    r"""期望奖励的梯度流：各行为对数概率的变化率。

    $$\frac{d\log p_a}{dt}=p_a(r_a-\bar r)-\sum_bp_b^2(r_b-\bar r)$$

    注意：自然梯度是 $r_a-\bar r$，少一个 $p_a$；两种下 $p_a=0$ 都不会变成非零。

    Args:
        probs: 各行为的概率，和为 1。
        rewards: 各行为的期望奖励。
        natural: 真为自然梯度（复制者方程）。

    Returns:
        每种行为一个变化率。
    """
    centered = rewards - probs @ rewards
    if natural:
        return centered
    return probs * centered - (probs * probs) @ centered


# --8<-- [end:flow]


# --8<-- [start:takeoff]
def time_to_takeoff(prior: float, *, gain: float, threshold: float = 0.5, natural: bool = False) -> float:
    r"""两种行为时，概率从 prior 升到 threshold 要多久（梯度流的时间）。

    $$t=\frac{F(p_1)-F(p_0)}{2\Delta},\quad F(p)=\frac1{1-p}-\frac1p+2\log\frac p{1-p}$$

    注意：自然梯度把 $F$ 换成对数几率，分母换成 $\Delta$；prior 为 0 时是无穷。

    Args:
        prior: 起点 $p_0$，在 [0, 1) 内。
        gain: 奖励差 $\Delta$，大于 0。
        threshold: 终点 $p_1$，不小于 prior，小于 1。
        natural: 真为自然梯度。

    Returns:
        时间；学习率为 $\eta$ 的小步更新约需这个值除以 $\eta$ 步。
    """
    if gain <= 0:
        raise ValueError(f"gain={gain}：行为没有好处时概率不升，起飞时间没有定义。")
    if not 0 <= prior <= threshold < 1 or threshold == 0:
        raise ValueError(f"要求 0 ≤ prior ≤ threshold < 1，收到 {prior} 与 {threshold}。")
    if prior == 0:
        return math.inf

    def potential(p: float) -> float:
        log_odds = math.log(p / (1 - p))
        return log_odds if natural else 1 / (1 - p) - 1 / p + 2 * log_odds

    return (potential(threshold) - potential(prior)) / (gain if natural else 2 * gain)


# --8<-- [end:takeoff]


# --8<-- [start:first_sample]
def expected_groups_until_sampled(prior: float, *, group_size: int) -> float:
    r"""第一次采到这个行为，平均要采几组（含采到的那一组）。

    $$\frac1{1-(1-p_0)^G}\approx\frac1{Gp_0}$$

    Args:
        prior: 每条回答出现这个行为的概率 $p_0$。
        group_size: 每组的条数 $G$。

    Returns:
        期望组数；$p_0=0$ 时是无穷。
    """
    if not 0 <= prior <= 1 or group_size < 1:
        raise ValueError(f"要求 0 ≤ prior ≤ 1 且 group_size ≥ 1，收到 {prior} 与 {group_size}。")
    if prior in (0, 1):
        return math.inf if prior == 0 else 1.0
    return -1 / math.expm1(group_size * math.log1p(-prior))  # 小概率时不损失精度


# --8<-- [end:first_sample]
