"""The addresses of the server: /predict, /health, /labels, /metrics."""

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from mljax import images
from mljax.predict import Predictor
from mljax.prediction_files import NOT_A_NUMBER
from mljax.serve.batching import Batches, Full
from mljax.serve.counters import Counted, Counters
from mljax.serve.uploads import Body, Upload

_DECODERS = min(4, os.cpu_count() or 1)  # threads; each may hold one whole picture


class Limits(NamedTuple):
    """What a server takes.

    Attributes:
        max_wait: seconds that an image waits for others.
        max_queue: images at the same time, and in one request.
        max_bytes: of one request.
        max_pixels: of one picture, height * width.
    """

    max_wait: float
    max_queue: int
    max_bytes: int
    max_pixels: int


class Service:
    """A model behind HTTP; `app` is what a server runs.

    Attributes:
        ready: every size of batch was computed once.
        failure: why it cannot go on, else None.
    """

    def __init__(self, model: Predictor, limits: Limits, stop: Callable[[], None]):
        """stop: is called when there is a `failure`. The model's `batch_size` is the
        largest batch."""
        self._model, self._limits, self._stop = model, limits, stop
        self._data_config: ConfigDict = model.config.data.copy_and_resolve_references()
        self._data_config.max_pixels = min(
            limits.max_pixels, model.config.data.max_pixels
        )
        self._counters = Counters(model.batch_sizes, lambda: self._batches.taken)
        self._batches = Batches(
            model.probabilities,
            max_batch=model.batch_size,
            max_wait=limits.max_wait,
            max_taken=limits.max_queue,
            observe=self._observe,
        )
        self._decoders = ThreadPoolExecutor(_DECODERS, "decode")
        self.ready = False
        self.failure: Exception | None = None
        routes = [
            Route("/predict", self._predict, methods=["POST"]),
            Route("/health", self._health),
            Route("/labels", self._labels),
            Route("/metrics", self._metrics),
        ]
        paths = [route.path for route in routes]
        self.app = Starlette(
            routes=routes,
            middleware=[Middleware(Counted, self._counters, paths)],
            exception_handlers={HTTPException: _refused, Exception: _failed},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, app: Starlette) -> AsyncIterator[None]:
        work = asyncio.create_task(self._work())
        yield  # the server ends this once every request is answered
        work.cancel()
        await asyncio.wait([work])
        self._batches.close()
        self._decoders.shutdown(wait=False, cancel_futures=True)

    async def _work(self) -> None:
        try:
            started = time.perf_counter()
            blank = np.zeros((*images.sides_of(self._data_config), 3), np.uint8)
            sizes = self._model.batch_sizes
            for size in sizes:
                await self._batches.compute([blank] * size)
            self.ready = True
            seconds = time.perf_counter() - started
            text = ", ".join(map(str, sizes))
            print(f"ready:   after {seconds:.1f} s; batches of {text}", flush=True)
            await self._batches.run()
        except Exception as error:
            self.failure = error
            self._stop()

    async def _predict(self, request: Request) -> Response:
        body = Body(request, self._limits.max_bytes)
        try:
            rows = await self._rows(body)
        except HTTPException as refusal:
            if refusal.status_code == 408:
                raise  # there was time enough
            with contextlib.suppress(ClientDisconnect):
                await body.drain()
            if not body.ended:  # the rest is not waited for
                refusal.headers = {**(refusal.headers or {}), "Connection": "close"}
            raise
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; it is counted
        bad = sum("error" in row for row in rows)
        self._counters.images.labels("ok").inc(len(rows) - bad)
        self._counters.images.labels("unreadable").inc(bad)
        return JSONResponse({"images": rows}, 400 if bad == len(rows) else 200)

    async def _rows(self, body: Body) -> list[dict[str, Any]]:
        if not self.ready:
            raise HTTPException(503, "the model is warming up", {"Retry-After": "1"})
        try:
            # A place before anything is read, so that uploads cannot fill the memory.
            with self._batches.room(1):
                given = await body.uploads(self._limits.max_queue)
                with self._batches.room(len(given) - 1):
                    return await asyncio.gather(*map(self._row, given))
        except Full as full:
            seconds = str(full.retry_after)
            reason = f"the queue is full; try again in {seconds} s"
            raise HTTPException(503, reason, {"Retry-After": seconds}) from None

    async def _row(self, upload: Upload) -> dict[str, Any]:
        error: str = upload.error
        if not error:
            loop = asyncio.get_running_loop()
            read = await loop.run_in_executor(self._decoders, self._decode, upload.data)
            if isinstance(read, str):
                error = read
            else:
                p = await self._batches.predict(read)
                if not np.isfinite(p).all():
                    return {"name": upload.name, "error": NOT_A_NUMBER}
                # The shortest digits that give the same float32 again.
                numbers = [float(str(x)) for x in p]
                return {
                    "name": upload.name,
                    "labels": self._model.names(p),
                    "probabilities": dict(
                        zip(self._model.class_names, numbers, strict=True)
                    ),
                }
        return {"name": upload.name, "error": error}

    def _decode(self, data: bytes) -> np.ndarray | str:
        """Pixels of the size that the model takes, or why there are none."""
        try:
            return images.load(data, self._data_config)
        except images.TooLarge as error:
            if self._data_config.max_pixels < self._limits.max_pixels:
                return str(error)  # the model takes no more, whatever the server does
            limit = f"{self._limits.max_pixels / 1e6:g}"
            return f"{error.size}, more than --max-megapixels {limit} of this server"
        except images.UnreadableImage as error:
            return str(error)

    async def _health(self, request: Request) -> Response:
        if self.ready:
            return JSONResponse({"status": "ready"})
        return JSONResponse({"status": "warming up"}, 503, {"Retry-After": "1"})

    async def _labels(self, request: Request) -> Response:
        pairs = zip(self._model.class_names, self._model.thresholds, strict=True)
        labels = [{"name": name, "threshold": float(str(t))} for name, t in pairs]
        return JSONResponse({"labels": labels})

    async def _metrics(self, request: Request) -> Response:
        return Response(
            self._counters.text(), media_type="text/plain; version=0.0.4; charset=utf-8"
        )

    def _observe(self, size: int, seconds: float) -> None:
        self._counters.batch_size.observe(size)
        self._counters.batch_seconds.observe(seconds)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _failed(request: Request, error: Exception) -> Response:
    """A mistake of the server's; the traceback is in its output."""
    return JSONResponse({"error": "the server failed; its output says why"}, 500)
