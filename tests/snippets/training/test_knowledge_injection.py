"""知识注入的真值：四档的定义用穷举的真值表与手写的例子；线性记忆的写入用自动求导；
干扰的期望用手算、极限情形与球面上均匀键的蒙特卡洛；名字的份额用真的把最小范数解解出来。
错误写法（按混合正确率切段、只看采样、只看梯度方向不看误差、把交叉的比例写错）定义在文件末尾，断言被同一个真值拒绝。
"""

import itertools

import pytest
import torch

from snippets.training.knowledge_injection import (
    expected_interference,
    extractable_share,
    knowledge_category,
    linear_memory_interference,
    linear_memory_write,
)

NEW, OLD, KEY_DIM, VALUES = 3, 4, 7, 5


def booleans(rows):
    return torch.tensor(rows, dtype=torch.bool)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=generator(seed), dtype=torch.float64)


def unit(*shape, g):
    x = torch.randn(*shape, generator=g, dtype=torch.float64)
    return x / x.norm(dim=-1, keepdim=True)


def memory_case():
    return randn(VALUES, KEY_DIM, seed=1), randn(NEW, KEY_DIM, seed=2), randn(NEW, VALUES, seed=3)


# 手算


def test_four_facts_get_the_four_categories():
    """两个提示、各采样三次：贪心全对；贪心对一个；贪心全错而采样对一次；从来不对。"""
    greedy = booleans([[1, 1], [1, 0], [0, 0], [0, 0]])
    sampled = booleans([[[0] * 3] * 2, [[0] * 3] * 2, [[0, 0, 0], [0, 1, 0]], [[0] * 3] * 2])
    assert knowledge_category(greedy, sampled) == ["HighlyKnown", "MaybeKnown", "WeaklyKnown", "Unknown"]


def test_category_matches_the_truth_table():
    """枚举两个提示、各采样两次的 64 种情况：真值表按论文图 2 的 P_correct 写成分数的比较。"""
    for outcome in itertools.product([0, 1], repeat=6):
        greedy, sampled = list(outcome[:2]), list(outcome[2:])
        p_greedy, p_sampled = sum(greedy) / 2, sum(sampled) / 4
        expected = {
            p_greedy == 1: "HighlyKnown",
            0 < p_greedy < 1: "MaybeKnown",
            p_greedy == 0 and p_sampled > 0: "WeaklyKnown",
            p_greedy == 0 and p_sampled == 0: "Unknown",
        }[True]
        sampled_tensor = booleans([[sampled[:2], sampled[2:]]])
        assert knowledge_category(booleans([greedy]), sampled_tensor) == [expected]


def test_interference_by_hand():
    """键 (1,0)、(0.6,0.8)，误差 (1,0)、(0,2)；旧键 (0,1)：内积 0 与 0.8，位移 (0, 1.6)，平方 2.56。"""
    errors, new_keys = torch.tensor([[1.0, 0.0], [0.0, 2.0]]), torch.tensor([[1.0, 0.0], [0.6, 0.8]])
    actual = linear_memory_interference(errors, new_keys, torch.tensor([[0.0, 1.0]]))
    torch.testing.assert_close(actual, torch.tensor([2.56]))
    half = linear_memory_interference(errors, new_keys, torch.tensor([[0.0, 1.0]]), lr=0.5)
    torch.testing.assert_close(half, torch.tensor([0.64]))


def test_expected_interference_in_the_two_limits():
    """c=0：n/d；c=1：所有键相同，内积恒为 1，误差独立，平方和就是 n。步长与误差都按平方进来。"""
    assert expected_interference(num_new=6, key_dim=8) == pytest.approx(0.75)
    assert expected_interference(num_new=6, key_dim=8, overlap=1.0) == pytest.approx(6.0)
    assert expected_interference(num_new=6, key_dim=8, error_norm=2.0, lr=0.5) == pytest.approx(0.75)
    assert expected_interference(num_new=1, key_dim=1, overlap=0.3) == pytest.approx(
        1.0
    )  # 一维单位键：内积平方恒 1
    assert expected_interference(num_new=0, key_dim=8, overlap=0.5) == 0.0


# 独立实现


def test_write_is_one_gradient_step_on_the_squared_error():
    memory, keys, targets = memory_case()
    leaf = memory.clone().requires_grad_()
    loss = 0.5 * sum(((leaf @ k - v) ** 2).sum() for k, v in zip(keys, targets, strict=True))
    (gradient,) = torch.autograd.grad(loss, leaf)
    torch.testing.assert_close(linear_memory_write(memory, keys, targets, lr=0.3), memory - 0.3 * gradient)


