"""页面的 Markdown 与 HTML：一句话回答、嵌入的检查、页尾的笔记链接、笔记页的修补。"""

import base64
import hashlib
import re
from collections.abc import Iterable
from html import escape
from pathlib import Path

from .errors import CellNotFoundError, KbsiteError
from .math.scan import mark_dollars
from .notebooks.source import SETUP, Notebook
from .notebooks.svg import figure

INCLUDE = re.compile(r"^[ \t]*-+8<-+ \"([^\"\n]+)\"$", re.M)
TARGET = re.compile(r"\w[\w./-]*(:[\w-]+)?")
# 像嵌入又不是：多了空格（行尾的也算）、少了引号；它不会报错，只会原样印在页面上
BROKEN_INCLUDE = re.compile(r"^[ \t]*-+ ?8 ?< ?-+.*$", re.M)


def placeholder(name: str) -> re.Pattern:
    """独占一行的 `{{ 名字 }}`，构建时换成别的内容；第一组是缩进。"""
    return re.compile(rf"^([ \t]*)\{{\{{ {name} \}}\}}[ \t]*$", re.M)


ANSWER = placeholder("answer")
IMAGE = re.compile(r"<img\b[^<>]*\bsrc=\"data:image/svg\+xml;base64,([^\"<]+)\"[^<>]*>")
# 不跨过下一个标题：没有结尾的也只读一遍
HEADING = re.compile(r"<h([1-6])\b[^<>]*>((?:(?!<h[1-6]).)*?)</h\1>", re.S)


def fill_answer(markdown: str, meta: dict, path: str) -> str:
    """把独占一行的 `{{ answer }}` 换成 front matter 的 answer。"""
    if not ANSWER.search(markdown):
        return markdown
    if not meta.get("answer"):
        raise KbsiteError(
            f"{path}:1: 正文用了 {{{{ answer }}}}，front matter 里却没有 answer。补上一句不超过 60 字的回答。"
        )
    return ANSWER.sub(lambda match: match[1] + str(meta["answer"]).strip(), markdown)


def check_includes(source: str, path: str, notebooks: dict[str, Notebook], root: Path) -> set[str]:
    """检查页面源文件嵌入的每一处；返回用到的 `key/label`。嵌入不存在的单元时，消息列出有哪些标签。"""
    used = set()
    for match in BROKEN_INCLUDE.finditer(source):
        if not INCLUDE.match(match[0]):
            place = f"{path}:{source.count(chr(10), 0, match.start()) + 1}"
            raise KbsiteError(f'{place}: 嵌入写成了 {match[0][:80]!r}，不会生效。写成 --8<-- "路径"。')
    for match in INCLUDE.finditer(source):
        target = match[1]
        place = f"{path}:{source.count(chr(10), 0, match.start()) + 1}"
        if not TARGET.fullmatch(target) or "../" in target:
            raise KbsiteError(
                f"{place}: KB606: 不能嵌入 {target!r}。只能嵌入笔记的单元与 snippets/ 里的代码。"
            )
        if target.startswith("snippets/"):
            _check_section(target, place, root)
            continue
        key, _, name = target.rpartition("/")
        label = name.removesuffix(".md")
        notebook = notebooks.get(key)
        if notebook is None:
            raise CellNotFoundError(
                f"{place}: 没有专题键为 {key!r} 的笔记（notebooks/{key.replace('-', '_')}.py）。"
            )
        labels = [label for label in notebook.labels if label != SETUP]
        if label not in labels or not name.endswith(".md"):
            raise CellNotFoundError(
                f"{place}: notebooks/{key.replace('-', '_')}.py 里没有标签 {label!r}（有：{'、'.join(labels) or '无'}）。"
            )
        used.add(f"{key}/{label}")
    return used


def _check_section(target: str, place: str, root: Path) -> None:
    name, _, section = target.partition(":")
    file = root / name
    if not file.is_file():
        raise KbsiteError(f"{place}: 嵌入的文件 {name} 不存在。")
    text = file.read_text(encoding="utf-8")
    sections = re.findall(r"--8<-- \[start:([\w-]+)\]", text)
    if section and section not in sections:
        raise KbsiteError(f"{place}: {name} 里没有片段 {section!r}（有：{'、'.join(sections) or '无'}）。")


def unused_labels(notebooks: Iterable[Notebook], used: set[str]) -> list[str]:
    """没有页面嵌入的标签，每个一条消息。"""
    return [
        f"{notebook.path}:{cell.line}: 标签 {cell.label!r} 没有页面嵌入。嵌入它，或去掉标签。"
        for notebook in notebooks
        for cell in notebook.code_cells
        if cell.label and cell.label != SETUP and f"{notebook.key}/{cell.label}" not in used
    ]


