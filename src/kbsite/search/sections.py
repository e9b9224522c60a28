"""网页正文 → 供检索的各节：标题、正文、代码分开。"""

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

HEADINGS = {"h1", "h2", "h3"}
SKIPPED = {"script", "style", "svg", "template"}
# 前后有空隙的元素：里面的字不与外面的连成一个词
INLINE = {"a", "abbr", "b", "code", "em", "i", "mark", "span", "strong", "sub", "sup", "kbd", "small"}
VOID = {"br", "hr", "img", "input", "link", "meta", "source", "wbr", "col"}


@dataclass
class Section:
    """一节；`anchor` 空的是页面自己。`level` 是标题的级别，追问算 4。"""

    anchor: str = ""
    level: int = 1
    title: str = ""
    prose: str = ""
    code: str = ""


@dataclass
class SearchPage:
    """一页：地址、题目、标签、权重（front matter 的 search.boost）与各节。"""

    url: str
    title: str
    tags: list[str] = field(default_factory=list)
    boost: float = 1.0
    sections: list[Section] = field(default_factory=list)


def cut(html: str, title: str) -> list[Section]:
    """按标题与追问（`details.question`）切开；标了 `data-search-exclude` 的元素连同里面的不要。"""
    parser = _Cutter(title)
    parser.feed(html)
    parser.close()
    return [
        Section(part.anchor, part.level, _tidy(part.title), _tidy(part.prose), _tidy(part.code))
        for part in parser.sections
    ]


class _Cutter(HTMLParser):
    def __init__(self, title: str):
        super().__init__()
        self.sections = [Section(title=title)]
        self._open: list[tuple[str, str]] = []  # （标签，角色）：skip、code、title、question、""
        self._outer: list[Section] = []  # 追问所在的节
        self._current = self.sections[0]

    def handle_starttag(self, tag, attrs):
        if tag in VOID:
            self._add(" ")
            return
        attributes = dict(attrs)
        role = ""
        if (
            tag in SKIPPED
            or "data-search-exclude" in attributes
            or "headerlink" in (attributes.get("class") or "")
        ):
            role = "skip"
        elif tag == "pre":
            role = "code"
        elif tag in HEADINGS and attributes.get("id"):
            role = "title"
            if tag != "h1":  # 一级标题就是页面自己
                self._start(attributes["id"], int(tag[1]))
        elif tag == "details" and attributes.get("id"):
            role = "question"
            self._outer.append(self._current)
            self._start(attributes["id"], 4)
        elif tag == "summary" and self._open and self._open[-1][1] == "question":
            role = "title"
        self._open.append((tag, role))
        if tag not in INLINE:
            self._add(" ")

    def handle_endtag(self, tag):
        if not any(name == tag for name, _ in self._open):
            return
        while self._open:
            name, role = self._open.pop()
            if role == "question":
                self._current = self._outer.pop()
            if name == tag:
                break
        if tag not in INLINE:
            self._add(" ")

    def handle_data(self, data):
        self._add(data)

    def _start(self, anchor: str, level: int):
        self._current = Section(anchor, level)
        self.sections.append(self._current)

    def _add(self, text: str):
        roles = {role for _, role in self._open}
        if "skip" in roles:
            return
        if "title" in roles:
            # 一级标题与 front matter 的题目是同一个，不再记一次
            if self._current is not self.sections[0]:
                self._current.title += text
        elif "code" in roles:
            self._current.code += text
        else:
            self._current.prose += text


def _tidy(text: str) -> str:
    text = re.sub(r"\s+", " ", text.replace("\u200b", "")).strip()
    # 块与块之间留的空格，落在中文标点与汉字之间就是多余的
    return re.sub(r"(?<=[\u3000-\u303f\uff00-\uffef]) | (?=[\u3000-\u303f\uff01-\uff0f])", "", text)
