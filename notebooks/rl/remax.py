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
# # ReMax（REINFORCE with argmax baseline）：实验
#
# 页面 `docs/rl/remax.md` 里的每个数字都由下面的单元算出。策略都小到可以枚举全部回答，期望与方差是精确求和，没有采样误差；方差指协方差矩阵的迹。

# %%
#| label: setup
import itertools

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.remax import (
    baseline_gradient_variance,
    leave_one_out_gradient_variance,
    remax_advantages,
    remax_token_advantages,
)
from snippets.rl.rloo import leave_one_out_advantages, optimal_constant_baseline

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
VOCAB_SIZE, MAX_LENGTH, EOS = 3, 3, 2
PREFIXES = [p for n in range(MAX_LENGTH) for p in itertools.product(range(EOS), repeat=n)]
RESPONSES = [p + (EOS,) for p in PREFIXES] + list(itertools.product(range(EOS), repeat=MAX_LENGTH))
MASK = torch.tensor([[t < len(y) for t in range(MAX_LENGTH)] for y in RESPONSES])
LENGTHS = MASK.sum(1).double()


class Policy:
    """词表 3（含结束符）、至多 3 个 token、每个前缀一组 logits：15 种回答，长度 1 到 3。"""

    def __init__(self, seed):
        generator = torch.Generator().manual_seed(seed)
        self.theta = torch.randn(len(PREFIXES), VOCAB_SIZE, generator=generator).requires_grad_(True)
        self.rewards = 1 + torch.rand(len(RESPONSES), generator=generator)
        table = self.theta.log_softmax(-1)
        rows = [[table[PREFIXES.index(y[:t]), y[t]] for t in range(len(y))] for y in RESPONSES]
        rows = [torch.stack(row + [torch.zeros(())] * (MAX_LENGTH - len(row))) for row in rows]
        self.token_log_probs = torch.stack(rows)  # (V, T)
        self.log_probs = self.token_log_probs.sum(1)  # (V)
        self.probs = self.log_probs.detach().exp()
        self.scores = torch.stack([self.grad(value) for value in self.log_probs])  # (V, D)
        self.true_gradient = self.grad((self.log_probs.exp() * self.rewards).sum())
        answer = ()
        while len(answer) < MAX_LENGTH and (not answer or answer[-1] != EOS):
            answer += (int(self.theta[PREFIXES.index(answer)].argmax()),)
        self.greedy = RESPONSES.index(answer)
        self.baseline = self.rewards[self.greedy]

    def grad(self, scalar):
        return torch.autograd.grad(scalar, self.theta, retain_graph=True)[0].flatten()

    def expected(self, advantages):
        """逐 token 优势 (V, T) 给出的期望梯度。"""
        return self.grad((self.probs[:, None] * advantages * self.token_log_probs * MASK).sum())


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()


# %%
#| label: unbiased-baselines
#| caption: 六种基线下期望梯度与自动微分真梯度的相对偏差、单样本方差，偏差全为零
#| echo: fold
def baseline_report(policy, reference):
    """每种基线：(名字, 期望梯度的相对偏差, 单样本方差)。"""
    arguments = (policy.probs, policy.rewards, policy.scores)
    mean = policy.probs @ policy.rewards
    constants = [
        ("不减", torch.zeros(())),
        ("贪心，当前策略（ReMax）", policy.baseline),
        ("贪心，参考策略", policy.rewards[reference.greedy]),
        ("期望奖励", mean),
        ("最优常数", optimal_constant_baseline(*arguments)),
    ]
    report = []
    for name, baseline in constants:
        advantages = remax_advantages(policy.rewards, baseline.expand(len(RESPONSES)))
        gradient = policy.expected(advantages[:, None].expand(-1, MAX_LENGTH))
        variance = baseline_gradient_variance(*arguments, baseline=baseline.item()).item()
        report.append((name, relative_error(gradient, policy.true_gradient), variance))
    # 另采一条只当基线：枚举全部 15×15 对
    weights = policy.probs[:, None] * policy.probs
    estimates = (policy.rewards[:, None] - policy.rewards)[..., None] * policy.scores[:, None]
    gradient = (weights[..., None] * estimates).sum((0, 1))
    variance = (weights[..., None] * (estimates - gradient).square()).sum().item()
    report.insert(3, ("另采一条，只当基线", relative_error(gradient, policy.true_gradient), variance))
    return report


