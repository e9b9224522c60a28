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
# # DPO 里 chosen 和 rejected 的概率为什么会同时下降（likelihood displacement）：实验
#
# 页面 `docs/rl/dpo-displacement.md` 的实验：一阶条件在表格式、共享输出头、小 Transformer 上的核对；五个种子的训练，按差异 token 前、处、后拆开；损失平面上的轨迹。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.dpo import dpo_loss
from snippets.rl.dpo_displacement import displacement_rates, dpo_nll_loss, dpop_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # 有几行训练对舍入敏感，单精度换一台机器末位会变
BETA = 0.1

# %%
# 小 Transformer：单层、单头、因果；参数带一个前导的复制轴 R，各复制互不相干，可以一次训练
SEEDS, PAIRS, VOCAB_SIZE, WIDTH, LENGTH, DIFF = 5, 12, 16, 16, 8, 3  # 差异在第 4 个回答 token（下标 3）
generator = torch.Generator().manual_seed(0)


def make_pairs(*, one_token):
    """(SEEDS, 2, PAIRS, 1+LENGTH)：第一个 token 是提示，每对各不相同；第 1 轴是 chosen、rejected。"""
    prompts = torch.stack([torch.randperm(VOCAB_SIZE, generator=generator)[:PAIRS] for _ in range(SEEDS)])
    chosen = torch.randint(VOCAB_SIZE, (SEEDS, PAIRS, LENGTH), generator=generator)
    rejected = torch.randint(VOCAB_SIZE, (SEEDS, PAIRS, LENGTH), generator=generator)
    if one_token:
        shift = torch.randint(1, VOCAB_SIZE, (SEEDS, PAIRS), generator=generator)
        rejected = chosen.clone()
        rejected[..., DIFF] = (chosen[..., DIFF] + shift) % VOCAB_SIZE
    return torch.stack([torch.cat([prompts[..., None], answer], -1) for answer in (chosen, rejected)], 1)


def make_parameters(replicas):
    shapes = {
        "embed": (VOCAB_SIZE, WIDTH, 1.0),
        "position": (LENGTH, WIDTH, 1.0),
        "qkv": (WIDTH, 3 * WIDTH, WIDTH**-0.5),
        "out": (WIDTH, WIDTH, WIDTH**-0.5),
        "up": (WIDTH, 4 * WIDTH, WIDTH**-0.5),
        "down": (4 * WIDTH, WIDTH, (4 * WIDTH) ** -0.5),
        "head": (WIDTH, VOCAB_SIZE, WIDTH**-0.5),
    }
    return {
        name: scale * torch.randn(replicas, m, n, generator=generator)
        for name, (m, n, scale) in shapes.items()
    }


def token_log_probs(parameters, sequences):
    """(R, 2, N, 1+T) 的序列 → (R, 2, N, T) 的逐 token 对数概率。"""
    replicas = sequences.shape[0]
    flat = sequences.reshape(replicas, -1, 1 + LENGTH)

    def apply(x, name):
        return torch.bmm(x.flatten(1, -2), parameters[name]).unflatten(1, x.shape[1:-1])

    def norm(x):
        return F.layer_norm(x, (WIDTH,))

    index = flat[..., :-1].reshape(replicas, -1, 1).expand(-1, -1, WIDTH)
    x = (
        parameters["embed"].gather(1, index).view(*flat[..., :-1].shape, WIDTH)
        + parameters["position"][:, None]
    )
    query, key, value = apply(norm(x), "qkv").chunk(3, -1)
    x = x + apply(F.scaled_dot_product_attention(query, key, value, is_causal=True), "out")
    x = x + apply(F.gelu(apply(norm(x), "up")), "down")
    logits = apply(norm(x), "head")
    log_probs = logits.gather(-1, flat[..., 1:, None]).squeeze(-1) - logits.logsumexp(-1)
    return log_probs.view(replicas, 2, -1, LENGTH)


