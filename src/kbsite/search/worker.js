// 搜索的 worker：代替 Material 自带的那一个，消息相同（SETUP 0、READY 1、QUERY 2、RESULT 3）。
// 索引在构建时切成小片（index.mjs），这里只取这次查询用得到的几片；汉字按二字组匹配，不用词典。

const READY = 1
const QUERY = 2
const RESULT = 3

// 问法，不是内容。单个的「和」「与」只在独自成段时去掉：「饱和」「参与」里的不是虚词
const ASKING = /为什么|为何|怎么样|怎么|怎样|如何|什么是|是什么|什么|有哪些|哪些|多少|是不是|能不能|可以|吗|呢|的|了|请|一下|之间|^[是和与及跟在要会我]$/
// 几乎每页都有的说法：有就更好，没有也不要紧
const COMMON = new Set(
  "区别 原因 原理 对比 作用 方法 解决方法 缓解 推导 分析 解决 介绍 问题 参数 类型 公式 算法 优缺点 比较 差别 含义 过程 计算 目标 训练 代码 细节 实现 手撕".split(" "),
)
const PREFIXES = 40 // 一个没打完的词最多补成这么多个
const PREFIX_SHARDS = 6
const TYPO_SHARDS = 6
const CANDIDATES = 10 // 读几页的正文来定最后的次序，也就是最多列几页
const EXCERPT = 180

// ---- 装入 ----

// 本文件换在主题的 worker 的位置上；从 file:// 打开时它是 iframe 里的脚本
const script = typeof document === "undefined" ? location.href : document.currentScript.src
const base = new URL("../../../search/", script)
const loaded = new Map()
let directory

// 离线版的分片是脚本，由它们自己交来内容
self.kbLoaded = (name, content) => loaded.set(name, content)

async function fetched(name, options) {
  if (base.protocol === "file:") {
    loaded.delete(name)
    await importScripts(new URL(`${name}.js`, base).href)
    return loaded.get(name)
  }
  const response = await fetch(new URL(`${name}.json`, base), options)
  if (!response.ok) throw new Error(`${name}: ${response.status}`)
  return response.json()
}

async function open() {
  directory = await fetched("directory", { cache: "no-cache" })
  loaded.clear()
  directory.groups = directory.aliases.map((group) => group.map((name) => ({ name, ...matcher(name) })))
}

/** 一个分片或一页；同一个只取一次。 */
function load(name) {
  if (!loaded.has(name)) {
    const promise = fetched(`${directory.version}/${name}`)
    promise.catch(() => loaded.delete(name))
    loaded.set(name, promise)
  }
  return loaded.get(name)
}

const shard = (number) => load(`t${number}`)

/** 词的记录 {count, ids, levels}；没有就是 undefined。 */
async function postings(term) {
  const terms = await shard(shardOf(directory.firsts, term))
  return Object.hasOwn(terms, term) ? unpack(terms[term]) : undefined
}

const unpacked = new WeakMap()
function unpack(flat) {
  if (!unpacked.has(flat)) {
    const ids = []
    const levels = []
    for (let i = 1, last = 0; i < flat.length; i += 2) {
      ids.push((last += flat[i]))
      levels.push(flat[i + 1] / 255)
    }
    unpacked.set(flat, { count: flat[0], ids, levels })
  }
  return unpacked.get(flat)
}

const idf = (count) => Math.log(1 + (directory.sections - count + 0.5) / (count + 0.5))

// ---- 查询 → 单元 ----
// 一个单元是查询里的一段汉字或一个拉丁词；它的每个说法（原样、别名）是一串须同时出现的片段

const partOf = ({ text, han }) => ({ text, han, terms: han ? bigrams(text) : [] })

function parse(query) {
  const found = pieces(query)
  const units = found.flatMap((piece) => {
    const texts = piece.han ? piece.text.split(ASKING).filter(Boolean) : [piece.text]
    return texts.map((text) => unitOf(text, piece))
  })
  // 只有问法（「为什么」）时就找它自己
  if (!units.length) units.push(...found.map((piece) => unitOf(piece.text, piece)))
  const whole = ` ${fold(query).toLowerCase().replace(/\s+/g, " ")} `
  const tight = compact(query)
  for (const group of directory.groups) addAliases(units, group, whole, tight)
  return units
}

