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


@pytest.mark.parametrize("error", ["ours", "rust"])
def test_a_full_disk_while_tokens_are_prepared_is_one_line(tmp_path, monkeypatch, capsys, error):
    import errno

    from fastdiff.commands import command
    from fastdiff.data import TextDataConfig, TokenizerConfig, load_text_data
    from fastdiff.data.token_files import TokenFileWriter

    def full(*_, **__):
        if error == "ours":  # without a name, as writing to an open file raises it
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        raise Exception("No space left on device (os error 28)")  # as tokenizers and safetensors raise it

    monkeypatch.setenv("FASTDIFF_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(TokenFileWriter, "add", full)
    (tmp_path / "a.txt").write_text("Shall I compare thee to a summer's day?\n" * 9)
    config = TextDataConfig(name="text_folder", path=str(tmp_path), max_length=8, min_length=4)
    main = command(lambda argv: load_text_data(config, TokenizerConfig(name="characters")))
    with pytest.raises(SystemExit) as exit_:
        main([])
    said = capsys.readouterr().err.splitlines()[-1]
    assert exit_.value.code == 2
    assert said == (
        f"error: {tmp_path / 'cache' / 'tokens'}: No space left on device; free some space, or set FASTDIFF_CACHE to a "
        "folder of another disk"
    )
    assert not [path for path in (tmp_path / "cache" / "tokens").iterdir() if path.is_dir()]


def test_ctrl_c_while_a_folder_is_cleared_away_leaves_nothing(tmp_path, monkeypatch):
    import shutil
    import signal

    rmtree = shutil.rmtree

    def slow(path, **options):
        if list(path.glob("*")):
            os.kill(os.getpid(), signal.SIGINT)  # a second Ctrl-C, while what the first one left is removed
        rmtree(path, **options)

    def fill(folder):
        (folder / "half").write_text("x")
        raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", slow)
    with pytest.raises(KeyboardInterrupt):
        write_folder_atomically(tmp_path / "new", fill)
    assert not list(tmp_path.iterdir())
