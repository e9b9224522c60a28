"""全站的题目：由各页的 front matter 读出；页面里写一行 `{{ questions }}` 就是题目索引与自测。"""

import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape
from pathlib import Path

import yaml

from . import front_matter
from .errors import KbsiteError
from .pages import placeholder
from .safety import check_meta
from .topics import Heading, headings_of

LIST = placeholder("questions")


@dataclass(frozen=True)
class Question:
    """一个专题页在索引里的一条；`words` 是另外可以用来筛选的词（标签、笔记原标题），`verified` 是核对的日期。"""

    key: str
    title: str
    section: str
    difficulty: int
    answer: str
    words: tuple[str, ...]
    verified: str = ""


class _NavLoader(yaml.SafeLoader):
    """mkdocs.yml 里的 `!ENV`、`!!python/name` 只有 MkDocs 认得，与导航无关，当作空值。"""


_NavLoader.add_multi_constructor("", lambda loader, suffix, node: None)


def read_nav(config: Path) -> list:
    """mkdocs.yml 的导航。"""
    return yaml.load(config.read_text(encoding="utf-8"), _NavLoader).get("nav") or []


def read_questions(nav: list | None, docs: Path, headings: list[Heading]) -> list[Question]:
    """导航里有一句话回答的页面，按导航的顺序。"""
    return [
        _question(key, section, meta, headings)
        for section, key, meta in nav_pages(nav, docs)
        if "answer" in meta
    ]


def nav_pages(nav: list | None, docs: Path) -> Iterable[tuple[str, str, dict]]:
    """导航各节里的页面：（节名，专题键，front matter）。"""
    for sections in nav or []:
        for name, entries in sections.items() if isinstance(sections, dict) else ():
            for entry in entries if isinstance(entries, list) else ():
                if isinstance(entry, str) and entry.endswith(".md"):
                    key = entry.removesuffix(".md")
                    yield name, key, _front_matter(docs, key)


def _front_matter(docs: Path, key: str) -> dict:
    """没有这个文件（MkDocs 会报）、没有 front matter 就是空的。"""
    path = docs / f"{key}.md"
    if not path.is_file():
        return {}
    meta = front_matter.read(path.read_text(encoding="utf-8-sig"), f"docs/{key}.md")
    check_meta(meta, f"docs/{key}.md")  # 在用到它的值之前
    return meta


def _question(key: str, section: str, meta: dict, headings: list[Heading]) -> Question:
    missing = [name for name in ("title", "answer", "difficulty") if not meta.get(name)]
    if missing:
        raise KbsiteError(
            f"docs/{key}.md:1: 有 answer 的页面是一道题，front matter 还缺 {'、'.join(missing)}。补上（KB102）。"
        )
    words = (*meta.get("tags", ()), *headings_of(headings, key))
    answer = str(meta["answer"]).strip()
    verified = str(meta.get("verified", ""))
    return Question(key, str(meta["title"]), section, meta["difficulty"], answer, words, verified)


def fill_questions(markdown: str, questions: list[Question], page: str) -> str:
    """把独占一行的 `{{ questions }}` 换成题目索引；`page` 是所在页面的路径，链接相对它写。"""
    parts = (_controls(questions), _list(questions, posixpath.dirname(page)), SELF_TEST)
    return LIST.sub(lambda _: "\n\n".join(parts), markdown)


# 脚本没有运行时不显示：答案都在折叠块里，列表照样完整
SELF_TEST = (
    '<form class="kb-selftest" hidden data-search-exclude="true">'
    '<button type="button" name="reveal">看答案 <kbd>空格</kbd></button>'
    '<button type="button" name="known">会 <kbd>1</kbd></button>'
    '<button type="button" name="missed">不会 <kbd>2</kbd></button>'
    '<button type="button" name="again"></button>'
    '<button type="button" name="leave">结束自测</button></form>'
)


def _controls(questions: list[Question]) -> str:
    """筛选、排序与按钮；最后一行给读屏软件报进度。"""
    sections = dict.fromkeys(question.section for question in questions)
    options = "".join(f"<option>{escape(section)}</option>" for section in sections)
    return (
        '<form class="kb-filter" hidden data-search-exclude="true">'
        '<label>筛选 <input type="search" name="words" placeholder="题目、答案、缩写" autocomplete="off"></label>'
        f'<label>章节 <select name="section"><option value="">全部</option>{options}</select></label>'
        '<label>顺序 <select name="order"><option value="">按章节</option>'
        '<option value="1">由易到难</option><option value="-1">由难到易</option></select></label>'
        '<label><input type="checkbox" name="missed" value="1"> 只看不会的</label>'
        f'<output name="count">{len(questions)} 题</output>'
        '<button type="button" name="fold">全部展开</button>'
        '<button type="button" name="test">开始自测</button>'
        '<button type="button" name="forget" hidden></button></form>'
        '<p class="kb-progress" role="status" data-search-exclude="true"></p>'
    )


def _list(questions: list[Question], folder: str) -> str:
    """不进搜索索引：每个答案在自己的页面里已有，这里再出现一次只会挤掉那一页。"""
    rows = ['<ol class="kb-questions" data-search-exclude="true" markdown="block">']
    for question in questions:
        href = posixpath.relpath(f"{question.key}.md", folder or ".")
        rows.append(
            f'<li markdown="block" data-key="{question.key}" data-section="{escape(question.section)}"'
            f' data-difficulty="{question.difficulty}" data-words="{escape(" ".join(question.words))}">\n'
            f'<details markdown="block">\n<summary markdown="span">{question.title} '
            f'<span class="kb-meta">{escape(question.section)} · 难度 {question.difficulty}</span></summary>\n\n'
            f"{question.answer} [推导与追问]({href})\n\n</details>\n</li>"
        )
    return "\n".join([*rows, "</ol>"])
