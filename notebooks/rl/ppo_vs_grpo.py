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
# # PPO 与 GRPO 的区别：实验
#
# 页面 docs/rl/ppo-vs-grpo.md 的实验：一个 KL 尖峰落到哪些 token、同一批回答的两种优势、价值模型的误差与梯度噪声、KL 的实际权重、对长度的推力。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards, ppo_loss, whiten
from snippets.rl.ppo_vs_grpo import loss_kl_credit, reward_kl_credit

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def markdown_table(rows, headers):
    return Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


def ppo_weights(log_probs, old_log_probs, advantages, mask):
    """真的 ppo_loss 反传，每个 token 的对数概率在目标梯度里的系数（乘回 token 数）。"""
    leaf = log_probs.clone().requires_grad_()
    zeros = torch.zeros_like(leaf)
    loss = ppo_loss(leaf, old_log_probs, advantages, zeros, zeros, zeros, zeros, mask)
    return -torch.autograd.grad(loss, leaf)[0] * mask.sum()


def grpo_weights(log_probs, old_log_probs, ref_log_probs, advantages, mask, *, beta):
    """真的 grpo_loss 反传，乘回条数与各自的长度。"""
    leaf = log_probs.clone().requires_grad_()
    loss = grpo_loss(leaf, old_log_probs, ref_log_probs, advantages, mask, beta=beta)
    return -torch.autograd.grad(loss, leaf)[0] * len(mask) * mask.sum(1, keepdim=True)


# %%
#| label: kl-spike
#| caption: 第 12 个 token 上多出 2 nat 的 KL：PPO 在 λ 为 1 时第 1 到 12 个 token 的权重都降 2β，λ 为 0.8 时往前衰减，GRPO 只降第 12 个
ROWS, T, SPIKE, NATS, BETA = 8, 20, 11, 2.0, 0.04
generator = torch.Generator().manual_seed(0)
mask = torch.ones(ROWS, T, dtype=torch.bool)
old = -1 - torch.rand(ROWS, T, generator=generator)
scores = torch.tensor([1.0, 0, 0, 1, 1, 0, 0, 0])
values = 0.4 + 0.1 * torch.randn(ROWS, T, generator=generator)
ref = old.clone()
spiked = ref.clone()
spiked[0, SPIKE] -= NATS  # 参考策略给这个 token 的概率低 2 nat


def ppo_total(ref_log_probs, lam, *, new=old, whitened=False):
    rewards = kl_shaped_rewards(scores, old, ref_log_probs, mask, kl_coef=BETA)
    advantages, _ = generalized_advantage(rewards, values, mask, gamma=1.0, lam=lam)
    return ppo_weights(new, old, whiten(advantages, mask) if whitened else advantages, mask)


def grpo_total(ref_log_probs, *, new=old):
    return grpo_weights(new, old, ref_log_probs, group_advantages(scores, group_size=8), mask, beta=BETA)


changes = {
    "PPO，λ=1": ppo_total(spiked, 1.0) - ppo_total(ref, 1.0),
    "PPO，λ=0.8": ppo_total(spiked, 0.8) - ppo_total(ref, 0.8),
    "GRPO": grpo_total(spiked) - grpo_total(ref),
}
fig, ax = plt.subplots(figsize=(6.0, 3.4))
positions = torch.arange(1, T + 1)
for (name, change), style, color in zip(
    changes.items(), ("-o", "--s", ":^"), ("C0", "C2", "C3"), strict=True
):
    ax.plot(positions, change[0] / BETA, style, color=color, markersize=5, label=name)
ax.axvline(SPIKE + 1, linestyle="-.", color="C5", linewidth=1)
ax.text(SPIKE + 2.3, -1.15, "KL 多出 2 nat\n的 token", color="C5", fontsize=10.5)
ax.set_xticks([1, 4, 8, 12, 16, 20])
ax.set_xlabel("回答里的第几个 token")
ax.set_ylabel("这个 token 的权重变化（单位 β）")
ax.set_ylim(-2.25, 0.25)
ax.legend(loc="lower right")

