"""Folders of tokens: the same bytes whoever writes them, and however often they are killed.

Folders of something else are refused.
"""

import json
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pyarrow.parquet as pq
import pytest
from support import add_to_tar, png

from vqdeploy import Codec
from vqdeploy.archives import (
    Job,
    Outcome,
    PartEncoder,
    Progress,
    duration,
    encode_archive,
    parts_of,
    read_archive,
)
from vqdeploy.cluster import CodecActor, PartActor, _pool
from vqdeploy.sealed import sealed, unsealed
from vqref.errors import InputError, MachineError
from vqref.host.archives import Shard, list_shards

IMAGES = 60


@pytest.fixture(scope="module")
def colours(colour_images):
    return colour_images[:IMAGES]


@pytest.fixture(scope="module")
def tar(colours, tmp_path_factory):
    """The images in a tar of PNGs."""
    path = tmp_path_factory.mktemp("source") / "images.tar"
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(colours):
            add_to_tar(archive, f"{number:03}.png", png(image))
    return path


@pytest.fixture(scope="module")
def array(colours, tmp_path_factory):
    """The images in an .npy file."""
    path = tmp_path_factory.mktemp("source") / "images.npy"
    np.save(path, colours)
    return path


@pytest.fixture(scope="module")
def codec(residual_bundle):
    return Codec.load(residual_bundle, "cpu")


@pytest.fixture(scope="module")
def undisturbed(residual_bundle, array, tmp_path_factory):
    """What an undisturbed job of 30 parts writes: {name: bytes}."""
    output = tmp_path_factory.mktemp("undisturbed") / "tokens"
    encode(residual_bundle, array, output)
    return content(output)


def job_of(bundle, output, **changes):
    return Job(bundle, Codec.load(bundle, "cpu").manifest_sha256, output, "cpu", **changes)


def encode(bundle, source, output, images=2, **changes):
    job = job_of(bundle, output, **changes)
    shards = list_shards(source, images=images)
    return encode_archive(job, Codec.load(bundle, "cpu").spec, source.name, shards, say=print)


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def command(bundle, source, output, *more):
    return [sys.executable, "-m", "vqdeploy", "encode", *map(str, (bundle, source)), "--output",
            str(output), "--device", "cpu", "--shard-images", "2", *more]  # fmt: skip


def test_tokens_are_those_of_a_codec_and_carry_the_names_of_the_images(
    residual_bundle, tar, codec, colours, tmp_path
):
    encode(residual_bundle, tar, tmp_path / "tokens")
    found = read_archive(tmp_path / "tokens")
    np.testing.assert_array_equal(found.indices, codec.encode(colours))
    assert found.names == tuple(f"{number:03}.png" for number in range(IMAGES))
    assert found.require(codec) is None
    table = pq.read_table(tmp_path / "tokens" / "tokens-00000-of-00001.parquet")
    assert table.column_names == ["key", "indices"]
    manifest = json.loads((tmp_path / "tokens" / "manifest.json").read_text())
    assert (manifest["images"], manifest["broken"], manifest["complete"]) == (IMAGES, 0, True)


def test_parts_are_cut_as_asked_and_say_the_same(undisturbed, codec, colours, tmp_path):
    assert len(undisturbed) == 1 + IMAGES // 2
    for name, data in undisturbed.items():
        (tmp_path / name).write_bytes(data)
    np.testing.assert_array_equal(read_archive(tmp_path).indices, codec.encode(colours))


def test_threads_do_not_change_a_byte(residual_bundle, array, undisturbed, tmp_path):
    encode(residual_bundle, array, tmp_path / "tokens", threads=1)
    assert content(tmp_path / "tokens") == undisturbed


@pytest.mark.parametrize("parts", [0, 1, 9, 29])
def test_a_killed_job_goes_on_and_ends_with_the_same_bytes(
    residual_bundle, array, undisturbed, tmp_path, parts
):
    output = tmp_path / "tokens"
    words = command(residual_bundle, array, output)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL)
    wait_for(lambda: sum(1 for _ in output.glob("*.parquet")) >= parts and output.exists(), process)
    process.kill()
    process.wait()
    subprocess.run(words, check=True, capture_output=True)
    assert content(output) == undisturbed


def wait_for(happened, process, seconds=120):
    end = time.monotonic() + seconds
    while not happened() and process.poll() is None:
        assert time.monotonic() < end
        time.sleep(0.002)


