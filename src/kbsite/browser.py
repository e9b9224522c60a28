"""测试与基准用的浏览器：用系统里找到的 Chrome/Chromium，没有就装 Debian 的 chromium。"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

from .errors import KbsiteError

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
PLACES = ("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome", "/Applications/Chromium.app/Contents/MacOS/Chromium")  # fmt: skip


def find_chromium() -> str | None:
    """环境变量 CHROMIUM 指的、PATH 里的、或 macOS 常见位置的浏览器。"""
    named = os.environ.get("CHROMIUM")
    if named:
        return named if shutil.which(named) else None
    for name in NAMES:
        if path := shutil.which(name):
            return path
    return next((place for place in PLACES if Path(place).exists()), None)


def ensure_chromium() -> str:
    """浏览器的路径；没有就用 apt-get 装；装不了就报错，不跳过测试。"""
    if path := find_chromium():
        return path
    if os.environ.get("CHROMIUM"):
        raise KbsiteError(f"CHROMIUM={os.environ['CHROMIUM']} 不能执行。改成浏览器的路径，或去掉这个变量。")
    apt = shutil.which("apt-get")
    prefix = [] if os.geteuid() == 0 else ["sudo", "-n"] if shutil.which("sudo") else None
    if apt and prefix is not None:
        print("没有找到 Chrome/Chromium，安装 Debian 的 chromium…", file=sys.stderr)
        environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
        for step in (["update", "-qq"], ["install", "-y", "-qq", "--no-install-recommends", "chromium"]):
            subprocess.run([*prefix, apt, *step], env=environment, stdout=subprocess.DEVNULL, check=False)
        if path := find_chromium():
            return path
    raise KbsiteError(
        "真实浏览器的测试需要 Chrome 或 Chromium，没有找到，也装不上。"
        "请自己装一个（Debian/Ubuntu：apt-get install chromium），或用环境变量 CHROMIUM 指出它的路径。"
    )
