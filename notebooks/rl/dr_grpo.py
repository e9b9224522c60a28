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
# # Dr. GRPO（GRPO Done Right）：实验
#
# 页面 `docs/rl/dr-grpo.md` 的实验：每个 token 的权重、除以标准差等于给每道题加的权、每种写法期望上是谁的梯度（全部组的精确枚举），以及除以长度带来的漂移。

# %%
#| label: setup
import itertools
import math
from collections import Counter

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.clip import clipped_surrogate_loss
from snippets.rl.dr_grpo import dr_grpo_loss, question_weight
from snippets.rl.grpo import group_advantages
from snippets.rl.masking import aggregate_loss
from snippets.rl.rloo import leave_one_out_advantages, reinforce_loss

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
GRPO, TOKEN_MEAN, CONSTANT = "seq-mean-token-mean", "token-mean", "seq-mean-token-sum-norm"


def policy_loss(log_probs, advantages, mask, *, mode, max_response_length=None):
    """给定优势与聚合方式的损失；ρ=1，裁剪不起作用。"""
    token_losses = clipped_surrogate_loss(log_probs, log_probs.detach(), advantages[:, None])
    return aggregate_loss(token_losses, mask, mode=mode, max_response_length=max_response_length)


# %%
#| label: token-weights
#| caption: 一组四条回答，50 与 2000 个 token 各一对一错，反向传播量出的权重比：GRPO 单个 token 差 40 倍
#| echo: fold
lengths = torch.tensor([50, 2000, 50, 2000])
rewards = torch.tensor([1.0, 1.0, 0.0, 0.0])
mask = torch.arange(2000) < lengths[:, None]
centered = group_advantages(rewards, group_size=4, scale_by_std=False)
by_std = group_advantages(rewards, group_size=4)
losses = {
    "GRPO": lambda x: policy_loss(x, by_std, mask, mode=GRPO),
    "DAPO（token-mean）": lambda x: policy_loss(x, by_std, mask, mode=TOKEN_MEAN),
    "Dr. GRPO": lambda x: dr_grpo_loss(x, x.detach(), rewards, mask, group_size=4, max_response_length=3000),
    "误传：Dr. GRPO 再把优势除以长度": lambda x: policy_loss(
        x, centered / lengths, mask, mode=CONSTANT, max_response_length=3000
    ),
    "误传：GRPO 再把优势除以长度": lambda x: policy_loss(x, by_std / lengths, mask, mode=GRPO),
}
rows, table = [], {}
for name, loss in losses.items():
    log_probs = torch.zeros(4, 2000, requires_grad=True)
    (grad,) = torch.autograd.grad(loss(log_probs), log_probs)
    token, answer = grad[:, 0].abs(), grad.sum(1).abs()  # 单个 token 的权重、整条回答的权重
    assert (grad[:2] <= 0).all() and (grad[2:] >= 0).all()  # 对的往上推，错的往下压
    ratios = [(token[i] / token[i + 1]).item() for i in (0, 2)] + [
        (answer[i] / answer[i + 1]).item() for i in (0, 2)
    ]
    assert abs(ratios[0] - ratios[1]) < 1e-9 and abs(ratios[2] - ratios[3]) < 1e-9  # 对错两边同一个比
    table[name] = (ratios[0], ratios[2])
    rows.append([name] + [f"{r:.0f} : 1" if r > 0.99 else f"1 : {1 / r:.0f}" for r in (ratios[0], ratios[2])])
assert [row[1] for row in rows] == ["40 : 1", "1 : 1", "1 : 1", "40 : 1", "1600 : 1"]
assert [row[2] for row in rows] == ["1 : 1", "1 : 40", "1 : 40", "1 : 1", "40 : 1"]
Markdown(tabulate(rows, headers=["写法", "单个 token", "整条回答"], tablefmt="github"))

