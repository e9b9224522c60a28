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
# # 如何解决灾难性遗忘（catastrophic forgetting）：实验
#
# 页面 `docs/training/catastrophic-forgetting.md` 里的每个数字都由下面的单元算出。

# %%
#| label: setup
import copy

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.training.catastrophic_forgetting import (
    PreNormBlock,
    diagonal_fisher,
    ewc_penalty,
    expand_block_identity,
    interpolate_weights,
    l2_sp_penalty,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # 换机器时舍入误差不致改变表里的数

# %%
#| label: quadratic-anchors
#| caption: 三十组随机二次损失，新任务的损失都降到原来的 5%：用旧任务海森、它的对角、单位阵、新任务海森作锚定矩阵时，旧任务损失相对最优值的倍数
#| echo: fold
quadratic_generator = torch.Generator().manual_seed(0)
DIM, TASKS = 8, 30


def random_hessian():
    """特征值跨三个数量级、方向随机的正定矩阵。"""
    q, _ = torch.linalg.qr(torch.randn(TASKS, DIM, DIM, generator=quadratic_generator))
    eigenvalues = 10 ** (3 * torch.rand(TASKS, DIM, generator=quadratic_generator) - 2)
    return (q * eigenvalues[:, None]) @ q.mT


def quadratic(theta, optimum, hessian):
    delta = theta - optimum
    return 0.5 * torch.einsum("ni,nij,nj->n", delta, hessian, delta)


hessian_a, hessian_b = random_hessian(), random_hessian()
theta_a, theta_b = torch.randn(2, TASKS, DIM, generator=quadratic_generator)


def anchored_optimum(metric, weight):
    """最小化 L_B + weight/2·(θ−θ_A)ᵀ metric (θ−θ_A)。"""
    scaled = weight[:, None, None] * metric
    right = (hessian_b @ theta_b[..., None] + scaled @ theta_a[..., None]).squeeze(-1)
    return torch.linalg.solve(hessian_b + scaled, right)


identity = torch.eye(DIM).expand(TASKS, DIM, DIM)
metrics = {
    "回放": ("$H_A$", hessian_a),
    "EWC": ("$\\operatorname{diag}H_A$", torch.diag_embed(hessian_a.diagonal(dim1=1, dim2=2))),
    "L2-SP": ("$I$", identity),
    "权重平均": ("$H_B$", hessian_b),
}
target = 0.05 * quadratic(theta_a, theta_b, hessian_b)
old_loss = {}
for name, (_, metric) in metrics.items():
    low, high = torch.full((TASKS,), -30.0), torch.full((TASKS,), 30.0)
    for _ in range(80):  # 惩罚越重新任务的损失越大，二分到恰好 5%
        middle = (low + high) / 2
        too_heavy = quadratic(anchored_optimum(metric, middle.exp()), theta_b, hessian_b) > target
        low, high = torch.where(too_heavy, low, middle), torch.where(too_heavy, middle, high)
    solution = anchored_optimum(metric, low.exp())
    assert torch.allclose(quadratic(solution, theta_b, hessian_b), target)
    old_loss[name] = quadratic(solution, theta_a, hessian_a)
    if name == "权重平均":  # H_B 作锚定矩阵就是线性插值，系数 1/(1+λ)
        share = 1 / (1 + low.exp())[:, None]
        assert torch.allclose(solution, (1 - share) * theta_a + share * theta_b)
        assert torch.allclose(share.squeeze(1), torch.full((TASKS,), 1 - 0.05**0.5))

rows = []
for name, (symbol, _) in metrics.items():
    excess = old_loss[name] / old_loss["回放"]
    assert (excess > 1 - 1e-9).all()  # 回放在前沿上：没有一组被别人超过
    rows.append([name, symbol, f"{excess.median():.2f}", f"{excess.max():.1f}"])
assert 0 < (old_loss["L2-SP"] < old_loss["EWC"]).sum() < TASKS // 2  # 其余的排序只是多数情形
assert [row[2] for row in rows] == ["1.00", "1.67", "2.06", "3.09"] and rows[3][3] == "44.7"
Markdown(
    tabulate(rows, headers=["方法", "锚定矩阵", "中位数", "最差"], tablefmt="github", disable_numparse=True)
)

# %%
#| label: identity-block
#| caption: 一个块的四种复制方式：输出与输入是否逐位相等、最大差，以及第一步哪些参数有非零梯度
#| echo: fold
torch.manual_seed(0)
block = PreNormBlock(16, 24)
with torch.no_grad():
    for layer in (block.input_layernorm, block.post_attention_layernorm):
        layer.weight.uniform_(0.5, 1.5)
hidden = torch.randn(2, 5, 16)
next_block = PreNormBlock(16, 24)  # 后面还有层，梯度才会传回来
SHORT = {
    "input_layernorm": "norm1",
    "post_attention_layernorm": "norm2",
    **{f"{n}_proj": n for n in ("q", "k", "v", "o", "gate", "up", "down")},
}


def zero_norms(source):
    """另一种恒等块：把两处归一化的增益清零。"""
    new_block = copy.deepcopy(source)
    for layer in (new_block.input_layernorm, new_block.post_attention_layernorm):
        torch.nn.init.zeros_(layer.weight)
    return new_block


def gradient_names(new_block):
    new_block.zero_grad()
    next_block(new_block(hidden)).square().mean().backward()
    return [SHORT[n.split(".")[0]] for n, p in new_block.named_parameters() if p.grad.abs().max() > 0]


variants = {
    "原样复制": copy.deepcopy(block),
    "只清零 o": expand_block_identity(block, output_projections=["o_proj"]),
    "清零 o 与 down": expand_block_identity(block),
    "清零两处 norm": zero_norms(block),
}
rows, patterns = [], {}
for name, variant in variants.items():
    output = variant(hidden)
    patterns[name] = gradient_names(variant)
    shown = "全部" if len(patterns[name]) == 9 else "、".join(patterns[name])
    gap = (output - hidden).abs().max().item()
    rows.append([name, "是" if torch.equal(output, hidden) else "否", f"{gap:.2f}", shown])
assert [row[1] for row in rows] == ["否", "否", "是", "是"]
assert sorted(patterns["清零 o 与 down"]) == ["down", "o"]
assert patterns["清零两处 norm"] == ["norm1"]

# 走一步之后：清零 o 与 down 的块全部参数都有梯度，清零 norm 的块前馈仍然一个也没有
for name, expected in (("清零 o 与 down", 9), ("清零两处 norm", 5)):
    variant = variants[name]
    optimizer = torch.optim.SGD(variant.parameters(), lr=0.1)
    for _ in range(3):
        patterns[name + "，三步后"] = gradient_names(variant)
        optimizer.step()
    assert len(patterns[name + "，三步后"]) == expected, patterns[name + "，三步后"]
assert set(patterns["清零两处 norm，三步后"]) == {"norm1", "q", "k", "v", "o"}
Markdown(
    tabulate(
        rows, headers=["新块", "恒等", "最大差", "有梯度的参数"], tablefmt="github", disable_numparse=True
    )
)

# %%
#| label: methods-table
#| caption: 五个种子的均值与标准差：旧任务 A 与新任务 B 的正确率，以及微调前到微调后在 B 输入上的 KL
#| echo: fold
SEEDS, INPUT, WIDTH, HIDDEN, CLASSES = 5, 16, 32, 32, 10  # 五个种子放在第一个轴上一起训练
PROTOTYPES, BATCH, STEPS, LR = 40, 64, 150, 3e-3
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator)


