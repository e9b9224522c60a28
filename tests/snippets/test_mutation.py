"""bench/mutation_equivalents.tsv 的测试：每条的原行还在它的模块里，代码改了表就得跟着改。

改动是否真的等价、是否还抓不住，由 make mutation 逐条核对。
"""

import csv
from pathlib import Path

ROOT = Path(__file__).parents[2]
TABLE = ROOT / "bench" / "mutation_equivalents.tsv"


def test_every_equivalent_mutant_names_a_line_that_is_still_there():
    lines = TABLE.read_text(encoding="utf-8").splitlines()
    rows = [row for row in csv.reader(lines, delimiter="\t", quoting=csv.QUOTE_NONE) if row[0][0] != "#"]
    wrong = []
    for row in rows:
        module, old, new, reason = row
        path = ROOT / f"snippets/{module}.py"
        source = (
            {line.strip() for line in path.read_text(encoding="utf-8").splitlines()}
            if path.is_file()
            else set()
        )
        # 一处改动跨几行时，各行以「; 」相连
        gone = old not in source and not {*old.split("; ")} <= source
        if gone or old == new or not reason.strip():
            wrong.append(row)
    assert rows and not wrong
    assert len({tuple(row[:3]) for row in rows}) == len(rows)
