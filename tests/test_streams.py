"""Images that do not fit in memory: pixels and order for every kind of shards.

Also kills, ranks, broken images, held-out images and samples.
"""

import io
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import tarfile
import time
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from support import ROOT

from vqref.errors import InputError, MachineError
from vqref.host.archives import list_shards, read_shard
from vqref.host.images import ImageSet
from vqref.host.pictures import Reading
from vqtrain.__main__ import main
from vqtrain.data import decoding, streams
from vqtrain.data.holdout import hold_out
from vqtrain.data.order import windows
from vqtrain.data.sources import PLAIN, load_source
from vqtrain.data.stream_batches import StreamBatches
from vqtrain.data.streams import Streaming, StreamSet
from vqtrain.modelfile import read_model
from vqtrain.run.snapshot import list_states

COUNT, EACH = 240, 80
HERE = Streaming(workers=0)


def png(image) -> bytes:
    """Returns the bytes of a picture of an image (H, W)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, format="png")
    return buffer.getvalue()


def write_npy(folder, images):
    for i, part in enumerate(np.split(images, len(images) // EACH)):
        np.save(folder / f"part-{i}.npy", part)


def write_parquet(folder, images, *, struct=True):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    for i, part in enumerate(np.split(images, len(images) // EACH)):
        rows = [image if isinstance(image, bytes) else png(image) for image in part]
        column = [{"bytes": row, "path": None} for row in rows] if struct else rows
        table = pyarrow.table({"image": column, "label": [0] * len(rows)})
        parquet.write_table(table, folder / f"part-{i}.parquet", row_group_size=30)


def write_tar(folder, images, *, mode="w"):
    for i, part in enumerate(np.split(images, len(images) // EACH)):
        with tarfile.open(folder / f"part-{i}.tar", mode) as archive:
            for n, image in enumerate(part):
                for ending, content in (("png", png(image)), ("cls", b"7")):
                    info = tarfile.TarInfo(f"{i}{n:05}.{ending}")
                    info.size = len(content)
                    archive.addfile(info, io.BytesIO(content))


def write_gzipped(folder, images):
    write_tar(folder, images, mode="w:gz")
    for path in folder.glob("*.tar"):
        path.rename(path.with_suffix(".tar.gz"))


WRITERS = {
    "npy": write_npy,
    "parquet": write_parquet,
    "parquet of plain bytes": lambda *a: write_parquet(*a, struct=False),
    "tar": write_tar,
    "gzipped tar": write_gzipped,
}
KINDS = pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(streams, "PIECE", 16)


@pytest.fixture
def images(many_images):
    return many_images[:COUNT]


@pytest.fixture
def shards(tmp_path, images):
    """Writes the images as shards of a kind, and opens them with a split."""

    def made(write=write_npy, held_out=0.0, streaming=HERE, reading=PLAIN, of=images):
        folder = tmp_path / "shards"
        if not folder.exists():
            folder.mkdir()
            write(folder, of)
        return hold_out(load_source(str(folder), print, reading, streaming), held_out)

    return made


def passed(found: StreamSet, *, batch=7, part=None, skip=0, seed=0, device="cpu"):
    """Returns the batches of one pass, as levels from 0 to 255."""
    batches = StreamBatches(found, batch, torch.device(device), print, part)
    generator = torch.Generator().manual_seed(seed)
    return [(255 * x).round().byte().numpy() for x in batches.shuffled(generator, skip)]


def as_set(images) -> set[bytes]:
    return {image.tobytes() for image in images}


@KINDS
def test_a_pass_takes_every_image_once_as_it_is(shards, images, write):
    found = shards(write)
    assert found.count == COUNT
    (one,) = passed(found, batch=COUNT)
    assert one.shape == (COUNT, 1, 28, 28)
    assert as_set(one) == as_set(images)
    assert not np.array_equal(one[:, 0], images)


@KINDS
def test_workers_change_nothing(shards, write):
    here, beside = shards(write), shards(write, streaming=Streaming(workers=2))
    for a, b in zip(passed(here), passed(beside), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("skip", [1, 16, 33, 34])
def test_a_pass_goes_on_at_any_step(shards, skip):
    found = shards(streaming=Streaming(workers=0, buffer=50))
    whole = passed(found)
    assert len(whole) == COUNT // 7
    for a, b in zip(whole[skip:], passed(found, skip=skip), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("ranks", [2, 3, 8])
def test_ranks_take_the_slices_of_one_ranks_batches(shards, ranks):
    found = shards(streaming=Streaming(workers=0, buffer=50))
    parts = [
        passed(found, part=(7 * rank // ranks, 7 * (rank + 1) // ranks)) for rank in range(ranks)
    ]
    for joint, *slices in zip(passed(found), *parts, strict=True):
        np.testing.assert_array_equal(joint, np.concatenate(slices))


def test_a_rank_decodes_its_share_alone(shards, monkeypatch):
    found, counts = shards(), []
    decode = decoding.Decoder.decode

    def counting(self, piece):
        counts.append(len(piece.rows))
        return decode(self, piece)

    monkeypatch.setattr(decoding.Decoder, "decode", counting)
    passed(found, batch=8, part=(0, 2))
    assert sum(counts) == COUNT // 4


def test_epochs_have_orders_of_their_own_and_seeds_repeat_them(shards):
    found = shards()
    first, other = passed(found, seed=0), passed(found, seed=1)
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(first, passed(found, seed=0))
    generator = torch.Generator().manual_seed(0)
    batches = StreamBatches(found, 7, torch.device("cpu"), print)
    epochs = [torch.cat(list(batches.shuffled(generator))) for _ in range(2)]
    assert not torch.equal(*epochs)


def test_windows_take_every_image_once_and_mix_their_pieces():
    sizes = [5, 3, 8, 1, 9, 4]
    found = list(windows(sizes, 8, seed=3))
    taken = [(p, i) for w in found for p, i in zip(w.pieces, w.places, strict=True)]
    assert sorted(taken) == [(p, i) for p, size in enumerate(sizes) for i in range(size)]
    assert [w.start for w in found] == [0, *np.cumsum([len(w) for w in found])[:-1]]
    assert all(len(w) >= 8 for w in found[:-1])
    later = list(windows(sizes, 8, seed=3, first=found[1].start + 1))
    np.testing.assert_array_equal(later[0].places, found[1].places)
    assert any(np.diff(w.pieces).astype(bool).sum() > len(set(w.pieces)) for w in found)


@KINDS
def test_held_out_images_are_never_trained_on(shards, images, write):
    found = shards(write, held_out=0.2)
    assert found.held_out_as == {"images": COUNT - found.count, "fraction": 0.2}
    assert 0.1 < 1 - found.count / COUNT < 0.3
    (one,) = passed(found, batch=found.count)
    assert as_set(one) | as_set(found.held_out) == as_set(images)
    assert not as_set(one) & as_set(found.held_out)
    assert as_set(found.train) == as_set(one)


def test_a_set_that_grows_keeps_its_split(shards, tmp_path, images, many_images):
    before = shards(held_out=0.2)
    np.save(tmp_path / "shards" / "part-9.npy", many_images[COUNT : COUNT + 50])
    after = shards(held_out=0.2)
    assert as_set(before.held_out) < as_set(after.held_out)
    assert not as_set(before.train) & as_set(after.held_out)
    assert before.sha256 != after.sha256


def test_shards_named_as_datasets_names_them_bring_their_own_split(tmp_path, images):
    for name, part in (("train", images[:160]), ("test", images[160:200]), ("extra", images[:1])):
        np.save(tmp_path / f"{name}-00000-of-00001.npy", part)
    whole = hold_out(load_source(str(tmp_path), print, streaming=HERE), None)
    assert whole.held_out_as is not None  # one shard has no known split, so all are one set
    (tmp_path / "extra-00000-of-00001.npy").rename(tmp_path / "validation-0.npy")
    found = hold_out(load_source(str(tmp_path), print, streaming=HERE), None)
    assert (found.count, len(found.held_out)) == (160, 1)
    assert "left out: the shards of test" in found.said
    (tmp_path / "validation-0.npy").unlink()
    found = hold_out(load_source(str(tmp_path), print, streaming=HERE), None)
    assert as_set(found.held_out) == as_set(images[160:200])


def test_samples_are_bounded_and_the_same_every_time(shards, images, monkeypatch):
    monkeypatch.setattr(streams, "SAMPLED", 40)
    monkeypatch.setattr(streams, "SAMPLED_PIECES", 8)
    found, again = shards(), shards()
    assert len(found.train) == 40
    assert "40 of the 240 training images are kept as a sample" in found.said
    assert as_set(found.train) < as_set(images)
    np.testing.assert_array_equal(found.train, again.train)


def broken_tar(folder, images):
    """The images in a tar; two pictures are cut off, and one has another size."""
    with tarfile.open(folder / "a.tar", "w") as archive:
        for i, image in enumerate(images):
            content = png(image[:20] if i == 50 else image)
            info = tarfile.TarInfo(f"{i:03}.png")
            content = content[:60] if i in (7, 130) else content
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))


def test_a_broken_image_stops_the_run_with_its_name(shards):
    with pytest.raises(InputError, match=r"a.tar: (007|130|050).png: .*--max-broken N lets N"):
        shards(broken_tar)


def test_broken_images_are_counted_and_named_and_others_take_their_place(
    shards, capsys, monkeypatch
):
    with pytest.raises(InputError, match=r"3 broken images, more than --max-broken 2: a.tar"):
        shards(broken_tar, streaming=Streaming(workers=0, max_broken=2))
    found = shards(broken_tar, streaming=Streaming(workers=0, max_broken=3))
    named = [line for line in found.said if line.startswith("broken, left out (")]
    assert [line.split("(")[1][0] for line in named] == ["1", "2", "3"]
    assert "050.png: 20x28 pixels, others have 28x28; use --resize HxW" in " ".join(named)
    assert (found.count, len(found.train)) == (COUNT, COUNT - 3)
    (one,) = passed(found, batch=COUNT)
    assert as_set(one) == as_set(found.train)
    assert not capsys.readouterr().out  # nothing is said twice
    monkeypatch.setattr(streams, "SAMPLED", 1)
    found = shards(broken_tar, streaming=Streaming(workers=0, max_broken=3))
    passed(found)
    assert len(capsys.readouterr().out.splitlines()) + len(found.broken) == 3
    found = shards(broken_tar, streaming=Streaming(workers=0, max_broken=2))
    with pytest.raises(InputError, match="3 broken images, more than --max-broken 2"):
        passed(found)


def test_ranks_put_the_same_image_in_the_place_of_a_broken_one(shards):
    found = shards(broken_tar, streaming=Streaming(workers=0, max_broken=3))
    parts = [passed(found, part=part) for part in ((0, 3), (3, 7))]
    for joint, *slices in zip(passed(found), *parts, strict=True):
        np.testing.assert_array_equal(joint, np.concatenate(slices))


def test_a_shard_that_changed_or_is_damaged_ends_a_pass_in_one_line(shards, tmp_path, images):
    found = shards(write_npy, streaming=Streaming(workers=1))
    np.save(tmp_path / "shards" / "part-1.npy", images[:3])
    with pytest.raises(InputError, match=r"part-1.npy: holds 3 images, fewer than were listed"):
        passed(found)


def test_a_tar_is_cut_at_its_members_and_one_that_is_cut_off_is_refused(tmp_path, images):
    from vqref.host.archives import counted

    write_tar(tmp_path, images[:EACH])
    (shard,) = list_shards(tmp_path)
    parts = list(counted(shard, 16))
    assert [part.images for part in parts] == [16] * 5
    keys = [record.key for part in parts for record in read_shard(part)]
    assert keys == [record.key for record in read_shard(shard)]
    path, content = tmp_path / "part-0.tar", (tmp_path / "part-0.tar").read_bytes()
    header = parts[2].start
    for damaged, reason in (
        (content[: header + 20], f"cut off or damaged at byte {header}"),
        (content[: header + 600], "unexpected end of data"),
        (content[:header] + b"?" * 512 + content[header + 512 :], "cut off or damaged at byte"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(InputError, match=rf"part-0.tar: .*{reason}"):
            list(counted(shard, 16))


def test_pictures_are_brought_to_a_size_as_elsewhere(tmp_path, shards, many_images):
    from vqref.host.pictures import load_folder

    reading = Reading(size=(8, 12), crop=True)
    found = shards(write_tar, reading=reading)
    (tmp_path / "pictures").mkdir()
    for i, image in enumerate(many_images[:COUNT]):
        (tmp_path / "pictures" / f"{i}.png").write_bytes(png(image))
    expected = load_folder(tmp_path / "pictures", reading)
    assert as_set(found.train) == as_set(expected.train)
    assert found.preprocessing == expected.preprocessing


def test_one_picture_of_colour_makes_all_so(tmp_path, images):
    (tmp_path / "grey").mkdir()
    write_tar(tmp_path / "grey", images)
    grey = hold_out(load_source(str(tmp_path / "grey"), print, streaming=HERE), 0.0)
    assert grey.train.shape[1:] == (1, 28, 28)
    assert any("--channels 3 keeps colour" in line for line in grey.said)
    with tarfile.open(tmp_path / "grey" / "z.tar", "w") as archive:
        content = png(np.ascontiguousarray(images[:3].transpose(1, 2, 0)))
        info = tarfile.TarInfo("z.png")
        info.size = len(content)
        archive.addfile(info, io.BytesIO(content))
    both = hold_out(load_source(str(tmp_path / "grey"), print, streaming=HERE), 0.0)
    assert both.train.shape == (COUNT + 1, 3, 28, 28)
    assert "looked at: 240 grey spread to colour" in both.said


def test_options_of_shards_and_of_pictures_are_refused_elsewhere(tmp_path, shards, images):
    np.save(tmp_path / "few.npy", images[:4])
    with pytest.raises(InputError, match="--buffer is for shards"):
        load_source(str(tmp_path / "few.npy"), print, streaming=Streaming(buffer=3))
    with pytest.raises(InputError, match="--max-broken is for shards"):
        load_source("glyphs", print, streaming=Streaming(max_broken=3))
    with pytest.raises(InputError, match=r"--skip-bad is for a folder of pictures; for shards, us"):
        shards(reading=Reading(skip_bad=True))
    with pytest.raises(InputError, match=r"--resize is for pictures; .* holds arrays"):
        shards(reading=Reading(size=(8, 8)))


def test_a_large_npy_is_a_stream_and_a_small_one_is_not(tmp_path, images, monkeypatch):
    np.save(tmp_path / "a.npy", images)
    whole = load_source(str(tmp_path / "a.npy"), print)
    assert isinstance(whole, ImageSet)
    assert whole.train.shape == (COUNT, 1, 28, 28)
    monkeypatch.setattr(streams, "MAPPED", 2**10)
    found = hold_out(load_source(str(tmp_path / "a.npy"), print), 0.0)
    assert isinstance(found, StreamSet)
    assert as_set(found.train) == as_set(images)


def test_floating_arrays_stay_floating_and_wrong_ones_are_broken(tmp_path, images):
    values = images.astype(np.float64) / 255
    values[3, 0, 0] = np.nan
    np.save(tmp_path / "a.npy", values)
    np.save(tmp_path / "b.npy", images[:1])
    source = load_source(str(tmp_path), print, streaming=Streaming(workers=0, max_broken=2))
    found = hold_out(source, 0.0)
    assert isinstance(found, StreamSet)
    assert found.train.dtype == np.float32
    assert sorted(found.broken)[0].startswith("a.npy: 3: images: nan")
    assert sorted(found.broken)[1] == "b.npy: 0: its dtype is uint8, others have float32"


def test_a_decoding_process_that_is_killed_ends_the_pass_in_one_line(shards):
    found = shards(streaming=Streaming(workers=1, buffer=20))
    batches = StreamBatches(found, 7, torch.device("cpu"), print).shuffled(torch.Generator())
    next(batches)
    (child,) = multiprocessing.active_children()
    child.kill()
    with pytest.raises(MachineError, match="a process that decodes images ended"):
        list(batches)


def test_decoding_processes_end_with_a_training_process_that_is_killed(tmp_path, images):
    """This holds even if more is decoded than the pipe to the training process holds."""
    np.save(tmp_path / "a.npy", np.tile(images, (4, 2, 2)))
    code = """
