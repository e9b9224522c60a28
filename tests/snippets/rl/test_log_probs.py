"""逐 token 对数概率与求和的真值有三个来源。

1. 手算：概率取简单分数，对数能直接写出来。
2. 独立实现：PyTorch 的 `cross_entropy(reduction="none")` 与 TRL 1.16 的 `selective_log_softmax`。
3. 穷举：词表和长度都很小的马尔可夫链，所有序列的概率可以用乘法逐条算出，总和必须是 1。
"""

import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from trl.trainer.utils import selective_log_softmax

from snippets.rl.log_probs import IGNORE_INDEX, log_probs_from_logits, sequence_log_probs

B, T, V = 2, 3, 5


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


@pytest.fixture
def markov(generator):
    """词表为 3 的马尔可夫链：第 t 个位置的 logits 只看第 t 个 token，预测第 t+1 个。"""
    return torch.randn(3, 3, generator=generator, dtype=torch.float64)


def chain_probability(markov, tokens):
    """用概率连乘算 P(tokens[1:] | tokens[0])，不经过任何对数。"""
    transition = markov.softmax(-1)
    probability = 1.0
    for current, following in itertools.pairwise(tokens):
        probability *= transition[current, following].item()
    return probability


# 手算 ----------------------------------------------------------------------------------------------


def test_probabilities_one_quarter_and_three_quarters():
    """logits (0, ln 3) 的概率是 (1/4, 3/4)，对数概率是 (-ln 4, ln 3 - ln 4)。"""
    logits = torch.tensor([[[0.0, math.log(3)], [0.0, math.log(3)]]])
    expected = torch.tensor([[-math.log(4), math.log(3) - math.log(4)]])
    torch.testing.assert_close(log_probs_from_logits(logits, torch.tensor([[0, 1]])), expected)


def test_sequence_log_prob_is_the_sum_over_response_tokens():
    """提示 -1、回答 -2 与 -3：求和得 -5，平均会得 -2.5，把提示算进去会得 -6。"""
    log_probs = torch.tensor([[-1.0, -2.0, -3.0]])
    mask = torch.tensor([[False, True, True]])
    torch.testing.assert_close(sequence_log_probs(log_probs, mask), torch.tensor([-5.0]))


# 与独立实现一致 ------------------------------------------------------------------------------------


def test_matches_cross_entropy_forward_and_gradient(generator):
    logits = torch.randn(B, T, V, generator=generator, requires_grad=True)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[0, 1] = IGNORE_INDEX
    upstream = torch.randn(B, T, generator=generator)

    ours = log_probs_from_logits(logits, labels)
    theirs = -F.cross_entropy(logits.transpose(1, 2), labels, reduction="none")
    torch.testing.assert_close(ours, theirs)

    (our_grad,) = torch.autograd.grad(ours, logits, upstream)
    (their_grad,) = torch.autograd.grad(theirs, logits, upstream)
    torch.testing.assert_close(our_grad, their_grad)


def test_matches_trl_selective_log_softmax_forward_and_gradient(generator):
    logits = torch.randn(B, T, V, generator=generator, requires_grad=True)
    labels = torch.randint(V, (B, T), generator=generator)
    upstream = torch.randn(B, T, generator=generator)

    ours, theirs = log_probs_from_logits(logits, labels), selective_log_softmax(logits, labels)
    torch.testing.assert_close(ours, theirs)

    (our_grad,) = torch.autograd.grad(ours, logits, upstream)
    (their_grad,) = torch.autograd.grad(theirs, logits, upstream)
    torch.testing.assert_close(our_grad, their_grad)


# 性质 ----------------------------------------------------------------------------------------------


def test_probabilities_of_all_sequences_sum_to_one(markov):
    """从 token 0 出发、长度为 3 的序列共 27 条；exp(和) 的总和是 1，每一条都等于概率连乘。"""
    sequences = torch.tensor([(0, *tail) for tail in itertools.product(range(3), repeat=3)])
    log_probs = log_probs_from_logits(markov[sequences[:, :-1]], sequences[:, 1:])
    total = sequence_log_probs(log_probs, torch.ones_like(log_probs, dtype=torch.bool))
    expected = torch.tensor([chain_probability(markov, s.tolist()) for s in sequences], dtype=torch.float64)
    torch.testing.assert_close(total.exp(), expected)
    torch.testing.assert_close(total.exp().sum().item(), 1.0)


def test_adding_a_constant_to_the_logits_changes_nothing(generator):
    logits = torch.randn(B, T, V, generator=generator)
    labels = torch.randint(V, (B, T), generator=generator)
    shifted = logits + torch.randn(B, T, 1, generator=generator)
    torch.testing.assert_close(log_probs_from_logits(shifted, labels), log_probs_from_logits(logits, labels))


def test_masked_and_ignored_positions_get_no_value_and_no_gradient(generator):
    logits = torch.randn(B, T, V, generator=generator, requires_grad=True)
    labels = torch.randint(V, (B, T), generator=generator)
    labels[1, 0] = IGNORE_INDEX
    mask = torch.tensor([[False, True, True], [True, True, False]])
    log_probs = log_probs_from_logits(logits, labels)
    assert log_probs[1, 0] == 0
    sequence_log_probs(log_probs, mask).sum().backward()
    silent = ~mask | (labels == IGNORE_INDEX)
    assert (logits.grad[silent] == 0).all()
    assert (logits.grad[~silent] != 0).all()


