r"""snippets/reasoning/prm_mcts.py 的测试。

真值：(1) 手算的 PUCT 与手算的逐次访问；(2) 二项分布的均值与方差、全部 2^N 种续写结果的精确枚举；
(3) 小树上递归算出的精确最优值；(4) 三步的聚合手算，以及「加一步不涨」的性质。
"""

import itertools
import math

import pytest
import torch

from snippets.reasoning.prm_mcts import (
    Node,
    aggregate_step_scores,
    mcts,
    puct_select,
    step_labels_monte_carlo,
)

# Q、先验、访问次数、c、手算该选谁
# 第一例 √ΣN=4：0.5+0.4·4/10=0.66 对 0.3+0.6·4/8=0.6，选 0
# 第二例 √ΣN=4：0.6+0.5·4/16=0.725 对 0.5+0.5·4/2=1.5，选 1
# 第三例 √ΣN=3：0.2+0.9·3/1=2.9 对 0.9+0.1·3/10=0.93，选 0
# 第四例 √ΣN=5：0.30+0.5·5/10=0.55 对 0.5+0.5·5/17=0.647，选 1
HAND = [
    ([0.5, 0.3], [0.4, 0.6], [9, 7], 1.0, 0),
    ([0.6, 0.5], [0.5, 0.5], [15, 1], 1.0, 1),
    ([0.2, 0.9], [0.9, 0.1], [0, 9], 1.0, 0),
    ([0.3, 0.5], [0.5, 0.5], [9, 16], 1.0, 1),
    ([0.3, 0.0], [0.5, 0.5], [1, 0], 1.0, 0),  # √1：0.55 对 0.5；根号里多 1 是 0.654 对 0.707
    ([0.50, 0.40], [0.1, 0.9], [3, 6], 0.1, 0),  # 0.5+0.0075 对 0.4+0.0386
]


def own_sqrt(q, p, n, c):  # 误传：根号里放自己的访问次数
    return max(range(len(q)), key=lambda a: q[a] + c * p[a] * math.sqrt(n[a]) / (1 + n[a]))


def no_root(q, p, n, c):  # 误传：忘了开根号
    return max(range(len(q)), key=lambda a: q[a] + c * p[a] * sum(n) / (1 + n[a]))


def no_prior(q, p, n, c):  # 误传：忘了先验
    return max(range(len(q)), key=lambda a: q[a] + c * math.sqrt(sum(n)) / (1 + n[a]))


@pytest.mark.parametrize("q, p, n, c, expected", HAND)
def test_puct_matches_hand_computation(q, p, n, c, expected):
    assert puct_select(q, p, n, c_puct=c) == expected


@pytest.mark.rejects
def test_wrong_puct_formulas_are_rejected():
    """先验悬殊、访问悬殊的两例：自己的根号、不开根号、不乘先验各被至少一个手算例子拒绝。"""
    extra = [
        ([0.5, 0.0], [0.5, 0.5], [8, 8], 0.5, 0),  # √16=4：0.5+1/9 对 1/9
        ([0.9, 0.5], [0.5, 0.5], [60, 4], 0.25, 0),  # √64=8：0.916 对 0.7；不开根号是 1.03 对 2.1
        ([0.5, 0.45], [0.9, 0.1], [8, 8], 1.0, 0),
        ([0.1, 0.3], [0.9, 0.1], [9, 7], 1.0, 0),  # 0.1+0.36 对 0.3+0.05；不乘先验 0.5 对 0.8
    ]
    cases = HAND + extra
    for q, p, n, c, expected in cases:
        assert puct_select(q, p, n, c_puct=c) == expected
    for wrong in (own_sqrt, no_root, no_prior):
        assert any(wrong(q, p, n, c) != expected for q, p, n, c, expected in cases), wrong.__name__


