"""带标签的单元 → Markdown 片段：折叠的代码、输出、图注。页面用 `--8<-- "<key>/<label>.md"` 嵌入。

图不写进片段，只留一个占位标签 `<kb-figure>`，里面是图注；成页时才换成内联 SVG：这样它在列表、折叠块里
也不会被 Markdown 改动，进搜索索引的只有图注。
"""

import re
from html import escape
from pathlib import Path

from pymdownx.snippets import SnippetPreprocessor

from ..errors import FragmentError
from .cache import write_if_changed
from .run import Executed
from .source import SETUP, Cell
from .svg import figure, inline_svg

FIGURE = re.compile(r"(?:<p>)?<kb-figure ref=\"([^\"]+)\">[^<]*</kb-figure>(?:</p>)?")
# 一个输出最多这么多字；更多的没有人读，只会把页面撑坏
LIMIT = 500_000


def write_fragments(executed: list[Executed], folder: Path) -> dict[str, str]:
    """写出所有片段，删去多余的；返回 {占位标签的 ref: 内联的 <figure>}。"""
    figures: dict[str, str] = {}
    wanted: dict[Path, str] = {}
    for result in executed:
        for cell in result.notebook.code_cells:
            if cell.label and cell.label != SETUP:
                path = folder / result.notebook.key / f"{cell.label}.md"
                wanted[path] = _fragment(result, cell, figures)
    for path in folder.rglob("*.md") if folder.exists() else ():
        if path not in wanted:
            path.unlink()
    for path, text in wanted.items():
        write_if_changed(path, text)
    return figures


def figure_refs(html: str) -> set[str]:
    """页面里的占位标签指的图。"""
    return set(FIGURE.findall(html))


def replace_figures(html: str, figures: dict[str, str]) -> str:
    """把页面里的占位标签换成图。"""

    def figure_of(match: re.Match) -> str:
        if match[1] not in figures:
            raise FragmentError(f"没有图 {match[1]!r}。不要手写 <kb-figure>，嵌入画图的单元。")
        return figures[match[1]]

    return FIGURE.sub(figure_of, html)


def _fragment(result: Executed, cell: Cell, figures: dict[str, str]) -> str:
    place = f"{result.notebook.path}:{cell.line} [{cell.label}]"
    blocks = []
    if cell.echo != "hide":
        code = _fenced("python", cell.code)
        blocks.append(code if cell.echo == "show" else _fold(code))
    captioned = False
    for number, output in enumerate(result.outputs_of(cell)):
        kind, content = _select(output, place)
        if len(content) > LIMIT:
            raise FragmentError(f"{place}: 一个输出有 {len(content)} 字，最多 {LIMIT}。先汇总再打印。")
        if kind == "svg":
            ref = f"{result.notebook.key}/{cell.label}/{number}"
            figures[ref] = figure(inline_svg(content, ref.replace("/", "-"), place, cell.caption))
            blocks.append(f'<kb-figure ref="{ref}">{escape(cell.caption)}</kb-figure>')
            captioned = True
        elif kind == "markdown":
            blocks.append(content.strip())
        else:
            blocks.append(_fenced("text", content.rstrip()))
    if cell.caption and not captioned:
        blocks.append(f"{cell.caption}\n{{ .kb-caption }}")
    return "\n\n".join(blocks) + "\n"


def _fenced(language: str, text: str) -> str:
    """原样显示的一段：里面的围栏关不上它，像 `--8<--` 嵌入的行不会被展开。"""
    fence = "`" * max(4, 1 + max(map(len, re.findall("`+", text)), default=0))
    return "\n".join([f"{fence}{language}", *map(_literal, text.split("\n")), fence])


def _literal(line: str) -> str:
    whole = SnippetPreprocessor.RE_ALL_SNIPPETS.match(line)
    part = whole or SnippetPreprocessor.RE_SNIPPET_SECTION.match(line)
    if not part:
        return line
    start = part.start("all" if whole else "inline_marker")
    return f"{line[:start]};{line[start:]}"


def _fold(code: str) -> str:
    return '??? code "代码"\n\n' + "\n".join("    " + row if row else "" for row in code.split("\n"))


def _select(output: dict, place: str) -> tuple[str, str]:
    """一个输出里给页面看的那一种表示。"""
    if output["output_type"] == "stream":
        text = "".join(output["text"])
        if output["name"] == "stderr":
            raise FragmentError(
                f"{place}: 单元往标准错误写了 {text.strip()[:200]!r}。消除警告，或改用 print。"
            )
        return "text", text
    data = output["data"]
    if "image/svg+xml" in data:
        return "svg", "".join(data["image/svg+xml"])
    if "text/markdown" in data:
        return "markdown", "".join(data["text/markdown"])
    text = "".join(data.get("text/plain", ""))
    rich = sorted(set(data) - {"text/plain"})
    if rich:
        raise FragmentError(f"{place}: 输出是 {'、'.join(rich)}，页面只收 SVG 图、Markdown 与文本。")
    if re.match(r"\[?<", text):
        raise FragmentError(f"{place}: 单元最后一个表达式输出了 {text[:60]!r}。在那一行末尾加分号，或以 assert 结尾。")  # fmt: skip
    return "text", text
