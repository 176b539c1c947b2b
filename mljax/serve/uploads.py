"""The images that a request carries, as bytes and within limits.

Nothing that a client names is opened or fetched: a name is only given back to it.
"""

import asyncio
import contextlib
from typing import NamedTuple

from python_multipart.multipart import parse_options_header
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import Message

FORM = "multipart/form-data"
TYPES = (
    "image/jpeg",
    "image/jpg",
    "image/png",
    "image/webp",
    "image/gif",
    "image/bmp",
    "application/octet-stream",
)
# To send a request in, and between two parts of it: who is slower keeps a place from
# others, and the server from ending.
SECONDS, SILENCE = 60.0, 5.0
_TAIL = 4096  # bytes; what ends a form is at most 74 long, and a text may follow it
_DRAIN_SECONDS, _DRAIN_TIMES = 5.0, 8


def _text(name: str) -> str:
    """As it can be given back: a client may name a charset that has more than UTF-8."""
    return name.encode("utf-8", "replace").decode()


class Upload(NamedTuple):
    """One image of a request.

    Attributes:
        name: of the file, as the client gave it; None where it gave none.
        data: the file.
        error: why there is none, else empty.
    """

    name: str | None
    data: bytes
    error: str = ""


class Body:
    """The body of a request, counted while it comes in."""

    def __init__(self, request: Request, max_bytes: int):
        self._request, self._max_bytes = request, max_bytes
        self._size, self.ended = 0, False
        self._tail = b""  # of what came

    async def uploads(self, max_images: int) -> list[Upload]:
        """The images, in the order of the request.

        Raises:
            HTTPException: 400, 408 (too slow), 413 or 415, with the reason.
            ClientDisconnect: it went away.
        """
        kind = self._request.headers.get("content-type", "")
        kind = kind.partition(";")[0].strip().lower()
        if kind != FORM and kind not in TYPES:
            raise HTTPException(
                415,
                f"Content-Type: {kind or 'is missing'}; send {FORM} with image files, "
                f"or one image as {', '.join(TYPES)}",
            )
        length = self._request.headers.get("content-length", "")
        if length.isdecimal() and int(length) > self._max_bytes:
            raise self._too_large()
        try:
            async with asyncio.timeout(SECONDS):
                if kind == FORM:
                    return await self._files(max_images)
                body = await Request(self._request.scope, self._receive).body()
                return [Upload(None, body)]
        except TimeoutError:
            reason = f"the request took more than {SECONDS:.0f} s to arrive"
            raise HTTPException(408, reason, {"Connection": "close"}) from None

    async def _files(self, max_images: int) -> list[Upload]:
        request, found = Request(self._request.scope, self._receive), []
        too_many = HTTPException(413, f"more than {max_images} images in a request")
        limits = {"max_files": max_images, "max_fields": max_images}
        try:
            async with request.form(**limits) as form:
                for field, value in form.multi_items():
                    if isinstance(value, str):
                        reason = "is text, not a file; images are sent, never fetched"
                        found.append(Upload(_text(field), b"", reason))
                    else:
                        name = _text(value.filename or field)
                        found.append(Upload(name, await value.read()))
        except UnicodeError:
            reason = "the names in the form are not in the charset of Content-Type"
            raise HTTPException(400, reason) from None
        except HTTPException as error:
            if error.detail.startswith("Too many"):
                raise too_many from None
            if error.detail.startswith("Part exceeded"):
                raise HTTPException(
                    413, "a text of the form is larger than 1 MB; send images as files"
                ) from None
            raise
        _, options = parse_options_header(request.headers["content-type"])
        end = b"--" + options[b"boundary"] + b"--"
        if end not in self._tail:  # a file that it does not end is left out in silence
            last = end.decode("latin-1")
            raise HTTPException(400, f"the form is cut off: it must end with {last}")
        if not found:
            raise HTTPException(400, "the form has no files")
        if len(found) > max_images:  # files and fields together
            raise too_many
        return found

    async def drain(self) -> None:
        """Takes in what still comes, up to a limit, before an answer that refuses it.

        A connection that is closed while the client writes is reset, and then most
        clients show that in place of the answer.
        """
        if self._request.headers.get("expect", "").lower() == "100-continue":
            return  # it sends nothing before it is told to
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_DRAIN_SECONDS):
                while not self.ended and self._size < _DRAIN_TIMES * self._max_bytes:
                    await self._next()

    async def _receive(self) -> Message:
        try:
            async with asyncio.timeout(SILENCE):
                message = await self._next()
        except TimeoutError:
            reason = f"nothing came for {SILENCE:.0f} s, and the request is not whole"
            raise HTTPException(408, reason, {"Connection": "close"}) from None
        if self._size > self._max_bytes:
            raise self._too_large()
        return message

    async def _next(self) -> Message:
        message = await self._request.receive()
        body = message.get("body", b"")
        self._size += len(body)
        self._tail = (self._tail + body)[-_TAIL:]
        self.ended = not message.get("more_body", False)
        return message

    def _too_large(self) -> HTTPException:
        return HTTPException(
            413, f"the request is larger than {self._max_bytes / 1e6:g} MB"
        )
