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
# # 后训练总览（Post-Training）：实验
#
# 页面 `docs/rl/post-training.md` 的实验：同一个六臂老虎机、同一个已知奖励，六种后训练方法各自停在哪里。期望与组都是枚举求和，没有采样误差。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.dpo import dpo_loss, kl_regularized_optimum
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.kl_estimators import (
    kl_categorical,
    kl_k1,
    kl_k3,
    kl_k3_importance_weighted,
    kl_reward_surrogate,
)
from snippets.rl.post_training import best_of_n_policy, distillation_loss
from snippets.rl.rloo import leave_one_out_advantages

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
BETA, GROUP_SIZE = 0.5, 8
ref_probs = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.07, 0.03])
rewards = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 1.0])
teacher_probs = torch.tensor([0.15, 0.15, 0.15, 0.20, 0.25, 0.10])
ref = ref_probs.log()


def gibbs(scores, *, beta, start=ref):
    """一个提示的最优策略 π*（对数概率）。"""
    return kl_regularized_optimum(start[None], scores[None], beta=beta)[0][0]


optimum = gibbs(rewards, beta=BETA)


def descend(loss_fn, *, lr, start=ref):
    """精确梯度下降到梯度小于 1e-12；loss_fn 收对数概率，返回损失。"""
    logits = start.clone()
    for _ in range(20000):
        leaf = logits.clone().requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_fn(leaf.log_softmax(-1)), leaf)
        logits = logits - lr * grad
        if grad.abs().max() < 1e-12:
            return logits.log_softmax(-1)
    raise RuntimeError("没有收敛")


def summary(log_probs):
    """到 π* 的 KL、到参考的 KL、期望奖励、目标 J。"""
    to_ref, reward = kl_categorical(log_probs, ref).item(), (log_probs.exp() * rewards).sum().item()
    return kl_categorical(log_probs, optimum).item(), to_ref, reward, reward - BETA * to_ref


# 全部大小为 8 的组（不计次序），以及每组里每个答案出现几次
groups = torch.tensor(list(itertools.combinations_with_replacement(range(6), GROUP_SIZE)))
counts = torch.nn.functional.one_hot(groups, 6).sum(1).to(ref)  # (组数, 6)
log_orders = torch.lgamma(torch.tensor(GROUP_SIZE + 1.0)) - torch.lgamma(counts + 1).sum(1)
all_rewards = rewards[groups].flatten()
advantages = {
    "留一": leave_one_out_advantages(all_rewards, group_size=GROUP_SIZE),
    "减均值": group_advantages(all_rewards, group_size=GROUP_SIZE, scale_by_std=False),
    "减均值除标准差": group_advantages(all_rewards, group_size=GROUP_SIZE),
}
# 组里每个答案分到的平均优势之和，(组数, 6)
per_answer = {
    name: torch.zeros_like(counts).scatter_add_(1, groups, a.view(-1, GROUP_SIZE)) / GROUP_SIZE
    for name, a in advantages.items()
}
penalties = {
    "k1 进奖励": lambda lp: kl_reward_surrogate(kl_k1(lp, ref), lp),
    "ρ·k3": lambda lp: kl_k3_importance_weighted(lp, lp, ref),
    "k3": lambda lp: kl_k3(lp, ref),
}


def policy_gradient_loss(advantage, penalty):
    """对全部的组求期望的策略梯度损失；采样概率当常数，ρ=1。"""

    def loss(log_probs):
        group_probs = (log_orders + counts @ log_probs.detach()).exp()
        weights = group_probs @ per_answer[advantage]  # 每个答案的期望优势 × 概率
        surrogate = clipped_surrogate_loss(log_probs[:, None], log_probs.detach()[:, None], weights[:, None])
        return surrogate.sum() + BETA * (log_probs.exp().detach() * penalties[penalty](log_probs)).sum()

    return loss


# 上面的枚举与参考实现一致：一个具体的组，梯度与 grpo_loss 相等
leaf = ref.clone().requires_grad_(True)
one_group, chosen = 700, leaf.log_softmax(-1)[groups[700]][:, None]
group_loss = grpo_loss(
    chosen,
    chosen.detach(),
    ref[groups[one_group]][:, None],
    advantages["减均值除标准差"].view(-1, GROUP_SIZE)[one_group],
    torch.ones(GROUP_SIZE, 1, dtype=torch.bool),
    beta=BETA,
)
(from_group,) = torch.autograd.grad(group_loss, leaf)
log_probs = leaf.log_softmax(-1)
by_answer = (
    -(per_answer["减均值除标准差"][one_group] * log_probs).sum()
    + BETA * (counts[one_group] / GROUP_SIZE * kl_k3(log_probs, ref)).sum()
)
assert (torch.autograd.grad(by_answer, leaf)[0] - from_group).abs().max() < 1e-12

