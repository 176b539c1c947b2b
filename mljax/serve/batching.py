"""Images of many requests, computed together.

A model takes little longer for several images than for one. So a request waits a few
milliseconds for others, and what comes while a batch is computed is the next batch.
"""

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

Compute = Callable[[list[np.ndarray]], np.ndarray]


class Full(Exception):
    """There is no room. `retry_after`: seconds until there probably is, at least 1."""

    def __init__(self, retry_after: int):
        super().__init__(f"full for about {retry_after} s")
        self.retry_after = retry_after


class _Waiting(NamedTuple):
    pixels: np.ndarray
    answer: asyncio.Future[np.ndarray]


class Batches:
    """To be used inside one event loop; the computing is in a thread of its own.

    Attributes:
        taken: images that have a place (`room`), whatever is done with them now.
    """

    def __init__(
        self,
        compute: Compute,
        *,
        max_batch: int,
        max_wait: float,
        max_taken: int,
        observe: Callable[[int, float], None],
    ):
        """
        Args:
            compute: at most `max_batch` images uint8 [height, width, 3] -> float32
                [images, num_classes].
            max_batch: images computed together.
            max_wait: seconds that a batch waits for more images, the model being free.
            max_taken: images that have a place at the same time.
            observe: is told the images and seconds of each batch.
        """
        self._compute, self._observe = compute, observe
        self._max_batch, self._max_wait = max_batch, max_wait
        self._max_taken = max_taken
        self._queue: asyncio.Queue[_Waiting] = asyncio.Queue()  # `room` bounds it
        self._thread = ThreadPoolExecutor(1, "model")
        self._seconds_per_image = 0.0
        self.taken = 0

    @contextlib.contextmanager
    def room(self, images: int) -> Iterator[None]:
        """A place for so many images. Raises Full where there is none."""
        if self.taken + images > self._max_taken:
            seconds = self.taken * self._seconds_per_image
            raise Full(max(1, math.ceil(seconds)))
        self.taken += images
        try:
            yield
        finally:
            self.taken -= images

    async def predict(self, pixels: np.ndarray) -> np.ndarray:
        """Probabilities [num_classes] of an image that has a place."""
        answer: asyncio.Future[np.ndarray]
        answer = asyncio.get_running_loop().create_future()
        self._queue.put_nowait(_Waiting(pixels, answer))
        return await answer

    async def compute(self, pixels: list[np.ndarray]) -> np.ndarray:
        """One batch, now: [images, num_classes]. Raises what the model raises."""
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, self._compute, pixels)

    async def run(self) -> None:
        """Answers until it is cancelled."""
        while True:
            batch = await self._next()
            started = time.perf_counter()
            try:
                found = await self.compute([waiting.pixels for waiting in batch])
            # Whatever the model raises is the answer; the next batch may be better.
            except Exception as error:
                for waiting in batch:
                    if not waiting.answer.done():
                        waiting.answer.set_exception(error)
                continue
            seconds = time.perf_counter() - started
            self._seconds_per_image += 0.2 * (
                seconds / len(batch) - self._seconds_per_image
            )
            self._observe(len(batch), seconds)
            for waiting, probabilities in zip(batch, found, strict=True):
                if not waiting.answer.done():  # its request may have been cancelled
                    waiting.answer.set_result(probabilities)

    async def _next(self) -> list[_Waiting]:
        batch = [await self._queue.get()]
        # From now, however long the first one has waited: while the model computed,
        # this loop may have had no processor, and what came then is still to be read.
        until = asyncio.get_running_loop().time() + self._max_wait
        while len(batch) < self._max_batch:
            try:
                batch.append(self._queue.get_nowait())
                continue
            except asyncio.QueueEmpty:
                pass
            try:
                async with asyncio.timeout_at(until):
                    batch.append(await self._queue.get())
            except TimeoutError:
                break
        return batch

    def close(self) -> None:
        """Starts nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)
