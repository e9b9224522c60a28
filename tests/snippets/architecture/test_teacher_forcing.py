r"""教师强制与自由运行的测试。

真值：transformers 的 `ForCausalLMLoss` 与一次并行前向（损失和每个参数的梯度）；穷举全部短序列得到的期望损失，
再用自动求导得到的期望梯度；两状态马氏链的闭式解；用 L-BFGS 直接最小化得到的最优解。
文件末尾把流传的错误写法逐个列出，并断言同一个真值会拒绝它们。
"""

import itertools
import math

import pytest
import torch
from torch import nn
from transformers.loss.loss_utils import ForCausalLMLoss

from snippets.architecture.softmax_cross_entropy import causal_lm_loss
from snippets.architecture.teacher_forcing import (
    off_track_probability,
    scheduled_sampling_optimum,
    sequential_loss,
)
from snippets.architecture.transformer_from_scratch import MiniLlama, init_weights

V, BOS = 3, 0
JOINT = torch.tensor([[0.30, 0.05, 0.15], [0.02, 0.08, 0.10], [0.06, 0.20, 0.04]], dtype=torch.float64)


def gen(seed=0):
    return torch.Generator().manual_seed(seed)


def make_llama(vocab_size=11):
    torch.manual_seed(0)
    model = MiniLlama(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_layers=2, num_heads=4, num_kv_heads=2
    )
    init_weights(model, std=0.3)
    return model.double()


def grads(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])


class Table(nn.Module):
    """两步的表格模型：第一步的 logits 与第二步在每个第一 token 下的 logits，互不共享参数。"""

    def __init__(self, seed=0):
        super().__init__()
        self.first = nn.Parameter(torch.randn(V, generator=gen(seed), dtype=torch.float64))
        self.second = nn.Parameter(torch.randn(V, V, generator=gen(seed + 1), dtype=torch.float64))

    def forward(self, prefix):
        rows = [self.first.expand(len(prefix), V)]
        if prefix.shape[1] > 1:
            rows.append(self.second[prefix[:, 1]])
        return torch.stack(rows, dim=1)


def exact_loss(table, *, gold_prob, through_sampling, relabel=False):
    """穷举 (a, b, z)：对数据与前缀求期望，除以 2 步；through_sampling 决定采样概率是否求导。"""
    log_first = [x - torch.logsumexp(table.first, 0) for x in table.first]
    log_second = table.second - torch.logsumexp(table.second, 1, keepdim=True)
    total = torch.zeros((), dtype=torch.float64)
    for a, b in itertools.product(range(V), range(V)):
        p = JOINT[a, b].item()
        total = total - p * log_first[a]
        for z in range(V):
            sample = log_first[z].exp() if through_sampling else log_first[z].exp().item()
            weight = p * (gold_prob * (z == a) + (1 - gold_prob) * sample)
            if relabel:
                row = JOINT[z] / JOINT[z].sum()
                total = total - weight * (row * log_second[z]).sum()
            else:
                total = total - weight * log_second[z, b]
    return total / 2


