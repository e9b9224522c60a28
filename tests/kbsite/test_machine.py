"""给机器读的：Markdown 里嵌入都已展开、链接都对；llms.txt 合乎格式；JSON-LD 放进网页也出不来。"""

import json
from html.parser import HTMLParser

import pytest

from kbsite.machine import head, llms_txt, markdown_url, page_markdown, plain, snippet_expander


def convert(markdown, *, source="", expand=lambda text: text, link=lambda target: target):
    return page_markdown(source, markdown, expand, link)


def test_front_matter_is_kept_to_the_letter():
    source = '---\ntitle: 题（X）\nanswer: "答 $a$"\n---\n\n# 题\n\n---\n\n尾\n'
    text = convert("# 题\n\n---\n\n尾\n", source=source)
    assert text == source


def test_blocks_become_bold_titles_and_lose_their_indent():
    text = convert(
        '!!! abstract "一句话回答"\n    答。\n\n??? question "问？"\n    段。\n\n'
        '    ??? code "代码"\n\n        ```python\n        if x:\n\n            y\n        ```\n\n    段尾。\n\n正文。\n'
    )
    assert text == (
        "**一句话回答**\n\n答。\n\n**问？**\n\n段。\n\n"
        "**代码**\n\n\n```python\nif x:\n\n    y\n```\n\n段尾。\n\n正文。\n"
    )


def test_a_block_inside_a_list_stays_in_the_list():
    text = convert('1. 甲\n\n    ??? note "注"\n        内。\n\n    乙\n\n2. 丙\n')
    assert text == "1. 甲\n\n    **注**\n\n    内。\n\n    乙\n\n2. 丙\n"


def test_two_blocks_in_a_row_do_not_nest():
    assert convert('??? a "一"\n    1\n??? a "二"\n    2\n') == "**一**\n\n1\n**二**\n\n2\n"


def test_figures_and_calculators_become_words():
    form = '<form class="kb-calculator" data-x="&lt;">\n<p><strong>显存 &lt; 1</strong></p>\n<input></form>'
    text = convert(f'<kb-figure ref="rl/a/b/0">比值 &lt; 1</kb-figure>\n\n{form}\n\n<br>留着\n')
    assert text == "（图：比值 < 1）\n\n（计算器「显存 < 1」，在网页上用）\n\n<br>留着\n"


def test_only_decoration_is_dropped():
    text = convert(
        "说明\n{ .kb-caption }\n\n    说明\n    { .kb-caption }\n\n"
        '## 题 { #notes-heading .kb-footer data-toc-label="x" }\n\n[:material-code-braces: 文档](a.md)\n\n'
        "$x_{ .5 }$、$\\text{ #1 }$、`{ .kb-x }` 与 {{ nl }}\n选择器 { .other }\n"
    )
    assert text == (
        "说明\n\n    说明\n\n## 题\n\n[文档](a.md)\n\n$x_{ .5 }$、$\\text{ #1 }$、`{ .kb-x }` 与 {{ nl }}\n选择器 { .other }\n"
    )


def test_internal_links_are_asked_for_and_keep_their_anchor():
    seen = []

    def link(target):
        seen.append(target)
        return f"<{target}>"

    text = convert(
        "[甲](b.md)、[乙](../t/c.md#d)、[笔记](../n/e.ipynb)、[外](https://x.org/f.md)、[内](#g)", link=link
    )
    assert seen == ["b.md", "../t/c.md", "../n/e.ipynb"]
    assert text.startswith("[甲](<b.md>)、[乙](<../t/c.md>#d)、[笔记](<../n/e.ipynb>)、[外](https://x.org/f.md)、[内](#g)")  # fmt: skip


def test_includes_are_expanded_as_in_the_page(tmp_path):
    (tmp_path / "cell.md").write_text("````text\n0.5\n````\n", encoding="utf-8")
    code = "# --8<-- [start:f]\ndef f():\n    return 1\n# --8<-- [end:f]\nrest = 2\n"
    (tmp_path / "code.py").write_text(code, encoding="utf-8")
    expand = snippet_expander({"base_path": [str(tmp_path)], "check_paths": True})
    text = convert(
        '--8<-- "cell.md"\n\n??? example "例"\n\n    ```python\n    --8<-- "code.py:f"\n    ```\n',
        expand=expand,
    )
    assert text == "````text\n0.5\n````\n\n\n**例**\n\n\n```python\ndef f():\n    return 1\n```\n"


@pytest.mark.parametrize(
    ("url", "expected"), [("rl/clip/", "rl/clip/index.md"), ("rl/clip.html", "rl/clip.md")]
)
def test_markdown_lies_next_to_the_page(url, expected):
    assert markdown_url(url) == expected


def test_llms_txt_has_the_agreed_shape():
    text = llms_txt(
        "站",
        "摘要",
        "说明",
        {"甲": [("题（X）", "a/index.md", "答。")], "Optional": [("关于", "b/", "介绍。")]},
    )
    assert text == (
        "# 站\n\n> 摘要\n\n说明\n\n## 甲\n\n- [题（X）](a/index.md): 答。\n\n## Optional\n\n- [关于](b/): 介绍。\n"
    )  # fmt: skip


