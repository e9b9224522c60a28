# ---
# jupyter:
#   jupytext:
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # MCP 和 function calling 的区别：实验
#
# 页面 `docs/systems/mcp-vs-function-calling.md` 的实验：真的起一个 MCP 服务端进程，记下两个修订版各发了哪些消息，再把工具清单换成函数调用的格式。

# %%
#| label: setup
import asyncio
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path

import mcp_types as types
from IPython.display import Markdown
from mcp import Client, StdioServerParameters
from mcp.client import session as mcp_session
from mcp.client.stdio import stdio_client
from mcp.shared.exceptions import MCPError
from tabulate import tabulate

from snippets.systems import mcp_server
from snippets.systems.mcp_vs_function_calling import (
    call_result_to_message,
    json_rpc_request,
    reply_kind,
    request_meta,
    tool_call_to_request,
    tools_to_function_schemas,
)

ROOT = str(Path(mcp_server.__file__).parents[2])  # 子进程要能导入 snippets
COMMAND = [sys.executable, "-m", "snippets.systems.mcp_server"]
ENVIRONMENT = os.environ | {"PYTHONPATH": ROOT}
# 客户端等探测的回复只等 10 s，过后就退回旧版；机器忙时服务端起得慢，多等一会儿，结果才不随快慢变
mcp_session.DISCOVER_TIMEOUT_SECONDS = 120.0
META = request_meta(client="demo", version="1.0")


class Recorder:
    """套在 SDK 的读流或写流外面，经过的每条消息都记一份。"""

    def __init__(self, stream, arrow, log):
        self.stream, self.arrow, self.log = stream, arrow, log

    def note(self, item):
        text = item.message.model_dump_json(by_alias=True, exclude_unset=True)  # SDK 写进管道的就是这一串
        self.log.append((self.arrow, json.loads(text)))
        return item

    async def send(self, item):
        await self.stream.send(self.note(item))

    async def receive(self):
        return self.note(await self.stream.receive())

    def __aiter__(self):
        return self

    async def __anext__(self):
        return self.note(await self.stream.__anext__())

    async def aclose(self):
        await self.stream.aclose()

    async def __aenter__(self):
        return self

    async def __aexit__(self, *error):
        await self.aclose()


async def talk(mode, actions):
    """用官方客户端连上一个新的服务端进程，依次做完 actions；返回协商出的版本、每步的结果、全部消息。"""
    log = []

    @asynccontextmanager
    async def transport():
        parameters = StdioServerParameters(command=COMMAND[0], args=COMMAND[1:], env=ENVIRONMENT)
        with open(os.devnull, "w") as devnull:
            async with stdio_client(parameters, errlog=devnull) as (read, write):
                yield Recorder(read, "←", log), Recorder(write, "→", log)

    info = types.Implementation(name="demo", version="1.0")
    results = {}
    async with Client(transport(), mode=mode, client_info=info) as client:
        for name, action in actions.items():
            try:
                results[name] = await action(client)
            except MCPError as error:
                results[name] = error
        return client.session.protocol_version, results, log


def run(coroutine):
    """在另一个线程里跑事件循环：笔记的内核自己已经有一个。"""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(asyncio.run, coroutine).result()


def first_words(*messages):
    """起一个新进程，不经 SDK，逐行写入 JSON；返回每个请求的回复。"""
    replies = []
    with subprocess.Popen(
        COMMAND,
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        encoding="utf-8",
    ) as process:
        for message in messages:
            process.stdin.write(json.dumps(message) + "\n")
            process.stdin.flush()
            if "id" in message:
                replies.append(json.loads(process.stdout.readline()))
    return replies


def pretty(value, indent=0, used=0, width=54):
    """短的写在一行，长的展开：手机上少横着滚。"""
    text = json.dumps(value, ensure_ascii=False)
    if not value or not isinstance(value, dict | list) or len(text) + indent + used <= width:
        return text
    pad = " " * (indent + 2)
    if isinstance(value, list):
        rows = [pad + pretty(item, indent + 2) for item in value]
    else:
        rows = [f'{pad}"{key}": {pretty(item, indent + 2, len(key) + 4)}' for key, item in value.items()]
    left, right = "[]" if isinstance(value, list) else "{}"
    return left + "\n" + ",\n".join(rows) + "\n" + " " * indent + right


def json_block(value):
    assert json.loads(pretty(value)) == value
    return "```json\n" + pretty(value) + "\n```"


