"""A verdict for every image: what it was taken for when clean, and which attack broke it. No torch.

Kept as Parquet beside the results, so that every figure can be counted again and two models be compared image by image.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from arrest_hub.files import write_whole

Array = np.ndarray[Any, Any]
CLEAN = "clean"
"""Stands in an attack's column for an image that was wrong without any attack."""
FIXED = ("index", "label", "prediction")
FIRST = "broken_by"
"""The column of `Verdicts.first_broken_by`; every column beyond these is an attack's."""


@dataclass
class Verdicts:
    """Parallel arrays over N images.

    ``index``: the row in the split, int64 [N]; ``label`` and ``prediction`` (on the clean image): model outputs,
    int64 [N]. ``broken_by[attack]``: object [N], None where the image stood, "clean" where it was wrong already, else
    the name of the attack, or of the part of AutoAttack, that broke it.
    """

    index: Array
    label: Array
    prediction: Array
    broken_by: dict[str, Array] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def clean_correct(self) -> Array:
        """bool [N]."""
        right: Array = self.prediction == self.label
        return right

    def stands(self, attack: str) -> Array:
        """bool [N]: right when clean and under ``attack``. Raises KeyError for an attack that was not run."""
        return np.array([value is None for value in self.broken_by[attack]], dtype=bool)

    def first_broken_by(self) -> Array:
        """object [N]: what broke each image first, in the order of the attacks; None where every attack failed."""
        first = np.full(len(self), None, dtype=object)
        first[~self.clean_correct] = CLEAN
        for column in self.broken_by.values():
            stands = np.array([value is None for value in first], dtype=bool)
            first[stands] = column[stands]
        return first

    def write(self, path: Path) -> None:
        """Write Parquet, whole or not at all: index, label, prediction, broken_by (the first), a column an attack."""
        columns: dict[str, Any] = {
            "index": pa.array(self.index, pa.int64()),
            "label": pa.array(self.label, pa.int64()),
            "prediction": pa.array(self.prediction, pa.int64()),
            FIRST: _names(self.first_broken_by()),
        }
        columns |= {attack: _names(values) for attack, values in self.broken_by.items()}
        table = pa.table(columns).replace_schema_metadata(self.metadata)
        content = pa.BufferOutputStream()
        pq.write_table(table, content)
        write_whole(path, content.getvalue().to_pybytes())


def _names(values: Array) -> Any:
    return pa.array(values.tolist(), pa.string()).dictionary_encode()


def _is_names(kind: Any) -> bool:
    return bool(pa.types.is_string(kind.value_type if pa.types.is_dictionary(kind) else kind))


def read_verdicts(path: Path) -> Verdicts:
    """Read a file that `Verdicts.write` wrote.

    Raises:
        ValueError: it is not one.
    """
    try:
        table = pq.read_table(path)
        fixed = [table.column(name) for name in FIXED]
    except FileNotFoundError:
        raise
    except (pa.ArrowException, OSError, KeyError) as error:
        raise ValueError(f"{path} is not a file of verdicts: {error}") from error
    attacks = {name: table.column(name) for name in table.column_names if name not in (*FIXED, FIRST)}
    wrong = [name for name, column in zip(FIXED, fixed, strict=True) if column.type != pa.int64() or column.null_count]
    wrong += [name for name, column in attacks.items() if not _is_names(column.type)]
    if wrong or FIRST not in table.column_names:
        raise ValueError(f"{path} is not a file of verdicts: see its columns {', '.join(wrong or [FIRST])}")
    broken_by = {name: np.array(column.to_pylist(), dtype=object) for name, column in attacks.items()}
    index, label, prediction = (column.to_numpy() for column in fixed)
    metadata = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    return Verdicts(index, label, prediction, broken_by, metadata)


@dataclass(frozen=True)
class PairCounts:
    """Two models on the same images: how many both, only one, or neither classify correctly."""

    both: int
    only_first: int
    only_second: int
    neither: int

    @property
    def p_value(self) -> float:
        """Exact McNemar test (McNemar 1947, Psychometrika 12, 153-157): two-sided binomial on the images where they
        differ. 1 where they differ nowhere."""
        n, k = self.only_first + self.only_second, min(self.only_first, self.only_second)
        # by logarithms: 2 ** n overflows a float beyond a thousand discordant images
        log_terms = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
        return min(1.0, 2 * sum(math.exp(term - n * math.log(2)) for term in log_terms))


def same_images(first: Verdicts, second: Verdicts) -> bool:
    """Whether two files of verdicts are about the same images, in the same order."""
    return np.array_equal(first.index, second.index)


def compare_pairs(first: Verdicts, second: Verdicts, attack: str | None) -> PairCounts:
    """Compare image by image, clean (None) or under an attack that both files have.

    Raises:
        ValueError: the two are not about the same images.
    """
    if not same_images(first, second):
        raise ValueError("the two files of verdicts are not about the same images in the same order")
    a = first.clean_correct if attack is None else first.stands(attack)
    b = second.clean_correct if attack is None else second.stands(attack)
    return PairCounts(int((a & b).sum()), int((a & ~b).sum()), int((~a & b).sum()), int((~a & ~b).sum()))
