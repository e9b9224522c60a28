r"""RoPE 的测试。

真值都不经过被测代码：用 `cmath` 逐个平面旋转（复数乘 e^{imθ}，θ 用 Python 的浮点数现算）；
transformers 5.23.0 的 `apply_rotary_pos_emb`（Llama）、`apply_rotary_pos_emb_interleave`（DeepSeek-V3）、
`LlamaRotaryEmbedding` 与 `ROPE_INIT_FUNCTIONS`；Llama 官方代码的复数写法；手算的频率。
文件后半把流传的错误写法放进同一个模板，逐个断言「多个偏移、多个绝对位置」的检查会拒绝它们，
并记下只查偏移 0 的弱检查会放过谁。
"""

import cmath
import math

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.models.deepseek_v3.modeling_deepseek_v3 import apply_rotary_pos_emb_interleave
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding, apply_rotary_pos_emb

from snippets.architecture.rope import (
    apply_rope,
    apply_rope_interleaved,
    half_split_permutation,
    linear_scaled_frequencies,
    llama3_scaled_frequencies,
    ntk_scaled_frequencies,
    rope_cos_sin,
    rope_inverse_frequencies,
    rotate_half,
    yarn_attention_factor,
    yarn_scaled_frequencies,
)

B, T, H, K, D = 2, 5, 4, 3, 6
LAYOUTS = {"half": apply_rope, "interleaved": apply_rope_interleaved}


def make_qk(*, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(B, H, T, D, generator=generator, dtype=torch.float64)
    k = torch.randn(B, K, T, D, generator=generator, dtype=torch.float64)
    position_ids = torch.randint(0, 3000, (B, T), generator=generator)
    return q.to(dtype), k.to(dtype), position_ids


def pair(i, layout, head_dim=D):
    return (i, i + head_dim // 2) if layout == "half" else (2 * i, 2 * i + 1)


def complex_rotation(x, position_ids, *, layout, base=10000.0):
    """逐个平面乘 e^{imθ}，全是 Python 的复数。"""
    out = torch.empty_like(x)
    head_dim = x.shape[-1]
    for b in range(x.shape[0]):
        for h in range(x.shape[1]):
            for t in range(x.shape[2]):
                for i in range(head_dim // 2):
                    one, two = pair(i, layout, head_dim)
                    angle = position_ids[b, t].item() / math.pow(base, 2 * i / head_dim)
                    z = complex(x[b, h, t, one].item(), x[b, h, t, two].item()) * cmath.exp(1j * angle)
                    out[b, h, t, one], out[b, h, t, two] = z.real, z.imag
    return out


# 手算


def test_frequencies_by_hand():
    """b = 16、D = 4：16^0 = 1，16^{-2/4} = 1/4。默认底数 10000、D = 8：1, 0.1, 0.01, 0.001。"""
    torch.testing.assert_close(
        rope_inverse_frequencies(4, rope_theta=16.0), torch.tensor([1.0, 0.25], dtype=torch.float64)
    )
    torch.testing.assert_close(
        rope_inverse_frequencies(8), torch.tensor([1.0, 0.1, 0.01, 0.001], dtype=torch.float64)
    )
    assert rope_inverse_frequencies(2).tolist() == [1.0]


def test_a_quarter_turn_by_hand():
    """θ = π/2，位置 0、1、2、3：(1, 0) 依次转到 (1,0)、(0,1)、(-1,0)、(0,-1)，逆时针。"""
    cos, sin = rope_cos_sin(torch.tensor([[0, 1, 2, 3]]), torch.tensor([math.pi / 2], dtype=torch.float64))
    x = torch.tensor([1.0, 0.0], dtype=torch.float64).expand(1, 1, 4, 2)
    expected = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]], dtype=torch.float64)
    for rotate in LAYOUTS.values():
        for rotated in rotate(x, x, cos, sin):
            torch.testing.assert_close(rotated[0, 0], expected)


def test_rotate_half_by_hand():
    assert rotate_half(torch.tensor([1.0, 2.0, 3.0, 4.0])).tolist() == [-3.0, -4.0, 1.0, 2.0]


def test_permutation_by_hand():
    assert half_split_permutation(6).tolist() == [0, 2, 4, 1, 3, 5]


