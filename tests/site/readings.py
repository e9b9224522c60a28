"""把站里每一页在浏览器里打开一次，量下各项测试要的东西：手机、桌面、深色、打印。"""

from sitetools import ROOT, Visitor, wait

AXE = (ROOT / "node_modules/axe-core/axe.min.js").read_text(encoding="utf-8")
A4 = 718  # 像素：A4 减去浏览器默认的页边

SHIFT = """() => new Promise(done => {
  let sum = 0
  new PerformanceObserver(list => { for (const e of list.getEntries()) sum += e.value })
    .observe({type: "layout-shift", buffered: true})
  document.fonts.ready.then(() => setTimeout(() => done(sum), 300))
})"""

PHONE = """() => {
  const next = [...document.querySelectorAll("article h2")].find(h => h.textContent.startsWith("推导"))
  const boxes = [...document.querySelectorAll("mjx-container[display=true], .md-typeset__scrollwrap")]
  const scrolling = [...document.querySelectorAll("article *")].filter(b =>
    b.scrollWidth > b.clientWidth + 1 && ["auto", "scroll"].includes(getComputedStyle(b).overflowX) && b.checkVisibility())
  const name = b => `${b.localName}.${b.className} ${[...b.textContent.trim()].slice(0, 20).join("")}`
  const small = (selector, least) => [...document.querySelectorAll(selector)].filter(b => {
    const {width, height} = b.getBoundingClientRect()
    return b.checkVisibility({opacityProperty: true}) && Math.min(width, height) < least
  }).map(name)
  return {
    answers: next?.previousElementSibling.getBoundingClientRect().bottom,
    wide: boxes.filter(b => b.getBoundingClientRect().right > innerWidth + 1).map(b => b.dataset.tex ?? b.tagName),
    scrolling: scrolling.length,
    stuck: scrolling.filter(b => b.tabIndex < 0).map(name),
    small: [
      ...small("button, .md-path__link, .md-content__button", 24),
      ...small("summary, .md-header__button, .md-nav__link, .md-footer__link, "
        // 勾选框连着它的字一起点
        + ":is(.kb-filter, .kb-calculator) :is(input:not([type=checkbox]), select, button, label:has([type=checkbox]))", 44),
    ],
    text: [...document.querySelectorAll(".kb-figure svg text")].map(node => {
      const svg = node.ownerSVGElement
      const size = parseFloat(getComputedStyle(node.querySelector("tspan") ?? node).fontSize)
      return size * svg.getBoundingClientRect().width / svg.viewBox.baseVal.width
    }),
  }
}"""

OVERFLOW = "document.documentElement.scrollWidth - document.documentElement.clientWidth"

RATIO = """
  const channels = color => color.match(/[\\d.]+/g).map(Number)
  const luminance = ([r, g, b]) => {
    const [x, y, z] = [r, g, b].map(v => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    return 0.2126 * x + 0.7152 * y + 0.0722 * z
  }
  // 半透明的颜色先与底色混合
  const ratio = (color, background) => {
    const [r, g, b, alpha = 1] = channels(color)
    const base = channels(background)
    const mixed = luminance([r, g, b].map((v, i) => alpha * v + (1 - alpha) * base[i]))
    const other = luminance(base)
    return (Math.max(mixed, other) + 0.05) / (Math.min(mixed, other) + 0.05)
  }
"""

CONTRAST = (
    "() => {"
    + RATIO
    + """
  const background = getComputedStyle(document.body).backgroundColor
  const worst = {text: 99, line: 99}
  for (const node of document.querySelectorAll(".kb-figure svg text, .kb-figure svg tspan"))
    worst.text = Math.min(worst.text, ratio(getComputedStyle(node).fill, background))
  for (const node of document.querySelectorAll(".kb-figure svg path[style*='stroke: #'], .kb-figure svg path[style*='stroke: var']")) {
    const style = getComputedStyle(node)
    if (parseFloat(style.strokeWidth) >= 1.2 && parseFloat(style.strokeOpacity) > 0.9)
      worst.line = Math.min(worst.line, ratio(style.stroke, background))
  }
  return worst
}"""
)

