"""后训练的参考实现：best-of-n、奖励模型与蒸馏的损失，以及它们与 KL 正则最优策略的关系。

真值：最优策略用数值梯度上升核对，不用闭式；best-of-n 用全部 n 元组的暴力枚举；
KL 的上界与连续极限用手算；奖励模型对照真调用的 TRL 1.16 `RewardTrainer.compute_loss`（损失与梯度）；
蒸馏对照 TRL 1.16 `generalized_jsd_loss(beta=1)` 与 `torch.distributions.kl_divergence`。
"""

import itertools
import math
from collections import defaultdict
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from torch.distributions import Categorical, kl_divergence
from trl import RewardTrainer

from snippets.rl.dpo import kl_regularized_optimum
from snippets.rl.post_training import best_of_n_policy, bradley_terry_loss, distillation_loss


def tensor(values):
    return torch.tensor(values, dtype=torch.float64)


def random_world(seed, size=5):
    generator = torch.Generator().manual_seed(seed)
    ref = torch.randn(size, generator=generator, dtype=torch.float64).softmax(-1)
    return ref, torch.randn(size, generator=generator, dtype=torch.float64)


def reverse_kl(policy, other):
    return kl_divergence(Categorical(policy), Categorical(other))


def gibbs(ref, rewards, *, beta):
    """一个提示的最优策略（概率）。"""
    return kl_regularized_optimum(ref.log()[None], rewards[None], beta=beta)[0][0].exp()


def objective(policy, ref, rewards, beta):
    return policy @ rewards - beta * reverse_kl(policy, ref)


def maximise(function, ref):
    """从参考策略出发做 softmax 梯度上升，只用目标函数，不用任何闭式。"""
    logits = ref.log().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits], max_iter=500, tolerance_grad=1e-13, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        loss = -function(logits.softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().softmax(-1)


def enumerated_best_of_n(ref, rewards, n):
    """枚举全部 n 元组；同分的样本平分（下标不同的两次抽样算两个样本）。"""
    result = torch.zeros_like(ref)
    for draw in itertools.product(range(len(ref)), repeat=n):
        draw = list(draw)
        best = rewards[draw].max()
        winners = [i for i in draw if rewards[i] == best]
        for i in winners:
            result[i] += ref[draw].prod() / len(winners)
    return result


def kl_bound(n):
    return math.log(n) - (n - 1) / n


def kl_with_zeros(policy, ref):
    keep = policy > 0
    return (policy[keep] * (policy[keep] / ref[keep]).log()).sum().item()


# ---------------------------------------------------------------- 手算


def test_best_of_two_by_hand():
    """π_ref=(½,¼,¼)，奖励 0<1<2：最高分是 0、1、2 的概率为 ¼、(9−4)/16、(16−9)/16。"""
    policy = best_of_n_policy(tensor([0.5, 0.25, 0.25]), tensor([0.0, 1.0, 2.0]), n=2)
    torch.testing.assert_close(policy, tensor([4, 5, 7]) / 16)


def test_best_of_n_splits_ties_in_the_proportion_of_the_reference():
    """两档：错 0.4；对 0.6，内部 2 : 1。n=3 时对的总概率 1−0.4³=0.936，内部仍是 2 : 1。"""
    policy = best_of_n_policy(tensor([0.4, 0.4, 0.2]), tensor([0.0, 1.0, 1.0]), n=3)
    torch.testing.assert_close(policy, tensor([0.064, 0.624, 0.312]))


def test_ranking_loss_by_hand():
    """排好的分数 (2, 1, 0)：三对的差是 1、2、1，损失是 softplus(−1)、softplus(−2)、softplus(−1) 的平均。"""
    expected = (2 * math.log1p(math.exp(-1)) + math.log1p(math.exp(-2))) / 3
    assert bradley_terry_loss(tensor([[2.0, 1.0, 0.0]])).item() == pytest.approx(expected, abs=1e-12)


def test_equal_scores_cost_log_two():
    assert bradley_terry_loss(torch.zeros(3, 4)).item() == pytest.approx(math.log(2), abs=1e-6)


# ---------------------------------------------------------------- 独立的真值


@pytest.mark.parametrize("beta", [0.3, 1.0, 2.5])
def test_gibbs_is_what_gradient_ascent_finds(beta):
    ref, rewards = random_world(0)
    found = maximise(lambda policy: objective(policy, ref, rewards, beta), ref)
    torch.testing.assert_close(
        gibbs(ref, rewards, beta=beta), found, rtol=0, atol=1e-6
    )  # L-BFGS 停在 1e-7 量级


@pytest.mark.parametrize("n", [1, 2, 3, 5])
@pytest.mark.parametrize("levels", [(0.0, 1.0, 2.0, 3.0), (1.0, 0.0, 1.0, 2.0), (0.0, 1.0, 1.0, 0.0)])
def test_best_of_n_matches_enumerating_every_tuple(n, levels):
    ref, rewards = random_world(4, size=4)[0], tensor(levels)
    torch.testing.assert_close(
        best_of_n_policy(ref, rewards, n=n), enumerated_best_of_n(ref, rewards, n), rtol=0, atol=1e-12
    )


def run_trl_reward_loss(chosen, rejected):
    """真调用 `RewardTrainer.compute_loss`：模型直接返回给定的分数。"""
    logits = torch.cat([chosen, rejected])[:, None]
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=True),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics=defaultdict(lambda: defaultdict(list)),
        _total_train_tokens=0,
        _tp_size=1,
    )
    inputs = {"attention_mask": torch.ones(len(logits), 1, dtype=torch.long)}
    return RewardTrainer.compute_loss(trainer, lambda **kwargs: SimpleNamespace(logits=logits), inputs)


