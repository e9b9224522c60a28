"""变异测试：逐处改坏参考实现，看它的测试抓不抓得住；列出漏网的改动。

用法：make mutation（全部）；make mutation ARGS="architecture training/adamw"（一个章节、一个模块）。
与原式等价、因而抓不住的改动写在 bench/mutation_equivalents.tsv，每条说明理由；不在表里的漏网改动使命令失败。
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]
EQUIVALENTS = Path(__file__).with_name("mutation_equivalents.tsv")
ALIVE = ("survived", "no tests", "suspicious")  # 超时是死循环，算抓住了


def modules(selected: list[str]) -> list[Path]:
    """有测试的参考实现；`selected` 是章节或 `章节/模块`，空的表示全部。"""
    found = []
    for test in sorted((ROOT / "tests/snippets").glob("*/test_*.py")):
        module = Path(test.parent.name) / test.stem.removeprefix("test_")
        if (ROOT / f"snippets/{module}.py").is_file() and (
            not selected or {str(module), module.parts[0]} & set(selected)
        ):
            found.append(module)
    return found


def mutate(module: Path, folder: Path, jobs: int) -> tuple[int, list[tuple[str, str, str]]]:
    """在 `folder` 里改坏一个模块；返回改动总数与漏网的（状态、原行、新行）。"""
    for name in ("snippets", "notebooks", "tests/golden"):
        shutil.copytree(ROOT / name, folder / name)
    tests = folder / "tests/snippets" / module.parent
    tests.mkdir(parents=True)
    for path in (ROOT / "tests/snippets").glob("*.py"):
        if not path.name.startswith("test_"):
            shutil.copy(path, folder / "tests/snippets")
    shutil.copy(ROOT / f"tests/snippets/{module.parent}/test_{module.name}.py", tests)
    shutil.copy(Path(__file__).with_name("mutation_conftest.py"), folder / "tests/conftest.py")
    settings = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    settings = settings.replace(" --jaxtyping-packages=snippets,beartype.beartype", "")
    settings += f'\n[tool.mutmut]\nsource_paths = ["snippets"]\nonly_mutate = ["snippets/{module}.py"]\n'
    # 超过平时的 5 倍又 10 秒就算死循环（默认 15 倍）；起了几个进程的测试一卡就是几十秒
    settings += (
        'also_copy = ["snippets", "notebooks", "tests"]\ntimeout_multiplier = 5.0\ntimeout_constant = 2.0\n'
    )
    (folder / "pyproject.toml").write_text(settings, encoding="utf-8")

    result = run(folder, "run", "--max-children", str(jobs))
    if result.returncode:
        raise SystemExit(f"{module}：没有改动时测试就不过，或 mutmut 出错。\n{result.stdout[-3000:]}")
    rows = re.findall(r"^\s*(\S+): (.+)$", run(folder, "results", "--all", "true").stdout, re.M)
    alive = []
    for name, status in rows:
        if status in ALIVE:
            diff = run(folder, "show", name).stdout
            old = "; ".join(row[1:].strip() for row in diff.splitlines() if re.match(r"-(?!--)", row))
            new = "; ".join(row[1:].strip() for row in diff.splitlines() if re.match(r"\+(?!\+\+)", row))
            if not same_meaning(old, new):
                alive.append((status, old, new))
    return len(rows), alive


def same_meaning(old: str, new: str) -> bool:
    """只换了不影响结果的写法：中文消息、大小写无关的字符串、等于 False 的 None、zip 的 strict、放在哪个设备上。"""

    def normal(text: str) -> str:
        text = re.sub(r"\"[^\"]*[\u4e00-\u9fff][^\"]*\"", '""', text)
        text = re.sub(r"(float|einsum)\(\"[^\"]*\"", lambda match: match[0].lower(), text)
        text = re.sub(r"\.(decode|encode)\((?:\"utf-8\")?(, |\))", r".\1(\2", text, flags=re.I)
        text = re.sub(r"device=[\w.]+", "", text.replace("bias=None", "bias=False"))
        return re.sub(r",\s*(strict=\w+)?\s*\)", ")", text)

    return normal(old) == normal(new)


def equivalents() -> dict[tuple[str, str, str], str]:
    """等价表：（模块，原行，改后）到理由。"""
    rows = {}
    for number, line in enumerate(EQUIVALENTS.read_text(encoding="utf-8").splitlines(), start=1):
        if line.startswith("#"):
            continue
        *key, reason = line.split("\t")
        if len(key) != 3 or tuple(key) in rows:
            raise SystemExit(f"{EQUIVALENTS.name}:{number}: 不是四列，或与前面的一条重复。改正或删去这一行。")
        rows[tuple(key)] = reason
    return rows


def run(folder: Path, *command: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "-W", "ignore", "-m", "mutmut", *command],
        cwd=folder,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "TMPDIR": str(folder),
        },  # 失败的子进程留下的文件随文件夹删去
        capture_output=True,
        text=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("selected", nargs="*", help="章节或 章节/模块")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="同时试几处改动，默认按核数")
    args = parser.parse_args()
    chosen = modules(args.selected)
    if not chosen:
        raise SystemExit("没有选中任何模块；写章节名（architecture）或 章节/模块（rl/clip）。")
    known = {*equivalents()}
    seen, failed = set(), 0
    for module in chosen:
        with tempfile.TemporaryDirectory() as folder:
            total, alive = mutate(module, Path(folder), args.jobs)
        rows = [(str(module), old, new) for _, old, new in alive]
        seen |= {*rows}
        bad = [row for row in rows if row not in known]
        failed += len(bad)
        print(f"{module}：改动 {total}，等价 {len(rows) - len(bad)}，漏网 {len(bad)}", flush=True)
        for _, old, new in bad:
            print(f"  - {old}\n  + {new}", flush=True)
    stale = [row for row in known - seen if row[0] in {str(module) for module in chosen}]
    for module, old, new in stale:
        print(f"{EQUIVALENTS.name} 里多余的一条（代码变了，或测试已能抓住）：{module}\n  - {old}\n  + {new}")
    sys.exit(bool(failed or stale))


if __name__ == "__main__":
    main()
