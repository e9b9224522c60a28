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
# # DPO 的推导与梯度：实验
#
# 页面 docs/rl/dpo.md 用到的计算：可枚举答案时逐步核对推导，用自动微分核对梯度，画出损失只依赖哪个量。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.dpo import dpo_loss, implicit_rewards, kl_regularized_optimum
from snippets.rl.log_probs import log_probs_from_logits, sequence_log_probs

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # 这里要核对等式，用双精度


def minimize(loss_of_logits, logits):
    """用 L-BFGS 把光滑的小问题解到舍入误差，返回最优点的对数概率。"""
    logits = logits.clone().requires_grad_()
    optimizer = torch.optim.LBFGS(
        [logits],
        max_iter=500,
        tolerance_grad=1e-13,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        loss = loss_of_logits(logits.log_softmax(-1))
        loss.backward()
        return loss

    optimizer.step(closure)
    return logits.detach().log_softmax(-1)


# %% [markdown]
# 3 个提示，每个 5 个答案，全部可以枚举；三行奖励高低不同，使各提示的 Z 相差很大。

# %%
#| label: partition-cancels
#| caption: 三个提示的配分函数项相差很大，隐式奖励之差却与真实奖励之差一致，DPO 也收敛到闭式最优策略；去掉参考策略则收敛到别处
#| echo: fold
P, V, beta = 3, 5, 0.5
ref = torch.tensor([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.2, 0.25, 0.4], [0.2] * 5]).log()
rewards = torch.tensor(
    [[1.0, 0.5, 0.0, -0.5, 1.5], [3.0, 2.5, 2.0, 1.0, 2.5], [-4.0, -3.0, -2.5, -3.5, -3.0]]
)
best, log_z = kl_regularized_optimum(ref, rewards, beta=beta)

# 逐点：真实奖励减隐式奖励，同一提示的 5 个答案都等于 beta * log Z，没有一个是 0
implicit = beta * (best - ref)
pointwise = rewards - implicit
torch.testing.assert_close(pointwise, (beta * log_z).unsqueeze(-1).expand(P, V))
assert (beta * log_z).abs().min() > 0.1

# 成对：差与真实奖励差一致
first, second = [i.flatten() for i in torch.meshgrid(torch.arange(V), torch.arange(V), indexing="ij")]
first, second = first[first != second], second[first != second]  # 20 个有序对
true_gap = rewards[:, first] - rewards[:, second]
pair_error = ((implicit[:, first] - implicit[:, second]) - true_gap).abs().amax(1)
assert pair_error.max() < 1e-12
# 跨提示不能比：A 与 C 的偏移差 3.78，比任何一个提示内部的奖励差都大
assert f"{(beta * (log_z[0] - log_z[2])).item():.2f}" == "3.78" and true_gap.max() < 3


# 总体 DPO 损失：每个有序对按 Bradley–Terry 概率加权，相当于标签无穷多
def population_loss(log_probs, ref):
    pairs = [x[:, i].flatten() for x in (log_probs, ref) for i in (first, second)]
    return (torch.sigmoid(true_gap).flatten() * dpo_loss(*pairs, beta=beta)).mean()


trained = minimize(lambda log_probs: population_loss(log_probs, ref), ref)
no_ref = minimize(lambda log_probs: population_loss(log_probs, torch.zeros_like(ref)), ref)
distance = (trained.exp() - best.exp()).abs().amax(1)
no_ref_distance = (no_ref.exp() - best.exp()).abs().amax(1)
assert distance.max() < 1e-6
# 去掉参考等于把参考取成均匀分布：前两个提示走到别处，第三个提示的参考本来就均匀，所以没有区别
assert no_ref_distance[:2].min() > 0.05 and no_ref_distance[2] < 1e-6


# 闭式解确实最大化 KL 正则目标：最大值恰是 beta * log Z，随机策略都更低，直接做梯度上升也走到它
def objective(log_probs):
    return (log_probs.exp() * (rewards - beta * (log_probs - ref))).sum(-1)


torch.testing.assert_close(objective(best), beta * log_z)
ascended = minimize(lambda log_probs: -objective(log_probs).sum(), ref)
assert (ascended.exp() - best.exp()).abs().max() < 1e-6
random_policies = (best + torch.randn(2000, P, V) * torch.logspace(-2, 1, 2000)[:, None, None]).log_softmax(
    -1
)
assert (objective(random_policies) < objective(best)).all()