def test_a_part_is_whole_or_not_there_wherever_a_write_fails(
    residual_bundle, array, undisturbed, tmp_path, monkeypatch
):
    def full(path, data):
        path.with_name(f".{path.name}.0123abcd").write_bytes(data[: len(data) // 2])
        raise OSError(28, "No space left on device")

    encoder = PartEncoder(job_of(residual_bundle, tmp_path))
    part = parts_of(list_shards(array, images=2))[3]
    monkeypatch.setattr("vqdeploy.archives.write_file", full)
    with pytest.raises(OSError, match="No space"):
        encoder(part)
    monkeypatch.undo()
    assert not (tmp_path / part.file).exists()
    encoder(part)
    assert content(tmp_path) == {part.file: undisturbed[part.file]}  # the half file is removed


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_job_that_goes_on_later(
    residual_bundle, array, undisturbed, tmp_path, number
):
    output = tmp_path / "tokens"
    words = command(residual_bundle, array, output)
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    wait_for(lambda: len(list(output.glob("*.parquet"))) > 2, process)
    process.send_signal(number)
    said = process.communicate()[1]
    if process.returncode:  # else it was done before the kill
        assert (process.returncode, said) == (128 + number, "vqdeploy: interrupted\n")
    subprocess.run(words, check=True, capture_output=True)
    assert content(output) == undisturbed


def test_what_is_done_is_not_done_again(residual_bundle, array, tmp_path):
    encode(residual_bundle, array, tmp_path / "tokens")
    removed = tmp_path / "tokens" / "tokens-00007-of-00030.parquet"
    removed.unlink()
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tokens").glob("*.parquet")}
    progress = encode(residual_bundle, array, tmp_path / "tokens")
    assert {path: path.stat().st_mtime_ns for path in before} == before
    assert [name for name, each in progress.outcomes.items() if not each.kept] == [removed.name]
    assert progress.summary().startswith(f"{IMAGES} images, {IMAGES - 2} of them before; 2 images")


def test_tokens_of_another_bundle_are_refused(bundle, residual_bundle, array, tmp_path):
    encode(residual_bundle, array, tmp_path / "tokens")
    other = job_of(bundle, tmp_path / "tokens")
    shards = list_shards(array, images=2)
    with pytest.raises(InputError, match=r"manifest.json: tokens of another bundle; name a new"):
        encode_archive(other, Codec.load(bundle, "cpu").spec, array.name, shards)
    with pytest.raises(InputError, match=r"00000-of-00030.parquet: tokens of bundle .*…, this one"):
        PartEncoder(other)(parts_of(shards)[0])


def test_tokens_of_another_source_are_refused(residual_bundle, array, tar, tmp_path):
    encode(residual_bundle, array, tmp_path / "tokens")
    with pytest.raises(InputError, match="another source, or other shards; name a new folder"):
        encode(residual_bundle, array, tmp_path / "tokens", images=3)
    with pytest.raises(InputError, match="another source, or other shards; name a new folder"):
        encode(residual_bundle, tar, tmp_path / "tokens")
    encoder = PartEncoder(job_of(residual_bundle, tmp_path / "tokens"))
    first, second = parts_of(list_shards(array, images=2))[:2]
    first_path, second_path = (tmp_path / "tokens" / part.file for part in (first, second))
    second_path.replace(first_path)
    with pytest.raises(InputError, match=r"00000-of-00030.parquet: tokens of another source"):
        encoder(first)


def test_a_folder_of_other_things_is_refused(residual_bundle, array, tmp_path):
    (tmp_path / "note.txt").write_text("mine")
    with pytest.raises(InputError, match="holds other files; name a new folder"):
        encode(residual_bundle, array, tmp_path)
    assert content(tmp_path) == {"note.txt": b"mine"}


@pytest.mark.parametrize("at", range(30, 1400, 137))
def test_a_damaged_part_is_named_by_whoever_reads_it(residual_bundle, array, tmp_path, at):
    encode(residual_bundle, array, tmp_path / "tokens", images=30)
    path = tmp_path / "tokens" / "tokens-00001-of-00002.parquet"
    data = bytearray(path.read_bytes())
    assert at < len(data)
    data[at] ^= 4
    path.write_bytes(data)
    with pytest.raises(InputError, match=f"{path.name}: damaged"):
        read_archive(tmp_path / "tokens")


def test_a_job_that_is_not_complete_is_not_decoded(residual_bundle, array, tmp_path):
    encode(residual_bundle, array, tmp_path / "tokens")
    path = tmp_path / "tokens" / "manifest.json"
    said = unsealed(path.read_bytes())
    path.write_bytes(sealed({**said, "complete": False}))
    with pytest.raises(InputError, match="the job is not complete"):
        read_archive(tmp_path / "tokens")
    path.write_bytes(sealed({**said, "format_version": 2}))
    with pytest.raises(InputError, match="its format version is 2"):
        read_archive(tmp_path / "tokens")
    first, *others = said["parts"]
    path.write_bytes(sealed({**said, "parts": [{**first, "file": "../a.parquet"}, *others]}))
    with pytest.raises(InputError, match="names files that are not parts"):
        read_archive(tmp_path / "tokens")
    path.write_bytes(path.read_bytes().replace(b"true", b"True"))
    with pytest.raises(InputError, match="not the manifest of a folder of tokens"):
        read_archive(tmp_path / "tokens")


@pytest.fixture
def mixed(colours, tmp_path):
    """A tar of four good images and two broken ones."""
    path = tmp_path / "mixed.tar"
    with tarfile.open(path, "w") as archive:
        for number, image in enumerate(colours[:6]):
            add_to_tar(archive, f"{number}.png", png(image)[: 30 if number in (1, 4) else None])
    return path


def test_broken_images_are_left_out_and_named_up_to_max_broken(
    residual_bundle, mixed, codec, colours, tmp_path, capsys
):
    for _ in range(2):  # the second run reads what the first wrote
        progress = encode(residual_bundle, mixed, tmp_path / "tokens", most_broken=2)
        assert progress.summary().startswith("4 images")
        assert "2 left out" in progress.summary()
        said = capsys.readouterr().out
        assert said.count("left out: mixed.tar: ") == 2
        assert "mixed.tar: 4.png: not a readable image" in said
    found = read_archive(tmp_path / "tokens")
    assert found.names == ("0.png", "2.png", "3.png", "5.png")
    np.testing.assert_array_equal(found.indices, codec.encode(colours[[0, 2, 3, 5]]))


def test_one_broken_image_more_stops_the_job_with_its_name(residual_bundle, mixed, tmp_path):
    with pytest.raises(InputError, match=r"^1 broken image, .* is 0: mixed.tar: 1.png: not a"):
        encode(residual_bundle, mixed, tmp_path / "a")
    with pytest.raises(InputError, match=r"^2 broken images, .* is 1: .*1.png.*4.png"):
        encode(residual_bundle, mixed, tmp_path / "b", most_broken=1)
    assert not list(tmp_path.glob("?/*.parquet"))


def test_broken_images_of_all_parts_are_counted_together(residual_bundle, mixed, tmp_path):
    (tmp_path / "two").mkdir()
    for name in "ab":
        (tmp_path / "two" / f"{name}.tar").write_bytes(mixed.read_bytes())
    with pytest.raises(InputError, match=r"^4 broken images, and --max-broken is 3"):
        encode(residual_bundle, tmp_path / "two", tmp_path / "tokens", most_broken=3)


def test_images_of_another_size_are_no_tokens(residual_bundle, tmp_path):
    np.save(tmp_path / "a.npy", np.zeros((3, 3, 8, 8), np.uint8))
    with pytest.raises(InputError, match=r"a.npy: 0: images: shape is \(3, 8, 8\), expected"):
        encode(residual_bundle, tmp_path / "a.npy", tmp_path / "tokens")


# Progress


def test_progress_says_speed_and_time_left_of_what_is_encoded_now():
    now = [0.0]
    parts = parts_of([Shard("npy", "a", None, images=100)] * 4)
    progress = Progress(4, 400, lambda: now[0])
    first, second, third = (Outcome(part, 100, 0, (), "", part is parts[0]) for part in parts[:3])
    now[0] = 1
    assert progress.add(first) is None  # too soon to say anything
    now[0] = 50  # most of it was the start of workers
    assert progress.add(second) == "2 of 4 shards, 100 images encoded, 2 images/s"
    now[0] = 60
    said = progress.add(third)
    assert said == "3 of 4 shards, 200 images encoded, 3 images/s, 10 s left"


def test_durations_are_said_in_two_units():
    assert [duration(s) for s in (3.6, 61, 7500)] == ["4 s", "1 min 01 s", "2 h 05 min"]


# Ray


def test_ray_writes_the_same_bytes_killed_or_not(residual_bundle, array, undisturbed, tmp_path):
    output = tmp_path / "tokens"
    words = command(residual_bundle, array, output, "--engine", "ray", "--workers", "1")
    process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    wait_for(lambda: len(list(output.glob("*.parquet"))) > 5, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    done = subprocess.run(words, check=True, capture_output=True, text=True)
    assert done.stderr == ""
    assert content(output) == undisturbed


def test_ray_says_in_one_line_what_a_worker_cannot_read(residual_bundle, mixed, tmp_path, refused):
    words = command(residual_bundle, mixed, "tokens", "--engine", "ray", "--workers", "1")
    assert "1 broken image, and --max-broken is 0: mixed.tar: 1.png" in refused(3, *words[1:])


def test_a_cluster_that_is_not_there_is_said_at_once(residual_bundle, mixed, refused):
    words = command(residual_bundle, mixed, "tokens", "--engine", "ray", "--address", "127.0.0.1:1")
    assert "no cluster at 127.0.0.1:1" in refused(5, *words[1:])


def test_workers_fit_the_cores_and_share_the_cards(tmp_path):
    job = Job(tmp_path, "", tmp_path)
    eight = {"CPU": 8.0}
    assert _pool(job, eight, None) == (8, 1, 0, "cpu")
    assert _pool(job, {**eight, "GPU": 1.0}, None) == (4, 1, 1 / 4, "cuda")
    assert _pool(job, {**eight, "GPU": 2.0}, 3) == (3, 1, 1 / 2, "cuda")
    assert _pool(Job(tmp_path, "", tmp_path, "cpu", 4), {**eight, "GPU": 1.0}, None) == (
        *(2, 4, 0, "cpu"),
    )
    with pytest.raises(MachineError, match="9 workers of 1 cores each need more than the 8 cores"):
        _pool(job, eight, 9)
    with pytest.raises(MachineError, match="no machine of the cluster has a GPU"):
        _pool(Job(tmp_path, "", tmp_path, "cuda"), eight, None)


def test_an_actor_of_a_pipeline_adds_the_indices(residual_bundle, codec, colours):
    actor = CodecActor(residual_bundle, device="cpu")
    expected = codec.encode(colours[:3])
    pictures = np.array([png(image) for image in colours[:3]], dtype=object)
    rows = np.array([{"bytes": each, "path": None} for each in pictures], dtype=object)
    for images in (colours[:3], colours[:3].transpose(0, 2, 3, 1), pictures, rows):
        found = actor({"image": images, "label": np.arange(3)})
        np.testing.assert_array_equal(found["indices"], expected)
        np.testing.assert_array_equal(found["label"], np.arange(3))


def test_an_actor_names_the_row_that_it_cannot_read(residual_bundle, colours):
    actor = CodecActor(residual_bundle, device="cpu")
    rows = np.array([png(colours[0]), b"nothing"], dtype=object)
    with pytest.raises(InputError, match="row 1 of the batch: not a readable image"):
        actor({"image": rows})


def test_a_worker_without_its_bundle_says_so_for_every_part(tmp_path):
    actor = PartActor(Job(tmp_path / "nowhere", "0" * 64, tmp_path))
    (answer,) = actor({"part": np.array([b""], object)})["outcome"]
    assert isinstance(pickle.loads(answer), InputError)


# The command


def test_a_folder_of_tokens_is_decoded_as_a_file_is(run, residual_bundle, array, codec, tmp_path):
    words = command(residual_bundle, array, "tokens")[1:]
    done = run(*words)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith(f"{array}: {IMAGES} images in 30 shards\n{IMAGES} images; ")
    assert done.stdout.endswith("; wrote tokens\n")
    done = run("-m", "vqdeploy", "decode", residual_bundle, "tokens", "--output", "i.npz")
    assert (done.returncode, done.stderr) == (0, "")
    found = np.load(tmp_path / "i.npz")["reconstructions"]
    np.testing.assert_array_equal(found, codec.reconstruct(np.load(array)))


def test_options_of_files_and_of_folders_do_not_mix(refused, residual_bundle, array):
    encode_words = ("-m", "vqdeploy", "encode", residual_bundle, array, "--output")
    for option in (["--limit", 3], ["--skip-bad"], ["--part", "all"], ["--prove", "float32"]):
        assert f"{option[0]} is for a file" in refused(2, *encode_words, "tokens", *option)
    for option in (["--engine", "ray"], ["--max-broken", 1], ["--shard-images", 5]):
        assert f"{option[0]} is for a folder" in refused(2, *encode_words, "t.npz", *option)
    for option in (["--workers", 1], ["--address", "auto"]):
        assert f"{option[0]} is for --engine ray" in refused(2, *encode_words, "tokens", *option)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_said(residual_bundle, array, tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(MachineError, match="cannot be written"):
        encode(residual_bundle, array, tmp_path / "tokens")
