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
# # 多轮对话 SFT 样本怎么构造：实验
#
# 页面 `docs/training/multi-turn-sft.md` 的实验：每个 token 的权重、各种构造的梯度、现场训练的分词器上哪些 token 计入损失、剥离思考的模板、打包时的串扰。

# %%
#| label: setup
import torch
from IPython.display import Markdown
from jinja2 import Environment
from tabulate import tabulate
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from torch.nn import functional as F

from snippets.rl.masking import aggregate_loss
from snippets.training.loss_averaging import token_cross_entropy
from snippets.training.multi_turn_sft import (
    IGNORE_INDEX,
    Turn,
    block_diagonal_causal_mask,
    build_labels,
    pack_documents,
    position_ids_from_documents,
    split_turns,
    token_weights,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
SEEDS = 5


def collate(samples):
    """右侧补齐：输入补 0，标签补 -100。"""
    rows = [torch.tensor(ids) for ids, _ in samples]
    kept = [torch.tensor(labels) for _, labels in samples]
    pad = nn.utils.rnn.pad_sequence
    return pad(rows, batch_first=True), pad(kept, batch_first=True, padding_value=IGNORE_INDEX)


def sft_loss(losses, labels, reduction):
    """token 平均，或先按条平均；移位后的标签决定哪些位置计入。"""
    mode = {"token-mean": "token-mean", "sample-mean": "seq-mean-token-mean"}[reduction]
    return aggregate_loss(losses, labels[:, 1:] != IGNORE_INDEX, mode=mode)


# %%
#| label: token-weights
#| caption: 三个助手轮各 10、100、20 个 token，反向传播量出的单个 token 权重，以整段一条为 1：拆开后按条平均，短轮的 token 是长轮的 10 倍
#| echo: fold
LENGTHS = [10, 100, 20]
session = []
for k, length in enumerate(LENGTHS):  # token 编号就是它的下标，反向传播后按编号收回梯度
    base = 1000 * (k + 1)
    session += [Turn("user", [1, 2], [3, 4, 5]), Turn("assistant", [6, 7], range(base, base + length))]


def measured_weights(samples, reduction):
    """每个助手 token 的损失设成一个独立变量，量它在总损失里的系数。"""
    _, labels = collate(samples)
    variables = torch.zeros(5000, requires_grad=True)
    losses = variables[labels[:, 1:].clamp(min=0)]
    (grad,) = torch.autograd.grad(sft_loss(losses, labels, reduction), variables)
    turns = [grad[1000 * (k + 1) :][:length] for k, length in enumerate(LENGTHS)]
    assert all((turn == turn[0]).all() for turn in turns)  # 同一轮之内处处相等
    return torch.stack([turn[0] for turn in turns])


constructions = {
    "session": [build_labels(session)],
    "split": split_turns(session),
    "split-unmasked": split_turns(session, mask_history=False),
}
names = {"session": "整段一条", "split": "拆开", "split-unmasked": "拆开，不遮历史"}
rows = []
for construction, samples in constructions.items():
    for reduction, label in (("token-mean", "token 平均"), ("sample-mean", "按条平均")):
        measured = measured_weights(samples, reduction)
        (formula,) = token_weights([LENGTHS], construction=construction, reduction=reduction)
        torch.testing.assert_close(measured, formula, rtol=1e-13, atol=0)
        if not (construction == "session" and reduction == "sample-mean"):
            relative = measured * sum(LENGTHS)
            rows.append([f"{names[construction]}，{label}", *(f"{w:.2f}" for w in relative.tolist())])
assert rows[0][1:] == rows[1][1:] == ["1.00", "1.00", "1.00"]
assert rows[2][1:] == ["4.33", "0.43", "2.17"] and rows[3][1:] == ["1.56", "1.04", "0.52"]
assert rows[4][1:] == ["5.06", "0.73", "0.33"]
Markdown(
    tabulate(
        rows,
        headers=["构造与归一", "第 1 轮（10）", "第 2 轮（100）", "第 3 轮（20）"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: gradient-error
#| caption: 两层因果 transformer，五个种子，各种构造的梯度与整段一条的相对误差：只有拆开并按 token 平均的相同，双向注意力下连它也不同
#| echo: fold
V, C, MAX_T = 30, 16, 96


class TinyTransformer(nn.Module):
    """两层、两个头，位置编码可选学习的绝对位置或 RoPE。"""

    def __init__(self, *, rope=False):
        super().__init__()
        self.embed, self.position, self.rope = nn.Embedding(V, C), nn.Embedding(MAX_T, C), rope
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "qkv": nn.Linear(C, 3 * C),
                    "out": nn.Linear(C, C),
                    "up": nn.Linear(C, C),
                    "norm": nn.LayerNorm(C),
                }
            )
            for _ in range(2)
        )
        self.head = nn.Linear(C, V)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def rotate(self, x, positions):
        """RoPE：把每对坐标转过 位置 × 频率 的角。"""
        angles = positions[:, None, :, None] * 10.0 ** -torch.arange(C // 4)  # (B, 1, T, D/2)
        first, second = x.chunk(2, dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([first * cos - second * sin, first * sin + second * cos], dim=-1)

    def forward(self, ids, mask=None, positions=None):
        B, T = ids.shape
        mask = torch.ones(B, T, T, dtype=torch.bool).tril() if mask is None else mask
        positions = torch.arange(T).expand(B, T) if positions is None else positions
        h = self.embed(ids) + (0 if self.rope else self.position(positions))
        for layer in self.layers:
            q, k, v = layer["qkv"](layer["norm"](h)).view(B, T, 3, 2, C // 2).permute(2, 0, 3, 1, 4)
            if self.rope:
                q, k = self.rotate(q, positions), self.rotate(k, positions)
            attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None])
            h = h + layer["out"](attended.transpose(1, 2).reshape(B, T, C))
            h = h + layer["up"](h).tanh()
        return self.head(h)


def random_session(generator, lengths):
    draw = lambda n: torch.randint(3, V, (n,), generator=generator).tolist()  # noqa: E731
    turns = []
    for length in lengths:  # 0 是头，2 是结束符
        turns += [Turn("user", [0], [*draw(5), 2], [1]), Turn("assistant", [0], [*draw(length - 1), 2], [1])]
    return turns


def gradient(model, samples, reduction, *, causal=True):
    ids, labels = collate(samples)
    mask = (
        None if causal else (torch.arange(ids.shape[1]) < torch.tensor([len(s) for s, _ in samples])[:, None])
    )
    mask = None if causal else mask[:, None, :].expand(-1, ids.shape[1], -1)
    loss = sft_loss(token_cross_entropy(model(ids, mask), labels), labels, reduction)
    grads = torch.autograd.grad(loss, model.parameters(), allow_unused=True)
    return torch.cat([g.flatten() for g in grads if g is not None])


def header_trained(turns):
    """错法：助手的头也计入。"""
    return [Turn(t.role, [], [*t.header, *t.body], t.trailer) if t.role == "assistant" else t for t in turns]


def eos_masked(turns):
    """错法：结束符不计入。"""
    return [Turn(t.role, t.header, t.body[:-1], [t.body[-1], *t.trailer]) for t in turns]


def truncate(sample, length):
    return sample[0][:length], sample[1][:length]


variants = {
    "拆开，token 平均": lambda t: (split_turns(t), "token-mean"),
    "拆开，按条平均": lambda t: (split_turns(t), "sample-mean"),
    "拆开，不遮历史，token 平均": lambda t: (split_turns(t, mask_history=False), "token-mean"),
    "整段，只训最后一轮": lambda t: (split_turns(t)[-1:], "token-mean"),
    "整段，用户也计入": lambda t: ([build_labels(t, train_roles=("user", "assistant"))], "token-mean"),
    "整段，头也计入": lambda t: ([build_labels(header_trained(t))], "token-mean"),
    "整段，结束符不计": lambda t: ([build_labels(eos_masked(t))], "token-mean"),
    "整段，截到 48": lambda t: ([truncate(build_labels(t), 48)], "token-mean"),
}
errors = {name: [] for name in [*variants, "双向注意力，拆开，token 平均"]}
cosines = {name: [] for name in errors}
for seed in range(SEEDS):
    torch.manual_seed(seed)
    turns, model = random_session(torch.Generator().manual_seed(seed), (4, 40, 8)), TinyTransformer()
    found = {name: gradient(model, *build(turns)) for name, build in variants.items()}
    truths = dict.fromkeys(found, gradient(model, [build_labels(turns)], "token-mean"))
    bidirectional = "双向注意力，拆开，token 平均"
    found[bidirectional] = gradient(model, split_turns(turns), "token-mean", causal=False)
    truths[bidirectional] = gradient(model, [build_labels(turns)], "token-mean", causal=False)
    for name, grad in found.items():
        truth = truths[name]
        errors[name].append(((grad - truth).norm() / truth.norm()).item())
        cosines[name].append(F.cosine_similarity(grad, truth, dim=0).item())
rows = []
for name, values in errors.items():
    low, high = min(values), max(values)
    error = "0" if high < 1e-13 else f"{low:.2f}–{high:.2f}"
    rows.append([name, error, f"{min(cosines[name]):.2f}–{max(cosines[name]):.2f}"])
same, error = errors["拆开，token 平均"], {row[0]: row[1] for row in rows}
assert max(same) < 1e-13 and min(min(v) for name, v in errors.items() if name != "拆开，token 平均") > 0.04
assert error["拆开，按条平均"] == "0.24–0.69" and error["整段，只训最后一轮"] == "0.53–1.29"
assert error["双向注意力，拆开，token 平均"] == "0.14–0.24" and error["整段，结束符不计"] == "0.07–0.14"
assert error["整段，头也计入"] == "0.08–0.26" and error["整段，截到 48"] == "0.25–0.34"
# 前向的 token 数：三轮不等长时逐条相加；等长 K 轮是 (K+1)/2 倍，注意力的配对数是 (K+1)(2K+1)/(6K) 倍
forward = [sum(len(ids) for ids, _ in samples) for samples in (split_turns(turns), [build_labels(turns)])]
assert forward == [160, 82]
equal = random_session(torch.Generator().manual_seed(0), [10] * 10)
lengths = [len(ids) - 1 for ids, _ in split_turns(equal)]  # 去掉末尾没有后文的换行，逐轮差一个定长
per_turn = lengths[1] - lengths[0]
assert abs(sum(per_turn * k for k in range(1, 11)) / (per_turn * 10) - 5.5) < 1e-12
assert f"{sum((per_turn * k) ** 2 for k in range(1, 11)) / (per_turn * 10) ** 2:.2f}" == "3.85"
Markdown(tabulate(rows, headers=["构造", "梯度相对误差", "余弦"], tablefmt="github", disable_numparse=True))

# %%
#| label: token-mask
#| caption: 现场训练的字节级 BPE 分词，一段带工具调用的两轮对话：只有助手的正文与结束符计入，头、用户、工具与结束符之后的换行都不计
#| echo: fold
SENTENCES = [
    "你好，请讲。",
    "北京冷吗？",
    "查天气：北京",
    "12 度",
    "不冷，12 度。",
    "带伞吗？",
    "不用带，今天没有雨。",
]
SENTENCES += [
    "system user assistant tool",
    "先查天气再回答",
    "没有雨就不用带伞",
    "Beijing is not cold today.",
]
tokenizer = Tokenizer(models.BPE())
pattern = Regex(
    r"\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+"
)  # 与 Qwen 一类的切法同样会把连续换行合成一段
tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
    [
        pre_tokenizers.Split(pattern, "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]
)
tokenizer.decoder = decoders.ByteLevel()
tokenizer.train_from_iterator(
    [*SENTENCES * 4, "\n\n" * 4],
    trainers.BpeTrainer(
        vocab_size=420, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    ),
)
tokenizer.add_special_tokens(["<|im_start|>", "<|im_end|>"])
tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in ("<think>", "</think>")])

# 换行写成变量 nl，不受模板空白控制的影响
GENERATION_PROMPT = "{%- if add_generation_prompt -%}<|im_start|>assistant{{ nl }}{%- endif -%}"
CHATML = (
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ nl }}{{ m.content }}<|im_end|>{{ nl }}{%- endfor -%}"
    + GENERATION_PROMPT
)
environment = Environment(keep_trailing_newline=True)


