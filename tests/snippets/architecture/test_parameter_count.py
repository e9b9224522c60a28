r"""参数量与计算量的测试。

真值有四个来源，都不经过被测代码：把每个权重的形状逐个列出来相乘；transformers 5.23.0 的模型在 meta 设备上
实例化后 `numel` 之和（结构参数手写自各模型发布的 config.json，差必须恰为 0）；`FlopCounterMode` 真的跑一遍前向
与反向数出的浮点运算数；SymPy 展开。末尾逐个拒绝流传的错误算法。
"""

from dataclasses import asdict, replace
from math import prod

import pytest
import sympy
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    DynamicCache,
    GPT2Config,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
)

from snippets.architecture.model_configs import DENSE_CONFIGS, DenseConfig
from snippets.architecture.parameter_count import (
    attention_crossover,
    decoder_params,
    forward_flops,
    gpt2_num_params,
    gqa_params,
    llama_matmul_params,
    llama_num_params,
    mla_params,
    moe_params,
    swiglu_params,
    training_flops,
)


def meta_model(config):
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def numel(module):
    """`parameters()` 对共享的权重只给一次。"""
    return sum(p.numel() for p in module.parameters())


def hf_config(c: DenseConfig):
    common = dict(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_layers,
        num_attention_heads=c.num_heads,
        num_key_value_heads=c.num_kv_heads,
        vocab_size=c.vocab_size,
        tie_word_embeddings=c.tie_embeddings,
    )
    return Qwen2Config(**common) if c.qkv_bias else LlamaConfig(**common, head_dim=c.head_dim)


# 手算：把形状列出来


def test_gpt2_by_listing_every_shape():
    C, L, V, P = 6, 3, 11, 7
    layer = [(C, 3 * C), (3 * C,), (C, C), (C,), (C, 4 * C), (4 * C,), (4 * C, C), (C,)] + [(C,)] * 4
    truth = L * sum(map(prod, layer)) + 2 * C + V * C + P * C
    assert gpt2_num_params(hidden_size=C, num_layers=L, vocab_size=V, max_positions=P) == truth


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_llama_by_listing_every_shape(bias, tied):
    C, F, L, H, K, d, V = 10, 13, 3, 6, 2, 5, 17
    layer = [(H * d, C), (K * d, C), (K * d, C), (C, H * d), (F, C), (F, C), (C, F), (C,), (C,)]
    layer += [(H * d,), (K * d,), (K * d,)] if bias else []
    truth = L * sum(map(prod, layer)) + C + V * C * (1 if tied else 2)
    got = llama_num_params(
        hidden_size=C,
        intermediate_size=F,
        num_layers=L,
        num_heads=H,
        num_kv_heads=K,
        head_dim=d,
        vocab_size=V,
        tie_embeddings=tied,
        qkv_bias=bias,
    )
    assert got == truth


def test_defaults_are_untied_and_without_bias():
    c = DenseConfig(10, 13, 3, 6, 2, 17, head_dim=5)
    fields = asdict(c)
    assert not fields.pop("tie_embeddings") and not fields.pop("qkv_bias")
    assert llama_num_params(**fields) == llama_num_params(**asdict(c))
    attention = dict(hidden_size=10, num_heads=6, num_kv_heads=2, head_dim=5)
    assert gqa_params(**attention) == 2 * 10 * 30 + 2 * 10 * 10
    model = dict(layers=100, num_layers=3, hidden_size=10, vocab_size=17)
    assert decoder_params(**model) == 100 + 7 * 10 + 2 * 170
    shape = dict(hidden_size=5, intermediate_size=3, num_experts=4, experts_per_token=2)
    assert moe_params(**shape) == (4 * 45 + 20, 2 * 45 + 20)
    gpt2 = dict(hidden_size=6, num_layers=1, vocab_size=11)
    assert gpt2_num_params(**gpt2) == gpt2_num_params(**gpt2, max_positions=1024)


# 与 transformers 的模型逐一相等


