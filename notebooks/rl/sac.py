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
# # SAC（Soft Actor-Critic）：实验
#
# 页面 `docs/rl/sac.md` 的实验：温度怎样改变最优分支、压缩的雅可比、自动温度（符号写反会怎样）、重参数化与得分函数的方差、float32 的数值。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch.distributions import Independent, Normal, TanhTransform, TransformedDistribution
from torch.func import vmap

from snippets.rl.sac import (
    polyak_update,
    sac_actor_loss,
    sac_temperature_loss,
    soft_backup,
    soft_policy_log_probs,
    soft_q_target,
    soft_value,
    tanh_gaussian_log_prob,
)

torch.manual_seed(0)
F64 = torch.float64

# %%
#| label: branch-flip
#| caption: 走宽路的概率随温度变化：最大熵目标在温度 0.144 处越过一半，以均匀分布为参考的 KL 正则始终低于一半
#| echo: fold
# 状态 0 选窄路（状态 1，一个动作，奖励 1）或宽路（状态 2，四个动作，奖励都是 0.8）；不可用的动作奖励为负无穷
INF = math.inf
rewards = torch.tensor([[0, 0, -INF, -INF], [1, -INF, -INF, -INF], [0.8, 0.8, 0.8, 0.8]], dtype=F64)
transitions = torch.zeros(3, 4, 3, dtype=F64)
transitions[0, 0, 1] = transitions[0, 1, 2] = 1
uniform = torch.zeros_like(rewards).masked_fill(rewards.isinf(), -INF).log_softmax(-1)


def wide_probability(alpha, ref_log_probs=None):
    """软值迭代到不动点，返回状态 0 走宽路的概率。"""
    values = torch.zeros(3, dtype=F64)
    for _ in range(5):
        q_values = soft_backup(values, rewards, transitions, gamma=1.0)
        values = soft_value(q_values, alpha=alpha, ref_log_probs=ref_log_probs)
    again = soft_value(
        soft_backup(values, rewards, transitions, gamma=1.0), alpha=alpha, ref_log_probs=ref_log_probs
    )
    assert torch.equal(again, values)  # 已经是不动点
    return soft_policy_log_probs(q_values, alpha=alpha, ref_log_probs=ref_log_probs)[0, 1].exp().item()


alphas = torch.logspace(-2, 1, 61, dtype=F64).tolist()
max_entropy = [wide_probability(a) for a in alphas]
kl_uniform = [wide_probability(a, uniform) for a in alphas]
closed_form = [1 / (1 + math.exp(0.2 / a - math.log(4))) for a in alphas]
fig, ax = plt.subplots(figsize=(6.0, 3.4))
ax.plot(alphas, closed_form, "-", color="C0", label="最大熵：解析式")
ax.plot(alphas[::4], max_entropy[::4], "o", color="C0", label="最大熵：软值迭代")
ax.plot(alphas, kl_uniform, "--", color="C1", label="KL 到均匀参考")
ax.axvline(0.2 / math.log(4), linestyle=":", color="C2")
ax.text(0.155, 0.04, "翻转处 0.144", color="C2", fontsize=11)
ax.axhline(0.5, linestyle=":", color="C2", linewidth=1)
ax.set_xscale("log")
ax.set_xticks([0.01, 0.1, 1, 10], ["0.01", "0.1", "1", "10"])
ax.set_ylim(-0.02, 0.9)
ax.set_xlabel("温度（对数轴，奖励的单位）")
ax.set_ylabel("走宽路的概率")
ax.legend(frameon=False, loc="upper left")

assert max(abs(a - b) for a, b in zip(max_entropy, closed_form, strict=True)) < 1e-12
assert f"{0.2 / math.log(4):.3f}" == "0.144" and abs(wide_probability(0.2 / math.log(4)) - 0.5) < 1e-12
assert wide_probability(1e-3) < 1e-80 and f"{wide_probability(0.2):.3f}" == "0.595"
assert abs(wide_probability(1e6) - 0.8) < 1e-6  # 五条路径均匀
assert max(kl_uniform) < 0.5 and f"{wide_probability(0.2, uniform):.3f}" == "0.269"
# 只在当前这一步加熵（Q 里没有以后的熵）：状态 0 的 Q 是 1 与 0.8，本例恰与虚线重合
for alpha, other in zip(alphas, kl_uniform, strict=True):
    assert abs(1 / (1 + math.exp(0.2 / alpha)) - other) < 1e-12