def render(template, messages, *, add_generation_prompt=False):
    return environment.from_string(template).render(
        messages=messages, add_generation_prompt=add_generation_prompt, nl="\n"
    )


def encode(text):
    return tokenizer.encode(text, add_special_tokens=False).ids


def to_turns(rendered):
    """把渲染好的文本按消息切开，头、正文（含结束符）、尾分别编码。"""
    turns = []
    for block in rendered.split("<|im_start|>")[1:]:
        role, rest = block.split("\n", 1)
        body, trailer = rest.split("<|im_end|>")
        turns.append(
            Turn(role, encode(f"<|im_start|>{role}\n"), encode(body + "<|im_end|>"), encode(trailer))
        )
    return turns


messages = [
    {"role": "user", "content": "你好"},
    {"role": "assistant", "content": "你好，请讲。"},
    {"role": "user", "content": "北京冷吗？"},
    {"role": "assistant", "content": "查天气：北京"},
    {"role": "tool", "content": "12 度"},
    {"role": "assistant", "content": "不冷，12 度。"},
]
text = render(CHATML, messages)
turns = to_turns(text)
ids, labels = build_labels(turns)
assert ids == encode(text)  # 分段编码再拼，与整段编码相同


def shown(tokens):
    pieces = [tokenizer.decode([t], skip_special_tokens=False).replace("\n", "⏎") for t in tokens]
    assert not any("�" in piece for piece in pieces)
    escaped = [piece.replace("<", "&lt;").replace(">", "&gt;").replace("|", "&#124;") for piece in pieces]
    return " · ".join(piece.replace(" ", "␣") for piece in escaped) or "—"


