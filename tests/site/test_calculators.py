"""计算器在真实浏览器里：与 Python 在网格上一致、键盘可用、状态在地址里、没有脚本也有默认结果。"""

import itertools
import random

import pytest
from sitetools import wait

from snippets.architecture.calculators import COMPUTE, KV_CACHE, PARAMETERS
from snippets.calculator import format_value
from snippets.training.calculators import TRAINING_MEMORY

PAGES = {
    "architecture/parameter-count": [PARAMETERS, COMPUTE],
    "architecture/kv-cache": [KV_CACHE],
    "training/memory": [TRAINING_MEMORY],
}
CALCULATORS = [(page, calculator) for page, group in PAGES.items() for calculator in group]
IDS = [calculator.name for _, calculator in CALCULATORS]

SET = """([name, values]) => {
  const form = document.querySelector(`.kb-calculator[data-name="${name}"]`)
  for (const [field, value] of Object.entries(values)) form.elements[field].value = value
  form.elements[Object.keys(values)[0]].dispatchEvent(new Event("input", {bubbles: true}))
  return Object.fromEntries([...form.querySelectorAll("output")].map(o => [o.name, Number(o.dataset.value)]))
}"""


def grid(calculator):
    """每种选择下的两端、默认值与若干随机点（种子固定）。"""
    generator = random.Random(0)
    for options in itertools.product(*(choice.options for choice in calculator.choices)):
        chosen = dict(zip([choice.name for choice in calculator.choices], options, strict=True))
        for pick in ("default", "minimum", "maximum"):
            yield {**{item.name: getattr(item, pick) for item in calculator.inputs}, **chosen}
        for _ in range(5):
            values = {
                item.name: round(generator.uniform(item.minimum, item.maximum), 3)
                for item in calculator.inputs
            }
            yield {**values, **chosen}


@pytest.mark.parametrize(("page", "calculator"), CALCULATORS, ids=IDS)
def test_browser_and_python_agree_on_a_grid(visit, page, calculator):
    browser = visit(f"{page}/").page
    for values in grid(calculator):
        assert browser.evaluate(SET, [calculator.name, values]) == pytest.approx(
            {name: float(value) for name, value in calculator.evaluate(**values).items()}, rel=1e-12
        ), values


@pytest.mark.parametrize(("page", "calculator"), CALCULATORS, ids=IDS)
def test_presets_give_the_models_numbers(visit, page, calculator):
    browser = visit(f"{page}/").page
    form = browser.locator(f'.kb-calculator[data-name="{calculator.name}"]')
    for name, changes in calculator.presets.items():
        form.get_by_label("预设").select_option(name)
        expected = calculator.evaluate(**changes)
        for output in calculator.outputs:
            text = form.locator(f'output[name="{output.name}"]').inner_text()
            assert text == format_value(expected[output.name], unit=output.unit), (name, output.name)
        form.get_by_role("button").click()


@pytest.mark.parametrize(("page", "calculator"), CALCULATORS, ids=IDS)
def test_results_stand_in_the_page_without_scripts(visit, page, calculator):
    form = visit(f"{page}/", java_script_enabled=False).page.locator(f'[data-name="{calculator.name}"]')
    expected = calculator.evaluate()
    for output in calculator.outputs:
        text = form.locator(f'output[name="{output.name}"]').inner_text()
        assert text == format_value(expected[output.name], unit=output.unit)


def test_state_is_in_the_address_and_a_shared_link_restores_it(visit):
    page = visit("architecture/kv-cache/").page
    form = page.locator(".kb-calculator")
    form.locator('input[name="num_tokens"]').fill("131072")
    text = form.locator('output[name="cache"]').inner_text()
    assert "?kv-cache.num_tokens=131072" in page.url and text.startswith("17.18 GB")
    shared = visit(page.url).page.locator(".kb-calculator")
    assert shared.locator('output[name="cache"]').inner_text() == text
    form.get_by_role("button").click()
    wait(page, "!location.search")
    assert form.locator('output[name="cache"]').inner_text().startswith("1.07 GB")


def test_keyboard_moves_the_sliders(visit):
    form = visit("architecture/kv-cache/", width=390).page.locator(".kb-calculator")
    slider = form.get_by_label("层数 L（滑块）")
    slider.focus()
    slider.press("ArrowRight")
    assert form.locator('input[name="num_layers"]').input_value() == "33"
    assert form.locator('output[name="per_token"]').inner_text().startswith("135.17 KB")


def test_nonsense_gives_a_dash_and_does_not_break_the_page(visit):
    visitor = visit("architecture/kv-cache/?kv-cache.num_tokens=abc&kv-cache.nothing=1")
    form = visitor.page.locator(".kb-calculator")
    assert form.locator('output[name="cache"]').inner_text().startswith("1.07 GB")
    form.locator('input[name="num_tokens"]').fill("")
    assert form.locator('output[name="cache"]').inner_text() == "—"
    form.locator('input[name="num_tokens"]').fill("-5")
    assert form.locator('output[name="cache"]').inner_text() == "—"
    assert visitor.errors == []
