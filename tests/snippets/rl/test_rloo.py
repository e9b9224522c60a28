r"""snippets/rl/rloo.py 的测试。

真值有四个来源，互不相同：(1) 手算；(2) 精确枚举：小的类别策略上全部 $V^G$ 个组、小的自回归策略上全部回答，
逐个乘概率求和，真梯度由 $\sum_y\pi(y)r(y)$ 直接求导得到；(3) TRL 1.16 `RLOOTrainer` 的两个方法，真实调用，
只把生成、打分、前向换成给定的数；(4) verl 0.9.1 跑出来后冻结的数值，见 tests/golden/make_rloo.py。
全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import json
import math
from collections import defaultdict, deque
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.log_probs import sequence_log_probs
from snippets.rl.rloo import (
    kl_penalized_rewards,
    leave_one_out_advantages,
    optimal_constant_baseline,
    reinforce_loss,
    rloo_loss,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "rloo.json").read_text(encoding="utf-8"))


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- 真值：类别策略上的精确枚举 ----

LOGITS = tensor([0.9, 0.4, -0.2, -1.0])
REWARDS = tensor([0.3, 1.0, -0.5, 2.0])


def true_gradient(logits, rewards):
    """对 J = Σ π(a) r(a) 直接求导，不经过任何估计量。"""
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((leaf.softmax(0) * rewards).sum(), leaf)[0]


def moments(advantage_fn, group_size, logits=LOGITS, rewards=REWARDS):
    """枚举全部 V^G 个组，返回梯度估计 (1/G)Σ Â_i ∇log π(a_i) 的期望与总方差（纯 Python 循环）。"""
    probs, count = logits.softmax(0), len(logits)
    scores = torch.eye(count, dtype=torch.float64) - probs  # ∇_logits log π(a)
    mean, second = torch.zeros_like(logits), 0.0
    for group in product(range(count), repeat=group_size):
        index = torch.tensor(group)
        weight = probs[index].prod()
        estimate = (advantage_fn(rewards[index])[:, None] * scores[index]).mean(0)
        mean, second = mean + weight * estimate, second + weight * estimate.square().sum()
    return mean, (second - mean.square().sum()).item()


def rloo(rewards):
    return leave_one_out_advantages(rewards, group_size=len(rewards))


def own_mean(rewards):
    return rewards - rewards.mean()


def angle(a, b):
    return math.degrees(math.acos(min(1.0, (a @ b / (a.norm() * b.norm())).item())))


# ---- 真值：自回归策略上的精确枚举 ----

EOS, LENGTH = 0, 3


def all_responses():
    """词表 {0=EOS, 1, 2}，最长 3 个 token：长度 1、2、3 的回答各 1、2、12 条，共 15 条。"""
    rows = []
    for tokens in product(range(3), repeat=LENGTH):
        end = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        row = (*tokens[:end], *[EOS] * (LENGTH - end), end)
        if row not in rows:
            rows.append(row)
    ids = torch.tensor([row[:LENGTH] for row in rows])
    lengths = torch.tensor([row[-1] for row in rows])
    return ids, torch.arange(LENGTH) < lengths[:, None]


IDS, MASK = all_responses()
# 奖励：token 1 的个数，出现过 token 2 再扣 1.5
RESPONSE_REWARDS = (IDS == 1).sum(1) - 1.5 * (IDS == 2).any(1).double()
THETA, OLD_THETA, REF_THETA = randn(3, 3, seed=1), randn(3, 3, seed=2), randn(3, 3, seed=3)


def response_log_probs(theta):
    """(15, 3) 的逐 token 对数概率：θ[前一个 token] 是下一个 token 的 logits，开头的前一个 token 记作 0。"""
    previous = torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], dim=1)
    return theta.log_softmax(-1)[previous, IDS]


def response_probs(theta):
    return sequence_log_probs(response_log_probs(theta), MASK).exp()


def objective_gradient(theta, kl_coef=0.0):
    """J = Σ_y π(y)[r(y) − β log(π(y)/π_ref(y))] 的梯度，全部回答求和后直接求导。"""
    leaf = theta.clone().requires_grad_()
    logps = sequence_log_probs(response_log_probs(leaf), MASK)
    ref_logps = sequence_log_probs(response_log_probs(REF_THETA), MASK)
    value = (logps.exp() * (RESPONSE_REWARDS - kl_coef * (logps - ref_logps))).sum()
    return torch.autograd.grad(value, leaf)[0]


def expected_gradient(loss_fn, rewards, *, theta=THETA, sampler=THETA, group_size=2, after_baseline=None):
    """枚举全部 15^G 个组：−E[∇ 组内平均损失]。loss_fn 收 (log_probs, old_log_probs, advantages, mask)，返回 (B,)；
    after_baseline 是减完基线之后再加到优势上的、每条回答一个的数。
    """
    index = torch.cartesian_prod(*[torch.arange(len(IDS))] * group_size)  # (N, G)
    weights, flat = response_probs(sampler)[index].prod(1), index.flatten()
    advantages = leave_one_out_advantages(rewards[flat], group_size=group_size)
    if after_baseline is not None:
        advantages = advantages + after_baseline[flat]
    leaf = theta.clone().requires_grad_()
    log_probs = response_log_probs(leaf)[flat]
    losses = loss_fn(log_probs, response_log_probs(sampler)[flat], advantages, MASK[flat])
    total = (weights * losses.view(-1, group_size).mean(1)).sum()
    return -torch.autograd.grad(total, leaf)[0]


def no_clip(log_probs, old_log_probs, advantages, mask):
    return rloo_loss(log_probs, old_log_probs, advantages, mask, clip_low=1.0, clip_high=math.inf)


def plain(log_probs, old_log_probs, advantages, mask):
    return reinforce_loss(log_probs, advantages, mask)


# ---- 手算 ----


def test_two_groups_by_hand():
    """(1,0,0,1)：得 1 分的基线是 (0+0+1)/3=1/3，优势 2/3；得 0 分的基线是 2/3，优势 −2/3。
    (1,1,0,1)：得 1 分的基线 2/3，优势 1/3；得 0 分的基线 1，优势 −1。两组互不影响。
    """
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 1.0, 0.0, 1.0])
    expected = tensor([2.0, -2.0, -2.0, 2.0, 1.0, 1.0, -3.0, 1.0]) / 3
    torch.testing.assert_close(leave_one_out_advantages(rewards, group_size=4), expected)


def test_two_answers_give_the_reward_difference():
    """G=2：基线就是对方的奖励，优势是 ±(r_1 − r_2)，不是 GRPO 的 ±1/√2。"""
    torch.testing.assert_close(rloo(tensor([0.7, -0.2])), tensor([0.9, -0.9]))


def test_kl_is_summed_over_the_response_by_hand():
    """k1 逐 token 是 0.5、−0.2、(填充 9)：和 0.3，β=0.1，奖励 1 → 0.97。第二行 −1.0：奖励 0 → 0.1。"""
    log_probs, ref = (
        tensor([[-1.0, -1.2, 0.0], [-2.0, 0.0, 0.0]]),
        tensor([[-1.5, -1.0, -9.0], [-1.0, -9.0, -9.0]]),
    )
    mask = torch.tensor([[True, True, False], [True, False, False]])
    shaped = kl_penalized_rewards(tensor([1.0, 0.0]), log_probs, ref, mask, kl_coef=0.1)
    torch.testing.assert_close(shaped, tensor([0.97, 0.1]))


def test_sequence_ratio_is_the_product_by_hand():
    """两个 token 的比值 1.15 与 1.10，各自在 [0.8, 1.2] 内，乘积 1.265 出界：Â=+1 时损失 −1.2、梯度 0；
    Â=−1 时损失 1.265，两个 token 的梯度都是 1.265。
    """
    old = tensor([[-1.0, -2.0]])
    leaf = (old + tensor([[1.15, 1.10]]).log()).requires_grad_()
    mask = torch.ones(1, 2, dtype=torch.bool)
    for advantage, loss, gradient in [(1.0, -1.2, 0.0), (-1.0, 1.265, 1.265)]:
        value = rloo_loss(leaf, old, tensor([advantage]), mask)
        torch.testing.assert_close(value, tensor([loss]))
        torch.testing.assert_close(torch.autograd.grad(value.sum(), leaf)[0], torch.full_like(old, gradient))


def test_optimal_baseline_by_hand():
    """π=(3/4, 1/4)，两动作 softmax：s=(1/4, −1/4) 与 (−3/4, 3/4)，‖s‖²=1/8 与 9/8。r=(1, 0)：
    b* = (3/4·1/8)/(3/4·1/8 + 1/4·9/8) = (3/32)/(12/32) = 1/4，而 E[r] = 3/4。
    """
    probs = tensor([0.75, 0.25])
    scores = torch.eye(2, dtype=torch.float64) - probs
    torch.testing.assert_close(optimal_constant_baseline(probs, tensor([1.0, 0.0]), scores), tensor(0.25))


# ---- 精确枚举：无偏 ----


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_leave_one_out_is_exactly_unbiased(group_size):
    mean, _ = moments(rloo, group_size)
    torch.testing.assert_close(mean, true_gradient(LOGITS, REWARDS))


@pytest.mark.parametrize("baseline", [0.0, -7.0, 1.3])
def test_any_constant_baseline_is_unbiased(baseline):
    mean, _ = moments(lambda rewards: rewards - baseline, 2)
    torch.testing.assert_close(mean, true_gradient(LOGITS, REWARDS))


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_own_mean_is_a_pure_scale(group_size):
    """期望恰好是真梯度的 (G−1)/G，逐分量成比例。"""
    mean, _ = moments(own_mean, group_size)
    torch.testing.assert_close(mean, (group_size - 1) / group_size * true_gradient(LOGITS, REWARDS))


def test_dividing_by_std_is_not_a_constant_scale():
    """两个 0/1 奖励的提示（成功率 0.1 与 0.4）倍数不同；奖励分级时连方向都变了。"""
    logits = tensor([0.4, 0.3, 0.2, 0.1]).log()

    def grpo(rewards):
        return group_advantages(rewards, group_size=len(rewards))

    factors = []
    for rewards in [tensor([0.0, 0.0, 0.0, 1.0]), tensor([1.0, 0.0, 0.0, 0.0])]:
        truth = true_gradient(logits, rewards)
        mean, _ = moments(grpo, 4, logits, rewards)
        factors.append((mean @ truth / (truth @ truth)).item())
        assert angle(mean, truth) < 1e-5
    assert factors[0] - factors[1] > 0.05
    graded = tensor([0.1, 0.9, 0.3, 1.0])
    assert angle(moments(grpo, 2, logits, graded)[0], true_gradient(logits, graded)) > 10


def test_gradient_equals_the_covariance_of_reward_and_score():
    """E[s]=0，所以 ∇J = E[r s] = Cov(r, s)；留一估计逐组等于除以 G−1 的样本协方差。"""
    probs = LOGITS.softmax(0)
    scores = torch.eye(4, dtype=torch.float64) - probs
    centred = (probs[:, None] * (REWARDS - probs @ REWARDS)[:, None] * scores).sum(0)
    torch.testing.assert_close(centred, true_gradient(LOGITS, REWARDS))
    group = torch.tensor([0, 3, 3, 1, 2])
    estimate = (rloo(REWARDS[group])[:, None] * scores[group]).mean(0)
    stacked = torch.cat([REWARDS[group][None], scores[group].T])  # 第一行 r，其余四行 s 的分量
    torch.testing.assert_close(estimate, torch.cov(stacked)[0, 1:])


def test_off_policy_sequence_ratio_stays_unbiased():
    """样本来自 π_old，整条比值、不裁剪：期望恰好是 π_θ 处的真梯度。"""
    gradient = expected_gradient(no_clip, RESPONSE_REWARDS, sampler=OLD_THETA)
    torch.testing.assert_close(gradient, objective_gradient(THETA))


@pytest.mark.parametrize("group_size", [2, 3])
def test_sequence_reinforce_is_unbiased_for_responses_of_different_length(group_size):
    gradient = expected_gradient(plain, RESPONSE_REWARDS, group_size=group_size)
    torch.testing.assert_close(gradient, objective_gradient(THETA))


def test_kl_in_the_reward_gives_the_gradient_of_the_kl_objective():
    """先扣 KL 再减基线（TRL）与先减基线再扣 KL（OpenRLHF）期望都精确：换一个不看自己的基线不改变期望。"""
    log_probs, ref = response_log_probs(THETA), response_log_probs(REF_THETA)
    shaped = kl_penalized_rewards(RESPONSE_REWARDS, log_probs, ref, MASK, kl_coef=0.3)
    truth = objective_gradient(THETA, kl_coef=0.3)
    torch.testing.assert_close(expected_gradient(plain, shaped), truth)
    later = expected_gradient(plain, RESPONSE_REWARDS, after_baseline=shaped - RESPONSE_REWARDS)
    torch.testing.assert_close(later, truth)


def test_objective_gradient_matches_finite_differences():
    """真值自己也要核对：中心差分，步长 1e-5，截断误差约 1e-10。"""

    def value(theta):
        logps = sequence_log_probs(response_log_probs(theta), MASK)
        ref_logps = sequence_log_probs(response_log_probs(REF_THETA), MASK)
        return (logps.exp() * (RESPONSE_REWARDS - 0.3 * (logps - ref_logps))).sum()

    torch.testing.assert_close(response_probs(THETA).sum(), tensor(1.0))
    numeric = torch.zeros_like(THETA)
    for i, j in product(range(3), repeat=2):
        step = torch.zeros_like(THETA)
        step[i, j] = 1e-5
        numeric[i, j] = (value(THETA + step) - value(THETA - step)) / 2e-5
    torch.testing.assert_close(numeric, objective_gradient(THETA, kl_coef=0.3), atol=1e-8, rtol=1e-6)


# ---- 精确枚举：方差 ----


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_variance_follows_the_closed_form(group_size):
    """Var = Var[(r−J)s]/G + (Var(r)·E‖s‖² + ‖∇J‖²)/(G(G−1))：第二项是「用别人估基线」的代价。"""
    probs, truth = LOGITS.softmax(0), true_gradient(LOGITS, REWARDS)
    scores = torch.eye(4, dtype=torch.float64) - probs
    norms, mean_reward = scores.square().sum(1), probs @ REWARDS
    single = (probs * (REWARDS - mean_reward) ** 2 * norms).sum() - truth @ truth
    price = (probs * (REWARDS - mean_reward) ** 2).sum() * (probs * norms).sum() + truth @ truth
    expected = single / group_size + price / (group_size * (group_size - 1))
    assert moments(rloo, group_size)[1] == pytest.approx(expected.item())


def test_own_mean_has_the_same_relative_noise():
    """方差小 ((G−1)/G)² 倍，期望小 (G−1)/G 倍：信噪比一模一样。"""
    (mean, variance), (shrunk, small) = moments(rloo, 3), moments(own_mean, 3)
    assert small == pytest.approx(variance * 4 / 9)
    assert small / (shrunk @ shrunk).item() == pytest.approx(variance / (mean @ mean).item())


def test_optimal_baseline_is_the_bottom_of_the_parabola():
    """Var(b) = Var(b*) + (b−b*)² E‖s‖²/G；b* 处的方差比 ±0.1 与 E[r] 处都小。"""
    probs = LOGITS.softmax(0)
    scores = torch.eye(4, dtype=torch.float64) - probs
    best = optimal_constant_baseline(probs, REWARDS, scores).item()
    mean_norm = (probs * scores.square().sum(1)).sum().item()

    def variance(baseline):
        return moments(lambda rewards: rewards - baseline, 2)[1]

    for baseline in [best - 0.1, best + 0.1, (probs @ REWARDS).item(), 0.0]:
        assert variance(baseline) == pytest.approx(variance(best) + (baseline - best) ** 2 * mean_norm / 2)
        assert variance(baseline) > variance(best)


def test_a_reward_offset_leaves_rloo_alone_but_not_plain_reinforce():
    mean, variance = moments(rloo, 3)
    shifted_mean, shifted_variance = moments(lambda rewards: rloo(rewards + 3), 3)
    torch.testing.assert_close(shifted_mean, mean)
    assert shifted_variance == pytest.approx(variance)
    assert moments(lambda rewards: rewards + 3, 3)[1] > 5 * moments(lambda rewards: rewards, 3)[1]


# ---- 与独立实现一致 ----


def trl_loss(log_probs, old_log_probs, advantages, mask):
    """真实调用 `RLOOTrainer._compute_loss`，返回 (标量损失, 对 log_probs 的梯度, 指标)。"""
    from trl.trainer.rloo_trainer import RLOOTrainer

    leaf = log_probs.clone().requires_grad_()
    trainer = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *a, **k: (leaf, torch.zeros_like(leaf), None),
        aux_loss_enabled=False,
        epsilon_low=0.2,
        epsilon_high=0.2,
        model=SimpleNamespace(training=True),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": torch.zeros(len(mask), 1, dtype=torch.long),
        "prompt_mask": torch.ones(len(mask), 1, dtype=torch.long),
        "completion_ids": torch.zeros_like(mask, dtype=torch.long),
        "completion_mask": mask.long(),
        "advantages": advantages,
        "old_logps": (old_log_probs * mask).sum(1),
    }
    loss = RLOOTrainer._compute_loss(trainer, None, inputs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0], trainer._metrics["train"]


def ragged_case(scale):
    """六条长短不一的回答，三组各两条；scale 是逐 token 对数比值的标准差。"""
    mask = torch.arange(5) < torch.tensor([5, 3, 1, 4, 2, 5])[:, None]
    old = -randn(6, 5, seed=11).abs() - 0.5
    return old + scale * randn(6, 5, seed=12), old, randn(6, seed=13), mask


@pytest.mark.parametrize("scale", [0.0, 0.05, 0.4])
def test_loss_and_gradient_match_trl(scale):
    log_probs, old, rewards, mask = ragged_case(scale)
    advantages = leave_one_out_advantages(rewards, group_size=2)
    leaf = log_probs.clone().requires_grad_()
    loss = rloo_loss(leaf, old, advantages, mask).mean()
    gradient = torch.autograd.grad(loss, leaf)[0]
    theirs = trl_loss(log_probs, old, advantages, mask)
    torch.testing.assert_close((loss.detach(), gradient), theirs[:2])
    clipped = theirs[2]["clip_ratio/region_mean"][0]
    assert clipped == 0 if scale < 0.1 else clipped > 0.3


def trl_advantages(rewards, log_probs, ref_log_probs, mask, *, group_size, beta, **options):
    """真实调用 `RLOOTrainer._generate_and_score_completions`：换掉生成、前向与打分，其余是 TRL 自己的代码。"""
    from trl.trainer.rloo_trainer import RLOOTrainer

    lengths, count = mask.sum(1).tolist(), len(rewards)
    policy, reference = SimpleNamespace(training=True, is_gradient_checkpointing=False), SimpleNamespace()
    table = {id(policy): log_probs, id(reference): ref_log_probs}
    trainer = SimpleNamespace(
        accelerator=SimpleNamespace(
            device=torch.device("cpu"), process_index=0, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        model=policy,
        ref_model=reference,
        args=SimpleNamespace(
            per_device_train_batch_size=count,
            per_device_eval_batch_size=count,
            gradient_checkpointing_kwargs=None,
        ),
        _generate=lambda prompts: ([[1]] * count, [[2] * n for n in lengths], [""] * count),
        _get_per_token_logps_and_entropies=lambda model, *a, **k: (table[id(model)], None, None),
        _calculate_rewards=lambda *a: rewards[:, None],
        _tokenizer=SimpleNamespace(pad_token_id=0),
        eos_token_ids=[3],
        pad_to_multiple_of=None,
        mask_truncated_completions=False,
        beta=beta,
        num_generations=group_size,
        reward_weights=torch.ones(1, dtype=torch.float64),
        reward_clip_range=None,
        normalize_advantages=False,
        reward_func_names=["r"],
        _metrics={"train": defaultdict(list)},
        _logs={
            "prompt": deque(),
            "completion": deque(),
            "rewards": {"r": deque()},
            "advantages": deque(),
            "extra": defaultdict(deque),
        },
        _pending_extra_logs=defaultdict(list),
        _pending_metrics=defaultdict(list),
    )
    for name, value in options.items():
        setattr(trainer, name, value)
    inputs = [{"prompt": "q"}] * count
    return RLOOTrainer._generate_and_score_completions(trainer, inputs)


@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_advantages_match_trl(beta):
    log_probs, ref, rewards, mask = ragged_case(0.3)
    output = trl_advantages(rewards, log_probs, ref, mask, group_size=3, beta=beta)
    coefficient = {} if beta == 0.05 else {"kl_coef": beta}  # 0.05 是两边共同的默认值
    shaped = kl_penalized_rewards(rewards, log_probs, ref, mask, **coefficient)
    torch.testing.assert_close(output["advantages"], leave_one_out_advantages(shaped, group_size=3))
    torch.testing.assert_close(output["old_logps"], sequence_log_probs(log_probs, mask))


def test_trl_leaves_unscorable_answers_out_of_the_baseline():
    """奖励为 None（NaN）的回答优势置 0，基线只在有分的里面算：(1, 0, NaN) 等于两条一组的 (1, 0)，再补一个 0；
    只剩一条有分时，那一条的优势也是 0。
    """
    log_probs, ref, _, mask = ragged_case(0.3)
    rewards = tensor([1.0, 0.0, math.nan, 2.0, math.nan, math.nan])
    output = trl_advantages(rewards, log_probs, ref, mask, group_size=3, beta=0.0)
    torch.testing.assert_close(output["advantages"], tensor([1.0, -1.0, 0.0, 0.0, 0.0, 0.0]))


def test_trl_normalisation_is_over_the_batch_not_the_group():
    log_probs, ref, rewards, mask = ragged_case(0.3)
    output = trl_advantages(rewards, log_probs, ref, mask, group_size=3, beta=0.0, normalize_advantages=True)
    ours = leave_one_out_advantages(rewards, group_size=3)
    torch.testing.assert_close(output["advantages"], ours / (ours.std() + 1e-4))


def test_trl_defaults_are_the_ones_the_page_prints():
    from trl import RLOOConfig

    fields = RLOOConfig.__dataclass_fields__
    defaults = {
        name: fields[name].default for name in ["num_generations", "beta", "epsilon", "num_iterations"]
    }
    assert defaults == {"num_generations": 2, "beta": 0.05, "epsilon": 0.2, "num_iterations": 1}
    assert fields["normalize_advantages"].default is False and fields["steps_per_generation"].default is None


def test_matches_verl():
    """组大小 4 与 2 时两个函数都与我们一致；单条的组，一个给原始奖励，另一个给 0。"""
    index, mask = GOLDEN["index"], tensor(GOLDEN["mask"])
    for name, singleton in [
        ("compute_rloo_outcome_advantage", 0.7),
        ("compute_rloo_vectorized_outcome_advantage", 0.0),
    ]:
        theirs = tensor(GOLDEN["advantages"][name])
        for key in "abc":
            rows = [i for i, x in enumerate(index) if x == key]
            rewards = tensor([GOLDEN["rewards"][i] for i in rows])
            ours = tensor([singleton]) if key == "b" else rloo(rewards)
            torch.testing.assert_close(theirs[rows], ours[:, None] * mask[rows])


# ---- 性质 ----


def test_equals_scaled_mean_centering():
    rewards = randn(12, seed=7)
    for group_size in [2, 3, 4, 6]:
        centred = group_advantages(rewards, group_size=group_size, scale_by_std=False)
        ours = leave_one_out_advantages(rewards, group_size=group_size)
        torch.testing.assert_close(ours, group_size / (group_size - 1) * centred)


def test_each_baseline_ignores_the_own_reward():
    """只改第 2 条的奖励：它自己的优势变化量等于奖励的变化量，别人各变 −Δ/(G−1)。"""
    rewards = randn(4, seed=8)
    changed = rewards + tensor([0.0, 0.6, 0.0, 0.0])
    torch.testing.assert_close(rloo(changed) - rloo(rewards), tensor([-0.2, 0.6, -0.2, -0.2]))


def test_group_advantages_sum_to_zero_and_groups_do_not_mix():
    rewards = randn(6, seed=9)
    ours = leave_one_out_advantages(rewards, group_size=3)
    torch.testing.assert_close(ours.view(2, 3).sum(1), torch.zeros(2, dtype=torch.float64))
    torch.testing.assert_close(ours, torch.cat([rloo(rewards[:3]), rloo(rewards[3:])]))


def test_first_step_gradient_is_reinforce():
    """ρ=1：TRL 的损失与论文的损失梯度相同，数值一个是 −Â，一个是 −Â log π。"""
    log_probs, _, advantages, mask = ragged_case(0.0)
    leaf = log_probs.clone().requires_grad_()
    ratio_form = rloo_loss(leaf, log_probs, advantages, mask)
    paper_form = reinforce_loss(leaf, advantages, mask)
    torch.testing.assert_close(ratio_form.detach(), -advantages)
    torch.testing.assert_close(
        torch.autograd.grad(ratio_form.sum(), leaf)[0], torch.autograd.grad(paper_form.sum(), leaf)[0]
    )


def test_one_token_responses_reduce_to_ppo_clip():
    log_probs, old, advantages, _ = ragged_case(0.4)
    mask = torch.ones(6, 1, dtype=torch.bool)
    ours = rloo_loss(log_probs[:, :1], old[:, :1], advantages, mask, clip_low=0.1, clip_high=0.3)
    token = clipped_surrogate_loss(
        log_probs[:, :1], old[:, :1], advantages[:, None], clip_low=0.1, clip_high=0.3
    )
    torch.testing.assert_close(ours, token[:, 0])


def test_padding_changes_nothing():
    """填充处放 −inf：数值不变，梯度为 0。"""
    log_probs, old, advantages, mask = ragged_case(0.1)
    padded = log_probs.masked_fill(~mask, -math.inf).requires_grad_()
    padded_old = old.masked_fill(~mask, -math.inf)
    for ours, dirty in [
        (rloo_loss(log_probs, old, advantages, mask), rloo_loss(padded, padded_old, advantages, mask)),
        (reinforce_loss(log_probs, advantages, mask), reinforce_loss(padded, advantages, mask)),
    ]:
        torch.testing.assert_close(dirty.detach(), ours)
        gradient = torch.autograd.grad(dirty.sum(), padded)[0]
        assert not gradient[~mask].any() and gradient[mask].isfinite().all()
    shaped = kl_penalized_rewards(advantages, padded, padded_old, mask)
    torch.testing.assert_close(shaped, kl_penalized_rewards(advantages, log_probs, old, mask))


def test_shaped_rewards_and_advantages_carry_no_gradient():
    log_probs, ref, rewards, mask = ragged_case(0.1)
    leaf = log_probs.clone().requires_grad_()
    shaped = kl_penalized_rewards(rewards, leaf, ref, mask)
    assert not shaped.requires_grad
    advantages = rewards.clone().requires_grad_()
    assert torch.autograd.grad(
        reinforce_loss(leaf, advantages, mask).sum(), advantages, allow_unused=True
    ) == (None,)
    old = ref.clone().requires_grad_()
    loss = rloo_loss(leaf, old, rewards, mask).sum()
    assert torch.autograd.grad(loss, old, allow_unused=True) == (None,)


def test_float32_in_float32_out():
    log_probs, old, rewards, mask = ragged_case(0.1)
    log_probs, old, rewards = log_probs.float(), old.float(), rewards.float()
    assert leave_one_out_advantages(rewards, group_size=2).dtype == torch.float32
    assert rloo_loss(log_probs, old, rewards, mask).dtype == torch.float32
    assert reinforce_loss(log_probs, rewards, mask).dtype == torch.float32
    assert kl_penalized_rewards(rewards, log_probs, old, mask).dtype == torch.float32


# ---- 边界 ----


def test_nothing_is_clamped_beyond_the_clip_itself():
    """手算：对数比值 +30、Â=−2 的损失是 2e³⁰，梯度同样大；k1 之和 −40、β=1 时奖励加 40；奖励差 200，优势 ±200。"""
    old, mask = tensor([[-35.0, -1.0]]), torch.ones(1, 2, dtype=torch.bool)
    leaf = (old + tensor([[30.0, 0.0]])).requires_grad_()
    loss = rloo_loss(leaf, old, tensor([-2.0]), mask)
    torch.testing.assert_close(loss, tensor([2 * math.exp(30)]))
    gradient = torch.autograd.grad(loss.sum(), leaf)[0]
    torch.testing.assert_close(gradient, torch.full_like(old, 2 * math.exp(30)))
    shaped = kl_penalized_rewards(tensor([1.0]), old, old + tensor([[39.0, 1.0]]), mask, kl_coef=1.0)
    torch.testing.assert_close(shaped, tensor([41.0]))
    torch.testing.assert_close(rloo(tensor([150.0, -50.0])), tensor([200.0, -200.0]))


@pytest.mark.parametrize("group_size", [1, 0, -2])
def test_a_single_answer_is_refused_with_a_cure(group_size):
    with pytest.raises(ValueError, match="至少要 2 条.*ReMax"):
        leave_one_out_advantages(tensor([1.0, 0.0]), group_size=group_size)


def test_incomplete_groups_are_refused():
    with pytest.raises(ValueError, match="7 行不能分成每组 3 条"):
        leave_one_out_advantages(randn(7), group_size=3)


def test_equal_rewards_give_zero_advantages():
    assert rloo(tensor([0.5, 0.5, 0.5])).abs().max() < 1e-15


# ---- 流传的错误写法，必须被上面的真值拒绝 ----


def includes_the_own_sample(rewards):
    return rewards - rewards.mean()


def sum_of_others_over_g(rewards):
    return rewards - (rewards.sum() - rewards) / len(rewards)


def all_rewards_over_g_minus_one(rewards):
    return rewards - rewards.sum() / (len(rewards) - 1)


def sum_of_others_without_averaging(rewards):
    return rewards - (rewards.sum() - rewards)


def divided_by_std(rewards):
    return rloo(rewards) / rewards.std().clamp_min(1e-6)


def inverse_factor(rewards):
    return (len(rewards) - 1) / len(rewards) * (rewards - rewards.mean())


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("wrong", "biased"),
    [
        (includes_the_own_sample, True),
        (all_rewards_over_g_minus_one, True),
        (divided_by_std, True),
        (inverse_factor, True),
        # 下面两种只含别人的奖励，所以仍然无偏；错在奖励平移会漏进优势，方差变大
        (sum_of_others_over_g, False),
        (sum_of_others_without_averaging, False),
    ],
    ids=lambda x: x.__name__ if callable(x) else None,
)
def test_wrong_baselines_are_rejected(wrong, biased):
    """G=3。有偏的四种：期望与真梯度差 20% 以上；另两种期望没错，但奖励加 3 之后总方差至少是留一的 2 倍。"""
    truth = true_gradient(LOGITS, REWARDS)
    mean, _ = moments(wrong, 3)
    relative = ((mean - truth).norm() / truth.norm()).item()
    torch.testing.assert_close(moments(rloo, 3)[0], truth)
    assert relative > 0.2 if biased else relative < 1e-12
    if not biased:
        assert moments(lambda r: wrong(r + 3), 3)[1] > 2 * moments(rloo, 3)[1]
    assert not torch.allclose(wrong(tensor([1.0, 0.0, 0.5])), rloo(tensor([1.0, 0.0, 0.5])), atol=0.1)


def mean_log_prob(log_probs, old_log_probs, advantages, mask):
    return -advantages * sequence_log_probs(log_probs, mask) / mask.sum(1)


def token_ratio(log_probs, old_log_probs, advantages, mask):
    losses = clipped_surrogate_loss(
        log_probs, old_log_probs, advantages[:, None], clip_low=1.0, clip_high=math.inf
    )
    return (losses * mask).sum(1)


def length_normalised_ratio(log_probs, old_log_probs, advantages, mask):
    log_ratio = sequence_log_probs(log_probs - old_log_probs, mask) / mask.sum(1)
    return -log_ratio.exp() * advantages


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("wrong", "sampler"),
    [(mean_log_prob, THETA), (token_ratio, OLD_THETA), (length_normalised_ratio, OLD_THETA)],
    ids=lambda x: x.__name__ if callable(x) else None,
)
def test_wrong_sequence_losses_are_rejected(wrong, sampler):
    """对 token 求平均、逐 token 的比值、按长度开方的比值：期望梯度与真值差 20% 以上，且夹角大于 5°。"""
    truth = objective_gradient(THETA).flatten()
    theirs = expected_gradient(wrong, RESPONSE_REWARDS, sampler=sampler).flatten()
    ours = expected_gradient(no_clip, RESPONSE_REWARDS, sampler=sampler).flatten()
    torch.testing.assert_close(ours, truth)
    assert (theirs - truth).norm() / truth.norm() > 0.2 and angle(theirs, truth) > 5


@pytest.mark.rejects
def test_kl_with_the_wrong_sign_is_rejected():
    """把减号写成加号：期望梯度变成「奖励 + βKL」的梯度，与真值差 2β∇KL，这里是 40% 以上。"""
    log_probs, ref = response_log_probs(THETA), response_log_probs(REF_THETA)
    flipped = kl_penalized_rewards(RESPONSE_REWARDS, log_probs, ref, MASK, kl_coef=-0.3)
    truth = objective_gradient(THETA, kl_coef=0.3)
    theirs = expected_gradient(plain, flipped)
    torch.testing.assert_close(theirs, objective_gradient(THETA, kl_coef=-0.3))
    assert (theirs - truth).norm() / truth.norm() > 0.4


@pytest.mark.rejects
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_k1_in_the_loss_does_nothing_whatever_its_sign(sign):
    """k1 直接加进损失，期望梯度是 ±β E[∇log π] = 0，等于没有 KL；与带 KL 的真值差 20% 以上。"""
    ref = response_log_probs(REF_THETA)

    def k1_in_loss(log_probs, old_log_probs, advantages, mask):
        k1 = sequence_log_probs(log_probs, mask) - sequence_log_probs(ref, MASK).repeat(len(log_probs) // 15)
        return reinforce_loss(log_probs, advantages, mask) + sign * 0.3 * k1

    theirs = expected_gradient(k1_in_loss, RESPONSE_REWARDS)
    truth = objective_gradient(THETA, kl_coef=0.3)
    torch.testing.assert_close(theirs, objective_gradient(THETA))
    assert (theirs - truth).norm() / truth.norm() > 0.2


@pytest.mark.rejects
def test_std_of_the_others_explodes():
    """留一均值再除以「其余几条」的标准差：(1,0,0,0) 里第一条的其余全是 0，标准差 0，ε=1e-6 时优势是一百万。"""
    rewards = tensor([1.0, 0.0, 0.0, 0.0])
    others = torch.stack([torch.cat([rewards[:i], rewards[i + 1 :]]) for i in range(4)])
    exploded = rloo(rewards) / (others.std(1) + 1e-6)
    assert exploded[0].item() == pytest.approx(1e6)
    assert rloo(rewards).abs().max().item() == 1.0
