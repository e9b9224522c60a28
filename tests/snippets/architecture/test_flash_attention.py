r"""FlashAttention 参考实现的测试。

真值都不经过被测代码：Python 循环（只用 math.fsum 与 math.exp）的注意力与 logsumexp；
`F.scaled_dot_product_attention` 加显式布尔掩码，梯度用自动求导，另用有限差分核对一次；
`torch.logsumexp`；PyTorch 的 CPU flash 内核返回的 (out, lse)；在拼接的 key 上一次算完的注意力。
读写个数的真值是按块逐一列举的求和，与算法 1、2 的循环对照。文件末尾逐个拒绝流传的错误写法。
"""

import math

import pytest
import torch
import torch.nn.functional as F

from snippets.architecture.flash_attention import (
    HbmTraffic,
    flash_attention_backward,
    flash_attention_forward,
    merge,
    online_softmax_step,
    three_pass_attention,
)

B, H, D, DV = 2, 3, 5, 4
NEG_INF = float("-inf")
# (T, S, 因果)：方阵、query 比 key 少（缓存）、query 比 key 多（前几行全被遮住）
SHAPES = [(9, 9, False), (9, 9, True), (4, 11, True), (4, 11, False), (11, 6, True), (1, 7, True)]
# 整除、不整除、Br ≠ Bc、一格一块、一块装下全部
BLOCKS = [(3, 3), (4, 3), (2, 5), (5, 2), (1, 1), (64, 64)]


def make(num_queries, num_keys, *, dtype=torch.float64, seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(B, H, num_queries, D), (B, H, num_keys, D), (B, H, num_keys, DV), (B, H, num_queries, DV)]
    q, k, v, grad = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes)
    return [x.to(dtype) for x in (std * q, std * k, v, grad)]


def visible(num_queries, num_keys, causal):
    """第 i 个 query 看得见第 j 个 key：j - i <= S - T；逐格写出，不用 tril。"""
    cells = [
        [not causal or j - i <= num_keys - num_queries for j in range(num_keys)] for i in range(num_queries)
    ]
    return torch.tensor(cells)


def oracle(q, k, v, grad, *, causal, scale=None):
    """SDPA 加显式掩码（全遮住的行 2.13.0 输出 0）、自动求导、torch.logsumexp。"""
    mask = visible(q.shape[2], k.shape[2], causal)
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    grads = torch.autograd.grad((out * grad).sum(), (q, k, v))
    scores = (q @ k.transpose(-2, -1)).detach() * (D**-0.5 if scale is None else scale)
    return out.detach(), torch.logsumexp(scores.masked_fill(~mask, NEG_INF), dim=-1), *grads


def ours(q, k, v, grad, **kwargs):
    out, lse = flash_attention_forward(q, k, v, **kwargs)
    return out, lse, *flash_attention_backward(grad, q, k, v, out, lse, **kwargs)


# 手算


def test_online_softmax_by_hand():
    r"""打分 0、ln 2 | ln 8，值 1、2 | 3。第一块：m = ln 2，ℓ = 1/2 + 1，A = 1/2 + 2。

    第二块：m' = ln 8，缩放 e^{ln2-ln8} = 1/4；ℓ' = 3/8 + 1 = 11/8，A' = 5/8 + 3 = 29/8。
    输出 29/11 = (1·1 + 2·2 + 8·3)/(1+2+8)。
    """

    def tile(*xs):
        return torch.tensor(xs, dtype=torch.float64).view(1, 1, 1, -1)

    state = (tile(NEG_INF), tile(0.0), tile(0.0))
    state = online_softmax_step(*state, tile(0.0, math.log(2)), tile(1.0, 2.0).mT)
    torch.testing.assert_close(torch.cat(state, dim=-1), tile(math.log(2), 1.5, 2.5))
    m, total, acc = online_softmax_step(*state, tile(math.log(8)), tile(3.0))
    torch.testing.assert_close(torch.cat((m, total, acc), dim=-1), tile(math.log(8), 11 / 8, 29 / 8))
    # 反过来，最大值先到：缩放是 1，第二块的权重小于 1
    state = online_softmax_step(tile(NEG_INF), tile(0.0), tile(0.0), tile(math.log(8)), tile(3.0))
    m, total, acc = online_softmax_step(*state, tile(0.0, math.log(2)), tile(1.0, 2.0).mT)
    torch.testing.assert_close(torch.cat((m, total, acc), dim=-1), tile(math.log(8), 11 / 8, 29 / 8))


