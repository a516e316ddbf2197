"""What is typed is what runs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import tiny
import yaml

from blipdiff_train import __main__ as cli
from blipdiff_train.common import files


@pytest.mark.parametrize(
    ("token", "quoted"),
    [
        ("stage=1", "stage='1'"),
        ("stage=1,2", "stage='1','2'"),
        ("+stage=2", "+stage='2'"),
        ("stage='1'", "stage='1'"),
        ("stage='1','2'", "stage='1','2'"),
        ("stage=choice(1,2)", "stage=choice('1','2')"),
        ("seed=1", "seed=1"),
        ("model.stage1=1", "model.stage1=1"),
    ],
)
def test_the_stage_is_quoted_once(token, quoted):
    assert cli.quote_stage(token) == quoted
    assert cli.quote_stage(cli.quote_stage(token)) == quoted


@pytest.mark.parametrize(
    ("arguments", "command", "rest"),
    [
        (["stage=1"], "train", ["stage=1"]),
        (["train", "stage=1"], "train", ["stage=1"]),
        (["-m", "stage=1,2"], "train", ["-m", "stage=1,2"]),
        (["~seed"], "train", ["~seed"]),
        (["prepare", "input=x"], "prepare", ["input=x"]),
    ],
)
def test_the_first_word_is_the_command(arguments, command, rest):
    assert cli.split_command(arguments) == (command, rest)


def test_a_misspelt_command(capsys):
    assert cli.main(["trian", "stage=1"]) == 2
    assert "no command 'trian'; did you mean train?" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "--multi"], "--multi: no such flag; did you mean --multirun? (allowed: --help, --multirun or -m, "),
        (["--stage=1"], "--stage=1: no such flag; write stage=1 "),
        (["--stage", "2"], "--stage: no such flag; write stage=2 "),
        (["train", "--total-steps", "9"], "--total-steps: no such flag; write total_steps=9 "),
        (["stage", "1"], "no command 'stage'; write stage=1 "),
        (["--config-dir=nowhere"], "--config-dir: 'nowhere' is not a folder"),
    ],
)
def test_the_way_other_programs_are_called_gets_a_hint(arguments, hint, capsys):
    assert cli.main(arguments) == 2
    assert hint in capsys.readouterr().err


@pytest.mark.parametrize("words", [["train"], []])
def test_wrong_arguments_are_answered_before_anything_heavy_is_imported(words):
    """In a process of its own, which says at its end whether torch was imported."""
    script = (
        "import sys; from blipdiff_train.__main__ import main; code = main(); "
        "print(code, [name for name in ('torch', 'transformers', 'diffusers') if name in sys.modules])"
    )
    wrong = [*words, "stage=2", "optim.lrr=1", "total_steps=many", "trainer.precision=bf16"]
    done = subprocess.run(
        [sys.executable, "-c", script, *wrong], capture_output=True, text=True, cwd=tiny.REPOSITORY, check=True
    )
    assert done.stdout == "2 []\n", done.stdout
    lines = done.stderr.splitlines()
    assert lines[0] == "3 problems with the arguments:"
    assert [line.split(":")[0] for line in lines[1:]] == ["  - optim.lrr", "  - total_steps", "  - trainer.precision"]


def test_only_the_first_process_complains(monkeypatch, capsys):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.main(["train", "sed=1"]) == 2
    assert not capsys.readouterr().err


def test_help_names_the_commands_and_is_quick(capsys):
    assert cli.main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in cli.COMMANDS)
    began = time.monotonic()
    subprocess.run(
        [sys.executable, "-m", "blipdiff_train", "--help"],
        check=True,
        capture_output=True,
        cwd=tiny.REPOSITORY,
    )
    # under 0.3 s on an idle machine; the limit is for a busy one
    assert time.monotonic() - began < 5


@pytest.mark.parametrize("arguments", [["help", "doctor"], ["--help", "doctor"], ["doctor", "-h"]])
def test_help_of_a_command(arguments, capsys):
    assert cli.main(arguments) == 0
    text = capsys.readouterr().out
    assert text.startswith("python -m blipdiff_train doctor key=value")
    assert "  depth=sample    (one of sample, full)\n" in text


def test_help_ends_quietly_when_its_reader_has_enough():
    command = f"{sys.executable} -m blipdiff_train train --help | head -1"
    done = subprocess.run(command, shell=True, cwd=tiny.REPOSITORY, capture_output=True, text=True)
    assert done.stdout.startswith("python -m blipdiff_train train")
    assert done.stderr == ""


def test_a_group_of_keys_is_given_by_dots_or_in_braces():
    dots = cli.compose("prepare", ["openimages.boxes=a.csv", "openimages.classes=b.csv"], [])
    assert dots == cli.compose("prepare", ["openimages={boxes: a.csv, classes: b.csv}"], [])
    assert dots["openimages"]["boxes"] == "a.csv"


def test_help_says_what_is_allowed_and_follows_the_overrides(capsys):
    assert cli.main(["stage=2", "trainer=cpu", "--help"]) == 0
    text = capsys.readouterr().out
    assert "  subject.template=release    (one of release, paper)\n" in text
    assert "  trainer.accelerator=cpu    (one of auto, cpu, gpu)\n" in text
    assert "  every.log=10    (a whole number, ≥ 1)\n" in text
    assert "loss.itc" not in text  # stage 1's
    # each file that can be chosen is named and says what it is
    for file in sorted((tiny.REPOSITORY / "configs").glob("[sdtmle]*/*.yaml")):
        line = next(line for line in text.splitlines() if line.startswith(f"  {file.parent.name}={file.stem} "))
        assert len(line.split(maxsplit=1)[1]) > 20, line


def test_cfg_prints_what_would_run(capsys):
    assert cli.main(["stage=2", "seed=7", "--cfg"]) == 0
    text = capsys.readouterr().out
    assert "stage: 2\n" in text
    assert "seed: 7\n" in text


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (FileNotFoundError(2, "No such file or directory", "dog.jpg"), "stopped: dog.jpg: No such file or directory\n"),
        (PermissionError(13, "Permission denied", "shards/a.tar"), "stopped: shards/a.tar: Permission denied\n"),
        (ValueError("input=photos: no such folder"), "stopped: input=photos: no such folder\n"),
    ],
)
def test_a_command_that_cannot_go_on_says_why_without_a_traceback(monkeypatch, capsys, error, words):
    def prepare(config, plain):
        raise error

    monkeypatch.setattr("blipdiff_train.commands.prepare", prepare)
    assert cli.main(["prepare"]) == 1
    assert capsys.readouterr().err.startswith(words)
    monkeypatch.setenv("BLIPDIFF_DEBUG", "1")
    with pytest.raises(type(error)):
        cli.main(["prepare"])


@pytest.mark.parametrize(
    ("overrides", "swept", "tokens"),
    [
        (["stage=1"], ["stage"], ["stage='1'"]),
        (
            ["stage=1", "optim.lr=0.0003"],
            ["optim.lr"],
            ["stage='1'", "optim.lr=0.0003", "name='default/optim.lr=0.0003'"],
        ),
        (["name=a", "seed=3"], ["seed"], ["seed=3", "name='a/seed=3'"]),
        (["name=a", "stage=2"], ["name", "stage"], ["name=a", "stage='2'"]),
    ],
)
def test_a_job_of_a_sweep_has_its_own_folder(overrides, swept, tokens):
    assert cli.job_tokens(overrides, swept) == tokens


def test_a_sweep_runs_each_job_in_a_process_of_its_own(monkeypatch, tmp_path, capsys):
    """As typed: -m stage=1 optim.lr=1e-4,3e-4."""
    children = []
    monkeypatch.setattr(cli, "_run_child", lambda arguments: children.append(arguments) or len(children) - 1)
    code = cli.main(["-m", "stage=1", "optim.lr=1e-4,3e-4", f"output_dir={tmp_path}"])
    words = [child[3:] for child in children]
    assert words == [
        ["train", "stage='1'", f"optim.lr={lr}", f"output_dir={tmp_path}", f"name='default/optim.lr={lr}'"]
        for lr in ("0.0001", "0.0003")
    ]
    assert not any("-m" in child[3:] or "--multirun" in child for child in children)
    # the second job failed: it is named, and its code is the sweep's
    assert code == 1
    assert "1 of 2 jobs finished" in capsys.readouterr().out


def test_a_sweep_over_stages_continues_single_runs(monkeypatch, tmp_path):
    children = []
    monkeypatch.setattr(cli, "_run_child", lambda arguments: children.append(arguments) or 0)
    assert cli.main(["-m", "stage=1,2", f"output_dir={tmp_path}"]) == 0
    assert [child[3:5] for child in children] == [["train", "stage='1'"], ["train", "stage='2'"]]


def test_cfg_of_a_sweep_shows_its_jobs_and_runs_none(monkeypatch, capsys):
    monkeypatch.setattr(cli, "_run_child", lambda arguments: pytest.fail("a job was started"))
    assert cli.main(["-m", "stage=2", "optim.lr=1e-4,3e-4", "--cfg"]) == 0
    first, *jobs = yaml.safe_load_all(capsys.readouterr().out)
    assert first == "2 jobs over optim.lr"
    assert [(job["stage"], job["optim"]["lr"], job["name"]) for job in jobs] == [
        (2, 1e-4, "default/optim.lr=0.0001"),
        (2, 3e-4, "default/optim.lr=0.0003"),
    ]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["-m", "seed=1,2", "hydra/launcher=slrum"], "Could not find 'hydra/launcher/slrum' (allowed: basic, slurm"),
        (["-m", "seed=1,2", "hydra.lancher.x=1"], "hydra.lancher.x=1: Could not override 'hydra.lancher.x'"),
        (["-m", "seed=1,2", "optim.lr=[1"], "optim.lr=[1: cannot be read"),
        (["seed=1", "hydra/launcher=slurm"], "hydra/launcher: is a setting of sweeps"),
        (["seed=1", "hydra.launcher.partition=gpu"], "hydra.launcher.partition: is a setting of sweeps"),
        (["~model"], "model: there is no null (allowed: sd15, toy)"),
        (["model=null"], "model: there is no null (allowed: sd15, toy)"),
    ],
)
def test_mistakes_in_what_hydra_reads_are_problems_too(arguments, words, capsys):
    assert cli.main(arguments) == 2
    assert words in capsys.readouterr().err


def test_an_interrupted_job_ends_the_sweep(monkeypatch, tmp_path):
    children = []
    monkeypatch.setattr(cli, "_run_child", lambda arguments: children.append(arguments) or cli.INTERRUPTED)
    assert cli.main(["-m", "seed=1,2,3", f"output_dir={tmp_path}"]) == cli.INTERRUPTED
    assert len(children) == 1


def test_a_sweep_checks_every_job_first(capsys):
    assert cli.main(["-m", "stage=1,2", "seed=1,-1"]) == 2
    assert "seed: -1 must be ≥ 0" in capsys.readouterr().err
    assert cli.main(["-m", "stage=1"]) == 2
    assert "no key has several values" in capsys.readouterr().err


def test_the_configurations_are_found_in_a_wheel(monkeypatch, tmp_path):
    package = tmp_path / "blipdiff_train"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "train.yaml").write_text("")
    monkeypatch.setattr(files, "__file__", str(package / "common" / "files.py"))
    assert cli.config_folder() == package / "configs"
    (package / "configs" / "train.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="the installation is incomplete"):
        cli.config_folder()


def test_a_folder_of_ones_own_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    assert cli.compose("train", ["experiment=mine"], [str(tmp_path)])["seed"] == 11
