"""跑一次 verl 的 ReMax 优势函数，把输入、输出与版本写进 remax.json。

verl 不能与本项目的 transformers 装在一起，所以只要它的源文件在环境里，不要它的依赖：

    pip install --no-deps verl==0.9.1
    python tests/golden/make_remax.py

脚本从已安装的包里取出那一个函数的定义单独执行（不导入整个包），本仓库不含它的代码。
"""

import json
from importlib.metadata import version
from pathlib import Path

import torch
from library import functions_of, installed

NAME = "compute_remax_outcome_advantage"
# 第 0 行：只有结尾一个分数；第 1 行：每个 token 扣一点 KL，右侧有填充且填充处留着脏数据；
# 第 2 行：中间两个 token 是工具返回（掩码为 0，奖励也不为零）；第 3 行：整行被遮住；第 4 行：两份回答同分
TOKEN_REWARDS = [
    [0.0, 0.0, 0.0, 0.0, 0.0, 1.0],
    [-0.1, -0.2, 0.05, 0.9, 7.0, -3.0],
    [0.1, 0.0, 0.4, -0.6, -0.05, 0.5],
    [1.0, 2.0, 0.0, 0.0, 0.0, 0.0],
    [0.0, 0.0, 0.25, 0.0, 0.0, 0.0],
]
RESPONSE_MASK = [
    [1, 1, 1, 1, 1, 1],
    [1, 1, 1, 1, 0, 0],
    [1, 1, 0, 0, 1, 1],
    [0, 0, 0, 0, 0, 0],
    [1, 1, 1, 0, 0, 0],
]
REWARD_BASELINES = [0.4, 1.5, -0.3, 0.8, 0.25]


def main() -> None:
    library = functions_of(installed("verl", "verl/trainer/ppo/core_algos.py"), {NAME})
    advantages, returns = library[NAME](
        token_level_rewards=torch.tensor(TOKEN_REWARDS, dtype=torch.float64),
        reward_baselines=torch.tensor(REWARD_BASELINES, dtype=torch.float64),
        response_mask=torch.tensor(RESPONSE_MASK, dtype=torch.float64),
    )
    result = {
        "versions": {name: version(name) for name in ("verl", "torch")},
        "token_rewards": TOKEN_REWARDS,
        "response_mask": RESPONSE_MASK,
        "greedy_rewards": REWARD_BASELINES,
        "advantages": advantages.tolist(),
        "returns": returns.tolist(),
    }
    path = Path(__file__).with_name("remax.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
