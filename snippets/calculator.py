r"""页面里的计算器：一个函数给出公式、数值与浏览器里的算式，只写一次。

把 SymPy 符号传给参考实现的函数得到表达式；表达式排成公式，又原样（作为一棵树）交给页面里的脚本求值。
笔记里以 `Markdown(计算器.markdown())` 结尾的单元就把它嵌进页面；脚本是 docs/assets/javascripts/calculator.js。

不包含：表达式以外的计算。函数只能对数值参数做加、减、乘、除、乘方；分情况的参数用 `Choice` 列出各种取值。
"""

import inspect
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from html import escape

import sympy

from snippets.scalars import Scalar

__all__ = ["Input", "Choice", "Output", "Calculator", "format_value"]

UNITS = {
    "bytes": [(1e12, 2**40, "TB", "TiB"), (1e9, 2**30, "GB", "GiB"), (1e6, 2**20, "MB", "MiB")],
    "count": [(1e12, "T"), (1e9, "B"), (1e6, "M")],
    "seconds": [(86400.0, "天"), (3600.0, "小时"), (60.0, "分钟")],
}


@dataclass(frozen=True)
class Input:
    """一个能拖动的数；`is_log` 时滑块按 2 的幂走，框里仍可填任意值。

    框里的数乘以 `scale` 才是公式里的量：标签写「十亿」时是 10 的 9 次方。
    """

    name: str
    label: str
    symbol: str
    default: int | float
    minimum: int | float
    maximum: int | float
    step: int | float = 1
    is_log: bool = False
    scale: int | float = 1


@dataclass(frozen=True)
class Choice:
    """一个只能选的参数：取值 → 显示的名字。"""

    name: str
    label: str
    options: dict[str, str]
    default: str


@dataclass(frozen=True)
class Output:
    """一个结果；`function` 的参数名就是它用到的输入、选择与排在前面的结果。

    单位是 bytes、count、flops、seconds 之一。
    """

    name: str
    label: str
    symbol: str
    unit: str
    function: Callable[..., Scalar]


@dataclass(frozen=True)
class Calculator:
    """一个计算器；`presets` 是名字 → 要改的输入与选择。"""

    name: str
    title: str
    inputs: tuple[Input, ...]
    outputs: tuple[Output, ...]
    choices: tuple[Choice, ...] = ()
    presets: dict[str, dict[str, int | float | str]] = field(default_factory=dict)

    def evaluate(self, **changes: int | float | str) -> dict[str, int | float]:
        """各结果的数值；没给的输入用默认值。"""
        values = {item.name: item.default for item in (*self.inputs, *self.choices)}
        unknown = sorted(set(changes) - set(values))
        if unknown:
            raise ValueError(f"{self.name} 没有这些输入：{unknown}；有 {sorted(values)}。")
        values |= changes
        values |= {item.name: values[item.name] * item.scale for item in self.inputs}
        for output in self.outputs:
            values[output.name] = output.function(**{name: values[name] for name in _parameters(output)})
        return {output.name: values[output.name] for output in self.outputs}

    def formulas(self, output: Output) -> list[tuple[dict[str, str], sympy.Expr]]:
        """一个结果的表达式；用到选择时，每种取值一条。"""
        used = _parameters(output)
        symbols = {item.name: _symbol(item) for item in (*self.inputs, *self.outputs) if item.name in used}
        choices = [choice for choice in self.choices if choice.name in used]
        rows = []
        for options in itertools.product(*(choice.options for choice in choices)):
            when = dict(zip([choice.name for choice in choices], options, strict=True))
            rows.append((when, sympy.sympify(output.function(**symbols, **when))))
        return rows

    def markdown(self) -> str:
        """嵌进页面的 Markdown：一个表单（含默认值的结果），与折叠的算式。"""
        names = {_symbol(item): item.symbol for item in (*self.inputs, *self.outputs)}
        labels = {choice.name: choice.options for choice in self.choices}
        tree, lines = {}, []
        for output in self.outputs:
            rows = self.formulas(output)
            tree[output.name] = [[when, _tree(expression)] for when, expression in rows]
            for when, expression in rows:
                # 几种取值给出同一个式子时只写一遍
                same = [other for other, formula in rows if formula == expression]
                if same[0] is not when:
                    continue
                cases = "、".join("，".join(labels[key][value] for key, value in row.items()) for row in same)
                tex = sympy.latex(expression, symbol_names=names)
                condition = f"（{cases}）" if when and len(same) < len(rows) else ""
                lines.append(
                    f"    {output.label}{condition}：\n\n    $$\n    {output.symbol}={tex}\n    $$\n"
                )
        data = json.dumps(
            {
                "units": UNITS,
                "presets": self.presets,
                "scales": {item.name: item.scale for item in self.inputs if item.scale != 1},
                "formulas": tree,
            },
            ensure_ascii=False,
        )
        html = [
            f'<form class="kb-calculator" data-name="{self.name}" data-search-exclude="true"'
            f' data-formulas="{escape(data)}">'
        ]
        html.append(f"<p><strong>{escape(self.title)}</strong></p>")
        if self.presets:
            html.append(
                _row("预设", "preset", self.name, [("", "自定义"), *((name, name) for name in self.presets)])
            )
        html += [
            _row(item.label, item.name, self.name, item.options.items(), item.default)
            for item in self.choices
        ]
        html += [_slider(item, self.name) for item in self.inputs]
        values = self.evaluate()
        html.append('<dl aria-live="polite">')
        for output in self.outputs:
            text = format_value(float(values[output.name]), unit=output.unit)
            html.append(
                f'<div><dt>{escape(output.label)}</dt><dd><output name="{output.name}"'
                f' data-unit="{output.unit}">{text}</output></dd></div>'
            )
        html.append('</dl><button type="reset">恢复默认</button></form>')
        fold = '??? note "算式：与滑块用的是同一个表达式"\n\n' + "\n".join(lines)
        return "\n".join(html) + "\n\n" + fold


