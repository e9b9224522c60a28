r"""防遗忘的几个零件：恒等块扩展、权重插值、L2-SP、EWC 与对角 Fisher。

页面：docs/training/catastrophic-forgetting.md

不包含：训练循环、回放数据的采样、LoRA、KV 缓存的层号（真实模型扩展后要重排 `layer_idx` 并改 `num_hidden_layers`）。
数据类型：输入是什么精度就用什么精度算，不做静默转换。

记号：$\theta_0$ 是微调前的参数（锚点），$\theta$ 是正在训练的参数，参数一律写成「名字到张量」的字典。

References:
    LLaMA-Pro（https://arxiv.org/abs/2401.02415）与 `TencentARC/LLaMA-Pro` 的 `scripts/block_expansion.py`；
    WiSE-FT（https://arxiv.org/abs/2109.01903）；L2-SP（https://arxiv.org/abs/1802.01483）；
    EWC（https://arxiv.org/abs/1612.00796）。
"""

import copy
from collections.abc import Callable, Mapping, Sequence

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

__all__ = [
    "PreNormBlock",
    "diagonal_fisher",
    "ewc_penalty",
    "expand_block_identity",
    "expand_blocks",
    "interpolate_weights",
    "l2_sp_penalty",
]


class PreNormBlock(nn.Module):
    r"""最小的 Llama 式块：单头因果注意力加门控前馈，两处残差，层名与 transformers 的 Llama 相同。

    $$h=x+W^O\,\mathrm{Attn}(n_1(x)),\qquad \mathrm{out}=h+W^{\text{down}}\bigl(\mathrm{SiLU}(W^{\text{gate}}n_2(h))\odot W^{\text{up}}n_2(h)\bigr)$$

    注意：没有位置编码与 dropout，只用来看恒等块。

    Args:
        hidden_size: 模型宽度 $C$。
        intermediate_size: 前馈的中间宽度。
    """

    def __init__(self, hidden_size: int, intermediate_size: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        self.post_attention_layernorm = nn.RMSNorm(hidden_size, eps=1e-6)
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(hidden_size, hidden_size, bias=False))
        self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=False)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=False)

    def forward(self, x: Float[Tensor, "B T C"]) -> Float[Tensor, "B T C"]:
        """依次经过注意力与前馈，各加一次残差。"""
        z = self.input_layernorm(x)
        q, k, v = (layer(z)[:, None] for layer in (self.q_proj, self.k_proj, self.v_proj))  # (B, 1, T, C)
        x = x + self.o_proj(F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0])
        z = self.post_attention_layernorm(x)
        return x + self.down_proj(F.silu(self.gate_proj(z)) * self.up_proj(z))


# --8<-- [start:expand]
def expand_block_identity(
    block: nn.Module, *, output_projections: Sequence[str] = ("o_proj", "down_proj")
) -> nn.Module:
    r"""复制一个块，把每条残差支路的最后一个线性层清零。

    $$W^O=0,\ W^{\text{down}}=0\ \Rightarrow\ \mathrm{out}(x)=x$$

    注意：两个都要清零，偏置也要；其余权重保留复制来的值。

    Args:
        block: 要复制的块，不会被改动。
        output_projections: 各残差支路最后一个线性层的名字。

    Returns:
        新块，初始时是恒等映射。

    References:
        `TencentARC/LLaMA-Pro` 的 `scripts/block_expansion.py` 按同样两个名字清零。
    """
    new_block = copy.deepcopy(block)
    for projection in output_projections:
        layers = [m for name, m in new_block.named_modules() if name.split(".")[-1] == projection]
        if not layers:
            raise ValueError(f"块里没有名为 {projection} 的层：清零不全就不是恒等块，请传入正确的名字。")
        for layer in layers:
            for parameter in layer.parameters():
                nn.init.zeros_(parameter)
    return new_block


def expand_blocks(blocks: Sequence[nn.Module] | nn.ModuleList, *, group_size: int) -> nn.ModuleList:
    r"""每 `group_size` 个旧块之后插入其中最后一块的恒等副本，冻结旧块。

    $$L\ \to\ L+L/g$$

    注意：旧块的 `requires_grad` 会被改成 False；嵌入与输出层由调用者冻结。

    Args:
        blocks: 原来的 $L$ 个块，按顺序。
        group_size: 每组的块数 $g$，须整除 $L$。

    Returns:
        扩展后的块；只有新块可训练。

    References:
        LLaMA-Pro：Llama 2 7B 的 32 块分成 8 组，扩展为 40 块。
    """
    if group_size < 1 or len(blocks) % group_size:
        raise ValueError(f"{len(blocks)} 个块不能按每组 {group_size} 块分：group_size 须是块数的正因数。")
    expanded = nn.ModuleList()
    for index, block in enumerate(blocks, start=1):
        expanded.append(block.requires_grad_(False))
        if index % group_size == 0:
            expanded.append(expand_block_identity(block).requires_grad_(True))
    return expanded