def test_pairs_match_trl_reward_trainer_forward_and_gradient():
    generator = torch.Generator().manual_seed(5)
    scores = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    ours_in, theirs_in = scores.clone().requires_grad_(), scores.clone().requires_grad_()
    ours, theirs = bradley_terry_loss(ours_in), run_trl_reward_loss(theirs_in[:, 0], theirs_in[:, 1])
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, ours_in)[0], torch.autograd.grad(theirs, theirs_in)[0]
    )


def test_rankings_are_the_mean_over_all_pairs_fed_to_trl():
    """式 1：K=4 的排序拆成 6 对，逐对交给 TRL，再平均。"""
    generator = torch.Generator().manual_seed(6)
    scores = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    pairs = list(itertools.combinations(range(4), 2))
    chosen, rejected = (scores[:, [pair[i] for pair in pairs]].flatten() for i in (0, 1))
    torch.testing.assert_close(bradley_terry_loss(scores), run_trl_reward_loss(chosen, rejected))


def random_logits():
    generator = torch.Generator().manual_seed(7)
    student, teacher = torch.randn(2, 2, 3, 5, generator=generator, dtype=torch.float64).unbind(0)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    return student, teacher, mask


# TRL 1.16 导入 experimental 时提示接口不稳定
@pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental'")
def test_distillation_matches_trl_reverse_kl_forward_and_gradient():
    from trl.experimental.gkd import GKDTrainer

    student, teacher, mask = random_logits()
    ours_in, theirs_in = student.clone().requires_grad_(), student.clone().requires_grad_()
    ours = distillation_loss(ours_in, teacher, mask)
    labels = torch.where(mask, 0, -100)
    theirs = GKDTrainer.generalized_jsd_loss(
        theirs_in, teacher, labels=labels, beta=1, num_items_in_batch=int(mask.sum())
    )
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, ours_in)[0], torch.autograd.grad(theirs, theirs_in)[0]
    )


def test_distillation_is_the_mean_reverse_kl_of_unmasked_tokens():
    student, teacher, mask = random_logits()
    expected = kl_divergence(Categorical(logits=student), Categorical(logits=teacher))[mask].mean()
    torch.testing.assert_close(distillation_loss(student, teacher, mask), expected)


# ---------------------------------------------------------------- 性质


def test_shifting_rewards_changes_nothing():
    ref, rewards = random_world(15)
    torch.testing.assert_close(gibbs(ref, rewards + 7, beta=0.4), gibbs(ref, rewards, beta=0.4))
    scores = random_world(16, size=6)[1].view(2, 3)
    torch.testing.assert_close(
        bradley_terry_loss(scores + tensor([[3.0], [-5.0]])), bradley_terry_loss(scores)
    )