for seed in range(20):
    assert max(error for _, error, _ in baseline_report(Policy(seed), Policy(seed + 100))) < 1e-12
# 逐 token 取最大，不等于概率最大的整条回答
policies = [Policy(seed) for seed in range(20)]
assert sum(policy.greedy != int(policy.probs.argmax()) for policy in policies) == 4
report = baseline_report(Policy(0), Policy(100))
variances = {name: f"{variance:.3f}" for name, _, variance in report}
assert list(variances.values()) == ["2.936", "0.100", "0.114", "0.102", "0.054", "0.053"], variances
Markdown(
    tabulate(
        [[name, "0" if error < 1e-12 else error, variance] for name, error, variance in report],
        headers=["基线", "期望梯度的偏差", "单样本方差"],
        tablefmt="github",
        floatfmt=".3f",
    )
)

# %%
# 八臂 softmax：一条回答就是一个动作，sharpness 越大策略越尖，臂 0 永远是贪心回答
LOGITS = torch.tensor([1.0, 0.6, 0.3, 0.0, -0.2, -0.5, -0.8, -1.2])
SCORED_BEST = torch.tensor([2.2, 1.8, 2.0, 1.2, 1.5, 0.8, 1.0, 0.5])
SCORED_WORST = torch.tensor([0.5, 1.8, 2.0, 1.2, 1.5, 0.8, 1.0, 2.2])
RIGHT = torch.tensor([1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
WRONG = torch.tensor([0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0, 0.0])
CASES = {
    "打分，贪心最好": SCORED_BEST,
    "打分，贪心最差": SCORED_WORST,
    "0/1，贪心对": RIGHT,
    "0/1，贪心错": WRONG,
}


def arms(sharpness, rewards):
    probs = (sharpness * LOGITS).softmax(-1)
    return probs, rewards, torch.eye(len(LOGITS)) - probs


def variances_of(sharpness, rewards):
    """(不减, 贪心, 期望奖励, 最优) 四种基线的单样本方差。"""
    arguments = arms(sharpness, rewards)
    probs = arguments[0]
    baselines = (
        0.0,
        rewards[0].item(),
        (probs @ rewards).item(),
        optimal_constant_baseline(*arguments).item(),
    )
    return [baseline_gradient_variance(*arguments, baseline=b).item() for b in baselines]


# %%
#| label: variance-over-sharpness
#| caption: 贪心基线的方差除以不减基线的方差，随策略变尖；打分奖励下两条线都低于 1，0/1 奖励下答错恒为 1，答对只在中段略低于 1
#| echo: fold
sharpness = torch.linspace(0.02, 7.0, 120).tolist()
top = [arms(value, RIGHT)[0][0].item() for value in sharpness]
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.2), sharey=True)
curves = {}
for name, rewards in CASES.items():
    curves[name] = [variances_of(v, rewards)[1] / variances_of(v, rewards)[0] for v in sharpness]
panels = [
    (axes[0], "奖励模型打分（全为正）", ["打分，贪心最好", "打分，贪心最差"]),
    (axes[1], "0/1 奖励", ["0/1，贪心对", "0/1，贪心错"]),
]
for axis, title, names in panels:
    axis.axhline(1.0, color="C4", linewidth=1.2, linestyle=":")
    for index, (name, style) in enumerate(zip(names, ["-", "--"], strict=True)):
        axis.plot(top, curves[name], color=f"C{index}", linestyle=style, label=name.split("，")[1])
    axis.set(title=title, yscale="log", xlabel="贪心回答的概率", ylim=(0.025, 15))
    axis.set_yticks([0.1, 1, 10], ["0.1", "1", "10"])
    axis.legend(loc="upper left")
axes[0].set_ylabel("方差 ÷ 不减基线的方差")

# 判据：贪心基线有用，当且仅当它落在 0 与 2b* 之间
for name, rewards in CASES.items():
    for value, ratio in zip(sharpness, curves[name], strict=True):
        greedy, best = rewards[0].item(), optimal_constant_baseline(*arms(value, rewards)).item()
        assert abs(ratio - 1) < 1e-12 if greedy == 0 else (ratio < 1) == (0 < greedy < 2 * best)
