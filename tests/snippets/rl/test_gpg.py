r"""snippets/rl/gpg.py 的测试。

真值有四个来源：(1) 手算；(2) 穷举：组里每条回答对错的全部组合按概率加权，与 $J$ 的自动求导比较；
(3) TRL 1.16 的 `GRPOTrainer._compute_loss`，原方法真实调用；(4) verl 0.9.1 与 GPG 作者代码（提交 e096da8）跑出来
后冻结的数值和梯度，见 tests/golden/make_gpg.py。全部用 float64；没有写明的容差都是默认值。
"""

import itertools
import json
from pathlib import Path

import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.dapo import keep_groups
from snippets.rl.gpg import (
    gpg_advantages,
    gpg_alpha,
    gpg_loss,
    nonzero_reward_alpha,
    policy_gradient_loss,
)
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import AGGREGATION_MODES, aggregate_loss

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "gpg.json").read_text(encoding="utf-8"))


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def grad_of(loss_fn, variable):
    leaf = variable.detach().clone().requires_grad_()
    return torch.autograd.grad(loss_fn(leaf), leaf)[0]


def centered(rewards, group_size):
    return group_advantages(rewards, group_size=group_size, scale_by_std=False)


def random_batch(rows=6, tokens=5):
    """六条回答（三组、每组两条），长度各不相同。"""
    generator = torch.Generator().manual_seed(7)
    log_probs = -torch.rand(rows, tokens, generator=generator, dtype=torch.float64) * 3 - 0.1
    loss_mask = torch.arange(tokens) < torch.tensor([5, 2, 3, 1, 4, 5])[:rows, None]
    return log_probs, tensor([1.0, 0.0, 0.2, 0.7, 1.0, 1.0])[:rows], loss_mask


# ---- 手算 ----


def test_one_dead_group_in_four_needs_four_thirds():
    """B=4、M=1：平均梯度是有效组平均的 3/4，乘 4/3 还原。第四组全对，其余各一对一错，优势 ±1/2。"""
    rewards = tensor([1, 0, 0, 1, 1, 0, 1, 1])
    torch.testing.assert_close(gpg_alpha(rewards, group_size=2), tensor(4 / 3))
    expected = tensor([2, -2, -2, 2, 2, -2, 0, 0]) / 3
    torch.testing.assert_close(gpg_advantages(rewards, group_size=2), expected)


def test_alpha_has_no_cap():
    """四组里三组全对：α=4，唯一的有效组 (1,1,1,0) 的优势 (1/4,1/4,1/4,−3/4) 乘 4。"""
    advantages = gpg_advantages(tensor([1, 1, 1, 0] + [1] * 12), group_size=4)
    torch.testing.assert_close(advantages, tensor([1, 1, 1, -3] + [0] * 12))


def test_loss_averages_the_tokens_of_a_group_then_the_groups():
    """第一组 3 个 token，Â=(1,−1)：Σ−Â·logπ = 1·(0.1+0.2)−1·0.4 = −0.1，除以 3；第二组 1+1 个 token，
    Â=(0.5,−0.5)：0.5·1−0.5·3 = −1，除以 2。两组平均 (−0.1/3 − 1/2)/2。被遮住的 9 不参与。
    """
    log_probs = tensor([[-0.1, -0.2], [-0.4, -9.0], [-1.0, -9.0], [-3.0, -9.0]])
    loss_mask = torch.tensor([[True, True], [True, False], [True, False], [True, False]])
    loss = gpg_loss(log_probs, tensor([1.0, -1.0, 0.5, -0.5]), loss_mask, group_size=2)
    torch.testing.assert_close(loss, tensor((-0.1 / 3 - 0.5) / 2))


def test_token_loss_is_minus_advantage_times_log_prob():
    """−(−2)·(−0.5) = −1：压低坏 token 的损失没有下界。"""
    torch.testing.assert_close(
        policy_gradient_loss(tensor([[-0.5, -4.0]]), tensor([-2.0])), tensor([[-1.0, -8.0]])
    )


