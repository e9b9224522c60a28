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
# # GRPO 中可以去掉 KL 吗：实验
#
# 页面 docs/rl/grpo-without-kl.md 的数字和图都在这里算出来。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clip_fraction
from snippets.rl.dr_grpo import question_weight
from snippets.rl.grpo import group_advantages, grpo_loss
from snippets.rl.grpo_without_kl import fixed_point_success_rate, grpo_direction

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
GROUP_SIZE = 8


def kl_divergence(probs, other):
    """KL(probs ‖ other)，概率为 0 的项按 0 算。"""
    return torch.xlogy(probs, probs).sum().item() - torch.xlogy(probs, other).sum().item()


def train(ref, rewards, *, beta, steps, lr):
    """从参考策略出发，按精确的期望方向走；返回每一步的策略 (steps+1, V)。"""
    logits, path = ref.log(), [ref]
    for _ in range(steps):
        logits = logits + lr * grpo_direction(logits, ref.log(), rewards, group_size=GROUP_SIZE, beta=beta)
        path.append(logits.softmax(-1))
    return torch.stack(path)


# %%
#| label: kl-and-entropy
#| caption: 上图是到参考策略的 KL，下图是策略的熵，四条线是四个 KL 系数：前几步几乎重合，之后系数越大越早往回走，没有 KL 的熵一直掉到零附近
ref = torch.tensor([0.12, 0.05, 0.03, 0.30, 0.20, 0.15, 0.10, 0.05])  # 前三条是对的，成功率 0.2
correct = torch.tensor([1.0, 1, 1, 0, 0, 0, 0, 0])
STEPS = 1000
paths = {beta: train(ref, correct, beta=beta, steps=STEPS, lr=2.0) for beta in (0.0, 0.01, 0.04, 0.2)}

marks = sorted({round(1.12**i) for i in range(61)} & set(range(1, STEPS + 1)) | {STEPS})
fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True)
for (beta, path), style, color in zip(
    paths.items(), ("-", "--", "-.", ":"), ("C3", "C1", "C2", "C0"), strict=True
):
    top.plot(marks, [kl_divergence(path[t], ref) for t in marks], style, color=color, label=f"β={beta:g}")
    bottom.plot(marks, [-torch.xlogy(path[t], path[t]).sum().item() for t in marks], style, color=color)
top.axhline(-math.log(0.2), color="C4", linewidth=0.8)
top.text(1.1, -math.log(0.2) + 0.08, "全对至少要 1.609", color="C4", fontsize=10)
top.set_ylim(0, 2.4)
bottom.set_ylim(0, 2.0)
bottom.set_xscale("log")
bottom.set_xlim(1, STEPS)
bottom.set_xticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
bottom.set_xlabel("更新步数（对数轴）")
top.set_ylabel("KL（nat）")
bottom.set_ylabel("熵（nat）")
top.legend(
    ncol=4, fontsize=10, loc="upper center", bbox_to_anchor=(0.5, 1.32), frameon=False, handlelength=1.6
)

ends = {}
for beta, path in paths.items():
    p = path[-1]
    rate, entropy = (p * correct).sum().item(), -torch.xlogy(p, p).sum().item()
    floor = rate * math.log(rate / 0.2) + (1 - rate) * math.log((1 - rate) / 0.8)  # 数据处理不等式
    assert kl_divergence(p, ref) >= floor - 1e-9
    ends[beta] = (
        f"{rate:.4f}",
        f"{kl_divergence(p, ref):.2f}",
        f"{entropy:.3f}",
        f"{p[0] / rate:.3f}",
        floor,
    )