# --8<-- [end:expand]


# --8<-- [start:weights]
def interpolate_weights(
    base: Mapping[str, Tensor], tuned: Mapping[str, Tensor], *, alpha: float
) -> dict[str, Tensor]:
    r"""在微调前后的权重之间线性插值。

    $$\theta_\alpha=(1-\alpha)\,\theta_0+\alpha\,\theta_{\text{ft}}$$

    注意：整数张量（计数、位置）不能平均，两边相同才照抄；BatchNorm 的滑动统计要重新估计，不要插值。

    Args:
        base: 微调前的权重。
        tuned: 微调后的权重，名字与形状须一致。
        alpha: 微调权重的占比，0 为微调前，1 为微调后；允许外推。

    Returns:
        插值后的权重。

    References:
        WiSE-FT 的权重空间集成。
    """
    if base.keys() != tuned.keys():
        raise ValueError(f"两份权重的名字不同：{sorted(base.keys() ^ tuned.keys())}，不能插值。")
    merged = {}
    for name, start in base.items():
        if start.is_floating_point():
            merged[name] = (1 - alpha) * start + alpha * tuned[name]
        elif torch.equal(start, tuned[name]):
            merged[name] = start.clone()
        else:
            raise ValueError(f"{name} 是整数张量且两边不同：平均没有意义，请先从字典里去掉。")
    return merged


def ewc_penalty(
    params: Mapping[str, Tensor],
    anchor: Mapping[str, Tensor],
    fisher: Mapping[str, Tensor],
    *,
    weight: float,
) -> Float[Tensor, ""]:
    r"""EWC：按旧任务的对角 Fisher 加权的二次惩罚。

    $$\frac\lambda2\sum_i F_i(\theta_i-\theta_{0,i})^2$$

    注意：$F$ 在旧任务的数据上、$\theta_0$ 处算一次，之后是常数。只对 `fisher` 里有的参数求和。

    Args:
        params: 正在训练的参数。
        anchor: $\theta_0$。
        fisher: 对角 Fisher，与参数同形。
        weight: $\lambda$。

    Returns:
        标量惩罚。

    References:
        Kirkpatrick 等，式 3。
    """
    terms = [(f * (params[name] - anchor[name]).square()).sum() for name, f in fisher.items()]
    return weight / 2 * torch.stack(terms).sum()


def l2_sp_penalty(
    params: Mapping[str, Tensor], anchor: Mapping[str, Tensor], *, weight: float
) -> Float[Tensor, ""]:
    r"""L2-SP：把参数拉回微调前的值，而不是拉回 0。

    $$\frac\lambda2\lVert\theta-\theta_0\rVert^2$$

    注意：权重衰减（weight decay）拉向 0，是另一件事。

    Args:
        params: 正在训练的参数。
        anchor: $\theta_0$，与参数同形。
        weight: $\lambda$。

    Returns:
        标量惩罚，等于 $F=1$ 的 EWC。

    References:
        Li 等，1802.01483（其新增输出层另有一项普通的 L2，这里没有）。
    """
    return weight / 2 * torch.stack([(params[name] - anchor[name]).square().sum() for name in params]).sum()


# --8<-- [end:weights]


# --8<-- [start:fisher]
def diagonal_fisher(
    log_probs_fn: Callable[[dict[str, Tensor], Tensor], Tensor],
    params: Mapping[str, Tensor],
    inputs: Float[Tensor, "B ..."],
) -> dict[str, Tensor]:
    r"""对角 Fisher：标签在模型自己的分布下求和，输入在数据上平均。

    $$F_i=\frac1B\sum_b\sum_{v}\pi_\theta(v\mid x_b)\Bigl(\frac{\partial\log\pi_\theta(v\mid x_b)}{\partial\theta_i}\Bigr)^2$$

    注意：先逐样本平方再平均；不能用批梯度的平方，也不能只取 argmax 的标签。

    Args:
        log_probs_fn: 由参数与单个输入给出 $V$ 个对数概率。
        params: 求 Fisher 处的参数，通常是 $\theta_0$。
        inputs: 旧任务的 $B$ 个输入。

    Returns:
        与参数同名同形的非负张量。
    """
    detached = {name: p.detach() for name, p in params.items()}

    def per_sample(x: Tensor) -> dict[str, Tensor]:
        probs = log_probs_fn(detached, x).exp()  # (V,)
        scores = torch.func.jacrev(log_probs_fn)(detached, x)  # 每个参数 (V, ...)
        return {name: torch.tensordot(probs, s.square(), dims=1) for name, s in scores.items()}

    return {name: f.mean(dim=0) for name, f in torch.func.vmap(per_sample)(inputs).items()}


# --8<-- [end:fisher]
