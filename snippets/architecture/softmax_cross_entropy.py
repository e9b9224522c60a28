r"""softmax 的对数与交叉熵（cross-entropy）：log-sum-exp、交叉熵与手推的梯度、移位、z-loss、分块计算。

页面：docs/architecture/softmax-cross-entropy.md
不包含：类别权重、概率形式的标签（蒸馏用的软目标）、沿词表切分的并行、融合的 GPU 内核。softmax 本身在 `attention_scaling.py`。

轴：`N` 位置数（批与时间已经摊平），`V` 词表大小，`C` 模型宽度。对数都是自然对数，损失的单位是奈特（nat）。
精度：进出同一精度，不悄悄转换；`cross_entropy` 拒绝半精度，`chunked_cross_entropy` 逐块升到 float32。

References:
    Szegedy et al., "Rethinking the Inception Architecture"（标签平滑），https://arxiv.org/abs/1512.00567
    Chowdhery et al., "PaLM"（z-loss），https://arxiv.org/abs/2204.02311；`google-research/t5x` 的 `t5x/losses.py`
    `torch.nn.functional.cross_entropy`（2.13.0）；transformers 5.23.0 `loss/loss_utils.py` 的 `ForCausalLMLoss`
"""

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from snippets.architecture.attention_scaling import stable_softmax

__all__ = [
    "log_sum_exp",
    "log_softmax",
    "cross_entropy",
    "cross_entropy_grad",
    "causal_lm_loss",
    "z_loss",
    "chunked_cross_entropy",
]