rows = [
    ["ABC"[i], f"{beta * log_z[i].item():.2f}", "< 1e-12", "< 1e-6", f"{no_ref_distance[i].item():.2f}"]
    for i in range(P)
]
assert [row[1] for row in rows] == ["0.80", "2.34", "-2.98"]
assert [row[4] for row in rows] == ["0.43", "0.36", "0.00"]
Markdown(
    tabulate(
        rows,
        headers=["提示", r"$\beta\log Z$", "奖励差的误差", r"DPO 距 $\pi^*$", "去掉参考"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %% [markdown]
# 梯度：先在一个三层的小语言模型上核对公式，再列权重随隐式奖励差的变化。

# %%
#| label: gradient-weight
#| caption: 隐式奖励差越小，梯度权重越大；起点损失都是 0.693、权重都是二分之一，与 beta 无关，梯度本身还要再乘 beta
#| echo: fold
V, C, B, T = 7, 4, 3, 6
model = torch.nn.Sequential(torch.nn.Embedding(V, C), torch.nn.Tanh(), torch.nn.Linear(C, V))
ref_model = torch.nn.Sequential(torch.nn.Embedding(V, C), torch.nn.Tanh(), torch.nn.Linear(C, V))
chosen_ids, rejected_ids = torch.randint(V, (2, B, T))
rejected_ids[:, :2] = chosen_ids[:, :2]  # 前两个 token 是提示，两边相同
mask = torch.arange(1, T).expand(B, T - 1) >= 2  # 错位之后的回答部分


def logps(model, input_ids):
    return sequence_log_probs(log_probs_from_logits(model(input_ids[:, :-1]), input_ids[:, 1:]), mask)


parameters = list(model.parameters())
for beta in (0.1, 0.5):
    policy = [logps(model, ids) for ids in (chosen_ids, rejected_ids)]
    reference = [logps(ref_model, ids).detach() for ids in (chosen_ids, rejected_ids)]
    by_autograd = torch.autograd.grad(
        dpo_loss(*policy, *reference, beta=beta).sum(), parameters, retain_graph=True
    )
    chosen_rewards, rejected_rewards = implicit_rewards(*policy, *reference, beta=beta)
    weight = torch.sigmoid(rejected_rewards - chosen_rewards)
    for parameter, actual in zip(parameters, by_autograd, strict=True):
        by_formula = torch.zeros_like(parameter)
        for i in range(B):  # 公式逐对相加：-beta * 权重 * (chosen 的梯度 - rejected 的梯度)
            up = torch.autograd.grad(policy[0][i], parameter, retain_graph=True)[0]
            down = torch.autograd.grad(policy[1][i], parameter, retain_graph=True)[0]
            by_formula -= beta * weight[i] * (up - down)
        torch.testing.assert_close(actual, by_formula)
    # 起点：策略等于参考，损失是 ln 2，与 beta 无关
    start = dpo_loss(*reference, *reference, beta=beta)
    torch.testing.assert_close(start, torch.full((B,), math.log(2)))

rows = []
zero = torch.zeros(1)
for margin in (-4.0, -2.0, 0.0, 2.0, 4.0, 6.0):
    row = [f"{margin:+.0f}"]
    for beta in (0.1, 0.5):
        chosen = torch.tensor([margin / beta], requires_grad=True)  # 让隐式奖励差恰好是 margin
        loss = dpo_loss(chosen, zero, zero, zero, beta=beta)
        slope = torch.autograd.grad(loss.sum(), chosen)[0].item()
        assert math.isclose(slope, -beta / (1 + math.exp(margin)))
        row += [f"{slope:+.4f}"]
    row[1:1] = [f"{loss.item():.3f}", f"{1 / (1 + math.exp(margin)):.4f}"]
    rows.append(row)
assert rows[2] == ["+0", "0.693", "0.5000", "-0.0500", "-0.2500"]
assert rows[4][2] == "0.0180" and f"{1 / (1 + math.exp(-4)):.4f}" == "0.9820"  # 权重写反时 +4 处的值

# 概率空间：起点 pi_w = 0.2、pi_l = 0.05、beta = 0.1，rejected 的梯度是 chosen 的 4 倍
probs = torch.tensor([0.2, 0.05], requires_grad=True)
chosen, rejected = probs.log().unsqueeze(-1)
dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1).sum().backward()
torch.testing.assert_close(probs.grad, torch.tensor([-0.25, 1.0]))
# 偏导不是更新量：表格式 softmax（其余概率归第三个答案）走一小步，chosen 升的是 rejected 降的 2.96 倍
before = torch.tensor([0.2, 0.05, 0.75])
logits = before.log().requires_grad_()
chosen, rejected, _ = logits.log_softmax(-1).unsqueeze(-1)
dpo_loss(chosen, rejected, chosen.detach(), rejected.detach(), beta=0.1).sum().backward()
change = (logits.detach() - 1e-4 * logits.grad).softmax(-1) - before
assert f"{(change[0] / -change[1]).item():.2f}" == "2.96"

# 求和与平均会给出相反的符号：chosen 2 个 token 各涨 1，rejected 10 个 token 各涨 0.5
gains = torch.zeros(2, 10)
gains[0, :2], gains[1] = 1.0, 0.5
lengths = torch.tensor([2, 10])
sums = sequence_log_probs(gains, torch.arange(10) < lengths[:, None])
assert (sums[0] - sums[1]).item() == -3.0
assert (sums[0] / 2 - sums[1] / 10).item() == 0.5

Markdown(
    tabulate(
        rows,
        headers=[r"$\hat r_w-\hat r_l$", "损失", "权重", r"梯度，$\beta=0.1$", r"梯度，$\beta=0.5$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %% [markdown]
# 把 chosen 与 rejected 的隐式奖励记作 a 与 b，看损失在这个平面上的等高线。

# %%
#| label: shift-invariance
#| caption: 损失的等高线是斜率为一的平行直线；a 升 b 降、只有 b 降、两个都降的三个点落在同一条线上，损失都是 0.01815
#| echo: fold
a, b = torch.meshgrid(torch.linspace(-14, 8, 45), torch.linspace(-12, 4, 33), indexing="xy")
zeros = torch.zeros(a.numel())
loss = dpo_loss(a.flatten(), b.flatten(), zeros, zeros, beta=1.0).view_as(a)

fig, ax = plt.subplots(figsize=(6.0, 3.8))
levels = [math.log1p(math.exp(-margin)) for margin in (4, 2, 0, -2, -4)]
lines = ax.contour(a, b, loss, levels=levels, colors="C4", linewidths=1.2)
positions = [(-5.0 + margin / 2, -5.0 - margin / 2) for margin in (4, 2, 0, -2, -4)]
ax.clabel(lines, fmt="%.3f", fontsize=10, manual=positions, colors=plt.rcParams["text.color"])
ax.axhline(0, color="C4", linewidth=0.8)
ax.axvline(0, color="C4", linewidth=0.8)

points = {(2.0, -2.0): "a 升，b 降", (0.0, -4.0): "a 不动，b 降", (-6.0, -10.0): "都降，b 降得更多"}
for (x, y), marker, color, text in zip(points, "o^s", ("C0", "C1", "C2"), points.values(), strict=True):
    ax.plot(x, y, marker, color=color, markersize=9)
    ax.annotate(text, (x, y), xytext=(8, -14), textcoords="offset points", fontsize=10)
    value = dpo_loss(torch.tensor([x]), torch.tensor([y]), zeros[:1], zeros[:1], beta=1.0).item()
    assert f"{value:.5f}" == "0.01815"
ax.plot(0, 0, "x", color="C3", markersize=9)
leader = {"arrowstyle": "-", "color": "C3"}
ax.annotate("起点", (0, 0), xytext=(-9, 2.2), fontsize=10, arrowprops=leader)
ax.set_xlabel("a：chosen 的隐式奖励（奈特）")
ax.set_ylabel("b：rejected 的隐式奖励（奈特）")
ax.set_xticks(range(-12, 9, 4))
ax.set_yticks(range(-12, 5, 4))
ax.set_aspect("equal")
ax.grid(False)

# 同时给 a、b 加任意常数，损失不变
for shift in (-5.0, 0.0, 3.0):
    torch.testing.assert_close(
        dpo_loss(a[0] + shift, b[0] + shift, zeros[:45], zeros[:45], beta=1.0), loss[0]
    )
