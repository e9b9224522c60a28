"""真的建小站：嵌入、公式在各处、报错、被杀之后、两次构建逐字节相同、两种路径。"""

import json
import random
import subprocess
import time

import pytest
from smallsite import demo, digest, tex_of


def test_formulas_are_typeset_everywhere_and_code_is_left_alone(project):
    result = demo(project).build("--strict")
    assert result.returncode == 0, result.stderr
    page = project.page("rl/demo")
    assert {"a^2", "x_1", r"\lvert t\rvert", r"\beta", "k_3", r"r-1-\log r", r"\rho", "w = 1", "f"} <= set(
        tex_of(page)
    )
    assert any("aligned" in tex for tex in tex_of(page))
    assert "$not_math$" in page and "$not_math_either$" in page
    assert "arithmatex" not in page and "kb-figure ref" not in page
    assert page.count('<figure class="kb-figure"><svg') == 1
    assert "Demo 的笔记标题（错别子）" in page


def test_docstring_formulas_are_typeset_and_markers_are_not_shown(project):
    project.write("snippets/rl/__init__.py", "")
    project.write(
        "snippets/rl/demo.py",
        '''
        r"""模块。"""

        __all__ = ["twice"]


        # --8<-- [start:twice]
        def twice(x: float) -> float:
            r"""两倍。

            $$y = 2x$$

            Args:
                x: 数 $x$。

            Returns:
                两倍。
            """
            return 2 * x
        # --8<-- [end:twice]
        ''',
    )
    project.write("docs/api.md", "# API\n\n::: snippets.rl\n")
    project.write("docs/code.md", '# 代码\n\n```python\n--8<-- "snippets/rl/demo.py:twice"\n```\n')
    project.nav("index.md", "api.md", "code.md")
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    assert {"y = 2x", "x"} <= set(tex_of(project.page("api")))
    assert "twice" in project.page("code")
    assert "8<--" not in project.page("code") + project.page("api")


def test_notebook_page_is_light_has_chinese_anchors_and_a_download(project):
    assert demo(project).build("--strict").returncode == 0
    page = project.page("notebooks/rl/demo")
    assert '<h2 id="中文小节">' in page and 'href="#中文小节"' in page
    assert 'id=""' not in page
    assert {"a_1", r"\frac{1}{2}"} <= set(tex_of(page))
    assert page.count('<figure class="kb-figure"><svg role="img" aria-label="一条直线"') == 1
    assert "<img" not in page
    assert "cdn" not in page.lower() and "mermaid" not in page.lower() and "#| label" not in page
    downloaded = json.loads((project.root / "site/notebooks/rl/demo/demo.ipynb").read_text(encoding="utf-8"))
    assert [cell["cell_type"] for cell in downloaded["cells"]] == ["markdown", "code", "code", "code"]
    assert downloaded["cells"][2]["outputs"]


@pytest.mark.parametrize(
    ("page", "message"),
    [
        (
            '--8<-- "rl/demo/tabel.md"',
            "docs/rl/demo.md:9: notebooks/rl/demo.py 里没有标签 'tabel'（有：figure、table）",
        ),
        ('--8 < --"rl/demo/table.md"', "docs/rl/demo.md:9: 嵌入写成了"),
        ('--8<-- "rl/other/table.md"', "没有专题键为 'rl/other' 的笔记"),
        ('--8<-- "snippets/rl/nothing.py"', "嵌入的文件 snippets/rl/nothing.py 不存在"),
        (r"公式 $\nosuch{x}$", r"docs/rl/demo.md:9: 公式排不出来：Undefined control sequence \nosuch"),
        (r"公式 $\frac{1}{2$", "docs/rl/demo.md:9: 公式排不出来"),
    ],
)
def test_mistakes_in_a_page_stop_the_build_with_place_fact_and_cure(project, page, message):
    demo(project).write(
        "docs/rl/demo.md", f"---\ntitle: 演示\ndescription: 演示\n---\n\n# 演示\n\n---\n{page}\n"
    )
    # front matter 之后的正文从第 5 行起；被测的那一行是第 9 行
    result = project.build("--strict")
    assert result.returncode != 0
    assert message in result.stdout + result.stderr
    assert "Traceback" not in result.stderr
    assert not (project.root / "site/rl").exists()


def test_label_that_no_page_embeds_is_a_warning(project):
    demo(project).write("docs/rl/demo.md", '# 演示\n\n--8<-- "rl/demo/figure.md"\n')
    loose, strict = project.build(), project.build("--strict")
    assert loose.returncode == 0 and "标签 'table' 没有页面嵌入" in loose.stderr
    assert strict.returncode != 0


def test_missing_answer_is_named(project):
    demo(project).write("docs/rl/demo.md", "# 演示\n\n{{ answer }}\n")
    result = project.build("--strict")
    assert result.returncode != 0 and "docs/rl/demo.md:1: 正文用了 {{ answer }}" in result.stderr


def test_second_build_neither_executes_nor_typesets(project):
    first, second = demo(project).build(), project.build()
    assert "执行笔记" in first.stderr and "新排" in first.stderr
    assert "执行笔记" not in second.stderr and "新排" not in second.stderr


def test_two_clean_builds_are_byte_identical(project):
    assert demo(project).build("--strict").returncode == 0
    first = digest(project.root / "site")
    subprocess.run(["rm", "-rf", project.root / ".cache", project.root / "site"], check=True)
    assert project.build("--strict").returncode == 0
    assert digest(project.root / "site") == first


def test_build_is_correct_after_being_killed_at_random_moments(project):
    demo(project)
    assert project.build("--strict").returncode == 0
    expected = digest(project.root / "site")
    dice = random.Random(0)
    for _ in range(20):
        if dice.random() < 0.5:
            subprocess.run(["rm", "-rf", project.root / ".cache"], check=True)
        process = subprocess.Popen(
            project.command("--strict"),
            cwd=project.root,
            env=project.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(dice.uniform(0.2, 4.0))
        process.kill()
        process.wait()
        # 上一次建好的还在，没有半个站点
        assert digest(project.root / "site") == expected
    result = project.build("--strict")
    assert result.returncode == 0, result.stderr
    assert digest(project.root / "site") == expected


def test_two_builds_at_once_both_succeed(project):
    demo(project)
    processes = [
        subprocess.Popen(
            project.command("--strict", "--site-dir", name),
            cwd=project.root,
            env=project.environment(),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        for name in ("one", "two")
    ]
    errors = [process.communicate(timeout=300)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors
    assert digest(project.root / "one") == digest(project.root / "two")
