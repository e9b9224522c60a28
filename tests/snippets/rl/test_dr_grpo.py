r"""snippets/rl/dr_grpo.py 的测试。

真值有四个来源，互不相同：(1) 手算；(2) 精确枚举：一棵很小的 token 树，列出全部回答、全部大小为 G 的组，
把「组的概率乘这一组损失的梯度」加起来，与期望奖励 $J$ 的梯度比，后者由自动微分和有限差分各算一遍；
(3) TRL 1.16：直接调用 `GRPOTrainer._compute_loss`，以及用随机小模型真的训练一步；
(4) 论文作者的代码与 verl 0.9.1 跑出来后冻结的数值和梯度，见 tests/golden/make_dr_grpo.py。
最后一节把流传的错误写法逐个写出来，断言枚举的真值不认它们。
全部用 float64（TRL 的小模型除外）；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import itertools
import json
import math
from collections import Counter
from pathlib import Path

import jaxtyping
import pytest
import torch
from tiny_models import tiny_gpt2, word_tokenizer
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.dr_grpo import dr_grpo_loss, question_weight
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss
from snippets.rl.rloo import leave_one_out_advantages

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "dr_grpo.json").read_text(encoding="utf-8"))


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


# ---- 精确枚举的工具 ----


class Tree:
    """词表 {EOS, 1, …, V-1}、最长 `horizon` 个 token 的全部回答；每个前缀一行 logits。"""

    def __init__(self, vocab_size, horizon):
        words = range(1, vocab_size)
        answers = [body + (0,) for n in range(horizon) for body in itertools.product(words, repeat=n)]
        answers += list(itertools.product(words, repeat=horizon))  # 到上限被截断，没有 EOS
        prefixes = {}
        self.tokens = torch.zeros(len(answers), horizon, dtype=torch.long)
        self.nodes = torch.zeros(len(answers), horizon, dtype=torch.long)
        self.mask = torch.zeros(len(answers), horizon, dtype=torch.bool)
        for i, answer in enumerate(answers):
            for t, token in enumerate(answer):
                self.tokens[i, t] = token
                self.nodes[i, t] = prefixes.setdefault(answer[:t], len(prefixes))
                self.mask[i, t] = True
        self.lengths = self.mask.sum(1)
        self.num_answers, self.horizon = len(answers), horizon
        self.logits_shape = (len(prefixes), vocab_size)

    def log_probs(self, logits):
        return logits.log_softmax(-1)[self.nodes, self.tokens].masked_fill(~self.mask, 0.0)

    def groups(self, size):
        """全部不计次序的组，以及每个组有多少种排列；损失与次序无关，所以这样就够了。"""
        for rows in itertools.combinations_with_replacement(range(self.num_answers), size):
            repeats = math.prod(math.factorial(c) for c in Counter(rows).values())
            yield list(rows), math.factorial(size) / repeats


def random_logits(tree, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tree.logits_shape, generator=generator, dtype=torch.float64).requires_grad_()


def expected_gradient(tree, logits, rewards, group_size, loss_fn):
    """对全部组求期望的下降方向 −E[∇loss]；loss_fn(log_probs, rewards, mask)。"""
    log_probs = tree.log_probs(logits)
    probs = log_probs.sum(1).exp().detach()
    total, mass = 0.0, 0.0
    for rows, count in tree.groups(group_size):
        weight = count * probs[rows].prod()
        total = total + weight * loss_fn(log_probs[rows], rewards[rows], tree.mask[rows])
        mass += weight.item()
    assert mass == pytest.approx(1.0, abs=1e-12)  # 一个组也没有漏
    return -torch.autograd.grad(total, logits)[0].flatten()


def objective_gradient(tree, logits, values):
    """∇ E[values]：先对全部回答求和再求导。"""
    expectation = (tree.log_probs(logits).sum(1).exp() * values).sum()
    return torch.autograd.grad(expectation, logits)[0].flatten()


def finite_difference_gradient(tree, logits, values, step=1e-5):
    def value(x):
        return (tree.log_probs(x).sum(1).exp() * values).sum().item()

    grad = torch.zeros_like(logits.detach())
    for index in range(logits.numel()):
        delta = torch.zeros_like(grad)
        delta.view(-1)[index] = step
        grad.view(-1)[index] = (value(logits.detach() + delta) - value(logits.detach() - delta)) / (2 * step)
    return grad.flatten()


def residual(actual, direction):
    """把 actual 投影到 direction 上之后剩下的比例：0 表示平行。"""
    scale = actual @ direction / (direction @ direction)
    return ((actual - scale * direction).norm() / actual.norm()).item()


def ours(log_probs, rewards, mask, *, length=4, group_size=None):
    return dr_grpo_loss(
        log_probs,
        log_probs.detach(),
        rewards,
        mask,
        group_size=group_size or len(rewards),
        max_response_length=length,
    )


def variant(mode, *, by_std=False, length=4):
    """同一条流水线，只换聚合方式与是否除标准差。"""

    def loss(log_probs, rewards, mask):
        advantages = group_advantages(rewards, group_size=len(rewards), scale_by_std=by_std)
        token_losses = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages[:, None])
        return aggregate_loss(token_losses, mask, mode=mode, max_response_length=length)

    return loss


BIG = Tree(3, 3)  # 15 条回答，长度 1–3
SMALL = Tree(2, 4)  # 5 条回答，长度 1–4
REAL_REWARDS = tensor([0.7, -1.2, 0.4, 2.0, 0.1, -0.3, 1.1, 0.9, 0.0, -0.8, 1.5, 0.2, -2.0, 0.6, 0.3])
BINARY = tensor([1, 0, 1, 1, 0, 0, 1, 0, 1, 0, 1, 0, 0, 0, 1])
SMALL_BINARY = tensor([0, 1, 0, 1, 0])


# ---- 手算 ----


def test_value_and_gradient_by_hand():
    """两条回答，长度 1 与 3，奖励 1 与 0：优势 ±0.5；L_max=4、B=2，每个 token 的权重是 1/8。
    ρ=1：损失 −(0.5·1 − 0.5·3)/8 = 0.125；对 log π 的梯度是 −Â/8，即 −1/16 与三个 +1/16，与长度无关。
    """
    log_probs = tensor([[-0.3, 0.0, 0.0], [-0.7, -1.1, -0.2]]).requires_grad_()
    mask = torch.tensor([[True, False, False], [True, True, True]])
    loss = ours(log_probs, tensor([1.0, 0.0]), mask)
    (grad,) = torch.autograd.grad(loss, log_probs)
    torch.testing.assert_close(loss.detach(), tensor(0.125))
    torch.testing.assert_close(grad, tensor([[-1, 0, 0], [1, 1, 1]]) / 16)


def test_clipping_is_applied_per_token():
    """一组两条、各一个 token，优势 ±0.5，ε=(0.2, 0.28)，L_max=1。正优势 ρ=1.5 → 截到 1.28，没有梯度；
    负优势 ρ=1.5 → 不截，损失 +0.75。合计 (−1.28·0.5 + 1.5·0.5)/2 = 0.055。
    """
    log_probs = tensor([[1.5], [1.5]]).log().requires_grad_()
    loss = dr_grpo_loss(
        log_probs,
        torch.zeros_like(log_probs).detach(),
        tensor([1.0, 0.0]),
        torch.ones(2, 1, dtype=torch.bool),
        group_size=2,
        max_response_length=1,
        clip_low=0.2,
        clip_high=0.28,
    )
    torch.testing.assert_close(loss.detach(), tensor(0.055))
    torch.testing.assert_close(torch.autograd.grad(loss, log_probs)[0], tensor([[0.0], [0.375]]))


def test_each_width_reaches_its_own_side():
    """优势 ±0.5、L_max=1：正优势 ρ=1.25、负优势 ρ=0.75，默认 0.2 时都没有梯度；放宽哪一侧，哪一个回到 −ρÂ/2。"""
    for widths, expected in [
        ({}, [[0.0], [0.0]]),
        ({"clip_low": 0.3}, [[0.0], [0.1875]]),
        ({"clip_high": 0.3}, [[-0.3125], [0.0]]),
    ]:
        log_probs = tensor([[1.25], [0.75]]).log().requires_grad_()
        loss = dr_grpo_loss(
            log_probs,
            torch.zeros_like(log_probs).detach(),
            tensor([1.0, 0.0]),
            torch.ones(2, 1, dtype=torch.bool),
            group_size=2,
            max_response_length=1,
            **widths,
        )
        torch.testing.assert_close(torch.autograd.grad(loss, log_probs)[0], tensor(expected))


def test_default_clip_widths_are_the_papers():
    """不传宽度时上下都是 0.2（论文表 6）。优势 ±0.5、L_max=1：正优势 ρ=1.25 → 1.2，负优势 ρ=0.75 → 0.8；
    损失 (−1.2·0.5 + 0.8·0.5)/2 = −0.1，两个 token 都没有梯度。
    """
    log_probs = tensor([[1.25], [0.75]]).log().requires_grad_()
    loss = dr_grpo_loss(
        log_probs,
        torch.zeros_like(log_probs).detach(),
        tensor([1.0, 0.0]),
        torch.ones(2, 1, dtype=torch.bool),
        group_size=2,
        max_response_length=1,
    )
    torch.testing.assert_close(loss.detach(), tensor(-0.1))
    assert not torch.autograd.grad(loss, log_probs)[0].any()


def test_question_weight_by_hand():
    """G=2：混合组只有一对一错，σ=1/√2，权重 ½·√2 = 0.7071，与 p 无关。
    G=3：一对两错或两对一错，σ 都是 1/√3，权重 ⅔·√3 = 1.1547，也与 p 无关。
    G=4、p=½：M 取 0、1、2 的概率是 ¼、½、¼，σ=½、1/√3、½，¾·(¼·2+½·√3+¼·2) = 1.3995。
    G=8、p→0：只剩 M=0，σ=√(7/56)，权重 ⅞·√8 = 2.4749。
    """
    p = tensor([0.0, 0.1, 0.5, 0.9])
    torch.testing.assert_close(question_weight(p, group_size=2), torch.full_like(p, math.sqrt(0.5)))
    torch.testing.assert_close(question_weight(p, group_size=3), torch.full_like(p, 2 / math.sqrt(3)))
    expected = 0.75 * (1 + math.sqrt(3) / 2)
    torch.testing.assert_close(question_weight(tensor([0.5]), group_size=4), tensor([expected]))
    torch.testing.assert_close(question_weight(tensor([0.0]), group_size=8), tensor([7 / 8 * math.sqrt(8)]))


# ---- 精确枚举：每种写法是谁的梯度 ----


@pytest.mark.parametrize("rewards", [BINARY, REAL_REWARDS], ids=["binary", "real"])
def test_expected_gradient_is_a_multiple_of_the_policy_gradient(rewards):
    """E[∇L] = −(G−1)/(G·L_max)·∇J，任意奖励都成立；∇J 由自动微分与有限差分各算一遍。"""
    logits = random_logits(BIG, 0)
    actual = expected_gradient(BIG, logits, rewards, 3, ours)
    truth = objective_gradient(BIG, logits, rewards)
    torch.testing.assert_close(actual, truth * (2 / 3) / 4)
    # 中心差分的误差约 1e-10
    torch.testing.assert_close(truth, finite_difference_gradient(BIG, logits, rewards), rtol=0, atol=1e-8)


def test_equals_rloo_up_to_the_group_factor():
    """同一组样本上逐个相等：G/(G−1) 乘我们的梯度 = 留一基线、不除长度的梯度（除以同一个常数）。"""
    generator = torch.Generator().manual_seed(5)
    log_probs = -torch.rand(6, 5, generator=generator, dtype=torch.float64)
    rewards = torch.randn(6, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 1, 3, 2, 4, 2])[:, None]
    leaf = log_probs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(ours(leaf, rewards, mask, group_size=3, length=7), leaf)
    expected = torch.zeros_like(grad)
    for i, reward in enumerate(rewards.tolist()):
        group = rewards[3 * (i // 3) : 3 * (i // 3) + 3].tolist()
        baseline = (sum(group) - reward) / 2  # 同组另外两条的平均
        expected[i] = -(reward - baseline) / (6 * 7)
    torch.testing.assert_close(1.5 * grad, expected * mask)
    torch.testing.assert_close(
        1.5 * group_advantages(rewards, group_size=3, scale_by_std=False),
        leave_one_out_advantages(rewards, group_size=3),
    )


@pytest.mark.parametrize("rewards", [BINARY, REAL_REWARDS], ids=["binary", "real"])
def test_per_sequence_mean_ascends_a_length_discounted_reward(rewards):
    """只留 1/|o|：期望梯度恰是 (G−1)/G·∇E[(R−J)/|o|]，求导时 J 当常数。"""
    logits = random_logits(BIG, 0)
    actual = expected_gradient(BIG, logits, rewards, 3, variant("seq-mean-token-mean"))
    success = (BIG.log_probs(logits).sum(1).exp() * rewards).sum().detach()
    pseudo_rewards = (rewards - success) / BIG.lengths
    torch.testing.assert_close(actual, 2 / 3 * objective_gradient(BIG, logits, pseudo_rewards))


@pytest.mark.parametrize("group_size", [2, 3, 8])
@pytest.mark.parametrize("mode", ["seq-mean-token-sum-norm", "seq-mean-token-mean"])
def test_dividing_by_std_multiplies_each_question_by_its_weight(group_size, mode):
    """0/1 奖励：除标准差之后的期望梯度 = 不除时的 w_G(p)·G/(G−1) 倍，无论按哪种方式聚合。"""
    logits = random_logits(SMALL, 1)
    rate = (SMALL.log_probs(logits).sum(1).exp() * SMALL_BINARY).sum().detach()
    plain = expected_gradient(SMALL, logits, SMALL_BINARY, group_size, variant(mode))
    scaled = expected_gradient(SMALL, logits, SMALL_BINARY, group_size, variant(mode, by_std=True))
    factor = question_weight(rate[None], group_size=group_size) * group_size / (group_size - 1)
    # group_advantages 的分母多了 1e-6
    torch.testing.assert_close(scaled, factor * plain, rtol=1e-5, atol=1e-8)


def test_question_weight_matches_every_reward_pattern():
    """不经过策略：列出 2^G 种对错，直接取 E[Â_i·(1[对] − p)]/(p(1−p))，即沿得分方向的系数。"""
    group_size, rate = 5, 0.3
    total = 0.0
    for pattern in itertools.product([0.0, 1.0], repeat=group_size):
        rewards = tensor(pattern)
        prob = math.prod(rate if r else 1 - rate for r in pattern)
        std = rewards.std().item()
        if std > 0:
            advantages = (rewards - rewards.mean()) / std
            total += prob * (advantages * (rewards - rate)).mean().item() / (rate * (1 - rate))
    torch.testing.assert_close(question_weight(tensor([rate]), group_size=group_size), tensor([total]))


def test_question_weight_tends_to_the_reciprocal_population_std():
    """G→∞ 时 w→1/√(p(1−p))；G=512 时相对误差小于 2%。"""
    p = tensor([0.1, 0.3, 0.5])
    expected = (p * (1 - p)).rsqrt()
    torch.testing.assert_close(question_weight(p, group_size=512), expected, rtol=0.02, atol=0)


# ---- 与独立实现一致 ----


def run_trl(*args, **options):
    return trl_grpo_loss(*args, loss_type="dr_grpo", epsilon_high=0.28, **options)[:2]


def frozen_case():
    data = {key: tensor(value) for key, value in GOLDEN["inputs"].items()}
    return data["log_probs"], data["old_log_probs"], data["rewards"], data["loss_mask"].bool()


def our_value_and_grad(length=GOLDEN["config"]["max_response_length"]):
    log_probs, old_log_probs, rewards, mask = frozen_case()
    leaf = log_probs.clone().requires_grad_()
    loss = dr_grpo_loss(
        leaf,
        old_log_probs,
        rewards,
        mask,
        group_size=3,
        max_response_length=length,
        clip_low=0.2,
        clip_high=0.28,
    )
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


def test_loss_and_gradient_match_trl():
    log_probs, old_log_probs, rewards, mask = frozen_case()
    advantages = group_advantages(rewards, group_size=3, scale_by_std=False)
    expected = run_trl(log_probs, old_log_probs, advantages, mask, max_completion_length=11)
    torch.testing.assert_close(our_value_and_grad(), expected)


def test_micro_batches_need_no_global_denominator():
    """分母是常数：TRL 把一批拆成三个条数相同的微批，梯度加起来等于整批。"""
    log_probs, old_log_probs, rewards, mask = frozen_case()
    advantages = group_advantages(rewards, group_size=3, scale_by_std=False)
    parts = [
        run_trl(
            log_probs[i : i + 2],
            old_log_probs[i : i + 2],
            advantages[i : i + 2],
            mask[i : i + 2],
            max_completion_length=11,
            accumulation=3,
        )
        for i in (0, 2, 4)
    ]
    loss, grad = our_value_and_grad()
    torch.testing.assert_close(sum(part[0] for part in parts), loss)
    torch.testing.assert_close(torch.cat([part[1] for part in parts]), grad)


def train_one_step_with_trl(tmp_path, **options):
    """随机小模型、TRL 真的训练一步；返回奖励、TRL 的优势与损失，以及逐 token 的对数概率与掩码。"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<pad>", "<eos>", "a", "b", "c", "d"], unknown="a")
    model = tiny_gpt2(6)
    seen = {}

    class Recorder(GRPOTrainer):
        def _get_per_token_logps_and_entropies(self, *args, **kwargs):
            result = super()._get_per_token_logps_and_entropies(*args, **kwargs)
            seen["log_probs"] = result[0].detach()
            return result

        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen.update(advantages=inputs["advantages"], mask=inputs["completion_mask"].bool())
            seen["loss"] = loss.detach()
            return loss

    def reward(completions, **kwargs):
        seen["rewards"] = [float(len(text.split()) % 2) for text in completions]
        return seen["rewards"]

    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        max_completion_length=6,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = Dataset.from_dict({"prompt": ["a b", "c d"]})
    Recorder(model, reward, args=args, train_dataset=data, processing_class=tokenizer).train()
    return seen


