"""几个测试文件共用的：一个什么都有的小站，它的字节，它的公式，`mkdocs serve`。"""

import contextlib
import hashlib
import html as html_module
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request

NOTEBOOK = r"""
# %% [markdown]
# # 演示：实验
#
# 行内 $a_1$ 与独立公式 $$\frac{1}{2}$$
#
# ## 中文小节

# %%
#| label: setup
import matplotlib.pyplot as plt
from IPython.display import Markdown

# %%
#| label: figure
#| caption: 一条直线
fig, ax = plt.subplots()
ax.plot([0, 1], [0, 1])
ax.set_xlabel("步数（步）");

# %%
#| label: table
#| caption: 一张表
Markdown("| $\\rho$ | 值 |\n| --- | --- |\n| 甲 | 1 |")
"""

PAGE = r"""
---
title: 演示（Demo）
description: 演示
answer: 回答含 $a^2$。
---

# 演示（Demo）

!!! abstract "一句话回答"
    {{ answer }}

## 各处的公式

行内 $x_1$，代码 `$not_math$`，脚注[^1]。

$$
\begin{aligned}
y &= \text{中文}\\
z &< 1
\end{aligned}
$$

| 表头 $\lvert t\rvert$ | 值 |
| --- | --- |
| $\beta$ | 1 |

--8<-- "rl/demo/figure.md"

??? question "追问 $k_3$？"
    答 $r-1-\log r$。

    --8<-- "rl/demo/table.md"

    $$
    w = 1
    $$

```python
cost = "$not_math_either$"
```

[^1]: 注 $f$。
"""


def demo(project):
    project.notebook("rl/demo", NOTEBOOK)
    project.write("docs/rl/demo.md", PAGE)
    project.write("topics.yml", '- heading: "Demo 的笔记标题（错别子）"\n  topics: [rl/demo]\n')
    project.nav("index.md", "rl/demo.md")
    return project


def digest(folder):
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def tex_of(html):
    return [html_module.unescape(tex) for tex in re.findall(r'<mjx-container data-tex="([^"]*)"', html)]


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