def test_the_two_alphas_disagree_on_five_batches():
    """论文按组：有效组数占比的倒数。verl 按样本：奖励非零占比的倒数。每组 4 条。"""
    cases = [
        ([1, 0, 0, 1, 1, 1, 0, 1], 1.0, 8 / 5),  # 两组都有效
        ([1, 1, 1, 0] + [1] * 12, 4.0, 16 / 15),  # 三组全对
        ([1, 1, 1, -1] + [1] * 12, 4.0, 1.0),  # 同一批，奖励写成 ±1
        ([1, 0, 0, 0] + [0] * 12, 4.0, 16.0),  # 三组全错
        ([1] * 4 + [0] * 4, 0.0, 2.0),  # 全是无效组
    ]
    for rewards, ours, verl in cases:
        torch.testing.assert_close(gpg_alpha(tensor(rewards), group_size=4), tensor(ours))
        torch.testing.assert_close(nonzero_reward_alpha(tensor(rewards)), tensor(verl))


# ---- 与独立实现一致 ----


def test_first_step_gradient_equals_grpo_at_ratio_one():
    """同一组优势、同样的聚合、β=0：ρ=1 时裁剪代理损失的梯度就是策略梯度；数值不同。"""
    log_probs, rewards, loss_mask = random_batch()
    advantages = group_advantages(rewards, group_size=2)
    for mode in AGGREGATION_MODES:
        options = {"mode": mode, "max_response_length": 8}

        def grpo(x, options=options):
            return aggregate_loss(
                clipped_surrogate_loss(x, log_probs, advantages[:, None]), loss_mask, **options
            )

        def gpg(x, options=options):
            return aggregate_loss(policy_gradient_loss(x, advantages), loss_mask, **options)

        torch.testing.assert_close(grad_of(gpg, log_probs), grad_of(grpo, log_probs))
        assert (gpg(log_probs) - grpo(log_probs)).abs() > 0.01


@pytest.mark.parametrize(
    "loss_type, mode", [("grpo", "seq-mean-token-mean"), ("bnpo", "token-mean"), ("dapo", "token-mean")]
)
def test_first_step_gradient_equals_trl_grpo(loss_type, mode):
    log_probs, rewards, loss_mask = random_batch()
    advantages = centered(rewards, 2)
    ours = grad_of(
        lambda x: aggregate_loss(policy_gradient_loss(x, advantages), loss_mask, mode=mode), log_probs
    )
    torch.testing.assert_close(
        ours, trl_grpo_loss(log_probs, log_probs, advantages, loss_mask, loss_type=loss_type)[1]
    )


def test_gradient_matches_finite_differences():
    log_probs, rewards, loss_mask = random_batch()
    advantages = gpg_advantages(rewards, group_size=2)
    leaf = log_probs.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: gpg_loss(x, advantages, loss_mask, group_size=2), (leaf,))


def test_advantages_match_verl_only_with_its_own_coefficient():
    """verl 的优势 = 非零奖励系数 × (r − 组均值)；七批里只有 α 碰巧相等或全零时才等于论文的。"""
    agree = set()
    for name, case in GOLDEN["verl"]["advantages"].items():
        rewards, theirs = tensor(case["rewards"]), tensor(case["advantages"])
        # verl 的系数由两个整数相除得到，是 float32
        close = {"rtol": 1e-6, "atol": 1e-7}
        torch.testing.assert_close(nonzero_reward_alpha(rewards) * centered(rewards, 4), theirs, **close)
        if torch.allclose(gpg_advantages(rewards, group_size=4), theirs, **close):
            agree.add(name)
    assert agree == {"all_dead", "all_wrong"}


def golden_inputs():
    data = {key: tensor(value) for key, value in GOLDEN["inputs"].items()}
    return data["log_probs"], data["advantages"], data["loss_mask"].bool()


def test_loss_matches_verl():
    """verl 的 gpg 损失收到与当前相差 1 的旧概率，结果不受影响：没有比值。"""
    log_probs, advantages, loss_mask = golden_inputs()
    for mode, frozen in GOLDEN["verl"]["losses"].items():

        def loss(x, mode=mode):
            return aggregate_loss(policy_gradient_loss(x, advantages), loss_mask, mode=mode)

        # verl 的按条平均在分母加 1e-8
        torch.testing.assert_close(loss(log_probs), tensor(frozen["value"]), rtol=1e-7, atol=0)
        torch.testing.assert_close(grad_of(loss, log_probs), tensor(frozen["grad"]), rtol=1e-7, atol=1e-12)


