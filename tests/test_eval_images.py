"""Which images a figure is of: never those that were trained on, never two sets on one card, never a changed one."""

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image
from PIL import Image as PILImage
from tiny import NAMES, pretrained_state, tiny_backbone, tiny_config, write_images, write_model

import arrest_hub
from arrest_hub.cli import eval_command
from arrest_hub.command import run_cli
from arrest_hub.errors import BackboneError, ConfigError
from arrest_hub.export import write_model_folder
from arrest_hub.images import ImageError, decode_image
from arrest_hub.journal import Journal
from arrest_hub.push_cli import card_command
from arrest_hub.results import read_results
from arrest_hub.splits import load_splits
from arrest_hub.train import finetune
from arrest_hub.trained_on import held_out_seed
from arrest_hub.training_record import TrainingData, TrainingRecord
from arrest_hub.verdicts import read_verdicts

EPS = "40/255"


def trained(folder, splits, **changes):
    """A run with seed 1; its export."""
    write_images(folder / "data", count=120, splits=splits)
    changes = {"seed": 1, "epochs": 1, "max_steps": 1, "eps": EPS, "attack_steps": 1} | changes
    finetune(tiny_config(folder, **changes))
    return folder / "run" / "export"


@pytest.fixture(scope="module")
def held_out(tmp_path_factory):
    """Of a dataset without a test split."""
    folder = tmp_path_factory.mktemp("held-out")
    return folder, trained(folder, ("train",))


def evaluate_again(folder, export, *words, dataset="data"):
    output = folder / f"eval-{len(list(folder.glob('eval-*')))}"
    fixed = ["--eps", EPS, "--no-checks", "--no-figures", "--teacher", "none", "--output-dir", str(output)]
    assert run_cli(eval_command, [str(export), "--dataset", str(folder / dataset), *fixed, *words]) == 0
    return output


def contents(export):
    return {path.name: path.read_bytes() for path in export.iterdir() if path.is_file()}


def test_test_images_held_out_of_the_training_images_are_the_runs(held_out, capsys):
    folder, export = held_out
    splits = load_splits(str(folder / "data"), seed=1, validation_size=12)
    before = read_verdicts(export / "verdicts.parquet").index
    output = evaluate_again(folder, export, "--attacks", "clean,noise")
    assert "those that training with seed 1 left out" in capsys.readouterr().out
    index = read_verdicts(output / "verdicts.parquet").index.tolist()
    assert index == sorted(splits.test.row_array()) == before.tolist()
    assert not set(index) & set(splits.train.row_array())
    assert {row.attack for row in read_results(export / "results.json").results} >= {None, "noise"}


def test_another_dataset_of_as_many_images_was_not_trained_on(held_out, tmp_path):
    _, export = held_out
    write_images(tmp_path / "other", count=120, size=9, splits=("train",))
    output = tmp_path / "eval"
    arrest_hub.evaluate(
        str(export), str(tmp_path / "other"), attacks="clean", teacher=None, checks=False, output_dir=str(output)
    )
    drawn = load_splits(str(tmp_path / "other"), seed=0).test.row_array()
    assert read_verdicts(output / "verdicts.parquet").index.tolist() == drawn.tolist()
    write_images(tmp_path / "data", count=120, size=9, splits=("train",))
    with pytest.raises(ConfigError, match="when it held other images or labels"):
        arrest_hub.evaluate(str(export), str(tmp_path / "data"), attacks="clean", teacher=None)


def test_a_renamed_dataset_is_known_by_its_contents(held_out, tmp_path):
    folder, export = held_out
    shutil.copytree(folder / "data", tmp_path / "other")
    output = tmp_path / "eval"
    arrest_hub.evaluate(
        str(export), str(tmp_path / "other"), attacks="clean", teacher=None, checks=False, output_dir=str(output)
    )
    expected = read_verdicts(export / "verdicts.parquet").index
    assert read_verdicts(output / "verdicts.parquet").index.tolist() == expected.tolist()


def test_images_drawn_from_a_dataset_that_has_grown_may_have_been_trained_on(held_out, tmp_path):
    _, export = held_out
    write_images(tmp_path / "data", count=150, splits=("train",))
    with pytest.raises(
        ConfigError, match=r"when it held other images or labels.*may have been trained on\. Give --eval"
    ):
        arrest_hub.evaluate(str(export), str(tmp_path / "data"), attacks="clean", teacher=None)