@pytest.mark.rejects
def test_missing_plus_one_divides_by_zero_but_ours_visits_unvisited_child():
    q, p, n = [0.4, 0.0], [0.5, 0.5], [1, 0]
    with pytest.raises(ZeroDivisionError):
        [0.5 / n[a] for a in range(2)]
    assert puct_select(q, p, n, c_puct=2.0) == 1  # 0.4+0.5 对 0+1


def test_plus_one_changes_the_choice():
    """N=(1,3)、c=1、先验各半、√4=2：有 +1 是 0.1+0.5 对 0.45+0.25，选 1；没有是 0.1+1 对 0.45+1/3，选 0。"""
    assert puct_select([0.1, 0.45], [0.5, 0.5], [1, 3], c_puct=1.0) == 1


def test_c_zero_is_greedy_and_ties_go_to_larger_prior():
    assert puct_select([0.2, 0.7, 0.3], [0.9, 0.0, 0.1], [0, 100, 0], c_puct=0.0) == 1
    assert puct_select([0.0, 0.0, 0.0], [0.2, 0.5, 0.3], [0, 0, 0], c_puct=1.0) == 1
    assert puct_select([0.1], [1.0], [7], c_puct=1.0) == 0  # 只有一个，没有别的可选


def test_large_c_follows_the_prior_visit_proportions():
    """c 很大时 Q 不起作用，访问次数之比趋于先验之比。"""
    visits, priors = [0, 0, 0], [0.6, 0.3, 0.1]
    for _ in range(2000):
        visits[puct_select([0.0, 1.0, 0.0], priors, visits, c_puct=1e6)] += 1
    for count, prior in zip(visits, priors, strict=True):
        assert abs(count / 2000 - prior) < 0.005


def tree(depth, generator):
    """深度为 depth 的随机树：叶子是 [0, 1] 的数，内部是 2 到 3 个子树的元组。"""
    if depth == 0:
        return torch.rand((), generator=generator).item()
    count = 2 + int(torch.randint(2, (), generator=generator))
    return tuple(tree(depth - 1, generator) for _ in range(count))


def optimum(state):
    return state if isinstance(state, float) else max(optimum(kid) for kid in state)


def expand(state):
    return [] if isinstance(state, float) else [(kid, 1 / len(state)) for kid in state]


def leaf_value(state):  # 内部节点给常数：只有终局有信息
    return state if isinstance(state, float) else 0.5


@pytest.mark.parametrize("seed", range(6))
def test_many_simulations_find_the_enumerated_optimum(seed):
    root = Node(tree(3, torch.Generator().manual_seed(seed)))
    best, node = optimum(root.state), root
    while not isinstance(node.state, float):
        node = mcts(node, expand=expand, evaluate=leaf_value, num_simulations=1000, c_puct=1.0)
        assert optimum(node.state) == best
    assert node.state == best and abs(node.q - best) < 1e-9  # 叶子的平均价值恰是它自己


def test_visits_and_values_are_conserved():
    """N(s)=1+ΣN(子)，W(s)=v(s)+ΣW(子)：每个展开过的节点都成立；价值取错层时第二条不成立。"""
    root = Node(tree(3, torch.Generator().manual_seed(1)))
    mcts(root, expand=expand, evaluate=leaf_value, num_simulations=57, c_puct=1.0)
    assert root.visits == 57
    stack = [root]
    while stack:
        node = stack.pop()
        if node.children:
            assert node.visits == 1 + sum(k.visits for k in node.children)
            total = leaf_value(node.state) + sum(k.value_sum for k in node.children)
            assert abs(node.value_sum - total) < 1e-12
            stack.extend(node.children)
        elif node.visits:
            assert abs(node.value_sum - node.visits * node.state) < 1e-12


