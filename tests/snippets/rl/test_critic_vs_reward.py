r"""snippets/rl/critic_vs_reward.py 的测试。

真值有四个来源，互不相同：(1) 手算的小例子；(2) 词表 3、最长 4 的全部 31 条回答：价值在树上从叶子往回递推，目标的梯度用 autograd
与中心差分各求一次；(3) 条件期望的性质（TD 误差均值为零、互不相关）；(4) verl 0.9.1、OpenRLHF 0.11.2、TRL 1.16 跑出来后冻结的数值，
见 tests/golden/make_critic_vs_reward.py。全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import json
import math
from pathlib import Path

import jaxtyping
import pytest
import torch
from torch.testing import assert_close

from snippets.rl.critic_vs_reward import reward_at_end, state_values, td_errors, value_loss
from snippets.rl.post_training import bradley_terry_loss
from snippets.rl.ppo import generalized_advantage

GOLDEN = json.loads(
    (Path(__file__).parents[2] / "golden" / "critic_vs_reward.json").read_text(encoding="utf-8")
)


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def boolean(rows):
    return torch.tensor(rows, dtype=torch.bool)


def golden_inputs():
    data = {name: tensor(value) for name, value in GOLDEN["inputs"].items()}
    return data, data["mask"].bool()


# ---- 精确枚举用的小语言：token 0、1 与 EOS（2），最长 4；每个前缀一行 logits ----

LENGTH, EOS = 4, 2
PREFIX_LIST = [bits for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]
NUMBER = {bits: i for i, bits in enumerate(PREFIX_LIST)}
TEXTS = [(*bits, EOS) for bits in PREFIX_LIST] + list(itertools.product((0, 1), repeat=LENGTH))
TOKENS = torch.tensor([[*text, *[EOS] * (LENGTH - len(text))] for text in TEXTS])
MASK = boolean([[t < len(text) for t in range(LENGTH)] for text in TEXTS])
PREFIX = torch.tensor([[NUMBER[text[:t]] if t < len(text) else 0 for t in range(LENGTH)] for text in TEXTS])


def toy(seed=0):
    """策略的 logits 与每条回答的得分，都是随机的。"""
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(len(PREFIX_LIST), 3, generator=generator, dtype=torch.float64)
    return logits, torch.randn(len(TEXTS), generator=generator, dtype=torch.float64)


def token_log_probs(logits):
    return logits.log_softmax(-1)[PREFIX, TOKENS].masked_fill(~MASK, 0.0)


def response_probs(logits):
    return token_log_probs(logits).sum(1).exp()


def tree_values(logits, scores):
    """在树上从叶子往回递推：一步的概率乘孩子的价值；叶子的价值就是得分。不用逐 token 奖励，也不用掩码。"""
    score_of = dict(zip(TEXTS, scores.tolist(), strict=True))
    probs = logits.softmax(-1).tolist()

    def value(bits):
        if len(bits) == LENGTH or (bits and bits[-1] == EOS):
            return score_of[bits]
        return sum(p * value((*bits, a)) for a, p in enumerate(probs[NUMBER[bits]]))

    return tensor([value(bits) for bits in PREFIX_LIST])


def true_gradient(logits, scores):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((response_probs(leaf) * scores).sum(), leaf)[0]


def expected_gradient(logits, advantages):
    """E[Σ_t Â_t ∇log π(a_t|s_t)]：31 条回答按概率加权，优势当常数。"""
    leaf = logits.clone().requires_grad_()
    weights = response_probs(logits)[:, None] * advantages.masked_fill(~MASK, 0.0)
    return torch.autograd.grad((weights * token_log_probs(leaf)).sum(), leaf)[0]


def gradient_with(logits, token_rewards, values, lam):
    advantages, _ = generalized_advantage(token_rewards, values[PREFIX], MASK, gamma=1.0, lam=lam)
    return expected_gradient(logits, advantages)


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---- 手算 ----


def test_reward_goes_to_the_last_generated_token():
    """第一行没有填充；第二行右边两格填充；第三行中间一格是工具返回；第四行没有生成任何 token。"""
    mask = boolean([[1, 1, 1, 1], [1, 1, 0, 0], [1, 0, 1, 0], [0, 0, 0, 0]])
    placed = reward_at_end(tensor([1.0, -2.0, 3.0, 5.0]), mask)
    assert_close(placed, tensor([[0, 0, 0, 1.0], [0, -2.0, 0, 0], [0, 0, 3.0, 0], [0, 0, 0, 0]]))


def test_td_errors_by_hand():
    """V=(0.5,0.6,0.8)、得分 1：δ=(0.1,0.2,0.2)，和 0.5=1−0.5。第二行只有前两个有效、得分 0：(0.1,−0.6)，填充处的 0.8 不许用。
    γ=0.9：第一行 (0.54−0.5, 0.72−0.6, 0.2)。
    """
    mask = boolean([[1, 1, 1], [1, 1, 0]])
    values = tensor([[0.5, 0.6, 0.8], [0.5, 0.6, 0.8]])
    rewards = tensor([[0, 0, 1.0], [0, 0, 0]])
    assert_close(td_errors(rewards, values, mask), tensor([[0.1, 0.2, 0.2], [0.1, -0.6, 0.0]]))
    assert_close(td_errors(rewards, values, mask, gamma=0.9)[0], tensor([0.04, 0.12, 0.2]))


def test_value_loss_by_hand():
    """误差 1、−2、3，第三个是填充：(1+4)/2=2.5；对有效价值的梯度是 2·误差/2。"""
    values = tensor([[1.0, 0.0, 3.0]]).requires_grad_()
    loss = value_loss(values, tensor([[0.0, 2.0, 0.0]]), boolean([[1, 1, 0]]))
    assert_close(loss, tensor(2.5))
    assert_close(torch.autograd.grad(loss, values)[0], tensor([[1.0, -2.0, 0.0]]))


def test_state_value_is_read_one_position_before_its_token():
    """提示 2 个、回答 3 个 token，输出就是位置号：三个价值在位置 1、2、3，位置 4（看过最后一个 token）不读。"""
    outputs = torch.arange(5.0, dtype=torch.float64).repeat(2, 1)
    assert_close(state_values(outputs, response_length=3), tensor([[1.0, 2.0, 3.0]] * 2))
    assert_close(state_values(outputs, response_length=1), tensor([[3.0]] * 2))


# ---- 与独立实现一致 ----


def test_reward_placement_matches_verl_and_openrlhf_except_for_empty_responses():
    """有 token 的行逐个相同；一个 token 也没有生成的那一行，两个库都放进最后一列的填充，我们返回全零。"""
    data, mask = golden_inputs()
    placed, some = reward_at_end(data["rewards"], mask), mask.any(1)
    assert some.tolist() == [True, True, True, False] and not placed[3].any()
    for library in ("openrlhf", "verl"):
        theirs = tensor(GOLDEN[library]["token_rewards"])
        # verl 存成 float32
        assert_close(placed[some].float(), theirs[some].float())
        assert theirs[3, -1] != 0 and not theirs[3, :-1].any()
    assert_close(placed[some], tensor(GOLDEN["openrlhf"]["token_rewards"])[some])


def test_state_values_match_the_openrlhf_critic_and_never_read_where_its_reward_model_reads():
    """同一串输出：critic 的读数逐个相同；奖励模型读最后一个有效 token，那个位置的数不在任何一个有效价值里。"""
    data, mask = golden_inputs()
    outputs, prompt = data["outputs"], GOLDEN["prompt_length"]
    values = state_values(outputs, response_length=mask.shape[1])
    assert_close(values * mask, tensor(GOLDEN["openrlhf"]["values"]))
    scores = outputs[torch.arange(len(mask)), prompt + mask.sum(1) - 1]
    assert_close(scores, tensor(GOLDEN["openrlhf"]["scores"]))
    assert not (values == scores[:, None])[mask].any()


def test_reward_model_loss_matches_trl_and_openrlhf():
    """每个提示两条回答时，排序形式就是成对损失的平均。"""
    data, _ = golden_inputs()
    chosen, rejected = (data[name].requires_grad_() for name in ("chosen", "rejected"))
    loss = bradley_terry_loss(torch.stack([chosen, rejected], 1))
    grads = torch.stack(torch.autograd.grad(loss, [chosen, rejected]))
    for library in ("trl", "openrlhf"):
        assert_close(loss, tensor(GOLDEN[library]["pair_loss"]))
        assert_close(grads, tensor(GOLDEN[library]["pair_grads"]))


def test_value_loss_is_twice_verl_without_clipping():
    data, mask = golden_inputs()
    values = state_values(data["outputs"], response_length=mask.shape[1]).clone().requires_grad_()
    loss = value_loss(values, data["targets"], mask)
    # verl 的分母多 1e-8
    assert_close(loss, 2 * tensor(GOLDEN["verl"]["value_loss"]), rtol=1e-7, atol=1e-7)
    grad = torch.autograd.grad(loss, values)[0]
    assert_close(grad, 2 * tensor(GOLDEN["verl"]["value_grad"]), rtol=1e-7, atol=1e-7)


# ---- 价值是条件期望 ----


def test_expected_value_loss_is_minimised_by_the_tree_values():
    """目标是得分本身（γ=1）。每个前缀上按概率加权的平方误差，在树上递推出的价值处梯度为零，别处更大。"""
    logits, scores = toy()
    exact = tree_values(logits, scores)
    _, targets = generalized_advantage(
        reward_at_end(scores, MASK), torch.zeros_like(TOKENS, dtype=torch.float64), MASK, gamma=1.0, lam=1.0
    )
    probs = response_probs(logits)

    def expected_loss(table):
        per_row = [
            value_loss(table[PREFIX[i]][None], targets[i][None], MASK[i][None]) * MASK[i].sum()
            for i in range(len(TEXTS))
        ]
        return (probs * torch.stack(per_row)).sum()

    leaf = exact.clone().requires_grad_()
    loss = expected_loss(leaf)
    assert_close(torch.autograd.grad(loss, leaf)[0], torch.zeros_like(exact))
    generator = torch.Generator().manual_seed(3)
    for _ in range(3):
        moved = exact + 0.1 * torch.randn(exact.shape, generator=generator, dtype=torch.float64)
        assert expected_loss(moved) > loss


def test_td_errors_of_the_exact_value_are_surprises():
    """精确的价值：给定 s_t 均值为零；加起来是得分减 V(s_0)；各步方差之和是得分的方差；并且就是动作价值减状态价值。"""
    logits, scores = toy()
    exact = tree_values(logits, scores)
    errors = td_errors(reward_at_end(scores, MASK), exact[PREFIX], MASK)
    probs = response_probs(logits)
    weighted = probs[:, None] * errors * MASK
    means = torch.zeros_like(exact).index_add(0, PREFIX.flatten(), weighted.flatten())
    assert_close(means, torch.zeros_like(exact))
    assert_close(errors.sum(1), scores - exact[0])
    assert_close(exact[0], (probs * scores).sum())
    variance = (probs * (scores - exact[0]).square()).sum()
    assert_close((probs[:, None] * errors.square()).sum(), variance)
    for row, text in enumerate(TEXTS):
        for t in range(len(text)):
            child = text[: t + 1]
            after = exact[NUMBER[child]] if child in NUMBER else scores[row]
            assert_close(errors[row, t], after - exact[NUMBER[text[:t]]])


def test_sum_of_td_errors_telescopes_for_any_values():
    """与价值准不准无关：相消是恒等式。"""
    _, scores = toy()
    generator = torch.Generator().manual_seed(5)
    values = torch.randn(MASK.shape, generator=generator, dtype=torch.float64)
    errors = td_errors(reward_at_end(scores, MASK), values, MASK)
    assert_close(errors.sum(1), scores - values[:, 0])


def test_same_scores_different_policy_different_values():
    logits, scores = toy()
    other, _ = toy(seed=1)
    assert (tree_values(logits, scores) - tree_values(other, scores)).abs().max() > 0.5


# ---- 价值错与奖励错 ----


def test_true_gradient_agrees_with_finite_differences():
    logits, scores = toy()
    gradient, step = true_gradient(logits, scores), 1e-6
    for row, column in ((0, 0), (2, 1), (14, 2)):
        up, down = logits.clone(), logits.clone()
        up[row, column] += step
        down[row, column] -= step
        slope = ((response_probs(up) - response_probs(down)) * scores).sum() / (2 * step)
        # 中心差分的截断误差
        assert_close(gradient[row, column], slope, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("seed", range(3))
def test_arbitrary_values_leave_the_lambda_one_gradient_unbiased(seed):
    """价值是与策略毫无关系的、放大 100 倍的噪声，λ=1 的期望梯度仍是真梯度；λ=0.95 与 0 则不是。"""
    logits, scores = toy(seed)
    generator = torch.Generator().manual_seed(seed + 10)
    values = 100 * torch.randn(len(PREFIX_LIST), generator=generator, dtype=torch.float64)
    rewards, truth = reward_at_end(scores, MASK), true_gradient(logits, scores)
    assert_close(gradient_with(logits, rewards, values, 1.0), truth)
    assert relative(gradient_with(logits, rewards, values, 0.95), truth) > 0.5
    assert relative(gradient_with(logits, rewards, values, 0.0), truth) > 10


@pytest.mark.parametrize("lam", [0.0, 0.95, 1.0])
def test_exact_values_of_a_wrong_reward_give_the_gradient_of_the_wrong_objective(lam):
    """奖励加 ε(y)、价值跟着算准：偏差恰是 ∇E[ε]，与 λ 无关；ε 是常数时为零。"""
    logits, scores = toy()
    generator = torch.Generator().manual_seed(7)
    error = 0.3 * torch.randn(scores.shape, generator=generator, dtype=torch.float64)
    truth = true_gradient(logits, scores)

    def bias(extra):
        wrong = scores + extra
        return gradient_with(logits, reward_at_end(wrong, MASK), tree_values(logits, wrong), lam) - truth

    assert_close(bias(error), true_gradient(logits, error))
    assert bias(error).norm() / truth.norm() > 0.1
    assert_close(bias(torch.full_like(error, 3.0)), torch.zeros_like(truth))


def test_at_lambda_zero_a_value_error_acts_like_a_reward_paid_on_arrival():
    """λ=0：价值错了 e，偏差恰是把 e(s_{t+1}) 当成选 a_t 的优势时的期望梯度（终止处 e=0）。"""
    logits, scores = toy()
    generator = torch.Generator().manual_seed(8)
    error = torch.randn(len(PREFIX_LIST), generator=generator, dtype=torch.float64)
    biased = gradient_with(logits, reward_at_end(scores, MASK), tree_values(logits, scores) + error, 0.0)
    arrival = torch.zeros(MASK.shape, dtype=torch.float64)
    for row, text in enumerate(TEXTS):
        for t in range(len(text)):
            child = text[: t + 1]
            arrival[row, t] = error[NUMBER[child]] if child in NUMBER else 0.0
    assert_close(biased - true_gradient(logits, scores), expected_gradient(logits, arrival))


def test_step_scores_added_as_differences_are_harmless_but_added_as_they_are_change_the_objective():
    """势函数 Φ 加成 Φ(s_{t+1})−Φ(s_t)（终止处 0）：整条的和是 −Φ(s_0)，目标不变；只加 Φ(s_{t+1}) 就变了。"""
    logits, scores = toy()
    generator = torch.Generator().manual_seed(9)
    potential = torch.rand(len(PREFIX_LIST), generator=generator, dtype=torch.float64)
    rewards, truth = reward_at_end(scores, MASK), true_gradient(logits, scores)
    zeros = torch.zeros(len(PREFIX_LIST), dtype=torch.float64)
    shaped = td_errors(rewards, potential[PREFIX], MASK)
    assert_close(gradient_with(logits, shaped, zeros, 1.0), truth)
    raw = shaped + (potential[PREFIX] * MASK)
    assert relative(gradient_with(logits, raw, zeros, 1.0), truth) > 0.3


def test_preferences_say_nothing_about_a_constant_per_prompt():
    """两个得分同加一个常数，损失与梯度不变：奖励模型没有零点，而价值的单位与零点跟着奖励走。"""
    generator = torch.Generator().manual_seed(2)
    chosen, rejected, shift = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    pairs = torch.stack([chosen, rejected], 1)
    assert_close(bradley_terry_loss(pairs + shift[:, None]), bradley_terry_loss(pairs))
    logits, scores = toy()
    assert_close(tree_values(logits, scores + 2.0), tree_values(logits, scores) + 2.0)


def test_preference_loss_gives_no_gradient_to_outputs_before_the_last_token():
    """奖励模型在每个位置都有输出，但损失只碰最后一个：半截的分没有人教。价值损失则给每个前缀梯度，恰好不给最后一个。"""
    outputs = torch.randn(2, 5, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    outputs.requires_grad_()
    loss = bradley_terry_loss(outputs[None, :, -1])  # 第一行是被选中的，第二行是被拒绝的
    (grad,) = torch.autograd.grad(loss, outputs)
    assert grad[:, -1].all() and not grad[:, :-1].any()

    values = state_values(outputs, response_length=3)
    loss = value_loss(values, torch.zeros_like(values), torch.ones(2, 3, dtype=torch.bool))
    (grad,) = torch.autograd.grad(loss, outputs)
    assert grad[:, 1:4].all() and not grad[:, [0, 4]].any()


# ---- 边界 ----


def test_padding_content_never_matters():
    """填充处的价值、目标换成 NaN，结果与梯度都不变。"""
    values, targets = tensor([[0.5, 0.6, 0.8]]), tensor([[1.0, 1.0, 9.0]])
    mask = boolean([[1, 1, 0]])
    dirty_values, dirty_targets = values.clone(), targets.clone()
    dirty_values[0, 2] = dirty_targets[0, 2] = math.nan
    rewards = reward_at_end(tensor([1.0]), mask)
    assert_close(td_errors(rewards, dirty_values, mask), td_errors(rewards, values, mask))
    leaf = dirty_values.requires_grad_()
    loss = value_loss(leaf, dirty_targets, mask)
    assert_close(loss, value_loss(values, targets, mask))
    assert_close(torch.autograd.grad(loss, leaf)[0], tensor([[-0.5, -0.4, 0.0]]))


def test_tool_tokens_in_the_middle_are_skipped():
    """中间两格是工具返回：δ 直接连到下一个策略 token 的价值，与没有它们时相同。"""
    rewards, values = tensor([[0, 0, 0, 1.0]]), tensor([[0.2, 9.0, 9.0, 0.6]])
    errors = td_errors(rewards, values, boolean([[1, 0, 0, 1]]))
    assert_close(errors, tensor([[0.4, 0.0, 0.0, 0.4]]))


def test_no_gradient_flows_into_targets_or_td_errors():
    values = tensor([[0.5, 0.6]]).requires_grad_()
    targets = tensor([[1.0, 1.0]]).requires_grad_()
    mask = boolean([[1, 1]])
    value_loss(values, targets, mask).backward()
    assert targets.grad is None and values.grad is not None
    assert not td_errors(tensor([[0.0, 1.0]]), values, mask).requires_grad


def test_dtype_is_kept():
    for dtype in (torch.float32, torch.float64):
        rewards, mask = torch.ones(2, dtype=dtype), boolean([[1, 1, 1], [1, 0, 0]])
        values = torch.zeros(2, 3, dtype=dtype)
        placed = reward_at_end(rewards, mask)
        assert placed.dtype == td_errors(placed, values, mask).dtype == dtype
        assert value_loss(values, placed, mask).dtype == dtype


def test_bad_lengths_and_shapes_are_refused():
    outputs = torch.zeros(2, 5)
    for length in (0, -1, 5, 6):
        with pytest.raises(ValueError, match="提示至少要有一个 token"):
            state_values(outputs, response_length=length)
    with pytest.raises(jaxtyping.TypeCheckError):
        reward_at_end(torch.zeros(2, 3), boolean([[1, 1, 1], [1, 1, 1]]))
    with pytest.raises(jaxtyping.TypeCheckError):
        value_loss(outputs, outputs, torch.ones(2, 5))


def test_inputs_are_not_modified():
    rewards, mask, values = tensor([1.0, 2.0]), boolean([[1, 1], [1, 0]]), tensor([[0.1, 0.2], [0.3, 0.4]])
    copies = rewards.clone(), mask.clone(), values.clone()
    td_errors(reward_at_end(rewards, mask), values, mask)
    assert all(torch.equal(a, b) for a, b in zip((rewards, mask, values), copies, strict=True))


# ---- 流传的错误写法，必须被上面的真值拒绝 ----


def score_on_the_last_column(rewards, mask):
    placed = torch.zeros(mask.shape, dtype=rewards.dtype)
    placed[:, -1] = rewards
    return placed


def score_one_past_the_end(rewards, mask):
    """忘了减一：放到第一个填充上；没有填充时绕回去。"""
    placed = torch.zeros(mask.shape, dtype=rewards.dtype)
    placed[torch.arange(len(rewards)), mask.sum(1) % mask.shape[1]] = rewards
    return placed


def score_on_every_token(rewards, mask):
    return rewards[:, None] * mask


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [score_on_the_last_column, score_one_past_the_end, score_on_every_token],
    ids=lambda f: f.__name__,
)
def test_wrong_placement_changes_the_gradient(wrong):
    logits, scores = toy()
    truth, zeros = true_gradient(logits, scores), torch.zeros(len(PREFIX_LIST), dtype=torch.float64)
    assert_close(gradient_with(logits, reward_at_end(scores, MASK), zeros, 1.0), truth)
    assert relative(gradient_with(logits, wrong(scores, MASK), zeros, 1.0), truth) > 0.1


def values_after_the_token(outputs, response_length):
    return outputs[:, -response_length:]


def values_two_before(outputs, response_length):
    return outputs[:, -response_length - 2 : -2]


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", [values_after_the_token, values_two_before], ids=lambda f: f.__name__)
def test_values_shifted_by_one_bias_the_gradient_even_when_the_critic_is_exact(wrong):
    """标量头在「看完 a_{t−1}」的位置给出精确的 V(s_t)，看完整条回答处给出得分；λ=0.95。"""
    logits, scores = toy()
    exact = tree_values(logits, scores)
    lengths = MASK.sum(1)
    outputs = torch.zeros(len(TEXTS), 2 + LENGTH, dtype=torch.float64)  # 提示 2 个 token
    outputs[:, 0] = exact[0]
    outputs[:, 1 : 1 + LENGTH] = exact[PREFIX] * MASK
    outputs[torch.arange(len(TEXTS)), 1 + lengths] = scores

    def gradient(values):
        advantages, _ = generalized_advantage(reward_at_end(scores, MASK), values, MASK, gamma=1.0, lam=0.95)
        return expected_gradient(logits, advantages)

    truth = true_gradient(logits, scores)
    assert_close(gradient(state_values(outputs, response_length=LENGTH)), truth)
    # 错后一位看见了 a_t，λ=1 时也偏；错前一位在 λ=1 时只是另一条基线
    assert relative(gradient(wrong(outputs, LENGTH)), truth) > 0.02


@pytest.mark.rejects
def test_value_that_saw_the_action_is_biased_even_at_lambda_one():
    """基线只能依赖 s_t：用看过 a_t 的价值 V(s_{t+1}) 当基线，λ=1 也偏；依赖更早的状态则无偏。"""
    logits, scores = toy()
    exact, truth = tree_values(logits, scores), true_gradient(logits, scores)
    now = exact[PREFIX] * MASK
    after = torch.nn.functional.pad(now[:, 1:], (0, 1))
    before = torch.cat([now[:, :1], now[:, :-1]], 1)
    to_go = scores[:, None].expand(MASK.shape)
    assert relative(expected_gradient(logits, to_go - after), truth) > 0.1
    assert_close(expected_gradient(logits, to_go - before), truth)


def bootstrap_from_padding(token_rewards, values, mask):
    """不看掩码：最后一个有效 token 之后接着读填充处的价值。"""
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return (token_rewards + following - values) * mask


def terminal_value_is_the_reward(token_rewards, values, mask):
    """终止处没有清零：得分加了一次，又用 V(s_终止)=R 自举一次。"""
    return td_errors(2 * token_rewards, values, mask)


def no_bootstrap(token_rewards, values, mask):
    return (token_rewards - values) * mask


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong", [bootstrap_from_padding, terminal_value_is_the_reward, no_bootstrap], ids=lambda f: f.__name__
)
def test_wrong_td_errors_are_not_surprises(wrong):
    """真值：给定 s_t 的均值为零。填充处的价值取 0.5（真实模型在那里也有输出）。"""
    logits, scores = toy()
    values = torch.where(MASK, tree_values(logits, scores)[PREFIX], 0.5)
    rewards, probs = reward_at_end(scores, MASK), response_probs(logits)

    def largest_mean(errors):
        sums = torch.zeros(len(PREFIX_LIST), dtype=torch.float64)
        return sums.index_add(0, PREFIX.flatten(), (probs[:, None] * errors).flatten()).abs().max()

    assert largest_mean(td_errors(rewards, values, MASK)) < 1e-12
    assert largest_mean(wrong(rewards, values, MASK)) > 0.02


@pytest.mark.rejects
def test_value_loss_without_the_mask_is_pulled_towards_padding():
    """目标在填充处是 0：不看掩码，分母里混进填充，梯度也流到填充处的输出。"""
    values = tensor([[1.0, 1.0, 0.5, 0.5]]).requires_grad_()
    targets, mask = tensor([[2.0, 2.0, 0.0, 0.0]]), boolean([[1, 1, 0, 0]])
    unmasked = (values - targets).square().mean()
    assert abs(unmasked - value_loss(values, targets, mask)) > 0.3
    assert torch.autograd.grad(unmasked, values)[0][0, 2:].all()
    assert not torch.autograd.grad(value_loss(values, targets, mask), values)[0][0, 2:].any()
