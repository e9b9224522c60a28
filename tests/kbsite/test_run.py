"""执行笔记：真的起内核。检查哪些被执行、出错时说什么、缓存坏了怎么办、能往哪里写。"""

import pytest

from kbsite.errors import NotebookRunError
from kbsite.notebooks.run import execute_all
from kbsite.notebooks.source import read_all


def run(project):
    return execute_all(read_all(project.root / "notebooks"), project.root, project.root / ".cache/notebooks")


def executed_names(project, caplog):
    """执行一次，返回真正跑过的笔记。"""
    caplog.clear()
    with caplog.at_level("INFO", logger="mkdocs.plugins.kbsite"):
        run(project)
    return sorted(record.args[2] for record in caplog.records if record.msg.startswith("  ["))


def text_of(outputs):
    return "".join(output.get("text", "") for output in outputs)


def test_only_notebooks_that_reach_an_edited_module_run_again(project, caplog):
    project.write("snippets/base.py", "X = 1\n")
    project.write("snippets/middle.py", "from snippets.base import X\n")
    project.notebook("rl/through", "# %%\nfrom snippets.middle import X\nprint(X)\n")
    project.notebook("rl/alone", "# %%\nprint('无关')\n")
    assert executed_names(project, caplog) == ["rl/alone", "rl/through"]
    assert executed_names(project, caplog) == []
    project.write("snippets/base.py", "X = 2\n")
    assert executed_names(project, caplog) == ["rl/through"]
    results = {result.notebook.key: text_of(result.outputs[0]) for result in run(project)}
    assert results == {"rl/alone": "无关\n", "rl/through": "2\n"}


def test_failing_cell_is_named_with_label_line_and_exception(project):
    path = project.notebook("rl/demo", "# %%\n#| label: ratio\nx = 1\ny = x / 0\n")
    line = path.read_text(encoding="utf-8").splitlines().index("y = x / 0") + 1
    with pytest.raises(NotebookRunError) as caught:
        run(project)
    message = str(caught.value)
    assert f"notebooks/rl/demo.py:{line} [ratio]: ZeroDivisionError: division by zero" in message
    assert "y = x / 0" in message


def test_one_failure_does_not_hide_another_nor_lose_good_work(project, caplog):
    project.notebook("rl/bad_one", "# %%\nraise KeyError('甲')\n")
    project.notebook("rl/bad_two", "# %%\nraise ValueError('乙')\n")
    project.notebook("rl/good", "# %%\nprint(1)\n")
    with pytest.raises(NotebookRunError) as caught:
        run(project)
    assert "甲" in str(caught.value) and "乙" in str(caught.value)
    (project.root / "notebooks/rl/bad_one.py").unlink()
    (project.root / "notebooks/rl/bad_two.py").unlink()
    assert executed_names(project, caplog) == []


def test_time_out_names_the_cell(project):
    header = "# ---\n# jupyter:\n#   kb:\n#     timeout: 2\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n\n"  # fmt: skip
    body = "# %%\nx = 1\n\n# %%\n#| label: endless\nimport time\ntime.sleep(60)\n"
    project.notebook("rl/demo", body, header=header)
    with pytest.raises(NotebookRunError, match=r"demo\.py:\d+ \[endless\]: 超时，2 s"):
        run(project)


@pytest.mark.parametrize(
    "statement",
    [
        "open({target!r}, 'w')",
        "__import__('pathlib').Path({target!r}).write_text('x')",
        "__import__('os').mkdir({target!r})",
        "__import__('os').rename('inside', {target!r})",
        "__import__('shutil').copyfile('inside', {target!r})",
        "__import__('os').symlink('inside', {target!r})",
    ],
)
def test_notebook_cannot_write_outside_its_folder(project, tmp_path_factory, statement):
    target = tmp_path_factory.mktemp("outside") / "file"
    code = statement.format(target=str(target))
    project.notebook("rl/demo", f"# %%\nopen('inside', 'w').close()\n\n# %%\n#| label: escape\n{code}\n")
    with pytest.raises(
        NotebookRunError, match=r"\[escape\]: PermissionError: 笔记不能写自己文件夹以外的文件"
    ):
        run(project)
    assert not target.exists()


def test_deleting_outside_files_is_refused(project, tmp_path_factory):
    victim = tmp_path_factory.mktemp("outside") / "file"
    victim.write_text("x")
    project.notebook("rl/demo", f"# %%\n#| label: escape\nimport os\nos.remove({str(victim)!r})\n")
    with pytest.raises(NotebookRunError, match="PermissionError"):
        run(project)
    assert victim.exists()


def test_writing_inside_its_own_folder_is_allowed(project):
    project.notebook("rl/demo", "# %%\nopen('a.txt', 'w').write('好')\nprint(open('a.txt').read())\n")
    assert text_of(run(project)[0].outputs[0]) == "好\n"


@pytest.mark.parametrize(
    "damage",
    [
        lambda good: b"",
        lambda good: good[:-1],
        lambda good: good.replace(b"7\\n", b"8\\n"),
        lambda good: good[65:],
    ],
    ids=["empty", "truncated", "one-digit", "without-checksum"],
)
def test_damaged_cache_entry_is_executed_again(project, caplog, damage):
    project.notebook("rl/demo", "# %%\nprint(7)\n")
    run(project)
    (entry,) = (project.root / ".cache/notebooks/rl/demo").iterdir()
    good = entry.read_bytes()
    assert damage(good) != good
    entry.write_bytes(damage(good))
    assert executed_names(project, caplog) == ["rl/demo"]
    assert entry.read_bytes() == good


def test_slow_printing_is_one_output(project):
    project.notebook(
        "rl/demo",
        "# %%\nimport time\nfor word in '甲乙丙':\n    print(word, flush=True)\n    time.sleep(0.4)\n",
    )
    assert [output["text"] for output in run(project)[0].outputs[0]] == ["甲\n乙\n丙\n"]


def test_environment_of_the_reader_does_not_reach_the_notebook(project, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    project.notebook(
        "rl/demo", "# %%\nimport os\nprint(os.environ.get('SECRET_TOKEN'), os.environ['OMP_NUM_THREADS'])\n"
    )
    assert text_of(run(project)[0].outputs[0]) == "None 1\n"
