"""Files are written whole or not at all, whoever else writes them."""

import errno
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from safetensors import SafetensorError

from arrest_hub.files import as_os_error, end_last_line, is_draft, write_whole


def test_many_may_write_one_file_at_once(tmp_path):
    path, texts = tmp_path / "config.yaml", ["a" * 50_000, "b" * 70_000, "é" * 60_000]
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda number: write_whole(path, texts[number % 3]), range(300)))
    assert path.read_text(encoding="utf-8") in texts
    assert [file.name for file in tmp_path.iterdir()] == ["config.yaml"]


def test_what_cannot_be_written_leaves_the_file_before(tmp_path, monkeypatch):
    path = tmp_path / "card.md"
    write_whole(path, "before")

    def full(source, target):
        raise OSError(28, "no space left")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="no space"):
        write_whole(path, "after")
    assert path.read_text() == "before"
    assert [file.name for file in tmp_path.iterdir()] == ["card.md"]


def test_a_draft_is_known_and_nobody_elses_file_is(tmp_path, monkeypatch):
    def killed(source, target):
        raise KeyboardInterrupt

    monkeypatch.setattr("os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write_whole(tmp_path / "config.yaml", "text")
    (draft,) = tmp_path.iterdir()
    assert is_draft(draft)
    for name in ("config.yaml.tmp", "thesis.tmp", "a.1234567.tmp", "a.12345678.txt"):
        (tmp_path / name).write_text("mine")
        assert not is_draft(tmp_path / name)


@pytest.mark.parametrize(
    "error",
    [
        SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
        shutil.Error([("a", "b", "[Errno 28] No space left on device: 'b'")]),
    ],
)
def test_a_full_disk_is_told_from_what_libraries_say(error):
    found = as_os_error(error, Path("runs/x"))
    assert (type(found), found.errno, found.filename) == (OSError, errno.ENOSPC, "runs/x")
    other = SafetensorError("header too large")
    assert as_os_error(other, Path("x")) is other


def test_a_line_cut_short_is_ended(tmp_path):
    path = tmp_path / "lines"
    for before, after in ((b"", b""), (b"a", b"a\n"), (b"a\n", b"a\n"), (b"a\nb", b"a\nb\n")):
        path.write_bytes(before)
        end_last_line(path)
        assert path.read_bytes() == after
