r"""MHA、GQA、MQA 的测试。

真值都不经过被测代码：用下标逐个写出的循环（只用 math）；`nn.MultiheadAttention`、transformers 的
`LlamaAttention`（复制权重，前向与梯度）；`F.scaled_dot_product_attention(enable_gqa=True)`；
以及一条不需要数值真值的性质：改第 t 个 token，不得改变 t 之前的输出。
文件末尾把流传的错误写法逐个列出，并断言同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import (
    LlamaAttention,
    LlamaModel,
    LlamaRotaryEmbedding,
)
from transformers.models.llama.modeling_llama import (
    repeat_kv as hf_repeat_kv,
)

from snippets.architecture.attention import (
    Attention,
    causal_padding_mask,
    grouped_query_attention,
    merge_heads,
    repeat_kv,
    split_heads,
)

B, H, K, T, S, D, DV, C = 2, 6, 3, 4, 5, 4, 7, 18
KV_HEADS = [6, 3, 2, 1]


def make_qkv(*, num_kv_heads=K, num_queries=T, num_keys=S, dtype=torch.float64):
    shapes = [
        (B, H, num_queries, D),
        (B, num_kv_heads, num_keys, D),
        (B, num_kv_heads, num_keys, DV),
    ]
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator, dtype=dtype) for shape in shapes]


def loop_gqa(q, k, v, *, scale=None, causal=True):
    """逐头、逐位置的循环，只用 Python 的浮点数：第 h 个查询头用第 floor(h K / H) 个键值头。"""
    batch, heads, num_queries, head_dim = q.shape
    num_kv_heads, num_keys = k.shape[1:3]
    scale = head_dim**-0.5 if scale is None else scale
    out = torch.zeros(batch, heads, num_queries, v.shape[-1], dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            kv = math.floor(h * num_kv_heads / heads)
            for i in range(num_queries):
                last = i + num_keys - num_queries if causal else num_keys - 1
                scores = [
                    scale
                    * math.fsum(x * y for x, y in zip(q[b, h, i].tolist(), k[b, kv, j].tolist(), strict=True))
                    for j in range(last + 1)
                ]
                weights = [math.exp(x - max(scores)) for x in scores]
                for j, weight in enumerate(weights):
                    out[b, h, i] += weight / math.fsum(weights) * v[b, kv, j]
    return out


def gradients(function, *tensors):
    tensors = [x.detach().clone().requires_grad_() for x in tensors]
    out = function(*tensors)
    direction = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    return out, *torch.autograd.grad((out * direction).sum(), tensors)


def make_module(num_kv_heads=K, *, head_dim=D, bias=False, **kwargs):
    return Attention(
        C, num_heads=H, num_kv_heads=num_kv_heads, head_dim=head_dim, bias=bias, **kwargs
    ).double()


class ListCache:
    """最朴素的缓存：沿位置轴拼接。"""

    def __init__(self):
        self.k = self.v = None

    def update(self, k, v):
        self.k = k if self.k is None else torch.cat([self.k, k], dim=2)
        self.v = v if self.v is None else torch.cat([self.v, v], dim=2)
        return self.k, self.v


# 手算


def test_split_heads_by_hand():
    """2 个位置、2 个头、每头 2 维：位置 0 是 0 1 2 3，头 0 拿 0 1，头 1 拿 2 3。"""
    x = torch.arange(8.0).view(1, 2, 4)
    expected = [[[[0.0, 1.0], [4.0, 5.0]], [[2.0, 3.0], [6.0, 7.0]]]]
    assert split_heads(x, num_heads=2).tolist() == expected
    assert merge_heads(torch.tensor(expected)).tolist() == x.tolist()


def test_split_heads_by_index():
    x = torch.randn(B, T, H * D)
    heads = split_heads(x, num_heads=H)
    assert heads.shape == (B, H, T, D)
    for h in range(H):
        assert torch.equal(heads[:, h], x[:, :, h * D : (h + 1) * D])
    assert torch.equal(merge_heads(heads), x)


def test_repeat_kv_by_hand():
    x = torch.tensor([10.0, 20.0, 30.0]).view(1, 3, 1, 1)
    assert repeat_kv(x, num_groups=2).flatten().tolist() == [10, 10, 20, 20, 30, 30]


def test_one_head_two_keys_by_hand():
    r"""D = 4，q = (2,0,0,0)，k = (ln 3,0,0,0) 与 0：除以 2 之后是 ln 3 与 0，权重 3/4 与 1/4，两个头都是 0.75。"""
    q = torch.tensor([2.0, 0.0, 0.0, 0.0]).expand(1, 2, 1, 4)
    k = torch.tensor([[math.log(3.0), 0.0, 0.0, 0.0], [0.0] * 4]).view(1, 1, 2, 4)
    v = torch.tensor([1.0, 0.0]).view(1, 1, 2, 1)
    out = grouped_query_attention(q, k, v, is_causal=False)
    torch.testing.assert_close(out.flatten(), torch.tensor([0.75, 0.75]))


def test_causal_padding_mask_by_hand():
    """第 0 条左填充 1 个，第 1 条没有填充；2 个新 query、4 个 key。"""
    attention_mask = torch.tensor([[False, True, True, True], [True] * 4])
    mask = causal_padding_mask(attention_mask, num_queries=2)
    assert mask.shape == (2, 1, 2, 4)
    assert mask[0, 0].tolist() == [[False, True, True, False], [False, True, True, True]]
    assert mask[1, 0].tolist() == [[True, True, True, False], [True] * 4]
    assert causal_padding_mask(attention_mask.to("meta"), num_queries=2).device.type == "meta"


# 与独立实现比较


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_matches_the_loop(num_kv_heads, is_causal, scale):
    q, k, v = make_qkv(num_kv_heads=num_kv_heads)
    out = grouped_query_attention(q, k, v, is_causal=is_causal, scale=scale)
    torch.testing.assert_close(out, loop_gqa(q, k, v, scale=scale, causal=is_causal))


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
@pytest.mark.parametrize("is_causal", [True, False])
def test_matches_sdpa_enable_gqa(num_kv_heads, is_causal):
    q, k, v = make_qkv(num_kv_heads=num_kv_heads)
    mask = causal_lower_right(T, S) if is_causal else None

    def torch_gqa(q, k, v):
        mask = torch.ones(T, S, dtype=torch.bool).tril(S - T) if is_causal else None
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)

    mine = gradients(lambda q, k, v: grouped_query_attention(q, k, v, is_causal=is_causal), q, k, v)
    for x, y in zip(mine, gradients(torch_gqa, q, k, v), strict=True):
        torch.testing.assert_close(x, y)
    if is_causal:
        wide_k, wide_v = (x.repeat_interleave(H // num_kv_heads, dim=1) for x in (k, v))
        with_bias = F.scaled_dot_product_attention(q, wide_k, wide_v[..., :D], attn_mask=mask)
        torch.testing.assert_close(mine[0][..., :D], with_bias)


@pytest.mark.parametrize("num_groups", [1, 2, 3])
def test_repeat_kv_matches_transformers(num_groups):
    _, k, _ = make_qkv()
    assert torch.equal(repeat_kv(k, num_groups=num_groups), hf_repeat_kv(k, num_groups))
    assert torch.equal(repeat_kv(k, num_groups=num_groups), k.repeat_interleave(num_groups, dim=1))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_mha_matches_torch_module(bias, is_causal):
    """`nn.MultiheadAttention` 把 q、k、v 的权重按行叠成 in_proj_weight；它的掩码 True 是挡住。"""
    width = H * D
    oracle = nn.MultiheadAttention(width, H, bias=bias, batch_first=True, dtype=torch.float64)
    mine = Attention(width, num_heads=H, bias=bias).double()
    projections = [mine.q_proj, mine.k_proj, mine.v_proj]
    with torch.no_grad():
        for p in oracle.parameters():
            p.normal_()
        for linear, weight in zip(projections, oracle.in_proj_weight.chunk(3), strict=True):
            linear.weight.copy_(weight)
        mine.o_proj.weight.copy_(oracle.out_proj.weight)
        if bias:
            for linear, b in zip(projections, oracle.in_proj_bias.chunk(3), strict=True):
                linear.bias.copy_(b)
            mine.o_proj.bias.copy_(oracle.out_proj.bias)
    hidden = 0.1 * torch.randn(B, T, width, dtype=torch.float64)
    blocked = torch.ones(T, T, dtype=torch.bool).triu(1) if is_causal else None
    torch_out = gradients(lambda x: oracle(x, x, x, attn_mask=blocked, need_weights=False)[0], hidden)
    my_out = gradients(lambda x: mine(x, is_causal=is_causal), hidden)
    for x, y in zip(my_out, torch_out, strict=True):
        torch.testing.assert_close(x, y)
    for out in (mine(hidden, is_causal=is_causal), oracle(hidden, hidden, hidden, attn_mask=blocked)[0]):
        out.square().sum().backward()
    for i, linear in enumerate(projections):
        torch.testing.assert_close(linear.weight.grad, oracle.in_proj_weight.grad.chunk(3)[i])
    torch.testing.assert_close(mine.o_proj.weight.grad, oracle.out_proj.weight.grad)


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
@pytest.mark.parametrize("bias", [True, False])
def test_module_matches_llama_attention(num_kv_heads, bias):
    """带旋转，每头 4 维、6 个头而宽度 18（`head_dim` 与宽度无关）；参数名相同，直接 load_state_dict。"""
    config = LlamaConfig(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=num_kv_heads,
        head_dim=D,
        attention_bias=bias,
        attn_implementation="eager",
    )
    oracle = LlamaAttention(config, layer_idx=0).double()
    mine = make_module(num_kv_heads, bias=bias)
    mine.load_state_dict(oracle.state_dict())  # strict：名字与形状都相同
    hidden = torch.randn(B, T, C, dtype=torch.float64)
    position_ids = torch.tensor([[3, 4, 5, 6], [0, 1, 2, 3]])
    cos_sin = LlamaRotaryEmbedding(config)(hidden, position_ids)
    blocked = torch.zeros(T, T, dtype=torch.float64).masked_fill(
        torch.ones(T, T, dtype=torch.bool).triu(1), float("-inf")
    )
    theirs = gradients(
        lambda x: oracle(x, position_embeddings=cos_sin, attention_mask=blocked[None, None])[0], hidden
    )
    # LlamaAttention 的 softmax 固定用 float32，所以容差按 float32
    for x, y in zip(gradients(lambda x: mine(x, cos_sin=cos_sin), hidden), theirs, strict=True):
        torch.testing.assert_close(x, y, rtol=1e-5, atol=1e-6)
    assert (mine(hidden) - theirs[0]).abs().max() > 1e-3  # 旋转确实起作用


def test_defaults_of_the_module():
    module = Attention(12, num_heads=4)
    assert [p.out_features for p in (module.q_proj, module.k_proj, module.v_proj)] == [12, 12, 12]
    assert all(p.bias is None for p in (module.q_proj, module.k_proj, module.v_proj, module.o_proj))
    assert sum(p.numel() for p in module.parameters()) == 4 * 12 * 12
    module = Attention(12, num_heads=4, num_kv_heads=2)  # 每头 12 / 4 = 3 维，与键值头数无关
    assert [p.out_features for p in (module.q_proj, module.k_proj, module.v_proj)] == [12, 6, 6]
    module = Attention(C, num_heads=H, num_kv_heads=2, head_dim=D, bias=True)
    shapes = {name: tuple(p.shape) for name, p in module.named_parameters()}
    assert shapes == {
        "q_proj.weight": (H * D, C),
        "q_proj.bias": (H * D,),
        "k_proj.weight": (2 * D, C),
        "k_proj.bias": (2 * D,),
        "v_proj.weight": (2 * D, C),
        "v_proj.bias": (2 * D,),
        "o_proj.weight": (C, H * D),
        "o_proj.bias": (C,),
    }


# 性质


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
def test_causality(num_kv_heads):
    """改第 t 个 token：t 之前的输出一位都不变，t 自己要变；不因果时 t 之前也变。"""
    module = make_module(num_kv_heads)
    hidden = torch.randn(B, T, C, dtype=torch.float64)
    for t in range(T):
        edited = hidden.clone()
        edited[:, t] += 1.0
        change = (module(edited) - module(hidden)).abs().amax(dim=(0, 2))
        assert (change[:t] == 0).all()
        assert (change[t:] > 1e-4).all()
        both_ways = module(edited, is_causal=False) - module(hidden, is_causal=False)
        assert (both_ways.abs().amax(dim=(0, 2)) > 1e-4).all()


@pytest.mark.parametrize("num_kv_heads", [3, 2, 1])
def test_gqa_equals_mha_with_repeated_weights(num_kv_heads):
    """把 K 组投影的行按块复制成 H 组，就是一个 MHA：GQA 是权重绑定的 MHA。"""
    gqa = make_module(num_kv_heads)
    mha = make_module(H)
    state = gqa.state_dict()
    for name in ("k_proj.weight", "v_proj.weight"):
        blocks = state[name].view(num_kv_heads, D, C)
        state[name] = blocks[[math.floor(h * num_kv_heads / H) for h in range(H)]].reshape(H * D, C)
    mha.load_state_dict(state)
    hidden = torch.randn(B, T, C, dtype=torch.float64)
    torch.testing.assert_close(gqa(hidden), mha(hidden))
    # 绑定的权重收到各份梯度之和
    gqa(hidden).square().sum().backward()
    mha(hidden).square().sum().backward()
    summed = mha.k_proj.weight.grad.view(num_kv_heads, H // num_kv_heads, D, C).sum(dim=1)
    torch.testing.assert_close(gqa.k_proj.weight.grad, summed.reshape(-1, C))


def test_num_kv_heads_equal_to_num_heads_is_the_default():
    default, explicit = make_module(None), make_module(H)
    explicit.load_state_dict(default.state_dict())
    hidden = torch.randn(B, T, C, dtype=torch.float64)
    assert torch.equal(default(hidden), explicit(hidden))


@pytest.mark.parametrize("chunks", [[1, 1, 1, 1, 1], [3, 1, 1], [2, 3]])
def test_decoding_in_chunks_equals_one_forward(chunks):
    """每段用自己的位置旋转，键值进缓存；拼起来与一次前向相同。缓存里是 K 个头，不是 H 个。"""
    module, cache = make_module(), ListCache()
    total = sum(chunks)
    hidden = torch.randn(B, total, C, dtype=torch.float64)
    rotary = LlamaRotaryEmbedding(LlamaConfig(hidden_size=C, num_attention_heads=H, head_dim=D))
    cos, sin = rotary(hidden, torch.arange(total).expand(B, total))
    full = module(hidden, cos_sin=(cos, sin))
    pieces, start = [], 0
    for length in chunks:
        part = slice(start, start + length)
        pieces.append(module(hidden[:, part], cos_sin=(cos[:, part], sin[:, part]), kv_cache=cache))
        start += length
    torch.testing.assert_close(torch.cat(pieces, dim=1), full)
    assert cache.k.shape == cache.v.shape == (B, K, total, D)


def test_padded_batch_equals_each_sequence_alone():
    """左填充与右填充：真实位置的输出都等于单独算那一条（没有位置编码，所以平移无妨）。"""
    q, k, v = make_qkv(num_kv_heads=H, num_queries=S, num_keys=S)
    for left in (True, False):
        mask = torch.ones(B, S, dtype=torch.bool)
        real = slice(2, S) if left else slice(0, S - 2)
        mask[0] = False
        mask[0, real] = True
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=causal_padding_mask(mask, num_queries=S))
        alone = loop_gqa(q[:1, :, real], k[:1, :, real], v[:1, :, real])
        torch.testing.assert_close(out[:1, :, real], alone)
        torch.testing.assert_close(out[1:], loop_gqa(q[1:], k[1:], v[1:]))


def test_mean_pooling_is_the_least_squares_shared_head():
    """把组内 g 个键头换成一个：到各头距离平方和最小的就是均值，任取其中一个头都更远。"""
    weights = torch.randn(H, D, C, dtype=torch.float64).view(K, H // K, D, C)
    mean = weights.mean(dim=1, keepdim=True)
    distance = (weights - mean).square().sum()
    for first in range(H // K):
        assert (weights - weights[:, first : first + 1]).square().sum() > 1.5 * distance


def test_folding_the_group_into_the_query_axis_needs_no_copy_of_the_keys():
    """(B,K,gT,D) 乘 key 不复制；拆成 (B,K,g,T,D) 靠 matmul 广播，torch 2.13.0 里照样 clone 出 H 个头的 key。"""
    q, k, _ = make_qkv()
    grouped = q.view(B, K, H // K, T, D)

    class Copies(TorchDispatchMode):
        def __init__(self):
            super().__init__()
            self.shapes = []

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func is torch.ops.aten.clone.default:
                self.shapes.append(tuple(args[0].shape))
            return func(*args, **(kwargs or {}))

    with Copies() as folded_copies:
        folded = grouped.flatten(2, 3) @ k.transpose(-2, -1)
    with Copies() as broadcast_copies:
        broadcast = grouped @ k.unsqueeze(2).transpose(-2, -1)
    assert folded_copies.shapes == []
    assert broadcast_copies.shapes == [(B, K, H // K, D, S)]
    expected = q @ k.repeat_interleave(H // K, dim=1).transpose(-2, -1)
    torch.testing.assert_close(folded.view(B, H, T, S), expected)
    torch.testing.assert_close(broadcast.flatten(1, 2), expected)


def test_eager_and_sdpa_differ_only_in_padded_rows():
    """transformers 5.23.0：左填充时 eager 给均匀平均、SDPA 给 0，真实位置相同。"""
    config = LlamaConfig(
        hidden_size=16,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=8,
        num_hidden_layers=1,
        vocab_size=11,
    )
    outputs, state = [], None
    for implementation in ("eager", "sdpa"):
        config._attn_implementation = implementation
        model = LlamaModel(config).eval()  # float32：eager 的 softmax 固定用它
        state = model.state_dict() if state is None else state
        model.load_state_dict(state)
        ids, mask = torch.arange(7)[None], torch.tensor([[0, 0, 0, 1, 1, 1, 1]])
        with torch.no_grad():
            outputs.append(model(ids, attention_mask=mask).last_hidden_state)
    gap = (outputs[0] - outputs[1]).abs().amax(dim=(0, 2))
    assert (gap[:3] > 1e-3).all()
    assert (gap[3:] < 1e-5).all()


# 边界


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_dtype_is_kept(dtype):
    q, k, v = make_qkv(dtype=dtype)
    assert grouped_query_attention(q, k, v, is_causal=True).dtype == dtype


@pytest.mark.parametrize("num_kv_heads", [4, 5, 12])
def test_heads_that_do_not_divide_are_refused(num_kv_heads):
    q, k, v = make_qkv(num_kv_heads=num_kv_heads)
    with pytest.raises(ValueError, match=f"查询头数 6 不是键值头数 {num_kv_heads} 的整数倍"):
        grouped_query_attention(q, k, v, is_causal=True)
    with pytest.raises(ValueError, match="整数倍"):
        make_module(num_kv_heads)(torch.randn(B, T, C, dtype=torch.float64))


def test_width_that_does_not_divide_is_refused_unless_head_dim_is_given():
    with pytest.raises(ValueError, match="模型宽度 10 不能被头数 6 整除"):
        Attention(10, num_heads=H)
    assert Attention(10, num_heads=H, head_dim=3).q_proj.out_features == 18


def test_more_queries_than_keys_cannot_be_causal():
    q, k, v = make_qkv(num_queries=S, num_keys=T)
    with pytest.raises(ValueError, match="一个 key 也看不见"):
        grouped_query_attention(q, k, v, is_causal=True)


def test_fully_masked_row():
    """SDPA（2.13.0）给 0，手写 softmax 给 NaN，加 finfo.min 给均值，MultiheadAttention 随 need_weights 变。"""
    q, k, v = make_qkv(num_kv_heads=H, num_queries=S, num_keys=S, dtype=torch.float32)
    mask = causal_padding_mask(torch.tensor([[False, True, True, True, True]] * B), num_queries=S)
    assert (F.scaled_dot_product_attention(q, k, v, attn_mask=mask)[:, :, 0] == 0).all()
    scores = q @ k.transpose(-2, -1) * D**-0.5
    by_hand = torch.softmax(scores.masked_fill(~mask, float("-inf")), dim=-1)
    assert by_hand[:, :, 0].isnan().all() and by_hand[:, :, 1:].isfinite().all()
    lowest = torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)
    uniform = torch.softmax(scores + lowest, dim=-1)[:, :, 0]
    torch.testing.assert_close(uniform, torch.full_like(uniform, 1 / S))
    module = nn.MultiheadAttention(H, 1, batch_first=True)
    x = torch.randn(1, T, H)
    blocked = torch.ones(1, T, dtype=torch.bool)
    assert module(x, x, x, key_padding_mask=blocked)[0].isnan().all()
    bias = module.out_proj.bias.expand(1, T, H)
    torch.testing.assert_close(module(x, x, x, key_padding_mask=blocked, need_weights=False)[0], bias)


# 被拒绝的错误写法：同一个循环真值，每个错误写法都要差出一大截


def template(q, k, v, *, scale=D**-0.5, diagonal=S - T, dim=-1, order="block", late_mask=False, zero=False):
    g = q.shape[1] // k.shape[1]
    k, v = (x.repeat_interleave(g, 1) if order == "block" else x.repeat(1, g, 1, 1) for x in (k, v))
    visible = torch.ones(q.shape[2], k.shape[2]).tril(diagonal).bool()
    scores = q @ k.transpose(-2, -1) * scale
    if zero:
        return torch.softmax(scores * visible, dim=dim) @ v
    if late_mask:
        return torch.softmax(scores, dim=dim) * visible @ v
    return torch.softmax(scores.masked_fill(~visible, float("-inf")), dim=dim).nan_to_num() @ v


WRONG_VERSIONS = {
    "掩码多看一个": dict(diagonal=S - T + 1),
    "掩码少看一个": dict(diagonal=S - T - 1),
    "左上角对齐": dict(diagonal=0),
    "没有除以根号 d": dict(scale=1.0),
    "取模映射": dict(order="modulo"),
    "对 query 轴做 softmax": dict(dim=-2),
    "softmax 之后才掩码，不归一": dict(late_mask=True),
    "打分乘 0 而不是填负无穷": dict(zero=True),
}


@pytest.mark.parametrize("num_kv_heads", KV_HEADS)
def test_the_template_of_the_wrong_versions_is_right(num_kv_heads):
    q, k, v = make_qkv(num_kv_heads=num_kv_heads)
    torch.testing.assert_close(template(q, k, v), loop_gqa(q, k, v))


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_VERSIONS)
def test_wrong_version_is_rejected(name):
    q, k, v = make_qkv()
    truth = loop_gqa(q, k, v)
    torch.testing.assert_close(grouped_query_attention(q, k, v, is_causal=True), truth)
    wrong = template(q, k, v, **WRONG_VERSIONS[name])
    assert (wrong - truth).abs().max() > 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(wrong, truth)


def test_modulo_mapping_hides_in_mha_and_mqa():
    """取模只在 1 < K < H 时露馅：K = H 与 K = 1 的测试都抓不到它。"""
    for num_kv_heads in (H, 1):
        q, k, v = make_qkv(num_kv_heads=num_kv_heads)
        torch.testing.assert_close(template(q, k, v, order="modulo"), loop_gqa(q, k, v))


def test_modulo_mapping_is_a_permutation_of_the_query_heads():
    """取模等于先把查询头按 (g, K) 转置成 (K, g) 再按块分组：从头训练等价，加载别人的权重就错。"""
    q, k, v = make_qkv()
    order = torch.arange(H).view(H // K, K).T.flatten()  # 0 3 1 4 2 5
    assert order.tolist() == [0, 3, 1, 4, 2, 5]
    truth = loop_gqa(q[:, order], k, v)
    torch.testing.assert_close(template(q, k, v, order="modulo")[:, order], truth)


@pytest.mark.rejects
def test_view_straight_into_heads_is_rejected():
    """直接 view 成 (B, H, T, D)：形状对，头里却混进别的位置，于是漏看未来。"""
    x = torch.randn(B, T, H * D)
    truth = torch.stack([x[:, :, h * D : (h + 1) * D] for h in range(H)], dim=1)
    assert torch.equal(split_heads(x, num_heads=H), truth)
    wrong = x.view(B, H, T, D)
    assert wrong.shape == truth.shape
    assert not torch.equal(wrong, truth)
    assert (wrong - truth).abs().max() > 0.5
    # 合并时忘了换轴，同样形状对、内容错
    assert (truth.reshape(B, T, H * D) - x).abs().max() > 0.5
    with pytest.raises(RuntimeError, match="view size is not compatible"):
        truth.transpose(1, 2).view(B, T, H * D)  # 换轴之后不连续
    # 头 0 的第 1 行应来自位置 1，错误写法里来自位置 0 的第 D..2D 维
    assert torch.equal(wrong[:, 0, 1], x[:, 0, D : 2 * D])


@pytest.mark.rejects
def test_inverted_boolean_mask_is_rejected():
    """把 MultiheadAttention 的「True 是挡住」直接交给 SDPA，看见的恰是该挡的。"""
    q, k, v = make_qkv(num_kv_heads=H, num_queries=S, num_keys=S)
    truth = loop_gqa(q, k, v)
    visible = torch.ones(S, S, dtype=torch.bool).tril()
    torch.testing.assert_close(F.scaled_dot_product_attention(q, k, v, attn_mask=visible), truth)
    wrong = F.scaled_dot_product_attention(q, k, v, attn_mask=~visible)
    assert (wrong - truth).abs().amax(dim=(0, 1, 3)).min() > 0.1  # 每一行都错
