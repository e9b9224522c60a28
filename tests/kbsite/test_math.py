"""公式：找、排、缓存、出错。真的用 Node 与 MathJax。"""

import base64
import io
import re
from pathlib import Path

import pytest
from fontTools.ttLib import TTFont

from kbsite.errors import MathRenderError
from kbsite.math.fonts import embed
from kbsite.math.mathjax import MathJax
from kbsite.math.scan import Formula, formulas, mark_dollars, replace

MODULES = Path(__file__).parents[2] / "node_modules"


@pytest.fixture
def mathjax(tmp_path):
    engine = MathJax(MODULES, tmp_path / "math.json")
    yield engine
    engine.close()


def test_formulas_are_found_in_order_with_their_kind():
    html = r'<p><span class="arithmatex">\(a &lt; b\)</span></p><div class="arithmatex">\[ c &amp; d \]</div>'
    assert list(formulas(html)) == [Formula("a < b", False), Formula("c & d", True)]


def test_replace_puts_the_rendering_in_place():
    html = r'甲<span class="arithmatex">\(a\)</span>乙'
    assert replace(html, lambda formula: f"[{formula.tex}]") == "甲[a]乙"


@pytest.mark.parametrize(
    "text",
    [
        "<code>$x$</code>",
        "<pre>$$x$$</pre>",
        '<a title="$x$">甲</a>',
        "<script>$x$</script>",
        "花了 $5 与 $6 美元",
        r"\$x\$",
    ],
)
def test_dollars_that_are_not_formulas_stay(text):
    assert mark_dollars(text) == text


def test_dollars_in_prose_become_formulas():
    html = mark_dollars("<p>行内 $x_1$，独立 $$\\frac{1}{2}$$。</p>")
    assert list(formulas(html)) == [Formula("x_1", False), Formula(r"\frac{1}{2}", True)]


@pytest.mark.parametrize(
    ("tex", "message"),
    [
        (r"\nosuchmacro{x}", r"Undefined control sequence \nosuchmacro"),
        (r"\frac{1}{2", "Missing close brace|Extra open brace"),
        (r"\href{javascript:alert(1)}{x}", r"Undefined control sequence \href"),
        (r"\require{html}", r"Undefined control sequence \require"),
        (r"\def\a{\a\a}\a", r"Undefined control sequence \def"),
        (r"\newcommand{\a}{b}\a", r"Undefined control sequence \newcommand"),
        (r"\class{x}{y}", r"Undefined control sequence \class"),
        (r"\begin{nosuchenv}x\end{nosuchenv}", "Unknown environment"),
    ],
)
def test_bad_or_forbidden_tex_is_an_error_not_red_text(mathjax, tex, message):
    with pytest.raises(MathRenderError) as caught:
        mathjax.typeset(Formula(tex, False))
    assert any(part in str(caught.value) for part in message.split("|"))


def test_an_error_does_not_disturb_the_next_formula(mathjax):
    alone = mathjax.typeset(Formula("x", False))
    with pytest.raises(MathRenderError):
        mathjax.typeset(Formula(r"\bad", False))
    mathjax._entries.clear()
    assert mathjax.typeset(Formula("x", False)) == alone


def test_rendering_keeps_tex_for_copying_and_mathml_for_screen_readers(mathjax):
    html = mathjax.typeset(Formula(r'a < \text{中文"}', True))
    assert html.startswith('<mjx-container data-tex="a &lt; \\text{中文&quot;}"')
    assert "<mtext>中文" in html and 'display="true"' in html
    assert "data-latex" not in html


def test_stylesheet_does_not_depend_on_order_or_cache(tmp_path):
    wanted = [
        Formula(tex, True) for tex in (r"\mathcal{L}", "x^2", r"\mathbb{E}[r]", r"\sum_{i=1}^n \frac{a}{b}")
    ]

    def build(order, cache):
        engine = MathJax(MODULES, cache)
        html = {formula.tex: engine.typeset(formula) for formula in order}
        css = engine.stylesheet()
        engine.save()
        engine.close()
        return html, css, engine.typeset_count

    first = build(wanted, tmp_path / "a" / "math.json")
    backwards = build(wanted[::-1], tmp_path / "b" / "math.json")
    cached = build(wanted, tmp_path / "a" / "math.json")
    assert first[:2] == backwards[:2] == cached[:2]
    assert (first[2], cached[2]) == (4, 0)


def test_stylesheet_carries_only_the_fonts_and_glyphs_in_use(mathjax):
    mathjax.typeset(Formula(r"x+\mathbb{E}", False))
    css = mathjax.stylesheet()
    assert "MJX-NCM-DS" in css and "MJX-NCM-F;" not in css
    files = mathjax.fonts(css)
    glyphs = {name: TTFont(io.BytesIO(content)).getBestCmap() for name, content in files.items()}
    assert ord("𝑥") in glyphs["mjx-ncm-n.woff2"] and ord("𝔼") in glyphs["mjx-ncm-ds.woff2"]
    assert ord("∫") not in glyphs["mjx-ncm-n.woff2"]
    assert sum(map(len, files.values())) < 10_000


def test_embedded_fonts_are_the_same_fonts(mathjax):
    mathjax.typeset(Formula("x", False))
    css = mathjax.stylesheet()
    files = mathjax.fonts(css)
    inlined = embed(css, files)
    assert 'url("' not in inlined
    assert {base64.b64decode(data) for data in re.findall(r"base64,([^)]+)\)", inlined)} == set(
        files.values()
    )


def test_damaged_cache_is_rebuilt(tmp_path):
    cache = tmp_path / "math.json"
    for damage in ("", "{", '{"version": 1}', "[]"):
        cache.write_text(damage)
        engine = MathJax(MODULES, cache)
        engine.typeset(Formula("x", False))
        engine.save()
        engine.close()
        assert '"formulas"' in cache.read_text(encoding="utf-8")


def test_dead_node_process_is_an_error_that_names_the_formula(mathjax):
    mathjax.typeset(Formula("x", False))
    mathjax._process.kill()
    mathjax._process.wait()
    with pytest.raises(MathRenderError, match="y_2"):
        mathjax.typeset(Formula("y_2", False))
    assert mathjax.typeset(Formula("z", False))


def test_missing_mathjax_says_what_to_run(tmp_path):
    with pytest.raises(MathRenderError, match="make build"):
        MathJax(tmp_path / "nowhere", tmp_path / "math.json")
