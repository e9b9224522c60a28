"""新建一页：页面、笔记、参考实现、测试四个文件，以及列出它的三处（导航、首页、所在节的目录）。

先在内存里排好全部改动，查不出错才写；写到一半失败就退回去，要么全有，要么全无。
"""

import datetime
import keyword
import re
import unicodedata
from pathlib import Path

import yaml

from .errors import KbsiteError
from .notebooks.cache import write_atomically
from .questions import nav_pages, read_nav

TEMPLATES = Path(__file__).parent / "templates"
KEY = re.compile(r"([a-z][a-z0-9]*(?:-[a-z0-9]+)*)/([a-z][a-z0-9]*(?:-[a-z0-9]+)*)")
ROW = "【待写：面试官在考什么，一行】"
# 会切开表格与链接、变成公式或标签的字符
FORBIDDEN = re.compile(r"[|\[\]<>{}$`*\\\"]|[^\S ]|[\x00-\x1f]")


def create(root: Path, key: str, title: str) -> list[Path]:
    """新建专题 `key`；返回写过的文件。输入不对、已经有了，就在写任何文件之前报错。"""
    section, slug = _checked_key(root, key)
    title = _checked_title(root, title)
    module = slug.replace("-", "_")
    names = {
        "page.md": f"docs/{key}.md",
        "notebook.py": f"notebooks/{section}/{module}.py",
        "snippet.py": f"snippets/{section}/{module}.py",
        "test.py": f"tests/snippets/{section}/test_{module}.py",
    }
    for name in names.values():
        if (root / name).exists():
            raise KbsiteError(f"{name}: 已经有了，不覆盖。换一个专题键，或直接改它。")
    values = {"KEY": key, "SECTION": section, "MODULE": module, "TODAY": str(datetime.date.today())}
    contents = {root / name: _filled(template, title, values) for template, name in names.items()}
    for name, row, line in (
        ("mkdocs.yml", rf"^( *)- {section}/[\w-]+\.md.*\n", rf"\1- {key}.md\n"),
        ("docs/index.md", rf"^- \*\*\[.*\]\({section}/index\.md\)\*\*.*(?=\n)", f"、[{title}]({key}.md)"),
        (f"docs/{section}/index.md", r"^\|.*\|\n", f"| [{title}]({slug}.md) | {ROW} |\n"),
    ):
        contents[root / name] = _inserted(root, name, row, line)
    _write_all(contents)
    return list(contents)


def sections(root: Path) -> list[str]:
    """能放专题的节：有目录页，也有参考实现的包。"""
    packages = sorted((root / "snippets").glob("*/__init__.py"))
    return [
        path.parent.name for path in packages if (root / "docs" / path.parent.name / "index.md").is_file()
    ]


def _checked_key(root: Path, key: str) -> tuple[str, str]:
    match = KEY.fullmatch(key)
    if not match:
        raise KbsiteError(f"专题键 {key!r} 不合规。写「节/题」，各由小写字母、数字、连字符组成，字母开头，如 KEY=rl/gspo。")  # fmt: skip
    section, slug = match.groups()
    if section not in (known := sections(root)):
        raise KbsiteError(f"没有 {section!r} 这一节。现有：{'、'.join(known) or '无'}。")
    if slug == "index" or keyword.iskeyword(slug):
        raise KbsiteError(f"专题键 {key!r} 不能用：index 是目录页，Python 的关键字不能作模块名。换一个。")
    return section, slug


def _checked_title(root: Path, title: str) -> str:
    title = title.strip(" ")
    if not title:
        raise KbsiteError('缺标题。写 TITLE="中文（English, 缩写）"，它是页面的一级标题（KB101）。')
    if match := FORBIDDEN.search(title):
        raise KbsiteError(f"标题里不能有 {match[0]!r}：标题要进表格、链接与地址。换成文字（KB303）。")
    for _, key, meta in nav_pages(read_nav(root / "mkdocs.yml"), root / "docs"):
        if _folded(str(meta.get("title", ""))) == _folded(title):
            raise KbsiteError(f"docs/{key}.md: 已经是这个标题 {meta['title']!r}。改那一页，或换一个标题。")
    return title


def _folded(title: str) -> str:
    return re.sub(r"\s", "", unicodedata.normalize("NFKC", title)).casefold()


def _filled(template: str, title: str, values: dict[str, str]) -> str:
    text = (TEMPLATES / template).read_text(encoding="utf-8")
    for name, value in values.items():
        text = text.replace(f"__{name}__", value)
    # front matter 里的标题要合 YAML：必要时加引号
    scalar = yaml.safe_dump({"title": title}, allow_unicode=True, width=10**6).rstrip("\n")
    return text.replace("title: __TITLE__", scalar, 1).replace("__TITLE__", title)


def _inserted(root: Path, name: str, row: str, line: str) -> str:
    """在最后一个匹配 `row` 的地方后面插入 `line`；别的一字不改，注释与写法都留着。"""
    text = (root / name).read_text(encoding="utf-8")
    matches = list(re.finditer(row, text, re.M))
    if not matches:
        raise KbsiteError(f"{name}: 找不到列出这一节的地方（{row}）。照别的节先写上一行。")
    end = matches[-1].end()
    return text[:end] + matches[-1].expand(line) + text[end:]


def _write_all(contents: dict[Path, str]) -> None:
    before = {path: path.read_text(encoding="utf-8") if path.exists() else None for path in contents}
    try:
        for path, text in contents.items():
            write_atomically(path, text)
    except BaseException:
        for path, text in before.items():
            if text is None:
                path.unlink(missing_ok=True)
            else:
                write_atomically(path, text)
        raise
