# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 基于规则的奖励：实验
#
# 页面 `docs/reasoning/rule-based-reward.md` 的实验：答案检查器的漏判与误判、弱规则能被怎样钻空子、判错对 GRPO 梯度的影响、几种打分写法的优势。

# %%
#| label: setup
import itertools
import math
import re

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.rule_based_reward import accuracy_reward, answers_equal, format_reward
from snippets.rl.dr_grpo import question_weight
from snippets.rl.grpo import group_advantages

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# 自己构造的小集合：(模型的答案, 标准答案, 是否等价)。测试用同一份，另跑 math-verify 与 verl 的检查器。
LABELLED_PAIRS = [
    # 等价：数的不同写法
    ("42", "42", True),
    ("1/2", "0.5", True),
    (r"\frac{1}{2}", "1/2", True),
    (r"\dfrac{3}{4}", r"\frac{3}{4}", True),
    (r"\frac12", "0.5", True),
    (r"-\frac{1}{2}", r"\frac{-1}{2}", True),
    (r"\frac{6}{3}", "2", True),
    (r"\frac{0.5}{2}", "1/4", True),
    ("2/4", "1/2", True),
    ("0.50", "0.5", True),
    (".5", "0.5", True),
    ("5.0", "5", True),
    ("007", "7", True),
    ("+3", "3", True),
    ("\u22123", "-3", True),
    ("1,234", "1234", True),
    ("1{,}234", "1234", True),
    ("12,345.60", "12345.6", True),
    (r"50\%", "0.5", True),
    ("12.5%", "1/8", True),
    ("$42$", "42", True),
    (r"\left(1,2\right)", "(1, 2)", True),
    # 等价：要懂代数、单位或题面才看得出
    (r"2\sqrt{3}", r"\sqrt{12}", True),
    ("x+1", "1+x", True),
    ("(0.5, 1)", r"(\frac{1}{2}, 1)", True),
    (r"\{1,2\}", r"\{2,1\}", True),
    ("x=3", "3", True),
    (r"12\text{ cm}", "12", True),
    (r"1\frac{1}{2}", "3/2", True),
    (r"90^\circ", "90", True),
    ("1e3", "1000", True),
    # 不等价
    ("12", "112", False),
    ("1", "10", False),
    ("-3", "3", False),
    ("1/2", "2/1", False),
    ("0.333", "1/3", False),
    ("3.14", r"\pi", False),
    ("50%", "50", False),
    ("0.5%", "0.5", False),
    ("12,34", "1234", False),
    ("1.234", "1,234", False),
    ("1 2", "12", False),
    ("(1,2)", "(2,1)", False),
    ("(1,2)", "[1,2]", False),
    ("0.1", "0.10001", False),
    ("0.1234567", "0.1234568", False),
    ("9007199254740993", "9007199254740992", False),
    ("2^{10}", "210", False),
    ("A", "B", False),
    (r"\frac{1}{0}", r"\frac{2}{0}", False),
    ("1234", "1,234", False),  # 标准答案是 1 与 234 两个数
]

# %%
#| label: checkers-on-labelled-pairs
#| caption: 自己构造的 51 对答案（31 对等价、20 对不等价）上，三种检查器的漏判与误判：逐字比几乎全漏，转成浮点数有新的误判，有理数比较只错在代数、单位和有歧义的记号
#| echo: fold


def exact_match(answer, gold):
    return answer == gold


def float_match(answer, gold):
    """流传的写法：能转成浮点数就比差值，否则逐字比。"""
    try:
        return abs(float(answer) - float(gold)) < 1e-6
    except ValueError:
        return answer == gold


num_equal = sum(label for *_, label in LABELLED_PAIRS)
checkers = {"逐字比": exact_match, "float 差小于 1e-6": float_match, "本页的有理数比较": answers_equal}
rows, mistakes = [], {}
for name, checker in checkers.items():
    wrong = [(a, g, label) for a, g, label in LABELLED_PAIRS if checker(a, g) != label]
    mistakes[name] = wrong
    missed = sum(label for *_, label in wrong)
    rows.append([name, f"{missed}/{num_equal}", f"{len(wrong) - missed}/{len(LABELLED_PAIRS) - num_equal}"])
