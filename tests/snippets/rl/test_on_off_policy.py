r"""异策略权重与解耦 PPO 损失：偏差、方差、梯度。

真值来自与被测公式无关的地方：把一个小问题的全部序列列出来，直接对期望回报 $J(\theta)$ 求数值差分与自动微分；
TRPO 的代理目标按定义（旧状态分布、旧动作价值）逐状态求和；TRL 1.16 的 `GRPOTrainer._compute_loss`（真调用）；
verl 0.9.1 的冻结数值（`tests/golden/make_on_off_policy.py` 生成）。期望都是精确求和，没有采样误差。
"""

import itertools
import json
import math
from pathlib import Path

import pytest
import torch
from trl.trainer.grpo_config import GRPOConfig
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.on_off_policy import (
    decoupled_ppo_loss,
    effective_sample_size,
    importance_weights,
    mask_weights,
    truncate_weights,
    weighted_policy_gradient_loss,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "on_off_policy.json").read_text())

# 词表 2、长度 3：8 条序列，7 个前缀各一行 logits（空前缀 0，长 1 的 1–2，长 2 的 3–6）
SEQUENCES = torch.tensor(list(itertools.product(range(2), repeat=3)))
PREFIXES = torch.stack(
    [torch.zeros(8, dtype=torch.long), 1 + SEQUENCES[:, 0], 3 + 2 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], 1
)
MASK = torch.ones(8, 3, dtype=torch.bool)


def example(seed=0, distance=1.0):
    """（新策略 logits，采样策略 logits，奖励），奖励任意。"""
    generator = torch.Generator().manual_seed(seed)
    rollout, step = torch.randn(2, 7, 2, generator=generator, dtype=torch.float64)
    return rollout + distance * step, rollout, torch.randn(8, generator=generator, dtype=torch.float64)


def log_probs_of(logits):
    return logits.log_softmax(-1)[PREFIXES, SEQUENCES]  # (8, 3)


def expected_return(logits, rewards):
    """J(θ)：不用任何重要性比值，直接按概率求和。"""
    probs = logits.softmax(-1)[PREFIXES, SEQUENCES].prod(1)
    return (probs * rewards).sum()


def true_gradient(logits, rewards):
    leaf = logits.clone().requires_grad_(True)
    return torch.autograd.grad(expected_return(leaf, rewards), leaf)[0]


def expected_ascent(loss, logits, rollout):
    """样本来自 rollout（不求导），对每个样本的损失求导后取期望，再取负：训练时真正走的方向。"""
    leaf = logits.clone().requires_grad_(True)
    probs = rollout.softmax(-1)[PREFIXES, SEQUENCES].prod(1)
    value = (probs[:, None] * loss(log_probs_of(leaf))).sum()
    return -torch.autograd.grad(value, leaf)[0]


def weighted_ascent(level, logits, rollout, advantages):
    weights = importance_weights(log_probs_of(logits), log_probs_of(rollout), MASK, level=level)
    return expected_ascent(lambda lp: weighted_policy_gradient_loss(lp, weights, advantages), logits, rollout)


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


def rollout_values(rollout, rewards):
    """采样策略自己的动作价值 Q^μ(s_t, a_t)：对同前缀的后续按 μ 求和。形状 (8, 3)。"""
    probs = rollout.softmax(-1)[PREFIXES, SEQUENCES]
    values = torch.zeros(8, 3, dtype=torch.float64)
    for row in range(8):
        for t in range(3):
            same = (SEQUENCES[:, : t + 1] == SEQUENCES[row, : t + 1]).all(1)
            values[row, t] = (probs[same, t + 1 :].prod(1) * rewards[same]).sum()
    return values


# ---------------------------------------------------------------- 手算