before, after = torch.arange(T) <= SPIKE, torch.arange(T) > SPIKE
full, decayed, own = (change[0] / BETA for change in changes.values())
assert torch.allclose(full[before], torch.full((SPIKE + 1,), -NATS)) and (full[after].abs() < 1e-12).all()
assert torch.allclose(decayed[before], -NATS * 0.8 ** (SPIKE - torch.arange(SPIKE + 1.0)))
assert (decayed[after].abs() < 1e-12).all() and f"{decayed[0]:.2f}" == "-0.17"
assert own.abs().gt(1e-12).nonzero().flatten().tolist() == [SPIKE] and f"{own[SPIKE]:.3f}" == "-0.865"
assert all((change[1:].abs() < 1e-12).all() for change in changes.values())  # 白化之前，别的回答不动
for name, credit in [
    ("PPO，λ=1", reward_kl_credit(old, spiked, mask, kl_coef=BETA, lam=1.0)),
    ("PPO，λ=0.8", reward_kl_credit(old, spiked, mask, kl_coef=BETA, lam=0.8)),
    ("GRPO", loss_kl_credit(old, spiked, mask, beta=BETA)),
]:
    assert torch.allclose(credit, changes[name])  # 闭式与反传一致
whitened = ppo_total(spiked, 1.0, whitened=True) - ppo_total(ref, 1.0, whitened=True)
assert (whitened.abs() > 1e-6).all()  # 白化之后，全批 160 个 token 都动
# 反方向：参考策略给它的概率高 2 nat
mirrored = ref.clone()
mirrored[0, SPIKE] += NATS
assert torch.allclose((ppo_total(mirrored, 1.0) - ppo_total(ref, 1.0))[0][before] / BETA, torch.tensor(NATS))
assert f"{(grpo_total(mirrored) - grpo_total(ref))[0, SPIKE] / BETA:.2f}" == "6.39"
# 同一批的下一步更新：PPO 的 KL 还是采样时的 2 nat（只多乘 ρ），GRPO 用新的策略重算
moved = old + 0.1
gap = (ppo_total(spiked, 1.0, new=moved) - ppo_total(ref, 1.0, new=moved))[0, SPIKE]
assert torch.allclose(gap, torch.tensor(-NATS * BETA * math.exp(0.1)))
gap = (grpo_total(spiked, new=moved) - grpo_total(ref, new=moved))[0, SPIKE]
assert torch.allclose(gap, BETA * torch.tensor(math.exp(-2.1) - math.exp(-0.1)))

# %%
#| label: token-advantages
#| caption: 同一条答对的回答，四个 token 里只有第二个决定对错：GRPO 四个一样；PPO 的优势集中在哪里取决于价值准不准与 λ
right = torch.tensor([[0.0, 0.0, 0.0, 1.0]])  # 逐 token 奖励，不含 KL
all_tokens = torch.ones(1, 4, dtype=torch.bool)
critics = {  # 选出每个 token 之前的价值；第二个 token 之前对的概率是一半，之后已经定了
    "准": torch.tensor([[0.5, 0.5, 1.0, 1.0]]),
    "只认提示": torch.tensor([[0.5, 0.5, 0.5, 0.5]]),
    "有误差": torch.tensor([[0.6, 0.3, 1.15, 0.9]]),
}


def gae(name, lam):
    return generalized_advantage(right, critics[name], all_tokens, gamma=1.0, lam=lam)[0][0]


group = group_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), group_size=4)
advantages = {
    "GRPO，四条对两条": group[:1].expand(4),
    "PPO，价值只认提示，λ=1": gae("只认提示", 1.0),
    "PPO，价值准，λ=1": gae("准", 1.0),
    "PPO，价值准，λ=0": gae("准", 0.0),
    "PPO，价值有误差，λ=1": gae("有误差", 1.0),
    "PPO，价值有误差，λ=0": gae("有误差", 0.0),
}
rows = [[name, *(f"{x + 0.0:.2f}" for x in row.tolist())] for name, row in advantages.items()]
assert [row[1:] for row in rows] == [
    ["0.87", "0.87", "0.87", "0.87"],
    ["0.50", "0.50", "0.50", "0.50"],
    ["0.50", "0.50", "0.00", "0.00"],
    ["0.00", "0.50", "0.00", "0.00"],
    ["0.40", "0.70", "-0.15", "0.10"],
    ["-0.30", "0.85", "-0.25", "0.10"],
]
markdown_table(rows, ["写法", "1", "**2**", "3", "4"])

