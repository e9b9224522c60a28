r"""生成 dapo.json：verl 与 OpenRLHF 的 DAPO 部件在小输入上的结果。

冻结四样：verl 两个 DAPO 奖励管理器与 OpenRLHF 的长度惩罚、verl 按组过滤的结果、verl 策略损失按 token 平均的数值与梯度。
两个参数是已有的源码目录；本脚本只导入其中用到的模块，用不到的依赖以空模块代替：

    python tests/golden/make_dapo.py --verl 目录 --openrlhf 目录
"""

import argparse
import asyncio
import json
from pathlib import Path
from types import SimpleNamespace

import torch
from make_clip import ActorConfig, load_file, load_verl, stub

MAX_LENGTH, BUFFER = 20, 4
LENGTHS = [1, 15, 16, 17, 18, 19, 20, 23]
GROUPS = {
    "mixed": [1.0, -1.0, -1.0],
    "all-right": [1.0, 1.0, 1.0],
    "all-wrong": [-1.0, -1.0, -1.0],
    "one-wrong": [1.0, 1.0, -1.0],
    "equal-tenths": [0.1, 0.1, 0.1],
}


class Batch:
    """verl 的 DataProto 里用得到的那几样：逐条取、按名字取张量。"""

    def __init__(self, lengths: list[int]):
        width = max(lengths)
        self.batch = {"responses": torch.ones(len(lengths), width, dtype=torch.long)}
        self.items = [
            SimpleNamespace(
                batch={
                    "prompts": torch.ones(2, dtype=torch.long),
                    "responses": torch.ones(width, dtype=torch.long),
                    "attention_mask": torch.cat([torch.ones(2), (torch.arange(width) < n)]).long(),
                },
                non_tensor_batch={"reward_model": {"ground_truth": ""}, "data_source": ""},
            )
            for n in lengths
        ]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def register(name: str):
    """奖励管理器的登记装饰器：这里不登记。"""
    return lambda cls: cls


def run_reward_managers(root: Path) -> dict:
    tokenizer = SimpleNamespace(decode=lambda ids, skip_special_tokens: "x", eos_token="</s>")
    overlong = SimpleNamespace(enable=True, len=BUFFER, penalty_factor=1.0, log=False)
    stub("verl", DataProto=object)
    stub("verl.utils.reward_score", default_compute_score=None)
    stub("verl.workers.reward_manager", register=register)
    base = type("AbstractRewardManager", (), {"_extract_reward_from_rm_scores": lambda *args: None})
    stub("verl.workers.reward_manager.abstract", AbstractRewardManager=base)
    worker = load_file("verl.workers.reward_manager.dapo", root / "verl/workers/reward_manager/dapo.py")
    manager = worker.DAPORewardManager(
        tokenizer, 0, compute_score=lambda **_: -1.0, max_resp_len=MAX_LENGTH, overlong_buffer_cfg=overlong
    )
    rewards = manager(Batch(LENGTHS)).sum(dim=1)

    class LoopBase:
        def __init__(self, config, tokenizer, compute_score):
            self.tokenizer, self.loop = tokenizer, asyncio.get_event_loop()

    stub("verl.experimental")
    stub("verl.experimental.reward_loop")
    stub("verl.experimental.reward_loop.reward_manager", register=register)
    stub("verl.experimental.reward_loop.reward_manager.base", RewardManagerBase=LoopBase)
    loop_module = load_file(
        "verl.experimental.reward_loop.reward_manager.dapo",
        root / "verl/experimental/reward_loop/reward_manager/dapo.py",
    )

    async def run_loop() -> list[float]:
        config = SimpleNamespace(
            reward={"reward_kwargs": {"overlong_buffer_cfg": overlong, "max_resp_len": MAX_LENGTH}}
        )
        loop_manager = loop_module.DAPORewardManager(config, tokenizer, lambda **_: -1.0)
        results = []
        for item in Batch(LENGTHS).items:
            result = await loop_manager.run_single([item])
            results.append(float(result["reward_score"]))
        return results

    return {"worker": rewards.tolist(), "loop": asyncio.run(run_loop())}


