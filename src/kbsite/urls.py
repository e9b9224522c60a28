"""公开过的地址不能无声地消失：`published.txt` 列出它们，`redirects.yml` 写明移走的去了哪里。

地址写成 `rl/clip/` 或 `rl/clip/#锚点`，首页是 `./`；离线版的 `rl/clip.html` 也记成 `rl/clip/`。
只处理文本与文件，不知道 MkDocs。
"""

import posixpath
import re
from collections.abc import Callable
from dataclasses import dataclass
from html import escape, unescape
from pathlib import Path
from urllib.parse import quote, unquote

import yaml

from .errors import KbsiteError
from .notebooks.cache import write_atomically

PUBLISHED = "published.txt"
REDIRECTS = "redirects.yml"
HOME = "./"
# 一级标题的锚点就是页首，丢了也还落在页首：不列
HEADING = re.compile(r"<h[2-6]\b[^>]*(?<![\w-])id=\"([^\"]+)\"")
ID = re.compile(r"(?<![\w-])id=\"([^\"]+)\"")
# 不许以点开头的段：地址要当作站点里的路径写出文件
ADDRESS = re.compile(r"(?:\./|(?:[\w-][\w.-]*/)+)(?:#[^\s#\"<>]+)?")


@dataclass(frozen=True)
class Redirect:
    """`redirects.yml` 的一行。"""

    new: str
    line: int


def address(url: str) -> str:
    """MkDocs 的页面地址 → 与部署方式无关的写法：`rl/clip.html` → `rl/clip/`，`index.html` → `./`。"""
    url = unquote(url)
    if url.endswith(".html"):
        url = f"{url.removesuffix('.html')}/"
        url = url.removesuffix("index/") if posixpath.basename(url[:-1]) == "index" else url
    return url or HOME


def addresses(pages: dict[str, str], with_anchors: set[str]) -> list[str]:
    """所有页面的地址；`with_anchors` 里的页面连同二级以下标题的锚点。`pages` 是地址 → 正文的 HTML。"""
    anchors = [f"{page}#{unescape(name)}" for page in with_anchors for name in HEADING.findall(pages[page])]
    return sorted([*pages, *anchors])


def check(root: Path, pages: dict[str, str]) -> dict[str, Redirect]:
    """查转向写得对不对、公开过的地址还在不在；返回转向。一次报出全部错误。"""
    redirects = read_redirects(root / REDIRECTS)
    found = {page: {unescape(name) for name in ID.findall(html)} for page, html in pages.items()}
    errors = [
        f"{REDIRECTS}:{redirect.line}: {old!r} → {redirect.new!r}：{fault}"
        for old, redirect in redirects.items()
        if (fault := _fault(old, redirect.new, found, redirects))
    ]
    for line, old in enumerate(read_published(root / PUBLISHED), 1):
        page, _, anchor = old.partition("#")
        kept = (not anchor or anchor in found[page]) if page in found else page in redirects
        if not kept and old not in redirects:
            errors.append(
                f"{PUBLISHED}:{line}: 公开过的地址 {old} 不见了。改回来（标题改了字，可以写成 `## 新标题 {{ #旧锚点 }}`），"
                f'或在 {REDIRECTS} 写一行 "{old}": "新地址"。'
            )
    if errors:
        raise KbsiteError("\n".join(errors))
    return redirects


def _fault(old: str, new: str, found: dict[str, set[str]], redirects: dict[str, Redirect]) -> str | None:
    """一条转向的毛病；没有就是 None。"""
    for text in (old, new):
        if not ADDRESS.fullmatch(text):
            return f"{text!r} 不是站内地址。写成 rl/clip/ 或 rl/clip/#锚点。"
    (page, _, anchor), (target, _, target_anchor) = old.partition("#"), new.partition("#")
    if page in found and (not anchor or anchor in found[page]):
        return f"{old} 还在，转向不会生效。删去这一行，或先移走它。"
    if anchor and page not in found:
        return f"{page} 这一页不在了，单个锚点转不了。写整页的转向：{page}。"
    if anchor and (target != page or not target_anchor):
        return (
            f"锚点只能转到同一页的锚点。在 {page} 留下这个标题（`## 标题 {{ #{anchor} }}`），正文写一个链接。"
        )
    if target not in found or (target_anchor and target_anchor not in found[target]):
        seen = [old]
        while new in redirects:
            if new in seen:
                return f"转向成环：{' → '.join([*seen, new])}。去掉其中一行。"
            seen.append(new)
            new = redirects[new].new
        return (
            f"转了不止一次。直接写最后的地址 {new}。" if len(seen) > 1 else f"{new} 不存在。改成现有的地址。"
        )
    return None


