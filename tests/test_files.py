"""Files are written whole or not at all, and what a killed process leaves is removed."""

import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import pytest
from support import ROOT

from benchmarks.hostile.replacements import campaign
from vqref.errors import InputError, MachineError
from vqref.host import files, renames
from vqref.host.files import publish_folder, sweep, write_file

OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"}


@pytest.fixture(params=["exchanged", "linked"])
def way(request, monkeypatch):
    """A file system that can exchange two names, and one that cannot."""
    if request.param == "linked":
        monkeypatch.setattr(renames, "exchange", lambda first, second: False)
    elif sys.platform not in ("linux", "darwin"):
        pytest.skip("this system cannot exchange two names")
    return request.param


@pytest.fixture
def place(tmp_path):
    publish_folder(tmp_path / "place", OLD, replace=False)
    return tmp_path / "place"


def content(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def hidden(folder):
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


def test_a_folder_is_published_again_and_again(way, place):
    for i in range(3):
        publish_folder(place, {"a": bytes([i])}, replace=True)
        assert content(place) == {"a": bytes([i])}
        assert place.is_symlink() == (way == "linked")
        assert len(hidden(place.parent)) == (way == "linked")


def test_a_place_that_became_a_link_is_a_folder_again_where_names_can_be_exchanged(
    place, monkeypatch
):
    with monkeypatch.context() as patched:
        patched.setattr(renames, "exchange", lambda first, second: False)
        publish_folder(place, NEW, replace=True)
        assert place.is_symlink()
    publish_folder(place, OLD, replace=True)
    assert content(place) == OLD
    if not place.is_symlink():
        assert hidden(place.parent) == []


def test_a_link_that_somebody_else_made_is_never_replaced(tmp_path, place):
    (tmp_path / "link").symlink_to(place)
    with pytest.raises(InputError, match="link: is not a folder"):
        publish_folder(tmp_path / "link", NEW, replace=True)
    assert content(place) == OLD


def test_a_folder_is_replaced_only_if_asked(place):
    with pytest.raises(InputError, match="place: exists already; use --replace"):
        publish_folder(place, NEW, replace=False)
    assert content(place) == OLD


def test_a_place_that_is_taken_meanwhile_is_not_overwritten(tmp_path, monkeypatch):
    """Somebody makes a folder at the place after the new folder is written."""
    write = files._write

    def taking(path, data):
        (tmp_path / "place").mkdir(exist_ok=True)
        write(path, data)

    monkeypatch.setattr(files, "_write", taking)
    monkeypatch.setattr(files, "_install", install_new)
    with pytest.raises(FileExistsError):
        publish_folder(tmp_path / "place", NEW, replace=False)
    assert content(tmp_path / "place") == {}
    assert hidden(tmp_path) == []


def install_new(temporary, path):
    """Does what ``_install`` does if it has just found no folder."""
    if not renames.take_free(temporary, path):
        raise FileExistsError


AT_EVERY_STEP = """
import itertools, os, pathlib, signal, sys
from vqref.host import renames
from vqref.host.files import publish_folder

place, way = pathlib.Path(sys.argv[1], "place"), sys.argv[2]
if way == "linked":
    renames.exchange = lambda first, second: False
OLD, NEW = {"a": b"old", "b": b"old"}, {"a": b"new", "b": b"new"}

def content():
    return {path.name: path.read_bytes() for path in place.iterdir()}

def killed_at(step):
    if pid := os.fork():
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])
    steps = itertools.count()
    def die(event, arguments):
        if event.startswith(("os.", "open", "shutil.")) and next(steps) == step:
            os.kill(os.getpid(), signal.SIGKILL)
    sys.addaudithook(die)
    publish_folder(place, NEW, replace=True)
    os._exit(0)

publish_folder(place, OLD, replace=False)
publish_folder(place, OLD, replace=True)
for step in itertools.count():
    killed = killed_at(step)
    assert content() in (OLD, NEW), (step, content())
    publish_folder(place, OLD, replace=True)
    assert content() == OLD
    left = sorted(path.name for path in place.parent.iterdir())
    assert len(left) == (2 if way == "linked" else 1), (step, left)
    if not killed:
        break
print(step)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs processes that can be forked")
def test_a_process_killed_at_any_step_leaves_a_whole_folder_and_the_next_cleans_up(way, tmp_path):
    """The steps are Python's audit events: each file opened, made, renamed or removed."""
    done = python(AT_EVERY_STEP, tmp_path, way)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def python(script, *arguments):
    return subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize("failing", ["_write", "_install"])
def test_what_fails_leaves_the_former_and_nothing_else(way, place, monkeypatch, failing):
    publish_folder(place, OLD, replace=True)
    before = hidden(place.parent)

    def fail(*arguments):
        raise OSError(28, "No space left")

    monkeypatch.setattr(files, failing, fail)
    with pytest.raises(OSError, match="No space left"):
        publish_folder(place, NEW, replace=True)
    assert content(place) == OLD
    assert hidden(place.parent) == before


@pytest.mark.parametrize("links", [True, False])
def test_a_folder_that_made_way_comes_back_if_the_new_one_cannot_take_its_place(
    place, monkeypatch, links
):
    monkeypatch.setattr(renames, "exchange", lambda first, second: False)
    cls = type(place)

    def fail(self, target, target_is_directory=False):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(cls, "replace", fail)
    if not links:
        monkeypatch.setattr(cls, "symlink_to", fail)
    with pytest.raises(OSError, match="Input/output"):
        publish_folder(place, NEW, replace=True)
    assert content(place) == OLD
    assert hidden(place.parent) == []


def test_without_links_a_folder_is_replaced_by_a_folder(place, monkeypatch):
    def refuse(self, target, target_is_directory=False):
        raise OSError(1, "Operation not permitted")

    monkeypatch.setattr(renames, "exchange", lambda first, second: False)
    monkeypatch.setattr(type(place), "symlink_to", refuse)
    publish_folder(place, NEW, replace=True)
    assert content(place) == NEW
    assert not place.is_symlink()
    assert hidden(place.parent) == []


def test_what_killed_processes_left_is_cleaned_by_the_next_publication(place):
    left = place.parent / ".place.0123abcd"
    (left / "within").mkdir(parents=True)
    (left / "within" / "a").write_bytes(b"half")
    (place.parent / ".place.0123abce").write_bytes(b"a probe")
    others = [".place.0123abcg", ".place.0123abcdef", ".other.0123abcd", "place.0123abcd"]
    for name in others:
        (place.parent / name).mkdir()
    publish_folder(place, NEW, replace=True)
    assert sorted(path.name for path in place.parent.iterdir()) == sorted([*others, "place"])


def test_a_write_cleans_what_killed_writes_of_the_same_file_left(tmp_path):
    (tmp_path / ".f.01234567").write_bytes(b"half")
    (tmp_path / ".g.01234567").write_bytes(b"half")
    write_file(tmp_path / "f", b"x")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".g.01234567", "f"]


