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
# # PPO 的 clip 细节：实验
#
# 页面 docs/rl/clip.md 的数字和图都在这里算出来。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import (
    cispo_loss,
    clip_fraction,
    clipped_surrogate_loss,
    clipped_tokens,
    dual_clip_loss,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def objective_and_grad(loss_fn, ratio, advantage):
    """目标 J（损失的相反数）与 ∂J/∂logπ，对一串重要性比值逐个求，梯度来自 autograd。"""
    ratio = torch.as_tensor(ratio)[None, :]
    log_probs = ratio.log().requires_grad_()
    loss = loss_fn(log_probs, torch.zeros_like(ratio), torch.full_like(ratio, advantage))
    (grad,) = torch.autograd.grad(loss.sum(), log_probs)
    return -loss.detach()[0], -grad[0]


def from_ratio(objective):
    """把「目标是 ρ 和优势的函数」包成与参考代码同签名的损失，用来画错误写法。"""
    return lambda log_probs, old, advantages: -objective((log_probs - old).exp(), advantages)


def clip(ratio):
    return ratio.clamp(0.8, 1.2)


# %%
#| label: region-table
#| caption: 优势符号与比值区间的六格，外加负优势、比值 4 的一行：目标值与对 log π 的梯度，只有两格的梯度是零
rows, cells = [], {}
for advantage, ratio in [
    (1.0, 0.5),
    (1.0, 1.1),
    (1.0, 1.5),
    (-1.0, 0.5),
    (-1.0, 1.1),
    (-1.0, 1.5),
    (-1.0, 4.0),
]:
    value, grad = objective_and_grad(clipped_surrogate_loss, [ratio], advantage)
    cells[advantage, ratio] = (value.item(), grad.item())
    note = "被裁剪" if grad.item() == 0 else "照常更新"
    rows.append([f"{advantage:+.0f}", ratio, value.item(), grad.item() + 0.0, note])

zero = {key for key, (_, grad) in cells.items() if grad == 0}
assert zero == {(1.0, 1.5), (-1.0, 0.5)}
for (advantage, ratio), (value, grad) in cells.items():
    if (advantage, ratio) not in zero:
        assert abs(grad - ratio * advantage) < 1e-12 and abs(value - ratio * advantage) < 1e-12
assert abs(cells[1.0, 1.5][0] - 1.2) < 1e-12 and abs(cells[-1.0, 0.5][0] + 0.8) < 1e-12
assert abs(cells[-1.0, 4.0][1] + 4.0) < 1e-12

Markdown(
    tabulate(rows, headers=[r"$\hat A$", r"$\rho$", "目标", "梯度", ""], tablefmt="github", floatfmt=".1f")
)

# %%
#| label: objective-curves
#| caption: 目标随比值的变化：优势为正时 PPO 只在右侧变平，优势为负时只在左侧变平；去掉 min 则两侧都平
ratio = torch.linspace(0.013, 4.0, 200)  # 避开端点 0.8、1.2、3
bare = from_ratio(lambda r, adv: clip(r) * adv)
fig, axes = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True)
curves = {}
for axis, advantage in zip(axes, [1.0, -1.0], strict=True):
    axis.axvspan(0.8, 1.2, color="C4", alpha=0.25, linewidth=0)
    for name, loss_fn, style in [
        ("只有 clip", bare, "C1--"),
        ("双侧裁剪", dual_clip_loss, "C2:"),
        ("PPO", clipped_surrogate_loss, "C0-"),
    ]:
        value, _ = objective_and_grad(loss_fn, ratio, advantage)
        curves[name, advantage] = value
        if name != "双侧裁剪" or advantage < 0:
            axis.plot(ratio, value, style, label=name)
    axis.set_ylabel(f"目标（优势 {advantage:+.0f}）")
axes[1].legend(loc="lower left")
axes[1].set_xlabel("重要性比值 ρ（灰带：0.8 到 1.2）")

assert curves["PPO", 1.0].max() == 1.2 and (curves["PPO", 1.0][ratio < 0.8] < 0.8).all()
assert curves["PPO", -1.0].max() == -0.8 and curves["PPO", -1.0].min() == -4.0
assert curves["双侧裁剪", -1.0].min() == -3.0 and torch.equal(curves["双侧裁剪", 1.0], curves["PPO", 1.0])
assert all((curves["PPO", adv] <= ratio * adv + 1e-12).all() for adv in [1.0, -1.0])