# %%
#| label: jacobian
#| caption: 压缩高斯的密度在区间上的积分与熵：漏掉雅可比时积分小于 1，熵还随标准差一直涨；减去之后积分是 1
#| echo: fold
u = torch.linspace(-17, 17, 100_001, dtype=F64)[:, None]
a = u[:, 0].tanh()  # 动作的网格，两端更密；积分用梯形法
nodes = torch.linspace(-10, 10, 20001, dtype=F64)
weights = (-0.5 * nodes.square()).exp()
weights = weights / weights.sum()
rows = []
for mean, std in ((0.0, 0.5), (0.0, 1.0), (1.0, 1.0), (0.0, 3.0)):
    loc, log_std = torch.full_like(u, mean), torch.full_like(u, math.log(std))
    ours = tanh_gaussian_log_prob(loc, log_std, u)
    squashed = TransformedDistribution(Independent(Normal(loc, log_std.exp()), 1), TanhTransform())
    inner = a.abs() < 0.999999  # torch 由 a 反求 u，贴着 ±1 时自己先失去精度
    assert (ours - squashed.log_prob(a[:, None]))[inner].abs().max().item() < 1e-6
    without = Normal(loc, log_std.exp()).log_prob(u)[:, 0]
    totals = [torch.trapezoid(log_prob.exp(), a).item() for log_prob in (without, ours)]
    assert abs(totals[1] - 1) < 1e-5
    samples = (mean + std * nodes)[:, None]
    log_probs = tanh_gaussian_log_prob(
        torch.full_like(samples, mean), torch.full_like(samples, math.log(std)), samples
    )
    entropy = -(weights * log_probs).sum().item()
    gaussian_entropy = 0.5 * math.log(2 * math.pi * math.e) + math.log(std)
    rows.append([f"{mean:.0f}，{std:.1f}", totals[0], totals[1], gaussian_entropy, entropy])
