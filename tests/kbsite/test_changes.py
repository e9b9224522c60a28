"""拉取请求：改动碰得到哪些测试（真的 git 仓库），摘要里有什么（真的建站），恶意的文字在里面只是文字。"""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
from markdown_it import MarkdownIt

from kbsite import changes
from kbsite.__main__ import main
from kbsite.errors import KbsiteError

REPOSITORY = Path(__file__).parents[2]


def write(root, name, text):
    path = root / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


def git(root, *args):
    settings = ["-c", "user.name=t", "-c", "user.email=t@example.org", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *settings, *args], cwd=root, check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path):
    """base 导入 leaf（相对导入），top 导入 base，alone 谁也不导入；各有测试。test_other 只在函数里导入 leaf。"""
    for name, code in {
        "leaf": "x = 1\n",
        "base": "from .leaf import x\n",
        "top": "from snippets.rl import base\n",
        "alone": "y = 1\n",
    }.items():
        write(tmp_path, f"snippets/rl/{name}.py", code)
        write(tmp_path, f"tests/snippets/rl/test_{name}.py", f"from snippets.rl.{name} import *\n")
        write(tmp_path, f"notebooks/rl/{name}.py", "# %%\n")
        write(tmp_path, f"docs/rl/{name}.md", "# 页\n")
    write(tmp_path, "tests/snippets/rl/test_other.py", "def test_x():\n    from snippets.rl.leaf import x\n")
    for name in ("snippets/__init__.py", "snippets/rl/__init__.py", "tests/snippets/tiny_models.py", "docs/about/x.md", "README.md"):  # fmt: skip
        write(tmp_path, name, "")
    git(tmp_path, "init", "--quiet", "--initial-branch=main")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "-m", "base")
    git(tmp_path, "switch", "--quiet", "-c", "work")
    return tmp_path


def own(found):
    """去掉内容变了总要跑的那些。"""
    count = len(changes.CONTENT_TESTS)
    assert found[-count:] == changes.CONTENT_TESTS
    return [re.sub(r".*/test_(\w+)\.py", r"\1", path) for path in found[:-count]]


@pytest.mark.parametrize(
    ("after", "everything"),
    [
        ("nav:\n  - a.md\n  - rl/new.md\n  - b.md\n", False),
        ("nav:\n  - b.md\n", False),
        ("nav:\n  - a.md\n  - b.md\nhooks:\n  - x.py\n", True),
        ("hooks: []\nnav:\n  - a.md\n  - b.md\n", True),
        ("nav:\n  - a.md\n  - x.py\n  - b.md\n", True),
    ],
)
def test_a_page_added_to_the_navigation_is_content(repository, after, everything):
    write(repository, "mkdocs.yml", "nav:\n  - a.md\n  - b.md\n")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "nav")
    git(repository, "switch", "--quiet", "-c", "more")
    write(repository, "mkdocs.yml", after)
    write(repository, "tests/site/queries.tsv", "zh\t词\trl/new\n")
    expected = changes.EVERYTHING if everything else changes.CONTENT_TESTS
    assert changes.affected(repository, "work") == expected


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("docs/rl/alone.md", []),
        ("docs/about/x.md", []),
        ("README.md", []),
        (".github/ISSUE_TEMPLATE/a.yml", []),
        ("notebooks/rl/alone.py", ["alone"]),
        ("notebooks/rl/leaf.py", ["leaf"]),
        ("tests/snippets/rl/test_leaf.py", ["leaf"]),
        ("snippets/rl/alone.py", ["alone"]),
        ("snippets/rl/top.py", ["top"]),
        ("snippets/rl/base.py", ["base", "top"]),
        ("snippets/rl/leaf.py", ["base", "leaf", "other", "top"]),
        ("snippets/rl/__init__.py", ["alone", "base", "leaf", "other", "top"]),
        ("snippets/rl/brand_new.py", []),
    ],
)
def test_a_change_reaches_its_own_tests_and_those_that_import_it(repository, name, wanted):
    write(
        repository,
        name,
        (repository / name).read_text() + "\n" if (repository / name).exists() else "z = 1\n",
    )
    assert own(changes.affected(repository, "main")) == wanted  # 还没有提交
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "change")
    assert own(changes.affected(repository, "main")) == wanted
    assert own(changes.affected(repository, "HEAD^1")) == wanted


