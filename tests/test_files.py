"""Files are written whole or not at all, whoever else writes them."""

from concurrent.futures import ThreadPoolExecutor

import pytest

from arrest_hub.files import write_whole


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
