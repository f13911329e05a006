"""--dry-run and --batch-size auto: what is said before a run is what the run then takes."""

import json
import re
import time
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator
from test_train import files, log_lines, same_weights, vit_folder
from tiny import NAMES, tiny_backbone, tiny_config

from arrest_hub import estimate, plan, train
from arrest_hub.cli import finetune_command, parse_finetune
from arrest_hub.command import run_cli
from arrest_hub.config import FinetuneConfig
from arrest_hub.config_sources import load_config, resume_config
from arrest_hub.errors import ConfigError
from arrest_hub.estimate import idle_optimizer, largest_batch, measure_evaluation, measure_steps
from arrest_hub.prepare import new_accelerator
from arrest_hub.train import dry_run, finetune
from arrest_hub.validation import PgdSettings


def said(lines, subject):
    (line,) = [line for line in lines if line.startswith(subject)]
    return line


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "sgdc"])
def test_what_is_only_timed_stays_as_it_is(optimizer):
    """To the last bit: a weight of 0 that becomes nearly 0 makes denormal gradients, and steps ten times as long."""
    student = tiny_backbone()
    torch.nn.init.zeros_(student.body.layer4[0].bn2.weight)
    before = {name: value.clone() for name, value in student.named_parameters()}
    idle = idle_optimizer(FinetuneConfig(model="m", dataset="d", optimizer=optimizer), student)
    for _ in range(2):
        student(torch.rand(2, 3, 8, 8)).logits.sum().backward()
        idle.step()
    assert all(torch.equal(value, before[name]) for name, value in student.named_parameters())
    assert idle.state, "it did its work"


# --- the batch that fits --------------------------------------------------------------------------------


def line(fixed, each, breaks=None):
    """Peaks that grow with the batch, and the batches that were tried; out of memory from ``breaks`` on."""
    tried = []

    def peak_of(batch):
        tried.append(batch)
        return None if breaks is not None and batch >= breaks else fixed + each * batch

    return peak_of, tried


@pytest.mark.parametrize(
    ("fixed", "each", "breaks", "limit", "cap", "expected", "tries"),
    [
        (100, 10, None, 1100, 1024, 96, 3),  # 100 would fit; a multiple of eight
        (100, 10, None, 1e9, 256, 256, 3),  # the cap
        (100, 10, None, 1e9, 5, 5, 1),
        (100, 10, 60, 1100, 1024, 56, 5),  # memory ends sooner than the line says: 96, 76, 60, 48...
        (100, 0, None, 1100, 64, 64, 3),
        (100, 10, 16, 1e9, 1024, 8, 2),
        (100, 10, 4, 1e9, 1024, 2, None),
        (100, 10, 3, 1e9, 3, 2, None),
        (100, 10, 3, 1e9, 7, 2, None),
        (100, 100, None, 1000, 1024, 8, 2),
    ],
)
def test_the_largest_batch(fixed, each, breaks, limit, cap, expected, tries):
    peak_of, tried = line(fixed, each, breaks)
    found = largest_batch(peak_of, limit, cap)
    assert found <= expected
    assert found >= expected - 8
    assert breaks is None or found < breaks
    assert fixed + each * found <= limit
    if tries is not None:
        assert len(tried) <= tries


def test_not_even_two_images():
    with pytest.raises(ConfigError, match=r"not even two images.*--grad-checkpointing"):
        largest_batch(line(100, 10, 2)[0], 1e9, 1024)
    with pytest.raises(ConfigError, match="not even two"):
        largest_batch(line(100, 10)[0], 50, 1024)


def test_processes_of_a_machine_share_its_memory(monkeypatch):
    accelerator = Accelerator(cpu=True)
    monkeypatch.setattr(estimate, "_status", lambda name: 0)
    alone = estimate.memory_limit(accelerator)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert estimate.memory_limit(accelerator) == pytest.approx(alone / 4, rel=0.2), "others use it meanwhile"


