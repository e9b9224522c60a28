"""读 `notebooks/<section>/<slug>.py`（py:percent），得到单元与它们的选项。"""

import re
from dataclasses import dataclass, field
from pathlib import Path

import jupytext
import nbformat

from ..errors import NotebookSourceError

OPTION = re.compile(r"#\|\s*([\w-]+):\s*(.*?)\s*$")
LABEL = re.compile(r"[a-z0-9]+(-[a-z0-9]+)*")
# Python 把它们当普通字符，jupytext 却在这里断行：代码就不是写下的那一份了
LINE_BREAKS = re.compile("[\x0b\x0c\x1c-\x1e\x85\u2028\u2029]")
# 不然注释掉的 `# !ls` 会被还原成命令，真的执行
FORMAT = {"extension": ".py", "format_name": "percent", "comment_magics": False}
ECHO = ("show", "fold", "hide")
SETUP = "setup"
TIMEOUT = 60


@dataclass(frozen=True)
class Cell:
    """一个单元；`line` 是它第一行源码在文件里的行号（从 1 起）。"""

    kind: str
    source: str
    line: int
    label: str | None = None
    caption: str = ""
    echo: str = "fold"

    @property
    def code(self) -> str:
        """去掉 `#|` 选项行之后的代码：给读者看的，也是进缓存键的。"""
        return "\n".join(row for row in self.source.splitlines() if not row.startswith("#|")).strip("\n")


@dataclass(frozen=True)
class Notebook:
    """一份笔记。`key` 是专题键，如 `rl/dr-grpo`；`timeout`、`data`、`tcp` 来自文件头的 `kb:`。"""

    key: str
    path: Path
    cells: tuple[Cell, ...]
    timeout: float = TIMEOUT
    data: tuple[Path, ...] = field(default=())
    tcp: bool = False

    @property
    def code_cells(self) -> tuple[Cell, ...]:
        return tuple(cell for cell in self.cells if cell.kind == "code")

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple(cell.label for cell in self.cells if cell.label)


def topic_key(path: Path, folder: Path) -> str:
    """`notebooks/rl/dr_grpo.py` → `rl/dr-grpo`。"""
    return path.relative_to(folder).with_suffix("").as_posix().replace("_", "-")


def read_notebook(path: Path, folder: Path) -> Notebook:
    """读一份笔记；写错的选项、重复的标签立刻报错，并指出行号。"""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise NotebookSourceError(f"{path}:1: 不是 UTF-8 编码（{error.reason}）。请另存为 UTF-8。") from None
    if odd := LINE_BREAKS.search(text):
        raise NotebookSourceError(
            f"{path}:{text.count(chr(10), 0, odd.start()) + 1}: 有控制字符 {odd[0]!r}。删去它，或在字符串里写成转义。"
        )
    lines = text.splitlines()
    try:
        parsed = jupytext.reads(text, fmt=FORMAT)
    except Exception as error:  # jupytext 对坏的文件头抛出各种异常
        raise NotebookSourceError(f"{path}:1: 读不懂文件头：{error}。请照抄别的笔记的文件头。") from None
    starts = [number for number, row in enumerate(lines, 1) if row.startswith("# %%")]
    if len(starts) != len(parsed.cells):
        raise NotebookSourceError(
            f"{path}:1: 第一个 `# %%` 之前有内容，或单元标记不规范：{len(starts)} 个标记，{len(parsed.cells)} 个单元。"
            "文件头之后直接从 `# %%` 开始。"
        )
    cells = tuple(_cell(path, cell, start) for cell, start in zip(parsed.cells, starts, strict=True))
    _refuse_duplicates(path, cells)
    settings = parsed.metadata.get("kb", {})
    if not isinstance(settings, dict) or not isinstance(settings.get("data", []), list):
        raise NotebookSourceError(
            f"{path}:1: 文件头的 kb: 写错了。写成 `kb: {{timeout: 120, data: [表.csv]}}`。"
        )
    unknown = set(settings) - {"timeout", "data", "tcp"}
    if unknown:
        raise NotebookSourceError(
            f"{path}:1: 文件头 kb: 里有未知的键 {sorted(unknown)}。可用的有 timeout、data、tcp。"
        )
    try:
        timeout = float(settings.get("timeout", TIMEOUT))
    except (TypeError, ValueError):
        raise NotebookSourceError(
            f"{path}:1: timeout 不能是 {settings['timeout']!r}。写秒数，如 120。"
        ) from None
    data = tuple(path.parent / name for name in settings.get("data", ()))
    for file in data:
        if not file.is_file():
            raise NotebookSourceError(f"{path}:1: 声明的数据文件 {file} 不存在。改名字或删去这一项。")
    return Notebook(
        key=topic_key(path, folder),
        path=path,
        cells=cells,
        timeout=timeout,
        data=data,
        tcp=bool(settings.get("tcp", False)),
    )


def read_all(folder: Path) -> list[Notebook]:
    """`notebooks/` 下的全部笔记，按专题键排序；`_` 开头的文件不算笔记。"""
    found: dict[str, Notebook] = {}
    for path in sorted(folder.glob("*/*.py")):
        if path.name[0] == "_":
            continue
        notebook = read_notebook(path, folder)
        if notebook.key in found:
            raise NotebookSourceError(
                f"{path}:1: 专题键 {notebook.key!r} 与 {found[notebook.key].path} 的相同，只会留下一份。给其中一个改名。"
            )
        found[notebook.key] = notebook
    return [found[key] for key in sorted(found)]


def _cell(path: Path, cell: nbformat.NotebookNode, start: int) -> Cell:
    if cell.cell_type != "code":
        return Cell("markdown", cell.source, start + 1)
    if cell.metadata:
        raise NotebookSourceError(
            f"{path}:{start}: `# %%` 后面不能写 {dict(cell.metadata)}。标签写成单元第一行 `#| label: …`。"
        )
    options = {}
    for offset, row in enumerate(cell.source.splitlines(), 1):
        if not row.startswith("#|"):
            break
        match = OPTION.match(row)
        if not match or match[1] not in ("label", "caption", "echo"):
            raise NotebookSourceError(
                f"{path}:{start + offset}: 读不懂选项行 {row!r}。可用的是 `#| label:`、`#| caption:`、`#| echo:`。"
            )
        options[match[1]] = match[2]
    label, echo = options.get("label"), options.get("echo", "fold")
    if label is not None and not LABEL.fullmatch(label):
        raise NotebookSourceError(
            f"{path}:{start + 1}: 标签 {label!r} 不合规。用小写字母、数字和连字符，如 clip-fraction。"
        )
    if echo not in ECHO:
        raise NotebookSourceError(f"{path}:{start + 1}: echo 不能是 {echo!r}。可用的是 {'、'.join(ECHO)}。")
    return Cell("code", cell.source, start + 1, label, options.get("caption", ""), echo)


def _refuse_duplicates(path: Path, cells: tuple[Cell, ...]) -> None:
    seen: dict[str, int] = {}
    for cell in cells:
        if cell.label is None:
            continue
        if cell.label in seen:
            raise NotebookSourceError(
                f"{path}:{cell.line}: 标签 {cell.label!r} 在第 {seen[cell.label]} 行已经用过。给其中一个换名字。"
            )
        seen[cell.label] = cell.line
