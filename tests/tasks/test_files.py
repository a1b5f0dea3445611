"""Files are whole or not there, and what is not a file is left alone."""

import os
import subprocess
import sys

import pytest

from fastdiff.files import output_path, write_atomically, write_folder_atomically


def test_a_file_is_whole_or_not_there(tmp_path):
    path = tmp_path / "a.txt"
    write_atomically(path, "first")

    def half(temporary):
        temporary.write_text("half")
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"):
        write_atomically(path, half)
    assert path.read_text() == "first" and os.listdir(tmp_path) == ["a.txt"]
    with pytest.raises(FileNotFoundError, match="gone"):
        write_atomically(tmp_path / "gone" / "b.txt", b"x")


def test_files_have_the_mode_of_the_umask(tmp_path):
    def private(path):
        path.write_text("x")
        path.chmod(0o600)  # as safetensors does

    before = os.umask(0o027)
    try:
        write_atomically(tmp_path / "a", private)
        write_folder_atomically(tmp_path / "folder", lambda folder: private(folder / "b"))
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder" / "b").stat().st_mode & 0o777 == 0o640


def test_links_and_what_is_not_a_file(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "target")
    write_atomically(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "target").read_text() == "text"
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(OSError, match="not a regular file"):
        write_atomically(tmp_path / "pipe", "text")
    with pytest.raises(PermissionError, match="is a device or a pipe"):
        output_path(str(tmp_path / "pipe"), tmp_path)


def test_a_reader_that_has_gone_is_no_traceback():
    command = [sys.executable, "-m", "fastdiff.train", "--list"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()
    assert process.stderr.read() == b"" and process.wait() == 1
