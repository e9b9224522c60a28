"""多轮 SFT 样本的真值来自与参考实现无关的东西：手写的小例子；transformers 5.23 的 `apply_chat_template`
（`{% generation %}` 标出助手 token）与 `ForCausalLMLoss`；TRL 1.16 的 `SFTTrainer` 真的准备一遍数据、
padding-free 的整理器；真实的小 Llama 在一条一条单独算时的 logits 与梯度。错误写法在文件末尾，断言它们被同一个真值拒绝。
"""

from pathlib import Path

import pytest
import torch
import trl
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.loss.loss_utils import ForCausalLMLoss

from snippets.training.multi_turn_sft import (
    Turn,
    block_diagonal_causal_mask,
    build_labels,
    pack_documents,
    position_ids_from_documents,
    split_turns,
    token_weights,
)

VOCAB = 300
MESSAGES = [
    {"role": "system", "content": "简短回答。"},
    {"role": "user", "content": "北京冷吗？"},
    {"role": "assistant", "content": "查天气：北京"},
    {"role": "tool", "content": "12 度"},
    {"role": "assistant", "content": "不冷，12 度。"},
    {"role": "user", "content": "thanks"},
    {"role": "assistant", "content": "不客气。"},
]
HEADER, GENERATION = (
    "<|im_start|>{{ m.role }}{{ '\n' }}",
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}",
)
TEMPLATE = (
    f"{{% for m in messages %}}{HEADER}"
    f"{{% if m.role == 'assistant' %}}{GENERATION}{{% else %}}{{{{ m.content }}}}<|im_end|>{{% endif %}}"
    "{{ '\n' }}{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant{{ '\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    """现场训练的字节级 BPE，套上 transformers 的外壳。"""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=290, initial_alphabet=alphabet, show_progress=False)
    raw.train_from_iterator([m["content"] for m in MESSAGES] * 3, trainer)
    raw.add_special_tokens(["<|im_start|>", "<|im_end|>", "<|pad|>"])
    wrapped = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|im_end|>", pad_token="<|pad|>")
    wrapped.chat_template = TEMPLATE
    return wrapped


def to_turns(tokenizer, messages):
    encode = lambda text: tokenizer(text, add_special_tokens=False)["input_ids"]  # noqa: E731
    return [
        Turn(
            m["role"], encode(f"<|im_start|>{m['role']}\n"), encode(f"{m['content']}<|im_end|>"), encode("\n")
        )
        for m in messages
    ]


def llama(seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=256,
        initializer_range=0.4,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def gradient(model, terms):
    """terms 里逐条、逐 token 的（权重，输入，目标位置）：不补齐、不打包，逐条前向。"""
    total = 0.0
    for ids, targets in terms:
        log_probs = model(input_ids=torch.tensor([ids])).logits[0].log_softmax(-1)
        total = total - sum(weight * log_probs[t - 1, ids[t]] for t, weight in targets.items())
    grads = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def library_gradient(model, samples, *, per_row=False):
    """transformers 自己的损失：全部样本求和除以总数；per_row 时每条先取均值。"""
    count = sum(sum(label != -100 for label in labels[1:]) for _, labels in samples)
    total = 0.0
    for ids, labels in samples:
        logits = model(input_ids=torch.tensor([ids])).logits
        items = None if per_row else torch.tensor(count)
        # ForCausalLMLoss 先转 float32，这里喂进去的仍是 float64 模型的 logits
        loss = ForCausalLMLoss(logits, torch.tensor([labels]), VOCAB, num_items_in_batch=items)
        total = total + (loss / len(samples) if per_row else loss)
    grads = torch.autograd.grad(total, list(model.parameters()))
    return torch.cat([g.flatten() for g in grads])


def relative(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# ---------------------------------------------------------------- 手算

USER, ASSISTANT, TOOL = (
    Turn("user", [1], [7, 2], [3]),
    Turn("assistant", [4], [8, 9, 2], [3]),
    Turn("tool", [5], [6, 2], [3]),
)


def test_labels_by_hand():
    """头 1、4、5，结束符 2，分隔 3：只有助手的 8 9 2 留下。"""
    ids, labels = build_labels([USER, ASSISTANT, TOOL])
    assert ids == [1, 7, 2, 3, 4, 8, 9, 2, 3, 5, 6, 2, 3]
    assert labels == [-100] * 5 + [8, 9, 2] + [-100] * 5


def test_train_roles_by_hand():
    _, labels = build_labels([USER, ASSISTANT], train_roles=("user",))
    assert labels == [-100, 7, 2] + [-100] * 6
    _, labels = build_labels([USER, ASSISTANT, TOOL], train_roles=("user", "assistant"))
    assert labels == [-100, 7, 2, -100, -100, 8, 9, 2] + [-100] * 5


def test_split_by_hand():
    """两个助手轮，第二条的历史遮住；末尾停在助手消息，后面的用户消息不成样本。"""
    second = Turn("assistant", [4], [6, 2])
    samples = split_turns([USER, ASSISTANT, TOOL, second, USER])
    assert samples == [
        ([1, 7, 2, 3, 4, 8, 9, 2, 3], [-100] * 5 + [8, 9, 2, -100]),
        ([1, 7, 2, 3, 4, 8, 9, 2, 3, 5, 6, 2, 3, 4, 6, 2], [-100] * 14 + [6, 2]),
    ]
    unmasked = split_turns([USER, ASSISTANT, TOOL, second, USER], mask_history=False)
    assert unmasked[1][1] == [-100] * 5 + [8, 9, 2] + [-100] * 6 + [6, 2]


def test_weights_by_hand():
    """一段 (2, 4)，一段 (3)。拆开按条平均：三条样本，1/6、1/12、1/9；整段：两条，1/12、1/12、1/6。

    不遮历史：样本的计数 2、6、3。按条平均时第一轮 1/6 + 1/18；token 平均时第一轮出现两次，2/11。
    """
    sessions = [[2, 4], [3]]
    cases = {
        ("session", "token-mean"): [[1 / 9, 1 / 9], [1 / 9]],
        ("session", "sample-mean"): [[1 / 12, 1 / 12], [1 / 6]],
        ("split", "token-mean"): [[1 / 9, 1 / 9], [1 / 9]],
        ("split", "sample-mean"): [[1 / 6, 1 / 12], [1 / 9]],
        ("split-unmasked", "token-mean"): [[2 / 11, 1 / 11], [1 / 11]],
        ("split-unmasked", "sample-mean"): [[1 / 6 + 1 / 18, 1 / 18], [1 / 9]],
    }
    for (construction, reduction), expected in cases.items():
        actual = token_weights(sessions, construction=construction, reduction=reduction)
        for weights, truth in zip(actual, expected, strict=True):
            torch.testing.assert_close(weights, torch.tensor(truth, dtype=torch.float64))


def test_positions_and_mask_by_hand():
    document_ids = torch.tensor([[4, 4, 4, 1, 1], [0, 0, 2, 3, 3]])
    assert position_ids_from_documents(document_ids).tolist() == [[0, 1, 2, 0, 1], [0, 1, 0, 0, 1]]
    mask = block_diagonal_causal_mask(document_ids)
    expected = torch.zeros(2, 5, 5, dtype=torch.bool)
    for b in range(2):
        for t in range(5):
            for s in range(t + 1):
                expected[b, t, s] = document_ids[b, t] == document_ids[b, s]
    assert mask.dtype == torch.bool and (mask == expected).all()
    assert mask[0].sum() == 6 + 3


# ---------------------------------------------------------------- 对照 transformers 与 TRL


def test_labels_match_apply_chat_template(tokenizer):
    """transformers 按字符区间找助手 token，这里按消息分段编码，两条路互不依赖。"""
    out = tokenizer.apply_chat_template(MESSAGES, return_dict=True, return_assistant_tokens_mask=True)
    ids, labels = build_labels(to_turns(tokenizer, MESSAGES))
    assert ids == out["input_ids"]
    assert labels == [i if m else -100 for i, m in zip(ids, out["assistant_masks"], strict=True)]
    assert labels.count(tokenizer.eos_token_id) == 3


def test_split_prefixes_equal_inference_prompts(tokenizer):
    """每条样本在第一个标签之前的部分，就是推理时带生成提示的前文。"""
    samples = split_turns(to_turns(tokenizer, MESSAGES))
    ends = [i for i, m in enumerate(MESSAGES) if m["role"] == "assistant"]
    for (ids, labels), end in zip(samples, ends, strict=True):
        prompt = tokenizer.apply_chat_template(MESSAGES[:end], add_generation_prompt=True, return_dict=False)
        start = next(i for i, y in enumerate(labels) if y != -100)
        assert ids[:start] == prompt


def sft_trainer(tokenizer, tmp_path, messages, **settings):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    arguments = {
        "report_to": [],
        "use_cpu": True,
        "bf16": False,
        "activation_checkpointing": False,
    } | settings
    return SFTTrainer(
        model=llama(dtype=torch.float32),
        args=SFTConfig(output_dir=str(tmp_path), **arguments),
        train_dataset=Dataset.from_list([{"messages": messages}]),
        processing_class=tokenizer,
    )


def test_trl_assistant_only_loss_builds_the_same_labels(tokenizer, tmp_path):
    """真实的 SFTTrainer；默认不开 assistant_only_loss 时，用户与系统的 token 也在训练。"""
    ids, labels = build_labels(to_turns(tokenizer, MESSAGES))
    row = sft_trainer(tokenizer, tmp_path, MESSAGES, assistant_only_loss=True).train_dataset[0]
    assert row["input_ids"] == ids and row["labels"] == labels
    default = sft_trainer(tokenizer, tmp_path, MESSAGES).train_dataset[0]
    assert default["labels"] == ids


def test_trl_accepts_a_template_that_strips_thoughts(tokenizer):
    """TRL 1.16 的前缀检查只查「追加工具消息」；历史被新的用户消息改写的模板，它照单全收。"""
    from trl.chat_template_utils import get_training_chat_template, is_chat_template_prefix_preserving

    content = "{% if loop.last %}{{ m.content }}{% else %}{{ m.content.split('</think>')[-1] }}{% endif %}"
    stripping = TEMPLATE.replace("{% generation %}{{ m.content }}", "{% generation %}" + content)
    assert stripping != TEMPLATE
    copy = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    copy.chat_template = stripping
    first = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "<think>b</think>c"}]
    longer = [*first, {"role": "user", "content": "d"}]
    before = copy.apply_chat_template(first, tokenize=False)
    assert not copy.apply_chat_template(longer, tokenize=False).startswith(before)
    assert is_chat_template_prefix_preserving(copy) and get_training_chat_template(copy) is None


def test_qwen3_template_strips_thoughts_only_at_a_new_user_query(tokenizer):
    """Qwen3 的原模板（TRL 1.16 附带）：工具调用之后历史不变，新的用户提问才剥掉思考。"""
    template = (Path(trl.__file__).parent / "chat_templates" / "qwen3.jinja").read_text(encoding="utf-8")
    render = lambda messages: tokenizer.apply_chat_template(  # noqa: E731
        messages, chat_template=template, tokenize=False
    )
    first = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "<think>\nb\n</think>\n\nc"},
    ]
    tool_loop = [*first, {"role": "tool", "content": "d"}, first[1]]
    assert render(tool_loop).startswith(render(first)) and render(tool_loop).count("<think>") == 2
    new_query = [*first, {"role": "user", "content": "d"}, first[1]]
    assert not render(new_query).startswith(render(first)) and render(new_query).count("<think>") == 1


def test_packing_matches_trl_padding_free_collator():
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    samples = [([5, 6, 7], [-100, 6, 7]), ([8, 9], [8, 9]), ([4, 3, 2, 1], [-100, -100, 2, 1])]
    collator = DataCollatorForLanguageModeling(pad_token_id=0, padding_free=True)
    expected = collator([{"input_ids": ids, "labels": labels} for ids, labels in samples])
    input_ids, labels, document_ids = pack_documents(samples)
    assert (input_ids == expected["input_ids"]).all() and (labels == expected["labels"]).all()
    assert (position_ids_from_documents(document_ids) == expected["position_ids"]).all()
    assert (document_ids == expected["seq_idx"]).all()


def test_transformers_isolates_packed_documents_only_without_a_mask():
    """真实的 Llama（SDPA，RoPE）：位置重置且不传 attention_mask 时自动隔开；传全 1 的二维掩码、
    或打开 KV 缓存（eval 时的默认）就串扰。

    块对角掩码（四维）不动位置也隔得开，因为 RoPE 只看相对位置。
    """
    model, generator = llama(), torch.Generator().manual_seed(3)
    documents = [torch.randint(VOCAB, (n,), generator=generator).tolist() for n in (7, 5)]
    input_ids, _, document_ids = pack_documents([(d, d) for d in documents])
    positions = position_ids_from_documents(document_ids)
    with torch.no_grad():
        alone = model(input_ids=torch.tensor([documents[1]])).logits[0]

        def run(use_cache=False, **inputs):
            return model(input_ids=input_ids, use_cache=use_cache, **inputs).logits[0, 7:]

        block = block_diagonal_causal_mask(document_ids)[:, None]
        torch.testing.assert_close(run(position_ids=positions), alone)
        # transformers 的 RoPE 用 float32 算余弦与正弦，位置整体平移后差到 1e-6 的量级
        torch.testing.assert_close(run(attention_mask=block), alone, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(run(attention_mask=block, position_ids=positions), alone)
        assert relative(run(position_ids=positions, attention_mask=torch.ones_like(input_ids)), alone) > 0.1
        assert relative(run(position_ids=positions, use_cache=True), alone) > 0.1
        assert relative(run(), alone) > 0.1


@pytest.fixture(scope="module")
def turns():
    """随机 token，助手轮各 3、12、5 个计入的 token。"""
    generator = torch.Generator().manual_seed(1)
    draw = lambda n: torch.randint(3, VOCAB, (n,), generator=generator).tolist()  # noqa: E731
    found = []
    for n in (3, 12, 5):
        found += [Turn("user", [0], [*draw(4), 2], [1]), Turn("assistant", [0], [*draw(n - 1), 2], [1])]
    return found


@pytest.fixture(scope="module")
def truth(turns):
    """整段的梯度：按下标手工指定目标位置，不经过 build_labels。每条用户消息 7 个 token，助手 n+2 个。"""
    ids, targets, cursor = [], {}, 0
    for turn in turns:
        ids += [*turn.header, *turn.body, *turn.trailer]
        if turn.role == "assistant":
            targets |= {cursor + 1 + j: 1 / 20 for j in range(len(turn.body))}
        cursor = len(ids)
    assert len(targets) == 20
    return gradient(llama(), [(ids, targets)])


def test_session_and_split_share_the_gradient_under_token_mean(turns, truth):
    """transformers 的损失：全局 token 平均之下两种构造相同（它内部转 float32，故容差 1e-5）。"""
    assert relative(library_gradient(llama(), [build_labels(turns)]), truth) < 1e-5
    assert relative(library_gradient(llama(), split_turns(turns)), truth) < 1e-5


@pytest.mark.parametrize("construction", ["split", "split-unmasked", "session"])
def test_weights_reproduce_the_library_gradient_under_sample_mean(turns, construction):
    """按 token_weights 给整段的每个 token 加权，等于 transformers 逐条取均值再平均的梯度。"""
    samples = {
        "session": [build_labels(turns)],
        "split": split_turns(turns),
        "split-unmasked": split_turns(turns, mask_history=False),
    }[construction]
    (weights,) = token_weights([[3, 12, 5]], construction=construction, reduction="sample-mean")
    ids, labels = build_labels(turns)
    counted = [t for t, label in enumerate(labels) if label != -100]
    owners = [0] * 3 + [1] * 12 + [2] * 5
    targets = {t: weights[k].item() for t, k in zip(counted, owners, strict=True)}
    weighted = gradient(llama(), [(ids, targets)])
    assert relative(library_gradient(llama(), samples, per_row=True), weighted) < 1e-5


def test_packing_keeps_the_gradient(turns, truth):
    """拆开的样本打成一行，位置重置，损失除以总数：梯度仍是整段的梯度。"""
    input_ids, labels, document_ids = pack_documents(split_turns(turns))
    model = llama()
    logits = model(
        input_ids=input_ids, position_ids=position_ids_from_documents(document_ids), use_cache=False
    ).logits
    loss = ForCausalLMLoss(logits, labels, VOCAB, num_items_in_batch=torch.tensor(20))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert relative(torch.cat([g.flatten() for g in grads]), truth) < 1e-5


# ---------------------------------------------------------------- 性质与边界


@pytest.mark.parametrize("construction", ["session", "split", "split-unmasked"])
@pytest.mark.parametrize("reduction", ["token-mean", "sample-mean"])
def test_weights_sum_to_one(construction, reduction):
    sessions = [[3, 8, 2], [5], [1, 9]]
    weights = token_weights(sessions, construction=construction, reduction=reduction)
    total = sum((w * torch.tensor(n)).sum() for w, n in zip(weights, sessions, strict=True))
    torch.testing.assert_close(total, torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("K", [1, 4, 10])
def test_cost_ratio(K):
    """等长 K 轮：token 数之比 (K+1)/2，注意力的（查询，键）对数之比 (K+1)(2K+1)/(6K)。"""
    turns = [Turn("user", [0], [5, 2], [1]), Turn("assistant", [0], [6, 7, 2], [1])] * K
    lengths = [len(ids) for ids, _ in split_turns(turns)]
    whole = len(build_labels(turns)[0])
    assert sum(lengths) / whole == pytest.approx((K + 1) / 2)
    assert sum(n * n for n in lengths) / whole**2 == pytest.approx((K + 1) * (2 * K + 1) / (6 * K))


def test_no_assistant_turn_leaves_nothing():
    assert split_turns([USER, TOOL]) == []
    assert set(build_labels([USER, TOOL])[1]) == {-100}


def test_first_label_of_each_document_is_never_a_target():
    _, labels, _ = pack_documents([([5, 6], [5, 6]), ([7, 8], [7, 8])])
    assert labels.tolist() == [[-100, 6, -100, 8]]


def test_unknown_names_are_rejected():
    with pytest.raises(ValueError, match="construction='spilt'"):
        token_weights([[1]], construction="spilt", reduction="token-mean")
    with pytest.raises(ValueError, match="reduction='mean'"):
        token_weights([[1]], construction="split", reduction="mean")


# ---------------------------------------------------------------- 被拒绝的错误写法


def header_in_loss(turns):
    return [build_labels([Turn(t.role, [], [*t.header, *t.body], t.trailer) for t in turns])]


def eos_masked(turns):
    return [build_labels([Turn(t.role, t.header, t.body[:-1], [2, *t.trailer]) for t in turns])]


def shifted_twice(turns):
    ids, labels = build_labels(turns)
    return [(ids, labels[1:] + [-100])]


WRONG = {
    "history-unmasked": lambda turns: split_turns(turns, mask_history=False),
    "header-in-loss": header_in_loss,
    "eos-masked": eos_masked,
    "everything-in-loss": lambda turns: [build_labels(turns, train_roles=("user", "assistant"))],
    "last-turn-only": lambda turns: split_turns(turns)[-1:],
    "shifted-twice": shifted_twice,
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG)
def test_wrong_constructions_are_rejected(turns, truth, name):
    assert relative(library_gradient(llama(), WRONG[name](turns)), truth) > 0.05


@pytest.mark.rejects
def test_no_shift_is_rejected(turns, truth):
    """不移位：位置 t 的 logits 对着自己的 token，变成抄写输入。"""
    ids, labels = build_labels(turns)
    model = llama()
    logits = model(input_ids=torch.tensor([ids])).logits
    loss = torch.nn.functional.cross_entropy(logits[0], torch.tensor(labels))
    grads = torch.autograd.grad(loss, list(model.parameters()))
    assert relative(torch.cat([g.flatten() for g in grads]), truth) > 0.5


@pytest.mark.rejects
def test_per_row_mean_is_rejected(turns, truth):
    assert relative(library_gradient(llama(), split_turns(turns), per_row=True), truth) > 0.2
