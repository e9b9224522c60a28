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
# # KL 的三个估计（k1, k2, k3）：实验
#
# 页面 `docs/rl/kl-estimators.md` 里的每个数字都由下面的单元算出。全部期望都是对整个词表精确求和，没有蒙特卡洛误差；样本一律来自 $\pi_\theta$，$r=\pi_{\text{ref}}/\pi_\theta$。

# %%
#| label: setup
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch.distributions import Normal

from snippets.rl.kl_estimators import (
    kl_categorical,
    kl_k1,
    kl_k2,
    kl_k3,
    kl_k3_importance_weighted,
    kl_k3_straight_through,
    kl_reward_surrogate,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
generator = torch.Generator().manual_seed(0)
VOCAB_SIZE = 8
ref_logits = torch.randn(VOCAB_SIZE, generator=generator)  # (V)
direction = torch.randn(VOCAB_SIZE, generator=generator)  # (V)


# %%
#| label: value-bias-and-sd
#| caption: 七对分布上，k2 的偏差与 k1、k2、k3 的单样本标准差；最后一列在遗忘对与高斯 2.0 两行反超 k1
#| echo: fold
def moments(probs, log_probs, ref_log_probs):
    """三个估计在样本来自 probs 时的均值与标准差（精确求和）。"""
    result = []
    for estimator in (kl_k1, kl_k2, kl_k3):
        k = estimator(log_probs, ref_log_probs)
        mean = (probs * k).sum()
        result.append((mean.item(), (probs * (k - mean).square()).sum().sqrt().item()))
    return result


# 离散：参考策略固定，当前策略沿同一方向越走越远；「遗忘」对里参考策略给 0.2 的 token，当前策略只给 0.01
pairs = [(f"V=8，{scale}", ref_logits + scale * direction, ref_logits) for scale in (0.3, 1.0, 2.0)]
forget, forget_ref = torch.full((VOCAB_SIZE,), 0.99 / 7), torch.full((VOCAB_SIZE,), 0.8 / 7)
forget[0], forget_ref[0] = 0.01, 0.2
pairs.append(("遗忘", forget.log(), forget_ref.log()))

rows, table = [], {}
for name, logits, other in pairs:
    log_probs, ref_log_probs = logits.log_softmax(-1), other.log_softmax(-1)
    exact, reverse = kl_categorical(logits, other).item(), kl_categorical(other, logits).item()
    (m1, s1), (m2, s2), (m3, s3) = moments(log_probs.exp(), log_probs, ref_log_probs)
    assert abs(m1 - exact) < 1e-12 and abs(m3 - exact) < 1e-12  # k1、k3 无偏
    chi2 = (log_probs.exp() * (log_probs.exp().reciprocal() * ref_log_probs.exp() - 1).square()).sum().item()
    assert abs(s3**2 - (s1**2 + chi2 - 2 * (exact + reverse))) < 1e-12  # 方差恒等式
    assert (s3 > s1) == (chi2 > 2 * (exact + reverse))  # 判据
    label = "遗忘" if name == "遗忘" else "V=8"
    rows.append([f"{label} {exact:.3f}", m2 - exact, s1, s2, s3])
    table[f"{label} {exact:.3f}"] = (m2 - exact, s1, s2, s3)

# 高斯：样本来自 N(0,1)，参考 N(mu,1)，KL = mu^2/2；在密网格上求和
x = torch.linspace(-14, 14, 28001)
for exact in (0.005, 0.5, 2.0):
    mu = math.sqrt(2 * exact)
    log_probs, ref_log_probs = Normal(0.0, 1.0).log_prob(x), Normal(mu, 1.0).log_prob(x)
    (m1, s1), (m2, s2), (m3, s3) = moments(log_probs.exp() * (x[1] - x[0]), log_probs, ref_log_probs)
    s = mu**2
    assert abs(s1 - mu) < 1e-9 and abs(m2 - (s / 2 + s**2 / 8)) < 1e-9
    assert abs(s3 - math.sqrt(math.exp(s) - 1 - s)) < 1e-9  # 闭式
    rows.append([f"高斯 {exact:.3f}", m2 - exact, s1, s2, s3])
    table[f"高斯 {exact:.3f}"] = (m2 - exact, s1, s2, s3)

# Schulman 博文的两张表：标准差除以真值
assert [round(v / 0.005, 2) for v in table["高斯 0.005"][1:]] == [20.0, 1.42, 1.42]
assert [round(v / 0.5, 2) for v in table["高斯 0.500"][1:]] == [2.0, 1.73, 1.7]
assert round(table["高斯 0.500"][0] / 0.5, 2) == 0.25 and f"{table['高斯 0.500'][0]:.3f}" == "0.125"
# 页面引用的数
assert [f"{v:.3f}" for v in table["V=8 0.012"][1:]] == ["0.159", "0.016", "0.014"]
assert [f"{v:.3f}" for v in table["遗忘 0.181"]] == ["-0.114", "0.319", "0.444", "1.590"]
assert [f"{v:.3f}" for v in table["高斯 2.000"]] == ["2.000", "2.000", "4.899", "7.043"]
Markdown(
    tabulate(
        rows,
        headers=["分布对与 KL", "k2 偏差", "k1 标准差", "k2 标准差", "k3 标准差"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
#| label: gradient-table
#| caption: 十种写法的期望梯度与两个方向的精确 KL 梯度的最大差，0 表示小于 1e-12
#| echo: fold
theta = (ref_logits + direction).requires_grad_(True)
old_logits = ref_logits + 0.5 * direction + 0.3 * torch.randn(VOCAB_SIZE, generator=generator)
ref_log_probs, old_log_probs = ref_logits.log_softmax(-1), old_logits.log_softmax(-1)
(grad_reverse,) = torch.autograd.grad(kl_categorical(theta, ref_logits), theta)  # KL(π‖π_ref)
(grad_forward,) = torch.autograd.grad(kl_categorical(ref_logits, theta), theta)  # KL(π_ref‖π)
(grad_second,) = torch.autograd.grad(
    (theta.softmax(-1) * kl_k2(theta.log_softmax(-1), ref_log_probs)).sum(), theta
)  # 让期望也参与求导的 E[k2]


def expected_gradient(per_sample_loss, sampler_log_probs=None):
    """采样分布当常数，先求导再取期望：训练时自动微分做的就是这件事。"""
    log_probs = theta.log_softmax(-1)
    weights = (log_probs if sampler_log_probs is None else sampler_log_probs).exp().detach()
    (grad,) = torch.autograd.grad((weights * per_sample_loss(log_probs)).sum(), theta)
    return grad


def ratio(log_probs, sampler_log_probs):
    return (log_probs - sampler_log_probs.detach()).exp()


uses = [  # 写法，每个样本上 ∇log π 的系数，采样策略，损失，期望梯度应当是谁
    ("k1 损失", "$1$", None, lambda lp: kl_k1(lp, ref_log_probs), "零"),
    (
        "k1 进奖励",
        r"$-\log r$",
        None,
        lambda lp: kl_reward_surrogate(kl_k1(lp, ref_log_probs), lp),
        "反向 KL",
    ),
    ("k2 损失", r"$-\log r$", None, lambda lp: kl_k2(lp, ref_log_probs), "反向 KL"),
    ("k3 损失", "$1-r$", None, lambda lp: kl_k3(lp, ref_log_probs), "前向 KL"),
    ("k3 进奖励", "$k_3$", None, lambda lp: kl_reward_surrogate(kl_k3(lp, ref_log_probs), lp), "反向减前向"),
    ("ρ·k3 损失", r"$-\log r$", None, lambda lp: kl_k3_importance_weighted(lp, lp, ref_log_probs), "反向 KL"),
    ("ρ·k2 损失", r"$k_2-\log r$", None, lambda lp: ratio(lp, lp) * kl_k2(lp, ref_log_probs), "E[k2]"),
    ("k3 值、k2 梯度", r"$-\log r$", None, lambda lp: kl_k3_straight_through(lp, ref_log_probs), "反向 KL"),
    ("k2 损失，旧样本", r"$-\log r$", old_log_probs, lambda lp: kl_k2(lp, ref_log_probs), "都不是"),
    (
        "ρ·k3 损失，旧样本",
        r"$-\rho\log r$",
        old_log_probs,
        lambda lp: kl_k3_importance_weighted(lp, old_log_probs, ref_log_probs),
        "反向 KL",
    ),
]
targets = {
    "零": torch.zeros(VOCAB_SIZE),
    "反向 KL": grad_reverse,
    "前向 KL": grad_forward,
    "反向减前向": grad_reverse - grad_forward,
    "E[k2]": grad_second,
}
rows = []
for name, coefficient, sampler, loss, target in uses:
    grad = expected_gradient(loss, sampler)
    gaps = [(grad - other).abs().max().item() for other in (grad_reverse, grad_forward)]
    for label, expected in targets.items():
        assert ((grad - expected).abs().max().item() < 1e-12) == (label == target), (name, label)
    rows.append([name, coefficient, target] + ["0" if gap < 1e-12 else f"{gap:.3f}" for gap in gaps])

# 系数一列逐样本核对：对 log π 求导得到的就是它
leaf = theta.detach().log_softmax(-1).requires_grad_(True)
log_r = (ref_log_probs - leaf).detach()
k2, k3 = 0.5 * log_r.square(), log_r.expm1() - log_r
rho = (leaf - old_log_probs).exp().detach()
coefficients = [torch.ones(VOCAB_SIZE), -log_r, -log_r, 1 - log_r.exp(), k3]
coefficients += [-log_r, k2 - log_r, -log_r, -log_r, -rho * log_r]
for (name, _, _, loss, _), expected in zip(uses, coefficients, strict=True):
    (actual,) = torch.autograd.grad(loss(leaf).sum(), leaf)
    assert (actual - expected).abs().max().item() < 1e-12, name
assert rows[3][3] == "0.039" and rows[0][3] == "0.154" and rows[8][3] == "0.046"
assert rows[4][3] == "0.146" and rows[6][3] == "0.063"
Markdown(
    tabulate(
        rows,
        headers=["写法", "系数", "期望梯度", "与反向差", "与前向差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: bandit-convergence
#| caption: 六臂老虎机上用精确梯度训练，纵轴是当前策略到最优策略的 KL：三种正确写法归零，k3 损失停在 0.268，k1 损失与不加惩罚重合，k3 进奖励也塌到一个臂
#| echo: fold
BETA, STEPS, LR = 0.5, 300, 2.0
bandit_ref = torch.tensor([0.40, 0.25, 0.15, 0.10, 0.07, 0.03]).log()  # (6)
rewards = torch.tensor([0.0, 0.1, 0.2, 0.3, 0.5, 1.0])
optimum = (bandit_ref + rewards / BETA).log_softmax(-1)  # π* ∝ π_ref·exp(奖励/β)
penalties = {
    "不加惩罚": lambda lp, ref: torch.zeros_like(lp),
    "k1 损失": kl_k1,
    "k1 进奖励": lambda lp, ref: kl_reward_surrogate(kl_k1(lp, ref), lp),
    "k2 损失": kl_k2,
    "ρ·k3 损失": lambda lp, ref: kl_k3_importance_weighted(lp, lp, ref),
    "k3 损失": kl_k3,
    "k3 进奖励": lambda lp, ref: kl_reward_surrogate(kl_k3(lp, ref), lp),
}
logits = bandit_ref.repeat(len(penalties), 1)  # 每行一种写法，都从 π_ref 出发
curves = []
for _ in range(STEPS):
    curves.append(kl_categorical(logits, optimum.expand_as(logits)))
    leaf = logits.clone().requires_grad_(True)
    log_probs = leaf.log_softmax(-1)
    penalty = torch.stack(
        [use(row, bandit_ref) for use, row in zip(penalties.values(), log_probs, strict=True)]
    )
    loss = (log_probs.exp().detach() * (-rewards * log_probs + BETA * penalty)).sum()
    logits = logits - LR * torch.autograd.grad(loss, leaf)[0]
curves.append(kl_categorical(logits, optimum.expand_as(logits)))
curves = dict(zip(penalties, torch.stack(curves, 1), strict=True))

fig, ax = plt.subplots(figsize=(6.0, 3.8))
steps = sorted({round(1.06**i) for i in range(98)} & set(range(1, STEPS + 1)))
for name, label, style, color, y in [
    ("k3 进奖励", "k3 进奖励：塌到一个臂", "--", "C3", 2.0),
    ("k1 损失", "k1 损失＝不加惩罚", "-.", "C1", 1.62),
    ("k3 损失", "k3 损失：停在别处", "-", "C2", 0.40),
    ("k2 损失", "k1 进奖励、k2、ρ·k3：0", ":", "C0", 0.12),
]:
    ax.plot(steps, [curves[name][step].item() for step in steps], style, color=color)
    ax.text(26 if name == "k3 进奖励" else 290, y, label, color=color, fontsize=10.5, ha="right", va="center")
ax.set_xscale("log")
ax.set_xlim(1, STEPS)
ax.set_ylim(-0.05, 2.15)
ax.set_xticks([1, 10, 100, 300], ["1", "10", "100", "300"])
ax.set_xlabel("梯度步数（对数轴）")
ax.set_ylabel("到最优策略的 KL（nat）")

final = {name: curve[-1].item() for name, curve in curves.items()}
for name in ("k1 进奖励", "k2 损失", "ρ·k3 损失"):
    assert final[name] < 1e-12, name
assert (curves["k1 损失"] - curves["不加惩罚"]).abs().max().item() < 1e-10
assert f"{final['k3 损失']:.3f}" == "0.268"
assert f"{final['k3 进奖励']:.3f} {final['不加惩罚']:.3f}" == "1.927 1.909"  # k3 进奖励塌得更彻底
assert logits[-1].softmax(-1)[5].item() > 1 - 1e-6  # k3 进奖励：概率全在第 6 个臂
# k3 损失的不动点有闭式：奖励 − β·前向 KL 的极值点 π ∝ π_ref/(λ − 奖励)
low, high = 1.0 + 1e-9, 10.0
for _ in range(100):
    middle = (low + high) / 2
    low, high = (middle, high) if (BETA * bandit_ref.exp() / (middle - rewards)).sum() > 1 else (low, middle)
fixed_point = BETA * bandit_ref.exp() / (low - rewards)
assert (logits[5].softmax(-1) - fixed_point).abs().max().item() < 1e-6

# %%
#| label: wrong-formulas
#| caption: 三个 token 的例子上，四种错误写法的期望与真值对照；真值是反向 KL，0.275
#| echo: fold
policy, reference = torch.tensor([0.5, 0.3, 0.2]).log(), torch.tensor([0.2, 0.3, 0.5]).log()
truth = kl_categorical(policy, reference).item()
log_r = reference - policy  # 正确的方向：log π_ref − log π
wrong = {
    "r 取倒数的 k1": log_r,
    "r 取倒数的 k3": kl_k3(reference, policy),
    "k3 写成加 log r": log_r.exp() - 1 + log_r,
    "k2 丢了二分之一": log_r.square(),
}
correct = {"k1": kl_k1(policy, reference), "k3": kl_k3(policy, reference), "k2": kl_k2(policy, reference)}
means = {name: (policy.exp() * value).sum().item() for name, value in (wrong | correct).items()}
assert abs(means["k1"] - truth) < 1e-12 and abs(means["k3"] - truth) < 1e-12
assert abs(means["r 取倒数的 k1"] + truth) < 1e-12 and abs(means["k3 写成加 log r"] + truth) < 1e-12
assert abs(means["k2 丢了二分之一"] - 2 * means["k2"]) < 1e-12
assert f"{truth:.3f} {means['r 取倒数的 k1']:.3f} {means['r 取倒数的 k3']:.3f}" == "0.275 -0.275 0.355"
assert f"{means['k2']:.3f} {means['k2 丢了二分之一']:.3f}" == "0.294 0.588"
Markdown(tabulate(means.items(), headers=["写法", "样本来自 π 时的期望"], tablefmt="github", floatfmt=".3f"))

# %%
#| label: sequence-gradient
#| caption: 长度 3、词表 3 的序列，几种写法的期望梯度与整条序列 KL 的精确梯度相比：逐 token 的损失都丢了后续项
#| echo: fold
LENGTH, WIDTH = 3, 3
sequences = torch.tensor(list(itertools.product(range(WIDTH), repeat=LENGTH)))  # (27, T)
# 每个前缀一行 logits：空前缀 1 行、长 1 的 3 行、长 2 的 9 行
prefixes = torch.stack(
    [torch.zeros(27, dtype=torch.long), 1 + sequences[:, 0], 4 + 3 * sequences[:, 0] + sequences[:, 1]], 1
)
sequence_generator = torch.Generator().manual_seed(1)
prefix_ref = torch.randn(13, WIDTH, generator=sequence_generator)
prefix_theta = (prefix_ref + torch.randn(13, WIDTH, generator=sequence_generator)).requires_grad_(True)


def token_log_probs(table):
    return table.log_softmax(-1)[prefixes, sequences]  # (27, T)


ref_tokens = token_log_probs(prefix_ref)
tokens = token_log_probs(prefix_theta)
sequence_kl = (tokens.sum(1).exp() * (tokens.sum(1) - ref_tokens.sum(1))).sum()
exact_grad = torch.autograd.grad(sequence_kl, prefix_theta)[0].flatten()


def reward_to_go(kl):
    return kl.flip(1).cumsum(1).flip(1)


sequence_uses = {
    "k1 进奖励，累加到结尾": lambda lp: kl_reward_surrogate(reward_to_go(kl_k1(lp, ref_tokens)), lp).sum(1),
    "k2，整条序列的 log r": lambda lp: kl_k2(lp.sum(1), ref_tokens.sum(1)),
    "k2，逐 token": lambda lp: kl_k2(lp, ref_tokens).sum(1),
    "ρ·k3，逐 token": lambda lp: kl_k3_importance_weighted(lp, lp, ref_tokens).sum(1),
    "k3，逐 token": lambda lp: kl_k3(lp, ref_tokens).sum(1),
}
rows = []
for name, use in sequence_uses.items():
    lp = token_log_probs(prefix_theta)
    grad = torch.autograd.grad((lp.sum(1).exp().detach() * use(lp)).sum(), prefix_theta)[0].flatten()
    error = ((grad - exact_grad).norm() / exact_grad.norm()).item()
    rows.append([name, torch.cosine_similarity(grad, exact_grad, 0).item(), error])
assert rows[0][2] < 1e-12 and rows[1][2] < 1e-12
assert (
    abs(rows[2][2] - rows[3][2]) < 1e-12 and f"{rows[2][1]:.3f}" == "0.982" and f"{rows[2][2]:.3f}" == "0.265"
)
assert f"{rows[4][1]:.3f}" == "0.955" and f"{rows[4][2]:.3f}" == "0.507"
rows = [[name, cosine, abs(error) if error > 1e-12 else 0.0] for name, cosine, error in rows]
Markdown(tabulate(rows, headers=["写法", "余弦", "相对误差"], tablefmt="github", floatfmt=".3f"))


# %%
#| label: float32-pitfalls
#| caption: float32 下三种常见写法的结果与准确值对照，前四行 kl_k3 都得到准确值
#| echo: fold
def float32(value):
    return torch.tensor(value, dtype=torch.float32)


rows = []
for exponent in (3, 4, 5):
    small = float32(10.0**-exponent)
    naive = (small.exp() - 1 - small).item()
    stable = kl_k3(-small[None], torch.zeros(1, dtype=torch.float32)).item()
    truth = math.expm1(small.item()) - small.item()
    assert abs(stable / truth - 1) < 1e-3  # expm1 的写法三位有效数字都对
    rows.append([f"$\\log r=10^{{-{exponent}}}$", "exp 减 1", f"{naive:.2e}", f"{truth:.2e}"])
assert rows[2][2:] == ["1.36e-08", "5.00e-11"]

low, low_ref = float32([-110.0]), float32([-109.0])
quotient = (low_ref.exp() / low.exp() - 1 - (low_ref - low)).item()
truth = math.expm1(1.0) - 1.0
assert math.isnan(quotient) and abs(kl_k3(low, low_ref).item() / truth - 1) < 1e-6
rows.append(["$\\log\\pi=-110$", "先 exp 再除", "nan", f"{truth:.3f}"])

rare = float32([-4.0]).requires_grad_(True)  # r = e^3，约 20：当前策略忘掉的 token
unclamped = kl_k3(rare, float32([-1.0]))
clamped = unclamped.clamp(-10.0, 10.0)
grads = [
    torch.autograd.grad(value.sum(), rare, retain_graph=True)[0].item() for value in (clamped, unclamped)
]
assert grads[0] == 0.0 and f"{grads[1]:.1f}" == f"{1 - math.exp(3):.1f}" == "-19.1"
rows.append(["$\\log r=3$，梯度", "截到 10", "0", f"{grads[1]:.1f}"])
rows = [[cell.replace("e-0", "e-") for cell in row] for row in rows]
Markdown(tabulate(rows, headers=["输入", "写法", "得到", "准确值"], tablefmt="github", disable_numparse=True))
