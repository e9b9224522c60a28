"""一条发现，与全部规则的编号。编号给出就不再改；说明与例子在 docs/about/style.md。"""

from dataclasses import dataclass

RULES = {
    "KB101": "一页一个问题",
    "KB102": "元数据",
    "KB103": "顺序",
    "KB104": "深度",
    "KB105": "没有写完的标记",
    "KB106": "页面在导航里",
    "KB107": "站内链接",
    "KB201": "数字有出处",
    "KB202": "单元断言结论",
    "KB203": "图有图注",
    "KB204": "有争议就写争议",
    "KB205": "来源的写法",
    "KB301": "一段一行",
    "KB302": "空格与标点",
    "KB303": "公式",
    "KB304": "术语与符号",
    "KB401": "嵌入单元",
    "KB402": "嵌入代码",
    "KB403": "标签",
    "KB501": "编码与空白",
    "KB502": "文件",
}


@dataclass(frozen=True, order=True)
class Edit:
    """`--fix` 的一处改动：把 `start` 到 `end` 换成 `text`。"""

    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Finding:
    """一处不合规则：在哪里、是什么、怎么办；`edits` 是可以放心自动改的改法，没有就要人来改。"""

    path: str
    line: int
    rule: str
    fact: str
    cure: str
    edits: tuple[Edit, ...] = ()

    def __str__(self) -> str:
        return f"{self.path}:{self.line}: {self.rule}: {self.fact}。{self.cure}。"

    def annotation(self) -> str:
        """GitHub Actions 的工作流命令：在拉取请求的那一行上显示。"""
        place = f"file={_property(self.path)},line={self.line},title={self.rule}%3A {RULES[self.rule]}"
        return f"::error {place}::{_data(f'{self.fact}。{self.cure}。')}"


def _data(text: str) -> str:
    return text.replace("%", "%25").replace("\r", "%0D").replace("\n", "%0A")


def _property(text: str) -> str:
    return _data(text).replace(":", "%3A").replace(",", "%2C")
