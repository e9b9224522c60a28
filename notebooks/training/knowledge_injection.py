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
# # SFT 可以注入知识吗：实验
#
# 页面 `docs/training/knowledge-injection.md` 的实验：写入新事实对旧事实的干扰、事实表上的微调、说法的多样性与可提取性、反转诅咒、采样次数与误判。

# %%
#| label: setup
import matplotlib.pyplot as plt
import torch
from IPython.display import Markdown
from tabulate import tabulate

from snippets.training.knowledge_injection import (
    expected_interference,
    extractable_share,
    knowledge_category,
    linear_memory_interference,
    linear_memory_write,
)

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)  # 换机器时舍入误差不致改变表里的数
F = torch.nn.functional


def unit(*shape, generator):
    return F.normalize(torch.randn(*shape, generator=generator), dim=-1)


def near(printed, expected, *, atol=0.02):
    """页面引用的训练结果：允许在别的机器上差几个样本。"""
    numbers = torch.tensor([float(x) for x in printed])
    return torch.allclose(numbers, torch.tensor(expected), rtol=0.0, atol=atol)


# %%
#| label: interference
#| caption: 线性联想记忆里写入新事实后，旧事实读出的平方位移随条数增长：点是随机键的实测，线是公式；键重叠一半时是互不相关时的 65 倍
#| echo: fold
interference_generator = torch.Generator().manual_seed(0)
KEY_DIM, OLD = 256, 200


def random_keys(count, shared, overlap):
    """共享方向占 overlap 的键。"""
    own = unit(count, KEY_DIM, generator=interference_generator)
    return overlap**0.5 * shared + (1 - overlap) ** 0.5 * own


fig, ax = plt.subplots(figsize=(6.0, 3.4))
counts, measured = [4, 16, 64, 256], {}
for overlap, style, marker, color in [(0.0, "-", "o", "C0"), (0.1, "--", "s", "C1"), (0.5, "-.", "^", "C3")]:
    points = []
    for count in counts:
        repeats = []
        for _ in range(40):
            shared = unit(KEY_DIM, generator=interference_generator)
            new, old = (random_keys(size, shared, overlap) for size in (count, OLD))
            errors = unit(count, 40, generator=interference_generator)  # 零均值、彼此独立
            repeats.append(linear_memory_interference(errors, new, old).mean())
        points.append(torch.stack(repeats).mean().item())
    theory = [expected_interference(num_new=n, key_dim=KEY_DIM, overlap=overlap) for n in counts]
    measured[overlap] = (points, theory)
    ax.plot(counts, theory, style, color=color)
    ax.plot(counts, points, style, marker=marker, color=color, label=f"键的重叠 {overlap:g}")
ax.set_xscale("log", base=2)
ax.set_yscale("log")
ax.set_xticks(counts, counts)
ax.set_xlabel("写入的新事实条数")
ax.set_ylabel("旧事实的平方位移")
ax.legend(frameon=False, loc="upper left")

worst = max(
    abs(p / t - 1) for points, theory in measured.values() for p, t in zip(points, theory, strict=True)
)
assert worst < 0.05
ratios = [
    expected_interference(num_new=1, key_dim=KEY_DIM, overlap=c)
    / expected_interference(num_new=1, key_dim=KEY_DIM)
    for c in (0.1, 0.5)
]
assert f"{ratios[0]:.2f} {ratios[1]:.0f}" == "3.55 65"
# 已经会的事实误差为 0，一步写入不改 W；不会的才改
known_keys = unit(20, 64, generator=interference_generator)
values = torch.eye(20)
memory = values.mT @ torch.linalg.pinv(known_keys).mT  # 最小范数解，20 条全对
assert (linear_memory_write(memory, known_keys, values) - memory).abs().max().item() < 1e-12

