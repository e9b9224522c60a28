r"""生成 critic_vs_reward.json：verl、OpenRLHF 与 TRL 的奖励摆放、价值读出、两种损失在一组小张量上的数值与梯度。

verl 与 OpenRLHF 不能与本项目的 transformers 装在一起，所以只要它们的源文件在环境里，不要它们的依赖：

    pip install --no-deps verl==0.9.1 openrlhf==0.11.2
    python tests/golden/make_critic_vs_reward.py

脚本从已安装的包里取出那几个函数的定义单独执行（不导入整个包），本仓库不含它们的代码。
OpenRLHF 的两个模型真的各跑一次前向：主干换成一个查表的小模块。TRL 的 compute_loss 真的调用一次，训练器换成空壳。
"""

import json
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch
from library import functions_of, installed, value_and_grad
from torch import nn
from trl import RewardTrainer

# 四行：没有填充；尾部填充；只有一个 token；一个 token 也没有生成
MASK = [[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0]]
ROWS = len(MASK)
PROMPT = 3


def inputs() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(20261124)
    mask = torch.tensor(MASK, dtype=torch.float64)

    def noise(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return {
        "mask": mask,
        "rewards": noise(ROWS),
        "outputs": noise(ROWS, PROMPT + mask.shape[1]),  # 标量头在每个位置的输出
        "targets": noise(*mask.shape),
        "chosen": noise(4),
        "rejected": noise(4),
    }


def run_verl(data: dict[str, torch.Tensor]) -> dict:
    functional = functions_of(
        installed("verl", "verl/utils/torch_functional.py"), {"masked_sum", "masked_mean", "clip_by_value"}
    )
    algos = functions_of(
        installed("verl", "verl/trainer/ppo/core_algos.py"),
        {"agg_loss", "compute_value_loss"},
        verl_F=SimpleNamespace(**functional),
    )
    manager = functions_of(
        installed("verl", "verl/experimental/reward_loop/reward_manager/base.py"), {"assemble_rm_scores"}
    )
    prompts = torch.zeros(ROWS, PROMPT)
    batch = {
        "prompts": prompts,
        "responses": torch.zeros_like(data["mask"]),
        "attention_mask": torch.cat([prompts + 1, data["mask"]], 1).long(),
    }
    placed = manager["assemble_rm_scores"](None, SimpleNamespace(batch=batch), data["rewards"].tolist())
    values = data["outputs"][:, PROMPT - 1 : -1]
    loss = value_and_grad(
        lambda x: algos["compute_value_loss"](
            x, data["targets"], values, data["mask"], cliprange_value=100.0
        )[0],
        values,
    )
    return {"token_rewards": placed.tolist(), "value_loss": loss["value"], "value_grad": loss["grad"]}


class TableBackbone(nn.Module):
    """主干的替身：token id 就是行号，隐藏状态从表里取。"""

    def __init__(self, config):
        super().__init__()
        self.table = config.table

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        return {"last_hidden_state": self.table[input_ids]}


class FakePretrained(nn.Module):
    base_model_prefix = "model"

    def __init__(self, config):
        super().__init__()

    def post_init(self):
        pass


def run_openrlhf(data: dict[str, torch.Tensor]) -> dict:
    space = functions_of(installed("openrlhf", "openrlhf/models/utils.py"), {"compute_reward"})
    placed = space["compute_reward"](
        data["rewards"], 0.0, torch.zeros_like(data["mask"]), action_mask=data["mask"]
    )
    models = functions_of(
        installed("openrlhf", "openrlhf/models/model.py"), {"_get_critic_model", "_get_reward_model"}, nn=nn
    )
    rows, length = data["outputs"].shape
    config = SimpleNamespace(
        hidden_size=1, normalize_reward=False, table=data["outputs"].reshape(-1, 1)
    )  # 隐藏状态就是想要的输出，线性头取 1
    input_ids = torch.arange(rows * length).view(rows, length)
    attention = torch.cat([torch.ones(ROWS, PROMPT), data["mask"]], 1).long()
    built = {}
    for kind in ("critic", "reward"):
        model = models[f"_get_{kind}_model"](FakePretrained, TableBackbone)(config).double()
        nn.init.ones_(model.score.weight)
        built[kind] = model.eval()
    values = built["critic"](input_ids, action_mask=data["mask"], attention_mask=attention)
    scores = built["reward"](input_ids, attention_mask=attention)
    pairwise = functions_of(
        installed("openrlhf", "openrlhf/models/loss.py"), {"PairWiseLoss"}, nn=nn, F=nn.functional
    )
    chosen, rejected = (data[name].clone().requires_grad_() for name in ("chosen", "rejected"))
    loss = pairwise["PairWiseLoss"]()(chosen, rejected)
    grads = torch.autograd.grad(loss, [chosen, rejected])
    return {
        "token_rewards": placed.tolist(),
        "values": values.tolist(),
        "scores": scores.tolist(),
        "pair_loss": loss.item(),
        "pair_grads": [grad.tolist() for grad in grads],
    }


def run_trl(data: dict[str, torch.Tensor]) -> dict:
    logits = torch.cat([data["chosen"], data["rejected"]])[:, None].requires_grad_()
    trainer = SimpleNamespace(
        model=SimpleNamespace(training=False),
        args=SimpleNamespace(center_rewards_coefficient=None),
        accelerator=SimpleNamespace(gather=lambda x: x, gather_for_metrics=lambda x: x),
        _metrics={"eval": defaultdict(list)},
        _total_train_tokens=0,
    )
    loss = RewardTrainer.compute_loss(trainer, lambda **_: SimpleNamespace(logits=logits), {})
    (grad,) = torch.autograd.grad(loss, logits)
    return {"pair_loss": loss.item(), "pair_grads": grad.view(2, -1).tolist()}


def main() -> None:
    data = inputs()
    result = {
        "versions": {name: version(name) for name in ("verl", "openrlhf", "trl", "torch")},
        "prompt_length": PROMPT,
        "inputs": {name: value.tolist() for name, value in data.items()},
        "verl": run_verl(data),
        "openrlhf": run_openrlhf(data),
        "trl": run_trl(data),
    }
    path = Path(__file__).with_name("critic_vs_reward.json")
    path.write_text(json.dumps(result) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
