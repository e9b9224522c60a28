"""采样与束搜索的真值：手算的小分布、transformers 5.23.0 的 warper 与 generate、穷举全部序列。

过滤的真值是逐个 token 的循环（从定义出发，不排序后比较累加）；束搜索的真值是把所有以 EOS 结尾或到达长度上限的
序列全部列出来。每个流传的错误写法都在这里定义一次，并被同一个真值拒绝。
"""

import itertools
import math

import pytest
import torch
from tiny_models import tiny_llama
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from snippets.architecture.sampling import (
    apply_temperature,
    beam_search,
    min_p_filter,
    repetition_penalty,
    sample,
    top_k_filter,
    top_p_filter,
)

FIVE = torch.tensor([0.5, 0.25, 0.15, 0.07, 0.03], dtype=torch.float64)
SHUFFLE = torch.tensor([3, 0, 4, 1, 2])
INF = float("inf")


def kept(logits):
    return (logits > -INF).sum(-1)


def random_logits(*shape, scale=3.0, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * scale


def nucleus(probs, p):
    """定义：按概率从大到小逐个放进集合，放到总和达到 p 为止。"""
    chosen, total = set(), 0.0
    for i in sorted(range(len(probs)), key=lambda i: -probs[i]):
        chosen.add(i)
        total += probs[i]
        if total >= p:
            break
    return chosen


# 手算


@pytest.mark.parametrize(("p", "count"), [(0.3, 1), (0.6, 2), (0.76, 3), (0.95, 4), (0.98, 5), (1.0, 5)])
def test_top_p_keeps_the_token_that_crosses_the_threshold(p, count):
    """概率 .5 .25 .15 .07 .03，累加 .5 .75 .90 .97 1：达到 p 的最小个数。打乱次序也一样。"""
    out = top_p_filter(FIVE.log()[SHUFFLE], top_p=p)
    torch.testing.assert_close(out, torch.where(SHUFFLE < count, FIVE.log()[SHUFFLE], -INF))


def test_top_p_at_an_exact_boundary_stops_there():
    """四个并列的 logit 概率恰为 1/4（二进制里精确）：p=1/2 时两个就够，p 再大一点才要三个。"""
    logits = torch.zeros(4, dtype=torch.float64)
    assert kept(top_p_filter(logits, top_p=0.5)) == 2
    assert kept(top_p_filter(logits, top_p=0.5 + 1e-9)) == 3
    assert kept(TopPLogitsWarper(0.5)(None, logits[None]))[0] == 2


def test_top_k_keeps_all_ties_at_the_boundary():
    assert top_k_filter(torch.tensor([3.0, 2.0, 2.0, 1.0]), top_k=2).tolist() == [3.0, 2.0, 2.0, -INF]


@pytest.mark.parametrize(("min_p", "count"), [(0.0, 5), (0.1, 4), (0.2, 3), (0.4, 2), (1.0, 1)])
def test_min_p_is_relative_to_the_largest_probability(min_p, count):
    """门槛 .5·min_p：0.1 → .05 留 4 个，0.2 → .1 留 3 个，0.4 → .2 留 2 个，1 → 只留最大的。"""
    out = min_p_filter(FIVE.log()[SHUFFLE], min_p=min_p)
    torch.testing.assert_close(out, torch.where(SHUFFLE < count, FIVE.log()[SHUFFLE], -INF))


def test_min_p_one_keeps_every_largest_token():
    assert min_p_filter(torch.tensor([1.0, 2.0, 2.0]), min_p=1.0).tolist() == [-INF, 2.0, 2.0]


def test_temperature_one_half_squares_the_odds():
    """p ∝ e^{z/τ}：τ=1/2 使几率比平方，.5/.25 = 2 变成 4。"""
    probs = apply_temperature(FIVE.log(), temperature=0.5).softmax(-1)
    torch.testing.assert_close(probs, FIVE**2 / (FIVE**2).sum())
    assert probs[0] / probs[1] == pytest.approx(4)


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits():
    """θ=2，token 0、2 出现过（0 出现两次也只罚一次）：3→1.5，-1→-2，其余不动。"""
    logits = torch.tensor([[3.0, 3.0, -1.0, -1.0]])
    out = repetition_penalty(logits, torch.tensor([[0, 2, 0]]), penalty=2.0)
    assert out.tolist() == [[1.5, 3.0, -2.0, -1.0]]


# 与 transformers 一致


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
def test_temperature_matches_transformers(temperature):
    logits = random_logits(3, 11)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    torch.testing.assert_close(apply_temperature(logits, temperature=temperature), expected)


@pytest.mark.parametrize("top_k", [1, 2, 5, 11, 14])
def test_top_k_matches_transformers(top_k):
    logits = random_logits(3, 11).round()  # 取整以后有许多并列
    torch.testing.assert_close(top_k_filter(logits, top_k=top_k), TopKLogitsWarper(top_k)(None, logits))


@pytest.mark.parametrize("top_p", [1e-9, 0.1, 0.37, 0.5, 0.8, 0.95, 0.999])
def test_top_p_matches_transformers_and_the_definition(top_p):
    logits = random_logits(40, 11)
    out = top_p_filter(logits, top_p=top_p)
    torch.testing.assert_close(out, TopPLogitsWarper(top_p)(None, logits))
    for row, probs in zip(out, logits.softmax(-1).tolist(), strict=True):
        assert set((row > -INF).nonzero().flatten().tolist()) == nucleus(probs, top_p)


@pytest.mark.parametrize("min_p", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_min_p_matches_transformers(min_p):
    logits = random_logits(40, 11)
    torch.testing.assert_close(min_p_filter(logits, min_p=min_p), MinPLogitsWarper(min_p)(None, logits))


@pytest.mark.parametrize("penalty", [0.5, 1.0, 1.2, 2.0])
def test_repetition_penalty_matches_transformers(penalty):
    logits = random_logits(3, 11)
    input_ids = torch.randint(0, 11, (3, 6), generator=torch.Generator().manual_seed(1))
    expected = RepetitionPenaltyLogitsProcessor(penalty)(input_ids, logits.clone())
    torch.testing.assert_close(repetition_penalty(logits, input_ids, penalty=penalty), expected)


def test_transformers_falls_back_to_top_k_50_and_early_stopping_false():
    """页面里写的默认值：没有别处设置时，采样会带上 top_k=50。"""
    defaults = GenerationConfig()._get_default_generation_params()
    expected = {"top_k": 50, "top_p": 1.0, "temperature": 1.0, "length_penalty": 1.0, "early_stopping": False}
    assert {name: defaults[name] for name in expected} == expected


def test_transformers_really_truncates_to_fifty_when_only_do_sample_is_set():
    """真的调用 generate：词表 80，每一步的得分里恰有 50 个不是 -inf；top_k=0 才是全部。"""
    model = tiny_llama(80, num_hidden_layers=1).eval()
    settings = dict(do_sample=True, max_new_tokens=2, output_scores=True, return_dict_in_generate=True)
    prompt = torch.tensor([[5, 7]])
    for extra, expected in (({}, 50), ({"top_k": 0}, 80)):
        scores = model.generate(
            prompt, attention_mask=torch.ones_like(prompt), eos_token_id=None, **settings, **extra
        ).scores
        assert [int(kept(step)[0]) for step in scores] == [expected, expected]


# 采样


def test_gumbel_max_frequencies_equal_softmax():
    """二十万次抽样对精确的概率：每个频率都在 5 个标准差以内；滤掉的一次也没有。"""
    logits = torch.cat([FIVE.log()[SHUFFLE] + 3.0, torch.tensor([-INF], dtype=torch.float64)])
    probs = logits.softmax(-1)
    draws = 200_000
    tokens = sample(logits.expand(draws, 6), torch.Generator().manual_seed(3))
    counts = tokens.bincount(minlength=6).double()
    assert ((counts / draws - probs).abs() <= 5 * (probs * (1 - probs) / draws).sqrt()).all()
    assert counts[5] == 0 and tokens.shape == (draws,)


def test_gumbel_max_is_the_exponential_race():
    """同一批指数随机数，argmax(z - log e) 与 argmax(p / e) 逐个相同（推理引擎里常见的写法）。"""
    logits = random_logits(500, 7)
    exponential = torch.empty(500, 7, dtype=torch.float64)
    exponential.exponential_(generator=torch.Generator().manual_seed(9))
    expected = (logits.softmax(-1) / exponential).argmax(-1)
    assert torch.equal(sample(logits, torch.Generator().manual_seed(9)), expected)
    assert torch.equal(sample(logits.float(), torch.Generator().manual_seed(9)), expected)


def test_gumbel_noise_is_drawn_in_float64():
    """把 z 取成 log e 加 1e-10 的级差：扣掉同一批噪声后只剩级差；噪声若是 float32，误差 1e-7 会盖过它。"""
    exponential = torch.empty(50, 7, dtype=torch.float64)
    exponential.exponential_(generator=torch.Generator().manual_seed(9))
    steps = torch.arange(50)[:, None] + torch.arange(7)  # 每行最大的位置不同
    logits = exponential.log() + 1e-10 * (steps % 7)
    assert torch.equal(sample(logits, torch.Generator().manual_seed(9)), (steps % 7).argmax(-1))


def test_gumbel_max_ignores_a_shift_of_the_logits():
    logits = random_logits(200, 7)
    first, second = (sample(logits + shift, torch.Generator().manual_seed(2)) for shift in (0.0, 100.0))
    assert torch.equal(first, second)


# 性质与边界


def test_each_row_has_its_own_cut_and_any_batch_shape():
    peaked, flat = torch.tensor([9.0, 0.0, 0.0, 0.0]), torch.zeros(4)
    logits = torch.stack([peaked, flat]).view(1, 2, 4)
    assert kept(top_p_filter(logits, top_p=0.9)).tolist() == [[1, 4]]
    assert kept(min_p_filter(logits, min_p=0.1)).tolist() == [[1, 4]]
    assert kept(top_k_filter(logits, top_k=1)).tolist() == [[1, 4]]


def test_top_p_one_keeps_a_tail_that_float32_would_round_away():
    """float32 里 e^{-50} 加到 1 上没有了：靠累加判断会丢掉它，p=1 必须原样返回。"""
    logits = torch.tensor([0.0, -50.0])
    assert torch.equal(top_p_filter(logits, top_p=1.0), logits)
    probs = logits.softmax(-1)
    assert (probs.cumsum(-1) - probs)[1] == 1  # 前面的概率之和已经等于 1


def test_filters_keep_values_and_do_not_touch_the_input():
    logits = random_logits(4, 9)
    before = logits.clone()
    for out in (
        top_k_filter(logits, top_k=3),
        top_p_filter(logits, top_p=0.6),
        min_p_filter(logits, min_p=0.3),
        repetition_penalty(logits, torch.zeros(4, 1, dtype=torch.long), penalty=1.5),
    ):
        assert out.dtype == logits.dtype and torch.equal(logits, before)
    alive = top_k_filter(logits, top_k=3)
    assert torch.equal(alive[alive > -INF], logits[alive > -INF])


def test_filters_accept_what_an_earlier_filter_removed():
    """先 top-k 再 top-p：概率要在留下的集合里重新归一化。"""
    step = top_k_filter(FIVE.log(), top_k=2)  # 2/3、1/3
    assert kept(top_p_filter(step, top_p=0.6)) == 1
    assert kept(top_p_filter(FIVE.log(), top_p=0.6)) == 2
    assert kept(min_p_filter(step, min_p=0.4)) == 2


@pytest.mark.parametrize("temperature", [0.0, -1.0, math.nan])
def test_bad_temperature_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature 必须大于 0"):
        apply_temperature(FIVE, temperature=temperature)


@pytest.mark.parametrize("top_k", [0, -1])
def test_bad_top_k_is_refused(top_k):
    with pytest.raises(ValueError, match="top_k 必须至少是 1"):
        top_k_filter(FIVE, top_k=top_k)


@pytest.mark.parametrize("top_p", [0.0, -0.1, 1.01, math.nan])
def test_bad_top_p_is_refused(top_p):
    with pytest.raises(ValueError, match="top_p 必须在"):
        top_p_filter(FIVE, top_p=top_p)


@pytest.mark.parametrize("min_p", [-0.01, 1.01, math.nan])
def test_bad_min_p_is_refused(min_p):
    with pytest.raises(ValueError, match="min_p 必须在"):
        min_p_filter(FIVE, min_p=min_p)


@pytest.mark.parametrize("penalty", [0.0, -2.0, math.nan])
def test_bad_penalty_is_refused(penalty):
    with pytest.raises(ValueError, match="penalty 必须大于 0"):
        repetition_penalty(FIVE[None], torch.tensor([[0]]), penalty=penalty)


# 束搜索


EOS = 1


def random_step_fn(seed, *, vocab_size=3, scale=1.5):
    """每条前缀一个固定的随机分布（float64）；前缀相同，分布就相同。"""
    table = {}
    generator = torch.Generator().manual_seed(seed)

    def step_fn(prefixes):
        rows = []
        for prefix in map(tuple, prefixes.tolist()):
            if prefix not in table:
                logits = torch.randn(vocab_size, generator=generator, dtype=torch.float64) * scale
                table[prefix] = logits.log_softmax(-1)
            rows.append(table[prefix])
        return torch.stack(rows)

    return step_fn


def enumerate_all(step_fn, *, vocab_size, max_new_tokens, length_penalty):
    """穷举：所有以 EOS 结尾、或长度到上限的序列，按得分排序，返回最好的。"""
    best = None
    for length in range(1, max_new_tokens + 1):
        for tokens in itertools.product(range(vocab_size), repeat=length):
            if EOS in tokens[:-1] or (tokens[-1] != EOS and length < max_new_tokens):
                continue
            total = 0.0
            for t, token in enumerate(tokens):
                total += step_fn(torch.tensor([tokens[:t]], dtype=torch.long).view(1, t))[0, token].item()
            score = total / length**length_penalty
            if best is None or score > best[1]:
                best = (list(tokens), score)
    return best


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.6, 1.0, 2.0])
@pytest.mark.parametrize("seed", range(6))
def test_a_wide_enough_beam_is_exhaustive_search(seed, length_penalty):
    """V=3、T=4：束宽 V^(T-1) = 27 时与穷举相同。"""
    settings = dict(max_new_tokens=4, length_penalty=length_penalty)
    step_fn = random_step_fn(seed)
    tokens, score = beam_search(step_fn, num_beams=27, eos_token_id=EOS, **settings)
    best_tokens, best_score = enumerate_all(step_fn, vocab_size=3, **settings)
    assert tokens == best_tokens and score == pytest.approx(best_score, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_the_best_length_never_shrinks_as_the_length_penalty_grows(seed):
    """S₂/n₂^α > S₁/n₁^α ⇔ |S₂|/|S₁| < (n₂/n₁)^α，右边随 α 增大（n₂ > n₁）。"""
    settings = dict(num_beams=27, max_new_tokens=4, eos_token_id=EOS)
    lengths = [
        len(beam_search(random_step_fn(seed), length_penalty=alpha, **settings)[0])
        for alpha in (-2.0, -0.5, 0.0, 0.5, 1.0, 2.0, 4.0)
    ]
    assert lengths == sorted(lengths) and lengths[0] < lengths[-1]


def greedy(step_fn, *, max_new_tokens):
    tokens = []
    while len(tokens) < max_new_tokens and EOS not in tokens:
        tokens.append(step_fn(torch.tensor([tokens], dtype=torch.long).view(1, -1)).argmax(-1).item())
    return tokens


@pytest.mark.parametrize("seed", range(10))
def test_beam_of_one_that_stops_at_the_first_end_is_greedy(seed):
    for vocab_size in (3, 6):
        step_fn = random_step_fn(seed, vocab_size=vocab_size)
        settings = dict(num_beams=1, max_new_tokens=6, eos_token_id=EOS)
        tokens, _ = beam_search(step_fn, early_stopping=True, **settings)
        assert tokens == greedy(step_fn, max_new_tokens=6)
        tokens, _ = beam_search(step_fn, length_penalty=0.0, **settings)  # 总对数概率只会下降
        assert tokens == greedy(step_fn, max_new_tokens=6)


def test_beam_of_one_that_goes_on_may_leave_the_greedy_path():
    """EOS .6；另一个 token .4，其后每步概率 1。按平均对数概率，ln .4 / 4 高于 ln .6：默认会继续搜下去。"""
    rows = {0: [0.4, 0.6], 1: [1.0, 0.0], 2: [1.0, 0.0], 3: [1.0, 0.0]}

    def step_fn(prefixes):
        row = torch.tensor(rows[prefixes.shape[1]], dtype=torch.float64).log()
        return row.expand(prefixes.shape[0], 2)

    settings = dict(num_beams=1, max_new_tokens=4, eos_token_id=EOS)
    tokens, score = beam_search(step_fn, **settings)
    assert tokens == [0, 0, 0, 0] and score == pytest.approx(math.log(0.4) / 4)
    assert beam_search(step_fn, early_stopping=True, **settings)[0] == [EOS]
    assert beam_search(step_fn, length_penalty=0.0, **settings)[0] == [EOS]


def llama_beams(seed, *, vocab_size=7, prompt_length=3):
    torch.manual_seed(seed)
    model = tiny_llama(vocab_size, num_hidden_layers=1).eval()
    prompt = torch.randint(2, vocab_size, (1, prompt_length))

    def step_fn(prefixes):
        input_ids = torch.cat([prompt.expand(prefixes.shape[0], -1), prefixes], dim=1)
        with torch.no_grad():
            return model(input_ids).logits[:, -1].log_softmax(-1)

    def generate(**settings):
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            output_scores=True,
            return_dict_in_generate=True,
            **settings,
        )
        tokens = out.sequences[0, prompt_length:].tolist()
        return tokens[: tokens.index(EOS) + 1] if EOS in tokens else tokens, out.sequences_scores.item()

    return step_fn, generate