# %%
#| label: question-weights
#| caption: 除以组标准差给每道题的期望权重，各自以正确率一半处为 1：组越大，两端抬得越高；Dr. GRPO 是水平线
#| echo: fold
p = torch.linspace(0.01, 0.99, 99)
half = torch.tensor([0.5])
fig, ax = plt.subplots(figsize=(6.0, 3.6))
curves = {
    "G=4": (question_weight(p, group_size=4) / question_weight(half, group_size=4), "-", "C0"),
    "G=8": (question_weight(p, group_size=8) / question_weight(half, group_size=8), "-", "C1"),
    "G=16": (question_weight(p, group_size=16) / question_weight(half, group_size=16), "-.", "C2"),
    "G=64": (question_weight(p, group_size=64) / question_weight(half, group_size=64), "-", "C3"),
    "组无穷大": (0.5 * (p * (1 - p)).rsqrt(), ":", "C4"),
}
for name, (curve, style, color) in curves.items():
    ax.plot(p, curve.clamp(max=3.6), style, color=color, label=name)
ax.axhline(1.0, linestyle="--", color="C5", label="Dr. GRPO")
ax.set_xlim(0, 1)
ax.set_ylim(0.8, 3.5)
ax.set_xlabel("这道题的正确率")
ax.set_ylabel("相对权重")
ax.legend(loc="upper center", ncols=2, frameon=False)


def relative(rate, group_size):
    weights = question_weight(torch.tensor([rate, 0.5]), group_size=group_size)
    return (weights[0] / weights[1]).item()


assert f"{relative(0.05, 8):.2f} {relative(0.05, 16):.2f} {relative(0.05, 64):.2f}" == "1.33 1.69 2.19"
assert f"{0.5 / math.sqrt(0.05 * 0.95):.2f}" == "2.29"
assert f"{relative(0.0, 8):.2f}" == "1.43"  # G=8 的上限
for group_size in (2, 3):  # 混合组的标准差只有一个值
    flat = question_weight(p, group_size=group_size)
    assert (flat - flat[0]).abs().max().item() < 1e-12
# 只看组内：8 条里对 1 条，与对 4 条的标准差之比
one, four = (torch.tensor([1.0] * k + [0.0] * (8 - k)).std().item() for k in (1, 4))
assert f"{four / one:.2f}" == "1.51"
# 权重大不等于更新大：logit 参数化下 ∇p=p(1-p)，p=0.05 的更新仍只有 p=0.5 的四分之一
assert f"{relative(0.05, 8) * 0.05 * 0.95 / 0.25:.2f}" == "0.25"

# %%
#| label: exact-gradients
#| caption: 两道题、每组 8 条，枚举全部的组求期望梯度，与期望正确率的真梯度比：只有不除长度的写法在题内平行，只有再去掉标准差才在题间也平行
#| echo: fold
HORIZON, GROUP_SIZE = 3, 8
# 词表 {停, 续}，最长 3 个 token：四条回答，长度 1、2、3、3（最后一条被截断）
answer_lengths = torch.tensor([1, 2, 3, 3])
answer_mask = torch.arange(HORIZON) < answer_lengths[:, None]  # (4, 3)
stops = torch.eye(4, HORIZON, dtype=torch.bool)  # 第 i 条在第 i 个位置停


def answer_log_probs(stop_logits):
    """每个位置一个停的 logit → 四条回答的逐 token 对数概率 (4, 3)。"""
    stop, go = torch.nn.functional.logsigmoid(stop_logits), torch.nn.functional.logsigmoid(-stop_logits)
    return torch.where(stops, stop, go).masked_fill(~answer_mask, 0.0)


def expected_gradient(stop_logits, correct, loss_fn, *, group_size=GROUP_SIZE):
    """对全部大小为 group_size 的组求和：组的概率 × 这一组的梯度。"""
    log_probs = answer_log_probs(stop_logits)
    probs = log_probs.sum(1).exp().detach()
    total = torch.zeros(())
    for answers in itertools.combinations_with_replacement(range(4), group_size):
        orders = math.factorial(group_size) / math.prod(map(math.factorial, Counter(answers).values()))
        answers = list(answers)
        loss = loss_fn(log_probs[answers], correct[answers], answer_mask[answers])
        total = total + orders * probs[answers].prod() * loss
    return -torch.autograd.grad(total, stop_logits)[0]