assert [f"{v:.3f}" for v in rows[1][1:]] == ["0.606", "1.000", "1.419", "0.670"]
assert [f"{v:.3f}" for v in rows[3][3:]] == ["2.518", "-1.096"]
assert all(row[4] < math.log(2) for row in rows)
Markdown(
    tabulate(
        rows,
        headers=["μ，σ", "漏项积分", "积分", "漏项熵", "熵"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
#| label: temperature
#| caption: 四步小任务上的 SAC，五次随机初始化：左图温度，右图平均熵；符号正确时熵走到目标负 1 附近，写反后温度爆炸、熵顶到均匀分布
#| echo: fold
# 状态 x∈[-1,1] 起步，x' = x + a/2，奖励 −10 x'²，四步后真的终止；观测是 (x, 已走步数)。
# 前五份（初始化各不相同）用正确的温度损失，后五份把它取反，其余全同；十份网络叠在第一维一起算
RUNS, STEPS, WIDTH, TARGET, UPDATES = 10, 4, 32, -1.0, 600
generator = torch.Generator().manual_seed(0)
sign = torch.tensor([1.0] * 5 + [-1.0] * 5)


def mlp(inputs, outputs):
    sizes = [(inputs, WIDTH), (WIDTH, WIDTH), (WIDTH, outputs)]
    parameters = []
    for fan_in, fan_out in sizes:
        half = torch.randn(RUNS // 2, fan_in, fan_out, generator=generator) / fan_in**0.5
        parameters += [
            half.repeat(2, 1, 1).requires_grad_(),
            torch.zeros(RUNS, 1, fan_out, requires_grad=True),
        ]
    return parameters


def forward(p, x):
    x = torch.baddbmm(p[1], x, p[0]).relu()
    x = torch.baddbmm(p[3], x, p[2]).relu()
    return torch.baddbmm(p[5], x, p[4])


def q_values_of(p, obs, action):
    return forward(p, torch.cat([obs, action], -1)).squeeze(-1)


def paired(draw, *shape):
    """正反两组用同样的随机数。"""
    return draw(RUNS // 2, *shape, generator=generator).repeat(2, *[1] * len(shape))


def act(obs):
    mean, raw = forward(actor, obs).chunk(2, -1)
    log_std = -5 + 3.5 * (raw.tanh() + 1)  # 限制在 [-5, 2]，与 cleanrl 相同
    pre_tanh = mean + log_std.exp() * paired(torch.randn, obs.shape[1], 1)
    return pre_tanh.tanh(), vmap(tanh_gaussian_log_prob)(mean, log_std, pre_tanh)


def target_of(r, q1, q2, log_probs, done, alpha):
    return soft_q_target(r, q1, q2, log_probs, done, alpha=alpha, gamma=1.0)


critic_1, critic_2, actor = mlp(3, 1), mlp(3, 1), mlp(2, 2)
target_1, target_2 = ([p.detach().clone() for p in critic] for critic in (critic_1, critic_2))
log_alpha = torch.zeros(RUNS, requires_grad=True)
critic_optimizer = torch.optim.Adam(critic_1 + critic_2, lr=1e-2)
actor_optimizer = torch.optim.Adam(actor, lr=1e-2)
alpha_optimizer = torch.optim.Adam([log_alpha], lr=2e-2)
replay, alpha_curve, entropy_curve, episode_returns = [], [], [], []
for update in range(UPDATES):
    if update % 10 == 0:  # 每 10 次更新，用当前策略走 16 条轨迹放进回放
        x, total = paired(torch.rand, 16, 1) * 2 - 1, torch.zeros(RUNS, 16)
        for t in range(STEPS):
            obs = torch.cat([x, torch.full_like(x, t / STEPS)], -1)
            with torch.no_grad():
                action, _ = act(obs)
            x = x + action / 2
            reward = -10 * x[..., 0].square()
            total += reward
            done = torch.full(reward.shape, t == STEPS - 1)
            next_obs = torch.cat([x, torch.full_like(x, (t + 1) / STEPS)], -1)
            replay.append((obs, action, reward, next_obs, done))
        episode_returns.append(total.mean(1))
        columns = [torch.cat(column, 1) for column in zip(*replay, strict=True)]
    rows_drawn = torch.randint(columns[0].shape[1], (64,), generator=generator)
    obs, action, reward, next_obs, done = (column[:, rows_drawn] for column in columns)
    alpha = log_alpha.exp().detach()
    with torch.no_grad():
        next_action, next_log_probs = act(next_obs)
        next_q = [q_values_of(target, next_obs, next_action) for target in (target_1, target_2)]
        y = vmap(target_of)(reward, *next_q, next_log_probs, done, alpha)
    critic_loss = sum((q_values_of(p, obs, action) - y).square().mean(1).sum() for p in (critic_1, critic_2))
    new_action, log_probs = act(obs)
    new_q = [q_values_of(critic, obs, new_action) for critic in (critic_1, critic_2)]
    actor_loss = vmap(lambda lp, q1, q2, al: sac_actor_loss(lp, q1, q2, alpha=al))(log_probs, *new_q, alpha)
    alpha_loss = vmap(lambda la, lp: sac_temperature_loss(la, lp, target_entropy=TARGET))(
        log_alpha, log_probs
    )
    critic_grads = torch.autograd.grad(critic_loss, critic_1 + critic_2)
    actor_grads = torch.autograd.grad(actor_loss.sum(), actor)
    (alpha_grad,) = torch.autograd.grad((sign * alpha_loss).sum(), log_alpha)
    for optimizer, parameters, grads in (
        (critic_optimizer, critic_1 + critic_2, critic_grads),
        (actor_optimizer, actor, actor_grads),
        (alpha_optimizer, [log_alpha], [alpha_grad]),
    ):
        for p, g in zip(parameters, grads, strict=True):
            p.grad = g
        optimizer.step()
    polyak_update(target_1, critic_1, tau=0.05)
    polyak_update(target_2, critic_2, tau=0.05)
    alpha_curve.append(log_alpha.exp().detach().clone())
    entropy_curve.append(-log_probs.detach().mean(1))

alpha_curve, entropy_curve = torch.stack(alpha_curve), torch.stack(entropy_curve)
smooth = entropy_curve.unfold(0, 20, 20).mean(-1)
right, wrong = slice(0, 5), slice(5, 10)
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.2))
for curve, every, ax in ((alpha_curve, 1, axes[0]), (smooth, 20, axes[1])):
    for runs, color, style, label in ((right, "C0", "-", "正确"), (wrong, "C1", "--", "写反")):
        part = curve[:: 10 if every == 1 else 1, runs]
        steps = torch.arange(len(part)) * (10 if every == 1 else 20) + (1 if every == 1 else 10)
        ax.fill_between(steps, part.amin(1), part.amax(1), color=color, alpha=0.25, linewidth=0)
        ax.plot(steps, part.median(1).values, style, color=color, label=label)
    ax.set_xlabel("更新次数")
    ax.set_xticks([0, 300, 600])
axes[0].set_yscale("log")
axes[0].set_ylim(0.03, 1e4)
axes[0].set_ylabel("温度（对数轴）")
axes[0].legend(frameon=False, loc="center right")
axes[1].axhline(TARGET, linestyle=":", color="C2")
axes[1].axhline(math.log(2), linestyle=":", color="C3")
axes[1].text(600, TARGET - 0.04, "目标", color="C2", ha="right", va="top")
axes[1].text(600, math.log(2) + 0.03, "均匀分布 0.693", color="C3", ha="right", va="bottom")
axes[1].set_ylim(-1.4, 1.0)
axes[1].set_ylabel("平均熵（nat）")

last_entropy = entropy_curve[-100:].mean(0)
last_return = torch.stack(episode_returns[-10:]).mean(0)


def within(values, low, high):
    return low <= values.min().item() and values.max().item() <= high


# 训练是 float32，末几位随平台变，界限比这一次运行留得宽
assert within(last_entropy[right], -1.1, -0.75)  # 正确：接近目标 −1
assert (last_entropy < entropy_curve[200:300].mean(0))[right].all()  # 还在往目标走
assert within(last_entropy[wrong], 0.66, math.log(2))  # 写反：顶到均匀分布
assert within(alpha_curve[-1, right], 0.05, 0.15) and alpha_curve[-1, wrong].min() > 1e12
assert last_return[right].min() > -1.3 and last_return[wrong].max() < -15

# %%
#| label: gradient-variance
#| caption: 同一个策略上单样本梯度的标准差（对均值）：Q 平滑时重参数化最小，Q 高频起伏时它反而最大；三种写法的期望相同
#| echo: fold
MEAN, STD, ALPHA = 0.0, 0.5, 0.2
q_shapes = [("平滑", 0), ("起伏，频率 8", 8), ("起伏，频率 40", 40)]


def single_sample_gradients(frequency, kind):
    """每个噪声节点上 α·logπ−Q 对均值的梯度；得分函数把动作固定，只对 logπ 求导。"""

    def q_of(action):
        return -(action - 0.5).square() + (0.3 * torch.sin(frequency * action) if frequency else 0.0)

    mean = torch.full((len(nodes), 1), MEAN, dtype=F64, requires_grad=True)
    log_std = torch.full((len(nodes), 1), math.log(STD), dtype=F64)
    pre_tanh = mean + log_std.exp() * nodes[:, None]
    if kind == "重参数化":
        q = q_of(pre_tanh.tanh())[:, 0]
        loss = len(nodes) * sac_actor_loss(tanh_gaussian_log_prob(mean, log_std, pre_tanh), q, q, alpha=ALPHA)
    else:
        pre_tanh = pre_tanh.detach()
        log_probs = tanh_gaussian_log_prob(mean, log_std, pre_tanh)
        signal = (ALPHA * log_probs - q_of(pre_tanh.tanh())[:, 0]).detach()
        if kind == "得分函数，减均值":
            signal = signal - (weights * signal).sum()
        loss = (signal * log_probs).sum()
    return torch.autograd.grad(loss, mean)[0][:, 0]


rows, expectations = [], {}
for kind in ("重参数化", "得分函数", "得分函数，减均值"):
    row = [kind]
    for _, frequency in q_shapes:
        gradient = single_sample_gradients(frequency, kind)
        average = (weights * gradient).sum()
        row.append((weights * (gradient - average).square()).sum().sqrt().item())
        assert abs(average - expectations.setdefault(frequency, average)) < 1e-9  # 期望相同
    rows.append(row)
assert [f"{v:.2f}" for v in rows[0][1:]] == ["0.73", "1.62", "7.22"]
assert [f"{v:.2f}" for v in rows[1][1:]] == ["1.37", "1.34", "1.43"]
assert [f"{v:.2f}" for v in rows[2][1:]] == ["1.06", "1.02", "1.13"]
Markdown(tabulate(rows, headers=["写法", *[n for n, _ in q_shapes]], tablefmt="github", floatfmt=".2f"))

# %%
#| label: float32-jacobian
#| caption: float32 下雅可比的对数与它对 u 的导数：稳定式处处正确，直接写法溢出，加 1e-6 的写法被截住而且没有梯度
#| echo: fold
rows = []
for value in (2.0, 8.0, 10.0):
    x = torch.tensor([[value]], requires_grad=True)
    zeros = torch.zeros(1, 1)
    # 均值取在样本上，高斯部分只剩常数，剩下的就是雅可比的对数
    stable = -0.5 * math.log(2 * math.pi) - tanh_gaussian_log_prob(x.detach(), zeros, x)
    naive = (1 - x.tanh().square()).log().sum()
    padded = (1 - x.tanh().square() + 1e-6).log().sum()
    results = [(v.item(), torch.autograd.grad(v.sum(), x)[0].item()) for v in (stable, naive, padded)]
    truth = 2 * (math.log(2) - value - math.log1p(math.exp(-2 * value)))
    assert abs(results[0][0] - truth) < 1e-5 and abs(results[0][1] + 2 * math.tanh(value)) < 1e-5
    rows.append([f"{value:.0f}", *[f"{v:.2f}，{round(g, 2) + 0.0:.2f}" for v, g in results]])
assert rows[0][1:] == ["-2.65，-1.93"] * 3
stable_grad, padded_grad = (float(rows[1][i].split("，")[1]) for i in (1, 3))
assert stable_grad == -2 and -1 < padded_grad < -0.4  # u=8 差 1 个末位，导数就变 0.1
assert rows[2][1:] == ["-18.61，-2.00", "-inf，nan", "-13.82，0.00"]
assert 4096 * 128_000 == 524_288_000  # 一个词表大小的 Q 输出头
Markdown(
    tabulate(rows, headers=["u", "稳定式", "直接写", "加 1e-6"], tablefmt="github", disable_numparse=True)
)
