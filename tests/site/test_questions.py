"""题目索引在真实浏览器里：一题不少，答案先藏着，能筛选、能排序，条件在地址里。"""


def shown(page):
    return page.eval_on_selector_all(
        ".kb-questions > li:not([hidden])", "items => items.map(i => i.querySelector('a').href)"
    )


def test_every_topic_page_is_in_the_index_once(visit, base_url, topic_pages):
    page = visit("interviews/").page
    assert sorted(shown(page)) == sorted(f"{base_url}{key}/" for key in topic_pages)
    assert page.locator(".kb-filter output").inner_text() == f"{len(topic_pages)} 题"


def test_words_filter_titles_answers_tags_and_the_misspelt_headings(visit, base_url):
    page = visit("interviews/").page
    for words, key in [("dr. grpo", "rl/dr-grpo"), ("aha monment", "reasoning/aha-moment")]:
        page.get_by_label("筛选").fill(words)
        assert f"{base_url}{key}/" in shown(page) and len(shown(page)) < 12
    # 最后一个是每题都有的链接文字
    for words in ("没有这样的题", "裁剪 没有这样的题", "推导与追问"):
        page.get_by_label("筛选").fill(words)
        assert shown(page) == []


def test_section_and_order_are_kept_in_the_address(visit, base_url, topic_pages):
    page = visit("interviews/").page
    page.locator("select[name=section]").select_option("强化学习与对齐")
    page.locator("select[name=order]").select_option("由难到易")
    links = shown(page)
    assert sorted(links) == sorted(f"{base_url}{key}/" for key in topic_pages if key.startswith("rl/"))
    levels = page.eval_on_selector_all(
        ".kb-questions > li:not([hidden])", "items => items.map(i => Number(i.dataset.difficulty))"
    )
    assert levels == sorted(levels, reverse=True) and len(set(levels)) > 1
    again = visit(page.url).page
    assert shown(again) == links


def answers(page):
    """看得见的答案个数。"""
    return page.locator(".kb-questions details > p:visible").count()


def test_words_find_an_answer_that_is_folded(visit, base_url):
    page = visit("interviews/").page
    page.get_by_label("筛选").fill("配分函数在作差时抵消")
    assert shown(page) == [f"{base_url}rl/dpo/"] and answers(page) == 0


def test_answers_are_hidden_until_asked_for_one_by_one_by_mouse_or_keyboard(visit, base_url):
    page = visit("interviews/").page
    assert answers(page) == 0
    page.get_by_text("DPO 的推导与梯度").click()
    assert answers(page) == 1
    page.get_by_text("DPO 的推导与梯度").press("Enter")
    assert answers(page) == 0
    page.get_by_text("DPO 的推导与梯度").press("Space")
    page.locator("details[open]").get_by_role("link").click()
    assert page.url == f"{base_url}rl/dpo/"


def test_one_button_unfolds_and_folds_what_the_filter_shows(visit, topic_pages):
    page = visit("interviews/?section=训练").page
    number = len(shown(page))
    assert 1 < number < len(topic_pages)
    page.get_by_role("button", name="全部展开").click()
    assert answers(page) == number
    page.locator("select[name=section]").select_option("全部")
    assert answers(page) == number
    page.get_by_role("button", name="全部展开").click()
    assert answers(page) == len(topic_pages)
    page.get_by_role("button", name="全部收起").click()
    assert answers(page) == 0
    page.get_by_role("button", name="全部展开").wait_for()


def test_without_scripts_the_list_is_whole_and_the_controls_are_hidden(visit, topic_pages):
    page = visit("interviews/", java_script_enabled=False).page
    assert page.locator(".kb-questions > li").count() == len(topic_pages)
    assert not page.locator(".kb-filter").is_visible() and not page.locator(".kb-selftest").is_visible()
    assert answers(page) == 0
    page.get_by_text("DPO 的推导与梯度").click()
    assert answers(page) == 1 and page.locator("details[open] a").is_visible()
