"""搜索：在真实浏览器里逐键输入，看结果里有没有该有的页面。查询在 queries.tsv。"""

import csv
from pathlib import Path

import pytest

ROWS = (Path(__file__).parent / "queries.tsv").read_text(encoding="utf-8").splitlines()
QUERIES = [row for row in csv.reader(ROWS, delimiter="\t") if row and not row[0].startswith("#")]


def results(page, query):
    """输入查询，返回各结果的地址（去掉重复的页面）。"""
    box = page.locator("[data-md-component=search-query]")
    box.fill("")
    box.click()
    page.keyboard.type(query)
    page.keyboard.press("Shift")  # 汉字经由输入法进来，补一个按键事件
    page.wait_for_timeout(400)
    links = page.eval_on_selector_all(".md-search-result__link", "links => links.map(a => a.href)")
    return list(dict.fromkeys(link.partition("?")[0].partition("#")[0] for link in links))


@pytest.fixture(scope="module")
def answers(browser, base_url):
    page = browser.new_page()
    page.goto(base_url)
    page.locator("[data-md-component=search-query]").click()
    page.wait_for_timeout(1500)
    found = {query: results(page, query) for _, query, _ in QUERIES}
    page.close()
    return found


@pytest.mark.parametrize(("kind", "query", "wanted"), QUERIES, ids=[row[1] for row in QUERIES])
def test_page_is_among_the_first_three_results(answers, base_url, kind, query, wanted):
    accepted = {f"{base_url}{key}/" for key in wanted.split("|")}
    assert accepted & set(answers[query][:3]), answers[query][:5]


def test_offline_search_works_from_the_file_system(browser, offline_site):
    page = browser.new_page()
    foreign = []
    page.on(
        "request", lambda request: foreign.append(request.url) if request.url.startswith("http") else None
    )
    page.goto((offline_site / "index.html").as_uri())
    page.wait_for_timeout(1500)
    assert any(link.endswith("rl/dpo.html") for link in results(page, "隐式奖励")[:3])
    page.goto((offline_site / "rl/dpo.html").as_uri())
    assert page.locator("mjx-container").count() > 20
    assert page.locator(".kb-figure svg").count() >= 1
    face = page.evaluate("document.fonts.ready.then(() => document.fonts.check('16px MJX-NCM-N'))")
    assert face and foreign == []
    page.close()
