"""KV cache 的检验。

真值有四个来源：不用缓存、一次前向整段的 MiniLlama 与 transformers 5.23.0 的 LlamaForCausalLM（逐位置的 logit）；
transformers 的 DynamicCache 与 MistralForCausalLM（滑动窗口）；真的张量的 nbytes；
逐个数出来的乘加次数与元素数。流传的错误写法都在这里定义，并被同一个真值拒绝。
"""

import math

import pytest
import sympy
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from snippets.architecture.attention import Attention, grouped_query_attention
from snippets.architecture.kv_cache import (
    BlockPool,
    KVCache,
    PagedKVCache,
    SlidingWindowCache,
    attention_intensity,
    decode_step_seconds,
    fake_quantize,
    kv_cache_bytes,
    linear_intensity,
)
from snippets.architecture.rope import apply_rope, rope_cos_sin, rope_inverse_frequencies
from snippets.architecture.transformer_from_scratch import MiniLlama, generate_greedy, init_weights

V, C, F, L, H, K, D = 23, 24, 20, 3, 6, 2, 4
B, S = 2, 11


@pytest.fixture
def model():
    model = MiniLlama(
        vocab_size=V, hidden_size=C, intermediate_size=F, num_layers=L, num_heads=H, num_kv_heads=K
    ).double()
    init_weights(model, std=0.4)  # 默认 0.02 时各 token 几乎等概率，错了也看不出来
    return model.eval()


@pytest.fixture
def input_ids():
    return torch.randint(V, (B, S), generator=torch.Generator().manual_seed(1))


def caches(cls=KVCache):
    return [cls() for _ in range(L)]


@torch.no_grad()
def run(model, input_ids, splits, kv_caches, **kwargs):
    """按 splits 分段送入，拼回逐位置的 logit。"""
    return torch.cat([model(x, kv_caches=kv_caches, **kwargs) for x in input_ids.split(splits, dim=1)], dim=1)


@torch.no_grad()
def full(model, input_ids):
    return model(input_ids)


def hf_model(model, cls=LlamaForCausalLM, config=LlamaConfig, **kwargs):
    """把 MiniLlama 的权重装进 transformers 的模型。"""
    shape = dict(num_hidden_layers=L, num_attention_heads=H, num_key_value_heads=K)
    hf = cls(config(vocab_size=V, hidden_size=C, intermediate_size=F, rms_norm_eps=1e-6, **shape, **kwargs))
    state = {k if k.startswith("lm_head") else f"model.{k}": v for k, v in model.state_dict().items()}
    hf.load_state_dict(state)
    return hf.double().eval()


# 手算


def test_by_hand():
    """两个头、两维：三个 token 先来两个再来一个，接在 token 轴的末尾；裁到 2 个，再交换两条序列。"""
    cache = KVCache()
    assert cache.length == 0
    k = torch.arange(24.0).view(2, 2, 3, 2)
    cache.update(k[:, :, :2], -k[:, :, :2])
    assert cache.length == 2
    keys, values = cache.update(k[:, :, 2:], 1 - k[:, :, 2:])
    assert keys.equal(k) and values[:, :, :2].equal(-k[:, :, :2]) and values[:, :, 2:].equal(1 - k[:, :, 2:])
    assert cache.keys is keys and cache.values is values and cache.length == 3
    cache.crop(2)
    assert cache.keys.equal(k[:, :, :2]) and cache.values.equal(-k[:, :, :2]) and cache.length == 2
    cache.reorder(torch.tensor([1, 0, 1]))
    assert cache.keys.equal(k[[1, 0, 1], :, :2]) and cache.values.equal(-k[[1, 0, 1], :, :2])


def test_bytes_by_hand():
    """Llama-3-8B：2×32 层×8 头×128 维×2 字节 = 131072 字节每 token，即 128 KiB。"""
    shape = dict(num_layers=32, num_kv_heads=8, head_dim=128)
    assert kv_cache_bytes(**shape, num_tokens=1) == 131072
    assert kv_cache_bytes(**shape, num_tokens=8192, batch_size=3) == 3 * 2**30
    assert kv_cache_bytes(**shape, num_tokens=8192, bytes_per_element=1) == 2**29


