"""看住一份笔记的内核：本文件作为一个进程运行（`python -I sandbox.py <Limits 的 JSON> <内核的命令>`）。

它先在内核的进程里装上限制，再等着：内核一结束，或者用得太多，就杀掉它的全部后代。限制由操作系统执行，
笔记起的子进程、C 代码都受约束；防住与没有防住什么，见 docs/about/build.md。
"""

import contextlib
import ctypes
import json
import os
import resource
import signal
import struct
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import psutil

FILE = 1 << 30
INTERVAL = 0.25
# 退出码：看守为什么动手
TOO_MUCH_MEMORY, TOO_MANY_PROCESSES = 70, 71

DROP_CAPABILITY, SET_CHILD_SUBREAPER, SET_NO_NEW_PRIVS = 24, 36, 38
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446
READ = 0b1101  # 执行、读文件、列目录
ON_FILE = 0b100_0000_0000_0111  # 对文件（不是文件夹）有意义的权限：执行、写、读、截断


@dataclass(frozen=True)
class Limits:
    """一份笔记可以用的：用户目录（不给读）、其中仍要读的、可写的、能不能连 TCP、全部进程合计的内存与个数。"""

    home: str
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    tcp: bool
    memory: int = 4 << 30  # 现有的笔记最多用 1.1 GiB、4 个进程（training/zero）
    processes: int = 64


def landlock_version() -> int:
    """本机 Linux 的 Landlock 版本：1 起能限制文件，4 起能限制 TCP，6 起能限制信号；没有就是 0。"""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), 1))


def restrict(limits: Limits) -> None:
    """限制本进程与它以后的一切后代，不能撤销：只读、只写这些地方，不连 TCP，不给外面的进程发信号。"""
    for limit, value in ((resource.RLIMIT_FSIZE, FILE), (resource.RLIMIT_CORE, 0)):
        with contextlib.suppress(ValueError):  # 已经更低
            resource.setrlimit(limit, (value, value))
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)

    def call(function, *args):
        result = function(*args)
        if result < 0:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return result

    # sudo 一类的程序从此不能提权；本来就是 root 的（容器里），放下它的特权
    call(libc.prctl, SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    for capability in range(64):
        libc.prctl(DROP_CAPABILITY, capability, 0, 0, 0)
    version = landlock_version()
    if not version:
        return
    everything = (1 << {1: 13, 2: 14}.get(version, 15)) - 1
    # 只禁止连接：ipykernel 自己要在环回上监听一个端口
    handled = struct.pack(
        "QQQ", everything, 2 if version >= 4 and not limits.tcp else 0, 3 if version >= 6 else 0
    )
    ruleset = call(libc.syscall, CREATE_RULESET, handled, ctypes.c_size_t(len(handled)), 0)
    readable = [*all_but(Path(limits.home)), *limits.readable]
    for access, paths in ((READ, readable), (everything, [*limits.writable, os.devnull])):
        for path in paths:
            with contextlib.suppress(FileNotFoundError):
                handle = os.open(path, os.O_PATH | os.O_CLOEXEC)
                allowed = access if os.path.isdir(path) else access & ON_FILE
                call(libc.syscall, ADD_RULE, ruleset, 1, struct.pack("=Qi", allowed, handle), 0)
                os.close(handle)
    call(libc.syscall, RESTRICT_SELF, ruleset, 0)


def all_but(home: Path) -> list[Path]:
    """整个文件系统，除去 `home`：从根到它，每一级都取不通向它的那些。

    符号链接不取：它可能指进 `home`；指向别处的，别处自己已经在内。
    """
    kept = []
    for folder in home.parents:
        with contextlib.suppress(PermissionError):
            kept += [
                path
                for path in folder.iterdir()
                if path not in (home, *home.parents) and not path.is_symlink()
            ]
    return kept or [home]


def watch(command: list[str], limits: Limits) -> int:
    """启动内核并看住它；返回退出码。"""
    parent, me = os.getppid(), psutil.Process()
    if sys.platform == "linux":
        # 后代的父进程死了，就归到这里，跑不出 children() 的视野
        ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    signal.signal(signal.SIGINT, lambda *_: None)  # 是打断内核的单元用的，发给整个进程组
    # 内核靠它发现父进程死了
    environment = os.environ | {"JPY_PARENT_PID": str(os.getpid())}
    kernel = subprocess.Popen(command, env=environment, preexec_fn=lambda: restrict(limits))
    try:
        while os.getppid() == parent:
            with contextlib.suppress(subprocess.TimeoutExpired):
                return kernel.wait(INTERVAL)
            family = me.children(recursive=True)
            if len(family) > limits.processes:
                return TOO_MANY_PROCESSES
            if sum(map(_resident, family)) > limits.memory:
                return TOO_MUCH_MEMORY
        return 0
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        _kill_descendants(me)


def _resident(process: psutil.Process) -> int:
    try:
        return process.memory_info().rss
    except psutil.Error:  # 刚刚结束
        return 0


def _kill_descendants(me: psutil.Process) -> None:
    """杀到一个不剩：杀的时候它们可能还在生。"""
    while family := me.children(recursive=True):
        for process in family:
            with contextlib.suppress(psutil.Error):
                process.kill()
        with contextlib.suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        time.sleep(0.01)


if __name__ == "__main__":
    sys.exit(watch(sys.argv[2:], Limits(**json.loads(sys.argv[1]))))
