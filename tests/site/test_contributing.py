"""给贡献者的东西：表单合 schema，CONTRIBUTING.md 里的链接、命令、消息都是真的。"""

import re
import subprocess
import sys

import pytest
import yaml
from sitetools import ROOT

FORMS = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml"))
CONFIG = ROOT / ".github/ISSUE_TEMPLATE/config.yml"
GUIDE = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
# 每个新仓库自带的标签；别的标签不会自动建，表单写了也加不上
DEFAULT_LABELS = {"bug", "documentation", "enhancement", "question"}


def schema_errors(kind, *paths):
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", f"vendor.github-issue-{kind}"]
    result = subprocess.run([*command, *map(str, paths)], capture_output=True, text=True)
    return result.stdout if result.returncode else ""


def test_there_is_a_form_for_each_kind_of_report():
    assert [path.stem for path in FORMS] == ["missing-question", "site-fault", "wrong-statement"]


def test_forms_match_the_schema():
    assert schema_errors("forms", *FORMS) == "" and schema_errors("config", CONFIG) == ""


def test_the_schema_refuses_a_form_without_a_label(tmp_path):
    broken = tmp_path / "form.yml"
    broken.write_text(FORMS[0].read_text(encoding="utf-8").replace("label: 题目", "lable: 题目"))
    assert schema_errors("forms", broken) != ""


@pytest.mark.parametrize("path", FORMS, ids=lambda path: path.stem)
def test_forms_ask_for_something_and_use_labels_that_exist(path):
    form = yaml.safe_load(path.read_text(encoding="utf-8"))
    ids = [field["id"] for field in form["body"] if field["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and set(form["labels"]) <= DEFAULT_LABELS
    assert any(field.get("validations", {}).get("required") for field in form["body"])


def test_links_of_the_guide_lead_to_files_and_headings():
    links = re.findall(r"\]\(([^)]+)\)", GUIDE)
    headings = {re.sub(r"[^\w-]", "", row) for row in re.findall(r"^#+ (.+)$", GUIDE, re.M)}
    assert len(links) > 4
    assert [link for link in links if not link.startswith("#") and not (ROOT / link).is_file()] == []
    assert [link for link in links if link.startswith("#") and link[1:] not in headings] == []


def test_commands_of_the_guide_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M))
    named = set(re.findall(r"make ([a-z][a-z-]+)", GUIDE))
    assert {"serve", "new-page", "check", "test"} <= named <= targets


def test_messages_of_the_guide_are_the_ones_the_build_prints():
    table = GUIDE.partition("## 检查红了")[2].partition("\n## ")[0]
    cells = [row.split("|")[1] for row in table.splitlines() if row.startswith("| ")][2:]
    ours = [text for cell in cells for text in re.findall(r"`([^`]+)`", cell) if re.search(r"[一-鿿]|yml|txt", text)]  # fmt: skip
    source = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "src/kbsite").rglob("*.*") if path.suffix in (".py", ".md"))  # fmt: skip
    assert len(ours) >= 6
    assert [text for text in ours if "行 [标签]" not in text and text not in source] == []


def test_pull_requests_run_what_they_reach_and_main_runs_everything():
    workflow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8"))
    assert workflow[True]["push"] == {"branches": ["main"]} and "pull_request" in workflow[True]
    steps = [step for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    runs = {step["run"].removeprefix(".github/no-network.sh "): step.get("if") for step in steps}
    commands = list(runs)
    assert commands.index("make check") < commands.index("make build") < commands.index("make test")
    assert runs["make check"] is runs["make build"] is None
    assert runs["make test"] == "github.event_name != 'pull_request'"
    assert runs["make test BASE=HEAD^1"] == "github.event_name == 'pull_request'"