def descend(parameters, loss, *, steps, lr, record):
    """普通梯度下降；各复制的损失相加，所以互不影响。返回每一步之前（和最后）的记录。"""
    parameters = {name: value.detach().clone().requires_grad_() for name, value in parameters.items()}
    history = []
    for step in range(steps + 1):
        history.append(record(parameters))
        if step == steps:
            return history
        grads = torch.autograd.grad(loss(parameters), list(parameters.values()))
        with torch.no_grad():
            for value, grad in zip(parameters.values(), grads, strict=True):
                value -= lr * grad


# SFT（Adam 60 步），三组各五个种子：两边都学；只学 chosen（同样的对）；两边都学、两条回答无关
one_token = make_pairs(one_token=True)
pair_tokens = torch.cat([one_token, one_token, make_pairs(one_token=False)])  # (15, 2, N, 1+T)
both_sides = torch.ones(3 * SEEDS, 2, 1, 1)
both_sides[SEEDS : 2 * SEEDS, 1] = 0
sft = {name: value.requires_grad_() for name, value in make_parameters(3 * SEEDS).items()}
optimizer = torch.optim.Adam(sft.values(), lr=1e-2)
for _ in range(60):
    optimizer.zero_grad()
    (-both_sides * token_log_probs(sft, pair_tokens)).mean((2, 3)).sum().backward()
    optimizer.step()
sft = {name: value.detach() for name, value in sft.items()}
sft_log_probs = token_log_probs(sft, pair_tokens)  # (15, 2, N, T)


# %%
#| label: first-order-condition
#| caption: 沿 DPO 负梯度走一小步，chosen 与 rejected 对数概率的变化率：表格式上升，共享输出头上差异之后的 token 够多时 chosen 也下降
#| echo: fold
def one_step(parameter, log_probs_of, *, lr=1e-5):
    """预测的两个变化率，与真走一步 DPO 梯度下降测到的变化率（都除以学习率乘 β/2）。"""
    parameter = parameter.double().clone().requires_grad_()
    chosen, rejected = log_probs_of(parameter)
    grads = [torch.autograd.grad(x, parameter, retain_graph=True)[0].flatten() for x in (chosen, rejected)]
    predicted = [rate.item() for rate in displacement_rates(*grads)]
    pair = [x.reshape(1) for x in (chosen, rejected)]
    loss = dpo_loss(*pair, *[x.detach() for x in pair], beta=BETA)
    moved = parameter.detach() - lr * torch.autograd.grad(loss.sum(), parameter)[0]
    after = log_probs_of(moved)
    measured = [((x - y) / (lr * BETA / 2)).item() for x, y in zip(after, (chosen, rejected), strict=True)]
    for guess, truth in zip(predicted, measured, strict=True):
        assert abs(guess - truth) < 1e-3 * max(1, abs(truth))
    assert predicted[0] - predicted[1] > 0  # 差必然变大
    return predicted


# 表格式：五个答案各一个 logit，π_w=0.2，π_l=0.05（与 DPO 一页同一个例子）
table_logits = torch.tensor([0.2, 0.05, 0.25, 0.25, 0.25]).log()
rows = [["表格式，单个答案", *one_step(table_logits, lambda z: z.log_softmax(-1)[:2])]]
assert abs(rows[0][1] - (1 - 0.2 + 0.05)) < 1e-6  # 1 − π_w + π_l


