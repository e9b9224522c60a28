r"""snippets/reasoning/rule_based_reward.py 的测试。

真值有五个来源：(1) 人工标注的 51 对答案（笔记本里的 LABELLED_PAIRS，用 ast 取字面量）与手写的对抗字符串；
(2) TRL 1.16 的 `think_format_reward`、`accuracy_reward`、`reasoning_accuracy_reward`，真实调用；(3) math-verify 0.9.0；
(4) verl 三个打分器冻结的结果，见 tests/golden/make_rule_based_reward.py；(5) 判错的影响用全部「回答×判决」的组精确枚举。
"""

import ast
import itertools
import json
import random
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from math_verify import parse, verify
from trl.rewards import accuracy_reward as trl_accuracy_reward
from trl.rewards import reasoning_accuracy_reward, think_format_reward

from snippets.reasoning.rule_based_reward import (
    accuracy_reward,
    answers_equal,
    extract_boxed,
    format_reward,
    language_consistency_reward,
    rule_reward,
)
from snippets.rl.dr_grpo import question_weight
from snippets.rl.grpo import group_advantages

ROOT = Path(__file__).parents[3]
GOLDEN = json.loads((ROOT / "tests/golden/rule_based_reward.json").read_text(encoding="utf-8"))


def notebook_pairs():
    source = (ROOT / "notebooks/reasoning/rule_based_reward.py").read_text(encoding="utf-8")
    for node in ast.parse(source).body:
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "LABELLED_PAIRS":
            return ast.literal_eval(node.value)
    raise LookupError("笔记本里没有 LABELLED_PAIRS。")


PAIRS = notebook_pairs()


def mistakes(verdicts):
    """（假阴性, 假阳性）：各是判错的答案。"""
    wrong = [(a, label) for (a, _, label), v in zip(PAIRS, verdicts, strict=True) if bool(v) != label]
    return [a for a, label in wrong if label], [a for a, label in wrong if not label]


def trl(reward, text, *args):
    return reward([[{"content": text}]], *([arg] for arg in args))[0]


def wrap(thinking, answer):
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


# 手写真值


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("<think>a</think><answer>b</answer>", 1),
        ("\n<think>a\nb</think>\n\n<answer>c\nd</answer>\n", 1),
        ("<think>1 < 2 且 3 > 2</think><answer>b</answer>", 1),  # 别的尖括号不算标签
        ("<think></think><answer>b</answer>", 0),
        ("<think> \n</think><answer>b</answer>", 0),
        ("<think>a</think><answer> </answer>", 0),
        ("<think>a</think>b", 0),
        ("a</think><answer>b</answer>", 0),
        ("<think>a<answer>b</answer>", 0),
        ("<think>a</think><answer>b", 0),
        ("<think><think>a</think><answer>b</answer>", 0),
        ("<think>a</think></think><answer>b</answer>", 0),
        ("<think>a</think><answer>b</answer><answer>c</answer>", 0),
        ("<think>a</think><answer>b</answer>尾巴", 0),
        ("开头<think>a</think><answer>b</answer>", 0),
        ("<think>a</think>中间<answer>b</answer>", 0),
        ("<answer>b</answer><think>a</think>", 0),
        ("<think>a<answer>x</answer></think><answer>b</answer>", 0),
        ("<THINK>a</THINK><answer>b</answer>", 0),
        ("", 0),
    ],
)
def test_format_reward_by_hand(response, expected):
    assert format_reward(response) == expected


def test_format_reward_survives_long_responses():
    """十万字的思考：不爆栈，也不因为没有闭合而指数回溯。"""
    assert format_reward(wrap("字" * 100_000, "1")) == 1
    assert format_reward("<think>" + "字" * 100_000) == 0


