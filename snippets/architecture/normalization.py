r"""LayerNorm 与 RMSNorm：前向，以及手写的反向。

页面：docs/architecture/normalization.md
不包含：BatchNorm、GroupNorm，以及融合的 CUDA 核。

轴：前面任意多维是批与位置（`*batch`），`C` 是被归一化的最后一维（模型宽度，QK-norm 里是每头维数）。
精度：输入低于 float32 时升到 float32 计算，乘完增益才转回输入的类型；float64 保持 float64。

反向用到的记号：$g$ 是输出的梯度，$u=\gamma\odot g$，$\bar u=\frac1C\sum_iu_i$，$\hat x$ 是乘增益之前的结果，
$r=1/\sqrt{\sigma^2+\epsilon}$（RMSNorm 是 $1/\sqrt{\overline{x^2}+\epsilon}$）。

References:
    Ba, Kiros, Hinton, "Layer Normalization"，https://arxiv.org/abs/1607.06450
    Zhang, Sennrich, "Root Mean Square Layer Normalization"，https://arxiv.org/abs/1910.07467
"""

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["layer_norm", "rms_norm", "layer_norm_backward", "rms_norm_backward"]


# --8<-- [start:layer-norm]
def layer_norm(
    x: Float[Tensor, "*batch C"],
    weight: Float[Tensor, " C"],
    bias: Float[Tensor, " C"],
    *,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch C"]:
    r"""LayerNorm：每个位置在自己的 C 个分量上减均值、除标准差。

    $$
    y=\gamma\odot\frac{x-\mu}{\sqrt{\sigma^2+\epsilon}}+\beta
    $$

    注意：方差除以 C（有偏）；eps 加在根号里面。

    Args:
        x: 输入，在最后一维上归一化。
        weight: 增益 $\gamma$。
        bias: 偏置 $\beta$。
        eps: 加在方差上的稳定项。

    Returns:
        归一化后的张量，形状与类型同 `x`。

    References:
        与 `torch.nn.functional.layer_norm`（2.13.0）一致，默认 eps 也相同。
    """
    x_up = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = x_up - x_up.mean(dim=-1, keepdim=True)
    variance = centered.square().mean(dim=-1, keepdim=True)  # 除以 C
    x_hat = centered * torch.rsqrt(variance + eps)
    return (x_hat * weight + bias).to(x.dtype)


# --8<-- [end:layer-norm]


# --8<-- [start:rms-norm]
def rms_norm(
    x: Float[Tensor, "*batch C"], weight: Float[Tensor, " C"], *, eps: float = 1e-6
) -> Float[Tensor, "*batch C"]:
    r"""RMSNorm：只除以均方根，不减均值，没有偏置。

    $$
    y=\gamma\odot\frac{x}{\sqrt{\frac1C\sum_ix_i^2+\epsilon}}
    $$

    注意：乘增益之后才转回低精度；`LlamaRMSNorm` 先转回再乘。

    Args:
        x: 输入，在最后一维上归一化。
        weight: 增益 $\gamma$；Gemma 存的是 $\gamma-1$，调用时传 `1 + weight`。
        eps: 加在均方上的稳定项。

    Returns:
        归一化后的张量，形状与类型同 `x`。

    References:
        与 `torch.nn.functional.rms_norm`（2.13.0）一致，但它的 eps 默认是机器精度；
        1e-6 是 `transformers` 5.23.0 里 `LlamaConfig.rms_norm_eps` 的默认值。
    """
    x_up = x.to(torch.promote_types(x.dtype, torch.float32))
    mean_square = x_up.square().mean(dim=-1, keepdim=True)
    x_hat = x_up * torch.rsqrt(mean_square + eps)
    return (x_hat * weight).to(x.dtype)


# --8<-- [end:rms-norm]


# --8<-- [start:layer-norm-backward]
def layer_norm_backward(
    grad_output: Float[Tensor, "*batch C"],
    x: Float[Tensor, "*batch C"],
    weight: Float[Tensor, " C"],
    *,
    eps: float = 1e-5,
) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, " C"], Float[Tensor, " C"]]:
    r"""LayerNorm 的反向：减去 u 的均值，再减去沿 x_hat 的分量。

    $$
    \frac{\partial\mathcal L}{\partial x}=r\,\big(u-\bar u-\hat x\,\overline{u\odot\hat x}\big)
    $$

    注意：均值与方差都是 x 的函数，漏掉任何一项都不等于真梯度。

    Args:
        grad_output: 输出的梯度 $g$。
        x: 前向的输入。
        weight: 增益 $\gamma$。
        eps: 与前向相同的稳定项。

    Returns:
        三个梯度：`x`、`weight`、`bias`；后两个在所有位置上求和。

    References:
        与 `torch.autograd` 对 `torch.nn.functional.layer_norm` 求得的一致。
    """
    x_up = x.to(torch.promote_types(x.dtype, torch.float32))
    centered = x_up - x_up.mean(dim=-1, keepdim=True)
    inv_std = torch.rsqrt(centered.square().mean(dim=-1, keepdim=True) + eps)
    x_hat, grad = centered * inv_std, grad_output.to(x_up.dtype)
    u = grad * weight
    along_ones = u.mean(dim=-1, keepdim=True)  # 来自均值
    along_x_hat = x_hat * (u * x_hat).mean(dim=-1, keepdim=True)  # 来自方差
    grad_x = inv_std * (u - along_ones - along_x_hat)
    grad_weight = (grad * x_hat).reshape(-1, x.shape[-1]).sum(dim=0)
    grad_bias = grad.reshape(-1, x.shape[-1]).sum(dim=0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype), grad_bias.to(weight.dtype)


# --8<-- [end:layer-norm-backward]


# --8<-- [start:rms-norm-backward]
def rms_norm_backward(
    grad_output: Float[Tensor, "*batch C"],
    x: Float[Tensor, "*batch C"],
    weight: Float[Tensor, " C"],
    *,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch C"], Float[Tensor, " C"]]:
    r"""RMSNorm 的反向：比 LayerNorm 少减一项均值。

    $$
    \frac{\partial\mathcal L}{\partial x}=r\,\big(u-\hat x\,\overline{u\odot\hat x}\big)
    $$

    注意：eps 不为 0 时这仍是精确的梯度，只是不再与 x 严格正交。

    Args:
        grad_output: 输出的梯度 $g$。
        x: 前向的输入。
        weight: 增益 $\gamma$。
        eps: 与前向相同的稳定项。

    Returns:
        两个梯度：`x`、`weight`；后一个在所有位置上求和。

    References:
        与 `torch.autograd` 对 `torch.nn.functional.rms_norm` 求得的一致。
    """
    x_up = x.to(torch.promote_types(x.dtype, torch.float32))
    inv_rms = torch.rsqrt(x_up.square().mean(dim=-1, keepdim=True) + eps)
    x_hat, grad = x_up * inv_rms, grad_output.to(x_up.dtype)
    u = grad * weight
    grad_x = inv_rms * (u - x_hat * (u * x_hat).mean(dim=-1, keepdim=True))
    grad_weight = (grad * x_hat).reshape(-1, x.shape[-1]).sum(dim=0)
    return grad_x.to(x.dtype), grad_weight.to(weight.dtype)


# --8<-- [end:rms-norm-backward]
