r"""snippets/training/lora.py 的测试。

真值有四个来源：(1) 手算的小矩阵与公开的参数个数；(2) peft 0.21.2 的 `Linear` 与 `get_peft_model`，
前向、梯度、合并、还原、dropout 逐元素对照；(3) 有限差分与手推的 $\partial A$、$\partial B$；
(4) 真的走一步 AdamW 之后逐个张量数字节。流传的错误写法在文件末尾定义，并被 peft 或枚举拒绝。
精确的比较用 float64；没有写明的容差都是 `torch.testing.assert_close` 的默认值。
"""

import copy
import math
import warnings

import pytest
import sympy
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.layer import Linear as PeftLinear
from tiny_models import tiny_gpt2, tiny_llama
from torch import nn
from transformers.pytorch_utils import Conv1D

from snippets.architecture.model_configs import DENSE_CONFIGS
from snippets.training.lora import (
    LoRALinear,
    llama_lora_num_params,
    lora_num_params,
    lora_scaling,
    lora_state_bytes,
)
from snippets.training.memory import saved_bytes

IN, OUT, R, ALPHA = 7, 5, 3, 4.5


def with_peft(model, **options):
    """get_peft_model；peft 0.21.2 读了 transformers 5.23 已弃用的属性，与被测的内容无关。"""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*is_gradient_checkpointing.*", category=FutureWarning)
        return get_peft_model(model, LoraConfig(**options))


