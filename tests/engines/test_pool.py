"""Many engines: which one a request goes to, and what happens when one fails, gets stuck, or serves other weights."""

import asyncio
import re
import time
from collections.abc import Callable
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_hpt.engines.pool import MARGIN, TRIES, EnginePool, Load, choose
from megatron_hpt.engines.types import SamplingRequest, Versions
from megatron_hpt.errors import DeadlineError, EngineError

from .servers import PATIENCE, Server, serve

LOADS = st.lists(st.builds(Load, st.booleans(), st.integers(0, 10_000), st.booleans()), min_size=1, max_size=8)
THREE = Versions(3, 3)
HOMES = st.none() | st.integers(0, 7)


def request(seed: int, prompt: tuple[int, ...] = (1, 2), samples: int = 1) -> SamplingRequest:
    return SamplingRequest(list(prompt), samples, seed, 1.0, 1.0, 4, 0)


def pooled(servers: list[Server], action: Callable, return_s: float = 5.0, on_silence: Callable[[str], None] | None = None):
    """Run `action(pool, engines)`, in which `engines` samples with version 3."""

    async def run(clients):
        pool = EnginePool(clients, replace(PATIENCE, return_s=return_s), period_s=0.05, on_silence=on_silence)
        async with pool.serving(THREE) as engines:
            return await action(pool, engines)

    return serve(servers, run)


@given(loads=LOADS, home=HOMES, margin=st.integers(0, 1000))
def test_the_choice_is_in_service_balanced_and_at_home_where_it_may(loads: list[Load], home: int | None, margin: int) -> None:
    chosen = choose(loads, home if home is not None and home < len(loads) else None, margin)
    in_service = [load for load in loads if load.in_service]
    usable = [load for load in in_service if not load.late] or in_service
    if not usable:
        assert chosen is None
        return
    least = min(load.tokens for load in usable)
    assert loads[chosen] in usable
    assert loads[chosen].tokens <= least + margin
    if home is not None and home < len(loads) and loads[home] in usable and loads[home].tokens <= least + margin:
        assert chosen == home


@given(prompts=st.lists(st.integers(0, 5), max_size=120), engines=st.integers(1, 4), size=st.integers(1, 50))
def test_requests_spread_within_the_margin(prompts: list[int], engines: int, size: int) -> None:
    """No engine is ever busier than another by more than the margin and the request that was placed last."""
    tokens, homes, margin = [0] * engines, {}, MARGIN * size
    for prompt in prompts:
        homes[prompt] = choose([Load(True, t) for t in tokens], homes.get(prompt), margin)
        tokens[homes[prompt]] += size
    assert max(tokens) - min(tokens) <= margin + size


def test_samples_of_a_prompt_share_an_engine_and_prompts_are_spread() -> None:
    servers = [Server(slow_s=lambda _: 0.1), Server(slow_s=lambda _: 0.1)]

    async def action(pool, engines):
        prompts = [(1,), (2,), (3,), (4,)]
        await asyncio.gather(*(engines.generate(request(i, prompt)) for prompt in prompts for i in range(4)))

    pooled(servers, action)
    assert [len(server.seeds) for server in servers] == [8, 8]
    assert not set(servers[0].prompts) & set(servers[1].prompts)


@pytest.mark.parametrize("harm", ["fails", "stuck", "unhealthy", "gone"])
def test_a_request_goes_elsewhere_with_its_seed(harm: str) -> None:
    """Whether it fails by itself, or waits for an engine that turns out to be unwell."""
    bad, good = Server(slow_s=lambda _: 0.1 if harm == "fails" else 60), Server()

    async def action(pool, engines):
        pending = [asyncio.create_task(engines.generate(request(seed, (seed,)))) for seed in range(4)]
        await under_way([bad, good], 4)
        assert len(bad.seeds) == len(good.seeds) == 2
        bad.fails, bad.stuck, bad.healthy = harm == "fails", harm == "stuck", harm != "unhealthy"
        if harm == "gone":
            await pool._servers[0].engine._http.close()  # the connections break
        answers = await asyncio.gather(*pending)
        return [answer[0].tokens[0] for answer in answers], pool.in_service(THREE), pool.retried

    tokens, in_service, retried = pooled([bad, good], action)
    assert tokens == [0, 1, 2, 3]
    assert set(good.seeds) == {0, 1, 2, 3}
    assert retried == 2
    assert in_service == 1 or harm == "fails"  # one that failed and says that it is well may be in again
    if harm != "fails":
        assert sorted(bad.dropped) == sorted(set(bad.seeds))  # their connections were closed: the engine may stop them


