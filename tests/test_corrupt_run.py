"""--skip-corrupt in whole runs: the list, the limit over all processes, resumption."""

import json
from unittest.mock import Mock

import pytest
from datasets import Dataset, Features, Image, load_dataset
from fsspec.implementations.memory import MemoryFileSystem
from test_resume import outcome
from tiny import killed_after, tiny_config

from arrest_hub.corrupt import CorruptImages, read_entries, read_image
from arrest_hub.errors import ArrestError
from arrest_hub.images import UnreachableImage
from arrest_hub.train import dry_run, finetune


def damage(folder, images):
    """Cut these training images short."""
    path = folder / "data" / "train-00000-of-00001.parquet"
    data = load_dataset("parquet", data_files=str(path), split="train").cast_column("img", Image(decode=False))
    rows = data.to_list()
    for index in images:
        rows[index]["img"]["bytes"] = rows[index]["img"]["bytes"][:200]
    features = Features(dict(data.features) | {"img": Image()})
    Dataset.from_list(rows, features=features).to_parquet(str(path))


@pytest.fixture
def config(tmp_path):
    tiny_config(tmp_path)
    damage(tmp_path, [1, 7])

    def make(name, **changes):
        changes = {"validation_size": 0, "checkpoint_every": 1, "log_every": 1, "epochs": 2} | changes
        return tiny_config(tmp_path, output_dir=str(tmp_path / name), **changes)

    return make


@pytest.mark.parametrize("streaming", [False, True])
def test_a_run_skips_lists_and_resumes(config, streaming, tmp_path, capsys):
    changes = {"streaming": streaming, "skip_corrupt": 2}
    finetune(config("whole", **changes))
    entries = [json.loads(line) for line in (tmp_path / "whole" / "corrupt.jsonl").read_text().splitlines()]
    assert len(entries) == 2
    assert capsys.readouterr().out.count("skipped image") == 2
    with killed_after(8):
        finetune(config("cut", **changes))
    finetune(config("cut", resume=True, **changes))
    assert outcome(tmp_path / "whole") == outcome(tmp_path / "cut")
    listed = (tmp_path / "cut" / "corrupt.jsonl").read_text().splitlines()
    assert sorted(json.loads(line)["key"] for line in listed) == sorted(entry["key"] for entry in entries)


def test_a_list_that_was_cut_short_is_gone_on_with(config, tmp_path):
    """By a full disk, or where the power failed."""
    with killed_after(1):
        finetune(config("cut", skip_corrupt=2))
    path = tmp_path / "cut" / "corrupt.jsonl"
    path.write_bytes(b'{"key": "f6fc42')
    for _ in range(2):
        finetune(config("cut", skip_corrupt=2, resume=True))
    assert len(read_entries(path)) == 2


def test_a_dry_run_skips_what_the_run_would(config, tmp_path):
    with pytest.raises(ArrestError, match="cannot be decoded"):
        dry_run(config("none", num_workers=0))
    assert any(line.startswith("data ") for line in dry_run(config("some", skip_corrupt=2, num_workers=0)))
    assert not (tmp_path / "some").exists()


def test_an_image_whose_storage_does_not_answer_is_not_a_damaged_one(monkeypatch):
    found = CorruptImages(2)
    image = {"bytes": None, "path": "memory://images/1.png"}
    assert read_image(image, "train", 1, found) is None, "there is none"
    for error in (OSError("503 Server Error"), ConnectionError("refused"), RuntimeError("Client has been closed")):
        monkeypatch.setattr(MemoryFileSystem, "_open", Mock(side_effect=error))
        with pytest.raises(UnreachableImage, match=rf"image 2 \(.*1.png\): it cannot be fetched \({error}\)"):
            read_image(image, "train", 2, found)
    assert [entry["index"] for entry in found.entries()] == [1]


def test_more_than_allowed_ends_the_run(config, tmp_path):
    with pytest.raises(ArrestError, match=r"skip up to N such images with --skip-corrupt N"):
        finetune(config("none"))
    with pytest.raises(ArrestError, match=r"More than --skip-corrupt 1 images cannot be read"):
        finetune(config("one", skip_corrupt=1))


def test_an_unreadable_image_is_not_left_out_of_a_figure(config, tmp_path):
    damage(tmp_path, range(24))
    with pytest.raises(ArrestError, match="cannot be decoded"):
        finetune(config("validated", validation_size=20, skip_corrupt=48))