def test_cos_sin_layout_by_hand():
    cos, sin = rope_cos_sin(torch.tensor([[2]]), torch.tensor([1.0, 0.5]))
    torch.testing.assert_close(cos[0, 0], torch.tensor([math.cos(2), math.cos(1)] * 2))
    torch.testing.assert_close(sin[0, 0], torch.tensor([math.sin(2), math.sin(1)] * 2))


def test_scaled_frequencies_by_hand():
    r"""PI：1, 1/4 除以 2。NTK：D = 4、b = 16、s = 4，b' = 16·4^{4/2} = 256，b'^{-1/2} = 1/16 = (1/4)/4。"""
    inv_freq = torch.tensor([1.0, 0.25], dtype=torch.float64)
    assert linear_scaled_frequencies(inv_freq, factor=2.0).tolist() == [0.5, 0.125]
    scaled = ntk_scaled_frequencies(4, factor=4.0, rope_theta=16.0)
    torch.testing.assert_close(scaled, torch.tensor([1.0, 1 / 16], dtype=torch.float64))


def test_llama3_by_hand():
    r"""L = 8，圈数 L·θ/2π 取 8、4、2.5、1、0.5；s = 8，低 1 高 4。

    2.5 圈处保留比例 (2.5-1)/(4-1) = 1/2，所以乘 (1/2)/8 + 1/2 = 9/16；8 与 4 圈不动，1 与 0.5 圈除以 8。
    """
    turns = torch.tensor([8.0, 4.0, 2.5, 1.0, 0.5], dtype=torch.float64)
    inv_freq = turns * 2 * math.pi / 8
    ratio = llama3_scaled_frequencies(inv_freq, factor=8.0, original_length=8) / inv_freq
    torch.testing.assert_close(ratio, torch.tensor([1, 1, 9 / 16, 1 / 8, 1 / 8], dtype=torch.float64))


def test_yarn_ramp_by_hand():
    """D = 128、b = 1e4、L = 4096：32 圈与 1 圈的平面序号是 20.94、45.03，取整成 20、46。

    第 30 个平面走过 10/26，s = 4 时乘 1 - (3/4)(10/26)；前 21 个不动，46 起是 1/4。
    """
    ratio = yarn_scaled_frequencies(128, factor=4.0, original_length=4096) / rope_inverse_frequencies(128)
    expected = [1 - 0.75 * min(max((i - 20) / 26, 0), 1) for i in range(64)]
    torch.testing.assert_close(ratio, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)


def test_yarn_attention_factor_by_hand():
    """e^10 倍：0.1×10+1 = 2；不延长是 1。"""
    assert yarn_attention_factor(factor=math.exp(10)) == pytest.approx(2.0, rel=1e-14)
    assert yarn_attention_factor(factor=1.0) == 1.0


# 与独立实现一致


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rotation_equals_complex_multiplication(layout):
    q, k, position_ids = make_qk()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D))
    q_out, k_out = LAYOUTS[layout](q, k, cos, sin)
    torch.testing.assert_close(q_out, complex_rotation(q, position_ids, layout=layout))
    torch.testing.assert_close(k_out, complex_rotation(k, position_ids, layout=layout))


def gradients(rotate, q, k, cos, sin):
    q, k = q.clone().requires_grad_(), k.clone().requires_grad_()
    outputs = rotate(q, k, cos, sin)
    weights = [torch.linspace(-1, 2, x.numel(), dtype=x.dtype).view_as(x) for x in outputs]
    return torch.autograd.grad(sum((x * w).sum() for x, w in zip(outputs, weights, strict=True)), (q, k))


def test_half_split_matches_llama_with_gradients():
    q, k, position_ids = make_qk()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D))
    torch.testing.assert_close(apply_rope(q, k, cos, sin), apply_rotary_pos_emb(q, k, cos, sin))
    torch.testing.assert_close(
        gradients(apply_rope, q, k, cos, sin), gradients(apply_rotary_pos_emb, q, k, cos, sin)
    )


