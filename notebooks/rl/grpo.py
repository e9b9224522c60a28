# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # GRPO：组相对策略优化（Group Relative Policy Optimization）：实验
#
# 页面 docs/rl/grpo.md 的数字和图都在这里算出来。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.kl_estimators import kl_k3
from snippets.rl.masking import aggregate_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: binary-advantages
#| caption: 一组八条、答对 k 条时，对的与错的各得多少优势；答对越少，单条对的优势越大，全对或全错时都是零
rows, table = [], {}
GROUP_SIZE = 8
for right in range(GROUP_SIZE + 1):
    rewards = torch.tensor([1.0] * right + [0.0] * (GROUP_SIZE - right))
    scaled = group_advantages(rewards, group_size=GROUP_SIZE)
    centred = group_advantages(rewards, group_size=GROUP_SIZE, scale_by_std=False)
    assert abs(scaled.sum()) < 1e-12 and abs(centred.sum()) < 1e-12  # 组内和为零
    p = right / GROUP_SIZE
    if 0 < right < GROUP_SIZE:
        good, bad = math.sqrt((1 - p) / p), -math.sqrt(p / (1 - p))  # 总体标准差的闭式
        factor = math.sqrt((GROUP_SIZE - 1) / GROUP_SIZE)  # 换成样本标准差
        assert abs(scaled[0] - factor * good) < 1e-4 and abs(scaled[-1] - factor * bad) < 1e-4
        table[right] = (scaled[0].item(), scaled[-1].item(), good, bad)
        cells = [scaled[0].item(), scaled[-1].item(), good, centred[0].item()]
    else:
        assert not scaled.any() and not centred.any()
        cells = [0.0] * 4
    if right in (0, 1, 2, 4, 6, 7, 8):
        rows.append([f"{right}/{GROUP_SIZE}", *(f"{cell:+.3f}" if cell else "0" for cell in cells)])

assert [f"{x:.3f}" for x in table[1]] == ["2.475", "-0.354", "2.646", "-0.378"]
assert [f"{x:.3f}" for x in table[7]] == ["0.354", "-2.475", "0.378", "-2.646"]
assert [f"{x:.3f}" for x in table[4]] == ["0.935", "-0.935", "1.000", "-1.000"]
# 0/1 与 ±1 给出同样的优势；两条一组时只剩符号
flip = torch.tensor([1.0, 0.0, 0.0, 1.0, 1.0, 0.0])
same = group_advantages(flip, group_size=3, eps=0.0) - group_advantages(2 * flip - 1, group_size=3, eps=0.0)
pair = group_advantages(torch.tensor([0.51, 0.5, -3.0, 97.0]), group_size=2, eps=0.0)
assert same.abs().max() < 1e-12 and (pair.abs() - 0.5**0.5).abs().max() < 1e-12

