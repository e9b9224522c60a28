"""恶意内容：语料里的每一条，要么被拒绝并且指出位置，要么照常发布而在真实浏览器里什么也不发生。"""

import functools
import http.server
import os
import re
import threading
import time
from types import SimpleNamespace

import pytest
from hostile_cases import (
    CELLS,
    EVIL,
    FIGURES,
    FILES,
    FORMULAS,
    HARMLESS,
    INCLUDES,
    METAS,
    PAGES,
    PWN,
    SVG_FILES,
)
from mkdocs.utils.meta import get_data
from playwright.sync_api import sync_playwright

from kbsite import pages, safety
from kbsite.browser import ensure_chromium
from kbsite.cards import package
from kbsite.errors import FragmentError, KbsiteError
from kbsite.math import scan
from kbsite.notebooks.svg import inline_svg
from kbsite.questions import Question
from kbsite.sources import PAGE_BYTES, check_sources

TITLE = "# 题\n\n"
REFUSED_PAGES = [case for case in PAGES if case[3] != HARMLESS]
REFUSED_FORMULAS = [case for case in FORMULAS if case[3] != HARMLESS]
TOPIC = f"""\
---
title: 演示 &lt;img src=x onerror={PWN}&gt; ' {{{{ config }}}}
description: 演示 &lt;/title&gt;
tags: [javascript, "a'b"]
difficulty: 1
verified: 2026-01-01
answer: '回答 `</script><script>{PWN}</script>` 与 $x<y$。'
---

# 演示

{{{{ answer }}}}

??? question "`<img src=x onerror={PWN}>`？"
    答 &lt;script&gt;{PWN}&lt;/script&gt;。
"""


def each(cases):
    return [pytest.param(*case[2:], id=case[0]) for case in cases]


def test_corpus_is_large_and_every_case_has_its_own_name():
    corpora = [PAGES, FORMULAS, CELLS, FIGURES, SVG_FILES, METAS, INCLUDES, FILES]
    assert sum(map(len, corpora)) >= 60
    for cases in corpora:
        assert len({case[0] for case in cases}) == len(cases)
        assert len({str(case[2:4]) for case in cases}) == len(cases)


# ── 被拒绝的：一次构建报出全部 ────────────────────────────────


@pytest.fixture(scope="module")
def report(module_project):
    """把每一条写成一页、一个公式、一个单元，建一次；返回构建的消息与笔记里每个单元的行号。"""
    project = module_project
    for name, _, text, _ in REFUSED_PAGES:
        project.write(f"docs/page/{name}.md", "")
        (project.root / f"docs/page/{name}.md").write_text(TITLE + text + "\n", encoding="utf-8")
    for name, _, tex, _ in REFUSED_FORMULAS:
        project.write(f"docs/formula/{name}.md", "").write_text(f"{TITLE}公式 ${tex}$。\n", encoding="utf-8")
    cells = "\n\n".join(cell for _, _, cell, _ in CELLS)
    body = f"# %%\n#| label: setup\nfrom IPython.display import HTML\n\n{cells}\n"
    path = project.notebook("rl/hostile", "")
    path.write_text(path.read_text(encoding="utf-8") + body, encoding="utf-8")
    source = path.read_text(encoding="utf-8")
    lines = {name: source[: source.index(cell)].count("\n") + 2 for name, _, cell, _ in CELLS}
    result = project.build()
    assert result.returncode != 0 and "Traceback" not in result.stderr, result.stderr[-3000:]
    assert not (project.root / "site/page").exists()
    return result.stderr, lines


@pytest.mark.parametrize(("name", "rule"), [(case[0], case[3]) for case in REFUSED_PAGES])
def test_page_is_refused_with_its_line(report, name, rule):
    assert re.search(rf"^(ERROR +- +)?docs/page/{name}\.md:[3-9]: {rule}: .+。", report[0], re.M)


@pytest.mark.parametrize(("name", "reason"), [(case[0], case[3]) for case in REFUSED_FORMULAS])
def test_formula_is_refused_with_its_line(report, name, reason):
    assert re.search(rf"docs/formula/{name}\.md:3: 公式排不出来：.*{re.escape(reason)}", report[0])


