"""跑一次 verl 与 OpenRLHF 的 KL 函数，把输入、输出、梯度与版本写进 kl_estimators.json。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_kl_estimators.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from library import functions_of, installed, value_and_grad

# log r = ref - cur 依次为 0.3、-0.4、0、1.5、3（k3 > 10）、-12（|k1| > 10）、25（超过 ±20）
LOG_PROBS = [-0.9, -0.5, -2.0, -3.5, -5.0, -1.0, -30.0]
REF_LOG_PROBS = [-0.6, -0.9, -2.0, -2.0, -2.0, -13.0, -5.0]
OLD_LOG_PROBS = [-1.0, -0.7, -1.8, -3.5, -4.8, -1.1, -29.5]


def main() -> None:
    verl = functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"), {"kl_penalty", "kl_penalty_forward"}
    )
    openrlhf = functions_of(
        installed("openrlhf", "openrlhf/models/utils.py"), {"compute_approx_kl", "KL_IS_WEIGHT_CLIP"}
    )
    log_probs, ref, old = (
        torch.tensor(row, dtype=torch.float64) for row in (LOG_PROBS, REF_LOG_PROBS, OLD_LOG_PROBS)
    )
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "log_probs": LOG_PROBS,
        "ref_log_probs": REF_LOG_PROBS,
        "old_log_probs": OLD_LOG_PROBS,
        "verl": {
            kind: value_and_grad(lambda x, kind=kind: verl["kl_penalty"](x, ref, kind), log_probs)
            for kind in ("k1", "k2", "k3", "low_var_kl", "k3+")
        },
        "openrlhf": {
            kind: value_and_grad(
                lambda x, kind=kind: openrlhf["compute_approx_kl"](x, ref, None, kind), log_probs
            )
            for kind in ("k1", "k2", "k3")
        },
        "openrlhf_unbiased": value_and_grad(
            lambda x: openrlhf["compute_approx_kl"](x, ref, old, "k3", unbiased_gradient=True), log_probs
        ),
    }
    path = Path(__file__).with_name("kl_estimators.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
