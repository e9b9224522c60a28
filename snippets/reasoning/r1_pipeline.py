r"""R1 训练流程里的三块小计算：奖励怎样合成、优势里各项占多少、拒绝采样留下什么。

页面：docs/reasoning/r1-pipeline.md

不包含：规则奖励本身（`rule_based_reward.py`）、GRPO 的优势与损失（`snippets/rl/grpo.py`、`clip.py`）、
奖励模型、SFT 的交叉熵、采样。数据类型：输入什么精度就用什么精度算。

拒绝采样的期望：每个提示独立抽 $N$ 条，答对 $K\sim\operatorname{Bin}(N,p)$ 条，至多留 $m$ 条。给定 $K$，留下的每一条
都服从条件分布 $\pi(y\mid\text{对})$，所以在采样的策略处，这个提示对 SFT 梯度的期望贡献是
$\mathbb E[\min(m,K)]\,\nabla p/p$：不设上限时是 $N\nabla p$，上限为 1 且 $N$ 很大时趋于 $\nabla\log p$。
这里假定不去重；去重之后留下的不再服从条件分布。

References:
    DeepSeek-R1 v2，式 7 至 10（两轮 RL 的奖励）、附录 B.3.3（拒绝采样），https://arxiv.org/abs/2501.12948
    DeepSeekMath 式 3 与 §4.1.2（组内归一化），https://arxiv.org/abs/2402.03300
"""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["combine_rewards", "component_advantages", "rejection_sample", "expected_kept"]


# --8<-- [start:combine_rewards]
def combine_rewards(
    reasoning: Float[Tensor, " B"],
    general: Float[Tensor, " B"],
    language: Float[Tensor, " B"],
    is_reasoning: Bool[Tensor, " B"],
) -> Float[Tensor, " B"]:
    r"""R1 第二轮 RL 的总奖励：推理题用规则分，通用题用奖励模型分，语言一致性直接相加。

    $$R=R_{\text{reasoning}}+R_{\text{general}}+R_{\text{language}}$$

    注意：式 8 写成三项之和；这里按提示的类别只取前两项之一，另一项记 0。

    Args:
        reasoning: 规则分（正确加格式）；通用题那几行不使用，可以是 NaN。
        general: 奖励模型分加格式分；推理题那几行不使用，可以是 NaN。
        language: 目标语言的词占比，0 到 1。
        is_reasoning: 这一行的提示是不是推理题。

    Returns:
        每条回答一个标量。

    References:
        R1 v2 式 8 至 10。
    """
    return torch.where(is_reasoning, reasoning, general) + language


# --8<-- [end:combine_rewards]


# --8<-- [start:component_advantages]
def component_advantages(
    components: Float[Tensor, "K B"], *, group_size: int, eps: float = 1e-6, scale_by_std: bool = True
) -> Float[Tensor, "K B"]:
    r"""把组内归一化的优势拆到每一项奖励上，各项之和恰是总奖励的优势。

    $$\hat A^{(k)}_i=\frac{R^{(k)}_i-\bar R^{(k)}}{\operatorname{std}(\sum_kR^{(k)})+\varepsilon}$$

    注意：减的是各项自己的组均值，除的是**总奖励**的组标准差，不是各项自己的标准差。

    Args:
        components: 各项奖励，第 k 行是第 k 项；一组的列相邻。
        group_size: 每个提示的回答数 $G$，至少为 2。
        eps: 加在标准差上的 $\varepsilon$。
        scale_by_std: 为假时只减均值。

    Returns:
        与输入同形；沿第 0 轴求和等于 `group_advantages(components.sum(0))`。

    References:
        定义为 DeepSeekMath §4.1.2 的归一化，拆分是减均值的线性。
    """
    if group_size < 2 or components.shape[1] % group_size:
        raise ValueError(f"{components.shape[1]} 列不能按每组 {group_size} 条（至少 2）分组，请检查排列。")
    groups = components.unflatten(1, (-1, group_size))  # (K, P, G)
    centered = groups - groups.mean(2, keepdim=True)
    if scale_by_std:
        centered = centered / (groups.sum(0).std(1, keepdim=True) + eps)
    return centered.flatten(1)


# --8<-- [end:component_advantages]


# --8<-- [start:rejection_sample]
def rejection_sample(
    prompts: Sequence[str],
    responses: Sequence[str],
    accepted: Sequence[bool],
    *,
    max_per_prompt: int | None = None,
    dedupe: bool = True,
) -> list[int]:
    r"""拒绝采样：只留通过检查的回答，每个提示去重、限条数，返回留下的行号。

    注意：按先来后到截断；改成留最短或最长的，学到的分布就变了。上限数的是去重之后的条数。

    Args:
        prompts: 每一行的提示；同一提示的行不必相邻。
        responses: 每一行的回答。
        accepted: 是否通过（正确、语言不混杂、可读等条件的与）。
        max_per_prompt: 每个提示至多留几条；None 为不限。
        dedupe: 同一提示下逐字相同的回答只留第一条。

    Returns:
        升序的行号。

    References:
        R1 v2 附录 B.3.3：每题多采，只留正确的；去重与上限报告没有写。
    """
    if max_per_prompt is not None and max_per_prompt < 1:
        raise ValueError(f"max_per_prompt={max_per_prompt}：至少为 1；不限请传 None。")
    kept, seen, counts = [], set(), {}
    for row, (prompt, response, ok) in enumerate(zip(prompts, responses, accepted, strict=True)):
        full = max_per_prompt is not None and counts.get(prompt, 0) >= max_per_prompt
        if not ok or full or (dedupe and (prompt, response) in seen):
            continue
        seen.add((prompt, response))
        counts[prompt] = counts.get(prompt, 0) + 1
        kept.append(row)
    return kept


# --8<-- [end:rejection_sample]


# --8<-- [start:expected_kept]
def expected_kept(
    pass_rate: Float[Tensor, " P"], *, num_samples: int, max_per_prompt: int | None = None
) -> Float[Tensor, " P"]:
    r"""每个提示抽 N 条、至多留 m 条正确的，期望留下几条（不去重）。

    $$\mathbb E[\min(m,K)],\quad K\sim\operatorname{Bin}(N,p)$$

    注意：它除以 $p$ 才是这个提示在 SFT 梯度里乘在 $\nabla p$ 上的倍数。

    Args:
        pass_rate: 每个提示的通过率 $p$。
        num_samples: 每个提示抽几条 $N$。
        max_per_prompt: 上限 $m$；None 为不限，结果是 $Np$。

    Returns:
        期望条数；m 为 1 时是 $1-(1-p)^N$，至少一条正确的概率。
    """
    if num_samples < 1 or (max_per_prompt is not None and max_per_prompt < 1):
        raise ValueError(f"num_samples={num_samples}、max_per_prompt={max_per_prompt}：都至少为 1。")
    cap = num_samples if max_per_prompt is None else max_per_prompt
    n, k = pass_rate.new_tensor(num_samples), torch.arange(num_samples + 1).to(pass_rate)
    log_choose = torch.lgamma(n + 1) - torch.lgamma(k + 1) - torch.lgamma(n - k + 1)
    p = pass_rate[:, None]
    pmf = torch.exp(log_choose + torch.xlogy(k, p) + torch.xlogy(n - k, 1 - p))  # (P, N+1)
    return pmf @ k.clamp(max=cap)


# --8<-- [end:expected_kept]
