"""数或 SymPy 符号：同一个函数传数得到数，传符号得到公式，计算器的公式、数值与脚本因此只写一次。"""

from sympy import Expr

__all__ = ["Scalar"]

Scalar = int | float | Expr
