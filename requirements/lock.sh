#!/usr/bin/env bash
# 由 *.in 生成带哈希的 *.txt；只写哈希，不写下载地址。torch 单列在 torch.txt：它的 CPU 版与平台有关。
# 用法：make lock（会自己装 pip-tools）
set -euo pipefail
cd "$(dirname "$0")"
compile() {
  # 已有的版本留着，只解析新加的与改过的；要升级就先删掉 *.txt
  if [ -f "$2.txt" ]; then cp "$2.txt" "$2.all"; fi
  "$1" -m piptools compile --quiet --generate-hashes --allow-unsafe --strip-extras --no-header \
    --no-emit-find-links --no-emit-index-url --no-emit-trusted-host --output-file "$2.all" "$2.in"
  # torch 的版本与哈希在 torch.txt 里手工维护
  awk '/^torch==/ {skip = 1; next} /^[^ ]/ {skip = 0} !skip' "$2.all" > "$2.txt"
  rm "$2.all"
}
for name in site test mutation generators; do compile "${1:?python}" "$name"; done
