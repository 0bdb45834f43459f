"""Files from outside, whatever they are: read, or refused at once with one line.

Memory stays bounded.
"""

import contextlib
import gzip
import io
import os
import struct
import threading
import tracemalloc
import warnings
import zipfile
import zlib
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support import SPEC, trainer

from benchmarks.hostile.readers import READERS, campaign
from vqdeploy.bundle import Bundle
from vqdeploy.sources import read_source
from vqdeploy.tokens import read_images, read_tokens
from vqref import families
from vqref.errors import InputError, UsageError
from vqref.host.files import parsed, read_bytes
from vqref.host.images import load, read_npz
from vqref.host.pictures import Reading, load_any, prepare
from vqref.host.streams import plain
from vqref.preprocessing import Preprocessing
from vqtrain.run.fitting import require_fitting
from vqtrain.run.folder import latest_state, open_run, read_options
from vqtrain.run.snapshot import course_of, list_states, load_state, save_state

QUICK = 150
"""Inputs per reader; ``python -m benchmarks.hostile.readers`` tries more."""


@pytest.mark.parametrize("name", READERS)
def test_damaged_files_are_read_or_refused_with_one_line(name):
    (found,) = campaign(QUICK, names=[name]).values()
    assert found.past == []
    assert found.inputs == QUICK
    assert found.refused > QUICK // 5


def manifest(path):
    return Bundle.open(path.parent)


SURFACES = {
    "images.npy": load,
    "images.npz": load,
    "any": load_any,
    "tokens.npz": read_tokens,
    "tokens.parquet": read_tokens,
    "parameters.npz": read_source,
    "parameters.safetensors": read_source,
    "model.pt": read_source,
    "options.toml": read_options,
    "step-1.state": load_state,
    "manifest.json": manifest,
}
"""Returns what reads a file of this name."""


def fits(spec):
    """The check that ``open_run`` makes of a snapshot."""
    return partial(require_fitting, spec=spec, optimizer="adam")


def promptly(read, path):
    """Returns what ``read`` raises within a minute; it would wait for a FIFO's other end."""
    raised = []

    def work():
        try:
            read(path)
        except InputError as error:
            raised.append(str(error))

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return raised


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs a system with FIFOs")
@pytest.mark.parametrize("name", SURFACES)
def test_a_fifo_is_refused_at_once(tmp_path, name):
    os.mkfifo(tmp_path / name)
    (line,) = promptly(SURFACES[name], tmp_path / name)
    assert f"{name}: is a FIFO, not a regular file" in line


@pytest.mark.skipif(not Path("/dev/zero").exists(), reason="needs a system with /dev/zero")
@pytest.mark.parametrize("name", SURFACES)
def test_an_endless_device_is_refused_at_once(tmp_path, name):
    (tmp_path / name).symlink_to("/dev/zero")
    (line,) = promptly(SURFACES[name], tmp_path / name)
    assert f"{name}: is a device, not a regular file" in line


@pytest.mark.parametrize("what", ["fifo", "device", "dangling", "loop"])
def test_a_folder_of_pictures_with_something_else_among_them_is_refused(tmp_path, what):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    other = tmp_path / "b.png"
    if what == "fifo":
        os.mkfifo(other)
    else:
        other.symlink_to({"device": "/dev/zero", "dangling": "nowhere", "loop": "b.png"}[what])
    (line,) = promptly(load_any, tmp_path)
    assert line.count("b.png: ") == 1
    (line,) = load_any(tmp_path, Reading(skip_bad=True)).said
    assert line.startswith("1 skipped, broken: b.png: ")


def test_a_folder_that_is_called_like_a_picture_is_a_folder(tmp_path):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    (tmp_path / "b.png").mkdir()
    assert load_any(tmp_path).said == ("1 subfolder left out without --recursive",)


def test_a_file_is_read_up_to_a_size_and_not_beyond(tmp_path):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    assert read_bytes(path, 5) == b"12345"
    with pytest.raises(InputError, match="x: 5 bytes, more than the 4 that may be read"):
        read_bytes(path, 4)
    with path.open("wb") as file:
        file.truncate(2**40)  # sparse
    with pytest.raises(InputError, match="1099511627776 bytes, more than"):
        read_bytes(path)


