r"""rollout 调度的离散事件模拟：锁步的批调用与逐请求的异步，同一套引擎、同一组抽样。

页面：docs/systems/rollout-server.md

一条轨迹是一串轮次，每轮先生成（占一个并发槽）、再等工具（不占槽），轮内轮间都不能颠倒；最后一轮的工具可以当作算奖励。
引擎是连续批处理：每步给正在跑的 $b$ 条各出一个 token，用时 `step_seconds + step_slope * b` 秒；有空槽就按先到先得补进来。
因为所有在跑的请求速度相同，用「引擎走过的步数」当时钟，各请求在哪一步结束就是定值，堆里存的是它。

单位：生成量是 token 数（可以是小数），工具时间与所有输出的时间是秒。

不包含：预填充的用时、前缀缓存、显存不够时的抢占、权重同步、多个副本、网络。

References:
    逐步调度（iteration-level scheduling）：Orca，OSDI 2022，https://www.usenix.org/conference/osdi22/presentation/yu
    任务图上贪心调度的两倍上界的同一论证：Graham，SIAM J. Appl. Math. 17(2)，1969。
"""

import heapq
import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist

__all__ = ["Schedule", "makespan_bounds", "simulate_async", "simulate_lockstep", "expected_max_lognormal"]

Times = Sequence[Sequence[int | float]]


@dataclass(frozen=True)
class Schedule:
    """一次 rollout 的结果。"""

    finish: list[int | float]  # 每条轨迹交回结果的时刻，秒
    busy: float  # 各槽真正在生成的时间之和，槽·秒
    slots: int  # 并发槽数
    trace: list[tuple[float, int]]  # （时刻，正在生成的条数），每次变化记一点

    @property
    def makespan(self) -> float:
        """最后一条交回的时刻，秒。"""
        return max(self.finish)

    @property
    def utilization(self) -> float:
        """槽的利用率，0 到 1：在生成的槽·秒除以全部槽·秒。"""
        return self.busy / (self.slots * self.makespan)


# --8<-- [start:async]
def simulate_async(
    gen_tokens: Times,
    tool_seconds: Times,
    *,
    slots: int,
    step_seconds: float = 1.0,
    step_slope: float = 0.0,
    hold_slot: bool = False,
) -> Schedule:
    """逐请求异步：每条轨迹一个协程，工具一返回就排队，有空槽就进批。

    注意：空槽先给等得最久的请求，同时到的按编号；引擎在整步之间不取整。

    Args:
        gen_tokens: 每条轨迹每轮生成的 token 数。
        tool_seconds: 每轮工具用时，秒，形状与前者相同。
        slots: 并发槽数，引擎同时跑的请求上限。
        step_seconds: 一步的固定用时，秒。
        step_slope: 批里每多一条，一步多用的时间，秒。
        hold_slot: 真表示等工具时不让出槽，轨迹结束才让出。

    Returns:
        这次 rollout 的时刻表。
    """
    _check(gen_tokens, tool_seconds, slots, step_seconds, step_slope)
    now, clock, busy, owned = 0.0, 0.0, 0.0, 0
    ready = deque((i, 0) for i in range(len(gen_tokens)))  # 等槽的（轨迹, 轮）
    running: list[tuple[float, int, int]] = []  # 堆：在引擎的第几步结束
    tools: list[tuple[float, int, int]] = []  # 堆：工具在什么时刻返回
    finish, trace = [0.0] * len(gen_tokens), [(0.0, 0)]
    while ready or running or tools:
        while ready and owned < slots:
            i, k = ready.popleft()
            owned += 1
            heapq.heappush(running, (clock + gen_tokens[i][k], i, k))
        trace.append((now, len(running)))
        step = step_seconds + step_slope * len(running)
        next_gen = now + (running[0][0] - clock) * step if running else math.inf
        next_tool = tools[0][0] if tools else math.inf
        if next_gen <= next_tool:
            busy += len(running) * (next_gen - now)
            now, (clock, i, k) = next_gen, heapq.heappop(running)
            heapq.heappush(tools, (now + tool_seconds[i][k], i, k))
            owned -= not hold_slot
        else:
            busy += len(running) * (next_tool - now)
            clock += (next_tool - now) / step
            now, i, k = heapq.heappop(tools)
            if k + 1 == len(gen_tokens[i]):
                finish[i] = now
                owned -= hold_slot
            elif hold_slot:
                heapq.heappush(running, (clock + gen_tokens[i][k + 1], i, k + 1))
            else:
                ready.append((i, k + 1))
    trace.append((now, 0))
    return Schedule(finish, busy, slots, trace)


# --8<-- [end:async]


