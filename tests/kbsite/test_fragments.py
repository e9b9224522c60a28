"""单元 → 片段：折叠与显示、表、图、拒绝的输出。输出在测试里手写，不经内核。"""

import re
import xml.etree.ElementTree as ElementTree

import pytest

from kbsite.errors import FragmentError
from kbsite.notebooks.fragments import replace_figures, write_fragments
from kbsite.notebooks.run import Executed
from kbsite.notebooks.source import read_notebook
from kbsite.notebooks.svg import inline_svg

SVG = """<?xml version="1.0"?>
<svg xmlns:xlink="http://www.w3.org/1999/xlink" width="432pt" height="244pt" viewBox="0 0 432 244" xmlns="http://www.w3.org/2000/svg">
 <metadata>x</metadata>
 <defs><style type="text/css">*{stroke-linejoin: round}</style></defs>
 <g id="figure_1"><path id="m1" d="M 1.23456 2.00001" style="stroke: #010203"/><use xlink:href="#m1" clip-path="url(#p1)"/>
 <text style="font: 11px 'Noto Sans CJK SC', sans-serif; fill: #010203">误差 0.26812</text></g>
 <clipPath id="p1"><rect x="0" y="0" width="1" height="1"/></clipPath>
</svg>"""


def display(**data):
    return {
        "output_type": "display_data",
        "data": {key.replace("_", "/", 1): value for key, value in data.items()},
    }


def fragment(project, options, outputs, code="x = 1"):
    path = project.notebook("rl/demo", f"# %%\n#| label: result\n{options}{code}\n")
    executed = Executed(read_notebook(path, project.root / "notebooks"), (outputs,))
    folder = project.root / "fragments"
    figures = write_fragments([executed], folder)
    return (folder / "rl/demo/result.md").read_text(encoding="utf-8"), figures


TABLE = {"output_type": "display_data", "data": {"text/markdown": "| 甲 |\n| --- |\n| 1 |"}}
FIGURE = {"output_type": "display_data", "data": {"image/svg+xml": SVG, "text/plain": "<Figure>"}}


def test_code_is_folded_by_default_and_hides_option_lines(project):
    text, _ = fragment(project, "#| caption: 一张表\n", [TABLE])
    assert text.startswith('??? code "代码"\n\n    ````python\n    x = 1\n    ````\n')
    assert "#|" not in text
    assert "| 甲 |\n| --- |\n| 1 |\n\n一张表\n{ .kb-caption }" in text


def test_echo_show_and_hide(project):
    shown, _ = fragment(project, "#| echo: show\n", [TABLE])
    hidden, _ = fragment(project, "#| echo: hide\n", [TABLE])
    assert shown.startswith("````python\nx = 1\n````")
    assert "x = 1" not in hidden


def test_figure_is_a_placeholder_until_the_page_is_finished(project):
    text, figures = fragment(project, "#| caption: 偏差 < 1\n", [FIGURE])
    assert '<kb-figure ref="rl/demo/result/0">偏差 &lt; 1</kb-figure>' in text
    assert "<svg" not in text
    html = replace_figures('<p><kb-figure ref="rl/demo/result/0">偏差 &lt; 1</kb-figure></p>', figures)
    assert html.startswith('<figure class="kb-figure"><svg role="img" aria-label="偏差 &lt; 1"')
    assert html.count("<figcaption>") == 1


def test_figure_without_caption_is_refused(project):
    with pytest.raises(FragmentError, match=r"demo\.py:\d+ \[result\]: 图没有图注"):
        fragment(project, "", [FIGURE])


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (display(text_plain="<matplotlib.legend.Legend at 0x7f>"), "加分号"),
        (display(text_html="<script>alert(1)</script>", text_plain="x"), "text/html"),
        ({"output_type": "stream", "name": "stderr", "text": "UserWarning: 注意"}, "标准错误"),
    ],
)
def test_outputs_that_do_not_belong_in_a_page_are_refused(project, output, message):
    with pytest.raises(FragmentError, match=message):
        fragment(project, "", [output])


def test_stale_fragments_are_removed_and_fresh_ones_left_alone(project):
    fragment(project, "#| echo: show\n", [TABLE])
    path = project.root / "fragments/rl/demo/result.md"
    before = path.stat().st_mtime_ns
    orphan = project.write("fragments/rl/demo/gone.md", "x")
    fragment(project, "#| echo: show\n", [TABLE])
    assert not orphan.exists()
    assert path.stat().st_mtime_ns == before


def test_svg_follows_the_theme_and_keeps_no_colliding_ids():
    svg = inline_svg(SVG, "rl-demo-0", "place", "误差")
    assert "#010203" not in svg and svg.count("currentColor") == 2
    assert set(re.findall(r' id="([^"]+)"', svg)) == {"rl-demo-0-m1", "rl-demo-0-p1"}
    assert 'href="#rl-demo-0-m1"' in svg and "url(#rl-demo-0-p1)" in svg
    assert "Noto" not in svg and "<style" not in svg and "\n" not in svg
    assert "M 1.23 2" in svg and "误差 0.26812" in svg
    ElementTree.fromstring(svg)


@pytest.mark.parametrize(
    "evil",
    [
        "<script>alert(1)</script>",
        '<rect onload="alert(1)"/>',
        "<foreignObject></foreignObject>",
        '<image href="https://example.org/x.png"/>',
        '<a href="javascript:alert(1)"/>',
    ],
)
def test_svg_with_script_or_foreign_resource_is_refused(evil):
    with pytest.raises(FragmentError, match="place: KB60"):
        inline_svg(SVG.replace("<clipPath", evil + "<clipPath"), "p", "place", "误差")
