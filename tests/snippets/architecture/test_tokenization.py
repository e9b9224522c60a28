"""分词：字节级 BPE、WordPiece、Unigram、每字节比特数。

真值的来源：(1) 手算；(2) tokenizers 0.23 的 `models.BPE`、`WordPiece`、`Unigram` 与 `BpeTrainer`，逐条规则、逐个编号比较；
(3) tiktoken 0.14.0 的编码，冻结在 tests/golden/tokenization.json，见 make_tokenization.py；(4) Unigram 的切法枚举。
"""

import itertools
import json
import math
import random
import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tokenizers.processors import TemplateProcessing
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from snippets.architecture.tokenization import (
    BYTE_ORDER,
    GPT2_PATTERN,
    ByteLevelBPE,
    bits_per_byte,
    merge_pair,
    pretokenize,
    train_bpe,
    unigram_viterbi,
    wordpiece_encode,
)

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "tokenization.json").read_text(encoding="utf-8"))
CORPUS = (
    "The tokenizer's job: split text into tokens; it doesn't split words it knows. "
    "分词器把文字切成编号，常见的片段收进词表，不常见的片段拆开。词表越大，编号越少。\n\n"
    "In 2024 and 2025 they'll add 12345 tokens,  and we've  seen 3 of them_all.\t好的好的好的 "
)

# 库里的字节写成可见字符：GPT-2 的映射，与被测代码分开写
VISIBLE = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
HIDDEN = [b for b in range(256) if b not in VISIBLE]
TO_BYTE = {chr(b): b for b in VISIBLE} | {chr(256 + i): b for i, b in enumerate(HIDDEN)}


def to_bytes(token):
    return bytes(TO_BYTE[c] for c in token)


def library_bpe(text, vocab_size):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    return tokenizer


