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
# # 价值模型与奖励模型：实验
#
# 页面 docs/rl/critic-vs-reward.md 的数字和图都在这里算出来。没有抽样：价值、期望梯度与得分都对全部 255 条回答枚举求和。

# %%
#| label: setup
import itertools

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.critic_vs_reward import reward_at_end, td_errors, value_loss
from snippets.rl.ppo import generalized_advantage

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# 括号语言：左括号 0、右括号 1、EOS 2，最长 7；配平、至少两对、写了 EOS 才得 1 分
LENGTH, EOS, PREFIXES = 7, 2, 2**7 - 1
texts = [[*bits, EOS] for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]
texts += [list(bits) for bits in itertools.product((0, 1), repeat=LENGTH)]  # 写满也没有 EOS
tokens = torch.tensor([text + [EOS] * (LENGTH - len(text)) for text in texts])  # (255, 7)，EOS 之后是填充
mask = torch.tensor([[t < len(text) for t in range(LENGTH)] for text in texts])


def prefix_id(bits):
    return 2 ** len(bits) - 1 + int("0" + "".join(map(str, bits)), 2)


def parse(text):
    return ["()。".index(c) for c in text]


def depth(bits):
    """还没配上的左括号数；中途多出右括号就是 -1。"""
    level = 0
    for bit in bits:
        level += 1 - 2 * bit
        if level < 0:
            return -1
    return level


prefix = torch.tensor(
    [[prefix_id(text[:t]) if t < len(text) else 0 for t in range(LENGTH)] for text in texts]
)
scores = torch.tensor([float(EOS in text and len(text) >= 5 and depth(text[:-1]) == 0) for text in texts])
row_of = {tuple(text): i for i, text in enumerate(texts)}
all_prefixes = [list(bits) for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]

# 起始策略：大致知道配平，再加噪声
logits = torch.zeros(PREFIXES, 3)
for bits in all_prefixes:
    level = depth(bits)
    can_stop = level == 0 and len(bits) >= 4
    logits[prefix_id(bits)] = torch.tensor(
        [0.8 - 0.3 * max(level, 0), 0.8 if level > 0 else -0.8, 1.2 if can_stop else -1.2]
    )
logits += 0.4 * torch.randn(logits.shape, generator=torch.Generator().manual_seed(0))


def token_log_probs(logits):  # (127, 3) -> (255, 7)
    return logits.log_softmax(-1)[prefix, tokens].masked_fill(~mask, 0.0)


def response_probs(logits):
    return token_log_probs(logits).sum(1).exp()


def exact_values(logits, token_rewards):
    """每个前缀的真实价值：往后的奖励，对经过它的回答按概率平均。"""
    to_go = token_rewards.flip(1).cumsum(1).flip(1)
    weights = response_probs(logits)[:, None] * mask
    sums = torch.zeros(2, PREFIXES)
    sums[0].index_add_(0, prefix.flatten(), (weights * to_go).flatten())
    sums[1].index_add_(0, prefix.flatten(), weights.flatten())
    return sums[0] / sums[1]


def markdown_table(rows, headers):
    return Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


outcome = reward_at_end(scores, mask)  # 得分放在最后一个生成的 token 上
value = exact_values(logits, outcome)

# %%
#| label: value-trace
#| caption: 三条回答逐个前缀的价值：写对的那条起伏后到 1；第五个 token 多写右括号的那条当场掉到 0；过早停的那条在停的一步掉到 0；大空心点是得分，写完才有
fig, ax = plt.subplots(figsize=(6.0, 3.6))
cases = {"(())()。": ("-o", "C0"), "(()))。": ("--s", "C3"), "()。": ("-.^", "C1")}
errors = td_errors(outcome, value[prefix], mask)
trace = {}
for text, (style, color) in cases.items():
    row = row_of[tuple(parse(text))]
    kept = mask[row]
    line = value[prefix[row, kept]]
    reward = scores[row]
    n = len(line)
    ax.plot(range(n), line, style, color=color, markersize=5, label=text)
    ax.plot([n - 1, n], [line[-1], reward], style[:-1], color=color)
    ax.plot([n], [reward], style[-1], color=color, markersize=10, markerfacecolor="none")
    trace[text] = [f"{x:.2f}" for x in [*line.tolist(), reward.item()]], errors[row, kept]
    assert abs(errors[row, kept].sum() - (reward - line[0])) < 1e-12  # 两两相消