function unitOf(text, { han, joined }) {
  const weight = COMMON.has(text) ? 0.35 : !han && text.length === 1 ? 0.5 : 1
  return { text, han, joined, weight, wordings: [[partOf({ text, han })]] }
}

/** 别名在查询里怎么认：汉字看连写里有没有，拉丁词要整词。 */
function matcher(name) {
  const tight = compact(name)
  if (/\p{sc=Han}/u.test(name)) return { tight, found: (_, query) => query.includes(tight) }
  const words = fold(name).toLowerCase().match(/[a-z0-9]+/g) ?? []
  const pattern = new RegExp(`(^|[^a-z0-9])${words.join("[^a-z0-9]*")}($|[^a-z0-9])`)
  return { tight, found: (whole) => words.length > 0 && pattern.test(whole) }
}

/** 查询里有这一组的哪个说法，就把其余的说法加给它盖住的单元。 */
function addAliases(units, group, whole, tight) {
  const hit = group.filter((alias) => alias.tight.length > 1 && alias.found(whole, tight))
    .sort((a, b) => b.tight.length - a.tight.length)[0]
  if (!hit) return
  const covered = units.filter((unit) => {
    const text = compact(unit.text)
    return text && (hit.tight.includes(text) || (unit.han && text.includes(hit.tight)))
  })
  if (!covered.length) return
  const [first, ...rest] = covered
  for (const alias of group) if (alias !== hit) first.wordings.push(pieces(alias.name).map(partOf))
  for (const unit of rest) unit.within = first
}

// ---- 打分 ----

/** 拉丁词 → [实际有的词, 折扣]：原词、没打完的、打错的。 */
async function expansions(word) {
  const { firsts } = directory
  const start = shardOf(firsts, word)
  const found = []
  let exact
  for (let i = start; i < firsts.length && i < start + PREFIX_SHARDS && (i === start || firsts[i].startsWith(word)); i++) {
    for (const [term, flat] of Object.entries(await shard(i))) {
      if (term === word) exact = flat[0]
      else if (word.length > 1 && term.startsWith(word) && found.length < PREFIXES) found.push(term)
    }
  }
  const out = found.map((term) => [term, (exact ? 0.45 : 0.8) * Math.sqrt(word.length / term.length)])
  if (exact) out.unshift([word, 1])
  // 只在一两处出现的写法多半也是笔误（笔记的原标题里就有），照样找相近的词
  if (word.length > 4 && found.length < 3 && (exact ?? 0) < 3) {
    for (const [term, distance] of await similar(word)) out.push([term, distance === 1 ? 0.7 : 0.45])
  }
  // 「6ND」这样数字与字母连写、全站又没有的：分开找
  const parts = word.match(/[a-z]+|\d+/g)
  if (!out.length && parts.length > 1) for (const part of parts) if (await postings(part)) out.push([part, 0.5])
  return out
}

/** 差一两个字母的词；头一个字母须对，先看头两个字母也对的那几片。 */
async function similar(word) {
  const { firsts } = directory
  const allowed = word.length > 7 ? 2 : 1
  const range = (prefix) => {
    const from = shardOf(firsts, prefix)
    return Array.from({ length: shardOf(firsts, `${prefix}\uffff`) - from + 1 }, (_, i) => from + i)
  }
  const numbers = [...new Set([...range(word.slice(0, 2)), ...range(word[0])])].slice(0, TYPO_SHARDS)
  const found = []
  for (const terms of await Promise.all(numbers.map(shard))) {
    for (const term of Object.keys(terms)) {
      if (term[0] !== word[0] || term.length < 4 || term === word) continue
      const distance = editDistance(word, term, allowed)
      if (distance <= allowed) found.push([term, distance])
    }
  }
  return found
}

