r"""ReMax：贪心回答的奖励当基线。

真值来自与公式无关的地方：小策略的全部回答逐条枚举，期望是精确求和；真梯度是 $\mathbb E[r]$ 的自动微分与有限差分；
组的估计量枚举全部的组；token 级优势对照 verl 0.9.1 的冻结数值（`tests/golden/make_remax.py` 生成）。

策略：词表 3（第 2 个 token 是结束符）、至多 3 个 token、每个前缀一组 logits，共 15 种回答，长度 1 到 3 不等。
长度可变很要紧：几种错误写法在等长时看不出来。
"""

import itertools
import json
from pathlib import Path

import pytest
import torch

from snippets.rl.masking import aggregate_loss
from snippets.rl.remax import (
    baseline_gradient_variance,
    leave_one_out_gradient_variance,
    remax_advantages,
    remax_loss,
    remax_token_advantages,
)
from snippets.rl.rloo import leave_one_out_advantages, optimal_constant_baseline

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "remax.json").read_text())
VOCAB_SIZE, MAX_LENGTH, EOS = 3, 3, 2
PREFIXES = [p for n in range(MAX_LENGTH) for p in itertools.product(range(EOS), repeat=n)]
RESPONSES = [p + (EOS,) for p in PREFIXES] + list(itertools.product(range(EOS), repeat=MAX_LENGTH))
MASK = torch.tensor([[t < len(y) for t in range(MAX_LENGTH)] for y in RESPONSES])
LENGTHS = MASK.sum(1).double()
SEEDS = range(4)


class Tabular:
    """一个提示下的策略：全部回答的逐 token 对数概率、概率、得分，以及一组随机奖励。"""

    def __init__(self, seed, *, sharpness=1.0):
        generator = torch.Generator().manual_seed(seed)
        shape = (len(PREFIXES), VOCAB_SIZE)
        self.theta = torch.randn(shape, generator=generator, dtype=torch.float64) * sharpness
        self.theta.requires_grad_(True)
        self.rewards = torch.rand(len(RESPONSES), generator=generator, dtype=torch.float64)
        self.token_log_probs = token_log_probs(self.theta)
        self.log_probs = self.token_log_probs.sum(1)
        self.probs = self.log_probs.detach().exp()
        self.scores = torch.stack([self.grad(row) for row in self.log_probs])
        self.true_gradient = self.grad((self.log_probs.exp() * self.rewards).sum())
        self.greedy = RESPONSES.index(greedy_response(self.theta.detach()))
        self.baseline = self.rewards[self.greedy]

    def grad(self, scalar):
        return torch.autograd.grad(scalar, self.theta, retain_graph=True)[0].flatten()

    def expected(self, token_advantages):
        """优势形状是 (回答, token)；返回 Σ_t Â_t ∇log π(y_t) 对全部回答的精确期望。"""
        return self.grad((self.probs[:, None] * token_advantages * self.token_log_probs * MASK).sum())


def token_log_probs(theta):
    table = theta.log_softmax(-1)
    rows = []
    for y in RESPONSES:
        row = [table[PREFIXES.index(y[:t]), token] for t, token in enumerate(y)]
        rows.append(torch.stack(row + [torch.zeros((), dtype=theta.dtype)] * (MAX_LENGTH - len(y))))
    return torch.stack(rows)


def greedy_response(theta, pick=None):
    """逐 token 取 argmax，直到结束符或长度上限；`pick` 用来在并列时换一个选法。"""
    pick = pick or (lambda row: int(row.argmax()))
    y = ()
    while len(y) < MAX_LENGTH and (not y or y[-1] != EOS):
        y += (pick(theta[PREFIXES.index(y)]),)
    return y


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


def wide(per_response):
    return per_response[:, None].expand(-1, MAX_LENGTH)


# ---------------------------------------------------------------- 手算


