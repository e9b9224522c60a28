r"""缩放点积注意力的测试。

真值有四个来源，都不经过被测代码：逐位置的 Python 循环（只用 math）；PyTorch 的
`F.scaled_dot_product_attention` 与 `torch.autograd.functional.jacobian`（前向与梯度）；
transformers 的注意力模块（小配置、真的运行）；以及方差的精确公式 Var[q·k] = d。
文件末尾把流传的错误写法逐个列出，并断言同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention.bias import causal_lower_right
from transformers import (
    DeepseekV3Config,
    Gemma2Config,
    GPT2Config,
    GraniteConfig,
    LlamaConfig,
    Qwen3Config,
    T5Config,
    T5EncoderModel,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Attention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gpt2.modeling_gpt2 import GPT2Attention
from transformers.models.granite.modeling_granite import GraniteAttention
from transformers.models.llama.modeling_llama import LlamaAttention
from transformers.models.qwen3.modeling_qwen3 import Qwen3Attention

from snippets.architecture.attention_scaling import (
    attention_scores,
    causal_mask,
    qk_norm_logits,
    scaled_dot_product_attention,
    softmax_jacobian,
    stable_softmax,
)

B, H, T, S, D, DV = 2, 3, 4, 6, 5, 7


def make_qkv(*, num_queries=T, num_keys=S, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, num_queries, D), (B, H, num_keys, D), (B, H, num_keys, DV)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def loop_attention(q, k, v, *, scale, causal=False):
    """逐位置的循环，只用 Python 的浮点数；causal 是右下角对齐。"""
    batch, heads, num_queries, _ = q.shape
    num_keys = k.shape[2]
    out = torch.zeros(batch, heads, num_queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            for i in range(num_queries):
                last = i + num_keys - num_queries if causal else num_keys - 1
                dots = [
                    scale
                    * math.fsum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, h, j].tolist(), strict=True))
                    for j in range(last + 1)
                ]
                top = max(dots)
                weights = [math.exp(x - top) for x in dots]
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / math.fsum(weights) * v[b, h, j]
    return out


def output_and_gradients(attention, q, k, v, **kwargs):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v, **kwargs)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out, *torch.autograd.grad((out * direction).sum(), (q, k, v)))


# 手算


def test_two_keys_by_hand():
    r"""D = 4，q = (2,0,0,0)，k_1 = (ln 3,0,0,0)，k_2 = 0，v = 1, 0。

    点积是 2 ln 3 与 0，除以 √4 = 2 得 ln 3 与 0，权重 3/4 与 1/4，输出 0.75。
    不缩放时权重是 9/10；除以 d = 4 时是 √3/(1+√3) = 0.634。
    """
    q = torch.tensor([[[[2.0, 0.0, 0.0, 0.0]]]])
    k = torch.tensor([[[[math.log(3.0), 0.0, 0.0, 0.0], [0.0, 0.0, 0.0, 0.0]]]])
    v = torch.tensor([[[[1.0], [0.0]]]])
    assert scaled_dot_product_attention(q, k, v).item() == pytest.approx(0.75)
    assert scaled_dot_product_attention(q, k, v, scale=1.0).item() == pytest.approx(0.9)
    assert scaled_dot_product_attention(q, k, v, scale=0.25).item() == pytest.approx(3**0.5 / (1 + 3**0.5))


def test_jacobian_of_three_keys_by_hand():
    r"""p = (1/2, 1/4, 1/4)：对角 p_i(1-p_i) = 1/4, 3/16, 3/16；非对角 -p_i p_j = -1/8, -1/8, -1/16。"""
    jacobian = softmax_jacobian(torch.tensor([0.5, 0.25, 0.25]))
    expected = torch.tensor([[4.0, -2.0, -2.0], [-2.0, 3.0, -1.0], [-2.0, -1.0, 3.0]]) / 16
    torch.testing.assert_close(jacobian, expected)


def test_causal_mask_by_hand():
    """2 个新 query、5 个 key（3 个在缓存里）：第 0 个看见 4 个，最后一个看见全部。"""
    mask = causal_mask(num_queries=2, num_keys=5)
    assert mask.tolist() == [[True, True, True, True, False], [True] * 5]
    assert causal_mask(num_queries=2, num_keys=5, device=torch.device("meta")).device.type == "meta"


def test_qk_norm_by_hand():
    r"""q = k = (3, 3)，eps = 7：均方 9，归一化后是 3/√16 = 3/4；增益 (2,1)、(1,4)，scale = 1/2。

    打分是 (9/16)(2·1 + 1·4)/2 = 27/16。
    """
    x = torch.tensor([[[[3.0, 3.0]]]])
    logits = qk_norm_logits(x, x, torch.tensor([2.0, 1.0]), torch.tensor([1.0, 4.0]), scale=0.5, eps=7.0)
    assert logits.item() == pytest.approx(27 / 16)


# 与独立实现一致


@pytest.mark.parametrize("scale", [None, 1.0, 1 / D, 0.3])
@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_loop_over_positions(scale, causal):
    q, k, v = make_qkv()
    ours = scaled_dot_product_attention(q, k, v, scale=scale, is_causal=causal)
    expected = loop_attention(q, k, v, scale=D**-0.5 if scale is None else scale, causal=causal)
    torch.testing.assert_close(ours, expected)


@pytest.mark.parametrize("scale", [None, 1.0, 1 / D, 0.3])
@pytest.mark.parametrize("num_keys, causal", [(S, False), (T, False), (T, True)])
def test_matches_torch_sdpa_forward_and_gradient(scale, num_keys, causal):
    q, k, v = make_qkv(num_keys=num_keys)
    ours = output_and_gradients(scaled_dot_product_attention, q, k, v, scale=scale, is_causal=causal)
    theirs = output_and_gradients(F.scaled_dot_product_attention, q, k, v, scale=scale, is_causal=causal)
    for mine, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, expected)


def test_causal_with_a_cache_matches_lower_right_and_not_torch_is_causal():
    """T < S：与 torch 的 causal_lower_right 相同；torch 的 is_causal=True 是左上角对齐，结果不同。"""
    q, k, v = make_qkv()
    ours = output_and_gradients(scaled_dot_product_attention, q, k, v, is_causal=True)
    lower_right = output_and_gradients(
        F.scaled_dot_product_attention, q, k, v, attn_mask=causal_lower_right(T, S)
    )
    for mine, expected in zip(ours, lower_right, strict=True):
        torch.testing.assert_close(mine, expected)
    upper_left = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(upper_left[:, :, 0], v[:, :, 0])  # 第 0 个 query 只看见第 0 个 key
    assert (ours[0] - upper_left).abs().amax(dim=(0, 1, 3)).min() > 0.1


def test_decoding_with_a_cache_reproduces_the_full_pass():
    q, k, v = make_qkv(num_queries=S)
    full = scaled_dot_product_attention(q, k, v, is_causal=True)
    for start in range(S):
        part = scaled_dot_product_attention(q[:, :, start:], k, v, is_causal=True)
        torch.testing.assert_close(part, full[:, :, start:])


@pytest.mark.parametrize("head_dim", [4, 6])
def test_matches_llama_attention_forward_and_gradient(head_dim):
    """hidden_size=12、3 个头：head_dim=6 时 H·D=18 与 hidden_size 不同，能看出用错了哪个 d。"""
    torch.manual_seed(1)
    config = LlamaConfig(
        hidden_size=12,
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=head_dim,
        attn_implementation="eager",
    )
    module = LlamaAttention(config, layer_idx=0).double()
    hidden = torch.randn(B, T, 12, dtype=torch.float64, requires_grad=True)
    no_rotation = (torch.ones(B, T, head_dim).double(), torch.zeros(B, T, head_dim).double())
    mask = torch.zeros(T, T).double().masked_fill(torch.ones(T, T).triu(1).bool(), float("-inf"))
    theirs, _ = module(hidden, position_embeddings=no_rotation, attention_mask=mask.expand(B, 1, T, T))

    q, k, v = (
        projection(hidden).view(B, T, H, head_dim).transpose(1, 2)
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    heads = scaled_dot_product_attention(q, k, v, is_causal=True)
    ours = module.o_proj(heads.transpose(1, 2).reshape(B, T, H * head_dim))
    # LlamaAttention 总在 float32 里做 softmax，所以按 float32 的精度比
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
    parameters = [hidden, module.q_proj.weight, module.k_proj.weight, module.v_proj.weight]
    for mine, expected in zip(
        torch.autograd.grad(ours.square().sum(), parameters, retain_graph=True),
        torch.autograd.grad(theirs.square().sum(), parameters),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected, rtol=1e-4, atol=1e-6)


def test_softmax_matches_torch_forward_and_gradient():
    scores = torch.randn(B, H, T, S, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(B, H, T, S, dtype=torch.float64)
    torch.testing.assert_close(stable_softmax(scores), torch.softmax(scores, dim=-1))
    (mine,) = torch.autograd.grad((stable_softmax(scores) * weight).sum(), scores)
    (expected,) = torch.autograd.grad((torch.softmax(scores, dim=-1) * weight).sum(), scores)
    torch.testing.assert_close(mine, expected)


def test_jacobian_matches_autograd():
    scores = torch.randn(S, dtype=torch.float64)
    expected = torch.autograd.functional.jacobian(lambda x: torch.softmax(x, dim=-1), scores)
    torch.testing.assert_close(softmax_jacobian(torch.softmax(scores, dim=-1)), expected)


@pytest.mark.parametrize("head_dim", [4, 6])
def test_qk_norm_matches_qwen3_attention(head_dim):
    """Qwen3 的 q_norm、k_norm 只在每头维上归一化，其后仍乘 head_dim**-0.5。"""
    torch.manual_seed(2)
    config = Qwen3Config(
        hidden_size=12,
        num_attention_heads=H,
        num_key_value_heads=H,
        head_dim=head_dim,
        attn_implementation="eager",
    )
    module = Qwen3Attention(config, layer_idx=0)
    for gain in (module.q_norm.weight, module.k_norm.weight):
        torch.nn.init.uniform_(gain, 0.5, 2.0)
    hidden = torch.randn(B, T, 12)
    no_rotation = (torch.ones(B, T, head_dim), torch.zeros(B, T, head_dim))
    _, weights = module(hidden, position_embeddings=no_rotation, attention_mask=None)
    q, k = (p(hidden).view(B, T, H, head_dim).transpose(1, 2) for p in (module.q_proj, module.k_proj))
    logits = qk_norm_logits(q, k, module.q_norm.weight, module.k_norm.weight)
    torch.testing.assert_close(stable_softmax(logits), weights)
    assert module.scaling == head_dim**-0.5


def test_scales_in_transformers():
    """页面表格里的系数，取自 transformers 5.23.0 的模块本身（小配置，维数不变）。"""
    assert (
        LlamaAttention(LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=128), 0).scaling
        == 128**-0.5
    )
    assert LlamaConfig().hidden_size // LlamaConfig().num_attention_heads == 128

    mla = dict(hidden_size=16, num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8)
    config = DeepseekV3Config(**mla)
    assert (config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim) == (128, 64, 128)
    assert DeepseekV3Attention(config, 0).scaling == 192**-0.5
    yarn = dict(rope_type="yarn", factor=40.0, original_max_position_embeddings=4096, rope_theta=1e4)
    yarn |= dict(mscale=1.0, mscale_all_dim=1.0, beta_fast=32, beta_slow=1)
    config = DeepseekV3Config(**mla, max_position_embeddings=163840, rope_parameters=yarn)
    expected = 192**-0.5 * (0.1 * math.log(40) + 1) ** 2
    assert DeepseekV3Attention(config, 0).scaling == pytest.approx(expected, rel=1e-12)
    assert expected == pytest.approx(0.1352, abs=5e-5)

    config = GPT2Config(n_embd=128, n_head=2)
    assert not config.scale_attn_by_inverse_layer_idx and not config.reorder_and_upcast_attn
    assert GPT2Attention(config, layer_idx=2).scaling == 64**-0.5
    config = GPT2Config(n_embd=128, n_head=2, scale_attn_by_inverse_layer_idx=True)
    assert GPT2Attention(config, layer_idx=2).scaling == 64**-0.5 / 3
    assert GPT2Config().n_embd // GPT2Config().n_head == 64

    config = Gemma2Config(hidden_size=64, num_attention_heads=2, head_dim=128, query_pre_attn_scalar=144)
    assert Gemma2Attention(config, 0).scaling == 144**-0.5
    config = GraniteConfig(hidden_size=64, num_attention_heads=2, attention_multiplier=1 / 128)
    assert GraniteAttention(config, 0).scaling == 1 / 128


def test_t5_folds_the_scale_into_initialisation():
    """T5 的 scaling 是 1.0，但 W_q 的初始标准差多乘了 d_kv**-0.5，所以初始打分的方差仍约为 1。"""
    torch.manual_seed(3)
    config = T5Config(d_model=256, d_kv=64, num_heads=4, d_ff=8, num_layers=1, vocab_size=11)
    attention = T5EncoderModel(config).encoder.block[0].layer[0].SelfAttention
    assert attention.scaling == 1.0
    hidden = torch.randn(1, 500, 256)
    q, k = (p(hidden).view(1, 500, 4, 64).transpose(1, 2) for p in (attention.q, attention.k))
    off_diagonal = ~torch.eye(500, dtype=torch.bool)
    assert attention_scores(q, k, scale=1.0)[..., off_diagonal].var().item() == pytest.approx(1.0, abs=0.1)


# 性质


@pytest.mark.parametrize("head_dim", [4, 64, 256])
@pytest.mark.parametrize("law", ["normal", "sign", "uniform"])
def test_score_variance_equals_head_dim(head_dim, law):
    """Var[q·k] = d 只用到独立、零均值、单位方差，与分布的形状无关。"""
    generator = torch.Generator().manual_seed(4)

    def sample(count):
        shape = (count, 1, 1, head_dim)
        if law == "normal":
            return torch.randn(shape, generator=generator, dtype=torch.float64)
        uniform = torch.rand(shape, generator=generator, dtype=torch.float64)
        return (uniform - 0.5).sign() if law == "sign" else (uniform - 0.5) * math.sqrt(12)

    q, k = sample(20_000), sample(20_000)
    assert attention_scores(q, k, scale=1.0).var().item() == pytest.approx(head_dim, rel=0.05)
    assert attention_scores(q, k).var().item() == pytest.approx(1.0, rel=0.05)


def test_score_variance_is_exact_by_enumeration():
    """分量取 ±1：把 2^3 × 2^3 种 (q, k) 全部列出，均值恰为 0、方差恰为 d = 3。"""
    signs = torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 3).view(1, 1, 8, 3)
    scores = attention_scores(signs, signs, scale=1.0)
    assert scores.mean() == 0
    assert scores.square().mean() == 3


def test_aligned_keys_have_a_mean_score_proportional_to_head_dim():
    """k = q/2 + √¾ ε 时 E[q·k] = d/2：除以 √d 后仍随 √d 增长，除以 d 才是常数。"""
    generator = torch.Generator().manual_seed(5)
    for head_dim in (16, 256):
        q = torch.randn(4000, 1, 1, head_dim, generator=generator, dtype=torch.float64)
        noise = torch.randn(4000, 1, 1, head_dim, generator=generator, dtype=torch.float64)
        k = 0.5 * q + math.sqrt(0.75) * noise
        assert k.var().item() == pytest.approx(1.0, rel=0.02)
        assert attention_scores(q, k).mean().item() == pytest.approx(head_dim**0.5 / 2, rel=0.03)
        assert attention_scores(q, k, scale=1 / head_dim).mean().item() == pytest.approx(0.5, rel=0.03)


def test_jacobian_trace_norm_and_null_vector():
    generator = torch.Generator().manual_seed(6)
    for std in (0.1, 1.0, 10.0):
        p = torch.softmax(std * torch.randn(20, S, generator=generator, dtype=torch.float64), dim=-1)
        jacobian = softmax_jacobian(p)
        torch.testing.assert_close(jacobian.diagonal(dim1=-2, dim2=-1).sum(-1), 1 - p.square().sum(-1))
        torch.testing.assert_close(jacobian.sum(-1), torch.zeros_like(p))
        assert torch.linalg.matrix_norm(jacobian, ord=2).max() <= 0.5 + 1e-12
        assert torch.linalg.eigvalsh(jacobian).min() > -1e-12
    tie = softmax_jacobian(torch.tensor([0.5, 0.5, 0.0], dtype=torch.float64))
    assert torch.linalg.matrix_norm(tie, ord=2).item() == pytest.approx(0.5)
    assert softmax_jacobian(torch.tensor([0.0, 1.0, 0.0])).abs().max() == 0


def test_saturation_kills_the_gradient_of_q_and_k_but_not_of_v():
    """打分差 400 时权重在 float64 里就是 one-hot：q、k 的梯度恰为 0，v 的梯度恰为上游梯度。"""
    q, k, v = make_qkv()
    q[..., 0], k[..., 0] = 20.0, 20.0 * torch.arange(S).double()
    out, grad_q, grad_k, grad_v = output_and_gradients(scaled_dot_product_attention, q, k, v, scale=1.0)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    assert grad_q.abs().max() < 1e-100 and grad_k.abs().max() < 1e-100
    torch.testing.assert_close(grad_v[:, :, -1], direction.sum(dim=2))
    torch.testing.assert_close(out, v[:, :, -1:].expand_as(out))


def test_gradient_of_scores_goes_through_the_jacobian():
    """∂L/∂q = c·Kᵀ J V ∂L/∂o：用 softmax_jacobian 拼出来的与自动求导相同。"""
    q, k, v = make_qkv()
    scale = 0.7
    out, grad_q, _, grad_v = output_and_gradients(scaled_dot_product_attention, q, k, v, scale=scale)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    p = torch.softmax(q @ k.transpose(-2, -1) * scale, dim=-1)
    grad_scores = (softmax_jacobian(p) @ (direction @ v.transpose(-2, -1)).unsqueeze(-1)).squeeze(-1)
    torch.testing.assert_close(grad_q, scale * grad_scores @ k)
    torch.testing.assert_close(grad_v, p.transpose(-2, -1) @ direction)


def test_shifting_all_keys_scores_changes_nothing():
    scores = torch.randn(B, H, T, S, dtype=torch.float64)
    torch.testing.assert_close(stable_softmax(scores + 123.0), stable_softmax(scores))


def test_qk_norm_bounds_the_logits_whatever_the_weights():
    q, k, _ = make_qkv()
    ones = torch.ones(D, dtype=torch.float64)
    for factor in (1.0, 100.0):
        assert qk_norm_logits(factor * q, factor * k, ones, ones).abs().max() <= math.sqrt(D)
        self_score = qk_norm_logits(factor * q, factor * q, ones, ones).diagonal(dim1=-2, dim2=-1)
        torch.testing.assert_close(self_score, torch.full_like(self_score, math.sqrt(D)), rtol=1e-4, atol=0)
    doubled = qk_norm_logits(q, k, 2 * ones, ones)  # 增益放大，上界跟着放大
    torch.testing.assert_close(doubled, 2 * qk_norm_logits(q, k, ones, ones))


def test_absorbed_mla_keeps_the_scale_of_the_unabsorbed_form():
    """MLA 把 W_UK 吸收进 q 后缩并的维数变成 rank + rope，打分的数值不变，所以系数仍是 (nope + rope)**-0.5。"""
    generator = torch.Generator().manual_seed(7)
    rank, nope, rope = 12, 8, 4

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    w_uk, latent = normal(nope, rank), normal(1, 1, S, rank)
    q_nope, q_rope, k_rope = normal(1, 1, T, nope), normal(1, 1, T, rope), normal(1, 1, S, rope)
    plain = attention_scores(torch.cat([q_nope, q_rope], -1), torch.cat([latent @ w_uk.T, k_rope], -1))
    q_absorbed, k_absorbed = torch.cat([q_nope @ w_uk, q_rope], -1), torch.cat([latent, k_rope], -1)
    absorbed = attention_scores(q_absorbed, k_absorbed, scale=(nope + rope) ** -0.5)
    torch.testing.assert_close(absorbed, plain)
    wrong = attention_scores(q_absorbed, k_absorbed)  # 默认系数 (rank + rope)**-0.5
    torch.testing.assert_close(wrong, plain * math.sqrt((nope + rope) / (rank + rope)))


# 边界


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_in_and_out_is_rounded_once(dtype):
    """在 float32 里算完再转回：与先转成 float64 的真值只差最后一次舍入。"""
    q, k, v = make_qkv(dtype=dtype)
    out = scaled_dot_product_attention(q, k, v, is_causal=True)
    assert out.dtype == dtype
    exact = scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    half_ulp = torch.finfo(dtype).eps / 2
    torch.testing.assert_close(out.double(), exact, rtol=1.01 * half_ulp, atol=1e-5)
    assert attention_scores(q, k).dtype == torch.float32


def test_float16_dot_products_beyond_65504_stay_finite():
    """30² × 128 = 115200 超过 float16 的最大值：先乘后缩放得到 inf，这里先升到 float32。"""
    q = torch.full((1, 1, 2, 128), 30.0, dtype=torch.float16)
    assert (q @ q.transpose(-2, -1) * 128**-0.5).isinf().all()
    torch.testing.assert_close(attention_scores(q, q), torch.full((1, 1, 2, 2), 115200 * 128**-0.5))
    assert scaled_dot_product_attention(q, q, q).isfinite().all()
    # 300² 也超过 65504：QK-norm 的均方要在 float32 里求，同向的打分才是 √128
    ones = torch.ones(128, dtype=torch.float16)
    torch.testing.assert_close(qk_norm_logits(10 * q, 10 * q, ones, ones), torch.full((1, 1, 2, 2), 128**0.5))


@pytest.mark.parametrize("scale", [None, 1.0, 1 / D])
def test_huge_scores_never_overflow_whatever_the_scale(scale):
    """打分到 1e30 也没有 NaN：靠的是减最大值，与缩放无关。掩码若填 -1e9 而不是 -∞，会被看见。"""
    q, k, v = make_qkv(num_queries=S, dtype=torch.float32)
    out = scaled_dot_product_attention(1e15 * q, 1e15 * k, v, scale=scale, is_causal=True)
    assert attention_scores(1e15 * q, 1e15 * k, scale=scale).abs().max() > 1e29
    truth = loop_attention(1e15 * q, 1e15 * k, v, scale=D**-0.5 if scale is None else scale, causal=True)
    torch.testing.assert_close(out, truth.float())


def test_a_single_key_returns_its_value():
    q, k, v = make_qkv(num_queries=1, num_keys=1)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), v)


@pytest.mark.parametrize("scale", [0.0, -1.0, math.nan, math.inf])
def test_bad_scale_is_refused(scale):
    with pytest.raises(ValueError, match="scale 必须是正的有限数"):
        scaled_dot_product_attention(*make_qkv(), scale=scale)


def test_more_queries_than_keys_cannot_be_causal():
    q, k, v = make_qkv(num_queries=S, num_keys=T)
    with pytest.raises(ValueError, match="一个 key 也看不见"):
        scaled_dot_product_attention(q, k, v, is_causal=True)


# 被拒绝的错误写法：真值是逐位置循环，每个错误写法都要差出一大截


def naive_softmax(scores, dim=-1):
    return scores.exp() / scores.exp().sum(dim=dim, keepdim=True)


def wrong_attention(q, k, v, *, scale=D**-0.5, diagonal=S - T, dim=-1, after=1.0):
    scores = (q @ k.transpose(-2, -1) * scale).masked_fill(
        ~torch.ones(T, S).bool().tril(diagonal), float("-inf")
    )
    return torch.softmax(scores, dim=dim).nan_to_num() * after @ v


WRONG_VERSIONS = {
    "没有缩放": dict(scale=1.0),
    "除以 d": dict(scale=1 / D),
    "除以模型宽度的根号": dict(scale=(H * D) ** -0.5),
    "除以 v 的每头维数的根号": dict(scale=DV**-0.5),
    "q 与 SDPA 各缩放一次": dict(scale=D**-0.5 * D**-0.5),
    "softmax 之后才缩放": dict(scale=1.0, after=D**-0.5),
    "掩码多看一个": dict(diagonal=S - T + 1),
    "掩码少看一个": dict(diagonal=S - T - 1),
    "左上角对齐": dict(diagonal=0),
    "对 query 轴做 softmax": dict(dim=-2),
}


def test_the_template_of_the_wrong_versions_is_right():
    q, k, v = make_qkv()
    torch.testing.assert_close(wrong_attention(q, k, v), loop_attention(q, k, v, scale=D**-0.5, causal=True))


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_VERSIONS)
def test_wrong_version_is_rejected(name):
    q, k, v = make_qkv()
    truth = loop_attention(q, k, v, scale=D**-0.5, causal=True)
    torch.testing.assert_close(scaled_dot_product_attention(q, k, v, is_causal=True), truth)
    assert (wrong_attention(q, k, v, **WRONG_VERSIONS[name]) - truth).abs().max() > 0.05


@pytest.mark.rejects
def test_softmax_without_max_subtraction_is_rejected():
    """打分 8000 与 7992：不减最大值时，三种缩放在 float32 里都得到 NaN。"""
    raw = torch.tensor([8000.0, 7992.0])
    for scale in (1.0, 64**-0.5, 1 / 64):
        gap = 8 * scale
        assert naive_softmax(raw * scale).isnan().all()
        torch.testing.assert_close(stable_softmax(raw * scale)[0].item(), 1 / (1 + math.exp(-gap)))


@pytest.mark.rejects
def test_diagonal_jacobian_is_rejected():
    """只写 diag(p(1-p))（把 softmax 当成逐元素的 sigmoid）丢掉了非对角项。"""
    scores = torch.randn(S, dtype=torch.float64)
    truth = torch.autograd.functional.jacobian(lambda x: torch.softmax(x, dim=-1), scores)
    p = torch.softmax(scores, dim=-1)
    torch.testing.assert_close(softmax_jacobian(p), truth)
    assert (torch.diag(p * (1 - p)) - truth).abs().max() > 0.02


@pytest.mark.rejects
def test_qk_norm_without_the_scale_is_rejected():
    """归一化后的向量长 √D，不是 1：去掉 1/√D，同向的打分是 D 而不是 √D。"""
    q, k, _ = make_qkv()
    ones = torch.ones(D, dtype=torch.float64)
    q_hat, k_hat = (F.rms_norm(x, (D,), eps=1e-6) for x in (q, k))
    torch.testing.assert_close(
        qk_norm_logits(q, k, ones, ones), q_hat @ k_hat.transpose(-2, -1) / math.sqrt(D)
    )
    assert (q_hat @ q_hat.transpose(-2, -1)).max() > 2 * math.sqrt(D)
