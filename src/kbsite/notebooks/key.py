"""笔记的缓存键：什么变了才重新执行。

进键：代码单元的源码（按顺序，不含 `#|` 选项行）、超时以外的声明（数据文件的内容）、笔记能导入到的
每一个项目内模块的源码、Python 版本、`LIBRARIES` 中各库的版本、内核配置与图样式、缓存格式版本。
不进键：Markdown 单元、标题与图注、文件时间、绝对路径。

导入用 AST 静态地找；运行时拼出来的导入（`importlib.import_module(...)`）看不见，笔记里不要这样写。
"""

import ast
import hashlib
import importlib.metadata
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from .source import Notebook

FORMAT = 1
# 会改变数值、图或输出格式的库
LIBRARIES = ("torch", "numpy", "matplotlib", "matplotlib-inline", "mplfonts", "ipykernel", "ipython", "tabulate", "jaxtyping", "tokenizers", "jinja2", "mcp", "mcp-types")  # fmt: skip
KERNEL = Path(__file__).parent / "kernel"


def cache_key(notebook: Notebook, root: Path) -> str:
    """笔记在项目 `root` 中的缓存键（十六进制）。"""
    digest = hashlib.sha256()

    def add(*parts: str | bytes) -> None:
        for part in parts:
            raw = part if isinstance(part, bytes) else part.encode()
            digest.update(len(raw).to_bytes(8, "big") + raw)

    add("format", str(FORMAT), sys.version)
    for name in LIBRARIES:
        add(name, library_version(name))
    for path in sorted(KERNEL.rglob("*")):
        if path.is_file() and path.suffix != ".pyc":
            add(path.relative_to(KERNEL).as_posix(), path.read_bytes())
    for cell in notebook.code_cells:
        add("cell", cell.code)
    for path in notebook.data:
        add("data", path.name, path.read_bytes())
    for path in reachable_modules(notebook, root):
        add("module", path.relative_to(root).as_posix(), path.read_bytes())
    return digest.hexdigest()[:32]


def library_version(name: str) -> str:
    """装着的版本；没有装就是空串。"""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return ""


def reachable_modules(notebook: Notebook, root: Path) -> list[Path]:
    """笔记直接或间接导入的项目内模块（含各级 `__init__.py`），排好序。"""
    return imported_modules((cell.code for cell in notebook.code_cells), root)


def imported_modules(codes: Iterable[str], root: Path) -> list[Path]:
    """几段代码直接或间接导入的项目内模块，排好序。"""
    found: set[Path] = set()
    queue = [(code, "") for code in codes]
    while queue:
        code, package = queue.pop()
        for name in _imported_names(code, package):
            for path in _module_files(name, root):
                if path not in found:
                    found.add(path)
                    parent = path.parent.relative_to(root).as_posix().replace("/", ".")
                    queue.append((path.read_text(encoding="utf-8"), parent))
    return sorted(found)


def _imported_names(code: str, package: str) -> Iterator[str]:
    """代码中出现的每一个可能的模块名；`from a import b` 给出 `a` 与 `a.b`。"""
    try:
        tree = ast.parse(code)
    except SyntaxError:  # 执行时会给出位置清楚的错误
        return
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base]).strip(".")
            yield base
            yield from (f"{base}.{alias.name}" for alias in node.names)


def _module_files(name: str, root: Path) -> Iterator[Path]:
    """模块名在项目里对应的文件，以及它上面各级包的 `__init__.py`。"""
    parts = name.split(".")
    for depth in range(1, len(parts) + 1):
        stem = root.joinpath(*parts[:depth])
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.is_file():
                yield path
