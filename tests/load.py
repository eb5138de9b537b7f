"""An open-loop client: requests leave when their time has come, whether or not earlier ones were answered."""
import asyncio
import json
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import aiohttp


@dataclass
class Outcome:
    """One request: when it was due (s from the start), how long it took (ms), and what came back; status 0 where nothing did."""

    due: float
    ms: float
    status: int
    body: object = None
    headers: dict = field(default_factory=dict)
    retried: int = 0


async def _one(session: aiohttp.ClientSession, url: str, body: bytes, due: float, retries: int, outcomes: list[Outcome]) -> None:
    for attempt in range(retries + 1):
        begin = time.perf_counter()
        try:
            async with session.post(url, data=body, headers={"content-type": "application/json"}) as answer:
                text = await answer.read()
                outcome = Outcome(due, 0, answer.status, text, dict(answer.headers), attempt)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            outcome = Outcome(due, 0, 0, repr(error), {}, attempt)
        outcome.ms = 1000 * (time.perf_counter() - begin)
        if outcome.status == 200 or attempt == retries:
            break
        await asyncio.sleep(0.1)
    outcomes.append(outcome)


async def _run(url: str, bodies: list[bytes], rate: float, until: Callable[[list[Outcome]], bool], events: dict[int, Callable], retries: int) -> list[Outcome]:
    outcomes, tasks, begin, count = [], set(), time.perf_counter(), 0
    timeout = aiohttp.ClientTimeout(total=30)
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0), timeout=timeout) as session:
        running = []
        while not until(outcomes):
            due = count / rate
            if (wait := begin + due - time.perf_counter()) > 0:
                await asyncio.sleep(wait)
            if count in events:
                running.append(asyncio.create_task(asyncio.to_thread(events[count])))
            task = asyncio.create_task(_one(session, url, bodies[count % len(bodies)], due, retries, outcomes))
            tasks.add(task)
            task.add_done_callback(tasks.discard)
            count += 1
        await asyncio.gather(*tasks, *running)
    return sorted(outcomes, key=lambda outcome: outcome.due)


def open_loop(url: str, items: list[dict], rate: float, count: int, events: dict[int, Callable] | None = None, retries: int = 0) -> list[Outcome]:
    """`count` requests at `rate` a second, each with the next item; `events` are called beside when their request number is due."""
    sent = iter(range(count + 1))
    return asyncio.run(_run(url, [json.dumps(item).encode() for item in items], rate, lambda _: next(sent) >= count, events or {}, retries))


def percentile(outcomes: list[Outcome], share: float) -> float:
    """Latency below which this share of the answers came, ms."""
    times = sorted(outcome.ms for outcome in outcomes)
    return times[min(len(times) - 1, int(share * len(times)))]


def summary(name: str, outcomes: list[Outcome]) -> str:
    """One line: how many, which statuses, how fast."""
    statuses = {}
    for outcome in outcomes:
        statuses[outcome.status] = statuses.get(outcome.status, 0) + 1
    good = [outcome for outcome in outcomes if outcome.status == 200] or outcomes
    return f"{name}: {len(outcomes)} requests, {statuses}, p50 {percentile(good, 0.5):.0f} ms, p99 {percentile(good, 0.99):.0f} ms"