# %%
#| label: wire-trace
#| caption: 同一个服务端、同一个客户端库，按两个修订版各列一次工具、调一次工具，线上真正经过的消息
#| echo: fold
STEPS = {
    "清单": lambda client: client.list_tools(),
    "`divide(7, 2)`": lambda client: client.call_tool("divide", {"a": 7, "b": 2}),
}
# 同一个连接上接着做的事，留给后面的两个单元
LATER = {
    "`divide(7, 0)`": lambda client: client.call_tool("divide", {"a": 7, "b": 0}),
    "`b` 写成「两」": lambda client: client.call_tool("divide", {"a": 7, "b": "两"}),
    "没有的工具": lambda client: client.call_tool("multiply", {"a": 7, "b": 2}),
    "没有的方法": lambda client: client.session.send_request(
        types.Request(method="tools/run", params=None), types.EmptyResult
    ),
    "资源清单": lambda client: client.list_resources(),
    "资源": lambda client: client.read_resource("docs://rounding"),
    "提示模板清单": lambda client: client.list_prompts(),
    "提示模板": lambda client: client.get_prompt("explain", {"a": "7", "b": "2"}),
}
modern_version, modern_results, everything = run(talk("auto", STEPS | LATER))
legacy_version, legacy_results, legacy = run(talk("legacy", STEPS))
end = 1 + max(i for i, (_, m) in enumerate(everything) if m.get("id") == 3)
modern = everything[:end]  # 探测、列一次、调一次为止
assert (modern_version, legacy_version) == ("2026-07-28", "2025-11-25")
for results in (modern_results, legacy_results):
    assert results["`divide(7, 2)`"].structured_content == {"result": 3.5}


def brief(entry):
    arrow, message = entry
    if "method" in message:
        has_meta = "_meta" in message.get("params", {})
        kind = "" if "id" in message else "（通知，无 id）"
        return f"{arrow} `{message['method']}`{' ＋ `_meta`' if has_meta else kind}"
    return f"{arrow} " + "、".join(f"`{key}`" for key in sorted(message["result"]) if key != "_meta")


left, right = [brief(entry) for entry in modern], [brief(entry) for entry in legacy]
left.insert(2, "—")  # 新版没有对应的一步
assert [m["method"] for a, m in modern if a == "→"] == ["server/discover", "tools/list", "tools/call"]
assert [m["method"] for a, m in legacy if a == "→"] == [
    "initialize",
    "notifications/initialized",
    "tools/list",
    "tools/call",
]
assert len(modern) == 6 and len(legacy) == 7
requests = [m for a, m in modern if a == "→"]
assert all(m["params"]["_meta"] == META for m in requests)  # 三个请求带着同一份 _meta
assert not any("_meta" in m.get("params", {}) for _, m in legacy)
assert all(m["result"]["resultType"] == "complete" for a, m in modern if a == "←")
assert not any("resultType" in m["result"] for a, m in legacy if a == "←")
assert modern[1][1]["result"]["supportedVersions"] == ["2026-07-28"]
assert all(m["jsonrpc"] == "2.0" for _, m in modern + legacy)
assert not any(a == "←" and "method" in m for a, m in modern + legacy)  # 服务端没有主动发请求
Markdown(
    tabulate(list(zip(left, right, strict=True)), headers=["2026-07-28", "2025-11-25"], tablefmt="github")
)

# %%
#| label: call-on-the-wire
#| caption: 2026-07-28 下一次 tools/call 的请求与回复全文
#| echo: fold
request, reply = modern[4][1], modern[5][1]
assert request["method"] == "tools/call" and request["id"] == reply["id"] == 3
assert set(reply) == {"jsonrpc", "id", "result"} and reply["result"]["isError"] is False
Markdown(json_block(request) + "\n\n" + json_block(reply))

# %%
#| label: schema-conversion
#| caption: 一次调用的六种写法：①④⑤ 在宿主与服务端之间，②③⑥ 在宿主与模型之间（③ 是手写的，没有真的跑模型）
#| echo: fold
tools = modern[3][1]["result"]["tools"]
schemas = tools_to_function_schemas(tools)
tool_call = {
    "id": "call_1",
    "type": "function",
    "function": {"name": "divide", "arguments": '{"a": 7, "b": 2}'},
}
to_server = tool_call_to_request(tool_call, request_id=3, meta=META)
message = call_result_to_message(reply["result"], tool_call_id=tool_call["id"])
assert to_server == request  # 与官方客户端发出的那一条相同
assert schemas[0]["function"]["parameters"] == tools[0]["inputSchema"]
assert message == {"role": "tool", "tool_call_id": "call_1", "content": "3.5"}
for seen in (schemas, tool_call, message):  # 模型看见的三样里没有 MCP 的痕迹
    assert not any(word in json.dumps(seen) for word in ("jsonrpc", "inputSchema", "tools/call", "_meta"))
only_in_mcp = sorted(set(tools[0]) - {"name", "description", "inputSchema"})
assert only_in_mcp == ["outputSchema"]  # 这一项没有地方放
parts = {
    "① 服务端 → 宿主：清单里的一项（略去 outputSchema）": {
        k: v for k, v in tools[0].items() if k != "outputSchema"
    },
    "② 宿主 → 模型：请求里的 tools": schemas,
    "③ 模型 → 宿主：tool_calls": [tool_call],
    "④ 宿主 → 服务端：tools/call 的 params（略去 _meta）": {
        k: v for k, v in to_server["params"].items() if k != "_meta"
    },
    "⑤ 服务端 → 宿主：content": reply["result"]["content"],
    "⑥ 宿主 → 模型：tool 消息": message,
}
Markdown("\n\n".join(f"{title}\n\n{json_block(value)}" for title, value in parts.items()))

