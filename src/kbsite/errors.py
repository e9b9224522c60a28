"""写页面的人会看到的错误。消息依次说：在哪里、是什么、怎么办。"""


class KbsiteError(Exception):
    """构建不能继续；消息直接给写页面的人看，不带 Python 回溯。"""


class NotebookSourceError(KbsiteError):
    """笔记文件本身写得不对：选项、标签、格式。"""


class NotebookRunError(KbsiteError):
    """笔记执行失败：异常、超时、内核死亡。"""


class FragmentError(KbsiteError):
    """单元的输出不能嵌入页面。"""


class CellNotFoundError(KbsiteError):
    """页面嵌入了不存在的单元。"""


class MathRenderError(KbsiteError):
    """公式排不出来。"""