def test_first_four_visits_by_hand():
    """两个叶子 0.2（先验 0.3）、0.9（先验 0.7），根估值 0.5，c=1。

    第 1 次展开根。第 2 次 ΣN=0，同分取先验大的：1。第 3 次 0+0.3·1/1 对 0.9+0.7·1/2：1。
    第 4 次 √2·0.3=0.424 对 0.9+0.7√2/3=1.23：1。
    """
    root = Node((0.2, 0.9))
    priors = {0.2: 0.3, 0.9: 0.7}
    best = mcts(
        root,
        expand=lambda s: [(k, priors[k]) for k in s] if isinstance(s, tuple) else [],
        evaluate=leaf_value,
        num_simulations=4,
        c_puct=1.0,
    )
    assert [k.visits for k in root.children] == [0, 3] and best.state == 0.9
    assert abs(root.q - (0.5 + 3 * 0.9) / 4) < 1e-12


def test_default_exploration_weight_and_prior_are_one():
    """两个叶子 0.9 与 0.2，先验各半。第 1 次展开根，第 2 次同分取前者，第 3 次 c=1 是 0.9+0.25 对 0.5，仍取前者。

    第 4 次 c=1 是 0.9+√2/6=1.14 对 √2/2=0.71；c=2 则在第 3 次是 1.4 对 1，第 4 次 0.9+√2/3=1.37 对 √2=1.41，取后者。
    """
    for options, visits in [({}, [3, 0]), ({"c_puct": 2.0}, [2, 1])]:
        root = Node((0.9, 0.2))
        mcts(root, expand=expand, evaluate=leaf_value, num_simulations=4, **options)
        assert [kid.visits for kid in root.children] == visits
        assert root.prior == 1.0


@pytest.mark.rejects
def test_value_from_the_wrong_depth_is_rejected():
    """用根的价值回传时所有子节点同值，找不到最优。"""
    root = Node((0.9, 0.1))
    wrong = mcts(root, expand=lambda s: expand(s)[::-1], evaluate=lambda s: 0.5, num_simulations=50)
    right = mcts(Node((0.9, 0.1)), expand=lambda s: expand(s)[::-1], evaluate=leaf_value, num_simulations=50)
    assert wrong.visits <= 26 and right.state == 0.9 and right.visits > 35


def test_returned_child_is_most_visited_not_highest_q():
    root = Node((0.5, 0.6), 1.0)
    root.children = [Node(0.5), Node(0.6)]
    root.children[0].visits, root.children[0].value_sum = 40, 20.0
    root.children[1].visits, root.children[1].value_sum = 2, 1.2
    root.visits = 43
    assert mcts(root, expand=expand, evaluate=leaf_value, num_simulations=1, c_puct=0.0).state == 0.5


def test_equal_visits_are_broken_by_mean_value():
    """访问 6 与 5、均值 0.5 与 0.6，c=0 的一次模拟走到后者，同为 6 次，取均值大的。"""
    root = Node((0.5, 0.6))
    root.children = [Node(0.5), Node(0.6)]
    root.children[0].visits, root.children[0].value_sum = 6, 3.0
    root.children[1].visits, root.children[1].value_sum = 5, 3.0
    best = mcts(root, expand=expand, evaluate=leaf_value, num_simulations=1, c_puct=0.0)
    assert [k.visits for k in root.children] == [6, 6] and best.state == 0.6


@pytest.mark.parametrize("c_puct, visits, best", [(0.0, [19, 0], 0.2), (1e6, [14, 5], 0.2)])
def test_exploration_weight_reaches_the_selection(c_puct, visits, best):
    """叶子 0.2、0.9，先验 3/4、1/4，20 次模拟：c=0 停在先验大的一个；c 极大时按先验分，19 次约为 14 与 5。"""
    priors = {0.2: 0.75, 0.9: 0.25}
    root = Node((0.2, 0.9))
    chosen = mcts(
        root,
        expand=lambda s: [(k, priors[k]) for k in s] if isinstance(s, tuple) else [],
        evaluate=leaf_value,
        num_simulations=20,
        c_puct=c_puct,
    )
    assert chosen.state == best
    assert all(abs(k.visits - n) <= (1 if c_puct else 0) for k, n in zip(root.children, visits, strict=True))


