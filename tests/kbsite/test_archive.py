"""离线版的 zip：同样的内容得到同样的字节，只有一个入口；网站里的链接与文件同在。"""

import os
import shutil
import zipfile

import pytest

from kbsite.__main__ import main
from kbsite.archive import fill_link, pack
from kbsite.errors import KbsiteError


@pytest.fixture
def offline(tmp_path):
    folder = tmp_path / "site-offline"
    for name in ("index.html", "404.html", "sitemap.xml", "rl/dpo.html", "assets/数学.css"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name * 100, encoding="utf-8")
    return folder


def test_one_folder_with_one_page_on_top(offline, tmp_path):
    pack(offline, tmp_path / "book.zip")
    with zipfile.ZipFile(tmp_path / "book.zip") as archive:
        assert archive.namelist() == ["book/assets/数学.css", "book/index.html", "book/rl/dpo.html"]
        assert archive.read("book/rl/dpo.html").decode() == "rl/dpo.html" * 100


def test_bytes_depend_on_content_only(offline, tmp_path, monkeypatch):
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    pack(offline, tmp_path / "one/book.zip")
    copy = tmp_path / "copy"
    # 以相反的次序写出，时间与权限也不同
    for path in sorted(offline.rglob("*"), reverse=True):
        if path.is_file():
            target = copy / path.relative_to(offline)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
            os.utime(target, (0, 0))
            target.chmod(0o600)
    pack(copy, tmp_path / "two/book.zip")
    assert (tmp_path / "one/book.zip").read_bytes() == (tmp_path / "two/book.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "two/book.zip") as archive:
        assert {entry.date_time for entry in archive.infolist()} == {(2023, 11, 14, 22, 13, 20)}


def test_folder_without_a_site_is_refused(tmp_path, capsys):
    assert main(["zip", str(tmp_path), str(tmp_path / "book.zip")]) == 1
    assert "没有 index.html。先运行 make build OFFLINE=1" in capsys.readouterr().err
    with pytest.raises(KbsiteError):
        pack(tmp_path / "nothing", tmp_path / "book.zip")


@pytest.mark.parametrize(
    ("page", "href"),
    [("about/index.md", "../book.zip"), ("index.md", "book.zip"), ("a/b/c.md", "../../book.zip")],
)
def test_link_is_relative_and_tells_the_size(tmp_path, page, href):
    (tmp_path / "book.zip").write_bytes(bytes(5_960_000))
    text = fill_link("整个站点：{{ offline }}，解压", tmp_path / "book.zip", page)
    assert text == f"整个站点：[下载离线版]({href})（zip，6.0 MB），解压"


def test_published_archive_is_in_the_site_and_linked(project):
    project.write("docs/index.md", "# 首页\n\n{{ offline }}\n")
    (project.root / "book.zip").write_bytes(b"zip")
    assert project.build("--strict", OFFLINE_ZIP="book.zip").returncode == 0
    assert (project.root / "site/book.zip").read_bytes() == b"zip"
    assert 'href="book.zip"' in project.page("")


def test_without_an_archive_there_is_no_link(project):
    project.write("docs/index.md", "# 首页\n\n{{ offline }}\n")
    assert project.build("--strict").returncode == 0
    assert "zip" in project.page("") and ".zip" not in project.page("")


def test_missing_archive_stops_the_build(project):
    result = project.build(OFFLINE_ZIP="nothing.zip")
    assert result.returncode != 0
    assert "OFFLINE_ZIP=nothing.zip: 没有这个文件。先运行 make zip" in result.stderr
    assert "Traceback" not in result.stderr