# TRL 1.16 自己还在读旧名字 is_gradient_checkpointing，transformers 5.23 对此发 FutureWarning
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_trl_needs_two_flags(tmp_path):
    """loss_type="dr_grpo" 只换分母，优势仍除以标准差；再加 scale_rewards="none" 才与我们的损失相等。"""
    half = train_one_step_with_trl(tmp_path / "half", loss_type="dr_grpo")
    full = train_one_step_with_trl(tmp_path / "full", loss_type="dr_grpo", scale_rewards="none")
    rewards = torch.tensor(full["rewards"])
    assert half["rewards"] == full["rewards"] and 0 < rewards.mean() < 1
    # 打分之后 TRL 会打乱行的次序，所以排序后再比
    with_std = group_advantages(rewards, group_size=4, eps=1e-4)
    centered = group_advantages(rewards, group_size=4, scale_by_std=False)
    torch.testing.assert_close(half["advantages"].sort()[0], with_std.sort()[0])
    torch.testing.assert_close(full["advantages"].sort()[0], centered.sort()[0])
    loss = dr_grpo_loss(
        full["log_probs"],
        full["log_probs"],
        full["advantages"] + rewards.mean(),  # 打乱之后的奖励
        full["mask"],
        group_size=4,
        max_response_length=6,
    )
    torch.testing.assert_close(loss, full["loss"])
    assert abs(half["loss"] - loss) > 0.05


