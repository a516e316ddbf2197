"""How fast the loader is, as ratios from one run on one core.

    python scripts/bench_data.py [--photographs FOLDER] [--samples 128] [--rounds 5] [--height 512] [--foreground]
                                 [--quality 95] [--json FILE]

(a) Stage-2 samples (read, decode, crop, composite on a random background at 512, resize to 224, normalise, collate)
    against Pillow merely decoding the JPEGs and PNGs of the same samples from memory. Aim: at least 0.6.
(b) Reading raw samples in shuffled order through the index against webdataset's own sequential pipeline over the same
    tars. Aim: at least 1.0.

The two sides alternate in short chunks and the times are CPU times of this process, so that other jobs on the machine
disturb both alike; the ratio is the median over pairs of chunks, with the quartiles as its spread. Members are encoded
as `prepare` does. Results and what was done for them: docs/data_loading.md.
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cv2
import numpy as np
from PIL import Image

from blipdiff_train.common.images import load_image
from blipdiff_train.common.rng import numpy_generator
from blipdiff_train.data.datamodule import ShardDataModule, init_worker
from blipdiff_train.data.order import EpochOrder
from blipdiff_train.data.pixels import Normalisation
from blipdiff_train.data.samples import background_record, collate_stage2, stage2_record
from blipdiff_train.data.shards import ShardSet, write_shards
from blipdiff_train.data.transforms import PHOTO_SUFFIXES
from blipdiff_train.prepare.work import encode


def photograph(number: int, height: int, width: int) -> np.ndarray:
    """Noise with a photograph's spectrum, amplitude falling with frequency: H W 3 uint8.

    At JPEG quality 90 it takes about 0.22 bytes a pixel, what the DreamBench photographs take at the same size.
    """
    generator = numpy_generator(0, "bench.photograph", number)
    image = np.full((height, width, 3), 128.0, np.float32)
    for octave in range(1, 9):
        grey = generator.normal(size=(2**octave + 1, 2**octave + 1, 1)).astype(np.float32)
        colour = generator.normal(size=(2**octave + 1, 2**octave + 1, 3)).astype(np.float32)
        image += 40 / 1.3**octave * cv2.resize(grey + 0.3 * colour, (width, height), interpolation=cv2.INTER_CUBIC)
    return image.clip(0, 255).astype(np.uint8)


def matte(number: int, height: int, width: int) -> np.ndarray:
    """A blob with a soft, ragged edge: H W uint8."""
    generator = numpy_generator(0, "bench.matte", number)
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    distance = np.hypot(rows / height - 0.5, columns / width - 0.5)
    ragged = cv2.resize(generator.normal(size=(48, 48)).astype(np.float32), (width, height))
    return (np.clip((0.32 + 0.03 * ragged - distance) * 60 + 0.5, 0, 1) * 255).astype(np.uint8)


def real_photographs(folder: Path, height: int) -> list[np.ndarray]:
    """Photographs of a folder, their shorter side made ``height``."""
    found = []
    for path in sorted(folder.rglob("*.jpg"))[:32]:
        image = load_image(path)
        factor = height / min(image.size)
        found.append(np.array(image.resize((round(image.width * factor), round(image.height * factor)))))
    if not found:
        raise SystemExit(f"{folder}: no *.jpg")
    return found


def make_shards(folder: Path, images: list[np.ndarray], *, num_samples: int, foreground: bool, quality: int) -> None:
    """Annotated photographs in ``folder/train`` and backgrounds in ``folder/backgrounds``."""
    photos = [encode(image, "jpg", quality) for image in images]
    mattes = [encode(matte(number, *image.shape[:2]), "png", 0) for number, image in enumerate(images)]
    pixels = sum(image.shape[0] * image.shape[1] for image in images)
    print(f"{len(photos)} photographs, {sum(map(len, photos)) / pixels:.2f} bytes a pixel")
    write_shards(
        (
            stage2_record(
                f"{number:06d}",
                photos[number % len(photos)],
                mattes[number % len(photos)],
                subject="dog",
                caption="a photo of a dog",
                foreground=photos[number % len(photos)] if foreground else None,
            )
            for number in range(num_samples)
        ),
        folder / "train",
        samples_per_shard=64,
    )
    backgrounds = (background_record(f"b{number:06d}", photos[-1 - number % len(photos)]) for number in range(64))
    write_shards(backgrounds, folder / "backgrounds")


def compare(
    ours: Callable[[int], None], other: Callable[[int], None], chunks: int, rounds: int
) -> tuple[float, float, dict[str, float]]:
    """Median CPU seconds of a chunk of each, and median and quartiles of their ratios (other ÷ ours), warm."""
    times: list[tuple[float, float]] = []
    for number in range(rounds + 1):
        for chunk in range(chunks):
            pair = []
            for function in (ours, other):
                start = time.process_time()
                function(chunk)
                pair.append(time.process_time() - start)
            if number:
                times.append((pair[0], pair[1]))
    low, middle, high = statistics.quantiles((theirs / mine for mine, theirs in times), n=4)
    ratio = {"ratio": middle, "lower quartile": low, "upper quartile": high}
    return statistics.median(mine for mine, _ in times), statistics.median(theirs for _, theirs in times), ratio


def bench_stage2(folder: Path, *, num_samples: int, rounds: int, batch_size: int = 16) -> dict[str, float]:
    """Stage-2 batches against Pillow's decoding of the same files; samples per CPU second and their ratio."""
    module = ShardDataModule(
        stage=2,
        shards=str(folder / "train"),
        backgrounds=str(folder / "backgrounds"),
        global_batch_size=batch_size,
        micro_batch_size=batch_size,
        total_steps=1,
        seed=0,
        image_size=224,
        target_size=512,
    )
    dataset = module.train_dataset()
    backgrounds = dataset.transform.backgrounds
    read, drawn = backgrounds.read, []
    backgrounds.read = lambda index, suffixes: drawn.append(index) or read(index, suffixes)
    files: dict[int, list[bytes]] = {}
    for position in range(num_samples):
        record = dataset.shard_sets[0].read(dataset.order(position).index)
        files[position] = [
            data for suffix, data in record.items() if suffix in (*PHOTO_SUFFIXES, "fg.jpg", "alpha.png")
        ]
        drawn.clear()
        _ = dataset[position]
        files[position] += [data for suffix, data in read(drawn[-1]).items() if suffix in PHOTO_SUFFIXES]
    backgrounds.read = read

    def batch(chunk: int) -> None:
        positions = range(chunk * batch_size, (chunk + 1) * batch_size)
        collate_stage2([dataset[position] for position in positions], Normalisation())

    def decoding(chunk: int) -> None:
        for position in range(chunk * batch_size, (chunk + 1) * batch_size):
            for data in files[position]:
                Image.open(io.BytesIO(data)).load()

    ours, pillow, ratio = compare(batch, decoding, num_samples // batch_size, rounds)
    return {"ours": batch_size / ours, "pillow": batch_size / pillow, **ratio}


def bench_reading(folder: Path, *, rounds: int) -> dict[str, float]:
    """Shuffled reading by index against webdataset's sequential pipeline; samples per CPU second and their ratio."""
    import webdataset

    shards = ShardSet(str(folder / "train"))
    order = EpochOrder(shards.sizes, seed=0)
    names = [shard.name for shard in shards.shards]

    def indexed(_: int) -> None:
        for position in range(len(shards)):
            shards.read(order(position).index)

    def sequential(_: int) -> None:
        for _ in webdataset.WebDataset(names, shardshuffle=False):
            pass

    ours, other, ratio = compare(indexed, sequential, 1, 4 * rounds)
    return {"ours": len(shards) / ours, "webdataset": len(shards) / other, **ratio}


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--height", type=int, default=512, help="shorter side of the photographs")
    parser.add_argument("--photographs", type=Path, help="a folder of real ones; drawn ones (4:3) without it")
    parser.add_argument("--foreground", action="store_true", help="samples with estimated foreground colours (.fg.jpg)")
    parser.add_argument("--quality", type=int, default=95, help="of the JPEGs; `prepare` writes 95")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    options = parser.parse_args(arguments)
    init_worker()  # as in a loader process
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.photographs:
            images = real_photographs(options.photographs, options.height)
        else:
            images = [photograph(number, options.height, options.height * 4 // 3) for number in range(32)]
        make_shards(folder, images, num_samples=options.samples, foreground=options.foreground, quality=options.quality)
        results = {
            "stage-2 batches / Pillow decoding": bench_stage2(
                folder, num_samples=options.samples, rounds=options.rounds
            ),
            "indexed reading / webdataset sequential": bench_reading(folder, rounds=options.rounds),
        }
    for title, result in results.items():
        numbers = ", ".join(f"{name} {value:.0f}/s" for name, value in list(result.items())[:2])
        spread = f"{result['lower quartile']:.2f} to {result['upper quartile']:.2f}"
        print(f"{title}: {result['ratio']:.2f} ({spread}; {numbers} a core)")
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    return results


if __name__ == "__main__":
    main()
