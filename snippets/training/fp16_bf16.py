r"""浮点格式的位布局、就近偶数舍入、随机舍入、动态损失缩放与分块的 FP8 量化。

页面：docs/training/fp16-bf16.md
不包含：混合精度的自动类型转换（autocast）、张量核的真实累加器、MXFP8 与 FP4、梯度累积时的缩放。
数据类型：`round_to_format` 与 `chunked_sum` 用 float64 装低精度的值（都能精确表示）；其余输入是 float32。

记号：指数 $k$ 位、尾数 $m$ 位，偏置 $2^{k-1}-1$；IEEE 指最大的指数留给无穷与 NaN。

References:
    Micikevicius 等, "Mixed Precision Training", §3，https://arxiv.org/abs/1710.03740
    Micikevicius 等, "FP8 Formats for Deep Learning", 表 1，https://arxiv.org/abs/2209.05433
    DeepSeek-AI, "DeepSeek-V3 Technical Report", §3.3.2，https://arxiv.org/abs/2412.19437
    torch 2.13.0：`tensor.to` 的舍入逐位一致（NaN 只保证仍是 NaN）；`torch/amp/grad_scaler.py`。
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import BFloat16, Float, Float32, Float64, Int32
from torch import Tensor

__all__ = [
    "FORMATS",
    "DynamicLossScaler",
    "FloatFormat",
    "chunked_sum",
    "decode",
    "format_limits",
    "quantize_e4m3_blocks",
    "round_to_format",
    "stochastic_to_bf16",
    "to_bf16",
]


class FloatFormat(NamedTuple):
    """一种二进制浮点格式：1 位符号，`exponent_bits` 位指数，`mantissa_bits` 位尾数。"""

    exponent_bits: int
    mantissa_bits: int
    ieee: bool = True

    @property
    def bias(self) -> int:
        """指数的偏置。"""
        return 2 ** (self.exponent_bits - 1) - 1


FORMATS = {
    "FP32": FloatFormat(8, 23),
    "TF32": FloatFormat(8, 10),
    "FP16": FloatFormat(5, 10),
    "BF16": FloatFormat(8, 7),
    "FP8 E4M3": FloatFormat(4, 3, ieee=False),
    "FP8 E5M2": FloatFormat(5, 2),
}


# --8<-- [start:decode]
def decode(bits: int, fmt: FloatFormat) -> float:
    r"""一个位模式代表的数。

    $$(-1)^s\,2^{e-\text{bias}}\,(1+f/2^m)$$

    注意：$e=0$ 时没有隐含的 1，指数按 $e=1$ 算（次正规数）；E4M3 没有无穷，只有全 1 是 NaN。

    Args:
        bits: 非负整数，从高到低是符号、指数、尾数。
        fmt: 格式。

    Returns:
        精确的值；无穷与 NaN 照样返回。
    """
    exponent_mask, mantissa_mask = 2**fmt.exponent_bits - 1, 2**fmt.mantissa_bits - 1
    sign = -1.0 if bits >> (fmt.exponent_bits + fmt.mantissa_bits) else 1.0
    exponent = (bits >> fmt.mantissa_bits) & exponent_mask
    mantissa = bits & mantissa_mask
    if exponent == exponent_mask and (fmt.ieee or mantissa == mantissa_mask):
        return sign * math.inf if fmt.ieee and mantissa == 0 else math.nan
    if exponent == 0:
        exponent = 1
    else:
        mantissa += 2**fmt.mantissa_bits
    return sign * mantissa * 2.0 ** (exponent - fmt.bias - fmt.mantissa_bits)


# --8<-- [end:decode]
def format_limits(fmt: FloatFormat) -> dict[str, float]:
    """从位模式读出四个极限，键名与 `torch.finfo` 的属性相近。

    Args:
        fmt: 格式。

    Returns:
        `max`、`smallest_normal`、`smallest_subnormal`、`eps`（1 到下一个数的距离）。
    """
    one = fmt.bias << fmt.mantissa_bits
    infinity = (2**fmt.exponent_bits - 1) << fmt.mantissa_bits
    largest = infinity - 1 if fmt.ieee else infinity + 2**fmt.mantissa_bits - 2
    return {
        "max": decode(largest, fmt),
        "smallest_normal": decode(1 << fmt.mantissa_bits, fmt),
        "smallest_subnormal": decode(1, fmt),
        "eps": decode(one + 1, fmt) - 1.0,
    }


# --8<-- [start:round]
def round_to_format(x: Float64[Tensor, "*shape"], fmt: FloatFormat) -> Float64[Tensor, "*shape"]:
    """就近舍入，正好一半时取偶数；超出最大值时 IEEE 格式得无穷，E4M3 饱和到 448。

    注意：格距在最小正规数以下不再变小，这就是次正规数。

    Args:
        x: 要舍入的数；float64 的位用来取指数。
        fmt: 目标格式。

    Returns:
        舍入后的值，仍装在 float64 里。
    """
    exponent = ((x.view(torch.int64) >> 52) & 0x7FF) - 1023
    exponent = exponent.clamp(min=1 - fmt.bias)
    spacing = ((exponent - fmt.mantissa_bits + 1023) << 52).view(torch.float64)  # 2 的整数次幂
    rounded = (x / spacing).round() * spacing  # torch.round 取偶
    largest = format_limits(fmt)["max"]
    if not fmt.ieee:
        return rounded.clamp(-largest, largest)
    return torch.where(rounded.abs() > largest, rounded.sign() * math.inf, rounded)


# --8<-- [end:round]
# --8<-- [start:bf16]
def _keep_high_half(x: Float32[Tensor, "*shape"], increment: Tensor) -> BFloat16[Tensor, "*shape"]:
    high = (x.view(torch.int32) + increment) >> 16
    high = torch.where(x.isnan(), 0x7FC0, high)  # 不单独处理，进位会把 NaN 变成无穷或负零
    return high.to(torch.int16).view(torch.bfloat16)


def to_bf16(x: Float32[Tensor, "*shape"]) -> BFloat16[Tensor, "*shape"]:
    """就近取偶：低 16 位加 0x7FFF 再加保留部分的末位，然后截掉。

    Args:
        x: float32。

    Returns:
        bf16，与 `x.to(torch.bfloat16)` 逐位相同；NaN 一律写成 0x7FC0。
    """
    return _keep_high_half(x, ((x.view(torch.int32) >> 16) & 1) + 0x7FFF)


def stochastic_to_bf16(
    x: Float32[Tensor, "*shape"], noise: Int32[Tensor, "*shape"]
) -> BFloat16[Tensor, "*shape"]:
    """随机舍入：低 16 位加均匀的噪声再截掉，进位的概率正是低位占一格的比例，期望等于 x。

    Args:
        x: float32。
        noise: 0 到 65535 的均匀整数。

    Returns:
        上下相邻的两个 bf16 之一；本来就能表示的数不变。
    """
    return _keep_high_half(x, noise)


# --8<-- [end:bf16]
def chunked_sum(
    terms: Float64[Tensor, "N ..."], fmt: FloatFormat, *, interval: int
) -> Float64[Tensor, "..."]:
    """逐项相加，每加一次舍入到 `fmt`；每 `interval` 项把部分和加进 FP32 的总和。

    Args:
        terms: 要加的 N 项，从前往后加。
        fmt: 累加器的格式。
        interval: 多少项提升一次；不小于 N 就是从不提升。

    Returns:
        FP32 的总和。
    """
    total = torch.zeros_like(terms[0])
    for chunk in terms.split(interval):
        partial = torch.zeros_like(total)
        for term in chunk:
            partial = round_to_format(partial + term, fmt)
        total = round_to_format(total + partial, FORMATS["FP32"])
    return total


# --8<-- [start:scaler]
class DynamicLossScaler:
    """动态损失缩放：溢出就跳过这一步并减小倍数，连续若干步正常就放大。

    注意：倍数是 Python 浮点数，没有 `GradScaler` 的 float32 上限。

    Args:
        init_scale: 初始倍数 $S$。
        growth_factor: 放大的因子。
        backoff_factor: 减小的因子。
        growth_interval: 连续多少步没有溢出才放大。
    """

    def __init__(
        self,
        *,
        init_scale: float = 65536.0,
        growth_factor: float = 2.0,
        backoff_factor: float = 0.5,
        growth_interval: int = 2000,
    ) -> None:
        if init_scale <= 0 or growth_interval < 1:
            raise ValueError(
                f"init_scale={init_scale}、growth_interval={growth_interval}：倍数要大于 0，间隔至少 1 步。"
            )
        self.scale, self.good_steps = init_scale, 0
        self.growth_factor, self.backoff_factor = growth_factor, backoff_factor
        self.growth_interval = growth_interval

    def step(
        self,
        param: Float32[Tensor, "*shape"],
        scaled_grad: Float[Tensor, "*shape"],
        *,
        lr: float,
        max_norm: float,
    ) -> Float32[Tensor, "*shape"]:
        """用放大了 $S$ 倍的梯度走一步 SGD：先除回来，再查溢出，再裁剪，最后更新。

        Args:
            param: float32 主权重。
            scaled_grad: 损失乘 $S$ 之后反传得到的梯度，通常是 fp16。
            lr: 学习率。
            max_norm: 梯度范数的上限，量的是除回来之后的梯度。

        Returns:
            新的参数；有溢出时原样返回。
        """
        grad = scaled_grad.float() / self.scale
        if not grad.isfinite().all():
            self.scale, self.good_steps = self.scale * self.backoff_factor, 0
            return param
        self.good_steps += 1
        if self.good_steps == self.growth_interval:
            self.scale, self.good_steps = self.scale * self.growth_factor, 0
        return param - lr * grad * (max_norm / grad.norm()).clamp(max=1.0)


# --8<-- [end:scaler]
# --8<-- [start:blocks]
def quantize_e4m3_blocks(
    x: Float32[Tensor, "M N"], *, block: tuple[int, int]
) -> tuple[Float32[Tensor, "M N"], Float32[Tensor, "m n"]]:
    """每块按自己的最大绝对值缩放到 448，再舍入到 E4M3。

    Args:
        x: 矩阵，两边都能被块整除。
        block: 块的行数与列数；DeepSeek-V3 的激活是 (1, 128)，权重是 (128, 128)。

    Returns:
        除回缩放之后的值；每块的缩放（全零的块是 1）。
    """
    rows, cols = block
    tiles = x.unflatten(1, (-1, cols)).unflatten(0, (-1, rows))  # (m, rows, n, cols)
    amax = tiles.abs().amax(dim=(1, 3), keepdim=True)
    scales = torch.where(amax == 0, 1.0, amax / 448.0)
    values = round_to_format((tiles / scales).double(), FORMATS["FP8 E4M3"]).float()
    return (values * scales).reshape(x.shape), scales[:, 0, :, 0]


# --8<-- [end:blocks]