assert all(ratio < 1 for name in ("打分，贪心最好", "打分，贪心最差") for ratio in curves[name])
assert all(abs(ratio - 1) < 1e-12 for ratio in curves["0/1，贪心错"])
helpful = [p for p, ratio in zip(top, curves["0/1，贪心对"], strict=True) if ratio < 1]
assert f"{helpful[0]:.2f} {helpful[-1]:.2f}" == "0.36 0.56", (helpful[0], helpful[-1])
assert f"{min(curves['0/1，贪心对']):.2f}" == "0.94"
assert f"{curves['0/1，贪心对'][0]:.2f}" == "1.71"
at_90 = min(range(len(top)), key=lambda i: abs(top[i] - 0.9))
assert f"{optimal_constant_baseline(*arms(sharpness[at_90], RIGHT)).item():.2f}" == "0.23"
assert 0.895 < top[at_90] < 0.905 and f"{curves['0/1，贪心对'][at_90]:.1f}" == "4.3"
assert f"{curves['打分，贪心最好'][at_90]:.2f} {curves['打分，贪心最差'][at_90]:.2f}" == "0.04 0.50"
# 打分减去期望奖励，好处就消失：它来自偏移（贪心基线自己不受平移影响）
for rewards in (SCORED_BEST, SCORED_WORST):
    for value in sharpness:
        centred = rewards - arms(value, rewards)[0] @ rewards
        assert abs(variances_of(value, centred)[1] - variances_of(value, rewards)[1]) < 1e-12
        assert variances_of(value, centred)[1] > variances_of(value, centred)[0]

# %%
#| label: equal-generation-budget
#| caption: 同样生成 G 条回答时一个提示的梯度方差：不减基线、ReMax 与 RLOO，四种奖励各取 G 为 2 与 5
#| echo: fold
rows, budget = [], {}
assert f"{arms(1.0, RIGHT)[0][0].item():.2f}" == "0.30"
for name, rewards in CASES.items():
    for generated in (2, 5):
        none, greedy, _, _ = variances_of(1.0, rewards)
        rloo = leave_one_out_gradient_variance(*arms(1.0, rewards), group_size=generated).item()
        budget[name, generated] = [none / generated, greedy / (generated - 1), rloo]
        rows.append([name, generated, *budget[name, generated]])
assert all(rloo < greedy for _, greedy, rloo in budget.values())
assert all(greedy < none for (name, _), (none, greedy, _) in budget.items() if name.startswith("打分"))
assert all(greedy > none for (name, _), (none, greedy, _) in budget.items() if name.startswith("0/1"))
assert [f"{v:.3f}" for v in budget["打分，贪心最好", 2]] == ["1.153", "0.468", "0.214"]
assert [f"{v:.3f}" for v in budget["0/1，贪心错", 2]] == ["0.167", "0.335", "0.203"]
# 反例存在：贪心奖励恰好等于期望奖励时，ReMax 的基线没有噪声
fair = SCORED_BEST.clone()
fair[0] = (arms(1.0, fair)[0][1:] @ fair[1:]) / arms(1.0, fair)[0][1:].sum()  # 解 r_0 = E[r]
assert abs(arms(1.0, fair)[0] @ fair - fair[0]) < 1e-12
fair_greedy, fair_rloo = (
    variances_of(1.0, fair)[1],
    leave_one_out_gradient_variance(*arms(1.0, fair), group_size=2).item(),
)
assert fair_greedy < fair_rloo and f"{fair_greedy:.3f} {fair_rloo:.3f}" == "0.127 0.129"
# 「通常」有多常：随机八臂问题，logits 服从标准正态，打分在 1 与 2 之间，0/1 的正确率 0.4
wins = {"打分": [], "0/1": []}
for seed in range(400):
    generator = torch.Generator().manual_seed(seed)
    probs, draws = torch.randn(8, generator=generator).softmax(-1), torch.rand(8, generator=generator)
    for kind, rewards in (("打分", 1 + draws), ("0/1", (draws < 0.4).double())):
        problem = probs, rewards, torch.eye(8) - probs
        greedy = baseline_gradient_variance(*problem, baseline=rewards[probs.argmax()].item()).item()
        rloo = leave_one_out_gradient_variance(*problem, group_size=2).item()
        wins[kind].append(greedy < rloo - 1e-12)