def test_advantage_is_sampled_minus_greedy():
    """采样 0.9、0.2，贪心 0.5、0.5：优势 +0.4、−0.3，不除以标准差。"""
    advantages = remax_advantages(torch.tensor([0.9, 0.2]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(advantages, torch.tensor([0.4, -0.3]))


def test_token_advantages_by_hand():
    """逐 token 奖励 −0.1、−0.2、1.0：回报 0.7、0.8、1.0；基线 0.5 每个位置只减一次，得 0.2、0.3、0.5。"""
    advantages = remax_token_advantages(
        torch.tensor([[-0.1, -0.2, 1.0, 9.0]]),
        torch.tensor([0.5]),
        torch.tensor([[True, True, True, False]]),
    )
    torch.testing.assert_close(advantages, torch.tensor([[0.2, 0.3, 0.5, 0.0]]))


def test_loss_by_hand():
    """对数概率之和 −3、−1（填充处的 −7 不算），优势 +0.5、−1：损失 −(−1.5 + 1)/2 = 0.25。"""
    loss = remax_loss(
        torch.tensor([[-1.0, -2.0], [-1.0, -7.0]]),
        torch.tensor([1.0, 0.0]),
        torch.tensor([0.5, 1.0]),
        torch.tensor([[True, True], [True, False]]),
    )
    assert loss.item() == pytest.approx(0.25)


def two_arms(p, good, bad):
    """softmax 两臂：概率 p、1−p；得分 s = onehot − π，所以 ‖s‖² 是 2(1−p)²、2p²。"""
    probs = torch.tensor([p, 1 - p], dtype=torch.float64)
    return probs, torch.tensor([good, bad], dtype=torch.float64), torch.eye(2, dtype=torch.float64) - probs


@pytest.mark.parametrize(("p", "good", "bad"), [(0.3, 2.0, 1.0), (0.8, 1.0, 0.0), (0.6, 0.2, -1.0)])
def test_two_arm_variance_by_hand(p, good, bad):
    r"""$\mathbb E[(r-b)^2\lVert s\rVert^2]=2p(1-p)[(1-p)(r_1-b)^2+p(r_2-b)^2]$，$b^*=(1-p)r_1+p\,r_2$，权重与概率相反。"""
    probs, rewards, scores = two_arms(p, good, bad)
    gradient_square = 2 * (p * (1 - p) * (good - bad)) ** 2
    for b in (0.0, 0.7):
        by_hand = 2 * p * (1 - p) * ((1 - p) * (good - b) ** 2 + p * (bad - b) ** 2) - gradient_square
        assert baseline_gradient_variance(probs, rewards, scores, baseline=b).item() == pytest.approx(by_hand)
    assert optimal_constant_baseline(probs, rewards, scores).item() == pytest.approx((1 - p) * good + p * bad)


# ---------------------------------------------------------------- 对照


def test_token_advantages_equal_frozen_verl():
    mask = torch.tensor(GOLDEN["response_mask"]).bool()
    rewards = torch.tensor(GOLDEN["token_rewards"], dtype=torch.float64)
    ours = remax_token_advantages(rewards, torch.tensor(GOLDEN["greedy_rewards"], dtype=torch.float64), mask)
    verl = torch.tensor(GOLDEN["advantages"], dtype=torch.float64)
    torch.testing.assert_close(ours, verl.masked_fill(~mask, 0.0))
    # verl 在夹在中间的工具 token（第 2 行第 2、3 列）留下没减基线的回报 0.45；损失里会被掩码去掉
    assert GOLDEN["advantages"][2][2:4] == pytest.approx([0.45, 0.45])
    assert (verl[~mask] != 0).sum() == 2  # 其余掩码为假处都是 0


def test_greedy_baseline_leaves_the_expected_gradient_exact():
    for seed in SEEDS:
        policy = Tabular(seed)
        advantages = remax_advantages(policy.rewards, policy.baseline.expand(len(RESPONSES)))
        torch.testing.assert_close(policy.expected(wide(advantages)), policy.true_gradient)


def test_loss_gradient_is_minus_the_gradient_of_the_exact_objective():
    """逐条回答调用 `remax_loss`，梯度按概率加权，等于 −∇E[r]；真值另用有限差分算一遍。"""
    policy = Tabular(0)
    total = torch.zeros_like(policy.true_gradient)
    for index, probability in enumerate(policy.probs):
        row = slice(index, index + 1)
        loss = remax_loss(policy.token_log_probs[row], policy.rewards[row], policy.baseline[None], MASK[row])
        total += probability * policy.grad(loss)
    torch.testing.assert_close(total, -policy.true_gradient)

    step, differences = 1e-6, []
    for index in range(policy.theta.numel()):
        values = []
        for sign in (1, -1):
            theta = policy.theta.detach().clone()
            theta.view(-1)[index] += sign * step
            values.append((token_log_probs(theta).sum(1).exp() * policy.rewards).sum())
        differences.append((values[0] - values[1]) / (2 * step))
    torch.testing.assert_close(-total, torch.stack(differences), rtol=1e-6, atol=1e-9)  # 差分本身的误差


def test_token_level_kl_rewards_stay_unbiased():
    """KL 进奖励：真值是 E[r − β log(π/π_ref)] 的自动微分；基线含不含 KL 都无偏。"""
    policy, reference = Tabular(0), Tabular(9)
    beta = 0.3
    ratios = policy.token_log_probs - reference.token_log_probs.detach()  # 逐 token 的 k1
    objective = (policy.log_probs.exp() * (policy.rewards - beta * ratios.sum(1))).sum()
    token_rewards = (-beta * ratios).detach()
    token_rewards[torch.arange(len(RESPONSES)), MASK.sum(1) - 1] += policy.rewards
    shaped = token_rewards[policy.greedy].sum()
    for baseline in (policy.baseline, shaped):
        advantages = remax_token_advantages(token_rewards, baseline.expand(len(RESPONSES)), MASK)
        torch.testing.assert_close(policy.expected(advantages), policy.grad(objective))


def test_variance_equals_the_trace_of_the_enumerated_covariance():
    policy = Tabular(1)
    samples = (policy.rewards - policy.baseline)[:, None] * policy.scores
    mean = policy.probs @ samples
    trace = (policy.probs[:, None] * (samples - mean).square()).sum()
    variance = baseline_gradient_variance(
        policy.probs, policy.rewards, policy.scores, baseline=policy.baseline.item()
    )
    torch.testing.assert_close(variance, trace)


@pytest.mark.parametrize("group_size", [2, 3])
def test_leave_one_out_variance_equals_enumeration_of_all_groups(group_size):
    policy = Tabular(2)
    groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=group_size)))
    advantages = leave_one_out_advantages(policy.rewards[groups].flatten(), group_size=group_size)
    estimates = (advantages.view(-1, group_size, 1) * policy.scores[groups]).mean(1)
    weights = policy.probs[groups].prod(1)[:, None]
    torch.testing.assert_close((weights * estimates).sum(0), policy.true_gradient)
    trace = (weights * (estimates - policy.true_gradient).square()).sum()
    closed_form = leave_one_out_gradient_variance(
        policy.probs, policy.rewards, policy.scores, group_size=group_size
    )
    torch.testing.assert_close(closed_form, trace)


