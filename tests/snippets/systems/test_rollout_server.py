"""rollout 调度的模拟器。

真值有四个来源：画得出甘特图的小例子（手算）；这里另写的逐步推进的模拟器（整数时间、每步走一秒，没有堆也没有虚拟时钟）；
对任何调度、对有空槽就补的调度成立的上下界；对数正态分布函数的直接积分与两个变量时的闭式。
"""

import math
import random
from statistics import NormalDist

import pytest

from snippets.systems.rollout_server import (
    expected_max_lognormal,
    makespan_bounds,
    simulate_async,
    simulate_lockstep,
)


def draw(rng, *, most=5, zero=True, equal=False):
    count, turns = rng.randint(1, most), rng.randint(1, 4)
    lengths = [turns if equal else rng.randint(1, turns) for _ in range(count)]
    gen = [[rng.randint(1, 6) for _ in range(n)] for n in lengths]
    tool = [[rng.randint(0 if zero else 1, 6) for _ in range(n)] for n in lengths]
    return gen, tool, rng.randint(1, 4)


def tick_simulator(gen, tool, slots, *, hold=False):
    """逐秒推进：每一秒先让等槽的按（到达时刻，编号）进批，再让在跑的各走一秒。"""
    count = len(gen)
    state, turn, left = ["wait"] * count, [0] * count, [0] * count
    arrived, finish, busy, t = [0] * count, [0] * count, 0, 0
    while not all(s == "done" for s in state):
        moved = True
        while moved:  # 同一秒里可以连着变：生成完、零秒的工具、再排队
            moved = False
            for i in range(count):
                if state[i] == "gen" and left[i] == 0:
                    state[i], left[i], moved = "tool", tool[i][turn[i]], True
                if state[i] == "tool" and left[i] == 0:
                    moved, turn[i] = True, turn[i] + 1
                    if turn[i] == len(gen[i]):
                        state[i], finish[i] = "done", t
                    elif hold:
                        state[i], left[i] = "gen", gen[i][turn[i]]
                    else:
                        state[i], arrived[i] = "wait", t
            held = ("gen", "tool") if hold else ("gen",)
            queue = sorted((arrived[i], i) for i in range(count) if state[i] == "wait")
            free = slots - sum(s in held for s in state)
            for _, i in queue[: max(free, 0)]:
                state[i], left[i], moved = "gen", gen[i][turn[i]], True
        busy += sum(s == "gen" for s in state)
        left = [x - 1 if s in ("gen", "tool") else x for x, s in zip(left, state, strict=True)]
        t += 1
    return finish, busy


# 手算


def test_three_trajectories_on_two_slots_by_hand():
    """甘特图：A 生成 0–2、工具 2–5、生成 5–6、工具 6–7；B 生成 0–4、工具 4–5；C 等到 2，生成 2–5、工具 5–6。

    A 第二轮在 5 到，C 也在 5 让出槽，A 立刻进。B 的第二轮 5 到，槽在 4 就空着：5–7，工具 0。
    """
    gen, tool = [[2, 1], [4, 2], [3]], [[3, 1], [1, 0], [1]]
    result = simulate_async(gen, tool, slots=2)
    assert result.finish == [7, 7, 6]
    assert (result.busy, result.makespan) == (12, 7)
    assert result.utilization == pytest.approx(12 / 14)


def test_lockstep_waits_for_the_slowest_generation_then_the_slowest_tool():
    """第一轮：2、4 占两槽，3 从 2 跑到 5；等工具 max(3, 1, 1)=3，到 8。第二轮：max(1, 2)=2，工具 max(1, 0)=1，到 11。"""
    gen, tool = [[2, 1], [4, 2], [3]], [[3, 1], [1, 0], [1]]
    result = simulate_lockstep(gen, tool, slots=2)
    assert (result.makespan, result.busy, result.finish) == (11, 12, [11, 11, 11])
    waves = simulate_lockstep(gen, tool, slots=2, batch_size=2)
    assert waves.finish == [10, 10, 14]  # 4+3+2+1，再 3+1
    alone = simulate_lockstep(gen, tool, slots=2, batch_size=1)
    assert alone.finish == [7, 14, 18]  # 一条一条地做：2+3+1+1，再 4+1+2+0，再 3+1