def test_intensities_by_hand():
    """线性层 n=2、3→5：60 次运算、31 个元素。注意力 T=2、S=7、g=3：每维 4·3·2·7=168 次、2·7+2·3·2=26 个元素。"""
    shape = dict(num_tokens=2, in_features=3, out_features=5)
    assert linear_intensity(**shape) == 60 / 62
    assert linear_intensity(**shape, bytes_per_element=4) == 60 / 124
    shape = dict(num_queries=2, num_keys=7, num_groups=3)
    assert attention_intensity(**shape) == pytest.approx(168 / 52, rel=1e-15)
    assert attention_intensity(**shape, bytes_per_element=1) == pytest.approx(168 / 26, rel=1e-15)
    assert decode_step_seconds(weight_bytes=3.0, cache_bytes=5.0, bandwidth=4.0) == 2.0


def test_quantization_by_hand():
    """2 位是 3 格。第 0 列 0、4、9 的格距是 3：4 归到 3。按行则每行两个数就是端点，原样返回。"""
    x = torch.tensor([[0.0, 1.0], [4.0, 1.0], [9.0, 1.0]])
    expected = torch.tensor([[0.0, 1.0], [3.0, 1.0], [9.0, 1.0]])
    assert fake_quantize(x, num_bits=2, dim=-2).equal(expected)
    assert fake_quantize(x, num_bits=2, dim=-1).equal(x)
    assert fake_quantize(torch.tensor([[-2.0, 0.5, 1.0]]), num_bits=1, dim=-1).equal(
        torch.tensor([[-2.0, 1.0, 1.0]])
    )


# 与独立实现比较


@pytest.mark.parametrize("splits", [[S], [1] * S, [7] + [1] * 4, [4, 4, 3], [1, 9, 1]])
def test_cached_equals_uncached_at_every_position(model, input_ids, splits):
    """整段预填充、逐 token、先填后解码、分块预填充，逐位置都等于不用缓存。"""
    kv_caches = caches()
    torch.testing.assert_close(run(model, input_ids, splits, kv_caches), full(model, input_ids))
    assert [cache.length for cache in kv_caches] == [S] * L


def test_cached_logits_match_transformers(model, input_ids):
    """transformers 自己的权重与实现，不用缓存的 logit。"""
    with torch.no_grad():
        expected = hf_model(model)(input_ids, use_cache=False).logits
    got = run(model, input_ids, [5] + [1] * 6, caches())
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)  # transformers 的频率是 float32


def test_contents_match_dynamic_cache(model, input_ids):
    """存的东西相同（旋转之后的 K 个头），裁剪、重排之后仍相同。"""
    theirs, ours = DynamicCache(), caches()
    hf = hf_model(model)
    with torch.no_grad():
        for part in input_ids.split([6, 1, 4], dim=1):
            hf(part, past_key_values=theirs, use_cache=True)
            model(part, kv_caches=ours)

    def check():
        for layer, cache in zip(theirs.layers, ours, strict=True):
            torch.testing.assert_close(cache.keys, layer.keys, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(cache.values, layer.values, rtol=1e-5, atol=1e-5)
        assert ours[0].length == theirs.get_seq_length()

    check()
    theirs.crop(-3)  # 5.23.0 收的是负的删除个数
    indices = torch.tensor([1, 1, 0])
    theirs.reorder_cache(indices)
    for cache in ours:
        cache.crop(S - 3)
        cache.reorder(indices)
    check()


def test_generation_is_identical(model, input_ids):
    expected = generate_greedy(model, input_ids[:, :3], max_new_tokens=9)
    got = generate_greedy(model, input_ids[:, :3], max_new_tokens=9, kv_caches=caches())
    assert got.equal(expected) and len(got.unique()) > 4


@pytest.mark.parametrize("window", [1, 3, 5])
def test_sliding_window_matches_mistral(model, input_ids, window):
    """Mistral 一次前向整段、带状掩码；这里逐 token，只存 window 个。"""
    hf = hf_model(model, MistralForCausalLM, MistralConfig, head_dim=D, sliding_window=window)
    assert hf.config.sliding_window == window
    with torch.no_grad():
        expected = hf(input_ids, use_cache=False).logits
    kv_caches = caches(lambda: SlidingWindowCache(window=window))
    got = run(model, input_ids, [1] * S, kv_caches)
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)
    assert kv_caches[0].length == S and kv_caches[0].cache.length == window
    assert (got[:, -1] - full(model, input_ids)[:, -1]).abs().max() > 0.1


