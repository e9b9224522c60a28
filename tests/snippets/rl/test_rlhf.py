r"""snippets/rl/rlhf.py 的测试。

真值有三个来源：(1) 手算与手写的逐条循环（math.prod 与开方，不用对数）；(2) TRL 1.16 的
`GRPOTrainer._compute_loss` 真实调用（`importance_sampling_level="sequence"`），比数值也比梯度；
(3) GSPO 式 13、14 的逐 token 写法，梯度应与式 5 相同。全部用 float64。
"""

import math

import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import cispo_loss, clipped_surrogate_loss, dual_clip_loss
from snippets.rl.dapo import dapo_loss
from snippets.rl.gpg import policy_gradient_loss
from snippets.rl.grpo import grpo_loss
from snippets.rl.masking import AGGREGATION_MODES, aggregate_loss
from snippets.rl.ppo import ppo_loss
from snippets.rl.rlhf import gspo_loss, log_sequence_ratio, policy_weights
from snippets.rl.rloo import reinforce_loss, rloo_loss

LOW, HIGH = 0.02, 0.03


def batch(spread=0.05, *, rows=5, length=7):
    """长短不一的五条回答；返回 (log_probs, old_log_probs, advantages, mask)。"""
    generator = torch.Generator().manual_seed(11)
    old = -torch.rand(rows, length, generator=generator, dtype=torch.float64) * 2 - 0.3
    noise = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.arange(length) < torch.tensor([7, 1, 4, 6, 2])[:, None]
    advantages = torch.tensor([1.3, -0.8, 0.6, -1.1, 0.4], dtype=torch.float64)
    return (old + spread * noise).requires_grad_(), old, advantages, mask


def row_ratio(log_probs, old, mask):
    """式 7 左边：每条先连乘再开 |y| 次方，纯 Python。"""
    result = []
    for new_row, old_row, keep in zip(log_probs.tolist(), old.tolist(), mask.tolist(), strict=True):
        ratios = [math.exp(n) / math.exp(o) for n, o, k in zip(new_row, old_row, keep, strict=True) if k]
        result.append(math.prod(ratios) ** (1 / len(ratios)))
    return torch.tensor(result, dtype=torch.float64)


def region_oracle(ratio, advantages, mask, low, high):
    """式 5 与式 10：逐条判断在不在区间里，返回（损失, 逐 token 梯度）。"""
    total, grad = 0.0, torch.zeros(mask.shape, dtype=torch.float64)
    for i, (s, a) in enumerate(zip(ratio.tolist(), advantages.tolist(), strict=True)):
        if a > 0 and s > 1 + high:
            total -= (1 + high) * a
        elif a < 0 and s < 1 - low:
            total -= (1 - low) * a
        else:
            total -= s * a
            grad[i, mask[i]] = -s * a / (len(ratio) * int(mask[i].sum()))
    return torch.tensor(total / len(ratio), dtype=torch.float64), grad


def value_and_grad(loss, log_probs):
    return loss.detach(), torch.autograd.grad(loss, log_probs)[0]


# ---- 手算 ----


def test_ratio_is_the_geometric_mean_by_hand():
    """两个 token，比值 2 与 8：几何平均 4（乘积 16，算术平均 5）；第三列是填充，比值写成 100。"""
    log_probs = torch.tensor([[2.0, 8.0, 100.0]], dtype=torch.float64).log()
    mask = torch.tensor([[True, True, False]])
    ratio = log_sequence_ratio(log_probs, torch.zeros_like(log_probs), mask).exp()
    torch.testing.assert_close(ratio, torch.tensor([4.0], dtype=torch.float64))


def test_four_regions_by_hand():
    """ε=(0.1, 0.2)，每条两个 token，s=1.5 与 0.5。Â=+1：1.5 → −1.2 且整条梯度 0；0.5 → −0.5，每 token −0.5/2。
    Â=−1：1.5 → 1.5，每 token 1.5/2；0.5 → 0.9 且整条梯度 0。损失是四条的平均：(−1.2−0.5+1.5+0.9)/4=0.175。
    """
    ratios = torch.tensor([[1.25, 1.8], [0.4, 0.625], [1.25, 1.8], [0.4, 0.625]], dtype=torch.float64)
    log_probs = ratios.log().requires_grad_()
    advantages = torch.tensor([1.0, 1.0, -1.0, -1.0], dtype=torch.float64)
    mask = torch.ones(4, 2, dtype=torch.bool)
    loss = gspo_loss(log_probs, torch.zeros_like(ratios), advantages, mask, clip_low=0.1, clip_high=0.2)
    value, grad = value_and_grad(loss, log_probs)
    torch.testing.assert_close(value, torch.tensor(0.175, dtype=torch.float64))
    expected = torch.tensor([[0.0], [-0.25], [0.75], [0.0]], dtype=torch.float64).expand(4, 2) / 4
    torch.testing.assert_close(grad, expected)


