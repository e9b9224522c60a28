r"""snippets/reasoning/r1_no_reward_model.py 的测试。

真值与被测代码无关：(1) 一维两种偏好的闭式解（对数几率）；(2) LBFGS 与 autograd 直接最小化手写的目标；
(3) 门的次序由全部「分数 × 是否通过」的两两比较枚举；(4) 流传的写法（分数乘以是否通过）在同一枚举上被否决。
"""

import itertools
import math

import pytest
import torch

from snippets.reasoning.r1_no_reward_model import fit_reward_model, gated_reward
from snippets.rl.post_training import bradley_terry_loss


def random_pairs(seed, *, num_pairs=60, dim=3):
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(2, num_pairs, dim, generator=generator, dtype=torch.float64)
    truth = torch.tensor([1.5, -0.7, 0.2], dtype=torch.float64)[:dim]
    wins = torch.rand(num_pairs, generator=generator, dtype=torch.float64) < torch.sigmoid(
        (features[0] - features[1]) @ truth
    )
    return torch.where(wins[:, None], features[0], features[1]), torch.where(
        wins[:, None], features[1], features[0]
    )


# 一、奖励模型


def test_one_feature_matches_the_log_odds():
    """差恒为 ±2、七胜三负：岭项趋于零时 σ(2w)=0.7，w=½·ln(7/3)。"""
    chosen = torch.tensor([[1.0]] * 7 + [[-1.0]] * 3, dtype=torch.float64)
    weights = fit_reward_model(chosen, -chosen, ridge=1e-12)
    torch.testing.assert_close(weights, torch.tensor([0.5 * math.log(7 / 3)], dtype=torch.float64))


def test_default_ridge_and_number_of_steps():
    """差恒为 2、全胜：最小点满足 ridge·w = 2(1−σ(2w))，默认的 ridge 是 1e-3。

    岭项几乎为零时牛顿法每步走 1/(2σ(2w))，w 大了就是 ½：默认 30 步，比 29 步多 ½。
    """
    chosen = torch.ones(4, 1, dtype=torch.float64)
    weights = fit_reward_model(chosen, -chosen)
    torch.testing.assert_close(1e-3 * weights, 2 * torch.sigmoid(-2 * weights))
    gained = fit_reward_model(chosen, -chosen, ridge=1e-18) - fit_reward_model(
        chosen, -chosen, ridge=1e-18, num_steps=29
    )
    assert gained.item() == pytest.approx(0.5, abs=1e-3)


@pytest.mark.parametrize("ridge", [1e-3, 0.3])
def test_matches_lbfgs_on_the_written_objective(ridge):
    chosen, rejected = random_pairs(0)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weights], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        probs = 1 / (1 + torch.exp(-(chosen - rejected) @ weights))
        loss = -probs.log().mean() + 0.5 * ridge * (weights**2).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(
        fit_reward_model(chosen, rejected, ridge=ridge), weights.detach(), atol=1e-7, rtol=1e-6
    )


def test_swapping_chosen_and_rejected_flips_the_sign():
    chosen, rejected = random_pairs(1)
    torch.testing.assert_close(fit_reward_model(rejected, chosen), -fit_reward_model(chosen, rejected))


def test_a_feature_shared_by_both_responses_gets_no_weight():
    """每对里相同的特征（例如题目本身、常数项）在差里消去：奖励模型没有零点。"""
    chosen, rejected = random_pairs(2)
    shared = torch.linspace(-3, 5, len(chosen), dtype=torch.float64)[:, None]
    plain = fit_reward_model(chosen, rejected)
    weights = fit_reward_model(torch.cat([chosen, shared], 1), torch.cat([rejected, shared], 1))
    assert weights[3].abs().item() < 1e-12
    torch.testing.assert_close(weights[:3], plain)


