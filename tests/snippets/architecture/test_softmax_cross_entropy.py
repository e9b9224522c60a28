r"""softmax 的对数与交叉熵的测试。

真值有四个来源，都不经过被测代码：只用 math 的逐位置循环；PyTorch 的 `F.cross_entropy`、`F.log_softmax`、
`torch.logsumexp` 与 `gradcheck`（有限差分）；transformers 的 `ForCausalLMLoss` 与一个真的小 Llama；以及手算的数。
文件末尾把流传的错误写法逐个列出，并断言同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.loss.loss_utils import ForCausalLMLoss

from snippets.architecture.softmax_cross_entropy import (
    causal_lm_loss,
    chunked_cross_entropy,
    cross_entropy,
    cross_entropy_grad,
    log_softmax,
    log_sum_exp,
    z_loss,
)

N, V, C, B, T = 6, 5, 3, 2, 4
LABELS = torch.tensor([1, -100, 4, 0, -100, 2])


def make_logits(*shape, dtype=torch.float64, seed=0):
    return 2 * torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def loop_cross_entropy(logits, labels, *, ignore_index=-100, label_smoothing=0.0):
    """只用 Python 浮点数：先写出目标分布，再求 -Σ q log p，最后除以没有被忽略的个数。"""
    total, count = 0.0, 0
    for row, y in zip(logits.tolist(), labels.tolist(), strict=True):
        if y == ignore_index:
            continue
        top = max(row)
        log_z = top + math.log(math.fsum(math.exp(z - top) for z in row))
        for v, z in enumerate(row):
            q = label_smoothing / len(row) + (1 - label_smoothing if v == y else 0.0)
            total -= q * (z - log_z)
        count += 1
    return total / count


# 手算


def test_two_classes_by_hand():
    """logits (ln 3, 0)：p = (3/4, 1/4)，LSE = ln 4，标签 1 的损失是 ln 4。"""
    z = torch.tensor([[math.log(3.0), 0.0]], dtype=torch.float64)
    y = torch.tensor([1])
    torch.testing.assert_close(log_sum_exp(z).item(), math.log(4))
    torch.testing.assert_close(log_softmax(z).exp(), torch.tensor([[0.75, 0.25]], dtype=torch.float64))
    torch.testing.assert_close(cross_entropy(z, y).item(), math.log(4))
    torch.testing.assert_close(cross_entropy_grad(z, y), torch.tensor([[0.75, -0.75]], dtype=torch.float64))


def test_smoothed_target_by_hand():
    """ε = 0.4、V = 2：目标是 (0.2, 0.8)，不是 (0.4, 0.6)。均匀预测的损失仍是 ln 2，梯度是 0.5 减目标。"""
    z = torch.zeros(1, 2, dtype=torch.float64)
    y = torch.tensor([1])
    torch.testing.assert_close(cross_entropy(z, y, label_smoothing=0.4).item(), math.log(2))
    torch.testing.assert_close(
        cross_entropy_grad(z, y, label_smoothing=0.4), torch.tensor([[0.3, -0.3]], dtype=torch.float64)
    )


def test_z_loss_by_hand():
    """logits 全 0：log Z = ln V；(ln 3, 0)：log Z = ln 4；两行取平均。"""
    z = torch.tensor([[0.0, 0.0], [math.log(3.0), 0.0]], dtype=torch.float64)
    torch.testing.assert_close(z_loss(z).item(), (math.log(2) ** 2 + math.log(4) ** 2) / 2)


# 与独立实现比较


@pytest.mark.parametrize("shape", [(V,), (N, V), (2, 3, V), (4, 1)])
def test_log_sum_exp_and_log_softmax_match_torch(shape):
    z = make_logits(*shape)
    torch.testing.assert_close(log_sum_exp(z), torch.logsumexp(z, dim=-1))
    torch.testing.assert_close(log_softmax(z), F.log_softmax(z, dim=-1))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_loss_matches_torch_and_the_loop(label_smoothing, ignore_index):
    z = make_logits(N, V)
    y = LABELS if ignore_index == -100 else LABELS.masked_fill(LABELS == -100, 3)
    kwargs = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    loss = cross_entropy(z, y, **kwargs)
    torch.testing.assert_close(loss, F.cross_entropy(z, y, **kwargs))
    torch.testing.assert_close(loss.item(), loop_cross_entropy(z, y, **kwargs))


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_hand_derived_gradient_matches_autograd_of_torch(label_smoothing, ignore_index):
    z = make_logits(N, V).requires_grad_()
    y = LABELS if ignore_index == -100 else LABELS.masked_fill(LABELS == -100, 3)
    kwargs = dict(ignore_index=ignore_index, label_smoothing=label_smoothing)
    (truth,) = torch.autograd.grad(F.cross_entropy(z, y, **kwargs), z)
    (ours,) = torch.autograd.grad(cross_entropy(z, y, **kwargs), z)
    torch.testing.assert_close(ours, truth)
    torch.testing.assert_close(cross_entropy_grad(z.detach(), y, **kwargs), truth)


def test_defaults_are_those_of_torch():
    z = make_logits(N, V).requires_grad_()
    truth = F.cross_entropy(z, LABELS)
    torch.testing.assert_close(cross_entropy(z, LABELS), truth)
    torch.testing.assert_close(cross_entropy_grad(z.detach(), LABELS), torch.autograd.grad(truth, z)[0])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.3])
def test_gradients_match_finite_differences(label_smoothing):
    z = make_logits(N, V).requires_grad_()
    kwargs = dict(label_smoothing=label_smoothing)
    assert torch.autograd.gradcheck(lambda x: cross_entropy(x, LABELS, **kwargs), z)
    assert torch.autograd.gradcheck(z_loss, z)
    hand, step = cross_entropy_grad(z.detach(), LABELS, **kwargs), 1e-6
    for n in range(N):
        for v in range(V):
            shift = torch.zeros(N, V, dtype=torch.float64)
            shift[n, v] = step
            up, down = (loop_cross_entropy(z.detach() + s * shift, LABELS, **kwargs) for s in (1, -1))
            assert abs((up - down) / (2 * step) - hand[n, v].item()) < 1e-8


def test_z_loss_gradient_is_two_log_z_times_p():
    z = make_logits(N, V).requires_grad_()
    (grad,) = torch.autograd.grad(z_loss(z), z)
    log_z = torch.logsumexp(z, dim=-1, keepdim=True)
    torch.testing.assert_close(grad, 2 * log_z * torch.softmax(z, dim=-1) / N)


def test_causal_loss_matches_transformers():
    z = make_logits(B, T, V, dtype=torch.float32).requires_grad_()
    for ignore_index in (-100, 4):
        y = torch.tensor([[0, 2, ignore_index, 1], [3, ignore_index, ignore_index, 4]])
        y = y if ignore_index == 4 else y.clone()
        ours = causal_lm_loss(z, y, ignore_index=ignore_index)
        truth = ForCausalLMLoss(z, y, vocab_size=V, ignore_index=ignore_index)
        torch.testing.assert_close(ours, truth)
        torch.testing.assert_close(torch.autograd.grad(ours, z)[0], torch.autograd.grad(truth, z)[0])
    y = torch.tensor([[0, 2, -100, 1], [3, 1, -100, 4]])
    torch.testing.assert_close(causal_lm_loss(z, y), ForCausalLMLoss(z, y, vocab_size=V))


def test_llama_shifts_the_labels_itself():
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=8,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        pad_token_id=None,
        bos_token_id=0,
        eos_token_id=1,
    )
    ids = torch.tensor([[0, 2, 3, 1], [3, 1, 2, 4]])
    out = LlamaForCausalLM(config)(input_ids=ids, labels=ids)
    torch.testing.assert_close(causal_lm_loss(out.logits, ids), out.loss)


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 100])
@pytest.mark.parametrize("ignore_index", [-100, 4])
def test_chunked_equals_full_with_gradients(chunk_size, ignore_index):
    hidden, weight = make_logits(N, C).requires_grad_(), make_logits(V, C, seed=1).requires_grad_()
    y = LABELS if ignore_index == -100 else LABELS.masked_fill(LABELS == -100, 3)
    ours = chunked_cross_entropy(hidden, weight, y, chunk_size=chunk_size, ignore_index=ignore_index)
    truth = F.cross_entropy(hidden @ weight.T, y, ignore_index=ignore_index)
    torch.testing.assert_close(ours, truth)
    for a, b in zip(
        torch.autograd.grad(ours, (hidden, weight)),
        torch.autograd.grad(truth, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(a, b)
    if ignore_index == -100:
        torch.testing.assert_close(chunked_cross_entropy(hidden, weight, y, chunk_size=chunk_size), truth)


def test_chunked_upcasts_half_precision_logits():
    hidden, weight = make_logits(N, C).bfloat16(), make_logits(V, C, seed=1).bfloat16()
    ours = chunked_cross_entropy(hidden, weight, LABELS, chunk_size=2)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, F.cross_entropy((hidden @ weight.T).float(), LABELS))


# 性质


class LargestTensor(TorchDispatchMode):
    """记下前向与反向里产生过的最大张量有多少个元素。"""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


def largest_tensor(loss_fn, *inputs):
    with LargestTensor() as mode:
        torch.autograd.grad(loss_fn(), inputs)
    return mode.numel


def test_chunking_never_builds_all_logits_and_saves_none():
    rows, vocab = 40, 50
    hidden, weight = make_logits(rows, C).requires_grad_(), make_logits(vocab, C).requires_grad_()
    y = torch.arange(rows)

    def chunked():
        return chunked_cross_entropy(hidden, weight, y, chunk_size=4)

    assert largest_tensor(lambda: F.cross_entropy(hidden @ weight.T, y), hidden, weight) == rows * vocab
    assert largest_tensor(chunked, hidden, weight) == 4 * vocab
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        chunked()
    assert max(saved) == weight.numel() < 4 * vocab  # 存下的只有索引、输入与权重，没有一块 logits


def test_gradient_rows_sum_to_zero_and_ignored_rows_are_zero():
    grad = cross_entropy_grad(make_logits(N, V), LABELS, label_smoothing=0.2)
    torch.testing.assert_close(grad.sum(-1), torch.zeros(N, dtype=torch.float64))
    assert (grad[LABELS == -100] == 0).all() and (grad[LABELS != -100] != 0).all()


def test_shifting_the_logits_changes_z_loss_but_not_cross_entropy():
    z = make_logits(N, V)
    torch.testing.assert_close(cross_entropy(z + 50, LABELS), cross_entropy(z, LABELS))
    torch.testing.assert_close(log_sum_exp(z + 50), log_sum_exp(z) + 50)
    assert z_loss(z + 50) > 100 * z_loss(z)


def test_best_margin_under_smoothing():
    """V 类、其余并列时，最优的 logit 差是 ln(V(1-ε)/ε + 1)；在那里梯度为 0。"""
    eps = 0.1
    z = torch.zeros(1, V, dtype=torch.float64)
    z[0, 2] = math.log(V * (1 - eps) / eps + 1)
    grad = cross_entropy_grad(z, torch.tensor([2]), label_smoothing=eps)
    torch.testing.assert_close(grad, torch.zeros_like(grad))


# 边界


@pytest.mark.parametrize("scale", [1e4, 1e30])
def test_extreme_logits_stay_finite_and_exact(scale):
    z = torch.tensor([[scale, 0.0, -scale]])
    torch.testing.assert_close(log_softmax(z), torch.tensor([[0.0, -scale, -2 * scale]]))
    for label, expected in ((0, 0.0), (1, scale), (2, 2 * scale)):
        torch.testing.assert_close(cross_entropy(z, torch.tensor([label])), torch.tensor(expected))
    torch.testing.assert_close(log_sum_exp(-z - scale), torch.tensor([0.0]))


def test_minus_infinity_logits_do_not_poison_the_loss():
    z = torch.tensor([[1.0, -math.inf, 0.0]])
    y = torch.tensor([0])
    torch.testing.assert_close(cross_entropy(z, y), F.cross_entropy(z, y))
    assert log_sum_exp(torch.full((1, 3), -math.inf)).isnan().all()  # torch.logsumexp 给 -inf


def test_all_ignored_gives_nan_loss_but_zero_gradient():
    y = torch.full((N,), -100)
    z = make_logits(N, V).requires_grad_()
    hidden, weight = make_logits(N, C).requires_grad_(), make_logits(V, C).requires_grad_()
    for loss, inputs in (
        (F.cross_entropy(z, y), (z,)),
        (cross_entropy(z, y), (z,)),
        (chunked_cross_entropy(hidden, weight, y, chunk_size=2), (hidden, weight)),
    ):
        assert loss.isnan()
        assert all((g == 0).all() for g in torch.autograd.grad(loss, inputs))
    assert (cross_entropy_grad(z.detach(), y) == 0).all()


def test_nan_in_an_ignored_row_does_not_spread():
    z = make_logits(N, V)
    clean = cross_entropy(z, LABELS), cross_entropy_grad(z, LABELS)
    z[1] = math.nan
    torch.testing.assert_close(cross_entropy(z, LABELS), clean[0])
    torch.testing.assert_close(cross_entropy_grad(z, LABELS), clean[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_refused(dtype):
    with pytest.raises(TypeError, match="半精度"):
        cross_entropy(make_logits(N, V).to(dtype), LABELS)


@pytest.mark.parametrize("label_smoothing", [-0.1, 1.1])
def test_bad_label_smoothing_is_refused(label_smoothing):
    with pytest.raises(ValueError, match="label_smoothing"):
        cross_entropy(make_logits(N, V), LABELS, label_smoothing=label_smoothing)


def test_a_label_outside_the_vocabulary_is_refused():
    hidden, weight = make_logits(N, C), make_logits(V, C)
    with pytest.raises(RuntimeError, match="out of bounds"):
        cross_entropy(hidden @ weight.T, LABELS, ignore_index=-1)
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked_cross_entropy(hidden, weight, LABELS, chunk_size=6, ignore_index=-1)


# 被拒绝的错误写法：真值是逐位置循环与 F.cross_entropy，每个错误写法都要差出一大截


def wrong_cross_entropy(z, y, *, eps=0.0, divide_by_n=False, others_only=False, mean_over_vocab=True):
    keep = y != -100
    log_p = F.log_softmax(z, dim=-1)[keep]
    q = F.one_hot(y[keep], V).to(z.dtype)
    if others_only:
        q = (1 - eps) * q + eps / (V - 1) * (1 - q)
    else:
        q = (1 - eps) * q + eps / (V if mean_over_vocab else 1)
    return -(q * log_p).sum() / (len(y) if divide_by_n else keep.sum())


WRONG_VERSIONS = {
    "除以 N": dict(divide_by_n=True),
    "标签平滑用 ε/(V-1)": dict(others_only=True),
    "标签平滑忘了除以 V": dict(mean_over_vocab=False),
}


def test_the_template_of_the_wrong_versions_is_right():
    z = make_logits(N, V)
    truth = loop_cross_entropy(z, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(wrong_cross_entropy(z, LABELS, eps=0.3).item(), truth)


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_VERSIONS)
def test_wrong_version_is_rejected(name):
    z = make_logits(N, V)
    truth = loop_cross_entropy(z, LABELS, label_smoothing=0.3)
    torch.testing.assert_close(cross_entropy(z, LABELS, label_smoothing=0.3).item(), truth)
    assert abs(wrong_cross_entropy(z, LABELS, eps=0.3, **WRONG_VERSIONS[name]).item() - truth) > 0.05


@pytest.mark.rejects
def test_no_max_subtraction_is_rejected():
    """logits 1000、0：不减最大值时 LSE 是 inf，概率是 NaN。"""
    z, y = torch.tensor([[1000.0, 0.0]]), torch.tensor([1])
    naive = z.exp() / z.exp().sum(-1, keepdim=True)
    assert naive.isnan().any() and z.exp().sum(-1).log().isinf().all()
    torch.testing.assert_close(cross_entropy(z, y), torch.tensor(1000.0))


@pytest.mark.rejects
def test_log_of_softmax_is_rejected():
    """softmax 已经减过最大值，对数仍是 -inf，梯度是 NaN；正确的损失是 1000，梯度是 (1, -1)。"""
    z = torch.tensor([[1000.0, 0.0]], requires_grad=True)
    wrong = -torch.softmax(z, dim=-1).log()[0, 1]
    assert wrong.isinf() and torch.autograd.grad(wrong, z)[0].isnan().any()
    loss = cross_entropy(z, torch.tensor([1]))
    torch.testing.assert_close(loss, torch.tensor(1000.0))
    torch.testing.assert_close(torch.autograd.grad(loss, z)[0], torch.tensor([[1.0, -1.0]]))


@pytest.mark.rejects
def test_mean_of_chunk_means_is_rejected():
    """有效 4 行分成 3 与 1：平均的平均让最后一行的权重变成 3 倍。"""
    hidden, weight = make_logits(N, C), make_logits(V, C, seed=1)
    keep = LABELS != -100
    z, y = (hidden @ weight.T)[keep], LABELS[keep]
    wrong = (F.cross_entropy(z[:3], y[:3]) + F.cross_entropy(z[3:], y[3:])) / 2
    truth = F.cross_entropy(hidden @ weight.T, LABELS)
    torch.testing.assert_close(chunked_cross_entropy(hidden, weight, LABELS, chunk_size=3), truth)
    assert (wrong - truth).abs() > 0.05


@pytest.mark.rejects
def test_missing_and_double_shift_are_rejected():
    """模型完全答对下一个 token：正确的损失近似 0，漏移位与移两次都很大。"""
    ids = torch.tensor([[0, 1, 2, 3], [2, 3, 4, 0]])
    z = 20.0 * F.one_hot((ids + 1) % V, V).float()
    truth = ForCausalLMLoss(z, ids, vocab_size=V)
    torch.testing.assert_close(causal_lm_loss(z, ids), truth)
    assert truth < 1e-6
    assert cross_entropy(z.flatten(0, 1), ids.flatten()) > 10
    already_shifted = F.pad(ids[:, 1:], (0, 1), value=-100)
    assert ForCausalLMLoss(z, already_shifted, vocab_size=V) > 10
    torch.testing.assert_close(
        causal_lm_loss(z, already_shifted), ForCausalLMLoss(z, already_shifted, vocab_size=V)
    )