@pytest.mark.parametrize("splits", [[S], [1] * S, [5, 1, 5]])
def test_paged_cache_equals_uncached(model, input_ids, splits):
    """两条长短不同的序列交替写同一个池，块交错、不相邻；块长 3 不整除 11。"""
    pools = [
        BlockPool(num_blocks=7, block_size=3, num_kv_heads=K, head_dim=D, dtype=torch.float64)
        for _ in range(L)
    ]
    a, b = ([PagedKVCache(pool) for pool in pools] for _ in range(2))
    logits = []
    for step, part in enumerate(input_ids.split(splits, dim=1)):
        with torch.no_grad():
            logits.append(model(part[:1], kv_caches=a))
            if step < 4:
                model(part[1:, :2], kv_caches=b)
    torch.testing.assert_close(torch.cat(logits, dim=1), full(model, input_ids[:1]))
    assert a[0].length == S and len(a[0].block_table) == math.ceil(S / 3)
    assert len(b[0].block_table) == math.ceil(b[0].length / 3)
    used = a[0].block_table + b[0].block_table
    assert sorted(used + pools[0].free) == list(range(7))


@pytest.mark.parametrize("num_heads", [2, 6])
def test_bytes_equal_the_tensors(num_heads):
    """公式等于真的缓存的字节数；MHA 与 GQA 各一。"""
    model = MiniLlama(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=F,
        num_layers=L,
        num_heads=H,
        num_kv_heads=num_heads,
    ).bfloat16()
    kv_caches = caches()
    for _ in range(5):
        k = torch.zeros(B, num_heads, 1, D, dtype=torch.bfloat16)
        for cache in kv_caches:
            cache.update(k, k)
    assert model.layers[0].self_attn.num_kv_heads == num_heads
    total = sum(cache.keys.nbytes + cache.values.nbytes for cache in kv_caches)
    shape = dict(num_layers=L, num_kv_heads=num_heads, head_dim=D, num_tokens=5)
    assert kv_cache_bytes(**shape, batch_size=B) == total
    assert kv_cache_bytes(**shape) == total / B  # 默认一条序列、两个字节


