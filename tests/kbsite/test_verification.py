"""「验证了什么」的数：小项目里用手数的真值，真项目里换一种数法（正则、词法、pytest 自己的收集）。"""

import json
import os
import re
import subprocess
import sys
import tokenize
from pathlib import Path

import pytest

from kbsite.notebooks.source import read_all
from kbsite.questions import Question
from kbsite.verification import FROZEN, LIBRARIES, Counts, fill_verification

REPOSITORY = Path(__file__).parents[2]
# 导入了但不是对照：被测的东西、测试框架、只用来搭场景的库
TOOLS = {
    "torch",
    "numpy",
    "pytest",
    "jaxtyping",
    "snippets",
    "bench",
    "sympy",
    "datasets",
    "pydantic",
    "mcp_types",
}
QUESTIONS = [
    Question("rl/demo", "演示（Demo）", "强化学习", 2, "答。", (), "2026-01-02"),
    Question("training/other", "另一页", "训练", 1, "答。", (), "2026-03-04"),
]


@pytest.fixture
def small(tmp_path):
    """两页、一份笔记、两个参考实现、一份测试；数都能用手数出来。"""

    def write(name, text):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")

    write(
        "docs/rl/demo.md",
        '# 演示\n\n--8<-- "rl/demo/one.md"\n\n再来一次：\n\n--8<-- "rl/demo/one.md"\n\n--8<-- "rl/demo/two.md"\n\n'
        '```python\n--8<-- "snippets/rl/demo.py:f"\n```\n\n## 来源\n\n'
        "- 甲：[2401.00001](https://arxiv.org/abs/2401.00001)，又见 [2401.00002](https://arxiv.org/abs/2401.00002)。\n"
        "- 乙：[2401.00001](https://arxiv.org/abs/2401.00001)。\n    - 缩进的不算一条\n\n## 后面\n\n- 不算\n",
    )
    write("docs/training/other.md", "# 另一页\n\n- 不在「来源」里，不算\n")
    cells = [
        "# %% [markdown]\n# assert 写在文字里不算\n",
        "# %%\n#| label: one\nassert True  # assert\nassert 1 == 1, 'assert x'\n",
        "# %%\n#| label: two\nfrom torch.testing import assert_close\nassert_close(1, 1)\n",
        "# %%\nimport torch\ntorch.testing.assert_close(2, 2)\n",
    ]
    write("notebooks/rl/demo.py", "\n".join(cells))
    write("snippets/rl/__init__.py", "")
    write("snippets/rl/demo.py", '__all__ = ["f", "Box", "TEN"]\nTEN = 10\n\n\ndef f(): ...\n\n\ndef hidden(): ...\n\n\nclass Box: ...\n')  # fmt: skip
    write("snippets/training/without_page.py", '__all__ = ["g"]\n\n\ndef g(): ...\n')
    write("tests/snippets/shared.py", "import trl\n")
    write(
        "tests/snippets/rl/test_demo.py",
        '"""真值来自穷举。"""\n\nimport json\nimport pytest\nimport shared\nfrom peft import LoraConfig\n\n'
        'GOLDEN = "golden/demo.json"\nMISSING = "golden/none.json"\n\n\ndef helper_of_test_():\n    GOLDEN.backward()\n\n\n'
        '@pytest.mark.rejects\n@pytest.mark.parametrize("x", [1, 2, 3])\ndef test_wrong(x):\n    pass\n\n\n'
        "def test_right():\n    pass\n\n\n@pytest.mark.rejects\ndef test_other_wrong():\n    pass\n",
    )
    write("tests/golden/demo.json", json.dumps({"versions": {"verl": "1", "torch": "2"}}))
    write("tests/kbsite/test_tool.py", "def test_a(): ...\n\n\ndef test_b(): ...\n")
    write("tests/site/test_page.py", "def test_a(page): ...\n")
    write(
        "bench/mutation_equivalents.tsv",
        '# 模块\t原行\t改后\t为什么\nrl/demo\t"a\tb\t同\nrl/demo\tc\td\t同\n',
    )
    return tmp_path


def counted(root):
    return Counts(root, read_all(root / "notebooks"))


def table(root):
    return fill_verification(
        "{{ verification }}", "about/v.md", root, read_all(root / "notebooks"), QUESTIONS
    )


