"""GitHub 工作流：schema 合法、zizmor 没有发现、动作都钉在完整的提交散列上、权限最小。"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from sitetools import ROOT

WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))


def run(*args):
    return subprocess.run([sys.executable, "-m", *args], cwd=ROOT, capture_output=True, text=True)


def test_these_are_all_the_workflows():
    assert [path.stem for path in WORKFLOWS] == ["check", "deploy", "generators", "mutation"]


def test_workflows_match_the_schema():
    result = run("check_jsonschema", "--builtin-schema", "vendor.github-workflows", *map(str, WORKFLOWS))
    assert result.returncode == 0, result.stdout
    result = run("check_jsonschema", "--builtin-schema", "vendor.dependabot", ".github/dependabot.yml")
    assert result.returncode == 0, result.stdout


def test_zizmor_finds_nothing():
    command = [
        Path(sys.executable).with_name("zizmor"),
        "--offline",
        "--persona=pedantic",
        ".github",
    ]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.stem)
def test_actions_are_pinned_by_full_commit_hash(path):
    uses = re.findall(r"uses: (\S+)", path.read_text(encoding="utf-8"))
    assert uses and all(re.fullmatch(r"[\w/-]+@[0-9a-f]{40}", name) for name in uses), uses


def test_check_runs_foreign_code_without_secrets_or_write_access():
    text = (ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text and "pull_request_target" not in workflow[True]  # YAML 把 on 读成 True
    assert "persist-credentials: false" in text
    assert "id-token" not in text and "write" not in workflow["jobs"]["test"].get("permissions", {}).values()


def test_check_has_no_network_after_installation():
    """提交者的代码只在两种步骤里执行：安装（Makefile），与断了网的。"""
    workflow = yaml.safe_load((ROOT / ".github/workflows/check.yml").read_text(encoding="utf-8"))
    commands = [step["run"] for step in workflow["jobs"]["test"]["steps"] if "run" in step]
    makes = [line for command in commands for line in command.splitlines() if "make " in line]
    assert makes[0] == "make install"
    assert len(makes) > 1 and all(line.startswith(".github/no-network.sh ") for line in makes[1:])
    assert os.access(ROOT / ".github/no-network.sh", os.X_OK)


def test_deployment_builds_the_archive_first_and_publishes_it():
    workflow = yaml.safe_load((ROOT / ".github/workflows/deploy.yml").read_text(encoding="utf-8"))
    steps = [step for step in workflow["jobs"]["build"]["steps"] if "run" in step]
    assert [step["run"] for step in steps] == ["make zip", "make build"]
    name = re.search(r"^ZIP := (\S+)$", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)[1]
    assert steps[1]["env"]["OFFLINE_ZIP"] == name
    # 地址只给网站：离线版没有「编辑此页」，也没有别处的链接
    assert "env" not in steps[0]
