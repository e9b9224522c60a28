r"""snippets/rl/grpo.py 与 masking.py 的对照测试。

真值有四个来源：(1) 只用 Python 浮点数的循环（标准差用 statistics、损失用 if/else 与 math.exp），梯度用中心差分；
(2) TRL 1.16：`GRPOTrainer._compute_loss` 真实调用；优势取自 `_generate_and_score_completions` 里的那一段原文，单独执行；
(3) verl 0.9.1 与 OpenRLHF 0.11.2 跑出来后冻结的数值，见 tests/golden/make_grpo.py；
(4) 小策略上对所有可能的一组回答逐一枚举得到的精确期望。
没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import ast
import inspect
import itertools
import json
import math
import statistics
import textwrap
from pathlib import Path
from types import SimpleNamespace

import jaxtyping
import pytest
import torch
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.kl_estimators import kl_k3, kl_k3_importance_weighted
from snippets.rl.masking import aggregate_loss

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "grpo.json").read_text(encoding="utf-8"))
LOW, HIGH, BETA = 0.2, 0.28, 0.04
SETTINGS = {"clip_low": LOW, "clip_high": HIGH, "beta": BETA}


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def case():
    """两组、每组三条，每条最多五个 token；比值落在裁剪区间内外，离端点 0.8 与 1.28 都有 0.03 以上。"""
    generator = torch.Generator().manual_seed(7)
    old = -torch.rand(6, 5, generator=generator, dtype=torch.float64) * 3 - 0.5
    ratios = [0.5, 1.1, 1.4, 0.75, 0.9, 2.0, 1.25, 0.6]
    ratio = tensor([[ratios[(3 * row + column) % 8] for column in range(5)] for row in range(6)])
    ref = old + 0.7 * torch.randn(6, 5, generator=generator, dtype=torch.float64)
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 1, 4, 5])[:, None]
    rewards = tensor([1.0, 0.0, 0.3, 0.0, 1.0, 0.0])
    return old + ratio.log(), old, ref, group_advantages(rewards, group_size=3), mask


def loop_advantages(rewards, group_size, eps=1e-6, scale_by_std=True):
    result = []
    for start in range(0, len(rewards), group_size):
        group = rewards[start : start + group_size]
        mean, scale = statistics.fmean(group), statistics.stdev(group) + eps if scale_by_std else 1.0
        result += [(reward - mean) / scale for reward in group]
    return tensor(result)


def loop_loss(log_probs, old, ref, advantages, mask):
    """DeepSeekMath 式 3 取负，照着求和号写；不用 min、clamp 与张量运算。"""
    total = 0.0
    for lp_row, old_row, ref_row, advantage, keep in zip(
        *(x.tolist() for x in (log_probs, old, ref, advantages, mask)), strict=True
    ):
        tokens = []
        for lp, lo, lr, kept in zip(lp_row, old_row, ref_row, keep, strict=True):
            if not kept:
                continue
            ratio = math.exp(lp) / math.exp(lo)
            if advantage > 0 and ratio > 1 + HIGH:
                ratio = 1 + HIGH
            if advantage < 0 and ratio < 1 - LOW:
                ratio = 1 - LOW
            r = math.exp(lr) / math.exp(lp)
            tokens.append(ratio * advantage - BETA * (r - math.log(r) - 1))
        total -= sum(tokens) / len(tokens)
    return total / len(log_probs)


def finite_difference(loss, log_probs, step=1e-6):
    grad = torch.zeros_like(log_probs)
    for index in range(log_probs.numel()):
        shift = torch.zeros_like(log_probs)
        shift.view(-1)[index] = step
        grad.view(-1)[index] = (loss(log_probs + shift) - loss(log_probs - shift)) / (2 * step)
    return grad


def value_and_grad(loss_fn, log_probs, *args, **kwargs):
    leaf = log_probs.detach().clone().requires_grad_()
    loss = loss_fn(leaf, *args, **kwargs)
    return loss.detach(), torch.autograd.grad(loss, leaf)[0]


# ---- 手算 ----


def test_one_success_out_of_four():
    """r=(1,0,0,0)：均值 1/4，离差平方和 3/4，样本标准差 √(3/4/3)=1/2，优势 1.5 与 −0.5。
    换成总体标准差 √(3/4/4)=√3/4，才是 √((1−p)/p)=√3 与 −√(p/(1−p))=−1/√3；两者差一个因子 √((G−1)/G)=√3/2。
    """
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, eps=0.0)
    torch.testing.assert_close(advantages, tensor([1.5, -0.5, -0.5, -0.5]))
    population = tensor([math.sqrt(3)] + [-1 / math.sqrt(3)] * 3)
    torch.testing.assert_close(advantages, population * math.sqrt(3) / 2)


def test_without_std_only_the_mean_is_removed():
    """Dr. GRPO 的优势：(1,0,0,0) → (0.75, −0.25, −0.25, −0.25)，与 ε 无关。"""
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 0.0]), group_size=4, eps=9.0, scale_by_std=False)
    torch.testing.assert_close(advantages, tensor([0.75, -0.25, -0.25, -0.25]))


def test_loss_by_hand_on_two_responses():
    """一组两条，优势 +1 与 −1，掩码长度 2 与 1，ε=0.2，β=0.5，π_ref=π_θ 除了第一个 token r=2。
    第一条：ρ=1.5 截到 1.2，ρ=0.5 不截，(1.2+0.5)/2 = 0.85；KL 只有第一个 token 2−ln2−1，平均后再乘 0.5。
    第二条：ρ=0.5 截到 0.8，−(0.8)(−1)=0.8。损失 = (−0.85 + 0.25(1−ln2) + 0.8)/2。
    """
    ratio = tensor([[1.5, 0.5], [0.5, 9.0]])
    old = torch.full((2, 2), -3.0, dtype=torch.float64)
    log_probs = old + ratio.log()
    ref = log_probs + tensor([[math.log(2), 0.0], [0.0, 5.0]])
    mask = torch.tensor([[True, True], [True, False]])
    loss = grpo_loss(log_probs, old, ref, tensor([1.0, -1.0]), mask, beta=0.5)
    torch.testing.assert_close(loss, tensor((-0.85 + 0.25 * (1 - math.log(2)) + 0.8) / 2))


def test_defaults_are_the_papers_beta_and_the_libraries_clip():
    """β=0.04 来自 DeepSeekMath §4.2；论文没有给 ε，0.2 是三个库的默认值。"""
    args = case()
    explicit = grpo_loss(*args, clip_low=0.2, clip_high=0.2, beta=0.04)
    torch.testing.assert_close(grpo_loss(*args), explicit)


def test_kl_is_not_clamped():
    """π_ref/π_θ=e¹²：k3=e¹²−13≈162742，原样进损失；verl 会把 k3 截到 10。优势为 0，只剩 KL。"""
    log_probs, zero = tensor([[-13.0]]), tensor([0.0])
    loss = grpo_loss(log_probs, log_probs, log_probs + 12, zero, torch.ones(1, 1).bool(), beta=0.5)
    torch.testing.assert_close(loss, tensor(0.5 * (math.exp(12) - 13)))


# ---- 独立实现：循环 ----


@pytest.mark.parametrize("scale_by_std", [True, False])
def test_advantages_match_the_loop(scale_by_std):
    rewards = [0.3, 1.0, -0.2, 2.0, 2.0, 1.0, 0.0, 0.0, 0.5]
    ours = group_advantages(tensor(rewards), group_size=3, scale_by_std=scale_by_std)
    torch.testing.assert_close(ours, loop_advantages(rewards, 3, scale_by_std=scale_by_std))


def test_loss_and_gradient_match_the_loop():
    log_probs, *rest = case()
    loss, grad = value_and_grad(grpo_loss, log_probs, *rest, **SETTINGS)
    torch.testing.assert_close(loss, tensor(loop_loss(log_probs, *rest)))
    numeric = finite_difference(lambda x: loop_loss(x, *rest), log_probs)
    # 中心差分的截断与舍入误差约 1e-9
    torch.testing.assert_close(grad, numeric, rtol=1e-6, atol=1e-8)
    assert ((grad == 0) & rest[-1]).sum() == 0 and (grad[~rest[-1]] == 0).all()


# ---- TRL 1.16 ----


def run_trl(log_probs, old, ref, advantages, mask, *, beta=BETA, **options):
    return trl_grpo_loss(
        log_probs,
        old,
        advantages,
        mask,
        ref_log_probs=ref,
        beta=beta,
        epsilon_low=LOW,
        epsilon_high=HIGH,
        max_completion_length=9,
        **options,
    )[:2]


@pytest.mark.parametrize("beta", [0.0, BETA, 0.5])
def test_loss_and_gradient_match_trl(beta):
    args = case()
    ours = value_and_grad(grpo_loss, *args, clip_low=LOW, clip_high=HIGH, beta=beta)
    torch.testing.assert_close(ours, run_trl(*args, beta=beta))


def test_trl_default_kl_carries_the_ratio():
    """TRL 默认 use_bias_correction_kl=True：KL 项是 ρ·k3，与论文的 k3 不同；关掉才与 grpo_loss 一致。"""
    args = case()
    log_probs, old, ref, advantages, mask = args

    def with_ratio(x, *_):
        tokens = clipped_surrogate_loss(x, old, advantages[:, None], clip_low=LOW, clip_high=HIGH)
        tokens = tokens + BETA * kl_k3_importance_weighted(x, old, ref)
        return aggregate_loss(tokens, mask, mode="seq-mean-token-mean")

    default = run_trl(*args, bias_correction_kl=True)
    torch.testing.assert_close(value_and_grad(with_ratio, log_probs), default)
    assert (value_and_grad(grpo_loss, *args, **SETTINGS)[1] - default[1]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("loss_type", "mode"),
    [
        ("grpo", "seq-mean-token-mean"),
        ("dapo", "token-mean"),
        ("bnpo", "token-mean"),
        ("luspo", "seq-mean-token-sum"),
        ("dr_grpo", "seq-mean-token-sum-norm"),
    ],
)
def test_trl_loss_types_are_the_four_aggregations(loss_type, mode):
    log_probs, old, ref, advantages, mask = case()

    def ours(x):
        tokens = clipped_surrogate_loss(x, old, advantages[:, None], clip_low=LOW, clip_high=HIGH)
        return aggregate_loss(tokens + BETA * kl_k3(x, ref), mask, mode=mode, max_response_length=9)

    theirs = run_trl(log_probs, old, ref, advantages, mask, loss_type=loss_type)
    torch.testing.assert_close(value_and_grad(ours, log_probs), theirs)


def test_trl_counts_a_fully_masked_row_as_a_sequence():
    """加一行全被遮住的回答：TRL 的分母从 6 变成 7，我们（与 verl、OpenRLHF）仍是 6。"""
    args = case()
    more = [torch.cat([x, x[:1]]) for x in args[:4]] + [torch.cat([args[4], args[4][:1] & False])]
    ours, grad = value_and_grad(grpo_loss, *more, **SETTINGS)
    torch.testing.assert_close(ours, value_and_grad(grpo_loss, *args, **SETTINGS)[0])
    torch.testing.assert_close(run_trl(*more)[0], ours * 6 / 7)
    assert not grad[-1].any()


def trl_advantages(rewards, group_size, scale_rewards="group"):
    """取出 TRL 算优势的那个 if 块（multi_objective_aggregation == "sum_then_normalize"），原样执行。"""
    from trl.trainer import grpo_trainer

    source = textwrap.dedent(inspect.getsource(grpo_trainer.GRPOTrainer._generate_and_score_completions))
    blocks = [
        node
        for node in ast.walk(ast.parse(source))
        if isinstance(node, ast.If) and "multi_objective_aggregation" in ast.unparse(node.test)
    ]
    block = max(blocks, key=lambda node: len(ast.unparse(node)))
    assert "sum_then_normalize" in ast.unparse(block.test)
    scope = {
        "torch": torch,
        "nanstd": grpo_trainer.nanstd,
        "self": SimpleNamespace(
            multi_objective_aggregation="sum_then_normalize",
            scale_rewards=scale_rewards,
            reward_weights=torch.ones(1),
        ),
        "rewards_per_func": rewards[:, None],
        "unscorable_mask": torch.zeros(len(rewards), dtype=torch.bool),
        "num_generations": group_size,
        "device": "cpu",
    }
    exec(compile(ast.Module([block], type_ignores=[]), "trl", "exec"), scope)
    return scope["advantages"]


def test_advantages_match_trl():
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 0.3, -0.2, 0.9, 2.5])
    ours = group_advantages(rewards, group_size=4, eps=1e-4)
    torch.testing.assert_close(ours, trl_advantages(rewards, 4))
    ours = group_advantages(rewards, group_size=4, scale_by_std=False)
    torch.testing.assert_close(ours, trl_advantages(rewards, 4, scale_rewards="none"))


def test_trl_batch_scaling_is_another_advantage():
    """scale_rewards="batch"：均值仍按组，标准差取整批奖励的；两组差别大时与组内标准差不同。"""
    rewards = tensor([1.0, 0.0, 0.0, 0.0, 9.0, 8.0, 9.0, 8.0])
    expected = group_advantages(rewards, group_size=4, scale_by_std=False) / (rewards.std() + 1e-4)
    torch.testing.assert_close(trl_advantages(rewards, 4, scale_rewards="batch"), expected)
    assert (expected - group_advantages(rewards, group_size=4)).abs().max() > 0.5


def test_trl_defaults_quoted_on_the_page():
    from trl import GRPOConfig

    defaults = {name: field.default for name, field in GRPOConfig.__dataclass_fields__.items()}
    quoted = {
        "loss_type": "dapo",
        "scale_rewards": "group",
        "num_generations": 8,
        "beta": 0.0,
        "use_bias_correction_kl": True,
        "epsilon": 0.2,
        "epsilon_high": None,
        "delta": None,
        "num_iterations": 1,
    }
    assert {name: defaults[name] for name in quoted} == quoted


# ---- verl 0.9.1 与 OpenRLHF 0.11.2（冻结） ----


@pytest.mark.parametrize("name", ["one_right", "two_groups", "all_equal"])
def test_advantages_match_verl_and_openrlhf(name):
    rewards = tensor(GOLDEN["rewards"][name])
    verl = GOLDEN["verl"]["advantages"][name]
    torch.testing.assert_close(group_advantages(rewards, group_size=4, eps=1e-6), tensor(verl["scaled"]))
    torch.testing.assert_close(
        group_advantages(rewards, group_size=4, scale_by_std=False), tensor(verl["centred"])
    )
    ours = group_advantages(rewards, group_size=4, eps=1e-9)
    torch.testing.assert_close(ours, tensor(GOLDEN["openrlhf"]["advantages"][name]))


def test_verl_groups_by_uid_so_row_order_does_not_matter():
    """verl 按 uid 分组，行怎么排都行；我们（以及 TRL、OpenRLHF）按相邻行，先排好再算，结果相同。"""
    shuffled = [0, 4, 1, 5, 2, 6, 3, 7]
    ours = group_advantages(tensor(GOLDEN["rewards"]["two_groups"]), group_size=4)
    frozen = tensor(GOLDEN["verl"]["advantages"]["interleaved_rows_with_uid"])
    torch.testing.assert_close(ours[shuffled], frozen)


def test_singleton_group_in_verl_is_the_raw_reward():
    """verl 对只有一条的组取均值 0、标准差 1，优势就是奖励本身（除以 1+1e-6）；我们拒绝。"""
    # verl 在这里用 float32 的 0 和 1
    assert GOLDEN["verl"]["advantages"]["singleton"][0] == pytest.approx(0.7 / (1 + 1e-6), rel=1e-6)
    with pytest.raises(ValueError, match="至少要 2"):
        group_advantages(tensor([0.7]), group_size=1)


def frozen_inputs():
    data = {key: tensor(value) for key, value in GOLDEN["inputs"].items()}
    data["loss_mask"] = data["loss_mask"].bool()
    return data


@pytest.mark.parametrize(
    ("library", "mode"),
    [(library, mode) for library in ("verl", "openrlhf") for mode in GOLDEN[library]["aggregate"]],
)
def test_aggregation_matches_the_libraries(library, mode):
    """冻结的输入里有一整行被遮住，两个库都不把它算进条数。"""
    data, frozen = frozen_inputs(), GOLDEN[library]["aggregate"][mode]
    value, grad = value_and_grad(
        aggregate_loss, data["log_probs"], data["loss_mask"], mode=mode, max_response_length=9
    )
    # 两个库每条的分母都加了 1e-8
    torch.testing.assert_close(value, tensor(frozen["value"]), rtol=1e-7, atol=1e-8)
    torch.testing.assert_close(grad, tensor(frozen["grad"]), rtol=1e-7, atol=1e-8)


def test_loss_and_gradient_match_verl():
    """verl：裁剪代理损失 + 0.04 × low_var_kl，都按 seq-mean-token-mean 聚合（双侧裁剪的 c 取 1e9，等于关掉）。"""
    data = frozen_inputs()
    ours = value_and_grad(grpo_loss, *data.values(), **SETTINGS)
    frozen = GOLDEN["verl"]["loss"]
    torch.testing.assert_close(ours, (tensor(frozen["value"]), tensor(frozen["grad"])), rtol=1e-7, atol=1e-8)


# ---- 性质 ----


def test_advantages_of_each_group_sum_to_zero():
    rewards = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for scale_by_std in [True, False]:
        sums = group_advantages(rewards, group_size=5, scale_by_std=scale_by_std).view(4, 5).sum(1)
        torch.testing.assert_close(sums, torch.zeros_like(sums))


@pytest.mark.parametrize("group_size", [2, 5, 16])
def test_binary_rewards_have_a_closed_form(group_size):
    """p=k/G：对的 √((1−p)/p)，错的 −√(p/(1−p))，样本标准差再乘 √((G−1)/G)。"""
    for right in range(1, group_size):
        p, factor = right / group_size, math.sqrt((group_size - 1) / group_size)
        rewards = tensor([1.0] * right + [0.0] * (group_size - right))
        advantages = group_advantages(rewards, group_size=group_size, eps=0.0)
        assert advantages[0].item() == pytest.approx(factor * math.sqrt((1 - p) / p))
        assert advantages[-1].item() == pytest.approx(-factor * math.sqrt(p / (1 - p)))


def test_scaled_advantages_ignore_shift_and_scale_of_the_reward():
    """ε=0 时 0/1 与 ±1 的优势相同；不除标准差时尺度会传进来（±1 是 0/1 的两倍）。"""
    rewards = tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
    args = {"group_size": 3, "eps": 0.0}
    torch.testing.assert_close(group_advantages(rewards, **args), group_advantages(2 * rewards - 1, **args))
    args["scale_by_std"] = False
    torch.testing.assert_close(
        2 * group_advantages(rewards, **args), group_advantages(2 * rewards - 1, **args)
    )


def test_two_member_groups_keep_only_the_sign():
    """G=2：(r1−r2)/2 除以 |r1−r2|/√2，恒为 ±1/√2，分差多大都一样。"""
    advantages = group_advantages(tensor([0.51, 0.5, -3.0, 97.0]), group_size=2, eps=0.0)
    torch.testing.assert_close(advantages, tensor([1.0, -1.0, -1.0, 1.0]) / math.sqrt(2))


def test_group_mean_is_leave_one_out_times_a_constant():
    """r_i − mean = (G−1)/G ·(r_i − 其余 G−1 条的均值)，逐样本成立。"""
    rewards = [0.3, 1.0, -0.2, 2.0, 0.7]
    others = tensor([reward - (sum(rewards) - reward) / 4 for reward in rewards])
    ours = group_advantages(tensor(rewards), group_size=5, scale_by_std=False)
    torch.testing.assert_close(ours, others * 4 / 5)


def test_first_step_value_is_beta_kl_but_the_gradient_is_not_zero():
    """ρ=1 时裁剪项的平均是 −mean(Â)=0，损失恰好是 β 倍的 KL；β=0 时值为 0、梯度不为 0。"""
    log_probs, _, ref, advantages, mask = case()
    kl = aggregate_loss(kl_k3(log_probs, ref), mask, mode="seq-mean-token-mean")
    loss, _ = value_and_grad(grpo_loss, log_probs, log_probs, ref, advantages, mask, beta=BETA)
    torch.testing.assert_close(loss, BETA * kl)
    loss, grad = value_and_grad(grpo_loss, log_probs, log_probs, None, advantages, mask, beta=0.0)
    assert abs(loss.item()) < 1e-15 < 0.1 < grad.norm().item()


def test_each_width_reaches_its_own_side():
    """两条各一个 token：ρ=0.75、Â=−1 与 ρ=1.25、Â=+1。默认 0.2 时梯度都是 0；放宽哪一侧，哪一个回到 −ρÂ/2。"""
    old = tensor([[-3.0], [-3.0]])
    args = old + tensor([[0.75], [1.25]]).log(), old, None, tensor([-1.0, 1.0]), torch.ones(2, 1).bool()
    for widths, expected in [
        ({}, [[0.0], [0.0]]),
        ({"clip_low": 0.3}, [[0.375], [0.0]]),
        ({"clip_high": 0.3}, [[0.0], [-0.625]]),
    ]:
        torch.testing.assert_close(value_and_grad(grpo_loss, *args, beta=0.0, **widths)[1], tensor(expected))


def test_zero_variance_group_gives_zero_gradient_from_the_policy_term():
    """第一组全对：它的优势与梯度都是 0，第二组照常；打开 KL 后第一组只剩 KL 的梯度。"""
    log_probs, old, ref, _, mask = case()
    advantages = group_advantages(tensor([1.0, 1.0, 1.0, 0.0, 1.0, 0.0]), group_size=3)
    assert not advantages[:3].any()
    _, grad = value_and_grad(grpo_loss, log_probs, old, None, advantages, mask, beta=0.0)
    assert not grad[:3].any() and grad[3:].any()
    _, grad = value_and_grad(grpo_loss, log_probs, old, ref, advantages, mask, beta=BETA)
    expected = BETA * (1 - (ref - log_probs).exp()) * mask / mask.sum(1, keepdim=True) / 6
    torch.testing.assert_close(grad[:3], expected[:3])


def test_padding_and_group_order_change_nothing():
    log_probs, old, ref, advantages, mask = case()
    loss, grad = value_and_grad(grpo_loss, log_probs, old, ref, advantages, mask, **SETTINGS)
    wide = [torch.cat([x, x[:, :2] - 1], dim=1) for x in (log_probs, old, ref)]
    wide_mask = torch.cat([mask, mask[:, :2] & False], dim=1)
    padded, padded_grad = value_and_grad(grpo_loss, *wide, advantages, wide_mask, **SETTINGS)
    torch.testing.assert_close((padded, padded_grad[:, :5]), (loss, grad))
    order = [3, 4, 5, 0, 1, 2]
    swapped = [x[order] for x in (log_probs, old, ref, advantages, mask)]
    torch.testing.assert_close(grpo_loss(*swapped, **SETTINGS), loss)


# ---- 精确期望：对小策略上的每一种组合枚举 ----


def expected_gradient(logits, rewards, group_size, advantages_fn):
    """单 token 回答、V 种：对 V^G 组逐一算 GRPO 第一步的梯度（autograd 穿过 grpo_loss），按概率加权。"""
    log_probs = logits.log_softmax(-1)
    total = torch.zeros_like(logits)
    for group in itertools.product(range(len(logits)), repeat=group_size):
        leaf = logits.clone().requires_grad_()
        new = leaf.log_softmax(-1)[list(group)][:, None]
        loss = grpo_loss(
            new,
            new.detach(),
            None,
            advantages_fn(rewards[list(group)]),
            torch.ones_like(new).bool(),
            beta=0.0,
        )
        total -= log_probs[list(group)].sum().exp() * torch.autograd.grad(loss, leaf)[0]
    return total


def true_gradient(logits, rewards):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((leaf.softmax(-1) * rewards).sum(), leaf)[0]


def test_mean_baseline_shrinks_the_exact_gradient_by_a_constant():
    """自己也在均值里：期望梯度恰好是真梯度的 (G−1)/G，方向不变；三档奖励也成立。"""
    logits, rewards = tensor([0.4, -0.3, 0.1]), tensor([0.0, 0.2, 1.0])
    for group_size in [2, 3, 4]:
        expected = expected_gradient(
            logits,
            rewards,
            group_size,
            lambda r, size=group_size: group_advantages(r, group_size=size, scale_by_std=False),
        )
        shrunk = true_gradient(logits, rewards) * (group_size - 1) / group_size
        torch.testing.assert_close(expected, shrunk)


def std_weight(p, group_size):
    """二值奖励、除以样本标准差：期望梯度 = 这个数 × ∇p。由 k~Binomial(G−1, p) 的条件期望 h(1)−h(0) 得到。"""

    def conditional(own):
        total = 0.0
        for others in range(group_size):
            q = (others + own) / group_size
            if 0 < q < 1:
                weight = math.comb(group_size - 1, others) * p**others * (1 - p) ** (group_size - 1 - others)
                total += weight * (own - q) / math.sqrt(q * (1 - q) * group_size / (group_size - 1))
        return total

    return conditional(1) - conditional(0)


@pytest.mark.parametrize("group_size", [2, 3, 5])
def test_std_multiplies_the_binary_gradient_by_a_function_of_p(group_size):
    logits, rewards = tensor([0.4, -0.9, 0.1]), tensor([0.0, 1.0, 0.0])
    p = (logits.softmax(-1) * rewards).sum().item()
    # ε 取 1e-12 而不是 0：全组同分时要得到 0 而不是 NaN
    expected = expected_gradient(
        logits, rewards, group_size, lambda r: group_advantages(r, group_size=group_size, eps=1e-12)
    )
    torch.testing.assert_close(expected, std_weight(p, group_size) * true_gradient(logits, rewards))


def test_std_changes_the_direction_when_rewards_have_three_levels():
    """三档奖励时除以标准差不再只是乘一个数：与真梯度的余弦小于 0.99，只减均值是 1。"""
    logits, rewards = tensor([1.5, 0.0, -2.0]), tensor([0.0, 0.2, 1.0])
    truth = true_gradient(logits, rewards)
    scaled = expected_gradient(logits, rewards, 3, lambda r: group_advantages(r, group_size=3))
    assert torch.cosine_similarity(scaled, truth, dim=0) < 0.99


def stop_policy_gradients(mode):
    """三种回答：[a]（长 1）、[b,c]、[b,d]（长 2）；G=2 枚举 9 组，返回 (期望梯度, 真梯度)。"""
    first, second = tensor([0.3, -0.2]), tensor([0.5, -0.1])
    rewards, mask = tensor([0.6, 1.0, 0.0]), torch.tensor([[1, 0], [1, 1], [1, 1]]).bool()

    def token_log_probs(parameters):
        top, bottom = parameters[:2].log_softmax(-1), parameters[2:].log_softmax(-1)
        zero = torch.zeros((), dtype=torch.float64)
        return torch.stack(
            [torch.stack([top[0], zero]), torch.stack([top[1], bottom[0]]), torch.stack([top[1], bottom[1]])]
        )

    parameters = torch.cat([first, second])
    total = torch.zeros(4, dtype=torch.float64)
    for pair in itertools.product(range(3), repeat=2):
        leaf = parameters.clone().requires_grad_()
        new = token_log_probs(leaf)[list(pair)]
        advantages = group_advantages(rewards[list(pair)], group_size=2, scale_by_std=False)
        tokens = clipped_surrogate_loss(new, new.detach(), advantages[:, None])
        loss = aggregate_loss(tokens, mask[list(pair)], mode=mode)
        total -= new.detach().sum().exp() * torch.autograd.grad(loss, leaf)[0]
    leaf = parameters.clone().requires_grad_()
    objective = (token_log_probs(leaf).sum(1).exp() * rewards).sum()
    return total, torch.autograd.grad(objective, leaf)[0]


def test_token_sum_is_exact_and_dividing_by_length_is_not():
    """按条求和：期望梯度恰好是真梯度的 (G−1)/G = 1/2。
    先除以各自长度：第二个位置再乘 1/2；第一个位置乘的是 π_b + π_a/2（由 E[Â]=0 得 π_a·A_a = −π_b·A_b，代入
    A_a − A_b/2）。两个位置的倍数不同（0.689 与 0.5），所以方向变了，不是学习率能补回来的。
    """
    summed, truth = stop_policy_gradients("seq-mean-token-sum")
    torch.testing.assert_close(summed, truth / 2)
    averaged, _ = stop_policy_gradients("seq-mean-token-mean")
    stop = tensor([0.3, -0.2]).softmax(-1)[0].item()
    first, second = 1 - stop / 2, 0.5
    torch.testing.assert_close(averaged, summed * tensor([first, first, second, second]))
    assert round(first, 3) == 0.689


# ---- 边界 ----


def test_equal_rewards_in_float32_are_not_exactly_zero():
    """0.9 在 float32 里加 8 次再除以 8 会差一个舍入（−6e-8）；ε 比它小，就被标准差放大回 O(1)。
    冻结的库输出：verl（1e-6）−0.056，OpenRLHF（1e-9）−0.92，全组同号；0/1 奖励没有舍入，恰好为 0。
    """
    rewards = torch.full((8,), 0.9)
    for eps, library in [(1e-6, "verl"), (1e-9, "openrlhf")]:
        frozen = torch.tensor(GOLDEN[library]["advantages"]["all_0.9_float32"])
        torch.testing.assert_close(group_advantages(rewards, group_size=8, eps=eps), frozen)
    assert frozen.max() < -0.9
    assert trl_advantages(rewards, 8).abs().max() < 1e-3
    for equal in [torch.zeros(8), torch.ones(8)]:
        assert not group_advantages(equal, group_size=8, eps=1e-9).any()


def test_zero_eps_turns_an_equal_group_into_nan():
    """论文的式子没有 ε：全组同分是 0/0。"""
    assert group_advantages(tensor([1.0, 1.0]), group_size=2, eps=0.0).isnan().all()


def test_advantages_do_not_need_gradients_and_keep_dtype():
    assert group_advantages(torch.tensor([1.0, 0.0]), group_size=2).dtype == torch.float32
    args = [x.float() if x.is_floating_point() else x for x in case()]
    assert grpo_loss(*args).dtype == torch.float32


@pytest.mark.parametrize(("rows", "group_size", "message"), [(4, 1, "至少要 2"), (5, 2, "不能分成")])
def test_bad_group_sizes_are_refused(rows, group_size, message):
    with pytest.raises(ValueError, match=message):
        group_advantages(torch.zeros(rows), group_size=group_size)


def test_kl_without_a_reference_is_refused():
    log_probs, old, _, advantages, mask = case()
    with pytest.raises(ValueError, match="ref_log_probs"):
        grpo_loss(log_probs, old, None, advantages, mask)


def test_per_token_advantages_are_rejected():
    """每条回答一个数；传 (B, T) 是误用。"""
    log_probs, old, ref, advantages, mask = case()
    with pytest.raises(jaxtyping.TypeCheckError):
        grpo_loss(log_probs, old, ref, advantages[:, None].expand_as(log_probs), mask)


# ---- 流传的错误写法：优势 ----


def population_std(rewards, size):
    groups = rewards.view(-1, size)
    return ((groups - groups.mean(1, keepdim=True)) / groups.std(1, keepdim=True, correction=0)).flatten()


def interleaved_groups(rewards, size):
    groups = rewards.view(size, -1)
    return ((groups - groups.mean(0)) / groups.std(0)).flatten()


def whole_batch(rewards, size):
    return (rewards - rewards.mean()) / rewards.std()


def divided_by_variance(rewards, size):
    groups = rewards.view(-1, size)
    return ((groups - groups.mean(1, keepdim=True)) / groups.var(1, keepdim=True)).flatten()


def median_baseline(rewards, size):
    groups = rewards.view(-1, size)
    return ((groups - groups.median(1, keepdim=True).values) / groups.std(1, keepdim=True)).flatten()


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [population_std, interleaved_groups, whole_batch, divided_by_variance, median_baseline],
    ids=lambda f: f.__name__,
)
def test_wrong_advantages_are_rejected(wrong):
    """与循环（样本标准差、相邻分组）相比至少差 0.1；我们的差为零。"""
    rewards = [1.0, 0.0, 0.0, 0.3, 2.0, 2.0, 2.0, 1.5]
    truth = loop_advantages(rewards, 4)
    assert (wrong(tensor(rewards), 4) - truth).abs().max() > 0.1
    torch.testing.assert_close(group_advantages(tensor(rewards), group_size=4), truth)


# ---- 流传的错误写法：损失 ----


def wrong_loss(policy=None, kl=None, mode="seq-mean-token-mean", length_fix=False, use_mask=True):
    """把 grpo_loss 的一个零件换掉，其余不动。"""

    def loss(log_probs, old, ref, advantages, mask):
        columns = advantages[:, None]
        if length_fix:
            columns = columns / mask.sum(1, keepdim=True)
        ratio = (log_probs - old).exp()
        if policy is None:
            tokens = clipped_surrogate_loss(log_probs, old, columns, clip_low=LOW, clip_high=HIGH)
        else:
            tokens = policy(log_probs, ratio, columns)
        tokens = tokens + (BETA * kl_k3(log_probs, ref) if kl is None else kl(log_probs, ref))
        return aggregate_loss(tokens, mask if use_mask else mask | True, mode=mode)

    return loss


WRONG_LOSSES = {
    "no_ratio": wrong_loss(policy=lambda lp, ratio, adv: -adv * lp),
    "product_instead_of_min": wrong_loss(
        policy=lambda lp, ratio, adv: -(ratio * adv) * (ratio.clamp(1 - LOW, 1 + HIGH) * adv)
    ),
    "clip_without_min": wrong_loss(policy=lambda lp, ratio, adv: -ratio.clamp(1 - LOW, 1 + HIGH) * adv),
    "no_clip": wrong_loss(policy=lambda lp, ratio, adv: -ratio * adv),
    "max_instead_of_min": wrong_loss(
        policy=lambda lp, ratio, adv: -torch.maximum(ratio * adv, ratio.clamp(1 - LOW, 1 + HIGH) * adv)
    ),
    "sign_flipped": wrong_loss(policy=lambda lp, ratio, adv: torch.minimum(ratio * adv, ratio * adv)),
    "kl_direction_reversed": wrong_loss(kl=lambda lp, ref: BETA * kl_k3(ref, lp)),
    "kl_sign_flipped": wrong_loss(kl=lambda lp, ref: -BETA * kl_k3(lp, ref)),
    "kl_left_out": wrong_loss(kl=lambda lp, ref: torch.zeros_like(lp)),
    "kl_k1": wrong_loss(kl=lambda lp, ref: BETA * (lp - ref)),
    "divided_by_length_again": wrong_loss(length_fix=True),
    "token_mean_called_sequence_mean": wrong_loss(mode="token-mean"),
    "token_sum": wrong_loss(mode="seq-mean-token-sum"),
    "mask_ignored": wrong_loss(use_mask=False),
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_LOSSES)
def test_wrong_losses_are_rejected(name):
    """梯度与「循环 + 中心差分」的真值相比，相对误差至少 1%；我们小于 1e-7。"""
    log_probs, *rest = case()
    truth = finite_difference(lambda x: loop_loss(x, *rest), log_probs)
    theirs = value_and_grad(WRONG_LOSSES[name], log_probs, *rest)[1]
    assert (theirs - truth).norm() / truth.norm() > 0.01
    ours = value_and_grad(grpo_loss, log_probs, *rest, **SETTINGS)[1]
    assert (ours - truth).norm() / truth.norm() < 1e-7


@pytest.mark.rejects
def test_dropping_the_ratio_is_invisible_at_the_first_step():
    """−Â·logπ 的梯度是 −Â，GRPO 是 −ρÂ：ρ=1 时逐位相同，所以只在第一步对拍查不出来；其他步相差 10% 以上。"""
    log_probs, old, ref, advantages, mask = case()
    pseudo = WRONG_LOSSES["no_ratio"]
    first = (log_probs, log_probs, ref, advantages, mask)
    torch.testing.assert_close(
        value_and_grad(pseudo, *first)[1], value_and_grad(grpo_loss, *first, **SETTINGS)[1]
    )
    later = (log_probs, old, ref, advantages, mask)
    ours = value_and_grad(grpo_loss, *later, **SETTINGS)[1]
    assert (value_and_grad(pseudo, *later)[1] - ours).norm() / ours.norm() > 0.1


@pytest.mark.rejects
def test_product_instead_of_min_rewards_wrong_answers():
    """少了逗号，ρÂ·clip(ρ)Â 里优势成了平方：负优势的 token 在第一步也被推高。"""
    log_probs, _, ref, advantages, mask = case()
    args = (log_probs, log_probs, ref, advantages, mask)
    product = wrong_loss(
        policy=lambda lp, ratio, adv: -(ratio * adv) * (ratio.clamp(1 - LOW, 1 + HIGH) * adv),
        kl=lambda lp, ref: torch.zeros_like(lp),
    )
    negative = (advantages < 0)[:, None] & mask
    assert (value_and_grad(product, *args)[1][negative] < 0).all()
    assert (value_and_grad(grpo_loss, *args, beta=0.0)[1][negative] > 0).all()
