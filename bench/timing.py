"""MkDocs 钩子：给构建的各部分计时，结束时写到环境变量 KB_TIMING 指的 JSON 文件。

只在基准里用；给被测函数套一层计时，不改它们。
"""

import functools
import json
import os
import sys
import time
import types
from collections import defaultdict

STARTED = time.perf_counter()
SECONDS: dict[str, float] = defaultdict(float)


def _timed(owner, name, part):
    inner = getattr(owner, name)

    @functools.wraps(inner)
    def wrapper(*args, **kwargs):
        began = time.perf_counter()
        try:
            return inner(*args, **kwargs)
        finally:
            SECONDS[part] += time.perf_counter() - began

    setattr(owner, name, wrapper)


def on_config(config):
    """装上计时。插件的方法早已登记成绑定方法，只能换登记表里的那一份。"""
    from mkdocs.structure.pages import Page

    _timed(Page, "render", "markdown")
    for event in ("page_context", "post_build"):
        methods = config.plugins.events[event]
        for i, method in enumerate(methods):
            if type(getattr(method, "__self__", None)).__name__ == "SearchPlugin":
                holder = types.SimpleNamespace(call=method)
                _timed(holder, "call", "search")
                methods[i] = holder.call
    if "kbsite.math.mathjax" in sys.modules:
        for name in ("__init__", "typeset", "stylesheet", "fonts", "save"):
            _timed(sys.modules["kbsite.math.mathjax"].MathJax, name, "math")
        for module in list(sys.modules.values()):
            if str(getattr(module, "__file__", "")).endswith("kbsite/hooks.py"):
                _timed(module, "build_notebooks", "notebooks")


def on_post_build(config):
    """写出各部分的秒数与总数。"""
    SECONDS["total"] = time.perf_counter() - STARTED
    with open(os.environ["KB_TIMING"], "w", encoding="utf-8") as file:
        json.dump(SECONDS, file)