def test_alpha_matches_the_authors_inverse_alpha():
    """作者把损失除以 inverse_alpha=有效组数/组数；这里一半是无效组。数学代码按整批 token 平均，
    视觉代码按条平均、分母是 inverse_alpha+1e-5。优势换成 `gpg_advantages`（已乘 α）得到同样的损失与梯度。
    """
    log_probs, advantages, loss_mask = golden_inputs()
    rewards = tensor([1, 0, 0, 1, 1, 1, 1, 1])
    torch.testing.assert_close(centered(rewards, 4), advantages)
    corrected = gpg_advantages(rewards, group_size=4)
    for name, mode, shrink in [
        ("math", "token-mean", 1.0),
        ("visual", "seq-mean-token-mean", 0.5 / (0.5 + 1e-5)),
    ]:
        frozen = GOLDEN["authors"][name]

        def loss(x, mode=mode, shrink=shrink):
            return shrink * aggregate_loss(policy_gradient_loss(x, corrected), loss_mask, mode=mode)

        torch.testing.assert_close(loss(log_probs), tensor(frozen["value"]))
        torch.testing.assert_close(grad_of(loss, log_probs), tensor(frozen["grad"]))


# ---- 穷举：估计的是什么 ----


def bernoulli_log_probs(logits, outcomes):
    """每道题一个 logit；outcomes 是 (题数, G) 的对错。返回 (行, 1)。"""
    signed = torch.where(outcomes, logits[:, None], -logits[:, None])
    return torch.nn.functional.logsigmoid(signed).reshape(-1, 1)


def expected_gradient(logits, prompts, group_size, weigh):
    """一批题 prompts（下标）的全部对错组合按概率加权的 −∇loss。"""
    total = torch.zeros_like(logits)
    picked = torch.tensor(prompts)
    for flat in itertools.product([False, True], repeat=len(prompts) * group_size):
        outcomes = torch.tensor(flat).view(len(prompts), group_size)
        rewards = outcomes.double().flatten()
        leaf = logits.clone().requires_grad_()
        log_probs = bernoulli_log_probs(leaf[picked], outcomes)
        loss = gpg_loss(
            log_probs, weigh(rewards), torch.ones_like(log_probs, dtype=torch.bool), group_size=group_size
        )
        total -= log_probs.detach().sum().exp() * torch.autograd.grad(loss, leaf)[0]
    return total


LOGITS = tensor([0.3, 2.5])
GROUP_SIZE = 3


def true_gradient(logits, prompts):
    return grad_of(lambda x: x[torch.tensor(prompts)].sigmoid().mean(), logits)


def dead_probability(logits):
    p = logits.sigmoid()
    return p**GROUP_SIZE + (1 - p) ** GROUP_SIZE