# ---------------------------------------------------------------- 性质


def test_gradient_only_compares_other_responses_with_the_greedy_one():
    """采到贪心回答时优势是 0，梯度全来自其余回答，和仍是真梯度。"""
    policy = Tabular(3)
    advantages = remax_advantages(policy.rewards, policy.baseline.expand(len(RESPONSES)))
    assert advantages[policy.greedy] == 0
    others = torch.arange(len(RESPONSES)) != policy.greedy
    weights = policy.probs * advantages
    torch.testing.assert_close(weights[others] @ policy.scores[others], policy.true_gradient)


def test_reward_offset_cancels_exactly():
    rewards, greedy = torch.tensor([0.5, -1.25]), torch.tensor([0.25, 2.0])
    assert torch.equal(remax_advantages(rewards + 4, greedy + 4), remax_advantages(rewards, greedy))


def test_large_reward_gaps_are_not_clipped():
    """奖励差 ±100：优势与损失都原样放大；官方代码截到 ±5，论文没有。"""
    rewards, greedy = torch.tensor([100.0, 0.0]), torch.tensor([0.0, 100.0])
    torch.testing.assert_close(remax_advantages(rewards, greedy), torch.tensor([100.0, -100.0]))
    log_probs = torch.tensor([[-1.0], [-3.0]], requires_grad=True)
    remax_loss(log_probs, rewards, greedy, torch.ones(2, 1).bool()).backward()
    torch.testing.assert_close(log_probs.grad, torch.tensor([[-50.0], [50.0]]))