/** 增、删、改、相邻交换各算一步；超过 limit 就返回比它大的数。 */
function editDistance(a, b, limit) {
  if (Math.abs(a.length - b.length) > limit) return limit + 1
  let before = []
  let previous = Array.from({ length: b.length + 1 }, (_, i) => i)
  for (let i = 1; i <= a.length; i++) {
    const row = [i]
    for (let j = 1; j <= b.length; j++) {
      row[j] = Math.min(previous[j] + 1, row[j - 1] + 1, previous[j - 1] + (a[i - 1] !== b[j - 1]))
      if (i > 1 && j > 1 && a[i - 1] === b[j - 2] && a[i - 2] === b[j - 1]) row[j] = Math.min(row[j], before[j - 2] + 1)
    }
    if (Math.min(...row) > limit) return limit + 1
    before = previous
    previous = row
  }
  return previous[b.length]
}

/** 片段 → 各节的 {score, share}；share 是命中了它的几分之几。 */
async function scorePart(part) {
  const scores = new Map()
  const keep = (id, score, share) => {
    const old = scores.get(id)
    if (!old || old.score < score) scores.set(id, { score, share })
  }
  if (!part.han || part.terms[0].length === 1) {
    const words = part.han ? await startingWith(part.text) : await expansions(part.text)
    const entries = await Promise.all(words.map(([term]) => postings(term)))
    // 没打完的词要的是它们全体，稀罕的补法不比常见的更像；打全了就以原词的为准
    const common = words[0]?.[0] === part.text ? entries[0].count : entries.reduce((sum, { count }) => sum + count, 0)
    for (const [i, [, factor]] of words.entries()) {
      const found = entries[i]
      const rarity = Math.min(idf(found.count), idf(Math.min(common, directory.sections))) * factor
      found.ids.forEach((id, at) => keep(id, rarity * found.levels[at], factor > 0.4 ? 1 : 0.7))
    }
    return scores
  }
  const found = await Promise.all(part.terms.map(postings))
  // 全站没有的二字组（错字、词与词的接缝）分不出高下，只算一点
  const known = found.flatMap((entry) => (entry ? [idf(entry.count)] : []))
  const missing = (0.3 * known.reduce((sum, value) => sum + value, 0)) / Math.max(1, known.length)
  const rarity = found.map((entry) => (entry ? idf(entry.count) : missing))
  const total = rarity.reduce((sum, value) => sum + value, 0)
  found.forEach((entry, i) => entry?.ids.forEach((id, at) => {
    const old = scores.get(id) ?? { score: 0, share: 0 }
    scores.set(id, { score: old.score + rarity[i] * entry.levels[at], share: old.share + rarity[i] / total })
  }))
  for (const entry of scores.values()) entry.score *= entry.share ** 1.5 / Math.sqrt(part.terms.length)
  return scores
}

/** 只打了一个汉字：以它开头的二字组。 */
async function startingWith(han) {
  const number = shardOf(directory.firsts, han)
  const shards = await Promise.all([number, number + 1].filter((i) => i < directory.firsts.length).map(shard))
  const terms = shards.flatMap((terms) => Object.keys(terms).filter((term) => term.startsWith(han)))
  return terms.slice(0, 200).map((term) => [term, 0.6])
}

/** 一种说法 → 各节的 {score, share}；它的各个片段须在同一节里。 */
async function scoreWording(wording) {
  const [first, ...rest] = await Promise.all(wording.map(scorePart))
  return rest.reduce((together, scores) => {
    const both = new Map()
    for (const [id, a] of together) {
      const b = scores.get(id)
      if (b) both.set(id, { score: 0.7 * (a.score + b.score), share: Math.min(a.share, b.share) })
    }
    return both
  }, first ?? new Map())
}

/** 单元 → 各节的 {score, share}：各种说法里最好的一种；别名说的是同一件事，不比原词更值钱。 */
async function scoreUnit(unit) {
  const [original, ...aliases] = await Promise.all(unit.wordings.map(scoreWording))
  const highest = (scores) => Math.max(0, ...[...scores.values()].map(({ score }) => score))
  const best = new Map(original)
  const limit = highest(original)
  for (const scores of aliases) {
    const factor = 0.85 * Math.min(1, limit ? limit / highest(scores) : 1)
    for (const [id, { score, share }] of scores) {
      if (!best.has(id) || best.get(id).score < factor * score) best.set(id, { score: factor * score, share })
    }
  }
  const joined = unit.joined && (await postings(unit.joined))
  joined?.ids.forEach((id, i) => {
    const old = best.get(id) ?? { score: 0, share: 1 }
    best.set(id, { score: old.score + 0.6 * idf(joined.count) * joined.levels[i], share: old.share })
  })
  return best
}

