"""Every configuration file composes; every bad value is named, all of them at once, with what is allowed."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from blipdiff_train import __main__ as cli
from blipdiff_train import config

CONFIGS = Path(__file__).resolve().parent.parent / "configs"


def problems(*tokens: str, command: str = "train") -> dict[str, str]:
    with pytest.raises(config.ConfigError) as caught:
        cli.compose(command, [cli.quote_stage(token) for token in tokens])
    return {problem.key: problem.message for problem in caught.value.problems}


def choices() -> list[list[str]]:
    """One list of overrides for each file of each group."""
    groups = [folder for folder in sorted(CONFIGS.iterdir()) if folder.is_dir()]
    skipped = ("commands", "hydra", "recipe", "experiment", "stage")
    pairs = [
        f"{group.name}={file.stem}"
        for group in groups
        if group.name not in skipped
        for file in group.glob("*.yaml")
    ]
    experiments = [[f"experiment={file.stem}"] for file in sorted((CONFIGS / "experiment").glob("*.yaml"))]
    return [[f"stage={stage}", pair] for stage in (1, 2) for pair in sorted(pairs)] + experiments


@pytest.fixture
def eight_gpus(monkeypatch):
    monkeypatch.setattr(config, "count_gpus", lambda: 8)


@pytest.mark.parametrize("tokens", choices(), ids=" ".join)
def test_every_file_composes_and_is_valid(tokens, eight_gpus):
    needs_shards = "data=shards" in tokens or any("paper" in token for token in tokens)
    more = ["data.shards=somewhere"] if needs_shards else []
    plain = cli.compose("train", [*(cli.quote_stage(token) for token in tokens), *more])
    assert config.check_command("train", plain)[0] is not None


@pytest.mark.parametrize("command", sorted(config.SCHEMAS))
def test_every_command_composes(command):
    assert cli.compose(command, [])


def test_every_yaml_file_is_read_by_a_test_here():
    read = {"train.yaml", "doctor.yaml", "hydra/launcher/slurm.yaml"} | {
        f"commands/{name}.yaml" for name in config.SCHEMAS
    }
    for path in sorted(CONFIGS.rglob("*.yaml")):
        assert yaml.safe_load(path.read_text()) is not None
        name = path.relative_to(CONFIGS)
        known = name.parts[0] in ("stage", "model", "data", "trainer", "logger", "recipe", "experiment")
        assert known or name.as_posix() in read, name


def test_the_recipe_of_the_toy_world_applies_to_toy_models_only():
    toy, real = (cli.compose("train", ["stage='2'", f"model={model}"]) for model in ("toy", "sd15"))
    assert toy["total_steps"] < 10_000
    assert (real["total_steps"], real["global_batch_size"], real["optim"]["lr"]) == (
        500_000,
        16,
        2e-6,
    )  # paper §4.1


def test_all_errors_at_once():
    found = problems(
        "stage=2",
        "optim.lrr=1",
        "seed=-1",
        "global_batch_size=many",
        "optim.warmup_steps=9999999",
        "data=shard",
        "foo=[1",
        "lr=1",
    )
    assert set(found) == {
        "optim.lrr",
        "seed",
        "global_batch_size",
        "optim.warmup_steps",
        "data",
        "foo=[1",
        "lr",
    }
    assert "did you mean optim.lr" in found["optim.lrr"]
    assert "did you mean optim.lr" in found["lr"]
    assert "-1 must be ≥ 0" in found["seed"]
    assert "'many' is not a whole number" in found["global_batch_size"]
    assert "must be ≤ total_steps=" in found["optim.warmup_steps"]
    assert "allowed: shards, toybox" in found["data"]


@pytest.mark.parametrize(
    ("token", "key", "words"),
    [
        ("stage=3", "stage", "allowed: 1, 2"),
        ("trainer.precision=8", "trainer.precision", "one of 32-true, bf16-mixed, 16-mixed"),
        ("trainer.precision=bf16", "trainer.precision", "; did you mean bf16-mixed?"),
        ("optim.schedule=cosin", "optim.schedule", "one of cosine, constant; did you mean cosine?"),
        ("trainer.precison=32-true", "trainer.precison", "; did you mean trainer.precision? (here"),
        ("trainer.precision=16-mixed", "trainer.precision", "on the CPU use 32-true or bf16-mixed"),
        ("trainer.frozen_precision=16", "trainer.frozen_precision", "on the CPU use 32 or bf16"),
        ("trainer.accelerator=tpu", "trainer.accelerator", "one of auto, cpu, gpu"),
        ("optim.lr=fast", "optim.lr", "'fast' is not a number"),
        ("optim.lr=0", "optim.lr", "must be > 0"),
        ("optim.betas=[0.9]", "optim.betas", "two numbers in [0, 1)"),
        ("optim.min_lr=1", "optim.min_lr", "must be ≤ optim.lr"),
        ("trainable=[]", "trainable", "nothing would train"),
        ("every.log=0", "every.log", "must be ≥ 1"),
        ("total_steps=1,2", "total_steps", "add -m"),
        ("data=shards", "data.shards", "is null"),
        ("model.qformer.num_attention_heads=3", "model.qformer.num_attention_heads", "does not divide"),
        ("subject.template=paper", "subject.template", "there is no such key"),  # stage 2's, in stage 1
        ("~seed", "seed", "is missing"),
        ("+new=1", "new", "there is no such key"),
        ("trainer.strategy=fsdp", "trainer.strategy", "one of auto, ddp"),
    ],
)
def test_one_error(token, key, words):
    found = problems("trainer.accelerator=cpu", token)
    assert key in found, found
    assert words in found[key]


@pytest.mark.parametrize(
    ("gpus", "tokens", "words"),
    [
        (
            0,
            ("trainer.devices=8",),
            "this machine has 0 GPUs; for 8 CPU processes add trainer.accelerator=cpu",
        ),
        (2, ("trainer.devices=8",), "this machine has 2 GPUs; allowed are 1 to 2"),
        (1, ("trainer.devices=2", "trainer.accelerator=gpu"), "this machine has 1 GPU; allowed are 1 to 1"),
        (0, ("trainer.accelerator=gpu",), "this machine has 0 GPUs; use trainer.accelerator=cpu"),
        (0, ("trainer.devices=0",), "0 must be ≥ 1 or auto"),
    ],
)
def test_devices_that_are_not_there(monkeypatch, gpus, tokens, words):
    monkeypatch.setattr(config, "count_gpus", lambda: gpus)
    assert words in problems(*tokens)["trainer.devices"]


def test_eight_devices_need_nothing_else(eight_gpus):
    assert cli.compose("train", ["stage='1'", "trainer.devices=8"])["trainer"]["devices"] == 8


def test_seed_zero_is_a_seed():
    assert cli.compose("train", ["seed=0"])["seed"] == 0


@pytest.mark.parametrize("world", [1, 2, 3, 8])
@pytest.mark.parametrize("limit", [1, 5, 64])
def test_batches_multiply_back(world, limit):
    for share in (1, 2, 7, 60, 64):
        plan = config.plan_batches(share * world, world=world, max_micro_batch=limit)
        assert plan.world * plan.micro_batch * plan.accumulation == plan.global_batch == share * world
        assert plan.micro_batch <= limit
        assert not any(share % size == 0 for size in range(plan.micro_batch + 1, min(limit, share) + 1))


def test_a_batch_that_cannot_be_shared_names_the_nearest():
    with pytest.raises(ValueError, match="10 samples cannot be shared equally by 4 processes; use 8 or 12"):
        config.plan_batches(10, world=4, max_micro_batch=64)
    assert (
        "use 63 or 66"
        in problems("global_batch_size=64", "trainer.devices=3", "trainer.accelerator=cpu")[
            "global_batch_size"
        ]
    )


def test_every_key_says_what_it_means():
    for command in ("train", "doctor", *config.SCHEMAS):
        for stage in (1, 2):
            for name in config.leaf_keys(config.schema_of(command, {"stage": stage})):
                assert name
    for command in cli.COMMANDS:
        text = cli.command_help(command, [], [])
        assert "=" in text
        assert all(line.strip() for line in text.split("\nkeys\n")[1].splitlines())


ONLINE = ("stage=2", "data=shards", "data.shards=x", "data.context=online")


@pytest.mark.parametrize(
    ("tokens", "key", "words"),
    [
        (("stage=1", *ONLINE[1:]), "data.context", "which only stage=2 reads"),
        (("stage=2", "data.context=online"), "data.context", "data=shards data.shards=…"),
        (("stage=2", "data.context=offline"), "data.context", "one of prepared, online"),
        ((*ONLINE, "data.annotation.segmenter.name=clipseg"), "data.annotation.segmenter.model", "is null; a folder"),
        (
            (*ONLINE, "data.annotation.trimap.background_threshold=0.8"),
            "data.annotation.trimap.foreground_threshold",
            "0.7 must be > background_threshold=0.8",
        ),
        ((*ONLINE, "data.annotation.filters.area=[0.9,0.1]"), "data.annotation.filters.area", "two rising shares"),
        (
            (*ONLINE, "data.annotation.filters.duplicate_distance=4"),
            "data.annotation.filters.duplicate_distance",
            "be null",
        ),
        (("stage=1", "data.cache_latents=true"), "data.cache_latents", "stage 1 has no latents"),
        (
            ("stage=2", "data.cache_latents=true", "augmentation.random_target_crop=true"),
            "data.cache_latents",
            "set augmentation.random_target_crop=false",
        ),
    ],
)
def test_what_online_mattes_and_cached_latents_need(tokens, key, words):
    assert words in problems(*tokens)[key]


def test_a_run_annotates_as_prepare_does():
    """The values stand in two files, because a command's file and a group of train's cannot share one."""
    ours = cli.compose("train", [*(cli.quote_stage(token) for token in ONLINE)])["data"]["annotation"]
    theirs = cli.compose("prepare", [])
    ours["filters"]["duplicate_distance"] = theirs["filters"]["duplicate_distance"]  # only `prepare` can look for them
    for block, values in ours.items():
        assert values == theirs[block]
