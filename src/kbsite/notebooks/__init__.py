"""笔记：读 py:percent，按缓存键执行，把带标签的单元写成 Markdown 片段。"""
