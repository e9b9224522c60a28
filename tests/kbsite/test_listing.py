"""嵌入用的副本：文档串变短，代码不变。真值是两份源码去掉文档串之后的语法树。"""

import ast
from pathlib import Path

import pytest

from kbsite.listing import shorten_docstrings, write_listings

ROOT = Path(__file__).parents[2]
MODULES = sorted(path for path in (ROOT / "snippets").rglob("*.py") if path.stem != "__init__")


def without_docstrings(source):
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
            node.body[0].value.value = ""
    return ast.dump(tree)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_code_is_unchanged_and_markers_survive(path):
    source = path.read_text(encoding="utf-8")
    short = shorten_docstrings(source)
    assert without_docstrings(short) == without_docstrings(source)
    assert short.count("--8<--") == source.count("--8<--")
    for node in ast.walk(ast.parse(short)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert "\n" not in (ast.get_docstring(node) or "")


def test_first_sentence_stays():
    source = 'def f(x):\n    r"""两倍。\n\n    $$y=2x$$\n    """\n\n    return 2 * x\n'
    assert shorten_docstrings(source) == 'def f(x):\n    r"""两倍。"""\n    return 2 * x\n'


def test_a_form_feed_does_not_shift_the_lines():
    source = 'x = "a\x0cb"\n\n\ndef f(x):\n    """两倍。\n\n    细节\n    """\n    return 2 * x\n'
    assert shorten_docstrings(source) == 'x = "a\x0cb"\n\n\ndef f(x):\n    """两倍。"""\n    return 2 * x\n'


def test_nested_functions_and_one_line_docstrings():
    source = 'def f():\n    """甲。"""\n    def g():\n        """乙。\n\n        丙\n        """\n        return 1\n    return g\n'
    assert shorten_docstrings(source) == (
        'def f():\n    """甲。"""\n    def g():\n        """乙。"""\n        return 1\n    return g\n'
    )


def test_files_are_written_once_and_orphans_removed(tmp_path):
    source = tmp_path / "snippets/rl/a.py"
    source.parent.mkdir(parents=True)
    source.write_text('def f():\n    """甲。\n\n    乙\n    """\n')
    write_listings(tmp_path / "snippets", tmp_path / "out")
    target = tmp_path / "out/rl/a.py"
    before = target.stat().st_mtime_ns
    write_listings(tmp_path / "snippets", tmp_path / "out")
    assert target.stat().st_mtime_ns == before
    source.unlink()
    write_listings(tmp_path / "snippets", tmp_path / "out")
    assert not target.exists()
