r"""生成 clip.json：verl 与 OpenRLHF 的裁剪损失在一组小张量上的数值与梯度。

测试不能依赖这两个库（它们要求的 transformers 版本与本项目冲突），所以在外面跑一次，把输入、输出和版本冻结下来。
两个参数是已有的源码目录；本脚本只导入其中算损失的模块，用不到的依赖以空模块代替：

    python tests/golden/make_clip.py --verl 目录 --openrlhf 目录
"""

import argparse
import importlib
import json
import sys
import types
from pathlib import Path

import torch

RATIOS = [0.3, 0.75, 0.95, 1.1, 1.25, 1.5, 4.0]
CONFIG = {"clip_low": 0.2, "clip_high": 0.28, "dual_clip": 3.0, "value_clip": 0.5}


def inputs() -> dict[str, torch.Tensor]:
    """三条回答、每条七个 token；概率比覆盖所有区间，优势覆盖正、负、零。"""
    generator = torch.Generator().manual_seed(20261124)
    ratio = torch.tensor([RATIOS, RATIOS, RATIOS[::-1]], dtype=torch.float64)
    old_log_probs = -torch.rand(3, 7, generator=generator, dtype=torch.float64) * 3 - 1.5
    advantages = torch.tensor(
        [[1.5] * 7, [-0.7] * 7, [0.4, -2.0, 0.0, -1.1, 0.9, 0.0, -0.3]], dtype=torch.float64
    )
    loss_mask = torch.ones(3, 7, dtype=torch.float64)
    loss_mask[1, 2:4] = 0
    old_values = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    values = old_values + 0.9 * torch.randn(3, 7, generator=generator, dtype=torch.float64)
    returns = torch.randn(3, 7, generator=generator, dtype=torch.float64)
    return {
        "log_probs": old_log_probs + ratio.log(),
        "old_log_probs": old_log_probs,
        "advantages": advantages,
        "loss_mask": loss_mask,
        "values": values,
        "old_values": old_values,
        "returns": returns,
    }


def per_token(loss_of_mask, variable: torch.Tensor) -> dict[str, list]:
    """库只返回标量：用只含一个 token 的掩码逐个取损失，用全一掩码取梯度。"""
    losses = torch.zeros_like(variable)
    for index in range(variable.numel()):
        mask = torch.zeros_like(variable)
        mask.view(-1)[index] = 1
        losses.view(-1)[index] = loss_of_mask(variable, mask).detach()
    leaf = variable.clone().requires_grad_()
    loss_of_mask(leaf, torch.ones_like(variable)).backward()
    return {"loss": losses.tolist(), "grad": (leaf.grad * variable.numel()).tolist()}


def stub(name: str, **attributes) -> None:
    module = types.ModuleType(name)
    module.__path__ = []
    for key, value in attributes.items():
        setattr(module, key, value)
    sys.modules[name] = module


def load_file(name: str, path: Path) -> types.ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


class ActorConfig(dict):
    """verl 的损失函数只读这几个字段。"""

    clip_ratio = 0.2
    clip_ratio_low = CONFIG["clip_low"]
    clip_ratio_high = CONFIG["clip_high"]
    global_batch_info: dict = {}


def load_verl(root: Path) -> types.ModuleType:
    stub("omegaconf", DictConfig=dict)
    stub("tensordict", TensorDict=dict)
    stub("verl", __version__="")
    stub("verl.utils")
    stub("verl.utils.device", get_device_name=lambda: "cpu", get_torch_device=lambda: torch.cpu)
    stub("verl.utils.import_utils", deprecated=lambda replacement: lambda function: function)
    stub("verl.trainer")
    stub("verl.trainer.config", AlgoConfig=type("AlgoConfig", (), {}))
    stub("verl.workers")
    stub("verl.workers.config", ActorConfig=ActorConfig)
    groupwise = load_file("verl.utils.groupwise", root / "verl/utils/groupwise.py")
    sys.modules["verl.utils"].as_torch_index = groupwise.as_torch_index
    sys.modules["verl.utils"].group_mean_std = groupwise.group_mean_std
    functional = load_file("verl.utils.torch_functional", root / "verl/utils/torch_functional.py")
    sys.modules["verl.utils"].torch_functional = functional
    return load_file("verl.trainer.ppo.core_algos", root / "verl/trainer/ppo/core_algos.py")


def run_verl(root: Path, data: dict[str, torch.Tensor]) -> dict:
    algos = load_verl(root)
    result = {}
    for name in ["vanilla", "cispo"]:
        function = algos.get_policy_loss_fn(name)

        def call(log_probs, mask, function=function):
            return function(
                old_log_prob=data["old_log_probs"],
                log_prob=log_probs,
                advantages=data["advantages"],
                response_mask=mask,
                config=ActorConfig(clip_ratio_c=CONFIG["dual_clip"]),
            )

        result[name] = per_token(lambda x, m, call=call: call(x, m)[0], data["log_probs"])
        result[name]["metrics"] = call(data["log_probs"], data["loss_mask"])[1]

    def value(values, mask):
        return algos.compute_value_loss(
            vpreds=values,
            returns=data["returns"],
            values=data["old_values"],
            response_mask=mask,
            cliprange_value=CONFIG["value_clip"],
        )[0]

    result["value"] = per_token(value, data["values"])
    return result


def run_openrlhf(root: Path, data: dict[str, torch.Tensor]) -> dict:
    def masked_mean(tensor, mask, dim=None):
        return (tensor * mask).sum(dim=dim) / mask.sum(dim=dim)

    stub("openrlhf")
    stub("openrlhf.models")
    stub("openrlhf.models.utils", masked_mean=masked_mean)
    loss_module = load_file("openrlhf.models.loss", root / "openrlhf/models/loss.py")
    result = {}
    for name, dual_clip in [("ppo", None), ("dual_clip", CONFIG["dual_clip"])]:
        policy = loss_module.PolicyLoss(CONFIG["clip_low"], CONFIG["clip_high"], dual_clip=dual_clip)

        def call(log_probs, mask, policy=policy):
            return policy(log_probs, data["old_log_probs"], data["advantages"], action_mask=mask)

        result[name] = per_token(lambda x, m, call=call: call(x, m)[0], data["log_probs"])
        result[name]["clip_ratio"] = call(data["log_probs"], data["loss_mask"])[1].item()
    value = loss_module.ValueLoss(CONFIG["value_clip"])
    result["value"] = per_token(
        lambda x, m: value(x, data["old_values"], data["returns"], action_mask=m), data["values"]
    )
    return result


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verl", type=Path, required=True)
    parser.add_argument("--openrlhf", type=Path, required=True)
    args = parser.parse_args()
    data = inputs()
    golden = {
        "versions": {
            "verl": (args.verl / "verl/version/version").read_text().strip(),
            "openrlhf": (args.openrlhf / "version.txt").read_text().strip(),
            "torch": torch.__version__,
        },
        "config": CONFIG,
        "inputs": {key: value.tolist() for key, value in data.items()},
        "verl": run_verl(args.verl, data),
        "openrlhf": run_openrlhf(args.openrlhf, data),
    }
    path = Path(__file__).with_name("clip.json")
    path.write_text(json.dumps(golden) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
