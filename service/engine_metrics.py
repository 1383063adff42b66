"""What the engine and the queue of refreshes say of themselves, for Prometheus; asked when the page is.

Sums only grow while their process lives, so a mean over a while is a quotient of two rates: seconds of a part
of a step by steps, rows by steps, tokens found in the prefix cache by tokens looked up.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from personalization.jobs import QueueStats

STEP_PARTS = ("schedule", "build", "launch", "wait", "device", "apply")


@dataclass(frozen=True, slots=True, eq=False)  # a registry keeps its collectors by identity
class Observed:
    """A picture of what runs beside the gateway; None for what did not answer. `engine` is
    `EngineStats.as_dict()`."""

    engine: Mapping[str, Any] | None
    refreshes: QueueStats | None

    def page(self) -> bytes:
        """In Prometheus' text format; empty if nothing answered."""
        registry = CollectorRegistry()
        registry.register(self)
        return generate_latest(registry)

    def collect(self) -> Iterator[Metric]:
        if self.engine is not None:
            yield from _of_engine(**self.engine)
        if self.refreshes is not None:
            yield from _of_refreshes(self.refreshes)


def _of_engine(
    step: Mapping[str, Any],
    queue: Mapping[str, float],
    pages: Mapping[str, int],
    prefix: Mapping[str, int],
    adapters: Mapping[str, Any],
) -> Iterator[Metric]:
    yield _counter("steps", "Steps", step["steps"])
    seconds = {part: step[f"{part}_s"] for part in STEP_PARTS}
    yield _counters("step_seconds", "Seconds of all steps, by part", "part", seconds)
    yield _counter("rows", "Sequences in all steps", step["rows"])
    yield _counter("tokens", "Tokens computed, of prompts and replies", step["tokens"])
    yield _counter("step_output_tokens", "Tokens drawn", step["output_tokens"])
    yield _counter("step_adapters", "Distinct adapters in each step, summed", step["adapters"])
    yield _counter("failed_batches", "Steps that failed and were done one by one", step["failed_batches"])
    yield _counters("finished", "Requests ended", "reason", step["finished"])
    last = {what: step[f"last_{what}"] for what in ("rows", "tokens", "adapters")}
    yield _gauges("last_step", "The shape of the last step", "of", last)

    requests = {state: queue[state] for state in ("waiting", "running")}
    yield _gauges("requests", "Requests in the engine", "state", requests)
    yield _gauge("oldest_wait_seconds", "How long the oldest request waits", queue["oldest_wait_s"])
    yield _counter("admitted", "Requests that began to run, again after a preemption", queue["admitted"])
    yield _counter("preemptions", "Requests that gave up their pages to others", queue["preemptions"])

    held = {"free": pages["free"]}
    for kind in ("kv", "adapter"):
        idle = pages[f"{kind}_idle"]
        held |= {kind: pages[kind] - idle, f"{kind}_idle": idle}
    yield _gauges("pages", "Pages, by what they hold; together all there are", "holds", held)
    yield _gauge("page_bytes", "Bytes of a page", pages["slab_bytes"])
    yield _counter("prefix_lookup_tokens", "Prompt tokens looked up", prefix["lookup_tokens"])
    yield _counter("prefix_hit_tokens", "Of those, found in the prefix cache", prefix["hit_tokens"])
    evicted = {"kv": prefix["evictions"], "adapter": adapters["device_evictions"]}
    yield _counters("evictions", "Blocks of K/V, and adapters, that gave their pages up", "of", evicted)

    yield _gauge("adapters_resident", "Adapters on the device", adapters["resident"])
    yield _gauge("adapters_loading", "Adapters being read", queue["loading"])
    yield _gauge("adapters_copying", "Adapters on their way to the device", queue["copying"])
    yield _gauge("adapters_host_bytes", "Bytes of adapters in host memory", adapters["host_bytes"])
    yield _counters("adapters_found", "Where requests found their adapter", "tier", adapters["found"])
    yield _counter("adapter_loads", "Adapters read from disk", adapters["loads"])
    yield _counter("adapter_load_failures", "Adapters that could not be read", adapters["failures"])
    yield _counter("adapter_load_seconds", "Seconds of reading them", adapters["seconds"])
    yield _gauge("adapter_load_longest_seconds", "The longest of these", adapters["longest_s"])
    yield _counter("adapter_copies", "Copies to the device seen to end", adapters["copies"])
    yield _counter("adapter_copy_seconds", "Seconds until they were", adapters["copy_s"])
    yield _counter("adapter_host_evictions", "Adapters that left host memory", adapters["host_evictions"])


def _of_refreshes(stats: QueueStats) -> Iterator[Metric]:
    jobs = {"queued": stats.queued, "running": stats.active, "later": stats.scheduled}
    yield _gauges("jobs", "Refreshes to come and under way", "state", jobs, room="refresh")
    yield _gauge("dead", "Refreshes that failed for good, kept to be looked at", stats.dead, room="refresh")
    yield _counters("ended", "Refreshes ended", "outcome", stats.counts, room="refresh")


def _counter(name: str, told: str, value: float) -> Metric:
    return CounterMetricFamily(f"attune_engine_{name}", told, value=value)


def _gauge(name: str, told: str, value: float, *, room: str = "engine") -> Metric:
    return GaugeMetricFamily(f"attune_{room}_{name}", told, value=value)


def _counters(
    name: str, told: str, label: str, values: Mapping[str, float], *, room: str = "engine"
) -> Metric:
    family = CounterMetricFamily(f"attune_{room}_{name}", told, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family


def _gauges(name: str, told: str, label: str, values: Mapping[str, float], *, room: str = "engine") -> Metric:
    family = GaugeMetricFamily(f"attune_{room}_{name}", told, labels=[label])
    for key, value in values.items():
        family.add_metric([key], value)
    return family
