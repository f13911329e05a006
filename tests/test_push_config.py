import dataclasses
import shlex
import subprocess
import sys

import pytest

from arrest_hub.cli import parse_finetune
from arrest_hub.errors import ConfigError
from arrest_hub.fields import flag, repo_id_problem
from arrest_hub.push_cli import parse_card, parse_push
from arrest_hub.push_config import CARD_FIELDS, PUSH_FIELDS, CardConfig, PushConfig

GOOD = {"folder": "runs/mine", "repo_id": "me/x"}


def problems(do, *args, **values):
    with pytest.raises(ConfigError) as caught:
        do(*args, **values)
    return caught.value.problems


def found(**changes):
    return problems(PushConfig(**(GOOD | changes)).validate)


@pytest.mark.parametrize(
    "repo_id", ["me/x", "x", "me/resnet50-arrest-linf4", "me.org/x_1.0", "M/9", "_me/_x", "me/" + "x" * 96]
)
def test_ids_the_hub_takes(repo_id):
    assert PushConfig("runs/mine", repo_id).validate().repo_id == repo_id
    assert CardConfig("runs/mine", repo_id).validate().repo_id == repo_id


@pytest.mark.parametrize(
    "repo_id",
    ["a/b/c", "me/..x", "me/x..y", "me/x--y", "me/x.git", "x.git", "me/", "/x", "me/x y", " me/x", "me/x\n", "me/-x",
     "me/x-", "me/x.", "me/.x", "me/é", "me/x@main", "https:x", "me/" + "x" * 97],
)  # fmt: skip
def test_ids_the_hub_does_not_take(repo_id):
    for config in (PushConfig("runs/mine", repo_id), CardConfig("runs/mine", repo_id)):
        (problem,) = problems(config.validate)
        assert problem.startswith(f"--repo-id {repo_id!r} is not an id on the Hub")
    assert repo_id_problem("--push-to-hub", repo_id).startswith("--push-to-hub")


@pytest.mark.parametrize("repo_id", [None, ""])
def test_a_push_needs_an_id_and_a_card_does_not(repo_id):
    (problem,) = found(repo_id=repo_id)
    assert "--repo-id" in problem
    assert CardConfig("runs/mine").validate().repo_id is None


def test_both_need_a_folder():
    for config in (PushConfig(repo_id="me/x"), CardConfig()):
        (problem,) = problems(config.validate)
        assert "no folder is given" in problem


@pytest.mark.parametrize("name", ["revision", "tag"])
def test_names_of_branches_and_tags(name):
    for value in ("main", "v1.0", "refs/pr/3", "a_b-c"):
        assert getattr(PushConfig(**GOOD, **{name: value}).validate(), name) == value
    for value in ("", "a b", "a..b", "-x", ".x", "x.", "x/", "/x", "a//b", "x.lock", "a~b", "a^", "a:b", "é", "x\n"):
        (problem,) = found(**{name: value})
        assert problem.startswith(f"--{name} {value!r} is not a name for a")


def test_a_pull_request_is_of_main_and_has_no_tag():
    assert PushConfig(**GOOD, create_pr=True).validate().create_pr
    assert PushConfig(**GOOD, create_pr=True, revision="main").validate().create_pr
    (problem,) = found(create_pr=True, revision="dev")
    assert "--create-pr" in problem
    assert "--revision dev" in problem
    (problem,) = found(create_pr=True, tag="v1")
    assert "--tag v1" in problem


@pytest.mark.parametrize("config", [PushConfig, CardConfig])
def test_licences_are_checked(config):
    (problem,) = problems(config("runs/mine", "me/x", license="mitt").validate)
    assert "'mit'" in problem
    (problem,) = problems(config("runs/mine", "me/x", license="other").validate)
    assert "--license-name" in problem
    (problem,) = problems(config("runs/mine", "me/x", license_link="LICENSE").validate)
    assert "--license-link" in problem
    assert config("runs/mine", "me/x", license="other", license_name="n", license_link="l").validate()


def test_all_problems_of_a_push_come_together():
    lines = found(folder="", repo_id="a/b/c", license="mitt", revision="a b", tag="c d", create_pr=True, private="yes")
    text = "\n".join(lines)
    for part in ("no folder", "--repo-id 'a/b/c'", "'mit'", "--revision 'a b'", "--tag 'c d'", "--create-pr", "--tag c",
                 "--private 'yes'"):  # fmt: skip
        assert part in text
    assert len(lines) == 8