def test_separable_pairs_stay_finite_and_stationary():
    """可分的数据：岭项使最小值存在；梯度由 autograd 验为零。"""
    gaps = torch.tensor([[4.0, 0.1], [9.0, -0.2], [0.5, 0.3]], dtype=torch.float64)
    weights = fit_reward_model(gaps, torch.zeros_like(gaps), ridge=1e-3, num_steps=60).requires_grad_()
    loss = torch.log1p(torch.exp(-gaps @ weights)).mean() + 0.5e-3 * (weights**2).sum()
    (gradient,) = torch.autograd.grad(loss, weights)
    assert gradient.abs().amax().item() < 1e-9


def test_minimises_the_shared_bradley_terry_loss():
    """与 snippets/rl/post_training.py 的成对损失同一目标：加岭项后 autograd 的梯度为零。"""
    chosen, rejected = random_pairs(5)
    weights = fit_reward_model(chosen, rejected, ridge=0.05).requires_grad_()
    loss = bradley_terry_loss(torch.stack([chosen @ weights, rejected @ weights], 1))
    (gradient,) = torch.autograd.grad(loss + 0.025 * weights @ weights, weights)
    assert gradient.abs().amax().item() < 1e-12


def test_keeps_the_dtype():
    chosen, rejected = random_pairs(3)
    assert fit_reward_model(chosen.float(), rejected.float()).dtype == torch.float32
    assert gated_reward(chosen[:, 0].float(), chosen[:, 1] > 0).dtype == torch.float32


@pytest.mark.parametrize("ridge", [0.0, -1e-3])
def test_ridge_must_be_positive(ridge):
    chosen, rejected = random_pairs(4)
    with pytest.raises(ValueError, match="必须为正"):
        fit_reward_model(chosen, rejected, ridge=ridge)


# 二、规则门

SCORES = [-30.0, -2.0, -0.5, 0.0, 0.5, 3.0, 30.0]


def violations(reward):
    """枚举（分数, 是否通过）的两两组合：通过的不得低于没通过的；都通过时分高的不得低。"""
    cases = [(s, p) for s in SCORES for p in (True, False)]
    scores = torch.tensor([s for s, _ in cases], dtype=torch.float64)
    passed = torch.tensor([p for _, p in cases])
    values = reward(scores, passed).tolist()
    count = 0
    for (i, (s, p)), (j, (t, q)) in itertools.product(enumerate(cases), repeat=2):
        count += p and not q and values[i] <= values[j]
        count += p and q and s > t and values[i] < values[j]
    return count


def test_gated_reward_by_hand():
    """σ(0)=½，σ(ln 3)=¾；没通过的恰为 0。"""
    rewards = gated_reward(
        torch.tensor([0.0, math.log(3), 50.0, -7.0], dtype=torch.float64),
        torch.tensor([True, True, False, False]),
    )
    torch.testing.assert_close(rewards, torch.tensor([1.5, 1.75, 0.0, 0.0], dtype=torch.float64))
    assert gated_reward(torch.zeros(1), torch.tensor([True]), base=4.0).item() == 4.5


@pytest.mark.parametrize("base", [0.0, 1.0, 3.0])
def test_every_pass_beats_every_fail(base):
    assert violations(lambda s, p: gated_reward(s, p, base=base)) == 0


@pytest.mark.rejects
def test_rejected_version_raw_score_times_pass():
    """流传的写法：负分的通过者得负，输给没通过的 0。"""
    assert violations(lambda s, p: s * p) >= 3 * len(SCORES)


@pytest.mark.rejects
def test_rejected_version_adding_the_scores():
    """相加不是门：分数够高就能盖过没通过。"""
    assert violations(lambda s, p: p.double() + s) > 0


def test_failed_scores_never_leak():
    """没通过的分数可以是无穷或 NaN，奖励仍是 0。"""
    scores = torch.tensor([float("inf"), float("-inf"), float("nan")])
    assert torch.equal(gated_reward(scores, torch.zeros(3, dtype=torch.bool)), torch.zeros(3))


def test_base_must_not_be_negative():
    with pytest.raises(ValueError, match="不能为负"):
        gated_reward(torch.zeros(2), torch.tensor([True, False]), base=-0.1)
