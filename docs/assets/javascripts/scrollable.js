// 比屏幕宽的公式与表格在自己的框里滚动：键盘要能走到框上。不需要滚动的不占一次 Tab。
addEventListener("load", () => {
  const observer = new ResizeObserver((entries) => {
    for (const { target } of entries)
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0
      else target.removeAttribute("tabindex")
  })
  for (const box of document.querySelectorAll("article :is(mjx-container[display=true], table)")) observer.observe(box)
})