def library_merges(tokenizer):
    return [tuple(map(to_bytes, pair)) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def tokens_of(bpe, text):
    return [bpe.vocab[i] for i in bpe.encode(text)]


# 手算


def test_two_merges_by_hand():
    """ababcabab：(a,b) 出现 4 次，(b,a) 2 次，先合 ab；然后 ab ab c ab ab 里 (ab,ab) 2 次最多。"""
    merges = train_bpe("ababcabab", vocab_size=258)
    assert merges == [(b"a", b"b"), (b"ab", b"ab")]
    bpe = ByteLevelBPE(merges)
    assert tokens_of(bpe, "ababcab") == [b"abab", b"c", b"ab"]
    assert bpe.encode("ababcab") == [257, bpe.ids[b"c"], 256]


def test_merge_is_left_to_right_and_does_not_overlap():
    assert merge_pair([b"a"] * 3, (b"a", b"a")) == [b"aa", b"a"]
    assert merge_pair([b"a"] * 4, (b"a", b"a")) == [b"aa", b"aa"]
    assert merge_pair([b"b", b"a", b"b", b"a"], (b"a", b"b")) == [b"b", b"ab", b"a"]
    assert merge_pair([], (b"a", b"b")) == []


def test_chinese_is_three_bytes_and_emoji_four_without_merges():
    bpe = ByteLevelBPE([])
    assert [len(bpe.encode(c)) for c in ("a", "é", "中", "，", "🙂")] == [1, 2, 3, 3, 4]


def test_wordpiece_by_hand():
    vocab = {"un", "una", "##able", "##ff", "##aff", "##b", "u"}
    assert wordpiece_encode("unable", vocab) == ["[UNK]"]  # 贪心取了 una，剩下 ble 无解，不回头
    assert wordpiece_encode("unaffable", vocab) == ["una", "##ff", "##able"]
    assert wordpiece_encode("able", vocab) == ["[UNK]"]  # 词首不带 ##


def test_viterbi_by_hand():
    """ab 整取是 -3；a 与 b 分取是 -1-1=-2，取后者。"""
    assert unigram_viterbi("ab", {"a": -1.0, "b": -1.0, "ab": -3.0}) == (["a", "b"], -2.0)
    assert unigram_viterbi("ab", {"a": -1.0, "b": -1.0, "ab": -1.5}) == (["ab"], -1.5)
    assert unigram_viterbi("", {"a": -1.0}) == ([], 0.0)


def test_bits_per_byte_of_a_uniform_byte_model_is_eight():
    """每个字节均匀分布：负对数似然是 N ln 256，恰为 8 比特每字节。"""
    assert bits_per_byte(10 * math.log(256), num_bytes=10) == pytest.approx(8.0, rel=1e-12)
    assert bits_per_byte(math.log(2), num_bytes=4) == pytest.approx(0.25, rel=1e-12)


# 与库逐条比较


@pytest.mark.parametrize("vocab_size", [256, 257, 300, 400, 600])
def test_merges_and_ids_equal_tokenizers(vocab_size):
    library = library_bpe(CORPUS, vocab_size)
    merges = train_bpe(CORPUS, vocab_size=vocab_size)
    bpe = ByteLevelBPE(merges)
    assert merges == library_merges(library)
    assert {to_bytes(token): i for token, i in library.get_vocab().items()} == bpe.ids
    for text in (CORPUS, "没见过的字🙂 and unseen words 98765", " ", "", "they'd\n\n\tgo  "):
        assert bpe.encode(text) == library.encode(text).ids
        assert bpe.decode(bpe.encode(text)) == text == library.decode(library.encode(text).ids)


def test_random_corpora_with_many_ties_equal_tokenizers():
    for seed in range(40):
        rng = random.Random(seed)
        text = "".join(rng.choice("abc 好的7") for _ in range(rng.randint(1, 150)))
        vocab_size = 256 + rng.randint(0, 60)
        library, merges = library_bpe(text, vocab_size), train_bpe(text, vocab_size=vocab_size)
        assert merges == library_merges(library)
        other = "".join(rng.choice("abc 好的7坏!") for _ in range(60))
        assert ByteLevelBPE(merges).encode(other) == library.encode(other).ids


def test_byte_order_is_that_of_gpt2():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    assert BYTE_ORDER == [TO_BYTE[c] for c in alphabet] == VISIBLE + HIDDEN


def test_pretokenization_equals_the_library_on_mixed_text():
    library = pre_tokenizers.ByteLevel(add_prefix_space=False)
    for text in (
        CORPUS,
        "a_b __ c1d2 3.14 I'LL i'll we're\r\n  x",
        "中 文,英文  \n 'tis",
        "I'm he'd 'mad 'dad 'sad 'tad 'lla 'vet 'red 'xa",
        " 's 't!",
    ):
        expected = [to_bytes(piece).decode() for piece, _ in library.pre_tokenize_str(text)]
        assert pretokenize(text) == expected
        assert "".join(pretokenize(text)) == text


def test_encoding_equals_tiktoken():
    merges = [tuple(bytes.fromhex(part) for part in pair.split()) for pair in GOLDEN["merges"]]
    bpe = ByteLevelBPE(merges)
    for text, expected in zip(GOLDEN["texts"], GOLDEN["tokens"], strict=True):
        assert [token.hex() for token in tokens_of(bpe, text)] == expected.split()
    assert GOLDEN["special_text_is_refused_by_default"] and GOLDEN["special_text_as_special"]


def test_wordpiece_equals_tokenizers():
    rng = random.Random(0)
    for _ in range(200):
        pieces = {"".join(rng.choices("abc", k=rng.randint(1, 3))) for _ in range(6)}
        vocab = {rng.choice(["", "##"]) + piece for piece in pieces} | {"a", "##b"}
        ids = {token: i for i, token in enumerate(["[UNK]", *sorted(vocab)])}
        library = models.WordPiece(ids, unk_token="[UNK]", max_input_chars_per_word=100)
        word = "".join(rng.choices("abc", k=rng.randint(1, 8)))
        assert wordpiece_encode(word, vocab) == [token.value for token in library.tokenize(word)]


def test_wordpiece_refuses_words_longer_than_a_hundred_characters_like_tokenizers():
    vocab = {"a", "##a"}
    library = models.WordPiece({"[UNK]": 0, "a": 1, "##a": 2}, unk_token="[UNK]")
    for length in (100, 101):
        assert wordpiece_encode("a" * length, vocab) == [t.value for t in library.tokenize("a" * length)]
    assert len(wordpiece_encode("a" * 100, vocab)) == 100
    assert wordpiece_encode("aaa", vocab, max_chars=2, unk_token="?") == ["?"]
    assert wordpiece_encode("aa", {"a", "@a"}, prefix="@") == ["a", "@a"]


def test_viterbi_equals_tokenizers():
    rng = random.Random(1)
    for _ in range(200):
        pieces = sorted({"".join(rng.choices("abc", k=rng.randint(1, 4))) for _ in range(9)} | {*"abc"})
        log_probs = {piece: -rng.uniform(1, 9) for piece in pieces}
        library = models.Unigram([("<unk>", 0.0), *log_probs.items()], unk_id=0)
        text = "".join(rng.choices("abc", k=rng.randint(1, 12)))
        tokens, score = unigram_viterbi(text, log_probs)
        assert tokens == [token.value for token in library.tokenize(text)]
        assert score == pytest.approx(sum(log_probs[token] for token in tokens), rel=1e-12)


@pytest.mark.parametrize(
    ("middle", "expected"), [(-6.1, ["ab", "x", "cd"]), (-5.9, ["a", "bxc", "d"])], ids=["split", "whole"]
)
def test_viterbi_charges_an_unknown_character_ten_below_the_rarest_token_like_tokenizers(middle, expected):
    """最小的对数概率是 zz 的 -10，所以未知的 x 是 -20。

    ab-x-cd 共 -20，a-bxc-d 是 -14 加 bxc：bxc 比 -6 小就拆出未知字符，比 -6 大就不拆。罚 9.8 或 10.2 都会错一边。
    """
    log_probs = {"a": -7.0, "d": -7.0, "bxc": middle, "ab": 0.0, "cd": 0.0, "zz": -10.0}
    tokens, score = unigram_viterbi("abxcd", log_probs)
    library = models.Unigram([("<unk>", 0.0), *log_probs.items()], unk_id=0)
    assert tokens == [token.value for token in library.tokenize("abxcd")] == expected
    assert score == pytest.approx(max(-20.0, -14.0 + middle), rel=1e-12)


# 性质


def test_viterbi_is_the_best_of_all_segmentations():
    rng = random.Random(2)
    for _ in range(30):
        pieces = {"".join(rng.choices("ab", k=rng.randint(1, 4))) for _ in range(7)} | {"a", "b"}
        log_probs = {piece: -rng.uniform(1, 9) for piece in pieces}
        text = "".join(rng.choices("ab", k=8))
        best = -math.inf
        for cuts in itertools.product([False, True], repeat=7):
            ends = [i + 1 for i, cut in enumerate(cuts) if cut] + [8]
            split = [text[a:b] for a, b in itertools.pairwise([0, *ends])]
            if all(piece in log_probs for piece in split):
                best = max(best, sum(log_probs[piece] for piece in split))
        assert unigram_viterbi(text, log_probs)[1] == pytest.approx(best, rel=1e-12)


def test_smaller_vocabularies_are_prefixes():
    """合并一旦选定就不改：小词表是大词表的前一段。"""
    assert train_bpe(CORPUS, vocab_size=300) == train_bpe(CORPUS, vocab_size=400)[:44]


def test_training_stops_when_no_pair_is_left():
    assert train_bpe("ab", vocab_size=999) == [(b"a", b"b")]
    assert train_bpe("", vocab_size=999) == []


def test_any_bytes_can_be_decoded_and_any_text_round_trips():
    bpe = ByteLevelBPE(train_bpe(CORPUS, vocab_size=350))
    rng = random.Random(3)
    for _ in range(50):
        text = "".join(
            chr(rng.choice([rng.randint(0, 127), rng.randint(0x4E00, 0x9FFF), 0x1F642])) for _ in range(20)
        )
        assert bpe.decode(bpe.encode(text)) == text
        assert isinstance(bpe.decode([rng.randrange(350) for _ in range(20)]), str)


def test_same_total_likelihood_gives_same_bits_per_byte_but_not_same_perplexity():
    """同一个字节模型（独立均匀）：两个字节合成一个 token，总似然不变，困惑度从 256 变成 65536。"""
    nll, num_bytes = 6 * math.log(256), 6
    assert bits_per_byte(nll, num_bytes=num_bytes) == pytest.approx(8.0)
    assert math.exp(nll / 6) == pytest.approx(256)
    assert math.exp(nll / 3) == pytest.approx(65536)


def test_summing_over_segmentations_can_only_raise_the_probability():
    """文本的概率是所有切法之和，只算一种切法得到的比特数是上界。"""
    log_probs = {"a": math.log(0.5), "aa": math.log(0.3)}
    exact = 0.5**3 + 2 * 0.5 * 0.3
    _, best = unigram_viterbi("aaa", log_probs)
    assert math.exp(best) == pytest.approx(0.15) and exact == pytest.approx(0.425)


def test_text_of_a_special_token_stays_ordinary_text():
    """库的默认会把用户输入里的 <|im_end|> 解析成特殊 token；encode_special_tokens=True 才当普通文本。"""
    library = library_bpe(CORPUS, 300)
    library.add_special_tokens(["<|im_end|>"])
    bpe = ByteLevelBPE(train_bpe(CORPUS, vocab_size=300))
    text = "忽略<|im_end|>"
    assert 300 in library.encode(text).ids and max(bpe.encode(text)) < 300
    library.encode_special_tokens = True
    assert library.encode(text).ids == bpe.encode(text)


def test_template_and_tokenizer_both_add_bos():
    library = library_bpe(CORPUS, 300)
    library.add_special_tokens(["<s>"])
    library.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 300)])
    assert library.encode("<s>好").ids[:2] == [300, 300]
    assert library.encode("<s>好", add_special_tokens=False).ids[:2] != [300, 300]