def footer(key: str, origins: list[str], has_notebook: bool, has_snippet: bool) -> str:
    """页尾：完整笔记、参考实现文档的链接，与笔记里的原标题。

    原标题照抄（含错字）并且写成标题：搜索给标题的权重大，照着笔记搜也能找到这一页。
    """
    section, _, slug = key.partition("/")
    rows = []
    if has_snippet:
        module = f"snippets.{section}.{slug.replace('-', '_')}"
        rows.append(f"[:material-code-braces: 参考实现的签名与完整文档](../api/{section}.md#{module})")
    if has_notebook:
        rows.append(f"[:material-notebook-outline: 本页实验的完整笔记](../notebooks/{section}/{slug}.ipynb)")
    parts = [f"{row}\n{{ .kb-footer }}" for row in rows]
    if origins:
        titles = "；".join(f"「{title}」" for title in origins)
        parts.append(f'## 对应的笔记标题：{titles} {{ #notes-heading .kb-footer data-toc-label="笔记标题" }}')
    return "\n\n---\n\n" + "\n\n".join(parts) + "\n" if parts else ""


def name_questions(html: str) -> str:
    """给每个追问（`details.question`）一个 id：搜索的结果、别人的链接能直接落到这一问上，主题会把它打开。

    id 由题目的文字算出，次序变了也不变；只用 ASCII，主题不认地址里转码过的汉字。
    """
    seen: dict[str, int] = {}

    def name(match: re.Match) -> str:
        text = re.sub(r"<[^>]+>|\s", "", match[1])
        anchor = "q-" + hashlib.sha256(text.encode()).hexdigest()[:8]
        seen[anchor] = seen.get(anchor, 0) + 1
        if seen[anchor] > 1:
            anchor += f"-{seen[anchor]}"
        return f'<details class="question" id="{anchor}">{match[1]}'

    return re.sub(
        r'<details class="question">(\s*<summary>(?:(?!<summary>).)*?</summary>)', name, html, flags=re.S
    )


def _inlined(image: re.Match) -> str:
    """自己写进 .ipynb 的图；单元里手写的图原样留下，由闸去拒绝。"""
    try:
        svg = base64.b64decode(image[1]).decode()
    except ValueError:
        return image[0]
    return figure(svg) if svg.startswith('<svg role="img" aria-label="') else image[0]


def repair_notebook(html: str, key: str, page_href: str) -> tuple[str, list[dict]]:
    """修补 mkdocs-jupyter 的页面；返回 HTML 与目录（toc tokens）。

    去掉它内联的 574 KB 样式与全部脚本，套上本站的高亮类；中文标题补上 id；公式与图标成本站的样子。
    """
    html = re.sub(
        r"<style\b.*?</style>|<script\b.*?</script>|<link\b[^>]*>|<!--.*?-->", "", html, flags=re.S | re.I
    )
    # 提示符、复制按钮与各种包装在本站样式里没有用处
    html = re.sub(r"<div class=\"jp-(?:Input|Output)Prompt[^>]*>.*?</div>", "", html, flags=re.S)
    html = re.sub(r"<div class=\"clipboard-copy-txt\".*?</div>", "", html, flags=re.S)
    html = re.sub(
        r"<div class=\"zeroclipboard-container\">.*?</clipboard-copy>\s*</div>", "", html, flags=re.S
    )
    html = html.replace(' tabindex="0"', "").replace(
        '<div class="highlight-ipynb hl-python">', '<div class="highlight">'
    )
    html = re.sub(r"<a class=\"anchor-link\"[^>]*>.*?</a>", "", html, flags=re.S)
    # 选项行是给构建看的
    html = re.sub(r"<span class=\"c1\">#\| .*?</span>\n?", "", html)
    # 主题的代码样式要 <code>
    html = re.sub(
        r"(<div class=\"highlight\"><pre>)(.*?)</pre>", r"\1<code>\2</code></pre>", html, flags=re.S
    )
    # 编成图片的 SVG 不随主题变色，也没有替代文字
    html = IMAGE.sub(_inlined, html)
    html = mark_dollars(html)
    tokens: list[dict] = []
    seen: set[str] = set()

    def heading(match: re.Match) -> str:
        level, inner = match[1], match[2]
        name = re.sub(r"<[^>]+>", "", inner).strip()
        slug = re.sub(r"[^\w]+", "-", name.lower()).strip("-") or "section"
        stem, number = slug, 1
        while slug in seen:  # 「甲」「甲」「甲 2」也不能撞在一起
            number += 1
            slug = f"{stem}-{number}"
        seen.add(slug)
        tokens.append(
            {
                "level": int(level),
                "id": slug,
                "name": name,
                "html": name,
                "data-toc-label": "",
                "children": [],
            }
        )
        return f'<h{level} id="{slug}">{inner}</h{level}>'

    html = HEADING.sub(heading, html)
    download = key.rpartition("/")[2] + ".ipynb"
    links = (
        f'<p class="kb-footer"><a href="{escape(page_href)}">返回专题页</a> · '
        f'<a href="{escape(download)}" download>下载这份笔记（.ipynb，含输出）</a></p>'
    )
    return links + html, tokens
