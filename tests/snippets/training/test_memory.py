"""显存公式的检验。

真值有四个来源：自动求导真的保存了哪些存储（saved_tensors_hooks；块在本文件里按论文图 2 另写一份），
真的走一步 torch.optim.AdamW 之后各张量的字节数，Korthikanti 等人论文里的数（表 2、表 3、§4.3、§5、§6.1），
逐个算子跟踪的存活字节峰值。掩码、统计量这些公式不含的小缓冲逐字节解释。流传的错误写法在这里定义并被同一个真值拒绝。
"""

import weakref

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

from snippets.architecture.kv_cache import KVCache
from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.rope import apply_rope, rope_cos_sin, rope_inverse_frequencies
from snippets.training.memory import (
    activation_bytes,
    inference_bytes,
    llama_activation_bytes,
    model_state_bytes,
    output_bytes,
    saved_bytes,
)

SHAPES = [(2, 64, 128, 4), (3, 48, 96, 6)]  # B、T、C、H
# 论文表 3：头数、宽度、层数、流水线、交错段数、微批；t = 8，s = 2048，v = 51200
PAPER = {
    "22B": (64, 6144, 48, 1, None, 4),
    "175B": (96, 12288, 96, 8, 3, 1),
    "530B": (128, 20480, 105, 35, 3, 1),
    "1T": (160, 25600, 128, 64, None, 1),
}


class ByteMaskDropout(torch.autograd.Function):
    """CUDA 的 dropout 只存 1 字节的掩码；CPU 的 F.dropout 存同类型的掩码，所以另写。"""

    @staticmethod
    def forward(ctx, x, p):
        keep = torch.rand(x.shape) >= p
        ctx.save_for_backward(keep)
        ctx.p = p
        return x * keep / (1 - p)

    @staticmethod
    def backward(ctx, grad):
        (keep,) = ctx.saved_tensors
        return grad * keep / (1 - ctx.p), None


