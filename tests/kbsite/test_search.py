"""检索：公式读成一行、网页切成节、术语表里的别名、建索引、换上 worker。"""

import json
import shutil
import subprocess
from pathlib import Path

import pytest

from kbsite.errors import KbsiteError
from kbsite.math.mathjax import MathJax, node_executable
from kbsite.math.scan import Formula
from kbsite.search.aliases import read_aliases
from kbsite.search.build import build_index, install_worker
from kbsite.search.readable import readable
from kbsite.search.sections import SearchPage, Section, cut

REPOSITORY = Path(__file__).parents[2]
SEARCH = REPOSITORY / "src/kbsite/search"


@pytest.fixture(scope="module")
def mathjax(tmp_path_factory):
    engine = MathJax(REPOSITORY / "node_modules", tmp_path_factory.mktemp("math") / "math.json")
    yield engine
    engine.close()


@pytest.mark.parametrize(
    ("tex", "text"),
    [
        (r"\frac{QK^\top}{\sqrt{d_k}}", "QK^⊤/√d_k"),
        (r"1-\epsilon", "1−ϵ"),
        (r"sbh\left(34+5\frac{as}{h}\right)", "sbh(34+5as/h)"),
        (r"\frac{a+b}{c}", "(a+b)/c"),
        (r"\sqrt{a+b}", "√(a+b)"),
        (r"\hat A>0", "A > 0"),
        (r"\pi_{\text{ref}}(y\mid x)", "π_ref(y∣x)"),
        (r"-\log\sigma(u)", "− log σ(u)"),
        (r"\sum_{i=1}^{G} r_i", "∑_(i = 1)^G r_i"),
        (r"\mathbb{E}[r]", "E[r]"),
        (r"\begin{pmatrix}a&b\\c&d\end{pmatrix}", "(a b; c d)"),
        (r"\nabla_\theta\log\pi_\theta", "∇_θ log π_θ"),
    ],
)
def test_formulas_read_as_one_line(mathjax, tex, text):
    assert readable(mathjax.typeset(Formula(tex, display=False))).replace("𝔼", "E") == text


PAGE = """
<h1 id="page">题目<a class="headerlink" href="#page">¶</a></h1>
<p>开头，<code>clip</code> 一下。</p>
<div data-search-exclude="true"><p>不要</p><br></div>
<h2 id="part">第一节<a class="headerlink" href="#part">¶</a></h2>
<p>正文<em>强调</em>。</p><pre><code>import torch</code></pre><svg><text>图字</text></svg>
<details class="question" id="why"><summary>为什么？</summary><p>因为。</p></details>
<p>尾巴</p>
<ul><li>甲</li><li>乙</li></ul>
"""


def test_pages_are_cut_at_headings_and_follow_ups():
    first, part, why = cut(PAGE, "题目（Title）")
    assert (first.anchor, first.level, first.title, first.prose) == (
        "",
        1,
        "题目（Title）",
        "开头，clip 一下。",
    )
    assert (part.anchor, part.level, part.title) == ("part", 2, "第一节")
    assert part.prose == "正文强调。尾巴 甲 乙" and part.code == "import torch"
    assert (why.anchor, why.level, why.title, why.prose) == ("why", 4, "为什么？", "因为。")


def test_aliases_pair_up_and_leave_out_notes():
    table = """
| 本站用词 | English | 别名、缩写 | 说明 |
| --- | --- | --- | --- |
| 裁剪 | clip | `clipping`、截幅 | 说明不算 |
| 在线、离线 | online, offline | — | 丁 |
| 张量并行、序列并行 | tensor parallel, sequence parallel | TP、SP | — |
| 温度（采样） | temperature | — | — |
| 基线 | — | — | — |
"""
    assert read_aliases(table) == [
        ["裁剪", "clip", "clipping", "截幅"],
        ["在线", "online"],
        ["离线", "offline"],
        ["张量并行", "tensor parallel", "TP"],
        ["序列并行", "sequence parallel", "SP"],
        ["温度", "temperature"],
    ]