@pytest.mark.parametrize(
    "name",
    ["Makefile", "mkdocs.yml", "pyproject.toml", "requirements/site.in", "src/kbsite/pages.py", "src/kbsite/x.md", "overrides/main.html", "docs/assets/x.js", "docs/service-worker.js", ".github/workflows/check.yml", "tests/snippets/tiny_models.py", "tests/snippets/rl/helper.py", "tests/snippets/rl/conftest.py", "tests/kbsite/conftest.py", "tests/golden/x.json", "snippets/scalars.py", "topics.yml", "snippets/rl/a b.py", "tests/snippets/rl/test_$(id).py", "tests/snippets/rl/test_x;id.py", "docs/rl/--help.md\n.md"],
)  # fmt: skip
def test_anything_shared_or_odd_reaches_everything(repository, name):
    write(repository, name, "x")
    assert changes.affected(repository, "main") == ["tests"]


def test_a_removed_snippet_reaches_everything_and_a_removed_page_does_not(repository):
    (repository / "docs/rl/alone.md").unlink()
    assert own(changes.affected(repository, "main")) == []
    (repository / "snippets/rl/alone.py").unlink()
    assert changes.affected(repository, "main") == ["tests"]


def test_commits_of_the_base_after_the_fork_do_not_count(repository):
    write(repository, "docs/rl/leaf.md", "# 改\n")
    git(repository, "commit", "--quiet", "-am", "work")
    git(repository, "switch", "--quiet", "main")
    write(repository, "Makefile", "x")
    git(repository, "add", ".")
    git(repository, "commit", "--quiet", "-m", "main")
    git(repository, "switch", "--quiet", "work")
    assert changes.changed_files(repository, "main") == ["docs/rl/leaf.md"]


@pytest.mark.parametrize("base", ["nothing", "--output=x", ""])
def test_an_unknown_base_is_an_error_and_writes_nothing(repository, capsys, base):
    assert main(["--root", str(repository), "affected", *(["--"] if base.startswith("-") else []), base]) == 1
    assert "git 找不到" in capsys.readouterr().err and not (repository / "x").exists()


def test_every_tool_test_that_reads_real_content_runs_for_content():
    """换一种数法：源文件里以仓库根拼出 docs、notebooks、snippets、topics.yml 的测试。"""
    real = re.compile(r"(?:ROOT|REPOSITORY)(?: / |\.r?glob\(|, read_all|\b.{0,30}copytree)\W*f?\"?(?:docs(?!/assets)|notebooks|snippets|topics|REPOSITORY|\*)|in \(\"mkdocs\.yml\", \"docs\"")  # fmt: skip
    found = {
        f"tests/kbsite/{path.name}"
        for path in (REPOSITORY / "tests/kbsite").glob("test_*.py")
        if path.name != "test_changes.py" and real.search(path.read_text(encoding="utf-8"))
    }
    assert found == set(changes.CONTENT_TESTS) - {"tests/site"}
    assert all((REPOSITORY / name).exists() for name in changes.CONTENT_TESTS)


class Tags(HTMLParser):
    """一段 HTML 的标签与文字。"""

    def __init__(self, html):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words += data


def rendered(markdown):
    """像 GitHub 那样排：允许 HTML，有表格，裸地址成链接。"""
    return Tags(MarkdownIt("gfm-like").render(markdown))


HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "</code></td></table><h1>x",
    "[点我](https://example.org) ![图](https://example.org/x.png)",
    "https://example.org www.example.org a@example.org",
    "`code` ``` ~~~ **粗** _斜_ ~~删~~ # 标题",
    "| 多 | 一 | 列 |",
    "a\\|b \\",
    "&lt;b&gt; &#60;b&#62;",
    "一行\n\n# 标题\n\n- 表",
    "$\\href{javascript:x}{y}$ @someone #1",
    "\u202e反写\u2066\x1b[31m\x00",
]


@pytest.mark.parametrize("value", HOSTILE)
def test_hostile_text_is_only_text_in_a_table(value):
    page = rendered(f"| 甲 | 乙 |\n| --- | --- |\n| {changes.text(value)} | 完 |\n")
    assert [tag for tag, _ in page.tags] == [
        "table",
        "thead",
        "tr",
        "th",
        "th",
        "tbody",
        "tr",
        "td",
        "code",
        "td",
    ]
    shown = page.words.split("乙")[1].rpartition("完")[0].strip()
    assert shown == "".join(c if c.isprintable() else "�" for c in " ".join(value.split()))