def test_interleaved_matches_deepseek_with_gradients():
    """transformers 的交错版读入相邻配对、写出前后配对：差一个排列。"""

    def ours(q, k, cos, sin):
        order = [0, 2, 4, 1, 3, 5]
        return tuple(x[..., order] for x in apply_rope_interleaved(q, k, cos, sin))

    q, k, position_ids = make_qk()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D))
    torch.testing.assert_close(ours(q, k, cos, sin), apply_rotary_pos_emb_interleave(q, k, cos, sin))
    torch.testing.assert_close(
        gradients(ours, q, k, cos, sin), gradients(apply_rotary_pos_emb_interleave, q, k, cos, sin)
    )


def llama_config(**rope):
    parameters = dict(rope_theta=10000.0, rope_type="default") | rope
    return LlamaConfig(
        hidden_size=256, num_attention_heads=2, max_position_embeddings=4096, rope_parameters=parameters
    )


@pytest.mark.parametrize("rope_theta", [1e4, 5e5, 1e6])
def test_cos_sin_match_llama_rotary_embedding(rope_theta):
    """D = 128；transformers 在 float32 里求频率，位置 4000 处角度的舍入误差约 4000×2^{-24}×几倍。"""
    position_ids = torch.tensor([[0, 1, 7, 4000]])
    expected = LlamaRotaryEmbedding(llama_config(rope_theta=rope_theta))(torch.zeros(1), position_ids)
    inv_freq = rope_inverse_frequencies(128, rope_theta=rope_theta)
    torch.testing.assert_close(rope_cos_sin(position_ids, inv_freq.float()), expected, rtol=0, atol=2e-3)
    torch.testing.assert_close(
        rope_cos_sin(position_ids[:, :3], inv_freq.float()), tuple(x[:, :3] for x in expected)
    )


def library_frequencies(rope_type, *, seq_len=None, **rope):
    config = llama_config(rope_type=rope_type, **rope)
    inv_freq, attention_factor = ROPE_INIT_FUNCTIONS[rope_type](config, torch.device("cpu"), seq_len=seq_len)
    return inv_freq.double(), attention_factor


@pytest.mark.parametrize("factor", [1.0, 2.0, 7.5])
def test_linear_matches_library(factor):
    expected, attention_factor = library_frequencies("linear", factor=factor)
    ours = linear_scaled_frequencies(rope_inverse_frequencies(128), factor=factor)
    torch.testing.assert_close(ours, expected, rtol=1e-6, atol=0)  # 库在 float32 里求
    assert attention_factor == 1.0


@pytest.mark.parametrize("seq_len", [4096, 6000, 16384])
def test_ntk_matches_library_dynamic(seq_len):
    """动态 NTK 是倍数随长度变：s·L'/L − (s−1)。"""
    expected, _ = library_frequencies("dynamic", factor=3.0, rope_theta=5e5, seq_len=seq_len)
    ours = ntk_scaled_frequencies(128, factor=3.0 * seq_len / 4096 - 2.0, rope_theta=5e5)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)  # 库在 float32 里求


YARN_CASES = {
    "默认": dict(factor=16.0, original_max_position_embeddings=4096),
    "底数百万": dict(factor=4.0, original_max_position_embeddings=32768, rope_theta=1e6),
    "边界另设": dict(factor=40.0, original_max_position_embeddings=4096, beta_fast=20.0, beta_slow=2.0),
    "下界截到 0": dict(factor=4.0, original_max_position_embeddings=100),
    "上界截到 D-1": dict(factor=4.0, original_max_position_embeddings=970, rope_theta=10.0),
    "32 圈在取整边界上": dict(factor=4.0, original_max_position_embeddings=3630),
}


@pytest.mark.parametrize("name", YARN_CASES)
def test_yarn_matches_library(name):
    case = YARN_CASES[name]
    expected, attention_factor = library_frequencies("yarn", **case)
    renamed = {"original_length": case["original_max_position_embeddings"]}
    renamed |= {key: value for key, value in case.items() if key != "original_max_position_embeddings"}
    torch.testing.assert_close(yarn_scaled_frequencies(128, **renamed), expected, rtol=2e-6, atol=0)
    assert yarn_attention_factor(factor=case["factor"]) == pytest.approx(attention_factor, rel=1e-12)


