r"""snippets/rl/clip.py 的测试。

真值有三个来源，互不相同：(1) 手推的六格表，写成纯 Python 的 if/else，不用 clamp 与 min；
(2) TRL 1.16 的 `GRPOTrainer._compute_loss`，原方法真实调用，只把前向换成给定的对数概率；
(3) verl 0.9.0 与 OpenRLHF 0.11.0 跑出来后冻结的数值和梯度，见 tests/golden/make_clip.py。
全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import json
import math
from pathlib import Path

import jaxtyping
import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import (
    cispo_loss,
    clip_fraction,
    clipped_surrogate_loss,
    clipped_tokens,
    clipped_value_loss,
    dual_clip_loss,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "clip.json").read_text(encoding="utf-8"))
LOW, HIGH = 0.2, 0.28


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def grad_of(loss_fn, log_probs, *args, **kwargs):
    """逐 token 的损失与它对 log_probs 的梯度；损失是逐元素的，求和再反传不会混淆 token。"""
    leaf = log_probs.detach().clone().requires_grad_()
    loss = loss_fn(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss.sum(), leaf)[0]


def case(ratios, advantages):
    """给定 ρ 与优势，造出 (log_probs, old_log_probs, advantages)。"""
    ratio = tensor(ratios)
    generator = torch.Generator().manual_seed(3)
    old_log_probs = -torch.rand(ratio.shape, generator=generator, dtype=torch.float64) - 2
    return old_log_probs + ratio.log(), old_log_probs, tensor(advantages)


def grid():
    """四种优势（含零）× 覆盖所有区间的 200 个 ρ，避开端点 0.8、1.2、1.28、3。"""
    ratio = [[0.0137 + 0.0213 * i for i in range(200)]] * 4
    return case(ratio, [[1.5], [-0.7], [0.0], [-2.0]])


def region_oracle(ratio, advantage, clip_low, clip_high):
    """六格表：返回 (损失, 对 log π 的梯度)。"""
    if advantage > 0 and ratio > 1 + clip_high:
        return -(1 + clip_high) * advantage, 0.0
    if advantage < 0 and ratio < 1 - clip_low:
        return -(1 - clip_low) * advantage, 0.0
    return -ratio * advantage, -ratio * advantage


def dual_oracle(ratio, advantage, clip_low, clip_high, dual_clip):
    if advantage < 0 and ratio > dual_clip:
        return dual_clip * abs(advantage), 0.0
    return region_oracle(ratio, advantage, clip_low, clip_high)


def apply_oracle(oracle, log_probs, old_log_probs, advantages, *args):
    ratio = (log_probs - old_log_probs).exp()
    advantages = advantages.expand_as(ratio)
    rows = [
        [oracle(r, a, *args) for r, a in zip(ratio_row, adv_row, strict=True)]
        for ratio_row, adv_row in zip(ratio.tolist(), advantages.tolist(), strict=True)
    ]
    return tensor([[x[0] for x in row] for row in rows]), tensor([[x[1] for x in row] for row in rows])


# ---- 手算 ----


def test_only_two_of_the_six_cells_have_zero_gradient():
    """ε=0.2。Â=+1：ρ=0.5 → min(0.5, 0.8)=0.5；ρ=1.1 → 1.1；ρ=1.5 → min(1.5, 1.2)=1.2，常数，梯度 0。
    Â=−1：ρ=0.5 → min(−0.5, −0.8)=−0.8，常数，梯度 0；ρ=1.1 → −1.1；ρ=1.5 → min(−1.5, −1.2)=−1.5，梯度还在。
    损失是目标的相反数；没有被裁剪的格子里 dℓ/dlogπ = −ρÂ。
    """
    loss, grad = grad_of(clipped_surrogate_loss, *case([[0.5, 1.1, 1.5]] * 2, [[1.0], [-1.0]]))
    torch.testing.assert_close(loss, tensor([[-0.5, -1.1, -1.2], [0.8, 1.1, 1.5]]))
    torch.testing.assert_close(grad, tensor([[-0.5, -1.1, 0.0], [0.0, 1.1, 1.5]]))


def test_dual_clip_caps_only_the_negative_advantage_loss():
    """c=3、ε=0.2。Â=−1：ρ=2 → 2，梯度 2；ρ=4 → 封顶 3，梯度 0（不封顶时是 4）；ρ=0.5 → PPO 的 0.8，梯度 0。
    Â=+1：ρ=2、4 → PPO 的 −1.2，不变；ρ=0.5 → −0.5，梯度 −0.5。
    """
    loss, grad = grad_of(dual_clip_loss, *case([[2.0, 4.0, 0.5]] * 2, [[-1.0], [1.0]]))
    torch.testing.assert_close(loss, tensor([[2.0, 3.0, 0.8], [-1.2, -1.2, -0.5]]))
    torch.testing.assert_close(grad, tensor([[2.0, 0.0, 0.0], [0.0, 0.0, -0.5]]))


def test_cispo_caps_the_weight_but_keeps_the_gradient():
    """上限 1.28：ρ=4 → 梯度 −1.28Â；ρ=0.1 没有下界 → −0.1Â；加下界 0.8 → −0.8Â。"""
    args = case([[4.0, 0.1], [4.0, 0.1]], [[1.0], [-2.0]])
    _, grad = grad_of(cispo_loss, *args, clip_high=0.28)
    torch.testing.assert_close(grad, tensor([[-1.28, -0.1], [2.56, 0.2]]))
    _, grad = grad_of(cispo_loss, *args, clip_high=0.28, clip_low=0.2)
    torch.testing.assert_close(grad, tensor([[-1.28, -0.8], [2.56, 1.6]]))


def test_value_clip_takes_the_worse_of_two_errors():
    """V_old=0、ε_v=0.2。R=1：V=0.5 截到 0.2，max(0.25, 0.64)=0.64，梯度 0（已朝目标走过头）；
    V=−0.5 截到 −0.2，max(2.25, 1.44)=2.25，梯度 2(V−R)=−3（走反了，照常纠正）；V=0.1 在区间内，0.81，梯度 −1.8。
    R=−1：V=−0.5 截到 −0.2，max(0.25, 0.64)=0.64，梯度 0。
    """
    values, returns = tensor([[0.5, -0.5, 0.1, -0.5]]), tensor([[1.0, 1.0, 1.0, -1.0]])
    loss, grad = grad_of(clipped_value_loss, values, torch.zeros_like(values), returns)
    torch.testing.assert_close(loss, tensor([[0.64, 2.25, 0.81, 0.64]]))
    torch.testing.assert_close(grad, tensor([[0.0, -3.0, -1.8, 0.0]]))


# ---- 与独立实现一致 ----


def test_matches_the_region_table_at_800_points():
    args = grid()
    expected = apply_oracle(region_oracle, *args, LOW, HIGH)
    torch.testing.assert_close(grad_of(clipped_surrogate_loss, *args, clip_low=LOW, clip_high=HIGH), expected)


def test_dual_clip_matches_the_region_table_at_800_points():
    args = grid()
    expected = apply_oracle(dual_oracle, *args, LOW, HIGH, 3.0)
    torch.testing.assert_close(
        grad_of(dual_clip_loss, *args, clip_low=LOW, clip_high=HIGH, dual_clip=3.0), expected
    )


def test_equals_the_two_case_form():
    """Spinning Up 的写法：Â≥0 时 min(ρ, 1+ε)Â，Â<0 时 max(ρ, 1−ε)Â。写的是 max，与 min 的形式是同一个函数。"""

    def two_cases(log_probs, old_log_probs, advantages):
        ratio = (log_probs - old_log_probs).exp()
        return -torch.where(advantages >= 0, ratio.clamp(max=1.2), ratio.clamp(min=0.8)) * advantages

    args = grid()
    torch.testing.assert_close(grad_of(clipped_surrogate_loss, *args), grad_of(two_cases, *args))


def run_trl(*args, loss_type="bnpo", epsilon_high=HIGH, **options):
    return trl_grpo_loss(*args, loss_type=loss_type, epsilon_low=LOW, epsilon_high=epsilon_high, **options)


def masked_mean_and_grad(loss_fn, args, loss_mask, **kwargs):
    leaf = args[0].clone().requires_grad_()
    loss = (loss_fn(leaf, *args[1:], **kwargs) * loss_mask).sum() / loss_mask.sum()
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def frozen_case():
    data = {key: tensor(value) for key, value in GOLDEN["inputs"].items()}
    return (data["log_probs"], data["old_log_probs"], data["advantages"]), data["loss_mask"], data


def test_loss_gradient_and_clip_fraction_match_trl():
    args, loss_mask, _ = frozen_case()
    loss, grad, metrics = run_trl(*args, loss_mask)
    expected = masked_mean_and_grad(clipped_surrogate_loss, args, loss_mask, clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close((loss, grad), expected)
    fraction = clip_fraction(*args, loss_mask, clip_low=LOW, clip_high=HIGH)
    assert 0 < fraction.item() == pytest.approx(metrics["clip_ratio/region_mean"][0])


def test_each_token_matches_trl():
    """掩码只留一个 token，逐个比较损失。"""
    args, loss_mask, _ = frozen_case()
    ours = clipped_surrogate_loss(*args, clip_low=LOW, clip_high=HIGH)
    for index in range(loss_mask.numel()):
        mask = torch.zeros_like(loss_mask)
        mask.view(-1)[index] = 1
        torch.testing.assert_close(run_trl(*args, mask)[0], ours.view(-1)[index])


def test_per_sequence_advantages_match_trl():
    """TRL 收 (B,) 的优势并自己 unsqueeze；我们要求 (B, 1)。"""
    (log_probs, old_log_probs, _), loss_mask, _ = frozen_case()
    advantages = tensor([1.0, -1.0, 0.5])
    expected = run_trl(log_probs, old_log_probs, advantages, loss_mask)[:2]
    args = (log_probs, old_log_probs, advantages[:, None])
    ours = masked_mean_and_grad(clipped_surrogate_loss, args, loss_mask, clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close(ours, expected)


def test_trl_delta_equals_dual_clip():
    args, loss_mask, _ = frozen_case()
    loss, grad, _ = run_trl(*args, loss_mask, delta=3.0)
    ours = masked_mean_and_grad(dual_clip_loss, args, loss_mask, clip_low=LOW, clip_high=HIGH, dual_clip=3.0)
    torch.testing.assert_close((loss, grad), ours)
    assert loss < run_trl(*args, loss_mask)[0]


def test_trl_delta_below_the_clip_range_is_another_loss():
    """δ=1.1 < 1+ε=1.28、ρ=1.15。TRL：Â=−1 时 min(−1.1, −1.15)，损失 1.15、梯度还在；Â=+1 时 min(1.1, 1.15)，
    损失 −1.1、梯度 0。双侧裁剪 c=1.1 正好相反：负优势封顶 1.1、梯度 0，正优势不动。两个 token 取平均。
    """
    args, loss_mask = case([[1.15], [1.15]], [[-1.0], [1.0]]), tensor([[1.0], [1.0]])
    theirs = run_trl(*args, loss_mask, delta=1.1)[:2]
    torch.testing.assert_close(theirs, (tensor(0.025), tensor([[1.15 / 2], [0.0]])))
    ours = masked_mean_and_grad(dual_clip_loss, args, loss_mask, clip_low=LOW, clip_high=HIGH, dual_clip=1.1)
    torch.testing.assert_close(ours, (tensor(-0.025), tensor([[0.0], [-1.15 / 2]])))


def test_trl_cispo_cap_is_the_weight_itself():
    """TRL 的 epsilon_high 是上限本身：5.0 对应 clip_high=4.0；不设时落到 epsilon=0.2，权重全被压到 0.2。"""
    args, loss_mask, _ = frozen_case()
    ours = masked_mean_and_grad(cispo_loss, args, loss_mask, clip_high=0.28)
    torch.testing.assert_close(run_trl(*args, loss_mask, loss_type="cispo", epsilon_high=1.28)[:2], ours)
    metrics = run_trl(*args, loss_mask, loss_type="cispo", epsilon_high=1.28)[2]
    above = ((args[0] - args[1]).exp() > 1.28) & (args[2] > 0)
    expected = ((above * loss_mask).sum() / loss_mask.sum()).item()
    assert 0 < expected == pytest.approx(metrics["cispo_clip_ratio"][0])
    shrunk = run_trl(*args, loss_mask, loss_type="cispo", epsilon_high=0.2)[1]
    torch.testing.assert_close(shrunk, -0.2 * args[2] * loss_mask / loss_mask.sum())


def test_matches_verl_vanilla():
    args, loss_mask, _ = frozen_case()
    frozen = GOLDEN["verl"]["vanilla"]
    loss, grad = grad_of(dual_clip_loss, *args, clip_low=LOW, clip_high=HIGH, dual_clip=3.0)
    torch.testing.assert_close(loss, tensor(frozen["loss"]))
    torch.testing.assert_close(grad, tensor(frozen["grad"]))
    # verl 的 masked_mean 分母加了 1e-8，指标经过 float32 的 0/1 张量
    fraction = clip_fraction(*args, loss_mask, clip_low=LOW, clip_high=HIGH).item()
    assert fraction == pytest.approx(frozen["metrics"]["actor/pg_clipfrac"], abs=1e-7)
    beyond = (args[2] < 0) & (args[0] - args[1] > math.log(3.0))
    lower = ((beyond * loss_mask).sum() / loss_mask.sum()).item()
    assert 0 < lower == pytest.approx(frozen["metrics"]["actor/pg_clipfrac_lower"], abs=1e-7)


def test_matches_openrlhf():
    args, loss_mask, _ = frozen_case()
    for name, ours in [("ppo", clipped_surrogate_loss), ("dual_clip", dual_clip_loss)]:
        loss, grad = grad_of(ours, *args, clip_low=LOW, clip_high=HIGH)
        torch.testing.assert_close(loss, tensor(GOLDEN["openrlhf"][name]["loss"]))
        torch.testing.assert_close(grad, tensor(GOLDEN["openrlhf"][name]["grad"]))
        fraction = clip_fraction(*args, loss_mask, clip_low=LOW, clip_high=HIGH).item()
        # 指标在 OpenRLHF 里由 float32 的 0/1 张量求平均
        assert fraction == pytest.approx(GOLDEN["openrlhf"][name]["clip_ratio"], abs=1e-7)


def test_cispo_matches_verl_with_both_sides_clipped():
    """它的 pg_clipfrac 数的是权重被截的 token：区间外都算，不看优势。"""
    args, loss_mask, _ = frozen_case()
    loss, grad = grad_of(cispo_loss, *args, clip_low=LOW, clip_high=HIGH)
    torch.testing.assert_close(loss, tensor(GOLDEN["verl"]["cispo"]["loss"]))
    torch.testing.assert_close(grad, tensor(GOLDEN["verl"]["cispo"]["grad"]))
    ratio = (args[0] - args[1]).exp()
    outside = (ratio < 1 - LOW) | (ratio > 1 + HIGH)
    fraction = ((outside * loss_mask).sum() / loss_mask.sum()).item()
    assert fraction == pytest.approx(GOLDEN["verl"]["cispo"]["metrics"]["actor/pg_clipfrac"], abs=1e-7)


@pytest.mark.parametrize("library", ["verl", "openrlhf"])
def test_value_clip_is_twice_the_library_value(library):
    """两个库都在外面乘 1/2。"""
    _, _, data = frozen_case()
    loss, grad = grad_of(
        clipped_value_loss, data["values"], data["old_values"], data["returns"], value_clip=0.5
    )
    torch.testing.assert_close(loss / 2, tensor(GOLDEN[library]["value"]["loss"]))
    torch.testing.assert_close(grad / 2, tensor(GOLDEN[library]["value"]["grad"]))


# ---- 性质 ----


def test_first_inner_step_is_plain_policy_gradient():
    """ρ=1：没有 token 被裁剪，梯度恰好是 −Â，与 ε 无关。"""
    log_probs, _, advantages = grid()
    for width in [0.0, 0.01, 0.2]:
        _, grad = grad_of(
            clipped_surrogate_loss, log_probs, log_probs, advantages, clip_low=width, clip_high=width
        )
        assert torch.equal(grad, -advantages.expand_as(grad))
    assert not clipped_tokens(log_probs, log_probs, advantages, clip_low=0.0, clip_high=0.0).any()


def test_objective_is_a_lower_bound_of_the_unclipped_one():
    log_probs, old_log_probs, advantages = grid()
    unclipped = -(log_probs - old_log_probs).exp() * advantages
    assert (clipped_surrogate_loss(log_probs, old_log_probs, advantages) >= unclipped).all()


def test_dual_clip_bounds_the_loss_from_above():
    args = grid()
    assert (dual_clip_loss(*args, dual_clip=3.0) <= 3.0 * args[2].abs()).all()
    assert (clipped_surrogate_loss(*args) > 3.0 * args[2].abs()).any()


def test_clip_high_only_touches_positive_advantages():
    """ε_high 从 0.2 到 0.28，只有 Â>0 且 1.2<ρ≤1.28 的 token 由「没有梯度」变成「有梯度」。"""
    args = case([[1.1, 1.25, 1.5]] * 2, [[1.0], [-1.0]])
    _, narrow = grad_of(clipped_surrogate_loss, *args)
    _, wide = grad_of(clipped_surrogate_loss, *args, clip_high=0.28)
    torch.testing.assert_close(wide - narrow, tensor([[0.0, -1.25, 0.0], [0.0, 0.0, 0.0]]))


def test_clip_low_only_touches_negative_advantages():
    args = case([[0.5, 0.75, 0.9]] * 2, [[1.0], [-1.0]])
    _, narrow = grad_of(clipped_surrogate_loss, *args)
    _, wide = grad_of(clipped_surrogate_loss, *args, clip_low=0.3)
    torch.testing.assert_close(wide - narrow, tensor([[0.0, 0.0, 0.0], [0.0, 0.75, 0.0]]))


def test_clipped_tokens_are_exactly_those_without_gradient():
    args = grid()
    _, grad = grad_of(clipped_surrogate_loss, *args, clip_low=LOW, clip_high=HIGH)
    no_gradient = (grad == 0) & (args[2] != 0)
    assert torch.equal(clipped_tokens(*args, clip_low=LOW, clip_high=HIGH), no_gradient)


def test_masked_tokens_do_not_count():
    """四个 token 里两个被裁剪；掩掉一个被裁剪的，剩 1/3。"""
    args = case([[1.5, 1.0, 0.5, 0.5]], [[1.0, 1.0, -1.0, 1.0]])
    assert clip_fraction(*args, tensor([[1.0, 1.0, 1.0, 1.0]])).item() == 0.5
    assert clip_fraction(*args, tensor([[0.0, 1.0, 1.0, 1.0]])).item() == pytest.approx(1 / 3)


def test_default_widths_of_the_clip_fraction_are_0_2():
    """八个 token 里只有 (Â>0, ρ=1.21) 与 (Â<0, ρ=0.79) 被裁剪；ρ=0.81、1.19 在默认的区间内。"""
    args = case([[0.79, 0.81, 1.19, 1.21]] * 2, [[1.0], [-1.0]])
    expected = torch.tensor([[False, False, False, True], [True, False, False, False]])
    assert torch.equal(clipped_tokens(*args), expected)
    assert clip_fraction(*args, torch.ones_like(args[0])).item() == 0.25


def test_each_width_reaches_its_own_side_of_the_clip_fraction():
    """ρ=0.75、Â=−1 与 ρ=1.25、Â=+1：默认 0.2 时都被裁剪；放宽哪一侧，就只少哪一个。"""
    args = case([[0.75], [1.25]], [[-1.0], [1.0]])
    mask = tensor([[1.0], [3.0]])  # 权重不同，看得出少的是哪一个
    assert clip_fraction(*args, mask).item() == 1.0
    assert clip_fraction(*args, mask, clip_low=0.3).item() == 0.75
    assert clip_fraction(*args, mask, clip_high=0.3).item() == 0.25


def test_zero_value_clip_leaves_no_room_to_move():
    """ε_v=0：截断后的价值就是 V_old=0，R=1 时两支是 (V−1)² 与 1。V=0.5 取 1，梯度 0；V=−1 取 4，梯度 −4。"""
    values = tensor([[0.5, -1.0]])
    loss, grad = grad_of(
        clipped_value_loss, values, torch.zeros_like(values), torch.ones_like(values), value_clip=0.0
    )
    torch.testing.assert_close((loss, grad), (tensor([[1.0, 4.0]]), tensor([[0.0, -4.0]])))


def test_the_log_ratio_is_not_clamped():
    """log ρ=25、Â=−1：损失与梯度都是 e²⁵。verl 与 OpenRLHF 在 20 处截断，公式里没有这一步。"""
    args = tensor([[-1.0]]), tensor([[-26.0]]), tensor([[-1.0]])
    expected = tensor([[math.exp(25.0)]])
    torch.testing.assert_close(grad_of(clipped_surrogate_loss, *args), (expected, expected))


def test_per_sequence_advantages_equal_expanded_ones():
    log_probs, old_log_probs, advantages = grid()
    expanded = advantages.expand_as(log_probs).contiguous()
    for loss_fn in [clipped_surrogate_loss, dual_clip_loss]:
        assert torch.equal(
            loss_fn(log_probs, old_log_probs, advantages), loss_fn(log_probs, old_log_probs, expanded)
        )


def test_float32_in_float32_out():
    args = [x.float() for x in grid()]
    assert clipped_surrogate_loss(*args).dtype == torch.float32
    assert dual_clip_loss(*args).dtype == torch.float32


# ---- 边界 ----


@pytest.mark.parametrize(("ratio", "advantage"), [(2.0, 1.0), (0.5, -1.0)])
def test_at_the_boundary_torch_keeps_the_full_gradient(ratio, advantage):
    """ε=1（上）与 0.5（下）让端点 2 与 0.5 在浮点里精确可达。端点上 min 的两支相等，`torch.minimum` 各分一半，
    `clamp` 在端点的导数是 1，合起来仍是 −ρÂ；再往外一个最小浮点步长就是 0。clipped_tokens 用严格不等号，与此一致。
    """
    widths = {"clip_low": 0.5, "clip_high": 1.0}
    log_probs, old, advantages = tensor([[math.log(ratio)]]), tensor([[0.0]]), tensor([[advantage]])
    assert log_probs.exp().item() == ratio
    _, grad = grad_of(clipped_surrogate_loss, log_probs, old, advantages, **widths)
    assert grad.item() == -ratio * advantage
    assert not clipped_tokens(log_probs, old, advantages, **widths).any()

    beyond = log_probs + math.copysign(1e-12, advantage)
    _, grad = grad_of(clipped_surrogate_loss, beyond, old, advantages, **widths)
    assert grad.item() == 0
    assert clipped_tokens(beyond, old, advantages, **widths).all()


def test_at_the_dual_clip_boundary_torch_halves_the_gradient():
    """ρ=c=2：封顶那一支是常数，`torch.minimum` 在平局时只给另一支一半，−ρÂ/2 = 1。TRL 的 delta 用 clamp 封顶，
    clamp 在端点的导数是 1，同一点上是完整的 2。
    """
    args = tensor([[math.log(2.0)]]), tensor([[0.0]]), tensor([[-1.0]])
    loss, grad = grad_of(dual_clip_loss, *args, dual_clip=2.0)
    assert (loss.item(), grad.item()) == (2.0, 1.0)
    assert run_trl(*args, tensor([[1.0]]), delta=2.0)[1].item() == 2.0


def test_zero_advantage_gives_zero_loss_and_gradient():
    args = case([[0.1, 1.0, 9.0]], [[0.0]])
    for loss_fn in [clipped_surrogate_loss, dual_clip_loss]:
        loss, grad = grad_of(loss_fn, *args)
        assert not loss.any() and not grad.any()
    assert not clipped_tokens(*args).any()


def test_one_dimensional_advantages_are_rejected():
    """B=T=2 时 (B,) 会沿 T 轴广播而不报错，所以类型里写死二维。"""
    log_probs, old_log_probs, _ = case([[0.5, 1.5], [0.5, 1.5]], [[0.0]])
    with pytest.raises(jaxtyping.TypeCheckError):
        clipped_surrogate_loss(log_probs, old_log_probs, tensor([1.0, -1.0]))


def test_nothing_in_the_mask_is_nan_not_zero():
    args = case([[1.5, 0.5]], [[1.0]])
    assert clip_fraction(*args, tensor([[0.0, 0.0]])).isnan()


@pytest.mark.parametrize("function", [clipped_surrogate_loss, dual_clip_loss, clipped_tokens])
def test_negative_widths_are_refused(function):
    args = case([[1.5]], [[1.0]])
    with pytest.raises(ValueError, match="不能为负"):
        function(*args, clip_low=-0.1)
    with pytest.raises(ValueError, match="不能为负"):
        function(*args, clip_high=-0.1)


def test_other_bad_scalars_are_refused():
    args = case([[1.5]], [[1.0]])
    with pytest.raises(ValueError, match="必须大于 1"):
        dual_clip_loss(*args, dual_clip=1.0)
    with pytest.raises(ValueError, match="不能为负"):
        cispo_loss(*args, clip_high=-0.1)
    with pytest.raises(ValueError, match="不能为负"):
        clipped_value_loss(*args, value_clip=-0.1)


# ---- 流传的错误写法，必须被上面的真值拒绝 ----


def clip_without_min(ratio, advantages):
    return -ratio.clamp(1 - LOW, 1 + HIGH) * advantages


def max_instead_of_min(ratio, advantages):
    return -torch.maximum(ratio * advantages, ratio.clamp(1 - LOW, 1 + HIGH) * advantages)


def min_before_multiplying(ratio, advantages):
    return -torch.minimum(ratio, ratio.clamp(1 - LOW, 1 + HIGH)) * advantages


def negative_advantage_clipped_above_too(ratio, advantages):
    return (
        -torch.where(advantages < 0, ratio.clamp(1 - LOW, 1 + HIGH), ratio.clamp(max=1 + HIGH)) * advantages
    )


def widths_swapped(ratio, advantages):
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - HIGH, 1 + LOW) * advantages)


def log_ratio_clipped(ratio, advantages):
    clipped = ratio.log().clamp(-LOW, HIGH).exp()
    return -torch.minimum(ratio * advantages, clipped * advantages)


def endpoints_instead_of_widths(ratio, advantages):
    return -torch.minimum(ratio * advantages, ratio.clamp(1 - 0.8, 1 + 1.28) * advantages)


def clipped_as_soon_as_ratio_leaves_one(ratio, advantages):
    return -torch.minimum(ratio * advantages, torch.ones_like(ratio) * advantages)


WRONG = [
    clip_without_min,
    max_instead_of_min,
    min_before_multiplying,
    negative_advantage_clipped_above_too,
    widths_swapped,
    log_ratio_clipped,
    endpoints_instead_of_widths,
    clipped_as_soon_as_ratio_leaves_one,
]


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_wrong_clip_differs_from_the_region_table(wrong):
    """错误写法与六格表的梯度至少在一个点上差 0.5 以上（ρ≈1 附近一个 token 的梯度大小是 |Â|）；我们的差为零。"""
    args = grid()
    _, truth = apply_oracle(region_oracle, *args, LOW, HIGH)
    _, ours = grad_of(clipped_surrogate_loss, *args, clip_low=LOW, clip_high=HIGH)
    _, theirs = grad_of(lambda x, old, adv: wrong((x - old).exp(), adv), *args)
    assert (theirs - truth).abs().max() > 0.5
    torch.testing.assert_close(ours, truth)


def dual_clip_on_both_signs(loss, advantages):
    return torch.minimum(loss, -3.0 * advantages)


def dual_clip_with_max(loss, advantages):
    return torch.where(advantages < 0, torch.maximum(loss, -3.0 * advantages), loss)


def dual_clip_on_positive_only(loss, advantages):
    return torch.where(advantages > 0, torch.maximum(loss, -3.0 * advantages), loss)


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [dual_clip_on_both_signs, dual_clip_with_max, dual_clip_on_positive_only],
    ids=lambda f: f.__name__,
)
def test_wrong_dual_clip_differs_from_the_region_table(wrong):
    args = grid()
    _, truth = apply_oracle(dual_oracle, *args, LOW, HIGH, 3.0)
    widths = {"clip_low": LOW, "clip_high": HIGH}
    _, ours = grad_of(dual_clip_loss, *args, **widths)
    _, theirs = grad_of(lambda x, old, adv: wrong(clipped_surrogate_loss(x, old, adv, **widths), adv), *args)
    assert (theirs - truth).abs().max() > 0.5
    torch.testing.assert_close(ours, truth)


@pytest.mark.rejects
def test_value_clip_with_min_is_optimistic():
    """手算的三点上，min 给 0.25、1.44、0.81：走过头的不拦，走反了的反而不纠正（梯度 0）。"""

    def with_min(values, old_values, returns):
        clipped = old_values + (values - old_values).clamp(-0.2, 0.2)
        return torch.minimum((values - returns) ** 2, (clipped - returns) ** 2)

    values = tensor([[0.5, -0.5, 0.1]])
    loss, grad = grad_of(with_min, values, torch.zeros_like(values), torch.ones_like(values))
    torch.testing.assert_close(loss, tensor([[0.25, 1.44, 0.81]]))
    torch.testing.assert_close(grad, tensor([[-1.0, 0.0, -1.8]]))


@pytest.mark.rejects
def test_counting_every_ratio_outside_the_interval_overstates_the_clip_fraction():
    """四种区间外的情形各一个 token：梯度被拿掉的是 2/4，数 |ρ−1|>ε 得 4/4。"""
    args = case([[0.5, 1.5]] * 2, [[1.0], [-1.0]])
    assert clip_fraction(*args, torch.ones_like(args[0])).item() == 0.5
    assert (((args[0] - args[1]).exp() - 1).abs() > 0.2).double().mean().item() == 1.0