PRINTED = (
    "() => {"
    + RATIO
    + """
  const all = (selector) => [...document.querySelectorAll(selector)]
  const shown = (node) => node.checkVisibility({visibilityProperty: true})
  const name = (node) => `${node.localName}.${node.className.baseVal ?? node.className} ${[...node.textContent.trim()].slice(0, 20).join("")}`
  const pale = {}
  for (const node of all("article *")) {
    if (![...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) || !shown(node)) continue
    const style = getComputedStyle(node)
    const color = node.ownerSVGElement ? style.fill : style.color
    if (ratio(color, "rgb(255, 255, 255)") < 4.5) pale[color] = name(node)
  }
  return {
    hidden: all("article details > *, article details mjx-container").filter(node => !shown(node)).map(name),
    chrome: all("header *, footer *, .md-sidebar, .md-tabs, .md-path, .md-skip, .md-top, .headerlink, .md-code__button")
      .filter(shown).map(name),
    cut: all("article :is(mjx-container[display=true], table, pre, code, svg)").filter(node => {
      const inline = getComputedStyle(node).display === "inline"
      return shown(node) && (node.getBoundingClientRect().right > innerWidth + 1
        || !inline && node.scrollWidth > node.clientWidth + 1)
    }).map(name),
    pale,
  }
}"""
)

# 像读者那样选定一种主题
CHOOSE = """scheme => {
  document.querySelector(`input[data-md-color-media$="${scheme === "slate" ? "dark" : "light"})"]`).click()
  if (document.body.dataset.mdColorScheme !== scheme) throw Error("没有换成 " + scheme)
}"""

# axe 的时间花在结点上：展开折叠，公式去掉（颜色随正文，读屏与滚动另有测试），代码里每种颜色只留一处
THIN = """() => {
  for (const fold of document.querySelectorAll("details")) fold.open = true
  for (const formula of document.querySelectorAll("mjx-container")) formula.remove()
  const seen = new Set()
  for (const token of document.querySelectorAll(".highlight code span[class]:not(:has(*))"))
    if (seen.has(token.className)) token.replaceWith(token.textContent)
    else seen.add(token.className)
}"""

# 只要严重与致命的；规则取 WCAG 2.1 的 A 与 AA（2.2 新添的点按大小由上面的 small 量，更严）
VIOLATIONS = """async (only) => {
  const {violations} = await axe.run(document, {runOnly: only, resultTypes: ["violations"]})
  return violations.filter(v => ["serious", "critical"].includes(v.impact)).flatMap(v =>
    v.nodes.map(n => `${v.id}: ${n.html.slice(0, 120)} ${(n.any[0] ?? n.all[0] ?? n.none[0])?.message ?? ""}`))
}"""
EVERYTHING = {"type": "tag", "values": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa"]}
COLORS = ["color-contrast", "link-in-text-block"]


def read(browser, base_url, url):
    """缓存是空的；先在手机宽度量，再放宽到桌面，换深色，看打印的样子，最后查无障碍规则。"""
    context = browser.new_context(
        viewport={"width": 390, "height": 844}, color_scheme="light", reduced_motion="reduce", locale="zh-CN"
    )
    visitor = Visitor(context.new_page(), base_url)
    page = visitor.page
    page.goto(base_url + url, wait_until="load")
    found = {"shift": page.evaluate(SHIFT), **page.evaluate(PHONE), "overflow": [page.evaluate(OVERFLOW)]}
    page.set_viewport_size({"width": 1280, "height": 844})
    found["contrast"] = {"light": page.evaluate(CONTRAST)}
    found["overflow"].append(page.evaluate(OVERFLOW))
    page.emulate_media(color_scheme="dark")
    wait(page, "document.body.dataset.mdColorScheme === 'slate'")
    found["contrast"]["dark"] = page.evaluate(CONTRAST)
    # 打印时浏览器报的是浅色：跟随系统的页面会自己换，读者选定的深色不会
    page.evaluate(CHOOSE, "slate")
    page.set_viewport_size({"width": A4, "height": 1000})
    page.emulate_media(media="print")
    found["contrast"]["print"] = page.evaluate(CONTRAST)
    found["printed"] = page.evaluate(PRINTED)
    page.set_viewport_size({"width": 1280, "height": 844})
    page.emulate_media(media="screen")
    page.evaluate(THIN)
    page.evaluate(AXE)
    found["violations"] = {"dark": page.evaluate(VIOLATIONS, COLORS)}
    page.evaluate(CHOOSE, "default")
    found["violations"]["light"] = page.evaluate(VIOLATIONS, EVERYTHING)
    context.close()
    return {**found, "faults": [*visitor.foreign, *visitor.errors]}
