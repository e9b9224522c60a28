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
# # R1 的推理训练为什么不用奖励模型：实验
#
# 页面 `docs/reasoning/r1-no-reward-model.md` 的实验：从偏好对拟合的奖励模型与规则各训练一遍，两种误差下梯度的方向，以及算力账。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.r1_no_reward_model import fit_reward_model, gated_reward

torch.set_default_dtype(torch.float64)
NUM_SEEDS, NUM_PAIRS, FLIP = 16, 200, 0.1
FN, FP = 0.1, 0.05  # 检查器的漏判率、误判率，与回答的其他方面无关


def p_correct(y):
    """特征 y = (认真程度, 长度) 时答对的概率：稍长有益，太长有害。"""
    quality, length = y[..., 0], y[..., 1]
    return torch.sigmoid(-1 + 0.7 * quality + 1.5 * length - 0.7 * length**2)


def coin(p, generator):
    return torch.rand(p.shape, generator=generator) < p


# 高斯求积：策略 N(θ, I) 下的期望
axis = torch.linspace(-6, 6, 81)
GRID = torch.cartesian_prod(axis, axis)  # (N, 2)
MASS = torch.softmax(-0.5 * (GRID**2).sum(-1), 0)


def gold(theta):
    return (MASS * p_correct(theta[..., None, :] + GRID)).sum(-1)


def gold_gradient(theta, *, accept=p_correct):
    """∇θ E[accept] = E[accept(θ+z) z]：单位方差高斯的得分函数就是 z。"""
    return ((MASS * accept(theta + GRID))[:, None] * GRID).sum(0)


def linear(y):
    return y


def with_square(y):
    """多给一列长度的平方：装得下先升后降。"""
    return torch.cat([y, y[..., 1:] ** 2], -1)


def learn_reward_model(seed, *, features=linear):
    """从参考策略 N(0, I) 成对抽样，留前 200 对一对一错的，选对的那条，一成标反。"""
    generator = torch.Generator().manual_seed(seed)
    pairs = torch.randn(6 * NUM_PAIRS, 2, 2, generator=generator)  # 对、两条、特征
    correct = coin(p_correct(pairs), generator)
    mixed = correct[:, 0] != correct[:, 1]
    assert mixed.sum() >= NUM_PAIRS
    pairs, first_wins = pairs[mixed][:NUM_PAIRS], correct[mixed][:NUM_PAIRS, 0]
    first_wins = first_wins ^ coin(torch.full((NUM_PAIRS,), FLIP), generator)
    chosen = torch.where(first_wins[:, None], pairs[:, 0], pairs[:, 1])
    rejected = torch.where(first_wins[:, None], pairs[:, 1], pairs[:, 0])
    return fit_reward_model(features(chosen), features(rejected))


WEIGHTS = torch.stack([learn_reward_model(seed) for seed in range(NUM_SEEDS)])  # (16, 2)
assert (WEIGHTS > 0).all()  # 每个种子都学到：认真加分，长加分

# %%
#| label: gold-versus-steps
#| caption: 十六个种子的真实正确率（线是均值，带是最低到最高）：只用奖励模型先升后降，跌破起点；加 KL 停在半路；规则与规则门一直上升
#| echo: fold
STEPS, BATCH, LR, BETA = 200, 256, 0.05, 0.6


def train(weights, seed, *, reward, beta=0.0, shift=0.0, features=linear):
    """均值为 θ 的高斯策略，组内标准化的优势，REINFORCE；返回每一步的 θ。"""
    generator = torch.Generator().manual_seed(1000 + seed)
    theta, path = torch.zeros(2), []
    for _ in range(STEPS + 1):
        path.append(theta)
        z = torch.randn(BATCH, 2, generator=generator)
        y = theta + z
        correct = coin(p_correct(y), generator)
        passed = torch.where(
            correct, ~coin(torch.full((BATCH,), FN), generator), coin(torch.full((BATCH,), FP), generator)
        )
        scores = features(y) @ weights + shift  # 偏好对定不下零点
        rewards = {
            "rm": scores,
            "rule": passed.double(),
            "gate": gated_reward(scores, passed),
            "product": scores * passed,
        }[reward]
        advantages = (rewards - rewards.mean()) / rewards.std()
        theta = theta + LR * ((advantages[:, None] * z).mean(0) - beta * theta)  # KL = |θ|²/2
    return torch.stack(path)


arms = {
    "只用奖励模型": {"reward": "rm"},
    "奖励模型 + KL": {"reward": "rm", "beta": BETA},
    "只用规则": {"reward": "rule"},
    "规则门 × 奖励模型": {"reward": "gate"},
}
thetas = {
    name: torch.stack([train(w, seed, **arm) for seed, w in enumerate(WEIGHTS)]) for name, arm in arms.items()
}
curves = {name: gold(path) for name, path in thetas.items()}  # (16, 201)

