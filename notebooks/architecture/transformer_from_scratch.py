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
# # 手撕 Transformer：实验
#
# 页面 `docs/architecture/transformer-from-scratch.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math
from collections import Counter

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.kv_cache import KVCache
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.architecture.rope import rope_cos_sin, rope_inverse_frequencies
from snippets.architecture.softmax_cross_entropy import cross_entropy
from snippets.architecture.transformer_from_scratch import (
    MiniLlama,
    gelu_tanh,
    generate_greedy,
    init_weights,
    swiglu,
    swiglu_width,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

TEXT = (
    "清晨的雾还没有散，老周推着小车出了巷口。车上放着两只木桶，一桶豆浆，一桶热水。"
    "他在桥头停下，先把火生好，再数一遍零钱。第一位客人总是邮局的姑娘，她不爱说话，只把空碗往前轻轻一推。"
    "第二位是修钟的师傅，口袋里装满大小齿轮，走起路来叮当作响。"
    "等到太阳越过屋顶，学生们才成群跑来，你争我抢，笑声把河里的鸭子也吓得四散。"
    "老周从不着急，舀一勺，吹一吹，递过去。有人问他，做了三十年，烦不烦。"
    "他想了半天，指着水面说，河每天都从这里流过，可是没有一滴是昨天的。"
    "傍晚收摊的时候，桶已经见底，他把剩下的几枚硬币放进墙缝，留给夜里扫街的人。"
    "风吹过来，灯一盏接着一盏亮了。"
)
VOCAB = sorted(set(TEXT))
IDS = torch.tensor([VOCAB.index(char) for char in TEXT])
V, T, C, FFN, L, H, K = len(VOCAB), 24, 48, 128, 2, 4, 2
NUM_WINDOWS = len(TEXT) - T  # 每个窗口 T 个输入、T 个标签
WINDOWS = IDS[torch.arange(NUM_WINDOWS)[:, None] + torch.arange(T + 1)]
assert (len(TEXT), V, NUM_WINDOWS) == (274, 167, 250) and FFN == swiglu_width(C, multiple_of=64)


def new_model(tie_embeddings=False):
    torch.manual_seed(0)
    return MiniLlama(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=FFN,
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        tie_embeddings=tie_embeddings,
    )


def loss_on(logits, batch):
    """窗口的前 T 个是输入，后 T 个是标签。"""
    return cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def variant_logits(model, ids, wrong=None, position_ids=None):
    """逐层照着前向走一遍，`wrong` 指明写错的地方；`None` 与 `model(ids)` 相同。"""
    if position_ids is None:
        position_ids = torch.arange(ids.shape[1]).expand_as(ids)
    cos_sin = rope_cos_sin(position_ids, rope_inverse_frequencies(C // H))
    x = model.embed_tokens(ids)
    for layer in model.layers:
        first, second, mlp = layer.input_layernorm, layer.post_attention_layernorm, layer.mlp
        gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
        if wrong == "swap":
            gate, up = up, gate
        if wrong == "shared":
            second = first
        h = first(x)
        x = (h if wrong == "residual" else x) + layer.self_attn(h, cos_sin=cos_sin, is_causal=wrong != "mask")
        h = second(x)
        x = (h if wrong == "residual" else x) + swiglu(h, gate, up, mlp.down_proj.weight)
    return model.lm_head(x if wrong == "final" else model.norm(x))


# %%
#| label: swiglu-widths
#| caption: 8h/3 截断、乘倍数、向上凑整得到的内部宽度，与发布的配置相同
#| echo: hide
rows = []
for name, multiplier, multiple_of in (
    ("Llama-2-7B", 1.0, 256),
    ("Llama-2-13B", 1.0, 256),
    ("Llama-2-70B", 1.3, 4096),
    ("Llama-3-8B", 1.3, 1024),
):
    config = DENSE_CONFIGS[name]
    width = swiglu_width(config.hidden_size, multiplier=multiplier, multiple_of=multiple_of)
    assert width == config.intermediate_size
    rows.append(
        [
            name,
            config.hidden_size,
            swiglu_width(config.hidden_size, multiple_of=1),
            f"{multiplier}，{multiple_of}",
            width,
        ]
    )
assert [r[2] for r in rows] == [10922, 13653, 21845, 10922]
assert [r[4] for r in rows] == [11008, 13824, 28672, 14336]
Markdown(
    tabulate(
        rows,
        headers=["模型", "$h$", "$8h/3$ 截断", "倍数，凑整", "内部宽度"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: residual-growth
#| caption: 初始化时末层残差流的均方随层数大致线性增长；写回残差的矩阵乘 1/√(2L) 之后不再随层数变
depths, seeds, width = [2, 4, 8, 16, 32], range(3), 64
variance = {}
for scaled in (False, True):
    for depth in depths:
        values = []
        for seed in seeds:
            torch.manual_seed(seed)
            model = MiniLlama(
                vocab_size=97, hidden_size=width, intermediate_size=172, num_layers=depth, num_heads=4
            )
            init_weights(model, std=width**-0.5, residual_scale=(2 * depth) ** -0.5 if scaled else 1.0)
            last = []
            model.norm.register_forward_hook(lambda _, args, out, last=last: last.append(args[0]))
            with torch.no_grad():
                model(torch.randint(97, (2, 16)))
            values.append(last[0].square().mean().item())
        variance[scaled, depth] = torch.tensor(values)

fig, ax = plt.subplots(figsize=(6.0, 3.2))
for scaled, style, text in ((False, "s-", "不缩放"), (True, "o--", "乘 1/√(2L)")):
    means = [variance[scaled, depth].mean().item() for depth in depths]
    ax.plot(depths, means, style, color="C0" if scaled else "C1", label=text)
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(depths, depths)
ax.set_yticks([0.5, 1, 2, 5, 10, 20, 50], ["0.5", "1", "2", "5", "10", "20", "50"])
ax.minorticks_off()
ax.set(xlabel="层数 L", ylabel="末层残差流的均方")
ax.legend(loc="upper left")

plain = {depth: variance[False, depth].mean().item() for depth in depths}
assert all(1.2 < plain[depth] / depth < 1.7 for depth in depths)  # 每层约 1.5
assert abs(plain[32] - 51.7) < 0.5 and abs(plain[2] - 2.69) < 0.05
assert all(0.6 < value < 0.9 for depth in depths for value in variance[True, depth].tolist())

# %%
#| label: loss-curve
#| caption: 字符级小模型的训练损失：从 ln V 出发，正确的实现停在下界之上，去掉因果掩码的穿过下界


def train(wrong=None, steps=120, peak_lr=1e-2):
    model, generator, history = new_model(), torch.Generator().manual_seed(0), []
    optimizer = torch.optim.Adam(model.parameters(), lr=peak_lr)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = peak_lr * (1 - step / steps)
        batch = WINDOWS[torch.randint(NUM_WINDOWS, (16,), generator=generator)]
        loss = loss_on(variant_logits(model, batch[:, :-1], wrong), batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    with torch.no_grad():
        return model, history, loss_on(variant_logits(model, WINDOWS[:, :-1], wrong), WINDOWS).item()


def causal_floor():
    """只看前缀的预测器在全部窗口上的最小平均损失：各前缀长度的条件熵的平均。"""
    total = 0.0
    for length in range(1, T + 1):
        prefix = Counter(TEXT[s : s + length] for s in range(NUM_WINDOWS))
        longer = Counter(TEXT[s : s + length + 1] for s in range(NUM_WINDOWS))
        total -= sum(n / NUM_WINDOWS * math.log(n / prefix[text[:-1]]) for text, n in longer.items())
    return total / T


model, history, final = train()
_, cheating, cheating_final = train(wrong="mask")
floor = causal_floor()

fig, ax = plt.subplots(figsize=(6.0, 3.4))
ax.plot(history, color="C0", label="正确")
ax.plot(cheating, color="C1", linestyle="--", label="去掉因果掩码")
ax.axhline(math.log(V), color="C2", linewidth=1, linestyle=":")
ax.axhline(floor, color="C4", linewidth=1, linestyle=":")
ax.annotate("ln V", (97, 3.4), fontsize=10)
ax.annotate("因果模型的下界", (2, floor * 0.62), fontsize=10)
ax.set(yscale="log", xlabel="步数", ylabel="训练损失（奈特）")
ax.legend(loc="upper right", bbox_to_anchor=(1.0, 0.85))
assert abs(math.log(V) - 5.118) < 5e-4 and abs(history[0] - math.log(V)) < 0.02
assert abs(floor - 0.0336) < 5e-5
assert 0.04 < final < 0.07 and min(history) > floor  # 在下界之上
assert cheating_final < 0.015 < floor / 2  # 在下界之下

# %%
#| label: sanity-checks
#| caption: 小模型的六项验收，应当的值与实测
ids = WINDOWS[:2, :-1]
sizes = {
    "hidden_size": C,
    "intermediate_size": FFN,
    "num_layers": L,
    "num_heads": H,
    "num_kv_heads": K,
    "head_dim": C // H,
    "vocab_size": V,
}
count, tied_count = (
    sum(p.numel() for p in m.parameters()) for m in (new_model(), new_model(tie_embeddings=True))
)
assert count == llama_num_params(**sizes) == 66960
assert tied_count == llama_num_params(**sizes, tie_embeddings=True) == count - V * C == 58944
start = loss_on(new_model()(WINDOWS[:, :-1]), WINDOWS).item()
with torch.no_grad():
    full, changed = model(ids), ids.clone()
    changed[:, 10] = (changed[:, 10] + 1) % V
    difference = (model(changed) - full).abs().amax(dim=(0, 2))
    caches = [KVCache() for _ in range(L)]
    cached = torch.cat([model(piece, kv_caches=caches) for piece in ids.split([5, 1, 1, 17], dim=1)], dim=1)
    torch.testing.assert_close(variant_logits(model, ids), full)
starts = range(0, NUM_WINDOWS, 10)
copied = 0
for s in starts:
    caches = [KVCache() for _ in range(L)]
    output = generate_greedy(model, IDS[s : s + 6][None], max_new_tokens=18, kv_caches=caches)
    copied += output[0].equal(IDS[s : s + 24])
cache_gap = (cached - full).abs().max().item()
assert abs(start - 5.12) < 0.01 and difference[:10].eq(0).all() and (difference[10:] > 0.1).all()
assert cache_gap < 1e-12 and copied == len(starts) == 25
Markdown(
    tabulate(
        [
            ["参数个数", "公式：66,960", f"{count:,}"],
            ["共享嵌入后的参数个数", f"少 $VC$：{count - V * C:,}", f"{tied_count:,}"],
            ["初始损失", rf"$\ln V={math.log(V):.2f}$", f"{start:.2f}"],
            ["改第 10 个 token，之前的 logits 变化", "0", f"{difference[:10].max():.0f}"],
            ["缓存分段与整段的 logits 之差", "舍入误差", "小于 $10^{-12}$"],
            ["训练后贪心续写 18 字，与原文相同", f"{len(starts)} 段", f"{copied} 段"],
        ],
        headers=["检查", "应当", "实测"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: wrong-versions
#| caption: 六种写错的前向：新初始化时损失都约为 ln V；装入训练好的权重后，logits 每一种都对不上
rows, initial, loaded, gap = [], {}, {}, {}
fresh, inputs = new_model(), WINDOWS[:, :-1]
for wrong, text in (
    (None, "正确"),
    ("swap", "SiLU 放在升维那一支"),
    ("final", "漏掉末尾的归一化"),
    ("residual", "残差取自归一化之后"),
    ("shared", "两处共用一份增益"),
    ("positions", "位置每次从 0 数起"),
    ("mask", "漏掉因果掩码"),
):
    zeros = torch.zeros(NUM_WINDOWS, T, dtype=torch.long) if wrong == "positions" else None
    with torch.no_grad():
        initial[wrong] = loss_on(variant_logits(fresh, inputs, wrong, zeros), WINDOWS).item()
        logits = variant_logits(model, inputs, wrong, zeros)
        loaded[wrong] = loss_on(logits, WINDOWS).item()
        gap[wrong] = (logits - model(inputs)).abs().max().item()
    rows.append([text, f"{initial[wrong]:.2f}", f"{loaded[wrong]:.2f}", f"{gap[wrong]:.2g}"])

assert all(abs(value - math.log(V)) < 0.02 for value in initial.values())
assert abs(loaded[None] - 0.063) < 0.002 and abs(loaded["swap"] - 0.074) < 0.002
assert abs(loaded["shared"] - loaded[None]) < 1e-3 and 0.55 < gap["shared"] < 0.7
assert 3 < loaded["final"] < 3.3 and 0.9 < loaded["residual"] < 1.1
assert all(0.2 < loaded[wrong] < 0.3 for wrong in ("positions", "mask"))
assert 3.5 < gap["swap"] < 3.8 and all(gap[x] > 9 for x in ("final", "residual", "positions", "mask"))
Markdown(
    tabulate(
        rows,
        headers=["前向", "新初始化的损失", "装入权重后的损失", "logits 最大差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
# 页面正文里的其他数字。
x = torch.linspace(-8, 8, 160001)
gelu_gap = (gelu_tanh(x) - torch.nn.functional.gelu(x)).abs()
assert abs(gelu_gap.max() - 4.73e-4) < 1e-6 and abs(x[gelu_gap.argmax()].abs() - 2.70) < 0.01

# 门的输入不大时 SiLU(z)u ≈ zu/2，两支对称，所以对调的损失变化小；对照：只留 zu/2 这一项。
pre = []
for layer in model.layers:
    layer.mlp.register_forward_pre_hook(
        lambda mlp, args: pre.append((args[0] @ mlp.gate_proj.weight.T).square().mean().sqrt().item())
    )
with torch.no_grad():
    model(WINDOWS[:, :-1])
assert len(pre) == L and all(0.3 < rms < 0.55 for rms in pre)
handles = [
    layer.mlp.register_forward_hook(
        lambda mlp, args, out: mlp.down_proj(mlp.gate_proj(args[0]) * mlp.up_proj(args[0]) / 2)
    )
    for layer in model.layers
]
with torch.no_grad():
    symmetric = loss_on(model(WINDOWS[:, :-1]), WINDOWS).item()
for handle in handles:
    handle.remove()
assert abs(symmetric - 0.068) < 0.002

# 从头训练时对调两支只是改名：权重跟着对调，logits 不变。
renamed = new_model()
renamed.load_state_dict(model.state_dict())
for layer in renamed.layers:
    gate, up = layer.mlp.gate_proj, layer.mlp.up_proj
    layer.mlp.gate_proj, layer.mlp.up_proj = up, gate
torch.testing.assert_close(variant_logits(renamed, WINDOWS[:4, :-1], "swap"), model(WINDOWS[:4, :-1]))

# 初始损失：logit 的方差是 s² 时约为 ln V + s²/2。末尾归一化使 s² = C·std²。
for std, expected, tolerance in ((0.02, 0.0096, 0.01), (C**-0.5, 0.5, 0.1)):
    assert abs(C * std**2 / 2 - expected) < 1e-9
    excess = []
    for seed in range(5):
        wide = new_model()
        torch.manual_seed(seed)
        init_weights(wide, std=std)
        with torch.no_grad():
            excess.append(loss_on(wide(WINDOWS[:, :-1]), WINDOWS).item() - math.log(V))
    assert abs(sum(excess) / 5 - expected) < tolerance

# 两处共用一份增益，从头训练同样能背下来。
shared_final = train(wrong="shared")[2]
assert floor < shared_final < 0.08

# 没训练时忘了移位（标签就是输入）：共享嵌入才偏低，不共享仍是 ln V。
for tied, low, high in ((True, -0.9, -0.7), (False, -0.05, 0.05)):
    for seed in range(3):
        fresh = new_model(tie_embeddings=tied)
        torch.manual_seed(seed)
        init_weights(fresh)
        with torch.no_grad():
            unshifted = cross_entropy(fresh(inputs).flatten(0, 1), inputs.flatten()).item()
        assert low < unshifted - math.log(V) < high

# 8h/3 不是定律：内部宽度与 h 之比。
ratio = {name: config.intermediate_size / config.hidden_size for name, config in DENSE_CONFIGS.items()}
assert abs(ratio["Llama-2-7B"] - 2.69) < 0.005 and abs(ratio["Llama-3-8B"] - 3.5) < 0.005
assert abs(ratio["Qwen2.5-7B"] - 5.29) < 0.005