def test_default_step_is_one():
    memory, keys, targets = memory_case()
    assert torch.equal(
        linear_memory_write(memory, keys, targets), linear_memory_write(memory, keys, targets, lr=1.0)
    )


def test_interference_is_the_actual_change_of_the_readout():
    memory, keys, targets = memory_case()
    old_keys = randn(OLD, KEY_DIM, seed=4)
    written = linear_memory_write(memory, keys, targets, lr=0.7)
    expected = torch.stack([((written - memory) @ k).square().sum() for k in old_keys])
    errors = targets - torch.stack([memory @ k for k in keys])
    torch.testing.assert_close(linear_memory_interference(errors, keys, old_keys, lr=0.7), expected)


@pytest.mark.parametrize("overlap", [0.0, 0.3, 0.8])
def test_expected_interference_equals_monte_carlo(overlap):
    """随机键、随机旧键、独立误差，60000 次；维数取小（4），让 1/d 那一项看得见。相对误差 4 倍标准误以内。"""
    g, draws, n, d = generator(5), 60_000, 3, 4
    shared = unit(draws, 1, d, g=g)
    keys = overlap**0.5 * shared + (1 - overlap) ** 0.5 * unit(draws, n + 1, d, g=g)
    errors = unit(draws, n, VALUES, g=g)
    inner = (keys[:, :n] * keys[:, n:]).sum(-1)  # (draws, n)
    samples = (inner[..., None] * errors).sum(1).square().sum(-1)
    standard_error = (samples.std() / draws**0.5).item()
    exact = expected_interference(num_new=n, key_dim=d, overlap=overlap)
    assert abs(samples.mean().item() - exact) < 4 * standard_error
    assert standard_error < 0.02 * exact


@pytest.mark.parametrize(("num_phrasings", "context_norm"), [(1, 3.0), (5, 3.0), (4, 0.5)])
def test_share_is_what_gradient_descent_from_zero_reads_out(num_phrasings, context_norm):
    """名字与各上下文取标准正交基，从 0 出发做梯度下降直到误差为 0，再只用名字去读。"""
    basis = torch.eye(num_phrasings + 1, dtype=torch.float64)
    keys = basis[0] + context_norm * basis[1:]
    weights = torch.zeros(num_phrasings + 1, dtype=torch.float64)
    for _ in range(4000):
        weights = weights + 0.02 * (1 - keys @ weights) @ keys
    torch.testing.assert_close(keys @ weights, torch.ones(num_phrasings, dtype=torch.float64))
    share = extractable_share(num_phrasings=num_phrasings, context_norm=context_norm)
    assert weights[0].item() == pytest.approx(share, abs=1e-7)


# 性质


def test_known_facts_write_nothing():
    memory, keys, _ = memory_case()
    assert torch.equal(linear_memory_write(memory, keys, keys @ memory.mT), memory)


def test_cross_entropy_has_the_same_structure():
    """softmax 交叉熵对 W 的梯度是（概率减独热）外积键：概率接近 1 的事实几乎没有梯度。"""
    keys = randn(1, KEY_DIM, seed=6)
    memory = torch.zeros(VALUES, KEY_DIM, dtype=torch.float64, requires_grad=True)
    loss = torch.nn.functional.cross_entropy(keys @ memory.mT, torch.tensor([2]))
    (gradient,) = torch.autograd.grad(loss, memory)
    error = torch.nn.functional.one_hot(torch.tensor([2]), VALUES) - 1 / VALUES
    written = linear_memory_write(torch.zeros_like(gradient), keys, error.double())  # W=0：误差就是 targets
    torch.testing.assert_close(-gradient, written)


def test_orthogonal_keys_do_not_interfere():
    basis = torch.eye(KEY_DIM, dtype=torch.float64)
    moved = linear_memory_interference(randn(NEW, VALUES), basis[:NEW], basis[NEW:])
    assert torch.equal(moved, torch.zeros(KEY_DIM - NEW, dtype=torch.float64))


def test_more_phrasings_always_help_and_repeats_do_not():
    shares = [extractable_share(num_phrasings=m, context_norm=3.0) for m in (1, 2, 5, 10)]
    assert shares == sorted(shares) and shares[0] == pytest.approx(0.1)
    keys = torch.tensor([[1.0, 3.0]], dtype=torch.float64).repeat(5, 1)  # 同一种说法五遍
    weights = torch.linalg.pinv(keys) @ torch.ones(5, dtype=torch.float64)
    assert weights[0].item() == pytest.approx(extractable_share(num_phrasings=1, context_norm=3.0))


