"""Every kind of input gives the records it should; every filter measures what it says."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest
import yaml
from PIL import Image

from blipdiff_train.context.rejection import Rejection
from blipdiff_train.prepare.filters import (
    check_agreement,
    check_matte,
    check_photograph,
    measure_agreement,
    measure_matte,
    near_duplicates,
    perceptual_hash,
    sharpness,
)
from blipdiff_train.prepare.openimages import salient_subjects
from blipdiff_train.prepare.records import list_records
from blipdiff_train.prepare.settings import FilterSettings, Settings, make_settings


def jpeg(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
    return path


def test_a_folder_takes_category_from_the_sub_folder_and_caption_from_the_sidecar(tmp_path):
    jpeg(tmp_path / "b_c/2.png")
    jpeg(tmp_path / "a/1.jpg").with_suffix(".txt").write_text("a  small\nthing ")
    jpeg(tmp_path / "a/1.mask.png")
    jpeg(tmp_path / ".hidden/3.jpg")
    found = [(r.name, r.subject_text, r.caption, r.mask) for r in list_records(tmp_path)]
    assert found == [
        ("a/1.jpg", "a", "a small thing", str(tmp_path / "a/1.mask.png")),
        ("b_c/2.png", "b c", None, None),
    ]


def test_categories_and_captions_come_from_files_or_are_one_word_for_all(tmp_path):
    root = tmp_path / "in"
    jpeg(root / "dog2/1.jpg")
    jpeg(root / "cat/2.jpg")
    (tmp_path / "categories.json").write_text(json.dumps({"dog2": "dog"}))
    (tmp_path / "captions.csv").write_text("path,caption\ncat/2.jpg,my cat\n")
    records = list_records(root, categories=str(tmp_path / "categories.json"), captions=str(tmp_path / "captions.csv"))
    assert [(r.subject_text, r.caption) for r in records] == [("cat", "my cat"), ("dog", None)]
    assert [r.subject_text for r in list_records(root, categories="old toy")] == ["old toy"] * 2
    assert len(list_records(root, limit=1)) == 1


def test_tables_name_paths_relative_to_themselves(tmp_path):
    jpeg(tmp_path / "photos/1.jpg")
    rows = [{"path": "photos/1.jpg", "caption": "a cup of tea", "kind": "cup"}]
    with (tmp_path / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    (tmp_path / "t.json").write_text(json.dumps(rows))
    (tmp_path / "t.jsonl").write_text(json.dumps(rows[0]) + "\n")
    for name in ("t.csv", "t.json", "t.jsonl"):
        (record,) = list_records(tmp_path / name, categories="kind")
        assert (record.subject_text, record.caption) == ("cup", "a cup of tea")
        assert record.read() == (tmp_path / "photos/1.jpg").read_bytes()
    (tmp_path / "bad.json").write_text('[{"picture": "1.jpg"}]')
    with pytest.raises(ValueError, match=r"bad.json: columns picture; expected one of path"):
        list_records(tmp_path / "bad.json")


def test_a_parquet_table(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    import pyarrow

    jpeg(tmp_path / "1.jpg")
    parquet.write_table(pyarrow.Table.from_pylist([{"file": "1.jpg", "category": "cup"}]), tmp_path / "t.parquet")
    assert [(r.name, r.subject_text) for r in list_records(tmp_path / "t.parquet")] == [("1.jpg", "cup")]


def test_nothing_to_read_is_the_users_error(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder"):
        list_records(tmp_path / "none")
    with pytest.raises(ValueError, match="no photographs"):
        list_records(tmp_path)


def test_openimages_keeps_images_with_one_salient_subject(tmp_path):
    (tmp_path / "classes.csv").write_text("/m/1,Dog\n/m/2,Person\n/m/3,Cat\n")
    head = "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,IsGroupOf\n"
    boxes = [
        ("good", "/m/1", 0.1, 0.8, 0.1, 0.8, 0), ("good", "/m/3", 0.0, 0.2, 0.0, 0.2, 0),  # dog, a small cat beside it
        ("two", "/m/1", 0.0, 0.5, 0.0, 1.0, 0), ("two", "/m/3", 0.5, 1.0, 0.0, 1.0, 0),  # as large as each other
        ("human", "/m/2", 0.1, 0.8, 0.1, 0.8, 0), ("small", "/m/1", 0.1, 0.2, 0.1, 0.2, 0),
        ("group", "/m/1", 0.1, 0.8, 0.1, 0.8, 1),
    ]  # fmt: skip
    lines = [f"{i},x,{label},1,{a},{b},{c},{d},{group}\n" for i, label, a, b, c, d, group in boxes]
    (tmp_path / "boxes.csv").write_text(head + "".join(lines))
    chosen = {"boxes": str(tmp_path / "boxes.csv"), "classes": str(tmp_path / "classes.csv")}
    assert salient_subjects(**chosen) == {"good": "dog"}
    # the box says dog, people who looked at the whole image say that there is none
    (tmp_path / "labels.csv").write_text("ImageID,Source,LabelName,Confidence\ngood,v,/m/3,0\ngood,v,/m/1,1\n")
    assert salient_subjects(**chosen, labels=tmp_path / "labels.csv") == {"good": "dog"}
    (tmp_path / "labels.csv").write_text("ImageID,Source,LabelName,Confidence\ngood,v,/m/1,0\n")
    assert salient_subjects(**chosen, labels=tmp_path / "labels.csv") == {}
    (tmp_path / "labels.csv").write_text("ImageID,LabelName\n")
    with pytest.raises(ValueError, match=r"openimages.labels=.*labels.csv: no column Confidence"):
        salient_subjects(**chosen, labels=tmp_path / "labels.csv")
    with pytest.raises(ValueError, match=r"openimages.box is not a setting; did you mean openimages.boxes\?"):
        make_settings({"input": "x", "output": "y", "openimages": {"box": "b.csv", "classes": "c.csv"}})
    with pytest.raises(ValueError, match=r"openimages.boxes=None, expected a CSV file"):
        make_settings({"input": "x", "output": "y", "openimages": {"classes": "c.csv"}})
    for name in ("good", "human", "two"):
        jpeg(tmp_path / f"images/{name}.jpg")
    assert [(r.name, r.subject_text) for r in list_records(tmp_path / "images", openimages=chosen)] == [
        ("good.jpg", "dog")
    ]


def test_hashes_are_near_for_the_same_picture_and_far_for_another():
    generator = np.random.default_rng(0)
    smooth = lambda: np.asarray(  # noqa: E731
        Image.fromarray(generator.integers(0, 256, (6, 6), dtype=np.uint8)).resize((200, 160), Image.Resampling.BICUBIC)
    )
    one, other = smooth(), smooth()
    small = np.asarray(Image.fromarray(one).resize((90, 70)))
    assert (perceptual_hash(one) ^ perceptual_hash(small)).bit_count() <= 4
    assert (perceptual_hash(one) ^ perceptual_hash(other)).bit_count() > 12


@pytest.mark.parametrize("distance", [0, 3, 8])
def test_near_duplicates_are_those_of_a_plain_double_loop(distance):
    generator = np.random.default_rng(distance)
    hashes: list[int | None] = [int(value) for value in generator.integers(0, 2**63, 40)]
    for index in range(40):
        flips = generator.integers(0, 64, generator.integers(0, 10))
        value = hashes[index]
        for flip in flips:
            value ^= 1 << int(flip)
        hashes.append(value)
    hashes[5] = None
    expected: dict[int, int] = {}
    for index, value in enumerate(hashes):
        for other in range(index):
            if value is None or hashes[other] is None or other in expected:
                continue
            if (value ^ hashes[other]).bit_count() <= distance:
                expected[index] = other
                break
    assert near_duplicates(hashes, distance) == expected


def test_each_matte_filter_has_its_cause():
    filters = FilterSettings()
    matte = np.zeros((100, 100), np.uint8)
    cases = {"too_small": np.s_[0:5, 0:5], "too_large": np.s_[:, :], "cut_off": np.s_[:, :80]}
    for cause, box in cases.items():
        one = matte.copy()
        one[box] = 255
        refused = check_matte(measure_matte(one), filters)
        assert isinstance(refused, Rejection)
        assert refused.cause == cause
    good = matte.copy()
    good[20:60, 20:60] = 255
    assert check_matte(measure_matte(good), filters) is None
    assert measure_matte(good) == {"area": 0.16, "border_contact": 0.0, "num_components": 1}
    pieces = matte.copy()
    for place in range(10, 90, 12):
        pieces[40:60, place : place + 6] = 255
    assert check_matte(measure_matte(pieces), filters).cause == "in_pieces"
    assert check_matte(measure_matte(matte), FilterSettings(area=None)) is None
    assert check_photograph(sharpness(np.full((50, 50, 3), 90, np.uint8)), filters).cause == "blurred"


def test_a_matte_that_a_second_cut_contradicts_is_disputed():
    image = np.full((90, 120, 3), (60, 120, 60), np.uint8)
    image += np.random.default_rng(0).integers(0, 12, image.shape, np.uint8)
    image[20:60, 30:90] = (200, 40, 40)
    whole, half, elsewhere = (np.zeros((90, 120), np.uint8) for _ in range(3))
    whole[20:60, 30:90] = half[20:60, 30:60] = elsewhere[65:85, 5:25] = 255
    assert measure_agreement(image, whole) > 0.95
    assert measure_agreement(image, half) == pytest.approx(0.5, abs=0.03)
    assert measure_agreement(image, elsewhere) == 0
    assert measure_agreement(np.full((90, 120, 3), 128, np.uint8), np.zeros((90, 120), np.uint8)) == 0
    assert check_agreement(0.7, 0.7) is None
    refused = check_agreement(0.5, 0.7)
    assert refused.cause == "disputed"
    assert "IoU 50.0%, expected ≥ 70.0% (filters.agreement)" in refused.detail
    with pytest.raises(ValueError, match=r"filters\.agreement=1\.5, expected a share"):
        make_settings({"input": "x", "output": "y", "filters": {"agreement": 1.5}})


def test_the_yaml_has_the_defaults_of_the_code_and_a_reason_for_each_threshold(repository):
    text = (repository / "configs/commands/prepare.yaml").read_text()
    plain = yaml.safe_load(text)
    assert make_settings(plain | {"input": "x"}) == make_settings({"input": "x", "output": plain["output"]})
    # what the command line does not have: the device of a model in the worker's own process
    assert set(plain) == {entry.name for entry in dataclasses.fields(Settings)} - {"device"}
    block = text[text.index("\nfilters:") :].split("\nreport:")[0].strip().splitlines()
    assert len(block) == 1 + len(plain["filters"])
    assert all("  # " in line for line in block)