# 边界 ----------------------------------------------------------------------------------------------


def test_extreme_logits_stay_finite():
    """差 1e4 的两个 logits：概率下溢成 0，对数概率仍是 -1e4；先 softmax 再取对数会得到 -inf。"""
    logits, labels = torch.tensor([[[1e4, 0.0]]]), torch.tensor([[1]])
    torch.testing.assert_close(log_probs_from_logits(logits, labels), torch.tensor([[-1e4]]))
    assert logits.softmax(-1).log()[0, 0, 1] == -math.inf


def test_one_token_vocabulary_is_certain():
    """词表只有一个 token：概率是 1；被忽略的位置照样是 0，占位的下标不能越界。"""
    labels = torch.tensor([[0, IGNORE_INDEX]])
    assert not log_probs_from_logits(torch.randn(1, 2, 1), labels).any()


def test_row_without_response_tokens_is_zero():
    log_probs = torch.full((B, T), -1.0)
    mask = torch.zeros(B, T, dtype=torch.bool)
    torch.testing.assert_close(sequence_log_probs(log_probs, mask), torch.zeros(B))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_logits_are_refused_with_the_cure(dtype):
    with pytest.raises(TypeError, match=r"请先 logits\.float\(\)"):
        log_probs_from_logits(torch.zeros(B, T, V, dtype=dtype), torch.zeros(B, T, dtype=torch.long))


def test_why_half_precision_is_refused(generator):
    """同一批 bf16 logits、512 个 token：全程 bf16 的求和比先转 float32 偏出 1 奈特以上。

    主因是和本身：约 -5,760，bf16 在 4,096 与 8,192 之间的间隔是 2^12 × 2^-7 = 32。只有逐 token 的值是 bf16、
    用 float32 累加时，偏差不到 1 奈特，但不是 0。
    """
    logits = (3 * torch.randn(1, 512, 1000, generator=generator)).bfloat16()
    labels = torch.randint(1000, (1, 512), generator=generator)
    mask = torch.ones(1, 512, dtype=torch.bool)
    upcast = sequence_log_probs(log_probs_from_logits(logits.float(), labels), mask)
    per_token = logits.log_softmax(-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)
    assert (per_token.sum(-1).float() - upcast).abs().item() > 1.0
    assert -5800 < upcast.item() < -5700 and per_token.sum(-1).item() % 32 == 0
    assert 0.1 < (per_token.float().sum(-1) - upcast).abs().item() < 1.0


# 必须拒绝的错误写法 --------------------------------------------------------------------------------


@pytest.mark.rejects
def test_rejects_forgetting_the_shift(markov):
    """不错位也能跑：形状对得上，但得到的不是这条序列的概率。"""
    tokens = torch.tensor([[0, 2, 1, 1]])
    truth = math.log(chain_probability(markov, tokens[0].tolist()))
    mask = torch.ones(1, 3, dtype=torch.bool)
    right = sequence_log_probs(log_probs_from_logits(markov[tokens[:, :-1]], tokens[:, 1:]), mask)
    wrong = sequence_log_probs(log_probs_from_logits(markov[tokens], tokens)[:, 1:], mask)
    assert math.isclose(right.item(), truth, rel_tol=1e-12)
    assert abs(wrong.item() - truth) > 0.3


@pytest.mark.rejects
def test_rejects_mean_over_tokens(markov):
    """平均之后 27 条序列的“概率”总和不再是 1。"""
    sequences = torch.tensor([(0, *tail) for tail in itertools.product(range(3), repeat=3)])
    log_probs = log_probs_from_logits(markov[sequences[:, :-1]], sequences[:, 1:])
    assert log_probs.mean(-1).exp().sum().item() > 2


@pytest.mark.rejects
def test_rejects_counting_prompt_tokens(markov):
    """把提示 token 算进来，得到的是 log π(x, y)，不是 log π(y | x)。"""
    tokens = torch.tensor([[0, 2, 1, 1]])  # 前两个是提示
    truth = math.log(chain_probability(markov, tokens[0, 1:].tolist()))
    log_probs = log_probs_from_logits(markov[tokens[:, :-1]], tokens[:, 1:])
    response = torch.tensor([[False, True, True]])
    everything = torch.tensor([[True, True, True]])
    assert math.isclose(sequence_log_probs(log_probs, response).item(), truth, rel_tol=1e-12)
    assert abs(sequence_log_probs(log_probs, everything).item() - truth) > 0.5


@pytest.mark.rejects
def test_rejects_multiplying_by_the_mask():
    """被遮住的位置是 -inf 时，乘以 0 得 NaN；`masked_fill` 得到正确的 -1。"""
    log_probs = torch.tensor([[-1.0, -math.inf]])
    mask = torch.tensor([[True, False]])
    assert sequence_log_probs(log_probs, mask).item() == -1.0
    assert (log_probs * mask).sum().isnan()
