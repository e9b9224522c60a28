"""基准：同样的内容，我们的做法与原生做法（mkdocs-jupyter 执行、浏览器里排公式）并排比。

用法：make bench（全部）；make bench ARGS=--quick（不做 100 倍页数）。只打印，不断言。
"""

import argparse
import functools
import gzip
import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from statistics import median

from playwright.sync_api import sync_playwright

from kbsite.browser import ensure_chromium

ROOT = Path(__file__).parents[1]
TOPICS = sorted(
    path.relative_to(ROOT / "docs").with_suffix("").as_posix()
    for path in (ROOT / "docs").glob("*/*.md")
    if "\nanswer:" in path.read_text(encoding="utf-8")
)
# 逐页看重量时只取这么多页：最重的与随后几页
SAMPLE = sorted(TOPICS, key=lambda key: -(ROOT / "docs" / f"{key}.md").stat().st_size)[:5]
# 慢 4G：下行 1.6 Mbit/s，往返 150 ms
NETWORK = {"offline": False, "latency": 150, "downloadThroughput": 200_000, "uploadThroughput": 90_000}
# Material 文档给的写法，字体与脚本都由本站提供
STOCK_MATHJAX = r"""
window.MathJax = {
  tex: {inlineMath: [["\\(", "\\)"], ["$", "$"]], displayMath: [["\\[", "\\]"]]},
  options: {ignoreHtmlClass: ".*|", processHtmlClass: "arithmatex|jp-RenderedMarkdown"},
  output: {fontPath: document.currentScript.src.replace("mathjax.js", "newcm-font")},
}
"""
STILL = """() => {
  let last = 0, before = ""
  const look = () => {
    const formulas = document.querySelectorAll("mjx-container")
    const box = formulas.length ? formulas[formulas.length - 1].getBoundingClientRect() : {}
    const now = [document.documentElement.scrollHeight, formulas.length, box.top, box.width].join()
    if (now !== before) { before = now; last = performance.now() }
    requestAnimationFrame(look)
  }
  look()
  window.__still = () => last
  window.__shift = 0
  new PerformanceObserver(list => { for (const e of list.getEntries()) window.__shift += e.value })
    .observe({type: "layout-shift", buffered: true})
}"""


def project(folder, *, copies=1, stock=False, bare=False):
    """把仓库复制成一个临时项目；`stock` 是原生做法，`bare` 去掉我们的钩子，其余（页面、插件、执行好的笔记）相同。"""
    for name in ("docs", "notebooks", "snippets"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "topics.yml", folder)
    (folder / "src").mkdir()
    for name in ("src/kbsite", "node_modules", "overrides", "bench"):
        (folder / name).symlink_to(ROOT / name)
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    config = config.replace("hooks:\n", "hooks:\n  - bench/timing.py\n") if not (stock or bare) else config
    extra = []
    for number in range(2, copies + 1):
        for key in TOPICS:
            text = (folder / "docs" / f"{key}.md").read_text(encoding="utf-8")
            (folder / "docs" / f"{key}-{number}.md").write_text(text, encoding="utf-8")
            extra.append(f"      - {key}-{number}.md\n")
    if extra:
        config += "  - 更多:\n" + "".join(extra)
    if stock or bare:
        config = config.replace("hooks:\n  - src/kbsite/hooks.py", "hooks:\n  - bench/timing.py")
        config = config.replace("  - assets/math/math.css", "  #")
        (folder / ".cache").symlink_to(ROOT / ".cache")
        for key in TOPICS:
            page = folder / "docs" / f"{key}.md"
            page.write_text(
                re.sub(r"^.*\{\{ answer \}\}.*$", "", page.read_text(encoding="utf-8"), flags=re.M)
            )
        for path in (ROOT / ".cache/ipynb/notebooks").rglob("*.ipynb"):
            target = folder / "docs/notebooks" / path.relative_to(ROOT / ".cache/ipynb/notebooks")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(path.read_bytes())
    if stock:
        config = config.replace("execute: false", "execute: true")
        config = config.replace(
            "extra_javascript:\n",
            "extra_javascript:\n  - javascripts/mathjax.js\n  - javascripts/newcm-font/tex-mml-chtml-mathjax-newcm.js\n",
        )
        scripts = folder / "docs/javascripts"
        font = ROOT / "node_modules/@mathjax/mathjax-newcm-font"
        shutil.copytree(font / "chtml", scripts / "newcm-font/chtml")
        shutil.copy(font / "tex-mml-chtml-mathjax-newcm.js", scripts / "newcm-font")
        (scripts / "mathjax.js").write_text(STOCK_MATHJAX, encoding="utf-8")
    (folder / "mkdocs.yml").write_text(config, encoding="utf-8")
    return folder