ax.set_xlabel("已生成的 token 数")
ax.set_ylabel("价值；写完后是得分")
ax.set_xticks(range(LENGTH + 1))
ax.set_ylim(-0.06, 1.08)
ax.legend(loc="upper left", title="回答（。是 EOS）", frameon=False)

mean_score = (response_probs(logits) * scores).sum()
assert f"{mean_score:.2f} {value[0]:.2f}" == "0.15 0.15"  # V(s_0) 就是平均得分
assert trace["(())()。"][0] == ["0.15", "0.25", "0.19", "0.30", "0.47", "0.25", "0.56", "1.00"]
assert trace["(()))。"][0] == ["0.15", "0.25", "0.19", "0.30", "0.47", "0.00", "0.00"]
assert f"{trace['(()))。'][1][4]:.2f} {trace['(()))。'][1][5]:.2f}" == "-0.47 0.00"
assert f"{trace['()。'][1][-1]:.2f}" == "-0.37"
assert f"{trace['(())()。'][1][4]:.2f}" == "-0.22"  # 写对的那条里也有让期望下降的一步
weights = response_probs(logits)[:, None] * mask
per_state = torch.zeros(PREFIXES).index_add(0, prefix.flatten(), (weights * errors).flatten())
assert per_state.abs().max() < 1e-12  # E[δ_t | s_t] = 0
variance = (response_probs(logits) * (scores - mean_score).square()).sum()
shares = (weights * errors.square()).sum(0)
assert abs(shares.sum() - variance) < 1e-12  # 各步方差之和就是得分的方差
assert f"{variance:.3f} {shares[4]:.3f} {shares[1]:.3f}" == "0.128 0.032 0.006"


# %%
# 期望梯度、真梯度、精确梯度上升
def expected_gradient(logits, advantages):
    leaf = logits.clone().requires_grad_()
    weights = response_probs(logits)[:, None] * advantages
    return torch.autograd.grad((weights * token_log_probs(leaf)).sum(), leaf)[0]


def advantages_of(token_rewards, values, lam):
    return generalized_advantage(token_rewards, values[prefix], mask, gamma=1.0, lam=lam)[0]


def train(setting, lam, steps=150):
    """沿期望梯度用 Adam 走，价值每步重算；返回终点的 logits。"""
    theta = logits.clone().requires_grad_()
    optimizer = torch.optim.Adam([theta], lr=0.1)
    for _ in range(steps):
        now = theta.detach()
        theta.grad = -expected_gradient(now, advantages_of(*setting(now), lam))
        optimizer.step()
    return theta.detach()


def true_score(logits):
    return (response_probs(logits) * scores).sum().item()


leaf = logits.clone().requires_grad_()
(truth,) = torch.autograd.grad((response_probs(leaf) * scores).sum(), leaf)


def relative_error(logits_at, token_rewards, values, lam, truth=truth):
    gradient = expected_gradient(logits_at, advantages_of(token_rewards, values, lam))
    return ((gradient - truth).norm() / truth.norm()).item()


# %%
#| label: critic-error-vs-reward-error
#| caption: 期望梯度与真梯度之差（相对真梯度的长度）：价值怎么错，λ 取 1 都不偏，终点得分不变；得分错了，价值再准也偏，与 λ 无关
#| echo: fold
generator = torch.Generator().manual_seed(1)
value_noise = 0.3 * torch.randn(5, PREFIXES, generator=generator)
score_noise = 0.3 * torch.randn(5, len(texts), generator=generator)
misjudged = scores.clone()
misjudged[row_of[tuple(parse("()。"))]] = 1.2  # 把太短的答案判成高分
step_scores = exact_values(0.5 * logits, outcome)  # PRM 打分：另一个更随机的续写者的价值
after = torch.nn.functional.pad(step_scores[prefix][:, 1:], (0, 1)) * torch.nn.functional.pad(
    mask[:, 1:], (0, 1)
)
before = step_scores[prefix] * mask


def with_critic(change):
    return lambda logits: (outcome, change(exact_values(logits, outcome)))


def with_reward(token_rewards):
    """奖励换掉，价值跟着奖励精确地算。"""
    return lambda logits: (token_rewards, exact_values(logits, token_rewards))


