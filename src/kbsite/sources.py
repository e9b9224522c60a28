"""开工之前把源文件看一遍：名字、种类、大小、编码、符号链接。有毛病的会让页面变样、不见或者带进别处的东西，在这里就停下。"""

import codecs
import os
import re
import unicodedata
from collections.abc import Iterator
from pathlib import Path

from .errors import KbsiteError
from .safety import check_drawing

FOLDERS = ("docs", "notebooks", "snippets")
TEXT = (".md", ".py", ".yml", ".svg")
NAME = re.compile(r"[a-z0-9_.-]{1,80}")
PAGE_FILES = {".md", ".svg", ".png"}
ASSET_FILES = PAGE_FILES | {".css", ".js"}
ROOT_FILES = {"service-worker.js", "manifest.webmanifest"}
PAGE_BYTES = 100_000


def check_sources(root: Path) -> None:
    """有毛病就抛出 KbsiteError，一次报出全部，一行一处。"""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for path in _paths(root):
        name = path.relative_to(root).as_posix()
        shown = name if name.isprintable() else repr(name)
        # macOS 与 Windows 上文件名不分大小写，macOS 还不分组合与分解的写法
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            problems.append(
                f"{shown}:1: 与 {twin} 的名字只差大小写，在 macOS、Windows 上只剩一个。给其中一个改名。"
            )
        if path.is_symlink():
            problems.append(f"{shown}:1: KB606: 是符号链接，会把别处的文件带进网站。换成文件本身。")
        elif not NAME.fullmatch(path.name):
            problems.append(f"{shown}:1: KB606: 文件名只用小写字母、数字与 - _ .，不超过 80 个字符。改名。")
        elif path.is_file():
            problems += (f"{name}{fault}" for fault in _faults(path, name.split("/")))
    if problems:
        raise KbsiteError("\n".join(problems))


def _faults(path: Path, inside: list[str]) -> Iterator[str]:
    """一个文件的毛病，从行号写起；`inside` 是它在项目里的路径。"""
    if path.suffix in (".md", ".py") and path.stat().st_size > PAGE_BYTES:
        yield f":1: KB607: 超过 {PAGE_BYTES // 1000} KB。拆成几份。"
    content = path.read_bytes() if path.suffix in TEXT else b""
    if path.suffix == ".py" and content.startswith(codecs.BOM_UTF8):  # 有它，语法树读不出导入了什么
        yield ":1: 开头有 BOM。另存为不带 BOM 的 UTF-8。"
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        yield f":{line}: 不是 UTF-8 编码。另存为 UTF-8。"
        return
    if inside[0] != "docs" or path.name.startswith("."):
        return
    allowed = ASSET_FILES if inside[1] == "assets" else PAGE_FILES
    if path.suffix not in allowed and "/".join(inside[1:]) not in ROOT_FILES:
        yield f":1: KB606: 不发布 {path.suffix or '没有扩展名'} 的文件。页面写成 .md，图用 .svg 或 .png。"
    elif path.suffix == ".svg" and (fault := check_drawing(text)):
        yield f":1: {fault}"


def _paths(root: Path) -> Iterator[Path]:
    yield from sorted(root.glob("*.yml"))
    for folder in FOLDERS:
        for parent, folders, files in os.walk(root / folder):  # 不跟着链接走：可能是圈
            folders[:] = sorted(name for name in folders if name != "__pycache__")
            yield from (Path(parent, name) for name in sorted(folders + files))
