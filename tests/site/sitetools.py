"""真实站点测试共用的东西：建站、列出网页。"""

import os
import subprocess
import sys
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
    """站内每个网页的相对地址。"""
    return sorted(
        path.relative_to(site).as_posix().removesuffix("index.html") for path in site.rglob("index.html")
    )