def terms(text):
    """text.js 切出来的词与分量。"""
    script = f"""
      require("vm").runInThisContext(require("fs").readFileSync({json.dumps(str(SEARCH / "text.js"))}, "utf8"))
      const found = {{}}
      indexTerms({json.dumps(text)}, (term, share) => {{ found[term] = Math.max(found[term] ?? 0, share) }})
      console.log(JSON.stringify(found))
    """
    result = subprocess.run([node_executable(), "-e", script], capture_output=True, text=True, check=True)
    return json.loads(result.stdout)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("灾难性遗忘", {"灾难", "难性", "性遗", "遗忘"}),
        ("裁", {"裁"}),
        ("Flash Attention", {"flash", "attention", "flashattention"}),
        ("FlashAttention", {"flashattention", "flash", "attention"}),
        ("ＺｅＲＯ－3", {"zero", "3", "zero3"}),
        ("√d_k", {"sqrt", "d", "k", "dk"}),
        (r"\sqrt{d_k}", {"sqrt", "d", "k", "dk"}),
        (r"\frac{\epsilon}{2}", {"epsilon", "2"}),
        ("1−ϵ", {"1", "epsilon"}),
        ("34+5as/h", {"34", "5as", "as", "h", "5ash"}),
    ],
)
def test_index_and_query_share_one_tokenizer(text, expected):
    assert set(terms(text)) - {"sqrtd"} == expected


def page(url, title, *sections, tags=(), boost=1.0):
    return SearchPage(url, title, list(tags), boost, [Section(title=title, prose=title), *sections])


def test_index_is_split_into_shards_that_hold_every_term(tmp_path):
    number = 1200
    pages = [
        page(f"p{i}/", f"第{i}页", Section("a", 2, f"标题{i}", f"word{i} constructor 共同的话", "code_only"))
        for i in range(number)
    ]
    build_index(pages, [["甲", "乙"]], tmp_path, offline=False)
    directory = json.loads((tmp_path / "directory.json").read_text(encoding="utf-8"))
    folder = tmp_path / directory["version"]
    shards = [
        json.loads((folder / f"t{i}.json").read_text(encoding="utf-8"))
        for i in range(len(directory["firsts"]))
    ]
    assert len(shards) > 3 and directory["aliases"] == [["甲", "乙"]] and directory["sections"] == 2 * number
    assert [min(shard) for shard in shards] == directory["firsts"] == sorted(directory["firsts"])
    found = {term: flat for shard in shards for term, flat in shard.items()}
    # word7 只在第 7 页的第 1 节；「共同」在每页的第 1 节
    assert found["word7"][:2] == [1, 7 * 256 + 1]
    assert found["constructor"][0] == found["共同"][0] == found["codeonly"][0] == number
    assert len(list(folder.glob("p*.json"))) == number
    assert "code_only" not in (folder / "p7.json").read_text(encoding="utf-8")


def test_common_terms_keep_their_count_but_a_bounded_list(tmp_path):
    pages = [
        page(
            f"p{i}/",
            f"第{i}页",
            Section("a", 2, "常见" * (i % 6 == 5) + "标题", "罕见 " * (i % 7 == 0) + "常见的话"),
        )
        for i in range(6000)
    ]
    build_index(pages, [], tmp_path, offline=False)
    directory = json.loads((tmp_path / "directory.json").read_text(encoding="utf-8"))
    found = {}
    for path in (tmp_path / directory["version"]).glob("t*.json"):
        found |= json.loads(path.read_text(encoding="utf-8"))
    assert found["常见"][0] == 6000 and len(found["常见"]) == 1 + 2 * 1000
    assert found["罕见"][0] == len(found["罕见"]) // 2 == 858
    ids = [sum(found["常见"][1 : i + 1 : 2]) for i in range(1, len(found["常见"]), 2)]
    # 留下的是分量大的：标题里也有的那 1000 节，按编号排好
    assert ids == [i * 256 + 1 for i in range(5, 6000, 6)]


