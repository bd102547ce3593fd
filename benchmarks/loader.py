"""Images a second and bytes of the semi-supervised loader alone: no model, batches on the CPU.

Usage: OMP_NUM_THREADS=1 python benchmarks/loader.py

Writes JPEG files of ImageNet's usual size (500 x 375) into a temporary folder. A step has 32 labelled images in one
view and 3 x 32 unlabelled ones in a weak and a strong view (RandAugment, random erasing 0.25), 224 x 224 x 3. An image
counts once, however many views are drawn of it. Bytes are those that a worker process hands over for one step.
"""

import argparse
import tempfile
import time
from collections.abc import Iterable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from semivim.data import ImageStream, StreamLoader, View, open_source
from semivim.data.streams import DrawnBatch

BATCH_SIZE, RATIO = 32, 3
NUM_FILES = 256


def write_images(root: Path) -> None:
    """Write smooth colours with some noise, about as large as photographs are as JPEG."""
    rng = np.random.default_rng(0)
    for i in range(NUM_FILES):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8))
        smooth = np.asarray(colours.resize((500, 375), Image.Resampling.BICUBIC), dtype=np.float32)
        pixels = np.clip(smooth + rng.normal(0, 12, smooth.shape), 0, 255).astype(np.uint8)
        path = root / "train" / str(i % 2) / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels).save(path, quality=90)


def make_streams(root: Path) -> list[ImageStream]:
    source = open_source("", str(root))
    view = partial(View, (3, 224, 224), (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), scale=(0.2, 1.0), hflip=0.5)
    weak = partial(view, color_jitter=None)
    strong = view(color_jitter=None, auto_augment="rand-m9-mstd0.5-inc1", re_prob=0.25)
    positions = np.arange(len(source))
    return [
        ImageStream(source, positions[:64], [weak()], BATCH_SIZE, labels=source.labels),
        ImageStream(source, positions[64:], [weak(), strong], RATIO * BATCH_SIZE, labels=source.labels, stream=1),
    ]


def num_bytes(drawn: DrawnBatch) -> int:
    tensors = [tensor for pixels in drawn.views for tensor in pixels]
    return sum(tensor.nbytes for tensor in (*tensors, drawn.label, drawn.skipped))


def read(batches: Iterable) -> None:
    """Touch every page of the batches, as a model would: pages that come from another process are mapped only then."""
    for batch in batches:
        if isinstance(batch, torch.Tensor):
            batch.flatten()[::1024].sum()
        elif batch is not None:
            read(batch)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 2], help="worker processes to try (%(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps timed, after two that are not (%(default)s)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_images(Path(folder))
        streams = make_streams(Path(folder))
        sizes = [sum(num_bytes(stream[step]) for stream in streams) for step in range(4)]
        print(f"bytes of a step: {np.mean(sizes) / 1e6:.2f} MB")
        for num_workers in args.workers:
            steps = StreamLoader(streams, "cpu", num_workers).steps()
            read(islice(steps, 2))
            start, cpu_start = time.perf_counter(), time.process_time()
            read(islice(steps, args.steps))
            seconds = (time.perf_counter() - start) / args.steps
            cpu_s = (time.process_time() - cpu_start) / args.steps
            images = (1 + RATIO) * BATCH_SIZE
            print(
                f"{num_workers} workers: {images / seconds:6.1f} images/s, {1e3 * seconds:5.0f} ms a step, "
                f"of which this process computes {1e3 * cpu_s:.0f} ms"
            )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
