"""What `doctor` says about shards."""

from __future__ import annotations

import pytest
from shard_makers import annotated, disc, picture

from blipdiff_train.data.check import check_batches, check_shards
from blipdiff_train.data.samples import stage2_record
from blipdiff_train.data.shards import write_shards


def levels(findings):
    return {finding.level for finding in findings}


def text(findings):
    return "\n".join(f"{finding.level}: {finding.text}" for finding in findings)


@pytest.mark.parametrize("depth", ["sample", "full"])
def test_good_shards_have_no_complaints(shards, backgrounds, depth):
    findings = check_shards(str(shards), kind="stage2", depth=depth)
    assert levels(findings) == {"ok"}, text(findings)
    assert "5 shards, readable and contiguous, 23 samples" in text(findings)
    assert "1 categories: dog 23" in text(findings)
    assert levels(check_shards(str(backgrounds), kind="backgrounds", depth=depth)) == {"ok"}


def test_every_kind_of_fault_is_named_and_counted(tmp_path):
    samples = [annotated(number) for number in range(8)]
    samples[1]["png"] = samples[1]["png"][:100]
    samples[2]["json"] = "{"
    del samples[3]["alpha.png"]
    samples[4] = stage2_record("photo0004", picture(4), disc() * 0, subject="dog", caption="a dog")
    samples[5]["json"] = {"caption": "a dog"}
    samples[6] = stage2_record("photo0006", picture(6), disc(20, 20), subject="dog", caption="a dog")
    samples[7]["png"] = samples[0]["png"]
    write_shards(samples, tmp_path)
    findings = text(check_shards(str(tmp_path), kind="stage2", depth="full"))
    causes = ("undecodable image", "bad json", "missing member", "empty matte", "missing subject", "matte size")
    for cause in causes:
        assert f"error: 1 × {cause}" in findings
    assert "75.0% bad" in findings
    assert "warning: 1 of 8 photographs have the same pixels" in findings
    tolerant = text(check_shards(str(tmp_path), kind="stage2", depth="full", max_bad_fraction=0.8))
    assert "error" not in tolerant


def test_unreadable_and_empty_shards_and_repeated_keys(tmp_path):
    assert text(check_shards(str(tmp_path), kind="stage1")).startswith("error")
    write_shards([annotated(0)], tmp_path, prefix="a")
    write_shards([annotated(0)], tmp_path, prefix="b")
    assert "warning: 1 keys occur in several shards: photo0000" in text(check_shards(str(tmp_path), kind="stage1"))
    (tmp_path / "c.tar").write_bytes(b"\0" * 10240)
    assert "1 empty shards" in text(check_shards(str(tmp_path), kind="stage1"))


def test_batch_arithmetic():
    options = {"num_samples": 10, "micro_batch_size": 4, "total_steps": 100}
    findings = check_batches(**options, global_batch_size=16, world_size=2)
    assert "16 = 2 processes × 4 × 2 micro-batches" in text(findings)
    assert "160 epochs" in text(findings)
    assert "warning: 10 samples are fewer than a global batch" in text(findings)
    assert levels(check_batches(**options, global_batch_size=15, world_size=2)) == {"error"}
