r"""混合专家的测试。

真值有四个来源，都不经过被测代码：手算的分数；逐 token 的 Python 循环；transformers 5.23.0 的
Mixtral、Qwen3-MoE、DeepSeek-V3、Switch 模块（小配置、真的运行，前向与梯度）；以及精确的性质
（k = E 时等于稠密混合、负载均匀时损失为 1 且梯度为 0）。文件末尾逐个拒绝流传的错误写法。
"""

import math

import pytest
import torch
from transformers import DeepseekV3Config, MixtralConfig, Qwen3MoeConfig, SwitchTransformersConfig
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3MoE, DeepseekV3TopkRouter
from transformers.models.mixtral.modeling_mixtral import (
    MixtralSparseMoeBlock,
    MixtralTopKRouter,
    load_balancing_loss_func,
)
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter
from transformers.models.switch_transformers.modeling_switch_transformers import SwitchTransformersTop1Router
from transformers.models.switch_transformers.modeling_switch_transformers import (
    load_balancing_loss_func as switch_load_balancing_loss_func,
)

from snippets.architecture.moe import (
    combine_experts,
    expert_capacity,
    expert_counts,
    load_balancing_loss,
    sigmoid_top_k_routing,
    softmax_top_k_routing,
    updated_expert_bias,
    within_capacity,
)

N, E, K, C, F = 7, 5, 2, 4, 6


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def dense(weights, selected, num_experts=E):
    """(N, A) 的权重摊到 (N, E)，与次序无关。"""
    return torch.zeros(len(weights), num_experts, dtype=weights.dtype).scatter(1, selected, weights)


def loop_balance(probs, selected):
    """逐个计数的循环：E Σ f_i P_i，f_i 除以 N·k。"""
    num_tokens, num_experts = probs.shape
    total = 0.0
    for i in range(num_experts):
        count = sum(row.count(i) for row in selected.tolist())
        mean_prob = math.fsum(probs[t, i].item() for t in range(num_tokens)) / num_tokens
        total += count / (num_tokens * selected.shape[1]) * mean_prob
    return num_experts * total


def swiglu_experts(block):
    """把 transformers 打包的权重拆成一个个函数。"""

    def expert(i):
        def forward(x):
            gate, up = (x @ block.gate_up_proj[i].T).chunk(2, dim=-1)
            return (torch.nn.functional.silu(gate) * up) @ block.down_proj[i].T

        return forward

    return [expert(i) for i in range(block.num_experts)]


# 手算


def test_softmax_routing_by_hand():
    """p = (1, 4, 2, 3)/10：前两名是 1 号与 3 号，归一化 4/7、3/7，不归一化 0.4、0.3。"""
    logits = torch.tensor([[1.0, 4.0, 2.0, 3.0]], dtype=torch.float64).log()
    weights, selected = softmax_top_k_routing(logits, top_k=2)
    assert selected.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[4 / 7, 3 / 7]], dtype=torch.float64))
    weights, selected = softmax_top_k_routing(logits, top_k=2, renormalize=False)
    assert selected.tolist() == [[1, 3]]
    torch.testing.assert_close(weights, torch.tensor([[0.4, 0.3]], dtype=torch.float64))


def test_sigmoid_routing_by_hand():
    """s = (3/4, 1/2, 1/4)，b = (-0.6, 0, 0.3)：s + b = (0.15, 0.5, 0.55)，选 2、1，权重 1/3、2/3。"""
    logits = torch.tensor([[math.log(3), 0.0, -math.log(3)]], dtype=torch.float64)
    bias = torch.tensor([-0.6, 0.0, 0.3], dtype=torch.float64)
    weights, selected = sigmoid_top_k_routing(logits, bias, top_k=2)
    assert selected.tolist() == [[2, 1]]
    torch.testing.assert_close(weights, torch.tensor([[1 / 3, 2 / 3]], dtype=torch.float64))
    weights, _ = sigmoid_top_k_routing(logits, bias, top_k=2, scaling=2.5)
    torch.testing.assert_close(weights, torch.tensor([[2.5 / 3, 5 / 3]], dtype=torch.float64))


