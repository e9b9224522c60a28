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
# # free-running 与 teacher forcing（教师强制与曝光偏差）：实验
#
# 页面 `docs/architecture/teacher-forcing.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn

from snippets.architecture.softmax_cross_entropy import causal_lm_loss
from snippets.architecture.teacher_forcing import (
    off_track_probability,
    scheduled_sampling_optimum,
    sequential_loss,
)
from snippets.architecture.transformer_from_scratch import MiniLlama, init_weights

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: parallel-equals-loop
#| caption: 并行一遍的教师强制与逐步循环损失相同、梯度只差舍入；不移位、移两次、自由运行都是另一个损失
model = MiniLlama(vocab_size=17, hidden_size=32, intermediate_size=64, num_layers=2, num_heads=4)
init_weights(model, std=0.3)
ids = torch.randint(0, 17, (4, 12), generator=torch.Generator().manual_seed(0))


logits = model(ids)
losses = {
    "并行一遍": (causal_lm_loss(logits, ids), 1),
    "逐步，真实前缀": (sequential_loss(model, ids), 11),
    "逐步，自由运行": (
        sequential_loss(model, ids, gold_prob=0.0, generator=torch.Generator().manual_seed(1)),
        11,
    ),
    "不移位": (nn.functional.cross_entropy(logits.flatten(0, 1), ids.flatten()), 1),
    "移了两次": (nn.functional.cross_entropy(logits[:, :-2].flatten(0, 1), ids[:, 2:].flatten()), 1),
}
params = list(model.parameters())


def flat_grad(loss):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, params, retain_graph=True)])


reference = flat_grad(losses["并行一遍"][0])
rows, gap = [], {}
for name, (loss, passes) in losses.items():
    gap[name] = ((flat_grad(loss) - reference).norm() / reference.norm()).item()
    shown = "0" if name == "并行一遍" else "< 1e-12" if gap[name] < 1e-12 else f"{gap[name]:.2f}"
    rows.append([name, passes, f"{loss.item():.4f}", shown])

assert gap["逐步，真实前缀"] < 1e-12
assert abs(losses["并行一遍"][0] - losses["逐步，真实前缀"][0]) < 1e-12
assert all(gap[name] > 1 for name in ("逐步，自由运行", "不移位", "移了两次"))
Markdown(
    tabulate(
        rows, headers=["写法", "前向次数", "损失", "梯度的相对误差"], tablefmt="github", disable_numparse=True
    )
)

# %%
V, SEP, T = 16, 16, 24


