"""KB201 数字有出处：单元前后两段里的数，要在单元的输出或代码里。KB204 争议写上日期。"""

import re
from bisect import bisect_left
from collections.abc import Iterator

from ..notebooks.source import Notebook
from ..pages import INCLUDE
from .findings import Finding
from .page import OTHER, Page
from .site import Site

BLOCK = re.compile(r"(?:^[ \t]*\S.*\n?)+", re.M)
# 只看容易抄错、不容易碰巧对上的：至少两位有效数字的小数，与百分数
NUMBER = re.compile(
    r"(?<![\w.,/:§-])(\d[\d,]*(?:\.\d+)?)(%?)( ?[万亿]?)(?![\w]|\.\d)(?! ?(?:左右|附近|上下))"
)
# 前面是这些，就不是从单元读出的数：库的版本、节号、约数
NOT_READ = re.compile(r"(?:[A-Za-z][\w.-]* |v|第 |§ ?|式 |表 |图 |约 ?|近 ?|大约 ?|不到 ?|超过 ?)$")
# 同一句里有这些，数字出自别处
CITED = re.compile(
    r"论文|§|第 [\d.–、]+ 节|附录|报告|摘要|表 \d|图 \d|原文|作者|默认|\d{4}\.\d{4,5}|置信|\d% 区间"
)
SENTENCE = re.compile(r"[^。；\n]+")
VALUE = re.compile(r"\d[\d,_]*(?:\.\d+)?(?:e[+-]?\d+)?")
RANGE = re.compile(r"(?<![\w.])(\d+(?:\.\d+)?) <=? [^<>\n]+ <=? (\d+(?:\.\d+)?)")
SCALE = {"": 1, "万": 1e4, "亿": 1e8}
DATE = re.compile(r"20\d\d")


def findings(site: Site) -> Iterator[Finding]:
    for page in site.topics:
        if (section := page.section("争议与更新")) and not DATE.search(page.text[section[0] : section[1]]):
            line = page.line(section[0] - 1)
            yield Finding(
                page.path, line, "KB204", "「争议与更新」没有写日期", "写上年月，如（2026-11 写成）"
            )
        yield from _numbers(site, page)


def unexecuted(site: Site) -> list[str]:
    """片段没有或者过期的笔记：它们的数字没有核对。"""
    return [key for key, notebook in site.notebooks.items() if _outputs(site, notebook) is None]


def _outputs(site: Site, notebook: Notebook) -> dict[str, str] | None:
    """每个标签的片段；有一个没有写出、或代码与现在的笔记不同，就是 None。"""
    found = {}
    for cell in notebook.code_cells:
        if cell.label and cell.label != "setup":
            path = site.fragments / notebook.key / f"{cell.label}.md"
            try:
                text = path.read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError):
                return None
            if cell.echo != "hide" and cell.code not in text and _indented(cell.code) not in text:
                return None
            found[cell.label] = text
    return found


def _indented(code: str) -> str:
    return "\n".join("    " + row if row else "" for row in code.splitlines())


def _numbers(site: Site, page: Page) -> Iterator[Finding]:
    notebook = site.notebooks.get(page.key)
    outputs = _outputs(site, notebook) if notebook else None
    if not outputs:
        return
    codes = {cell.label: cell.code for cell in notebook.code_cells if cell.label in outputs}
    everywhere = _values([*outputs.values(), *(cell.code for cell in notebook.code_cells)])
    blocks = list(BLOCK.finditer(page.text, page.body))
    beside: dict[int, list[str]] = {}
    for number, block in enumerate(blocks):
        label = (match := INCLUDE.match(block[0])) and match[1].removeprefix(f"{page.key}/").removesuffix(
            ".md"
        )
        if label in outputs:
            for neighbour in (number - 1, number + 1):
                beside.setdefault(neighbour, []).extend((outputs[label], codes[label]))
    for number, texts in beside.items():
        if 0 <= number < len(blocks):
            # 随机的训练不断言到最后一位，只断言范围
            ranges = [(float(low), float(high)) for text in texts for low, high in RANGE.findall(text)]
            yield from _unread(page, blocks[number], _values(texts), ranges, everywhere)


def _unread(page: Page, block: re.Match, values: list, ranges: list, everywhere: list) -> Iterator[Finding]:
    if page.prose[block.start() : block.end()].lstrip().startswith(("#", OTHER)):
        return
    for sentence in SENTENCE.finditer(page.prose, block.start(), block.end()):
        if CITED.search(page.text[sentence.start() : sentence.end()]):
            continue
        for match in NUMBER.finditer(sentence[0]):
            digits, percent, unit = match[1].replace(",", ""), match[2], match[3].strip()
            places = len(digits.partition(".")[2])
            exact = places and len(digits.replace(".", "").lstrip("0")) > 1
            if not (exact or percent) or NOT_READ.search(sentence[0][: match.start()]):
                continue
            value, step = float(digits) * SCALE[unit], 10.0**-places * SCALE[unit]
            read = _among(values, value, step, percent) or _inside(ranges, value, percent)
            # 前面的单元里读出过的也可以再提，但要一字不差，不算舍入
            if not read and not _among(everywhere, value, 0, percent):
                fact = f"单元旁边的 {match[0].strip()} 不在这份笔记的输出与代码里"
                cure = "对照输出改；没有印出的数，在单元里写一条 assert；别处来的写明出处"
                line = page.line(sentence.start() + match.start())
                yield Finding(page.path, line, "KB201", fact, cure)


def _among(values: list[float], value: float, step: float, percent: str) -> bool:
    """有一个数舍入到 `step` 之后等于 `value`；百分数也可以写成小数，或写成「贵 5.5%」的 1.055。"""
    scales = ((1, 0), (100, 0), (100, 1)) if percent else ((1, 0),)
    for factor, base in scales:
        low, high = base + (value - step / 2) / factor, base + (value + step / 2) / factor
        place = bisect_left(values, low - 1e-9 * abs(low))
        if place < len(values) and values[place] <= high + 1e-9 * abs(high):
            return True
    return False


def _inside(ranges: list[tuple[float, float]], value: float, percent: str) -> bool:
    return any(
        low < number < high
        for low, high in ranges
        for number in ((value, value / 100) if percent else (value,))
    )


def _values(texts: list[str]) -> list[float]:
    return sorted({float(re.sub("[,_]", "", match[0])) for text in texts for match in VALUE.finditer(text)})
