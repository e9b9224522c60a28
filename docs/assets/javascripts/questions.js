// 题目索引的筛选与排序。条目全在页面里，脚本只藏起不合的、换顺序；筛选条件写进地址，链接可以分享。
;(() => {
  const form = document.querySelector(".kb-filter")
  if (!form) return
  const list = document.querySelector(".kb-questions")
  const items = [...list.children].map((item, index) => ({
    item,
    index,
    text: `${item.textContent} ${item.dataset.words}`.toLowerCase(),
  }))
  const { words, section, order, count } = form.elements

  const apply = () => {
    const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean)
    let shown = 0
    for (const { item, text } of items) {
      item.hidden = !(wanted.every((word) => text.includes(word))
        && (!section.value || item.dataset.section === section.value))
      shown += !item.hidden
    }
    const direction = Number(order.value)
    const sorted = [...items].sort((a, b) =>
      direction * (a.item.dataset.difficulty - b.item.dataset.difficulty) || a.index - b.index)
    list.append(...sorted.map(({ item }) => item))
    count.value = shown === items.length ? `${shown} 题` : `${shown} / ${items.length} 题`
  }

  const state = new URLSearchParams(location.search)
  for (const field of [words, section, order]) field.value = state.get(field.name) ?? ""
  if (section.selectedIndex < 0) section.value = ""
  if (order.selectedIndex < 0) order.value = ""
  form.addEventListener("submit", (event) => event.preventDefault())
  form.addEventListener("input", () => {
    apply()
    const query = new URLSearchParams(location.search)
    for (const field of [words, section, order])
      field.value ? query.set(field.name, field.value) : query.delete(field.name)
    const search = query.toString()
    history.replaceState(null, "", (search ? `?${search}` : location.pathname) + location.hash)
  })
  apply()
  form.hidden = false
})()
