"""公开过的地址：丢了要报、怎么补都写明；转向写错要报；跳转页与旧锚点在两种部署里都真的能到。"""

import re
from pathlib import Path

import pytest

from kbsite import urls
from kbsite.__main__ import main
from kbsite.errors import KbsiteError

REPOSITORY = Path(__file__).parents[2]
PAGES = {
    "./": '<h1 id="top">首页</h1>',
    "rl/": '<h2 id="表">表</h2>',
    "rl/new/": '<h1 id="new">新</h1><h2 id="推导">推导</h2><h3 class="x" id="a&amp;b">a&b</h3><p data-id="no" id="p">',
}


@pytest.fixture
def root(tmp_path):
    (tmp_path / "published.txt").write_text("./\nrl/\nrl/new/\nrl/new/#推导\n", encoding="utf-8")
    return tmp_path


def redirect(root, text):
    (root / "redirects.yml").write_text(text, encoding="utf-8")


def publish(root, *rows):
    with (root / "published.txt").open("a", encoding="utf-8") as file:
        file.writelines(f"{row}\n" for row in rows)


@pytest.mark.parametrize(
    ("url", "wanted"),
    [("", "./"), ("index.html", "./"), ("rl/", "rl/"), ("rl/index.html", "rl/"), ("rl/clip/", "rl/clip/"), ("rl/clip.html", "rl/clip/"), ("rl/my-index.html", "rl/my-index/"), ("%E9%A1%B5/", "页/")],
)  # fmt: skip
def test_both_ways_of_deploying_give_the_same_address(url, wanted):
    assert urls.address(url) == wanted


def test_addresses_are_pages_and_the_headings_below_the_title():
    assert urls.addresses(PAGES, {"./", "rl/new/"}) == ["./", "rl/", "rl/new/", "rl/new/#a&b", "rl/new/#推导"]


def test_nothing_is_missing_while_everything_is_there(root):
    assert urls.check(root, PAGES) == {}


def test_any_element_with_the_id_keeps_an_anchor(root):
    publish(root, "rl/new/#a&b", "rl/new/#p")
    assert urls.check(root, PAGES) == {}


@pytest.mark.parametrize("row", ["rl/gone/", "rl/gone/#节", "rl/new/#旧节", "rl/new/#no", "./#旧"])
def test_a_published_address_that_vanished_is_told_with_its_line_and_the_cure(root, row):
    publish(root, row)
    with pytest.raises(KbsiteError) as caught:
        urls.check(root, PAGES)
    assert re.match(rf"published\.txt:5: .*{re.escape(row)} 不见了.*redirects\.yml", str(caught.value))


def test_every_fault_is_told_at_once(root):
    publish(root, "rl/gone/", "rl/new/#旧节")
    redirect(root, '"x/": "y/"\n')
    with pytest.raises(KbsiteError) as caught:
        urls.check(root, PAGES)
    assert [line.split(":")[0] for line in str(caught.value).splitlines()] == ["redirects.yml", "published.txt", "published.txt"]  # fmt: skip


def test_redirects_satisfy_the_list(root):
    publish(root, "rl/gone/", "rl/gone/#节", "rl/new/#旧节")
    redirect(root, '# 说明\n"rl/gone/": "rl/new/#推导"\n"rl/new/#旧节": "rl/new/#推导"\n')
    assert urls.check(root, PAGES) == {
        "rl/gone/": urls.Redirect("rl/new/#推导", 2),
        "rl/new/#旧节": urls.Redirect("rl/new/#推导", 3),
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('"rl/new/": "rl/"', "redirects.yml:1: 'rl/new/' → 'rl/'：rl/new/ 还在"),
        ('"rl/new/#推导": "rl/new/#p"', "rl/new/#推导 还在"),
        ('"./": "rl/"', "./ 还在"),
        ('"rl/old/": "rl/gone/"', "rl/gone/ 不存在"),
        ('"rl/old/": "rl/new/#没有"', "rl/new/#没有 不存在"),
        ('"rl/a/": "rl/b/"\n"rl/b/": "rl/a/"', "成环：rl/a/ → rl/b/ → rl/a/"),
        ('"rl/a/": "rl/a/"', "成环：rl/a/ → rl/a/"),
        ('"rl/a/": "rl/b/"\n"rl/b/": "rl/c/"\n"rl/c/": "rl/b/"', "成环：rl/a/ → rl/b/ → rl/c/ → rl/b/"),
        ('"rl/a/": "rl/b/"\n"rl/b/": "rl/new/"', "redirects.yml:1: 'rl/a/' → 'rl/b/'：转了不止一次。直接写最后的地址 rl/new/"),
        ('"rl/new/#旧": "rl/#表"', "锚点只能转到同一页"),
        ('"rl/new/#旧": "rl/new/"', "锚点只能转到同一页"),
        ('"rl/old/#旧": "rl/new/#推导"', "写整页的转向：rl/old/"),
        ('"../etc/": "rl/"', "不是站内地址"),
        ('"rl/../../etc/": "rl/"', "不是站内地址"),
        ('"/rl/old/": "rl/"', "不是站内地址"),
        ('"rl/old": "rl/"', "不是站内地址"),
        ('"rl/old.html": "rl/"', "不是站内地址"),
        ('"rl/old/": "https://example.org/"', "不是站内地址"),
        ('"rl/old/": "//example.org/"', "不是站内地址"),
        ('"rl/old/": "javascript:alert(1)"', "不是站内地址"),
        ('"rl/old/\\n": "rl/"', "不是站内地址"),
        ('"rl/old/": "rl/#\\"><script>"', "不是站内地址"),
        ('"rl/old/": "rl/"\n"rl/old/": "rl/new/"', "redirects.yml:2: rl/old/ 在第 1 行已经写过"),
        ('"rl/old/": [1]', "redirects.yml:1: 一行写一条"),
        ('- "rl/old/"', "一行写一条"),
        ("只有文字", "一行写一条"),
        ('"rl/old/": "rl/', "redirects.yml:1: 不是合法的 YAML"),
    ],
)  # fmt: skip
def test_a_redirect_that_cannot_work_is_told(root, text, message):
    redirect(root, text)
    with pytest.raises(KbsiteError) as caught:
        urls.check(root, PAGES)
    assert message in str(caught.value)


