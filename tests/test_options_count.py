"""Every option reaches what it is for: a training that ignores one, or computes in another mode, is found here."""

import pytest
import torch
from safetensors.torch import load_file
from tiny import LogitsOnly, patterns, robust_net, tiny_backbone, tiny_config, write_model

import arrest_hub
from arrest_hub import arrest, attack_stages, epoch_validation, loop, step, train
from arrest_hub.attack_stages import pgd_attack
from arrest_hub.attacks import AttackResult, margin, pgd, random_in_ball
from arrest_hub.baselines import Trades
from arrest_hub.export import weights_digest
from arrest_hub.schedule import make_scheduler
from arrest_hub.step import make_optimizer, make_teacher
from arrest_hub.train import build_objective, finetune
from arrest_hub.validation import Counts

OPTIONS = [
    {"lr": 0.04}, {"momentum": 0.5}, {"weight_decay": 0.1}, {"clip_grad": 0.01}, {"min_lr": 0.04},
    {"warmup_epochs": 0.5}, {"lr_hold": 0.9}, {"scheduler": "multistep"}, {"eps": "16/255"}, {"eps_train": "10/255"},
    {"eps_spread": 0.5}, {"attack_steps": 1}, {"attack_step_size": "1/255"}, {"attack_steps_start": 1},
    {"norm": "l2", "eps": "0.5"}, {"rgkd_weight": 1.0}, {"replay_threshold": 0.001}, {"rgkd_input": "clean"},
    {"label_smoothing": 0.2}, {"awp_gamma": 0.05}, {"freeze_head": True}, {"hflip": 0.0},
    {"augment": "trivialaugment"}, {"random_erasing": 1.0}, {"seed": 1}, {"init": "random"}, {"ema_decay": 0.5},
    {"grad_accum_steps": 2}, {"optimizer": "adamw"}, {"mixed_precision": "bf16"}, {"method": "at"},
    {"method": "trades"}, {"method": "trades", "trades_beta": 1.0}, {"method": "trades", "norm": "l2", "eps": "0.5"},
]  # fmt: skip


def test_no_two_options_train_the_same_network(tmp_path, monkeypatch):
    """By what is exported; the evaluation that would follow is left out."""

    def digest_of(config, paths, accelerator, splits, student, **others):
        return weights_digest(student)

    monkeypatch.setattr(train, "finish_run", digest_of)
    seen = {}
    for number, changes in enumerate([{}, *OPTIONS, {}]):
        fixed = {"validation_size": 0, "eval_every": 0, "epochs": 1, "output_dir": str(tmp_path / str(number))}
        digest = finetune(tiny_config(tmp_path, **(fixed | changes)))
        if number > len(OPTIONS):  # a digest that always differs would prove nothing
            assert seen[digest] == {}
            break
        assert digest not in seen, f"{changes} trains as {seen[digest]} does"
        seen[digest] = changes


def test_the_optimizer_is_as_configured(tmp_path):
    config = tiny_config(tmp_path, momentum=0.8, weight_decay=0.02).validate()
    network = tiny_backbone()
    optimizer = make_optimizer(config, network, 0.3)
    assert isinstance(optimizer, torch.optim.SGD)
    for group in optimizer.param_groups:
        assert (group["lr"], group["momentum"]) == (0.3, 0.8)
        for parameter in group["params"]:
            assert group["weight_decay"] == (0.0 if parameter.ndim < 2 else 0.02)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(network.parameters()))


def test_the_schedule_rises_from_nothing_and_ends_at_the_least(tmp_path):
    config = tiny_config(tmp_path, min_lr=0.01, scheduler="cosine").validate()
    optimizer = torch.optim.SGD([torch.zeros(1)], 0.1)
    scheduler = make_scheduler(config, optimizer, 20, 5)
    rates = []
    for place in range(21):
        scheduler.step_update(place)
        rates.append(optimizer.param_groups[0]["lr"])
    cosine = [0.01 + 0.045 * (1 + torch.tensor(place / 20 * torch.pi).cos().item()) for place in range(5, 21)]
    assert rates[:5] == pytest.approx([0.02 * place for place in range(5)])
    assert rates[5:] == pytest.approx(cosine, abs=1e-6)


@pytest.mark.parametrize("fold", [True, False])
def test_the_teacher_stays_as_it_is(tmp_path, fold):
    network = tiny_backbone().train()
    teacher = make_teacher(tiny_config(tmp_path, fold_batchnorm=fold).validate(), network, torch.device("cpu"))
    assert not any(module.training for module in teacher.modules())
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    with torch.no_grad():
        before = teacher(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).representation
        for parameter in network.parameters():
            parameter.add_(1.0)
        after = teacher(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))).representation
    assert torch.equal(before, after)


