"""执行笔记：只执行缓存里没有的，几份同时跑，出错时说清是哪份、哪个单元、哪一行。"""

import asyncio
import json
import logging
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import nbformat
from jupyter_client import AsyncKernelManager
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from traitlets.config import Config

from ..errors import KbsiteError, NotebookRunError
from . import cache, sandbox
from .key import KERNEL, cache_key
from .source import Cell, Notebook

log = logging.getLogger("mkdocs.plugins.kbsite")

ANSI = re.compile(r"\x1b\[[0-9;]*m")
TRACEBACK_LINES = 12
# 一份笔记的全部输出；现有的最大一份是 0.1 MB
OUTPUT_LIMIT = 20_000_000
# 用本环境的 Python 起内核，不理会用户自己装的同名内核
os.environ["JUPYTER_PREFER_ENV_PATH"] = "1"


@dataclass(frozen=True)
class Executed:
    """一份执行过的笔记：`outputs[i]` 是第 i 个代码单元的 nbformat 输出。"""

    notebook: Notebook
    outputs: tuple[list, ...]

    def outputs_of(self, cell: Cell) -> list:
        return self.outputs[self.notebook.code_cells.index(cell)]


class _Kernel(AsyncKernelManager):
    """内核由看守进程启动。"""

    limits: sandbox.Limits

    def format_kernel_cmd(self, extra_arguments=None):
        kernel = super().format_kernel_cmd(extra_arguments)
        return [sys.executable, "-I", sandbox.__file__, json.dumps(asdict(self.limits)), *kernel]


class _Client(NotebookClient):
    """输出太多时结束内核，而不是把输出都收进内存。"""

    received = 0

    def output(self, outs, msg, display_id, cell_index):
        self.received += len(repr(msg["content"]))
        if self.received > OUTPUT_LIMIT:
            self.km.provisioner.process.terminate()
            return None
        return super().output(outs, msg, display_id, cell_index)


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
    if (version := sandbox.landlock_version()) < 6:
        log.info("  系统%s Landlock，执行时防住的比文档写的少：不要在这里执行不信任的笔记。", "没有" if not version else f"只有第 {version} 版的")  # fmt: skip

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
        # 经由临时文件夹里的 Unix 套接字与内核通信：不占端口，别的用户也连不上
        connection = {"transport": "ipc", "ip": str(scratch / "ipc"), "connection_file": str(scratch / "kernel.json")}  # fmt: skip
        # 最后的 SIGKILL 之前，留给看守足够的时间收拾
        connection["shutdown_wait_time"] = 10
        client = _Client(
            node,
            kernel_name="python3",
            kernel_manager_class=_Kernel,
            config=Config(KernelManager=connection),
            timeout=notebook.timeout,
            startup_timeout=120,
            resources={"metadata": {"path": str(scratch)}},
            record_timing=False,
        )
        manager = client.create_kernel_manager()
        limits = manager.limits = _limits(notebook, root, scratch, cache_dir)
        try:
            async with asyncio.timeout(notebook.timeout + 120):
                await client.async_execute(env=_environment(root, limits))
            if client.received > OUTPUT_LIMIT:  # 还没来得及停下，单元已经跑完
                raise DeadKernelError
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
                f"{notebook.path}:{cell.line} [{_name(cell)}]: {_cause_of_death(client, manager)}"
            ) from None
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return [_joined([_plain(output) for output in cell.outputs]) for cell in node.cells]


def _limits(notebook: Notebook, root: Path, scratch: Path, cache_dir: Path) -> sandbox.Limits:
    """能写的只有临时文件夹与 matplotlib 的字体清单；用户目录里只读项目、Python 与本工具。"""
    matplotlib_cache = cache_dir / ".matplotlib"
    matplotlib_cache.mkdir(parents=True, exist_ok=True)
    readable = (root, scratch, KERNEL, Path(sys.prefix), Path(sys.base_prefix))
    return sandbox.Limits(
        home=str(Path.home().resolve()),
        readable=tuple(str(path.resolve()) for path in readable),
        writable=(str(scratch), str(matplotlib_cache)),
        tcp=notebook.tcp,
    )


def _environment(root: Path, limits: sandbox.Limits) -> dict[str, str]:
    """内核的环境变量：不带外面的 Python 设置，单线程，固定散列种子。"""
    scratch, matplotlib_cache = limits.writable
    kept = {name: os.environ[name] for name in ("PATH", "LANG", "LC_ALL", "SYSTEMROOT") if name in os.environ}
    return kept | {
        "HOME": scratch,
        "TMPDIR": scratch,
        "IPYTHONDIR": os.path.join(scratch, ".ipython"),
        "PYTHONPATH": str(root),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PYTHONHASHSEED": "0",
        "PYTHONUTF8": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
        "MATPLOTLIBRC": str(KERNEL / "matplotlibrc"),
        "MPLCONFIGDIR": matplotlib_cache,
        "SOURCE_DATE_EPOCH": "0",
        "KBSITE_WRITABLE": os.pathsep.join(limits.writable),
    }


def _cause_of_death(client: _Client, manager: _Kernel) -> str:
    if client.received > OUTPUT_LIMIT:
        return f"输出超过 {OUTPUT_LIMIT // 10**6} MB，已经停下。先汇总再打印。"
    code = manager.provisioner.process.returncode
    if code == sandbox.TOO_MUCH_MEMORY:
        return f"内存超过 {manager.limits.memory / (1 << 30):g} GiB（连同子进程），已经停下。缩小实验。"
    if code == sandbox.TOO_MANY_PROCESSES:
        return f"同时有超过 {manager.limits.processes} 个进程，已经停下。少开几个。"
    return "内核死亡（多半是崩溃在 C 代码里）。把这个单元单独跑一次，看它在哪一行停下。"


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


def _joined(outputs: list[dict]) -> list[dict]:
    """相邻的打印合成一个：在哪里断开取决于内核几时冲缓冲，每次不同。"""
    joined: list[dict] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output["output_type"] == "stream" and output["name"] == last.get("name"):
            last["text"] += output["text"]
        else:
            joined.append(output)
    return joined
