r"""池化、对比损失与几何量的测试。

真值不经过被测代码：只用 math 的逐元素循环；`F.cross_entropy`（相似度矩阵另用 `F.cosine_similarity` 算）、`gradcheck`
与手推的梯度；transformers 的 `LlamaModel` 在左填充、右填充、不填充三种批上的隐藏状态；以及手算的数（正交向量、
单纯形、并列）。文件末尾逐个列出流传的错误写法，同一个真值会拒绝它们。
"""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from snippets.architecture.embedding import (
    alignment,
    cosine_matrix,
    info_nce,
    last_token_pool,
    likely_negatives,
    matryoshka_info_nce,
    mean_cosine,
    mean_pool,
    recall_at_k,
    symmetric_info_nce,
    uniformity,
)

B, N, T, C = 3, 5, 4, 6
RIGHT = torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]).bool()
LEFT = RIGHT.flip(1)
# 中间有空洞：既不是左填充也不是右填充
HOLES = torch.tensor([[0, 1, 0, 1], [1, 0, 1, 0], [0, 0, 1, 0]]).bool()


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def vectors(seed=0):
    """长度差别很大的查询与文档：忘了归一化就会露出来。"""
    q, d = normal(B, C, seed=seed), normal(N, C, seed=seed + 1)
    return q * torch.tensor([[0.1], [1.0], [7.0]]), d * torch.linspace(0.2, 5, N)[:, None].double()


def loop_cosine(x, y):
    dot = math.fsum(a * b for a, b in zip(x, y, strict=True))
    return dot / math.sqrt(math.fsum(a * a for a in x)) / math.sqrt(math.fsum(b * b for b in y))


def loop_info_nce(q, d, *, temperature, kept=None):
    """只用 Python 浮点数：逐个查询求 log Σ exp(s/τ) − s_ii/τ，再平均。"""
    losses = []
    for i, x in enumerate(q.tolist()):
        s = [loop_cosine(x, y) / temperature for y in d.tolist()]
        terms = [s[j] for j in range(len(s)) if j == i or kept is None or bool(kept[i, j])]
        top = max(terms)
        losses.append(top + math.log(math.fsum(math.exp(t - top) for t in terms)) - s[i])
    return math.fsum(losses) / len(losses)


# 池化


@pytest.mark.parametrize("mask", [RIGHT, LEFT, HOLES])
def test_pooling_matches_a_loop_over_real_tokens(mask):
    h = normal(B, T, C)
    real = [[h[b, t] for t in range(T) if mask[b, t]] for b in range(B)]
    torch.testing.assert_close(mean_pool(h, mask), torch.stack([sum(r) / len(r) for r in real]))
    torch.testing.assert_close(last_token_pool(h, mask), torch.stack([r[-1] for r in real]))


@pytest.mark.parametrize("mask", [RIGHT, LEFT])
@pytest.mark.parametrize("junk", [1e6, math.nan, math.inf])
def test_padding_values_never_leak(mask, junk):
    """填充处放垃圾，值与梯度都不变：乘 0 的写法遇到 NaN 会泄漏。"""
    h = normal(B, T, C)
    dirty = h.masked_fill(~mask.unsqueeze(-1), junk)
    for pool in (mean_pool, last_token_pool):
        torch.testing.assert_close(pool(dirty, mask), pool(h, mask))
        leaf = dirty.clone().requires_grad_()
        (grad,) = torch.autograd.grad(pool(leaf, mask).sum(), leaf)
        assert grad[~mask].abs().max() == 0
        torch.testing.assert_close(grad.sum(dim=1), torch.ones(B, C, dtype=torch.float64))