def test_training_is_at_its_own_eps(tmp_path):
    config = tiny_config(tmp_path, eps="8/255", eps_train="20/255", eps_spread=0.5).validate()
    objective = build_objective(config, tiny_backbone())
    pixels = torch.full((16, 3, 8, 8), 0.5)
    noise = (objective.noise(pixels, generator=torch.Generator().manual_seed(0)) - pixels).abs().max()
    assert 19 / 255 < noise <= 20 / 255 + 1e-6
    net = tiny_backbone().eval()
    eps = objective.radii(lambda x: net(x).logits, pixels, torch.zeros(16, dtype=torch.long))
    assert eps.mean() == pytest.approx(20 / 255, rel=1e-3)


def seen_in_training(monkeypatch, look):
    """What ``look(model, batch)`` gives in every trained pass from now on."""
    found, plain = [], arrest.ArrestObjective.loss

    def loss(self, model, batch):
        found.append(look(model, batch))
        return plain(self, model, batch)

    monkeypatch.setattr(arrest.ArrestObjective, "loss", loss)
    return found


@pytest.mark.parametrize(("precision", "on"), [("no", False), ("bf16", True)])
def test_the_trained_pass_is_in_training_mode_and_in_the_precision(tmp_path, monkeypatch, precision, on):
    found = seen_in_training(
        monkeypatch,
        lambda model, batch: (
            torch.is_autocast_enabled("cpu"),
            all(module.training for module in model.modules()),
            all(parameter.requires_grad for parameter in model.parameters()),
        ),
    )
    finetune(tiny_config(tmp_path, mixed_precision=precision, limit_eval=6))
    assert len(found) == 8
    assert set(found) == {(on, True, True)}, "also after a validation"


