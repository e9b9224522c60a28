// 常驻的排版进程：标准输入每行一个 {tex, display}，标准输出每行一个 {html, css} 或 {error}。
// 每个公式都先清空字形记录，于是 css 恰好是这个公式要用的规则；全站样式表是各公式规则的并集，
// 与排版的先后、与哪些公式来自缓存都无关。
import { createInterface } from 'node:readline';
import { join } from 'node:path';
import { pathToFileURL } from 'node:url';

const [modules] = process.argv.slice(2);
const load = (path) => import(pathToFileURL(join(modules, '@mathjax', path)).href);
const loadTex = (path) => load(`src/mjs/input/tex/${path}Configuration.js`);

const { mathjax } = await load('src/mjs/mathjax.js');
const { TeX } = await load('src/mjs/input/tex.js');
const { CHTML } = await load('src/mjs/output/chtml.js');
const { liteAdaptor } = await load('src/mjs/adaptors/liteAdaptor.js');
const { RegisterHTMLHandler } = await load('src/mjs/handlers/html.js');
const { AssistiveMmlHandler } = await load('src/mjs/a11y/assistive-mml.js');
const { MathJaxNewcmFont } = await load('mathjax-newcm-font/mjs/chtml.js');
for (const path of ['base/Base', 'ams/Ams', 'boldsymbol/Boldsymbol', 'cancel/Cancel', 'textmacros/TextMacros']) {
  await loadTex(path);
}

// 字体里不常用的字形（花体、双线体等）按需装入
mathjax.asyncLoad = (name) => load(name.replace(/^@mathjax\//, '').replace('newcm-font/js/', 'newcm-font/mjs/'));

const adaptor = liteAdaptor({ cjkCharWidth: 1 });
AssistiveMmlHandler(RegisterHTMLHandler(adaptor));
const tex = new TeX({
  // 不装 noundefined、noerrors（拼错的命令必须是构建错误），也不装 require、html、newcommand（页面不能夹带脚本与宏）
  packages: ['base', 'ams', 'boldsymbol', 'cancel', 'textmacros'],
  formatError: (_, error) => {
    throw error;
  },
});
const chtml = new CHTML({
  fontData: MathJaxNewcmFont,
  fontURL: 'fonts',
  displayOverflow: 'scroll',
});
const html = mathjax.document('', { InputJax: tex, OutputJax: chtml });

async function render({ tex: source, display }) {
  tex.reset();
  chtml.clearCache();
  const node = await html.convertPromise(source, { display, em: 16, ex: 8, containerWidth: 1e6 });
  const css = adaptor.textContent(chtml.styleSheet(html)).split('\n\n');
  return { html: adaptor.outerHTML(node), css };
}

for await (const line of createInterface({ input: process.stdin })) {
  let answer;
  try {
    answer = await render(JSON.parse(line));
  } catch (error) {
    answer = { error: String(error.message ?? error) };
  }
  process.stdout.write(JSON.stringify(answer) + '\n');
}
