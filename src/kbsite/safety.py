"""一道闸：页面成形之后，凡不在清单里的元素、属性、地址都是构建错误。

Markdown 里的 HTML、笔记的输出、文档串、手写的 SVG 最后都成为同一段 HTML，所以只在那里查一次，用浏览器那样的
HTML5 解析器（lexbor）；拒绝而不是悄悄删掉，写页面的人才知道。清单取自现有页面真正用到的东西。
"""

import posixpath
import re
import signal
import threading
from collections.abc import Iterable, Iterator
from datetime import date

from selectolax.lexbor import LexborHTMLParser

from .errors import KbsiteError

# ── 页面 ──────────────────────────────────────────────

TEXT = (
    "a abbr article b blockquote br caption cite code dd del details dfn div dl dt em figcaption figure "
    "h1 h2 h3 h4 h5 h6 hr i img ins kbd li mark ol p pre q s section small span strong sub summary sup "
    "table tbody td tfoot th thead tr u ul"
)
FORM = "button form input label option output select"  # 计算器与题目索引
OURS = "autoref kb-figure"  # 稍后换成链接、图的占位
DRAWING = frozenset(
    "circle clippath defs ellipse g image line lineargradient marker mask path pattern polygon polyline "
    "radialgradient rect stop svg text tspan use".split()
)
TAGS = DRAWING.union(f"{TEXT} {FORM} {OURS}".split())

ANYWHERE = frozenset(
    "class id title role lang dir hidden aria-label aria-live aria-hidden data-search-exclude".split()
)
ATTRIBUTES = {
    tag: frozenset(names.split())
    for tag, names in {
        "a": "href download",
        "autoref": "identifier optional hover backlink-type backlink-anchor slug domain role origin filepath lineno",
        "button": "type name",
        "details": "open",
        "div": "data-jp-theme-light data-jp-theme-name data-mime-type data-type",
        "form": "data-name data-formulas",
        "img": "src alt width height loading",
        "input": "type name value min max step placeholder autocomplete inputmode checked data-for data-log",
        "kb-figure": "ref",
        "label": "for",
        "li": "data-key data-section data-difficulty data-words value",
        "ol": "start reversed",
        "option": "value selected",
        "output": "name data-unit",
        "select": "name",
        "td": "style colspan rowspan",
        "th": "style colspan rowspan scope",
    }.items()
}
DRAWN = frozenset(
    "clip-path clippathunits cx cy d dominant-baseline dx dy fill fill-opacity fill-rule font-size font-weight "
    "gradienttransform gradientunits height href markerheight markerunits markerwidth mask offset opacity orient "
    "patterncontentunits patternunits points preserveaspectratio r refx refy rx ry stop-color stop-opacity stroke "
    "stroke-dasharray stroke-dashoffset stroke-linecap stroke-linejoin stroke-opacity stroke-width style "
    "text-anchor transform version viewbox width x x1 x2 xmlns y y1 y2".split()
)
SVG_NAMESPACE = "http://www.w3.org/2000/svg"
ALIGNMENT = re.compile(r"text-align: ?(left|right|center);?")
DRAWN_STYLE = re.compile(
    r"\s*((fill|stroke|opacity|font|text-anchor|dominant-baseline|clip|stop|image-rendering|white-space)"
    r"[\w-]*\s*:[^;:@\\]*(;\s*|$))*"
)
BAD_STYLE = re.compile(r"url\(|fixed|\\|@", re.I)
OUTSIDE_URL = re.compile(r"url\((?!#)|\\|@", re.I)
# 稍后要换成公式、图的记号：写在属性里，换上去的引号就把属性截断了
MARKER = re.compile(r"<(span|div|details|kb-)", re.I)
INPUTS = {"checkbox", "number", "range", "search", "text", None}
SCHEME = re.compile(r"[a-z][a-z0-9+.-]*:", re.I)
PNG = re.compile(r"data:image/(png|jpeg);base64,[A-Za-z0-9+/=\s]*")
# 主题自己的 id、class、data-md-* 不许页面冒用：脚本按它们找元素
RESERVED = re.compile(r"__|md-")


