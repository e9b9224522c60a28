r"""混合专家（mixture of experts）：路由、合并专家输出、负载均衡损失、无辅助损失的偏置、容量与丢弃。

页面：docs/architecture/moe.md
不包含：专家的内部结构（任何把 `(n, C)` 变成 `(n, C)` 的函数都行）、共享专家（直接相加）、
节点限制的分组路由、router z-loss（见 softmax_cross_entropy.py 的 `z_loss`）、专家并行的通信、噪声路由。

轴：`N` token 数（各序列拼在一起），`E` 专家数，`A` 每个 token 选中的专家数 $k$，`C` 模型宽度。
精度：路由低于 float32 时升到 float32，float64 保持 float64；专家输出在累加后转回 `hidden` 的类型。

References:
    Fedus et al., "Switch Transformers", 式 (3)–(6)，https://arxiv.org/abs/2101.03961
    DeepSeek-AI, "DeepSeek-V3 Technical Report", 式 (12)–(20)，https://arxiv.org/abs/2412.19437
"""

import math
from collections.abc import Callable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from snippets.architecture.attention_scaling import stable_softmax

__all__ = [
    "softmax_top_k_routing",
    "sigmoid_top_k_routing",
    "combine_experts",
    "expert_counts",
    "load_balancing_loss",
    "updated_expert_bias",
    "expert_capacity",
    "within_capacity",
]


# --8<-- [start:softmax-routing]
def softmax_top_k_routing(
    router_logits: Float[Tensor, "N E"], *, top_k: int, renormalize: bool = True
) -> tuple[Float[Tensor, "N A"], Int[Tensor, "N A"]]:
    r"""softmax 之后取前 k 个；`renormalize` 让选中的权重之和为 1。

    $$
    p=\operatorname{softmax}(z),\qquad \mathcal T=\operatorname{TopK}(p),\qquad
    g_i=\frac{p_i}{\sum_{j\in\mathcal T}p_j}
    $$

    注意：重新归一化之后，与「先取前 k 个 logits、再 softmax」恒等；不归一化则不同。
    $k=1$ 时归一化使权重恒为 1，路由器从主损失得不到梯度，所以 Switch 不归一化。

    Args:
        router_logits: 路由器的输出 $z$。
        top_k: 每个 token 选几个专家。
        renormalize: 是否除以选中权重之和。

    Returns:
        权重与专家编号，按权重从大到小。

    References:
        `True` 与 transformers 5.23.0 的 `MixtralTopKRouter` 相同；
        `False` 与 `Qwen3MoeTopKRouter` 的 `norm_topk_prob=False` 相同。
    """
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    weights, selected = stable_softmax(router_logits.to(dtype)).topk(top_k, dim=-1)  # (N, A)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, selected


# --8<-- [end:softmax-routing]


# --8<-- [start:sigmoid-routing]
def sigmoid_top_k_routing(
    router_logits: Float[Tensor, "N E"],
    expert_bias: Float[Tensor, " E"],
    *,
    top_k: int,
    scaling: float = 1.0,
) -> tuple[Float[Tensor, "N A"], Int[Tensor, "N A"]]:
    r"""DeepSeek-V3 的路由：加偏置选专家，权重只用不加偏置的亲和度。

    $$
    s=\sigma(z),\qquad \mathcal T=\operatorname{TopK}(s+b),\qquad
    g_i=c\,\frac{s_i}{\sum_{j\in\mathcal T}s_j}
    $$

    注意：$b$ 不进入权重，也就没有梯度；它不是参数，由 `updated_expert_bias` 更新。

    Args:
        router_logits: 路由器的输出 $z$。
        expert_bias: 每个专家的偏置 $b$。
        top_k: 每个 token 选几个专家。
        scaling: 权重之和 $c$；DeepSeek-V3 的配置是 2.5。

    Returns:
        权重与专家编号，按 $s+b$ 从大到小。

    References:
        DeepSeek-V3 式 (13)、(15)、(16)；与 transformers 5.23.0 的 `DeepseekV3TopkRouter`
        在 `n_group=1` 时相同（它的分母另加 1e-20）。
    """
    dtype = torch.promote_types(router_logits.dtype, torch.float32)
    affinity = torch.sigmoid(router_logits.to(dtype))  # (N, E)
    selected = (affinity + expert_bias).topk(top_k, dim=-1).indices  # (N, A)
    weights = affinity.gather(-1, selected)
    return scaling * weights / weights.sum(dim=-1, keepdim=True), selected


# --8<-- [end:sigmoid-routing]


# --8<-- [start:combine]
def combine_experts(
    hidden: Float[Tensor, "N C"],
    weights: Float[Tensor, "N A"],
    selected: Int[Tensor, "N A"],
    experts: Sequence[Callable[[Tensor], Tensor]],
) -> Float[Tensor, "N C"]:
    r"""每个专家只算分给它的 token，乘权重后加回原位置。

    $$
    y_t=\sum_{i\in\mathcal T_t}g_{t,i}\operatorname{FFN}_i(x_t)
    $$

    注意：权重为 0 的位置仍会计算；要丢弃 token，把它的权重置 0。残差连接在层外。

    Args:
        hidden: 输入 $x$。
        weights: 权重 $g$。
        selected: 专家编号。
        experts: $E$ 个函数，把 `(n, C)` 变成 `(n, C)`。

    Returns:
        输出，类型与 `hidden` 相同。

    References:
        与 transformers 5.23.0 的 `MixtralExperts` 相同。
    """
    output = torch.zeros_like(hidden, dtype=weights.dtype)
    for index, expert in enumerate(experts):
        token, slot = torch.where(selected == index)  # 分给它的 token 与名次
        output.index_add_(0, token, weights[token, slot, None] * expert(hidden[token]))
    return output.to(hidden.dtype)


