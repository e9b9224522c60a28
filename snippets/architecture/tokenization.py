r"""字节级 BPE 的训练、编码与解码，WordPiece 的最长匹配，Unigram 的 Viterbi，以及每字节比特数。

页面：docs/architecture/tokenization.md

不包含：WordPiece 与 Unigram 的训练、特殊 token、归一化（NFC 等）、增量更新计数的快速实现。

token 在这里就是 `bytes`，编号是它在词表里的位置。前 256 个编号按 GPT-2 的字节顺序：先是可见字符 `!`–`~`、`¡`–`¬`、`®`–`ÿ`，
再是其余字节。两个库都用这个顺序，频次并列时「编号小的一对优先」才有相同的含义。

计数与合并是两回事：`aaa` 里相邻对 (a, a) 计 2 次（Sennrich 等的算法 1 与 tokenizers 都如此），合并却只发生一次，
从左到右、不重叠。

References:
    Sennrich et al. 2016, §3.2、算法 1，https://arxiv.org/abs/1508.07909
    Kudo 2018, §3.2，https://arxiv.org/abs/1804.10959
    tokenizers 0.23.3：`models.BPE`、`models.WordPiece`、`models.Unigram`、`trainers.BpeTrainer`。
"""

import math
import re
from collections import Counter
from collections.abc import Mapping, Sequence, Set

__all__ = [
    "BYTE_ORDER",
    "GPT2_PATTERN",
    "pretokenize",
    "merge_pair",
    "train_bpe",
    "ByteLevelBPE",
    "wordpiece_encode",
    "unigram_viterbi",
    "bits_per_byte",
]

_VISIBLE = [*range(33, 127), *range(161, 173), *range(174, 256)]
BYTE_ORDER = _VISIBLE + [b for b in range(256) if b not in _VISIBLE]
"""256 个字节在词表里的顺序，与 GPT-2 相同。"""

GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?[^\W\d_]+| ?\d+| ?(?:[^\s\w]|_)+|\s+(?!\S)|\s+"
r"""GPT-2 的预切分，用标准库 `re` 写：`[^\W\d_]` 代替 `\p{L}`，`\d` 代替 `\p{N}`（² 一类的数字因此归入字母）。"""


# --8<-- [start:merge]
def pretokenize(text: str, *, pattern: str = GPT2_PATTERN) -> list[str]:
    """预切分：按正则切成段，合并不会跨段；各段相连就是原文。

    Args:
        text: 原文。
        pattern: 正则，要能匹配每一个字符，且没有捕获组。

    Returns:
        各段文本。
    """
    return re.findall(pattern, text)


def merge_pair(tokens: Sequence[bytes], pair: tuple[bytes, bytes]) -> list[bytes]:
    """从左到右、不重叠地把相邻的 `pair` 换成一个 token。

    Args:
        tokens: 一段的 token。
        pair: 要合并的一对。

    Returns:
        合并之后的 token。
    """
    merged, i = [], 0
    while i < len(tokens):
        if tuple(tokens[i : i + 2]) == pair:
            merged.append(pair[0] + pair[1])
            i += 2
        else:
            merged.append(tokens[i])
            i += 1
    return merged


# --8<-- [end:merge]


# --8<-- [start:train]
def train_bpe(text: str, *, vocab_size: int, pattern: str = GPT2_PATTERN) -> list[tuple[bytes, bytes]]:
    r"""训练：反复合并最频繁的相邻对，直到词表有 `vocab_size` 个 token，或没有对可合。

    注意：频次并列时取编号小的一对。

    Args:
        text: 语料。
        vocab_size: 词表大小，含 256 个字节。
        pattern: 预切分的正则。

    Returns:
        按先后排列的合并规则，下标就是秩（rank）。

    References:
        tokenizers 0.23.3 `BpeTrainer`（规则逐条相同）。
    """
    if vocab_size < 256:
        raise ValueError(f"vocab_size={vocab_size} 放不下 256 个字节；请取 256 以上")
    words = Counter(pretokenize(text, pattern=pattern))
    split = {word: [bytes([b]) for b in word.encode()] for word in words}
    ids = {bytes([b]): i for i, b in enumerate(BYTE_ORDER)}
    merges = []
    while len(ids) < vocab_size:
        counts = Counter()
        for word, count in words.items():
            for pair in zip(split[word], split[word][1:], strict=False):
                counts[pair] += count  # aaa 里的 (a, a) 计两次
        if not counts:
            break
        pair = min(counts, key=lambda p: (-counts[p], ids[p[0]], ids[p[1]]))
        merges.append(pair)
        ids[pair[0] + pair[1]] = len(ids)
        split = {word: merge_pair(tokens, pair) for word, tokens in split.items()}
    return merges


