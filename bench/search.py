"""检索评测：同一个建好的站，本站的检索与 Material 自带的（有、没有 jieba）并排比。

用法：make search-eval；ARGS=--quick 不做 100 倍页数。查询在 tests/site/queries.tsv；只打印，不断言。
在真实浏览器里逐键输入；索引都由 .cache/search.json 里的同一份正文建成，别的不同只在 worker。
"""

import argparse
import csv
import functools
import html
import http.server
import json
import logging
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from statistics import median

import jieba
import material
from material.plugins.search.plugin import SearchIndex
from playwright.sync_api import TimeoutError as BrowserTimeout
from playwright.sync_api import sync_playwright

from bench import ROOT, Server, gzip_size, ratio, table
from kbsite.browser import ensure_chromium
from kbsite.search.build import STOCK, build_index
from kbsite.search.sections import SearchPage, Section

SITE = ROOT / "site"
BOX = "[data-md-component=search-query]"
READY_SECONDS = 240
# 记下按键与结果列表变化的时刻
CLOCK = """
let typed = ""
addEventListener("input", ({target}) => {
  if (target.value === undefined || target.value === typed) return
  typed = target.value
  window.__key = performance.now()
  window.__shown = 0
}, true)
addEventListener("DOMContentLoaded", () => {
  new MutationObserver(() => { window.__shown ||= performance.now(); window.__changed = performance.now() })
    .observe(document.querySelector("[data-md-component=search-result]"), {childList: true, subtree: true})
})
"""


def queries():
    rows = (ROOT / "tests/site/queries.tsv").read_text(encoding="utf-8").splitlines()
    return [row for row in csv.reader(rows, delimiter="\t") if row and not row[0].startswith("#")]


def documents(copies):
    """(页, 别名)；`copies` 倍页数，副本的题目带编号。"""
    data = json.loads((ROOT / ".cache/search.json").read_text(encoding="utf-8"))
    pages = [
        SearchPage(**{**page, "sections": [Section(**s) for s in page["sections"]]}) for page in data["pages"]
    ]
    more = [
        SearchPage(f"{page.url.rstrip('/')}-{n}/", f"{page.title} {n}", page.tags, page.boost, page.sections)
        for n in range(2, copies + 1)
        for page in pages
    ]
    return pages + more, data["aliases"]


def stock_index(pages, segment):
    """Material 的 search_index.json：同样的节与正文；`segment` 给汉字分词。"""
    docs = []
    for page in pages:
        for section in page.sections:
            text = f"{section.prose} {section.code}" if section.code else section.prose
            entry = {
                "location": page.url + (f"#{section.anchor}" if section.anchor else ""),
                "title": segment(html.escape(section.title)),
                "text": segment(html.escape(text)),
                "tags": page.tags,
                "boost": page.boost,
            }
            docs.append(entry)
    fields = {"title": {"boost": 1e3}, "text": {"boost": 1.0}, "tags": {"boost": 1e6}}
    config = {
        "lang": ["zh"],
        "separator": r"[\s\u200b\u3000\-、。，．？！；]+",
        "pipeline": ["stemmer"],
        "fields": fields,
    }
    return json.dumps({"config": config, "docs": docs}, ensure_ascii=False)


def overlay(folder, engine, pages, aliases):
    """把一种检索写成一层文件，盖在站点上；返回建索引的秒数。"""
    began = time.perf_counter()
    worker = folder / next(SITE.glob(STOCK)).relative_to(SITE)
    worker.parent.mkdir(parents=True)
    if engine == "本站":
        build_index(pages, aliases, folder / "search", offline=False)
        (folder / "search/worker.js").replace(worker)
        (folder / "search/search_index.json").write_bytes((SITE / "search/search_index.json").read_bytes())
    else:
        theme = Path(material.__file__).parent / "templates"
        worker.write_bytes(next(theme.glob(STOCK)).read_bytes())
        (folder / "search").mkdir()
        segment = segmenter() if engine.endswith("jieba") else lambda text: text
        (folder / "search/search_index.json").write_text(stock_index(pages, segment), encoding="utf-8")
    return time.perf_counter() - began


def segmenter():
    """Material 的插件给汉字分词的那个函数；它要 jieba，评测的环境里才装。"""
    index = SearchIndex()
    # 副本的正文相同，只分一次
    return functools.cache(lambda text: index._segment_chinese(text))


class Layered(Server):
    """先找盖在上面的一层，再找站点本身；记下为检索发出的字节（浏览器看不到 worker 脚本自己的请求）。"""

    def __init__(self, *args, layer, sent, **kwargs):
        self.layer = layer
        self.sent = sent
        super().__init__(*args, directory=str(SITE), **kwargs)

    def send_header(self, name, value):
        if name == "Content-Length" and (
            "/search/" in self.path or "/workers/" in self.path or "/lunr/" in self.path
        ):
            self.sent["bytes"] += int(value)
            self.sent["requests"] += 1
        super().send_header(name, value)

    def translate_path(self, path):
        name = path.partition("?")[0].lstrip("/")
        above = self.layer / name
        return str(above) if name and above.is_file() else super().translate_path(path)


