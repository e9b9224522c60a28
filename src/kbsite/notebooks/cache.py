"""执行结果的缓存：每份笔记一个文件夹，每个键一个 JSON 文件，内容是各代码单元的输出。

写入先写临时文件再改名：在任何时刻被杀，留下的要么是完整的一项，要么没有这一项。
读到坏的条目（磁盘损坏、被截断）当作没有，重新执行。
"""

import json
import os
import tempfile
from pathlib import Path

KEEP = 5


def write_atomically(path: Path, text: str) -> None:
    """写好一个文件再让它出现；`path` 上永远看不到半个文件。"""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def load(folder: Path, key: str, cells: int) -> list | None:
    """键对应的各单元输出；没有、坏了、单元数不对都返回 None。"""
    try:
        outputs = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))["outputs"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return outputs if isinstance(outputs, list) and len(outputs) == cells else None


def store(folder: Path, key: str, outputs: list) -> None:
    """存一项，并只留最近的几项（换分支时不必重跑）。"""
    write_atomically(folder / f"{key}.json", json.dumps({"outputs": outputs}, ensure_ascii=False))
    entries = sorted(folder.glob("*.json"), key=lambda path: path.stat().st_mtime, reverse=True)
    for old in entries[KEEP:]:
        old.unlink(missing_ok=True)
