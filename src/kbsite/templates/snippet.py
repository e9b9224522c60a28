r"""【待写：这个模块算什么，一句话】

页面：docs/__KEY__.md

【待写：不包含什么；什么精度；记号】下面的函数是能跑的例子，换成这一页的。

References:
    【待写：论文与式号、库的版本与代码路径，带链接】
"""

from jaxtyping import Float
from torch import Tensor

__all__ = ["log_mean_exp"]


# --8<-- [start:log_mean_exp]
def log_mean_exp(x: Float[Tensor, " N"]) -> Float[Tensor, ""]:
    r"""真数的平均的对数；先减最大值，不会溢出。

    $$\log\frac1n\sum_{i=1}^n e^{x_i}$$

    注意：【待写：读者最容易写错的一处】

    Args:
        x: 各项的对数。

    Returns:
        标量。
    """
    largest = x.max()
    return largest + (x - largest).exp().mean().log()


# --8<-- [end:log_mean_exp]
