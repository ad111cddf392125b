"""The files of compiled code: whole, of their key, and written by this user, or refused with the reason."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from diffusers_turbo import TurboError
from diffusers_turbo.compilation import cache
from diffusers_turbo.compilation.cache import Part, default_folder, file_of, joined, read_parts, write_parts

KEY = {"model": "UNet2DConditionModel", "device": "NVIDIA H100 80GB HBM3", "torch": "2.13.0", "options": {"mode": None}}
PARTS = [Part(data=b"one\n\x00", artifacts=frozenset({"inductor:a"})), Part(data=b"", artifacts=frozenset())]


@pytest.fixture
def folder(tmp_path) -> Path:
    return tmp_path / "cache"


@pytest.fixture
def file(folder) -> Path:
    file = file_of(folder, KEY)
    write_parts(file, KEY, PARTS)
    return file


def test_what_was_written_is_read(file):
    assert read_parts(file, dict(reversed(KEY.items()))) == PARTS
    assert [stat.S_IMODE(path.stat().st_mode) for path in (file, file.parent)] == [0o600, 0o700]
    assert file.name.startswith("UNet2DConditionModel-NVIDIA-H100-80GB-HBM3-")


def test_each_key_has_a_file(folder):
    changed = [{**KEY, name: "other"} for name in KEY]
    assert len({file_of(folder, key) for key in [KEY, *changed]}) == 1 + len(KEY)


def test_no_file_is_no_fault(folder):
    with pytest.raises(FileNotFoundError):
        read_parts(file_of(folder, KEY), KEY)


def test_a_stale_key(file):
    with pytest.raises(TurboError, match=r"found another key \(torch 2.13.0 instead of 2.14.0\).*made anew"):
        read_parts(file, {**KEY, "torch": "2.14.0"})


@pytest.mark.parametrize("cut", [1, 3])
def test_a_truncated_file(file, cut):
    file.write_bytes(file.read_bytes()[:-cut])
    with pytest.raises(TurboError, match="truncated or changed bytes"):
        read_parts(file, KEY)


@pytest.mark.parametrize("content", [b"", b"\x80\x04", b"[]\n", b"{}\n", b'"text"\n', b'{"format": 1}\n'])
def test_no_header(file, content):
    file.write_bytes(content)
    with pytest.raises(TurboError, match="a header that cannot be read|another format"):
        read_parts(file, KEY)


def test_changed_bytes(file):
    content = file.read_bytes()
    file.write_bytes(content[:-2] + b"!" + content[-1:])
    with pytest.raises(TurboError, match="checksum differs"):
        read_parts(file, KEY)


def test_a_file_others_can_write(file):
    file.chmod(0o666)
    with pytest.raises(TurboError, match="can be written to by its group and everybody"):
        read_parts(file, KEY)


def test_a_link(file, tmp_path):
    elsewhere = tmp_path / "elsewhere"
    os.replace(file, elsewhere)
    file.symlink_to(elsewhere)
    with pytest.raises(TurboError, match="is a symbolic link"):
        read_parts(file, KEY)
    # written anew, the link gives way and what it led to is untouched
    content = elsewhere.read_bytes()
    write_parts(file, KEY, PARTS[1:])
    assert not file.is_symlink()
    assert elsewhere.read_bytes() == content


def test_a_folder_others_can_write(file):
    file.parent.chmod(0o777)
    with pytest.raises(TurboError, match="can be written to by its group and everybody"):
        write_parts(file, KEY, PARTS)
    with pytest.raises(TurboError, match="can be written to by its group and everybody"):
        read_parts(file, KEY)


def test_a_write_that_fails_leaves_what_was_there(file, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache.os, "replace", full)
    with pytest.raises(OSError, match="No space left"):
        write_parts(file, KEY, PARTS[:1])
    assert read_parts(file, KEY) == PARTS
    assert os.listdir(file.parent) == [file.name]


def test_parts_are_joined_until_they_are_covered():
    a, b, ab, c = (Part(data=name.encode(), artifacts=frozenset(name)) for name in ("a", "b", "ab", "c"))
    assert joined([a], b) == [b, a]
    assert joined([b, a], ab) == [ab]
    assert joined([ab], a) == [a, ab]
    many = [Part(data=b"", artifacts=frozenset({str(n)})) for n in range(cache.MAX_PARTS)]
    assert joined(many, c) == [c, *many[:-1]]


@pytest.mark.parametrize(("files", "size"), [(2, 10**6), (100, 900)])
def test_the_longest_unused_go_first(folder, monkeypatch, files, size):
    kept = [file_of(folder, {"model": str(n)}) for n in range(3)]
    other = folder / "not-ours.txt"
    for age, path in zip((30, 10, 20), kept, strict=True):
        write_parts(path, {"model": path.name}, [])
        path.write_bytes(b"x" * 400)
        os.utime(path, (10**9 - age, 10**9 - age))
    other.write_bytes(b"x" * 10**4)
    cache.mark_used(kept[0])
    monkeypatch.setattr(cache, "MAX_FILES", files)
    monkeypatch.setattr(cache, "MAX_BYTES", size)
    cache.make_room(folder, keep=kept[2])
    assert set(folder.iterdir()) == {kept[0], kept[2], other}


def test_where_files_go_when_no_folder_is_named(monkeypatch):
    monkeypatch.delenv("DIFFUSERS_TURBO_CACHE", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_folder() == Path("/home/somebody/.cache/diffusers_turbo")
    monkeypatch.setenv("XDG_CACHE_HOME", "/caches")
    assert default_folder() == Path("/caches/diffusers_turbo")
    monkeypatch.setenv("DIFFUSERS_TURBO_CACHE", "~/mine")
    assert default_folder() == Path("/home/somebody/mine")
