"""ZeRO 的公式、集合通信与四个级别的训练。

真值：论文 §5 的三个式子与表 1；单进程、整批、`torch.optim.AdamW` 的自动求导；`torch.distributed` 自己的集合通信；
`torch.distributed.fsdp.fully_shard` 在同样三个 gloo 进程上的真实训练。进程只起一次，见 `runs`。
"""

import math
import time
import warnings

import pytest
import sympy
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from snippets.training.memory import model_state_bytes
from snippets.training.zero import (
    Ring,
    fetch_seconds,
    launch,
    pad_flat,
    zero_model_state_bytes,
    zero_sent_bytes,
    zero_train,
)

DP_SIZE = 3
WIDTHS = [5, 7, 3, 2]  # 每层 42、24、8 个参数；8 不能被 3 整除
GENERATOR = torch.Generator().manual_seed(0)


def randn(*size):
    return torch.randn(*size, generator=GENERATOR, dtype=torch.float64)


LAYERS = [randn(o, i + 1) / i**0.5 for i, o in zip(WIDTHS, WIDTHS[1:], strict=False)]
INPUTS, TARGETS = randn(DP_SIZE, 6, 2, WIDTHS[0]), randn(DP_SIZE, 6, 2, WIDTHS[-1])
FLATS = randn(DP_SIZE, 12)
PADDED = sum(pad_flat(layer, dp_size=DP_SIZE).numel() for layer in LAYERS)
CASES = [(stage, accumulate) for stage in range(4) for accumulate in (1, 3)]
STEPS = 2
EPS = 0.1  # Adam 几乎不受梯度倍数的影响；eps 取大，倍数错了才显出来
TIGHT = dict(rtol=0, atol=1e-11)  # float64，只差求和次序


def forward(parameters, x):
    for matrix in parameters:
        x = torch.tanh(x @ matrix[:, :-1].T + matrix[:, -1])
    return x


def single_process(accumulate, *, steps=STEPS, scale=1, **options):
    """一个进程、所有卡的样本一起：PyTorch 的损失、自动求导与 AdamW。"""
    parameters = [nn.Parameter(layer.clone()) for layer in LAYERS]
    optimizer, losses = torch.optim.AdamW(parameters, **options), []
    for start in range(0, steps * accumulate, accumulate):
        x, y = (t[:, start : start + accumulate].flatten(0, 2) for t in (INPUTS, TARGETS))
        loss = F.mse_loss(forward(parameters, x), y)
        losses.append(loss.item())
        optimizer.zero_grad()
        (scale * loss).backward()
        optimizer.step()
    return losses, [p.detach() for p in parameters]


class Layer(nn.Module):
    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix.clone())

    def forward(self, x):
        return forward([self.matrix], x)


def fsdp_train(inputs, targets):
    """FSDP2：每层一组，默认的 AdamW 走两步，返回收集起来的参数。"""
    model = nn.Sequential(*[Layer(matrix) for matrix in LAYERS])
    mesh = init_device_mesh("cpu", (DP_SIZE,))
    for layer in model:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    optimizer = torch.optim.AdamW(model.parameters(), eps=EPS)
    for x, y in zip(inputs[:STEPS], targets[:STEPS], strict=True):
        optimizer.zero_grad()
        F.mse_loss(model(x), y).backward()
        optimizer.step()
    return [layer.matrix.full_tensor().detach() for layer in model], [
        layer.matrix.to_local().numel() for layer in model
    ]