# %%
#| label: no-handshake
#| caption: 不经 SDK，往服务端进程写 JSON：新版的第一行就可以是 tools/call，旧版要先在同一个进程里握手
#| echo: fold
call = {"name": "divide", "arguments": {"a": 7, "b": 2}}
hello = {
    "protocolVersion": "2025-11-25",
    "capabilities": {},
    "clientInfo": {"name": "demo", "version": "1.0"},
}
initialize = json_rpc_request("initialize", hello, request_id=1)
initialized = {"jsonrpc": "2.0", "method": "notifications/initialized"}
new_call = json_rpc_request("tools/call", call | {"_meta": META}, request_id=2)
old_call = json_rpc_request("tools/call", call, request_id=2)

future = request_meta(client="demo", version="1.0", protocol_version="2099-01-01")  # 留给下一个单元
new_alone, from_future = first_words(
    new_call, json_rpc_request("tools/list", {"_meta": future}, request_id=3)
)
old_alone, shaken, old_after = first_words(old_call, initialize, initialized, old_call)
assert new_alone["result"]["structuredContent"] == {"result": 3.5}
assert old_alone["error"]["code"] == -32602
assert shaken["result"]["protocolVersion"] == "2025-11-25"
assert old_after["result"]["structuredContent"] == {"result": 3.5}  # 对照：只差握手
rows = [
    ["2026-07-28", "`tools/call`（带 `_meta`）", "3.5"],
    ["2025-11-25", "`tools/call`", "错误 −32602"],
    ["2025-11-25", "同一进程：握手两行，再 `tools/call`", "3.5"],
]
Markdown(tabulate(rows, headers=["修订版", "进程收到的", "回答"], tablefmt="github"))

# %%
#| label: two-kinds-of-error
#| caption: 七个请求各得到哪一种回复：isError 在 result 里，给模型看；error 是协议错误，给程序看
#| echo: fold
NAMES = ["`divide(7, 2)`", *list(LATER)[:4]]
answers = {m["id"]: m for a, m in everything if a == "←"}
ours = [answers[m["id"]] for a, m in everything if a == "→" and m["method"] in ("tools/call", "tools/run")]
replies = dict(zip(NAMES, ours, strict=True))
replies["版本 2099-01-01"] = from_future
replies["不带 `_meta`，也没握手"] = old_alone
kinds = [reply_kind(reply) for reply in replies.values()]
assert kinds == ["ok"] + ["tool-error"] * 3 + ["protocol-error"] * 3
codes = [reply["error"]["code"] for reply in replies.values() if "error" in reply]
assert codes == [-32601, -32022, -32602]
assert replies["版本 2099-01-01"]["error"]["data"]["supported"] == ["2026-07-28"]
assert "除数是 0，请换一个 b。" in replies["`divide(7, 0)`"]["result"]["content"][0]["text"]
assert "Unknown tool" in replies["没有的工具"]["result"]["content"][0]["text"]
SHOWN = {"ok": "`result`", "tool-error": "`result`，`isError: true`"}
rows = [
    [name, SHOWN.get(kind) or f"`error`，{reply['error']['code']}".replace("-", "−")]
    for (name, reply), kind in zip(replies.items(), kinds, strict=True)
]
Markdown(tabulate(rows, headers=["请求", "回复"], tablefmt="github"))

# %%
#| label: three-primitives
#| caption: 同一个服务端的工具、资源、提示模板：各自怎么列出、怎么取用、取到什么
#| echo: fold
methods = {m["method"] for a, m in everything if a == "→"} - {"server/discover", "tools/run"}
assert methods == {
    "tools/list",
    "tools/call",
    "resources/list",
    "resources/read",
    "prompts/list",
    "prompts/get",
}
got = modern_results
assert [resource.name for resource in got["资源清单"].resources] == ["rounding"]
assert [prompt.name for prompt in got["提示模板清单"].prompts] == ["explain"]
texts = [
    got["`divide(7, 2)`"].content[0].text,
    got["资源"].contents[0].text,
    got["提示模板"].messages[0].content.text,
]
assert texts == ["3.5", "结果保留三位小数。", "请一步步讲解 7.0 除以 2.0。"]
rows = [
    ["工具", "模型", "`tools/list`、`tools/call`", texts[0]],
    ["资源", "应用", "`resources/list`、`resources/read`", texts[1]],
    ["提示模板", "用户", "`prompts/list`、`prompts/get`", texts[2]],
]
Markdown(tabulate(rows, headers=["原语", "谁决定用", "方法", "取到"], tablefmt="github"))