def test_no_gradient_flows_through_either_reward():
    rewards = torch.tensor([1.0, 0.0], requires_grad=True)
    greedy = torch.tensor([0.5, 0.5], requires_grad=True)
    assert not remax_advantages(rewards, greedy).requires_grad
    token_rewards, mask = torch.ones(2, 3, requires_grad=True), torch.ones(2, 3).bool()
    assert not remax_token_advantages(token_rewards, greedy, mask).requires_grad


def test_greedy_response_of_the_reference_policy_is_also_unbiased():
    """换成参考策略的贪心回答，基线仍与采样无关，所以也无偏；它不是 ReMax，方差一般不同。"""
    different = 0
    for seed in SEEDS:
        policy, reference = Tabular(seed), Tabular(seed + 100)
        baseline = policy.rewards[reference.greedy]
        torch.testing.assert_close(policy.expected(wide(policy.rewards - baseline)), policy.true_gradient)
        different += baseline.item() != policy.baseline.item()
    assert different >= 3  # 有的种子两个策略恰好选了同一条


def test_separate_sample_used_only_as_baseline_is_unbiased_but_noisier():
    """另采一条、只当基线、自己不训练：无偏；方差比 E[r] 基线多 E‖s‖²·Var r。"""
    policy = Tabular(0)
    pairs = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=2)))
    weights = policy.probs[pairs].prod(1)[:, None]
    advantages = policy.rewards[pairs[:, 0]] - policy.rewards[pairs[:, 1]]
    estimates = advantages[:, None] * policy.scores[pairs[:, 0]]
    torch.testing.assert_close((weights * estimates).sum(0), policy.true_gradient)
    mean = (policy.probs * policy.rewards).sum()
    noise = (policy.probs @ policy.scores.square().sum(1)) * (policy.probs @ (policy.rewards - mean).square())
    expected = noise + baseline_gradient_variance(
        policy.probs, policy.rewards, policy.scores, baseline=mean.item()
    )
    trace = (weights * (estimates - policy.true_gradient).square()).sum()
    torch.testing.assert_close(trace, expected)


def test_excess_variance_is_quadratic_in_the_distance_to_the_optimal_baseline():
    policy = Tabular(1)
    arguments = (policy.probs, policy.rewards, policy.scores)
    best = optimal_constant_baseline(*arguments)
    minimum = baseline_gradient_variance(*arguments, baseline=best.item())
    score_square = policy.probs @ policy.scores.square().sum(1)
    for baseline in (0.0, policy.baseline.item(), -2.0):
        excess = baseline_gradient_variance(*arguments, baseline=baseline) - minimum
        torch.testing.assert_close(excess, score_square * (baseline - best).square())


def test_greedy_baseline_helps_exactly_when_it_is_nearer_to_the_optimum_than_zero():
    verdicts = set()
    for seed in range(40):
        policy = Tabular(seed, sharpness=1.5)
        rewards = (policy.rewards > 0.5).double() + (seed % 3) * 0.5  # 0/1 奖励加不同的偏移
        arguments = (policy.probs, rewards, policy.scores)
        greedy, best = rewards[policy.greedy].item(), optimal_constant_baseline(*arguments).item()
        helps = baseline_gradient_variance(*arguments, baseline=greedy) < baseline_gradient_variance(
            *arguments, baseline=0.0
        )
        if greedy != 0:
            assert helps.item() == (0 < greedy < 2 * best)
            verdicts.add(helps.item())
    assert verdicts == {True, False}


