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
# # 为什么需要 Server 来完成 rollout：实验
#
# 页面 `docs/systems/rollout-server.md` 里的数字都由下面的单元算出。时间是模拟的秒，不是计时，所以与机器无关。

# %%
#| label: setup
import math
import random
from collections import Counter
from statistics import median

import matplotlib.pyplot as plt
from IPython.display import Markdown
from tabulate import tabulate
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from snippets.systems.rollout_server import (
    expected_max_lognormal,
    makespan_bounds,
    simulate_async,
    simulate_lockstep,
)

TRAJECTORIES, TURNS, SLOTS = 256, 5, 64
STEP = 0.025  # 秒一步，每个槽 40 token/s
MEDIAN_TOKENS, GEN_SIGMA, TOOL_SIGMA = 800, 0.8, 1.0  # 生成中位数 20 s
SEEDS = range(10)


def draw(seed, *, tool_median=20.0, count=TRAJECTORIES, turns=TURNS):
    """一组对数正态的生成量（token）与工具时间（秒）；seed 相同，改 tool_median 只缩放工具时间。"""
    rng = random.Random(seed)

    def table(scale, sigma):
        return [[scale * math.exp(sigma * rng.gauss(0, 1)) for _ in range(turns)] for _ in range(count)]

    return table(MEDIAN_TOKENS, GEN_SIGMA), table(tool_median, TOOL_SIGMA)


def seconds(gen):
    return [[tokens * STEP for tokens in row] for row in gen]


# %%
#| label: four-schedules
#| caption: 同样的 256 条五轮轨迹、64 个槽，四种调度的完工时间、利用率和轨迹交回时刻的中位数与 95 分位，十个种子的中位数
#| echo: fold
schedulers = {
    "锁步，64 条一批": lambda g, t: simulate_lockstep(g, t, slots=SLOTS, batch_size=SLOTS, step_seconds=STEP),
    "锁步，256 条一批": lambda g, t: simulate_lockstep(g, t, slots=SLOTS, step_seconds=STEP),
    "异步，等工具占着槽": lambda g, t: simulate_async(g, t, slots=SLOTS, step_seconds=STEP, hold_slot=True),
    "异步，等工具让出槽": lambda g, t: simulate_async(g, t, slots=SLOTS, step_seconds=STEP),
}
runs = {name: [] for name in schedulers}
lower_bounds = []
for seed in SEEDS:
    gen, tool = draw(seed)
    low, high = makespan_bounds(seconds(gen), tool, slots=SLOTS)
    lower_bounds.append(low)
    for name, schedule in schedulers.items():
        result = schedule(gen, tool)
        finish = sorted(result.finish)
        assert result.makespan >= low - 1e-6
        runs[name].append((result.makespan, result.utilization, finish[127], finish[243]))
    assert runs["异步，等工具让出槽"][-1][0] <= high + 1e-6

rows = []
for name, results in runs.items():
    makespan, utilization, half, tail = (median(column) for column in zip(*results, strict=True))
    rows.append([name, f"{makespan:.0f}", f"{100 * utilization:.0f}%", f"{half:.0f}", f"{tail:.0f}"])
rows.append(["下界 max(W/M, L)", f"{median(lower_bounds):.0f}", "", "", ""])
makespans = {name: [r[0] for r in results] for name, results in runs.items()}
ratios = {
    name: [a / b for a, b in zip(values, makespans["异步，等工具让出槽"], strict=True)]
    for name, values in makespans.items()
}
tightness = [a / b for a, b in zip(makespans["异步，等工具让出槽"], lower_bounds, strict=True)]
assert [row[1:3] for row in rows[:4]] == [["7142", "8%"], ["2898", "19%"], ["1528", "36%"], ["924", "59%"]]
assert rows[3][3:] == ["506", "680"] and rows[4][1] == "806"
for name, span in [
    ("锁步，64 条一批", "5.3 9.3"),
    ("锁步，256 条一批", "2.2 3.6"),
    ("异步，等工具占着槽", "1.1 2.0"),
]:
    assert f"{min(ratios[name]):.1f} {max(ratios[name]):.1f}" == span