def true_gradient(stop_logits, values):
    return torch.autograd.grad((answer_log_probs(stop_logits).sum(1).exp() * values).sum(), stop_logits)[0]


def using(mode, *, scale_by_std):
    def loss(log_probs, correct, mask):
        advantages = group_advantages(correct, group_size=len(correct), scale_by_std=scale_by_std)
        return policy_loss(log_probs, advantages, mask, mode=mode, max_response_length=1)

    return loss


def dr_grpo(log_probs, correct, mask):
    options = {"group_size": len(correct), "max_response_length": 1}  # 常数取 1，倍数好读
    return dr_grpo_loss(log_probs, log_probs.detach(), correct, mask, **options)


def rloo(log_probs, correct, mask):
    return reinforce_loss(log_probs, leave_one_out_advantages(correct, group_size=len(correct)), mask).mean()


def no_mean(log_probs, correct, mask):
    return policy_loss(log_probs, correct, mask, mode=CONSTANT, max_response_length=1)


correct_answers = torch.tensor([0.0, 1.0, 0.0, 1.0])  # 第 2、4 条是对的
questions = [  # 停的 logits；题 A 难，题 B 居中
    (torch.tensor([2.5, 0.5, 0.5], requires_grad=True), correct_answers),
    (torch.tensor([-0.5, 0.0, 0.5], requires_grad=True), correct_answers),
]
success = [(answer_log_probs(z).sum(1).exp() * correct).sum().item() for z, correct in questions]
truths = [true_gradient(z, correct) for z, correct in questions]
variants = {
    "Dr. GRPO": dr_grpo,
    "RLOO，按条求和": rloo,
    "均值也不减": no_mean,
    r"只去 $1/\lvert o\rvert$": using(CONSTANT, scale_by_std=True),
    "只去标准差": using(GRPO, scale_by_std=False),
    "GRPO": using(GRPO, scale_by_std=True),
    "token-mean，去标准差": using(TOKEN_MEAN, scale_by_std=False),
}


def residual(actual, direction):
    """投影到真梯度上之后剩下的比例，0 表示平行。"""
    scale = actual @ direction / (direction @ direction)
    return ((actual - scale * direction).norm() / actual.norm()).item()


def shown(value):
    return "0" if value < 1e-12 else f"{value:.3f}"


rows, stored, expected = [], {}, {}
for name, loss_fn in variants.items():
    gradients = [expected_gradient(z, correct, loss_fn) for z, correct in questions]
    scales = [(g @ t / (t @ t)).item() for g, t in zip(gradients, truths, strict=True)]
    inside = max(residual(g, t) for g, t in zip(gradients, truths, strict=True))
    together = residual(torch.cat(gradients), torch.cat(truths))
    rows.append([name, shown(inside), *(f"{scale:.3f}" for scale in scales), shown(together)])
    stored[name] = (inside, *scales, together)
    expected[name] = gradients

assert f"{success[0]:.2f} {success[1]:.2f}" == "0.06 0.43"
dr, plain_rloo, std_only = stored["Dr. GRPO"], stored["RLOO，按条求和"], rows[3]
assert max(abs(scale - 7 / 8) for scale in dr[1:3]) < 1e-12  # (G-1)/G
assert max(abs(scale - 1) for scale in plain_rloo[1:3] + stored["均值也不减"][1:3]) < 1e-12
assert rows[0][4] == rows[1][4] == rows[2][4] == "0" and std_only[1] == "0"
expected_weights = question_weight(torch.tensor(success), group_size=GROUP_SIZE)
for scale, weight in zip(stored[std_only[0]][1:3], expected_weights.tolist(), strict=True):
    assert abs(scale / weight - 1) < 1e-5  # group_advantages 的分母多 1e-6
