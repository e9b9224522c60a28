"""写出执行过的 .ipynb：mkdocs-jupyter 拿它做成笔记页，读者也能下载。"""

from pathlib import Path

import nbformat

from .cache import write_if_changed
from .run import Executed
from .svg import inline_svg

METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"name": "python"},
}


def write_ipynb(executed: list[Executed], folder: Path) -> dict[str, Path]:
    """每份笔记写一个 `<folder>/<key>.ipynb`，删去多余的；返回 {key: 路径}。"""
    paths = {result.notebook.key: folder / f"{result.notebook.key}.ipynb" for result in executed}
    for path in folder.rglob("*.ipynb") if folder.exists() else ():
        if path not in paths.values():
            path.unlink()
    for result in executed:
        write_if_changed(paths[result.notebook.key], nbformat.writes(_node(result), version=4) + "\n")
    return paths


def _themed(output: dict, prefix: str, place: str, caption: str) -> dict:
    """图随主题变色，同一页的 id 不冲突，有替代文字（与片段里的图同样处理）。"""
    svg = output.get("data", {}).get("image/svg+xml")
    if svg is None:
        return output
    svg = inline_svg("".join(svg), prefix, place, caption)
    return output | {"data": output["data"] | {"image/svg+xml": svg}}


def _node(result: Executed) -> nbformat.NotebookNode:
    cells = []
    count = 0
    for index, cell in enumerate(result.notebook.cells):
        name = cell.label or f"cell-{index}"
        if cell.kind != "code":
            cells.append(nbformat.v4.new_markdown_cell(cell.source, id=f"cell-{index}"))
            continue
        count += 1
        place = f"{result.notebook.path}:{cell.line}"
        prefix = f"{result.notebook.key}-{name}".replace("/", "-")
        outputs = [
            nbformat.from_dict(_themed(output, f"{prefix}-{i}", place, cell.caption))
            for i, output in enumerate(result.outputs_of(cell))
        ]
        cells.append(nbformat.v4.new_code_cell(cell.source, id=name, outputs=outputs, execution_count=count))
    return nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
