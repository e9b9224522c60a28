"""跑一次 Dr. GRPO 作者的实现与 verl 的 Dr. GRPO 配置，把输入、数值、梯度与版本写进 dr_grpo.json。

作者的两个仓库依赖 vLLM 等，verl 与本项目的 transformers 装不到一起，所以只要它们的源文件，不要它们的依赖：

    git clone https://github.com/sail-sg/understand-r1-zero
    git clone https://github.com/sail-sg/oat
    pip download --no-deps verl==0.9.1（解开成目录）
    python tests/golden/make_dr_grpo.py --understand 目录 --oat 目录 --verl 目录

脚本从源文件里取出那几个函数单独执行，本仓库不含它们的代码。
"""

import argparse
import json
from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from library import functions_of, value_and_grad

GROUP_SIZE = 3
MAX_RESPONSE_LENGTH = 11
CLIP_LOW, CLIP_HIGH = 0.2, 0.28


class ActorConfig(dict):
    """verl 的策略损失读的字段；clip_ratio_c 取大，让双侧裁剪不起作用。"""

    clip_ratio = 0.2
    clip_ratio_low = CLIP_LOW
    clip_ratio_high = CLIP_HIGH
    global_batch_info: dict = {"loss_scale_factor": MAX_RESPONSE_LENGTH}


def inputs() -> dict[str, torch.Tensor]:
    """两组、每组三条回答，长度各不相同，奖励不限于 0/1，比值覆盖裁剪区间内外。"""
    generator = torch.Generator().manual_seed(20261124)
    old_log_probs = -torch.rand(6, 7, generator=generator, dtype=torch.float64) * 3 - 0.5
    step = torch.randn(6, 7, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([7, 2, 4, 1, 6, 3])
    return {
        "log_probs": old_log_probs + 0.3 * step,
        "old_log_probs": old_log_probs,
        "rewards": torch.tensor([1.0, 0.0, 0.0, 0.3, 2.0, -0.5], dtype=torch.float64),
        "loss_mask": (torch.arange(7) < lengths[:, None]).double(),
    }


def run_authors(understand: Path, oat: Path, data: dict[str, torch.Tensor]) -> dict:
    ops = functions_of(oat / "oat/utils/ops.py", {"masked_sum", "masked_mean"})
    learner = functions_of(understand / "train_zero_math.py", {"compute_monte_carlo_advantages"})
    result = {}
    for critic_type in ("drgrpo", "grpo"):
        owner = SimpleNamespace(args=SimpleNamespace(num_samples=GROUP_SIZE, critic_type=critic_type))
        # 作者的函数先对 token 求和，所以奖励放在哪一格都一样
        token_rewards = torch.zeros_like(data["loss_mask"])
        token_rewards[:, 0] = data["rewards"]
        result[f"advantages_{critic_type}"] = learner["compute_monte_carlo_advantages"](
            owner, token_rewards, None
        ).tolist()
    # oat/algorithms/ppo.py 的 learn：masked_aggregator(token 损失, 掩码, axis=1) 之后对条数取 mean
    result["masked_sum"] = value_and_grad(
        lambda x: ops["masked_sum"](
            x, data["loss_mask"], axis=1, constant_normalizer=MAX_RESPONSE_LENGTH
        ).mean(),
        data["log_probs"],
    )
    result["masked_mean"] = value_and_grad(
        lambda x: ops["masked_mean"](x, data["loss_mask"], axis=1).mean(), data["log_probs"]
    )
    return result


def run_verl(root: Path, data: dict[str, torch.Tensor]) -> dict:
    functional = functions_of(root / "verl/utils/torch_functional.py", {"masked_sum", "masked_mean"})
    algos = functions_of(
        root / "verl/trainer/ppo/core_algos.py",
        {"agg_loss", "compute_policy_loss_vanilla", "compute_grpo_outcome_advantage"},
        np=np,
        defaultdict=defaultdict,
        verl_F=SimpleNamespace(**functional),
        AlgoConfig=type("AlgoConfig", (), {}),
    )
    token_rewards = torch.zeros_like(data["loss_mask"])
    token_rewards[:, 0] = data["rewards"]
    index = np.repeat(np.arange(len(token_rewards) // GROUP_SIZE), GROUP_SIZE)
    result = {}
    for name, by_std in (("without_std", False), ("with_std", True)):
        advantages = algos["compute_grpo_outcome_advantage"](
            token_rewards.clone(), data["loss_mask"], index, norm_adv_by_std_in_grpo=by_std
        )[0]
        result[f"advantages_{name}"] = advantages[:, 0].tolist()
        for mode in ("seq-mean-token-sum-norm", "seq-mean-token-mean", "token-mean"):
            result[f"{mode}_{name}"] = value_and_grad(
                lambda x, mode=mode, advantages=advantages: algos["compute_policy_loss_vanilla"](
                    data["old_log_probs"],
                    x,
                    advantages,
                    data["loss_mask"],
                    loss_agg_mode=mode,
                    config=ActorConfig(clip_ratio_c=1e6),
                )[0],
                data["log_probs"],
            )
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--understand", type=Path, required=True)
    parser.add_argument("--oat", type=Path, required=True)
    parser.add_argument("--verl", type=Path, required=True)
    args = parser.parse_args()
    data = inputs()
    golden = {
        "versions": {
            "understand-r1-zero": "dfca49d",
            "oat": "c1a074c",
            "verl": (args.verl / "verl/version/version").read_text().strip(),
            "torch": torch.__version__,
        },
        "config": {
            "group_size": GROUP_SIZE,
            "max_response_length": MAX_RESPONSE_LENGTH,
            "clip_low": CLIP_LOW,
            "clip_high": CLIP_HIGH,
        },
        "inputs": {key: value.tolist() for key, value in data.items()},
        "authors": run_authors(args.understand, args.oat, data),
        "verl": run_verl(args.verl, data),
    }
    path = Path(__file__).with_name("dr_grpo.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
