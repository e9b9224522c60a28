r"""snippets/rl/grpo_loss_sign.py 的测试。

真值有五个来源：(1) 手算；(2) 照求和号写的 Python 循环，对每个 token 在一张比值网格上暴力搜索最小值；
(3) 已经各有测试的 `clipped_surrogate_loss`、`aggregate_loss`、`grpo_loss` 与 autograd、有限差分；
(4) TRL 1.16：`GRPOTrainer._compute_loss` 真实调用（默认配置），以及用随机小模型真的训练一步、读它写进日志的数；
(5) 随机搜索：任何比值都不能把损失压到界以下。
全部用 float64（TRL 的小模型与写明 float32 的除外）；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import math

import jaxtyping
import pytest
import torch
from tiny_models import tiny_gpt2, word_tokenizer
from trl_grpo import trl_grpo_loss

from snippets.rl.clip import clipped_surrogate_loss, dual_clip_loss
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.grpo_loss_sign import first_step_policy_loss, policy_loss_lower_bound
from snippets.rl.kl_estimators import kl_k3
from snippets.rl.masking import aggregate_loss

GRPO, TOKEN_MEAN, SUM, CONSTANT = MODES = (
    "seq-mean-token-mean",
    "token-mean",
    "seq-mean-token-sum",
    "seq-mean-token-sum-norm",
)
L_MAX = 9


def tensor(data):
    return torch.tensor(data, dtype=torch.float64)


def case():
    """两组、每组三条；长度各不相同，长的偏错；返回 (优势, 长度, 掩码, 当前与参考的对数概率)。"""
    generator = torch.Generator().manual_seed(5)
    advantages = group_advantages(tensor([1.0, 0.0, 0.3, 0.0, 2.0, 1.0]), group_size=3)
    lengths = torch.tensor([2, 7, 3, 6, 1, 4])
    mask = torch.arange(7) < lengths[:, None]
    log_probs = -torch.rand(6, 7, generator=generator, dtype=torch.float64) * 3 - 0.4
    ref = log_probs + 0.3 * torch.randn(6, 7, generator=generator, dtype=torch.float64)
    return advantages, lengths, mask, log_probs, ref


def token_weights(lengths, mode):
    """照定义逐 token 的权重，纯 Python；整条被遮住的不算条数。"""
    lengths = lengths.tolist()
    kept = sum(n > 0 for n in lengths)
    per_token = {
        TOKEN_MEAN: lambda n: 1 / sum(lengths),
        GRPO: lambda n: 1 / (kept * n),
        SUM: lambda n: 1 / kept,
        CONSTANT: lambda n: 1 / (kept * L_MAX),
    }[mode]
    return [[per_token(n)] * n for n in lengths]


def surrogate(ratio, advantage, clip_low, clip_high):
    clipped = min(max(ratio, 1 - clip_low), 1 + clip_high)
    return -min(ratio * advantage, clipped * advantage)


def searched_minimum(advantages, lengths, mode, clip_low, clip_high, grid):
    """损失逐 token 可分，所以整体的最小值等于每个 token 各自在网格上的最小值之和。"""
    total = 0.0
    for advantage, weights in zip(advantages.tolist(), token_weights(lengths, mode), strict=True):
        for weight in weights:
            total += min(weight * surrogate(r, advantage, clip_low, clip_high) for r in grid)
    return total


def loss_at(ratio, advantages, mask, mode, **widths):
    """任意比值下的策略损失，用已有的零件算。"""
    old = torch.full_like(ratio, -2.0)
    losses = clipped_surrogate_loss(old + ratio.log(), old, advantages[:, None], **widths)
    return aggregate_loss(losses, mask, mode=mode, max_response_length=L_MAX)


# ---- 手算 ----


def test_first_step_by_hand():
    """优势 +1、−1，长度 1、3。按条平均：−(1−1)/2=0。token 平均：−(1·1−1·3)/4=+0.5。
    按条求和：−(1−3)/2=+1。除以 9：+1/9。长的那条错，值为正；对调优势则变号。
    """
    advantages, lengths = tensor([1.0, -1.0]), torch.tensor([1, 3])
    expected = {GRPO: 0.0, TOKEN_MEAN: 0.5, SUM: 1.0, CONSTANT: 1 / 9}
    for mode, value in expected.items():
        for sign in (1, -1):
            ours = first_step_policy_loss(sign * advantages, lengths, mode=mode, max_response_length=L_MAX)
            torch.testing.assert_close(ours, tensor(sign * value))
    shortest = first_step_policy_loss(advantages, lengths, mode=CONSTANT, max_response_length=1)
    torch.testing.assert_close(shortest, tensor(1.0))  # 除以 1 就是按条求和


def test_lower_bound_by_hand():
    """同一例，ε_low=0.2、ε_high=0.3。按条平均：−(1.3−0.8)/2=−0.25=−(0.2+0.3)/2·1。
    token 平均：正的占 1/4、负的占 3/4，0.8·0.75−1.3·0.25=+0.275：长的那条错时，下界可以是正的。
    """
    advantages, lengths = tensor([1.0, -1.0]), torch.tensor([1, 3])
    widths = {"clip_low": 0.2, "clip_high": 0.3}
    torch.testing.assert_close(
        policy_loss_lower_bound(advantages, lengths, mode=GRPO, **widths), tensor(-0.25)
    )
    torch.testing.assert_close(
        policy_loss_lower_bound(advantages, lengths, mode=TOKEN_MEAN, **widths), tensor(0.275)
    )


def test_advantages_that_do_not_sum_to_zero_by_hand():
    """组被拆散时的三条：优势 2、1、−0.5，长度 1、3、2，不再替调用者减均值。按条平均：−2.5/3。
    token 平均：−(2+3−1)/6。按条求和：−4/3。除以 9：−4/27。
    按条平均的下界（0.2、0.3）：0.8·0.5/3−1.3·3/3=−7/6，低于对称式 −0.25·3.5/3。
    """
    advantages, lengths = tensor([2.0, 1.0, -0.5]), torch.tensor([1, 3, 2])
    for mode, value in {GRPO: -2.5 / 3, TOKEN_MEAN: -4 / 6, SUM: -4 / 3, CONSTANT: -4 / 27}.items():
        ours = first_step_policy_loss(advantages, lengths, mode=mode, max_response_length=L_MAX)
        torch.testing.assert_close(ours, tensor(value))
    bound = policy_loss_lower_bound(advantages, lengths, clip_low=0.2, clip_high=0.3, mode=GRPO)
    torch.testing.assert_close(bound, tensor(-7 / 6))


def test_three_right_of_eight():
    """样本标准差下 3 对 5 错：mean|A| = 2·sqrt(3/8·5/8)·sqrt(7/8)=0.90571，乘 0.2 得 0.18114。"""
    advantages = group_advantages(tensor([1.0] * 3 + [0.0] * 5), group_size=8, eps=0.0)
    bound = policy_loss_lower_bound(advantages, torch.full((8,), 6), mode=GRPO)
    torch.testing.assert_close(bound, tensor(-0.2 * 2 * math.sqrt(15 / 64 * 7 / 8)))


# ---- 与独立实现一致 ----


@pytest.mark.parametrize("mode", MODES)
def test_first_step_equals_the_real_loss_at_ratio_one(mode):
    advantages, lengths, mask, log_probs, _ = case()
    losses = clipped_surrogate_loss(log_probs, log_probs, advantages[:, None])
    real = aggregate_loss(losses, mask, mode=mode, max_response_length=L_MAX)
    ours = first_step_policy_loss(advantages, lengths, mode=mode, max_response_length=L_MAX)
    torch.testing.assert_close(ours, real)
    looped = -sum(
        a * w for a, row in zip(advantages.tolist(), token_weights(lengths, mode), strict=True) for w in row
    )
    assert ours.item() == pytest.approx(looped, abs=1e-12)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("clip_low", "clip_high"),
    [(0.2, 0.2), (0.2, 0.28), (0.0, 0.5), (0.2, 0.0), (1.0, 0.2), (10.0, 10.0)],
)
def test_lower_bound_equals_a_brute_force_search(mode, clip_low, clip_high):
    """网格覆盖 [1e-9, 30] 并含两个端点；ε_low≥1 时下确界在 ρ→0，网格最小处离它不到 1e-8。"""
    advantages, lengths, _, _, _ = case()
    grid = [1e-9, 1.0, 1 + clip_high] + [0.01 * k for k in range(1, 3000, 7)]
    if clip_low < 1:
        grid.append(1 - clip_low)
    searched = searched_minimum(advantages, lengths, mode, clip_low, clip_high, grid)
    options = {"clip_low": clip_low, "clip_high": clip_high, "mode": mode, "max_response_length": L_MAX}
    bound = policy_loss_lower_bound(advantages, lengths, **options).item()
    assert bound == pytest.approx(searched, abs=1e-7)
    assert bound <= searched + 1e-12


@pytest.mark.parametrize("mode", MODES)
def test_no_ratio_gets_below_the_bound_and_the_bound_is_attained(mode):
    advantages, lengths, mask, _, _ = case()
    widths = {"clip_low": 0.2, "clip_high": 0.28}
    bound = policy_loss_lower_bound(advantages, lengths, mode=mode, max_response_length=L_MAX, **widths)
    generator = torch.Generator().manual_seed(9)
    for scale in (0.1, 0.5, 2.0):
        for _ in range(100):
            ratio = (scale * torch.randn(mask.shape, generator=generator, dtype=torch.float64)).exp()
            assert loss_at(ratio, advantages, mask, mode, **widths) >= bound - 1e-12
    beyond = torch.where(advantages[:, None] > 0, 5.0, 0.1).expand(mask.shape).to(torch.float64)
    torch.testing.assert_close(loss_at(beyond, advantages, mask, mode, **widths), bound)


def test_at_the_bound_the_gradient_is_zero():
    """到了界，有优势的 token 全被裁剪；梯度 0 不是学完了，是这一批用完了。"""
    advantages, _, mask, log_probs, _ = case()
    leaf = (log_probs + torch.where(advantages[:, None] > 0, 0.5, -0.5)).requires_grad_()
    (grad,) = torch.autograd.grad(grpo_loss(leaf, log_probs, None, advantages, mask, beta=0.0), leaf)
    assert not grad.any()


@pytest.mark.parametrize("mode", MODES)
def test_first_step_matches_trl(mode):
    """TRL 的每个 loss_type，old_per_token_logps=None（默认配置的情形）。没有整行被遮住时条数的差别不出现。"""
    advantages, lengths, mask, log_probs, _ = case()
    # luspo 是按条求和；TRL 建议它配序列级比值，这里保持逐 token，否则损失只有一列
    loss_type = {GRPO: "grpo", TOKEN_MEAN: "dapo", CONSTANT: "dr_grpo", SUM: "luspo"}[mode]
    value, grad, _ = trl_grpo_loss(
        log_probs, None, advantages, mask, loss_type=loss_type, max_completion_length=L_MAX
    )
    ours = first_step_policy_loss(advantages, lengths, mode=mode, max_response_length=L_MAX)
    torch.testing.assert_close(ours, value)
    weights = token_weights(lengths, mode)
    expected = torch.zeros_like(log_probs)
    for i, row in enumerate(weights):
        expected[i, : len(row)] = -advantages[i] * tensor(row)
    torch.testing.assert_close(grad, expected)


def test_trl_defaults_do_not_start_at_zero():
    """TRL 1.16 的默认值，读自配置类；默认配置真实调用，值是负的长度加权平均优势。"""
    from trl import GRPOConfig

    fields = GRPOConfig.__dataclass_fields__
    defaults = {name: fields[name].default for name in ("loss_type", "beta", "epsilon", "num_iterations")}
    assert defaults == {"loss_type": "dapo", "beta": 0.0, "epsilon": 0.2, "num_iterations": 1}
    assert fields["scale_rewards"].default == "group" and fields["disable_dropout"].default is False
    assert fields["vllm_importance_sampling_correction"].default is True
    assert fields["use_bias_correction_kl"].default is True and fields["entropy_coef"].default == 0.0
    assert fields["logging_steps"].default == 10 and fields["mask_truncated_completions"].default is False
    advantages, lengths, mask, log_probs, _ = case()
    default = trl_grpo_loss(log_probs, None, advantages, mask, loss_type="dapo")[0]
    per_answer = trl_grpo_loss(log_probs, None, advantages, mask, loss_type="grpo")[0]
    torch.testing.assert_close(default, -(advantages * lengths).sum() / lengths.sum())
    assert default > 0.1 and abs(per_answer) < 1e-12


@pytest.mark.parametrize("bias_correction_kl", [True, False])
def test_trl_first_value_with_kl_is_beta_times_kl(bias_correction_kl):
    advantages, _, mask, log_probs, ref = case()
    value, grad, metrics = trl_grpo_loss(
        log_probs, None, advantages, mask, ref_log_probs=ref, beta=0.04, bias_correction_kl=bias_correction_kl
    )
    torch.testing.assert_close(value, 0.04 * aggregate_loss(kl_k3(log_probs, ref), mask, mode=GRPO))
    assert value > 0.001 and grad.norm() > 0.1 and metrics["kl"][0] > 0
    start, start_grad, _ = trl_grpo_loss(
        log_probs, None, advantages, mask, ref_log_probs=log_probs, beta=0.04
    )
    assert abs(start) < 1e-12 and start_grad.norm() > 0.1


def test_which_trl_loss_types_survive_a_group_split_over_micro_batches():
    """行次序打乱、切成两个微批、累积两次：grpo 与 dapo 加起来等于整批一次算，值与梯度都是；bnpo 各除各的，不等。"""
    advantages, _, mask, log_probs, _ = case()
    order = torch.tensor([0, 2, 4, 1, 3, 5])
    for loss_type, same in [("grpo", True), ("dapo", True), ("bnpo", False)]:
        once, once_grad, _ = trl_grpo_loss(log_probs, None, advantages, mask, loss_type=loss_type)
        total, grad = torch.zeros(()), torch.zeros_like(log_probs)
        for rows in order.split(3):
            options = {"loss_type": loss_type, "accumulation": 2, "num_items": int(mask.sum())}
            part, part_grad, _ = trl_grpo_loss(log_probs[rows], None, advantages[rows], mask[rows], **options)
            assert abs(part) > 0.01  # 单个微批都不是 0
            total, grad[rows] = total + part, part_grad
        assert (abs(total - once) < 1e-12) == same
        assert ((grad - once_grad).abs().max() < 1e-12) == same


def train_one_step_with_trl(tmp_path, **options):
    """随机小模型、两组各 4 条、累积两次，TRL 真的训练；返回各微批的损失、优势、长度与日志。"""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    torch.manual_seed(0)
    tokenizer = word_tokenizer(["<pad>", "<eos>", "a", "b", "c", "d"], unknown="a")
    model = tiny_gpt2(6)
    seen = {"losses": [], "advantages": [], "lengths": []}

    class Recorder(GRPOTrainer):
        def _compute_loss(self, model, inputs):
            loss = super()._compute_loss(model, inputs)
            seen["losses"].append(loss.item())
            seen["advantages"].append(inputs["advantages"])
            seen["lengths"].append(inputs["completion_mask"].sum(1))
            return loss

    def reward(completions, **kwargs):
        return [float(len(text.split())) for text in completions]

    args = GRPOConfig(
        output_dir=str(tmp_path),
        max_steps=1,
        num_generations=4,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=2,
        max_completion_length=6,
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
        **options,
    )
    data = Dataset.from_dict({"prompt": ["a b", "c d", "b a", "d c"]})
    trainer = Recorder(model, reward, args=args, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    seen["logged"] = trainer.state.log_history[0]
    return seen


# TRL 1.16 自己还在读旧名字 is_gradient_checkpointing，transformers 5.23 对此发 FutureWarning
@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing:FutureWarning")
def test_the_number_trl_logs(tmp_path):
    """默认（dapo）：日志里的 loss 是各微批之和，等于整个更新步的负长度加权平均优势，奖励随长度涨，所以是负数。
    loss_type="grpo"：TRL 先打乱再切，微批各自不是 0，除以累积步数再相加才是 0。两次训练的梯度范数都不是 0。
    """
    default = train_one_step_with_trl(tmp_path / "dapo")
    per_answer = train_one_step_with_trl(tmp_path / "grpo", loss_type="grpo")
    for run, mode in [(default, TOKEN_MEAN), (per_answer, GRPO)]:
        advantages, lengths = torch.cat(run["advantages"]), torch.cat(run["lengths"])
        assert len(run["losses"]) == 2 and lengths.unique().numel() > 2
        logged = run["logged"]["loss"]
        assert logged == pytest.approx(sum(run["losses"]), abs=1e-6)
        expected = first_step_policy_loss(advantages, lengths, mode=mode).item()
        assert logged == pytest.approx(expected, abs=1e-6)  # TRL 用 float32
        assert run["logged"]["grad_norm"] > 0.01
    assert default["logged"]["loss"] < -0.1
    assert abs(per_answer["logged"]["loss"]) < 1e-6 < 0.01 < abs(per_answer["losses"][0])


# ---- 性质 ----


def test_whole_groups_give_exactly_zero_for_any_rewards_eps_and_scaling():
    generator = torch.Generator().manual_seed(2)
    for group_size in (2, 3, 8):
        rewards = torch.randn(5 * group_size, generator=generator, dtype=torch.float64) * 10
        lengths = torch.randint(1, 50, (5 * group_size,), generator=generator)
        for eps in (0.0, 1e-4, 1.0):
            for scale in (True, False):
                advantages = group_advantages(rewards, group_size=group_size, eps=eps, scale_by_std=scale)
                assert abs(first_step_policy_loss(advantages, lengths, mode=GRPO)) < 1e-12


def test_token_mean_value_is_minus_the_length_advantage_covariance():
    """优势均值为 0 时：−Σ n_i A_i / Σ n_i = −Cov(n, A)/mean(n)，协方差除以 B。"""
    advantages, lengths, _, _, _ = case()
    n = lengths.double()
    covariance = ((n - n.mean()) * (advantages - advantages.mean())).mean()
    ours = first_step_policy_loss(advantages, lengths, mode=TOKEN_MEAN)
    torch.testing.assert_close(ours, -covariance / n.mean())


def test_only_length_differences_within_a_group_count():
    """组间的长短差再大也不影响：−Σ n_i A_i = −Σ (n_i − 组平均长度) A_i，右边逐组用 Python 循环算。"""
    advantages, lengths, _, _, _ = case()
    lengths = lengths + torch.tensor([500] * 3 + [0] * 3)  # 第一组整体长 500
    total = 0.0
    for start in (0, 3):
        group = lengths[start : start + 3].tolist()
        centred = [n - sum(group) / 3 for n in group]
        total -= sum(c * a for c, a in zip(centred, advantages[start : start + 3].tolist(), strict=True))
    ours = first_step_policy_loss(advantages, lengths, mode=TOKEN_MEAN)
    assert ours.item() == pytest.approx(total / lengths.sum().item(), abs=1e-12)
    shared = torch.tensor([500] * 3 + [4] * 3)
    assert abs(first_step_policy_loss(advantages, shared, mode=TOKEN_MEAN)) < 1e-12


def test_equal_lengths_make_token_mean_start_at_zero_too():
    advantages, _, _, _, _ = case()
    for mode in MODES:
        value = first_step_policy_loss(advantages, torch.full((6,), 4), mode=mode, max_response_length=L_MAX)
        assert abs(value) < 1e-12


def test_symmetric_form_needs_zero_weighted_sum_not_equal_lengths():
    """按条平均：长度不等也是 −(ε_low+ε_high)/2·mean|A|；token 平均：要长度加权和为 0 才行。"""
    advantages, lengths, _, _, _ = case()
    widths = {"clip_low": 0.1, "clip_high": 0.3}
    half = -0.2 * advantages.abs().mean()
    torch.testing.assert_close(policy_loss_lower_bound(advantages, lengths, mode=GRPO, **widths), half)
    equal = policy_loss_lower_bound(advantages, torch.full((6,), 3), mode=TOKEN_MEAN, **widths)
    torch.testing.assert_close(equal, half)
    unequal = policy_loss_lower_bound(advantages, lengths, mode=TOKEN_MEAN, **widths)
    weighted = -0.2 * (lengths * advantages.abs()).sum() / lengths.sum()
    assert abs(unequal - weighted) > 0.1


def test_per_answer_policy_loss_never_gets_below_the_universal_bound():
    """样本标准差：mean|A| ≤ sqrt(mean A²) = sqrt((G−1)/G)，一半对一半错取等号。"""
    generator = torch.Generator().manual_seed(4)
    for group_size in (2, 4, 8):
        universal = -0.24 * math.sqrt((group_size - 1) / group_size)
        lengths = torch.full((group_size,), 3)
        options = {"clip_low": 0.2, "clip_high": 0.28, "mode": GRPO}
        for _ in range(50):
            rewards = torch.randn(group_size, generator=generator, dtype=torch.float64).exp()
            advantages = group_advantages(rewards, group_size=group_size, eps=0.0)
            assert policy_loss_lower_bound(advantages, lengths, **options) >= universal - 1e-12
        half = group_advantages(tensor([1.0, 0.0] * (group_size // 2)), group_size=group_size, eps=0.0)
        torch.testing.assert_close(policy_loss_lower_bound(half, lengths, **options), tensor(universal))


def test_there_is_no_upper_bound_without_dual_clip():
    """负优势、ρ 越大损失越大；双侧裁剪 c=3 时每个负 token 封顶 3|A|，正 token 最高到 0（ρ→0）。"""
    advantages, lengths, mask, _, _ = case()
    ratios = torch.where(advantages[:, None] > 0, 1e-9, 1e6).expand(mask.shape).to(torch.float64)
    assert loss_at(ratios, advantages, mask, GRPO) > 1e5
    old = torch.full_like(ratios, -2.0)
    capped = dual_clip_loss(old + ratios.log(), old, advantages[:, None], dual_clip=3.0)
    ceiling = 3.0 * (-advantages.clamp(max=0)).mean()
    torch.testing.assert_close(aggregate_loss(capped, mask, mode=GRPO), ceiling)
    torch.testing.assert_close(ceiling, 1.5 * advantages.abs().mean())


def test_one_small_gradient_step_makes_the_loss_negative_by_eta_times_squared_norm():
    advantages, _, mask, log_probs, _ = case()
    leaf = log_probs.clone().requires_grad_()
    (grad,) = torch.autograd.grad(grpo_loss(leaf, log_probs, None, advantages, mask, beta=0.0), leaf)
    moved = grpo_loss(log_probs - 1e-5 * grad, log_probs, None, advantages, mask, beta=0.0)
    # 二阶项相对是 η 的量级
    torch.testing.assert_close(moved, -1e-5 * grad.square().sum(), rtol=1e-4, atol=0)


# ---- 边界 ----


def test_a_masked_row_breaks_the_zero():
    """整条被遮住（如遮掉被截断的回答）后，其余优势之和不再是 0；条数也少一条。"""
    advantages, lengths, mask, log_probs, _ = case()
    lengths = lengths.clone()
    lengths[1] = 0
    mask = mask & (torch.arange(6) != 1)[:, None]
    losses = clipped_surrogate_loss(log_probs, log_probs, advantages[:, None])
    for mode in MODES:
        real = aggregate_loss(losses, mask, mode=mode, max_response_length=L_MAX)
        ours = first_step_policy_loss(advantages, lengths, mode=mode, max_response_length=L_MAX)
        torch.testing.assert_close(ours, real)
    torch.testing.assert_close(first_step_policy_loss(advantages, lengths, mode=GRPO), advantages[1] / 5)


def test_float32_zero_is_only_rounding():
    generator = torch.Generator().manual_seed(6)
    rewards = torch.rand(64, generator=generator)
    advantages = group_advantages(rewards, group_size=8)
    value = first_step_policy_loss(advantages, torch.full((64,), 5), mode=GRPO)
    assert value.dtype == torch.float32 and abs(value) < 1e-6


def test_bad_arguments_are_refused():
    advantages, lengths = tensor([1.0, -1.0]), torch.tensor([1, 3])
    with pytest.raises(ValueError, match="token-mean"):
        first_step_policy_loss(advantages, lengths, mode="mean")
    for constant in (None, 0):
        with pytest.raises(ValueError, match="生成长度上限"):
            first_step_policy_loss(advantages, lengths, mode=CONSTANT, max_response_length=constant)
    for widths in ({"clip_low": -0.1}, {"clip_high": -0.1}):
        with pytest.raises(ValueError, match="不能为负"):
            policy_loss_lower_bound(advantages, lengths, mode=GRPO, **widths)
    with pytest.raises(jaxtyping.TypeCheckError):
        first_step_policy_loss(advantages, torch.tensor([1, 3, 2]), mode=GRPO)


# ---- 流传的错误说法，必须被上面的真值拒绝 ----


@pytest.mark.rejects
def test_zero_loss_is_not_zero_gradient():
    """「loss 是 0，没有在训练」：值 0，梯度逐元素是 −A/(B·n)，与有限差分一致，不是 0。"""
    advantages, lengths, mask, log_probs, _ = case()
    leaf = log_probs.clone().requires_grad_()
    loss = grpo_loss(leaf, log_probs, None, advantages, mask, beta=0.0)
    (grad,) = torch.autograd.grad(loss, leaf)
    assert abs(loss) < 1e-12 and grad.abs().max() > 0.05
    for i, t in [(0, 1), (1, 6), (4, 0)]:
        step = torch.zeros_like(log_probs)
        step[i, t] = 1e-6
        up, down = (
            grpo_loss(log_probs + s * step, log_probs, None, advantages, mask, beta=0.0) for s in (1, -1)
        )
        difference = ((up - down) / 2e-6).item()
        assert difference == pytest.approx(grad[i, t].item(), abs=1e-8)
        assert grad[i, t].item() == pytest.approx(-(advantages[i] / (6 * lengths[i])).item())


WRONG_FIRST_STEP = {
    "token 平均也从 0 开始": lambda a, n: 0.0,
    "符号反了": lambda a, n: ((a * n).sum() / n.sum()).item(),
    "不加权的平均优势": lambda a, n: -a.mean().item(),
    "等于平均 |A|": lambda a, n: a.abs().mean().item(),
}


@pytest.mark.rejects
@pytest.mark.parametrize("claim", WRONG_FIRST_STEP)
def test_wrong_first_values_differ_from_trl(claim):
    advantages, lengths, mask, log_probs, _ = case()
    truth = trl_grpo_loss(log_probs, None, advantages, mask, loss_type="dapo")[0].item()
    assert abs(WRONG_FIRST_STEP[claim](advantages, lengths) - truth) > 0.1
    assert first_step_policy_loss(advantages, lengths, mode=TOKEN_MEAN).item() == pytest.approx(truth)


WRONG_BOUNDS = {
    "−ε，忘了 mean|A|": lambda a, n: -0.24,
    "−ε_high·mean|A|": lambda a, n: -0.28 * a.abs().mean().item(),
    "−(ε_low+ε_high)·mean|A|": lambda a, n: -0.48 * a.abs().mean().item(),
    "−(1+ε_high)·mean|A|": lambda a, n: -1.28 * a.abs().mean().item(),
    "0，损失不会为负": lambda a, n: 0.0,
}


@pytest.mark.rejects
@pytest.mark.parametrize("claim", WRONG_BOUNDS)
def test_wrong_bounds_differ_from_the_brute_force_search(claim):
    """上下宽度 0.2、0.28；真值是网格上的最小值，错的至少差 0.005，我们的差小于 1e-9。"""
    advantages = group_advantages(tensor([1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 0.0, 0.2]), group_size=4)
    lengths = torch.tensor([2, 7, 3, 6, 1, 4, 5, 2])
    grid = [0.8, 1.0, 1.28] + [0.05 * k for k in range(1, 100)]
    truth = searched_minimum(advantages, lengths, GRPO, 0.2, 0.28, grid)
    ours = policy_loss_lower_bound(advantages, lengths, clip_low=0.2, clip_high=0.28, mode=GRPO).item()
    assert ours == pytest.approx(truth, abs=1e-9)
    assert abs(WRONG_BOUNDS[claim](advantages, lengths) - truth) > 0.005, (claim, truth)
