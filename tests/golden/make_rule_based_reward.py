r"""生成 rule_based_reward.json：verl 的三个打分器在带标签的小集合与几条回答上的结果。

参数是已有的 verl 源码目录；三个打分器都只用标准库，按文件加载：

    python tests/golden/make_rule_based_reward.py --verl 目录 --commit 提交
"""

import argparse
import importlib.util
import json
from pathlib import Path

from library import functions_of

ROOT = Path(__file__).parents[2]
RESPONSES = [
    r"\boxed{12}",
    r"\boxed{13} 然后 \boxed{12}",
    r"\boxed{\frac{1}{2}}",
    r"\boxed{12",
    r"\boxed{\{1,2\}}",
    "没有框",
    "#### 12",
    "#### 1,234",
    "先得 7，最后是 12 个",
    "Answer: 12",
    "Answer: 12 km",
]


def load_file(path: Path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--verl", type=Path, required=True)
    parser.add_argument("--commit", required=True)
    args = parser.parse_args()
    folder = args.verl / "verl/utils/reward_score"
    math_reward, math_dapo, gsm8k = (
        load_file(folder / f"{n}.py") for n in ("math_reward", "math_dapo", "gsm8k")
    )
    notebook = ROOT / "notebooks/reasoning/rule_based_reward.py"  # 只取一个常量，不执行笔记本
    pairs = [list(pair) for pair in functions_of(notebook, {"LABELLED_PAIRS"})["LABELLED_PAIRS"]]
    golden = {
        "versions": {"verl": args.commit},
        "pairs": pairs,
        "math_reward": [math_reward.is_equiv(a, g) for a, g, _ in pairs],
        "math_dapo": [
            math_dapo.normalize_final_answer(a) == math_dapo.normalize_final_answer(g) for a, g, _ in pairs
        ],
        "responses": RESPONSES,
        "last_boxed": [math_dapo.last_boxed_only_string(text) for text in RESPONSES],
        "math_dapo_score": [math_dapo.compute_score(text, "12")["score"] for text in RESPONSES],
        "gsm8k_strict": [gsm8k.extract_solution(text) for text in RESPONSES],
        "gsm8k_flexible": [gsm8k.extract_solution(text, method="flexible") for text in RESPONSES],
    }
    target = Path(__file__).with_suffix("").with_name("rule_based_reward.json")
    target.write_text(json.dumps(golden, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