assert (num_equal, len(LABELLED_PAIRS)) == (31, 51)
assert [row[1:] for row in rows] == [["30/31", "0/20"], ["24/31", "2/20"], ["9/31", "1/20"]]
assert [pair[0] for pair in mistakes["本页的有理数比较"]] == [a for a, *_ in LABELLED_PAIRS[22:31]] + ["1234"]
assert [pair[0] for pair in mistakes["float 差小于 1e-6"] if not pair[2]] == ["0.1234567", "9007199254740993"]
Markdown(tabulate(rows, headers=["检查器", "漏判", "误判"], tablefmt="github"))

# %%
#| label: attacks-on-weak-rules
#| caption: 同一批回答在弱规则与严格规则下的得分（正确加格式，满分 2）：弱规则给六种钻空子的写法满分，严格规则仍挡不住空话思考
#| echo: fold
GOLD = "12"


def weak_reward(response):
    """流传的写法：文本里出现过标准答案就算对，四个标签依次出现过就算格式对。"""
    found = re.search(r"<think>.*?</think>.*?<answer>.*?</answer>", response, re.DOTALL)
    return float(GOLD in response) + float(found is not None)


def wrap(thinking, answer):
    return f"<think>{thinking}</think>\n<answer>{answer}</answer>"


responses = {
    "正常：思考，框住 12": wrap("3 乘 4 得 12。", r"\boxed{12}"),
    "正常：思考，框住 13": wrap("3 加 10 得 13。", r"\boxed{13}"),
    "枚举：1、2、…、20": wrap("猜。", "，".join(str(n) for n in range(1, 21))),
    "框两个：12 和 13": wrap("猜。", r"\boxed{12} 或 \boxed{13}"),
    "答 112": wrap("猜。", r"\boxed{112}"),
    "思考里提到 12，框住 13": wrap("可能是 12。", r"\boxed{13}"),
    "思考套思考，框住 13": wrap("<think>12</think>", r"\boxed{13}"),
    "空思考，框住 12": wrap("", r"\boxed{12}"),
    "没有闭合 think": r"<think>得 12。<answer>\boxed{12}</answer>",
    "模板预填了开头的 think": r"得 12。</think><answer>\boxed{12}</answer>",
    "思考只有一个句点": wrap("。", r"\boxed{12}"),
}
rows = []
for name, response in responses.items():
    accuracy, form = accuracy_reward(response, GOLD), format_reward(response)
    rows.append([name, f"{weak_reward(response):.0f}", f"{accuracy:.0f} + {form:.0f}"])
assert [row[1] for row in rows] == ["2", "1", "2", "2", "2", "2", "2", "2", "1", "1", "2"]
strict = ["1 + 1", "0 + 1", "0 + 1", "0 + 1", "0 + 1", "0 + 1", "0 + 0", "1 + 0", "0 + 0", "1 + 0", "1 + 1"]
assert [row[2] for row in rows] == strict
Markdown(tabulate(rows, headers=["回答（标准答案 12）", "弱规则", "严格：正确 + 格式"], tablefmt="github"))

# %%
#| label: noise-and-expected-gradient
#| caption: 四条回答的策略、每组 8 条，枚举全部的组：随机判错只改倍数不改方向，系统性地不认一种写法会把这种对的写法往下压
#| echo: fold
GROUP_SIZE = 8
probs = torch.tensor([0.3, 0.2, 0.25, 0.25])  # 对（写法 A）、对（写法 B）、错、错
correct = torch.tensor([1.0, 1.0, 0.0, 0.0])
truth = probs * (correct - (probs * correct).sum())  # softmax 的 logits 上，正确率的梯度
scores = torch.eye(4) - probs  # 第 i 行：∂ log π(i) / ∂ logits


