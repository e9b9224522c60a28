"""MkDocs 的钩子：把各步接到构建上。只有这个文件知道 MkDocs；换生成器时只重写它。"""

import logging
import os
import posixpath
import subprocess
import sys
from html import escape
from pathlib import Path
from urllib.parse import urljoin

sys.path.insert(0, str(Path(__file__).parents[1]))

from mkdocs.exceptions import Abort, PluginError  # noqa: E402
from mkdocs.plugins import event_priority  # noqa: E402
from mkdocs.structure.files import File  # noqa: E402
from mkdocs.structure.toc import get_toc  # noqa: E402
from mkdocs.utils import get_relative_url  # noqa: E402

from kbsite import (  # noqa: E402
    archive,
    cards,
    front_matter,
    machine,
    pages,
    policy,
    publish,
    questions,
    safety,
    topics,
    urls,
    verification,
)
from kbsite.errors import KbsiteError, MathEngineError, MathRenderError, disk_message  # noqa: E402
from kbsite.math.fonts import embed  # noqa: E402
from kbsite.math.mathjax import MathJax  # noqa: E402
from kbsite.math.scan import formulas, replace  # noqa: E402
from kbsite.notebooks.cache import drop_damaged, seal, write_atomically  # noqa: E402
from kbsite.notebooks.fragments import figure_refs, replace_figures  # noqa: E402
from kbsite.project import Built, Project, build_notebooks, take_turn  # noqa: E402
from kbsite.search.aliases import read_aliases  # noqa: E402
from kbsite.search.build import build_index, install_worker  # noqa: E402
from kbsite.search.readable import readable  # noqa: E402
from kbsite.search.sections import SearchPage, cut  # noqa: E402
from kbsite.sources import check_sources  # noqa: E402

log = logging.getLogger("mkdocs.plugins.kbsite")

MATH_FOLDER = "assets/math"
CARDS = "interviews/cards.apkg"
OFFLINE_WORKER = "assets/javascripts/iframe-worker.js"

# 库的逐页日志会淹没我们自己的输出
for _name in ("mkdocs.plugins.mkdocs_jupyter", "mkdocs.mkdocs-jupyter"):
    logging.getLogger(_name).setLevel(logging.WARNING)


class _Build:
    """一次构建的状态；每次构建（含 serve 的重建）都是新的。"""

    def __init__(self, project: Project, built: Built, config):
        self.project = project
        self.finished = False
        self.archive = archive.published(os.environ, project.root)
        self.built = built
        self.notebooks = {result.notebook.key: result.notebook for result in built.executed}
        self.math = MathJax(project.node_modules, project.cache / "math.json")
        self.search_pages: list[SearchPage] = []
        self.used_labels: set[str] = set()
        self.math_errors: list[str] = []
        self.unsafe: list[str] = []
        self.formulas = 0
        self.machine: dict[str, str] = {}
        self.redirects: dict[str, urls.Redirect] = {}
        self.page_urls: dict[str, str] = {}
        file = project.root / "topics.yml"
        self.headings = topics.read_headings(file) if file.is_file() else []
        self.questions = questions.read_questions(config.nav, Path(config.docs_dir), self.headings)


_build: _Build | None = None
_lock = None
_serving = True
_site: Path | None = None


def _offline() -> bool:
    return os.environ.get("KB_OFFLINE") == "true"


def _notebook_key(src_uri: str) -> str | None:
    """`notebooks/rl/clip.ipynb` → `rl/clip`；不是笔记页就是 None。"""
    if src_uri.startswith("notebooks/") and src_uri.endswith(".ipynb"):
        return src_uri.removeprefix("notebooks/").removesuffix(".ipynb")
    return None


def on_startup(command, dirty):
    """serve 建在自己的临时文件夹里，就地重建；别的命令建到一旁，建成了才换上去。"""
    global _serving
    _serving = command == "serve"


@event_priority(100)  # 在 offline 插件之前：它找不到 iframe-worker 就会写上一个 CDN 的地址
def on_config(config):
    """没有仓库地址（本机、离线版）就没有「编辑此页」；离线版自带 file:// 下搜索要用的脚本。"""
    global _site
    if not config.repo_url:
        config.edit_uri = None
    if not _serving:
        _site = Path(config.site_dir).resolve()
        config.site_dir = str(publish.partial(_site))
    if _offline():
        config.extra["polyfills"] = [OFFLINE_WORKER]
    return config


def on_pre_build(config):
    """最先执行笔记：片段写好之后页面才能嵌入。"""
    global _build, _lock
    project = Project(Path(config.config_file_path).parent)
    _lock = take_turn(project)
    drop_damaged(project.cache / "mkdocs-jupyter")
    try:
        check_sources(project.root)
        _build = _Build(project, build_notebooks(project), config)
    except KbsiteError as error:
        raise PluginError(str(error)) from None


