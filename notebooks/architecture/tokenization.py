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
# # 分词（tokenization）：实验
#
# 页面 `docs/architecture/tokenization.md` 里的每个数字都由本笔记算出。语料是为这一页写的中英文短文，没有外部数据。

# %%
#| label: setup
import math
import re
from collections import Counter

import matplotlib.pyplot as plt
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.tokenization import (
    ByteLevelBPE,
    bits_per_byte,
    pretokenize,
    train_bpe,
    unigram_viterbi,
    wordpiece_encode,
)

ZH_TRAIN = """
语言模型并不直接读文字，它读的是一串编号。把文字变成编号的程序叫分词器，它在模型训练之前就已经训练好了，之后不再改动。
分词器把常见的片段收进词表，不常见的片段就拆成更小的片段。词表越大，同一段文字用的编号越少，模型每一步走得越远；可是词表越大，词向量和输出层也越大。
早上下了一场小雨，空气很好。我们沿着河边走了很久，看见几个孩子在桥上放风筝。风筝飞得很高，线在风里轻轻地响。孩子们说，风大的时候要放线，风小的时候要收线。
图书馆里很安静。管理员把新到的书放在最前面的书架上，又把旧的书搬到后面。她说，常被借走的书要放在最容易拿到的地方，很少有人看的书可以放远一点。这和分词器的想法很像：常见的片段放在词表里，不常见的片段用几个小的片段拼起来。
模型训练的时候，每一步都要算一次损失，再用损失的梯度更新参数。训练的数据越多，模型见过的片段就越多。没有见过的片段，模型就不知道该怎么处理。
中午我们在学校的食堂吃饭。食堂的菜不多，可是味道很好。吃完饭，老师带我们去看了实验室。实验室里有很多机器，有的在算数据，有的在训练模型。老师说，训练一个模型要用很多时间，也要用很多数据，所以在训练之前要把数据看一遍。
晚上下起了大雪，路上的人很少。我在家里看书，书里说，一个好的问题比一个好的答案更重要。我想了很久，觉得这句话说得很对。
数据里的文字有中文，也有英文。中文的一个字在文件里占三个字节，英文的一个字母只占一个字节。如果词表里没有中文的片段，一个字就要用三个编号，同样的意思，中文用的编号就比英文多。
工程师说，换一个分词器并不容易，因为模型的词向量是按编号存的，编号变了，词向量就对不上了。所以在训练之前，要先想好用什么样的数据训练分词器，词表要多大，数字怎么切，空格怎么处理。
"""
EN_TRAIN = """
A language model does not read text directly; it reads a sequence of numbers. The program that turns text into numbers is called a tokenizer, and it is trained before the model is trained.
The tokenizer keeps common pieces of text in its vocabulary and splits uncommon pieces into smaller ones. With a larger vocabulary the same text needs fewer tokens, but the embedding and the output layer become larger as well.
It rained a little in the morning and the air was fresh. We walked along the river for a long time and saw some children flying kites on the bridge. The kites went very high, and the lines made a soft sound in the wind. The children said that the line should be let out when the wind is strong and pulled in when the wind is weak.
The library was quiet. The librarian put the new books on the first shelf and moved the old books to the back of the room. She said that books which are often borrowed should stay where they are easy to reach, and that books which few people read can be kept further away. The tokenizer works in the same way: common pieces are kept in the vocabulary, and uncommon pieces are built from several smaller pieces.
When the model is trained, every step computes a loss and uses the gradient of the loss to update the parameters. With more training data the model sees more pieces of text. The model does not know what to do with pieces that it has never seen.
At noon we had lunch at the school. There were not many dishes, but the food was good. After lunch the teacher showed us the laboratory. There were many machines in the laboratory; some of them were processing data and some of them were training models. The teacher said that training a model takes a lot of time and a lot of data, so the data should be read before the training starts.
In the evening it started to snow and there were few people on the road. I was reading a book at home. The book said that a good question is more important than a good answer. I thought about it for a long time and found that it was true.
"""
ZH_TEST = """
老师说，分词器的词表不是越大越好。词表大了，常见的片段用一个编号就够了，可是很少出现的编号，模型在训练的时候见得不多，词向量就学不好。
我们在河边看书，孩子们在桥上跑来跑去。雨小了以后，空气很安静，路上的人也多了起来。
"""
EN_TEST = """
The teacher said that a larger vocabulary is not always better. Common pieces need only one number, but the model does not see the uncommon numbers very often when it is trained.
We were reading by the river while the children ran along the bridge. When the rain became weak, the air was quiet and there were more people on the road.
"""

