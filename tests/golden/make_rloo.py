"""跑一次 verl 的两个 RLOO 优势函数，把输入、输出与版本写进 rloo.json。

verl 不能与本项目的 transformers 装在一起，所以只要它的源文件在环境里，不要它的依赖：

    pip install --no-deps verl==0.9.1
    python tests/golden/make_rloo.py

脚本从已安装的包里取出那两个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from library import functions_of, installed

FUNCTIONS = ["compute_rloo_outcome_advantage", "compute_rloo_vectorized_outcome_advantage"]
# 三个提示，回答数分别是 4、1、2，行的次序故意打乱
INDEX = ["a", "c", "a", "b", "a", "c", "a"]
REWARDS = [1.0, 0.2, 0.0, 0.7, -0.5, 0.9, 2.0]
LENGTHS = [2, 4, 1, 3, 4, 2, 3]


def main() -> None:
    source = installed("verl", "verl/trainer/ppo/core_algos.py")
    library = functions_of(source, set(FUNCTIONS), np=np, defaultdict=defaultdict)
    mask = (torch.arange(max(LENGTHS)) < torch.tensor(LENGTHS)[:, None]).double()
    token_rewards = torch.zeros_like(mask)
    for row, (reward, length) in enumerate(zip(REWARDS, LENGTHS, strict=True)):
        token_rewards[row, length - 1] = reward  # 奖励放在最后一个 token，与 verl 的约定相同
    result = {
        "versions": {name: version(name) for name in ("verl", "torch", "numpy")},
        "index": INDEX,
        "rewards": REWARDS,
        "mask": mask.tolist(),
        "advantages": {
            name: library[name](token_rewards.clone(), mask, np.array(INDEX))[0].tolist()
            for name in FUNCTIONS
        },
    }
    Path(__file__).with_name("rloo.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