shares = {kind: f"{sum(values) / len(values):.0%}" for kind, values in wins.items()}
assert shares == {"打分": "12%", "0/1": "1%"}, shares
# 只按训练条数算（生成不要钱）：ReMax 训练 1 条，RLOO 训练 2 条
per_trained = {name: (budget[name, 2][1], 2 * budget[name, 2][2], 2 * budget[name, 2][0]) for name in CASES}
assert [f"{v:.3f}" for v in per_trained["打分，贪心最好"]] == ["0.468", "0.427", "2.306"]
assert [f"{v:.3f}" for v in per_trained["0/1，贪心对"]] == ["0.380", "0.411", "0.353"]
assert [f"{v:.3f}" for v in per_trained["0/1，贪心错"]] == ["0.335", "0.406", "0.335"]
# 按计算量折算（下一张表：ReMax 8、RLOO 12），3 次 ReMax 与 2 次 RLOO 一样贵
assert f"{budget['打分，贪心最好', 2][1] / 3:.3f} {budget['打分，贪心最好', 2][2] / 2:.3f}" == "0.156 0.107"
Markdown(
    tabulate(
        rows,
        headers=["奖励", "G", "不减基线", "ReMax", "RLOO"],
        tablefmt="github",
        floatfmt=("", "", ".3f", ".3f", ".3f"),
    )
)


# %%
#| label: cost-per-prompt
#| caption: 每个提示的生成条数、训练条数、前向折算的计算量与模型状态，策略、参考、奖励、价值模型同样大，PPO 只更新一遍、不重算旧对数概率，不计提示与激活
#| echo: fold
def cost(name, sampled, greedy, critic):
    """计算量以「一条回答一次前向」为 1：生成、打分、参考各 1，训练是前向加反向共 3；critic 推理 1、训练 3。"""
    generated = sampled + greedy
    compute = generated + generated + sampled + 3 * sampled + (4 * sampled if critic else 0)
    # 混合精度 Adam 的模型状态 16 字节/参数（ZeRO 的算法），只推理的模型 2 字节/参数
    state_bytes = 16 + 2 + 2 + (16 if critic else 0)
    return [name, generated, sampled, compute, state_bytes]


costs = [
    cost("PPO 1 条", 1, 0, True),
    cost("ReMax 1+1", 1, 1, False),
    cost("RLOO 2 条", 2, 0, False),
    cost("ReMax 4+1", 4, 1, False),
    cost("RLOO 5 条", 5, 0, False),
]
assert [row[3] for row in costs] == [10, 8, 12, 26, 30]
assert costs[0][4] == 36 and costs[1][4] == 20 and f"{1 - 20 / 36:.1%}" == "44.4%"
Markdown(tabulate(costs, headers=["方法", "生成", "训练", "计算量", "字节/参数"], tablefmt="github"))