settings = {
    "都精确": [with_critic(lambda v: v)],
    "价值恒为 0": [with_critic(torch.zeros_like)],
    "价值取反": [with_critic(torch.neg)],
    "价值加噪声": [with_critic(lambda v, e=e: v + e) for e in value_noise],
    "得分都加 1": [with_reward(reward_at_end(scores + 1, mask))],
    "得分加噪声": [with_reward(reward_at_end(scores + e, mask)) for e in score_noise],
    "得分误判一条": [with_reward(reward_at_end(misjudged, mask))],
    "每步加 PRM 分": [with_reward(outcome + after)],
    "每步加 PRM 分之差": [with_reward(outcome + after - before)],
}
rows, table, ends = [], {}, {}
for name, group in settings.items():
    bias = torch.tensor(
        [[relative_error(logits, *setting(logits), lam) for lam in (1.0, 0.95, 0.0)] for setting in group]
    )
    ends[name] = [train(setting, 1.0) for setting in group]
    score = torch.tensor([true_score(end) for end in ends[name]])
    table[name] = bias, score
    cells = ["0" if x < 1e-12 else f"{x:.2f}" for x in bias.mean(0).tolist()]
    rows.append([name, *cells, f"{score.mean():.2f}"])

for name, (bias, _) in table.items():
    harmless = name == "都精确" or name.startswith("价值") or name in ("得分都加 1", "每步加 PRM 分之差")
    assert ((bias[:, 0] < 1e-12) == harmless).all(), name
    if name.startswith(("得分", "每步")):  # 价值跟着算对了，λ 不起作用
        assert (bias - bias[:, :1]).abs().max() < 1e-12, name
assert [row[1:] for row in rows[1:4]] == [
    ["0", "0.16", "0.95", "1.00"],
    ["0", "0.33", "1.90", "1.00"],
    ["0", "0.09", "1.52", "1.00"],
]
assert [row[1] for row in rows[5:8]] == ["0.72", "0.32", "2.31"] and rows[6][4] == "0.00"
assert all(row[4] == "1.00" for row in rows if row[0] != "得分误判一条")
assert min(table["得分加噪声"][1]) > 0.99
for e in score_noise:  # 加了噪声，得分最高的仍是一条对的回答
    assert (scores + e)[scores == 0].max() < (scores + e)[scores == 1].max()
for end in ends["价值取反"] + ends["价值加噪声"] + ends["每步加 PRM 分之差"]:
    assert (response_probs(end) - response_probs(ends["都精确"][0])).abs().max() < 1e-9
best = {name: texts[response_probs(group[0]).argmax()] for name, group in ends.items()}
lengths = {name: (response_probs(group[0]) * mask.sum(1)).sum().item() for name, group in ends.items()}
assert best["得分误判一条"] == parse("()。") and best["每步加 PRM 分"] == parse("()()()。")
assert f"{lengths['都精确']:.1f} {lengths['每步加 PRM 分']:.1f}" == "5.0 7.0"

# λ 取 0 时价值的错会不会换掉终点，看怎么错
at_zero = {name: [true_score(train(f, 0.0)) for f in settings[name]] for name in list(settings)[1:4]}
assert f"{at_zero['价值恒为 0'][0]:.2f} {at_zero['价值取反'][0]:.2f}" == "0.25 0.00"
assert min(at_zero["价值加噪声"]) > 0.99

# 价值在 λ=1 时管的是噪声：单条回答的梯度的标准差，一条回答里每个前缀只出现一次
one_hot = torch.nn.functional.one_hot(tokens, 3)
score_norm = (one_hot - logits.softmax(-1)[prefix]).square().sum(-1)  # 每一步得分函数的长度的平方


def noise(values):
    advantages = advantages_of(outcome, values, 1.0)
    second = (response_probs(logits)[:, None] * mask * advantages.square() * score_norm).sum()
    return ((second - truth.square().sum()).sqrt() / truth.norm()).item()


assert f"{noise(value):.1f} {noise(0 * value):.1f} {noise(-value):.1f}" == "4.8 5.2 7.6"
markdown_table(rows, ["改了什么", r"$\lambda=1$", "0.95", "0", "终点得分"])