@pytest.mark.parametrize("config", [PushConfig, CardConfig])
def test_a_value_of_the_wrong_type_is_a_problem_and_no_crash(config):
    (problem,) = problems(config("runs/mine", "me/x", license=True).validate)
    assert "--license True" in problem
    (problem,) = problems(config("runs/mine", True).validate)
    assert "--repo-id True" in problem


@pytest.mark.parametrize(
    "changes",
    [
        {}, {"private": True}, {"folder": "runs/it's mine"}, {"folder": "runs/a b\"c"}, {"dry_run": True},
        {"revision": "dev", "tag": "v1.0", "private": True}, {"create_pr": True, "message": "what's \"new\"\nand more"},
        {"license": "other", "license_name": "My $own `licence`", "license_link": "http://x/?a=1&b=2"},
        {"message": "-a list"}, {"message": "--private"}, {"message": "a=b"}, {"message": ""},
        {"message": "\U0001f98a"},
    ],
    ids=str,
)  # fmt: skip
def test_the_command_is_parsed_back(changes):
    config = PushConfig(**(GOOD | changes)).validate()
    program, *words = shlex.split(config.command())
    assert program == "arrest-push"
    assert parse_push(words) == config


def test_the_command_says_no_more_than_needed():
    assert PushConfig(**GOOD, private=True).command() == "arrest-push runs/mine --repo-id me/x --private"
    # a folder that looks like a flag
    assert PushConfig("-runs", "me/x").command() == "arrest-push ./-runs --repo-id me/x"


def test_a_folder_behind_a_misspelt_flag_is_not_missed():
    (problem,) = problems(parse_push, ["--repo-id", "me/x", "--privat", "runs/mine"])
    assert "--private" in problem


def test_flags_and_folder_in_any_order():
    expected = PushConfig("runs/mine", "me/x", tag="v1", private=True)
    assert parse_push(["runs/mine", "--repo-id", "me/x", "--tag", "v1", "--private"]) == expected
    assert parse_push(["--repo-id", "me/x", "runs/mine", "--private", "--tag=v1"]) == expected
    assert parse_push(["--private", "--repo-id=me/x", "--tag", "v1", "runs/mine"]) == expected
    assert parse_card(["--overwrite", "runs/mine", "--license", "mit"]) == CardConfig(
        "runs/mine", license="mit", overwrite=True
    )


PARSERS = pytest.mark.parametrize("parse", [parse_push, parse_card])


@PARSERS
@pytest.mark.parametrize("word", ["--licence", "--licens", "-license", "--repo_id"])
def test_an_unknown_flag_names_the_nearest(parse, word):
    meant = "--repo-id" if "repo" in word else "--license"
    for words in ([word, "mit"], [f"{word}=mit"]):
        for argv in (["runs/mine", "--repo-id", "me/x", *words], [*words, "runs/mine", "--repo-id", "me/x"]):
            (problem,) = problems(parse, argv)
            assert problem == f"unknown flag {word}. Did you mean {meant!r}? See --help."


@pytest.mark.parametrize("word", ["-p", "-private", "--privat", "-n"])
def test_no_flag_is_passed_over(word):
    # or what was to be private would be public
    (problem,) = problems(parse_push, ["runs/mine", "--repo-id", "me/x", word])
    assert problem.startswith(f"unknown flag {word}.")


@PARSERS
@pytest.mark.parametrize(
    "argv",
    [["runs/a", "runs/b", "--repo-id", "me/x"], ["runs/a", "--repo-id", "me/x", "runs/b"],
     ["--repo-id", "me/x", "runs/a", "--license", "mit", "runs/b"]],
)  # fmt: skip
def test_two_folders_are_one_too_many(parse, argv):
    (problem,) = problems(parse, argv)
    assert problem == "2 folders are given (runs/a, runs/b): give one run."


