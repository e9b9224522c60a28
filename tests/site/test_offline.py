"""没有网络时：下载的 zip 从 file:// 打开；看过的页面由 Service Worker 打开。都在真实浏览器里。"""

import contextlib
import functools
import http.server
import io
import json
import re
import socket
import threading
import time
import zipfile
from urllib.parse import unquote, urlsplit

import pytest
from PIL import Image
from playwright.sync_api import Error
from sitetools import ROOT, Page, wait

from kbsite.archive import pack

# 公式的字体到了、图在、样式在；字体没用上时 document.fonts 里没有 loaded 的 MathJax 字体
TYPESET = """async () => {
  await document.fonts.ready
  return {
    formulas: document.querySelectorAll("article mjx-container").length,
    fonts: [...document.fonts].filter(f => f.family.includes("MJX") && f.status === "loaded").length,
    failed: [...document.fonts].filter(f => f.status === "error").map(f => f.family),
    figures: [...document.querySelectorAll(".kb-figure svg")].filter(s => s.getBoundingClientRect().height > 50).length,
    math: [...document.querySelectorAll("article mjx-container *")].map(e => getComputedStyle(e).fontFamily)
      .filter(family => family.includes("MJX")).length,
    header: getComputedStyle(document.querySelector(".md-header")).position,
  }
}"""


def assert_complete(page):
    found = page.evaluate(TYPESET)
    assert found["formulas"] > 20 and found["figures"] >= 1, found
    assert found["fonts"] >= 1 and found["failed"] == [] and found["math"] > 20, found
    assert found["header"] == "sticky", found


# ── 下载的 zip ──────────────────────────────────────────────


@pytest.fixture(scope="module")
def unzipped(offline_site, tmp_path_factory):
    """像读者那样解压到名字里有空格与汉字的文件夹。"""
    folder = tmp_path_factory.mktemp("reader")
    pack(offline_site, folder / "mianjing-2025-offline.zip")
    with zipfile.ZipFile(folder / "mianjing-2025-offline.zip") as archive:
        archive.extractall(folder / "桌面 文件")
    (top,) = (folder / "桌面 文件").iterdir()
    return top


def test_index_is_the_only_file_on_top(unzipped):
    assert unzipped.name == "mianjing-2025-offline"
    assert [path.name for path in unzipped.iterdir() if path.is_file()] == ["index.html"]


def test_every_link_leads_to_a_file_in_the_folder(unzipped):
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in unzipped.rglob("*.html")}
    links = [(path, tag, link) for path, page in pages.items() for tag, link in page.links]
    for path in unzipped.rglob("*.css"):
        text = path.read_text(encoding="utf-8")
        links += [(path, "css", link.strip("\"'")) for link in re.findall(r"url\(([^)]*)\)", text)]
    ids = {path: {*page.ids, "__comments"} for path, page in pages.items()}
    broken = []
    for path, tag, link in links:
        parts = urlsplit(link)
        if parts.scheme == "data" or (tag == "a" and parts.scheme not in ("", "file")):
            continue
        target = (path.parent / unquote(parts.path)).resolve() if parts.path else path
        fragment = unquote(parts.fragment)
        if parts.scheme or parts.netloc or not target.is_file() or unzipped.resolve() not in target.parents:
            broken.append(f"{path.relative_to(unzipped)}: <{tag}> {link}")
        elif fragment and target.suffix == ".html" and fragment not in ids[target]:
            broken.append(f"{path.relative_to(unzipped)}: {link}（没有这个锚点）")
    assert len(links) > 10_000 and broken == []


@pytest.fixture
def unpacked(visit, unzipped):
    """从 file:// 打开解压出来的一页；离开文件夹的请求记在 foreign 里。"""
    return lambda name: visit((unzipped / name).as_uri(), origin=unzipped.as_uri() + "/")


@pytest.mark.parametrize(
    "name",
    ["index", "rl/dpo", "architecture/kv-cache", "notebooks/rl/dpo", "api/rl", "interviews/index"],
)
def test_unpacked_pages_load_quietly_and_alone(unpacked, name):
    visitor = unpacked(f"{name}.html")
    assert visitor.page.locator("article h1").first.is_visible()
    assert visitor.page.evaluate("navigator.serviceWorker && !!navigator.serviceWorker.controller") in (
        None,
        False,
    )
    assert visitor.foreign == [] and visitor.errors == []