# 每个任务 40 个原型，输入是原型加噪声。A 每个原型一个标签；B 每个原型有 3 个对的答案，示范者固定用其中一个
prototypes_a, prototypes_b = randn(SEEDS, PROTOTYPES, INPUT), randn(SEEDS, PROTOTYPES, INPUT)
prototypes_b = prototypes_b + 3.0 * torch.nn.functional.normalize(randn(SEEDS, 1, INPUT), dim=-1)
labels_a = torch.randint(CLASSES, (SEEDS, PROTOTYPES), generator=generator)
correct_b = torch.rand(SEEDS, PROTOTYPES, CLASSES, generator=generator).argsort(-1) < 3
demo_b = (torch.rand(SEEDS, PROTOTYPES, CLASSES, generator=generator) * correct_b).argmax(-1)


def draw(prototypes, n):
    index = torch.randint(PROTOTYPES, (SEEDS, n), generator=generator)
    return prototypes.gather(1, index[..., None].expand(-1, -1, INPUT)) + 0.3 * randn(SEEDS, n, INPUT), index


def rms_norm(h):
    return h * torch.rsqrt(h.square().mean(-1, keepdim=True) + 1e-6)


def log_probs(params, x, blocks="01"):
    """残差 MLP：输入映射、若干残差块、输出层；有没有种子轴都能用。"""
    h = x @ params["in"]
    for i in blocks:
        z = rms_norm(h) * params[f"norm{i}"]
        h = h + torch.relu(z @ params[f"up{i}"]) @ params[f"down{i}"]
    return (rms_norm(h) @ params["out"]).log_softmax(-1)


