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
# # LoRA（Low-Rank Adaptation）：实验
#
# 页面 `docs/training/lora.md` 的实验：四种初始化、首步改动随秩怎么变、合并的误差、模型状态与激活各占多少。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.architecture.rope import rope_cos_sin, rope_inverse_frequencies
from snippets.architecture.transformer_from_scratch import DecoderBlock
from snippets.training.lora import LoRALinear, llama_lora_num_params, lora_state_bytes
from snippets.training.memory import model_state_bytes, saved_bytes

torch.manual_seed(0)
DOUBLE = torch.float64

# %%
#| label: init-choices
#| caption: 四种初始化在同一个回归任务上：都置零时两个梯度都是 0，损失不动；都随机时起点的损失已经变大
#| echo: fold
SEEDS, STEPS = 5, 200


def train(kind, seed):
    """目标是底座加一个秩 2 的改动；返回起点的输出变化、两个梯度的范数、首末两步的损失。"""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(32, 24, dtype=DOUBLE), r=4, alpha=8)
    x = torch.randn(256, 32, dtype=DOUBLE)
    change = torch.randn(24, 2, dtype=DOUBLE) @ torch.randn(2, 32, dtype=DOUBLE) * 0.05
    with torch.no_grad():
        target = layer.base(x) + x @ change.T
        if kind in ("A 零，B 随机", "都置零"):
            layer.lora_A.zero_()
        if kind in ("A 零，B 随机", "都随机"):
            layer.lora_B.uniform_(-0.5, 0.5)  # 同一条规则：1/√4
        start = (layer(x) - layer.base(x)).square().mean().sqrt().item()
    optimizer, record = torch.optim.Adam([layer.lora_A, layer.lora_B], lr=0.01), [start]
    for step in range(STEPS):
        loss = (layer(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            record += [layer.lora_A.grad.norm().item(), layer.lora_B.grad.norm().item(), loss.item()]
        optimizer.step()
    return torch.tensor([*record, loss.item()], dtype=DOUBLE)


kinds = ("A 随机，B 零", "A 零，B 随机", "都置零", "都随机")
runs = {kind: torch.stack([train(kind, seed) for seed in range(SEEDS)]) for kind in kinds}
rows = []
for kind in kinds:
    _, grad_a, grad_b, first, last = runs[kind].quantile(0.5, dim=0).tolist()
    end = f"{last:.2f}" if last > 1e-3 else "< 1e-5"
    rows.append([kind, f"{grad_a:.2f}", f"{grad_b:.2f}", f"{first:.2f}", end])
for kind in kinds[:3]:
    assert (runs[kind][:, 0] == 0).all()  # 起点与底座相等
assert (runs["A 随机，B 零"][:, 1] == 0).all() and (runs["A 随机，B 零"][:, 2] > 0).all()
assert (runs["A 零，B 随机"][:, 2] == 0).all() and (runs["A 零，B 随机"][:, 1] > 0).all()
assert (runs["都置零"][:, 1:3] == 0).all() and (runs["都置零"][:, 3] == runs["都置零"][:, 4]).all()
ratio = runs["都随机"][:, 3] / runs["A 随机，B 零"][:, 3]
assert 2 < ratio.min() and ratio.max() < 6, ratio
assert all((runs[kind][:, 4] < 1e-5).all() for kind in kinds if kind != "都置零")
assert [row[3] for row in rows] == ["0.13", "0.13", "0.13", "0.62"]
Markdown(
    tabulate(
        rows,
        headers=["初始化", r"$\Vert\partial A\Vert$", r"$\Vert\partial B\Vert$", "首步损失", "200 步后"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: first-step-vs-rank
#| caption: 首步输出改动相对秩 4 的倍数：SGD 下除以 r 的随秩反比缩小，除以根号 r 的持平；Adam 下除以 r 的持平，除以根号 r 的随根号 r 增大
#| echo: fold
RANKS = [4, 8, 16, 32, 64, 128, 256]
K, REPEATS = 256, 40


def first_step(rank, *, adam, rank_stabilized, seed):
    """一个 token、一步更新：返回 B 的梯度范数与输出改动的均方根。"""
    torch.manual_seed(seed)
    base = nn.Linear(K, 64, bias=False, dtype=DOUBLE)
    layer = LoRALinear(base, r=rank, alpha=16, rank_stabilized=rank_stabilized)
    x, upstream = torch.randn(K, dtype=DOUBLE), torch.randn(64, dtype=DOUBLE)
    before = layer(x)
    before.backward(upstream)
    grad = layer.lora_B.grad.clone()
    make = torch.optim.Adam if adam else torch.optim.SGD
    make([layer.lora_A, layer.lora_B], lr=1e-4).step()  # 此时 A 的梯度是 0，不动
    with torch.no_grad():
        after = layer(x)
        low = layer.lora_A @ x
        gamma = layer.scaling
        exact = (
            -1e-4 * gamma * upstream.sign() * low.abs().sum()
            if adam
            else -1e-4 * gamma**2 * upstream * (low @ low)
        )
        error = ((after - before - exact).abs().max() / exact.abs().max()).item()
        assert error < (0.02 if adam else 1e-9)  # Adam 的分母多 1e-8，梯度极小的元素走不满一步
        return grad.norm().item(), (after - before).square().mean().sqrt().item()


def sweep(*, adam, rank_stabilized):
    """各秩的均值，除以秩 4 的均值，(梯度, 改动)。"""
    options = {"adam": adam, "rank_stabilized": rank_stabilized}
    table = torch.tensor(
        [[first_step(r, seed=s, **options) for s in range(REPEATS)] for r in RANKS], dtype=DOUBLE
    )
    means = table.mean(1)
    return means / means[0]


results = {
    (optimizer, scaling): sweep(adam=optimizer == "Adam", rank_stabilized=scaling == "α/√r")
    for optimizer in ("SGD", "Adam")
    for scaling in ("α/r", "α/√r")
}
fig, ax = plt.subplots(figsize=(6.0, 3.4))
styles = {
    ("Adam", "α/√r"): ("-", "o", "C0"),
    ("Adam", "α/r"): ("--", "s", "C1"),
    ("SGD", "α/√r"): ("-.", "^", "C2"),
    ("SGD", "α/r"): (":", "v", "C3"),
}
for key, (style, marker, color) in styles.items():
    ax.plot(RANKS, results[key][:, 1], style, marker=marker, color=color, label=f"{key[0]}，{key[1]}")
ax.set_xscale("log", base=2)
ax.set_yscale("log", base=2)
ax.set_xticks(RANKS, [str(r) for r in RANKS])
ax.set_yticks([2.0**n for n in (-6, -4, -2, 0, 2)], ["1/64", "1/16", "1/4", "1", "4"])
ax.set_ylim(2.0**-7, 2.0**5.5)
ax.set_xlabel("秩 r")
ax.set_ylabel("首步输出改动（秩 4 为 1）")
ax.legend(loc="upper left", ncols=2, frameon=False)
end = {key: curve[-1].tolist() for key, curve in results.items()}  # 秩 256，是秩 4 的 64 倍
assert 1 / 80 < end["SGD", "α/r"][1] < 1 / 55 and 0.8 < end["SGD", "α/√r"][1] < 1.15
assert 0.9 < end["Adam", "α/r"][1] < 1.1 and 7.2 < end["Adam", "α/√r"][1] < 8.8
assert 1 / 8.8 < end["SGD", "α/r"][0] < 1 / 7 and 0.9 < end["SGD", "α/√r"][0] < 1.15  # 梯度：1/√r 与持平
assert f"{end['Adam', 'α/r'][1]:.2f} {end['Adam', 'α/√r'][1]:.1f}" == "0.95 7.6"
assert f"{end['SGD', 'α/r'][0]:.2f} {end['SGD', 'α/√r'][0]:.2f}" == "0.13 1.04"

# %%
#| label: merge-error
#| caption: 合并一个秩 8 的适配器：bf16 底座上改动越小，没变的权重越多，真正写进去的改动误差越大
#| echo: fold


def merge_error(relative, dtype, seed=0):
    """‖ΔW‖/‖W‖ = relative 时合并：没变的权重占比；写进去的改动的相对误差，整体与 A 的行空间内。"""
    torch.manual_seed(seed)
    layer = LoRALinear(nn.Linear(256, 256, bias=False, dtype=DOUBLE), r=8, alpha=16)
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.lora_B *= relative * layer.base.weight.norm() / layer.delta_weight().norm()
    layer = layer.to(dtype)
    before = layer.base.weight.clone()
    a, b = layer.lora_A.double(), layer.lora_B.double()
    delta = (b @ a * layer.scaling).detach()
    layer.merge()
    error = (layer.base.weight.double() - before.double() - delta).detach()
    inside = torch.linalg.qr(a.T.detach())[0]  # A 的行空间的标准正交基
    same = (layer.base.weight == before).double().mean()
    return torch.stack([same, error.norm() / delta.norm(), (error @ inside).norm() / (delta @ inside).norm()])


rows, table = [], {}
for relative in (1e-1, 1e-2, 1e-3, 3e-4):
    seeds = torch.stack([merge_error(relative, torch.bfloat16, seed) for seed in range(5)])
    table[relative] = same, _, inside = seeds.mean(0).tolist()
    rows.append([f"{relative:g}", f"{same:.0%}", f"{inside:.0%}" if inside > 0.01 else "< 1%"])
    if relative == 1e-3:
        assert ((seeds[:, 0] - 0.83).abs() < 0.01).all() and ((seeds[:, 2] - 0.58).abs() < 0.02).all(), seeds
assert 0.94 < table[3e-4][0] < 0.96 and 0.82 < table[1e-3][1] < 0.86 and 0.01 < table[1e-1][1] < 0.02
assert table[1e-1][2] < 0.005 and 0.02 < table[1e-2][2] < 0.03 and 0.14 < table[1e-2][1] < 0.16
assert f"{table[1e-3][0]:.0%} {table[1e-3][2]:.0%}" == "83% 58%"
exact, single = merge_error(3e-4, DOUBLE), merge_error(3e-4, torch.float32)
assert exact[0] == 0 and exact[1] < 1e-12  # float64：合并就是相加
assert single[0] < 0.01 and single[1] < 1e-4
headers = [r"$\Vert\Delta W\Vert/\Vert W\Vert$", "没变的权重", "行空间内的误差"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: state-bytes
#| caption: Llama-2-7B 的模型状态：LoRA 省掉的是底座的梯度与优化器，底座的权重还在；量化底座才动那一项
#| echo: fold
GB = 1e9
config = DENSE_CONFIGS["Llama-2-7B"]
shape = {
    "hidden_size": config.hidden_size,
    "intermediate_size": config.intermediate_size,
    "num_layers": config.num_layers,
    "num_heads": config.num_heads,
    "num_kv_heads": config.num_kv_heads,
    "head_dim": config.head_dim,
}
total = llama_num_params(vocab_size=config.vocab_size, **shape)
q_v = llama_lora_num_params(r=8, targets="qv", **shape)
all_linear = llama_lora_num_params(r=16, **shape)
norms = (2 * config.num_layers + 1) * config.hidden_size
unquantised = 2 * config.vocab_size * config.hidden_size + norms  # 嵌入、输出头、归一化仍是 16 位
nf4 = (4 + 8 / 64 + 32 / (64 * 256)) / 8  # 64 个一块的 4 位，8 位的块常数，再每 256 个一个 float32
qlora = lora_state_bytes(total - unquantised, all_linear, base_bytes=nf4) + 2 * unquantised
entries = [
    ("全量，Adam", total, 2 * total, model_state_bytes(total)),
    ("LoRA，q、v，r=8", q_v, 2 * total, lora_state_bytes(total, q_v)),
    ("LoRA，七个，r=16", all_linear, 2 * total, lora_state_bytes(total, all_linear)),
    ("QLoRA，七个，r=16", all_linear, qlora - 16 * all_linear, qlora),
]
rows = []
for name, trainable, base_weights, states in entries:
    count = f"{trainable / 1e6:.1f}M"
    rows.append(
        [name, count, f"{base_weights / GB:.2f}", f"{(states - base_weights) / GB:.2f}", f"{states / GB:.2f}"]
    )
assert q_v == 4194304 and all_linear == 39976960
assert [row[2] for row in rows[:3]] == ["13.48"] * 3
assert [row[4] for row in rows] == ["107.81", "13.54", "14.12", "4.51"], rows
assert f"{entries[0][3] / entries[2][3]:.1f}" == "7.6"
headers = ["做法", "可训练", "底座权重 GB", "其余 GB", "合计 GB"]
Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))

# %%
#| label: saved-activations
#| caption: 一层 LLaMA 式的块为反向保存的激活，单位是 BTC 个元素：七个线性层都挂 LoRA 几乎不省，开 dropout 反而更多
#| echo: fold
B, T, C, INNER, HEADS = 2, 64, 128, 344, 4


class LinearSwiGLU(nn.Module):
    """与 SwiGLU 相同，只是经过三个线性层，便于替换。"""

    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    """中间的一层：输入也要梯度。"""

    def __init__(self, targets, *, dropout=0.0):
        super().__init__()
        self.block = DecoderBlock(C, INNER, num_heads=HEADS)
        self.block.mlp = LinearSwiGLU(self.block.mlp)
        self.block.requires_grad_(targets is None)
        for parent in (self.block.self_attn, self.block.mlp):
            for name, child in list(parent.named_children()):
                if targets is not None and name in targets:
                    setattr(parent, name, LoRALinear(child, r=8, dropout=dropout))
        self.cos_sin = rope_cos_sin(torch.arange(T).expand(B, T), rope_inverse_frequencies(C // HEADS))

    def forward(self, x):
        return self.block(x, cos_sin=self.cos_sin)


SEVEN = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
layers = {
    "全量": Layer(None),
    "LoRA，q、v": Layer(("q_proj", "v_proj")),
    "LoRA，七个": Layer(SEVEN),
    "七个，dropout 0.1": Layer(SEVEN, dropout=0.1),
}
hidden = torch.randn(B, T, C, requires_grad=True)
saved = {name: saved_bytes(layer, hidden) / (4 * B * T * C) for name, layer in layers.items()}
flops = {}
for name, layer in [("全量", nn.Linear(256, 256)), ("LoRA", LoRALinear(nn.Linear(256, 256), r=8))]:
    with FlopCounterMode(display=False) as counter:
        layer(torch.randn(512, 256, requires_grad=True)).sum().backward()
    flops[name] = counter.get_total_flops() / (2 * 512 * 256 * 256)
assert flops == {"全量": 3.0, "LoRA": 2 + 3 * 8 * (256 + 256) / 256**2}  # 前向、输入梯度；适配器三份
assert f"{flops['LoRA']:.2f} {flops['LoRA'] / 3:.2f}" == "2.19 0.73"
assert [f"{value:.1f}" for value in saved.values()] == ["27.9", "21.3", "26.3", "38.0"], saved
Markdown(
    tabulate(
        [[name, f"{value:.1f}", f"{value / saved['全量']:.0%}"] for name, value in saved.items()],
        headers=["训练什么", "保存的激活（BTC）", "相对全量"],
        tablefmt="github",
        disable_numparse=True,
    )
)