def run_filter(root: Path) -> list[str]:
    """`ReplayBuffer._dapo_filtered_keys`：返回被丢掉的组名。"""
    rewards = {f"{name}_{i}": value for name, values in GROUPS.items() for i, value in enumerate(values)}

    def kv_batch_get(keys, partition_id, select_fields):
        return {"extra_fields": [{"reward_extra_info": {"acc": rewards[key]}} for key in keys]}

    stub("transfer_queue", KVBatchMeta=object, kv_batch_get=kv_batch_get)
    skip = type("SkipManager", (), {"annotate_tq": staticmethod(lambda **_: lambda function: function)})
    stub("verl.utils.skip", SkipManager=skip)
    stub("omegaconf", DictConfig=dict)
    module = load_file("verl.trainer.ppo.v1.replay_buffer", root / "verl/trainer/ppo/v1/replay_buffer.py")
    buffer = module.ReplayBuffer(
        "sync", {}, 1, "drop", {}, refill_fn=lambda n: None, filter_groups_metric="acc"
    )
    buffer.partitions["train"] = {key: {} for key in rewards}
    buffer.finished_keys["train"] = set(GROUPS)
    return sorted(buffer._dapo_filtered_keys("train")[0])


def loss_inputs() -> dict[str, torch.Tensor]:
    """四条长度不同的回答，比值落在各个区间；优势每条一个数。"""
    generator = torch.Generator().manual_seed(20261124)
    ratio = torch.tensor([[0.5, 0.9, 1.1, 1.25, 1.5, 4.0]], dtype=torch.float64).expand(4, 6)
    old = -torch.rand(4, 6, generator=generator, dtype=torch.float64) * 3 - 1.5
    mask = torch.arange(6)[None, :] < torch.tensor([6, 2, 5, 3])[:, None]
    advantages = torch.tensor([1.4, -0.6, -1.1, 0.3], dtype=torch.float64)
    return {"log_probs": old + ratio.log(), "old_log_probs": old, "advantages": advantages, "loss_mask": mask}


def run_loss(root: Path, data: dict[str, torch.Tensor]) -> dict:
    """官方脚本的设置：clip_ratio_low=0.2、clip_ratio_high=0.28、clip_ratio_c=10、loss_agg_mode=token-mean。"""
    vanilla = load_verl(root).get_policy_loss_fn("vanilla")
    leaf = data["log_probs"].clone().requires_grad_()
    loss, _ = vanilla(
        old_log_prob=data["old_log_probs"],
        log_prob=leaf,
        advantages=data["advantages"][:, None].expand(4, 6),
        response_mask=data["loss_mask"].double(),
        loss_agg_mode="token-mean",
        config=ActorConfig(clip_ratio_c=10.0),
    )
    loss.backward()
    return {"loss": loss.item(), "grad": leaf.grad.tolist()}


def run_openrlhf(root: Path) -> list[float]:
    stub("openrlhf")
    stub("openrlhf.utils")
    stub("openrlhf.utils.logging_utils", init_logger=lambda name: None)
    module = load_file("length_penalty", root / "openrlhf/trainer/ppo_utils/length_penalty.py")
    experience = SimpleNamespace(
        response_length=torch.tensor(LENGTHS), rewards=torch.full((len(LENGTHS),), -1.0, dtype=torch.float64)
    )
    module.apply_overlong_penalty([experience], MAX_LENGTH, float(BUFFER))
    return experience.rewards.tolist()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verl", type=Path, required=True)
    parser.add_argument("--openrlhf", type=Path, required=True)
    args = parser.parse_args()
    data = loss_inputs()
    golden = {
        "versions": {
            "verl": (args.verl / "verl/version/version").read_text().strip(),
            "openrlhf": (args.openrlhf / "version.txt").read_text().strip(),
            "torch": torch.__version__,
        },
        "penalty": {"max_length": MAX_LENGTH, "buffer": BUFFER, "lengths": LENGTHS, "correctness": -1.0},
        "groups": GROUPS,
        "loss_inputs": {key: value.tolist() for key, value in data.items()},
        "verl_loss": run_loss(args.verl, data),
        "verl_rewards": run_reward_managers(args.verl),
        "verl_dropped_groups": run_filter(args.verl),
        "openrlhf_rewards": run_openrlhf(args.openrlhf),
    }
    path = Path(__file__).with_name("dapo.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
