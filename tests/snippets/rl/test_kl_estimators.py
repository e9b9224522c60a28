r"""KL 的三个估计：值、方差、梯度。

真值来自与公式无关的地方：`torch.distributions.kl_divergence`（整个词表求和的精确 KL，两个方向都用）、它的自动微分梯度、
Schulman 博文印出的两张表、TRL 1.16.0 的 `GRPOTrainer._compute_loss`（真调用），
以及 verl 0.9.1 与 OpenRLHF 0.11.2 的冻结数值（`tests/golden/make_kl_estimators.py` 生成）。

方向全文件一致：样本来自当前策略 π，r = π_ref/π。期望一律对词表精确求和，没有采样误差。
"""

import json
import math
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributions import Categorical, Normal, kl_divergence
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from snippets.rl.kl_estimators import (
    kl_categorical,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_importance_weighted,
    kl_k3_straight_through,
    kl_reward_surrogate,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "kl_estimators.json").read_text())


def random_logits(seed=0, vocab_size=8, dtype=torch.float64):
    """(策略, 参考, 旧策略) 三组 logits，两两不同。"""
    generator = torch.Generator().manual_seed(seed)
    ref, step, noise = torch.randn(3, vocab_size, generator=generator, dtype=dtype)
    return ref + step, ref, ref + 0.5 * step + 0.3 * noise


def forget_pair():
    """参考策略给 0.2 的 token，当前策略只剩 0.01：KL 不大，χ² 很大。"""
    policy = torch.full((8,), 0.99 / 7, dtype=torch.float64)
    ref = torch.full((8,), 0.8 / 7, dtype=torch.float64)
    policy[0], ref[0] = 0.01, 0.2
    return policy.log(), ref.log()


def exact_kl(logits, ref_logits):
    """KL(logits‖ref_logits)，PyTorch 的实现。"""
    return kl_divergence(Categorical(logits=logits), Categorical(logits=ref_logits))


def moments(estimator, logits, ref_logits):
    log_probs, ref_log_probs = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    values = estimator(log_probs, ref_log_probs)
    mean = (log_probs.exp() * values).sum()
    return mean, (log_probs.exp() * (values - mean).square()).sum().sqrt()


def exact_gradients(logits, ref_logits):
    """两个方向的 KL 对当前策略 logits 的梯度，真值由自动微分给出。"""
    theta = logits.clone().requires_grad_(True)
    (reverse,) = torch.autograd.grad(exact_kl(theta, ref_logits), theta)
    (forward,) = torch.autograd.grad(exact_kl(ref_logits, theta), theta)
    return reverse, forward


def expected_gradient(loss, logits, sampler_logits=None):
    """训练时真正发生的事：采样分布不求导，逐样本求导后取期望。"""
    theta = logits.clone().requires_grad_(True)
    log_probs = theta.log_softmax(-1)
    sampler = log_probs if sampler_logits is None else sampler_logits.log_softmax(-1)
    (grad,) = torch.autograd.grad((sampler.exp().detach() * loss(log_probs)).sum(), theta)
    return grad


# ---------------------------------------------------------------- 手算


def test_three_tokens_by_hand():
    """π = (1/2, 1/4, 1/4)，π_ref = (1/4, 1/4, 1/2)，记 L = ln 2。

    三个 token 的 r = 1/2, 1, 2，log r = -L, 0, L。
    k1 = L, 0, -L；k2 = L²/2, 0, L²/2；k3 = L - 1/2, 0, 1 - L。
    期望：k1 为 L/2 - L/4 = L/4；k3 为 (L - 1/2)/2 + (1 - L)/4 = L/4；k2 为 3L²/8。精确 KL = L/2 - L/4 = L/4。
    """
    ln2 = math.log(2.0)
    policy = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    ref = torch.tensor([0.25, 0.25, 0.5], dtype=torch.float64)
    expected = {
        kl_k1: [ln2, 0.0, -ln2],
        kl_k2: [ln2**2 / 2, 0.0, ln2**2 / 2],
        kl_k3: [ln2 - 0.5, 0.0, 1 - ln2],
    }
    means = {kl_k1: ln2 / 4, kl_k2: 3 * ln2**2 / 8, kl_k3: ln2 / 4}
    for estimator, values in expected.items():
        actual = estimator(policy.log(), ref.log())
        torch.testing.assert_close(actual, torch.tensor(values, dtype=torch.float64))
        torch.testing.assert_close((policy * actual).sum().item(), means[estimator])
    torch.testing.assert_close(kl_categorical(policy.log(), ref.log()).item(), ln2 / 4)