# %%
#| label: critic-error
#| caption: 价值误差从 0 增大：PPO 的梯度误差从低于组均值升到高于它，λ 为 1 时交点在 0.35；λ 为 0 时起点最低、升得最快
LENGTH, BATCH = 8, 64  # 每条 8 个二元 token，256 条回答全部枚举；一批 64 条
tokens = torch.tensor(list(itertools.product((0, 1), repeat=LENGTH)))
powers = 2 ** torch.arange(LENGTH)
prefix = torch.stack(
    [powers[t] - 1 + (tokens[:, :t] * powers[:t].flip(0)).sum(1) for t in range(LENGTH)], 1
)  # (256, 8)，每个前缀一个参数
logits = 0.5 * torch.randn(2**LENGTH - 1, generator=torch.Generator().manual_seed(0))
prob_one = logits.sigmoid()[prefix]
dlog = tokens - prob_one
probs = torch.where(tokens == 1, prob_one, 1 - prob_one).prod(1)
everywhere = torch.ones_like(tokens, dtype=torch.bool)
per_answer = torch.zeros(len(tokens), len(logits)).scatter_(1, prefix, dlog)  # 每条回答的得分函数
assert abs(probs.sum() - 1) < 1e-12 and (probs @ per_answer).abs().max() < 1e-12


class Task:
    """一个 0/1 得分的任务：真梯度、精确的价值、两类估计量的误差。"""

    def __init__(self, score):
        self.score, self.mean = score, probs @ score
        self.truth = (probs * score) @ per_answer
        self.token_rewards = torch.nn.functional.pad(score[:, None], (LENGTH - 1, 0))
        weight = probs[:, None].expand_as(prefix)
        sums = torch.zeros(2, len(logits))
        sums[0].index_add_(0, prefix.flatten(), (weight * score[:, None]).flatten())
        sums[1].index_add_(0, prefix.flatten(), weight.flatten())
        self.values = sums[0] / sums[1]

    def relative(self, mean, variance, count):
        """(偏差, 噪声, 总误差)，都除以真梯度的长度。"""
        bias = (mean - self.truth).norm() / self.truth.norm()
        noise = (variance / count).sqrt() / self.truth.norm()
        return torch.stack([bias, noise, (bias**2 + noise**2).sqrt()])

    def ppo(self, values, lam):
        advantages, _ = generalized_advantage(
            self.token_rewards, values[prefix], everywhere, gamma=1.0, lam=lam
        )
        gradients = torch.zeros(len(tokens), len(logits)).scatter_(1, prefix, advantages * dlog)
        mean = probs @ gradients
        return self.relative(mean, probs @ gradients.square().sum(1) - mean @ mean, BATCH)

    def group(self, size, *, scale_by_std=False):
        """一组的梯度均值与方差：给定各条的得分，得分函数互相独立，只需按答对几条求和。"""
        rate = torch.stack([1 - self.mean, self.mean])
        first = torch.stack([(probs * (self.score == r)) @ per_answer for r in (0, 1)]) / rate[:, None]
        square = per_answer.square().sum(1)
        second = torch.stack([(probs * (self.score == r)) @ square for r in (0, 1)]) / rate
        mean, power = torch.zeros(len(logits)), torch.zeros(())
        for right in range(size + 1):
            weight = float(math.comb(size, right)) * rate[1] ** right * rate[0] ** (size - right)
            rewards = torch.tensor([1.0] * right + [0.0] * (size - right))
            hat = group_advantages(rewards, group_size=size, scale_by_std=scale_by_std)
            label = rewards.long()
            means = hat[:, None] * first[label]  # (G, 参数)
            here = means.sum(0)
            diagonal = (hat**2 * second[label]).sum() - means.square().sum()
            mean, power = mean + weight * here / size, power + weight * (here @ here + diagonal) / size**2
        scale = self.truth @ self.truth / (mean @ self.truth)  # 整体的倍数归学习率，先还原
        return self.relative(scale * mean, scale**2 * (power - mean @ mean), BATCH / size)


