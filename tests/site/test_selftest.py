"""自测在真实浏览器里：一次一题，记得住不会的，存储坏了也能用。"""

import json

import pytest
from sitetools import wait

SECTION = "interviews/?section=推理模型"
KEY = "mianjing-2025/selftest/v1"


def question(page):
    """正在问的题的键；一次只能有一题。"""
    items = page.locator(".kb-questions > li:visible")
    assert items.count() == 1
    return items.get_attribute("data-key")


def listed(page):
    return page.eval_on_selector_all(
        ".kb-questions > li:not([hidden])", "items => items.map(i => i.dataset.key)"
    )


def button(page, name):
    return page.get_by_role("button", name=name)


def start(page):
    button(page, "开始自测").click()


def grade(page, *names):
    """看答案、记一笔，每个名字一题；返回问过的题。"""
    asked = []
    for name in names:
        asked.append(question(page))
        button(page, "看答案").click()
        page.locator(f".kb-selftest [name={name}]").click()
    return asked


def progress(page):
    return page.locator("p[role=status]").inner_text()


def stored(page):
    return json.loads(page.evaluate(f"localStorage.getItem({KEY!r})") or "null")


def test_one_question_at_a_time_and_the_answer_only_when_asked_for(visit, base_url):
    page = visit(SECTION).page
    first, second = listed(page)[:2]
    start(page)
    assert question(page) == first and not page.locator(".kb-filter").is_visible()
    assert not button(page, "不会").is_visible() and not page.locator("details p:visible").count()
    assert "推理模型 · 难度" in page.locator("summary:visible").inner_text()
    button(page, "看答案").click()
    assert page.locator("details a:visible").evaluate("a => a.href") == f"{base_url}{first}/"
    assert not button(page, "看答案").is_visible()
    button(page, "不会").click()
    assert question(page) == second and not page.locator("details p:visible").count()


def test_answers_left_open_in_the_list_are_folded_and_those_asked_are_folded_again(visit):
    page = visit(SECTION).page
    button(page, "全部展开").click()
    start(page)
    assert not page.locator("details p:visible").count()
    grade(page, "known", "known")
    button(page, "看答案").click()
    button(page, "结束自测").click()
    folded = page.eval_on_selector_all(
        ".kb-questions > li:not([hidden]) > details", "d => d.map(x => !x.open)"
    )
    assert folded[:3] == [True] * 3


def test_progress_counts_over_the_filtered_list(visit):
    page = visit(SECTION).page
    number = len(listed(page))
    start(page)
    assert progress(page) == f"第 1 / {number} 题，会 0，不会 0"
    grade(page, "known", "missed", "known")
    assert progress(page) == f"第 4 / {number} 题，会 2，不会 1"
    grade(page, *["known"] * (number - 3))
    assert progress(page) == f"做完了：会 {number - 1}，不会 1"
    assert not page.locator(".kb-questions > li:visible").count()


def test_after_a_reload_missed_come_first_then_unseen_then_known(visit):
    page = visit(SECTION).page
    a, b, c, d, *rest = listed(page)
    start(page)
    assert grade(page, "known", "missed", "known", "missed") == [a, b, c, d]
    page.reload()
    start(page)
    assert grade(page, *["known"] * (4 + len(rest))) == [b, d, *rest, a, c]


def test_the_order_of_the_list_holds_within_each_group(visit):
    page = visit(SECTION + "&order=-1").page
    order = listed(page)
    assert order != sorted(order, key=listed(visit(SECTION).page).index)
    start(page)
    assert grade(page, *["known"] * len(order)) == order


def test_missed_questions_can_be_listed_and_asked_alone(visit):
    page = visit(SECTION).page
    keys = listed(page)
    start(page)
    grade(page, "missed", "known", "missed")
    button(page, "结束自测").click()
    page.get_by_label("只看不会的").check()
    assert listed(page) == [keys[0], keys[2]]
    page.reload()
    assert listed(page) == [keys[0], keys[2]]
    start(page)
    grade(page, "known", "missed")
    button(page, "结束自测").click()
    assert listed(page) == [keys[2]]
    assert "· 不会" in page.locator(".kb-questions").aria_snapshot()


def test_at_the_end_the_missed_ones_can_be_repeated(visit):
    page = visit("interviews/?section=系统与智能体").page
    keys = listed(page)
    start(page)
    grade(page, "missed", *["known"] * (len(keys) - 2), "missed")
    button(page, "再练不会的 2 题").click()
    assert grade(page, "known", "known") == [keys[0], keys[-1]]
    assert progress(page) == "做完了：会 2，不会 0" and not button(page, "再练").is_visible()


def test_an_empty_selection_is_said_not_asked(visit):
    page = visit("interviews/").page
    page.get_by_label("只看不会的").check()
    start(page)
    assert "没有题可测" in progress(page) and page.locator(".kb-filter").is_visible()
    page.get_by_label("只看不会的").uncheck()
    assert progress(page) == ""


def test_memory_is_cleared_only_after_a_confirmation(visit):
    page = visit(SECTION).page
    assert not button(page, "清除记录").is_visible()
    start(page)
    grade(page, "missed", "known")
    button(page, "结束自测").click()
    assert button(page, "清除记录（会 1，不会 1）").is_visible()
    page.once("dialog", lambda dialog: dialog.dismiss())
    button(page, "清除记录").click()
    assert len(stored(page)) == 2
    page.once("dialog", lambda dialog: dialog.accept())
    button(page, "清除记录").click()
    assert stored(page) is None and not button(page, "清除记录").is_visible()
    assert not page.locator("[data-mark]").count()