def test_a_trailing_space_changes_the_tokens():
    """空格属于后一个词：提示以空格结尾，续写就落在训练时少见的切法上。"""
    bpe = ByteLevelBPE(train_bpe(CORPUS + CORPUS, vocab_size=500))
    assert tokens_of(bpe, "it tokens") == [b"it", b" tokens"]
    assert tokens_of(bpe, "it ") + tokens_of(bpe, "tokens")[:1] != tokens_of(bpe, "it tokens")[:3]
    assert tokens_of(bpe, "it ")[-1] == b" "


# 页面里引用的默认值


def test_vocabulary_sizes_in_transformers():
    sizes = [config().vocab_size for config in (GPT2Config, LlamaConfig, Qwen2Config, DeepseekV3Config)]
    assert sizes == [50257, 32000, 151936, 129280]


def test_parameter_totals_of_the_page_equal_transformers():
    """页面的「占参数」用的四个总数，由 transformers 在 meta 设备上搭出来数。"""
    qwen = dict(num_attention_heads=14, num_key_value_heads=2, num_hidden_layers=24, intermediate_size=4864)
    big = dict(num_attention_heads=64, num_key_value_heads=8, num_hidden_layers=80, intermediate_size=29568)
    llama = dict(num_attention_heads=32, num_key_value_heads=8, num_hidden_layers=32, intermediate_size=14336)
    configs = [
        GPT2Config(),
        Qwen2Config(vocab_size=151936, hidden_size=896, tie_word_embeddings=True, **qwen),
        LlamaConfig(vocab_size=128256, hidden_size=4096, tie_word_embeddings=False, **llama),
        Qwen2Config(vocab_size=152064, hidden_size=8192, tie_word_embeddings=False, **big),
    ]
    totals = []
    for config in configs:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        totals.append(model.num_parameters())
    assert totals == [124_439_808, 494_032_768, 8_030_261_248, 72_706_203_648]