def test_combine_by_hand():
    """专家 i 把输入乘 10^i；token 0 用 0.25·E_2 + 0.75·E_0，token 1 用 0.5·E_1 + 0.5·E_2。"""
    hidden = torch.tensor([[4.0, 8.0], [2.0, 0.0]])
    experts = [lambda x, i=i: 10.0**i * x for i in range(3)]
    out = combine_experts(
        hidden, torch.tensor([[0.25, 0.75], [0.5, 0.5]]), torch.tensor([[2, 0], [1, 2]]), experts
    )
    torch.testing.assert_close(out, torch.tensor([[103.0, 206.0], [110.0, 0.0]]))


def test_counts_and_balance_by_hand():
    """2 个 token、3 个专家、k = 2：计数 (2, 1, 1)，f = (1/2, 1/4, 1/4)，P = (0.4, 0.35, 0.25)。

    E Σ f P = 3 (0.2 + 0.0875 + 0.0625) = 1.05。
    """
    selected = torch.tensor([[0, 1], [2, 0]])
    assert expert_counts(selected, num_experts=4).tolist() == [2, 1, 1, 0]
    probs = torch.tensor([[0.5, 0.3, 0.2], [0.3, 0.4, 0.3]], dtype=torch.float64)
    assert load_balancing_loss(probs, selected).item() == pytest.approx(1.05, rel=1e-12)


def test_bias_update_by_hand():
    """计数 (4, 1, 1, 2)，平均 2：过载的减一步，欠载的加一步，恰好平均的不动；默认步长 0.001。"""
    bias = torch.tensor([0.5, 0.0, -0.5, 0.25], dtype=torch.float64)
    counts = torch.tensor([4, 1, 1, 2])
    expected = bias + torch.tensor([-1.0, 1.0, 1.0, 0.0], dtype=torch.float64) * 1e-3
    assert torch.equal(updated_expert_bias(bias, counts), expected)
    moved = updated_expert_bias(bias, counts, update_rate=0.1)
    torch.testing.assert_close(moved, torch.tensor([0.4, 0.1, -0.4, 0.25], dtype=torch.float64))
    assert updated_expert_bias(bias.float(), counts).dtype == torch.float32


def test_capacity_by_hand():
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.0) == 5
    assert expert_capacity(num_tokens=10, num_experts=4, top_k=2, capacity_factor=1.25) == 7  # ⌈6.25⌉
    assert expert_capacity(num_tokens=8, num_experts=4, top_k=1, capacity_factor=1.0) == 2


def test_first_choices_queue_before_second_choices():
    """容量 2。0 号的队：第一选择是 token 0、2，第二选择是 token 1（被丢）；1 号的队只有 1、0、2。"""
    selected = torch.tensor([[0, 1], [1, 0], [0, 1]])
    kept = within_capacity(selected, num_experts=2, capacity=2)
    assert kept.tolist() == [[True, True], [True, False], [True, False]]
    assert within_capacity(selected, num_experts=2, capacity=3).all()
    assert not within_capacity(selected, num_experts=2, capacity=0).any()
    assert within_capacity(selected, num_experts=2, capacity=1).tolist() == [
        [True, False],
        [True, False],
        [False, False],
    ]


def test_capacity_matches_a_queue_written_as_a_loop():
    _, selected = softmax_top_k_routing(normal(N, E, seed=8), top_k=3)
    waiting, expected = [0] * E, [[False] * 3 for _ in range(N)]
    for slot in range(3):
        for token in range(N):
            expert = selected[token, slot].item()
            waiting[expert] += 1
            expected[token][slot] = waiting[expert] <= 3
    assert within_capacity(selected, num_experts=E, capacity=3).tolist() == expected


def test_each_expert_sees_only_its_tokens():
    seen = {}

    def expert(i):
        return lambda x: seen.setdefault(i, x)

    hidden = normal(N, C)
    selected = torch.tensor([[t % 3] for t in range(N)])
    combine_experts(hidden, torch.ones(N, 1).double(), selected, [expert(i) for i in range(3)])
    for i in range(3):
        assert torch.equal(seen[i], hidden[i::3])


