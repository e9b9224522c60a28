"""掩码的真值是逐格的循环与 transformers 5.23.0 的掩码函数；有效秩的真值是手算与特征值；
行列式的真值是 slogdet 与均匀注意力的闭式；顺序与缓存的性质在 transformers 的 GPT-2、Llama 上核对。"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2Model, LlamaConfig, LlamaModel
from transformers.masking_utils import bidirectional_mask_function, causal_mask_function, or_masks, sdpa_mask

from snippets.architecture.decoder_only import (
    attention_matrix,
    effective_rank,
    log_det_causal,
    prefix_lm_mask,
)

T = 7


def unit_scores(num_tokens, *, std=1.0, head_dim=64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    q, k = (torch.randn(num_tokens, head_dim, generator=generator, dtype=torch.float64) for _ in range(2))
    return std * q @ k.T / math.sqrt(head_dim)


# 手算


def test_prefix_mask_by_hand():
    """四个 token、前缀两个：前两行看见前两列，以后逐行多一列。"""
    expected = torch.tensor([[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1]]).bool()
    assert prefix_lm_mask(num_tokens=4, prefix_length=2).equal(expected)


@pytest.mark.parametrize("prefix_length", range(T + 1))
def test_prefix_mask_cell_by_cell(prefix_length):
    mask = prefix_lm_mask(num_tokens=T, prefix_length=prefix_length)
    assert mask.dtype == torch.bool
    for i in range(T):
        for j in range(T):
            assert mask[i, j].item() == (j <= i or j < prefix_length)


def test_effective_rank_by_hand():
    """奇异值 3、1：p = ¾、¼，exp(熵) = 4 / 3^¾；三个相等的奇异值给 3；外积给 1。"""
    values = effective_rank(torch.diag(torch.tensor([3.0, -1.0], dtype=torch.float64)))
    assert values.item() == pytest.approx(4 / 3**0.75, rel=1e-12)
    assert effective_rank(torch.diag(torch.tensor([2.0, 2.0, 2.0, 0.0]))).item() == pytest.approx(3, rel=1e-5)
    outer = torch.outer(torch.arange(1.0, 4.0), torch.arange(1.0, 6.0)).double()
    assert effective_rank(outer).item() == pytest.approx(1, abs=1e-9)


def test_uniform_causal_attention_has_determinant_one_over_factorial():
    """第 i 行的每个权重是 1/i，对角线之积是 1/T!。"""
    a = attention_matrix(torch.zeros(T, T, dtype=torch.float64), prefix_lm_mask(num_tokens=T))
    torch.testing.assert_close(a[2], torch.tensor([1, 1, 1, 0, 0, 0, 0], dtype=torch.float64) / 3)
    assert log_det_causal(a).item() == pytest.approx(-math.lgamma(T + 1), rel=1e-12)


def test_uniform_causal_attention_is_well_conditioned():
    """逆矩阵是双对角的：第 i 行只有 i 与 -(i-1)，范数小于 2T；前 i 项平均的范数不超过 2（Hardy 不等式）。"""
    size = 200
    a = attention_matrix(torch.zeros(size, size, dtype=torch.float64), prefix_lm_mask(num_tokens=size))
    index = torch.arange(1, size + 1, dtype=torch.float64)
    inverse = torch.diag(index) - torch.diag(index[:-1], -1)
    torch.testing.assert_close(inverse @ a, torch.eye(size, dtype=torch.float64))
    assert torch.linalg.matrix_norm(a, ord=2) <= 2
    assert torch.linalg.cond(a) <= 4 * size
    assert log_det_causal(a) < -800  # 行列式却小到 e^-863


def test_uniform_attention_over_a_start_token_counts_the_position():
    """q·k 恒为 0，起始 token 的值取 1、其余取 0：第 t 个位置得到 1/t，一层就读得出绝对位置。"""
    a = attention_matrix(torch.zeros(T, T), prefix_lm_mask(num_tokens=T))
    is_start = torch.zeros(T).index_fill(0, torch.tensor(0), 1.0)
    torch.testing.assert_close(1 / (a @ is_start), torch.arange(1.0, T + 1))


# 独立实现


@pytest.mark.parametrize("prefix_length", [0, 3, T])
def test_prefix_mask_matches_transformers(prefix_length):
    """transformers 用 or_masks 在因果掩码上叠加前缀；两端分别是它的因果与双向掩码。"""

    def prefix(batch_idx, head_idx, q_idx, kv_idx):
        return (kv_idx < prefix_length) & (q_idx >= 0)

    def build(function):
        options = dict(batch_size=1, q_length=T, kv_length=T, allow_is_causal_skip=False)
        return sdpa_mask(mask_function=function, **options)[0, 0]

    mask = prefix_lm_mask(num_tokens=T, prefix_length=prefix_length)
    assert mask.equal(build(or_masks(causal_mask_function, prefix)))
    ends = {0: causal_mask_function, T: bidirectional_mask_function}
    if prefix_length in ends:
        assert mask.equal(build(ends[prefix_length]))


@pytest.mark.parametrize("prefix_length", [0, 4, T])
def test_attention_matrix_matches_sdpa_with_gradient(prefix_length):
    q, k, v = (torch.randn(2, T, 5, dtype=torch.float64, requires_grad=True) for _ in range(3))
    mask = prefix_lm_mask(num_tokens=T, prefix_length=prefix_length)
    ours = attention_matrix(q @ k.transpose(-2, -1) / math.sqrt(5), mask) @ v
    theirs = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    torch.testing.assert_close(ours, theirs)
    upstream = torch.randn(2, T, 5, dtype=torch.float64)
    for mine, expected in zip(
        torch.autograd.grad((ours * upstream).sum(), (q, k, v)),
        torch.autograd.grad((theirs * upstream).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(mine, expected)


def test_effective_rank_matches_the_eigenvalues_of_the_gram_matrix():
    matrix = torch.randn(2, 3, 4, 6, dtype=torch.float64)
    sigma = torch.linalg.eigvalsh(matrix @ matrix.transpose(-2, -1)).sqrt()
    p = sigma / sigma.sum(-1, keepdim=True)
    torch.testing.assert_close(effective_rank(matrix), (p**-p).prod(-1))
    torch.testing.assert_close(effective_rank(7 * matrix), effective_rank(matrix))


def test_log_det_matches_slogdet():
    scores = torch.stack([unit_scores(T, std=std) for std in (0.1, 1.0, 3.0)]).unsqueeze(0)
    a = attention_matrix(scores, prefix_lm_mask(num_tokens=T))
    sign, expected = torch.linalg.slogdet(a)
    assert (sign == 1).all()
    torch.testing.assert_close(log_det_causal(a), expected)


# 性质：在真实的模型上


def tiny_llama():
    torch.manual_seed(1)
    shape = dict(
        hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, vocab_size=11
    )
    return LlamaModel(LlamaConfig(**shape, initializer_range=0.5)).double().eval()


def run_llama(model, ids, prefix_length):
    mask = prefix_lm_mask(num_tokens=ids.shape[1], prefix_length=prefix_length)[None, None]
    with torch.no_grad():
        out = model(ids, attention_mask=mask, use_cache=True)
    return out.last_hidden_state, [torch.cat((y.keys, y.values), -1) for y in out.past_key_values.layers]


def test_the_mask_is_the_only_difference_between_causal_and_prefix_lm():
    """同一份 Llama 权重：前缀 0 等于它自己的因果前向；前缀 4 改变前缀内的输出，参数一个没动。"""
    model, ids = tiny_llama(), torch.randint(11, (1, T))
    with torch.no_grad():
        expected = model(ids).last_hidden_state
    torch.testing.assert_close(run_llama(model, ids, 0)[0], expected)
    assert (run_llama(model, ids, 4)[0] - expected)[:, 0].abs().max() > 0.01


@pytest.mark.parametrize(
    ("before", "after", "stale"), [(0, 0, [0, 0, 0]), (3, 3, [0, 0, 0]), (T - 1, T, [0, T - 1, T - 1])]
)
def test_which_cached_keys_and_values_change_when_a_token_is_appended(before, after, stale):
    """因果与「新 token 在前缀之后」：缓存一行不变；新 token 并入双向的前缀：第二层起全变。"""
    model, ids = tiny_llama(), torch.randint(11, (1, T))
    _, old = run_llama(model, ids[:, :-1], before)
    _, new = run_llama(model, ids, after)
    changed = [
        int(((b[:, :, :-1] - a).abs().amax(-1) > 1e-9).any(1).sum()) for a, b in zip(old, new, strict=True)
    ]
    assert changed == stale


def last_output_of_gpt2(num_layers, ids):
    torch.manual_seed(2)
    config = GPT2Config(n_embd=16, n_head=2, n_layer=num_layers, vocab_size=11, n_positions=16)
    model = GPT2Model(config).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(10 if weight.ndim == 2 else 1)
        model.wpe.weight.zero_()  # 没有位置编码
        return model(ids).last_hidden_state[0]


# 边界


def test_the_default_is_the_causal_decoder():
    assert prefix_lm_mask(num_tokens=T).equal(torch.ones(T, T).tril().bool())
    assert prefix_lm_mask(num_tokens=T, prefix_length=1).equal(prefix_lm_mask(num_tokens=T))
    assert prefix_lm_mask(num_tokens=0).shape == (0, 0)


@pytest.mark.parametrize("prefix_length", [-1, T + 1])
def test_prefix_outside_the_sequence_is_refused(prefix_length):
    with pytest.raises(
        ValueError, match=f"^prefix_length={prefix_length} 不在 0 到 {T} 之间；请传前缀的 token 数。$"
    ):
        prefix_lm_mask(num_tokens=T, prefix_length=prefix_length)


def test_log_det_refuses_a_matrix_that_is_not_causal():
    a = torch.eye(3)
    a[0, 1] = 0.5
    with pytest.raises(
        ValueError, match="^attention 的对角线以上不全是 0，不是因果注意力；请用 torch.linalg.slogdet。$"
    ):
        log_det_causal(a)


# 被拒绝的说法与写法


@pytest.mark.rejects
def test_determinant_does_not_imply_conditioning():
    """「行列式为正，所以满秩、条件好」：256 个 token、打分标准差 1 的因果矩阵行列式为正，
    奇异值之比却到了 float64 的舍入以下；行列式大小也不排条件数的序。"""
    size = 256
    causal, full = (prefix_lm_mask(num_tokens=size, prefix_length=p) for p in (0, size))

    def ratio(a):
        sigma = torch.linalg.svdvals(a)
        return (sigma[-1] / sigma[0]).item()

    peaked, flat = (attention_matrix(unit_scores(size, std=std), causal) for std in (1.0, 0.01))
    both = attention_matrix(unit_scores(size), full)
    assert log_det_causal(peaked).isfinite() and ratio(peaked) < 1e-13
    assert ratio(both) > 1e-5  # 同样的打分，双向矩阵的条件反而好
    assert torch.linalg.slogdet(both).logabsdet > log_det_causal(flat) and ratio(both) < ratio(flat)
    assert effective_rank(both) > effective_rank(peaked) + 30


@pytest.mark.rejects
def test_full_rank_attention_does_not_lift_the_rank_of_the_head_output():
    """rank(AV) 不超过每头维数，A 是单位矩阵也一样。"""
    value = torch.randn(T, 3, dtype=torch.float64)
    for a in (torch.eye(T).double(), attention_matrix(unit_scores(T), prefix_lm_mask(num_tokens=T))):
        assert torch.linalg.matrix_rank(a) == T and torch.linalg.matrix_rank(a @ value) == 3


@pytest.mark.rejects
def test_one_causal_layer_does_not_encode_order_for_the_last_token():
    """「因果注意力自带位置编码」：没有位置编码的 GPT-2，一层时打乱前缀，末位输出不变；两层才变。"""
    ids = torch.tensor([[1, 2, 3, 4, 5, 6, 7]])
    shuffled = torch.tensor([[4, 6, 1, 5, 3, 2, 7]])
    change = {
        n: (last_output_of_gpt2(n, ids) - last_output_of_gpt2(n, shuffled))[-1].abs().max() for n in (1, 2)
    }
    assert change[1] < 1e-12
    assert change[2] > 0.01


@pytest.mark.rejects
def test_a_strictly_lower_mask_is_rejected():
    """掩码少看一个（不看自己）：对角线是 0，行列式是 0，对数是负无穷；首行没有可看的，补回自己。"""
    wrong = torch.ones(T, T).tril(-1).bool()
    wrong[0, 0] = True
    a = attention_matrix(unit_scores(T), wrong)
    assert log_det_causal(a).item() == -math.inf
    assert torch.linalg.matrix_rank(a) < T
    assert not wrong.equal(prefix_lm_mask(num_tokens=T))


@pytest.mark.rejects
def test_a_mask_that_sees_one_ahead_is_rejected():
    a = attention_matrix(unit_scores(T), torch.ones(T, T).tril(1).bool())
    with pytest.raises(ValueError, match="不是因果注意力"):
        log_det_causal(a)


WRONG_MASKS = {
    "前缀的行而不是列": lambda causal, p: causal | (torch.arange(T)[:, None] < p),
    "前缀多一个": lambda causal, p: causal | (torch.arange(T)[None] <= p),
    "只有前缀、没有因果": lambda causal, p: (torch.arange(T)[None] < p).expand(T, T),
    "转置": lambda causal, p: (causal | (torch.arange(T)[None] < p)).T,
}


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG_MASKS)
def test_wrong_prefix_mask_is_rejected(name):
    causal = torch.ones(T, T).tril().bool()
    truth = torch.tensor([[j <= i or j < 3 for j in range(T)] for i in range(T)])
    assert prefix_lm_mask(num_tokens=T, prefix_length=3).equal(truth)
    assert not WRONG_MASKS[name](causal, 3).equal(truth)


@pytest.mark.rejects
def test_wrong_effective_ranks_are_rejected():
    """用 σ² 归一（参与比的写法），或熵以 2 为底再取 e 的指数：都不是 4/3^¾。"""
    sigma = torch.tensor([3.0, 1.0], dtype=torch.float64)
    truth = 4 / 3**0.75
    assert effective_rank(torch.diag(sigma)).item() == pytest.approx(truth)
    squared = sigma**2 / sigma.square().sum()
    p = sigma / sigma.sum()
    assert abs(torch.special.entr(squared).sum().exp() - truth) > 0.2
    assert abs((torch.special.entr(p).sum() / math.log(2)).exp() - truth) > 0.2