# %%
#| label: fact-table-curves
#| caption: 事实表微调，训练集一半已知一半未知，五个种子的范围：已知的五步就拟合，留出的已知事实先升后降，未知的最后才拟合
#| echo: fold
SUBJECTS, KNOWN_SUBJECTS, RELATIONS, OBJECTS = 150, 120, 4, 40
WIDTH, HIDDEN, SEEDS, STEPS = 32, 64, 5, 60
facts_generator = torch.Generator().manual_seed(0)


def random_model(count):
    """主体、关系、问法三张嵌入表，一个隐藏层；count 个模型并排。"""
    shapes = [(SUBJECTS, WIDTH, 1.0), (RELATIONS, WIDTH, 1.0), (2, WIDTH, 2.0)]
    shapes += [(WIDTH, HIDDEN, WIDTH**-0.5)] * 3 + [(HIDDEN, OBJECTS, HIDDEN**-0.5)]
    return [scale * torch.randn(count, a, b, generator=facts_generator) for a, b, scale in shapes]


def answer_logits(model, form):
    """所有（主体，关系）在问法 form 下的 logits，形状 (模型, 主体, 关系, 客体)。"""
    subject, relation, phrasing, a, b, c, out = model
    hidden = (subject @ a)[:, :, None] + (relation @ b)[:, None] + (phrasing[:, form : form + 1] @ c)[:, None]
    return (torch.relu(hidden).flatten(1, 2) @ out).unflatten(1, (SUBJECTS, RELATIONS))


def masked_loss(model, answers, mask, form):
    """两个阶段用的是同一个交叉熵；按各自的事实数平均，再把并排的模型加起来。"""
    picked = answer_logits(model, form).log_softmax(-1).gather(-1, answers[..., None])[..., 0]
    return -((picked * mask).sum((1, 2)) / mask.sum((1, 2))).sum()


def accuracy(model, answers, mask, form):
    with torch.no_grad():
        right = (answer_logits(model, form).argmax(-1) == answers) * mask
    return right.sum((1, 2)) / mask.sum((1, 2)).clamp(min=1)


def adam(model, loss, *, steps, lr, watch=None):
    model = [p.clone().requires_grad_() for p in model]
    optimizer = torch.optim.Adam(model, lr=lr)
    for step in range(steps + 1):
        if watch is not None and step % 5 == 0:
            watch(step, model)
        if step < steps:
            optimizer.zero_grad()
            loss(model).backward()
            optimizer.step()
    return [p.detach() for p in model]


def mask_of(indices):
    flat = torch.zeros(SEEDS, SUBJECTS * RELATIONS).scatter(1, indices, 1.0)
    return flat.view(SEEDS, SUBJECTS, RELATIONS)


answers = torch.randint(OBJECTS, (SEEDS, SUBJECTS, RELATIONS), generator=facts_generator)
seen = torch.zeros(SEEDS, SUBJECTS, RELATIONS)
seen[:, :KNOWN_SUBJECTS] = 1.0
base = adam(random_model(SEEDS), lambda m: masked_loss(m, answers, seen, 0), steps=60, lr=0.02)
assert accuracy(base, answers, seen, 0).min() == 1.0  # 预训练：120 个主体的 480 条，陈述的说法，全对

total_known = KNOWN_SUBJECTS * RELATIONS
known_order = torch.stack([torch.randperm(total_known, generator=facts_generator) for _ in range(SEEDS)])
unknown_order = total_known + torch.stack(
    [torch.randperm(SUBJECTS * RELATIONS - total_known, generator=facts_generator) for _ in range(SEEDS)]
)
recipes = [(120, 0), (90, 30), (60, 60), (0, 120), (0, 60), (360, 60)]  # （已知条数，未知条数）
known_mask = torch.cat([mask_of(known_order[:, 120 : 120 + k]) for k, _ in recipes])
unknown_mask = torch.cat([mask_of(unknown_order[:, :u]) for _, u in recipes])
held_out = mask_of(known_order[:, :120]).repeat(len(recipes), 1, 1)  # 预训练见过，微调不见
tiled = [p.repeat(len(recipes), 1, 1) for p in base]
all_answers = answers.repeat(len(recipes), 1, 1)
history = []


