// 题目索引的筛选、排序与展开。条目全在页面里，脚本只藏起不合的、换顺序；筛选条件写进地址，链接可以分享。
;(() => {
  const form = document.querySelector(".kb-filter")
  if (!form) return
  const list = document.querySelector(".kb-questions")
  const items = [...list.children].map((item, index) => ({
    item,
    index,
    // 每题都有的链接文字不算
    text: `${item.textContent.replace(item.querySelector("a").textContent, "")} ${item.dataset.words}`.toLowerCase(),
  }))
  const { words, section, order, missed, count, fold } = form.elements
  const fields = [words, section, order, missed]
  const value = (field) => (field === missed && !missed.checked ? "" : field.value)

  const shown = () => items.filter(({ item }) => !item.hidden).map(({ item }) => item.querySelector("details"))
  const nameFold = () => {
    fold.textContent = shown().some((details) => !details.open) ? "全部展开" : "全部收起"
  }

  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean)
    for (const { item, text } of items) {
      item.hidden = !(wanted.every((word) => text.includes(word))
        && (!section.value || item.dataset.section === section.value)
        && (!missed.checked || item.dataset.mark === "missed"))
    }
    const direction = Number(order.value)
    const sorted = [...items].sort((a, b) =>
      direction * (a.item.dataset.difficulty - b.item.dataset.difficulty) || a.index - b.index)
    list.append(...sorted.map(({ item }) => item))
    const number = shown().length
    count.value = number === items.length ? `${number} 题` : `${number} / ${items.length} 题`
    nameFold()
  }

  const state = new URLSearchParams(location.search)
  for (const field of [words, section, order]) field.value = state.get(field.name) ?? ""
  if (section.selectedIndex < 0) section.value = ""
  if (order.selectedIndex < 0) order.value = ""
  missed.checked = state.get("missed") === "1"
  form.addEventListener("submit", (event) => event.preventDefault())
  form.addEventListener("input", () => {
    apply()
    const query = new URLSearchParams(location.search)
    for (const field of fields) value(field) ? query.set(field.name, value(field)) : query.delete(field.name)
    const search = query.toString()
    history.replaceState(null, "", (search ? `?${search}` : location.pathname) + location.hash)
  })
  fold.addEventListener("click", () => {
    const details = shown()
    const open = details.some((one) => !one.open)
    for (const one of details) one.open = open
  })
  list.addEventListener("toggle", nameFold, true)
  // 自测的记录变了
  list.addEventListener("marks", apply)
  apply()
  form.hidden = false
})()
