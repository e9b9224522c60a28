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
# # 手撕采样：temperature、top-k、top-p、min-p 与束搜索：实验
#
# 页面 `docs/architecture/sampling.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.sampling import (
    apply_temperature,
    beam_search,
    min_p_filter,
    repetition_penalty,
    sample,
    top_k_filter,
    top_p_filter,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

FIVE = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03])


def kept(logits):
    return int((logits > -math.inf).sum(-1))


def table(rows, headers):
    return Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


# %%
#| label: top-p-boundary
#| caption: 概率 0.5、0.25、0.15、0.07、0.03 上三种 top-p 写法各留下几个 token，只有前一种与定义一致
rows = []
for p, expected in ((0.3, (1, 0, 2)), (0.6, (2, 1, 3)), (0.76, (3, 2, 4)), (0.95, (4, 3, 5))):
    before = FIVE.cumsum(-1) - FIVE
    right = kept(top_p_filter(FIVE.log(), top_p=p))
    drops = int((FIVE.cumsum(-1) <= p).sum())  # 丢掉跨过 p 的那一个
    extra = min(int((before < p).sum()) + 1, 5)  # 多留一个
    mass = FIVE[:right].sum()
    assert (right, drops, extra) == expected
    assert mass >= p > mass - FIVE[right - 1]  # 定义：达到 p 的最小集合
    rows.append([f"{p}", right, f"{mass:.2f}", drops, extra])
table(rows, ["$p$", "正确", "留下的概率", "`cumsum <= p`", "多留一个"])

# %%
#| label: order-table
#| caption: 同一组概率、top-p 0.79、min-p 0.1，不同次序在温度 0.5 与 2 时各留下几个 token
filters = {
    "温度": lambda z, temperature: apply_temperature(z, temperature=temperature),
    "top-p": lambda z, _: top_p_filter(z, top_p=0.79),
    "min-p": lambda z, _: min_p_filter(z, min_p=0.1),
}
chains = [
    ("只有 top-p", ["温度", "top-p"], (2, 4)),
    ("只有 top-p", ["top-p", "温度"], (3, 3)),
    ("transformers", ["温度", "top-p", "min-p"], (2, 4)),
    ("vLLM", ["温度", "min-p", "top-p"], (1, 4)),
    ("llama.cpp", ["top-p", "min-p", "温度"], (3, 3)),
]
rows = []
for name, chain, expected in chains:
    counts = []
    for temperature in (0.5, 2.0):
        logits = FIVE.log()
        for step in chain:
            logits = filters[step](logits, temperature)
        counts.append(kept(logits))
    assert tuple(counts) == expected
    rows.append([name, " → ".join(chain), *counts])
assert f"{apply_temperature(FIVE.log(), temperature=0.5).softmax(-1)[0]:.2f}" == "0.73"  # 去尾之前
after_min_p = min_p_filter(apply_temperature(FIVE.log(), temperature=0.5), min_p=0.1).softmax(-1)
assert abs(after_min_p[0] - 0.8) < 1e-12  # 0.25 / (0.25 + 0.0625)；top-p 若取 0.8，结果就由舍入决定
table(rows, ["引擎", "次序", "温度 0.5", "温度 2"])

# %%
#| label: kept-by-temperature
#| caption: 一千个 token 的幂律分布上，温度从 0.5 升到 3 时三种过滤留下的个数：top-p 涨到七百多，min-p 到三十一，top-k 不变
logits = -2.0 * torch.arange(1, 1001).log()  # 第 i 名的概率与 i 的 -2 次方成正比
temperatures = torch.linspace(0.5, 3.0, 26)
curves = {"top-p 0.9": [], "top-k 50": [], "min-p 0.1": []}
for temperature in temperatures.tolist():
    scaled = apply_temperature(logits, temperature=temperature)
    curves["top-p 0.9"].append(kept(top_p_filter(scaled, top_p=0.9)))
    curves["top-k 50"].append(kept(top_k_filter(scaled, top_k=50)))
    curves["min-p 0.1"].append(kept(min_p_filter(scaled, min_p=0.1)))