@pytest.mark.parametrize("early_stopping", [True, "never"])
@pytest.mark.parametrize("seed", range(6))
def test_beam_search_matches_generate_on_a_tiny_llama(seed, early_stopping):
    step_fn, generate = llama_beams(seed)
    for num_beams, length_penalty in itertools.product((2, 3), (-1.0, 0.0, 1.0, 2.0)):
        shared = dict(num_beams=num_beams, max_new_tokens=6, length_penalty=length_penalty)
        tokens, score = beam_search(
            step_fn, eos_token_id=EOS, early_stopping=early_stopping is True, **shared
        )
        expected_tokens, expected_score = generate(early_stopping=early_stopping, **shared)
        assert tokens == expected_tokens and score == pytest.approx(expected_score, rel=1e-4)


@pytest.mark.parametrize("seed", range(4))
def test_default_length_penalty_is_the_one_of_generate(seed):
    step_fn, generate = llama_beams(seed)
    expected = generate(num_beams=3, max_new_tokens=6, early_stopping="never")
    tokens, score = beam_search(step_fn, num_beams=3, max_new_tokens=6, eos_token_id=EOS)
    assert tokens == expected[0] and score == pytest.approx(expected[1], rel=1e-4)


# 被拒绝的错误写法：同一批输入、同一个真值


