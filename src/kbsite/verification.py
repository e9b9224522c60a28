"""「验证了什么」的数：全部从源文件数出来，页面里写一行 `{{ verification }}`。

只读源码（语法树），不导入、不执行：没有 .cache 也能数，同一份源文件得到同一张表。
"""

import ast
import csv
import json
import posixpath
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

from .notebooks.source import Notebook
from .pages import INCLUDE, placeholder
from .questions import Question

PLACEHOLDER = placeholder("verification")
# 全部页面成形之后才知道，见 hooks.on_env
FORMULAS = "{{ formulas }}"
ARXIV = re.compile(r"arxiv\.org/abs/(\d{4}\.\d{4,5})")
ENUMERATED = re.compile("枚举|穷举")
# 测试导入的库 → 页面上的名字；工具（torch、pytest 等）不算，test_verification.py 检查两边没有漏
LIBRARIES = {
    "accelerate": "accelerate",
    "math_verify": "math-verify",
    "mcp": "MCP SDK",
    "peft": "PEFT",
    "tokenizers": "tokenizers",
    "transformers": "transformers",
    "trl": "TRL",
}
# tests/golden/*.json 的 versions 里的名字 → 页面上的名字
FROZEN = {
    "AMAP-ML/GPG": "GPG 作者的代码",
    "oat": "oat",
    "openrlhf": "OpenRLHF",
    "tiktoken": "tiktoken",
    "trl": "TRL",
    "understand-r1-zero": "Dr. GRPO 作者的代码",
    "verl": "verl",
}


def fill_verification(
    markdown: str, page: str, root: Path, notebooks: Iterable[Notebook], questions: Iterable[Question]
) -> str:
    """把独占一行的 `{{ verification }}` 换成总表、各节的表与折叠的各页的表；`page` 是所在页面的路径。"""
    if not PLACEHOLDER.search(markdown):
        return markdown
    counts, questions = Counts(root, notebooks), list(questions)
    folder = posixpath.dirname(page)
    tables = [_overall(counts, questions), _sections(counts, questions), _pages(counts, questions, folder)]
    return PLACEHOLDER.sub(lambda _: "\n\n".join(tables), markdown)


@dataclass(frozen=True)
class ModuleTests:
    """一份参考实现的测试文件里数得出的东西。

    `rejects` 是标了 `@pytest.mark.rejects` 的测试函数；`libraries` 是导入的库（包括经由 tests/snippets/ 里共用的
    文件）；`frozen` 是读了 tests/golden/ 里哪些库跑出的结果；`differentiates`：用了自动求导；`enumerates`：
    文件头写明真值来自枚举。
    """

    tests: int
    rejects: int
    libraries: frozenset[str]
    frozen: frozenset[str]
    differentiates: bool
    enumerates: bool

    @property
    def oracles(self) -> list[str]:
        """独立的对照，按页面上的名字。"""
        frozen = [f"{name}（冻结）" for name in sorted(self.frozen)]
        return [*sorted(self.libraries), *frozen, *(["枚举"] if self.enumerates else [])]