def test_auto_is_a_number_from_then_on(tmp_path, monkeypatch, capsys):
    """The run is that with the number given, bit for bit, and so is what goes on from it."""
    monkeypatch.setattr(estimate, "memory_limit", lambda accelerator: int(1e12))
    changes = {"max_steps": 1, "log_every": 1}
    finetune(tiny_config(tmp_path, batch_size="auto", output_dir=str(tmp_path / "auto"), **changes))
    assert "--batch-size auto: 32" in capsys.readouterr().out, "of 36 images, a multiple of eight"
    assert load_config(tmp_path / "auto" / "config.yaml").batch_size == 32
    finetune(tiny_config(tmp_path, batch_size=32, output_dir=str(tmp_path / "given"), **changes))
    assert same_weights(tmp_path / "auto", tmp_path / "given")
    assert log_lines(tmp_path / "auto") == log_lines(tmp_path / "given")
    saved = load_config(tmp_path / "auto" / "config.yaml")
    assert resume_config(saved, {"batch_size": "auto"}).batch_size == 32


def test_the_smallest_of_all_processes(tmp_path, monkeypatch):
    """What does not fit in one process is not tried in the others again."""
    config, accelerator, network = tiny_config(tmp_path).validate(), new_accelerator(), tiny_backbone()

    def costly(config, accelerator, network, build, batch_size, *, steps):
        if batch_size > 20:
            raise torch.OutOfMemoryError
        return estimate.Cost([1.0], batch_size)

    monkeypatch.setattr(estimate, "measure_steps", costly)
    monkeypatch.setattr(estimate, "any_process", lambda accelerator, flag: True)
    with pytest.raises(ConfigError, match="not even two"):
        estimate.choose_batch_size(config, accelerator, network, None, 1000)


def test_what_was_compiled_to_choose_a_batch_does_not_serve_the_run(tmp_path, monkeypatch):
    """Graphs for batches of any size would, and are slower."""
    of_any_size = []

    def traced(graph, inputs):
        of_any_size.append(any(isinstance(x, torch.SymInt) for x in inputs))
        return graph

    def compiled(batch_size):
        network = torch.nn.Linear(3, 3)
        network.compile(backend=traced)
        network(torch.ones(batch_size, 3))

    def measured(config, accelerator, network, build, batch_size, *, steps):
        compiled(batch_size)
        return estimate.Cost([1.0], 1)

    monkeypatch.setattr(estimate, "measure_steps", measured)
    monkeypatch.setattr(estimate, "memory_limit", lambda accelerator: int(1e12))
    config = tiny_config(tmp_path, compile=True).validate()
    chosen = estimate.choose_batch_size(config, new_accelerator(), tiny_backbone(), None, 1000)
    assert any(of_any_size)
    of_any_size.clear()
    compiled(chosen)
    assert of_any_size == [False]


def test_a_device_whose_memory_cannot_be_told(tmp_path):
    accelerator = Mock(device=torch.device("mps"), num_processes=1)
    accelerator.state.fsdp_plugin = None
    with pytest.raises(ConfigError, match="'mps' has left cannot be told"):
        estimate.choose_batch_size(tiny_config(tmp_path).validate(), accelerator, tiny_backbone(), None, 1000)


@pytest.mark.parametrize("word", ["auto", "Auto", "many", "1", "2.5"])
def test_what_a_batch_size_may_be(word):
    flags = ["--model", "resnet18_cifar", "--dataset", "digits", "--batch-size", word]
    if word == "auto":
        assert parse_finetune(flags)[0].batch_size == "auto"
        return
    with pytest.raises(ConfigError, match=r"--batch-size .* at least 2, or auto"):
        parse_finetune(flags)


def test_auto_comes_from_a_recipe_too(tmp_path):
    (tmp_path / "mine.yaml").write_text("model: resnet18_cifar\ndataset: digits\nbatch_size: auto\n")
    assert parse_finetune(["--recipe", str(tmp_path / "mine.yaml")])[0].batch_size == "auto"
    assert FinetuneConfig(model="x", dataset="y", batch_size="auto").validate().batch_size == "auto"