def test_best_of_n_sees_only_the_order_of_rewards():
    ref, rewards = random_world(17)
    torch.testing.assert_close(
        best_of_n_policy(ref, rewards.exp(), n=4), best_of_n_policy(ref, rewards, n=4), rtol=0, atol=1e-15
    )


def test_repeating_best_of_n_multiplies_n():
    """两轮 best-of-3 恰是 best-of-9，有同分也成立：没有参考把它拉住。"""
    ref, rewards = random_world(18, size=4)[0], tensor([0.0, 1.0, 1.0, 2.0])
    twice = best_of_n_policy(best_of_n_policy(ref, rewards, n=3), rewards, n=3)
    torch.testing.assert_close(twice, best_of_n_policy(ref, rewards, n=9))


@pytest.mark.parametrize("n", [2, 4, 9])
def test_with_binary_rewards_best_of_n_is_a_gibbs_policy(n):
    """0/1 奖励：对错之比从 p/(1−p) 变成 (1−(1−p)^n)/(1−p)^n，取 e^{1/β} 等于两者的倍数即可。"""
    ref, rewards = tensor([0.3, 0.4, 0.2, 0.1]), tensor([0.0, 0.0, 1.0, 1.0])
    best = best_of_n_policy(ref, rewards, n=n)
    wrong = 0.7**n
    beta = 1 / math.log((1 - wrong) / wrong * 0.7 / 0.3)
    torch.testing.assert_close(gibbs(ref, rewards, beta=beta), best)


@pytest.mark.parametrize("n", [2, 3, 8, 50])
def test_best_of_n_kl_is_below_the_formula_and_reaches_it_without_atoms(n):
    """原子越小越接近：KL 单调靠近 log n − (n−1)/n，一万个等概率答案时相差不到 1e-4。"""
    gaps = []
    for size in (3, 30, 300, 10_000):
        ref = torch.full((size,), 1 / size, dtype=torch.float64)
        scores = torch.arange(size, dtype=torch.float64)
        below = torch.arange(size, dtype=torch.float64) / size  # 等概率时不必建 V×V 的表
        policy = (below + 1 / size) ** n - below**n
        if size <= 300:
            torch.testing.assert_close(best_of_n_policy(ref, scores, n=n), policy)
        gaps.append(kl_bound(n) - kl_with_zeros(policy, ref))
    assert gaps == sorted(gaps, reverse=True) and 0 < gaps[-1] < 1e-4
    for seed in range(5):
        ref, rewards = random_world(seed)
        assert kl_with_zeros(best_of_n_policy(ref, rewards, n=n), ref) < kl_bound(n)


def test_the_teacher_gets_no_gradient_and_is_the_minimum():
    student, teacher, mask = random_logits()
    student.requires_grad_(), teacher.requires_grad_()
    distillation_loss(student, teacher, mask).backward()
    assert teacher.grad is None and student.grad[mask].abs().sum() > 0 and not student.grad[~mask].any()
    assert distillation_loss(teacher.detach(), teacher, mask).item() == pytest.approx(0, abs=1e-12)


# ---------------------------------------------------------------- 边界


def test_best_of_one_is_the_reference():
    ref, rewards = random_world(19)
    torch.testing.assert_close(best_of_n_policy(ref, rewards, n=1), ref)


def test_impossible_answers_stay_impossible():
    """参考给 0 的答案：奖励再高，π* 与 best-of-n 也给 0，没有 NaN。"""
    ref, rewards = tensor([0.5, 0.5, 0.0]), tensor([0.0, 1.0, 9.0])
    best = best_of_n_policy(ref, rewards, n=8)
    torch.testing.assert_close(best, tensor([0.5**8, 1 - 0.5**8, 0.0]))
    assert gibbs(ref, rewards, beta=0.1)[2].item() == 0


def test_extreme_rewards_stay_finite():
    """奖励除以 β 上千：减去最大值再取指数，不溢出；分差上千时损失等于分差。"""
    ref = torch.tensor([0.5, 0.5])
    assert gibbs(ref, torch.tensor([0.0, 1.0]), beta=1e-3).isfinite().all()
    assert bradley_terry_loss(torch.tensor([[0.0, 1000.0]])).item() == 1000.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtype_is_kept(dtype):
    ref, rewards = torch.tensor([0.25, 0.75], dtype=dtype), torch.tensor([1.0, 0.0], dtype=dtype)
    assert bradley_terry_loss(rewards[None]).dtype == dtype
    assert best_of_n_policy(ref, rewards, n=3).dtype == dtype


