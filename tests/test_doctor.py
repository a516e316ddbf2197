"""`doctor` tells before a run what the run would meet: in a table, and by its exit code."""

from __future__ import annotations

import io
import tarfile
import weakref
from pathlib import Path

import pytest
import tiny
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from blipdiff_train import __main__ as cli
from blipdiff_train import build, doctor
from blipdiff_train.config import check_command


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    return tiny.write_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def data(tmp_path) -> Path:
    return tiny.write_data(tmp_path / "data")


@pytest.fixture
def ask(models, data, tmp_path, capsys):
    """Exit code and table of `doctor` on a tiny run, with further words."""

    def asked(*words, stage=1):
        base = [word for word in tiny.overrides(models, data, tmp_path / "out", stage) if word != "data=shards"]
        code = cli.main(["doctor", *base, *words])
        printed = capsys.readouterr()
        return code, printed.out + printed.err

    return asked


def lines(table: str, state: str) -> list[str]:
    return [line for line in table.splitlines() if line.split()[:1] == [state]]


@pytest.mark.parametrize("stage", [1, 2])
@pytest.mark.parametrize("depth", ["sample", "full"])
def test_a_healthy_set_gives_0_and_leaves_no_trace(ask, tmp_path, stage, depth):
    code, table = ask(f"depth={depth}", stage=stage)
    assert code == 0
    assert not lines(table, "FAIL")
    # the one remark: no photographs to put subjects on
    assert len(lines(table, "warn")) == (stage == 2), table
    for words in (
        "24 of 24 samples decoded, all good",
        "6 of 6 samples decoded, all good",
        "global batch 4 = 1 process × micro-batch 4 × accumulation 1",
        "6 steps × 4 samples = 24, 1 epochs of 24 samples",
        f"torch {torch.__version__}",
        "activations of a micro-batch of 4",
        "a run can start",
    ):
        assert words in table
    assert not (tmp_path / "out").exists()


def test_damage_is_named_and_the_exit_code_is_1(ask, data):
    shard = data / "stage2" / "shard-000001.tar"
    content = bytearray(shard.read_bytes())
    with tarfile.open(shard) as tar:
        place = next(member for member in tar if member.name.endswith(".alpha.png"))
    content[place.offset_data + 20 : place.offset_data + 30] = bytes(10)
    shard.write_bytes(content)
    key = place.name.split(".")[0]
    code, table = ask(stage=2)
    assert code == 1
    assert f"{shard}: {key}.alpha.png" in table
    assert "4.2% bad, more than data.max_bad_fraction=0.01: a run would stop" in table
    assert "a run cannot start: 2 of" in table
    code, table = ask("data.max_bad_fraction=0.1", stage=2)
    assert code == 0
    assert f"{shard}: {key}.alpha.png" in table
    assert "a run can start (2 warnings)" in table


def test_an_unusable_shard_is_one_line_and_the_other_checks_go_on(ask, data):
    shard = data / "stage1" / "shard-000002.tar"
    shard.write_bytes(shard.read_bytes()[:700])
    code, table = ask()
    assert code == 1
    assert f"{shard}: cut off at byte" in table
    assert "6 of 6 samples decoded, all good" in table
    assert lines(table, "ok")[-1].split()[1] == "memory"
    assert "activations unknown" in lines(table, "ok")[-1]


def test_a_pickled_member_is_refused_not_loaded(ask, data, tmp_path):
    class Touch:
        def __reduce__(self):
            return open, (str(tmp_path / "touched"), "w")

    import pickle

    with tarfile.open(data / "stage1" / "shard-000000.tar", "w") as tar:
        payload = pickle.dumps(Touch())
        member = tarfile.TarInfo("00000.pkl")
        member.size = len(payload)
        tar.addfile(member, io.BytesIO(payload))
    code, table = ask("depth=full")
    assert code == 1
    assert "00000.pkl" in table
    assert not (tmp_path / "touched").exists()


def test_typed_as_a_newcomer_would(ask, models, tmp_path):
    code, table = ask("depth=ful")
    assert code == 2
    assert "sample, full" in table
    code, table = ask(f"data.shards={tmp_path}/no-such-folder")
    assert code == 1
    assert f"FAIL  training           {tmp_path}/no-such-folder: no such shard" in table
    code, table = ask("data=toybox")
    assert code == 2
    assert "data.shards: is given, but data=toybox draws its own shards; use data=shards" in table
    code, table = ask(f"model.clip={tmp_path}/nothing")
    assert code == 1
    assert any("models" in line and "nothing" in line for line in lines(table, "FAIL")), table
    code, table = ask("global_batch_size=64", "trainer.max_micro_batch=64")
    assert code == 0
    assert "fewer samples than a global batch of 64" in lines(table, "warn")[0]


