// 请浏览器装上 service-worker.js。只在 https 的网站上：本机预览要总是看到刚改的页面，除非自己打开
// （localStorage 里写 kb.service-worker）。
;(() => {
  const root = new URL("../../", document.currentScript.src).href
  const workers = navigator.serviceWorker
  const asked = () => {
    try {
      return localStorage.getItem("kb.service-worker")
    } catch {
      return false
    }
  }
  if (!workers || !(location.protocol === "https:" || asked())) return

  // 第一次来时，它装好之前这一页已经取了许多东西：让没有经过它的再经手一遍，断网时第一页也在
  const seen = new Set()
  const again = (url) => {
    if (seen.has(url) || !url.startsWith(root)) return
    seen.add(url)
    // 读完它：没有读的回答会占住 Service Worker，新版本接不了手
    fetch(url)
      .then((response) => response.arrayBuffer())
      .catch(() => {})
  }
  const takenOver = () => {
    again(location.href)
    new PerformanceObserver((list) => {
      for (const entry of list.getEntries()) if (!entry.workerStart) again(entry.name)
    }).observe({ type: "resource", buffered: true })
  }
  if (!workers.controller) workers.addEventListener("controllerchange", takenOver, { once: true })
  addEventListener("load", () => workers.register(root + "service-worker.js").catch(() => {}))
})()
