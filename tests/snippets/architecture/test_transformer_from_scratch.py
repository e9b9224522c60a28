r"""从零写的 LLaMA 结构小模型的测试。

真值都不经过被测代码：只用 math 写的逐元素循环；transformers 的 `NewGELUActivation`、`LlamaMLP`、
`LlamaRMSNorm`、`LlamaForCausalLM`（复制权重，比较 logits、损失与每个参数的梯度，以及贪心生成）；
已发布模型的内部宽度；以及不需要数值真值的性质：因果性、缓存前后相等、初始损失、参数个数。
transformers 的 RMSNorm 与 RoPE 固定用 float32，所以与它比较的容差是 float32 的量级。
文件末尾把写错的版本逐个列出，并断言同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.activations import NewGELUActivation
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm

from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.architecture.rope import rope_cos_sin, rope_inverse_frequencies
from snippets.architecture.transformer_from_scratch import (
    DecoderBlock,
    MiniLlama,
    RMSNorm,
    SwiGLU,
    gelu_tanh,
    generate_greedy,
    init_weights,
    swiglu,
    swiglu_width,
)

B, T, V, C, FF, L, H, K = 2, 7, 19, 16, 12, 3, 4, 2
FLOAT32 = {"rtol": 2e-5, "atol": 2e-6}


class ListCache:
    """最简单的缓存：把新的键值接在旧的后面。"""

    def __init__(self):
        self.k = self.v = None

    @property
    def length(self):
        return 0 if self.k is None else self.k.shape[2]

    def update(self, k, v):
        self.k = k if self.k is None else torch.cat((self.k, k), dim=2)
        self.v = v if self.v is None else torch.cat((self.v, v), dim=2)
        return self.k, self.v


def caches():
    return [ListCache() for _ in range(L)]


def token_ids(length=T, seed=0):
    return torch.randint(V, (B, length), generator=torch.Generator().manual_seed(seed))


def make_pair(*, num_kv_heads=K, rope_theta=10000.0, tie=False):
    """同一份权重的 transformers 模型与被测模型；权重大、增益不是 1，好让每一处都看得见。"""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=C,
        intermediate_size=FF,
        num_hidden_layers=L,
        num_attention_heads=H,
        num_key_value_heads=num_kv_heads,
        tie_word_embeddings=tie,
        rope_parameters={"rope_type": "default", "rope_theta": rope_theta},
        initializer_range=0.3,
    )
    reference = LlamaForCausalLM(config).double()
    with torch.no_grad():
        for name, weight in reference.named_parameters():
            if "norm" in name:
                weight.copy_(1 + 0.5 * torch.randn_like(weight))
    options = {} if num_kv_heads == H else {"num_kv_heads": num_kv_heads}
    options |= {} if rope_theta == 10000.0 else {"rope_theta": rope_theta}
    options |= {"tie_embeddings": True} if tie else {}
    model = MiniLlama(
        vocab_size=V, hidden_size=C, intermediate_size=FF, num_layers=L, num_heads=H, **options
    ).double()
    state = {name.removeprefix("model."): weight for name, weight in reference.state_dict().items()}
    model.load_state_dict(state, strict=True)
    return reference, model


def text_loss(logits, ids):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten())


# ---- 激活与前馈 ----


def test_gelu_tanh_by_hand_and_equals_the_activation_of_gpt2():
    x = torch.linspace(-6, 6, 241, dtype=torch.float64, requires_grad=True)
    by_hand = [
        0.5 * z * (1 + math.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z * z * z))) for z in x.tolist()
    ]
    torch.testing.assert_close(gelu_tanh(x), torch.tensor(by_hand, dtype=torch.float64))
    torch.testing.assert_close(gelu_tanh(x), NewGELUActivation()(x))
    torch.testing.assert_close(gelu_tanh(x), F.gelu(x, approximate="tanh"))
    ours, theirs = (torch.autograd.grad(f(x).sum(), x)[0] for f in (gelu_tanh, NewGELUActivation()))
    torch.testing.assert_close(ours, theirs)


def test_gelu_tanh_is_at_most_0_00048_away_from_the_exact_gelu():
    """精确值用 math.erf：x Φ(x) = x/2 (1 + erf(x/√2))。"""
    grid = [i / 1000 for i in range(-6000, 6001)]
    exact = torch.tensor([z / 2 * (1 + math.erf(z / math.sqrt(2))) for z in grid], dtype=torch.float64)
    difference = (gelu_tanh(torch.tensor(grid, dtype=torch.float64)) - exact).abs().max()
    assert 4.7e-4 < difference < 4.8e-4


def test_swiglu_by_hand():
    """一行输入，逐个单元：门过 z/(1+e^{-z})，乘升维的一支，再乘降维矩阵。"""
    generator = torch.Generator().manual_seed(1)
    x, gate, up, down = (
        torch.randn(shape, generator=generator, dtype=torch.float64)
        for shape in ((1, 3), (5, 3), (5, 3), (3, 5))
    )
    inner = []
    for f in range(5):
        g = sum(x[0, c].item() * gate[f, c].item() for c in range(3))
        u = sum(x[0, c].item() * up[f, c].item() for c in range(3))
        inner.append(g / (1 + math.exp(-g)) * u)
    expected = [[sum(inner[f] * down[c, f].item() for f in range(5)) for c in range(3)]]
    torch.testing.assert_close(swiglu(x, gate, up, down), torch.tensor(expected, dtype=torch.float64))


def test_swiglu_module_equals_llama_mlp_forward_and_gradients():
    torch.manual_seed(0)
    reference = LlamaMLP(LlamaConfig(hidden_size=C, intermediate_size=FF, num_attention_heads=H)).double()
    ours = SwiGLU(C, FF).double()
    ours.load_state_dict(reference.state_dict(), strict=True)
    inputs = [torch.randn(B, T, C, dtype=torch.float64).requires_grad_()]
    inputs.append(inputs[0].detach().clone().requires_grad_())
    for module, x in zip((ours, reference), inputs, strict=True):
        module(x).square().sum().backward()
    torch.testing.assert_close(ours(inputs[0]), reference(inputs[1]))
    torch.testing.assert_close(inputs[0].grad, inputs[1].grad)
    for a, b in zip(ours.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad)


def test_swiglu_width_reproduces_published_models():
    width = {name: config.intermediate_size for name, config in DENSE_CONFIGS.items()}
    assert swiglu_width(4096) == width["Llama-2-7B"] == 11008
    assert swiglu_width(5120) == width["Llama-2-13B"] == 13824
    assert swiglu_width(8192, multiplier=1.3, multiple_of=4096) == width["Llama-2-70B"] == 28672
    assert swiglu_width(4096, multiplier=1.3, multiple_of=1024) == width["Llama-3-8B"] == 14336


def test_swiglu_width_truncates_twice_and_rounds_up_last():
    """h = 7：56/3 = 18.67 截成 18；乘 1.3 得 23.4 截成 23（只截一次会得 24）；凑 10 的倍数得 30。"""
    assert swiglu_width(7, multiple_of=1) == 18
    assert swiglu_width(7, multiplier=1.3, multiple_of=1) == 23
    assert swiglu_width(7, multiplier=1.3, multiple_of=10) == 30
    assert swiglu_width(96) == 256  # 已经是 256 的倍数，不再加
    assert swiglu_width(97) == 512  # 258 向上凑


def test_rms_norm_module_equals_llama_rms_norm_where_eps_matters():
    x = 1e-3 * torch.randn(B, T, C, generator=torch.Generator().manual_seed(0))  # 均方约 1e-6，与 eps 相当
    ours, reference = RMSNorm(C), LlamaRMSNorm(C)
    assert ours.weight.eq(1).all()
    torch.testing.assert_close(ours(x), reference(x))
    gain = torch.linspace(0.5, 2, C)
    ours.weight.data, reference.weight.data = gain, gain
    torch.testing.assert_close(ours(x), reference(x))


# ---- 整个模型 ----


@pytest.mark.parametrize(
    "options",
    [{}, {"num_kv_heads": H}, {"rope_theta": 100.0}, {"tie": True}],
    ids=["gqa", "mha", "theta", "tied"],
)
def test_logits_loss_and_every_gradient_equal_llama(options):
    reference, model = make_pair(**options)
    ids = token_ids()
    expected = reference(input_ids=ids, labels=ids)
    logits = model(ids)
    assert expected.logits.std() > 0.5  # 不是退化的比较
    torch.testing.assert_close(logits, expected.logits, **FLOAT32)
    loss = text_loss(logits, ids)
    torch.testing.assert_close(loss, expected.loss, check_dtype=False, **FLOAT32)
    loss.backward()
    expected.loss.backward()
    ours = dict(model.named_parameters())
    theirs = {name.removeprefix("model."): p.grad for name, p in reference.named_parameters()}
    assert ours.keys() == theirs.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, theirs[name], **FLOAT32, msg=name)


def test_gradient_agrees_with_finite_differences():
    _, model = make_pair()
    ids = token_ids()
    text_loss(model(ids), ids).backward()
    for weight in (model.layers[0].mlp.gate_proj.weight, model.layers[1].input_layernorm.weight):
        flat, step, values = weight.data.view(-1), 1e-6, []
        for sign in (1, -1):
            flat[3] += sign * step
            values.append(text_loss(model(ids), ids).item())
            flat[3] -= sign * step
        numeric = (values[0] - values[1]) / (2 * step)
        assert abs(numeric - weight.grad.view(-1)[3].item()) < 1e-7


def test_given_positions_are_used():
    """RoPE 只看相对位置，整体平移不改变 logits；间隔拉大才会变，且要与 transformers 一致。"""
    reference, model = make_pair()
    ids = token_ids()
    positions = torch.arange(T).expand(B, T)
    torch.testing.assert_close(model(ids, position_ids=positions), model(ids))
    stretched = model(ids, position_ids=3 * positions)
    torch.testing.assert_close(stretched, reference(ids, position_ids=3 * positions).logits, **FLOAT32)
    assert (stretched - model(ids)).abs().max() > 0.1


def test_a_later_token_never_changes_an_earlier_logit():
    _, model = make_pair()
    ids, changed = token_ids(), token_ids()
    changed[:, 4] = (changed[:, 4] + 1) % V
    difference = (model(ids) - model(changed)).abs().amax(dim=(0, 2))
    assert difference[:4].eq(0).all() and (difference[4:] > 1e-3).all()


def parameter_formula(*, kv_heads, tied):
    """2VC（共享时 VC）+ L(2C² + 2C·C·K/H + 3CF + 2C) + C。"""
    block = 2 * C * C + 2 * C * C * kv_heads // H + 3 * C * FF + 2 * C
    return (V * C if tied else 2 * V * C) + L * block + C


def test_parameter_count_is_the_formula_and_tied_weights_count_once():
    for kv_heads in (H, K):
        for tied in (False, True):
            _, model = make_pair(num_kv_heads=kv_heads, tie=tied)
            count = sum(p.numel() for p in model.parameters())
            assert count == parameter_formula(kv_heads=kv_heads, tied=tied)
            assert (model.lm_head.weight is model.embed_tokens.weight) == tied


def test_bfloat16_model_keeps_exact_positions():
    """旋转角不存成缓冲区，转 bfloat16 不会动它：位置 1000 在 bfloat16 里要舍入到 4 的倍数，
    若角度也用 bfloat16，平移之后的 logits 就会大变。"""
    _, model = make_pair()
    model = model.to(torch.bfloat16)
    ids, positions = token_ids(), torch.arange(T).expand(B, T)
    exact = model.double()(ids)
    model = model.to(torch.bfloat16)
    for shift in (0, 1001):
        logits = model(ids, position_ids=positions + shift)
        assert logits.dtype == torch.bfloat16
        assert (logits.double() - exact).norm() < 0.03 * exact.norm()


def test_runs_on_the_device_of_the_input():
    model = MiniLlama(vocab_size=V, hidden_size=C, intermediate_size=FF, num_layers=1, num_heads=H).to("meta")
    logits = model(torch.zeros(B, T, dtype=torch.long, device="meta"))
    assert logits.shape == (B, T, V) and logits.device.type == "meta"


# ---- 缓存与生成 ----


@pytest.mark.parametrize(
    "splits", [[1] * T, [3, 1, 1, 1, 1], [2, 3, 2]], ids=["stepwise", "prefill", "chunks"]
)
def test_cached_logits_equal_the_full_forward(splits):
    reference, model = make_pair()
    ids, state = token_ids(), caches()
    pieces = [model(piece, kv_caches=state) for piece in ids.split(splits, dim=1)]
    assert [cache.length for cache in state] == [T] * L
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids))
    torch.testing.assert_close(torch.cat(pieces, dim=1), reference(ids).logits, **FLOAT32)


def test_positions_follow_the_cache_of_a_single_layer():
    model = MiniLlama(vocab_size=V, hidden_size=C, intermediate_size=FF, num_layers=1, num_heads=H)
    ids, state = token_ids(), [ListCache()]
    pieces = [model(piece, kv_caches=state) for piece in ids.split(3, dim=1)]
    torch.testing.assert_close(torch.cat(pieces, dim=1), model(ids))


def test_wrong_number_of_caches_is_rejected():
    _, model = make_pair()
    with pytest.raises(ValueError):
        model(token_ids(), kv_caches=caches()[:-1])


def test_greedy_generation_equals_transformers_with_and_without_cache():
    reference, model = make_pair()
    ids = token_ids(3)
    reference.generation_config.eos_token_id = None
    expected = reference.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False, pad_token_id=0
    )
    assert expected.shape == (B, 9)
    assert generate_greedy(model, ids, max_new_tokens=6).equal(expected)
    assert generate_greedy(model, ids, max_new_tokens=6, kv_caches=caches()).equal(expected)
    assert generate_greedy(model, ids, max_new_tokens=0).equal(ids)


def test_generation_sends_only_the_new_token_when_cached_and_builds_no_graph():
    _, model = make_pair()
    lengths, graphs = [], []

    def record(_, args, logits):
        lengths.append(args[0].shape[1])
        graphs.append(logits.requires_grad)

    model.register_forward_hook(record)
    generate_greedy(model, token_ids(3), max_new_tokens=4, kv_caches=caches())
    generate_greedy(model, token_ids(3), max_new_tokens=4)
    assert lengths == [3, 1, 1, 1, 3, 4, 5, 6]
    assert not any(graphs)


# ---- 初始化与训练 ----


def big_model(**options):
    torch.manual_seed(0)
    sizes = {"vocab_size": 200, "hidden_size": 128, "intermediate_size": 160, "num_layers": 2, "num_heads": 4}
    return MiniLlama(**sizes, **options)


def test_initial_standard_deviations():
    model = big_model()
    for scale, residual in ((None, 0.02), (0.5, 0.01)):
        if scale is not None:
            init_weights(model, residual_scale=scale)
        for name, weight in model.named_parameters():
            if weight.ndim == 1:
                assert weight.eq(1).all(), name
            else:
                is_residual = "o_proj" in name or "down_proj" in name
                assert abs(weight.std() / (residual if is_residual else 0.02) - 1) < 0.05, name
                assert abs(weight.mean()) < 1e-3, name
    init_weights(model, std=0.1)
    assert abs(model.layers[0].mlp.down_proj.weight.std() / 0.1 - 1) < 0.05
    assert abs(model.embed_tokens.weight.std() / 0.1 - 1) < 0.05


def test_init_leaves_biases_alone():
    linear = nn.Linear(5, 3)
    bias = linear.bias.detach().clone()
    init_weights(linear)
    assert linear.bias.equal(bias)


def test_initial_loss_is_close_to_log_of_the_vocabulary():
    for tie in (False, True):
        ids = torch.randint(200, (4, 32), generator=torch.Generator().manual_seed(0))
        assert abs(text_loss(big_model(tie_embeddings=tie)(ids), ids) - math.log(200)) < 0.1


def test_one_batch_can_be_overfitted():
    torch.manual_seed(0)
    model = MiniLlama(vocab_size=V, hidden_size=C, intermediate_size=40, num_layers=2, num_heads=2)
    ids = torch.stack([torch.randperm(V)[:10] for _ in range(2)])
    ids[:, 0] = torch.tensor([0, 1])  # 开头不同，续写才没有歧义
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-2)
    for _ in range(60):
        loss = text_loss(model(ids), ids)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05
    assert generate_greedy(model, ids[:, :1], max_new_tokens=9).equal(ids)


# ---- 写错的版本 ----


def swapped_swiglu(x, gate_weight, up_weight, down_weight):
    return F.linear(F.linear(x, gate_weight) * F.silu(F.linear(x, up_weight)), down_weight)


def glu(x, gate_weight, up_weight, down_weight):
    return F.linear(torch.sigmoid(F.linear(x, gate_weight)) * F.linear(x, up_weight), down_weight)


def wrong_logits(model, ids, wrong):
    """逐层照着前向走一遍，只在 `wrong` 指明的地方写错。"""
    positions = torch.arange(ids.shape[1]).expand_as(ids)
    cos_sin = rope_cos_sin(positions, rope_inverse_frequencies(C // H))
    x = model.embed_tokens(ids)
    for layer in model.layers:
        first, second = layer.input_layernorm, layer.post_attention_layernorm
        if wrong == "shared norm":
            second = first
        weights = [layer.mlp.gate_proj.weight, layer.mlp.up_proj.weight, layer.mlp.down_proj.weight]
        feed = {"silu on up": swapped_swiglu, "no silu": glu}.get(wrong, swiglu)
        if wrong == "post-norm":
            x = first(x + layer.self_attn(x, cos_sin=cos_sin))
            x = second(x + feed(x, *weights))
            continue
        h = first(x)
        attended = layer.self_attn(h, cos_sin=cos_sin, is_causal=wrong != "no mask")
        x = (h if wrong == "residual after norm" else x) + attended
        h = second(x)
        x = (h if wrong == "residual after norm" else x) + feed(h, *weights)
    return model.lm_head(x if wrong == "no final norm" else model.norm(x))


@pytest.mark.rejects
@pytest.mark.parametrize(
    "wrong",
    ["silu on up", "no silu", "shared norm", "post-norm", "no mask", "residual after norm", "no final norm"],
)
def test_wrong_forward_is_rejected(wrong):
    reference, model = make_pair()
    ids = token_ids()
    expected = reference(ids).logits
    torch.testing.assert_close(wrong_logits(model, ids, None), expected, **FLOAT32)
    bad = wrong_logits(model, ids, wrong)
    assert bad.shape == expected.shape
    assert (bad - expected).abs().max() > 0.1
    with pytest.raises(AssertionError):
        torch.testing.assert_close(bad, expected, **FLOAT32)


@pytest.mark.rejects
def test_positions_that_restart_at_zero_are_rejected():
    reference, model = make_pair()
    ids, state = token_ids(), caches()
    pieces = [
        model(piece, kv_caches=state, position_ids=torch.zeros(B, 1, dtype=torch.long))
        for piece in ids.split(1, dim=1)
    ]
    bad, expected = torch.cat(pieces, dim=1), reference(ids).logits
    torch.testing.assert_close(bad[:, 0], expected[:, 0], **FLOAT32)  # 第一个 token 看不出来
    assert (bad - expected)[:, 1:].abs().max() > 0.1


@pytest.mark.rejects
def test_swapping_gate_and_up_is_only_a_renaming_when_trained_from_scratch():
    """对调两支又对调权重，什么也没变：从头训练看不出这个错，装载别人的权重才看得出。"""
    _, model = make_pair()
    mlp, x = model.layers[0].mlp, torch.randn(B, T, C, dtype=torch.float64)
    gate, up, down = mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight
    torch.testing.assert_close(swapped_swiglu(x, up, gate, down), mlp(x))
    assert (swapped_swiglu(x, gate, up, down) - mlp(x)).abs().max() > 0.01


def test_block_default_is_multi_head():
    block = DecoderBlock(C, FF, num_heads=H)
    assert block.self_attn.k_proj.weight.shape == (C, C)
    assert DecoderBlock(C, FF, num_heads=H, num_kv_heads=1).self_attn.k_proj.weight.shape == (C // H, C)