def test_merge_by_hand():
    """L = ln 1 与 ln 3，输出 8 与 4：合并后 L = ln 4，输出 8/4 + 4·3/4 = 5。"""
    out, lse = merge(*(torch.full((1, 1, 1, 1), 8.0), torch.zeros(1, 1, 1)), *_partial(4.0, math.log(3)))
    assert out.item() == pytest.approx(5.0) and lse.item() == pytest.approx(math.log(4))


def _partial(out, lse):
    return torch.full((1, 1, 1, 1), out), torch.full((1, 1, 1), lse)


@pytest.mark.parametrize("shift", [1000.0, -1000.0])
def test_merge_does_not_exponentiate_the_lse_itself(shift):
    """L = ±1000 时 e^L 溢出或下溢；结果只取决于两个 L 之差，同上一个测试。"""
    out, lse = merge(*_partial(8.0, shift), *_partial(4.0, shift + math.log(3)))
    assert out.item() == pytest.approx(5.0, rel=1e-3) and lse.item() == pytest.approx(shift + math.log(4))


def test_two_queries_backward_by_hand():
    r"""d = 1，scale = 1，q = 0，k = (a, b)，v = (1, 3)，dO = 1：P = (1/2, 1/2)，O = 2，Δ = 2。

    dP = (1, 3)，dS = (-1/2, 1/2)；dQ = (b - a)/2，dK = q·dS = 0，dV = (1/2, 1/2)。
    """
    q, k, v = torch.zeros(1, 1, 1, 1), torch.tensor([[[[5.0], [7.0]]]]), torch.tensor([[[[1.0], [3.0]]]])
    out, lse, dq, dk, dv = ours(q, k, v, torch.ones(1, 1, 1, 1), block_q=1, block_k=1, scale=1.0)
    assert out.item() == 2.0 and lse.item() == pytest.approx(math.log(2)) and dq.item() == 1.0
    assert dk.flatten().tolist() == [0.0, 0.0] and dv.flatten().tolist() == [0.5, 0.5]


# 与独立实现一致


def loop_row(q, keys, values):
    dots = [math.fsum(a * b for a, b in zip(q, key, strict=True)) / math.sqrt(D) for key in keys]
    weights = [math.exp(x) for x in dots]
    total = math.fsum(weights)
    out = [
        math.fsum(w * value[c] for w, value in zip(weights, values, strict=True)) / total for c in range(DV)
    ]
    return out, math.log(total)


def test_matches_a_loop_with_only_python_floats():
    q, k, v, _ = make(3, 5)
    out, lse = flash_attention_forward(q, k, v, block_q=2, block_k=2, is_causal=True)
    for b in range(B):
        for h in range(H):
            for i in range(3):
                seen = i + 3
                row, log_total = loop_row(
                    q[b, h, i].tolist(), k[b, h, :seen].tolist(), v[b, h, :seen].tolist()
                )
                torch.testing.assert_close(out[b, h, i], torch.tensor(row, dtype=torch.float64))
                assert lse[b, h, i].item() == pytest.approx(log_total, rel=1e-12)


@pytest.mark.parametrize("num_queries, num_keys, causal", SHAPES)
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_forward_lse_and_gradients_match_full_attention(num_queries, num_keys, causal, block_q, block_k):
    inputs = make(num_queries, num_keys)
    expected = oracle(*inputs, causal=causal)
    mine = ours(*inputs, block_q=block_q, block_k=block_k, is_causal=causal)
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), mine, expected, strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("causal", [False, True])
def test_given_scale_matches_full_attention(causal):
    inputs = make(6, 9)
    mine = ours(*inputs, block_q=4, block_k=4, is_causal=causal, scale=0.9)
    for a, b in zip(mine, oracle(*inputs, causal=causal, scale=0.9), strict=True):
        torch.testing.assert_close(a, b)


