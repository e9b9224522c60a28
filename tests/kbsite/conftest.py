"""建站工具的测试：在临时文件夹里造一个小项目，真的执行、真的建站。"""

import os
import shutil
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]

HEADER = """\
# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

"""


@dataclass
class SmallProject:
    """一个能建站的小项目；`write` 写文件，`build` 建站并返回进程结果。"""

    root: Path

    def write(self, name: str, text: str) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(textwrap.dedent(text).lstrip("\n"), encoding="utf-8")
        return path

    def notebook(self, name: str, body: str, header: str = HEADER) -> Path:
        return self.write(f"notebooks/{name}.py", header + textwrap.dedent(body).lstrip("\n"))

    def command(self, *args: str) -> list[str]:
        return [sys.executable, "-m", "mkdocs", "build", *args]

    def environment(self, **extra: str) -> dict[str, str]:
        return {
            **os.environ,
            "PYTHONPATH": "src:.",
            "NO_MKDOCS_2_WARNING": "1",
            "SOURCE_DATE_EPOCH": "0",
            **extra,
        }

    def build(self, *args: str, **extra: str) -> subprocess.CompletedProcess:
        return subprocess.run(
            self.command(*args),
            cwd=self.root,
            env=self.environment(**extra),
            capture_output=True,
            text=True,
            timeout=300,
        )

    def page(self, url: str) -> str:
        return (self.root / "site" / url / "index.html").read_text(encoding="utf-8")

    def nav(self, *pages: str) -> None:
        text = (REPOSITORY / "mkdocs.yml").read_text(encoding="utf-8")
        text = text[: text.index("\nnav:\n")]
        self.write("mkdocs.yml", text + "\nnav:\n" + "".join(f"  - {page}\n" for page in pages))


def lay_out(folder):
    """只有一个首页的项目；结构与仓库相同，MathJax 与建站工具用仓库里的。"""
    small = SmallProject(folder)
    for name in ("src/kbsite", "node_modules", "overrides"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).symlink_to(REPOSITORY / name)
    shutil.copytree(REPOSITORY / "docs/assets", folder / "docs/assets")
    small.write("topics.yml", "[]\n")
    small.write("snippets/__init__.py", "")
    small.write("notebooks/.keep", "")
    small.write("docs/index.md", "# 首页\n")
    small.nav("index.md")
    return small


@pytest.fixture
def project(tmp_path):
    return lay_out(tmp_path)


@pytest.fixture(scope="module")
def module_project(tmp_path_factory):
    """几个测试共用的一个。"""
    return lay_out(tmp_path_factory.mktemp("project"))