def test_unpacked_topic_has_formulas_fonts_and_figures(unpacked):
    assert_complete(unpacked("rl/dpo.html").page)


def test_unpacked_index_leads_to_a_topic_and_from_there_to_its_notebook(unpacked):
    visitor = unpacked("interviews/index.html")
    page = visitor.page
    page.locator(".kb-questions summary", has_text="DPO 的推导").click()
    page.locator(".kb-questions details[open] a").click()
    page.get_by_role("link", name="本页实验的完整笔记").click()
    page.wait_for_url("**/notebooks/rl/dpo.html")
    assert page.locator("article mjx-container").count() >= 5
    assert visitor.foreign == [] and visitor.errors == []


def test_unpacked_calculator_computes(unpacked):
    page = unpacked("architecture/kv-cache.html").page
    page.locator('.kb-calculator input[name="num_tokens"]').fill("131072")
    assert page.locator('.kb-calculator output[name="cache"]').inner_text().startswith("17.18 GB")


# ── 看过的页面 ──────────────────────────────────────────────


class Server(http.server.ThreadingHTTPServer):
    """停机时把浏览器预先连上、还没有用的连接也断开。"""

    def __init__(self, *args):
        super().__init__(*args)
        self._connections = []

    def get_request(self):
        connection, address = super().get_request()
        self._connections.append(connection)
        return connection, address

    def handle_error(self, request, client_address):
        """浏览器离开页面、测试停机都会断开正在传的连接。"""

    def server_close(self):
        super().server_close()
        for connection in self._connections:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class Host:
    """放在两层子路径下的网站：可以停机、不答、换内容。一律 no-store：断网时打开的只能来自 Service Worker。"""

    def __init__(self, folder):
        self.changed: dict[str, bytes | None] = {}  # 相对地址 → 换上的内容；None 是 404
        self.silent = threading.Event()
        self.answered = threading.Event()
        self._folder, self._port, self._server = folder, 0, None
        self.start()
        self.url = f"http://127.0.0.1:{self._port}/one/two/"

    def start(self):
        host = self

        class Handler(http.server.SimpleHTTPRequestHandler):
            def log_message(self, *args):
                pass

            def end_headers(self):
                self.send_header("Cache-Control", "no-store")
                super().end_headers()

            def send_head(self):
                if host.silent.is_set():
                    host.answered.wait()
                name = urlsplit(self.path).path.removeprefix("/one/two/")
                if name not in host.changed:
                    return super().send_head()
                content = host.changed[name]
                if content is None:
                    return self.send_error(404)
                self.send_response(200)
                kind = self.guess_type(name) if "." in name else "text/html; charset=utf-8"
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                return io.BytesIO(content)

        handler = functools.partial(Handler, directory=str(self._folder))
        self._server = Server(("127.0.0.1", self._port), handler)
        self._port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def stop(self):
        self.speak()
        self._server.shutdown()
        self._server.server_close()

    def hang(self):
        self.answered.clear()
        self.silent.set()

    def speak(self):
        self.silent.clear()
        self.answered.set()


@pytest.fixture
def host(site, tmp_path):
    (tmp_path / "one").mkdir()
    (tmp_path / "one/two").symlink_to(site)
    (tmp_path / "one/sibling.txt").write_text("同一来源下的另一个站")
    host = Host(tmp_path)
    yield host
    with contextlib.suppress(OSError):
        host.stop()


@pytest.fixture
def reader(browser):
    """一个读者的浏览器：自己要求在 http 的本机装 Service Worker。"""
    context = browser.new_context(locale="zh-CN")
    context.set_default_timeout(20_000)
    context.add_init_script("localStorage.setItem('kb.service-worker', '1')")
    yield context.new_page()
    context.close()