def test_two_arms_greedy_is_never_better_than_the_mean_reward():
    """到 b* 的距离：贪心 max(p, 1−p)·Δ，期望奖励 |1−2p|·Δ，前者总更大。"""
    for p in torch.linspace(0.05, 0.95, 19).tolist():
        probs, rewards, scores = two_arms(p, 3.0, 1.0)
        best = optimal_constant_baseline(probs, rewards, scores)
        greedy, mean = rewards[probs.argmax()], probs @ rewards
        assert (greedy - best).abs().item() == pytest.approx(2 * max(p, 1 - p))
        assert (mean - best).abs().item() == pytest.approx(2 * abs(1 - 2 * p))
        assert (greedy - best).abs() > (mean - best).abs()


def test_two_arms_positive_rewards_below_one_half_always_helps():
    """奖励都为正、好的一臂概率不到一半：贪心基线的方差一定比不减基线小。"""
    for p in (0.05, 0.2, 0.35, 0.49):
        for good, bad in ((1.0, 0.1), (5.0, 4.0), (3.0, 0.01)):
            probs, rewards, scores = two_arms(p, good, bad)
            with_greedy = baseline_gradient_variance(probs, rewards, scores, baseline=bad)
            assert with_greedy < baseline_gradient_variance(probs, rewards, scores, baseline=0.0)


def test_two_arms_positive_rewards_above_one_half_helps_until_the_policy_is_too_sharp():
    """奖励都为正、好的一臂概率过半：贪心基线有用，当且仅当 p < r₁/(2Δ)。"""
    verdicts = set()
    for p in (0.55, 0.7, 0.85, 0.95):
        for good, bad in ((1.0, 0.1), (5.0, 4.0), (3.0, 1.2)):
            probs, rewards, scores = two_arms(p, good, bad)
            with_greedy = baseline_gradient_variance(probs, rewards, scores, baseline=good)
            helps = (with_greedy < baseline_gradient_variance(probs, rewards, scores, baseline=0.0)).item()
            assert helps == (p < good / (2 * (good - bad)))
            verdicts.add(helps)
    assert verdicts == {True, False}


def test_two_arms_zero_one_reward_greedy_never_helps():
    """0/1 奖励：贪心答错时与不减基线完全相同，答对时更大。"""
    for p in (0.1, 0.4, 0.6, 0.9):
        probs, rewards, scores = two_arms(p, 1.0, 0.0)
        greedy = rewards[probs.argmax()].item()
        with_greedy = baseline_gradient_variance(probs, rewards, scores, baseline=greedy)
        without = baseline_gradient_variance(probs, rewards, scores, baseline=0.0)
        assert torch.equal(with_greedy, without) if p < 0.5 else with_greedy > without


def test_at_equal_generation_budget_only_the_gap_between_greedy_and_mean_matters():
    r"""均匀策略下 ‖s‖² 与 r 无关，同样生成 G 条时两者的方差之差恰好是
    $\big[\mathbb E\lVert s\rVert^2(\hat r-\bar r)^2-\tfrac2G\lVert\nabla J\rVert^2\big]/(G-1)$，可正可负。
    """
    arms, generated, signs = 6, 4, set()
    probs = torch.full((arms,), 1 / arms, dtype=torch.float64)
    rewards = torch.tensor([1.5, 0.2, 0.9, 1.4, 2.0, 0.3], dtype=torch.float64)
    scores = torch.eye(arms, dtype=torch.float64) - probs
    gradient_square = ((probs * rewards) @ scores).square().sum()
    score_square, mean = probs @ scores.square().sum(1), probs @ rewards
    for greedy in (mean, rewards[4]):
        remax = baseline_gradient_variance(probs, rewards, scores, baseline=greedy.item()) / (generated - 1)
        rloo = leave_one_out_gradient_variance(probs, rewards, scores, group_size=generated)
        gap = score_square * (greedy - mean).square() - 2 / generated * gradient_square
        torch.testing.assert_close(remax - rloo, gap / (generated - 1))
        signs.add((remax > rloo).item())
    assert signs == {True, False}


