r"""奖励模型从偏好对拟合、用规则把它关在门里：两段参考代码。

页面：docs/reasoning/r1-no-reward-model.md

不包含：成对损失（`snippets/rl/post_training.py` 的 `bradley_terry_loss`）、判错对梯度的影响
（`docs/reasoning/rule-based-reward.md`）、best-of-n 与集成（`snippets/rl/reward_hacking.py`）、规则检查器
（`snippets/reasoning/rule_based_reward.py`）。
数据类型：输入什么精度就用什么精度算，不静默转换。

奖励模型只看得见差：成对损失里常数项消去，所以分数没有零点，可以全是负数。「奖励模型分乘以是否通过」因此不是门：
通过而分数为负的回答得负分，没通过的得 0，反而更高。门要先把分数压进正的有界区间。

References:
    - Ouyang et al. 2022，[2203.02155](https://arxiv.org/abs/2203.02155)：式 1（奖励模型）。
    - DeepSeek-AI，[2501.12948](https://arxiv.org/abs/2501.12948) v2：§2.2、§3.1（哪里用、哪里不用奖励模型）。
"""

import torch
from jaxtyping import Bool, Float
from torch import Tensor

__all__ = ["fit_reward_model", "gated_reward"]


# --8<-- [start:fit_reward_model]
def fit_reward_model(
    chosen: Float[Tensor, "P D"], rejected: Float[Tensor, "P D"], *, ridge: float = 1e-3, num_steps: int = 30
) -> Float[Tensor, " D"]:
    r"""线性奖励模型 $w^\top\phi(y)$ 的成对损失加岭项，用牛顿法求最小。

    $$\min_w\ -\frac1P\sum_i\log\sigma\big(w^\top(\phi(y_w^i)-\phi(y_l^i))\big)+\frac{\text{ridge}}2\lVert w\rVert^2$$

    注意：没有截距，偏好对里它会消去。数据线性可分时没有岭项就没有最小值。走满步，不检查收敛。

    Args:
        chosen: 被选中的回答的特征。
        rejected: 被拒绝的回答的特征，与 chosen 同行成对。
        ridge: 岭项系数，必须为正。
        num_steps: 牛顿步数。

    Returns:
        权重。

    References:
        2203.02155 式 1，K=2。
    """
    if ridge <= 0:
        raise ValueError(f"ridge={ridge}：必须为正，否则可分的数据没有最小值。")
    gaps = chosen - rejected
    weights = gaps.new_zeros(gaps.shape[1])
    for _ in range(num_steps):
        wins = torch.sigmoid(gaps @ weights)  # (P,)：模型认为 chosen 更好的概率
        gradient = ridge * weights - ((1 - wins)[:, None] * gaps).mean(0)
        hessian = (gaps * (wins * (1 - wins))[:, None]).mT @ gaps / len(gaps)
        hessian = hessian + ridge * torch.eye(len(weights)).to(gaps)
        weights = weights - torch.linalg.solve(hessian, gradient)
    return weights


# --8<-- [end:fit_reward_model]


# --8<-- [start:gated_reward]
def gated_reward(
    scores: Float[Tensor, " B"], passed: Bool[Tensor, " B"], *, base: float = 1.0
) -> Float[Tensor, " B"]:
    r"""规则当门：没通过得 0，通过得底分，奖励模型只在通过的回答里排先后。

    $$r=\mathbb 1[\text{通过}]\,\big(\text{base}+\sigma(s)\big)$$

    注意：先压进 (0, 1) 再乘；直接用 $s$ 乘，负分会让通过的输给没通过的。

    Args:
        scores: 奖励模型的分，没有零点，可正可负。
        passed: 规则检查是否通过。
        base: 通过的底分，不能为负；越大，奖励模型说话越轻。

    Returns:
        每条的奖励：没通过恰为 0，通过的在 [base, base + 1]。
    """
    if base < 0:
        raise ValueError(f"base={base}：不能为负，否则通过的可能输给没通过的。")
    return torch.where(passed, base + torch.sigmoid(scores), 0)


# --8<-- [end:gated_reward]