def test_weights_by_hand():
    """三个 token 的比值 2、1/2、3：逐 token 就是它们；前缀积 2、1、3；整条积处处是 3。

    第二条中间那个 token 是工具返回：比值 2、（不算）、3，前缀积 2、0、6，整条积 6、0、6。
    """
    ratios = torch.tensor([[2.0, 0.5, 3.0], [2.0, 7.0, 3.0]], dtype=torch.float64)
    rollout = torch.full_like(ratios, -1.5)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    expected = {
        "token": [[2.0, 0.5, 3.0], [2.0, 0.0, 3.0]],
        "prefix": [[2.0, 1.0, 3.0], [2.0, 0.0, 6.0]],
        "sequence": [[3.0, 3.0, 3.0], [6.0, 0.0, 6.0]],
    }
    for level, values in expected.items():
        actual = importance_weights(rollout + ratios.log(), rollout, mask, level=level)
        torch.testing.assert_close(actual, torch.tensor(values, dtype=torch.float64))


def test_effective_sample_size_by_hand():
    """四个相等的权重是 4；(1, 0, 0, 0) 是 1；(3, 1) 是 16/10。整体乘常数不变。"""
    for weights, expected in [
        ([2.0] * 4, 4.0),
        ([1.0, 0.0, 0.0, 0.0], 1.0),
        ([3.0, 1.0], 1.6),
        ([30.0, 10.0], 1.6),
        ([0.03, 0.01], 1.6),
    ]:
        actual = effective_sample_size(torch.tensor(weights, dtype=torch.float64))
        torch.testing.assert_close(actual.item(), expected)


def test_decoupled_loss_by_hand():
    """π_prox/μ = 3，u = π_θ/π_prox = 1.5，裁剪宽度 0.2，优势 ±2。

    优势 +2：min(1.5, 1.2)·2 = 2.4，损失 -3·2.4 = -7.2，梯度 0；
    优势 -2：min(-3, -2.4) = -3，损失 3·3 = 9，对 log π_θ 的导数 9。
    """
    prox = torch.tensor([[-2.0, -2.0]], dtype=torch.float64)
    log_probs = (prox + math.log(1.5)).requires_grad_(True)
    weights = torch.full((1, 2), 3.0, dtype=torch.float64)
    advantages = torch.tensor([[2.0, -2.0]], dtype=torch.float64)
    loss = decoupled_ppo_loss(log_probs, prox, weights, advantages)
    torch.testing.assert_close(loss, torch.tensor([[-7.2, 9.0]], dtype=torch.float64))
    (grad,) = torch.autograd.grad(loss.sum(), log_probs)
    torch.testing.assert_close(grad, torch.tensor([[0.0, 9.0]], dtype=torch.float64))


def test_truncate_and_mask_by_hand():
    weights = torch.tensor([[0.1, 1.0, 2.0, 5.0]], dtype=torch.float64)
    assert truncate_weights(weights, cap=2.0).tolist() == [[0.1, 1.0, 2.0, 2.0]]
    assert truncate_weights(weights, cap=1.0).tolist() == [[0.1, 1.0, 1.0, 1.0]]  # 恰为 1 允许
    assert mask_weights(weights, high=2.0).tolist() == [[0.1, 1.0, 2.0, 0.0]]
    assert mask_weights(weights, low=0.5, high=2.0).tolist() == [[0.0, 1.0, 2.0, 0.0]]
    assert mask_weights(weights, low=1.0, high=2.0).tolist() == [
        [0.0, 1.0, 2.0, 0.0]
    ]  # 两端都保留，同 TRL、verl
    tiny = torch.tensor([[1e-12, 1.0]], dtype=torch.float64)
    assert mask_weights(tiny, high=2.0).tolist() == tiny.tolist()  # 默认不设下界


# ---------------------------------------------------------------- 独立的真值


@pytest.mark.parametrize("seed", range(4))
def test_sequence_weights_give_the_exact_policy_gradient(seed):
    """整条积：期望梯度等于 ∇J，对自动微分，也对中心差分。"""
    logits, rollout, rewards = example(seed)
    actual = weighted_ascent("sequence", logits, rollout, rewards[:, None])
    torch.testing.assert_close(actual, true_gradient(logits, rewards))
    for index in [(0, 0), (2, 1), (5, 0)]:
        bump = torch.zeros_like(logits)
        bump[index] = 1e-6
        slope = (expected_return(logits + bump, rewards) - expected_return(logits - bump, rewards)) / 2e-6
        torch.testing.assert_close(actual[index], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(4))
