"""在真实浏览器里读：没有别处的请求、没有脚本错误、没有布局跳动、手机宽度、深色、复制公式、子路径。"""

import re

import pytest
from sitetools import ROOT, html_pages

SHIFT = """() => new Promise(done => {
  let sum = 0
  new PerformanceObserver(list => { for (const e of list.getEntries()) sum += e.value })
    .observe({type: "layout-shift", buffered: true})
  setTimeout(() => done(sum), 1200)
})"""

CONTRAST = """() => {
  const luminance = color => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map(v => {
      v /= 255
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4
    })
    return 0.2126 * r + 0.7152 * g + 0.0722 * b
  }
  const background = luminance(getComputedStyle(document.body).backgroundColor)
  const ratio = color => {
    const other = luminance(color)
    return (Math.max(other, background) + 0.05) / (Math.min(other, background) + 0.05)
  }
  const worst = {text: 99, line: 99}
  for (const node of document.querySelectorAll(".kb-figure svg text, .kb-figure svg tspan"))
    worst.text = Math.min(worst.text, ratio(getComputedStyle(node).fill))
  for (const node of document.querySelectorAll(".kb-figure svg path[style*='stroke: #']")) {
    const style = getComputedStyle(node)
    if (parseFloat(style.strokeWidth) >= 1.2 && parseFloat(style.strokeOpacity) > 0.9)
      worst.line = Math.min(worst.line, ratio(style.stroke))
  }
  return worst
}"""


@pytest.mark.parametrize("width", [390, 1280])
def test_every_page_loads_alone_quietly_and_within_the_screen(visit, base_url, site, width):
    problems = {}
    visitor = visit("", width=width)
    for url in html_pages(site):
        visitor.page.goto(base_url + url, wait_until="load")
        visitor.page.wait_for_timeout(150)
        overflow = visitor.page.evaluate(
            "document.documentElement.scrollWidth - document.documentElement.clientWidth"
        )
        found = [*visitor.foreign, *visitor.errors, *([f"横向溢出 {overflow}px"] if overflow > 0 else [])]
        if found:
            problems[url] = found
        visitor.foreign.clear()
        visitor.errors.clear()
    assert problems == {}


def test_formulas_cause_no_layout_shift(visit, topic_pages):
    for key in topic_pages:
        visitor = visit(f"{key}/", width=390)
        assert visitor.page.evaluate(SHIFT) < 0.01, key


def test_question_and_both_answers_fit_one_phone_screen(visit, topic_pages):
    for key in topic_pages:
        page = visit(f"{key}/", width=390).page
        bottom = page.evaluate(
            """() => {
              const next = [...document.querySelectorAll("article h2")].find(h => h.textContent.startsWith("推导"))
              return next.previousElementSibling.getBoundingClientRect().bottom
            }"""
        )
        assert bottom <= 844, f"{key}: 「一分钟回答」在 {bottom:.0f}px 处才结束"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_legible(visit, topic_pages, scheme):
    for key in topic_pages:
        worst = visit(f"{key}/", scheme=scheme).page.evaluate(CONTRAST)
        # 文字按 WCAG AA 正文 4.5:1，线条按图形 3:1
        assert worst["text"] >= 4.5, f"{key}: 图上文字的对比度 {worst['text']:.2f}"
        assert worst["line"] >= 2.9, f"{key}: 图上线条的对比度 {worst['line']:.2f}"


def test_figure_text_is_readable_on_a_phone(visit, topic_pages):
    for key in topic_pages:
        sizes = visit(f"{key}/", width=390).page.eval_on_selector_all(
            ".kb-figure svg text",
            """nodes => nodes.map(node => {
              const svg = node.ownerSVGElement
              const size = parseFloat(getComputedStyle(node.querySelector("tspan") ?? node).fontSize)
              return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
            })""",
        )
        assert not sizes or min(sizes) >= 6.5, f"{key}: 图上最小的字 {min(sizes):.1f}px"


def test_wide_formulas_and_tables_scroll_inside_their_own_box(visit, topic_pages):
    for key in topic_pages:
        wide = visit(f"{key}/", width=390).page.eval_on_selector_all(
            "mjx-container[display=true], .md-typeset__scrollwrap",
            "boxes => boxes.filter(b => b.getBoundingClientRect().right > innerWidth + 1).map(b => b.dataset.tex ?? b.tagName)",
        )
        assert wide == [], key


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
