"""KB103 顺序，KB104 深度，KB105 没有写完的标记。"""

import re
from collections.abc import Iterator

from .findings import Finding
from .page import OTHER, Page
from .site import Site

SECTIONS = ["一分钟回答", "推导", "跑给你看", "手撕", "易错点", "连环追问", "争议与更新", "来源"]
ANSWER = re.compile(r"^!!! abstract \"一句话回答\"\n[ \t]+\{\{ answer \}\}[ \t]*$", re.M)
QUESTION = re.compile(r"^\?\?\?\+? question \"[^\n]*\n", re.M)
FOLD = re.compile(r"([ \t]*)\?\?\?")
ITEM = re.compile(r"^(?:[-*+]|\d+[.)])[ \t]", re.M)
# 易错点的一条：小标题，或以粗体的错误说法开头的一段
MISTAKE = re.compile(r"^(?:###[ \t]|(?:[-*+][ \t]+)?\*\*)", re.M)
HAN = re.compile(r"[㐀-鿿]")
HAN_LIMITS = (900, 2500)
UNFINISHED = re.compile(r"【待写|待补|(?<![A-Za-z0-9_])(?:TODO|FIXME|XXX|TBD)(?![A-Za-z0-9_])")
COMMENT = re.compile(r"#.*|【待写")


def findings(site: Site) -> Iterator[Finding]:
    for page in site.pages.values():
        yield from _unfinished(page)
    for page in site.topics:
        if not page.meta_error:
            yield from _order(page)
            yield from _depth(page)
    for name, text in site.texts.items():
        if name.endswith(".py"):
            for number, row in enumerate(text.split("\n"), 1):
                if (comment := COMMENT.search(row)) and (match := UNFINISHED.search(row, comment.start())):
                    yield _marker(name, number, match[0])


def _unfinished(page: Page) -> Iterator[Finding]:
    # 标签一行在 prose 里遮住了，所以 front matter 看原文
    for match in UNFINISHED.finditer(page.text[: page.body] + page.prose[page.body :]):
        yield _marker(page.path, page.line(match.start()), match[0])


def _marker(path: str, line: int, word: str) -> Finding:
    return Finding(path, line, "KB105", f"有没写完的标记 {word}", "写完再提交")


def _order(page: Page) -> Iterator[Finding]:
    headings = [heading for heading in page.headings if heading.level == 2]
    names = [heading.text for heading in headings]
    if names != SECTIONS:
        fact, line = _difference(names)
        where = page.line(headings[min(line, len(headings) - 1)].start) if headings else 1
        yield Finding(page.path, where, "KB103", fact, f"二级标题依次是：{'、'.join(SECTIONS)}")
    first = headings[0].start if headings else len(page.text)
    if not ANSWER.search(page.text[:first]):
        line = page.line(page.headings[0].start) if page.headings else 1
        cure = '标题之后写 !!! abstract "一句话回答"，下一行缩进四格写 {{ answer }}'
        yield Finding(page.path, line, "KB103", "标题之后没有「一句话回答」", cure)


def _difference(names: list[str]) -> tuple[str, int]:
    """第一处不同：事实，与它是第几个二级标题。"""
    for number, (name, expected) in enumerate(zip(names, SECTIONS, strict=False)):
        if name == expected:
            continue
        if name not in SECTIONS:
            return f"二级标题「{name}」不在规定的顺序里", number
        if expected not in names:
            return f"「{name}」之前缺「{expected}」", number
        return f"这里是「{name}」，应当是「{expected}」", number
    if len(names) > len(SECTIONS):
        return f"多出二级标题「{names[len(SECTIONS)]}」", len(SECTIONS)
    return f"缺「{SECTIONS[len(names)]}」", len(names) - 1


def _depth(page: Page) -> Iterator[Finding]:
    def at_least(title: str, pattern: re.Pattern, number: int, what: str) -> Iterator[Finding]:
        if section := page.section(title):
            found = len(pattern.findall(page.text[section[0] : section[1]]))
            if found < number:
                line = page.line(section[0] - 1)
                yield Finding(
                    page.path, line, "KB104", f"「{title}」里只有 {found} {what}", f"至少写 {number} {what}"
                )

    yield from at_least("连环追问", QUESTION, 3, '个追问（??? question "…"）')
    yield from at_least("来源", ITEM, 2, "条来源（列表项）")
    yield from at_least("易错点", MISTAKE, 2, "条（小标题，或粗体开头的一段）")
    for match in QUESTION.finditer(page.text, page.body):
        if not re.match(r"(?:[ \t]*\n)*(?: {4}|\t)[ \t]*\S", page.text[match.end() :]):
            line = page.line(match.start())
            yield Finding(page.path, line, "KB104", "追问没有答案", "在下面缩进四格写答案")
    length = han_outside_folds(page)
    low, high = HAN_LIMITS
    if page.section("来源") and not low <= length <= high:
        cure = "次要的推导、代码放进折叠块或删去" if length > high else "把推导与读出的结论写完整"
        yield Finding(page.path, 1, "KB104", f"折叠与来源之外有 {length} 个汉字，应在 {low}–{high}", cure)


def han_outside_folds(page: Page) -> int:
    """折叠块与「来源」之外的汉字；公式、代码、字母不算。"""
    sources = page.section("来源")
    end = sources[0] if sources else len(page.text)
    count, fold = 0, None
    rows = zip(page.text[page.body : end].split("\n"), page.prose[page.body : end].split("\n"), strict=True)
    for raw, row in rows:
        indent = len(raw) - len(raw.lstrip())
        if fold is not None and raw.strip() and indent <= fold:
            fold = None
        if FOLD.match(raw) and fold is None:
            fold = indent
        if fold is None:
            count += len(HAN.findall(row.replace(OTHER, "")))
    return count
