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
# # REINFORCE++：实验
#
# 页面 docs/rl/reinforce-plus-plus.md 的数字和图都在这里算出来。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.grpo import group_advantages
from snippets.rl.kl_estimators import kl_k1
from snippets.rl.masking import aggregate_loss
from snippets.rl.ppo import kl_shaped_rewards, whiten
from snippets.rl.reinforce_plus_plus import (
    reinforce_plus_plus_advantages,
    reinforce_plus_plus_baseline_advantages,
    returns_to_go,
    whiten_per_sequence,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def mask_of(lengths):
    """每行前 length 个位置为真。"""
    return torch.arange(max(lengths))[None, :] < torch.tensor(lengths)[:, None]


# %%
#| label: pipeline-steps
#| caption: 两条回答五个 token：逐 token 奖励、回报、全批归一化后的优势；最后一行是填充
rewards, mask = torch.tensor([1.0, 0.0]), mask_of([3, 2])
log_ratio = torch.tensor([[1.0, -1.0, 2.0], [2.0, 3.0, 7.0]])  # 最后一个 7 在填充上，不该有影响
ref = torch.full((2, 3), -4.0)
token_rewards = kl_shaped_rewards(rewards, ref + log_ratio, ref, mask, kl_coef=0.1)
returns = returns_to_go(token_rewards, mask)
advantages = reinforce_plus_plus_advantages(rewards, ref + log_ratio, ref, mask, kl_coef=0.1)

assert torch.allclose(returns[mask], torch.tensor([0.8, 0.9, 0.8, -0.5, -0.3]))
assert abs(returns[mask].mean() - 0.34) < 1e-12 and abs(returns[mask].std() - 0.6804) < 5e-5
assert abs(advantages[mask].mean()) < 1e-12 and abs(advantages[mask].std() - 1) < 1e-7
assert [f"{a:.3f}" for a in advantages[mask]] == ["0.676", "0.823", "0.676", "-1.234", "-0.941"]
assert advantages[1, 2] == 0

rows = [
    [
        f"{i + 1}.{t + 1}" if mask[i, t] else "填充",
        *(x[i, t].item() for x in (kl, token_rewards, returns, advantages)),
    ]
    for kl in [log_ratio.masked_fill(~mask, math.nan)]
    for i in range(2)
    for t in range(3)
]
rows[-1][1:] = ["—", 0.0, 0.0, 0.0]
Markdown(
    tabulate(
        rows,
        headers=["token", "$k_1$", "$r_t$", "$A_t$", r"$\hat A_t$"],
        tablefmt="github",
        floatfmt=".3f",
        disable_numparse=[0],
    )
)


# %%
def count_weights(p, n):
    return torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def effective_weights(advantage_fn, p_hard, p_easy, n):
    """两题各 n 条，对答对条数精确求和：E[组内 (1/n)Σ A(r-p)] / p(1-p)，即 E[梯度] = w·∇p 的 w。"""
    weights = torch.zeros(2)
    for k_hard, prob_hard in enumerate(count_weights(p_hard, n)):
        for k_easy, prob_easy in enumerate(count_weights(p_easy, n)):
            rewards = torch.cat([torch.arange(n) < k_hard, torch.arange(n) < k_easy]).double()
            advantages = advantage_fn(rewards)
            for prompt, p in enumerate([p_hard, p_easy]):
                part = slice(prompt * n, (prompt + 1) * n)
                inner = (advantages[part] * (rewards[part] - p)).mean()
                weights[prompt] += prob_hard * prob_easy * inner / (p * (1 - p))
    return weights


G, HARD, EASY = 8, 0.5, 0.95
ones = torch.ones(2 * G, 1, dtype=torch.bool)
estimators = {
    "GRPO": lambda r: group_advantages(r, group_size=G),
    "REINFORCE++": lambda r: whiten(r[:, None], ones)[:, 0],
    "-baseline": lambda r: reinforce_plus_plus_baseline_advantages(r, ones, group_size=G)[:, 0],
}

# %%
#| label: two-prompts
#| caption: 一批两题各八条（难题对四条、易题对七条）时答错那条的优势，以及对所有可能的批精确求和的权重比
sample = torch.tensor([1.0] * 4 + [0.0] * 4 + [1.0] * 7 + [0.0])
rows, ratios, drops = [], {}, {}
for name, advantage_fn in estimators.items():
    advantages = advantage_fn(sample)
    w = effective_weights(advantage_fn, HARD, EASY, G)
    ratios[name], drops[name] = (w[1] / w[0]).item(), (advantages[7].item(), advantages[15].item())
    rows.append([name, *drops[name], drops[name][1] / drops[name][0], ratios[name]])

assert [f"{x:.3f}" for x in drops["GRPO"]] == ["-0.935", "-2.475"]
assert [f"{x:.3f}" for x in drops["-baseline"]] == ["-1.142", "-1.999"]
assert [f"{x:.3f}" for x in drops["REINFORCE++"]] == ["-1.436", "-1.436"]
rights = {name: [fn(sample)[i].item() for i in (0, 8)] for name, fn in estimators.items()}
assert [f"{x:.2f}" for x in rights["REINFORCE++"]] == ["0.65", "0.65"]
assert [f"{x:.2f}" for x in rights["-baseline"]] == ["1.14", "0.29"]
assert abs(drops["GRPO"][1] + (G - 1) / math.sqrt(G)) < 1e-4  # 样本标准差的 z 分数不会超过 (G-1)/√G
std_ratio = sample[:8].std() / sample[8:].std()
boost = (drops["GRPO"][1] / drops["GRPO"][0]) / (drops["-baseline"][1] / drops["-baseline"][0])
assert abs(boost - std_ratio) < 1e-5 and f"{std_ratio:.2f}" == "1.51"
assert [f"{x:.2f}" for x in ratios.values()] == ["1.33", "0.97", "0.86"]
# 批无限大时 GRPO 的极限是标准差之比
assert f"{math.sqrt(HARD * (1 - HARD) / (EASY * (1 - EASY))):.2f}" == "2.29"

Markdown(
    tabulate(
        rows,
        headers=["估计", "难题错", "易题错", "易/难", "期望权重比"],
        tablefmt="github",
        floatfmt=".2f",
    )
)


# %%
def weight_grpo(p, group_size):
    """GRPO 的权重只看自己那一组：对组内答对的条数精确求和。"""
    total = 0.0
    for k, prob in enumerate(count_weights(p, group_size)):
        rewards = (torch.arange(group_size) < k).double()
        total += prob * (group_advantages(rewards, group_size=group_size) * (rewards - p)).mean()
    return total / (p * (1 - p))


def weights_global(n, p_hard, p_easy):
    """REINFORCE++：两题各 n 条，统计量只依赖两题各对几条。"""
    k_hard = torch.arange(n + 1.0)[:, None]
    k_easy = torch.arange(n + 1.0)[None, :]
    prob = count_weights(p_hard, n)[:, None] * count_weights(p_easy, n)[None, :]
    mean = (k_hard + k_easy) / (2 * n)
    scale = (mean * (1 - mean) * 2 * n / (2 * n - 1) + 1e-8).rsqrt()
    out = []
    for k, p in [(k_hard, p_hard), (k_easy, p_easy)]:
        inner = scale * (k * (1 - mean) * (1 - p) + (n - k) * mean * p) / n
        out.append((prob * inner).sum() / (p * (1 - p)))
    return torch.stack(out)


def group_variance_sum(p, groups):
    """groups 组的 K(G-K)/G 之和的分布：下标是 ΣK(G-K)。"""
    one = torch.zeros(G * G // 4 + 1)
    for k, prob in enumerate(count_weights(p, G)):
        one[k * (G - k)] += prob
    total = torch.ones(1)
    for _ in range(groups):
        total = torch.nn.functional.conv1d(
            total[None, None], one.flip(0)[None, None], padding=len(one) - 1
        ).flatten()
    return total


def weights_baseline(groups, p_hard, p_easy):
    """-baseline：两题各 groups 组，组内平方和之和决定全批标准差。"""
    dist = [group_variance_sum(p, groups) for p in (p_hard, p_easy)]
    squares = [torch.arange(len(d)) / G for d in dist]
    prob = dist[0][:, None] * dist[1][None, :]
    n = 2 * groups * G
    scale = ((squares[0][:, None] + squares[1][None, :]) / (n - 1) + 1e-8).rsqrt()
    hard = (prob * scale * squares[0][:, None]).sum() / (groups * G) / (p_hard * (1 - p_hard))
    easy = (prob * scale * squares[1][None, :]).sum() / (groups * G) / (p_easy * (1 - p_easy))
    return torch.stack([hard, easy])


def relative(weights):
    return abs((weights[1] / weights[0]).item() - 1)


# 闭式与参考实现逐批枚举的结果一致
assert abs(weight_grpo(EASY, G) / weight_grpo(HARD, G) - ratios["GRPO"]) < 1e-9
assert torch.allclose(
    weights_global(G, HARD, EASY), effective_weights(estimators["REINFORCE++"], HARD, EASY, G)
)
assert torch.allclose(
    weights_baseline(1, HARD, EASY), effective_weights(estimators["-baseline"], HARD, EASY, G)
)

# %%
#| label: bias-vs-batch
#| caption: 易题与难题的期望权重比偏离一的量：组内标准差用的回答越多偏得越多，两种全批归一化按条数的倒数下降
sizes = [16, 32, 64, 128, 256, 512]
group_sizes = [4, 8, *sizes]
grpo_gap = [abs((weight_grpo(EASY, n) / weight_grpo(HARD, n)).item() - 1) for n in group_sizes]
global_gap = [relative(weights_global(n // 2, HARD, EASY)) for n in sizes]
baseline_gap = [relative(weights_baseline(n // (2 * G), HARD, EASY)) for n in sizes]
fig, ax = plt.subplots(figsize=(6.0, 3.4))
ax.loglog(group_sizes, grpo_gap, "C1s-", label="GRPO（组内）")
ax.loglog(sizes, baseline_gap, "C0o-", label="REINFORCE++-baseline（全批）")
ax.loglog(sizes, global_gap, "C2^--", label="REINFORCE++（全批）")
ax.set_xticks(group_sizes, [str(n) for n in group_sizes])
ax.minorticks_off()
ax.set_ylim(3e-5, 3)
ax.set_xlabel("求一次标准差用的回答条数（组大小或批大小）")
ax.set_ylabel("|易题权重 / 难题权重 − 1|")
ax.legend(loc="lower left")

for gaps in (global_gap, baseline_gap):
    slope = math.log(gaps[-1] / gaps[-3]) / math.log(4)
    assert -1.1 < slope < -0.9
assert abs(weight_grpo(EASY, 2) / weight_grpo(HARD, 2) - 1) < 1e-5  # G=2：组里要么同分要么 ±1/√2
assert grpo_gap == sorted(grpo_gap)
assert [f"{grpo_gap[i]:.2f}" for i in (0, 1, -1)] == ["0.06", "0.33", "1.28"]
assert f"{global_gap[0]:.3f}" == "0.027" and f"{baseline_gap[0]:.3f}" == "0.136"
assert f"{global_gap[-1]:.4f}" == "0.0010" and f"{baseline_gap[-1]:.4f}" == "0.0049"

# %%
# 幅度：只有一题时，只减均值（自己在内）少 1/N，再除以批标准差后的期望也只差 O(1/N)
scaled = {}
for n in (4, 8, 16, 32):
    one_prompt = torch.ones(n, 1, dtype=torch.bool)
    sigma = math.sqrt(HARD * (1 - HARD))
    centered = whitened = 0.0
    for k, prob in enumerate(count_weights(HARD, n)):
        rewards = (torch.arange(n) < k).double()
        score = (rewards - HARD) / sigma**2
        centered += prob * ((rewards - rewards.mean()) * score).mean()
        whitened += prob * (whiten(rewards[:, None], one_prompt)[:, 0] * score).mean() * sigma
    assert abs(centered - (1 - 1 / n)) < 1e-12
    scaled[n] = whitened.item()
assert [f"{x:.3f}" for x in scaled.values()] == ["0.700", "0.868", "0.936", "0.968"]
assert abs((1 - scaled[32]) * 32 / ((1 - scaled[16]) * 16) - 1) < 0.05

# %%
#| label: token-vs-sequence
#| caption: 第一组四条答对一条（最短或最长的那条），第二组四条全错：按 token 与按条两种统计量给出的优势
rows, table = [], {}
rewards = torch.tensor([1.0, 0.0, 0.0, 0.0] + [0.0] * 4)
centered = group_advantages(rewards, group_size=4, scale_by_std=False)
for case, lengths in {"短的对": [2, 6, 6, 6], "长的对": [6, 2, 2, 2]}.items():
    mask = mask_of(lengths + [4] * 4)
    for kind, advantages in {
        "按 token": reinforce_plus_plus_baseline_advantages(rewards, mask, group_size=4),
        "按条": whiten_per_sequence(centered, mask),
    }.items():
        means = [aggregate_loss(advantages, mask, mode=m) for m in ("token-mean", "seq-mean-token-mean")]
        means = [x.item() if abs(x) > 1e-12 else 0.0 for x in means]
        table[case, kind] = [*(advantages[i, 0].item() + 0.0 for i in (0, 1, 4)), *means]
        rows.append([f"{case}，{kind}", *table[case, kind][:4]])

for key, values in table.items():
    # 按 token 归一化：token 均值是 0；按条：每条均值是 0，全错的组也是 0
    assert values[3 if key[1] == "按 token" else 4] == 0
    assert (values[2] == 0) == (key[1] == "按条")
assert [f"{table[k][4]:.2f}" for k in table if k[1] == "按 token"] == ["0.35", "-0.30"]
assert [f"{table[k][0]:.2f}" for k in table] == ["3.49", "2.29", "1.80", "2.29"]
assert [f"{table[k][2]:.2f}" for k in table] == ["0.35", "0.00", "-0.30", "0.00"]

Markdown(
    tabulate(
        rows,
        headers=["情形", "答对", "答错", "全错的组", "token 均值"],
        tablefmt="github",
        floatfmt=".2f",
    )
)

# %%
#| label: equal-rewards
#| caption: 全批奖励相同与对错各半两种批，在不同 KL 系数下优势的标准差，以及 KL 占归一化前方差的份额
generator = torch.Generator().manual_seed(0)
mask = mask_of([6, 9, 7, 12, 5, 8, 10, 6])
ref = torch.full(mask.shape, -2.0)
log_probs = ref + 0.1 * torch.randn(mask.shape, generator=generator)
rows, kept, spread, shares = [], {}, {}, {}
for name, kl_coef in [("全对", 0.0), ("全对", 0.1), ("全对", 0.01), ("全对", 1e-5), ("各半", 0.01)]:
    rewards = torch.ones(8) if name == "全对" else torch.tensor([1.0, 0.0] * 4)
    key, args = (name, kl_coef), (log_probs, ref, mask)
    kept[key] = reinforce_plus_plus_advantages(rewards, *args, kl_coef=kl_coef)[mask]
    spread[key] = kept[key].std().item()
    total, kl_part = (
        returns_to_go(kl_shaped_rewards(r, *args, kl_coef=kl_coef), mask)[mask].var()
        for r in (rewards, torch.zeros(8))
    )
    shares[key] = (kl_part / total).item() if kl_coef else None
    share = "—" if shares[key] is None else f"{shares[key]:.3%}"
    rows.append([name, f"{kl_coef:g}", spread[key], share])

assert (kept["全对", 0.0] == 0).all()
# 系数差十倍，归一化之后几乎一样
assert spread["全对", 0.01] > 0.998 and (kept["全对", 0.1] - kept["全对", 0.01]).abs().max() < 0.01
assert abs(shares["全对", 0.01] - 1) < 1e-9 and f"{shares['各半', 0.01]:.3%}" == "0.002%"
assert f"{spread['全对', 1e-5]:.3f}" == "0.021"  # 方差小于 eps=1e-8，被 eps 压住
for seed in range(1, 5):
    noise = 0.1 * torch.randn(mask.shape, generator=torch.Generator().manual_seed(seed))
    advantages = reinforce_plus_plus_advantages(torch.ones(8), ref + noise, ref, mask, kl_coef=0.01)[mask]
    assert 0.99 < advantages.std() <= 1

Markdown(
    tabulate(
        rows,
        headers=["奖励", r"$\beta$", "优势的标准差", "KL 的方差份额"],
        tablefmt="github",
        floatfmt=".3f",
        disable_numparse=[0, 1, 3],
    )
)

# %%
#| label: wrong-versions
#| caption: 同一批数据上七种误写与正确优势的最大偏差
generator = torch.Generator().manual_seed(1)
mask = mask_of([3, 6, 4, 5])
rewards = torch.tensor([1.0, 0.0, 1.0, 1.0])  # 前两条是一题，后两条是另一题
ref = torch.full(mask.shape, -2.0)
log_probs = ref + 0.5 * torch.randn(mask.shape, generator=generator)
right = reinforce_plus_plus_advantages(rewards, log_probs, ref, mask, kl_coef=0.05)
token_rewards = kl_shaped_rewards(rewards, log_probs, ref, mask, kl_coef=0.05)
returns = returns_to_go(token_rewards, mask)
penalty = (0.05 * kl_k1(log_probs, ref)).masked_fill(~mask, 0.0)
everywhere = torch.ones_like(mask)
wrong = {
    "每题各自归一化": torch.cat([whiten(returns[:2], mask[:2]), whiten(returns[2:], mask[2:])]),
    "每条各自归一化": torch.cat([whiten(returns[i : i + 1], mask[i : i + 1]) for i in range(4)]),
    "得分放在每个 token": whiten(
        returns_to_go((rewards[:, None] - penalty).masked_fill(~mask, 0.0), mask), mask
    ),
    "KL 的符号反了": whiten(returns_to_go(token_rewards + 2 * penalty, mask), mask),
    "填充计入统计量": whiten(returns, everywhere).masked_fill(~mask, 0.0),
    "从前往后累加": whiten(token_rewards.cumsum(1).masked_fill(~mask, 0.0), mask),
    "只减均值不除标准差": (returns - returns[mask].mean()).masked_fill(~mask, 0.0),
}
gaps = {name: (value - right).abs().max().item() for name, value in wrong.items()}
assert min(gaps.values()) > 0.1 and f"{gaps['每题各自归一化']:.2f}" == "2.07"

Markdown(tabulate(list(gaps.items()), headers=["误写", "最大偏差"], tablefmt="github", floatfmt=".2f"))
