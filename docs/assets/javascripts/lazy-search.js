// 主题在每次打开页面时就下载整个搜索索引，它比页面本身还大。这里把那一个请求推迟到搜索框得到焦点
// （或地址里带着查询、要加亮的词）的时候；别的请求不受影响。
;(() => {
  const wanted = new Promise((resolve) => {
    const address = new URLSearchParams(location.search)
    if (address.has("q") || address.has("h")) resolve()
    addEventListener("focusin", (event) => {
      if (event.target.matches("[data-md-component=search-query]")) resolve()
    })
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
})()
