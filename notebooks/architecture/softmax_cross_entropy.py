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
# # 手撕 softmax 与交叉熵（softmax, cross-entropy）：实验
#
# 页面 `docs/architecture/softmax-cross-entropy.md` 里的每个数字都由本笔记算出。

# %%
#| label: setup
import math

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from IPython.display import Markdown
from tabulate import tabulate
from torch.utils._python_dispatch import TorchDispatchMode

from snippets.architecture.attention_scaling import stable_softmax
from snippets.architecture.softmax_cross_entropy import (
    causal_lm_loss,
    chunked_cross_entropy,
    cross_entropy,
    cross_entropy_grad,
    log_softmax,
    log_sum_exp,
    z_loss,
)

torch.manual_seed(0)
GIB = 2**30

# %%
#| label: exp-thresholds
#| caption: 三种精度里指数溢出的门槛：最大有限数的对数，以及能表示的数里最后一个不溢出的与第一个溢出的
rows, table = [], {}
for name, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16), ("float16", torch.float16)):
    biggest = torch.finfo(dtype).max
    bound = math.log(biggest)
    last = torch.tensor(bound, dtype=dtype)
    if last.item() > bound:  # 对数舍入到了门槛的上方，退一格
        last = torch.nextafter(last, torch.tensor(0.0, dtype=dtype))
    first = torch.nextafter(last, torch.tensor(math.inf, dtype=dtype))
    # 指数在 float64 里算，再舍入到这个精度：不依赖 exp 的实现
    assert last.double().exp().to(dtype).isfinite() and first.double().exp().to(dtype).isinf()
    table[name] = (bound, last.item(), first.item())
    rows.append([name, f"{biggest:.4g}", f"{bound:.2f}", f"{last.item():.7g}", f"{first.item():.7g}"])
assert [r[2] for r in rows] == ["88.72", "88.72", "11.09"]
assert table["float16"][1:] == (11.0859375, 11.09375) and table["bfloat16"][1:] == (88.5, 89.0)
assert f"{table['float32'][1]:.2f}" == "88.72"
assert torch.tensor(88.7).exp().isfinite() and torch.tensor(88.8).exp().isinf()
Markdown(
    tabulate(
        rows,
        headers=["精度", "最大的数", "它的对数", "最后不溢出", "开始溢出"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: log-of-softmax
#| caption: 正确类别比最大的低一个差距时的损失与它的梯度，float32：先取 softmax 再取对数的写法到差距 110 已经断掉，对数 softmax 一直是直线
gaps = [0, 20, 40, 60, 80, 110, 140, 170, 200]  # 避开 87 到 104：次正规数在有的机器上直接变 0
forms = {
    "不减最大值": lambda z: -(z.exp() / z.exp().sum(-1, keepdim=True)).log(),
    "softmax 再 log": lambda z: -stable_softmax(z).log(),
    "log_softmax": lambda z: -log_softmax(z),
}
curves = {name: ([], []) for name in forms}
for name, form in forms.items():
    for gap in gaps:
        z = torch.tensor([0.0, float(gap)], requires_grad=True)  # 正确的是第 0 类
        loss = form(z)[0]
        (grad,) = torch.autograd.grad(loss, z)
        curves[name][0].append(loss.item())
        curves[name][1].append(grad[0].item())

fig, axes = plt.subplots(1, 2, figsize=(6.0, 3.3))
styles = {"log_softmax": ("C0", "o-", 5), "softmax 再 log": ("C1", "s--", 9), "不减最大值": ("C2", "x:", 6)}
for name, (color, line, size) in styles.items():
    for ax, values in zip(axes, curves[name], strict=True):
        finite = [(g, v) for g, v in zip(gaps, values, strict=True) if math.isfinite(v)]
        kwargs = dict(color=color, markersize=size, label=name, fillstyle="none")
        ax.plot([g for g, _ in finite], [v for _, v in finite], line, **kwargs)
axes[0].set(xlabel="差距", ylabel="损失（奈特）", xlim=(-8, 208), ylim=(-8, 208))
axes[1].set(xlabel="差距", ylabel="对正确类别的梯度", xlim=(-8, 208), ylim=(-1.08, 0.05))
axes[0].legend(loc="upper left", fontsize=10)

good, bad, naive = curves["log_softmax"], curves["softmax 再 log"], curves["不减最大值"]
for i, gap in enumerate(gaps):
    truth = math.log1p(math.exp(gap))
    assert abs(good[0][i] - truth) < 1e-5 * max(1, truth)
    assert abs(good[1][i] + 1 / (1 + math.exp(-gap))) < 1e-6
    if gap <= 80:
        assert abs(bad[0][i] - truth) < 1e-4 and abs(naive[0][i] - truth) < 1e-4
    else:
        assert math.isinf(bad[0][i]) and math.isnan(bad[1][i])
        assert not math.isfinite(naive[0][i]) and math.isnan(naive[1][i])
assert abs(math.log(2.0**-149) + 103.28) < 0.01  # float32 最小的正数（次正规数）

# %%
#| label: gradient-table
#| caption: 五个类别的概率、交叉熵的梯度、标签平滑后的梯度，以及误用 V 减 1 的梯度；每列梯度之和为 0
torch.set_default_dtype(torch.float64)
z = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0]])
y, V, eps = torch.tensor([1]), 5, 0.1
p = stable_softmax(z)[0]
plain = cross_entropy_grad(z, y)[0]
smooth = cross_entropy_grad(z, y, label_smoothing=eps)[0]
wrong_target = torch.full((V,), eps / (V - 1))
wrong_target[1] = 1 - eps
wrong = p - wrong_target
for grad, smoothing in ((plain, 0.0), (smooth, eps)):
    zz = z.clone().requires_grad_()
    loss = F.cross_entropy(zz, y, label_smoothing=smoothing)
    torch.testing.assert_close(grad, torch.autograd.grad(loss, zz)[0][0])  # 自动求导
    for v in range(V):  # 中心差分
        step = torch.zeros(1, V)
        step[0, v] = 1e-5
        up, down = (cross_entropy(z + s * step, y, label_smoothing=smoothing) for s in (1, -1))
        assert abs((up - down) / 2e-5 - grad[v]) < 1e-9