assert f"{min(tightness):.2f} {max(tightness):.2f}" == "1.06 1.28"
Markdown(
    tabulate(
        rows,
        headers=["调度", "完工 (s)", "槽利用率", "交回中位数 (s)", "交回 95 分位 (s)"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: slots-over-time
#| caption: 同一组抽样下正在生成的条数随时间变化：锁步是五个有长尾的锯齿，异步在前半段把 64 个槽填满，结尾只剩最长的几条，方块处全部交回
#| echo: fold
gen, tool = draw(1)
lock, free = schedulers["锁步，256 条一批"](gen, tool), schedulers["异步，等工具让出槽"](gen, tool)


def sample_trace(result, points):
    """在等距时刻上取正在生成的条数。"""
    values, j, current = [], 0, 0
    for t in points:
        while j < len(result.trace) and result.trace[j][0] <= t:
            current, j = result.trace[j][1], j + 1
        values.append(current)
    return values


grid = [lock.makespan * 1.001 * j / 180 for j in range(181)]
fig, ax = plt.subplots(figsize=(6.0, 3.2))
ax.plot(grid, sample_trace(lock, grid), "-", color="C0", label="锁步，256 条一批", drawstyle="steps-post")
grid = [t for t in grid if t <= free.makespan] + [free.makespan]
ax.plot(grid, sample_trace(free, grid), "--", color="C1", label="逐请求异步", drawstyle="steps-post")
ax.plot([free.makespan], [0], "s", color="C1", clip_on=False)  # 异步在这里就全部交回了
ax.set_ylim(0, 80)
ax.set_xlabel("时刻（s）")
ax.set_ylabel("正在生成的条数（共 64 槽）")
ax.legend(loc="upper right", ncols=2, frameon=False)


def share(result, predicate):
    """满足条件的时间占完工时间的比例。"""
    total = 0.0
    for (t0, running), (t1, _) in zip(result.trace, result.trace[1:], strict=False):
        total += (t1 - t0) * predicate(running)
    return total / result.makespan


idle_lock, idle_free = share(lock, lambda r: r == 0), share(free, lambda r: r == 0)
full_lock, full_free = share(lock, lambda r: r == SLOTS), share(free, lambda r: r == SLOTS)
first_idle = next(t for t, running in free.trace if running == 0 and t > 0)
assert first_idle > 0.6 * free.makespan  # 异步没有活可做的时间都在末尾
low, _ = makespan_bounds(seconds(gen), tool, slots=SLOTS)
assert f"{free.makespan:.0f} {low:.0f} {1 - low / free.makespan:.2f}" == "1107 943 0.15"
assert low == max(sum(g) + sum(u) for g, u in zip(seconds(gen), tool, strict=True))  # 下界是最长的一条
assert f"{idle_lock:.2f} {idle_free:.2f} {full_lock:.2f} {full_free:.2f}" == "0.62 0.25 0.15 0.45"

# %%
#| label: tool-latency-sweep
#| caption: 横轴是工具时间的中位数，纵轴是锁步与异步的完工时间之比，十个种子的中位数与范围：工具时间为零时仍有约一点六倍
#| echo: fold
tool_medians = [0, 2, 5, 10, 20, 40, 80]
curves = {"锁步，256 条一批": [], "锁步，64 条一批": []}
longest_share = {}  # 最长的一条占异步完工时间的比例
for tool_median in tool_medians:
    shares = []
    found = {name: [] for name in curves}
    for seed in SEEDS:
        gen, tool = draw(seed, tool_median=tool_median)
        base = schedulers["异步，等工具让出槽"](gen, tool).makespan
        paths = zip(seconds(gen), tool, strict=True)
        shares.append(max(sum(g) + sum(u) for g, u in paths) / base)
        for name in curves:
            found[name].append(schedulers[name](gen, tool).makespan / base)
    longest_share[tool_median] = f"{median(shares):.2f}"
    for name in curves:
        curves[name].append((min(found[name]), median(found[name]), max(found[name])))

fig, ax = plt.subplots(figsize=(6.0, 3.4))
for name, style, color in [("锁步，64 条一批", "-s", "C2"), ("锁步，256 条一批", "-o", "C0")]:
    low, middle, high = zip(*curves[name], strict=True)
    ax.plot(range(len(tool_medians)), middle, style, color=color, label=name)
    ax.fill_between(range(len(tool_medians)), low, high, color=color, alpha=0.2, linewidth=0)
ax.axhline(1.0, color="C1", linestyle="--", label="异步 ＝ 1")
ax.set_xticks(range(len(tool_medians)), [str(m) for m in tool_medians])
ax.set_ylim(0, 11)
ax.set_xlabel("工具时间的中位数（s），生成的中位数是 20 s")
ax.set_ylabel("完工时间，异步的倍数")
ax.legend(loc="upper left", frameon=False)

spans = {name: [tuple(round(v, 1) for v in point) for point in values] for name, values in curves.items()}
assert spans["锁步，256 条一批"][0] == (1.5, 1.6, 2.1) and spans["锁步，256 条一批"][4] == (2.2, 3.0, 3.6)
assert spans["锁步，256 条一批"][6][1] == 2.8 and spans["锁步，64 条一批"][0][1] == 3.9
assert spans["锁步，64 条一批"][4][1] == 7.9
assert [longest_share[m] for m in (0, 20, 80)] == ["0.57", "0.84", "0.99"]
# 只有一轮、工具为零：两种调度逐位相同
gen, tool = draw(0, tool_median=0.0, turns=1)
one_lock, one_free = schedulers["锁步，256 条一批"](gen, tool), schedulers["异步，等工具让出槽"](gen, tool)
assert one_lock.makespan == one_free.makespan

# %%
#| label: retokenization
#| caption: 自训的字节级 BPE 上四种情形，解码再编码之后 id 都变了，前三行里两元模型给的对数概率也变了
#| echo: fold
CORPUS = """The tool returned an error. Let me call the tool again and check the result.

First call the search tool, then read the answer. The answer is 285.

The total is a total of the results. Let me check the answer.

让我先调用搜索工具，再检查结果。工具返回了结果，答案是二百八十五。

"""
tokenizer = Tokenizer(models.BPE())
# 与 Qwen2 同一类的切分规则：标点可以带走后面的换行
pattern = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
tokenizer.train_from_iterator(
    [CORPUS], trainers.BpeTrainer(vocab_size=360, show_progress=False, initial_alphabet=alphabet)
)


def encode(text):
    return tokenizer.encode(text).ids


def pieces(ids):
    return " ".join(tokenizer.decode([i]).replace("\n", "\\n").replace(" ", "␣") for i in ids)


assert tokenizer.decode(encode(CORPUS)) == CORPUS  # 文本 → id → 文本没有损失；反过来不成立

# 两元模型当策略：在规范的编码上数频次，加 0.1 平滑，对每个前一个 token 都是整个词表上的分布
corpus_ids, size = encode(CORPUS), tokenizer.get_vocab_size()
pair, single = Counter(zip(corpus_ids, corpus_ids[1:], strict=False)), Counter(corpus_ids[:-1])


def log_prob(ids):
    """给定第一个 token，其余 token 的对数概率之和。"""
    return sum(
        math.log((pair[a, b] + 0.1) / (single[a] + 0.1 * size)) for a, b in zip(ids, ids[1:], strict=False)
    )


vocab = tokenizer.get_vocab()
split = [vocab[piece] for piece in ("Ġto", "ol")]  # 词表里有整个「␣tool」，采样却可以走两步
whole = encode("先检查结果")
cut = next(whole[:j] for j in range(2, len(whole)) if tokenizer.decode(whole[:j]).endswith("\ufffd"))
cases = [
    ("非规范切分", encode("call the") + split, None),
    ("跨轮的边界", encode("The answer.") + encode("\n\nFirst"), None),
    ("截在汉字中间", cut, None),  # 长度上限恰好落在一个汉字中间
    ("解析器去掉空白", encode("The answer.\n\n"), str.strip),
]
rows, same_text = [], []
for name, sampled, parser in cases:
    text = tokenizer.decode(sampled)
    again = encode(parser(text) if parser else text)
    assert again != sampled
    same_text.append(tokenizer.decode(again) == text)
    same = 0
    while sampled[same : same + 1] == again[same : same + 1]:
        same += 1
    rows.append(
        [
            name,
            pieces(sampled[same:]),
            pieces(again[same:]),
            f"{log_prob(sampled):.1f}",
            f"{log_prob(again):.1f}",
        ]
    )
assert [row[3:] for row in rows[:3]] == [["-23.7", "-15.4"], ["-28.4", "-20.1"], ["-17.7", "-29.5"]]
assert same_text == [True, True, True, False]  # 第三种换的是残缺的字节，显示都是替换符
assert rows[2][1:3] == ["\ufffd", "\ufffd \ufffd \ufffd"]
Markdown(
    tabulate(
        rows,
        headers=["情形", "采样到的", "重编码得到的", "采样的 logp", "重编码的 logp"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: lognormal-maximum
#| caption: 64 个对数正态变量的最大值的期望，以及由它算出的锁步利用率，与一百六十个种子的模拟相比
#| echo: fold
mean_gen = MEDIAN_TOKENS * STEP * math.exp(GEN_SIGMA**2 / 2)
rows, gaps = [], []
for tool_median in (0, 20, 80):
    max_gen = expected_max_lognormal(SLOTS, median=MEDIAN_TOKENS * STEP, sigma=GEN_SIGMA)
    max_tool = expected_max_lognormal(SLOTS, median=tool_median, sigma=TOOL_SIGMA) if tool_median else 0.0
    predicted = mean_gen / (max_gen + max_tool)
    busy = total = 0.0
    for seed in range(160):
        result = schedulers["锁步，64 条一批"](*draw(seed, tool_median=tool_median, count=SLOTS))
        busy, total = busy + result.busy, total + SLOTS * result.makespan
    gaps.append(abs(busy / total - predicted) / predicted)
    rows.append(
        [
            tool_median,
            f"{max_gen:.0f}",
            f"{max_tool:.0f}",
            f"{100 * predicted:.1f}%",
            f"{100 * busy / total:.1f}%",
        ]
    )
assert max(gaps) < 0.03, gaps
assert [row[1:3] for row in rows] == [["140", "0"], ["140", "233"], ["140", "933"]]
assert [row[3] for row in rows] == ["19.7%", "7.4%", "2.6%"]
Markdown(
    tabulate(
        rows,
        headers=["工具中位数 (s)", "生成最大 (s)", "工具最大 (s)", "公式", "模拟"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: engine-models
#| caption: 一步的用时与条数的关系换三种，64 条时都是 25 毫秒；最后一行是异步反而更慢的四条轨迹
#| echo: fold
rows, engine_ratios = [], []
for name, fixed in [("一步用时恒定", 1.0), ("一半随条数增长", 0.5), ("九成随条数增长", 0.1)]:
    cost = {"slots": SLOTS, "step_seconds": fixed * STEP, "step_slope": (1 - fixed) * STEP / SLOTS}
    pairs = []
    for seed in SEEDS:
        gen, tool = draw(seed)
        pairs.append(
            [simulate(gen, tool, **cost).makespan for simulate in (simulate_lockstep, simulate_async)]
        )
    a, b = (median(column) for column in zip(*pairs, strict=True))
    engine_ratios.append(median(x / y for x, y in pairs))
    rows.append([name, f"{a:.0f}", f"{b:.0f}", f"{engine_ratios[-1]:.2f}"])
gen = [[5, 2, 6], [2, 1, 2], [5, 5, 5], [2, 3, 1]]
tool = [[2, 0, 2], [1, 2, 2], [3, 2, 3], [2, 1, 0]]
a, b = (simulate(gen, tool, slots=2).makespan for simulate in (simulate_lockstep, simulate_async))
assert (a, b) == (28, 29)
assert [f"{ratio:.1f}" for ratio in engine_ratios] == ["3.0", "2.8", "2.6"]
rows.append(["反例：4 条、2 槽", f"{a:.0f}", f"{b:.0f}", f"{a / b:.2f}"])
Markdown(
    tabulate(rows, headers=["引擎", "锁步 (s)", "异步 (s)", "倍数"], tablefmt="github", disable_numparse=True)
)
