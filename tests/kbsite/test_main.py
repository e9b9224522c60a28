"""命令行：子命令、退出码、写错时的消息。"""

import pytest

from kbsite.__main__ import main


@pytest.fixture(autouse=True)
def _stay(monkeypatch, project):
    monkeypatch.chdir(project.root)


def test_run_executes_one_notebook(project, capsys):
    project.notebook("rl/demo", "# %%\nprint(1)\n")
    project.notebook("rl/broken", "# %%\n1 / 0\n")
    assert main(["run", "rl/demo"]) == 0
    assert list((project.root / ".cache/notebooks/rl/demo").iterdir())


def test_unknown_key_is_an_error_that_lists_the_keys(project, capsys):
    project.notebook("rl/demo", "# %%\nprint(1)\n")
    assert main(["run", "rl/nothing"]) == 1
    assert "没有专题键为 'rl/nothing' 的笔记（有：rl/demo）" in capsys.readouterr().err


def test_failing_notebook_sets_the_exit_code(project, capsys):
    project.notebook("rl/broken", "# %%\n#| label: boom\n1 / 0\n")
    assert main(["run"]) == 1
    assert "[boom]: ZeroDivisionError" in capsys.readouterr().err


def test_topics_lists_headings_without_a_page(project, capsys):
    project.write("topics.yml", '- heading: "面经"\n- heading: "DPO"\n  topics: [rl/dpo]\n')
    assert main(["topics"]) == 0
    out = capsys.readouterr().out
    assert "rl/dpo" in out and "还没有页面的专题 1 个" in out


def test_clean_removes_the_cache(project):
    project.write(".cache/x", "1")
    assert main(["clean"]) == 0
    assert not (project.root / ".cache").exists()