# 与独立实现一致


def test_softmax_routing_matches_mixtral_and_qwen3():
    torch.manual_seed(1)
    hidden = torch.randn(N, C)
    config = MixtralConfig(hidden_size=C, num_local_experts=E, num_experts_per_tok=3, intermediate_size=F)
    router = MixtralTopKRouter(config)
    torch.nn.init.normal_(router.weight)
    logits, weights, selected = router(hidden)
    mine, index = softmax_top_k_routing(logits, top_k=3)
    torch.testing.assert_close(mine, weights)
    assert torch.equal(index, selected)
    for renormalize in (True, False):
        config = Qwen3MoeConfig(
            hidden_size=C, num_experts=E, num_experts_per_tok=3, norm_topk_prob=renormalize
        )
        router = Qwen3MoeTopKRouter(config)
        torch.nn.init.normal_(router.weight)
        logits, weights, selected = router(hidden)
        mine, index = softmax_top_k_routing(logits, top_k=3, renormalize=renormalize)
        torch.testing.assert_close(mine, weights)
        assert torch.equal(index, selected)
    assert Qwen3MoeConfig().norm_topk_prob is False and Qwen3MoeConfig().num_experts_per_tok == 8


def test_moe_layer_matches_mixtral_block_forward_and_gradient():
    torch.manual_seed(2)
    config = MixtralConfig(hidden_size=C, num_local_experts=E, num_experts_per_tok=K, intermediate_size=F)
    block = MixtralSparseMoeBlock(config).eval()
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    hidden = torch.randn(1, N, C, requires_grad=True)
    expected = block(hidden.clone())
    direction = torch.linspace(-1, 1, N * C).view(1, N, C)
    inputs = (hidden, block.gate.weight, block.experts.gate_up_proj, block.experts.down_proj)
    expected_grads = torch.autograd.grad((expected * direction).sum(), inputs)
    weights, selected = softmax_top_k_routing(hidden[0] @ block.gate.weight.T, top_k=K)
    out = combine_experts(hidden[0], weights, selected, swiglu_experts(block.experts))
    torch.testing.assert_close(out, expected[0])
    grads = torch.autograd.grad((out * direction[0]).sum(), inputs)
    for mine, theirs in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)  # float32，求和次序不同


def deepseek_config(**kwargs):
    return DeepseekV3Config(
        hidden_size=C,
        n_routed_experts=E,
        num_experts_per_tok=K,
        moe_intermediate_size=F,
        n_group=1,
        topk_group=1,
        **kwargs,
    )


def test_sigmoid_routing_matches_deepseek_v3():
    torch.manual_seed(3)
    router = DeepseekV3TopkRouter(deepseek_config())
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.randn(E))
    logits, weights, selected = router(torch.randn(N, C))
    mine, index = sigmoid_top_k_routing(logits, router.e_score_correction_bias, top_k=K, scaling=2.5)
    torch.testing.assert_close(dense(mine, index), dense(weights, selected))
    without_bias = sigmoid_top_k_routing(logits, torch.zeros(E), top_k=K)[1]
    assert not torch.equal(index.sort(-1).values, without_bias.sort(-1).values)  # 偏置真的改变了选择
    assert DeepseekV3Config().routed_scaling_factor == 2.5 and DeepseekV3Config().n_shared_experts == 1
    assert (DeepseekV3Config().n_routed_experts, DeepseekV3Config().num_experts_per_tok) == (256, 8)