def test_matches_the_authors_code():
    """作者的优势函数与 masked_sum；后者的常数是 generate_max_length。"""
    log_probs, _, rewards, mask = frozen_case()
    authors = GOLDEN["authors"]
    torch.testing.assert_close(
        group_advantages(rewards, group_size=3, scale_by_std=False), tensor(authors["advantages_drgrpo"])
    )
    leaf = log_probs.clone().requires_grad_()
    value = aggregate_loss(leaf, mask, mode="seq-mean-token-sum-norm", max_response_length=11)
    (grad,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(value.detach(), tensor(authors["masked_sum"]["value"]))
    torch.testing.assert_close(grad, tensor(authors["masked_sum"]["grad"]))


def test_matches_the_verl_recipe():
    """verl：norm_adv_by_std_in_grpo=False、seq-mean-token-sum-norm、loss_scale_factor=11，三处都设。"""
    loss, grad = our_value_and_grad()
    golden = GOLDEN["verl"]["seq-mean-token-sum-norm_without_std"]
    torch.testing.assert_close(loss, tensor(golden["value"]))
    torch.testing.assert_close(grad, tensor(golden["grad"]))
    for other in ("seq-mean-token-mean_without_std", "seq-mean-token-sum-norm_with_std"):  # 只改一处
        assert residual(grad.flatten(), tensor(GOLDEN["verl"][other]["grad"]).flatten()) > 0.05


# ---- 性质 ----


def test_every_token_of_a_group_has_the_same_weight():
    """权重只看优势，不看长度：|梯度|/|Â| 处处是 1/(B·L_max)。"""
    generator = torch.Generator().manual_seed(2)
    log_probs = (-torch.rand(4, 9, generator=generator, dtype=torch.float64)).requires_grad_()
    mask = torch.arange(9) < torch.tensor([9, 1, 4, 6])[:, None]
    rewards = tensor([1.0, 0.0, 0.0, 1.0])
    (grad,) = torch.autograd.grad(ours(log_probs, rewards, mask, length=16), log_probs)
    advantages = group_advantages(rewards, group_size=4, scale_by_std=False)
    torch.testing.assert_close((grad / -advantages[:, None])[mask], torch.full((20,), 1 / 64).double())
    assert not grad[~mask].any()


def test_the_constant_only_rescales():
    small, large = our_value_and_grad(length=8), our_value_and_grad(length=3000)
    torch.testing.assert_close(small[0] * 8, large[0] * 3000)
    torch.testing.assert_close(small[1] * 8, large[1] * 3000)


def test_token_mean_is_the_same_direction_with_a_random_step():
    """同一批里 token-mean 的梯度 = Dr. GRPO 的梯度 × L_max/平均长度：差别在于分母随批变。"""
    log_probs, _, rewards, mask = frozen_case()
    leaf = log_probs.clone().requires_grad_()
    advantages = group_advantages(rewards, group_size=3, scale_by_std=False)
    token_losses = clipped_surrogate_loss(leaf, leaf.detach(), advantages[:, None])
    (token_mean,) = torch.autograd.grad(aggregate_loss(token_losses, mask, mode="token-mean"), leaf)
    (grad,) = torch.autograd.grad(ours(leaf, rewards, mask, group_size=3, length=11), leaf)
    torch.testing.assert_close(token_mean, grad * 11 / mask.sum(1).double().mean())


def test_padding_and_group_order_do_not_matter():
    log_probs, old_log_probs, rewards, mask = frozen_case()
    options = {"group_size": 3, "max_response_length": 11}
    loss = dr_grpo_loss(log_probs, old_log_probs, rewards, mask, **options)

    def pad(x, value):
        return torch.nn.functional.pad(x, (0, 2), value=value)

    padded = dr_grpo_loss(pad(log_probs, -5.0), pad(old_log_probs, 3.0), rewards, pad(mask, False), **options)
    torch.testing.assert_close(padded, loss)
    order = torch.tensor([5, 3, 4, 2, 0, 1])  # 组内、组间都换位置，组仍完整
    moved = dr_grpo_loss(log_probs[order], old_log_probs[order], rewards[order], mask[order], **options)
    torch.testing.assert_close(moved, loss)


def test_adding_a_constant_to_the_rewards_changes_nothing_but_scaling_them_does():
    log_probs, old_log_probs, rewards, mask = frozen_case()
    options = {"group_size": 3, "max_response_length": 11}
    loss = dr_grpo_loss(log_probs, old_log_probs, rewards, mask, **options)
    torch.testing.assert_close(dr_grpo_loss(log_probs, old_log_probs, rewards + 3, mask, **options), loss)
    torch.testing.assert_close(
        dr_grpo_loss(log_probs, old_log_probs, 10 * rewards, mask, **options), 10 * loss
    )


# ---- 边界 ----


def test_equal_rewards_give_no_gradient():
    log_probs = tensor([[-0.1, -0.2], [-0.3, -0.4]]).requires_grad_()
    loss = ours(log_probs, tensor([1.0, 1.0]), torch.ones(2, 2, dtype=torch.bool))
    assert loss.item() == 0 and not torch.autograd.grad(loss, log_probs)[0].any()


def test_float32_in_float32_out():
    log_probs, old_log_probs, rewards, mask = frozen_case()
    loss = dr_grpo_loss(
        log_probs.float(),
        old_log_probs.float(),
        rewards.float(),
        mask,
        group_size=3,
        max_response_length=11,
        clip_high=0.28,
    )
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, our_value_and_grad()[0].float())