def test_the_teacher_and_the_checkpoints_of_a_run_were_trained_on_its_images(tmp_path):
    export = trained(tmp_path, ("train",), standard_epochs=1, eval_every=1)
    expected = read_verdicts(export / "verdicts.parquet").index.tolist()
    models = [tmp_path / "run" / "teacher", *sorted((tmp_path / "run" / "checkpoints").glob("best-*"))]
    assert len(models) == 2
    for number, model in enumerate(models):
        output = tmp_path / f"eval-{number}"
        arrest_hub.evaluate(
            str(model), str(tmp_path / "data"), attacks="clean", teacher=None, checks=False, output_dir=str(output)
        )
        assert read_verdicts(output / "verdicts.parquet").index.tolist() == expected


def test_nor_are_those_of_a_run_whose_final_evaluation_failed_taken_for_others(tmp_path):
    """An image to be evaluated that cannot be read ends the run: another in its place lets it go on, and what lies
    there meanwhile does not pass for a model that was trained on other images."""
    for number, name in enumerate(NAMES * 20):
        (tmp_path / "data" / name).mkdir(parents=True, exist_ok=True)
        colour = (60 + 70 * (number % 3) + number // 3,) * 3
        PILImage.new("RGB", (8, 8), colour).save(tmp_path / "data" / name / f"{number:02}.png")
    row = int(load_splits(str(tmp_path / "data"), seed=1, validation_size=6).test.row_array()[0])
    path = sorted((tmp_path / "data").rglob("*.png"))[row]
    whole = path.read_bytes()
    path.write_bytes(b"garbage")
    model = write_model(tmp_path / "model", sorted(NAMES))
    config = tiny_config(tmp_path, model=str(model), seed=1, epochs=1, validation_size=6)
    with pytest.raises(ImageError, match="Repair it, or put another image in its place"):
        finetune(config)
    export = tmp_path / "run" / "export"
    assert (export / "model.safetensors").is_file()
    path.unlink()
    with pytest.raises(ConfigError, match="when it held other images or labels"):
        arrest_hub.evaluate(str(export), str(tmp_path / "data"), attacks="clean", teacher=None)
    path.write_bytes(whole)
    assert finetune(replace(config, resume=True)).report.get("clean_accuracy").n == 6


def test_training_images_do_not_replace_the_held_out_ones(held_out, capsys):
    folder, export = held_out
    before = contents(export)
    attacks = ",".join(row.attack or "clean" for row in read_results(export / "results.json").results)
    evaluate_again(folder, export, "--eval-split", "train", "--attacks", attacks)
    assert "is left as it is, its figures would not stand beside these: images 12 of data" in capsys.readouterr().out
    assert contents(export) == before


@pytest.mark.parametrize(
    ("trained_on", "given", "same"),
    [
        ("org/data", "org/data@main", True), ("org/data@v1", "org/data:default", True),
        ("org/data:a", "org/data", True), ("org/data:a", "org/data:b", False), ("org/data", "org/other", False),
        ("cifar10", "uoft-cs/cifar10@main", True), ("cifar10:plain_text", "cifar10", True),
        ("cifar10", "cifar100", False), ("data", "data", True), ("data", "other", False), ("digits", "digits", True),
    ],
)  # fmt: skip
def test_a_dataset_is_known_again_however_it_is_written(tmp_path, trained_on, given, same):
    write_model(tmp_path / "model")
    record = TrainingRecord(None, TrainingData("data", "train", 3), "", 1, 1, 1.0, 1.0, 1, "CPU", {})
    record.write(tmp_path / "model" / "training_record.json")
    (tmp_path / "model" / "training_config.yaml").write_text(f"seed: 7\ndataset: {trained_on}\n")
    backbone = arrest_hub.load_backbone(str(tmp_path / "model"))
    assert held_out_seed(backbone, "model", given, "train") == (7 if same else None)


@pytest.mark.parametrize("training", ["[]", "seed: x", "{"])
def test_a_damaged_training_configuration_is_one_clear_error(held_out, training):
    folder, export = held_out
    path = export / "training_config.yaml"
    before = path.read_text()
    try:
        path.write_text(training)
        with pytest.raises(BackboneError, match=r"training_config\.yaml is damaged: it does not tell what"):
            arrest_hub.evaluate(str(export), str(folder / "data"), attacks="clean", teacher=None)
    finally:
        path.write_text(before)


def test_the_held_out_part_of_a_stream_is_not_drawn_again(tmp_path):
    export = trained(tmp_path, ("train",), streaming=True)
    with pytest.raises(ConfigError, match=r"as a stream, of which the first images were held out.*--eval-split"):
        arrest_hub.evaluate(str(export), str(tmp_path / "data"), attacks="clean", teacher=None)
    write_images(tmp_path / "other", count=60, splits=("train",))
    report = arrest_hub.evaluate(str(export), str(tmp_path / "other"), attacks="clean", teacher=None, checks=False)
    assert report.results[0].n == 6, "another dataset was not trained on"


def test_all_of_a_split_was_trained_on(tmp_path):
    """The training had another split for its test, so nothing of this one was left out."""
    write_images(tmp_path / "files", count=120)
    splits = [Dataset.from_parquet(str(next((tmp_path / "files").glob(f"{name}-*")))) for name in ("train", "test")]
    DatasetDict(dict(zip(("train", "extra"), splits, strict=True))).save_to_disk(str(tmp_path / "data"))
    finetune(tiny_config(tmp_path, eval_split="extra", epochs=1, max_steps=1, eps=EPS, attack_steps=1))
    export = tmp_path / "run" / "export"
    with pytest.raises(ConfigError, match=r"trained on all of 'train' .* give --eval-split extra"):
        arrest_hub.evaluate(str(export), str(tmp_path / "data"), attacks="clean", teacher=None)
    report = arrest_hub.evaluate(
        str(export), str(tmp_path / "data"), attacks="clean", teacher=None, checks=False, eval_split="extra"
    )
    assert report.results[0].n == 120


def test_a_training_configuration_of_others_says_nothing(held_out, tmp_path):
    """A repository may have a file of that name without being ours."""
    folder, _ = held_out
    write_model(tmp_path / "model")
    (tmp_path / "model" / "training_config.yaml").write_text("epochs: 90\n")
    report = arrest_hub.evaluate(
        str(tmp_path / "model"), str(folder / "data"), attacks="clean", teacher=None, checks=False
    )
    assert report.results[0].n == 12


def test_images_of_another_draw_do_not_come_onto_the_card(tmp_path, capsys):
    export = trained(tmp_path, ("train", "test"), limit_eval=24)
    before = contents(export)
    evaluate_again(tmp_path, export, "--limit-eval", "24", "--attacks", "clean,noise")
    assert "other images of the split, drawn with another --seed" in capsys.readouterr().out
    assert contents(export) == before
    evaluate_again(tmp_path, export, "--limit-eval", "24", "--attacks", "clean,noise", "--seed", "1")
    assert {row.attack for row in read_results(export / "results.json").results} >= {None, "noise"}


@pytest.mark.parametrize(
    ("name", "content"),
    [("verdicts.parquet", b"PAR1"), ("results.json", b'{"format": 1')],
)
def test_a_damaged_file_in_the_models_folder_does_not_spoil_the_evaluation(held_out, name, content, capsys):
    folder, export = held_out
    before = (export / name).read_bytes()
    try:
        (export / name).write_bytes(content)
        output = evaluate_again(folder, export, "--attacks", "clean,noise")
        assert "is left as it is, since a file in it is damaged" in capsys.readouterr().out
        assert (export / name).read_bytes() == content
        assert (output / "results.json").is_file()
        assert not (output / "progress").exists()
    finally:
        (export / name).write_bytes(before)


def test_a_card_that_is_not_utf8_was_edited_by_hand(held_out, capsys):
    folder, export = held_out
    card = export / "README.md"
    before = card.read_bytes()
    try:
        card.write_bytes(before + "caf\u00e9".encode("latin-1"))
        evaluate_again(folder, export, "--attacks", "clean,noise")
        assert "README.md was edited and is left as it is" in capsys.readouterr().out
        assert run_cli(card_command, [str(export)], resumes=False) == 2
        assert "was edited by hand: give --overwrite" in capsys.readouterr().err
        assert card.read_bytes() != before
    finally:
        card.write_bytes(before)


class Killed(BaseException):
    pass


def other_pixels(folder):
    pixels = np.random.default_rng(5).integers(0, 255, (48, 8, 8, 3)).astype(np.uint8)
    features = Features({"img": Image(), "label": ClassLabel(names=NAMES)})
    columns = {"img": [PILImage.fromarray(image) for image in pixels], "label": [number % 3 for number in range(48)]}
    (file,) = (folder / "data").glob("test-*.parquet")
    Dataset.from_dict(columns, features=features).to_parquet(str(file))


def other_teacher(folder):
    backbone = tiny_backbone(3)
    backbone.label_names = NAMES
    write_model_folder(backbone, folder / "teacher")


def other_mean(folder):
    path = folder / "model" / "config.json"
    config = json.loads(path.read_text())
    config["pretrained_cfg"]["mean"] = [0.9, 0.9, 0.9]
    path.write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("change", "named"), [(other_pixels, "pixels"), (other_teacher, "teacher's weights"), (other_mean, "preprocessing")]
)
def test_an_evaluation_does_not_go_on_with_something_else(tmp_path, monkeypatch, capsys, change, named):
    write_images(tmp_path / "data")
    write_model(tmp_path / "model")
    write_model(tmp_path / "teacher")
    places = {"--dataset": "data", "--teacher": "teacher", "--output-dir": "eval"}
    words = [str(tmp_path / "model"), "--attacks", "clean,noise", "--no-checks", "--no-figures"]
    words += [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
    plain = Journal.add

    def add(self, stage, number, entry):
        if stage.startswith("noise"):
            raise Killed
        plain(self, stage, number, entry)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "add", add)
        with pytest.raises(Killed):
            run_cli(eval_command, words)
    change(tmp_path)
    assert run_cli(eval_command, [*words, "--resume"]) == 2
    assert named in capsys.readouterr().err


