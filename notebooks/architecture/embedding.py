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
# # 为什么不用大模型做 embedding（LLM Embedding）：实验
#
# 页面 `docs/architecture/embedding.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import copy
import itertools
import math

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.architecture.embedding import (
    cosine_matrix,
    info_nce,
    last_token_pool,
    mean_cosine,
    mean_pool,
    recall_at_k,
)
from snippets.architecture.rope import rope_cos_sin, rope_inverse_frequencies
from snippets.architecture.softmax_cross_entropy import causal_lm_loss
from snippets.architecture.transformer_from_scratch import MiniLlama

torch.manual_seed(0)

# 合成语料：16 个概念，每个 3 个词；另有 30 个按 1/秩 出现的常用词。一个主题 = 两个概念。
CONCEPTS, WORDS, COMMON, LENGTH = 16, 3, 30, 16
EOS, PAD = CONCEPTS * WORDS + COMMON, CONCEPTS * WORDS + COMMON + 1
TOPICS = torch.tensor(list(itertools.combinations(range(CONCEPTS), 2)))  # 120 个
NUM_TRAIN, NUM_TEST, LR = 80, 40, 0.006


def make_texts(topics, generator, length=LENGTH):
    """每个 token 一半是主题里的词、一半是常用词，最后一个是 EOS。"""
    count = len(topics)
    concept = topics.gather(1, torch.randint(2, (count, length), generator=generator))
    word = concept * WORDS + torch.randint(WORDS, (count, length), generator=generator)
    weights = (1 / torch.arange(1, COMMON + 1)).expand(count, -1)
    common = torch.multinomial(weights, length, replacement=True, generator=generator)
    keep = torch.rand(count, length, generator=generator) < 0.5
    ids = torch.where(keep, word, CONCEPTS * WORDS + common)
    ids[:, -1] = EOS
    return ids


def new_model(num_layers=1):
    options = {"hidden_size": 32, "intermediate_size": 64, "num_heads": 4}
    return MiniLlama(vocab_size=PAD + 1, num_layers=num_layers, **options)


def encode(model, ids, *, is_causal=True):
    """最后一层归一化之后的隐藏状态 (B, T, C)；is_causal=False 就是把因果掩码拿掉。"""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    cos_sin = rope_cos_sin(positions, rope_inverse_frequencies(model.head_dim))
    x = model.embed_tokens(ids)
    for layer in model.layers:
        x = x + layer.self_attn(layer.input_layernorm(x), cos_sin=cos_sin, is_causal=is_causal)
        x = x + layer.mlp(layer.post_attention_layernorm(x))
    return model.norm(x)


def embed(model, ids, pool, *, is_causal=True):
    return pool(encode(model, ids, is_causal=is_causal), torch.ones_like(ids, dtype=torch.bool))


# %%
#| label: causal-visibility
#| caption: 改动一个 token 之后，16 个位置里状态变了的有几个：因果掩码下改最后一个只动 1 个位置，把文本重复一遍后第二份全动
#| echo: fold
text = torch.randint(EOS, (1, LENGTH), generator=torch.Generator().manual_seed(0))
net, rows, table = new_model(num_layers=2), [], {}
for name, position in (("第一个 token", 0), ("第 7 个 token", 6), ("最后一个 token", LENGTH - 1)):
    changed = text.clone()
    changed[0, position] = (changed[0, position] + 1) % EOS
    row = [name]
    for is_causal, echo in ((True, False), (False, False), (True, True)):
        before, after = (x.repeat(1, 2) if echo else x for x in (text, changed))
        with torch.no_grad():
            gap = encode(net, before, is_causal=is_causal) - encode(net, after, is_causal=is_causal)
        moved = gap[0, -LENGTH:].abs().amax(dim=-1)  # 重复时只看第二份
        assert ((moved == 0) | (moved > 1e-6)).all()  # 要么恰好不变，要么明显变了
        row.append(int((moved > 0).sum()))
    rows.append(row)