@pytest.mark.parametrize("value", [*HOSTILE, "`" * 9, "a\n```\n<img src=x>\n````\n# b"])
def test_hostile_text_cannot_leave_its_fence(value):
    page = rendered(changes.fence(value.splitlines(), "diff") + "\n\n后面\n")
    assert [tag for tag, _ in page.tags] == ["pre", "code", "p"] and page.words.endswith("后面\n")


TITLE = "坏 | `]` [x](https://example.org) &lt;b&gt;"


def test_the_summary_of_two_real_builds(project):
    """合并前后各建一次：改参考实现、改一页的字、删一页、添一页；数都能手算。"""
    root = project.root
    project.write("snippets/rl/__init__.py", "")
    project.write(
        "snippets/rl/demo.py", "# --8<-- [start:f]\ndef f(x):\n    return x + 1\n\n\n# --8<-- [end:f]\n"
    )
    cells = '# %%\n#| label: {}\nfrom snippets.rl.demo import f\nprint("f(1) =", f(1), "甲", {})\nprint("```<img src=x>", 7)\n\n'
    project.notebook(
        "rl/demo",
        cells.format("first", "f(2)") + cells.replace("f(1)", "2").format("second", "3.5").rstrip("\n"),
    )
    front = "---\ntitle: '{}'\ndescription: x\n---\n\n# 页\n\n"
    embed = '--8<-- "rl/demo/first.md"\n\n--8<-- "rl/demo/second.md"\n'
    project.write("docs/rl/cells.md", front.format("嵌单元") + embed)
    project.write(
        "docs/rl/code.md", front.format("嵌代码") + '```python\n--8<-- "snippets/rl/demo.py:f"\n```\n'
    )
    project.write("docs/rl/words.md", front.format(TITLE) + "旧\n")
    project.write("docs/rl/same.md", front.format("不变") + "同\n")
    project.write("docs/rl/gone.md", front.format("要删的") + "旧\n")
    pages = ("cells", "code", "words", "same", "gone")
    project.nav("index.md", *(f"rl/{name}.md" for name in pages))
    assert project.build("--strict").returncode == 0
    before = root.parent / "before"
    shutil.copytree(root, before, symlinks=True)

    project.write(
        "snippets/rl/demo.py", "# --8<-- [start:f]\ndef f(x):\n    return x + 2\n\n\n# --8<-- [end:f]\n"
    )
    project.write("docs/rl/words.md", front.format(TITLE) + "新" * 4000 + "\n")
    project.write("docs/rl/fresh.md", front.format("新添的") + "新\n")
    (root / "docs/rl/gone.md").unlink()
    project.nav("index.md", *(f"rl/{name}.md" for name in ("cells", "code", "words", "same", "fresh")))
    project.write("redirects.yml", '"rl/gone/": "rl/same/"\n')
    assert project.build("--strict").returncode == 0

    markdown = changes.summary(before, root)
    page = rendered(markdown)
    assert {tag for tag, _ in page.tags} <= {
        "h2",
        "h3",
        "table",
        "thead",
        "tbody",
        "tr",
        "th",
        "td",
        "code",
        "p",
        "pre",
        "ul",
        "li",
    }
    cells = [row.split("|") for row in page_rows(markdown)]
    found = {name: (title, reasons) for name, title, reasons, *_ in cells}
    assert found == {
        "docs/rl/cells.md": ("嵌单元", "单元"),
        "docs/rl/code.md": ("嵌代码", "参考实现"),
        "docs/rl/words.md": (TITLE.replace("|", "¦"), "正文"),
        "docs/rl/fresh.md": ("新添的", "新页面"),
        "docs/rl/gone.md": ("要删的", "删去"),
    }
    weights = {name: (old, new, ratio) for name, _, _, old, new, ratio in cells}
    assert weights["docs/rl/fresh.md"][0] == "—" and weights["docs/rl/gone.md"][1:] == ("—", "—")
    old, new, ratio = weights["docs/rl/words.md"]
    assert float(ratio) == round(int(new) / int(old), 2) and 1 < int(new) / int(old) < 1.5
    # 第一个单元两个数变了；第二个没有变，不列
    assert "### 输出变了的单元（1）" in markdown and "rl/demo [first]：2 个数不同" in page.words
    assert "-f(1) = 2 甲 3\n+f(1) = 3 甲 4\n" in markdown
    # 移走的有转向，不算不见了；没有转向、也没有登记过的要说
    assert "不见了" not in page.words
    (root / "redirects.yml").unlink()
    assert "rl/gone/" in rendered(changes.summary(before, root)).words.partition("不见了的地址（1）")[2]