def test_moe_layer_matches_deepseek_v3_block_with_a_shared_expert():
    torch.manual_seed(4)
    block = DeepseekV3MoE(deepseek_config(routed_scaling_factor=1.0))
    for parameter in block.parameters():
        torch.nn.init.normal_(parameter)
    block.gate.e_score_correction_bias.copy_(torch.randn(E))
    hidden = torch.randn(1, N, C)
    logits = hidden[0] @ block.gate.weight.T
    weights, selected = sigmoid_top_k_routing(logits, block.gate.e_score_correction_bias, top_k=K)
    routed = combine_experts(hidden[0], weights, selected, swiglu_experts(block.experts))
    torch.testing.assert_close(routed + block.shared_experts(hidden[0]), block(hidden)[0])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_balance_loss_is_transformers_divided_by_k(top_k):
    logits = normal(N, E, dtype=torch.float32).requires_grad_()
    _, selected = softmax_top_k_routing(logits, top_k=top_k)
    mine = load_balancing_loss(torch.softmax(logits, dim=-1), selected)
    theirs = load_balancing_loss_func((logits,), E, top_k)
    torch.testing.assert_close(mine * top_k, theirs)
    grad, expected = (torch.autograd.grad(x, logits)[0] for x in (mine * top_k, theirs))
    torch.testing.assert_close(grad, expected)
    truth = loop_balance(torch.softmax(logits.detach().double(), dim=-1), selected)
    assert mine.item() == pytest.approx(truth, rel=1e-5)
    if top_k == 1:  # Switch 的函数逐条序列平均；一条序列时相同
        switch = switch_load_balancing_loss_func(torch.softmax(logits, -1)[None], selected[None, :, 0])
        torch.testing.assert_close(mine, switch)


def test_transformers_pools_the_layers_before_the_product():
    """两层各塌缩到不同编号的专家：逐层的值都是 E/k = 2，合起来算却是均衡值 1。"""
    first = torch.tensor([[40.0, 0.0]] * N)
    layers = (first, first.flip(-1))
    for logits in layers:
        _, selected = softmax_top_k_routing(logits, top_k=1)
        assert load_balancing_loss(torch.softmax(logits, -1), selected).item() == pytest.approx(2.0)
        assert load_balancing_loss_func((logits,), 2, 1).item() == pytest.approx(2.0)
    assert load_balancing_loss_func(layers, 2, 1).item() == pytest.approx(1.0)


def test_transformers_adds_no_balance_loss_by_default():
    for config in (MixtralConfig(), Qwen3MoeConfig()):
        assert config.output_router_logits is False and config.router_aux_loss_coef == 0.001
    assert Qwen3MoeConfig().num_experts == 128


def test_balance_loss_keeps_float64():
    logits = normal(N, 3)
    _, selected = softmax_top_k_routing(logits, top_k=2)
    probs = torch.softmax(logits, dim=-1)
    assert load_balancing_loss(probs, selected).item() == pytest.approx(
        loop_balance(probs, selected), rel=1e-14
    )


def test_capacity_matches_switch_router():
    torch.manual_seed(5)
    config = SwitchTransformersConfig(d_model=C, num_experts=3, expert_capacity=2)
    router = SwitchTransformersTop1Router(config).eval()
    hidden = torch.randn(2, N, C)
    kept_one_hot, _, logits = router(hidden)
    for b in range(2):
        selected = logits[b].argmax(dim=-1, keepdim=True)
        kept = within_capacity(selected, num_experts=3, capacity=2)
        assert torch.equal(kept[:, 0], kept_one_hot[b].sum(-1).bool())
        assert not kept.all()


# 性质


@pytest.mark.parametrize("top_k", [1, 2, E])
def test_renormalized_softmax_equals_softmax_over_the_top_logits(top_k):
    """Mixtral 论文写的是先取前 k 个 logits 再 softmax；两种次序恒等。"""
    logits = normal(N, E)
    top, index = logits.topk(top_k, dim=-1)
    weights, selected = softmax_top_k_routing(logits, top_k=top_k)
    assert torch.equal(selected, index)
    torch.testing.assert_close(weights, torch.softmax(top, dim=-1))


def test_all_experts_selected_equals_the_dense_mixture():
    hidden, matrices = normal(N, C), normal(E, C, C, seed=1)
    logits = normal(N, E, seed=2)
    weights, selected = softmax_top_k_routing(logits, top_k=E)
    out = combine_experts(hidden, weights, selected, [lambda x, m=m: x @ m for m in matrices])
    expected = torch.einsum("ne,nc,ecd->nd", torch.softmax(logits, -1), hidden, matrices)
    torch.testing.assert_close(out, expected)


