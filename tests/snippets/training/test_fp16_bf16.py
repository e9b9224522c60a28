"""浮点格式与混合精度的真值：`torch.finfo`；各类型张量的 `view`（全部位模式）；`tensor.to` 的舍入；
只用 `Fraction` 比较距离的最近邻（不经过任何位运算）；`torch.amp.GradScaler`（CPU）逐步的参数与倍数；手算。
NaN 的负载随 CPU 的指令集变（同一个 NaN 转 bf16 可得 0x7FC0 或 0xFFFF），所以与 torch 只比「仍是 NaN」。
"""

import math
import struct
from fractions import Fraction

import jaxtyping
import pytest
import torch

from snippets.training.fp16_bf16 import (
    FORMATS,
    DynamicLossScaler,
    chunked_sum,
    decode,
    format_limits,
    quantize_e4m3_blocks,
    round_to_format,
    stochastic_to_bf16,
    to_bf16,
)

TORCH_DTYPES = {
    "FP32": torch.float32,
    "FP16": torch.float16,
    "BF16": torch.bfloat16,
    "FP8 E4M3": torch.float8_e4m3fn,
    "FP8 E5M2": torch.float8_e5m2,
}
SMALL = {name: dtype for name, dtype in TORCH_DTYPES.items() if name != "FP32"}
INT_OF = {1: torch.uint8, 2: torch.int16, 4: torch.int32}
HIGH_HALVES = torch.arange(65536, dtype=torch.int64)


def f32_from_bits(bits):
    return bits.to(torch.int32).view(torch.float32)


def bits_of(x):
    return x.view(torch.int16).to(torch.int64) & 0xFFFF


def every_value(dtype):
    """这个类型全部位模式的值，float64，下标就是位模式。"""
    size = dtype.itemsize
    patterns = torch.arange(2 ** (8 * size)).to(INT_OF[size])
    return patterns.view(dtype).double()


