# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kb:
#     tcp: true
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 梯度累积：代码与显存：实验
#
# 页面 docs/training/gradient-accumulation.md 的实验：循环的各种错法、激活的峰值、真的两进程 DDP 的归约次数、三类例外，全部在 CPU 上用 float64 执行。

# %%
#| label: setup
import copy
import warnings

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from snippets.architecture.embedding import info_nce
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.training.gradient_accumulation import record_all_reduces, saved_bytes_trace, train_epoch
from snippets.training.loss_averaging import accumulate_gradients, count_valid_labels, global_token_mean_loss
from snippets.training.memory import llama_activation_bytes, model_state_bytes, output_bytes
from snippets.training.zero import launch

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
V, C = 12, 8
M, MAX_NORM = 2, 0.45
# 5 个微批、各 2 条序列，目标 token 数各不相同：窗口是 2、2、1 个微批
LENGTHS = [(6, 5), (4, 2), (9, 17), (3, 40), (30, 24)]
net = nn.Sequential(nn.Embedding(V, C), nn.Linear(C, 4 * C), nn.Tanh(), nn.Linear(4 * C, V))


def collate(sequences):
    """右侧补齐：输入补 0，标签补 -100。"""
    pad = nn.utils.rnn.pad_sequence
    return pad(sequences, batch_first=True), pad(sequences, batch_first=True, padding_value=-100)


sequences = [[torch.randint(V, (n + 1,)) for n in lengths] for lengths in LENGTHS]
micro_batches = [collate(group) for group in sequences]


