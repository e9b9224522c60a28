"""在 HTML 里找公式、换公式。公式由 pymdownx.arithmatex（generic）标出；笔记页的 `$…$` 先转成同样的标记。"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from html import escape, unescape

# 公式里的 < 都写成 &lt;，所以不必跨过标签去找结尾：没有结尾的记号也只读一遍
ARITHMATEX = re.compile(r"<(span|div) class=\"arithmatex\">([^<]*)</\1>")
# 笔记页里不动的部分：标签、代码、脚本、样式、SVG、已经标好的公式
OPAQUE = re.compile(r"<(pre|code|script|style|svg|textarea)\b.*?</\1>|<!--.*?-->|<[^>]*>", re.S | re.I)
DOLLARS = re.compile(r"\$\$(.+?)\$\$|(?<![\\$\w])\$(?!\s)([^$]+?)(?<!\s)\$(?![\w$])", re.S)


@dataclass(frozen=True)
class Formula:
    """一个公式：TeX 源码，是否独立成行。"""

    tex: str
    display: bool


def formulas(html: str) -> Iterator[Formula]:
    """页面里的公式，按出现的顺序。"""
    for match in ARITHMATEX.finditer(html):
        yield _formula(match[2])


def replace(html: str, render: Callable[[Formula], str]) -> str:
    """把每个公式换成 `render` 给出的 HTML。"""
    return ARITHMATEX.sub(lambda match: render(_formula(match[2])), html)


def mark_dollars(html: str) -> str:
    """把正文里的 `$…$`、`$$…$$` 标成 arithmatex 的样子；代码里的不动。"""
    parts = []
    end = 0
    for opaque in OPAQUE.finditer(html):
        parts += [DOLLARS.sub(_mark, html[end : opaque.start()]), opaque[0]]
        end = opaque.end()
    return "".join([*parts, DOLLARS.sub(_mark, html[end:])])


def _mark(match: re.Match) -> str:
    if match[1]:
        return f'<span class="arithmatex">\\[{match[1]}\\]</span>'
    return f'<span class="arithmatex">\\({match[2]}\\)</span>'


def _formula(content: str) -> Formula:
    # 一次 unescape：arithmatex 与 nbconvert 都只转义一层
    tex = unescape(content).strip()
    return Formula(tex[2:-2].strip(), display=tex.startswith("\\["))


def attribute(text: str) -> str:
    """可以放进双引号属性的文本。"""
    return escape(text, quote=True).replace("\n", " ")
