r"""函数调用与 MCP 之间的换算：宿主程序里的那几行胶水，只用标准库。

页面：docs/systems/mcp-vs-function-calling.md

两边是两种消息，谁也不含谁：

- 函数调用（function calling）是模型 API 的字段：请求里的 `tools`、回答里的 `tool_calls`、下一轮的 `tool` 消息。
  这里用 Chat Completions 的写法；`arguments` 是一个 **JSON 字符串**，不是对象。
- MCP 是进程之间的 JSON-RPC 2.0：`tools/list`、`tools/call`。从 2026-07-28 起每个请求自带 `_meta`，没有握手。

不包含：传输（stdio、HTTP）、授权、分页、`input_required` 的多轮往返、图片与资源内容。

References:
    JSON-RPC 2.0：https://www.jsonrpc.org/specification
    MCP 规范 2026-07-28，Base Protocol 与 Tools：https://modelcontextprotocol.io/specification/2026-07-28
    openai-python `types/shared_params/function_definition.py`、`types/chat/chat_completion_tool_message_param.py`
    与官方 SDK（mcp 2.3.0 的 `mcp_types`）的消息模型一致，见测试。
"""

import json
import re
from typing import Any

__all__ = [
    "json_rpc_request",
    "json_rpc_response",
    "json_rpc_error",
    "request_meta",
    "reply_kind",
    "tools_to_function_schemas",
    "tool_call_to_request",
    "call_result_to_message",
]

FUNCTION_NAME = re.compile(r"[A-Za-z0-9_-]{1,64}")
META_PREFIX = "io.modelcontextprotocol/"


def json_rpc_request(method: str, params: dict[str, Any] | None = None, *, request_id: Any) -> dict:
    r"""一个 JSON-RPC 请求。

    注意：JSON-RPC 2.0 允许 id 为 null，MCP 不允许；没有 id 的是通知，不会有回复。

    Args:
        method: 方法名，例如 `tools/call`。
        params: 参数对象；没有就省略这个键。
        request_id: 整数或字符串；同一发送方还没收到回复的请求之间不能重复。

    Returns:
        可以直接 `json.dumps` 的请求。
    """
    _check_id(request_id)
    request = {"jsonrpc": "2.0", "id": request_id, "method": method}
    return request if params is None else request | {"params": params}


def json_rpc_response(request_id: Any, result: dict[str, Any]) -> dict:
    r"""一个成功的回复：有 `result`，没有 `error`。

    注意：工具执行失败也走这里，靠 `result["isError"]` 区分。

    Args:
        request_id: 所回复的请求的 id。
        result: 结果对象；2026-07-28 起要带 `resultType`，这里缺了就补上 "complete"。

    Returns:
        可以直接 `json.dumps` 的回复。
    """
    _check_id(request_id)
    return {"jsonrpc": "2.0", "id": request_id, "result": {"resultType": "complete"} | result}


def json_rpc_error(request_id: Any, code: int, message: str, data: Any = None) -> dict:
    r"""一个协议错误：有 `error`，没有 `result`。

    Args:
        request_id: 所回复的请求的 id。
        code: 整数错误码；-32601 是没有这个方法，-32602 是参数不合法。
        message: 一句话说明。
        data: 附加信息；没有就省略。

    Returns:
        可以直接 `json.dumps` 的回复。
    """
    _check_id(request_id)
    error = {"code": code, "message": message} | ({} if data is None else {"data": data})
    return {"jsonrpc": "2.0", "id": request_id, "error": error}


def request_meta(*, client: str, version: str, protocol_version: str = "2026-07-28") -> dict[str, Any]:
    r"""每个请求都要带的 `_meta`：协议版本、客户端能力（必需），客户端是谁（建议）。

    Args:
        client: 客户端的名字。
        version: 客户端的版本。
        protocol_version: 这个请求按哪个修订版写。

    Returns:
        放进 `params["_meta"]` 的对象。
    """
    return {
        META_PREFIX + "protocolVersion": protocol_version,
        META_PREFIX + "clientInfo": {"name": client, "version": version},
        META_PREFIX + "clientCapabilities": {},
    }


