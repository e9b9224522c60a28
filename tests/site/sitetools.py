"""真实站点测试共用的东西：建站、列出与解析网页、记下浏览器里的毛病。"""

import os
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

ROOT = Path(__file__).parents[2]
REPOSITORY_URL = "https://github.com/example/mianjing"


def build(target, **extra):
    """用仓库自己的内容严格建站到 `target`；`extra` 是环境变量。"""
    environment = {**os.environ, "PYTHONPATH": "src:.", "NO_MKDOCS_2_WARNING": "1", **extra}
    result = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return target


def html_pages(site):
    """站内每个网页的相对地址；跳转页（redirects.yml）不是网页。"""
    return sorted(
        path.relative_to(site).as_posix().removesuffix("index.html")
        for path in site.rglob("index.html")
        if 'http-equiv="refresh"' not in path.read_text(encoding="utf-8")
    )


class Page(HTMLParser):
    """收集一个网页的标题、id、链接与 meta。"""

    def __init__(self, text):
        super().__init__(convert_charrefs=True)
        self.ids, self.links, self.canonical, self.meta, self.title = [], [], [], {}, ""
        self._in_title = False
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs:
            self.ids.append(attrs["id"])
        for name in ("href", "src"):
            if attrs.get(name) and tag not in ("use",):
                self.links.append((tag, attrs[name]))
        if attrs.get("rel") == "canonical":
            self.canonical.append(attrs["href"])
        if tag == "meta" and "name" in attrs:
            self.meta[attrs["name"]] = attrs.get("content")
        self._in_title = tag == "title" and not self.title

    def handle_data(self, data):
        if self._in_title:
            self.title += data

    def handle_endtag(self, tag):
        self._in_title = False


def wait(page, condition, argument=None):
    """等到 `condition`（可以是异步函数）成立；wait_for_function 在页面里求值，内容安全策略不许。"""
    deadline = time.monotonic() + 30
    while not page.evaluate(condition, argument):
        assert time.monotonic() < deadline, f"等了 30 秒仍不成立：{condition}"
        page.wait_for_timeout(50)


RESULTS = ".md-search-result__link"


def search(page, query):
    """输入查询，等结果停下来；返回各结果的地址（去掉 `?h=`）。"""
    box = page.locator("[data-md-component=search-query]")
    box.fill("")
    box.click()
    page.keyboard.type(query)  # 汉字不是按键打出来的，只有 input 事件，与手机的输入法一样
    page.wait_for_timeout(300)
    wait(page, "document.querySelector('.md-search-result__meta').textContent.match(/\\d|没有/)")
    addresses = page.eval_on_selector_all(RESULTS, "links => links.map(a => a.href)")
    return [
        address.partition("?")[0] + "#" * ("#" in address) + address.partition("#")[2]
        for address in addresses
    ]


class Visitor:
    """一个浏览器页面；记下脚本错误与发往别处的请求（一律拒绝）。"""

    def __init__(self, page, origin):
        self.page = page
        self.foreign: list[str] = []
        self.errors: list[str] = []

        def route(handle):
            url = handle.request.url
            if url.startswith((origin, "data:", "blob:")):
                handle.continue_()
            else:
                self.foreign.append(url)
                handle.abort("blockedbyclient")

        page.route("**/*", route)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("console", lambda message: message.type == "error" and self.errors.append(message.text))
        page.on("requestfailed", self.failed)

    def failed(self, request):
        # 离开页面会中断还没收完的请求（图标、搜索线程），那不是站点的错
        if request.failure != "net::ERR_ABORTED":
            self.errors.append(f"失败的请求 {request.url} {request.failure}")