def test_token_weights_give_the_gradient_of_the_trpo_surrogate(seed):
    """TRPO 式 3 按定义求和：旧策略到达前缀的概率 × 新策略的动作概率 × 旧策略的 Q^μ，没有用到比值。"""
    logits, rollout, rewards = example(seed)
    values = rollout_values(rollout, rewards)
    leaf = logits.clone().requires_grad_(True)
    surrogate = torch.zeros((), dtype=torch.float64)
    rollout_probs, probs = rollout.softmax(-1)[PREFIXES, SEQUENCES], leaf.softmax(-1)[PREFIXES, SEQUENCES]
    for t in range(3):
        first = torch.arange(0, 8, 2 ** (2 - t))  # 每个长 t + 1 的前缀取一条代表
        reach = rollout_probs[first, :t].prod(1)
        surrogate = surrogate + (reach * probs[first, t] * values[first, t]).sum()
    (expected,) = torch.autograd.grad(surrogate, leaf)
    actual = weighted_ascent("token", logits, rollout, rewards[:, None])
    torch.testing.assert_close(actual, expected)


def test_prefix_weights_are_unbiased_only_with_the_values_of_the_new_policy():
    """前缀积修正了状态。优势是新策略的 Q^π：无偏；用采到的回报（后续来自旧策略）：有偏。"""
    logits, rollout, rewards = example(1)
    truth = true_gradient(logits, rewards)
    own_values = rollout_values(logits, rewards)
    torch.testing.assert_close(weighted_ascent("prefix", logits, rollout, own_values), truth)
    sampled = weighted_ascent("prefix", logits, rollout, rewards[:, None])
    torch.testing.assert_close(
        sampled, weighted_ascent("prefix", logits, rollout, rollout_values(rollout, rewards))
    )
    assert relative(sampled, truth) > 0.1


def test_prefix_weights_are_unbiased_for_the_reward_of_that_step():
    """逐步有奖励时，第 k 步的奖励只要乘到第 k 步的前缀积（per-decision）：只让第一个 token 得分。"""
    logits, rollout, _ = example(2)
    rewards = 1.0 - SEQUENCES[:, 0].double()  # 只由第一个 token 决定
    first_only = torch.tensor([True, False, False]).expand(8, 3)
    weights = importance_weights(log_probs_of(logits), log_probs_of(rollout), first_only, level="prefix")
    actual = expected_ascent(
        lambda lp: weighted_policy_gradient_loss(lp, weights, rewards[:, None]), logits, rollout
    )
    torch.testing.assert_close(actual, true_gradient(logits, rewards))


def test_second_moment_of_the_product_grows_at_least_exponentially():
    """E_μ[W²] = 1 + χ² ≥ e^{KL(π‖μ)}，KL 按链式法则随长度累加；逐 token 比值的二阶矩不随长度变。"""
    policy = torch.tensor([0.6, 0.4], dtype=torch.float64)
    rollout = torch.tensor([0.5, 0.5], dtype=torch.float64)
    token_kl = (policy * (policy / rollout).log()).sum().item()
    moments, token_moments = [], []
    for length in (1, 2, 4, 8):
        sequences = torch.tensor(list(itertools.product(range(2), repeat=length)))
        log_probs, rollout_log_probs = policy.log()[sequences], rollout.log()[sequences]
        mask = torch.ones_like(sequences, dtype=torch.bool)
        probs = rollout_log_probs.sum(1).exp()
        weights = importance_weights(log_probs, rollout_log_probs, mask, level="sequence")[:, 0]
        torch.testing.assert_close((probs * weights).sum().item(), 1.0)  # 均值恒为 1
        moments.append((probs * weights.square()).sum().item())
        assert moments[-1] >= math.exp(length * token_kl)
        token = importance_weights(log_probs, rollout_log_probs, mask, level="token")
        token_moments.append((probs @ token.square()).max().item())
    torch.testing.assert_close(moments, [1.04**length for length in (1, 2, 4, 8)])  # 0.36/0.5 + 0.16/0.5
    torch.testing.assert_close(token_moments, [1.04] * 4)


# ---------------------------------------------------------------- 对照库