tasks = {
    "每步都算": Task((tokens.sum(1) >= 5).double()),  # 至少 5 个 1
    "一步定胜负": Task((tokens[:, 2] == 1).double()),  # 只看第三个 token
    "很难": Task((tokens[:, :3].sum(1) == 3).double()),  # 前三个都是 1
}
task = tasks["每步都算"]


def growth(task, lam):
    """价值误差在各前缀独立、标准差 σ 时，E[总误差²] = 无误差时的总误差² + σ²·Q：返回 Q 与其中偏差的份额。

    总误差² 是误差的二次函数，所以 Q 是二次项的迹，沿每个坐标取正负各一次就精确。
    """
    base = task.ppo(task.values, lam).square()
    total = torch.zeros(3)
    for j in range(len(logits)):
        unit = torch.zeros(len(logits))
        unit[j] = 1.0
        total += (
            task.ppo(task.values + unit, lam).square() + task.ppo(task.values - unit, lam).square()
        ) / 2 - base
    return total[2], total[0]


LAMBDAS = (1.0, 0.95, 0.0)
exact = {lam: task.ppo(task.values, lam) for lam in LAMBDAS}
slopes = {lam: growth(task, lam) for lam in LAMBDAS}
sizes = torch.linspace(0, 0.5, 26)
curves = {lam: (exact[lam][2] ** 2 + sizes**2 * slopes[lam][0]).sqrt() for lam in LAMBDAS}
grouped = {size: task.group(size) for size in (4, 16)}

fig, ax = plt.subplots(figsize=(6.0, 3.6))
for lam, style, color in [(1.0, "-", "C0"), (0.95, "--", "C2"), (0.0, "-.", "C1")]:
    ax.plot(sizes, curves[lam], style, color=color, label=f"PPO，λ={lam:g}")
for size in (4, 16):
    ax.axhline(grouped[size][2], linestyle=":", color="C3", linewidth=1.6)
ax.text(0.005, grouped[4][2] + 0.025, "组均值，G=4", color="C3", fontsize=10.5)
ax.text(0.005, grouped[16][2] - 0.085, "组均值，G=16", color="C3", fontsize=10.5)
ax.set_xlabel("价值误差的标准差（得分是 0 或 1）")
ax.set_ylabel("梯度的总误差／真梯度的长度")
ax.set_xlim(0, 0.5)
ax.set_ylim(0.2, 1.6)
ax.legend(loc="lower right")

assert [f"{exact[lam][2]:.2f}" for lam in LAMBDAS] == ["0.74", "0.65", "0.33"]
assert all(result[0] < 1e-12 for result in exact.values())  # 价值准：都无偏
assert f"{grouped[4][2]:.2f} {grouped[16][2]:.2f}" == "1.01 0.91" and grouped[4][0] < 1e-12
assert slopes[1.0][1] < 1e-12  # λ=1：误差只添噪声，没有偏差
closed = (probs @ dlog.square().sum(1)) / BATCH / task.truth.square().sum()
assert abs(slopes[1.0][0] - closed) < 1e-9  # λ=1 时 Q 有闭式：E‖s‖²
# 抽四百份误差核对二次式
draws = [
    task.ppo(task.values + 0.2 * torch.randn(len(logits), generator=generator), 0.0)[2] ** 2
    for _ in range(400)
]
assert abs(torch.stack(draws).mean().sqrt() / curves[0.0][10] - 1) < 0.05
# 价值只认提示（处处等于平均得分）：组变大时，组均值趋于它
prompt_only = task.ppo(task.mean.expand(len(logits)), 1.0)
assert prompt_only[0] < 1e-12 and f"{prompt_only[2]:.2f}" == "0.88"
assert abs(task.group(200)[2] - prompt_only[2]) < 0.003
by_std = task.group(4, scale_by_std=True)
assert by_std[0] < 1e-12 and f"{by_std[2]:.2f}" == "1.01"  # 一道题上，除不除标准差几乎一样


def crossing(task, lam):
    """与 G=4 的组均值误差相等时，价值误差的标准差。"""
    slope = slopes[lam][0] if task is tasks["每步都算"] else growth(task, lam)[0]
    return ((task.group(4)[2] ** 2 - task.ppo(task.values, lam)[2] ** 2) / slope).sqrt().item()