fig, ax = plt.subplots(figsize=(6.0, 3.6))
for i, (name, curve) in enumerate(curves.items()):
    ax.plot(curve.mean(0), color=f"C{i}", linestyle=["-", "--", "-.", ":"][i], label=name)
    ax.fill_between(range(STEPS + 1), curve.amin(0), curve.amax(0), color=f"C{i}", alpha=0.15, linewidth=0)
ax.set_xlabel("更新步数")
ax.set_ylabel("真实正确率")
ax.set_ylim(0, 1.05)
ax.legend(loc="upper left", frameon=False, ncols=2, fontsize=10)

start = gold(torch.zeros(2)).item()
rm = curves["只用奖励模型"]
ends = {name: curve[:, -1] for name, curve in curves.items()}
mean_end = {name: curve.mean().item() for name, curve in ends.items()}
assert abs(start - 0.255) < 2e-3
assert abs(rm.mean(0).amax().item() - 0.466) < 5e-3 and 35 <= rm.mean(0).argmax().item() <= 43  # 第 39 步附近
assert rm.argmax(1).amin() >= 25 and rm.argmax(1).amax() <= 65  # 每个种子的峰约在第 30 至 60 步
assert (ends["只用奖励模型"] < 0.03).all()  # 每个种子都跌到起点以下
assert abs(mean_end["奖励模型 + KL"] - 0.46) < 5e-3
assert 0.38 < ends["奖励模型 + KL"].amin() < 0.40 and 0.51 < ends["奖励模型 + KL"].amax() < 0.53
assert abs(mean_end["只用规则"] - 0.65) < 1e-2 and abs(mean_end["规则门 × 奖励模型"] - 0.69) < 1e-2
assert all(
    curves[n].mean(0)[-1] > curves[n].mean(0)[-20] + 0.01 for n in ("只用规则", "规则门 × 奖励模型")
)  # 还在升
assert (ends["只用规则"] > ends["奖励模型 + KL"] + 0.1).all()
assert (ends["规则门 × 奖励模型"] > ends["奖励模型 + KL"] + 0.1).all()

# 对照：同样 200 对带噪偏好，只给奖励模型多一列长度的平方，就不再掉头
square = [learn_reward_model(seed, features=with_square) for seed in range(NUM_SEEDS)]
finals = [train(w, seed, reward="rm", features=with_square)[-1] for seed, w in enumerate(square)]
control = gold(torch.stack(finals))
assert abs(control.mean().item() - 0.92) < 1e-2 and 0.65 < control.amin() < 0.75

# %%
#| label: gradient-direction
#| caption: 策略沿奖励模型的方向走远，各种奖励的梯度与真梯度的夹角余弦：随机判错始终是 1，偏心的规则降到 0.74，奖励模型从 0.99 变成负数
#| echo: fold


def cosine(a, b):
    return (a @ b / (a.norm() * b.norm())).item()


def noisy(y):
    return FP + (1 - FN - FP) * p_correct(y)


def lenient(y):
    """偏心的规则：长度超过 2.5 的错答，一半判过。"""
    p = p_correct(y)
    return p + 0.5 * (1 - p) * (y[..., 1] > 2.5)


def rms_error(theta, weights):
    """把奖励模型的分换成与对错同一单位（在参考策略处投影一致、均值一致）后，误差的均方根。"""
    scale = weights @ gold_gradient(torch.zeros(2)) / (weights @ weights)
    y = theta + GRID
    predicted, p = gold(torch.zeros(2)) + scale * (y @ weights), p_correct(y)
    return (MASS * (p * (predicted - 1) ** 2 + (1 - p) * predicted**2)).sum().sqrt().item()


rows, cosines, errors = [], [], []
for distance in range(5):
    per_seed = []
    for weights in WEIGHTS:
        theta = distance * weights / weights.norm()
        truth = gold_gradient(theta)
        random_bias = gold_gradient(theta, accept=noisy) - truth
        # 奖励模型的梯度恒为 weights
        per_seed.append(
            [
                gold(theta).item(),
                cosine(gold_gradient(theta, accept=noisy), truth),
                cosine(gold_gradient(theta, accept=lenient), truth),
                cosine(weights, truth),
                rms_error(theta, weights),
            ]
        )
        assert (random_bias + (FN + FP) * truth).norm().item() < 1e-9  # Cov(e, s) = -(a+b)∇p，恒等式
        assert random_bias.norm().item() <= max(FN, FP) ** 0.5  # 柯西—施瓦茨：不超过错判率的平方根
    table = torch.tensor(per_seed)
    mean, low, high = table.mean(0), table.amin(0), table.amax(0)
    cosines.append((mean.tolist(), low.tolist(), high.tolist()))
    errors.append(mean[4].item())
    rows.append(
        [f"{distance}（{distance**2 / 2:.1f}）", f"{mean[0]:.2f}"]
        + [f"{mean[1]:.2f}", f"{mean[2]:.2f}", f"{mean[3]:.2f}（{low[3]:.2f}～{high[3]:.2f}）"]
    )