def test_a_template_shared_by_everyone_is_outside_the_formula():
    """P 人共用一个模板 b：Gram 矩阵是 I+s²11ᵀ，名字读出自己答案的一份是 1-s²/(1+s²P)，不是 1/(1+s²)。"""
    people, context_norm = 6, 3.0
    basis = torch.eye(people + 1, dtype=torch.float64)
    keys = basis[:people] + context_norm * basis[people]
    memory = (torch.linalg.pinv(keys) @ torch.eye(people, dtype=torch.float64)).mT
    share = (memory @ basis[:people].mT).diagonal()
    by_hand = 1 - context_norm**2 / (1 + context_norm**2 * people)
    torch.testing.assert_close(share, torch.full_like(share, by_hand))
    assert by_hand - extractable_share(num_phrasings=1, context_norm=context_norm) > 0.7


# 边界


def test_single_prompt_has_no_maybe_known():
    greedy, sampled = booleans([[1], [0], [0]]), booleans([[[0, 0]], [[1, 0]], [[0, 0]]])
    assert knowledge_category(greedy, sampled) == ["HighlyKnown", "WeaklyKnown", "Unknown"]


@pytest.mark.parametrize("overlap", [-0.1, 1.1])
def test_overlap_outside_the_unit_interval_is_refused(overlap):
    with pytest.raises(ValueError, match="overlap"):
        expected_interference(num_new=1, key_dim=2, overlap=overlap)


@pytest.mark.parametrize(("num_new", "key_dim"), [(-1, 2), (1, 0)])
def test_meaningless_sizes_are_refused(num_new, key_dim):
    with pytest.raises(ValueError, match="num_new"):
        expected_interference(num_new=num_new, key_dim=key_dim)


def test_zero_phrasings_are_refused():
    with pytest.raises(ValueError, match="num_phrasings"):
        extractable_share(num_phrasings=0, context_norm=1.0)


# 错误写法


def pooled_category(greedy, sampled):
    """误传：把所有回答混在一起，按正确率切四段。"""
    rate = torch.cat([greedy.flatten(), sampled.flatten()]).double().mean().item()
    return (
        "HighlyKnown" if rate > 0.75 else "MaybeKnown" if rate > 0.4 else "WeaklyKnown" if rate else "Unknown"
    )


def greedy_only_category(greedy):
    """误传：贪心答错就是 Unknown。"""
    return "HighlyKnown" if greedy.all() else "MaybeKnown" if greedy.any() else "Unknown"


@pytest.mark.rejects
def test_pooling_all_answers_is_rejected():
    """贪心全对、采样全错：定义是 HighlyKnown，混合正确率只有 1/4。贪心全错、采样全对：定义是 WeaklyKnown。"""
    high = booleans([[1, 1]]), booleans([[[0, 0, 0], [0, 0, 0]]])
    weak = booleans([[0, 0]]), booleans([[[1, 1, 1], [1, 1, 1]]])
    assert knowledge_category(*high) == ["HighlyKnown"] and pooled_category(*high) == "WeaklyKnown"
    assert knowledge_category(*weak) == ["WeaklyKnown"] and pooled_category(*weak) == "MaybeKnown"


@pytest.mark.rejects
def test_greedy_only_is_rejected():
    greedy, sampled = booleans([[0, 0]]), booleans([[[0, 1], [0, 0]]])
    assert knowledge_category(greedy, sampled) == ["WeaklyKnown"]
    assert greedy_only_category(greedy) == "Unknown"


@pytest.mark.rejects
def test_linear_overlap_and_inverse_root_dimension_are_rejected():
    """误传：期望平方位移与 c 成正比、与 1/√d 成正比。真值是 c=0.5、d=4 时的精确平方内积。"""
    exact = 0.5**2 + (1 - 0.5**2) / 4  # 手算：0.25+0.1875
    assert expected_interference(num_new=1, key_dim=4, overlap=0.5) == pytest.approx(exact)
    for wrong in (0.5 + 0.5 / 4, 0.5**2 + (1 - 0.5) ** 2 / 4, 0.5**2 + (1 - 0.5**2) / 4**0.5):
        assert abs(wrong / exact - 1) > 0.1


@pytest.mark.rejects
def test_hebbian_write_is_rejected():
    """误传：不看误差，直接加 v k^T。已经会的事实会被写第二遍，读出变成两倍。"""
    memory, keys = randn(VALUES, KEY_DIM, seed=1), unit(1, KEY_DIM, g=generator(7))
    target = keys @ memory.mT
    hebbian = memory + target.mT @ keys
    torch.testing.assert_close(keys @ hebbian.mT, 2 * target)
    torch.testing.assert_close(keys @ linear_memory_write(memory, keys, target).mT, target)
