"""真值是每个窗口放进一个大 batch 的训练：PyTorch 自己的 token 平均、裁剪、优化器与调度，不经过被测代码；
多卡的真值也是它，由真的两进程 gloo DDP 去对。字节数的真值是手数的张量大小。错误写法在文件末尾，被同一个真值拒绝。
"""

import itertools
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from snippets.training.gradient_accumulation import record_all_reduces, saved_bytes_trace, train_epoch
from snippets.training.loss_averaging import global_token_mean_loss
from snippets.training.zero import launch

V, C = 11, 6
# 5 个微批，条数、长度都不同；累积 2 步是 2、2、1，累积 3 步是 3、2
LENGTHS = [(4, 9), (1,), (3, 2, 7), (12,), (5, 6)]
INF = float("inf")


def make_model():
    torch.manual_seed(1)
    return nn.Sequential(nn.Embedding(V, C), nn.Tanh(), nn.Linear(C, V)).double()


def make_sequences(lengths=LENGTHS, seed=2):
    g = torch.Generator().manual_seed(seed)
    return [[torch.randint(V, (n + 1,), generator=g) for n in group] for group in lengths]


def collate(group):
    pad = nn.utils.rnn.pad_sequence
    return pad(group, batch_first=True), pad(group, batch_first=True, padding_value=-100)


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def optimizer_of(model, kind="sgd"):
    if kind == "sgd":
        return torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    return torch.optim.AdamW(model.parameters(), lr=0.01)


def schedule(optimizer):
    return torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)


def big_batch_epoch(sequences, *, num_groups, max_norm, kind="sgd"):
    """真值：每 `num_groups` 组的序列逐条算交叉熵，全部相加除以总数，一次反向。返回参数、loss、范数。"""
    model = make_model()
    optimizer = optimizer_of(model, kind)
    scheduler = schedule(optimizer)
    losses, norms = [], []
    for start in range(0, len(sequences), num_groups):
        window = [s for group in sequences[start : start + num_groups] for s in group]
        terms = [F.cross_entropy(model(s[:-1]), s[1:], reduction="none") for s in window]
        loss = torch.cat(terms).mean()
        grads = torch.autograd.grad(loss, list(model.parameters()))
        norm = torch.cat([g.flatten() for g in grads]).norm()
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g * min(1.0, max_norm / (norm.item() + 1e-6))  # torch 的分母有 1e-6
        optimizer.step()
        scheduler.step()
        losses.append(loss.item())
        norms.append(norm.item())
    return flat(model), losses, norms


def run(kind="sgd", **kwargs):
    model = make_model()
    optimizer = optimizer_of(model, kind)
    pairs = [collate(group) for group in make_sequences()]
    history = train_epoch(model, pairs, optimizer, scheduler=schedule(optimizer), **kwargs)
    return flat(model), history