# %%
#| label: value-moves-with-the-policy
#| caption: 策略沿真梯度走十步前后：同一条回答的得分不变，同一个前缀的价值变了；已经写错的前缀两边都是 0
#| echo: fold
newer = train(settings["都精确"][0], 1.0, steps=10)
newer_value = exact_values(newer, outcome)
rows = []
for text in ("()()。", "()。"):
    score = f"{scores[row_of[tuple(parse(text))]]:.2f}"
    rows.append([f"整条 {text}", "得分", score, score])
for text in ("", "(", "(()", "()(", "()()", "())"):
    k = prefix_id(parse(text))
    rows.append([f"前缀 {text}" if text else "只有提示", "价值", f"{value[k]:.2f}", f"{newer_value[k]:.2f}"])
assert [row[2:] for row in rows[:2]] == [["1.00", "1.00"], ["0.00", "0.00"]]
assert (
    rows[2][2:] == ["0.15", "0.80"] and rows[4][2:] == ["0.30", "0.88"] and rows[-1][2:] == ["0.00", "0.00"]
)

leaf = newer.clone().requires_grad_()
(newer_truth,) = torch.autograd.grad((response_probs(leaf) * scores).sum(), leaf)
stale = [relative_error(newer, outcome, value, lam, newer_truth) for lam in (1.0, 0.95, 0.0)]
fresh = [relative_error(newer, outcome, newer_value, lam, newer_truth) for lam in (1.0, 0.95, 0.0)]
assert max(fresh) < 1e-12 and stale[0] < 1e-12 and f"{stale[1]:.2f} {stale[2]:.2f}" == "0.10 0.67"

# 价值模型的损失在新策略的回答上的期望：旧价值 0.37，新价值 0.10（剩下的是回报自身的方差）
to_go = outcome.flip(1).cumsum(1).flip(1)
per_response = [
    torch.stack(
        [value_loss(v[prefix[i : i + 1]], to_go[i : i + 1], mask[i : i + 1]) for i in range(len(texts))]
    )
    for v in (value, newer_value)
]
token_weight = response_probs(newer) * mask.sum(1)
losses = [(token_weight * x).sum() / token_weight.sum() for x in per_response]
assert f"{losses[0]:.2f} {losses[1]:.2f}" == "0.37 0.10"
markdown_table(rows, ["文本", "是什么", "训练前", "十步后"])

# %%
#| label: prm-labels
#| caption: 五个前缀：还写得对与写不对是文本的性质，与谁来续写无关；软标签就是续写者的价值，换个续写者就变；八次里有一次对就算对的硬标签又是另一个数
#| echo: fold
weak, strong = exact_values(0.5 * logits, outcome), newer_value
reachable = {
    prefix_id(text[:t]) for text, s in zip(texts, scores.tolist(), strict=True) if s for t in range(len(text))
}
rows = []
for text in ("()()", "(()", "()((", "((((", "())"):
    k = prefix_id(parse(text))
    hard = 1 - (1 - weak[k]) ** 8
    rows.append([text, "是" if k in reachable else "否", *(f"{x:.2f}" for x in (weak[k], strong[k], hard))])
assert rows[2] == ["()((", "是", "0.08", "0.65", "0.48"]
assert rows[1][2:] == ["0.23", "0.88", "0.87"]
assert all(row[1:] == ["否", "0.00", "0.00", "0.00"] for row in rows[3:])

# 隐式奖励：最优策略与参考策略的对数比，恰是软价值（参考策略下 e 指数的平均）的差
beta = 0.5
weights = response_probs(logits)
soft = beta * exact_values(logits, reward_at_end((scores / beta).exp(), mask)).log()  # 每个前缀一个
tilted = weights * (scores / beta).exp() / (weights * (scores / beta).exp()).sum()  # 最优策略的整条概率
mass = torch.zeros(2, PREFIXES)
for i, probs in enumerate((tilted, weights)):  # 两个策略经过每个前缀的概率
    mass[i].index_add_(0, prefix.flatten(), (probs[:, None] * mask).flatten())
log_ratio = beta * (mass[0] / mass[1]).log()  # 走到这个前缀为止，隐式奖励之和
assert (log_ratio - (soft - soft[0])).abs().max() < 1e-12
assert f"{soft[0]:.2f} {value[0]:.2f}" == "0.34 0.15" and (soft >= value - 1e-12).all()
markdown_table(rows, ["前缀", "还能写对", "弱续写者", "强续写者", "硬标签，8 次"])