def test_what_a_process_is_at_work_on_is_not_cleaned(tmp_path, place):
    held = threading.Event(), threading.Event()
    write, error = files._write, []

    def slow(path, data):
        write(path, data)
        held[0].set()
        held[1].wait(30)

    def work():
        try:
            publish_folder(place, NEW, replace=True)
        except OSError as found:
            error.append(found)

    files._write = slow
    try:
        thread = threading.Thread(target=work)
        thread.start()
        held[0].wait(30)
        files._write = write
        (temporary,) = hidden(tmp_path)
        publish_folder(place, {"a": b"between"}, replace=True)
        assert hidden(tmp_path) == [temporary]
        held[1].set()
        thread.join(30)
    finally:
        files._write = write
    assert not error
    assert content(place) == NEW
    assert hidden(tmp_path) == []


def test_a_folder_is_not_cleaned_while_its_place_is_empty(tmp_path):
    """The folder may be the former one, if a process was killed between two renames."""
    (tmp_path / ".place.01234567").mkdir()
    sweep(tmp_path, "place")
    assert hidden(tmp_path) == [".place.01234567"]
    publish_folder(tmp_path / "place", NEW, replace=False)
    assert hidden(tmp_path) == []


AS_A_USER = """
import os, pathlib, sys
from vqref.host.files import publish_folder
if os.getuid() == 0:
    for folder, _, names in os.walk(sys.argv[1]):
        for name in (".", *names):
            os.chown(os.path.join(folder, name), 1234, 1234)
    os.setuid(1234)
place = pathlib.Path(sys.argv[1], "place")
"""
"""The beginning of a script: it runs as a user whom rights bind, even if root runs the tests."""


