"""打印：折叠展开、导航不印、白底黑字（选了深色也是）、公式与表格不截断。每页按 A4 的宽度看打印的样子。"""

import pytest


@pytest.mark.parametrize(
    ("what", "fault"),
    [
        ("hidden", "折叠着没有印出来"),
        ("chrome", "印出了导航与控件"),
        ("cut", "比纸宽"),
        ("pale", "颜色太淡，白纸上看不清"),
    ],
)
def test_print(readings, what, fault):
    found = {url: found["printed"][what] for url, found in readings.items() if found["printed"][what]}
    assert found == {}, fault


def test_pdf_made_in_the_dark_scheme_is_as_long_as_in_the_light(visit):
    """真的打印一次：展开折叠要许多页；选定的两种主题排得一样。"""
    page = visit("rl/dpo/").page
    lengths = {}
    for scheme, palette in (("default", 1), ("slate", 2)):
        page.evaluate(f"document.getElementById('__palette_{palette}').click()")
        assert page.evaluate("document.body.dataset.mdColorScheme") == scheme
        lengths[scheme] = page.pdf(format="A4").count(b"/Type /Page\n")
    assert lengths["default"] == lengths["slate"] >= 8