async def under_way(servers: list[Server], number: int) -> None:
    """Wait until so many requests have reached the servers."""
    while sum(len(server.seeds) for server in servers) < number:
        await asyncio.sleep(0.01)


async def until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.01)


def test_the_only_engine_is_late_and_keeps_its_requests(caplog: pytest.LogCaptureFixture) -> None:
    """A busy machine: no answer for many times the usual, then everything is answered; nothing is begun anew."""
    only = Server(slow_s=lambda _: 0.05)

    async def action(pool, engines):
        pending = asyncio.create_task(engines.generate(request(0)))
        await under_way([only], 1)
        only.stuck = True
        await until(lambda: pool._servers[0].late)
        later = asyncio.create_task(engines.generate(request(1)))  # there is no other engine
        await asyncio.sleep(3 * PATIENCE.late_s)
        only.stuck = False
        answers = [(await task)[0].tokens[0] for task in (pending, later)]
        await until(lambda: not pool._servers[0].late)
        return answers, pool.in_service(THREE), pool.retried

    assert pooled([only], action) == ([0, 1], 1, 0)
    assert only.seeds == [0, 1]
    assert only.dropped == []
    late, again = (record.getMessage() for record in caplog.records if record.name.endswith("pool"))
    assert "has not answered for 0.2 s (deadlines.health_s): it is late and keeps its 1 requests" in late
    assert "answers again" in again


def test_new_requests_avoid_a_late_engine_that_keeps_its_own() -> None:
    late, other = Server(slow_s=lambda _: 0.05), Server()

    async def action(pool, engines):
        first = asyncio.create_task(engines.generate(request(0, (0,))))
        await under_way([late], 1)
        late.stuck = True
        await until(lambda: pool._servers[0].late)
        await asyncio.gather(*(engines.generate(request(seed, (0,))) for seed in range(1, 5)))
        late.stuck = False
        return (await first)[0].tokens.tolist(), pool.in_service(THREE), pool.retried

    assert pooled([late, other], action) == ([0], 2, 0)
    assert (late.seeds, sorted(other.seeds)) == ([0], [1, 2, 3, 4])


@pytest.mark.parametrize("harm", ["silent", "barren"])
def test_an_engine_without_any_sign_of_life_is_given_up(harm: str) -> None:
    """It answers nothing, or it answers and produces nothing; its requests go elsewhere, and somebody may start it again."""
    bad, good, told = Server(slow_s=lambda _: 60), Server(), []

    async def action(pool, engines):
        pending = asyncio.create_task(engines.generate(request(0)))
        await under_way([bad], 1)
        bad.stuck, bad.produces, started = harm == "silent", harm != "barren", time.monotonic()
        (sample,) = await pending
        return sample.tokens.tolist(), pool.in_service(THREE), time.monotonic() - started, pool._servers[0].reason

    tokens, in_service, seconds, reason = pooled([bad, good], action, on_silence=told.append)
    assert (tokens, in_service, bad.dropped, told) == ([0], 1, [0], [bad.url])
    assert seconds > 0.9 * PATIENCE.silent_s
    assert "(deadlines.silent_s)" in reason


