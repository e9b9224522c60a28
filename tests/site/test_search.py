"""搜索：在真实浏览器里逐键输入，看第一个结果是不是该有的页面。查询在 queries.tsv。"""

import csv
import json
from pathlib import Path
from urllib.parse import unquote

import pytest
from sitetools import RESULTS, search

ROWS = (Path(__file__).parent / "queries.tsv").read_text(encoding="utf-8").splitlines()
QUERIES = [row for row in csv.reader(ROWS, delimiter="\t") if row and not row[0].startswith("#")]


def pages(addresses):
    return list(dict.fromkeys(address.partition("#")[0] for address in addresses))


@pytest.fixture(scope="module")
def box(browser, base_url):
    page = browser.new_page()
    page.goto(f"{base_url}about/")
    page.locator("[data-md-component=search-query]").click()
    yield page
    page.close()


@pytest.fixture(scope="module")
def answers(box):
    return {query: pages(search(box, query)) for _, query, _ in QUERIES}


def missed(answers, base_url, rank):
    return [
        query
        for _, query, wanted in QUERIES
        if not {f"{base_url}{key}/" for key in wanted.split("|")} & set(answers[query][:rank])
    ]


def test_the_right_page_is_first(answers, base_url):
    assert len(missed(answers, base_url, 1)) <= 0.05 * len(QUERIES), missed(answers, base_url, 1)


def test_the_right_page_is_always_among_the_first_five(answers, base_url):
    assert missed(answers, base_url, 5) == []


def test_the_best_section_is_listed_under_its_page(box, base_url):
    found = [unquote(link) for link in search(box, "梯度断在 softmax 的雅可比矩阵")[:2]]
    page = f"{base_url}architecture/attention-scaling/"
    assert found == [page, f"{page}#梯度断在-softmax-的雅可比矩阵jacobian"]


def test_a_result_opens_its_follow_up_and_marks_the_words(visit):
    page = visit("about/").page
    page.set_viewport_size({"width": 1280, "height": 844})
    search(page, "query 与 key 个数不同 因果掩码")
    page.locator(f"{RESULTS}[href*='attention-scaling'][href*='#q-']").first.click()
    opened = page.wait_for_selector("details.question[open]")
    assert "个数不同" in opened.query_selector("summary").inner_text()
    page.wait_for_selector("article mark[data-md-highlight]")


def test_formulas_are_readable_in_the_excerpt_and_the_words_are_marked(box):
    search(box, "34+5as/h")
    first = box.locator(".md-search-result__item").first
    assert "sbh(34+5as/h)" in first.inner_text() and "\\frac" not in first.inner_text()
    assert "34" in first.locator("mark").all_inner_texts()


@pytest.mark.parametrize(
    "query", ["裁剪", "裁", "flsah attention", "重要性采", "kvcache", "6ND", "为什么", "-log σ"]
)
def test_no_query_of_a_word_on_the_site_is_empty(box, query):
    assert search(box, query)


def test_nonsense_finds_nothing_and_says_so(box):
    assert search(box, "qzxvw") == []
    assert "没有" in box.locator(".md-search-result__meta").inner_text()


def test_text_of_a_page_cannot_inject_markup(box):
    search(box, "<img src=x onerror=alert(1)> clip")
    assert box.locator(".md-search-result img").count() == 0


@pytest.mark.parametrize(
    ("query", "tag"), [("模板里写了 BOS", "<s>"), ("从前文里消失 因果序列装不下两者", "<think>")]
)
def test_angle_brackets_of_a_page_are_shown_as_they_are(box, query, tag):
    """正文里的 `<s>` 一次在加亮的词之后、一次在之前，两处都不能当成标签。"""
    search(box, query)
    assert any(tag in result for result in box.locator(RESULTS).all_inner_texts())


def test_nothing_is_downloaded_until_someone_searches_and_then_only_a_few_pieces(browser, base_url, site):
    page = browser.new_page()
    requests = []
    page.on("request", lambda request: "/search/" in request.url and requests.append(request.url))
    page.goto(f"{base_url}rl/dpo/", wait_until="networkidle")
    assert requests == []
    search(page, "隐式奖励")
    pieces = [
        url
        for url in requests
        if url.endswith(".json") and url.count("/search/") and "search_index" not in url
    ]
    assert 3 < len(pieces) < 40 < len(list(site.glob("search/*/*.json")))
    page.close()


def test_a_new_release_is_picked_up_without_reloading(browser, base_url, site):
    """旧的分片已经不在：换新目录再试，读者看到的是结果而不是空白。"""
    page = browser.new_page()
    old = next(site.glob("search/*/t0.json")).parent
    versions = [old.name, "next"]
    asked = []

    def directory(route):
        asked.append(route.request.url)
        data = json.loads((site / "search/directory.json").read_text(encoding="utf-8"))
        route.fulfill(json=data | {"version": versions[min(len(asked), 2) - 1]})

    page.goto(f"{base_url}rl/dpo/")
    page.context.route("**/search/directory.json", directory)
    page.context.route(f"**/search/{old.name}/*", lambda route: route.fulfill(status=404))
    page.context.route(
        "**/search/next/*", lambda route: route.fulfill(path=old / route.request.url.rpartition("/")[2])
    )
    assert any("rl/dpo/" in link for link in search(page, "隐式奖励")[:1])
    assert len(asked) > 1
    page.close()


def test_a_lost_network_is_told_not_hidden(browser, base_url):
    page = browser.new_page()
    page.goto(f"{base_url}rl/dpo/")
    page.context.route("**/search/*/*.json", lambda route: route.abort())
    search(page, "隐式奖励")
    assert "没有取到" in page.locator(".md-search-result__item").first.inner_text()
    page.context.unroute("**/search/*/*.json")
    assert any("rl/dpo/" in link for link in search(page, "隐式奖励的"))
    page.close()


def test_offline_search_works_from_the_file_system(browser, offline_site):
    page = browser.new_page()
    foreign = []
    page.on(
        "request", lambda request: foreign.append(request.url) if request.url.startswith("http") else None
    )
    page.goto((offline_site / "index.html").as_uri())
    page.wait_for_timeout(1000)
    for query, wanted in [("隐式奖励", "rl/dpo.html"), ("sqrt(d_k)", "architecture/attention-scaling.html")]:
        assert search(page, query)[0].endswith(wanted)
    assert foreign == []
    page.close()
