"""一个拉取请求改了什么：该跑哪些测试，以及给维护者看的摘要（Markdown）。

摘要里的标题、标签、输出都是提交者写的，一律转义成文字：在摘要里放不进链接、图片、HTML。
"""

import difflib
import gzip
import hashlib
import json
import operator
import re
import subprocess
from collections import Counter
from pathlib import Path

import yaml

from . import front_matter
from .errors import KbsiteError
from .notebooks.key import imported_modules
from .pages import INCLUDE
from .urls import REDIRECTS, read_published, read_redirects

EVERYTHING = ["tests"]
# 内容变了就要跑的：建好的站；读真实页面、笔记、参考实现的工具测试
CONTENT_TESTS = [
    "tests/site",
    *(
        f"tests/kbsite/test_{name}.py"
        for name in ("cards", "check", "listing", "new_page", "topics", "verification")
    ),
]
# 只认这样的名字：它们要出现在命令行里，别的（空格、引号、`$`）一律当作「全部」
PAGE = re.compile(r"docs/(?:[\w-]+/)*[\w-]+\.md", re.A)
MODULE = re.compile(r"(?:(?:notebooks|snippets)/(\w+)/|tests/snippets/(\w+)/test_)(\w+)\.py", re.A)
PROSE = re.compile(r"[\w.-]+\.md|LICENSE[\w-]*|\.github/(?:ISSUE_TEMPLATE/)?[\w.-]+", re.A)
LISTS = ("tests/site/queries.tsv", "published.txt", "redirects.yml")
NAV = re.compile(r"[+-] +- [\w/-]+\.md")
PUNCTUATION = re.compile(r"[^\w ]|_")
NUMBER = re.compile(r"[-−]?\d+(?:\.\d+)?(?:e[+-]?\d+)?")
# 摘要的上限是 1 MiB；再长也没有人看
MAX_CELLS, MAX_LINES, MAX_WIDTH, MAX_OUTPUT = 40, 30, 200, 20_000


def affected(root: Path, base: str) -> list[str]:
    """从 `base` 到工作区的改动碰得到的测试；拿不准就是全部。"""
    tests: set[str] = set()
    modules: set[Path] = set()
    for name in changed_files(root, base):
        if PAGE.fullmatch(name) or PROSE.fullmatch(name) or name in LISTS:
            continue
        if name == "mkdocs.yml" and _only_nav(root, base):
            continue
        match = MODULE.fullmatch(name)
        if not match or (name.startswith("snippets/") and not (root / name).is_file()):
            return EVERYTHING  # 工具、设置、测试共用的东西；删掉的参考实现，导入它的已经认不出来
        if name.startswith("snippets/"):
            modules.add(root / name)
        test = f"tests/snippets/{match[1] or match[2]}/test_{match[3]}.py"
        if (root / test).is_file():
            tests.add(test)
    for path in (root / "tests/snippets").glob("*/test_*.py") if modules else ():
        if modules.intersection(imported_modules([path.read_text(encoding="utf-8")], root)):
            tests.add(path.relative_to(root).as_posix())
    return sorted(tests) + CONTENT_TESTS


def _only_nav(root: Path, base: str) -> bool:
    """mkdocs.yml 只改了导航里的页面：加一页不必跑全部测试。"""
    command = ["git", "diff", "--unified=0", "--merge-base", "--end-of-options", base, "--", "mkdocs.yml"]
    lines = subprocess.run(command, cwd=root, capture_output=True, text=True).stdout.splitlines()
    changed = [line for line in lines if re.match(r"[+-](?!\+\+ |-- )", line)]
    return bool(changed) and all(NAV.fullmatch(line) for line in changed)


def changed_files(root: Path, base: str) -> list[str]:
    """改过、加上、删去的文件；改名算一删一加。"""
    commands = (
        ["diff", "--name-only", "-z", "--no-renames", "--merge-base", "--end-of-options", base],
        ["ls-files", "--others", "--exclude-standard", "-z"],
    )
    names = []
    for command in commands:
        result = subprocess.run(["git", *command], cwd=root, capture_output=True, text=True)
        if result.returncode:
            raise KbsiteError(f"git 找不到 {base!r}：{result.stderr.strip()}。写一个取下来的提交，如 main、HEAD^1。")  # fmt: skip
        names += result.stdout.split("\0")[:-1]
    return sorted(names)


