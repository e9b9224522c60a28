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
# # 混合专家（mixture of experts）：实验
#
# 页面 `docs/architecture/moe.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.moe import (
    combine_experts,
    expert_capacity,
    expert_counts,
    load_balancing_loss,
    sigmoid_top_k_routing,
    softmax_top_k_routing,
    updated_expert_bias,
    within_capacity,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def max_violation(counts):
    """最忙的专家比平均多出的比例。"""
    return counts.max().item() / counts.double().mean().item() - 1


# %%
#| label: balance-loss-values
#| caption: 五种路由下最大的负载比例、负载均衡损失、它对路由 logits 的梯度范数
BIG = 40.0  # 概率只差 1e-17
cases = {}
cases["均匀，概率随意", 4, 1] = (
    torch.tensor([[3.0, 1, 0, 0], [1, 3, 2, 0], [0, 2, 3, 1], [0, 0, 1, 1.5]]),
    None,
)
cases["塌缩", 8, 1] = (torch.tensor([[BIG] + [0.0] * 7] * 4), None)
cases["塌缩", 8, 2] = (torch.tensor([[BIG, BIG] + [0.0] * 6] * 4), None)
cases["3 : 1 的负载", 2, 1] = (torch.tensor([[1e-9, 0.0]] * 3 + [[0.0, BIG]]), None)
cases["全选", 4, 4] = (cases["均匀，概率随意", 4, 1][0], None)

rows, value = [], {}
for (name, num_experts, top_k), (logits, _) in cases.items():
    logits = logits.clone().requires_grad_()
    probs = torch.softmax(logits, dim=-1)
    _, selected = softmax_top_k_routing(logits, top_k=top_k)
    loss = load_balancing_loss(probs, selected)
    (grad,) = torch.autograd.grad(loss, logits)
    if name == "3 : 1 的负载":
        assert grad[:3, 0].min() > 0  # 梯度下降把忙的 0 号压低
    counts = expert_counts(selected, num_experts=num_experts)
    load = counts / selected.numel()
    count_only = num_experts * load.square().sum()  # 不经过 P 的写法
    assert not count_only.requires_grad
    value[name, top_k] = loss.item(), grad.norm().item(), count_only.item()
    rows.append(
        [f"{name}，$E={num_experts}$，$k={top_k}$", f"{load.max():.2f}", f"{loss:.3f}", f"{grad.norm():.3f}"]
    )