# %%
#| label: six-methods
#| caption: 六臂老虎机上各方法用精确期望梯度训练到收敛：DPO 与 KL 进奖励的策略梯度到达最优策略，其余停在别处
#| echo: fold
first, second = torch.where(~torch.eye(6, dtype=torch.bool))
preference = torch.sigmoid(rewards[first] - rewards[second])  # 精确的 Bradley–Terry 标签


def cross_entropy_to(target):
    return lambda lp: -(target * lp).sum()


def population_dpo(lp):
    return (preference * dpo_loss(lp[first], lp[second], ref[first], ref[second], beta=BETA)).mean()


def distill(lp):
    return distillation_loss(lp[None, None], teacher_probs.log()[None, None], torch.ones(1, 1).bool())


uniform = torch.zeros(6)  # SFT 从均匀分布出发，免得一步都不用走
finals = {
    "SFT（参考的样本）": descend(cross_entropy_to(ref_probs), lr=2.0, start=uniform),
    "best-of-4 再 SFT": descend(cross_entropy_to(best_of_n_policy(ref_probs, rewards, n=4)), lr=2.0),
    "DPO": descend(population_dpo, lr=50.0),
    "KL 进奖励的策略梯度": descend(policy_gradient_loss("留一", "k1 进奖励"), lr=1.0),
    "GRPO（k3 损失）": descend(policy_gradient_loss("减均值除标准差", "k3"), lr=0.5),
    "同策略蒸馏": descend(distill, lr=2.0),
}
stored = {name: summary(lp) for name, lp in finals.items()}
rows = [[name, *(value + 0.0 for value in values)] for name, values in stored.items()]

log_partition = (ref + rewards / BETA).logsumexp(-1).item()
for name, (to_optimum, _, _, objective) in stored.items():  # J = β log Z − β KL(π‖π*)
    assert abs(objective - BETA * (log_partition - to_optimum)) < 1e-9, name
for name in ("DPO", "KL 进奖励的策略梯度"):
    assert (finals[name] - optimum).abs().max() < 1e-9, name
assert (finals["SFT（参考的样本）"] - ref).abs().max() < 1e-9
assert (finals["同策略蒸馏"].exp() - teacher_probs).abs().max() < 1e-9
# 单步时，蒸馏的梯度就是把 log π_T − log π_θ 当奖励的策略梯度
leaf = ref.clone().requires_grad_(True)
lp = leaf.log_softmax(-1)
as_reward = -(lp.exp().detach() * (teacher_probs.log() - lp).detach() * lp).sum()
(from_reward,) = torch.autograd.grad(as_reward, leaf)
(from_kl,) = torch.autograd.grad(distill(leaf.log_softmax(-1)), leaf)
assert (from_reward - from_kl).abs().max() < 1e-12
text = {name: [f"{value + 0.0:.3f}" for value in values] for name, values in stored.items()}
assert text["SFT（参考的样本）"] == ["0.121", "0.000", "0.150", "0.150"]
assert text["best-of-4 再 SFT"] == ["0.294", "0.602", "0.365", "0.064"]
assert [abs(float(v)) for v in text["DPO"]] == [0.0, 0.166, 0.293, 0.210]
assert text["GRPO（k3 损失）"] == ["0.903", "2.039", "0.778", "-0.241"]
assert text["同策略蒸馏"] == ["0.114", "0.354", "0.330", "0.153"]
for row in rows:
    row[1] = max(row[1], 0.0)  # 舍入误差给出的 -0.000
