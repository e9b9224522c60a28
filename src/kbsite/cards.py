"""Anki 牌组：每题一张牌，正面是题目，背面是一句话回答。

重新导入要能更新文字而不丢复习进度，所以这里的编号、字段名、模板名一经发布就不能改：
Anki 用 guid 认牌（由专题键得出），字段或模板的名字变了就不再更新。
"""

import io
import itertools
import os
import sqlite3
import time
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import closing
from html import escape

import genanki
import markdown

from .errors import KbsiteError
from .math.scan import replace
from .questions import Question
from .safety import problems

NAME = "面经 2025"
MODEL_ID = 1_935_407_216
FIELDS = ("题目", "章节", "难度", "回答", "网址")
FRONT = '<div class="title">{{题目}}</div><div class="meta">{{章节}} · 难度 {{难度}}</div>'
BACK = (
    '{{FrontSide}}<hr id="answer"><div class="answer">{{回答}}</div>'
    '{{#网址}}<p><a href="{{网址}}">推导、实验与追问</a></p>{{/网址}}'
)
# 不指定颜色：Anki 的夜间模式才管用
STYLE = """\
.card {max-width: 32em; margin: 1em auto; font-size: 20px; line-height: 1.7}
.title {font-weight: bold}
.meta, p {font-size: .8em}
.meta {opacity: .75}
"""
# 公式留给 Anki 自带的 MathJax，它认 \(…\)
MARKDOWN = markdown.Markdown(
    extensions=["pymdownx.arithmatex"], extension_configs={"pymdownx.arithmatex": {"generic": True}}
)


def package(questions: Sequence[Question], site_url: str, modified: int) -> bytes:
    """`.apkg` 文件的内容，由参数唯一决定；`site_url` 为空时牌上没有链接，`modified` 是 Unix 秒。"""
    model = genanki.Model(
        MODEL_ID,
        NAME,
        fields=[{"name": name} for name in FIELDS],
        templates=[{"name": "问答", "qfmt": FRONT, "afmt": BACK}],
        css=STYLE,
    )
    decks: dict[str, genanki.Deck] = {}
    for number, question in enumerate(questions):
        name = f"{NAME}::{question.section}"
        deck = decks.setdefault(name, genanki.Deck(MODEL_ID + zlib.crc32(name.encode()), name))
        deck.add_note(_note(model, question, site_url, number))
    # genanki 自己写文件时带上当时的时间；直接写到内存里的数据库，同一次提交就得到同样的字节
    with closing(sqlite3.connect(":memory:")) as connection:
        ids = itertools.count(modified * 1000)
        genanki.Package(list(decks.values())).write_to_db(connection.cursor(), modified, ids)
        connection.commit()
        collection = connection.serialize()
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for member, content in (("collection.anki2", collection), ("media", b"{}")):
            archive.writestr(zipfile.ZipInfo(member), content, zipfile.ZIP_DEFLATED)
    return file.getvalue()


def modified_time() -> int:
    """最后一次提交的时间（make 经 SOURCE_DATE_EPOCH 给出），不知道就用现在；Anki 只用较新的牌更新旧的。"""
    return int(os.environ.get("SOURCE_DATE_EPOCH") or 0) or int(time.time())


def _note(model: genanki.Model, question: Question, site_url: str, number: int) -> genanki.Note:
    url = f"{site_url.rstrip('/')}/{question.key}/" if site_url else ""
    return genanki.Note(
        model,
        [
            _html(question.title, question.key),
            escape(question.section),
            str(question.difficulty),
            _html(question.answer, question.key),
            escape(url),
        ],
        tags=[f"章节::{question.section.replace(' ', '_')}", f"难度::{question.difficulty}"],
        guid=f"mianjing-2025/{question.key}",
        due=number,
    )


def _html(text: str, key: str) -> str:
    html = MARKDOWN.reset().convert(text).removeprefix("<p>").removesuffix("</p>")
    for fault, _ in problems(html):  # make cards 不建站，页面的闸没有查过
        raise KbsiteError(f"docs/{key}.md:1: {fault}")
    return replace(html, lambda formula: escape(rf"\({formula.tex}\)"))