@pytest.mark.parametrize("rope_theta", [1e4, 5e5])
def test_llama3_matches_library(rope_theta):
    base = rope_inverse_frequencies(128, rope_theta=rope_theta)
    published = dict(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0)
    expected, attention_factor = library_frequencies(
        "llama3", rope_theta=rope_theta, original_max_position_embeddings=8192, **published
    )
    torch.testing.assert_close(llama3_scaled_frequencies(base), expected, rtol=2e-6, atol=0)
    assert attention_factor == 1.0
    other = dict(factor=5.0, low_freq_factor=2.0, high_freq_factor=7.0)
    expected, _ = library_frequencies(
        "llama3", rope_theta=rope_theta, original_max_position_embeddings=1024, **other
    )
    ours = llama3_scaled_frequencies(base, original_length=1024, **other)
    torch.testing.assert_close(ours, expected, rtol=2e-6, atol=0)


def test_permuting_the_projection_rows_converts_a_checkpoint():
    """把 W_q、W_k 每个头的输出行按排列重排，前后配对的打分就等于原来相邻配对的打分。

    重排的写法与 transformers 转换脚本的 permute 相同：view(头数, D/2, 2, C).transpose(1, 2)。
    """
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(B, T, 7, generator=generator, dtype=torch.float64)
    weights = [torch.randn(H * D, 7, generator=generator, dtype=torch.float64) for _ in range(2)]
    _, _, position_ids = make_qk()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D))

    def scores(rotate, w_q, w_k):
        q, k = ((hidden @ w.T).view(B, T, H, D).transpose(1, 2) for w in (w_q, w_k))
        q, k = rotate(q, k, cos, sin)
        return q @ k.transpose(-2, -1)

    original = scores(apply_rope_interleaved, *weights)
    permuted = [w.view(H, D // 2, 2, 7).transpose(1, 2).reshape(H * D, 7) for w in weights]
    for w, p in zip(weights, permuted, strict=True):
        assert torch.equal(w.view(H, D, 7)[:, half_split_permutation(D)].reshape(H * D, 7), p)
    torch.testing.assert_close(scores(apply_rope, *permuted), original)
    assert (scores(apply_rope, *weights) - original).abs().max() > 1.0  # 不重排就错了


# 性质


def strong_check(score):
    """分数只依赖相对位置：偏移取 0、1、2、7、100，整体平移取 0、1、13、2000；偏移真的要有影响。"""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    by_offset = []
    for offset in (0, 1, 2, 7, 100):
        values = [score(q, k, shift + offset, shift) for shift in (0, 1, 13, 2000)]
        if max(values) - min(values) > 1e-9:
            return False
        by_offset.append(values[0])
    return len({round(value, 6) for value in by_offset}) == len(by_offset)


def weak_check(score):
    """只查偏移 0：两个位置相同，分数等于不旋转的点积。"""
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    return all(abs(score(q, k, m, m) - (q @ k).item()) < 1e-9 for m in (0, 1, 13, 2000))


def score_of(rotate, inv_freq):
    def score(q, k, m, n):
        cos, sin = rope_cos_sin(torch.tensor([[m, n]]), inv_freq)
        both = torch.stack((q, k)).view(1, 1, 2, D)
        rotated, _ = rotate(both, both, cos, sin)
        return (rotated[0, 0, 0] @ rotated[0, 0, 1]).item()

    return score


FREQUENCIES = {
    "默认": rope_inverse_frequencies(D),
    "PI": linear_scaled_frequencies(rope_inverse_frequencies(D), factor=4.0),
    "NTK": ntk_scaled_frequencies(D, factor=4.0),
    "YaRN": yarn_scaled_frequencies(D, factor=4.0, original_length=4096),
    "llama3": llama3_scaled_frequencies(rope_inverse_frequencies(D)),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", FREQUENCIES)
def test_scores_depend_only_on_the_offset(layout, name):
    score = score_of(LAYOUTS[layout], FREQUENCIES[name])
    assert strong_check(score) and weak_check(score)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norms_are_kept_and_position_zero_is_the_identity(layout):
    q, k, position_ids = make_qk()
    inv_freq = rope_inverse_frequencies(D)
    for x, y in zip((q, k), LAYOUTS[layout](q, k, *rope_cos_sin(position_ids, inv_freq)), strict=True):
        torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
    q_zero, k_zero = LAYOUTS[layout](q, k, *rope_cos_sin(torch.zeros_like(position_ids), inv_freq))
    assert torch.equal(q_zero, q) and torch.equal(k_zero, k)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_negative_positions_undo_the_rotation(layout):
    q, k, position_ids = make_qk()
    inv_freq = rope_inverse_frequencies(D)
    rotated = LAYOUTS[layout](q, k, *rope_cos_sin(position_ids, inv_freq))
    torch.testing.assert_close(LAYOUTS[layout](*rotated, *rope_cos_sin(-position_ids, inv_freq)), (q, k))


def test_factor_one_is_the_default():
    default = rope_inverse_frequencies(128, rope_theta=5e5)
    torch.testing.assert_close(linear_scaled_frequencies(default, factor=1.0), default)
    torch.testing.assert_close(ntk_scaled_frequencies(128, factor=1.0, rope_theta=5e5), default)
    yarn = yarn_scaled_frequencies(128, factor=1.0, original_length=4096, rope_theta=5e5)
    torch.testing.assert_close(yarn, default)
    torch.testing.assert_close(llama3_scaled_frequencies(default, factor=1.0), default)


def test_ntk_keeps_the_fastest_and_divides_the_slowest_by_the_factor():
    for factor in (2.0, 4.0, 8.0):
        ratio = ntk_scaled_frequencies(128, factor=factor) / rope_inverse_frequencies(128)
        assert ratio[0] == 1
        assert ratio[-1].item() == pytest.approx(1 / factor, rel=1e-12)
        assert (ratio.diff() < 0).all()


def test_yarn_factor_multiplies_the_scores_by_its_square():
    q, k, position_ids = make_qk()
    k = k[:, :1].expand_as(q).contiguous()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D))
    m = yarn_attention_factor(factor=16.0)
    assert m == pytest.approx(1.27726, abs=1e-5)
    (q1, k1), (q2, k2) = apply_rope(q, k, cos, sin), apply_rope(q, k, m * cos, m * sin)
    torch.testing.assert_close(q2 @ k2.transpose(-2, -1), m**2 * (q1 @ k1.transpose(-2, -1)))


# 边界


@pytest.mark.parametrize("layout", LAYOUTS)
def test_half_precision_is_rounded_once(layout):
    """q 是 bfloat16、k 是 float16，cos/sin 是 float32：旋转在 float32 里做，各自只舍入一次。"""
    q, k, position_ids = make_qk()
    q, k = q.bfloat16(), k.half()
    cos, sin = rope_cos_sin(position_ids, rope_inverse_frequencies(D).float())
    out = LAYOUTS[layout](q, k, cos, sin)
    exact = LAYOUTS[layout](q.double(), k.double(), cos.double(), sin.double())
    for x, y, dtype in zip(out, exact, (torch.bfloat16, torch.float16), strict=True):
        assert x.dtype == dtype
        half_ulp = torch.finfo(dtype).eps / 2
        torch.testing.assert_close(x.double(), y, rtol=1.01 * half_ulp, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_cos_sin_follow_the_dtype_of_the_frequencies(dtype):
    cos, sin = rope_cos_sin(torch.tensor([[3]]), rope_inverse_frequencies(D).to(dtype))
    assert cos.dtype == sin.dtype == dtype
    assert rope_inverse_frequencies(D).dtype == torch.float64


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_frequencies_are_refused(dtype):
    with pytest.raises(ValueError, match="位置一大角度就错了"):
        rope_cos_sin(torch.tensor([[3]]), rope_inverse_frequencies(D).to(dtype))


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="head_dim=5 是奇数"):
        rope_inverse_frequencies(5)
    with pytest.raises(ValueError, match="factor=0.5 小于 1"):
        yarn_attention_factor(factor=0.5)
    with pytest.raises(ValueError, match="过渡区是空的（0 到 0）"):
        yarn_scaled_frequencies(128, factor=2.0, original_length=6)
    with pytest.raises(ValueError, match="过渡区是空的"):
        yarn_scaled_frequencies(128, factor=2.0, original_length=4096, beta_fast=1.0, beta_slow=32.0)


def test_the_narrowest_ramp_is_accepted():
    """转 1 圈与 0.99 圈的平面序号是 45.03 与 45.10，取整成 45 与 46：过渡区一格，45 不动，46 除以 s。"""
    narrow = yarn_scaled_frequencies(128, factor=2.0, original_length=4096, beta_fast=1.0, beta_slow=0.99)
    ratio = narrow / rope_inverse_frequencies(128)
    torch.testing.assert_close(ratio, torch.tensor([1.0] * 46 + [0.5] * 18, dtype=torch.float64))


# 被拒绝的错误写法：一个模板，只改一处


def template(*, angle=lambda m, i: m * 10000.0 ** (-2 * i / D), rotate_key=True, layout="half", mixed=False):
    """真值模板：两个向量各转各的角，再做点积；默认就是正确的 RoPE。"""

    def rotate(x, m):
        out = torch.zeros_like(x)
        for i in range(D // 2):
            one, two = pair(i, layout)
            c, s = math.cos(angle(m, i)), math.sin(angle(m, i))
            out[one] += c * x[one] - s * x[two]
            out[two] += s * x[one] + c * x[two]
        return out

    def rotate_mixed(x, m):
        """rotate_half 配上交错的 cos：每个角连着重复两遍 (θ0,θ0,θ1,θ1,…)。"""
        angles = torch.tensor([angle(m, i // 2) for i in range(D)], dtype=torch.float64)
        return x * angles.cos() + torch.cat((-x[D // 2 :], x[: D // 2])) * angles.sin()

    chosen = rotate_mixed if mixed else rotate
    return lambda q, k, m, n: (chosen(q, m) @ (chosen(k, n) if rotate_key else k)).item()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_template_is_right(layout):
    generator = torch.Generator().manual_seed(3)
    q, k = (torch.randn(D, generator=generator, dtype=torch.float64) for _ in range(2))
    right, ours = template(layout=layout), score_of(LAYOUTS[layout], rope_inverse_frequencies(D))
    for m, n in ((0, 0), (5, 2), (40, 41), (2000, 13)):
        assert right(q, k, m, n) == pytest.approx(ours(q, k, m, n), abs=1e-10)
    assert strong_check(right)


NOT_RELATIVE = {
    "角度正比于位置的平方": template(angle=lambda m, i: m**2 * 10000.0 ** (-2 * i / D)),
    "角度正比于位置的平方根": template(angle=lambda m, i: math.sqrt(m) * 10000.0 ** (-2 * i / D)),
    "忘了转 k": template(rotate_key=False),
    "rotate_half 配交错的 cos": template(mixed=True),
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", NOT_RELATIVE)
def test_the_strong_check_rejects(name):
    assert not strong_check(NOT_RELATIVE[name])


@pytest.mark.parametrize("name", ["角度正比于位置的平方", "角度正比于位置的平方根"])
def test_the_offset_zero_check_accepts_what_is_wrong(name):
    """q、k 转同一个角，偏移 0 时任何角度函数都抵消：弱检查什么也没查。"""
    assert weak_check(NOT_RELATIVE[name])


WRONG_ANGLES = {
    "指数写成正的": lambda m, i: m * 10000.0 ** (2 * i / D),
    "下标差一（2i/D 写成 i/D）": lambda m, i: m * 10000.0 ** (-i / D),
    "分母写成 D/2": lambda m, i: m * 10000.0 ** (-4 * i / D),
    "从 1 数起": lambda m, i: m * 10000.0 ** (-2 * (i + 1) / D),
    "角度当成度": lambda m, i: math.radians(m * 10000.0 ** (-2 * i / D)),
    "反着转": lambda m, i: -m * 10000.0 ** (-2 * i / D),
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_ANGLES)
def test_wrong_angles_are_relative_but_not_rope(name):
    """这些写法仍只依赖相对位置，两种相对性检查都放过；只有与复数真值逐元素比较才能拒绝。"""
    wrong = template(angle=WRONG_ANGLES[name])
    assert weak_check(wrong) and strong_check(wrong)
    q, k, _ = make_qk()
    x, y = q[0, 0, 0], k[0, 0, 0]
    truth = [
        complex_rotation(v.view(1, 1, 1, D), torch.tensor([[m]]), layout="half").flatten()
        for v, m in ((x, 9), (y, 2))
    ]
    assert score_of(apply_rope, rope_inverse_frequencies(D))(x, y, 9, 2) == pytest.approx(
        (truth[0] @ truth[1]).item()
    )
    assert abs(wrong(x, y, 9, 2) - (truth[0] @ truth[1]).item()) > 0.02


@pytest.mark.rejects
def test_rotating_v_leaks_absolute_positions():
    """q、k 都正确，再把 v 也转：所有位置平移 50，输出就变；不转 v 则不变。"""
    generator = torch.Generator().manual_seed(4)
    q, k, v = (torch.randn(1, 1, T, D, generator=generator, dtype=torch.float64) for _ in range(3))

    def attention(shift, *, rotate_v):
        cos, sin = rope_cos_sin(torch.arange(T).view(1, T) + shift, rope_inverse_frequencies(D))
        q_rot, k_rot = apply_rope(q, k, cos, sin)
        values = apply_rope(v, v, cos, sin)[0] if rotate_v else v
        return torch.softmax(q_rot @ k_rot.transpose(-2, -1) / math.sqrt(D), dim=-1) @ values

    torch.testing.assert_close(attention(50, rotate_v=False), attention(0, rotate_v=False))
    assert (attention(50, rotate_v=True) - attention(0, rotate_v=True)).abs().max() > 0.1


@pytest.mark.rejects
def test_linear_interpolation_is_not_ntk():
    """把 PI 当成 NTK：最快的平面也被除以 s；NTK 的最快平面不动。"""
    expected, _ = library_frequencies("dynamic", factor=1.0, seq_len=4 * 4096)
    pi = linear_scaled_frequencies(rope_inverse_frequencies(128), factor=4.0)
    torch.testing.assert_close(ntk_scaled_frequencies(128, factor=4.0), expected, rtol=2e-6, atol=0)
    assert expected[0] / pi[0] == 4.0
    assert expected[-1].item() == pytest.approx(pi[-1].item(), rel=2e-6)  # 只在最慢的平面上相同


@pytest.mark.rejects
def test_other_wrong_scalings_are_rejected():
    """底数乘 s 而不是 s^{D/(D-2)}；YaRN 的斜坡反过来；mscale 写成 1/(0.1 ln s + 1) 或它的平方根。"""
    truth, factor = library_frequencies("yarn", factor=4.0, original_max_position_embeddings=4096)
    base = rope_inverse_frequencies(128)
    ours = yarn_scaled_frequencies(128, factor=4.0, original_length=4096)
    reversed_ramp = base + base / 4 - ours
    assert ((reversed_ramp - truth) / truth).abs().max() > 0.5
    ntk, _ = library_frequencies("dynamic", factor=1.0, seq_len=4 * 4096)
    assert abs(rope_inverse_frequencies(128, rope_theta=4e4)[-1] / ntk[-1] - 1) > 0.02
    for wrong in (1 / factor, math.sqrt(factor)):
        assert abs(wrong - yarn_attention_factor(factor=4.0)) > 0.05


@pytest.mark.rejects
def test_bfloat16_positions_collapse():
    """bfloat16 只有 8 个二进制有效位：257 成了 256，4097 成了 4096，cos(θ_0 m) 差到 0.1 以上。"""
    assert [int(torch.tensor(m, dtype=torch.bfloat16)) for m in (257, 1001, 4097)] == [256, 1000, 4096]
    cos, _ = rope_cos_sin(torch.tensor([[4097]]), rope_inverse_frequencies(D).float())
    wrong = (torch.tensor(4097.0, dtype=torch.bfloat16) * rope_inverse_frequencies(D).bfloat16()).cos()
    assert cos[0, 0, 0].item() == pytest.approx(math.cos(4097), abs=1e-6)
    assert abs(wrong[0].item() - math.cos(4097)) > 0.1


@pytest.mark.rejects
def test_casting_a_library_module_also_casts_its_frequencies():
    """transformers 的 forward 在 float32 里乘，但整个模型 .bfloat16() 会把 inv_freq 缓冲先舍入掉，救不回来。"""
    module = LlamaRotaryEmbedding(llama_config()).bfloat16()
    assert module.inv_freq.dtype == torch.bfloat16
    position_ids = torch.tensor([[4097]])
    cos, _ = module(torch.zeros(1), position_ids)
    right, _ = rope_cos_sin(position_ids, rope_inverse_frequencies(128).float())
    assert (cos - right).abs().max() > 1.0
