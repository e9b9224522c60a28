r"""MLA 的测试。

真值都不经过被测代码：按 DeepSeek-V2 附录 C 逐位置写的循环（只用向量点积）；transformers 的
`DeepseekV3Attention`、`DeepseekV2Attention`（小配置、复制权重、真的运行）；PyTorch 的
`F.scaled_dot_product_attention`；PyTorch 自己数的浮点运算次数；论文表 1、表 9 的数字。
文件末尾把流传的错误写法逐个列出，并断言同一个真值会拒绝它们。
"""

import math

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode
from transformers import DeepseekV2Config, DeepseekV3Config, DynamicCache
from transformers.models.deepseek_v2.modeling_deepseek_v2 import (
    DeepseekV2Attention,
    DeepseekV2RotaryEmbedding,
)
from transformers.models.deepseek_v3.modeling_deepseek_v3 import (
    DeepseekV3Attention,
    DeepseekV3RotaryEmbedding,
)

from snippets.architecture.mha_to_mla import (
    LatentCache,
    MultiHeadLatentAttention,
    gqa_as_mla_projections,
    gqa_cache_elements,
    mla_absorbed,
    mla_absorbed_flops,
    mla_cache_elements,
    mla_naive,
    mla_naive_flops,
)
from snippets.architecture.rope import apply_rope, rope_cos_sin, rope_inverse_frequencies

B, H, T, S, DC, DR, DN, DV, C, DQ = 2, 3, 4, 7, 10, 6, 12, 8, 24, 9
DIMS = dict(
    num_heads=H, q_lora_rank=DQ, kv_lora_rank=DC, qk_nope_head_dim=DN, qk_rope_head_dim=DR, v_head_dim=DV
)
WAYS = [mla_naive, mla_absorbed]


def make_inputs(*, num_queries=T, num_keys=S, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, num_queries, DN), (B, H, num_queries, DR), (B, num_keys, DC), (B, num_keys, DR)]
    shapes += [(H, DN, DC), (H, DV, DC)]
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def loop_mla(q_nope, q_rope, latent, k_rope, k_up, v_up):
    """附录 C 式 (42)–(46)，一个位置一个位置地算；因果，最后一个 query 看得见全部 key。"""
    num_queries, num_keys = q_nope.shape[2], latent.shape[1]
    out = torch.zeros(B, H, num_queries, DV, dtype=torch.float64)
    for b in range(B):
        for h in range(H):
            for t in range(num_queries):
                visible = range(t + num_keys - num_queries + 1)
                dots = []
                for j in visible:
                    content = torch.dot(q_nope[b, h, t], k_up[h] @ latent[b, j])
                    position = torch.dot(q_rope[b, h, t], k_rope[b, j])
                    dots.append((content + position).item() / math.sqrt(DN + DR))
                weights = [math.exp(x - max(dots)) for x in dots]
                for j, weight in zip(visible, weights, strict=True):
                    out[b, h, t] += weight / math.fsum(weights) * (v_up[h] @ latent[b, j])
    return out


def value_and_gradients(function, inputs):
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    out = function(*inputs)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return (out, *torch.autograd.grad((out * direction).sum(), inputs))


def make_layer(dtype=torch.float64, seed=0):
    torch.manual_seed(seed)
    layer = MultiHeadLatentAttention(C, **DIMS).to(dtype)
    for norm in (layer.q_a_layernorm, layer.kv_a_layernorm):
        torch.nn.init.uniform_(norm.weight, 0.5, 2.0)  # 增益不全为 1，漏乘就看得出来
    return layer


def angles(start, stop, dtype=torch.float64, batch=B):
    positions = torch.arange(start, stop).expand(batch, -1)
    cos, sin = rope_cos_sin(positions, rope_inverse_frequencies(DR))
    return cos.to(dtype), sin.to(dtype)


# 手算