# --8<-- [start:reply-kind]
def reply_kind(reply: dict[str, Any]) -> str:
    r"""回复属于哪一种：ok、tool-error、protocol-error、input-required。

    Args:
        reply: 一条 JSON-RPC 回复。

    Returns:
        四个字符串之一；工具错误要交给模型，协议错误通常是程序写错了。
    """
    if ("result" in reply) == ("error" in reply):
        raise ValueError("JSON-RPC 回复的 result 与 error 必须恰有一个。")
    if "error" in reply:
        return "protocol-error"
    if reply["result"].get("resultType", "complete") == "input_required":
        return "input-required"
    return "tool-error" if reply["result"].get("isError", False) else "ok"


# --8<-- [end:reply-kind]


# --8<-- [start:schemas]
def tools_to_function_schemas(tools: list[dict[str, Any]]) -> list[dict[str, Any]]:
    r"""`tools/list` 的条目换成模型 API 的 `tools`：`inputSchema` 原样成为 `parameters`。

    Args:
        tools: `tools/list` 结果里的 `tools`，可以来自几个服务端。

    Returns:
        Chat Completions 的 `tools`，次序不变（次序稳定，提示缓存才命中）。
    """
    names = [tool["name"] for tool in tools]
    for name in names:
        if not FUNCTION_NAME.fullmatch(name):
            raise ValueError(f"{name!r} 不合法（要 1–64 个字母、数字、_、-）：改名，并记下对应。")
        if names.count(name) > 1:
            raise ValueError(f"{name!r} 重名：给每个服务端的工具加前缀，并记下对应。")
    schemas = []
    for tool in tools:
        function = {"name": tool["name"], "parameters": tool["inputSchema"]}
        if "description" in tool:
            function["description"] = tool["description"]
        schemas.append({"type": "function", "function": function})
    return schemas


# --8<-- [end:schemas]


# --8<-- [start:call]
def tool_call_to_request(tool_call: dict[str, Any], *, request_id: Any, meta: dict[str, Any]) -> dict:
    r"""模型给出的一个 tool call → 发给服务端的 `tools/call`。

    Args:
        tool_call: 回答里 `tool_calls` 的一项。
        request_id: JSON-RPC 的 id；与 `tool_call["id"]` 无关，后者只在模型的对话里用。
        meta: `request_meta` 的结果。

    Returns:
        JSON-RPC 请求。
    """
    arguments = json.loads(tool_call["function"]["arguments"])  # 模型写的是字符串
    if not isinstance(arguments, dict):
        raise ValueError(f"arguments 不是 JSON 对象：{arguments!r}。把这句话作为 tool 消息还给模型。")
    params = {"name": tool_call["function"]["name"], "arguments": arguments, "_meta": meta}
    return json_rpc_request("tools/call", params, request_id=request_id)


def call_result_to_message(result: dict[str, Any], *, tool_call_id: str) -> dict[str, Any]:
    r"""`tools/call` 的结果 → 下一轮给模型看的 `tool` 消息。

    Args:
        result: JSON-RPC 回复里的 `result`。
        tool_call_id: 模型那个 tool call 的 id。

    Returns:
        Chat Completions 的 `tool` 消息。
    """
    if result.get("resultType", "complete") != "complete":
        raise ValueError("这不是最终结果：先按 inputRequests 问用户，再带着 inputResponses 重发。")
    blocks = result["content"]
    if any(block["type"] != "text" for block in blocks):
        raise ValueError("tool 消息只收文本：图片、资源等内容要另行处理，不能丢掉。")
    text = "\n".join(block["text"] for block in blocks)
    if result.get("isError", False):  # Chat Completions 没有错误字段，写进文本里
        text = f"[工具报错] {text}"
    return {"role": "tool", "tool_call_id": tool_call_id, "content": text}


# --8<-- [end:call]


def _check_id(request_id: Any) -> None:
    if isinstance(request_id, bool) or not isinstance(request_id, int | str):
        raise ValueError(f"id 是 {request_id!r}：MCP 要求整数或字符串，不能是 null。")
