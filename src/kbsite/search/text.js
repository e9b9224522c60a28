// 检索的文字处理：建索引（Node）与查询（浏览器的 worker）用同一份，两边切出来的词就不会不一致。
"use strict"

// 符号 → 人在搜索框里会打的名字。希腊字母与 TeX 命令（\epsilon）归到同一个词
const NAMES = {
  α: "alpha", β: "beta", γ: "gamma", Γ: "gamma", δ: "delta", Δ: "delta", ε: "epsilon", ϵ: "epsilon",
  ζ: "zeta", η: "eta", θ: "theta", ϑ: "theta", Θ: "theta", κ: "kappa", λ: "lambda", Λ: "lambda", μ: "mu",
  ν: "nu", ξ: "xi", π: "pi", Π: "prod", ρ: "rho", σ: "sigma", Σ: "sum", τ: "tau", φ: "phi", ϕ: "phi",
  Φ: "phi", χ: "chi", ψ: "psi", Ψ: "psi", ω: "omega", Ω: "omega",
  "∑": "sum", "∏": "prod", "√": "sqrt", 根号: "sqrt", "∇": "nabla", "∞": "infty", "∂": "partial",
}
const NAMED = new RegExp(Object.keys(NAMES).join("|"), "g")
// 只管排版的 TeX 命令：打了等于没打
const LAYOUT = new Set(
  ("left right big bigl bigr bigg frac dfrac tfrac text mathrm mathbf mathbb mathcal operatorname boldsymbol " +
    "hat tilde bar begin end aligned cdot quad qquad top").split(" "),
)
const PIECE = /(?<han>\p{sc=Han}+)|(?<latin>[A-Za-z][A-Za-z0-9]*|\d+[A-Za-z0-9]*)/gu
// 中间只隔这些时，两个拉丁词也合成一个：flash attention、d_k、ZeRO-3、KV cache
const JOINT = /^(|[ \-_./]|_\{|\^\{?)$/
const JOINED_LENGTH = 24
// 一节的编号 = 页号 × SECTIONS + 页内第几节
const SECTIONS = 256

/** 全角归半角、符号换成名字；不改大小写（驼峰要用）。 */
function fold(text) {
  return text.normalize("NFKC").replace(/\u200b/g, "").replace(NAMED, (symbol) => ` ${NAMES[symbol]} `)
}

/** 只留字与数：比较「整句出现过没有」时用。 */
function compact(text) {
  return fold(text).toLowerCase().replace(/[^\p{L}\p{N}+<>=]/gu, "")
}

/** 一段汉字的各个二字组；只有一个字时就是它自己。 */
function bigrams(han) {
  return han.length < 2 ? [han] : Array.from({ length: han.length - 1 }, (_, i) => han.slice(i, i + 2))
}

/** 汉字段与拉丁词（小写），按出现的顺序：{text, raw, han, joined}；joined 是与前一个拉丁词合成的词。 */
function pieces(text) {
  const folded = fold(text)
  const found = []
  let previous = null
  for (const match of folded.matchAll(PIECE)) {
    const raw = match[0]
    if (match.groups.han) {
      found.push({ text: raw, han: true })
      previous = null
      continue
    }
    const word = raw.toLowerCase()
    if (folded[match.index - 1] === "\\" && LAYOUT.has(word)) continue
    const piece = { text: word, raw, han: false, end: match.index + raw.length }
    if (previous && JOINT.test(folded.slice(previous.end, match.index))) {
      if (previous.text.length + word.length <= JOINED_LENGTH) piece.joined = previous.text + word
    }
    found.push(piece)
    previous = piece
  }
  return found
}

/** 建索引用的词与各自的分量：整词 1，合成的词、驼峰与字母数字的各部分少些。 */
function indexTerms(text, emit) {
  for (const piece of pieces(text)) {
    if (piece.han) {
      for (const pair of bigrams(piece.text)) emit(pair, 1)
      continue
    }
    emit(piece.text, 1)
    if (piece.joined) emit(piece.joined, 0.8)
    const parts = new Set([
      ...(piece.raw.match(/[A-Z]+(?![a-z])|[A-Z]?[a-z]+/g) ?? []).filter((part) => part.length > 2),
      ...(piece.raw.match(/[A-Za-z]+|\d+/g) ?? []).filter((part) => part.length > 1),
    ].map((part) => part.toLowerCase()))
    parts.delete(piece.text)
    for (const part of parts) emit(part, 0.6)
  }
}

/** 词落在第几个分片；`firsts` 是各分片的第一个词，升序。 */
function shardOf(firsts, term) {
  let low = 0
  let high = firsts.length
  while (low < high) {
    const middle = (low + high) >> 1
    if (firsts[middle] <= term) low = middle + 1
    else high = middle
  }
  return Math.max(0, low - 1)
}