@pytest.mark.parametrize("way", WAYS)
def test_two_keys_by_hand(way):
    r"""DN = 3、DR = 1、DC = 1，缩放 1/√4。q^C = (ln 3, 0, 0)，q^R = ln 3，W^{UK} = (2, 0, 0)ᵀ。

    c = 1, 0，k^R = 0, 0：点积 2 ln 3 与 0，除以 2 是 ln 3 与 0，权重 3/4、1/4；W^{UV} = 4，输出 4·3/4 = 3。
    c = 1, 0，k^R = -2, 2：点积 0 与 2 ln 3，除以 2 是 0 与 ln 3，权重 1/4、3/4，输出 1。
    """
    log3 = math.log(3.0)
    q_nope, q_rope = torch.tensor([[[[log3, 0.0, 0.0]]]]), torch.tensor([[[[log3]]]])
    latent, k_up, v_up = (torch.tensor(x) for x in ([[[1.0], [0.0]]], [[[2.0], [0.0], [0.0]]], [[[4.0]]]))
    out = way(q_nope, q_rope, latent, torch.zeros(1, 2, 1), k_up, v_up)
    assert out.item() == pytest.approx(3.0)
    out = way(q_nope, q_rope, latent, torch.tensor([[[-2.0], [2.0]]]), k_up, v_up)
    assert out.item() == pytest.approx(1.0)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("num_queries, num_keys", [(1, 1), (T, T), (1, S), (T, S)])
def test_matches_the_loop_over_positions(way, num_queries, num_keys):
    inputs = make_inputs(num_queries=num_queries, num_keys=num_keys)
    torch.testing.assert_close(way(*inputs), loop_mla(*inputs))


# 与独立实现一致


def hf_dims(config_class):
    config = config_class(
        hidden_size=C, num_attention_heads=H, num_key_value_heads=H, max_position_embeddings=64, **DIMS_HF
    )
    config._attn_implementation = "eager"
    return config


DIMS_HF = {name: value for name, value in DIMS.items() if name != "num_heads"}


def causal(num_queries, num_keys):
    hidden = torch.ones(num_queries, num_keys).triu(num_keys - num_queries + 1)
    return hidden.mul(torch.finfo(torch.float32).min)[None, None]


@pytest.mark.parametrize("absorb", [None, False, True])
def test_matches_deepseek_v3_forward_and_gradients(absorb):
    """float32：transformers 的 RMSNorm 总在 float32 里算。`absorb=None` 是不传，即默认的展开。"""
    ours = make_layer(torch.float32)
    theirs = DeepseekV3Attention(hf_dims(DeepseekV3Config), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())  # 参数名一一对应
    x = torch.randn(B, T, C)
    position_embeddings = DeepseekV3RotaryEmbedding(theirs.config)(x, torch.arange(T).expand(B, -1))
    kwargs = {} if absorb is None else {"absorb": absorb}
    got = ours(x, cos_sin=angles(0, T, torch.float32), **kwargs)
    expected = theirs(x, position_embeddings, causal(T, T))[0]
    torch.testing.assert_close(got, expected)
    direction = torch.randn_like(got)
    mine = torch.autograd.grad((got * direction).sum(), list(ours.parameters()))
    reference = torch.autograd.grad(
        (expected * direction).sum(), [dict(theirs.named_parameters())[n] for n, _ in ours.named_parameters()]
    )
    for a, b in zip(mine, reference, strict=True):
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)  # float32 的累加次序不同