def golden(name):
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_weights_match_verl(level):
    mask = golden("mask").bool()
    weights = importance_weights(golden("log_probs"), golden("rollout_log_probs"), mask, level=level)
    variants = {
        "untouched": weights,
        "truncated": truncate_weights(weights, cap=1.6),
        "masked": mask_weights(weights, low=0.42, high=1.7),
    }
    for name, ours in variants.items():
        theirs = torch.tensor(GOLDEN["weights"][f"{level}/{name}"], dtype=torch.float64)
        torch.testing.assert_close(ours, theirs)
        # verl 的有效样本量在全部 token 上算，再除以个数；均值多加了 1e-8
        fraction = (effective_sample_size(ours[mask]) / mask.sum()).item()
        torch.testing.assert_close(fraction, GOLDEN["eff_sample_size"][f"{level}/{name}"], rtol=1e-6, atol=0)
    assert (variants["masked"] == 0).sum() > (~mask).sum() and (variants["truncated"] == 1.6).any()


def test_decoupled_loss_matches_trl_forward_and_gradient():
    generator = torch.Generator().manual_seed(7)
    old = -3 * torch.rand(3, 5, generator=generator, dtype=torch.float64)
    log_probs = old + 0.4 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    rollout = old + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.4], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], dtype=torch.bool)
    for level in ("token", "sequence"):
        weights = truncate_weights(importance_weights(old, rollout, mask, level=level), cap=1.5)
        leaf = log_probs.clone().requires_grad_(True)
        ours = decoupled_ppo_loss(leaf, old, weights, advantages[:, None], clip_high=0.28)
        ours = (ours * mask).sum() / mask.sum()
        theirs = trl_grpo_loss(
            log_probs,
            old,
            advantages,
            mask,
            loss_type="bnpo",
            epsilon_high=0.28,
            importance_sampling_ratio=weights,
        )
        torch.testing.assert_close((ours.detach(), torch.autograd.grad(ours, leaf)[0]), theirs[:2])
        assert (theirs[1] == 0).sum() > (~mask).sum()  # 确有被裁的 token


def test_trl_defaults_are_one_iteration_and_masked_sequence_weights():
    fields = GRPOConfig.__dataclass_fields__
    assert fields["num_iterations"].default == 1
    assert fields["vllm_importance_sampling_correction"].default is True
    assert fields["vllm_importance_sampling_mode"].default == "sequence_mask"
    assert fields["vllm_importance_sampling_clip_max"].default == 3.0
    assert fields["vllm_importance_sampling_clip_min"].default is None


# ---------------------------------------------------------------- 性质


def test_everything_agrees_when_the_policies_are_the_same():
    logits, _, rewards = example(3)
    truth = true_gradient(logits, rewards)
    for level in ("token", "prefix", "sequence"):
        torch.testing.assert_close(weighted_ascent(level, logits, logits, rewards[:, None]), truth)


def test_token_bias_is_first_order_in_the_distance():
    """TRPO 式 4：代理目标与 J 在原点的梯度相同，所以偏差随距离趋于 0；减半距离，偏差约减半。"""
    biases = []
    for distance in (0.02, 0.01, 0.005):
        logits, rollout, rewards = example(0, distance)
        biases.append(
            relative(
                weighted_ascent("token", logits, rollout, rewards[:, None]), true_gradient(logits, rewards)
            )
        )
    assert 0.0 < biases[-1] < 0.01
    for far, near in itertools.pairwise(biases):
        assert 1.8 < far / near < 2.2


def test_a_baseline_does_not_change_the_mean_of_corrected_gradients():
    """逐 token、前缀积、整条积都不受基线影响；不修正的会。"""
    logits, rollout, rewards = example(1)
    for level in ("token", "prefix", "sequence"):
        torch.testing.assert_close(
            weighted_ascent(level, logits, rollout, rewards[:, None] - 5.0),
            weighted_ascent(level, logits, rollout, rewards[:, None]),
        )
    plain, shifted = (
        expected_ascent(lambda lp, b=b: -(rewards[:, None] - b) * lp, logits, rollout) for b in (0.0, 5.0)
    )
    assert (plain - shifted).abs().max() > 0.3


