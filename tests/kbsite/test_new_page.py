"""新建一页：建出来就能严格建站、测试通过、合 ruff；写错了什么也不写；半途失败退回原样。"""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kbsite import new_page
from kbsite.__main__ import main
from kbsite.errors import KbsiteError
from kbsite.questions import nav_pages, read_nav

REPOSITORY = Path(__file__).parents[2]
FILES = ["docs/rl/new-one.md", "notebooks/rl/new_one.py", "snippets/rl/new_one.py", "tests/snippets/rl/test_new_one.py"]  # fmt: skip
LISTS = ["mkdocs.yml", "docs/index.md", "docs/rl/index.md"]


@pytest.fixture
def small(project):
    """两节；强化学习一节已有一页 rl/old，导航里有注释。"""
    project.write("docs/index.md", "# 首页\n\n- **[强化学习](rl/index.md)**：[旧的](rl/old.md)\n- **[训练](training/index.md)**：无\n")  # fmt: skip
    project.write("docs/rl/index.md", "# 强化学习\n\n| 页面 | 考什么 |\n| --- | --- |\n| [旧的](old.md) | 旧 |\n\n后记。\n")  # fmt: skip
    project.write("docs/rl/old.md", "---\ntitle: 旧的（Old, O）\n---\n\n# 旧的（Old, O）\n")
    project.write("docs/training/index.md", "# 训练\n")
    project.write("snippets/rl/__init__.py", "")
    project.write("snippets/training/__init__.py", "")
    project.nav("index.md")
    text = (project.root / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    nav = "nav:\n  - index.md\n  - 强化学习:\n      - rl/index.md # 目录\n      - rl/old.md # 旧页\n  - 训练:\n      - training/index.md\n"  # fmt: skip
    project.write("mkdocs.yml", f"{text}\n{nav}")
    return project


def snapshot(root):
    """文件 → 内容；符号链接指的是仓库自己的东西，不看。"""
    return {
        path: path.read_bytes()
        for path in root.rglob("*")
        if path.is_file() and not any(parent.is_symlink() for parent in path.parents)
    }


def run_pytest(root):
    """在 `root` 里用仓库的设置跑测试。"""
    shutil.copy(REPOSITORY / "pyproject.toml", root)
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_a_new_page_builds_strictly_at_once(small):
    assert main(["--root", str(small.root), "new-page", "rl/new-one", "新的：一页: A（New One, NO）"]) == 0
    result = small.build("--strict")
    assert result.returncode == 0, result.stdout + result.stderr
    html = small.page("rl/new-one")
    # 标题、嵌入的输出、嵌入的代码、排好的公式都在页面上
    assert "新的：一页: A（New One, NO）" in html and "1000.6931" in html
    assert "log_mean_exp" in html and "mjx-container" in html
    assert 'href="rl/new-one/"' in small.page("") and 'href="new-one/"' in small.page("rl")


def test_the_created_test_passes_and_refuses_a_broken_snippet(small):
    broken = {"sum": (".mean()", ".sum()"), "shift": ("return largest + ", "return "), "overflow": (" + (x - largest)", " * 0 + x")}  # fmt: skip
    for key in ("good", *broken):
        new_page.create(small.root, f"rl/{key}", f"标题 {key}")
    for key, (old, new) in broken.items():
        snippet = small.root / f"snippets/rl/{key}.py"
        good = snippet.read_text(encoding="utf-8")
        snippet.write_text(good.replace(old, new), encoding="utf-8")
        assert old in good
    out = run_pytest(small.root).stdout
    assert {line.split("::")[0] for line in out.splitlines() if line.startswith("FAILED")} == {
        f"FAILED tests/snippets/rl/test_{key}.py" for key in broken
    }, out


def test_created_code_is_clean_for_ruff(small):
    new_page.create(small.root, "rl/new-one", "新的")
    shutil.copy(REPOSITORY / "pyproject.toml", small.root)
    for command in (["check"], ["format", "--check"]):
        result = subprocess.run(
            [sys.executable, "-m", "ruff", *command, *FILES[1:]],
            cwd=small.root,
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout


def test_every_created_file_and_the_listing_ask_to_be_written(small):
    new_page.create(small.root, "rl/new-one", "新的")
    assert [name for name in [*FILES, "docs/rl/index.md"] if "【待写：" not in (small.root / name).read_text(encoding="utf-8")] == []  # fmt: skip


def test_lists_gain_exactly_one_entry_and_keep_the_rest(small):
    before = {name: (small.root / name).read_text(encoding="utf-8") for name in LISTS}
    new_page.create(small.root, "rl/new-one", "新的")
    after = {name: (small.root / name).read_text(encoding="utf-8") for name in LISTS}
    assert after["mkdocs.yml"] == before["mkdocs.yml"].replace(
        "      - rl/old.md # 旧页\n", "      - rl/old.md # 旧页\n      - rl/new-one.md\n"
    )
    assert after["docs/index.md"] == before["docs/index.md"].replace(
        "[旧的](rl/old.md)", "[旧的](rl/old.md)、[新的](rl/new-one.md)"
    )
    row = "| [新的](new-one.md) | 【待写：面试官在考什么，一行】 |\n"
    assert after["docs/rl/index.md"] == before["docs/rl/index.md"].replace("| 旧 |\n", f"| 旧 |\n{row}")


@pytest.mark.parametrize("title", ["是什么: 冒号（A: B）", "# 开头", "'引号' 与「引号」", "- 连字符", "yes"])
def test_titles_that_yaml_would_misread_come_back_whole(small, title):
    new_page.create(small.root, "rl/new-one", title)
    metas = {key: meta for _, key, meta in nav_pages(read_nav(small.root / "mkdocs.yml"), small.root / "docs")}  # fmt: skip
    assert metas["rl/new-one"]["title"] == title
    assert f"\n# {title}\n" in (small.root / "docs/rl/new-one.md").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("key", "title", "message"),
    [
        ("", "新的", "专题键 '' 不合规"),
        ("gspo", "新的", "专题键 'gspo' 不合规"),
        ("rl/New_One", "新的", "不合规"),
        ("rl/4d", "新的", "字母开头"),
        ("../rl/x", "新的", "不合规"),
        ("rl/x/y", "新的", "不合规"),
        ("rl/new\n", "新的", "不合规"),
        ("about/new", "新的", "没有 'about' 这一节。现有：rl、training"),
        ("rl/index", "新的", "不能用"),
        ("rl/lambda", "新的", "不能用"),
        ("rl/new-one", "", "缺标题"),
        ("rl/new-one", "  ", "缺标题"),
        ("rl/new-one", "甲|乙", "不能有 '|'"),
        ("rl/new-one", "甲\n乙", "不能有"),
        ("rl/new-one", "$x$ 是什么", "不能有 '$'"),
        ("rl/new-one", "<b>", "不能有 '<'"),
        ("rl/new-one", "旧的 (old,o)", "docs/rl/old.md: 已经是这个标题"),
        ("rl/old", "新的", "docs/rl/old.md: 已经有了，不覆盖"),
        ("training/new", "新的", "mkdocs.yml"),
    ],
)
def test_bad_input_is_told_and_writes_nothing(small, capsys, key, title, message):
    if "mkdocs.yml" in message:  # 导航里没有这一节
        config = small.root / "mkdocs.yml"
        config.write_text(config.read_text(encoding="utf-8").replace("      - training/index.md\n", "      - index.md\n"))  # fmt: skip
    before = snapshot(small.root)
    assert main(["--root", str(small.root), "new-page", key, title]) == 1
    assert message in capsys.readouterr().err
    assert snapshot(small.root) == before


@pytest.mark.parametrize("name", FILES)
def test_nothing_that_exists_is_overwritten(small, name):
    small.write(name, "别人写的\n")
    before = snapshot(small.root)
    with pytest.raises(KbsiteError, match=f"^{name}: 已经有了"):
        new_page.create(small.root, "rl/new-one", "新的")
    assert snapshot(small.root) == before


@pytest.mark.parametrize("fails_at", range(7))
def test_a_failure_half_way_leaves_everything_as_it_was(small, monkeypatch, fails_at):
    before, write, calls = snapshot(small.root), new_page.write_atomically, []

    def flaky(path, text):
        calls.append(path)
        if len(calls) == fails_at + 1:
            raise OSError("磁盘满了")
        write(path, text)

    monkeypatch.setattr(new_page, "write_atomically", flaky)
    with pytest.raises(OSError, match="磁盘满了"):
        new_page.create(small.root, "rl/new-one", "新的")
    assert snapshot(small.root) == before


def test_every_section_of_the_real_project_takes_a_new_page(tmp_path):
    """真的导航、首页、目录：每一节各加一页，导航里恰好多出这些，在各自一节的最后。"""
    for name in ("mkdocs.yml", "docs", "snippets"):
        copy = shutil.copy if (REPOSITORY / name).is_file() else shutil.copytree
        copy(REPOSITORY / name, tmp_path / name)
    before = read_nav(tmp_path / "mkdocs.yml")
    names = new_page.sections(tmp_path)
    assert {"architecture", "rl"} <= set(names) and not {"api", "about", "interviews"} & set(names)
    for name in names:
        new_page.create(tmp_path, f"{name}/brand-new", f"全新的一页 {name}")
    for old, new in zip(before, read_nav(tmp_path / "mkdocs.yml"), strict=True):
        (title, entries), (same, longer) = *old.items(), *new.items()
        added = [f"{name}/brand-new.md" for name in names if f"{name}/index.md" in entries]
        assert title == same and longer == (entries + added if added else entries)
