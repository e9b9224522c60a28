// 页面里的计算器：算式是构建时由 SymPy 给出的一棵树，这里只求值、显示；状态写进地址，链接可以分享。
;(() => {
  const operations = {
    "+": (values) => values.reduce((a, b) => a + b),
    "*": (values) => values.reduce((a, b) => a * b),
    "^": ([base, power]) => base ** power,
  }
  const evaluate = (node, values) =>
    typeof node === "number" ? node
      : typeof node === "string" ? values[node]
        : operations[node[0]](node.slice(1).map((child) => evaluate(child, values)))

  const format = (value, unit, units) => {
    if (!Number.isFinite(value)) return "—"
    if (unit === "bytes") {
      for (const [decimal, binary, big, small] of units.bytes)
        if (value >= decimal) return `${(value / decimal).toFixed(2)} ${big}（${(value / binary).toFixed(2)} ${small}）`
      return `${(value / 1e3).toFixed(2)} KB（${(value / 1024).toFixed(2)} KiB）`
    }
    if (unit === "count") {
      const whole = Math.round(value).toLocaleString("en-US")
      for (const [scale, suffix] of units.count)
        if (value >= scale) return `${whole}（${(value / scale).toFixed(2)} ${suffix}）`
      return whole
    }
    if (unit === "seconds") {
      for (const [scale, suffix] of units.seconds)
        if (value >= scale) return `${(value / scale).toFixed(2)} ${suffix}`
      return value >= 1 ? `${Number(value.toPrecision(3))} 秒` : `${Number((value * 1e3).toPrecision(3))} 毫秒`
    }
    const [mantissa, exponent] = value.toExponential(2).split("e")
    return `${mantissa}×10^${Number(exponent)} FLOP`
  }

  for (const form of document.querySelectorAll(".kb-calculator")) {
    const { units, presets, scales, formulas } = JSON.parse(form.dataset.formulas)
    const fields = [...form.querySelectorAll("input[name], select[name]")].filter((field) => field.name !== "preset")
    const preset = form.elements.preset
    const defaults = Object.fromEntries(fields.map((field) => [field.name, field.value]))
    const key = (field) => `${form.dataset.name}.${field.name}`

    const set = (values) => {
      for (const [name, value] of Object.entries(values)) if (form.elements[name]) form.elements[name].value = value
    }
    const show = () => {
      const values = Object.fromEntries(fields.map((field) =>
        [field.name, field.type === "number" ? (field.checkValidity() && field.value !== "" ? Number(field.value) : NaN) : field.value]))
      for (const slider of form.querySelectorAll("input[type=range]")) {
        const value = values[slider.dataset.for]
        if (Number.isFinite(value)) slider.value = "log" in slider.dataset ? Math.log2(value) : value
      }
      const scaled = { ...values }
      for (const [name, scale] of Object.entries(scales)) scaled[name] *= scale
      for (const output of form.querySelectorAll("output")) {
        const row = formulas[output.name].find(([when]) => Object.entries(when).every(([name, value]) => values[name] === value))
        const value = evaluate(row[1], scaled)
        scaled[output.name] = value // 后面的结果可以用它
        output.dataset.value = value
        output.value = format(value, output.dataset.unit, units)
      }
      if (preset)
        preset.value = Object.keys(presets).find((name) =>
          Object.entries(presets[name]).every(([field, value]) => String(values[field]) === String(value))) ?? ""
    }
    const remember = () => {
      const query = new URLSearchParams(location.search)
      for (const field of fields)
        field.value === defaults[field.name] ? query.delete(key(field)) : query.set(key(field), field.value)
      const search = query.toString()
      try {
        history.replaceState(null, "", (search ? `?${search}` : location.pathname) + location.hash)
      } catch {
        // 有的浏览器不许 file:// 下的页面改地址；计算不受影响
      }
    }

    form.addEventListener("input", ({ target }) => {
      if (target === preset) set(presets[preset.value] ?? {})
      if (target.type === "range") {
        const value = Number(target.value)
        form.elements[target.dataset.for].value = "log" in target.dataset ? Math.round(2 ** value) : value
      }
      show()
      remember()
    })
    form.addEventListener("reset", () => setTimeout(() => { show(); remember() }))
    form.addEventListener("submit", (event) => event.preventDefault())

    const query = new URLSearchParams(location.search)
    const valid = (field, value) => field.tagName === "SELECT"
      ? [...field.options].some((option) => option.value === value)
      : value !== "" && Number.isFinite(Number(value))
    for (const field of fields) {
      const value = query.get(key(field))
      if (value !== null && valid(field, value)) field.value = value
    }
    show()
  }
})()
