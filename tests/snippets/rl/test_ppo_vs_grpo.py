r"""snippets/rl/ppo_vs_grpo.py 的测试。

真值有三个来源，都不用被测代码的公式：(1) 手算；(2) 把同一批数据送进真正的 `ppo_loss`、`grpo_loss`，有 KL 与
没有 KL 各反传一次，两次梯度之差就是 KL 的信用（`reward_kl_credit` 由 `ppo.py` 的零件拼成，所以另按定义逐项求和，
不用递推）；GRPO 一侧还真的调用 TRL 1.16 的 `GRPOTrainer._compute_loss`；(3) 枚举：一棵很小的 token 树，列出全部回答，期望梯度与整条回答的
精确 KL 的自动微分、中心差分比。最后一节把流传的错误说法写成公式，断言第 (2) 种真值不认它们。
全部用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import math

import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.grpo import grpo_loss
from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards, ppo_loss, whiten
from snippets.rl.ppo_vs_grpo import loss_kl_credit, reward_kl_credit

# 五行：满的、尾部填充、中间两个工具 token、开头就是工具 token、整行为假
MASK = torch.tensor(
    [[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0], [1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 0, 0]]
).bool()
BETA = 0.3
SETTINGS = [(1.0, 1.0), (1.0, 0.95), (0.9, 0.5), (1.0, 0.0)]


def batch():
    generator = torch.Generator().manual_seed(7)

    def noise():
        return torch.randn(MASK.shape, generator=generator, dtype=torch.float64)

    old = -2 - noise().abs()
    return {
        "old": old,
        "ref": old + 0.7 * noise(),
        "new": old + 0.3 * noise(),
        "values": noise(),
        "scores": torch.tensor([1.0, -0.5, 0.8, 0.3, 0.1], dtype=torch.float64),
    }


def ppo_advantages(data, *, kl_coef, gamma, lam):
    rewards = kl_shaped_rewards(data["scores"], data["old"], data["ref"], MASK, kl_coef=kl_coef)
    return generalized_advantage(rewards, data["values"], MASK, gamma=gamma, lam=lam)[0]


def ppo_weights(data, advantages, *, at="old", clip=0.2):
    """真的 `ppo_loss` 反传：目标对每个 token 的对数概率的导数，乘回 token 数。"""
    leaf = data[at].clone().requires_grad_()
    zeros = torch.zeros_like(leaf)
    loss = ppo_loss(
        leaf, data["old"], advantages, zeros, zeros, zeros, zeros, MASK, clip_low=clip, clip_high=clip
    )
    return -torch.autograd.grad(loss, leaf)[0] * MASK.sum()


def grpo_weights(data, advantages, *, beta, at="old"):
    """真的 `grpo_loss` 反传，乘回「有效行数 × 自己的长度」。"""
    leaf = data[at].clone().requires_grad_()
    loss = grpo_loss(leaf, data["old"], data["ref"], advantages, MASK, beta=beta)
    lengths = MASK.sum(1, keepdim=True)
    return -torch.autograd.grad(loss, leaf)[0] * (lengths > 0).sum() * lengths


# ---- 手算 ----


@pytest.mark.parametrize(("lam", "expected"), [(1.0, [-2, -2, -2, 0]), (0.5, [-0.5, -1, -2, 0])])
def test_one_spike_by_hand(lam, expected):
    """k1 只在第 3 个 token 是 2，其余是 0：PPO 的第 t 个 token 分到 −β·2·λ^(3−t)，之后的分到 0。"""
    old = torch.zeros(1, 4, dtype=torch.float64)
    ref = torch.tensor([[0.0, 0.0, -2.0, 0.0]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    credit = reward_kl_credit(old, ref, mask, kl_coef=0.1, lam=lam)
    torch.testing.assert_close(credit, 0.1 * torch.tensor([expected], dtype=torch.float64))
    credit = loss_kl_credit(old, ref, mask, beta=0.1)
    expected = torch.tensor([[0, 0, -0.1 * (1 - math.exp(-2)), 0]], dtype=torch.float64)
    torch.testing.assert_close(credit, expected)


def test_a_single_token_keeps_its_own_kl():
    old, ref = torch.zeros(1, 1, dtype=torch.float64), torch.full((1, 1), -2.0, dtype=torch.float64)
    credit = reward_kl_credit(old, ref, torch.ones(1, 1, dtype=torch.bool), kl_coef=0.1)
    torch.testing.assert_close(credit, torch.full_like(credit, -0.2))


# ---- 与真正的损失对拍 ----


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_reward_credit_is_what_the_kl_adds_to_the_ppo_gradient(gamma, lam):
    data = batch()
    with_kl = ppo_weights(data, ppo_advantages(data, kl_coef=BETA, gamma=gamma, lam=lam))
    without = ppo_weights(data, ppo_advantages(data, kl_coef=0.0, gamma=gamma, lam=lam))
    credit = reward_kl_credit(data["old"], data["ref"], MASK, kl_coef=BETA, gamma=gamma, lam=lam)
    torch.testing.assert_close(credit, with_kl - without)


@pytest.mark.parametrize(("gamma", "lam"), SETTINGS)
def test_reward_credit_equals_the_discounted_sum_over_the_generated_tokens(gamma, lam):
    """按定义逐项求和：每一行先挑出策略生成的 token，再对后面每一个加 −β(γλ)^l·k1，l（代码里的 steps）数的是生成的 token。"""
    data, expected = batch(), torch.zeros(MASK.shape, dtype=torch.float64)
    for row in range(len(MASK)):
        generated = MASK[row].nonzero().flatten().tolist()
        for i, t in enumerate(generated):
            for steps, u in enumerate(generated[i:]):
                expected[row, t] -= BETA * (gamma * lam) ** steps * (data["old"] - data["ref"])[row, u]
    credit = reward_kl_credit(data["old"], data["ref"], MASK, kl_coef=BETA, gamma=gamma, lam=lam)
    torch.testing.assert_close(credit, expected)


def test_loss_credit_is_what_the_kl_adds_to_trls_grpo_gradient():
    """TRL 1.16 按条平均：关掉 ρ 修正是 −β(1−r)；默认打开，第一次更新处是 −β·k1。"""
    data = {name: value[:4] for name, value in batch().items()}  # 整行为假的一行 TRL 也算进条数
    mask = MASK[:4]
    scale = len(mask) * mask.sum(1, keepdim=True)

    def weights(beta, bias_correction_kl):
        gradient = trl_grpo_loss(
            data["old"],
            data["old"],
            data["scores"],
            mask,
            ref_log_probs=data["ref"],
            beta=beta,
            bias_correction_kl=bias_correction_kl,
        )[1]
        return -gradient * scale

    plain = weights(BETA, False) - weights(0.0, False)
    torch.testing.assert_close(loss_kl_credit(data["old"], data["ref"], mask, beta=BETA), plain)
    corrected = weights(BETA, True) - weights(0.0, True)
    torch.testing.assert_close(-BETA * (data["old"] - data["ref"]).masked_fill(~mask, 0.0), corrected)


def test_loss_credit_is_what_the_kl_adds_to_the_grpo_gradient():
    data = batch()
    for at in ("old", "new"):  # 更新之后用新的策略重算
        difference = grpo_weights(data, data["scores"], beta=BETA, at=at) - grpo_weights(
            data, data["scores"], beta=0.0, at=at
        )
        torch.testing.assert_close(loss_kl_credit(data[at], data["ref"], MASK, beta=BETA), difference)


def test_whitening_divides_the_reward_credit_by_the_batch_std():
    data = batch()
    raw = ppo_advantages(data, kl_coef=0.0, gamma=1.0, lam=1.0)
    credit = reward_kl_credit(data["old"], data["ref"], MASK, kl_coef=BETA, lam=1.0)
    both = (raw + credit)[MASK]
    expected = torch.zeros_like(raw)
    expected[MASK] = (both - both.mean()) / both.std()
    actual = ppo_weights(data, whiten(ppo_advantages(data, kl_coef=BETA, gamma=1.0, lam=1.0), MASK))
    torch.testing.assert_close(actual, expected)


def test_clipping_removes_the_reward_credit_but_not_the_loss_credit():
    """ρ 超出区间、优势为正：PPO 的整个权重是 0，KL 也没了；GRPO 剩下的恰好是 KL 的信用。"""
    data = batch()
    data["new"] = torch.where(MASK, data["old"] + 0.5, data["old"])  # ρ = e^0.5，超过 1.2
    positive = torch.full(MASK.shape, 5.0, dtype=torch.float64)
    with_kl = positive + reward_kl_credit(data["old"], data["ref"], MASK, kl_coef=BETA)
    assert (with_kl[MASK] > 0).all()
    assert ppo_weights(data, with_kl, at="new").abs().max() == 0
    left = grpo_weights(data, positive[:, 0], beta=BETA, at="new")
    torch.testing.assert_close(left, loss_kl_credit(data["new"], data["ref"], MASK, beta=BETA))


def test_later_updates_keep_the_reward_credit_and_recompute_the_loss_credit():
    """不裁剪时 PPO 的 KL 只多乘 ρ，信用仍是采样时的；GRPO 的信用随新策略变。"""
    data = batch()
    weights = [
        ppo_weights(data, ppo_advantages(data, kl_coef=c, gamma=1.0, lam=1.0), at="new", clip=1e3)
        for c in (BETA, 0.0)
    ]
    ratio = (data["new"] - data["old"]).exp()
    credit = reward_kl_credit(data["old"], data["ref"], MASK, kl_coef=BETA, lam=1.0)
    torch.testing.assert_close(weights[0] - weights[1], ratio * credit)
    before, after = (loss_kl_credit(data[at], data["ref"], MASK, beta=BETA) for at in ("old", "new"))
    assert (before - after)[MASK].abs().min() > 1e-4


# ---- 性质 ----


@pytest.mark.parametrize("spike", [0, 2, 5])
def test_a_spike_reaches_all_earlier_tokens_in_ppo_and_only_itself_in_grpo(spike):
    data, row = batch(), 0
    changed = data["ref"].clone()
    changed[row, spike] -= 1.5

    def touched(credit, **options):
        before = credit(data["old"], data["ref"], MASK, **options)
        after = credit(data["old"], changed, MASK, **options)
        return {tuple(x) for x in (before - after).abs().gt(1e-12).nonzero().tolist()}

    assert touched(reward_kl_credit, lam=1.0) == {(row, t) for t in range(spike + 1)}
    assert touched(reward_kl_credit, lam=0.5) == {(row, t) for t in range(spike + 1)}
    assert touched(reward_kl_credit, lam=0.0) == {(row, spike)}
    assert touched(loss_kl_credit) == {(row, spike)}


def test_push_down_is_bounded_and_pull_up_is_not():
    old = torch.zeros(1, 2, dtype=torch.float64)
    ref = torch.tensor([[-30.0, 10.0]], dtype=torch.float64)
    down, up = loss_kl_credit(old, ref, old == 0, beta=0.04)[0].tolist()
    assert -0.04 <= down < -0.04 + 1e-12
    assert up == pytest.approx(0.04 * (math.exp(10) - 1))


# ---- 枚举：期望是谁的梯度 ----

LENGTH, EOS = 4, 2
ANSWERS = [[*bits, EOS] for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]
ANSWERS += [list(bits) for bits in itertools.product((0, 1), repeat=LENGTH)]  # 写满也没有 EOS
TOKENS = torch.tensor([answer + [EOS] * (LENGTH - len(answer)) for answer in ANSWERS])
TREE_MASK = torch.tensor([[t < len(answer) for t in range(LENGTH)] for answer in ANSWERS])
NODES: dict = {}
PREFIX = torch.tensor(
    [
        [NODES.setdefault(tuple(a[:t]), len(NODES)) if t < len(a) else 0 for t in range(LENGTH)]
        for a in ANSWERS
    ]
)


def tree_log_probs(logits):
    return logits.log_softmax(-1)[PREFIX, TOKENS].masked_fill(~TREE_MASK, 0.0)


def expected_gradient(logits, credit):
    leaf = logits.clone().requires_grad_()
    log_probs = tree_log_probs(leaf)
    probs = log_probs.sum(1).exp().detach()
    return torch.autograd.grad((probs[:, None] * credit * log_probs).sum(), leaf)[0]


def tree(scale=0.8):
    generator = torch.Generator().manual_seed(3)
    logits, ref = scale * torch.randn(2, len(NODES), 3, generator=generator, dtype=torch.float64)
    return logits, ref


def sequence_kl(logits, ref):
    log_probs = tree_log_probs(logits).sum(1)
    return (log_probs.exp() * (log_probs - tree_log_probs(ref).sum(1))).sum()


def test_reward_credit_descends_the_exact_sequence_kl():
    """λ=1 时期望梯度恰好是 −β∇KL（整条回答、反向），自动微分与中心差分各算一遍。"""
    logits, ref = tree()
    assert len(ANSWERS) == 31
    torch.testing.assert_close(tree_log_probs(logits).sum(1).exp().sum(), torch.ones((), dtype=torch.float64))
    credit = reward_kl_credit(
        tree_log_probs(logits), tree_log_probs(ref), TREE_MASK, kl_coef=BETA, gamma=1.0, lam=1.0
    )
    actual = expected_gradient(logits, credit)
    leaf = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(-BETA * sequence_kl(leaf, ref), leaf)
    torch.testing.assert_close(actual, truth)
    step, numeric = 1e-5, torch.zeros_like(logits)
    for i in itertools.product(*map(range, logits.shape)):
        shift = torch.zeros_like(logits)
        shift[i] = step
        difference = sequence_kl(logits + shift, ref) - sequence_kl(logits - shift, ref)
        numeric[i] = -BETA * difference / (2 * step)
    torch.testing.assert_close(actual, numeric, rtol=1e-6, atol=1e-8)  # 中心差分的截断误差


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_a_critic_that_knows_the_kl_to_go_keeps_the_direction_for_every_lambda(lam):
    """价值等于「往后还要扣的 KL」的精确期望：预料到的被减掉，期望梯度仍是 −β∇KL，λ=0 也一样。"""
    logits, ref = tree()
    log_probs, ref_log_probs = tree_log_probs(logits), tree_log_probs(ref)
    probs = log_probs.sum(1).exp()
    to_go = reward_kl_credit(log_probs, ref_log_probs, TREE_MASK, kl_coef=BETA, lam=1.0)
    sums = torch.zeros(2, len(NODES), dtype=torch.float64)
    for row, answer in enumerate(ANSWERS):
        for t in range(len(answer)):
            sums[:, PREFIX[row, t]] += probs[row] * torch.stack([to_go[row, t], torch.ones_like(probs[row])])
    values = (sums[0] / sums[1])[PREFIX].masked_fill(~TREE_MASK, 0.0)
    rewards = kl_shaped_rewards(torch.zeros_like(probs), log_probs, ref_log_probs, TREE_MASK, kl_coef=BETA)
    advantages, _ = generalized_advantage(rewards, values, TREE_MASK, gamma=1.0, lam=lam)
    leaf = logits.clone().requires_grad_()
    (truth,) = torch.autograd.grad(-BETA * sequence_kl(leaf, ref), leaf)
    torch.testing.assert_close(expected_gradient(logits, advantages), truth)
    if lam == 0:  # 不认识 KL 的价值配 λ=0 就只剩自己那一步，方向差得远
        alone = reward_kl_credit(log_probs, ref_log_probs, TREE_MASK, kl_coef=BETA, lam=0.0)
        assert (expected_gradient(logits, alone) - truth).norm() > 0.2 * truth.norm()


def test_loss_credit_descends_forward_kl_of_each_prefix():
    """GRPO：每个前缀上是前向 KL 的梯度，前缀的分布不动；与整条的反向 KL 明显不同。"""
    logits, ref = tree()
    credit = loss_kl_credit(tree_log_probs(logits), tree_log_probs(ref), TREE_MASK, beta=BETA)
    actual = expected_gradient(logits, credit)
    reached = torch.zeros(len(NODES), dtype=torch.float64)
    probs = tree_log_probs(logits).sum(1).exp()
    reached.index_add_(0, PREFIX[TREE_MASK], probs[:, None].expand(TREE_MASK.shape)[TREE_MASK])
    leaf = logits.clone().requires_grad_()
    new, old_ref = (torch.distributions.Categorical(logits=x) for x in (leaf, ref))
    forward = torch.distributions.kl_divergence(old_ref, new)  # (前缀数)
    (truth,) = torch.autograd.grad(-BETA * (reached * forward).sum(), leaf)
    torch.testing.assert_close(actual, truth)
    leaf = logits.clone().requires_grad_()
    (sequence,) = torch.autograd.grad(-BETA * sequence_kl(leaf, ref), leaf)
    assert (actual - sequence).norm() > 0.2 * sequence.norm()


def test_only_the_reward_credit_pushes_towards_shorter_answers():
    """停的概率与参考策略处处相同、只有内容不同：k1 进奖励推高停的 logit，k3 损失一点不推。"""
    logits, ref = tree()
    ref = torch.cat([ref[:, :2], ref[:, 2:] * 0], 1)
    stop = logits.log_softmax(-1)[:, 2]
    other = torch.log1p(-stop.exp()) - ref[:, :2].logsumexp(-1)
    ref = torch.cat([ref[:, :2] + other[:, None], stop[:, None]], 1)  # 停的概率照抄
    torch.testing.assert_close(ref.log_softmax(-1)[:, 2], stop)
    args = tree_log_probs(logits), tree_log_probs(ref), TREE_MASK
    pushed = expected_gradient(logits, reward_kl_credit(*args, kl_coef=BETA, lam=1.0))[:, 2]
    assert (pushed > 1e-6).all() and pushed[0] > 0.01
    pulled = expected_gradient(logits, loss_kl_credit(*args, beta=BETA))[:, 2]
    torch.testing.assert_close(pulled, torch.zeros_like(pulled))


# ---- 边界 ----


def test_masked_positions_do_not_matter_and_get_nothing():
    data = batch()
    args = data["old"], data["ref"]
    dirty = [x.masked_fill(~MASK, float("nan")) for x in args]
    for credit in (reward_kl_credit, loss_kl_credit):
        torch.testing.assert_close(credit(*dirty, MASK), credit(*args, MASK))
        assert (credit(*args, MASK)[~MASK] == 0).all()


@pytest.mark.parametrize("bad", [{"kl_coef": -0.1}, {"gamma": 1.5}, {"lam": -0.5}])
def test_impossible_scalars_are_refused(bad):
    data = batch()
    with pytest.raises(ValueError, match=next(iter(bad))):
        reward_kl_credit(data["old"], data["ref"], MASK, **bad)


def test_float32_stays_float32():
    args = batch()["old"].float(), batch()["ref"].float(), MASK
    assert reward_kl_credit(*args).dtype == loss_kl_credit(*args).dtype == torch.float32


def test_defaults_are_the_papers():
    data = batch()
    args = data["old"], data["ref"], MASK
    explicit = reward_kl_credit(*args, kl_coef=0.02, gamma=1.0, lam=0.95)
    torch.testing.assert_close(reward_kl_credit(*args), explicit)
    torch.testing.assert_close(loss_kl_credit(*args), loss_kl_credit(*args, beta=0.04))


def test_tiny_log_ratios_keep_their_digits():
    """1−r 直接相减在 float32 下丢光有效位，expm1 不会；真值用一阶展开。"""
    old = torch.zeros(1, 1)
    credit = loss_kl_credit(old, old + 1e-9, old == 0, beta=1.0)
    torch.testing.assert_close(credit, torch.tensor([[1e-9]]), rtol=1e-5, atol=0.0)  # 默认 atol 比真值还大


# ---- 流传的错误说法 ----


def wrong_ppo_own_token_only(old, ref, mask):
    return -BETA * (old - ref).masked_fill(~mask, 0.0)


def wrong_ppo_flows_to_later_tokens(old, ref, mask):
    return (-BETA * (old - ref).masked_fill(~mask, 0.0)).cumsum(1).masked_fill(~mask, 0.0)


def wrong_ppo_reversed_sign(old, ref, mask):
    return -reward_kl_credit(old, ref, mask, kl_coef=BETA, gamma=0.9, lam=0.5)


def wrong_ppo_counts_tool_tokens(old, ref, mask):
    """把掩掉的位置也当成一步来打折扣。"""
    penalty = (-BETA * (old - ref)).masked_fill(~mask, 0.0)
    total = torch.zeros_like(penalty)
    for t, u in itertools.product(range(mask.shape[1]), repeat=2):
        if u >= t:
            total[:, t] += 0.45 ** (u - t) * penalty[:, u]
    return total.masked_fill(~mask, 0.0)


def wrong_grpo_sentence_level(log_probs, ref, mask):
    """「GRPO 的 KL 是句子级的」：整条平均成一个数，再分给每个 token。"""
    credit = loss_kl_credit(log_probs, ref, mask, beta=BETA)
    mean = credit.sum(1, keepdim=True) / mask.sum(1, keepdim=True).clamp(min=1)
    return mean.expand_as(credit).masked_fill(~mask, 0.0)


def wrong_grpo_flows_back(log_probs, ref, mask):
    return loss_kl_credit(log_probs, ref, mask, beta=BETA).flip(1).cumsum(1).flip(1).masked_fill(~mask, 0.0)


def wrong_grpo_reversed_ratio(log_probs, ref, mask):
    return loss_kl_credit(ref, log_probs, mask, beta=BETA)


def wrong_grpo_k1_weight(log_probs, ref, mask):
    """当成 k2 损失，或乘了可导的 ρ 的 k3。"""
    return -BETA * (log_probs - ref).masked_fill(~mask, 0.0)


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [
        wrong_ppo_own_token_only,
        wrong_ppo_flows_to_later_tokens,
        wrong_ppo_reversed_sign,
        wrong_ppo_counts_tool_tokens,
    ],
)
def test_wrong_reward_credit_is_rejected(wrong):
    data = batch()
    truth = ppo_weights(data, ppo_advantages(data, kl_coef=BETA, gamma=0.9, lam=0.5)) - ppo_weights(
        data, ppo_advantages(data, kl_coef=0.0, gamma=0.9, lam=0.5)
    )
    # 只有带工具 token 的两行能看出最后一种错
    assert (wrong(data["old"], data["ref"], MASK) - truth).norm() > 0.04 * truth.norm()


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [wrong_grpo_sentence_level, wrong_grpo_flows_back, wrong_grpo_reversed_ratio, wrong_grpo_k1_weight],
)
def test_wrong_loss_credit_is_rejected(wrong):
    data = batch()
    truth = grpo_weights(data, data["scores"], beta=BETA) - grpo_weights(data, data["scores"], beta=0.0)
    assert (wrong(data["old"], data["ref"], MASK) - truth).norm() > 0.2 * truth.norm()
