r"""梯度累积的训练循环：清零、末尾不满的窗口、`no_sync`、反缩放、裁剪、更新、调度各放在哪里；另附两个计量工具。

页面：docs/training/gradient-accumulation.md
不包含：loss 的分母（见 `loss_averaging`）、autocast、checkpoint、ZeRO 与 FSDP（梯度分片之后每个微批都要归约）。

各卡的窗口个数必须相同，否则集合通信对不上；同一个窗口里各卡的微批个数可以不同。整个窗口没有有效 token 时由 `global_token_mean_loss` 报错。

References:
    torch 2.13 `DistributedDataParallel.no_sync`、`torch.amp.GradScaler`；
    transformers 5.23.0 `Trainer._run_epoch` 的顺序相同；accelerate 1.15.0 `Accelerator.accumulate` 的同步时机相同。
"""

import weakref
from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext

import torch
import torch.distributed as dist
from jaxtyping import Int
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

from snippets.training.loss_averaging import count_valid_labels, global_token_mean_loss

__all__ = ["train_epoch", "record_all_reduces", "saved_bytes_trace"]


# --8<-- [start:train_epoch]
def train_epoch(
    model: nn.Module,
    micro_batches: Sequence[tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]],
    optimizer: torch.optim.Optimizer,
    *,
    grad_accum_steps: int,
    max_norm: float = 1.0,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    scaler: torch.amp.GradScaler | None = None,
) -> list[tuple[float, float]]:
    """每 `grad_accum_steps` 个微批更新一次，末尾不满的也更新；单卡与 DDP 通用。

    Args:
        model: 输入 token、输出 logits；多卡时是 `DistributedDataParallel`。
        micro_batches: 本卡的 `(input_ids, labels)`。
        optimizer: 优化器。
        grad_accum_steps: 累积步数。
        max_norm: 梯度范数的上限；不裁剪时给无穷大。
        scheduler: 学习率调度器，单位是更新次数。
        scaler: fp16 的损失缩放。

    Returns:
        每次更新的（本卡 loss 之和，裁剪前的梯度范数）；各卡的 loss 取平均才是全局的。
    """
    if grad_accum_steps < 1:
        raise ValueError(f"grad_accum_steps={grad_accum_steps}：累积步数至少为 1。")
    is_ddp = isinstance(model, DistributedDataParallel)
    dp_size = dist.get_world_size() if is_ddp else 1
    scaler = scaler or torch.amp.GradScaler(enabled=False)
    history = []
    for start in range(0, len(micro_batches), grad_accum_steps):
        window = micro_batches[start : start + grad_accum_steps]  # 最后一个窗口可以不满
        num_items = torch.stack([count_valid_labels(labels) for _, labels in window]).sum()
        if is_ddp:
            dist.all_reduce(num_items)  # 分母是全部微批、全部卡的有效 token 数
        optimizer.zero_grad()  # 每个窗口一次，不是每个微批一次
        total = 0.0
        for i, (input_ids, labels) in enumerate(window, start=1):
            # 只有窗口的最后一个微批通信；前向也要放进 no_sync
            with model.no_sync() if is_ddp and i < len(window) else nullcontext():
                logits = model(input_ids)
                loss = global_token_mean_loss(logits, labels, num_items_in_batch=num_items, dp_size=dp_size)
                scaler.scale(loss).backward()  # 梯度加进 .grad，这个微批的激活随即释放
            total = total + loss.detach()
        scaler.unscale_(optimizer)  # 先除掉缩放，再看范数
        norm = nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        scale = scaler.get_scale()
        scaler.step(optimizer)  # 梯度有 inf 或 NaN 就跳过
        scaler.update()
        if scheduler is not None and scaler.get_scale() >= scale:  # 跳过的那次不走调度
            scheduler.step()
        history.append((total.item(), norm.item()))
    return history


# --8<-- [end:train_epoch]
def record_all_reduces(ddp: DistributedDataParallel) -> list[int]:
    """给 DDP 挂一个通信钩子，每次梯度归约记下字节数；归约本身照旧求平均。

    注意：一次同步有几个桶就记几项；`no_sync` 里的反向一项也不记。

    Args:
        ddp: 还没有挂过通信钩子的模型。

    Returns:
        随训练增长的列表。
    """
    sizes = []

    def hook(state, bucket):
        sizes.append(bucket.buffer().nbytes)
        return allreduce_hook(None, bucket)

    ddp.register_comm_hook(None, hook)
    return sizes


# --8<-- [start:trace]
class _Box:
    """装着一个被保存的张量；反向用完，它就被丢掉。"""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved_bytes_trace(step: Callable[[], object], *, parameters: Iterable[Tensor]) -> list[int]:
    """执行 `step`，自动求导每保存或释放一个张量，就记下此刻一共存着多少字节；最大值就是峰值。

    注意：参数不算，同一块存储只数一次；不含梯度、反向时的临时张量。

    Args:
        step: 前向与反向，可以有好几个微批。
        parameters: 模型参数；它们本来就在，不算激活。

    Returns:
        字节数，按发生的次序。
    """
    resident = {p.untyped_storage().data_ptr() for p in parameters}
    holders: dict[int, int] = {}
    sizes: dict[int, int] = {}
    trace = []

    def release(address: int) -> None:
        holders[address] -= 1
        if holders[address] == 0:
            del sizes[address]
        trace.append(sum(sizes.values()))

    def pack(tensor: Tensor) -> _Box:
        box, storage = _Box(tensor), tensor.untyped_storage()
        address = storage.data_ptr()
        if address not in resident:
            holders[address] = holders.get(address, 0) + 1
            sizes[address] = storage.nbytes()
            trace.append(sum(sizes.values()))
            weakref.finalize(box, release, address)
        return box

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
        step()
    return trace


# --8<-- [end:trace]
