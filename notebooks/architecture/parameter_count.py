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
# # Transformer 参数量与计算量（parameters, FLOPs, 6ND）：实验
#
# 页面 `docs/architecture/parameter-count.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
from dataclasses import asdict, replace

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate
from torch.utils.flop_counter import FlopCounterMode

from snippets.architecture.attention_scaling import scaled_dot_product_attention
from snippets.architecture.calculators import COMPUTE, PARAMETERS
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import (
    attention_crossover,
    decoder_params,
    forward_flops,
    gpt2_num_params,
    gqa_params,
    llama_matmul_params,
    llama_num_params,
    mla_params,
    moe_params,
    swiglu_params,
    training_flops,
)
from snippets.architecture.transformer_from_scratch import MiniLlama

torch.manual_seed(0)

dense = {name: llama_num_params(**asdict(config)) for name, config in DENSE_CONFIGS.items()}
gpt2 = {
    name: gpt2_num_params(hidden_size=width, num_layers=layers, vocab_size=50257)
    for name, width, layers in (
        ("GPT-2 small", 768, 12),
        ("GPT-2 medium", 1024, 24),
        ("GPT-2 large", 1280, 36),
        ("GPT-2 xl", 1600, 48),
    )
}

mixtral_attention = gqa_params(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)
mixtral = tuple(
    decoder_params(layers=32 * (mixtral_attention + ffn), num_layers=32, hidden_size=4096, vocab_size=32000)
    for ffn in moe_params(hidden_size=4096, intermediate_size=14336, num_experts=8, experts_per_token=2)
)