def test_every_count_of_the_small_project_is_the_one_by_hand(small):
    counts = counted(small)
    assert dict(counts.by_key["rl/demo"]) == {
        "notebooks": 1,
        "cells": 3,
        "asserts": 4,
        "modules": 1,
        "functions": 2,
        "tests": 3,
        "rejects": 2,
        "sources": 2,
        "embedded": 2,
        "equivalents": 2,
    }
    assert set(counts.by_key) == {"rl/demo", "training/without-page"}
    assert dict(counts.by_key["training/without-page"]) == {"modules": 1, "functions": 1}
    assert counts.section("training")["functions"] == 1 and counts.total()["functions"] == 3
    assert counts.total([]) == {} and counts.papers == {"2401.00001", "2401.00002"}
    assert (counts.tool_tests("kbsite"), counts.tool_tests("site")) == (2, 1)
    file = counts.files["rl/demo"]
    assert file.oracles == ["PEFT", "TRL", "verl（冻结）", "枚举"] and file.differentiates


@pytest.mark.parametrize(
    ("name", "old", "new", "number"),
    [
        ("notebooks/rl/demo.py", "assert True", "print(1)", "asserts"),
        ("notebooks/rl/demo.py", "# %%\nimport torch", "import torch", "cells"),
        ("snippets/rl/demo.py", '"f", ', "", "functions"),
        ("tests/snippets/rl/test_demo.py", "def test_right", "def right", "tests"),
        ("tests/snippets/rl/test_demo.py", "@pytest.mark.rejects\ndef", "@pytest.mark.slow\ndef", "rejects"),
        ("docs/rl/demo.md", "- 乙", "乙", "sources"),
        ("docs/rl/demo.md", '--8<-- "rl/demo/two.md"', "", "embedded"),
        ("bench/mutation_equivalents.tsv", "rl/demo\tc\td\t同\n", "", "equivalents"),
    ],
)
def test_taking_one_away_lowers_exactly_that_number(small, name, old, new, number):
    before = counted(small).total()
    path = small / name
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1
    path.write_text(text.replace(old, new), encoding="utf-8")
    after = counted(small).total()
    assert before - after == {number: 1}


def test_tables_hold_the_counts_and_link_the_pages(small):
    text = table(small)
    rows = text.splitlines()
    # 搜索插件看过这个属性就去掉它，成页里没有
    assert (
        text.count('<div data-search-exclude="true" markdown="block">\n\n??? note "每一页"\n\n    | 页面')
        == 1
    )
    assert "| 强化学习 | 1 | 4 | 3 | 2 |" in rows and "| 训练 | 1 | 0 | 0 | 0 |" in rows
    assert "    | [演示（Demo）](../rl/demo.md) | 4 | 3 | 2 | PEFT、TRL、verl（冻结）、枚举 |" in rows
    assert "    | [另一页](../training/other.md) | 0 | 0 | 0 |  |" in rows
    assert any(row.startswith("| 最后一次核对 | 2026-01-02 至 2026-03-04 |") for row in rows)
    assert any(row.startswith("| 来源 | 2 |") and "2 篇" in row for row in rows)


def test_the_table_does_not_depend_on_the_order_of_sets(small):
    code = (
        "import sys; sys.path[:0] = [sys.argv[1]]\nfrom test_verification import table\n"
        "from pathlib import Path\nprint(table(Path(sys.argv[2])))"
    )
    outputs = {
        subprocess.run(
            [sys.executable, "-c", code, str(Path(__file__).parent), str(small)],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONUTF8": "1", "PYTHONPATH": str(REPOSITORY / "src")},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2", "3")
    }  # fmt: skip
    assert len(outputs) == 1 and "PEFT 1 份、TRL 1 份" in outputs.pop()


def test_pytest_collects_the_functions_that_were_counted(small):
    (small / "tests/snippets/shared.py").write_text("", encoding="utf-8")
    path = small / "tests/snippets/rl/test_demo.py"
    text = path.read_text(encoding="utf-8").replace("import shared\nfrom peft import LoraConfig\n", "")
    path.write_text(text, encoding="utf-8")

    def collected(*arguments):
        command = [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "--collect-only",
            "-p",
            "no:cacheprovider",
            *arguments,
        ]
        result = subprocess.run([*command, str(path)], cwd=small, capture_output=True, text=True)
        return set(re.findall(r"::(test_\w+)", result.stdout))

    counts = counted(small).total()
    assert len(collected()) == counts["tests"] and len(collected("-m", "rejects")) == counts["rejects"]


