"""Anki 牌组：真值是官方的 anki 包，把文件导入一个新建的收藏，看里面有什么。

导入用 Anki 界面上的默认选项（较新的笔记才更新）；两次的修改时间都在过去，
所以「更新了」说明比较的确实是牌上写的时间，不是导入的时间。
"""

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from anki.collection import Collection, ImportAnkiPackageRequest

from kbsite.cards import package
from kbsite.math.mathjax import node_executable
from kbsite.questions import Question, read_nav, read_questions

ROOT = Path(__file__).parents[2]
SITE = "https://example.org/some-repo/"
FIRST, SECOND = 1_700_000_000, 1_700_000_060
CLIP = Question(
    "rl/clip", "裁剪（Clip）", "强化学习与对齐", 2, r"$\rho_1<1$ 与 $a_2$ 时 *不* 裁剪 `x_1`。", ()
)
DPO = Question("rl/dpo", "DPO", "强化学习与对齐", 4, "二分类。", ())
ADAMW = Question("training/adamw", "AdamW & <衰减>", "训练 与推理", 3, "解耦。", ())


@pytest.fixture
def collection(tmp_path):
    col = Collection(str(tmp_path / "collection.anki2"))
    yield col
    col.close()


def load(col, tmp_path, questions, modified=FIRST, site=SITE):
    """导入一次，返回 {专题的第一个词: 笔记}。"""
    path = tmp_path / "cards.apkg"
    path.write_bytes(package(questions, site, modified))
    options = col._backend.get_import_anki_package_presets()
    col.import_anki_package(ImportAnkiPackageRequest(package_path=str(path), options=options))
    notes = [col.get_note(note_id) for note_id in col.find_notes("")]
    assert len({note["题目"] for note in notes}) == len(notes)
    return {re.split(r"\W", note["题目"])[0]: note for note in notes}


def test_one_card_per_question_in_the_deck_of_its_section(collection, tmp_path):
    notes = load(collection, tmp_path, [CLIP, DPO, ADAMW])
    assert len(notes) == collection.card_count() == 3
    decks = {name: collection.decks.name(note.cards()[0].did) for name, note in notes.items()}
    assert decks == {
        "裁剪": "面经 2025::强化学习与对齐",
        "DPO": "面经 2025::强化学习与对齐",
        "AdamW": "面经 2025::训练 与推理",
    }
    assert "面经 2025" in [deck.name for deck in collection.decks.all_names_and_ids()]
    assert sorted(notes["AdamW"].tags) == ["章节::训练_与推理", "难度::3"]


def test_fields_hold_html_with_formulas_as_anki_reads_them(collection, tmp_path):
    notes = load(collection, tmp_path, [CLIP, ADAMW])
    assert dict(notes["裁剪"].items()) == {
        "题目": "裁剪（Clip）",
        "章节": "强化学习与对齐",
        "难度": "2",
        "回答": r"\(\rho_1&lt;1\) 与 \(a_2\) 时 <em>不</em> 裁剪 <code>x_1</code>。",
        "网址": "https://example.org/some-repo/rl/clip/",
    }
    assert notes["AdamW"]["题目"] == "AdamW &amp; &lt;衰减&gt;"


def test_the_answer_and_the_link_are_on_the_back_only(collection, tmp_path):
    card = load(collection, tmp_path, [DPO])["DPO"].cards()[0]
    link = '<a href="https://example.org/some-repo/rl/dpo/">'
    assert "DPO" in card.question() and "难度 4" in card.question()
    assert "二分类" not in card.question() and link not in card.question()
    assert "DPO" in card.answer() and "二分类" in card.answer() and link in card.answer()


def test_without_an_address_there_is_no_link(collection, tmp_path):
    assert "<a " not in load(collection, tmp_path, [DPO], site="")["DPO"].cards()[0].answer()


def test_new_cards_come_in_the_order_of_the_pages(collection, tmp_path):
    notes = load(collection, tmp_path, [DPO, ADAMW, CLIP])
    assert sorted(notes, key=lambda name: notes[name].cards()[0].due) == ["DPO", "AdamW", "裁剪"]


def test_reimport_updates_text_keeps_reviews_and_leaves_removed_pages_alone(collection, tmp_path):
    before = load(collection, tmp_path, [CLIP, DPO])
    collection.decks.select(before["DPO"].cards()[0].did)
    for _ in range(2):
        card = collection.sched.getCard()
        collection.sched.answerCard(card, 4)
    reviewed = {name: note.cards()[0] for name, note in before.items()}
    assert all(card.reps == 1 and card.ivl > 0 for card in reviewed.values())

    changed = replace(DPO, title="DPO 的推导", answer="配分函数抵消。", difficulty=5)
    after = load(collection, tmp_path, [changed, ADAMW], SECOND)
    assert sorted(after) == ["AdamW", "DPO", "裁剪"]
    assert {name: after[name].id for name in before} == {name: note.id for name, note in before.items()}
    assert (after["DPO"]["题目"], after["DPO"]["回答"]) == ("DPO 的推导", "配分函数抵消。")
    assert "难度::5" in after["DPO"].tags
    assert after["裁剪"]["回答"] == before["裁剪"]["回答"]
    for name, card in reviewed.items():
        kept = after[name].cards()[0]
        assert (kept.id, kept.reps, kept.ivl, kept.due, kept.factor) == (
            card.id,
            card.reps,
            card.ivl,
            card.due,
            card.factor,
        )


