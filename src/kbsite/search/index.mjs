// 建检索索引：标准输入是 {pages, aliases}，参数是输出目录与是否离线；写出目录、各分片与各页的正文。
// 词按字典序切成差不多大的分片，查询只取用得到的几片，页数再多一次查询的字节也不变。
import { createHash } from "node:crypto"
import { mkdirSync, readFileSync, writeFileSync } from "node:fs"
import { join } from "node:path"
import vm from "node:vm"

const [target, offline] = process.argv.slice(2)
vm.runInThisContext(readFileSync(new URL("text.js", import.meta.url), "utf8"))
const { pages, aliases } = JSON.parse(readFileSync(0, "utf8"))

const WEIGHT = { page: 2, prose: 1, code: 0.3 }
// 标题的权重按级别：页面、二级、三级、追问
const TITLE = [8, 6, 5, 4]
// 长度归一的程度（BM25 的 b）
const NORM = { title: 0.3, page: 0.3, prose: 0.6, code: 0.6 }
const SATURATION = 1.4
const LEVELS = 255
// 一个词最多记这么多节（分量大的在先）：查询的代价与页数无关
const POSTINGS = 1000
const SHARD_BYTES = 24_000

const fieldsOf = (page, section, first) => ({
  title: [section.title, ...(first ? page.tags : [])].join(" "),
  page: first ? "" : page.title,
  prose: section.prose,
  code: section.code,
})

const length = { title: 0, page: 0, prose: 0, code: 0 }
let count = 0
for (const page of pages) {
  if (page.sections.length > SECTIONS) throw new Error(`${page.url} 有 ${page.sections.length} 节，索引最多记 ${SECTIONS} 节。拆开这一页。`)
  page.sections.forEach((section, i) => {
    count++
    for (const [field, text] of Object.entries(fieldsOf(page, section, i === 0))) length[field] += text.length
  })
}

/** 一个词的各节：编号与分量交替排列（页数多时省内存），超出太多就先减到分量最大的 POSTINGS 个。 */
class Postings {
  count = 0
  flat = []

  add(id, level) {
    this.count++
    this.flat.push(id, level)
    if (this.flat.length > 8 * POSTINGS) this.prune()
  }

  prune() {
    const pairs = []
    for (let i = 0; i < this.flat.length; i += 2) pairs.push([this.flat[i], this.flat[i + 1]])
    this.flat = pairs.sort((a, b) => b[1] - a[1]).slice(0, POSTINGS).sort((a, b) => a[0] - b[0]).flat()
  }

  /** [含它的节数, 编号之差, 分量, 编号之差, 分量, …] */
  pack() {
    if (this.flat.length > 2 * POSTINGS) this.prune()
    return [this.count, ...this.flat.map((value, i) => (i % 2 ? value : value - (this.flat[i - 2] ?? 0)))]
  }
}

const postings = new Map()
pages.forEach((page, number) => {
  page.sections.forEach((section, i) => {
    const weights = new Map()
    for (const [field, text] of Object.entries(fieldsOf(page, section, i === 0))) {
      const norm = 1 - NORM[field] + (NORM[field] * text.length * count) / Math.max(1, length[field])
      const weight = (field === "title" ? TITLE[section.level - 1] : WEIGHT[field]) / norm
      indexTerms(text, (term, share) => weights.set(term, (weights.get(term) ?? 0) + share * weight))
    }
    for (const [term, weight] of weights) {
      const level = Math.round((LEVELS * page.boost * weight) / (SATURATION + weight))
      if (!postings.has(term)) postings.set(term, new Postings())
      postings.get(term).add(number * SECTIONS + i, Math.min(LEVELS, Math.max(1, level)))
    }
  })
})

const shards = []
const firsts = [] // 各片的第一个词；不能从对象的键取，数字样的键会排到前面
let size = SHARD_BYTES
for (const term of [...postings.keys()].sort()) {
  const packed = postings.get(term).pack()
  if (size >= SHARD_BYTES) {
    shards.push({})
    firsts.push(term)
    size = 0
  }
  shards.at(-1)[term] = packed
  size += JSON.stringify(packed).length + term.length + 4
}

const texts = pages.map(({ url, title, tags, sections }) => ({
  url, title, tags, sections: sections.map(({ anchor, title, prose }) => [anchor, title, prose]),
}))
const hash = createHash("sha256")
for (const part of [...shards, ...texts]) hash.update(JSON.stringify(part))
const version = hash.digest("hex").slice(0, 12)

// 从 file:// 打开时 worker 不能 fetch，只能装入脚本：离线版把同样的内容包成一次调用
const write = (name, content) => {
  const json = JSON.stringify(content)
  if (offline === "true") writeFileSync(join(target, `${name}.js`), `kbLoaded(${JSON.stringify(name)},${json})`)
  else writeFileSync(join(target, `${name}.json`), json)
}
mkdirSync(join(target, version), { recursive: true })
shards.forEach((shard, i) => write(`${version}/t${i}`, shard))
texts.forEach((text, i) => write(`${version}/p${i}`, text))
write("directory", { version, sections: count, firsts, aliases })
writeFileSync(join(target, "worker.js"), ["text.js", "worker.js"].map((name) => readFileSync(new URL(name, import.meta.url), "utf8")).join("\n"))
