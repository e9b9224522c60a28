r"""snippets/rl/masking.py 的测试。

真值：手算的三个数，以及一个只用 Python 浮点数的双重循环（不用张量、不用掩码乘法）。
verl 0.9.1 `agg_loss` 与 TRL 1.16 的聚合在 test_grpo.py 里对照，那里有冻结的数值。
"""

import math

import pytest
import torch

from snippets.rl.masking import AGGREGATION_MODES, aggregate_loss, masked_mean

LENGTHS = [5, 2, 3]


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def length_mask(lengths, width):
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def case():
    losses = torch.randn(3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = length_mask(LENGTHS, 6)
    mask[0, 1] = False  # 中间的洞（工具输出），不只是右侧填充
    return losses, mask


def loop_oracle(losses, mask, mode, max_response_length):
    """逐行逐 token 的循环；返回 (标量, 每个 token 的权重)。"""
    rows = [[t for t, keep in enumerate(row) if keep] for row in mask.tolist()]
    num_tokens, num_rows = sum(map(len, rows)), sum(1 for row in rows if row)
    weights = torch.zeros_like(losses)
    for i, row in enumerate(rows):
        for t in row:
            weights[i, t] = {
                "token-mean": 1 / num_tokens,
                "seq-mean-token-mean": 1 / len(row) / num_rows,
                "seq-mean-token-sum": 1 / num_rows,
                "seq-mean-token-sum-norm": 1 / num_rows / max_response_length,
            }[mode]
    values = losses.tolist()
    total = math.fsum(weights[i, t].item() * values[i][t] for i, row in enumerate(rows) for t in row)
    return tensor(total), weights


def loss_and_grad(losses, mask, mode, max_response_length=9):
    leaf = losses.clone().requires_grad_()
    loss = aggregate_loss(leaf, mask, mode=mode, max_response_length=max_response_length)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---- 手算 ----


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        ("token-mean", 2.5),
        ("seq-mean-token-mean", 3.0),
        ("seq-mean-token-sum", 5.0),
        ("seq-mean-token-sum-norm", 0.5),
    ],
)
def test_four_modes_by_hand(mode, expected):
    """两条回答：[1, 2, 3] 与 [4]（后两格是填充，填了 99）。
    token 平均 10/4 = 2.5；按条平均 (2 + 4)/2 = 3；求和再按条平均 (6 + 4)/2 = 5；再除以常数 10 得 0.5。
    """
    losses = tensor([[1.0, 2.0, 3.0], [4.0, 99.0, 99.0]])
    loss = aggregate_loss(losses, length_mask([3, 1], 3), mode=mode, max_response_length=10)
    torch.testing.assert_close(loss, tensor(expected))


def test_masked_mean_by_hand():
    """[1, 2, 9] 只留前两个是 1.5；[4, 9, 9] 只留第一个是 4；全部一起是 7/3。"""
    values = tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0]])
    mask = length_mask([2, 1], 3)
    torch.testing.assert_close(masked_mean(values, mask, dim=1), tensor([1.5, 4.0]))
    torch.testing.assert_close(masked_mean(values, mask), tensor(7 / 3))
    torch.testing.assert_close(masked_mean(values[0], mask[0]), tensor(1.5))


# ---- 独立实现 ----


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_loss_and_gradient_match_the_loop(mode):
    losses, mask = case()
    torch.testing.assert_close(loss_and_grad(losses, mask, mode), loop_oracle(losses, mask, mode, 9))


# ---- 性质 ----


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_padding_changes_nothing(mode):
    losses, mask = case()
    wide = torch.cat([losses, tensor([[7.0, 7.0]] * 3)], dim=1)
    wide_mask = torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], dim=1)
    narrow_loss, wide_loss = loss_and_grad(losses, mask, mode)[0], loss_and_grad(wide, wide_mask, mode)[0]
    torch.testing.assert_close(narrow_loss, wide_loss)


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_nan_and_inf_under_the_mask_do_not_leak(mode):
    losses, mask = case()
    dirty = losses.masked_fill(~mask, float("nan"))
    dirty[1, -1] = float("inf")
    expected = loss_and_grad(losses, mask, mode)
    torch.testing.assert_close(loss_and_grad(dirty, mask, mode), expected)
    assert masked_mean(dirty, mask).isfinite()