@pytest.mark.parametrize(
    ("hidden_size", "num_layers", "total"),
    [
        (768, 12, 124_439_808),
        (1024, 24, 354_823_168),
        (1280, 36, 774_030_080),
        (1600, 48, 1_557_611_200),
    ],
)
def test_gpt2_equals_the_meta_model(hidden_size, num_layers, total):
    config = GPT2Config(n_embd=hidden_size, n_layer=num_layers, n_head=hidden_size // 64)
    assert (config.vocab_size, config.n_positions) == (50257, 1024)
    assert numel(meta_model(config)) == total
    assert gpt2_num_params(hidden_size=hidden_size, num_layers=num_layers, vocab_size=50257) == total


PUBLISHED = {
    "Llama-2-7B": 6_738_415_616,
    "Llama-2-13B": 13_015_864_320,
    "Llama-2-70B": 68_976_648_192,
    "Llama-3-8B": 8_030_261_248,
    "Llama-3-70B": 70_553_706_496,
    "Llama-3.1-405B": 405_853_388_800,
    "Qwen2.5-0.5B": 494_032_768,
    "Qwen2.5-1.5B": 1_543_714_304,
    "Qwen2.5-3B": 3_085_938_688,
    "Qwen2.5-7B": 7_615_616_512,
    "Qwen2.5-14B": 14_770_033_664,
    "Qwen2.5-32B": 32_763_876_352,
    "Qwen2.5-72B": 72_706_203_648,
}


def test_every_dense_config_is_covered():
    assert set(PUBLISHED) == set(DENSE_CONFIGS)


@pytest.mark.parametrize("name", PUBLISHED)
def test_dense_model_equals_the_meta_model(name):
    config = DENSE_CONFIGS[name]
    assert numel(meta_model(hf_config(config))) == PUBLISHED[name]
    assert llama_num_params(**asdict(config)) == PUBLISHED[name]


def mixtral(experts_per_token=2, num_experts=8):
    attention = gqa_params(hidden_size=4096, num_heads=32, num_kv_heads=8, head_dim=128)
    ffns = moe_params(
        hidden_size=4096,
        intermediate_size=14336,
        num_experts=num_experts,
        experts_per_token=experts_per_token,
    )
    return tuple(
        decoder_params(layers=32 * (attention + ffn), num_layers=32, hidden_size=4096, vocab_size=32000)
        for ffn in ffns
    )


def mixtral_config(**kwargs):
    shape = dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32)
    return MixtralConfig(**shape | dict(num_key_value_heads=8, vocab_size=32000) | kwargs)


def test_mixtral_equals_the_meta_model():
    """激活参数的真值：同一模型只造 2 个专家，再补上路由器少掉的 6 列。"""
    total, active = mixtral()
    assert total == numel(meta_model(mixtral_config(num_local_experts=8))) == 46_702_792_704
    two = numel(meta_model(mixtral_config(num_local_experts=2)))
    assert active == two + 32 * 6 * 4096 == 12_879_925_248


V3_MLA = dict(
    hidden_size=7168,
    num_heads=128,
    q_lora_rank=1536,
    kv_lora_rank=512,
    qk_nope_head_dim=128,
    qk_rope_head_dim=64,
    v_head_dim=128,
)
V3_MOE = dict(
    hidden_size=7168, intermediate_size=2048, num_experts=256, experts_per_token=8, num_shared_experts=1
)


def deepseek_v3():
    dense = swiglu_params(hidden_size=7168, intermediate_size=18432)
    return tuple(
        decoder_params(
            layers=61 * mla_params(**V3_MLA) + 3 * dense + 58 * ffn,
            num_layers=61,
            hidden_size=7168,
            vocab_size=129280,
        )
        for ffn in moe_params(**V3_MOE)
    )


def v3_config(**kwargs):
    shape = dict(
        hidden_size=7168,
        intermediate_size=18432,
        moe_intermediate_size=2048,
        num_hidden_layers=61,
        num_attention_heads=128,
        num_key_value_heads=128,
        n_routed_experts=256,
        n_shared_experts=1,
        num_experts_per_tok=8,
        first_k_dense_replace=3,
        q_lora_rank=1536,
        kv_lora_rank=512,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
        vocab_size=129280,
    )
    return DeepseekV3Config(**shape | kwargs)


