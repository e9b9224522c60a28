r"""LayerNorm 与 RMSNorm 的测试。

真值不经过被测代码：手算的小数；PyTorch 的 `F.layer_norm`、`F.rms_norm` 与自动求导；有限差分；
transformers 的 `LlamaRMSNorm`、`Gemma2RMSNorm`（真的运行）。文件末尾逐个定义流传的错误写法，
断言同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import BertConfig, GPT2Config, LlamaConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.t5.modeling_t5 import T5LayerNorm

from snippets.architecture.normalization import layer_norm, layer_norm_backward, rms_norm, rms_norm_backward

B, T, C = 2, 3, 5
F64 = torch.float64


def make_inputs(*shape, dtype=F64, seed=0):
    """x（均值不为 0）、增益、偏置、上游梯度。"""
    generator = torch.Generator().manual_seed(seed)
    shape = shape or (B, T, C)
    x = torch.randn(shape, generator=generator, dtype=F64) + 0.7
    weight = torch.rand(shape[-1], generator=generator, dtype=F64) + 0.5
    bias = torch.randn(shape[-1], generator=generator, dtype=F64)
    grad = torch.randn(shape, generator=generator, dtype=F64)
    return [value.to(dtype) for value in (x, weight, bias, grad)]


def torch_layer_norm(x, weight, bias, eps=1e-5):
    return F.layer_norm(x, x.shape[-1:], weight, bias, eps)


def torch_rms_norm(x, weight, eps=1e-6):
    return F.rms_norm(x, x.shape[-1:], weight, eps)


def autograd(function, inputs, grad, **kwargs):
    inputs = [value.detach().clone().requires_grad_() for value in inputs]
    return torch.autograd.grad(function(*inputs, **kwargs), inputs, grad)


# 手算


def test_both_norms_by_hand():
    r"""x = (1, -1, 3, 5)：均值 2，方差 (1+9+1+9)/4 = 5，均方 (1+1+9+25)/4 = 9。

    LayerNorm 是 (x-2)/√(5+ε)，取 ε = 4 得 (x-2)/3；RMSNorm 取 ε = 7 得 x/4。增益 2，偏置 10。
    """
    x, gain = torch.tensor([1.0, -1.0, 3.0, 5.0], dtype=F64), torch.full((4,), 2.0, dtype=F64)
    expected = torch.tensor([-2 / 3, -2.0, 2 / 3, 2.0], dtype=F64) + 10
    torch.testing.assert_close(layer_norm(x, gain, 5 * gain, eps=4.0), expected)
    torch.testing.assert_close(rms_norm(x, gain, eps=7.0), x / 2)


def test_rms_norm_backward_by_hand():
    r"""x = (3, 4)，C = 2，ε = 0，γ = 1，g = (1, 0)：均方 12.5，r = 1/√12.5，x_hat = r·(3, 4)。

    ∂L/∂x = r(g - x_hat·(g·x_hat)/2) = r(1 - 9/25, -12/25) = r(0.64, -0.48)，与 (3, 4) 正交。
    """
    x, g = torch.tensor([3.0, 4.0], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    grad_x, grad_weight = rms_norm_backward(g, x, torch.ones(2, dtype=F64), eps=0.0)
    torch.testing.assert_close(grad_x, torch.tensor([0.64, -0.48], dtype=F64) / math.sqrt(12.5))
    torch.testing.assert_close(grad_weight, torch.tensor([3.0, 0.0], dtype=F64) / math.sqrt(12.5))


# 与独立实现一致


@pytest.mark.parametrize("shape", [(C,), (4, C), (B, T, C), (B, T, 2, C)])
@pytest.mark.parametrize("eps", [1e-5, 0.3])
def test_forward_and_backward_match_torch(shape, eps):
    x, weight, bias, grad = make_inputs(*shape)
    torch.testing.assert_close(layer_norm(x, weight, bias, eps=eps), torch_layer_norm(x, weight, bias, eps))
    torch.testing.assert_close(rms_norm(x, weight, eps=eps), torch_rms_norm(x, weight, eps))
    for mine, truth in (
        (
            layer_norm_backward(grad, x, weight, eps=eps),
            autograd(torch_layer_norm, (x, weight, bias), grad, eps=eps),
        ),
        (rms_norm_backward(grad, x, weight, eps=eps), autograd(torch_rms_norm, (x, weight), grad, eps=eps)),
    ):
        torch.testing.assert_close(mine, truth)


def test_forward_is_differentiable_and_autograd_agrees_with_torch():
    x, weight, bias, grad = make_inputs()
    torch.testing.assert_close(
        autograd(layer_norm, (x, weight, bias), grad), autograd(torch_layer_norm, (x, weight, bias), grad)
    )
    torch.testing.assert_close(
        autograd(rms_norm, (x, weight), grad), autograd(torch_rms_norm, (x, weight), grad)
    )
    inputs = [value.requires_grad_() for value in (x, weight, bias)]
    assert torch.autograd.gradcheck(layer_norm, inputs)
    assert torch.autograd.gradcheck(rms_norm, inputs[:2])


def test_backward_matches_finite_differences():
    """第二条独立的路：中心差分，不用自动求导。"""
    x, weight, bias, grad = make_inputs(2, C)
    step = 1e-6
    for forward, backward in (
        (lambda x: torch_layer_norm(x, weight, bias), layer_norm_backward),
        (lambda x: torch_rms_norm(x, weight), rms_norm_backward),
    ):
        numeric = torch.zeros_like(x)
        for i in range(2):
            for j in range(C):
                delta = torch.zeros_like(x)
                delta[i, j] = step
                numeric[i, j] = ((forward(x + delta) - forward(x - delta)) * grad).sum() / (2 * step)
        torch.testing.assert_close(backward(grad, x, weight)[0], numeric, rtol=1e-6, atol=1e-8)


def test_default_eps_where_it_matters():
    """输入缩小到 1e-3，方差与 eps 同量级：默认值错一点结果就差很多。"""
    x, weight, bias, grad = make_inputs()
    x = 1e-3 * x
    torch.testing.assert_close(layer_norm(x, weight, bias), torch_layer_norm(x, weight, bias, 1e-5))
    torch.testing.assert_close(rms_norm(x, weight), torch_rms_norm(x, weight, 1e-6))
    torch.testing.assert_close(
        layer_norm_backward(grad, x, weight), autograd(torch_layer_norm, (x, weight, bias), grad, eps=1e-5)
    )
    torch.testing.assert_close(
        rms_norm_backward(grad, x, weight), autograd(torch_rms_norm, (x, weight), grad, eps=1e-6)
    )
    assert (torch_rms_norm(x, weight, 1e-5) - torch_rms_norm(x, weight, 1e-6)).abs().max() > 0.1


def test_default_eps_of_the_libraries():
    """页面里的默认值：torch 2.13.0、transformers 5.23.0。"""
    assert nn.LayerNorm(C).eps == 1e-5 and nn.RMSNorm(C).eps is None
    assert LlamaConfig().rms_norm_eps == 1e-6
    assert GPT2Config().layer_norm_epsilon == 1e-5 and BertConfig().layer_norm_eps == 1e-12


@pytest.mark.parametrize(
    ("dtype", "used"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float32),
        (F64, F64),
    ],
)
def test_torch_rms_norm_without_eps_uses_the_machine_epsilon_of_the_computation(dtype, used):
    """bf16 用的是 float32 的机器精度 1.19e-7，不是 bf16 的 0.0078。"""
    eps = torch.finfo(used).eps
    x = torch.full((1, 4), math.sqrt(eps), dtype=dtype)
    out = F.rms_norm(x, (4,))
    assert out[0, 0].item() == pytest.approx(1 / math.sqrt(2), rel=5e-3)  # 均方 = eps
    torch.testing.assert_close(rms_norm(x, torch.ones(4, dtype=dtype), eps=eps), out)


def test_rms_norm_matches_llama_in_float32():
    x, weight, _, grad = make_inputs(dtype=torch.float32)
    module = LlamaRMSNorm(C)
    module.weight.data.copy_(weight)
    torch.testing.assert_close(rms_norm(x, weight), module(x))
    x = x.requires_grad_()
    expected = torch.autograd.grad(module(x), (x, module.weight), grad)
    torch.testing.assert_close(rms_norm_backward(grad, x.detach(), weight), expected)


def test_cast_order_in_bfloat16():
    """先乘再转与 F.rms_norm、Gemma 2、gpt-oss 逐位相同；LlamaRMSNorm 先转再乘，约四分之一的元素不同。"""
    x, weight, _, _ = make_inputs(64, 256, dtype=torch.bfloat16)
    out = rms_norm(x, weight)
    assert torch.equal(out, torch_rms_norm(x, weight))
    gpt_oss = GptOssRMSNorm(256, eps=1e-6).to(torch.bfloat16)
    llama, t5 = LlamaRMSNorm(256).to(torch.bfloat16), T5LayerNorm(256).to(torch.bfloat16)
    for module in (gpt_oss, llama, t5):
        module.weight.data.copy_(weight)
    assert torch.equal(gpt_oss(x), out)
    unit = torch.ones_like(weight)
    assert torch.equal(llama(x), weight * rms_norm(x, unit))  # 笔记里模拟 Llama 的写法
    assert torch.equal(t5(x), llama(x))
    assert 0.15 < (llama(x) != out).double().mean() < 0.35
    exact = rms_norm(x.double(), weight.double())
    mine, theirs = ((y.double() - exact).abs().mean() for y in (out, llama(x)))
    assert mine < 0.8 * theirs


def test_gemma_stores_the_gain_minus_one():
    x, weight, _, _ = make_inputs(64, 256, dtype=torch.bfloat16)
    gemma = Gemma2RMSNorm(256)
    assert gemma.weight.abs().max() == 0
    gemma.weight.data.copy_(weight.float() - 1)
    torch.testing.assert_close(gemma(x), rms_norm(x, 1 + gemma.weight.data), rtol=0, atol=0)
    stored = torch.tensor([2.0**-10]).bfloat16()
    assert (1 + stored.float()) > 1 and (1 + stored) == 1  # 1+γ 要在 float32 里加


def test_llama_with_float32_gain_returns_float32():
    """LlamaRMSNorm 的最后一步是乘法：增益若是 float32，bf16 的输入会变成 float32 输出。"""
    x, weight, bias, grad = make_inputs(dtype=torch.bfloat16)
    assert LlamaRMSNorm(C)(x).dtype == torch.float32
    assert rms_norm(x, weight.float()).dtype == torch.bfloat16
    assert layer_norm(x, weight.float(), bias.float()).dtype == torch.bfloat16
    grad_x, grad_weight, grad_bias = layer_norm_backward(grad, x, weight.float())
    assert (grad_x.dtype, grad_weight.dtype, grad_bias.dtype) == (torch.bfloat16, *[torch.float32] * 2)
    assert [g.dtype for g in rms_norm_backward(grad, x, weight.float())] == [torch.bfloat16, torch.float32]


# 性质


def test_layer_norm_ignores_shift_and_scale_rms_norm_only_scale():
    x, weight, bias, _ = make_inputs()
    for changed in (x + 3, 10 * x, 10 * x + 3):
        torch.testing.assert_close(
            layer_norm(changed, weight, bias, eps=0.0), layer_norm(x, weight, bias, eps=0.0)
        )
    torch.testing.assert_close(rms_norm(10 * x, weight, eps=0.0), rms_norm(x, weight, eps=0.0))
    torch.testing.assert_close(rms_norm(-x, weight), -rms_norm(x, weight))  # 负数只翻符号
    assert (rms_norm(x + 3, weight) - rms_norm(x, weight)).abs().max() > 0.5


def test_layer_norm_is_rms_norm_of_the_centered_input():
    x, weight, bias, _ = make_inputs()
    centered = x - x.mean(dim=-1, keepdim=True)
    torch.testing.assert_close(
        layer_norm(x, weight, bias, eps=0.1), rms_norm(centered, weight, eps=0.1) + bias
    )


@pytest.mark.parametrize("eps", [0.0, 0.4])
def test_input_gradient_is_orthogonal_up_to_eps(eps):
    r"""⟨∂L/∂x, 1⟩ = 0 对 LayerNorm 恒成立；与 x 的内积恰是 ⟨u, x_hat⟩·ε/(均方+ε)。"""
    x, weight, _, grad = make_inputs()
    zeros = torch.zeros(B, T, dtype=F64)
    centered = x - x.mean(dim=-1, keepdim=True)
    for backward, z in ((layer_norm_backward, centered), (rms_norm_backward, x)):
        second = z.square().mean(dim=-1)
        grad_x = backward(grad, x, weight, eps=eps)[0]
        leak = (grad * weight * z).sum(dim=-1) / (second + eps).sqrt() * eps / (second + eps)
        torch.testing.assert_close((grad_x * x).sum(dim=-1), leak)
    torch.testing.assert_close(layer_norm_backward(grad, x, weight, eps=eps)[0].sum(dim=-1), zeros)
    assert rms_norm_backward(grad, x, weight, eps=eps)[0].sum(dim=-1).abs().max() > 0.05


def test_gradient_shrinks_as_the_input_grows():
    x, weight, _, grad = make_inputs()
    for backward in (layer_norm_backward, rms_norm_backward):
        torch.testing.assert_close(
            10 * backward(grad, 10 * x, weight, eps=0.0)[0], backward(grad, x, weight, eps=0.0)[0]
        )


def test_gain_folds_into_the_next_linear_layer():
    """RMSNorm 之后紧跟线性层：增益可以并进权重的列里。"""
    x, weight, _, _ = make_inputs()
    linear = torch.randn(7, C, dtype=F64)
    folded = rms_norm(x, torch.ones(C, dtype=F64)) @ (linear * weight).T
    torch.testing.assert_close(folded, rms_norm(x, weight) @ linear.T)


def test_every_position_is_independent():
    x, weight, bias, _ = make_inputs()
    changed = x.clone()
    changed[1] *= 3
    changed[:, -1] += 5
    assert torch.equal(layer_norm(changed, weight, bias)[0, :-1], layer_norm(x, weight, bias)[0, :-1])
    assert torch.equal(rms_norm(changed, weight)[0, :-1], rms_norm(x, weight)[0, :-1])


# 边界


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_rounded_once(dtype):
    """前向与反向都在 float32 里算：与 float64 的真值只差最后一次舍入。300² 超过 float16 的最大值也不溢出。"""
    x, weight, bias, grad = make_inputs(4, 64, dtype=dtype)
    x = 300 * x
    x64, w64, b64, g64 = (value.double() for value in (x, weight, bias, grad))
    half_ulp = torch.finfo(dtype).eps / 2

    def check(mine, truth, atol=1e-5):
        assert mine.dtype == dtype
        torch.testing.assert_close(mine.double(), truth, rtol=1.01 * half_ulp, atol=atol)

    check(layer_norm(x, weight, bias), torch_layer_norm(x64, w64, b64))
    check(rms_norm(x, weight), torch_rms_norm(x64, w64))
    tiny = torch.finfo(dtype).smallest_normal * half_ulp * 2  # float16 的次正规数
    pairs = [
        (layer_norm_backward(grad, x, weight), autograd(torch_layer_norm, (x64, w64, b64), g64)),
        (rms_norm_backward(grad, x, weight), autograd(torch_rms_norm, (x64, w64), g64)),
    ]
    for mine, truth in pairs:
        check(mine[0], truth[0], atol=max(tiny, 1e-7))
        for a, b in zip(mine[1:], truth[1:], strict=True):
            check(a, b)


def test_float64_stays_float64():
    x, weight, bias, grad = make_inputs()
    results = [layer_norm(x, weight, bias), rms_norm(x, weight)]
    results += [*layer_norm_backward(grad, x, weight), *rms_norm_backward(grad, x, weight)]
    assert all(value.dtype == F64 for value in results)


def test_float32_is_not_silently_raised_to_float64():
    """1e20 的平方在 float32 里是无穷大，r = 0，与 F.rms_norm 一样得到 0；若偷偷升到 float64 就不是 0。"""
    x, ones = torch.tensor([[1e20, -1e20, 3e20, 2e20]]), torch.ones(4)
    assert torch.equal(F.rms_norm(x, (4,), ones, 1e-6), torch.zeros(1, 4))
    assert torch.equal(rms_norm(x, ones), torch.zeros(1, 4))
    assert torch.equal(layer_norm(x, ones, 0 * ones), torch.zeros(1, 4))
    for backward in (rms_norm_backward, layer_norm_backward):
        assert torch.equal(backward(torch.ones(1, 4), x, ones)[1], torch.zeros(4))


def test_constant_and_zero_rows_are_finite():
    ones = torch.ones(C, dtype=F64)
    constant = torch.full((1, C), 7.0, dtype=F64)
    assert torch.equal(layer_norm(constant, ones, 2 * ones), torch.full((1, C), 2.0, dtype=F64))
    assert torch.equal(rms_norm(0 * constant, ones), 0 * constant)
    _, _, _, grad = make_inputs(1, C)
    grad_x = rms_norm_backward(grad, 0 * constant, ones)[0]
    torch.testing.assert_close(grad_x, grad / 1e-3)  # r = 1/√1e-6


def test_large_offset_does_not_cancel():
    """10000 ± 1 在 float32 里：先减均值再平方得方差 1。"""
    x = torch.tensor([[10001.0, 9999.0, 10001.0, 9999.0]])
    expected = torch.tensor([[1.0, -1.0, 1.0, -1.0]])
    torch.testing.assert_close(layer_norm(x, torch.ones(4), torch.zeros(4)), expected)
    grad = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    truth = autograd(
        torch_layer_norm, (x.double(), torch.ones(4, dtype=F64), torch.zeros(4, dtype=F64)), grad
    )
    torch.testing.assert_close(
        layer_norm_backward(grad, x, torch.ones(4))[0].double(), truth[0], rtol=1e-5, atol=1e-6
    )


# 被拒绝的错误写法


def wrong_layer_norm(x, weight, bias, *, eps=1e-5, correction=0, inside=True, dim=-1):
    variance = x.var(dim=dim, correction=correction, keepdim=True)
    scale = (variance + eps).sqrt() if inside else variance.sqrt() + eps
    return (x - x.mean(dim=dim, keepdim=True)) / scale * weight + bias


def wrong_rms_norm(x, weight, *, eps=1e-6, center=False, inside=True, dim=-1, root_mean=True):
    if center:
        x = x - x.mean(dim=dim, keepdim=True)
    second = x.square().mean(dim=dim, keepdim=True) if root_mean else x.square().sum(dim=dim, keepdim=True)
    return x / ((second + eps).sqrt() if inside else second.sqrt() + eps) * weight


WRONG_LAYER_NORMS = {
    "无偏方差": dict(correction=1),
    "eps 在根号外": dict(inside=False),
    "没有 eps": dict(eps=0.0),
    "在位置轴上归一化": dict(dim=1),
    "在批轴上归一化": dict(dim=0),
    "在位置与特征两个轴上归一化": dict(dim=(1, 2)),
}
WRONG_RMS_NORMS = {
    "减了均值": dict(center=True),
    "eps 在根号外": dict(inside=False),
    "没有 eps": dict(eps=0.0),
    "在位置轴上归一化": dict(dim=1),
    "除以 L2 范数": dict(root_mean=False),
}


def test_templates_of_the_wrong_versions_are_right():
    x, weight, bias, _ = make_inputs()
    torch.testing.assert_close(wrong_layer_norm(x, weight, bias), torch_layer_norm(x, weight, bias))
    torch.testing.assert_close(wrong_rms_norm(x, weight), torch_rms_norm(x, weight))


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_LAYER_NORMS)
def test_wrong_layer_norm_is_rejected(name):
    x, weight, bias, _ = make_inputs()
    x = x * 3e-3  # eps 的位置与有无在这里才看得见
    truth = torch_layer_norm(x, weight, bias)
    torch.testing.assert_close(layer_norm(x, weight, bias), truth)
    assert (wrong_layer_norm(x, weight, bias, **WRONG_LAYER_NORMS[name]) - truth).abs().max() > 0.05


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_RMS_NORMS)
def test_wrong_rms_norm_is_rejected(name):
    x, weight, _, _ = make_inputs()
    x = x * 1e-3
    truth = torch_rms_norm(x, weight)
    torch.testing.assert_close(rms_norm(x, weight), truth)
    assert (wrong_rms_norm(x, weight, **WRONG_RMS_NORMS[name]) - truth).abs().max() > 0.1


def wrong_backward(grad, x, weight, *, center, gain=True, mean=True, along=True, inverse=True, eps):
    z = x - x.mean(dim=-1, keepdim=True) if center else x
    r = torch.rsqrt(z.square().mean(dim=-1, keepdim=True) + eps)
    x_hat, u = z * r, grad * weight if gain else grad
    out = u - (u.mean(dim=-1, keepdim=True) if mean else 0)
    out = out - (x_hat * (u * x_hat).mean(dim=-1, keepdim=True) if along else 0)
    return out * r if inverse else out


WRONG_BACKWARDS = {
    "漏了均值那一项": dict(mean=False),
    "漏了方差那一项": dict(along=False),
    "把均值、方差当常数": dict(mean=False, along=False),
    "漏了 1/σ": dict(inverse=False),
    "漏了增益": dict(gain=False),
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_BACKWARDS)
@pytest.mark.parametrize("center", [True, False])
def test_wrong_backward_is_rejected(name, center):
    x, weight, bias, grad = make_inputs()
    if center:
        right, kwargs = layer_norm_backward(grad, x, weight)[0], dict(eps=1e-5, center=True, mean=True)
        (truth, *_) = autograd(torch_layer_norm, (x, weight, bias), grad)
    else:  # RMSNorm：多减一项均值也是错的
        right, kwargs = rms_norm_backward(grad, x, weight)[0], dict(eps=1e-6, center=False, mean=False)
        (truth, *_) = autograd(torch_rms_norm, (x, weight), grad)
    torch.testing.assert_close(right, truth)
    torch.testing.assert_close(wrong_backward(grad, x, weight, **kwargs), truth)
    changes = dict(WRONG_BACKWARDS[name])
    if not center and "mean" in changes:
        changes["mean"] = True
    assert (wrong_backward(grad, x, weight, **(kwargs | changes)) - truth).abs().max() > 0.05


@pytest.mark.rejects
def test_difference_of_moments_is_rejected():
    """float32 里用 E[x²]−E[x]²：方差 1 变成 0，输出放大 316 倍。"""
    x = torch.tensor([[10001.0, 9999.0, 10001.0, 9999.0]])
    variance = x.square().mean() - x.mean().square()
    assert variance == 0
    assert (x - x.mean())[0, 0] / (variance + 1e-5).sqrt() > 300
