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
# # RLOO：实验
#
# 页面 docs/rl/rloo.md 的数字和图都在这里算出来。

# %%
#| label: setup
import math
from itertools import product

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.grpo import group_advantages
from snippets.rl.kl_estimators import kl_k1
from snippets.rl.log_probs import sequence_log_probs
from snippets.rl.rloo import (
    kl_penalized_rewards,
    leave_one_out_advantages,
    optimal_constant_baseline,
    reinforce_loss,
    rloo_loss,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

ESTIMATORS = {
    "无基线": lambda r, g: r,
    "留一": lambda r, g: leave_one_out_advantages(r, group_size=g),
    "含自身均值": lambda r, g: group_advantages(r, group_size=g, scale_by_std=False),
    "除以标准差": lambda r, g: group_advantages(r, group_size=g),
}
POLICY = torch.tensor([0.6, 0.2, 0.1, 0.1])


def score_of(probs):
    """softmax 策略的得分函数：第 a 行是 log π(a) 对 logits 的梯度。"""
    return torch.eye(len(probs)) - probs


def true_gradient(probs, rewards):
    """对 J = Σ π(a) r(a) 直接求导。"""
    logits = probs.log().requires_grad_()
    return torch.autograd.grad((logits.softmax(0) * rewards).sum(), logits)[0]


def moments(advantage_fn, group_size, probs, rewards):
    """枚举全部 V^G 个组，返回梯度估计的期望与总方差（协方差矩阵的迹）。"""
    index = torch.cartesian_prod(*[torch.arange(len(probs))] * group_size)  # (N, G)
    weights = probs[index].prod(1)
    advantages = advantage_fn(rewards[index].flatten(), group_size).view(index.shape)
    estimates = (advantages[..., None] * score_of(probs)[index]).mean(1)  # (N, V)
    mean = (weights[:, None] * estimates).sum(0)
    return mean, (weights * (estimates - mean).square().sum(1)).sum().item()


def factor_and_angle(mean, truth):
    """期望梯度在真梯度方向上是几倍，以及两者的夹角（度）。"""
    mean, truth = mean.flatten(), truth.flatten()
    cosine = (mean @ truth / (mean.norm() * truth.norm())).clamp(max=1.0)
    return (mean @ truth / (truth @ truth)).item(), math.degrees(math.acos(cosine))


# %%
#| label: expectation-factors
#| caption: 枚举全部组，期望梯度是真梯度的几倍：留一恒为 1，含自身均值恰好是 (G−1)/G，除以标准差的倍数随 G 与成功率变
rare, even = torch.tensor([0.0, 0.0, 0.0, 1.0]), torch.tensor([0.0, 1.0, 1.0, 1.0])  # 成功率 0.1 与 0.4
rows, factors = [], {}
for group_size in [2, 4, 8]:
    for name, advantage_fn in ESTIMATORS.items():
        for rate, rewards in [(0.1, rare), (0.4, even)]:
            truth = true_gradient(POLICY, rewards)
            mean, _ = moments(advantage_fn, group_size, POLICY, rewards)
            factors[name, group_size, rate] = factor_and_angle(mean, truth)[0]
            if name in ("无基线", "留一"):
                torch.testing.assert_close(mean, truth, atol=1e-14, rtol=0)
            if name == "含自身均值":
                torch.testing.assert_close(mean, (1 - 1 / group_size) * truth, atol=1e-14, rtol=0)
    rows.append(
        [group_size]
        + [factors[name, group_size, 0.1] for name in ("留一", "含自身均值", "除以标准差")]
        + [factors["除以标准差", group_size, 0.4]]
    )

assert f"{factors['除以标准差', 8, 0.1]:.3f}" == "2.177" and f"{factors['除以标准差', 8, 0.4]:.3f}" == "1.760"
assert f"{factors['除以标准差', 4, 0.1]:.3f}" == "1.464" and f"{factors['除以标准差', 4, 0.4]:.3f}" == "1.404"
assert f"{factors['除以标准差', 2, 0.1]:.3f}" == f"{factors['除以标准差', 2, 0.4]:.3f}" == "0.707"
# 奖励分级时，除以标准差连方向都变
graded = torch.tensor([0.1, 0.9, 0.3, 1.0])
mean, _ = moments(ESTIMATORS["除以标准差"], 2, POLICY, graded)
assert f"{factor_and_angle(mean, true_gradient(POLICY, graded))[1]:.0f}" == "10"

Markdown(
    tabulate(
        rows,
        headers=["$G$", "留一", "含自身均值", "除以标准差，成功率 0.1", "除以标准差，成功率 0.4"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
#| label: variance-vs-group-size
#| caption: 每条样本的梯度方差随组大小的变化：留一随组大小下降，从三条起低于无基线，始终高于最优常数基线；含自身均值低只是因为整体缩小，优势放大回去与留一重合
rewards = torch.tensor([0.0, 1.0, 0.0, 1.0])  # 成功率 0.3
scores, truth = score_of(POLICY), true_gradient(POLICY, rewards)
best = optimal_constant_baseline(POLICY, rewards, scores).item()
sizes = list(range(2, 9))
variance = {
    name: [g * moments(ESTIMATORS[name], g, POLICY, rewards)[1] for g in sizes]
    for name in ("无基线", "留一", "含自身均值")
}
constant = {
    b: [g * moments(lambda r, _, b=b: r - b, g, POLICY, rewards)[1] for g in sizes] for b in (0.3, best)
}
rescaled = [v * (g / (g - 1)) ** 2 for v, g in zip(variance["含自身均值"], sizes, strict=True)]

fig, axis = plt.subplots(figsize=(6.0, 3.4))
axis.plot(sizes, variance["无基线"], "C1--", label="无基线")
axis.plot(sizes, variance["留一"], "C0-", label="留一")
axis.plot(sizes, rescaled, "C3o", fillstyle="none", markersize=8, label="含自身均值，优势乘回 G/(G−1)")
axis.plot(sizes, variance["含自身均值"], "C3:", label="含自身均值")
axis.plot(sizes, constant[best], "C2-.", label="最优常数基线")
axis.set_ylim(0, 0.56)
axis.set_xlabel("组大小 G（条）")
axis.set_ylabel("G × 总方差")
axis.legend(loc="upper right")

# 闭式：Var[(r−J)s]/G + (Var(r)·E‖s‖² + ‖∇J‖²)/(G(G−1))，逐个 G 精确
norms = scores.square().sum(1)
single = (POLICY * (rewards - 0.3) ** 2 * norms).sum() - truth @ truth
price = (POLICY * (rewards - 0.3) ** 2).sum() * (POLICY * norms).sum() + truth @ truth
for g, loo, own, none in zip(
    sizes, variance["留一"], variance["含自身均值"], variance["无基线"], strict=True
):
    assert abs(loo - (single + price / (g - 1))) < 1e-12
    assert abs(loo * ((g - 1) / g) ** 2 - own) < 1e-12 and abs(none - 0.2682) < 1e-12
assert f"{variance['留一'][0]:.3f}" == "0.304" and f"{variance['留一'][-1]:.3f}" == "0.150"
assert f"{variance['留一'][1]:.3f}" == "0.215" and f"{variance['含自身均值'][0]:.3f}" == "0.076"
assert f"{best:.3f}" == "0.562" and f"{single:.3f}" == f"{constant[0.3][0]:.3f}" == "0.125"
assert f"{constant[best][0]:.3f}" == "0.085" and f"{price:.3f}" == "0.180"
# 奖励整体加 3：留一不变，无基线变成 7.44
assert abs(8 * moments(ESTIMATORS["留一"], 8, POLICY, rewards + 3)[1] - variance["留一"][-1]) < 1e-12
assert f"{8 * moments(ESTIMATORS['无基线'], 8, POLICY, rewards + 3)[1]:.2f}" == "7.44"

# %%
# 减去平均奖励也可能更差：策略已有 0.7 的概率给出唯一得分的回答
peaked, only_mode = torch.tensor([0.7, 0.1, 0.1, 0.1]), torch.tensor([1.0, 0.0, 0.0, 0.0])
none = 4 * moments(ESTIMATORS["无基线"], 4, peaked, only_mode)[1]
mean_baseline = 4 * moments(lambda r, g: r - 0.7, 4, peaked, only_mode)[1]
loo = 4 * moments(ESTIMATORS["留一"], 4, peaked, only_mode)[1]
b_star = optimal_constant_baseline(peaked, only_mode, score_of(peaked)).item()
assert (f"{none:.3f}", f"{mean_baseline:.3f}", f"{loo:.3f}", f"{b_star:.3f}") == (
    "0.025",
    "0.143",
    "0.196",
    "0.175",
)

# 分母写错成 G（和里仍不含自己）：期望没错，奖励加 3 之后方差变大
wrong = lambda r, g: r - (r.view(-1, g).sum(1, keepdim=True) - r.view(-1, g)).flatten() / g  # noqa: E731
mean, shifted = moments(wrong, 4, POLICY, rewards + 3)
torch.testing.assert_close(mean, truth, atol=1e-14, rtol=0)
assert f"{4 * shifted:.2f}" == "0.80" and f"{variance['留一'][2]:.2f}" == "0.18"

# 和里含自己、分母却是 G−1：期望是 (G−2)/(G−1) 倍；系数写成 (G−1)/G：期望是它的平方倍
for g in (2, 4):
    both = {
        (g - 2) / (g - 1): lambda r, g: (
            r - (r.view(-1, g).sum(1, keepdim=True) / (g - 1)).expand(-1, g).flatten()
        ),
        ((g - 1) / g) ** 2: lambda r, g: (g - 1) / g * ESTIMATORS["含自身均值"](r, g),
    }
    for scale, advantage_fn in both.items():
        mean, _ = moments(advantage_fn, g, POLICY, rewards)
        torch.testing.assert_close(mean, scale * truth, atol=1e-14, rtol=0)

# Adam 看不见常数倍：同一批样本，含自身均值与留一走 20 步，参数之差只来自 Adam 的 ε
ends = {}
for name in ("留一", "含自身均值"):
    logits = POLICY.log().requires_grad_()
    optimizer = torch.optim.Adam([logits], lr=0.05)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        actions = torch.multinomial(logits.detach().softmax(0), 64, replacement=True, generator=generator)
        advantages = ESTIMATORS[name](rewards[actions], 2)
        optimizer.zero_grad()
        (-(advantages * logits.log_softmax(0)[actions]).mean()).backward()
        optimizer.step()
    ends[name] = logits.detach()
assert (ends["留一"] - ends["含自身均值"]).abs().max() < 1e-5 < (ends["留一"] - POLICY.log()).abs().max()

# 留一均值配「其余几条」的标准差
group = torch.tensor([1.0, 0.0, 0.0, 0.0])
others = torch.stack([torch.cat([group[:i], group[i + 1 :]]) for i in range(4)])
exploded = leave_one_out_advantages(group, group_size=4) / (others.std(1) + 1e-6)
assert f"{exploded[0]:.3g}" == "1e+06" and f"{exploded[1]:.2f}" == "-0.58"

# %%
#| label: sequence-gradients
#| caption: 变长回答上的期望梯度：对 token 求和、整条的比值、k1 减进奖励都精确等于各自目标的真梯度，换成平均、逐 token 比值或反号就偏了
EOS, LENGTH = 0, 4


def all_responses():
    """词表 {0=EOS, 1, 2}、最长 4 个 token 的全部回答：(31, 4) 的 token 与掩码。"""
    rows = {}
    for tokens in product(range(3), repeat=LENGTH):
        end = tokens.index(EOS) + 1 if EOS in tokens else LENGTH
        rows[tokens[:end] + (EOS,) * (LENGTH - end)] = end
    return torch.tensor(list(rows)), torch.arange(LENGTH) < torch.tensor(list(rows.values()))[:, None]


IDS, MASK = all_responses()
SCORES = (IDS == 1).sum(1) - 1.5 * (IDS == 2).any(1)  # 奖励：1 的个数，出现过 2 扣 1.5
theta, old_theta, ref_theta = (
    torch.randn(3, 3, generator=torch.Generator().manual_seed(seed)) for seed in (1, 2, 3)
)
BETA = 0.3


def token_log_probs(weights):
    """θ[前一个 token] 是下一个 token 的 logits；返回全部 31 条回答的逐 token 对数概率。"""
    previous = torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], dim=1)
    return weights.log_softmax(-1)[previous, IDS]


def logps_of(weights):
    return sequence_log_probs(token_log_probs(weights), MASK)


def objective_gradient(beta=0.0):
    leaf = theta.clone().requires_grad_()
    logps = logps_of(leaf)
    value = (logps.exp() * (SCORES - beta * (logps - logps_of(ref_theta)))).sum()
    return torch.autograd.grad(value, leaf)[0]


PAIRS = torch.cartesian_prod(torch.arange(len(IDS)), torch.arange(len(IDS)))  # G=2 的全部组
FLAT = PAIRS.flatten()


def expected_gradient(loss_fn, sampler, rewards):
    """枚举 G=2 的全部 961 个组，返回 −E[∇ 损失]；loss_fn 收 (log_probs, old_log_probs, 优势, 掩码)，返回 (B,)。"""
    leaf = theta.clone().requires_grad_()
    weights = logps_of(sampler).exp()[PAIRS].prod(1)
    advantages = leave_one_out_advantages(rewards[FLAT], group_size=2)
    losses = loss_fn(token_log_probs(leaf)[FLAT], token_log_probs(sampler)[FLAT], advantages, MASK[FLAT])
    return -torch.autograd.grad((weights * losses.view(-1, 2).mean(1)).sum(), leaf)[0]


def summed(log_probs, old, advantages, mask):
    return reinforce_loss(log_probs, advantages, mask)


def averaged(log_probs, old, advantages, mask):
    return reinforce_loss(log_probs, advantages, mask) / mask.sum(1)


def sequence_ratio(log_probs, old, advantages, mask):
    return rloo_loss(log_probs, old, advantages, mask, clip_low=1.0, clip_high=math.inf)


def token_ratio(log_probs, old, advantages, mask):
    losses = clipped_surrogate_loss(log_probs, old, advantages[:, None], clip_low=1.0, clip_high=math.inf)
    return (losses * mask).sum(1)


def with_kl(kl_coef):
    return kl_penalized_rewards(
        SCORES, token_log_probs(theta), token_log_probs(ref_theta), MASK, kl_coef=kl_coef
    )


cases = [
    ("token 求和", summed, theta, SCORES, 0.0),
    ("token 平均", averaged, theta, SCORES, 0.0),
    ("旧样本，整条比值", sequence_ratio, old_theta, SCORES, 0.0),
    ("旧样本，逐 token 比值", token_ratio, old_theta, SCORES, 0.0),
    ("奖励减 βk1", summed, theta, with_kl(BETA), BETA),
    ("奖励加 βk1", summed, theta, with_kl(-BETA), BETA),
]
rows, errors = [], {}
for name, loss_fn, sampler, rewards_of_responses, beta in cases:
    truth_of_case = objective_gradient(beta)
    gradient = expected_gradient(loss_fn, sampler, rewards_of_responses)
    error = ((gradient - truth_of_case).norm() / truth_of_case.norm()).item()
    angle = factor_and_angle(gradient, truth_of_case)[1] if error > 1e-12 else 0.0
    errors[name] = (error, angle)
    rows.append([name, f"{error:.3f}" if error > 1e-12 else "0", f"{angle:.1f}" if error > 1e-12 else "0"])

assert len(IDS) == 31 and len(PAIRS) == 961 and abs(logps_of(theta).exp().sum().item() - 1) < 1e-12
assert all(errors[name][0] < 1e-12 for name in ("token 求和", "旧样本，整条比值", "奖励减 βk1"))
assert [f"{errors[name][0]:.3f}" for name in ("token 平均", "旧样本，逐 token 比值", "奖励加 βk1")] == [
    "0.597",
    "1.238",
    "0.531",
]
assert [f"{errors[name][1]:.1f}" for name in ("token 平均", "旧样本，逐 token 比值", "奖励加 βk1")] == [
    "19.9",
    "10.8",
    "29.9",
]

Markdown(tabulate(rows, headers=["写法", "相对误差", "夹角（度）"], tablefmt="github", disable_numparse=True))


# %%
# 逐 token 比值错在哪里：再补上前缀的比值，或补上后续的比值，或都补
def partial_ratio(prefix, suffix):
    def loss(log_probs, old, advantages, mask):
        log_ratio = ((log_probs - old) * mask).detach()
        before = (log_ratio.cumsum(1) - log_ratio) * prefix
        after = (log_ratio.flip(1).cumsum(1).flip(1) - log_ratio) * suffix
        weights = (before + log_ratio + after).exp()
        return -(weights * advantages[:, None] * log_probs * mask).sum(1)

    return loss


truth = objective_gradient()
partial = {}
for prefix, suffix in product([0, 1], repeat=2):
    gradient = expected_gradient(partial_ratio(prefix, suffix), old_theta, SCORES)
    partial[prefix, suffix] = ((gradient - truth).norm() / truth.norm()).item()
assert [f"{partial[key]:.3f}" for key in ((0, 0), (1, 0), (0, 1))] == ["1.238", "1.175", "0.279"]
assert partial[1, 1] < 1e-12

# 全组同分时：不罚 KL 优势为 0；KL 扣在奖励里，优势不为 0
same_score = (SCORES == SCORES.mode().values).nonzero().flatten()[:2]
assert SCORES[same_score[0]] == SCORES[same_score[1]]
assert leave_one_out_advantages(SCORES[same_score], group_size=2).abs().max() == 0
assert leave_one_out_advantages(with_kl(0.05)[same_score], group_size=2).abs().min() > 0.01


# %%
# KL 的两种摊法：整条的 k1 扣在每个 token 上，或只扣这个 token 之后的；期望相同，方差不同
def gradient_moments(weights_of_tokens):
    """G=2 逐组的梯度估计 (N, 9) 的期望与总方差；weights_of_tokens 是 (N·2, T) 的逐 token 优势。"""
    previous = torch.cat([torch.zeros_like(IDS[:, :1]), IDS[:, :-1]], dim=1)
    token_scores = torch.zeros(len(IDS), LENGTH, 3, 3)
    for i, t in product(range(len(IDS)), range(LENGTH)):
        token_scores[i, t, previous[i, t]] = score_of(theta.softmax(-1)[previous[i, t]])[IDS[i, t]]
    per_response = (weights_of_tokens * MASK[FLAT])[..., None, None] * token_scores[FLAT]
    estimates = per_response.sum(1).view(-1, 2, 9).mean(1)
    weights = logps_of(theta).exp()[PAIRS].prod(1)
    mean = (weights[:, None] * estimates).sum(0)
    return mean, (weights * (estimates - mean).square().sum(1)).sum().item()


k1 = kl_k1(token_log_probs(theta), token_log_probs(ref_theta)) * MASK
to_go = k1.flip(1).cumsum(1).flip(1)
base = leave_one_out_advantages(SCORES[FLAT], group_size=2)[:, None]
shaped = leave_one_out_advantages(with_kl(BETA)[FLAT], group_size=2)[:, None]
ways = {
    "先扣再减基线": shaped.expand(-1, LENGTH),
    "减完基线再扣整条": base - BETA * k1.sum(1, keepdim=True)[FLAT],
    "减完基线再扣之后的": base - BETA * to_go[FLAT],
}
kl_variance = {}
for name, token_advantages in ways.items():
    mean, kl_variance[name] = gradient_moments(token_advantages)
    torch.testing.assert_close(mean.view(3, 3), objective_gradient(BETA), atol=1e-14, rtol=1e-10)
assert [f"{value:.3f}" for value in kl_variance.values()] == ["1.321", "1.271", "1.197"]

# %%
#| label: sequence-clip-vs-length
#| caption: 策略只挪动同样一点，回答越长，整条的重要性比值越散，落到 0.8 到 1.2 之外的回答越多；逐 token 的比值几乎不受影响
VOCAB, SAMPLES = 8, 2048


def ratios_by_length(seed, max_length=512):
    """二元语法策略挪动一小步，从旧策略采样；返回逐 token 的 log ρ，形状 (SAMPLES, max_length)。"""
    generator = torch.Generator().manual_seed(seed)
    old = torch.randn(VOCAB, VOCAB, generator=generator)
    new = old + 0.02 * torch.randn(VOCAB, VOCAB, generator=generator)
    shift, probs = new.log_softmax(-1) - old.log_softmax(-1), old.softmax(-1)
    state = torch.zeros(SAMPLES, dtype=torch.long)
    steps = []
    for _ in range(max_length):
        token = torch.multinomial(probs[state], 1, generator=generator)[:, 0]
        steps.append(shift[state, token])
        state = token
    return torch.stack(steps, dim=1)


def outside(ratio):
    return ((ratio < 0.8) | (ratio > 1.2)).double().mean().item()


rows = []
log_ratio = ratios_by_length(0)
for length in [8, 32, 128, 512]:
    sequence = log_ratio[:, :length].sum(1).exp()
    low, high = torch.quantile(sequence, torch.tensor([0.1, 0.9])).tolist()
    token = outside(log_ratio[:, :length].exp())
    rows.append([length, f"{token:.1%}", f"{outside(sequence):.1%}", f"{low:.2f}–{high:.2f}"])
assert [row[1] for row in rows] == ["0.0%"] * 4
assert [row[2] for row in rows] == ["0.0%", "3.1%", "28.0%", "58.0%"] and rows[-1][3] == "0.58–1.48"
longest = []
for seed in range(5):
    log_ratio = ratios_by_length(seed)
    shares = [outside(log_ratio[:, :n].sum(1).exp()) for n in (8, 32, 128, 512)]
    assert shares == sorted(shares) and outside(log_ratio.exp()) < 0.001
    longest.append(shares[-1])
assert (f"{min(longest):.0%}", f"{max(longest):.0%}") == ("54%", "64%")
# 逐 token 平均挪 log(1.2)/T 就够把整条推出上界
assert f"{math.log(1.2) / 512:.5f}" == "0.00036"

headers = ["回答长度", "逐 token 出界", "整条出界", "整条 ρ 的 10%–90%"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