def test_deepseek_v3_equals_the_meta_model():
    """激活参数的真值：只造 8 个路由专家，再补上路由器少掉的 248 列。"""
    model = meta_model(v3_config())
    total, active = deepseek_v3()
    assert total == numel(model) == 671_026_404_352
    assert mla_params(**V3_MLA) == numel(model.model.layers[0].self_attn) == 187_107_328
    layer_ffn = moe_params(**V3_MOE)[0]
    assert layer_ffn == numel(model.model.layers[3].mlp)
    bias = sum(b.numel() for name, b in model.named_buffers() if "correction_bias" in name)
    assert bias == 58 * 256 == 14_848
    eight = numel(meta_model(v3_config(n_routed_experts=8, n_group=1, topk_group=1)))
    assert active == eight + 58 * 248 * 7168 == 37_552_282_624
    table = 129280 * 7168
    assert (active - table, active - 2 * table) == (36_625_603_584, 35_698_924_544)


def test_mtp_module_of_deepseek_v3():
    """一层 11.507B；加上 2C→C 的投影与三个 RMSNorm 是 11.610B；再加两张表的副本约 13.46B。"""
    layer = mla_params(**V3_MLA) + moe_params(**V3_MOE)[0] + 2 * 7168
    assert layer == numel(meta_model(v3_config(num_hidden_layers=4)).model.layers[3]) == 11_507_286_016
    module = layer + 2 * 7168**2 + 3 * 7168
    assert round(module / 1e9, 2) == 11.61
    assert round((module + 2 * 129280 * 7168) / 1e9, 2) == 13.46


# 浮点运算数：真的数


TINY = DenseConfig(
    hidden_size=64,
    intermediate_size=176,
    num_layers=2,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=97,
    head_dim=24,
)


def matmul_params(config):
    fields = asdict(config)
    del fields["tie_embeddings"], fields["qkv_bias"]
    return llama_matmul_params(**fields)


def tiny_model(config=TINY, attention="eager"):
    return AutoModelForCausalLM.from_config(hf_config(config), attn_implementation=attention)


def count(function):
    with FlopCounterMode(display=False) as counter:
        result = function()
    return counter.get_total_flops(), result


def predicted(*, num_tokens, visible_keys, config=TINY):
    return forward_flops(
        num_params=matmul_params(config),
        num_tokens=num_tokens,
        num_layers=config.num_layers,
        attention_width=config.num_heads * config.head_dim,
        visible_keys=visible_keys,
    )


def test_matmul_params_are_the_linear_layers():
    model = meta_model(hf_config(TINY))
    linear = [m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear)]
    assert matmul_params(TINY) == sum(linear)


@pytest.mark.parametrize("config", [TINY, replace(TINY, tie_embeddings=True)])
def test_forward_and_training_flops_equal_the_counter(config):
    """掩码不省运算：每个 token 的打分都算满 T 个键。反向恰是前向的两倍。"""
    B, T = 3, 5
    ids = torch.randint(config.vocab_size, (B, T))
    model = tiny_model(config)
    forward, out = count(lambda: model(ids, use_cache=False))
    backward, _ = count(lambda: out.logits.sum().backward())
    expected = predicted(num_tokens=B * T, visible_keys=T, config=config)
    assert forward == expected
    assert forward + backward == training_flops(forward=expected)


def test_decoding_one_token_costs_the_parameters_plus_the_context():
    model, S = tiny_model(), 9
    cache = DynamicCache(config=model.config)
    model(torch.randint(97, (1, S)), past_key_values=cache)
    flops, _ = count(lambda: model(torch.randint(97, (1, 1)), past_key_values=cache))
    assert flops == predicted(num_tokens=1, visible_keys=S + 1)


def test_fused_attention_on_the_cpu_is_counted_as_zero():
    """陷阱：CPU 的融合核不在 FlopCounterMode 的登记表里，注意力一项悄悄变成 0。"""
    ids = torch.randint(97, (3, 5))
    flops, _ = count(lambda: tiny_model(attention="sdpa")(ids, use_cache=False))
    assert flops == predicted(num_tokens=15, visible_keys=0) < predicted(num_tokens=15, visible_keys=5)