def test_empty_search_and_mismatched_lengths_are_refused():
    with pytest.raises(ValueError, match="终局"):
        mcts(Node(0.3), expand=expand, evaluate=leaf_value, num_simulations=5)
    with pytest.raises(ValueError, match="模拟次数"):
        mcts(Node((0.3, 0.4)), expand=expand, evaluate=leaf_value, num_simulations=0)
    with pytest.raises(ValueError, match="长度"):
        puct_select([0.1, 0.2], [1.0], [0, 0], c_puct=1.0)
    with pytest.raises(ValueError, match="长度"):
        puct_select([], [], [], c_puct=1.0)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.8])
def test_label_mean_and_variance_are_binomial(p):
    """枚举全部 2^5 种续写结果：软标签均值 p、方差 p(1-p)/5，硬标签均值 1-(1-p)^5。"""
    outcomes = torch.tensor(list(itertools.product([False, True], repeat=5)))
    k = outcomes.sum(1)
    probs = p**k * (1 - p) ** (5 - k)
    soft, hard = step_labels_monte_carlo(outcomes), step_labels_monte_carlo(outcomes, hard=True)
    torch.testing.assert_close((probs * soft).sum().item(), p, rtol=0, atol=1e-6)
    torch.testing.assert_close((probs * (soft - p) ** 2).sum().item(), p * (1 - p) / 5, rtol=0, atol=1e-6)
    torch.testing.assert_close((probs * hard).sum().item(), 1 - (1 - p) ** 5, rtol=0, atol=1e-6)


def test_labels_by_hand_and_empty_refused():
    successes = torch.tensor([[True, True, False, True], [False, False, False, True], [False] * 4])
    assert step_labels_monte_carlo(successes).tolist() == [0.75, 0.25, 0.0]
    assert step_labels_monte_carlo(successes, hard=True).tolist() == [1.0, 1.0, 0.0]
    with pytest.raises(ValueError, match="至少续写一次"):
        step_labels_monte_carlo(torch.zeros(3, 0, dtype=torch.bool))


@pytest.mark.parametrize(
    "mode, expected",
    [
        ("product", [0.5 * 0.8 * 0.4, 0.9 * 0.6]),
        ("min", [0.4, 0.6]),
        ("sum", [1.7, 1.5]),
        ("mean", [1.7 / 3, 0.75]),
        ("last", [0.4, 0.6]),
    ],
)
def test_aggregation_by_hand_ignores_padding(mode, expected):
    scores = torch.tensor([[0.5, 0.8, 0.4, 0.01], [0.9, 0.6, 0.02, 7.0]])
    mask = torch.tensor([[1, 1, 1, 0], [1, 1, 0, 0]], dtype=torch.bool)
    torch.testing.assert_close(aggregate_step_scores(scores, mask, mode=mode), torch.tensor(expected))


def test_last_takes_the_last_real_step_also_when_the_score_falls_in_the_middle():
    scores = torch.tensor([[0.9, 0.1, 0.5]])
    mask = torch.tensor([[True, False, True]])
    assert aggregate_step_scores(scores, mask, mode="last").item() == 0.5


def test_an_extra_step_never_raises_min_or_product_but_raises_sum():
    scores = torch.rand(50, 6, generator=torch.Generator().manual_seed(3))
    shorter, longer = torch.arange(6).lt(4).expand(50, 6), torch.arange(6).lt(5).expand(50, 6)
    for mode in ("min", "product"):
        assert (
            aggregate_step_scores(scores, longer, mode=mode)
            <= aggregate_step_scores(scores, shorter, mode=mode)
        ).all()
    assert (
        aggregate_step_scores(scores, longer, mode="sum") > aggregate_step_scores(scores, shorter, mode="sum")
    ).all()


def test_unknown_mode_and_empty_answer_are_refused():
    scores, mask = torch.rand(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="product, min, sum, mean, last"):
        aggregate_step_scores(scores, mask, mode="max")
    with pytest.raises(ValueError, match="一步都没有"):
        aggregate_step_scores(scores, mask & torch.tensor([[True], [False]]), mode="min")
