"""项目的文件夹，以及「执行笔记、写出片段与 .ipynb」这一步。"""

import logging
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from .errors import NotebookSourceError
from .listing import write_listings
from .notebooks.fragments import write_fragments
from .notebooks.ipynb import write_ipynb
from .notebooks.run import Executed, execute_all
from .notebooks.source import read_all

log = logging.getLogger("mkdocs.plugins.kbsite")


@dataclass(frozen=True)
class Project:
    """项目根与由它决定的各个位置；缓存全在 `.cache/` 下，可以整个删掉。"""

    root: Path

    @property
    def notebooks(self) -> Path:
        return self.root / "notebooks"

    @property
    def cache(self) -> Path:
        return self.root / ".cache"

    @property
    def fragments(self) -> Path:
        return self.cache / "fragments"

    @property
    def ipynb(self) -> Path:
        """执行过的 .ipynb；下面的 `notebooks/` 与站点里的路径一致。"""
        return self.cache / "ipynb"

    @property
    def node_modules(self) -> Path:
        return self.root / "node_modules"


def take_turn(project: Project) -> FileLock:
    """一个项目同时只许一次构建（缓存与 `site/` 是共用的）：等到轮到自己；用完 `release`，进程死了自动放开。"""
    project.cache.mkdir(parents=True, exist_ok=True)
    lock = FileLock(project.cache / "lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("另一次构建正在进行，等它结束…")
        lock.acquire()
    return lock


@dataclass(frozen=True)
class Built:
    """笔记这一步的产物。"""

    executed: list[Executed]
    figures: dict[str, str]
    ipynb: dict[str, Path]


def build_notebooks(project: Project, *, only: str | None = None) -> Built:
    """执行（缓存里没有的）笔记，写出片段与 .ipynb；`only` 只做一份（专题键）。"""
    notebooks = read_all(project.notebooks)
    if only:
        chosen = [notebook for notebook in notebooks if notebook.key == only]
        if not chosen:
            keys = "、".join(notebook.key for notebook in notebooks)
            raise NotebookSourceError(f"没有专题键为 {only!r} 的笔记（有：{keys or '无'}）。")
        execute_all(chosen, project.root, project.cache / "notebooks")
        return Built([], {}, {})
    executed = execute_all(notebooks, project.root, project.cache / "notebooks")
    figures = write_fragments(executed, project.fragments)
    write_listings(project.root / "snippets", project.fragments / "snippets")
    return Built(executed, figures, write_ipynb(executed, project.ipynb / "notebooks"))