def test_gradient_coefficients_by_hand():
    """对 log π 求导：k1 得 1，k2 得 -log r，k3 得 1 - r；ρ·k3 得 k3 + (1 - r) = -log r（ρ 的值为 1，导数也为 1）。

    取 r = 2：1，-ln 2，-1，-ln 2；直通写法也是 -ln 2。k1 放进奖励得 k1 = -ln 2。
    """
    ln2 = math.log(2.0)
    ref = torch.tensor([ln2 - 1.0], dtype=torch.float64)
    cases = [
        (lambda lp: kl_k1(lp, ref), 1.0),
        (lambda lp: kl_k2(lp, ref), -ln2),
        (lambda lp: kl_k3(lp, ref), -1.0),
        (lambda lp: kl_k3_importance_weighted(lp, lp, ref), -ln2),
        (lambda lp: kl_k3_straight_through(lp, ref), -ln2),
        (lambda lp: kl_reward_surrogate(kl_k1(lp, ref), lp), -ln2),
    ]
    for loss, coefficient in cases:
        log_probs = torch.tensor([-1.0], dtype=torch.float64, requires_grad=True)
        (grad,) = torch.autograd.grad(loss(log_probs).sum(), log_probs)
        torch.testing.assert_close(grad.item(), coefficient)


# ---------------------------------------------------------------- 对照独立实现


def test_kl_categorical_matches_torch_distributions_forward_and_gradient():
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64, requires_grad=True)
    ref_logits = torch.randn(2, 5, 8, generator=generator, dtype=torch.float64)
    ours, theirs = kl_categorical(logits, ref_logits), exact_kl(logits, ref_logits)
    assert ours.shape == (2, 5)
    torch.testing.assert_close(ours, theirs)
    for actual, expected in zip(
        torch.autograd.grad(ours.sum(), logits), torch.autograd.grad(theirs.sum(), logits), strict=True
    ):
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("seed", range(4))
def test_k1_and_k3_are_unbiased_for_reverse_kl(seed):
    logits, ref_logits, _ = random_logits(seed)
    truth = exact_kl(logits, ref_logits)
    assert abs(truth - exact_kl(ref_logits, logits)) > 1e-3  # 两个方向可区分
    for estimator in (kl_k1, kl_k3):
        torch.testing.assert_close(moments(estimator, logits, ref_logits)[0], truth)


@pytest.mark.parametrize(
    ("kl", "published"),
    [(0.005, [(0, 20), (0.002, 1.42), (0, 1.42)]), (0.5, [(0, 2), (0.25, 1.73), (0, 1.7)])],
)
def test_bias_and_sd_reproduce_the_tables_of_the_2020_post(kl, published):
    """样本来自 N(0,1)，另一边 N(μ,1)，KL = μ²/2；博文给出（偏差/真值，标准差/真值）。"""
    x = torch.linspace(-14, 14, 28001, dtype=torch.float64)
    log_probs, ref_log_probs = Normal(0.0, 1.0).log_prob(x), Normal(math.sqrt(2 * kl), 1.0).log_prob(x)
    weights = log_probs.exp() * (x[1] - x[0])
    for estimator, (bias, sd) in zip((kl_k1, kl_k2, kl_k3), published, strict=True):
        values = estimator(log_probs, ref_log_probs)
        mean = (weights * values).sum()
        # 博文只印到两三位，容差取它的末位
        assert abs((mean - kl).item() / kl - bias) < 1e-3
        assert abs((weights * (values - mean).square()).sum().sqrt().item() / kl - sd) < 6e-3


