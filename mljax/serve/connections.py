"""Connections that begin no request: uvicorn would keep them for ever."""

import asyncio
from typing import Any

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from mljax.serve import uploads


class Connection(H11Protocol):
    """As uvicorn's, and closed where the header of a request does not come in time, or
    the rest of a body that the answer did not wait for.

    The limits are those of a body: `uploads.SECONDS` in all, `uploads.SILENCE` without
    a byte. Between two requests uvicorn's own limit holds, until the next one begins.
    """

    _until = 0.0
    _closing: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        self._stop()

    def _watch(self) -> None:
        if self._closing is None:
            self._until = self.loop.time() + uploads.SECONDS
        else:
            self._closing.cancel()
        answered = self.cycle is not None and self.cycle.response_complete
        unread = self.conn.their_state is h11.SEND_BODY and answered
        if self.conn.their_state is not h11.IDLE and not unread:  # a request is here
            return self._stop()
        at = min(self.loop.time() + uploads.SILENCE, self._until)
        self._closing = self.loop.call_at(at, self.transport.close)

    def _stop(self) -> None:
        if self._closing is not None:
            self._closing.cancel()
            self._closing = None
