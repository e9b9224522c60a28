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
# # 模型显存占用：训练与推理（bf16/fp16）：实验
#
# 页面 `docs/training/memory.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate
from torch import nn
from torch.utils.checkpoint import checkpoint

from snippets.architecture.kv_cache import kv_cache_bytes
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.training.calculators import TRAINING_MEMORY
from snippets.training.memory import (
    activation_bytes,
    inference_bytes,
    llama_activation_bytes,
    model_state_bytes,
    output_bytes,
    saved_bytes,
)

torch.manual_seed(0)
GIB = 2**30


def num_params(name):
    """公开配置的参数量。"""
    return llama_num_params(**vars(DENSE_CONFIGS[name]))


LLAMA_7B = num_params("Llama-2-7B")
assert LLAMA_7B == 6_738_415_616 and num_params("Llama-3-8B") == 8_030_261_248


class ByteMaskDropout(torch.autograd.Function):
    """只存 1 字节掩码的 dropout，同 CUDA 的实现。"""

    @staticmethod
    def forward(ctx, x, p):
        keep = torch.rand(x.shape) >= p
        ctx.save_for_backward(keep)
        ctx.p = p
        return x * keep / (1 - p)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return grad * keep / (1 - ctx.p), None


class GPTBlock(nn.Module):
    """Korthikanti 等人图 2 的一层，bf16。"""

    def __init__(self, width, num_heads, *, fused=False):
        super().__init__()
        self.num_heads, self.fused = num_heads, fused
        kwargs = dict(dtype=torch.bfloat16)
        self.norm1, self.norm2 = nn.LayerNorm(width, **kwargs), nn.LayerNorm(width, **kwargs)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(width, width, **kwargs) for _ in range(4)
        )
        self.fc1, self.fc2 = nn.Linear(width, 4 * width, **kwargs), nn.Linear(4 * width, width, **kwargs)

    def attend(self, h):
        batch, length, width = h.shape
        q, k, v = (
            f(h).view(batch, length, self.num_heads, -1).transpose(1, 2)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(2, 3)) * (width // self.num_heads) ** -0.5
            weights = scores.masked_fill(future, float("-inf")).softmax(-1)
            y = ByteMaskDropout.apply(weights, 0.1) @ v
        return self.o_proj(y.transpose(1, 2).reshape(batch, length, width))

    def forward(self, x):
        x = x + ByteMaskDropout.apply(self.attend(self.norm1(x)), 0.1)
        return x + ByteMaskDropout.apply(self.fc2(F.gelu(self.fc1(self.norm2(x)))), 0.1)


class Checkpointed(nn.Module):
    """前向只留下输入，反向时重算。"""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


# %%
#| label: states-per-param
#| caption: 每个参数的模型状态字节数与 Llama-2-7B 的合计；前三行真的走一步 AdamW 再数张量，后两行取自各自的代码
def real_step(dtype, *, master=False, autocast=False):
    """走一步 AdamW，返回每个参数的权重、梯度、主权重、矩各几字节。"""
    model = nn.Linear(32, 32).to(dtype)
    params = list(model.parameters())
    copies = [p.detach().float().clone().requires_grad_() for p in params] if master else []
    optimizer = torch.optim.AdamW(copies or params)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        y = model(torch.randn(4, 32, dtype=dtype))
    assert not autocast or y.dtype == torch.bfloat16
    y.float().square().mean().backward()
    for p, copy in zip(params, copies, strict=False):
        copy.grad = p.grad.float()  # 再临时占 4 字节
    optimizer.step()
    moments = [x for s in optimizer.state.values() for x in s.values() if x.ndim]
    numel = sum(p.numel() for p in params)
    groups = (params, [p.grad for p in params], copies, moments)
    return [sum(x.nbytes for x in group) // numel for group in groups]


cases = {
    "bf16 + float32 主权重": real_step(torch.bfloat16, master=True),
    "autocast（权重 float32）": real_step(torch.float32, autocast=True),
    "全 bf16": real_step(torch.bfloat16),
    "Megatron-LM": [2, 4, 4, 8],
    "DeepSpeed 估算器": [2, 6, 4, 8],
}
rows, totals = [], []
for name, (weight, grad, master, moments) in cases.items():
    total = model_state_bytes(
        LLAMA_7B, weight_bytes=weight, grad_bytes=grad, master_bytes=master, optimizer_bytes=moments
    )
    totals.append(total / LLAMA_7B)
    rows.append([name, weight, grad, master + moments, f"{totals[-1]:.0f}（{total / 1e9:.1f} GB）"])
assert totals == [16, 16, 8, 18, 20]
assert cases["bf16 + float32 主权重"] == [2, 2, 4, 8] and cases["autocast（权重 float32）"] == [4, 4, 0, 8]
assert [row[-1][3:-1] for row in rows[:1]] == ["107.8 GB"]
assert round(16 * LLAMA_7B / GIB, 1) == 100.4 and round(2 * LLAMA_7B / 1e9, 1) == 13.5
Markdown(
    tabulate(
        rows,
        headers=["做法", "权重", "梯度", "主权重与矩", "合计（7B）"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: activation-measured-vs-formula
#| caption: 一层 GPT 块为反向保存的字节数除以 sbh：不融合时随长度上升，FlashAttention 停在 34，全量重算停在 2；点是自动求导真的保存的，线是公式
WIDTH, HEADS = 128, 8
lengths = [32, 64, 128, 256, 384, 512]
modes = {"none": "不重算", "selective": "FlashAttention", "full": "全量重算"}
points, lines = {}, {}
for mode in modes:
    block = GPTBlock(WIDTH, HEADS, fused=mode == "selective")
    model = Checkpointed(block) if mode == "full" else block
    points[mode], lines[mode] = [], []
    for length in lengths:
        x = torch.randn(1, length, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        got = saved_bytes(model, x)
        want = activation_bytes(
            num_layers=1,
            batch_size=1,
            num_tokens=length,
            hidden_size=WIDTH,
            num_heads=HEADS,
            recompute=mode,
        )
        statistics = 2 * 2 * length * 2  # 两个 LayerNorm 的均值与标准差，bf16
        extra = {"none": statistics + length**2, "selective": statistics + 4 * HEADS * length, "full": 0}
        assert got - want == extra[mode]  # 差的字节全部有来历
        points[mode].append(got / x.numel())
        lines[mode].append(want / x.numel())
fig, ax = plt.subplots(figsize=(6.0, 3.5))
for (mode, label), style, marker in zip(modes.items(), ("-", "--", ":"), "os^", strict=True):
    color = f"C{list(modes).index(mode)}"
    ax.plot(lengths, lines[mode], style, color=color, label=f"{label}：公式")
    ax.plot(lengths, points[mode], marker, color=color, label=f"{label}：实测")
ax.set(xlabel="序列长度 s（个 token）", ylabel="字节数 / sbh", ylim=(0, 210))
ax.legend(loc="upper left", fontsize=10)

assert lines["none"][-1] == 34 + 5 * HEADS * 512 / WIDTH == 194
assert set(lines["selective"]) == {34} and set(points["full"]) == {2}
one = dict(num_layers=1, batch_size=1, hidden_size=1, num_heads=1, bytes_per_element=4)
assert activation_bytes(**one, num_tokens=1, recompute="selective") == 66  # float32 不是 68
assert activation_bytes(**one, num_tokens=1) == 66 + 9  # 也不是 10
assert saved_bytes(nn.Dropout(0.1), x) == x.nbytes  # CPU 的掩码与输入同类型，不是 1 字节
assert saved_bytes(nn.RMSNorm(WIDTH, eps=1e-6, dtype=torch.bfloat16), x) > 4 * x.nbytes  # 没有融合
assert f"{points['none'][-1]:.2f}" == "198.06" and f"{points['selective'][-1]:.2f}" == "34.31"

# %%
#| label: states-or-activations
#| caption: Llama-2-7B 训练时的激活（GB）：FlashAttention 时各层之和，不融合时打分另加的，全量重算，输出层；模型状态恒为 107.8 GB
config = DENSE_CONFIGS["Llama-2-7B"]
fields = ("num_layers", "hidden_size", "intermediate_size", "num_heads", "num_kv_heads", "head_dim")
shape = {name: getattr(config, name) for name in fields}
rows, table = [], {}
for batch_size, length in ((1, 2048), (1, 4096), (8, 4096), (1, 32768)):
    sizes = dict(batch_size=batch_size, num_tokens=length)
    flash = llama_activation_bytes(**shape, **sizes)
    scores = 2 * config.num_layers * batch_size * config.num_heads * length**2  # softmax 的输出，16 位
    one_layer = llama_activation_bytes(**{**shape, "num_layers": 1}, **sizes)
    inputs = activation_bytes(
        num_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_heads=config.num_heads,
        recompute="full",
        **sizes,
    )
    head = output_bytes(hidden_size=config.hidden_size, vocab_size=config.vocab_size, **sizes)
    table[batch_size, length] = [x / 1e9 for x in (flash, scores, inputs + one_layer, head)]
    rows.append([f"{batch_size} × {length}", *(f"{x:.1f}" for x in table[batch_size, length])])
per_layer = llama_activation_bytes(**{**shape, "num_layers": 1}, batch_size=1, num_tokens=1) / 4096
assert round(per_layer, 2) == 37.53  # 37.5 个 sbh，外加 log-sum-exp
assert rows[1] == ["1 × 4096", "20.1", "34.4", "1.7", "0.6"]
assert rows[2] == ["8 × 4096", "161.2", "274.9", "13.6", "4.7"]
assert rows[3] == ["1 × 32768", "161.2", "2199.0", "13.6", "4.7"]
llama3_head = output_bytes(batch_size=1, num_tokens=8192, hidden_size=4096, vocab_size=128256)
assert round(4 * 8192 * 128256 / GIB, 1) == 3.9 and llama3_head / GIB > 3.9
Markdown(
    tabulate(
        rows,
        headers=["b × s", "Flash", "不融合另加", "全量重算", "输出层"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: inference-ratio
#| caption: 推理总量除以权重随缓存的 token 数变化：色带是流传的 1.5 到 2.5 倍，三个模型进入色带的位置相差约十七倍
tokens = [2**i for i in range(10, 21)]
fig, ax = plt.subplots(figsize=(6.0, 3.5))
ratios = {}
for (name, label), style in zip(
    (
        ("Llama-2-7B", "Llama-2-7B（MHA）"),
        ("Llama-3-8B", "Llama-3-8B（GQA）"),
        ("Llama-3-70B", "Llama-3-70B（GQA）"),
    ),
    ("o-", "s--", "^:"),
    strict=True,
):
    c = DENSE_CONFIGS[name]
    sizes = dict(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
    weights = 2 * num_params(name)
    ratios[name] = [
        inference_bytes(num_params=num_params(name), num_tokens=n, **sizes) / weights for n in tokens
    ]
    ax.plot(tokens, ratios[name], style, markersize=4, label=label)
ax.axhspan(1.5, 2.5, color="C5", alpha=0.25, linewidth=0)
ax.set(xlabel="缓存的 token 总数（条数 × 长度）", ylabel="总量 / 权重（倍）", ylim=(0.8, 45))
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(tokens[::2], ["1K", "4K", "16K", "64K", "256K", "1M"])
ax.set_yticks([1, 1.5, 2.5, 5, 10, 20, 40], ["1", "1.5", "2.5", "5", "10", "20", "40"])
ax.minorticks_off()
ax.legend(loc="upper left")

at = {name: dict(zip(tokens, values, strict=True)) for name, values in ratios.items()}
assert round(at["Llama-3-8B"][2048], 2) == 1.02 and round(at["Llama-2-7B"][2048], 2) == 1.08
assert round(at["Llama-2-7B"][65536], 2) == 3.55 and round(at["Llama-3-8B"][65536], 2) == 1.53
assert round(at["Llama-3-8B"][2**19], 2) == 5.28
half = {  # 到 1.5 倍要缓存多少 token
    name: num_params(name)
    / kv_cache_bytes(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=128, num_tokens=1)
    for name in ratios
    for c in [DENSE_CONFIGS[name]]
}
assert [round(x, -3) for x in half.values()] == [13_000, 61_000, 215_000]
assert round(half["Llama-3-70B"] / half["Llama-2-7B"]) == 17
# 8K 提示的工作区与 logits；H100 80GB 报 81559 MiB，留 2 GB 给其余，能放几条 8K
c = DENSE_CONFIGS["Llama-3-8B"]
sizes = dict(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim, num_tokens=0)
work = inference_bytes(
    num_params=0, hidden_size=c.hidden_size, intermediate_size=c.intermediate_size, step_tokens=8192, **sizes
)
logits = inference_bytes(num_params=0, vocab_size=c.vocab_size, num_logits=8192, **sizes)
assert round(work / GIB, 2) == 0.78 and round(logits / GIB, 1) == 3.9 and 2 * 8192 * 4096 == 64 * 2**20
card = 81559 * 2**20
assert round(card / GIB, 1) == 79.6 and round(card / 1e9, 1) == 85.5
assert int((0.92 * card - 2 * num_params("Llama-3-8B") - 2e9) / (131072 * 8192)) == 56
assert int((0.92 * 80e9 - 2 * num_params("Llama-3-8B") - 2e9) / (131072 * 8192)) == 51

# %%
#| label: paper-models
#| caption: 论文表 3 的四个模型（张量并行 8 路，长 2048）：第一级的激活基线，以及各办法剩下的百分比
PAPER = {  # 头数、宽度、层数、流水线级数、交错段数、微批
    "22B": (64, 6144, 48, 1, None, 4),
    "175B": (96, 12288, 96, 8, 3, 1),
    "530B": (128, 20480, 105, 35, 3, 1),
    "1T": (160, 25600, 128, 64, None, 1),
}
methods = (dict(sequence_parallel=True), dict(recompute="selective"))
methods += (dict(sequence_parallel=True, recompute="selective"), dict(recompute="full"))
rows, full = [], []
for name, (heads, width, layers, stages, chunks, micro_batch) in PAPER.items():
    sizes = dict(num_layers=layers, batch_size=micro_batch, num_tokens=2048, hidden_size=width)
    sizes |= dict(num_heads=heads, tp_size=8)
    base = activation_bytes(**sizes)
    percents = [100 * activation_bytes(**sizes, **method) / base for method in methods]
    interleave = 1 + (stages - 1) / (stages * chunks) if chunks else 1
    rows.append([name, f"{base * interleave / 1e9:.0f}", *(f"{x:.0f}%" for x in percents[:3])])
    full.append(percents[3])
assert [row[1] for row in rows] == ["64", "72", "122", "141"]
assert [row[4] for row in rows] == ["16%", "18%", "20%", "20%"]
assert [f"{x:.1f}" for x in full] == ["7.6", "8.7", "9.5", "9.5"]
assert f"{percents[2]:.1f}" == "20.2"  # 1T，530B 同
selective = {}
for name in ("175B", "530B"):
    heads, width = PAPER[name][:2]
    selective[name] = 5 * heads * 2048 / width
assert selective == {"175B": 80, "530B": 64} and round(80 / 114, 2) == 0.70 and round(64 / 98, 2) == 0.65
sizes = dict(batch_size=4, num_tokens=2048, hidden_size=6144)
extra = 4 * 2048 * 6144 / 8 + output_bytes(**sizes, vocab_size=51200, tp_size=8)
layers = activation_bytes(**sizes, num_layers=48, num_heads=64, tp_size=8, sequence_parallel=True)
assert f"{100 * extra / layers:.2f}" == "0.57"  # 论文写不到 0.01%
Markdown(
    tabulate(
        rows,
        headers=["模型", "基线 GB", "序列并行", "选择性", "两者"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: calculator
#| caption: 选一个模型，改并行、重算与批，看一张卡上各要多少。
#| echo: hide
states = TRAINING_MEMORY.evaluate(**TRAINING_MEMORY.presets["Llama-2-7B"])["states"]
assert round(states / 1e9, 1) == 107.8
Markdown(TRAINING_MEMORY.markdown())