def wrong_top_p_cumsum(logits, p):
    """丢掉跨过 p 的那一个。"""
    values, order = logits.sort(descending=True, dim=-1)
    remove = values.softmax(-1).cumsum(-1) > p
    return logits.masked_fill(remove.scatter(-1, order, remove), -INF)


def wrong_top_p_unsorted_mask(logits, p):
    """掩码没有 scatter 回去。"""
    probs = logits.sort(descending=True, dim=-1).values.softmax(-1)
    return logits.masked_fill(probs.cumsum(-1) - probs >= p, -INF)


def wrong_top_p_extra(logits, p):
    """比需要的多留一个。"""
    values, order = logits.sort(descending=True, dim=-1)
    probs = values.softmax(-1)
    remove = (probs.cumsum(-1) - probs >= p).roll(1, dims=-1)
    remove[..., 0] = False
    return logits.masked_fill(remove.scatter(-1, order, remove), -INF)


@pytest.mark.rejects
@pytest.mark.parametrize("wrong", [wrong_top_p_cumsum, wrong_top_p_unsorted_mask, wrong_top_p_extra])
def test_wrong_top_p_is_rejected(wrong):
    logits = random_logits(40, 11)
    rows = logits.softmax(-1).tolist()

    def agreement(fn):
        masks = (fn(logits) > -INF).tolist()
        sets = [{i for i, alive in enumerate(mask) if alive} for mask in masks]
        return sum(s == nucleus(row, 0.8) for s, row in zip(sets, rows, strict=True))

    assert agreement(lambda x: top_p_filter(x, top_p=0.8)) == 40
    assert agreement(lambda x: wrong(x, 0.8)) < 20


