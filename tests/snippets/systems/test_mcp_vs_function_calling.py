"""函数调用与 MCP 的换算，以及那个最小的服务端。

真值有四个来源：规范里写明的消息形状（手写）；官方 SDK mcp 2.3.0 的消息模型（`mcp_types`，pydantic 校验）；
transformers 的 `get_json_schema`（独立地从函数签名生成函数调用的格式）；真的起一个服务端进程，逐行读写它的管道。
"""

import asyncio
import copy
import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import mcp_types as types
import pytest
from mcp import Client
from mcp.server.mcpserver import MCPServer
from pydantic import ValidationError
from transformers.utils import get_json_schema

from snippets.systems import mcp_server
from snippets.systems.mcp_vs_function_calling import (
    call_result_to_message,
    json_rpc_error,
    json_rpc_request,
    json_rpc_response,
    reply_kind,
    request_meta,
    tool_call_to_request,
    tools_to_function_schemas,
)

META = request_meta(client="test", version="1.0")
DIVIDE = {
    "name": "divide",
    "description": "a 除以 b。",
    "inputSchema": {
        "type": "object",
        "properties": {"a": {"type": "number"}, "b": {"type": "number"}},
        "required": ["a", "b"],
    },
}
TOOL_CALL = {
    "id": "call_9",
    "type": "function",
    "function": {"name": "divide", "arguments": '{"a": 7, "b": 2}'},
}


