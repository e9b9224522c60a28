"""缓存：写入先写临时文件再改名，读出先核对散列。

在任何时刻被杀、磁盘写满，留下的要么是完整的一项，要么没有这一项；内容变了一个字节（磁盘损坏、被截断）就当作
没有，重新做一遍。执行结果每份笔记一个文件夹，每个键一个条目，内容是各代码单元的输出。
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path

KEEP = 5


def write_atomically(path: Path, content: str | bytes) -> None:
    """写好一个文件再让它出现；`path` 上永远看不到半个文件。"""
    raw = content.encode() if isinstance(content, str) else content
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".tmp-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(raw)
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def write_if_changed(path: Path, text: str) -> None:
    """内容没变就不动：serve 时不触发无谓的重建。"""
    if not path.is_file() or path.read_bytes() != text.encode():
        write_atomically(path, text)


def write_entry(path: Path, content: bytes) -> None:
    """写一个条目：第一行是内容的散列。"""
    write_atomically(path, hashlib.sha256(content).hexdigest().encode() + b"\n" + content)


def read_entry(path: Path) -> bytes | None:
    """条目的内容；没有、坏了都是 None。"""
    try:
        digest, _, content = path.read_bytes().partition(b"\n")
    except OSError:
        return None
    return content if digest == hashlib.sha256(content).hexdigest().encode() else None


def seal(folder: Path) -> None:
    """记下别的库写的缓存里各个文件的散列，下一次构建由 `drop_damaged` 核对。"""
    digests = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in _files(folder)}
    write_entry(folder.with_suffix(".seal"), json.dumps(digests).encode())


def drop_damaged(folder: Path) -> None:
    """删去与 `seal` 记下的不同的文件，包括上次没有写完的：那些库不核对就拿来用。"""
    digests = json.loads(read_entry(folder.with_suffix(".seal")) or b"{}")
    for path in _files(folder):
        if digests.get(path.name) != hashlib.sha256(path.read_bytes()).hexdigest():
            path.unlink()


def _files(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*") if path.is_file()]


def load(folder: Path, key: str, cells: int) -> list | None:
    """键对应的各单元输出；没有、坏了、单元数不对都返回 None。"""
    content = read_entry(folder / key)
    outputs = None if content is None else json.loads(content)
    return outputs if isinstance(outputs, list) and len(outputs) == cells else None


def store(folder: Path, key: str, outputs: list) -> None:
    """存一项，并只留最近的几项（换分支时不必重跑）；刚存的总是留下，时钟倒退了也不删它。"""
    write_entry(folder / key, json.dumps(outputs, ensure_ascii=False).encode())
    others = [path for path in folder.iterdir() if path.name != key]
    for old in sorted(others, key=lambda path: path.stat().st_mtime)[: -(KEEP - 1)]:
        old.unlink(missing_ok=True)