def test_update_adds_and_never_removes(root):
    publish(root, "rl/gone/")
    assert urls.update(root, ["./", "rl/a/", "rl/new/"]) == ["rl/a/"]
    listed = (root / "published.txt").read_text(encoding="utf-8")
    assert listed == "./\nrl/\nrl/a/\nrl/gone/\nrl/new/\nrl/new/#推导\n"
    assert (
        urls.update(root, ["rl/a/"]) == [] and (root / "published.txt").read_text(encoding="utf-8") == listed
    )


@pytest.fixture
def moved(project):
    """rl/old/ 移到了 rl/new/，其中「旧节」改名为「新节 a&b」。"""
    project.write("docs/rl/new.md", "# 新\n\n## 推导\n\n文\n\n## 新节 a&b\n\n文\n")
    project.write("docs/api/rl.md", "# API\n\n## 函数\n\n文\n")
    project.nav("index.md", "rl/new.md", "api/rl.md")
    project.write("published.txt", "./\nrl/new/#旧节\nrl/old/\nrl/old/#随它去\n")
    project.write("redirects.yml", '"rl/old/": "rl/new/#推导"\n"rl/new/#旧节": "rl/new/#新节-ab"\n"very/old/": "./"\n')  # fmt: skip
    return project


@pytest.mark.parametrize("offline", [False, True], ids=["folders", "files"])
def test_old_addresses_arrive_in_both_ways_of_deploying(moved, offline):
    extra = (
        {"KB_OFFLINE": "true", "DIRECTORY_URLS": "false"}
        if offline
        else {"SITE_URL": "https://example.org/sub/"}
    )
    result = moved.build("--strict", **extra)
    assert result.returncode == 0, result.stdout + result.stderr
    site = moved.root / "site"
    tail = ".html" if offline else "/index.html"
    for old, new in [("rl/old", f"rl/new{tail}"), ("very/old", "index.html")]:
        html = (site / f"{old}{tail}").read_text(encoding="utf-8")
        assert "content=\"default-src 'none'\"" in html
        target = re.search(r'content="0; url=([^"#]*)', html)[1]
        arrived = ((site / f"{old}{tail}").parent / target).resolve()
        assert (arrived / "index.html" if target.endswith("/") else arrived) == (site / new).resolve()
        assert re.search(r'<a href="([^"#]*)', html)[1] == target and "<script" not in html
        assert ("https://example.org/sub/" in html) is not offline
    # 旧锚点紧挨在新标题的前面
    html = (site / f"rl/new{tail}").read_text(encoding="utf-8")
    assert '<a id="旧节"></a><h2 id="新节-ab">' in html


def test_the_build_fails_with_the_cure_when_a_heading_is_renamed(moved):
    page = moved.root / "docs/rl/new.md"
    moved.write("published.txt", "rl/new/#推导\n")
    page.write_text(page.read_text(encoding="utf-8").replace("## 推导", "## 推導"), encoding="utf-8")
    result = moved.build("--strict")
    assert (
        result.returncode == 1
        and "published.txt:1: 公开过的地址 rl/new/#推导 不见了" in result.stdout + result.stderr
    )
    assert not (moved.root / "site/index.html").exists()
    # 消息里的办法有效
    moved.write("redirects.yml", "")
    page.write_text(
        page.read_text(encoding="utf-8").replace("## 推導", "## 推導 { #推导 }"), encoding="utf-8"
    )
    result = moved.build("--strict")
    assert result.returncode == 0, result.stdout + result.stderr
    # make urls 的来源：手写的标题连同锚点，API 页只有页面
    recorded = (moved.root / ".cache/urls.txt").read_text(encoding="utf-8").splitlines()
    assert recorded == ["./", "api/rl/", "rl/new/", "rl/new/#推导", "rl/new/#新节-ab"]
    assert main(["--root", str(moved.root), "urls"]) == 0
    assert urls.read_published(moved.root / "published.txt") == recorded


def test_urls_before_any_build_is_an_error_with_the_cure(project, capsys):
    assert main(["--root", str(project.root), "urls"]) == 1
    assert "make build" in capsys.readouterr().err


def test_the_real_list_is_sorted_and_has_no_row_twice():
    rows = urls.read_published(REPOSITORY / "published.txt")
    assert rows == sorted(set(rows)) and {"./", "rl/clip/", "rl/clip/#推导", "notebooks/rl/clip/"} <= set(
        rows
    )