def nll(lp, labels):
    return -lp.gather(-1, labels[..., None]).mean((1, 2)).sum()  # 对种子求和：各种子互不影响


base = {"in": randn(SEEDS, INPUT, WIDTH) / INPUT**0.5, "out": randn(SEEDS, WIDTH, CLASSES) / WIDTH**0.5}
for i in "01":
    base[f"norm{i}"] = torch.ones(SEEDS, 1, WIDTH)
    base[f"up{i}"] = randn(SEEDS, WIDTH, HIDDEN) / WIDTH**0.5
    base[f"down{i}"] = 0.5 * randn(SEEDS, HIDDEN, WIDTH) / HIDDEN**0.5
base = {name: p.requires_grad_() for name, p in base.items()}
optimizer = torch.optim.Adam(base.values(), lr=3e-3, fused=True)
for _ in range(400):  # 预训练：只学 A
    x, index = draw(prototypes_a, BATCH)
    loss = nll(log_probs(base, x), labels_a.gather(1, index))
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
base = {name: p.detach() for name, p in base.items()}

buffer_x, index = draw(prototypes_a, 2000)  # 回放与 Fisher 用的旧数据
buffer_y = labels_a.gather(1, index)
test_a, index = draw(prototypes_a, 500)
test_a_labels = labels_a.gather(1, index)
test_b, index = draw(prototypes_b, 500)
test_b_correct = correct_b.gather(1, index[..., None].expand(-1, -1, CLASSES))
fishers = [
    diagonal_fisher(
        lambda p, x: log_probs(p, x[None])[0], {k: p[s] for k, p in base.items()}, buffer_x[s, :64]
    )
    for s in range(SEEDS)
]
fisher = {name: torch.stack([f[name] for f in fishers]) for name in base}


def hits_b(lp):
    return test_b_correct.gather(-1, lp.argmax(-1, keepdim=True)).double().mean((1, 2))


def evaluate(params, blocks="01"):
    """每个种子的：A 正确率、B 正确率、B 输入上的 KL(微调前‖微调后)、A 输入上的同一个 KL。"""
    params = {name: p.detach() for name, p in params.items()}
    on_a, on_b = log_probs(params, test_a, blocks), log_probs(params, test_b, blocks)
    kls = []
    for x, lp in ((test_b, on_b), (test_a, on_a)):
        before = log_probs(base, x)
        kls.append((before.exp() * (before - lp)).sum(-1).mean(1))
    return torch.stack([(on_a.argmax(-1) == test_a_labels).double().mean(1), hits_b(on_b), *kls])


