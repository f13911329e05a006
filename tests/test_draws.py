"""What is drawn at random in a training and an evaluation is drawn anew wherever it should be, and nowhere else."""

import pytest
import torch
from tiny import patterns, robust_net, tiny_config

import arrest_hub
from arrest_hub import attack_stages, epoch_batches, loop
from arrest_hub.attack_stages import AutoAttackParts, ThreatModel, noise_attack, pgd_attack
from arrest_hub.attacks import AttackResult, random_in_ball
from arrest_hub.data import load_splits, train_loader
from arrest_hub.train import finetune
from arrest_hub.transforms import Preprocessing, train_transform

LINF = ThreatModel("linf", 0.1)
PIXELS = torch.full((4, 3, 8, 8), 0.5)
LABELS = torch.zeros(4, dtype=torch.long)


def test_noise_is_of_its_seed_name_and_batch():
    def noise(number=0, **changes):
        options = {"seed": 0, "name": "noise"} | changes
        return noise_attack(LINF, **options)(PIXELS, LABELS, number).adversarial

    assert torch.equal(noise(), noise())
    others = [noise(), noise(number=1), noise(seed=1), noise(name="check noise")]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(others) for b in others[:i])
    assert all(0.09 < (other - PIXELS).abs().max() <= 0.1 + 1e-6 for other in others)


def test_the_starts_of_pgd_are_of_their_seed_name_batch_and_restart(monkeypatch):
    starts = []

    def begin(logits_fn, pixels, labels, *, norm, eps, step_size, steps, generator):
        assert (norm, eps, step_size, steps) == ("linf", 0.1, 0.02, 5)
        starts.append(random_in_ball(pixels, eps=eps, norm=norm, generator=generator))
        return AttackResult(pixels, torch.zeros(len(pixels)), torch.ones(len(pixels)))

    monkeypatch.setattr(attack_stages, "pgd", begin)

    def drawn(number=0, **changes):
        starts.clear()
        options = {"seed": 0, "name": "pgd-5"} | changes
        attack = pgd_attack(lambda x: -torch.eye(3)[LABELS], LINF, steps=5, step_size=0.02, **options)
        attack(PIXELS, LABELS + 1, number)
        return list(starts)

    def standing(x):
        return torch.eye(3)[LABELS[: len(x)]]

    assert torch.equal(drawn()[0], drawn()[0])
    others = [drawn()[0], drawn(1)[0], drawn(seed=1)[0], drawn(name="pgd-50")[0]]
    starts.clear()
    pgd_attack(standing, LINF, steps=5, step_size=0.02, restarts=3, seed=0, name="pgd-5")(PIXELS, LABELS, 0)
    assert len(starts) == 3
    assert torch.equal(starts[0], others[0])
    others += starts[1:]
    assert all((a - b).abs().max() > 0.05 for i, a in enumerate(others) for b in others[:i])


def test_an_evaluation_gives_its_seed_and_the_batch_to_every_attack(monkeypatch):
    seeds, numbers, plain = set(), {}, AutoAttackParts.__init__

    def init(self, *args, seed, **options):
        seeds.add(("autoattack", seed))
        plain(self, *args, seed=seed, **options)

    def remembered(name, made):
        def make(*args, seed, name=name, **options):
            seeds.add((name, seed))
            attack = made(*args, seed=seed, name=name, **options)

            def run(pixels, labels, number):
                numbers.setdefault(name, []).append(number)
                return attack(pixels, labels, number)

            return run

        return make

    monkeypatch.setattr(AutoAttackParts, "__init__", init)
    monkeypatch.setattr(attack_stages, "pgd_attack", remembered("", pgd_attack))
    monkeypatch.setattr(attack_stages, "noise_attack", remembered("noise", noise_attack))
    arrest_hub.evaluate(
        robust_net(), patterns(20, 4, seed=3), eps="8/255", checks=False, teacher=None, num_workers=0, seed=7,
        attacks="noise,pgd-2,apgd-ce", batch_size=8,
    )  # fmt: skip
    assert seeds == {("noise", 7), ("pgd-2", 7), ("autoattack", 7)}
    assert numbers["noise"] == numbers["pgd-2"] == list(range(len(numbers["noise"])))
    assert len(numbers["noise"]) >= 2


