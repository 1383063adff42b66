"""What the gateway counts, for Prometheus. No label ever holds a user, a conversation or text."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)


class Metrics:
    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.sockets = Gauge("attune_sockets", "Open WebSockets", registry=registry)
        self.sockets_closed = Counter(
            "attune_sockets_closed", "WebSockets closed by us", ["code"], registry=registry
        )
        self.running = Gauge("attune_replies_running", "Replies being written here", registry=registry)
        self.replies = Counter("attune_replies", "Replies ended", ["outcome"], registry=registry)
        self.resumed = Counter("attune_replies_resumed", "Replies asked for again", registry=registry)
        self.adopted = Counter(
            "attune_replies_adopted", "Replies taken over from a gateway that died", registry=registry
        )
        self.resubmitted = Counter(
            "attune_replies_resubmitted",
            "Replies given to the engine again after it was lost",
            registry=registry,
        )
        self.fallbacks = Counter(
            "attune_adapter_fallbacks", "Replies served by an older version or the base", registry=registry
        )
        self.unsaved = Counter("attune_turns_unsaved", "Turns the store could not take", registry=registry)
        self.refused = Counter("attune_refused", "Requests refused", ["code"], registry=registry)
        self.prompt_tokens = Counter("attune_prompt_tokens", "Prompt tokens", ["cached"], registry=registry)
        self.output_tokens = Counter("attune_output_tokens", "Generated tokens", registry=registry)
        self.first_token = Histogram(
            "attune_first_token_seconds", "Request to first token", registry=registry, buckets=_SECONDS
        )
        self.queued = Histogram(
            "attune_queue_seconds", "Wait in the engine's queue", registry=registry, buckets=_SECONDS
        )
        self.adapter_load = Histogram(
            "attune_adapter_load_seconds", "Adapter load", ["tier"], registry=registry, buckets=_SECONDS
        )
        self.requests = Counter(
            "attune_http_requests", "HTTP requests", ["route", "method", "status"], registry=registry
        )
        self.engine_up = Gauge("attune_engine_up", "1 while the engine is connected", registry=registry)
        self.store_up = Gauge("attune_store_up", "1 while the store answers", registry=registry)

    def page(self) -> bytes:
        return generate_latest(self.registry)
