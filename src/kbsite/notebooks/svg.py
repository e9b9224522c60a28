"""把 matplotlib 的 SVG 变成可以内联进页面的一段：随主题变色、没有重复的 id、体积小、没有脚本。"""

import re
from html import escape

from ..errors import FragmentError
from ..safety import check_drawing

INK = "#010203"  # matplotlibrc 里的记号色
# matplotlibrc 里的曲线颜色，按序成为 --kb-c0、--kb-c1…：深色主题在 extra.css 里换成更亮的一组
PALETTE = ("#0072b2", "#b84f00", "#007a58", "#a8447f", "#6b6b6b", "#8a6500")
NUMBER = re.compile(r"(?<![\w#.])-?\d+\.\d{3,}")


def inline_svg(svg: str, prefix: str, place: str, caption: str) -> str:
    """单行的 `<svg>`：`prefix` 加在每个 id 前面，同一页的几张图互不冲突；图注是替代文字。"""
    if not caption:
        raise FragmentError(f"{place}: 图没有图注。在单元开头写 `#| caption: 图上看到什么`。")
    match = re.search(r"<svg\b.*</svg>", svg, re.S)
    if not match:
        raise FragmentError(f"{place}: 图的输出里没有 <svg>。用 matplotlib 画图。")
    svg = re.sub(r"<metadata>.*?</metadata>|<style\b.*?</style>|<!--.*?-->", "", match[0], flags=re.S)
    svg = svg.replace("xlink:href", "href").replace(' xmlns:xlink="http://www.w3.org/1999/xlink"', "")
    svg = re.sub(r"(<svg\b[^>]*?) width=\"[^\"]*\" height=\"[^\"]*\"", r"\1", svg, count=1)
    svg = svg.replace(INK, "currentColor")
    for number, color in enumerate(PALETTE):
        svg = svg.replace(color, f"var(--kb-c{number},{color})")
    # 字体随页面；matplotlib 用的字体读者未必有
    svg = re.sub(r"font-family: [^;\"]*;?\s*", "", svg)
    svg = re.sub(r"font: (?:[\w ]*?)(\d[\d.]*px) [^;\"]*", r"font-size: \1", svg)
    # 坐标留两位小数；只动标签里的数，图上的文字不动
    svg = re.sub(r"<[^>]*>", lambda tag: NUMBER.sub(_rounded, tag[0]), svg)
    used = set(re.findall(r"url\(#([^)]+)\)|href=\"#([^\"]+)\"", svg))
    used = {a or b for a, b in used}
    svg = re.sub(r" id=\"([^\"]*)\"", lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", svg)
    svg = re.sub(r"url\(#|href=\"#", lambda m: f"{m[0]}{prefix}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    svg = re.sub(r"\s*\n\s*", " ", re.sub(r">\s+<", "><", svg))
    if fault := check_drawing(svg):
        raise FragmentError(f"{place}: {fault}用 matplotlib 画图。")
    return svg


def figure(svg: str) -> str:
    """`inline_svg` 的图加上看得见的图注。"""
    caption = re.search(r"aria-label=\"([^\"]*)\"", svg)[1]
    return f'<figure class="kb-figure">{svg}<figcaption>{caption}</figcaption></figure>'


def _rounded(number: re.Match) -> str:
    return f"{float(number[0]):.2f}".rstrip("0").rstrip(".")
