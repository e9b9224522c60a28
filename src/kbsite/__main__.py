"""命令行：`python -m kbsite --help`。"""

import argparse
import logging
import os
import shutil
import sys
from pathlib import Path

from . import archive, cards, changes, new_page, questions, topics, urls
from . import check as checks
from .errors import KbsiteError, disk_message
from .project import Project, build_notebooks, take_turn


def main(argv: list[str] | None = None) -> int:
    """运行一个子命令；出错返回 1，消息写到标准错误。"""
    parser = argparse.ArgumentParser(prog="python -m kbsite", description="面经 2025 的建站工具")
    parser.add_argument("--root", type=Path, default=Path.cwd(), help="项目根（默认当前目录）")
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="执行笔记（缓存里没有的），写出片段")
    run.add_argument("key", nargs="?", help="只执行一份，如 rl/clip")
    page = commands.add_parser("new-page", help="新建一页：页面、笔记、参考实现、测试与导航")
    page.add_argument("key", help="专题键，如 rl/gspo")
    page.add_argument("title", help="一级标题，如「中文（English, 缩写）」")
    lint = commands.add_parser("check", help="按 docs/about/style.md 检查页面、笔记与测试，不建站")
    lint.add_argument("paths", nargs="*", help="只报这些文件或文件夹里的")
    lint.add_argument("--fix", action="store_true", help="改掉空格、标点、换行一类能放心自动改的")
    commands.add_parser("topics", help="列出笔记中还没有页面的标题")
    commands.add_parser("cards", help="写出 Anki 牌组 cards.apkg；有 SITE_URL 时牌上带链接")
    commands.add_parser("browser", help="找到（没有就装上）测试用的 Chromium，打印路径")
    pack = commands.add_parser("zip", help="把建好的离线版打成一个 zip")
    pack.add_argument("site", type=Path)
    pack.add_argument("target", type=Path)
    commands.add_parser("urls", help="把最近一次构建的新地址并进 published.txt")
    tests = commands.add_parser("affected", help="列出改动碰得到的测试")
    tests.add_argument("base", help="与哪个提交比，如 main")
    diff = commands.add_parser("summary", help="两个建好的项目之间的差别，写成 Markdown")
    diff.add_argument("before", type=Path)
    diff.add_argument("after", type=Path)
    commands.add_parser("clean", help="删去全部缓存")
    args = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("traitlets").setLevel(logging.WARNING)
    project = Project(args.root.resolve())
    try:
        return COMMANDS[args.command](project, args)
    except KbsiteError as error:
        print(error, file=sys.stderr)
        return 1
    except OSError as error:
        if not (message := disk_message(error)):
            raise
        print(message, file=sys.stderr)
        return 1


def _run(project: Project, args: argparse.Namespace) -> int:
    os.chdir(project.root)
    with take_turn(project):
        build_notebooks(project, only=args.key)
    return 0


def _new_page(project: Project, args: argparse.Namespace) -> int:
    for path in new_page.create(project.root, args.key, args.title):
        print(path.relative_to(project.root))
    print("每个【待写：…】说明那里该写什么；写完一处删一处，make check 会指出剩下的。")
    print("导航里的次序、目录里的短名（mkdocs.yml、docs/index.md 与本节的 index.md）照邻近的改好。")
    return 0


def _check(project: Project, args: argparse.Namespace) -> int:
    paths = [checks.relative(path, project.root) for path in args.paths]
    if args.fix:
        for name in checks.fix(project.root, paths):
            print(f"改了 {name}")
    report = checks.check(project.root, paths)
    github = os.environ.get("GITHUB_ACTIONS") == "true"
    for finding in report.findings:
        print(finding.annotation() if github else finding)
    print(report.summary())
    return 1 if report.findings else 0


def _topics(project: Project, args: argparse.Namespace) -> int:
    headings = topics.read_headings(project.root / "topics.yml")
    missing = topics.unwritten(headings, project.root / "docs")
    for key in missing:
        print(f"{key:40} {'；'.join(topics.headings_of(headings, key))}")
    print(f"笔记 {len(headings)} 个标题；还没有页面的专题 {len(missing)} 个。")
    return 0


def _cards(project: Project, args: argparse.Namespace) -> int:
    config = project.root / "mkdocs.yml"
    if not config.is_file():
        raise KbsiteError(f"{config} 不存在：要在项目根运行，或用 --root 指定。")
    headings = topics.read_headings(project.root / "topics.yml")
    found = questions.read_questions(questions.read_nav(config), project.root / "docs", headings)
    if not found:
        raise KbsiteError(f"{config}: 导航里没有一页的 front matter 有 answer，做不出牌。")
    url = os.environ.get("SITE_URL", "")
    file = project.root / "cards.apkg"
    file.write_bytes(cards.package(found, url, cards.modified_time()))
    link = f"链接指向 {url}" if url else "没有 SITE_URL，牌上不带链接"
    print(f"写出 {file}：{len(found)} 张牌；{link}。在 Anki 里用「文件 → 导入」打开它。")
    return 0


def _browser(project: Project, args: argparse.Namespace) -> int:
    from .browser import ensure_chromium

    print(ensure_chromium())
    return 0


def _zip(project: Project, args: argparse.Namespace) -> int:
    archive.pack(args.site, args.target)
    print(f"{args.target}：{args.target.stat().st_size / 1e6:.1f} MB")
    return 0


def _urls(project: Project, args: argparse.Namespace) -> int:
    current = urls.read_published(project.cache / "urls.txt")
    if not current:
        raise KbsiteError(".cache/urls.txt: 还没有构建过，不知道有哪些地址。先运行 make build。")
    new = urls.update(project.root, current)
    print("\n".join([*new, f"{urls.PUBLISHED}：新加 {len(new)} 个地址。"]))
    return 0


def _affected(project: Project, args: argparse.Namespace) -> int:
    print("\n".join(changes.affected(project.root, args.base)))
    return 0


def _summary(project: Project, args: argparse.Namespace) -> int:
    print(changes.summary(args.before, args.after), end="")
    return 0


def _clean(project: Project, args: argparse.Namespace) -> int:
    shutil.rmtree(project.cache, ignore_errors=True)
    return 0


COMMANDS = {
    "run": _run,
    "new-page": _new_page,
    "check": _check,
    "topics": _topics,
    "cards": _cards,
    "browser": _browser,
    "zip": _zip,
    "urls": _urls,
    "affected": _affected,
    "summary": _summary,
    "clean": _clean,
}

if __name__ == "__main__":
    sys.exit(main())