@pytest.mark.parametrize(
    "content",
    ["{", "null", "7", '"missed"', '["missed"]', '{"gone/page": "missed", "reasoning/r1-zero": "x"}'],
)
def test_foreign_or_broken_memory_counts_as_none(visit, base_url, content):
    origin = base_url.removesuffix("/some-repo/")
    state = {
        "cookies": [],
        "origins": [{"origin": origin, "localStorage": [{"name": KEY, "value": content}]}],
    }
    visitor = visit(SECTION, storage_state=state)
    page = visitor.page
    keys = listed(page)
    assert page.evaluate(f"localStorage.getItem({KEY!r})") == content
    assert not page.locator("[data-mark]").count()
    start(page)
    assert grade(page, "missed") == keys[:1]
    assert stored(page) == {keys[0]: "missed"} and visitor.errors == []


@pytest.mark.parametrize(
    "breakage",
    [
        "Object.defineProperty(window, 'localStorage', {get() { throw new DOMException('no', 'SecurityError') }})",
        "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }",
    ],
)
def test_without_storage_it_works_until_the_page_is_left_and_says_so(visit, breakage):
    page = visit(SECTION).page
    page.add_init_script(breakage)
    page.reload()
    a, b, *rest = listed(page)
    start(page)
    assert "不让保存" not in progress(page)
    assert grade(page, "known", "missed") == [a, b]
    assert "会 1，不会 1" in progress(page) and "不让保存" in progress(page)
    button(page, "结束自测").click()
    start(page)
    assert grade(page, *["known"] * (2 + len(rest))) == [b, *rest, a]


def wait_for_memory(page, marks):
    """另一个标签页写的东西过一会儿才看得见。"""
    text = json.dumps(marks, separators=(",", ":"))
    wait(page, "([key, text]) => localStorage.getItem(key) === text", [KEY, text])


def test_two_tabs_do_not_erase_each_other(visit):
    page = visit(SECTION).page
    keys = listed(page)
    other = page.context.new_page()
    other.goto(page.url)
    for one in (page, other):
        start(one)
    grade(page, "missed", "known")
    wait_for_memory(other, {keys[0]: "missed", keys[1]: "known"})
    grade(other, "known")
    wait_for_memory(page, {keys[0]: "known", keys[1]: "known"})
    grade(page, "missed")
    assert stored(page) == {keys[0]: "known", keys[1]: "known", keys[2]: "missed"}


def test_the_keyboard_is_enough(visit):
    page = visit(SECTION).page
    keys = listed(page)
    button(page, "开始自测").focus()
    page.keyboard.press("Enter")
    for keystrokes in (("Space", "1"), ("Enter", "2"), ("Space", "ArrowLeft"), ("Enter", "ArrowRight")):
        page.keyboard.press("2")  # 还没看答案，不算数
        for key in keystrokes:
            page.keyboard.press(key)
    assert progress(page).endswith("会 2，不会 2")
    assert stored(page) == dict(zip(keys, ["known", "missed", "known", "missed"], strict=False))


def test_keys_elsewhere_are_left_alone(visit):
    page = visit(SECTION).page
    start(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("Space")
    button(page, "不会").wait_for()
    before = progress(page)
    page.keyboard.press("Control+1")
    page.evaluate("document.body.append(document.createElement('input'))")
    page.locator("body > input").last.type("12 ")
    page.locator("body > input").last.press("ArrowLeft")
    assert page.locator("body > input").last.input_value() == "12 "
    assert progress(page) == before
    # 焦点在按钮上时，空格按的是那个按钮，不是「看答案」
    button(page, "不会").press("Enter")
    button(page, "结束自测").press("Space")
    assert page.locator(".kb-filter").is_visible()


def test_focus_follows_the_question_the_answer_and_the_end(visit):
    page = visit("interviews/?section=系统与智能体").page
    start(page)
    focused = "(selector) => document.activeElement.matches(selector)"
    for _ in listed(page):
        assert page.evaluate(focused, ".kb-current summary")
        button(page, "看答案").click()
        wait(page, focused, ".kb-current details[open] p")
        button(page, "不会").click()
    assert page.evaluate(focused, "[name=again]")
    button(page, "结束自测").click()
    assert page.evaluate(focused, "[name=test]")


def test_on_a_phone_the_buttons_are_large_and_in_reach(visit):
    page = visit("interviews/", width=390, has_touch=True, is_mobile=True).page
    start(page)
    names = [["看答案"], ["不会", "会 "]]
    for shown in names:
        for name in shown:
            box = button(page, name).first.bounding_box()
            assert box["height"] >= 44 and box["width"] >= 120
            assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 844
        if shown == names[0]:
            button(page, "看答案").tap()
    assert page.evaluate("document.documentElement.scrollWidth") == 390
    assert not page.locator("kbd:visible").count()


def test_from_a_file_it_remembers_too(visit, offline_site):
    visitor = visit((offline_site / "interviews/index.html").as_uri() + "?section=推理模型", origin="file://")
    page = visitor.page
    keys = listed(page)
    start(page)
    grade(page, "known", "missed")
    page.reload()
    start(page)
    assert question(page) == keys[1]
    assert visitor.errors == []