def test_a_file_that_grows_while_it_is_read_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"12345")
    fstat = os.fstat

    def growing(descriptor):
        found = fstat(descriptor)
        with path.open("ab") as file:
            file.write(b"6")
        return found

    monkeypatch.setattr(os, "fstat", growing)
    with pytest.raises(InputError, match="x: changed while it was read"):
        read_bytes(path)


@pytest.mark.parametrize("path", ["nowhere", ".", "x" * 5000, "a\0b", "a\ud800b"])
def test_a_name_that_cannot_be_opened_is_refused(path):
    with pytest.raises(InputError, match=": "):
        read_bytes(Path(path))


def test_what_a_parser_raises_or_warns_of_becomes_one_line(recwarn):
    def parse(error):
        with parsed("not good"):
            warnings.warn("remark", stacklevel=1)
            raise error

    for error in (RecursionError("too deep"), MemoryError(), KeyError("k"), SyntaxError("a\nb")):
        with pytest.raises(InputError, match=r"^not good: ") as caught:
            parse(error)
        assert "\n" not in str(caught.value)
    with pytest.raises(UsageError), parsed("not good"):
        raise UsageError("passes")
    with pytest.raises(KeyboardInterrupt), parsed("not good"):
        raise KeyboardInterrupt
    assert not recwarn.list


def test_what_a_terminal_would_take_for_a_command_is_escaped():
    assert plain("é\x1b[31m\n\udcff") == r"é\x1b[31m\n\udcff"


def peak(read, *arguments):
    """Returns the most bytes that Python had in memory during a refusal."""
    tracemalloc.start()
    try:
        with pytest.raises(InputError) as caught:
            read(*arguments)
        return tracemalloc.get_traced_memory()[1], str(caught.value)
    finally:
        tracemalloc.stop()


def test_a_gzip_bomb_is_refused_before_it_expands(tmp_path):
    """200 KB hold 200 MB of zeros. The header says too little, nothing, or more than is read."""
    start = struct.pack(">HBB3I", 0, 8, 3, 1, 8, 8)
    much = struct.pack(">HBB3I", 0, 8, 3, 2**31, 8, 8)
    for header, said in ((start, "65 bytes or more follow"), (b"", "neither"), (much, "GiB")):
        (tmp_path / "x.gz").write_bytes(gzip.compress(header + bytes(2 * 10**8), 1))
        most, line = peak(load, tmp_path / "x.gz")
        assert said in line
        assert most < 2**25


def archive(*members):
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members:
            file.writestr(name, content)
    return buffer.getvalue()


def npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def test_a_zip_bomb_is_refused_before_it_expands():
    header = b"\x93NUMPY\x02\x00" + (2 * 10**8).to_bytes(4, "little")
    bombs = (
        (archive(("a.npy", npy(np.zeros(8, np.uint8)) + bytes(2 * 10**8))), "are there"),
        (archive(("a.npy", header + b" " * (2 * 10**8))), "its header has 200000000 bytes"),
        (archive(("a", bytes(2 * 10**8))), "not a readable archive"),
    )
    for content, said in bombs:
        most, line = peak(read_npz, content)
        assert said in line
        assert most < 2**25


def test_an_archive_is_bounded_as_a_whole(monkeypatch):
    monkeypatch.setattr("vqref.host.images.LARGEST_ARRAY", 1000)
    array = npy(np.zeros(500, np.uint8))
    assert len(read_npz(archive(("a.npy", array)))["a"]) == 500
    with pytest.raises(InputError, match="read at once"):
        read_npz(archive(("a.npy", array), ("b.npy", array)))
    monkeypatch.setattr("vqref.host.images.MOST_MEMBERS", 1)
    with pytest.raises(InputError, match="holds more than 1 arrays"):
        read_npz(archive(("a.npy", b""), ("b.npy", b"")))


def test_archives_that_numpy_does_not_write_are_refused(recwarn):
    array = npy(np.zeros(3))
    with contextlib.suppress(UserWarning):
        twice = archive(("a.npy", array), ("a", array))
    with pytest.raises(InputError, match="holds two arrays named a"):
        read_npz(twice)
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_LZMA) as file:
        file.writestr("a.npy", array)
    with pytest.raises(InputError, match="encrypted, or compressed by another"):
        read_npz(buffer.getvalue())
    encrypted = bytearray(archive(("a.npy", array)))
    encrypted[encrypted.index(b"PK\x01\x02") + 8] |= 1
    with pytest.raises(InputError, match="encrypted, or compressed by another"):
        read_npz(bytes(encrypted))


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, [("a", "f4")]),
        np.zeros(2, complex),
        np.zeros(2, "S3"),
        np.zeros(2, "M8[s]"),
        np.zeros(2, "V4"),
    ],
)
def test_arrays_of_other_things_than_numbers_and_text_are_refused(array):
    with pytest.raises(InputError, match="expected numbers or text"):
        read_npz(archive(("a.npy", npy(array))))