REVERSE_USES = {
    "k1 进奖励": lambda lp, old, ref: kl_reward_surrogate(kl_k1(lp, ref), lp),
    "k2 损失": lambda lp, old, ref: kl_k2(lp, ref),
    "ρ·k3 损失": lambda lp, old, ref: kl_k3_importance_weighted(lp, lp, ref),
    "直通": lambda lp, old, ref: kl_k3_straight_through(lp, ref),
}


@pytest.mark.parametrize("use", REVERSE_USES)
@pytest.mark.parametrize("seed", range(3))
def test_four_uses_give_the_reverse_kl_gradient(use, seed):
    logits, ref_logits, old_logits = random_logits(seed)
    reverse, _ = exact_gradients(logits, ref_logits)
    ref, old = ref_logits.log_softmax(-1), old_logits.log_softmax(-1)
    grad = expected_gradient(lambda lp: REVERSE_USES[use](lp, old, ref), logits)
    torch.testing.assert_close(grad, reverse, rtol=0, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_k3_as_loss_gives_the_forward_kl_gradient(seed):
    logits, ref_logits, _ = random_logits(seed)
    reverse, forward = exact_gradients(logits, ref_logits)
    ref = ref_logits.log_softmax(-1)
    grad = expected_gradient(lambda lp: kl_k3(lp, ref), logits)
    torch.testing.assert_close(grad, forward, rtol=0, atol=1e-12)
    in_reward = expected_gradient(lambda lp: kl_reward_surrogate(kl_k3(lp, ref), lp), logits)
    torch.testing.assert_close(in_reward, reverse - forward, rtol=0, atol=1e-12)


def test_importance_weighted_k3_is_right_for_samples_of_the_old_policy():
    logits, ref_logits, old_logits = random_logits()
    ref, old = ref_logits.log_softmax(-1), old_logits.log_softmax(-1)
    reverse, _ = exact_gradients(logits, ref_logits)
    grad = expected_gradient(lambda lp: kl_k3_importance_weighted(lp, old, ref), logits, old_logits)
    torch.testing.assert_close(grad, reverse, rtol=0, atol=1e-12)
    value = (old.exp() * kl_k3_importance_weighted(logits.log_softmax(-1), old, ref)).sum()
    torch.testing.assert_close(value, exact_kl(logits, ref_logits))


def test_detached_ratio_times_k2_is_right_for_samples_of_the_old_policy():
    logits, ref_logits, old_logits = random_logits()
    ref, old = ref_logits.log_softmax(-1), old_logits.log_softmax(-1)
    reverse, _ = exact_gradients(logits, ref_logits)
    grad = expected_gradient(lambda lp: (lp - old).exp().detach() * kl_k2(lp, ref), logits, old_logits)
    torch.testing.assert_close(grad, reverse, rtol=0, atol=1e-12)


def run_trl_grpo_loss(per_token_logps, old_log_probs, ref_log_probs, mask, *, bias_correction):
    """真调用 TRL 的 `_compute_loss`：优势全为 0，损失里只剩 β·KL。"""
    batch, length = per_token_logps.shape
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *args, **kwargs: (
            per_token_logps,
            torch.zeros_like(per_token_logps),
            None,
        ),
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(use_bias_correction_kl=bias_correction, delta=None),
        accelerator=SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction="sum": x, sync_gradients=True
        ),
        _metrics=defaultdict(lambda: defaultdict(list)),
        beta=1.0,
        loss_type="bnpo",  # 全 batch 的 token 平均
        importance_sampling_level="token",
        epsilon_low=0.2,
        epsilon_high=0.2,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        aux_loss_enabled=False,
        use_vllm=False,
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
    )
    inputs = {
        "prompt_ids": torch.ones(batch, 1, dtype=torch.long),
        "prompt_mask": torch.ones(batch, 1, dtype=torch.long),
        "completion_ids": torch.ones(batch, length, dtype=torch.long),
        "completion_mask": mask,
        "advantages": torch.zeros(batch, dtype=per_token_logps.dtype),
        "old_per_token_logps": old_log_probs,
        "ref_per_token_logps": ref_log_probs,
    }
    return GRPOTrainer._compute_loss(trainer, None, inputs)