# 这一页与它取过的一切都留下了
KEPT = """async (root) => {
  if (!navigator.serviceWorker.controller) return false
  const names = [location.href, ...performance.getEntriesByType("resource").map(e => e.name)]
  const kept = names.filter(n => n.startsWith(root)).map(n => caches.match(n.split(/[?#]/)[0]))
  return kept.length > 5 && (await Promise.all(kept)).every(Boolean)
}"""


def see(page, host, *names):
    for name in names:
        page.goto(host.url + name)
        wait(page, KEPT, host.url)


def kept_urls(page, host):
    """留下的文件的地址，先后为序。"""
    return page.evaluate(
        "name => caches.open(name).then(cache => cache.keys()).then(all => all.map(one => one.url))",
        f"kbsite {host.url}",
    )


def test_pages_under_a_deep_path_load_quietly_and_alone(visit, host):
    for name in ("", "rl/dpo/", "notebooks/rl/dpo/", "api/rl/", "interviews/"):
        visitor = visit(host.url + name, origin=host.url)
        assert visitor.foreign == [] and visitor.errors == [], name


def test_visited_pages_open_without_a_network(host, reader):
    see(reader, host, "rl/dpo/", "architecture/kv-cache/")
    host.stop()
    reader.goto(host.url + "rl/dpo/")
    assert_complete(reader)
    # 查询不分页：分享来的计算器链接打开同一页
    reader.goto(host.url + "architecture/kv-cache/?kv-cache.num_tokens=131072")
    assert reader.locator('.kb-calculator output[name="cache"]').inner_text().startswith("17.18 GB")


def test_page_never_visited_says_so_and_lists_what_was(host, reader):
    see(reader, host, "rl/dpo/", "architecture/kv-cache/")
    host.stop()
    reader.goto(host.url + "rl/ppo/")
    assert reader.locator("h1").inner_text() == "没有网络，这一页还没有打开过"
    assert reader.locator("li").count() == 2
    with reader.expect_navigation(wait_until="load"):
        reader.get_by_role("link", name=re.compile("DPO")).click()
    assert_complete(reader)
    host.start()
    reader.goto(host.url + "rl/ppo/")
    assert "PPO" in reader.locator("h1").inner_text()


def test_changed_page_is_shown_at_once_when_the_network_is_back(host, reader):
    see(reader, host, "rl/dpo/")
    host.stop()
    reader.goto(host.url + "rl/dpo/")
    host.changed["rl/dpo/"] = "<title>新</title><h1>新的内容</h1>".encode()
    host.start()
    reader.goto(host.url + "rl/dpo/")
    assert reader.locator("h1").inner_text() == "新的内容"
    host.stop()
    reader.reload()
    assert reader.locator("h1").inner_text() == "新的内容"


def test_silent_network_falls_back_after_a_few_seconds_once(host, reader):
    see(reader, host, "rl/dpo/")
    host.hang()
    start = time.monotonic()
    reader.goto(host.url + "rl/dpo/")
    # 只等一次：样式与脚本不再各等一遍
    assert 3 < time.monotonic() - start < 7
    assert_complete(reader)
    host.changed["rl/dpo/"] = "<h1>新的内容</h1>".encode()
    host.speak()
    reader.goto(host.url + "rl/dpo/")
    assert reader.locator("h1").inner_text() == "新的内容"


def test_removed_page_is_forgotten(host, reader):
    see(reader, host, "rl/dpo/")
    host.changed["rl/dpo/"] = None
    assert reader.goto(host.url + "rl/dpo/").status == 404
    reader.goto(host.url)
    assert host.url + "rl/dpo/" not in kept_urls(reader, host)


def test_only_whole_files_of_this_site_are_kept(host, reader):
    see(reader, host, "rl/dpo/")
    host.changed |= {"a.zip": b"zip", "part.txt": b"part", "post.txt": b"post", "whole.txt": b"whole"}
    reader.evaluate(
        """async () => {
          await fetch("../../a.zip")
          await fetch("../../part.txt", {headers: {Range: "bytes=0-1"}})
          await fetch("../../post.txt", {method: "POST"})
          await fetch("../../../sibling.txt")
          await fetch("../../whole.txt")
        }"""
    )
    wait(reader, "caches.match('../../whole.txt').then(Boolean)")
    kept = kept_urls(reader, host)
    assert reader.evaluate("caches.keys()") == [f"kbsite {host.url}"]
    assert all(url.startswith(host.url) for url in kept)
    assert not [url for url in kept if url.endswith((".zip", "part.txt", "post.txt"))]