def test_an_engine_that_produces_tokens_is_never_given_up() -> None:
    """Its one request takes longer than an engine may be silent."""
    slow, told = Server(slow_s=lambda _: 2 * PATIENCE.silent_s), []
    answer = pooled([slow], lambda _, engines: engines.generate(request(3)), on_silence=told.append)
    assert (answer[0].tokens.tolist(), slow.seeds, told) == ([3], [3], [])


def test_an_idle_engine_need_not_produce() -> None:
    idle, told = Server(produces=False), []

    async def action(pool, engines):
        await asyncio.sleep(1.2 * PATIENCE.silent_s)
        return pool.in_service(THREE)

    assert (pooled([idle], action, on_silence=told.append), told) == (1, [])


def test_an_engine_comes_back_and_waiting_requests_go_to_it() -> None:
    only = Server(healthy=False)

    async def action(pool, engines):
        pending = asyncio.create_task(engines.generate(request(7)))
        await until(lambda: pool.in_service(THREE) == 0)
        assert only.seeds == []
        only.healthy = True
        return await pending

    assert pooled([only], action)[0].tokens.tolist() == [7]


@pytest.mark.parametrize("version", ["2", "4", "default", "-3"])
def test_an_engine_of_other_weights_is_not_used_until_it_has_the_right_ones(version: str) -> None:
    other, right = Server(version=version), Server()

    async def action(pool, engines):
        await asyncio.gather(*(engines.generate(request(seed, (seed,))) for seed in range(4)))
        used = (len(other.seeds), pool.in_service(THREE))
        other.version = "3"
        await until(lambda: pool.in_service(THREE) == 2)
        await asyncio.gather(*(engines.generate(request(seed, (seed,))) for seed in range(4, 8)))
        return used

    assert pooled([other, right], action) == (0, 1)
    assert len(other.seeds) == 2


def test_a_sample_of_other_weights_is_made_again_elsewhere() -> None:
    """An engine that was started again between two questions: its answer tells."""
    other, right = Server(slow_s=lambda _: 0.03), Server(slow_s=lambda _: 0.03)

    async def run(clients):
        pool = EnginePool(clients, PATIENCE, period_s=60.0)
        async with pool.serving(THREE) as engines:
            other.version = "default"
            answers = await asyncio.gather(*(engines.generate(request(seed, (seed,))) for seed in range(4)))
            return {sample.version for answer in answers for sample in answer}, pool.in_service(THREE), pool.retried

    assert serve([other, right], run) == ({3}, 1, 2)


def test_the_next_version_finds_the_engines_that_have_it() -> None:
    first, second = Server(), Server()

    async def run(clients):
        pool = EnginePool(clients, PATIENCE, period_s=0.05)
        async with pool.serving(THREE) as engines:
            await engines.generate(request(1))
        first.version = "4"
        async with pool.serving(Versions(4, 4)) as engines:
            await asyncio.gather(*(engines.generate(request(seed, (seed,))) for seed in range(2, 6)))
            return pool.in_service(Versions(4, 4))

    assert serve([first, second], run) == 1
    assert set(first.seeds) >= {2, 3, 4, 5}


def test_a_request_that_fails_everywhere_names_all_it_was_sent_to() -> None:
    servers = [Server(fails=True), Server(fails=True)]
    with pytest.raises(EngineError, match=rf"failed {TRIES} times: .*out of memory") as raised:
        pooled(servers, lambda _, engines: engines.generate(request(5)))
    assert all(server.url in str(raised.value) for server in servers)
    assert sum(len(server.seeds) for server in servers) == TRIES
    assert {seed for server in servers for seed in server.seeds} == {5}


