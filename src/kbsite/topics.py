"""笔记标题 → 专题键的对照表 `topics.yml`：哪些标题已有页面，哪些还没写。"""

from dataclasses import dataclass
from pathlib import Path

import yaml

from .errors import KbsiteError


@dataclass(frozen=True)
class Heading:
    """笔记里的一个标题（照原文，含错字）与回答它的专题；容器标题没有专题。"""

    title: str
    topics: tuple[str, ...]


def read_headings(path: Path) -> list[Heading]:
    """按笔记中的顺序读出全部标题。"""
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8-sig"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 1 if mark else 1
        raise KbsiteError(
            f"{path}:{line}: 不是合法的 YAML：{getattr(error, 'problem', None) or error}。含冒号的标题用双引号括起来。"
        ) from None
    if not isinstance(rows, list):
        raise KbsiteError(f'{path}:1: 应当是一个列表。每项写成 `- heading: "标题"`。')
    for number, row in enumerate(rows, 1):
        topics = row.get("topics", []) if isinstance(row, dict) else None
        if not isinstance(topics, list) or not all(
            isinstance(text, str) for text in [row.get("heading"), *topics]
        ):
            raise KbsiteError(
                f'{path}:1: 第 {number} 项写错了：{row!r}。写成 `- heading: "标题"` 与 `  topics: [rl/dpo]`。'
            )
    return [Heading(row["heading"], tuple(row.get("topics", []))) for row in rows]


def headings_of(headings: list[Heading], key: str) -> list[str]:
    """一个专题所回答的笔记标题。"""
    return [heading.title for heading in headings if key in heading.topics]


def unwritten(headings: list[Heading], docs: Path) -> list[str]:
    """还没有页面的专题键，按笔记顺序，不重复。"""
    keys = dict.fromkeys(key for heading in headings for key in heading.topics)
    return [key for key in keys if not (docs / f"{key}.md").is_file()]
