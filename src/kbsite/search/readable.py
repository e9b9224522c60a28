r"""公式 → 一行读得出、搜得到的文字：`\frac{QK^\top}{\sqrt{d_k}}` → `QK^⊤/√d_k`。取自 MathJax 写出的 MathML。"""

import re
import xml.etree.ElementTree as ET

MATH = re.compile(r"<math\b.*?</math>", re.S)
# 看不见的运算符：函数作用、乘号、分隔、加号
INVISIBLE = {"\u2061": " ", "\u2062": "", "\u2063": "", "\u2064": ""}
RELATIONS = set("=≠≈≃≅≡≤≥<>≪≫∝∼→←↔↦⇒⇐⇔∈∉⊂⊆")
BIG = set("∑∏∫")
# 帽子、波浪线、横线这些记号不读
ACCENTS = set("^ˆ~˜¯‾ˉ―→⃗.˙¨⏞⏟ˇ")
# 上下标、分式里不用加括号也读得清的内容
SIMPLE = re.compile(r"[\w.⊤∗*′∞√^]+")


def readable(html: str) -> str:
    """排好的公式（含 MathML）→ 一行文字；没有 MathML 就是空串。"""
    math = MATH.search(html)
    text = re.sub(r"\s+", " ", _text(ET.fromstring(math[0]))) if math else ""
    return re.sub(r"(?<=\w) (?=\()", "", text).strip()


def _text(node: ET.Element) -> str:
    """一个 MathML 元素的文字。"""
    name = node.tag.rpartition("}")[2]
    children = [_text(child) for child in node]
    match name, children:
        case "mi" | "mn" | "mo" | "mtext" | "ms", _:
            return _token(name, (node.text or "").replace("\xa0", " "))
        case "mfrac", [top, bottom]:
            return f"{_group(top)}/{_group(bottom)}"
        case "msqrt", _:
            return "√" + _group("".join(children))
        case "mroot", [base, degree]:
            return f"{_group(base)}^(1/{degree})"
        case "msub" | "munder", [base, low]:
            return _scripts(base, low, "")
        case "msup" | "mover", [base, high]:
            return _scripts(base, "", high)
        case "msubsup" | "munderover", [base, low, high]:
            return _scripts(base, low, high)
        case "mtr", _:
            return " ".join(children)
        case "mtable", _:
            return "; ".join(children)
        case "mphantom" | "annotation", _:
            return ""
        case "mspace", _:
            return " "
    return "".join(children)


def _token(name: str, text: str) -> str:
    text = INVISIBLE.get(text, text)
    if name == "mo" and text in RELATIONS:
        return f" {text} "
    if name == "mo" and text in {",", ";", ":"}:
        return f"{text} "
    # 函数名（log、exp）与前面的字母分开
    return f" {text}" if name == "mi" and len(text) > 1 else text


def _scripts(base: str, low: str, high: str) -> str:
    low, high = low.strip(), high.strip()
    if high in ACCENTS:
        high = ""
    if low in ACCENTS:
        low = ""
    return (
        base
        + (f"_{_group(low)}" if low else "")
        + (f"^{_group(high)}" if high else "")
        + (" " if base in BIG else "")
    )


def _group(text: str) -> str:
    text = text.strip()
    return text if SIMPLE.fullmatch(text) or _bracketed(text) else f"({text})"


def _bracketed(text: str) -> bool:
    return text.startswith("(") and text.endswith(")") and "(" not in text[1:] and ")" not in text[:-1]