def test_intensities_count_real_flops():
    """浮点运算数由 torch 的 FlopCounterMode 数出，元素数由张量数出。"""
    x, w = torch.randn(5, 7), torch.randn(7, 3)
    with FlopCounterMode(display=False) as counter:
        y = x @ w
    size = dict(num_tokens=5, in_features=7, out_features=3)
    expected = counter.get_total_flops() / (x.nbytes + w.nbytes + y.nbytes)
    assert linear_intensity(**size, bytes_per_element=4) == pytest.approx(expected, rel=1e-15)

    q, k, v = torch.randn(B, H, 2, D), torch.randn(B, K, S, D), torch.randn(B, K, S, D)
    with FlopCounterMode(display=False) as counter:
        out = grouped_query_attention(q, k, v, is_causal=False)
    expected = counter.get_total_flops() / (q.nbytes + k.nbytes + v.nbytes + out.nbytes)
    size = dict(num_queries=2, num_keys=S, num_groups=H // K)
    assert attention_intensity(**size, bytes_per_element=4) == pytest.approx(expected, rel=1e-15)


# 性质


def test_formulas_are_symbolic():
    """传符号得到公式：字节数是六个量之积的两倍，强度的极限是 2n/c 与 2g/c。"""
    n, s, g, c, a, b = sympy.symbols("n s g c a b", positive=True)
    size = kv_cache_bytes(
        num_layers=n, num_kv_heads=g, head_dim=a, num_tokens=s, batch_size=b, bytes_per_element=c
    )
    assert sympy.simplify(size - 2 * n * g * a * s * b * c) == 0
    decode = attention_intensity(num_queries=1, num_keys=s, num_groups=g, bytes_per_element=c)
    assert sympy.limit(decode, s, sympy.oo) == 2 * g / c
    prefill = attention_intensity(num_queries=s, num_keys=s, num_groups=g, bytes_per_element=c)
    assert sympy.simplify(prefill - 2 * g * s / (c * (1 + g))) == 0
    linear = linear_intensity(num_tokens=n, in_features=a, out_features=a, bytes_per_element=c)
    assert sympy.limit(linear, a, sympy.oo) == 2 * n / c
    time = decode_step_seconds(weight_bytes=a, cache_bytes=b, bandwidth=c)
    assert sympy.simplify(time - (a + b) / c) == 0


def test_crop_rolls_back_rejected_tokens(model, input_ids):
    """推测解码：送进四个草稿、拒绝后三个，裁掉后接着走，与从没送过一样。"""
    kv_caches = caches()
    run(model, input_ids[:, :5], [5], kv_caches)
    run(model, (input_ids[:, 4:8] + 1) % V, [4], kv_caches)  # 错的草稿
    for cache in kv_caches:
        cache.crop(5)
    torch.testing.assert_close(
        run(model, input_ids[:, 5:], [1] * 6, kv_caches), full(model, input_ids)[:, 5:]
    )


def test_prefix_is_computed_once_and_shared(model, input_ids):
    """共用前缀：算一次，复制给三条，各接各的后缀，等于三条各算整段。"""
    suffixes = torch.randint(V, (3, 4), generator=torch.Generator().manual_seed(2))
    kv_caches = caches()
    run(model, input_ids[:1], [S], kv_caches)
    for cache in kv_caches:
        cache.reorder(torch.zeros(3, dtype=torch.long))
    whole = torch.cat((input_ids[:1].expand(3, -1), suffixes), dim=1)
    torch.testing.assert_close(run(model, suffixes, [4], kv_caches), full(model, whole)[:, S:])


def test_beam_reorder_follows_the_parent(model, input_ids):
    """两条束都从第 1 条长出来：重排后等于按父束拼好的前缀重算；不重排就错。"""
    parents, new = torch.tensor([1, 1]), torch.tensor([[3], [8]])
    whole = torch.cat((input_ids[parents], new), dim=1)
    for reorder in (True, False):
        kv_caches = caches()
        run(model, input_ids, [S], kv_caches)
        if reorder:
            for cache in kv_caches:
                cache.reorder(parents)
        error = (run(model, new, [1], kv_caches) - full(model, whole)[:, S:]).abs().amax(dim=(1, 2))
        assert (error.max() < 1e-10) if reorder else (error[0] > 0.1)


def test_shifting_every_position_changes_nothing(model, input_ids):
    """整体平移位置、分块送入，不改变结果：RoPE 只看相对位置。"""
    positions = torch.arange(S).expand(B, -1) + 100
    shifted = [
        model(x, kv_caches=kv, position_ids=p)
        for kv in [caches()]
        for x, p in zip(input_ids.split(4, dim=1), positions.split(4, dim=1), strict=True)
    ]
    torch.testing.assert_close(torch.cat(shifted, dim=1), full(model, input_ids))


def test_released_blocks_are_reused():
    pool = BlockPool(num_blocks=2, block_size=2, num_kv_heads=K, head_dim=D)
    assert pool.keys.dtype == pool.values.dtype == torch.float32
    assert pool.keys.shape == pool.values.shape == (2, 2, K, D)
    first, second = PagedKVCache(pool), PagedKVCache(pool)
    k, v = torch.randn(1, K, 4, D), torch.randn(1, K, 4, D)
    first.update(k, v)
    with pytest.raises(ValueError, match="没有空块"):
        second.update(k[:, :, :1], v[:, :, :1])
    first.release()
    assert first.length == 0 and first.block_table == [] and sorted(pool.free) == [0, 1]
    keys, values = second.update(k[:, :, :3], v[:, :, :3])
    assert keys.equal(k[:, :, :3]) and values.equal(v[:, :, :3])
    assert keys.shape == (1, K, 3, D)


def test_release_keeps_the_blocks_that_were_already_free():
    pool = BlockPool(num_blocks=3, block_size=2, num_kv_heads=K, head_dim=D)
    cache = PagedKVCache(pool)
    cache.update(torch.randn(1, K, 3, D), torch.randn(1, K, 3, D))
    assert len(pool.free) == 1
    cache.release()
    assert sorted(pool.free) == [0, 1, 2]


def test_quantization_error_is_at_most_half_a_step():
    """误差不超过半格；端点不动；位数加 1，格距约减半；三维以上按最后两维。"""
    x = torch.randn(B, K, 50, D, dtype=torch.float64)
    for dim in (-1, -2):
        for num_bits in (1, 2, 4, 8):
            span = x.amax(dim, keepdim=True) - x.amin(dim, keepdim=True)
            error = (fake_quantize(x, num_bits=num_bits, dim=dim) - x).abs()
            assert (error <= span / (2**num_bits - 1) / 2 + 1e-12).all()
            torch.testing.assert_close(fake_quantize(x, num_bits=num_bits, dim=dim).amax(dim), x.amax(dim))
            levels = {len(row.unique()) for row in fake_quantize(x, num_bits=num_bits, dim=-2)[0, 0].T}
            assert max(levels) <= 2**num_bits
    constant = torch.full((1, 1, 3, 2), 0.3)
    assert fake_quantize(constant, num_bits=4, dim=-1).equal(constant)


# 边界


def test_crop_edges():
    cache = KVCache()
    cache.crop(0)  # 空的裁到 0 什么也不做
    assert cache.length == 0 and cache.keys is None
    k = torch.randn(1, K, 3, D)
    cache.update(k, -k)
    cache.crop(3)
    assert cache.length == 3
    for length in (-1, 4):
        with pytest.raises(ValueError, match=f"缓存里有 3 个 token，留不下 {length} 个"):
            cache.crop(length)
    cache.crop(0)
    assert cache.length == 0
    keys, values = cache.update(k, -k)
    assert keys.equal(k) and values.equal(-k)


def test_window_edges():
    with pytest.raises(ValueError, match="window=0"):
        SlidingWindowCache(window=0)
    cache = SlidingWindowCache(window=2)
    k = torch.randn(1, K, 2, D)
    with pytest.raises(ValueError, match="一次来了 2 个 token"):
        cache.update(k, k)
    assert cache.length == 0


# 被拒绝的错误写法：真值都是不用缓存、一次前向整段


class WrongAxis(KVCache):
    """接在批的轴上（头、每头维数的轴形状不合，直接报错）。"""

    def update(self, k, v):
        if self.keys is not None:
            k, v = torch.cat((self.keys, k), dim=0), torch.cat((self.values, v), dim=0)
        self.keys, self.values = k, v
        return k, v


class Prepends(KVCache):
    """接在前面。"""

    def update(self, k, v):
        if self.keys is not None:
            k, v = torch.cat((k, self.keys), dim=2), torch.cat((v, self.values), dim=2)
        self.keys, self.values = k, v
        return k, v


class ForgetsOld(KVCache):
    """只留新的。"""

    def update(self, k, v):
        self.keys, self.values = k, v
        return k, v


class CropsTheFront(KVCache):
    """裁掉的是最前面的。"""

    def crop(self, length):
        self.keys, self.values = self.keys[:, :, -length:], self.values[:, :, -length:]


@pytest.mark.rejects
def test_wrong_axis_is_rejected(model, input_ids):
    expected = full(model, input_ids)
    with pytest.raises((RuntimeError, TypeError)):  # 批的轴对不上
        run(model, input_ids, [1] * S, caches(WrongAxis))
    k = torch.randn(B, K, 5, D)
    for dim in (1, 3):  # 其余两个轴在长度不同时无法拼接
        with pytest.raises(RuntimeError):
            torch.cat((k, k[:, :, :1]), dim=dim)
    torch.testing.assert_close(run(model, input_ids, [1] * S, caches()), expected)


@pytest.mark.rejects
def test_prepending_is_hidden_by_single_token_decoding(model, input_ids):
    """接在前面：逐 token 解码时键的顺序不影响注意力，看不出来；分块预填充的掩码才会出错。"""
    expected = full(model, input_ids)
    torch.testing.assert_close(run(model, input_ids, [1] * S, caches(Prepends)), expected)
    assert (run(model, input_ids, [4, 4, 3], caches(Prepends)) - expected)[:, 4:].abs().max() > 0.1


@pytest.mark.rejects
def test_forgetting_is_rejected(model, input_ids):
    error = (run(model, input_ids, [4, 4, 3], caches(ForgetsOld)) - full(model, input_ids)).abs()
    assert error[:, :4].max() < 1e-10 and error[:, 4:].max() > 0.1


@pytest.mark.rejects
def test_cropping_the_wrong_side_is_rejected(model, input_ids):
    kv_caches = caches(CropsTheFront)
    run(model, input_ids[:, :8], [8], kv_caches)
    for cache in kv_caches:
        cache.crop(5)
    got = run(model, input_ids[:, 5:], [6], kv_caches)
    assert (got - full(model, input_ids)[:, 5:]).abs().max() > 0.1


@pytest.mark.rejects
@pytest.mark.parametrize("start", ["zero", "off-by-one"])
def test_position_offset_error_is_rejected(model, input_ids, start):
    """解码时位置从 0 数起，或比缓存长度大 1。"""
    kv_caches, errors = caches(), []
    expected = full(model, input_ids)
    run(model, input_ids[:, :6], [6], kv_caches)
    for t in range(6, S):
        position = torch.full((B, 1), 0 if start == "zero" else t + 1)
        got = run(model, input_ids[:, t : t + 1], [1], kv_caches, position_ids=position)
        errors.append((got[:, 0] - expected[:, t]).abs().max())
    assert max(errors) > 0.1


def test_offset_error_is_hidden_when_shared_by_all_positions(model, input_ids):
    """从第一步起整体平移就不是错；错的是预填充与解码之间的断层。"""
    got = run(model, input_ids, [S], caches(), position_ids=torch.arange(S).expand(B, -1) + 1)
    torch.testing.assert_close(got, full(model, input_ids))


@pytest.mark.rejects
def test_top_left_mask_is_rejected_in_decode():
    """SDPA 的 is_causal 是左上角对齐：T=1 时新 token 只看得见第 0 个 key，输出恰是第 0 个 value。"""
    q, k, v = torch.randn(B, H, 1, D), torch.randn(B, H, S, D), torch.randn(B, H, S, D)
    ours = grouped_query_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(ours, torch.nn.functional.scaled_dot_product_attention(q, k, v))
    wrong = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(wrong, v[:, :, :1])
    assert (wrong - ours).abs().max() > 0.1


@pytest.mark.rejects
def test_caching_before_rope_needs_the_old_positions():
    """存旋转之前的键也行，但每步要按各自的旧位置重新旋转全部；按新位置转就错。"""
    torch.manual_seed(3)
    layer = Attention(C, num_heads=H, num_kv_heads=K).double()
    x = torch.randn(B, S, C, dtype=torch.float64)
    inv_freq = rope_inverse_frequencies(D)
    positions = torch.arange(S).expand(B, -1)
    expected = layer(x, cos_sin=rope_cos_sin(positions, inv_freq))[:, -1:]

    class CachesBeforeRope(KVCache):
        """update 收到没转过的键，返回按 `positions` 转好的全部。"""

        positions = None

        def update(self, k, v):
            k, v = super().update(k, v)
            cos, sin = rope_cos_sin(self.positions, inv_freq)
            return apply_rope(k, k, cos, sin)[1], v

    def last(key_positions):
        cache = CachesBeforeRope()
        cache.positions = positions[:, : S - 1]
        layer(x[:, : S - 1], kv_cache=cache)
        cache.positions = key_positions
        q = layer.q_proj(x[:, -1:]).unflatten(-1, (H, D)).transpose(1, 2)
        k, v = (p(x[:, -1:]).unflatten(-1, (K, D)).transpose(1, 2) for p in (layer.k_proj, layer.v_proj))
        q, _ = apply_rope(q, k, *rope_cos_sin(positions[:, -1:], inv_freq))
        k, v = cache.update(k, v)
        out = grouped_query_attention(q, k, v, is_causal=True)
        return layer.o_proj(out.transpose(1, 2).flatten(-2))

    torch.testing.assert_close(last(positions), expected)
    everything_at_the_new_position = torch.full((B, S), S - 1)
    assert (last(everything_at_the_new_position) - expected).abs().max() > 0.01


@pytest.mark.rejects
def test_window_positions_must_keep_counting(model, input_ids):
    """滑动窗口若拿存着的个数当位置，出窗之后就错。"""

    class WrongLength(SlidingWindowCache):
        def update(self, k, v):
            out = super().update(k, v)
            self.length = self.cache.length
            return out

    right = run(model, input_ids, [1] * S, caches(lambda: SlidingWindowCache(window=4)))
    wrong = run(model, input_ids, [1] * S, caches(lambda: WrongLength(window=4)))
    torch.testing.assert_close(wrong[:, :4], right[:, :4])
    torch.testing.assert_close(right[:, :4], full(model, input_ids)[:, :4])
    assert (wrong - right)[:, 4:].abs().max() > 0.1


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", ["按查询头数", "忘了乘 2", "忘了批", "按 4 字节"])
def test_wrong_sizes_are_rejected(model, input_ids, wrong):
    """真值是真的缓存的 nbytes。"""
    kv_caches = caches()
    run(model, input_ids, [S], kv_caches)
    truth = sum(cache.keys.nbytes + cache.values.nbytes for cache in kv_caches)
    right = dict(num_layers=L, num_kv_heads=K, head_dim=D, num_tokens=S, batch_size=B, bytes_per_element=8)
    assert kv_cache_bytes(**right) == truth
    change = {
        "按查询头数": {"num_kv_heads": H},
        "忘了批": {"batch_size": 1},
        "按 4 字节": {"bytes_per_element": 4},
    }
    guess = kv_cache_bytes(**{**right, **change.get(wrong, {})}) / (2 if wrong == "忘了乘 2" else 1)
    assert guess / truth in (H / K, 1 / 2)


def test_per_token_keys_lose_more_when_a_channel_is_an_outlier():
    """键有三个大通道时，逐通道的误差小；没有时两者相差不多。"""
    generator = torch.Generator().manual_seed(4)
    for outlier, low, high in ((15.0, 3.0, math.inf), (1.0, 0.5, 1.5)):
        k = torch.randn(8, 128, 64, generator=generator, dtype=torch.float64)
        k[..., :3] *= outlier
        rms = {
            dim: (fake_quantize(k, num_bits=4, dim=dim) - k)[..., 3:].square().mean().sqrt()
            for dim in (-1, -2)
        }
        assert low < rms[-1] / rms[-2] < high