def finetune(*, replay=0, rank=0, penalty=None, expand=False, answers="demo", kl=0.0, sgd=False, until=None):
    """在 B 上微调；replay 是每批 64 条里换成旧数据的条数，rank > 0 时训练 LoRA，until 是提前停止的 B 正确率。"""
    blocks, trained = "01", {k: p.clone().requires_grad_() for k, p in base.items()}
    if expand:  # 在最后一块之后插入恒等副本，其余冻结
        blocks = "012"
        trained = {"norm2": base["norm1"].clone(), "up2": base["up1"].clone()}
        trained["down2"] = torch.zeros_like(base["down1"])
        trained = {name: p.requires_grad_() for name, p in trained.items()}
    if rank:
        adapted = [name for name in base if not name.startswith("norm")]
        trained = {}
        for name in adapted:  # W = W_0 + 2·A·B，B 从零开始
            trained[name + ".A"] = (
                randn(SEEDS, base[name].shape[1], rank) / base[name].shape[1] ** 0.5
            ).requires_grad_()
            trained[name + ".B"] = torch.zeros(SEEDS, rank, base[name].shape[2]).requires_grad_()

    def current():
        if rank:
            return base | {n: base[n] + 2.0 * trained[n + ".A"] @ trained[n + ".B"] for n in adapted}
        return base | trained

    if sgd:
        optimizer = torch.optim.SGD(trained.values(), lr=0.3)
    else:
        optimizer = torch.optim.Adam(trained.values(), lr=LR, fused=True)
    for step in range(600 if until else STEPS):
        if until and step % 10 == 0 and hits_b(log_probs(base | trained, test_b)).mean() >= until:
            break
        x, index = draw(prototypes_b, BATCH)
        labels = demo_b.gather(1, index)
        correct = correct_b.gather(1, index[..., None].expand(-1, -1, CLASSES))
        if answers == "own":  # 在对的答案里，用微调前的模型自己最偏爱的那个
            labels = log_probs(base, x).masked_fill(~correct, -torch.inf).argmax(-1)
        if replay:
            old = torch.randint(2000, (SEEDS, replay), generator=generator)
            x = torch.cat([x[:, replay:], buffer_x.gather(1, old[..., None].expand(-1, -1, INPUT))], 1)
            labels = torch.cat([labels[:, replay:], buffer_y.gather(1, old)], 1)
        params = current()
        lp = log_probs(params, x, blocks)
        if answers == "reward":  # 期望奖励的精确梯度：对 10 个动作求和，没有采样误差
            loss = -(lp.exp() * correct).sum(-1).mean(1).sum()
            if kl:  # 当前模型到微调前的 KL，同样精确求和
                loss = loss + kl * (lp.exp() * (lp - log_probs(base, x))).sum(-1).mean(1).sum()
        else:
            loss = nll(lp, labels)
        if penalty:
            loss = loss + penalty(params)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return {name: p.detach() for name, p in current().items()}, blocks


full, _ = finetune()
results = {"微调前": evaluate(base), "全量微调": evaluate(full)}
for replay in (1, 6, 16):
    results[f"回放 {replay}/64"] = evaluate(*finetune(replay=replay))
results["EWC"] = evaluate(*finetune(penalty=lambda p: ewc_penalty(p, base, fisher, weight=1000.0)))
results["L2-SP"] = evaluate(*finetune(penalty=lambda p: l2_sp_penalty(p, base, weight=0.2)))
for alpha in (0.3, 0.5, 0.7):
    results[f"平均 α={alpha}"] = evaluate(interpolate_weights(base, full, alpha=alpha))
for rank in (1, 4, 16):
    results[f"LoRA r={rank}"] = evaluate(*finetune(rank=rank))
