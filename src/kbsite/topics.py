"""笔记标题 → 专题键的对照表 `topics.yml`：哪些标题已有页面，哪些还没写。"""

from dataclasses import dataclass
from pathlib import Path

import yaml


@dataclass(frozen=True)
class Heading:
    """笔记里的一个标题（照原文，含错字）与回答它的专题；容器标题没有专题。"""

    title: str
    topics: tuple[str, ...]


def read_headings(path: Path) -> list[Heading]:
    """按笔记中的顺序读出全部标题。"""
    rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    return [Heading(row["heading"], tuple(row.get("topics", ()))) for row in rows]


def headings_of(headings: list[Heading], key: str) -> list[str]:
    """一个专题所回答的笔记标题。"""
    return [heading.title for heading in headings if key in heading.topics]


def unwritten(headings: list[Heading], docs: Path) -> list[str]:
    """还没有页面的专题键，按笔记顺序，不重复。"""
    keys = dict.fromkeys(key for heading in headings for key in heading.topics)
    return [key for key in keys if not (docs / f"{key}.md").is_file()]