def format_value(value: int | float, *, unit: str) -> str:
    """带单位的数：字节同时写十进制与二进制单位，计数写全并附缩写。脚本里有同样的一份，测试比较两者。

    Args:
        value: 非负的数。
        unit: bytes、count、flops、seconds 之一。

    Returns:
        给人看的文字。
    """
    if unit == "bytes":
        for decimal, binary, big, small in UNITS["bytes"]:
            if value >= decimal:
                return f"{value / decimal:.2f} {big}（{value / binary:.2f} {small}）"
        return f"{value / 1e3:.2f} KB（{value / 1024:.2f} KiB）"
    if unit == "count":
        for scale, suffix in UNITS["count"]:
            if value >= scale:
                return f"{round(value):,}（{value / scale:.2f} {suffix}）"
        return f"{round(value):,}"
    if unit == "seconds":
        for scale, suffix in UNITS["seconds"]:
            if value >= scale:
                return f"{value / scale:.2f} {suffix}"
        return f"{value:.3g} 秒" if value >= 1 else f"{value * 1e3:.3g} 毫秒"
    if unit == "flops":
        mantissa, exponent = f"{value:.2e}".split("e")
        return f"{mantissa}×10^{int(exponent)} FLOP"
    raise ValueError(f"没有单位 {unit!r}；可用 bytes、count、flops、seconds。")


def _symbol(item: Input | Output) -> sympy.Symbol:
    return sympy.Symbol(item.name, positive=True)


def _parameters(output: Output) -> list[str]:
    return list(inspect.signature(output.function).parameters)


def _tree(expression: sympy.Expr) -> int | float | str | list:
    """SymPy 表达式 → 脚本能求值的树：数、变量名，或 [运算, 各项…]。"""
    if expression.is_Symbol:
        return expression.name
    if expression.is_Integer:
        return int(expression)
    if expression.is_Rational:
        return ["*", int(expression.p), ["^", int(expression.q), -1]]
    if expression.is_Float:
        return float(expression)
    operation = {sympy.Add: "+", sympy.Mul: "*", sympy.Pow: "^"}.get(expression.func)
    if operation is None:
        raise ValueError(f"计算器不会算 {expression.func.__name__}：函数里只能用加减乘除与乘方。")
    return [operation, *(_tree(argument) for argument in expression.args)]


def _row(label, name, owner, options, default="") -> str:
    items = "".join(
        f'<option value="{escape(value)}"{" selected" if value == default else ""}>{escape(text)}</option>'
        for value, text in options
    )
    return f'<div class="kb-row"><label for="{owner}-{name}">{escape(label)}</label><select id="{owner}-{name}" name="{name}">{items}</select></div>'


def _slider(item: Input, owner: str) -> str:
    low, high, step = item.minimum, item.maximum, item.step
    scale = ""
    position = item.default
    if item.is_log:
        low, high, position = (float(sympy.log(v, 2).evalf()) for v in (low, high, item.default))
        low, high, position, step, scale = (
            round(low, 2),
            round(high, 2),
            round(position, 2),
            0.25,
            " data-log",
        )
    identity = f"{owner}-{item.name}"
    return (
        f'<div class="kb-row"><label for="{identity}">{escape(item.label)}</label>'
        f'<input type="range" aria-label="{escape(item.label)}（滑块）" data-for="{item.name}"{scale}'
        f' min="{low:g}" max="{high:g}" step="{step:g}" value="{position:g}">'
        f'<input type="number" id="{identity}" name="{item.name}" min="{item.minimum:g}" max="{item.maximum:g}"'
        f' step="any" value="{_plain(item.default)}" inputmode="decimal"></div>'
    )


def _plain(value: int | float) -> str:
    return str(int(value)) if value == int(value) else repr(value)