def summary(base: Path, head: Path) -> str:
    """两个建好的项目（`site/` 与 `.cache/` 都在）之间的差别，写成 Markdown。"""
    if not (head / "site/index.html").is_file():
        raise KbsiteError(f"{head / 'site'}: 还没有建站。先运行 make build。")
    parts = [_pages(base, head), _cells(base, head), _vanished(base, head)]
    return "\n\n".join(["## 这个请求改了什么", *filter(None, parts)]) + "\n"


def text(value: str) -> str:
    """放进 Markdown 任何地方都只是文字：标点写成字符引用，成不了语法；控制字符与改变书写方向的字符去掉。"""
    value = _visible(" ".join(value.split()))[:MAX_WIDTH]
    return f"<code>{PUNCTUATION.sub(lambda match: f'&#{ord(match[0])};', value)}</code>"


def fence(lines: list[str], language: str) -> str:
    """围栏代码块；围栏比内容里最长的一串反引号长，内容关不上它。"""
    body = "\n".join(_visible(line.expandtabs())[:MAX_WIDTH] for line in lines)
    ticks = "`" * (max([2, *map(len, re.findall("`+", body))]) + 1)
    return f"{ticks}{language}\n{body}\n{ticks}"


def _visible(value: str) -> str:
    return "".join(char if char.isprintable() else "�" for char in value)


def _pages(base: Path, head: Path) -> str:
    rows = []
    for name in sorted({*_sources(base), *_sources(head)}):
        if reasons := _reasons(base, head, name):
            before, after = _weight(base, name), _weight(head, name)
            ratio = f"{after / before:.2f}" if before and after else "—"
            title = text(_title(head if (head / name).is_file() else base, name))
            rows.append(
                f"| {text(name)} | {title} | {'、'.join(reasons)} | {before or '—'} | {after or '—'} | {ratio} |"
            )
    if not rows:
        return "没有页面变化。"
    table = "| 页面 | 标题 | 变了 | gzip 前（字节） | 后 | 比 |\n| --- | --- | --- | --: | --: | --: |\n"
    before, after = _total(base), _total(head)
    ratio = f"（{after / before:.3f} 倍）" if before else ""
    total = f"全站网页 gzip 后合计 {before or '—'} → {after} 字节{ratio}。"
    return f"### 页面（{len(rows)}）\n\n{table}" + "\n".join(rows) + f"\n\n{total}"


def _sources(root: Path) -> list[str]:
    return [path.relative_to(root).as_posix() for path in (root / "docs").rglob("*.md")]


def _reasons(base: Path, head: Path, name: str) -> list[str]:
    """一页哪里变了：自己的源文件、嵌入的单元、嵌入的参考实现。"""
    old, new = _read(base / name), _read(head / name)
    if old is None or new is None:
        return ["新页面" if old is None else "删去"]
    reasons = ["正文"] if old != new else []
    targets = {match[1].partition(":")[0] for match in INCLUDE.finditer(new)}
    for label, folder in (("单元", ".cache/fragments/"), ("参考实现", "")):
        chosen = [target for target in targets if target.startswith("snippets/") != bool(folder)]
        if folder and not (base / folder).is_dir():
            continue  # 合并前的没有建过站
        if any(_read(base / f"{folder}{target}") != _read(head / f"{folder}{target}") for target in chosen):
            reasons.append(label)
    return reasons


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.is_file() else None


def _title(root: Path, name: str) -> str:
    match = front_matter.PATTERN.match(_read(root / name) or "")
    try:
        meta = yaml.safe_load(match[1]) if match else {}
    except yaml.YAMLError:
        meta = {}
    return str(meta.get("title", name)) if isinstance(meta, dict) else name


def _weight(root: Path, name: str) -> int:
    """一页的 HTML 压缩后的字节；没有就是 0。"""
    key = name.removeprefix("docs/").removesuffix(".md")
    folder = key.removesuffix("index") if key.rpartition("/")[2] == "index" else key
    path = root / "site" / folder / "index.html"
    there = (root / name).is_file() and path.is_file()  # 删去的页，那里可能是跳转页
    return len(gzip.compress(path.read_bytes(), mtime=0)) if there else 0