class GPTBlock(nn.Module):
    """论文图 2 的一层：LayerNorm、注意力、dropout、残差；LayerNorm、4C 的 GELU、dropout、残差。"""

    def __init__(self, width, num_heads, *, dtype=torch.bfloat16, dropout=0.1, fused=False):
        super().__init__()
        self.num_heads, self.p, self.fused = num_heads, dropout, fused
        self.norms = nn.ModuleList(nn.LayerNorm(width, dtype=dtype) for _ in range(2))
        self.qkvo = nn.ModuleList(nn.Linear(width, width, dtype=dtype) for _ in range(4))
        self.fc1 = nn.Linear(width, 4 * width, dtype=dtype)
        self.fc2 = nn.Linear(4 * width, width, dtype=dtype)

    def drop(self, x):
        return ByteMaskDropout.apply(x, self.p) if self.p else x

    def forward(self, x):
        batch, length, width = x.shape
        h = self.norms[0](x)
        q, k, v = (f(h).view(batch, length, self.num_heads, -1).transpose(1, 2) for f in list(self.qkvo)[:3])
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        else:
            future = torch.ones(length, length, dtype=torch.bool).triu(1)
            scores = (q @ k.transpose(2, 3)) * (width // self.num_heads) ** -0.5
            y = self.drop(scores.masked_fill(future, float("-inf")).softmax(-1)) @ v
        x = x + self.drop(self.qkvo[3](y.transpose(1, 2).reshape(batch, length, width)))
        return x + self.drop(self.fc2(F.gelu(self.fc1(self.norms[1](x)))))


class Checkpointed(nn.Module):
    def __init__(self, *blocks):
        super().__init__()
        self.blocks = nn.ModuleList(blocks)

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return x


def measured(shape, *, dtype=torch.bfloat16, dropout=0.1, fused=False):
    """真的跑一层，减去公式不含的小缓冲：LayerNorm 的统计量，因果掩码或 log-sum-exp。"""
    batch, length, width, heads = shape
    x = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    block = GPTBlock(width, heads, dtype=dtype, dropout=dropout, fused=fused)
    statistics = 2 * 2 * batch * length * x.element_size()
    extra = 4 * batch * length * heads if fused else length * length
    return saved_bytes(block, x) - statistics - extra


def formula(shape, **kwargs):
    batch, length, width, heads = shape
    sizes = dict(num_layers=1, batch_size=batch, num_tokens=length, hidden_size=width, num_heads=heads)
    return activation_bytes(**{**sizes, **kwargs})


def close(x, y):
    return abs(x - y) < 1e-9 * abs(y)


def paper(name, *, tp_size=8, **kwargs):
    heads, width, layers, pipeline, chunks, micro_batch = PAPER[name]
    sizes = dict(num_layers=layers, batch_size=micro_batch, num_tokens=2048, hidden_size=width)
    total = activation_bytes(**sizes, num_heads=heads, tp_size=tp_size, **kwargs)
    return total * (1 + (pipeline - 1) / (pipeline * chunks)) if chunks else total


# 手算


def test_states_by_hand():
    """1000 个参数：2+2+4+8 = 16 字节；每一项各自可改。"""
    assert model_state_bytes(1000) == 16_000
    assert model_state_bytes(1000, weight_bytes=1) == 15_000
    assert model_state_bytes(1000, grad_bytes=4) == 18_000
    assert model_state_bytes(1000, master_bytes=0) == 12_000
    assert model_state_bytes(1000, optimizer_bytes=2) == 10_000


def test_activation_symbols_are_table_2():
    """论文表 2 的六行，逐行化简相等；完全重算不除 t，序列并行时输入本来就是切开的。"""
    b, s, h, a, t, layers = sympy.symbols("b s h a t L", positive=True)
    sizes = dict(num_layers=layers, batch_size=b, num_tokens=s, hidden_size=h, num_heads=a)
    table = {
        (1, False, "none"): 34 + 5 * a * s / h,
        (t, False, "none"): 10 + 24 / t + 5 * a * s / (h * t),
        (t, True, "none"): 34 / t + 5 * a * s / (h * t),
        (t, False, "selective"): 10 + 24 / t,
        (t, True, "selective"): 34 / t,
        (t, False, "full"): 2,
        (t, True, "full"): 2 / t,
    }
    for (tp_size, sequence_parallel, recompute), want in table.items():
        got = activation_bytes(
            **sizes, tp_size=tp_size, sequence_parallel=sequence_parallel, recompute=recompute
        )
        assert sympy.simplify(got - layers * s * b * h * want) == 0


def test_everything_is_sympy_transparent():
    """所有公式收符号、给公式。"""
    n, b, s, c, f, v, t, h, k, d, layers = sympy.symbols("n b s c f v t h k d L", positive=True)
    assert sympy.simplify(model_state_bytes(n) - 16 * n) == 0
    llama = llama_activation_bytes(
        num_layers=layers,
        batch_size=b,
        num_tokens=s,
        hidden_size=c,
        intermediate_size=f,
        num_heads=h,
        num_kv_heads=k,
        head_dim=d,
    )
    want = layers * b * s * (2 * (4 * c + 2 * h * d + 2 * k * d + 4 * f) + 4 * h)
    assert sympy.expand(llama - want) == 0
    head = output_bytes(batch_size=b, num_tokens=s, hidden_size=c, vocab_size=v, tp_size=t)
    assert sympy.simplify(head - 4 * s * b * c / t * (1 + v / c)) == 0  # 论文 §4.3 的写法
    total = inference_bytes(num_params=n, num_layers=layers, num_kv_heads=k, head_dim=d, num_tokens=s)
    assert sympy.expand(total - 2 * n - 4 * layers * k * d * s) == 0


# 与真的张量比


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("dropout", [0.1, 0.0])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_activation_equals_autograd_to_the_byte(shape, fused, dropout, dtype):
    """自动求导保存的存储逐字节等于公式；FlashAttention 与选择性重算的计数相同。"""
    got = measured(shape, dtype=dtype, dropout=dropout, fused=fused)
    kwargs = dict(has_dropout=dropout > 0, bytes_per_element=dtype.itemsize)
    assert got == formula(shape, recompute="selective" if fused else "none", **kwargs)


def test_transformers_eager_softmax_keeps_six_bytes():
    """transformers 的 eager 注意力：float32 的 softmax 4 字节，转回 bf16 的 2 字节，是只存一份的三倍。"""
    from transformers.models.llama.modeling_llama import eager_attention_forward

    class Eager(nn.Module):
        num_key_value_groups = 1

        def forward(self, q, k, v):
            return eager_attention_forward(self, q, k, v, None, scaling=0.25)[0]

    shape = (2, 3, 40, 16)
    q, k, v = (torch.randn(shape, dtype=torch.bfloat16, requires_grad=True) for _ in range(3))
    assert saved_bytes(Eager().train(), q, k, v) - 3 * q.nbytes == 6 * 2 * 3 * 40**2


def test_defaults_are_the_paper():
    """默认：不并行、不重算、有 dropout、16 位。"""
    assert formula(SHAPES[0]) == measured(SHAPES[0])


@pytest.mark.parametrize("num_layers", [1, 3])
def test_full_recompute_keeps_only_the_inputs(num_layers):
    batch, length, width, heads = SHAPES[0]
    x = torch.randn(batch, length, width, dtype=torch.bfloat16, requires_grad=True)
    model = Checkpointed(*(GPTBlock(width, heads) for _ in range(num_layers)))
    assert saved_bytes(model, x) == formula(SHAPES[0], num_layers=num_layers, recompute="full")
    assert saved_bytes(model, x) == num_layers * x.nbytes


def test_layers_add_up():
    """三层保存的是一层的三倍（掩码各建一份）。"""
    batch, length, width, heads = SHAPES[1]
    x = torch.randn(batch, length, width, dtype=torch.bfloat16, requires_grad=True)
    model = nn.Sequential(*(GPTBlock(width, heads) for _ in range(3)))
    extra = 3 * (2 * 2 * batch * length * 2 + length * length)
    assert saved_bytes(model, x) - extra == formula(SHAPES[1], num_layers=3)


class FusedRMSNorm(torch.autograd.Function):
    """融合的 RMSNorm：只存输入与每个 token 一个 float32 的统计量。"""

    @staticmethod
    def forward(ctx, x, weight):
        rstd = (x.float().pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt()
        ctx.save_for_backward(x, weight, rstd)
        return (x.float() * rstd).to(x.dtype) * weight

    @staticmethod
    def backward(ctx, grad):
        raise NotImplementedError


class LlamaBlock(nn.Module):
    def __init__(self, width, inner, heads, kv_heads, head_dim, dtype):
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, head_dim
        out_widths = [heads * head_dim, kv_heads * head_dim, kv_heads * head_dim, inner, inner]
        self.q, self.k, self.v, self.gate, self.up = (
            nn.Linear(width, n, bias=False, dtype=dtype) for n in out_widths
        )
        self.o = nn.Linear(heads * head_dim, width, bias=False, dtype=dtype)
        self.down = nn.Linear(inner, width, bias=False, dtype=dtype)
        self.gains = nn.ParameterList(torch.ones(width, dtype=dtype) for _ in range(2))

    def forward(self, x, cos, sin):
        batch, length, _ = x.shape
        h = FusedRMSNorm.apply(x, self.gains[0])
        q, k, v = (
            f(h).view(batch, length, n, self.head_dim).transpose(1, 2)
            for f, n in ((self.q, self.heads), (self.k, self.kv_heads), (self.v, self.kv_heads))
        )
        q, k = apply_rope(q, k, cos, sin)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        x = x + self.o(y.transpose(1, 2).reshape(batch, length, -1))
        h = FusedRMSNorm.apply(x, self.gains[1])
        return x + self.down(F.silu(self.gate(h)) * self.up(h))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(8, 8, 16), (8, 2, 16), (6, 3, 8)])