def page_rows(markdown):
    """页面表格的各行，一行里的格用 | 连起来；格里的 | 写成 ¦。"""
    html = MarkdownIt("gfm-like").render(markdown).partition("<tbody>")[2].partition("</tbody>")[0]
    for row in html.split("</tr>")[:-1]:
        cells = re.findall(r"<td[^>]*>(.*?)</td>", row, re.S)
        yield "|".join(Tags(cell).words.replace("|", "¦") for cell in cells)


def built(root, outputs, page="# 页\n"):
    """只有摘要要读的那些文件的「建好的项目」；`outputs` 是标签 → 输出。"""
    write(root, "site/index.html", "<p>")
    write(root, "docs/rl/demo.md", page)
    cells = [
        {"cell_type": "code", "id": label, "source": f"#| label: {label}\n1", "outputs": [output]}
        for label, output in outputs.items()
    ]
    write(root, ".cache/ipynb/notebooks/rl/demo.ipynb", json.dumps({"cells": cells}))
    return root


def words(text):
    return {"output_type": "stream", "name": "stdout", "text": text}


def figure(svg):
    return {"output_type": "display_data", "data": {"image/svg+xml": svg, "text/plain": "<Figure 1>"}}


def test_new_removed_and_redrawn_cells_are_named(tmp_path):
    base = built(tmp_path / "a", {"gone": words("1"), "drawn": figure("<svg>1"), "told": words("甲"), "same": figure("<svg>")})  # fmt: skip
    head = built(tmp_path / "b", {"new": words("2"), "drawn": figure("<svg>2"), "told": words("乙"), "same": figure("<svg>")})  # fmt: skip
    told = rendered(changes.summary(base, head)).words
    for fact in ("[gone]：删去", "[new]：新单元", "[drawn]：图不同", "[told]：只有文字不同", "（4）"):
        assert fact in told


@pytest.mark.parametrize(
    ("before", "after", "number"),
    [("0.5 与 3", "0.6 与 3", 1), ("1e-5", "1e-6", 1), ("1 2 3", "1 3", 1), ("1 2", "3 4", 2), ("-1", "1", 1), ("x 1", "y 1", 0)],
)  # fmt: skip
def test_changed_numbers_are_counted(before, after, number):
    assert changes.changed_numbers(before, after) == number


def test_a_huge_summary_stays_small_and_says_so(tmp_path):
    base = built(tmp_path / "a", {f"c{i}": words("1\n" * 900) for i in range(90)})
    head = built(tmp_path / "b", {f"c{i}": words("2\n" * 900 + "x" * 9**5) for i in range(90)})
    markdown = changes.summary(base, head)
    assert len(markdown.encode()) < 2**20 / 2
    assert "另有 50 个单元没有列出" in markdown and "另有 1771 行" in markdown


def test_nothing_changed_is_said_plainly(tmp_path):
    markdown = changes.summary(
        built(tmp_path / "a", {"x": words("1")}), built(tmp_path / "b", {"x": words("1")})
    )
    assert "没有页面变化" in markdown and "没有单元的输出变化" in markdown


def test_without_a_built_base_the_pages_are_still_listed(tmp_path):
    """没有合并前的片段：不能把每一页都说成「单元变了」。"""
    embed = '--8<-- "rl/demo/x.md"\n'
    write(tmp_path / "a", "docs/rl/demo.md", f"# 旧\n\n{embed}")
    head = built(tmp_path / "b", {"x": words("1")}, f"# 新\n\n{embed}")
    write(head, ".cache/fragments/rl/demo/x.md", "1\n")
    markdown = changes.summary(tmp_path / "a", head)
    assert [row.split("|")[:3] for row in page_rows(markdown)] == [
        ["docs/rl/demo.md", "docs/rl/demo.md", "正文"]
    ]
    assert "没有比较" in markdown


def test_a_head_that_was_not_built_is_an_error_with_the_cure(tmp_path):
    with pytest.raises(KbsiteError, match="make build"):
        changes.summary(tmp_path, tmp_path)