def spread(task):
    """真实价值在走到的前缀之间的标准差，也就是处处猜平均分的误差。"""
    return (probs[:, None] * (task.values[prefix] - task.mean) ** 2 / LENGTH).sum().sqrt().item()


crossings = {name: [crossing(task, lam) for lam in LAMBDAS] for name, task in tasks.items()}
assert [f"{row[0]:.2f}" for row in crossings.values()] == ["0.35", "0.49", "0.20"]
assert [f"{x:.2f}" for x in crossings["每步都算"]] == ["0.35", "0.39", "0.16"]
assert [f"{spread(task):.2f}" for task in tasks.values()] == ["0.24", "0.40", "0.16"]

# 小例子上直接枚举全部的组，核对上面「按答对几条求和」的写法
answers, size = [0, 17, 90, 201, 255, 31], 3
small = torch.nn.functional.normalize(probs[answers], p=1, dim=0)
scored, tangent = task.score[answers], per_answer[answers] - small @ per_answer[answers]
mean, power = 0.0, 0.0
for chosen in itertools.product(range(6), repeat=size):
    pick = list(chosen)
    hat = group_advantages(scored[pick], group_size=size, scale_by_std=False)
    gradient, weight = hat @ tangent[pick] / size, small[pick].prod()
    mean, power = mean + weight * gradient, power + weight * gradient.square().sum()
saved, (probs, per_answer) = (probs, per_answer), (small, tangent)
toy = object.__new__(Task)
toy.score, toy.mean, toy.truth = scored, small @ scored, (small * scored) @ tangent
scale = toy.truth @ toy.truth / (mean @ toy.truth)
brute = scale * ((power - mean @ mean) / (BATCH / size)).sqrt() / toy.truth.norm()
assert abs(toy.group(size)[1] - brute) < 1e-9 and abs(scale - size / (size - 1)) < 1e-9
probs, per_answer = saved

# %%
#| label: effective-beta
#| caption: 两道题各八条，难题对一条、易题对四条：从真实的损失里回归出得分与 KL 各自的系数；末两列是一奈特的 KL 抵多少分，以及所有得分乘十之后
COUNT, STEPS = 8, 20
rates = torch.tensor([1 / 8, 4 / 8])
scores = torch.cat([torch.tensor([1.0] * k + [0.0] * (COUNT - k)) for k in (1, 4)])
generator = torch.Generator().manual_seed(2)
mask = torch.ones(2 * COUNT, STEPS, dtype=torch.bool)
old = -1 - torch.rand(2 * COUNT, STEPS, generator=generator)
ref = old - 0.05 - 0.2 * torch.randn(2 * COUNT, STEPS, generator=generator)
values = rates.repeat_interleave(COUNT)[:, None].expand(-1, STEPS)  # 价值只认提示
to_go = reward_kl_credit(old, ref, mask, kl_coef=1.0, lam=1.0)  # −Σ k1，往后累加
own = loss_kl_credit(old, ref, mask, beta=1.0)  # −(1−r)
HARD, EASY = slice(0, COUNT), slice(COUNT, 2 * COUNT)


def coefficients(weights, score_part, kl_part, rows=slice(None)):
    """weights = a·score_part + b·kl_part + c，最小二乘；残差为 0 才算数。"""
    design = torch.stack([score_part[rows].flatten(), kl_part[rows].flatten()], 1)
    design = torch.cat([design, torch.ones(len(design), 1)], 1)
    target = weights[rows].flatten()[:, None]
    solution = torch.linalg.lstsq(design, target).solution
    assert (design @ solution - target).abs().max() < 1e-9
    return solution[0].item(), solution[1].item()


def ppo_case(*, scale, whitened, beta=BETA):
    rewards = kl_shaped_rewards(scale * scores, old, ref, mask, kl_coef=beta)
    advantages, _ = generalized_advantage(rewards, scale * values, mask, gamma=1.0, lam=1.0)
    advantages = whiten(advantages, mask) if whitened else advantages
    return coefficients(ppo_weights(old, old, advantages, mask), scores[:, None] - values, to_go)


def grpo_case(rows, *, scale):
    hat = group_advantages(scale * scores, group_size=COUNT)
    weights = grpo_weights(old, old, ref, hat, mask, beta=BETA)
    return coefficients(weights, scores[:, None] - values, own, rows)


