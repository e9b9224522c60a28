// 主题的搜索框上补两件事，须在主题的脚本之前装上。
;(() => {
  const isBox = (target) => target.matches?.("[data-md-component=search-query]")

  // 一，主题在每次打开页面时就取搜索的配置、让 worker 去取目录。推迟到搜索框得到焦点
  // （或地址里带着查询、要加亮的词）的时候；别的请求不受影响
  const wanted = new Promise((resolve) => {
    const address = new URLSearchParams(location.search)
    if (address.has("q") || address.has("h")) resolve()
    addEventListener("focusin", ({ target }) => isBox(target) && resolve())
  })
  const { open, send } = XMLHttpRequest.prototype
  const waiting = new WeakSet()
  XMLHttpRequest.prototype.open = function (method, url, ...rest) {
    if (String(url).endsWith("/search/search_index.json")) waiting.add(this)
    return open.call(this, method, url, ...rest)
  }
  XMLHttpRequest.prototype.send = function (...body) {
    if (waiting.delete(this)) wanted.then(() => send.apply(this, body))
    else send.apply(this, body)
  }

  // 二，主题只在松开按键时读搜索框；手机的输入法、粘贴、语音没有按键
  addEventListener("input", ({ target }) => isBox(target) && target.dispatchEvent(new Event("keyup")))
})()
