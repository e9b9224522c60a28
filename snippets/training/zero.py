r"""ZeRO：每张卡的显存与通信量的公式，环形集合通信，四个级别的数据并行训练（真的起进程），参数的两种切法。

页面：docs/training/zero.md
不包含：通信与计算的重叠、分桶、预取、混合精度、激活与通信缓冲的显存、卸载的实现。

显存与通信的公式只做四则运算，传 SymPy 符号就得到公式。记号：$\Psi$ 参数个数，$W$ 进程数，$M$ 梯度累积的步数。
训练里的反向会重跑一层，只为代码短；每层在前向、反向各收集一次参数，与不重算时一样。
优化器逐元素，所以切开更新与整个更新一样；按整个张量的范数裁剪、Muon 这类要看整个张量的算法不在此列。

References:
    Rajbhandari et al., "ZeRO", §3.1、§5、§7、表 1，https://arxiv.org/abs/1910.02054
    Rajbhandari et al., "ZeRO-Infinity"，带宽优先的切法，https://arxiv.org/abs/2104.07857
    `Ring` 的三个操作与 torch 2.13 的 `torch.distributed` 一致；`zero_train` 的第 3 级与 `fully_shard` 一致。
"""

import os
import signal
import socket
import tempfile
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from itertools import chain

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from snippets.scalars import Scalar
from snippets.training.adamw import adamw_step

__all__ = [
    "zero_model_state_bytes",
    "zero_sent_bytes",
    "Ring",
    "pad_flat",
    "zero_train",
    "launch",
    "fetch_seconds",
]


# --8<-- [start:states]
def zero_model_state_bytes(
    num_params: Scalar,
    *,
    stage: int,
    dp_size: Scalar = 1,
    weight_bytes: Scalar = 2,
    grad_bytes: Scalar = 2,
    optimizer_bytes: Scalar = 12,
) -> Scalar:
    r"""每张卡上模型状态的字节数：第 1 级切优化器状态，第 2 级加切梯度，第 3 级加切参数。

    注意：默认 2、2、12 是 16 位混合精度的 Adam，12 = 主权重 4 加两个矩 8；不含激活、缓冲与补齐。

    Args:
        num_params: 参数个数 $\Psi$。
        stage: ZeRO 的级别；0 是普通数据并行。
        dp_size: 分片的进程数 $W$。
        weight_bytes: 每个参数的前向权重几字节。
        grad_bytes: 每个参数的梯度几字节。
        optimizer_bytes: 每个参数的主权重与优化器状态几字节。

    Returns:
        每张卡的字节数。
    """
    if stage not in (0, 1, 2, 3):
        raise ValueError(f"stage={stage}，ZeRO 只有 1、2、3 级；0 是普通数据并行。")
    weight = weight_bytes / dp_size if stage == 3 else weight_bytes
    grad = grad_bytes / dp_size if stage >= 2 else grad_bytes
    optimizer = optimizer_bytes / dp_size if stage >= 1 else optimizer_bytes
    return num_params * (weight + grad + optimizer)


# --8<-- [end:states]
# --8<-- [start:volume]
def zero_sent_bytes(
    num_params: Scalar,
    *,
    stage: int,
    dp_size: Scalar,
    num_micro_batches: Scalar = 1,
    weight_bytes: Scalar = 2,
    grad_bytes: Scalar = 2,
) -> Scalar:
    r"""一次参数更新里每张卡发出的字节数，按环形算法；一个张量走一趟是它的 $(W-1)/W$。

    注意：第 0、1 级在本地累积梯度，一次更新只归约一次；第 2、3 级每个微批都要归约；不含重算引起的再次收集。

    Args:
        num_params: 参数个数 $\Psi$。
        stage: ZeRO 的级别；0 是普通数据并行。
        dp_size: 分片的进程数 $W$。
        num_micro_batches: 梯度累积的步数 $M$。
        weight_bytes: 收集参数时每个几字节。
        grad_bytes: 归约梯度时每个几字节。

    Returns:
        每张卡发出的字节数，收到的一样多。
    """
    if stage == 0:
        trips = 2 * grad_bytes
    elif stage == 1:
        trips = grad_bytes + weight_bytes
    elif stage == 2:
        trips = num_micro_batches * grad_bytes + weight_bytes
    elif stage == 3:
        trips = num_micro_batches * (grad_bytes + 2 * weight_bytes)
    else:
        raise ValueError(f"stage={stage}，ZeRO 只有 1、2、3 级；0 是普通数据并行。")
    return num_params * trips * (dp_size - 1) / dp_size