def measure(browser, layer, rows):
    """一种检索：各查询的结果与时刻、下载的字节。"""
    sent = Counter()
    handler = functools.partial(Layered, layer=layer, sent=sent)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        origin = f"http://127.0.0.1:{server.server_address[1]}/"
        page = browser.new_page(viewport={"width": 1280, "height": 844}, locale="zh-CN", bypass_csp=True)
        page.set_default_timeout(READY_SECONDS * 1000)
        page.add_init_script(CLOCK)
        page.goto(origin, wait_until="networkidle")
        found = {"visit": sent["bytes"]}
        began = time.perf_counter()
        page.locator(BOX).click()
        try:
            ask(page, "loss")  # 预热：索引装好、第一个结果出来为止
        except BrowserTimeout:
            server.shutdown()
            page.close()
            return found | {"ready": None}
        found["ready"] = time.perf_counter() - began
        found["warm"] = sent["bytes"]
        found["answers"] = [(kind, query, wanted, *ask(page, query)) for kind, query, wanted in rows]
        found["total"], found["requests"] = sent["bytes"], sent["requests"]
        page.close()
        server.shutdown()
        return found


def ask(page, query):
    """逐键输入；返回（结果里各页的地址，最后一键到结果的毫秒）。"""
    box = page.locator(BOX)
    box.fill("")
    page.wait_for_timeout(60)
    for character in query:
        page.keyboard.type(character)
    page.wait_for_function("window.__shown > 0 && performance.now() - window.__changed > 120")
    links = page.eval_on_selector_all(
        ".md-search-result__item > .md-search-result__link",
        "links => links.map(a => new URL(a.href).pathname.slice(1))",
    )
    return links, page.evaluate("window.__shown - window.__key")


def rank(links, wanted):
    accepted = {f"{key}/" for key in wanted.split("|")}
    return next((i for i, link in enumerate(links, 1) if link in accepted), 0)


def percentile(values, share):
    return sorted(values)[int(share * (len(values) - 1))]


def print_quality(results):
    print("\n(a) 质量：正确的页在第一、在前五的比例，MRR，没有结果的查询数")
    kinds = list(dict.fromkeys(kind for kind, *_ in results["本站"]["answers"])) + ["全部"]
    rows = []
    for kind in kinds:
        for engine, found in results.items():
            answers = [a for a in found["answers"] if kind in (a[0], "全部")]
            ranks = [rank(links, wanted) for _, _, wanted, links, _ in answers]
            rows.append(
                [
                    kind, engine, len(answers),
                    f"{sum(r == 1 for r in ranks) / len(ranks):.3f}",
                    f"{sum(1 <= r <= 5 for r in ranks) / len(ranks):.3f}",
                    f"{sum(1 / r for r in ranks if r) / len(ranks):.3f}",
                    sum(not links for *_, links, _ in answers),
                ]
            )  # fmt: skip
    table(["种类", "检索", "查询", "recall@1", "recall@5", "MRR", "无结果"], rows)
    missed = [(q, w, links[:2]) for _, q, w, links, _ in results["本站"]["answers"] if rank(links, w) != 1]
    for query, wanted, links in missed:
        print(f"  不在第一：{query}（{wanted}）→ {'、'.join(links) or '无结果'}")


def print_cost(name, results):
    rows = []
    base = results["本站"]
    for engine, found in results.items():
        if found["ready"] is None:
            rows.append(
                [
                    name,
                    engine,
                    found["visit"] // 1000,
                    f">{READY_SECONDS}",
                    "—",
                    "—",
                    "—",
                    "—",
                    f"{found['build']:.0f}",
                ]
            )
            continue
        times = [milliseconds for *_, milliseconds in found["answers"]]
        per_query = (found["total"] - found["warm"]) / len(times) / 1000
        rows.append(
            [
                name, engine, f"{found['visit'] / 1000:.1f}", f"{found['ready']:.2f}",
                f"{found['warm'] / 1000:.0f}", f"{per_query:.1f}",
                f"{median(times):.0f} / {percentile(times, 0.95):.0f}",
                ratio(median(times), median([m for *_, m in base["answers"]])),
                f"{found['build']:.0f}",
            ]
        )  # fmt: skip
    return rows


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="不做 100 倍页数")
    args = parser.parse_args()
    logging.getLogger("jieba").setLevel(logging.WARNING)
    jieba.setLogLevel(logging.WARNING)
    if not (ROOT / ".cache/search.json").is_file() or not SITE.is_dir():
        sys.exit("没有建好的站：先运行 make build。")
    rows = queries()
    costs = []
    with sync_playwright() as playwright, tempfile.TemporaryDirectory(prefix="search-eval-") as work:
        browser = playwright.chromium.launch(
            executable_path=ensure_chromium(), args=["--no-sandbox", "--disable-background-networking"]
        )
        for copies in (1, 10) if args.quick else (1, 10, 100):
            pages, aliases = documents(copies)
            results = {}
            for engine in ("本站", "Material", "Material+jieba"):
                layer = Path(work) / f"{copies}-{engine}"
                seconds = overlay(layer, engine, pages, aliases)
                asked = rows if copies == 1 else rows[::4]
                results[engine] = measure(browser, layer, asked) | {"build": seconds}
                print(f"  {copies}× {engine} 完成", file=sys.stderr)
            if copies == 1:
                print_quality(results)
            costs += print_cost(f"{copies}×（{sum(len(page.sections) for page in pages)} 节）", results)
        browser.close()
    print("\n(b) 代价：首次访问时为检索下载的 KB、得到焦点到第一个结果的秒、那时已下载的 KB、")
    print("    此后平均每个查询再下载的 KB（gzip）、最后一键到结果的毫秒（中位 / p95）与比值、建索引的秒")
    table(["页数", "检索", "首访 KB", "就绪 s", "就绪 KB", "每查询 KB", "按键 ms", "比值", "建索引 s"], costs)
    index = SITE / "search"
    size = sum(gzip_size(path) for path in index.rglob("*") if path.is_file())
    print(
        f"  本站索引全部 {size / 1000:.0f} KB（gzip，{sum(1 for p in index.rglob('*') if p.is_file())} 个文件）。"
    )


if __name__ == "__main__":
    main()