@pytest.mark.rejects
def test_naive_cumsum_keeps_zero_two_three():
    """页面的边界表：p=.3、.76、.95，正确 1、3、4 个，`cumsum <= p` 得 0、2、3 个。"""
    for p, right, wrong in ((0.3, 1, 0), (0.76, 3, 2), (0.95, 4, 3)):
        assert kept(top_p_filter(FIVE.log(), top_p=p)) == right
        assert kept(wrong_top_p_cumsum(FIVE.log(), p)) == wrong


@pytest.mark.rejects
def test_temperature_multiplied_is_rejected():
    """升温应使熵增大；乘以温度使熵减小。"""
    entropy = torch.special.entr(FIVE).sum()
    hot = torch.special.entr(apply_temperature(FIVE.log(), temperature=2.0).softmax(-1)).sum()
    wrong = torch.special.entr((FIVE.log() * 2.0).softmax(-1)).sum()
    assert hot > entropy + 0.1 and wrong < entropy - 0.1


@pytest.mark.rejects
def test_top_k_by_indices_differs_on_ties():
    """按下标只留 k 个：并列时少留，与阈值写法（transformers）不同。"""
    logits = torch.tensor([[3.0, 2.0, 2.0, 1.0]])
    by_index = torch.full_like(logits, -INF).scatter(-1, logits.topk(2).indices, logits.topk(2).values)
    assert kept(by_index)[0] == 2 and kept(TopKLogitsWarper(2)(None, logits))[0] == 3
    assert kept(top_k_filter(logits, top_k=2))[0] == 3