def test_published_names_and_ids_do_not_change(collection, tmp_path):
    """这些值已在读者的牌组里；改了任何一个，旧牌就不再更新，或者变成两份。"""
    note = load(collection, tmp_path, [CLIP])["裁剪"]
    kind = note.note_type()
    assert (note.guid, kind["id"]) == ("mianjing-2025/rl/clip", 1_935_407_216)
    assert [field["name"] for field in kind["flds"]] == ["题目", "章节", "难度", "回答", "网址"]
    assert [template["name"] for template in kind["tmpls"]] == ["问答"]


@pytest.fixture(scope="module")
def questions():
    """仓库里的全部题目。"""
    return read_questions(read_nav(ROOT / "mkdocs.yml"), ROOT / "docs", [])


def test_every_page_with_an_answer_is_a_card(collection, tmp_path, questions):
    pages = [page for page in ROOT.glob("docs/*/*.md") if "\nanswer:" in page.read_text(encoding="utf-8")]
    notes = load(collection, tmp_path, questions)
    assert len(pages) == collection.card_count() > 50
    text = "".join(value for note in notes.values() for value in note.values())
    assert "$" not in text and "arithmatex" not in text


def test_formulas_on_cards_need_nothing_beyond_base_and_ams(questions):
    """Anki 的 MathJax 没有本站的设置；未定义的命令在这里抛错，在 Anki 里是一段红字。"""
    script = """
    const load = (path) => import(process.argv[1] + "/@mathjax/src/mjs/" + path);
    const { mathjax } = await load("mathjax.js");
    const { TeX } = await load("input/tex.js");
    const { liteAdaptor } = await load("adaptors/liteAdaptor.js");
    const { RegisterHTMLHandler } = await load("handlers/html.js");
    await load("input/tex/base/BaseConfiguration.js");
    await load("input/tex/ams/AmsConfiguration.js");
    RegisterHTMLHandler(liteAdaptor());
    const tex = new TeX({ packages: ["base", "ams"], formatError: (_, error) => { throw error; } });
    const page = mathjax.document("", { InputJax: tex });
    for (const formula of JSON.parse(process.argv[2])) {
      try { page.convert(formula, { end: 20 }); } catch (error) { console.log(formula, error.message); }
    }
    """
    text = " ".join(question.title + question.answer for question in questions)
    formulas = re.findall(r"\$([^$]+)\$", text)
    assert len(formulas) > 30

    def complaints(items):
        modules = (ROOT / "node_modules").resolve().as_uri()
        command = [node_executable(), "--input-type=module", "-e", script, modules, json.dumps(items)]
        return subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True).stdout

    assert complaints(formulas) == ""
    assert r"Undefined control sequence \cancel" in complaints([r"\cancel{x}"])


def small(project):
    """两题的小站。"""
    project.write("docs/rl/clip.md", "---\ntitle: 裁剪\ndifficulty: 2\nanswer: '限制 $r$。'\n---\n\n# 裁剪\n")
    project.write("docs/rl/dpo.md", "---\ntitle: DPO\ndifficulty: 4\nanswer: 二分类。\n---\n\n# DPO\n")
    text = (project.root / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    project.write(
        "mkdocs.yml", text + "\nnav:\n  - index.md\n  - 强化学习:\n      - rl/clip.md\n      - rl/dpo.md\n"
    )


def command(project, **extra):
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "PYTHONUTF8": "1", **extra}
    return subprocess.run(
        [sys.executable, "-m", "kbsite", "cards"],
        cwd=project.root,
        env=environment,
        capture_output=True,
        text=True,
        encoding="utf-8",
    )


def test_command_writes_the_very_file_the_site_serves(project):
    small(project)
    place = {"SITE_URL": SITE, "SOURCE_DATE_EPOCH": str(FIRST)}
    result = command(project, PYTHONHASHSEED="1", **place)
    assert result.returncode == 0, result.stderr
    assert "2 张牌" in result.stdout and SITE in result.stdout
    built = project.build("--strict", PYTHONHASHSEED="2", **place)
    assert built.returncode == 0, built.stderr
    served = (project.root / "site/interviews/cards.apkg").read_bytes()
    assert served == (project.root / "cards.apkg").read_bytes()


def test_command_says_that_without_an_address_there_are_no_links(project):
    small(project)
    assert "没有 SITE_URL" in command(project, SITE_URL="").stdout


def test_a_question_that_lacks_its_difficulty_is_an_error(project):
    small(project)
    project.write("docs/rl/dpo.md", "---\ntitle: DPO\nanswer: 二分类。\n---\n")
    for result in (command(project), project.build()):
        assert result.returncode == 1
        assert "docs/rl/dpo.md:1:" in result.stderr and "还缺 difficulty" in result.stderr
        assert "Traceback" not in result.stderr


def test_broken_front_matter_is_reported_with_its_line(project):
    small(project)
    project.write("docs/rl/dpo.md", "---\ntitle: DPO\nanswer: 一: 二\n---\n")
    result = command(project)
    assert result.returncode == 1 and "docs/rl/dpo.md:3:" in result.stderr


def test_a_project_without_questions_or_configuration_is_an_error(project):
    assert "没有一页的 front matter 有 answer" in command(project).stderr
    (project.root / "mkdocs.yml").unlink()
    result = command(project)
    assert result.returncode == 1 and "mkdocs.yml 不存在" in result.stderr
