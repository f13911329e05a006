import json

import pytest
from accelerate import Accelerator

from arrest_hub.errors import ConfigError
from arrest_hub.journal import Journal

IDENTITY = {"seed": 0, "weights": "abc", "size": (4, 4)}


@pytest.fixture(scope="module")
def accelerator():
    return Accelerator(cpu=True)


@pytest.fixture
def open_journal(tmp_path, accelerator):
    journals = []

    def make(folder=tmp_path / "progress", **changes):
        journals.append(Journal(folder, IDENTITY | changes, accelerator))
        return journals[-1]

    yield make
    for journal in journals:
        journal.close()


def file_of(tmp_path, rank=0):
    return tmp_path / "progress" / f"rank-{rank:05d}.jsonl"


def test_entries_come_back_in_order(open_journal):
    journal = open_journal()
    for number in (1, 0):
        journal.add("clean", number, {"label": [number], "seconds": 0.5})
    journal.add("pgd-20", 0, {"broken": []})
    again = open_journal()
    assert again.entries == journal.entries
    assert again.gather("clean", 2) == [{"label": [0], "seconds": 0.5}, {"label": [1], "seconds": 0.5}]
    assert again.gather("pgd-20", 1) == [{"broken": []}]
    assert again.gather("square", 0) == []


def test_every_line_is_on_disk_at_once(tmp_path, open_journal):
    journal = open_journal()
    journal.add("clean", 0, {"label": [1]})
    lines = file_of(tmp_path).read_text().splitlines()
    assert [json.loads(line) for line in lines][1] == {"stage": "clean", "batch": 0, "label": [1]}
    assert len(lines) == 2


def test_a_last_line_cut_anywhere_loses_itself_alone(tmp_path, open_journal):
    journal = open_journal()
    journal.add("clean", 0, {"label": [0]})
    journal.add("clean", 1, {"label": [1, 2], "note": "ü\u2028\n"})
    journal.close()
    path = file_of(tmp_path)
    whole = path.read_bytes()
    start = whole[:-1].rindex(b"\n") + 1
    for length in range(start, len(whole) + 1):
        path.write_bytes(whole[:length])
        resumed = open_journal()
        kept = {("clean", 0)} | ({("clean", 1)} if length >= len(whole) - 1 else set())
        assert set(resumed.entries) == kept, length
        resumed.add("clean", 2, {"label": [3]})
        resumed.close()
        again = open_journal()
        assert set(again.entries) == kept | {("clean", 2)}, length
        again.close()
        assert len([line for line in path.read_text().splitlines() if "identity" in line]) == 1


def test_a_first_line_cut_anywhere_does_not_make_the_journal_anybodys(tmp_path, open_journal):
    open_journal().close()
    path = file_of(tmp_path)
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        resumed = open_journal()
        resumed.add("clean", 0, {"label": [0]})
        resumed.close()
        with pytest.raises(ConfigError, match="weights was abc when the evaluation began and is def now"):
            open_journal(weights="def")
        again = open_journal()
        assert set(again.entries) == {("clean", 0)}
        again.close()


def test_entries_of_nobody_are_not_taken(tmp_path, open_journal):
    file_of(tmp_path).parent.mkdir()
    file_of(tmp_path).write_text('{"stage": "clean", "batch": 0}\n')
    assert open_journal().entries == {}


def test_lines_that_are_something_else_are_ignored(tmp_path, open_journal):
    journal = open_journal()
    journal.add("clean", 0, {"label": [0]})
    journal.close()
    with file_of(tmp_path).open("ab") as file:
        file.write(b'\n[1]\n7\n{}\n{"stage": "clean"}\n\x00\x00\xff\xfe\n')
    assert set(open_journal().entries) == {("clean", 0)}


def test_another_identity_is_refused(open_journal):
    open_journal().close()
    open_journal().close()  # a tuple is a list in the file, and no difference
    with pytest.raises(ConfigError) as caught:
        open_journal(seed=1, weights="def")
    assert len(caught.value.problems) == 2
    assert "seed was 0 when the evaluation began and is 1 now" in caught.value.problems[0]
    assert "--overwrite" in caught.value.problems[0]
    assert "weights was abc" in caught.value.problems[1]
    with pytest.raises(ConfigError, match="norm was None"):
        open_journal(norm="l2")


def test_an_identity_that_says_more_is_refused(tmp_path, accelerator, open_journal):
    open_journal().close()
    with pytest.raises(ConfigError, match="size was"):
        Journal(tmp_path / "progress", {"seed": 0, "weights": "abc"}, accelerator)


def test_what_other_processes_did_counts(tmp_path, open_journal):
    journal = open_journal()
    journal.add("clean", 0, {"label": [0]})
    journal.close()
    lines = [{"identity": IDENTITY}, {"stage": "clean", "batch": 1, "label": [1]}]
    file_of(tmp_path, 1).write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"stage": "clean", "ba')
    resumed = open_journal()
    assert resumed.gather("clean", 2) == [{"label": [0]}, {"label": [1]}]
    resumed.share()
    assert set(resumed.entries) == {("clean", 0), ("clean", 1)}
    file_of(tmp_path, 1).write_text(json.dumps({"identity": IDENTITY | {"seed": 5}}) + "\n")
    with pytest.raises(ConfigError, match="seed was 5"):
        open_journal()


def test_a_missing_batch_is_an_error(open_journal):
    journal = open_journal()
    journal.add("clean", 0, {})
    journal.add("clean", 2, {})
    journal.add("pgd-20", 1, {})
    with pytest.raises(RuntimeError, match=r"stage clean: batches \[1\] of 3"):
        journal.gather("clean", 3)


def test_remove_deletes_and_close_does_not(tmp_path, open_journal):
    journal = open_journal()
    journal.close()
    assert file_of(tmp_path).is_file()
    journal = open_journal()
    journal.remove()
    assert not (tmp_path / "progress").exists()
    assert tmp_path.exists()


def test_without_a_folder_nothing_is_written(tmp_path, open_journal):
    journal = open_journal(folder=None)
    journal.add("clean", 0, {"label": [0]})
    assert journal.gather("clean", 1) == [{"label": [0]}]
    journal.remove()
    assert not list(tmp_path.iterdir())