@pytest.mark.parametrize("length", [0, -3])
def test_the_constant_must_be_positive(length):
    with pytest.raises(ValueError, match="max_response_length"):
        ours(tensor([[0.0], [0.0]]), tensor([1.0, 0.0]), torch.ones(2, 1, dtype=torch.bool), length=length)


def test_one_answer_per_prompt_is_refused():
    with pytest.raises(ValueError, match="group_size=1"):
        ours(tensor([[0.0]]), tensor([1.0]), torch.ones(1, 1, dtype=torch.bool), group_size=1)
    with pytest.raises(ValueError, match="group_size=1"):
        question_weight(tensor([0.5]), group_size=1)


def test_token_level_rewards_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        ours(tensor([[0.0], [0.0]]), tensor([[1.0], [0.0]]), torch.ones(2, 1, dtype=torch.bool))


# ---- 流传的错误写法 ----


@pytest.mark.rejects
@pytest.mark.parametrize("mode", ["seq-mean-token-mean", "token-mean"])
def test_rejects_normalising_by_a_sampled_length(mode):
    """「加上长度归一化」与「就是 token-mean」：分母由采样决定，期望梯度不与 ∇J 平行；我们的残差是舍入误差。"""
    logits = random_logits(BIG, 0)
    truth = objective_gradient(BIG, logits, BINARY)
    margin = {"seq-mean-token-mean": 0.26, "token-mean": 0.07}[mode]
    assert residual(expected_gradient(BIG, logits, BINARY, 3, variant(mode)), truth) > margin
    assert residual(expected_gradient(BIG, logits, BINARY, 3, ours), truth) < 1e-12


