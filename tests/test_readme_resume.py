"""The commands of README's "Interrupted, resized, resumed", as they stand there, on a small run.

They run in a shell whose ``python`` is a shim that puts the settings of ``tiny`` before each command's own. ``timeout``
does not wait an hour but for three steps, and ``sbatch``, ``srun`` and ``scontrol`` do on one machine what SLURM does:
tasks with its variables, a signal to all of them before the time is up, and the same script again when it is requeued.
"""

from __future__ import annotations

import csv
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from test_readme import TOGETHER

from blipdiff_train.checkpoints.training import checkpoint_path, read_checkpoint, steps_in

STEPS = 80

PYTHON = """#!/bin/bash
# python -m blipdiff_train ...: small settings first, the command's own last
[ "$1" = -m ] || exec {python} "$@"
shift 2
[ "$1" = train ] && shift
exec {python} -m blipdiff_train train {settings} "$@"
"""

WAIT = """
signal_after_three_steps() {{  # signal, log, process ids
    until [ "$(wc -l < "$2" 2> /dev/null || echo 0)" -ge 4 ]; do
        kill -0 $3 || return
        sleep 0.02
    done
    for task in "${{@:3}}"; do kill -s "$1" "$task"; done
}}
"""

TIMEOUT = (
    "#!/bin/bash\n"
    + WAIT
    + """
[ "$1" = --preserve-status ] || exit 125
shift 2
"$@" & task=$!
signal_after_three_steps TERM outputs/stage1/night/metrics.csv $task
wait $task
"""
)

SBATCH = """#!/bin/bash
# two starts at most: the first is told that its time is up
export SLURM_JOB_ID=4242 SLURM_JOB_NAME=blipdiff SLURM_NNODES=1 SLURM_NTASKS=2 SLURM_NTASKS_PER_NODE=2
export SLURM_JOB_NODELIST=localhost SLURM_NODELIST=localhost SLURM_NODEID=0 STATE=$PWD/slurm
mkdir -p "$STATE"
for start in 1 2; do
    rm -f "$STATE/requeued"
    export START=$start
    bash "$@" >> "$STATE/log" 2>&1
    code=$?
    echo "$code" >> "$STATE/codes"
    [ -e "$STATE/requeued" ] || exit $code
done
"""

SRUN = (
    "#!/bin/bash\n"
    + WAIT
    + """
export MASTER_ADDR=127.0.0.1 MASTER_PORT={port}
[ "$1" = --kill-on-bad-exit=0 ] && shift
for rank in 0 1; do
    SLURM_PROCID=$rank SLURM_LOCALID=$rank "$@" & tasks[$rank]=$!
done
[ "$START" = 1 ] && signal_after_three_steps USR1 outputs/stage1/cluster/metrics.csv "${{tasks[@]}}"
worst=0
for task in "${{tasks[@]}}"; do
    wait "$task"
    code=$?
    [ $code -gt $worst ] && worst=$code
done
exit $worst
"""
)

SCONTROL = """#!/bin/bash
[ "$1 $2" = "requeue $SLURM_JOB_ID" ] || exit 1
touch "$STATE/requeued"
"""


def steps(run: Path) -> list[int]:
    with (run / "metrics.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.mark.slow
def test_the_commands_do_what_is_written_beside_them(world, tmp_path):
    (tmp_path / "scripts").symlink_to(tiny.REPOSITORY / "scripts")
    own = ("stage=", "output_dir=", "every.", "total_steps=")
    small = tiny.overrides(world / "models", world / "data", tmp_path, 1)
    settings = [word for word in small if not word.startswith(own)]
    settings += ["every.log=1", "every.checkpoint=50", "every.validation=null", "every.samples=null"]
    settings += [f"total_steps={STEPS}"]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    words = {"python": sys.executable, "settings": " ".join(f"'{word}'" for word in settings), "port": port}
    programs = {"python": PYTHON, "timeout": TIMEOUT, "sbatch": SBATCH, "srun": SRUN, "scontrol": SCONTROL}
    for name, text in programs.items():
        program = tmp_path / "bin" / name
        program.parent.mkdir(exist_ok=True)
        program.write_text(text.format(**words) if name in ("python", "timeout", "srun") else text)
        program.chmod(0o755)
    environment = os.environ | {"PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tiny.REPOSITORY)}

    def run(line: str) -> subprocess.CompletedProcess[str]:
        shell = ["bash", "-c", line]
        return subprocess.run(shell, capture_output=True, text=True, cwd=tmp_path, env=environment, check=False)

    night, cluster = tmp_path / "outputs/stage1/night", tmp_path / "outputs/stage1/cluster"
    interrupted, resized, anew, batch = TOGETHER

    done = run(interrupted)
    assert done.returncode == 85, done.stdout + done.stderr
    stopped = steps(night)[-1]
    assert 3 <= stopped < STEPS
    assert read_checkpoint(checkpoint_path(night / "checkpoints", stopped))["position"] == 4 * stopped

    done = run(resized)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "2 processes × micro-batch 2" in done.stdout
    assert f"continuing after step {stopped} of {STEPS}" in done.stdout
    assert steps(night) == list(range(1, STEPS + 1))

    done = run(anew)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "continuing" not in done.stdout
    assert steps_in(night / "previous-1/checkpoints")[-1] == STEPS
    assert steps(night) == list(range(1, STEPS + 1))

    done = run(batch)
    log = (tmp_path / "slurm/log").read_text()
    assert done.returncode == 0, log
    assert (tmp_path / "slurm/codes").read_text().split() == ["85", "0"], log
    assert "saved; requeueing job 4242" in log
    assert re.search(rf"continuing after step \d+ of {STEPS}", log)
    assert steps(cluster) == list(range(1, STEPS + 1))


def test_the_batch_script_is_warned_and_may_be_requeued():
    """Without ``B:`` the signal goes to the tasks; the script's own shell would die of it."""
    script = (tiny.REPOSITORY / "scripts/slurm/train.sbatch").read_text()
    directives = dict(re.findall(r"#SBATCH --([a-z-]+)=?(\S*)", script))
    assert re.fullmatch(r"USR1@\d+", directives["signal"])
    assert "requeue" in directives
    assert directives["open-mode"] == "append"
