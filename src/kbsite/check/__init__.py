"""`make check`：几秒钟查完全部源文件，不建站、不执行、不导入 torch。规则见 docs/about/style.md。"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

from ..errors import KbsiteError
from . import anatomy, embeds, evidence, files, formulas, links, metadata, writing
from .findings import RULES, Edit, Finding
from .site import Site, read_site

__all__ = ["RULES", "Finding", "Report", "check", "fix"]

FAMILIES = (files, metadata, anatomy, evidence, links, writing, formulas, embeds)
PASSES = 5


@dataclass(frozen=True)
class Report:
    """一次检查：发现，页数，没有核对数字的笔记，用了几秒。"""

    findings: list[Finding]
    pages: int
    unexecuted: list[str]
    seconds: float

    def summary(self) -> str:
        text = f"检查了 {self.pages} 页、{len(RULES)} 条规则：{len(self.findings)} 处不合，{self.seconds:.1f} 秒。"
        fixable = sum(bool(finding.edits) for finding in self.findings)
        if fixable:
            text += f" 其中 {fixable} 处可以自动改：make check ARGS=--fix。"
        if self.unexecuted:
            text += f" 有 {len(self.unexecuted)} 份笔记没有执行过或已过期（如 {self.unexecuted[0]}），它们页面上的数字（KB201）没有核对：先 make build。"
        return text


def check(root: Path, paths: list[str] = ()) -> Report:
    """检查整个项目；给了 `paths`（相对项目根的文件或文件夹）就只报那里的。"""
    start = time.perf_counter()
    site = read_site(root)
    found = _findings(site, paths)
    return Report(found, len(site.pages), evidence.unexecuted(site), time.perf_counter() - start)


def fix(root: Path, paths: list[str] = ()) -> list[str]:
    """改掉能放心自动改的，返回改过的文件；改到没有可改的为止（一处改了，另一处可能才露出来）。"""
    changed: dict[str, None] = {}
    for _ in range(PASSES):
        site = read_site(root)
        edits: dict[str, set[Edit]] = {}
        for finding in _findings(site, paths):
            if finding.edits:
                edits.setdefault(finding.path, set()).update(finding.edits)
        if not edits:
            break
        for name, wanted in edits.items():
            text = _apply(site.texts[name], sorted(wanted))
            with open(root / name, "w", encoding="utf-8", newline="") as file:
                file.write(text)
            changed[name] = None
    return list(changed)


def relative(path: str, root: Path) -> str:
    """命令行上的路径 → 相对项目根的；不存在就报错，免得打错了字却以为没有问题。"""
    full = Path(os.path.abspath(path))
    if not full.exists() or not full.is_relative_to(root):
        raise KbsiteError(f"{path} 不存在，或不在项目里。写项目里的文件或文件夹。")
    return full.relative_to(root).as_posix()


def _findings(site: Site, paths: list[str]) -> list[Finding]:
    found = [*site.findings, *(finding for family in FAMILIES for finding in family.findings(site))]
    if paths and "." not in paths:
        found = [f for f in found if any(f.path == path or f.path.startswith(f"{path}/") for path in paths)]
    return sorted(set(found), key=lambda finding: (finding.path, finding.line, finding.rule, finding.fact))


def _apply(text: str, edits: list[Edit]) -> str:
    """从后往前改，偏移才不会变；与已经改过的重叠就留给下一遍。"""
    limit = len(text)
    for edit in reversed(edits):
        if edit.end <= limit:
            text = text[: edit.start] + edit.text + text[edit.end :]
            limit = edit.start
    return text