fig, ax = plt.subplots(figsize=(6.0, 3.4))
styles = {"top-p 0.9": ("C0", "o-"), "top-k 50": ("C2", "--"), "min-p 0.1": ("C1", "s-")}
for name, (color, line) in styles.items():
    ax.plot(temperatures, curves[name], line, color=color, markersize=3.5, label=name)
ax.set(yscale="log", xlabel="温度", ylabel="留下的 token 数（共 1000）")
ax.set_yticks([1, 10, 100, 1000], ["1", "10", "100", "1000"])
ax.minorticks_off()
ax.legend(loc="upper left", bbox_to_anchor=(0.0, 0.98))

at = {round(t, 1): i for i, t in enumerate(temperatures.tolist())}
assert [curves["top-p 0.9"][at[t]] for t in (0.5, 1.0, 2.0, 3.0)] == [1, 6, 473, 749]
# min-p 留下 i <= 10^(τ/2) 的；τ=2 时第 10 名恰在门槛上，由舍入决定
assert [curves["min-p 0.1"][at[t]] for t in (0.5, 1.0, 3.0)] == [1, 3, 31]
assert curves["min-p 0.1"][at[2.0]] in (9, 10)
assert set(curves["top-k 50"]) == {50}
top_50 = [apply_temperature(logits, temperature=t).softmax(-1)[:50].sum().item() for t in (1.0, 3.0)]
assert [round(x, 2) for x in top_50] == [0.99, 0.31]

# %%
#| label: beam-is-not-monotone
#| caption: 一棵手写的三层树上束宽 1 到 4 找到的序列与总概率：束宽 2 比束宽 1 差，束宽 3 才找到最优
TREE = {
    "": [0.40, 0.35, 0.25],
    "A": [0.40, 0.30, 0.30],
    "B": [0.50, 0.48, 0.02],
    "C": [0.90, 0.10, 0.00],
    "AA": [1.00, 0.00, 0.00],
    "BA": [0.50, 0.30, 0.20],
    "BB": [0.50, 0.30, 0.20],
    "CA": [0.90, 0.10, 0.00],
}
NAMES, END = "ABC", 3  # 第 4 个 token 是 EOS，这棵树上概率为 0


def tree_step(prefixes):
    rows = [TREE.get("".join(NAMES[t] for t in p), [1 / 3] * 3) for p in prefixes.tolist()]
    return torch.tensor([[*row, 0.0] for row in rows]).log()


everything = {}
for first, p1 in zip(NAMES, TREE[""], strict=True):
    for second, p2 in zip(NAMES, TREE[first], strict=True):
        for third, p3 in zip(NAMES, TREE.get(first + second, [1 / 3] * 3), strict=True):
            everything[first + second + third] = p1 * p2 * p3
best = max(everything, key=everything.get)

rows = []
for num_beams in (1, 2, 3, 4):
    tokens, score = beam_search(
        tree_step, num_beams=num_beams, max_new_tokens=3, eos_token_id=END, length_penalty=0.0
    )
    text = "".join(NAMES[t] for t in tokens)
    assert abs(math.exp(score) - everything[text]) < 1e-12
    rows.append([num_beams, text, f"{math.exp(score):.4f}", "是" if text == best else "否"])
assert abs(sum(everything.values()) - 1) < 1e-12
assert [r[1] for r in rows[:2]] == ["AAA", "BAA"] and best == "CAA"
assert [r[2] for r in rows] == ["0.1600", "0.0875", "0.2025", "0.2025"]
assert [round(TREE[""][1] * p, 3) for p in TREE["B"][:2]] == [0.175, 0.168]  # 挤掉 AA 的两个
table(rows, ["束宽", "序列", "总概率", "全局最优"])


# %%
#| label: length-by-alpha
#| caption: 两百个随机语言模型上长度惩罚的指数取负一到二时，束搜索最好的假设的平均 token 数与到达上限的比例
def random_model(seed, vocab_size=4):
    """每条前缀一个固定的随机分布；token 0 是 EOS。"""
    cache, generator = {}, torch.Generator().manual_seed(seed)

    def step(prefixes):
        for prefix in map(tuple, prefixes.tolist()):
            if prefix not in cache:
                cache[prefix] = torch.randn(vocab_size, generator=generator).log_softmax(-1)
        return torch.stack([cache[tuple(prefix)] for prefix in prefixes.tolist()])

    return step


