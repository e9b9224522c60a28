"""bench/mutation.py 与 mutation_equivalents.tsv 的测试；不真的改坏代码，那是 make mutation 的事。"""

import sys

import pytest

from bench import mutation

ROOT = mutation.ROOT


def test_every_equivalent_mutant_names_a_line_that_is_still_there():
    """代码改了，表就得跟着改；是否真的抓不住，由 make mutation 逐条核对。"""
    rows = mutation.equivalents()
    wrong = []
    for (module, old, new), reason in rows.items():
        path = ROOT / f"snippets/{module}.py"
        text = path.read_text(encoding="utf-8") if path.is_file() else ""
        source = {line.strip() for line in text.splitlines()}
        # 一处改动跨几行时，各行以「; 」相连
        gone = old not in source and not {*old.split("; ")} <= source
        if gone or old == new or not reason.strip():
            wrong.append((module, old, new, reason))
    assert rows and not wrong


@pytest.mark.parametrize(
    ("rows", "code", "message"),
    [
        ("rl/clip\ta\tb\t理由\n", 0, "等价 1，漏网 0"),
        ("", 1, "  - a\n  + b\n"),
        ("rl/clip\ta\tb\t理由\nrl/clip\tc\td\t理由\n", 1, "多余的一条"),
        ("rl/clip\ta\tb\t理由\nrl/ppo\tc\td\t理由\n", 0, "等价 1，漏网 0"),  # 没有跑的模块不算多余
    ],
)
def test_unlisted_survivors_and_stale_rows_fail(rows, code, message, tmp_path, monkeypatch, capsys):
    """假装改坏 rl/clip 的三处，漏网一处：a 改成 b。"""
    table = tmp_path / "equivalents.tsv"
    table.write_text("# 模块\t原行\t改后\t为什么等价\n" + rows, encoding="utf-8")
    monkeypatch.setattr(mutation, "EQUIVALENTS", table)
    monkeypatch.setattr(mutation, "mutate", lambda module, folder, jobs: (3, [("survived", "a", "b")]))
    monkeypatch.setattr(sys, "argv", ["mutation.py", "rl/clip"])
    with pytest.raises(SystemExit) as stop:
        mutation.main()
    assert int(stop.value.code) == code and message in capsys.readouterr().out


def test_a_row_given_twice_is_refused(tmp_path, monkeypatch):
    table = tmp_path / "equivalents.tsv"
    table.write_text("rl/clip\ta\tb\t理由\nrl/clip\ta\tb\t另一个理由\n", encoding="utf-8")
    monkeypatch.setattr(mutation, "EQUIVALENTS", table)
    with pytest.raises(SystemExit, match="equivalents.tsv:2"):
        mutation.equivalents()
