// 列出 math/render.mjs 所装的 MathJax 包认得的命令，一行一个：node macros.mjs node_modules > src/kbsite/check/macros.txt
import { join, resolve } from 'node:path';
import { pathToFileURL } from 'node:url';

const load = (path) => import(pathToFileURL(join(resolve(process.argv[2]), '@mathjax/src/mjs/input', path)).href);
const { TeX } = await load('tex.js');
for (const path of ['base/Base', 'ams/Ams', 'boldsymbol/Boldsymbol', 'cancel/Cancel', 'textmacros/TextMacros']) {
  await load(`tex/${path}Configuration.js`);
}
const tex = new TeX({ packages: ['base', 'ams', 'boldsymbol', 'cancel', 'textmacros'] });
const names = new Set();
for (const kind of ['macro', 'delimiter']) {
  for (const { item } of tex.parseOptions.handlers.get(kind)._configuration) {
    for (const name of item.map?.keys() ?? []) names.add(name.replace(/^\\/, ''));
  }
}
console.log([...names].filter((name) => /^[A-Za-z]+$/.test(name)).sort().join('\n'));
