r"""知识注入的几个零件：已知程度的四档分类、线性联想记忆的写入与干扰、多种说法之后名字分到的份额。

页面：docs/training/knowledge-injection.md

不包含：真实模型的采样与判分（传进来的已经是对错）、检索、训练循环。
数据类型：输入是什么精度就用什么精度算，不做静默转换。

线性联想记忆把事实写成矩阵 $W\approx\sum_j v_jk_j^\top$：键 $k$ 是问题的表示，值 $v$ 是答案的表示，读出是 $Wk$。
它是对一层线性映射的分析工具，不是真实模型；推导里用到的假设（键独立、误差零均值且与键独立）都写在函数的注意里。

References:
    Gekhman 等，https://arxiv.org/abs/2405.05904 的图 2（四档的定义）；
    Allen-Zhu、Li，https://arxiv.org/abs/2309.14316（同一事实要有多种说法才能被提取）。
"""

from jaxtyping import Bool, Float
from torch import Tensor

__all__ = [
    "expected_interference",
    "extractable_share",
    "knowledge_category",
    "linear_memory_interference",
    "linear_memory_write",
]


# --8<-- [start:knowledge_category]
def knowledge_category(
    greedy_correct: Bool[Tensor, "facts prompts"],
    sampled_correct: Bool[Tensor, "facts prompts samples"],
) -> list[str]:
    r"""按 SliCK 的定义给每个事实分档。

    注意：先看贪心，再看采样；不是把所有回答混在一起按正确率切四段。

    Args:
        greedy_correct: 换不同的少样本提示，贪心解码各答一次，对不对。
        sampled_correct: 同样的提示，温度大于 0 各采样若干次，对不对。

    Returns:
        每个事实一个档名。
    """
    names = []
    for greedy, sampled in zip(greedy_correct, sampled_correct, strict=True):
        if greedy.all():
            names.append("HighlyKnown")
        elif greedy.any():
            names.append("MaybeKnown")
        else:
            names.append("WeaklyKnown" if sampled.any() else "Unknown")
    return names


# --8<-- [end:knowledge_category]


# --8<-- [start:linear_memory]
def linear_memory_write(
    memory: Float[Tensor, "values key_dim"],
    keys: Float[Tensor, "new key_dim"],
    targets: Float[Tensor, "new values"],
    *,
    lr: float = 1.0,
) -> Float[Tensor, "values key_dim"]:
    r"""对平方误差走一步梯度下降。

    $$W\leftarrow W+\eta\sum_j(v_j-Wk_j)k_j^\top$$

    注意：已经答对的事实误差为 0，什么也不写。

    Args:
        memory: $W$。
        keys: 新事实的键 $k_j$。
        targets: 新事实的值 $v_j$。
        lr: 步长 $\eta$。

    Returns:
        更新后的 $W$。
    """
    errors = targets - keys @ memory.mT  # (new, values)
    return memory + lr * errors.mT @ keys


def linear_memory_interference(
    errors: Float[Tensor, "new values"],
    new_keys: Float[Tensor, "new key_dim"],
    old_keys: Float[Tensor, "old key_dim"],
    *,
    lr: float = 1.0,
) -> Float[Tensor, " old"]:
    r"""写入新事实之后，每个旧事实的读出被推动多远（平方）。

    $$\Bigl\lVert\eta\sum_je_j\,(k_j^\top k_i)\Bigr\rVert^2$$

    Args:
        errors: 写入前新事实的误差 $e_j=v_j-Wk_j$。
        new_keys: 新事实的键 $k_j$。
        old_keys: 旧事实的键 $k_i$。
        lr: 步长 $\eta$。

    Returns:
        逐个旧事实的平方位移。
    """
    shift = lr * (old_keys @ new_keys.mT) @ errors  # (old, values)
    return shift.square().sum(-1)


# --8<-- [end:linear_memory]


def expected_interference(
    *, num_new: int, key_dim: int, overlap: float = 0.0, error_norm: float = 1.0, lr: float = 1.0
) -> float:
    r"""上面那个量的期望：键是共享方向与各自方向的混合。

    $$\eta^2\,n\,\lVert e\rVert^2\Bigl[c^2+\frac{1-c^2}{d}\Bigr],\qquad k=\sqrt c\,r+\sqrt{1-c}\,u$$

    注意：$r$ 是所有键共享的单位向量，$u$ 在 $d$ 维单位球面上独立均匀；误差零均值、彼此独立、与键独立。
    误差有共同方向时还要加一项正比于 $n(n-1)$ 的交叉项，这里没有。

    Args:
        num_new: 新事实的条数 $n$。
        key_dim: 键的维数 $d$。
        overlap: 重叠 $c$，0 是各自独立，1 是同一个键。
        error_norm: 每条新事实写入前误差的长度 $\lVert e\rVert$。
        lr: 步长 $\eta$。

    Returns:
        一个旧事实的平方位移的期望。
    """
    if not 0.0 <= overlap <= 1.0:
        raise ValueError(f"overlap={overlap} 不在 [0, 1]：它是两个键共享的那一份能量，请改成这个范围内的数。")
    if num_new < 0 or key_dim < 1:
        raise ValueError(f"num_new={num_new}、key_dim={key_dim} 没有意义：条数不能为负，维数至少是 1。")
    return lr**2 * num_new * error_norm**2 * (overlap**2 + (1 - overlap**2) / key_dim)


def extractable_share(*, num_phrasings: int, context_norm: float) -> float:
    r"""同一个事实用几种说法训练之后，只给名字能读出多少（1 是全部）。

    $$\frac{M}{M+s^2}$$

    注意：前提是上下文为这条事实独有、与名字互相正交（所有事实共用的模板不满足），$W$ 从 0 出发用梯度下降训到误差为 0（即最小范数解）。
    同一种说法重复多少遍都只算 $M=1$。

    Args:
        num_phrasings: 不同说法的个数 $M$。
        context_norm: 上下文的长度 $s$，名字的长度取 1。

    Returns:
        名字分到的份额。
    """
    if num_phrasings < 1:
        raise ValueError(f"num_phrasings={num_phrasings}：至少要有一种说法，请传 1 或更大的整数。")
    return num_phrasings / (num_phrasings + context_norm**2)
