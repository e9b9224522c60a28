"""题目索引：由 front matter 生成，一页一条，公式照排，不进搜索索引。"""

import json
import re

from kbsite.questions import Question, fill_questions

QUESTIONS = [
    Question("rl/clip", "裁剪（Clip）", "强化学习", 2, "限制 $\\rho$。", ("PPO", "clip 细节")),
    Question("training/adamw", "AdamW", "训练", 3, "解耦 <衰减>。", ()),
]


def test_each_question_links_to_its_page_and_keeps_its_answer():
    text = fill_questions("前\n\n{{ questions }}\n\n后", QUESTIONS, "interviews/index.md")
    assert "](../rl/clip.md)" in text and "](../training/adamw.md)" in text
    assert "限制 $\\rho$。" in text and 'data-words="PPO clip 细节"' in text
    assert text.index("rl/clip.md") < text.index("training/adamw.md")
    assert text.startswith("前\n\n<form") and text.endswith("</form>\n\n后")


def test_an_answer_is_folded_under_its_title_not_in_it():
    text = fill_questions("{{ questions }}", QUESTIONS, "interviews/index.md")
    summary, _, body = text.partition("<summary")[2].partition("</summary>")
    assert "裁剪（Clip）" in summary and "强化学习 · 难度 2" in summary
    assert "限制" not in summary and body.partition("</details>")[0].strip().startswith("限制")


def test_sections_are_offered_once_in_the_order_of_the_pages():
    text = fill_questions("{{ questions }}", [*QUESTIONS, QUESTIONS[0]], "index.md")
    assert re.findall(r"<option>(.*?)</option>", text) == ["强化学习", "训练"]
    assert "3 题" in text and "](rl/clip.md)" in text


def test_a_page_without_the_placeholder_is_untouched():
    assert fill_questions("`{{ questions }}` 是占位行", QUESTIONS, "index.md") == "`{{ questions }}` 是占位行"


def test_built_index_lists_pages_with_answers_only_and_stays_out_of_search(project):
    project.write("docs/rl/index.md", "# 目录\n")
    project.write(
        "docs/rl/demo.md",
        "---\ntitle: 演示（Demo）\ndifficulty: 2\ntags: [标签甲]\nanswer: 回答含 $a^2$。\n---\n\n# 演示（Demo）\n",
    )
    project.write("docs/all.md", "# 索引\n\n{{ questions }}\n")
    text = (project.root / "mkdocs.yml").read_text(encoding="utf-8").partition("\nnav:\n")[0]
    project.write(
        "mkdocs.yml",
        text
        + "\nnav:\n  - index.md\n  - 强化学习:\n      - rl/index.md\n      - rl/demo.md\n  - 其他:\n      - all.md\n",
    )
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    html = project.page("all")
    items = re.findall(r"<li data-difficulty.*?>", html)
    assert items == [
        '<li data-difficulty="2" data-key="rl/demo" data-section="强化学习" data-words="标签甲">'
    ]
    assert re.search(r"<details>\s*<summary>演示（Demo）", html)
    assert 'href="../rl/demo/"' in html and 'data-tex="a^2"' in html and "questions.js" in html
    assert "questions.js" not in project.page("rl/demo") and "selftest.js" not in project.page("rl/demo")
    texts = [
        json.loads(path.read_text(encoding="utf-8")) for path in project.root.glob("site/search/*/p*.json")
    ]
    assert {page["url"] for page in texts} >= {"all/", "rl/demo/"}
    assert "回答含" not in json.dumps([page for page in texts if page["url"] == "all/"], ensure_ascii=False)
