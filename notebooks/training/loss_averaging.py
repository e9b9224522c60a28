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
# # 梯度累积等于大 batch 吗：loss 的三次平均：实验
#
# 页面 docs/training/loss-averaging.md 的实验：每个 token 的权重、梯度误差、多卡的乘 W、训练轨迹与各种错法，全部在 CPU 上用 float64 执行。

# %%
#| label: setup
import copy

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.nn.functional import one_hot

from snippets.training.loss_averaging import (
    accumulate_gradients,
    count_valid_labels,
    global_sequence_mean_loss,
    global_token_mean_loss,
    naive_mean_of_means_loss,
    token_cross_entropy,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
V, C = 12, 8

# 长回答与短回答来自两条不同的马尔可夫链：长度与内容相关，和真实数据一样
chain_long = torch.softmax(2 * torch.randn(V, V), dim=-1)
chain_short = torch.softmax(2 * torch.randn(V, V), dim=-1)
model = nn.Sequential(nn.Embedding(V, C), nn.Tanh(), nn.Linear(C, V))


def sample(chain, num_targets):
    """一条有 num_targets 个预测目标的序列，形状 (1, num_targets + 1)。"""
    ids = [int(torch.randint(V, ()))]
    for _ in range(num_targets):
        ids.append(int(torch.multinomial(chain[ids[-1]], 1)))
    return torch.tensor([ids])


def collate(sequences):
    """右侧补齐：输入补 0，标签补 -100。"""
    width = max(s.shape[1] for s in sequences)
    input_ids = torch.zeros(len(sequences), width, dtype=torch.long)
    labels = torch.full((len(sequences), width), -100)
    for row, s in enumerate(sequences):
        input_ids[row, : s.shape[1]] = s[0]
        labels[row, : s.shape[1]] = s[0]
    return input_ids, labels


def flat_grad(net):
    """取出并清零全部梯度，拼成一个向量。"""
    grad = torch.cat([p.grad.flatten() for p in net.parameters()])
    net.zero_grad()
    return grad


def big_batch_grad(net, sequences):
    """真值：所有序列放进一个 batch，PyTorch 自己的 token 平均。"""
    input_ids, labels = collate(sequences)
    loss = nn.functional.cross_entropy(net(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    loss.backward()
    return loss.detach(), flat_grad(net)


def naive_grad(net, micro_batches):
    """一张卡上的朴素累积：每个微批取均值，再除以累积步数。"""
    total = torch.zeros(())
    for input_ids, labels in micro_batches:
        loss = naive_mean_of_means_loss(net(input_ids), labels, grad_accum_steps=len(micro_batches))
        loss.backward()
        total += loss.detach()
    return total, flat_grad(net)


def reduced(loss_fn, ranks):
    """DDP 的通信语义：每张卡累加自己的微批，再对各卡求平均；返回 loss 与梯度。"""
    losses, grads = [], []
    for micro_batches in ranks:
        for input_ids, labels in micro_batches:
            loss = loss_fn(model(input_ids), labels)
            loss.backward()
            losses.append(loss.detach())
        grads.append(flat_grad(model))
    return torch.stack(losses).sum() / len(ranks), torch.stack(grads).mean(0)


def naive_mean(num_steps):
    return lambda logits, labels: naive_mean_of_means_loss(logits, labels, grad_accum_steps=num_steps)


def global_mean(num_items, *, dp_size):
    return lambda logits, labels: global_token_mean_loss(
        logits, labels, num_items_in_batch=num_items, dp_size=dp_size
    )


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def cosine(a, b):
    return torch.cosine_similarity(a, b, dim=0).item()


# %%
#| label: token-weights
#| caption: 两张卡、每卡两个微批，反向传播量出的每个 token 的权重：朴素写法随微批变，正确写法处处是 1/120
#| echo: fold
counts = [[60, 30], [20, 10]]  # counts[w][m]：第 w 张卡、第 m 个微批的有效 token 数
W, M = 2, 2
num_total = sum(sum(row) for row in counts)


def measured_weight(loss_fn, num_targets):
    """从 logits 的梯度反推权重：单个 token 的梯度是 w * (softmax - onehot)。"""
    input_ids, labels = collate([sample(chain_long, num_targets)])
    logits = model(input_ids).detach().requires_grad_()
    loss_fn(logits, labels).backward()
    unit = (logits.softmax(-1) - one_hot(input_ids.roll(-1, 1), V))[:, :-1].detach()
    weights = (logits.grad[:, :-1] * unit).sum(-1) / unit.square().sum(-1)
    assert torch.allclose(weights, weights[0, 0].expand_as(weights))  # 同一微批内处处相同
    return weights[0, 0].item() / W  # 各卡梯度求平均


rows, sums = [], [0.0, 0.0]
for w in range(W):
    for m in range(M):
        n = counts[w][m]
        w_naive = measured_weight(naive_mean(M), n)
        w_global = measured_weight(global_mean(num_total, dp_size=W), n)
        assert abs(w_naive - 1 / (W * M * n)) < 1e-15 and abs(w_global - 1 / num_total) < 1e-15
        sums = [sums[0] + n * w_naive, sums[1] + n * w_global]
        rows.append(
            [
                f"卡 {w + 1}，第 {m + 1} 个",
                n,
                f"1/{round(1 / w_naive)}",
                f"1/{round(1 / w_global)}",
                w_naive / w_global,
            ]
        )
assert max(abs(s - 1) for s in sums) < 1e-14  # 两种写法的权重总和都是 1
assert [round(r[-1], 3) for r in rows] == [0.5, 1.0, 1.5, 3.0]
Markdown(
    tabulate(
        rows,
        headers=["微批", "$N_{w,m}$", "朴素", "正确", "朴素 / 正确"],
        tablefmt="github",
        floatfmt=".1f",
    )
)

# %%
#| label: accumulation-gradient-error
#| caption: 120 个 token 切成两个微批累积：这组数据里切得越不均，朴素写法的梯度偏得越远，方差放大倍数也越大
#| echo: fold
splits = [(60, 60), (100, 20), (110, 10), (119, 1)]
rows, stored = [], {}
for n_a, n_b in splits:
    torch.manual_seed(1)
    sequences = [sample(chain_long, n_a), sample(chain_short, n_b)]
    micro_batches = [collate([s]) for s in sequences]
    full_loss, full_grad = big_batch_grad(model, sequences)
    naive_loss, grad = naive_grad(model, micro_batches)
    correct_loss = accumulate_gradients(model, micro_batches)
    correct_grad = flat_grad(model)
    # 正确写法：前向与梯度都等于一个大 batch，只差舍入
    assert abs(correct_loss - full_loss) < 1e-14 and relative_error(correct_grad, full_grad) < 1e-14
    # loss 的偏差 = -Cov(N, 微批平均 loss) / N 的均值
    n = torch.tensor([n_a, n_b], dtype=torch.float64)
    means = torch.stack([token_cross_entropy(model(x), y).sum() for x, y in micro_batches]).detach() / n
    covariance = ((n - n.mean()) * (means - means.mean())).mean()
    assert abs((naive_loss - full_loss) + covariance / n.mean()) < 1e-14
    variance_ratio = (n.mean() * (1 / n).mean()).item()
    stored[(n_a, n_b)] = (relative_error(grad, full_grad), cosine(grad, full_grad), variance_ratio)
    rows.append([f"{n_a} / {n_b}", (naive_loss - full_loss).item(), *stored[(n_a, n_b)]])
assert stored[(60, 60)][0] < 1e-14
assert stored[(100, 20)][0] < stored[(110, 10)][0] < stored[(119, 1)][0]
assert [f"{e:.2f}" for e, _, _ in stored.values()] == ["0.00", "0.59", "0.80", "2.58"]
assert [f"{c:.2f}" for _, c, _ in stored.values()] == ["1.00", "0.81", "0.67", "-0.08"]
assert [f"{v:.2f}" for _, _, v in stored.values()] == ["1.00", "1.80", "3.27", "30.25"]
assert f"{rows[1][1]:+.3f}" == "-0.015"  # loss 几乎没变，梯度已经差了 59%
Markdown(
    tabulate(
        rows,
        headers=["切分", "loss 差", "梯度误差", "余弦", "方差倍数"],
        tablefmt="github",
        floatfmt=("", "+.3f", ".2f", ".3f", ".2f"),
    )
)

# %%
#| label: data-parallel-gradient-error
#| caption: 同样的四种切分放到两张卡上、梯度取平均：朴素写法与累积的误差完全一样，全局分母漏乘卡数只剩一半梯度，乘上卡数后为零
#| echo: fold
rows = []
for n_a, n_b in splits:
    torch.manual_seed(1)
    sequences = [sample(chain_long, n_a), sample(chain_short, n_b)]
    ranks = [[collate([s])] for s in sequences]  # 每张卡一个微批
    _, full_grad = big_batch_grad(model, sequences)
    _, naive = reduced(naive_mean(1), ranks)
    _, without_factor = reduced(global_mean(n_a + n_b, dp_size=1), ranks)
    _, with_factor = reduced(global_mean(n_a + n_b, dp_size=2), ranks)
    assert abs(relative_error(naive, full_grad) - stored[(n_a, n_b)][0]) < 1e-13
    assert abs(cosine(naive, full_grad) - stored[(n_a, n_b)][1]) < 1e-13
    assert relative_error(2 * without_factor, full_grad) < 1e-14  # 恰好一半，方向不变
    assert relative_error(with_factor, full_grad) < 1e-14
    rows.append(
        [f"{n_a} / {n_b}"] + [relative_error(g, full_grad) for g in (naive, without_factor, with_factor)]
    )
rows = [[name, f"{a:.2f}", f"{b:.2f}", "0" if c < 1e-14 else f"{c:.1e}"] for name, a, b, c in rows]
Markdown(
    tabulate(rows, headers=["切分", "朴素", "漏乘 $W$", "乘 $W$"], tablefmt="github", disable_numparse=True)
)

# %%
#| label: trajectories
#| caption: 同一初始化、同一数据用 AdamW 训练 200 步：正确的累积与大 batch 的参数差停在舍入误差，朴素累积第一步就分岔，token 平均 loss 一直更高
#| echo: fold
torch.manual_seed(2)
# 每次更新 4 条序列：1 长 3 短，每条是一个微批
dataset = [[sample(chain_long, 96)] + [sample(chain_short, n) for n in (3, 5, 8)] for _ in range(8)]
everything = [s for group in dataset for s in group]
eval_ids, eval_labels = collate(everything)
eval_total = int(count_valid_labels(eval_labels))


def train(step_fn, num_steps=200):
    net = copy.deepcopy(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.02, weight_decay=0.01)
    parameters, losses = [], []
    for step in range(num_steps):
        step_fn(net, dataset[step % len(dataset)])
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            losses.append(
                global_token_mean_loss(net(eval_ids), eval_labels, num_items_in_batch=eval_total).item()
            )
        parameters.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    with torch.no_grad():
        sequence_mean = global_sequence_mean_loss(
            net(eval_ids), eval_labels, num_sequences=len(everything)
        ).item()
    return torch.stack(parameters), losses, sequence_mean


def big_step(net, group):
    input_ids, labels = collate(group)
    nn.functional.cross_entropy(net(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()).backward()


def naive_step(net, group):
    for input_ids, labels in (collate([s]) for s in group):
        naive_mean_of_means_loss(net(input_ids), labels, grad_accum_steps=len(group)).backward()


def correct_step(net, group):
    accumulate_gradients(net, [collate([s]) for s in group])


big, big_losses, big_seq = train(big_step)
correct, correct_losses, _ = train(correct_step)
naive, naive_losses, naive_seq = train(naive_step)
gap_correct = (correct - big).norm(dim=1) / big.norm(dim=1)
gap_naive = (naive - big).norm(dim=1) / big.norm(dim=1)

steps = range(1, len(big_losses) + 1)
fig, (top, bottom) = plt.subplots(2, 1, figsize=(6.0, 3.8), sharex=True)
top.plot(steps, naive_losses, "--", color="C1", label="朴素累积")
top.plot(steps, big_losses, "-", color="C0", label="一个大 batch")
top.plot(steps[::20], correct_losses[::20], "o", color="C2", markersize=4, label="正确累积")
top.set_ylabel("token 平均 loss (nat)")
top.legend()
bottom.semilogy(steps[::2], gap_naive[::2], "--", color="C1")
bottom.semilogy(steps[::2], gap_correct[::2], "-", color="C2")
bottom.text(100, 3e-4, "朴素累积", color="C1")
bottom.text(100, 1e-14, "正确累积", color="C2")
bottom.set_ylabel("参数相对差")
bottom.set_xlabel("更新步数")

assert gap_correct.max() < 1e-12 and f"{gap_naive[0]:.3f}" == "0.034" and f"{gap_naive[-1]:.2f}" == "0.77"
assert f"{naive_losses[-1]:.2f}" == "2.16" and f"{big_losses[-1]:.2f}" == "1.64"
assert abs(correct_losses[-1] - big_losses[-1]) < 1e-12
assert all(a > b for a, b in zip(naive_losses, big_losses, strict=True))
# 这里每个微批只有一条序列，朴素累积优化的其实是样本平均；按样本平均量，它反而更低
naive_step(model, dataset[0])
one_per_micro_batch = flat_grad(model)
input_ids, labels = collate(dataset[0])
global_sequence_mean_loss(model(input_ids), labels, num_sequences=len(dataset[0])).backward()
assert relative_error(one_per_micro_batch, flat_grad(model)) < 1e-14
assert f"{naive_seq:.2f}" == "1.81" and f"{big_seq:.2f}" == "2.40"

# %%
#| label: wrong-versions
#| caption: 两张卡、每卡两个微批、带 padding 的一次更新：七种写法报告的 loss、梯度与真值的范数比和余弦，以及 AdamW 首步更新的相对误差
#| echo: fold
torch.manual_seed(3)
sequences = [
    [[sample(chain_long, 40), sample(chain_short, 6)], [sample(chain_long, 25), sample(chain_short, 3)]],
    [[sample(chain_short, 5), sample(chain_short, 2)], [sample(chain_short, 9)]],
]  # sequences[w][m]
W, M = 2, 2
ranks = [[collate(group) for group in rank] for rank in sequences]
all_labels = [labels for rank in ranks for _, labels in rank]
n_valid = sum(int(count_valid_labels(labels)) for labels in all_labels)
n_unshifted = sum(int(labels.ne(-100).sum()) for labels in all_labels)
n_padded = sum(labels[:, 1:].numel() for labels in all_labels)
truth = big_batch_grad(model, [s for rank in sequences for group in rank for s in group])

# 把最后一个微批的标签全换成 -100，真值里也去掉它
masked_ids, masked_labels = ranks[1][1]
masked_ranks = [ranks[0], [ranks[1][0], (masked_ids, torch.full_like(masked_labels, -100))]]
masked_valid = n_valid - int(count_valid_labels(masked_labels))
masked_truth = big_batch_grad(model, [s for group in (*sequences[0], sequences[1][0]) for s in group])


def adamw_update(grad):
    """从零状态走一步 AdamW，返回更新量。"""
    p = nn.Parameter(torch.zeros_like(grad))
    p.grad = grad.clone()
    torch.optim.AdamW([p], lr=1.0, weight_decay=0.0).step()
    return p.detach()


versions = {
    "正确": (reduced(global_mean(n_valid, dp_size=W), ranks), truth),
    "均值的均值": (reduced(naive_mean(M), ranks), truth),
    "再除一次 $M$": (reduced(global_mean(n_valid * M, dp_size=W), ranks), truth),
    "漏乘 $W$": (reduced(global_mean(n_valid, dp_size=1), ranks), truth),
    "标签不移位": (reduced(global_mean(n_unshifted, dp_size=W), ranks), truth),
    "数了 padding": (reduced(global_mean(n_padded, dp_size=W), ranks), truth),
    "均值遇上全 -100": (reduced(naive_mean(M), masked_ranks), masked_truth),
}
rows, result = [], {}
for name, ((loss, grad), (_, full_grad)) in versions.items():
    size = (grad.norm() / full_grad.norm()).item()
    update = relative_error(adamw_update(grad), adamw_update(full_grad))
    result[name] = (size, cosine(grad, full_grad), update)
    shown_loss = "NaN" if loss.isnan() else f"{loss:.3f}"
    shown_update = "0" if update < 1e-14 else f"{update:.1f}" if update > 0.1 else f"{update:.0e}"
    rows.append([name, shown_loss, f"{size:.3f}", f"{result[name][1]:.3f}", shown_update])
assert (n_valid, n_unshifted, n_padded) == (90, 97, 149)
assert (
    relative_error(versions["正确"][0][1], truth[1]) < 1e-14
    and abs(versions["正确"][0][0] - truth[0]) < 1e-14
)
assert f"{result['均值的均值'][1]:.2f}" == "0.74" and f"{result['均值的均值'][2]:.1f}" == "0.8"
assert f"{versions['均值的均值'][0][0] - truth[0]:.3f}" == "0.003" and rows[1][3] == "0.743"
scale_only = ["再除一次 $M$", "漏乘 $W$", "标签不移位", "数了 padding"]
assert [f"{result[k][0]:.3f}" for k in scale_only] == ["0.500", "0.500", "0.928", "0.604"]
assert all(abs(result[k][1] - 1) < 1e-12 and result[k][2] < 1e-4 for k in scale_only)  # 只差一个常数
assert rows[2][4] == "4e-05"
# 全 -100：loss 是 NaN，梯度却没有 NaN，只是被空的微批稀释
nan_loss, diluted = versions["均值遇上全 -100"][0]
assert nan_loss.isnan() and not diluted.isnan().any() and f"{result['均值遇上全 -100'][0]:.3f}" == "0.716"
masked_loss, masked_grad = reduced(global_mean(masked_valid, dp_size=W), masked_ranks)
assert relative_error(masked_grad, masked_truth[1]) < 1e-14 and abs(masked_loss - masked_truth[0]) < 1e-14
Markdown(
    tabulate(
        rows,
        headers=["写法", "loss", "范数比", "余弦", "AdamW 误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: sequence-versus-token
#| caption: 三条样本有 10、100、20 个 token：token 平均按长度分权重，样本平均每条三分之一，短样本的单个 token 重 10 倍
#| echo: fold
torch.manual_seed(4)
lengths = [10, 100, 20]
input_ids, labels = collate([sample(chain_long, n) for n in lengths])
rows = []
shares = {}
for name, loss_fn in {
    "token": lambda z: global_token_mean_loss(z, labels, num_items_in_batch=sum(lengths)),
    "seq": lambda z: global_sequence_mean_loss(z, labels, num_sequences=len(lengths)),
}.items():
    logits = model(input_ids).detach().requires_grad_()
    loss_fn(logits).backward()
    unit = (logits.softmax(-1) - one_hot(input_ids.roll(-1, 1), V))[:, 0].detach()  # 每条样本的第一个目标
    shares[name] = (logits.grad[:, 0] * unit).sum(-1) / unit.square().sum(-1)
for n, w_token, w_seq in zip(lengths, shares["token"].tolist(), shares["seq"].tolist(), strict=True):
    assert abs(w_token - 1 / 130) < 1e-15 and abs(w_seq - 1 / (3 * n)) < 1e-15
    rows.append([n, n * w_token, n * w_seq, w_seq / w_token])
assert abs(shares["seq"][0] / shares["seq"][1] - 10) < 1e-12
assert [f"{r[-1]:.2f}" for r in rows] == ["4.33", "0.43", "2.17"]
Markdown(
    tabulate(
        rows,
        headers=["token 数", "token 平均：样本权重", "样本平均：样本权重", "单个 token 权重比"],
        tablefmt="github",
        floatfmt=("", ".3f", ".3f", ".2f"),
    )
)
