"""跑一次 verl 与 OpenRLHF 的组优势、聚合与 GRPO 损失，把输入、输出、梯度与版本写进 grpo.json。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_grpo.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import itertools
import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from library import functions_of, installed, value_and_grad

GROUP_SIZE = 4
REWARD_CASES = {
    "one_right": [1.0, 0.0, 0.0, 0.0],
    "two_groups": [1.0, 1.0, 0.0, 1.0, 0.3, -0.2, 0.9, 2.5],
    "all_equal": [1.0, 1.0, 1.0, 1.0],
}
MODES = ["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm"]
CONFIG = {"clip_low": 0.2, "clip_high": 0.28, "beta": 0.04, "max_response_length": 9}


def inputs() -> dict[str, torch.Tensor]:
    """四条回答（一组）、每条最多六个 token；最后一条整行被遮住；比值覆盖裁剪区间内外。"""
    generator = torch.Generator().manual_seed(20261124)
    old_log_probs = -torch.rand(4, 6, generator=generator, dtype=torch.float64) * 3 - 0.5
    step = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    drift = torch.randn(4, 6, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([6, 2, 4, 0])
    return {
        "log_probs": old_log_probs + 0.3 * step,
        "old_log_probs": old_log_probs,
        "ref_log_probs": old_log_probs + 0.2 * drift,
        "advantages": torch.tensor([1.2, -0.4, -1.1, 0.3], dtype=torch.float64),
        "loss_mask": (torch.arange(6) < lengths[:, None]).double(),
    }


def load_verl() -> SimpleNamespace:
    masks = functions_of(installed("verl", "verl/utils/torch_functional.py"), {"masked_sum", "masked_mean"})
    names = {
        "compute_grpo_outcome_advantage",
        "agg_loss",
        "compute_policy_loss_vanilla",
        "kl_penalty",
        "kl_penalty_forward",
    }
    algos = functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"),
        names,
        np=np,
        defaultdict=defaultdict,
        verl_F=SimpleNamespace(**masks),
        AlgoConfig=type("AlgoConfig", (), {}),
    )
    return SimpleNamespace(**algos)


class ActorConfig(dict):
    """verl 的损失函数只读这几个字段；clip_ratio_c 取得很大，等于关掉双侧裁剪。"""

    clip_ratio = CONFIG["clip_low"]
    clip_ratio_low = CONFIG["clip_low"]
    clip_ratio_high = CONFIG["clip_high"]
    global_batch_info: dict = {}


def verl_advantages(verl, rewards: torch.Tensor, index: list, **options) -> list:
    mask = torch.ones(len(rewards), 1, dtype=rewards.dtype)
    result, _ = verl.compute_grpo_outcome_advantage(
        rewards[:, None].clone(), mask, np.array(index), **options
    )
    return result[:, 0].tolist()


def run_verl(data: dict[str, torch.Tensor]) -> dict:
    verl, result = load_verl(), {"advantages": {}, "aggregate": {}}
    for name, rewards in REWARD_CASES.items():
        rewards = torch.tensor(rewards, dtype=torch.float64)
        index = [row // GROUP_SIZE for row in range(len(rewards))]
        result["advantages"][name] = {
            "scaled": verl_advantages(verl, rewards, index),
            "centred": verl_advantages(verl, rewards, index, norm_adv_by_std_in_grpo=False),
        }
    rewards = torch.tensor(REWARD_CASES["two_groups"], dtype=torch.float64)
    shuffled = [0, 4, 1, 5, 2, 6, 3, 7]
    result["advantages"]["interleaved_rows_with_uid"] = verl_advantages(
        verl, rewards[shuffled], [row // GROUP_SIZE for row in shuffled]
    )
    result["advantages"]["singleton"] = verl_advantages(verl, torch.tensor([0.7], dtype=torch.float64), [0])
    result["advantages"]["all_0.9_float32"] = verl_advantages(verl, torch.full((8,), 0.9), [0] * 8)
    for mode in MODES:
        result["aggregate"][mode] = value_and_grad(
            lambda x, mode=mode: verl.agg_loss(
                x, data["loss_mask"], mode, loss_scale_factor=CONFIG["max_response_length"]
            ),
            data["log_probs"],
        )

    def loss(log_probs):
        policy = verl.compute_policy_loss_vanilla(
            data["old_log_probs"],
            log_probs,
            data["advantages"][:, None].expand_as(log_probs),
            data["loss_mask"],
            loss_agg_mode="seq-mean-token-mean",
            config=ActorConfig(clip_ratio_c=1e9),
        )[0]
        kl = verl.kl_penalty(log_probs, data["ref_log_probs"], "low_var_kl")
        return policy + CONFIG["beta"] * verl.agg_loss(kl, data["loss_mask"], "seq-mean-token-mean")

    result["loss"] = value_and_grad(loss, data["log_probs"])
    return result


def openrlhf_advantages(rewards: torch.Tensor, group_size: int) -> list:
    reward_utils = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"compute_reward"})
    methods = functions_of(
        installed("openrlhf", "openrlhf/trainer/ppo_utils/experience_maker.py"),
        {"compute_advantages_and_returns", "get_cumulative_returns"},
        itertools=itertools,
        apply_length_penalties=lambda experiences, args: None,
        **reward_utils,
    )
    advantage = SimpleNamespace(estimator="group_norm", gamma=1.0, lambd=1.0, no_std_norm=False)
    args = SimpleNamespace(
        rollout=SimpleNamespace(n_samples_per_prompt=group_size),
        algo=SimpleNamespace(advantage=advantage),
        reward=SimpleNamespace(clip_range=None),
    )
    maker = SimpleNamespace(
        strategy=SimpleNamespace(args=args),
        kl_ctl=SimpleNamespace(value=0.0),
        advantage_estimator="group_norm",
    )
    maker.get_cumulative_returns = lambda *a: methods["get_cumulative_returns"](maker, *a)
    experience = SimpleNamespace(
        rewards=rewards,
        index=list(range(len(rewards))),
        kl=torch.zeros(len(rewards), 1, dtype=rewards.dtype),
        action_mask=torch.ones(len(rewards), 1),
        info={},
    )
    methods["compute_advantages_and_returns"](maker, [experience])
    return experience.advantages[:, 0].tolist()


def run_openrlhf(data: dict[str, torch.Tensor]) -> dict:
    masks = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"masked_mean"})
    loss = functions_of(installed("openrlhf", "openrlhf/models/loss.py"), {"aggregate_loss"}, **masks)
    result = {
        "advantages": {
            name: openrlhf_advantages(torch.tensor(rewards, dtype=torch.float64), GROUP_SIZE)
            for name, rewards in REWARD_CASES.items()
        },
        "aggregate": {
            mode: value_and_grad(
                lambda x, flag=flag: loss["aggregate_loss"](x, data["loss_mask"], token_level_loss=flag),
                data["log_probs"],
            )
            for mode, flag in [("token-mean", True), ("seq-mean-token-mean", False)]
        },
    }
    result["advantages"]["all_0.9_float32"] = openrlhf_advantages(torch.full((8,), 0.9), 8)
    return result


def main() -> None:
    data = inputs()
    golden = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "config": CONFIG,
        "rewards": REWARD_CASES,
        "inputs": {key: value.tolist() for key, value in data.items()},
        "verl": run_verl(data),
        "openrlhf": run_openrlhf(data),
    }
    path = Path(__file__).with_name("grpo.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