assert ends[0.0][:4] == ("0.9998", "2.12", "0.004", "1.000")
assert ends[0.2][:4] == ("0.9304", "1.26", "1.227", "0.600")  # 对的三条回到参考里的比例 0.12/0.20
assert abs(kl_divergence(paths[0.2][-1], ref) - ends[0.2][4]) < 1e-4  # 没有多花一点 KL
assert ends[0.04][0] == "0.9865" and f"{float(ends[0.01][2]):.2f}" == "0.08"
# 与不动点的熵比：β 越小，回得越慢；β=0.04 还在往回走
half, last = (-torch.xlogy(paths[0.04][t], paths[0.04][t]).sum().item() for t in (STEPS // 2, STEPS))
assert half + 0.05 < last
for beta, expected in ((0.01, "0.96"), (0.04, "1.01"), (0.2, "1.23")):
    rate = fixed_point_success_rate(torch.tensor([0.2]), beta=beta, group_size=GROUP_SIZE)
    limit = ref * torch.where(correct > 0, rate / 0.2, (1 - rate) / 0.8)
    assert f"{-torch.xlogy(limit, limit).sum().item():.2f}" == expected
early = [(path[10] * correct).sum().item() for path in paths.values()]
assert f"{min(early):.2f} {max(early):.2f}" == "0.91 0.97"
assert f"{-math.log(0.2):.3f}" == "1.609"

# %%
#| label: verifier-and-proxy
#| caption: 同样的 KL 系数，奖励是检查器时的真实成功率，与奖励有漏洞时的真实成功率、钻漏洞的概率
# 三类回答：对的（0.20）、钻漏洞的（0.05，真实得分 0，代理奖励 1.2）、错的（0.75）
proxy_ref, truth = torch.tensor([0.20, 0.05, 0.75]), torch.tensor([1.0, 0.0, 0.0])
proxy = torch.tensor([1.0, 1.2, 0.0])
rows, hacked = [], {}
for beta in (0.0, 0.04, 0.2, 1.0, 2.0):
    clean = train(proxy_ref, truth, beta=beta, steps=300, lr=1.0)[-1]
    path = train(proxy_ref, proxy, beta=beta, steps=600, lr=0.5)
    hacked[beta] = path
    rows.append(
        [
            f"{beta:g}",
            clean[0].item(),
            path[-1, 0].item(),
            path[-1, 1].item(),
            (path[-1] * proxy).sum().item(),
        ]
    )
    if beta:
        target = fixed_point_success_rate(torch.tensor([0.2]), beta=beta, group_size=GROUP_SIZE).item()
        assert abs(clean[0].item() - target) < 2e-3
shown = {row[0]: [f"{value:.3f}" for value in row[1:]] for row in rows}
assert shown["0"] == ["0.999", "0.001", "0.999", "1.199"]
assert shown["0.04"] == ["0.987", "0.004", "0.984", "1.185"]
assert shown["0.2"][:3] == ["0.930", "0.024", "0.911"]
assert shown["1"][:3] == ["0.618", "0.358", "0.294"] and shown["2"][:3] == ["0.413", "0.350", "0.115"]
# 漏洞少见（参考只给 0.005）：没有 KL 时先被压到 0.001，第 400 步看着没事，第 500 步已经翻转；有 KL 时翻转得更早
rare_ref = torch.tensor([0.20, 0.005, 0.795])
rare = {beta: train(rare_ref, proxy, beta=beta, steps=500, lr=1.0) for beta in (0.0, 0.04, 0.2)}
assert [f"{rare[0.0][t, 0]:.3f}" for t in (400, 500)] == ["0.995", "0.006"]
assert f"{rare[0.0][:, 1].min():.3f}" == "0.001"
flips = {beta: 20 + int((path[20:, 0] < 0.5).int().argmax()) for beta, path in rare.items()}
assert flips == {0.0: 466, 0.04: 180, 0.2: 124}  # 真实成功率跌破 0.5 的步数
Markdown(
    tabulate(
        [[beta, *values] for beta, values in shown.items()],
        headers=[r"$\beta$", "检查器：真实", "代理：真实", "代理：漏洞", "代理：奖励"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: proxy-frontier
#| caption: 奖励有漏洞时，真实成功率随到参考策略的 KL 怎么走：五个 KL 系数都先升后降，升的一段几乎重合，系数越大折返得越早
fig, ax = plt.subplots(figsize=(6.0, 3.6))
peaks = {}
for (beta, path), style, color in zip(
    hacked.items(),
    ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1))),
    ("C3", "C1", "C2", "C0", "C5"),
    strict=True,
):
    keep = sorted({*range(90), *range(90, 601, 30)})
    distance = [kl_divergence(path[t], proxy_ref) for t in keep]
    rate = [path[t, 0].item() for t in keep]
    ax.plot(distance, rate, color=color, linestyle=style, label=f"β={beta:g}")
    ax.plot(distance[-1:], rate[-1:], "o", color=color, markersize=6)
    best = int(path[:, 0].argmax())
    peaks[beta] = (best, f"{path[best, 0]:.3f}", f"{kl_divergence(path[best], proxy_ref):.2f}")
ax.set_xlim(0, 3.1)
ax.set_ylim(0, 1.0)
ax.set_xlabel("到参考策略的 KL（nat），圆点是终点")
ax.set_ylabel("真实成功率")
ax.legend(fontsize=10, loc="upper right", frameon=False)

assert peaks[0.0] == (15, "0.849", "1.11") and peaks[0.04][1] == "0.836" and peaks[0.2][1] == "0.782"
assert peaks[1.0][1:] == ("0.531", "0.33") and peaks[2.0][1] == "0.375"
# 同样的 KL 处比较：上升段上，带 KL 的路径不高于不带 KL 的
free = [(kl_divergence(p, proxy_ref), p[0].item()) for p in hacked[0.0][:16]]
gaps = []
for beta in (0.04, 0.2, 1.0, 2.0):
    for p in hacked[beta][1 : peaks[beta][0] + 1]:
        x = kl_divergence(p, proxy_ref)
        (x0, y0), (x1, y1) = next((a, b) for a, b in zip(free, free[1:], strict=False) if a[0] <= x <= b[0])
        gaps.append(p[0].item() - (y0 + (y1 - y0) * (x - x0) / (x1 - x0)))
assert len(gaps) > 30 and -0.02 < min(gaps) and max(gaps) < 0.01  # 同样的 KL，真实成功率差不到 0.02

# %%
#| label: what-bounds-the-step
#| caption: 真实采样的 GRPO，没有 KL 项：更新 25、100、250 批之后到参考策略的 KL，单位奈特；前六行每批只更新一次
NUM_PROMPTS, VOCAB = 16, 6
world = torch.Generator().manual_seed(100)
ref_logits = torch.randn(NUM_PROMPTS, VOCAB, generator=world)
answers = torch.randint(VOCAB, (NUM_PROMPTS, 1), generator=world)
payoff = torch.zeros(NUM_PROMPTS, VOCAB).scatter(1, answers, 1.0)
everything = torch.ones(NUM_PROMPTS * GROUP_SIZE, 1, dtype=torch.bool)


def sampled_run(lr, *, adam=False, max_grad_norm=math.inf, inner_steps=1, clip=0.2):
    """真实采样、真实损失（beta=0，不需要参考策略）；返回各批之后的 KL 与裁剪比例。"""
    generator = torch.Generator().manual_seed(0)
    theta = ref_logits.clone().requires_grad_()
    first, second, updates = torch.zeros_like(ref_logits), torch.zeros_like(ref_logits), 0  # Adam 的两个矩
    drift, fractions = {}, []
    for batch in range(1, 251):
        old = theta.detach().log_softmax(-1)
        picks = torch.multinomial(old.exp(), GROUP_SIZE, replacement=True, generator=generator)  # (P, G)
        old_log_probs = old.gather(1, picks).reshape(-1, 1)
        advantages = group_advantages(payoff.gather(1, picks).flatten(), group_size=GROUP_SIZE)
        for _ in range(inner_steps):
            log_probs = theta.log_softmax(-1).gather(1, picks).reshape(-1, 1)
            widths = {"clip_low": clip, "clip_high": clip}
            loss = grpo_loss(log_probs, old_log_probs, None, advantages, everything, beta=0.0, **widths)
            fractions.append(
                clip_fraction(
                    log_probs.detach(), old_log_probs, advantages[:, None], everything.double(), **widths
                ).item()
            )
            theta.grad = None
            loss.backward()
            torch.nn.utils.clip_grad_norm_([theta], max_grad_norm)
            step, updates = theta.grad, updates + 1
            if adam:  # 与 torch.optim.Adam 的默认值相同：0.9、0.999、1e-8
                first = 0.9 * first + 0.1 * step
                second = 0.999 * second + 0.001 * step.square()
                step = first / (1 - 0.9**updates) / ((second / (1 - 0.999**updates)).sqrt() + 1e-8)
            theta.data -= lr * step
        if batch in (25, 100, 250):
            new = theta.detach().log_softmax(-1)
            drift[batch] = (new.exp() * (new - ref_logits.log_softmax(-1))).sum(1).mean().item()
    return [drift[25], drift[100], drift[250], sum(fractions) / len(fractions)]


runs = {
    "SGD": sampled_run(5.0),
    "SGD，范数 0.01": sampled_run(5.0, max_grad_norm=0.01),
    "SGD，范数 0.001": sampled_run(5.0, max_grad_norm=0.001),
    "Adam": sampled_run(0.02, adam=True),
    "Adam，范数 0.01": sampled_run(0.02, adam=True, max_grad_norm=0.01),
    "Adam，范数 0.001": sampled_run(0.02, adam=True, max_grad_norm=0.001),
    "SGD，每批 4 步": sampled_run(5.0, inner_steps=4),
    "同上，不裁剪": sampled_run(5.0, inner_steps=4, clip=math.inf),
}
ceiling = -ref_logits.log_softmax(-1).gather(1, answers).mean().item()  # 每题只有一个正确答案，KL 的上限
assert f"{ceiling:.2f}" == "2.28"
cells = {name: [f"{value:.3f}" for value in values[:3]] for name, values in runs.items()}
once = list(runs.values())[:6]
assert all(values[3] == 0.0 for values in once) and runs["SGD，每批 4 步"][3] > 0  # 每批一步：没有 token 被裁
assert all(a < b < c for a, b, c, _ in runs.values())  # 一直在走远
assert cells["SGD"] == ["0.765", "2.159", "2.237"]
slow, slower = runs["SGD，范数 0.01"], runs["SGD，范数 0.001"]
assert cells["SGD，范数 0.01"] == ["0.010", "0.151", "0.766"] and cells["SGD，范数 0.001"][2] == "0.010"
assert abs(slower[2] / slow[0] - 1) < 0.03  # 阈值小 10 倍：250 批走到原来 25 批的地方
small, tiny = runs["Adam，范数 0.01"], runs["Adam，范数 0.001"]
assert all(abs(a - b) < 5e-4 for a, b in zip(small[:3], tiny[:3], strict=True))  # Adam 几乎不变
assert cells["Adam，范数 0.01"] == cells["Adam，范数 0.001"]
assert cells["Adam"] == ["0.046", "0.990", "2.095"] and cells["Adam，范数 0.001"] == [
    "0.045",
    "0.919",
    "2.146",
]
assert cells["SGD，每批 4 步"] == ["1.597", "2.227", "2.256"] and cells["同上，不裁剪"] == [
    "2.106",
    "2.246",
    "2.264",
]
Markdown(
    tabulate(
        [[name, *values] for name, values in cells.items()],
        headers=["更新方式", "25 批", "100 批", "250 批"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: moving-reference
#| caption: 检查器奖励、组大小 8 时成功率的不动点：参考策略本来就好、几乎不会、以及每次收敛后把参考换成当前策略
rows, points = [], {}
for beta in (0.001, 0.04, 0.2, 1.0, 2.6):
    good, bad = fixed_point_success_rate(torch.tensor([0.5, 0.001]), beta=beta, group_size=GROUP_SIZE)
    refreshed = [bad[None]]
    for _ in range(2):
        refreshed.append(fixed_point_success_rate(refreshed[-1], beta=beta, group_size=GROUP_SIZE))
    points[beta] = [f"{value:.4f}" for value in (good, bad, refreshed[1].squeeze(), refreshed[2].squeeze())]
    rows.append([f"{beta:g}", *points[beta]])

assert points[0.001] == ["0.9998", "0.9996", "1.0000", "1.0000"]
assert points[0.04] == ["0.9919", "0.9835", "0.9997", "1.0000"]
assert points[1.0] == ["0.8079", "0.4292", "0.7699", "0.9252"] and points[2.6][1] == "0.0129"
assert 0.0129 < 0.001 * 2.6 / (2.6 - (GROUP_SIZE - 1) / math.sqrt(GROUP_SIZE))  # 放大的倍数有上限 β/(β−w(0))
# 差多少：1 − p ≈ β(1 − p_ref)/w，w 在 p→1 时是 (G−1)/√G
ceiling_weight = (GROUP_SIZE - 1) / math.sqrt(GROUP_SIZE)
assert f"{ceiling_weight:.3f}" == "2.475"
assert (
    abs(
        0.04 * 0.8 / ceiling_weight
        - (1 - fixed_point_success_rate(torch.tensor([0.2]), beta=0.04, group_size=8))
    )
    < 3e-4
)
# 反向 KL：logit 平移 w/β，w 最小在 p=0.5 处
weight_min = question_weight(torch.linspace(0, 1, 1001), group_size=GROUP_SIZE).min().item()
assert f"{weight_min:.3f} {weight_min / 0.04:.1f}" == "1.736 43.4"
Markdown(
    tabulate(
        rows,
        headers=[r"$\beta$", "参考 0.5", "参考 0.001", "刷新 1 次", "刷新 2 次"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: reference-cost
#| caption: 一个 70 亿参数模型的粗账：训练用 bf16 权重与梯度加 fp32 主权重和 Adam 两个矩，计算按每 token 前向 2N、反向 4N，N 是参数个数
PARAMS = 7e9
items = [  # 名称，每参数字节数，每 token 的计算量（单位 N）
    ("策略：训练", 2 + 2 + 4 + 4 + 4, 6),
    ("策略：采样", 0, 2),
    ("策略：重算旧对数概率", 0, 2),
    ("参考策略：前向", 2, 2),
]
rows = [[name, size * PARAMS / 1e9, flops] for name, size, flops in items]
memory, compute = (items[3][k] / sum(item[k] for item in items) for k in (1, 2))
assert [row[1] for row in rows] == [112.0, 0.0, 0.0, 14.0]
assert f"{memory:.1%} {compute:.1%}" == "11.1% 16.7%" and f"{2 / 10:.0%}" == "20%"
Markdown(tabulate(rows, headers=["项目", "显存（GB）", "每 token（N）"], tablefmt="github", floatfmt=".0f"))
