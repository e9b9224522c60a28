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
# # PPO（含 GAE）在大模型里怎么做：实验
#
# 页面 docs/rl/ppo.md 的数字和图都在这里算出来。除训练那一格外没有抽样：期望与方差都对全部回答枚举求和。

# %%
#| label: setup
import itertools

import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards, ppo_loss, whiten

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)


def markdown_table(rows, headers):
    return Markdown(tabulate(rows, headers=headers, tablefmt="github", disable_numparse=True))


# %%
#| label: three-steps
#| caption: 三个 token 的回答，只有最后一步有奖励 1，价值依次是 0.5、0.6、0.8：λ 取 0、0.5、1 时三个位置的优势与第一个位置的回归目标
rewards, values = torch.tensor([[0.0, 0.0, 1.0]]), torch.tensor([[0.5, 0.6, 0.8]])
rows = []
for lam in (0.0, 0.5, 1.0):
    advantages, returns = generalized_advantage(rewards, values, rewards.bool() | True, gamma=1.0, lam=lam)
    rows.append([f"{lam:g}"] + [f"{x:.2f}" for x in [*advantages[0].tolist(), returns[0, 0].item()]])
assert rows[0] == ["0", "0.10", "0.20", "0.20", "0.60"]
assert rows[1] == ["0.5", "0.25", "0.30", "0.20", "0.75"]
assert rows[2] == ["1", "0.50", "0.40", "0.20", "1.00"]
n_steps = torch.tensor([0.6, 0.8, 1.0]) - 0.5  # 一步、两步、三步优势，λ 取 0.5 时的权重是 1/2、1/4、1/4
assert torch.allclose(n_steps @ torch.tensor([0.5, 0.25, 0.25]), torch.tensor(0.25))
assert torch.allclose(n_steps @ torch.tensor([1.0, 0.5, 0.25]), torch.tensor(0.375))  # 漏了 1−λ
assert torch.allclose(n_steps @ torch.tensor([0.5, 0.25, 0.125]), torch.tensor(0.1875))  # 末项也乘 1−λ
assert f"{0.95**100:.3f}" == "0.006"
markdown_table(rows, [r"$\lambda$", r"$\hat A_1$", r"$\hat A_2$", r"$\hat A_3$", r"$\hat R_1$"])

# %%
#| label: lambda-bias-noise
#| caption: 价值带误差时梯度的偏差随 λ 下降、64 条回答的噪声从 λ 为 0.5 起上升，合起来的误差在中间最小；样本多一百倍，最小处右移到 0.95 附近
STEPS = 12  # 每条回答 12 个 token，词表只有 0 和 1；状态是（位置，已有几个 1）；得分：至少 7 个 1
tokens = torch.tensor(list(itertools.product((0, 1), repeat=STEPS)))  # (4096, 12)
ones = torch.cat([torch.zeros(len(tokens), 1, dtype=torch.long), tokens.cumsum(1)], 1)
state = torch.arange(STEPS) * (STEPS + 1) + ones[:, :-1]  # (4096, 12)
prob_one = (0.5 * torch.randn(STEPS * (STEPS + 1), generator=torch.Generator().manual_seed(0))).sigmoid()
probs = torch.where(tokens == 1, prob_one[state], 1 - prob_one[state]).prod(1)  # (4096)
score = (ones[:, -1] >= 7).double()
everywhere = torch.ones_like(tokens, dtype=torch.bool)
token_rewards = kl_shaped_rewards(
    score, torch.zeros_like(state, dtype=torch.float64), torch.zeros(state.shape), everywhere, kl_coef=0.0
)
dlog = tokens - prob_one[state]  # ∂log π(a|s)/∂logit(s)


def expected_gradient(advantages):
    grad = torch.zeros(len(prob_one))
    return grad.index_add(0, state.flatten(), (probs[:, None] * advantages * dlog).flatten())


value = torch.zeros(STEPS + 1, STEPS + 1)  # 精确价值：从后往前的动态规划
value[STEPS] = (torch.arange(STEPS + 1) >= 7).double()
up = prob_one.view(STEPS, STEPS + 1)[:, :STEPS]
for t in reversed(range(STEPS)):
    value[t, :STEPS] = up[t] * value[t + 1, 1:] + (1 - up[t]) * value[t + 1, :STEPS]