# %%
#| label: gradient-curves
#| caption: 目标对 log π 的梯度随比值的变化：PPO 各有一侧归零，双侧裁剪再切掉负优势下大于 3 的部分，CISPO 处处非零
fig, axes = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True)
grads = {}
for axis, advantage in zip(axes, [1.0, -1.0], strict=True):
    axis.axvspan(0.8, 1.2, color="C4", alpha=0.25, linewidth=0)
    for name, loss_fn, style in [
        ("CISPO", lambda *args: cispo_loss(*args, clip_high=0.2), "C3-."),
        ("只有 clip", bare, "C1--"),
        ("双侧裁剪", dual_clip_loss, "C2:"),
        ("PPO", clipped_surrogate_loss, "C0-"),
    ]:
        _, grad = objective_and_grad(loss_fn, ratio, advantage)
        grads[name, advantage] = grad
        if name != "双侧裁剪" or advantage < 0:
            axis.plot(ratio, grad, style, label=name)
    axis.set_ylabel(f"梯度（优势 {advantage:+.0f}）")
axes[1].legend(loc="lower left")
axes[1].set_xlabel("重要性比值 ρ（灰带：0.8 到 1.2）")

outside = (ratio < 0.8) | (ratio > 1.2)
assert torch.equal(grads["PPO", 1.0] == 0, ratio > 1.2) and torch.equal(grads["PPO", -1.0] == 0, ratio < 0.8)
assert torch.equal(grads["只有 clip", 1.0] == 0, outside) and torch.equal(
    grads["只有 clip", -1.0] == 0, outside
)
assert torch.equal(grads["双侧裁剪", -1.0] == 0, (ratio < 0.8) | (ratio > 3))
assert torch.equal(grads["双侧裁剪", 1.0], grads["PPO", 1.0])
assert (grads["CISPO", 1.0] > 0).all() and (grads["CISPO", -1.0] < 0).all()
assert grads["CISPO", 1.0].max() == 1.2 and grads["PPO", -1.0].min() == -4.0

# %%
#| label: wrong-variants
#| caption: 四种区间外的情形下，五种写法给 log π 的梯度；只有 PPO 的写法是两格为零且零在该零的地方
variants = {
    "PPO": clipped_surrogate_loss,
    "不裁剪": from_ratio(lambda r, adv: r * adv),
    "只有 clip": bare,
    "min 换成 max": from_ratio(lambda r, adv: torch.maximum(r * adv, clip(r) * adv)),
    "先 min 再乘优势": from_ratio(lambda r, adv: torch.minimum(r, clip(r)) * adv),
}
corners = [(1.0, 0.5), (1.0, 1.5), (-1.0, 0.5), (-1.0, 1.5)]
table = {
    name: [objective_and_grad(loss_fn, [r], adv)[1].item() + 0.0 for adv, r in corners]
    for name, loss_fn in variants.items()
}
assert table["PPO"] == [0.5, 0.0, 0.0, -1.5]
assert table["不裁剪"] == [0.5, 1.5, -0.5, -1.5]
assert table["只有 clip"] == [0.0, 0.0, 0.0, 0.0]
assert table["min 换成 max"] == [0.0, 1.5, -0.5, 0.0]
assert table["先 min 再乘优势"] == [0.5, 0.0, -0.5, 0.0]
# 在对数里裁 ±0.2，区间是另一个
assert [f"{x:.3f}" for x in torch.tensor([-0.2, 0.2]).exp().tolist()] == ["0.819", "1.221"]

headers = ["写法", "+1, 0.5", "+1, 1.5", "−1, 0.5", "−1, 1.5"]
Markdown(tabulate([[k, *v] for k, v in table.items()], headers=headers, tablefmt="github", floatfmt=".1f"))

# %%
#| label: bandit-inner-steps
#| caption: 同一批样本上做多步更新后的重要性比值：第一步裁剪与不裁剪完全相同；步数多了裁剪明显收窄分布，但仍有大量 token 在区间外
CONTEXTS, ACTIONS, FEATURES = 256, 16, 8


def bandit(seed):
    """带特征的 softmax 赌博机：256 个情境、16 个动作，共享一个 8×16 的参数矩阵，优势是标准化的奖励。"""
    generator = torch.Generator().manual_seed(seed)
    features = torch.randn(CONTEXTS, FEATURES, generator=generator) / FEATURES**0.5
    weights = torch.randn(FEATURES, ACTIONS, generator=generator)
    rewards = torch.randn(CONTEXTS, ACTIONS, generator=generator)
    actions = torch.multinomial((features @ weights).softmax(-1), 1, generator=generator)
    sampled = rewards.gather(1, actions)
    return features, weights, actions, (sampled - sampled.mean()) / sampled.std()