def bf16_neighbourhoods():
    """全部 65,536 个 bf16 位模式，低 16 位取六个：不动、刚过、差一点到半格、半格、刚过半格、差一点进位。"""
    low = torch.tensor([0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
    return f32_from_bits((HIGH_HALVES[:, None] << 16) | low)


def halfway_points(dtype):
    """相邻两个有限值、它们的中点、中点两侧最近的 float32，都能用 float32 表示。"""
    values = every_value(dtype)
    values = values[values.isfinite()].unique()
    middle = ((values[1:] + values[:-1]) / 2).float()
    inf = torch.tensor(math.inf)
    points = [values.float(), middle, middle.nextafter(inf), middle.nextafter(-inf)]
    return torch.cat(points)


def assert_same_values(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)


def nearest_by_distance(x, fmt):
    """独立的真值：在全部有限值里按精确距离找最近的，一样近取位模式为偶数的那个。"""
    width = 1 + fmt.exponent_bits + fmt.mantissa_bits
    finite = [(Fraction(decode(b, fmt)), b) for b in range(2**width) if math.isfinite(decode(b, fmt))]
    return float(min(finite, key=lambda pair: (abs(pair[0] - Fraction(x)), pair[1] % 2))[0])


# ---------- 手算 ----------


def test_one_tenth_has_the_known_bit_patterns():
    """0.1 = 1.6·2⁻⁴。fp16：指数 11，0.6·1024=614.4→614；bf16：指数 123，0.6·128=76.8→77。"""
    assert torch.tensor(0.1).half().view(torch.int16).item() == 0b0_01011_1001100110
    assert decode(0b0_01011_1001100110, FORMATS["FP16"]) == 1638 / 16384
    assert bits_of(to_bf16(torch.tensor([0.1]))).item() == 0b0_01111011_1001101
    assert decode(0b0_01111011_1001101, FORMATS["BF16"]) == 205 / 2048


def test_formats_have_the_published_layouts():
    """(指数位, 尾数位)；TF32 是 19 位，其余加符号恰为类型的宽度。"""
    layouts = {name: (fmt.exponent_bits, fmt.mantissa_bits, fmt.ieee) for name, fmt in FORMATS.items()}
    assert layouts == {
        "FP32": (8, 23, True),
        "TF32": (8, 10, True),
        "FP16": (5, 10, True),
        "BF16": (8, 7, True),
        "FP8 E4M3": (4, 3, False),
        "FP8 E5M2": (5, 2, True),
    }
    assert [fmt.bias for fmt in FORMATS.values()] == [127, 127, 15, 127, 7, 15]
    for name, dtype in TORCH_DTYPES.items():
        assert 1 + sum(FORMATS[name][:2]) == 8 * dtype.itemsize


def test_ties_go_to_the_even_neighbour():
    """bf16 在 1 附近格距 2⁻⁷：1+2⁻⁸ 是一半，取 1；1+3·2⁻⁸ 也是一半，取 1+2⁻⁶；略过一半就进。"""
    x = [1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-8 + 2**-20, -(1 + 2**-8)]
    expected = torch.tensor([1.0, 1 + 2**-6, 1 + 2**-7, -1.0], dtype=torch.float64)
    assert_same_values(to_bf16(torch.tensor(x)).double(), expected)
    assert_same_values(round_to_format(torch.tensor(x, dtype=torch.float64), FORMATS["BF16"]), expected)


def test_overflow_threshold_is_half_a_step_above_the_maximum():
    """fp16：65504 的上一格应是 65536，中点 65520 取偶进位成无穷；E4M3 饱和到 448，E5M2 从 61440 起是无穷。"""
    x = torch.tensor([65519.0, 65520.0, -65520.0, math.inf], dtype=torch.float64)
    assert round_to_format(x, FORMATS["FP16"]).tolist() == [65504, math.inf, -math.inf, math.inf]
    x = torch.tensor([448.0, 464.0, 1e4, -math.inf], dtype=torch.float64)
    assert round_to_format(x, FORMATS["FP8 E4M3"]).tolist() == [448, 448, 448, -448]
    for repeats in (1, 20):  # 短的走标量，长的走向量
        saturated = x.float().repeat(repeats).to(torch.float8_e4m3fn).double()
        assert_same_values(saturated, round_to_format(x, FORMATS["FP8 E4M3"]).repeat(repeats))
    x = torch.tensor([61439.0, 61440.0, -1e9], dtype=torch.float64)
    assert round_to_format(x, FORMATS["FP8 E5M2"]).tolist() == [57344, math.inf, -math.inf]


# ---------- 与 torch 对照 ----------


@pytest.mark.parametrize("name", SMALL)
def test_decode_equals_torch_on_every_bit_pattern(name):
    expected = every_value(SMALL[name])
    actual = torch.tensor([decode(b, FORMATS[name]) for b in range(len(expected))], dtype=torch.float64)
    assert_same_values(actual, expected)
    assert_same_values(actual.signbit()[~actual.isnan()], expected.signbit()[~expected.isnan()])  # 含 −0


def test_decode_equals_struct_on_float32_patterns():
    generator = torch.Generator().manual_seed(0)
    patterns = torch.randint(0, 2**32, (500,), generator=generator).tolist()
    for bits in [*patterns, 0, 1, 0x7FFFFF, 0x800000, 0x7F7FFFFF, 0x7F800000, 0xFF800000, 0x7FC00000]:
        expected = struct.unpack("<f", struct.pack("<I", bits))[0]
        actual = decode(bits, FORMATS["FP32"])
        assert actual == expected or (math.isnan(actual) and math.isnan(expected))


@pytest.mark.parametrize("name", TORCH_DTYPES)
def test_limits_equal_finfo(name):
    limits, finfo = format_limits(FORMATS[name]), torch.finfo(TORCH_DTYPES[name])
    assert limits["max"] == finfo.max
    assert limits["smallest_normal"] == finfo.smallest_normal
    assert limits["eps"] == finfo.eps
    one_bit = torch.ones(1, dtype=INT_OF[finfo.bits // 8]).view(TORCH_DTYPES[name])
    assert limits["smallest_subnormal"] == one_bit.double().item()


def test_tf32_has_the_range_of_float32_and_the_precision_of_float16():
    tf32, fp32, fp16 = (format_limits(FORMATS[name]) for name in ("TF32", "FP32", "FP16"))
    assert tf32["smallest_normal"] == fp32["smallest_normal"] == 2.0**-126
    assert tf32["eps"] == fp16["eps"] == 2.0**-10
    assert tf32["max"] == (2 - 2.0**-10) * 2.0**127
    assert tf32["smallest_subnormal"] == 2.0**-136


def test_to_bf16_equals_torch_around_every_pattern():
    x = bf16_neighbourhoods()
    ours, torchs, is_nan = to_bf16(x), x.to(torch.bfloat16), x.isnan()
    assert torch.equal(bits_of(ours)[~is_nan], bits_of(torchs)[~is_nan])
    assert torch.equal(ours.isnan(), is_nan) and torch.equal(torchs.isnan(), is_nan)
    assert (bits_of(ours)[is_nan] == 0x7FC0).all()
    assert is_nan.sum() == 2 * (127 * 6 + 5)


@pytest.mark.parametrize("name", SMALL)
def test_rounding_equals_torch_at_and_beside_every_halfway_point(name):
    x = halfway_points(SMALL[name])
    ours, torchs = round_to_format(x.double(), FORMATS[name]), x.to(SMALL[name]).double()
    assert_same_values(ours, torchs)
    assert torch.equal(ours.signbit(), torchs.signbit())  # 含 −0


@pytest.mark.parametrize("name", ["FP32", *SMALL])
def test_rounding_equals_torch_on_random_values(name):
    generator = torch.Generator().manual_seed(1)
    exponents = torch.randint(-160, 127, (20000,), generator=generator).double()
    x = torch.randn(20000, generator=generator, dtype=torch.float64) * 2**exponents
    x = x if name == "FP32" else x.float().double()
    if name == "FP8 E4M3":
        x = x[x.abs() < 464]  # 溢出另有手算
    assert_same_values(round_to_format(x, FORMATS[name]), x.float().to(TORCH_DTYPES[name]).double())


def test_tf32_rounding_equals_the_bit_trick_on_float32():
    """低 13 位：加 0xFFF 与保留部分的末位，再清零。"""
    generator = torch.Generator().manual_seed(2)
    bits = torch.randint(-(2**31), 2**31, (20000,), generator=generator)
    bits = torch.cat([bits, torch.arange(0, 2**31, 4096)[:20000]])
    x = f32_from_bits(bits)
    x = x[x.isfinite()]
    bits = x.view(torch.int32)
    expected = ((bits + 0xFFF + ((bits >> 13) & 1)) & ~0x1FFF).view(torch.float32)
    assert_same_values(round_to_format(x.double(), FORMATS["TF32"]), expected.double())


@pytest.mark.parametrize("name", ["FP8 E4M3", "FP8 E5M2"])
def test_rounding_equals_the_nearest_value_by_exact_distance(name):
    limit = format_limits(FORMATS[name])["max"]
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, generator=generator, dtype=torch.float64) * limit / 2**12
    x = torch.cat([x, halfway_points(SMALL[name])[::37].double()])
    x = x[x.abs() <= limit]
    expected = [nearest_by_distance(value, FORMATS[name]) for value in x.tolist()]
    assert round_to_format(x, FORMATS[name]).tolist() == expected


def test_nan_stays_nan_and_zero_keeps_its_value():
    x = torch.tensor([math.nan, 0.0, -0.0, 5e-324], dtype=torch.float64)
    for fmt in FORMATS.values():
        rounded = round_to_format(x, fmt)
        assert rounded[0].isnan() and (rounded[1:] == 0).all()


def scaled_runs(gradients, **options):
    """同样的 fp16 梯度喂给我们与 GradScaler，返回逐步的 (参数, 倍数, 计数)。"""
    lr, max_norm = 0.5, 100.0
    ours = DynamicLossScaler(**options)
    param = torch.tensor([1.0, -2.0])
    theirs = torch.amp.GradScaler("cpu", **options)
    weight = torch.nn.Parameter(param.clone())
    optimizer = torch.optim.SGD([weight], lr=lr)
    theirs.scale(torch.ones(1))  # 惰性初始化
    mine, reference = [], []
    for gradient in gradients:
        scaled = torch.tensor(gradient, dtype=torch.float16)
        param = ours.step(param, scaled, lr=lr, max_norm=max_norm)
        mine.append((param.tolist(), ours.scale, ours.good_steps))
        weight.grad = scaled.float()  # GradScaler 拒绝直接缩放 fp16 的梯度
        theirs.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_([weight], max_norm, error_if_nonfinite=False)
        theirs.step(optimizer)
        theirs.update()
        reference.append((weight.detach().tolist(), theirs.get_scale(), theirs._get_growth_tracker()))
    return mine, reference


def test_scaler_equals_grad_scaler_step_by_step():
    """含连续溢出、单个 inf、单个 NaN、溢出后重新计数、两次放大；没有触发裁剪，所以逐位相等。"""
    inf, nan = math.inf, math.nan
    good, bad = [3.0, -1.5], [[inf, 1.0], [1.0, nan], [-inf, -inf]]
    gradients = [good, good, bad[0], good, good, good, bad[1], bad[2], good, good, good, good, good, good]
    options = {"init_scale": 1024.0, "growth_factor": 4.0, "backoff_factor": 0.25, "growth_interval": 3}
    mine, reference = scaled_runs(gradients, **options)
    assert mine == reference
    assert [scale for _, scale, _ in mine] == [1024] * 2 + [256] * 3 + [1024] + [256, 64, 64, 64] + [
        256
    ] * 3 + [1024]


def test_scaler_defaults_equal_grad_scaler_defaults():
    gradients = [[1.0, 2.0]] * 2000 + [[math.inf, 1.0]] * 3
    mine, reference = scaled_runs(gradients)
    assert mine == reference
    assert [scale for _, scale, _ in mine[1998:]] == [65536, 131072, 65536, 32768, 16384]


def test_clipping_measures_the_unscaled_gradient():
    """梯度 (3, 4)，范数 5，上限 2 → (1.2, 1.6)；上限 10 不裁剪；零梯度不产生 NaN。"""
    for scale in (1.0, 1024.0):
        grad = torch.tensor([3.0, 4.0]) * scale
        clipped = DynamicLossScaler(init_scale=scale).step(torch.zeros(2), grad, lr=0.5, max_norm=2.0)
        torch.testing.assert_close(clipped, torch.tensor([-0.6, -0.8]))
        free = DynamicLossScaler(init_scale=scale).step(torch.zeros(2), grad, lr=0.5, max_norm=10.0)
        torch.testing.assert_close(free, torch.tensor([-1.5, -2.0]), rtol=0, atol=0)
    still = DynamicLossScaler().step(torch.ones(2), torch.zeros(2), lr=0.5, max_norm=1.0)
    assert still.tolist() == [1.0, 1.0]


# ---------- 性质 ----------


def test_stochastic_rounding_is_exactly_unbiased_over_all_noise():
    """噪声取遍 65,536 个值各一次，平均恰为 x（含负数、次正规数、跨过 2 的幂）。"""
    noise = torch.arange(65536, dtype=torch.int32)
    for value in (1.001, -3.3, 1e-39, 0.99999, 1.5):
        x = torch.full((65536,), value)
        rounded = stochastic_to_bf16(x, noise).double()
        assert rounded.mean().item() == x[0].double().item()
        assert len(rounded.unique()) == (1 if value == 1.5 else 2)


def test_stochastic_rounding_keeps_infinity_and_nan():
    x = torch.tensor([math.inf, -math.inf]).repeat(3)
    noise = torch.tensor([0, 0, 32768, 32768, 65535, 65535], dtype=torch.int32)
    assert torch.equal(stochastic_to_bf16(x, noise).float(), x)
    nans = f32_from_bits(torch.tensor([0x7F800001, 0x7FFFFFFF, 0xFFFFFFFF]))
    assert stochastic_to_bf16(nans, torch.full((3,), 65535, dtype=torch.int32)).isnan().all()


def test_adding_ones_stalls_at_256_in_bf16_and_2048_in_fp16():
    """256+1 与 2048+1 都正好在两格中间，取偶回到原处；用 torch 的加法再核一遍。"""
    for name, count, stall in (("BF16", 300, 256), ("FP16", 2060, 2048), ("FP32", 300, 300)):
        ones = torch.ones(count, dtype=torch.float64)
        assert chunked_sum(ones, FORMATS[name], interval=count).item() == stall
        total = torch.zeros((), dtype=TORCH_DTYPES[name])
        for _ in range(count):
            total = total + 1
        assert total.item() == stall


def test_promotion_happens_every_interval_terms_and_into_fp32():
    """部分和每 100 项清零，bf16 也能数到 600；总和是 FP32：2²⁴+1 数不出来；余下不足一段的也加上。"""
    ones = torch.ones(600, 2, dtype=torch.float64)
    assert chunked_sum(ones, FORMATS["BF16"], interval=100).tolist() == [600, 600]
    assert chunked_sum(ones[:250], FORMATS["BF16"], interval=100).tolist() == [250, 250]
    assert chunked_sum(ones, FORMATS["BF16"], interval=257).tolist() == [2 * 256 + 86] * 2
    terms = torch.tensor([2.0**24, 1.0], dtype=torch.float64)
    assert chunked_sum(terms, FORMATS["FP32"], interval=1).item() == 2.0**24
    assert chunked_sum(terms[:1], FORMATS["BF16"], interval=1).item() == 2.0**24


def test_products_of_two_bf16_numbers_are_exact_in_float32():
    """8 位有效数字乘 8 位是 16 位，不超过 float32 的 24 位；fp16 是 11+11=22 位。"""
    significands = {"BF16": torch.arange(128, 256), "FP16": torch.arange(1024, 2048)}
    for name, integers in significands.items():
        values = (integers / integers[0]).to(TORCH_DTYPES[name])
        exact = values.double()[:, None] * values.double()
        assert torch.equal((values.float()[:, None] * values.float()).double(), exact)
        assert not torch.equal((values[:, None] * values).double(), exact)


def test_each_block_uses_its_own_maximum():
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(4, 6, generator=generator) * torch.tensor([1.0, 1e3, 1e-3, 1.0])[:, None]
    x[3, 3:] = 0
    values, scales = quantize_e4m3_blocks(x, block=(1, 3))
    assert scales.shape == (4, 2) and values.shape == x.shape
    for i in range(4):
        for j in range(2):
            tile = x[i, 3 * j : 3 * j + 3]
            expected = tile.abs().max() / 448 if tile.any() else torch.tensor(1.0)
            torch.testing.assert_close(scales[i, j], expected, rtol=0, atol=0)
            codes = (tile / expected).to(torch.float8_e4m3fn).float()
            assert_same_values(values[i, 3 * j : 3 * j + 3], codes * expected)
    _, scales = quantize_e4m3_blocks(x, block=(2, 3))
    torch.testing.assert_close(scales[1, 0], x[2:, :3].abs().max() / 448, rtol=0, atol=0)


def test_blocks_keep_the_relative_error_of_normal_numbers_below_one_sixteenth():
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(3, 256, generator=generator)
    x[0, 7] = 1e6  # E4M3 从最大到最小次正规数只有 448·2⁹ ≈ 2.3e5 倍
    values, _ = quantize_e4m3_blocks(x, block=(1, 128))
    normal = x.abs() >= x.abs().unflatten(1, (2, 128)).amax(-1).repeat_interleave(128, 1) / 448 * 2**-6
    assert ((values - x).abs() / x.abs())[normal].max() <= 1 / 16 + 1e-6
    assert (values[0, :128] == 0).sum() > 100 and (values[0, 128:] == 0).sum() < 5


def test_autocast_computes_in_bf16_and_leaves_parameters_and_gradients_in_float32():
    layer = torch.nn.Linear(3, 2)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = layer(torch.ones(4, 3))
    output.float().sum().backward()
    assert output.dtype == torch.bfloat16
    assert layer.weight.dtype == layer.weight.grad.dtype == torch.float32


def test_grad_scaler_refuses_fp16_gradients():
    """所以 model.half() 与 GradScaler 不能一起用，主权重必须是 float32。"""
    weight = torch.nn.Parameter(torch.ones(2, dtype=torch.float16))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(weight.sum()).backward()
    with pytest.raises(ValueError, match="unscale FP16 gradients"):
        scaler.unscale_(optimizer)


def test_tf32_is_off_for_matmul_by_default():
    assert torch.get_float32_matmul_precision() == "highest"
    assert torch.backends.cuda.matmul.allow_tf32 is False
    assert torch.backends.cudnn.allow_tf32 is True  # 卷积相反


def test_bf16_keeps_1e_8_and_fp16_flushes_it_to_zero():
    assert abs(to_bf16(torch.tensor([1e-8])).item() / 1e-8 - 1) < 2**-8
    assert torch.tensor([1e-8]).half().item() == 0
    assert torch.tensor([2**-25 * 1.01]).half().item() == 2**-24  # 半个最小次正规数以上就留下


def test_bf16_converts_to_fp16_exactly_between_2_to_minus_17_and_65504():
    """BF16 在 2⁻¹⁷ 的格距 2⁻²⁴ 正是 FP16 的最小次正规数；再小一格就有数不能精确表示。"""
    values = every_value(torch.bfloat16)
    values = values[(values >= 2.0**-17) & (values <= 65504)]
    assert_same_values(values.bfloat16().half().double(), values)
    below = torch.tensor([2.0**-17 - 2.0**-25]).bfloat16()
    assert below.half().double().item() != below.double().item()
    halves = every_value(torch.float16)
    halves = halves[halves.isfinite() & (halves != 0)]
    assert ((halves.half().bfloat16().double() - halves).abs() / halves.abs()).max() <= 2**-8


# ---------- 边界与错误写法 ----------


def test_wrong_dtypes_are_refused():
    with pytest.raises(jaxtyping.TypeCheckError):
        to_bf16(torch.zeros(2, dtype=torch.float64))
    with pytest.raises(jaxtyping.TypeCheckError):
        round_to_format(torch.zeros(2), FORMATS["BF16"])
    with pytest.raises(jaxtyping.TypeCheckError):
        stochastic_to_bf16(torch.zeros(2), torch.zeros(3, dtype=torch.int32))


def test_meaningless_scaler_options_are_refused():
    for options in ({"init_scale": 0.0}, {"init_scale": -1.0}, {"growth_interval": 0}):
        with pytest.raises(ValueError, match="倍数要大于 0，间隔至少 1 步"):
            DynamicLossScaler(**options)
    scaler = DynamicLossScaler(init_scale=0.5, growth_interval=1)
    scaler.step(torch.zeros(1), torch.ones(1), lr=1.0, max_norm=1.0)
    assert scaler.scale == 1.0


def high_half(bits):
    return (bits >> 16).to(torch.int16).view(torch.bfloat16)


def wrong_truncate(x):
    return high_half(x.view(torch.int32))


def wrong_half_up(x):
    return high_half(x.view(torch.int32) + 0x8000)


def wrong_nan(x):
    bits = x.view(torch.int32)
    return high_half(bits + 0x7FFF + ((bits >> 16) & 1))


def wrong_flush(x):
    return to_bf16(torch.where(x.abs() < torch.finfo(torch.float32).tiny, 0.0, x))


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("wrong", "share"), [(wrong_truncate, 0.41), (wrong_half_up, 0.08), (wrong_flush, 0.0025)]
)
def test_wrong_roundings_differ_from_torch(wrong, share):
    """截断错 5/12（六个低位里两个必错，正好半格的错一半）；半格一律进错 1/12；次正规数刷成零错 2·128 个位模式。"""
    x = bf16_neighbourhoods()
    x = x[~x.isnan()]
    wrong_share = (wrong(x).double() != x.to(torch.bfloat16).double()).double().mean().item()
    assert share < wrong_share < 0.42
    assert torch.equal(to_bf16(x).double(), x.to(torch.bfloat16).double())


@pytest.mark.rejects
def test_truncation_is_biased_towards_zero_and_rne_is_not():
    generator = torch.Generator().manual_seed(6)
    x = torch.rand(100_000, generator=generator) + 1.0
    bias = [(f(x).double() - x.double()).mean().item() / 2**-7 for f in (wrong_truncate, to_bf16)]
    assert -0.51 < bias[0] < -0.49 and abs(bias[1]) < 0.01


@pytest.mark.rejects
def test_rounding_a_nan_without_a_check_gives_minus_zero_or_infinity():
    """0x7FFFFFFF 进位成 0x8000（−0）；0x7F800001 的负载全在低半，截断后就是无穷。"""
    nans = f32_from_bits(torch.tensor([0x7FFFFFFF, 0x7F800001]))
    assert bits_of(wrong_nan(nans)).tolist() == [0x8000, 0x7F80]
    assert wrong_truncate(nans)[1].isinf()
    assert to_bf16(nans).isnan().all()


class NoSkip(DynamicLossScaler):
    def step(self, param, scaled_grad, *, lr, max_norm):
        return param - lr * scaled_grad.float() / self.scale


class ClipFirst(DynamicLossScaler):
    def step(self, param, scaled_grad, *, lr, max_norm):
        grad = scaled_grad.float()
        grad = grad * (max_norm / grad.norm()).clamp(max=1.0) / self.scale
        return param - lr * grad


class UnscaleInHalf(DynamicLossScaler):
    def step(self, param, scaled_grad, *, lr, max_norm):
        return param - lr * (scaled_grad / self.scale).float()


@pytest.mark.rejects
def test_unscaling_happens_in_float32():
    """放大后是 2⁻¹⁰，除以 2¹⁶ 是 2⁻²⁶：fp16 里舍成零，float32 里走 2⁻²⁶·2²⁵ = 0.5。"""
    scaled, options = torch.full((1,), 2.0**-10, dtype=torch.float16), {"lr": 2.0**25, "max_norm": math.inf}
    start = torch.ones(1)
    assert DynamicLossScaler(init_scale=2.0**16).step(start, scaled, **options).item() == 0.5
    assert UnscaleInHalf(init_scale=2.0**16).step(start, scaled, **options).item() == 1.0


@pytest.mark.rejects
def test_wrong_scalers_are_rejected():
    """不跳过：参数变成 NaN 或无穷。先裁剪再除回：步长小了 S 倍。"""
    inf_grad, grad = torch.tensor([math.inf, 1.0]), torch.tensor([3.0, 4.0]) * 1024
    options = {"lr": 0.5, "max_norm": 2.0}
    start = torch.zeros(2)
    assert not NoSkip(init_scale=1024.0).step(start, inf_grad, **options).isfinite().all()
    assert DynamicLossScaler(init_scale=1024.0).step(start, inf_grad, **options).tolist() == [0, 0]
    right = DynamicLossScaler(init_scale=1024.0).step(start, grad, **options)
    wrong = ClipFirst(init_scale=1024.0).step(start, grad, **options)
    torch.testing.assert_close(wrong * 1024, right)