rows, mean_length = [], {}
for alpha in (-1.0, 0.0, 1.0, 2.0):
    lengths = []
    for seed in range(200):
        tokens, _ = beam_search(
            random_model(seed), num_beams=4, max_new_tokens=6, eos_token_id=0, length_penalty=alpha
        )
        lengths.append(len(tokens))
    mean_length[alpha] = sum(lengths) / len(lengths)
    full = sum(n == 6 for n in lengths) / len(lengths)
    rows.append([f"{alpha:g}", f"{mean_length[alpha]:.1f}", f"{full:.0%}"])
assert [r[1] for r in rows] == ["1.1", "1.5", "4.0", "5.9"] and rows[-1][2] == "94%"
assert mean_length[-1.0] < mean_length[0.0] < mean_length[1.0] < mean_length[2.0]
table(rows, [r"$\alpha$", "平均 token 数", "到达上限 6"])

# %%
#| label: gumbel-frequencies
#| caption: 二十万次 Gumbel-max 抽样的频率与精确的 softmax 概率，以及把噪声加在概率上的错误写法
draws = 200_000
tokens = sample(FIVE.log().expand(draws, 5), torch.Generator().manual_seed(0))
frequency = tokens.bincount(minlength=5) / draws
noise = -torch.empty(draws, 5).exponential_(generator=torch.Generator().manual_seed(0)).log()
wrong = (FIVE + noise).argmax(-1).bincount(minlength=5) / draws  # 加在概率上，不是 logit 上
deviations = (frequency - FIVE) / (FIVE * (1 - FIVE) / draws).sqrt()
rows = [
    [f"{p:.2f}", f"{f:.4f}", f"{w:.3f}"]
    for p, f, w in zip(FIVE.tolist(), frequency.tolist(), wrong.tolist(), strict=True)
]
assert deviations.abs().max() < 4 and (frequency - FIVE).abs().max() < 0.005
torch.testing.assert_close(wrong, FIVE.softmax(-1), atol=0.005, rtol=0)  # 得到的是 softmax(π)
assert round(frequency[4].item(), 3) in (0.030, 0.031) and round(wrong[4].item(), 2) == 0.17
table(rows, ["精确的概率", "Gumbel-max", "加在概率上"])

# %%
# 页面正文里的其他数字。
# 重复惩罚：logit -1、0.5、0，θ=1.3。负的 logit 除以 θ，概率从 0.12 升到 0.15；乘以 θ 降到 0.09。
logits, seen = torch.tensor([[-1.0, 0.5, 0.0]]), torch.tensor([[0]])
before = logits.softmax(-1)[0, 0]
right = repetition_penalty(logits, seen, penalty=1.3).softmax(-1)[0, 0]
divided = torch.tensor([-1.0 / 1.3, 0.5, 0.0]).softmax(-1)[0]
assert [round(x.item(), 2) for x in (before, divided, right)] == [0.12, 0.15, 0.09]

# 不满足平移不变：全体 logit 加 5（softmax 不变），同样的惩罚给出不同的概率。
shifted = repetition_penalty(logits + 5, seen, penalty=1.3).softmax(-1)[0, 0]
assert round(shifted.item(), 2) == 0.05 and right > shifted + 0.03

# 温度 0.5、1、2 时的熵；把除写成乘，0.5 与 2 互换。
entropy = {
    t: torch.special.entr(apply_temperature(FIVE.log(), temperature=t).softmax(-1)).sum().item()
    for t in (0.5, 1.0, 2.0)
}
assert [round(x, 2) for x in entropy.values()] == [0.79, 1.27, 1.50]

# float32 的均匀随机数只有 24 位，Gumbel 噪声的上限。
assert round(-math.log(-math.log1p(-(2.0**-24))), 1) == 16.6

# 截断采样的对数概率：top-p 0.8 留下 3 个，概率都除以 0.9。
truncated = top_p_filter(FIVE.log(), top_p=0.8).softmax(-1)
torch.testing.assert_close(truncated[:3] / FIVE[:3], torch.full((3,), 1 / 0.9))