# --8<-- [end:train]


# --8<-- [start:bpe]
class ByteLevelBPE:
    """字节级 BPE 的编码与解码。

    Args:
        merges: `train_bpe` 的合并规则。
        pattern: 预切分的正则，必须与训练时相同。
    """

    def __init__(self, merges: Sequence[tuple[bytes, bytes]], *, pattern: str = GPT2_PATTERN):
        self.pattern = pattern
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.vocab = [bytes([b]) for b in BYTE_ORDER] + [left + right for left, right in merges]
        self.ids = {token: i for i, token in enumerate(self.vocab)}

    def encode(self, text: str) -> list[int]:
        """每一段里反复合并秩最小的相邻对，直到没有规则可用。

        Args:
            text: 原文；特殊 token 的字面文本按普通文本处理。

        Returns:
            token 编号。
        """
        ids = []
        for word in pretokenize(text, pattern=self.pattern):
            tokens = [bytes([b]) for b in word.encode()]
            while pairs := self.ranks.keys() & set(zip(tokens, tokens[1:], strict=False)):
                tokens = merge_pair(tokens, min(pairs, key=self.ranks.__getitem__))
            ids += [self.ids[token] for token in tokens]
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """先拼字节，再整体按 UTF-8 解码；残缺的字节换成 U+FFFD。

        Args:
            ids: token 编号。

        Returns:
            文本。
        """
        return b"".join(self.vocab[i] for i in ids).decode("utf-8", errors="replace")


# --8<-- [end:bpe]


# --8<-- [start:wordpiece]
def wordpiece_encode(
    word: str, vocab: Set[str], *, unk_token: str = "[UNK]", prefix: str = "##", max_chars: int = 100
) -> list[str]:
    """WordPiece：每一步取词表里最长的前缀；有一步取不到，整个词就是 `unk_token`。

    Args:
        word: 预切分之后的一个词。
        vocab: 词表；词中的 token 带 `prefix`。
        unk_token: 未知词的 token。
        prefix: 接续前缀。
        max_chars: 超过这么多字符的词直接算未知。

    Returns:
        token 序列。

    References:
        tokenizers 0.23.3 `models.WordPiece`（相同）。
    """
    if len(word) > max_chars:
        return [unk_token]
    tokens, start = [], 0
    while start < len(word):
        head = prefix if start else ""
        ends = [e for e in range(len(word), start, -1) if head + word[start:e] in vocab]
        if not ends:
            return [unk_token]
        tokens.append(head + word[start : ends[0]])
        start = ends[0]
    return tokens


# --8<-- [end:wordpiece]


# --8<-- [start:viterbi]
def unigram_viterbi(text: str, log_probs: Mapping[str, float]) -> tuple[list[str], float]:
    r"""Unigram：用动态规划求 $\sum_i\log p(x_i)$ 最大的切法。

    $$
    \text{best}(e)=\max_{s<e}\;\text{best}(s)+\log p(x_{s:e})
    $$

    注意：词表里没有的单个字符，按最小的对数概率再减 10 计，所以总有一种切法。

    Args:
        text: 一段文本。
        log_probs: 每个 token 的对数概率（奈特）。

    Returns:
        token 序列与它的对数概率。

    References:
        tokenizers 0.23.3 `models.Unigram`（切法相同，但它把相连的未知字符并成一个）。
    """
    unknown = min(log_probs.values()) - 10.0
    best, back = [0.0], [0]
    for end in range(1, len(text) + 1):
        scores = {}
        for start in range(end):
            missing = unknown if start == end - 1 else -math.inf
            scores[start] = best[start] + log_probs.get(text[start:end], missing)
        back.append(max(scores, key=scores.__getitem__))
        best.append(scores[back[end]])
    tokens, end = [], len(text)
    while end:
        tokens.append(text[back[end] : end])
        end = back[end]
    return tokens[::-1], best[-1]


# --8<-- [end:viterbi]


def bits_per_byte(nll: float, *, num_bytes: int) -> float:
    r"""每字节比特数：整段文本的负对数似然除以 UTF-8 字节数，分母与分词器无关。

    $$
    \text{bpb}=\frac{-\sum_t\ln p(x_t\mid x_{<t})}{N_{\text{byte}}\ln 2}
    $$

    Args:
        nll: 所有 token 的负对数似然之和（奈特），不是平均。
        num_bytes: 原文的 UTF-8 字节数。

    Returns:
        比特每字节。
    """
    return nll / (num_bytes * math.log(2))
