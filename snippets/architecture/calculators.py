"""参数量、计算量、KV cache 的计算器：算式都来自同名的参考实现。

页面：docs/architecture/parameter-count.md、docs/architecture/kv-cache.md
不包含：MoE、MLA 的参数量（页面里的函数能算，滑块不带）。
"""

from dataclasses import asdict

from snippets.architecture.kv_cache import decode_step_seconds, kv_cache_bytes
from snippets.architecture.model_configs import DENSE_CONFIGS, DenseConfig
from snippets.architecture.parameter_count import (
    forward_flops,
    llama_matmul_params,
    llama_num_params,
    training_flops,
)
from snippets.calculator import Calculator, Choice, Input, Output

__all__ = ["PARAMETERS", "COMPUTE", "KV_CACHE"]

LAYERS = Input("num_layers", "层数 L", "L", 32, 1, 256)
HIDDEN = Input("hidden_size", "模型宽度 C", "C", 4096, 256, 32768, is_log=True)
INNER = Input("intermediate_size", "前馈内宽 F", "F", 14336, 256, 131072, is_log=True)
HEADS = Input("num_heads", "查询头数 H", "H", 32, 1, 256)
KV_HEADS = Input("num_kv_heads", "键值头数 K", "K", 8, 1, 256)
HEAD_DIM = Input("head_dim", "每头维数 d", "d", 128, 16, 512, is_log=True)
VOCAB = Input("vocab_size", "词表 V", "V", 128256, 1000, 300000, step=1000)
TIE = Choice("tie_embeddings", "词嵌入与输出头", {"no": "词嵌入不共享", "yes": "词嵌入共享"}, "no")
BIAS = Choice("qkv_bias", "q、k、v 的偏置", {"no": "无偏置", "yes": "有偏置"}, "no")


def _shape(config: DenseConfig) -> dict[str, int | str]:
    """一个公开模型的形状，写成计算器的输入与选择。"""
    flags = {True: "yes", False: "no"}
    return {
        name: flags[value] if isinstance(value, bool) else value for name, value in asdict(config).items()
    }


def _num_params(
    *,
    num_layers,
    hidden_size,
    intermediate_size,
    num_heads,
    num_kv_heads,
    head_dim,
    vocab_size,
    tie_embeddings,
    qkv_bias,
):
    return llama_num_params(
        num_layers=num_layers,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=vocab_size,
        tie_embeddings=tie_embeddings == "yes",
        qkv_bias=qkv_bias == "yes",
    )


PARAMETERS = Calculator(
    name="parameters",
    title="参数量：LLaMA 式稠密模型",
    inputs=(LAYERS, HIDDEN, INNER, HEADS, KV_HEADS, HEAD_DIM, VOCAB),
    choices=(TIE, BIAS),
    outputs=(Output("num_params", "参数量", "N", "count", _num_params),),
    presets={model: _shape(config) for model, config in DENSE_CONFIGS.items()},
)


def _simple_flops(*, num_params, num_tokens):
    forward = forward_flops(
        num_params=num_params, num_tokens=num_tokens, num_layers=0, attention_width=0, visible_keys=0
    )
    return training_flops(forward=forward)


def _flops(*, num_params, num_tokens, num_layers, attention_width, sequence_length, recompute):
    forward = forward_flops(
        num_params=num_params,
        num_tokens=num_tokens,
        num_layers=num_layers,
        attention_width=attention_width,
        visible_keys=(sequence_length + 1) / 2,  # 因果：第 i 个 token 看得见 i 个键
    )
    return training_flops(forward=forward, recompute=recompute == "full")


def _training_seconds(*, flops, num_gpus, peak_flops, utilization):
    return flops / (num_gpus * peak_flops * utilization)


def _compute_presets() -> dict[str, dict[str, int | float | str]]:
    rows = {}
    for model in ("Llama-2-7B", "Llama-2-70B", "Llama-3-8B", "Llama-3-70B", "Qwen2.5-7B", "Qwen2.5-72B"):
        config = DENSE_CONFIGS[model]
        params = llama_matmul_params(
            hidden_size=config.hidden_size,
            intermediate_size=config.intermediate_size,
            num_layers=config.num_layers,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_dim,
            vocab_size=config.vocab_size,
        )
        rows[model] = {
            "num_params": params / 1e9,
            "num_layers": config.num_layers,
            "attention_width": config.num_heads * config.head_dim,
        }
    return rows


COMPUTE = Calculator(
    name="compute",
    title="训练计算量与时间",
    inputs=(
        Input(
            "num_params", "做矩阵乘的参数 N（十亿）", "N", 7.504658432, 0.01, 2000, is_log=True, scale=10**9
        ),
        Input("num_tokens", "训练 token 数 D（十亿）", "D", 1000, 1, 50000, is_log=True, scale=10**9),
        LAYERS,
        Input("attention_width", "注意力宽度 Hd", "A", 4096, 256, 32768, is_log=True),
        Input("sequence_length", "序列长度 T", "T", 8192, 512, 1048576, is_log=True),
        Input("num_gpus", "GPU 数", "G", 1024, 1, 65536, is_log=True),
        Input("peak_flops", "单卡峰值（TFLOP/s）", "P", 989, 10, 5000, scale=10**12),
        Input("utilization", "利用率 MFU（%）", "u", 40, 1, 100, scale=0.01),
    ),
    choices=(Choice("recompute", "激活重算", {"none": "不重算", "full": "全量重算"}, "none"),),
    outputs=(
        Output("simple_flops", "6ND", "C_0", "flops", _simple_flops),
        Output("flops", "连注意力一起算", "C_1", "flops", _flops),
        Output("seconds", "时间", "t", "seconds", _training_seconds),
    ),
    presets=_compute_presets(),
)


def _bytes_per_token(*, num_layers, num_kv_heads, head_dim, bytes_per_element):
    return kv_cache_bytes(
        num_layers=num_layers,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        num_tokens=1,
        batch_size=1,
        bytes_per_element=bytes_per_element,
    )


def _step_seconds(*, weight_bytes, cache, bandwidth):
    return decode_step_seconds(weight_bytes=weight_bytes, cache_bytes=cache, bandwidth=bandwidth)


KV_CACHE = Calculator(
    name="kv-cache",
    title="KV cache 的大小，与解码一步的时间下界",
    inputs=(
        LAYERS,
        KV_HEADS,
        HEAD_DIM,
        Input("num_tokens", "每条序列的 token 数 S", "S", 8192, 1, 1048576, is_log=True),
        Input("batch_size", "序列条数 B", "B", 1, 1, 1024, is_log=True),
        Input("bytes_per_element", "每个元素几字节 c", "c", 2, 0.5, 4, step=0.5),
        Input("weight_bytes", "权重（GB）", "W", 16.06, 0.1, 2000, is_log=True, scale=10**9),
        Input("bandwidth", "显存带宽（GB/s）", r"\beta", 3350, 50, 10000, step=50, scale=10**9),
    ),
    outputs=(
        Output("per_token", "每个 token", r"\kappa", "bytes", _bytes_per_token),
        Output("cache", "整批的 KV cache", "M", "bytes", kv_cache_bytes),
        Output("step", "解码一步至少", "t", "seconds", _step_seconds),
    ),
    presets={
        model: {
            "num_layers": config.num_layers,
            "num_kv_heads": config.num_kv_heads,
            "head_dim": config.head_dim,
            "weight_bytes": round(2e-9 * _num_params(**_shape(config)), 2),
        }
        for model, config in DENSE_CONFIGS.items()
    },
)