# --8<-- [start:lockstep]
def simulate_lockstep(
    gen_tokens: Times,
    tool_seconds: Times,
    *,
    slots: int,
    batch_size: int | None = None,
    step_seconds: float = 1.0,
    step_slope: float = 0.0,
) -> Schedule:
    """锁步：一轮一次批调用，等最慢的生成，再等最慢的工具，才进下一轮。

    注意：一次调用之内引擎仍是连续批处理，`batch_size` 可以大于 `slots`；失去的是跨轮次的拼批。

    Args:
        gen_tokens: 每条轨迹每轮生成的 token 数。
        tool_seconds: 每轮工具用时，秒，形状与前者相同。
        slots: 并发槽数。
        batch_size: 一次调用放几条轨迹；一批做完所有轮才做下一批，默认全部。
        step_seconds: 一步的固定用时，秒。
        step_slope: 批里每多一条，一步多用的时间，秒。

    Returns:
        这次 rollout 的时刻表；一批里的轨迹同时交回。
    """
    _check(gen_tokens, tool_seconds, slots, step_seconds, step_slope)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size={batch_size}：一次调用至少放一条轨迹。")
    engine = {"slots": slots, "step_seconds": step_seconds, "step_slope": step_slope}
    count = len(gen_tokens)
    now, busy, finish, trace = 0.0, 0.0, [0.0] * count, [(0.0, 0)]
    for start in range(0, count, batch_size or count):
        batch = range(start, min(start + (batch_size or count), count))
        for k in range(max(len(gen_tokens[i]) for i in batch)):
            alive = [i for i in batch if k < len(gen_tokens[i])]  # 还没做完的轨迹
            call = simulate_async([[gen_tokens[i][k]] for i in alive], [[0.0]] * len(alive), **engine)
            trace += [(now + t, running) for t, running in call.trace]
            busy += call.busy
            now += call.makespan + max(tool_seconds[i][k] for i in alive)
        for i in batch:
            finish[i] = now
    return Schedule(finish, busy, slots, trace + [(now, 0)])


# --8<-- [end:lockstep]


def makespan_bounds(gen_seconds: Times, tool_seconds: Times, *, slots: int) -> tuple[float, float]:
    r"""每槽速度恒定时，完工时间的下界（任何调度）与上界（有空槽就补的调度）。

    $$\max\Big(\tfrac WM,\ L\Big)\ \le\ \text{makespan}\ \le\ \tfrac WM+L$$

    Args:
        gen_seconds: 每轮生成用时，秒。
        tool_seconds: 每轮工具用时，秒。
        slots: 并发槽数 $M$。

    Returns:
        `(下界, 上界)`，秒；上界不超过下界的两倍。
    """
    _check(gen_seconds, tool_seconds, slots, 1.0, 0.0)
    work = sum(map(sum, gen_seconds)) / slots
    longest = max(sum(gen) + sum(tool) for gen, tool in zip(gen_seconds, tool_seconds, strict=True))
    return float(max(work, longest)), float(work + longest)


def expected_max_lognormal(count: int, *, median: float, sigma: float, steps: int = 4000) -> float:
    r"""$n$ 个独立同分布的对数正态变量的最大值的期望，数值积分。

    $$\mathbb E\Big[\max_i X_i\Big]=\int_{-\infty}^{\infty}e^{\mu+\sigma z}\,n\,\Phi(z)^{n-1}\varphi(z)\,dz$$

    注意：中位数是 $e^\mu$，均值是 $e^{\mu+\sigma^2/2}$，不要混用。

    Args:
        count: 个数 $n$。
        median: 中位数 $e^\mu$，结果与它同单位。
        sigma: 对数的标准差 $\sigma$。
        steps: 在 $[-10,14]$ 上等分的段数。

    Returns:
        最大值的期望。
    """
    if count < 1 or median <= 0 or sigma < 0:
        raise ValueError(f"count={count}、median={median}、sigma={sigma}：要求 count≥1、median>0、sigma≥0。")
    normal, width, total = NormalDist(), 24.0 / steps, 0.0
    for j in range(steps):
        z = -10.0 + (j + 0.5) * width
        total += math.exp(sigma * z) * count * normal.cdf(z) ** (count - 1) * normal.pdf(z)
    return median * total * width


def _check(gen: Times, tool: Times, slots: int, step_seconds: float, step_slope: float) -> None:
    if slots < 1 or not len(gen):
        raise ValueError(f"slots={slots}、{len(gen)} 条轨迹：至少要一个槽、一条轨迹。")
    if [len(row) for row in gen] != [len(row) for row in tool] or not all(len(row) for row in gen):
        raise ValueError("每条轨迹的轮数至少为 1，生成与工具两张表的形状要相同。")
    if min(min(row) for row in [*gen, *tool]) < 0 or step_seconds <= 0 or step_slope < 0:
        raise ValueError("生成量、工具时间、step_slope 不能为负，step_seconds 必须为正。")