def test_llama_block_equals_autograd_to_the_byte(heads, kv_heads, head_dim, dtype):
    batch, length, width, inner = 2, 40, 128, 344
    x = torch.randn(batch, length, width, dtype=dtype, requires_grad=True)
    positions = torch.arange(length).expand(batch, length)
    cos, sin = (y.to(dtype) for y in rope_cos_sin(positions, rope_inverse_frequencies(head_dim)))
    block = LlamaBlock(width, inner, heads, kv_heads, head_dim, dtype)
    got = saved_bytes(block, x, cos, sin) - cos.nbytes - sin.nbytes - 2 * 4 * batch * length
    sizes = dict(num_layers=1, batch_size=batch, num_tokens=length, hidden_size=width)
    sizes |= dict(intermediate_size=inner, num_heads=heads, num_kv_heads=kv_heads, head_dim=head_dim)
    assert got == llama_activation_bytes(**sizes, bytes_per_element=dtype.itemsize)
    if dtype is torch.bfloat16:  # 默认就是 16 位
        assert got == llama_activation_bytes(**sizes)
    assert llama_activation_bytes(**{**sizes, "num_layers": 5}) == 5 * llama_activation_bytes(**sizes)


def test_output_layer_equals_autograd_to_the_byte():
    """归一化与输出头的输入各 2 字节，交叉熵的 float32 4 字节；另有标签、统计量与一个标量。"""

    class Head(nn.Module):
        def __init__(self, width, vocab_size):
            super().__init__()
            self.norm = nn.LayerNorm(width, dtype=torch.bfloat16)
            self.lm_head = nn.Linear(width, vocab_size, bias=False, dtype=torch.bfloat16)

        def forward(self, x, labels):
            logits = self.lm_head(self.norm(x)).float()
            return F.cross_entropy(logits.flatten(0, 1), labels.flatten())

    x = torch.randn(2, 24, 32, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(500, (2, 24))
    got = saved_bytes(Head(32, 500), x, labels) - labels.nbytes - 2 * 2 * 24 * 2 - 4
    assert got == output_bytes(batch_size=2, num_tokens=24, hidden_size=32, vocab_size=500)
    assert output_bytes(batch_size=2, num_tokens=24, hidden_size=32, vocab_size=500, tp_size=4) == got / 4


def nbytes(tensors):
    return sum(x.nbytes for x in tensors if x.ndim)  # AdamW 的 step 是标量，不随参数个数变


def adamw_step(weight_dtype, *, master):
    """真的走一步，返回每个参数的权重、梯度、主权重、优化器状态各几字节。"""
    model = nn.Sequential(nn.Linear(16, 24), nn.Linear(24, 8)).to(weight_dtype)
    params = list(model.parameters())
    copies = [p.detach().float().clone().requires_grad_() for p in params] if master else []
    optimizer = torch.optim.AdamW(copies or params)
    model(torch.randn(4, 16, dtype=weight_dtype)).float().square().mean().backward()
    for p, copy in zip(params, copies, strict=False):
        copy.grad = p.grad.float()
    optimizer.step()
    moments = [x for state in optimizer.state.values() for x in state.values()]
    numel = sum(p.numel() for p in params)
    groups = params, [p.grad for p in params], copies, moments
    return numel, [nbytes(group) // numel for group in groups]


@pytest.mark.parametrize(
    ("dtype", "master", "want"),
    [
        (torch.bfloat16, True, [2, 2, 4, 8]),  # 混合精度：16
        (torch.float32, False, [4, 4, 0, 8]),  # float32，也是 autocast 的权重：16
        (torch.bfloat16, False, [2, 2, 0, 4]),  # 全 bf16：8
    ],
)
def test_states_equal_a_real_adamw_step(dtype, master, want):
    numel, per_param = adamw_step(dtype, master=master)
    assert per_param == want
    names = ("weight_bytes", "grad_bytes", "master_bytes", "optimizer_bytes")
    got = model_state_bytes(numel, **dict(zip(names, per_param, strict=True)))
    assert got == numel * sum(want)
    if master:
        assert model_state_bytes(numel) == got  # 默认就是混合精度


def test_autocast_also_keeps_low_precision_weights():
    """autocast 的 bf16 权重副本留到反向：每个参数再加 2 字节，算在激活里。"""
    layer = nn.Linear(16, 24, bias=False)
    x = torch.randn(4, 16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = saved_bytes(layer, x)
    assert got == 2 * x.numel() + 2 * layer.weight.numel()


def test_a_frozen_linear_layer_saves_no_input():
    """权重冻结时，线性层的反向只要权重，不要输入。"""
    layer = nn.Linear(16, 24, bias=False).requires_grad_(False)
    x = torch.randn(4, 16, requires_grad=True)
    assert saved_bytes(layer, x) == 0
    assert saved_bytes(layer.requires_grad_(), x) == x.nbytes


class LivePeak(TorchDispatchMode):
    """跟踪每个算子之后还活着的存储，参数不算。"""

    def __init__(self, module):
        super().__init__()
        self.kept = [p.untyped_storage() for p in module.parameters()]
        self.seen = {storage._cdata for storage in self.kept}
        self.live = self.peak = 0

    def release(self, key, size):
        self.seen.discard(key)
        self.live -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            storage = x.untyped_storage()
            if storage._cdata not in self.seen:
                self.seen.add(storage._cdata)
                self.live += storage.nbytes()
                weakref.finalize(storage, self.release, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.live)
        return out


@torch.no_grad()
def test_workspace_is_the_live_peak_of_a_swiglu_layer():
    """残差 C、归一化后 C、SiLU 的输出 F、up F、积 F 同时活着。"""
    width, inner, tokens = 96, 260, 40
    mlp = nn.ModuleDict(
        {"gate": nn.Linear(width, inner, bias=False), "up": nn.Linear(width, inner, bias=False)}
    )
    mlp["down"] = nn.Linear(inner, width, bias=False)
    mlp = mlp.bfloat16()
    with LivePeak(mlp) as tracker:
        x = torch.ones(tokens, width, dtype=torch.bfloat16)
        h = x * 2
        x = x + mlp["down"](F.silu(mlp["gate"](h)) * mlp["up"](h))
    none = dict(num_params=0, num_layers=0, num_kv_heads=0, head_dim=0, num_tokens=0)
    got = inference_bytes(**none, hidden_size=width, intermediate_size=inner, step_tokens=tokens)
    assert got == tracker.peak


def test_inference_parts_are_real_tensors():
    """权重、缓存、logits 都造出真的张量来数。"""
    layers, batch, kv_heads, length, head_dim, vocab = 3, 2, 5, 7, 4, 11
    weights = torch.zeros(1001, dtype=torch.bfloat16)
    caches = [KVCache() for _ in range(layers)]
    for cache in caches:
        k = torch.zeros(batch, kv_heads, length, head_dim, dtype=torch.bfloat16)
        cache.update(k, k.clone())
    logits = torch.zeros(batch, vocab)
    want = weights.nbytes + sum(c.keys.nbytes + c.values.nbytes for c in caches) + logits.nbytes
    sizes = dict(num_params=1001, num_layers=layers, num_kv_heads=kv_heads, head_dim=head_dim)
    sizes |= dict(num_tokens=length, batch_size=batch)
    got = inference_bytes(**sizes, vocab_size=vocab, num_logits=batch)
    assert got == want
    cache_bytes = 2 * layers * kv_heads * head_dim * length * batch * 2
    without = inference_bytes(**sizes, step_tokens=9, vocab_size=vocab)
    assert without == 2002 + cache_bytes  # 宽度没给就没有工作区，行数没给就没有 logits
    assert inference_bytes(**sizes, hidden_size=6, intermediate_size=8) == without
    assert inference_bytes(**sizes, hidden_size=6, step_tokens=9) == without + 2 * 9 * 12
    assert inference_bytes(**sizes, intermediate_size=8, step_tokens=9) == without + 2 * 9 * 24
    assert inference_bytes(**sizes, num_logits=4) == without
    assert inference_bytes(**sizes, weight_bytes=1) == without - 1001
    assert inference_bytes(**sizes, cache_element_bytes=1) == without - cache_bytes / 2
    assert inference_bytes(**{**sizes, "batch_size": 1}) == 2002 + cache_bytes / 2
    del sizes["batch_size"]
    assert inference_bytes(**sizes) == 2002 + cache_bytes / 2  # 默认一条


# 论文里的数


def test_paper_section_5():
    """GPT-3、MT-NLG 的 5as/h 是 80、64，选择性重算省 70%、65%。"""
    for name, scores, saved in (("175B", 80, 0.70), ("530B", 64, 0.65)):
        heads, width, *_ = PAPER[name]
        assert 5 * heads * 2048 / width == scores
        ratio = 1 - paper(name, tp_size=1, recompute="selective") / paper(name, tp_size=1)
        assert close(ratio, scores / (34 + scores)) and round(ratio, 2) == saved


def test_paper_section_6():
    """图 7 的文字：两个办法各自接近一半，合起来不到 20%，全量重算约 10%。"""
    want = {"22B": (67, 49, 16, 8), "175B": (62, 57, 18, 9), "530B": (58, 62, 20, 10), "1T": (58, 62, 20, 10)}
    for name, percents in want.items():
        base = paper(name)
        ratios = [
            paper(name, sequence_parallel=True) / base,
            paper(name, recompute="selective") / base,
            paper(name, sequence_parallel=True, recompute="selective") / base,
            paper(name, recompute="full") / base,
        ]
        assert tuple(round(100 * x) for x in ratios) == percents
    assert ratios[2] < 0.203  # 530B 与 1T 是 20.2%，论文写「不到 20%」
    assert close(paper("22B"), 48 * 4 * 2048 * 6144 * (10 + 3 + 40 / 3))


def test_paper_section_4_3_extra_terms_are_half_a_percent():
    """论文写 22B 的嵌入与输出层不到总激活的 0.01%；按它自己的式子是 0.57%。"""
    sizes = dict(batch_size=4, num_tokens=2048, hidden_size=6144)
    embedding = 4 * 2048 * 6144 / 8
    extra = embedding + output_bytes(**sizes, vocab_size=51200, tp_size=8)
    ratio = extra / paper("22B", sequence_parallel=True)
    assert close(ratio, (1 / 48 + 4 / 48 * (1 + 51200 / 6144)) / (34 + 320 / 3))
    assert 0.0056 < ratio < 0.0058


# 错误输入与错误写法


def test_unknown_recompute_is_rejected():
    with pytest.raises(ValueError, match=r"^recompute='flash'，没有这种重算；请用 none、selective、full。$"):
        formula(SHAPES[0], recompute="flash")


def test_shared_storage_and_parameters_are_counted_once():
    """同一个张量存两次只数一次；参数不数；别的输入要数。"""

    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(6))

        def forward(self, x):
            return (x * x + x * self.weight).sin()  # 存 x、weight 与 sin 的输入

    assert saved_bytes(Twice(), torch.ones(6, requires_grad=True)) == 2 * 24


@pytest.mark.rejects
def test_popular_wrong_counts_are_rejected():
    """每个错误写法与真的字节数差至少 5%。"""
    batch, length, width, heads = shape = SHAPES[0]
    sbh, as2b = batch * length * width, heads * length * length * batch
    full, fused = measured(shape), measured(shape, fused=True)
    float32 = measured(shape, dtype=torch.float32)
    wrong = {
        "漏了 dropout 的掩码": (32 * sbh + 4 * as2b, full),
        "softmax 只算一份 2 字节": (34 * sbh + 2 * as2b, full),
        "漏了两个 LayerNorm 的输入": (30 * sbh + 5 * as2b, full),
        "漏了 GELU 的输入": (26 * sbh + 5 * as2b, full),
        "当成元素个数再乘 2": (2 * (34 * sbh + 5 * as2b), full),
        "FlashAttention 仍有 5as": (34 * sbh + 5 * as2b, fused),
        "FlashAttention 连 34 也省": (2 * sbh, fused),
    }
    for name, (value, truth) in wrong.items():
        assert abs(value - truth) > 0.05 * truth, name
    assert float32 == 66 * sbh + 9 * as2b != 2 * full  # 掩码不翻倍
    numel, per_param = adamw_step(torch.bfloat16, master=True)
    for name, value in {"只算 12": 12, "漏主权重": 12, "漏梯度": 14, "只算权重与梯度": 4}.items():
        assert sum(per_param) != value, name
    assert sum(per_param) / 2 == 8  # 训练的状态是推理权重的 8 倍，不是 3–4 倍


def test_inference_ratio_has_no_constant():
    """总量与权重之比，从 1.02 到 5.3。"""

    def ratio(name, params, batch, length):
        c = DENSE_CONFIGS[name]
        sizes = dict(num_layers=c.num_layers, num_kv_heads=c.num_kv_heads, head_dim=c.head_dim)
        total = inference_bytes(num_params=params, num_tokens=length, batch_size=batch, **sizes)
        return total / (2 * params)

    assert round(ratio("Llama-3-8B", 8_030_261_248, 1, 2048), 2) == 1.02
    assert round(ratio("Llama-2-7B", 6_738_415_616, 1, 2048), 2) == 1.08
    assert round(ratio("Llama-2-7B", 6_738_415_616, 16, 4096), 2) == 3.55
    assert round(ratio("Llama-3-8B", 8_030_261_248, 64, 8192), 2) == 5.28