class Elements(HTMLParser):
    """浏览器看到的元素：标签、属性、`<script>` 的内容。"""

    def __init__(self, html):
        super().__init__()
        self.tags, self.scripts = [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.scripts:
            self.scripts[-1] += data


META = {
    "title": "题",
    "description": "说的是什么",
    "answer": "答 **要点**、`f` 与 $\\pi^*<1$",
    "verified": "2026-01-02",
}


def test_head_names_the_markdown_and_describes_question_and_answer():
    html = head("题", META, "https://x.org/rl/a/", "index.md")
    page = Elements(html)
    assert "说的是什么" in html  # 汉字不转义，省一半字节
    assert page.tags == [
        ("link", {"rel": "alternate convertedfrom", "type": "text/markdown", "href": "index.md"}),
        ("script", {"type": "application/ld+json"}),
    ]
    assert json.loads(page.scripts[0]) == {
        "@context": "https://schema.org",
        "@type": "QAPage",
        "inLanguage": "zh-Hans",
        "url": "https://x.org/rl/a/",
        "lastReviewed": "2026-01-02",
        "mainEntity": {
            "@type": "Question",
            "name": "题",
            "text": "说的是什么",
            "answerCount": 1,
            "acceptedAnswer": {
                "@type": "Answer",
                "text": "答 要点、f 与 $\\pi^*<1$",
                "url": "https://x.org/rl/a/",
            },
        },
    }


def test_without_a_deployed_address_no_address_is_claimed():
    data = json.loads(Elements(head("题", META, None, "index.md")).scripts[0])
    assert "url" not in data and "url" not in data["mainEntity"]["acceptedAnswer"]


@pytest.mark.parametrize("text", ["</script><b>", "<!--<script>", "a & b &lt; c", ']]>\u2028"\\'])
def test_no_content_can_leave_the_script_element(text):
    html = head(text, META | {"answer": text, "description": text}, None, 'i".md')
    page = Elements(html + "<i>")
    assert [tag for tag, _ in page.tags] == ["link", "script", "i"] and page.tags[0][1]["href"] == 'i".md'
    question = json.loads(page.scripts[0])["mainEntity"]
    assert question["name"] == question["text"] == question["acceptedAnswer"]["text"] == text
    body = html.partition('ld+json">')[2].removesuffix("</script>")
    assert not set("<>&") & set(body)


def test_plain_keeps_stars_inside_formulas():
    assert plain("**甲** `乙` $\\pi^*$") == "甲 乙 $\\pi^*$"


def topic(project):
    project.write("docs/rl/index.md", "---\ntitle: 目录\ndescription: 一节。\n---\n\n# 目录\n")
    project.write(
        "docs/rl/demo.md",
        "---\ntitle: 演示\ndescription: 说明\ndifficulty: 2\nanswer: 答 </script>\n---\n\n# 演示\n\n{{ answer }}\n\n"
        '[另](other.md#x)、[目录](index.md)\n\n--8<-- "rl/demo/out.md"\n',
    )
    project.write("docs/rl/other.md", "---\ntitle: 另\ndifficulty: 1\nanswer: 乙\n---\n\n# 另\n\n## x\n")
    project.notebook("rl/demo", "# %%\n#| label: out\nprint('算出来的')\n")
    text = (project.root / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    pages = ["rl/index.md", "rl/demo.md", "rl/other.md"]
    nav = "  - index.md\n  - 强化学习:\n" + "".join(f"      - {page}\n" for page in pages)
    project.write("mkdocs.yml", f"{text}\nnav:\n{nav}")


def test_built_site_offers_the_markdown_of_topic_pages_only(project):
    topic(project)
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    site = project.root / "site"
    assert {path.relative_to(site).as_posix() for path in site.rglob("*.md")} == {"rl/demo/index.md", "rl/other/index.md"}  # fmt: skip
    text = (site / "rl/demo/index.md").read_text(encoding="utf-8")
    assert "算出来的" in text and "\n答 </script>\n" in text and "--8<--" not in text
    assert "[另](../other/index.md#x)、[目录](../)" in text and "(../../notebooks/rl/demo/)" in text
    llms = (site / "llms.txt").read_text(encoding="utf-8")
    assert "## 强化学习\n\n- [演示](rl/demo/index.md): 答 </script>\n- [另](rl/other/index.md): 乙\n" in llms
    assert llms.endswith("## Optional\n\n- [目录](rl/): 一节。\n")
    for url, count in (("rl/demo", 1), ("rl/other", 1), ("rl", 0), ("notebooks/rl/demo", 0)):
        assert project.page(url).count("application/ld+json") == count, url

    result = project.build("--strict", SITE_URL="https://x.org/s")
    assert result.returncode == 0, result.stderr
    assert "[另](https://x.org/s/rl/other/index.md#x)" in (site / "rl/demo/index.md").read_text(
        encoding="utf-8"
    )
    assert "](https://x.org/s/rl/demo/index.md): " in (site / "llms.txt").read_text(encoding="utf-8")

    result = project.build("--strict", KB_OFFLINE="true", DIRECTORY_URLS="false")
    assert result.returncode == 0, result.stderr
    assert not list(site.rglob("*.md")) and not (site / "llms.txt").exists()
    assert "application/ld+json" not in (site / "rl/demo.html").read_text(encoding="utf-8")
