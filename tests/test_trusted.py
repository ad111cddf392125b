"""Code is loaded only from where nobody else can have put it."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from types import SimpleNamespace

import pytest

from diffusers_turbo import TurboError
from diffusers_turbo.trusted import private_folder, read_trusted, reasons_not_to_trust

posix = pytest.mark.skipif(not hasattr(os, "geteuid"), reason="owners and modes are POSIX's")


@pytest.fixture
def file(tmp_path) -> Path:
    folder = tmp_path / "folder"
    folder.mkdir(mode=0o700)
    file = folder / "file"
    file.write_bytes(b"code")
    file.chmod(0o600)
    return file


def only_reason(path: Path) -> str:
    (reason,) = reasons_not_to_trust(path)
    return reason


def test_ones_own_file_is_trusted(file):
    assert reasons_not_to_trust(file) == reasons_not_to_trust(file.parent) == []
    assert read_trusted(file) == b"code"


def test_others_may_read(file):
    file.chmod(0o644)
    file.parent.chmod(0o755)
    assert reasons_not_to_trust(file) == []


@posix
@pytest.mark.parametrize(
    ("mode", "who"), [(0o620, "its group"), (0o602, "everybody"), (0o666, "its group and everybody")]
)
def test_a_file_others_can_write(file, mode, who):
    file.chmod(mode)
    assert only_reason(file) == f"{file} can be written to by {who}"
    with pytest.raises(TurboError, match=f"reading .* can be written to by {who}.*chmod go-w"):
        read_trusted(file)


@posix
def test_a_folder_others_can_write(file):
    file.parent.chmod(0o770)
    assert only_reason(file) == f"{file.parent} can be written to by its group"
    with pytest.raises(TurboError, match="using the folder .* can be written to by its group"):
        private_folder(file.parent)


@posix
def test_a_folder_above_others_can_write_unless_it_is_sticky(file):
    file.parent.parent.chmod(0o777)
    assert only_reason(file).startswith(f"{file.parent.parent} can be written to by")
    file.parent.parent.chmod(0o1777)
    assert reasons_not_to_trust(file) == []


@posix
def test_another_owner(file, monkeypatch):
    me = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: me + 1)
    reasons = reasons_not_to_trust(file)
    assert f"{file} belongs to another user (number {me})" in reasons
    with pytest.raises(TurboError, match="belongs to another user"):
        read_trusted(file)
    with pytest.raises(TurboError, match="belongs to another user"):
        private_folder(file.parent)


def test_symbolic_links(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file)
    assert only_reason(link) == f"{link} is a symbolic link"
    with pytest.raises(TurboError, match="is a symbolic link"):
        read_trusted(link)
    folder = tmp_path / "link to a folder"
    folder.symlink_to(file.parent)
    with pytest.raises(TurboError, match="is a symbolic link"):
        private_folder(folder)
    # above, a link is as good as where it leads
    assert read_trusted(folder / "file") == b"code"


@posix
def test_a_link_above_that_leads_where_others_write(file, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(file.parent)
    file.parent.chmod(0o707)
    assert only_reason(link / "file") == f"{file.parent} can be written to by everybody"


@posix
def test_neither_file_nor_folder(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe, 0o600)
    assert only_reason(pipe) == f"{pipe} is neither a file nor a folder"


def test_what_is_not_there(tmp_path):
    assert (
        only_reason(tmp_path / "nothing") == f"{tmp_path / 'nothing'} cannot be looked at (No such file or directory)"
    )


def test_a_folder_is_no_file(tmp_path, file):
    with pytest.raises(TurboError, match="is no folder"):
        private_folder(file)
    with pytest.raises((TurboError, IsADirectoryError, PermissionError)):
        read_trusted(tmp_path)


@posix
def test_a_private_folder_is_made_for_its_user_alone_whatever_the_umask(tmp_path):
    before = os.umask(0)
    try:
        folder = private_folder(tmp_path / "above" / "folder")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (folder, folder.parent)] == [0o700, 0o700]
    assert private_folder(folder) == folder
    assert reasons_not_to_trust(folder) == []


def test_a_folder_that_cannot_be_made(file):
    with pytest.raises(TurboError, match="using the folder .*found Not a directory"):
        private_folder(file / "below")


@posix
def test_a_file_exchanged_after_the_check_is_not_read(file, monkeypatch):
    """The descriptor is looked at again: here it turns out to be another user's."""
    real = os.fstat

    def another(descriptor: int) -> SimpleNamespace:
        status = real(descriptor)
        return SimpleNamespace(st_mode=status.st_mode, st_uid=status.st_uid + 1, st_size=status.st_size)

    monkeypatch.setattr("diffusers_turbo.trusted.os.fstat", another)
    with pytest.raises(TurboError, match="belongs to another user"):
        read_trusted(file)