def mean_loss(model, input_ids, labels):
    """PyTorch 自己的 token 平均。"""
    return nn.functional.cross_entropy(model(input_ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def flat_grad(model):
    grad = torch.cat([p.grad.flatten() for p in model.parameters()])
    model.zero_grad()
    return grad


def relative_error(a, b):
    return ((a - b).norm() / b.norm()).item()


def show(x):
    return "0" if x < 1e-12 else f"{x:.3f}"


# %%
#| label: loop-traps
#| caption: 训练一轮之后参数走过的路与大 batch 的相对差：正确的循环是 0，八种错法各差多少
#| echo: fold
def optimizers(kind):
    model = copy.deepcopy(net)
    lr = {"SGD": 0.5, "AdamW": 0.01}[kind]
    optimizer = getattr(torch.optim, kind)(model.parameters(), lr=lr)
    return model, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.7)


def big_batch_epoch(kind):
    """真值：每个窗口的序列放进一个 batch，一次反向。"""
    model, optimizer, scheduler = optimizers(kind)
    norms = []
    for start in range(0, len(sequences), M):
        optimizer.zero_grad()
        mean_loss(model, *collate([s for group in sequences[start : start + M] for s in group])).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
        scheduler.step()
    return flat(model) - flat(net), norms


def wrong_epoch(kind, bug):
    """只在 `bug` 这一处写错的循环；bug 为空时是正确的。"""
    model, optimizer, scheduler = optimizers(kind)
    scale = 2.0**16 if bug == "clip-scaled" else 1.0
    for start in range(0, len(micro_batches), M):
        window = micro_batches[start : start + M]
        if bug == "skip-last" and len(window) < M:
            break
        num_items = sum(int(count_valid_labels(labels)) for _, labels in window)
        optimizer.zero_grad()
        for input_ids, labels in window:
            if bug == "zero-each":
                optimizer.zero_grad()
            if bug in ("mean-of-means", "no-division"):
                loss = mean_loss(model, input_ids, labels) / (len(window) if bug == "mean-of-means" else 1)
            else:
                loss = global_token_mean_loss(model(input_ids), labels, num_items_in_batch=num_items)
            if bug == "last-over-m":
                loss = loss * len(window) / M
            (loss * scale).backward()
            if bug == "clip-each":
                nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            if bug == "scheduler-each":
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")  # PyTorch 会警告调度早于更新
                    scheduler.step()
        if bug != "clip-each":
            nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        for p in model.parameters():
            p.grad /= scale
        optimizer.step()
        if bug != "scheduler-each":
            scheduler.step()
    return flat(model) - flat(net)


NAMES = {
    "mean-of-means": "均值的均值",
    "no-division": "取均值，不除步数",
    "last-over-m": "不满的窗口也除以 $M$",
    "zero-each": "每个微批都清零",
    "skip-last": "丢掉不满的窗口",
    "clip-each": "逐微批裁剪",
    "clip-scaled": "先裁剪后反缩放",
    "scheduler-each": "每个微批走一次调度",
}
truth = {kind: big_batch_epoch(kind) for kind in ("SGD", "AdamW")}
ours, errors = {}, {}
for kind, (path, norms) in truth.items():
    model, optimizer, scheduler = optimizers(kind)
    history = train_epoch(
        model, micro_batches, optimizer, grad_accum_steps=M, max_norm=MAX_NORM, scheduler=scheduler
    )
    assert len(history) == 3 and max(abs(h[1] - n) for h, n in zip(history, norms, strict=True)) < 1e-14
    ours[kind] = relative_error(flat(model) - flat(net), path)
    assert ours[kind] < 1e-12 and relative_error(wrong_epoch(kind, ""), path) < 1e-12
    errors[kind] = {bug: relative_error(wrong_epoch(kind, bug), path) for bug in NAMES}
assert truth["SGD"][1][0] > MAX_NORM > truth["SGD"][1][1]  # 裁剪有的窗口起作用，有的不起
assert all(errors["SGD"][bug] > 0.13 for bug in NAMES) and show(errors["SGD"]["mean-of-means"]) == "0.231"
assert [show(errors[kind]["last-over-m"]) for kind in truth] == ["0.184", "0.045"]
assert [show(errors[kind]["clip-scaled"]) for kind in truth] == ["1.000", "0.183"]
rows = [["本页的循环", *(show(ours[k]) for k in truth)]]
rows += [[name, *(show(errors[k][bug]) for k in truth)] for bug, name in NAMES.items()]
Markdown(tabulate(rows, headers=["写法", "SGD", "AdamW"], tablefmt="github", disable_numparse=True))

# %%
#| label: saved-bytes-trace
#| caption: 自动求导存着的字节数随执行的变化：逐个反向是四个矮锯齿，loss 相加后一次反向与大 batch 一样高
#| echo: fold
batch = torch.randint(V, (8, 33))


def chunks(num):
    return [(x.clone(), x.clone()) for x in batch.chunk(num)]


def backward_each(num):
    pairs = chunks(num)
    return lambda: accumulate_gradients(net, pairs)


def backward_once(num):
    pairs = chunks(num)
    total = sum(int(count_valid_labels(y)) for _, y in pairs)
    return lambda: sum(
        global_token_mean_loss(net(x), y, num_items_in_batch=total) for x, y in pairs
    ).backward()


def trace_and_grad(step):
    trace = saved_bytes_trace(step, parameters=net.parameters())
    return trace, flat_grad(net)


peaks, grads = {}, {}
fig, ax = plt.subplots(figsize=(6.0, 3.0))
for name, step, style in [
    ("一个大 batch", backward_each(1), "C0--"),
    ("4 个微批，逐个反向", backward_each(4), "C1-"),
    ("4 个微批，loss 相加后一次反向", backward_once(4), "C2-."),
]:
    trace, grads[name] = trace_and_grad(step)
    peaks[name] = max(trace)
    ax.plot([0, *(b / 1024 for b in trace)], style, label=name)
ax.set_xlabel("保存与释放的次序")
ax.set_ylabel("存着的激活（KiB）")
ax.set_ylim(0, 175)
ax.legend(loc="upper right", fontsize=10)
big, each, once = peaks.values()
assert (big, each, once) == (113224, 28312, 113248), peaks
assert big - 8 == 4 * (each - 8) and once == 4 * each  # 8 字节是每次 nll_loss 存下的总权重
assert all(relative_error(g, grads["一个大 batch"]) < 1e-13 for g in grads.values())
for num in (2, 8):
    assert 0 <= max(trace_and_grad(backward_each(num))[0]) - (big - 8) // num <= 16

# %%
#| label: model-bytes
#| caption: Qwen2.5-7B 每卡 8 条 4096 token，单位 GB：激活随步数按比例降，模型状态不动，合计只降到四成多
#| echo: fold
config = DENSE_CONFIGS["Qwen2.5-7B"]
num_params = llama_num_params(
    **{
        k: getattr(config, k)
        for k in ("hidden_size", "intermediate_size", "num_layers", "num_heads", "num_kv_heads", "head_dim")
    },
    vocab_size=config.vocab_size,
    qkv_bias=config.qkv_bias,
)
rows = []
for steps in (1, 2, 4, 8):
    size = {"batch_size": 8 // steps, "num_tokens": 4096, "hidden_size": config.hidden_size}
    activations = llama_activation_bytes(
        num_layers=config.num_layers,
        intermediate_size=config.intermediate_size,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        **size,
    ) + output_bytes(vocab_size=config.vocab_size, **size)
    states = model_state_bytes(num_params)
    rows.append([steps, states / 1e9, activations / 1e9, (states + activations) / 1e9])
rows = [[*row, f"{row[-1] / rows[0][-1]:.0%}"] for row in rows]
assert num_params == 7615616512 and [row[-1] for row in rows] == ["100%", "69%", "53%", "46%"]
assert [round(row[2], 1) for row in rows] == [200.9, 100.4, 50.2, 25.1] and round(rows[0][1], 1) == 121.8
assert round(2 * num_params / 1e9, 1) == 15.2 and round(4 * num_params / 1e9, 1) == 30.5  # 梯度
Markdown(
    tabulate(rows, headers=["$M$", "模型状态", "激活", "合计", "占比"], tablefmt="github", floatfmt=".1f")
)

# %%
#| label: ddp-synchronizations
#| caption: 两个进程的真 DDP，四个微批更新一次：归约几次、每卡归约多少字节、两卡参数是否一致、梯度与大 batch 的相对差
#| echo: fold
STEPS = 4
ddp_sequences = [
    [[torch.randint(V, (n + 1,)) for n in lengths] for lengths in rank]
    for rank in ([(9, 4), (2, 7), (21, 1), (5, 5)], [(1, 3), (30, 2), (6, 6), (8, 11)])
]


def synchronize(rank, dp_size, pairs, num_items):
    """每种写法累积一次，更新一步；返回归约的记录、梯度、更新后的参数。"""
    torch.set_default_dtype(torch.float64)
    results = {}
    for way in ("last", "every", "forward-outside", "never"):
        ddp = DistributedDataParallel(copy.deepcopy(net))
        sizes = record_all_reduces(ddp)
        for i, (input_ids, labels) in enumerate(pairs):
            ddp.require_backward_grad_sync = way == "every" or (way != "never" and i == STEPS - 1)
            if way == "forward-outside":
                ddp.require_backward_grad_sync = True
            logits = ddp(input_ids)
            loss = global_token_mean_loss(logits, labels, num_items_in_batch=num_items, dp_size=dp_size)
            if way == "forward-outside" and i < STEPS - 1:
                with ddp.no_sync():
                    loss.backward()
            else:
                loss.backward()
        grad = torch.cat([p.grad.flatten() for p in ddp.parameters()])
        results[way] = {"sizes": list(sizes), "grad": grad, "params": flat(ddp) - grad}
    # 本页的循环，同样的数据
    ddp = DistributedDataParallel(copy.deepcopy(net))
    sizes = record_all_reduces(ddp)
    sgd = torch.optim.SGD(ddp.parameters(), lr=1.0)
    train_epoch(ddp, pairs, sgd, grad_accum_steps=STEPS, max_norm=float("inf"))
    results["ours"] = {"sizes": list(sizes), "grad": flat(net) - flat(ddp), "params": flat(ddp)}
    return results


everything = [s for rank in ddp_sequences for group in rank for s in group]
mean_loss(net, *collate(everything)).backward()
full_grad = flat_grad(net)
num_items = sum(len(s) - 1 for s in everything)
ranks = launch(synchronize, [[[collate(g) for g in rank], num_items] for rank in ddp_sequences])
rows, measured = [], {}
for way, name in [
    ("ours", "本页的循环"),
    ("every", "每个微批都归约"),
    ("forward-outside", "只有反向在 no_sync 里"),
    ("never", "全部在 no_sync 里"),
]:
    a, b = ranks[0][way], ranks[1][way]
    gap = relative_error(a["params"], b["params"])
    error = relative_error(a["grad"], full_grad)
    measured[way] = (len(a["sizes"]), sum(a["sizes"]), gap, error)
    rows.append([name, len(a["sizes"]), sum(a["sizes"]), show(gap), show(error)])
num_bytes = 8 * sum(p.numel() for p in net.parameters())
assert measured["ours"][:2] == (1, num_bytes) and num_bytes == 6240
assert measured["every"][:2] == measured["forward-outside"][:2] == (4, 4 * num_bytes)
assert all(measured[way][i] < 1e-12 for way in ("ours", "every", "forward-outside") for i in (2, 3))
assert measured["never"][0] == 0 and measured["never"][2] > 0.04 and show(measured["never"][3]) == "0.903"
Markdown(
    tabulate(
        rows,
        headers=["写法", "归约次数", "字节", "两卡之差", "梯度误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: exceptions
#| caption: 分母已经正确、每个微批样本数相同，累积两步的梯度与大 batch 的相对差：只有逐样本的层是 0
#| echo: fold
x, target = torch.randn(8, C), torch.randn(8, C)


def accumulated_error(model, loss_fn, *, seed=3):
    """同一个随机种子：一次算完 8 条，与分两次、每次 4 条、loss 各除以 2。"""
    torch.manual_seed(seed)
    loss_fn(model(x), target).backward()
    full = flat_grad(model)
    torch.manual_seed(seed)
    for xs, ys in zip(x.chunk(2), target.chunk(2), strict=True):
        (loss_fn(model(xs), ys) / 2).backward()
    return relative_error(flat_grad(model), full)


def mlp(*layers):
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(C, C), *layers, nn.Linear(C, C))


mse = nn.functional.mse_loss
batch_norm = nn.BatchNorm1d(C)
cases = [
    ("LayerNorm", accumulated_error(mlp(nn.LayerNorm(C), nn.Tanh()), mse)),
    ("BatchNorm，训练模式", accumulated_error(mlp(batch_norm, nn.Tanh()), mse)),
    ("BatchNorm，冻结统计量", accumulated_error(mlp(copy.deepcopy(batch_norm).eval(), nn.Tanh()), mse)),
    ("dropout，同一个种子", accumulated_error(mlp(nn.Dropout(0.1), nn.Linear(C, C), nn.Dropout(0.1)), mse)),
    ("批内负样本的对比损失", accumulated_error(mlp(nn.Tanh()), lambda q, d: info_nce(q, d, temperature=0.1))),
]
sizes = dict(cases)
assert sizes["LayerNorm"] < 1e-12 and sizes["BatchNorm，冻结统计量"] < 1e-12
assert min(sizes[n] for n in ("BatchNorm，训练模式", "dropout，同一个种子", "批内负样本的对比损失")) > 0.5
assert [show(sizes[n]) for n in ("BatchNorm，训练模式", "批内负样本的对比损失")] == ["0.582", "0.662"]
assert batch_norm.num_batches_tracked == 1 + 2  # 大 batch 更新一次统计量，累积更新两次
Markdown(
    tabulate(
        [[n, show(e)] for n, e in cases],
        headers=["模型或损失", "梯度误差"],
        tablefmt="github",
        disable_numparse=True,
    )
)