means, lows, highs = (torch.tensor(t) for t in zip(*cosines, strict=True))
assert (means[:, 1] - 1).abs().amax() < 1e-9 and (lows[:, 1] - 1).abs().amax() < 1e-9
assert abs(means[0, 3] - 0.99) < 6e-3 and lows[0, 3] > 0.94
assert abs(means[2, 3] + 0.03) < 1e-2 and lows[2, 3] < -0.4 and highs[2, 3] > 0.5
assert (highs[3:, 3] < 0).all()  # 距离 3 起，十六个种子全部反向
assert abs(means[1:, 2].amin() - 0.74) < 1e-2 and lows[1:, 2].amin() > 0  # 偏心规则：转了，没有反向
# 「没有反向」只在这条路上：换到又长又不认真的位置，偏心规则同样反向
elsewhere = torch.tensor([0.0, 3.0])
assert abs(cosine(gold_gradient(elsewhere, accept=lenient), gold_gradient(elsewhere)) + 0.29) < 1e-2
assert abs(errors[0] - 0.40) < 5e-3 and abs(errors[-1] - 0.84) < 5e-3 and errors == sorted(errors)
Markdown(
    tabulate(
        rows,
        headers=["距离（KL）", "正确率", "随机判错", "偏心规则", "奖励模型"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: cost-of-reward-model
#| caption: 一轮 8192 条、每条一万 token 的前向算力估算：奖励模型打分是采样、参考、更新之和的 0.20，重训一遍是 1.93
#| echo: fold
ACTIVE, TOTAL = 37e9, 671e9  # 激活参数、总参数（DeepSeek-V3）
ROLLOUT, TOKENS = 8192, 10_000  # 一轮的条数（R1 报告）；每条的 token 数是假设
PAIRS, PAIR_TOKENS = 66_000, 2_000  # 有用性偏好对数（R1 报告）；每条的 token 数是假设
sampled = ROLLOUT * TOKENS
costs = {
    "采样（前向）": 2 * ACTIVE * sampled,
    "参考策略（前向）": 2 * ACTIVE * sampled,
    "更新（前向与反向）": 6 * ACTIVE * sampled,
    "奖励模型打分（前向）": 2 * ACTIVE * sampled,
    "奖励模型重训一遍": 6 * ACTIVE * PAIRS * 2 * PAIR_TOKENS,
}
base = sum(list(costs.values())[:3])
rows = [[name, f"{cost / 1e18:.1f}", f"{cost / base:.2f}"] for name, cost in costs.items()]
assert abs(costs["奖励模型打分（前向）"] / base - 0.2) < 1e-12
assert abs(costs["奖励模型重训一遍"] / base - 1.93) < 5e-3
rollouts = 10_400 * 512 / ROLLOUT  # R1-Zero 共 10,400 步，每步 512 条（R1 报告）
assert rollouts == 650 and abs(costs["奖励模型重训一遍"] / base / rollouts - 0.003) < 1e-4
assert abs(costs["奖励模型重训一遍"] / base / 10 - 0.19) < 5e-3  # 每 10 轮重训一遍
assert TOTAL * 2 / 1e9 == 1342  # bf16 权重，GB
Markdown(
    tabulate(rows, headers=["项目", "10¹⁸ FLOP", "占前三项之和"], tablefmt="github", disable_numparse=True)
)

# %%
#| label: product-is-not-a-gate
#| caption: 给奖励模型的分加一个常数，八个种子训练二百步后的平均正确率：直接相乘在常数为负时越训越差，压进有界区间的门不受影响
#| echo: fold
rows = []
for shift in (5.0, 0.0, -5.0):
    row = [f"{shift:+.0f}"]
    for reward in ("product", "gate"):
        final = torch.stack(
            [train(w, seed, reward=reward, shift=shift)[-1] for seed, w in enumerate(WEIGHTS[:8])]
        )
        row.append(gold(final).mean().item())
    rows.append(row)
expected = [[0.72, 0.66], [0.81, 0.70], [0.03, 0.67]]
assert all(
    abs(x - y) < 1e-2
    for row, pair in zip(rows, expected, strict=True)
    for x, y in zip(row[1:], pair, strict=True)
)
Markdown(
    tabulate(rows, headers=["分数加常数", "分 × 是否通过", "压缩后的门"], tablefmt="github", floatfmt=".2f")
)
