r"""snippets/__SECTION__/__MODULE__.py 的测试。

【待写：真值从哪里来（手算、枚举、真实的库）。与被测代码用同一个公式，什么也没有检验】
下面的真值是手算与 PyTorch 的 `logsumexp`、`softmax`。
"""

import math

import pytest
import torch

from snippets.__SECTION__.__MODULE__ import log_mean_exp

X = torch.tensor([0.3, -1.2, 2.0], dtype=torch.float64)


def test_the_mean_of_one_and_three_is_two():
    """手算：log((1+3)/2) = log 2。"""
    x = torch.tensor([1.0, 3.0], dtype=torch.float64).log()
    torch.testing.assert_close(log_mean_exp(x).item(), math.log(2))


def test_value_and_gradient_agree_with_pytorch():
    """前向与梯度都比：logsumexp 减 log n，梯度是 softmax。"""
    leaf = X.clone().requires_grad_()
    value = log_mean_exp(leaf)
    (grad,) = torch.autograd.grad(value, leaf)
    torch.testing.assert_close(value, torch.logsumexp(X, dim=0) - math.log(3))
    torch.testing.assert_close(grad, X.softmax(dim=0))


def test_large_inputs_do_not_overflow():
    torch.testing.assert_close(log_mean_exp(X + 1000), log_mean_exp(X) + 1000)


@pytest.mark.rejects
def test_the_mean_of_the_logs_is_smaller():
    """【待写：拒绝一种流传的错误写法】把平均与对数交换次序：凹函数，结果偏小。"""
    assert log_mean_exp(X) - X.mean() > 0.5