def test_holding_the_slot_during_the_tool_by_hand():
    """一个槽：占着不放是 (1+10+1+1)+(1+10+1+1)=26；让出来是 A 0–1、B 1–2、A 11–12、B 12–13、工具到 14。"""
    gen, tool = [[1, 1], [1, 1]], [[10, 1], [10, 1]]
    assert simulate_async(gen, tool, slots=1, hold_slot=True).finish == [13, 26]
    assert simulate_async(gen, tool, slots=1).finish == [13, 14]


def test_step_time_that_grows_with_the_batch_by_hand():
    """一步 1+b 秒。两条各 2、4 个 token：两条同跑 2 步 6 秒，剩一条 2 步 4 秒，完工 10；槽·秒 2×6+4=16。"""
    result = simulate_async([[2], [4]], [[0], [0]], slots=2, step_slope=1.0)
    assert (result.finish, result.busy) == ([6, 10], 16)
    # 第一条 2 步后在 6 秒去等工具 2 秒：6–8 只有一条，走 1 步；8 起又两条，各剩 1：1 步 3 秒
    result = simulate_async([[2, 1], [4]], [[2, 0], [0]], slots=2, step_slope=1.0)
    assert result.finish == [11, 11]


def test_the_trace_integrates_to_the_busy_time():
    gen, tool = [[2, 1], [4, 2], [3]], [[3, 1], [1, 0], [1]]
    for result in (
        simulate_async(gen, tool, slots=2),
        simulate_async(gen, tool, slots=2, hold_slot=True),
        simulate_lockstep(gen, tool, slots=2),
    ):
        pairs = zip(result.trace, result.trace[1:], strict=False)
        assert sum((t1 - t0) * running for (t0, running), (t1, _) in pairs) == pytest.approx(result.busy)
        assert [t for t, _ in result.trace] == sorted(t for t, _ in result.trace)
        assert result.trace[-1] == (result.makespan, 0)
        assert result.trace[0] == (0, 0)  # 开始之前没有在生成的


def test_lockstep_passes_the_step_time_on_by_hand():
    """一步 0.5+0.5b 秒：两条各 2、4 个 token，同跑 2 步 3 秒、剩一条 2 步 2 秒，再等工具 7 秒，共 12 秒。"""
    result = simulate_lockstep([[2], [4]], [[7], [1]], slots=2, step_seconds=0.5, step_slope=0.5)
    assert (result.makespan, result.busy) == (12, 8)


# 独立的模拟器


@pytest.mark.parametrize("hold", [False, True])
def test_agrees_with_a_time_stepped_simulator(hold):
    """整数时间里同时到的请求很多；两边都按（到达时刻，编号）排队，所以每条的完工时刻与槽·秒都要相等。"""
    rng = random.Random(0)
    for _ in range(400):
        gen, tool, slots = draw(rng)
        result = simulate_async(gen, tool, slots=slots, hold_slot=hold)
        finish, busy = tick_simulator(gen, tool, slots, hold=hold)
        assert result.finish == finish, (gen, tool, slots)
        assert result.busy == busy == sum(map(sum, gen))


def test_lockstep_agrees_with_the_time_stepped_simulator_turn_by_turn():
    rng = random.Random(1)
    for _ in range(200):
        gen, tool, slots = draw(rng, equal=True)
        total = 0
        for k in range(len(gen[0])):
            finish, _ = tick_simulator([[row[k]] for row in gen], [[0]] * len(gen), slots)
            total += max(finish) + max(row[k] for row in tool)
        assert simulate_lockstep(gen, tool, slots=slots).makespan == total


# 性质


def test_bounds_hold_and_the_upper_one_is_at_most_twice_the_lower():
    rng = random.Random(2)
    for _ in range(500):
        gen, tool, slots = draw(rng, most=8)
        low, high = makespan_bounds(gen, tool, slots=slots)
        free, lock = simulate_async(gen, tool, slots=slots), simulate_lockstep(gen, tool, slots=slots)
        assert low - 1e-9 <= free.makespan <= high + 1e-9 and high <= 2 * low
        assert lock.makespan >= low - 1e-9
        assert 0 < free.utilization <= 1 and 0 < lock.utilization <= 1
    assert makespan_bounds([[3, 1], [2, 2]], [[5, 0], [0, 0]], slots=2) == (9, 13)
    assert makespan_bounds([[3], [2]], [[0], [0]], slots=1) == (5, 8)