def test_renormalizing_a_single_expert_starves_the_router():
    """k = 1 时归一化的权重恒为 1，路由器的梯度为 0；Switch 用 p 本身，梯度不为 0。"""
    logits = normal(N, E).requires_grad_()
    weights, _ = softmax_top_k_routing(logits, top_k=1)
    assert torch.equal(weights, torch.ones(N, 1, dtype=torch.float64))
    assert torch.autograd.grad(weights.sum(), logits)[0].abs().max() < 1e-15
    weights, _ = softmax_top_k_routing(logits, top_k=1, renormalize=False)
    assert torch.autograd.grad(weights.sum(), logits)[0].abs().max() > 0.05


def test_main_loss_reaches_unselected_logits_only_without_renormalization():
    """归一化后分母约掉：p_i / Σ_T p_j 只含选中的 logits。不归一化时 ∂p_i/∂z_j = -p_i p_j，不为 0。"""
    logits, direction = normal(N, E).requires_grad_(), normal(N, K, seed=3)
    for renormalize in (True, False):
        weights, selected = softmax_top_k_routing(logits, top_k=K, renormalize=renormalize)
        (grad,) = torch.autograd.grad((weights * direction).sum(), logits)
        rest = grad[~torch.zeros(N, E).scatter(1, selected, 1.0).bool()]
        assert rest.abs().max() < 1e-15 if renormalize else rest.abs().min() > 1e-4
    affinity, selected = sigmoid_top_k_routing(logits, torch.zeros(E).double(), top_k=K)
    (grad,) = torch.autograd.grad((affinity * direction).sum(), logits)
    assert (grad[~torch.zeros(N, E).scatter(1, selected, 1.0).bool()] == 0).all()


def test_an_idle_expert_gets_no_gradient():
    hidden = normal(N, C)
    matrices = normal(3, C, C, seed=1).requires_grad_()
    selected = torch.tensor([[0, 2]] * N)  # 1 号没有 token
    out = combine_experts(
        hidden, torch.full((N, 2), 0.5).double(), selected, [lambda x, m=m: x @ m for m in matrices]
    )
    (grad,) = torch.autograd.grad(out.sum(), matrices)
    assert grad[1].abs().max() == 0 and grad[0].abs().max() > 0.1 and grad[2].abs().max() > 0.1


def test_balance_gradient_by_formula_autograd_and_finite_differences():
    r"""∂L/∂z_{ti} = (E/N) p_{ti} (f_i - Σ_j f_j p_{tj})：f 高于这个 token 加权平均的专家被压低。"""
    logits = normal(N, E).requires_grad_()
    _, selected = softmax_top_k_routing(logits, top_k=K)
    probs = torch.softmax(logits, dim=-1)
    (grad,) = torch.autograd.grad(load_balancing_loss(probs, selected), logits)
    load = torch.tensor([(selected == i).sum().item() / (N * K) for i in range(E)], dtype=torch.float64)
    p = probs.detach()
    torch.testing.assert_close(grad, E / N * p * (load - (p * load).sum(-1, keepdim=True)))
    for t in range(N):  # 有限差分：选择不变，只有 P 在动
        for i in range(E):
            up, down = logits.detach().clone(), logits.detach().clone()
            up[t, i] += 1e-6
            down[t, i] -= 1e-6
            slope = (
                loop_balance(torch.softmax(up, -1), selected)
                - loop_balance(torch.softmax(down, -1), selected)
            ) / 2e-6
            assert slope == pytest.approx(grad[t, i].item(), abs=1e-8)


def test_even_load_gives_one_and_no_gradient_for_any_probabilities():
    """f_i = 1/E 时 E Σ f P = Σ P = 1，与 P 无关，梯度为 0。"""
    logits = normal(6, 3).requires_grad_()
    selected = torch.tensor([[0, 1], [1, 2], [2, 0]] * 2)
    loss = load_balancing_loss(torch.softmax(logits, dim=-1), selected)
    assert loss.item() == pytest.approx(1.0, rel=1e-14)
    assert torch.autograd.grad(loss, logits)[0].abs().max() < 1e-16