value = value[:STEPS].flatten()
truth = expected_gradient(score[:, None].expand(-1, STEPS))


def bias_and_noise(values, lam):
    """相对 ∇J 长度的偏差，以及单条回答的梯度的标准差。"""
    advantages, _ = generalized_advantage(token_rewards, values[state], everywhere, gamma=1.0, lam=lam)
    mean = expected_gradient(advantages)
    second = (probs * (advantages * dlog).square().sum(1)).sum()  # 一条回答里每个状态至多出现一次
    return (mean - truth).norm() / truth.norm(), (second - mean.square().sum()).sqrt() / truth.norm()


LAMBDAS = (0.0, 0.5, 0.8, 0.9, 0.95, 0.99, 1.0)
errors = 0.1 * torch.randn(5, len(value), generator=torch.Generator().manual_seed(1))  # 五份不同的价值误差
noisy = torch.tensor([[bias_and_noise(value + e, lam) for lam in LAMBDAS] for e in errors])  # (5, 7, 2)
exact = torch.tensor([bias_and_noise(value, lam) for lam in LAMBDAS])  # (7, 2)
bias, noise = noisy[..., 0], noisy[..., 1] / 64**0.5
total = (bias.square() + noise.square()).sqrt()
total_large = (bias.square() + noise.square() / 100).sqrt()

fig, ax = plt.subplots(figsize=(6.0, 3.6))
for curve, style, color, label, place in [
    (total, "-o", "C2", "总误差，64 条", (1.35, 0.49)),
    (noise, ":s", "C0", "噪声，64 条", (1.75, 0.285)),
    (bias, "--^", "C1", "偏差", (0.42, 0.40)),
    (total_large, "-.d", "C3", "总误差，6,400 条", (4.1, 0.125)),
]:
    ax.plot(range(7), curve.mean(0), style, color=color, markersize=5)
    ax.text(*place, label, color=color, fontsize=10.5)
ax.set_xticks(range(7), [f"{lam:g}" for lam in LAMBDAS])
ax.set_xlabel("λ（不等距）")
ax.set_ylabel("误差／真梯度的长度")
ax.set_ylim(-0.02, 0.75)

assert (exact[:, 0] < 1e-12).all() and (exact[1:, 1] > exact[:-1, 1]).all()  # 价值精确：无偏，方差随 λ 升
assert (bias[:, 1:] < bias[:, :-1]).all() and (bias[:, -1] < 1e-12).all()
assert (noise[:, 2:] > noise[:, 1:-1]).all() and (noise[:, -1] > noise[:, 0]).all()
assert ((noise[:, 1] / noise[:, 0] - 1).abs() < 0.05).all()  # λ 从 0 到 0.5 几乎不变，五份里有升有降
best = [LAMBDAS[i] for i in total.argmin(1).tolist()]
best_large = [LAMBDAS[i] for i in total_large.argmin(1).tolist()]
assert set(best) == {0.5, 0.8} and set(best_large) == {0.95, 0.99}  # 五份误差
assert f"{bias[:, 0].mean():.2f} {bias[:, 4].mean():.2f}" == "0.49 0.03"
assert f"{noise[:, 0].mean():.2f} {noise[:, -1].mean():.2f}" == "0.32 0.65"
assert f"{exact[0, 1] / 8:.2f} {exact[-1, 1] / 8:.2f}" == "0.22 0.63"  # 价值精确时的噪声，64 条

# %%
# 训练与错误写法共用的小语言：token 0、1 与 EOS（2），最长 8；全部 511 条回答，每个前缀一行 logits、一个价值
LENGTH, EOS, BETA = 8, 2, 0.1
texts = [[*bits, EOS] for n in range(LENGTH) for bits in itertools.product((0, 1), repeat=n)]
texts += [list(bits) for bits in itertools.product((0, 1), repeat=LENGTH)]  # 写满也没有 EOS
tokens = torch.tensor([text + [EOS] * (LENGTH - len(text)) for text in texts])  # (511, 8)，EOS 之后是填充
mask = torch.tensor([[t < len(text) for t in range(LENGTH)] for text in texts])
prefix = torch.tensor(
    [
        [2**t - 1 + int("0" + "".join(map(str, text[:t])), 2) if t < len(text) else 0 for t in range(LENGTH)]
        for text in texts
    ]
)
scores = torch.tensor([float(text.count(0) == 3 and text.count(1) == 3 and EOS in text) for text in texts])
ref_logits = 0.5 * torch.randn(2**LENGTH - 1, 3, generator=torch.Generator().manual_seed(0))
ref_tokens = ref_logits.log_softmax(-1)[prefix, tokens]