def shared_head(suffix, similarity):
    """词表 {a,b,c}：首 token 选 a 或 b，之后 suffix 个 c；只有输出头 (V, D) 是参数，特征固定。"""
    first = torch.tensor([0.7, 0.2, 0.1])  # 差异处：p_a、p_b、p_c
    after_chosen, after_rejected = torch.tensor([0.15, 0.15, 0.7]), torch.tensor([0.35, 0.35, 0.3])
    rest = math.sqrt(1 - similarity**2)
    columns, features = [first.log()], [torch.eye(1 + 2 * suffix)[0]]
    for k in range(suffix):  # 两条回答的特征内积是 similarity，不同位置正交
        columns += [
            after_chosen.log(),
            (after_rejected.log() - similarity * after_chosen.log()) / rest,
        ]
        basis = torch.eye(1 + 2 * suffix)[2 * k + 1 : 2 * k + 3]
        features += [basis[0], similarity * basis[0] + rest * basis[1]]
    features = torch.stack(features).double()

    def log_probs_of(head):
        log_probs = (features @ head.T).log_softmax(-1)
        chosen = log_probs[0, 0] + log_probs[1::2, 2].sum()
        rejected = log_probs[0, 1] + log_probs[2::2, 2].sum()
        return chosen, rejected

    return torch.stack(columns, 1), log_probs_of


for suffix, similarity in ((1, 0.9), (4, 0.9), (4, 0.0)):
    predicted = one_step(*shared_head(suffix, similarity))
    each = 1.5 * 0.3 * (0.3 - similarity * 0.7)  # 正文的公式：V=3，其余两个 token 平分
    assert abs(predicted[0] - (1 - 0.7 + 0.2 + suffix * each)) < 1e-5
    rows.append([f"共享头，后续 {suffix} 个，内积 {similarity}", *predicted])

for row, expected in zip(rows, (0.85, 0.35, -0.09, 1.04), strict=True):  # 正文读出的数
    assert abs(row[1] - expected) < 0.006
Markdown(tabulate(rows, headers=["例子", "chosen", "rejected"], tablefmt="github", floatfmt=".2f"))

# %%
# 偏好训练：六种设定乘五个种子，各从自己的 SFT 模型出发，梯度下降 150 步
settings = ["DPO", "DPO+NLL", "DPOP，λ=10", "DPO，只 SFT 过 chosen", "DPO，无关的对", "DPOP，λ=50"]
source = torch.cat([torch.arange(SEEDS)] * 3 + [torch.arange(SEEDS, 3 * SEEDS), torch.arange(SEEDS)])
train_tokens, ref = pair_tokens[source], sft_log_probs[source]


def preference_loss(log_probs, ref, setting):
    """一种设定的全部种子：(SEEDS, 2, N, T) → 各种子的批次平均之和。"""
    four = [x[:, side].sum(-1).flatten() for x in (log_probs, ref) for side in (0, 1)]
    if setting == "DPO+NLL":
        lengths = torch.full_like(four[0], LENGTH, dtype=torch.long)
        return SEEDS * dpo_nll_loss(*four, lengths, beta=BETA, alpha=1.0).mean()
    if setting.startswith("DPOP"):
        return SEEDS * dpop_loss(*four, beta=BETA, penalty_weight=float(setting[-2:])).mean()
    return SEEDS * dpo_loss(*four, beta=BETA).mean()


def total_loss(parameters):
    log_probs = token_log_probs(parameters, train_tokens).split(SEEDS)
    return sum(map(preference_loss, log_probs, ref.split(SEEDS), settings))


STEPS, LR = 150, 0.06
history = descend(
    {name: value[source] for name, value in sft.items()},
    total_loss,
    steps=STEPS,
    lr=LR,
    record=lambda p: (
        (token_log_probs(p, train_tokens) - ref).detach(),
        {name: value[:SEEDS].detach().clone() for name, value in p.items()},  # 第一种设定的参数
    ),
)
snapshots = [parameters for _, parameters in history]
history = torch.stack([delta for delta, _ in history]).unflatten(1, (len(settings), SEEDS))

# 对照：同样的数据、同样的起点，每个前缀各有一行自己的 logits（差异处及之前两条回答的前缀相同，共用一行）
start = sft_log_probs[:SEEDS]
full = []  # 逐位置把目标换成词表里的每个 token，得到整行对数概率
for t in range(LENGTH):
    replaced = one_token.repeat_interleave(VOCAB_SIZE, 2)
    replaced[..., 1 + t] = torch.arange(VOCAB_SIZE).repeat(PAIRS)
    probe = {name: value[:SEEDS] for name, value in sft.items()}
    full.append(token_log_probs(probe, replaced)[..., t].view(SEEDS, 2, PAIRS, VOCAB_SIZE))