@pytest.mark.parametrize("side", ["left", "right"])
def test_pooling_a_padded_batch_equals_pooling_each_text_alone(side):
    """真的跑一遍 LlamaModel：补齐成一批（传 attention_mask 与 position_ids）与逐条单独跑的向量相同。"""
    torch.manual_seed(1)
    config = LlamaConfig(
        vocab_size=11,
        hidden_size=8,
        intermediate_size=12,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
    )
    model = LlamaModel(config).eval()
    texts = [[3, 5], [7, 2, 4, 9], [6]]
    pads = [[0] * (T - len(t)) for t in texts]
    rows = [p + t if side == "left" else t + p for t, p in zip(texts, pads, strict=True)]
    mask = LEFT if side == "left" else RIGHT
    position_ids = (mask.long().cumsum(dim=1) - 1).clamp(min=0)
    with torch.no_grad():
        batch = model(
            torch.tensor(rows), attention_mask=mask.long(), position_ids=position_ids
        ).last_hidden_state
        alone = [model(torch.tensor([t])).last_hidden_state[0] for t in texts]
    torch.testing.assert_close(last_token_pool(batch, mask), torch.stack([h[-1] for h in alone]))
    torch.testing.assert_close(mean_pool(batch, mask), torch.stack([h.mean(dim=0) for h in alone]))
    # 错误写法：对填充也平均；右填充取 -1；左填充取「长度减一」
    assert (batch.mean(dim=1) - mean_pool(batch, mask)).abs().max() > 0.1
    by_length = batch[torch.arange(B), mask.sum(dim=1) - 1]
    wrong = by_length if side == "left" else batch[:, -1]
    right = batch[:, -1] if side == "left" else by_length
    torch.testing.assert_close(right, last_token_pool(batch, mask))
    assert (wrong - last_token_pool(batch, mask)).abs().max() > 0.1


def test_pooling_an_empty_text():
    mask = torch.tensor([[True, False], [False, False]])
    h = normal(2, 2, C)
    assert mean_pool(h, mask)[1].isnan().all() and mean_pool(h, mask)[0].isfinite().all()
    with pytest.raises(ValueError, match="有一行全是填充.*EOS"):
        last_token_pool(h, mask)


def test_half_precision_stays_half():
    h = normal(B, T, C).bfloat16()
    assert mean_pool(h, RIGHT).dtype == torch.bfloat16 and last_token_pool(h, RIGHT).dtype == torch.bfloat16


# InfoNCE：前向


def test_cosine_matrix_matches_loop():
    q, d = vectors()
    truth = torch.tensor([[loop_cosine(x, y) for y in d.tolist()] for x in q.tolist()]).double()
    torch.testing.assert_close(cosine_matrix(q, d), truth, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(cosine_matrix(q, d), F.cosine_similarity(q[:, None], d[None], dim=-1))


@pytest.mark.parametrize("temperature", [0.02, 0.5, 1.0])
def test_info_nce_matches_loop_and_cross_entropy(temperature):
    q, d = vectors()
    mine = info_nce(q, d, temperature=temperature)
    assert mine.item() == pytest.approx(loop_info_nce(q, d, temperature=temperature), rel=1e-12)
    logits = F.cosine_similarity(q[:, None], d[None], dim=-1) / temperature
    torch.testing.assert_close(mine, F.cross_entropy(logits, torch.arange(B)))


def test_defaults():
    """温度 0.05、间隔 0.1、k = 1。"""
    q, d = vectors()
    assert info_nce(q, d).item() == pytest.approx(loop_info_nce(q, d, temperature=0.05), rel=1e-12)
    both = loop_info_nce(q, d[:B], temperature=0.05) + loop_info_nce(d[:B], q, temperature=0.05)
    assert symmetric_info_nce(q, d[:B]).item() == pytest.approx(both / 2, rel=1e-12)
    prefixes = sum(loop_info_nce(q[:, :m], d[:, :m], temperature=0.05) for m in (2, C))
    assert matryoshka_info_nce(q, d, dims=(2, C)).item() == pytest.approx(prefixes, rel=1e-12)
    torch.testing.assert_close(likely_negatives(q, d), likely_negatives(q, d, margin=0.1))
    torch.testing.assert_close(recall_at_k(q, d), recall_at_k(q, d, k=1))


def test_orthogonal_pairs_by_hand():
    """q_i = d_i 且两两正交：损失是 log(1 + (N−1)e^{−1/τ})；全部重合时是 log N。"""
    eye = 3 * torch.eye(4, dtype=torch.float64)
    truth = math.log(1 + 3 * math.exp(-1 / 0.5))
    assert info_nce(eye, eye, temperature=0.5).item() == pytest.approx(truth)
    same = torch.ones(4, 3, dtype=torch.float64)
    assert info_nce(same, same).item() == pytest.approx(math.log(4))


def test_hard_negatives_extend_the_denominator():
    """第 B 篇以后没有对应的查询，只进分母。"""
    q, d = vectors()
    assert info_nce(q, d) > info_nce(q, d[:B])
    shuffled = torch.cat([d[:B], d[B:].flip(0)])
    torch.testing.assert_close(info_nce(q, shuffled), info_nce(q, d))


def test_negative_mask_removes_terms_but_never_the_positive():
    q, d = vectors()
    kept = torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1], [0, 0, 0, 0, 0]]).bool()
    truth = loop_info_nce(q, d, temperature=0.3, kept=kept)
    assert info_nce(q, d, temperature=0.3, negative_mask=kept).item() == pytest.approx(truth, rel=1e-12)
    nothing = torch.zeros(B, N, dtype=torch.bool)
    assert info_nce(q, d, negative_mask=nothing).item() == pytest.approx(0.0, abs=1e-12)
    leaf = d.clone().requires_grad_()
    (grad,) = torch.autograd.grad(info_nce(q, leaf, negative_mask=nothing), leaf)
    assert grad.abs().max() < 1e-12 and grad.isfinite().all()


