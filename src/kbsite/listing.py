"""嵌入页面的参考实现：文档串只留第一句。

页面已经讲过公式与陷阱，完整的文档串在 API 页；手机上长文档串要横向滚动。代码本身一字不改。
写到片段文件夹的 `snippets/` 下，`--8<-- "snippets/…"` 先在那里找到它。
"""

import ast
from pathlib import Path

from .notebooks.cache import write_if_changed


def write_listings(snippets: Path, folder: Path) -> None:
    """为每个参考实现写一份嵌入用的副本，删去多余的。"""
    wanted = {folder / path.relative_to(snippets): path for path in snippets.rglob("*.py")}
    for path in folder.rglob("*.py") if folder.exists() else ():
        if path not in wanted:
            path.unlink()
    for target, source in wanted.items():
        write_if_changed(target, shorten_docstrings(source.read_text(encoding="utf-8")))


def shorten_docstrings(source: str) -> str:
    """函数与类的多行文档串换成它的第一行；别的行原样保留。"""
    try:
        tree = ast.parse(source)
    except SyntaxError:  # 语法错误由导入它的笔记或测试报出
        return source
    lines = [f"{row}\n" for row in source.split("\n")]  # splitlines 在换页符处也断开，行号就不对了
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.ClassDef) or ast.get_docstring(node) is None:
            continue
        statement = node.body[0]
        first, last = statement.lineno - 1, statement.end_lineno - 1
        if last == first:
            continue
        opening = lines[first].rstrip("\n")
        quotes = '"""' if '"""' in opening else "'''"
        lines[first] = f"{opening.rstrip()}{quotes}\n"
        # 换掉的行留空串，别的结点的行号不变
        lines[first + 1 : last + 1] = [""] * (last - first)
        if len(node.body) > 1 and last + 1 < len(lines) and not lines[last + 1].strip():
            lines[last + 1] = ""
    text = "".join(lines).removesuffix("\n")
    # 少见的写法（引号结尾、一行两句）缩不好，就原样留着
    return text if _same_code(text, tree) else source


def _same_code(text: str, tree: ast.Module) -> bool:
    """除了文档串，与 `tree` 是同样的代码。"""
    try:
        shortened = ast.parse(text)
    except SyntaxError:
        return False
    for root in (tree, shortened):
        for node in ast.walk(root):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node) is not None:
                node.body = node.body[1:]
    return ast.dump(tree) == ast.dump(shortened)