def test_decoupled_first_step_is_weighted_policy_gradient_without_clipping():
    """π_θ = π_prox 时 u = 1，谁也不被裁；梯度就是加权的策略梯度。合用 μ 时第一步就有 token 没有梯度。"""
    logits, rollout, rewards = example(1)
    advantages = rewards[:, None]
    log_probs, rollout_log_probs = log_probs_of(logits), log_probs_of(rollout)
    for level in ("token", "sequence"):
        weights = importance_weights(log_probs, rollout_log_probs, MASK, level=level)
        leaf = log_probs.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(decoupled_ppo_loss(leaf, log_probs, weights, advantages).sum(), leaf)
        torch.testing.assert_close(grad, -weights * advantages.expand_as(weights))
    leaf = log_probs.clone().requires_grad_(True)
    (coupled,) = torch.autograd.grad(clipped_surrogate_loss(leaf, rollout_log_probs, advantages).sum(), leaf)
    assert (coupled == 0).any()


def test_without_clipping_the_proximal_policy_drops_out():
    """裁剪宽度很大时 w·u = π_θ/μ，与 π_prox 是谁无关（2110.00641：ε → ∞ 时）。"""
    logits, rollout, rewards = example(2)
    log_probs, rollout_log_probs = log_probs_of(logits), log_probs_of(rollout)
    losses = []
    for seed in (5, 6):
        prox = log_probs_of(example(seed)[0])
        weights = importance_weights(prox, rollout_log_probs, MASK, level="token")
        losses.append(
            decoupled_ppo_loss(log_probs, prox, weights, rewards[:, None], clip_low=1e6, clip_high=1e6)
        )
    torch.testing.assert_close(losses[0], losses[1])
    torch.testing.assert_close(losses[0], -(log_probs - rollout_log_probs).exp() * rewards[:, None])


def test_no_gradient_reaches_weights_or_the_proximal_policy():
    logits, rollout, rewards = example(0)
    leaf = logits.clone().requires_grad_(True)
    log_probs = log_probs_of(leaf)
    rollout_leaf = log_probs_of(rollout).requires_grad_(True)
    weights = importance_weights(log_probs, rollout_leaf, MASK, level="sequence")
    assert not weights.requires_grad
    attached = (log_probs - rollout_leaf).exp()  # 故意带梯度
    for loss in (
        weighted_policy_gradient_loss(log_probs.detach(), attached, rewards[:, None]),
        decoupled_ppo_loss(log_probs.detach(), log_probs, attached, rewards[:, None]),
    ):
        assert not loss.requires_grad


# ---------------------------------------------------------------- 边界


def test_masked_positions_may_hold_anything():
    log_probs = torch.tensor([[-1.0, float("nan"), -2.0]], dtype=torch.float64)
    rollout = torch.tensor([[-1.5, float("-inf"), -1.0]], dtype=torch.float64)
    mask = torch.tensor([[True, False, True]])
    for level, expected in [
        ("token", [math.exp(0.5), 0.0, math.exp(-1.0)]),
        ("prefix", [math.exp(0.5), 0.0, math.exp(-0.5)]),
        ("sequence", [math.exp(-0.5), 0.0, math.exp(-0.5)]),
    ]:
        actual = importance_weights(log_probs, rollout, mask, level=level)
        torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_nothing_is_clamped():
    """对数比之和 60（库里截到 20），float64 里仍是 e^60。"""
    log_probs, rollout = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), -30.0).double()
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = importance_weights(log_probs, rollout, mask, level="sequence")
    torch.testing.assert_close(weights[0, 0].item(), math.exp(60))


def test_bad_arguments_are_refused():
    weights = torch.ones(1, 2)
    with pytest.raises(ValueError, match="geometric.*prefix"):
        importance_weights(weights, weights, weights.bool(), level="geometric")
    with pytest.raises(ValueError, match="cap=0.99"):
        truncate_weights(weights, cap=0.99)
    for low, high in [(2.0, 1.0), (1.0, 1.0)]:
        with pytest.raises(ValueError, match="不大于"):
            mask_weights(weights, low=low, high=high)