def token_log_probs(logits):  # (..., 255, 3) -> (..., 511, 8)
    return logits.log_softmax(-1)[..., prefix, tokens]


def response_log_probs(logits):
    return token_log_probs(logits).masked_fill(~mask, 0.0).sum(-1)


def objective(logits):
    """J = E[得分] − β KL(π‖π_ref)，对 511 条回答求和。"""
    log_probs = response_log_probs(logits)
    return (log_probs.exp() * (scores - BETA * (log_probs - response_log_probs(ref_logits)))).sum(-1)


def exact_values(logits):  # (runs, 255, 3) -> (runs, 255)
    """每个前缀的真实价值：往后的逐 token 奖励（含 KL），对经过它的回答按概率平均。"""
    log_probs = token_log_probs(logits)
    to_go = torch.stack([kl_shaped_rewards(scores, x, ref_tokens, mask, kl_coef=BETA) for x in log_probs])
    to_go = to_go.flip(-1).cumsum(-1).flip(-1)
    weights = response_log_probs(logits).exp()[..., None] * mask
    sums = torch.zeros(2, *logits.shape[:2])
    sums[0].index_add_(1, prefix.flatten(), (weights * to_go).flatten(1))
    sums[1].index_add_(1, prefix.flatten(), weights.flatten(1))
    return sums[0] / sums[1]


best_objective = BETA * torch.logsumexp(response_log_probs(ref_logits) + scores / BETA, 0)  # β log Z

# %%
#| label: train-lambda
#| caption: 五次独立训练的平均与范围：λ 取 0 时，价值边学边用最慢，换成精确的价值反而最快；λ 取 0.95 居中；点线是最优值
RUNS, BATCH, UPDATES, EPOCHS = 5, 64, 100, 2
rows = torch.arange(RUNS).repeat_interleave(BATCH)[:, None]  # 五次训练并排放在一批里，参数互不相干


def train(lam, *, use_exact_values=False):
    generator = torch.Generator().manual_seed(1)
    theta = ref_logits.repeat(RUNS, 1, 1).requires_grad_()  # 策略，从参考策略出发
    phi = torch.zeros(theta.shape[:2]).requires_grad_()  # 价值模型，从 0 出发
    optimizer = torch.optim.Adam([theta, phi], lr=0.05)
    curve = [objective(theta.detach())]
    for _ in range(UPDATES):
        with torch.no_grad():
            if use_exact_values:
                phi.copy_(exact_values(theta))
            probs = response_log_probs(theta).exp()
            drawn = torch.multinomial(probs, BATCH, replacement=True, generator=generator).flatten()
        batch_tokens, batch_mask, batch_prefix = tokens[drawn], mask[drawn], prefix[drawn]

        def forward(batch_tokens=batch_tokens, batch_prefix=batch_prefix):
            full = theta[rows, batch_prefix].log_softmax(-1)
            log_probs = full.gather(-1, batch_tokens[..., None])[..., 0]
            return log_probs, phi[rows, batch_prefix], -(full.exp() * full).sum(-1)

        with torch.no_grad():  # 采样之后算一次，几轮更新里不变
            old_log_probs, old_values, _ = forward()
            rewards = kl_shaped_rewards(
                scores[drawn], old_log_probs, ref_tokens[drawn], batch_mask, kl_coef=BETA
            )
            advantages, returns = generalized_advantage(rewards, old_values, batch_mask, gamma=1.0, lam=lam)
            pieces = zip(advantages.split(BATCH), batch_mask.split(BATCH), strict=True)
            advantages = torch.cat([whiten(*piece) for piece in pieces])  # 每次训练各自白化
        for _ in range(EPOCHS):
            log_probs, values, entropy = forward()
            loss = ppo_loss(
                log_probs, old_log_probs, advantages, values, old_values, returns, entropy, batch_mask
            )
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        curve.append(objective(theta.detach()))
    return torch.stack(curve, 1)  # (5, 101)


