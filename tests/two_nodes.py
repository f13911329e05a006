"""What test_eval_distributed.py has two processes do, each in a folder of its own, as on nodes that share no disk.

Prints a line of JSON; is no test by itself.
"""

import json
import os
import sys
from pathlib import Path
from unittest.mock import patch

from accelerate.utils import gather_object
from torch.distributed import destroy_process_group

from arrest_hub.cli import parse_eval
from arrest_hub.command import leave
from arrest_hub.errors import ArrestError
from arrest_hub.evaluation import evaluate_all
from arrest_hub.journal import Journal

root, *arguments = sys.argv[1:]
rank = int(os.environ["RANK"])
os.environ["LOCAL_RANK"] = "0"
node = Path(root) / f"node-{rank}"
node.mkdir()
os.chdir(node)


def evaluate(*more: str) -> list[str]:
    """What became of it in each process."""
    try:
        evaluate_all(
            parse_eval(
                [*arguments, "--output-dir", "out", "--attacks", "noise", "--no-figures", "--teacher", "none", *more]
            )
        )
        outcome = "done"
    except ArrestError as error:
        outcome = str(error) or type(error).__name__
    return gather_object([outcome])


def second_nodes_files() -> list[str]:
    own = [sorted(str(path.relative_to(node)) for path in node.rglob("*") if path.name != ".lock")]
    return gather_object(own)[1]


said = {}
with patch.object(Journal, "remove", Journal.close):
    evaluate()
said["journals"] = second_nodes_files()
if rank == 0:  # as after a kill: the settings and a journal, and no results
    for name in ("results.json", "verdicts.parquet"):
        Path("out", name).unlink()
said["again"] = evaluate()
# the main process goes on on the other node, as a scheduler may have it
node = Path(root) / f"node-{1 - rank}"
os.chdir(node)
said["resumed"] = evaluate("--resume")
said["left"] = second_nodes_files()
said["complete"] = evaluate("--resume")
if rank == 1:  # what an evaluation of something else left here alone
    Path("out", "progress").mkdir()
    Path("out", "progress", "rank-00001.jsonl").write_text('{"identity": {"seed": 9}}\n')
said["overwritten"] = evaluate("--overwrite")
if rank == 0:
    print(json.dumps(said))
destroy_process_group()
leave(0)  # as the command does: Gloo's threads may outlive the group
