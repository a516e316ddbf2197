"""The toy world as training shards: drawn on first use, and for stage 2 annotated as a user's photographs would be."""

from __future__ import annotations

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blipdiff_train.common.files import write_json
from blipdiff_train.data.toybox.write import write_toybox

STAMP = "prepared.json"


@dataclass(frozen=True)
class ToyboxFolders:
    """Folders of shards; ``backgrounds`` is for stage 2 only."""

    train: Path
    val: Path
    backgrounds: Path | None


def ensure_shards(
    folder: str | Path,
    *,
    stage: int,
    train_samples: int,
    val_samples: int,
    backgrounds: int,
    samples_per_shard: int,
    size_px: int,
    clipseg: str | None,
    workers: int | None = None,
    say: Callable[[str], None] = print,
) -> ToyboxFolders:
    """Shards of training and held-out identities; what is there already stays.

    Args:
        folder: for all of them.
        train_samples, val_samples, backgrounds: how many.
        size_px: side of the drawings.
        clipseg: the segmenter that stage 2's photographs are annotated with; None keeps the drawn mattes.
        workers: processes of the annotation; None: the cores at hand.
    """
    folder = Path(folder)
    common: dict[str, Any] = {"size": size_px, "samples_per_shard": samples_per_shard}
    kind = "stage1" if stage == 1 else "stage2" if clipseg is None else "photographs"
    with _one_at_a_time(folder):
        made = {}
        for split, count in (("train", train_samples), ("heldout", val_samples)):
            made[split] = folder / f"{kind}-{split}-{count}-{size_px}px"
            if not made[split].is_dir():
                say(f"toybox: drawing {count} samples into {made[split]}")
            write_toybox(made[split], kind, count, split=split, **common)
        if stage == 1:
            return ToyboxFolders(made["train"], made["heldout"], None)
        scenes = folder / f"backgrounds-{backgrounds}-{size_px}px"
        write_toybox(scenes, "backgrounds", backgrounds, **common)
        if clipseg is not None:
            made = {split: annotate(source, clipseg, workers=workers, say=say) for split, source in made.items()}
        return ToyboxFolders(made["train"], made["heldout"], scenes)


def annotate(photographs: Path, clipseg: str, *, workers: int | None, say: Callable[[str], None]) -> Path:
    """Stage-2 shards of toy photographs by the preparation job; returns their folder."""
    from blipdiff_train.prepare import job

    output = photographs.with_name(photographs.name.replace("photographs", "annotated"))
    if (output / STAMP).is_file():
        return output
    say(f"toybox: annotating {photographs} with CLIPSeg into {output}")
    summary = job.run(
        input=str(photographs),
        output=str(output),
        workers=workers,
        image={"format": "png", "shortest_side_px": 16},
        segmenter={"name": "clipseg", "model": clipseg, "batch_size": 32},
        # drawings are flat, alike and small on purpose: what is a fault in a photograph is none here
        filters={"blur": None, "duplicate_distance": None, "unknown_share": None, "border_contact": None},
        report={"enabled": False},
        progress=False,
    )
    say(f"toybox: {summary}")
    write_json(output / STAMP, {"samples": summary.num_samples, "rejected": summary.rejected})
    return output


@contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Ranks that start together wait for the one that draws."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