def test_degenerate_responses_take_linear_time():
    """没闭合的框、长空白、没闭合的公式各重复十万次：平方时间会跑上几十分钟。"""
    assert accuracy_reward(r"\boxed{" * 100_000, "1") == 0
    assert answers_equal("a" + " " * 100_000 + "b", "a b")
    assert language_consistency_reward(r"\(" * 100_000 + r"\[" * 100_000 + "好", target="zh") == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (r"\boxed{12}", "12"),
        (r"\boxed{ 12 }", "12"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{1} 又 \boxed{2}", "2"),
        (r"\boxed {3}", "3"),
        (r"\boxed{\{1,2\}}", r"\{1,2\}"),
        (r"\boxed{\left\{x\right.}", r"\left\{x\right."),  # 转义的左括号没有配对的右括号
        (r"\boxed{}", ""),
        (r"\boxed{1} 又 \boxed{2", None),
        ("没有框", None),
        (r"\boxed 5", None),
        (r"\boxed{\boxed{1} 又 2}", "1"),
        (r"a} \boxed{1}", "1"),  # 前面多出来的右括号
        (r"\boxed{a\\{b}}", r"a\\{b}"),  # 两个反斜杠是换行，后面的括号照常计数
        (r"见 \\boxed{1}", "1"),
    ],
)
def test_extract_boxed_by_hand(text, expected):
    assert extract_boxed(text) == expected


def test_labelled_pairs_our_mistakes_are_the_documented_ones():
    """九个假阴性都要懂代数、单位或题面；一个假阳性是有歧义的 1,234。"""
    missed, accepted = mistakes(answers_equal(a, g) for a, g, _ in PAIRS)
    assert len(PAIRS) == 51 and sum(label for *_, label in PAIRS) == 31
    assert missed == [a for a, *_ in PAIRS[22:31]] and accepted == ["1234"]


def test_accuracy_reward_by_hand():
    assert accuracy_reward(r"\boxed{0.5}", "1/2") == 1
    assert accuracy_reward(wrap("x", r"\boxed{0.5} 即 \boxed{\frac12}"), "1/2") == 1
    assert accuracy_reward(wrap("x", r"\boxed{1} 或 \boxed{2}"), "1") == 0
    assert accuracy_reward(wrap("x", r"\boxed{1} 或 \boxed{2}"), "2") == 0
    assert accuracy_reward(wrap(r"\boxed{7}", r"\boxed{8}"), "8") == 1
    assert accuracy_reward(wrap(r"\boxed{7}", r"\boxed{8}"), "7") == 0
    assert accuracy_reward(wrap(r"\boxed{7}", "不知道"), "7") == 0
    assert accuracy_reward(wrap("x", "7"), "7") == 0  # 没有框
    assert accuracy_reward(r"\boxed{7} 即 \boxed{7", "7") == 0  # 后一个框被截断
    assert accuracy_reward(r"\boxed{7</think>\boxed{8}", "8") == 1
    assert accuracy_reward(r"<think>\boxed{7}", "7") == 0  # 思考没有闭合：没有答案
    assert accuracy_reward(wrap("x", "") + r"<think>\boxed{7}", "7") == 0
    assert accuracy_reward(r"x</think>\boxed{7}", "7") == 1  # 开头的标签由模板预填
    assert accuracy_reward(r"\boxed{}", "") == 0


def test_equation_4_adds_with_equal_weight():
    assert rule_reward(wrap("x", r"\boxed{1}"), "1") == 2
    assert rule_reward(wrap("x", r"\boxed{2}"), "1") == 1
    assert rule_reward(r"\boxed{1}", "1") == 1
    assert rule_reward("1", "1") == 0


def test_language_consistency_by_hand():
    """「我们设x为未知」：七个词里六个汉字一个拉丁词；比例 6/7。"""
    ratio = language_consistency_reward
    assert ratio("我们设x为未知", target="zh") == pytest.approx(6 / 7)
    assert ratio("We let x be 未知", target="en") == pytest.approx(4 / 6)
    assert ratio("don't stop", target="en") == 1 and ratio("don't 停", target="en") == 0.5
    assert ratio(r"由 $x+y$ 与 \(\alpha b\) 与 \frac 得", target="zh") == 1  # 公式不计
    assert ratio("let$x$be 好", target="en") == pytest.approx(2 / 3)  # 公式两边仍是两个词
    assert ratio("Wait, 等等", target="zh") + ratio("Wait, 等等", target="en") == 1
    assert ratio("123 + 456", target="zh") == 0 == ratio("", target="en")
    assert ratio("好", target="zh") == 1  # 一个字也是满分：它不管内容
    with pytest.raises(ValueError, match="只认 zh 与 en"):
        ratio("好", target="ja")