def test_with_a_slot_for_everyone_both_makespans_are_closed_formulas():
    """槽够时：异步是「和的最大」，锁步是「最大的和」，后者不小于前者。"""
    rng = random.Random(3)
    for _ in range(100):
        gen, tool, _ = draw(rng, equal=True)
        free, lock = simulate_async(gen, tool, slots=9), simulate_lockstep(gen, tool, slots=9)
        assert free.finish == [sum(g) + sum(t) for g, t in zip(gen, tool, strict=True)]
        columns = [*zip(*gen, strict=True), *zip(*tool, strict=True)]
        assert lock.makespan == sum(map(max, columns)) >= free.makespan


def test_one_turn_without_tools_is_the_same_under_both():
    rng = random.Random(4)
    for _ in range(100):
        gen = [[rng.random()] for _ in range(7)]
        tool = [[0.0]] * 7
        assert simulate_async(gen, tool, slots=3).makespan == simulate_lockstep(gen, tool, slots=3).makespan


def test_lockstep_can_be_a_factor_of_twice_the_turns_slower():
    """2K 个阶段（K 次生成、K 次工具）各换一条掉队：锁步 2K·大，异步至多「大加 K」；2K 也是槽够时的上限。"""
    turns, big = 3, 1000
    gen = [[big if 2 * k == i else 1 for k in range(turns)] for i in range(2 * turns)]
    tool = [[big if 2 * k + 1 == i else 0 for k in range(turns)] for i in range(2 * turns)]
    lock, free = simulate_lockstep(gen, tool, slots=6).makespan, simulate_async(gen, tool, slots=6).makespan
    assert (lock, free) == (2 * turns * big, big + turns)
    rng = random.Random(5)
    for _ in range(100):
        gen, tool, _ = draw(rng, equal=True)
        free = simulate_async(gen, tool, slots=9).makespan
        assert simulate_lockstep(gen, tool, slots=9).makespan <= 2 * len(gen[0]) * free


def test_with_a_slot_for_everyone_async_is_never_slower_even_if_a_step_takes_longer_in_a_bigger_batch():
    """一步 a+c·b 秒：一条至多用 a·自己的步数＋c·全部步数＋自己的工具；锁步逐轮取最大，不会更少。"""
    rng = random.Random(6)
    for _ in range(300):
        gen, tool, _ = draw(rng, equal=True)
        cost = {"slots": 9, "step_seconds": rng.choice([0.01, 1.0]), "step_slope": rng.choice([0.5, 2.0])}
        all_steps = cost["step_slope"] * sum(map(sum, gen))
        free = simulate_async(gen, tool, **cost)
        for finish, g, t in zip(free.finish, gen, tool, strict=True):
            assert finish <= cost["step_seconds"] * sum(g) + all_steps + sum(t) + 1e-9
        columns = [*zip(*gen, strict=True)], [*zip(*tool, strict=True)]
        lock = simulate_lockstep(gen, tool, **cost).makespan
        expected = cost["step_seconds"] * sum(map(max, columns[0])) + all_steps + sum(map(max, columns[1]))
        assert lock == pytest.approx(expected) and free.makespan <= lock + 1e-9


def test_a_scale_of_time_is_only_a_scale():
    gen, tool = [[2, 1], [4, 2], [3]], [[3, 1], [1, 0], [1]]
    base = simulate_async(gen, tool, slots=2)
    scaled = simulate_async(gen, [[0.25 * x for x in row] for row in tool], slots=2, step_seconds=0.25)
    assert scaled.finish == [0.25 * x for x in base.finish] and scaled.utilization == base.utilization
    lock = simulate_lockstep(gen, [[0.25 * x for x in row] for row in tool], slots=2, step_seconds=0.25)
    assert lock.makespan == 0.25 * 11


# 最大值的期望


def test_one_slice_of_the_integral_by_hand():
    """只分一段：宽 24，取中点 z=2，20·e^{0.8·2}·3·Φ(2)²·φ(2)·24。"""
    density, below = math.exp(-2) / math.sqrt(2 * math.pi), (1 + math.erf(math.sqrt(2))) / 2
    expected = 20 * math.exp(1.6) * 3 * below**2 * density * 24
    assert expected_max_lognormal(3, median=20.0, sigma=0.8, steps=1) == pytest.approx(expected)