def watch(step, model):
    """三条曲线，都用微调的新问法提问。"""
    groups = (known_mask, unknown_mask, held_out)
    history.append(torch.stack([accuracy(model, all_answers, m, 1) for m in groups]))


adam(
    tiled,
    lambda m: masked_loss(m, all_answers, known_mask + unknown_mask, 1),
    steps=STEPS,
    lr=0.005,
    watch=watch,
)
curves = torch.stack(history).unflatten(2, (len(recipes), SEEDS))  # (时刻, 3, 配方, 种子)

fig, ax = plt.subplots(figsize=(6.0, 3.6))
steps = torch.arange(0, STEPS + 1, 5)
labels = [("训练集里已知的", "--", "C0"), ("训练集里未知的", "-.", "C3"), ("留出的已知事实", "-", "C2")]
for which, (label, style, color) in enumerate(labels):
    curve = curves[:, which, 2]
    ax.plot(steps, curve.mean(-1), style, color=color, label=label)
    ax.fill_between(steps, curve.min(-1)[0], curve.max(-1)[0], color=color, alpha=0.2, linewidth=0)
ax.axvline(5, linestyle=":", color="C5", label="早停")
ax.set_xlim(0, STEPS)
ax.set_ylim(0, 1.02)
ax.set_xlabel("微调步数")
ax.set_ylabel("用新问法提问的准确率")
ax.legend(frameon=False, loc="center right", bbox_to_anchor=(1.0, 0.66))

half = curves[:, :, 2]  # 一半已知一半未知
shown = [half[t, w].mean().item() for t in (0, 1, -1) for w in range(3)]
assert near(shown, [0.49, 0.02, 0.53, 0.95, 0.07, 0.75, 1.00, 1.00, 0.40]), shown
assert half[:, 2].mean(-1).argmax() == 1  # 留出准确率在第 5 步最高
assert (half[1, 0] > half[1, 1] + 0.8).all()  # 五个种子都是已知的先拟合
assert (half[1, 2] - half[-1, 2] > 0.25).all() and (half[1, 2] > half[0, 2]).all()  # 五个种子都先升后降
assert (half[-1, 2] < half[0, 2]).all()  # 最后比微调前还低

# %%
#| label: recipe-table
#| caption: 不同配方在早停与训到底时的准确率：有未知时留出的已知事实掉得多；未知条数相同，混入的已知越多掉得越少
#| echo: fold
rows, summary = [], {}
for index, (known, unknown) in enumerate(recipes):
    kept = curves[:, 2, index]  # (时刻, 种子)
    best = kept.mean(-1).argmax().item()
    fitted = curves[:, 1, index].mean(-1)
    summary[known, unknown] = (kept[best].mean().item(), kept[-1], fitted[best].item(), fitted[-1].item())
    learned = f"{fitted[-1]:.2f}" if unknown else "—"
    rows.append([known, unknown, f"{kept[best].mean():.2f}", f"{kept[-1].mean():.2f}", learned])