# 对照独立实现


def test_trl_think_format_reward_checks_only_the_think_tag():
    """我们的格式更严：我们给 1 的 TRL 都给 1，反过来不成立。"""
    tags = ["<think>", "</think>", "<answer>", "</answer>", "a", "\n"]
    strictly = 0
    for parts in itertools.product(tags, repeat=6):
        text = "".join(parts)
        ours, theirs = format_reward(text), trl(think_format_reward, text)
        assert ours <= theirs or text[0] == "\n", text  # TRL 不许开头有空白
        strictly += ours < theirs
        # TRL 1.16 的正则等价于：以 <think> 开头、只此一个、后面有 </think>
        by_hand = text.startswith("<think>") and text.count("<think>") == 1 and "</think>" in text
        assert theirs == by_hand, text
    assert strictly > 1000


def test_trl_think_format_reward_pays_for_empty_thinking_and_trailing_text():
    for text in [
        "<think></think>",
        "<think></think>12",
        "<think>a</think></think>b",
        wrap("a", "b") + "尾巴",
    ]:
        assert trl(think_format_reward, text) == 1 and format_reward(text) == 0
    assert trl(think_format_reward, "a</think>b") == 0  # 模板预填开头标签时，人人 0 分


def test_trl_accuracy_reward_behaviours_named_on_the_page():
    assert trl(trl_accuracy_reward, r"\boxed{0.5}", r"\frac{1}{2}") == 1
    assert trl(trl_accuracy_reward, r"\boxed{A}", "A") is None  # 标准答案解析不了
    assert trl(trl_accuracy_reward, r"<think>\boxed{12}</think> 不知道", "12") == 1
    assert trl(reasoning_accuracy_reward, r"<think>\boxed{12}</think> 不知道", "12") == 0
    assert accuracy_reward(r"<think>\boxed{12}</think> 不知道", "12") == 0
    for text in (r"\boxed{12} 或 \boxed{13}", r"\boxed{13} 或 \boxed{12}"):
        assert trl(trl_accuracy_reward, text, "12") == 0


def test_math_verify_on_labelled_pairs():
    """math-verify 0.9.0，两边都放进框里：懂代数与单位，漏科学计数法；百分号、六位舍入、千分位是它的假阳性。"""
    boxed = [(parse(rf"\boxed{{{g}}}"), parse(rf"\boxed{{{a}}}")) for a, g, _ in PAIRS]
    missed, accepted = mistakes(verify(gold, answer) for gold, answer in boxed)
    assert missed == ["1e3"] and accepted == ["50%", "0.1234567", "1234"]


def test_math_verify_needs_a_delimited_gold_answer():
    """标准答案不加框也不加美元号（TRL 1.16 直接 parse 标准答案）：多漏五对带 LaTeX 或未知数的。"""
    mixed = [(parse(g), parse(rf"\boxed{{{a}}}")) for a, g, _ in PAIRS]
    missed, accepted = mistakes(verify(gold, answer) for gold, answer in mixed)
    assert len(missed) == 6 and accepted == ["50%", "0.1234567", "1234"]
    response = r"\boxed{2\sqrt{3}}"
    assert trl(trl_accuracy_reward, response, r"\sqrt{12}") is None
    assert trl(trl_accuracy_reward, response, r"$\sqrt{12}$") == 1


def test_golden_pairs_are_the_notebook_pairs():
    assert GOLDEN["pairs"] == [list(pair) for pair in PAIRS]


def test_verl_string_scorers_miss_more_than_rational_comparison():
    """verl 的两个数学打分器比整理后的字符串：31 对等价里漏 21 与 24 对，还把「1 2」当成 12。"""
    for name, counts in {"math_reward": (21, 1), "math_dapo": (24, 3)}.items():
        missed, accepted = mistakes(GOLDEN[name])
        assert (len(missed), len(accepted)) == counts and "1 2" in accepted


def test_verl_boxed_extraction_agrees_where_braces_are_not_escaped_alone():
    for text, verl in zip(GOLDEN["responses"], GOLDEN["last_boxed"], strict=True):
        ours = extract_boxed(text)
        assert (None if ours is None else rf"\boxed{{{ours}}}") == verl, text