def test_default_is_not_causal_and_scale_is_one_over_sqrt_d():
    inputs = make(6, 6)
    mine = ours(*inputs, block_q=4, block_k=4)
    for a, b in zip(mine, oracle(*inputs, causal=False, scale=1 / math.sqrt(D)), strict=True):
        torch.testing.assert_close(a, b)


def test_backward_matches_finite_differences():
    """不用自动求导：逐个元素的中心差分，步长 1e-6，误差约 1e-9。"""
    inputs = [x[:1, :1] for x in make(4, 3)]
    q, k, v, grad = inputs
    kwargs = dict(block_q=3, block_k=2, is_causal=True)
    grads = ours(*inputs, **kwargs)[2:]
    for which, exact in enumerate(grads):
        for index in range(exact.numel()):
            values = []
            for step in (1e-6, -1e-6):
                moved = [q.clone(), k.clone(), v.clone()]
                moved[which].view(-1)[index] += step
                values.append((flash_attention_forward(*moved, **kwargs)[0] * grad).sum().item())
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(exact.reshape(-1)[index].item(), abs=1e-7)


@pytest.mark.parametrize("causal", [False, True])
def test_matches_the_cpu_flash_kernel_of_torch(causal):
    """PyTorch 2.13.0 的 CPU flash 内核也返回 lse；它要求 q、k、v 的每头维数相同。"""
    q, k, _, _ = make(9, 9)
    v, _, _, _ = make(9, 9, seed=1)
    out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, is_causal=causal)
    mine = flash_attention_forward(q, k, v, block_q=4, block_k=3, is_causal=causal)
    torch.testing.assert_close(mine, (out, lse))


def test_three_pass_attention_matches_sdpa():
    q, k, v, _ = make(4, 7)
    torch.testing.assert_close(three_pass_attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
    half = [x.to(torch.bfloat16) for x in (q, k, v)]
    out = three_pass_attention(*half)
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out.double(), F.scaled_dot_product_attention(q, k, v), rtol=0.05, atol=0.05)


# 性质


@pytest.mark.parametrize("chunks", [(1, 10), (5, 6), (3, 4, 4)])
def test_merging_disjoint_key_chunks_equals_all_keys(chunks):
    """split-KV 解码与 ring attention：每段各算各的，再合并；次序与结合方式无关。"""
    q, k, v, grad = make(2, 11)
    expected = oracle(q, k, v, grad, causal=False)[:2]
    parts = [
        flash_attention_forward(q, kc, vc, block_q=2, block_k=3)
        for kc, vc in zip(k.split(chunks, dim=2), v.split(chunks, dim=2), strict=True)
    ]
    for order in (parts, parts[::-1]):
        total = order[0]
        for part in order[1:]:
            total = merge(*total, *part)
        torch.testing.assert_close(total, expected)
    if len(parts) == 3:
        torch.testing.assert_close(merge(*parts[0], *merge(*parts[1], *parts[2])), expected)


def test_block_sizes_do_not_change_the_result():
    inputs = make(9, 9)
    first = ours(*inputs, block_q=2, block_k=7, is_causal=True)
    for a, b in zip(ours(*inputs, block_q=7, block_k=2, is_causal=True), first, strict=True):
        torch.testing.assert_close(a, b)


def test_shifting_every_score_moves_only_the_lse():
    """所有打分加同一个数：输出不变，lse 加这个数。给每个 k 加 q 方向的分量即可。"""
    q = torch.zeros(1, 1, 3, 2, dtype=torch.float64)
    q[..., 0] = 1.0
    generator = torch.Generator().manual_seed(4)
    k, v = (torch.randn(1, 1, 6, 2, generator=generator, dtype=torch.float64) for _ in range(2))
    shifted = k.clone()
    shifted[..., 0] += 700.0  # e^700 在 float64 里还有限，e^{700·6} 一类的写法已溢出
    out, lse = flash_attention_forward(q, k, v, block_q=2, block_k=2, scale=1.0)
    out_s, lse_s = flash_attention_forward(q, shifted, v, block_q=2, block_k=2, scale=1.0)
    torch.testing.assert_close(out_s, out)
    torch.testing.assert_close(lse_s, lse + 700.0)


# 读写个数


