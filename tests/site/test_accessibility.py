"""读屏软件、键盘、手指：axe 的规则、图的替代文字、公式只读一遍、走得到的焦点、点得中的控件。"""

import re
from collections import Counter
from html.parser import HTMLParser

import pytest
from sitetools import wait


@pytest.fixture(scope="module")
def pages(site):
    return {
        path.relative_to(site).as_posix(): path.read_text(encoding="utf-8") for path in site.rglob("*.html")
    }


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_nothing_serious(readings, scheme):
    found = {url: found["violations"][scheme] for url, found in readings.items()}
    assert {url: violations for url, violations in found.items() if violations} == {}


class _Figures(HTMLParser):
    """正文里的图：`<img>` 与不是图标的 `<svg>`；`loose` 是没有替代文字或不在图框里的。"""

    def __init__(self, html):
        super().__init__()
        self.count = 0
        self.loose = []
        self.frame = False
        self.feed(re.search(r"<article.*</article>", html, re.S)[0])

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if tag == "figure":
            self.frame = attributes.get("class") == "kb-figure"
        elif tag == "img" or tag == "svg" and attributes.get("viewbox") != "0 0 24 24":
            self.count += 1
            named = attributes.get("role") == "img" and len(attributes.get("aria-label", "")) > 4
            if not (named and self.frame):
                self.loose.append(self.get_starttag_text()[:200])

    def handle_endtag(self, tag):
        if tag == "figure":
            self.frame = False


def test_every_figure_has_alternative_text(pages, topic_pages):
    figures = {url: _Figures(html) for url, html in pages.items()}
    assert {url: found.loose for url, found in figures.items() if found.loose} == {}
    # 笔记页的图不少于专题页：它们曾是没有替代文字、不随主题变色的图片
    for key in topic_pages:
        notebook = figures.get(f"notebooks/{key}/index.html")
        assert notebook is None or notebook.count >= figures[f"{key}/index.html"].count, key


def test_ids_are_unique(pages):
    for url, html in pages.items():
        ids = Counter(re.findall(r"<[a-zA-Z][^<>]*?\sid=\"([^\"]+)\"", html))
        assert [name for name, count in ids.items() if count > 1] == [], url


def test_each_formula_has_one_readable_version(pages):
    for url, html in pages.items():
        formulas = html.count("<mjx-container ")
        hidden = len(re.findall(r"<mjx-math\b[^>]*\baria-hidden=\"true\"", html))
        readable = len(re.findall(r"<mjx-assistive-mml\b[^>]*><math\b", html))
        assert (hidden, readable) == (formulas, formulas), url


def test_a_screen_reader_hears_each_formula_once(visit):
    """问浏览器的无障碍树：公式一个不少，每个 β 只有一份（浏览器把它报成斜体的 𝛽）。"""
    page = visit("rl/dpo/").page
    shown = page.evaluate(
        """[...document.querySelectorAll("mjx-container")].filter(formula => formula.checkVisibility()).map(formula =>
          [...formula.querySelectorAll("mi")].filter(mi => mi.textContent === "β").length)"""
    )
    tree = page.context.new_cdp_session(page).send("Accessibility.getFullAXTree")["nodes"]
    heard = [
        (node["role"]["value"], node.get("name", {}).get("value")) for node in tree if not node["ignored"]
    ]
    assert sum(role == "MathMLMath" for role, _ in heard) == len(shown) > 50
    assert heard.count(("StaticText", "𝛽")) == sum(shown) > 10


def test_what_scrolls_can_be_reached_by_keyboard(readings):
    assert {url: found["stuck"] for url, found in readings.items() if found["stuck"]} == {}
    assert sum(found["scrolling"] for found in readings.values()) > 0


def test_only_what_scrolls_takes_a_tab_stop(visit):
    page = visit("api/rl/", width=390).page
    stops = "document.querySelectorAll('mjx-container[tabindex=\"0\"]').length"
    wait(page, f"{stops} > 0")
    narrow = page.evaluate(stops)
    page.set_viewport_size({"width": 1280, "height": 844})
    wait(page, f"{stops} < {narrow}")


def test_controls_are_large_enough_for_a_finger(readings):
    assert {url: found["small"] for url, found in readings.items() if found["small"]} == {}


FOCUSED = """() => {
  const node = document.activeElement
  const label = node.matches(".md-option") ? node.nextElementSibling : node
  const {outlineStyle, outlineWidth} = getComputedStyle(label)
  return {
    name: (node.ariaLabel ?? node.textContent).trim().slice(0, 40),
    tag: node.localName,
    place: ["header", "article", "footer"].find(place => node.closest(place)) ?? "",
    ring: outlineStyle !== "none" && parseFloat(outlineWidth) >= 1,
  }
}"""


def test_keyboard_reaches_everything_and_the_focus_is_visible(visit):
    page = visit("rl/dpo/").page
    stops = []
    while len(stops) < 400:
        page.keyboard.press("Tab")
        stop = page.evaluate(FOCUSED)
        if stop["tag"] == "body":
            break
        stops.append(stop)
    assert [stop for stop in stops if not stop["ring"]] == []
    assert stops[0]["name"] == "跳转至"
    assert "搜索" in {stop["name"] for stop in stops}
    assert {"header", "article", "footer"} <= {stop["place"] for stop in stops}
    assert {"a", "summary", "button"} <= {stop["tag"] for stop in stops if stop["place"] == "article"}


def test_skip_link_leads_into_the_text(visit):
    page = visit("rl/dpo/").page
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    wait(page, "document.activeElement === document.body")
    page.keyboard.press("Tab")
    assert page.evaluate(FOCUSED)["place"] == "article"


def test_fold_opens_and_closes_with_enter(visit):
    page = visit("rl/dpo/").page
    fold = page.locator("article details.question").first
    fold.locator("summary").focus()
    page.keyboard.press("Enter")
    assert fold.locator(":scope > p").first.is_visible()
    page.keyboard.press("Enter")
    assert not fold.locator(":scope > p").first.is_visible()


def test_drawer_opens_with_enter_on_a_narrow_screen(visit):
    page = visit("rl/dpo/", width=390).page
    for _ in range(6):
        page.keyboard.press("Tab")
        if page.evaluate(FOCUSED)["name"] == "导航":
            break
    assert page.evaluate(FOCUSED)["name"] == "导航"
    page.keyboard.press("Enter")
    wait(page, "document.querySelector('.md-sidebar--primary').getBoundingClientRect().left === 0")
