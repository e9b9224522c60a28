r"""生成 tokenization.json：tiktoken 用一份给定的合并表编码几段文本的结果。

测试不依赖 tiktoken，所以在外面跑一次，把输入、输出和版本冻结下来。合并表由 tiktoken 自己的教学实现训练：

    python tests/golden/make_tokenization.py
"""

import contextlib
import io
import json
from importlib.metadata import version
from pathlib import Path

import tiktoken
from tiktoken._educational import SimpleBytePairEncoding

PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
CORPUS = (
    "the tokenizer splits the text into tokens, and the tokens are numbers. "
    "分词器把文字切成编号，编号再变成词向量。词表越大，编号越少。 "
    "3 tokens, 33 tokens, 333 tokens; it's the tokenizer's job.\n\n"
)
TEXTS = [
    "the tokens aren't the text",
    "分词器的编号是3333，不是33。",
    "  two spaces\n\tand_a_tab  ",
    "zzz thethethe 编编编 🙂",
    "<|endoftext|>",
    "",
]


def main() -> None:
    """训练、编码，写出 JSON。"""
    with contextlib.redirect_stdout(io.StringIO()):
        trained = SimpleBytePairEncoding.train(CORPUS, vocab_size=330, pat_str=PATTERN)
    ranks = trained.mergeable_ranks
    encoding = tiktoken.Encoding(
        "tiny", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    merges = [token for token, rank in sorted(ranks.items(), key=lambda item: item[1]) if rank >= 256]
    split = []
    for token in merges:  # 一个 token 由它里面秩最大的两段合成
        parts = [bytes([b]) for b in token]
        while len(parts) > 2:
            pair = min(range(len(parts) - 1), key=lambda i: ranks.get(parts[i] + parts[i + 1], 10**9))
            parts[pair : pair + 2] = [parts[pair] + parts[pair + 1]]
        split.append(" ".join(part.hex() for part in parts))
    try:
        encoding.encode("<|endoftext|>")
        refused = False
    except ValueError:
        refused = True
    result = {
        "versions": {"tiktoken": version("tiktoken")},
        "merges": split,
        "texts": TEXTS,
        "tokens": [
            " ".join(
                encoding.decode_single_token_bytes(i).hex()
                for i in encoding.encode(text, disallowed_special=())
            )
            for text in TEXTS
        ],
        "special_text_is_refused_by_default": refused,
        "special_text_as_special": encoding.encode("<|endoftext|>", allowed_special="all") == [len(ranks)],
    }
    path = Path(__file__).with_name("tokenization.json")
    path.write_text(json.dumps(result, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
