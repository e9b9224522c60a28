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
# # 为什么 PRM + MCTS 这条路（在 R1 里）没走通：实验
#
# 页面 `docs/reasoning/prm-mcts.md` 的实验：搜索空间的大小、步得分怎么聚合才不奖励凑步数、蒙特卡洛标签的噪声，以及同样的生成量下搜索与采样随价值误差怎么变。

# %%
#| label: setup
import math
import random
from collections import Counter

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.reasoning.prm_mcts import Node, aggregate_step_scores, mcts, step_labels_monte_carlo

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: search-space
#| caption: 完整搜索树的叶子数取常用对数：国际象棋 124，围棋 360，一千个 token 5112；熵 0.3 奈特时有效大小 130，按步搜只有 30
#| echo: fold
sizes = {
    "国际象棋，35 种走法、80 步": 80 * math.log10(35),
    "围棋，250 种、150 步": 150 * math.log10(250),
    "129280 个 token、长 1000": 1000 * math.log10(129280),
    "同上，每个 token 熵 0.3 奈特": 1000 * 0.3 / math.log(10),
    "每步 4 个候选、50 步": 50 * math.log10(4),
}
assert [f"{v:.0f}" for v in sizes.values()] == ["124", "360", "5112", "130", "30"]
survival = {(c, n): c**n for c in (0.99, 0.999) for n in (500, 1000)}
assert f"{survival[0.99, 500]:.4f}" == "0.0066" and f"{survival[0.999, 1000]:.2f}" == "0.37"
Markdown(
    tabulate([[k, f"{v:.0f}"] for k, v in sizes.items()], headers=["树", "叶子数的 log10"], tablefmt="github")
)

# %%
#| label: step-hacking
#| caption: 一个 0.6 分的关键步，外加最多 8 个 0.9 分的填充步：求和与平均训练出来都把填充步加满，乘积一个不加，最小值不偏不倚
#| echo: fold
FILLERS = torch.arange(9)
step_scores = torch.full((9, 9), 0.9)
step_scores[:, 0] = 0.6  # 第 0 列是关键步，其余是填充步
step_mask = torch.arange(9) <= FILLERS[:, None]


def trained_fillers(reward, *, steps=2000, lr=2.0):
    """softmax 策略在 9 个填充步数里选，用精确的策略梯度训练；返回最后平均加几步。"""
    logits = torch.zeros(9)
    for _ in range(steps):
        probs = logits.softmax(0)
        logits = logits + lr * probs * (reward - probs @ reward)
    return (logits.softmax(0) @ FILLERS.double()).item()


rows, final = [], {}
for mode, name in [("sum", "求和"), ("mean", "平均"), ("product", "乘积"), ("min", "最小")]:
    reward = aggregate_step_scores(step_scores, step_mask, mode=mode)
    final[mode] = trained_fillers(reward)
    rows.append([name, *(f"{reward[m]:.2f}" for m in (0, 4, 8)), f"{final[mode]:.1f}"])