curves = {
    "λ=0，精确的价值": train(0.0, use_exact_values=True),
    "λ=0.95，边学边用": train(0.95),
    "λ=1，边学边用": train(1.0),
    "λ=0，边学边用": train(0.0),
}
fig, ax = plt.subplots(figsize=(6.0, 3.6))
for name, style, color in [
    ("λ=0，精确的价值", "-.", "C0"),
    ("λ=0.95，边学边用", "-", "C2"),
    ("λ=0，边学边用", "--", "C1"),
]:
    low, high = curves[name].min(0).values[::2], curves[name].max(0).values[::2]
    ax.fill_between(range(0, UPDATES + 1, 2), low, high, color=color, alpha=0.2, linewidth=0)
    ax.plot(range(0, UPDATES + 1, 2), curves[name].mean(0)[::2], style, color=color, label=name)
ax.axhline(best_objective, linestyle=":", color="C3")
ax.text(2, 0.525, f"最优值 {best_objective:.3f}", color="C3", fontsize=10.5)
ax.set_xlabel("更新次数（每次 64 条回答）")
ax.set_ylabel("目标：得分减 β·KL")
ax.set_xlim(0, UPDATES)
ax.set_ylim(0, 0.58)
ax.legend(loc="lower right")

at_40 = {name: f"{x[:, 40].min():.2f}–{x[:, 40].max():.2f}" for name, x in curves.items()}
assert at_40 == {
    "λ=0，精确的价值": "0.42–0.43",
    "λ=0.95，边学边用": "0.32–0.38",
    "λ=1，边学边用": "0.31–0.37",
    "λ=0，边学边用": "0.09–0.28",
}
assert f"{best_objective:.3f} {objective(ref_logits):.3f}" == "0.509 0.007"
assert all((curve < best_objective).all() for curve in curves.values())  # 最优值确实是上界
last = {name: curve[:, -1].mean() for name, curve in curves.items()}
assert (
    f"{last['λ=0，边学边用']:.2f} {last['λ=0.95，边学边用']:.2f} {last['λ=0，精确的价值']:.2f}"
    == "0.38 0.42 0.48"
)

# %%
#| label: wrong-versions
#| caption: 价值精确、511 条回答精确求和：正确写法的期望梯度就是真梯度，各种误写的相对误差与余弦；白化会改长度，只看余弦
policy = ref_logits + 0.5 * torch.randn(ref_logits.shape, generator=torch.Generator().manual_seed(3))
leaf = policy.clone().requires_grad_()
(truth,) = torch.autograd.grad(objective(leaf), leaf)
log_probs, value = token_log_probs(policy), exact_values(policy[None])[0, prefix]
weights = response_log_probs(policy).exp()[:, None] * mask  # (511, 8)
full_mask = torch.ones_like(mask)


def shaped(log_probs=log_probs, ref=ref_tokens, scores=scores, mask=mask):
    return kl_shaped_rewards(scores, log_probs, ref, mask, kl_coef=BETA)


def advantages_of(rewards=None, values=value, mask=mask, gamma=1.0, lam=0.95):
    rewards = shaped() if rewards is None else rewards
    return generalized_advantage(rewards, values, mask, gamma=gamma, lam=lam)[0]


def compare(advantages):
    leaf = policy.clone().requires_grad_()
    (grad,) = torch.autograd.grad((weights * advantages * token_log_probs(leaf)).sum(), leaf)
    cosine = torch.cosine_similarity(grad.flatten(), truth.flatten(), 0).item()
    return ((grad - truth).norm() / truth.norm()).item(), cosine


def standardise(x, weight, dim):
    mean = (weight * x).sum(dim, keepdim=True) / weight.sum(dim, keepdim=True)
    variance = (weight * (x - mean).square()).sum(dim, keepdim=True) / weight.sum(dim, keepdim=True)
    return (x - mean) / (variance + 1e-8).sqrt()


