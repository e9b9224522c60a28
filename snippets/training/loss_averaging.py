r"""梯度累积与数据并行下的 loss 平均：把三次平均合成一次，分母是整个更新步的有效 token 数。

页面：docs/training/loss-averaging.md

不包含：跨卡通信（`all_reduce`、`no_sync`）、优化器、梯度裁剪、混合精度。
数据类型：输入是什么精度就用什么精度算，不做静默转换；transformers 的 `ForCausalLMLoss` 会先把 logits 转成 float32。

记号：一次参数更新用到 $W$ 张卡、每张卡 $M$ 个微批（micro-batch）；$N_{w,m}$ 是第 $w$ 张卡第 $m$ 个微批的有效 token 数，
$\ell_{w,m,t}$ 是其中第 $t$ 个有效 token 的交叉熵。

References:
    transformers 5.23.0 `loss/loss_utils.py`（`fixed_cross_entropy`、`ForCausalLMLoss`）与
    `trainer.py`（`get_batch_samples`、`_get_num_items_in_batch`、`compute_loss`、`training_step`）。
    https://github.com/huggingface/transformers/pull/34198
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

__all__ = [
    "token_cross_entropy",
    "count_valid_labels",
    "naive_mean_of_means_loss",
    "global_token_mean_loss",
    "global_sequence_mean_loss",
    "accumulate_gradients",
]


# --8<-- [start:token]
def token_cross_entropy(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], *, ignore_index: int = -100
) -> Float[Tensor, "B T-1"]:
    r"""逐 token 的交叉熵：位置 $t$ 的 logits 预测位置 $t+1$ 的标签。

    $$\ell_{b,t}=-\log\operatorname{softmax}(z_{b,t})_{y_{b,t+1}},\qquad t=1,\dots,T-1$$

    注意：移位在这里做，调用者不要再移一次；每行第一个标签不是任何位置的目标。

    Args:
        logits: 模型输出，第 $t$ 列是读完前 $t$ 个 token 后的预测。
        labels: 与输入同位置的标签，不计入 loss 的位置填 `ignore_index`。
        ignore_index: 不计入 loss 的标签值。

    Returns:
        每个目标 token 的 loss（nat），被忽略的位置为 0。

    References:
        `torch.nn.functional.cross_entropy(reduction="none")`；移位与 transformers 5.23.0 `ForCausalLMLoss` 一致。
    """
    # cross_entropy 要求类别轴在第二位：(B, V, T-1)
    return F.cross_entropy(
        logits[:, :-1].transpose(1, 2), labels[:, 1:], ignore_index=ignore_index, reduction="none"
    )


def count_valid_labels(labels: Int[Tensor, "B T"], *, ignore_index: int = -100) -> Int[Tensor, ""]:
    r"""移位之后还剩多少个有效标签，即 $N_{w,m}$。

    $$N_{w,m}=\sum_{b}\sum_{t=2}^{T}\mathbf 1[y_{b,t}\ne\text{ignore}]$$

    注意：不移位就数，会把每行第一个标签也算进去，每行多 1；padding 的标签必须先设成 `ignore_index`。

    Args:
        labels: 与输入同位置的标签。
        ignore_index: 不计入 loss 的标签值。

    Returns:
        有效标签个数。

    References:
        transformers 5.23.0 `Trainer._get_num_items_in_batch` 数的是 `labels[..., 1:]`；
        https://github.com/huggingface/transformers/pull/46204
    """
    return labels[:, 1:].ne(ignore_index).sum()


# --8<-- [end:token]


# --8<-- [start:naive]
def naive_mean_of_means_loss(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    grad_accum_steps: int,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    r"""朴素写法（有偏）：微批内先取均值，再除以累积步数；多卡时 DDP 还会再取一次均值。

    $$\tilde{\mathcal L}_{w,m}=\frac1M\cdot\frac1{N_{w,m}}\sum_t\ell_{w,m,t}$$

    注意：各微批的 $N_{w,m}$ 不相等时，它不等于一个大 batch；$N_{w,m}=0$ 时前向得到 0/0 = NaN。
    留在这里是为了和 `global_token_mean_loss` 对照，训练不要用。

    Args:
        logits: 本微批的模型输出。
        labels: 本微批的标签。
        grad_accum_steps: 累积步数 $M$。
        ignore_index: 不计入 loss 的标签值。

    Returns:
        本微批用来反向传播的标量。

    References:
        等于 `F.cross_entropy(reduction="mean") / M`，也就是 transformers 5.23.0
        `fixed_cross_entropy` 不传 `num_items_in_batch` 时的结果再由 `training_step` 除以 $M$。
    """
    if grad_accum_steps < 1:
        raise ValueError(f"grad_accum_steps={grad_accum_steps}：累积步数至少为 1。")
    losses = token_cross_entropy(logits, labels, ignore_index=ignore_index)
    return losses.sum() / count_valid_labels(labels, ignore_index=ignore_index) / grad_accum_steps


# --8<-- [end:naive]


# --8<-- [start:global]
def global_token_mean_loss(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    num_items_in_batch: int | Int[Tensor, ""],
    dp_size: int = 1,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    r"""正确写法：token loss 求和，除以整个更新步的有效 token 数，乘卡数抵消梯度平均。

    $$\mathcal L_{w,m}=\frac{W}{N}\sum_t\ell_{w,m,t},\qquad N=\sum_{w,m}N_{w,m}$$

    注意：不要再除以累积步数 $M$，分母已经包含了全部微批。
    `dp_size` 只在各卡梯度被求平均（DDP、FSDP 的默认行为）时才等于卡数；若梯度被求和，应取 1。
    整个微批都被忽略时，loss 为 0，梯度为 0。

    Args:
        logits: 本微批的模型输出。
        labels: 本微批的标签。
        num_items_in_batch: $N$，对全部微批和全部卡求和后的有效 token 数。
        dp_size: 对梯度求平均的卡数 $W$。
        ignore_index: 不计入 loss 的标签值。

    Returns:
        本微批用来反向传播的标量；对 $m$ 求和、对 $w$ 求平均后等于大 batch 的 token 平均 loss。

    References:
        `dp_size=1` 时与 transformers 5.23.0 `ForCausalLMLoss(..., num_items_in_batch=...)` 一致；
        乘卡数对应 `Trainer.compute_loss`。verl 的 `agg_loss(loss_agg_mode="token-mean")` 是同一个式子。
    """
    if dp_size < 1:
        raise ValueError(f"dp_size={dp_size}：卡数至少为 1。")
    if num_items_in_batch <= 0:
        raise ValueError(
            f"num_items_in_batch={int(num_items_in_batch)}：这次更新没有有效 token，应跳过这一步。"
        )
    return token_cross_entropy(logits, labels, ignore_index=ignore_index).sum() * dp_size / num_items_in_batch


# --8<-- [end:global]


# --8<-- [start:sequence]
def global_sequence_mean_loss(
    logits: Float[Tensor, "B T V"],
    labels: Int[Tensor, "B T"],
    *,
    num_sequences: int,
    dp_size: int = 1,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    r"""样本平均：每条样本先在自己的 token 上取均值，再除以整个更新步的样本数。

    $$\mathcal L^{\text{seq}}_{w,m}=\frac{W}{B_{\text{tot}}}\sum_{b}\frac1{n_b}\sum_t\ell_{b,t}$$

    其中 $n_b$ 是第 $b$ 条样本的有效 token 数，$B_{\text{tot}}$ 是整个更新步的样本数。

    注意：它与 token 平均是两个不同的目标，不是同一个目标的两种写法；
    分母同样必须是全局的，否则样本数不等的微批又会出现均值的均值。全被忽略的样本贡献 0。

    Args:
        logits: 本微批的模型输出。
        labels: 本微批的标签。
        num_sequences: $B_{\text{tot}}$，全部微批和全部卡上的样本数之和。
        dp_size: 对梯度求平均的卡数 $W$。
        ignore_index: 不计入 loss 的标签值。

    Returns:
        本微批用来反向传播的标量。

    References:
        verl `agg_loss(loss_agg_mode="seq-mean-token-mean")`；verl 的每条均值分母另加 1e-8，这里没有。
    """
    if dp_size < 1:
        raise ValueError(f"dp_size={dp_size}：卡数至少为 1。")
    if num_sequences < 1:
        raise ValueError(f"num_sequences={num_sequences}：样本数至少为 1。")
    losses = token_cross_entropy(logits, labels, ignore_index=ignore_index)
    lengths = labels[:, 1:].ne(ignore_index).sum(dim=1)
    # 全被忽略的行：分子已经是 0，分母取 1 避免 0/0
    return (losses.sum(dim=1) / lengths.clamp(min=1)).sum() * dp_size / num_sequences


# --8<-- [end:sequence]


# --8<-- [start:step]
def accumulate_gradients(
    model: Callable[[Tensor], Tensor],
    micro_batches: Sequence[tuple[Int[Tensor, "_ _"], Int[Tensor, "_ _"]]],
    *,
    num_items_in_batch: int | Int[Tensor, ""] | None = None,
    dp_size: int = 1,
) -> Float[Tensor, ""]:
    r"""一次更新的前向与反向：先数完全部微批的有效 token，再逐个反向，梯度累加在 `.grad` 里。

    $$\nabla\mathcal L=\sum_{m=1}^{M}\nabla\Bigl(\frac{W}{N}\sum_t\ell_{m,t}\Bigr)$$

    注意：调用前由调用者清零梯度，调用后再裁剪和更新，各只做一次。
    多卡时 `num_items_in_batch` 要先在各卡之间求和（`all_reduce`）再传进来。

    Args:
        model: 输入 token、输出 logits 的可调用对象。
        micro_batches: 本卡的 $M$ 个 `(input_ids, labels)`，形状可以各不相同。
        num_items_in_batch: 全局有效 token 数；单卡时可不传，由本函数数出来。
        dp_size: 对梯度求平均的卡数 $W$。

    Returns:
        本卡的 loss 之和；单卡时等于大 batch 的 token 平均 loss，多卡时要在各卡之间取平均。

    References:
        与 transformers 5.23.0 `Trainer` 的顺序相同：`get_batch_samples` 预取并计数，`training_step` 逐个反向。
    """
    if num_items_in_batch is None:
        if dp_size > 1:
            raise ValueError("dp_size > 1 时必须传入 num_items_in_batch：本卡数不到其他卡的 token。")
        num_items_in_batch = sum(int(count_valid_labels(labels)) for _, labels in micro_batches)
    total = torch.zeros(())
    for input_ids, labels in micro_batches:
        loss = global_token_mean_loss(
            model(input_ids), labels, num_items_in_batch=num_items_in_batch, dp_size=dp_size
        )
        loss.backward()  # 计算图到这里就释放，只有 .grad 留下
        total = total + loss.detach()
    return total


# --8<-- [end:step]