# ---------------------------------------------------------------- 边界


def test_every_way_of_breaking_argmax_ties_is_unbiased():
    """并列时取哪一个都与采样无关，期望不变；基线的值会变，方差也跟着变。"""
    policy = Tabular(0)
    with torch.no_grad():
        policy.theta.copy_(policy.theta.round())
        policy.theta[:, 1] = policy.theta[:, 0] = policy.theta.amax(1)
    tied = Tabular.__new__(Tabular)
    tied.theta, tied.rewards = policy.theta, policy.rewards
    tied.token_log_probs = token_log_probs(tied.theta)
    tied.probs = tied.token_log_probs.detach().sum(1).exp()
    true_gradient = tied.grad((tied.token_log_probs.sum(1).exp() * tied.rewards).sum())
    baselines = set()
    for choice in (0, 1):
        answer = greedy_response(tied.theta.detach(), pick=lambda row, choice=choice: choice)
        baseline = tied.rewards[RESPONSES.index(answer)]
        baselines.add(baseline.item())
        torch.testing.assert_close(tied.expected(wide(tied.rewards - baseline)), true_gradient)
    assert len(baselines) == 2


def test_identical_responses_give_zero_gradient():
    log_probs = torch.full((2, 3), -0.5, requires_grad=True)
    loss = remax_loss(
        log_probs, torch.tensor([0.7, -2.0]), torch.tensor([0.7, -2.0]), torch.ones(2, 3).bool()
    )
    loss.backward()
    assert torch.equal(log_probs.grad, torch.zeros(2, 3))


def test_padding_never_leaks_even_when_it_is_nan():
    mask = torch.tensor([[True, True, False]])
    token_rewards = torch.tensor([[0.25, 1.0, float("nan")]])
    advantages = remax_token_advantages(token_rewards, torch.tensor([0.5]), mask)
    torch.testing.assert_close(advantages, torch.tensor([[0.75, 0.5, 0.0]]))
    log_probs = torch.tensor([[-1.0, -1.0, float("nan")]], requires_grad=True)
    remax_loss(log_probs, torch.tensor([1.0]), torch.tensor([0.0]), mask).backward()
    assert torch.equal(log_probs.grad, torch.tensor([[-1.0, -1.0, 0.0]]))


