"""跑一次 verl 与 OpenRLHF 的训推不一致修正，把输入、输出与版本写进 rollout_logprobs.json。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_rollout_logprobs.py

脚本从已安装的包里取出那几个定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import json
import math
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn as nn
from library import functions_of, installed, value_and_grad

# 四条回答：第二条只有 3 个 token，第三条中间夹着工具返回，第四条整条都偏
OLD_LOG_PROBS = [
    [-0.5, -1.0, -2.0, -0.3],
    [-1.5, -0.7, -0.2, -9.0],
    [-3.0, -8.0, -0.4, -1.1],
    [-3.2, -2.4, -2.1, -1.9],
]
ROLLOUT_LOG_PROBS = [
    [-0.6, -1.4, -1.9, -0.9],
    [-1.2, -0.9, -0.8, -1.0],
    [-2.1, -1.0, -0.6, -1.0],
    [-2.0, -1.2, -1.5, -1.8],
]
LOG_PROBS = [
    [-0.4, -1.3, -1.9, -0.3],
    [-1.2, -0.8, -0.3, -9.0],
    [-3.4, -8.0, -0.5, -0.8],
    [-3.1, -2.6, -2.0, -1.5],
]
ADVANTAGES = [[1.0], [-0.7], [0.4], [-1.2]]
MASK = [[1, 1, 1, 1], [1, 1, 1, 0], [1, 0, 1, 1], [1, 1, 1, 1]]
IS_CASES = {  # 粒度，阈值：单个数是截断，"下_上" 是掩码
    "token/truncate": ("token", 1.6),
    "sequence/truncate": ("sequence", 1.6),
    "token/mask": ("token", "0.42_1.7"),
    "sequence/mask": ("sequence", "0.3_2.0"),
}


def main() -> None:
    masked = functions_of(installed("verl", "verl/utils/torch_functional.py"), {"masked_sum", "masked_mean"})
    verl = functions_of(
        installed("verl", "verl/trainer/ppo/rollout_corr_helper.py"),
        {
            "SAFETY_BOUND",
            "SUPPORTED_ROLLOUT_RS_OPTIONS",
            "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS",
            "_parse_rollout_is_threshold",
            "_parse_rollout_rs_thresholds",
            "compute_is_metrics",
            "compute_rs_metrics",
            "compute_rollout_correction_weights",
            "compute_rollout_rejection_mask",
            "compute_offpolicy_metrics",
        },
        math=math,
        verl_F=SimpleNamespace(**masked),
    )
    utils = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"masked_mean"})
    openrlhf = functions_of(
        installed("openrlhf", "openrlhf/models/loss.py"), {"PolicyLoss", "aggregate_loss"}, nn=nn, **utils
    )
    tensors = [
        torch.tensor(rows, dtype=torch.float64)
        for rows in (LOG_PROBS, OLD_LOG_PROBS, ROLLOUT_LOG_PROBS, ADVANTAGES, MASK)
    ]
    log_probs, old, rollout, advantages, mask = tensors
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "log_probs": LOG_PROBS,
        "old_log_probs": OLD_LOG_PROBS,
        "rollout_log_probs": ROLLOUT_LOG_PROBS,
        "advantages": ADVANTAGES,
        "mask": MASK,
        "verl_weights": {},
        "verl_keep": {},
        "openrlhf_loss": {},
        "verl_metrics": verl["compute_offpolicy_metrics"](old, rollout, mask),
    }
    for name, (level, threshold) in IS_CASES.items():
        weights, _ = verl["compute_rollout_correction_weights"](
            old - rollout, mask, rollout_is=level, rollout_is_threshold=threshold
        )
        result["verl_weights"][name] = weights.tolist()
    for option, threshold in (("token_k1", "0.6_2.0"), ("seq_sum_k1", "0.3_1.0"), ("seq_mean_k1", "0.6_1.1")):
        keep, _ = verl["compute_rollout_rejection_mask"](
            old - rollout, mask, rollout_rs=option, rollout_rs_threshold=threshold
        )
        result["verl_keep"][option] = keep.tolist()
    for name, level, mode in (("tis", "token", "clip"), ("icepop", "token", "mask"), ("geo", "seq", "mask")):
        loss = openrlhf["PolicyLoss"](
            is_correction_level=level, is_correction_mode=mode, is_correction_threshold=[0.6, 1.5]
        )
        result["openrlhf_loss"][name] = value_and_grad(
            lambda x, loss=loss: loss(x, old, advantages, action_mask=mask, rollout_log_probs=rollout)[0],
            log_probs,
        )
    path = Path(__file__).with_name("rollout_logprobs.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