@event_priority(100)  # 在 mkdocs-jupyter 之前：它在 on_files 里认领 .ipynb
def on_files(files, config):
    """把执行过的笔记、Anki 牌组、一起发布的离线版放进站点。"""
    if _offline():
        files.append(File.generated(config, OFFLINE_WORKER, content=_offline_worker()[0]))
    if _build.questions:
        content = cards.package(_build.questions, config.site_url or "", cards.modified_time())
        files.append(File.generated(config, CARDS, content=content))
    if _build.archive:
        files.append(File.generated(config, _build.archive.name, abs_src_path=str(_build.archive)))
    folder = _build.project.ipynb
    for key in _build.built.ipynb:
        files.append(
            File(
                f"notebooks/{key}.ipynb",
                str(folder),
                config.site_dir,
                config.use_directory_urls,
            )
        )
    return files


def on_nav(nav, config, files):
    """两个文件写到同一处，就有一个会不见。"""
    seen = {}
    for file in files:
        twin = seen.setdefault(file.dest_uri.casefold(), file)
        if twin is not file and not file.inclusion.is_excluded():
            raise PluginError(
                f"docs/{file.src_uri}:1: 与 {twin.src_uri} 都写到网站的 {file.dest_uri}，只会留下一个。给其中一个改名。"
            )
    return nav


def on_page_markdown(markdown, page, config, files):
    """填一句话回答，检查 front matter 与嵌入，加页尾。"""
    path = f"docs/{page.file.src_uri}"
    safety.start_clock(path, PluginError)
    try:
        source = page.file.content_string  # 含 front matter，行号才对
        front_matter.read(source, path)
        safety.check_meta(page.meta, path)
        _build.used_labels |= pages.check_includes(source, path, _build.notebooks, _build.project.root)
        markdown = pages.fill_answer(markdown, page.meta, path)
        markdown = questions.fill_questions(markdown, _build.questions, page.file.src_uri)
        markdown = verification.fill_verification(
            markdown, page.file.src_uri, _build.project.root, _build.notebooks.values(), _build.questions
        )
        markdown = archive.fill_link(markdown, _build.archive, page.file.src_uri)
    except KbsiteError as error:
        raise PluginError(str(error)) from None
    key = page.file.src_uri.removesuffix(".md")
    origins = topics.headings_of(_build.headings, key)
    snippet = _build.project.root / "snippets" / f"{key.replace('-', '_')}.py"
    has_api = (_build.project.root / "docs/api" / f"{key.partition('/')[0]}.md").is_file()
    markdown += pages.footer(key, origins, key in _build.notebooks, has_api and snippet.is_file())
    if "answer" in page.meta and not _offline():
        base = machine.markdown_url(page.file.url)
        expand = machine.snippet_expander(config.mdx_configs["pymdownx.snippets"])
        _build.machine[base] = machine.page_markdown(
            source, markdown, expand, lambda target: _machine_link(target, page.file, files, config)
        )
    return markdown


def on_page_content(html, page, config, files):
    """修补笔记页；把公式都排一遍，错误攒起来，等所有页面都过了再一次报出。"""
    key = _notebook_key(page.file.src_uri)
    if key:
        topic = files.get_file_from_path(f"{key}.md")
        href = topic.url_relative_to(page.file) if topic else page.file.url
        html, tokens = pages.repair_notebook(html, key, href)
        page.toc = get_toc(_nest(tokens))
        page.meta["search"] = {"exclude": True}
        page.meta["description"] = f"{page.title}：执行过的完整笔记，含代码与输出。"
        notebook = _build.notebooks[key]
        page.edit_url = _edit_url(config, notebook.path.relative_to(_build.project.root).as_posix())
    _check_safety(html, page)
    for formula in formulas(html):
        _build.formulas += 1
        try:
            _build.math.typeset(formula)
        except MathEngineError as error:  # 别的公式也排不了，不再一个个等
            raise PluginError(f"{_locate(page, formula.tex)}: {error}。") from None
        except MathRenderError as error:
            _build.math_errors.append(
                f"{_locate(page, formula.tex)}: 公式排不出来：{error}。公式是 {formula.tex!r}。"
            )
    html = pages.name_questions(html)
    search = page.meta.get("search") or {}
    if not search.get("exclude") and not _build.math_errors:  # 有排不出的公式，反正没有站点
        text = replace(html, lambda formula: escape(readable(_build.math.typeset(formula))))
        title = page.meta.get("title", page.title)
        _build.search_pages.append(
            SearchPage(page.url, title, page.meta.get("tags") or [], search.get("boost", 1), cut(text, title))
        )
    # 主题的索引不要：我们有自己的
    page.meta["search"] = {"exclude": True}
    safety.stop_clock()
    return html


