"""The configuration of `arrest-finetune`: what it holds and what is valid; where its values come from is in
config_sources.py. No torch here, so that `--help` answers at once.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import yaml

from arrest_hub.attack_schedule import attack_steps_at, default_step_size
from arrest_hub.errors import ConfigError
from arrest_hub.fields import config_field as _field
from arrest_hub.fields import convert_all, eps_problem, repo_id_problem
from arrest_hub.files import safe_name
from arrest_hub.licenses import license_problems
from arrest_hub.model_arguments import DROPPED, model_args_problem

GROUPS = ("model", "data", "method", "threat model", "training", "run", "hub")
# A recipe's values for these belong to the recipe's own model and are dropped when --model names another.
MODEL_KEYS = ("model", "model_args", "image_size", "standard_epochs", "standard_lr", "output_dir")
# What may differ between a run and its resumption without changing the result; the batch may at the end of an epoch.
RESUME_MAY_DIFFER = (
    "batch_size", "grad_accum_steps", "output_dir", "resume", "overwrite", "dry_run", "num_workers", "ddp_timeout",
    "log_every", "skip_corrupt", "log_with", "keep_checkpoints", "figures", "push_to_hub", "private", "license",
    "license_name", "license_link", "images_at_once",
)  # fmt: skip


@dataclass
class FinetuneConfig:
    """Everything `finetune` needs to know. Built by keyword it has the defaults, whatever the dataset; a recipe's
    values come with `recipe_config`. ``recipe`` here is a name for the record alone, and ``dry_run`` the command's.

    Raises:
        ConfigError: from `validate`, listing every problem at once.
    """

    # fmt: off
    # ruff: noqa: RUF009
    model: str = _field("", "str", "model",
        "timm/<name>, org/name[@revision] on the Hub, a local folder, or a timm architecture name (random "
        "initialisation)")
    model_args: dict[str, Any] = _field(None, "mapping", "model",
        "arguments for a timm architecture, as in channels=[16,32,64,128]; of a timm model with weights those of its "
        "dropout, as in drop_path_rate=0.1")
    image_size: int | None = _field(None, "int", "model",
        "pixels a side; default: the model's own", low=4, optional=True)
    init: str = _field("pretrained", "str", "model", "the student's initialisation", choices=("pretrained", "random"))
    allow_pickle: bool = _field(False, "bool", "model", "accept .bin/.pth weights (read with weights_only)")

    dataset: str = _field("", "str", "data",
        "digits, cifar10, cifar100, imagenet, a `datasets` id[:config], or a local folder (images, Parquet, "
        "save_to_disk)")
    image_column: str | None = _field(None, "str", "data",
        "column that holds the images; default: found", optional=True)
    label_column: str | None = _field(None, "str", "data",
        "column that holds the labels; default: found", optional=True)
    train_split: str | None = _field(None, "str", "data", "split to train on; default: train", optional=True)
    eval_split: str | None = _field(None, "str", "data",
        "split for the final figures; default: test, else validation, else (also of a "
        "single split) 10 %% held out", optional=True)
    validation_size: float | None = _field(None, "float", "data",
        "training images held out to choose the best weights: a count, or a share below 1; 0: none; default: 10 %%, at "
        "most 1,000; ignored, but for 0, where the dataset has a validation split of its own", low=0, optional=True)
    label_match: str = _field("auto", "str", "data",
        "how dataset classes meet the model's outputs: in order and by name (auto), remapped by name, or by "
        "index alone", choices=("auto", "name", "index"))
    limit_train: int | None = _field(None, "int", "data",
        "use this many training images, class-balanced", low=1, optional=True)
    limit_eval: int | None = _field(None, "int", "data",
        "use this many evaluation images, class-balanced, and at most as many for validation", low=1, optional=True)
    streaming: bool = _field(False, "bool", "data", "read the dataset as a stream instead of downloading it")
    skip_corrupt: int = _field(0, "int", "data",
        "skip up to this many training images that cannot be read, and list them in corrupt.jsonl", low=0, high=100_000)
    hflip: float = _field(0.5, "float", "data", "probability of a horizontal flip in training", low=0, high=1)
    augment: str = _field("none", "str", "data",
        "stronger augmentation in robust training, torchvision's, after flip and crop (autoaugment has CIFAR-10's "
        "policy)",
        choices=("none", "trivialaugment", "randaugment", "autoaugment"))
    random_erasing: float = _field(0.0, "float", "data",
        "probability of blackening a random part of the image in robust training", low=0, high=1)
    crop_min_scale: float = _field(0.25, "float", "data",
        "smallest share of the area that a random resized crop keeps (images above 64 px)", above=0, high=1)
    num_workers: int | None = _field(None, "int", "data",
        "data loading processes; default: cores per process less one, at most 8", low=0, optional=True)

    method: str = _field("arrest", "str", "method",
        "arrest, or a baseline to compare with: at (adversarial training), trades",
        choices=("arrest", "at", "trades"))
    rgkd_weight: float = _field(10.0, "float", "method",
        "lambda, weight of the representation distance to the teacher; 0: off", low=0)
    replay_threshold: float | None = _field(0.25, "float", "method",
        "tau, angular drift in [0, 1] above which a sample is replayed with noise instead of attacked; none: "
        "off", low=0, high=1, optional=True)
    rgkd_input: str = _field("adversarial", "str", "method",
        "input of the student's representation that is compared with the teacher's of the clean image",
        choices=("adversarial", "clean"))
    replay_by: str = _field("sample", "str", "method",
        "replay each sample by its own drift, or the whole batch by its mean", choices=("sample", "batch"))
    replay_with: str = _field("noise", "str", "method",
        "what is replayed: the image with noise, or the clean image", choices=("noise", "clean"))
    trades_beta: float = _field(6.0, "float", "method", "weight of TRADES' divergence term", low=0)

    norm: str = _field("linf", "str", "threat model", "norm of the perturbation", choices=("linf", "l2"))
    eps: str = _field("8/255", "fraction", "threat model", "radius of the perturbation, pixels in [0, 1]", above=0)
    eps_train: str | None = _field(None, "fraction", "threat model",
        "radius of the perturbation in training; default: --eps", above=0, optional=True)
    eps_spread: float = _field(0.0, "float", "threat model",
        "in training, an eps for each image between eps x (1 - this) and eps x (1 + this), less where the network is "
        "sensitive, with the mean of a batch as before; 0: off", low=0, high=1)
    attack_steps: int = _field(10, "int", "threat model", "PGD steps in training", low=1)
    attack_step_size: str | None = _field(None, "fraction", "threat model",
        "PGD step; default: 2.5 x eps / steps", above=0, optional=True)
    attack_steps_start: int | None = _field(None, "int", "threat model",
        "PGD steps at the start of training, from where they grow evenly to --attack-steps at its end; default: "
        "--attack-steps throughout", low=1, optional=True)
    attack_stop_after: int | None = _field(None, "int", "threat model",
        "in training, leave an image alone this many PGD steps after it is first misclassified; none: attack it to "
        "the end", low=0, optional=True)
    eval_attack_steps: int = _field(20, "int", "threat model",
        "PGD steps of the final evaluation (step eps / 4)", low=1)

    epochs: int = _field(10, "int", "training", "epochs of robust finetuning", low=1)
    max_steps: int | None = _field(None, "int", "training",
        "stop robust training after this many optimizer steps (the schedule ends there too)", low=1, optional=True)
    standard_epochs: int = _field(0, "int", "training",
        "epochs of clean finetuning first: makes the teacher, puts on a new head where the classes differ", low=0)
    standard_lr: float | None = _field(None, "float", "training",
        "learning rate of the clean finetuning; default: --lr", above=0, optional=True)
    batch_size: Any = _field(128, "int", "training",
        "images a step in each process; auto: as many as fit in memory", low=2, word="auto")
    grad_accum_steps: int = _field(1, "int", "training", "batches whose gradients make one step", low=1)
    optimizer: str = _field("sgd", "str", "training", "any of timm's optimizers (sgd is Nesterov)")
    lr: float = _field(0.01, "float", "training", "peak learning rate", above=0)
    momentum: float = _field(0.9, "float", "training", "momentum of optimizers that have one", low=0, high=1)
    weight_decay: float = _field(0.0005, "float", "training", "not applied to biases and normalisation", low=0)
    scheduler: str = _field("cosine", "str", "training",
        "learning rate schedule, updated every step; poly falls evenly, step to a tenth after each third, multistep "
        "after 50 and 75 %%",
        choices=("cosine", "step", "multistep", "poly", "constant"))
    warmup_epochs: float = _field(0.0, "float", "training", "epochs of linear warm-up", low=0)
    min_lr: float = _field(0.0, "float", "training", "learning rate at the end (cosine, poly)", low=0)
    lr_hold: float | None = _field(None, "float", "training",
        "share of the peak at which the falling learning rate of robust training stays, as for averaging; none: it "
        "falls on", above=0, high=1, optional=True)
    clip_grad: float | None = _field(None, "float", "training",
        "largest norm of the gradient", above=0, optional=True)
    ema_decay: float | None = _field(None, "float", "training",
        "decay of the averaged weights that are then evaluated and exported; none: off",
        above=0, high=0.999999, optional=True)
    ema_start_epoch: float = _field(0.0, "float", "training",
        "epochs of robust training before the averaging begins", low=0)
    awp_gamma: float = _field(0.0, "float", "training",
        "adversarial weight perturbation: size relative to each weight's norm, as in 0.005; 0: off", low=0)
    label_smoothing: float = _field(0.0, "float", "training",
        "share of the target that all classes have alike, in robust training", low=0, high=1)
    freeze_head: bool = _field(False, "bool", "training",
        "keep the pretrained classification head as it is in robust training")
    mixed_precision: str = _field("no", "str", "training",
        "precision of training and attack", choices=("no", "bf16", "fp16"))
    channels_last: bool = _field(True, "bool", "training",
        "keep the channels innermost in memory: faster convolutions, the same to rounding")
    fold_batchnorm: bool = _field(True, "bool", "training",
        "fold BatchNorm into the convolutions for all passes but the trained one: faster, the same to rounding")
    images_at_once: int | None = _field(None, "int", "training",
        "attack this many images of a batch at a time, the same to rounding; default: on a CPU as many as suit its "
        "cache, elsewhere all", low=1, optional=True)
    compile: bool = _field(False, "bool", "training",
        "torch.compile the networks: minutes at the start, faster steps")
    grad_checkpointing: bool = _field(False, "bool", "training",
        "compute activations again in the backward pass instead of keeping them: less memory, slower steps")
    sync_bn: bool = _field(False, "bool", "training",
        "BatchNorm over the whole batch of all GPUs instead of each one's own")
    seed: int = _field(0, "int", "training", "seed of everything random", low=0, high=2 ** 31 - 1)

    recipe: str | None = _field(None, "str", "run",
        "bundled recipe or YAML file; default: the one for the dataset", optional=True)
    output_dir: str = _field("", "str", "run",
        "run folder; default: the recipe's, else runs/<model>-<dataset>-<method>")
    resume: bool = _field(False, "bool", "run", "continue from the newest whole checkpoint in --output-dir")
    dry_run: bool = _field(False, "bool", "run",
        "say what the run will take (memory, hours, batch), from a few steps, and write nothing")
    overwrite: bool = _field(False, "bool", "run", "delete an earlier run in --output-dir")
    eval_every: int = _field(1, "int", "run", "epochs between evaluations on the validation images; 0: never", low=0)
    export_weights: str = _field("best", "str", "run",
        "which weights to export: best (highest harmonic mean of clean and robust validation accuracy) or "
        "last", choices=("best", "last"))
    figures: bool = _field(True, "bool", "run", "draw figures/ for the card")
    checkpoint_every: int | None = _field(None, "int", "run",
        "steps between checkpoints; an epoch in which one falls ends with one too; default: every epoch",
        low=1, optional=True)
    keep_checkpoints: int = _field(1, "int", "run",
        "newest checkpoints to keep; the newest from the end of an epoch stays beside them", low=1)
    ddp_timeout: int = _field(1800, "int", "run",
        "seconds after which a process gives up waiting for the others, as for a lost node", low=1)
    log_every: int = _field(10, "int", "run", "steps between lines of log.jsonl", low=1)
    log_with: str | None = _field(None, "str", "run",
        "tracker, through Accelerate", choices=("tensorboard", "wandb", "trackio"), optional=True)

    push_to_hub: str | None = _field(None, "str", "hub",
        "publish the result under this id, as in me/resnet50-arrest-linf4 (later: arrest-push)", optional=True)
    private: bool = _field(False, "bool", "hub", "make that repository a private one, if it does not exist yet")
    license: str | None = _field(None, "str", "hub",
        "the model's licence, by the Hub's name for it; default: the base model's", optional=True)
    license_name: str | None = _field(None, "str", "hub", "with --license other: what it is called", optional=True)
    license_link: str | None = _field(None, "str", "hub", "with --license other: where it is", optional=True)
    # fmt: on

    @property
    def eps_value(self) -> float:
        """eps as a float, on pixels in [0, 1]."""
        return float(Fraction(self.eps))

    @property
    def eps_train_value(self) -> float:
        """The radius in training, on pixels in [0, 1]."""
        return float(Fraction(self.eps_train or self.eps))

    def step_size_for(self, eps: float) -> float:
        """The step, on pixels in [0, 1], of PGD with `attack_steps` in a ball of this radius."""
        if self.attack_step_size is not None:
            return float(Fraction(self.attack_step_size))
        step: float = default_step_size(eps, self.attack_steps)
        return step

    @property
    def step_size_value(self) -> float:
        """PGD's training step on pixels in [0, 1], of an attack of `attack_steps`."""
        return self.step_size_for(self.eps_train_value)

    def attack_steps_at(self, done: float) -> int:
        """PGD's training steps when a part ``done`` of the robust training, in [0, 1], is behind."""
        return attack_steps_at(done, self.attack_steps_start or self.attack_steps, self.attack_steps)

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective uses a standardly pretrained network beside the student."""
        return self.method == "arrest" and (self.rgkd_weight > 0 or self.replay_threshold is not None)

    def validate(self) -> FinetuneConfig:
        """Check everything that can be checked without a download, and fill in `output_dir`.

        Raises:
            ConfigError: with a line for each problem.
        """
        good, problems = convert_all(self)
        problems += _cross_checks(self, good)
        if problems:
            raise ConfigError(problems)
        if not self.output_dir:
            self.output_dir = default_output_dir(self)
        self.output_dir = os.path.expanduser(self.output_dir)
        return self

    def to_yaml(self) -> str:
        """Every key with its resolved value, in the order of the help text."""
        return yaml.safe_dump(dataclasses.asdict(self), sort_keys=False, allow_unicode=True)


CONTRADICTION = "--resume and --overwrite contradict each other: give one of them."
FIELDS: dict[str, dataclasses.Field[Any]] = {f.name: f for f in dataclasses.fields(FinetuneConfig)}


def shared_field(name: str) -> Any:
    """A field of another command's configuration that this one has too: the same default, range and help."""
    field = FIELDS[name]
    return dataclasses.field(default=field.default, metadata=field.metadata)