def test_verl_gsm8k_flexible_takes_the_last_number_anywhere():
    found = dict(zip(GOLDEN["responses"], GOLDEN["gsm8k_flexible"], strict=True))
    strict = dict(zip(GOLDEN["responses"], GOLDEN["gsm8k_strict"], strict=True))
    assert found["先得 7，最后是 12 个"] == "12" and strict["先得 7，最后是 12 个"] is None
    assert strict["#### 1,234"] == "1234" and found["#### 1,234"] == "1,234"


def test_verl_math_dapo_scores_plus_or_minus_one():
    score = dict(zip(GOLDEN["responses"], GOLDEN["math_dapo_score"], strict=True))
    assert set(score.values()) == {1.0, -1.0} and score["Answer: 12 km"] == 1.0


# 性质


def spellings(value: Fraction):
    """同一个有理数的写法，由分子分母直接拼出来。"""
    top, bottom = value.numerator, value.denominator
    yield f"{top}/{bottom}"
    yield rf"\frac{{{top}}}{{{bottom}}}"
    yield rf" \dfrac{{{3 * top}}}{{{3 * bottom}}} "
    yield rf"${2 * top}/{2 * bottom}$"
    if bottom in (1, 2, 4, 5, 8):  # 有限小数
        thousandths = top * 1000 // bottom
        sign, digits = ("-" if top < 0 else ""), abs(thousandths)
        yield f"{sign}{digits // 1000}.{digits % 1000:03d}"
        yield f"{sign}{digits // 1000:,}.{digits % 1000:03d}00"
        yield f"{sign}{digits // 10}.{digits % 10}\\%"


def test_equality_is_equality_of_rationals():
    generator = random.Random(0)
    values = [Fraction(generator.randint(-5000, 5000), generator.randint(1, 9)) for _ in range(40)] + [
        Fraction(0)
    ]
    for x, y in itertools.product(values, values):
        a, b = generator.choice(list(spellings(x))), generator.choice(list(spellings(y)))
        assert answers_equal(a, b) is (x == y), (a, b)
    for x in values:
        assert all(answers_equal(a, b) for a, b in itertools.product(spellings(x), repeat=2)), x


def test_equality_is_reflexive_and_symmetric_on_the_labelled_set():
    texts = sorted({text for a, g, _ in PAIRS for text in (a, g)})
    assert all(answers_equal(text, text) for text in texts)
    for a, b in itertools.product(texts, repeat=2):
        assert answers_equal(a, b) is answers_equal(b, a)


def test_hostile_answers_are_compared_as_text_and_never_evaluated():
    for answer in [
        "1e9999999",
        "9**9**9",
        "__import__('os').getcwd()",
        "1/0",
        "9" * 5000,
        "１２",
        "1_000",
        "",
    ]:
        assert not answers_equal(answer, "12"), answer
    assert not answers_equal("1234,567", "1234567") and answers_equal("1,234,567", "1234567")
    assert answers_equal(r"\tfrac{1}{2}", r"\dfrac{2}{4}") and not answers_equal("1/3", "0.333333333333")
    assert not answers_equal(r"1\;2", "12") and answers_equal(r"(1,\;2)", "(1,2)")
    assert not answers_equal("1_000", "1000") and not answers_equal("", "")
    assert answers_equal("9" * 5000, "9" * 5000)
    assert answers_equal("0" * 199 + "1", "1") and not answers_equal(
        "0" * 200 + "1", "1"
    )  # 数字至多 200 个字符
    assert answers_equal("1/1,000", "0.001")
    assert not answers_equal("XY", "Y")  # 两头去掉的只有 $
    assert not answers_equal(r"\displaystyleX", "X") and not answers_equal(
        r"\dfracA", r"\fracA"
    )  # 是别的命令


# 判错对梯度的影响：精确枚举