# --8<-- [end:combine]


def expert_counts(selected: Int[Tensor, "N A"], *, num_experts: int) -> Int[Tensor, " E"]:
    r"""每个专家收到的 token 数 $c_i$，总和是 $Nk$。

    Args:
        selected: 专家编号。
        num_experts: 专家数 $E$；没有收到 token 的专家计 0。

    Returns:
        整数计数，没有梯度。
    """
    return torch.bincount(selected.flatten(), minlength=num_experts)


# --8<-- [start:balance]
def load_balancing_loss(
    router_probs: Float[Tensor, "N E"], selected: Int[Tensor, "N A"]
) -> Float[Tensor, ""]:
    r"""Switch 的负载均衡损失，未乘系数；负载均匀时等于 1。

    $$
    \mathcal L_{\text{bal}}=E\sum_{i=1}^{E}f_iP_i,\qquad
    f_i=\frac{c_i}{Nk},\qquad P_i=\frac1N\sum_tp_{t,i}
    $$

    注意：$f$ 是计数，没有梯度，梯度只经过 $P$。$f$ 要除以 $k$；
    transformers 的 `load_balancing_loss_func` 不除，值是这里的 $k$ 倍。
    按序列均衡就逐条序列调用；全局批的做法是各卡先把 $c_i$ 求和。

    Args:
        router_probs: 每行之和为 1 的概率 $p$；DeepSeek-V3 用归一化后的 sigmoid。
        selected: 专家编号。

    Returns:
        标量损失。

    References:
        Fedus et al. 式 (4)–(6)；DeepSeek-V3 式 (17)–(20)。
    """
    num_experts = router_probs.shape[-1]
    counts = expert_counts(selected, num_experts=num_experts)
    load = counts.to(router_probs.dtype) / selected.numel()  # f，形状 (E,)
    return num_experts * (load * router_probs.mean(dim=0)).sum()


# --8<-- [end:balance]


# --8<-- [start:bias]
def updated_expert_bias(
    expert_bias: Float[Tensor, " E"], counts: Int[Tensor, " E"], *, update_rate: float = 1e-3
) -> Float[Tensor, " E"]:
    r"""无辅助损失的均衡：过载的专家偏置减一步，欠载的加一步。

    $$
    b_i\leftarrow b_i+\gamma\,\operatorname{sign}(\bar c-c_i)
    $$

    注意：只看正负号，不看差多少；恰好等于平均时不动。计数要先跨数据并行求和。

    Args:
        expert_bias: 当前偏置 $b$。
        counts: 这一步的计数 $c$。
        update_rate: 步长 $\gamma$；DeepSeek-V3 用 0.001。

    Returns:
        新的偏置。

    References:
        Wang et al., https://arxiv.org/abs/2408.15664 ；与 Megatron-LM 的 `get_updated_expert_bias` 相同。
    """
    direction = torch.sign(counts.sum() - counts.numel() * counts)  # 整数，没有舍入
    return expert_bias + update_rate * direction.to(expert_bias.dtype)


# --8<-- [end:bias]


# --8<-- [start:capacity]
def expert_capacity(*, num_tokens: int, num_experts: int, top_k: int, capacity_factor: float) -> int:
    r"""每个专家最多收几个 token：$\lceil\phi Nk/E\rceil$，$\phi$ 是容量系数。

    Args:
        num_tokens: token 数 $N$。
        num_experts: 专家数 $E$。
        top_k: 每个 token 选几个专家 $k$。
        capacity_factor: 容量系数 $\phi$。

    Returns:
        容量。
    """
    return math.ceil(capacity_factor * num_tokens * top_k / num_experts)


def within_capacity(selected: Int[Tensor, "N A"], *, num_experts: int, capacity: int) -> Bool[Tensor, "N A"]:
    r"""先到先得：所有 token 的第一选择按位置排队，然后才轮到第二选择；超出容量的是 `False`。

    注意：排队次序依赖位置，排在后面的 token 更容易被丢。被丢的那一项不再有输出，全部被丢的 token 只剩残差。

    Args:
        selected: 专家编号，每行按优先次序。
        num_experts: 专家数 $E$。
        capacity: 每个专家的容量。

    Returns:
        保留的位置；用法是 `weights * within_capacity(...)`。

    References:
        $k=1$ 时与 transformers 5.23.0 的 `SwitchTransformersTop1Router` 相同（它逐条序列排队）。
    """
    queue = torch.nn.functional.one_hot(selected.T.flatten(), num_experts)  # (A·N, E)
    rank = (queue.cumsum(dim=0) * queue).sum(dim=-1)  # 在自己那个专家的队里排第几，从 1 起
    return (rank <= capacity).view(selected.shape[1], selected.shape[0]).T


# --8<-- [end:capacity]