# ---------------------------------------------------------------- 与大 batch 一致


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("steps", [1, 2, 3, 5, 9])
@pytest.mark.parametrize("max_norm", [0.2, 0.51, INF])
def test_epoch_equals_big_batches_including_the_last_short_window(steps, max_norm, kind):
    params, losses, norms = big_batch_epoch(make_sequences(), num_groups=steps, max_norm=max_norm, kind=kind)
    ours, history = run(kind, grad_accum_steps=steps, max_norm=max_norm)
    assert len(history) == -(-len(LENGTHS) // steps)
    torch.testing.assert_close(ours, params)
    torch.testing.assert_close(torch.tensor(history).T, torch.tensor([losses, norms]))


def test_norm_is_clipped_to_one_by_default():
    """把最后一层放大，梯度范数超过 1；不带动量的一步位移恰是学习率乘 1。"""
    model = make_model()
    with torch.no_grad():
        model[2].weight.mul_(30)
    before = flat(model)
    history = train_epoch(
        model, [collate(make_sequences()[0])], torch.optim.SGD(model.parameters(), lr=0.5), grad_accum_steps=1
    )
    assert history[0][1] > 2
    torch.testing.assert_close((flat(model) - before).norm().item(), 0.5, rtol=1e-5, atol=0)


def test_gradients_left_by_the_caller_do_not_leak_in():
    model = make_model()
    for p in model.parameters():
        p.grad = torch.full_like(p, 100.0)
    pairs = [collate(group) for group in make_sequences()]
    optimizer = optimizer_of(model)
    train_epoch(model, pairs, optimizer, grad_accum_steps=2, max_norm=0.45, scheduler=schedule(optimizer))
    torch.testing.assert_close(flat(model), run(grad_accum_steps=2, max_norm=0.45)[0])


def test_without_a_scheduler_the_learning_rate_stays():
    model = make_model()
    optimizer = optimizer_of(model)
    train_epoch(model, [collate(g) for g in make_sequences()], optimizer, grad_accum_steps=2)
    assert optimizer.param_groups[0]["lr"] == 0.5


@pytest.mark.parametrize("steps", [0, -1])
def test_meaningless_steps_are_refused(steps):
    with pytest.raises(ValueError, match=f"grad_accum_steps={steps}：累积步数至少为 1"):
        run(grad_accum_steps=steps)


# ---------------------------------------------------------------- 损失缩放


def test_loss_scaling_changes_nothing_when_nothing_overflows():
    """缩放是 2 的幂：乘、除都没有舍入，裁剪前的范数与最后的参数不变。"""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaled, history = run(grad_accum_steps=2, max_norm=0.45, scaler=scaler)
    plain, expected = run(grad_accum_steps=2, max_norm=0.45)
    torch.testing.assert_close(scaled, plain)
    torch.testing.assert_close(torch.tensor(history), torch.tensor(expected))
    assert scaler.get_scale() == 2.0**12


def test_scheduler_still_steps_when_the_scale_grows():
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=1)
    scaled, _ = run(grad_accum_steps=2, max_norm=0.45, scaler=scaler)
    torch.testing.assert_close(scaled, run(grad_accum_steps=2, max_norm=0.45)[0])
    assert scaler.get_scale() == 32.0  # 三次更新，各翻一倍


class Overflowing(nn.Module):
    """第 `bad` 次前向的输出的梯度是无穷大。"""

    def __init__(self, bad):
        super().__init__()
        self.net, self.bad, self.calls = make_model(), bad, 0

    def forward(self, input_ids):
        logits = self.net(input_ids)
        if self.calls == self.bad:
            logits.register_hook(lambda grad: grad * INF)
        self.calls += 1
        return logits


def test_an_overflow_skips_update_and_schedule_and_halves_the_scale():
    """第一个窗口溢出：参数只走后两个窗口，学习率只降两次。"""
    model = Overflowing(bad=1)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    pairs = [collate(g) for g in make_sequences()]
    train_epoch(
        model,
        pairs,
        optimizer,
        grad_accum_steps=2,
        max_norm=0.45,
        scheduler=schedule(optimizer),
        scaler=scaler,
    )
    expected, _, _ = big_batch_epoch(make_sequences()[2:], num_groups=2, max_norm=0.45)
    torch.testing.assert_close(flat(model), expected)
    assert scaler.get_scale() == 4.0
    assert optimizer.param_groups[0]["lr"] == 0.125


def test_unscaling_every_micro_batch_is_refused_by_torch():
    model = make_model()
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu")
    loss = model(torch.tensor([1, 2])).sum()
    scaler.scale(loss).backward(retain_graph=True)
    scaler.unscale_(optimizer)
    scaler.scale(loss).backward()
    with pytest.raises(RuntimeError, match="already been called"):
        scaler.unscale_(optimizer)


# ---------------------------------------------------------------- 真的 DDP


# 一张卡 5 个微批，另一张 6 个：窗口都是 3 个，最后一个窗口长短不同
RANKS = [[(4, 9), (1,), (3, 2), (12,), (5,)], [(2,), (8, 1), (6,), (1, 1), (10, 3), (4,)]]


def ddp_epoch(rank, dp_size, pairs, steps):
    model = make_model()
    ddp = DistributedDataParallel(model)
    sizes = record_all_reduces(ddp)
    optimizer = optimizer_of(model)
    history = train_epoch(
        ddp, pairs, optimizer, grad_accum_steps=steps, max_norm=0.45, scheduler=schedule(optimizer)
    )
    # 前向在 no_sync 之外的写法：反向照样归约
    outside = DistributedDataParallel(make_model())
    extra = record_all_reduces(outside)
    for input_ids, labels in pairs[:2]:
        logits = outside(input_ids)
        with outside.no_sync():
            global_token_mean_loss(logits, labels, num_items_in_batch=1).backward()
    return {"params": flat(model), "sizes": sizes, "history": history, "outside": len(extra)}