Markdown(
    tabulate(
        rows,
        headers=["方法", r"到 $\pi^*$ 的 KL", "到参考的 KL", "期望奖励", "目标 $J$"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
#| label: reward-kl-plane
#| caption: 横轴是离参考的 KL，纵轴是期望奖励：实线是各个权重下的最优策略，没有方法能越过它；DPO 与 KL 进奖励在线上同一点，GRPO 与 best-of-n 在线下
#| echo: fold
tilts = torch.logspace(-2, 2.2, 120)[:, None]  # 1/β
frontier, _ = kl_regularized_optimum(ref.expand(120, 6), rewards * tilts, beta=1.0)
frontier_kl = kl_categorical(frontier, ref.expand(120, 6))
frontier_reward = (frontier.exp() * rewards).sum(-1)


def best_reward_at(kl):
    """同样的 KL 下，最优策略能拿到的奖励（对 1/β 二分）。"""
    low, high = 0.0, 200.0
    for _ in range(80):
        middle = (low + high) / 2
        tilted = gibbs(rewards * middle, beta=1.0)
        low, high = (middle, high) if kl_categorical(tilted, ref) < kl else (low, middle)
    return (gibbs(rewards * low, beta=1.0).exp() * rewards).sum().item()


bon = [summary(best_of_n_policy(ref_probs, rewards, n=n).log()) for n in (1, 2, 4, 8, 16, 32)]
fig, ax = plt.subplots(figsize=(6.0, 3.8))
shown = frontier_kl < 2.8
ax.plot(frontier_kl[shown], frontier_reward[shown], "-", color="C0", label="最优策略（扫 β）")
ax.plot(
    [b[1] for b in bon], [b[2] for b in bon], "--o", color="C1", markersize=4, label="best-of-n，n=1 到 32"
)
for name, label, marker, color, offset in [
    ("SFT（参考的样本）", "SFT＝参考", "s", "C2", (10, -14)),
    ("DPO", "DPO、KL 进奖励", "*", "C3", (-16, 72)),
    ("同策略蒸馏", "蒸馏＝老师", "D", "C4", (44, -22)),
    ("GRPO（k3 损失）", "GRPO（k3 损失）", "^", "C5", (-8, -30)),
]:
    _, x, y, _ = stored[name]
    ax.plot([x], [y], marker, color=color, markersize=10)
    arrow = {"arrowstyle": "-", "color": color} if name != "SFT（参考的样本）" else None
    ax.annotate(
        label, (x, y), xytext=offset, textcoords="offset points", color=color, fontsize=10.5, arrowprops=arrow
    )
ax.set_xlim(-0.08, 2.8)
ax.set_ylim(0.05, 1.0)
ax.set_xlabel("到参考策略的 KL（nat）")
ax.set_ylabel("期望奖励")
ax.legend(loc="lower right", frameon=False)

for name, (_, to_ref, reward, _) in stored.items():  # 没有谁在线上方
    assert reward <= best_reward_at(to_ref) + 1e-9, name
assert abs(best_reward_at(stored["DPO"][1]) - stored["DPO"][2]) < 1e-9
assert f"{best_reward_at(stored['best-of-4 再 SFT'][1]):.3f}" == "0.458"
assert f"{best_reward_at(stored['GRPO（k3 损失）'][1]):.3f}" == "0.794"

# %%
#| label: best-of-n-kl
#| caption: best-of-n 到参考的 KL：通用公式只是上界，六个答案时略低，两档奖励时封顶在 0.693，一千个等概率答案时几乎相等
#| echo: fold
coin = torch.tensor([0.5, 0.3, 0.2])  # 第一个答案错，后两个对，通过率 0.5
coin_rewards = torch.tensor([0.0, 1.0, 1.0])
many, many_rewards = torch.full((1000,), 1e-3), torch.arange(1000.0)
rows, table = [], {}
for n in (2, 4, 16, 64):
    bound = math.log(n) - (n - 1) / n
    exact = []
    for probs, scores in ((ref_probs, rewards), (coin, coin_rewards), (many, many_rewards)):
        best = best_of_n_policy(probs, scores, n=n)
        keep = best > 0
        exact.append((best[keep] * (best[keep] / probs[keep]).log()).sum().item())
        assert exact[-1] <= bound
    rows.append([n, bound, *exact])
    table[n] = [f"{value:.3f}" for value in (bound, *exact)]
assert table[4] == ["0.636", "0.602", "0.459", "0.636"]
assert table[64] == ["3.175", "2.969", "0.693", "3.174"]

# 0/1 奖励：best-of-n 恰是某个 β 的 π*，落在最优线上；档内比例不动，KL 不超过 -log p
for n in (2, 4, 16):
    best = best_of_n_policy(coin, coin_rewards, n=n)
    beta = 1 / math.log(best[1:].sum() / best[0])  # p=0.5：p e^(1/β)/(1-p) 就是对错之比
    assert (gibbs(coin_rewards, beta=beta, start=coin.log()).exp() - best).abs().max() < 1e-12
    assert abs(best[1] / best[2] - 1.5) < 1e-12
# 反复做：每轮从上一轮的策略抽 4 个留 1 个，3 轮恰是 best-of-64；没有任何东西把它拉回参考
repeated = ref_probs
for _ in range(3):
    repeated = best_of_n_policy(repeated, rewards, n=4)
assert (repeated - best_of_n_policy(ref_probs, rewards, n=64)).abs().max() < 1e-12
assert f"{repeated[5]:.2f}" == "0.86"
# 只看次序：奖励换成立方，best-of-n 不变，π* 变
cubed = best_of_n_policy(ref_probs, rewards**3, n=4)
assert torch.equal(cubed, best_of_n_policy(ref_probs, rewards, n=4))
assert kl_categorical(gibbs(rewards**3, beta=BETA), optimum).item() > 0.01
Markdown(
    tabulate(
        rows, headers=["n", "通用公式", "六臂", "0/1 奖励", "一千个答案"], tablefmt="github", floatfmt=".3f"
    )
)

# %%
#| label: why-grpo-differs
#| caption: 同一个老虎机，优势与 KL 的写法各换一处：只有留一基线加反向 KL 停在最优策略；等效权重是与终点最近的那个最优策略的权重
#| echo: fold
scan = torch.linspace(0.02, 1.5, 14801)  # β 的网格，间隔 1e-4
family, _ = kl_regularized_optimum(ref.expand(len(scan), 6), rewards / scan[:, None], beta=1.0)


def nearest(log_probs):
    """最近的 π*_β：返回 β 与剩下的 KL。"""
    gap = (log_probs.exp() * (log_probs - family)).sum(-1)
    index = gap.argmin()
    return scan[index].item(), gap[index].item()


rows, table = [], {}
for advantage in ("留一", "减均值", "减均值除标准差"):
    for penalty in ("ρ·k3", "k3"):
        final = descend(policy_gradient_loss(advantage, penalty), lr=0.5)
        beta, left = nearest(final)
        values = (kl_categorical(final, optimum).item(), beta, left)
        rows.append([advantage, {"ρ·k3": "反向", "k3": "前向（k3 损失）"}[penalty], *values])
        table[advantage, penalty] = [f"{abs(value):.3f}" for value in values]
        if (advantage, penalty) == ("减均值", "ρ·k3"):  # 恰好是 β·G/(G-1)
            exact = gibbs(rewards, beta=BETA * GROUP_SIZE / (GROUP_SIZE - 1))
            assert (final - exact).abs().max() < 1e-9
        if (advantage, penalty) == ("留一", "ρ·k3"):
            assert (final - optimum).abs().max() < 1e-9
assert table["减均值", "ρ·k3"] == ["0.003", "0.571", "0.000"]
assert table["留一", "k3"] == ["0.268", "0.271", "0.051"]
assert table["减均值除标准差", "ρ·k3"] == ["0.398", "0.236", "0.002"]
assert table["减均值除标准差", "k3"] == ["0.903", "0.188", "0.083"]
# 奖励乘 10：除以标准差的优势不变，π* 却比 GRPO 的终点离参考更远
scaled = group_advantages(10 * all_rewards, group_size=GROUP_SIZE)
assert (scaled - advantages["减均值除标准差"]).abs().max() < 1e-4  # 分母里的 1e-6
assert kl_categorical(gibbs(10 * rewards, beta=BETA), ref) > 3 > stored["GRPO（k3 损失）"][1]
for row in rows:
    row[2] = max(row[2], 0.0)
    row[4] = max(row[4], 0.0)
Markdown(
    tabulate(
        rows,
        headers=["优势", "KL 的梯度", r"到 $\pi^*$ 的 KL", r"等效 $\beta$", "剩余 KL"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
#| label: wrong-optimum
#| caption: 三种写法当作最优策略代回同一个目标，只有除以权重的指数倾斜取到最大值
#| echo: fold
multiplied = (ref + BETA * rewards).log_softmax(-1)  # 误写成 e^{βr}
low, high = rewards.max().item() + 1e-9, 10.0  # 前向 KL 的解 π = β·π_ref/(λ-r)，二分求 λ
for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if (BETA * ref_probs / (middle - rewards)).sum() > 1 else (low, middle)
swapped = (BETA * ref_probs / (low - rewards)).log()
candidates = {
    r"$\pi_{\text{ref}}\,e^{r/\beta}/Z$": optimum,
    r"$\pi_{\text{ref}}\,e^{\beta r}/Z$": multiplied,
    r"$\beta\,\pi_{\text{ref}}/(\lambda-r)$": swapped,
}
rows = [[name, *summary(lp)] for name, lp in candidates.items()]
assert [f"{row[4]:.3f}" for row in rows] == ["0.210", "0.171", "0.077"]
assert abs(rows[0][4] - BETA * log_partition) < 1e-12
# 把 KL 的方向写反，等于换了目标：那个目标里它才是最大的
forward = [((lp.exp() * rewards).sum() - BETA * kl_categorical(ref, lp)).item() for lp in candidates.values()]
assert max(forward) == forward[2] and forward[2] - forward[0] > 0.03
Markdown(
    tabulate(
        rows,
        headers=["当作最优的策略", r"到 $\pi^*$ 的 KL", "到参考的 KL", "期望奖励", "目标 $J$"],
        tablefmt="github",
        floatfmt=".3f",
    )
)