const pageOf = (id) => Math.floor(id / SECTIONS)

/** 各节的总分：{页号: {节号: 分}}，还没有看正文。 */
async function scoreSections(units) {
  const found = await Promise.all(units.map(scoreUnit))
  const sections = new Map()
  const onPage = new Map()
  found.forEach((scores, i) => {
    units[i].scores = scores
    for (const [id, { score, share }] of scores) {
      if (!sections.has(id)) sections.set(id, { score: 0, covered: units.map(() => 0) })
      const section = sections.get(id)
      section.score += units[i].weight * score
      section.covered[i] = Math.min(1, share)
      if (!onPage.has(pageOf(id))) onPage.set(pageOf(id), new Set())
      onPage.get(pageOf(id)).add(i)
    }
  })
  const total = units.reduce((sum, unit) => sum + unit.weight, 0)
  const pages = new Map()
  for (const [id, { score, covered }] of sections) {
    const coverage = units.reduce((sum, unit, i) => {
      const share = covered[i] || (unit.within && covered[units.indexOf(unit.within)])
      return sum + unit.weight * (share || (onPage.get(pageOf(id)).has(i) ? 0.5 : 0))
    }, 0) / total
    if (!pages.has(pageOf(id))) pages.set(pageOf(id), new Map())
    pages.get(pageOf(id)).set(id % SECTIONS, score * Math.sqrt(Math.min(1, coverage)))
  }
  return pages
}

/** 一页的分：最好的一节，再加一点随后的几节。 */
function pageScore(scores) {
  const [best, ...rest] = [...scores.values()].sort((a, b) => b - a)
  return best + 0.12 * rest.slice(0, 4).reduce((sum, score) => sum + score, 0)
}

const byScore = (a, b) => b.score - a.score

async function search(query) {
  if (!directory) await open()
  const units = parse(query)
  if (!units.length) return { items: [] }
  const candidates = [...await scoreSections(units)]
    .map(([number, scores]) => ({ number, scores, score: pageScore(scores) }))
    .sort(byScore)
    .slice(0, CANDIDATES)
  const pages = await Promise.all(candidates.map(({ number }) => load(`p${number}`)))
  const phrase = compact(query)
  const words = units.map((unit) => compact(unit.text)).filter((word) => word.length > 1)
  for (const [i, candidate] of candidates.entries()) {
    const page = flatten(pages[i])
    for (const [number, score] of candidate.scores) candidate.scores.set(number, score * bonus(page, number, phrase, words))
    Object.assign(candidate, { page, score: pageScore(candidate.scores) })
  }
  const marks = marker(units)
  return { items: candidates.sort(byScore).map((candidate) => items(candidate, units, marks)) }
}

/** 给一页的各节备好连写的标题与正文；标签也是页面的名字。 */
function flatten(page) {
  page.flat ??= page.sections.map(([anchor, title, prose]) => ({
    names: [title, ...(anchor ? [] : page.tags)].map(compact),
    prose: compact(prose),
  }))
  return page
}

/** 加分的倍数：整句就是标题或标签、占了它多大一部分、是不是在开头；在正文里；标题里有查询的几个词。 */
function bonus(page, number, phrase, words) {
  const { names, prose } = page.flat[number]
  const within = (names, word) => names.some((name) => name.includes(word))
  let factor = 1
  if (phrase.length > 1) {
    factor += Math.max(prose.includes(phrase) ? 0.3 : 0, ...names.filter((name) => name.includes(phrase))
      .map((name) => 0.4 + (0.6 * phrase.length) / name.length + (name.startsWith(phrase) ? 0.1 : 0)))
  }
  const named = words.map((word) => (within(names, word) ? 1 : within(page.flat[0].names, word) ? 0.5 : 0))
  return factor + (0.5 * named.reduce((sum, value) => sum + value, 0)) / Math.max(1, named.length)
}

// ---- 结果 ----

const escaped = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;")
const SYMBOLS = new Map()
for (const [symbol, name] of Object.entries(NAMES)) SYMBOLS.set(name, [...(SYMBOLS.get(name) ?? []), symbol])

