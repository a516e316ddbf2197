"""What `model.stage1` and `model.qformer.init` accept, beyond this project's own folders."""

from __future__ import annotations

import pytest
import tiny
import torch

from blipdiff_train import __main__ as cli
from blipdiff_train import build
from blipdiff_train import config as configuration
from blipdiff_train.checkpoints.lavis import stage1_tensors
from blipdiff_train.checkpoints.transformers import load_clip_vision

# LAVIS does not store head counts: 64 channels a head is what its readers assume
WIDE = ("model.qformer.hidden_size=64", "model.qformer.num_attention_heads=1", "model.qformer.intermediate_size=96")


def config_of(folder, stage: int, *more: str) -> configuration.TrainConfig:
    tokens = tiny.overrides(folder / "models", folder / "data", folder / "runs", stage)
    plain = cli.compose("train", [cli.quote_stage(token) for token in [*tokens, *WIDE, *more]])
    config, problems = configuration.check_command("train", plain)
    assert not problems
    return config


@pytest.fixture
def lavis_file(tmp_path):
    """The file and the parts it was written from; as the published files, without the frozen tower."""
    tiny.write_models(tmp_path / "models")
    (tmp_path / "data").mkdir()
    source = build.parts(config_of(tmp_path, 1, "seed=5"), print)
    tensors = {name: tensor for name, tensor in stage1_tensors(source).items() if not name.startswith("visual_enc")}
    torch.save({"model": tensors}, tmp_path / "blip2_pretrained.pth")
    return tmp_path / "blip2_pretrained.pth", source


def test_stage_1_goes_on_from_a_file_of_lavis(tmp_path, lavis_file) -> None:
    file, source = lavis_file
    parts = build.parts(config_of(tmp_path, 1, f"model.qformer.init={file}"), print)
    for name, tensor in source.qformer.state_dict().items():
        torch.testing.assert_close(parts.qformer.state_dict()[name], tensor, rtol=0, atol=0)
    own_tower = load_clip_vision(tmp_path / "models" / "clip").state_dict()
    for name, tensor in parts.image_encoder.state_dict().items():
        torch.testing.assert_close(tensor, own_tower[name], rtol=0, atol=0)


def test_stage_2_reads_a_file_of_lavis_and_says_what_does_not_fit(tmp_path, lavis_file) -> None:
    with pytest.raises(ValueError, match="the Q-Former is 64 wide, the text encoder 16"):
        build.parts(config_of(tmp_path, 2, f"model.stage1={lavis_file[0]}"), print)