@pytest.mark.parametrize("shape", [(-2, -3), (2**63,), (0, -1), (0, 10**30), ("x",), (1,) * 70])
def test_shapes_that_no_array_has_are_refused(shape):
    header = repr({"descr": "|u1", "fortran_order": False, "shape": shape}).encode()
    content = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little") + header + bytes(6)
    with pytest.raises(InputError):
        read_npz(archive(("a.npy", content)))


def test_arrays_read_as_numpy_reads_them():
    arrays = {
        "fortran": np.asfortranarray(np.arange(6.0).reshape(2, 3)),
        "scalar": np.array(3, np.int16),
        "empty": np.zeros((0, 3), np.float32),
        "text": np.array(["a", "bc"]),
        "swapped": np.arange(3, dtype=">u4"),
    }
    buffer = io.BytesIO()
    np.savez(buffer, allow_pickle=False, **arrays)
    found = read_npz(buffer.getvalue())
    for name, array in arrays.items():
        assert (found[name].shape, found[name].dtype) == (array.shape, array.dtype)
        np.testing.assert_array_equal(found[name], array)
        assert found[name].flags.writeable


def test_a_picture_of_too_many_pixels_is_refused(tmp_path):
    """The PNG has one row, and its header promises 100,000 x 100,000 pixels."""
    buffer = io.BytesIO()
    Image.new("L", (8, 8)).save(buffer, "png")
    content = bytearray(buffer.getvalue())
    for pixels in (100_000, 10_000):  # above the limits of Pillow's error and of its warning
        content[16:24] = struct.pack(">2I", pixels, pixels)
        content[29:33] = struct.pack(">I", zlib.crc32(bytes(content[12:29])))
        (tmp_path / "a.png").write_bytes(content)
        with pytest.raises(InputError, match=r"a\.png: not a readable image: Image size"):
            load_any(tmp_path)


def test_pictures_that_together_are_too_many_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("vqref.host.pictures.LARGEST_ARRAY", 100)
    for name in ("a.png", "b.png"):
        Image.new("L", (8, 8)).save(tmp_path / name)
    with pytest.raises(InputError, match="2 images of 8x8 are too many: more than 0 GiB"):
        load_any(tmp_path)
    assert len(load_any(tmp_path, Reading(size=(7, 7))).train) == 2
    with pytest.raises(InputError, match="2 images of 9x9 are too many"):
        load_any(tmp_path, Reading(size=(9, 9)))
    with pytest.raises(InputError, match="2 images of 7x7 are too many"):
        load_any(tmp_path, Reading(channels=3, size=(7, 7)))
    with pytest.raises(InputError, match="3 images of 8x8 are too many"):
        prepare([tmp_path / "a.png"] * 3, (1, 8, 8), Preprocessing(1))
    Image.new("RGB", (8, 8)).save(tmp_path / "b.png")
    with pytest.raises(InputError, match="2 images of 7x7 are too many"):
        load_any(tmp_path, Reading(size=(7, 7)))


def test_files_that_pillow_would_start_a_program_for_are_no_pictures(tmp_path):
    (tmp_path / "a.eps").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n")
    with pytest.raises(InputError, match="holds no image files"):
        load_any(tmp_path)
    (tmp_path / "a.png").write_bytes((tmp_path / "a.eps").read_bytes())
    with pytest.raises(InputError, match=r"a\.png: not a readable image: none of the formats"):
        load_any(tmp_path)


