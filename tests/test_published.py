"""The models under model_cards/ load, are what their figures were measured on, and are small."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from arrest_hub import from_pretrained
from arrest_hub.export import weights_digest
from arrest_hub.model_card import card_is_generated
from arrest_hub.push_cli import card_command
from arrest_hub.results import read_results
from arrest_hub.verdicts import read_verdicts

ROOT = Path(__file__).parent.parent / "model_cards"
PUBLISHED = sorted(path.parent for path in ROOT.glob("*/config.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_model_is_what_its_card_says(folder):
    model = from_pretrained(folder)
    report = read_results(folder / "results.json")
    assert weights_digest(model.backbone) == report.model["weights_sha256"]
    size = report.preprocessing["size"]
    images = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
    assert model(images).shape == (2, json.loads((folder / "config.json").read_text())["num_classes"])

    assert card_is_generated(folder), "nobody wrote into the card by hand"
    card = (folder / "README.md").read_text()
    verdicts = read_verdicts(folder / "verdicts.parquet")
    for row in report.results:
        right = verdicts.clean_correct if row.attack is None else [by is None for by in verdicts.broken_by[row.attack]]
        assert sum(right) == row.correct, "each figure is a count of the verdicts beside it"
        assert f"{100 * row.correct / row.n:.1f} % [" in card
    assert report.get("robust_accuracy", attack="autoattack") is not None
    assert not [check.name for check in report.checks if check.status == "warn"]


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda folder: folder.name)
def test_a_published_card_is_the_one_that_is_made_today(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    card_command([str(tmp_path / "model")])
    assert (tmp_path / "model/README.md").read_text() == (folder / "README.md").read_text(), "run arrest-card on it"


def test_published_files_are_small_and_name_no_machine():
    files = [path for folder in PUBLISHED for path in folder.rglob("*") if path.is_file()]
    assert files
    assert all(path.stat().st_size < 16 * 2**20 for path in files)
    assert sum(path.stat().st_size for path in files) < 60e6
    for path in files:
        if path.suffix in (".json", ".yaml", ".md"):
            assert not any(place in path.read_text() for place in ("/home/", "/root/", "/tmp/")), path
    for folder in PUBLISHED:
        assert json.loads((folder / "training_record.json").read_text())["command"].startswith("arrest-finetune ")
