"""跑一次 verl 与 OpenRLHF 的 REINFORCE++ 优势，把输入、输出与版本写进 reinforce_plus_plus.json。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_reinforce_plus_plus.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import itertools
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from library import functions_of, installed

GROUP_SIZE = 2
KL_COEF = 0.1
# 两个提示各两条回答；PADDED 的填充都在右边，TOOL 的第 2、4 行中间有一段工具返回
PADDED = [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]]
TOOL = [[1, 1, 1, 0, 0], [1, 0, 0, 1, 1], [1, 1, 0, 0, 0], [1, 1, 0, 1, 0]]
REWARDS = [1.0, 0.0, 1.0, 0.25]


def load_verl() -> dict:
    tools = functions_of(
        installed("verl", "verl/utils/torch_functional.py"),
        {"masked_sum", "masked_mean", "masked_var", "masked_whiten"},
    )
    return functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"),
        {
            "compute_reinforce_plus_plus_outcome_advantage",
            "compute_reinforce_plus_plus_baseline_outcome_advantage",
        },
        defaultdict=defaultdict,
        verl_F=SimpleNamespace(**tools),
    )


def load_openrlhf() -> dict:
    utils = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"compute_reward"})
    return functions_of(
        installed("openrlhf", "openrlhf/trainer/ppo_utils/experience_maker.py"),
        {"compute_advantages_and_returns", "get_cumulative_returns"},
        itertools=itertools,
        apply_length_penalties=lambda *_: None,
        **utils,
    )


def run_openrlhf(library: dict, estimator: str, kl, mask, *, kl_coef: float, gamma: float) -> list:
    """一条 Experience 装整批；用一个有同名属性的对象代替 RemoteExperienceMaker。"""
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=GROUP_SIZE),
        algo=SimpleNamespace(
            advantage=SimpleNamespace(estimator=estimator, gamma=gamma, no_std_norm=False),
        ),
        reward=SimpleNamespace(clip_range=(-10, 10)),
    )
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        advantage_estimator=estimator,
        kl_ctl=SimpleNamespace(value=kl_coef),
        get_cumulative_returns=lambda *a: library["get_cumulative_returns"](None, *a),
    )
    experience = SimpleNamespace(
        index=list(range(len(REWARDS))),
        rewards=torch.tensor(REWARDS, dtype=torch.float64),
        kl=kl,
        action_mask=mask,
        info={},
    )
    library["compute_advantages_and_returns"](maker, [experience])
    return experience.advantages.tolist()


def main() -> None:
    verl, openrlhf = load_verl(), load_openrlhf()
    generator = torch.Generator().manual_seed(20261124)
    log_probs = -torch.rand(4, 5, generator=generator, dtype=torch.float64) * 3 - 0.2
    ref_log_probs = log_probs + 0.5 * torch.randn(4, 5, generator=generator, dtype=torch.float64)
    kl = log_probs - ref_log_probs

    cases = {}
    for mask_name, rows in {"padded": PADDED, "tool": TOOL}.items():
        mask = torch.tensor(rows, dtype=torch.float64)
        last = [max(t for t, m in enumerate(row) if m) for row in rows]
        scores = torch.zeros_like(mask)
        scores[torch.arange(4), last] = torch.tensor(REWARDS, dtype=torch.float64)
        for kl_coef, gamma in [(0.0, 1.0), (KL_COEF, 1.0), (KL_COEF, 0.9)]:
            token_rewards = scores - kl_coef * kl * mask
            config = SimpleNamespace(gamma=gamma)
            plain, _ = verl["compute_reinforce_plus_plus_outcome_advantage"](token_rewards, mask, config)
            case = {
                "mask": rows,
                "kl_coef": kl_coef,
                "gamma": gamma,
                "verl": plain.tolist(),
                "openrlhf": run_openrlhf(openrlhf, "reinforce", kl, mask, kl_coef=kl_coef, gamma=gamma),
            }
            if gamma == 1:
                baseline, _ = verl["compute_reinforce_plus_plus_baseline_outcome_advantage"](
                    token_rewards, mask, [0, 0, 1, 1]
                )
                case["verl_baseline"] = baseline.tolist()
                case["openrlhf_baseline"] = run_openrlhf(
                    openrlhf, "reinforce_baseline", kl, mask, kl_coef=kl_coef, gamma=gamma
                )
            cases[f"{mask_name}/kl={kl_coef}/gamma={gamma}"] = case
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "group_size": GROUP_SIZE,
        "rewards": REWARDS,
        "log_probs": log_probs.tolist(),
        "ref_log_probs": ref_log_probs.tolist(),
        "cases": cases,
    }
    path = Path(__file__).with_name("reinforce_plus_plus.json")
    path.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
