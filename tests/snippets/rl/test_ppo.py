r"""snippets/rl/ppo.py 的测试。

真值有四个来源，互不相同：(1) 手算的三步例子；(2) GAE 的定义：把各个 n 步优势写成 Python 列表再加权，$O(T^2)$，不用递推；
(3) 精确枚举：词表 3、最长 4 的全部 31 条回答，目标 $J=\mathbb E[R]-\beta\,\mathrm{KL}$ 对整张概率表用 autograd 求梯度；
(4) verl 0.9.1 与 OpenRLHF 0.11.2 跑出来后冻结的数值，见 tests/golden/make_ppo.py。
全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import json
import math
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards, ppo_loss, whiten

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "ppo.json").read_text(encoding="utf-8"))


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def boolean(rows):
    return torch.tensor(rows, dtype=torch.bool)


def random_batch(rows=5, length=7, seed=0):
    """随机奖励、价值与掩码；每行至少一个真，掩码里既有中间的洞也有尾部填充，掩码外也有非零的值。"""
    generator = torch.Generator().manual_seed(seed)
    rewards = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    values = torch.randn(rows, length, generator=generator, dtype=torch.float64)
    mask = torch.rand(rows, length, generator=generator) < 0.6
    mask[:, 1] = True
    return rewards, values, mask


def by_definition(rewards, values, mask, gamma, lam):
    """GAE 的定义：n 步优势的加权平均，最后一个拿走剩下的全部权重；逐行逐 token 用 Python 浮点数算。

    先把掩码为真的 token 抽出来连成一串，再在这一串上算，所以也说明了「跨过」掩码是什么意思。
    """
    advantages = torch.zeros_like(values)
    for row in range(values.shape[0]):
        kept = mask[row].nonzero().flatten().tolist()
        r, v = [rewards[row, i].item() for i in kept], [values[row, i].item() for i in kept]
        for t in range(len(kept)):
            longest = len(kept) - t
            total = 0.0
            for n in range(1, longest + 1):
                bootstrap = gamma**n * v[t + n] if n < longest else 0.0
                n_step = sum(gamma**i * r[t + i] for i in range(n)) + bootstrap - v[t]
                weight = (1 - lam) * lam ** (n - 1) if n < longest else lam ** (n - 1)
                total += weight * n_step
            advantages[row, kept[t]] = total
    return advantages


# ---- 精确枚举用的小语言：token 0、1 与 EOS（2），最长 4；每个前缀一行 logits ----

LENGTH, EOS, BETA = 4, 2, 0.3
PREFIXES = 2**LENGTH - 1


def all_responses():
    """31 条回答：(token, 掩码, 前缀编号)；EOS 之后是填充。"""
    rows = [[*bits, EOS] for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]
    rows += [list(bits) for bits in itertools.product((0, 1), repeat=LENGTH)]
    tokens = torch.full((len(rows), LENGTH), EOS)
    mask = torch.zeros(len(rows), LENGTH, dtype=torch.bool)
    prefix = torch.zeros(len(rows), LENGTH, dtype=torch.long)
    for i, row in enumerate(rows):
        tokens[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), True
        for t in range(len(row)):
            prefix[i, t] = 2**t - 1 + int("0" + "".join(map(str, row[:t])), 2)
    return tokens, mask, prefix


TOKENS, RESPONSE_MASK, PREFIX = all_responses()


def toy(seed=0):
    """参考策略、离开它一段的当前策略、每条回答的得分。"""
    generator = torch.Generator().manual_seed(seed)
    ref_logits = torch.randn(PREFIXES, 3, generator=generator, dtype=torch.float64)
    logits = ref_logits + 0.7 * torch.randn(PREFIXES, 3, generator=generator, dtype=torch.float64)
    scores = torch.randn(len(TOKENS), generator=generator, dtype=torch.float64)
    return logits, ref_logits, scores


def token_log_probs(logits):
    return logits.log_softmax(-1)[PREFIX, TOKENS]


def response_log_probs(logits):
    return token_log_probs(logits).masked_fill(~RESPONSE_MASK, 0.0).sum(1)


def objective(logits, ref_logits, scores, beta=BETA):
    """J = E[R] − β KL(π‖π_ref)，对 31 条回答求和。"""
    log_probs = response_log_probs(logits)
    return (log_probs.exp() * (scores - beta * (log_probs - response_log_probs(ref_logits)))).sum()


def expected_policy_gradient(logits, advantages):
    """E[Σ_t Â_t ∇log π(a_t|s_t)]：31 条回答按概率加权，优势当常数。"""
    leaf = logits.clone().requires_grad_()
    weights = response_log_probs(logits).exp()[:, None] * advantages.masked_fill(~RESPONSE_MASK, 0.0)
    return torch.autograd.grad((weights * token_log_probs(leaf)).sum(), leaf)[0]


def true_gradient(logits, ref_logits, scores, beta=BETA):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(objective(leaf, ref_logits, scores, beta), leaf)[0]


def toy_rewards(logits, ref_logits, scores, beta=BETA):
    return kl_shaped_rewards(
        scores, token_log_probs(logits), token_log_probs(ref_logits), RESPONSE_MASK, kl_coef=beta
    )


def exact_values(logits, token_rewards, gamma=1.0):
    """每个前缀的真实价值：往后的折扣奖励，对经过它的回答按概率平均。"""
    to_go = torch.zeros_like(token_rewards)
    running = torch.zeros(len(TOKENS), dtype=torch.float64)
    for t in reversed(range(LENGTH)):
        running = token_rewards[:, t] + gamma * running
        to_go[:, t] = running
    weights = response_log_probs(logits).exp()[:, None] * RESPONSE_MASK
    numerator = torch.zeros(PREFIXES, dtype=torch.float64)
    denominator = numerator.clone()
    numerator.index_add_(0, PREFIX.flatten(), (weights * to_go).flatten())
    denominator.index_add_(0, PREFIX.flatten(), weights.flatten())
    return numerator / denominator


# ---- 手算 ----


def test_three_steps_by_hand():
    """γ=1，r=(0,0,1)，V=(0.5,0.6,0.8)。δ=(0.6−0.5, 0.8−0.6, 1−0.8)=(0.1,0.2,0.2)。
    λ=0.5：Â₃=0.2，Â₂=0.2+0.5×0.2=0.3，Â₁=0.1+0.5×0.3=0.25；回归目标 Â+V=(0.75,0.9,1)。
    γ=0.9：δ=(0.54−0.5, 0.72−0.6, 0.2)=(0.04,0.12,0.2)，γλ=0.45：Â₂=0.12+0.09=0.21，Â₁=0.04+0.0945=0.1345。
    """
    args = tensor([[0, 0, 1.0]]), tensor([[0.5, 0.6, 0.8]]), boolean([[1, 1, 1]])
    advantages, returns = generalized_advantage(*args, gamma=1.0, lam=0.5)
    assert_close(advantages, tensor([[0.25, 0.3, 0.2]]))
    assert_close(returns, tensor([[0.75, 0.9, 1.0]]))
    advantages, _ = generalized_advantage(*args, gamma=0.9, lam=0.5)
    assert_close(advantages, tensor([[0.1345, 0.21, 0.2]]))


def test_defaults_are_gamma_one_and_lambda_095():
    """同一例子：Â₂=0.2+0.95×0.2=0.39，Â₁=0.1+0.95×0.39=0.4705。"""
    advantages, _ = generalized_advantage(
        tensor([[0, 0, 1.0]]), tensor([[0.5, 0.6, 0.8]]), boolean([[1, 1, 1]])
    )
    assert_close(advantages, tensor([[0.4705, 0.39, 0.2]]))


def test_kl_shaped_rewards_by_hand():
    """β=0.1。第一行三个 token：log π−log π_ref=(1,−2,0.5)，得分 2 在第三个：(−0.1, 0.2, 2−0.05)。
    第二行只有前两个有效：(−0.3, 1+0.1)，第三个是填充，0。β 的默认值 0.02 把惩罚变成五分之一。
    """
    log_probs = tensor([[-1.0, -3.0, -0.5], [-1.0, -2.0, -7.0]])
    ref_log_probs = tensor([[-2.0, -1.0, -1.0], [-4.0, -1.0, -1.0]])
    args = tensor([2.0, 1.0]), log_probs, ref_log_probs, boolean([[1, 1, 1], [1, 1, 0]])
    assert_close(kl_shaped_rewards(*args, kl_coef=0.1), tensor([[-0.1, 0.2, 1.95], [-0.3, 1.1, 0.0]]))
    assert_close(kl_shaped_rewards(*args), tensor([[-0.02, 0.04, 1.99], [-0.06, 1.02, 0.0]]))


def test_whiten_by_hand():
    """有效的是 1、2、6：均值 3，离差 (−2,−1,3)，平方和 14，除以 n−1=2 得方差 7。"""
    whitened = whiten(tensor([[1.0, 2.0], [6.0, 99.0]]), boolean([[1, 1], [1, 0]]))
    assert_close(whitened, tensor([[-2.0, -1.0], [3.0, 0.0]]) / math.sqrt(7 + 1e-8))


def test_whiten_adds_eps_to_the_variance():
    """值 ±1，样本方差 2；eps=2 时除以 sqrt(4)=2。全相同的优势方差 0，靠 eps 得到 0 而不是 NaN。"""
    assert_close(whiten(tensor([[1.0, -1.0]]), boolean([[1, 1]]), eps=2.0), tensor([[0.5, -0.5]]))
    assert_close(whiten(tensor([[3.0, 3.0]]), boolean([[1, 1]])), tensor([[0.0, 0.0]]))


def test_whole_loss_by_hand():
    """两个有效 token。ρ=(1.5,1)，Â=(1,−2)：裁剪损失 (−1.2, 2)。V=(0.1,0)，V_old=(0,0)，R=(1,2)，在裁剪宽度内：
    平方误差 (0.81,4)。熵 (0.7,0.5)。c_v=0.5、c_e=0.01：第一个 −1.2+0.405−0.007=−0.802，第二个 2+2−0.005=3.995。
    平均 1.5965；第三个是填充，不计入。熵系数默认 0：平均 1.6025。
    """
    args = (
        tensor([[math.log(1.5), 0.0, 5.0]]),
        tensor([[0.0, 0.0, 0.0]]),
        tensor([[1.0, -2.0, 9.0]]),
        tensor([[0.1, 0.0, 9.0]]),
        tensor([[0.0, 0.0, 0.0]]),
        tensor([[1.0, 2.0, 0.0]]),
        tensor([[0.7, 0.5, 9.0]]),
        boolean([[1, 1, 0]]),
    )
    assert_close(ppo_loss(*args, entropy_coef=0.01), tensor(1.5965))
    assert_close(ppo_loss(*args), tensor(1.6025))
    assert_close(ppo_loss(*args, value_coef=1.0), tensor(1.6025 + 0.5 * 4.81 / 2))


def test_whole_loss_clips_both_policy_and_value():
    """ρ=0.5、Â=−1：低于 0.8 被裁，损失 0.8。V=1、V_old=0、R=2、宽度 0.2：max((1−2)²,(0.2−2)²)=3.24。
    c_v=0.5：0.8+1.62=2.42。放宽到 clip_low=0.5、value_clip=1：0.5+0.5=1.0。ρ=1.5、Â=1、clip_high=0.28：−1.28+1.62。
    """

    def loss(ratio, advantage, **widths):
        one = [[1.0]]
        return ppo_loss(
            tensor([[math.log(ratio)]]),
            tensor([[0.0]]),
            tensor([[advantage]]),
            tensor(one),
            tensor([[0.0]]),
            tensor([[2.0]]),
            tensor([[0.0]]),
            boolean([[1]]),
            **widths,
        )

    assert_close(loss(0.5, -1.0), tensor(2.42))
    assert_close(loss(0.5, -1.0, clip_low=0.5, value_clip=1.0), tensor(1.0))
    assert_close(loss(1.5, 1.0, clip_high=0.28), tensor(0.34))


# ---- 与独立实现一致 ----


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_recursion_equals_the_weighted_n_step_definition(gamma, lam):
    batch = random_batch()
    advantages, returns = generalized_advantage(*batch, gamma=gamma, lam=lam)
    expected = by_definition(*batch, gamma, lam)
    assert_close(advantages, expected)
    assert_close(returns, expected + batch[1].masked_fill(~batch[2], 0.0))


def golden_inputs():
    data = {name: tensor(value) for name, value in GOLDEN["inputs"].items()}
    return data, data["mask"].bool()


def test_kl_shaped_rewards_match_verl_and_openrlhf():
    """OpenRLHF 的 compute_reward 不抹掉掩码外的 KL（它的前向已经抹过），所以只比掩码为真处。"""
    data, mask = golden_inputs()
    ours = kl_shaped_rewards(
        data["scores"], data["log_probs"], data["ref_log_probs"], mask, kl_coef=GOLDEN["kl_coef"]
    )
    assert_close(ours, tensor(GOLDEN["verl"]["token_rewards"]))
    assert_close(ours[mask], tensor(GOLDEN["openrlhf"]["token_rewards"])[mask])


@pytest.mark.parametrize("index", range(4))
def test_gae_and_whitening_match_verl(index):
    """verl 0.9.1 返回白化过的优势；未白化的优势用它的 returns − values 还原。"""
    data, mask = golden_inputs()
    gamma, lam = GOLDEN["settings"][index]
    frozen = GOLDEN["verl"]["gae"][index]
    rewards = tensor(GOLDEN["verl"]["token_rewards"])
    advantages, returns = generalized_advantage(rewards, data["values"], mask, gamma=gamma, lam=lam)
    assert_close(returns[mask], tensor(frozen["returns"])[mask])
    assert_close(advantages[mask], (tensor(frozen["returns"]) - data["values"])[mask])
    assert_close(whiten(advantages, mask)[mask], tensor(frozen["whitened"])[mask])


@pytest.mark.parametrize("index", range(4))
def test_openrlhf_treats_masked_tokens_as_steps_of_value_zero(index):
    """OpenRLHF 0.11.2：没有洞的两行与我们相同；有洞的行等于「洞是奖励 0、价值 0 的一步」，除 γ=λ=1 外与我们不同。"""
    data, mask = golden_inputs()
    gamma, lam = GOLDEN["settings"][index]
    frozen = tensor(GOLDEN["openrlhf"]["gae"][index]["advantages"])
    rewards = tensor(GOLDEN["verl"]["token_rewards"])
    ours, _ = generalized_advantage(rewards, data["values"], mask, gamma=gamma, lam=lam)
    assert_close(ours[:2][mask[:2]], frozen[:2][mask[:2]])
    as_steps, _ = generalized_advantage(
        rewards, data["values"] * mask, torch.ones_like(mask), gamma=gamma, lam=lam
    )
    assert_close(as_steps, frozen)
    gap = (ours - frozen)[2:][mask[2:]].abs().max().item()
    assert (gap < 1e-12) == (gamma == lam == 1.0)
    assert gap < 1e-12 or gap > 0.05


def test_kl_shaped_rewards_match_an_explicit_loop():
    generator = torch.Generator().manual_seed(5)
    log_probs, ref_log_probs = -torch.rand(2, 4, 6, generator=generator, dtype=torch.float64)
    scores = tensor([1.0, -2.0, 0.5, 3.0])
    mask = boolean([[1] * 6, [1, 1, 0, 0, 0, 0], [0, 1, 0, 0, 1, 0], [0, 0, 0, 1, 1, 1]])
    expected = torch.zeros(4, 6, dtype=torch.float64)
    for i in range(4):
        last = None
        for t in range(6):
            if mask[i, t]:
                expected[i, t] = 0.07 * (ref_log_probs[i, t] - log_probs[i, t])
                last = t
        expected[i, last] += scores[i]
    assert_close(kl_shaped_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=0.07), expected)


def loss_case(seed=1):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, 5)
    log_probs, old_log_probs, advantages, values, returns, entropy = torch.randn(
        6, *shape, generator=generator, dtype=torch.float64
    )
    old_values = values + 0.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    mask = torch.rand(shape, generator=generator) < 0.7
    return [log_probs, old_log_probs, advantages, values, old_values, returns, entropy.abs()], mask


COEFFICIENTS = {"value_coef": 0.4, "entropy_coef": 0.05}


def test_whole_loss_and_gradients_match_a_scalar_loop():
    """逐 token 用 if/else 写出三项的值与导数，再除以有效 token 数。"""
    parts, mask = loss_case()
    leaves = [part.clone().requires_grad_(i in (0, 3, 6)) for i, part in enumerate(parts)]
    loss = ppo_loss(*leaves, mask, **COEFFICIENTS)
    grads = torch.autograd.grad(loss, [leaves[0], leaves[3], leaves[6]])
    expected, expected_grads = 0.0, [torch.zeros(3, 5, dtype=torch.float64) for _ in range(3)]
    for i, t in mask.nonzero().tolist():
        log_prob, old, advantage, value, old_value, target, entropy = (part[i, t].item() for part in parts)
        ratio = math.exp(log_prob - old)
        clipped = (advantage > 0 and ratio > 1.2) or (advantage < 0 and ratio < 0.8)
        bound = (1.2 if advantage > 0 else 0.8) if clipped else ratio
        expected += -bound * advantage
        expected_grads[0][i, t] = 0.0 if clipped else -ratio * advantage
        near = min(max(value, old_value - 0.2), old_value + 0.2)
        worse_is_clipped = (near - target) ** 2 > (value - target) ** 2
        expected += 0.4 * ((near if worse_is_clipped else value) - target) ** 2
        expected_grads[1][i, t] = 0.0 if worse_is_clipped else 0.8 * (value - target)
        expected -= 0.05 * entropy
        expected_grads[2][i, t] = -0.05
    count = int(mask.sum())
    assert_close(loss, tensor(expected / count))
    for grad, expected_grad in zip(grads, expected_grads, strict=True):
        assert_close(grad, expected_grad / count)


def test_whole_loss_gradient_matches_finite_differences():
    parts, mask = loss_case()

    def scalar(log_probs, values, entropy):
        inputs = [log_probs, *parts[1:3], values, *parts[4:6], entropy]
        return ppo_loss(*inputs, mask, **COEFFICIENTS)

    leaves = [parts[i].clone().requires_grad_() for i in (0, 3, 6)]
    assert torch.autograd.gradcheck(scalar, leaves)


# ---- 恒等式与极限 ----


def test_lambda_zero_is_the_one_step_td_error():
    rewards, values, mask = random_batch()
    mask = torch.ones_like(mask)
    advantages, returns = generalized_advantage(rewards, values, mask, gamma=0.9, lam=0.0)
    next_values = torch.cat([values[:, 1:], torch.zeros(5, 1, dtype=torch.float64)], 1)
    assert_close(advantages, rewards + 0.9 * next_values - values)
    assert_close(returns, rewards + 0.9 * next_values)


def test_lambda_one_is_the_return_minus_the_value():
    rewards, values, mask = random_batch()
    mask = torch.ones_like(mask)
    advantages, returns = generalized_advantage(rewards, values, mask, gamma=0.9, lam=1.0)
    discounts = 0.9 ** torch.arange(7, dtype=torch.float64)
    monte_carlo = torch.stack([(rewards[:, t:] * discounts[: 7 - t]).sum(1) for t in range(7)], 1)
    assert_close(returns, monte_carlo)
    assert_close(advantages, monte_carlo - values)


@pytest.mark.parametrize("lam", [0.0, 0.5, 0.95, 1.0])
def test_exact_critic_gives_the_exact_gradient_for_every_lambda(lam):
    """价值精确时，任何 λ 的期望梯度都是 ∇J；KL 在奖励里，也算在 J 里。"""
    logits, ref_logits, scores = toy()
    rewards = toy_rewards(logits, ref_logits, scores)
    values = exact_values(logits, rewards)[PREFIX]
    advantages, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=1.0, lam=lam)
    assert_close(expected_policy_gradient(logits, advantages), true_gradient(logits, ref_logits, scores))


def test_lambda_one_is_unbiased_for_any_critic_and_smaller_lambda_is_not():
    logits, ref_logits, scores = toy()
    rewards = toy_rewards(logits, ref_logits, scores)
    generator = torch.Generator().manual_seed(9)
    wrong = torch.randn(PREFIXES, generator=generator, dtype=torch.float64)[PREFIX]
    truth = true_gradient(logits, ref_logits, scores)
    biases = []
    for lam in (1.0, 0.9, 0.5, 0.0):
        advantages, _ = generalized_advantage(rewards, wrong, RESPONSE_MASK, gamma=1.0, lam=lam)
        biases.append((expected_policy_gradient(logits, advantages) - truth).norm() / truth.norm())
    assert biases[0] < 1e-12
    assert 0.05 < biases[1] < biases[2] < biases[3]


def conditional_mean(logits, quantity):
    """E[quantity_t | s_t, a_t]，形状 (前缀, 3)。"""
    weights = response_log_probs(logits).exp()[:, None] * RESPONSE_MASK
    index = (PREFIX * 3 + TOKENS).flatten()
    numerator = torch.zeros(PREFIXES * 3, dtype=torch.float64)
    denominator = numerator.clone()
    numerator.index_add_(0, index, (weights * quantity).flatten())
    denominator.index_add_(0, index, weights.flatten())
    return (numerator / denominator).view(PREFIXES, 3)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
@pytest.mark.parametrize("lam", [0.0, 0.6, 1.0])
def test_bias_of_gae_is_a_baseline_shift_plus_one_minus_lambda_times_future_errors(gamma, lam):
    """V=V^π+e 时 E[Â_t|s,a]=A^π−e(s_t)+γ(1−λ)Σ_l(γλ)^l E[e(s_{t+l+1})|s,a]，终止状态的 e 是 0。"""
    logits, ref_logits, scores = toy(2)
    rewards = toy_rewards(logits, ref_logits, scores)
    value = exact_values(logits, rewards, gamma)
    generator = torch.Generator().manual_seed(4)
    error = torch.randn(PREFIXES, generator=generator, dtype=torch.float64)

    def estimate(values, lam):
        advantages, _ = generalized_advantage(rewards, values[PREFIX], RESPONSE_MASK, gamma=gamma, lam=lam)
        return conditional_mean(logits, advantages)

    future = torch.zeros_like(rewards)
    errors = error[PREFIX].masked_fill(~RESPONSE_MASK, 0.0)
    for t in range(LENGTH):
        for later in range(t + 1, LENGTH):
            future[:, t] += (gamma * lam) ** (later - t - 1) * errors[:, later]
    predicted = -error[:, None] + gamma * (1 - lam) * conditional_mean(logits, future)
    actual = estimate(value + error, lam) - estimate(value, 1.0)
    assert predicted.isfinite().all()  # 45 个（前缀，动作）都有回答经过
    assert_close(actual, predicted)


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_variance_with_an_exact_critic_is_the_discounted_sum_of_td_variances(lam):
    """V=V^π 时各步 TD 误差互不相关：Var(Â_0)=Σ_l(γλ)^{2l}Var(δ_l)，从同一个起点算。"""
    logits, ref_logits, scores = toy(3)
    rewards = toy_rewards(logits, ref_logits, scores)
    values = exact_values(logits, rewards, 0.9)[PREFIX]
    probs = response_log_probs(logits).exp()

    def variance(x):
        return (probs * x.square()).sum() - (probs * x).sum().square()

    deltas, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=0.9, lam=0.0)
    advantages, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=0.9, lam=lam)
    expected = sum((0.9 * lam) ** (2 * t) * variance(deltas[:, t]) for t in range(LENGTH))
    assert_close(variance(advantages[:, 0]), expected)


def test_sampled_variance_agrees_with_enumeration():
    """20 万条采样的方差与枚举值相差不到 2%（四阶矩估出的标准误约 0.5%）。"""
    logits, ref_logits, scores = toy(3)
    rewards = toy_rewards(logits, ref_logits, scores)
    values = exact_values(logits, rewards)[PREFIX] + 0.5
    advantages, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=1.0, lam=0.8)
    probs = response_log_probs(logits).exp()
    first = advantages[:, 0]
    exact = (probs * first.square()).sum() - (probs * first).sum().square()
    generator = torch.Generator().manual_seed(0)
    drawn = first[torch.multinomial(probs, 200_000, replacement=True, generator=generator)]
    assert abs(drawn.var() / exact - 1) < 0.02


def test_k1_in_the_reward_gives_minus_beta_times_the_kl_gradient():
    """得分全为 0、λ=1：期望梯度等于 −β∇KL(π‖π_ref)。真值用 autograd 与中心差分各算一遍。"""
    logits, ref_logits, scores = toy()
    zero = torch.zeros_like(scores)
    rewards = toy_rewards(logits, ref_logits, zero)
    advantages, _ = generalized_advantage(
        rewards, torch.zeros_like(rewards), RESPONSE_MASK, gamma=1.0, lam=1.0
    )
    gradient = expected_policy_gradient(logits, advantages)

    def kl(x):
        log_probs = response_log_probs(x)
        return (log_probs.exp() * (log_probs - response_log_probs(ref_logits))).sum()

    leaf = logits.clone().requires_grad_()
    assert_close(gradient, -BETA * torch.autograd.grad(kl(leaf), leaf)[0])
    for row, column in [(0, 0), (1, 2), (5, 1), (14, 2)]:
        step = torch.zeros_like(logits)
        step[row, column] = 1e-5
        difference = (kl(logits + step) - kl(logits - step)) / 2e-5
        assert_close(gradient[row, column], -BETA * difference, rtol=1e-5, atol=1e-9)  # 中心差分的截断误差


def test_gradient_vanishes_at_the_kl_regularised_optimum():
    """π*∝π_ref·exp(R/β)，用每个前缀的配分函数拆成逐 token 的 logits；代进去，期望梯度是 0，J 等于 β log Z。"""
    _, ref_logits, scores = toy()
    weights = (response_log_probs(ref_logits) + scores / BETA).exp()
    index = (PREFIX * 3 + TOKENS)[RESPONSE_MASK]
    mass = torch.zeros(PREFIXES * 3, dtype=torch.float64)
    mass.index_add_(0, index, weights[:, None].expand(-1, LENGTH)[RESPONSE_MASK])
    optimum = mass.log().view(PREFIXES, 3)
    rewards = toy_rewards(optimum, ref_logits, scores)
    for lam in (0.0, 0.95, 1.0):
        values = exact_values(optimum, rewards)[PREFIX]
        advantages, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=1.0, lam=lam)
        assert expected_policy_gradient(optimum, advantages).abs().max() < 1e-12
    assert_close(objective(optimum, ref_logits, scores), BETA * weights.sum().log())


def test_padding_never_changes_the_result():
    """多补三列、填充处塞 NaN 或 inf：有效处的结果不变，填充处是 0。"""
    rewards, values, mask = random_batch()
    garbage = torch.full((5, 3), math.nan, dtype=torch.float64)

    def pad(x, filler):
        return torch.cat([torch.where(mask, x, torch.full_like(x, filler)), garbage], 1)

    wide_mask = torch.cat([mask, torch.zeros(5, 3, dtype=torch.bool)], 1)
    for gamma, lam in [(1.0, 0.95), (0.9, 1.0)]:
        narrow = generalized_advantage(rewards, values, mask, gamma=gamma, lam=lam)
        wide = generalized_advantage(
            pad(rewards, math.nan), pad(values, math.inf), wide_mask, gamma=gamma, lam=lam
        )
        for ours, padded in zip(narrow, wide, strict=True):
            assert torch.equal(padded[:, :7], ours)
            assert not padded[~wide_mask].any()
    # 求和的次序随列数变，不是逐位相同
    assert_close(whiten(pad(rewards, math.nan), wide_mask)[:, :7], whiten(rewards, mask))
    scores = tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    shaped = kl_shaped_rewards(scores, pad(rewards, math.nan), pad(values, -math.inf), wide_mask, kl_coef=0.1)
    assert torch.equal(shaped[:, :7], kl_shaped_rewards(scores, rewards, values, mask, kl_coef=0.1))
    assert not shaped[~wide_mask].any()


def test_tool_tokens_are_transparent():
    """在第 2 与第 3 个 token 之间插入工具返回，模型 token 的优势与回归目标不变，插多长都一样。"""
    rewards, values, _ = random_batch()
    plain = generalized_advantage(rewards, values, torch.ones(5, 7, dtype=torch.bool), gamma=0.9, lam=0.6)
    for length in (1, 4):
        junk = torch.full((5, length), 9.0, dtype=torch.float64)

        def insert(x, piece):
            return torch.cat([x[:, :2], piece, x[:, 2:]], 1)

        mask = insert(torch.ones(5, 7, dtype=torch.bool), torch.zeros(5, length, dtype=torch.bool))
        with_tool = generalized_advantage(
            insert(rewards, junk), insert(values, junk), mask, gamma=0.9, lam=0.6
        )
        for ours, other in zip(plain, with_tool, strict=True):
            assert torch.equal(other[mask].view(5, 7), ours)


def test_whitened_advantages_have_mean_zero_and_unit_variance_over_valid_tokens():
    advantages, _, mask = random_batch()
    whitened = whiten(advantages, mask)
    assert abs(whitened[mask].mean()) < 1e-12
    assert abs(whitened[mask].var() - 1) < 1e-7  # eps=1e-8 加在方差上
    assert not whitened[~mask].any()


def test_whitening_hides_the_scale_of_the_reward():
    """得分与 β 同乘 100、价值也同乘 100：优势乘 100，白化后相同，只剩 eps 的差别。"""
    advantages, _, mask = random_batch()
    assert_close(whiten(100 * advantages, mask), whiten(advantages, mask), rtol=1e-7, atol=1e-7)
    assert (whiten(advantages + 5, mask) - whiten(advantages, mask)).abs().max() < 1e-12


def test_nothing_that_should_be_constant_carries_a_gradient():
    rewards, values, mask = random_batch()
    rewards.requires_grad_(), values.requires_grad_()
    assert not any(x.requires_grad for x in generalized_advantage(rewards, values, mask))
    shaped = kl_shaped_rewards(torch.ones(5, dtype=torch.float64), rewards, values.detach(), mask)
    assert not shaped.requires_grad

    parts, mask = loss_case()
    leaves = [part.clone().requires_grad_() for part in parts]
    ppo_loss(*leaves, mask, entropy_coef=0.1).backward()
    log_probs, old_log_probs, advantages, values, old_values, returns, entropy = leaves
    assert all(x.grad is None for x in (old_log_probs, advantages, old_values, returns))
    for leaf in (log_probs, values, entropy):
        assert leaf.grad[mask].any() and not leaf.grad[~mask].any()


def test_inputs_are_not_modified():
    rewards, values, mask = random_batch()
    copies = rewards.clone(), values.clone(), mask.clone()
    generalized_advantage(rewards, values, mask)
    whiten(rewards, mask)
    assert all(torch.equal(a, b) for a, b in zip((rewards, values, mask), copies, strict=True))


# ---- 边界 ----


def test_fully_masked_row_is_all_zeros():
    rewards, values, mask = random_batch()
    mask[2] = False
    for result in generalized_advantage(rewards, values, mask):
        assert not result[2].any()
    shaped = kl_shaped_rewards(torch.full((5,), 7.0, dtype=torch.float64), rewards, values, mask)
    assert not shaped[2].any()


def test_single_token_response_uses_the_score_alone():
    advantages, returns = generalized_advantage(tensor([[2.0]]), tensor([[0.5]]), boolean([[1]]))
    assert (advantages.item(), returns.item()) == (1.5, 2.0)


def test_zero_length_is_allowed():
    empty = torch.zeros(2, 0, dtype=torch.float64)
    advantages, returns = generalized_advantage(empty, empty, empty.bool())
    assert advantages.shape == returns.shape == (2, 0)


def test_dtype_is_kept():
    rewards, values, mask = random_batch()
    for dtype in (torch.float32, torch.float64):
        advantages, returns = generalized_advantage(rewards.to(dtype), values.to(dtype), mask)
        assert advantages.dtype == returns.dtype == whiten(advantages, mask).dtype == dtype


def test_bad_scalars_are_refused():
    rewards, values, mask = random_batch()
    for bad in ({"gamma": 1.5}, {"gamma": -0.1}, {"lam": 1.01}, {"lam": -0.5}):
        with pytest.raises(ValueError, match="0 与 1 之间"):
            generalized_advantage(rewards, values, mask, **bad)
    with pytest.raises(ValueError, match="不能为负"):
        kl_shaped_rewards(torch.zeros(5, dtype=torch.float64), rewards, values, mask, kl_coef=-0.1)
    with pytest.raises(ValueError, match="只有 1 个有效 token"):
        whiten(tensor([[1.0, 2.0]]), boolean([[1, 0]]))


def test_float_mask_and_per_token_scores_are_rejected():
    """掩码必须是布尔；得分是每条一个，逐 token 的得分要自己相加。"""
    rewards, values, mask = random_batch()
    with pytest.raises(jaxtyping.TypeCheckError):
        generalized_advantage(rewards, values, mask.double())
    with pytest.raises(jaxtyping.TypeCheckError):
        kl_shaped_rewards(rewards, rewards, values, mask)


# ---- 流传的错误写法，必须被上面的真值拒绝 ----


def recursion(rewards, values, mask, gamma, lam, *, next_of=1):
    """教科书递推，不看掩码；next_of=2 时把下一个状态的价值再错后一位。"""
    width = values.shape[1]
    padded = torch.cat([values, torch.zeros(len(values), 2, dtype=torch.float64)], 1)
    result, running = torch.zeros_like(values), 0.0
    for t in reversed(range(width)):
        running = rewards[:, t] + gamma * padded[:, t + next_of] - values[:, t] + gamma * lam * running
        result[:, t] = running
    return result


def unnormalised_n_step_sum(rewards, values, mask, gamma, lam):
    """权重写成 λ^{n−1}，没有 (1−λ)：各个 n 步优势直接相加。"""
    result = torch.zeros_like(values)
    lengths = mask.sum(1)
    for i, t in mask.nonzero().tolist():
        for n in range(1, int(lengths[i]) - t + 1):
            end = t + n
            bootstrap = gamma**n * values[i, end] if end < lengths[i] else 0.0
            discounts = gamma ** torch.arange(n, dtype=torch.float64)
            result[i, t] += lam ** (n - 1) * (
                (rewards[i, t:end] * discounts).sum() + bootstrap - values[i, t]
            )
    return result


def last_term_also_gets_one_minus_lambda(rewards, values, mask, gamma, lam):
    return (1 - lam) * unnormalised_n_step_sum(rewards, values, mask, gamma, lam)


def swap_gamma_and_lambda(rewards, values, mask, gamma, lam):
    return generalized_advantage(rewards, values, mask, gamma=lam, lam=gamma)[0]


def value_seen_after_the_token(rewards, values, mask, gamma, lam):
    """没有左移一位：拿看过 a_t 的输出当 V(s_t)。"""
    shifted = torch.cat([values[:, 1:], torch.zeros(len(values), 1, dtype=torch.float64)], 1)
    ends = torch.cat([mask[:, 1:], torch.zeros(len(values), 1, dtype=torch.bool)], 1)
    return generalized_advantage(rewards, shifted.masked_fill(~ends, 0.0), mask, gamma=gamma, lam=lam)[0]


def next_value_two_ahead(rewards, values, mask, gamma, lam):
    return recursion(rewards, values.masked_fill(~mask, 0.0), mask, gamma, lam, next_of=2)


def padding_values_bootstrap(rewards, values, mask, gamma, lam):
    return recursion(rewards, torch.where(mask, values, torch.full_like(values, 0.5)), mask, gamma, lam)


def lambda_forgotten(rewards, values, mask, gamma, lam):
    return recursion(rewards, values.masked_fill(~mask, 0.0), mask, gamma, 1.0)


def delta_without_baseline(rewards, values, mask, gamma, lam):
    """δ 里漏掉 −V(s_t)。"""
    return generalized_advantage(rewards, values, mask, gamma=gamma, lam=lam)[1]


WRONG_GAE = [
    unnormalised_n_step_sum,
    last_term_also_gets_one_minus_lambda,
    swap_gamma_and_lambda,
    value_seen_after_the_token,
    next_value_two_ahead,
    padding_values_bootstrap,
    lambda_forgotten,
    delta_without_baseline,
]


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", WRONG_GAE, ids=lambda f: f.__name__)
def test_wrong_gae_differs_from_the_definition(wrong):
    """31 条回答、γ=1、λ=0.6：错误写法至少有一处与定义相差 0.1 以上，我们的逐处相同。"""
    logits, ref_logits, scores = toy()
    rewards = toy_rewards(logits, ref_logits, scores)
    generator = torch.Generator().manual_seed(6)
    values = torch.randn(PREFIXES, generator=generator, dtype=torch.float64)[PREFIX]
    truth = by_definition(rewards, values, RESPONSE_MASK, 1.0, 0.6)
    theirs = wrong(rewards, values, RESPONSE_MASK, 1.0, 0.6)
    ours, _ = generalized_advantage(rewards, values, RESPONSE_MASK, gamma=1.0, lam=0.6)
    assert (theirs - truth)[RESPONSE_MASK].abs().max() > 0.1
    assert_close(ours, truth)


WRONG_WITH_EXACT_CRITIC = [
    unnormalised_n_step_sum,
    swap_gamma_and_lambda,
    value_seen_after_the_token,
    next_value_two_ahead,
    padding_values_bootstrap,
]


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", WRONG_WITH_EXACT_CRITIC, ids=lambda f: f.__name__)
def test_wrong_gae_biases_the_gradient_even_with_an_exact_critic(wrong):
    logits, ref_logits, scores = toy()
    rewards = toy_rewards(logits, ref_logits, scores)
    values = exact_values(logits, rewards)[PREFIX]
    truth = true_gradient(logits, ref_logits, scores)
    theirs = expected_policy_gradient(logits, wrong(rewards, values, RESPONSE_MASK, 1.0, 0.6))
    assert (theirs - truth).norm() / truth.norm() > 0.05


@pytest.mark.rejects
def test_recursion_must_not_cross_into_the_next_packed_response():
    """两条回答拼成一行、终止处不清零：第一条吃到第二条的价值与优势。分成两行才是对的。"""
    rewards, values = tensor([[0.0, 1.0, 0.0, 1.0]]), tensor([[0.5, 0.6, 0.2, 0.4]])
    separate, _ = generalized_advantage(
        rewards.view(2, 2), values.view(2, 2), torch.ones(2, 2, dtype=torch.bool), gamma=1.0, lam=0.5
    )
    assert_close(separate, tensor([[0.3, 0.4], [0.5, 0.6]]))
    packed = recursion(rewards, values, None, 1.0, 0.5)
    assert_close(packed, tensor([[0.525, 0.85, 0.5, 0.6]]))


def kl_sign_flipped(scores, log_probs, ref_log_probs, mask):
    return kl_shaped_rewards(scores, ref_log_probs, log_probs, mask, kl_coef=BETA)


def score_on_the_last_column(scores, log_probs, ref_log_probs, mask):
    rewards = kl_shaped_rewards(torch.zeros_like(scores), log_probs, ref_log_probs, mask, kl_coef=BETA)
    rewards[:, -1] += scores
    return rewards


def score_on_every_token(scores, log_probs, ref_log_probs, mask):
    rewards = kl_shaped_rewards(torch.zeros_like(scores), log_probs, ref_log_probs, mask, kl_coef=BETA)
    return rewards + scores[:, None] * mask


def kl_forgotten(scores, log_probs, ref_log_probs, mask):
    return kl_shaped_rewards(scores, log_probs, ref_log_probs, mask, kl_coef=0.0)


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [kl_sign_flipped, score_on_the_last_column, score_on_every_token, kl_forgotten],
    ids=lambda f: f.__name__,
)
def test_wrong_reward_does_not_give_the_gradient_of_the_objective(wrong):
    """λ=1、价值取 0，期望梯度应等于 ∇J；错误写法的相对误差都超过 10%。"""
    logits, ref_logits, scores = toy()
    truth = true_gradient(logits, ref_logits, scores)

    def gradient(rewards):
        zeros = torch.zeros_like(rewards)
        advantages, _ = generalized_advantage(rewards, zeros, RESPONSE_MASK, gamma=1.0, lam=1.0)
        return expected_policy_gradient(logits, advantages)

    args = scores, token_log_probs(logits), token_log_probs(ref_logits), RESPONSE_MASK
    assert (gradient(wrong(*args)) - truth).norm() / truth.norm() > 0.1
    assert_close(gradient(toy_rewards(logits, ref_logits, scores)), truth)


@pytest.mark.rejects
def test_kl_on_padding_leaks_through_an_unmasked_recursion():
    """填充处的对数概率也有值（这里差 1 nat）：不乘掩码就顺着递推漏进每个有效 token，λ=1 时每个填充漏 β。"""
    logits, ref_logits, scores = toy()
    log_probs, ref_log_probs = token_log_probs(logits), token_log_probs(ref_logits)
    everywhere = torch.where(RESPONSE_MASK, log_probs - ref_log_probs, torch.ones_like(log_probs))
    rewards = toy_rewards(logits, ref_logits, scores).where(RESPONSE_MASK, -BETA * everywhere)
    zeros = torch.zeros_like(rewards)
    leaked = recursion(rewards, zeros, RESPONSE_MASK, 1.0, 1.0)
    truth = by_definition(rewards, zeros, RESPONSE_MASK, 1.0, 1.0)
    padding = (~RESPONSE_MASK).sum(1, keepdim=True).double().expand_as(rewards)
    assert_close((leaked - truth)[RESPONSE_MASK], -BETA * padding[RESPONSE_MASK])
    assert_close(generalized_advantage(rewards, zeros, RESPONSE_MASK, gamma=1.0, lam=1.0)[0], truth)


@pytest.mark.rejects
def test_discounted_rewards_are_the_regression_target_only_at_lambda_one():
    """λ<1 时回归目标是 Â+V，不是往后的奖励之和；两者只在 λ=1 相同（拿后者当目标等于给价值模型单独用 λ=1）。"""
    rewards, values, mask = random_batch()
    monte_carlo = by_definition(rewards, torch.zeros_like(values), mask, 1.0, 1.0)
    _, returns = generalized_advantage(rewards, values, mask, gamma=1.0, lam=1.0)
    assert_close(returns, monte_carlo)
    _, returns = generalized_advantage(rewards, values, mask, gamma=1.0, lam=0.6)
    assert (returns - monte_carlo).abs().max() > 0.5


@pytest.mark.rejects
def test_returns_must_not_be_built_from_whitened_advantages():
    """回归目标的单位是奖励；拿白化后的优势加价值，目标就与奖励的尺度脱钩：奖励全乘 10，正确的目标也乘 10。"""
    rewards, values, mask = random_batch()
    big = generalized_advantage(10 * rewards, 10 * values, mask)
    small = generalized_advantage(rewards, values, mask)
    assert_close(big[1], 10 * small[1])
    wrong_big = whiten(big[0], mask) + 10 * values
    wrong_small = whiten(small[0], mask) + values
    assert (wrong_big - 10 * wrong_small)[mask].abs().max() > 1.0


@pytest.mark.rejects
def test_whitening_each_row_erases_the_difference_between_good_and_bad_responses():
    """两条等长的回答，一条每个 token 的优势都高 2：全批白化保留这个差（正、负分开），逐行白化后两行完全相同。"""
    advantages = tensor([[1.0, 1.5, 1.1], [-1.0, -0.5, -0.9]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    ours = whiten(advantages, mask)
    assert (ours[0] > 0).all() and (ours[1] < 0).all()
    assert_close(ours[0] - ours[1], (ours[0] - ours[1])[:1].expand(3))
    by_row = torch.cat([whiten(row[None], mask[:1]) for row in advantages])
    assert_close(by_row[0], by_row[1])


@pytest.mark.rejects
def test_whitening_over_padding_is_diluted():
    """填充的零也算进统计：均值与方差都变了。"""
    advantages, mask = tensor([[4.0, 2.0, 0.0, 0.0]]), boolean([[1, 1, 0, 0]])
    assert_close(whiten(advantages, mask)[mask], tensor([1.0, -1.0]) / math.sqrt(2 + 1e-8))
    diluted = whiten(advantages, torch.ones_like(mask))[mask]
    assert (diluted - whiten(advantages, mask)[mask]).abs().max() > 0.5


@pytest.mark.rejects
def test_exponents_misprinted_in_the_ppo_paper_do_not_give_the_return():
    """PPO 式 (10)(11) 的末项印成 γ^{T−t+1} r_{T−1}；T=3、t=0 时应是 γ²，印的是 γ⁴。

    原文说 λ=1 时式 (11) 化为式 (10)：指数取 T−t−1 时成立，照印的 T−t+1 不成立，所以不是记号不同。
    """
    rewards, values = tensor([[1.0, 1.0, 1.0]]), tensor([[0.0, 0.0, 0.0]])
    advantages, _ = generalized_advantage(rewards, values, boolean([[1, 1, 1]]), gamma=0.9, lam=1.0)
    assert_close(advantages[0, 0], tensor(1 + 0.9 + 0.9**2))
    assert abs(advantages[0, 0] - (1 + 0.9 + 0.9**4)) > 0.1

    r, v, gamma = (0.3, -0.7, 1.1), (0.5, 0.2, -0.4, 0.8), 0.9  # v[3] 是截断处的自举价值
    deltas = [r[t] + gamma * v[t + 1] - v[t] for t in range(3)]

    def eq_10(last):
        return -v[0] + r[0] + gamma * r[1] + gamma**last * r[2] + gamma**3 * v[3]

    def eq_11_at_lambda_one(last):
        return deltas[0] + gamma * deltas[1] + gamma**last * deltas[2]

    assert math.isclose(eq_11_at_lambda_one(2), eq_10(2))
    assert abs(eq_11_at_lambda_one(4) - eq_10(4)) > 0.1


def entropy_added_instead_of_subtracted(policy, value, entropy):
    return policy + 0.5 * value + 0.1 * entropy


def value_loss_subtracted(policy, value, entropy):
    """把论文要最大化的目标原样当损失。"""
    return policy - 0.5 * value - 0.1 * entropy


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong", [entropy_added_instead_of_subtracted, value_loss_subtracted], ids=lambda f: f.__name__
)
def test_signs_of_the_three_terms(wrong):
    """沿正确损失的负梯度走一小步：价值误差变小、熵变大。错误写法至少有一样走反。"""
    value, entropy = tensor(2.0).requires_grad_(), tensor(1.0).requires_grad_()
    grads = torch.autograd.grad(wrong(torch.zeros(()), value.square(), entropy), [value, entropy])
    moved_right = (grads[0] > 0).item() and (grads[1] < 0).item()
    assert not moved_right

    one = tensor([[1.0]])
    leaf_value, leaf_entropy = tensor([[2.0]]).requires_grad_(), one.clone().requires_grad_()
    zero = torch.zeros(1, 1, dtype=torch.float64)
    loss = ppo_loss(
        zero, zero, zero, leaf_value, tensor([[2.0]]), zero, leaf_entropy, boolean([[1]]), entropy_coef=0.1
    )
    ours = torch.autograd.grad(loss, [leaf_value, leaf_entropy])
    assert_close(ours[0], tensor([[2.0]]))  # 0.5·2·(V−R)
    assert_close(ours[1], tensor([[-0.1]]))
