"""bench/mutation.py 放进临时项目的 tests/conftest.py：让 mutmut 看得到我们的测试。"""

import inspect
import os
import sys

import jaxtyping
import pytest
from mutmut.state import state

# mutmut 在一个进程里跑几遍 pytest，jaxtyping 的命令行开关第二遍就报错：改为只装一次钩子，形状检查照旧
jaxtyping.install_import_hook("snippets", "beartype.beartype")

children = []  # 这条测试起过的子进程
sys.addaudithook(
    lambda event, _: children.append(event) if event in ("os.fork", "subprocess.Popen") else None
)


def pytest_collection_modifyitems(items):
    """快的先跑，抓住就停；共用的 fixture 往往最慢，放在最后。

    每处改动在 fork 出来的进程里试，多线程的算子在那里会死锁：用几个线程的测试不跑。
    """
    items[:] = [item for item in items if "set_num_threads" not in inspect.getsource(item.function)]
    items.sort(key=lambda item: (_shares_a_fixture(item), state().duration_by_test[item.nodeid]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_teardown(item):
    """mutmut 只为一处改动跑「调用过这个函数」的测试；在子进程、共用的 fixture 或导入时调用的，它看不到。

    起过子进程、用了共用的 fixture、或一次调用都没有记到的测试，算作用到了模块的全部函数。
    """
    if os.environ.get("MUTANT_UNDER_TEST") == "stats":
        if children or not state()._stats or _shares_a_fixture(item):
            state()._stats.update(_mutated_functions())
        children.clear()


def pytest_runtest_makereport(item, call):
    """mutmut 只计测试本身的时间；时限要连 fixture 的一起算。"""
    if os.environ.get("MUTANT_UNDER_TEST") == "stats" and call.when == "setup":
        state().duration_by_test[item.nodeid] += call.duration


def _shares_a_fixture(item):
    fixtures = [fixture for found in item._fixtureinfo.name2fixturedefs.values() for fixture in found]
    return any(fixture.scope != "function" and fixture.baseid for fixture in fixtures)  # 插件的没有 baseid


def _mutated_functions():
    for module in [module for name, module in sys.modules.items() if name.startswith("snippets.")]:
        classes = [value for value in vars(module).values() if isinstance(value, type)]
        for name in {name for scope in (module, *classes) for name in vars(scope)}:
            if name.endswith("__mutmut_orig"):
                yield f"{module.__name__}.{name.removesuffix('__mutmut_orig')}"
