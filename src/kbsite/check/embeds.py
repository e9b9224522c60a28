"""KB202 单元里的断言，KB203 图注，KB401、KB402 嵌入，KB403 标签。"""

import ast
import re
from collections.abc import Iterator

from ..errors import KbsiteError
from ..notebooks.source import SETUP, Cell
from ..pages import BROKEN_INCLUDE, INCLUDE, check_includes
from ..verification import assertions
from .findings import Finding
from .page import Page
from .site import Site

DRAWS = re.compile(r"\bplt\.|\.subplots\(|\.plot\(")
PLAIN = re.compile(r"[$`*\\<>]")
LINES = re.compile(r":\d+(:\d+)?$")
CODE_LINES = 3


def findings(site: Site) -> Iterator[Finding]:
    used: set[str] = set()
    for page in site.pages.values():
        yield from _includes(site, page, used)
        if page.is_topic:
            yield from _pasted(page)
    for notebook in site.notebooks.values():
        name = notebook.path.relative_to(site.root).as_posix()
        for cell in notebook.code_cells:
            if not cell.label or cell.label == SETUP:
                continue
            if f"{notebook.key}/{cell.label}" not in used:
                fact = f"标签 {cell.label} 没有页面嵌入"
                yield Finding(name, cell.line, "KB403", fact, "嵌入它，或去掉标签")
            else:
                yield from _embedded_cell(name, cell)


def _embedded_cell(name: str, cell: Cell) -> Iterator[Finding]:
    try:
        tree = ast.parse(cell.code)
        counted = assertions(cell.code)
    except (SyntaxError, ValueError, RecursionError) as error:
        line = cell.line + (getattr(error, "lineno", None) or 1) - 1
        yield Finding(name, line, "KB403", f"单元 {cell.label} 不是合法的 Python", "改好再执行")
        return
    # 只有一个表达式的单元是计算器，没有测量可断言
    if not counted and not (len(tree.body) == 1 and isinstance(tree.body[0], ast.Expr)):
        fact = f"嵌入页面的单元 {cell.label} 没有断言"
        yield Finding(name, cell.line, "KB202", fact, "页面读出的每个结论，写一条 assert")
    if not cell.caption and DRAWS.search(cell.code):
        cure = "加一行 #| caption: 一句话说看到什么"
        yield Finding(name, cell.line, "KB203", f"画图的单元 {cell.label} 没有图注", cure)
    if match := PLAIN.search(cell.caption):
        fact = f"图注里有 {match[0]}；它也是替代文字，会原样念出来"
        yield Finding(name, cell.line, "KB203", fact, "改成纯文本")


def _includes(site: Site, page: Page, used: set[str]) -> Iterator[Finding]:
    rows = page.text.split("\n")
    for match in BROKEN_INCLUDE.finditer(page.text, page.body):
        if not INCLUDE.match(match[0]):
            line = page.line(match.start())
            cure = '写成 --8<-- "路径"'
            yield Finding(page.path, line, "KB401", f"嵌入写成了 {match[0].strip()}，不会生效", cure)
    for match in page.includes:
        line, target = page.line(match.start()), match[1]
        snippet = target.startswith("snippets/")
        if snippet and LINES.search(target):
            cure = "在代码里用 --8<-- [start:名字] 标出片段，按名字嵌入"
            yield Finding(page.path, line, "KB402", f"按行号嵌入 {target}，代码一改就错位", cure)
            continue
        try:
            used |= check_includes(match[0].strip(), page.path, site.notebooks, site.root)
        except (KbsiteError, OSError, ValueError) as error:
            fact, _, cure = str(error).partition(": ")[2].rstrip("。").partition("。")
            broken = f"notebooks/{target.rpartition('/')[0].replace('-', '_')}.py"
            if any(finding.path == broken for finding in site.findings):
                continue  # 笔记本身读不懂，已经报过
            rule = "KB402" if snippet else "KB401"
            yield Finding(page.path, line, rule, fact, cure or "改成有的标签或片段")
        if not snippet:
            yield from _around(page, rows, line)


def _around(page: Page, rows: list[str], line: int) -> Iterator[Finding]:
    """单元前后空行；前一段是说看什么的文字，不能紧跟在标题或另一个单元后面。"""
    above, below = rows[line - 2] if line > 1 else "", rows[line] if line < len(rows) else ""
    if above.strip() or below.strip():
        yield Finding(page.path, line, "KB401", "嵌入的前后没有空行", "前后各空一行")
        return
    before = next((row for row in reversed(rows[: line - 1]) if row.strip()), "")
    if INCLUDE.match(before):
        fact = "两个单元连着嵌入，中间没有话"
        yield Finding(page.path, line, "KB401", fact, "写出前一个读出了什么、后一个看什么")
    elif before.startswith("#"):
        yield Finding(page.path, line, "KB401", "标题之后直接是单元", "先写一句看什么")


def _pasted(page: Page) -> Iterator[Finding]:
    for fence in page.fences:
        language = fence.info.split()[0].strip("{}.") if fence.info else ""
        lines = [row for row in fence.body.splitlines() if row.strip()]
        if language in ("python", "py") and len(lines) >= CODE_LINES and not INCLUDE.search(fence.body):
            cure = '放进 snippets/，用 --8<-- "snippets/…:片段名" 嵌入'
            line = page.line(fence.start)
            yield Finding(page.path, line, "KB402", f"围栏里粘贴了 {len(lines)} 行 Python", cure)