QUICK_TYPING = """
const [folder, sources, queries] = JSON.parse(process.argv[1])
const fs = require("fs"), vm = require("vm")
const sent = [], asked = []
let listener
Object.assign(globalThis, {
  self: globalThis,
  location: new URL("http://site/assets/javascripts/workers/search.js"),
  addEventListener: (_, f) => { listener = f },
  postMessage: (message) => sent.push(message),
  fetch: async (url) => {
    asked.push(url.pathname)
    return { ok: true, json: async () => JSON.parse(fs.readFileSync(folder + url.pathname.slice("/search".length))) }
  },
})
for (const name of sources) vm.runInThisContext(fs.readFileSync(name, "utf8"))
for (const data of queries) listener({ data: { type: 2, data } })
setTimeout(() => console.log(JSON.stringify({
  answers: sent.map(({ data }) => data.items.map(([best]) => best.location)), asked,
})), 300)
"""


def test_only_the_last_of_quick_keystrokes_is_searched(tmp_path):
    names = ["abacus", "abbey", "abdomen"]
    build_index([page(f"{name}/", name) for name in names], [], tmp_path, offline=False)
    sources = [str(SEARCH / "text.js"), str(SEARCH / "worker.js")]
    arguments = json.dumps([str(tmp_path), sources, ["a", "ab", "abb"]])
    result = subprocess.run(
        [node_executable(), "-e", QUICK_TYPING, arguments], capture_output=True, text=True, check=True
    )
    found = json.loads(result.stdout)
    assert found["answers"] == [["abbey/"]]
    # 前两键会要三页的正文
    assert sum("/p" in path for path in found["asked"]) == 1


def test_offline_index_is_scripts(tmp_path):
    build_index([page("a.html", "甲")], [], tmp_path, offline=True)
    text = (tmp_path / "directory.js").read_text(encoding="utf-8")
    assert text.startswith('kbLoaded("directory",{') and not list(tmp_path.rglob("*.json"))


def test_a_page_with_too_many_sections_is_refused_by_name(tmp_path):
    crowded = page("many/", "多", *(Section(f"s{i}", 2, "节") for i in range(256)))
    with pytest.raises(KbsiteError, match=r"many/ 有 257 节"):
        build_index([crowded], [], tmp_path, offline=False)


def test_same_pages_give_the_same_files(tmp_path):
    for name in ("a", "b"):
        build_index([page("x/", "甲"), page("y/", "乙")], [], tmp_path / name, offline=False)
    files = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.is_file()}
        for root in (tmp_path / "a", tmp_path / "b")
    ]
    assert files[0] == files[1] and len(files[0]) > 3


def test_worker_takes_the_place_of_the_stock_one_or_the_build_fails(tmp_path):
    workers = tmp_path / "assets/javascripts/workers"
    workers.mkdir(parents=True)
    (tmp_path / "search").mkdir()
    shutil.copy(SEARCH / "worker.js", tmp_path / "search/worker.js")
    with pytest.raises(KbsiteError, match="找到 0 个"):
        install_worker(tmp_path)
    (workers / "search.0a1b.min.js").write_text("stock")
    install_worker(tmp_path)
    assert (workers / "search.0a1b.min.js").read_text(encoding="utf-8") == (SEARCH / "worker.js").read_text(
        encoding="utf-8"
    )


def test_built_site_searches_with_our_worker_and_names_follow_ups(project):
    project.write(
        "docs/index.md",
        """
        # 首页

        正文 $\\sqrt{d_k}$。

        ??? question "为什么除以 $d$ 的根号？"
            因为方差。

        ??? question "为什么除以 $d$ 的根号？"
            又问一遍。
        """,
    )
    assert project.build("--strict").returncode == 0
    site = project.root / "site"
    (worker,) = site.glob("assets/javascripts/workers/search.*.min.js")
    assert "kbLoaded" in worker.read_text(encoding="utf-8")
    assert json.loads((site / "search/search_index.json").read_text(encoding="utf-8"))["docs"] == []
    (text,) = site.glob("search/*/p*.json")
    sections = json.loads(text.read_text(encoding="utf-8"))["sections"]
    assert [title for _, title, _ in sections] == ["首页", *["为什么除以 d 的根号？"] * 2]
    assert sections[0][2] == "正文 √d_k。"
    anchors = [anchor for anchor, *_ in sections[1:]]
    assert len(set(anchors)) == 2 and all(f'id="{anchor}"' in project.page("") for anchor in anchors)