@pytest.mark.parametrize("absorb", [False, True])
def test_decoding_matches_deepseek_v3_with_its_cache(absorb):
    """先填 4 个、再逐个解码 3 个；两边缓存的元素数也相同，都等于 DC + DR。"""
    ours, cache, their_cache = make_layer(torch.float32), LatentCache(), DynamicCache()
    theirs = DeepseekV3Attention(hf_dims(DeepseekV3Config), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    rotary, x = DeepseekV3RotaryEmbedding(theirs.config), torch.randn(B, S, C)
    for start, stop in [(0, 4), (4, 5), (5, 6), (6, 7)]:
        piece, ids = x[:, start:stop], torch.arange(start, stop).expand(B, -1)
        got = ours(piece, cos_sin=angles(start, stop, torch.float32), cache=cache, absorb=absorb)
        mask = causal(stop - start, stop)
        expected = theirs(piece, rotary(piece, ids), mask, past_key_values=their_cache)[0]
        torch.testing.assert_close(got, expected)
    stored = their_cache.layers[0].keys.numel() + their_cache.layers[0].values.numel()
    assert cache.entries.numel() == stored == B * S * mla_cache_elements(latent_dim=DC, rope_dim=DR)


def test_matches_deepseek_v2():
    ours = make_layer(torch.float32)
    theirs = DeepseekV2Attention(hf_dims(DeepseekV2Config), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    x = torch.randn(B, T, C)
    freqs = DeepseekV2RotaryEmbedding(theirs.config)(x, torch.arange(T).expand(B, -1))
    expected = theirs(x, causal(T, T), position_embeddings=freqs)[0]
    torch.testing.assert_close(ours(x, cos_sin=angles(0, T, torch.float32), absorb=True), expected)


def test_the_norms_use_the_default_eps_of_transformers():
    """输入缩到 1e-3，eps = 1e-6 与均方同量级：改成别的 eps 就对不上。"""
    ours = make_layer(torch.float32)
    theirs = DeepseekV3Attention(hf_dims(DeepseekV3Config), layer_idx=0)
    theirs.load_state_dict(ours.state_dict())
    x = 1e-3 * torch.randn(B, T, C)
    position_embeddings = DeepseekV3RotaryEmbedding(theirs.config)(x, torch.arange(T).expand(B, -1))
    expected = theirs(x, position_embeddings, causal(T, T))[0]
    got = ours(x, cos_sin=angles(0, T, torch.float32))
    torch.testing.assert_close(got, expected, atol=1e-7, rtol=1e-4)
    for norm in (ours.q_a_layernorm, ours.kv_a_layernorm):
        norm.eps = 1e-5
        changed = ours(x, cos_sin=angles(0, T, torch.float32))
        assert (changed - expected).abs().max() > 10 * 1e-7 + 1e-2 * expected.abs().max()
        norm.eps = 1e-6


@pytest.mark.parametrize("way", WAYS)
def test_flops_equal_what_torch_counts(way):
    """默认维数就是 DeepSeek-V3 的：128 头，512 + 64，128，128；`FlopCounterMode` 数矩阵乘，乘加算两次。"""
    heads, latent_dim, rope_dim, nope_dim, value_dim = 128, 512, 64, 128, 128
    for num_queries, num_keys in [(1, 3), (2, 5)]:
        shapes = [(1, heads, num_queries, nope_dim), (1, heads, num_queries, rope_dim)]
        shapes += [(1, num_keys, latent_dim), (1, num_keys, rope_dim)]
        shapes += [(heads, nope_dim, latent_dim), (heads, value_dim, latent_dim)]
        inputs = [torch.empty(shape, device="meta") for shape in shapes]
        with FlopCounterMode(display=False) as counter:
            assert way(*inputs).shape == (1, heads, num_queries, value_dim)
        sizes = dict(num_queries=num_queries, num_keys=num_keys)
        if way is mla_naive:
            assert mla_naive_flops(**sizes, num_expanded=num_keys) == counter.get_total_flops()
        else:
            assert mla_absorbed_flops(**sizes) == counter.get_total_flops()


@pytest.mark.parametrize("way", WAYS)
def test_flops_with_other_dimensions_equal_what_torch_counts(way):
    inputs = [x.to("meta") for x in make_inputs()]
    with FlopCounterMode(display=False) as counter:
        way(*inputs)
    sizes = dict(num_queries=T, num_keys=S, num_heads=H, latent_dim=DC, rope_dim=DR, nope_dim=DN)
    if way is mla_naive:
        flops = mla_naive_flops(**sizes, value_dim=DV, num_expanded=S)
    else:
        flops = mla_absorbed_flops(**sizes, value_dim=DV)
    assert B * flops == counter.get_total_flops()


def test_the_switch_selects_the_algorithm():
    """两种算法的值相同，用计算量区分：默认是展开，`absorb=True` 是吸收。"""
    layer, x = make_layer(), torch.randn(B, S, C, dtype=torch.float64)
    counts = []
    for kwargs in ({}, {"absorb": False}, {"absorb": True}):
        cache = LatentCache()
        layer(x[:, :-1], cos_sin=angles(0, S - 1), cache=cache)
        with FlopCounterMode(display=False) as counter:
            layer(x[:, -1:], cos_sin=angles(S - 1, S), cache=cache, **kwargs)
        counts.append(counter.get_total_flops())
    sizes = dict(
        num_queries=1, num_keys=S, num_heads=H, latent_dim=DC, rope_dim=DR, nope_dim=DN, value_dim=DV
    )
    difference = mla_absorbed_flops(**sizes) - mla_naive_flops(**sizes, num_expanded=S)
    assert counts[0] == counts[1] and counts[2] - counts[1] == B * difference != 0


def test_only_the_expanded_keys_are_counted():
    """T = 1、S = 5，只展开 2 个，其余维数 1：2 · (2·1·2 + 1·5·3) = 38。"""
    ones = dict(num_heads=1, latent_dim=1, rope_dim=1, nope_dim=1, value_dim=1)
    assert mla_naive_flops(num_queries=1, num_keys=5, num_expanded=2, **ones) == 38


# 性质


@pytest.mark.parametrize("num_queries, num_keys", [(1, 1), (1, 40), (3, 40), (40, 40)])
def test_naive_equals_absorbed_with_all_gradients(num_queries, num_keys):
    inputs = make_inputs(num_queries=num_queries, num_keys=num_keys)
    naive, absorbed = (value_and_gradients(way, inputs) for way in WAYS)
    for a, b in zip(naive, absorbed, strict=True):
        torch.testing.assert_close(a, b)


def test_decoding_equals_the_full_forward():
    layer, x = make_layer(), torch.randn(B, S, C, dtype=torch.float64)
    full = layer(x, cos_sin=angles(0, S))
    for absorb in (False, True):
        cache = LatentCache()
        pieces = [
            layer(x[:, a:b], cos_sin=angles(a, b), cache=cache, absorb=absorb)
            for a, b in [(0, 3), (3, 4), (4, 7)]
        ]
        torch.testing.assert_close(torch.cat(pieces, dim=1), full)
        assert cache.entries.shape == (B, S, DC + DR)


def test_scores_depend_only_on_relative_positions():
    layer, x = make_layer(), torch.randn(B, S, C, dtype=torch.float64)
    torch.testing.assert_close(layer(x, cos_sin=angles(0, S)), layer(x, cos_sin=angles(100, 100 + S)))


def test_bad_mask_shapes_are_refused():
    """query 比 key 多没有意义：因果掩码拒绝。"""
    with pytest.raises(ValueError):
        mla_absorbed(*make_inputs(num_queries=S, num_keys=T))


def test_each_tensor_parallel_rank_needs_the_whole_latent():
    """头切成两份，输出拼起来不变；每一份都要用完整的潜向量，只给一半维数就错。"""
    q_nope, q_rope, latent, k_rope, k_up, v_up = make_inputs()
    full = mla_absorbed(q_nope, q_rope, latent, k_rope, k_up, v_up)
    ranks = [slice(0, 1), slice(1, 3)]
    parts = [mla_absorbed(q_nope[:, r], q_rope[:, r], latent, k_rope, k_up[r], v_up[r]) for r in ranks]
    torch.testing.assert_close(torch.cat(parts, dim=1), full)
    half = torch.cat((latent[..., : DC // 2], torch.zeros(B, S, DC // 2, dtype=torch.float64)), dim=-1)
    wrong = mla_absorbed(q_nope[:, :1], q_rope[:, :1], half, k_rope, k_up[:1], v_up[:1])
    assert (wrong - full[:, :1]).abs().max() > 0.1


# 大小：论文的数字


def test_cache_elements_reproduce_table_1_and_table_9():
    """V2 表 1：d_c = 4 d_h、d_h^R = d_h/2，合 4.5 d_h，即 GQA 的 2.25 组；表 9 的四个元素数。"""
    h, d, k, c, r = sympy.symbols("H d K c r", positive=True)
    assert gqa_cache_elements(num_kv_heads=k, head_dim=d) == 2 * k * d
    assert mla_cache_elements(latent_dim=c, rope_dim=r) == c + r
    mla = mla_cache_elements(latent_dim=4 * d, rope_dim=d / 2)
    assert sympy.simplify(mla - sympy.Rational(9, 2) * d) == 0
    assert mla / gqa_cache_elements(num_kv_heads=1, head_dim=d) == sympy.Rational(9, 4)
    v2 = mla_cache_elements(latent_dim=512, rope_dim=64)
    assert (v2, 27 * v2, 60 * v2) == (576, 15552, 34560)  # 15.6K、34.6K
    assert 27 * gqa_cache_elements(num_kv_heads=16, head_dim=128) == 110592  # 110.6K
    assert 60 * gqa_cache_elements(num_kv_heads=56, head_dim=128) == 860160  # 860.2K


def test_flops_are_formulas():
    """把符号传进去就得到公式；两者相等的 T 满足 P·c(n+v) = T(P+T)·2(c - (n+v)/2)，P 是缓存的长度。"""
    p, t, h, c, r, n, v = sympy.symbols("P T H c r n v", positive=True)
    sizes = dict(num_heads=h, latent_dim=c, rope_dim=r, nope_dim=n, value_dim=v)
    naive = mla_naive_flops(num_queries=t, num_keys=p + t, num_expanded=p + t, **sizes)
    absorbed = mla_absorbed_flops(num_queries=t, num_keys=p + t, **sizes)
    difference = 2 * h * (p * c * (n + v) - t * (p + t) * (2 * c - n - v))
    assert sympy.expand(naive - absorbed - difference) == 0


# GQA 是 MLA 的特例


@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
@pytest.mark.parametrize("way", WAYS)
def test_gqa_is_a_special_case_of_mla(num_kv_heads, way):
    """与 SDPA 的 enable_gqa 逐元素相等，缓存同样是 2KD 个元素。"""
    heads, head_dim = 4, 3
    generator = torch.Generator().manual_seed(1)
    q, k, v = (
        torch.randn(B, n, S, head_dim, generator=generator, dtype=torch.float64)
        for n in (heads, num_kv_heads, num_kv_heads)
    )
    k_up, v_up = gqa_as_mla_projections(num_heads=heads, num_kv_heads=num_kv_heads, head_dim=head_dim)
    assert k_up.dtype == torch.float64
    latent = torch.cat([x.transpose(1, 2).flatten(2) for x in (k, v)], dim=-1)
    assert latent.shape[-1] == gqa_cache_elements(num_kv_heads=num_kv_heads, head_dim=head_dim)
    empty = torch.empty(B, heads, S, 0, dtype=torch.float64)
    out = way(q, empty, latent, empty[:, 0], k_up, v_up)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


# 解耦 RoPE：不解耦时什么失败


def rotated(x, positions):
    cos, sin = rope_cos_sin(positions.expand(x.shape[0], -1), rope_inverse_frequencies(x.shape[-1]))
    return apply_rope(x, x, cos, sin)[0]


def test_rope_inside_the_up_projection_cannot_be_absorbed():
    """把 RoPE 加在 k^C 上：展开照算；吸收时不转、或去转潜向量，都不等；按偏移逐个吸收才相等。"""
    dim = 6
    generator = torch.Generator().manual_seed(2)
    q = torch.randn(1, 1, 1, dim, generator=generator, dtype=torch.float64)
    latent = torch.randn(1, 1, S, dim, generator=generator, dtype=torch.float64)
    w = torch.randn(dim, dim, generator=generator, dtype=torch.float64)
    here, there = torch.tensor([S - 1]), torch.arange(S)
    truth = (rotated(q, here) @ rotated(latent @ w.T, there).transpose(-2, -1)).flatten()
    ignore = ((q @ w) @ latent.transpose(-2, -1)).flatten()
    move = (rotated(q @ w, here) @ rotated(latent, there).transpose(-2, -1)).flatten()
    assert (ignore - truth).abs().max() > 1 and (move - truth).abs().max() > 1
    per_offset = torch.stack(
        [  # R_tᵀR_j = R_{j-t}：每个偏移一个不同的吸收后的查询
            (rotated(rotated(q, here), -there[j : j + 1]) @ w).flatten() @ latent[0, 0, j] for j in range(S)
        ]
    )
    torch.testing.assert_close(per_offset, truth)


@pytest.mark.parametrize("heads, exact", [(1, True), (2, True), (3, False), (5, False)])
def test_a_shared_rotation_of_the_latent_exists_only_without_compression(heads, exact):
    """求所有头共用的 R'，使 R_δ W_i = W_i R'：H·d_h 不超过 d_c 时有解，压缩了（H·d_h > d_c）就没有。"""
    dim, latent_dim = 6, 12
    w = torch.randn(1, heads, dim, latent_dim, dtype=torch.float64)
    turned = rotated(w.mT, torch.full((latent_dim,), 3)).mT.flatten(0, 2)
    flat = w.flatten(0, 2)
    residual = (flat @ (torch.linalg.pinv(flat) @ turned) - turned).norm() / turned.norm()
    assert residual < 1e-9 if exact else residual > 0.2


def test_a_selection_matrix_commutes_with_rope():
    """例外：GQA 的 W^{UK} 只是挑选，逐头旋转潜向量就等于旋转键；换成一般的矩阵就不行。"""
    heads, kv_heads, dim = 4, 2, 6
    latent = torch.randn(B, S, 2 * kv_heads * dim, dtype=torch.float64)
    k_up, _ = gqa_as_mla_projections(num_heads=heads, num_kv_heads=kv_heads, head_dim=dim)
    positions = torch.arange(S)

    def rotate_up(w):  # 先升维再旋转
        return rotated(torch.einsum("bsc,hnc->bhsn", latent, w), positions)

    def up_rotate(w):  # 先按每 dim 维一段旋转潜向量再升维
        turned = rotated(latent.unflatten(-1, (-1, dim)).transpose(1, 2), positions)
        return torch.einsum("bsc,hnc->bhsn", turned.transpose(1, 2).flatten(2), w)

    torch.testing.assert_close(rotate_up(k_up), up_rotate(k_up))
    general = torch.randn_like(k_up)
    assert (rotate_up(general) - up_rotate(general)).abs().max() > 1


# 被拒绝的错误写法：每个都用同一个真值（逐位置的循环）判


def wrong_scale_576(q_nope, q_rope, latent, k_rope, k_up, v_up):
    """按被缩并的维数缩放。"""
    factor = math.sqrt((DN + DR) / (DC + DR))
    return mla_absorbed(q_nope * factor, q_rope * factor, latent, k_rope, k_up, v_up)


def wrong_scale_nope_only(q_nope, q_rope, latent, k_rope, k_up, v_up):
    """只按不旋转的维数缩放。"""
    factor = math.sqrt((DN + DR) / DN)
    return mla_absorbed(q_nope * factor, q_rope * factor, latent, k_rope, k_up, v_up)


def wrong_latent_only(q_nope, q_rope, latent, k_rope, k_up, v_up):
    """只缓存潜向量：旋转键丢了。"""
    return mla_absorbed(q_nope, q_rope, latent, torch.zeros_like(k_rope), k_up, v_up)


def wrong_value_not_lifted_per_head(q_nope, q_rope, latent, k_rope, k_up, v_up):
    """所有头共用第 0 个头的升维矩阵：退化成 MQA。"""
    return mla_absorbed(q_nope, q_rope, latent, k_rope, k_up[:1].expand_as(k_up), v_up[:1].expand_as(v_up))


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    [wrong_scale_576, wrong_scale_nope_only, wrong_latent_only, wrong_value_not_lifted_per_head],
)
def test_wrong_versions_are_rejected(wrong):
    inputs = make_inputs()
    truth = loop_mla(*inputs)
    torch.testing.assert_close(mla_absorbed(*inputs), truth)
    assert (wrong(*inputs) - truth).abs().max() > 0.05


@pytest.mark.rejects
def test_a_rotary_key_per_head_is_rejected():
    """每个头一份旋转键：缓存是 DC + H·DR，权重的形状也装不进 transformers 的模块。"""
    theirs = DeepseekV3Attention(hf_dims(DeepseekV3Config), layer_idx=0)
    assert theirs.kv_a_proj_with_mqa.weight.shape == (DC + DR, C)
    assert make_layer().kv_a_proj_with_mqa.weight.shape == (DC + DR, C) != (DC + H * DR, C)
    assert mla_cache_elements(latent_dim=512, rope_dim=128 * 64) == 8704  # 576 的 15.1 倍


@pytest.mark.rejects
def test_caching_before_the_norm_is_rejected():
    """缓存归一化之前的潜向量、却拿归一化之后的权重去吸收：结果不同。"""
    layer, x = make_layer(), torch.randn(B, S, C, dtype=torch.float64)
    truth = layer(x, cos_sin=angles(0, S))
    norm, layer.kv_a_layernorm = layer.kv_a_layernorm, torch.nn.Identity()
    assert (layer(x, cos_sin=angles(0, S)) - truth).abs().max() > 0.01
    layer.kv_a_layernorm = norm
    torch.testing.assert_close(layer(x, cos_sin=angles(0, S)), truth)


@pytest.mark.rejects
def test_the_other_rope_pairing_is_rejected(monkeypatch):
    """权重按相邻两维配对训练；拿去做前后配对的旋转，结果不同。"""
    layer, x = make_layer(), torch.randn(B, S, C, dtype=torch.float64)
    truth = layer(x, cos_sin=angles(0, S))
    monkeypatch.setattr("snippets.architecture.mha_to_mla.apply_rope_interleaved", apply_rope)
    assert (layer(x, cos_sin=angles(0, S)) - truth).abs().max() > 0.01
