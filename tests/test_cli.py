"""What is typed is what runs."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import tiny

from blipdiff_train import __main__ as cli


@pytest.mark.parametrize(
    ("token", "quoted"),
    [
        ("stage=1", "stage='1'"),
        ("stage=1,2", "stage='1','2'"),
        ("+stage=2", "+stage='2'"),
        ("stage='1'", "stage='1'"),
        ("stage='1','2'", "stage='1','2'"),
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


def test_a_misspelt_flag(capsys):
    assert cli.main(["train", "--multi"]) == 2
    assert (
        "--multi: no such flag (allowed: --help, --multirun or -m, --cfg, --config-dir)"
        in capsys.readouterr().err
    )


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


def test_cfg_prints_what_would_run(capsys):
    assert cli.main(["stage=2", "seed=7", "--cfg"]) == 0
    text = capsys.readouterr().out
    assert "stage: 2\n" in text
    assert "seed: 7\n" in text


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
    monkeypatch.setattr(cli, "__file__", str(package / "__main__.py"))
    assert cli.config_folder() == package / "configs"
    (package / "configs" / "train.yaml").unlink()
    with pytest.raises(FileNotFoundError, match="the installation is incomplete"):
        cli.config_folder()


def test_a_folder_of_ones_own_experiments(tmp_path):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\nseed: 11\n")
    assert cli.compose("train", ["experiment=mine"], [str(tmp_path)])["seed"] == 11
