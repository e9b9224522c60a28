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
# # KV cache：显存、prefill 与 decode：实验
#
# 页面 `docs/architecture/kv-cache.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import random

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.calculators import KV_CACHE
from snippets.architecture.kv_cache import (
    KVCache,
    attention_intensity,
    decode_step_seconds,
    fake_quantize,
    kv_cache_bytes,
    linear_intensity,
)
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.transformer_from_scratch import MiniLlama, generate_greedy, init_weights

torch.manual_seed(0)
GIB = 2**30
H100 = {"flops": 989e12, "bandwidth": 3.35e12}  # H100 SXM，bf16 稠密
A100 = {"flops": 312e12, "bandwidth": 2.039e12}  # A100 80GB SXM，bf16 稠密


def config_bytes(name, **kwargs):
    """按公开配置算 KV cache 的字节数。"""
    config = DENSE_CONFIGS[name]
    shape = dict(num_layers=config.num_layers, num_kv_heads=config.num_kv_heads, head_dim=config.head_dim)
    return kv_cache_bytes(**{**shape, **kwargs})


# %%
#| label: flops-with-and-without-cache
#| caption: 提示 16 个 token、贪心生成 m 个：不用缓存与用缓存的前向浮点运算总数、两者之比、缓存的实际字节数
shape = dict(num_layers=2, num_heads=4, num_kv_heads=2)
model = MiniLlama(vocab_size=64, hidden_size=32, intermediate_size=64, **shape).double().eval()
init_weights(model, std=0.3)
prompt = torch.randint(64, (1, 16), generator=torch.Generator().manual_seed(1))
rows, ratios = [], []
for num_new in (8, 16, 32):
    with FlopCounterMode(display=False) as plain:
        expected = generate_greedy(model, prompt, max_new_tokens=num_new)
    caches = [KVCache() for _ in model.layers]
    with FlopCounterMode(display=False) as cached:
        tokens = generate_greedy(model, prompt, max_new_tokens=num_new, kv_caches=caches)
    assert tokens.equal(expected)  # 生成的 token 完全相同
    nbytes = sum(cache.keys.nbytes + cache.values.nbytes for cache in caches)
    stored = 16 + num_new - 1  # 最后一个 token 没有再送进模型
    size = dict(num_layers=2, num_kv_heads=2, head_dim=8, num_tokens=stored, bytes_per_element=8)
    assert nbytes == kv_cache_bytes(**size) and caches[0].length == stored
    ratios.append(plain.get_total_flops() / cached.get_total_flops())
    flops = [counter.get_total_flops() / 1e6 for counter in (plain, cached)]
    rows.append([num_new, f"{flops[0]:.1f}", f"{flops[1]:.1f}", f"{ratios[-1]:.1f}", nbytes])