assert value["均匀，概率随意", 1][0] == 1.0 and value["均匀，概率随意", 1][1] < 1e-15
assert abs(value["塌缩", 1][0] - 8) < 1e-9 and abs(value["塌缩", 2][0] - 4) < 1e-9
assert value["塌缩", 1][1] < 1e-9  # 概率饱和之后，损失最大，梯度却是 0
assert abs(value["3 : 1 的负载", 1][0] - 0.875) < 1e-8 and value["3 : 1 的负载", 1][1] > 0.15
assert value["3 : 1 的负载", 1][2] == 1.25  # 只用计数：2 (9/16 + 1/16)
assert abs(value["全选", 4][0] - 1) < 1e-15 and value["全选", 4][1] < 1e-15
Markdown(
    tabulate(
        rows,
        headers=["路由", "最大的 $f_i$", r"$\mathcal L_{\text{bal}}$", "梯度范数"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: collapse-and-bias
#| caption: 左：最忙的专家收到的份额，横线是均匀的四分之一，不加均衡时超过一半，系数 1 时在 0.3 左右；右：偏置的步长 0.1 一直振荡，0.001 收敛慢，0.01 降得最低
C, E, N, STEPS = 8, 4, 128, 150


def train_router(seed, coefficient, count_only=False):
    """top-1、不归一化。四个簇各有一个线性映射，四个线性专家；簇心有共同的偏移。"""
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(E, C, C, generator=generator) / math.sqrt(C)
    centers = torch.randn(E, C, generator=generator) + 1.0
    router = (0.1 * torch.randn(E, C, generator=generator)).requires_grad_()
    experts = (0.1 * torch.randn(E, C, C, generator=generator)).requires_grad_()
    optimizer = torch.optim.Adam([router, experts], lr=0.02)
    busiest, idle, losses = [], [], []
    for _ in range(STEPS):
        cluster = torch.randint(E, (N,), generator=generator)
        hidden = centers[cluster] + 0.5 * torch.randn(N, C, generator=generator)
        logits = hidden @ router.T
        weights, selected = softmax_top_k_routing(logits, top_k=1, renormalize=False)
        out = combine_experts(hidden, weights, selected, [lambda x, m=m: x @ m for m in experts])
        task = (out - torch.einsum("nc,ncd->nd", hidden, maps[cluster])).square().mean()
        counts = expert_counts(selected, num_experts=E)
        if count_only:
            balance = E * (counts / N).square().sum()
        else:
            balance = load_balancing_loss(torch.softmax(logits, dim=-1), selected)
        optimizer.zero_grad()
        (task + coefficient * balance).backward()
        optimizer.step()
        busiest.append(counts.max().item() / N)
        idle.append((counts < 0.02 * N).sum().item())
        losses.append(task.item())
    return busiest, idle, losses


def tail(values, count=20):
    return sum(values[-count:]) / count


SEEDS = range(4)
runs = {a: [train_router(seed, a) for seed in SEEDS] for a in (0.0, 0.1, 1.0)}

rates = (0.1, 0.01, 0.001)
violation = {}
skew = torch.linspace(1.5, -1.5, 16)
for rate in rates:
    generator = torch.Generator().manual_seed(0)
    bias, violation[rate] = torch.zeros(16), []
    for _ in range(200):
        logits = torch.randn(1024, 16, generator=generator) + skew
        _, selected = sigmoid_top_k_routing(logits, bias, top_k=4)
        counts = expert_counts(selected, num_experts=16)
        violation[rate].append(max_violation(counts))
        bias = updated_expert_bias(bias, counts, update_rate=rate)

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.4))
for (a, color, line), name in zip(
    ((0.0, "C1", "-"), (0.1, "C2", "--"), (1.0, "C0", ":")), ("无", "0.1", "1"), strict=True
):
    mean = [sum(r[0][t] for r in runs[a]) / len(SEEDS) for t in range(STEPS)]
    smooth = [sum(mean[max(0, t - 9) : t + 1]) / len(mean[max(0, t - 9) : t + 1]) for t in range(0, STEPS, 3)]
    axes[0].plot(range(0, STEPS, 3), smooth, line, color=color, label=f"系数 {name}")
axes[0].axhline(1 / E, color="C4", linewidth=1)
axes[0].set(xlabel="步数", ylabel="最忙专家的份额", ylim=(0.2, 1.0))
axes[0].legend(loc="upper right")
for rate, color, line in zip(rates, ("C1", "C0", "C2"), ("-", "-", "--"), strict=True):
    axes[1].plot(
        range(0, 200, 2), violation[rate][::2], line, color=color, linewidth=1.2, label=f"步长 {rate}"
    )
axes[1].set(xlabel="步数", ylabel="最忙的比平均多出（倍）", ylim=(0, 2.9))
axes[1].legend(loc="upper right")

idle_tail = {a: [tail(r[1]) for r in runs[a]] for a in runs}
loss_tail = {a: [tail(r[2]) for r in runs[a]] for a in runs}
hard = train_router(0, 1.0, count_only=True)
assert hard[1] == runs[0.0][0][1] and hard[2] == runs[0.0][0][2]  # 只用计数：与不加逐步相同
busiest_tail = {a: [tail(r[0]) for r in runs[a]] for a in runs}
assert all(0.54 < x < 0.765 for x in busiest_tail[0.0]) and max(busiest_tail[1.0]) < 0.32
assert all(0.9 < x < 2.2 for x in idle_tail[0.0]) and max(idle_tail[1.0]) == 0.0
assert all(b < a for a, b in zip(loss_tail[0.0], loss_tail[1.0], strict=True))  # 任务损失反而更低
start = violation[0.01][0]
assert 1.7 < start < 2.1
assert 0.10 < tail(violation[0.01], 50) < 0.20 and 0.6 < tail(violation[0.1], 50) < 0.9
assert 0.6 < tail(violation[0.001], 50) < 1.0 and violation[0.001][100] > 1.2


# %%
#| label: capacity-drops
#| caption: 随机均匀路由 4096 个 token，容量系数 1 与 1.25 时被丢弃的比例：模拟、二项分布的精确期望、正态近似
def expected_drop(num_tokens, num_experts, capacity):
    """top-1 均匀路由：每个专家收到 X ~ Binomial(N, 1/E)，丢弃 E·E[(X - 容量)+]/N。"""
    p, total = 1 / num_experts, 0.0
    for x in range(capacity + 1, num_tokens + 1):
        log_pmf = (
            math.lgamma(num_tokens + 1)
            - math.lgamma(x + 1)
            - math.lgamma(num_tokens - x + 1)
            + x * math.log(p)
            + (num_tokens - x) * math.log1p(-p)
        )
        total += (x - capacity) * math.exp(log_pmf)
    return num_experts * total / num_tokens


NUM_TOKENS = 4096
generator = torch.Generator().manual_seed(0)
rows, drop = [], {}
for num_experts in (8, 64, 256):
    for factor in (1.0, 1.25):
        capacity = expert_capacity(
            num_tokens=NUM_TOKENS, num_experts=num_experts, top_k=1, capacity_factor=factor
        )
        trials = []
        for _ in range(10):
            selected = torch.randint(num_experts, (NUM_TOKENS, 1), generator=generator)
            kept = within_capacity(selected, num_experts=num_experts, capacity=capacity)
            trials.append(1 - kept.double().mean().item())
        exact = expected_drop(NUM_TOKENS, num_experts, capacity)
        drop[num_experts, factor] = exact
        assert abs(sum(trials) / 10 - exact) < 0.1 * exact + 8e-4
        approx = math.sqrt(num_experts / (2 * math.pi * NUM_TOKENS)) if factor == 1.0 else None
        assert approx is None or abs(approx / exact - 1) < 0.08
        rows.append(
            [
                num_experts,
                factor,
                f"{sum(trials) / 10:.2%}",
                f"{exact:.2%}",
                "—" if approx is None else f"{approx:.2%}",
            ]
        )

expected = {(8, 1.0): 1.65, (64, 1.0): 4.94, (256, 1.0): 9.90, (64, 1.25): 0.13, (256, 1.25): 2.28}
assert all(abs(100 * drop[key] - x) < 0.005 for key, x in expected.items()) and drop[8, 1.25] < 1e-6
Markdown(
    tabulate(
        rows,
        headers=["$E$", "容量系数", "模拟", "精确期望", r"$\sqrt{E/2\pi N}$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: all-to-all-bytes
#| caption: DeepSeek-V3 的尺寸下，一个 token 经过一个 MoE 层时按节点收发的字节数，含本节点的一份
#| echo: hide
WIDTH, ROUTED, TOP_K, NODES, LIMIT = 7168, 256, 8, 8, 4
per_node = ROUTED // NODES
spread = NODES * (1 - math.comb(ROUTED - per_node, TOP_K) / math.comb(ROUTED, TOP_K))  # 随机选时命中的节点数
rows, kib = [], {}
for name, copies in (
    ("每个专家各发一份", float(TOP_K)),
    ("每个节点只发一份，随机选", spread),
    ("每个节点只发一份，限 4 个节点", float(LIMIT)),
):
    dispatch, combine = copies * WIDTH * 1, copies * WIDTH * 2  # FP8 发，BF16 收
    kib[name] = (dispatch + combine) / 1024
    rows.append(
        [name, f"{copies:.2f}", f"{dispatch / 1024:.0f}", f"{combine / 1024:.0f}", f"{kib[name]:.0f}"]
    )
assert [r[-1] for r in rows] == ["168", "111", "84"] and rows[1][1] == "5.29"
Markdown(
    tabulate(
        rows,
        headers=["发法", "份数", "分发 KiB", "合并 KiB", "合计 KiB"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: sequence-or-batch
#| caption: 两条序列各属一个领域、各用一半专家：逐条序列算损失是 2 且有梯度，合成一批算损失是 1、梯度为 0
logits = torch.full((2, 8, 8), -6.0)
for domain in range(2):
    for token in range(8):
        logits[domain, token, 4 * domain + token % 4] = 0.0
logits.requires_grad_()


def batch_loss(x):
    probs = torch.softmax(x, dim=-1)
    return load_balancing_loss(probs, softmax_top_k_routing(x, top_k=1)[1])


per_sequence = (batch_loss(logits[0]) + batch_loss(logits[1])) / 2
whole = batch_loss(logits.flatten(0, 1))
rows, norms = [], []
for name, loss in (("逐条序列，再平均", per_sequence), ("整批一起算", whole)):
    norms.append(torch.autograd.grad(loss, logits)[0].norm().item())
    rows.append([name, f"{loss:.2f}", f"{norms[-1]:.4f}"])
assert abs(per_sequence.item() - 2) < 0.05 and abs(whole.item() - 1) < 1e-12
assert norms[0] > 1e-3 and norms[1] < 1e-15
Markdown(
    tabulate(
        rows,
        headers=["均衡的范围", r"$\mathcal L_{\text{bal}}$", "梯度范数"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
# 页面正文里的其他数字。
# 加偏置选、不加偏置算：偏置 0.3 时，误加进权重会把两个专家的权重从 1/3、2/3 改成多少。
logits = torch.tensor([[math.log(3), 0.0, -math.log(3)]])
bias = torch.tensor([-0.6, 0.0, 0.3])
weights, selected = sigmoid_top_k_routing(logits, bias, top_k=2)
wrong = (torch.sigmoid(logits) + bias).gather(1, selected)
wrong = wrong / wrong.sum(-1, keepdim=True)
assert (
    selected.tolist() == [[2, 1]] and abs(weights[0, 0] - 1 / 3) < 1e-12 and abs(wrong[0, 0] - 0.5238) < 1e-4
)

# z-loss 与均衡无关：给所有 logits 加同一个数，路由不变，z-loss 变；均匀但很大的 logits 也被惩罚。
flat = torch.zeros(4, 8)
assert abs(torch.logsumexp(flat, -1).square().mean() - 4.32) < 0.01
assert abs(torch.logsumexp(flat + 10, -1).square().mean() - 145.9) < 0.1
collapsed = torch.full((4, 8), -20.0)
collapsed[:, 0] = 0.0  # 全部选 0 号
assert torch.logsumexp(collapsed, -1).square().mean() < 1e-12
assert abs(load_balancing_loss(torch.softmax(collapsed, -1), collapsed.topk(1).indices) - 8) < 1e-6

# 总参数与激活参数：Mixtral 8x7B。
width, inner, layers, vocab = 4096, 14336, 32, 32000
attention = 2 * width * width + 2 * width * 1024
expert = 3 * width * inner
shared_part = 2 * vocab * width + width + layers * (attention + 8 * width + 2 * width)
assert shared_part + layers * 8 * expert == 46_702_792_704
assert shared_part + layers * 2 * expert == 12_879_925_248
assert abs(8 * expert * layers / 46_702_792_704 - 0.966) < 0.001

# 细粒度：16 选 2 与 64 选 8。
assert math.comb(16, 2) == 120 and math.comb(64, 8) == 4_426_165_368
# 58 个 MoE 层，4096 个 token，限 4 个节点：前向跨节点最多收发多少。
assert abs(84 * 1024 * 58 * 4096 / 2**30 - 19.0) < 0.1
