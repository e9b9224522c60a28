"""真实站点的测试：建一次站（严格），用真实浏览器看它。只连本机。"""

import contextlib
import functools
import http.server
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from playwright.sync_api import sync_playwright
from readings import read
from sitetools import REPOSITORY_URL, ROOT, Visitor, build, html_pages

from kbsite.browser import ensure_chromium


@pytest.fixture(scope="session")
def site(tmp_path_factory):
    """像部署在 `https://…/some-repo/` 那样建的站：有子路径、有仓库地址、有可以下载的离线版（内容是假的）。"""
    folder = tmp_path_factory.mktemp("www") / "some-repo"
    archive = folder.parent / "offline.zip"
    archive.write_bytes(bytes(1_234_567))
    return build(
        folder,
        SITE_URL="https://example.org/some-repo/",
        REPO_URL=REPOSITORY_URL,
        OFFLINE_ZIP=str(archive),
    )


@pytest.fixture(scope="session")
def offline_site(tmp_path_factory):
    """从 file:// 打开的版本。"""
    return build(tmp_path_factory.mktemp("offline"), KB_OFFLINE="true", DIRECTORY_URLS="false")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


@pytest.fixture(scope="session")
def base_url(site):
    """站点在本机的地址，带子路径。"""
    handler = functools.partial(_Quiet, directory=str(site.parent))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/some-repo/"
        server.shutdown()


@pytest.fixture(scope="session")
def fonts(tmp_path_factory):
    """字体设置：中文用 mplfonts 自带的，各机器的排版才一致。"""
    import importlib.util

    fonts = Path(importlib.util.find_spec("mplfonts").submodule_search_locations[0]) / "fonts"
    folder = tmp_path_factory.mktemp("fontconfig")
    (folder / "fonts.conf").write_text(
        '<?xml version="1.0"?><!DOCTYPE fontconfig SYSTEM "fonts.dtd"><fontconfig>'
        f"<dir>/usr/share/fonts</dir><dir>{fonts}</dir><cachedir>{folder}/cache</cachedir>"
        '<include ignore_missing="yes">/etc/fonts/conf.d</include></fontconfig>'
    )
    return folder / "fonts.conf"


@contextlib.contextmanager
def chromium(fonts):
    """无头 Chromium。"""
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=ensure_chromium(),
            args=[
                "--no-sandbox",
                "--disable-background-networking",
                "--disable-component-update",
                "--disable-sync",
            ],
            env={**os.environ, "FONTCONFIG_FILE": str(fonts)},
        )
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def browser(fonts):
    with chromium(fonts) as browser:
        yield browser


@pytest.fixture(scope="session")
def readings(site, base_url, fonts):
    """每一页打开一次量到的东西：{地址: {…}}；每个核一个浏览器，各读一份。"""
    urls = [*html_pages(site), "404.html"]
    count = os.cpu_count()

    def read_share(share):
        with chromium(fonts) as browser:
            return {url: read(browser, base_url, url) for url in share}

    with ThreadPoolExecutor(count) as pool:
        shares = pool.map(read_share, [urls[start::count] for start in range(count)])
        found = {url: reading for share in shares for url, reading in share.items()}
    return {url: found[url] for url in urls}


@pytest.fixture
def topics(readings, topic_pages):
    return {key: readings[f"{key}/"] for key in topic_pages}


@pytest.fixture
def visit(browser, base_url):
    """打开一个地址，返回 Visitor。"""
    contexts = []

    def open_page(url, *, width=1280, height=844, scheme="light", origin=None, **options):
        context = browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, locale="zh-CN", **options
        )
        contexts.append(context)
        visitor = Visitor(context.new_page(), origin or base_url)
        target = url if "://" in url else base_url + url
        visitor.page.goto(target, wait_until="load")
        return visitor

    yield open_page
    for context in contexts:
        context.close()


@pytest.fixture(scope="session")
def topic_pages():
    """专题页的键：有 answer 的页面。"""
    return [
        path.relative_to(ROOT / "docs").with_suffix("").as_posix()
        for path in sorted((ROOT / "docs").glob("*/*.md"))
        if "\nanswer:" in path.read_text(encoding="utf-8")
    ]
