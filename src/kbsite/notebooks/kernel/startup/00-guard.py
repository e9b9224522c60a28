"""内核启动时执行：笔记只能往自己的临时文件夹写；画图能用中文字体。

拦的是本进程 Python 层的打开、改名、删除、建目录；C 代码自己开的文件与子进程拦不住（见 docs/about/build.md）。
"""


def _guard():
    import os
    import sys

    allowed = tuple(
        os.path.realpath(path) + os.sep for path in os.environ["KBSITE_WRITABLE"].split(os.pathsep)
    )
    harmless = {os.devnull, "/dev/tty"}

    def check(path):
        if isinstance(path, int) or path is None:
            return
        real = os.path.realpath(os.fsdecode(path))
        if real not in harmless and not (real + os.sep).startswith(allowed):
            raise PermissionError(f"笔记不能写自己文件夹以外的文件：{real}。改为写当前目录下的相对路径。")

    def hook(event, args):
        if event == "open":
            path, mode, flags = args
            if (mode and set(mode) & set("wax+")) or (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                check(path)
        elif event in ("os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.chmod", "shutil.rmtree"):
            check(args[0])
        elif event in ("os.rename", "os.link", "os.symlink", "shutil.copyfile", "shutil.move"):
            check(args[0] if event == "os.rename" else args[1])
            check(args[1])

    def fonts():
        # 只找路径，不导入 mplfonts：它的导入有副作用
        import importlib.util

        from matplotlib import font_manager

        package = importlib.util.find_spec("mplfonts").submodule_search_locations[0]
        font_manager.fontManager.addfont(os.path.join(package, "fonts", "NotoSansCJKsc-Regular.otf"))

    fonts()
    sys.addaudithook(hook)


_guard()
del _guard
