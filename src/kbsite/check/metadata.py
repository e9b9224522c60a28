"""KB101 一页四个文件，KB102 元数据，KB106 导航。"""

import datetime
import os
import re
from collections.abc import Iterator
from pathlib import PurePosixPath

from .findings import Finding
from .page import INLINE, Page
from .site import Site

TOPIC = ("title", "description", "tags", "difficulty", "verified", "answer")
OTHER = ("title", "description", "search", "hide")
ANSWER_LIMIT = 60
KEY = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*(/[a-z0-9]+(-[a-z0-9]+)*)*")
# 公式里看不见、读不出的：字体、间距、定界符的大小
SILENT = re.compile(
    r"\\(?:text\w*|math\w+|operatorname\*?|[dt]?frac|left|right|[bB]igg?[lr]?|boldsymbol|q?quad|[,;:! ])(?![A-Za-z])"
)
SYMBOL = re.compile(r"\\[A-Za-z]+|[A-Za-z]|\d+(?:\.\d+)?|[^\s\w{}^_&\\]")
WORD = re.compile(r"[㐀-鿿，。；：、！？（）「」《》“”—…]|[A-Za-z0-9][\w.%+/'-]*")


def findings(site: Site) -> Iterator[Finding]:
    titles: dict[str, str] = {}
    for page in site.pages.values():
        yield from _one_question(page)
        yield from _metadata(page)
        title = page.meta.get("title")
        if isinstance(title, str):
            if title in titles:
                fact = f"标题「{title}」在 {titles[title]} 已经用过"
                yield Finding(page.path, page.key_line("title"), "KB102", fact, "改成能区分两页的标题")
            titles.setdefault(title, page.path)
    yield from _four_files(site)
    yield from _navigation(site)


def answer_length(answer: str) -> int:
    """一句话回答的字数：汉字与标点各算一个，一个词、一个数算一个，公式里每个看得见的符号算一个。"""
    symbols = 0

    def formula(match: re.Match) -> str:
        nonlocal symbols
        if match.lastgroup not in ("math", "display"):
            return match[0].strip("`")
        symbols += len(SYMBOL.findall(SILENT.sub(" ", match[0].strip("$"))))
        return " "

    return len(WORD.findall(INLINE.sub(formula, answer))) + symbols


def _one_question(page: Page) -> Iterator[Finding]:
    if not KEY.fullmatch(page.key):
        yield Finding(
            page.path, 1, "KB101", "文件名不是小写字母、数字与连字符", "改名，如 docs/rl/dr-grpo.md"
        )
    tops = [heading for heading in page.headings if heading.level == 1]
    for heading in tops[1:]:
        yield Finding(
            page.path, page.line(heading.start), "KB101", "一页有两个一级标题", "拆成两页，或改成二级标题"
        )
    if not tops and not page.meta_error:
        yield Finding(page.path, 1, "KB101", "没有一级标题", "front matter 之后写一行「# 标题」")
    title = page.meta.get("title")
    if tops and isinstance(title, str) and tops[0].text != title:
        fact = f"一级标题与 front matter 的 title「{title}」不同"
        yield Finding(page.path, page.line(tops[0].start), "KB101", fact, "改成一样的")


