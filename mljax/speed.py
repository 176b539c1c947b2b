"""How fast a run is and what it waits for: read off the clock every few steps."""

import functools
import queue
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from mljax import memory
from mljax.errors import UserError

# Dense bfloat16 FLOP/s of one device, as their makers give them. float32 is slower on
# most, so a float32 run reaches a smaller share. Of prefixes the longest counts.
PEAKS = {
    "TPU v2": 22.5e12,  # of a core: JAX shows two for each chip of v2 and v3
    "TPU v3": 61.5e12,
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v6 lite": 918e12,
    "NVIDIA V100": 125e12,
    "Tesla V100": 125e12,
    "NVIDIA A100": 312e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40": 181e12,
    "NVIDIA L40S": 362e12,
    "NVIDIA H100": 989e12,
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989e12,
}


@functools.cache
def _watcher() -> queue.SimpleQueue:
    """Takes (array, list) and adds to the list when the array is computed."""
    given: queue.SimpleQueue = queue.SimpleQueue()

    def watch() -> None:
        while True:
            last, ended = given.get()
            # Not block_until_ready: a thread inside it could not end with the program.
            while not last.is_ready():
                time.sleep(1e-3)
            ended.append(time.perf_counter())
            del last

    threading.Thread(target=watch, daemon=True).start()
    return given


class Speed:
    """Collects times between two lines of the log.

    Args:
        batch_size: images in a step, over all devices.

    Attributes:
        flops: of one step, over all devices; 0 while it is not known.
    """

    def __init__(self, batch_size: int):
        self.batch_size, self.flops = batch_size, 0.0
        self.devices, self.peak = jax.device_count(), peak_of(jax.devices()[0])
        self._ended: list[float] | None = None
        # Steps that were dispatched, that are known to have ended, and whose metrics
        # were fetched.
        self._dispatched = self._done = self._fetched = 0
        self._last: tuple[int, float, float] | None = None
        self.restart()

    def restart(self) -> None:
        """Leaves out what came before: evaluation, saving, compiling."""
        self._since, self._waited = time.perf_counter(), 0.0
        self._done_before = self._done

    def dispatched(self, metrics: Any) -> None:
        """To be called with what a step gives, which need not be computed yet.

        The loop is a step ahead of the devices: while they still compute, waiting for
        the next batch costs nothing, and `timed` does not count it.
        """
        self._dispatched += 1
        self._ended, last = [], jax.tree.leaves(metrics)[-1]
        if last.is_ready():  # as on a CPU, which computes where it is called
            self.computed()
        _watcher().put((last, self._ended))

    def timed(self, batches: Iterator[Any]) -> Iterator[Any]:
        """`batches`; counts how long nothing was computed because one was not ready."""
        while True:
            idle_from = time.perf_counter()
            batch = next(batches)
            ready = time.perf_counter()
            if self._ended is not None:
                idle_from = max(idle_from, *self._ended or [ready])
            self._waited += ready - idle_from
            yield batch

    def computed(self) -> None:
        """The step that was dispatched last is computed."""
        self._done = self._dispatched

    def step(self) -> None:
        """To be called once the metrics of a step were fetched, in their order."""
        self._fetched += 1
        self._done = max(self._done, self._fetched)

    def read(self) -> dict[str, float] | None:
        """The figures since `restart`, by their names in TensorBoard.

        step_ms, data_wait_ms (of it; nothing was computed meanwhile),
        images_per_second, and the same of each device;
        memory_gb; where they are known teraflops (a second and device) and
        share_of_peak. Where no step has ended since, those before; None if there are
        none.
        """
        if done := self._done - self._done_before:
            self._last = done, time.perf_counter() - self._since, self._waited
        if self._last is None:
            return None
        steps, since, waited = self._last
        seconds = since / steps
        images = self.batch_size / seconds
        found = {
            "step_ms": 1e3 * seconds,
            "data_wait_ms": 1e3 * waited / steps,
            "images_per_second": images,
            "images_per_second_per_device": images / self.devices,
            "memory_gb": memory.peak_bytes() / 1e9,
        }
        if self.flops:
            rate = self.flops / seconds / self.devices
            found["teraflops_per_device"] = rate / 1e12
            if self.peak:
                found["share_of_peak"] = rate / self.peak
        return found