def read_redirects(path: Path) -> dict[str, Redirect]:
    """`旧地址: 新地址` 的对照表；没有文件、没有内容就是空的。"""
    try:
        node = yaml.compose(path.read_text(encoding="utf-8"), yaml.SafeLoader) if path.is_file() else None
    except yaml.YAMLError as error:
        line = error.problem_mark.line + 1 if isinstance(error, yaml.MarkedYAMLError) else 1
        raise KbsiteError(f"{path.name}:{line}: 不是合法的 YAML：{error}。两边都用双引号括起来。") from None
    if node is not None and not isinstance(node, yaml.MappingNode):
        raise KbsiteError(f'{path.name}:1: 一行写一条 "旧地址": "新地址"。')
    redirects: dict[str, Redirect] = {}
    for key, value in node.value if node else ():
        line = key.start_mark.line + 1
        if not isinstance(key, yaml.ScalarNode) or not isinstance(value, yaml.ScalarNode):
            raise KbsiteError(f'{path.name}:{line}: 一行写一条 "旧地址": "新地址"。')
        if key.value in redirects:
            raise KbsiteError(
                f"{path.name}:{line}: {key.value} 在第 {redirects[key.value].line} 行已经写过。留一条。"
            )
        redirects[key.value] = Redirect(value.value, line)
    return redirects


def read_published(path: Path) -> list[str]:
    return path.read_text(encoding="utf-8").splitlines() if path.is_file() else []


def update(root: Path, current: list[str]) -> list[str]:
    """把新的地址并进 `published.txt`，从不删去；返回新加的。"""
    listed = read_published(root / PUBLISHED)
    new = sorted(set(current) - set(listed))
    if new:
        write_atomically(root / PUBLISHED, "".join(f"{row}\n" for row in sorted({*listed, *new})))
    return new


def add_aliases(html: str, page: str, redirects: dict[str, Redirect]) -> str:
    """在改了名的锚点前面放一个旧名字的空锚点：浏览器自己就会落到这里，不用脚本。"""
    for old, redirect in redirects.items():
        owner, _, anchor = old.partition("#")
        if owner == page and anchor:
            name = re.escape(escape(redirect.new.partition("#")[2]))
            mark = f'<a id="{escape(anchor)}"></a>'
            html = re.sub(rf'<\w+\b[^>]*(?<![\w-])id="{name}"', lambda match, mark=mark: mark + match[0], html, count=1)  # fmt: skip
    return html


def write_pages(
    site: Path, redirects: dict[str, Redirect], urls: dict[str, str], canonical: Callable[[str], str | None]
) -> None:
    """给移走的每一页写一个跳转页。`urls` 是地址 → 页面在这次构建里的地址，`canonical` 给出部署后的地址。

    只用 meta refresh：不用脚本，内容安全策略再严也能用，从 file:// 打开也行。
    """
    as_folder = not any(url.endswith(".html") for url in urls.values())
    for old, redirect in redirects.items():
        if "#" in old:
            continue
        name = f"{old}index.html" if as_folder else f"{old.rstrip('/')}.html"
        page, _, anchor = redirect.new.partition("#")
        url = urls[page] or "./"
        href = posixpath.relpath(url, posixpath.dirname(name) or ".") + "/" * url.endswith("/")
        href += f"#{quote(anchor)}" if anchor else ""
        path = site / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(_page(href, canonical(urls[page])), encoding="utf-8")


def _page(href: str, canonical: str | None) -> str:
    href = escape(href)
    link = f'<link rel="canonical" href="{escape(canonical)}">\n' if canonical else ""
    return (
        '<!doctype html>\n<html lang="zh">\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'">\n<title>已移到新地址</title>\n'
        f'<meta http-equiv="refresh" content="0; url={href}">\n{link}'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f'<p>这一页已移到<a href="{href}">新地址</a>。</p>\n</html>\n'
    )