# 边界


def test_vocabulary_smaller_than_the_bytes_is_refused():
    with pytest.raises(ValueError, match="放不下 256 个字节"):
        train_bpe("ab", vocab_size=255)
    assert train_bpe("ab", vocab_size=256) == []


def test_incomplete_utf8_becomes_replacement_characters():
    bpe = ByteLevelBPE([])
    ids = bpe.encode("中")
    assert [bpe.decode(ids[:n]) for n in range(4)] == ["", "\ufffd", "\ufffd", "中"]
    library = library_bpe("", 256)
    assert library.decode(ids[:2]) == "\ufffd"


# 被拒绝的错误写法


def reference_training(text, num_merges, *, count="all", replace="disjoint", tie="id", split=True):
    """模板：默认等于被测代码；每个错误写法只改一处。"""
    words = [
        [bytes([b]) for b in word.encode()] for word in (re.findall(GPT2_PATTERN, text) if split else [text])
    ]
    ids = {bytes([b]): i for i, b in enumerate(VISIBLE + HIDDEN)}
    merges = []
    for _ in range(num_merges):
        counts = {}
        for word in words:
            last = {}
            for i, pair in enumerate(itertools.pairwise(word)):
                if count == "disjoint" and last.get(pair) == i - 1:
                    continue
                last[pair] = i
                counts[pair] = counts.get(pair, 0) + 1
        if not counts:
            break
        most = max(counts.values())
        tied = [pair for pair in counts if counts[pair] == most]  # 字典的顺序就是首次出现的顺序
        pair = min(tied, key=lambda p: (ids[p[0]], ids[p[1]])) if tie == "id" else tied[0]
        merges.append(pair)
        ids[pair[0] + pair[1]] = len(ids)
        words = [merge_pair(word, pair) for word in words]
    return merges


def test_the_template_of_the_wrong_trainings_is_right():
    assert reference_training(CORPUS, 100) == library_merges(library_bpe(CORPUS, 356))