def test_fully_masked_row_gives_zero():
    advantages = remax_token_advantages(
        torch.ones(1, 2, dtype=torch.float32), torch.ones(1), torch.zeros(1, 2).bool()
    )
    assert torch.equal(advantages, torch.zeros(1, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_output_keeps_the_input_dtype(dtype):
    rewards, greedy, mask = torch.ones(2, dtype=dtype), torch.zeros(2, dtype=dtype), torch.ones(2, 3).bool()
    per_token = torch.ones(2, 3, dtype=dtype)
    assert remax_advantages(rewards, greedy).dtype == dtype
    assert remax_token_advantages(per_token, greedy, mask).dtype == dtype
    assert remax_loss(-per_token, rewards, greedy, mask).dtype == dtype


def test_one_member_group_is_refused():
    probs, rewards, scores = two_arms(0.5, 1.0, 0.0)
    with pytest.raises(ValueError, match="贪心基线"):
        leave_one_out_gradient_variance(probs, rewards, scores, group_size=1)


# ---------------------------------------------------------------- 错误写法必须被拒绝


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_subtracting_the_baseline_at_every_token_before_cumsum(seed):
    """每个 token 都减 b 再累加：期望恰好是 E[r − b|y|] 的梯度，多了长度惩罚。"""
    policy = Tabular(seed)
    token_rewards = torch.zeros(len(RESPONSES), MAX_LENGTH, dtype=torch.float64)
    token_rewards[torch.arange(len(RESPONSES)), MASK.sum(1) - 1] = policy.rewards
    ours = remax_token_advantages(token_rewards, policy.baseline.expand(len(RESPONSES)), MASK)
    wrong = remax_token_advantages(
        token_rewards - policy.baseline, torch.zeros(len(RESPONSES), dtype=torch.float64), MASK
    )
    assert relative_error(policy.expected(ours), policy.true_gradient) < 1e-12
    assert relative_error(policy.expected(wrong), policy.true_gradient) > 0.5
    penalized = (policy.log_probs.exp() * (policy.rewards - policy.baseline * LENGTHS)).sum()
    torch.testing.assert_close(policy.expected(wrong), policy.grad(penalized))


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_dividing_by_the_sampled_length(seed):
    """基线除以 |y|，或整条损失按长度平均：b 都会多出 −b∇E[1/|y|]，b > 0 时推着回答变长。"""
    policy = Tabular(seed)
    inverse = policy.grad((policy.log_probs.exp() / LENGTHS).sum())  # ∇E[1/|y|]
    divided = policy.expected(wide(policy.rewards - policy.baseline / LENGTHS))
    torch.testing.assert_close(divided, policy.true_gradient - policy.baseline * inverse)
    assert relative_error(divided, policy.true_gradient) > 0.3

    def seq_mean(advantages):
        total = torch.zeros_like(policy.true_gradient)
        for index, probability in enumerate(policy.probs):
            losses = -advantages[index] * policy.token_log_probs[index : index + 1]
            loss = aggregate_loss(losses, MASK[index : index + 1], mode="seq-mean-token-mean")
            total -= probability * policy.grad(loss)
        return total

    without = seq_mean(policy.rewards)
    with_greedy = seq_mean(remax_advantages(policy.rewards, policy.baseline.expand(len(RESPONSES))))
    torch.testing.assert_close(with_greedy, without - policy.baseline * inverse)
    assert relative_error(with_greedy, without) > 0.3


def expected_token_mean_weight(policy, batch):
    """每条回答在「全批 token 平均」里的期望权重 E[B/(|y| + 其余 B−1 条的长度之和)]，对长度分布精确卷积。"""
    one = torch.zeros(MAX_LENGTH + 1, dtype=torch.float64).index_add(0, MASK.sum(1), policy.probs)
    total = torch.ones(1, dtype=torch.float64)  # 其余各条的长度之和的分布
    for _ in range(batch - 1):
        total = torch.nn.functional.conv1d(total[None], one.flip(0)[None, None], padding=MAX_LENGTH)[0]
    return (total * batch / (LENGTHS[:, None] + torch.arange(len(total)))).sum(1)


@pytest.mark.parametrize("seed", SEEDS)
def test_token_mean_bias_shrinks_like_one_over_the_batch(seed):
    """全批 token 平均：减基线带来的偏差按 1/B 缩小，因为分母越来越像常数；一条时就是按长度平均。"""
    policy = Tabular(seed)

    def expected(rewards, batch):
        return (policy.probs * rewards * expected_token_mean_weight(policy, batch)) @ policy.scores

    def error(batch):
        without = expected(policy.rewards, batch)
        return relative_error(expected(policy.rewards - policy.baseline, batch), without)

    pairs = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=2)))
    weights = policy.probs[pairs].prod(1) / LENGTHS[pairs].sum(1)
    enumerated = ((weights[:, None] * policy.rewards[pairs])[..., None] * policy.scores[pairs]).sum((0, 1))
    torch.testing.assert_close(expected(policy.rewards, 2), enumerated)
    assert error(1) > 0.3 and error(128) < 0.03
    assert 64 * error(64) == pytest.approx(128 * error(128), rel=0.05)


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_discounting_the_difference_when_lengths_vary(seed):
    """折扣差值 γ^(T−t)·(r−b) 会改变期望梯度，因为系数依赖采到的长度；先折扣奖励、再减 b 反而不变。"""
    policy = Tabular(seed)
    discount = 0.95 ** (LENGTHS[:, None] - torch.arange(MAX_LENGTH) - 1).clamp(min=0)
    plain = policy.expected(discount * policy.rewards[:, None])
    after = policy.expected(discount * policy.rewards[:, None] - policy.baseline)
    both = policy.expected(discount * (policy.rewards - policy.baseline)[:, None])
    torch.testing.assert_close(after, plain)
    assert relative_error(both, plain) > 0.05