def test_problems_of_flags_come_with_those_of_values():
    lines = problems(parse_push, ["runs/a", "runs/b", "--tagg", "v1", "--license", "mitt", "--revision", "a b"])
    text = "\n".join(lines)
    for part in ("unknown flag --tagg. Did you mean '--tag'?", "2 folders", "'mit'", "--repo-id is missing", "'a b'"):
        assert part in text
    assert len(lines) == 5
    lines = problems(parse_card, ["--overwritee", "--license", "mitt"])
    assert [line.split()[0] for line in lines] == ["unknown", "no", "--license"]


@PARSERS
def test_a_flag_without_its_value(parse):
    (problem,) = problems(parse, ["runs/mine", "--repo-id"])
    assert "--repo-id" in problem


def run(*words):
    return subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)


@pytest.mark.parametrize(("command", "fields"), [("push", PUSH_FIELDS), ("card", CARD_FIELDS)])
def test_help_names_every_flag_and_shows_examples(command, fields):
    result = run("-m", "arrest_hub", command, "--help")
    assert result.returncode == 0
    assert all(flag(name) in result.stdout for name in fields if name != "folder")
    assert "examples:" in result.stdout
    assert f"  arrest-{command} runs/mine" in result.stdout
    code = f"from arrest_hub.push_cli import {command}_main; {command}_main()"
    assert run("-c", code, "--help").stdout == result.stdout


def test_examples_of_the_help_parse():
    from arrest_hub import push_cli

    for text, parse in ((push_cli.PUSH_EPILOG, parse_push), (push_cli.CARD_EPILOG, parse_card)):
        commands = [line.split()[1:] for line in text.splitlines() if line.startswith("  arrest-")]
        assert commands
        for words in commands:
            assert parse(words).folder == "runs/mine"


def test_flags_are_read_without_torch():
    code = (
        "import sys\nfrom arrest_hub.push_cli import card_parser, parse_card, parse_push, push_parser\n"
        "parse_push(['runs/mine', '--repo-id', 'me/x'])\nparse_card(['runs/mine'])\n"
        "push_parser().format_help()\ncard_parser().format_help()\n"
        "sys.exit(bool({'torch', 'timm', 'datasets', 'transformers', 'accelerate'} & set(sys.modules)))"
    )
    assert run("-c", code).returncode == 0


def test_bad_flags_are_told_without_a_traceback():
    result = run("-m", "arrest_hub", "push", "runs/mine", "--repo-id", "a/b/c", "--tagg")
    assert result.returncode == 2
    assert result.stderr.startswith("error: 2 problems:")
    assert "Traceback" not in result.stderr


def finetune(*flags):
    return parse_finetune(["--recipe", "quickstart", *flags])[0]


def test_a_run_may_say_how_it_is_published():
    config = finetune("--push-to-hub", "me/x", "--private", "--license", "other", "--license-name", "n",
                      "--license-link", "l")  # fmt: skip
    assert (config.push_to_hub, config.private, config.license, config.license_name, config.license_link) == (
        "me/x", True, "other", "n", "l",
    )  # fmt: skip
    assert finetune().push_to_hub is None
    assert finetune("--license", "mit").license == "mit", "for the card, and for a later push"


@pytest.mark.parametrize(
    ("flags", "part"),
    [
        (["--private"], "--private says how to publish"),
        (["--push-to-hub", "a/b/c"], "--push-to-hub 'a/b/c' is not an id on the Hub"),
        (["--push-to-hub", "me/x.git"], "--push-to-hub 'me/x.git'"),
        (["--push-to-hub", "me/x", "--license", "apache2"], "'apache-2.0'"),
        (["--license", "other"], "--license-name"),
        (["--license-name", "n"], "--license-name belongs to"),
    ],
)
def test_how_a_run_is_published_is_checked_before_it_starts(flags, part):
    (problem,) = problems(finetune, *flags)
    assert part in problem


def test_problems_of_publishing_come_with_the_others():
    lines = problems(finetune, "--private", "--license", "mitt", "--epochs", "0")
    assert len(lines) == 3


def test_shared_fields_are_the_same_in_every_command():
    names = {f.name for f in dataclasses.fields(PushConfig)} & {f.name for f in dataclasses.fields(CardConfig)}
    assert names == {"folder", "repo_id", "license", "license_name", "license_link"}
    for name in names:
        assert PUSH_FIELDS[name].default == CARD_FIELDS[name].default