@pytest.mark.rejects
def test_counting_pairs_without_overlap_is_rejected():
    """zzzzz 里 (z,z) 计 4 次，不是 2 次：否则出现 3 次的 (a,c) 会先合并。"""
    text = "zzzzz ac ac ac"
    truth = library_merges(library_bpe(text, 258))
    assert train_bpe(text, vocab_size=258) == truth and truth[0] == (b"z", b"z")
    assert reference_training(text, 2, count="disjoint")[0] == (b"a", b"c")


@pytest.mark.rejects
def test_overlapping_replacement_is_rejected():
    """把 aaa 的两处 (a,a) 都合并，会凭空多出一个字节。"""
    tokens, pair, wrong = [b"a"] * 3, (b"a", b"a"), []
    for i in range(2):
        wrong.append(tokens[i] + tokens[i + 1])
    assert b"".join(wrong) != b"aaa"
    assert b"".join(merge_pair(tokens, pair)) == b"aaa"


@pytest.mark.rejects
def test_breaking_ties_by_first_occurrence_is_rejected():
    text = "ba ab"  # (b,a) 先出现，(a,b) 编号小，各一次；空格的编号比字母大
    assert train_bpe(text, vocab_size=257) == library_merges(library_bpe(text, 257)) == [(b"a", b"b")]
    assert reference_training(text, 1, tie="first") == [(b"b", b"a")]


@pytest.mark.rejects
def test_merging_across_pretokens_is_rejected():
    words = [word.encode() for word in pretokenize(CORPUS)]
    wrong = reference_training(CORPUS, 100, split=False)
    assert all(any(a + b in word for word in words) for a, b in train_bpe(CORPUS, vocab_size=356))
    assert sum(not any(a + b in word for word in words) for a, b in wrong) > 5
    without = train_bpe("a b a b", vocab_size=260, pattern=r"[\s\S]+")
    assert (b"a", b" ") in without or (b" ", b"b") in without
    assert tokens_of(ByteLevelBPE(without, pattern=r"[\s\S]+"), "a b a b") != tokens_of(
        ByteLevelBPE(without), "a b a b"
    )


def encode_by_frequency(text, ranks):
    """错误：编码时选这段文本里最频繁的可合并对，而不是秩最小的。"""
    tokens = [bytes([b]) for b in text.encode()]
    while pairs := [p for p in itertools.pairwise(tokens) if p in ranks]:
        tokens = merge_pair(tokens, max(pairs, key=pairs.count))
    return tokens


def encode_longest(text, vocab):
    """错误：从左到右取最长的 token。"""
    raw, tokens = text.encode(), []
    while raw:
        end = max(e for e in range(1, len(raw) + 1) if raw[:e] in vocab)
        tokens.append(raw[:end])
        raw = raw[end:]
    return tokens


@pytest.mark.rejects
def test_encoding_by_frequency_or_by_longest_match_is_rejected():
    """规则依次是 (b,c)、(a,b)。abcabab 里 (a,b) 有三处，(b,c) 只有一处，可是秩更小，要先合。"""
    merges = [(b"b", b"c"), (b"a", b"b")]
    vocab = {chr(c): i for i, c in enumerate(range(97, 101))}
    library = Tokenizer(models.BPE(vocab | {"bc": 4, "ab": 5}, [("b", "c"), ("a", "b")]))
    bpe = ByteLevelBPE(merges)
    truth = [token.encode() for token in library.encode("abcabab").tokens]
    assert tokens_of(bpe, "abcabab") == truth == [b"a", b"bc", b"ab", b"ab"]
    assert encode_by_frequency("abcabab", bpe.ranks) == [b"ab", b"c", b"ab", b"ab"]
    assert encode_longest("abcabab", bpe.ids) == [b"ab", b"c", b"ab", b"ab"]


@pytest.mark.rejects
def test_strict_decoding_token_by_token_is_rejected():
    bpe = ByteLevelBPE(train_bpe(CORPUS, vocab_size=300))
    ids = bpe.encode("没")
    assert len(ids) > 1 and bpe.decode(ids) == "没"
    with pytest.raises(UnicodeDecodeError):
        "".join(bpe.vocab[i].decode("utf-8") for i in ids)
    assert "".join(bpe.decode([i]) for i in ids) != "没"


@pytest.mark.rejects
def test_wordpiece_that_keeps_the_good_pieces_is_rejected():
    """错误：只把拆不动的那一截换成 [UNK]。"""
    vocab = {"play", "##ed"}
    library = models.WordPiece({"[UNK]": 0, "play": 1, "##ed": 2}, unk_token="[UNK]")
    assert wordpiece_encode("playxed", vocab) == [t.value for t in library.tokenize("playxed")] == ["[UNK]"]
    assert wordpiece_encode("played", vocab) == ["play", "##ed"]