def test_bad_scalars_are_refused():
    ref, rewards = random_world(20)
    with pytest.raises(ValueError, match="n=0"):
        best_of_n_policy(ref, rewards, n=0)
    with pytest.raises(ValueError, match="K=1"):
        bradley_terry_loss(torch.zeros(2, 1))


def test_a_flat_list_of_scores_is_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        bradley_terry_loss(torch.zeros(4))


# ---------------------------------------------------------------- 必须被拒绝的错误写法


@pytest.mark.rejects
def test_rejects_multiplying_by_beta():
    """「π* ∝ π_ref·e^{βr}」：β=0.4 时目标比数值最优低 0.1 以上；我们的与它相等。"""
    ref, rewards = random_world(0)
    found = objective(maximise(lambda p: objective(p, ref, rewards, 0.4), ref), ref, rewards, 0.4)
    wrong = (ref.log() + 0.4 * rewards).softmax(-1)
    ours = gibbs(ref, rewards, beta=0.4)
    assert found - objective(wrong, ref, rewards, 0.4) > 0.1
    torch.testing.assert_close(objective(ours, ref, rewards, 0.4), found)


@pytest.mark.rejects
def test_rejects_the_swapped_kl_direction():
    """惩罚 KL(π_ref‖π) 的最优解是 β·π_ref/(λ−r)，不是指数倾斜；两个解各自在对方的目标里更差。"""
    ref, rewards = random_world(0)
    swapped = maximise(lambda p: p @ rewards - 0.4 * reverse_kl(ref, p), ref)
    multiplier = rewards + 0.4 * ref / swapped  # 各分量应当是同一个 λ
    torch.testing.assert_close(multiplier, multiplier.mean().expand(5), rtol=0, atol=1e-5)
    ours = gibbs(ref, rewards, beta=0.4)
    assert reverse_kl(swapped, ours) > 0.05
    assert objective(ours, ref, rewards, 0.4) - objective(swapped, ref, rewards, 0.4) > 0.02


@pytest.mark.rejects
def test_rejects_quoting_the_best_of_n_formula_as_exact():
    """两个等概率答案：真 KL 不超过 log 2，公式随 n 无限增大；n=64 时高估 2.4 nat 以上。"""
    ref, rewards = tensor([0.5, 0.5]), tensor([0.0, 1.0])
    exact = kl_with_zeros(enumerated_best_of_n(ref, rewards, 10), ref)
    assert exact < math.log(2) and kl_bound(10) - exact > 0.7
    assert kl_bound(64) - kl_with_zeros(best_of_n_policy(ref, rewards, n=64), ref) > 2.4


@pytest.mark.rejects
def test_rejects_ignoring_ties():
    """「F^n 的差只按次序算」：同分时任意排个先后，会把概率都给排在后面的那个。"""
    ref, rewards = tensor([0.4, 0.3, 0.3]), tensor([0.0, 1.0, 1.0])
    cumulative = ref.cumsum(0)
    wrong = cumulative**3 - (cumulative - ref) ** 3
    truth = enumerated_best_of_n(ref, rewards, 3)
    assert (wrong - truth).abs().max() > 0.1
    torch.testing.assert_close(best_of_n_policy(ref, rewards, n=3), truth)


@pytest.mark.rejects
def test_rejects_the_ranking_loss_summed_over_pairs():
    """不除以 K(K−1)/2：K=9 的提示权重是 K=2 的 36 倍；式 1 里每个提示权重相同。"""
    pair, nine = torch.zeros(1, 2), torch.zeros(1, 9)
    assert bradley_terry_loss(nine).item() == pytest.approx(bradley_terry_loss(pair).item())
    summed = sum(math.log(2) for _ in itertools.combinations(range(9), 2))
    assert summed / bradley_terry_loss(nine).item() == pytest.approx(36)


@pytest.mark.rejects
def test_rejects_forward_kl_as_on_policy_distillation():
    """老师对学生的 KL（beta=0）是另一个数。"""
    student, teacher, mask = random_logits()
    forward = kl_divergence(Categorical(logits=teacher), Categorical(logits=student))[mask].mean()
    assert abs(forward - distillation_loss(student, teacher, mask)) > 0.04