assert [row[1:] for row in rows] == [[16, 16, 16], [10, 16, 16], [1, 16, 16]]
Markdown(tabulate(rows, headers=["改动", "因果", "双向", "重复一遍，看第二份"], tablefmt="github"))

# %%
#| label: raw-vs-contrastive
#| caption: 三个种子的范围：原始状态、多训同样步数的语言模型、对比微调，各自的随机对平均余弦与没见过的主题上的召回率
#| echo: fold
SEEDS, LM_STEPS, TUNE_STEPS = 3, 150, 40


def optimise(model, steps, loss_fn):
    optimizer = torch.optim.AdamW(model.parameters(), lr=LR, fused=True)
    for _ in range(steps):
        optimizer.zero_grad()
        loss_fn(model).backward()
        optimizer.step()
    return model


def run(seed):
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    order = TOPICS[torch.randperm(len(TOPICS), generator=generator)]
    train, test = order[:NUM_TRAIN], order[NUM_TRAIN:]
    queries, documents = (make_texts(test.repeat(4, 1), generator) for _ in range(2))

    def lm_loss(model):
        ids = make_texts(train[torch.randint(NUM_TRAIN, (32,), generator=generator)], generator)
        return causal_lm_loss(model(ids), ids)

    def contrastive_loss(pool):
        def loss(model):
            batch = train[torch.randperm(NUM_TRAIN, generator=generator)[:24]]
            ids = torch.cat([make_texts(batch, generator) for _ in range(2)])
            q, d = embed(model, ids, pool).chunk(2)
            return info_nce(q, d, temperature=0.05)

        return loss

    @torch.no_grad()
    def measure(model, pool, is_causal=True):
        q, d = (embed(model, ids, pool, is_causal=is_causal) for ids in (queries, documents))
        groups = zip(q.split(NUM_TEST), d.split(NUM_TEST), strict=True)  # 每组 40 篇里找 1 篇
        recall = sum(recall_at_k(a, b).item() for a, b in groups) / 4
        return mean_cosine(d[:NUM_TEST]).item(), recall

    untrained = new_model()
    base = optimise(copy.deepcopy(untrained), LM_STEPS, lm_loss)
    more = optimise(copy.deepcopy(base), TUNE_STEPS, lm_loss)
    tuned = {
        p: optimise(copy.deepcopy(base), TUNE_STEPS, contrastive_loss(p))
        for p in (last_token_pool, mean_pool)
    }
    results = {
        "没训练，末 token": measure(untrained, last_token_pool),
        "语言模型，末 token": measure(base, last_token_pool),
        "语言模型，平均": measure(base, mean_pool),
        "语言模型，去掉掩码，平均": measure(base, mean_pool, is_causal=False),
        "对照：多训语言模型，末 token": measure(more, last_token_pool),
        "对照：多训语言模型，平均": measure(more, mean_pool),
        "对比微调，末 token": measure(tuned[last_token_pool], last_token_pool),
        "对比微调，平均": measure(tuned[mean_pool], mean_pool),
    }
    return results, tuned, test


runs = [run(seed) for seed in range(SEEDS)]
cosine, recall, rows = {}, {}, []
for name in runs[0][0]:
    cosine[name], recall[name] = (torch.tensor([r[0][name][i] for r in runs]) for i in (0, 1))
    rows.append([name, *(f"{x.min():.2f}–{x.max():.2f}" for x in (cosine[name], recall[name]))])

gain = {p: recall[f"对比微调，{p}"] - recall[f"对照：多训语言模型，{p}"] for p in ("末 token", "平均")}
assert gain["末 token"].min() > 0.05  # 末 token 每个种子都高出对照
assert 0 < gain["平均"].mean() < gain["末 token"].mean() / 2
for pool in gain:
    assert (recall[f"对比微调，{pool}"] > recall[f"语言模型，{pool}"]).all()
for name in ("语言模型，末 token", "对照：多训语言模型，末 token"):
    assert recall[name].max() - recall[name].min() > 0.3  # 随种子变化很大