def build(folder):
    """建一次；返回各部分的秒数（见 timing.py）。"""
    timing = folder / "timing.json"
    environment = {**os.environ, "PYTHONPATH": "src:.", "NO_MKDOCS_2_WARNING": "1", "KB_TIMING": str(timing)}
    began = time.perf_counter()
    command = [sys.executable, "-m", "mkdocs", "build", "-q"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    wall = time.perf_counter() - began
    if result.returncode:
        sys.exit(result.stdout + result.stderr)
    return json.loads(timing.read_text(encoding="utf-8")) | {"wall": wall}


def count(site):
    """网页数、公式数。"""
    pages = list(site.rglob("index.html"))
    return len(pages), sum(path.read_text(encoding="utf-8").count("<mjx-container") for path in pages)


def gzip_size(path):
    return len(gzip.compress(path.read_bytes(), 6))


@functools.lru_cache(maxsize=4096)
def compressed(body):
    """真的服务器不会每次现压：压过的留着。"""
    return gzip.compress(body, 6)


class Server(http.server.SimpleHTTPRequestHandler):
    """像 GitHub Pages 那样压缩文本。"""

    def log_message(self, *args):
        pass

    def do_GET(self):
        path = Path(self.translate_path(self.path))
        path = path / "index.html" if path.is_dir() else path
        if not path.is_file():
            self.send_error(404)
            return
        body = path.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", self.guess_type(str(path)))
        if path.suffix in (".html", ".css", ".js", ".json", ".svg", ".xml"):
            body = compressed(body)
            self.send_header("Content-Encoding", "gzip")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def first_visit(site, url, browser):
    """空缓存、慢 4G 下第一次打开：字节、请求、脚本字节、公式静止的时刻、布局跳动。"""
    with http.server.ThreadingHTTPServer(
        ("127.0.0.1", 0), functools.partial(Server, directory=str(site))
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        # 量的脚本要在页面里求值
        context = browser.new_context(viewport={"width": 390, "height": 844}, bypass_csp=True)
        page = context.new_page()
        session = context.new_cdp_session(page)
        session.send("Network.enable")
        session.send("Network.emulateNetworkConditions", NETWORK)
        kinds, sizes, foreign = {}, {}, set()
        origin = f"http://127.0.0.1:{server.server_address[1]}/"

        def response(event):
            kinds[event["requestId"]] = event["type"]
            if not event["response"]["url"].startswith((origin, "data:", "blob:")):
                foreign.add(event["response"]["url"])

        session.on("Network.responseReceived", response)
        session.on(
            "Network.loadingFinished", lambda e: sizes.__setitem__(e["requestId"], e["encodedDataLength"])
        )
        page.add_init_script(f"addEventListener('DOMContentLoaded', {STILL})")
        page.goto(origin + url, wait_until="load", timeout=120_000)
        # 等到 5 秒没有变化为止（最多 60 秒）
        page.wait_for_function("performance.now() - window.__still() > 5000", timeout=60_000)
        result = {
            "bytes": sum(sizes.values()),
            "requests": len(sizes),
            "script": sum(size for key, size in sizes.items() if kinds.get(key) == "Script"),
            "still": page.evaluate("window.__still()"),
            "shift": page.evaluate("window.__shift"),
            "formulas": page.locator("mjx-container").count(),
            "foreign": len(foreign),
        }
        context.close()
        server.shutdown()
        return result


def table(headers, rows):
    widths = [max(len(str(row[i])) for row in [headers, *rows]) for i in range(len(headers))]
    for row in [headers, *rows]:
        print("  " + "  ".join(str(cell).rjust(width) for cell, width in zip(row, widths, strict=True)))


def ratio(a, b):
    return f"{a / b:.2f}×" if b else "—"


def bench_builds(work):
    print("\n(a) 构建时间，秒（冷：没有任何缓存；热：什么都没改）")
    ours = project(work / "ours")
    cold, warm = build(ours), build(ours)
    bare_folder = project(work / "bare", bare=True)
    build(bare_folder)
    bare = min((build(bare_folder) for _ in range(3)), key=lambda row: row["wall"])
    warm = min((warm, build(ours), build(ours)), key=lambda row: row["wall"])
    stock_folder = project(work / "stock", stock=True)
    stock_cold, stock_warm = build(stock_folder), build(stock_folder)
    rows = [
        [name, *(f"{row.get(part, 0):.2f}" for part in ("notebooks", "markdown", "math", "search", "total", "wall"))]
        for name, row in (
            ("本站 冷", cold), ("本站 热", warm), ("只有 MkDocs", bare), ("原生 冷", stock_cold), ("原生 热", stock_warm),
        )
    ]  # fmt: skip
    table(["", "笔记", "Markdown", "MathJax", "搜索", "合计", "含启动"], rows)
    pages, formulas = count(ours / "site")
    without = cold["total"] - cold["notebooks"]
    print(f"  {pages} 页、{formulas} 个公式；冷构建不计执行 {1000 * without / pages:.0f} ms/页，")
    print(
        f"  MathJax {1000 * cold['math'] / formulas:.1f} ms/公式；热构建 / 只有 MkDocs = {ratio(warm['wall'], bare['wall'])}；"
    )
    print(f"  冷构建 本站 / 原生 = {ratio(cold['wall'], stock_cold['wall'])}（原生在渲染时逐份执行）")
    return ours, stock_folder


def bench_weight(ours, stock):
    print("\n(b) 第一次打开（空缓存、慢 4G、390 px）：本站 对 原生")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=ensure_chromium(), args=["--no-sandbox", "--disable-background-networking"]
        )
        rows = []
        for url in ["", *(f"{key}/" for key in SAMPLE), *(f"notebooks/{key}/" for key in SAMPLE[:2])]:
            a = first_visit(ours / "site", url, browser)
            b = first_visit(stock / "site", url, browser)
            rows.append(
                [
                    url or "首页",
                    f"{a['bytes'] / 1000:.0f} / {b['bytes'] / 1000:.0f}",
                    ratio(a["bytes"], b["bytes"]),
                    f"{a['requests']} / {b['requests']}",
                    f"{a['script'] / 1000:.0f} / {b['script'] / 1000:.0f}",
                    f"{a['still']:.0f} / {b['still']:.0f}",
                    f"{a['shift']:.3f} / {b['shift']:.3f}",
                    f"{a['foreign']} / {b['foreign']}",
                    f"{a['formulas']} / {b['formulas']}",
                ]
            )
        browser.close()
    table(["页面", "KB", "比值", "请求", "脚本 KB", "静止 ms", "跳动", "外站", "公式"], rows)
    sizes = {path: gzip_size(path) for path in (ours / "site").rglob("index.html")}
    ordered = sorted(sizes.values())
    notebooks = [size for path, size in sizes.items() if "notebooks" in path.relative_to(ours / "site").parts]
    topics = [
        size for path, size in sizes.items() if path.parent.relative_to(ours / "site").as_posix() in TOPICS
    ]
    print(
        f"  HTML gzip：中位 {median(ordered) / 1000:.1f} KB，p95 {ordered[int(0.95 * (len(ordered) - 1))] / 1000:.1f} KB；"
    )
    print(
        f"  专题页中位 {median(topics) / 1000:.1f} KB；笔记页最大 {max(notebooks) / 1000:.1f} KB（原生见上表）"
    )


def bench_scale(work, quick):
    print("\n(c) 页数放大（专题页的副本；执行结果已在缓存里）")
    rows = []
    for copies in (1, 10) if quick else (1, 10, 100):
        folder = project(work / f"scale{copies}", copies=copies)
        shutil.copytree(ROOT / ".cache", folder / ".cache", ignore=shutil.ignore_patterns(".matplotlib"))
        result = build(folder)
        pages, formulas = count(folder / "site")
        index = folder / "site/search/search_index.json"
        rows.append(
            [
                f"{copies}×", pages, formulas, f"{result['total']:.1f}",
                f"{1000 * result['total'] / pages:.0f}", f"{1000 * result['math'] / formulas:.2f}",
                f"{index.stat().st_size / 1000:.0f}", f"{gzip_size(index) / 1000:.0f}",
            ]
        )  # fmt: skip
        shutil.rmtree(folder)
    table(["", "网页", "公式", "秒", "ms/页", "MathJax ms/公式", "索引 KB", "索引 gzip KB"], rows)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="不做 100 倍页数")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kbsite-bench-") as folder:
        work = Path(folder)
        ours, stock = bench_builds(work)
        bench_weight(ours, stock)
        bench_scale(work, args.quick)


if __name__ == "__main__":
    main()