rows, cursor = [], 0
for turn in turns:
    size = len(turn.header) + len(turn.body) + len(turn.trailer)
    span = range(cursor, cursor + size)
    kept = [ids[i] for i in span if labels[i] != IGNORE_INDEX]
    assert kept == (turn.body if turn.role == "assistant" else [])
    rows.append([turn.role, shown([ids[i] for i in span if labels[i] == IGNORE_INDEX]), shown(kept)])
    cursor += size
counted = sum(label != IGNORE_INDEX for label in labels)
end_token = tokenizer.token_to_id("<|im_end|>")
assert labels.count(end_token) == 3 and ids.count(end_token) == 6
# 每一轮的（前文，目标）都与推理时一致：前文就是带生成提示的渲染
for k, turn in enumerate(turns):
    if turn.role == "assistant":
        prompt = encode(render(CHATML, messages[:k], add_generation_prompt=True))
        assert ids[: len(prompt)] == prompt and ids[len(prompt) :][: len(turn.body)] == list(turn.body)
# 正文以换行开头时，整段编码会把头的换行并进去，与推理时的前文对不上
assert len(encode("assistant\n\n你好")) == len(encode("assistant\n") + encode("\n你好")) - 1
assert (len(ids), counted) == (51, 17)
Markdown(tabulate(rows, headers=["消息", "不计入（-100）", "计入"], tablefmt="github"))