def enumerate_gradient(probs, accept, *, group_size, scale_by_std):
    """对每个（回答, 判决）的有序组求和，乘上组的概率；得分函数由 autograd 给出。"""
    logits = probs.log().requires_grad_()
    log_probs = torch.log_softmax(logits, 0)
    kinds = [(i, r) for i in range(len(probs)) for r in (0.0, 1.0)]
    chance = [probs[i] * (accept[i] if r else 1 - accept[i]) for i, r in kinds]
    total = torch.zeros((), dtype=torch.float64)
    for group in itertools.product(range(len(kinds)), repeat=group_size):
        rewards = torch.tensor([kinds[k][1] for k in group], dtype=torch.float64)
        advantages = group_advantages(rewards, group_size=group_size, eps=1e-12, scale_by_std=scale_by_std)
        weight = torch.stack([chance[k] for k in group]).prod()
        total = total + weight * (advantages * log_probs[[kinds[k][0] for k in group]]).mean()
    return torch.autograd.grad(total, logits)[0]


PROBS = torch.tensor([0.4, 0.25, 0.35], dtype=torch.float64)  # 对、对（另一种写法）、错
CORRECT = torch.tensor([1.0, 1.0, 0.0], dtype=torch.float64)
TRUTH = PROBS * (CORRECT - (PROBS * CORRECT).sum())


def test_true_gradient_by_finite_differences():
    def success(logits):
        return (torch.softmax(logits, 0) * CORRECT).sum()

    steps = 1e-6 * torch.eye(3, dtype=torch.float64)
    numeric = [(success(PROBS.log() + h) - success(PROBS.log() - h)) / 2e-6 for h in steps]
    torch.testing.assert_close(torch.stack(numeric), TRUTH, rtol=1e-6, atol=1e-9)  # 差分误差


@pytest.mark.rejects
@pytest.mark.parametrize(
    ("fn", "fp"), [(0.0, 0.0), (0.3, 0.0), (0.0, 0.2), (0.25, 0.1), (0.6, 0.6), (0.5, 0.5)]
)
def test_random_verdict_errors_only_rescale_the_gradient(fn, fp):
    """只减均值：(G-1)/G·(1-a-b)·∇p；除以标准差：再把 (G-1)/G 换成 w_G(b+(1-a-b)p)。"""
    accept = CORRECT * (1 - fn) + (1 - CORRECT) * fp
    centered = enumerate_gradient(PROBS, accept, group_size=3, scale_by_std=False)
    torch.testing.assert_close(centered, 2 / 3 * (1 - fn - fp) * TRUTH)
    scaled = enumerate_gradient(PROBS, accept, group_size=4, scale_by_std=True)
    observed = (PROBS * accept).sum()
    weight = question_weight(observed[None], group_size=4)
    torch.testing.assert_close(scaled, weight * (1 - fn - fp) * TRUTH)
    # 流传的错误：漏判「只是少了些正样本，梯度不变」「倍数是 (1-a)(1-b)」
    if fn and fp:
        assert (centered - 2 / 3 * (1 - fn) * (1 - fp) * TRUTH).abs().max() > 0.003


def test_systematic_false_negatives_push_a_correct_spelling_down():
    accept = torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    gradient = enumerate_gradient(PROBS, accept, group_size=3, scale_by_std=False)
    observed = (PROBS * accept).sum()
    torch.testing.assert_close(gradient, 2 / 3 * PROBS * (accept - observed))
    assert TRUTH[1] > 0 > gradient[1]


def test_plus_minus_one_equals_zero_one_only_after_dividing_by_std():
    for k in range(1, 8):
        zero_one = torch.tensor([1.0] * k + [0.0] * (8 - k), dtype=torch.float64)
        signed = 2 * zero_one - 1
        scaled = [group_advantages(r, group_size=8) for r in (zero_one, signed)]
        torch.testing.assert_close(scaled[0], scaled[1], rtol=2e-6, atol=0)  # 只差分母里的 1e-6
        exact = [group_advantages(r, group_size=8, eps=0.0) for r in (zero_one, signed)]
        torch.testing.assert_close(*exact)
        centered = [group_advantages(r, group_size=8, scale_by_std=False) for r in (zero_one, signed)]
        torch.testing.assert_close(2 * centered[0], centered[1])
        # 已知噪声率时的去偏 (R - b) / (1 - a - b)：正斜率的仿射变换，除以标准差后不留痕迹
        debiased = group_advantages((zero_one - 0.1) / (1 - 0.3 - 0.1), group_size=8, eps=0.0)
        torch.testing.assert_close(debiased, exact[0])