def rand(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def base_linear(*, bias=True, dtype=torch.float64):
    layer = nn.Linear(IN, OUT, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        layer.weight.copy_(rand(OUT, IN, seed=1))
        if bias:
            layer.bias.copy_(rand(OUT, seed=2))
    return layer.to(dtype)


def ours_and_peft(*, dropout=0.0, rank_stabilized=False, bias=True):
    """同样的底座、同样的 A 与非零的 B。"""
    base = base_linear(bias=bias)
    options = {"r": R, "lora_alpha": ALPHA, "lora_dropout": dropout, "use_rslora": rank_stabilized}
    peft = PeftLinear(copy.deepcopy(base), "default", LoraConfig(**options), r=R, lora_alpha=ALPHA)
    ours = LoRALinear(base, r=R, alpha=ALPHA, dropout=dropout, rank_stabilized=rank_stabilized)
    a, b = rand(R, IN, seed=3), rand(OUT, R, seed=4)
    with torch.no_grad():
        for target, value in [
            (ours.lora_A, a),
            (ours.lora_B, b),
            (peft.lora_A["default"].weight, a),
            (peft.lora_B["default"].weight, b),
        ]:
            target.copy_(value)
    return ours, peft


# ---- 手算 ----


def test_forward_by_hand():
    """W=[[1,0],[0,1]]，b=[1,1]，A=[1,2]，B=[3,-1]ᵀ，r=1，α=2，x=[1,1]。

    Ax=3，BAx=[9,-3]，乘 2 得 [18,-6]；底座给 [2,2]；合起来 [20,-4]。ΔW=2·[[3,6],[-1,-2]]。
    """
    base = nn.Linear(2, 2)
    base.load_state_dict({"weight": torch.eye(2), "bias": torch.ones(2)})
    layer = LoRALinear(base, r=1, alpha=2)
    layer.load_state_dict(
        {**layer.state_dict(), "lora_A": torch.tensor([[1.0, 2.0]]), "lora_B": torch.tensor([[3.0], [-1.0]])}
    )
    torch.testing.assert_close(layer(torch.ones(2)), torch.tensor([20.0, -4.0]))
    torch.testing.assert_close(layer.delta_weight(), torch.tensor([[6.0, 12.0], [-2.0, -4.0]]))


def test_scaling_by_hand():
    assert lora_scaling(r=16, alpha=8) == 0.5
    assert lora_scaling(r=16, alpha=8, rank_stabilized=True) == 2.0


@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_scaling_and_delta_weight_equal_peft(rank_stabilized):
    ours, peft = ours_and_peft(rank_stabilized=rank_stabilized)
    assert ours.scaling == pytest.approx(peft.scaling["default"], rel=1e-15)
    torch.testing.assert_close(ours.delta_weight(), peft.get_delta_weight("default"))


def test_the_defaults_are_those_of_peft():
    """r、alpha、dropout、缩放的默认值取自 LoraConfig，不写在测试里。"""
    config = LoraConfig()
    layer = LoRALinear(base_linear())
    assert layer.lora_A.shape == (config.r, IN) and layer.lora_B.shape == (OUT, config.r)
    assert layer.scaling == config.lora_alpha / config.r == 1.0 and not config.use_rslora
    assert layer.dropout.p == config.lora_dropout == 0.0
    assert LoRALinear(base_linear(), r=4).scaling == config.lora_alpha / 4


# ---- 与 peft 一致 ----


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dropout", [0.0, 0.4])
@pytest.mark.parametrize("rank_stabilized", [False, True])
def test_forward_and_gradients_equal_peft(bias, dropout, rank_stabilized):
    """训练模式，同一个种子：dropout 的掩码也相同。"""
    ours, peft = ours_and_peft(bias=bias, dropout=dropout, rank_stabilized=rank_stabilized)
    x, upstream = rand(2, 6, IN, seed=5), rand(2, 6, OUT, seed=6)
    results = []
    for layer in (ours, peft):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(7)
        out = layer(leaf)
        out.backward(upstream)
        results.append((out, leaf.grad))
    torch.testing.assert_close(results[0], results[1])
    torch.testing.assert_close(ours.lora_A.grad, peft.lora_A["default"].weight.grad)
    torch.testing.assert_close(ours.lora_B.grad, peft.lora_B["default"].weight.grad)
    assert ours.base.weight.grad is None and (ours.base.bias is None or ours.base.bias.grad is None)


def test_gradients_equal_the_formula_and_finite_differences():
    r"""$\partial B=\gamma G(Ax)^\top$，$\partial A=\gamma B^\top Gx^\top$，逐 token 相加；另用中心差分核对。"""
    layer, _ = ours_and_peft()
    x, upstream = rand(6, IN, seed=5), rand(6, OUT, seed=6)
    (layer(x) * upstream).sum().backward()
    gamma = ALPHA / R
    expected_b = gamma * sum(torch.outer(g, layer.lora_A @ v) for g, v in zip(upstream, x, strict=True))
    expected_a = gamma * sum(torch.outer(layer.lora_B.T @ g, v) for g, v in zip(upstream, x, strict=True))
    torch.testing.assert_close(layer.lora_B.grad, expected_b)
    torch.testing.assert_close(layer.lora_A.grad, expected_a)
    for parameter in (layer.lora_A, layer.lora_B):
        for i in range(parameter.shape[0]):
            for j in range(parameter.shape[1]):
                ends = []
                for step in (1e-4, -1e-4):
                    with torch.no_grad():
                        parameter[i, j] += step
                        ends.append((layer(x) * upstream).sum())
                        parameter[i, j] -= step
                # 对单个元素是线性的，差分只剩舍入误差
                torch.testing.assert_close(
                    (ends[0] - ends[1]) / 2e-4, parameter.grad[i, j], rtol=1e-8, atol=1e-8
                )


def test_merge_and_unmerge_equal_peft():
    ours, peft = ours_and_peft()
    x, before = rand(4, IN, seed=5), ours.base.weight.clone()
    out = ours(x)
    ours.merge()
    peft.merge()
    assert ours.merged
    torch.testing.assert_close(ours.base.weight, peft.base_layer.weight)
    torch.testing.assert_close(ours(x), out)
    ours.unmerge()
    peft.unmerge()
    assert not ours.merged
    assert ours.base.weight.is_leaf and not ours.base.weight.requires_grad  # 加减都不进计算图
    torch.testing.assert_close(ours.base.weight, before)
    torch.testing.assert_close(ours.base.weight, peft.base_layer.weight)
    torch.testing.assert_close(ours(x), out)


def test_initial_weights_equal_those_of_peft():
    """同一个种子下与 peft 的 kaiming_uniform_(a=√5) 逐元素相同，B 全零。"""
    ours, peft = ours_and_peft()
    torch.manual_seed(8)
    ours.reset_parameters()
    torch.manual_seed(8)
    peft.reset_lora_parameters("default", True)
    torch.testing.assert_close(ours.lora_A.detach(), peft.lora_A["default"].weight.detach())
    assert torch.equal(ours.lora_B, torch.zeros(OUT, R, dtype=torch.float64))
    assert ours.lora_A.abs().max() <= 1 / math.sqrt(IN)


def test_the_constructor_initialises():
    """不靠调用者：A 立刻有值且落在界内，B 是零，输出与底座逐位相等。"""
    base = base_linear()
    torch.manual_seed(9)
    layer = LoRALinear(base, r=R)
    assert layer.lora_A.abs().min() > 0 and layer.lora_A.abs().max() <= 1 / math.sqrt(IN)
    assert not layer.lora_B.any() and not layer.merged
    x = rand(4, IN, seed=5)
    assert torch.equal(layer(x), base(x))


# ---- 性质 ----


def test_only_the_adapter_is_trainable():
    layer = LoRALinear(base_linear(), r=R)
    assert [n for n, p in layer.named_parameters() if p.requires_grad] == ["lora_A", "lora_B"]
    assert not layer.base.weight.requires_grad and not layer.base.bias.requires_grad


def test_at_the_start_only_b_has_a_gradient():
    layer = LoRALinear(base_linear(), r=R)
    layer(rand(4, IN, seed=5)).square().sum().backward()
    assert torch.equal(layer.lora_A.grad, torch.zeros(R, IN, dtype=torch.float64))
    assert layer.lora_B.grad.abs().min() > 0


def test_the_update_has_rank_r_and_merged_adapters_add_up():
    """一个适配器的 ΔW 秩是 r；两个独立的适配器先后合并，改动的秩是两者之和。"""
    base = nn.Linear(12, 10, bias=False, dtype=torch.float64)
    before = base.weight.clone()
    for seed, rank in enumerate((2, 3)):
        layer = LoRALinear(base, r=rank)
        with torch.no_grad():
            layer.lora_B.copy_(rand(10, rank, seed=20 + seed))
        assert torch.linalg.matrix_rank(layer.delta_weight()) == rank
        layer.merge()
    assert torch.linalg.matrix_rank(base.weight - before) == 5


def test_dropout_is_off_in_eval_and_after_merging():
    ours, _ = ours_and_peft(dropout=0.4)
    x = rand(4, IN, seed=5)
    exact = x @ (ours.base.weight + ours.delta_weight()).T + ours.base.bias
    assert not torch.allclose(ours(x), exact)
    ours.eval()
    torch.testing.assert_close(ours(x), exact)
    ours.train()
    ours.merge()
    torch.testing.assert_close(ours(x), exact)


def test_a_merged_layer_gives_the_adapter_no_gradient():
    ours, _ = ours_and_peft()
    ours.merge()
    assert not ours(rand(4, IN, seed=5)).requires_grad


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_adapter_follows_the_dtype_of_the_base(dtype):
    layer = LoRALinear(base_linear(dtype=dtype), r=R)
    assert layer.lora_A.dtype == layer.lora_B.dtype == dtype
    assert layer(torch.ones(2, IN, dtype=dtype)).dtype == dtype


def test_bf16_unmerge_does_not_restore_every_weight():
    """相对改动约 0.1 时，相减之后仍有权重与原来不同；float64 下逐元素在容差内。"""
    layer = LoRALinear(nn.Linear(64, 64, dtype=torch.bfloat16), r=4)
    with torch.no_grad():
        layer.lora_B.copy_(rand(64, 4, seed=4) * 0.05)
    before = layer.base.weight.clone()
    layer.merge()
    layer.unmerge()
    assert (layer.base.weight != before).float().mean() > 0.1


# ---- 参数个数与字节 ----


def test_num_params_of_one_matrix_are_those_of_the_tensors():
    layer = LoRALinear(base_linear(), r=R)
    trainable = sum(p.numel() for p in layer.parameters() if p.requires_grad)
    assert trainable == lora_num_params(r=R, in_features=IN, out_features=OUT) == 36


@pytest.mark.parametrize(("targets", "modules"), [("all-linear", "all-linear"), ("qv", ["q_proj", "v_proj"])])
def test_llama_num_params_equal_peft(targets, modules):
    model = tiny_llama(11, num_hidden_layers=3)
    config = model.config
    peft = with_peft(model, r=2, target_modules=modules)
    got = llama_lora_num_params(
        r=2,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_hidden_layers,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=config.head_dim,
        targets=targets,
    )
    assert got == sum(p.numel() for p in peft.parameters() if p.requires_grad)


def llama_2_7b(**options):
    c = DENSE_CONFIGS["Llama-2-7B"]
    return llama_lora_num_params(
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_layers=c.num_layers,
        num_heads=c.num_heads,
        num_kv_heads=c.num_kv_heads,
        head_dim=c.head_dim,
        **options,
    )


def test_llama_7b_and_gpt3_by_hand():
    """7B、r=8：q、v 各 8·(4096+4096)，32 层；七个线性层（默认）再加 k、o 与三个 8·(4096+11008)。

    GPT-3：96 层，宽 12288，q、v；r=1 是论文的 4.7M，r=8 是 37.7M。
    """
    assert llama_2_7b(r=8, targets="qv") == 32 * 2 * 8 * 8192 == 4194304
    assert llama_2_7b(r=8) == 32 * (4 * 8 * 8192 + 3 * 8 * 15104) == 19988480
    gpt3 = [96 * 2 * lora_num_params(r=r, in_features=12288, out_features=12288) for r in (1, 8)]
    assert gpt3 == [4718592, 37748736]


def test_grouped_query_heads_and_odd_head_dims_count():
    """GQA 且 Hd≠C，每层手算：C=6、F=10、H=4、K=2、d=3，r=1。

    q 是 6→12，共 18；k、v 是 6→6，各 12；o 是 12→6，共 18；前馈三个 6↔10，各 16。合计 108；qv 是 30。
    """
    shape = {"hidden_size": 6, "intermediate_size": 10, "num_heads": 4, "num_kv_heads": 2, "head_dim": 3}
    assert llama_lora_num_params(r=1, num_layers=2, **shape) == 216
    assert llama_lora_num_params(r=1, num_layers=2, targets="qv", **shape) == 60


@pytest.mark.parametrize("base_dtype", [torch.bfloat16, torch.float32])
def test_state_bytes_are_those_after_one_real_adamw_step(base_dtype):
    """peft 的小 Llama：底座 bf16（适配器由 peft 存成 float32）或 float32，走一步后数权重、梯度、两个矩。"""
    model = with_peft(tiny_llama(11, num_hidden_layers=2).to(base_dtype), r=2, target_modules="all-linear")
    trainable = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trainable)
    ids = torch.arange(8).reshape(2, 4)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
    moments = [s[k] for s in optimizer.state.values() for k in ("exp_avg", "exp_avg_sq")]
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    counted = sum(x.nbytes for x in [*model.parameters(), *grads, *moments])
    frozen = sum(p.numel() for p in model.parameters() if not p.requires_grad)
    adapter = sum(p.numel() for p in trainable)
    options = {} if base_dtype == torch.bfloat16 else {"base_bytes": 4}
    assert counted == lora_state_bytes(frozen, adapter, **options)


def test_formulas_are_transparent_to_sympy():
    base, adapter, c, r = sympy.symbols("base adapter c r", positive=True)
    assert sympy.expand(lora_state_bytes(base, adapter, base_bytes=c) - (c * base + 16 * adapter)) == 0
    assert sympy.expand(lora_num_params(r=r, in_features=c, out_features=2 * c) - 3 * r * c) == 0


@pytest.mark.parametrize(("adapter_dtype", "factor"), [(torch.bfloat16, 1), (torch.float32, 2)])
def test_peft_saves_the_input_once_more_in_the_dtype_of_the_adapter(adapter_dtype, factor):
    """bf16 的底座：冻结的那条路不存输入；支路存输入与 r 维的中间量，float32 的适配器存的字节是 bf16 的两倍。"""
    peft = PeftLinear(base_linear(dtype=torch.bfloat16), "default", LoraConfig(r=R), r=R)
    peft.base_layer.requires_grad_(False)
    for adapter in (peft.lora_A, peft.lora_B):
        adapter.to(adapter_dtype)
    assert saved_bytes(
        peft, torch.ones(6, IN, dtype=torch.bfloat16, requires_grad=True)
    ) == factor * 2 * 6 * (IN + R)


# ---- 边界 ----


@pytest.mark.parametrize("r", [0, -1])
def test_a_rank_below_one_is_refused(r):
    with pytest.raises(ValueError, match=f"^r={r}：秩至少是 1。$"):
        LoRALinear(base_linear(), r=r)


def test_rank_one_is_allowed():
    assert LoRALinear(base_linear(), r=1).lora_A.shape == (1, IN)


def test_merging_twice_or_unmerging_first_is_refused():
    ours, _ = ours_and_peft()
    with pytest.raises(RuntimeError, match=r"^适配器没有合并，不能还原；请先 merge\(\)。$"):
        ours.unmerge()
    ours.merge()
    weight = ours.base.weight.clone()
    with pytest.raises(RuntimeError, match=r"^适配器已经合并，再合并会加两遍；请先 unmerge\(\)。$"):
        ours.merge()
    assert torch.equal(ours.base.weight, weight)


def test_an_unknown_choice_of_targets_is_refused():
    with pytest.raises(ValueError, match=r"^targets='qkv'，没有这种选法；请用 all-linear、qv。$"):
        llama_2_7b(r=8, targets="qkv")


# ---- 流传的错误写法 ----


@pytest.mark.rejects
def test_rejects_scaling_by_r_over_alpha():
    _, peft = ours_and_peft()
    assert abs(R / ALPHA - peft.scaling["default"]) > 0.5
    assert lora_scaling(r=R, alpha=ALPHA) == peft.scaling["default"]


@pytest.mark.rejects
def test_rejects_both_zero_and_both_random():
    """两者都零：两个梯度都恰好是 0，永远不动；两者都随机：起点的输出已经变了。"""
    x = rand(4, IN, seed=5)
    zeros = LoRALinear(base_linear(), r=R)
    nn.init.zeros_(zeros.lora_A)
    zeros(x).square().sum().backward()
    assert not zeros.lora_A.grad.any() and not zeros.lora_B.grad.any()
    both, _ = ours_and_peft()
    assert (both(x) - both.base(x)).abs().max() > 1


@pytest.mark.rejects
@pytest.mark.parametrize("r", [1, 4])
def test_rejects_merging_a_times_b(r):
    """方阵且 r=d，或 r=1 被广播时，A@B 也能相加，但不是同一个矩阵。"""
    layer = LoRALinear(nn.Linear(4, 4, dtype=torch.float64), r=r)
    with torch.no_grad():
        layer.lora_A.copy_(rand(r, 4, seed=3))
        layer.lora_B.copy_(rand(4, r, seed=4))
    x = rand(3, 4, seed=5)
    out, wrong = layer(x), x @ (layer.base.weight + layer.lora_A @ layer.lora_B * layer.scaling).T
    layer.merge()
    torch.testing.assert_close(layer(x), out)
    assert (wrong + layer.base.bias - out).abs().max() > 0.1


@pytest.mark.rejects
def test_rejects_unmerging_without_the_scaling():
    ours, _ = ours_and_peft()
    before = ours.base.weight.clone()
    ours.merge()
    wrong = ours.base.weight - ours.lora_B @ ours.lora_A
    assert (wrong - before).abs().max() > 0.1
    ours.unmerge()
    torch.testing.assert_close(ours.base.weight, before)


@pytest.mark.rejects
def test_rejects_dropout_on_the_output():
    """dropout 放在支路输出：同一个种子下与 peft 不同；期望相同，但被丢的是输出的分量。"""
    ours, peft = ours_and_peft(dropout=0.4)
    x = rand(4, IN, seed=5)
    torch.manual_seed(7)
    expected = peft(x)
    torch.manual_seed(7)
    wrong = ours.base(x) + ours.dropout(x @ ours.lora_A.T @ ours.lora_B.T) * ours.scaling
    assert (wrong - expected).abs().max() > 0.5
    torch.manual_seed(7)
    torch.testing.assert_close(ours(x), expected)


@pytest.mark.rejects
def test_rejects_the_untransposed_delta_on_conv1d():
    """GPT-2 的 Conv1D 把权重存成 (in, out)：方阵时不转置也能相加，结果却不对；peft 加的是 ΔW 的转置。"""
    model = tiny_gpt2(11)
    block = model.transformer.h[0].attn
    assert isinstance(block.c_proj, Conv1D) and block.c_proj.weight.shape == (8, 8)
    with_peft(model, r=2, target_modules=["attn.c_proj"], fan_in_fan_out=True)
    peft = block.c_proj
    ours = LoRALinear(nn.Linear(8, 8), r=2)
    with torch.no_grad():
        ours.base.weight.copy_(peft.base_layer.weight.T)
        ours.base.bias.copy_(peft.base_layer.bias)
        for mine, theirs in [(ours.lora_A, peft.lora_A), (ours.lora_B, peft.lora_B)]:
            mine.copy_(rand(*mine.shape, seed=mine.numel()).float())
            theirs["default"].weight.copy_(mine)
    ours.scaling = peft.scaling["default"]
    x = rand(3, 8, seed=5).float()
    out = peft(x)
    torch.testing.assert_close(ours(x), out)
    torch.testing.assert_close(peft.get_delta_weight("default"), ours.delta_weight().T)
    wrong = x @ (peft.base_layer.weight + ours.delta_weight()) + peft.base_layer.bias
    assert (wrong - out).abs().max() > 0.5
