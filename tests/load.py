"""An open-loop client: requests leave on schedule, whether or not earlier ones were answered."""
import asyncio
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Outcome:
    """A request: when it was due (s from the start), its latency, its answer (status 0: none)."""

    due: float
    ms: float
    status: int
    body: object = None
    headers: dict = field(default_factory=dict)


async def _post(session: aiohttp.ClientSession, url: str, item: dict, due: float,
                retries: int) -> Outcome:
    for attempt in range(retries + 1):
        start = time.perf_counter()
        try:
            async with session.post(url, json=item) as response:
                outcome = Outcome(due, 0, response.status, await response.read(),
                                  dict(response.headers))
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome = Outcome(due, 0, 0, repr(error))
        outcome.ms = 1000 * (time.perf_counter() - start)
        if outcome.status == 200:
            break
        await asyncio.sleep(0.1 if attempt < retries else 0)
    return outcome


async def _post_all(url: str, items: list[dict], rate: float, count: int,
                    events: dict[int, Callable], retries: int) -> list[Outcome]:
    tasks, running, start = [], [], time.perf_counter()
    connector, timeout = aiohttp.TCPConnector(limit=0), aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:
        for i in range(count):
            if (wait := start + i / rate - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if i in events:
                running.append(asyncio.create_task(asyncio.to_thread(events[i])))
            request = _post(session, url, items[i % len(items)], i / rate, retries)
            tasks.append(asyncio.create_task(request))
        await asyncio.gather(*running)
        return await asyncio.gather(*tasks)


def open_loop(url: str, items: list[dict], rate: float, count: int,
              events: dict[int, Callable] | None = None, retries: int = 0) -> list[Outcome]:
    """Sends `count` requests, `rate` a second; calls `events` beside those of these numbers."""
    return asyncio.run(_post_all(url, items, rate, count, events or {}, retries))


def percentile(outcomes: list[Outcome], share: float) -> float:
    """Latency below which this share of the answers came, ms."""
    latencies = sorted(outcome.ms for outcome in outcomes)
    return latencies[min(len(latencies) - 1, int(share * len(latencies)))]


def summary(name: str, outcomes: list[Outcome]) -> str:
    """One line: how many, which statuses, how fast."""
    good = [outcome for outcome in outcomes if outcome.status == 200] or outcomes
    p50, p99 = percentile(good, 0.5), percentile(good, 0.99)
    statuses = dict(Counter(outcome.status for outcome in outcomes))
    return f"{name}: {len(outcomes)} requests, {statuses}, p50 {p50:.0f} ms, p99 {p99:.0f} ms"