@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_collapse_costs_experts_over_k(top_k):
    """所有 token 都选同样的 k 个、概率也全在它们身上：E · k · (1/k)(1/k) = E/k。"""
    probs = torch.zeros(N, 8, dtype=torch.float64)
    probs[:, :top_k] = 1 / top_k
    selected = torch.arange(top_k).expand(N, top_k)
    assert load_balancing_loss(probs, selected).item() == pytest.approx(8 / top_k)


def test_the_loss_can_be_below_one_without_balance():
    """E = 2、k = 1：3/4 的 token 以 1/2 选 0 号，1/4 的以 1 选 1 号：2(3/4·3/8 + 1/4·5/8) = 7/8。"""
    eps = 1e-9
    probs = torch.tensor([[0.5 + eps, 0.5 - eps]] * 3 + [[0.0, 1.0]], dtype=torch.float64)
    selected = probs.argmax(dim=-1, keepdim=True)
    assert expert_counts(selected, num_experts=2).tolist() == [3, 1]
    assert load_balancing_loss(probs, selected).item() == pytest.approx(7 / 8, abs=1e-8)


def test_bias_has_no_gradient_and_no_place_in_the_weights():
    logits, bias = normal(N, E).requires_grad_(), (0.1 * normal(E, seed=1)).requires_grad_()
    weights, selected = sigmoid_top_k_routing(logits, bias, top_k=K)
    assert torch.autograd.grad(weights[0, 0], bias, allow_unused=True, retain_graph=True)[0] is None
    affinity = torch.sigmoid(logits).gather(1, selected)
    torch.testing.assert_close(weights, affinity / affinity.sum(-1, keepdim=True))
    # 给全部专家加同一个数，什么也不变
    shifted, same = sigmoid_top_k_routing(logits, bias + 3.0, top_k=K)
    assert torch.equal(same, selected) and torch.equal(shifted, weights)


def test_bias_updates_balance_a_skewed_router():
    generator = torch.Generator().manual_seed(6)
    skew, bias = torch.linspace(1.0, -1.0, 8), torch.zeros(8)
    history = []
    for _ in range(80):
        logits = torch.randn(512, 8, generator=generator) + skew
        _, selected = sigmoid_top_k_routing(logits, bias, top_k=2)
        counts = expert_counts(selected, num_experts=8)
        history.append(counts.max().item() / 128 - 1)
        bias = updated_expert_bias(bias, counts, update_rate=0.01)
    assert history[0] > 1.0 and max(history[-10:]) < 0.4
    assert bias[0] < -0.1 and bias[-1] > 0.1  # 热门的被压低，冷门的被抬高


def test_dropped_tokens_output_zero():
    hidden = normal(N, C)
    weights, selected = torch.ones(N, 1).double(), torch.zeros(N, 1, dtype=torch.long)
    kept = within_capacity(selected, num_experts=2, capacity=3)
    out = combine_experts(hidden, weights * kept, selected, [lambda x: x, lambda x: x])
    torch.testing.assert_close(out[:3], hidden[:3])
    assert out[3:].abs().max() == 0


# 边界


def test_low_precision_routing_is_float32_and_the_output_keeps_its_dtype():
    logits = normal(N, E, dtype=torch.bfloat16)
    weights, selected = softmax_top_k_routing(logits, top_k=K)
    torch.testing.assert_close(weights, softmax_top_k_routing(logits.float(), top_k=K)[0])
    assert weights.dtype == torch.float32
    affinity, _ = sigmoid_top_k_routing(logits, torch.zeros(E), top_k=K)
    torch.testing.assert_close(affinity, sigmoid_top_k_routing(logits.float(), torch.zeros(E), top_k=K)[0])
    assert affinity.dtype == torch.float32
    hidden = normal(N, C, seed=1, dtype=torch.bfloat16)
    out = combine_experts(hidden, weights, selected, [lambda x: x] * E)  # 权重之和为 1：输出就是输入
    assert out.dtype == torch.bfloat16
    torch.testing.assert_close(out, hidden)