def grpo_kl_in_reward(rows, *, scale):
    """KL 先从得分里减掉再做组内归一化：整条的 KL，一个数分给全部 token。"""
    total = to_go[:, 0]
    hat = group_advantages(scale * scores + BETA * total, group_size=COUNT)
    weights = grpo_weights(old, old, ref, hat, mask, beta=0.0)
    return coefficients(weights, scores[:, None] - values, total[:, None].expand(-1, STEPS), rows)


cases = {
    "PPO，不白化": lambda scale: ppo_case(scale=scale, whitened=False),
    "PPO，白化": lambda scale: ppo_case(scale=scale, whitened=True),
    "GRPO，难题": lambda scale: grpo_case(HARD, scale=scale),
    "GRPO，易题": lambda scale: grpo_case(EASY, scale=scale),
    "KL 进奖励的 GRPO，难题": lambda scale: grpo_kl_in_reward(HARD, scale=scale),
    "KL 进奖励的 GRPO，易题": lambda scale: grpo_kl_in_reward(EASY, scale=scale),
}
rows, price = [], {}
for name, case in cases.items():
    (score, kl), (score_10, kl_10) = case(1.0), case(10.0)
    price[name] = (kl / score, kl_10 / score_10)
    rows.append([name, f"{score:.2f}", f"{kl:.3f}", f"{kl / score:.4f}", f"{kl_10 / score_10:.4f}"])

for name in ("PPO，不白化", "PPO，白化", "KL 进奖励的 GRPO，难题", "KL 进奖励的 GRPO，易题"):
    assert abs(price[name][0] - BETA) < 1e-9 and abs(price[name][1] - BETA / 10) < 1e-9, name
for name, rows_here in (("GRPO，难题", HARD), ("GRPO，易题", EASY)):
    assert abs(price[name][0] - BETA * (scores[rows_here].std() + 1e-6)) < 1e-9  # β 乘组标准差
    assert abs(price[name][1] - price[name][0]) < 1e-6  # 得分换单位不影响
unscaled, _ = generalized_advantage(
    kl_shaped_rewards(scores, old, ref, mask, kl_coef=BETA), values, mask, gamma=1.0, lam=1.0
)
assert abs(cases["PPO，白化"](1.0)[1] - BETA / unscaled.std()) < 1e-6  # β 除以全批标准差
assert [row[1:] for row in rows[:4]] == [
    ["1.00", "0.040", "0.0400", "0.0040"],
    ["2.33", "0.093", "0.0400", "0.0040"],
    ["2.83", "0.040", "0.0141", "0.0141"],
    ["1.87", "0.040", "0.0214", "0.0214"],
]


# 全对而价值也准的一批：优势里只剩 KL，白化之后与 β 无关
def only_kl(beta):
    rewards = kl_shaped_rewards(torch.ones(2 * COUNT), old, ref, mask, kl_coef=beta)
    advantages, _ = generalized_advantage(rewards, torch.ones_like(values), mask, gamma=1.0, lam=1.0)
    return whiten(advantages, mask, eps=1e-16)


assert torch.allclose(only_kl(0.001), only_kl(0.1)) and abs(only_kl(0.001).std() - 1) < 1e-9
markdown_table(rows, ["写法", "得分的系数", "KL 的系数", "1 nat 抵几分", "得分 ×10 后"])

# %%
#| label: length-push
#| caption: 停的概率与参考策略处处相同、只有内容不同，没有奖励：KL 对停的 logit 的期望推力，正数表示停得更早；枚举全部回答
LIMIT, STOP = 6, 2
texts = [[*bits, STOP] for n in range(LIMIT) for bits in itertools.product((0, 1), repeat=n)]
texts += [list(bits) for bits in itertools.product((0, 1), repeat=LIMIT)]  # 写满
words = torch.tensor([text + [STOP] * (LIMIT - len(text)) for text in texts])  # (127, 6)
text_mask = torch.tensor([[t < len(text) for t in range(LIMIT)] for text in texts])
lengths = text_mask.sum(1)
stop_logits = torch.full((LIMIT,), -1.0)  # 每个位置一个停的 logit
content, ref_content = torch.tensor([0.9, 0.1]).log(), torch.tensor([0.5, 0.5]).log()