@pytest.mark.rejects
def test_rejects_dividing_the_advantage_by_the_length():
    """「把优势除以回答长度来修正」：再按 token 平均，期望梯度与 GRPO 的偏差同样大，权重比 3 : 1 也相同。"""

    def divided(log_probs, rewards, mask):
        lengths = mask.sum(1, keepdim=True)
        advantages = group_advantages(rewards, group_size=len(rewards), scale_by_std=False)[:, None] / lengths
        token_losses = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages.expand_as(log_probs))
        return aggregate_loss(token_losses, mask, mode="seq-mean-token-sum-norm", max_response_length=4)

    logits = random_logits(BIG, 0)
    actual = expected_gradient(BIG, logits, BINARY, 3, divided)
    assert residual(actual, objective_gradient(BIG, logits, BINARY)) > 0.26
    assert residual(actual, expected_gradient(BIG, logits, BINARY, 3, variant("seq-mean-token-mean"))) < 1e-12
    mask = torch.tensor([[True, False, False], [True, True, True]])
    leaf = torch.zeros(2, 3, dtype=torch.float64).requires_grad_()
    (grad,) = torch.autograd.grad(divided(leaf, tensor([1.0, 0.0]), mask), leaf)
    assert -grad[0, 0] / grad[1, 0] == pytest.approx(3)  # 我们的是 1，见手算