/** 匹配要加亮的词：查询里的、别名里的、名字写成的符号。 */
function marker(units) {
  const whole = []
  const pairs = []
  for (const unit of units) {
    for (const part of unit.wordings.flat()) {
      if (part.text.length > 1 || units.length === 1) whole.push(part.text)
      whole.push(...(SYMBOLS.get(part.text) ?? []))
    }
    for (const part of unit.wordings[0]) if (part.han && part.text.length > 2) pairs.push(...part.terms)
  }
  const words = [...new Set(whole)].sort((a, b) => b.length - a.length).concat(pairs)
  return words.length ? new RegExp(words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&")).join("|"), "gi") : null
}

function highlighted(text, marks) {
  if (!marks) return escaped(text)
  let out = ""
  let end = 0
  for (const match of text.matchAll(marks)) {
    out += `${escaped(text.slice(end, match.index))}<mark data-md-highlight>${escaped(match[0])}</mark>`
    end = match.index + match[0].length
  }
  return out + escaped(text.slice(end))
}

/** 命中最密的一段，从一句的开头起。 */
function excerpt(text, marks) {
  let start = 0
  if (marks && text.length > EXCERPT) {
    const hits = [...text.matchAll(marks)].slice(0, 400).map((match) => [match.index, match[0].length])
    let most = 0
    for (const [from] of hits) {
      const weight = hits.reduce((sum, [at, size]) => sum + (at >= from && at < from + 140 ? size : 0), 0)
      if (weight > most) [most, start] = [weight, from]
    }
    const sentence = Math.max(...[..."。；！？"].map((stop) => text.lastIndexOf(stop, start - 1))) + 1
    start = Math.min(start - sentence < 50 ? sentence : Math.max(0, start - 30), text.length - EXCERPT)
  }
  const end = start + EXCERPT
  return `${start ? "…" : ""}${highlighted(text.slice(start, end).trim(), marks)}${end < text.length ? "…" : ""}`
}

/** 一页的结果：页面自己，与命中的各节（与最好的一节相差不远的直接列出，其余折起）。 */
function items({ number, page, scores }, units, marks) {
  const ranked = [...scores].map(([section, score]) => ({ section, score })).sort(byScore).slice(0, 8)
  const best = ranked[0].score
  const out = ranked.map(({ section, score }) => item(number, page, section, score >= 0.55 * best ? best : score, units, marks))
  if (!ranked.some(({ section }) => section === 0)) out.push(item(number, page, 0, 0, units, marks))
  return out
}

function item(number, page, section, score, units, marks) {
  const [anchor, title, prose] = page.sections[section]
  // 页面据此列出「缺少」的词，也据此在打开的页面里加亮；单个字母到处都是，不加
  const terms = {}
  for (const unit of units) {
    if (unit.han || unit.text.length > 1) terms[unit.text] = unit.scores.has(number * SECTIONS + section)
  }
  return {
    location: page.url + (anchor && `#${anchor}`),
    title: highlighted(title, marks),
    text: prose && `<p>${excerpt(prose, marks)}</p>`,
    score,
    terms: score > 0 ? terms : {},
    ...(section || !page.tags.length ? {} : { tags: page.tags }),
  }
}

// ---- 消息 ----

let latest = 0
self.addEventListener("message", async ({ data: message }) => {
  if (message.type === 0) {
    // 目录很小，搜索框得到焦点时就去取；取不到时等到查询再试
    open().catch(() => {}).finally(() => postMessage({ type: READY }))
  } else if (message.type === QUERY) {
    const number = ++latest
    // 打得快时排着好几键：先让它们都到，只查最后一键
    await new Promise((resolve) => setTimeout(resolve))
    if (number !== latest) return
    let data
    try {
      data = await search(message.data)
    } catch (error) {
      // 站点更新过，旧的分片不在了：换新目录再试一次
      try {
        await open()
        data = await search(message.data)
      } catch {
        console.warn(error)
        data = { items: [[{ location: "", title: "搜索的数据没有取到", text: "<p>检查网络，再打一个字就会重试。</p>", score: 1, terms: {} }]] }
      }
    }
    if (number === latest) postMessage({ type: RESULT, data })
  }
})
