r"""生成 ppo.json：verl 与 OpenRLHF 的 KL 塑形奖励、GAE 与白化在一组小张量上的数值。

两个库都不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_ppo.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
"""

import json
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from library import functions_of, installed

# 四行：没有填充；尾部填充；中间两个工具 token；工具 token 加尾部填充
MASK = [[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0], [1, 1, 0, 0, 1, 1, 1], [1, 0, 1, 1, 0, 1, 0]]
SCORES = [1.0, -0.5, 0.8, 0.3]
SETTINGS = [(1.0, 1.0), (1.0, 0.95), (0.9, 0.6), (1.0, 0.0)]  # (gamma, lam)
KL_COEF = 0.1


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(20261124)
    mask = torch.tensor(MASK, dtype=torch.float64)
    shape = mask.shape

    def noise():
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    log_probs = -2 - noise().abs()
    return {
        "mask": mask,
        "scores": torch.tensor(SCORES, dtype=torch.float64),
        "log_probs": log_probs,
        "ref_log_probs": log_probs + 0.5 * noise(),
        "values": noise(),  # 填充与工具 token 上也有非零的价值
    }


class Batch(dict):
    """verl 的 DataProto.batch：一个带 batch_size 的字典。"""

    batch_size = (len(MASK),)


def run_verl(data: dict[str, torch.Tensor]) -> dict:
    functional = functions_of(
        installed("verl", "verl/utils/torch_functional.py"),
        {"masked_sum", "masked_mean", "masked_var", "masked_whiten"},
    )
    algos = functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"),
        {"compute_gae_advantage_return", "kl_penalty", "kl_penalty_forward"},
        verl_F=SimpleNamespace(**functional),
    )
    trainer = functions_of(
        installed("verl", "verl/trainer/ppo/ray_trainer.py"),
        {"apply_kl_penalty"},
        core_algos=SimpleNamespace(**algos),
        masked_mean=functional["masked_mean"],
    )
    # verl 的分数已经在逐 token 的张量里：放在最后一个有效位置
    scores = torch.zeros_like(data["mask"])
    for row, mask in enumerate(data["mask"]):
        scores[row, mask.nonzero().max()] = data["scores"][row]
    batch = Batch(
        response_mask=data["mask"],
        token_level_scores=scores,
        old_log_probs=data["log_probs"],
        ref_log_prob=data["ref_log_probs"],
    )
    controller = SimpleNamespace(value=KL_COEF, update=lambda current_kl, n_steps: None)
    trainer["apply_kl_penalty"](SimpleNamespace(batch=batch), controller, kl_penalty="kl")
    rewards = batch["token_level_rewards"]
    gae = []
    for gamma, lam in SETTINGS:
        advantages, returns = algos["compute_gae_advantage_return"](
            rewards, data["values"], data["mask"], gamma, lam
        )
        gae.append({"whitened": advantages.tolist(), "returns": returns.tolist()})
    return {"token_rewards": rewards.tolist(), "gae": gae}


def run_openrlhf(data: dict[str, torch.Tensor]) -> dict:
    space = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"compute_reward"})
    maker = functions_of(
        installed("openrlhf", "openrlhf/trainer/ppo_utils/experience_maker.py"),
        {"get_advantages_and_returns"},
    )
    kl = data["log_probs"] - data["ref_log_probs"]  # compute_approx_kl 会转成 float32，这里直接给 k1
    rewards = space["compute_reward"](data["scores"], KL_COEF, kl, action_mask=data["mask"])
    gae = []
    for gamma, lam in SETTINGS:
        advantages, returns = maker["get_advantages_and_returns"](
            None, data["values"], rewards, data["mask"], gamma, lam
        )
        gae.append({"advantages": advantages.tolist(), "returns": returns.tolist()})
    return {"token_rewards": rewards.tolist(), "gae": gae}


def main() -> None:
    data = inputs()
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "torch")},
        "settings": SETTINGS,
        "kl_coef": KL_COEF,
        "inputs": {name: value.tolist() for name, value in data.items()},
        "verl": run_verl(data),
        "openrlhf": run_openrlhf(data),
    }
    path = Path(__file__).with_name("ppo.json")
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
