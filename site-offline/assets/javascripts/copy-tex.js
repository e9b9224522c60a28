// 选中正文复制时，把公式换成 TeX 源码：行内 $…$，独立成行 $$…$$。
document.addEventListener("copy", (event) => {
  const selection = document.getSelection()
  if (!selection || selection.isCollapsed || !event.clipboardData) return
  const fragment = selection.getRangeAt(0).cloneContents()
  const formulas = fragment.querySelectorAll("mjx-container[data-tex]")
  if (!formulas.length) return
  for (const formula of formulas) {
    const fence = formula.getAttribute("display") === "true" ? "$$" : "$"
    formula.replaceWith(fence + formula.dataset.tex + fence)
  }
  event.clipboardData.setData("text/plain", fragment.textContent)
  event.preventDefault()
})