v3_attention = mla_params(
    hidden_size=7168,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
v3_moe = moe_params(
    hidden_size=7168, intermediate_size=2048, num_experts=256, experts_per_token=8, num_shared_experts=1
)
v3_dense_ffn = swiglu_params(hidden_size=7168, intermediate_size=18432)
deepseek_v3 = tuple(
    decoder_params(
        layers=61 * v3_attention + 3 * v3_dense_ffn + 58 * ffn,
        num_layers=61,
        hidden_size=7168,
        vocab_size=129280,
    )
    for ffn in v3_moe
)


def matmul_params(config):
    fields = asdict(config)
    del fields["tie_embeddings"], fields["qkv_bias"]
    return llama_matmul_params(**fields)


# %%
#| label: where-the-parameters-are
#| caption: 六个稠密模型的总参数，前馈与词表各占多少，最后一列是十二倍层数乘宽度平方的误差
rows, share, rule_error = [], {}, {}
for name in ("Llama-2-7B", "Llama-2-70B", "Llama-3-8B", "Llama-3.1-405B", "Qwen2.5-0.5B", "Qwen2.5-7B"):
    c, total = DENSE_CONFIGS[name], dense[name]
    ffn = c.num_layers * swiglu_params(hidden_size=c.hidden_size, intermediate_size=c.intermediate_size)
    tables = c.vocab_size * c.hidden_size * (1 if c.tie_embeddings else 2)
    share[name] = (ffn / total, tables / total)
    rule_error[name] = 12 * c.num_layers * c.hidden_size**2 / total - 1
    rows.append(
        [
            name,
            f"{total / 1e9:.2f}B",
            f"{ffn / total:.1%}",
            f"{tables / total:.1%}",
            f"{rule_error[name]:+.1%}",
        ]
    )

assert dense["Llama-2-7B"] == 6_738_415_616 and dense["Llama-3-8B"] == 8_030_261_248
assert dense["Qwen2.5-0.5B"] == 494_032_768 and dense["Llama-3.1-405B"] == 405_853_388_800
assert round(min(ffn_share for ffn_share, _ in share.values()), 3) == 0.635
assert round(max(ffn_share for ffn_share, _ in share.values()), 3) == 0.817
assert min(share, key=lambda name: share[name][1]) == "Llama-2-70B"
assert max(share, key=lambda name: share[name][1]) == "Qwen2.5-0.5B"
assert round(share["Qwen2.5-0.5B"][1], 3) == 0.276 and round(share["Llama-2-70B"][1], 3) == 0.008
assert round(share["Llama-3-8B"][1], 3) == 0.131
assert round(rule_error["Llama-2-7B"], 3) == -0.044 and round(rule_error["Llama-3-8B"], 3) == -0.198
assert round(rule_error["Qwen2.5-7B"], 2) == -0.43 and round(rule_error["Qwen2.5-0.5B"], 2) == -0.53
assert abs(rule_error["Llama-3.1-405B"]) < 1e-4  # 碰巧
Markdown(
    tabulate(
        rows,
        headers=["模型", "总数", "前馈", "词表", "$12LC^2$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: all-counts
#| caption: 十九个模型的参数个数，由公式算出
every = gpt2 | dense | {"Mixtral 8x7B": mixtral[0], "DeepSeek-V3": deepseek_v3[0]}
assert len(every) == 19
assert every["GPT-2 small"] == 124_439_808 and every["GPT-2 xl"] == 1_557_611_200
assert every["Mixtral 8x7B"] == 46_702_792_704 and every["DeepSeek-V3"] == 671_026_404_352
with torch.device("meta"):  # 与手撕的模型再对一遍：不带偏置的几个
    for name in ("Llama-2-7B", "Llama-3-8B"):
        c = DENSE_CONFIGS[name]
        model = MiniLlama(
            vocab_size=c.vocab_size,
            hidden_size=c.hidden_size,
            intermediate_size=c.intermediate_size,
            num_layers=c.num_layers,
            num_heads=c.num_heads,
            num_kv_heads=c.num_kv_heads,
        )
        assert sum(p.numel() for p in model.parameters()) == dense[name]
Markdown(
    tabulate(
        [[name, f"{total:,}"] for name, total in every.items()],
        headers=["模型", "参数个数"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: active-parameters
#| caption: Mixtral 8x7B 与 DeepSeek-V3 的总参数与激活参数，激活参数按是否计入词嵌入与输出头分三种
rows = []
for name, (total, active), table in (
    ("Mixtral 8x7B", mixtral, 32000 * 4096),
    ("DeepSeek-V3", deepseek_v3, 129280 * 7168),
):
    rows.append([name] + [f"{x / 1e9:.2f}B" for x in (total, active, active - table, active - 2 * table)])

v3_table = 129280 * 7168
assert rows[0] == ["Mixtral 8x7B", "46.70B", "12.88B", "12.75B", "12.62B"]
assert rows[1] == ["DeepSeek-V3", "671.03B", "37.55B", "36.63B", "35.70B"]
assert (deepseek_v3[1], deepseek_v3[1] - v3_table) == (37_552_282_624, 36_625_603_584)
assert v3_attention == 187_107_328
assert round(58 * 257 * 3 * 7168 * 2048 / deepseek_v3[0], 3) == 0.978  # 58 层的专家占总参数
Markdown(
    tabulate(
        rows,
        headers=["模型", "总参数", "激活", "减词嵌入", "再减输出头"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: counted-flops
#| caption: 小模型上计数器数出的浮点运算数与公式逐项相等，反向是前向的两倍；同样的注意力换成融合核，计数是零
shape = dict(hidden_size=64, intermediate_size=176, num_layers=2, num_heads=4, num_kv_heads=2, vocab_size=97)
B, T = 2, 24
N = llama_matmul_params(**shape, head_dim=16)
predicted = forward_flops(
    num_params=N, num_tokens=B * T, num_layers=2, attention_width=4 * 16, visible_keys=T
)


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


model = MiniLlama(**shape)
forward, logits = count(lambda: model(torch.randint(97, (B, T))))
backward, _ = count(lambda: logits.sum().backward())
q, k, v = (torch.randn(B, 4, T, 16) for _ in range(3))
manual, out = count(lambda: scaled_dot_product_attention(q, k, v, is_causal=True))
fused, out_fused = count(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True))
one_layer = 4 * B * T * (4 * 16) * T

assert forward == predicted == 10_033_152
assert backward == 2 * forward and forward + backward == training_flops(forward=predicted)
assert 2 * N * B * T == 9_443_328 and predicted - 2 * N * B * T == 2 * one_layer == 589_824
assert manual == one_layer == 294_912 and fused == 0
torch.testing.assert_close(out, out_fused)  # 结果一样，只是没数到
rows = [
    ["前向", f"{forward:,}", f"{predicted:,}"],
    ["反向", f"{backward:,}", f"{2 * predicted:,}"],
    ["一层注意力，手写", f"{manual:,}", f"{one_layer:,}"],
    ["一层注意力，融合核", f"{fused:,}", f"{one_layer:,}"],
]
Markdown(tabulate(rows, headers=["", "计数器", "公式"], tablefmt="github", disable_numparse=True))

# %%
#| label: attention-versus-parameters
#| caption: 注意力打分的运算量与参数矩阵乘之比随上下文长度成正比，七十亿参数的模型在两万五千个 token 处相等，更宽的模型更晚
lengths = [2**i for i in range(10, 19)]
fig, ax = plt.subplots(figsize=(6.0, 3.4))
crossing, ratio = {}, {}
for (name, style), color in zip(
    (("Llama-2-7B", "o-"), ("Llama-3-70B", "s--"), ("Llama-3.1-405B", "^:")), ("C0", "C1", "C2"), strict=True
):
    c = DENSE_CONFIGS[name]
    cost = dict(
        num_params=matmul_params(c), num_layers=c.num_layers, attention_width=c.num_heads * c.head_dim
    )
    crossing[name] = attention_crossover(**cost)
    base = forward_flops(num_tokens=1, visible_keys=0, **cost)
    ratio[name] = [forward_flops(num_tokens=1, visible_keys=n, **cost) / base - 1 for n in lengths]
    ax.plot(lengths, ratio[name], style, color=color, markersize=4, label=name)
ax.axhline(1, color="C4", linewidth=1)
ax.set_xscale("log", base=2)
ax.set_xticks(lengths, ["1K", "2K", "4K", "8K", "16K", "32K", "64K", "128K", "256K"])
ax.set(yscale="log", xlabel="每个 token 打分的键数", ylabel="注意力 / 参数的运算量")
ax.minorticks_off()
ax.legend(loc="upper left")

at = dict(zip(lengths, ratio["Llama-2-7B"], strict=True))
assert round(crossing["Llama-2-7B"]) == 25_204 and 6 * 4096 == 24_576
assert round(crossing["Llama-3-70B"]) == 53_026 and round(crossing["Llama-3.1-405B"]) == 97_789
assert [round(at[n], 2) for n in (2048, 8192, 32768, 131072)] == [0.08, 0.33, 1.30, 5.20]

# %%
#| label: wrong-counts
#| caption: 六种流传的错误算法各自得到的数与真值
llama2, llama3, qwen = (DENSE_CONFIGS[n] for n in ("Llama-2-7B", "Llama-3-8B", "Qwen2.5-0.5B"))
gate = llama2.num_layers * llama2.hidden_size * llama2.intermediate_size
wrong = [
    ["共享的词表数两次", "Qwen2.5-0.5B", llama_num_params(**asdict(replace(qwen, tie_embeddings=False)))],
    ["GQA 当作 MHA", "Llama-3-8B", llama_num_params(**asdict(replace(llama3, num_kv_heads=32)))],
    ["忘了 gate", "Llama-2-7B", dense["Llama-2-7B"] - gate],
    ["三个矩阵仍用 $4C$", "Llama-2-7B", llama_num_params(**asdict(replace(llama2, intermediate_size=16384)))],
    ["$12LC^2$", "Llama-3-8B", 12 * 32 * 4096**2],
    ["8×7B", "Mixtral 8x7B", 56e9],
]
rows, error = [], {}
for name, model_name, value in wrong:
    truth = every[model_name]
    error[name] = value / truth - 1
    rows.append([name, model_name, f"{value / 1e9:.2f}B", f"{truth / 1e9:.2f}B", f"{error[name]:+.0%}"])
assert [row[-1] for row in rows] == ["+28%", "+10%", "-21%", "+31%", "-20%", "+20%"]
Markdown(
    tabulate(rows, headers=["错法", "模型", "得到", "真值", "误差"], tablefmt="github", disable_numparse=True)
)

# %%
# 正文与追问里的其余数字
c = DENSE_CONFIGS["Llama-2-7B"]
layer = (dense["Llama-2-7B"] - 2 * 32000 * 4096 - 4096) / 32
assert layer == 202_383_360 and round(8 * 4096 / 3) == 10_923
assert round(12 * 4096**2 / layer - 1, 4) == -0.0052
qwen7 = DENSE_CONFIGS["Qwen2.5-7B"]
assert dense["Qwen2.5-7B"] - llama_num_params(**asdict(replace(qwen7, qkv_bias=False))) == 129_024
c = DENSE_CONFIGS["Llama-3.1-405B"]  # 以 C² 为单位：注意力、前馈、词表摊到每层
attention = gqa_params(hidden_size=c.hidden_size, num_heads=128, num_kv_heads=8, head_dim=128)
ffn = swiglu_params(hidden_size=c.hidden_size, intermediate_size=c.intermediate_size)
units = [x / c.hidden_size**2 for x in (attention, ffn, 2 * c.vocab_size * c.hidden_size / c.num_layers)]
assert units[:2] == [2.125, 9.75] and round(units[2], 3) == 0.124 and round(sum(units), 3) == 11.999
saved = llama_num_params(**asdict(replace(llama3, num_kv_heads=32))) - dense["Llama-3-8B"]
assert saved == 32 * 2 * 4096 * (32 - 8) * 128 == 805_306_368
assert round(6 * 174.6e9 * 300e9 / 1e23, 2) == 3.14  # GPT-3
assert round(4 * 96 * 12288 * 2048 / (2 * 174.6e9), 3) == 0.028
assert round(6 * (deepseek_v3[1] - v3_table) * 14.8e12 / 1e24, 2) == 3.25  # DeepSeek-V3
assert round(6 * deepseek_v3[0] * 14.8e12 / 1e24, 1) == 59.6  # 误用总参数
assert round(deepseek_v3[0] / (deepseek_v3[1] - v3_table)) == 18
mtp = v3_attention + v3_moe[0] + 2 * 7168 + 2 * 7168**2 + 3 * 7168
assert round(mtp / 1e9, 2) == 11.61 and round((mtp + 2 * v3_table) / 1e9, 2) == 13.46
assert round((deepseek_v3[0] + mtp + 2 * v3_table) / 1e9, 1) == 684.5
net = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Linear(8, 8))
fwd, y = count(lambda: net(torch.randn(3, 8)))
bwd, _ = count(lambda: y.sum().backward())
assert (fwd + bwd) / fwd == 2.5  # 第一层不必对输入求梯度

# %%
#| label: parameters
#| caption: 选一个模型，或拖动一项，看参数量怎样变。
#| echo: hide
assert PARAMETERS.evaluate(**PARAMETERS.presets["Llama-2-7B"])["num_params"] == dense["Llama-2-7B"]
Markdown(PARAMETERS.markdown())

# %%
#| label: compute
#| caption: 训练一遍要多少浮点运算、多少时间；利用率按自己的集群填。
#| echo: hide
Markdown(COMPUTE.markdown())