def test_equal_lengths_make_token_mean_and_sequence_mean_agree():
    losses, _ = case()
    mask = length_mask([4, 4, 4], 6)
    pair = [loss_and_grad(losses, mask, mode) for mode in ("token-mean", "seq-mean-token-mean")]
    torch.testing.assert_close(*pair)


@pytest.mark.parametrize("length", [1, 9])
def test_norm_mode_is_the_sum_mode_divided_by_a_constant(length):
    losses, mask = case()
    total, normed = (loss_and_grad(losses, mask, mode, length)[0] for mode in AGGREGATION_MODES[2:])
    torch.testing.assert_close(normed * length, total)


def test_a_40_times_longer_response_gets_a_40_times_smaller_weight_only_in_sequence_mean():
    """2000 与 50 个 token：每条先平均时权重是 1/4000 与 1/100；其余三种方式下两条回答的 token 权重相同。"""
    mask = length_mask([2000, 50], 2000)
    for mode in AGGREGATION_MODES:
        _, weights = loss_and_grad(torch.zeros(2, 2000, dtype=torch.float64), mask, mode, 4096)
        expected = 40.0 if mode == "seq-mean-token-mean" else 1.0
        assert (weights[1, 0] / weights[0, 0]).item() == pytest.approx(expected)


# ---- 边界 ----


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_fully_masked_row_is_not_a_sequence(mode):
    """多一行全被遮住的回答，四种方式的值都不变，那一行没有梯度。"""
    losses, mask = case()
    more = torch.cat([losses, tensor([[5.0] * 6])])
    more_mask = torch.cat([mask, torch.zeros(1, 6, dtype=torch.bool)])
    loss, grad = loss_and_grad(more, more_mask, mode)
    torch.testing.assert_close(loss, loss_and_grad(losses, mask, mode)[0])
    assert not grad[3].any()


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_nothing_in_the_mask_is_nan_not_zero(mode):
    losses, mask = case()
    assert aggregate_loss(losses, mask & False, mode=mode, max_response_length=9).isnan()
    assert masked_mean(losses, mask & False).isnan()


def test_unknown_mode_lists_the_modes():
    with pytest.raises(ValueError, match="seq-mean-token-sum-norm"):
        aggregate_loss(*case(), mode="mean")


@pytest.mark.parametrize("length", [None, 0])
def test_norm_mode_needs_a_positive_constant(length):
    with pytest.raises(ValueError, match="max_response_length"):
        aggregate_loss(*case(), mode="seq-mean-token-sum-norm", max_response_length=length)


def test_float32_in_float32_out():
    losses, mask = case()
    for mode in AGGREGATION_MODES:
        assert aggregate_loss(losses.float(), mask, mode=mode, max_response_length=9).dtype == torch.float32


# ---- 流传的错误写法 ----


def mask_ignored(losses, mask):
    return losses.mean()


def divided_by_padded_length(losses, mask):
    return (losses * mask).mean(dim=1).mean()


def token_mean_called_sequence_mean(losses, mask):
    return (losses * mask).sum() / mask.sum()


def mean_over_rows_of_masked_values_first(losses, mask):
    return ((losses * mask).sum(0) / mask.sum(0).clamp(min=1)).mean()


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [
        mask_ignored,
        divided_by_padded_length,
        token_mean_called_sequence_mean,
        mean_over_rows_of_masked_values_first,
    ],
    ids=lambda f: f.__name__,
)
def test_wrong_sequence_mean_is_rejected(wrong):
    """与循环得到的每 token 权重相比，错误写法至少有一个权重差 0.01 以上；我们的差为零。"""
    losses, mask = case()
    _, truth = loop_oracle(losses, mask, "seq-mean-token-mean", 9)
    leaf = losses.clone().requires_grad_()
    theirs = torch.autograd.grad(wrong(leaf, mask), leaf)[0]
    assert (theirs - truth).abs().max() > 0.01
    torch.testing.assert_close(loss_and_grad(losses, mask, "seq-mean-token-mean")[1], truth)
