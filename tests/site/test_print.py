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


def test_pdf_is_as_long_as_with_every_fold_open(visit):
    """真的打印一次，数页数。关掉脚本：主题的脚本会在打印前打开折叠，这里只看样式。"""
    page = visit("rl/dpo/", java_script_enabled=False).page
    folded = page.pdf(format="A4").count(b"/Type /Page\n")
    page.evaluate("document.querySelectorAll('details').forEach(fold => { fold.open = true })")
    assert folded == page.pdf(format="A4").count(b"/Type /Page\n") > 1
