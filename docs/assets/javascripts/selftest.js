// 自测：一次一题，先自己说，再看答案、记下会不会。不会的下次先问，没问过的其次，会的最后；没有更多的算法。
// 记录只在这个浏览器里，写在各题的 data-mark 上：known、missed，没问过就没有。
;(() => {
  const list = document.querySelector(".kb-questions")
  if (!list) return
  const KEY = "mianjing-2025/selftest/v1"
  const ORDER = ["missed", undefined, "known"]
  const items = [...list.children]
  const filter = document.querySelector(".kb-filter")
  const panel = document.querySelector(".kb-selftest")
  const progress = document.querySelector(".kb-progress")
  const { test, forget } = filter.elements
  const { reveal, known, missed, again, leave } = panel.elements
  const marked = (mark) => items.filter((item) => item.dataset.mark === mark).length

  // 存储可能被禁、写满，也可能存着别的东西或已经没有的题：读不出就当没有，写不进就只记在本页
  const load = () => {
    let saved
    try {
      saved = JSON.parse(localStorage.getItem(KEY))
    } catch {}
    for (const { dataset } of items) {
      const mark = saved?.[dataset.key]
      if (mark && ORDER.includes(mark)) dataset.mark = mark
    }
  }
  const save = () => {
    const marks = items.filter(({ dataset }) => dataset.mark).map(({ dataset }) => [dataset.key, dataset.mark])
    try {
      if (marks.length) localStorage.setItem(KEY, JSON.stringify(Object.fromEntries(marks)))
      else localStorage.removeItem(KEY)
      return true
    } catch {
      return false
    }
  }
  const marksChanged = () => {
    forget.hidden = !marked("known") && !marked("missed")
    forget.textContent = `清除记录（会 ${marked("known")}，不会 ${marked("missed")}）`
    list.dispatchEvent(new Event("marks"))
  }

  let queue = []
  let at = 0
  let saved = true
  let tally
  const current = () => queue[at]?.querySelector("details")

  const show = (text) => {
    progress.textContent = saved ? text : `${text}。浏览器不让保存，记录离开本页就没有了`
    for (const item of items) item.classList.toggle("kb-current", item === queue[at])
    showButtons()
  }
  const showButtons = () => {
    const details = current()
    reveal.hidden = !details || details.open
    known.hidden = missed.hidden = !details?.open
    again.hidden = Boolean(details) || !tally.missed
    again.textContent = `再练不会的 ${tally.missed} 题`
  }
  const ask = () => {
    const details = current()
    const score = `会 ${tally.known}，不会 ${tally.missed}`
    if (!details) {
      show(`做完了：${score}`)
      ;(again.hidden ? leave : again).focus()
      return
    }
    details.open = false
    show(`第 ${at + 1} / ${queue.length} 题，${score}`)
    details.querySelector("summary").focus()
  }
  const start = (chosen) => {
    if (!chosen.length) {
      progress.textContent = "没有题可测：放宽筛选。"
      return
    }
    const rank = (item) => ORDER.indexOf(item.dataset.mark)
    queue = chosen.sort((a, b) => rank(a) - rank(b))
    at = 0
    tally = { known: 0, missed: 0 }
    filter.hidden = true
    panel.hidden = false
    list.classList.add("kb-testing")
    ask()
  }
  const grade = (mark) => {
    current().open = false
    load() // 别的标签页可能也在记
    queue[at].dataset.mark = mark
    saved = save()
    tally[mark] += 1
    at += 1
    ask()
  }
  const stop = () => {
    if (current()) current().open = false
    queue = []
    show("")
    filter.hidden = false
    panel.hidden = true
    list.classList.remove("kb-testing")
    marksChanged()
    test.focus()
  }

  filter.addEventListener("input", () => {
    progress.textContent = ""
  })
  test.addEventListener("click", () => start([...list.children].filter((item) => !item.hidden)))
  reveal.addEventListener("click", () => {
    current().open = true
  })
  known.addEventListener("click", () => grade("known"))
  missed.addEventListener("click", () => grade("missed"))
  again.addEventListener("click", () => start(queue.filter((item) => item.dataset.mark === "missed")))
  leave.addEventListener("click", stop)
  forget.addEventListener("click", () => {
    if (!confirm(`${forget.textContent}？不能恢复。`)) return
    for (const item of items) delete item.dataset.mark
    save()
    marksChanged()
    test.focus()
  })

  // 点题目、点按钮、按键都经过这里；焦点移到答案上，读屏软件接着读
  list.addEventListener("toggle", ({ target }) => {
    if (target !== current()) return
    showButtons()
    if (!target.open) return
    const answer = target.querySelector("p")
    answer.tabIndex = -1
    answer.focus()
  }, true)

  const KEYS = { 1: known, ArrowLeft: known, 2: missed, ArrowRight: missed, " ": reveal, Enter: reveal }
  document.addEventListener("keydown", (event) => {
    const button = KEYS[event.key]
    if (!button || !current() || current().open === (button === reveal)) return
    if (event.ctrlKey || event.metaKey || event.altKey) return
    // 焦点在按钮、链接、题目上时，空格与回车归它们自己
    const owner = "input, select, textarea, [contenteditable]" + (button === reveal ? ", a, button, summary" : "")
    if (event.target.closest(owner)) return
    event.preventDefault()
    button.click()
  })

  load()
  marksChanged()
})()
