"""给机器读的三样：每个专题页的 Markdown、站点根的 llms.txt、页头里的 JSON-LD。只处理文本，不知道 MkDocs。"""

import json
import re
from collections.abc import Callable, Iterable
from html import escape, unescape

from markdown import Markdown

from . import front_matter

# `!!! abstract "标题"`、`??? question "标题"`；内容缩进四格
BLOCK = re.compile(r"^( *)(?:!!!|\?\?\?\+?) \w+ \"([^\"]*)\"$")
FIGURE = re.compile(r"<kb-figure ref=\"[^\"]+\">([^<]*)</kb-figure>")
CALCULATOR = re.compile(r"<form class=\"kb-calculator\".*?<strong>([^<]*)</strong>.*?</form>", re.S)
# 只给样式与搜索看的：独占一行或跟在标题后面的属性、图标
DECORATION = re.compile(r"(?:\n[ \t]*|(?<=\S)[ \t]+)\{ [.#][^{}\n]*\bkb-[^{}\n]*\}$|:material-[\w-]+: ", re.M)
# 两个词：主题把只写 alternate 的链接当作别的语言版本，去取它的 sitemap.xml
MARKDOWN_RELATION = "alternate convertedfrom"
LINK = re.compile(r"(?<=\]\()([^()\s:]+\.(?:md|ipynb))(#[^()\s]*)?(?=\))")


def markdown_url(url: str) -> str:
    """一页的 Markdown 在站点里的路径：`rl/clip/` → `rl/clip/index.md`，`rl/clip.html` → `rl/clip.md`。"""
    return f"{url}index.md" if url.endswith("/") else f"{url.removesuffix('.html')}.md"


def snippet_expander(options: dict) -> Callable[[str], str]:
    """展开嵌入的函数：就是排网页的 pymdownx.snippets，配置也相同。"""
    converter = Markdown(extensions=["pymdownx.snippets"], extension_configs={"pymdownx.snippets": options})
    return lambda text: "\n".join(converter.preprocessors["snippet"].run(text.split("\n")))


def page_markdown(
    source: str, markdown: str, expand: Callable[[str], str], link: Callable[[str], str]
) -> str:
    """一页的完整 Markdown：front matter 原样，嵌入由 `expand` 展开，图换成图注，折叠块展平，公式仍是 TeX。

    `source` 是源文件，`markdown` 是填好回答、加过页尾的正文；`link` 把站内链接的目标（源文件的相对路径）换成
    读者能取到的地址。
    """
    front = front_matter.PATTERN.match(source)
    text = expand(markdown.strip("\n"))
    text = FIGURE.sub(lambda match: f"（图：{unescape(match[1])}）", text)
    text = CALCULATOR.sub(lambda match: f"（计算器「{unescape(match[1])}」，在网页上用）", text)
    text = LINK.sub(lambda match: link(match[1]) + (match[2] or ""), DECORATION.sub("", text))
    text = "\n".join(_flatten(text.splitlines()))
    return (front[0] + "\n" if front else "") + text.strip("\n") + "\n"


def _flatten(lines: list[str]) -> Iterable[str]:
    """提示块与折叠块是本站排版用的语法，别处会把缩进的内容当成代码：标题写成粗体，内容退回四格。"""
    blocks: list[int] = []  # 还没结束的块，记它标题行的缩进
    for line in lines:
        indent = len(line) - len(line.lstrip(" "))
        while line and blocks and indent < blocks[-1] + 4:
            blocks.pop()
        line = line[4 * len(blocks) :]
        if match := BLOCK.match(line):
            blocks.append(indent)
            yield from (f"{match[1]}**{match[2]}**", "")
        else:
            yield line


def llms_txt(name: str, summary: str, note: str, sections: dict[str, list[tuple[str, str, str]]]) -> str:
    """llms.txt：标题、摘要、一段说明，然后每节一个链接列表；一条是（标题、地址、一句话）。"""
    parts = [f"# {name}", f"> {summary}", note]
    for title, links in sections.items():
        rows = [f"- [{text}]({url}): {about}" for text, url, about in links]
        parts += [f"## {title}", "\n".join(rows)]
    return "\n\n".join(parts) + "\n"


def head(title: str, meta: dict, url: str | None, alternate: str) -> str:
    """专题页 `<head>` 里的两行：Markdown 在哪里，这一页问什么、答什么（schema.org 的 QAPage）。

    `meta` 是 front matter，`url` 是部署后的地址（不知道就是 None），`alternate` 是 Markdown 的地址。
    """
    answer = {"@type": "Answer", "text": plain(str(meta["answer"]).strip())}
    question = {"@type": "Question", "name": title, "text": meta.get("description", title), "answerCount": 1}
    page = {"@context": "https://schema.org", "@type": "QAPage", "inLanguage": "zh-Hans"}
    if meta.get("verified"):
        page["lastReviewed"] = str(meta["verified"])  # 核对的日期，不是修改的日期
    if url:
        page["url"] = answer["url"] = url
    page["mainEntity"] = question | {"acceptedAnswer": answer}
    return (
        f'<link rel="{MARKDOWN_RELATION}" type="text/markdown" href="{escape(alternate)}">\n'
        f'<script type="application/ld+json">{_json(page)}</script>'
    )


def plain(markdown: str) -> str:
    """一句话回答去掉粗体与代码的记号；公式仍是 `$…$` 里的 TeX。"""
    return re.sub(r"\*\*|`", "", markdown)


def _json(data: dict) -> str:
    """可以放进 `<script>` 的 JSON：里面没有能结束元素的字符。"""
    text = json.dumps(data, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[<>&]", lambda match: f"\\u{ord(match[0]):04x}", text)
