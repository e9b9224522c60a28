"""执行笔记：只执行缓存里没有的，几份同时跑，出错时说清是哪份、哪个单元、哪一行。"""

import asyncio
import logging
import os
import re
import shutil
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

from ..errors import KbsiteError, NotebookRunError
from . import cache
from .key import KERNEL, cache_key
from .source import Cell, Notebook

log = logging.getLogger("mkdocs.plugins.kbsite")

ANSI = re.compile(r"\x1b\[[0-9;]*m")
TRACEBACK_LINES = 12
# 用本环境的 Python 起内核，不理会用户自己装的同名内核
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"


@dataclass(frozen=True)
class Executed:
    """一份执行过的笔记：`outputs[i]` 是第 i 个代码单元的 nbformat 输出。"""

    notebook: Notebook
    outputs: tuple[list, ...]

    def outputs_of(self, cell: Cell) -> list:
        return self.outputs[self.notebook.code_cells.index(cell)]


def execute_all(notebooks: list[Notebook], root: Path, cache_dir: Path, *, jobs: int | None = None) -> list[Executed]:  # fmt: skip
    """执行全部笔记；缓存命中的直接取出。任一失败时先让别的跑完，再一次报出所有失败。"""
    keys = {notebook.key: cache_key(notebook, root) for notebook in notebooks}
    results: dict[str, list] = {}
    stale: list[Notebook] = []
    for notebook in notebooks:
        outputs = cache.load(cache_dir / notebook.key, keys[notebook.key], len(notebook.code_cells))
        if outputs is None:
            stale.append(notebook)
        else:
            results[notebook.key] = outputs
    if stale:
        results |= asyncio.run(_execute_stale(stale, keys, root, cache_dir, jobs or os.cpu_count() or 1))
    return [Executed(notebook, tuple(results[notebook.key])) for notebook in notebooks]


async def _execute_stale(
    stale: list[Notebook], keys: dict[str, str], root: Path, cache_dir: Path, jobs: int
) -> dict[str, list]:
    slots = asyncio.Semaphore(jobs)
    done = 0
    started = time.monotonic()
    log.info("执行笔记：%d 份要跑，%d 份同时。", len(stale), min(jobs, len(stale)))

    async def one(notebook: Notebook) -> list:
        nonlocal done
        async with slots:
            began = time.monotonic()
            outputs = await _execute(notebook, root, cache_dir)
            cache.store(cache_dir / notebook.key, keys[notebook.key], outputs)
            done += 1
            log.info("  [%d/%d] %s  %.1f s", done, len(stale), notebook.key, time.monotonic() - began)
            return outputs

    results = await asyncio.gather(*(one(notebook) for notebook in stale), return_exceptions=True)
    failures = [result for result in results if isinstance(result, BaseException)]
    for failure in failures:
        if not isinstance(failure, KbsiteError):
            raise failure
    if failures:
        raise NotebookRunError("\n\n".join(str(failure) for failure in failures))
    log.info("执行笔记：%d 份，%.1f s。", len(stale), time.monotonic() - started)
    return {notebook.key: outputs for notebook, outputs in zip(stale, results, strict=True)}


async def _execute(notebook: Notebook, root: Path, cache_dir: Path) -> list:
    """在一个新内核、一个临时文件夹里从头执行一份笔记。"""
    node = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell(cell.source, id=f"cell-{i}") for i, cell in enumerate(notebook.code_cells)]
    )  # fmt: skip
    began = time.monotonic()
    scratch = Path(tempfile.mkdtemp(prefix="kbsite-"))
    try:
        shutil.copytree(KERNEL, scratch / ".ipython" / "profile_default")
        for file in notebook.data:
            shutil.copy(file, scratch / file.name)
        client = NotebookClient(
            node,
            kernel_name="python3",
            # 经由临时文件夹里的 Unix 套接字与内核通信：不占端口，别的用户也连不上
            config=Config(KernelManager={"transport": "ipc", "ip": str(scratch / "ipc")}),
            timeout=notebook.timeout,
            startup_timeout=120,
            resources={"metadata": {"path": str(scratch)}},
            record_timing=False,
        )
        try:
            limit = asyncio.timeout(notebook.timeout + 120)
            async with limit:
                await client.async_execute(env=_environment(root, scratch, cache_dir))
        except CellExecutionError as error:
            raise _cell_error(notebook, node, error, time.monotonic() - began) from None
        except (CellTimeoutError, TimeoutError):
            cell = _running_cell(notebook, node)
            raise NotebookRunError(
                f"{notebook.path}:{cell.line} [{_name(cell)}]: 超时，{notebook.timeout:.0f} s 没有跑完。"
                "缩小实验；确有必要时在文件头 kb: 里写 timeout。"
            ) from None
        except DeadKernelError:
            cell = _running_cell(notebook, node)
            raise NotebookRunError(
                f"{notebook.path}:{cell.line} [{_name(cell)}]: 内核死亡（多半是内存不足或崩溃在 C 代码里）。"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [[_plain(output) for output in cell.outputs] for cell in node.cells]


def _environment(root: Path, scratch: Path, cache_dir: Path) -> dict[str, str]:
    """内核的环境变量：不带外面的 Python 设置，单线程，固定散列种子。"""
    matplotlib_cache = cache_dir / ".matplotlib"
    matplotlib_cache.mkdir(parents=True, exist_ok=True)
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "HOME": str(scratch),
        "TMPDIR": str(scratch),
        "IPYTHONDIR": str(scratch / ".ipython"),
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MATPLOTLIBRC": str(KERNEL / "matplotlibrc"),
        "MPLCONFIGDIR": str(matplotlib_cache),
        "SOURCE_DATE_EPOCH": "0",
        "KBSITE_WRITABLE": os.pathsep.join([str(scratch), str(matplotlib_cache)]),
    }


def _name(cell: Cell) -> str:
    return cell.label or "无标签"


def _running_cell(notebook: Notebook, node: nbformat.NotebookNode) -> Cell:
    """最后一个开始执行的单元。"""
    counts = [cell.execution_count or 0 for cell in node.cells]
    return notebook.code_cells[min(counts.index(max(counts)) + (max(counts) > 0), len(counts) - 1)]


def _cell_error(notebook: Notebook, node: nbformat.NotebookNode, error: CellExecutionError, seconds: float) -> NotebookRunError:  # fmt: skip
    index = next(
        i for i, cell in enumerate(node.cells) if any(o.output_type == "error" for o in cell.outputs)
    )
    cell = notebook.code_cells[index]
    trace = ANSI.sub(
        "", "\n".join(next(o for o in node.cells[index].outputs if o.output_type == "error").traceback)
    )
    inside = re.findall(r"^-+> (\d+)|Cell In\[\d+\], line (\d+)", trace, flags=re.M)
    offset = int(next((a or b for a, b in inside if a or b), "1"))
    tail = "\n".join("    " + row for row in trace.splitlines()[-TRACEBACK_LINES:])
    return NotebookRunError(
        f"{notebook.path}:{cell.line + offset - 1} [{_name(cell)}]: {error.ename}: {error.evalue}"
        f"（{seconds:.1f} s 后）。回溯的最后几行：\n{tail}"
    )


def _plain(output: nbformat.NotebookNode) -> dict:
    """去掉每次执行都可能不同、对读者又没有用的字段。"""
    plain = {name: value for name, value in output.items() if name != "execution_count"}
    if output.output_type == "execute_result":
        plain["output_type"] = "display_data"
    return plain