def _total(root: Path) -> int:
    return sum(len(gzip.compress(path.read_bytes(), mtime=0)) for path in (root / "site").rglob("*.html"))


def _cells(base: Path, head: Path) -> str:
    """重新执行后输出变了的带标签的单元：变了几个数，逐行的前后。"""
    old, new = _outputs(base), _outputs(head)
    if not old and new:
        return "### 单元\n\n没有合并前的执行结果，没有比较。"
    changed = [name for name in sorted({*old, *new}) if old.get(name) != new.get(name)]
    parts = []
    for name in changed[:MAX_CELLS]:
        (before, figure), (after, new_figure) = old.get(name, ("", "")), new.get(name, ("", ""))
        facts = ["新单元"] if name not in old else ["删去"] if name not in new else []
        if not facts:
            numbers = changed_numbers(before, after)
            facts = [f"{numbers} 个数不同"] if numbers else ["只有文字不同"] * (before != after)
            facts += ["图不同"] * (figure != new_figure)
        lines = list(difflib.unified_diff(before.splitlines(), after.splitlines(), lineterm="", n=0))[2:]
        lines = [line for line in lines if not line.startswith("@@")]
        shown = fence(lines[:MAX_LINES], "diff") if lines else ""
        more = f"（另有 {len(lines) - MAX_LINES} 行）" if len(lines) > MAX_LINES else ""
        parts.append("\n\n".join(filter(None, [f"{text(name)}：{'，'.join(facts)}{more}", shown])))
    if len(changed) > MAX_CELLS:
        parts.append(f"另有 {len(changed) - MAX_CELLS} 个单元没有列出。")
    return (
        f"### 输出变了的单元（{len(changed)}）\n\n" + "\n\n".join(parts) if parts else "没有单元的输出变化。"
    )


def changed_numbers(before: str, after: str) -> int:
    """两份输出里不同的数有几个：个数相同就逐个比，否则数哪些只在一边。"""
    old, new = NUMBER.findall(before), NUMBER.findall(after)
    if len(old) == len(new):
        return sum(map(operator.ne, old, new))
    return max((Counter(old) - Counter(new)).total(), (Counter(new) - Counter(old)).total())


def _outputs(root: Path) -> dict[str, tuple[str, str]]:
    """{`rl/clip [标签]`: (文字输出, 图的散列)}；取自执行过的 .ipynb，没有标签的单元不算。"""
    folder = root / ".cache/ipynb/notebooks"
    found = {}
    for path in sorted(folder.rglob("*.ipynb")) if folder.is_dir() else ():
        key = path.relative_to(folder).with_suffix("").as_posix()
        for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
            if cell["cell_type"] == "code" and "#| label:" in "".join(cell["source"]).partition("\n")[0]:
                outputs = [_output(output) for output in cell["outputs"]]
                figures = "".join(figure for _, figure in outputs)
                found[f"{key} [{cell['id']}]"] = (
                    "\n".join(words for words, _ in outputs if words)[:MAX_OUTPUT],
                    hashlib.sha256(figures.encode()).hexdigest() if figures else "",
                )
    return found


def _output(output: dict) -> tuple[str, str]:
    """一个输出的文字与图；文字的取法与页面相同：Markdown 先于文本，有图就只有图。"""
    data = output.get("data", {"text/plain": output.get("text", "")})
    if figure := "".join(data.get("image/svg+xml", "")):
        return "", figure
    return "".join(data.get("text/markdown", data.get("text/plain", ""))), ""


def _vanished(base: Path, head: Path) -> str:
    """合并前有、合并后没有的地址；登记过的早已报错，这里是还没登记的。"""
    moved = read_redirects(head / REDIRECTS).keys()
    old, new = (set(read_published(root / ".cache/urls.txt")) for root in (base, head))
    gone = sorted(name for name in old - new if not {name, name.partition("#")[0]} & moved)
    rows = "\n".join(f"- {text(address)}" for address in gone[:MAX_CELLS])
    return f"### 不见了的地址（{len(gone)}）\n\n{rows}" if gone else ""