full = torch.stack(full, 3)  # (SEEDS, 2, N, T, V)


def table_log_probs(table):
    sides = [torch.cat([table["shared"], table["own"][:, side]], 2) for side in (0, 1)]
    targets = one_token[..., 1:, None]
    return torch.stack(sides, 1).log_softmax(-1).gather(-1, targets).squeeze(-1)


table_start = {"shared": full[:, 0, :, : DIFF + 1], "own": full[:, :, :, DIFF + 1 :]}
assert (table_log_probs(table_start) - start).abs().max() < 1e-4
table_history = descend(
    table_start,
    lambda table: preference_loss(table_log_probs(table), start, "DPO"),
    steps=STEPS,
    lr=20.0,  # 每个参数只被一对用到，梯度小得多，学习率要大
    record=lambda table: (table_log_probs(table) - start).detach(),
)
table_history = torch.stack(table_history)  # (STEPS+1, SEEDS, 2, N, T)

# %%
#| label: rates-over-training
#| caption: 第一行设定（两边都 SFT 过）的训练途中，chosen 的一阶变化率拆成自己这一对与其余各对的贡献：起点由自己这一对推高，后来其余各对把它压低
#| echo: fold
rows, values, rates_at = [], [], {}
for step in (0, 10, 50, 150):
    own, others, falling, total = [], [], 0, []
    for seed in range(SEEDS):
        parameters = {
            name: value[seed : seed + 1].double().requires_grad_() for name, value in snapshots[step].items()
        }
        logps = token_log_probs(parameters, one_token[seed : seed + 1]).sum(-1)[0]  # (2, N)
        margin = BETA * (logps - start[seed].sum(-1).double())
        weight = torch.sigmoid(margin[1] - margin[0]).detach()  # σ(r̂_l − r̂_w)
        grads = [
            torch.cat(
                [g.flatten() for g in torch.autograd.grad(x, list(parameters.values()), retain_graph=True)]
            )
            for x in logps.flatten()
        ]
        chosen_grads, rejected_grads = torch.stack(grads).view(2, PAIRS, -1)
        # 第 (i, j) 个：第 j 对的更新让第 i 条 chosen 升多少，已除以学习率乘 β
        influence = chosen_grads @ (weight[:, None] * (chosen_grads - rejected_grads)).T / PAIRS
        own.append(influence.diagonal().mean().item())
        others.append((influence.sum() - influence.trace()).item() / PAIRS)
        falling += sum(
            displacement_rates(*pair)[0].item() < 0 for pair in zip(chosen_grads, rejected_grads, strict=True)
        )
        # 核对：与「平均 log π_w 的梯度」点乘「损失的负梯度」一致
        loss = dpo_loss(*logps, *start[seed].sum(-1).double(), beta=BETA).mean()
        descent = torch.cat([-g.flatten() for g in torch.autograd.grad(loss, list(parameters.values()))])
        total.append((chosen_grads.mean(0) @ descent).item() / BETA)
        assert abs(total[-1] - own[-1] - others[-1]) < 1e-6 * max(1, abs(own[-1]))
    rates_at[step] = (own, others, total, falling)
    level = history[step, 0, :, 0].sum(-1).mean().item()
    values.append([level, sum(own) / SEEDS, sum(others) / SEEDS])
    rows.append([step, *[f"{value:+.2f}" for value in values[-1]], f"{falling}/{SEEDS * PAIRS}"])
assert all(x > 0 for x in rates_at[0][2]) and rates_at[0][3] == 0  # 起点五个种子都升，没有一对会降
for step in (50, 150):  # 后来五个种子都降，其余各对的贡献都是负的
    assert all(x < 0 for x in rates_at[step][2]) and all(x < 0 for x in rates_at[step][1])
