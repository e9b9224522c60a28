r"""过程奖励与树搜索的四个零件：蒙特卡洛步标签、步得分的聚合、PUCT 选择，以及一个最小的 MCTS。

页面：docs/reasoning/prm-mcts.md

不包含：PRM 的训练、AlphaZero 的根节点噪声、虚拟损失、双人博弈的符号翻转（写答案只有一方，价值不取反）、温度采样。

价值一律是「越大越好、由同一方获得」的标量。没有访问过的子节点取 Q=0（AlphaGo Zero 的初始化），价值若不在 [0, 1] 附近，
这个默认会改变探索的先后。

References:
    Math-Shepherd §3.3，https://arxiv.org/abs/2312.08935（软、硬估计；整条得分取最小）
    Let's Verify Step by Step，https://arxiv.org/abs/2305.20050（整条得分取乘积）
    AlphaGo Zero，Nature 550 (2017)，Methods 的 Select（PUCT）
    AlphaZero，https://arxiv.org/abs/1712.01815
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["step_labels_monte_carlo", "aggregate_step_scores", "puct_select", "Node", "mcts"]

AGGREGATIONS = ("product", "min", "sum", "mean", "last")


def step_labels_monte_carlo(successes: Bool[Tensor, "T N"], *, hard: bool = False) -> Float[Tensor, " T"]:
    r"""从每一步往后续写 N 次，由答对的次数给这一步打标签。

    $$q_t^{\text{soft}}=\frac1N\sum_{j=1}^N c_{t,j},\qquad q_t^{\text{hard}}=\max_j c_{t,j}$$

    注意：软标签的期望是续写者从这里答对的概率 $p_t$，标准差是 $\sqrt{p_t(1-p_t)/N}$；它量的是续写者，不是这一步的对错。

    Args:
        successes: $c_{t,j}$，第 $t$ 步之后第 $j$ 次续写是否答对。
        hard: 取硬标签（有一次对就是 1）。

    Returns:
        每一步的标签，在 $[0,1]$ 之间。

    References:
        Math-Shepherd §3.3，https://arxiv.org/abs/2312.08935
    """
    if successes.shape[-1] == 0:
        raise ValueError("续写次数 N 是 0，没有标签可算：至少续写一次。")
    return successes.any(-1).float() if hard else successes.float().mean(-1)


# --8<-- [start:aggregate_step_scores]
def aggregate_step_scores(
    step_scores: Float[Tensor, "B T"], step_mask: Bool[Tensor, "B T"], *, mode: str
) -> Float[Tensor, " B"]:
    r"""把每一步的得分合成整条回答的得分。

    注意：sum 随步数涨，mean 会被高分的填充步抬高；min 与 product 加一步绝不会涨（得分不超过 1 时）。

    Args:
        step_scores: 每一步的得分，product 要求在 $[0,1]$ 之间。
        step_mask: 哪些是真的步；每条至少一步。
        mode: product、min、sum、mean、last 之一。

    Returns:
        每条回答一个得分。
    """
    if mode not in AGGREGATIONS:
        raise ValueError(f"不认识的聚合方式 {mode!r}：可选 {', '.join(AGGREGATIONS)}。")
    if not step_mask.any(-1).all():
        raise ValueError("有回答一步都没有，得分没有定义：先去掉空回答。")
    if mode == "product":
        return step_scores.masked_fill(~step_mask, 1.0).prod(-1)
    if mode == "min":
        return step_scores.masked_fill(~step_mask, math.inf).amin(-1)
    total = step_scores.masked_fill(~step_mask, 0.0).sum(-1)
    if mode == "sum":
        return total
    if mode == "mean":
        return total / step_mask.sum(-1)
    positions = torch.arange(step_mask.shape[-1], device=step_mask.device)
    last = (positions * step_mask).amax(-1, keepdim=True)  # 最后一个真的步
    return step_scores.gather(-1, last).squeeze(-1)


# --8<-- [end:aggregate_step_scores]


# --8<-- [start:puct_select]
def puct_select(
    q_values: Sequence[float], priors: Sequence[float], visits: Sequence[int], *, c_puct: float
) -> int:
    r"""按 PUCT 选下一个要走的子节点；同分取先验大的。

    $$a^*=\arg\max_a\;Q(s,a)+c\,P(a\mid s)\frac{\sqrt{\sum_b N(s,b)}}{1+N(s,a)}$$

    Args:
        q_values: 每个子节点的平均价值 $Q(s,a)$。
        priors: 策略给的先验 $P(a\mid s)$。
        visits: 每个子节点的访问次数 $N(s,a)$。
        c_puct: 探索的权重 $c$，0 就是只看 $Q$。

    Returns:
        选中的下标。

    References:
        AlphaGo Zero，Methods；AlphaZero 的 $c$ 另随访问次数对数增长。
    """
    if not len(q_values) == len(priors) == len(visits) > 0:
        raise ValueError("Q、先验、访问次数的长度要相同且不为零。")
    explore = c_puct * math.sqrt(sum(visits))
    scores = [q + explore * p / (1 + n) for q, p, n in zip(q_values, priors, visits, strict=True)]
    return max(range(len(scores)), key=lambda a: (scores[a], priors[a]))


# --8<-- [end:puct_select]


class Node:
    """搜索树的一个节点：状态、先验、访问次数、价值之和、子节点。"""

    __slots__ = ("state", "prior", "visits", "value_sum", "children")

    def __init__(self, state: Any, prior: float = 1.0):
        self.state, self.prior = state, prior
        self.visits, self.value_sum, self.children = 0, 0.0, []

    @property
    def q(self) -> float:
        """平均价值；没有访问过是 0。"""
        return self.value_sum / self.visits if self.visits else 0.0


# --8<-- [start:mcts]
def mcts(
    root: Node,
    *,
    expand: Callable[[Any], list[tuple[Any, float]]],
    evaluate: Callable[[Any], float],
    num_simulations: int,
    c_puct: float = 1.0,
) -> Node:
    """从根节点做若干次模拟：选择、展开、估值、回传；返回访问最多的子节点。

    Args:
        root: 根节点；可以是上一步留下的子树，统计接着用。
        expand: 状态到 (子状态, 先验) 的列表，终局返回空列表。
        evaluate: 状态的价值，终局也由它给。
        num_simulations: 模拟次数。
        c_puct: 探索的权重。

    Returns:
        访问次数最多的子节点，同数取平均价值大的。
    """
    for _ in range(num_simulations):
        node, path = root, [root]
        while node.children:  # 选择：走到还没展开的节点
            kids = node.children
            best = puct_select(
                [k.q for k in kids], [k.prior for k in kids], [k.visits for k in kids], c_puct=c_puct
            )
            node = kids[best]
            path.append(node)
        node.children = [Node(state, prior) for state, prior in expand(node.state)]  # 展开
        value = evaluate(node.state)  # 估值：用叶子自己的，不是根的
        for visited in path:  # 回传：这条路上每个节点都记一次
            visited.visits += 1
            visited.value_sum += value
    if not root.children:
        raise ValueError("根节点是终局，或者模拟次数是 0，没有子节点可选。")
    return max(root.children, key=lambda k: (k.visits, k.q))


# --8<-- [end:mcts]
