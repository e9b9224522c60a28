"""在真实浏览器里读：没有别处的请求、没有脚本错误、没有布局跳动、手机宽度、深色、复制公式、子路径。"""

import re

import pytest
from sitetools import ROOT, Visitor, html_pages

SHIFT = """() => new Promise(done => {
  let sum = 0
  new PerformanceObserver(list => { for (const e of list.getEntries()) sum += e.value })
    .observe({type: "layout-shift", buffered: true})
  document.fonts.ready.then(() => setTimeout(() => done(sum), 300))
})"""

PHONE = """() => {
  const next = [...document.querySelectorAll("article h2")].find(h => h.textContent.startsWith("推导"))
  const boxes = [...document.querySelectorAll("mjx-container[display=true], .md-typeset__scrollwrap")]
  return {
    answers: next?.previousElementSibling.getBoundingClientRect().bottom,
    wide: boxes.filter(b => b.getBoundingClientRect().right > innerWidth + 1).map(b => b.dataset.tex ?? b.tagName),
    text: [...document.querySelectorAll(".kb-figure svg text")].map(node => {
      const svg = node.ownerSVGElement
      const size = parseFloat(getComputedStyle(node.querySelector("tspan") ?? node).fontSize)
      return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
    }),
  }
}"""

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

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


@pytest.fixture(scope="module")
def readings(browser, base_url, site):
    """每页只打开一次（缓存是空的）：先在手机宽度量，再放宽到桌面，再换深色。"""
    return {url: read(browser, base_url, url) for url in html_pages(site)}


def read(browser, base_url, url):
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="light", locale="zh-CN"
    )
    visitor = Visitor(context.new_page(), base_url)
    page = visitor.page
    page.goto(base_url + url, wait_until="load")
    found = {"shift": page.evaluate(SHIFT), **page.evaluate(PHONE), "overflow": [page.evaluate(OVERFLOW)]}
    page.set_viewport_size({"width": 1280, "height": 844})
    found["contrast"] = {"light": page.evaluate(CONTRAST)}
    found["overflow"].append(page.evaluate(OVERFLOW))
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("document.body.dataset.mdColorScheme === 'slate'")
    page.wait_for_timeout(150)  # 换色有过渡
    found["contrast"]["dark"] = page.evaluate(CONTRAST)
    context.close()
    return {**found, "faults": [*visitor.foreign, *visitor.errors]}


@pytest.fixture
def topics(readings, topic_pages):
    return {key: readings[f"{key}/"] for key in topic_pages}


def test_every_page_loads_alone_and_quietly(readings):
    assert {url: found["faults"] for url, found in readings.items() if found["faults"]} == {}


def test_no_page_is_wider_than_the_screen(readings):
    assert {url: found["overflow"] for url, found in readings.items() if max(found["overflow"]) > 0} == {}


def test_formulas_cause_no_layout_shift(topics):
    assert {key: found["shift"] for key, found in topics.items() if found["shift"] >= 0.01} == {}


def test_question_and_both_answers_fit_one_phone_screen(topics):
    assert {key: found["answers"] for key, found in topics.items() if found["answers"] > 844} == {}


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_figures_are_legible(topics, scheme):
    for key, found in topics.items():
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