def word_log_probs(stop_logits, content):
    stop, go = (torch.nn.functional.logsigmoid(sign * stop_logits)[:, None] for sign in (1, -1))
    table = torch.cat([go + content, stop], 1)  # (6, 3)
    return table[torch.arange(LIMIT), words].masked_fill(~text_mask, 0.0)


policy_logs, ref_logs = word_log_probs(stop_logits, content), word_log_probs(stop_logits, ref_content)
chances = policy_logs.sum(1).exp()
per_token_kl = (content.exp() * (content - ref_content)).sum()
assert abs(chances.sum() - 1) < 1e-12


def stop_push(credit):
    leaf = stop_logits.clone().requires_grad_()
    surrogate = (chances[:, None] * credit * word_log_probs(leaf, content)).sum()
    return torch.autograd.grad(surrogate, leaf)[0]


def length_rate(push):
    """沿这个方向走一小步，期望长度每单位步长的变化。"""
    leaf = stop_logits.clone().requires_grad_()
    expected = (word_log_probs(leaf, content).sum(1).exp() * lengths).sum()
    return (torch.autograd.grad(expected, leaf)[0] @ push).item()


local = loss_kl_credit(policy_logs, ref_logs, text_mask, beta=1.0)
pushes = {
    "k1 进奖励，λ=1（PPO）": stop_push(
        reward_kl_credit(policy_logs, ref_logs, text_mask, kl_coef=1.0, lam=1.0)
    ),
    "k3 损失，按条平均（GRPO）": stop_push(local / lengths[:, None]),
    "k3 损失，token 求和": stop_push(local),
    r"$\rho\,k_3$ 损失，token 求和": stop_push((ref_logs - policy_logs).masked_fill(~text_mask, 0.0)),
}
rows = [
    [
        name,
        *(
            f"{abs(x) if abs(x) < 1e-12 else x:.3f}"
            for x in (push[0].item(), push[4].item(), length_rate(push))
        ),
    ]
    for name, push in pushes.items()
]
leaf = stop_logits.clone().requires_grad_()
log_probs = word_log_probs(leaf, content).sum(1)
(truth,) = torch.autograd.grad(-(log_probs.exp() * (log_probs - ref_logs.sum(1))).sum(), leaf)
first, mean_3, sum_3, weighted = pushes.values()
assert [row[1:] for row in rows] == [
    ["0.228", "0.036", "-0.226"],
    ["0.000", "0.000", "0.000"],
    ["0.000", "0.000", "0.000"],
    ["0.072", "0.021", "-0.076"],
]
assert torch.allclose(first, truth) and (first > 0).all()  # 恰是整条 KL 的梯度
assert mean_3.abs().max() < 1e-12 and sum_3.abs().max() < 1e-12
assert (weighted > 0).all() and (weighted <= first + 1e-12).all() and weighted[0] < 0.5 * first[0]
assert torch.allclose(weighted[-1], first[-1])  # 最后一个位置之后没有 token
content_tokens = chances @ (text_mask & (words != STOP)).sum(1).double()
assert abs((chances * (policy_logs - ref_logs).sum(1)).sum() - per_token_kl * content_tokens) < 1e-12
assert f"{per_token_kl:.3f}" == "0.368" and f"{0.02 * 0.05 * 200:.1f} {0.02 * 0.05 * 8000:.1f}" == "0.2 8.0"
markdown_table(rows, ["写法", "第 1 位", "第 5 位", "期望长度的变化率"])

# %%
# 模型个数与显存：每个 7B，训练的每参数 16 字节（bf16 参数与梯度，float32 主参数与两个动量），冻结的 2 字节（bf16）
TRAINED, FROZEN, SIZE = 2 + 2 + 4 + 4 + 4, 2, 7
memory = {
    "PPO": SIZE * (2 * TRAINED + 2 * FROZEN),  # 策略、价值；参考、奖励模型
    "PPO，规则打分": SIZE * (2 * TRAINED + FROZEN),
    "GRPO，奖励模型": SIZE * (TRAINED + 2 * FROZEN),
    "GRPO，规则打分": SIZE * (TRAINED + FROZEN),
    "GRPO，规则打分，不要 KL": SIZE * TRAINED,
}
assert list(memory.values()) == [252, 238, 140, 126, 112]  # GB