def parallel(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


def test_without_alpha_the_batch_mean_is_unbiased_up_to_the_group_factor():
    """E[g] = (G−1)/G·∇J，无效组算在内：它们贡献的 0 不是偏差。"""
    ours = expected_gradient(LOGITS, [0, 1], GROUP_SIZE, lambda r: centered(r, GROUP_SIZE))
    torch.testing.assert_close(ours, 2 / 3 * true_gradient(LOGITS, [0, 1]))


def test_with_iid_prompts_alpha_only_changes_the_length():
    """两个位置各自等概率抽题：四种题目组合平均，E[αg] = (G−1)/G·∇J·(1−(1−P)²)/P，P 是有效概率。"""
    total = torch.zeros(2, dtype=torch.float64)
    for prompts in itertools.product([0, 1], repeat=2):
        total += expected_gradient(
            LOGITS, prompts, GROUP_SIZE, lambda r: gpg_advantages(r, group_size=GROUP_SIZE)
        )
    informative = 1 - dead_probability(LOGITS).mean()
    factor = 2 / 3 * (1 - (1 - informative) ** 2) / informative
    assert factor > 1.0  # 比不修正的 2/3 大
    torch.testing.assert_close(total / 4, factor * true_gradient(LOGITS, [0, 1]))


def test_with_fixed_prompts_alpha_is_a_ratio_estimator():
    """题目固定时，题 b 的倍数是 E[2/(1+另一题是否有效)]：另一题越容易是无效组，倍数越大，方向因此偏。"""
    ours = expected_gradient(LOGITS, [0, 1], GROUP_SIZE, lambda r: gpg_advantages(r, group_size=GROUP_SIZE))
    other_dead = dead_probability(LOGITS).flip(0)
    factors = 2 * other_dead + (1 - other_dead)
    truth = true_gradient(LOGITS, [0, 1])
    torch.testing.assert_close(ours, 2 / 3 * factors * truth)
    assert factors[0] / factors[1] > 1.3 and parallel(ours, truth) < 0.9995


def test_eq5_length_normaliser_reweights_prompts():
    """两题一样难；第二题的回答另有三个必然出现的 token（对数概率 0）。式 5 除以组内 token 数，它的梯度只剩 1/4：
    「直接优化原目标」只在各组一样长时成立。
    """
    log_probs = tensor([[-0.7, 0, 0, 0], [-0.7, 0, 0, 0], [-0.7, 0, 0, 0], [-0.7, 0, 0, 0]])
    loss_mask = torch.arange(4) < torch.tensor([1, 1, 4, 4])[:, None]
    grad = grad_of(lambda x: gpg_loss(x, tensor([0.5, -0.5, 0.5, -0.5]), loss_mask, group_size=2), log_probs)
    torch.testing.assert_close(grad[2:, 0], grad[:2, 0] / 4)


# ---- 旧样本 ----


def stale_setup():
    """一组四条、每条一个 token，从三个动作里抽；优势之和为 0。"""
    actions = torch.tensor([0, 2, 2, 1])
    return actions, centered(tensor([0.6, 0.0, 0.0, 1.0]), 4), tensor([0.4, -0.3, 0.9])


def loss_of_logits(logits, actions, advantages):
    log_probs = logits.log_softmax(-1)[actions][:, None]
    return gpg_loss(log_probs, advantages, torch.ones(4, 1, dtype=torch.bool), group_size=4)


def test_one_token_group_gradient_does_not_depend_on_the_policy():
    """ΣÂ=0 消掉 logsumexp：梯度恒为 −(1/G)ΣÂ_i e_{a_i}，策略走到哪里都一样。"""
    actions, advantages, logits = stale_setup()
    expected = torch.zeros(3, dtype=torch.float64).index_add(0, actions, -advantages / 4)
    for shift in [tensor([0.0, 0, 0]), tensor([3.0, -2, 1]), tensor([-5.0, 5, 0])]:
        grad = grad_of(lambda x: loss_of_logits(x, actions, advantages), logits + shift)
        torch.testing.assert_close(grad, expected)


def test_five_inner_steps_equal_one_step_with_five_times_the_rate():
    actions, advantages, logits = stale_setup()
    many = logits.clone()
    for _ in range(5):
        many = many - 0.7 * grad_of(lambda x: loss_of_logits(x, actions, advantages), many)
    once = logits - 3.5 * grad_of(lambda x: loss_of_logits(x, actions, advantages), logits)
    torch.testing.assert_close(many, once)


def test_on_stale_samples_only_the_ratio_gives_the_true_gradient():
    """样本来自 old；精确期望。带可导比值的是 ∇J(θ)，不带的与 θ 无关，相对误差超过一倍。"""
    old, rewards = tensor([0.55, 0.05, 0.40]), tensor([0.6, 1.0, 0.0])
    advantages = rewards - old @ rewards
    logits = old.log() + tensor([0.9, 0.1, -0.9])

    truth = grad_of(lambda x: x.softmax(-1) @ rewards, logits)
    without = -grad_of(
        lambda x: old @ policy_gradient_loss(x.log_softmax(-1)[:, None], advantages)[:, 0], logits
    )
    ratio = grad_of(lambda x: old @ ((x.log_softmax(-1) - old.log()).exp() * advantages), logits)
    torch.testing.assert_close(ratio, truth)
    torch.testing.assert_close(without, old * advantages)
    assert (without - truth).norm() > truth.norm()
    # 样本就来自当前策略时两者相同
    fresh = grad_of(lambda x: x.softmax(-1) @ rewards, old.log())
    torch.testing.assert_close(old * advantages, fresh)


# ---- 性质 ----


def test_appending_dead_groups_changes_nothing():
    """有效组单独一批，与混进任意多无效组的一批：有效组的梯度相同，无效组的梯度为 0。长度各不相同。"""
    log_probs, rewards, loss_mask = random_batch()
    mixed = grad_of(
        lambda x: gpg_loss(x, gpg_advantages(rewards, group_size=2), loss_mask, group_size=2), log_probs
    )
    alone = grad_of(
        lambda x: gpg_loss(x, gpg_advantages(rewards[:4], group_size=2), loss_mask[:4], group_size=2),
        log_probs[:4],
    )
    torch.testing.assert_close(mixed[:4], alone)
    assert torch.equal(mixed[4:], torch.zeros_like(mixed[4:]))


def test_advantages_of_each_group_sum_to_zero():
    rewards = tensor([0.3, -0.2, 0.9, 2.5, 0.5, 0.5])
    for scale_by_std in [False, True]:
        sums = gpg_advantages(rewards, group_size=3, scale_by_std=scale_by_std).view(2, 3).sum(1)
        torch.testing.assert_close(sums, torch.zeros(2, dtype=torch.float64))


def test_std_version_divides_by_the_group_std():
    """(1,0) 与 (0.2,0.7)：样本标准差 1/√2 与 0.5/√2，优势都是 ±1/√2；第三组是无效组，α=3/2。"""
    advantages = gpg_advantages(tensor([1, 0, 0.2, 0.7, 1, 1]), group_size=2, scale_by_std=True, eps=0.0)
    torch.testing.assert_close(advantages, 1.5 / 2**0.5 * tensor([1, -1, -1, 1, 0, 0]))


def test_default_epsilon_is_one_millionth():
    """(√2·1e-6, 0)：样本标准差恰好 1e-6，默认的 ε 再加 1e-6，优势 ±(√2/2)/2。"""
    advantages = gpg_advantages(tensor([2**0.5 * 1e-6, 0]), group_size=2, scale_by_std=True)
    torch.testing.assert_close(advantages, tensor([1, -1]) * 2**0.5 / 4)


def test_alpha_is_invariant_to_affine_rewards_and_verl_is_not():
    rewards = tensor([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    for scale, shift in [(2.0, -1.0), (-3.0, 0.5), (0.1, 7.0)]:
        changed = scale * rewards + shift
        torch.testing.assert_close(gpg_alpha(changed, group_size=4), tensor(3.0))
        assert (nonzero_reward_alpha(changed) - nonzero_reward_alpha(rewards)).abs() > 0.9


def test_counting_groups_or_their_samples_gives_the_same_alpha():
    rewards = tensor([1, 0, 0, 1, 1, 1, 1, 1, 0, 0, 0, 0])
    kept = keep_groups(rewards, group_size=4)
    torch.testing.assert_close(len(rewards) / kept.sum().double(), gpg_alpha(rewards, group_size=4))


def test_padding_does_not_change_the_loss():
    log_probs, rewards, loss_mask = random_batch()
    advantages = gpg_advantages(rewards, group_size=2)
    wide = torch.nn.functional.pad(log_probs, (0, 3), value=-77.0)
    torch.testing.assert_close(
        gpg_loss(wide, advantages, torch.nn.functional.pad(loss_mask, (0, 3)), group_size=2),
        gpg_loss(log_probs, advantages, loss_mask, group_size=2),
    )


def trajectory(optimizer_class, alpha, **options):
    """一串固定的梯度乘 alpha 后更新三个参数。"""
    generator = torch.Generator().manual_seed(1)
    weights = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = optimizer_class([weights], **options)
    for _ in range(6):
        weights.grad = alpha * torch.randn(3, generator=generator, dtype=torch.float64)
        optimizer.step()
    return weights.detach()


def test_a_constant_alpha_is_a_learning_rate_for_sgd_and_nothing_for_adam():
    """ε=0、α=4（2 的幂，乘法没有舍入）时 Adam 的轨迹逐位相同。"""
    torch.testing.assert_close(
        trajectory(torch.optim.SGD, 4.0, lr=0.1), trajectory(torch.optim.SGD, 1.0, lr=0.4)
    )
    assert torch.equal(
        trajectory(torch.optim.Adam, 4.0, lr=0.1, eps=0.0), trajectory(torch.optim.Adam, 1.0, lr=0.1, eps=0.0)
    )


# ---- 边界 ----


def test_a_batch_of_dead_groups_gives_zero_and_no_nan():
    """α 取 0，优势、损失、梯度都是精确的 0；相同的小数减均值有舍入误差，也要是 0。"""
    rewards = tensor([0.1] * 6)
    assert centered(rewards, 3).abs().max() > 0  # 三个 0.1 的均值不是 0.1
    for scale_by_std in [False, True]:
        advantages = gpg_advantages(rewards, group_size=3, scale_by_std=scale_by_std, eps=0.0)
        assert torch.equal(advantages, torch.zeros_like(rewards))
    assert gpg_alpha(rewards, group_size=3) == 0
    log_probs, loss_mask = tensor([[-3.0, -1.0]] * 6), torch.ones(6, 2, dtype=torch.bool)
    assert gpg_loss(log_probs, advantages, loss_mask, group_size=3) == 0
    grad = grad_of(lambda x: gpg_loss(x, advantages, loss_mask, group_size=3), log_probs)
    assert torch.equal(grad, torch.zeros_like(grad))


def test_a_zero_gradient_step_still_moves_adam():
    """所以全是无效组的批要跳过更新：动量还在推参数，AdamW 还有权重衰减。"""
    weights = torch.ones(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([weights], lr=0.1)
    weights.grad = tensor([1.0, -1.0])
    optimizer.step()
    before = weights.detach().clone()
    weights.grad = torch.zeros_like(weights)
    optimizer.step()
    assert (weights.detach() - before).abs().min() > 0.05


def test_dtype_is_kept():
    rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])
    assert gpg_alpha(rewards, group_size=2).dtype == torch.float32
    assert gpg_advantages(rewards, group_size=2).dtype == torch.float32
    assert nonzero_reward_alpha(rewards).dtype == torch.float32


def test_a_fully_masked_group_leaves_the_denominator():
    """整组被遮住：损失只对剩下的一组平均。α 仍数它，所以文档要求先丢掉。"""
    log_probs, rewards, loss_mask = random_batch(rows=4)
    advantages = centered(rewards, 2)
    masked = loss_mask.clone()
    masked[2:] = False
    torch.testing.assert_close(
        gpg_loss(log_probs, advantages, masked, group_size=2),
        gpg_loss(log_probs[:2], advantages[:2], loss_mask[:2], group_size=2),
    )


def test_impossible_group_sizes_are_refused():
    for group_size in [1, 3]:
        with pytest.raises(ValueError, match=f"group_size={group_size}"):
            gpg_alpha(tensor([1, 0, 1, 1]), group_size=group_size)


# ---- 流传的错误写法：都必须与真值不同 ----


def restored(rewards, group_size, coefficient):
    """系数 × 有效组占比：等于 1 才还原了有效组的平均。"""
    return (coefficient * keep_groups(rewards, group_size=group_size).double().mean()).item()


ONE_DEAD_IN_FOUR = [1, 0, 0, 1, 1, 0, 1, 1]


@pytest.mark.rejects
def test_the_inverted_alpha_shrinks_twice():
    """(B−M)/B 当成系数：3/4·3/4 = 9/16。"""
    rewards = tensor(ONE_DEAD_IN_FOUR)
    assert restored(rewards, 2, gpg_alpha(rewards, group_size=2)) == pytest.approx(1.0)
    assert restored(rewards, 2, 1 / gpg_alpha(rewards, group_size=2)) == pytest.approx(9 / 16)


@pytest.mark.rejects
def test_counting_nonzero_rewards_does_not_restore_the_mean():
    """三组全对时只还原到 0.27，三组全错时放大到 4 倍。"""
    for rewards, wrong in [([1, 1, 1, 0] + [1] * 12, 4 / 15), ([1, 0, 0, 0] + [0] * 12, 4.0)]:
        assert restored(tensor(rewards), 4, gpg_alpha(tensor(rewards), group_size=4)) == pytest.approx(1.0)
        assert restored(tensor(rewards), 4, nonzero_reward_alpha(tensor(rewards))) == pytest.approx(wrong)


@pytest.mark.rejects
def test_counting_zero_advantages_is_not_counting_dead_groups():
    """奖励 0、0.5、1：中间一条的优势恰好是 0，组仍有效。按零优势样本数算会得到 3/2。"""
    rewards = tensor([0.0, 0.5, 1.0])
    assert gpg_alpha(rewards, group_size=3) == 1
    assert 3 / centered(rewards, 3).count_nonzero() == 1.5


@pytest.mark.rejects
def test_looking_for_nonzero_advantages_misses_dead_groups_of_decimals():
    """三个 0.1 的均值是 0.10000000000000002，减出来不是 0：按「优势不全为零」数，无效组会被当成有效。"""
    rewards = tensor([0.1] * 3 + [1, 0, 0])
    assert (centered(rewards, 3).view(2, 3) != 0).any(dim=1).all()
    assert gpg_alpha(rewards, group_size=3) == 2


@pytest.mark.rejects
def test_keeping_the_ratio_is_not_gpg():
    """留着比值的梯度是 GPG 的 ρ 倍：旧样本上差得不止一点。"""
    log_probs, rewards, loss_mask = random_batch()
    advantages, old = gpg_advantages(rewards, group_size=2), log_probs - 0.5
    ours = grad_of(lambda x: gpg_loss(x, advantages, loss_mask, group_size=2), log_probs)
    kept = grad_of(
        lambda x: aggregate_loss(
            (-(x - old).exp() * advantages[:, None]).view(3, -1),
            loss_mask.view(3, -1),
            mode="seq-mean-token-mean",
        ),
        log_probs,
    )
    torch.testing.assert_close(kept, ours * tensor(0.5).exp())


@pytest.mark.rejects
def test_dividing_by_the_std_is_not_unbiased():
    """除以标准差后两道题的倍数差 5%，期望不再与 ∇J 平行；不除则两题同倍数。"""
    ours = expected_gradient(
        LOGITS, [0, 1], 4, lambda r: group_advantages(r, group_size=4, scale_by_std=False)
    )
    scaled = expected_gradient(LOGITS, [0, 1], 4, lambda r: group_advantages(r, group_size=4))
    truth = true_gradient(LOGITS, [0, 1])
    torch.testing.assert_close(ours / truth, tensor([0.75, 0.75]))
    factors = scaled / truth
    assert factors[1] / factors[0] == pytest.approx(1.05, abs=0.001) and parallel(scaled, truth) < 0.99995


@pytest.mark.rejects
def test_dropping_the_mean_keeps_the_expectation_but_not_the_variance():
    """奖励直接乘 logπ：期望仍是 ∇J（连 (G−1)/G 都没有），所以只查期望发现不了；
    但奖励加 10 之后方差涨到百倍以上，全对的组也不再是零梯度。
    """

    def mean_and_spread(weigh, shift):
        mean, second = 0.0, 0.0
        for flat in itertools.product([False, True], repeat=4):
            outcomes = torch.tensor(flat).view(1, 4)
            weights = weigh(outcomes.double().flatten() + shift)
            leaf = LOGITS[:1].clone().requires_grad_()
            log_probs = bernoulli_log_probs(leaf, outcomes)
            (grad,) = torch.autograd.grad((weights[:, None] * log_probs).mean(), leaf)
            probability = log_probs.detach().sum().exp().item()
            mean, second = mean + probability * grad.item(), second + probability * grad.item() ** 2
        return mean, second - mean**2

    truth = true_gradient(LOGITS, [0]).sum().item()
    for shift in [0.0, 10.0]:
        ours = mean_and_spread(lambda r: centered(r, 4), shift)
        raw = mean_and_spread(lambda r: r, shift)
        assert ours[0] == pytest.approx(0.75 * truth) and raw[0] == pytest.approx(truth)
        assert raw[1] > (100 if shift else 1) * ours[1]
    all_right = grad_of(lambda x: policy_gradient_loss(x, tensor([1.0] * 4)).mean(), tensor([[-0.5]] * 4))
    assert all_right.abs().min() > 0.1
    assert torch.equal(gpg_advantages(tensor([1.0] * 4), group_size=4), torch.zeros(4, dtype=torch.float64))
