"""KB107 站内链接：目标与锚点存在。KB205 来源的写法。KB203 的图片。"""

import posixpath
import re
from collections.abc import Iterator
from urllib.parse import unquote

from pymdownx.slugs import slugify

from .findings import Finding
from .page import OTHER, Page
from .site import Site

LINK = re.compile(
    r"(!?)\[((?:[^\[\]\n]|\[[^\[\]\n]*\])*)\]\(\s*<?([^()\s<>]*(?:\([^()\s]*\)[^()\s<>]*)*)>?(?:\s+\"[^\"\n]*\")?\s*\)"
)
IMG = re.compile(r"<img\b[^<>\n]*>")
ALT = re.compile(r"\balt=(?:\"[^\"]*[^\"\s][^\"]*\"|'[^']*[^'\s][^']*')")
URL = re.compile(r"https?://[^\s<>()（）」，。；、\"'`]+")
ARXIV = re.compile(r"https://arxiv\.org/abs/(\d\d(?:0[1-9]|1[0-2])\.\d{4,5})(v\d+)?(?:#.*)?")
BARE = re.compile(r"(?<![\w.:/-])(\d{4}\.\d{5})(?![\w.-])")
EXPLICIT = re.compile(r"\bid=[\"']([^\"']+)[\"']|\{:?[^{}\n]*?#([\w-]+)[^{}\n]*\}")
# 构建时才有的文件
GENERATED = {"docs/interviews/cards.apkg"}
_slug = slugify(case="lower")


def findings(site: Site) -> Iterator[Finding]:
    anchors: dict[str, set[str]] = {}
    for page in site.pages.values():
        for match in LINK.finditer(page.text, page.body):
            if page.prose[match.start(3)] != OTHER or page.prose[match.end() - 1] != OTHER:
                continue  # 在代码或公式里
            line = page.line(match.start())
            if match[1] and not match[2].strip():
                yield Finding(page.path, line, "KB203", "图片没有替代文字", "在 ![] 里用一句话说看到什么")
            yield from _target(site, page, line, match[3], anchors)
        for match in IMG.finditer(page.text, page.body):
            if page.prose[match.start()] == OTHER and not ALT.search(match[0]):
                line = page.line(match.start())
                yield Finding(page.path, line, "KB203", "图片没有替代文字", 'alt="…" 里用一句话说看到什么')
        yield from _sources(page)


def _target(site: Site, page: Page, line: int, target: str, anchors: dict) -> Iterator[Finding]:
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*:", target):
        return
    if target.startswith("/"):
        cure = "写相对路径，如 ../rl/dpo.md；网站可能部署在子路径下"
        yield Finding(page.path, line, "KB107", f"链接 {target} 以 / 开头", cure)
        return
    name, _, anchor = target.partition("#")
    path = (
        posixpath.normpath(posixpath.join(posixpath.dirname(page.path), unquote(name))) if name else page.path
    )
    if path.startswith("docs/notebooks/") and path.endswith(".ipynb"):
        path = path.removeprefix("docs/").removesuffix(".ipynb").replace("-", "_") + ".py"
        anchor = ""
    if path in GENERATED:
        return
    if not path.startswith(("docs/", "notebooks/")) or not site.exists(path):
        yield Finding(page.path, line, "KB107", f"链接的目标 {target} 不存在", "改路径；相对本页写，带 .md")
    elif anchor and path in site.pages and not path.startswith("docs/api/"):
        if path not in anchors:
            anchors[path] = page_anchors(site.pages[path])
        if unquote(anchor) not in anchors[path]:
            fact = f"{path} 里没有锚点 #{unquote(anchor)}"
            yield Finding(page.path, line, "KB107", fact, "照那一节的标题改，或在标题后写 { #名字 }")


def page_anchors(page: Page) -> set[str]:
    """一页的锚点：标题的 slug（与构建同一个函数），以及写明的 id。"""
    found: set[str] = set()
    for heading in page.headings:
        text = re.sub(r"\{[^{}]*\}\s*$", "", heading.text)
        text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)|<[^>]*>|[`*]", lambda match: match[1] or "", text).strip()
        slug, number = _slug(text, "-"), 0
        while (name := f"{slug}_{number}" if number else slug) in found:
            number += 1
        found.add(name)
    found |= {match[1] or match[2] for match in EXPLICIT.finditer(page.text)}
    return found


def _sources(page: Page) -> Iterator[Finding]:
    linked = set(re.findall(r"arxiv\.org/abs/(\d{4}\.\d{4,5})", page.text))
    for match in URL.finditer(page.text, page.body):
        if page.prose[match.start()] != OTHER:
            continue  # 代码里的地址
        url, line = match[0].rstrip(").,;"), page.line(match.start())
        host = url.split("/")[2].lower()
        if host.removeprefix("www.") == "arxiv.org":
            id_ = ARXIV.fullmatch(url)
            if not id_:
                cure = "写成 https://arxiv.org/abs/2305.18290 的样子（摘要页，四位年月加点加四五位）"
                yield Finding(page.path, line, "KB205", f"arXiv 链接 {url} 的形式不对", cure)
                continue
            text = re.search(r"\[(\d{4}\.\d{4,5})(?:v\d+)?\]\($", page.text[: match.start()])
            if text and text[1] != id_[1]:
                fact = f"链接写着 {text[1]}，指向的却是 {id_[1]}"
                yield Finding(page.path, line, "KB205", fact, "对照原文改成同一个编号")
    if not page.is_topic:
        return
    for match in BARE.finditer(page.prose, page.body):
        if match[1] not in linked and 1 <= int(match[1][2:4]) <= 12:
            cure = f"写成 [{match[1]}](https://arxiv.org/abs/{match[1]})，或在「来源」里列出它"
            yield Finding(page.path, page.line(match.start()), "KB205", f"{match[1]} 没有链接", cure)
            linked.add(match[1])