# --8<-- [start:log-softmax]
def log_sum_exp(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch"]:
    r"""对最后一维求指数之和的对数，先减最大值。

    $$
    \operatorname{LSE}(z)=m+\log\sum_v e^{z_v-m},\qquad m=\max_v z_v
    $$

    注意：减 $m$ 之后和至少是 1，对数不会遇到 0。整行都是 $-\infty$ 时得到 NaN，`torch.logsumexp` 给 $-\infty$。

    Args:
        logits: 未归一化的分数，可以含 $-\infty$。

    Returns:
        去掉最后一维，等于 $\log Z$。

    References:
        与 `torch.logsumexp(logits, dim=-1)` 相同，整行 $-\infty$ 除外。
    """
    m = logits.amax(dim=-1, keepdim=True)
    return m.squeeze(-1) + (logits - m).exp().sum(dim=-1).log()


def log_softmax(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, "*batch V"]:
    r"""对数概率，一步算出，不经过概率。

    $$
    \log p_v=z_v-\operatorname{LSE}(z)
    $$

    注意：不要写成 `softmax(...).log()`：概率下溢成 0 之后，对数是 $-\infty$，梯度是 NaN。

    Args:
        logits: 未归一化的分数。

    Returns:
        对数概率（奈特），形状不变。

    References:
        与 `torch.log_softmax(logits, dim=-1)` 相同。
    """
    return logits - log_sum_exp(logits).unsqueeze(-1)


# --8<-- [end:log-softmax]


# --8<-- [start:cross-entropy]
def cross_entropy(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    r"""交叉熵，对没有被忽略的位置取平均。

    $$
    \mathcal L=\frac1{\lvert\mathcal M\rvert}\sum_{n\in\mathcal M}\Big[-(1-\epsilon)\log p_{n,y_n}
    -\frac{\epsilon}{V}\sum_v\log p_{n,v}\Big],\qquad \mathcal M=\{n:y_n\ne\text{ignore}\}
    $$

    注意：分母是 $\lvert\mathcal M\rvert$，不是 $N$；全部被忽略时是 0/0，得到 NaN。这里不移位。

    Args:
        logits: 未归一化的分数，float32 或 float64。
        labels: 与 `logits` 对齐的目标编号。
        ignore_index: 不计入损失的标签值。
        label_smoothing: 分给均匀分布的质量 $\epsilon$；正确类别仍得到自己的那份 $\epsilon/V$。

    Returns:
        标量（奈特）。

    References:
        与 `torch.nn.functional.cross_entropy`（2.13.0，`reduction="mean"`）相同。
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits 是 {logits.dtype}：半精度的对数概率误差太大，请先 logits.float()。")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"label_smoothing 是 {label_smoothing}，应在 0 与 1 之间：目标要是一个分布。")
    valid = labels != ignore_index
    log_probs = log_softmax(logits[valid])  # 只留有效的位置
    token_losses = -log_probs.gather(-1, labels[valid].unsqueeze(-1)).squeeze(-1)
    if label_smoothing > 0.0:  # 为 0 时跳过：logits 里有 -inf 时 0 * inf 是 NaN
        token_losses = (1 - label_smoothing) * token_losses - label_smoothing * log_probs.mean(dim=-1)
    return token_losses.mean()


# --8<-- [end:cross-entropy]


# --8<-- [start:grad]
def cross_entropy_grad(
    logits: Float[Tensor, "N V"],
    labels: Int[Tensor, " N"],
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Float[Tensor, "N V"]:
    r"""`cross_entropy` 对 logits 的梯度，手推，不用自动求导。

    $$
    \frac{\partial\mathcal L}{\partial z_{n,v}}=\frac{p_{n,v}-q_{n,v}}{\lvert\mathcal M\rvert},\qquad
    q_{n,v}=(1-\epsilon)\,\mathbf 1[v=y_n]+\frac{\epsilon}{V}
    $$

    注意：每行之和为 0；被忽略的行全是 0，全部被忽略时也是 0，尽管损失是 NaN。

    Args:
        logits: 未归一化的分数。
        labels: 与 `logits` 对齐的目标编号。
        ignore_index: 不计入损失的标签值。
        label_smoothing: 分给均匀分布的质量 $\epsilon$。

    Returns:
        梯度，形状与 `logits` 相同。

    References:
        与对 `torch.nn.functional.cross_entropy` 自动求导的结果相同。
    """
    valid = (labels != ignore_index).unsqueeze(-1)  # (N, 1)
    index = labels.unsqueeze(-1).masked_fill(~valid, 0)  # -100 不能当下标
    target = torch.full_like(logits, label_smoothing / logits.shape[-1])
    target = target.scatter_add(-1, index, torch.full_like(logits, 1 - label_smoothing))
    return ((stable_softmax(logits) - target) / valid.sum()).masked_fill(~valid, 0.0)


# --8<-- [end:grad]


# --8<-- [start:shift]
def causal_lm_loss(
    logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"], *, ignore_index: int = -100
) -> Float[Tensor, ""]:
    r"""因果语言模型的损失：位置 $t$ 的 logits 预测位置 $t+1$ 的标签。

    $$
    \mathcal L=\frac1{\lvert\mathcal M\rvert}\sum_{(b,t+1)\in\mathcal M}-\log p_{b,t}(y_{b,t+1})
    $$

    注意：移位在这里做，传进来的 `labels` 与 `input_ids` 同位置，不要自己再移一次。

    Args:
        logits: 模型输出，`B` 条序列，每条 `T` 个位置。
        labels: 与输入同位置的标签；提示与填充处填 `ignore_index`。
        ignore_index: 不计入损失的标签值。

    Returns:
        标量（奈特）。

    References:
        与 transformers 5.23.0 的 `ForCausalLMLoss`（不传 `num_items_in_batch`）相同。
    """
    return cross_entropy(
        logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=ignore_index
    )  # (B * (T - 1), V) 对 (B * (T - 1),)


# --8<-- [end:shift]


def z_loss(logits: Float[Tensor, "*batch V"]) -> Float[Tensor, ""]:
    r"""z-loss：配分函数对数的平方，对所有位置取平均；系数由调用者乘。

    $$
    \mathcal L_z=\operatorname{mean}\big[(\log Z)^2\big],\qquad
    \frac{\partial(\log Z)^2}{\partial z_v}=2\log Z\;p_v
    $$

    注意：交叉熵不管整体平移，$\log Z$ 可以任意漂；这一项把它拉回 0。不该计入的位置先从 `logits` 里去掉。

    Args:
        logits: 未归一化的分数。

    Returns:
        标量，未乘系数；PaLM 的系数是 $10^{-4}$。

    References:
        `google-research/t5x` 的 `cross_entropy_with_logits`：总梯度是 $(1+2\alpha\log Z)\,p-q$，$\alpha$ 是系数。
    """
    return log_sum_exp(logits).square().mean()


# --8<-- [start:chunked]
def chunked_cross_entropy(
    hidden_states: Float[Tensor, "N C"],
    weight: Float[Tensor, "V C"],
    labels: Int[Tensor, " N"],
    *,
    chunk_size: int,
    ignore_index: int = -100,
) -> Float[Tensor, ""]:
    r"""把输出层与交叉熵合在一起，一次只算 `chunk_size` 个位置的 logits。

    $$
    \mathcal L=\frac1{\lvert\mathcal M\rvert}\sum_{\text{块}}\sum_{n\in\text{块}\cap\mathcal M}-\log p_{n,y_n}
    $$

    注意：各块求和、最后除一次，不能平均各块的平均。logits 反向时重算，多花一次输出层的前向。

    Args:
        hidden_states: 输出层的输入。
        weight: 输出层的权重。
        labels: 与 `hidden_states` 对齐的目标编号。
        chunk_size: 一块的位置数；峰值里的 logits 是 `chunk_size * V` 个数。
        ignore_index: 不计入损失的标签值。

    Returns:
        标量（奈特），与不分块的相同。
    """

    def chunk_sum(hidden: Tensor, weight: Tensor, chunk_labels: Tensor) -> Tensor:
        logits = hidden @ weight.T  # (chunk_size, V)，用完即弃
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return cross_entropy(logits, chunk_labels, ignore_index=ignore_index) * len(chunk_labels)

    valid = labels != ignore_index
    pairs = zip(hidden_states[valid].split(chunk_size), labels[valid].split(chunk_size), strict=True)
    total = sum(checkpoint(chunk_sum, h, weight, y, use_reentrant=False) for h, y in pairs)
    return total / valid.sum()


# --8<-- [end:chunked]
