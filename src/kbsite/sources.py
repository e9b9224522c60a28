"""开工之前把源文件看一遍：编码不对、只差大小写、符号链接，都会让页面变样或者不见，在这里就停下。"""

import codecs
import os
import unicodedata
from pathlib import Path

from .errors import KbsiteError

FOLDERS = ("docs", "notebooks", "snippets")
TEXT = (".md", ".py", ".yml")


def check_sources(root: Path) -> None:
    """有毛病就抛出 KbsiteError，一次报出全部，一行一处。"""
    problems: list[str] = []
    seen: dict[str, str] = {}
    for path in _paths(root):
        name = path.relative_to(root).as_posix()
        # macOS 与 Windows 上文件名不分大小写，macOS 还不分组合与分解的写法
        twin = seen.setdefault(unicodedata.normalize("NFC", name).casefold(), name)
        if twin != name:
            problems.append(
                f"{name}:1: 与 {twin} 的名字只差大小写，在 macOS、Windows 上只剩一个。给其中一个改名。"
            )
        if path.is_symlink():
            problems.append(f"{name}:1: 是符号链接，在别的机器上可能指向没有的东西。换成文件本身。")
        elif path.suffix in TEXT and path.is_file():
            content = path.read_bytes()
            if path.suffix == ".py" and content.startswith(codecs.BOM_UTF8):  # 有它，语法树读不出导入了什么
                problems.append(f"{name}:1: 开头有 BOM。另存为不带 BOM 的 UTF-8。")
            try:
                content.decode()
            except UnicodeDecodeError as error:
                line = content.count(b"\n", 0, error.start) + 1
                problems.append(f"{name}:{line}: 不是 UTF-8 编码。另存为 UTF-8。")
    if problems:
        raise KbsiteError("\n".join(problems))


def _paths(root: Path):
    yield from sorted(root.glob("*.yml"))
    for folder in FOLDERS:
        for parent, folders, files in os.walk(root / folder):  # 不跟着链接走：可能是圈
            folders.sort()
            yield from (Path(parent, name) for name in sorted(folders + files))
