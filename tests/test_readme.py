"""Every command of the README's ``sh`` blocks runs, in the README's order and in one folder, with the least work.

A command is found by itself; what makes it small stands in RULES. A command that no rule fits fails: give it one.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import tiny
from PIL import Image

from blipdiff_train.data import toybox

README = (tiny.REPOSITORY / "README.md").read_text(encoding="utf-8")


def commands(text: str) -> list[str]:
    """The lines of a document's ``sh`` blocks, comments left out, continued lines joined, each once."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    found = [shlex.join(shlex.split(line, comments=True)) for line in lines]
    return list(dict.fromkeys(command for command in found if command))


def section(title: str) -> str:
    """The part of the README under one heading."""
    return re.split(r"^#+ ", README.split(f"# {title}\n", 1)[1], maxsplit=1, flags=re.MULTILINE)[0]


TOGETHER = commands(section("Interrupted, resized, resumed"))
"""Commands that are one story: ``test_readme_resume.py`` runs them."""


@dataclass(frozen=True)
class Rule:
    """How the test runs the commands that ``pattern`` fits from their beginning to their end.

    Attributes:
        more: words put behind the command.
        code: allowed exit codes.
        says: found in what the command prints.
        makes: a path that exists afterwards, {0}, {1} … being the pattern's groups.
    """

    pattern: str
    more: str = ""
    code: tuple[int, ...] = (0,)
    says: str = ""
    makes: str = ""


CLI = r"python -m blipdiff_train (?:train )?"
ONE_STEP = (
    "total_steps=1 global_batch_size=4 optim.warmup_steps=0 validation_samples=4 every.validation=null "
    "every.samples=null data.workers=0"
)
TOYBOX = "data.toybox.train_samples=8 data.toybox.val_samples=4 data.toybox.backgrounds=4 data.toybox.matte=exact"
CPU = "trainer.accelerator=cpu"

# the first rule that fits counts
RULES = [
    Rule(rf"{CLI}.*--help", says="python -m blipdiff_train"),
    # eight GPUs where there are eight, else the answer that there are fewer
    Rule(rf"{CLI}.*trainer\.devices=8.*", more=f"{ONE_STEP} {TOYBOX}", code=(0, 2), says="8 (devices|processes)"),
    Rule(rf"{CLI}-m stage=1,2", more=f"{ONE_STEP} {TOYBOX} {CPU}", says="2 of 2 jobs finished"),
    Rule(
        rf"{CLI}-m stage=(\d) (\S+?)=(\S+),\S+",
        more=f"{ONE_STEP} {TOYBOX} {CPU}",
        says="2 of 2 jobs finished",
        makes="outputs/stage{0}/default/{1}=*/model",
    ),
    Rule(
        rf"{CLI}stage=2 data=shards data\.shards=\S+",
        more=f"{ONE_STEP} {CPU} name=photographs",
        says="finished: the model is in",
        makes="outputs/stage2/photographs/model/unet",
    ),
    Rule(
        rf"{CLI}stage=(\d)",
        more=f"{ONE_STEP} {TOYBOX} {CPU}",
        says="finished: the model is in",
        makes="outputs/stage{0}/default/model/qformer",
    ),
    Rule(r"python -m blipdiff_train prepare input=\S+ output=(\S+)", more="workers=1", makes="{0}/*.tar"),
    Rule(r"python -m blipdiff_train generate .*", more="steps=2 num_images=1", makes="outputs/generated/000.png"),
    Rule(
        r"python -m blipdiff_train evaluate .*",
        more="pairs.count=8 pairs.batch_size=8 subjects.count=2 subjects.steps=2 subjects.pictures=1",
        makes="outputs/evaluation/metrics.json",
    ),
    Rule(r"python -m blipdiff_train export .* to=(\S+)", makes="{0}/model_index.json"),
    Rule(r"python -m blipdiff_train doctor .*", more=f"{ONE_STEP} {CPU}", says="a run can start"),
]


def made_by_continuous_integration(command: str) -> bool:
    """``make`` targets: CI runs ``make test``, in an environment that it makes; the others are in the Makefile."""
    found = re.fullmatch(r"make ([a-z-]+)", command)
    if not found:
        return False
    assert re.search(rf"^{found[1]}:", (tiny.REPOSITORY / "Makefile").read_text(), flags=re.MULTILINE), command
    assert "make test" in (tiny.REPOSITORY / ".ci" / "run").read_text()
    return True


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """An empty folder as a reader has it: some photographs, and ``python`` in the path."""
    folder = tmp_path_factory.mktemp("home")
    for number in range(4):
        drawn = toybox.sample(number, size=96)
        kind = folder / "photos" / drawn.subject
        kind.mkdir(parents=True, exist_ok=True)
        Image.fromarray(drawn.image).save(kind / f"{number}.jpg", quality=95)
    shutil.copy(next(folder.glob("photos/*/*.jpg")), folder / "dog.jpg")
    (folder / "bin").mkdir()
    python = folder / "bin" / "python"
    python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')  # a link would lose the environment
    python.chmod(0o755)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in commands(README) if command not in TOGETHER])
def test_a_command_of_the_readme_runs(home, command) -> None:
    if made_by_continuous_integration(command):
        return
    fitting = [(rule, found) for rule in RULES if (found := re.fullmatch(rule.pattern, command))]
    assert fitting, f"no rule fits {command!r}: add one to RULES, so that this test runs it"
    rule, found = fitting[0]
    done = subprocess.run(
        f"{command} {rule.more}",
        shell=True,
        cwd=home,
        env=os.environ | {"PATH": f"{home / 'bin'}:{os.environ['PATH']}", "PYTHONPATH": str(tiny.REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=500,
    )
    printed = done.stdout + done.stderr
    assert done.returncode in rule.code, f"exit code {done.returncode}\n{printed}"
    assert "Traceback" not in printed, printed
    assert re.search(rule.says, printed), printed
    if rule.makes:
        assert list(home.glob(rule.makes.format(*found.groups()))), (rule.makes, printed)


def test_every_rule_is_of_a_command() -> None:
    for rule in RULES:
        assert any(re.fullmatch(rule.pattern, command) for command in commands(README)), rule.pattern


def test_commands_are_found_as_a_reader_types_them() -> None:
    first = "```sh\nmake demo    # a comment\n\npython a.py \\\n    b=1 c='x y'\n```\n"
    text = f"{first}\n```yaml\nkey: 1\n```\n\n```sh\nmake demo\n```\n"
    assert commands(text) == ["make demo", "python a.py b=1 'c=x y'"]
