r"""LoRA：冻结的线性层旁边加一条低秩支路，可合并、可还原；另附适配器的参数个数与模型状态的字节数。

页面：docs/training/lora.md
不包含：多个适配器同时挂载、`Conv1D`（权重存成转置）与嵌入层、量化的底座、DoRA 等变体。
数据类型：适配器与底座同一精度、同一设备，不静默转换。peft 在底座是 16 位时默认把适配器存成 float32。

记号：$W_0$ 是 $(d_{\text{out}},d_{\text{in}})$，$A$ 是 $(R,d_{\text{in}})$，$B$ 是 $(d_{\text{out}},R)$，秩写作 $r$，轴的字母写 $R$。
记 $G=\partial\mathcal L/\partial h$、$\gamma$ 为缩放，则 $\partial B=\gamma\,G(Ax)^\top$，$\partial A=\gamma\,B^\top Gx^\top$：
$B=0$ 时只有 $B$ 有梯度，两者都是 0 时都没有。

References:
    Hu et al., "LoRA"，式 3、§4.1，https://arxiv.org/abs/2106.09685
    Kalajdzievski, "rsLoRA"，https://arxiv.org/abs/2312.03732
    与 peft 0.21.2 `peft.tuners.lora.layer.Linear` 的前向、梯度、合并、还原一致
"""

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from snippets.scalars import Scalar
from snippets.training.memory import model_state_bytes

__all__ = ["lora_scaling", "LoRALinear", "lora_num_params", "llama_lora_num_params", "lora_state_bytes"]


# --8<-- [start:scaling]
def lora_scaling(*, r: int, alpha: int | float, rank_stabilized: bool = False) -> float:
    r"""支路的缩放：LoRA 是 $\alpha/r$，rsLoRA 是 $\alpha/\sqrt r$。

    Args:
        r: 秩。
        alpha: 缩放的分子 $\alpha$。
        rank_stabilized: 真则除以 $\sqrt r$，即 peft 的 `use_rslora`。

    Returns:
        缩放 $\gamma$。
    """
    return alpha / (math.sqrt(r) if rank_stabilized else r)


# --8<-- [end:scaling]
# --8<-- [start:linear]
class LoRALinear(nn.Module):
    r"""冻结的线性层加低秩支路：$h=W_0x+b+\gamma BAx$。

    注意：dropout 只作用在支路的输入；$B=0$ 所以起点与底座相等；合并之后不再有支路，也就不再训练。

    Args:
        base: 要适配的线性层，参数就地冻结。
        r: 秩。
        alpha: 缩放的分子；默认的 r 与 alpha 同 peft。
        dropout: 支路输入的 dropout 概率。
        rank_stabilized: 真则用 $\alpha/\sqrt r$。
    """

    def __init__(
        self,
        base: nn.Linear,
        *,
        r: int = 8,
        alpha: int | float = 8,
        dropout: float = 0.0,
        rank_stabilized: bool = False,
    ):
        super().__init__()
        if r < 1:
            raise ValueError(f"r={r}：秩至少是 1。")
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(base.weight.new_empty(r, base.in_features))
        self.lora_B = nn.Parameter(base.weight.new_empty(base.out_features, r))
        self.dropout = nn.Dropout(dropout)
        self.scaling = lora_scaling(r=r, alpha=alpha, rank_stabilized=rank_stabilized)
        self.merged = False
        self.reset_parameters()

    def reset_parameters(self) -> None:
        r"""$A\sim U(\pm1/\sqrt{d_{\text{in}}})$，就是 `kaiming_uniform_(a=√5)`；$B=0$。"""
        bound = 1 / math.sqrt(self.base.in_features)
        nn.init.uniform_(self.lora_A, -bound, bound)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Float[Tensor, "*batch in"]) -> Float[Tensor, "*batch out"]:
        """先降到 r 维再升回去，不算出整个 ΔW。"""
        result = self.base(x)
        if self.merged:
            return result
        low_rank = F.linear(self.dropout(x), self.lora_A)  # (*batch, R)
        return result + F.linear(low_rank, self.lora_B) * self.scaling

    def delta_weight(self) -> Float[Tensor, "out in"]:
        r"""$\Delta W=\gamma BA$，与底座的权重同形。"""
        return self.lora_B @ self.lora_A * self.scaling

    @torch.no_grad()
    def merge(self) -> None:
        r"""把 $\Delta W$ 加进底座的权重；重复合并报错。"""
        if self.merged:
            raise RuntimeError("适配器已经合并，再合并会加两遍；请先 unmerge()。")
        self.base.weight += self.delta_weight()
        self.merged = True

    @torch.no_grad()
    def unmerge(self) -> None:
        r"""从底座的权重里减去 $\Delta W$；低精度下不能逐位还原。"""
        if not self.merged:
            raise RuntimeError("适配器没有合并，不能还原；请先 merge()。")
        self.base.weight -= self.delta_weight()
        self.merged = False