def test_cache_is_bounded_and_drops_the_oldest(host, reader):
    see(reader, host, "rl/dpo/")
    fill = """async (name) => {
      const cache = await caches.open(name)
      for (let i = 0; i < 450; i++) await cache.put(`filler-${i}`, new Response("x"))
    }"""
    reader.evaluate(fill, f"kbsite {host.url}")
    assert len(kept_urls(reader, host)) > 450
    reader.goto(host.url + "rl/ppo/")
    wait(reader, KEPT, host.url)
    reader.wait_for_timeout(500)
    kept = kept_urls(reader, host)
    assert len(kept) == 400
    assert host.url + "rl/ppo/" in kept and host.url + "rl/dpo/" not in kept


def test_previews_on_this_machine_install_nothing(visit, host):
    page = visit(host.url + "rl/dpo/", origin=host.url).page
    page.wait_for_timeout(1000)
    assert page.evaluate("navigator.serviceWorker.getRegistrations().then(all => all.length)") == 0
    assert page.evaluate("caches.keys()") == []


def test_new_version_takes_over_at_once_and_keeps_the_pages(host, reader):
    see(reader, host, "rl/dpo/")
    text = (ROOT / "docs/service-worker.js").read_text(encoding="utf-8")
    host.changed["service-worker.js"] = text.replace("<h1>没有网络", "<h1>新版本：没有网络").encode()
    reader.evaluate(
        """async () => {
          navigator.serviceWorker.addEventListener("controllerchange", () => { window.taken = true })
          await (await navigator.serviceWorker.ready).update()
        }"""
    )
    wait(reader, "window.taken")
    host.stop()
    reader.goto(host.url + "rl/ppo/")
    assert reader.locator("h1").inner_text().startswith("新版本")
    reader.goto(host.url + "rl/dpo/")
    assert_complete(reader)


def test_version_that_removes_itself_leaves_nothing(host, reader):
    """撤下用的几行取自 docs/about/build.md。"""
    see(reader, host, "rl/dpo/")
    text = (ROOT / "docs/about/build.md").read_text(encoding="utf-8")
    host.changed["service-worker.js"] = re.search(r"```js\n(.*?)```", text, re.S)[1].encode()
    host.changed["assets/javascripts/register.js"] = b""
    reader.goto(host.url + "rl/dpo/")
    wait(
        reader,
        """async () => !(await caches.keys()).length
          && !(await navigator.serviceWorker.getRegistrations()).length""",
    )
    host.stop()
    with pytest.raises(Error, match="ERR_CONNECTION_REFUSED"):
        reader.goto(host.url + "rl/dpo/")


# ── 安装成应用 ──────────────────────────────────────────────


def test_browser_finds_nothing_against_installing(host, reader):
    see(reader, host, "rl/dpo/")
    session = reader.context.new_cdp_session(reader)
    manifest = session.send("Page.getAppManifest")
    assert manifest["errors"] == [] and manifest["url"] == host.url + "manifest.webmanifest"
    errors = session.send("Page.getInstallabilityErrors")["installabilityErrors"]
    # 测试用的窗口是无痕的，别的理由都没有
    assert [error["errorId"] for error in errors] == ["in-incognito"]
    assert manifest["manifest"]["startUrl"] == manifest["manifest"]["scope"] == host.url


def test_manifest_says_what_the_site_says(site):
    manifest = json.loads((site / "manifest.webmanifest").read_text(encoding="utf-8"))
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    assert f"site_name: {manifest['name']}\n" in config
    assert f"site_description: {manifest['description']}\n" in config
    for icon in manifest["icons"]:
        assert (site / icon["src"]).is_file()
        if icon["type"] == "image/png":
            with Image.open(site / icon["src"]) as image:
                assert icon["sizes"] == "{}x{}".format(*image.size)