def reversed_model(folder):
    """The same network as `write_model`'s, its classes in reverse order."""
    backbone = tiny_backbone(3)
    backbone.load_state_dict(pretrained_state(3))
    backbone.label_names = NAMES[::-1]
    with torch.no_grad():
        for layer in backbone.head.classifiers:
            layer.weight.copy_(layer.weight.flip(0))
            layer.bias.copy_(layer.bias.flip(0))
    write_model_folder(backbone, folder)
    return str(folder)


def test_a_loaded_model_is_evaluated_as_its_folder_is(tmp_path):
    """With its own size and classes."""
    write_images(tmp_path / "data", size=16)
    write_model(tmp_path / "model")
    reverse = reversed_model(tmp_path / "reverse")
    options = {"attacks": "clean,noise", "teacher": None, "checks": False}
    for model, match in ((str(tmp_path / "model"), "auto"), (reverse, "name")):
        networks = (model, arrest_hub.from_pretrained(model), arrest_hub.load_backbone(model))
        reports = [
            arrest_hub.evaluate(network, str(tmp_path / "data"), label_match=match, **options) for network in networks
        ]
        assert len({tuple(row.correct for row in report.results) for report in reports}) == 1
        assert reports[0].preprocessing == reports[1].preprocessing == reports[2].preprocessing != {}


