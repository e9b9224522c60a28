"""内容安全策略（CSP）：每一页的 <head> 里一条，浏览器据此拒绝别处的脚本、请求与没有登记的内联脚本。

GitHub Pages 不能设响应头，所以写成 `<meta>`。内联脚本只有主题模板里的几段，按散列登记；散列由模板算出，不由页面算出，
所以页面里多出来的脚本不会被登记。样式属性放行：公式的排布、图的颜色、表格的对齐都写在 style 里；样式只能改样子，
不能运行脚本，要取的图也只限本站。
"""

import base64
import hashlib
import re

from selectolax.lexbor import LexborHTMLParser

from .errors import KbsiteError

DATA = ("application/json", "application/ld+json")  # 数据块不执行，不归脚本管


def inline_scripts(html: str) -> list[str]:
    """会执行的内联脚本。"""
    return [
        node.text()
        for node in LexborHTMLParser(html).css("script")
        if "src" not in node.attributes and node.attributes.get("type") not in DATA
    ]


def policy(templates: str, extra: list[str], *, offline: bool) -> str:
    """策略的文本：`templates` 是主题里带内联脚本的那几段模板，`extra` 是另外登记的脚本。

    从 file:// 打开时，有的浏览器不把旁边的文件算作 'self'，所以离线版写明 file:。
    """
    hashes = " ".join(f"'{_hash(script)}'" for script in [*inline_scripts(templates), *extra])
    site = "'self' file:" if offline else "'self'"
    return "; ".join(
        (
            "default-src 'none'",
            f"script-src {site} {hashes}",
            f"style-src {site} 'unsafe-inline'",  # 不认后两条的旧浏览器用这一条
            f"style-src-elem {site}",
            "style-src-attr 'unsafe-inline'",
            f"img-src {site} data:",  # 主题的图标是样式表里的 data:
            f"font-src {site} data:",
            f"connect-src {site}",
            f"worker-src {site}",
            f"manifest-src {site}",
            "base-uri 'none'",
            "form-action 'none'",
        )
    )


def check(html: str, name: str) -> None:
    """每一段内联脚本都登记过；主题升级后多出来的，在这里停下，而不是到读者那里才失灵。"""
    found = re.search(r'<meta http-equiv="Content-Security-Policy" content="([^"]*)"', html)
    if not found:
        raise KbsiteError(f"{name}: 没有 Content-Security-Policy。模板要继承 overrides/main.html。")
    for script in inline_scripts(html):
        if _hash(script) not in found[1]:
            raise KbsiteError(
                f"{name}: 内联脚本 {script.strip()[:60]!r} 没有登记。主题的新脚本加进 overrides/main.html 的 site_meta。"
            )


def offline_worker(source: str) -> tuple[str, str]:
    """iframe-worker 改一处，返回改过的源码与它要写进 iframe 的内联脚本。

    原来那段脚本里有 worker 的地址，随读者把文件夹放在哪里而变，没有散列可登记。
    """
    functions = re.findall(r"function [cd]\(.*?(?=function d|var o=)", source)
    written = re.search(r"<script>(postMessage=\$\{c\};importScripts=\$\{d\};.*?)<\\/script>", source)
    if len(functions) != 2 or not written or written[1].count('"${e}"') != 1:
        raise KbsiteError("node_modules/iframe-worker 变了样：改 kbsite/policy.py 的 offline_worker。")
    fixed = written[1].replace('"${e}"', '""')
    script = fixed.replace("${c}", functions[0]).replace("${d}", functions[1])
    return source.replace(written[1], fixed), script


def _hash(script: str) -> str:
    return f"sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}"
