r"""生成 reward_hacking.json：verl 的 AdaptiveKLController 连续更新的系数。

参数是已有的 verl 源码目录；只取出这一个类来执行，不导入 verl：

    python tests/golden/make_reward_hacking.py --verl 目录 --commit 提交
"""

import argparse
import json
from pathlib import Path

import numpy as np
from library import functions_of

CASES = [  # 初值、目标、视野、逐批的（KL，回答数）
    (0.001, 0.1, 10000, [(0.0, 64), (0.05, 64), (0.1, 64), (0.11, 128), (0.5, 128), (50.0, 1024)]),
    (0.2, 6.0, 5000, [(5.0, 256), (6.5, 256), (7.19, 256), (7.21, 256), (1.0, 512)]),
]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verl", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()
    library = functions_of(args.verl / "verl/trainer/ppo/core_algos.py", {"AdaptiveKLController"}, np=np)
    golden = {"versions": {"verl": args.commit}, "cases": []}
    for start, target, horizon, updates in CASES:
        controller, values = library["AdaptiveKLController"](start, target, horizon), []
        for kl, count in updates:
            controller.update(kl, count)
            values.append(float(controller.value))
        case = {"start": start, "target": target, "horizon": horizon, "updates": updates, "values": values}
        golden["cases"].append(case)
    path = Path(__file__).with_suffix("").with_name("reward_hacking.json")
    path.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
