"""建索引、换上我们的 worker。切词与打分的参数都在 index.mjs 与 text.js 里，Python 不重复一遍。"""

import json
import subprocess
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from ..errors import KbsiteError
from ..math.mathjax import node_executable
from .sections import SearchPage

SCRIPT = Path(__file__).with_name("index.mjs")
STOCK = "assets/javascripts/workers/search.*.min.js"
SECONDS = 600


def build_index(pages: Iterable[SearchPage], aliases: list[list[str]], target: Path, *, offline: bool) -> str:
    """把索引写到 `target`（站点的 search/）；返回交给 index.mjs 的输入，评测用它造别的索引。"""
    source = json.dumps({"pages": [asdict(page) for page in pages], "aliases": aliases}, ensure_ascii=False)
    target.mkdir(parents=True, exist_ok=True)
    result = subprocess.run(
        [node_executable(), str(SCRIPT), str(target), str(offline).lower()],
        input=source,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=SECONDS,
    )
    if result.returncode:
        raise KbsiteError(f"建检索索引失败：\n{result.stderr.strip()}")
    return source


def install_worker(site: Path) -> None:
    """用 search/worker.js 换下 Material 的 worker；它的位置变了就报错，不能悄悄退回原来的搜索。"""
    stock = list(site.glob(STOCK))
    if len(stock) != 1:
        raise KbsiteError(
            f"{site}/{STOCK} 应当恰有一个，找到 {len(stock)} 个：主题换了搜索 worker 的位置，改 kbsite/search/build.py。"
        )
    (site / "search/worker.js").replace(stock[0])