assert recall["对比微调，末 token"].min() > 0.8
assert cosine["没训练，末 token"].min() > 0.9 and recall["没训练，末 token"].max() < 0.3
assert cosine["对比微调，末 token"].max() < 0.3
assert (recall["语言模型，去掉掩码，平均"] > recall["语言模型，平均"]).all()
Markdown(
    tabulate(rows, headers=["向量取自", "随机对余弦", "召回率@1"], tablefmt="github", disable_numparse=True)
)

# %%
#| label: negatives-bound
#| caption: 左：负例再多，能证到的互信息不超过 ln N，也不超过真值 5.55；右：256 个主题时，批越大越可能撞上同主题的假负例
#| echo: fold
TOPIC_COUNT = 256  # 文档等概率来自 256 个主题，查询与正例同主题；互信息恰是 ln 256


def optimal_bound(batch):
    """最优打分下 ln N − 期望损失：同主题的负例个数服从 Bin(N−1, 1/256)，损失是 ln(1+个数)。"""
    k = torch.arange(batch, dtype=torch.float64)
    n, p = torch.tensor(batch - 1.0, dtype=torch.float64), 1 / TOPIC_COUNT
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    weights = (log_choose + k * math.log(p) + (n - k) * math.log1p(-p)).exp()
    assert abs(weights.sum().item() - 1) < 1e-9
    return math.log(batch) - (weights * torch.log1p(k)).sum().item()


batches = [2**i for i in range(1, 13)]
bounds = [optimal_bound(n) for n in batches]
collide = [1 - (1 - 1 / TOPIC_COUNT) ** (n - 1) for n in batches]
fig, (left, right) = plt.subplots(1, 2, figsize=(6.0, 3.1))
left.plot(batches, [math.log(n) for n in batches], "--", color="C1", label="ln N")
left.plot(batches, bounds, "o-", color="C0", markersize=4, label="ln N − 损失")
left.axhline(math.log(TOPIC_COUNT), linestyle=":", color="C2", label="真值 ln 256")
left.set(ylabel="互信息（奈特）", ylim=(0, 8.6))
left.legend(loc="lower right")
right.plot(batches, collide, "s-", color="C3", markersize=4)
right.set(ylabel="至少一个假负例的概率", ylim=(0, 1.05))
for ax in (left, right):
    ax.set_xscale("log", base=2)
    ax.set_xticks([2, 32, 512, 4096], ["2", "32", "512", "4096"])
    ax.set_xlabel("分母里的文档数 N")
at = dict(zip(batches, zip(bounds, collide, strict=True), strict=True))
assert all(b < math.log(n) and b < math.log(TOPIC_COUNT) for n, b in zip(batches, bounds, strict=True))
assert f"{at[64][0]:.2f} {at[512][0]:.2f} {at[4096][0]:.2f}" == "4.00 5.26 5.51"
assert f"{at[64][1]:.2f} {at[512][1]:.2f}" == "0.22 0.86"

# %%
#| label: temperature-table
#| caption: 正例余弦 0.8，一个难负例 0.7，另外 62 个 0.1：各温度下的损失下限、正例概率，以及难负例占全部推力的比例
#| echo: fold
similarity = torch.tensor([0.8, 0.7] + [0.1] * 62, dtype=torch.float64)
count, rows, table = len(similarity), [], {}
for tau in (1.0, 0.2, 0.05, 0.02):
    p = torch.softmax(similarity / tau, dim=0)
    floor = math.log1p((count - 1) * math.exp(-count / ((count - 1) * tau)))
    share = (p[1] / p[1:].sum()).item()
    table[tau] = (floor, p[0].item(), share)
    rows.append([tau, f"{floor:.2f}", f"{p[0]:.2f}", f"{share:.2%}"])
