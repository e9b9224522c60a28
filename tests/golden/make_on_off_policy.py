"""跑一次 verl 的重要性权重，把输入、输出与版本写进 on_off_policy.json。

verl 不能与本项目的 transformers 装在一起，所以只要它的源文件在环境里，不要它的依赖：

    pip install --no-deps verl==0.9.1
    python tests/golden/make_on_off_policy.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from library import functions_of, installed

# 三条回答，第二条只有 3 个 token，第三条中间夹着工具返回（不是策略生成的）
LOG_PROBS = [[-0.5, -1.0, -2.0, -0.3], [-1.5, -0.7, -0.2, -9.0], [-3.0, -8.0, -0.4, -1.1]]
ROLLOUT_LOG_PROBS = [[-0.6, -1.4, -1.9, -0.9], [-1.2, -0.9, -0.8, -1.0], [-2.1, -1.0, -0.6, -1.0]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1]]
THRESHOLDS = {"untouched": 1e9, "truncated": 1.6, "masked": "0.42_1.7"}


def main() -> None:
    masked = functions_of(installed("verl", "verl/utils/torch_functional.py"), {"masked_sum", "masked_mean"})
    verl = functions_of(
        installed("verl", "verl/trainer/ppo/rollout_corr_helper.py"),
        {
            "SAFETY_BOUND",
            "_parse_rollout_is_threshold",
            "compute_is_metrics",
            "compute_rollout_correction_weights",
        },
        math=math,
        verl_F=SimpleNamespace(**masked),
    )
    log_ratio = torch.tensor(LOG_PROBS, dtype=torch.float64) - torch.tensor(
        ROLLOUT_LOG_PROBS, dtype=torch.float64
    )
    mask = torch.tensor(MASK, dtype=torch.float64)
    result = {
        "versions": {name: version(name) for name in ("verl", "torch")},
        "log_probs": LOG_PROBS,
        "rollout_log_probs": ROLLOUT_LOG_PROBS,
        "mask": MASK,
        "weights": {},
        "eff_sample_size": {},
    }
    for level in ("token", "sequence"):
        for name, threshold in THRESHOLDS.items():
            weights, metrics = verl["compute_rollout_correction_weights"](
                log_ratio, mask, rollout_is=level, rollout_is_threshold=threshold
            )
            result["weights"][f"{level}/{name}"] = weights.tolist()
            result["eff_sample_size"][f"{level}/{name}"] = metrics["rollout_is_eff_sample_size"]
    path = Path(__file__).with_name("on_off_policy.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