@pytest.mark.rejects
def test_min_p_as_an_absolute_probability_is_rejected():
    """平坦的分布上绝对门槛会滤掉全部；相对门槛一个也不滤。"""
    flat = torch.zeros(1, 20, dtype=torch.float64)
    absolute = flat.masked_fill(flat.softmax(-1) < 0.1, -INF)
    assert kept(absolute)[0] == 0
    assert kept(min_p_filter(flat, min_p=0.1))[0] == kept(MinPLogitsWarper(0.1)(None, flat))[0] == 20


@pytest.mark.rejects
def test_repetition_penalty_that_divides_negative_logits_is_rejected():
    """负的 logit 除以 θ>1：概率反而变大。真值是「惩罚不能增加概率」。"""
    logits, seen = torch.tensor([[-1.0, 0.5, 0.0]], dtype=torch.float64), torch.tensor([[0]])
    before = logits.softmax(-1)[0, 0]
    wrong = logits.clone()
    wrong[0, 0] /= 1.3
    assert wrong.softmax(-1)[0, 0] > before + 0.02
    assert repetition_penalty(logits, seen, penalty=1.3).softmax(-1)[0, 0] < before - 0.02


@pytest.mark.rejects
def test_wrong_sign_of_the_length_penalty_is_rejected():
    """乘以 n^α 而不是除以：α=1 时偏向短的，与穷举的真值不同。"""
    differs = 0
    for seed in range(20):
        step_fn = random_step_fn(seed)
        settings = dict(vocab_size=3, max_new_tokens=4)
        truth, _ = enumerate_all(step_fn, length_penalty=1.0, **settings)
        wrong, _ = enumerate_all(step_fn, length_penalty=-1.0, **settings)
        ours, _ = beam_search(step_fn, num_beams=27, max_new_tokens=4, eos_token_id=EOS)
        assert ours == truth and len(wrong) <= len(truth)
        differs += wrong != truth
    assert differs >= 10


@pytest.mark.rejects
def test_keeping_only_k_candidates_starves_the_beam():
    """每步只取 k 个候选：EOS 占掉名额以后束变窄，可能断掉。三个 token、束宽 2，EOS 两条前缀都排在前面。"""
    rows = {(): [0.5, 0.1, 0.4], (0,): [0.1, 0.85, 0.05], (2,): [0.2, 0.7, 0.1]}

    def step_fn(prefixes):
        uniform = [0.98, 0.01, 0.01]
        return torch.tensor(
            [rows.get(tuple(p), uniform) for p in prefixes.tolist()], dtype=torch.float64
        ).log()

    totals = torch.tensor([[0.5], [0.4]], dtype=torch.float64).log() + step_fn(torch.tensor([[0], [2]]))
    assert (totals.flatten().topk(2).indices % 3 == EOS).all()  # 前两名都是 EOS：k 个候选就没有束可走了
    tokens, _ = beam_search(step_fn, num_beams=2, max_new_tokens=8, eos_token_id=EOS, length_penalty=3.0)
    assert len(tokens) == 8
