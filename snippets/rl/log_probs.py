r"""把模型输出的 logits 变成逐 token 对数概率，再求和成整条回答的对数概率。

页面：docs/rl/dpo.md（「用每 token 平均代替求和」一节）；其他页面也从这里导入。

不包含：错位（由调用者切片，见 `log_probs_from_logits` 的注意）、按长度平均、分块省显存的实现。

dtype：进出都是 float32 或 float64，不悄悄转换。bf16/fp16 的 logits 直接报错，由调用者先 `.float()`：
整条回答的和常有几百到几千奈特，bf16 在那里的间隔是 2 到 32，会盖过 DPO 关心的差值。
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

__all__ = ["IGNORE_INDEX", "log_probs_from_logits", "sequence_log_probs"]

IGNORE_INDEX = -100


def log_probs_from_logits(logits: Float[Tensor, "B T V"], labels: Int[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r"""取出每个位置上 label 的对数概率。

    $$
    \log\pi_\theta(y_t\mid x,y_{<t}) = z_{t,y_t}-\log\sum_{v}e^{z_{t,v}}
    $$

    注意：这里不错位。因果语言模型第 $t$ 个位置的 logits 预测第 $t+1$ 个 token，
    调用时传 `logits[:, :-1]` 与 `input_ids[:, 1:]`；忘了错位，形状照样对得上，数值全错。

    Args:
        logits: 未归一化的分数，位置 t 的分布用来预测 `labels[:, t]`；float32 或 float64。
        labels: 已经与 logits 对齐的目标 token；等于 −100 的位置返回 0，也没有梯度。

    Returns:
        逐 token 对数概率，单位奈特（nat）。

    Raises:
        TypeError: logits 是半精度。

    References:
        - 与 `-torch.nn.functional.cross_entropy(logits.transpose(1, 2), labels, reduction="none")` 相等。
        - TRL 1.16 `trl.trainer.utils.selective_log_softmax` 相同，但它不认 −100，且接受半精度。
    """
    if logits.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"logits 是 {logits.dtype}：半精度放不下整条回答的对数概率之和，请先 logits.float()")
    # --8<-- [start:token]
    ignored = labels == IGNORE_INDEX
    # -100 不能拿去 gather，先换成任意合法下标
    index = labels.masked_fill(ignored, 0).unsqueeze(-1)
    selected = logits.gather(-1, index).squeeze(-1)
    # 不先 softmax 再 log：概率下溢成 0 时会得到 -inf
    log_probs = selected - logits.logsumexp(-1)
    return log_probs.masked_fill(ignored, 0.0)
    # --8<-- [end:token]


def sequence_log_probs(log_probs: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, " B"]:
    r"""把回答部分的逐 token 对数概率求和，得到整条回答的对数概率。

    $$
    \log\pi_\theta(y\mid x)=\sum_{t}m_t\log\pi_\theta(y_t\mid x,y_{<t})
    $$

    注意：是和，不是平均。只有和才是 $\log\pi_\theta(y\mid x)$，DPO 的推导用的就是它；
    平均是每 token 的几何平均概率，换成它就换了目标（SimPO、长度归一 DPO 是有意这么做的）。
    用 `masked_fill` 而不是乘以 mask：被遮住的位置若是 −inf，$0\times(-\infty)$ 会变成 NaN。

    Args:
        log_probs: 逐 token 对数概率，单位奈特。
        mask: 属于回答的位置为 True；提示（prompt）与填充（padding）为 False，结束符算回答。

    Returns:
        每条序列一个数；一个回答 token 都没有的行是 0。

    References:
        - [Rafailov et al. 2023](https://arxiv.org/abs/2305.18290) 式 7 中的 $\log\pi(y\mid x)$。
        - TRL 1.16 `DPOTrainer._compute_loss`：`per_token_logps.sum(dim=1)`，同为求和。
    """
    # --8<-- [start:sequence]
    return log_probs.masked_fill(~mask, 0.0).sum(-1)
    # --8<-- [end:sequence]