def sample_pairs(n, seed):
    """按联合分布精确配额（不采样）：每个 (a, b) 出现 n·P(a, b) 次，只剩前缀的随机。"""
    counts = (JOINT.flatten() * n).round().long()
    index = torch.arange(V * V).repeat_interleave(counts)
    index = index[torch.randperm(len(index), generator=gen(seed))]
    return torch.stack((torch.full_like(index, BOS), index // V, index % V), dim=1)


def expert(prefix):
    first = JOINT.sum(1)
    if prefix.shape[1] == 1:
        return first.expand(len(prefix), V)
    return (JOINT / first[:, None])[prefix[:, 1]]


# 与独立实现比较


def test_teacher_forcing_loop_equals_one_parallel_pass_in_loss_and_gradient():
    """因果掩码下，并行一遍与逐步喂真实前缀是同一个函数。"""
    model = make_llama()
    ids = torch.randint(0, 11, (3, 7), generator=gen())
    parallel = causal_lm_loss(model(ids), ids)
    loop = sequential_loss(model, ids)  # 默认就是教师强制
    torch.testing.assert_close(loop, parallel, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(grads(loop, model), grads(parallel, model), rtol=1e-10, atol=1e-12)
    hf = ForCausalLMLoss(model(ids), ids, vocab_size=11).double()
    torch.testing.assert_close(loop, hf, rtol=1e-5, atol=1e-6)  # transformers 内部升到 float32


def test_teacher_forcing_log_likelihood_is_the_sequence_probability():
    """条件概率连乘对全部两步的续写求和为 1：教师强制算的是真正的似然。"""
    model = make_llama(vocab_size=3)
    sequences = torch.tensor([[1, *rest] for rest in itertools.product(range(3), repeat=2)])
    probs = [torch.exp(-2 * sequential_loss(model, ids[None])) for ids in sequences]
    torch.testing.assert_close(torch.stack(probs).sum(), torch.ones((), dtype=torch.float64))


# 期望：与穷举比较


@pytest.mark.parametrize("gold_prob", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("relabel", [False, True])
def test_expected_loss_and_gradient_match_enumeration(gold_prob, relabel):
    """自动求导得到的是「采样不求导」的期望梯度。4 万条，20 个种子里梯度的误差最大 0.0013；把概率取反，梯度至少差 0.014。"""
    table = Table()
    loss = sequential_loss(
        table,
        sample_pairs(40000, 1),
        gold_prob=gold_prob,
        expert=expert if relabel else None,
        generator=gen(2),
    )
    exact = exact_loss(table, gold_prob=gold_prob, through_sampling=False, relabel=relabel)
    atol = 1e-10 if gold_prob == 1.0 else 0.01
    torch.testing.assert_close(loss, exact, rtol=0, atol=atol)
    torch.testing.assert_close(grads(loss, table), grads(exact, table), rtol=0, atol=0.4 * atol)


def test_same_generator_gives_the_same_loss_and_other_seeds_do_not():
    table, ids = Table(), sample_pairs(100, 1)
    losses = [sequential_loss(table, ids, gold_prob=0.5, generator=gen(s)).item() for s in (3, 3, 4)]
    assert losses[0] == losses[1] != losses[2]


@pytest.mark.parametrize("gold_prob", [-0.01, 1.01])
def test_gold_prob_must_be_a_probability(gold_prob):
    with pytest.raises(ValueError, match=r"^gold_prob=.* 不是概率；请给 0 到 1 之间的数，1 是教师强制。$"):
        sequential_loss(Table(), sample_pairs(100, 1), gold_prob=gold_prob)


def minimize(objective, table):
    optimizer = torch.optim.LBFGS(
        table.parameters(),
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = objective()
        loss.backward()
        return loss

    optimizer.step(closure)
    return table


@pytest.mark.parametrize("gold_prob", [0.0, 0.25, 0.7, 1.0])
def test_scheduled_sampling_optimum_matches_numerical_minimization(gold_prob):
    """第一步不受影响，先解出 q1 = P1；第二步固定 q1 最小化穷举的目标。"""
    table = Table()
    with torch.no_grad():
        table.first.copy_(JOINT.sum(1).log())
    minimize(lambda: exact_loss(table, gold_prob=gold_prob, through_sampling=False), table)
    optimum = scheduled_sampling_optimum(JOINT, gold_prob=gold_prob)
    torch.testing.assert_close(table.second.softmax(1), optimum, rtol=0, atol=1e-6)
    torch.testing.assert_close(table.first.softmax(0), JOINT.sum(1), rtol=0, atol=1e-6)
    torch.testing.assert_close(optimum.sum(1), torch.ones(V, dtype=torch.float64))


def test_copy_language_by_hand():
    """P(00)=P(11)=1/2：ε=1/2 时条件分布是 3/4、1/4，一半时间是瞎猜的一半；ε=0 时独立。"""
    copy = torch.eye(2, dtype=torch.float64) / 2
    by_hand = torch.tensor([[0.75, 0.25], [0.25, 0.75]], dtype=torch.float64)
    torch.testing.assert_close(scheduled_sampling_optimum(copy, gold_prob=0.5), by_hand)
    torch.testing.assert_close(
        scheduled_sampling_optimum(copy, gold_prob=0.0), torch.full((2, 2), 0.5, dtype=torch.float64)
    )


@pytest.mark.parametrize("gold_prob", [0.0, 0.3])
def test_relabeling_by_the_expert_restores_the_true_optimum(gold_prob):
    table = Table()
    with torch.no_grad():
        table.first.copy_(JOINT.sum(1).log())
    minimize(lambda: exact_loss(table, gold_prob=gold_prob, through_sampling=False, relabel=True), table)
    torch.testing.assert_close(table.second.softmax(1), JOINT / JOINT.sum(1, keepdim=True), rtol=0, atol=1e-5)


# 偏离概率


@pytest.mark.parametrize(("error", "recovery"), [(0.1, 0.0), (0.1, 0.3), (0.02, 1.0), (1.0, 0.25)])
def test_off_track_probability_matches_the_closed_form(error, recovery):
    """两状态链：d_t = e/(e+r)·(1−(1−e−r)^t)。"""
    t = torch.arange(1, 9, dtype=torch.float64)
    closed = error / (error + recovery) * (1 - (1 - error - recovery) ** t)
    torch.testing.assert_close(off_track_probability(8, error_rate=error, recovery_rate=recovery), closed)


def test_errors_are_unrecoverable_by_default():
    expected = [1 - 0.9**t for t in (1, 2, 3)]
    torch.testing.assert_close(
        off_track_probability(3, error_rate=0.1), torch.tensor(expected, dtype=torch.float64)
    )


# 被拒绝的错误写法


@pytest.mark.rejects
def test_rejects_loss_without_shift_and_with_double_shift():
    """不移位是让模型复述输入，移两次是隔一个预测；都不等于逐步的损失。"""
    model = make_llama()
    ids = torch.randint(0, 11, (3, 7), generator=gen())
    truth = sequential_loss(model, ids)
    unshifted = nn.functional.cross_entropy(model(ids).flatten(0, 1), ids.flatten())
    double = nn.functional.cross_entropy(model(ids)[:, :-2].flatten(0, 1), ids[:, 2:].flatten())
    shifted_by_hand = torch.cat((ids[:, 1:], torch.full((3, 1), -100)), dim=1)
    torch.testing.assert_close(causal_lm_loss(model(ids), shifted_by_hand), double)  # 手动移一次再交给库
    for wrong in (unshifted, double):
        assert abs(wrong - truth) > 0.1


@pytest.mark.rejects
def test_rejects_gradient_through_fed_samples_as_the_gradient_of_the_expected_loss():
    """采样（或 argmax）的 token 不传梯度：少了得分函数项，第一步的梯度与穷举的真梯度不同。"""
    table = Table()
    with torch.no_grad():
        table.second.mul_(4)  # 各前缀之后的代价差得远一些
    true = grads(exact_loss(table, gold_prob=0.0, through_sampling=True), table)[:V]
    naive = grads(exact_loss(table, gold_prob=0.0, through_sampling=False), table)[:V]
    assert (true - naive).abs().max() > 0.02
    # 补上得分函数项就相等：Σ_z q(z)·C(z)·(1[z=k]−q(k))，C(z) 是第二步的期望损失
    q = table.first.softmax(0).detach()
    cost = -(JOINT.sum(0) * table.second.log_softmax(1)).sum(1).detach() / 2
    torch.testing.assert_close(naive + q * (cost - (q * cost).sum()), true)
    ids = sample_pairs(40000, 1)
    measured = grads(sequential_loss(table, ids, gold_prob=0.0, generator=gen(2)), table)[:V]
    torch.testing.assert_close(measured, naive, rtol=0, atol=1e-10)  # 第一步的梯度不依赖采到了什么


@pytest.mark.rejects
def test_rejects_calling_teacher_forcing_biased():
    """期望梯度恰是前向 KL 的梯度，在真分布处为 0；计划采样在真分布处不为 0。"""
    table = Table()
    with torch.no_grad():
        table.first.copy_(JOINT.sum(1).log())
        table.second.copy_(JOINT.log())
    ids = sample_pairs(100, 1)  # 配额恰好是总体
    assert grads(sequential_loss(table, ids), table).abs().max() < 1e-12
    assert grads(exact_loss(table, gold_prob=0.5, through_sampling=False), table).abs().max() > 0.01
    random = Table(5)
    log_q = random.first.log_softmax(0)[:, None] + random.second.log_softmax(1)
    kl = (JOINT * (JOINT.log() - log_q)).sum() / 2
    torch.testing.assert_close(grads(sequential_loss(random, ids), random), grads(kl, random))


@pytest.mark.rejects
def test_rejects_true_distribution_as_the_optimum_even_with_gradient_through_sampling():
    """连采样也求导，真分布的目标值仍高于「q1=P1、第二步取混合」的目标值。"""
    truth, mixed = Table(), Table()
    with torch.no_grad():
        for t in (truth, mixed):
            t.first.copy_(JOINT.sum(1).log())
        truth.second.copy_(JOINT.log())
        mixed.second.copy_(scheduled_sampling_optimum(JOINT, gold_prob=0.5).log())
    values = [exact_loss(t, gold_prob=0.5, through_sampling=True).item() for t in (truth, mixed)]
    assert values[0] > values[1] + 0.02


@pytest.mark.rejects
def test_rejects_geometric_decay_when_errors_are_recoverable():
    d = off_track_probability(200, error_rate=0.01, recovery_rate=0.2)
    assert math.isclose(d[-1].item(), 0.01 / 0.21, rel_tol=1e-9)
    assert 1 - 0.99**200 > 0.86
