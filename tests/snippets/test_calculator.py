"""计算器：公式、数值、脚本用的树来自同一个函数。真值是手算与直接调用函数。"""

import dataclasses
import html
import json
import math
import re

import pytest

from snippets.calculator import Calculator, Choice, Input, Output, format_value


def area(*, width, height, shape):
    return width * height / (2 if shape == "triangle" else 1)


def demo(function=area):
    return Calculator(
        name="demo",
        title="面积",
        inputs=(Input("width", "宽", "w", 3, 1, 9), Input("height", "高", "h_0", 4, 1, 1024, is_log=True)),
        choices=(Choice("shape", "形状", {"square": "矩形", "triangle": "三角形"}, "square"),),
        outputs=(Output("area", "面积", "A", "count", function),),
        presets={"宽的": {"width": 9, "shape": "triangle"}},
    )


def data_of(text):
    """页面交给脚本的数据。"""
    return json.loads(html.unescape(re.search(r'data-formulas="([^"]*)"', text)[1]))


def value_of(tree, values):
    """按脚本的规则求值：数、变量名、[运算, 各项…]。"""
    if isinstance(tree, str):
        return values[tree]
    if not isinstance(tree, list):
        return tree
    terms = [value_of(child, values) for child in tree[1:]]
    return {"+": sum, "*": math.prod, "^": lambda pair: pair[0] ** pair[1]}[tree[0]](terms)


def test_evaluate_uses_defaults_and_changes():
    assert demo().evaluate() == {"area": 12}
    assert demo().evaluate(width=5, shape="triangle") == {"area": 10}


def test_unknown_input_names_the_inputs_there_are():
    with pytest.raises(
        ValueError, match=r"demo 没有这些输入：\['depth'\]；有 \['height', 'shape', 'width'\]"
    ):
        demo().evaluate(depth=1)


def test_one_formula_for_each_choice():
    rows = demo().formulas(demo().outputs[0])
    assert [(when["shape"], str(formula)) for when, formula in rows] == [
        ("square", "height*width"),
        ("triangle", "height*width/2"),
    ]


def test_page_holds_formulas_values_and_a_tree_that_gives_the_same_numbers():
    text = demo().markdown()
    assert "A=h_0 w" in text and r"A=\frac{h_0 w}{2}" in text and "面积（三角形）" in text
    assert '<output name="area" data-unit="count">12</output>' in text
    data = data_of(text)
    for when, tree in data["formulas"]["area"]:
        for width, height in [(1, 2), (7, 11), (2.5, 1024)]:
            expected = area(width=width, height=height, **when)
            assert value_of(tree, {"width": width, "height": height}) == pytest.approx(expected, rel=1e-15)
    assert data["presets"] == {"宽的": {"width": 9, "shape": "triangle"}}


def test_markdown_has_no_blank_line_inside_the_form():
    form = demo().markdown().partition("</form>")[0]
    assert "\n\n" not in form


def test_sums_powers_fractions_and_decimals_survive_the_tree():
    def formula(*, width, height):
        return width**2 + height / 3 + 0.5 * width - 1

    calculator = demo(formula)
    (_, tree), *_ = data_of(calculator.markdown())["formulas"]["area"]
    assert value_of(tree, {"width": 3, "height": 4}) == pytest.approx(9 + 4 / 3 + 1.5 - 1, rel=1e-15)


def test_a_result_may_use_the_results_before_it():
    calculator = demo()
    double = Output("double", "两份", "A_2", "count", lambda *, area, width: 2 * area + width)
    calculator = dataclasses.replace(calculator, outputs=(*calculator.outputs, double))
    assert calculator.evaluate(width=5, shape="triangle") == {"area": 10, "double": 25}
    text = calculator.markdown()
    assert "A_2=2 A + w" in text
    (_, tree), *_ = data_of(text)["formulas"]["double"]
    assert value_of(tree, {"area": 10, "width": 5}) == 25


def test_a_function_beyond_arithmetic_is_refused():
    with pytest.raises(ValueError, match="计算器不会算 floor"):
        demo(lambda *, width, height: width // height).markdown()


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [
        (1.6e10, "bytes", "16.00 GB（14.90 GiB）"),
        (131072, "bytes", "131.07 KB（128.00 KiB）"),
        (5e6, "bytes", "5.00 MB（4.77 MiB）"),
        (2.5e12, "bytes", "2.50 TB（2.27 TiB）"),
        (6738415616, "count", "6,738,415,616（6.74 B）"),
        (512, "count", "512"),
        (3.14e23, "flops", "3.14×10^23 FLOP"),
        (172800, "seconds", "2.00 天"),
        (90, "seconds", "1.50 分钟"),
        (0.0048, "seconds", "4.8 毫秒"),
        (2.5, "seconds", "2.5 秒"),
    ],
)
def test_values_carry_their_units(value, unit, text):
    assert format_value(value, unit=unit) == text


def test_unknown_unit_is_refused():
    with pytest.raises(ValueError, match="没有单位 'miles'"):
        format_value(1.0, unit="miles")
