"""在真实浏览器里读：没有别处的请求、没有脚本错误、没有布局跳动、手机宽度、深色、复制公式、子路径。"""

import re

import pytest
from sitetools import ROOT


def test_every_page_loads_alone_and_quietly(readings):
    assert {url: found["faults"] for url, found in readings.items() if found["faults"]} == {}


def test_no_page_is_wider_than_the_screen(readings):
    assert {url: found["overflow"] for url, found in readings.items() if max(found["overflow"]) > 0} == {}


def test_nothing_shifts_after_the_first_paint(readings):
    assert {url: found["shift"] for url, found in readings.items() if found["shift"] >= 0.01} == {}


def test_question_and_both_answers_fit_one_phone_screen(topics):
    assert {key: found["answers"] for key, found in topics.items() if found["answers"] > 844} == {}


@pytest.mark.parametrize("scheme", ["light", "dark", "print"])
def test_figures_are_legible(readings, scheme):
    for key, found in readings.items():
        worst = found["contrast"][scheme]
        # 文字按 WCAG AA 正文 4.5:1，线条按图形 3:1
        assert worst["text"] >= 4.5, f"{key}: 图上文字的对比度 {worst['text']:.2f}"
        assert worst["line"] >= 2.9, f"{key}: 图上线条的对比度 {worst['line']:.2f}"


def test_figure_text_is_readable_on_a_phone(topics):
    for key, found in topics.items():
        assert min(found["text"], default=99) >= 6.5, f"{key}: 图上最小的字 {min(found['text']):.1f}px"


def test_wide_formulas_and_tables_scroll_inside_their_own_box(topics):
    assert {key: found["wide"] for key, found in topics.items() if found["wide"]} == {}


def test_copied_formulas_become_tex(visit):
    page = visit("rl/dpo/").page
    text = page.evaluate(
        """() => {
          const range = document.createRange()
          range.selectNodeContents(document.querySelector("article"))
          getSelection().removeAllRanges()
          getSelection().addRange(range)
          const data = new DataTransfer()
          document.dispatchEvent(new ClipboardEvent("copy", {clipboardData: data, cancelable: true}))
          return data.getData("text/plain")
        }"""
    )
    assert r"$\pi_{\text{ref}}$" in text
    assert re.search(r"\$\$[^$]*\\log\\sigma[^$]*\$\$", text)


def test_follow_ups_are_folded_and_open_on_click(visit):
    page = visit("rl/dpo/", width=390).page
    fold = page.locator("article details.question").first
    assert fold.get_attribute("open") is None
    fold.locator("summary").click()
    assert fold.locator(":scope > p").first.is_visible()


def test_theme_switch_cycles_between_light_and_dark(visit):
    page = visit("rl/dpo/").page
    backgrounds = set()
    for _ in range(3):
        page.locator(".md-header form[data-md-component=palette] label:visible").click()
        page.wait_for_timeout(200)
        backgrounds.add(page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(backgrounds) == 2


def test_site_has_every_page_of_the_navigation(site):
    pages = [path for path in (ROOT / "docs").rglob("*.md")]
    for path in pages:
        key = path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        target = site / (key.removesuffix("index") if key.endswith("index") else key) / "index.html"
        assert target.is_file(), key
