"""bench/generators.py 比较两个站点：少了的页、锚点、公式、代码、图都要列出来。"""

from bench.generators import differences, read, totals

PAGE = """<html><nav id="menu"></nav><article class="md-content__inner">
<h1 id="title">题</h1><h2 id="why">为什么</h2><details class="code"><summary>代码</summary></details>
<p><mjx-container></mjx-container><mjx-container></mjx-container></p><figure class="kb-figure"></figure>
</article></html>"""


def site(folder, **pages):
    for name, html in pages.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "index.html").write_text(html, encoding="utf-8")
    return read(folder)


def test_equal_sites_do_not_differ(tmp_path):
    one, two = site(tmp_path / "one", a=PAGE), site(tmp_path / "two", a=PAGE)
    assert differences(one, two) == []
    assert totals(one, two) == ["1/1", "2/2", "2/2", "1/1", "1/1"]


def test_everything_lost_is_listed(tmp_path):
    worse = PAGE.replace(' id="why"', "").replace("<mjx-container></mjx-container>", "", 1)
    worse = worse.replace('<details class="code">', "<details>").replace("kb-figure", "other")
    one, two = site(tmp_path / "one", a=PAGE, b=PAGE), site(tmp_path / "two", a=worse)
    assert differences(one, two) == [
        "没有 1 页：b…",
        "a: 少了 1 个锚点：why…",
        "a: 公式 2 → 1",
        "a: 嵌入的代码 1 → 0",
        "a: 图 1 → 0",
    ]
    assert totals(one, two) == ["1/2", "1/4", "1/4", "0/2", "0/2"]