def test_a_page_without_the_line_is_untouched(small):
    for text in ("`{{ verification }}` 是占位行", "占位行是 {{ verification }}"):
        assert fill_verification(text, "about/v.md", small, [], QUESTIONS) == text


@pytest.fixture(scope="module")
def real():
    return Counts(REPOSITORY, read_all(REPOSITORY / "notebooks"))


def lines_of(pattern, expression):
    paths = REPOSITORY.glob(pattern)
    return sum(len(re.findall(expression, path.read_text(encoding="utf-8"), re.M)) for path in paths)


def test_the_real_counts_agree_with_another_way_of_counting(real):
    total = real.total()
    tests = "tests/snippets/*/test_*.py"
    assert total["tests"] == lines_of(tests, r"^def test_")
    assert total["rejects"] == lines_of(tests, r"^@pytest\.mark\.rejects$")
    assert total["cells"] == lines_of("notebooks/*/[!_]*.py", r"^# %%$")
    assert total["notebooks"] == len(list(REPOSITORY.glob("notebooks/*/[!_]*.py")))
    assert total["equivalents"] == lines_of("bench/mutation_equivalents.tsv", r"^[^#\n]")
    # API 页的测试（tests/site/test_links.py）也从 __all__ 出发，这里改用文本
    functions = 0
    for path in REPOSITORY.glob("snippets/*/*.py"):
        text = path.read_text(encoding="utf-8")
        listed = re.search(r"^__all__ = \[(.*?)\]", text, re.M | re.S)
        names = set(re.findall(r'"(\w+)"', listed[1])) if listed else set()
        functions += len(names & set(re.findall(r"^(?:def|class) (\w+)", text, re.M)))
    assert total["functions"] == functions


def test_the_real_assertions_agree_with_the_tokens(real):
    """词法：关键字 assert，与名字以 assert_ 开头、后面紧跟括号的；导入的名字后面没有括号。"""
    count = 0
    for path in REPOSITORY.glob("notebooks/*/[!_]*.py"):
        with tokenize.open(path) as stream:
            tokens = list(tokenize.generate_tokens(stream.readline))
        for token, following in zip(tokens, tokens[1:], strict=False):
            called = token.string.startswith("assert_") and following.string == "("
            count += token.type == tokenize.NAME and (token.string == "assert" or called)
    assert real.total()["asserts"] == count


def test_the_sections_add_up_to_the_whole(real):
    folders = {key.partition("/")[0] for key in real.by_key}
    assert sum((real.section(folder) for folder in folders), start=real.total([])) == real.total()


def test_every_reference_module_rejects_a_wrong_version(real):
    assert [key for key, file in real.files.items() if not file.rejects] == []


def test_every_imported_library_is_an_oracle_or_a_tool():
    imported = set()
    for path in REPOSITORY.glob("tests/snippets/**/*.py"):
        text = path.read_text(encoding="utf-8")
        imported |= set(re.findall(r"^\s*(?:from|import) (\w+)", text, re.M))
    local = {path.stem for path in REPOSITORY.glob("tests/snippets/*.py")}
    assert imported - set(sys.stdlib_module_names) - local - TOOLS == set(LIBRARIES)


def test_every_frozen_library_has_a_name_on_the_page():
    files = REPOSITORY.glob("tests/golden/*.json")
    names = {
        name
        for file in files
        for name in json.loads(file.read_text(encoding="utf-8")).get("versions", [None])
    }
    assert names - {"torch", "numpy"} == set(FROZEN)


def test_built_page_counts_the_formulas_and_folds_the_pages(project):
    project.write("docs/about/v.md", "# 验证\n\n{{ verification }}\n\n$a$、$b$\n")
    project.write(
        "docs/rl/demo.md",
        "---\ntitle: 演示页\ndifficulty: 2\nanswer: 答 $c$\n---\n\n# 演示页\n\n{{ answer }}\n",
    )
    project.nav("index.md", "about/v.md")
    text = (project.root / "mkdocs.yml").read_text(encoding="utf-8")
    project.write("mkdocs.yml", text + "  - 强化学习:\n      - rl/demo.md\n")
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    html = project.page("about/v")
    assert re.search(r"排好的公式</td>\s*<td>3</td>", html) and "{{" not in html
    assert re.search(r'<details.*?<td><a href="../../rl/demo/">演示页</a></td>.*?</details>', html, re.S)
