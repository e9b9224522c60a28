"""读 py:percent 笔记：行号、选项与写错时的消息。真值是测试里写下的文件本身。"""

import pytest

from kbsite.errors import NotebookSourceError
from kbsite.notebooks.source import read_all, read_notebook, topic_key


def read(project, body, **kwargs):
    path = project.notebook("rl/dr_grpo", body, **kwargs)
    return read_notebook(path, project.root / "notebooks")


def test_file_name_gives_the_topic_key(tmp_path):
    assert topic_key(tmp_path / "rl" / "dr_grpo.py", tmp_path) == "rl/dr-grpo"


def test_cells_carry_options_and_their_line_in_the_file(project):
    notebook = read(
        project,
        """
        # %% [markdown]
        # # 标题

        # %%
        #| label: kl-bias
        #| caption: 偏差：k2 偏高
        #| echo: show
        x = 1
        """,
    )
    markdown, code = notebook.cells
    assert (markdown.kind, markdown.source) == ("markdown", "# 标题")
    assert (code.label, code.caption, code.echo) == ("kl-bias", "偏差：k2 偏高", "show")
    assert code.code == "x = 1"
    lines = notebook.path.read_text(encoding="utf-8").splitlines()
    assert lines[code.line - 1] == "#| label: kl-bias"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("# %%\n#| label: a\nx = 1\n\n# %%\n#| label: a\ny = 2\n", "标签 'a' 在第 15 行已经用过"),
        ("# %%\n#| label: Not_Kebab\nx = 1\n", "标签 'Not_Kebab' 不合规"),
        ("# %%\n#| lable: a\nx = 1\n", "读不懂选项行"),
        ("# %%\n#| echo: maybe\nx = 1\n", "echo 不能是 'maybe'"),
        ('# %% label="a"\nx = 1\n', "标签写成单元第一行"),
        ("x = 1\n\n# %%\ny = 2\n", "第一个 `# %%` 之前有内容"),
    ],
)
def test_mistakes_are_reported_with_file_line_and_cure(project, body, message):
    with pytest.raises(NotebookSourceError, match=r"notebooks/rl/dr_grpo\.py:\d+: ") as caught:
        read(project, body)
    assert message in str(caught.value)


def test_unknown_header_key_is_refused(project):
    header = "# ---\n# jupyter:\n#   kb:\n#     timout: 3\n#   kernelspec:\n#     display_name: Python 3\n#     language: python\n#     name: python3\n# ---\n\n"  # fmt: skip
    with pytest.raises(NotebookSourceError, match="timout"):
        read(project, "# %%\nx = 1\n", header=header)


def test_non_utf8_file_is_refused_with_its_name(project):
    path = project.root / "notebooks/rl/gbk.py"
    path.parent.mkdir()
    path.write_bytes("# %%\n# 中文".encode("gbk"))
    with pytest.raises(NotebookSourceError, match="gbk.py:1: 不是 UTF-8"):
        read_all(project.root / "notebooks")


def test_bom_and_crlf_are_read_like_plain_files(project):
    path = project.notebook("rl/plain", "# %%\n#| label: a\nx = 1\n")
    twin = path.with_name("windows.py")
    twin.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    plain, windows = read_all(project.root / "notebooks")
    assert plain.cells == windows.cells