padded_logs = torch.where(mask, log_probs, -3.0), torch.where(mask, ref_tokens, -2.0)  # 填充处也有对数概率
score_only = shaped(log_probs, log_probs)  # KL 为 0，只剩最后一个 token 的得分
kl_everywhere = score_only + shaped(*padded_logs, scores=0 * scores, mask=full_mask)
late_score = shaped(scores=0 * scores) + torch.nn.functional.pad(scores[:, None], (LENGTH - 1, 0))
shifted = torch.nn.functional.pad((value * mask)[:, 1:], (0, 1))  # 第 t 位放成 V(s_{t+1})
cases = {
    "正确，λ 取 0": compare(advantages_of(lam=0.0)),
    "正确，λ 取 0.95": compare(advantages_of()),
    "γ 与 λ 写反": compare(advantages_of(gamma=0.95, lam=1.0)),
    "价值错后一位": compare(advantages_of(values=shifted)),
    "得分放最后一列": compare(advantages_of(late_score)),
    "KL 的符号反了": compare(advantages_of(shaped(ref_tokens, log_probs))),
    "自举到填充的价值": compare(advantages_of(values=value.where(mask, 0.5), mask=full_mask)),
    "填充也扣 KL": compare(advantages_of(kl_everywhere, value * mask, full_mask)),
    "白化，全批": compare(standardise(advantages_of(lam=1.0), weights, (0, 1))),
    "白化，逐行": compare(standardise(advantages_of(lam=1.0), mask.double(), 1)),
}
rows = [
    [name, "—" if name.startswith("白化") else f"{abs(error):.3f}", f"{cosine:.3f}"]
    for name, (error, cosine) in cases.items()
]
for name, (error, cosine) in cases.items():
    assert (error < 1e-12) == name.startswith("正确"), name
    assert (abs(cosine - 1) < 1e-12) == (name.startswith("正确") or name == "白化，全批"), name
assert [row[1] for row in rows[2:8]] == ["0.063", "0.370", "0.396", "1.548", "1.883", "7.154"]
assert [row[2] for row in rows[5:8]] == ["-0.512", "-0.056", "-0.472"] and rows[9][2] == "0.775"
markdown_table(rows, ["写法", "相对误差", "与真梯度的余弦"])

# %%
#| label: tool-tokens
#| caption: 六个位置、中间两个是工具返回：跳过工具 token 与根本没有它们时的优势相同，另两种做法不同，只在 λ 为 1 时当成零价值的一步才一致
rewards, values = torch.tensor([[0, 0, 0, 0, 0, 1.0]]), torch.tensor([[0.2, 0.3, 9.0, 9.0, 0.5, 0.6]])
model_tokens = torch.tensor([[1, 1, 0, 0, 1, 1]]).bool()
keep = model_tokens[0]


def on_model_tokens(lam):
    def run(values, mask):
        return generalized_advantage(rewards, values, mask, gamma=1.0, lam=lam)[0][0, keep]

    everything = torch.ones_like(model_tokens)
    no_tool, _ = generalized_advantage(
        rewards[:, keep], values[:, keep], everything[:, keep], gamma=1.0, lam=lam
    )
    return {
        "没有工具": no_tool[0],
        "跳过": run(values, model_tokens),
        "当成零价值的一步": run(values * model_tokens, everything),
        "不看掩码": run(values, everything),
    }


partial, one = on_model_tokens(0.8), on_model_tokens(1.0)
assert torch.equal(partial["跳过"], partial["没有工具"]) and torch.equal(one["跳过"], one["没有工具"])
assert torch.allclose(one["当成零价值的一步"], one["跳过"])
assert not torch.allclose(partial["不看掩码"], partial["跳过"])
rows = [[name] + [f"{x:.3f}" for x in row.tolist()] for name, row in partial.items()]
assert rows[1] == ["跳过", "0.529", "0.536", "0.420", "0.400"]
assert rows[2] == ["当成零价值的一步", "0.288", "0.235", "0.420", "0.400"]
markdown_table(rows, ["做法", *(rf"$\hat A_{i}$" for i in (1, 2, 5, 6))])