# --8<-- [end:volume]
# --8<-- [start:ring]
class Ring:
    """手写的环形集合通信：只发给右邻、只收左邻，每发一次就记下字节数。"""

    def __init__(self, rank: int, dp_size: int):
        self.rank, self.dp_size, self.bytes_sent = rank, dp_size, 0

    def _pass(self, chunk: Tensor) -> Tensor:
        received = torch.empty_like(chunk)
        request = dist.isend(chunk, (self.rank + 1) % self.dp_size)
        dist.recv(received, (self.rank - 1) % self.dp_size)
        request.wait()
        self.bytes_sent += chunk.nbytes
        return received

    def reduce_scatter(self, full: Float[Tensor, " P"]) -> Float[Tensor, " S"]:
        """各卡的整个张量求和，第 r 张卡只留第 r 份。"""
        chunks = full.view(self.dp_size, -1)
        partial = chunks[self.rank - 1]
        for step in range(2, self.dp_size + 1):
            partial = self._pass(partial) + chunks[self.rank - step]
        return partial

    def all_gather(self, shard: Float[Tensor, " S"]) -> Float[Tensor, " P"]:
        """各卡的那一份按卡号拼成整个张量，每张卡都拿到。"""
        chunks = [shard] * self.dp_size
        for step in range(1, self.dp_size):
            shard = self._pass(shard)
            chunks[self.rank - step] = shard
        return torch.cat(chunks)

    def all_reduce(self, full: Float[Tensor, " P"]) -> Float[Tensor, " P"]:
        """先归约散布，再收集：通信量是两趟。"""
        return self.all_gather(self.reduce_scatter(full))


# --8<-- [end:ring]
def pad_flat(tensor: Tensor, *, dp_size: int) -> Float[Tensor, " P"]:
    """摊平，末尾补零到进程数的整数倍；不补就切不成等长的份。

    Args:
        tensor: 任意形状的参数。
        dp_size: 进程数。

    Returns:
        一维张量。
    """
    return F.pad(tensor.flatten(), (0, -tensor.numel() % dp_size))


def _layer(flat: Tensor, x: Tensor, shape: torch.Size) -> Tensor:
    """一层 tanh(xWᵀ + b)；`flat` 是摊平并补零的 [W | b]，shape 是摊平之前的形状。"""
    matrix = flat[: shape.numel()].view(shape)
    return torch.tanh(x @ matrix[:, :-1].T + matrix[:, -1])