results["恒等块"] = evaluate(*finetune(expand=True))
results["自选答案"] = evaluate(*finetune(answers="own"))
results["策略梯度"] = evaluate(*finetune(answers="reward"))

mean = {name: value.mean(1) for name, value in results.items()}
rows = [
    [name] + [f"{m:.2f}±{s:.2f}" for m, s in zip(value.mean(1)[:3], value.std(1)[:3], strict=True)]
    for name, value in results.items()
]


def near(value, printed):
    """页面引用的两位小数：换机器时末位可能差 1。"""
    return abs(float(value) - printed) < 0.015


for name, old, new in [
    ("微调前", 1.00, 0.27),
    ("全量微调", 0.39, 1.00),
    ("回放 1/64", 0.65, 1.00),
    ("回放 6/64", 0.95, 1.00),
    ("回放 16/64", 0.98, 1.00),
    ("EWC", 0.91, 0.86),
    ("L2-SP", 0.78, 0.98),
    ("平均 α=0.5", 0.93, 0.73),
    ("LoRA r=1", 0.53, 0.63),
    ("LoRA r=4", 0.35, 0.99),
    ("LoRA r=16", 0.26, 1.00),
    ("恒等块", 0.37, 0.97),
    ("自选答案", 0.71, 1.00),
]:
    assert near(mean[name][0], old) and near(mean[name][1], new), (name, mean[name])
for replay in (1, 6, 16):  # 五个种子都成立
    assert (results[f"回放 {replay}/64"][0] > results["全量微调"][0] + 0.1).all()
    assert (results[f"回放 {replay}/64"][1] > 0.97).all()
assert (results["自选答案"][0] > results["全量微调"][0]).all()
Markdown(tabulate(rows, headers=["方法", "旧 A", "新 B", "KL"], tablefmt="github", disable_numparse=True))

# %%
#| label: frontier
#| caption: 横轴新任务 B 的正确率，纵轴旧任务 A 的正确率，点是五个种子的均值：回放 6/64 与 16/64 最靠近右上角，LoRA 秩 4 与 16、恒等块、策略梯度与全量微调在右下
#| echo: fold
fig, ax = plt.subplots(figsize=(6.0, 3.8))
lines = [
    ("回放", ["回放 1/64", "回放 6/64", "回放 16/64"], "o-", "C0"),
    ("权重平均", ["微调前", "平均 α=0.3", "平均 α=0.5", "平均 α=0.7", "全量微调"], "s--", "C1"),
    ("LoRA", ["LoRA r=1", "LoRA r=4", "LoRA r=16"], "^:", "C2"),
    ("其他", ["EWC", "L2-SP", "自选答案", "策略梯度", "恒等块"], "D", "C3"),
]
for _, names, style, color in lines:
    ax.plot([mean[n][1].item() for n in names], [mean[n][0].item() for n in names], style, color=color)
for text, y, color in [
    ("回放 6/64、16/64", 0.98, "C0"),
    ("回放 1/64", 0.65, "C0"),
    ("L2-SP", 0.81, "C3"),
    ("自选答案", 0.73, "C3"),
    ("策略梯度", 0.44, "C3"),
    ("全量微调", 0.38, "C1"),
    ("恒等块", 0.32, "C3"),
    ("LoRA r=4、16", 0.26, "C2"),
]:
    ax.text(1.025, y, text, color=color, fontsize=10, ha="left", va="center")
ax.text(0.85, 0.96, "EWC", color="C3", fontsize=10, ha="left", va="center")
ax.text(0.61, 0.50, "LoRA r=1", color="C2", fontsize=10, ha="right", va="center")
ax.text(0.68, 0.86, "权重平均", color="C1", fontsize=10, ha="right", va="center")
ax.text(0.27, 0.93, "微调前", color="C1", fontsize=10, ha="left", va="center")
ax.set_xlim(0.2, 1.36)
ax.set_xticks([0.2, 0.4, 0.6, 0.8, 1.0])
ax.set_ylim(0.2, 1.07)
ax.set_xlabel("新任务 B 的正确率")
ax.set_ylabel("旧任务 A 的正确率")

