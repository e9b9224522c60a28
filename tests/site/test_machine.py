"""给机器读的，在建好的站上：llms.txt 的每个链接都在，每个专题页的 Markdown 完整，JSON-LD 每个专题页恰有一份。"""

import json
import posixpath
import re
from html.parser import HTMLParser
from urllib.parse import unquote, urlsplit

import pytest
import yaml
from sitetools import ROOT, html_pages

ADDRESS = "https://example.org/some-repo/"
FENCE = re.compile(r"^ *(`{3,}).*?^ *\1 *$", re.M | re.S)


def front_matter(text):
    return yaml.safe_load(text.split("---\n")[1])


def source(key):
    return (ROOT / "docs" / f"{key}.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def markdown(site, topic_pages):
    return {key: (site / key / "index.md").read_text(encoding="utf-8") for key in topic_pages}


def target_file(site, address):
    path = site / unquote(urlsplit(address).path).removeprefix("/some-repo/")
    return path / "index.html" if path.is_dir() else path


def test_every_link_of_llms_txt_leads_to_a_file_of_the_site(site, topic_pages):
    text = (site / "llms.txt").read_text(encoding="utf-8")
    links = re.findall(r"^- \[.+?\]\((\S+)\): .+$", text, re.M)
    assert len(links) == text.count("\n- ")
    assert [link for link in links if not link.startswith(ADDRESS)] == []
    assert [link for link in links if not target_file(site, link).is_file()] == []
    assert {link for link in links if link.endswith(".md")} == {f"{ADDRESS}{key}/index.md" for key in topic_pages}  # fmt: skip


def test_llms_txt_carries_the_title_and_the_answer_of_every_topic(site, topic_pages):
    lines = (site / "llms.txt").read_text(encoding="utf-8").splitlines()
    assert re.match(r"# \S", lines[0]) and re.match(r"> \S", lines[2])
    for key in topic_pages:
        meta = front_matter(source(key))
        assert f"- [{meta['title']}]({ADDRESS}{key}/index.md): {meta['answer'].strip()}" in lines


def test_the_markdown_keeps_the_front_matter_and_every_heading(markdown):
    for key, text in markdown.items():
        original = source(key)
        assert front_matter(text) == front_matter(original), key
        wanted = re.findall(r"^#+ .+$", FENCE.sub("", original), re.M)
        assert re.findall(r"^#+ .+$", FENCE.sub("", text), re.M)[: len(wanted)] == wanted, key


def test_the_markdown_has_every_line_of_the_embedded_cells_and_code(markdown):
    """片段取自 .cache，是网页嵌入的同一份；去掉的只有缩进、选项与片段标记。"""
    for key, text in markdown.items():
        rows = {row.strip() for row in text.splitlines()}
        for target, _, section in re.findall(r"--8<-- \"([^\":]+)(:([\w-]+))?\"", source(key)):
            content = (ROOT / ".cache/fragments" / target).read_text(encoding="utf-8")
            if section:
                content = re.search(rf"\[start:{section}\]\n(.*?)\n[^\n]*\[end:{section}\]", content, re.S)[1]
            blocks = [content] if section else [match[0] for match in FENCE.finditer(content)]
            lines = [row.strip() for block in blocks for row in block.splitlines() if "--8<--" not in row]
            assert [row for row in lines if row not in rows] == [], f"{key}: {target}"


def test_the_markdown_has_nothing_unresolved(markdown):
    for key, text in markdown.items():
        assert "--8<--" not in text and "kb-" not in text and ":material-" not in text, key
        prose = FENCE.sub("", text)
        assert "{{ " not in prose and not re.search(r"^ *(!!!|\?\?\?)", prose, re.M), key
        assert not re.search(r"<(svg|form|div|kb-\w+)\b", prose), key
        meta = front_matter(text)
        assert prose.count(meta["answer"].strip()) >= 1, key


def test_the_markdown_has_the_formulas_and_captions_of_the_page(site, markdown):
    """网页里每个图注、每个独立成行的公式，Markdown 里都有（公式比较去掉空白）。"""
    for key, text in markdown.items():
        html = (site / key / "index.html").read_text(encoding="utf-8")
        squeezed = re.sub(r"\s", "", text)
        page = Page(html)
        for caption in page.captions:
            assert f"（图：{caption}）" in text, key
        for tex in page.display:
            assert re.sub(r"\s", "", tex) in squeezed, f"{key}: {tex}"


def test_links_in_the_markdown_lead_to_files(site, markdown):
    broken = []
    for key, text in markdown.items():
        for link in re.findall(r"\]\(([^()\s]+)\)", FENCE.sub("", text)):
            if link.startswith(ADDRESS):
                if not target_file(site, link).is_file():
                    broken.append(f"{key}: {link}")
            elif not urlsplit(link).scheme and not link.startswith("#"):
                broken.append(f"{key}: {link} 不是完整的地址")
    assert broken == []


class Page(HTMLParser):
    """一页的 JSON-LD、指向 Markdown 的 link、图注、独立成行的公式。"""

    def __init__(self, text):
        super().__init__()
        self.data, self.alternates, self.captions, self.display = [], [], [], []
        self._into = None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if tag == "script" and attrs.get("type") == "application/ld+json":
            self.data.append("")
            self._into = self.data
        elif tag == "figcaption":
            self.captions.append("")
            self._into = self.captions
        elif tag == "link" and attrs.get("type") == "text/markdown":
            self.alternates.append(attrs)
        if "data-tex" in attrs and attrs.get("display") == "true":
            self.display.append(attrs["data-tex"])

    def handle_endtag(self, tag):
        if tag in ("script", "figcaption"):
            self._into = None

    def handle_data(self, data):
        if self._into is not None:
            self._into[-1] += data


def test_topic_pages_alone_name_their_markdown_and_describe_one_question(site, topic_pages):
    """谷歌对 QAPage 的要求：Question 有 name、answerCount 与一个答案，Answer 有 text。"""
    for url in html_pages(site):
        page = Page((site / url / "index.html").read_text(encoding="utf-8"))
        key = url.rstrip("/")
        if key not in topic_pages:
            assert page.data == [] and page.alternates == [], url
            continue
        assert page.alternates == [
            {"rel": "alternate convertedfrom", "type": "text/markdown", "href": "index.md"}
        ], url
        assert (site / posixpath.join(url, "index.md")).is_file()
        (text,) = page.data
        data, meta = json.loads(text), front_matter(source(key))
        assert (data["@context"], data["@type"]) == ("https://schema.org", "QAPage"), url
        assert data["inLanguage"] == "zh-Hans" and data["lastReviewed"] == str(meta["verified"]), url
        question = data["mainEntity"]
        assert question["@type"] == "Question" and question["name"] == meta["title"], url
        assert question["text"] == meta["description"] and question["answerCount"] == 1, url
        answer = question["acceptedAnswer"]
        assert answer["@type"] == "Answer" and answer["url"] == data["url"] == ADDRESS + url, url
        assert answer["text"] == meta["answer"].strip().replace("`", "").replace("**", ""), url


def test_the_files_for_machines_stay_small(site, markdown):
    """整份 llms.txt 与任何一页的 Markdown 都放得进常见的上下文窗口。"""
    sizes = {key: len(text.encode()) for key, text in markdown.items()}
    assert max(sizes.values()) < 80_000, max(sizes, key=sizes.get)
    assert (site / "llms.txt").stat().st_size < 40_000


def test_the_offline_site_has_none_of_it(offline_site):
    assert not (offline_site / "llms.txt").exists() and not list(offline_site.rglob("*.md"))
    html = (offline_site / "rl/clip.html").read_text(encoding="utf-8")
    assert "ld+json" not in html and "text/markdown" not in html