# --- the plan -------------------------------------------------------------------------------------------


def test_measuring_leaves_no_trace(tmp_path):
    config, network = tiny_config(tmp_path, ema_decay=0.9).validate(), tiny_backbone(len(NAMES))
    accelerator = new_accelerator(gradient_accumulation_steps=3)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    torch.manual_seed(7)
    state = torch.get_rng_state()
    cost = measure_steps(
        config, accelerator, network, lambda teacher: train.build_objective(config, teacher), 4, steps=2
    )
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], value) for name, value in network.state_dict().items())
    assert all(parameter.grad is None for parameter in network.parameters())
    assert (accelerator.gradient_accumulation_steps, accelerator.step) == (3, 0)
    assert len(cost.seconds) == 2
    assert 0 < cost.median < 5
    assert cost.peak is None or cost.peak > 1e6
    momentum = sum(4 * parameter.numel() for parameter in network.parameters())
    assert cost.optimizer_state == momentum


@pytest.mark.parametrize(
    "changes",
    [{}, {"mixed_precision": "bf16"}, {"method": "trades", "grad_accum_steps": 2},
     {"streaming": True, "max_steps": 5, "eval_every": 0},
     {"model": "resnet18_cifar", "model_args": {"channels": [16, 16, 16, 16]}, "image_size": 8, "standard_epochs": 2}],
    ids=["arrest", "bf16", "trades", "streaming", "standard"],
)  # fmt: skip
def test_a_plan_is_said_and_nothing_is_written(changes, tmp_path, capsys):
    config = tiny_config(tmp_path, dry_run=True, push_to_hub="me/x", **changes)
    before = files(tmp_path)
    lines = dry_run(config)
    assert files(tmp_path) == before
    out = capsys.readouterr().out
    assert all(text in out for text in lines)
    for subject in ("estimate", "memory", "data", "training", "in all", "disk", "batch"):
        assert said(lines, subject)
    assert ("clean phase" in "\n".join(lines)) == ("standard_epochs" in changes)
    assert ("validation" in "\n".join(lines)) == ("eval_every" not in changes)
    steps = {"streaming": 5}.get(next(iter(changes), ""), 4 if "grad_accum_steps" in changes else 8)
    assert f"({steps} steps)" in said(lines, "training")
    if not changes:  # the checkpoint is as large as was said, but for headers
        finetune(tiny_config(tmp_path))
        sizes = [path.stat().st_size for path in (tmp_path / "run" / "checkpoints" / "step-000008").iterdir()]
        claimed = float(re.search(r"([\d.]+) MB a checkpoint", said(lines, "disk"))[1])
        assert claimed - 0.1 < sum(sizes) / 1e6 < claimed + 0.15


def test_a_bad_configuration_fails_as_the_run_would(tmp_path):
    with pytest.raises(ConfigError, match="--batch-size 4096 is larger than the training split"):
        dry_run(tiny_config(tmp_path, batch_size=4096, dry_run=True))


def test_the_time_that_is_said_is_the_time_it_takes(tmp_path):
    """Within a factor of three: this is a machine that does other things, too."""
    changes = {
        "model": vit_folder(tmp_path / "vit"),
        "attack_steps": 50,
        "batch_size": 18,
        "eval_every": 0,
        "lr": 1e-6,
    }
    lines = dry_run(tiny_config(tmp_path, dry_run=True, **changes))
    predicted = float(re.search(r"images: ([\d.e-]+) s", said(lines, "estimate"))[1])
    finetune(tiny_config(tmp_path, epochs=4, log_every=8, checkpoint_every=1000, limit_eval=3, **changes))
    lines = [json.loads(text) for text in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    real = 18 / next(line["images_per_second"] for line in lines if "images_per_second" in line)
    assert predicted / 3 < real < 3 * predicted


def test_the_flag(tmp_path, capsys):
    config = tiny_config(tmp_path)
    words = ["--model", config.model, "--dataset", config.dataset, "--output-dir", config.output_dir]
    words += ["--batch-size", "8", "--num-workers", "0", "--attack-steps", "1", "--dry-run"]
    assert run_cli(finetune_command, words) == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_gradients_are_not_scaled_where_only_time_is_measured(tmp_path, monkeypatch):
    """As fp16 has it: one that overflowed would make the weights NaN, and no step would be as in the run."""
    made = []

    class Kept(estimate.Rehearsal):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(self)

    monkeypatch.setattr(estimate, "Rehearsal", Kept)
    config, accelerator, network = tiny_config(tmp_path).validate(), new_accelerator(), tiny_backbone(len(NAMES))
    scaler = accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=float("inf"))
    measure_steps(config, accelerator, network, lambda teacher: train.build_objective(config, teacher), 4, steps=1)
    assert accelerator.scaler is scaler
    pairs = zip(made[0].student.parameters(), network.parameters(), strict=True)
    assert all(torch.equal(one, other) for one, other in pairs)


