"""一份怀有敌意的笔记：每种越界要么被拦下，要么写在 docs/about/build.md 的「没有防住」里。

拦的是操作系统，不是 Python：每个动作都由子进程或 ctypes 再做一遍。本机内核没有 Landlock（macOS、旧 Linux）时，
那几条断言反过来：真的没有防住，日志里也说了。
"""

import os
import socket
import sys
import time
from dataclasses import replace

import psutil
import pytest

from kbsite.errors import NotebookRunError
from kbsite.notebooks import run as run_module
from kbsite.notebooks import sandbox
from kbsite.notebooks.run import execute_all
from kbsite.notebooks.source import read_all

VERSION = sandbox.landlock_version()
HEADER = "# ---\n# jupyter:\n#   kb:\n#     {}\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n\n"  # fmt: skip


def run(project, code, header=None):
    """执行一份只有一个单元的笔记；返回它打印的文字。"""
    given = {} if header is None else {"header": HEADER.format(header)}
    project.notebook("rl/hostile", f"# %%\n#| label: attack\n{code}", **given)
    (result,) = execute_all(
        read_all(project.root / "notebooks"), project.root, project.root / ".cache/notebooks"
    )
    return "".join(output.get("text", "") for output in result.outputs[0])


def test_child_processes_and_c_code_cannot_write_outside(project, tmp_path_factory):
    outside = tmp_path_factory.mktemp("outside")
    victim = outside / "victim"
    victim.write_text("原样")
    run(
        project,
        f"""\
import ctypes, os, subprocess
os.chdir("/")
for command in ("echo x > {outside}/shell", "rm {victim}", "mv {victim} {outside}/moved", "ln {victim} {outside}/link"):
    subprocess.run(["sh", "-c", command], stderr=subprocess.DEVNULL)
libc = ctypes.CDLL(None)
libc.open(b"{outside}/c", os.O_WRONLY | os.O_CREAT, 0o644)
libc.truncate(b"{victim}", ctypes.c_long(0))
libc.unlink(b"{victim}");
""",
    )
    untouched = [path.name for path in outside.iterdir()] == ["victim"] and victim.read_text() == "原样"
    assert untouched == (VERSION >= 3)  # 2 起能拦改名到别处，3 起能拦截断


def test_secrets_of_the_parent_and_files_of_the_user_cannot_be_read(project, tmp_path_factory, monkeypatch):
    """变量没有传给内核；父进程的 environ、内存与用户目录里的文件也读不到。"""
    home = tmp_path_factory.mktemp("home")
    (home / ".ssh").mkdir(parents=True)
    (home / ".ssh/id").write_text("hunter2")
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    text = run(
        project,
        f"""\
import os
print(os.environ.get("SECRET_TOKEN"))
for path in ("{home}/.ssh/id", "/proc/{os.getpid()}/environ", "/proc/{os.getpid()}/mem"):
    try:
        open(path, "rb").read(1)
        print("读到了")
    except OSError as error:
        print(type(error).__name__)
""",
    )
    assert text.splitlines()[0] == "None"
    assert ("读到了" not in text) == bool(VERSION)


if sys.platform == "linux":

    def test_sudo_cannot_raise_privileges(project):
        """置上这一位，文件上的 setuid 就不起作用。"""
        assert "NoNewPrivs:\t1" in run(project, "print(open('/proc/self/status').read())")


@pytest.mark.parametrize("declared", [False, True])
def test_tcp_is_refused_unless_declared(project, declared):
    with socket.create_server(("127.0.0.1", 0)) as server:
        code = f"""\
import socket
try:
    socket.create_connection(("127.0.0.1", {server.getsockname()[1]}), 5)
    print("连上了")
except PermissionError:
    print("拒绝")
"""
        text = run(project, code, header="tcp: true" if declared else "timeout: 60")
    assert text == ("拒绝\n" if VERSION >= 4 and not declared else "连上了\n")


def test_processes_outside_cannot_be_signalled(project):
    text = run(project, f"""\
import os
try:
    os.kill({os.getpid()}, 0)
    print("发出了")
except PermissionError:
    print("拒绝")
""")  # fmt: skip
    assert text == ("拒绝\n" if VERSION >= 6 else "发出了\n")


