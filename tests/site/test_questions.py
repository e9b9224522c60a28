"""题目索引在真实浏览器里：一题不少，能筛选、能排序，条件在地址里。"""


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
    for words in ("没有这样的题", "裁剪 没有这样的题"):
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


def test_without_scripts_the_list_is_whole_and_the_controls_are_hidden(visit, topic_pages):
    page = visit("interviews/", java_script_enabled=False).page
    assert page.locator(".kb-questions > li").count() == len(topic_pages)
    assert not page.locator(".kb-filter").is_visible()
