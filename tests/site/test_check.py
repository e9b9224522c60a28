"""页面规则：笔记都执行过之后，整个仓库一处不合也没有。"""

from sitetools import ROOT

from kbsite.check import check


def test_the_repository_follows_its_own_rules(site):
    report = check(ROOT)
    assert [str(finding) for finding in report.findings] == []
    assert report.unexecuted == []  # 否则数字（KB201）没有核对