for grad in (plain, smooth, wrong):
    assert abs(grad.sum()) < 1e-15
rows = [["正确" if v == 1 else "", *(f"{x[v]:.3f}" for x in (p, plain, smooth, wrong))] for v in range(V)]
assert rows[1] == ["正确", "0.234", "-0.766", "-0.686", "-0.666"]
assert rows[0][1:3] == ["0.636", "0.636"] and rows[0][3:] == ["0.616", "0.611"]
assert abs((smooth - plain)[1] - eps * (V - 1) / V) < 1e-15  # 0.08
Markdown(
    tabulate(
        rows,
        headers=["", "$p$", "$p-$one-hot", r"平滑 $\epsilon=0.1$", r"误用 $V-1$"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: chunked-equals-full
#| caption: 分块计算与一次算完的比较：损失与两个梯度的最大差，以及前向加反向里最大的张量


class LargestTensor(TorchDispatchMode):
    """记下前向与反向里产生过的最大张量有多少个元素。"""

    numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, torch.Tensor):
                self.numel = max(self.numel, x.numel())
        return out


N, C, V = 64, 8, 1000
hidden = torch.randn(N, C).requires_grad_()
weight = torch.randn(V, C).requires_grad_()
labels = torch.randint(V, (N,))
labels[::8] = -100  # 56 个有效


def run(loss_fn):
    with LargestTensor() as mode:
        loss = loss_fn()
        grads = torch.autograd.grad(loss, (hidden, weight))
    return loss.detach(), grads, mode.numel


full_loss, full_grads, full_numel = run(lambda: F.cross_entropy(hidden @ weight.T, labels))
rows = [["不分块", "—", "—", f"{full_numel:,}"]]
sizes = {}
for chunk_size in (32, 16, 8):
    loss, grads, numel = run(lambda c=chunk_size: chunked_cross_entropy(hidden, weight, labels, chunk_size=c))
    loss_error = (loss - full_loss).abs().item()
    grad_error = max((a - b).abs().max().item() for a, b in zip(grads, full_grads, strict=True))
    assert loss_error < 1e-13 and grad_error < 1e-13 and numel == chunk_size * V
    rows.append([chunk_size, "< 1e-13", "< 1e-13", f"{numel:,}"])
    sizes[chunk_size] = numel
assert full_numel == N * V == 64_000 and sizes[8] == 8_000
Markdown(
    tabulate(
        rows,
        headers=["块的位置数", "损失之差", "梯度之差", "最大的张量"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: shift-variants
#| caption: 在 0 到 7 循环的序列上训练查表模型：三种移位写法的训练损失都降到 0.001，只有移一次的学会了下一个 token
V, T = 8, 12
start = torch.arange(V).unsqueeze(1)
ids = (start + torch.arange(T)) % V  # (8, 12)，每条从不同的数开始
ahead = F.pad(ids[:, 1:], (0, 1), value=-100)  # 自己先移好的标签
losses = {
    "移一次": lambda logits: causal_lm_loss(logits, ids),
    "没有移": lambda logits: cross_entropy(logits.flatten(0, 1), ids.flatten()),
    "移了两次": lambda logits: causal_lm_loss(logits, ahead),
}
rows, result = [], {}
for name, loss_fn in losses.items():
    table = torch.zeros(V, V).requires_grad_()  # 第 i 行：读到 i 之后的 logits
    optimizer = torch.optim.Adam([table], lr=0.3)
    for _ in range(60):
        optimizer.zero_grad()
        loss = loss_fn(table[ids])
        loss.backward()
        optimizer.step()
    text, token = "0", 0
    for _ in range(5):
        token = table[token].argmax().item()
        text += f" {token}"
    true_loss = causal_lm_loss(table[ids], ids).item()
    result[name] = (loss.item(), true_loss, text)
    rows.append([name, f"{loss.item():.3f}", f"{true_loss:.1f}", text])
assert [r[1] for r in rows] == ["0.001"] * 3 and [r[2] for r in rows] == ["0.0", "9.3", "9.3"]
assert [r[2] for r in result.values()] == ["0 1 2 3 4 5", "0 0 0 0 0 0", "0 2 4 6 0 2"]
Markdown(
    tabulate(
        rows,
        headers=["写法", "训练损失", "真正的损失", "从 0 生成"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
#| label: logits-memory
#| caption: 一条 4096 个 token 的序列，一份 logits 占多少显存；词表大小是 transformers 5.23.0 各配置类的默认值
rows, size = [], {}
for name, vocab_size in (
    ("Llama 2", 32_000),
    ("DeepSeek-V3", 129_280),
    ("Qwen3", 151_936),
    ("Gemma 3", 262_208),
):
    size[name] = [4096 * vocab_size * num_bytes / GIB for num_bytes in (2, 4)]
    rows.append([name, f"{vocab_size:,}", *(f"{x:.2f}" for x in size[name])])
assert [r[3] for r in rows] == ["0.49", "1.97", "2.32", "4.00"]
Markdown(
    tabulate(
        rows,
        headers=["模型", "词表 $V$", "bf16 GiB", "fp32 GiB"],
        tablefmt="github",
        disable_numparse=True,
    )
)

# %%
# 页面正文里的其他数字。
# 反向之前留着什么：bf16 的 logits 转 float32 再算交叉熵，每个 logit 存 4 字节（log_softmax 的输出）。
logits = torch.randn(64, 1000, dtype=torch.bfloat16).requires_grad_()
saved = []
with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.nbytes) or x, lambda x: x):
    F.cross_entropy(logits.float(), torch.arange(64))
assert max(saved) / logits.numel() == 4

# 全部被忽略：损失 NaN，梯度 0（CPU）。
z = torch.randn(3, 5).requires_grad_()
for fn in (F.cross_entropy, cross_entropy):
    loss = fn(z, torch.full((3,), -100))
    assert loss.isnan() and (torch.autograd.grad(loss, z)[0] == 0).all()

# 自己写的掩码平均：掩码全 0 时梯度真的是 NaN。
token_losses = F.cross_entropy(z, torch.arange(3), reduction="none")
hand_written = (token_losses * torch.zeros(3)).sum() / torch.zeros(3).sum()
assert hand_written.isnan() and torch.autograd.grad(hand_written, z)[0].isnan().all()

# 分母：6 个位置 2 个被忽略，除以 6 会小成 4/6。
z, y = torch.randn(6, 5), torch.tensor([1, -100, 4, 0, -100, 2])
torch.testing.assert_close(F.cross_entropy(z, y, reduction="sum") / 6, cross_entropy(z, y) * 4 / 6)

# (1000, 0, -1000)：三种写法。
z = torch.tensor([1000.0, 0.0, -1000.0], dtype=torch.float32)
assert (z.exp() / z.exp().sum())[0].isnan()
assert stable_softmax(z).log().tolist() == [0.0, -math.inf, -math.inf]
assert log_softmax(z).tolist() == [0.0, -1000.0, -2000.0]

# 均匀预测的损失是 ln V；标签平滑之后最优的 logit 差与最小的损失（目标的熵）。
assert round(math.log(151_936), 2) == 11.93
eps = 0.1
for vocab_size, margin, floor in ((5, 3.83, 0.39), (151_936, 14.13, 1.52)):
    best = math.log(vocab_size * (1 - eps) / eps + 1)
    target = torch.full((vocab_size,), eps / vocab_size)
    target[0] += 1 - eps
    assert abs(best - margin) < 0.006, best
    assert abs(torch.special.entr(target).sum() - floor) < 0.006, torch.special.entr(target).sum()
    z = torch.zeros(1, vocab_size)
    z[0, 0] = best
    loss = cross_entropy(z, torch.tensor([0]), label_smoothing=eps)
    torch.testing.assert_close(loss, torch.special.entr(target).sum())  # 取到下界
    grad = cross_entropy_grad(z, torch.tensor([0]), label_smoothing=eps)
    assert grad.abs().max() < 1e-12

# T5X 的写法：其余 V-1 类各得 ε/(V-1)，再减去目标的熵；等于 PyTorch 里把 ε 换成 εV/(V-1)，差一个常数。
z, y, V, eps = torch.randn(6, 5), torch.tensor([1, 3, 4, 0, 0, 2]), 5, 0.1
q = torch.full((6, V), eps / (V - 1)).scatter(-1, y.unsqueeze(-1), 1 - eps)
t5x = -(q * log_softmax(z)).sum(-1).mean()
torch.testing.assert_close(t5x, cross_entropy(z, y, label_smoothing=eps * V / (V - 1)))
assert eps * V / (V - 1) == 0.125

# z-loss：整体平移 8，交叉熵不变，log Z 正好加 8。梯度系数 2e-4 · log Z。
z, y = torch.randn(6, 5), torch.tensor([1, 3, 4, 0, 0, 2])
torch.testing.assert_close(cross_entropy(z + 8, y), cross_entropy(z, y))
torch.testing.assert_close(log_sum_exp(z + 8), log_sum_exp(z) + 8)
assert z_loss(z + 8) > z_loss(z)
zz = torch.randn(1, 5).requires_grad_()
(grad,) = torch.autograd.grad(1e-4 * z_loss(zz), zz)
torch.testing.assert_close(grad.sum(), 2e-4 * log_sum_exp(zz)[0])
# bf16 在 256 到 512 之间的格距是 2：三个 logits 整体漂到 300，差值被抹掉，损失变成 ln 3。
near, y = torch.tensor([[0.0, 0.5, 1.0]]), torch.tensor([2])
drifted = cross_entropy((near + 300).bfloat16().double(), y)
assert f"{cross_entropy(near.bfloat16().double(), y):.3f}" == "0.680" and f"{drifted:.3f}" == "1.099"
torch.testing.assert_close(drifted, torch.tensor(3.0).log())

# 正确类别领先 17 以上，float32 的损失就是 0，梯度也是 0：舍入，不是学完了。
z = torch.tensor([[18.0, 0.0]], dtype=torch.float32)
assert cross_entropy(z, torch.tensor([0])) == 0 and (cross_entropy_grad(z, torch.tensor([0]))[0, 0] == 0)
assert 1.5e-8 < math.log1p(math.exp(-18)) < 1.53e-8
