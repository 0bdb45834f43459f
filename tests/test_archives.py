"""Sources that need not fit in memory: every form gives the same images, and names broken ones."""

import dataclasses
import tarfile

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from support import add_to_tar, png

from vqref.errors import InputError
from vqref.host.archives import list_shards, read_shard, to_image
from vqref.host.pictures import Reading
from vqref.preprocessing import Preprocessing

SHAPE = (3, 8, 8)
READING = Reading.of(Preprocessing(3), SHAPE)
IMAGES = np.random.default_rng(0).integers(0, 256, (11, *SHAPE), np.uint8)


PNGS = [png(image) for image in IMAGES]


def folder(path):
    (path / "sub").mkdir(parents=True)
    for number, content in enumerate(PNGS):
        (path / ("sub" if number > 5 else ".") / f"{number:02}.png").write_bytes(content)


def npy(path):
    path.mkdir()
    np.save(path / "a.npy", IMAGES[:7])
    np.save(path / "b.npy", IMAGES[7:].transpose(0, 2, 3, 1))


def parquet_of_dicts(path):
    path.mkdir()
    for name, part in (("train-00000-of-00002", PNGS[:7]), ("train-00001-of-00002", PNGS[7:])):
        rows = [{"bytes": content, "path": f"{i}.png"} for i, content in enumerate(part)]
        table = pa.table({"label": list(range(len(part))), "image": rows})
        pq.write_table(table, path / f"{name}.parquet", row_group_size=2)


def parquet_of_bytes(path):
    path.mkdir()
    pq.write_table(pa.table({"image": PNGS}), path / "all.parquet", row_group_size=3)


def tars(path, kind="tar", mode="w"):
    path.mkdir()
    for name, numbers in (("000000", range(7)), ("000001", range(7, 11))):
        with tarfile.open(path / f"{name}.{kind}", mode) as archive:
            for number in numbers:
                add_to_tar(archive, f"{number:05}.png", PNGS[number])
                add_to_tar(archive, f"{number:05}.json", b"{}")


def packed_tars(path):
    tars(path, "tar.gz", "w:gz")


SOURCES = (folder, npy, parquet_of_dicts, parquet_of_bytes, tars, packed_tars)


def records(source, **how):
    return [r for s in list_shards(source, recursive=True, **how) for r in read_shard(s)]


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("images", [1, 4, 100])
def test_every_form_gives_the_same_images_however_it_is_cut(tmp_path, source, images):
    source(tmp_path / "data")
    found = [to_image(r, SHAPE, READING) for r in records(tmp_path / "data", images=images)]
    np.testing.assert_array_equal(np.stack(found), IMAGES)


@pytest.mark.parametrize("source", SOURCES)
def test_a_shard_tells_how_many_images_it_has_unless_it_is_a_tar(tmp_path, source):
    source(tmp_path / "data")
    shards = list_shards(tmp_path / "data", recursive=True, images=3)
    for shard in shards:
        count = None if shard.form == "tar" else len(list(read_shard(shard)))
        assert shard.images == count
        assert shard.weight == (shard.bytes if count is None else count) > 0
    assert len(shards) > 1


def test_an_npy_is_mapped_not_read(tmp_path):
    holes = np.lib.format.open_memmap(
        tmp_path / "huge.npy", mode="w+", dtype=np.uint8, shape=(2**31, *SHAPE)
    )  # 400 GB of zeros
    holes[2**31 - 1] = IMAGES[0]
    del holes
    last = list_shards(tmp_path / "huge.npy", images=2**20)[-1]
    (record,) = read_shard(dataclasses.replace(last, start=last.stop - 1))
    np.testing.assert_array_equal(to_image(record, SHAPE, READING), IMAGES[0])


def test_broken_images_are_named_and_the_others_read(tmp_path):
    rows = [
        {"bytes": PNGS[0], "path": "good.png"},
        {"bytes": PNGS[1][:40], "path": "cut.png"},
        {"bytes": None, "path": "/etc/hostname"},
    ]
    pq.write_table(pa.table({"image": rows}), tmp_path / "a.parquet")
    good, cut, gone = records(tmp_path / "a.parquet")
    assert (good.key, cut.key) == ("good.png", "cut.png")
    np.testing.assert_array_equal(to_image(good, SHAPE, READING), IMAGES[0])
    with pytest.raises(InputError, match="not a readable image"):
        to_image(cut, SHAPE, READING)
    assert gone.content is None  # a path inside a file from outside is never opened
    with pytest.raises(InputError, match="holds no bytes"):
        to_image(gone, SHAPE, READING)


def test_a_picture_of_another_size_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(png(np.zeros((3, 9, 8), np.uint8)))
    (record,) = records(tmp_path)
    with pytest.raises(InputError, match="9x8 pixels"):
        to_image(record, SHAPE, READING)


def test_a_picture_that_cannot_be_opened_is_a_broken_record(tmp_path):
    (tmp_path / "a.png").write_bytes(PNGS[0])
    (tmp_path / "b.png").symlink_to("nowhere.png")
    good, lost = records(tmp_path)
    assert (good.broken, lost.content) == ("", None)
    assert "No such file" in lost.broken


@pytest.mark.parametrize(
    ("name", "source"), [("000000.tar", tars), ("all.parquet", parquet_of_bytes), ("a.npy", npy)]
)
@pytest.mark.parametrize("kept", [0, 5, 0.5])
def test_a_damaged_shard_is_named(tmp_path, name, source, kept):
    source(tmp_path / "data")
    path = tmp_path / "data" / name
    content = path.read_bytes()
    path.write_bytes(content[: kept if isinstance(kept, int) else int(kept * len(content))])
    with pytest.raises(InputError, match=name):
        records(tmp_path / "data")


@pytest.mark.parametrize("header", [b"\0" * 512, b"x" * 512])
def test_a_tar_with_a_damaged_header_in_its_middle_loses_no_image_silently(tmp_path, header):
    tars(tmp_path / "data")
    path = tmp_path / "data" / "000000.tar"
    with tarfile.open(path) as archive:
        place = archive.getmembers()[2].offset
    content = path.read_bytes()
    path.write_bytes(content[:place] + header + content[place + 512 :])
    with pytest.raises(InputError, match=r"000000\.tar: .*damaged"):
        records(tmp_path / "data")


def test_a_folder_of_several_forms_is_refused(tmp_path):
    np.save(tmp_path / "a.npy", IMAGES)
    pq.write_table(pa.table({"image": PNGS}), tmp_path / "b.parquet")
    with pytest.raises(InputError, match="several forms, npy, parquet"):
        list_shards(tmp_path)


def test_a_parquet_file_without_images_is_refused_with_its_columns(tmp_path):
    pq.write_table(pa.table({"text": ["a"], "label": [1]}), tmp_path / "a.parquet")
    with pytest.raises(InputError, match="its columns are text, label; expected 'image'"):
        list_shards(tmp_path)


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(InputError, match="no pictures and no archives"):
        list_shards(tmp_path)