def text(found: Mapping[str, float]) -> str:
    """`Speed.read` in a line of the log."""
    waiting = 100 * found["data_wait_ms"] / found["step_ms"]
    parts = [f"{found['step_ms']:.0f} ms a step ({waiting:.0f}% for data)"]
    parts.append(f"{found['memory_gb']:.1f} GB")
    if "teraflops_per_device" in found:
        share = ""
        if "share_of_peak" in found:
            share = f" ({100 * found['share_of_peak']:.0f}% of peak)"
        rate, unit = found["teraflops_per_device"], "TFLOP/s"
        if rate < 1:
            rate, unit = 1e3 * rate, "GFLOP/s"
        parts.append(f"{rate:.0f} {unit}{share}")
    return "  ".join(parts)


def peak_of(device: Any) -> float:
    """FLOP/s of a device, 0 if its kind is not in the list."""
    return PEAKS.get(longest_prefix(device.device_kind, PEAKS), 0.0)


def longest_prefix(name: str, prefixes: Iterable[str]) -> str:
    """The longest of these that `name` begins with, "" if none does."""
    return max((p for p in prefixes if name.startswith(p)), key=len, default="")


def mean_flops(steps: Sequence[Any], *arguments: Any) -> float:
    """FLOPs that XLA counts in a jitted step, over all devices, before it optimises.

    The second pass of SAM and what is computed again to save memory count too.

    Args:
        steps: from `jax.jit`; the mean is over them, each as often as it is there.
        arguments: arrays or shape structs.
    """
    total = 0.0
    for step in set(steps):
        total += steps.count(step) * _flops(step.lower(*arguments))
    return total / len(steps)


def _flops(lowered: Any) -> float:
    """0 where nothing counts them."""
    found = lowered.cost_analysis()
    if not found:  # the plugins for GPUs and TPUs do not count: the CPU's client does
        try:
            from jaxlib import _jax

            client = jax.local_devices(backend="cpu")[0].client
            module = lowered.compiler_ir("hlo").as_hlo_module()
            found = _jax.hlo_module_cost_analysis(client, module)
        except (ImportError, AttributeError, RuntimeError):
            return 0.0
    return float(found.get("flops", 0.0))


def period(at: int, every: int, thaw_step: int) -> range:
    """The steps from `at` on until they come again, every so many; frozen ones and
    others apart."""
    end = at + every
    return range(at, min(end, thaw_step + 1) if at <= thaw_step else end)


def check_span(span: str, total_steps: int) -> None:
    """Raises UserError for a `config.profile` that begins behind the last step."""
    first = span.partition(":")[0]
    if span and int(first) > total_steps:
        raise UserError(f"config.profile = {span}: the run ends at step {total_steps}")


class Profiler:
    """Writes a trace of some steps of process 0 where TensorBoard looks for it.

    Args:
        span: `config.profile`: "first:last" step, or "" for none.
        folder: of TensorBoard's files.
    """

    def __init__(self, span: str, folder: Path):
        first, _, last = span.partition(":")
        wanted = bool(span) and jax.process_index() == 0
        self._steps = range(int(first), int(last) + 1) if wanted else range(0)
        self._folder, self._running = folder, False

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_: Any) -> None:
        self.end()

    def before(self, step: int) -> None:
        """To be called before `step` is dispatched."""
        if not self._running and step in self._steps:
            jax.profiler.start_trace(str(self._folder))
            self._running = True

    def after(self, step: int, metrics: Any, ends: bool = False) -> Path | None:
        """The folder of the trace once it is written; `metrics` are those of `step`.

        ends: nothing follows, so that the trace ends as well.
        """
        if not self._running or (step + 1 in self._steps and not ends):
            return None
        jax.block_until_ready(metrics)
        return self.end()

    def end(self) -> Path | None:
        """Ends the trace if there is one; its folder."""
        if not self._running:
            return None
        jax.profiler.stop_trace()
        self._running, self._steps = False, range(0)
        return self._folder