def problems(html: str, url: str = "") -> Iterator[tuple[str, tuple[str, ...]]]:
    """页面里不允许的东西：（编号、事实与改法，在源文件里依次用来找它的字）。`url` 是页面的地址，用来看链接有没有离开站点。"""
    # 前后各放一个元素：没写完的标签、注释、引号会吞掉后一个；多余的 </div> 会让内容跑到外面
    tree = LexborHTMLParser(f"<!doctype html><body><div>{html}</div><i></i>")
    body = tree.body
    shape = [node.tag for node in body.iter(include_text=False)]
    if shape != ["div", "i"] or body.attributes or tree.root.attributes or list(tree.head.iter()):
        yield (
            "KB604: 标签没有配对，或没有写完（引号、注释、<body> 也算）。检查 HTML，或改用 Markdown。",
            ("<",),
        )
    for node in body.traverse():
        if not node.is_element_node or node.tag == "body":
            continue
        tag = node.tag.lower()
        if tag not in TAGS:
            yield f"KB601: 不允许 <{tag}>。改用 Markdown，或删去它。", (f"<{tag}", "<")
            continue
        drawing = tag in DRAWING
        allowed = DRAWN if drawing else ATTRIBUTES.get(tag, frozenset())
        for name, value in node.attributes.items():
            name = name.lower()
            if name not in ANYWHERE and name not in allowed:
                yield f"KB602: <{tag}> 不允许属性 {name!r}。删去它。", (name, f"<{tag}")
            elif fault := _value(tag, name, value or "", drawing, url):
                yield fault, (value or name, name, f"<{tag}")


def _value(tag: str, name: str, value: str, drawing: bool, url: str) -> str | None:
    shown = repr(value[:60])
    if name in ("id", "class", "for", "name") and any(RESERVED.match(word) for word in value.split() or ()):
        return f"KB602: {name}={shown} 是主题自己用的名字。换一个不以 __ 或 md- 开头的。"
    if name in ("href", "src"):
        return _address(tag, value, drawing, url)
    if MARKER.search(value):
        return f"KB602: 属性 {name}={shown} 里有标签。换成文字。"
    if name == "style" and not (DRAWN_STYLE if drawing else ALIGNMENT).fullmatch(value):
        return f"KB602: 不允许样式 {shown}。删去它；表格的对齐写在 Markdown 的分隔行里。"
    if drawing and OUTSIDE_URL.search(value):
        return f"KB603: 图里的 {name}={shown} 引用了图以外的东西。图不能引用外部文件。"
    if name == "xmlns" and value != SVG_NAMESPACE:
        return f"KB602: 不允许 xmlns={shown}。图只能是 SVG。"
    if tag == "input" and name == "type" and value not in INPUTS:
        return f"KB602: 不允许 type={shown} 的输入框。删去它。"
    return None


def _address(tag: str, value: str, drawing: bool, url: str) -> str | None:
    shown = repr(value[:60])
    if drawing:
        if value.startswith("#") or (tag == "image" and PNG.fullmatch(value)):
            return None
        return f"KB603: 图里的 <{tag}> 指向 {shown}。图只能引用自己里面的 #id。"
    if re.search(r"[\x00-\x20\x7f\\]", value):
        return f"KB603: 地址 {shown} 里有空白、控制字符或反斜杠。改成编码过的地址。"
    if tag == "img" and PNG.fullmatch(value):
        return None
    if scheme := SCHEME.match(value):
        if tag == "a" and scheme[0].lower() in ("https:", "http:", "mailto:"):
            return None
        return f"KB603: <{tag}> 不允许地址 {shown}。链接用 https://，图放在站内。"
    path = value.partition("#")[0].partition("?")[0]
    if path.startswith("/"):
        return f"KB603: 地址 {shown} 以 / 开头。写成相对当前页面的路径。"
    depth = posixpath.dirname(url).count("/") + 1 if posixpath.dirname(url) else 0
    if path and posixpath.normpath(path).split("/").count("..") > depth:
        return f"KB603: 地址 {shown} 离开了站点的文件夹。写成站内的路径。"
    return None


def locate(path: str, source: str, found: Iterable[tuple[str, tuple[str, ...]]]) -> list[str]:
    """每个问题一行 `路径:行: …`；源文件里找不到的，来自嵌入的片段、文档串或笔记的输出。"""
    messages = {}
    lower = source.lower()
    for message, needles in found:
        position = next((lower.find(needle.lower()) for needle in needles if needle.lower() in lower), -1)
        line = f":{source.count(chr(10), 0, position) + 1}" if position >= 0 else ""
        messages[f"{path}{line}: {message}"] = None
    return list(messages)


def check_drawing(svg: str) -> str | None:
    """一幅 SVG 的第一个问题，没有就是 None；内联的图与 docs/ 里的 .svg 都用它。"""
    if "<!" in svg or "<?" in svg:
        return "KB601: 图里不允许注释、DOCTYPE 与处理指令。"
    for message, _ in problems(svg):
        return message
    tree = LexborHTMLParser(f"<body>{svg}")
    for node in tree.body.traverse():
        if node.is_element_node and node.tag != "body" and node.tag.lower() not in DRAWING:
            return f"KB601: 图里不允许 <{node.tag}>。"
    return None


# ── 公式 ──────────────────────────────────────────────

