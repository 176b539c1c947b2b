"""The HTTP server, over real connections to free ports of this machine."""

import asyncio
import contextlib
import http.client
import io
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import ROOT
from PIL import Image
from test_export import NAMES, save_run

from mljax import decision, export, predict
from mljax.models import pretrained

for package in ("starlette", "uvicorn", "python_multipart", "prometheus_client"):
    pytest.importorskip(package, reason="needs pip install '.[serve]'")


from mljax.serve import __main__ as program  # noqa: E402
from mljax.serve.app import Limits, Service  # noqa: E402
from mljax.serve.batching import Batches, Full  # noqa: E402

LIMITS = Limits(max_wait=0.005, max_queue=8, max_bytes=100_000, max_pixels=100_000)
BATCH = 4


def encoded(seed: int, form: str = "PNG", height: int = 40, width: int = 50) -> bytes:
    file = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    Image.fromarray(pixels).save(file, form)
    return file.getvalue()


class Running:
    """A server in a thread."""

    def __init__(self, service, port):
        self.service, self.port = service, port

    def call(self, method, path, body=None, **headers):
        """(status, headers, decoded body)."""
        headers = {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            answer = connection.getresponse()
            text = answer.read().decode()
        is_json = answer.headers["content-type"] == "application/json"
        return answer.status, answer.headers, json.loads(text) if is_json else text

    def raw(self, body, kind="application/octet-stream"):
        return self.call("POST", "/predict", body, Content_Type=kind)

    def files(self, *files):
        """files: (name, bytes), or (field, text)."""
        parts = []
        for name, value in files:
            where = 'name="image"; filename' if isinstance(value, bytes) else "name"
            value = value if isinstance(value, bytes) else value.encode()
            head = f'--edge\r\nContent-Disposition: form-data; {where}="{name}"\r\n\r\n'
            parts.append(head.encode() + value + b"\r\n")
        body = b"".join(parts) + b"--edge--\r\n"
        return self.raw(body, "multipart/form-data; boundary=edge")

    def metric(self, name: str) -> float:
        text = self.call("GET", "/metrics")[2]
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.MULTILINE)
        assert found, f"{name} is not in {text}"
        return float(found[1])