end = {recipe: value[1] for recipe, value in summary.items()}
fixed_size = [end[r] for r in [(120, 0), (90, 30), (60, 60)]]
assert all(
    (a > b).all() for a, b in zip(fixed_size, fixed_size[1:], strict=False)
)  # 逐种子：0、30、60 条依次更低
worse = end[0, 120] < end[60, 60]
assert worse.any() and not worse.all()  # 60 条与 120 条，五个种子里分不出高低
assert (end[120, 0] > end[60, 60] + 0.2).all() and (end[60, 60] > end[0, 60]).all()  # 逐种子
assert (end[360, 60] > end[60, 60] + 0.1).all()  # 同样 60 条未知，回放越多越好，五个种子都是
assert all(value[2] < 0.2 for value in summary.values()) and end[360, 60].max() < 0.75
assert near([row[3] for row in rows], [0.75, 0.51, 0.40, 0.38, 0.29, 0.64]), rows
assert near([row[2] for row in rows], [0.83, 0.78, 0.75, 0.72, 0.66, 0.88]), rows
assert near([row[4] for row in rows[1:]], [1.00, 1.00, 0.97, 1.00, 0.99]), rows
Markdown(
    tabulate(
        rows,
        headers=["已知条数", "未知条数", "留出，早停", "留出，训到底", "未知，训到底"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: phrasing-table
#| caption: 同一批事实用不同个数的说法写进线性记忆，训练集都全对；只给名字读出的份额等于公式；换新说法提问，重复同一种说法没有帮助，多种说法有；所有人共用一个模板时一种就够
#| echo: fold
PEOPLE, CONTEXT_NORM, CHOICES, DIM = 40, 3.0, 20, 1024


def injected(num_phrasings, *, repeat=1, shared=False):
    """最小范数地拟合全部说法，返回五次重复的（训练准确率，名字份额，新说法准确率）。"""
    phrasing_generator, outcomes = torch.Generator().manual_seed(0), []
    for _ in range(5):
        names = unit(PEOPLE, DIM, generator=phrasing_generator)
        contexts = unit(PEOPLE, num_phrasings, DIM, generator=phrasing_generator).repeat(1, repeat, 1)
        if shared:  # 所有人用同一套模板
            contexts = contexts[:1].expand(PEOPLE, -1, -1)
        labels = torch.randint(CHOICES, (PEOPLE,), generator=phrasing_generator)
        keys = (names[:, None] + CONTEXT_NORM * contexts).flatten(0, 1)
        targets = torch.eye(CHOICES)[labels].repeat_interleave(num_phrasings * repeat, 0)
        memory = (torch.linalg.pinv(keys) @ targets).mT  # 从 0 出发的梯度下降收敛到的解
        asked = names + CONTEXT_NORM * unit(PEOPLE, DIM, generator=phrasing_generator)  # 没见过的说法
        train = ((keys @ memory.mT).argmax(1) == targets.argmax(1)).double().mean()
        share = (names @ memory.mT)[torch.arange(PEOPLE), labels].mean()
        outcomes.append((train, share, ((asked @ memory.mT).argmax(1) == labels).double().mean()))
    return torch.tensor(outcomes)


settings = {"1 种": (1, 1), "1 种，重复 5 遍": (1, 5), "2 种": (2, 1), "5 种": (5, 1), "10 种": (10, 1)}
common = injected(1, shared=True)  # 对照：上下文分不出人
rows, results = [], {}
for name, (count, repeat) in settings.items():
    result = injected(count, repeat=repeat)
    formula = extractable_share(num_phrasings=count, context_norm=CONTEXT_NORM)
    assert result[:, 0].min() == 1.0  # 训练集全对
    assert (result[:, 1] - formula).abs().max() < 0.02
    results[name] = result[:, 2]
    rows.append([name, f"{formula:.2f}", f"{result[:, 1].mean():.2f}", f"{result[:, 2].mean():.2f}"])
assert [row[1] for row in rows] == ["0.10", "0.10", "0.18", "0.36", "0.53"]
assert (results["1 种"] - results["1 种，重复 5 遍"]).abs().max() < 0.05  # 重复不是多样
assert results["5 种"].min() > results["1 种"].max() + 0.1
assert near([row[3] for row in rows], [0.57, 0.57, 0.75, 0.95, 0.94]), rows
rows.append(["1 种，所有人共用", "—", f"{common[:, 1].mean():.2f}", f"{common[:, 2].mean():.2f}"])
assert common[:, 0].min() == 1.0 and common[:, 2].min() > 0.95 and common[:, 1].min() > 0.85
Markdown(
    tabulate(
        rows,
        headers=["说法", "份额：公式", "份额：实测", "新说法准确率"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: reversal-table
#| caption: 只训练从 A 到 B，五个种子：正向全对，反向在瞎猜水平；输入输出嵌入绑定也救不了；把反向写进数据才会
#| echo: fold
PAIRS = 60


def pair_model(seed, *, tied, both_directions):
    """一问一答：词表是 60 个名字加 60 个描述，输入嵌入、一个隐藏层、输出嵌入。"""
    generator = torch.Generator().manual_seed(seed)

    def table(a, b, scale):
        return (scale * torch.randn(a, b, generator=generator)).requires_grad_()

    first, second = table(32, 64, 32**-0.5), table(64, 32, 64**-0.5)
    inputs, outputs = table(2 * PAIRS, 32, 1.0), table(2 * PAIRS, 32, 1.0)
    if tied:
        outputs = inputs
    names, descriptions = torch.arange(PAIRS), PAIRS + torch.arange(PAIRS)
    asked = torch.cat([names, descriptions]) if both_directions else names
    wanted = torch.cat([descriptions, names]) if both_directions else descriptions
    untouched = inputs[PAIRS:].detach().clone()

    def scores(x):
        return torch.relu(inputs[x] @ first) @ second @ outputs.mT

    parameters = [inputs, first, second] + ([] if tied else [outputs])
    optimizer = torch.optim.Adam(parameters, lr=0.02)
    for _ in range(80):
        optimizer.zero_grad()
        F.cross_entropy(scores(asked), wanted).backward()
        optimizer.step()
    with torch.no_grad():
        forward = (scores(names).argmax(1) == descriptions).double().mean().item()
        backward = (scores(descriptions)[:, :PAIRS].argmax(1) == names).double().mean().item()  # 只在名字里选
    return forward, backward, torch.equal(inputs[PAIRS:], untouched)


rows, reversal = [], {}
for name, options in {
    "只有 A→B": {"tied": False, "both_directions": False},
    "只有 A→B，嵌入绑定": {"tied": True, "both_directions": False},
    "两个方向都写": {"tied": False, "both_directions": True},
}.items():
    outcomes = [pair_model(seed, **options) for seed in range(5)]
    reversal[name] = outcomes
    forward, backward = ([o[i] for o in outcomes] for i in (0, 1))
    rows.append([name, f"{sum(forward) / 5:.2f}", f"{sum(backward) / 5:.3f}"])
assert all(o[0] == 1.0 for outcomes in reversal.values() for o in outcomes)
assert all(o[2] for o in reversal["只有 A→B"])  # B 的输入嵌入一个比特也没变
assert near([row[2] for row in rows], [0.007, 0.027, 1.000], atol=0.01), rows  # 瞎猜是 1/60=0.017
assert max(o[1] for n in ("只有 A→B", "只有 A→B，嵌入绑定") for o in reversal[n]) < 0.1
assert all(o[1] == 1.0 for o in reversal["两个方向都写"])
Markdown(
    tabulate(rows, headers=["训练数据", "问 A 答 B", "问 B 答 A"], tablefmt="github", disable_numparse=True)
)

# %%
#| label: sampling-budget
#| caption: 一条事实单次采样答对的概率与总采样次数决定它被误判为 Unknown 的概率：四次采样会把单次 5% 的事实误判 81%
#| echo: fold
budgets, chances = [4, 16, 160], [0.01, 0.05, 0.2]
sampling_generator = torch.Generator().manual_seed(0)
rows = []
for chance in chances:
    row = [f"{chance:g}"]
    for budget in budgets:
        exact = (1 - chance) ** budget
        draws = torch.rand(4000, 1, budget, generator=sampling_generator) < chance
        names = knowledge_category(torch.zeros(4000, 1, dtype=torch.bool), draws)
        assert abs(names.count("Unknown") / 4000 - exact) < 0.03
        row.append(f"{exact:.2f}")
    rows.append(row)
assert rows[1][1] == "0.81" and rows[0][3] == "0.20" and rows[0][2] == "0.85"
Markdown(
    tabulate(
        rows,
        headers=["单次答对的概率", *(f"采样 {b} 次" for b in budgets)],
        tablefmt="github",
        disable_numparse=True,
    )
)
