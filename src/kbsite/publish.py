"""建好的网站整个换上去：`site/` 要么是上一次建好的，要么是这一次建好的，从来没有半个。"""

import shutil
from pathlib import Path


def partial(site: Path) -> Path:
    """建站时写在这里。"""
    return site.with_name(f"{site.name}.partial")


def publish(site: Path) -> None:
    """把建好的换上去。两次改名之间被杀，就没有 `site`，也不会有半个。"""
    old = site.with_name(f"{site.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if site.exists():
        site.rename(old)
    partial(site).rename(site)
    shutil.rmtree(old, ignore_errors=True)
