"""公开模型的结构参数：参数量、KV cache、显存与计算量的例子都从这里取。

页面：docs/architecture/parameter-count.md
不包含：权重、分词器、训练设置；只收各模型发布的 `config.json` 里决定形状的几项。

References:
    各模型仓库的 `config.json`；由这些形状算出的总参数量在
    tests/snippets/architecture/test_parameter_count.py 里与 transformers 的模型（meta 设备）逐一相等。
"""

from dataclasses import dataclass

__all__ = ["DenseConfig", "DENSE_CONFIGS"]


@dataclass(frozen=True)
class DenseConfig:
    """LLaMA 一族稠密模型的形状；`num_kv_heads` 在 HF 配置里叫 `num_key_value_heads`。"""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    vocab_size: int
    head_dim: int = 128
    tie_embeddings: bool = False
    qkv_bias: bool = False


DENSE_CONFIGS = {
    "Llama-2-7B": DenseConfig(4096, 11008, 32, 32, 32, 32000),
    "Llama-2-13B": DenseConfig(5120, 13824, 40, 40, 40, 32000),
    "Llama-2-70B": DenseConfig(8192, 28672, 80, 64, 8, 32000),
    "Llama-3-8B": DenseConfig(4096, 14336, 32, 32, 8, 128256),
    "Llama-3-70B": DenseConfig(8192, 28672, 80, 64, 8, 128256),
    "Llama-3.1-405B": DenseConfig(16384, 53248, 126, 128, 8, 128256),
    "Qwen2.5-0.5B": DenseConfig(896, 4864, 24, 14, 2, 151936, 64, tie_embeddings=True, qkv_bias=True),
    "Qwen2.5-1.5B": DenseConfig(1536, 8960, 28, 12, 2, 151936, tie_embeddings=True, qkv_bias=True),
    "Qwen2.5-3B": DenseConfig(2048, 11008, 36, 16, 2, 151936, tie_embeddings=True, qkv_bias=True),
    "Qwen2.5-7B": DenseConfig(3584, 18944, 28, 28, 4, 152064, qkv_bias=True),
    "Qwen2.5-14B": DenseConfig(5120, 13824, 48, 40, 8, 152064, qkv_bias=True),
    "Qwen2.5-32B": DenseConfig(5120, 27648, 64, 40, 8, 152064, qkv_bias=True),
    "Qwen2.5-72B": DenseConfig(8192, 29568, 80, 64, 8, 152064, qkv_bias=True),
}
