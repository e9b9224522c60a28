"""全站的题目索引：由各页的 front matter 生成，一题一条，页面里写一行 `{{ questions }}`。"""

import posixpath
import re
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

LIST = re.compile(r"^\{\{ questions \}\}[ \t]*$", re.M)


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


def fill_questions(markdown: str, questions: Iterable[Question], page: str) -> str:
    """把独占一行的 `{{ questions }}` 换成筛选栏与题目列表；`page` 是所在页面的路径，链接相对它写。"""
    if not LIST.search(markdown):
        return markdown
    questions = list(questions)
    text = _controls(questions) + "\n\n" + _list(questions, posixpath.dirname(page))
    return LIST.sub(lambda _: text, markdown)


def _controls(questions: list[Question]) -> str:
    """筛选与排序；脚本没有运行时不显示，列表照样完整。"""
    sections = dict.fromkeys(question.section for question in questions)
    options = "".join(f"<option>{escape(section)}</option>" for section in sections)
    return (
        '<form class="kb-filter" hidden data-search-exclude="true">'
        '<label>筛选 <input type="search" name="words" placeholder="题目、答案、缩写" autocomplete="off"></label>'
        f'<label>章节 <select name="section"><option value="">全部</option>{options}</select></label>'
        '<label>顺序 <select name="order"><option value="">按章节</option>'
        '<option value="1">由易到难</option><option value="-1">由难到易</option></select></label>'
        f'<output name="count">{len(questions)} 题</output></form>'
    )


def _list(questions: list[Question], folder: str) -> str:
    """不进搜索索引：每个答案在自己的页面里已有，这里再出现一次只会挤掉那一页。"""
    rows = ['<ol class="kb-questions" data-search-exclude="true" markdown="block">']
    for question in questions:
        href = posixpath.relpath(f"{question.key}.md", folder or ".")
        rows.append(
            f'<li markdown="block" data-section="{escape(question.section)}"'
            f' data-difficulty="{question.difficulty}" data-words="{escape(" ".join(question.words))}">\n\n'
            f"**[{question.title}]({href})**\n"
            f'<span class="kb-meta">{escape(question.section)} · 难度 {question.difficulty}</span>\n\n'
            f"{question.answer}\n\n</li>"
        )
    return "\n".join([*rows, "</ol>"])
