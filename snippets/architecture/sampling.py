r"""采样与束搜索：temperature、top-k、top-p、min-p、重复惩罚、Gumbel-max，以及带长度惩罚的束搜索。

页面：docs/architecture/sampling.md
不包含：KV cache（`beam_search` 每步把整条前缀交给 `step_fn`）、typical、eta、XTC、n-gram 禁止、推测解码。

轴：`V` 词表大小，`N` 同时打分的前缀条数，`T` 前缀的 token 数。被滤掉的 token 的 logit 是负无穷。
精度：过滤不改变输入的类型；`sample` 在 float64 里加噪声。

References:
    Fan et al.（top-k），https://arxiv.org/abs/1805.04833
    Holtzman et al.（top-p），https://arxiv.org/abs/1904.09751
    Nguyen et al.（min-p），https://arxiv.org/abs/2407.01082
    Keskar et al.（重复惩罚），https://arxiv.org/abs/1909.05858
"""

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from snippets.architecture.attention_scaling import stable_softmax

__all__ = [
    "apply_temperature",
    "top_k_filter",
    "top_p_filter",
    "min_p_filter",
    "repetition_penalty",
    "sample",
    "beam_search",
]


# --8<-- [start:filters]
def apply_temperature(logits: Float[Tensor, "*batch V"], *, temperature: float) -> Float[Tensor, "*batch V"]:
    r"""除以温度：$p_i\propto e^{z_i/\tau}$。

    注意：温度 0 没有定义，贪心请直接取 argmax。

    Args:
        logits: 模型输出。
        temperature: 温度 $\tau>0$；小于 1 变尖，大于 1 变平。

    Returns:
        `logits / temperature`；与 transformers 5.23.0 的 `TemperatureLogitsWarper` 相同。
    """
    if not temperature > 0:
        raise ValueError(f"temperature 必须大于 0，现在是 {temperature}；要贪心解码就取 argmax。")
    return logits / temperature


def top_k_filter(logits: Float[Tensor, "*batch V"], *, top_k: int) -> Float[Tensor, "*batch V"]:
    r"""只留最大的 $k$ 个 logit。

    注意：与第 $k$ 名并列的都留下，候选可以多于 $k$ 个。

    Args:
        logits: 模型输出。
        top_k: $k\ge1$；不小于词表时什么也不滤。

    Returns:
        其余为 $-\infty$；与 transformers 5.23.0 的 `TopKLogitsWarper` 相同，包括并列。
    """
    if top_k < 1:
        raise ValueError(f"top_k 必须至少是 1，现在是 {top_k}；不要 top-k 就别调用这个函数。")
    kth = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
    return logits.masked_fill(logits < kth, float("-inf"))


def top_p_filter(logits: Float[Tensor, "*batch V"], *, top_p: float) -> Float[Tensor, "*batch V"]:
    r"""留下概率之和达到 $p$ 的最小集合：排在它**前面**的概率之和小于 $p$ 的 token。

    注意：`cumsum <= p` 会丢掉跨过 $p$ 的那一个。掩码算在排序后的下标上，要 scatter 回原来的位置。

    Args:
        logits: 模型输出。
        top_p: $p\in(0,1]$；1 表示不滤。

    Returns:
        其余为 $-\infty$；与 transformers 5.23.0 的 `TopPLogitsWarper` 相同（并列时留哪一个不同）。
    """
    if not 0 < top_p <= 1:
        raise ValueError(f"top_p 必须在 (0, 1] 里，现在是 {top_p}；不要 top-p 就传 1。")
    if top_p == 1:  # 尾部的概率加到 1 上会被舍入掉，不能靠累加来判断
        return logits
    sorted_logits, order = logits.sort(dim=-1, descending=True)
    probs = stable_softmax(sorted_logits)
    remove = probs.cumsum(dim=-1) - probs >= top_p  # 它前面的概率之和
    return logits.masked_fill(remove.scatter(-1, order, remove), float("-inf"))


def min_p_filter(logits: Float[Tensor, "*batch V"], *, min_p: float) -> Float[Tensor, "*batch V"]:
    r"""留下 $p_i\ge p_{\min}\cdot\max_jp_j$ 的 token。

    注意：门槛相对最大的概率，不是绝对的概率；重新归一化不改变它。

    Args:
        logits: 模型输出。
        min_p: $p_{\min}\in[0,1]$；0 表示不滤。

    Returns:
        其余为 $-\infty$；与 transformers 5.23.0 的 `MinPLogitsWarper` 相同，并列最大时都留下。
    """
    if not 0 <= min_p <= 1:
        raise ValueError(f"min_p 必须在 [0, 1] 里，现在是 {min_p}；不要 min-p 就传 0。")
    probs = stable_softmax(logits)
    return logits.masked_fill(probs < min_p * probs.amax(dim=-1, keepdim=True), float("-inf"))