# %%
#| label: template-rewrites-history
#| caption: 模板会剥掉历史里的思考：整段一条总有一轮与推理时的前文或目标不一致，只有逐轮拆开两轮都一致
#| echo: fold
STRIP = (
    "{%- set ns = namespace(last=0) -%}"
    "{%- for m in messages -%}{%- if m.role == 'user' -%}{%- set ns.last = loop.index0 -%}{%- endif -%}{%- endfor -%}"
    "{%- for m in messages -%}<|im_start|>{{ m.role }}{{ nl }}"
    "{%- if m.role == 'assistant' and loop.index0 < ns.last -%}{{ m.content.split('</think>')[-1].lstrip(nl) }}"
    "{%- else -%}{{ m.content }}{%- endif -%}<|im_end|>{{ nl }}{%- endfor -%}" + GENERATION_PROMPT
)
thinking = [
    {"role": "user", "content": "北京冷吗？"},
    {"role": "assistant", "content": "<think>\n先查天气再回答\n</think>\n\n不冷，12 度。"},
    {"role": "user", "content": "带伞吗？"},
    {"role": "assistant", "content": "<think>\n没有雨就不用带伞\n</think>\n\n不用带，今天没有雨。"},
]


def pairs(samples):
    """每条样本里的每一段标签：（前文，目标）。"""
    found = []
    for ids, labels in samples:
        starts = [i for i, y in enumerate(labels) if y != IGNORE_INDEX and labels[i - 1] == IGNORE_INDEX]
        for start in starts:
            end = next(
                i for i in range(start, len(labels) + 1) if i == len(labels) or labels[i] == IGNORE_INDEX
            )
            found.append((ids[:start], ids[start:end]))
    return found