@pytest.fixture(scope="module")
def ddp_result():
    pairs = [[collate(g) for g in make_sequences(lengths, seed=3 + w)] for w, lengths in enumerate(RANKS)]
    return launch(ddp_epoch, [[p, 2] for p in pairs])


def test_two_processes_equal_one_big_batch(ddp_result):
    """各卡的窗口对齐合并成一个 batch，最后一个窗口一张卡 1 个微批、另一张 2 个；loss 由各卡取平均，范数各卡相同。"""
    a, b = (make_sequences(lengths, seed=3 + w) for w, lengths in enumerate(RANKS))
    merged = [x + y for x, y in itertools.zip_longest(a, b, fillvalue=[])]
    params, losses, norms = big_batch_epoch(merged, num_groups=2, max_norm=0.45)
    for result in ddp_result:
        torch.testing.assert_close(result["params"], params)
        torch.testing.assert_close([norm for _, norm in result["history"]], norms)
    mean = torch.tensor([r["history"] for r in ddp_result]).mean(0)[:, 0]
    torch.testing.assert_close(mean, torch.tensor(losses))


def test_one_reduction_per_window_of_all_gradient_bytes(ddp_result):
    """5 个或 6 个微批、累积 2 步都是 3 次更新；一个桶装下全部梯度，每个 8 字节。"""
    num_bytes = 8 * (V * C + C * V + V)
    assert all(result["sizes"] == [num_bytes] * 3 for result in ddp_result)


def test_forward_outside_no_sync_still_reduces(ddp_result):
    assert all(result["outside"] == 2 for result in ddp_result)


# ---------------------------------------------------------------- 存着的字节


def test_trace_by_hand():
    """x 是 3 个 float64，24 字节。y = x·x 两次保存同一块 x：24、24；exp 保存输出：48。

    反向先放 exp 的输出，再放 x 的两次：24、24、0。
    """
    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert saved_bytes_trace(lambda: (x * x).exp().sum().backward(), parameters=[]) == [24, 24, 48, 24, 24, 0]


def test_parameters_are_not_counted():
    """w·x 的反向要 w 与 x：w 是参数，只剩 x 的 40 字节。"""
    w = torch.ones(5, dtype=torch.float64, requires_grad=True)
    x = torch.ones(5, dtype=torch.float64, requires_grad=True)
    assert saved_bytes_trace(lambda: (w * x).sum().backward(), parameters=[w]) == [40, 0]


def test_a_view_counts_its_whole_storage_once():
    x = torch.ones(10, dtype=torch.float64, requires_grad=True)
    assert max(saved_bytes_trace(lambda: (x[:5] * x[5:]).sum().backward(), parameters=[])) == 80


def test_a_reused_address_starts_over():
    """释放之后再存，不会把旧的也算上；没有反向就一直存着。"""
    x = torch.ones(4, dtype=torch.float64, requires_grad=True)

    def twice():
        for _ in range(2):
            (x * x).sum().backward()

    assert saved_bytes_trace(twice, parameters=[]) == [32, 32, 32, 0] * 2
    kept = []
    assert saved_bytes_trace(lambda: kept.append(x.exp()), parameters=[]) == [32]


def accumulate(num, *, once=False, detach=True):
    """4 条等长序列切成 `num` 份；逐个反向，或相加后一次反向。返回峰值、梯度。"""
    model = make_model()
    ids = torch.stack([s for (s,) in make_sequences([(7,)] * 4)])
    pairs = [(x.clone(), x.clone()) for x in ids.chunk(num)]

    def step():
        total = 0.0
        for x, y in pairs:
            loss = global_token_mean_loss(model(x), y, num_items_in_batch=28)
            if not once:
                loss.backward()
            total = total + (loss.detach() if detach else loss)
        if once:
            total.backward()

    trace = saved_bytes_trace(step, parameters=model.parameters())
    assert trace[-1] == 0
    return max(trace), torch.cat([p.grad.flatten() for p in model.parameters()])