@pytest.mark.rejects
def test_rejects_keeping_the_std():
    """「只去长度，留着标准差」：单独一道题只差倍数，两道难度不同的题合在一起就不平行了。"""
    parts = []
    for first_step in (0.0, -3.0):  # 第一步就停是错，否则是对：正确率 0.50 与 0.05
        logits = torch.zeros(SMALL.logits_shape, dtype=torch.float64)
        logits[0, 1] = first_step
        logits.requires_grad_()
        rewards = tensor([0, 1, 1, 1, 1])
        parts.append(
            [
                objective_gradient(SMALL, logits, rewards),
                expected_gradient(SMALL, logits, rewards, 8, variant("seq-mean-token-sum-norm", by_std=True)),
                expected_gradient(SMALL, logits, rewards, 8, ours),
            ]
        )
    truth, with_std, dr_grpo = (torch.cat(column) for column in zip(*parts, strict=True))
    assert all(residual(part[1], part[0]) < 1e-5 for part in parts)
    assert residual(with_std, truth) > 0.05
    assert residual(dr_grpo, truth) < 1e-12


@pytest.mark.rejects
def test_std_also_bends_the_direction_when_rewards_are_not_binary():
    """「标准差只改题间权重」只对 0/1 奖励成立：奖励有多个值时，一道题之内也不再平行。"""
    logits = random_logits(BIG, 0)
    by_std = variant("seq-mean-token-sum-norm", by_std=True)
    actual = expected_gradient(BIG, logits, REAL_REWARDS, 3, by_std)
    assert residual(actual, objective_gradient(BIG, logits, REAL_REWARDS)) > 0.05
    binary = expected_gradient(BIG, logits, BINARY, 3, by_std)
    assert residual(binary, objective_gradient(BIG, logits, BINARY)) < 1e-5


