"""离线版：建好的文件夹打成一个 zip，供读者下载。同样的内容得到同样的字节。"""

import os
import posixpath
import re
import time
import zipfile
from pathlib import Path

from .errors import KbsiteError

LINK = re.compile(r"\{\{ offline \}\}")
# zip 记不了更早的时间
EARLIEST = 315532800  # 1980-01-01


def pack(site: Path, target: Path) -> None:
    """把 `site` 打成 `target`；里面只有一个文件夹，文件夹里只有一个网页在最上层：从它打开。

    最上层的其他文件（404、sitemap、Service Worker）只对网站有用，不放进去。
    """
    if not (site / "index.html").is_file():
        raise KbsiteError(f"{site}: 没有 index.html。先运行 make build OFFLINE=1。")
    moment = time.gmtime(max(EARLIEST, int(os.environ.get("SOURCE_DATE_EPOCH", 0))))[:6]
    files = [path for path in site.rglob("*") if path.is_file() and path.parent != site]
    partial = target.with_suffix(".partial")
    with zipfile.ZipFile(partial, "w") as archive:
        for path in sorted([site / "index.html", *files]):
            name = f"{target.stem}/{path.relative_to(site).as_posix()}"
            entry = zipfile.ZipInfo(name, moment)
            entry.external_attr = 0o644 << 16
            archive.writestr(entry, path.read_bytes(), zipfile.ZIP_DEFLATED, 9)
    partial.replace(target)


def published(environment: dict[str, str], root: Path) -> Path | None:
    """环境变量 `OFFLINE_ZIP` 指的文件：与网站一起发布的离线版。"""
    if not (name := environment.get("OFFLINE_ZIP")):
        return None
    if not (root / name).is_file():
        raise KbsiteError(f"OFFLINE_ZIP={name}: 没有这个文件。先运行 make zip，或去掉这个变量。")
    return root / name


def fill_link(markdown: str, archive: Path | None, page: str) -> str:
    """把 `{{ offline }}` 换成下载的链接与大小；没有一起发布时换成自己建的办法。`page` 是所在页面的路径。"""
    if archive is None:
        text = "在源码的文件夹里运行 `make zip` 得到一个 zip"
    else:
        href = posixpath.relpath(archive.name, posixpath.dirname(page))
        text = f"[下载离线版]({href})（zip，{archive.stat().st_size / 1e6:.1f} MB）"
    return LINK.sub(lambda _: text, markdown)
