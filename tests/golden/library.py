"""make_*.py 共用：从库的源文件里取出几个定义单独执行，以及求数值与梯度。

只要那几个源文件，不导入整个库，也就不需要它的依赖。
"""

import __future__

import ast
from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path

import torch


def installed(package: str, path: str) -> Path:
    """已安装的 package 里的源文件 path。"""
    return Path(distribution(package).locate_file(path))


def names_of(node: ast.AST) -> set[str]:
    """一个定义或赋值绑定的名字。"""
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        return {node.name}
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return {target.id for target in targets if isinstance(target, ast.Name)}


def functions_of(source: Path, names: set[str], **namespace) -> dict:
    """只执行源文件里 names 这几个函数、类、方法与模块级常量，去掉装饰器，类型标注不求值。

    定义里用到的其他名字由 namespace 给出，torch 不必给。
    """
    tree = ast.parse(source.read_text(encoding="utf-8"))
    definitions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    constants = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    body = [node for node in constants + definitions if names & names_of(node)]
    if missing := names.difference(*map(names_of, body)):
        raise SystemExit(f"{source} 里没有 {sorted(missing)}，换成脚本开头写的版本再跑。")
    for node in body:
        if node in definitions:
            node.decorator_list = []
    module = ast.Module(body, type_ignores=[])
    namespace = {"torch": torch, **namespace}
    exec(compile(module, str(source), "exec", flags=__future__.annotations.compiler_flag), namespace)
    return {name: namespace[name] for name in names}


def value_and_grad(function: Callable, variable: torch.Tensor) -> dict:
    """function 在 variable 处的值，以及各元素之和对 variable 的梯度。"""
    leaf = variable.clone().requires_grad_()
    value = function(leaf)
    (grad,) = torch.autograd.grad(value.sum(), leaf)
    return {"value": value.tolist(), "grad": grad.tolist()}