def test_position_baseline_from_the_greedy_response_is_not_wrong():
    """用贪心回答在同一位置的回报当基线：只依赖 t 与 θ，仍然无偏；不能与上面的写法混为一谈。"""
    policy = Tabular(0)
    per_position = torch.tensor([0.9, 0.4, -0.2], dtype=torch.float64)
    torch.testing.assert_close(policy.expected(policy.rewards[:, None] - per_position), policy.true_gradient)


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_letting_the_gradient_flow_through_the_baseline(seed):
    """基线含 KL 时对 θ 可导，不切断就多出 +H(π)∇b；把 E[r] − b 当目标则多出 −∇b。"""
    policy, reference = Tabular(seed), Tabular(seed + 9)
    baseline = policy.baseline - 0.3 * (
        policy.log_probs[policy.greedy] - reference.log_probs[policy.greedy].detach()
    )

    def expected(b):
        return policy.grad((policy.probs * (policy.rewards - b) * policy.log_probs).sum())

    ours = remax_advantages(policy.rewards, baseline.expand(len(RESPONSES)))
    torch.testing.assert_close(policy.expected(wide(ours)), policy.true_gradient)
    leaking = expected(baseline)
    entropy = -(policy.probs * policy.log_probs.detach()).sum()
    torch.testing.assert_close(leaking, policy.true_gradient + entropy * policy.grad(baseline))
    assert relative_error(leaking, policy.true_gradient) > 0.5
    objective = policy.grad((policy.log_probs.exp() * policy.rewards).sum() - baseline)
    assert relative_error(objective, policy.true_gradient) > 0.5


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_training_on_the_response_that_serves_as_baseline(seed):
    """基线换成采样的一条，又拿这一条自己训练（优势恒 0）：两条平均后只剩一半梯度。"""
    policy = Tabular(seed)
    pairs = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=2)))
    weights = policy.probs[pairs].prod(1)
    advantages = policy.rewards[pairs] - policy.rewards[pairs[:, 1:]]  # 第 1 列恒为 0
    wrong = ((weights[:, None] * advantages)[..., None] * policy.scores[pairs]).mean(1).sum(0)
    torch.testing.assert_close(wrong, policy.true_gradient / 2)
    assert relative_error(wrong, policy.true_gradient) > 0.49


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_the_group_maximum_as_baseline(seed):
    """把 Max 误解成组内最大奖励：基线含自己的奖励，有偏。"""
    policy = Tabular(seed)
    groups = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=3)))
    weights = policy.probs[groups].prod(1)
    rewards = policy.rewards[groups]
    advantages = rewards - rewards.amax(1, keepdim=True)
    wrong = ((weights[:, None] * advantages)[..., None] * policy.scores[groups]).mean(1).sum(0)
    assert relative_error(wrong, policy.true_gradient) > 0.05


@pytest.mark.rejects
@pytest.mark.parametrize("seed", SEEDS)
def test_rejects_mixing_the_greedy_response_into_the_group(seed):
    """把贪心回答当第三个样本一起减均值、一起训练：它不是采样来的，有偏。"""
    policy = Tabular(seed)
    pairs = torch.tensor(list(itertools.product(range(len(RESPONSES)), repeat=2)))
    groups = torch.cat([pairs, torch.full((len(pairs), 1), policy.greedy)], dim=1)
    weights = policy.probs[pairs].prod(1)
    advantages = leave_one_out_advantages(policy.rewards[groups].flatten(), group_size=3).view(-1, 3)
    wrong = ((weights[:, None] * advantages)[..., None] * policy.scores[groups]).mean(1).sum(0)
    assert relative_error(wrong, policy.true_gradient) > 0.2


@pytest.mark.rejects
def test_rejects_the_opposite_sign():
    policy = Tabular(0)
    wrong = policy.expected(wide(policy.baseline - policy.rewards))
    assert relative_error(wrong, policy.true_gradient) == pytest.approx(2.0)
