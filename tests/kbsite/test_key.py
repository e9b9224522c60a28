"""缓存键：每一项各一个测试，改了它键变，或不变。"""

import pytest

from kbsite.notebooks import key as key_module
from kbsite.notebooks.key import cache_key, reachable_modules
from kbsite.notebooks.source import read_notebook

BODY = """
# %% [markdown]
# # 标题

# %%
#| label: a
#| caption: 图注
from snippets.rl import direct
x = direct.f()
"""


@pytest.fixture
def notebook_project(project):
    project.write("snippets/rl/__init__.py", "")
    project.write("snippets/rl/direct.py", "from .indirect import g\n\n\ndef f():\n    return g()\n")
    project.write("snippets/rl/indirect.py", "def g():\n    return 1\n")
    project.write("snippets/rl/unrelated.py", "x = 1\n")
    project.notebook("rl/demo", BODY)
    return project


def key_of(project):
    path = project.root / "notebooks/rl/demo.py"
    return cache_key(read_notebook(path, project.root / "notebooks"), project.root)


def replace(project, name, old, new):
    path = project.root / name
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("notebooks/rl/demo.py", "x = direct.f()", "x = direct.f() + 1"),
        ("snippets/rl/direct.py", "return g()", "return -g()"),
        ("snippets/rl/indirect.py", "return 1", "return 2"),
        ("snippets/__init__.py", "", "X = 1\n"),
    ],
)
def test_editing_reachable_code_changes_the_key(notebook_project, name, old, new):
    before = key_of(notebook_project)
    replace(notebook_project, name, old, new)
    assert key_of(notebook_project) != before


@pytest.mark.parametrize(
    ("name", "old", "new"),
    [
        ("notebooks/rl/demo.py", "# # 标题", "# # 另一个标题"),
        ("notebooks/rl/demo.py", "图注", "另一条图注"),
        ("snippets/rl/unrelated.py", "x = 1", "x = 2"),
    ],
)
def test_editing_prose_or_unreachable_code_keeps_the_key(notebook_project, name, old, new):
    before = key_of(notebook_project)
    replace(notebook_project, name, old, new)
    assert key_of(notebook_project) == before


def test_key_does_not_depend_on_where_the_project_lies(notebook_project, tmp_path_factory):
    import shutil

    other = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(notebook_project.root, other, symlinks=True)
    path = other / "notebooks/rl/demo.py"
    assert cache_key(read_notebook(path, other / "notebooks"), other) == key_of(notebook_project)


def test_library_version_changes_the_key(notebook_project, monkeypatch):
    before = key_of(notebook_project)
    monkeypatch.setattr(key_module, "library_version", lambda name: "99.0" if name == "torch" else "1")
    changed = key_of(notebook_project)
    monkeypatch.setattr(key_module, "library_version", lambda name: "1")
    assert len({before, changed, key_of(notebook_project)}) == 3


def test_declared_data_file_changes_the_key(project):
    header = "# ---\n# jupyter:\n#   kb:\n#     data: [table.csv]\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n\n"  # fmt: skip
    data = project.write("notebooks/rl/table.csv", "1\n")
    project.notebook("rl/demo", "# %%\nx = 1\n", header=header)
    before = key_of(project)
    data.write_text("2\n")
    assert key_of(project) != before


def test_every_form_of_import_is_followed(project):
    for name in ("a", "b", "c", "d", "e"):
        project.write(f"snippets/rl/{name}.py", "x = 1\n")
    project.write("snippets/rl/__init__.py", "")
    project.write("snippets/rl/d.py", "from . import e\n")
    project.notebook(
        "rl/demo",
        """
        # %%
        import snippets.rl.a
        import snippets.rl.b as alias
        from snippets.rl.c import x

        def later():
            from snippets.rl import d
        """,
    )
    path = project.root / "notebooks/rl/demo.py"
    found = reachable_modules(read_notebook(path, project.root / "notebooks"), project.root)
    assert [file.relative_to(project.root / "snippets").as_posix() for file in found] == [
        "__init__.py", "rl/__init__.py", "rl/a.py", "rl/b.py", "rl/c.py", "rl/d.py", "rl/e.py",
    ]  # fmt: skip