@pytest.mark.parametrize(("name", "rule"), [(case[0], case[3]) for case in CELLS])
def test_notebook_cell_is_refused_with_its_line(report, name, rule):
    assert f"notebooks/rl/hostile.py:{report[1][name]}: {rule}" in report[0]


# ── 被拒绝的：构建一开始就查的 ──────────────────────────────────


@pytest.mark.parametrize(("inside", "rule"), each(FIGURES))
def test_figure_is_refused(inside, rule):
    svg = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 1 1"><g>{inside}</g></svg>'
    with pytest.raises(FragmentError, match=f"rl/x.py:3: {rule}"):
        inline_svg(svg, "x", "rl/x.py:3", "图注")


@pytest.mark.parametrize(("text", "rule"), each(SVG_FILES))
def test_svg_file_is_refused(tmp_path, text, rule):
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs/x.svg").write_text(text, encoding="utf-8")
    with pytest.raises(KbsiteError, match=rf"\Adocs/x\.svg:1: {rule}[^\n]+\Z"):
        check_sources(tmp_path)


@pytest.mark.parametrize(("path", "text"), each(FILES))
def test_file_is_refused(tmp_path, path, text):
    file = tmp_path / path
    file.parent.mkdir(parents=True)
    if text is None:
        file.symlink_to("/etc/passwd")
    else:
        file.write_text(text, encoding="utf-8")
    with pytest.raises(KbsiteError, match=r"\A[^\n]+:1: KB60[67]: [^\n]+。\Z"):
        check_sources(tmp_path)


@pytest.mark.parametrize(("text", "rule"), each(METAS))
def test_front_matter_is_refused(text, rule, monkeypatch):
    monkeypatch.setenv("SECRET", "秘密")
    start = time.monotonic()
    meta = get_data(text)[1]
    if rule == HARMLESS:  # MkDocs 用的是安全的读法：标签不认，什么也没有读到
        assert meta == {}
    else:
        with pytest.raises(KbsiteError, match="^docs/x.md:1: KB605: "):
            safety.check_meta(meta, "docs/x.md")
    assert time.monotonic() - start < 5


