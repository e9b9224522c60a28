"""KB501 编码与空白，KB502 文件的大小、种类、行长。"""

import re
from collections.abc import Iterator

from .findings import Edit, Finding
from .site import TEXT_FOLDERS, Site, walk

# 看不见的字符：零宽、改变文字方向的（审读时看到的与执行的可以不同）、控制字符
INVISIBLE = re.compile(
    "[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u00ad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb]"
)
TRAILING = re.compile(r"[ \t]+$", re.M)
LIMITS = {".md": 64_000, ".py": 64_000, ".png": 200_000, ".svg": 200_000, ".js": 100_000, ".css": 100_000}
OTHER_LIMIT = 100_000
LINE_LIMIT = 2000
FORBIDDEN = {".ipynb": "笔记写成 py:percent 的 .py", ".pyc": "删去，不要提交", ".pkl": "删去；数据写成文本"}


def findings(site: Site) -> Iterator[Finding]:
    for folder in TEXT_FOLDERS:
        for path in walk(site.root / folder):
            name = path.relative_to(site.root).as_posix()
            if path.is_symlink():
                yield Finding(name, 1, "KB502", "是符号链接", "放进文件本身")
                continue
            if cure := FORBIDDEN.get(path.suffix):
                yield Finding(name, 1, "KB502", f"不收 {path.suffix} 文件", cure)
            size, limit = path.stat().st_size, LIMITS.get(path.suffix, OTHER_LIMIT)
            if size > limit:
                fact = f"文件有 {size:,} 字节，上限 {limit:,}"
                yield Finding(name, 1, "KB502", fact, "拆成几个，或压缩")
    for name in site.raw:
        yield from _text(site, name)


def _text(site: Site, name: str) -> Iterator[Finding]:
    raw, text = site.raw[name], site.texts[name]
    rewrite = (Edit(0, 0, ""),)  # 写回去的总是 texts 里换行统一过的那一份
    if raw.startswith("\ufeff"):
        yield Finding(name, 1, "KB501", "文件开头有 BOM", "另存为不带 BOM 的 UTF-8", rewrite)
    if "\r\n" in raw:
        line = raw.count("\n", 0, raw.index("\r\n")) + 1
        yield Finding(name, line, "KB501", "换行是 CRLF", "换行改成 LF", rewrite)
    if text and not text.endswith("\n"):
        edits = (Edit(len(text), len(text), "\n"),)
        yield Finding(name, text.count("\n") + 1, "KB501", "文件不以换行结尾", "末尾加一个换行", edits)
    for match in INVISIBLE.finditer(text):
        line = text.count("\n", 0, match.start()) + 1
        yield Finding(name, line, "KB501", f"有看不见的字符 U+{ord(match[0]):04X}", "删去它")
    for number, row in enumerate(text.split("\n"), 1):
        if len(row) > LINE_LIMIT:
            yield Finding(
                name, number, "KB502", f"这一行有 {len(row):,} 个字符，上限 {LINE_LIMIT:,}", "分成几段"
            )
    if page := site.pages.get(name):
        for match in TRAILING.finditer(page.prose):
            # 行尾两个空格、下一行还有字，是 Markdown 的换行：删去会改变网页
            breaks = len(match[0]) > 1 and re.match(r"\n[ \t]*\S", text[match.end() :])
            edits = () if breaks else (Edit(*match.span(), ""),)
            yield Finding(name, page.line(match.start()), "KB501", "行尾有空格", "删去", edits)