assert all(mean[name][0] > 0.63 and mean[name][1] > 0.97 for name in lines[0][1])
assert all(mean[name][0] < 0.5 for name in ("LoRA r=4", "LoRA r=16", "恒等块", "全量微调"))

# %%
#| label: kl-forgetting
#| caption: 忘掉多少与 KL 的皮尔逊相关，点是每种方法乘每个种子；不含未训练的模型
#| echo: fold
points = {name: value for name, value in results.items() if name != "微调前"}


def correlation(row, names):
    kl = torch.cat([points[n][row] for n in names])
    forgot = torch.cat([results["微调前"][0] - points[n][0] for n in names])
    return torch.corrcoef(torch.stack([kl, forgot]))[0, 1].item()


no_replay = [name for name in points if not name.startswith("回放")]
rows = [
    ["新任务 B 的输入", "全部 15 种", correlation(2, list(points))],
    ["新任务 B 的输入", "去掉回放，12 种", correlation(2, no_replay)],
    ["旧任务 A 的输入", "全部 15 种", correlation(3, list(points))],
]
assert all(near(row[2], printed) for row, printed in zip(rows, (0.61, 0.85, 0.96), strict=True)), rows
assert near(points["回放 16/64"][2].mean(), 5.25) and near(points["回放 16/64"][0].mean(), 0.98)
Markdown(tabulate(rows, headers=["在谁的输入上", "方法", "相关"], tablefmt="github", floatfmt=".2f"))

# %%
#| label: answers-race
#| caption: 五个种子平均的 B 正确率第一次到 0.95 就停：同样的新任务成绩，答案由谁给出、用哪个优化器，旧任务还剩多少
#| echo: fold
settings = [
    ("模仿示范者", {"answers": "demo"}),
    ("自选答案", {"answers": "own"}),
    ("策略梯度", {"answers": "reward"}),
    ("策略梯度加 0.1 KL", {"answers": "reward", "kl": 0.1}),
]
race, rows = {}, []
for name, options in settings:
    for sgd in (True, False):
        race[name, sgd] = evaluate(*finetune(**options, sgd=sgd, until=0.95))
        assert race[name, sgd][1].mean() >= 0.95
    cells = [f"{race[name, sgd][0].mean():.2f}±{race[name, sgd][0].std():.2f}" for sgd in (True, False)]
    rows.append([name, *cells])
for name, printed in {
    "模仿示范者": (0.40, 0.49),
    "自选答案": (0.56, 0.78),
    "策略梯度": (0.57, 0.43),
    "策略梯度加 0.1 KL": (0.78, 0.66),
}.items():  # 页面引用的数
    assert all(near(race[name, sgd][0].mean(), p) for sgd, p in zip((True, False), printed, strict=True)), (
        name
    )
assert (race["策略梯度", True][0] > race["模仿示范者", True][0]).all()  # SGD：五个种子都是策略梯度忘得少
assert race["策略梯度", False][0].mean() < race["模仿示范者", False][0].mean()  # Adam：没有优势
for sgd in (True, False):
    assert (race["自选答案", sgd][0] > race["模仿示范者", sgd][0]).all()
    assert (race["策略梯度加 0.1 KL", sgd][0] > race["策略梯度", sgd][0]).all()
kl_b = [race[name, True][2].mean().item() for name in ("模仿示范者", "策略梯度")]
assert near(kl_b[0], 4.28) and near(kl_b[1], 5.50)  # 策略梯度忘得少，B 输入上的 KL(微调前‖微调后) 反而大
Markdown(
    tabulate(rows, headers=["B 的学法", "旧 A，SGD", "旧 A，Adam"], tablefmt="github", disable_numparse=True)
)