def read_tests(path: Path) -> ModuleTests:
    """读一份测试文件；语法树只走一遍（走树比读文件慢得多）。"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    imports, golden, differentiates = set(), set(), False
    for node in ast.walk(tree):
        imports |= _imported(node)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.endswith(".json"):
            golden.add(path.parents[2] / "golden" / Path(node.value).name)
        if isinstance(node, ast.Attribute):
            of_torch = isinstance(node.value, ast.Name) and node.value.id == "torch"
            differentiates |= node.attr == "backward" or (of_torch and node.attr in ("autograd", "func"))
    for shared in path.parents[1].glob("*.py"):
        if shared.stem in imports:
            imports = imports.union(*map(_imported, ast.walk(ast.parse(shared.read_text(encoding="utf-8")))))
    tests = test_functions(tree)
    decorators = [decorator for test in tests for decorator in test.decorator_list]
    versions = [json.loads(file.read_text(encoding="utf-8"))["versions"] for file in golden if file.is_file()]
    return ModuleTests(
        tests=len(tests),
        rejects=sum(ast.unparse(decorator) == "pytest.mark.rejects" for decorator in decorators),
        libraries=frozenset(LIBRARIES[name] for name in imports & LIBRARIES.keys()),
        frozen=frozenset(FROZEN[name] for names in versions for name in names.keys() & FROZEN.keys()),
        differentiates=differentiates,
        enumerates=bool(ENUMERATED.search(ast.get_docstring(tree) or "")),
    )


class Counts:
    """按专题键数出来的数：`by_key["rl/clip"]["tests"]`；没有页面的模块也有自己的键。"""

    def __init__(self, root: Path, notebooks: Iterable[Notebook]):
        self.root = root
        self.by_key: dict[str, Counter] = {}
        self.files: dict[str, ModuleTests] = {}
        self.papers: set[str] = set()
        for notebook in notebooks:
            codes = [cell.code for cell in notebook.code_cells]
            self._add(notebook.key, notebooks=1, cells=len(codes), asserts=sum(map(assertions, codes)))
        for path in sorted((root / "snippets").glob("*/*.py")):
            if path.stem != "__init__":
                self._add(_key(path), modules=1, functions=public_functions(path))
        for path in sorted((root / "tests/snippets").glob("*/test_*.py")):
            file = read_tests(path)
            key = _key(path).replace("/test-", "/")
            self.files[key] = file
            self._add(key, tests=file.tests, rejects=file.rejects)
        embedded = set()
        for path in sorted((root / "docs").rglob("*.md")):
            text = path.read_text(encoding="utf-8")
            targets = {match[1] for match in INCLUDE.finditer(text)}
            embedded |= {target for target in targets if not target.startswith("snippets/")}
            sources = text.partition("\n## 来源\n")[2].partition("\n## ")[0]
            if sources:
                self._add(
                    path.relative_to(root / "docs").with_suffix("").as_posix(), sources=sources.count("\n- ")
                )
                self.papers |= set(ARXIV.findall(sources))
        for target in embedded:
            self._add(target.rpartition("/")[0], embedded=1)
        for module in _equivalents(root / "bench/mutation_equivalents.tsv"):
            self._add(module.replace("_", "-"), equivalents=1)

    def _add(self, key: str, **numbers: int) -> None:
        self.by_key.setdefault(key, Counter()).update(numbers)

    def total(self, keys: Iterable[str] | None = None) -> Counter:
        """几个键的和；不给就是全部。"""
        chosen = self.by_key if keys is None else keys
        return sum((self.by_key.get(key, Counter()) for key in chosen), Counter())

    def section(self, name: str) -> Counter:
        """一节（文件夹）的和。"""
        return self.total([key for key in self.by_key if key.startswith(f"{name}/")])

    def tool_tests(self, folder: str) -> int:
        """`tests/` 下一个文件夹里的测试函数。"""
        paths = (self.root / "tests" / folder).glob("test_*.py")
        return sum(len(test_functions(ast.parse(path.read_text(encoding="utf-8")))) for path in paths)


def test_functions(tree: ast.Module) -> list[ast.FunctionDef]:
    """测试函数；参数化的只算一个。"""
    return [node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]


def assertions(code: str) -> int:
    """`assert` 语句与 `assert_close` 一类的调用。"""
    return sum(
        isinstance(node, ast.Assert)
        or (isinstance(node, ast.Call) and _called(node.func).startswith("assert_"))
        for node in ast.walk(ast.parse(code))
    )


def public_functions(path: Path) -> int:
    """模块 `__all__` 里的函数与类。"""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names = set(ast.literal_eval(node.value))
    defined = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    return len(names & defined)


def _called(function: ast.expr) -> str:
    return getattr(function, "attr", getattr(function, "id", ""))


def _imported(node: ast.AST) -> set[str]:
    """一个结点导入的顶层模块。"""
    if isinstance(node, ast.Import):
        return {alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, ast.ImportFrom) and node.module:
        return {node.module.partition(".")[0]}
    return set()


def _equivalents(path: Path) -> list[str]:
    """等价改动表里每一条的模块。"""
    if not path.is_file():
        return []
    rows = csv.reader(path.read_text(encoding="utf-8").splitlines(), delimiter="\t", quoting=csv.QUOTE_NONE)
    return [row[0] for row in rows if row and not row[0].startswith("#")]


def _key(path: Path) -> str:
    return f"{path.parent.name}/{path.stem.replace('_', '-')}"


def _overall(counts: Counts, questions: list[Question]) -> str:
    all_ = counts.total()
    files = counts.files.values()
    live = Counter(name for file in files for name in file.libraries)
    frozen = Counter(name for file in files for name in file.frozen)
    dates = sorted(question.verified for question in questions if question.verified)
    rows = [
        ("专题页", len(questions), "front matter 里有 `answer` 的页面"),
        ("笔记；代码单元", f"{all_['notebooks']}；{all_['cells']}", "每次构建全部执行（或取缓存）；出错就没有站点"),
        ("嵌入页面的单元", all_["embedded"], "页面里的 `--8<--`，同一个单元只算一次"),
        ("笔记里的断言", all_["asserts"], "`assert` 语句与 `assert_close` 一类的调用"),
        ("参考实现；公开的函数与类", f"{all_['modules']}；{all_['functions']}", "`snippets/` 各节的模块；`__all__` 里的"),
        ("参考实现的测试", all_["tests"], "`tests/snippets/` 各节的测试函数；参数化的只算一个"),
        ("其中拒绝错误写法的", all_["rejects"], "标了 `rejects` 的函数；一个里常有好几种错误写法"),
        ("建站工具的测试", counts.tool_tests("kbsite"), "`tests/kbsite/` 的测试函数"),
        ("真实站点的测试", counts.tool_tests("site"), "`tests/site/` 的测试函数：读建好的站，或在真实浏览器里看它"),
        ("排好的公式", FORMULAS, "全站（含笔记页与 API）出现的次数；排不出来就没有站点"),
        ("等价的改动", all_["equivalents"], "变异测试抓不住、逐条写明理由的（`bench/mutation_equivalents.tsv`）"),
        ("来源", all_["sources"], f"各页「来源」的条目；其中不同的 arXiv 论文 {len(counts.papers)} 篇"),
    ]  # fmt: skip
    if dates:
        rows.append(
            (
                "最后一次核对",
                " 至 ".join(dict.fromkeys((dates[0], dates[-1]))),
                "各页 front matter 的 `verified`",
            )
        )
    text = _table(("", "数", "怎么数"), rows)
    return (
        f"{text}\n\n参考实现的测试文件有 {len(counts.files)} 份，独立的对照来自：\n\n"
        f"- 导入真实的库：{_listed(live)}（有的只用它搭小模型）；\n"
        f"- 别的实现跑出后冻结的结果：{_listed(frozen)}；\n"
        f"- 枚举（文件头写明）：{sum(file.enumerates for file in files)} 份；\n"
        f"- 自动求导（`backward`、`torch.autograd`、`torch.func`）：{sum(file.differentiates for file in files)} 份。"
    )


def _sections(counts: Counts, questions: list[Question]) -> str:
    rows = []
    folders = dict.fromkeys((question.key.partition("/")[0], question.section) for question in questions)
    for folder, title in folders:
        pages = sum(question.key.startswith(f"{folder}/") for question in questions)
        rows.append((escape(title), pages, *_numbers(counts.section(folder))))
    return _table(("节", "专题页", "断言", "测试", "其中拒绝"), rows)


def _pages(counts: Counts, questions: list[Question], folder: str) -> str:
    rows = []
    for question in questions:
        file = counts.files.get(question.key)
        link = f"[{question.title}]({posixpath.relpath(f'{question.key}.md', folder or '.')})"
        rows.append((link, *_numbers(counts.total([question.key])), "、".join(file.oracles if file else ())))
    table = _table(("页面", "断言", "测试", "其中拒绝", "独立的对照"), rows)
    rows = "\n".join(f"    {row}" for row in table.splitlines())
    # 不进搜索索引：题目在自己的页面里已有，这里再出现一次只会挤掉那一页
    return f'<div data-search-exclude="true" markdown="block">\n\n??? note "每一页"\n\n{rows}\n\n</div>'


def _numbers(counter: Counter) -> tuple[int, int, int]:
    return counter["asserts"], counter["tests"], counter["rejects"]


def _listed(counter: Counter) -> str:
    ranked = sorted(counter.items(), key=lambda item: (-item[1], item[0]))
    return "、".join(f"{name} {number} 份" for name, number in ranked) or "无"


def _table(head: tuple, rows: Iterable[tuple]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell) for cell in row) + " |" for row in lines)
