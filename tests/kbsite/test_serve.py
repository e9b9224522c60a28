"""`mkdocs serve`：改一页、改一份参考实现，几秒后看到的就是新的，公式都排好了。"""

import contextlib
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(project):
    port = free_port()
    process = subprocess.Popen(
        [sys.executable, "-m", "mkdocs", "serve", "--dev-addr", f"127.0.0.1:{port}"],
        cwd=project.root,
        env=project.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield f"http://127.0.0.1:{port}/"
    finally:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url, text, seconds=60):
    """反复取这一页，直到出现 `text`；返回页面。"""
    html = ""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5) as response:
            html = response.read().decode()
            if text in html:
                return html
        time.sleep(0.2)
    raise AssertionError(f"{seconds} s 内没有看到 {text!r}；最后的页面：{html[-500:]}")


def test_edits_to_page_and_snippet_show_up_typeset(project):
    project.write("snippets/value.py", "X = 'before'\n")
    project.notebook(
        "rl/demo", "# %%\n#| label: result\n#| echo: hide\nfrom snippets.value import X\nprint(X)\n"
    )
    page = project.write("docs/rl/demo.md", '# 演示\n\n公式 $a_1$。\n\n--8<-- "rl/demo/result.md"\n')
    project.nav("index.md", "rl/demo.md")
    with serving(project) as url:
        assert 'data-tex="a_1"' in wait_for(f"{url}rl/demo/", "before")
        page.write_text(page.read_text(encoding="utf-8").replace("$a_1$", "$b_2$ 与 $c_3$"), encoding="utf-8")
        html = wait_for(f"{url}rl/demo/", 'data-tex="c_3"')
        assert 'data-tex="b_2"' in html and not re.search(r"arithmatex|\\\(", html)
        project.write("snippets/value.py", "X = 'after'\n")
        wait_for(f"{url}rl/demo/", "after")