@contextlib.contextmanager
def serving(model, limits=LIMITS, ready=True):
    service = Service(model, limits, lambda: setattr(server, "should_exit", True))
    server = program.server_of(service)
    place = program._bind("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [place]})
    running = Running(service, place.getsockname()[1])
    thread.start()
    try:
        wait_for(lambda: server.started or not thread.is_alive())
        if ready:
            wait_for(lambda: service.ready)
        yield running
    finally:
        server.should_exit = True
        thread.join()


def wait_for(condition, seconds=60):
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not happen in time"
        time.sleep(0.01)


@pytest.fixture(scope="module")
def exported(tmp_path_factory, small_backbones):
    """The file, and what its probabilities must be."""
    folder = tmp_path_factory.mktemp("serve")
    run = save_run(folder / "run", "linear")
    model, about = pretrained.restore(run, "float32")
    decided = decision.load(run / "best" / "3", NAMES)
    flags = ["--checkpoint", run, "--format", "stablehlo", "--output", folder / "model"]
    assert export.main([str(f) for f in flags]) == 0
    return folder / "model", predict.from_model(model, about, decided)


@pytest.fixture(scope="module")
def server(exported):
    with serving(export.load(exported[0], BATCH)) as running:
        yield running


@pytest.fixture
def model(exported):
    """One whose computing the test replaces: nothing is compiled."""
    return export.load(exported[0], BATCH)


def answer(batch: np.ndarray) -> np.ndarray:
    return np.full((len(batch), len(NAMES)), 0.9, np.float32)


def probabilities(row) -> np.ndarray:
    assert list(row["probabilities"]) == NAMES
    return np.array(list(row["probabilities"].values()))


def test_probabilities_are_those_of_predict(server, exported, tmp_path):
    reference, files = exported[1], []
    for seed, form in enumerate(["JPEG", "PNG", "WEBP", "BMP", "GIF"]):
        files.append(tmp_path / f"{seed} é.{form.lower()}")
        files[-1].write_bytes(encoded(seed, form))
    expected, labels = reference.predict(files), reference.labels(files)
    assert np.ptp(expected, axis=0).max() > 1e-3  # the images are told apart
    status, _, found = server.files(*((f.name, f.read_bytes()) for f in files))
    assert status == 200 and len(found["images"]) == 5
    for i, row in enumerate(found["images"]):
        assert row["name"] == files[i].name and row["labels"] == labels[i]
        np.testing.assert_allclose(probabilities(row), expected[i], rtol=0, atol=1e-5)
    status, _, found = server.raw(files[1].read_bytes(), "image/png")
    (row,) = found["images"]
    assert status == 200 and row["name"] is None and row["labels"] == labels[1]
    np.testing.assert_allclose(probabilities(row), expected[1], rtol=0, atol=1e-5)


def test_a_bad_image_has_its_own_row(server, tmp_path):
    (tmp_path / "secret.png").write_bytes(encoded(0))
    bad = [
        ("text.jpg", b"not an image", "known format"),
        ("zero.jpg", b"", "0 bytes"),
        ("cut.jpg", encoded(0, "JPEG")[:700], "truncated"),
        ("bomb.png", encoded_blank(20_000, 20_000), "400000000 pixels, more than"),
        ("large.png", encoded_blank(400, 300), "--max-megapixels 0.1"),
        ("drawing.eps", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "known"),
        ("url", "http://127.0.0.1:1/a.png", "never fetched"),
        ("path", str(tmp_path / "secret.png"), "never fetched"),
    ]
    for name, value, reason in bad:
        status, _, found = server.files((name, value))
        assert status == 400, name
        assert found["images"][0]["name"] == name
        assert reason in found["images"][0]["error"]
    some = [(name, value) for name, value, _ in bad[:3]]
    status, _, found = server.files(("a.png", encoded(1)), *some, ("b.png", encoded(2)))
    assert status == 200
    assert ["error" in row for row in found["images"]] == [False, *[True] * 3, False]


def encoded_blank(height: int, width: int) -> bytes:
    """A PNG file of zeros; only its header where that is enough to refuse it."""
    file = io.BytesIO()
    Image.new("1", (width, height)).save(file, "PNG")
    return file.getvalue()[:90_000]


def test_requests_that_are_refused(server):
    large = bytes(LIMITS.max_bytes + 1)

    def chunks():
        yield from (bytes(10_000) for _ in range(11))

    refused = [
        (413, "larger than 0.1 MB", server.raw(large)),
        (413, "larger than 0.1 MB", server.raw(chunks())),
        (413, "larger than 0.1 MB", server.files(("a.png", large))),
        (413, "larger than 0.1 MB", server.raw(bytes(600_000))),  # whole, then answered
        (415, "text/plain", server.raw(encoded(0), "text/plain")),
        (415, "missing", server.call("POST", "/predict", encoded(0))),
        (400, "multipart", server.raw(b"garbage", "multipart/form-data; boundary=x")),
        (400, "boundary", server.raw(b"garbage", "multipart/form-data")),
        (400, "no files", server.files()),
        (413, "more than 8", server.files(*[("a.png", b"")] * 9)),
        (413, "more than 8", server.files(*[("a", b"")] * 5, *[("b", "")] * 5)),
        (404, "Not Found", server.call("GET", "/predict/../etc")),
        (405, "Not Allowed", server.call("GET", "/predict")),
    ]
    for status, reason, found in refused:
        assert (found[0], reason in found[2]["error"]) == (status, True), found
    assert server.raw(encoded(0))[0] == 200


def test_concurrent_requests_are_computed_together(server):
    alone = [probabilities(server.raw(encoded(i))[2]["images"][0]) for i in range(5)]
    before = [server.metric(f"mljax_batch_size_{n}") for n in ("count", "sum")]

    def call(i):
        while True:
            status, headers, found = server.raw(encoded(i % 5))
            if status == 200:
                return probabilities(found["images"][0])
            assert status == 503 and int(headers["retry-after"]) >= 1
            time.sleep(0.05)

    with ThreadPoolExecutor(50) as pool:
        for i, found in enumerate(pool.map(call, range(50))):
            np.testing.assert_allclose(found, alone[i % 5], rtol=0, atol=1e-6)
    batches = server.metric("mljax_batch_size_count") - before[0]
    assert server.metric("mljax_batch_size_sum") - before[1] == 50 and batches < 40
    largest = server.metric('mljax_batch_size_bucket{le="4.0"}')
    assert largest == server.metric("mljax_batch_size_count")
    assert server.metric("mljax_queue_length") == 0
    assert server.metric('mljax_requests_total{path="/predict",status="200"}') >= 55
    assert server.metric('mljax_request_seconds_count{path="/predict"}') >= 55
    assert server.metric('mljax_images_total{result="ok"}') >= 55


def test_labels(server, exported):
    status, _, found = server.call("GET", "/labels")
    assert status == 200 and [x["name"] for x in found["labels"]] == NAMES
    thresholds = [x["threshold"] for x in found["labels"]]
    np.testing.assert_array_equal(np.float32(thresholds), exported[1].thresholds)


def test_not_ready_before_every_batch_size_was_computed(model):
    go_on, computed = threading.Semaphore(0), []

    def run(batch):
        computed.append(len(batch))
        go_on.acquire()
        return answer(batch)

    model._run = run
    with serving(model, ready=False) as running:
        for size in (1, 2, 4):
            wait_for(lambda size=size: computed[-1:] == [size])
            for status, headers, _ in (
                running.call("GET", "/health"),
                running.raw(encoded(0)),
            ):
                assert status == 503 and headers["retry-after"]
            go_on.release()
        wait_for(lambda: running.call("GET", "/health")[0] == 200)
        assert computed == [1, 2, 4]


def test_a_full_queue(model):
    go_on, computed = threading.Event(), []

    def run(batch):
        computed.append(len(batch))
        go_on.wait()
        return answer(batch)

    with serving(model, ready=False) as running, ThreadPoolExecutor() as pool:
        wait_for(lambda: running.service.ready)
        model._run = run
        files = [("a.png", encoded(i)) for i in range(8)]
        first = pool.submit(running.files, *files)
        try:
            wait_for(lambda: running.metric("mljax_queue_length") == 8)
            status, headers, found = running.raw(encoded(0))
            assert status == 503 and int(headers["retry-after"]) >= 1
            assert "full" in found["error"]
            assert running.call("GET", "/health")[0] == 200
        finally:
            go_on.set()
        assert first.result()[0] == 200 and max(computed) == 4
        assert running.raw(encoded(0))[0] == 200  # there is room again


def test_a_model_that_fails(model, capfd):
    with serving(model) as running:
        works = model._run
        model._run = lambda batch: 1 / 0
        status, _, found = running.raw(encoded(0))
        assert status == 500 and "server" in found["error"]
        model._run = works
        assert running.raw(encoded(0))[0] == 200
        assert running.metric('mljax_requests_total{path="/predict",status="500"}') == 1
    model._run = lambda batch: 1 / 0
    with serving(model, ready=False) as running:
        wait_for(lambda: running.service.failure)
    assert isinstance(running.service.failure, ZeroDivisionError)


def test_batches():
    sizes = []

    async def check():
        made = Batches(
            lambda pixels: np.array(pixels) + 1,
            max_batch=3,
            max_wait=0.0,
            max_taken=5,
            observe=lambda size, seconds: sizes.append(size),
        )
        work = asyncio.create_task(made.run())
        found = await asyncio.gather(*(made.predict(np.array(i)) for i in range(5)))
        assert [int(x) for x in found] == [1, 2, 3, 4, 5]
        with made.room(4), made.room(1):
            with pytest.raises(Full), made.room(1):
                pass
            assert made.taken == 5
        assert made.taken == 0
        work.cancel()
        made.close()

    asyncio.run(check())
    assert sum(sizes) == 5 and max(sizes) == 3


def test_stopping_answers_what_was_taken(exported):
    """The program itself: SIGTERM while 8 requests wait 5 s for others."""
    command = [sys.executable, "-m", "mljax.serve", "--model", str(exported[0])]
    flags = ["--port", "0", "--max-batch", "16", "--max-wait-ms", "5000"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    process = subprocess.Popen(
        command + flags, stdout=subprocess.PIPE, text=True, env=environment
    )
    try:
        lines = []
        while not lines or not lines[-1].startswith("ready"):
            lines.append(process.stdout.readline())
            assert lines[-1], lines
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)", "".join(lines))[1])
        running = Running(None, port)
        with ThreadPoolExecutor(8) as pool:
            calls = [pool.submit(running.raw, encoded(i)) for i in range(8)]
            wait_for(lambda: running.metric("mljax_queue_length") == 8)
            process.send_signal(signal.SIGTERM)
            assert [call.result()[0] for call in calls] == [200] * 8
        assert process.wait(30) == 0
        assert process.stdout.read() == "stopped\n"
        with pytest.raises(ConnectionRefusedError):
            running.call("GET", "/health")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--max-batch", "0"], "--max-batch 0"),
        (["--max-queue", "31"], "at least 32"),
        (["--max-wait-ms", "nan"], "--max-wait-ms nan"),
        (["--max-mb", "0"], "--max-mb"),
        (["--port", "65536"], "65535"),
        (["--port", "0"], "none: there is no such file"),
        (["--host", "203.0.113.1"], "cannot serve there"),
    ],
)
def test_mistakes_are_one_line(flags, words, tmp_path, capsys):
    assert program.main(["--model", str(tmp_path / "none"), *flags]) == 1
    printed = capsys.readouterr().err
    assert words in printed and printed.count("\n") == 1


def test_help_imports_nothing_heavy():
    code = (
        "import sys\nfrom mljax.serve import __main__ as serve\n"
        "try: serve.parse(['--help'])\nexcept SystemExit: pass\n"
        "heavy = {'jax', 'tensorflow', 'starlette', 'uvicorn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert program.main(["--model", "none"]) == 1
    printed = capsys.readouterr().err
    assert "uvicorn" in printed and "pip install '.[serve]'" in printed
    assert printed.count("\n") == 1