def drawn_in_training(tmp_path, monkeypatch, name, **changes):
    """The seeds of the attack and of torch's own generator (dropout) in each step of a run, and its phase's batches."""
    found, plain = [], loop.train_step

    def train_step(accelerator, model, attacked, objective, optimizer, batch, generator, *rest):
        found.append((generator.initial_seed(), torch.initial_seed()))
        return plain(accelerator, model, attacked, objective, optimizer, batch, generator, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "train_step", train_step)
        finetune(tiny_config(tmp_path, limit_eval=6, output_dir=str(tmp_path / name), **changes))
    return found


def test_a_step_draws_by_its_seed_phase_epoch_and_batch(tmp_path, monkeypatch):
    first = drawn_in_training(tmp_path, monkeypatch, "first", standard_epochs=1, epochs=1)
    other = drawn_in_training(tmp_path, monkeypatch, "other", standard_epochs=1, epochs=1, seed=1)
    attack, dropout = zip(*first, *other, strict=True)
    assert len(set(attack)) == len(set(dropout)) == len(first + other) >= 16
    assert not set(attack) & set(dropout)
    assert drawn_in_training(tmp_path, monkeypatch, "again", standard_epochs=1, epochs=1) == first


def test_each_process_draws_its_own(tmp_path, monkeypatch):
    """The seeds of the second process of two are none of the first's."""
    found, plain = {}, loop.TrainingPhase._train_batch

    class SecondProcess:
        def __init__(self, accelerator):
            self.accelerator = accelerator

        def __getattr__(self, name):
            return 1 if name == "process_index" else getattr(self.accelerator, name)

    def train_batch(self, batch):
        plain(self, batch)
        found.setdefault("first", []).append((self.generator.initial_seed(), torch.initial_seed()))
        self.progress.batch -= 1
        accelerator = self.run.accelerator
        try:
            self.run.accelerator = SecondProcess(accelerator)
            plain(self, batch)
        finally:
            self.run.accelerator = accelerator
        found.setdefault("second", []).append((self.generator.initial_seed(), torch.initial_seed()))

    monkeypatch.setattr(loop.TrainingPhase, "_train_batch", train_batch)
    finetune(tiny_config(tmp_path, limit_eval=6, epochs=1))
    first, second = ({seed for pair in found[name] for seed in pair} for name in ("first", "second"))
    assert len(first) == len(second) == 2 * len(found["first"])
    assert not first & second


@pytest.mark.parametrize("streaming", [False, True])
def test_batches_are_augmented_as_the_phase_asks(tmp_path, monkeypatch, streaming):
    """Flips and crops in both phases, the stronger augmentation in the robust one; all by the run's seed."""
    seen, plain_transform, plain_loader = [], epoch_batches.train_transform, epoch_batches.train_loader

    def train_transform(preprocessing, *args):
        seen.append(args)
        return plain_transform(preprocessing, *args)

    def train_loader(split, transform, **options):
        seen.append((options["seed"], options["batch_size"]))
        return plain_loader(split, transform, **options)

    monkeypatch.setattr(epoch_batches, "train_transform", train_transform)
    monkeypatch.setattr(epoch_batches, "train_loader", train_loader)
    sizes = {"limit_train": 24, "validation_size": 0, "eval_every": 0, "export_weights": "last"} if streaming else {}
    finetune(
        tiny_config(
            tmp_path, hflip=0.25, crop_min_scale=0.75, augment="randaugment", random_erasing=0.125, seed=5, epochs=1,
            standard_epochs=1, limit_eval=6, streaming=streaming, **sizes,
        )
    )  # fmt: skip
    assert seen == [(0.25, 0.75), (5, 8), (0.25, 0.75, "randaugment", 0.125), (5, 8)]


def test_the_order_and_the_augmentation_of_a_loader_are_of_its_seed(tmp_path):
    config = tiny_config(tmp_path)
    split = load_splits(config.dataset, validation_size=0).train
    size = Preprocessing((8, 8), (0.5,) * 3, (0.5,) * 3)

    def batches(seed, hflip=0.5):
        loader = train_loader(split, train_transform(size, hflip=hflip), batch_size=48, seed=seed, num_workers=0)
        (batch,) = loader
        place = batch["index"].argsort()
        return batch["index"].tolist(), batch["pixels"][place]

    (order, pixels), (again, same), (other, changed) = batches(3), batches(3), batches(4)
    assert order == again != other
    assert torch.equal(pixels, same)
    differing = (pixels != changed).flatten(1).any(dim=1)
    assert differing.float().mean() > 0.5, "other crops and flips of the same images"