def on_env(env, config, files):
    """所有页面都已成形、还没有写出任何文件：在这里报错，不会留下半个站点；公式的总数也到这时才知道。"""
    if errors := _build.unsafe + _build.math_errors:
        raise PluginError("\n".join(errors))
    scripts = [_offline_worker()[1]] if _offline() else []
    env.filters["policy"] = lambda templates: policy.policy(templates, scripts, offline=_offline())
    for file in files.documentation_pages():
        file.page.content = file.page.content.replace(verification.FORMULAS, str(_build.formulas))
    _keep_addresses(files)
    if not _offline():  # 离线版没有会来取它们的机器
        _build.machine["llms.txt"] = _llms_txt(config, files)
    for message in pages.unused_labels(_build.notebooks.values(), _build.used_labels):
        log.warning(message)


def on_page_context(context, page, config, nav):
    """专题页的页头：Markdown 的地址与 JSON-LD，由 overrides/main.html 放进去。"""
    if "answer" in page.meta and not _offline():
        alternate = posixpath.basename(machine.markdown_url(page.file.url))
        context["machine_head"] = machine.head(page.title, page.meta, page.canonical_url, alternate)
    return context


@event_priority(-100)
def on_post_page(output, page, config):
    """查内联脚本；换上图与排好的公式。"""
    _check_scripts(output, page.file.src_uri)
    try:
        return replace(replace_figures(output, _build.built.figures), _build.math.typeset)
    except KbsiteError as error:
        raise PluginError(f"docs/{page.file.src_uri}: {error}") from None


def on_post_template(output, template_name, config):
    """404 也要有策略。"""
    if template_name.endswith(".html"):
        _check_scripts(output, template_name)
    return output


