"""换生成器要付出什么：同一份内容用 MkDocs、ProperDocs、Zensical 各建一遍，列出与 MkDocs 的差别。

用法：make generators。只打印，不断言：Material 停止维护（2027-05-05）以前，每月跑一次就够。
ProperDocs 沿用 MkDocs 1.x 的插件与钩子；Zensical 不运行它们，所以另有一行是建完以后由 kbsite 排公式、换图、加锚点的结果。
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path

from kbsite.math.mathjax import MathJax
from kbsite.math.scan import formulas, replace
from kbsite.notebooks.fragments import replace_figures
from kbsite.pages import name_questions
from kbsite.project import Project, build_notebooks

ROOT = Path(__file__).parents[1]
SHOWN = 12
PARTS = ("公式", "嵌入的代码", "图")


@dataclass
class Page(HTMLParser):
    """一页正文里读者会用到的：锚点、排好的公式、嵌入的代码、图。"""

    html: str
    anchors: set[str] = field(default_factory=set)
    parts: Counter = field(default_factory=Counter)

    def __post_init__(self):
        super().__init__()
        self.feed(self.html.partition("<article")[2].rpartition("</article>")[0])

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        classes = (found.get("class") or "").split()
        if found.get("id") and tag in ("h1", "h2", "h3", "h4", "h5", "h6", "a", "details", "li", "p"):
            self.anchors.add(found["id"])
        self.parts["公式"] += tag == "mjx-container"
        self.parts["嵌入的代码"] += tag == "details" and "code" in classes
        self.parts["图"] += tag == "figure" and "kb-figure" in classes


def read(site: Path) -> dict[str, Page]:
    """站点的各页，以地址为键。"""
    return {
        path.parent.relative_to(site).as_posix(): Page(path.read_text(encoding="utf-8"))
        for path in site.rglob("index.html")
    }


def differences(old: dict[str, Page], new: dict[str, Page]) -> list[str]:
    """`new` 少了什么：整页，页里的锚点，页里的公式、代码、图。"""
    lost = sorted(old.keys() - new.keys())
    found = [f"没有 {len(lost)} 页：{'、'.join(lost[:3])}…"] if lost else []
    for url in sorted(old.keys() & new.keys()):
        if lost := sorted(old[url].anchors - new[url].anchors):
            found.append(f"{url}: 少了 {len(lost)} 个锚点：{'、'.join(lost[:3])}…")
        for part in PARTS:
            before, after = old[url].parts[part], new[url].parts[part]
            if before != after:
                found.append(f"{url}: {part} {before} → {after}")
    return found


def totals(old: dict[str, Page], new: dict[str, Page]) -> list[str]:
    """一行表格：页面、保住的锚点、公式、代码、图，各写「新的/原来的」。"""
    kept = sum(len(page.anchors & new[url].anchors) for url, page in old.items() if url in new)
    cells = [
        (len(old.keys() & new.keys()), len(old)),
        (kept, sum(len(page.anchors) for page in old.values())),
    ]
    for part in PARTS:
        cells.append(tuple(sum(page.parts[part] for page in site.values()) for site in (new, old)))
    return [f"{after}/{before}" for after, before in cells]


def build(name: str, folder: Path) -> tuple[dict[str, Page], float]:
    """用一个生成器建站；返回各页与秒数。失败时打印输出的最后几行。"""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    (folder / "mkdocs.yml").write_text(f"{config}\nsite_dir: {name}\n", encoding="utf-8")
    began = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-m", name, "build", "-f", "mkdocs.yml"],
        cwd=folder,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1", "NO_COLOR": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if result.returncode:
        print(f"{name} 失败（{result.returncode}）：", *result.stdout.splitlines()[-10:], sep="\n    ")
    return read(folder / name), time.monotonic() - began


def finish(site: Path, project: Project, figures: dict[str, str]) -> None:
    """建完以后做也行的三步：排公式、换图、给追问加锚点。它们只认 HTML，不认生成器。"""
    math = MathJax(project.node_modules, project.cache / "math.json")
    for path in site.rglob("index.html"):
        html = path.read_text(encoding="utf-8")
        for formula in formulas(html):
            math.typeset(formula)
        html = name_questions(replace(replace_figures(html, figures), math.typeset))
        path.write_text(html, encoding="utf-8")
    math.close()


def main() -> int:
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        for name in ("docs", "notebooks", "snippets", ".cache"):
            if (ROOT / name).exists():
                shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "topics.yml", folder)
        (folder / "src").mkdir()
        for name in ("src/kbsite", "node_modules", "overrides"):
            (folder / name).symlink_to(ROOT / name)
        # 笔记先执行好、嵌入的片段先写好：比的是建站
        project = Project(folder)
        figures = build_notebooks(project).figures
        old, seconds = build("mkdocs", folder)
        rows = [("mkdocs", old, seconds)]
        for name in ("properdocs", "zensical"):
            rows.append((name, *build(name, folder)))
        began = time.monotonic()
        finish(folder / "zensical", project, figures)
        rows.append(("zensical + kbsite", read(folder / "zensical"), rows[-1][2] + time.monotonic() - began))
    print("| 生成器 | 页面 | 锚点 | 公式 | 嵌入的代码 | 图 | 秒 |\n" + "| --- " * 7 + "|")
    for name, new, seconds in rows:
        print(f"| {' | '.join([name, *totals(old, new), f'{seconds:.0f}'])} |")
    for name, new, _ in rows[1:]:
        found = differences(old, new)
        print(f"\n{name}：{len(found)} 处差别")
        print(*(f"- {line}" for line in found[:SHOWN]), sep="\n")
        if len(found) > SHOWN:
            print(f"- ……另有 {len(found) - SHOWN} 处")
    return 0


if __name__ == "__main__":
    sys.exit(main())
