"""What runs on a GPU, on one that is simulated: every tensor and generator is where it belongs, the figures are those
of a CPU, and a step hardly ever waits."""

import json

import pytest
import torch
from cifar10_suites import ON_GPU
from PIL import Image
from safetensors.torch import load_file
from simulated_gpu import GPU, NAME, Mixed, OnGpu, memory, simulated_gpu, waited
from test_processes import Imagined
from tiny import LogitsOnly, killed_after, patterns, robust_net, tiny_backbone, tiny_config

import arrest_hub
from arrest_hub import epoch_batches, loop, masking, plan
from arrest_hub.config_sources import load_config
from arrest_hub.errors import ArrestError
from arrest_hub.evaluator import Evaluator, TensorImages
from arrest_hub.journal import Journal
from arrest_hub.prepare import new_accelerator
from arrest_hub.processes import AnyProcessBefore, any_process
from arrest_hub.train import finetune

pytestmark = pytest.mark.skipif(torch.backends.mps.is_built(), reason="Accelerate would take Apple's device instead")
ALL = {"mixed_precision": "fp16", "standard_epochs": 1, "ema_decay": 0.9, "awp_gamma": 0.01, "eps_spread": 0.5,
       "clip_grad": 1.0, "checkpoint_every": 1}  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the tiny data and model are, written on the CPU."""
    path = tmp_path_factory.mktemp("gpu")
    tiny_config(path)
    return path


def train(folder, name, **changes):
    """The exported weights of a run, and its log."""
    options = {"limit_eval": 6, "output_dir": str(folder / name), "images_at_once": 8, **changes}
    run = finetune(tiny_config(folder, **options))
    lines = [json.loads(line) for line in (folder / name / "log.jsonl").read_text().splitlines()]
    return load_file(run.export / "model.safetensors"), [line for line in lines if "loss" in line], run


def test_the_simulation_refuses_what_a_gpu_refuses():
    with simulated_gpu():
        here = torch.ones(3)
        there = here.to(GPU)
        assert isinstance(there, OnGpu)
        assert (there.device, (2 * there).device, there.cpu().device) == (GPU, GPU, torch.device("cpu"))
        assert isinstance(torch.zeros(2, device=GPU), OnGpu)
        for mix in (
            lambda: there + here,
            lambda: torch.nn.functional.linear(there, here[None]),
            lambda: here[there.long()],
            lambda: torch.cat([there, here]),
            lambda: there.uniform_(generator=torch.Generator()),
            lambda: torch.rand(2, generator=torch.Generator(device=GPU)),
        ):
            with pytest.raises(Mixed):
                mix()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()
        assert torch.equal((there + torch.tensor(1.0)).cpu(), here + 1)
    assert not torch.cuda.is_available()


def test_a_run_is_that_on_a_cpu(folder):
    expected, _, _ = train(folder, "cpu", ema_decay=0.9)
    with simulated_gpu():
        found, log, run = train(folder, "gpu", ema_decay=0.9)
    assert run.report.hardware == f"1 x {NAME}"
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert all(0 < line["peak_memory_gb"] < 0.1 for line in log)


def test_a_run_of_every_ingredient_in_fp16_goes_on_where_it_was_killed(folder):
    with simulated_gpu():
        expected, log, _ = train(folder, "whole", **ALL)
        assert all("mfu" in line for line in log), "of a GPU whose speed is known"
        with killed_after(11):  # the seventh step of the robust phase
            train(folder, "part", **ALL)
        found, _, _ = train(folder, "part", resume=True, **ALL)
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    assert log[-1]["skipped_steps"] == 0


@pytest.mark.parametrize(
    "changes",
    [
        {"method": "trades", "mixed_precision": "bf16"},
        {"method": "at", "norm": "l2", "eps": "0.5", "eps_spread": 0.5, "grad_accum_steps": 2},
        {"rgkd_input": "clean", "replay_with": "clean", "attack_stop_after": 1, "optimizer": "adamw", "init": "random"},
        {"streaming": True, "limit_train": 24, "validation_size": 0, "eval_every": 0, "export_weights": "last",
         "freeze_head": True, "replay_by": "batch"},
        {"batch_size": "auto", "fold_batchnorm": False, "augment": "randaugment", "figures": True},
    ],
    ids=lambda changes: "-".join(map(str, changes)),
)  # fmt: skip
def test_every_way_of_training_runs(folder, changes, request):
    with simulated_gpu():
        _, log, run = train(folder, request.node.callspec.id[:40], epochs=1, **changes)
    assert run.report.hardware == f"1 x {NAME}"
    assert all(torch.isfinite(torch.tensor(line["loss"])) for line in log)


WAITING = [
    ({}, 1),  # which images are replayed
    ({"replay_threshold": None}, 0),
    ({"method": "trades"}, 0),
    ({"ema_decay": 0.9, "awp_gamma": 0.01, "eps_spread": 0.5, "mixed_precision": "bf16"}, 1),
    ({"mixed_precision": "fp16"}, 2),  # and whether the gradients were finite, which the scaler asks
]


@pytest.mark.parametrize(("changes", "most"), WAITING)
def test_a_step_waits_for_the_gpu_only_for_what_it_must_know(folder, monkeypatch, changes, most):
    """From the end of a step to the end of the next, the loading of its images included."""
    steps, plain = [], loop.TrainingPhase._count_step

    def counted(self):
        plain(self)
        steps.append(list(waited))
        waited.clear()

    monkeypatch.setattr(loop.TrainingPhase, "_count_step", counted)
    name = f"waits-{WAITING.index((changes, most))}"
    with simulated_gpu():
        train(folder, name, epochs=1, log_every=1000, **changes)
    assert len(steps) == 4
    assert [len(step) for step in steps[1:-1]] == [most, most], "the first has what is before, the last writes a line"


def test_images_are_copied_to_the_gpu_without_waiting_for_it(folder, monkeypatch):
    """Those of a stream and of an evaluation too."""
    waited.clear()
    sizes = {"limit_train": 24, "validation_size": 0, "eval_every": 0, "export_weights": "last", "limit_eval": 6}
    seen, plain = [], epoch_batches.epoch_batches

    def batches(*args):
        for batch in plain(*args):
            seen.append("copy to the GPU" in waited)
            yield batch
            waited.clear()

    monkeypatch.setattr(loop, "epoch_batches", batches)
    with simulated_gpu():
        waited.clear()
        train(folder, "stream", epochs=1, streaming=True, **sizes)
        assert seen[1:] == [False] * 2
        accelerator = new_accelerator()
        images, journal = TensorImages(*patterns(12, 4)), Journal(None, {}, accelerator)
        evaluator = Evaluator(robust_net(), images, accelerator, journal, batch_size=4)
        waited.clear()
        for _, pixels, labels, _ in evaluator.batches(range(12), range(3)):
            assert (pixels.device, labels.device) == (GPU, GPU)
        assert not waited


def test_an_evaluation_gives_the_figures_of_a_cpu(tmp_path, monkeypatch, few_iterations):
    monkeypatch.setattr(masking, "SQUARE_QUERIES", 10)
    options = {"eps": "26/255", "attacks": "noise,pgd-3,apgd-ce", "check_images": 4}
    pair, reports = patterns(12, 4, seed=3), []
    for device in (simulated_gpu, torch.enable_grad):
        with device():
            options |= {"teacher": robust_net(), "output_dir": tmp_path / device.__name__}
            reports.append(arrest_hub.evaluate(robust_net(), pair, **options))
    gpu, cpu = reports
    assert gpu.hardware == f"1 x {NAME}"
    assert [row.correct for row in gpu.results] == [row.correct for row in cpu.results]
    assert [(check.name, check.status, check.value) for check in gpu.checks] == [
        (check.name, check.status, check.value) for check in cpu.checks
    ]
    assert len({row.correct for row in gpu.results}) > 1


def test_autoattack_as_the_suites_for_a_gpu_run_it_gives_the_figures_of_a_cpu(few_iterations, few_queries):
    """All four parts, the last batch a smaller one; in TF32, which a CPU refuses and the simulation does not round
    to."""
    flags = {name: value for name, value in ON_GPU.items() if name not in ("batch_size", "attack_precision")}
    assert (ON_GPU["attack_precision"], flags) == ("tf32", {"channels_last": True, "fold_batchnorm": True})
    options = {"eps": "20/255", "attacks": "autoattack", "checks": False, "batch_size": 3, "teacher": None, **flags}
    network = tiny_backbone(4)
    pixels = torch.rand(5, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        pair = pixels, network.eval()(pixels).logits.argmax(dim=1)
    with simulated_gpu():
        gpu = arrest_hub.evaluate(network, pair, attack_precision="tf32", **options)
    cpu = arrest_hub.evaluate(tiny_backbone(4), pair, **options)
    broken = [[part["broken"] for part in report.get("robust_accuracy").attack_parameters["parts"]]
              for report in (gpu, cpu)]  # fmt: skip
    assert (gpu.hardware, gpu.precision) == (f"1 x {NAME}", "fp32 (attacks in tf32 and folded), channels_last")
    assert broken[0] == broken[1]
    assert 0 < sum(broken[0]) < len(pixels), "some are attacked by all four"


@pytest.mark.parametrize(
    ("precision", "attacks", "tf32"),
    [("fp32", None, {False}), ("tf32", None, {True}), ("bf16", None, {False}), ("fp32", "tf32", {False, True})],
)
def test_an_evaluation_is_in_the_arithmetic_that_it_names(precision, attacks, tf32):
    seen = set()

    def look(logits):
        if len(logits) > 2:  # not the two images by which classes are counted
            seen.add((torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32))
        return logits

    options = {"attacks": "pgd-2", "checks": False, "teacher": tiny_backbone(4), "channels_last": True,
               "precision": precision, "attack_precision": attacks}  # fmt: skip
    with simulated_gpu():
        report = arrest_hub.evaluate(LogitsOnly(tiny_backbone(4), look), patterns(8, 4), **options)
    assert seen == {(allowed, allowed) for allowed in tf32}
    assert report.precision.startswith(precision)
    assert not torch.backends.cuda.matmul.allow_tf32


def test_a_loaded_model_classifies_where_it_is(folder):
    plain = arrest_hub.from_pretrained(str(folder / "model"))
    picture, pixels = Image.new("RGB", (8, 8), (200, 10, 10)), patterns(2, 3)[0]
    with torch.no_grad():
        expected = plain(pixels), plain.classify(picture)
    with simulated_gpu(), torch.no_grad():
        model = arrest_hub.from_pretrained(str(folder / "model")).to(GPU)
        found = model(pixels.to(GPU))
        assert found.device == GPU
        assert torch.equal(found.cpu(), expected[0])
        assert model.classify(picture) == expected[1]


def test_the_memory_is_what_is_held():
    with simulated_gpu(limit=10_000):
        first = torch.zeros(1000, device=GPU)
        view = first[10:]
        assert memory.used == 4000
        del first
        assert memory.used == 4000
        with pytest.raises(torch.OutOfMemoryError):
            torch.zeros(2000, device=GPU)
        assert torch.cuda.mem_get_info() == (6000, 10_000)
        del view
        assert (memory.used, torch.cuda.max_memory_allocated()) == (0, 4000)


def test_a_batch_that_is_chosen_fits_and_one_that_does_not_is_one_clear_error(folder):
    options = {"epochs": 1, "mixed_precision": "bf16", "images_at_once": None}
    with simulated_gpu(1_600_000):
        _, _, run = train(folder, "auto", batch_size="auto", **options)
    assert run.report.hardware == f"1 x {NAME}"
    assert 4 <= load_config(folder / "auto" / "config.yaml").batch_size < 32
    with simulated_gpu(1_600_000), pytest.raises(ArrestError, match=r"too little memory.*32 images is too large"):
        train(folder, "full", batch_size=32, **options)


def test_a_run_is_evaluated_in_smaller_batches_where_those_of_its_training_are_too_large(folder, capsys):
    """In fp32, which takes more than the bf16 of the training; an evaluation by itself says so instead."""
    options = {"epochs": 1, "mixed_precision": "bf16", "images_at_once": None, "batch_size": 32}
    with simulated_gpu(2_500_000):
        _, _, run = train(folder, "large", limit_eval=None, **options)
    assert run.report.results[0].n == 48
    assert "evaluated 16 images at a time" in capsys.readouterr().out
    options = {"attacks": "pgd-2", "checks": False, "teacher": None, "num_workers": 0}
    with simulated_gpu(2_500_000), pytest.raises(ArrestError, match="smaller --batch-size"):
        arrest_hub.evaluate(run.export, folder / "data", batch_size=32, **options)


def test_an_evaluation_is_estimated_by_whole_batches_on_a_gpu(folder, monkeypatch):
    """Of a few images a GPU takes as long as of many."""
    sizes, plain = [], plan.measure_evaluation

    def measured(accelerator, network, batch_size, *args, **options):
        sizes.append(batch_size)
        return plain(accelerator, network, batch_size, *args, **options)

    monkeypatch.setattr(plan, "measure_evaluation", measured)
    config = tiny_config(folder, batch_size=24, output_dir=str(folder / "planned"))
    arrest_hub.dry_run(config)
    assert set(sizes) == {16}
    sizes.clear()
    with simulated_gpu():
        arrest_hub.dry_run(config)
    assert set(sizes) == {24}


def test_processes_ask_each_other_without_waiting_for_the_gpu():
    """What is read is what was copied at the call before."""
    with simulated_gpu():
        several = Imagined(2)
        several.device = GPU
        told = AnyProcessBefore(several)
        waited.clear()
        assert [told(flag) for flag in (False, True, False)] == [False, False, True]
        assert not waited
        assert any_process(several, True)
        assert waited, "what is to be known now is waited for"