@pytest.mark.parametrize("bias_correction", [False, True])
def test_kl_term_of_trl_grpo_forward_and_gradient(bias_correction):
    generator = torch.Generator().manual_seed(5)
    log_probs, old, ref = (-3 * torch.rand(3, 2, 5, generator=generator, dtype=torch.float64)).unbind(0)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ours_in, theirs_in = log_probs.clone().requires_grad_(True), log_probs.clone().requires_grad_(True)
    theirs = run_trl_grpo_loss(theirs_in, old, ref, mask, bias_correction=bias_correction)
    kl = kl_k3_importance_weighted(ours_in, old, ref) if bias_correction else kl_k3(ours_in, ref)
    ours = (kl * mask).sum() / mask.sum()
    torch.testing.assert_close(ours, theirs)
    (ours_grad,) = torch.autograd.grad(ours, ours_in)
    (theirs_grad,) = torch.autograd.grad(theirs, theirs_in)
    torch.testing.assert_close(ours_grad, theirs_grad)


def test_trl_defaults_are_ratio_weighted_kl_with_weight_zero():
    fields = GRPOConfig.__dataclass_fields__
    assert fields["use_bias_correction_kl"].default is True
    assert fields["beta"].default == 0.0


def golden_inputs():
    log_probs, old, ref = (
        torch.tensor(GOLDEN[name], dtype=torch.float64)
        for name in ("log_probs", "old_log_probs", "ref_log_probs")
    )
    return log_probs.requires_grad_(True), old, ref


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "low_var_kl", "k3+"])
def test_verl_values_and_gradients_with_its_clamps(kind):
    """verl 0.9.1：k3 先把 log r 截到 ±20，再把结果截到 [-10, 10]；截住的地方 k3 的梯度为 0，`k3+` 仍是 k2 的梯度。"""
    ours = {
        "k1": kl_k1,
        "k2": kl_k2,
        "k3": kl_k3,
        "low_var_kl": kl_k3,
        "k3+": kl_k3_straight_through,
    }[kind]
    log_probs, _, ref = golden_inputs()
    value = ours(log_probs, ref)
    (grad,) = torch.autograd.grad(value.sum(), log_probs)
    expected_value, expected_grad = value.detach(), grad
    if kind in ("k3", "low_var_kl", "k3+"):
        clamped = expected_value > 10
        assert clamped.sum() == 3  # 两边都有被截住的
        expected_value = expected_value.clamp(max=10)
        if kind != "k3+":
            expected_grad = grad.masked_fill(clamped, 0.0)
    golden = GOLDEN["verl"][kind]
    torch.testing.assert_close(torch.tensor(golden["value"], dtype=torch.float64), expected_value)
    torch.testing.assert_close(torch.tensor(golden["grad"], dtype=torch.float64), expected_grad)


@pytest.mark.parametrize(("kind", "ours"), [("k1", kl_k1), ("k2", kl_k2), ("k3", kl_k3)])
def test_openrlhf_values_and_gradients_with_its_clamp(kind, ours):
    """OpenRLHF 0.11.2：三个估计的结果都截到 [-10, 10]，截住的地方梯度为 0；内部转 float32。"""
    log_probs, _, ref = golden_inputs()
    value = ours(log_probs, ref)
    (grad,) = torch.autograd.grad(value.sum(), log_probs)
    golden = GOLDEN["openrlhf"][kind]
    as_float32 = {"rtol": 1.3e-6, "atol": 1e-5}  # 库里先转 float32
    torch.testing.assert_close(
        torch.tensor(golden["value"], dtype=torch.float64), value.detach().clamp(-10, 10), **as_float32
    )
    expected = grad.masked_fill(value.abs() > 10, 0.0)
    torch.testing.assert_close(torch.tensor(golden["grad"], dtype=torch.float64), expected, **as_float32)


