"""别名：由术语表（docs/about/terms.md）生成，查询里出现一种说法，就连别的说法一起找。"""

import re

from ..errors import KbsiteError

ROW = re.compile(r"^\|(.+)\|[ \t]*$", re.M)


def read_aliases(markdown: str) -> list[list[str]]:
    """术语表的前三列，一行一组；一行并列几个词（「在线、离线」）时，各列的第几个对第几个。"""
    groups = []
    for match in list(ROW.finditer(markdown))[2:]:
        columns = [_names(cell) for cell in match[1].split("|")[:3]]
        if len(columns) < 3:
            line = markdown.count("\n", 0, match.start()) + 1
            raise KbsiteError(f"docs/about/terms.md:{line}: 术语表的一行少于三列。空着的格写 —。")
        terms, english, others = columns
        if len(terms) == len(english) > 1:
            paired = columns if len(others) == len(terms) else columns[:2]
            groups += [list(names) for names in zip(*paired, strict=True)]
        else:
            groups.append(list(dict.fromkeys(terms + english + others)))
    return [group for group in groups if len(group) > 1]


def _names(cell: str) -> list[str]:
    """一格里的各个说法；括号里的是说明，不是说法。"""
    text = re.sub(r"（[^）]*）|\([^)]*\)|`", "", cell)
    return [name.strip() for name in re.split(r"、|, ", text) if name.strip() not in ("", "—")]
