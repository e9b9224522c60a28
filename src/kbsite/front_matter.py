"""页面开头的 front matter。MkDocs 读不懂时不报错：丢下元数据，或者把第一段正文当成元数据吞掉；所以自己先读一遍。"""

import re

import yaml

from .errors import KbsiteError

# 与 mkdocs.utils.meta 的相同：两边认得的才一样
PATTERN = re.compile(r"-{3}[ \t]*\n(.*?\n)(?:\.{3}|-{3})[ \t]*\n", re.S)
# 没有 `---` 时，MkDocs 把这样的第一行当作元数据
BARE = re.compile(r" {0,3}[A-Za-z0-9_-]+:")
TYPES = {
    "title": (str, "一句话"),
    "description": (str, "一句话"),
    "answer": (str, "一句话"),
    "difficulty": (int, "一个整数"),
    "tags": (list, "一个列表"),
    "search": (dict, "几个键"),
}


def read(source: str, path: str) -> dict:
    """页面的元数据；没有就是空的，写得不对就报错。`source` 是整个文件，`path` 只用在消息里。"""
    match = PATTERN.match(source)
    if not match:
        if source.startswith("---"):
            raise KbsiteError(f"{path}:1: front matter 没有结束。在正文之前补上单独一行 `---`。")
        if BARE.match(source):
            raise KbsiteError(
                f"{path}:1: 第一行像元数据，会从页面上消失。前面空一行，或写成两行 `---` 之间的 front matter。"
            )
        return {}
    try:
        meta = yaml.safe_load(match[1])
    except RecursionError:
        raise KbsiteError(f"{path}:1: front matter 的括号套得太深。删去多余的。") from None
    except (yaml.YAMLError, ValueError) as error:  # ValueError：2026-02-30 这样的日期
        mark = getattr(error, "problem_mark", None)
        line = mark.line + 2 if mark else 1
        problem = getattr(error, "problem", None) or str(error).partition("\n")[0]
        raise KbsiteError(
            f"{path}:{line}: front matter 不是合法的 YAML：{problem}。含冒号或反斜杠的值用单引号括起来。"
        ) from None
    if not isinstance(meta, dict):
        raise KbsiteError(f"{path}:1: front matter 不是「键: 值」。冒号后面空一格。")
    for name, (kind, wanted) in TYPES.items():
        if name in meta and not isinstance(meta[name], kind):
            raise KbsiteError(
                f"{path}:1: front matter 的 {name} 是 {meta[name]!r:.60}，应当是{wanted}。改正，或加上引号。"
            )
    if not all(isinstance(tag, str) for tag in meta.get("tags", [])):
        raise KbsiteError(
            f"{path}:1: front matter 的 tags 里有不是文字的 {meta['tags']!r:.60}。给它加上引号。"
        )
    return meta
