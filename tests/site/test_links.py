"""站内每个链接、锚点、资源都存在；每页有自己的标题与描述。读 HTML 文件，不用浏览器。"""

import json
import posixpath
import re
from urllib.parse import quote, unquote, urlsplit

import pytest
from sitetools import REPOSITORY_URL, ROOT, Page, html_pages


@pytest.fixture(scope="module")
def pages(site):
    return {url: Page((site / url / "index.html").read_text(encoding="utf-8")) for url in html_pages(site)}


def test_every_internal_link_and_anchor_resolves(site, pages):
    broken = []
    for url, page in pages.items():
        for _, link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            path = posixpath.normpath(posixpath.join(url or ".", unquote(parts.path))) if parts.path else url
            target = site / path
            if target.is_dir():
                target = target / "index.html"
            if not target.is_file():
                broken.append(f"{url}: {link}")
            elif parts.fragment and target.suffix == ".html":
                key = target.parent.relative_to(site).as_posix()
                ids = pages["" if key == "." else key + "/"].ids
                if unquote(parts.fragment) not in [*ids, "__comments"]:
                    broken.append(f"{url}: {link}（没有这个锚点）")
    assert broken == []


def test_ids_are_present_and_unique(pages):
    problems = {
        url: sorted({i for i in page.ids if page.ids.count(i) > 1 or not i}) for url, page in pages.items()
    }
    assert {url: ids for url, ids in problems.items() if ids} == {}


def test_scripts_styles_and_images_come_from_the_site(pages):
    foreign = [
        f"{url}: <{tag}> {link}"
        for url, page in pages.items()
        for tag, link in page.links
        if tag in ("script", "link", "img", "iframe")
        and urlsplit(link).netloc
        and "canonical" not in link
        # rel=canonical 与 rel=prev/next 指向站点自己的地址
        and not link.startswith("https://example.org/some-repo/")
    ]
    assert foreign == []


def test_no_page_ships_a_math_script(site):
    for url in html_pages(site):
        text = (site / url / "index.html").read_text(encoding="utf-8").lower()
        assert "mathjax.js" not in text and "katex" not in text and "tex-mml" not in text


def test_every_page_has_its_own_title_and_description(pages):
    descriptions = {}
    for url, page in pages.items():
        assert page.title.strip(), url
        assert page.meta.get("description"), url
        descriptions.setdefault(page.meta["description"], []).append(url)
    assert {text: urls for text, urls in descriptions.items() if len(urls) > 1} == {}


def test_every_page_has_its_own_address_as_canonical(pages):
    assert {url: page.canonical for url, page in pages.items()} == {
        url: [f"https://example.org/some-repo/{url}"] for url in pages
    }


def test_sitemap_lists_every_page_and_nothing_else(site, pages):
    sitemap = (site / "sitemap.xml").read_text(encoding="utf-8")
    listed = re.findall(r"<loc>(.*?)</loc>", sitemap)
    assert sorted(listed) == sorted(f"https://example.org/some-repo/{quote(url)}" for url in pages)


def test_edit_links_point_at_the_source_of_pages_and_notebooks(pages):
    def edit(url):
        return [link for _, link in pages[url].links if "/edit/main/" in link]

    assert edit("rl/dpo/") == [f"{REPOSITORY_URL}/edit/main/docs/rl/dpo.md"]
    assert edit("notebooks/rl/dpo/") == [f"{REPOSITORY_URL}/edit/main/notebooks/rl/dpo.py"]


def test_missing_page_speaks_chinese(site):
    text = (site / "404.html").read_text(encoding="utf-8")
    assert "没有这一页" in text and "Not found" not in text


def test_api_reference_documents_every_public_function(site):
    import ast

    for path in sorted((ROOT / "snippets").glob("*/*.py")):
        if path.stem == "__init__":
            continue
        tree = ast.parse(path.read_text(encoding="utf-8"))
        names = next(
            ast.literal_eval(node.value)
            for node in tree.body
            if isinstance(node, ast.Assign) and node.targets[0].id == "__all__"
        )
        module = f"snippets.{path.parent.name}.{path.stem}"
        html = (site / "api" / path.parent.name / "index.html").read_text(encoding="utf-8")
        defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
        missing = [name for name in names if name in defined and f'id="{module}.{name}"' not in html]
        assert missing == [], module


def test_formulas_are_typeset_on_every_page(site):
    for url in html_pages(site):
        text = (site / url / "index.html").read_text(encoding="utf-8")
        assert "arithmatex" not in text, url
        prose = re.sub(r"<(pre|code|script|style|svg)\b.*?</\1>|data-tex=\"[^\"]*\"", "", text, flags=re.S)
        assert not re.search(r"\\\(|\\\[|\$\$", prose), url


def test_search_holds_readable_prose_of_every_page_but_notebooks_and_api(site):
    pages = [json.loads(path.read_text(encoding="utf-8")) for path in site.glob("search/*/p*.json")]
    urls = {url for url in html_pages(site) if not url.startswith(("notebooks/", "api/"))}
    assert {page["url"] for page in pages} == urls
    for page in pages:
        text = " ".join(prose for _, _, prose in page["sections"])
        assert not re.search(r"import torch|mjx-|<svg|\\(?:frac|pi|log)\b", text), page["url"]
