"""Uploads that are cut off, slow or odd, and pictures that PIL has a word on."""

import io
import socket
import time
import warnings

import numpy as np
import pytest
from PIL import Image
from test_serve import (  # noqa: F401 (fixtures)
    BATCH,
    LIMITS,
    answer,
    encoded,
    exported,
    model,
    server,
    serving,
)

from mljax import export, images, main
from mljax.serve import uploads

FORM = "multipart/form-data; boundary=edge"


def form(*files: bytes) -> bytes:
    head = b'--edge\r\nContent-Disposition: form-data; name="image"; filename="%d"\r\n'
    return b"\r\n".join(head % i + b"\r\n" + file for i, file in enumerate(files))


def test_a_form_that_is_cut_off_is_refused(server):  # noqa: F811
    whole = form(encoded(0), encoded(1))
    for cut in (whole, whole[:-50], form(encoded(0))[:-30], whole + b"\r\n--edge"):
        status, _, body = server.raw(cut, FORM)
        assert status == 400
        assert body["error"] == "the form is cut off: it must end with --edge--"
    status, _, body = server.raw(whole + b"\r\n--edge--\r\nan epilogue", FORM)
    assert status == 200 and [row["name"] for row in body["images"]] == ["0", "1"]


def test_names_that_are_no_utf_8_come_back(server):  # noqa: F811
    body = (
        b'--edge\r\nContent-Disposition: form-data; name="image"; '
        b'filename="a\\udc80.png"\r\n\r\n' + encoded(0) + b"\r\n--edge--\r\n"
    )
    kind = "multipart/form-data; charset=unicode_escape; boundary=edge"
    status, _, found = server.raw(body, kind)
    assert status == 200 and found["images"][0]["name"] == "a?.png"


def test_a_long_text_and_a_common_misnomer(exported):  # noqa: F811
    limits = LIMITS._replace(max_bytes=3_000_000)
    with serving(export.load(exported[0], BATCH), limits) as running:
        status, _, body = running.files(("image", "x" * 1_500_000))
        assert status == 413
        assert body["error"] == (
            "a text of the form is larger than 1 MB; send images as files"
        )
        assert running.raw(encoded(0, "JPEG"), "image/jpg")[0] == 200
        status, _, body = running.raw(b"")
        assert body["images"][0]["error"] == "the file is empty (0 bytes)"


def test_a_silent_upload_gives_its_place_back(exported, monkeypatch):  # noqa: F811
    monkeypatch.setattr(uploads, "SILENCE", 0.3)
    with serving(export.load(exported[0], BATCH)) as running:
        start = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 1000\r\n"
        start += b"Content-Type: image/png\r\n\r\nabc"
        with socket.create_connection(("127.0.0.1", running.port)) as client:
            client.sendall(start)
            begun = time.monotonic()
            answer = b"".join(iter(lambda: client.recv(10_000), b"")).decode()
        assert time.monotonic() - begun < 5
        assert answer.startswith("HTTP/1.1 408") and "nothing came for" in answer
        assert running.metric("mljax_queue_length") == 0


def closed_after(running, *parts, pause=0.0):
    """Seconds until the server closes a connection that sends these bytes."""
    with socket.create_connection(("127.0.0.1", running.port), timeout=5) as client:
        begun = time.monotonic()
        for part in parts:
            client.sendall(part)
            time.sleep(pause)
        while client.recv(10_000):
            pass
        return time.monotonic() - begun


def test_a_header_that_does_not_come_closes_the_connection(server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(uploads, "SILENCE", 0.4)
    monkeypatch.setattr(uploads, "SECONDS", 1.2)
    request = b"GET /health HTTP/1.1\r\nHost: x\r\n"
    assert 0.3 < closed_after(server) < 2
    assert 0.3 < closed_after(server, b"GET /hea") < 2
    # After an answer, too.
    assert 0.3 < closed_after(server, request + b"\r\n", b"G", pause=0.1) < 2
    # And before a body that nobody waits for.
    body = request + b"Content-Length: 9\r\n\r\n"
    assert 0.3 < closed_after(server, body, b"G", pause=0.1) < 2
    # A byte now and then does not keep it.
    with pytest.raises((BrokenPipeError, ConnectionResetError)):
        closed_after(server, *[request[i : i + 1] for i in range(30)], pause=0.2)
    assert server.call("GET", "/health")[0] == 200


def test_a_refusal_does_not_wait_for_the_rest(server, monkeypatch):  # noqa: F811
    monkeypatch.setattr(uploads, "_DRAIN_SECONDS", 0.2)
    start = b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n"
    assert closed_after(server, start + b"Content-Type: image/png\r\n\r\nabc") < 3


def test_an_output_that_is_not_a_number(model):  # noqa: F811
    with serving(model) as running:
        model._run = lambda batch: answer(batch) * np.where(batch.max() > 9, np.nan, 1)
        status, _, found = running.raw(encoded(0))
    assert status == 400 and "is not a number" in found["images"][0]["error"]


def test_names_in_a_charset_that_cannot_be_decoded(server):  # noqa: F811
    kind = "multipart/form-data; boundary=edge; charset=undefined"
    status, _, body = server.raw(form(encoded(0)) + b"\r\n--edge--\r\n", kind)
    assert status == 400 and "are not in the charset" in body["error"]


def palette(alphas: bytes) -> bytes:
    file = io.BytesIO()
    picture = Image.new("P", (4, 4), 2)
    picture.putpalette(bytes(range(12)))
    picture.save(file, "PNG", transparency=alphas)
    return file.getvalue()


def test_a_palette_with_alphas_is_read_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = images.read(palette(b"\x00\x80\xff"), 100)
    np.testing.assert_array_equal(found, np.full((4, 4, 3), [6, 7, 8]))


@pytest.mark.parametrize("form", ["PNG", "GIF"])
def test_the_limit_of_pixels_is_ours_not_that_of_pil(monkeypatch, form):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)
    file = io.BytesIO()
    Image.new("RGB", (50, 40)).save(file, form)
    assert images.read(file.getvalue(), 2000).shape == (40, 50, 3)
    for limit in (1999, 200):  # PIL refuses from 200 on, and is left to
        with pytest.raises(images.TooLarge, match=f"2000 pixels, more .* = {limit}"):
            images.read(file.getvalue(), limit)
    assert Image.MAX_IMAGE_PIXELS == 100


def test_programs_do_not_hear_pil_warn_of_what_is_allowed(monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(images.UnreadableImage, match="bomb"):
            images.read(encoded(0), 2000)
        main.quiet()
        assert images.read(encoded(0), 2000).shape == (40, 50, 3)