@pytest.mark.rejects
def test_rejects_removing_the_mean_too():
    """「均值也不减」：仍无偏，但倍数是 1 而不是 (G−1)/G，奖励整体加 3 之后噪声变大；Dr. GRPO 的噪声不变。"""
    logits = random_logits(SMALL, 1)

    def no_mean(log_probs, rewards, mask):
        token_losses = clipped_surrogate_loss(log_probs, log_probs.detach(), rewards[:, None])
        return aggregate_loss(token_losses, mask, mode="seq-mean-token-sum-norm", max_response_length=4)

    def relative_noise(loss_fn, rewards):
        """每组梯度的总标准差，除以期望梯度的范数。"""
        log_probs = SMALL.log_probs(logits)
        probs = log_probs.sum(1).exp().detach()
        mean, second = 0.0, 0.0
        for rows, count in SMALL.groups(3):
            weight = count * probs[rows].prod()
            loss = loss_fn(log_probs[rows], rewards[rows], SMALL.mask[rows])
            (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
            mean, second = mean + weight * grad, second + weight * grad.square().sum()
        return ((second - mean.square().sum()).sqrt() / mean.norm()).item()

    truth = objective_gradient(SMALL, logits, SMALL_BINARY) / 4
    torch.testing.assert_close(expected_gradient(SMALL, logits, SMALL_BINARY, 3, no_mean), truth)
    torch.testing.assert_close(expected_gradient(SMALL, logits, SMALL_BINARY, 3, ours), truth * 2 / 3)
    shifted = SMALL_BINARY + 3
    assert relative_noise(no_mean, shifted) > 3 * relative_noise(no_mean, SMALL_BINARY)
    assert relative_noise(ours, shifted) == pytest.approx(relative_noise(ours, SMALL_BINARY))


@pytest.mark.rejects
def test_rejects_high_variance_questions_dominate():
    """「方差大的题权重大」：反了。除标准差的权重在 p=½ 最小；不除时处处相等。"""
    p = torch.linspace(0.02, 0.98, 49, dtype=torch.float64)
    weights = question_weight(p, group_size=8)
    assert weights.argmin() == 24 and weights[0] / weights[24] > 1.38
    torch.testing.assert_close(weights, weights.flip(0))


@pytest.mark.rejects
def test_rejects_the_infinite_group_formula_at_small_groups():
    """「权重是 1/√(p(1−p))，p→0 时趋于无穷」：组大小有限时有上界；G=8 时 p=0.05 对 p=½ 是 1.33 倍，不是 2.29 倍。"""
    easy, middle = question_weight(tensor([0.05, 0.5]), group_size=8).tolist()
    assert easy / middle == pytest.approx(1.333, abs=1e-3)
    assert (0.05 * 0.95) ** -0.5 / 2 == pytest.approx(2.294, abs=1e-3)
    assert question_weight(tensor([0.0]), group_size=8).item() < 2.48


@pytest.mark.rejects
def test_rejects_the_longest_answer_as_the_constant():
    """「除以本批最长的回答」：分母又由采样决定，期望梯度不与 ∇J 平行。"""

    def longest(log_probs, rewards, mask):
        return ours(log_probs, rewards, mask, length=int(mask.sum(1).max()))

    logits = random_logits(BIG, 0)
    actual = expected_gradient(BIG, logits, BINARY, 3, longest)
    assert residual(actual, objective_gradient(BIG, logits, BINARY)) > 0.05