def _metadata(page: Page) -> Iterator[Finding]:
    def finding(key: str, fact: str, cure: str) -> Finding:
        return Finding(page.path, page.key_line(key), "KB102", fact, cure)

    if page.meta_error:
        line, problem = page.meta_error
        cure = "含冒号或反斜杠的值用单引号括起来"
        yield Finding(page.path, line, "KB102", f"front matter 不是合法的 YAML（{problem}）", cure)
        return
    allowed = TOPIC if page.is_topic else OTHER
    for key in page.meta:
        if key not in allowed:
            yield finding(str(key), f"front matter 里没有 {key} 这个键", f"可用的是 {'、'.join(allowed)}")
    for key in TOPIC if page.is_topic else OTHER[:2]:
        if page.meta.get(key) in (None, "", []):
            yield finding(key, f"front matter 缺 {key}", "补上")
    for key in ("title", "description", "answer"):
        value = page.meta.get(key)
        if value is not None and not isinstance(value, str):
            yield finding(key, f"{key} 不是一行文字", "用单引号括起来")
    if not page.is_topic:
        return
    tags = page.meta.get("tags")
    if tags is not None and not (isinstance(tags, list) and all(isinstance(tag, str) for tag in tags)):
        yield finding("tags", "tags 不是词的列表", "写成 tags: [词, 词]；像数字的词加引号")
    difficulty = page.meta.get("difficulty")
    if difficulty is not None and difficulty not in (1, 2, 3, 4, 5):
        yield finding("difficulty", f"difficulty 是 {difficulty!r}", "写 1 到 5 的整数")
    yield from _dates(page, finding)
    answer = page.meta.get("answer")
    if isinstance(answer, str) and (length := answer_length(answer)) > ANSWER_LIMIT:
        yield finding(
            "answer", f"一句话回答有 {length} 字，上限 {ANSWER_LIMIT}", "只留结论，理由移到一分钟回答"
        )


def _dates(page: Page, finding) -> Iterator[Finding]:
    verified = page.meta.get("verified")
    if verified is None:
        return
    if type(verified) is not datetime.date:
        yield finding("verified", f"verified 不是日期：{verified}", "写成 2026-11-24 的样子，不加引号")
        return
    # 机器的钟可能慢：最后一次提交更晚就以它为准；各地的日期差一天
    today = max(
        datetime.date.today(), datetime.date.fromtimestamp(int(os.environ.get("SOURCE_DATE_EPOCH") or 0))
    )
    if verified > today + datetime.timedelta(days=1):
        yield finding("verified", f"verified 是将来的日期 {verified}", "写最后一次对照来源的日期")


def _four_files(site: Site) -> Iterator[Finding]:
    for page in site.topics:
        section, _, slug = page.key.replace("-", "_").partition("/")
        for need in (
            f"notebooks/{section}/{slug}.py",
            f"snippets/{section}/{slug}.py",
            f"tests/snippets/{section}/test_{slug}.py",
        ):
            if not site.exists(need):
                yield Finding(page.path, 1, "KB101", f"没有 {need}", "补上这个文件；四个文件同名")
    for name in site.texts:
        path = PurePosixPath(name)
        if name.startswith("notebooks/") and path.name[0] != "_":
            page = f"docs/{path.parent.relative_to('notebooks')}/{path.stem.replace('_', '-')}.md"
            if not site.exists(page):
                yield Finding(name, 1, "KB101", f"笔记没有页面 {page}", "写这一页，或删去笔记")
        if name.startswith("tests/snippets/") and path.name.startswith("test_") and len(path.parts) == 4:
            snippet = f"snippets/{path.parent.name}/{path.name.removeprefix('test_')}"
            if not site.exists(snippet):
                yield Finding(name, 1, "KB101", f"测试没有对应的 {snippet}", "改名，或删去测试")


def _navigation(site: Site) -> Iterator[Finding]:
    nav = site.nav
    for page in site.pages.values():
        name = page.path.removeprefix("docs/")
        if (times := nav.count(name)) != 1:
            fact = "不在 mkdocs.yml 的导航里" if not times else f"在 mkdocs.yml 的导航里出现 {times} 次"
            yield Finding(page.path, 1, "KB106", fact, "在 nav 它的那一节写一行，只写一次")
    for name in dict.fromkeys(nav):
        if name.endswith(".md") and not site.exists(f"docs/{name}"):
            text = (site.root / "mkdocs.yml").read_text(encoding="utf-8")
            line = text.count("\n", 0, max(text.find(name), 0)) + 1
            yield Finding("mkdocs.yml", line, "KB106", f"导航里的 docs/{name} 不存在", "改路径，或删去这一行")