def test_openrlhf_unbiased_gradient_is_detached_ratio_times_k1():
    log_probs, old, ref = golden_inputs()
    ratio = (log_probs - old).exp().detach()
    assert ratio.max() < 10  # 没有碰到它对重要性比值的截断
    (grad,) = torch.autograd.grad((ratio * kl_k3_straight_through(log_probs, ref)).sum(), log_probs)
    golden = torch.tensor(GOLDEN["openrlhf_unbiased"]["grad"], dtype=torch.float64)
    torch.testing.assert_close(golden, grad, rtol=1.3e-6, atol=1e-5)  # 库里先转 float32


# ---------------------------------------------------------------- 性质


def test_variance_of_k3_contains_the_chi_square():
    """Var k3 = Var k1 + χ²(π_ref‖π) - 2[KL(π‖π_ref) + KL(π_ref‖π)]。"""
    for logits, ref_logits in [random_logits(seed)[:2] for seed in range(4)] + [forget_pair()]:
        policy, ref = logits.softmax(-1), ref_logits.softmax(-1)
        chi_square = ((ref - policy).square() / policy).sum()
        jeffreys = exact_kl(logits, ref_logits) + exact_kl(ref_logits, logits)
        sd1, sd3 = (moments(estimator, logits, ref_logits)[1] for estimator in (kl_k1, kl_k3))
        torch.testing.assert_close(sd3.square(), sd1.square() + chi_square - 2 * jeffreys)


def test_k2_and_k3_are_non_negative_and_k1_is_not():
    logits, ref_logits, _ = random_logits()
    log_probs, ref = logits.log_softmax(-1), ref_logits.log_softmax(-1)
    assert (kl_k2(log_probs, ref) >= 0).all() and (kl_k3(log_probs, ref) >= 0).all()
    assert (kl_k1(log_probs, ref) < 0).any()


def test_straight_through_has_the_value_of_k3_and_the_gradient_of_k2():
    log_probs, _, ref = golden_inputs()
    value = kl_k3_straight_through(log_probs, ref)
    assert torch.equal(value, kl_k3(log_probs, ref))
    (grad,) = torch.autograd.grad(value.sum(), log_probs)
    (expected,) = torch.autograd.grad(kl_k2(log_probs, ref).sum(), log_probs)
    torch.testing.assert_close(grad, expected)


def test_importance_weighted_gradient_does_not_reach_the_old_policy():
    log_probs, old, ref = golden_inputs()
    old.requires_grad_(True)
    kl_k3_importance_weighted(log_probs, old, ref).sum().backward()
    assert old.grad is None and log_probs.grad.abs().sum() > 0


def test_reward_surrogate_treats_the_kl_as_a_constant():
    log_probs, _, ref = golden_inputs()
    kl = kl_k1(log_probs, ref)
    (grad,) = torch.autograd.grad(kl_reward_surrogate(kl, log_probs).sum(), log_probs)
    torch.testing.assert_close(grad, kl.detach())


# ---------------------------------------------------------------- 边界


def test_identical_policies_give_exact_zeros():
    log_probs = torch.tensor([[-0.1, -2.0, -30.0]], requires_grad=True)
    for value in (
        kl_k1(log_probs, log_probs.detach()),
        kl_k2(log_probs, log_probs.detach()),
        kl_k3(log_probs, log_probs.detach()),
    ):
        assert torch.equal(value, torch.zeros_like(value))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    log_probs, ref = torch.tensor([-1.0, -2.0], dtype=dtype), torch.tensor([-1.5, -1.0], dtype=dtype)
    for value in (
        kl_k1(log_probs, ref),
        kl_k2(log_probs, ref),
        kl_k3(log_probs, ref),
        kl_k3_importance_weighted(log_probs, log_probs, ref),
        kl_k3_straight_through(log_probs, ref),
    ):
        assert value.dtype == dtype


def test_float32_keeps_three_digits_down_to_tiny_ratios():
    for log_r in (1e-2, 1e-3, 1e-4, 1e-5):
        ref = torch.tensor([log_r])
        truth = math.expm1(ref.item()) - ref.item()
        assert abs(kl_k3(torch.zeros(1), ref).item() / truth - 1) < 1e-3


