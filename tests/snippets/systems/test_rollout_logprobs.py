r"""训推不一致的修正：权重、门、指标，以及乘进损失之后的期望梯度。

真值来自与被测公式无关的地方：手算；把一个小问题的全部序列列出来，直接对 $\pi_{\text{old}}$ 下的期望求自动微分与
中心差分（不用任何比值）；TRL 1.16 的 `GRPOTrainer._compute_loss`（真调用）；verl 0.9.1 与 OpenRLHF 0.11.2 的冻结数值
（`tests/golden/make_rollout_logprobs.py` 生成）。期望都是精确求和。
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
from snippets.rl.on_off_policy import decoupled_ppo_loss
from snippets.systems.rollout_logprobs import (
    masked_importance_weights,
    mismatch_metrics,
    truncated_importance_weights,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "rollout_logprobs.json").read_text())

# 词表 3、长度 3：27 条序列，13 个前缀各一行 logits
SEQUENCES = torch.tensor(list(itertools.product(range(3), repeat=3)))
PREFIXES = torch.stack(
    [torch.zeros(27, dtype=torch.long), 1 + SEQUENCES[:, 0], 4 + 3 * SEQUENCES[:, 0] + SEQUENCES[:, 1]], 1
)
MASK = torch.ones(27, 3, dtype=torch.bool)
NO_CLIP = {"clip_low": 1e6, "clip_high": 1e6}


def golden(name):
    return torch.tensor(GOLDEN[name], dtype=torch.float64)


def example(seed=0):
    """（当前、旧、引擎的 logits，优势）：三者各不相同。"""
    generator = torch.Generator().manual_seed(seed)
    old, engine, step = torch.randn(3, 13, 3, generator=generator, dtype=torch.float64)
    advantages = torch.randn(27, 1, generator=generator, dtype=torch.float64)
    return old + 0.3 * step, old, old + 0.5 * engine, advantages


def log_probs_of(logits):
    return logits.log_softmax(-1)[PREFIXES, SEQUENCES]


def expected_gradient(loss, logits, sampler):
    leaf = logits.clone().requires_grad_(True)
    probs = sampler.softmax(-1)[PREFIXES, SEQUENCES].prod(1)
    value = (probs[:, None] * loss(log_probs_of(leaf))).sum()
    return torch.autograd.grad(value, leaf)[0]


def surrogate_under_old(logits, old, advantages):
    """样本真来自 π_old 时的目标 Σ_y π_old(y)·A(y)·Σ_t π_θ/π_old，全部按概率写，没有 log 也没有损失函数。"""
    old_probs = old.softmax(-1)[PREFIXES, SEQUENCES]
    ratio = logits.softmax(-1)[PREFIXES, SEQUENCES] / old_probs
    return -(old_probs.prod(1, keepdim=True) * advantages * ratio).sum()


def relative(actual, truth):
    return ((actual - truth).norm() / truth.norm()).item()


# ---------------------------------------------------------------- 手算


def by_hand():
    """比值 (2, 0.6, 3)、(4, 跳过, 0.1)：连乘 3.6、0.4；几何平均 3.6^(1/3)=1.53、0.4^(1/2)=0.632。"""
    ratios = torch.tensor([[2.0, 0.6, 3.0], [4.0, 9.0, 0.1]], dtype=torch.float64)
    rollout = torch.full_like(ratios, -1.25)
    mask = torch.tensor([[True, True, True], [True, False, True]])
    return rollout + ratios.log(), rollout, mask


def test_truncated_weights_by_hand():
    for settings, expected in [
        ({}, [[2.0, 0.6, 2.0], [2.0, 0.0, 0.1]]),
        ({"cap": 2.5}, [[2.0, 0.6, 2.5], [2.5, 0.0, 0.1]]),
        ({"level": "sequence"}, [[2.0] * 3, [0.4, 0.0, 0.4]]),  # 先乘再截断：3.6 → 2
        ({"level": "sequence", "cap": 5.0}, [[3.6] * 3, [0.4, 0.0, 0.4]]),
    ]:
        actual = truncated_importance_weights(*by_hand(), **settings)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64))


def test_masked_weights_by_hand():
    for settings, expected in [
        ({}, [[2.0, 0.6, 3.0], [4.0, 0.0, 0.0]]),  # 默认 [0.5, 5]
        ({"high": 2.5, "low": 0.7}, [[2.0, 0.0, 0.0], [0.0, 0.0, 0.0]]),
        ({"level": "sequence", "high": 2.5, "low": 0.3}, [[0.0] * 3, [0.4, 0.0, 0.4]]),
        ({"level": "sequence", "high": 4.0}, [[3.6] * 3, [0.0] * 3]),
        # 几何平均作门，留下的是逐 token 的比值：0.1 也留着
        ({"level": "geometric", "high": 1.4}, [[0.0] * 3, [4.0, 0.0, 0.1]]),
        ({"level": "geometric", "high": 1.6, "low": 0.64}, [[2.0, 0.6, 3.0], [0.0] * 3]),
        ({"level": "geometric", "high": 1.6, "low": 0.63}, [[2.0, 0.6, 3.0], [4.0, 0.0, 0.1]]),
    ]:
        actual = masked_importance_weights(*by_hand(), **settings)
        torch.testing.assert_close(actual, torch.tensor(expected, dtype=torch.float64), msg=str(settings))


def test_default_mask_keeps_ratios_from_a_half_to_five():
    ratios = torch.tensor([[0.49, 0.51, 4.9, 5.1]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = masked_importance_weights(ratios.log(), torch.zeros_like(ratios), mask)
    torch.testing.assert_close(weights, torch.tensor([[0.0, 0.51, 4.9, 0.0]], dtype=torch.float64))


def test_metrics_by_hand():
    """对数比 log 2、log 0.6、log 3、log 4、log 0.1；连乘 3.6 与 0.4，ESS = 4²/(3.6² + 0.4²)，再除以 2 条。"""
    metrics = mismatch_metrics(*by_hand())
    logs = [math.log(x) for x in (2, 0.6, 3, 4, 0.1)]
    expected = {
        "mean_abs": sum(map(abs, logs)) / 5,
        "max_abs": math.log(10),
        "kl": -sum(logs) / 5,
        "kl_k3": sum(x - 1 - math.log(x) for x in (2, 0.6, 3, 4, 0.1)) / 5,
        "seq_ratio_min": 0.4,
        "seq_ratio_max": 3.6,
        "ess": 16 / 13.12 / 2,
    }
    torch.testing.assert_close(metrics, expected)


# ---------------------------------------------------------------- 独立的真值


@pytest.mark.parametrize("seed", range(3))
def test_untruncated_sequence_weights_restore_sampling_from_the_old_policy(seed):
    """上限不起作用时，期望梯度与样本真来自 π_old 完全一样，π_θ 走到哪里都成立；也对中心差分。"""
    logits, old, engine, advantages = example(seed)
    pair = (log_probs_of(old), log_probs_of(engine), MASK)
    leaf = logits.clone().requires_grad_(True)
    (truth,) = torch.autograd.grad(surrogate_under_old(leaf, old, advantages), leaf)
    for weights in (
        truncated_importance_weights(*pair, level="sequence", cap=1e9),
        masked_importance_weights(*pair, level="sequence", low=0.0, high=1e9),
    ):
        actual = expected_gradient(
            lambda lp, w=weights: decoupled_ppo_loss(lp, pair[0], w, advantages, **NO_CLIP), logits, engine
        )
        torch.testing.assert_close(actual, truth)
    for index in [(0, 0), (2, 1), (9, 2)]:
        bump = torch.zeros_like(logits)
        bump[index] = 1e-6
        slope = surrogate_under_old(logits + bump, old, advantages) - surrogate_under_old(
            logits - bump, old, advantages
        )
        torch.testing.assert_close(actual[index], slope / 2e-6, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_missing_mass_bounds_the_bias(seed):
    """截断与（只设上界的）掩码只减不增：偏差不超过 (1 − E[w̃])·max|f|，E_μ[w] = 1。"""
    logits, old, engine, advantages = example(seed)
    pair = (log_probs_of(old), log_probs_of(engine), MASK)
    probs = log_probs_of(engine).sum(1).exp()
    scores = torch.zeros(27, 3, 13, 3, dtype=torch.float64)
    index, time = torch.arange(27)[:, None], torch.arange(3)
    scores[index, time, PREFIXES, SEQUENCES] = 1.0
    scores[index, time, PREFIXES] -= old.softmax(-1)[PREFIXES]
    f = advantages * scores.sum(1).flatten(1)
    exact = truncated_importance_weights(*pair, level="sequence", cap=1e9)[:, 0]
    torch.testing.assert_close((probs @ exact).item(), 1.0)
    for weights in (
        truncated_importance_weights(*pair, level="sequence", cap=1.5)[:, 0],
        masked_importance_weights(*pair, level="sequence", low=0.0, high=1.5)[:, 0],
    ):
        lost = 1 - (probs @ weights).item()
        bias = ((probs * (exact - weights)) @ f).norm().item()
        assert 0.01 < lost and 1e-3 < bias <= lost * f.norm(dim=1).max().item()
        assert (probs @ weights.square()).item() <= 1.5**2


def test_metric_kl_is_the_kl_from_the_engine_to_the_trainer():
    """按 μ 的概率加权的样本上，kl 与 kl_k3 都等于逐前缀求和的 KL(μ‖π_old)（每 token），不是反方向。"""
    _, old, engine, _ = example(1)
    old_lp, engine_lp = log_probs_of(old), log_probs_of(engine)
    probs = engine_lp.sum(1).exp()
    sums = torch.zeros(2, dtype=torch.float64)
    for row in range(27):
        metrics = mismatch_metrics(old_lp[row : row + 1], engine_lp[row : row + 1], MASK[:1])
        sums += probs[row] * torch.tensor([metrics["kl"], metrics["kl_k3"]], dtype=torch.float64)

    def per_token(p, q):
        rows = (p.softmax(-1) * (p.log_softmax(-1) - q.log_softmax(-1))).sum(-1)
        return sum((engine_lp.sum(1).exp() * rows[PREFIXES[:, t]]).sum() for t in range(3)) / 3

    torch.testing.assert_close(sums, per_token(engine, old).expand(2))
    assert (sums[0] - per_token(old, engine)).abs() > 1e-3


@pytest.mark.parametrize("variance", [0.1, 0.5])
def test_effective_sample_size_follows_the_exponential_law(variance):
    """各 token 独立 N(−σ²/2, σ²) 时 ESS/N → e^{−Tσ²}：4 万条样本，容差 0.03。"""
    length = 20
    generator = torch.Generator().manual_seed(0)
    sigma = math.sqrt(variance / length)
    noise = torch.randn(40_000, length, generator=generator, dtype=torch.float64)
    log_ratio = -(sigma**2) / 2 + sigma * noise
    metrics = mismatch_metrics(
        log_ratio, torch.zeros_like(log_ratio), torch.ones_like(noise, dtype=torch.bool)
    )
    assert abs(metrics["ess"] - math.exp(-variance)) < 0.03
    assert abs(metrics["kl"] - sigma**2 / 2) < 1e-3


# ---------------------------------------------------------------- 对照库


@pytest.mark.parametrize("name", list(GOLDEN["verl_weights"]))
def test_weights_match_verl(name):
    pair = (golden("old_log_probs"), golden("rollout_log_probs"), golden("mask").bool())
    level, mode = name.split("/")
    bounds = {"token": {"low": 0.42, "high": 1.7}, "sequence": {"low": 0.3, "high": 2.0}}[level]
    if mode == "truncate":
        ours = truncated_importance_weights(*pair, level=level, cap=1.6)
    else:
        ours = masked_importance_weights(*pair, level=level, **bounds)
    theirs = torch.tensor(GOLDEN["verl_weights"][name], dtype=torch.float64)
    torch.testing.assert_close(ours, theirs)
    assert not torch.equal(theirs, theirs.clamp(0.5, 1.5))  # 确有权重起作用


@pytest.mark.parametrize(
    ("name", "level", "low", "high"),
    [
        ("token_k1", "token", 0.6, 2.0),
        ("seq_sum_k1", "sequence", 0.3, 1.0),
        ("seq_mean_k1", "geometric", 0.6, 1.1),
    ],
)
def test_verl_rejection_bounds_are_on_the_inverse_ratio(name, level, low, high):
    """verl 0.9.1 的 rollout_rs 用 k1 = log(μ/π_old)，阈值管的是 μ/π_old：换成我们的方向要取倒数、上下对调。"""
    pair = (golden("old_log_probs"), golden("rollout_log_probs"), golden("mask").bool())
    theirs = torch.tensor(GOLDEN["verl_keep"][name], dtype=torch.float64)
    ours = masked_importance_weights(*pair, level=level, low=1 / high, high=1 / low)
    torch.testing.assert_close((ours > 0).double(), theirs)
    same_numbers = masked_importance_weights(*pair, level=level, low=low, high=high)
    assert not torch.equal((same_numbers > 0).double(), theirs)


def test_metrics_match_verl():
    pair = (golden("old_log_probs"), golden("rollout_log_probs"), golden("mask").bool())
    metrics, theirs = mismatch_metrics(*pair), GOLDEN["verl_metrics"]
    torch.testing.assert_close(metrics["kl"], theirs["kl"], rtol=1e-6, atol=0)  # verl 的分母加了 1e-8
    torch.testing.assert_close(metrics["kl_k3"], theirs["k3_kl"], rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["tis", "icepop", "geo"])
def test_loss_matches_openrlhf_forward_and_gradient(name):
    pair = (golden("old_log_probs"), golden("rollout_log_probs"), golden("mask").bool())
    mask = pair[2]
    if name == "tis":  # OpenRLHF 的 clip 两侧都截：下侧也抬到 0.6
        weights = truncated_importance_weights(*pair, cap=1.5).clamp(min=0.6) * mask
    else:
        level = {"icepop": "token", "geo": "geometric"}[name]
        weights = masked_importance_weights(*pair, level=level, low=0.6, high=1.5)
    leaf = golden("log_probs").requires_grad_(True)
    loss = decoupled_ppo_loss(leaf, pair[0], weights, golden("advantages"))
    loss = (loss * mask).sum() / mask.sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    theirs = GOLDEN["openrlhf_loss"][name]
    torch.testing.assert_close(loss.item(), theirs["value"])
    torch.testing.assert_close(grad, torch.tensor(theirs["grad"], dtype=torch.float64))


def trl_case():
    generator = torch.Generator().manual_seed(11)
    old = -3 * torch.rand(4, 5, generator=generator, dtype=torch.float64)
    log_probs = old + 0.3 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    rollout = old + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    advantages = torch.tensor([1.0, -0.7, 0.4, -0.9], dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 1], [1, 1, 1, 1, 0]]).bool()
    return log_probs, old, rollout, advantages, mask


@pytest.mark.parametrize("mode", ["truncate", "mask"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_corrected_loss_matches_trl_with_and_without_kl(level, mode):
    """权重乘在裁剪之后、KL 之前（KL 不乘）：TRL 的损失与梯度都对上。"""
    log_probs, old, rollout, advantages, mask = trl_case()
    if mode == "truncate":
        weights = truncated_importance_weights(old, rollout, mask, level=level, cap=1.3)
    else:
        weights = masked_importance_weights(old, rollout, mask, level=level, low=0.0, high=1.3)
    assert (weights[mask] != 1).any() and ((weights[mask] == 1.3) | (weights[mask] == 0)).any()
    ref = old - 0.2
    for beta in (0.0, 0.4):
        leaf = log_probs.clone().requires_grad_(True)
        loss = decoupled_ppo_loss(leaf, old, weights, advantages[:, None])
        loss = loss + beta * ((ref - leaf).exp() - (ref - leaf) - 1)
        loss = (loss * mask).sum() / mask.sum()
        theirs = trl_grpo_loss(
            log_probs,
            old,
            advantages,
            mask,
            ref_log_probs=ref,
            beta=beta,
            loss_type="bnpo",
            importance_sampling_ratio=weights,
        )
        torch.testing.assert_close((loss.detach(), torch.autograd.grad(loss, leaf)[0]), theirs[:2])


def test_rejected_tokens_stay_in_the_trl_denominator():
    """整条被归零的回答仍算进 TRL 的分母；若把它们从掩码里去掉（verl 的 rollout_rs），损失更大。"""
    log_probs, old, rollout, advantages, mask = trl_case()
    weights = masked_importance_weights(old, rollout, mask, level="sequence", low=0.0, high=1.3)
    keep = mask & (weights > 0)
    assert keep.sum() < mask.sum()
    theirs = trl_grpo_loss(
        log_probs, old, advantages, mask, loss_type="bnpo", importance_sampling_ratio=weights
    )[0]
    token_losses = decoupled_ppo_loss(log_probs, old, weights, advantages[:, None])
    torch.testing.assert_close((token_losses * mask).sum() / mask.sum(), theirs)
    shrunk = (token_losses * keep).sum() / keep.sum()
    torch.testing.assert_close(shrunk * keep.sum() / mask.sum(), theirs)
    assert (shrunk - theirs).abs() > 0.01


def test_trl_defaults():
    fields = GRPOConfig.__dataclass_fields__
    expected = {"correction": True, "mode": "sequence_mask", "clip_max": 3.0, "clip_min": None}
    for name, value in expected.items():
        assert fields[f"vllm_importance_sampling_{name}"].default == value
    assert fields["cast_lm_head_to_fp32"].default is False
    assert fields["top_p"].default == 1.0 and fields["off_policy_mask_threshold"].default is None


# ---------------------------------------------------------------- 性质与边界


def test_equal_engines_change_nothing():
    _, old, _, _ = example(2)
    lp = log_probs_of(old)
    for weights in (
        truncated_importance_weights(lp, lp, MASK),
        truncated_importance_weights(lp, lp, MASK, level="sequence"),
        *(
            masked_importance_weights(lp, lp, MASK, level=level)
            for level in ("token", "sequence", "geometric")
        ),
    ):
        assert torch.equal(weights, torch.ones_like(lp))
    assert mismatch_metrics(lp, lp, MASK)["max_abs"] == 0


def test_weights_carry_no_gradient():
    old, rollout, mask = by_hand()
    old, rollout = old.requires_grad_(True), rollout.clone().requires_grad_(True)
    assert not truncated_importance_weights(old, rollout, mask).requires_grad
    for level in ("token", "sequence", "geometric"):
        assert not masked_importance_weights(old, rollout, mask, level=level).requires_grad


def test_masked_positions_may_hold_anything():
    old, rollout, mask = by_hand()
    bad_old, bad_rollout = old.clone(), rollout.clone()
    bad_old[1, 1], bad_rollout[1, 1] = float("nan"), float("-inf")
    for level in ("token", "sequence", "geometric"):
        torch.testing.assert_close(
            masked_importance_weights(bad_old, bad_rollout, mask, level=level, low=0.0),
            masked_importance_weights(old, rollout, mask, level=level, low=0.0),
        )
    torch.testing.assert_close(
        mismatch_metrics(bad_old, bad_rollout, mask), mismatch_metrics(old, rollout, mask)
    )


def test_an_empty_row_is_ignored():
    old, rollout, mask = by_hand()
    with_empty = [torch.cat([x, x[:1]]) for x in (old, rollout)] + [
        torch.cat([mask, torch.zeros_like(mask[:1])])
    ]
    for level in ("token", "sequence", "geometric"):
        weights = masked_importance_weights(*with_empty, level=level)
        assert torch.equal(weights[2], torch.zeros(3, dtype=torch.float64))
    torch.testing.assert_close(mismatch_metrics(*with_empty), mismatch_metrics(old, rollout, mask))


def test_a_single_token_is_its_own_geometric_mean():
    """比值 4 只有一个 token：几何平均就是 4，上界 3 时归零（除以 2 会得到 2 而留下）。"""
    old, rollout = torch.tensor([[math.log(4), 0.0]]).double(), torch.zeros(1, 2, dtype=torch.float64)
    mask = torch.tensor([[True, False]])
    assert not masked_importance_weights(old, rollout, mask, level="geometric", high=3.0).any()


def test_nothing_is_clamped():
    """对数比之和 60（verl 截到 20），float64 里仍是 e^60。"""
    old, rollout = torch.zeros(1, 2, dtype=torch.float64), torch.full((1, 2), -30.0).double()
    mask = torch.ones(1, 2, dtype=torch.bool)
    weights = masked_importance_weights(old, rollout, mask, level="sequence", low=0.0, high=1e30)
    torch.testing.assert_close(weights[0, 0].item(), math.exp(60))
    torch.testing.assert_close(mismatch_metrics(old, rollout, mask)["seq_ratio_max"], math.exp(60))


def test_bad_arguments_are_refused():
    old, rollout, mask = by_hand()
    with pytest.raises(ValueError, match="cap=0.5"):
        truncated_importance_weights(old, rollout, mask, cap=0.5)
    with pytest.raises(ValueError, match="sentence"):
        masked_importance_weights(old, rollout, mask, level="sentence")
    for level in ("token", "geometric"):
        with pytest.raises(ValueError, match="不大于"):
            masked_importance_weights(old, rollout, mask, level=level, low=3.0, high=2.0)
    with pytest.raises(ValueError, match="没有 token"):
        mismatch_metrics(old, rollout, torch.zeros_like(mask))


# ---------------------------------------------------------------- 必须被拒绝的错误写法


@pytest.mark.rejects
@pytest.mark.parametrize("seed", range(3))
def test_rejects_wrong_weights(seed):
    """真值：样本真来自 π_old 的梯度。每种流传的写法都差 5% 以上，正确的写法差不到 1e-10。"""
    logits, old_logits, engine, advantages = example(seed)
    old, rollout, current = log_probs_of(old_logits), log_probs_of(engine), log_probs_of(logits)
    leaf = logits.clone().requires_grad_(True)
    (truth,) = torch.autograd.grad(surrogate_under_old(leaf, old_logits, advantages), leaf)

    def sequence(numerator, denominator):
        return truncated_importance_weights(numerator, denominator, MASK, level="sequence", cap=1e9)

    def corrected(weights, proximal=old):
        return lambda lp: decoupled_ppo_loss(lp, proximal, weights, advantages, **NO_CLIP)

    def attached(lp):  # π_old 取自当前前向、忘了切断
        weight = (lp - rollout).sum(1, keepdim=True).exp() * (old - current).sum(1, keepdim=True).exp()
        return weight * clipped_surrogate_loss(lp, old, advantages, **NO_CLIP)

    right = sequence(old, rollout)
    assert relative(expected_gradient(corrected(right), logits, engine), truth) < 1e-10
    wrong = {
        "取倒数": corrected(sequence(rollout, old)),
        "分子用当前策略": corrected(sequence(current, rollout)),
        "比的是旧策略，不是 μ": corrected(sequence(current, old)),
        "旁路之后又乘一次": corrected(right, rollout),
        "没有切断": attached,
        "只重算": lambda lp: clipped_surrogate_loss(lp, old, advantages, **NO_CLIP),
    }
    for name, loss in wrong.items():
        assert relative(expected_gradient(loss, logits, engine), truth) > 0.05, name


@pytest.mark.rejects
def test_rejects_multiplying_before_the_clip():
    """权重乘进比值再裁剪：有的 token 因训推误差被裁，没有梯度；乘在外面，第一步谁也不被裁。"""
    _, old_logits, engine, advantages = example(0)
    old, rollout = log_probs_of(old_logits), log_probs_of(engine)
    weights = truncated_importance_weights(old, rollout, MASK, cap=1e9)
    leaf = old.clone().requires_grad_(True)
    (outside,) = torch.autograd.grad(decoupled_ppo_loss(leaf, old, weights, advantages).sum(), leaf)
    (inside,) = torch.autograd.grad(clipped_surrogate_loss(leaf, rollout, advantages).sum(), leaf)
    torch.testing.assert_close(outside, -weights * advantages)
    assert (inside == 0).any() and (outside != 0).all()
    torch.testing.assert_close(inside[inside != 0], outside[inside != 0])  # 没被裁的，两者相同
