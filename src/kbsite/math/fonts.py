"""把数学字体裁成只含用到的字形：正文字体从 94 KB 变成十几 KB。"""

import base64
import hashlib
import io
import re
from pathlib import Path

from fontTools import subset as fonttools
from fontTools.ttLib import TTFont

from ..notebooks.cache import read_entry, write_entry

SMALL = 1000  # 字节；更小的（零宽、断行用的字体）不裁


def subset(font: bytes, characters: set[str], cache_dir: Path) -> bytes:
    """只留 `characters` 的 woff2；结果按内容缓存。"""
    if len(font) < SMALL:
        return font
    text = "".join(sorted(characters))
    key = hashlib.sha256(font + text.encode("utf-8", "surrogatepass")).hexdigest()[:24]
    if cached := read_entry(cache_dir / key):
        return cached
    options = fonttools.Options(flavor="woff2", layout_features=[], notdef_outline=True)
    options.drop_tables += ["ltag"]
    face = TTFont(io.BytesIO(font), recalcTimestamp=False)
    cutter = fonttools.Subsetter(options)
    cutter.populate(text=text)
    cutter.subset(face)
    face.flavor = "woff2"
    out = io.BytesIO()
    face.save(out)
    write_entry(cache_dir / key, out.getvalue())
    return out.getvalue()


def embed(css: str, fonts: dict[str, bytes]) -> str:
    """把字体写进样式表：从 file:// 打开时，有的浏览器不肯读旁边的字体文件。"""
    return re.sub(
        r"url\(\"fonts/([\w-]+\.woff2)\"\)",
        lambda match: f"url(data:font/woff2;base64,{base64.b64encode(fonts[match[1]]).decode()})",
        css,
    )