@event_priority(-100)  # 别的插件都写完了
def on_post_build(config):
    """写全站一份的公式样式与字体、检索索引、给机器读的文件。"""
    _write_search(Path(config.site_dir))
    for name, text in _build.machine.items():
        path = Path(config.site_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    urls.write_pages(
        Path(config.site_dir),
        _build.redirects,
        _build.page_urls,
        lambda url: urljoin(config.site_url, url) if config.site_url else None,
    )
    site = Path(config.site_dir) / MATH_FOLDER
    css = _build.math.stylesheet()
    fonts = _build.math.fonts(css)
    if _offline():
        css, fonts = embed(css, fonts), {}
    (site / "fonts").mkdir(parents=True, exist_ok=True)
    (site / "math.css").write_text(css, encoding="utf-8")
    for name, content in fonts.items():
        (site / "fonts" / name).write_bytes(content)
    _build.math.save()
    _build.math.close()
    if _build.math.typeset_count:
        log.info("公式：新排 %d 个。", _build.math.typeset_count)
    seal(_build.project.cache / "mkdocs-jupyter")
    _build.finished = True
    if _serving:
        _lock.release()


def _write_search(site: Path):
    terms = _build.project.root / "docs/about/terms.md"
    pages = sorted(_build.search_pages, key=lambda page: page.url)
    try:
        aliases = read_aliases(terms.read_text(encoding="utf-8")) if terms.is_file() else []
        source = build_index(pages, aliases, site / "search", offline=_offline())
        install_worker(site)
    except KbsiteError as error:
        raise PluginError(str(error)) from None
    except subprocess.TimeoutExpired as error:
        raise PluginError(f"建检索索引：Node 进程 {error.timeout:.0f} s 没有写完。再建一次。") from None
    # 评测（bench/search.py）拿同一份正文建别的索引
    write_atomically(_build.project.cache / "search.json", source)


def _keep_addresses(files):
    """查公开过的地址都还在，记下这一次的（make urls 用），给改了名的锚点补上旧名字。"""
    found = {urls.address(file.page.url): file for file in files.documentation_pages()}
    contents = {address: file.page.content for address, file in found.items()}
    # API 与笔记页的锚点由函数名、单元的标题生成，改名是常事，也还落在同一页：只保页面
    written = {
        address
        for address, file in found.items()
        if file.src_uri.endswith(".md") and not file.src_uri.startswith("api/")
    }
    try:
        _build.redirects = urls.check(_build.project.root, contents)
    except KbsiteError as error:
        raise PluginError(str(error)) from None
    _build.page_urls = {address: file.page.url for address, file in found.items()}
    text = "".join(f"{row}\n" for row in urls.addresses(contents, written))
    write_atomically(_build.project.cache / "urls.txt", text)
    for address, file in found.items():
        file.page.content = urls.add_aliases(file.page.content, address, _build.redirects)


def on_build_error(error):
    """构建失败（--strict 下有警告也算）也要收拾 Node 进程、让出位置；磁盘的毛病说清楚，不给回溯。"""
    safety.stop_clock()
    if _build:
        _build.math.close()
        _build.finished = False
    if _lock:
        _lock.release()
    if isinstance(error, OSError) and (message := disk_message(error)):
        raise Abort(message) from None


def on_shutdown():
    """命令结束：建成了才把网站换上去。"""
    if not _serving and _build and _build.finished:
        publish.publish(_site)


def _address(config, url: str, base: str) -> str:
    """站内地址：知道部署在哪里就写全，否则相对 `base`。"""
    return urljoin(config.site_url, url) if config.site_url else get_relative_url(url, base)


def _machine_link(target: str, origin: File, files, config) -> str:
    """一页的 Markdown 里的站内链接：专题页指向它的 Markdown，别的指向网页。"""
    file = files.get_file_from_path(
        posixpath.normpath(posixpath.join(posixpath.dirname(origin.src_uri), target))
    )
    if file is None:
        return target
    is_topic = file.src_uri.removesuffix(".md") in {question.key for question in _build.questions}
    url = machine.markdown_url(file.url) if is_topic else file.url
    return _address(config, url, machine.markdown_url(origin.url))


def _llms_txt(config, files) -> str:
    """各节的专题页指向 Markdown；没有一句话回答的页面（目录、API、关于）列在 Optional，指向网页。"""
    sections, others = {}, []
    for name, key, meta in questions.nav_pages(config.nav, Path(config.docs_dir)):
        file = files.get_file_from_path(f"{key}.md")
        if file is None:  # 导航里写错了，MkDocs 会报
            continue
        title = meta.get("title", name)
        if "answer" in meta:
            url = _address(config, machine.markdown_url(file.url), "llms.txt")
            sections.setdefault(name, []).append((title, url, str(meta["answer"]).strip()))
        else:
            others.append((title, _address(config, file.url, "llms.txt"), meta.get("description", "")))
    note = "每个链接是一页的完整 Markdown：公式是 TeX，代码与输出来自执行过的笔记，图换成图注。"
    return machine.llms_txt(
        config.site_name, config.site_description or "", note, sections | {"Optional": others}
    )


def _edit_url(config, path: str) -> str | None:
    if not config.repo_url or not config.edit_uri:
        return None
    base = config.edit_uri.removesuffix("docs/")
    return config.repo_url.rstrip("/") + "/" + base + path


def _check_safety(html: str, page):
    """闸：页面、目录里的标题、页面引用的图；问题攒起来，等所有页面都过了再一次报出。"""
    key = _notebook_key(page.file.src_uri)
    if key:
        notebook = _build.notebooks[key].path
        path = notebook.relative_to(_build.project.root).as_posix()
        source = notebook.read_text(encoding="utf-8-sig")
    else:
        path, source = f"docs/{page.file.src_uri}", page.file.content_string
    found = list(safety.problems(html, page.file.url))
    for title in (page.title, *_titles(page.toc)):
        found += safety.problems(str(title))
    for ref in figure_refs(html) - set(_build.built.figures):
        found.append((f"KB601: 没有图 {ref!r}。图由嵌入的单元带来，不能手写。", (ref,)))
    _build.unsafe += safety.locate(path, source, found)


def _check_scripts(html: str, name: str):
    try:
        policy.check(html, name)
    except KbsiteError as error:
        raise PluginError(str(error)) from None


def _offline_worker() -> tuple[str, str]:
    source = _build.project.node_modules / "iframe-worker/shim/index.js"
    return policy.offline_worker(source.read_text(encoding="utf-8"))


def _titles(toc):
    for item in toc:
        yield item.title
        yield from _titles(item.children)


def _locate(page, tex: str) -> str:
    """公式在源文件里的位置；来自片段或文档串时只说到页面。"""
    path = f"docs/{page.file.src_uri}"
    source = page.file.content_string if page.file.src_uri.endswith(".md") else ""
    position = source.find(tex.strip())
    return f"{path}:{source.count(chr(10), 0, position) + 1}" if position >= 0 else path


def _nest(tokens: list[dict]) -> list[dict]:
    """平的标题列表 → 按级别嵌套，成 get_toc 要的样子。"""
    top: list[dict] = []
    stack: list[dict] = []
    for token in tokens:
        while stack and stack[-1]["level"] >= token["level"]:
            stack.pop()
        (stack[-1]["children"] if stack else top).append(token)
        stack.append(token)
    return top