def test_peak_is_one_micro_batch_only_when_each_is_backpropagated():
    """每次 cross_entropy 多存一个 8 字节的总权重，所以先减掉再比。"""
    big, truth = accumulate(1)
    each, grad = accumulate(2)
    once, grad_once = accumulate(2, once=True, detach=False)
    assert big - 8 == 2 * (each - 8) and once == 2 * each
    torch.testing.assert_close(grad, truth)
    torch.testing.assert_close(grad_once, truth)


def test_summing_undetached_losses_keeps_no_activations_once_backpropagated():
    """反向之后保存的张量已经放掉，没 detach 的 loss 只留着图的节点。"""
    assert accumulate(2, detach=False)[0] == accumulate(2)[0]


# ---------------------------------------------------------------- accelerate


def test_accelerate_syncs_at_the_same_places_but_divides_the_short_window_by_all_steps():
    """5 个微批、累积 2 步：同步在第 2、4、5 个；最后一个窗口的梯度被除以 2，这里不除。"""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState, PartialState

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # accelerate 对 CPU 环境的提示，与这里无关
        accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
        loader = accelerator.prepare(torch.utils.data.DataLoader(torch.ones(5, 1, dtype=torch.float64)))
    w = nn.Parameter(torch.zeros(1, dtype=torch.float64))
    synced, grads = [], []
    for x in loader:
        with accelerator.accumulate():
            accelerator.backward((w * x).sum())
            synced.append(accelerator.sync_gradients)
            if accelerator.sync_gradients:
                grads.append(w.grad.item())
                w.grad = None
    for state in (AcceleratorState, GradientState, PartialState):
        state._reset_state()
    assert synced == [False, True, False, True, True]
    assert grads == [1.0, 1.0, 0.5]


# ---------------------------------------------------------------- 错误写法


CLIP = 0.3


def wrong_epoch(bug):
    model = make_model()
    optimizer = optimizer_of(model)
    scheduler = schedule(optimizer)
    pairs = [collate(g) for g in make_sequences()]
    for start in range(0, len(pairs), 2):
        window = pairs[start : start + 2]
        if bug == "skip last" and len(window) < 2:
            break
        num_items = sum(int((y[:, 1:] != -100).sum()) for _, y in window)
        optimizer.zero_grad()
        for ids, labels in window:
            if bug == "zero each":
                optimizer.zero_grad()
            logits, targets = model(ids)[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
            loss = F.cross_entropy(logits, targets, reduction="sum") / num_items
            if bug == "mean of means":
                loss = F.cross_entropy(logits, targets) / len(window)
            if bug == "no division":
                loss = F.cross_entropy(logits, targets)
            if bug == "divided twice":
                loss = loss / 2
            loss.backward()
            if bug == "clip each":
                nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        if bug != "clip each":
            factor = 2.0**12 if bug == "clip before unscale" else 1.0
            for p in model.parameters():
                p.grad *= factor
            nn.utils.clip_grad_norm_(model.parameters(), CLIP)
            for p in model.parameters():
                p.grad /= factor
        optimizer.step()
        for _ in range(len(window) if bug == "schedule each" else 1):
            scheduler.step()
    return flat(model)


def path_error(params):
    truth = big_batch_epoch(make_sequences(), num_groups=2, max_norm=CLIP)[0]
    return ((params - truth).norm() / (truth - flat(make_model())).norm()).item()


def test_the_oracle_accepts_the_right_version():
    norms = big_batch_epoch(make_sequences(), num_groups=2, max_norm=CLIP)[2]
    assert min(norms) > CLIP  # 裁剪都起作用
    assert path_error(wrong_epoch("")) < 1e-12
    assert path_error(run(grad_accum_steps=2, max_norm=CLIP)[0]) < 1e-12


@pytest.mark.rejects
@pytest.mark.parametrize(
    "bug",
    [
        "skip last",
        "zero each",
        "mean of means",
        "no division",
        "divided twice",
        "clip each",
        "clip before unscale",
        "schedule each",
    ],
)
def test_wrong_version_is_rejected(bug):
    assert path_error(wrong_epoch(bug)) > 0.02