assert all(abs(x / y - 1) < 0.005 for x, y in zip(ratios, (6.88, 12.43, 22.33), strict=True))
estimate = 32 * (16 + 31 / 2) / (16 + 31)  # 只数线性层：送进模型的 token 数之比
assert 1 < ratios[-1] / estimate < 1.1 and round(estimate, 1) == 21.4
assert rows[-1][-1] == 2 * 2 * 2 * 8 * 47 * 8
Markdown(
    tabulate(
        rows,
        headers=["m", "不用缓存（百万）", "用缓存（百万）", "倍数", "缓存字节"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: bytes-by-model
#| caption: 一条序列的 KV cache（bf16）：每个 token 的 KiB，以及 8K、32K、128K 上下文时的 GiB
rows, per_token, at_128k = [], {}, {}
for name in ("Llama-2-7B", "Llama-3-8B", "Qwen2.5-7B", "Llama-3-70B", "DeepSeek-V3"):
    if name == "DeepSeek-V3":  # MLA：61 层，每层每 token 只存 512 维潜变量与 64 维共享的旋转键
        per_token[name] = 61 * (512 + 64) * 2
        label = "DeepSeek-V3（MLA）"
    else:
        per_token[name] = config_bytes(name, num_tokens=1)
        label = f"{name}（{DENSE_CONFIGS[name].num_kv_heads} 头）"
    sizes = [per_token[name] * length * 1024 / GIB for length in (8, 32, 128)]
    at_128k[name] = sizes[-1]
    rows.append([label, f"{per_token[name] / 1024:.1f}", *(f"{x:.2f}" for x in sizes)])

assert per_token["Llama-2-7B"] == 512 * 1024 and per_token["Llama-3-8B"] == 128 * 1024
assert per_token["Qwen2.5-7B"] == 56 * 1024 and per_token["Llama-3-70B"] == 320 * 1024
assert [f"{per_token['DeepSeek-V3'] * n * 1024 / GIB:.2f}" for n in (8, 32, 128)] == ["0.54", "2.14", "8.58"]
assert at_128k["Llama-2-7B"] == 64 and at_128k["Llama-3-8B"] == 16 and at_128k["Llama-3-70B"] == 40
assert config_bytes("Llama-3-70B", num_tokens=1, num_kv_heads=64) == 8 * per_token["Llama-3-70B"]
assert kv_cache_bytes(num_layers=40, num_kv_heads=40, head_dim=128, num_tokens=1) == 800 * 1024  # OPT-13B
Markdown(
    tabulate(
        rows,
        headers=["模型（键值头）", "KiB/token", "8K", "32K", "128K"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: intensity-by-batch
#| caption: 解码时的算术强度：线性层随批大小上升并越过 H100 的拐点，注意力只取决于分组数，与批大小无关
ridge_h100, ridge_a100 = (gpu["flops"] / gpu["bandwidth"] for gpu in (H100, A100))
batches = [2**i for i in range(11)]
linear = [linear_intensity(num_tokens=n, in_features=4096, out_features=14336) for n in batches]
attention = {g: attention_intensity(num_queries=1, num_keys=8192, num_groups=g) for g in (1, 4, 8)}

fig, ax = plt.subplots(figsize=(6.0, 3.6))
ax.plot(batches, linear, "o-", color="C0", markersize=4)
ax.annotate("线性层", (20, 45), fontsize=11, color="C0")
for (g, value), style, color in zip(attention.items(), (":", "--", "-."), ("C1", "C2", "C3"), strict=True):
    ax.plot(batches, [value] * len(batches), style, color=color)
    ax.annotate(f"注意力，g = {g}", (150, value * 1.22), fontsize=11, color=color)
ax.axhline(ridge_h100, color="C4", linewidth=1)
ax.annotate(f"H100 拐点 {ridge_h100:.0f}", (1, ridge_h100 * 1.15), fontsize=11)
ax.set(xlabel="批大小 B（每条 1 个新 token）", ylabel="浮点运算数每字节", ylim=(0.6, 1500))
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(batches[::2], batches[::2])
ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
ax.minorticks_off()

assert round(ridge_h100) == 295 and round(ridge_a100) == 153
assert abs(linear[0] - 1.0) < 0.001 and abs(linear[6] - 62.7) < 0.1  # B = 1、64
crossing = next(
    n
    for n in range(1, 1024)
    if linear_intensity(num_tokens=n, in_features=4096, out_features=14336) > ridge_h100
)
assert crossing == 326
assert all(0.999 * g < value < g for g, value in attention.items())  # 约等于 g，到不了 8
prefill_attention = attention_intensity(num_queries=2048, num_keys=2048, num_groups=4)
prefill_linear = linear_intensity(num_tokens=2048, in_features=4096, out_features=14336)
assert round(prefill_attention) == 1638 and round(prefill_linear) == 1247  # 预填充 2048 个 token
assert prefill_attention / 2 > ridge_h100  # 因果掩码省一半，仍在拐点之上

# %%
#| label: paged-utilisation
#| caption: 同一批请求、同样大的显存：按最大长度连续预留与分页，平均装着真实 token 的比例、已分配而空着的比例、同时处理的请求数
CAPACITY, STEPS, MAX_LENGTH = 65536, 2200, 2048


def simulate(block_size, *, seed, contiguous=False):
    """逐步解码，先来先服务；没有块可长时抢占最晚进来的一条，退回队首重算。"""
    rng = random.Random(seed)
    total_blocks = CAPACITY // block_size
    running, waiting, free = [], [], total_blocks
    stored = allocated = concurrent = 0

    def blocks(length):
        return -(-length // block_size)

    for step in range(STEPS):
        index = 0
        while index < len(running):  # 每条长一个 token
            request = running[index]
            if request["length"] == request["target"]:
                free += request["blocks"]
                running.pop(index)
                continue
            need = blocks(request["length"] + 1) - request["blocks"]
            if need > free:
                victim = running.pop()
                free += victim["blocks"]
                waiting.insert(0, victim)
                continue
            request["length"] += 1
            request["blocks"] += max(need, 0)
            free -= max(need, 0)
            index += 1
        while True:  # 队列总是满的：装得下就放进来
            if not waiting:
                prompt_length = rng.randint(32, 512)
                waiting.append({"length": prompt_length, "target": prompt_length + rng.randint(32, 1024)})
            request = waiting[0]
            need = blocks(MAX_LENGTH if contiguous else request["length"] + 1)
            if need > free:
                break
            running.append({**waiting.pop(0), "blocks": need})
            free -= need
        if step >= 1000:  # 去掉开头
            stored += sum(r["length"] for r in running)
            allocated += (total_blocks - free) * block_size
            concurrent += len(running)
    count = STEPS - 1000
    return stored / count / CAPACITY, 1 - stored / allocated, concurrent / count


rows, result = [], {}
for name, block_size, contiguous in (
    ("连续预留 2048", 2048, True),
    ("分页，块 256", 256, False),
    ("分页，块 64", 64, False),
    ("分页，块 16", 16, False),
):
    runs = torch.tensor([simulate(block_size, seed=seed, contiguous=contiguous) for seed in range(3)])
    assert (runs.amax(0) - runs.amin(0))[:2].max() < 0.03  # 三个种子相差不到 3 个百分点
    result[name] = runs.mean(0).tolist()
    rows.append([name, *(f"{100 * x:.1f}%" for x in result[name][:2]), f"{result[name][2]:.0f}"])
paged, reserved = result["分页，块 16"], result["连续预留 2048"]
assert abs(reserved[0] - 0.298) < 0.02 and reserved[2] == 32
assert paged[0] > 0.97 and 0.010 < paged[1] < 0.015 and 3.0 < paged[2] / reserved[2] < 3.6
assert result["分页，块 256"][1] > 10 * paged[1]
Markdown(
    tabulate(
        rows,
        headers=["分配方式", "装着 token", "分了没用", "同时处理"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: decode-lower-bound
#| caption: Llama-3-8B、bf16、8K 上下文在一张 H100 上解码一步的下界：要读的权重与缓存，每步毫秒数，整批每秒 token 数
config = DENSE_CONFIGS["Llama-3-8B"]
with torch.device("meta"):
    llama = MiniLlama(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
    )
total_params = sum(p.numel() for p in llama.parameters())
read_params = total_params - llama.embed_tokens.weight.numel()  # 嵌入只查几行
assert total_params == 8_030_261_248
rows, seconds, tokens_per_second = [], {}, {}
for batch_size in (1, 8, 32):
    cache = config_bytes("Llama-3-8B", num_tokens=8192, batch_size=batch_size)
    seconds[batch_size] = decode_step_seconds(
        weight_bytes=2 * read_params, cache_bytes=cache, bandwidth=H100["bandwidth"]
    )
    tokens_per_second[batch_size] = batch_size / seconds[batch_size]
    rows.append(
        [
            batch_size,
            f"{2 * read_params / 1e9:.1f}",
            f"{cache / 1e9:.1f}",
            f"{1000 * seconds[batch_size]:.1f}",
            f"{tokens_per_second[batch_size]:.0f}",
        ]
    )
assert [row[-2] for row in rows] == ["4.8", "7.0", "14.7"]
assert [row[-1] for row in rows] == ["208", "1136", "2171"]
Markdown(
    tabulate(
        rows,
        headers=["B", "权重 GB", "缓存 GB", "毫秒/步", "token/秒"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: key-quantization-axis
#| caption: 键里有三个放大 15 倍的通道时，逐通道量化使注意力权重的总变差小得多；没有离群通道时两种轴相差不多
torch.manual_seed(0)
HEADS, TOKENS, DIM = 64, 256, 64
q = torch.randn(HEADS, 32, DIM, dtype=torch.float64)
base = torch.randn(HEADS, TOKENS, DIM, dtype=torch.float64)


def total_variation(keys, quantized):
    """量化前后注意力权重的总变差，对查询与头取平均。"""
    p, p_hat = (torch.softmax(q @ x.transpose(-2, -1) / DIM**0.5, dim=-1) for x in (keys, quantized))
    return 0.5 * (p - p_hat).abs().sum(-1).mean().item()


rows, tv = [], {}
for num_bits in (8, 4, 2):
    row = [num_bits]
    for outlier in (15.0, 1.0):
        keys = base.clone()
        keys[..., :3] *= outlier
        for dim in (-1, -2):
            tv[num_bits, outlier, dim] = total_variation(
                keys, fake_quantize(keys, num_bits=num_bits, dim=dim)
            )
            row.append(f"{tv[num_bits, outlier, dim]:.3f}")
    rows.append(row)
assert all(tv[b, 15.0, -1] > 1.7 * tv[b, 15.0, -2] for b in (8, 4, 2))  # 有离群通道：逐通道好
assert all(0.7 < tv[b, 1.0, -1] / tv[b, 1.0, -2] < 1 for b in (8, 4, 2))  # 没有：逐 token 略好
assert abs(tv[4, 15.0, -1] - 0.251) < 0.005 and abs(tv[4, 15.0, -2] - 0.104) < 0.005
Markdown(
    tabulate(
        rows,
        headers=["位数", "离群：逐 token", "离群：逐通道", "无离群：逐 token", "无离群：逐通道"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: calculator
#| caption: 选一个模型，或拖动一项：缓存多大，解码一步至少要多久。
#| echo: hide
assert KV_CACHE.evaluate(**KV_CACHE.presets["Llama-3-8B"])["per_token"] == 128 * 1024
Markdown(KV_CACHE.markdown())
