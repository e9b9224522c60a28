"""跑一次 verl 与 OpenRLHF 的 KL 函数，把输入、输出、梯度与版本写进 kl_estimators.json。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_kl_estimators.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import ast
import json
from importlib.metadata import distribution, version
from pathlib import Path
from typing import Optional

import torch

# log r = ref - cur 依次为 0.3、-0.4、0、1.5、3（k3 > 10）、-12（|k1| > 10）、25（超过 ±20）
LOG_PROBS = [-0.9, -0.5, -2.0, -3.5, -5.0, -1.0, -30.0]
REF_LOG_PROBS = [-0.6, -0.9, -2.0, -2.0, -2.0, -13.0, -5.0]
OLD_LOG_PROBS = [-1.0, -0.7, -1.8, -3.5, -4.8, -1.1, -29.5]


def functions_of(package: str, path: str, names: set[str]) -> dict:
    """从已安装的 package 的源文件 path 里只执行 names 里的函数与常量。"""
    source = Path(distribution(package).locate_file(path)).read_text()
    body = []
    for node in ast.parse(source).body:
        targets = [node.name] if isinstance(node, ast.FunctionDef) else []
        if isinstance(node, ast.Assign):
            targets = [target.id for target in node.targets if isinstance(target, ast.Name)]
        if names & set(targets):
            body.append(node)
    namespace = {"torch": torch, "Optional": Optional}
    exec(compile(ast.Module(body, type_ignores=[]), path, "exec"), namespace)
    missing = names - namespace.keys()
    if missing:
        raise SystemExit(
            f"{package} {version(package)} 的 {path} 里没有 {sorted(missing)}，换成锁定的版本再跑。"
        )
    return namespace


def value_and_grad(function) -> dict:
    log_probs = torch.tensor(LOG_PROBS, dtype=torch.float64, requires_grad=True)
    value = function(log_probs, torch.tensor(REF_LOG_PROBS, dtype=torch.float64))
    (grad,) = torch.autograd.grad(value.sum(), log_probs)
    return {"value": value.tolist(), "grad": grad.tolist()}


def main() -> None:
    verl = functions_of("verl", "verl/trainer/ppo/core_algos.py", {"kl_penalty", "kl_penalty_forward"})
    openrlhf = functions_of(
        "openrlhf", "openrlhf/models/utils.py", {"compute_approx_kl", "KL_IS_WEIGHT_CLIP"}
    )
    old = torch.tensor(OLD_LOG_PROBS, dtype=torch.float64)
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "log_probs": LOG_PROBS,
        "ref_log_probs": REF_LOG_PROBS,
        "old_log_probs": OLD_LOG_PROBS,
        "verl": {
            kind: value_and_grad(lambda lp, ref, kind=kind: verl["kl_penalty"](lp, ref, kind))
            for kind in ("k1", "k2", "k3", "low_var_kl", "k3+")
        },
        "openrlhf": {
            kind: value_and_grad(
                lambda lp, ref, kind=kind: openrlhf["compute_approx_kl"](lp, ref, None, kind)
            )
            for kind in ("k1", "k2", "k3")
        },
        "openrlhf_unbiased": value_and_grad(
            lambda lp, ref: openrlhf["compute_approx_kl"](lp, ref, old, "k3", unbiased_gradient=True)
        ),
    }
    path = Path(__file__).with_name("kl_estimators.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