def expected_gradient(accept, *, scale_by_std):
    """accept[i] 是回答 i 被判对的概率；对（回答, 判决）的全部多重集求和。"""
    kinds = [(i, r) for i in range(4) for r in (0.0, 1.0)]
    kind_probs = torch.tensor([probs[i] * (accept[i] if r else 1 - accept[i]) for i, r in kinds])
    groups = torch.tensor(list(itertools.combinations_with_replacement(range(8), GROUP_SIZE)))  # (N, G)
    counts = torch.nn.functional.one_hot(groups, 8).sum(1)  # (N, 8)
    orders = math.factorial(GROUP_SIZE) / torch.exp(torch.lgamma(counts + 1.0)).prod(1)
    weights = orders * kind_probs[groups].prod(1)
    assert abs(weights.sum().item() - 1) < 1e-12
    rewards = torch.tensor([r for _, r in kinds])[groups]
    advantages = group_advantages(
        rewards.flatten(), group_size=GROUP_SIZE, eps=1e-12, scale_by_std=scale_by_std
    ).view_as(rewards)
    group_scores = scores[torch.tensor([i for i, _ in kinds])[groups]]  # (N, G, 4)
    return (weights[:, None] * (advantages[..., None] * group_scores).mean(1)).sum(0)


def channel(fn, fp):
    return correct * (1 - fn) + (1 - correct) * fp


cases = {
    "判得全对": channel(0.0, 0.0),
    "随机漏判 0.4": channel(0.4, 0.0),
    "随机误判 0.3": channel(0.0, 0.3),
    "漏判 0.3，误判 0.3": channel(0.3, 0.3),
    "漏判 0.6，误判 0.6": channel(0.6, 0.6),
    "一律不认写法 B": torch.tensor([1.0, 0.0, 0.0, 0.0]),
}
rows, clean = [], {}
for name, accept in cases.items():
    gradients = [expected_gradient(accept, scale_by_std=by_std) for by_std in (False, True)]
    clean.setdefault("scales", [(g @ truth / (truth @ truth)).item() for g in gradients])
    scales = [
        (g @ truth / (truth @ truth)).item() / c for g, c in zip(gradients, clean["scales"], strict=True)
    ]
    leftovers = [(g - (g @ truth) / (truth @ truth) * truth).norm() / g.norm() for g in gradients]
    assert abs(leftovers[0] - leftovers[1]) < 1e-9  # 除不除标准差，方向相同
    residual = leftovers[0].item()
    rows.append(
        [name, f"{scales[0]:.2f}", f"{scales[1]:.2f}", "0" if residual < 1e-9 else f"{residual:.2f}"]
        + [f"{gradients[0][1] * GROUP_SIZE / (GROUP_SIZE - 1):+.3f}"]
    )
    # 除标准差：倍数恰是 (1-a-b)·w(p̃)/w(p)，系统性漏判时换成梯度 w(p̃)∇p̃
    observed = (probs * accept).sum()
    predicted = question_weight(observed[None], group_size=GROUP_SIZE) * probs * (accept - observed)
    assert (gradients[1] - predicted).abs().max().item() < 1e-9