# ---------------------------------------------------------------- 必须被拒绝的错误写法


@pytest.mark.rejects
@pytest.mark.parametrize("seed", range(3))
def test_rejects_the_token_ratio_is_unbiased(seed):
    logits, rollout, rewards = example(seed)
    truth = true_gradient(logits, rewards)
    assert relative(weighted_ascent("token", logits, rollout, rewards[:, None]), truth) > 0.2
    assert relative(weighted_ascent("sequence", logits, rollout, rewards[:, None]), truth) < 1e-12


@pytest.mark.rejects
@pytest.mark.parametrize("seed", range(3))
def test_rejects_the_inverted_ratio(seed):
    logits, rollout, rewards = example(seed)
    inverted = importance_weights(log_probs_of(rollout), log_probs_of(logits), MASK, level="sequence")
    wrong = expected_ascent(lambda lp: -inverted * rewards[:, None] * lp, logits, rollout)
    assert relative(wrong, true_gradient(logits, rewards)) > 0.5


@pytest.mark.rejects
def test_rejects_the_geometric_mean_as_an_unbiased_weight():
    logits, rollout, rewards = example(0)
    log_ratio = log_probs_of(logits) - log_probs_of(rollout)
    weights = log_ratio.mean(1, keepdim=True).exp().expand_as(log_ratio)
    wrong = expected_ascent(lambda lp: -weights * rewards[:, None] * lp, logits, rollout)
    assert relative(wrong, true_gradient(logits, rewards)) > 0.2


@pytest.mark.rejects
def test_rejects_weights_left_in_the_graph():
    """-w·Â·log π 不切断 w，多出一项；要么切断，要么写成 -w·Â（不乘 log π），后者的梯度是对的。"""
    logits, rollout, rewards = example(0)
    truth = true_gradient(logits, rewards)
    rollout_logps = log_probs_of(rollout).sum(1, keepdim=True)

    def product(lp):
        return (lp.sum(1, keepdim=True) - rollout_logps).exp()

    wrong = expected_ascent(lambda lp: -product(lp) * rewards[:, None] * lp, logits, rollout)
    assert relative(wrong, truth) > 0.5
    surrogate = expected_ascent(lambda lp: -product(lp) * rewards[:, None], logits, rollout)
    torch.testing.assert_close(surrogate, truth)


@pytest.mark.rejects
def test_rejects_a_ratio_detached_inside_the_surrogate():
    """把 ρ 从图里切断又不乘 log π：梯度恒为 0。"""
    logits, rollout, rewards = example(0)
    with pytest.raises(RuntimeError, match="does not require grad"):
        expected_ascent(
            lambda lp: -(lp - log_probs_of(rollout)).exp().detach() * rewards[:, None], logits, rollout
        )


@pytest.mark.rejects
def test_rejects_a_proximal_policy_that_moves_with_the_gradient():
    """π_prox 取自当前前向却没有切断：u 恒为 1 且没有梯度，什么也不学。"""
    logits, rollout, rewards = example(0)
    weights = importance_weights(log_probs_of(logits), log_probs_of(rollout), MASK, level="token")
    wrong = expected_ascent(lambda lp: -weights * (lp - lp).exp() * rewards[:, None], logits, rollout)
    assert wrong.abs().max() < 1e-12
    right = expected_ascent(lambda lp: decoupled_ppo_loss(lp, lp, weights, rewards[:, None]), logits, rollout)
    assert right.abs().max() > 0.05


@pytest.mark.rejects
def test_rejects_recomputing_the_old_policy_as_a_correction():
    """把 π_old 重算成当前策略、不加权：ρ = 1，等于没有修正。"""
    logits, rollout, rewards = example(0)
    recomputed = expected_ascent(
        lambda lp: clipped_surrogate_loss(lp, lp.detach(), rewards[:, None]), logits, rollout
    )
    uncorrected = expected_ascent(lambda lp: -rewards[:, None] * lp, logits, rollout)
    torch.testing.assert_close(recomputed, uncorrected)
    assert relative(recomputed, true_gradient(logits, rewards)) > 0.3