def test_nothing_is_clamped():
    """log r = 25（r 约 7e10）、ρ = e^4：库里的截断在这里都会生效，参考实现不截断。

    k3 = e^25 - 26，导数 1 - e^25；ρ·k3 的导数是 ρ(-log r) = -25·e^4；k1 = -25，k2 = 312.5。
    """
    log_probs = torch.tensor([-30.0], dtype=torch.float64, requires_grad=True)
    old, ref = torch.tensor([[-34.0], [-5.0]], dtype=torch.float64)
    cases = [
        (kl_k1(log_probs, ref), -25.0, 1.0),
        (kl_k2(log_probs, ref), 312.5, -25.0),
        (kl_k3(log_probs, ref), math.exp(25) - 26, 1 - math.exp(25)),
        (kl_k3_straight_through(log_probs, ref), math.exp(25) - 26, -25.0),
    ]
    for value, expected, slope in cases:
        torch.testing.assert_close(value.item(), expected)
        torch.testing.assert_close(torch.autograd.grad(value.sum(), log_probs)[0].item(), slope)
    weighted = kl_k3_importance_weighted(log_probs, old, ref)
    torch.testing.assert_close(weighted.item(), math.exp(4) * (math.exp(25) - 26))
    # 两项 e^29 量级的数相消，双精度只剩约 1e-3
    (grad,) = torch.autograd.grad(weighted.sum(), log_probs)
    torch.testing.assert_close(grad.item(), -25 * math.exp(4), rtol=0, atol=0.1)


def test_very_improbable_tokens_stay_finite():
    """两边概率都小于 float32 能表示的最小值，比值却是普通的数。"""
    value = kl_k3(torch.tensor([-110.0]), torch.tensor([-109.0]))
    torch.testing.assert_close(value.item(), math.e - 2, rtol=1e-6, atol=0)


# ---------------------------------------------------------------- 必须被拒绝的错误写法


@pytest.mark.rejects
def test_rejects_the_reversed_ratio():
    """样本来自 π 却取 r = π/π_ref：所谓 k1 的期望是 -KL，所谓 k3 两个方向的 KL 都不是。"""
    policy = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()
    ref = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64).log()
    truth = exact_kl(policy, ref).item()
    reversed_k1, _ = moments(lambda lp, rf: -(lp - rf), policy, ref)
    reversed_k3, _ = moments(lambda lp, rf: (lp - rf).exp() - 1 - (lp - rf), policy, ref)
    torch.testing.assert_close(reversed_k1.item(), -truth)
    assert abs(reversed_k3.item() - truth) > 0.07
    torch.testing.assert_close(moments(kl_k3, policy, ref)[0].item(), truth)


@pytest.mark.rejects
def test_rejects_k3_with_plus_log_r():
    """r - 1 + log r：期望是 -KL。"""
    logits, ref_logits, _ = random_logits()
    wrong, _ = moments(lambda lp, ref: (ref - lp).exp() - 1 + (ref - lp), logits, ref_logits)
    torch.testing.assert_close(wrong, -exact_kl(logits, ref_logits))
    assert wrong < -0.05


@pytest.mark.rejects
def test_rejects_k2_without_the_half():
    logits, ref_logits, _ = random_logits()
    reverse, _ = exact_gradients(logits, ref_logits)
    ref = ref_logits.log_softmax(-1)
    wrong = expected_gradient(lambda lp: (lp - ref).square(), logits)
    torch.testing.assert_close(wrong, 2 * reverse)
    assert (wrong - reverse).abs().max() > 0.05


@pytest.mark.rejects
def test_rejects_k2_is_unbiased():
    """高斯、KL 为 0.5 时偏差是 +0.125（真值的 25%）；「遗忘」对是 -0.114：偏差的符号也不固定。"""
    x = torch.linspace(-14, 14, 28001, dtype=torch.float64)
    log_probs, ref = Normal(0.0, 1.0).log_prob(x), Normal(1.0, 1.0).log_prob(x)
    mean = (log_probs.exp() * (x[1] - x[0]) * kl_k2(log_probs, ref)).sum().item()
    torch.testing.assert_close(mean - 0.5, 0.125)
    forget = moments(kl_k2, *forget_pair())[0] - exact_kl(*forget_pair())
    assert forget < -0.1


