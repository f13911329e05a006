"""Publishing a run: what is in its `export/`, with its card, as one commit on the Hub. No torch.

The push is a function of the files in `export/` alone: it needs no GPU and no training data, and can be repeated. Only
what differs is sent; nothing on disk changes before the commit is made.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from arrest_hub.card_facts import CardFacts, Publication, read_card, read_publication
from arrest_hub.config import FinetuneConfig
from arrest_hub.errors import ConfigError, HubError, HubRefusal
from arrest_hub.files import write_whole
from arrest_hub.hub_access import check_access
from arrest_hub.hub_repository import Pushed, Repository
from arrest_hub.licenses import License, choose_license
from arrest_hub.model_card import DAMAGE, card_is_generated, render_card
from arrest_hub.push_config import CardConfig, PushConfig
from arrest_hub.pushed_files import CARD, local_file, local_files, others, weight_problems


def push(folder: str | os.PathLike[str], repo_id: str, *, say: Callable[[str], None] = print, **options: Any) -> Pushed:
    """Publish the model of a run as one commit: weights, config, results, figures and card.

    ``folder`` is a run folder or its `export/`; ``repo_id`` is you/name. ``options`` are the other fields of
    `PushConfig` (the flags of `arrest-push`): private, revision, create_pr, tag, message, license, dry_run.
    ``say`` is given sentences about what happens.

    Raises:
        ConfigError: something is wrong with the options or the folder, or no licence is known: before any connection.
        HubError: the Hub cannot be reached or refuses; the folder is then as it was.
    """
    unknown = [name for name in options if name not in PushConfig.__dataclass_fields__]
    if unknown:
        raise ConfigError([f"push() has no option {name!r}." for name in unknown])
    return run_push(PushConfig(folder=os.fspath(folder), repo_id=repo_id, **options).validate(), say)


def run_push(config: PushConfig, say: Callable[[str], None]) -> Pushed:
    """`push` with its options as one object."""
    assert config.repo_id is not None  # validated
    export = find_export(config.folder)
    given = given_license(config)
    card = card_for(export, config.repo_id, given)
    files = local_files(export, card)  # every problem of the folder is found before any connection is made
    measured = _facts(export, Publication()).report.model
    if problems := weight_problems(files, measured.get("weights_files", {})):
        raise ConfigError(problems)
    if strange := others(files):
        say(f"pushed too, though no run writes it: {', '.join(strange)}")
    if config.dry_run:
        _write_card(export, card)
        for path, file in files.items():
            say(f"would push {path} ({file.size:,} bytes)")
        say(f"nothing was sent; the card is {export / CARD}")
        return Pushed(config.repo_id, None, None, tuple(files), ())
    try:
        full = check_access(config.repo_id, private=config.private, create_pr=config.create_pr, say=say)
        card = card_for(export, full, given)
        if (named := read_publication(card.decode(errors="replace")).repo_id) not in (None, full):
            say(f"{CARD} was edited by hand and is published as it is: it speaks of {named}, not of {full}")
        pushed = Repository(full, config, say).push(files | {CARD: local_file(card)})
        _write_card(export, card)
    except HubRefusal:
        raise
    except HubError as error:
        raise HubError(f"{error}\nTry again with: {config.command()}") from error
    done = "proposed" if config.create_pr else "published"
    say(f"{done} {pushed.url}" if pushed.changed or pushed.deleted else f"{full} has all of it already: {pushed.url}")
    return pushed


def check_push(
    config: PushConfig, say: Callable[[str], None], threat: str | None = None, network: str | None = None
) -> None:
    """What `run_push` checks before it needs the files: that a token is there and may write to the repository, and that
    no model of others is in it, nor one for another threat model than ``threat`` ("linf-8/255"), nor one of another
    architecture than ``network``.

    Raises:
        HubError: it may not, there is one, or the Hub cannot be reached.
    """
    assert config.repo_id is not None  # validated
    full = check_access(config.repo_id, private=config.private, create_pr=config.create_pr, say=say)
    Repository(full, config, say).check(threat, network)


def write_card(config: CardConfig) -> Path:
    """Make the card of a run anew from the files on disk, keeping the licence and the id that it had.

    Raises:
        ConfigError: there is nothing to make it from, or it was edited and ``overwrite`` was not given.
    """
    export = find_export(config.folder)
    if not config.overwrite and not card_is_generated(export):
        raise ConfigError(f"{export / CARD} was edited by hand: give --overwrite to replace it.")
    before = read_publication(read_card(export / CARD))
    publication = Publication(config.repo_id or before.repo_id, given_license(config) or before.license)
    _write_card(export, _render(export, publication))
    return export / CARD


def find_export(folder: str) -> Path:
    """The `export/` of a run folder, or the folder itself if it is one.

    Raises:
        ConfigError: it is neither.
    """
    path = Path(folder).expanduser()
    for candidate in (path / "export", path):
        if (candidate / "results.json").is_file() and (candidate / "config.json").is_file():
            return candidate
    if not path.is_dir():
        raise ConfigError(f"{folder!r} is not a folder: give a run of arrest-finetune, as in runs/mine.")
    if (path / "export").is_dir():
        raise ConfigError(
            f"{path / 'export'} is not whole (it has no config.json or no results.json): export the run again with "
            "arrest-finetune --resume."
        )
    if (path / "checkpoints").is_dir():
        raise ConfigError(f"{folder!r} is a run that is not finished: it has no export/. Go on with --resume first.")
    raise ConfigError(
        f"{folder!r} is neither a run of arrest-finetune nor its export/ (it has no config.json and results.json)."
    )


def card_for(export: Path, repo_id: str, given: License | None) -> bytes:
    """The card to publish: made anew, or as it was edited by hand.

    Raises:
        ConfigError: no licence is known, or an edited card states another one than ``given``.
    """
    before = read_publication(read_card(export / CARD))
    facts = _facts(export, before)
    base = facts.record.base if facts.record else None
    license, problem = choose_license(
        given or before.license, base.license if base else None, base.name if base else None
    )
    if problem:
        raise ConfigError(problem)
    if card_is_generated(export):
        return _render(export, Publication(repo_id, license))
    if before.license != license:
        raise ConfigError(
            f"{export / CARD} was edited by hand and states {before.license.id if before.license else 'no licence'}: "
            f"write the licence into its header, or make the card anew with arrest-card {export} --overwrite."
        )
    return (export / CARD).read_bytes()


def _facts(export: Path, publication: Publication) -> CardFacts:
    """`CardFacts.from_folder`. Raises ConfigError: a file is missing or damaged."""
    with _whole(export):
        return CardFacts.from_folder(export, publication)


def _render(export: Path, publication: Publication) -> bytes:
    """`render_card` of what is in the folder. Raises ConfigError: a file is missing or damaged."""
    with _whole(export):
        return render_card(CardFacts.from_folder(export, publication)).encode()


@contextmanager
def _whole(export: Path) -> Iterator[None]:
    """Damaged files are one clear error."""
    try:
        yield
    except DAMAGE as error:
        raise ConfigError(
            f"{export} is not whole ({' '.join(str(error).split())}): export the run again with arrest-finetune "
            "--resume."
        ) from error


def given_license(config: PushConfig | CardConfig | FinetuneConfig) -> License | None:
    """The licence that --license and its like name; None without them."""
    return None if config.license is None else License(config.license, config.license_name, config.license_link)


def _write_card(export: Path, card: bytes) -> None:
    """Whole or not at all; not touched if it is the same."""
    path = export / CARD
    if path.is_file() and path.read_bytes() == card:
        return
    try:
        write_whole(path, card)
    except OSError as error:
        raise HubError(f"{path} cannot be written ({error.strerror}).") from error