# %%
#| label: wrong-variants
#| caption: 八种误写的期望梯度与真梯度的相对偏差，全部枚举得出；折扣一行是与同样折扣、不减基线的梯度比
#| echo: fold
def wrong_variants(policy, reference):
    """每种误写：(名字, 期望梯度的相对偏差)。"""
    b, rewards, probs, scores = policy.baseline, policy.rewards, policy.probs, policy.scores
    count = len(RESPONSES)
    token_rewards = torch.zeros(count, MAX_LENGTH)
    token_rewards[torch.arange(count), MASK.sum(1) - 1] = rewards
    per_token = policy.expected(remax_token_advantages(token_rewards - b, torch.zeros(count), MASK))
    divided = policy.expected((rewards - b / LENGTHS)[:, None].expand(-1, MAX_LENGTH))
    discount = 0.95 ** (LENGTHS[:, None] - torch.arange(MAX_LENGTH) - 1).clamp(min=0)
    plain = policy.expected(discount * rewards[:, None])  # 折扣的比较对象：同样折扣、不减基线
    discounted = policy.expected(discount * (rewards - b)[:, None])
    assert relative_error(policy.expected(discount * rewards[:, None] - b), plain) < 1e-12

    groups = torch.tensor(list(itertools.product(range(count), repeat=2)))
    weights = probs[groups].prod(1)

    def group_gradient(advantages, members):
        return ((weights[:, None] * advantages)[..., None] * scores[members]).mean(1).sum(0)

    reused = group_gradient(rewards[groups] - rewards[groups[:, 1:]], groups)
    largest = group_gradient(rewards[groups] - rewards[groups].amax(1, keepdim=True), groups)
    mixed = torch.cat([groups, torch.full((len(groups), 1), policy.greedy)], dim=1)
    advantages = leave_one_out_advantages(rewards[mixed].flatten(), group_size=3).view(-1, 3)
    trained = group_gradient(advantages, mixed)
    soft = b - 0.3 * (policy.log_probs[policy.greedy] - reference.log_probs[policy.greedy].detach())
    leaking = policy.grad((probs * (rewards - soft) * policy.log_probs).sum())
    truth = policy.true_gradient
    return [
        ("每个 token 都减 b 再累加", relative_error(per_token, truth)),
        ("基线除以采样长度", relative_error(divided, truth)),
        ("折扣差值，γ = 0.95", relative_error(discounted, plain)),
        ("基线样本自己也训练", relative_error(reused, truth)),
        ("两条里的最大值当基线", relative_error(largest, truth)),
        ("贪心回答混进组里训练", relative_error(trained, truth)),
        ("含 KL 的基线没切梯度", relative_error(leaking, truth)),
        ("符号反了", relative_error(policy.expected((b - rewards)[:, None].expand(-1, MAX_LENGTH)), truth)),
    ]


for seed in range(10):
    errors = dict(wrong_variants(Policy(seed), Policy(seed + 100)))
    assert min(errors.values()) > 0.05
    assert abs(errors["基线样本自己也训练"] - 0.5) < 1e-12 and abs(errors["符号反了"] - 2) < 1e-12
wrong = wrong_variants(Policy(0), Policy(100))
shown = {name: f"{error:.2f}" for name, error in wrong}
assert list(shown.values()) == ["7.30", "2.59", "0.46", "0.50", "0.66", "0.48", "5.62", "2.00"]
Markdown(tabulate(wrong, headers=["写法", "相对偏差"], tablefmt="github", floatfmt=".2f"))


# %%
#| label: length-normalised-bias
#| caption: 减基线引起的期望梯度变化：按条平均、按全批 token 平均随批大小、按和
#| echo: fold
def token_mean_weight(policy, batch):
    """一条回答在全批 token 平均里的期望权重 E[B/(|y| + 其余各条的长度)]，对长度分布精确卷积。"""
    one = torch.zeros(MAX_LENGTH + 1).index_add(0, MASK.sum(1), policy.probs)
    total = torch.ones(1)
    for _ in range(batch - 1):
        total = torch.nn.functional.conv1d(total[None], one.flip(0)[None, None], padding=MAX_LENGTH)[0]
    return (total * batch / (LENGTHS[:, None] + torch.arange(len(total)))).sum(1)


def change(policy, weight):
    """减贪心基线前后期望梯度的相对变化；weight 是每条回答的聚合权重。"""
    without = (policy.probs * weight * policy.rewards) @ policy.scores
    return relative_error(
        (policy.probs * weight * (policy.rewards - policy.baseline)) @ policy.scores, without
    )


policy = Policy(0)
settings = [("每条先平均（任意批大小）", 1 / LENGTHS)]
settings += [(f"全批 token 平均，{b} 条", token_mean_weight(policy, b)) for b in (8, 64, 512)]
settings += [("对 token 求和（论文）", torch.ones(len(RESPONSES)))]
changes = [(name, change(policy, weight)) for name, weight in settings]
inverse_length = policy.grad((policy.log_probs.exp() / LENGTHS).sum())  # ∇E[1/|y|]
extra = (policy.probs / LENGTHS * -policy.baseline) @ policy.scores
assert torch.allclose(extra, -policy.baseline * inverse_length)
assert [f"{value:.3f}" for _, value in changes] == ["0.964", "0.601", "0.057", "0.007", "0.000"]
rows = [[name, "0" if value < 1e-12 else value] for name, value in changes]
Markdown(tabulate(rows, headers=["聚合", "期望梯度的变化"], tablefmt="github", floatfmt=".3f"))
