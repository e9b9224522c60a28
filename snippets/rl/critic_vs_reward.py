r"""价值模型（critic）与奖励模型（reward model）：价值损失、读出的位置、得分的摆放、TD 误差。

页面：docs/rl/critic-vs-reward.md

不包含：网络主干与采样；奖励模型的损失见 snippets/rl/post_training.py，GAE 见 snippets/rl/ppo.py（TD 误差就是它取 λ=0），
价值裁剪见 snippets/rl/clip.py。
数据类型：输入什么精度就用什么精度算，不静默转换。

两个模型的结构常常相同：主干加一个输出标量的线性头，每个位置都有一个输出。差别在读哪里、拿什么教：

- 奖励模型只读最后一个 token 处的输出，一条回答一个数，用成对偏好教（Bradley–Terry）。
- 价值模型读每个前缀处的输出。第 $t$ 个回答 token $a_t$ 对应 $V(s_t)$，$s_t=(x,a_{<t})$，
  所以要取 $a_t$ **前一个**位置的输出；用当前策略往后的回报教（平方误差）。

掩码为真表示策略生成的 token；为假的是工具返回与 EOS 之后的填充，不是动作，没有价值，也没有 TD 误差。

References:
    InstructGPT，§3.5（价值模型从奖励模型初始化），https://arxiv.org/abs/2203.02155
    GAE，式 (17)（TD 误差）、式 (28)（价值回归），https://arxiv.org/abs/1506.02438
"""

from jaxtyping import Bool, Float
from torch import Tensor

from snippets.rl.masking import masked_mean
from snippets.rl.ppo import generalized_advantage, kl_shaped_rewards

__all__ = ["value_loss", "state_values", "reward_at_end", "td_errors"]


# --8<-- [start:value_loss]
def value_loss(
    values: Float[Tensor, "B T"], targets: Float[Tensor, "B T"], mask: Bool[Tensor, "B T"]
) -> Float[Tensor, ""]:
    r"""价值模型：对每个前缀回归往后的回报，有效 token 上平均，没有 1/2，没有裁剪。

    $$\mathcal L=\frac{\sum_{i,t}m_{i,t}\,(V_{i,t}-\hat R_{i,t})^2}{\sum_{i,t}m_{i,t}}$$

    注意：目标来自当前策略的样本，是常数；这里切断它的梯度。

    Args:
        values: $V(s_t)$，带梯度。
        targets: 回归目标 $\hat R_t$：往后的奖励之和，或 `generalized_advantage` 的第二个返回值。
        mask: 真表示策略生成的 token。

    Returns:
        标量损失。

    References:
        GAE 式 (28)。verl 0.9.1 `compute_value_loss` 把 `cliprange_value` 设得足够大时是它的一半。
    """
    errors = (values - targets.detach()).masked_fill(~mask, 0.0)  # 先置零再平方，填充处的 NaN 才不进梯度
    return masked_mean(errors.square(), mask)


# --8<-- [end:value_loss]


# --8<-- [start:read_out]
def state_values(outputs: Float[Tensor, "B L"], *, response_length: int) -> Float[Tensor, "B T"]:
    r"""从「提示加回答」每个位置的标量输出里，取出每个回答 token 的 $V(s_t)$。

    $$V(s_t)=\text{outputs}_{L-T+t-1},\qquad t=0,\dots,T-1$$

    注意：取的是前一个位置，$a_t$ 那里的输出已经看见 $a_t$。第一个价值来自提示的最后一个 token。

    Args:
        outputs: 标量头在每个位置的输出，提示左填充、回答右填充，共 $L$ 个位置。
        response_length: 回答部分补齐后的长度 $T$（token 数）。

    Returns:
        与回答对齐的价值；填充处也有数，要靠掩码去掉。

    References:
        OpenRLHF 0.11.2 `CriticModel.forward` 取 `values[:, :-1][:, -T:]`，再乘掩码。
    """
    if not 1 <= response_length < outputs.shape[1]:
        raise ValueError(
            f"response_length={response_length}：应至少是 1 且小于总长 {outputs.shape[1]}，提示至少要有一个 token。"
        )
    return outputs[:, -response_length - 1 : -1]


# --8<-- [end:read_out]


# --8<-- [start:reward_at_end]
def reward_at_end(rewards: Float[Tensor, " B"], mask: Bool[Tensor, "B T"]) -> Float[Tensor, "B T"]:
    r"""把整条回答的得分放到最后一个生成的 token 上，其余是 0。

    $$r_t=\mathbb 1[t=t_{\text{last}}]\,R$$

    即 `kl_shaped_rewards` 取 $\beta=0$。

    注意：是最后一个掩码为真的位置，不是最后一列，那里可能是填充；整行为假时没有地方放，返回全零。

    Args:
        rewards: 整条回答的得分 $R$。
        mask: 真表示策略生成的 token。

    Returns:
        逐 token 奖励。

    References:
        OpenRLHF 0.11.2 `compute_reward` 与 verl 0.9.1 `assemble_rm_scores` 一致，只是整行为假时都放在最后一列；
        verl 认的是非填充而不是策略生成，最后一个是工具返回时与这里不同。
    """
    zeros = rewards.new_zeros(mask.shape)  # 两个策略相同，KL 处处是 0
    return kl_shaped_rewards(rewards, zeros, zeros, mask, kl_coef=0.0)


# --8<-- [end:reward_at_end]


# --8<-- [start:td_errors]
def td_errors(
    token_rewards: Float[Tensor, "B T"],
    values: Float[Tensor, "B T"],
    mask: Bool[Tensor, "B T"],
    *,
    gamma: float = 1.0,
) -> Float[Tensor, "B T"]:
    r"""TD 误差：这个 token 让预期变了多少。

    $$\delta_t=r_t+\gamma V(s_{t+1})-V(s_t),\qquad V(s_{\text{终止}})=0$$

    注意：$t+1$ 是下一个掩码为真的位置；最后一个有效 token 之后取 0，不能读填充处的价值。

    Args:
        token_rewards: 逐 token 奖励 $r_t$。
        values: $V(s_t)$。
        mask: 真表示策略生成的 token。
        gamma: 折扣 $\gamma$。

    Returns:
        TD 误差，不带梯度，掩码为假处是 0。

    References:
        GAE 式 (17)；即 `generalized_advantage` 取 $\lambda=0$。
    """
    return generalized_advantage(token_rewards, values, mask, gamma=gamma, lam=0.0)[0]


# --8<-- [end:td_errors]
