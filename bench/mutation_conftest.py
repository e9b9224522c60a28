"""bench/mutation.py 放进临时项目的 tests/conftest.py：让 mutmut 看得到我们的测试。"""

import os
import sys

import jaxtyping
import pytest
from mutmut.state import state

# mutmut 在一个进程里跑几遍 pytest，jaxtyping 的命令行开关第二遍就报错：改为只装一次钩子，形状检查照旧
jaxtyping.install_import_hook("snippets", "beartype.beartype")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown():
    """mutmut 只为一处改动跑「调用过这个函数」的测试；在子进程或共用的 fixture 里调用的，它看不到。

    一次调用都没有记到的测试，算作用到了模块的全部函数。
    """
    if os.environ.get("MUTANT_UNDER_TEST") == "stats" and not state()._stats:
        state()._stats.update(_mutated_functions())


def _mutated_functions():
    for module in [module for name, module in sys.modules.items() if name.startswith("snippets.")]:
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        for name in {name for scope in (module, *classes) for name in vars(scope)}:
            if name.endswith("__mutmut_orig"):
                yield f"{module.__name__}.{name.removesuffix('__mutmut_orig')}"