TEST = ZH_TEST + EN_TEST
MERGES = train_bpe(ZH_TRAIN + EN_TRAIN, vocab_size=1024)
MERGES_EN = train_bpe(EN_TRAIN, vocab_size=768)


def bpe_of_size(vocab_size, merges=MERGES):
    """合并规则有先后，截短就得到更小的词表。"""
    assert 256 + len(merges) >= vocab_size
    return ByteLevelBPE(merges[: vocab_size - 256])


assert train_bpe(ZH_TRAIN + EN_TRAIN, vocab_size=300) == MERGES[:44]
for text in (ZH_TRAIN, EN_TRAIN, TEST):
    assert bpe_of_size(1024).decode(bpe_of_size(1024).encode(text)) == text

# %%
#| label: chars-per-token
#| caption: 每个 token 平均几个字符，随词表大小变化：中英混合语料训练时中文从三分之一升上来，只用英文训练时中文一直停在三分之一
sizes = [256, 320, 384, 512, 640, 768, 1024]
zh, en = ZH_TEST.replace("\n", ""), EN_TEST.replace("\n", "")


def chars_per_token(text, vocab_size, merges):
    return len(text) / len(bpe_of_size(vocab_size, merges).encode(text))


curves = {
    "英文，混合语料": ("C0", "o-", en, MERGES),
    "英文，只用英文训练": ("C2", "^--", en, MERGES_EN),
    "中文，混合语料": ("C1", "s-", zh, MERGES),
    "中文，只用英文训练": ("C3", "v:", zh, MERGES_EN),
}
measured = {}
fig, ax = plt.subplots(figsize=(6.0, 3.6))
for name, (color, line, text, merges) in curves.items():
    xs = [v for v in sizes if v <= 256 + len(merges)]
    measured[name] = {v: chars_per_token(text, v, merges) for v in xs}
    ax.plot(xs, list(measured[name].values()), line, color=color, markersize=5, label=name)
ax.set_xscale("log", base=2)
ax.set_xticks(sizes, sizes)
ax.minorticks_off()
ax.set(xlabel="词表大小", ylabel="每个 token 的字符数", ylim=(0, None))
ax.legend(loc="upper left", fontsize=10)

assert all(set(measured[k]) >= {256, 640} for k in ("中文，混合语料", "英文，只用英文训练"))
assert all(len(c.encode()) == 3 for c in zh)  # 汉字与全角标点都是 3 个字节
assert all(abs(x - 1 / 3) < 1e-12 for x in measured["中文，只用英文训练"].values())  # 恰是三分之一
at = measured["中文，混合语料"]
assert abs(at[512] - 0.77) < 0.005 and at[768] == 1.0 and abs(at[1024] - 1.15) < 0.005
at = measured["英文，混合语料"]
assert at[256] == 1.0 and abs(at[640] - 2.52) < 0.005 and abs(at[1024] - 3.29) < 0.005
assert abs(measured["英文，只用英文训练"][640] - 3.42) < 0.005
assert (len(ZH_TRAIN), len(EN_TRAIN)) == (743, 2030)

# %%
#| label: same-vocab-three-encoders
#| caption: 同一份 640 个 token 的 BPE 词表，三种编码方法对三个没见过的词给出不同的切法；短横是 token 的边界，␣ 是空格
bpe = bpe_of_size(640)
train_ids = Counter(bpe.encode(ZH_TRAIN + EN_TRAIN))
names = [token.decode("latin-1") for token in bpe.vocab]  # 一个字节一个字符，三种方法共用词表
total = sum(train_ids.values()) + len(names)
log_probs = {name: math.log((train_ids[i] + 1) / total) for i, name in enumerate(names)}


def three_ways(word):
    return (
        [names[i] for i in bpe.encode(word)],
        wordpiece_encode(word, set(names), prefix=""),
        unigram_viterbi(word, log_probs)[0],
    )


rows, counts = [], {}
for word in (" database", " childhood", " nowhere"):
    ways = three_ways(word)
    counts[word] = [len(way) for way in ways]
    rows.append(["-".join(way).replace(" ", "␣") for way in ways])

