"""KB301 一段一行，KB302 空格与标点，KB304 的术语。只看没有遮住的字，所以不会碰到代码与公式。"""

import re
from collections.abc import Iterator

from ..errors import KbsiteError
from ..search.aliases import read_aliases
from .findings import Edit, Finding
from .page import CODE, MATH, OTHER, Page
from .site import Site

HAN = "㐀-鿿"
FULL = "，。；：、！？（）「」《》"
OBJECT = f"{MATH}{CODE}"
# 汉字与旁边的字之间可以隔着粗体与链接的记号
MARKS = rf"(?P<marks>(?:\*\*|\]{OTHER}+|\[)*)"
TIGHT = re.compile(
    rf"[{HAN}]{MARKS}(?=[A-Za-z0-9{OBJECT}])|[A-Za-z0-9%{OBJECT}]{MARKS.replace('marks', 'closing')}(?=[{HAN}])"
)
BESIDE = rf"[{HAN}A-Za-z0-9{OBJECT}]"
LOOSE = re.compile(rf"(?<=[{FULL}]) +(?={BESIDE}|[{FULL}])|(?<={BESIDE}) +(?=[{FULL}])")
HALF = re.compile(
    rf"(?<=[{HAN}])[,;:?] ?|(?<=[{OBJECT}])[,;:?] ?(?=[{HAN}])|(?<=[{HAN}])\.(?=\s*$|[{HAN}])", re.M
)
WIDE = dict(zip(",;:?.", "，；：？。", strict=True))
PARENTHESES = re.compile(rf"(?<![\w{OBJECT}\]])( ?\()(?=[^()\n]*[{HAN}])[^()\n]*(\) ?)")
QUOTES = re.compile(rf"(“)(?=[^“”\n]*[{HAN}])[^“”\n]*(”)")
REPEATED = re.compile(r"([，。；：、])\1+")
FORBIDDEN = re.compile(rf"！|(?<=[{HAN}])!|(?<!「)(?:众所周知|显而易见|不难看出|不难发现|毋庸置疑|毫无疑问)")
WRAPPED = re.compile(rf"(?<=[{HAN}{FULL}])\n[ \t]*(?=[{HAN}{FULL}])")
NOT_TEXT = re.compile(r"[ \t]*[|#>]")
CAPTION = re.compile(r"^#\| caption: (.*)$", re.M)
# 提到一个词，而不是用它
MENTION = re.compile(r"「[^「」\n]*」|（[^（）\n]*）|\"[^\"\n]*\"")
ALLOWED_ALIASES = re.compile(r"^正文里也可以用的别名[^：\n]*：(.*)。$", re.M)


def findings(site: Site) -> Iterator[Finding]:
    for page in site.pages.values():
        yield from _wrapped(page)
        for start, fact, cure, edits in spacing(page.prose):
            yield Finding(page.path, page.line(start), "KB302", fact, cure, edits)
    for name, text in site.texts.items():
        if name.startswith("notebooks/"):
            for caption in CAPTION.finditer(text):
                line = text.count("\n", 0, caption.start()) + 1
                for _, fact, cure, edits in spacing(caption[1]):
                    moved = tuple(
                        Edit(caption.start(1) + edit.start, caption.start(1) + edit.end, edit.text)
                        for edit in edits
                    )
                    yield Finding(name, line, "KB302", fact, cure, moved)
    yield from _terms(site)


def spacing(prose: str) -> Iterator[tuple[int, str, str, tuple[Edit, ...]]]:
    """空格与标点：（位置，事实，改法，自动改法）。"""

    def found(match: re.Match, fact: str, cure: str, *edits: Edit):
        start = match.start()
        around = prose[max(prose.rfind("\n", 0, start) + 1, start - 6) : match.end() + 6].partition("\n")[0]
        for char, shown in ((CODE, "`"), (MATH, "$"), (OTHER, "")):
            around = re.sub(f"{char}+", shown, around)
        return start, f"「{around}」{fact}", cure, edits

    for match in TIGHT.finditer(prose):
        place = match.end() - len(_opening(prose, match))
        edit = Edit(place, place, " ")
        yield found(match, "里汉字与字母、数字、公式、代码之间没有空格", "空一格", edit)
    for match in LOOSE.finditer(prose):
        yield found(match, "里全角标点旁边有空格", "删去空格", Edit(*match.span(), ""))
    for match in HALF.finditer(prose):
        edit = Edit(*match.span(), WIDE[match[0][0]])
        yield found(match, f"里中文用了半角的 {match[0][0]}", f"写 {edit.text}", edit)
    for pattern, left, right in ((PARENTHESES, "（", "）"), (QUOTES, "「", "」")):
        for match in pattern.finditer(prose):
            edits = Edit(*match.span(1), left), Edit(*match.span(2), right)
            yield found(
                match, f"里中文用了 {match[1].strip()}{match[2].strip()}", f"写 {left}{right}", *edits
            )
    for match in REPEATED.finditer(prose):
        yield found(match, "里标点重复", "只留一个", Edit(*match.span(), match[1]))
    for match in FORBIDDEN.finditer(prose):
        yield found(match, f"里有 {match[0]}", "删去，把事实说完就够了")


def _opening(prose: str, match: re.Match) -> str:
    """记号里属于后一半的部分：空格加在它前面。`**` 是开是关，看这一行前面有几个。"""
    marks = match["marks"] if match["marks"] is not None else match["closing"]
    start = match.end() - len(marks)
    bold = prose.count("**", prose.rfind("\n", 0, start) + 1, start) % 2
    position = 0
    while position < len(marks) and marks[position] != "[":
        if marks[position] == "*":
            if not bold:
                break
            bold, position = 0, position + 2
        else:
            position += 1
    return marks[position:]


def _wrapped(page: Page) -> Iterator[Finding]:
    for match in WRAPPED.finditer(page.prose, page.body):
        above = page.prose[page.prose.rfind("\n", 0, match.start()) + 1 : match.start()]
        if not NOT_TEXT.match(above):
            line = page.line(match.end())
            cure = "接到上一行，或空一行另起一段"
            edit = Edit(*match.span(), "")
            yield Finding(page.path, line, "KB301", "一段话写成了两行，网页上会多一个空格", cure, (edit,))


def _terms(site: Site) -> Iterator[Finding]:
    table = site.texts.get("docs/about/terms.md", "")
    try:
        groups = read_aliases(table)
    except KbsiteError as error:
        line = int(str(error).split(":")[1])
        yield Finding("docs/about/terms.md", line, "KB304", "术语表有一行不足三列", "补上，没有就写 —")
        return
    allowed = {word for match in ALLOWED_ALIASES.finditer(table) for word in match[1].split("、")}
    allowed |= {group[0] for group in groups}
    terms = {
        alias: group[0]
        for group in groups
        for alias in group[1:]
        if alias not in allowed and re.search(f"[{HAN}]", alias)
    }
    if not terms:
        return
    pattern = re.compile("|".join(map(re.escape, sorted(terms, key=len, reverse=True))))
    for page in site.pages.values():
        if page.path.startswith("docs/about/"):
            continue
        prose = MENTION.sub(lambda match: OTHER * len(match[0]), page.prose)
        for match in pattern.finditer(prose):
            cure = f"写「{terms[match[0]]}」；提到这个说法时放在「」或（）里"
            yield Finding(page.path, page.line(match.start()), "KB304", f"「{match[0]}」是别名", cure)