# MathJax 的 base 宏包里也有能写任意属性的命令（\\mmlToken 能写 href、id、style），所以查排好的结果
MATHML = frozenset(
    "math mi mn mo mtext mspace ms mrow mfrac msqrt mroot mstyle mpadded mphantom mfenced menclose msub msup msubsup "
    "munder mover munderover mmultiscripts mprescripts none mtable mtr mlabeledtr mtd".split()
)
MATH_FORBIDDEN = re.compile(r"on|href|src|xlink|tabindex|autofocus|contenteditable")
MATH_NAME = re.compile(r"((mjx|NCM|MJX|MathJax)[\w-]*|mjx-eqn[:-][\w.:-]+)")
MATH_STYLE = re.compile(
    r"\s*(([\w-]+-)?(align|bottom|color|family|height|left|position|right|size|top|width|margin|padding|border|"
    r"spacing|style|weight|transform|radius)\s*:\s*[^:;\"'\\]*(;\s*|$))*"
)


def check_formula(html: str) -> str | None:
    """MathJax 排好的公式里第一个不允许的东西，没有就是 None。"""
    for node in LexborHTMLParser(f"<body>{html}").body.traverse():
        if not node.is_element_node or node.tag == "body":
            continue
        if not node.tag.startswith("mjx-") and node.tag not in MATHML:
            return f"KB601: 公式里不允许 <{node.tag}>（\\ref、\\eqref、\\mmlToken 会产生它）"
        for name, value in node.attributes.items():
            value = value or ""
            if (
                MATH_FORBIDDEN.match(name)
                or (name in ("id", "class") and not all(map(MATH_NAME.fullmatch, value.split())))
                or (name == "style" and (BAD_STYLE.search(value) or not MATH_STYLE.fullmatch(value)))
            ):
                return f"KB602: 公式里不允许 {name}={value[:60]!r}"
    return None


# ── front matter ──────────────────────────────────────

PLAIN = re.compile(r"[^<>\"\x00-\x1f]*")
HIDEABLE = {"navigation", "toc", "path", "footer"}
# 主题把 title、description 原样写进 <head>；template、icon 这些键会让它读别的文件
META = {
    "title": lambda value: isinstance(value, str) and PLAIN.fullmatch(value),
    "description": lambda value: isinstance(value, str) and PLAIN.fullmatch(value),
    "tags": lambda value: (
        isinstance(value, list)
        and all(isinstance(tag, str | int | float) and PLAIN.fullmatch(str(tag)) for tag in value)
    ),
    "difficulty": lambda value: isinstance(value, int) and 1 <= value <= 5,
    "verified": lambda value: (
        isinstance(value, date) or (isinstance(value, str) and re.fullmatch(r"\d{4}-\d\d-\d\d", value))
    ),
    "answer": lambda value: isinstance(value, str) and "\n" not in value.strip() and "8<-" not in value,
    "search": lambda value: (
        isinstance(value, dict)
        and set(value) <= {"boost", "exclude"}
        and all(isinstance(one, int | float) for one in value.values())
    ),
    "hide": lambda value: isinstance(value, list) and all(one in HIDEABLE for one in value),
}


def check_meta(meta: dict, path: str) -> None:
    """front matter 只有认得的键，值是短的文字、数、日期：嵌套的锚点展开起来可以无限大。"""
    for key, value in meta.items():
        if key not in META:
            raise KbsiteError(
                f"{path}:1: KB605: front matter 里有不认得的键 {str(key)[:40]!r}。可用的有 {'、'.join(META)}。"
            )
        if not META[key](value):
            raise KbsiteError(
                f'{path}:1: KB605: front matter 的 {key} 写得不对。写成一行纯文本、数或日期，不含 < > "。'
            )


# ── 时间 ──────────────────────────────────────────────

PAGE_SECONDS = 30


def start_clock(path: str, error: type[Exception]) -> None:
    """一页排得太久（嵌套、重复的记号能让正则走上几小时）就抛出 `error`，说出是哪一页；`stop_clock` 关上。"""
    if not _can_time():
        return

    def late(*_):
        raise error(f"{path}:1: KB607: 这一页 {PAGE_SECONDS} 秒还没有排完。减少嵌套与重复的记号。")

    signal.signal(signal.SIGALRM, late)
    # 有的库会吞掉异常：此后每秒再抛一次
    signal.setitimer(signal.ITIMER_REAL, PAGE_SECONDS, 1)


def stop_clock() -> None:
    """关上 `start_clock` 的钟。"""
    if _can_time():
        signal.setitimer(signal.ITIMER_REAL, 0)


def _can_time() -> bool:
    """Windows 没有这种钟；信号只到主线程。"""
    return hasattr(signal, "setitimer") and threading.current_thread() is threading.main_thread()