def test_likely_negatives_by_hand():
    """余弦 1、0.8、0.6 都是勾股数：正例 0.6，间隔 0.1 时余弦 0.8 的被摘掉，0.6 与 0 的留下。"""
    q = torch.tensor([[2.0, 0.0]], dtype=torch.float64)
    d = torch.tensor([[3.0, 4.0], [8.0, 6.0], [6.0, -8.0], [0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
    assert likely_negatives(q, d).tolist() == [[True, False, True, True, False]]
    assert likely_negatives(q, d, margin=0.25).tolist() == [[True, True, True, True, False]]
    assert likely_negatives(q, d, margin=0.5).all()
    # 恰在门槛上的算负例：间隔 0 时正例自己也留下
    assert likely_negatives(q, d, margin=0.0)[0, 0]
    # 每行用自己的正例作门槛
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    documents = torch.tensor([[1.0, 0.0], [1.0, 0.1]], dtype=torch.float64)
    assert likely_negatives(two, documents).tolist() == [[True, True], [True, True]]
    assert likely_negatives(two.flip(0), documents.flip(0)).tolist() == [[True, True], [True, True]]
    swapped = torch.tensor([[1.0, 0.1], [1.0, 0.0]], dtype=torch.float64)
    assert likely_negatives(two.flip(0), swapped.flip(0)).tolist() == [[True, True], [True, True]]
    confused = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    assert likely_negatives(two, confused).tolist() == [[True, False], [False, True]]


# InfoNCE：梯度与界


@pytest.mark.parametrize("mask", [None, torch.tensor([[1, 1, 0, 1, 1]] * B).bool()])
def test_info_nce_gradcheck(mask):
    q, d = (x.requires_grad_() for x in vectors())
    assert torch.autograd.gradcheck(lambda a, b: info_nce(a, b, temperature=0.3, negative_mask=mask), (q, d))


def test_gradient_by_hand():
    """∂L/∂s = (p − I)/(Bτ)；∂L/∂q_i = (I − q̂q̂ᵀ)/‖q‖ · Σ_j ∂L/∂s_ij d̂_j，与 q 正交。"""
    q, d = vectors()
    q.requires_grad_()
    tau = 0.2
    (grad,) = torch.autograd.grad(info_nce(q, d, temperature=tau), q)
    with torch.no_grad():
        q_hat, d_hat = (x / x.norm(dim=-1, keepdim=True) for x in (q, d))
        p = torch.softmax(q_hat @ d_hat.T / tau, dim=-1)
        grad_s = (p - torch.eye(B, N)) / (B * tau)
        g = grad_s @ d_hat
        truth = (g - (g * q_hat).sum(-1, keepdim=True) * q_hat) / q.norm(dim=-1, keepdim=True)
        torch.testing.assert_close(grad, truth)
        assert (grad * q).sum(dim=-1).abs().max() < 1e-12
        torch.testing.assert_close(grad_s.sum(dim=1), torch.zeros(B, dtype=torch.float64))  # 推与拉相抵


def test_loss_floor_is_reached_by_the_simplex():
    """N 对向量能做到的最小损失是 log(1+(N−1)e^{−N/((N−1)τ)})：单纯形取等号，随机向量都在它上面。"""
    count = 4
    simplex = torch.eye(count, dtype=torch.float64) - 1 / count
    for tau in (0.1, 1.0):
        floor = math.log(1 + (count - 1) * math.exp(-count / ((count - 1) * tau)))
        assert info_nce(simplex, simplex, temperature=tau).item() == pytest.approx(floor, rel=1e-9)
        for seed in range(20):
            x = normal(count, 3, seed=seed)
            assert info_nce(x, x + 0.1 * normal(count, 3, seed=99), temperature=tau).item() > floor


@pytest.mark.parametrize("temperature", [0.0, -0.05, math.nan])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature 是.*大于 0"):
        info_nce(*vectors(), temperature=temperature)


def test_tiny_temperature_is_allowed():
    q, d = vectors()
    assert info_nce(q, d, temperature=1e-4).isfinite()


# 变体


def test_symmetric_is_the_mean_of_two_directions():
    q, d = vectors()
    d = d[:B]
    forward, backward = loop_info_nce(q, d, temperature=0.3), loop_info_nce(d, q, temperature=0.3)
    assert abs(forward - backward) > 0.01
    mine = symmetric_info_nce(q, d, temperature=0.3)
    assert mine.item() == pytest.approx((forward + backward) / 2, rel=1e-12)
    torch.testing.assert_close(symmetric_info_nce(d, q, temperature=0.3), mine)


def test_matryoshka_sums_prefixes_each_renormalised():
    q, d = vectors()
    truth = sum(loop_info_nce(q[:, :m], d[:, :m], temperature=0.3) for m in (1, 4, C))
    mine = matryoshka_info_nce(q, d, dims=(1, 4, C), temperature=0.3)
    assert mine.item() == pytest.approx(truth, rel=1e-12)
    # 先归一化整条、截断后不再归一化：不是余弦
    q_hat, d_hat = F.normalize(q, dim=-1), F.normalize(d, dim=-1)
    wrong = sum(
        F.cross_entropy(q_hat[:, :m] @ d_hat[:, :m].T / 0.3, torch.arange(B)).item() for m in (1, 4, C)
    )
    assert abs(wrong - truth) > 0.05


@pytest.mark.parametrize("dims", [(0,), (2, C + 1), (-1,)])
def test_bad_prefix_is_refused(dims):
    with pytest.raises(ValueError, match=f"不在 1 到 {C} 之间"):
        matryoshka_info_nce(*vectors(), dims=dims)


# 几何与检索


def test_geometry_by_hand():
    """正交基（长度不一）：平均余弦 0，两两平方距离 2，均匀度 log e^{−4} = −4；单纯形的平均余弦是 −1/(N−1)。"""
    basis = torch.diag(torch.tensor([0.5, 1.0, 4.0], dtype=torch.float64))
    assert mean_cosine(basis).item() == pytest.approx(0.0, abs=1e-12)
    assert uniformity(basis).item() == pytest.approx(-4.0)
    assert alignment(basis, 2 * basis).item() == pytest.approx(0.0, abs=1e-12)
    assert alignment(basis, basis.roll(1, 0)).item() == pytest.approx(2.0)
    assert alignment(basis, -basis).item() == pytest.approx(4.0)
    simplex = torch.eye(4, dtype=torch.float64) - 0.25
    assert mean_cosine(simplex).item() == pytest.approx(-1 / 3)
    same = torch.ones(3, 2, dtype=torch.float64) * torch.tensor([[1.0], [2.0], [5.0]])
    assert mean_cosine(same).item() == pytest.approx(1.0)
    assert uniformity(same).item() == pytest.approx(0.0, abs=1e-12)
    torch.testing.assert_close(mean_cosine(torch.tensor([[3.0, 4.0], [5.0, 0.0]])).item(), 0.6)


def test_geometry_matches_loops():
    x, y = vectors()[1], normal(N, C, seed=9)
    rows = x.tolist()
    pairs = [(i, j) for i in range(N) for j in range(N) if i != j]
    cosines = [loop_cosine(rows[i], rows[j]) for i, j in pairs]
    assert mean_cosine(x).item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-12)
    potential = sum(math.exp(-2 * (2 - 2 * c)) for c in cosines) / len(cosines)
    assert uniformity(x).item() == pytest.approx(math.log(potential), rel=1e-10)
    positive = [2 - 2 * loop_cosine(a, b) for a, b in zip(rows, y.tolist(), strict=True)]
    assert alignment(x, y).item() == pytest.approx(sum(positive) / N, rel=1e-12)


def test_language_model_loss_does_not_fix_cosines():
    """末尾归一化的一个增益乘 50、输出矩阵的那一列除以 50：logits 不变，平均余弦大变。"""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=11, hidden_size=8, intermediate_size=12, num_hidden_layers=1, num_attention_heads=2
    )
    model = LlamaForCausalLM(config).double().eval()
    ids = torch.arange(11).repeat(2)[None]
    with torch.no_grad():
        before = model(ids, output_hidden_states=True)
        model.model.norm.weight[0] *= 50
        model.lm_head.weight[:, 0] /= 50
        after = model(ids, output_hidden_states=True)
    torch.testing.assert_close(after.logits, before.logits)
    hidden = [output.hidden_states[-1][0] for output in (before, after)]
    cosines = [F.cosine_similarity(h[:, None], h[None], dim=-1) for h in hidden]
    assert (cosines[0] - cosines[1]).abs().max() > 0.5


def test_recall_by_hand():
    """查询 0 的正例排第 1，查询 1 的排第 2，查询 2 的排第 3；按内积排会把长文档排上来。"""
    q = torch.eye(3, dtype=torch.float64)
    d = torch.tensor([[1.0, 0.2, 0.9], [0.0, 0.5, 0.7], [0.0, 9.0, 0.1]], dtype=torch.float64)
    # 余弦：行 0 → 文档 0；行 1 → 文档 2、1、0；行 2 → 文档 1、0、2
    assert [recall_at_k(q, d, k=k).item() for k in (1, 2, 3)] == pytest.approx([1 / 3, 2 / 3, 1.0])
    assert recall_at_k(q, d).item() == pytest.approx(1 / 3)  # 默认 k = 1
    extra = torch.cat([d, 100 * torch.eye(3, dtype=torch.float64)])
    assert recall_at_k(q, extra).item() == 0.0
    assert recall_at_k(q.float(), d.float()).dtype == torch.float32


# 被拒绝的错误写法：真值是只用 math 的循环


def wrong_info_nce(q, d, *, temperature, normalise=True, multiply=False, dim=-1, reduce="mean"):
    if normalise:
        q, d = F.normalize(q, dim=dim), F.normalize(d, dim=dim)
    scores = q @ d.T
    logits = scores * temperature if multiply else scores / temperature
    return F.cross_entropy(logits, torch.arange(len(q)), reduction=reduce)


WRONG = {
    "没有归一化": dict(normalise=False),
    "乘了温度": dict(multiply=True),
    "沿批归一化": dict(dim=0),
    "对查询求和": dict(reduce="sum"),
}


def test_template_of_the_wrong_versions_is_right():
    q, d = vectors()
    truth = loop_info_nce(q, d, temperature=0.3)
    assert wrong_info_nce(q, d, temperature=0.3).item() == pytest.approx(truth, rel=1e-12)


@pytest.mark.rejects
@pytest.mark.parametrize("name", WRONG)
def test_wrong_info_nce_is_rejected(name):
    q, d = vectors()
    truth = loop_info_nce(q, d, temperature=0.3)
    assert info_nce(q, d, temperature=0.3).item() == pytest.approx(truth, rel=1e-12)
    assert abs(wrong_info_nce(q, d, temperature=0.3, **WRONG[name]).item() - truth) > 0.05


@pytest.mark.rejects
def test_denominator_without_the_positive_is_rejected():
    """分母漏掉正例（decoupled 的写法）会得到负的损失；InfoNCE 不会小于 0。"""
    eye = torch.eye(B, dtype=torch.float64)
    s = eye / 0.05
    dropped = torch.logsumexp(s.masked_fill(eye.bool(), -math.inf), dim=-1) - s.diagonal()
    assert dropped.mean() < -10
    assert 0 <= info_nce(eye, eye) < 1e-6


@pytest.mark.rejects
def test_wrong_symmetric_losses_are_rejected():
    q, d = vectors()
    d, tau = d[:B], 0.3
    truth = (loop_info_nce(q, d, temperature=tau) + loop_info_nce(d, q, temperature=tau)) / 2
    s = F.cosine_similarity(q[:, None], d[None], dim=-1) / tau
    labels = torch.arange(B)
    wrong = {
        "先平均相似度矩阵": F.cross_entropy((s + s.T) / 2, labels),
        "相加不除 2": F.cross_entropy(s, labels) + F.cross_entropy(s.T, labels),
        "同一方向算两次": F.cross_entropy(s, labels),
        "两个方向拼成一个 softmax": F.cross_entropy(torch.cat([s, s.T], dim=1), labels),
    }
    assert symmetric_info_nce(q, d, temperature=tau).item() == pytest.approx(truth, rel=1e-12)
    for name, value in wrong.items():
        assert abs(value.item() - truth) > 0.01, name


@pytest.mark.rejects
def test_mean_cosine_with_the_diagonal_is_rejected():
    x = vectors()[1]
    with_self = F.cosine_similarity(x[:, None], x[None], dim=-1).mean()
    assert (with_self - mean_cosine(x)).abs() > 0.1
