// 断网时打开看过的页面。有网时一律先问网络：看到的与没有它时一样，只是顺手留一份。
// 同一个来源下可能有几个站（一个用户的 Pages），所以只管自己文件夹里的请求，缓存的名字带着文件夹。
const SCOPE = registration.scope
const CACHE = `kbsite ${SCOPE}`
const PATIENCE = 4000 // 毫秒：连着网却没有回音，等这么久就用留下的
const LIMIT = 400 // 最多留这么多个文件，多了先删最久没有取过的

// 用留下的页面打开的窗口：样式与脚本也用留下的，不必每个再等一遍
const fromCache = new Set()

// 新版本立刻接手；它不预存任何东西，没有新旧不配的问题
addEventListener("install", () => skipWaiting())
addEventListener("activate", (event) => event.waitUntil(clients.claim()))

addEventListener("fetch", (event) => {
  const { request } = event
  if (request.method !== "GET" || request.headers.has("range") || !request.url.startsWith(SCOPE)) return
  // 静态网站不看查询：计算器的状态、搜索的高亮都是同一页
  const key = request.url.split(/[?#]/)[0]
  if (key.endsWith(".zip")) return // 离线版自己就是一份
  const network = fetch(request)
  event.waitUntil(network.then((response) => keep(key, response.clone())).catch(() => {}))
  event.respondWith(answer(event, key, network))
})

async function answer({ request, clientId, resultingClientId }, key, network) {
  const page = request.mode === "navigate"
  const kept = await (await caches.open(CACHE)).match(key, { ignoreVary: true })
  if (!kept) return page ? network.catch(notice) : network
  if (!page && fromCache.has(clientId)) return kept // 新打开一页总是再问一次
  const response = await Promise.race([
    network.catch(() => kept),
    new Promise((resolve) => setTimeout(resolve, PATIENCE, kept)),
  ])
  if (page && response === kept) fromCache.add(resultingClientId)
  return response
}

async function keep(key, response) {
  const cache = await caches.open(CACHE)
  if (response.status === 404) await cache.delete(key)
  if (response.status !== 200 || response.redirected) return
  await cache.put(key, response) // 再放一次会排到最后：keys() 的顺序就是取过的先后
  const keys = await cache.keys()
  await Promise.all(keys.slice(0, -LIMIT).map((old) => cache.delete(old)))
}

// 没有网络，也没有留下这一页：说清楚，列出看过的页面
async function notice() {
  const cache = await caches.open(CACHE)
  const items = []
  for (const request of await cache.keys()) {
    if (!request.url.endsWith("/")) continue
    const title = (await (await cache.match(request)).text()).match(/<title>(.*?)<\/title>/)
    items.unshift(`<li><a href="${request.url}">${title[1]}</a></li>`)
  }
  const body = `<!doctype html><html lang="zh-Hans"><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'">
<meta name="viewport" content="width=device-width,initial-scale=1"><title>没有网络</title>
<style>:root{color-scheme:light dark}body{max-width:40rem;margin:2rem auto;padding:0 1rem;font:1rem/1.8 sans-serif}</style>
<h1>没有网络，这一页还没有打开过</h1>
<p>打开过的页面断网也能看，这一页不在其中。<a href="">再试一次</a>，或者先看这些：</p>
<ul>${items.join("")}</ul></html>`
  return new Response(body, { status: 503, headers: { "Content-Type": "text/html; charset=utf-8" } })
}