@pytest.mark.parametrize("text", [pytest.param(case[2], id=case[0]) for case in INCLUDES])
def test_include_is_refused_and_the_reader_has_nothing_but_fragments(tmp_path, text):
    (tmp_path / "snippets").mkdir()
    for name in (".git/config", "mkdocs.yml", "requirements/site.in"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("甲", encoding="utf-8")
    with pytest.raises(KbsiteError, match="^docs/x.md:2: "):
        pages.check_includes(f"{TITLE.strip()}\n{text}\n", "docs/x.md", {}, tmp_path)


def test_answer_with_html_does_not_reach_the_cards():
    question = Question("rl/x", "题", "节", 1, f"<img src={EVIL}/x.png onerror={PWN}>", ())
    with pytest.raises(KbsiteError, match="^docs/rl/x.md:1: KB60"):
        package([question], "", 0)


# ── 不会拖住构建 ────────────────────────────────────────────


@pytest.mark.parametrize(
    ("read", "unit"),
    [
        (lambda html: scan.replace(html, str), '<span class="arithmatex">'),
        (lambda html: scan.replace(html, str), '<div class="arithmatex">\\['),
        (pages.name_questions, '<details class="question"><summary>'),
        (lambda html: pages.HEADING.sub("", html), "<h1>"),
        (lambda html: pages.HEADING.sub("", html), "<h1"),
        (lambda html: pages.IMAGE.sub("", html), '<img src="data:image/svg+xml;base64,a'),
        (lambda html: list(safety.problems(html)), "<b><p>"),
        (lambda html: list(safety.problems(html)), "<table><b>"),
        (lambda text: pages.BROKEN_INCLUDE.sub("", pages.INCLUDE.sub("", text)), "-8<- "),
    ],
)
def test_repeated_marks_are_read_in_linear_time(read, unit):
    start = time.monotonic()
    read(unit * (PAGE_BYTES // len(unit)))
    assert time.monotonic() - start < 5


def test_page_that_takes_too_long_is_named(monkeypatch):
    monkeypatch.setattr(safety, "PAGE_SECONDS", 0.2)
    safety.start_clock("docs/x.md", KbsiteError)
    try:
        with pytest.raises(KbsiteError, match="^docs/x.md:1: KB607: "):
            re.match(r"(a|a)*b", "a" * 40)
    finally:
        safety.stop_clock()


# ── 照常发布的：在真实浏览器里什么也不发生 ────────────────────────


@pytest.fixture(scope="module")
def published(tmp_path_factory, module_project, report):
    """同一个项目去掉被拒绝的，写上无害的，严格地建。"""
    project = module_project
    for path in [*project.root.glob("docs/page/*.md"), *project.root.glob("docs/formula/*.md")]:
        path.unlink()
    (project.root / "notebooks/rl/hostile.py").unlink()
    names = ["index.md"]
    for folder, cases in (("page", PAGES), ("formula", FORMULAS)):
        for name, _, text, expected in cases:
            if expected == HARMLESS:
                names.append(f"{folder}/{name}.md")
                body = f"公式 ${text}$。" if folder == "formula" else text
                project.write(f"docs/{names[-1]}", "").write_text(f"{TITLE}{body}\n", encoding="utf-8")
    project.write("docs/rl/topic.md", TOPIC)
    project.write("docs/questions.md", "# 题目\n\n{{ questions }}\n")
    project.nav(*names, "questions.md", "节: [rl/topic.md]")
    result = project.build(SITE_URL="https://example.org/sub/", SECRET="秘密")
    assert result.returncode == 0, result.stderr[-3000:]
    return SimpleNamespace(root=project.root / "site", names=[*names, "questions.md", "rl/topic.md"])


def test_published_cases_run_nothing_and_ask_nobody(published):
    handler = functools.partial(_Quiet, directory=str(published.root))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    base = f"http://127.0.0.1:{server.server_address[1]}/"
    happened = []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=ensure_chromium(), args=["--no-sandbox"])
        page = browser.new_page()
        page.on("dialog", lambda dialog: (happened.append(f"对话框 {page.url}"), dialog.dismiss()))
        page.on("console", lambda message: message.type == "error" and happened.append(message.text))

        def only_here(route):
            if route.request.url.startswith((base, "data:")):
                return route.continue_()
            happened.append(f"请求 {route.request.url}")
            return route.abort()

        page.route("**/*", only_here)
        page.add_init_script("window.pwn = () => { window.pwned = 1 }")
        for name in published.names:
            page.goto(base + name.removesuffix("index.md").replace(".md", "/"), wait_until="load")
            # 把能点、能悬停、能展开的都试一遍
            page.evaluate(POKE)
            if page.evaluate("window.pwned") is not None:
                happened.append(f"脚本 {name}")
        for query in ("onerror", "script", "pwn"):
            page.locator("[data-md-component=search-query]").click()
            page.locator("[data-md-component=search-query]").fill(query)
            page.wait_for_selector(".md-search-result__link")
            page.wait_for_timeout(200)
        assert page.evaluate("window.pwned") is None
        browser.close()
    server.shutdown()
    server.server_close()
    assert happened == []


def test_published_text_has_no_secret_and_ends_no_element(published):
    for path in published.root.rglob("*"):
        if path.suffix in (".html", ".txt", ".md", ".json"):
            assert "秘密" not in path.read_text(encoding="utf-8"), path
    topic = (published.root / "rl/topic/index.html").read_text(encoding="utf-8")
    data = re.search(r'<script type="application/ld\+json">(.*?)</script>', topic)[1]
    assert "\\u003c/script\\u003e" in data and PWN in data
    assert os.environ["PATH"] not in topic


POKE = """() => {
  for (const node of document.querySelectorAll("article *")) {
    for (const type of ["mouseover", "focus", "toggle"]) node.dispatchEvent(new Event(type, {bubbles: true}))
    if (!node.closest("a, form") && node.click) node.click()
  }
}"""


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass
