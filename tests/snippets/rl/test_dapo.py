r"""snippets/rl/dapo.py 的测试。

真值有四个来源：(1) 手算，与写成纯 Python if/else 的式 8、式 13；(2) 对一组回答的全部 2^G 种对错精确枚举；
(3) TRL 1.16 的 `get_soft_overlong_punishment` 与 `GRPOTrainer._compute_loss(loss_type="dapo")`，都是真实调用；
(4) verl 0.9.0 与 OpenRLHF 0.11.0 跑出来后冻结的数值，见 tests/golden/make_dapo.py。
全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import json
import math
import statistics
from pathlib import Path

import jaxtyping
import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.dapo import (
    dapo_advantages,
    dapo_loss,
    keep_groups,
    soft_overlong_penalty,
    wasted_group_probability,
)
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.masking import aggregate_loss

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dapo.json").read_text(encoding="utf-8"))


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def loss_and_grad(loss_fn, log_probs, *args, **kwargs):
    leaf = log_probs.detach().clone().requires_grad_()
    loss = loss_fn(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def case():
    """四条长度 6、2、5、3 的回答，比值落在各个区间，优势有正有负。"""
    data = {key: torch.tensor(value) for key, value in GOLDEN["loss_inputs"].items()}
    return tuple(
        data[key].double() if key != "loss_mask" else data[key]
        for key in ("log_probs", "old_log_probs", "advantages", "loss_mask")
    )


def equation_8(log_probs, old_log_probs, advantages, loss_mask, low=0.2, high=0.28):
    """式 8 的相反数，一个组：逐个 token 的 if/else，返回损失与对 log π 的梯度。"""
    total, gradient, count = 0.0, torch.zeros_like(log_probs), int(loss_mask.sum())
    for i, t in loss_mask.nonzero().tolist():
        ratio, advantage = math.exp(log_probs[i, t] - old_log_probs[i, t]), advantages[i].item()
        if advantage > 0 and ratio > 1 + high:
            total -= (1 + high) * advantage
        elif advantage < 0 and ratio < 1 - low:
            total -= (1 - low) * advantage
        else:
            total -= ratio * advantage
            gradient[i, t] = -ratio * advantage / count
    return tensor(total / count), gradient


def equation_13(length, max_length, buffer):
    if length <= max_length - buffer:
        return 0.0
    if length <= max_length:
        return (max_length - buffer - length) / buffer
    return -1.0


# ---- 手算 ----


def test_the_penalty_at_every_knee():
    """L_max=20480、L_cache=4096。16384 之前是 0；每多一个 token 减 1/4096；过了四分之一、一半是 −0.25、−0.5；
    20480 处 −4096/4096=−1；再长也是 −1。
    """
    lengths = torch.tensor([0, 16383, 16384, 16385, 17408, 18432, 20480, 20481, 40000])
    expected = torch.tensor([0.0, 0.0, 0.0, -1 / 4096, -0.25, -0.5, -1.0, -1.0, -1.0])
    assert torch.equal(soft_overlong_penalty(lengths), expected)


def test_the_loss_divides_by_all_tokens():
    """两条回答，长 1 与 3，优势 +1 与 −1。比值 1.5 截到 1.28：−1.28，梯度 0；比值 1、1：+1、+1，梯度 ¼；
    比值 0.5 截到 0.8：+0.8，梯度 0。和是 1.52，除以 4 个 token 得 0.38。
    """
    ratio = tensor([[1.5, 9.0, 9.0], [1.0, 1.0, 0.5]])
    mask = torch.tensor([[True, False, False], [True, True, True]])
    loss, grad = loss_and_grad(dapo_loss, ratio.log(), torch.zeros_like(ratio), tensor([1.0, -1.0]), mask)
    torch.testing.assert_close(loss, tensor(0.38))
    torch.testing.assert_close(grad, tensor([[0.0, 0.0, 0.0], [0.25, 0.25, 0.0]]))


def test_only_mixed_groups_are_kept():
    rewards = tensor([1, 1, 1, 1, -1, 1, -1, -1, -1, -1, -1, 1])
    expected = [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
    assert keep_groups(rewards, group_size=3).tolist() == expected


def test_the_penalty_is_added_before_the_group_is_normalised():
    """对、对、错、错，长 20480、1000、18432、1000：奖励 0、1、−1.5、−1，均值 −0.375，样本标准差 1.10868。"""
    rewards, lengths = tensor([1, 1, -1, -1]), torch.tensor([20480, 1000, 18432, 1000])
    advantages, keep = dapo_advantages(rewards, lengths, group_size=4)
    shaped = [0.0, 1.0, -1.5, -1.0]
    spread = statistics.stdev(shaped) + 1e-6
    torch.testing.assert_close(advantages, tensor([(r + 0.375) / spread for r in shaped]))
    assert keep.all() and f"{advantages[1]:.3f}" == "1.240"


def test_waste_at_hand_values():
    """p=½、G=8：2·2⁻⁸=1/128；p=0.9、G=2：0.81+0.01；p 为 0 或 1 时必然白费。"""
    assert wasted_group_probability(tensor([0.5]), group_size=8).item() == 1 / 128
    torch.testing.assert_close(wasted_group_probability(tensor([0.9]), group_size=2), tensor([0.82]))
    assert wasted_group_probability(tensor([0.0, 1.0]), group_size=8).tolist() == [1.0, 1.0]


# ---- 与独立实现一致 ----


@pytest.mark.parametrize(("low", "high"), [(0.2, 0.28), (0.8, 0.28), (0.2, 1.5)])
def test_loss_and_gradient_match_equation_8(low, high):
    """一个组，式 8 的分母就是这一批的 token 数。放宽的那一侧都有 token 因此不再被裁。"""
    args = case()
    ours = loss_and_grad(dapo_loss, *args, clip_low=low, clip_high=high)
    torch.testing.assert_close(ours, equation_8(*args, low, high))
    if (low, high) != (0.2, 0.28):
        assert (ours[1] - loss_and_grad(dapo_loss, *args)[1]).abs().max() > 0.01


def test_gradient_matches_finite_differences():
    log_probs, old_log_probs, advantages, loss_mask = case()
    assert torch.autograd.gradcheck(
        lambda x: dapo_loss(x, old_log_probs, advantages, loss_mask), log_probs.clone().requires_grad_()
    )


@pytest.mark.parametrize(("max_length", "buffer"), [(20, 4), (20, 20), (7, 3), (256, 1)])
def test_penalty_matches_equation_13_and_trl_at_every_length(max_length, buffer):
    from trl.rewards import get_soft_overlong_punishment

    lengths = list(range(max_length + 8))
    ours = soft_overlong_penalty(torch.tensor(lengths), max_length=max_length, buffer=buffer).tolist()
    trl = get_soft_overlong_punishment(max_length, buffer)([[0] * n for n in lengths])
    assert ours == pytest.approx(trl)
    assert ours == pytest.approx([equation_13(n, max_length, buffer) for n in lengths])


def test_penalty_matches_verl_up_to_the_limit_and_openrlhf_everywhere():
    """奖励 −1 加惩罚。verl 两个奖励管理器在上限以内一致，长 23（超过上限 3）时是 −1−7/4=−2.75；OpenRLHF 封底。"""
    frozen = GOLDEN["penalty"]
    lengths = torch.tensor(frozen["lengths"])
    ours = frozen["correctness"] + soft_overlong_penalty(
        lengths, max_length=frozen["max_length"], buffer=frozen["buffer"]
    )
    assert lengths[-1] > frozen["max_length"] >= lengths[-2]
    assert ours.tolist() == GOLDEN["openrlhf_rewards"]
    for rewards in GOLDEN["verl_rewards"].values():
        assert ours[:-1].tolist() == rewards[:-1]
        assert (ours[-1].item(), rewards[-1]) == (-2.0, -2.75)


def test_loss_and_gradient_match_verl():
    """官方脚本的设置，含 clip_ratio_c=10；这里的比值最大是 4，双侧裁剪没有起作用。"""
    frozen = GOLDEN["verl_loss"]
    expected = tensor(frozen["loss"]), tensor(frozen["grad"])
    torch.testing.assert_close(loss_and_grad(dapo_loss, *case()), expected)


def test_verl_drops_the_same_groups_except_for_rounding():
    """±1 的组丢得一样；三个 0.1 的 `np.std` 是 1.4e-17 而不是 0，verl 留下了这个零优势的组，我们丢掉。"""
    kept = {
        name: keep_groups(tensor(values), group_size=3)[0].item() for name, values in GOLDEN["groups"].items()
    }
    dropped = {name for name, keep in kept.items() if not keep}
    assert dropped == {*GOLDEN["verl_dropped_groups"], "equal-tenths"}
    assert "equal-tenths" not in GOLDEN["verl_dropped_groups"]


def run_trl(*args, **options):
    return trl_grpo_loss(*args, loss_type="dapo", epsilon_high=0.28, **options)[:2]


def test_loss_and_gradient_match_trl():
    args = case()
    expected = run_trl(*args, num_items=int(args[-1].sum()))
    torch.testing.assert_close(loss_and_grad(dapo_loss, *args), expected)


def test_trl_micro_batches_add_up_to_the_whole_batch():
    """TRL 的分母是整个累积窗口的 token 数，所以两个微批的损失之和等于整批的损失，梯度拼起来也相等。"""
    args, total = case(), 16
    parts = [run_trl(*(x[rows] for x in args), num_items=total, accumulation=2) for rows in ([0, 1], [2, 3])]
    loss, grad = loss_and_grad(dapo_loss, *args)
    torch.testing.assert_close(parts[0][0] + parts[1][0], loss)
    torch.testing.assert_close(torch.cat([parts[0][1], parts[1][1]]), grad)


# ---- 动态采样：精确枚举 ----


def outcomes(pass_rate, group_size):
    """一组回答的全部 2^G 种对错，及各自的概率。"""
    for pattern in itertools.product([1.0, -1.0], repeat=group_size):
        right = pattern.count(1.0)
        yield tensor(pattern), pass_rate**right * (1 - pass_rate) ** (group_size - right)


@pytest.mark.parametrize("group_size", [2, 3, 5, 8])
@pytest.mark.parametrize("pass_rate", [0.0, 0.02, 0.3, 0.5, 0.9])
def test_waste_equals_the_enumerated_probability_of_a_dropped_group(pass_rate, group_size):
    dropped = sum(
        probability
        for rewards, probability in outcomes(pass_rate, group_size)
        if not keep_groups(rewards, group_size=group_size).any()
    )
    ours = wasted_group_probability(tensor([pass_rate]), group_size=group_size).item()
    assert ours == pytest.approx(dropped)


def test_groups_per_kept_group_is_the_mean_of_a_geometric_distribution():
    """第 n 组才留下的概率是 wⁿ⁻¹(1−w)；把 n 乘上去逐项求和，等于 1/(1−w)。"""
    waste = wasted_group_probability(tensor([0.9]), group_size=8).item()
    series = sum(n * waste ** (n - 1) * (1 - waste) for n in range(1, 2000))
    assert 1 / (1 - waste) == pytest.approx(series)
    assert f"{series:.2f}" == "1.76"


def test_kept_groups_report_a_biased_accuracy():
    """p=0.9、G=4：留下的组里答对的比例是 (p−p^G)/(1−p^G−(1−p)^G)=0.709，不是 0.9。"""
    kept = [(r, q) for r, q in outcomes(0.9, 4) if keep_groups(r, group_size=4).any()]
    accuracy = sum(q * (r > 0).double().mean().item() for r, q in kept) / sum(q for _, q in kept)
    assert accuracy == pytest.approx((0.9 - 0.9**4) / (1 - 0.9**4 - 0.1**4))
    assert f"{accuracy:.3f}" == "0.709"


def test_dropping_dead_groups_rescales_the_gradient_and_nothing_else():
    """两组，第二组全对：优势为零。丢掉它，分母从 16 个 token 变成 8 个，梯度恰好翻倍。"""
    log_probs, old_log_probs, _, loss_mask = case()
    rewards = tensor([-1.0, 1.0, 1.0, 1.0])
    keep = keep_groups(rewards, group_size=2)
    advantages = group_advantages(rewards, group_size=2)
    _, whole = loss_and_grad(dapo_loss, log_probs, old_log_probs, advantages, loss_mask)
    _, kept = loss_and_grad(
        dapo_loss, log_probs[keep], old_log_probs[keep], advantages[keep], loss_mask[keep]
    )
    assert keep.tolist() == [True, True, False, False] and loss_mask[keep].sum() == 8
    torch.testing.assert_close(kept, whole[keep] * 16 / 8)
    assert not whole[~keep].any()


# ---- 性质 ----


def test_with_equal_lengths_only_the_upper_width_separates_it_from_grpo():
    log_probs, old_log_probs, advantages, loss_mask = case()
    args, full = (log_probs, old_log_probs), torch.ones_like(loss_mask)
    ours = loss_and_grad(dapo_loss, *args, advantages, full)
    grpo = loss_and_grad(grpo_loss, *args, None, advantages, full, beta=0.0, clip_high=0.28)
    torch.testing.assert_close(ours, grpo)
    unequal = grpo_loss(*args, None, advantages, loss_mask, beta=0.0, clip_high=0.28)
    assert (unequal - dapo_loss(*args, advantages, loss_mask)).abs() > 0.05


def test_masked_tokens_change_nothing_and_get_no_gradient():
    log_probs, old_log_probs, advantages, loss_mask = case()
    loss, grad = loss_and_grad(dapo_loss, log_probs, old_log_probs, advantages, loss_mask)
    noisy = log_probs.masked_fill(~loss_mask, float("nan"))
    torch.testing.assert_close(dapo_loss(noisy, old_log_probs, advantages, loss_mask), loss)
    assert not grad[~loss_mask].any()


def test_the_penalty_never_jumps():
    steps = soft_overlong_penalty(torch.arange(12000, 24000)).double().diff()
    assert steps.max() == 0 and steps.abs().max() == pytest.approx(1 / 4096)


def test_any_tiny_penalty_is_blown_up_in_an_all_correct_group():
    """全对、只有一条超了 1 或 400 个 token：归一化之后优势都是 −(G−1)/√G，与惩罚大小无关；这种组要丢掉。"""
    for extra in (1, 400):
        lengths = torch.tensor([1000] * 7 + [16384 + extra])
        advantages, keep = dapo_advantages(torch.ones(8, dtype=torch.float64), lengths, group_size=8)
        # 惩罚只有 1/4096 时，标准差里加的 1e-6 占到 1%
        assert advantages[-1].item() == pytest.approx(-7 / math.sqrt(8), rel=0.02)
        assert not keep.any()
        assert keep_groups(1 + soft_overlong_penalty(lengths), group_size=8).all()


def test_one_and_zero_rewards_are_not_equivalent_once_the_penalty_is_added():
    """没有惩罚时 ±1 与 0/1 的优势相同；惩罚的大小固定，0/1 时「对但顶到上限」与「错而短」同分，±1 时前者高。"""
    signs, short = tensor([1.0, -1.0, -1.0]), torch.tensor([1000, 1000, 1000])
    same = [dapo_advantages(r, short, group_size=3)[0] for r in (signs, (signs + 1) / 2)]
    torch.testing.assert_close(same[0], same[1], rtol=1e-5, atol=0)  # 只差标准差里的 1e-6
    lengths = torch.tensor([20480, 1000, 18432])
    plus_minus, zero_one = (dapo_advantages(r, lengths, group_size=3)[0] for r in (signs, (signs + 1) / 2))
    assert zero_one[0] == zero_one[1] and plus_minus[0] > plus_minus[1] + 0.5


def test_equation_8_averages_groups_while_the_batch_mean_favours_the_longer_group():
    """两组分别有 8 与 8 个 token 时两种分母相同；改成 8 与 3 个，就不同了。"""
    log_probs, old_log_probs, advantages, loss_mask = case()
    for rows, same in [(torch.tensor([[6, 2], [5, 3]]), True), (torch.tensor([[6, 2], [1, 2]]), False)]:
        mask = torch.arange(6)[None, :] < rows.flatten()[:, None]
        per_group = [
            equation_8(log_probs[g], old_log_probs[g], advantages[g], mask[g])[0] for g in ([0, 1], [2, 3])
        ]
        gap = (sum(per_group) / 2 - dapo_loss(log_probs, old_log_probs, advantages, mask)).abs()
        assert gap < 1e-12 if same else gap > 0.05


# ---- 边界 ----


def test_float32_in_float32_out():
    log_probs, old_log_probs, advantages, loss_mask = case()
    loss = dapo_loss(log_probs.float(), old_log_probs.float(), advantages.float(), loss_mask)
    shaped, _ = dapo_advantages(torch.tensor([1.0, -1.0]), torch.tensor([5, 17000]), group_size=2)
    assert loss.dtype == shaped.dtype == torch.float32


def test_the_penalty_takes_the_dtype_of_the_rewards():
    """长度是整数，惩罚自己算出来是 float32；奖励是 bfloat16 时优势也是 bfloat16。"""
    rewards = torch.tensor([1.0, -1.0], dtype=torch.bfloat16)
    advantages, _ = dapo_advantages(rewards, torch.tensor([5, 5]), group_size=2)
    assert advantages.dtype == torch.bfloat16


def test_default_widths_and_limits_are_the_papers():
    """比值 1.27 未被上侧裁、1.29 被裁；0.81 未被下侧裁、0.79 被裁；默认上限与缓冲区见手算的拐点。"""
    ratio = tensor([[1.27, 1.29], [0.81, 0.79]])
    args = torch.zeros_like(ratio), tensor([1.0, -1.0]), torch.ones_like(ratio, dtype=torch.bool)
    _, grad = loss_and_grad(dapo_loss, ratio.log(), *args)
    assert (grad == 0).tolist() == [[False, True], [False, True]]
    rewards, lengths = tensor([1.0, -1.0, -1.0]), torch.tensor([9, 16384, 20480])
    explicit = dapo_advantages(rewards, lengths, group_size=3, max_length=20480, buffer=4096)
    assert torch.equal(dapo_advantages(rewards, lengths, group_size=3)[0], explicit[0])


def test_the_scalars_are_passed_on():
    rewards, lengths = tensor([1.0, 1.0, -1.0]), torch.tensor([8, 4, 4])
    advantages, _ = dapo_advantages(rewards, lengths, group_size=3, max_length=10, buffer=4)
    torch.testing.assert_close(advantages, group_advantages(tensor([0.5, 1.0, -1.0]), group_size=3))


@pytest.mark.parametrize("buffer", [0, -1, 21])
def test_impossible_buffers_are_refused(buffer):
    with pytest.raises(ValueError, match="缓冲区"):
        soft_overlong_penalty(torch.tensor([5]), max_length=20, buffer=buffer)


@pytest.mark.parametrize("group_size", [0, 1, 4])
def test_rows_that_do_not_form_groups_are_refused(group_size):
    with pytest.raises(ValueError, match="group_size"):
        keep_groups(tensor([1.0, -1.0, 1.0]), group_size=group_size)


def test_a_single_answer_is_no_group():
    with pytest.raises(ValueError, match="至少要 2"):
        wasted_group_probability(tensor([0.5]), group_size=1)


def test_two_dimensional_advantages_are_refused():
    log_probs, old_log_probs, advantages, loss_mask = case()
    with pytest.raises(jaxtyping.TypeCheckError):
        dapo_loss(log_probs, old_log_probs, advantages[:, None], loss_mask)


# ---- 流传的错误说法，必须被上面的真值拒绝 ----


def swapped_widths(log_probs, old_log_probs, advantages, loss_mask):
    return dapo_loss(log_probs, old_log_probs, advantages, loss_mask, clip_low=0.28, clip_high=0.2)


def symmetric_widths(log_probs, old_log_probs, advantages, loss_mask):
    return dapo_loss(log_probs, old_log_probs, advantages, loss_mask, clip_high=0.2)


def advantage_divided_by_length(log_probs, old_log_probs, advantages, loss_mask):
    return dapo_loss(log_probs, old_log_probs, advantages / loss_mask.sum(1), loss_mask)


def mean_of_sequence_means(log_probs, old_log_probs, advantages, loss_mask):
    return grpo_loss(log_probs, old_log_probs, None, advantages, loss_mask, clip_high=0.28, beta=0.0)


def entropy_bonus(log_probs, old_log_probs, advantages, loss_mask):
    bonus = aggregate_loss(-log_probs, loss_mask, mode="token-mean")
    return dapo_loss(log_probs, old_log_probs, advantages, loss_mask) - 0.5 * bonus


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [swapped_widths, symmetric_widths, advantage_divided_by_length, mean_of_sequence_means, entropy_bonus],
    ids=lambda f: f.__name__,
)
def test_wrong_losses_differ_from_equation_8(wrong):
    """每个 token 的梯度量级是 |Â|ρ/16 ≈ 0.05；错误写法至少在一个 token 上差 0.02 以上，我们的差为零。"""
    args = case()
    _, truth = equation_8(*args)
    _, theirs = loss_and_grad(wrong, *args)
    assert (theirs - truth).abs().max() > 0.02
    torch.testing.assert_close(loss_and_grad(dapo_loss, *args)[1], truth)


@pytest.mark.rejects
def test_dividing_the_advantage_by_length_restores_the_forty_fold_bias():
    """50 与 2000 个 token，优势 +1 与 −1，比值 1：式 8 里每个 token 的梯度大小相同，除以长度之后差 40 倍。"""
    mask = torch.arange(2000)[None, :] < torch.tensor([50, 2000])[:, None]
    args = torch.zeros(2, 2000, dtype=torch.float64), torch.zeros(2, 2000, dtype=torch.float64)
    for loss_fn, ratio in [
        (dapo_loss, 1.0),
        (advantage_divided_by_length, 40.0),
        (mean_of_sequence_means, 40.0),
    ]:
        _, grad = loss_and_grad(loss_fn, *args, tensor([1.0, -1.0]), mask)
        assert (-grad[0, 0] / grad[1, 0]).item() == pytest.approx(ratio)


def keeps_only_all_correct(rewards):
    return rewards.min().item() == 1.0


def drops_only_all_wrong(rewards):
    return rewards.max().item() == 1.0


def mean_between_zero_and_one(rewards):
    """OpenRLHF 0.11.0 的判据与默认区间 (0, 1)：对 0/1 奖励正确，对 ±1 奖励把通过率不超过一半的组都丢了。"""
    return 0 < rewards.mean().item() < 1


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [keeps_only_all_correct, drops_only_all_wrong, mean_between_zero_and_one],
    ids=lambda f: f.__name__,
)
def test_wrong_filters_disagree_with_equation_11(wrong):
    """式 11：答对的条数 k 满足 0<k<G。枚举 k，错误判据至少有一个 k 判错；我们的全对。"""
    truth = {k: 0 < k < 4 for k in range(5)}
    groups = {k: tensor([1.0] * k + [-1.0] * (4 - k)) for k in truth}
    assert {k: keep_groups(r, group_size=4).all().item() for k, r in groups.items()} == truth
    assert {k: wrong(r) for k, r in groups.items()} != truth


@pytest.mark.rejects
def test_the_mean_range_filter_keeps_only_easy_groups_under_signed_rewards():
    groups = [tensor([1.0] * k + [-1.0] * (4 - k)) for k in range(5)]
    assert [mean_between_zero_and_one(r) for r in groups] == [False, False, False, True, False]
    assert [mean_between_zero_and_one((r + 1) / 2) for r in groups] == [False, True, True, True, False]


def multiplied(correct, penalty):
    return correct * penalty


def scaled(correct, penalty):
    return correct * (1 + penalty)


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", [multiplied, scaled], ids=lambda f: f.__name__)
def test_multiplying_the_penalty_rewards_long_wrong_answers(wrong):
    """三条错误回答，长 1000、18432、20480。相加：−1、−1.5、−2，越长越低；相乘：越长越高，差 1。"""
    lengths, correct = torch.tensor([1000, 18432, 20480]), tensor([-1.0, -1.0, -1.0])
    penalty = soft_overlong_penalty(lengths).double()
    assert (correct + penalty).tolist() == [-1.0, -1.5, -2.0]
    theirs = wrong(correct, penalty)
    assert theirs[2] - theirs[0] == 1.0 and (theirs.diff() > 0).all()


@pytest.mark.rejects
def test_the_expected_length_is_not_the_limit():
    """把 16384 当 L_max：12288 起就开始罚，16384 处已是 −1，而式 13 在那里还是 0。"""
    at = torch.tensor([12288, 14336, 16384])
    assert soft_overlong_penalty(at).tolist() == [0.0, 0.0, 0.0]
    assert soft_overlong_penalty(at, max_length=16384).tolist() == [0.0, -0.5, -1.0]


def test_filtering_removes_the_gradient_that_shaping_keeps():
    """过长过滤（遮住损失）与软惩罚不同：前者让顶到上限的错误回答没有梯度，后者把它压得更低。"""
    rewards, lengths = tensor([1.0, -1.0, -1.0]), torch.tensor([3, 3, 6])
    shaped, _ = dapo_advantages(rewards, lengths, group_size=3, max_length=6, buffer=2)
    plain = group_advantages(rewards, group_size=3)
    mask = torch.arange(6)[None, :] < lengths[:, None]
    zeros = torch.zeros(3, 6, dtype=torch.float64)
    _, shaping = loss_and_grad(dapo_loss, zeros, zeros, shaped, mask)
    filtered_mask = mask & (lengths < 6)[:, None]
    _, filtering = loss_and_grad(dapo_loss, zeros, zeros, plain, filtered_mask)
    assert not filtering[2].any() and (shaping[2] > 0.05).all()
    assert shaped[2] < shaped[1] - 0.5


@pytest.mark.rejects
def test_the_fourth_part_depends_on_length():
    """第四处是式 13：优势随长度变。「去掉 KL」「加熵」都不碰奖励，优势只是组内归一化，与真值差 0.2 以上。"""
    rewards, lengths = tensor([1.0, -1.0, -1.0]), torch.tensor([20000, 300, 19000])
    ours, _ = dapo_advantages(rewards, lengths, group_size=3)
    oracle = [
        r + equation_13(n, 20480, 4096) for r, n in zip(rewards.tolist(), lengths.tolist(), strict=True)
    ]
    spread = statistics.stdev(oracle) + 1e-6
    truth = tensor([(r - statistics.mean(oracle)) / spread for r in oracle])
    torch.testing.assert_close(ours, truth)
    assert (group_advantages(rewards, group_size=3) - truth).abs().max() > 0.2