assert [row[1:4] for row in rows] == [
    ["0.60", "4.20", "7.80"],
    ["0.60", "0.84", "0.87"],
    ["0.60", "0.39", "0.26"],
    ["0.60", "0.60", "0.60"],
]
assert final["sum"] > 7.9 and final["mean"] > 7.0 and final["product"] < 0.1 and abs(final["min"] - 4) < 1e-9
assert [row[4] for row in rows] == ["8.0", "8.0", "0.0", "4.0"]
Markdown(
    tabulate(
        rows,
        headers=["聚合", "加 0 步", "加 4 步", "加 8 步", "训练后平均加几步"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: label-noise
#| caption: 蒙特卡洛软标签的标准差与排错序的概率：续写 8 次时标准差 0.18，真值 0.6 的一步有 0.44 的概率没排在 0.5 的一步前面
#| echo: fold


def pmf(n, p):
    return torch.tensor([math.comb(n, k) * p**k * (1 - p) ** (n - k) for k in range(n + 1)])


def not_ranked_above(n, better, worse):
    """好的一步的标签没有严格大于差的一步的概率，精确枚举。"""
    joint = torch.outer(pmf(n, better), pmf(n, worse))
    return joint.triu().sum().item()  # 行是好步的次数，行 ≤ 列


rows, generator = [], torch.Generator().manual_seed(0)
for n in (4, 8, 16, 64):
    exact = math.sqrt(0.25 / n)
    labels = step_labels_monte_carlo(torch.rand(20000, n, generator=generator) < 0.5)
    assert abs(labels.std().item() / exact - 1) < 0.02 and abs(labels.mean().item() - 0.5) < 0.01
    rows.append(
        [str(n), f"{exact:.3f}", f"{math.sqrt(0.09 / n):.3f}", f"{not_ranked_above(n, 0.6, 0.5):.2f}"]
    )
assert rows[1] == ["8", "0.177", "0.106", "0.44"] and rows[3][3] == "0.15"
Markdown(
    tabulate(
        rows,
        headers=["N", "标准差，p=0.5", "p=0.1", "0.6 没排在 0.5 前"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: search-vs-noise
#| caption: 每题至多生成 256 步：左图误差各步独立，束搜索几乎全对，MCTS 与 best-of-n 的平均后来掉到多数投票以下；右图价值模型看不出一部分错步，三种搜索一起掉，曲线与闭式一致
#| echo: fold
BRANCH, PASS_RATE, WRONG_ANSWERS = 4, 0.2, 20
ALIVE, BLIND, DEAD = "对", "错了但价值模型看不出", "错了"


class Problem:
    """惰性生成的树。候选步以概率 a 正确，错一步就再也答不对；错步有 blind 的概率不被价值模型发现。"""

    def __init__(self, rng, *, depth, sigma=0.05, blind=0.0, bonus=0.0, step_accuracy=None):
        self.rng, self.depth, self.sigma, self.blind, self.bonus = rng, depth, sigma, blind, bonus
        self.step_accuracy = step_accuracy or PASS_RATE ** (1 / depth)
        self.generated, self.root = 0, (0, ALIVE, 0.0)  # 深度、状态、价值模型的估计

    def child(self, state):
        self.generated += 1
        depth, status = state[0] + 1, state[1]
        if self.rng.random() >= self.step_accuracy:  # 这一步错了
            status = BLIND if status != DEAD and self.rng.random() < self.blind else DEAD
        estimate = 0.0 if status == DEAD else self.step_accuracy ** (self.depth - depth)
        estimate += self.bonus * (status == BLIND) + self.sigma * self.rng.gauss(0, 1)
        return (depth, status, estimate)

    def expand(self, state):
        return [(self.child(state), 1 / BRANCH) for _ in range(BRANCH)] if state[0] < self.depth else []

    def sample(self):
        state = self.root
        while state[0] < self.depth:
            state = self.child(state)
        return state


def run_mcts(problem, width):
    """AlphaZero 的用法：走一步，搜一轮，取访问最多的子节点，子树接着用。

    预算均摊在前四分之三的步上：最后几步的子树太小，花不完。重访终局不花预算，所以每步至多 64 次模拟。
    """
    budget, paid_moves = BRANCH * width * problem.depth, problem.depth * 3 // 4
    node = Node(problem.root)
    for move in range(problem.depth):
        reserve = BRANCH * (problem.depth - 1 - move)  # 给后面每步留一次展开
        allowed = min(budget * min(move + 1, paid_moves) // paid_moves, budget - reserve)
        for _ in range(64):
            if node.children and problem.generated + BRANCH > allowed:
                break
            mcts(node, expand=problem.expand, evaluate=lambda s: s[2], num_simulations=1, c_puct=3.0)
        node = max(node.children, key=lambda k: (k.visits, k.q))
    return node.state[1] == ALIVE


def run_beam(problem, width):
    beam = [problem.root] * width
    for _ in range(problem.depth):
        candidates = [problem.child(state) for state in beam for _ in range(BRANCH)]
        beam = sorted(candidates, key=lambda s: -s[2])[:width]
    return beam[0][1] == ALIVE


def run_best_of_n(problem, width):
    return max((problem.sample() for _ in range(width * BRANCH)), key=lambda s: s[2])[1] == ALIVE


def run_majority(problem, width):
    """答对的都是答案 0；答错的均匀落在 20 个错误答案上。"""
    rng, samples = problem.rng, [problem.sample() for _ in range(width * BRANCH)]
    answers = [0 if s[1] == ALIVE else rng.randint(1, WRONG_ANSWERS) for s in samples]
    return Counter(answers).most_common(1)[0][0] == 0


METHODS = {"MCTS": run_mcts, "束搜索": run_beam, "best-of-n": run_best_of_n, "多数投票": run_majority}


def accuracy(method, *, seed, problems=30, width=8, **options):
    """正确率；每题生成的步数不超过 4·width·depth，8 步以上平均至少用掉九成。"""
    rng, solved, generated, budget = random.Random(seed), 0, 0, BRANCH * width * options["depth"]
    for _ in range(problems):
        problem = Problem(rng, **options)
        solved += METHODS[method](problem, width)
        generated += problem.generated
        assert problem.generated <= budget
    assert options["depth"] < 8 or generated >= 0.9 * budget * problems
    return solved / problems


SEEDS, SIGMAS, BLINDS = range(5), [0.05, 0.2, 0.4, 0.8], [0.0, 0.15, 0.3, 0.5]
noisy, blinded = {}, {}
for name in ("MCTS", "束搜索", "best-of-n"):
    noisy[name] = torch.tensor([[accuracy(name, seed=k, depth=8, sigma=x) for x in SIGMAS] for k in SEEDS])
    blinded[name] = torch.tensor([[accuracy(name, seed=k, depth=8, blind=x) for x in BLINDS] for k in SEEDS])
majority = torch.tensor([accuracy("多数投票", seed=k, problems=200, depth=8) for k in SEEDS])
fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.4), sharey=True)
for ax, grid, results, label in [
    (axes[0], SIGMAS, noisy, "独立误差的标准差"),
    (axes[1], BLINDS, blinded, "看不出的错步占比"),
]:
    for name, style, color in [("MCTS", "o-", "C0"), ("束搜索", "s--", "C1"), ("best-of-n", "^-.", "C2")]:
        values = results[name]
        ax.plot(grid, values.mean(0), style, color=color, label=name)
        ax.fill_between(grid, values.min(0)[0], values.max(0)[0], color=color, alpha=0.15, linewidth=0)
    ax.axhline(majority.mean(), linestyle=":", color="C3", label="多数投票")
    ax.set_xlabel(label)
    ax.set_ylim(0, 1.05)


def approved_and_right(depth, blind, step_accuracy):
    """没被发现有错的路径里，真的对的占比。"""
    return (step_accuracy / (step_accuracy + (1 - step_accuracy) * blind)) ** depth


closed_form = torch.tensor([approved_and_right(8, x, PASS_RATE ** (1 / 8)) for x in BLINDS])
axes[1].plot(BLINDS, closed_form, "-", color="C4", linewidth=1, label="闭式")
axes[0].set_ylabel("答对的比例")
axes[1].legend(frameon=False, loc="lower left")

vote = majority.mean().item()
assert abs(vote - 0.84) < 0.005
assert noisy["束搜索"].min() >= 0.90  # 独立误差：束搜索每个种子都在 0.9 以上
for name in ("MCTS", "best-of-n"):  # 五个种子的平均
    assert 0.65 < noisy[name][:, 3].mean() < 0.79 and vote > 0.82, name
assert noisy["MCTS"][:, :2].mean(0).min() > 0.9
for name in blinded:  # 看不出的错步：三种做法都跟着闭式掉
    assert (blinded[name].mean(0) - closed_form).abs().max() < 0.09, name
    assert blinded[name][:, 2].mean() < vote - 0.1 and blinded[name][:, 3].mean() < vote - 0.25
assert [f"{x:.2f}" for x in closed_form.tolist()] == ["1.00", "0.77", "0.60", "0.43"]
assert abs(approved_and_right(10**6, 0.3, 0.2**1e-6) - 0.2**0.3) < 1e-5  # 步数趋于无穷的极限

# %%
#| label: depth-compounding
#| caption: 单步正确率固定 0.8、看不出的错步占 0.2：步数加长，依赖价值的三种做法都沿闭式往下掉
#| echo: fold
rows = []
DEPTHS = (4, 8, 16)
for name in METHODS:
    options = {"blind": 0.2, "step_accuracy": 0.8, "problems": 20}
    means = [sum(accuracy(name, seed=k, depth=d, **options) for k in SEEDS) / 5 for d in DEPTHS]
    rows.append([name, *(f"{v:.2f}" for v in means)])
rows.append(["闭式", *(f"{approved_and_right(d, 0.2, 0.8):.2f}" for d in DEPTHS)])
assert [row[1:] for row in rows[3:]] == [["1.00", "0.77", "0.00"], ["0.82", "0.68", "0.46"]]
assert f"{0.8**16:.2f}" == "0.03"
for row in rows[:3]:
    assert all(abs(float(a) - float(b)) < 0.1 for a, b in zip(row[1:], rows[4][1:], strict=True))
Markdown(tabulate(rows, headers=["做法", "4 步", "8 步", "16 步"], tablefmt="github", disable_numparse=True))

# %%
#| label: search-harder
#| caption: 看不出的错步占 0.15，价值还被高估 0.3：束越宽越差，多数投票越多越好
#| echo: fold
rows = []
for name in ("束搜索", "best-of-n", "多数投票"):
    options = {"depth": 8, "blind": 0.15, "bonus": 0.3, "problems": 30}
    means = [sum(accuracy(name, seed=k, width=w, **options) for k in SEEDS) / 5 for w in (1, 4, 16)]
    rows.append([name, *(f"{v:.2f}" for v in means)])
assert [row[1:] for row in rows] == [
    ["0.39", "0.03", "0.00"],
    ["0.45", "0.33", "0.01"],
    ["0.25", "0.62", "0.99"],
]
Markdown(
    tabulate(rows, headers=["做法", "32 步", "128 步", "512 步"], tablefmt="github", disable_numparse=True)
)
