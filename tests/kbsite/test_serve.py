"""`mkdocs serve`：改一页、改一份参考实现，几秒后看到的就是新的，公式都排好了。"""

import re

from smallsite import serving, wait_for


def test_edits_to_page_and_snippet_show_up_typeset(project):
    project.write("snippets/value.py", "X = 'before'\n")
    project.notebook(
        "rl/demo", "# %%\n#| label: result\n#| echo: hide\nfrom snippets.value import X\nprint(X)\n"
    )
    page = project.write("docs/rl/demo.md", '# 演示\n\n公式 $a_1$。\n\n--8<-- "rl/demo/result.md"\n')
    project.nav("index.md", "rl/demo.md")
    with serving(project) as url:
        assert 'data-tex="a_1"' in wait_for(f"{url}rl/demo/", "before")
        page.write_text(page.read_text(encoding="utf-8").replace("$a_1$", "$b_2$ 与 $c_3$"), encoding="utf-8")
        html = wait_for(f"{url}rl/demo/", 'data-tex="c_3"')
        assert 'data-tex="b_2"' in html and not re.search(r"arithmatex|\\\(", html)
        project.write("snippets/value.py", "X = 'after'\n")
        wait_for(f"{url}rl/demo/", "after")