assert counts == {" database": [5, 4, 4], " childhood": [5, 6, 5], " nowhere": [5, 5, 5]}
assert len({tuple(way) for way in three_ways(" nowhere")}) == 3
assert " data" in names and three_ways(" database")[0][0] == " d"
assert bpe.ranks[b"a", b"b"] < bpe.ranks[b"at", b"a"]  # ab 先合并，ata 就凑不成了
Markdown(tabulate(rows, headers=["BPE：按秩", "最长匹配", "Viterbi"], tablefmt="github"))

# %%
#| label: pretokenization
#| caption: 预切分决定合并不能跨过哪里：中文一整句是一段，数字怎么切取决于正则；斜线是边界
numbers = [*range(1950, 2030), *(i * i for i in range(100))]  # 年份与平方数
number_bpe = ByteLevelBPE(train_bpe(" ".join(map(str, numbers)), vocab_size=320))


def cut_by_bpe(number):
    return [number_bpe.vocab[i].decode() for i in number_bpe.encode(str(number))]


LEFT, RIGHT, SINGLE = r"\d{1,3}", r"\d{1,3}(?=(?:\d{3})*(?!\d))", r"\d"
rules = {
    r"`\d+` 再做 BPE": cut_by_bpe,
    r"`\d{1,3}`，从左": lambda n: re.findall(LEFT, str(n)),
    "三位一组，从右": lambda n: re.findall(RIGHT, str(n)),
    r"`\d` 逐位": lambda n: re.findall(SINGLE, str(n)),
}
rows = [["GPT-2 的正则", " / ".join(pretokenize("词表越大越好吗，不是。"))]]
rows += [[name, " / ".join(cut(2099)) + "，" + " / ".join(cut(12345))] for name, cut in rules.items()]
shapes = {name: {tuple(map(len, cut(n))) for n in range(1000, 10000)} for name, cut in rules.items()}
assert [len(x) for x in shapes.values()] == [7, 1, 1, 1]  # 四位数有几种切法
assert re.findall(LEFT, "2099") == ["209", "9"] and re.findall(RIGHT, "2099") == ["2", "099"]
assert re.findall(RIGHT, "12345") == ["12", "345"] and cut_by_bpe(2099) == ["209", "9"]

no_split = train_bpe(ZH_TRAIN + EN_TRAIN, vocab_size=512, pattern=r"[\s\S]+")
crossing = [a + b for a, b in no_split if len(pretokenize((a + b).decode(errors="ignore"))) > 1]
assert len(no_split) == 256 and len(crossing) == 46
assert {" the ", "说，", "。\n"} <= {token.decode() for token in crossing}
assert not any(len(pretokenize((a + b).decode(errors="ignore"))) > 1 for a, b in MERGES)
longest = max((t.decode(errors="ignore") for t in bpe_of_size(1024).vocab if t[0] > 127), key=len)
assert longest == "所以在训练之前"  # 没有空格，一个 token 可以是半句话
Markdown(tabulate(rows, headers=["预切分", "切成"], tablefmt="github"))

# %%
#| label: perplexity-vs-bits-per-byte
#| caption: 同一段测试文本、同一种一元语言模型：词表越大，每个 token 的困惑度越高，每字节比特数却越低；没用到的 token 也越来越多
num_bytes = len(TEST.encode())
rows, results = [], {}
for vocab_size in (256, 384, 512, 768, 1024):
    tokenizer = bpe_of_size(vocab_size)
    seen = Counter(tokenizer.encode(ZH_TRAIN + EN_TRAIN))
    ids = tokenizer.encode(TEST)
    nll = -sum(math.log((seen[i] + 1) / (seen.total() + vocab_size)) for i in ids)  # 加一平滑
    unused = sum(seen[i] == 0 for i in range(256, vocab_size))  # 只数合并得到的
    bpb = bits_per_byte(nll, num_bytes=num_bytes)
    results[vocab_size] = (len(ids), math.exp(nll / len(ids)), bpb, unused)
    rows.append([vocab_size, len(ids), f"{results[vocab_size][1]:.0f}", f"{bpb:.2f}", unused])
    assert math.isclose(bpb, math.log2(results[vocab_size][1]) * len(ids) / num_bytes)

