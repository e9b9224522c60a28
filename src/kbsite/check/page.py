"""页面的源文件 → 检查要用的样子：front matter、标题、公式与嵌入各在哪里，以及遮去它们之后的正文。"""

import re
from bisect import bisect_right
from dataclasses import dataclass, field
from functools import cached_property

import yaml

from ..front_matter import PATTERN
from ..pages import INCLUDE

# 正文里被遮住的字符：长度不变，偏移与行号就不变
CODE, MATH, OTHER = "\ue000", "\ue001", "\ue002"

FENCE = re.compile(r"^([ \t]*)(`{3,}|~{3,})([^\n]*)\n(.*?)(?:^[ \t]*\2[`~]*[ \t]*$|\Z)", re.M | re.S)
INLINE = re.compile(
    r"""(?P<escape>\\[\\$`*_<\[\]])
    | (?P<code>(?P<ticks>`+)(?!`)[^\n]*?[^`\n](?P=ticks)(?!`))
    | (?P<display>\$\$.+?\$\$)
    | (?P<math>\$(?![\s$])[^$\n]*?(?<![\s\\])\$(?!\d))
    | (?P<comment><!--.*?-->)
    | (?P<tag></?[A-Za-z][^<>\n]*>)
    | (?P<auto><?https?://[^\s<>）」，。；、)\]]+>?)
    | (?P<target>(?<=\])\([^()\n]*(?:\([^()\n]*\)[^()\n]*)*\))
    | (?P<fill>\{\{[^{}\n]*\}\})
    | (?P<attributes>\{:?[ ]?[.\#\w][^{}\n]*\})
    | (?P<icon>:[a-z0-9]+(?:-[a-z0-9]+)+:)
    | (?P<footnote>\[\^[^\]\n]+\]:?)
    """,
    re.X | re.S,
)
NOT_TOPICS = {"about", "api", "assets"}
MASKS = {"code": CODE, "math": MATH, "display": MATH}
HEADING = re.compile(r"^(#{1,6})[ \t]+(.*?)[ \t]*$", re.M)
BLOCK = re.compile(r"^([ \t]*)(?:!!!|\?\?\?\+?)[ \t]+([\w -]+?)[ \t]*(?:\"(.*)\")?[ \t]*$", re.M)
KEY = re.compile(r"^[\w-]+:[ \t]*['\"]?|['\"][ \t]*$", re.M)


@dataclass(frozen=True)
class Heading:
    level: int
    text: str
    start: int


@dataclass(frozen=True)
class Formula:
    """一个公式：`$` 之间的 TeX，在文件里从哪里开始。"""

    tex: str
    start: int
    display: bool


@dataclass(frozen=True)
class Fence:
    info: str
    body: str
    start: int


@dataclass(frozen=True)
class Page:
    """一个页面。`prose` 与 `text` 等长：代码、公式、标签、链接的目标都遮住了，剩下的就是文字。"""

    path: str
    text: str
    prose: str = field(repr=False)
    formulas: tuple[Formula, ...]
    fences: tuple[Fence, ...]
    codes: tuple[tuple[str, int], ...]
    meta: dict
    meta_error: tuple[int, str] | None
    body: int

    @property
    def key(self) -> str:
        return self.path.removeprefix("docs/").removesuffix(".md")

    @property
    def is_topic(self) -> bool:
        """专题页：按位置认，缺了 answer 才报得出来。"""
        section, _, slug = self.key.partition("/")
        return bool(slug) and slug != "index" and "/" not in slug and section not in NOT_TOPICS

    @cached_property
    def _starts(self) -> list[int]:
        return [0, *(match.end() for match in re.finditer("\n", self.text))]

    def line(self, offset: int) -> int:
        return bisect_right(self._starts, offset)

    def key_line(self, key: str) -> int:
        """front matter 里一个键的行号；没有就是第一行。"""
        match = re.search(rf"^{re.escape(key)}:", self.text[: self.body], re.M)
        return self.line(match.start()) if match else 1

    @cached_property
    def headings(self) -> list[Heading]:
        return [
            Heading(len(match[1]), self.text[match.start(2) : match.end(2)], match.start())
            for match in HEADING.finditer(self.prose, self.body)
        ]

    @cached_property
    def includes(self) -> list[re.Match]:
        return list(INCLUDE.finditer(self.text, self.body))

    def section(self, title: str) -> tuple[int, int] | None:
        """二级标题下的一节：（开始，结束）的偏移。"""
        tops = [heading for heading in self.headings if heading.level <= 2]
        for heading, after in zip(tops, [*tops[1:], None], strict=False):
            if heading.level == 2 and heading.text == title:
                return self.text.find("\n", heading.start) + 1, after.start if after else len(self.text)
        return None


def read_page(path: str, text: str) -> Page:
    """遮住不是文字的部分；`text` 的换行已是 LF。"""
    front = PATTERN.match(text)
    body = front.end() if front else 0
    meta, error = _meta(front[1]) if front else ({}, None)
    masked = list(text)
    fences = []

    def mask(start: int, end: int, char: str) -> None:
        for index in range(start, end):
            if masked[index] != "\n":
                masked[index] = char

    if front:
        mask(0, front.start(1), OTHER)
        mask(front.end(1), body, OTHER)
        for row in re.finditer(r"^.*$", front[1], re.M):
            start, end = row.start() + front.start(1), row.end() + front.start(1)
            if re.match(r"title:|description:|answer:", row[0]):
                for part in KEY.finditer(row[0]):
                    mask(start + part.start(), start + part.end(), OTHER)
            else:
                mask(start, end, OTHER)
    for match in FENCE.finditer(text, body):
        fences.append(Fence(match[3].strip(), match[4], match.start()))
        mask(match.start(), match.end(), CODE)
    visible = "".join(masked)
    formulas, codes = [], []
    for match in INLINE.finditer(visible):
        kind = match.lastgroup if match.lastgroup != "ticks" else "code"
        if kind in ("math", "display"):
            dollars = 2 if kind == "display" else 1
            formulas.append(
                Formula(
                    text[match.start() + dollars : match.end() - dollars],
                    match.start() + dollars,
                    kind == "display",
                )
            )
        elif kind == "code":
            codes.append((match[0].strip("`"), match.start()))
        mask(match.start(), match.end(), MASKS.get(kind, OTHER))
    for match in INCLUDE.finditer(text, body):
        mask(match.start(), match.end(), OTHER)
    for match in BLOCK.finditer(visible, body):
        title = match.start(3) if match[3] is not None else match.end()
        mask(match.end(1), title, OTHER)
        if match[3] is not None:
            mask(match.end(3), match.end(), OTHER)
    for match in re.finditer(r"^[ \t]*\|?[ \t]*:?-{3,}:?[ \t]*\|[-| :\t]*$", visible, re.M):
        mask(match.start(), match.end(), OTHER)
    return Page(path, text, "".join(masked), tuple(formulas), tuple(fences), tuple(codes), meta, error, body)


def _meta(source: str) -> tuple[dict, tuple[int, str] | None]:
    try:
        meta = yaml.safe_load(source)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        return {}, (mark.line + 2 if mark else 1, str(getattr(error, "problem", error)))
    except (ValueError, RecursionError) as error:  # 如 2026-13-40：看着像日期，又不是
        return {}, (1, str(error))
    return (meta, None) if isinstance(meta, dict) else ({}, (2, "不是「键: 值」的列表"))
