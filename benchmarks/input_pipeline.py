"""Images per second and core: mljax's input pipeline beside what others would use.

python benchmarks/input_pipeline.py --torch-python torch-env/bin/python \
    --grain-python grain-env/bin/python --output input.json

All do the same with the same JPEG files: read, decode, take a random crop (0.35 to 1 of
the area), resize it, flip half of them, batch, uint8. "Resized on the device", a GPU or
TPU resizes and flips, and the figure is that of the rest: what was decoded and cropped
is sent on squares with the photo's longer side. Each contestant is a process of
its own on one core, which it keeps busy; the figure is the median of `--rounds` rounds,
by the processor's time, so that other programs on the machine do not count. The torch
environment needs torch, pillow and opencv-python-headless, the other one grain and
opencv-python-headless; without the flags these contestants are left out.

`--steps 50000` instead takes so many batches of tiny images, and fails if the memory of
the process was higher in the second half of them than in the first, by more than
GROWTH: less than a kilobyte a step would be noticed.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
BATCH = 32
COUNT = 48  # files of each size
GROWTH = 16  # MB; what the allocator may take more in a second half without a leak
JPEGS = {"500x375": (500, 375), "1280x960": (1280, 960)}
TARGETS = (224, 448)
CASES = [(size, target) for size in JPEGS for target in TARGETS]


def draw_photos(folder: Path, size: tuple[int, int], count: int) -> float:
    """JPEGs of photos with the noise of a camera; gives their mean size in KB."""
    import numpy as np
    from PIL import Image
    from sklearn.datasets import load_sample_images

    photos = [Image.fromarray(p) for p in load_sample_images().images]
    rng = np.random.default_rng(0)
    folder.mkdir()
    total = 0
    for i in range(count):
        photo = photos[i % 2]
        x, y = rng.integers(0, 120), rng.integers(0, 90)
        box = (x, y, x + 500, y + 330)
        pixels = np.asarray(photo.resize(size, Image.Resampling.BICUBIC, box), int)
        pixels = pixels + rng.normal(0, 5, pixels.shape)
        image = Image.fromarray(np.clip(pixels, 0, 255).astype(np.uint8))
        image.save(folder / f"{i:03}.jpg", quality=90)
        total += (folder / f"{i:03}.jpg").stat().st_size
    return total / count / 1000


def tensorflow(folder: Path, rounds: int, seconds: float) -> dict[str, list[float]]:
    """Decoding alone, and mljax."""
    import jax
    import numpy as np
    import tensorflow as tf
    from input_peers import rate

    from mljax.config import common
    from mljax.data import annotations, augment, pipeline

    jax.config.update("jax_platforms", "cpu")

    def decoding(size: str, target: int):
        paths = sorted(str(p) for p in (folder / size).iterdir())
        options = tf.data.Options()
        options.autotune.enabled = False
        options.threading.private_threadpool_size = 1
        options.threading.max_intra_op_parallelism = 1
        images = tf.data.Dataset.from_tensor_slices(paths).repeat()
        images = images.map(
            lambda path: tf.io.decode_jpeg(tf.io.read_file(path), channels=3),
            num_parallel_calls=1,
        )
        for image in images.prefetch(BATCH).with_options(options).as_numpy_iterator():
            yield image[None]

    def ours(operations: int = 0, on_device: bool = False, **settings):
        def batches(size: str, target: int):
            config = common().data
            config.image_size, config.crop_area = target, 0.35
            config.randaugment.n = operations
            config.update(settings)
            if on_device:
                config.resize_on_device = max(JPEGS[size])
            names = sorted(p.name for p in (folder / size).iterdir())
            listed = {"classes": ["a"], "images": [[n, ["a"]] for n in names]}
            file = folder / size / "train.json"
            file.write_text(json.dumps(listed))
            source = annotations.read(file, "train", config.max_pixels)
            file.unlink()
            batches = pipeline.train_batches(
                source, data_config=config, batch_size=BATCH, seed=0
            )
            if on_device:
                yield from (batch["image"] for batch in batches)
            # In training this is a part of the step.
            flip = jax.jit(lambda images, rng: augment.random_flip(images, rng, 0.5))
            for step, batch in enumerate(batches):
                key = jax.random.fold_in(jax.random.key(0), step)
                yield np.asarray(flip(batch["image"], key))

        return batches

    plain = {"antialias": False}
    contestants = {
        "decoding alone": decoding,
        "mljax, area": ours(resize="area"),
        "mljax, bilinear, scaled_decode=1": ours(scaled_decode=1.0, **plain),
        "mljax, bilinear": ours(**plain),
        "mljax, bilinear, antialias (default)": ours(),
        "mljax, bilinear, RandAugment": ours(2, **plain),
        "mljax, resized on the device": ours(on_device=True),
    }
    return {
        name: [rate(make(*case), rounds, seconds) for case in CASES]
        for name, make in contestants.items()
    }


def memory(steps: int) -> list[float]:
    """MB of a process that takes so many batches: the most in each tenth of them."""
    with tempfile.TemporaryDirectory() as folder:
        import numpy as np
        from PIL import Image

        from mljax.config import common
        from mljax.data import annotations, pipeline

        rng = np.random.default_rng(0)
        images = []
        for i in range(64):
            pixels = rng.integers(0, 256, (24, 32, 3), np.uint8)
            Image.fromarray(pixels).save(Path(folder, f"{i}.jpg"))
            images.append([f"{i}.jpg", ["a"]])
        file = Path(folder, "train.json")
        file.write_text(json.dumps({"classes": ["a"], "images": images}))
        config = common().data
        config.image_size, config.crop_area, config.randaugment.n = 16, 0.3, 2
        source = annotations.read(file, "train", config.max_pixels)
        batches = pipeline.train_batches(
            source, data_config=config, batch_size=2, seed=0
        )
        found = []
        for tenth in range(10):
            most = 0
            for step in range(max(1, steps // 10)):
                next(batches)
                if step % 50 == 0:
                    most = max(most, resident())
            found.append(round(most / 1e6, 1))
            print(f"{tenth + 1} of 10: {found[-1]} MB", flush=True)
        return found


def resident() -> int:
    """Bytes of memory of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def table(results: dict[str, list[float]]) -> str:
    heads = [f"{size} to {target}" for size, target in CASES]
    lines = [f"| images/s on one core | {' | '.join(heads)} |", "|---|" + "---|" * 4]
    for name, rates in results.items():
        lines.append(f"| {name} | {' | '.join(f'{r:.0f}' for r in rates)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--torch-python", metavar="PYTHON")
    parser.add_argument("--grain-python", metavar="PYTHON")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.5, help="of a round")
    parser.add_argument(
        "--steps", type=int, default=0, help="memory over so many steps"
    )
    parser.add_argument("--output", metavar="FILE.json")
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    sys.path[:0] = [str(HERE.parent), str(HERE)]
    if args.child:
        found = tensorflow(Path(args.child[0]), args.rounds, args.seconds)
        Path(args.child[1]).write_text(json.dumps(found))
        return
    growth = 0.0
    if args.steps:
        memory_mb = memory(args.steps)
        growth = round(max(memory_mb[5:]) - max(memory_mb[:5]), 1)
        print(f"the second half took {growth:+} MB over the first")
        found = {"most_mb_by_tenth": memory_mb, "growth_mb": growth}
    else:
        found = compare(args)
        print(table(found["images_per_second_and_core"]))
    if args.output:
        Path(args.output).write_text(json.dumps(found, indent=2) + "\n")
    if growth > GROWTH:
        sys.exit(f"error: memory grows ({growth} MB in {args.steps // 2} steps)")


def compare(args: argparse.Namespace) -> dict:
    core = min(os.sched_getaffinity(0))
    peers = str(HERE / "input_peers.py")
    own = [str(HERE / "input_pipeline.py"), "--child"]
    programs = [[sys.executable, *own]]
    if args.torch_python:
        programs += [[args.torch_python, peers, kind] for kind in ("pil", "opencv")]
    if args.grain_python:
        programs.append([args.grain_python, peers, "grain"])
    results: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        sizes = {n: draw_photos(folder / n, s, COUNT) for n, s in JPEGS.items()}
        for program in programs:
            output = folder / "result.json"
            flags = [f"--rounds={args.rounds}", f"--seconds={args.seconds}"]
            command = [*program, str(folder), str(output), *flags]
            subprocess.run(
                command,
                check=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
            results |= json.loads(output.read_text())
            output.unlink()
    return {
        "images_per_second_and_core": {
            name: [round(r, 1) for r in rates] for name, rates in results.items()
        },
        "cases": [f"{size} to {target}" for size, target in CASES],
        "kilobytes": {name: round(kb, 1) for name, kb in sizes.items()},
        "machine": platform.machine(),
        "cpus": os.cpu_count(),
    }


if __name__ == "__main__":
    main()