@pytest.fixture
def theirs():
    """A folder that such a user can reach; pytest's folders belong to who runs the tests."""
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def test_a_read_only_folder_is_replaced_and_removed(theirs):
    place = theirs / "place"
    publish_folder(place, OLD, replace=False)
    for path in place.iterdir():
        path.chmod(0o444)
    place.chmod(0o555)
    done = python(f"{AS_A_USER}\npublish_folder(place, {NEW}, replace=True)", theirs)
    assert (done.returncode, done.stderr) == (0, "")
    assert content(place) == NEW
    assert hidden(theirs) == []


def test_a_former_folder_that_cannot_be_removed_stays_with_one_line(place, monkeypatch, caplog):
    def refuse(path):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(shutil, "rmtree", refuse)
    publish_folder(place, NEW, replace=True)
    assert content(place) == NEW
    (former,) = hidden(place.parent)
    assert content(place.parent / former) == OLD
    (line,) = caplog.messages
    assert line.endswith(f"{former}: left over, and cannot be removed: Operation not permitted")


@pytest.mark.parametrize(
    ("umask", "folder", "file"), [(0o022, 0o755, 0o644), (0o077, 0o700, 0o600)]
)
def test_what_is_published_has_the_rights_that_the_umask_leaves(tmp_path, umask, folder, file):
    former = os.umask(umask)
    try:
        publish_folder(tmp_path / "place", NEW, replace=False)
        write_file(tmp_path / "f", b"x")
    finally:
        os.umask(former)
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("place", "place/a", "f")]
    assert modes == [folder, file, file]


def test_a_folder_that_may_not_be_written_to_is_named(theirs):
    (theirs / "shut").mkdir(mode=0o555)
    script = f"{AS_A_USER}\npublish_folder(place.parent / 'shut' / 'b', {{}}, replace=False)"
    done = python(script, theirs)
    assert done.stderr.endswith("/shut/b: cannot be written: Permission denied\n")
    assert not [*(theirs / "shut").iterdir()]


def test_a_name_that_is_too_long_for_the_system_is_one_line(tmp_path):
    with pytest.raises(MachineError, match="cannot be written: File name too long"):
        publish_folder(tmp_path / ("x" * 250), NEW, replace=False)


def test_names_of_bytes_that_are_no_text_are_names_like_others(tmp_path):
    name = os.fsdecode(b"\xff\xfe")
    publish_folder(tmp_path / name, OLD, replace=False)
    publish_folder(tmp_path / name, NEW, replace=True)
    assert content(tmp_path / name) == NEW
    write_file(tmp_path / f"{name}.txt", b"x")
    names = sorted(os.fsencode(path.name) for path in tmp_path.iterdir())
    assert names == [b"\xff\xfe", b"\xff\xfe.txt"]


@pytest.mark.parametrize("signal", ["SIGKILL", "SIGTERM"])
def test_a_process_that_is_killed_as_it_publishes_leaves_a_whole_folder(signal):
    found = campaign(6, seed=1, signal=signal, exports=0)
    assert found.kills == 6
    assert found.past == []