headers = ["答对", r"对的 $\hat A$", r"错的 $\hat A$", "对的，总体标准差", "对的，只减均值"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: prompt-weight
#| caption: 第一步的期望梯度等于某个权重乘以成功率的梯度：只减均值时权重与难度无关，除以标准差后两头高中间低，圆点是逐组枚举的结果


def std_weight(p, group_size):
    """二值奖励、除以样本标准差时 ∇p 前面的系数：对其余 G−1 条答对几条求和。"""

    def conditional(own):
        total = 0.0
        for others in range(group_size):
            q = (others + own) / group_size
            if 0 < q < 1:
                chance = math.comb(group_size - 1, others) * p**others * (1 - p) ** (group_size - 1 - others)
                total += chance * (own - q) / math.sqrt(q * (1 - q) * group_size / (group_size - 1))
        return total

    return conditional(1) - conditional(0)


def expected_gradient(logits, rewards, group_size, scale_by_std):
    """枚举 V^G 种组，第一步的梯度按出现概率加权；回答只有一个 token。"""
    groups = torch.tensor(list(itertools.product(range(len(logits)), repeat=group_size)))  # (V^G, G)
    advantages = group_advantages(
        rewards[groups].flatten(), group_size=group_size, eps=1e-12, scale_by_std=scale_by_std
    )
    leaf = logits.clone().requires_grad_()
    log_probs = leaf.log_softmax(-1)[groups]  # (V^G, G)
    losses = clipped_surrogate_loss(
        log_probs.reshape(-1, 1), log_probs.detach().reshape(-1, 1), advantages[:, None]
    )
    chance = log_probs.detach().sum(1).exp()
    (grad,) = torch.autograd.grad((losses.view_as(groups).mean(1) * chance).sum(), leaf)
    return -grad


def true_gradient(logits, rewards):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad((leaf.softmax(-1) * rewards).sum(), leaf)[0]


binary = torch.tensor([1.0, 0.0, 0.0])
fig, ax = plt.subplots(figsize=(6.0, 3.6))
grid = torch.linspace(0.01, 0.99, 99).tolist()
ax.plot(grid, [1 / math.sqrt(p * (1 - p)) for p in grid], "C3:", label="除以标准差，G→∞")
for size, style in [(64, "C2-."), (8, "C0-"), (2, "C4--")]:
    ax.plot(grid, [std_weight(p, size) for p in grid], style, label=f"除以标准差，G={size}")
ax.plot(grid, [7 / 8] * 99, "C1-", label="只减均值，G=8")
dots = []
for p in (0.05, 0.2, 0.5, 0.8, 0.95):
    logits = torch.tensor([p, 0.7 * (1 - p), 0.3 * (1 - p)]).log()
    truth = true_gradient(logits, binary)
    for size, scaled in [(8, True), (8, False), (2, True)]:
        expected = expected_gradient(logits, binary, size, scaled)
        ratio = (expected @ truth / (truth @ truth)).item()
        assert (expected - ratio * truth).abs().max() < 1e-9  # 方向不变
        assert abs(ratio - (std_weight(p, size) if scaled else (size - 1) / size)) < 1e-9
        dots.append((p, ratio))
ax.plot(*zip(*dots, strict=True), "C5o", markersize=5, label="枚举")
ax.set_ylim(0, 8)
ax.set_xlabel("这道题的真实成功率 q")
ax.set_ylabel("期望梯度是成功率梯度的几倍")
ax.legend(fontsize=10, ncols=2, loc="upper center")

weights = {p: std_weight(p, 8) for p in (0.05, 0.5)}
assert [f"{x:.2f}" for x in weights.values()] == ["2.31", "1.74"]
assert f"{weights[0.05] / weights[0.5]:.2f}" == "1.33"
assert f"{7 / math.sqrt(8) / weights[0.5]:.2f}" == "1.43"  # 两头的极限与中间之比
limit = {p: 1 / math.sqrt(p * (1 - p)) for p in (0.05, 0.5)}
assert [f"{x:.2f}" for x in limit.values()] == ["4.59", "2.00"] and f"{limit[0.05] / 2:.2f}" == "2.29"
for size, cap in [(8, "2.47"), (64, "7.88")]:  # p→0 时封顶在 (G−1)/√G
    assert abs(std_weight(1e-9, size) - (size - 1) / math.sqrt(size)) < 1e-4
    assert f"{(size - 1) / math.sqrt(size):.2f}" == cap
for size in (2, 3):  # 两条、三条一组：系数与 p 无关
    assert max(abs(std_weight(p, size) - (size - 1) / math.sqrt(size)) for p in grid) < 1e-12
# 奖励有三档时方向也变了；只减均值仍是精确的 (G−1)/G
three, peaked = torch.tensor([0.0, 0.2, 1.0]), torch.tensor([1.5, 0.0, -2.0])
truth = true_gradient(peaked, three)
assert (expected_gradient(peaked, three, 4, False) - truth * 3 / 4).abs().max() < 1e-12
cosine = torch.cosine_similarity(expected_gradient(peaked, three, 4, True), truth, dim=0).item()
assert f"{cosine:.2f}" == "0.94"

# %%
#| label: token-weight
#| caption: 一条 2000 token 与一条 50 token 的回答在四种聚合下每个 token 的权重；最后两行是把优势再除以长度的所谓修正
mask = torch.arange(2000) < torch.tensor([2000, 50])[:, None]
lengths = mask.sum(1, keepdim=True)
settings = [
    ("按条平均（GRPO）", "seq-mean-token-mean", False),
    ("token 平均（DAPO）", "token-mean", False),
    ("求和再按条平均", "seq-mean-token-sum", False),
    ("求和除以 4096（Dr. GRPO）", "seq-mean-token-sum-norm", False),
    ("token 平均，优势÷长度", "token-mean", True),
    ("按条平均，优势÷长度", "seq-mean-token-mean", True),
]
rows, ratios, shares = [], {}, {}
for name, mode, fix in settings:
    losses = torch.ones(2, 2000, requires_grad=True)
    tokens = losses / lengths if fix else losses
    total = aggregate_loss(tokens, mask, mode=mode, max_response_length=4096)
    (weight,) = torch.autograd.grad(total, losses)
    assert not weight[~mask].any()  # 填充没有权重
    ratios[name] = (weight[1, 0] / weight[0, 0]).item()
    shares[name] = (weight[0].sum() / weight.sum()).item()
    digits = [f"1/{1 / w:,.0f}" for w in weight[:, 0].tolist()]
    rows.append([name, *digits, f"{ratios[name]:.0f}", f"{shares[name]:.1%}"])

assert [round(x, 9) for x in ratios.values()] == [40.0, 1.0, 1.0, 1.0, 40.0, 1600.0]
assert [f"{x:.1%}" for x in shares.values()] == ["50.0%", "97.6%", "97.6%", "97.6%", "50.0%", "2.4%"]
headers = ["聚合方式", "长的单 token", "短的单 token", "短÷长", "长的占总权重"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: training-curve
#| caption: 三档难度的口令题上 GRPO 的成功率与有梯度的组所占比例，八次独立重复的均值与范围：越难的题越晚起步，学会之后又没有梯度
VOCAB_SIZE, SEEDS, STEPS, INNER, LR = 5, 8, 160, 2, 1.0
answer_lengths = torch.tensor([1, 2, 3]).repeat_interleave(4).repeat(SEEDS)  # 每次重复 12 道题
prompts, width = len(answer_lengths), 3
generator = torch.Generator().manual_seed(0)
answers = torch.randint(VOCAB_SIZE, (prompts, width), generator=generator)
answer_mask = torch.arange(width) < answer_lengths[:, None]  # (P, T)
row_prompt = torch.arange(prompts).repeat_interleave(GROUP_SIZE)  # 同组相邻
row_mask = answer_mask[row_prompt]


def pick(logits, tokens):
    return logits.log_softmax(-1)[row_prompt].gather(-1, tokens[..., None]).squeeze(-1)


def verifier(tokens):
    """整条与口令完全一致得 1，否则 0。"""
    return ((tokens == answers[row_prompt]) | ~row_mask).all(1).double()


logits = torch.zeros(prompts, width, VOCAB_SIZE)  # 每道题、每个位置一个分布
success, informative = [], []
started, frozen = torch.zeros(prompts, dtype=torch.bool), 0
for _ in range(STEPS):
    chance = logits.log_softmax(-1).gather(-1, answers[..., None]).squeeze(-1)
    success.append(chance.masked_fill(~answer_mask, 0.0).sum(1).exp().view(SEEDS, 3, 4).mean(-1))
    probs = logits.softmax(-1).reshape(-1, VOCAB_SIZE)
    tokens = torch.multinomial(probs, GROUP_SIZE, replacement=True, generator=generator)
    tokens = tokens.view(prompts, width, GROUP_SIZE).transpose(1, 2).reshape(-1, width)  # (B, T)
    rewards = verifier(tokens)
    advantages = group_advantages(rewards, group_size=GROUP_SIZE)
    mixed = rewards.view(prompts, GROUP_SIZE).std(1) > 0
    informative.append(mixed.double().view(SEEDS, -1).mean(1))
    started |= mixed
    old_log_probs = pick(logits, tokens)
    for _ in range(INNER):
        leaf = logits.clone().requires_grad_()
        loss = grpo_loss(pick(leaf, tokens), old_log_probs, None, advantages, row_mask, beta=0.0)
        (grad,) = torch.autograd.grad(loss, leaf)
        assert not grad[~mixed].any()  # 全组同分的题没有梯度
        logits = logits - LR * prompts * grad  # 乘题数：每道题的步长与总题数无关
    assert not logits[~started].any()  # 从没出现过「有对有错」的题，一步都没有动
    frozen = max(frozen, int((~started).sum()))
    if len(success) == 1:
        assert not rewards.view(prompts, GROUP_SIZE)[~mixed].any()  # 第一批里同分的组都是全错

success, informative = torch.stack(success), torch.stack(informative)  # (步, 重复, 难度)、(步, 重复)
fig, axes = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True, height_ratios=[3, 2])
steps = range(STEPS)
for level, style in enumerate(["C0-", "C1--", "C2-."]):
    curve = success[:, :, level]
    axes[0].plot(steps, curve.mean(1), style, label=f"{level + 1} 个字")
    axes[0].fill_between(steps, curve.amin(1), curve.amax(1), color=style[:2], alpha=0.25, linewidth=0)
axes[1].plot(steps, informative.mean(1), "C3-")
axes[1].fill_between(steps, informative.amin(1), informative.amax(1), color="C3", alpha=0.25, linewidth=0)
axes[0].set_ylabel("成功率")
axes[1].set_ylabel("有梯度的组")
axes[1].set_xlabel("采样批次（每批更新 2 次）")
axes[1].set_ylim(0, 1)
axes[0].legend(loc="lower right")

halfway = (success > 0.5).double().argmax(0)  # 每次重复里第一次过半的批次，(重复, 难度)
assert halfway.amin(0).tolist() == [3, 9, 49] and halfway.amax(0).tolist() == [3, 13, 66]
assert success[-1].amin() > 0.97
assert frozen == 56 and prompts == 96  # 第一批就有 56 道题全错
shares = [informative[0].mean(), informative.mean(1).max(), informative[-1].mean()]
assert [f"{x:.0%}" for x in shares] == ["42%", "52%", "10%"]

# %%
#| label: wrong-variants
#| caption: 每种写法的梯度与 GRPO 的梯度的相对误差，第一步与走过三步之后；去掉比值的写法在第一步看不出错
generator = torch.Generator().manual_seed(1)
variant_mask = torch.arange(6) < torch.tensor([6, 2, 4, 3, 1, 6, 5, 2])[:, None]  # 两组、每组四条
variant_tokens = torch.randint(5, (8, 6, 1), generator=generator)
start = torch.randn(8, 6, 5, generator=generator)
reference = (start + 0.5 * torch.randn(8, 6, 5, generator=generator)).log_softmax(-1)
reference = reference.gather(-1, variant_tokens).squeeze(-1)
scores = torch.tensor([1.0, 0.0, 0.3, 0.0, 1.0, 1.0, 0.0, 1.0])
right_advantages = group_advantages(scores, group_size=4)
crossed = group_advantages(scores.view(2, 4).T.flatten(), group_size=4).view(4, 2).T.flatten()
population = right_advantages * math.sqrt(4 / 3)


def variant(policy=None, kl=kl_k3, sign=1.0, mode="seq-mean-token-mean", mask=variant_mask, advantages=None):
    """只换掉 grpo_loss 的一个零件；β=0.04。"""

    def loss(log_probs, old_log_probs):
        adv = (right_advantages if advantages is None else advantages)[:, None]
        if policy is None:
            tokens = clipped_surrogate_loss(log_probs, old_log_probs, adv)
        else:
            tokens = policy(log_probs, (log_probs - old_log_probs).exp(), adv)
        return aggregate_loss(tokens + sign * 0.04 * kl(log_probs, reference), mask, mode=mode)

    return loss


variants = {
    "去掉比值：−mean(A·logπ)": variant(lambda lp, ratio, adv: -adv * lp),
    "min 少了逗号，成了乘积": variant(lambda lp, ratio, adv: -(ratio * adv) * (ratio.clamp(0.8, 1.2) * adv)),
    "KL 的比取了倒数": variant(kl=lambda lp, ref: kl_k3(ref, lp)),
    "KL 项的正负号反了": variant(sign=-1.0),
    "总体标准差": variant(advantages=population),
    "同组的行没有相邻": variant(advantages=crossed),
    "忽略掩码": variant(mask=variant_mask | True),
    "token 平均当成按条平均": variant(mode="token-mean"),
    "优势再除以长度": variant(advantages=right_advantages / variant_mask.sum(1)),
}


def log_probs_of(logits):
    return logits.log_softmax(-1).gather(-1, variant_tokens).squeeze(-1)


def gradient(loss_fn, logits):
    leaf = logits.clone().requires_grad_()
    return torch.autograd.grad(loss_fn(log_probs_of(leaf), log_probs_of(start)), leaf)[0]


def correct(log_probs, old_log_probs):
    return grpo_loss(log_probs, old_log_probs, reference, right_advantages, variant_mask)


assert (gradient(variant(), start) - gradient(correct, start)).abs().max() < 1e-15  # 什么也不换就是它
later = start.clone()
for _ in range(3):
    later = later - 2.0 * gradient(correct, later)
moved = (log_probs_of(later) - log_probs_of(start)).exp()[variant_mask]
rows, errors = [], {}
for name, loss_fn in variants.items():
    errors[name] = []
    for logits in (start, later):
        truth = gradient(correct, logits)
        errors[name].append(((gradient(loss_fn, logits) - truth).norm() / truth.norm()).item())
    rows.append([name, *errors[name]])

listed = {name: [f"{x:.3f}" for x in pair] for name, pair in errors.items()}
assert errors["去掉比值：−mean(A·logπ)"][0] == 0.0 and listed["去掉比值：−mean(A·logπ)"][1] == "1.325"
assert listed["min 少了逗号，成了乘积"] == ["2.614", "3.052"]
assert listed["KL 的比取了倒数"] == ["0.019", "0.037"] and listed["总体标准差"][0] == "0.155"
assert listed["同组的行没有相邻"][0] == "0.738"
assert all(first > 0.01 for name, (first, _) in errors.items() if "比值" not in name)
assert moved.min() < 0.8 and moved.max() > 1.2  # 三步之后已有 token 走出裁剪区间

Markdown(tabulate(rows, headers=["写法", "第一步", "三步之后"], tablefmt="github", floatfmt=".3f"))

# %%
#| label: zero-variance
#| caption: 八条回答奖励全部相同时各得多少优势，float32：奖励为 1 时恰好为零，0.9 与 0.3 有舍入，ε 越小放得越大，正负由舍入决定
rows, tiny = [], {}
for name, eps in [("1e-4（TRL）", 1e-4), ("1e-6（verl）", 1e-6), ("1e-9（OpenRLHF）", 1e-9)]:
    cells = []
    for reward in (1.0, 0.9, 0.3):
        rewards = torch.full((8,), reward, dtype=torch.float32)
        advantages = group_advantages(rewards, group_size=8, eps=eps)
        assert advantages.unique().numel() == 1  # 八条同号同值，和不是零（除非都是零）
        assert group_advantages(rewards.double(), group_size=8, eps=eps).abs().max() < 1e-6  # float64 可忽略
        cells.append(advantages[0].item())
    tiny[name] = cells
    rows.append([name, *(f"{x:+.4f}" if x else "0" for x in cells)])

assert [x[0] for x in tiny.values()] == [0.0] * 3
assert [f"{x[1]:.4f}" for x in tiny.values()] == ["-0.0006", "-0.0560", "-0.9210"]
assert [f"{x[2]:.4f}" for x in tiny.values()] == ["0.0003", "0.0289", "0.9069"]
useful = {size: 1 - 0.99**size - 0.01**size for size in (8, 64)}  # 成功率 1% 的题，一组里有对有错的概率
assert [f"{x:.1%}" for x in useful.values()] == ["7.7%", "47.4%"]
headers = ["ε", "全是 1", "全是 0.9", "全是 0.3"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
