"""Kill a training again and again, and compare what comes out with a run that was left alone.

    python scripts/chaos.py --kills 20 --output outputs/chaos -- stage=1
    python scripts/chaos.py --kills 20 --processes 2 --output outputs/chaos -- stage=2 optim.ema_decay=0.99

What follows ``--`` are the run's own settings. Each start of the run is a process of its own (or two, with gloo) that
runs the command line and is ended by SIGKILL: at random moments, while it starts, and while it writes a checkpoint.
Then it is started again with the same arguments. At the end weights, averages, optimizer state and every logged number
must be the same bits. The processes are forked from one that has imported everything, which makes a start cheap.
``log.md`` in the output folder has a row for every kill and what was compared; docs/resume.md has those of real runs.
"""

from __future__ import annotations

import argparse
import csv
import os
import random
import re
import shlex
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ.setdefault("OMP_NUM_THREADS", "1")

PATIENCE_SECONDS = 900
"""A start that shows no progress for so long counts as hanging."""


@dataclass
class Start:
    """One start of the run: its processes, and where it wrote."""

    pids: list[int]
    folder: Path
    began: float

    def poll(self) -> list[int] | None:
        """Exit codes when every process has ended (negative: a signal), else None."""
        if not hasattr(self, "codes"):
            self.codes: dict[int, int] = {}
        for pid in self.pids:
            if pid not in self.codes:
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)
        return [self.codes[pid] for pid in self.pids] if len(self.codes) == len(self.pids) else None

    def kill(self) -> None:
        for pid in self.pids:
            if pid not in getattr(self, "codes", {}):
                os.kill(pid, signal.SIGKILL)
        while self.poll() is None:
            time.sleep(0.01)


def start(arguments: Sequence[str], folder: Path, processes: int, log: Path) -> Start:
    """Fork the processes of one run."""
    port = 0
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
    pids = []
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _become_rank(arguments, rank, processes, port, log)
        pids.append(pid)
    return Start(pids, folder, time.monotonic())