def test_moe_flops_use_the_active_parameters():
    """Mixtral 的小模型，一个 token：计数等于按激活参数（减去嵌入与归一化）算的前向。"""
    shape = dict(hidden_size=16, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4)
    shape |= dict(num_key_value_heads=2, vocab_size=29, num_local_experts=5, num_experts_per_tok=2)
    model = AutoModelForCausalLM.from_config(
        MixtralConfig(**shape), attn_implementation="eager", experts_implementation="eager"
    )
    flops, _ = count(lambda: model(torch.tensor([[3]]), use_cache=False))
    total, active = (
        2 * (gqa_params(hidden_size=16, num_heads=4, num_kv_heads=2, head_dim=4) + ffn) + 29 * 16
        for ffn in moe_params(hidden_size=16, intermediate_size=20, num_experts=5, experts_per_token=2)
    )
    cost = dict(num_tokens=1, num_layers=2, attention_width=16, visible_keys=1)
    assert flops == forward_flops(num_params=active, **cost) < forward_flops(num_params=total, **cost)


def test_mla_attention_width_is_the_mean_of_key_and_value():
    """DeepSeek-V3 的小模型，全用稠密前馈；键 6 + 2 维，值 5 维，宽度取 H(8 + 5)/2。"""
    shape = dict(hidden_size=12, num_heads=3, q_lora_rank=7, kv_lora_rank=4)
    shape |= dict(qk_nope_head_dim=6, qk_rope_head_dim=2, v_head_dim=5)
    config = v3_config(
        **{k: v for k, v in shape.items() if k != "num_heads"},
        num_attention_heads=3,
        num_key_value_heads=3,
        num_hidden_layers=2,
        first_k_dense_replace=2,
        intermediate_size=10,
        vocab_size=29,
    )
    T = 5
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    flops, _ = count(lambda: model(torch.randint(29, (1, T)), use_cache=False))
    layer = mla_params(**shape) - 7 - 4 + swiglu_params(hidden_size=12, intermediate_size=10)
    expected = forward_flops(
        num_params=2 * layer + 29 * 12,
        num_tokens=T,
        num_layers=2,
        attention_width=3 * (8 + 5) / 2,
        visible_keys=T,
    )
    assert flops == expected


def test_full_recompute_adds_one_forward():
    net = torch.nn.Sequential(torch.nn.Linear(5, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3))
    x = torch.randn(4, 5, requires_grad=True)
    forward, _ = count(lambda: net(x))
    plain, _ = count(lambda: net(x).sum().backward())
    recomputed, _ = count(lambda: checkpoint(net, x, use_reentrant=False).sum().backward())
    assert forward == 2 * 4 * (5 * 7 + 7 * 3)
    assert plain == training_flops(forward=forward) == 3 * forward
    assert recomputed >= training_flops(forward=forward, recompute=True) - 2 * 4 * 7 * 3
    full, _ = count(lambda: checkpoint(lambda y: net(y).tanh(), x, use_reentrant=False).sum().backward())
    assert full == training_flops(forward=forward, recompute=True) == 4 * forward


def test_attention_crossover():
    """交点上两项相等；N = 12LC² 时恰为 6C。"""
    L, C = 5, 64
    n = attention_crossover(num_params=12 * L * C**2, num_layers=L, attention_width=C)
    assert n == 6 * C
    cost = dict(num_params=12 * L * C**2, num_tokens=3, num_layers=L, attention_width=C)
    assert forward_flops(visible_keys=n, **cost) == 2 * forward_flops(visible_keys=0, **cost)


# 传符号得到公式


def test_symbols_give_the_formula():
    C, F, L, H, K, d, V, S, N, D = sympy.symbols("C F L H K d V S N D", positive=True)
    fields = dict(hidden_size=C, intermediate_size=F, num_layers=L, num_heads=H, num_kv_heads=K, head_dim=d)
    body = L * (2 * C * H * d + 2 * C * K * d + 3 * C * F)
    total = llama_num_params(**fields, vocab_size=V)
    assert sympy.expand(total - (body + 2 * L * C + C + 2 * V * C)) == 0
    assert sympy.expand(llama_matmul_params(**fields, vocab_size=V) - body - V * C) == 0
    gpt2 = gpt2_num_params(hidden_size=C, num_layers=L, vocab_size=V, max_positions=S)
    assert sympy.expand(gpt2 - (L * (12 * C**2 + 13 * C) + 2 * C + (V + S) * C)) == 0
    flops = forward_flops(num_params=N, num_tokens=D, num_layers=L, attention_width=H * d, visible_keys=0)
    assert training_flops(forward=flops) == 6 * N * D
    assert training_flops(forward=flops, recompute=True) == 8 * N * D