def _cross_checks(config: FinetuneConfig, good: set[str]) -> list[str]:
    """Problems between fields; only those whose own values are good are looked at."""
    problems = []
    if "model" in good and not config.model:
        problems.append("--model is missing: give timm/<name>, org/name, a local folder or a timm architecture name.")
    if "dataset" in good and not config.dataset:
        problems.append("--dataset is missing: give digits, cifar10, cifar100, imagenet, a `datasets` id or a folder.")
    if {"norm", "eps", "eps_train"} <= good:
        problems += eps_problem(config.norm, config.eps)
        if config.eps_train is not None:
            problems += eps_problem(config.norm, config.eps_train, "--eps-train")
        smaller = min(Fraction(config.eps), Fraction(config.eps_train or config.eps))
        if "attack_step_size" in good and config.attack_step_size and Fraction(config.attack_step_size) > 2 * smaller:
            problems.append(
                f"--attack-step-size {config.attack_step_size} is more than the whole ball (2 x eps {smaller}): "
                "give a smaller step."
            )
    if {"attack_steps", "attack_steps_start"} <= good and (config.attack_steps_start or 0) > config.attack_steps:
        problems.append(
            f"--attack-steps-start {config.attack_steps_start} is more than the {config.attack_steps} --attack-steps "
            "at the end: the attack grows. Give fewer."
        )
    if {"method", "attack_stop_after"} <= good and config.attack_stop_after is not None and config.method == "trades":
        problems.append(
            "--attack-stop-after goes by the label, and TRADES' attack by the clean prediction: leave it out, or give "
            "--method arrest or at."
        )
    if {"method", "eps_spread"} <= good and config.eps_spread and config.method == "trades":
        problems.append(
            f"--eps-spread {config.eps_spread:g} goes by the label, and TRADES' attack by the clean prediction: leave "
            "it out, or give --method arrest or at."
        )
    if {"init", "freeze_head"} <= good and config.freeze_head and config.init == "random":
        problems.append("--freeze-head with --init random would keep a head of random numbers: leave one of them out.")
    if {"ema_decay", "ema_start_epoch", "epochs"} <= good and config.ema_start_epoch:
        if config.ema_decay is None:
            problems.append(
                f"--ema-start-epoch {config.ema_start_epoch:g} says when averaging begins, and there is none: add "
                "--ema-decay, as in 0.995."
            )
        elif config.ema_start_epoch >= config.epochs:
            problems.append(
                f"--ema-start-epoch {config.ema_start_epoch:g} is not before the end, after {config.epochs} --epochs: "
                "give fewer."
            )
    if {"lr", "standard_lr", "min_lr", "standard_epochs", "scheduler"} <= good:
        peak = min(config.lr, (config.standard_epochs and config.standard_lr) or config.lr)
        if config.min_lr > peak and config.scheduler in ("cosine", "poly"):
            problems.append(
                f"--min-lr {config.min_lr:g} is above the peak of {peak:g}: the learning rate would rise. Give less."
            )
    if {"epochs", "standard_epochs", "warmup_epochs", "max_steps"} <= good and config.max_steps is None:
        shortest = min(config.epochs, config.standard_epochs or config.epochs)
        if config.warmup_epochs >= shortest:
            problems.append(
                f"--warmup-epochs {config.warmup_epochs:g} is all of a training of {shortest} epochs: give fewer."
            )
    if {"resume", "overwrite"} <= good and config.resume and config.overwrite:
        problems.append(CONTRADICTION)
    if (
        "validation_size" in good
        and config.validation_size
        and config.validation_size >= 1
        and config.validation_size % 1
    ):
        problems.append(f"--validation-size {config.validation_size} is neither a count nor a share below 1.")
    if {"model_args", "model"} <= good and "/" in config.model and (fixed := sorted(set(config.model_args) - DROPPED)):
        problems.append(
            f"--model-args {', '.join(fixed)}: {config.model!r} comes with its own, and only what is dropped in "
            f"training can be chosen for it ({', '.join(sorted(DROPPED))}). Leave it out, or give a timm architecture "
            "name."
        )
    if "model_args" in good and (problem := model_args_problem(config.model_args)):
        problems.append(f"--model-args {problem}")
    if "push_to_hub" in good and config.push_to_hub:
        problem = repo_id_problem("--push-to-hub", config.push_to_hub)
        problems += [problem] if problem else []
    if "private" in good and config.private and not config.push_to_hub:
        problems.append("--private says how to publish, and nothing is to be published: add --push-to-hub you/name.")
    if {"license", "license_name", "license_link"} <= good:
        problems += license_problems(config.license, config.license_name, config.license_link)
    return problems


def default_output_dir(config: FinetuneConfig) -> str:
    """``runs/<model>-<dataset>-<method>``, made of characters every file system takes."""
    folder = Path(config.model).expanduser()
    named = folder if folder.is_dir() else Path(config.model.split("@")[0])
    model = (named.resolve() if named.name in ("", "..") else named).name
    parts = [model, Path(config.dataset.split(":")[0]).name, config.method]
    return "runs/" + "-".join(map(safe_name, parts))
