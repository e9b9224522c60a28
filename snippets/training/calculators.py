"""训练显存的计算器：模型状态按 ZeRO 分片，激活按重算与并行，算式都来自同名的参考实现。

页面：docs/training/memory.md
不包含：流水线并行、卸载、分配器的碎片与通信缓冲；激活是 GPT 块（内宽 4C、GELU）的公式。
"""

from dataclasses import asdict

from snippets.architecture.calculators import HEADS, HIDDEN, LAYERS
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.parameter_count import llama_num_params
from snippets.calculator import Calculator, Choice, Input, Output
from snippets.training.memory import activation_bytes, output_bytes
from snippets.training.zero import zero_model_state_bytes

__all__ = ["TRAINING_MEMORY"]

PRECISIONS = {
    "mixed": {"weight_bytes": 2, "grad_bytes": 2, "optimizer_bytes": 12},
    "mixed-fp32-grad": {"weight_bytes": 2, "grad_bytes": 4, "optimizer_bytes": 12},
    "fp32": {"weight_bytes": 4, "grad_bytes": 4, "optimizer_bytes": 8},
    "bf16": {"weight_bytes": 2, "grad_bytes": 2, "optimizer_bytes": 4},
}


def _states(*, num_params, tp_size, dp_size, stage, precision):
    return (
        zero_model_state_bytes(num_params, stage=int(stage), dp_size=dp_size, **PRECISIONS[precision])
        / tp_size
    )


def _activations(*, num_layers, batch_size, num_tokens, hidden_size, num_heads, tp_size, recompute):
    return activation_bytes(
        num_layers=num_layers,
        batch_size=batch_size,
        num_tokens=num_tokens,
        hidden_size=hidden_size,
        num_heads=num_heads,
        tp_size=tp_size,
        sequence_parallel=True,
        recompute=recompute,
    )


def _total(*, states, activations, output):
    return states + activations + output


def _presets() -> dict[str, dict[str, int | float | str]]:
    rows = {}
    for model, config in DENSE_CONFIGS.items():
        params = llama_num_params(**asdict(config))
        rows[model] = {
            "num_params": params / 1e9,
            "num_layers": config.num_layers,
            "hidden_size": config.hidden_size,
            "num_heads": config.num_heads,
            "vocab_size": config.vocab_size,
        }
    return rows


TRAINING_MEMORY = Calculator(
    name="training-memory",
    title="训练显存：每张卡",
    inputs=(
        Input("num_params", "参数量（十亿）", r"\Psi", 6.738415616, 0.01, 2000, is_log=True, scale=10**9),
        LAYERS,
        HIDDEN,
        HEADS,
        Input("vocab_size", "词表 V", "V", 32000, 1000, 300000, step=1000),
        Input("num_tokens", "每条的 token 数 T", "T", 4096, 128, 1048576, is_log=True),
        Input("batch_size", "微批的序列条数 B", "B", 1, 1, 512, is_log=True),
        Input("dp_size", "数据并行 W", "W", 8, 1, 4096, is_log=True),
        Input("tp_size", "张量并行 t", "t", 1, 1, 64, is_log=True),
    ),
    choices=(
        Choice(
            "stage",
            "ZeRO 阶段",
            {"0": "不分片", "1": "ZeRO-1", "2": "ZeRO-2", "3": "ZeRO-3"},
            "0",
        ),
        Choice(
            "precision",
            "精度",
            {
                "mixed": "混合精度（16 字节）",
                "mixed-fp32-grad": "梯度 fp32（18 字节）",
                "fp32": "全 fp32（16 字节）",
                "bf16": "全 bf16（8 字节）",
            },
            "mixed",
        ),
        Choice(
            "recompute",
            "激活",
            {"none": "打分落显存", "selective": "FlashAttention", "full": "全量重算"},
            "selective",
        ),
    ),
    outputs=(
        Output("states", "模型状态", "M_1", "bytes", _states),
        Output("activations", "激活", "M_2", "bytes", _activations),
        Output("output", "输出层", "M_3", "bytes", output_bytes),
        Output("total", "合计", "M", "bytes", _total),
    ),
    presets=_presets(),
)
