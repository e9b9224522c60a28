r"""一个最小的 MCP 服务端：一个工具、一个资源、一个提示模板，经 stdio 收发。

页面：docs/systems/mcp-vs-function-calling.md

用官方 Python SDK（mcp 2.3.0）写成。单独成进程：`python -m snippets.systems.mcp_server`；关掉它的标准输入就退出。

不包含：授权、Streamable HTTP、分页、缓存时限、向用户提问（elicitation）。

References:
    MCP 规范 2026-07-28，Server Features：https://modelcontextprotocol.io/specification/2026-07-28/server
"""

from mcp.server.mcpserver import MCPServer
from mcp.server.mcpserver.exceptions import ToolError

__all__ = ["divide", "explain", "rounding", "server"]

server = MCPServer("calc", version="1.0", log_level="CRITICAL")


# --8<-- [start:tool]
@server.tool()
def divide(a: float, b: float) -> float:
    """a 除以 b。"""
    if b == 0:
        raise ToolError("除数是 0，请换一个 b。")  # 预料到的失败：原话交给模型
    return a / b


# --8<-- [end:tool]


@server.resource("docs://rounding", name="rounding")
def rounding() -> str:
    """舍入规则，由应用决定要不要放进上下文。"""
    return "结果保留三位小数。"


@server.prompt()
def explain(a: float, b: float) -> str:
    """讲解一次除法，由用户主动选用。"""
    return f"请一步步讲解 {a} 除以 {b}。"


if __name__ == "__main__":
    server.run()  # 默认 stdio