# 正文读出的数
assert (
    abs(values[0][1] - 23.96) < 0.02 and abs(values[2][1] + 1.22) < 0.02 and abs(values[2][2] + 6.45) < 0.02
)
Markdown(
    tabulate(
        rows,
        headers=["步", "chosen 已变", "自己这对", "其余各对", "单独也降"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: displacement-table
#| caption: 梯度下降 150 步后对数概率的变化，五个种子、每种子 12 对平均；DPO 的 chosen 五个种子都降，差异 token 自己平均却在涨；同样数据的表格式参数全都上涨
#| echo: fold
results = dict(zip(settings[:5], history[-1], strict=False)) | {"DPO，表格式参数": table_history[-1]}
rows, final = [], {}
for name, delta in results.items():
    chosen, rejected = delta.mean(2).unbind(1)  # 各 (SEEDS, T)
    parts = [part.sum(-1).mean().item() for part in chosen.split([DIFF, 1, LENGTH - DIFF - 1], -1)]
    fell = (chosen.sum(-1) < 0).sum().item()
    split = " / ".join(f"{round(part, 2) + 0.0:+.2f}" for part in parts) if "无关" not in name else "—"
    final[name] = (chosen.sum(-1).mean().item(), rejected.sum(-1).mean().item(), parts, fell)
    rows.append([name, f"{final[name][0]:+.2f}", f"{final[name][1]:+.1f}", split, f"{fell}/{SEEDS}"])
assert [final[name][3] for name in results] == [5, 0, 0, 5, 5, 0]
assert all(value[1] < value[0] for value in final.values())  # rejected 都降得更多
for delta in (history[-1, 0], history[-1, 3]):  # 两种 SFT：共享的前缀与后续，五个种子都降
    assert (delta[:, 0, :, :DIFF].sum(-1).mean(1) < 0).all() and (
        delta[:, 0, :, DIFF + 1 :].sum(-1).mean(1) < 0
    ).all()
assert (history[-1, 0, :, 0, :, DIFF].mean(1) > 0).sum() == 4  # 两边都 SFT 过：差异 token 自己四个种子涨
assert table_history[-1, :, 0, :, :DIFF].abs().max() < 1e-9  # 表格式：前缀完全不动
assert (table_history[1:, :, 0].sum(-1) > 0).all()  # 表格式：每一步、每个种子、每一对的 chosen 都高于起点
early = history[:, :, :, 0].sum(-1).mean(-1)  # (STEPS+1, 设定, SEEDS)
assert (early[5:, 3] < 0).all()  # 只 SFT 过 chosen：第 5 步起五个种子都低于起点
assert (early[:, 2] > -0.1).all()  # λ=10 的 DPOP 全程没有跌下去
assert (early[:, 5].amin(0) < -5).sum() == 4  # λ=50、同样的学习率：四个种子途中震荡，跌过 5 奈特
assert (early[10, 0] > 0).all() and (early[50:, 0] < 0).all()  # 两边都 SFT 过：先升后降
for name, level, parts in (  # 正文读出的数
    ("DPO", -3.20, (-2.26, 0.45, -1.38)),
    ("DPO+NLL", 0.77, (0.0, 0.77, 0.0)),
    ("DPOP，λ=10", 0.17, (-0.25, 0.70, -0.28)),
    ("DPO，表格式参数", 0.90, (0.0, 0.82, 0.09)),
):
    gaps = [abs(x - y) for x, y in zip((final[name][0], *final[name][2]), (level, *parts), strict=True)]
    assert max(gaps) < 0.02
assert abs(final["DPO"][1] + 14.9) < 0.1 and abs(final["DPO+NLL"][1] + 9.5) < 0.1
Markdown(
    tabulate(
        rows,
        headers=["写法", "chosen", "rejected", "前 / 处 / 后", "下降"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: loss-plane-paths
#| caption: 隐式奖励平面上的 DPO 损失等高线与训练轨迹：等高线都是斜率为一的直线，三个圆点损失相同；DPO 走进两者都降的左下区，DPO+NLL、DPOP 与表格式参数留在右侧
#| echo: fold
fig, ax = plt.subplots(figsize=(6.0, 3.8))
a, b = torch.meshgrid(torch.linspace(-0.7, 0.5, 40), torch.linspace(-2.1, 0.3, 40), indexing="xy")
losses = torch.log1p((b - a).exp())
contours = ax.contour(a, b, losses, levels=[0.15, 0.2633, 0.45, 0.6931], colors="C5", linewidths=0.8)
ax.clabel(contours, fmt="%.2f", fontsize=10)
ax.fill_between([-0.7, 0], -2.1, 0, color="C3", alpha=0.12, linewidth=0)
points = torch.tensor([[0.35, -0.85], [0.0, -1.2], [-0.6, -1.8]])
for triple, loss in ((points, 0.2633), (torch.tensor([[2.0, -2.0], [0.0, -4.0], [-6.0, -10.0]]), 0.01815)):
    zero = torch.zeros(3)  # β=1、参考为 0 时，两个输入就是 a 与 b
    assert (dpo_loss(triple[:, 0], triple[:, 1], zero, zero, beta=1.0) - loss).abs().max() < 1e-4
ax.plot(points[:, 0], points[:, 1], "o", color="C4", linestyle="none")
paths = {"DPO": history[:, 0], "DPO+NLL": history[:, 1], "DPOP": history[:, 2], "表格式": table_history}
styles = zip(("-", "--", "-.", ":"), ("C3", "C0", "C2", "C1"), strict=True)
for (name, delta), (style, color) in zip(paths.items(), styles, strict=True):
    rewards = BETA * delta.sum(-1).mean((1, 3))  # (STEPS+1, 2)：种子与对的平均
    ax.plot(rewards[::3, 0], rewards[::3, 1], style, color=color, linewidth=2.2, label=name)
    assert (rewards[-1, 0] < 0) == (name == "DPO") and rewards[-1, 1] < 0
    if name == "DPO":
        assert (rewards[-1] - torch.tensor([-0.32, -1.49])).abs().max() < 0.01 and rewards[10, 0] > 0
ax.text(-0.68, -0.14, "两者都降", color="C3", fontsize=11)
ax.set_xlim(-0.7, 0.5)
ax.set_ylim(-2.1, 0.3)
ax.set_xlabel("a：chosen 的隐式奖励")
ax.set_ylabel("b：rejected 的隐式奖励")
ax.legend(loc="lower right", fontsize=10)
assert len(ax.get_legend().get_texts()) == 4

# %%
#| label: logs-hide-it
#| caption: 同一组 DPO 训练的日志，五个种子平均：损失、准确率、差都在变好，chosen 的对数概率先升后跌到起点以下
#| echo: fold
rows = []
for step in (0, 10, 50, 150):
    rewards = BETA * history[step, 0].sum(-1)  # (SEEDS, 2, N)
    margin = rewards[:, 0] - rewards[:, 1]
    logps = (history[step, 0] + sft_log_probs[:SEEDS])[:, 0].sum(-1).mean()
    rows.append(
        [
            step,
            -F.logsigmoid(margin).mean().item(),
            (margin > 0).double().mean().item(),
            margin.mean().item(),
            logps.item(),
        ]
    )
assert [row[2] for row in rows] == [0.0, 1.0, 1.0, 1.0]  # 起点平局，按 TRL 的大于号计为错
for row, loss, logps in ((rows[1], 0.59, -0.87), (rows[3], 0.28, -4.42)):  # 正文读出的数
    assert abs(row[1] - loss) < 0.01 and abs(row[4] - logps) < 0.01
Markdown(
    tabulate(rows, headers=["步", "损失", "准确率", "差", "logps/chosen"], tablefmt="github", floatfmt=".2f")
)
