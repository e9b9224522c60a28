"""写页面的人会看到的错误。消息依次说：在哪里、是什么、怎么办。"""

import errno

DISK = {
    errno.ENOSPC: "磁盘满了",
    errno.EDQUOT: "磁盘配额用完了",
    errno.EFBIG: "文件超过了允许的大小",
    errno.EROFS: "在只读的文件系统上",
    errno.EACCES: "没有权限",
    errno.EPERM: "没有权限",
    errno.ENOTDIR: "路径上有一个不是文件夹",
    errno.EEXIST: "要建文件夹的地方有一个文件",
    errno.EISDIR: "要写文件的地方有一个文件夹",
    errno.EIO: "磁盘读写出错",
}


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


class MathEngineError(MathRenderError):
    """排公式的进程死了或没有回答：不是这个公式的错，别的公式也排不了。"""


def disk_message(error: OSError) -> str:
    """写不了文件时给人看的消息；不是这一类错误就是空串。"""
    fact = DISK.get(error.errno)
    return f"{error.filename or '写文件'}: {fact}。处理之后再运行一次。" if fact else ""