# --8<-- [end:linear]
# --8<-- [start:count]
def lora_num_params(*, r: Scalar, in_features: Scalar, out_features: Scalar) -> Scalar:
    r"""一个线性层的适配器有多少参数：$r(d_{\text{in}}+d_{\text{out}})$。

    Args:
        r: 秩。
        in_features: 输入维数。
        out_features: 输出维数。

    Returns:
        参数个数。
    """
    return r * (in_features + out_features)


def llama_lora_num_params(
    *,
    r: Scalar,
    hidden_size: Scalar,
    intermediate_size: Scalar,
    num_layers: Scalar,
    num_heads: Scalar,
    num_kv_heads: Scalar,
    head_dim: Scalar,
    targets: str = "all-linear",
) -> Scalar:
    r"""LLaMA 式的模型，给线性层挂上适配器后的可训练参数个数，不含输出头。

    Args:
        r: 秩。
        hidden_size: 模型宽度 $C$。
        intermediate_size: 前馈内宽 $F$。
        num_layers: 层数 $L$。
        num_heads: 查询头数 $H$。
        num_kv_heads: 键值头数 $K$。
        head_dim: 每头维数 $d$。
        targets: `"all-linear"` 是七个线性层；`"qv"` 只有 $W_q$、$W_v$，即 LoRA 论文的主要实验。

    Returns:
        参数个数。
    """
    q_size, kv_size = num_heads * head_dim, num_kv_heads * head_dim
    q = lora_num_params(r=r, in_features=hidden_size, out_features=q_size)  # o 的输入输出对调，个数相同
    v = lora_num_params(r=r, in_features=hidden_size, out_features=kv_size)  # k 与 v 同形
    ffn = lora_num_params(r=r, in_features=hidden_size, out_features=intermediate_size)  # gate、up、down
    if targets == "qv":
        return num_layers * (q + v)
    if targets != "all-linear":
        raise ValueError(f"targets={targets!r}，没有这种选法；请用 all-linear、qv。")
    return num_layers * (2 * q + 2 * v + 3 * ffn)


# --8<-- [end:count]
# --8<-- [start:state]
def lora_state_bytes(num_params: Scalar, num_lora_params: Scalar, *, base_bytes: Scalar = 2) -> Scalar:
    r"""LoRA 训练的模型状态：冻结的底座只有权重，适配器每个参数 16 字节。

    注意：16 是 16 位权重、梯度加 float32 主权重与两个矩；适配器直接存 float32（权重、梯度、两个矩）也是 16。

    Args:
        num_params: 底座的参数个数 $\Psi$。
        num_lora_params: 适配器的参数个数。
        base_bytes: 底座每个权重几字节；4 位量化约 0.5，另有量化常数。

    Returns:
        字节数，不含激活。
    """
    frozen = {"grad_bytes": 0, "master_bytes": 0, "optimizer_bytes": 0}
    return model_state_bytes(num_params, weight_bytes=base_bytes, **frozen) + model_state_bytes(
        num_lora_params
    )


# --8<-- [end:state]
