"""参考实现的测试共用的东西：只有种子。"""

import pytest
import torch


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)
