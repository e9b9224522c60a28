"""KB303 公式，KB304 的符号。排版本身的错误由构建报；这里不用 Node，先指出最常见的。"""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

from .findings import Finding
from .page import MATH, Page
from .site import Site

COMMAND = re.compile(r"\\([A-Za-z]+)")
# 里面是文字或名字的命令：参数里的字母不是变量
WORDS = re.compile(
    r"\\(?:text\w*|math(?:rm|sf|tt|it|bf|cal|bb)|operatorname\*?|begin|end|tag|mbox)\s*\{[^{}]*\}"
)
ENVIRONMENT = re.compile(r"\\(begin|end)\s*\{([^{}]*)\}")
# 三个以上小写字母、有元音，就是词而不是几个变量相乘
WORD = re.compile(r"(?<![A-Za-z])(?:(?=[a-z]*[aeiou])[a-z]{3,}|std|KL|SFT|PPO|DPO|MLP|MSE)(?![A-Za-z])")
HAN = re.compile(r"[㐀-鿿，。；：、（）]+")
# 符号表里「不用的写法」一节的行：| `写法` | 改成 |
AVOIDED = re.compile(r"^\|[ \t]*`([^`\n]+)`[ \t]*\|[ \t]*([^|\n]+?)[ \t]*\|[ \t]*$", re.M)


@cache
def macros() -> frozenset[str]:
    """构建所装的 MathJax 包认得的命令；有测试与 MathJax 自己的表比较。"""
    return frozenset(Path(__file__).with_name("macros.txt").read_text(encoding="utf-8").split())


def findings(site: Site) -> Iterator[Finding]:
    table = (
        site.texts.get("docs/about/symbols.md", "").partition("\n## 不用的写法\n")[2].partition("\n## ")[0]
    )
    avoided = [(_squeezed(match[1]), match[1], match[2]) for match in AVOIDED.finditer(table)]
    for page in site.pages.values():
        yield from _places(page)
        for formula in page.formulas:
            line = page.line(formula.start)
            for fact, cure in _faults(formula.tex):
                yield Finding(page.path, line, "KB303", fact, cure)
            squeezed = _squeezed(formula.tex)
            for form, shown, cure in avoided:
                if form in squeezed:
                    yield Finding(page.path, line, "KB304", f"公式里有 {shown}", f"写 {cure}（符号表）")


def _places(page: Page) -> Iterator[Finding]:
    for heading in page.headings:
        end = page.text.find("\n", heading.start)
        if MATH in page.prose[heading.start : end if end >= 0 else None]:
            line = page.line(heading.start)
            yield Finding(page.path, line, "KB303", "标题里有公式", "用文字说，如「除以根号 d」")
    for match in re.finditer(r"\$", page.prose):
        cure = "公式写成 $…$，里面不以空格开头或结尾；真的美元号写 \\$"
        yield Finding(page.path, page.line(match.start()), "KB303", "落单的 $", cure)
    for formula in page.formulas:
        row = page.text[page.text.rfind("\n", 0, formula.start) + 1 : formula.start]
        if not formula.display and row.lstrip().startswith("|") and "|" in formula.tex:
            cure = "写 \\lvert、\\rvert、\\mid 或 \\Vert"
            line = page.line(formula.start)
            yield Finding(page.path, line, "KB303", "表格里的公式有竖线，会切开表格", cure)


def _faults(tex: str) -> Iterator[tuple[str, str]]:
    for name in dict.fromkeys(COMMAND.findall(tex)):
        if name not in macros():
            yield f"公式里的 \\{name} 没有定义", "改成 base、ams、boldsymbol、cancel 里有的命令；不能定义宏"
    plain = re.sub(r"\\[\\{}]", "", tex)
    if plain.count("{") != plain.count("}"):
        yield f"公式里的花括号不配对：{_short(tex)}", "补上或删去一个"
    opened = []
    for kind, name in ENVIRONMENT.findall(tex):
        if kind == "begin":
            opened.append(name)
        elif not opened or opened.pop() != name:
            yield f"公式里的 \\end{{{name}}} 没有对应的 \\begin", "成对地写"
    for name in opened:
        yield f"公式里的 \\begin{{{name}}} 没有结束", "成对地写"
    letters = COMMAND.sub(" ", WORDS.sub(" ", tex))
    for word in dict.fromkeys(WORD.findall(letters)):
        yield (
            f"公式里的词 {word} 会排成几个变量相乘",
            f"写 \\text{{{word}}}；函数名写 \\operatorname{{{word}}}",
        )
    if match := HAN.search(letters):
        yield f"公式里的「{match[0]}」不在 \\text{{}} 里", "移到公式外面，或放进 \\text{}"


def _squeezed(tex: str) -> str:
    return re.sub(r"\s+", "", tex)


def _short(tex: str) -> str:
    return re.sub(r"\s+", " ", tex).strip()[:40]
