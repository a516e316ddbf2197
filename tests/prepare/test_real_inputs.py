"""Inputs as other tools and other people's disks have them, in exactly their layout."""

from __future__ import annotations

import csv
import io
import json
import os
import struct
import sys
import tarfile
import zlib
from collections import Counter

import numpy as np
import pytest
from pictures import draw
from PIL import Image

from blipdiff_train.common.images import load_image
from blipdiff_train.prepare.job import run
from blipdiff_train.prepare.openimages import salient_subjects
from blipdiff_train.prepare.records import list_records
from blipdiff_train.prepare.settings import make_settings


def picture(path, number=0, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(draw(number)).save(path, **options)
    return path


def encoded(number, format):
    buffer = io.BytesIO()
    Image.fromarray(draw(number)).save(buffer, format)
    return buffer.getvalue()


# ---- img2dataset -----------------------------------------------------------------------------------------------------


def img2dataset_members(key, suffix, *, caption, category, data):
    """A sample's files as img2dataset 1.47.0 names and fills them (``save_additional_columns=[category]``)."""
    facts = {
        "category": category,
        "caption": caption,
        "url": f"http://127.0.0.1:8765/{key}.jpg",
        "key": key,
        "status": "success",
        "error_message": None,
        "width": 96,
        "height": 96,
        "original_width": 640,
        "original_height": 640,
        "exif": "{}",
        "sha256": "25376e469f7e16944245059baaf57c2cb31110e0ecd4691363312bc54aff02d6",
    }
    text = json.dumps(facts, indent=4).encode()
    return [
        (f"{key}.{suffix}", data),
        (f"{key}.json", text),
        # no caption is an empty file and null in the JSON
        (f"{key}.txt", (caption or "").encode()),
    ]


def write_img2dataset_shard(folder, name, samples):
    """Byte for byte what img2dataset 1.47.0 with webdataset 0.2.111 wrote for the same members, and its neighbours."""
    folder.mkdir(exist_ok=True)
    with tarfile.open(folder / f"{name}.tar", "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (member, data) in enumerate(entry for sample in samples for entry in sample):
            info = tarfile.TarInfo(member)
            info.size, info.mode, info.uname, info.gname = len(data), 0o444, "bigdata", "bigdata"
            info.mtime = 1795541091.5569527 + number / 512  # a fraction, and so a PAX header before each member
            tar.addfile(info, io.BytesIO(data))
    (folder / f"{name}.parquet").write_bytes(b"PAR1 not looked at PAR1")
    (folder / f"{name}_stats.json").write_text(json.dumps({"count": 5, "successes": len(samples)}, indent=4))


def shard_of(suffix, format, first=0):
    """In the order the threads finished, with gaps where a download failed."""
    texts = (("0000002", 'a "dog",\nnumber 2', "dog"), ("0000000", None, "rc car"), ("0000004", "x", None))
    return [
        img2dataset_members(key, suffix, caption=caption, category=category, data=encoded(first + number, format))
        for number, (key, caption, category) in enumerate(texts)
    ]


@pytest.mark.parametrize(("suffix", "format"), [("jpg", "JPEG"), ("png", "PNG"), ("webp", "WEBP")])
def test_img2datasets_tars_lie_beside_parquet_and_stats(tmp_path, suffix, format):
    folder = tmp_path / "crawl"
    write_img2dataset_shard(folder, "00000", shard_of(suffix, format))
    # shards of a very long list of URLs have longer numbers
    late = img2dataset_members("1234567890123", suffix, caption="late", category="cat", data=encoded(9, format))
    write_img2dataset_shard(folder, "123456789", [late])
    (folder / "_tmp").mkdir()
    records = list_records(folder)
    assert [(r.name, r.subject_text, r.caption) for r in records] == [
        (f"00000.tar/0000002.{suffix}", "dog", 'a "dog", number 2'),
        (f"00000.tar/0000000.{suffix}", "rc car", None),
        (f"00000.tar/0000004.{suffix}", None, "x"),
        (f"123456789.tar/1234567890123.{suffix}", "cat", "late"),
    ]
    assert records[1].read() == encoded(1, format)
    assert list_records(folder / "00000.tar") == records[:3]


def test_a_crawl_that_was_killed_costs_its_last_tar_and_not_the_job(tmp_path):
    folder, output = tmp_path / "crawl", tmp_path / "shards"
    write_img2dataset_shard(folder, "00000", shard_of("jpg", "JPEG")[:2])
    write_img2dataset_shard(folder, "00001", shard_of("jpg", "JPEG", first=5))
    whole = (folder / "00001.tar").read_bytes()
    (folder / "00001.tar").write_bytes(whole[: len(whole) // 2])
    (folder / "00001.parquet").write_bytes(b"")  # so the killed one left it
    (folder / "00001_stats.json").unlink()
    with tarfile.open(folder / "00002.tar", "w") as tar:
        for name in ("a.b.jpg", "c.txt"):
            tar.addfile(tarfile.TarInfo(name), io.BytesIO())
    summary = run(input=str(folder), output=str(output), progress=False, workers=1, kind="backgrounds")
    assert (summary.num_photographs, summary.num_samples) == (5, 2)
    details = {
        entry["source"]: entry["detail"]
        for entry in map(json.loads, (output / "rejected.jsonl").read_text().splitlines())
    }
    assert "00001.tar: " in details["00001.tar"]
    assert "cut off" in details["00001.tar"]
    assert "has .b.jpg, expected a photograph" in details["00002.tar/a"]
    assert "has .txt, expected a photograph" in details["00002.tar/c"]
    with pytest.raises(ValueError, match=r"nothing in it can be read; 00001.tar: .*cut off"):
        list_records(folder / "00001.tar")


def test_img2datasets_files_format_has_categories_in_its_json_and_not_in_its_folders(tmp_path):
    for number, sample in enumerate(shard_of("jpg", "JPEG")):
        folder = tmp_path / f"0000{number // 2}"
        folder.mkdir(exist_ok=True)
        for name, data in sample:
            (folder / name).write_bytes(data)
    assert [(r.name, r.subject_text, r.caption) for r in list_records(tmp_path)] == [
        ("00000/0000000.jpg", "rc car", None),
        ("00000/0000002.jpg", "dog", 'a "dog", number 2'),
        ("00001/0000004.jpg", None, "x"),
    ]


def test_parquet_of_img2dataset_says_what_to_give_instead(tmp_path):
    parquet, pyarrow = pytest.importorskip("pyarrow.parquet"), pytest.importorskip("pyarrow")
    row = {"caption": "a dog", "url": "http://127.0.0.1/1.jpg", "key": "0000000", "status": "success"}
    parquet.write_table(pyarrow.Table.from_pylist([row]), tmp_path / "00000.parquet")
    with pytest.raises(ValueError, match="URLs are not fetched here: fetch them with img2dataset and give its folder"):
        list_records(tmp_path / "00000.parquet")
    parquet.write_table(pyarrow.Table.from_pylist([row | {"jpg": b"\xff\xd8"}]), tmp_path / "00001.parquet")
    with pytest.raises(ValueError, match=r"inside its column jpg, .*img2dataset: output_format=webdataset or files"):
        list_records(tmp_path / "00001.parquet")
    with pytest.raises(ValueError, match=r"there are others: 2 .parquet; a table is given by its own name"):
        list_records(tmp_path)


# ---- OpenImages ------------------------------------------------------------------------------------------------------

V4_HEAD = (
    "ImageID,Source,LabelName,Confidence,XMin,XMax,YMin,YMax,"
    "IsOccluded,IsTruncated,IsGroupOf,IsDepiction,IsInside"
)
V6_HEAD = V4_HEAD + ",XClick1X,XClick2X,XClick3X,XClick4X,XClick1Y,XClick2Y,XClick3Y,XClick4Y"
V6_TAIL = ",0.148438,0.012500,0.059375,0.195312,0.148438,0.357812,0.587500,0.325000"
BOXES = (
    "000002b66c9c498e,xclick,/m/0bt9lr,1,0.100000,0.800000,0.100000,0.800000,0,1,0,0,0",
    "000002b66c9c498e,xclick,/m/01yrx,1,0.000000,0.200000,0.000000,0.200000,1,0,0,0,0",
    "0001eeaf4aed83f9,xclick,/m/04yx4,1,0.022673,0.964200,0.071038,0.800546,0,0,0,0,0",
    "000595fe6fee6369,xclick,/m/0bt9lr,1,0.100000,0.900000,0.100000,0.900000,0,0,1,0,0",
    "00075905539074f2,activemil,/m/01yrx,1,0.100000,0.800000,0.100000,0.800000,-1,-1,-1,-1,-1",
    "000a1249af2bc5f0,xclick,/m/01yrx,1,0.000000,0.500000,0.000000,1.000000,0,0,0,0,0",
    "000a1249af2bc5f0,xclick,/m/0bt9lr,1,0.500000,1.000000,0.000000,1.000000,0,0,0,0,0",
    "000b0ff2e6b6d1c4,xclick,/m/0bt9lr,1,0.100000,0.200000,0.100000,0.200000,0,0,0,0,0",
)
CLASSES = "/m/0bt9lr,Dog\n/m/01yrx,Cat\n/m/04yx4,Man\n/m/0h8n5zk,Kitchen & dining room table\n"


@pytest.mark.parametrize(
    ("boxes_head", "tail", "classes_head"),
    [(V4_HEAD, "", ""), (V6_HEAD, V6_TAIL, "id,name\n"), (V6_HEAD, V6_TAIL, "LabelName,DisplayName\n")],
    ids=["v4", "v6", "v7"],
)
@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
def test_openimages_tables_of_every_version(tmp_path, boxes_head, tail, classes_head, line_end):
    boxes = [boxes_head, *(box + tail for box in BOXES)]
    (tmp_path / "boxes.csv").write_bytes((line_end.join(boxes) + line_end).encode())
    (tmp_path / "classes.csv").write_bytes((classes_head + CLASSES).replace("\n", line_end).encode())
    labels = "ImageID,Source,LabelName,Confidence\n00075905539074f2,verification,/m/01yrx,0\n"
    (tmp_path / "labels.csv").write_text(labels + "000002b66c9c498e,crowdsource-verification,/m/01yrx,0\n")
    tables = {"boxes": tmp_path / "boxes.csv", "classes": tmp_path / "classes.csv"}
    # unknown (-1) is not yes
    assert salient_subjects(**tables) == {"000002b66c9c498e": "dog", "00075905539074f2": "cat"}
    for number, image in enumerate(sorted({box[:16] for box in BOXES} | {"ffff000000000000"})):
        picture(tmp_path / f"images/train_{image[3]}/{image}.jpg", number)
    left_out = Counter()
    openimages = {key: str(path) for key, path in tables.items()} | {"labels": str(tmp_path / "labels.csv")}
    records = list_records(tmp_path / "images", openimages=openimages, not_chosen=left_out)
    assert [(r.name, r.subject_text) for r in records] == [("train_0/000002b66c9c498e.jpg", "dog")]
    assert left_out == {
        "no box": 1,
        "class left out": 1,
        "group, depiction or inside": 1,
        "no single subject": 1,
        "box too small or too large": 1,
        "label called absent": 1,
    }


def test_openimages_mistakes_are_named_with_file_and_line(tmp_path):
    (tmp_path / "boxes.csv").write_text(f"{V4_HEAD}\n{BOXES[0]}\n{BOXES[1].replace('0.200000', 'x', 1)}\n")
    (tmp_path / "classes.csv").write_text(CLASSES)
    (tmp_path / "hierarchy.csv").write_text('{"LabelName": "/m/0bl9f", "Subcategory": []}\n')
    boxes, classes = tmp_path / "boxes.csv", tmp_path / "classes.csv"
    with pytest.raises(ValueError, match=r"openimages.boxes=.*boxes.csv: line 3 cannot be read: .*'x'"):
        salient_subjects(boxes, classes)
    with pytest.raises(ValueError, match=r"openimages.exclude: Dgo is no class of .*; did you mean Dog\?"):
        salient_subjects(boxes, classes, exclude=["Dgo"])
    with pytest.raises(ValueError, match=r"openimages.classes=.*expected rows of label and name"):
        salient_subjects(boxes, tmp_path / "hierarchy.csv")
    boxes.write_text(f"{V4_HEAD}\n{BOXES[2]}\n")
    picture(tmp_path / "images/0001eeaf4aed83f9.jpg")
    with pytest.raises(ValueError, match=r"leaves out all 1 photographs \(class left out 1\)"):
        list_records(tmp_path / "images", openimages={"boxes": str(boxes), "classes": str(classes)})
    assert salient_subjects(boxes, classes, exclude=["Dog"]) == {"0001eeaf4aed83f9": "man"}
    wrong = {"boxes": 3, "classes": "c.csv", "area": [0.1, 80], "dominance": "two", "exclude": "Person"}
    with pytest.raises(ValueError, match="prepare cannot start") as caught:
        make_settings({"input": "x", "output": "y", "openimages": wrong})
    for words in ("boxes=3, expected a CSV", "area=[0.1, 80], expected", "dominance='two'", "exclude='Person'"):
        assert f"openimages.{words}" in str(caught.value)


def test_the_memory_for_openimages_grows_with_the_photographs_at_hand_and_not_with_the_rows(tmp_path):
    import tracemalloc

    (tmp_path / "classes.csv").write_text(CLASSES)
    peaks = []
    for count in (2_000, 20_000):
        rows = "".join(f"{number // 8:016x}{BOXES[number % 2][16:]}\n" for number in range(count))
        (tmp_path / "boxes.csv").write_text(f"{V4_HEAD}\n{rows}")
        tracemalloc.start()
        chosen = salient_subjects(tmp_path / "boxes.csv", tmp_path / "classes.csv", images={f"{7:016x}"})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert chosen == {}  # four dogs of one size
    assert peaks[1] < 1.5 * peaks[0]


# ---- tables ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("excel.csv", '\ufeffPath, Caption ,Category\r\ndog/1.jpg,"a ""dog"",\r\nsitting",dog\r\ndog/2.jpg,,\r\n'),
        ("german.csv", 'path;caption;category\ndog/1.jpg;"a ""dog"", sitting";dog\ndog/2.jpg;;\n'),
        ("tabs.tsv", 'path\tcaption\tcategory\ndog\\1.jpg\t"a ""dog"", sitting"\tdog\ndog/2.jpg\t\t\n'),
        (
            "metadata.jsonl",
            '{"file_name": "dog/1.jpg", "text": "a \\"dog\\", sitting", "label": "dog"}\n'
            '{"file_name": "dog/2.jpg", "text": null, "label": NaN}\n',
        ),
    ],
)
def test_tables_as_spreadsheets_and_hubs_write_them(tmp_path, name, text):
    picture(tmp_path / "dog/1.jpg")
    picture(tmp_path / "dog/2.jpg")
    (tmp_path / name).write_bytes(text.encode())
    assert [(r.name, r.caption, r.subject_text) for r in list_records(tmp_path / name)] == [
        ("dog/1.jpg", 'a "dog", sitting', "dog"),
        ("dog/2.jpg", None, None),
    ]


def test_absolute_paths_missing_files_and_empty_cells_in_a_table(tmp_path):
    picture(tmp_path / "elsewhere/1.jpg")
    rows = [[tmp_path / "elsewhere/1.jpg", "dog"], ["gone.jpg", "dog"], ["", "dog"], []]
    (tmp_path / "t").mkdir()
    with (tmp_path / "t/t.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["path", "category"], *rows])
    summary = run(input=str(tmp_path / "t/t.csv"), output=str(tmp_path / "o"), progress=False, workers=1)
    assert (summary.num_photographs, summary.num_samples) == (3, 1)
    found = [json.loads(line)["detail"] for line in (tmp_path / "o/rejected.jsonl").read_text().splitlines()]
    assert found == [
        "gone.jpg: No such file or directory",
        "t.csv, row 3: its path is empty",
    ]


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        (b"path,caption\n1.jpg,a dog, sitting\n", {}, r"line 2 has 3 cells, the heading 2; put text with a ','"),
        (b"path,category\n1.jpg,caf\xe9\n", {}, r"t.csv: is not UTF-8 .*save it as UTF-8"),
        (b"path,kind\n1.jpg,dog\n", {"categories": "kindd"}, r"it has path, kind; did you mean kind\?"),
        (b"path,class\n1.jpg,dog\n", {"categories": "species"}, r"categories=species: .*did you mean class\?"),
        (b"url,caption\nhttp://x,dog\n", {}, r"expected one of path, .*URLs are not fetched here"),
        (b"path\ngone/1.jpg\n", {}, r"none of its first 1 photographs is there, e.g. .*gone/1.jpg; paths are relative"),
    ],
)
def test_a_table_that_cannot_be_meant_so_is_refused(tmp_path, text, options, message):
    picture(tmp_path / "1.jpg")
    (tmp_path / "t.csv").write_bytes(text)
    with pytest.raises(ValueError, match=message):
        list_records(tmp_path / "t.csv", **options)


def test_files_of_categories_that_fit_nothing_are_refused(tmp_path):
    picture(tmp_path / "in/1.jpg")
    (tmp_path / "c.csv").write_text("path,category\nphotos/1.jpg,dog\n")
    (tmp_path / "broken.json").write_text("{")
    (tmp_path / "lines.jsonl").write_text('{"path": "1.jpg"}\n{"path": \n')
    with pytest.raises(ValueError, match=r"none of .* in it; its first entry is 'photos/1.jpg', .*'1.jpg'"):
        list_records(tmp_path / "in", categories=str(tmp_path / "c.csv"), captions=str(tmp_path / "c.csv"))
    with pytest.raises(ValueError, match=r"captions=.*broken.json: cannot be read as .json"):
        list_records(tmp_path / "in", captions=str(tmp_path / "broken.json"))
    with pytest.raises(ValueError, match=r"lines.jsonl: cannot be read as .jsonl: line 2 of the file"):
        list_records(tmp_path / "lines.jsonl")


def test_parquet_without_pyarrow_names_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    (tmp_path / "t.parquet").write_bytes(b"PAR1")
    with pytest.raises(ValueError, match=r"needs pyarrow: pip install 'blipdiff_train\[parquet\]'"):
        list_records(tmp_path / "t.parquet")


# ---- folders ---------------------------------------------------------------------------------------------------------


def test_the_category_is_the_innermost_folder_with_a_letter(tmp_path):
    for name in ("dog/2023/1.jpg", "animals/old_cat/2.JPG", "2024/3.jpg", "the\u0301ie\u0300re/4.jpg"):
        picture(tmp_path / name, format="JPEG")
    assert {r.name: r.subject_text for r in list_records(tmp_path)} == {
        "dog/2023/1.jpg": "dog",
        "animals/old_cat/2.JPG": "old cat",
        "2024/3.jpg": None,
        "th\u00e9i\u00e8re/4.jpg": "th\u00e9i\u00e8re",
    }
    (tmp_path / "categories.json").write_text(json.dumps({"animals": "animal", "2024": "rabbit"}))
    found = {r.name: r.subject_text for r in list_records(tmp_path, categories=str(tmp_path / "categories.json"))}
    assert (found["animals/old_cat/2.JPG"], found["2024/3.jpg"], found["dog/2023/1.jpg"]) == ("animal", "rabbit", "dog")


def test_hidden_files_are_not_there_and_links_are_followed_but_not_in_circles(tmp_path):
    root = tmp_path / "in"
    picture(root / "cup/1.jpg")
    for name in ("cup/._1.jpg", "cup/.DS_Store", "cup/Thumbs.db", ".cache/2.jpg"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_bytes(b"\0\5\26\7")
    picture(tmp_path / "elsewhere/3.jpg")
    os.symlink(tmp_path / "elsewhere", root / "mug")
    os.symlink(root, root / "cup/loop")
    os.symlink(tmp_path / "elsewhere/3.jpg", root / "cup/4.jpg")
    os.symlink(tmp_path / "nowhere.jpg", root / "cup/5.jpg")
    picture(root / "out/old.jpg")
    names = [record.name for record in list_records(root, leave_out=root / "out")]
    assert names == ["cup/1.jpg", "cup/4.jpg", "cup/5.jpg", "mug/3.jpg"]
    with pytest.raises(ValueError, match="is the input too; choose another output"):
        run(input=str(root), output=str(root), progress=False)


def test_photographs_in_other_formats_are_rejected_with_what_to_do(tmp_path):
    root, output = tmp_path / "in/cup", tmp_path / "out"
    picture(root / "real.heic", 1, format="JPEG")  # phones rename without converting
    Image.fromarray(draw(2)).convert("CMYK").save(root / "cmyk.jpg")
    picture(root / "old.bmp", 3)
    picture(root / "scan.TIF", 3, format="TIFF")
    picture(root / "moving.gif", 3)
    frames = [Image.fromarray(draw(number)) for number in (4, 5)]
    frames[0].save(root / "moving.webp", save_all=True, append_images=frames[1:], lossless=True)
    (root / "phone.HEIC").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(100))
    (root / "empty.jpg").write_bytes(b"")
    (root / "page.jpg").write_text("<html>404</html>")
    (root / "photos.zip").write_bytes(b"PK\3\4")
    name = os.fsencode(root) + b"/caf\xe9 \xe6\x97\xa5.png"  # Latin-1 of an old archive, half of it UTF-8
    with open(name, "wb") as file:
        file.write(encoded(6, "PNG"))

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    (root / "bomb.png").write_bytes(bomb)
    summary = run(input=str(root.parent), output=str(output), progress=False, workers=1, kind="backgrounds")
    details = {
        entry["source"].removeprefix("cup/"): entry["detail"]
        for entry in map(json.loads, (output / "rejected.jsonl").read_text("utf-8").splitlines())
    }
    assert (summary.num_photographs, summary.num_samples) == (12, 4)
    assert summary.rejected == {"unreadable": 8}
    for file, words in {
        "phone.HEIC": "a HEIC image, only JPEG, PNG, WEBP are read; convert it, e.g. by ImageMagick's `magick",
        "old.bmp": "a BMP image",
        "scan.TIF": "a TIFF or camera raw image",
        "moving.gif": "a GIF image",
        "empty.jpg": "the file is empty",
        "page.jpg": "not an image, or a damaged one",
        "photos.zip": "an archive; unpack it",
        "bomb.png": "far more pixels than the limit of 100000000",
    }.items():
        assert words in details[file], file
    assert not details.keys() & {"real.heic", "cmyk.jpg", "moving.webp", "caf\\xe9 日.png"}
    assert (output / "report.html").is_file()


def test_sixteen_bits_of_grey_are_scaled_and_not_clipped(tmp_path):
    grey = np.asarray(Image.fromarray(draw(1)).convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    assert np.array_equal(np.asarray(load_image(tmp_path / "16.png", mode="L")), grey)
    assert np.array_equal(np.asarray(load_image(tmp_path / "16.png"))[..., 0], grey)