def limit(monkeypatch, **values):
    """换掉上限：测的是看守，不必真的用掉几个 GiB。"""
    whole = run_module._limits
    monkeypatch.setattr(run_module, "_limits", lambda *args: replace(whole(*args), **values))


def test_too_much_memory_is_stopped(project, monkeypatch):
    """单个进程都不大，合起来超过上限；不拦的话各睡一分钟。"""
    limit(monkeypatch, memory=600 << 20)
    hog = "x = b'x' * (200 << 20); import time; time.sleep(60)"
    code = f"""\
import subprocess, sys
for child in [subprocess.Popen([sys.executable, "-c", {hog!r}]) for _ in range(4)]:
    child.wait()
"""
    with pytest.raises(NotebookRunError, match=r"hostile\.py:\d+ \[attack\]: 内存超过 0\.58\d* GiB"):
        run(project, code)


def test_too_many_processes_are_stopped(project):
    """有界的 fork 炸弹：没有人拦就是 2^7 个进程，各自睡一会儿。"""
    code = "import os, time\nfor _ in range(7):\n    os.fork()\ntime.sleep(40)\n"
    began = time.monotonic()
    with pytest.raises(NotebookRunError, match=r"\[attack\]: 同时有超过 64 个进程"):
        run(project, code)
    assert time.monotonic() - began < 30


def test_a_file_has_a_size_limit(project):
    text = run(project, """\
import errno, os
file = os.open("big", os.O_RDWR | os.O_CREAT)
try:
    os.ftruncate(file, 1 << 40)
    print("写下了")
except OSError as error:
    print(errno.errorcode[error.errno])
""")  # fmt: skip
    assert text == "EFBIG\n"


@pytest.mark.parametrize("code", ["while True:\n    print('x' * 10_000)\n", "print('x' * 3_000_000)\n"])
def test_flood_of_output_is_stopped(project, monkeypatch, code):
    """不停的，在超时以前就停下；来不及停的，也不会当作成功。"""
    monkeypatch.setattr(run_module, "OUTPUT_LIMIT", 2_000_000)
    began = time.monotonic()
    with pytest.raises(NotebookRunError, match=r"\[attack\]: 输出超过 2 MB"):
        run(project, code)
    assert time.monotonic() - began < 45


DAEMON = """\
import os, subprocess, sys, time
# 两次 fork 加 setsid：不在内核的进程组里，父进程也已经不在
if os.fork() == 0:
    os.setsid()
    if os.fork() == 0:
        os.execv(sys.executable, [sys.executable, "-c", "import time; time.sleep(77)", "{mark}"])
    os._exit(0)
os.wait()
time.sleep({wait})
"""


def survivors(mark):
    return [
        process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())
    ]


@pytest.mark.parametrize("end", ["finished", "timed out"])
def test_no_process_survives_its_notebook(project, end):
    mark = f"kbsite-{os.getpid()}-{end}"
    if end == "finished":
        run(project, DAEMON.format(mark=mark, wait=0.5))
    else:
        with pytest.raises(NotebookRunError, match="超时"):
            run(project, DAEMON.format(mark=mark, wait=60), header="timeout: 3")
    assert survivors(mark) == []


def test_no_file_is_inherited(project, tmp_path):
    """父进程开着的文件不传给内核，可继承的也一样。"""
    secret = tmp_path / "secret"
    secret.write_text("hunter2")
    handle = os.open(secret, os.O_RDONLY)
    os.set_inheritable(handle, True)
    try:
        text = run(
            project, "import os\nprint([os.path.realpath(f'/dev/fd/{n}') for n in os.listdir('/dev/fd')])"
        )
    finally:
        os.close(handle)
    assert "secret" not in text


def test_the_log_says_what_the_machine_cannot_enforce(project, monkeypatch, caplog):
    monkeypatch.setattr(sandbox, "landlock_version", lambda: 0)
    with caplog.at_level("INFO", logger="mkdocs.plugins.kbsite"):
        run(project, "print(1)")
    assert "没有 Landlock" in caplog.text