def _layer_grads(flat: Tensor, x: Tensor, shape: torch.Size, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """参数（补零处为 0）与输入的梯度。"""
    leaves = flat.detach().requires_grad_(), x.detach().requires_grad_()
    return torch.autograd.grad(_layer(*leaves, shape), leaves, upstream)


# --8<-- [start:train]
def zero_train(
    rank: int,
    dp_size: int,
    layers: list,
    inputs: Float[Tensor, "N B C"],
    targets: Float[Tensor, "N B D"],
    *,
    stage: int,
    num_micro_batches: int = 1,
    lr: float = 1e-3,
    eps: float = 1e-8,
) -> dict:
    """一张卡上的数据并行训练；四个级别只差在谁留着整个张量、何时收集与归约。

    Args:
        rank: 卡号。
        dp_size: 进程数。
        layers: 每层的参数，权重与最后一列偏置。
        inputs: 这张卡的微批。
        targets: 对应的目标。
        stage: ZeRO 的级别。
        num_micro_batches: 几个微批更新一次。
        lr: 学习率。
        eps: AdamW 分母里的小量。

    Returns:
        每个微批的损失、最终参数、发出的字节数、模型状态的字节数。
    """
    ring, shapes, losses = Ring(rank, dp_size), [layer.shape for layer in layers], []
    padded = [pad_flat(layer, dp_size=dp_size) for layer in layers]
    shards = [flat.view(dp_size, -1)[rank] for flat in padded]
    weights = list(shards if stage == 3 else padded)
    masters = list(padded if stage == 0 else shards)
    moments = [(torch.zeros_like(master), torch.zeros_like(master)) for master in masters]
    for start in range(0, len(inputs), num_micro_batches):
        grads = [torch.zeros_like(x) for x in (shards if stage >= 2 else padded)]
        for micro in range(start, start + num_micro_batches):
            hidden = [inputs[micro]]
            for weight, shape in zip(weights, shapes, strict=True):
                full = ring.all_gather(weight) if stage == 3 else weight
                hidden.append(_layer(full, hidden[-1], shape))
            error = hidden[-1] - targets[micro]
            losses.append(error.square().mean().item())
            upstream = 2 * error / error.numel() / num_micro_batches / dp_size
            for i in reversed(range(len(layers))):
                full = ring.all_gather(weights[i]) if stage == 3 else weights[i]
                grad, upstream = _layer_grads(full, hidden[i], shapes[i], upstream)
                grads[i] += ring.reduce_scatter(grad) if stage >= 2 else grad
        for i, master in enumerate(masters):
            grad = grads[i]
            if stage < 2:
                grad = ring.all_reduce(grad) if stage == 0 else ring.reduce_scatter(grad)
            step = start // num_micro_batches + 1
            master, *moments[i] = adamw_step(master, grad, *moments[i], step=step, lr=lr, eps=eps)
            masters[i] = master
            weights[i] = ring.all_gather(master) if stage in (1, 2) else master.clone()
    held = sum(x.nbytes for x in [*weights, *grads, *masters, *chain(*moments)])
    sent = ring.bytes_sent
    full = [ring.all_gather(weight) for weight in weights] if stage == 3 else weights
    final = [flat[: shape.numel()].view(shape) for flat, shape in zip(full, shapes, strict=True)]
    return {"losses": losses, "parameters": final, "sent": sent, "held": held}


# --8<-- [end:train]
def _worker(
    rank: int, function: Callable, dp_size: int, folder: str, patience: timedelta, args: list
) -> None:
    for name in (signal.SIGINT, signal.SIGTERM):  # 父进程没了或叫停时立即结束，卡在 C++ 里也一样
        signal.signal(name, signal.SIG_DFL)
    torch.set_num_threads(1)  # fork 之后父进程的 OpenMP 线程池已不在，多线程算子会死锁
    os.environ.setdefault("GLOO_SOCKET_IFNAME", socket.if_nameindex()[0][1])  # 只走环回，不解析主机名
    dist.init_process_group("gloo", f"file://{folder}/store", patience, rank=rank, world_size=dp_size)
    torch.save(function(rank, dp_size, *args[rank]), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def launch(function: Callable, args: list, *, timeout: float = 50.0) -> list:
    """在本机真的起几个进程，各自调用 `function(rank, dp_size, *args[rank])`，通信走 gloo。

    注意：用 fork，子进程不必重新导入 torch；父进程碰过 CUDA 之后不能这样起。无论成败，返回时没有进程留下。

    Args:
        function: 每个进程执行的函数，返回值能被 `torch.save` 保存。
        args: 每个进程的参数；几项就起几个进程。
        timeout: 最多等几秒（笔记的一格限 60 秒）；一次通信只等它的一半，所以通信卡住时报得出是哪一行。

    Returns:
        按卡号排列的返回值。
    """
    with tempfile.TemporaryDirectory() as folder:
        job = function, len(args), folder, timedelta(seconds=timeout / 2), args
        with warnings.catch_warnings():  # Python 3.12 起，父进程有多个线程时 fork 会警告
            warnings.simplefilter("ignore", DeprecationWarning)
            context = mp.start_processes(
                _worker, job, nprocs=len(args), join=False, daemon=True, start_method="fork"
            )
        deadline = time.monotonic() + timeout
        try:
            while not context.join(timeout=max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    alive = [rank for rank, process in enumerate(context.processes) if process.is_alive()]
                    raise TimeoutError(f"第 {alive} 号进程 {timeout:g} 秒没有结束，已全部终止。")
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        return [torch.load(f"{folder}/{rank}.pt") for rank in range(len(args))]


# --8<-- [start:fetch]
def fetch_seconds(
    num_bytes: Scalar, *, dp_size: Scalar, link_bandwidth: Scalar, host_bandwidth: Scalar, is_split: bool
) -> Scalar:
    r"""所有卡拿到同一个张量的时间：先从内存读上来，再在卡间传；两段不重叠，不计延迟。

    注意：整块归一张卡时只有主人那条 PCIe 在忙，卡间是流水的广播；切开时每条 PCIe 各读 $1/W$，再 all-gather。

    Args:
        num_bytes: 张量的字节数。
        dp_size: 进程数 $W$。
        link_bandwidth: 卡间每个方向的带宽，字节每秒。
        host_bandwidth: 每张卡从内存读的带宽；参数就在显存里时给无穷大。
        is_split: 张量是否切给所有卡。

    Returns:
        秒。
    """
    if is_split:
        return num_bytes / dp_size / host_bandwidth + num_bytes * (dp_size - 1) / dp_size / link_bandwidth
    return num_bytes / host_bandwidth + num_bytes / link_bandwidth


# --8<-- [end:fetch]