def test_pictures_whose_names_are_no_text_can_be_tokenized(tmp_path):
    folder = tmp_path / os.fsdecode(b"\xff")
    folder.mkdir()
    Image.new("L", (28, 28)).save(tmp_path / "x.png")
    (tmp_path / "x.png").rename(folder / os.fsdecode(b"\xfe\n.png"))
    assert read_images(folder, SPEC).names == (r"\udcfe\n.png",)
    assert load_any(folder).source == r"\udcff"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (b"epochs = " + b"[" * 3000, "not TOML"),
        (b"epochs = " + b"9" * 5000, "not TOML"),
        (b"epochs = " + b"9" * 30, "epochs is an integer of more than 64 bits"),
        (b"beta = nan", "beta is nan, expected a finite number"),
        (b"when = 1979-05-27", "when is a date, expected text or a number"),
        (b"sizes = [1, 2]", "sizes is a list"),
        (b"[training.rates]\nfirst = 1", "rates is a dict"),
        (b"seed = 1\n[training]\nseed = 2", "seed is given twice"),
        (b"a" * 70_000, "bytes, more than"),
    ],
)
def test_options_that_are_no_options_are_named(tmp_path, text, said):
    (tmp_path / "o.toml").write_bytes(text)
    with pytest.raises(InputError, match=r"o\.toml: ") as caught:
        read_options(tmp_path / "o.toml")
    assert said in str(caught.value)


def test_a_codebook_without_axes_is_refused(tmp_path, model):
    np.savez(tmp_path / "p.npz", **{**model.params, "quantizer.codebook": np.float32(1)})
    with pytest.raises(InputError, match=r"quantizer\.codebook has shape \(\), expected \(K, D\)"):
        read_source(tmp_path / "p.npz")


def test_tokens_of_a_small_file_that_says_it_has_many_rows_are_refused(tmp_path):
    pyarrow = pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    from pyarrow import parquet

    rows = pyarrow.FixedSizeListArray.from_arrays(pyarrow.array(np.zeros(4, np.int64)), 2)
    parquet.write_table(pyarrow.table({"indices": rows}), tmp_path / "t.parquet")
    assert read_tokens(tmp_path / "t.parquet").indices.shape == (2, 2)
    gaps = pyarrow.array([[1, None]], pyarrow.list_(pyarrow.int64(), 2))
    floats = pyarrow.array([[1.5, 2.0]], pyarrow.list_(pyarrow.float64(), 2))
    for column, said in ((gaps, "has gaps"), (floats, "of integers")):
        parquet.write_table(pyarrow.table({"indices": column}), tmp_path / "t.parquet")
        with pytest.raises(InputError, match=said):
            read_tokens(tmp_path / "t.parquet")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, many_images):
    """A run of two epochs, and what its last snapshots hold."""
    place = tmp_path_factory.mktemp("finished")
    run = trainer(place, many_images, work={"snapshot_steps": 3})
    run.run()
    run.work.folder.release()
    return run, load_state(list_states(run.work.folder.snapshots)[1])


def changed(state, name, value):
    """Returns a copy of a state with another entry at these keys; None removes the entry."""
    copy = torch.load(io.BytesIO(saved(state)), weights_only=True)
    holder = copy
    for key in name[:-1]:
        holder = holder[key]
    if value is None:
        del holder[name[-1]]
    else:
        holder[name[-1]] = value
    return copy


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


MISFITS = [
    (("model", "quantizer.codebook"), None, "model.quantizer.codebook is missing"),
    (("model", "quantizer.codebook"), torch.zeros(3, 4), r"has shape \(3, 4\), expected \(8, 4\)"),
    (("model", "extra"), torch.zeros(3), "model.extra is not known"),
    (("quantizer_steps",), 3, "quantizer_steps has int, expected a tensor"),
    (("optimizer",), None, "optimizer is missing"),
    (("optimizer", "state", 3), None, r"optimizer.state.3 is missing"),
    (
        ("optimizer", "state", 3, "exp_avg"),
        torch.zeros(5),
        r"state.3.exp_avg has shape \(5,\), expected \(",
    ),
    (("optimizer", "state", 3, "exp_avg"), None, "optimizer.state.3.exp_avg is missing"),
    (
        ("optimizer", "state", 0, "step"),
        torch.zeros((), dtype=torch.int64),
        "step has torch.int64, expected",
    ),
    (("optimizer", "param_groups"), [], "param_groups has 0 values, expected 1"),
    (("choices",), torch.zeros(7, dtype=torch.uint8), r"choices has shape \(7,\), expected"),
    (("order",), torch.zeros(5056, dtype=torch.uint8), "order is not the state of a generator"),
    (("meter",), {"count": 0}, "meter.sums is missing"),
    (
        ("meter", "hits"),
        torch.ones(9, dtype=torch.int64),
        r"meter.hits has shape \(9,\), expected \(8,\)",
    ),
    (("meter", "hits"), torch.ones(8, dtype=torch.int64), "meter.hits adds up to 8, expected"),
    (("meter", "count"), -1, "meter.count is -1"),
    (("epoch",), "1", "epoch has str, expected int"),
    (("epoch",), True, "epoch has bool, expected int"),
    (("step",), -1, "step is -1, expected a count"),
    (("seconds",), float("nan"), "seconds is nan"),
    (("history",), "none", "history has str, expected list"),
    (("history",), [], "history has 0 lines, expected 1"),
    (("history",), [{"epoch": 1}], "history.0.reconstruction is missing or not a number"),
    (("finished",), None, "finished has NoneType, expected bool"),
    (("course",), [1], "course has list, expected dict"),
]


