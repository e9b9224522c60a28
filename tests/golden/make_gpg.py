"""跑一次 verl 与 GPG 作者的代码，把输入、输出、梯度与版本写进 gpg.json。

verl 与作者的训练代码都不能与本项目的 transformers 装在一起，所以只要源文件，不要依赖：

    pip install --no-deps verl==0.9.1
    python tests/golden/make_gpg.py --gpg AMAP-ML/GPG 的工作目录（提交 e096da8）

脚本从源文件里取出几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。作者的 `compute_loss` 是
训练器的方法，真实调用，只把前向换成给定的对数概率。
"""

import argparse
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
    "all_informative": [1, 0, 0, 1, 1, 1, 0, 1],
    "three_all_right": [1, 1, 1, 0] + [1] * 12,
    "three_all_wrong": [1, 0, 0, 0] + [0] * 12,
    "three_all_right_pm1": [1, 1, 1, -1] + [1] * 12,
    "all_dead": [1] * 4 + [0] * 4,
    "all_wrong": [0] * 8,
    "real_valued": [0.3, -0.2, 0.9, 2.5, 0.5, 0.5, 0.5, 0.5],
}
MODES = ["token-mean", "seq-mean-token-mean"]
INVERSE_ALPHA = 0.5


def inputs() -> dict[str, torch.Tensor]:
    """两组、每组四条、每条最多五个 token；第二组是无效组，优势已按 F_norm=1、不乘 α 给定。"""
    generator = torch.Generator().manual_seed(20261124)
    log_probs = -torch.rand(8, 5, generator=generator, dtype=torch.float64) * 3 - 0.2
    lengths = torch.tensor([5, 2, 4, 1, 5, 5, 3, 5])
    advantages = torch.tensor([0.5, -0.5, -0.5, 0.5, 0.0, 0.0, 0.0, 0.0], dtype=torch.float64)
    loss_mask = (torch.arange(5) < lengths[:, None]).double()
    return {"log_probs": log_probs, "advantages": advantages, "loss_mask": loss_mask}


def run_verl(data: dict[str, torch.Tensor]) -> dict:
    helpers = functions_of(installed("verl", "verl/utils/torch_functional.py"), {"masked_sum"})
    algos = functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"),
        {"compute_gpg_outcome_advantage", "compute_policy_loss_gpg", "agg_loss"},
        np=np,
        defaultdict=defaultdict,
        verl_F=SimpleNamespace(**helpers),
    )
    advantages = {}
    for name, rewards in REWARD_CASES.items():
        scores = torch.tensor(rewards, dtype=torch.float64)
        token_rewards = torch.zeros(len(scores), 2, dtype=torch.float64)
        token_rewards[:, -1] = scores
        index = np.array([str(row // GROUP_SIZE) for row in range(len(scores))])
        result, _ = algos["compute_gpg_outcome_advantage"](
            token_rewards, torch.ones_like(token_rewards), index
        )
        advantages[name] = {"rewards": scores.tolist(), "advantages": result[:, -1].tolist()}

    losses = {}
    for mode in MODES:

        def loss(log_probs, mode=mode):
            return algos["compute_policy_loss_gpg"](
                old_log_prob=log_probs.detach() - 1.0,
                log_prob=log_probs,
                advantages=data["advantages"][:, None].expand_as(log_probs),
                response_mask=data["loss_mask"],
                loss_agg_mode=mode,
                config=SimpleNamespace(global_batch_info={}),
            )[0]

        losses[mode] = value_and_grad(loss, data["log_probs"])
    return {"advantages": advantages, "losses": losses}


def run_authors(root: Path, data: dict[str, torch.Tensor]) -> dict:
    """open-r1 的 GPGTrainer 与 VisualThinker 的 GRPOTrainer，各取 compute_loss。"""
    mask = data["loss_mask"]
    rows = torch.zeros(len(mask), 1, dtype=torch.long)
    gather = SimpleNamespace(gather_for_metrics=lambda x: x)
    batch = {
        "prompt_ids": rows,
        "prompt_mask": rows + 1,
        "completion_ids": torch.zeros_like(mask).long(),
        "completion_mask": mask,
        "advantages": data["advantages"],
        "rewards": data["advantages"],
        "rewards_per_func": data["advantages"][:, None],
        "std_grouped_rewards": data["advantages"],
        "inverse_alpha": INVERSE_ALPHA,
        **dict.fromkeys(("pixel_values", "image_grid_thw")),
        **dict.fromkeys(("n_valid_samples", "num_reward_samples", "current_resample_attempt"), 1),
    }
    math_loss = functions_of(root / "open-r1/src/open_r1/gpg_trainer.py", {"compute_loss"})["compute_loss"]
    visual = "VisualThinker-R1-Zero/src/open-r1-multimodal/src/open_r1/trainer/grpo_trainer.py"
    visual_loss = functions_of(root / visual, {"compute_loss"})["compute_loss"]

    def run_math(log_probs):
        trainer = SimpleNamespace(
            beta=0.0,
            args=SimpleNamespace(adjust_gd=True),
            control=SimpleNamespace(should_evaluate=False),
            accelerator=gather,
            _metrics={"train": {"inverse_alpha": [INVERSE_ALPHA]}},
            _get_per_token_logps=lambda *args: log_probs,
        )
        return math_loss(trainer, None, batch)

    def run_visual(log_probs):
        trainer = SimpleNamespace(
            args=SimpleNamespace(adjust_gd=True, pg_name="gpg"),
            accelerator=gather,
            ref_model="ref",
            reward_funcs=[],
            _metrics=defaultdict(list),
            _get_per_token_logps=lambda model, *args: (
                log_probs if model is None else torch.zeros_like(log_probs)
            ),
            _generate_and_score_completions=lambda model, given: batch,
        )
        return visual_loss(trainer, None, None)

    return {
        "math": value_and_grad(run_math, data["log_probs"]),
        "visual": value_and_grad(run_visual, data["log_probs"]),
    }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpg", type=Path, required=True)
    args = parser.parse_args()
    data = inputs()
    golden = {
        "versions": {"verl": version("verl"), "AMAP-ML/GPG": "e096da8", "torch": torch.__version__},
        "group_size": GROUP_SIZE,
        "inverse_alpha": INVERSE_ALPHA,
        "inputs": {key: value.tolist() for key, value in data.items()},
        "verl": run_verl(data),
        "authors": run_authors(args.gpg, data),
    }
    path = Path(__file__).with_name("gpg.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
