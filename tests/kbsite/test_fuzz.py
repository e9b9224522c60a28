"""随机输入下的每一个解析器：不崩溃，不漏掉一个字，往返不变。

真值来自别的实现（MkDocs 的 front matter、pymdownx 的嵌入与公式、html.parser、ast），或者就是生成输入时记下的东西。
"""

import ast
import html
import json
import re
import subprocess
import time
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from markdown import Markdown
from mkdocs.utils import meta as mkdocs_meta
from pymdownx.snippets import SnippetPreprocessor

from kbsite import front_matter, machine, pages
from kbsite.errors import KbsiteError, NotebookSourceError
from kbsite.listing import shorten_docstrings
from kbsite.math.mathjax import node_executable
from kbsite.math.scan import formulas, mark_dollars, replace
from kbsite.notebooks.fragments import replace_figures, write_fragments
from kbsite.notebooks.run import Executed
from kbsite.notebooks.source import Cell, Notebook, read_notebook
from kbsite.search.aliases import read_aliases
from kbsite.search.readable import readable
from kbsite.search.sections import cut
from kbsite.topics import read_headings

# 每次用同样的输入，CI 上的失败在本机也失败；慢机器上不因超时而失败
fuzz = settings(
    max_examples=100, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
SEARCH = Path(__file__).parents[2] / "src/kbsite/search"
HEADER = "# ---\n# jupyter:\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n\n"  # fmt: skip


def pieces(*words):
    """由容易惹事的片段拼成的一行。"""
    return st.lists(st.sampled_from(words), max_size=8).map("".join)


def lines(*words, **sizes):
    return st.lists(pieces(*words), **sizes).map("\n".join)


# —— 笔记 ——

CODE = ("x = 1", "    ", '"""', "'", "#", "# ", "%", "!ls", "# %", "%%", "# %%", "# +", "#|", "label: a", " ", "中", "\\", "\t", "@", "?")  # fmt: skip


@fuzz
@given(cells=st.lists(st.tuples(st.booleans(), lines(*CODE, min_size=1, max_size=4)), min_size=1, max_size=4))
@example(cells=[(True, "x = 1\n# !ls\n#%time x"), (False, "!ls")])
def test_every_cell_of_a_notebook_comes_back(tmp_path_factory, cells):
    path = tmp_path_factory.getbasetemp() / "notebooks/rl/a.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    written = [(code, text.strip("\n")) for code, text in cells]
    # Markdown 单元里以 %% 开头的一行就是下一个单元的标记
    assume(all(text.strip() and (code or not re.search("^%%", text, re.M)) for code, text in written))
    parts = [
        f"# %%\n{text}" if code else "# %% [markdown]\n" + "\n".join(f"# {row}" for row in text.split("\n"))
        for code, text in written
    ]
    path.write_text(HEADER + "\n\n".join(parts) + "\n", encoding="utf-8")
    try:
        notebook = read_notebook(path, path.parents[1])
    except NotebookSourceError:
        return
    rows = path.read_text(encoding="utf-8").split("\n")
    assert [cell.kind == "code" for cell in notebook.cells] == [code for code, _ in written]
    for cell, (code, text) in zip(notebook.cells, written, strict=True):
        if code:
            assert cell.source == text
            assert rows[cell.line - 1] == text.split("\n")[0]
        else:
            assert [row.rstrip() for row in cell.source.split("\n")] == [
                row.rstrip() for row in text.split("\n")
            ]


@fuzz
@given(text=st.text(alphabet=st.sampled_from("#% |\n-jupyter:kb[]{}'\"中\x00\r\t\u2028x=1"), max_size=60))
def test_any_text_is_a_notebook_or_a_message(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "notebooks/rl/b.py"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(HEADER + text, encoding="utf-8")
    try:
        notebook = read_notebook(path, path.parents[1])
    except NotebookSourceError as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: .+。", str(error), re.S)
        return
    kept = "".join(cell.source for cell in notebook.cells)
    assert set(re.findall(r"[x中=]", text)) <= set(kept) | set(re.findall(r"# %%.*", text))


# —— 嵌入与片段 ——

INCLUDES = ("--8<--", "-8<-", "--8<---", " ", "  ", "\t", '"', "'", '"rl/a/x.md"', "'rl/a/x.md'", '"rl/a/y.md"', ";", "正文", "8<", "- 8<-", "[start:x]", "\r")  # fmt: skip
NOTEBOOK = Notebook("rl/a", Path("notebooks/rl/a.py"), (Cell("code", "x", 1, "x"), Cell("code", "y", 5, "y")))


@fuzz
@given(page=lines(*INCLUDES, min_size=1, max_size=5))
@example(page='--8<-- "rl/a/x.md" ')
def test_every_include_that_would_be_expanded_is_checked(page):
    page = page.replace("\r", "")
    try:
        used = pages.check_includes(page, "docs/a.md", {"rl/a": NOTEBOOK}, Path("."))
    except KbsiteError as error:
        assert re.match(r"docs/a\.md:\d+: ", str(error))
        return
    expanded = set()
    for row in page.split("\n"):
        match = SnippetPreprocessor.RE_ALL_SNIPPETS.match(row)
        if match and not match["escape"]:
            assert match["snippet"], "成块的嵌入没有被拒绝"
            expanded.add(match["snippet"][1:-1].removesuffix(".md"))
    assert used == expanded


OUTPUT = ("`", "```", "````", "`````python", "~~~", "--8<--", '--8<-- "mkdocs.yml"', "--8<-- [start:x]", "a --8<-- [end:x] b", ";", "<script>", "</code></pre>", "&lt;", "    ", "\t", "# 题", "???", ' note "x"', "$x$", "\\", "[^1]: y", "|", "*", "---", "中")  # fmt: skip


@fuzz
@given(code=lines(*OUTPUT, min_size=1, max_size=5), output=lines(*OUTPUT, min_size=1, max_size=5))
@example(code='--8<-- "mkdocs.yml"', output="--8<--\nmkdocs.yml\n--8<--")
def test_code_and_output_are_shown_to_the_letter(tmp_path_factory, code, output):
    folder = tmp_path_factory.getbasetemp() / "fragments"
    code, output = (text.replace("\t", "    ").strip("\n") for text in (code, output))
    assume(code.strip() and output.strip() and not any(row.startswith("#|") for row in code.split("\n")))
    cell = Cell("code", code, 1, "x")
    stream = [{"output_type": "stream", "name": "stdout", "text": output}]
    write_fragments([Executed(Notebook("rl/a", Path("a.py"), (cell,)), (stream,))], folder)
    page = _markdown(folder).convert('# 题\n\n--8<-- "rl/a/x.md"\n\n尾\n')
    shown = [
        html.unescape(text) for text in re.findall(r"<pre[^>]*><code[^>]*>(.*?)</code></pre>", page, re.S)
    ]
    assert [_plain(text) for text in shown] == [_plain(code), _plain(output)]
    assert page.endswith("<p>尾</p>")


def _markdown(folder):
    extensions = ["pymdownx.snippets", "pymdownx.superfences", "pymdownx.details", "pymdownx.highlight"]
    options = {
        "pymdownx.snippets": {"base_path": [str(folder)], "check_paths": True, "dedent_subsections": True},
        "pymdownx.highlight": {"use_pygments": False},
    }
    return Markdown(extensions=extensions, extension_configs=options)


def _plain(text):
    return [row.rstrip() for row in text.rstrip().split("\n")]


@fuzz
@given(
    body=lines("x = 1", "; y = 2", "    ", "第一句", '"', "'''", "\\", "\x0c", "\u2028", "#", min_size=1, max_size=4),
    quotes=st.sampled_from(['"""', "'''", 'r"""']),
    after=st.sampled_from(["\n    return 1\n", "\n\n    return 1\n", "; z = 3\n    return 1\n", "\n", " # 注\n    pass\n"]),
)  # fmt: skip
def test_listings_keep_the_code_whatever_the_docstring(body, quotes, after):
    source = f"def f():\n    {quotes}{body}{quotes[-3:]}{after}\n\nclass A:\n    x = 'a\x0cb'\n"
    try:
        expected = _without_docstrings(source)
    except (SyntaxError, ValueError):
        assume(False)
    assert _without_docstrings(shorten_docstrings(source)) == expected


def _without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.dump(tree)


# —— front matter 与 topics.yml ——

FRONT = ("---", "...", "title: ", "answer: ", "tags: [a]", "tags:", "题", "a: b", ": ", "- ", "  ", "[", "]", "{", "'", '"', "|", "#", "&x ", "*x", "!!python/name:os.system", "2026-02-30", "GRPO: ", "\t", "")  # fmt: skip


@fuzz
@given(
    source=st.one_of(lines(*FRONT, max_size=6), lines(*FRONT, max_size=4).map("---\n{}\n---\n正文".format))
)
def test_front_matter_agrees_with_mkdocs_or_is_refused(source):
    try:
        meta = front_matter.read(source, "docs/a.md")
    except KbsiteError as error:
        assert re.match(r"docs/a\.md:\d+: [^\n]+。$", str(error))
        return
    body, theirs = mkdocs_meta.get_data(source)
    assert meta == theirs
    front = front_matter.PATTERN.match(source)
    # 除了 front matter，一个字也没有少
    assert body.strip() == (source[front.end() :] if front else source).strip()


HEADING = st.text(alphabet="a中: #-'\"[]{}é，0", max_size=5)
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | HEADING,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["heading", "topics", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@fuzz
@given(
    rows=VALUES
    | st.lists(st.fixed_dictionaries({"heading": HEADING, "topics": st.lists(HEADING, max_size=2)}))
)
def test_topics_are_read_whole_or_refused(tmp_path_factory, rows):
    path = tmp_path_factory.getbasetemp() / "topics.yml"
    path.write_text(yaml.safe_dump(rows, allow_unicode=True), encoding="utf-8")
    try:
        found = read_headings(path)
    except KbsiteError as error:
        assert re.match(rf"{re.escape(str(path))}:\d+: ", str(error))
        return
    assert [(heading.title, list(heading.topics)) for heading in found] == [
        (row["heading"], row.get("topics", [])) for row in rows
    ]


# —— 公式 ——

TEX = st.lists(st.sampled_from(["a", "_b", "^{c}", " < ", " & ", r"\frac{1}{2}", r"\$", r"\text{中 文}", "'", '"', "|", "*x*", "_y_", "`", "[a](b)", "<b>", r"\\", "(", ")", "~", "#"]), min_size=1, max_size=6).map("".join)  # fmt: skip


@fuzz
@given(tex=st.lists(TEX, min_size=1, max_size=3), display=st.booleans())
def test_no_formula_of_a_page_is_lost_or_changed(tex, display):
    tex = [text.strip() for text in tex]
    assume(not any(text.endswith("\\") or text.startswith("`") or "`" in text for text in tex))
    fence = "$$" if display else "$"
    text = "\n\n".join(f"{fence}{part}{fence}" if display else f"甲 ${part}$ 乙。" for part in tex)
    options = {"pymdownx.arithmatex": {"generic": True}}
    page = Markdown(extensions=["pymdownx.arithmatex"], extension_configs=options).convert(text)
    assert [(formula.tex, formula.display) for formula in formulas(page)] == [(part, display) for part in tex]
    assert "arithmatex" not in replace(page, lambda formula: "")


TEXTS = st.lists(st.sampled_from(["$a$", "$$b$$", "$", "$$", "a", " ", "\\", "中", "1", "&lt;", "<b>", "</b>", "<code>", "</code>", '<a title="$">', "<!--", "-->", "<", ">", "\n"]), max_size=12).map("".join)  # fmt: skip


@fuzz
@given(text=TEXTS)
@example(text="$a$ ，$$b$$ 中 $1 与 $2")
def test_marking_dollars_can_be_undone(text):
    marked = mark_dollars(text)
    undone = re.sub(r'<span class="arithmatex">\\\[(.*?)\\\]</span>', r"$$\1$$", marked, flags=re.S)
    undone = re.sub(r'<span class="arithmatex">\\\((.*?)\\\)</span>', r"$\1$", undone, flags=re.S)
    assert undone == text


def mathml(children):
    leaf = st.builds(
        lambda tag, text: (tag, text),
        st.sampled_from(["mi", "mn", "mtext"]),
        st.sampled_from("abcxyz019中αθ"),
    )
    del children
    return st.recursive(
        leaf,
        lambda inner: st.one_of(
            *(
                st.tuples(st.just(tag), st.lists(inner, min_size=low, max_size=high))
                for tag, low, high in [("mrow", 0, 3), ("mfrac", 2, 2), ("msqrt", 1, 2), ("mroot", 2, 2), ("msub", 2, 2), ("msup", 2, 2), ("msubsup", 3, 3), ("munderover", 3, 3), ("mover", 2, 2), ("mtable", 0, 2), ("mtr", 0, 2), ("mstyle", 1, 2), ("没见过", 1, 2)]
            )
        ),
        max_leaves=12,
    )  # fmt: skip


@fuzz
@given(tree=mathml(None))
def test_every_letter_of_a_formula_can_be_searched(tree):
    letters = []

    def element(node):
        tag, content = node
        made = ET.Element(tag)
        if isinstance(content, str):
            made.text = content
            letters.append(content)
        else:
            made.extend([element(child) for child in content])
        return made

    root = ET.Element("math")
    root.append(element(tree))
    shown = readable(ET.tostring(root, encoding="unicode"))
    assert sorted(re.findall(r"[a-z019中αθ]", shown.replace("^(1/", "^("))) == sorted(letters)


# —— 网页 ——


def element(tag, attributes, children):
    return f"<{tag}{attributes}>{''.join(children)}</{tag}>"


TREES = st.recursive(
    st.sampled_from(["@", "@</blockquote>@"]),  # 没有开头的结束标签，浏览器不理会
    lambda inner: st.builds(
        element,
        st.sampled_from(["p", "em", "ul", "li", "pre", "code", "div", "details", "summary", "h2", "h3", "span", "table"]),
        st.sampled_from(["", ' id="a"', ' class="x"', ' data-search-exclude="true"']),
        st.lists(inner, max_size=3),
    ),
    max_leaves=10,
)  # fmt: skip


class Visible(HTMLParser):
    """另写一遍：数出不在「不进索引」的元素里的编号。"""

    def __init__(self, text):
        super().__init__()
        self.open, self.words = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.open.append("data-search-exclude" in dict(attrs))

    def handle_endtag(self, tag):
        if tag != "blockquote":
            self.open.pop()

    def handle_data(self, data):
        if not any(self.open):
            self.words += re.findall(r"w\d+", data)


@fuzz
@given(trees=st.lists(TREES, min_size=1, max_size=4))
def test_every_word_of_a_page_is_in_exactly_one_section(trees):
    number = iter(range(1000))
    text = re.sub("@", lambda _: f" w{next(number)} ", "".join(trees))
    sections = cut(text, "题目")
    found = [
        word for part in sections for word in re.findall(r"w\d+", f"{part.title} {part.prose} {part.code}")
    ]
    assert sorted(found) == sorted(Visible(text).words)


@fuzz
@given(text=st.lists(st.sampled_from(["<", ">", "</", "/>", "p", "details", ' id="', '"', "h2", "&", "&#x", "<!--", "<![CDATA[", "<?", "字", "</details>", "<summary>", "<details id=a>"]), max_size=15).map("".join))  # fmt: skip
def test_broken_html_never_stops_the_search_index(text):
    assert cut(text, "题目")[0].title == "题目"


NAMES = st.lists(
    st.sampled_from(["a", "a 2", "a-2", "A", "中", "！", "a 2 2", "<em>a</em>"]), min_size=1, max_size=7
)


@fuzz
@given(names=NAMES)
def test_every_heading_and_question_has_its_own_anchor(names):
    notebook, tokens = pages.repair_notebook("".join(f"<h2>{name}</h2>" for name in names), "rl/a", "../a/")
    anchors = re.findall(r'<h2 id="([^"]+)"', notebook)
    assert anchors == [token["id"] for token in tokens] and len(set(anchors)) == len(names)
    plain = "".join(f'<details class="question"><summary>{name}</summary>答</details>' for name in names)
    page = pages.name_questions(plain)
    anchors = re.findall(r' id="([^"]+)"', page)
    assert len(set(anchors)) == len(names) and re.sub(r' id="[^"]+"', "", page) == plain


PROSE = (
    "中文",
    "a",
    " ",
    "**b**",
    "$x$",
    "`c`",
    "> ",
    "- ",
    "1. ",
    "    ",
    "!!!",
    " ",
    '"',
    "{ .x }",
    "<br>",
    "](b.md)",
    "[x",
)


@fuzz
@given(text=lines(*PROSE, max_size=6))
def test_machine_readable_pages_keep_ordinary_text(text):
    assume(not re.search(r'^ *(!!!|\?\?\?\+?) \w+ "', text, re.M))
    made = machine.page_markdown("", text, lambda body: body, lambda target: target)
    assert made == text.strip("\n") + "\n"


CELLS = pieces("裁剪", "clip", "、", ", ", "（说明）", "(", "）", "`", "—", " ", "|", "\\")
ROWS = st.lists(CELLS, max_size=5).map(lambda cells: f"|{'|'.join(cells)}|")


@fuzz
@given(rows=st.lists(ROWS | CELLS, max_size=6))
def test_aliases_come_from_the_table_or_it_is_refused(rows):
    table = "\n".join(["| 用词 | English | 别名 | 说明 |", "| --- | --- | --- | --- |", *rows])
    try:
        groups = read_aliases(table)
    except KbsiteError as error:
        assert re.match(r"docs/about/terms\.md:\d+: 术语表的一行少于三列", str(error))
        return
    # 只去掉括号里的说明与反引号，说法本身一个字不改
    bare = re.sub(r"（[^）]*）|\([^)]*\)|`", "", table)
    assert all(len(group) > 1 and all(name and name in bare for name in group) for group in groups)


# —— 检索的切词：与浏览器里的是同一份脚本，一个 Node 进程答完全部问题 ——

SCRIPT = """
require("vm").runInThisContext(require("fs").readFileSync(process.argv[1], "utf8"))
require("readline").createInterface({input: process.stdin}).on("line", (line) => {
  const text = JSON.parse(line), terms = []
  indexTerms(text, (term) => terms.push(term))
  console.log(JSON.stringify({
    terms, fold: fold(text), twice: fold(fold(text)), compact: compact(text), again: compact(compact(text)),
    pieces: pieces(text).map((piece) => piece.text),
  }))
})
"""
# 基本平面里的字：检索按 UTF-16 的两个单位切
WORDS = st.lists(
    st.sampled_from(["灾难", "性", "遗忘", "根号", "Flash", "Attention", "d_k", "\\frac", "{", "}", " ", "-", "α", "√", "３", "Ｚ", "é", "ZeRO", "x1", "\u200b", "。", "\n", "ﬁ", "Ⅳ", "㎏"]),
    max_size=10,
).map("".join)  # fmt: skip


@pytest.fixture(scope="module")
def tokenize():
    process = subprocess.Popen(
        [node_executable(), "-e", SCRIPT, str(SEARCH / "text.js")],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, encoding="utf-8",
    )  # fmt: skip

    def ask(text):
        process.stdin.write(json.dumps(text) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    yield ask
    process.stdin.close()
    process.wait(timeout=10)
    process.stdout.close()


@fuzz
@given(text=WORDS)
def test_every_pair_of_chinese_characters_is_a_term(tokenize, text):
    answer = tokenize(text)
    assert answer["fold"] == answer["twice"] and answer["compact"] == answer["again"]
    for run in re.findall(r"[\u4e00-\u9fff]+", answer["fold"]):
        pairs = [run[i : i + 2] for i in range(len(run) - 1)] or [run]
        assert set(pairs) <= set(answer["terms"])
    # 查询用 pieces，索引用 indexTerms：查得到的都索引过
    for piece in answer["pieces"]:
        assert piece in answer["terms"] or re.fullmatch(r"[\u4e00-\u9fff]{3,}", piece)


@fuzz
@given(before=WORDS, text=st.text(alphabet="灾难性遗忘强化学习", min_size=2, max_size=6), after=WORDS)
def test_a_part_of_a_sentence_finds_the_sentence(tokenize, before, text, after):
    assume(not re.search(r"根$", before) and not after.startswith("号"))
    assert set(tokenize(text)["terms"]) <= set(tokenize(before + text + after)["terms"])


# —— 病态的输入：时间不能爆炸 ——


@pytest.mark.parametrize(
    ("parse", "unit"),
    [
        (mark_dollars, "$"), (mark_dollars, "$a "), (mark_dollars, "$$a"), (mark_dollars, "<pre>"), (mark_dollars, "<!--"),
        (lambda text: list(formulas(text)), '<span class="arithmatex">'),
        (pages.name_questions, '<details class="question"><summary>'),
        (lambda text: pages.repair_notebook(text, "rl/a", "."), '<div class="jp-InputPrompt">'),
        (lambda text: pages.repair_notebook(text, "rl/a", "."), "<h1>"),
        (lambda text: pages.check_includes(text, "a", {}, Path(".")), "-" * 20),
        (lambda text: pages.check_includes(text, "a", {}, Path(".")), " " * 20),
        (lambda text: replace_figures(text, {}), '<kb-figure ref="'),
        (lambda text: cut(text, "t"), "<a>字"), (lambda text: cut(text, "t"), "，  "), (lambda text: cut(text, "t"), "<a "),
        (lambda text: front_matter.read("---\n" + text, "a") if text.endswith("-\n---\n") else None, "--- x\n"),
        (lambda text: machine.page_markdown("", text, str, str), '<form class="kb-calculator"'),
        (lambda text: machine.page_markdown("", text, str, str), "]("),
        (lambda text: machine.page_markdown("", text, str, str), "{ .kb"),
    ],
)  # fmt: skip
def test_hostile_repetition_does_not_hang(parse, unit):
    started = time.process_time()
    parse(unit * 1000)
    assert time.process_time() - started < 5