def compose(words):
    return cli.compose("train", [cli.quote_stage(word) for word in words])


@pytest.mark.parametrize("command", ["train", "doctor"])
def test_naming_shards_means_ones_own_data(command):
    plain = cli.compose(command, ["data.shards=mine"])
    assert (plain["data"]["source"], plain["data"]["shards"]) == ("shards", "mine")
    assert cli.compose(command, [])["data"]["source"] == "toybox"


def test_a_folder_that_cannot_hold_the_run(ask, tmp_path):
    (tmp_path / "file").write_text("no folder")
    code, table = ask(f"output_dir={tmp_path}/file/runs")
    assert code == 1
    assert f"{tmp_path}/file cannot be written: Not a directory" in table
    code, table = ask("keep_checkpoints=100000000")
    assert code == 1
    assert "lower keep_checkpoints or choose another output_dir" in lines(table, "FAIL")[0]


def test_versions_are_compared_with_what_the_project_requires(monkeypatch):
    wanted = ["torch>=99", "numpy>=1", "no-such-package>=2", "pyarrow>=99; extra == 'parquet'"]
    monkeypatch.setattr(doctor, "requires", lambda name: wanted)
    finding = doctor.check_versions()
    assert finding.level == "error"
    assert [line.split(",")[0] for line in finding.details] == [
        f"torch is {torch.__version__}",
        "no-such-package is not installed",
    ]


def test_the_room_is_what_a_run_takes(models, data, tmp_path):
    words = [*tiny.overrides(models, data, tmp_path / "out", 2), "total_steps=1", "optim.warmup_steps=0"]
    words += ["optim.ema_decay=0.9"]
    assert cli.main(words) == 0
    config, _ = check_command("train", compose(words))
    module = build.module(config, build.parts(config, lambda line: None))
    trainable, frozen = doctor.count_parameters(module)
    tensors = sum(
        value.numel() * value.element_size()
        for value in _tensors(torch.load(tmp_path / "out/stage2/default/checkpoints/step-00000001.pt"))
    )
    assert doctor.checkpoint_bytes(config, trainable) == pytest.approx(tensors, rel=0.02)
    weights = sum(path.stat().st_size for path in (tmp_path / "out/stage2/default/model").rglob("*.safetensors"))
    assert 4 * (trainable + frozen) == pytest.approx(weights, rel=0.2)


def _tensors(value):
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, (dict, list, tuple)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)


class PeakMemory(TorchDispatchMode):
    """Bytes of all tensors made inside that are alive at once, at most."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self.known = set()

    def __torch_dispatch__(self, function, types, arguments=(), keywords=None):
        result = function(*arguments, **(keywords or {}))
        for tensor in _tensors(result):
            storage = tensor.untyped_storage()
            if storage._cdata in self.known:
                continue
            self.known.add(storage._cdata)
            self.now += storage.nbytes()
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _gone(self, name, size):
        self.known.discard(name)
        self.now -= size


@pytest.mark.parametrize(("stage", "precision"), [(1, "bf16-mixed"), (2, "32-true")])
def test_the_memory_estimate_is_near_the_measured_peak(tmp_path, stage, precision):
    """The embedded models at a micro-batch of 16: two whole steps, forward, backward and AdamW."""
    words = [f"stage={stage}", "experiment=smoke", "global_batch_size=16", f"trainer.precision={precision}"]
    words += ["trainer.accelerator=cpu", "optim.ema_decay=0.9", f"output_dir={tmp_path}", "data.workers=0"]
    config, problems = check_command("train", compose(words))
    assert not problems
    parts = build.parts(config, lambda line: None)
    module = build.module(config, parts)
    datamodule = build.datamodule(config, parts, build.data_sources(config, lambda line: None))
    estimate = doctor.estimate_memory(config, module, datamodule)
    weights = sum(p.numel() * p.element_size() for p in module.parameters())
    average = sum(p.numel() * 4 for p in module.parameters() if p.requires_grad)

    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad])
    batch = next(iter(datamodule.train_dataloader()))
    with PeakMemory() as memory:
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=precision != "32-true"):
                loss = module.training_step(batch, 0)
            loss.backward()
            optimizer.step()
    measured = memory.peak + weights + average
    assert 0.8 * measured < estimate.total < measured
    assert doctor.FITS * measured < estimate.total, "what the estimate is judged by leaves room for the rest"