simplex = torch.eye(count, dtype=torch.float64) - 1 / count  # 下限由单纯形取到
assert abs(info_nce(simplex, simplex, temperature=1.0).item() - table[1.0][0]) < 1e-9
assert [row[1] for row in rows] == ["3.17", "0.33", "0.00", "0.00"]
assert [row[2] for row in rows] == ["0.03", "0.29", "0.88", "0.99"]
assert [row[3] for row in rows] == ["2.85%", "24.47%", "99.96%", "100.00%"]
Markdown(
    tabulate(
        rows,
        headers=[r"$\tau$", "损失下限", "正例概率", "难负例占推力"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: padding-trap
#| caption: 长短不一的文本补齐到 16 个 token 后池化，与逐条单独编码比：只有看掩码的两行完全一致
#| echo: fold
_, tuned, test = runs[0]
generator = torch.Generator().manual_seed(7)
lengths = torch.randint(5, LENGTH + 1, (2 * NUM_TEST,), generator=generator)
texts = [make_texts(t[None], generator, int(n))[0] for t, n in zip(test.repeat(2, 1), lengths, strict=True)]
pads = [torch.full((LENGTH - len(t),), PAD) for t in texts]
right_ids = torch.stack([torch.cat([t, p]) for t, p in zip(texts, pads, strict=True)])
left_ids = torch.stack([torch.cat([p, t]) for t, p in zip(texts, pads, strict=True)])
real = torch.arange(LENGTH) < lengths[:, None]
with torch.no_grad():
    truth = {p: torch.cat([embed(m, t[None], p) for t in texts]) for p, m in tuned.items()}
    last_right = encode(tuned[last_token_pool], right_ids)
    mean_right = encode(tuned[mean_pool], right_ids)
    last_left = encode(tuned[last_token_pool], left_ids)  # 这个模型没有填充掩码：填充也被当成文本
candidates = [
    ("平均，看掩码", mean_pool, mean_pool(mean_right, real)),
    ("平均，连填充一起", mean_pool, mean_right.mean(dim=1)),
    ("末 token，看掩码", last_token_pool, last_token_pool(last_right, real)),
    ("右填充，取下标 -1", last_token_pool, last_right[:, -1]),
    ("左填充没传掩码，取 -1", last_token_pool, last_left[:, -1]),
]
rows, agree, found = [], {}, {}
for name, pool, vectors in candidates:
    agree[name] = cosine_matrix(vectors, truth[pool]).diagonal().min().item()
    q, d = vectors.chunk(2)
    found[name] = recall_at_k(q, d).item()
    rows.append([name, f"{agree[name]:.2f}", f"{found[name]:.3f}"])
for name in ("平均，看掩码", "末 token，看掩码"):
    assert agree[name] > 1 - 1e-4
assert all(agree[name] < 0.9 for name in agree if "，看掩码" not in name)
assert agree["右填充，取下标 -1"] < 0.2
assert found["右填充，取下标 -1"] == min(found.values()) < found["末 token，看掩码"] - 0.2
assert abs(found["左填充没传掩码，取 -1"] - found["末 token，看掩码"]) < 0.2  # 召回率看不出这个错
Markdown(
    tabulate(
        rows,
        headers=["做法", "与单独编码的最小余弦", "召回率@1"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: cost-table
#| caption: 按名义参数量与向量维数算出的代价：8B 的每 token 计算量约是 BERT-base 的 73 倍，向量只大 5 倍
#| echo: fold
rows, cost = [], {}
for name, params, dim in (
    ("BERT-base", 0.11, 768),
    ("Qwen3-Embedding-0.6B", 0.6, 1024),
    ("Qwen3-Embedding-4B", 4.0, 2560),
    ("Qwen3-Embedding-8B", 8.0, 4096),
):
    cost[name] = (params / 0.11, dim * 4 * 1e6 / 1e9)  # 每 token 约 2 × 参数量次浮点运算，比值与 2 无关
    rows.append([name, dim, f"{cost[name][0]:.1f}", f"{cost[name][1]:.1f}"])
assert [row[2] for row in rows] == ["1.0", "5.5", "36.4", "72.7"]
assert [row[3] for row in rows] == ["3.1", "4.1", "10.2", "16.4"]
assert 256 * 4 * 1e6 / 1e9 == 1.024  # 截到 256 维
Markdown(
    tabulate(
        rows,
        headers=["模型", "维数", "每 token 计算（倍）", "百万篇 float32（GB）"],
        tablefmt="github",
        disable_numparse=True,
    )
)
