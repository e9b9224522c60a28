"""检查要看的整个项目：页面、笔记、导航、片段。任何一个文件坏了都只是一条发现，不会中断检查。"""

import os
import posixpath
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import yaml

from ..errors import NotebookSourceError
from ..notebooks.source import Notebook, read_notebook
from ..questions import read_nav
from .findings import Finding
from .page import Page, read_page

TEXT_FOLDERS = {"docs": ".md", "notebooks": ".py", "snippets": ".py", "tests/snippets": ".py"}


@dataclass
class Site:
    """读好的项目；`texts` 是能读的文本文件（去掉 BOM、换行统一成 LF），`findings` 是读的时候的发现。"""

    root: Path
    texts: dict[str, str] = field(default_factory=dict)
    raw: dict[str, str] = field(default_factory=dict)
    pages: dict[str, Page] = field(default_factory=dict)
    notebooks: dict[str, Notebook] = field(default_factory=dict)
    findings: list[Finding] = field(default_factory=list)

    @property
    def topics(self) -> list[Page]:
        return [page for page in self.pages.values() if page.is_topic]

    @property
    def fragments(self) -> Path:
        return self.root / ".cache/fragments"

    def exists(self, path: str) -> bool:
        return (self.root / path).is_file()

    @cached_property
    def nav(self) -> list[str]:
        """导航里的页面，相对 docs/ 的路径。"""
        try:
            return list(_leaves(read_nav(self.root / "mkdocs.yml")))
        except (OSError, ValueError, yaml.YAMLError, AttributeError):  # mkdocs.yml 坏了由构建报
            return []


def read_site(root: Path) -> Site:
    site = Site(root)
    for folder, suffix in TEXT_FOLDERS.items():
        for path in walk(root / folder):
            if path.suffix == suffix:
                _read(site, path)
    for name, text in site.texts.items():
        if name.startswith("docs/"):
            site.pages[name] = read_page(name, text)
        elif name.startswith("notebooks/") and name.count("/") == 2 and posixpath.basename(name)[0] != "_":
            _read_notebook(site, root / name)
    return site


def normalized(raw: str) -> str:
    """去掉 BOM，CRLF 换成 LF。"""
    return raw.removeprefix("\ufeff").replace("\r\n", "\n")


def walk(folder: Path) -> list[Path]:
    """文件夹里的全部文件，不跟随符号链接；隐藏的与编译产物不算。"""
    found = []
    for base, folders, files in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(base, name))]
        folders[:] = sorted(name for name in folders if name[0] != "." and name != "__pycache__")
        found += [Path(base, name) for name in [*files, *links] if name[0] != "."]
    return sorted(found)


def _read(site: Site, path: Path) -> None:
    name = path.relative_to(site.root).as_posix()
    if path.is_symlink():
        return  # files.py 会报
    try:
        raw = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        fact = f"不是 UTF-8 编码（第 {error.start + 1} 个字节是 0x{error.object[error.start]:02x}）"
        site.findings.append(Finding(name, line, "KB501", fact, "另存为 UTF-8"))
        return
    except OSError as error:
        site.findings.append(Finding(name, 1, "KB502", f"读不了：{error.strerror}", "检查它的权限与名字"))
        return
    site.raw[name] = raw
    site.texts[name] = normalized(raw)


def _read_notebook(site: Site, path: Path) -> None:
    try:
        notebook = read_notebook(path, site.root / "notebooks")
    except NotebookSourceError as error:
        place, _, message = str(error).removeprefix(f"{path}:").partition(": ")
        fact, _, cure = message.rstrip("。").partition("。")
        line = int(place) if place.isdecimal() else 1
        name = path.relative_to(site.root).as_posix()
        site.findings.append(Finding(name, line, "KB403", fact, cure or "照别的笔记的写法改"))
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        name = path.relative_to(site.root).as_posix()
        site.findings.append(Finding(name, 1, "KB403", f"文件头 kb: 读不懂（{error}）", "照别的笔记的写法改"))
    else:
        site.notebooks[notebook.key] = notebook


def _leaves(entries):
    for entry in entries if isinstance(entries, list) else [entries]:
        if isinstance(entry, dict):
            for value in entry.values():
                yield from _leaves(value)
        elif isinstance(entry, str):
            yield entry