def test_an_evaluation_is_timed_in_the_precision_that_it_will_have(tmp_path):
    """The final one in fp32, whatever the training's."""
    config = tiny_config(tmp_path, mixed_precision="bf16", fold_batchnorm=False).validate()
    accelerator, network, seen = new_accelerator(mixed_precision="bf16"), tiny_backbone(len(NAMES)), []
    network.register_forward_hook(lambda *_: seen.append(torch.is_autocast_enabled("cpu")))
    for training, lower in ((None, False), (config, True)):
        seen.clear()
        assert measure_evaluation(accelerator, network, 4, PgdSettings("linf", 0.1, 0.1, 1), training) > 0
        assert set(seen) == {lower}
    assert accelerator.native_amp


def test_compiling_is_not_taken_for_evaluating(tmp_path, monkeypatch):
    """It is done once, for the passes with and without gradients, and would be counted for every image."""

    def compile_slowly(module):
        known = set()

        def once(*_):
            if torch.is_grad_enabled() not in known:
                known.add(torch.is_grad_enabled())
                time.sleep(2)

        module.register_forward_hook(once)

    monkeypatch.setattr(torch.nn.Module, "compile", compile_slowly)
    config = tiny_config(tmp_path, compile=True, fold_batchnorm=False).validate()
    settings = PgdSettings("linf", 0.1, 0.1, 2)
    assert 4 * measure_evaluation(new_accelerator(), tiny_backbone(len(NAMES)), 4, settings, config) < 1.9


@pytest.mark.parametrize(
    ("changes", "times"),
    [({"epochs": 10, "max_steps": 2}, 1), ({"epochs": 5, "eval_every": 3}, 2), ({"epochs": 4, "eval_every": 2}, 2),
     ({"epochs": 3, "max_steps": 9}, 3), ({"streaming": True, "max_steps": 9, "epochs": 3}, 3)],
)  # fmt: skip
def test_as_many_validations_are_said_as_there_will_be(changes, times, tmp_path, monkeypatch):
    monkeypatch.setattr(plan, "choose_batch_size", Mock(return_value=1))
    lines = dry_run(tiny_config(tmp_path, dry_run=True, attack_steps=1, **changes))
    assert f"({times} x 12 images)" in said(lines, "validation")
    finetune(tiny_config(tmp_path, attack_steps=1, limit_eval=3, **changes))
    assert sum("validation_clean_accuracy" in line for line in log_lines(tmp_path / "run")) == times


def test_auto_leaves_batches_enough_for_a_step(tmp_path):
    finetune(tiny_config(tmp_path, batch_size="auto", grad_accum_steps=3, limit_eval=3))
    assert load_config(tmp_path / "run" / "config.yaml").batch_size <= 12
    late = {"batch_size": "auto", "max_steps": 1, "ema_decay": 0.9, "ema_start_epoch": 1}
    with pytest.raises(ConfigError, match="the training ends at --max-steps 1"):
        finetune(tiny_config(tmp_path, output_dir=str(tmp_path / "late"), **late))
