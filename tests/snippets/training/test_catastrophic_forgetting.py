"""防遗忘零件的真值：手算的小数、二次损失的闭式解、对 Fisher 的逐样本逐标签枚举与 KL 的海森（自动求导），
transformers 5.23.0 真实的 Llama（扩展前后 logits 逐位相等）。错误写法定义在本文件里，断言它们被同一个真值拒绝。
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from snippets.training.catastrophic_forgetting import (
    PreNormBlock,
    diagonal_fisher,
    ewc_penalty,
    expand_block_identity,
    expand_blocks,
    interpolate_weights,
    l2_sp_penalty,
)

C, FF, V = 6, 10, 4


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def spd(n, seed):
    """随机的正定矩阵。"""
    a = torch.randn(n, n, generator=generator(seed), dtype=torch.float64)
    return a @ a.T + 0.1 * torch.eye(n, dtype=torch.float64)


def make_block(seed=0):
    torch.manual_seed(seed)
    block = PreNormBlock(C, FF)
    with torch.no_grad():
        for layer in (block.input_layernorm, block.post_attention_layernorm):
            layer.weight.uniform_(0.5, 1.5)
    return block


def nonzero_gradients(block, x, seed=3):
    """后面再接一个块，损失对新块各参数的梯度里哪些不全为零。"""
    block.zero_grad()
    make_block(seed)(block(x)).square().mean().backward()
    return {name.split(".")[0] for name, p in block.named_parameters() if p.grad.abs().max() > 0}


# ---- 手算 ----


def test_penalties_by_hand():
    """θ−θ0 = (1, −2) 与 (3)。L2-SP：4/2·(1+4+9)=28；EWC，F=(2, .5)、(1)：4/2·(2+2+9)=26。"""
    params = {"w": torch.tensor([2.0, 1.0]), "b": torch.tensor([3.0])}
    anchor = {"w": torch.tensor([1.0, 3.0]), "b": torch.tensor([0.0])}
    fisher = {"w": torch.tensor([2.0, 0.5]), "b": torch.tensor([1.0])}
    assert l2_sp_penalty(params, anchor, weight=4.0).item() == 28.0
    assert ewc_penalty(params, anchor, fisher, weight=4.0).item() == 26.0


def test_penalty_gradient_is_weighted_displacement():
    """梯度是 λ·F·(θ−θ0)：上例对 w 是 4·(2·1, .5·(−2)) = (8, −4)。"""
    w = torch.tensor([2.0, 1.0], requires_grad=True)
    anchor, fisher = {"w": torch.tensor([1.0, 3.0])}, {"w": torch.tensor([2.0, 0.5])}
    ewc_penalty({"w": w}, anchor, fisher, weight=4.0).backward()
    assert w.grad.tolist() == [8.0, -4.0]


@pytest.mark.rejects
def test_penalty_pulls_towards_the_anchor_not_towards_zero():
    params = {"w": torch.tensor([1.0, 2.0])}
    assert l2_sp_penalty(params, params, weight=7.0).item() == 0.0
    weight_decay = 7.0 / 2 * params["w"].square().sum()
    assert weight_decay.item() > 17  # 错误写法：拉向 0


def test_interpolation_endpoints_and_middle_by_hand():
    base, tuned = {"w": torch.tensor([1.0, -2.0])}, {"w": torch.tensor([5.0, 2.0])}
    assert torch.equal(interpolate_weights(base, tuned, alpha=0.0)["w"], base["w"])
    assert torch.equal(interpolate_weights(base, tuned, alpha=1.0)["w"], tuned["w"])
    assert interpolate_weights(base, tuned, alpha=0.25)["w"].tolist() == [2.0, -1.0]
    assert interpolate_weights(base, tuned, alpha=1.5)["w"].tolist() == [7.0, 4.0]


# ---- 二次损失的闭式解 ----


def minimise_quadratic(hessian_b, theta_b, penalty):
    """L_B 加惩罚是二次函数：从 0 点出发一步牛顿法就到极小点，海森与梯度都由自动求导给出。"""

    def objective(theta):
        delta = theta - theta_b
        return 0.5 * delta @ hessian_b @ delta + penalty({"w": theta})

    zero = torch.zeros_like(theta_b)
    hessian = torch.autograd.functional.hessian(objective, zero)
    (grad,) = torch.autograd.grad(objective(z := zero.clone().requires_grad_()), z)
    return -torch.linalg.solve(hessian, grad)


@pytest.mark.parametrize("weight", [0.3, 2.0])
def test_l2_sp_minimiser_shrinks_each_eigendirection(weight):
    """H_B 的特征方向上，解是插值，系数 h/(h+λ)。"""
    hessian = spd(5, 1)
    theta_a, theta_b = torch.randn(2, 5, generator=generator(2), dtype=torch.float64)
    solution = minimise_quadratic(hessian, theta_b, lambda p: l2_sp_penalty(p, {"w": theta_a}, weight=weight))
    h, q = torch.linalg.eigh(hessian)
    expected = theta_a + q @ (h / (h + weight) * (q.T @ (theta_b - theta_a)))
    torch.testing.assert_close(solution, expected)


def test_l2_sp_equals_weight_averaging_when_the_new_hessian_is_isotropic():
    """H_B = hI 时各方向系数相同，就是 α=h/(h+λ) 的权重平均；各向异性时不是任何 α 的平均。"""
    theta_a, theta_b = torch.randn(2, 5, generator=generator(2), dtype=torch.float64)
    identity = torch.eye(5, dtype=torch.float64)

    def penalty(p):
        return l2_sp_penalty(p, {"w": theta_a}, weight=1.0)

    solution = minimise_quadratic(3.0 * identity, theta_b, penalty)
    averaged = interpolate_weights({"w": theta_a}, {"w": theta_b}, alpha=0.75)["w"]
    torch.testing.assert_close(solution, averaged)
    direction = theta_b - theta_a
    moved = minimise_quadratic(spd(5, 1), theta_b, penalty) - theta_a
    off_line = moved - direction * (moved @ direction) / (direction @ direction)
    assert off_line.norm() > 0.1 * moved.norm()


def test_ewc_with_the_exact_diagonal_equals_replay():
    """H_A 是对角阵时，EWC 的解与回放 (1−p)L_B+pL_A 的解相同，λ=p/(1−p)。"""
    hessian_b = spd(5, 1)
    diagonal = torch.rand(5, generator=generator(3), dtype=torch.float64) + 0.1
    theta_a, theta_b = torch.randn(2, 5, generator=generator(2), dtype=torch.float64)
    p = 0.25
    anchor, fisher = {"w": theta_a}, {"w": diagonal}
    ewc = minimise_quadratic(hessian_b, theta_b, lambda q: ewc_penalty(q, anchor, fisher, weight=p / (1 - p)))
    replay = torch.linalg.solve(
        (1 - p) * hessian_b + p * diagonal.diag(), (1 - p) * hessian_b @ theta_b + p * diagonal * theta_a
    )
    torch.testing.assert_close(ewc, replay)


def test_interpolated_quadratic_losses_scale_with_alpha_squared():
    """从 θ_A 走到 θ_B 的 α 处：L_A = α²·L_A(θ_B)，L_B = (1−α)²·L_B(θ_A)。"""
    hessian_a, hessian_b = spd(5, 4), spd(5, 1)
    theta_a, theta_b = torch.randn(2, 5, generator=generator(2), dtype=torch.float64)
    merged = interpolate_weights({"w": theta_a}, {"w": theta_b}, alpha=0.3)["w"]
    delta = theta_b - theta_a
    torch.testing.assert_close(
        (merged - theta_a) @ hessian_a @ (merged - theta_a), 0.09 * delta @ hessian_a @ delta
    )
    torch.testing.assert_close(
        (merged - theta_b) @ hessian_b @ (merged - theta_b), 0.49 * delta @ hessian_b @ delta
    )


# ---- Fisher ----


def softmax_model():
    """一层 softmax：W (V, C)、b (V,)，输入 7 个。"""
    params = {
        "w": torch.randn(V, C, generator=generator(5), dtype=torch.float64),
        "b": torch.randn(V, generator=generator(6), dtype=torch.float64),
    }
    inputs = torch.randn(7, C, generator=generator(7), dtype=torch.float64)
    return params, inputs


def softmax_log_probs(params, x):
    return (params["w"] @ x + params["b"]).log_softmax(-1)


def enumerated(params, inputs, weights_of):
    """逐样本、逐标签调用自动求导：Σ 权重·(∂log p)²，除以样本数。"""
    total = {k: torch.zeros_like(p) for k, p in params.items()}
    for x in inputs:
        leaves = {k: p.clone().requires_grad_() for k, p in params.items()}
        log_probs = softmax_log_probs(leaves, x)
        for v, weight in enumerate(weights_of(log_probs.detach())):
            grads = torch.autograd.grad(log_probs[v], list(leaves.values()), retain_graph=True)
            for k, grad in zip(leaves, grads, strict=True):
                total[k] += weight * grad.square() / len(inputs)
    return total


def test_fisher_equals_enumeration():
    params, inputs = softmax_model()
    expected = enumerated(params, inputs, lambda lp: lp.exp())
    torch.testing.assert_close(diagonal_fisher(softmax_log_probs, params, inputs), expected)


def test_fisher_is_the_curvature_of_the_kl_on_the_inputs():
    """KL(π_0‖π_θ) 在 θ_0 处的海森对角就是 Fisher：二阶自动求导，与得分的平方无关。"""
    params, inputs = softmax_model()

    def mean_kl(b):
        before = (inputs @ params["w"].T + params["b"]).log_softmax(-1)
        after = (inputs @ params["w"].T + b).log_softmax(-1)
        return (before.exp() * (before - after)).sum(-1).mean()

    hessian = torch.autograd.functional.hessian(mean_kl, params["b"])
    fisher = diagonal_fisher(softmax_log_probs, params, inputs)
    torch.testing.assert_close(fisher["b"], hessian.diagonal())


def test_fisher_closed_form_of_the_bias():
    """softmax 的偏置：F_v = mean_b p_v(1−p_v)。"""
    params, inputs = softmax_model()
    probs = (inputs @ params["w"].T + params["b"]).softmax(-1)
    fisher = diagonal_fisher(softmax_log_probs, params, inputs)
    torch.testing.assert_close(fisher["b"], (probs * (1 - probs)).mean(0))


@pytest.mark.rejects
def test_wrong_fishers_are_rejected():
    """只取 argmax 的标签，或先平均再平方，都与枚举差 10% 以上。"""
    params, inputs = softmax_model()
    truth = enumerated(params, inputs, lambda lp: lp.exp())["b"]
    argmax = enumerated(params, inputs, lambda lp: F.one_hot(lp.argmax(), V).double())["b"]
    leaf = params["b"].clone().requires_grad_()
    labels = torch.arange(len(inputs)) % V
    loss = F.cross_entropy(inputs @ params["w"].T + leaf, labels)
    batch_squared = torch.autograd.grad(loss, leaf)[0].square()
    for wrong in (argmax, batch_squared):
        assert ((wrong - truth).abs() / truth).max() > 0.1


def test_fisher_carries_no_graph():
    params, inputs = softmax_model()
    params = {k: p.requires_grad_() for k, p in params.items()}
    fisher = diagonal_fisher(softmax_log_probs, params, inputs)
    assert not any(f.requires_grad for f in fisher.values())


# ---- 恒等块 ----


def test_zeroed_block_is_bitwise_identity_and_leaves_the_source_alone():
    block, x = make_block(), torch.randn(2, 5, C, generator=generator())
    before = block(x)
    new_block = expand_block_identity(block)
    assert torch.equal(new_block(x), x)
    assert torch.equal(block(x), before) and not torch.equal(before, x)
    torch.testing.assert_close(new_block.v_proj.weight, block.v_proj.weight)


def test_biases_of_the_output_projections_are_zeroed():
    block, x = make_block(), torch.randn(2, 5, C, generator=generator())
    block.o_proj, block.down_proj = nn.Linear(C, C), nn.Linear(FF, C)
    assert torch.equal(expand_block_identity(block)(x), x)


def test_only_output_projections_receive_gradient_at_first():
    x = torch.randn(2, 5, C, generator=generator())
    assert nonzero_gradients(expand_block_identity(make_block()), x) == {"o_proj", "down_proj"}


def test_output_projection_gradient_is_the_outer_product_of_branch_and_upstream():
    """∂L/∂W^down = Σ g·mᵀ：g 是损失对块输出的梯度，m 是门控前馈的中间激活。"""
    block, x = expand_block_identity(make_block()), torch.randn(2, 5, C, generator=generator())
    output = block(x)
    output.retain_grad()
    make_block(3)(output).square().mean().backward()
    z = block.post_attention_layernorm(x)
    m = F.silu(block.gate_proj(z)) * block.up_proj(z)
    expected = torch.einsum("btc,btf->cf", output.grad, m)
    torch.testing.assert_close(block.down_proj.weight.grad, expected)


def test_block_equals_an_explicit_loop_over_positions():
    """逐位置算：第 t 个位置只看 0..t，归一化除以均方根。"""
    block, x = make_block(), torch.randn(1, 4, C, generator=generator())

    def norm(v, layer):
        return v / (v.square().mean() + 1e-6).sqrt() * layer.weight

    rows = []
    for t in range(4):
        z = torch.stack([norm(x[0, s], block.input_layernorm) for s in range(t + 1)])
        scores = (z @ block.k_proj.weight.T) @ (block.q_proj.weight @ z[t]) / C**0.5
        h = x[0, t] + block.o_proj.weight @ (scores.softmax(0) @ (z @ block.v_proj.weight.T))
        n = norm(h, block.post_attention_layernorm)
        gate = block.gate_proj.weight @ n
        rows.append(h + block.down_proj.weight @ (gate * gate.sigmoid() * (block.up_proj.weight @ n)))
    torch.testing.assert_close(block(x)[0], torch.stack(rows))


@pytest.mark.rejects
@pytest.mark.parametrize("projection", ["o_proj", "down_proj"])
def test_zeroing_one_projection_is_not_identity(projection):
    x = torch.randn(2, 5, C, generator=generator())
    wrong = expand_block_identity(make_block(), output_projections=[projection])
    assert (wrong(x) - x).abs().max() > 0.01


@pytest.mark.rejects
def test_zeroing_the_norms_is_identity_but_kills_the_feed_forward():
    """错误写法：归一化增益清零。第一步只有注意力的增益有梯度；训练三步后前馈与它的增益仍一个也没有。"""
    x = torch.randn(2, 5, C, generator=generator())
    wrong = copy.deepcopy(make_block())
    for layer in (wrong.input_layernorm, wrong.post_attention_layernorm):
        nn.init.zeros_(layer.weight)
    assert torch.equal(wrong(x), x)
    assert nonzero_gradients(wrong, x) == {"input_layernorm"}
    optimizer = torch.optim.SGD(wrong.parameters(), lr=0.1)
    for _ in range(3):
        seen = nonzero_gradients(wrong, x)
        optimizer.step()
    assert not seen & {"gate_proj", "up_proj", "down_proj", "post_attention_layernorm"}
    assert seen == {"input_layernorm", "q_proj", "k_proj", "v_proj", "o_proj"}


def test_block_is_a_llama_layer_without_rotation():
    """同样的权重，一个头，cos=1、sin=0（不旋转），ε=1e-6。输入只有 1e-3，归一化里的 ε 才看得出来。"""
    block, x = make_block(), 1e-3 * torch.randn(2, 5, C, generator=generator())
    config = LlamaConfig(
        hidden_size=C, intermediate_size=FF, num_attention_heads=1, num_key_value_heads=1,
        rms_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    layer = LlamaDecoderLayer(config, layer_idx=0)
    parts = {"q": "self_attn.", "k": "self_attn.", "v": "self_attn.", "o": "self_attn."}
    parts |= {"gate": "mlp.", "up": "mlp.", "down": "mlp."}
    state = {parts.get(name.split("_")[0], "") + name: value for name, value in block.state_dict().items()}
    layer.load_state_dict(state)
    theirs = layer(x, position_embeddings=(torch.ones(1, 5, C), torch.zeros(1, 5, C)))
    torch.testing.assert_close(block(x), theirs)


def test_groups_of_one_double_every_block():
    blocks = [make_block(seed) for seed in range(3)]
    expanded = expand_blocks(blocks, group_size=1)
    assert len(expanded) == 6 and list(expanded[::2]) == blocks
    x = torch.randn(2, 5, C, generator=generator())
    assert all(torch.equal(new(x), x) for new in expanded[1::2])


def test_expanding_a_real_llama_keeps_the_logits_bit_for_bit():
    """四层的小 Llama 每两层加一块：六层，logits 逐位相等，只有新块可训练。"""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        num_attention_heads=4, num_key_value_heads=2, attn_implementation="eager",
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    input_ids = torch.randint(11, (2, 5), generator=generator())
    before = model(input_ids, use_cache=False).logits
    old = list(model.model.layers)
    model.model.layers = expand_blocks(model.model.layers, group_size=2)
    model.config.num_hidden_layers = 6  # 前向按这个数切片，不改就跑不到后面的块
    assert torch.equal(model(input_ids, use_cache=False).logits, before)
    layers = model.model.layers
    assert [layer in old for layer in layers] == [True, True, False, True, True, False]
    assert [all(p.requires_grad for p in layer.parameters()) for layer in layers] == [
        False, False, True, False, False, True,
    ]  # fmt: skip
    assert not any(p.requires_grad for layer in old for p in layer.parameters())
    torch.testing.assert_close(layers[2].mlp.gate_proj.weight, old[1].mlp.gate_proj.weight)
    model.model.layers = nn.ModuleList(
        [old[0], old[1], copy.deepcopy(old[1]), *old[2:], copy.deepcopy(old[3])]
    )
    assert (model(input_ids, use_cache=False).logits - before).abs().max() > 1e-3  # 原样复制不是恒等


# ---- 边界 ----


def test_integer_buffers_are_copied_or_refused():
    base = {"w": torch.zeros(2), "steps": torch.tensor(3)}
    merged = interpolate_weights(base, {"w": torch.ones(2), "steps": torch.tensor(3)}, alpha=0.5)
    assert merged["steps"].item() == 3 and merged["steps"].dtype == torch.int64
    with pytest.raises(ValueError, match="整数张量"):
        interpolate_weights(base, {"w": torch.ones(2), "steps": torch.tensor(8)}, alpha=0.5)


@pytest.mark.rejects
def test_averaging_batch_norm_buffers_is_not_the_statistics_of_the_average():
    """两个线性层的输出各有方差 1，权重平均后输出的方差是 .5：插值 running_var 仍给 1。"""
    x = torch.randn(4000, 2, generator=generator())
    base, tuned = {"w": torch.tensor([1.0, 0.0])}, {"w": torch.tensor([0.0, 1.0])}
    averaged_buffer = 0.5 * (x @ base["w"]).var() + 0.5 * (x @ tuned["w"]).var()
    truth = (x @ interpolate_weights(base, tuned, alpha=0.5)["w"]).var()
    assert averaged_buffer / truth > 1.8


def test_bad_arguments_are_refused():
    with pytest.raises(ValueError, match="c_proj"):
        expand_block_identity(make_block(), output_projections=["o_proj", "c_proj"])
    with pytest.raises(ValueError, match="名字不同"):
        interpolate_weights({"a": torch.zeros(1)}, {"b": torch.zeros(1)}, alpha=0.5)
    for group_size in (0, 2):
        with pytest.raises(ValueError, match="正因数"):
            expand_blocks([make_block() for _ in range(3)], group_size=group_size)