@pytest.mark.rejects
def test_rejects_k3_always_has_the_lower_variance():
    """走近时 k3 的标准差不到 k1 的五分之一，「遗忘」对上是 k1 的四倍以上。"""
    _, ref, _ = random_logits()
    near, far = (ref + 0.1 * random_logits(1)[0], ref), forget_pair()
    assert moments(kl_k3, *near)[1] < 0.2 * moments(kl_k1, *near)[1]
    assert moments(kl_k3, *far)[1] > 4 * moments(kl_k1, *far)[1]


@pytest.mark.rejects
def test_rejects_the_gradient_of_k3_is_the_reverse_kl_gradient():
    logits, ref_logits, _ = random_logits()
    reverse, forward = exact_gradients(logits, ref_logits)
    grad = expected_gradient(lambda lp: kl_k3(lp, ref_logits.log_softmax(-1)), logits)
    assert (grad - reverse).abs().max() > 0.03
    assert (grad - forward).abs().max() < 1e-12


@pytest.mark.rejects
def test_rejects_k1_as_a_loss_regularises():
    logits, ref_logits, _ = random_logits()
    grad = expected_gradient(lambda lp: kl_k1(lp, ref_logits.log_softmax(-1)), logits)
    assert grad.abs().max() < 1e-12
    assert exact_gradients(logits, ref_logits)[0].abs().max() > 0.1


@pytest.mark.rejects
def test_rejects_a_detached_ratio_in_front_of_k3():
    """比值不进计算图，同策略时等于没乘：梯度又是前向 KL 的。"""
    logits, ref_logits, _ = random_logits()
    reverse, forward = exact_gradients(logits, ref_logits)
    ref = ref_logits.log_softmax(-1)
    grad = expected_gradient(lambda lp: (lp - lp).exp().detach() * kl_k3(lp, ref), logits)
    assert (grad - forward).abs().max() < 1e-12 and (grad - reverse).abs().max() > 0.03


@pytest.mark.rejects
def test_rejects_a_differentiable_ratio_in_front_of_k2():
    """ρ·k2 的期望梯度是 E[k2] 自己的梯度，不是 KL 的。"""
    logits, ref_logits, _ = random_logits()
    reverse, _ = exact_gradients(logits, ref_logits)
    ref = ref_logits.log_softmax(-1)
    wrong = expected_gradient(lambda lp: (lp - lp.detach()).exp() * kl_k2(lp, ref), logits)
    theta = logits.clone().requires_grad_(True)
    (expected,) = torch.autograd.grad((theta.softmax(-1) * kl_k2(theta.log_softmax(-1), ref)).sum(), theta)
    torch.testing.assert_close(wrong, expected)
    assert (wrong - reverse).abs().max() > 0.04


@pytest.mark.rejects
def test_rejects_uncorrected_losses_on_samples_of_the_old_policy():
    logits, ref_logits, old_logits = random_logits()
    reverse, forward = exact_gradients(logits, ref_logits)
    ref = ref_logits.log_softmax(-1)
    for loss in (kl_k2, kl_k3_straight_through, kl_k3):
        grad = expected_gradient(lambda lp, loss=loss: loss(lp, ref), logits, old_logits)
        assert min((grad - truth).abs().max() for truth in (reverse, forward)) > 0.02


@pytest.mark.rejects
def test_rejects_exponentiating_before_dividing():
    quotient = torch.tensor([-109.0]).exp() / torch.tensor([-110.0]).exp()
    assert quotient.isnan().all()  # 0/0；kl_k3 在同一点是 e - 2，见上


@pytest.mark.rejects
def test_rejects_exp_minus_one_in_float32():
    ref = torch.tensor([1e-5])
    naive = (ref.exp() - 1 - ref).item()
    truth = math.expm1(ref.item()) - ref.item()
    assert naive / truth > 100
    assert abs(kl_k3(torch.zeros(1), ref).item() / truth - 1) < 1e-3