def test_a_loaded_model_sees_a_picture_as_an_evaluation_does(tmp_path):
    """Turned upright by its EXIF orientation, 16 bits scaled to 8."""
    write_model(tmp_path / "model")
    network = arrest_hub.from_pretrained(str(tmp_path / "model"))
    turned, exif = PILImage.effect_noise((16, 16), 99).convert("RGB"), PILImage.Exif()
    exif[0x0112] = 6
    turned.save(tmp_path / "turned.png", exif=exif)
    PILImage.fromarray(np.linspace(0, 65535, 256).reshape(16, 16).astype(np.uint16)).save(tmp_path / "grey.png")
    for path in (tmp_path / "turned.png", tmp_path / "grey.png"):
        pixels = network.preprocess(PILImage.open(path))
        assert torch.equal(pixels, network.preprocess(decode_image(path.read_bytes())))
        assert pixels.std() > 0.1
        assert network.classify(PILImage.open(path)) == network.classify(decode_image(path.read_bytes()))
    with pytest.raises(ImageError, match="floating point"):
        network.preprocess(PILImage.new("F", (16, 16)))


def test_a_teacher_whose_classes_are_in_another_order_is_refused(tmp_path):
    write_images(tmp_path / "data")
    write_model(tmp_path / "model")
    with pytest.raises(ConfigError, match="has the model's classes in another order"):
        arrest_hub.evaluate(
            str(tmp_path / "model"), str(tmp_path / "data"), teacher=reversed_model(tmp_path / "reverse")
        )


def test_options_that_would_do_nothing_are_refused(tmp_path):
    write_model(tmp_path / "model")
    network = arrest_hub.from_pretrained(str(tmp_path / "model"))
    pair = torch.rand(4, 3, 8, 8), torch.arange(4) % 3
    with pytest.raises(ConfigError, match=r"(?s)limit_eval is for a dataset with a name.*image_size: the network has"):
        arrest_hub.evaluate(network, pair, limit_eval=2, image_size=16)


def test_grey_images_are_not_taken_for_coloured_ones(tmp_path):
    """The normalisation of a colour model would broadcast them, and an attack change one channel instead of three."""
    write_model(tmp_path / "model")
    grey = torch.rand(4, 1, 8, 8), torch.arange(4) % 3
    network = arrest_hub.from_pretrained(str(tmp_path / "model"))
    for model, teacher in ((str(tmp_path / "model"), None), (network, None), (GreyNet(), network)):
        with pytest.raises(ConfigError, match=r"images of 1 channels: .* takes RGB ones"):
            arrest_hub.evaluate(model, grey, teacher=teacher)
    arrest_hub.evaluate(GreyNet(), grey, teacher=None, attacks="noise", checks=False)
    with pytest.raises(ConfigError, match=r"images of 16x10 pixels: .* takes 8x8"):
        arrest_hub.evaluate(network, (torch.rand(4, 3, 16, 10), torch.arange(4) % 3), teacher=None)


class GreyNet(torch.nn.Module):
    def forward(self, pixels):
        return pixels.mean((2, 3)) * torch.ones(3)