def test_default_widths_are_the_papers():
    """§5.1：左 3e-4、右 4e-4。s=1+3.5e-4、Â>0 还有梯度；s=1−3.5e-4、Â<0 已经没有。"""
    shift = torch.tensor([[1 + 3.5e-4], [1 - 3.5e-4], [1 + 4.5e-4]], dtype=torch.float64)
    log_probs = shift.log().requires_grad_()
    advantages = torch.tensor([1.0, -1.0, 1.0], dtype=torch.float64)
    mask = torch.ones(3, 1, dtype=torch.bool)
    grad = value_and_grad(gspo_loss(log_probs, torch.zeros_like(shift), advantages, mask), log_probs)[1]
    assert (grad[0] != 0) and (grad[1] == 0) and (grad[2] == 0)


# ---- 与独立实现一致 ----


@pytest.mark.parametrize("widths", [(LOW, HIGH), (3e-4, 4e-4), (0.2, 0.27)])
def test_matches_the_region_oracle(widths):
    log_probs, old, advantages, mask = batch()
    loss = gspo_loss(log_probs, old, advantages, mask, clip_low=widths[0], clip_high=widths[1])
    expected = region_oracle(row_ratio(log_probs, old, mask), advantages, mask, *widths)
    torch.testing.assert_close(value_and_grad(loss, log_probs), expected)


@pytest.mark.parametrize("widths", [(LOW, HIGH), (0.2, 0.27)])
def test_matches_trl_sequence_level(widths):
    log_probs, old, advantages, mask = batch()
    expected = trl_grpo_loss(
        log_probs.detach(),
        old,
        advantages,
        mask,
        importance_sampling_level="sequence",
        epsilon_low=widths[0],
        epsilon_high=widths[1],
    )[:2]
    loss = gspo_loss(log_probs, old, advantages, mask, clip_low=widths[0], clip_high=widths[1])
    torch.testing.assert_close(value_and_grad(loss, log_probs), expected)