assert abs(clean["scales"][0] - 7 / 8) < 1e-12
assert [row[1] for row in rows] == ["1.00", "0.60", "0.70", "0.40", "-0.20", "0.69"]
assert [row[2] for row in rows][:5] == ["1.00", "0.63", "0.72", "0.40", "-0.20"]
assert [row[3] for row in rows][:5] == ["0"] * 5
assert abs((probs * correct * (1 - accept)).sum().item() / 0.5 - 0.4) < 1e-12  # 系统性的漏判率也是 0.4
assert rows[0][4] == "+0.100" and rows[1][4] == "+0.060" and rows[-1][4] == "-0.060" and rows[-1][3] == "0.69"
Markdown(
    tabulate(
        rows,
        headers=["判决", "只减均值", "除标准差", "残差", "写法 B 的梯度"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: step-left-after-noise
#| caption: 每组 8 条、除以标准差，判错之后期望步长剩下几成：漏判两成在正确率高的题上损失最大，误判两成在正确率低的题上损失最大；只减均值恒为八成
#| echo: fold
p = torch.linspace(0.01, 0.99, 99)


def step_left(p, *, fn, fp, group_size=8):
    """除标准差时，判错后的期望步长与判得全对时之比。"""
    observed = fp + (1 - fn - fp) * p
    weight = question_weight(observed, group_size=group_size) / question_weight(p, group_size=group_size)
    return (1 - fn - fp) * weight


fig, ax = plt.subplots(figsize=(6.0, 3.2))
ax.plot(p, step_left(p, fn=0.2, fp=0.0), "-", color="C0", label="漏判 0.2")
ax.plot(p, step_left(p, fn=0.0, fp=0.2), "--", color="C1", label="误判 0.2")
ax.axhline(0.8, linestyle=":", color="C2", label="只减均值，两种都是")
ax.set_xlim(0, 1)
ax.set_ylim(0.5, 1.0)
ax.set_xlabel("这道题真实的正确率")
ax.set_ylabel("期望步长剩下的比例")
ax.legend(loc="lower center", frameon=False)

ends = step_left(torch.tensor([0.05, 0.5, 0.95]), fn=0.2, fp=0.0).tolist()
assert [f"{x:.2f}" for x in ends] == ["0.81", "0.81", "0.66"], ends
mirror = step_left(torch.tensor([0.95, 0.5, 0.05]), fn=0.0, fp=0.2)
assert (mirror - torch.tensor(ends)).abs().max().item() < 1e-12  # 左右对称

# %%
#| label: reward-designs-and-advantages
#| caption: 一组四条，对错与格式各有无，七种打分写法的优势：只有正确一项时，正负 1 与 0/1 除以标准差后相同；等权相加时，对而无格式与错而有格式同分
#| echo: fold
acc, form = torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.tensor([1.0, 0.0, 1.0, 0.0])
designs = {
    "0/1": (acc, True),
    "±1": (2 * acc - 1, True),
    "0/1，只减均值": (acc, False),
    "±1，只减均值": (2 * acc - 1, False),
    "式 4：0/1 加格式": (acc + form, True),
    "±1 加格式": (2 * acc - 1 + form, True),
    "格式对才给正确分": (acc * form, True),
}
advantages = {
    name: group_advantages(rewards, group_size=4, scale_by_std=by_std)
    for name, (rewards, by_std) in designs.items()
}
assert (advantages["±1"] - advantages["0/1"]).abs().max().item() < 1e-6  # 只差分母里的 ε
assert torch.equal(advantages["±1，只减均值"], 2 * advantages["0/1，只减均值"])
summed = advantages["式 4：0/1 加格式"]
assert summed[1] == summed[2] == 0
assert advantages["±1 加格式"][1] > 0 > advantages["±1 加格式"][2]
# 全组格式都对：等权相加与只看正确没有区别
assert (group_advantages(acc + 1, group_size=4) - advantages["0/1"]).abs().max().item() < 1e-12
rows = [[name, *(f"{a:+.2f}" if a else "0" for a in values.tolist())] for name, values in advantages.items()]
assert rows[0][1:] == rows[1][1:] == ["+0.87", "+0.87", "-0.87", "-0.87"]
assert rows[4][1:] == ["+1.22", "0", "0", "-1.22"] and rows[5][1:] == ["+1.16", "+0.39", "-0.39", "-1.16"]
Markdown(
    tabulate(
        rows,
        headers=["打分", "对，有格式", "对，无格式", "错，有格式", "错，无格式"],
        tablefmt="github",
        disable_numparse=True,
    )
)
