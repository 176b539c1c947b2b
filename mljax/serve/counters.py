"""What is counted while serving, in the text form that Prometheus reads."""

import time
from collections.abc import Callable, Sequence

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Counters:
    """The numbers of one server. They start at 0."""

    def __init__(self, batch_sizes: Sequence[int], queue_length: Callable[[], float]):
        """queue_length: images that were taken and have no answer yet."""
        self._registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)  # memory, CPU time
        self.requests = Counter(
            "mljax_requests",
            "Requests that were answered",
            ["path", "status"],
            registry=registry,
        )
        self.seconds = Histogram(
            "mljax_request_seconds",
            "From a request to its answer",
            ["path"],
            registry=registry,
        )
        self.images = Counter(
            "mljax_images",
            "Images, by what became of them: ok or unreadable",
            ["result"],
            registry=registry,
        )
        self.batch_size = Histogram(
            "mljax_batch_size",
            "Images that were computed together",
            buckets=batch_sizes,
            registry=registry,
        )
        self.batch_seconds = Histogram(
            "mljax_batch_seconds", "Computing one batch", registry=registry
        )
        queue = Gauge(
            "mljax_queue_length",
            "Images that were taken and have no answer yet",
            registry=registry,
        )
        queue.set_function(queue_length)
        for result in ("ok", "unreadable"):  # so that they are there from the start
            self.images.labels(result)

    def text(self) -> bytes:
        return generate_latest(self._registry)


class Counted:
    """An ASGI middleware that counts requests and their time."""

    def __init__(self, app: ASGIApp, counters: Counters, paths: Sequence[str]):
        """paths: each is counted by itself. Others are one, as clients make them up."""
        self._app, self._counters, self._paths = app, counters, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 500

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._counters.requests.labels(path, str(status)).inc()
            self._counters.seconds.labels(path).observe(time.perf_counter() - started)