def test_expected_maximum_of_lognormals():
    """n=1 是均值 e^{μ+σ²/2}；n=2 有闭式 2·均值·Φ(σ/√2)；一般的 n 与分布函数的积分 ∫(1−Fⁿ)dx 相同。"""
    median, sigma = 20.0, 0.8
    mean = median * math.exp(sigma**2 / 2)
    assert expected_max_lognormal(1, median=median, sigma=sigma) == pytest.approx(mean, rel=1e-9)
    pair = 2 * mean * NormalDist().cdf(sigma / math.sqrt(2))
    assert expected_max_lognormal(2, median=median, sigma=sigma) == pytest.approx(pair, rel=1e-9)
    # 尾越重，最大与均值之比越大：M·E[Φ(z+s)^{M−1}] 随 s 递增
    spread = [
        expected_max_lognormal(64, median=1.0, sigma=s) / math.exp(s * s / 2) for s in (0.0, 0.4, 0.8, 1.2)
    ]
    assert spread == sorted(spread) and spread[0] == pytest.approx(1.0) and spread[3] > 2 * spread[1]
    width, tail, cdf = 0.05, 0.0, NormalDist().cdf
    for j in range(80_000):
        x = (j + 0.5) * width
        tail += width * (1 - cdf(math.log(x / median) / sigma) ** 64)
    assert expected_max_lognormal(64, median=median, sigma=sigma) == pytest.approx(tail, rel=1e-4)
    assert expected_max_lognormal(7, median=3.0, sigma=0.0) == pytest.approx(3.0)


# 边界与报错


def test_bad_arguments_raise():
    for bad in (
        lambda: simulate_async([[1]], [[1]], slots=0),
        lambda: simulate_async([], [], slots=1),
        lambda: simulate_async([[1, 2]], [[1]], slots=1),
        lambda: simulate_async([[]], [[]], slots=1),
        lambda: simulate_async([[-1]], [[1]], slots=1),
        lambda: simulate_async([[1]], [[-1]], slots=1),
        lambda: simulate_async([[1]], [[1]], slots=1, step_seconds=0.0),
        lambda: simulate_async([[1]], [[1]], slots=1, step_slope=-1.0),
        lambda: simulate_lockstep([[1]], [[1]], slots=1, batch_size=0),
        lambda: makespan_bounds([[1]], [[1]], slots=0),
        lambda: expected_max_lognormal(0, median=1.0, sigma=1.0),
        lambda: expected_max_lognormal(1, median=0.0, sigma=1.0),
        lambda: expected_max_lognormal(1, median=1.0, sigma=-1.0),
    ):
        with pytest.raises(ValueError, match="[一-鿿]"):
            bad()


# 误传


@pytest.mark.rejects
def test_async_is_not_always_faster():
    """误传：同一组抽样下异步一定不慢。先到先得的反例：锁步 28，异步 29，逐秒的模拟器也是 29。"""
    gen = [[5, 2, 6], [2, 1, 2], [5, 5, 5], [2, 3, 1]]
    tool = [[2, 0, 2], [1, 2, 2], [3, 2, 3], [2, 1, 0]]
    assert simulate_lockstep(gen, tool, slots=2).makespan == 28
    assert simulate_async(gen, tool, slots=2).makespan == 29 == max(tick_simulator(gen, tool, 2)[0])


@pytest.mark.rejects
def test_wrong_schedules_are_rejected():
    """三种常见的错：等工具时占着槽；把锁步写成逐轮「生成加工具」的最大；用平均代替最大。都与手算的真值不等。"""
    gen, tool = [[2, 1], [4, 2], [3, 1]], [[3, 1], [1, 0], [1, 6]]
    truth, _ = tick_simulator(gen, tool, 2)
    assert simulate_async(gen, tool, slots=2).finish == truth
    assert simulate_async(gen, tool, slots=2, hold_slot=True).finish != truth
    lock = simulate_lockstep(gen, tool, slots=3).makespan
    assert lock == (4 + 3) + (2 + 6)
    max_of_sums = sum(max(g[k] + t[k] for g, t in zip(gen, tool, strict=True)) for k in range(2))
    assert lock - max_of_sums >= 2  # 5+7：省掉了「先等生成、再等工具」的一次等待
    means = sum(sum(column) / 3 for column in [*zip(*gen, strict=True), *zip(*tool, strict=True)])
    assert lock - means > 5