def inner_steps(loss_fn, steps, lr, seed=0):
    """在同一批样本上做 steps 步 SGD；返回参数、指标，以及被裁剪的 token 下一步离 1 更远的占比。"""
    features, start, actions, advantages = bandit(seed)
    old_full = (features @ start).log_softmax(-1)
    old = old_full.gather(1, actions)
    weights, further, clipped_total = start.clone().requires_grad_(), 0, 0
    for _ in range(steps):
        log_probs = (features @ weights).log_softmax(-1).gather(1, actions)
        (grad,) = torch.autograd.grad(loss_fn(log_probs, old, advantages).mean(), weights)
        clipped = clipped_tokens(log_probs, old, advantages)
        before = ((log_probs.detach() - old).exp() - 1).abs()
        weights = (weights.detach() - lr * grad).requires_grad_()
        after = (features @ weights.detach()).log_softmax(-1).gather(1, actions)
        further += (((after - old).exp() - 1).abs() > before)[clipped].sum().item()
        clipped_total += clipped.sum().item()
    new_full = (features @ weights.detach()).log_softmax(-1)
    new = new_full.gather(1, actions)
    ratio = (new - old).exp()
    low, high = torch.quantile(ratio, torch.tensor([0.01, 0.99])).tolist()
    return {
        "weights": weights.detach(),
        "range": f"{low:.2f}–{high:.2f}" if high < 10 else f"{low:.1g}–{high:.0f}",
        "max": ratio.max().item(),
        "outside": ((ratio - 1).abs() > 0.2).double().mean().item(),
        "clip_fraction": clip_fraction(new, old, advantages, torch.ones_like(ratio)).item(),
        "kl": (old_full.exp() * (old_full - new_full)).sum(-1).mean().item(),
        "further": further / max(clipped_total, 1),
    }


no_clip = variants["不裁剪"]
rows, runs = [], {}
for steps, lr in [(1, 5.0), (4, 5.0), (16, 5.0), (64, 5.0), (1, 80.0)]:
    free, ppo = inner_steps(no_clip, steps, lr), inner_steps(clipped_surrogate_loss, steps, lr)
    runs[steps, lr] = (free, ppo)
    label = f"{steps} 步" if lr == 5.0 else "1 步，学习率 ×16"
    rows.append([label, free["range"], ppo["range"], f"{ppo['outside']:.1%}", f"{ppo['clip_fraction']:.1%}"])

for lr in [5.0, 80.0]:
    assert torch.equal(runs[1, lr][0]["weights"], runs[1, lr][1]["weights"])
free, ppo = runs[16, 5.0]
assert f"{free['max']:.1f}" == "9.0" and f"{ppo['max']:.1f}" == "1.9"
assert f"{ppo['outside']:.1%}" == "37.5%" and f"{ppo['clip_fraction']:.1%}" == "32.8%"
assert f"{free['kl']:.2f}" == "0.13" and f"{ppo['kl']:.2f}" == "0.02"
assert f"{ppo['further']:.0%}" == "62%"
assert (free["range"], ppo["range"]) == ("0.25–7.62", "0.62–1.49")
assert f"{runs[1, 80.0][1]['outside']:.1%}" == f"{runs[1, 80.0][0]['outside']:.1%}" == "64.5%"
further = []
for seed in range(5):
    free, ppo = inner_steps(no_clip, 16, 5.0, seed), inner_steps(clipped_surrogate_loss, 16, 5.0, seed)
    assert ppo["kl"] < free["kl"] / 3 and 0.25 < ppo["outside"] < free["outside"]
    further.append(ppo["further"])
assert (f"{min(further):.0%}", f"{max(further):.0%}") == ("59%", "66%")

headers = ["同一批样本", "不裁剪：ρ 的 1%–99%", "裁剪：ρ 的 1%–99%", "裁剪：在区间外", "裁剪：梯度为零"]
Markdown(tabulate(rows, headers=headers, tablefmt="github"))

# %%
#| label: clip-higher-reach
#| caption: 上侧宽度决定梯度停在哪里：低概率 token 的 logit 余量小，高概率 token 永远碰不到上限
rows, reach = [], {}
for old_prob in [0.01, 0.1, 0.5, 0.9]:
    old_prob = torch.tensor(old_prob)
    cells = []
    for clip_high in [0.2, 0.28]:
        stop = old_prob * (1 + clip_high)
        reach[old_prob.item(), clip_high] = stop.item()
        room = f"{torch.logit(stop) - torch.logit(old_prob):.2f}" if stop < 1 else "∞"
        cells += [f"{stop:.4g}" if stop < 1 else "到不了", room]
    rows.append([f"{old_prob:.2f}", *cells])

assert abs(reach[0.01, 0.2] - 0.012) < 1e-12 and abs(reach[0.01, 0.28] - 0.0128) < 1e-12
assert abs(reach[0.9, 0.2] - 1.08) < 1e-12
assert [row[2] for row in rows] == ["0.18", "0.20", "0.41", "∞"]
assert round(1 / 1.2, 3) == 0.833 and round(1 / 1.28, 3) == 0.781
# 上限不是硬的：一步把 0.01 的 logit 加 1，概率就到 0.027，比值 2.7
jumped = torch.sigmoid(torch.logit(torch.tensor(0.01)) + 1)
assert f"{jumped:.3f}" == "0.027" and f"{jumped / 0.01:.1f}" == "2.7"

headers = ["旧概率", "ε=0.2 停在", "logit 余量", "ε=0.28 停在", "logit 余量"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))