def test_token_form_has_the_same_gradient():
    """式 13、14：s_{i,t}=sg[s_i]·π/sg[π]，逐 token 裁剪再按条平均；优势整条相同时与式 5 的值和梯度都一样。"""
    log_probs, old, advantages, mask = batch()
    ratio = row_ratio(log_probs, old, mask)[:, None] * (log_probs - log_probs.detach()).exp()
    gain = torch.minimum(ratio * advantages[:, None], ratio.clamp(1 - LOW, 1 + HIGH) * advantages[:, None])
    token_form = -((gain * mask).sum(1) / mask.sum(1)).mean()
    loss = gspo_loss(log_probs, old, advantages, mask, clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close(value_and_grad(loss, log_probs), value_and_grad(token_form, log_probs))


# ---- 页面的定理：ρ=1 时只剩优势与聚合 ----


@pytest.mark.parametrize("mode", AGGREGATION_MODES)
def test_all_token_surrogates_share_the_first_gradient(mode):
    """真值是手写的 −Âᵢ·（这种聚合下一个 token 的权重），不经过任何一个损失。"""
    log_probs, _, advantages, mask = batch()
    lengths = mask.sum(1, keepdim=True).double()
    per_token = {
        "token-mean": 1 / lengths.sum(),
        "seq-mean-token-mean": 1 / (5 * lengths),
        "seq-mean-token-sum": torch.tensor(0.2, dtype=torch.float64),
        "seq-mean-token-sum-norm": torch.tensor(0.2 / 9, dtype=torch.float64),
    }[mode]
    expected = torch.where(mask, -advantages[:, None] * per_token, 0.0)
    old, adv = log_probs.detach(), advantages[:, None]
    surrogates = {
        "无比值": policy_gradient_loss(log_probs, advantages),
        "PPO 裁剪": clipped_surrogate_loss(log_probs, old, adv),
        "更高裁剪": clipped_surrogate_loss(log_probs, old, adv, clip_high=0.28),
        "双侧裁剪": dual_clip_loss(log_probs, old, adv),
        "CISPO": cispo_loss(log_probs, old, adv, clip_high=0.28),
        "逐 token 的 GSPO": clipped_surrogate_loss(log_probs, old, adv, clip_low=3e-4, clip_high=4e-4),
    }
    for name, losses in surrogates.items():
        loss = aggregate_loss(losses, mask, mode=mode, max_response_length=9)
        assert torch.allclose(value_and_grad(loss, log_probs)[1], expected, rtol=1e-12, atol=0), name


def test_named_losses_differ_only_by_aggregation_at_the_first_step():
    """同样的优势：GRPO 与 GSPO 同梯度（按条平均），PPO 与 DAPO 同梯度（按 token），RLOO 的两种损失同梯度（按条求和）。"""
    log_probs, _, advantages, mask = batch()
    old, zeros = log_probs.detach(), torch.zeros(5, 7, dtype=torch.float64)
    adv = advantages[:, None].expand(5, 7)
    pairs = [
        (
            grpo_loss(log_probs, old, None, advantages, mask, beta=0.0),
            gspo_loss(log_probs, old, advantages, mask),
        ),
        (
            ppo_loss(log_probs, old, adv, zeros, zeros, zeros, zeros, mask),
            dapo_loss(log_probs, old, advantages, mask),
        ),
        (
            rloo_loss(log_probs, old, advantages, mask).mean(),
            reinforce_loss(log_probs, advantages, mask).mean(),
        ),
    ]
    grads = [[value_and_grad(loss, log_probs)[1] for loss in pair] for pair in pairs]
    for first, second in grads:
        torch.testing.assert_close(first, second)
    assert (grads[0][0] - grads[1][0]).abs().max() > 0.01  # 聚合不同，就不同


def test_surrogates_disagree_once_the_policy_moves():
    """走开以后三种比值的梯度互不相同：定理只管 ρ=1。"""
    log_probs, old, advantages, mask = batch(0.5)
    grads = [
        value_and_grad(loss, log_probs)[1]
        for loss in (
            grpo_loss(log_probs, old, None, advantages, mask, beta=0.0),
            gspo_loss(log_probs, old, advantages, mask),
            aggregate_loss(
                cispo_loss(log_probs, old, advantages[:, None], clip_high=0.28),
                mask,
                mode="seq-mean-token-mean",
            ),
        )
    ]
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert (grads[i] - grads[j]).abs().max() > 0.01


# ---- 性质与边界 ----


def test_repeating_a_response_does_not_change_its_ratio():
    log_probs, old, _, mask = batch()
    once = log_sequence_ratio(log_probs, old, mask)
    twice = log_sequence_ratio(*(torch.cat([x, x], dim=1) for x in (log_probs, old, mask)))
    torch.testing.assert_close(once, twice)


def test_every_token_of_a_response_gets_the_same_gradient():
    log_probs, old, advantages, mask = batch()
    grad = value_and_grad(
        gspo_loss(log_probs, old, advantages, mask, clip_low=LOW, clip_high=HIGH), log_probs
    )[1]
    for row, keep in zip(grad, mask, strict=True):
        torch.testing.assert_close(row[keep], row[0].expand(int(keep.sum())))
        assert not row[~keep].any()


def test_padding_never_leaks():
    log_probs, old, advantages, mask = batch()
    clean = value_and_grad(gspo_loss(log_probs, old, advantages, mask), log_probs)
    dirty = log_probs.detach().masked_fill(~mask, math.nan).requires_grad_()
    torch.testing.assert_close(
        value_and_grad(gspo_loss(dirty, old.masked_fill(~mask, math.inf), advantages, mask), dirty), clean
    )


def test_a_fully_masked_row_does_not_count():
    log_probs, old, advantages, mask = batch()
    hidden = mask.clone()
    hidden[1] = False
    rows = [0, 2, 3, 4]
    torch.testing.assert_close(
        gspo_loss(log_probs, old, advantages, hidden),
        gspo_loss(log_probs[rows], old[rows], advantages[rows], mask[rows]),
    )


def test_a_fully_masked_row_has_zero_log_ratio_and_finite_gradients():
    log_probs, old, advantages, mask = batch()
    hidden = mask.clone()
    hidden[1] = False
    assert log_sequence_ratio(log_probs, old, hidden)[1] == 0
    grad = value_and_grad(gspo_loss(log_probs, old, advantages, hidden), log_probs)[1]
    assert grad.isfinite().all() and not grad[1].any()


def test_the_old_policy_gets_no_gradient():
    log_probs, old, advantages, mask = batch()
    old = old.requires_grad_()
    loss = gspo_loss(log_probs, old, advantages, mask)
    assert torch.autograd.grad(loss, old, allow_unused=True)[0] is None


def test_no_hidden_clamp_on_the_ratio():
    """s=e^15、Â<0：损失照实是 e^15；verl 0.9.1 会在 e^10 处截住。"""
    log_probs = torch.full((1, 3), 15.0, dtype=torch.float64)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss = gspo_loss(log_probs, torch.zeros_like(log_probs), torch.tensor([-1.0]).double(), mask)
    torch.testing.assert_close(loss.item(), math.exp(15.0))


def test_policy_weights_match_finite_differences():
    log_probs, old, advantages, mask = batch()
    weights = policy_weights(
        gspo_loss(log_probs, old, advantages, mask, clip_low=0.5, clip_high=0.5), log_probs
    )
    assert weights[0, 0] > 0 > weights[1, 0]  # 优势为正的推高
    step = torch.zeros(5, 7, dtype=torch.float64)
    for i, t in ((0, 3), (3, 5), (1, 2)):
        step.zero_()[i, t] = 1e-6
        up, down = (
            gspo_loss(log_probs.detach() + sign * step, old, advantages, mask, clip_low=0.5, clip_high=0.5)
            for sign in (1, -1)
        )
        torch.testing.assert_close(weights[i, t], (down - up) / 2e-6, rtol=1e-6, atol=1e-9)


def test_policy_weights_leave_the_graph_usable():
    """看完权重还要能照常反传。"""
    log_probs, old, advantages, mask = batch()
    loss = gspo_loss(log_probs, old, advantages, mask)
    weights = policy_weights(loss, log_probs)
    loss.backward()
    torch.testing.assert_close(log_probs.grad, -weights)
    assert not weights.requires_grad


def test_negative_widths_are_refused():
    log_probs, old, advantages, mask = batch()
    with pytest.raises(ValueError, match="裁剪宽度不能为负"):
        gspo_loss(log_probs, old, advantages, mask, clip_low=-3e-4)


# ---- 流传的错误写法：真值必须拒绝它们 ----


def wrong_arithmetic(log_probs, old, mask):
    """逐 token 比值的算术平均。"""
    return (((log_probs - old).exp() * mask).sum(1) / mask.sum(1)).log()


def wrong_product(log_probs, old, mask):
    """乘积，没有开 |y| 次方。"""
    return ((log_probs - old) * mask).sum(1)


def wrong_padded_length(log_probs, old, mask):
    """除以补齐后的宽度，而不是自己的长度。"""
    return ((log_probs - old) * mask).sum(1) / mask.shape[1]


def wrong_inverse(log_probs, old, mask):
    """比值倒过来。"""
    return ((old - log_probs) * mask).sum(1) / mask.sum(1)


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", [wrong_arithmetic, wrong_product, wrong_padded_length, wrong_inverse])
def test_wrong_ratios_are_rejected(wrong):
    log_probs, old, _, mask = batch(0.4)
    truth = row_ratio(log_probs, old, mask).log()
    torch.testing.assert_close(log_sequence_ratio(log_probs, old, mask), truth)
    assert (wrong(log_probs, old, mask) - truth).abs().max() > 0.03


@pytest.mark.rejects
def test_detached_ratio_without_the_token_form_has_no_gradient():
    """式 14 若忘了 π/sg[π] 这一项，损失与参数无关。"""
    log_probs, old, advantages, mask = batch()
    ratio = log_sequence_ratio(log_probs, old, mask).exp().detach()
    assert not (-(ratio * advantages)).requires_grad
    assert gspo_loss(log_probs, old, advantages, mask, clip_low=LOW, clip_high=HIGH).requires_grad


@pytest.mark.rejects
def test_token_widths_on_the_sequence_ratio_clip_nothing():
    """把 0.2 当作 GSPO 的 ε：每个 token 漂 ±0.05 也没有一条出界；论文的宽度裁掉五条里的三条以上。"""
    log_probs, old, _, mask = batch()
    log_ratio = log_sequence_ratio(log_probs, old, mask)
    ratio = log_ratio.exp()
    assert ((ratio - 1).abs() < 0.2).all()
    assert int(((ratio > 1 + 4e-4) | (ratio < 1 - 3e-4)).sum()) >= 3
