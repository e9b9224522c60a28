r"""基于规则的奖励：格式、答案抽取、答案等价、语言一致性，以及它们相加的 R1-Zero 奖励。

页面：docs/reasoning/rule-based-reward.md

不包含：代码题的编译与测试用例、符号代数（根号、含未知数的式子、区间与集合的等价）、单位换算、奖励模型。
只用标准库：不调用 eval 或 sympify，模型写出的文本只被匹配，不被执行。

两边都能精确解析成有理数才比数值，否则只比整理过空白与 LaTeX 排版的字符串：写法不同而代数上相等的式子会被判错（假阴性）。

References:
    DeepSeek-R1 v2，式 4（准确性加格式，等权）与式 7（语言一致性），https://arxiv.org/abs/2501.12948
    DAPO 式 7（对为 1、错为 -1），https://arxiv.org/abs/2503.14476
"""

import re
from fractions import Fraction

__all__ = [
    "format_reward",
    "extract_boxed",
    "answers_equal",
    "accuracy_reward",
    "language_consistency_reward",
    "rule_reward",
]

# --8<-- [start:format_reward]
_BODY = r"(?:(?!</?(?:think|answer)>).)+?"  # 任意文字，但不许再出现四个标签
_FORMAT = re.compile(rf"\s*<think>({_BODY})</think>\s*<answer>({_BODY})</answer>\s*", re.DOTALL)


def format_reward(response: str) -> float:
    r"""格式奖励：整条回答恰好是一个非空思考块接一个非空答案块，得 1，否则 0。

    注意：用 fullmatch 且标签各出现一次；不看思考写了什么，一个句点也算非空。

    Args:
        response: 模型的整条回答。

    Returns:
        1.0 或 0.0。

    References:
        R1 表 1 的模板。TRL 1.16 `think_format_reward` 只查 think，不要求答案标签，允许空思考。
    """
    match = _FORMAT.fullmatch(response)
    return float(match is not None and all(block.strip() for block in match.groups()))


# --8<-- [end:format_reward]


def _boxes(text: str) -> list[str | None]:
    r"""依次取出每个 \boxed{...} 的内容，没闭合的记为 None；转义的括号不计数，一遍扫完。"""
    contents, opened = [], []  # opened：还没闭合的左括号；是框就记（序号, 起点），否则记 None
    for token in re.finditer(r"\\boxed\s*\{|\\[^\\]|\\\\(?!boxed\s*\{)|[{}]", text):
        if token.group().startswith(r"\boxed"):
            opened.append((len(contents), token.end()))
            contents.append(None)
        elif token.group() == "{":
            opened.append(None)
        elif token.group() == "}" and opened and (box := opened.pop()):
            contents[box[0]] = text[box[1] : token.start()].strip()
    return contents


def extract_boxed(text: str) -> str | None:
    r"""取最后一个 \boxed{...} 的内容，花括号可以嵌套。

    注意：最后一个框没有闭合（回答被截断）时返回 None，不退回前面的框。不认 \fbox 与不带花括号的 \boxed。

    Args:
        text: 任意文本。

    Returns:
        框里的文字，或 None。
    """
    return (_boxes(text) or [None])[-1]


# --8<-- [start:answers_equal]
_DIGITS = r"(?:[0-9]{1,3}(?:,[0-9]{3})+|[0-9]+)"  # 千分位必须三位一组
_NUMBER = rf"(?:{_DIGITS}(?:\.[0-9]*)?|\.[0-9]+)"
_RATIO = re.compile(
    rf"(?P<sign>[+-]?)(?:(?P<top>{_NUMBER})(?:/(?P<bottom>{_NUMBER}))?"
    rf"|\\frac\{{(?P<num>[+-]?{_NUMBER})\}}\{{(?P<den>[+-]?{_NUMBER})\}}|\\frac(?P<short>[0-9]{{2}}))"
    r"(?P<percent>%?)"
)


def _tidy(answer: str) -> str:
    text = answer.strip().strip("$").replace("\u2212", "-").replace(r"\%", "%").replace("{,}", ",")
    text = re.sub(r"\\(?:left|right|displaystyle)(?![A-Za-z])|\\[!,]", "", text)
    text = re.sub(r"(?:\\[;:]|\s)+", " ", text)  # 先并成一个空格，下一行才不会在长空白上变慢
    text = re.sub(r"\\[dt]frac(?![A-Za-z])", r"\\frac", text)
    return re.sub(r" ?([-+*/=(),%\[\]{}]) ?", r"\1", text).strip()