def _become_rank(arguments: Sequence[str], rank: int, processes: int, port: int, log: Path) -> None:
    code = 1
    try:
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        if processes > 1:
            # what torchrun would set
            os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes)}
            os.environ |= {"GROUP_RANK": "0", "NODE_RANK": "0", "LOCAL_WORLD_SIZE": str(processes)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        sys.argv = ["blipdiff_train", *arguments]
        from blipdiff_train.__main__ import main

        code = main(list(arguments))
        sys.stdout.flush()
        sys.stderr.flush()
    except BaseException:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(code)


def last_step(folder: Path) -> int:
    """The last step in the run's log, 0 without any."""
    path = folder / "metrics.csv"
    if not path.exists():
        return 0
    steps = [line.split(",", 1)[0] for line in path.read_text().splitlines()[1:]]
    return max((int(step) for step in steps if step.isdigit()), default=0)


def newest_checkpoint(folder: Path) -> int:
    from blipdiff_train.checkpoints.training import steps_in

    return max(steps_in(folder / "checkpoints"), default=0)


def half_written(folder: Path) -> set[str]:
    return {path.name for path in (folder / "checkpoints").glob(".step-*.tmp.*")}


def wait(run: Start, until, what: str) -> list[int] | None:
    """Wait until ``until()`` or the end of the run; returns its exit codes if it ended."""
    while not until():
        codes = run.poll()
        if codes is not None:
            return codes
        if time.monotonic() - run.began > PATIENCE_SECONDS:
            run.kill()
            raise SystemExit(f"no {what} for {PATIENCE_SECONDS} s; the run hangs")
        time.sleep(0.002)
    return None


@dataclass
class Kill:
    """How one start ended."""

    way: str
    step: int
    """Last step in the run's log."""
    checkpoint: int
    """Newest checkpoint file, 0 without any."""
    left_half: bool
    """Whether it was writing a checkpoint, which is now half on the disk."""


def kill_once(run: Start, way: str, generator: random.Random, every: int) -> Kill | None:
    """End a start by SIGKILL in the given way; None if the run had finished before."""
    before, stale = last_step(run.folder), half_written(run.folder)
    if way == "while it starts":
        delay = generator.uniform(0, 1.5)
        ended = wait(run, lambda: time.monotonic() - run.began > delay, "start")
    elif way == "while a checkpoint is written":
        ended = wait(run, lambda: bool(half_written(run.folder) - stale), "checkpoint")
        # a big checkpoint takes longer: anywhere in the time that the last one may have taken at 400 MB/s
        last = run.folder / "checkpoints" / f"step-{newest_checkpoint(run.folder):08d}.pt"
        time.sleep(generator.uniform(0, 0.004 + (last.stat().st_size / 4e8 if last.exists() else 0)))
    else:
        target = before + generator.randint(1, 2 * every)
        ended = wait(run, lambda: last_step(run.folder) >= target, "step")
        time.sleep(generator.uniform(0, 0.1))
    if ended is not None or run.poll() is not None:
        codes = run.poll()
        if any(codes):
            raise SystemExit(f"the run ended by itself with exit codes {codes}; see its log")
        return None
    run.kill()
    left_half = bool(half_written(run.folder) - stale)
    return Kill(way, last_step(run.folder), newest_checkpoint(run.folder), left_half)


def resumed_steps(log: Path) -> list[int]:
    """The steps after which starts have continued, in order."""
    return [int(step) for step in re.findall(r"continuing after step (\d+) of", log.read_text())]


def rows(path: Path) -> list[dict[str, str]]:
    """Rows of a log without what is measured by the clock."""
    with path.open() as file:
        return [
            {name: value for name, value in row.items() if not name.startswith("time/")}
            for row in csv.DictReader(file)
        ]


def _bits(tensor) -> bytes:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()


def differences(quiet: Path, chaos: Path, compared: Counter[str] | None = None) -> list[str]:
    """Everything that is not the same bits in two finished runs.

    Args:
        compared: counts what was looked at: rows of the logs, and tensors or numbers of each part of the checkpoint.
    """
    import torch

    from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint

    found = []
    compared = Counter() if compared is None else compared
    for name in ("metrics.csv", "validation.csv"):
        if (quiet / name).exists():
            compared[f"rows of {name}"] += len(rows(quiet / name))
        if (quiet / name).exists() != (chaos / name).exists():
            found.append(f"{name} is missing in one run")
        elif (quiet / name).exists() and rows(quiet / name) != rows(chaos / name):
            pairs = zip(rows(quiet / name), rows(chaos / name), strict=False)
            first = next((a["step"] for a, b in pairs if a != b), "the number of rows")
            found.append(f"{name} differs, first at step {first}")

    def compare(left, right, place: str) -> None:
        if isinstance(left, dict) and isinstance(right, dict):
            if list(left) != list(right):
                found.append(f"{place}: keys differ")
            for name in left:
                if name in right:
                    compare(left[name], right[name], f"{place}.{name}")
            return
        compared[place.split(".")[0]] += 1
        if isinstance(left, torch.Tensor) and isinstance(right, torch.Tensor):
            same = left.dtype == right.dtype and left.shape == right.shape
            if not same or _bits(left) != _bits(right):
                found.append(f"{place}: the tensors differ")
        elif left != right:
            found.append(f"{place}: {left} ≠ {right}")

    states = [
        read_checkpoint(checkpoint_path(run / "checkpoints", newest_checkpoint(run)))
        for run in (quiet, chaos)
    ]
    for name in states[0]:
        if name not in ("config", "wandb_run_id"):
            compare(states[0][name], states[1][name], name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--processes", type=int, default=1, help="ranks, joined by gloo")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--output", type=Path, default=Path("outputs/chaos"), help="folder, must not exist")
    parser.add_argument("settings", nargs="*", help="the run's settings, after --")
    options = parser.parse_args()
    if options.output.exists():
        parser.error(f"{options.output} exists; give another --output")
    options.output.mkdir(parents=True)

    # imported once, before the first fork; nothing is computed here, so no thread is lost in a fork
    import blipdiff_train.build
    import blipdiff_train.stages.callbacks
    import blipdiff_train.stages.resume
    import blipdiff_train.stages.stage1
    import blipdiff_train.stages.stage2
    import blipdiff_train.train  # noqa: F401
    from blipdiff_train.__main__ import compose, quote_stage

    settings = [quote_stage(setting) for setting in options.settings]
    if options.processes > 1:
        settings += ["trainer.accelerator=cpu", f"trainer.devices={options.processes}"]
    commands = {kind: [*settings, f"output_dir={options.output / kind}"] for kind in ("quiet", "chaos")}
    plain = {kind: compose("train", command) for kind, command in commands.items()}
    folders = {kind: Path(plain[kind]["run_dir"]) for kind in commands}
    every, total = plain["chaos"]["every"]["checkpoint"], plain["chaos"]["total_steps"]

    began = time.monotonic()
    quiet = start(commands["quiet"], folders["quiet"], options.processes, options.output / "quiet.log")
    codes = wait(quiet, lambda: False, "end")
    if any(codes):
        raise SystemExit(f"the quiet run failed with exit codes {codes}; see {options.output / 'quiet.log'}")
    print(f"quiet run: {total} steps in {time.monotonic() - began:.0f} s", flush=True)

    generator = random.Random(options.seed)
    ways = ["at a random moment", "while a checkpoint is written", "at a random moment", "while it starts"]
    kills: list[Kill] = []
    table = options.output / "log.md"

    def report(line: str) -> None:
        print(line, flush=True)
        with table.open("a") as file:
            file.write(line + "\n")

    words = f"--kills {options.kills} --processes {options.processes} --seed {options.seed}"
    report(f"`python scripts/chaos.py {words} -- {shlex.join(options.settings)}`, {time.strftime('%Y-%m-%d')}\n")
    report("| SIGKILL | when | logged step | newest checkpoint | half a checkpoint left | next start continued after |")
    report("|---|---|---|---|---|---|")
    chaos_log = options.output / "chaos.log"
    for number in range(1, options.kills + 2):
        resumed = len(resumed_steps(chaos_log)) if chaos_log.exists() else 0
        run = start(commands["chaos"], folders["chaos"], options.processes, chaos_log)
        done = None
        if number <= options.kills:
            done = kill_once(run, ways[(number - 1) % len(ways)], generator, every)
        if done is None:
            codes = wait(run, lambda: False, "end")
            if any(codes):
                raise SystemExit(f"the run failed with exit codes {codes}; see {chaos_log}")
        later = resumed_steps(chaos_log)[resumed:] if chaos_log.exists() else []
        if kills:
            words = str(later[0]) if later else "the start" if not kills[-1].checkpoint else "(killed before that)"
            report(f"{_row(kills[-1], len(kills))} {words} |")
        if done is None:
            break
        kills.append(done)
    compared: Counter[str] = Counter()
    found = differences(folders["quiet"], folders["chaos"], compared)
    half = sum(kill.left_half for kill in kills)
    report(
        f"\n{len(kills)} kills, {half} of them with half a checkpoint left; {len(kills) + 1} starts; "
        f"{total} steps; {time.monotonic() - began:.0f} s; differences: {len(found) or 'none'}"
    )
    report("compared: " + ", ".join(f"{number} {name}" for name, number in compared.items()))
    for difference in found[:20]:
        report(f"  {difference}")
    if len(kills) < options.kills:
        report(f"the run was over before {options.kills} kills: raise total_steps")
    return 1 if found or len(kills) < options.kills else 0


def _row(kill: Kill, number: int) -> str:
    half = "yes" if kill.left_half else ""
    return f"| {number} | {kill.way} | {kill.step} | {kill.checkpoint or 'none'} | {half} |"


if __name__ == "__main__":
    sys.exit(main())