assert std_only[2:] == ["2.290", "1.748", "0.077"]
assert f"{expected_weights[0] / expected_weights[1]:.2f}" == "1.31"
# 只留 1/|o|：恰是把奖励换成 (R-J)/|o| 的梯度，J 当常数
for (z, correct), rate, gradient in zip(questions, success, expected["只去标准差"], strict=True):
    pseudo = true_gradient(z, (correct - rate) / answer_lengths)
    assert (gradient - 7 / 8 * pseudo).abs().max().item() < 1e-12
# token-mean 按组除长度，等于再给题目乘平均长度的倒数
assert f"{stored['token-mean，去标准差'][1] / stored['token-mean，去标准差'][2]:.2f}" == "1.54"
assert [row[1] for row in rows[4:]] == ["0.271", "0.271", "0.036"]
assert [row[4] for row in rows[4:]] == ["0.273", "0.262", "0.135"]
Markdown(
    tabulate(
        rows,
        headers=["写法", "题内残差", "题 A 倍数", "题 B 倍数", "合起来残差"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: length-drift
#| caption: 奖励与长度无关的玩具，真梯度处处为 0；五个种子的期望长度：除以自己的长度时错答从 8.4 涨到 38 以上、对答缩到 1.2，另外两种不动
#| echo: fold
CAP, PROMPTS, STEPS, SEEDS = 60, 32, 200, 5
positions = torch.arange(1, CAP + 1)


def expected_length(stop_logit):
    """每步以 σ(z) 的概率停、最多 60 步的期望长度。"""
    stop = stop_logit.sigmoid()
    return (1 - (1 - stop) ** CAP) / stop


def train(seed, *, mode, scale_by_std, lr):
    """对错由外界掷硬币（对的概率 0.3），策略只有两个停的 logit：错答一个、对答一个。"""
    generator = torch.Generator().manual_seed(seed)
    stop_logits, history = torch.tensor([-2.0, -2.0]), []
    for _ in range(STEPS):
        history.append(expected_length(stop_logits))
        leaf = stop_logits.clone().requires_grad_()
        correct = (torch.rand(PROMPTS * 8, generator=generator) < 0.3).double()
        which = correct.long()
        uniform = torch.rand(PROMPTS * 8, generator=generator)
        drawn = (uniform.log() / torch.log1p(-stop_logits.sigmoid()[which])).ceil().clamp(min=1)
        lengths = drawn.clamp(max=CAP)[:, None]
        stops_here = (positions == lengths) & (drawn <= CAP)[:, None]
        stop, go = torch.nn.functional.logsigmoid(leaf), torch.nn.functional.logsigmoid(-leaf)
        log_probs = torch.where(stops_here, stop[which][:, None], go[which][:, None])  # (256, 60)
        advantages = group_advantages(correct, group_size=8, scale_by_std=scale_by_std)
        loss = policy_loss(log_probs, advantages, positions <= lengths, mode=mode, max_response_length=CAP)
        stop_logits = stop_logits - lr * torch.autograd.grad(loss, leaf)[0]
    history.append(expected_length(stop_logits))
    return torch.stack(history)  # (STEPS + 1, 2)


LR = 0.3
MATCHED = LR * CAP / 8.4  # 抵消常数 60 比初始平均长度 8.4 大的那一份
runs = {
    "GRPO": {"mode": GRPO, "scale_by_std": True, "lr": LR},
    "token-mean": {"mode": TOKEN_MEAN, "scale_by_std": True, "lr": LR},
    "Dr. GRPO": {"mode": CONSTANT, "scale_by_std": False, "lr": MATCHED},
    "只去标准差": {"mode": GRPO, "scale_by_std": False, "lr": LR},
}
curves = {name: torch.stack([train(s, **options) for s in range(SEEDS)]) for name, options in runs.items()}

fig, ax = plt.subplots(figsize=(6.0, 3.6))
steps = torch.arange(0, STEPS + 1, 5)
for name, which, style, color, label in [
    ("GRPO", 0, "-", "C3", "GRPO，错答"),
    ("GRPO", 1, "--", "C3", "GRPO，对答"),
    ("token-mean", 0, "-.", "C2", "token-mean，错答"),
    ("Dr. GRPO", 0, ":", "C0", "Dr. GRPO，错答"),
]:
    curve = curves[name][:, steps, which]
    ax.plot(steps, curve.mean(0), style, color=color, label=label)
    ax.fill_between(steps, curve.min(0)[0], curve.max(0)[0], color=color, alpha=0.2, linewidth=0)
ax.set_xlim(0, STEPS)
ax.set_ylim(0, 50)
ax.set_xlabel("更新步数")
ax.set_ylabel("期望长度（token，上限 60）")
ax.legend(loc="upper left", frameon=False)

start, end = expected_length(torch.tensor(-2.0)).item(), {n: c[:, -1] for n, c in curves.items()}
assert f"{start:.1f}" == "8.4"
assert 38.0 < end["GRPO"][:, 0].min() and end["GRPO"][:, 0].max() < 38.7
assert f"{end['GRPO'][:, 1].min():.1f} {end['GRPO'][:, 1].max():.1f}" == "1.2 1.2"
assert f"{end['只去标准差'][:, 0].min():.0f} {end['只去标准差'][:, 0].max():.0f}" == "25 26"
for name in ("token-mean", "Dr. GRPO"):  # 全程、两种答案、五个种子
    assert 8.1 < curves[name].min() and curves[name].max() < 8.8, name
# 精确核对第一步的方向：错答停的 logit 的期望梯度，除以长度时为负（停得更少），除以常数时为 0
stop = torch.tensor(-2.0).sigmoid()
length_probs = torch.cat([stop * (1 - stop) ** torch.arange(CAP), (1 - stop)[None] ** CAP])
all_lengths = torch.cat([positions, torch.tensor([CAP])])
scores = 1 - all_lengths * stop  # d log π / dz；截断的那种没有停
scores[-1] = -CAP * stop
assert abs((length_probs * scores).sum().item()) < 1e-12
drift = (length_probs * scores / all_lengths).sum().item()
assert f"{-0.3 * 0.7 * drift:.3f}" == "-0.035" and f"{drift:.2f}" == "0.17"


# %%
#| label: group-size-and-bias
#| caption: 题 B 上三种随样本变的分母：组越大，token-mean 与除以组内最长的残差越小，除以自己的长度不变
#| echo: fold
def longest_in_group(log_probs, correct, mask):
    options = {"group_size": len(correct), "max_response_length": int(mask.sum(1).max())}
    return dr_grpo_loss(log_probs, log_probs.detach(), correct, mask, **options)


z, correct = questions[1]
denominators = {  # 名字 → 损失，G=8 时已经算过的期望梯度
    "除以自己的长度": (using(GRPO, scale_by_std=False), expected["只去标准差"][1]),
    "token-mean": (using(TOKEN_MEAN, scale_by_std=False), expected["token-mean，去标准差"][1]),
    "除以组内最长": (longest_in_group, expected_gradient(z, correct, longest_in_group)),
    "常数（Dr. GRPO）": (dr_grpo, expected["Dr. GRPO"][1]),
}
rows = []
for name, (loss_fn, largest) in denominators.items():
    gradients = [expected_gradient(z, correct, loss_fn, group_size=g) for g in (2, 4)] + [largest]
    rows.append([name, *(shown(residual(gradient, truths[1])) for gradient in gradients)])
assert [row[1:] for row in rows] == [
    ["0.271", "0.271", "0.271"],
    ["0.121", "0.069", "0.036"],
    ["0.091", "0.050", "0.012"],
    ["0", "0", "0"],
]
Markdown(tabulate(rows, headers=["分母", "G=2", "G=4", "G=8"], tablefmt="github", disable_numparse=True))