def _parse_number(answer: str) -> Fraction | None:
    """精确的有理数；认不出返回 None。不收科学计数法：1e9999999 会把进程卡住。"""
    text = _tidy(answer)
    match = _RATIO.fullmatch(text) if len(text) <= 200 else None  # 超长的数字只按字面比
    if match is None:
        return None
    top, bottom = match["short"] or (match["top"] or match["num"], match["bottom"] or match["den"] or "1")
    denominator = Fraction(bottom.replace(",", ""))
    if denominator == 0:
        return None
    value = Fraction(top.replace(",", "")) / denominator / (100 if match["percent"] else 1)
    return -value if match["sign"] == "-" else value


def answers_equal(answer: str, gold: str) -> bool:
    r"""两个答案是否等价：都是数就比精确的有理数，否则比整理后的字符串。

    注意：认得整数、小数、千分位、百分数、`a/b`、`\frac{a}{b}`、`\frac12`；不做近似（0.333 不等于 1/3）与代数（x+1 不等于 1+x），不认带分数、单位。

    Args:
        answer: 模型的答案。
        gold: 标准答案。

    Returns:
        是否等价。
    """
    numbers = _parse_number(answer), _parse_number(gold)
    if None in numbers:
        return _tidy(answer) == _tidy(gold) != ""
    return numbers[0] == numbers[1]


# --8<-- [end:answers_equal]


# --8<-- [start:accuracy_reward]
def accuracy_reward(response: str, gold: str) -> float:
    r"""准确性奖励：思考之后的部分里，各个框的答案一致且等于标准答案，得 1，否则 0。

    注意：框住几个不同的答案得 0；思考里的框不算，开了 think 却没有闭合就没有答案，得 0；没有框得 0。

    Args:
        response: 模型的整条回答。
        gold: 标准答案，不带 \boxed。

    Returns:
        1.0 或 0.0；DAPO 式 7 的 ±1 是它的 2 倍减 1。
    """
    final = response.rpartition("</think>")[2]
    contents = [] if "<think>" in final else _boxes(final)
    return float(bool(contents) and all(c is not None and answers_equal(c, gold) for c in contents))


def rule_reward(response: str, gold: str) -> float:
    r"""R1-Zero 的奖励：准确性加格式，等权，取值 0、1、2。

    $$R_{\text{rule}}=R_{\text{acc}}+R_{\text{format}}$$

    Args:
        response: 模型的整条回答。
        gold: 标准答案。

    Returns:
        两项之和（R1 v2 式 4）。
    """
    return accuracy_reward(response, gold) + format_reward(response)


# --8<-- [end:accuracy_reward]


# --8<-- [start:language_consistency_reward]
_MATH = re.compile(
    r"\$\$.*?\$\$|\$.*?\$|\\\((?:(?!\\\().)*?\\\)|\\\[(?:(?!\\\[).)*?\\\]|\\[A-Za-z]+", re.DOTALL
)
_WORDS = {"zh": r"[\u3400-\u4dbf\u4e00-\u9fff]", "en": r"[A-Za-z]+(?:['’][A-Za-z]+)*"}


def language_consistency_reward(thinking: str, *, target: str) -> float:
    r"""语言一致性：目标语言的词数除以总词数，在 0 与 1 之间。

    $$R_{\text{language}}=\frac{\text{Num}(\text{Words}_{\text{target}})}{\text{Num}(\text{Words})}$$

    注意：论文没有给分词方法，这里一个汉字算一词、一串拉丁字母算一词，公式不计；别的文字不计。没有词时取 0。

    Args:
        thinking: 思考部分的文字（论文算的是思维链）。
        target: 目标语言，"zh" 或 "en"。

    Returns:
        比例（R1 v2 式 7）。
    """
    if target not in _WORDS:
        raise ValueError(f"target={target!r}：只认 zh 与 en。")
    prose = _MATH.sub(" ", thinking)
    counts = {language: len(re.findall(pattern, prose)) for language, pattern in _WORDS.items()}
    total = sum(counts.values())
    return counts[target] / total if total else 0.0


# --8<-- [end:language_consistency_reward]