def ceil_div(a, b):
    return -(-a // b)


def listed_forward_traffic(num_queries, num_keys, *, block_q, block_k, causal):
    """按算法 2 的循环逐块列举：query 块一次，看得见的 key 块各一次，输出与 lse 各写一次。"""
    mask, loads = visible(num_queries, num_keys, causal), 0
    for i in range(0, num_queries, block_q):
        loads += min(block_q, num_queries - i) * D
        for j in range(0, num_keys, block_k):
            if mask[i : i + block_q, j : j + block_k].any():
                loads += min(block_k, num_keys - j) * (D + DV)
    return B * H * loads, B * H * num_queries * (DV + 1)


@pytest.mark.parametrize("num_queries, num_keys, causal", SHAPES)
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_forward_reads_exactly_the_tiles_with_a_visible_cell(num_queries, num_keys, causal, block_q, block_k):
    """读的恰是至少有一格可见的块：少读一块结果会错，多读一块这里会错。"""
    q, k, v, _ = make(num_queries, num_keys)
    with HbmTraffic() as traffic:
        flash_attention_forward(q, k, v, block_q=block_q, block_k=block_k, is_causal=causal)
    expected = listed_forward_traffic(num_queries, num_keys, block_q=block_q, block_k=block_k, causal=causal)
    assert (traffic.loads, traffic.stores) == expected


@pytest.mark.parametrize("num_queries, num_keys, causal", SHAPES)
@pytest.mark.parametrize("block_q, block_k", BLOCKS)
def test_backward_reads_exactly_the_tiles_at_or_below_the_diagonal(
    num_queries, num_keys, causal, block_q, block_k
):
    """每个可见的块：读 q、dO、lse、Δ、dQ，写 dQ；每个 key 块读 k、v，写 dK、dV；Δ 先扫一遍 dO 与 O。"""
    q, k, v, grad = make(num_queries, num_keys)
    kwargs = dict(block_q=block_q, block_k=block_k, is_causal=causal)
    out, lse = flash_attention_forward(q, k, v, **kwargs)
    with HbmTraffic() as traffic:
        flash_attention_backward(grad, q, k, v, out, lse, **kwargs)
    mask = visible(num_queries, num_keys, causal)
    loads, stores = 2 * num_queries * DV, num_queries
    for j in range(0, num_keys, block_k):
        width = min(block_k, num_keys - j)
        loads, stores = loads + width * (D + DV), stores + width * (D + DV)
        for i in range(0, num_queries, block_q):
            rows = min(block_q, num_queries - i)
            if mask[i : i + block_q, j : j + block_k].any():
                loads, stores = loads + rows * (2 * D + DV + 2), stores + rows * D
    assert (traffic.loads, traffic.stores) == (B * H * loads, B * H * stores)


def test_forward_traffic_is_the_textbook_count():
    """N 是块的倍数：读 Nd + 2Nd·N/Br，写 Nd + N；与 Bc 无关。标准写法读 3Nd + 2N²，写 Nd + 2N²。"""
    n, d = 48, 8
    q = k = v = torch.randn(1, 1, n, d)
    for block_q in (6, 12, 24):
        for block_k in (4, 16):
            with HbmTraffic() as traffic:
                flash_attention_forward(q, k, v, block_q=block_q, block_k=block_k)
            assert (traffic.loads, traffic.stores) == (n * d + 2 * n * d * (n // block_q), n * d + n)
    with HbmTraffic() as traffic:
        three_pass_attention(q, k, v)
    assert (traffic.loads, traffic.stores) == (3 * n * d + 2 * n * n, n * d + 2 * n * n)


def test_counter_counts_elements_not_calls():
    x = torch.zeros(4, 6)
    with HbmTraffic() as traffic:
        x[1:3, :2] = x[0, :4].view(2, 2) + 1
        x.sum()
    assert (traffic.loads, traffic.stores) == (4, 4)
    x[0, 0] = 1.0  # 上下文之外不计
    assert (traffic.loads, traffic.stores) == (4, 4)
    with HbmTraffic() as traffic:
        torch.zeros((4,), dtype=torch.float32).add(1)  # 关键字参数照常传下去
    assert (traffic.loads, traffic.stores) == (0, 0)


# 边界


def test_rows_without_any_visible_key_are_zero_not_nan():
    """T = 5、S = 2、因果：前三行一个 key 也看不见（flash-attn 约定输出 0），第四行只看见第 0 个。"""
    q, k, v, grad = make(5, 2)
    for block_q, block_k in ((2, 1), (5, 2), (1, 1), (4, 2)):
        out, lse, dq, dk, dv = ours(q, k, v, grad, block_q=block_q, block_k=block_k, is_causal=True)
        assert out[:, :, :3].abs().max() == 0 and (lse[:, :, :3] == NEG_INF).all()
        assert dq[:, :, :3].abs().max() == 0 and dk.isfinite().all() and dv.isfinite().all()
        torch.testing.assert_close(out[:, :, 3], v[:, :, 0])


def test_merging_with_an_empty_part_changes_nothing():
    q, k, v, _ = make(3, 4)
    part = flash_attention_forward(q, k, v, block_q=2, block_k=2)
    empty = torch.zeros_like(part[0]), torch.full_like(part[1], NEG_INF)
    torch.testing.assert_close(merge(*part, *empty), part)
    torch.testing.assert_close(merge(*empty, *part), part)
    torch.testing.assert_close(merge(*empty, *empty), empty)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_accumulated_in_float32(dtype):
    """S = 3000、值全为正：在半精度里累加会丢掉后面的项，float32 里累加只差最后一次舍入。"""
    generator = torch.Generator().manual_seed(3)
    q, k, v, grad = (torch.rand(1, 1, n, 4, generator=generator).to(dtype) for n in (2, 3000, 3000, 2))
    kwargs = dict(block_q=2, block_k=50)
    mine = ours(q, k, v, grad, **kwargs)
    exact = ours(q.double(), k.double(), v.double(), grad.double(), **kwargs)
    assert [x.dtype for x in mine] == [dtype, torch.float32, dtype, dtype, dtype]
    ulp = torch.finfo(dtype).eps
    torch.testing.assert_close(mine[0].double(), exact[0], rtol=0.51 * ulp, atol=1e-6)
    torch.testing.assert_close(mine[1].double(), exact[1], rtol=1e-6, atol=0)
    # 反向里 Δ 用的是已舍入的 O，误差是 O 的舍入误差：对 dV 没有，对 dQ、dK 是 ulp 量级
    torch.testing.assert_close(mine[4].double(), exact[4], rtol=0.51 * ulp, atol=1e-7)
    assert (mine[2].double() - exact[2]).abs().max() < ulp
    merged, lse = merge(mine[0], mine[1], mine[0], mine[1])
    assert merged.dtype == dtype and lse.dtype == torch.float32
    torch.testing.assert_close(lse, mine[1] + math.log(2))


def test_query_gradient_is_accumulated_in_float32():
    """q = 0，v = k = ±1 交替，dO = 1：P = 1/512，O = Δ = 0，每个 key 给 dQ 加 1/512，共 1。

    在 bfloat16 里累加，到 256/512 = 1/2 就加不动了。
    """
    signs = torch.ones(1, 1, 512, 1, dtype=torch.bfloat16)
    signs[:, :, 1::2] = -1
    one = torch.ones(1, 1, 1, 1, dtype=torch.bfloat16)
    _, _, dq, _, _ = ours(0 * one, signs, signs, one, block_q=1, block_k=1, scale=1.0)
    assert dq.dtype == torch.bfloat16 and dq.item() == 1.0


def test_backward_keeps_half_precision_products_in_float32():
    """dO 与 V 都是 300：点积 4·90000 超过 float16 的 65504，先升精度才有限。"""
    x = torch.full((1, 1, 2, 4), 300.0, dtype=torch.float16)
    small = torch.zeros(1, 1, 2, 4, dtype=torch.float16)
    out, lse, dq, dk, dv = ours(small, small, x, x, block_q=1, block_k=1)
    assert all(y.isfinite().all() for y in (out, lse, dq, dk, dv))
    torch.testing.assert_close(dv, x)  # 两个 query 各给 1/2
    assert dq.abs().max() == 0 and dk.abs().max() == 0  # 值都相同，打分的梯度为 0


def test_huge_scores_do_not_overflow():
    q, k, v, grad = make(6, 6, dtype=torch.float32, std=1e4)
    mine = ours(q, k, v, grad, block_q=2, block_k=2, is_causal=True)
    expected = oracle(q, k, v, grad, causal=True)
    assert all(x.isfinite().all() for x in mine) and mine[1].abs().max() > 1e7
    torch.testing.assert_close(mine[:2], expected[:2])


@pytest.mark.parametrize("block_q, block_k", [(0, 2), (2, 0), (-1, 2), (2, -1)])
def test_bad_block_size_is_refused(block_q, block_k):
    q, k, v, grad = make(3, 3)
    out, lse = flash_attention_forward(q, k, v, block_q=1, block_k=1)
    with pytest.raises(ValueError, match="至少是 1"):
        flash_attention_forward(q, k, v, block_q=block_q, block_k=block_k)
    with pytest.raises(ValueError, match="至少是 1"):
        flash_attention_backward(grad, q, k, v, out, lse, block_q=block_q, block_k=block_k)


# 被拒绝的错误写法：同一个 oracle，模板正确时通过，每个错误写法都不通过


def template(
    q,
    k,
    v,
    *,
    block=3,
    initial=NEG_INF,
    rescale_acc=True,
    rescale_total=True,
    power=1,
    guard=True,
    lse_with_m=True,
    shift=0,
):
    """另写的分块前向（整批 query，逐块扫 key，因果），每个开关对应一种流传的错误。"""
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = torch.ones(num_queries, num_keys).bool().tril(num_keys - num_queries + shift)
    m = torch.full(q.shape[:-1], initial, dtype=q.dtype)
    total, acc = torch.zeros_like(m), torch.zeros(*q.shape[:-1], v.shape[-1], dtype=q.dtype)
    for j in range(0, num_keys, block):
        s = (q @ k[:, :, j : j + block].mT / math.sqrt(D)).masked_fill(~mask[:, j : j + block], NEG_INF)
        new_m = torch.maximum(m, s.amax(-1))
        safe = torch.where(new_m == NEG_INF, 0.0, new_m) if guard else new_m
        p, factor = (s - safe.unsqueeze(-1)).exp(), (m - safe).exp()
        total = (factor if rescale_total else 1.0) * total + p.sum(-1)
        acc = (factor.unsqueeze(-1) ** power if rescale_acc else 1.0) * acc + p @ v[:, :, j : j + block]
        m = new_m
    out = acc / (torch.where(total == 0, 1.0, total) if guard else total).unsqueeze(-1)
    return out, total.log() + (m if lse_with_m else 0.0)


WRONG_FORWARD = {
    "O 不乘 e^{m-m'}": dict(rescale_acc=False),
    "O 除以 e^{m-m'}（FlashAttention-2 算法 1 第 10 行印的逆）": dict(power=-1, initial=-50.0),
    "ℓ 不乘 e^{m-m'}": dict(rescale_total=False),
    "两个都不乘": dict(rescale_acc=False, rescale_total=False),
    "lse 不加 m": dict(lse_with_m=False),
    "因果掩码多看一个": dict(shift=1),
    "因果掩码少看一个": dict(shift=-1),
}


def differs(mine, expected):
    return any(not torch.allclose(a, b, rtol=1e-2, atol=1e-2) for a, b in zip(mine, expected, strict=True))


def test_the_template_of_the_wrong_versions_is_right():
    for num_queries, num_keys in ((9, 9), (7, 4)):
        inputs = make(num_queries, num_keys)
        torch.testing.assert_close(template(*inputs[:3]), oracle(*inputs, causal=True)[:2])


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_FORWARD)
def test_wrong_forward_is_rejected(name):
    inputs = make(9, 9)
    expected = oracle(*inputs, causal=True)[:2]
    torch.testing.assert_close(
        flash_attention_forward(*inputs[:3], block_q=3, block_k=3, is_causal=True), expected
    )
    assert differs(template(*inputs[:3], **WRONG_FORWARD[name]), expected)


@pytest.mark.rejects
def test_initial_maximum_zero_is_rejected():
    """打分全在 -200 附近：m 从 0 起，float32 里 e^{-200} 下溢成 0，输出全是 0/0。"""
    q = torch.zeros(1, 1, 2, D)
    q[..., 0] = math.sqrt(D)
    k, v = torch.zeros(1, 1, 4, D), torch.arange(16.0).view(1, 1, 4, DV)
    k[..., 0] = torch.tensor([-200.0, -201.0, -202.0, -203.0])
    out, lse = flash_attention_forward(q, k, v, block_q=2, block_k=2)
    torch.testing.assert_close(out, F.scaled_dot_product_attention(q, k, v))
    torch.testing.assert_close(
        lse, torch.full_like(lse, -200 + math.log(sum(math.exp(-i) for i in range(4))))
    )
    wrong, wrong_lse = template(q, k, v, initial=0.0, guard=False)
    assert wrong[:, :, 1].isnan().any() and (wrong_lse == NEG_INF).any()


@pytest.mark.rejects
def test_missing_guard_gives_nan_for_rows_that_see_nothing():
    inputs = make(7, 4)
    assert template(*inputs[:3], guard=False)[0][:, :, :3].isnan().all()
    assert flash_attention_forward(*inputs[:3], block_q=3, block_k=3, is_causal=True)[0].isfinite().all()


WRONG_BACKWARD = {
    "漏掉 Δ": lambda p, dp, delta, o, do: p * dp,
    "Δ 加成正号": lambda p, dp, delta, o, do: p * (dp + delta),
    "Δ 用 rowsum(O∘O)": lambda p, dp, delta, o, do: p * (dp - (o * o).sum(-1, keepdim=True)),
    "Δ 用 dP 的行和": lambda p, dp, delta, o, do: p * (dp - dp.sum(-1, keepdim=True)),
    "Δ 除以 S": lambda p, dp, delta, o, do: p * (dp - delta / p.shape[-1]),
}


def closed_form_gradients(q, k, v, grad, dscores, *, tau=D**-0.5):
    p = torch.softmax(q @ k.mT * D**-0.5, dim=-1)
    out = p @ v
    ds = dscores(p, grad @ v.mT, (grad * out).sum(-1, keepdim=True), out, grad)
    return tau * ds @ k, tau * ds.mT @ q, p.mT @ grad


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_BACKWARD)
def test_wrong_backward_is_rejected(name):
    inputs = make(6, 8)
    expected = oracle(*inputs, causal=False)[2:]
    torch.testing.assert_close(
        closed_form_gradients(*inputs, lambda p, dp, delta, o, do: p * (dp - delta)), expected
    )
    assert differs(closed_form_gradients(*inputs, WRONG_BACKWARD[name]), expected)


@pytest.mark.rejects
def test_backward_without_the_scale_is_rejected():
    inputs = make(6, 8)
    wrong = closed_form_gradients(*inputs, lambda p, dp, delta, o, do: p * (dp - delta), tau=1.0)
    assert differs(wrong, oracle(*inputs, causal=False)[2:])


def test_delta_is_the_inner_product_of_p_and_dp():
    """Δ_i = Σ_k P_ik dP_ik = Σ_c dO_ic O_ic：不需要整行的 P。"""
    q, k, v, grad = make(6, 8)
    p = torch.softmax(q @ k.mT, dim=-1)
    torch.testing.assert_close((p * (grad @ v.mT)).sum(-1), (grad * (p @ v)).sum(-1))


@pytest.mark.rejects
def test_averaging_partial_outputs_is_rejected():
    """合并时各取一半、按 key 的个数加权、权重用 lse 而不是 e^lse，都不对。"""
    q, k, v, grad = make(2, 11)
    expected = oracle(q, k, v, grad, causal=False)[0]
    (oa, la), (ob, lb) = (
        flash_attention_forward(q, k[:, :, s], v[:, :, s], block_q=2, block_k=3)
        for s in (slice(0, 3), slice(3, 11))
    )
    torch.testing.assert_close(merge(oa, la, ob, lb)[0], expected)
    wa = (la / (la + lb)).unsqueeze(-1)
    for wrong in ((oa + ob) / 2, (3 * oa + 8 * ob) / 11, wa * oa + (1 - wa) * ob):
        assert (wrong - expected).abs().max() > 0.05
