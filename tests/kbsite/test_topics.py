"""笔记标题的对照表：一个标题都不能丢。真值是 data/notes-headings.txt，即笔记的全部标题（链接已去掉）。"""

from pathlib import Path

from kbsite.topics import read_headings, unwritten

ROOT = Path(__file__).parents[2]
NOTES = (Path(__file__).parent / "data/notes-headings.txt").read_text(encoding="utf-8").splitlines()
SECTIONS = {"architecture", "training", "rl", "reasoning", "systems", "interviews"}
CONTAINERS = {"面经2025", "常见问题总结", "基础知识", "Transformer 相关", "R1 相关", "针对GRPO的改进"}


def test_no_heading_of_the_notes_is_lost():
    assert len(NOTES) == 72
    assert [heading.title for heading in read_headings(ROOT / "topics.yml")] == NOTES


def test_every_heading_with_content_has_a_topic():
    without = {heading.title for heading in read_headings(ROOT / "topics.yml") if not heading.topics}
    assert without == CONTAINERS


def test_topic_keys_are_section_slash_slug():
    for heading in read_headings(ROOT / "topics.yml"):
        for key in heading.topics:
            section, _, slug = key.partition("/")
            assert section in SECTIONS
            assert slug == slug.lower() and "_" not in slug


def test_every_heading_of_the_notes_has_its_page():
    assert unwritten(read_headings(ROOT / "topics.yml"), ROOT / "docs") == []


def test_unwritten_lists_each_missing_topic_once(tmp_path):
    (tmp_path / "rl").mkdir()
    (tmp_path / "rl/dpo.md").write_text("x")
    headings = read_headings(ROOT / "topics.yml")
    missing = unwritten(headings, tmp_path)
    assert "rl/dpo" not in missing and missing.count("rl/dapo") == 1