def work(rank, dp_size, inputs, targets, flat):
    ring, result = Ring(rank, dp_size), {}
    for name in ("reduce_scatter", "all_gather", "all_reduce"):
        before = ring.bytes_sent
        result[name] = getattr(ring, name)(flat), ring.bytes_sent - before
    expected = torch.empty(len(flat) // dp_size, dtype=flat.dtype)
    gathered = torch.empty(len(flat) * dp_size, dtype=flat.dtype)
    reduced = flat.clone()
    with warnings.catch_warnings():  # torch 2.13 把这两个名字改成了 *_single，旧版本只有旧名
        warnings.simplefilter("ignore", FutureWarning)
        dist.reduce_scatter_tensor(expected, flat)
        dist.all_gather_into_tensor(gathered, flat)
    dist.all_reduce(reduced)
    result["library"] = expected, gathered, reduced
    result["zero"] = {
        (stage, m): zero_train(
            rank,
            dp_size,
            LAYERS,
            inputs[: STEPS * m],
            targets[: STEPS * m],
            stage=stage,
            num_micro_batches=m,
            eps=EPS,
        )
        for stage, m in CASES
    }
    result["default"] = zero_train(rank, dp_size, LAYERS, inputs[:STEPS], targets[:STEPS], stage=3)
    result["lr"] = zero_train(rank, dp_size, LAYERS, inputs[:STEPS], targets[:STEPS], stage=1, lr=0.1)
    with warnings.catch_warnings():  # FSDP2 内部用了旧名
        warnings.simplefilter("ignore")
        result["fsdp"] = fsdp_train(inputs, targets)
    return result


@pytest.fixture(scope="module")
def runs():
    torch.optim.AdamW([torch.zeros(1)])  # 它第一次用到时才导入一大块；先在父进程导入，子进程就不必各导一次
    return launch(work, [(INPUTS[r], TARGETS[r], FLATS[r]) for r in range(DP_SIZE)])


def fail(rank, dp_size):
    if rank == 1:
        raise ValueError("一号坏了")
    time.sleep(60)


def hang(rank, dp_size):
    time.sleep(60)


def wait_for_a_message(rank, dp_size):
    if rank == 0:
        dist.recv(torch.zeros(1), 1)
    time.sleep(60)


def square_sum(rank, dp_size, x):
    return (x @ x).sum()


def test_failing_worker_is_reported_and_the_others_are_ended():
    with pytest.raises(mp.ProcessRaisedException, match="一号坏了"):
        launch(fail, [(), ()])
    assert mp.active_children() == []


def test_hanging_worker_is_ended_and_reported():
    with pytest.raises(TimeoutError, match=r"^第 \[0\] 号进程 1 秒没有结束，已全部终止。$"):
        launch(hang, [()], timeout=1.0)
    assert mp.active_children() == []


def test_stuck_communication_is_reported_where_it_waits():
    """一次通信只等时限的一半：得到的是卡住的那一行，不是整体超时。"""
    with pytest.raises(mp.ProcessRaisedException, match="in wait_for_a_message"):
        launch(wait_for_a_message, [(), ()], timeout=8.0)
    assert mp.active_children() == []


def test_fork_after_the_parent_used_several_threads_does_not_deadlock():
    """父进程先用两个线程算过矩阵乘法与求和；子进程再算同样的东西。"""
    threads, x = torch.get_num_threads(), torch.eye(300, dtype=torch.float64)
    try:
        torch.set_num_threads(2)
        expected = (x @ x).sum()
        assert launch(square_sum, [(x,)]) == [expected]
    finally:
        torch.set_num_threads(threads)


def test_figure_one_and_table_one_of_the_paper():
    """图 1 与表 1：7.5B、128B、1T；论文把大于 100 的数截去小数，小的四舍五入到所印的位数。"""
    table = {  # 进程数：7.5B 的三级、128B 的三级、1T 的三级，单位 GB
        1: (120, 120, 120, 2048, 2048, 2048, 16000, 16000, 16000),
        4: (52.5, 41.3, 30, 896, 704, 512, 7000, 5500, 4000),
        16: (35.6, 21.6, 7.5, 608, 368, 128, 4750, 2875, 1000),
        64: (31.4, 16.6, 1.88, 536, 284, 32, 4187, 2218, 250),
        256: (30.4, 15.4, 0.47, 518, 263, 8, 4046, 2054, 62.5),
        1024: (30.1, 15.1, 0.12, 513, 257, 2, 4011, 2013, 15.6),
    }
    for dp_size, row in table.items():
        ours = [
            zero_model_state_bytes(num, stage=stage, dp_size=dp_size) / 1e9
            for num in (7.5e9, 128e9, 1e12)
            for stage in (1, 2, 3)
        ]
        for mine, paper in zip(ours, row, strict=True):
            assert abs(mine - paper) < (1 if paper > 100 else 0.06 if paper >= 2 else 0.006)
    assert zero_model_state_bytes(7.5e9, stage=0, dp_size=64) / 1e9 == 120


def test_state_formulas_by_hand():
    """§5：4Ψ+12Ψ/N、2Ψ+14Ψ/N、16Ψ/N。每个字节数取不同的素数，谁被切一目了然。"""
    psi, n = sympy.symbols("Psi N", positive=True)
    expected = [16 * psi, 4 * psi + 12 * psi / n, 2 * psi + 14 * psi / n, 16 * psi / n]
    for stage, formula in enumerate(expected):
        assert sympy.simplify(zero_model_state_bytes(psi, stage=stage, dp_size=n) - formula) == 0
    primes = dict(dp_size=2, weight_bytes=3, grad_bytes=5, optimizer_bytes=7)
    assert [zero_model_state_bytes(10, stage=s, **primes) for s in range(4)] == [150, 115, 90, 75]


def test_one_process_saves_nothing_and_agrees_with_the_memory_page():
    for stage in range(4):
        assert zero_model_state_bytes(11, stage=stage) == model_state_bytes(11) == 176


def test_volumes_are_two_two_two_three():
    """归约散布一趟、收集一趟，各 (N−1)/N；第 3 级收集两趟。"""
    for stage, trips in enumerate((2, 2, 2, 3)):
        exact = zero_sent_bytes(8e9, stage=stage, dp_size=8)
        assert exact == trips * 2 * 8e9 * 7 / 8  # N=8：1.75、1.75、1.75、2.625 趟，每个元素 2 字节
    primes = dict(dp_size=5, num_micro_batches=7, weight_bytes=11, grad_bytes=13)
    by_hand = [2 * 13, 13 + 11, 7 * 13 + 11, 7 * (13 + 2 * 11)]
    assert [zero_sent_bytes(5, stage=s, **primes) for s in range(4)] == [4 * x for x in by_hand]
    psi, n, m = sympy.symbols("Psi N M", positive=True)
    formula = zero_sent_bytes(psi, stage=3, dp_size=n, num_micro_batches=m)
    assert sympy.limit(formula, n, sympy.oo) == 6 * m * psi


@pytest.mark.parametrize("stage", [-1, 4])
def test_unknown_stage_is_refused(stage):
    message = rf"^stage={stage}，ZeRO 只有 1、2、3 级；0 是普通数据并行。$"
    with pytest.raises(ValueError, match=message):
        zero_model_state_bytes(1, stage=stage)
    with pytest.raises(ValueError, match=message):
        zero_sent_bytes(1, stage=stage, dp_size=2)


def test_padding_reaches_the_next_multiple():
    assert pad_flat(torch.ones(2, 4), dp_size=3).tolist() == [1] * 8 + [0]
    assert pad_flat(torch.ones(3, 2), dp_size=3).tolist() == [1] * 6  # 整除就不补
    with pytest.raises(RuntimeError):
        torch.ones(8).view(3, -1)  # 不补零切不成三份


def test_ring_agrees_with_torch_distributed_and_with_a_plain_sum(runs):
    total = FLATS.sum(0)
    for rank, run in enumerate(runs):
        scattered, gathered, reduced = run["library"]
        torch.testing.assert_close(run["reduce_scatter"][0], scattered)
        torch.testing.assert_close(run["reduce_scatter"][0], total.view(DP_SIZE, -1)[rank])
        assert torch.equal(run["all_gather"][0], gathered)
        assert torch.equal(run["all_gather"][0], FLATS.flatten())
        torch.testing.assert_close(run["all_reduce"][0], reduced)
        torch.testing.assert_close(run["all_reduce"][0], total)


def test_ring_counts_every_byte(runs):
    """12 个 float64 是 96 字节：散布发两段各 32；收集每张卡原样转发两次 96；all-reduce 是 64+64。"""
    for run in runs:
        assert [run[name][1] for name in ("reduce_scatter", "all_gather", "all_reduce")] == [64, 192, 128]


@pytest.mark.parametrize(("stage", "accumulate"), CASES)
def test_training_equals_one_process_with_the_whole_batch(runs, stage, accumulate):
    losses, parameters = single_process(accumulate, eps=EPS)
    results = [run["zero"][stage, accumulate] for run in runs]
    for result in results:
        torch.testing.assert_close(result["parameters"], parameters, **TIGHT)
    micro = torch.tensor([result["losses"] for result in results])  # (卡，微批)
    torch.testing.assert_close(micro.view(DP_SIZE, STEPS, accumulate).mean((0, 2)), torch.tensor(losses))


def test_optimizer_defaults_are_those_of_torch_and_lr_is_used(runs):
    torch.testing.assert_close(runs[0]["default"]["parameters"], single_process(1)[1], **TIGHT)
    torch.testing.assert_close(runs[0]["lr"]["parameters"], single_process(1, lr=0.1)[1], **TIGHT)


@pytest.mark.rejects
def test_summed_instead_of_averaged_gradient_is_rejected(runs):
    """归约后忘了除以进程数，梯度是 3 倍；同一个真值下差出容差的一万倍以上。"""
    wrong, truth = (single_process(1, scale=scale, eps=EPS)[1] for scale in (DP_SIZE, 1))
    for result in (wrong, runs[0]["zero"][3, 1]["parameters"]):
        gap = max((w - t).abs().max().item() for w, t in zip(result, truth, strict=True))
        assert (gap > 1e-4) == (result is wrong)


@pytest.mark.parametrize(("stage", "accumulate"), CASES)
def test_measured_states_and_traffic_equal_the_formulas(runs, stage, accumulate):
    """float64 的权重 8、梯度 8、优化器 24（主权重加两个矩）；参数个数含补零。"""
    eight = dict(weight_bytes=8, grad_bytes=8)
    held = zero_model_state_bytes(PADDED, stage=stage, dp_size=DP_SIZE, optimizer_bytes=24, **eight)
    sent = zero_sent_bytes(PADDED, stage=stage, dp_size=DP_SIZE, num_micro_batches=accumulate, **eight)
    for run in runs:
        assert run["zero"][stage, accumulate]["held"] == pytest.approx(held, abs=1e-6)
        assert run["zero"][stage, accumulate]["sent"] == pytest.approx(STEPS * sent, abs=1e-6)


def test_stage_three_equals_fully_shard(runs):
    for run in runs:
        parameters, _ = run["fsdp"]
        torch.testing.assert_close(run["zero"][3, 1]["parameters"], parameters, **TIGHT)
    # FSDP2 沿第 0 维切，不摊平：7 行是 3、3、1，3 行各 1，2 行是 1、1、0
    assert [run["fsdp"][1] for run in runs] == [[18, 8, 4], [18, 8, 4], [6, 8, 0]]


def test_fetch_seconds_by_hand():
    """120 字节，4 张卡，卡间 10、内存 5 字节每秒：整块 24+12；切开 6+9。"""
    common = dict(dp_size=4, link_bandwidth=10, host_bandwidth=5)
    assert fetch_seconds(120, is_split=False, **common) == 36
    assert fetch_seconds(120, is_split=True, **common) == 15
    on_gpu = common | {"host_bandwidth": math.inf}
    assert fetch_seconds(120, is_split=False, **on_gpu) == 12
    assert fetch_seconds(120, is_split=True, **on_gpu) == 9


@pytest.mark.rejects
def test_wrong_memory_formulas_are_rejected():
    """流传的错法：忘了除、连权重也除、乘 12/N、漏了主权重。同一个真值：论文图 1 的 31.4、16.6、1.9。"""
    psi, n, truth = 7.5, 64, (31.4, 16.6, 1.9)
    ours = [zero_model_state_bytes(psi, stage=s, dp_size=n) for s in (1, 2, 3)]
    assert all(abs(mine - paper) < 0.06 for mine, paper in zip(ours, truth, strict=True))
    wrong = {
        "忘了除以进程数": (16 * psi, 16 * psi, 16 * psi),
        "第 1 级连权重、梯度也除": (16 * psi / n, 2 * psi + 14 * psi / n, 12 * psi / n),
        "第 2 级不切梯度": (4 * psi + 12 * psi / n, 4 * psi + 12 * psi / n, 12 * psi / n),
        "乘 12/N": (12 * psi / n,) * 3,
        "漏了主权重": (4 * psi + 8 * psi / n, 2 * psi + 10 * psi / n, 12 * psi / n),
    }
    for name, values in wrong.items():
        assert any(abs(value - paper) > 0.2 for value, paper in zip(values, truth, strict=True)), name


@pytest.mark.rejects
def test_wrong_traffic_formulas_are_rejected(runs):
    """第 2 级当成 all-reduce 再收集（3 趟）；第 3 级只收集一次（2 趟）：都与数出来的字节不符。"""
    once = PADDED * 8 * (DP_SIZE - 1) / DP_SIZE * STEPS
    assert runs[0]["zero"][2, 1]["sent"] == 2 * once != 3 * once
    assert runs[0]["zero"][3, 1]["sent"] == 3 * once != 2 * once


@pytest.mark.rejects
def test_unreduced_gradient_shard_is_rejected():
    """每张卡拿自己本地梯度的那一份直接更新，不归约：与整批的一步不同。"""
    parameters = [nn.Parameter(layer.clone()) for layer in LAYERS]
    grads = []
    for rank in range(DP_SIZE):
        loss = F.mse_loss(forward(parameters, INPUTS[rank, 0]), TARGETS[rank, 0])
        grads.append(torch.autograd.grad(loss, parameters))
    pieces = []
    for i in range(len(LAYERS)):
        chunks = [
            pad_flat(grads[rank][i], dp_size=DP_SIZE).view(DP_SIZE, -1)[rank] for rank in range(DP_SIZE)
        ]
        pieces.append(torch.cat(chunks)[: LAYERS[i].numel()].view_as(LAYERS[i]))
    optimizer = torch.optim.AdamW(parameters)
    for parameter, grad in zip(parameters, pieces, strict=True):
        parameter.grad = grad
    optimizer.step()
    truth = single_process(1, steps=1)[1]
    gap = max((p - t).abs().max().item() for p, t in zip(parameters, truth, strict=True))
    assert gap > 1e-3  # 学习率 1e-3，符号错了就差一倍
