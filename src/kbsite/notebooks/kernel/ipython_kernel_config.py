# 执行笔记的内核的配置；改动它会让所有笔记重新执行。
c = get_config()  # noqa: F821
c.HistoryManager.enabled = False
c.InlineBackend.figure_formats = {"svg"}
c.InlineBackend.rc = {}
# 不裁边：各图同宽；不写日期与软件版本：两次构建逐字节相同
c.InlineBackend.print_figure_kwargs = {"bbox_inches": None, "metadata": {"Date": None, "Creator": None}}