# --8<-- [end:filters]


# --8<-- [start:repetition]
def repetition_penalty(
    logits: Float[Tensor, "B V"], input_ids: Int[Tensor, "B T"], *, penalty: float
) -> Float[Tensor, "B V"]:
    r"""压低出现过的 token：正的 logit 除以 $\theta$，负的乘以 $\theta$。

    注意：负的 logit 除以 $\theta>1$ 反而变大。出现几次都只罚一次；结果不满足平移不变。

    Args:
        logits: 模型输出，温度之前。
        input_ids: 已有的 token，含提示。
        penalty: $\theta>0$；1 表示不罚。

    Returns:
        与 transformers 5.23.0 的 `RepetitionPenaltyLogitsProcessor` 相同。
    """
    if not penalty > 0:
        raise ValueError(f"penalty 必须大于 0，现在是 {penalty}；不要重复惩罚就传 1。")
    seen = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, input_ids, True)
    return torch.where(seen, torch.where(logits < 0, logits * penalty, logits / penalty), logits)


# --8<-- [end:repetition]


# --8<-- [start:sample]
def sample(logits: Float[Tensor, "*batch V"], generator: torch.Generator) -> Int[Tensor, "*batch"]:
    r"""Gumbel-max：$\arg\max_i(z_i+g_i)$ 恰好服从 $\operatorname{softmax}(z)$。

    注意：$g=-\log e$，$e$ 服从均值 1 的指数分布；温度与过滤都要先做完。

    Args:
        logits: 处理后的 logit，滤掉的是 $-\infty$。
        generator: 随机数的来源。

    Returns:
        每行一个 token。
    """
    exponential = torch.empty(logits.shape, dtype=torch.float64).exponential_(generator=generator)
    return (logits - exponential.log()).argmax(dim=-1)


# --8<-- [end:sample]


# --8<-- [start:beam]
def beam_search(
    step_fn: Callable[[Int[Tensor, "N T"]], Float[Tensor, "N V"]],
    *,
    num_beams: int,
    max_new_tokens: int,
    eos_token_id: int,
    length_penalty: float = 1.0,
    early_stopping: bool = False,
) -> tuple[list[int], float]:
    r"""束搜索：每步留总对数概率最大的 $k$ 条前缀，结束的假设按 $\frac1{n^\alpha}\sum\log p$ 排名。

    注意：每步取 $2k$ 个候选，因为最多 $k$ 个是 EOS；只有前 $k$ 名里的 EOS 才算结束。
    带 KV cache 时，每步还要按留下的束重排缓存。

    Args:
        step_fn: 输入前缀，输出下一个 token 的对数概率。
        num_beams: 束宽 $k$。
        max_new_tokens: 最多生成几个 token，到了也算结束。
        eos_token_id: 结束符。
        length_penalty: $\alpha$；正的偏向长的。
        early_stopping: 有 $k$ 个结束的假设就停；默认搜到最长。

    Returns:
        最好的 token 序列与得分。对应 transformers 5.23.0 的 `early_stopping=True` 与 `"never"`。
    """
    beams, scores, finished = [[]], torch.zeros(1), []
    for length in range(1, max_new_tokens + 1):
        prefixes = torch.tensor(beams, dtype=torch.long).view(len(beams), length - 1)
        totals = scores[:, None] + step_fn(prefixes)  # (N, V)
        top = totals.flatten().topk(min(2 * num_beams, totals.numel()))
        running = []
        for rank, (total, index) in enumerate(zip(top.values.tolist(), top.indices.tolist(), strict=True)):
            beam, token = divmod(index, totals.shape[-1])
            if token != eos_token_id and length < max_new_tokens:
                running.append((total, beams[beam] + [token]))
            elif rank < num_beams:
                finished.append((total / length**length_penalty, beams[beam] + [token]))
        if early_stopping and len(finished) >= num_beams:
            break
        running = running[:num_beams]
        beams, scores = [tokens for _, tokens in running], totals.new_tensor([total for total, _ in running])
    score, tokens = max(finished)
    return tokens, score


# --8<-- [end:beam]