def test_float64_stays_float64():
    logits = normal(N, E)
    assert softmax_top_k_routing(logits, top_k=K)[0].dtype == torch.float64
    assert sigmoid_top_k_routing(logits, normal(E), top_k=K)[0].dtype == torch.float64


def test_huge_logits_stay_finite():
    assert softmax_top_k_routing(1e6 * normal(N, E), top_k=K)[0].isfinite().all()


# 被拒绝的错误写法


@pytest.mark.rejects
def test_count_only_balance_loss_is_rejected():
    """只用计数写 E Σ f_i²：平衡时也是 1，塌缩时也是 E，却没有梯度，训练里什么也不做。"""
    logits = normal(N, E).requires_grad_()
    _, selected = softmax_top_k_routing(logits, top_k=K)
    load = expert_counts(selected, num_experts=E).double() / selected.numel()
    assert not (E * load.square().sum()).requires_grad
    ours = load_balancing_loss(torch.softmax(logits, dim=-1), selected)
    assert torch.autograd.grad(ours, logits)[0].abs().max() > 1e-3


@pytest.mark.rejects
def test_balance_loss_not_divided_by_k_is_rejected():
    selected = torch.tensor([[0, 1], [1, 2], [2, 0]])
    probs = torch.full((3, 3), 1 / 3, dtype=torch.float64)
    counts = torch.tensor([2.0, 2.0, 2.0]).double()
    assert (3 * (counts / 3 * probs.mean(0)).sum()).item() == pytest.approx(2.0)  # 平衡值成了 k
    assert load_balancing_loss(probs, selected).item() == pytest.approx(1.0)


@pytest.mark.rejects
def test_bias_inside_the_weights_is_rejected():
    """真值是 DeepSeek-V3 的路由器：权重不含偏置。"""
    torch.manual_seed(7)
    router = DeepseekV3TopkRouter(deepseek_config(routed_scaling_factor=1.0))
    torch.nn.init.normal_(router.weight)
    router.e_score_correction_bias.copy_(torch.linspace(-0.3, 0.3, E))
    logits, weights, selected = router(torch.randn(N, C))
    truth = dense(weights, selected)
    biased = (torch.sigmoid(logits) + router.e_score_correction_bias).gather(1, selected)
    assert (dense(biased / biased.sum(-1, keepdim=True), selected) - truth).abs().max() > 0.05
    mine = dense(*sigmoid_top_k_routing(logits, router.e_score_correction_bias, top_k=K))
    torch.testing.assert_close(mine, truth)


@pytest.mark.rejects
def test_second_softmax_over_probabilities_is_rejected():
    """对选中的概率再做一次 softmax（而不是除以它们的和）：权重被抹平。"""
    logits = 3 * normal(N, E)
    truth = torch.softmax(logits.topk(K, dim=-1).values, dim=-1)
    twice = torch.softmax(torch.softmax(logits, -1).topk(K, dim=-1).values, dim=-1)
    assert (twice - truth).abs().max() > 0.1
    torch.testing.assert_close(softmax_top_k_routing(logits, top_k=K)[0], truth)


@pytest.mark.rejects
def test_reversed_bias_update_is_rejected():
    """符号反了：过载的专家越来越热。"""
    skew, bias, wrong = torch.tensor([0.5, 0.0, -0.5]), torch.zeros(3), torch.zeros(3)
    noise = normal(60, 3, dtype=torch.float32)
    for _ in range(60):
        for name in ("right", "wrong"):
            b = bias if name == "right" else wrong
            counts = expert_counts(sigmoid_top_k_routing(noise + skew, b, top_k=1)[1], num_experts=3)
            step = updated_expert_bias(torch.zeros(3), counts, update_rate=0.02)
            if name == "right":
                bias, right_max = bias + step, counts.max().item()
            else:
                wrong, wrong_max = wrong - step, counts.max().item()
    assert wrong_max == 60 and right_max < 32  # 平均 20
