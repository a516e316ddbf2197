"""The whole method on the embedded toy world: stage 1, stage 2, and what came of it, in pictures and a table.

Runs the same commands a user types, one after the other, and prints each of them. Run it again after an interruption:
every command continues where it was.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import time
from pathlib import Path


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=Path("demo"), help="folder for runs, pictures and the table")
    parser.add_argument("--stage1-steps", type=int, help="optimizer steps of stage 1, instead of the recipe's")
    parser.add_argument("--stage2-steps", type=int, help="optimizer steps of stage 2, instead of the recipe's")
    parser.add_argument("--identities", type=int, default=64, help="held-out subjects in the evaluation")
    arguments = parser.parse_args()
    output: Path = arguments.output

    started = time.monotonic()
    common = [f"output_dir={output}/runs", f"data.toybox.folder={output}/toybox", "name=demo", *precision()]
    for stage, steps in ((1, arguments.stage1_steps), (2, arguments.stage2_steps)):
        length = [] if steps is None else [f"total_steps={steps}"]
        if not run(f"stage {stage}", ["train", f"stage={stage}", *common, *length]):
            return 1
    models = {1: output / "runs/stage1/demo/model", 2: output / "runs/stage2/demo/model"}
    for stage, model in models.items():
        count = [f"subjects.count={arguments.identities}"] if stage == 2 else []
        if not run(
            f"evaluation of stage {stage}", ["evaluate", f"model={model}", f"output={output}/stage{stage}", *count]
        ):
            return 1

    shutil.copy(output / "stage2/subjects.png", output / "subjects.png")
    from blipdiff_train.evaluation.report import table as make_table

    table = make_table(
        {k: v for stage in models for k, v in json.loads((output / f"stage{stage}/metrics.json").read_text()).items()}
    )
    (output / "table.txt").write_text(table + "\n")
    print(f"\n{table}\n")
    print(
        f"Pictures: {output}/subjects.png (subject, prompt, and what was generated with it, without it, with another)"
    )
    grids = sorted((output / "runs/stage2/demo/samples").glob("*.png"))
    if grids:
        print(f"          {grids[-1]} (training: input, target, generated)")
    print(f"Models:   {models[1]}, {models[2]}")
    print(f"Everything took {(time.monotonic() - started) / 60:.1f} minutes.")
    return 0


def precision() -> list[str]:
    """bf16 where the processor computes in it, which is nearly twice as fast; without that it would be far slower."""
    import torch

    able = torch.cpu.get_capabilities()
    in_bf16 = any(able.get(name, False) for name in ("avx512_bf16", "amx_bf16"))
    return ["trainer.precision=bf16-mixed"] if in_bf16 else []


def run(title: str, arguments: list[str]) -> bool:
    """Run one command of the package in its own process; on failure say what to do."""
    print(f"\n=== {title}: python -m blipdiff_train {' '.join(arguments)}", flush=True)
    code = subprocess.run([sys.executable, "-m", "blipdiff_train", *arguments], check=False).returncode
    if code:
        print(f"\n{title} stopped with exit code {code}; the same command again continues it.", file=sys.stderr)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