# 被拒绝的错误算法


LLAMA2_7B, LLAMA3_8B, QWEN_SMALL = (DENSE_CONFIGS[n] for n in ("Llama-2-7B", "Llama-3-8B", "Qwen2.5-0.5B"))

WRONG_COUNTS = {
    "共享的词嵌入数了两次": ("Qwen2.5-0.5B", replace(QWEN_SMALL, tie_embeddings=False)),
    "不共享的只数一次": ("Llama-3-8B", replace(LLAMA3_8B, tie_embeddings=True)),
    "当作 MHA": ("Llama-3-8B", replace(LLAMA3_8B, num_kv_heads=32)),
    "忘了 gate": ("Llama-2-7B", replace(LLAMA2_7B, intermediate_size=11008 * 2 // 3)),
    "内宽当作 4C": ("Llama-2-7B", replace(LLAMA2_7B, intermediate_size=4 * 4096)),
    "漏了 qkv 的偏置": ("Qwen2.5-7B", replace(DENSE_CONFIGS["Qwen2.5-7B"], qkv_bias=False)),
    "用分词器的词表": ("Qwen2.5-7B", replace(DENSE_CONFIGS["Qwen2.5-7B"], vocab_size=151_665)),
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_COUNTS)
def test_wrong_count_is_rejected(name):
    model, wrong = WRONG_COUNTS[name]
    truth = PUBLISHED[model]  # 上面已与 meta 设备上的模型逐一相等
    assert abs(llama_num_params(**asdict(wrong)) - truth) >= 28 * (28 + 2 * 4) * 128  # 最小的差是偏置


@pytest.mark.rejects
def test_twelve_l_h_squared_is_rejected():
    """GPT-2 的矩阵恰是 12LC²；Llama-2-7B 少 4.4%，不含两张表时少 0.52%；Llama-3-8B 少 20%。"""
    model = meta_model(GPT2Config())
    body = sum(p.numel() for p in model.transformer.h.parameters() if p.ndim == 2)
    assert body == 12 * 12 * 768**2
    for name, error in (("Llama-2-7B", 0.0439), ("Llama-3-8B", 0.1977)):
        c, truth = DENSE_CONFIGS[name], PUBLISHED[name]
        assert 1 - 12 * c.num_layers * c.hidden_size**2 / truth == pytest.approx(error, abs=5e-5)
    body = PUBLISHED["Llama-2-7B"] - 2 * 32000 * 4096
    assert 1 - 12 * 32 * 4096**2 / body == pytest.approx(0.0052, abs=5e-5)


@pytest.mark.rejects
def test_multiplying_the_name_of_a_moe_is_rejected():
    """8×7B 不是 56B，激活也不是 2×7B：注意力与词表只有一份。"""
    total, active = mixtral()
    assert 56e9 - total > 9e9 and 14e9 - active > 1e9
    seven = replace(DENSE_CONFIGS["Llama-3-8B"], vocab_size=32000)  # 一个专家的稠密模型就是 Mistral 7B
    assert llama_num_params(**asdict(seven)) == 7_241_732_096
    assert 8 * 7_241_732_096 - total == 7 * (7_241_732_096 - 32 * 3 * 4096 * 14336) - 32 * 8 * 4096


@pytest.mark.rejects
def test_backward_equal_to_forward_is_rejected():
    """4ND（反向与前向等价）：真的数一遍，反向是前向的 2 倍。"""
    model, ids = tiny_model(), torch.randint(97, (2, 3))
    forward, out = count(lambda: model(ids, use_cache=False))
    backward, _ = count(lambda: out.logits.sum().backward())
    assert backward == 2 * forward
    assert forward + backward == training_flops(forward=forward) != 2 * forward