@pytest.mark.slow
def test_without_any_engine_the_wait_ends_and_says_why_each_is_out() -> None:
    servers = [Server(healthy=False), Server(version="default"), Server(stuck=True)]
    started = time.monotonic()
    with pytest.raises(DeadlineError, match=r"no engine in service for 2 s") as raised:
        pooled(servers, lambda _, engines: engines.generate(request(0)), return_s=2.0)
    assert time.monotonic() - started < 8
    ill, other, stuck = (part for part in str(raised.value).removeprefix("no engine in service for 2 s: ").split("; http"))
    assert "refused /health (503)" in ill
    assert servers[1].url.removeprefix("http") in other
    assert "serves weights None; 3 are needed" in str(raised.value)
    assert re.search(r"did not answer /health within 1\.5 s \(deadlines\.silent_s\)", stuck)


def test_a_request_that_is_cancelled_leaves_its_engine() -> None:
    only = Server(slow_s=lambda _: 60)

    async def action(pool, engines):
        pending = asyncio.create_task(engines.generate(request(0)))
        await until(lambda: only.running == 1)
        pending.cancel()
        await until(lambda: only.running == 0)
        return only.running, pool._servers[0].load(THREE).tokens, pool.in_service(THREE)

    assert pooled([only], action) == (0, 0, 1)


@pytest.mark.slow
def test_batches_that_overlap_take_their_own_versions() -> None:
    """An engine with weights that are too old for one batch still works for the other; new weights let both use it."""
    old, new = Server("3"), Server("4")

    async def run(clients):
        pool = EnginePool(clients, PATIENCE, period_s=0.05)
        async with pool.serving(Versions(3, 4)) as either, pool.serving(Versions(4, 5)) as newer:
            await asyncio.gather(*(newer.generate(request(seed, (seed,))) for seed in range(4)))
            assert (old.seeds, sorted(new.seeds)) == ([], [0, 1, 2, 3])
            await asyncio.gather(*(either.generate(request(seed, (seed,))) for seed in range(10, 18)))
            assert old.seeds
            old.version = "5"
            await until(lambda: pool._servers[0].version == 5)
            new.version = "default"  # it is started again
            await until(lambda: pool._servers[1].version is None)
            with pytest.raises(DeadlineError, match=r"serves weights 5; 3 to 4 are needed.*serves weights None"):
                await asyncio.wait_for(either.generate(request(20)), 20)
            return (await newer.generate(request(21)))[0].version

    assert serve([old, new], lambda clients: run(clients)) == 5
    assert 21 in old.seeds


def test_weights_that_arrive_under_way_leave_requests_alone_that_take_them() -> None:
    only = Server("3", slow_s=lambda _: 0.4)

    async def run(clients):
        pool = EnginePool(clients, PATIENCE, period_s=0.05)
        async with pool.serving(Versions(3, 4)) as engines:
            pending = asyncio.create_task(engines.generate(request(0)))
            await under_way([only], 1)
            only.version = "4"
            await until(lambda: pool._servers[0].version == 4)
            await pending
            return pool.retried, pool.in_service(Versions(3, 4))

    assert serve([only], run) == (0, 1)
    assert only.salts == ["version 3"]  # what was computed for it is not used for requests of newer weights


def test_a_request_that_new_weights_ended_is_asked_again(caplog: pytest.LogCaptureFixture) -> None:
    only = Server("3", aborts=2)

    async def action(pool, engines):
        return (await engines.generate(request(7)))[0].tokens.tolist(), pool.in_service(THREE), pool.retried

    assert pooled([only], action) == ([7], 1, 2)
    assert not caplog.records  # nothing is wrong with the engine


def test_requests_that_are_always_ended_say_what_to_change() -> None:
    with pytest.raises(EngineError, match=r"failed 4 times.*transfer\.in_flight=abort"):
        pooled([Server("3", aborts=TRIES)], lambda _, engines: engines.generate(request(7)))


def test_time_with_requests_is_counted_once_however_many_there_are() -> None:
    busy, idle = Server(slow_s=lambda _: 0.3), Server()

    async def action(pool, engines):
        await asyncio.gather(*(engines.generate(request(seed, (1,))) for seed in range(3)))
        await asyncio.sleep(0.2)
        return pool.busy_s * pool.size

    assert 0.3 <= pooled([busy, idle], action) < 0.5