def talk(*messages):
    """起一个新进程，逐行写入；读每个带非空 id 的请求的回复。卡住超过两分钟就杀掉，读到空行，测试失败。"""
    replies = []
    with subprocess.Popen(
        [sys.executable, "-m", "snippets.systems.mcp_server"],
        env=os.environ | {"PYTHONPATH": str(Path(mcp_server.__file__).parents[2])},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as process:
        watchdog = threading.Timer(120, process.kill)
        watchdog.start()
        try:
            for message in messages:
                process.stdin.write(json.dumps(message) + "\n")
                process.stdin.flush()
                if message.get("id") is not None:
                    replies.append(json.loads(process.stdout.readline()))
            process.stdin.close()
            assert process.stdout.read() == ""  # 没有多出来的消息
            assert process.wait() == 0  # 关掉标准输入就自己退出
        finally:
            watchdog.cancel()
            process.kill()
    return replies


def call(arguments, request_id, *, name="divide", meta=META):
    return json_rpc_request(
        "tools/call", {"name": name, "arguments": arguments, "_meta": meta}, request_id=request_id
    )


@pytest.fixture(scope="module")
def replies():
    """一个进程里的七个请求；第一个就是 tools/call，前面什么也没有。"""
    without_capabilities = {key: value for key, value in META.items() if "Capabilities" not in key}
    without_info = {key: value for key, value in META.items() if "Info" not in key}
    requests = {
        "good": tool_call_to_request(TOOL_CALL, request_id=1, meta=META),
        "zero": call({"a": 7, "b": 0}, 2),
        "type": call({"a": 7, "b": "两"}, "three"),
        "tool": call({}, 4, name="multiply"),
        "method": json_rpc_request("tools/run", {"_meta": META}, request_id=5),
        "no-capabilities": call({"a": 7, "b": 2}, 6, meta=without_capabilities),
        "no-info": call({"a": 7, "b": 2}, 7, meta=without_info),
        "list": json_rpc_request("tools/list", {"_meta": META}, request_id=8),
    }
    return dict(zip(requests, talk(*requests.values()), strict=True))


# 手算：规范里写明的形状


def test_a_request_has_exactly_the_fields_of_the_specification():
    """规范 2026-07-28，Base Protocol：jsonrpc、id、method、params；没有参数就没有 params。"""
    assert json_rpc_request("tools/list", {"_meta": {}}, request_id="x") == {
        "jsonrpc": "2.0",
        "id": "x",
        "method": "tools/list",
        "params": {"_meta": {}},
    }
    assert set(json_rpc_request("ping", request_id=0)) == {"jsonrpc", "id", "method"}
    assert json_rpc_request("ping", {}, request_id=0)["params"] == {}


def test_request_meta_names_the_revision_the_client_and_its_capabilities():
    """规范 2026-07-28，Base Protocol：三个键都带前缀；clientInfo 有 name 与 version；没有能力就是空对象。"""
    assert request_meta(client="host", version="2.1") == {
        "io.modelcontextprotocol/protocolVersion": "2026-07-28",
        "io.modelcontextprotocol/clientInfo": {"name": "host", "version": "2.1"},
        "io.modelcontextprotocol/clientCapabilities": {},
    }


def test_a_reply_has_a_result_or_an_error_never_both():
    """规范 2026-07-28：result 必带 resultType；error 有 code 与 message。"""
    assert json_rpc_response(3, {"tools": []}) == {
        "jsonrpc": "2.0",
        "id": 3,
        "result": {"resultType": "complete", "tools": []},
    }
    assert json_rpc_response(3, {"resultType": "input_required"})["result"]["resultType"] == "input_required"
    assert json_rpc_error(3, -32601, "Method not found") == {
        "jsonrpc": "2.0",
        "id": 3,
        "error": {"code": -32601, "message": "Method not found"},
    }
    assert json_rpc_error(3, -32022, "x", {"supported": []})["error"]["data"] == {"supported": []}


def test_function_schema_and_tool_message_by_hand():
    """Chat Completions 的写法：外层 type、内层 name、description、parameters；tool 消息带 tool_call_id。"""
    assert tools_to_function_schemas([DIVIDE]) == [
        {
            "type": "function",
            "function": {
                "name": "divide",
                "description": "a 除以 b。",
                "parameters": DIVIDE["inputSchema"],
            },
        }
    ]
    result = {"content": [{"type": "text", "text": "3"}, {"type": "text", "text": "余 1"}], "isError": False}
    assert call_result_to_message(result, tool_call_id="call_9") == {
        "role": "tool",
        "tool_call_id": "call_9",
        "content": "3\n余 1",
    }
    del result["isError"]  # 规范：缺了就是 false
    assert call_result_to_message(result, tool_call_id="c")["content"] == "3\n余 1"


def test_tool_call_becomes_exactly_one_tools_call_request():
    """规范 2026-07-28，Tools：params 里是 name、arguments（对象）与 _meta；模型那个 call_9 不进请求。"""
    assert tool_call_to_request(TOOL_CALL, request_id=1, meta=META) == {
        "jsonrpc": "2.0",
        "id": 1,
        "method": "tools/call",
        "params": {"name": "divide", "arguments": {"a": 7, "b": 2}, "_meta": META},
    }


# 与官方 SDK、transformers 对照


def test_our_messages_pass_the_sdk_models():
    adapter = types.jsonrpc_message_adapter
    request = call({"a": 7, "b": 2}, 1)
    assert isinstance(adapter.validate_python(request), types.JSONRPCRequest)
    assert isinstance(adapter.validate_python(json_rpc_response(1, {})), types.JSONRPCResponse)
    assert isinstance(adapter.validate_python(json_rpc_error(1, -32601, "x")), types.JSONRPCError)
    params = types.CallToolRequestParams.model_validate(request["params"], by_name=False)
    assert (params.name, params.arguments) == ("divide", {"a": 7, "b": 2})
    assert set(META) == {
        types.PROTOCOL_VERSION_META_KEY,
        types.CLIENT_INFO_META_KEY,
        types.CLIENT_CAPABILITIES_META_KEY,
    }
    assert META[types.PROTOCOL_VERSION_META_KEY] == types.LATEST_PROTOCOL_VERSION == "2026-07-28"


@pytest.mark.parametrize("request_id", [None, True, 1.5, [1], 0, -1, 7, "a", ""])
def test_ids_are_accepted_exactly_when_the_sdk_accepts_them(request_id):
    """误传：id 可以是 null（JSON-RPC 2.0 允许，MCP 不允许）。"""
    message = {"jsonrpc": "2.0", "id": request_id, "method": "tools/list"}
    try:
        types.JSONRPCRequest.model_validate(message)
    except ValidationError:
        for build in (
            lambda: json_rpc_request("tools/list", request_id=request_id),
            lambda: json_rpc_response(request_id, {}),
            lambda: json_rpc_error(request_id, -32603, "x"),
        ):
            with pytest.raises(ValueError, match="整数或字符串"):
                build()
    else:
        assert json_rpc_request("tools/list", request_id=request_id) == message
    assert (request_id in (0, -1, 7, "a", "")) == (isinstance(request_id, str) or type(request_id) is int)


def test_schema_has_the_shape_transformers_builds_from_a_signature():
    def divide(a: float, b: float) -> float:
        """a 除以 b。

        Args:
            a: 被除数
            b: 除数
        """
        return a / b

    theirs = get_json_schema(divide)
    (ours,) = tools_to_function_schemas([DIVIDE])
    theirs["function"].pop("return", None)  # 不是 API 的字段
    for parameter in theirs["function"]["parameters"]["properties"].values():
        del parameter["description"]
    assert ours == theirs


@pytest.mark.rejects
def test_arguments_left_as_a_string_are_rejected_by_the_sdk():
    """误传：把模型给的 arguments 原样放进 tools/call。它是字符串，MCP 要对象。"""
    ours = tool_call_to_request(TOOL_CALL, request_id=1, meta=META)["params"]
    types.CallToolRequestParams.model_validate(ours, by_name=False)
    with pytest.raises(ValidationError):
        types.CallToolRequestParams.model_validate(
            ours | {"arguments": TOOL_CALL["function"]["arguments"]}, by_name=False
        )


# 真的服务端进程


def test_model_call_reaches_the_server_and_comes_back(replies):
    good = replies["good"]
    assert good["id"] == 1 and reply_kind(good) == "ok"
    assert types.CallToolResult.model_validate(good["result"], by_name=False).structured_content == {
        "result": 3.5
    }
    message = call_result_to_message(good["result"], tool_call_id=TOOL_CALL["id"])
    assert message == {"role": "tool", "tool_call_id": "call_9", "content": "3.5"}


def test_listed_tools_convert_without_touching_the_schema(replies):
    tools = replies["list"]["result"]["tools"]
    before = copy.deepcopy(tools)
    (schema,) = tools_to_function_schemas(tools)
    assert tools == before
    assert schema["function"]["parameters"] == tools[0]["inputSchema"]
    assert set(schema["function"]) == {"name", "description", "parameters"}  # outputSchema 没有地方放
    assert (
        types.ListToolsResult.model_validate(replies["list"]["result"], by_name=False).tools[0].name
        == "divide"
    )


def test_failed_tools_are_results_and_broken_requests_are_errors(replies):
    """误传：出错就是 JSON-RPC error。工具执行失败在 result 里，模型要看到原因。"""
    for name, reason in (("zero", "请换一个 b"), ("type", "valid number"), ("tool", "Unknown tool")):
        assert "error" not in replies[name] and reply_kind(replies[name]) == "tool-error"
        message = call_result_to_message(replies[name]["result"], tool_call_id="call_9")
        assert message["content"].startswith("[工具报错] ") and reason in message["content"]
    assert replies["type"]["id"] == "three"
    assert reply_kind(replies["method"]) == "protocol-error" and replies["method"]["error"]["code"] == -32601


def test_every_request_carries_its_own_capabilities(replies):
    """前面的请求带过能力也不算；clientInfo 只是建议。"""
    assert replies["no-capabilities"]["error"]["code"] == -32602
    assert reply_kind(replies["no-info"]) == "ok"


def test_old_clients_must_shake_hands_first_and_are_offered_the_old_revision():
    """同一个服务端也认握手；用握手来要 2026-07-28，得到的是 2025-11-25。"""
    old_call = json_rpc_request("tools/call", {"name": "divide", "arguments": {"a": 7, "b": 2}}, request_id=2)
    hello = {"protocolVersion": "2026-07-28", "capabilities": {}, "clientInfo": {"name": "t", "version": "1"}}
    before, welcome, after = talk(
        old_call,
        json_rpc_request("initialize", hello, request_id=1),
        {"jsonrpc": "2.0", "method": "notifications/initialized"},
        old_call,
    )
    assert before["error"]["code"] == -32602
    assert welcome["result"]["protocolVersion"] == "2025-11-25"
    assert after["result"]["structuredContent"] == {"result": 3.5} and "resultType" not in after["result"]


def test_unknown_revision_names_the_supported_ones_and_null_id_gets_no_reply():
    future = request_meta(client="test", version="1.0", protocol_version="2099-01-01")
    null_id = call({"a": 1, "b": 1}, 1) | {"id": None}
    replies = talk(null_id, json_rpc_request("tools/list", {"_meta": future}, request_id=4))
    assert [reply["id"] for reply in replies] == [4]  # 第一条读到的就是第二个请求的回复
    assert replies[0]["error"]["code"] == -32022
    assert replies[0]["error"]["data"] == {"supported": ["2026-07-28"], "requested": "2099-01-01"}


def test_an_unexpected_exception_does_not_leak_its_text_to_the_model():
    """SDK 2.3.0：只有 ToolError 的原话交给模型；别的异常只说哪个工具失败了。"""
    server = MCPServer("crash", version="1.0", log_level="CRITICAL")

    @server.tool()
    def crash() -> int:
        raise RuntimeError("内部路径")

    async def run():
        async with Client(server) as client:
            return await client.call_tool("crash", {})

    with ThreadPoolExecutor(1) as pool:  # 另起线程：浏览器测试会在主线程留下一个事件循环
        result = pool.submit(asyncio.run, run()).result()
    assert result.is_error and result.content[0].text == "Error executing tool crash"


# 边界与该拒绝的输入


@pytest.mark.parametrize("reply", [{"result": {}, "error": {}}, {}, {"id": 1}])
def test_reply_with_both_or_neither_is_refused(reply):
    with pytest.raises(ValueError, match="恰有一个"):
        reply_kind(reply)


def test_reply_kind_reads_old_results_without_result_type():
    assert reply_kind({"result": {"content": []}}) == "ok"
    assert reply_kind({"result": {"content": [], "isError": True}}) == "tool-error"
    assert reply_kind({"result": {"resultType": "input_required"}}) == "input-required"
    assert reply_kind({"error": {"code": -32601, "message": "x"}}) == "protocol-error"


def test_unusable_tool_names_are_refused_not_silently_sent():
    """MCP 允许点号与 128 个字符，Chat Completions 只允许 64 个字母、数字、_、-。"""
    types.Tool.model_validate(DIVIDE | {"name": "admin.tools.list"})
    for name in ("admin.tools.list", "a" * 65, "", "除法"):
        with pytest.raises(ValueError, match="不合法"):
            tools_to_function_schemas([DIVIDE | {"name": name}])
    assert tools_to_function_schemas([DIVIDE | {"name": "a" * 64}])
    with pytest.raises(ValueError, match="重名"):
        tools_to_function_schemas([DIVIDE, DIVIDE | {"description": "另一个服务端的"}])


def test_order_is_kept_and_missing_description_is_omitted():
    tools = [DIVIDE | {"name": name} for name in ("z", "a", "m")]
    assert [schema["function"]["name"] for schema in tools_to_function_schemas(tools)] == ["z", "a", "m"]
    bare = {"name": "ping", "inputSchema": {"type": "object"}}
    assert "description" not in tools_to_function_schemas([bare])[0]["function"]


def test_nothing_is_dropped_silently():
    """图片、没问完的结果、不是对象的参数：都要报错，不能悄悄丢掉。"""
    image = {"type": "image", "data": "", "mimeType": "image/png"}
    with pytest.raises(ValueError, match="只收文本"):
        call_result_to_message({"content": [{"type": "text", "text": "x"}, image]}, tool_call_id="c")
    with pytest.raises(ValueError, match="inputRequests"):
        call_result_to_message({"resultType": "input_required", "content": []}, tool_call_id="c")
    broken = copy.deepcopy(TOOL_CALL)
    broken["function"]["arguments"] = "[1, 2]"
    with pytest.raises(ValueError, match="不是 JSON 对象"):
        tool_call_to_request(broken, request_id=1, meta=META)