import multiprocessing, time, torch
from vqtrain.data.holdout import hold_out
from vqtrain.data.sources import load_source
from vqtrain.data.stream_batches import StreamBatches
from vqtrain.data.streams import Streaming

if __name__ == "__main__":
    found = hold_out(load_source(".", print, streaming=Streaming(workers=2)), 0.0)
    batches = StreamBatches(found, 7, torch.device("cpu"), print).shuffled(torch.Generator())
    next(batches)
    print(*(child.pid for child in multiprocessing.active_children()), flush=True)
    time.sleep(1000)
"""
    (tmp_path / "code.py").write_text(code)
    process = subprocess.Popen(
        [sys.executable, "code.py"], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    workers = [int(each) for each in process.stdout.readline().split()]
    process.kill()
    process.communicate()
    assert len(workers) == 2
    end = time.monotonic() + 60
    while any(is_alive(each) for each in workers):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


RUN = (
    *("-m", "vqtrain", "--data", "shards", "--epochs", "2", "--batch-size", "16", "--name", "r"),
    *("--base-depth", "2", "--num-codes", "8", "--snapshot-steps", "2", "--buffer", "40"),
    *("--workers", "2", "--max-broken", "3"),
)


def same(one, other) -> bool:
    a, b = (read_model(path).params for path in (one, other))
    return all(np.array_equal(a[name], b[name]) for name in a)


def test_a_run_on_shards_that_is_killed_again_and_again_ends_as_if_it_had_not_been(
    tmp_path, images, run
):
    for name in ("whole", "killed"):
        (tmp_path / name / "shards").mkdir(parents=True)
        broken_tar(tmp_path / name / "shards", images)
    done = run(*RUN, cwd=tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "are held out (a tenth, by hash)" in done.stdout
    assert "broken, left out (3 of at most 3): a.tar: " in done.stdout
    place, kills = tmp_path / "killed", 0
    snapshots = place / "runs" / "r" / "snapshots"
    while kills < 2:
        before = list_states(snapshots)[:1]
        process = subprocess.Popen(
            [sys.executable, *RUN],
            cwd=place,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.DEVNULL,
        )
        while process.poll() is None and list_states(snapshots)[:1] == before:
            time.sleep(0.01)
        if process.poll() is not None:
            break
        process.kill()
        process.wait()
        kills += 1
    assert kills == 2
    done = run(*RUN, cwd=place)
    assert done.returncode == 0, done.stderr
    assert same(tmp_path / "whole" / "model.pt", place / "model.pt")


def test_a_signal_to_the_whole_group_saves_the_run_in_one_line(
    tmp_path, images, monkeypatch, capsys
):
    (tmp_path / "shards").mkdir()
    write_npy(tmp_path / "shards", images)
    words = [sys.executable, *RUN, "--epochs", "10000"]
    process = subprocess.Popen(
        *(words,),
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    while not list_states(tmp_path / "runs" / "r" / "snapshots"):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(said.splitlines()) == 1, said
    assert "and saved; the same command goes on" in said
    monkeypatch.chdir(tmp_path)
    assert main([*words[3:], "--buffer", "41"]) == 2
    assert "was begun with buffer 40, not 41" in capsys.readouterr().err


def test_evaluate_measures_what_training_held_out_and_prior_refuses_shards(
    tmp_path, images, monkeypatch, capsys
):
    (tmp_path / "shards").mkdir()
    write_parquet(tmp_path / "shards", images)
    monkeypatch.chdir(tmp_path)
    assert main(RUN[2:]) == 0
    capsys.readouterr()
    words = ("model.pt", "--data", "shards", "--workers", "0", "--held-out")
    assert main(["evaluate", *words[:-1], "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["which"] == "held-out images"
    line = json.loads((tmp_path / "runs/r/metrics.jsonl").read_text().splitlines()[-1])
    assert found["bound"] == pytest.approx(line["held_out"]["bound"], rel=1e-6)
    for wanted, said in (
        ("0", "240 images of shards (a sample of 240)"),
        ("0.1", "held-out images of shards (a tenth, by hash)"),
        ("0.2", " images of shards (0.2, by hash)"),
    ):
        assert main(["evaluate", *words, wanted]) == 0
        assert said in capsys.readouterr().out
    assert main(["prior", "model.pt", "--data", "shards"]) == 3
    assert "a prior needs images that fit in memory" in capsys.readouterr().err


def test_the_same_images_in_memory_and_in_shards_train_alike(tmp_path, images):
    """With one buffer and one epoch, the orders differ, but both learn nearly the same."""
    import vqtrain

    (tmp_path / "shards").mkdir()
    write_npy(tmp_path / "shards", images)
    source = load_source(str(tmp_path / "shards"), print, streaming=HERE)
    options: dict[str, Any] = {"epochs": 3, "batch_size": 16, "base_depth": 2, "num_codes": 8}
    options["recipe"] = "post"
    models = [
        vqtrain.train(hold_out(source, 0.0), **options),
        vqtrain.train(images, held_out=0, **options),
    ]
    bounds = [model.metrics["training_sample"]["bound"] for model in models]
    assert bounds[0] == pytest.approx(bounds[1], rel=0.05)
    assert models[0].provenance["data"]["images"] == COUNT


def test_a_split_that_was_chosen_is_not_chosen_again(shards):
    found = shards(held_out=0.2)
    assert hold_out(found, None) is found
    with pytest.raises(InputError, match="chosen already"):
        hold_out(found, 0.3)


def test_others_are_held_out_of_shards_and_shards_of_others(tmp_path, images, shards):
    np.save(tmp_path / "others.npy", images[:9])
    found = shards(held_out=tmp_path / "others.npy")
    assert (found.count, len(found.held_out)) == (COUNT, 9)
    assert found.held_out_as["source"] == "others.npy"
    few = load_source(str(tmp_path / "others.npy"), print)
    found = hold_out(few, tmp_path / "shards")
    assert as_set(found.held_out) == as_set(images)
    assert found.held_out_as["source"] == "shards"


def test_ranks_on_shards_learn_what_one_rank_learns(tmp_path, images, run):
    """In float32, only the order of their sums differs."""
    (tmp_path / "shards").mkdir()
    broken_tar(tmp_path / "shards", images)
    words = (*RUN[1:], "--epochs", "1", "--recipe", "post", "--threads", "1")
    ranks = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m")
    done = run("-m", *words, "--output", "one.pt")
    assert done.returncode == 0, done.stderr
    more = ("--name", "two", "--output", "two.pt")
    done = run(*ranks, *words, *more, PYTHONPATH=str(ROOT), OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    assert "2 ranks" in done.stdout
    named = [line.split(": ", 1)[1] for line in done.stdout.splitlines() if "left out" in line]
    assert len(named) == len(set(named)) == 3  # whichever rank found them
    one, two = (read_model(tmp_path / f"{name}.pt").params for name in ("one", "two"))
    for name, array in one.items():
        np.testing.assert_allclose(two[name], array, rtol=1e-4, atol=1e-4, err_msg=name)


def test_ranks_add_up_their_broken_images(shards, images):
    """Each has found one of two broken images, and one is allowed."""

    def batches(most, *known):
        found = shards(streaming=Streaming(workers=0, max_broken=most))
        made = StreamBatches(found, 8, torch.device("cpu"), said.append)
        made.broken.known.update(known)
        return made

    said: list[str] = []
    batches(2, "a: why").join(lambda mine: [*mine, "b: why"])
    assert said == ["broken, left out (2 of at most 2): b: why"]
    with pytest.raises(InputError, match="2 broken images, more than --max-broken 1: b: why"):
        batches(1, "a: why").join(lambda mine: [*mine, "b: why"])


@pytest.mark.parametrize("name", ["a.tar", "a.parquet", "a.npy", f"{'a' * 300}.npy", "none.tar"])
def test_what_is_no_file_is_refused_at_once(tmp_path, name, monkeypatch, capsys):
    if len(name) < 10 and name != "none.tar":
        os.mkfifo(tmp_path / name)
    monkeypatch.chdir(tmp_path)
    assert main(["--data", name]) == 3
    (line,) = capsys.readouterr().err.splitlines()
    assert name[:200] in line