@pytest.mark.parametrize(("name", "value", "said"), MISFITS)
def test_a_sealed_snapshot_that_does_not_fit_is_refused_by_name(
    finished, tmp_path, name, value, said
):
    """Nothing of the run changes: neither its folder, nor a trainer that gets the state."""
    run, state = finished
    bad = changed(state, name, value)
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run" / "snapshots", 8, bad)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(InputError, match=rf"step-00000008\.state: its entry .*{said}"):
        open_run(tmp_path, "run", "r", "auto", run.course, print, fits(SPEC))
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert {path: content for path, content in after.items() if path.name != ".lock"} == before
    if name[0] not in ("course", "finished"):
        fresh = trainer_state(tmp_path, run)
        kept = saved_state(fresh)
        with pytest.raises(InputError, match=said):
            fresh.load(bad)
        assert saved_state(fresh) == kept


def trainer_state(tmp_path, run):
    """The state of a run that has not begun."""
    from vqtrain.run.metrics import Meter
    from vqtrain.run.snapshot import RunState
    from vqtrain.run.start import start_model
    from vqtrain.run.step import make_optimizer

    cpu, generator = torch.device("cpu"), torch.Generator()
    model = start_model(SPEC, run.options, np.zeros((4, 1, 28, 28), np.uint8), cpu)
    optimizer = make_optimizer(model, run.options)
    return RunState(model, optimizer, generator, Meter(SPEC, cpu), generator.get_state())


def saved_state(state):
    return saved(state.to_plain())


def test_a_snapshot_that_does_not_fit_is_skipped_for_the_one_before(finished, tmp_path):
    run, state = finished
    folder = tmp_path / "run" / "snapshots"
    folder.parent.mkdir()
    save_state(folder, 7, state)
    save_state(folder, 8, changed(state, ["optimizer"], None))
    said: list[str] = []
    opened, found = open_run(tmp_path, "run", "r", "auto", run.course, said.append, fits(SPEC))
    opened.release()
    assert found["step"] == state["step"]
    assert "step-00000008.state: its entry optimizer is missing" in said[0]
    assert "going on from" in said[1]


def test_every_snapshot_of_a_run_fits_it(finished):
    run, _ = finished
    fits = latest_state(run.work.folder.path)
    assert fits is not None
    for path in list_states(run.work.folder.snapshots):
        state = load_state(path)
        trainer_state(path, run).load(state)


def test_a_snapshot_of_another_network_is_named_for_its_course(finished, tmp_path):
    run, state = finished
    (tmp_path / "run").mkdir()
    save_state(tmp_path / "run" / "snapshots", 8, state)
    nine = families.post((1, 28, 28), base_depth=4, latent_size=2, num_codes=9, code_size=4)
    course = course_of(nine, run.options, {}, "0" * 64)
    with pytest.raises(UsageError, match="was begun with num_codes 8, not 9"):
        open_run(tmp_path, "run", "r", "auto", course, print, fits(nine))


def test_what_a_killed_run_left_of_snapshots_is_cleaned_by_the_next(tmp_path):
    (tmp_path / ".step-00000003.state.0123abcd").write_bytes(b"half")
    save_state(tmp_path, 4, {"step": 4})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004.state"]


def test_a_run_in_a_folder_whose_name_is_no_text_can_be_begun_again(tmp_path):
    from vqtrain.run.folder import RunFolder

    folder = RunFolder(tmp_path / os.fsdecode(b"\xff"))
    data = str(tmp_path / os.fsdecode(b"\xfe.npz"))
    folder.write_options({"run": {"data": data}})
    folder.release()
    assert read_options(folder.path / "options.toml") == {"data": data}
