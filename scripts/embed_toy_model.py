"""Put two finished toy runs into the package: the embedded toy BLIP-Diffusion, what it reaches, and its picture.

    python -m blipdiff_train stage=1 name=embedded total_steps=1200
    python -m blipdiff_train stage=2 name=embedded total_steps=3200 optim.warmup_steps=100
    python scripts/embed_toy_model.py outputs/stage1/embedded outputs/stage2/embedded

Weights are stored in fp16, which halves them; what is stored is what is measured.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from blipdiff_train.build import ASSETS, EMBEDDED_STAGE1, resolve  # noqa: E402  (also runs from a bare checkout)
from blipdiff_train.checkpoints.model_folder import load_model_folder, save_model_folder  # noqa: E402
from blipdiff_train.commands import EMBEDDED_MODEL  # noqa: E402
from blipdiff_train.common.files import write_json  # noqa: E402
from blipdiff_train.evaluation import report  # noqa: E402

METRICS = "metrics.json"
JUDGES = {"clip": resolve("embedded:toy_foundation/clip"), "clipseg": resolve("embedded:toy_foundation/clipseg")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage1", type=Path, help="folder of the finished stage-1 run")
    parser.add_argument("stage2", type=Path, help="folder of the finished stage-2 run")
    parser.add_argument("--output", type=Path, default=Path("outputs/embedded"), help="for the evaluation's files")
    arguments = parser.parse_args()

    complete = ASSETS / EMBEDDED_MODEL
    alignment = ASSETS / EMBEDDED_STAGE1.removeprefix("embedded:")  # inside the other: written second
    for run, folder in ((arguments.stage2, complete), (arguments.stage1, alignment)):
        save_model_folder(folder, load_model_folder(run / "model", verify=True), dtype=torch.float16)
    metrics = {}
    for name, folder in (("stage1", alignment), ("stage2", complete)):
        measured = report.run(str(folder), arguments.output / name, **JUDGES)
        print(report.table(measured), flush=True)
        metrics |= {key: value for key, value in measured.items() if key in ("alignment", "subjects")}
    write_json(complete / METRICS, metrics)
    shutil.copy(arguments.output / "stage2" / "subjects.png", ASSETS / "pictures" / "subjects.png")


if __name__ == "__main__":
    main()