ppl, bpb = [[results[v][k] for v in results] for k in (1, 2)]
assert ppl == sorted(ppl) and bpb == sorted(bpb, reverse=True)
assert round(ppl[0]) == 63 and round(ppl[-1]) == 533 and 8.4 < ppl[-1] / ppl[0] < 8.5
assert abs(bpb[0] - 5.98) < 0.005 and abs(bpb[-1] - 2.75) < 0.005
assert (results[256][0], results[1024][0], num_bytes) == (662, 201, 662)
assert results[1024][3] == 274 and 0.35 < 274 / 768 < 0.36
tokenizer = bpe_of_size(1024)
seen = Counter(tokenizer.encode(ZH_TRAIN + EN_TRAIN))
assert seen[tokenizer.ids[b" t"]] == 0 and seen[tokenizer.ids["的".encode()[:2]]] == 0
Markdown(
    tabulate(
        rows,
        headers=["词表", "token 数", "困惑度", "比特每字节", "没用到"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: decode-token-by-token
#| caption: 雨、雪两个字各是两个 token：逐个解码得到替换字符，字节拼齐之后才是字
tokenizer = bpe_of_size(1024)
ids, rows = tokenizer.encode("雨雪"), []
for t, i in enumerate(ids):
    raw = tokenizer.vocab[i]
    rows.append([t, f"`{raw.hex(' ')}`", tokenizer.decode([i]), tokenizer.decode(ids[: t + 1])])
assert [tokenizer.vocab[i] for i in ids] == [b"\xe9\x9b", b"\xa8", b"\xe9\x9b", b"\xaa"]
assert "".join(tokenizer.decode([i]) for i in ids) == "\ufffd" * 4 and tokenizer.decode(ids) == "雨雪"
try:
    tokenizer.vocab[ids[0]].decode("utf-8")
    raise AssertionError("残缺的 UTF-8 不该解码成功")
except UnicodeDecodeError:
    pass
Markdown(tabulate(rows, headers=["步", "字节", "逐个解码", "整体解码"], tablefmt="github"))

# %%
#| label: vocabulary-cost
#| caption: 词表占多少参数，以及词表翻倍时 token 数至少要少百分之几，每段文本的前向计算量才不增加


def llama_like_params(V, C, F, L, H, K, *, tied, qkv_bias):
    """SwiGLU、RMSNorm、GQA 的解码器：除词表外的参数，与词表的参数。"""
    kv = C // H * K
    layer = 2 * C * C + 2 * C * kv + 3 * C * F + 2 * C + (C + 2 * kv if qkv_bias else 0)
    return L * layer + C, V * C * (1 if tied else 2)


def gpt2_params(V, C, L, num_positions):
    return L * (12 * C * C + 13 * C) + 2 * C + num_positions * C, V * C


models = {
    "GPT-2": (50257, 768, *gpt2_params(50257, 768, 12, 1024)),
    "Qwen2.5-0.5B": (
        151936,
        896,
        *llama_like_params(151936, 896, 4864, 24, 14, 2, tied=True, qkv_bias=True),
    ),
    "Llama-3-8B": (
        128256,
        4096,
        *llama_like_params(128256, 4096, 14336, 32, 32, 8, tied=False, qkv_bias=False),
    ),
    "Qwen2.5-72B": (
        152064,
        8192,
        *llama_like_params(152064, 8192, 29568, 80, 64, 8, tied=False, qkv_bias=True),
    ),
}
rows, share, saving = [], {}, {}
for name, (V, C, body, vocab_params) in models.items():
    share[name] = vocab_params / (body + vocab_params)
    saving[name] = V * C / (body + 2 * V * C)  # 查表不做乘法，只有输出层的 V·C 算进前向
    rows.append([name, f"{V:,}", f"{share[name]:.1%}", f"{saving[name]:.1%}"])

totals = [body + vocab_params for _, _, body, vocab_params in models.values()]
assert totals == [124_439_808, 494_032_768, 8_030_261_248, 72_706_203_648]
assert [round(100 * x, 1) for x in share.values()] == [31.0, 27.6, 13.1, 3.4]
assert [round(100 * x, 1) for x in saving.values()] == [23.7, 21.6, 6.5, 1.7]
# 从 Llama 2 的 32,000 换到 128,256：每 token 的前向按 Llama-3-8B 的主体算
_, C, body, _ = models["Llama-3-8B"]
flops_ratio = (body + 128256 * C) / (body + 32000 * C)
assert round(flops_ratio, 3) == 1.055 and round(1 - 3.17 / 3.94, 3) == 0.195
assert flops_ratio * 3.17 / 3.94 < 0.85
Markdown(
    tabulate(rows, headers=["模型", "词表", "占参数", "翻倍须省"], tablefmt="github", disable_numparse=True)
)