def corpus(n, block, generator):
    """每块：分隔符、随机起点 a、然后每步加 s（模 16），s 在 1 到 5 里随机、一块之内不变。"""
    start = torch.randint(V, (n, T // block, 1), generator=generator)
    step = torch.randint(1, 6, (n, T // block, 1), generator=generator)
    body = (start + step * torch.arange(block - 1)) % V
    return torch.cat((torch.full((n, T // block, 1), SEP), body), -1).flatten(1)


def legal(ids, block):
    """一块之内错了一处，这块剩下的都算错；下一块按它自己的起点与步长重新判。"""
    blocks = ids.view(len(ids), T // block, block)
    x = blocks[..., 1:]
    step = (x[..., 1:2] - x[..., :1]) % V
    ok = torch.ones_like(blocks, dtype=torch.bool)
    ok[..., 0] = blocks[..., 0] == SEP
    ok[..., 1:] = (x < V) & (x == (x[..., :1] + step * torch.arange(block - 1)) % V)
    ok[..., 2] &= ((step >= 1) & (step <= 5))[..., 0]
    ok[..., 1:] = ok[..., 1:].long().cumprod(-1).bool()
    return ok.flatten(1)


class GRUModel(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.embed = nn.Embedding(V + 1, width)
        self.gru = nn.GRU(width, width, batch_first=True)
        self.head = nn.Linear(width, V + 1)

    def forward(self, ids, state=None):
        hidden, state = self.gru(self.embed(ids), state)
        return self.head(hidden), state


@torch.no_grad()
def measure(model, block, generator, n=1000):
    """真实前缀与自己的前缀各自的正确率（第 3 个位置起），以及局部步长是否延续。"""
    gold = corpus(n, block, generator)
    logits, _ = model(gold)
    sampled = torch.multinomial(logits[:, :-1].softmax(-1).flatten(0, 1), 1, generator=generator)
    sampled = sampled.view(n, T - 1)
    columns = []
    for t in range(3, T):
        mixed = gold.clone()
        mixed[:, t] = sampled[:, t - 1]
        columns.append(legal(mixed, block)[:, t])
    gold_ok = torch.stack(columns, 1)

    own = gold[:, :3]
    logits, state = model(own)
    while own.shape[1] < T:
        token = torch.multinomial(logits[:, -1].softmax(-1), 1, generator=generator)
        own = torch.cat((own, token), 1)
        logits, state = model(token, state)
    own_ok = legal(own, block)[:, 3:]
    # 局部规则：这一步的步长是否等于前两个 token 的步长，只看已经错过之后的位置
    follows = (own[:, 3:] - own[:, 2:-1]) % V == (own[:, 2:-1] - own[:, 1:-2]) % V
    follows &= own[:, 3:] < V
    derailed = torch.cat((torch.zeros(n, 1, dtype=torch.bool), ~own_ok[:, :-1]), 1)
    after_error = follows[derailed].double().mean().item() if derailed.any() else float("nan")
    return gold_ok.double().mean(0), own_ok.double().mean(0), after_error


def train(block, checkpoints, seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    model, results = GRUModel(), {}
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for step in range(1, max(checkpoints) + 1):
        ids = corpus(64, block, generator)
        logits, _ = model(ids[:, :-1])
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step in checkpoints:
            results[step] = measure(model, block, torch.Generator().manual_seed(100 + seed))
    return results


long_block = train(24, (40, 60, 100), seed=0)
short_block = train(6, (60,), seed=0)

# %%
#| label: accuracy-by-position
#| caption: 左：整条是一块，错误不可恢复，自己的前缀下正确率随位置下降，贴近真实前缀正确率的连乘。右：每 6 个 token 重新开始，正确率呈锯齿形，高于连乘
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.1), sharey=True)
positions = torch.arange(3, T)
for ax, (gold_ok, own_ok, _), title in (
    (axes[0], long_block[40], "不可恢复：整条一块"),
    (axes[1], short_block[60], "可恢复：6 个一块"),
):
    ax.plot(positions, gold_ok, "o-", color="C0", markersize=3, label="真实前缀")
    ax.plot(positions, own_ok, "s-", color="C1", markersize=3, label="自己的前缀")
    ax.plot(positions, gold_ok.cumprod(0), "--", color="C2", label="逐位连乘")
    ax.set(xlabel="位置", ylim=(0, 1.05))
    ax.set_title(title, fontsize=10)
axes[0].set_ylabel("正确率")
axes[0].legend(loc="lower left")

# 区间比正文的「约」宽：训练与采样的末位数字随 CPU 与库的版本会变
gold_ok, own_ok, _ = long_block[40]
assert 0.95 < gold_ok.mean() < 0.985 and 0.4 < own_ok[-1] < 0.62
assert (own_ok - gold_ok.cumprod(0)).abs().max() < 0.08  # 连乘
gold_ok, own_ok, _ = short_block[60]
assert 0.55 < own_ok[-1] < 0.78 and 0.4 < gold_ok.prod() < 0.65
assert own_ok[-1] > gold_ok.prod() + 0.05  # 比连乘高
block_end, block_start = own_ok[2::6], own_ok[4::6]  # 位置 5、11、17、23；位置 7、13、19
assert (block_start > block_end[:-1] + 0.03).all()  # 每块开头都回升
assert block_end[-1] < block_end[0] - 0.1  # 但没有完全复原

# %%
#| label: longer-training
#| caption: 训练越久，真实前缀与自己的前缀的差距越小；末位正确率始终贴近逐位连乘
rows = []
for steps, (gold_ok, own_ok, after_error) in long_block.items():
    others = [f"{float(x):.2f}" for x in (own_ok[-1], gold_ok.prod(), after_error)]
    rows.append([steps, f"{gold_ok.mean():.3f}", *others])
    assert abs(own_ok[-1] - gold_ok.prod()) < 0.08
    assert after_error < gold_ok.mean() - 0.02  # 出错之后的前缀上更差
last = [own_ok[-1].item() for _, own_ok, _ in long_block.values()]
assert last == sorted(last) and last[0] < 0.62 and last[-1] > 0.8
Markdown(
    tabulate(
        rows,
        headers=["步数", "真实前缀", "末位，自己的前缀", "逐位连乘", "出错之后"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: scheduled-sampling-optimum
#| caption: 只有 00 与 11 的语言：计划采样训练出的模型以 (1−ε)/2 的概率写出不存在的 01 或 10；换成老师在自己的前缀上给目标就降到 0 附近
COPY = torch.tensor([[0.5, 0.0], [0.0, 0.5]])


class Table(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(2))
        self.second = nn.Parameter(torch.tensor([[0.5, -0.5], [-0.5, 0.5]]))

    def forward(self, prefix):
        rows = [self.first.expand(len(prefix), 2)]
        if prefix.shape[1] > 1:
            rows.append(self.second[prefix[:, 1]])
        return torch.stack(rows, dim=1)

    def illegal(self):
        return (self.first.softmax(0) * self.second.softmax(1).flip(1).diagonal()).sum().item()


def expert(prefix):
    return torch.full((len(prefix), 2), 0.5) if prefix.shape[1] == 1 else torch.eye(2)[prefix[:, 1]]


pairs = torch.tensor([[0, 0, 0], [0, 1, 1]]).repeat(200, 1)  # 开头符、两个 token
rows = []
for gold_prob in (1.0, 0.75, 0.5, 0.25, 0.0):
    optimum = scheduled_sampling_optimum(COPY, gold_prob=gold_prob)
    exact = (COPY.sum(1) * optimum.flip(1).diagonal()).sum().item()
    trained = []
    for teacher in (None, expert):
        generator, table = torch.Generator().manual_seed(0), Table()
        optimizer = torch.optim.Adam(table.parameters(), lr=0.2)
        illegal = []
        for _ in range(80):
            illegal.append(table.illegal())
            optimizer.zero_grad()
            loss = sequential_loss(table, pairs, gold_prob=gold_prob, expert=teacher, generator=generator)
            loss.backward()
            optimizer.step()
        trained.append(sum(illegal[-40:]) / 40)  # 最后 40 步的平均，去掉采样的抖动
    assert abs(exact - (1 - gold_prob) / 2) < 1e-12 and abs(trained[0] - exact) < 0.03
    assert trained[1] < 0.005
    rows.append([gold_prob, f"{exact:.3f}", f"{trained[0]:.2f}", f"{trained[1]:.2f}"])
Markdown(
    tabulate(
        rows,
        headers=["真实前缀的概率", "公式", "训练后", "换老师的目标"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: recoverable-or-not
#| caption: 每步出错 1%：错误不可恢复时正确的概率按指数下降，每步有 20% 恢复时停在 0.95，错误步数也从平方增长变成线性增长
rows, wrong = [], {}
for length in (10, 50, 100, 500):
    row = [length]
    for recovery_rate in (0.0, 0.2):
        off = off_track_probability(length, error_rate=0.01, recovery_rate=recovery_rate)
        wrong[length, recovery_rate] = off.sum().item()
        row += [f"{1 - off[-1]:.3f}", f"{off.sum():.1f}"]
    rows.append(row)
assert abs(1 - off_track_probability(100, error_rate=0.01)[-1] - 0.99**100) < 1e-12
assert abs(off_track_probability(500, error_rate=0.01, recovery_rate=0.2)[-1] - 0.01 / 0.21) < 1e-9
assert 15 < wrong[50, 0.0] / wrong[10, 0.0] < 25  # 长度 5 倍，错误约 25 倍（短时）
assert 4.5 < wrong[500, 0.2] / wrong[100, 0.2] < 5.5  # 长度 5 倍，错误 5 倍
Markdown(
    tabulate(
        rows,
        headers=["长度", "正确，不可恢复", "错误步数", "正确，可恢复", "错误步数"],
        tablefmt="github",
        disable_numparse=True,
    )
)
