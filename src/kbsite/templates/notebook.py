# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # __TITLE__：实验
#
# 页面 docs/__KEY__.md 的数字和图都在这里算出来。【待写：这份笔记做了哪几个实验】

# %%
#| label: setup
import torch

from snippets.__SECTION__.__MODULE__ import log_mean_exp

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)

# %%
#| label: overflow
#| caption: 【待写：图上或表里看到什么，一句话】直接算是 inf，先减最大值得 1000.6931
x = torch.tensor([1.0, 3.0]).log() + 1000
direct = x.exp().mean().log()
stable = log_mean_exp(x)
print(f"直接算 {direct:.4f}，先减最大值 {stable:.4f}")

# 【待写：页面从这个单元读出的每个数，在这里断言】
assert direct.isinf() and f"{stable:.4f}" == "1000.6931"