def test_batchnorm_counts_the_trained_passes_alone(tmp_path):
    before = load_file(write_model(tmp_path / "model") / "model.safetensors")
    run = finetune(tiny_config(tmp_path, validation_size=0, eval_every=0, export_weights="last", lr=1e-12, epochs=1))
    after = load_file(run.export / "model.safetensors")
    counts = [name for name in before if name.endswith("num_batches_tracked")]
    assert counts
    assert all(after[name] - before[name] == 48 // 8 for name in counts)
    assert all(not torch.equal(after[name], before[name]) for name in before if name.endswith("running_var"))


def test_no_two_steps_draw_the_same_start(tmp_path, monkeypatch):
    seeds, plain = [], loop.train_step

    def train_step(accelerator, model, attacked, objective, optimizer, batch, generator, *rest):
        seeds.append(generator.initial_seed())
        return plain(accelerator, model, attacked, objective, optimizer, batch, generator, *rest)

    monkeypatch.setattr(loop, "train_step", train_step)
    finetune(tiny_config(tmp_path, limit_eval=6))
    assert len(set(seeds)) == len(seeds) == 8


def test_averaged_weights_are_validated_kept_and_have_their_own_statistics(tmp_path):
    run = finetune(tiny_config(tmp_path, ema_decay=0.9, epochs=1, eval_every=1, validation_size=8, limit_eval=6))
    folder = tmp_path / "run" / "checkpoints"
    (best,) = folder.glob("best-*")
    last, kept = (load_file(path / "model.safetensors") for path in (folder / "last", best))
    start = load_file(tmp_path / "model" / "model.safetensors")
    assert all(torch.equal(last[name], kept[name]) for name in last), "one epoch: both are the averaged weights"
    assert any(not torch.equal(last[name], start[name]) for name in last if name.endswith("running_mean"))
    assert (run.export / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()


def test_pgd_starts_at_random_in_the_ball():
    net, (pixels, labels) = robust_net(), patterns(6, 4, seed=3)
    first, again, other = (
        pgd(net, pixels, labels, eps=0.1, step_size=1e-7, steps=1, generator=torch.Generator().manual_seed(seed))
        for seed in (0, 0, 1)
    )
    drawn = random_in_ball(pixels, eps=0.1, norm="linf", generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(first.adversarial, drawn, rtol=0, atol=1e-6)
    assert torch.equal(first.adversarial, again.adversarial)
    assert (first.adversarial - other.adversarial).abs().max() > 0.05


def test_an_attack_in_parts_has_the_same_loss_and_scale():
    pixels, labels = patterns(6, 4, seed=3)
    losses = []

    def loss_fn(logits, targets):
        losses.append(len(logits))
        return -margin(logits, targets)

    gradients = []
    net = robust_net()

    def logits_fn(x):
        logits = net(x)
        if logits.requires_grad:
            logits.register_hook(lambda gradient: gradients.append(float(gradient.abs().max())))
        return logits

    options = {"eps": 0.1, "step_size": 0.02, "steps": 2, "start": pixels.clone(), "loss_fn": loss_fn}
    whole = pgd(logits_fn, pixels, labels, gradient_scale=64.0, **options)
    largest = max(gradients)
    gradients.clear()
    parts = pgd(logits_fn, pixels, labels, gradient_scale=64.0, images_at_once=2, **options)
    torch.testing.assert_close(whole.adversarial, parts.adversarial)
    assert losses == [6, 6] + [2] * 6
    assert largest == pytest.approx(max(gradients), rel=0.5), "scaled alike"


def test_the_margin_of_half_precision_is_computed_in_single():
    logits = torch.randn(8, 10, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 20
    half, labels = logits.bfloat16(), torch.arange(8)
    found = margin(half, labels)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), margin(half.double(), labels).double(), rtol=1e-5, atol=1e-4)


def test_trades_attacks_in_its_norm():
    pixels, labels = patterns(6, 4, seed=3)

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = robust_net()

        def forward(self, x):
            return arrest_hub.backbones.BackboneOutput(self.net(x), x.flatten(1))

    trades = Trades(beta=6.0, steps=3, norm="l2", eps=0.3, step_size=0.2)
    prepared = trades.prepare(Net(), pixels, labels, torch.Generator().manual_seed(0))
    moved = (prepared.inputs[6:] - pixels).flatten(1)
    assert moved.norm(dim=1).max() <= 0.3 + 1e-5
    assert moved.abs().max() < 0.25, "not every pixel by as much, as in linf"
    assert moved.norm(dim=1).max() > 0.2


def test_a_restart_does_not_bring_back_what_is_broken(monkeypatch):
    """An image that one restart breaks stays broken, whatever the next ones find."""
    calls = []

    def found(logits_fn, pixels, labels, **options):
        calls.append(len(pixels))
        broken = pixels.clone()
        broken[0] = 1.0 if len(calls) == 1 else pixels[0]
        return AttackResult(broken, torch.zeros(len(pixels)), torch.ones(len(pixels)))

    monkeypatch.setattr(attack_stages, "pgd", found)
    pixels, labels = torch.zeros(3, 3, 8, 8), torch.zeros(3, dtype=torch.long)

    def classify(x):
        return torch.stack([0.5 - x[:, 0, 0, 0], x[:, 0, 0, 0] - 0.5], dim=1)

    threat = attack_stages.ThreatModel("linf", 1.0)
    run = pgd_attack(classify, threat, steps=2, step_size=0.1, restarts=3, seed=0, name="pgd")
    assert classify(run(pixels, labels, 0).adversarial).argmax(dim=1).tolist() == [1, 0, 0]
    assert calls == [3, 2, 2]


@pytest.mark.parametrize(("precision", "on"), [("fp32", False), ("bf16", True)])
def test_an_evaluation_is_in_its_precision(precision, on):
    seen = set()

    def look(logits):
        seen.add(torch.is_autocast_enabled("cpu"))
        return logits

    net = LogitsOnly(robust_net(), look)
    options = {"eps": "8/255", "checks": False, "teacher": None, "num_workers": 0, "precision": precision}
    arrest_hub.evaluate(net, patterns(8, 4, seed=3), attacks="clean,pgd-2", **options)
    assert on in seen


def test_folded_weights_are_kept_in_the_precision_of_the_passes(tmp_path):
    for precision, dtype in (("no", torch.float32), ("bf16", torch.bfloat16)):
        config = tiny_config(tmp_path, mixed_precision=precision).validate()
        folded = step.for_eval_passes(config, tiny_backbone())
        assert {conv.weight.dtype for conv in folded._own} == {dtype}


class TwoProcesses:
    """What `average_statistics` needs of an Accelerator: another process has ``other`` more in every place."""

    num_processes = 2

    def __init__(self, other):
        self.other, self.calls = other, 0

    def reduce(self, tensor, reduction):
        assert reduction == "mean"
        self.calls += 1
        return tensor + self.other / 2


def test_running_statistics_are_averaged_over_the_processes():
    network = tiny_backbone()
    before = {name: buffer.clone() for name, buffer in network.named_buffers()}
    accelerator = TwoProcesses(3.0)
    step.average_statistics(accelerator, network)
    assert accelerator.calls == 1
    for name, buffer in network.named_buffers():
        running = name.endswith(("running_mean", "running_var"))
        torch.testing.assert_close(buffer, before[name] + 1.5 if running else before[name])
    step.average_statistics(accelerator, torch.nn.Linear(2, 2))
    assert accelerator.calls == 1, "nothing to average, nothing to wait for"


def test_running_statistics_are_averaged_after_every_step(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(loop, "average_statistics", lambda accelerator, network: seen.append(network))
    finetune(tiny_config(tmp_path, limit_eval=6, epochs=1))
    assert len(seen) == 4


@pytest.mark.parametrize(("precision", "scale"), [("no", 1.0), ("bf16", 1.0), ("fp16", 128.0)])
def test_what_is_attacked_in_half_precision_is_scaled(tmp_path, precision, scale):
    """What fp16 would round to nothing on its way to the pixels or the weights."""
    config = tiny_config(tmp_path, mixed_precision=precision, eps_spread=0.5, awp_gamma=0.01)
    objective = build_objective(config, tiny_backbone())
    assert objective.attack.keywords["gradient_scale"] == objective.radii.keywords["gradient_scale"] == scale
    assert step.make_perturbation(config, None, tiny_backbone()).gradient_scale == scale
    assert step.validation_attack(config, None).gradient_scale == scale
    trades = build_objective(tiny_config(tmp_path, mixed_precision=precision, method="trades"), None)
    assert trades.gradient_scale == scale


def test_sample_wise_eps_is_by_the_configured_norm_and_spread(tmp_path):
    for changes, norm in (({"norm": "linf"}, "linf"), ({"norm": "l2", "eps": "0.5"}, "l2")):
        objective = build_objective(tiny_config(tmp_path, eps_spread=0.3, **changes), tiny_backbone())
        assert objective.radii.keywords["norm"] == norm
        assert objective.radii.keywords["spread"] == 0.3
    assert build_objective(tiny_config(tmp_path), tiny_backbone()).radii is None


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_weights_are_perturbed_in_the_robust_phase_in_its_precision(tmp_path, monkeypatch, precision):
    perturbed, plain = [], loop.train_step

    def train_step(*args):
        perturbed.append(args[8] is not None)
        return plain(*args)

    monkeypatch.setattr(loop, "train_step", train_step)
    autocast = seen_in_training(monkeypatch, lambda model, batch: torch.is_autocast_enabled("cpu"))
    finetune(
        tiny_config(tmp_path, awp_gamma=0.01, standard_epochs=1, epochs=1, limit_eval=6, mixed_precision=precision)
    )
    assert perturbed == [False] * 4 + [True] * 4
    assert autocast == [precision == "bf16"] * 8, "the pass that perturbs, and the trained one"


@pytest.mark.parametrize("ema_decay", [None, 0.9])
def test_a_validation_is_of_the_weights_as_they_are_and_attacks_in_the_robust_phase(tmp_path, monkeypatch, ema_decay):
    """What is validated has its BatchNorm folded, and follows the weights only when it is told to."""
    differences, attacked, plain, count = [], [], loop.validate, epoch_validation.count_validation
    pixels = torch.rand(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))

    def validate(run, phase, model, validated, *rest):
        found = plain(run, phase, model, validated, *rest)
        with torch.no_grad():
            differences.append(float((model.eval()(pixels).logits - validated(pixels).logits).abs().max()))
        return found

    def count_validation(run, split, transform, network, attack, after_batch):
        attacked.append(attack)
        return count(run, split, transform, network, attack, after_batch)

    monkeypatch.setattr(loop, "validate", validate)
    monkeypatch.setattr(epoch_validation, "count_validation", count_validation)
    finetune(tiny_config(tmp_path, standard_epochs=1, ema_decay=ema_decay, limit_eval=6))
    assert attacked == [False, True, True]
    assert max(differences) < 1e-3


def test_the_best_weights_are_those_of_the_best_harmonic_mean_the_first_among_equals(tmp_path, monkeypatch):
    """The second epoch has the most robust accuracy and the third as good a mean as the first."""
    scripted = [(12, 12, 4), (12, 5, 5), (12, 12, 4)]

    def count_validation(*args):
        return Counts(*scripted.pop(0), 0.0, 0.0)

    monkeypatch.setattr(epoch_validation, "count_validation", count_validation)
    finetune(tiny_config(tmp_path, epochs=3, limit_eval=6))
    assert [folder.name for folder in (tmp_path / "run" / "checkpoints").glob("best-*")] == ["best-000004"]