inference = [  # 部署用剥离模板：第 k 轮看到的前文，与希望它写出的内容
    (
        encode(render(STRIP, thinking[:k], add_generation_prompt=True)),
        encode(thinking[k]["content"] + "<|im_end|>"),
    )
    for k in (1, 3)
]
prefix_split = [split_turns(to_turns(render(STRIP, thinking[: k + 1])))[-1] for k in (1, 3)]
options = {
    "整段，剥离模板": pairs([build_labels(to_turns(render(STRIP, thinking)))]),
    "整段，保留思考": pairs([build_labels(to_turns(render(CHATML, thinking)))]),
    "逐轮拆开，剥离模板": pairs(prefix_split),
}
think = tokenizer.token_to_id("<think>")
rows = []
for name, found in options.items():
    assert len(found) == 2
    cells = [
        "一致" if a == b else "不同"
        for pair, truth in zip(found, inference, strict=True)
        for a, b in zip(pair, truth, strict=True)
    ]
    rows.append([name, *cells])
assert [row[1:] for row in rows] == [
    ["一致", "不同", "一致", "一致"],
    ["一致", "一致", "不同", "一致"],
    ["一致", "一致", "一致", "一致"],
]
assert think not in options["整段，剥离模板"][0][1] and think in options["整段，保留思考"][1][0]
# 前缀检查：前两条消息的渲染，是不是整段渲染的前缀
assert not render(STRIP, thinking).startswith(render(STRIP, thinking[:2]))
assert render(CHATML, thinking).startswith(render(CHATML, thinking[:2]))
# 剥离只由新的用户消息触发：同一条用户消息之后的工具调用，仍以前面为前缀
loop = [*thinking[:2], {"role": "tool", "content": "12 度"}, thinking[3]]
assert render(STRIP, loop).startswith(render(STRIP, loop[:2])) and render(STRIP, loop).count("<think>") == 2
lost = len(options["逐轮拆开，剥离模板"][0][1]) - len(options["整段，剥离模板"][0][1])
assert lost == 6  # 被剥掉而没有训练到的思考 token
Markdown(
    tabulate(rows, headers=["训练时", "轮 1 前文", "轮 1 目标", "轮 2 前文", "轮 2 目标"], tablefmt="github")
)

# %%
#| label: packing-leak
#| caption: 两条样本装进一行，第二条的 logits 与单独算时的相对误差，五个种子：绝对位置要位置重置加块对角掩码，RoPE 只要掩码
#| echo: fold
settings = {
    "直接拼接": (False, False),
    "只重置位置": (True, False),
    "只用块对角掩码": (False, True),
    "两者都做": (True, True),
}
leaks = {(name, rope): [] for name in settings for rope in (False, True)}
for seed in range(SEEDS):
    generator = torch.Generator().manual_seed(seed)
    documents = [torch.randint(V, (n,), generator=generator).tolist() for n in (20, 15)]
    packed, packed_labels, document_ids = pack_documents([(d, d) for d in documents])
    reset, block = position_ids_from_documents(document_ids), block_diagonal_causal_mask(document_ids)
    for rope in (False, True):
        torch.manual_seed(seed)
        model = TinyTransformer(rope=rope)
        with torch.no_grad():
            alone = model(torch.tensor([documents[1]]))[0]
            for name, (use_reset, use_block) in settings.items():
                together = model(packed, block if use_block else None, reset if use_reset else None)[0, 20:]
                leaks[name, rope].append(((together - alone).norm() / alone.norm()).item())
rows = []
for name in settings:
    cells = []
    for rope in (False, True):
        low, high = min(leaks[name, rope]), max(leaks[name, rope])
        cells.append("0" if high < 1e-12 else f"{low:.2f}–{high:.2f}")
    rows.append([name, *cells])
assert [row[1:] for row in rows] == [
    ["0.43–0.97", "0.39–0.78"],
    ["0.27–0.91", "0.39–0.71"],
    ["0.52–1.01", "0"],
    ["0", "0"],
]
Markdown(tabulate(rows, headers=["做法", "学习的绝对位置", "RoPE"], tablefmt="github", disable_numparse=True))
