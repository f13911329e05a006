from fractions import Fraction
from math import comb

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from arrest_hub.verdicts import CLEAN, PairCounts, Verdicts, compare_pairs, read_verdicts


def column(*values):
    return np.array(values, dtype=object)


def make(**changes):
    # image 0 stands, 1 falls to PGD and APGD, 2 to FAB alone, 3 to PGD alone, 4 is wrong already
    values = {
        "index": np.array([3, 10, 11, 40, 41]), "label": np.array([0, 1, 2, 0, 1]),
        "prediction": np.array([0, 1, 2, 0, 2]),
        "broken_by": {"pgd-20": column(None, "pgd-20", None, "pgd-20", CLEAN),
                      "autoattack": column(None, "apgd-ce", "fab-t", None, CLEAN)},
        "metadata": {"model": "é|x", "eps": "8/255"},
    }  # fmt: skip
    return Verdicts(**(values | changes))


def same(a, b):
    return (
        all(np.array_equal(getattr(a, name), getattr(b, name)) for name in ("index", "label", "prediction"))
        and list(a.broken_by) == list(b.broken_by)
        and all(a.broken_by[name].tolist() == b.broken_by[name].tolist() for name in a.broken_by)
        and a.metadata == b.metadata
    )


def test_verdicts_survive_the_file(tmp_path):
    path = tmp_path / "verdicts.parquet"
    for verdicts in (make(), make(broken_by={}, metadata={}), make(broken_by={"noise": column(*[None] * 5)})):
        verdicts.write(path)
        read = read_verdicts(path)
        assert same(read, verdicts)
        assert (read.index.dtype, len(read)) == (np.int64, 5)
    assert not same(read, make())
    assert [file.name for file in tmp_path.iterdir()] == ["verdicts.parquet"]


def test_the_file_is_plain_parquet(tmp_path):
    make().write(tmp_path / "v.parquet")
    table = pq.read_table(tmp_path / "v.parquet")
    assert table.column_names == ["index", "label", "prediction", "broken_by", "pgd-20", "autoattack"]
    assert table.column("broken_by").to_pylist() == [None, "pgd-20", "fab-t", "pgd-20", "clean"]


def test_no_images_at_all(tmp_path):
    none = np.array([], dtype=np.int64)
    empty = Verdicts(none, none, none, {"pgd-20": column()})
    empty.write(tmp_path / "v.parquet")
    assert same(read_verdicts(tmp_path / "v.parquet"), empty)
    assert compare_pairs(empty, empty, "pgd-20").p_value == 1


def test_what_stands():
    verdicts = make()
    assert verdicts.clean_correct.tolist() == [True, True, True, True, False]
    assert verdicts.stands("pgd-20").tolist() == [True, False, True, False, False]
    assert verdicts.stands("autoattack").tolist() == [True, False, False, True, False]
    with pytest.raises(KeyError, match="square"):
        verdicts.stands("square")


def test_the_first_to_break_an_image_is_named_in_the_order_of_the_attacks():
    verdicts = make()
    assert verdicts.first_broken_by().tolist() == [None, "pgd-20", "fab-t", "pgd-20", CLEAN]
    turned = make(broken_by=dict(reversed(verdicts.broken_by.items())))
    assert turned.first_broken_by().tolist() == [None, "apgd-ce", "fab-t", "pgd-20", CLEAN]
    assert make(broken_by={}).first_broken_by().tolist() == [None, None, None, None, CLEAN]
    assert verdicts.broken_by["pgd-20"].tolist() == make().broken_by["pgd-20"].tolist(), "the columns are left alone"


def write_table(path, **columns):
    pq.write_table(pa.table(columns), path)


def test_wrong_files_are_refused(tmp_path):
    path = tmp_path / "v.parquet"
    numbers, names = [1, 2], pa.array(["a", None])
    good = {"index": numbers, "label": numbers, "prediction": numbers, "broken_by": names}
    write_table(path, **good)
    assert len(read_verdicts(path)) == 2
    for bad in (
        {"broken_by": None}, {"label": None}, {"label": names}, {"prediction": [0.5, 1.0]}, {"index": [1, None]},
        {"pgd-20": numbers},
    ):  # fmt: skip
        write_table(path, **{name: values for name, values in (good | bad).items() if values is not None})
        with pytest.raises(ValueError, match="not a file of verdicts"):
            read_verdicts(path)
    path.write_text('{"format": 1}')
    with pytest.raises(ValueError, match="not a file of verdicts"):
        read_verdicts(path)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "v.parquet"
    make().write(path)
    whole = path.read_bytes()
    for length in (0, 3, 4, 100, len(whole) // 2, len(whole) - 8, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a file of verdicts"):
            read_verdicts(path)
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    path.write_bytes(whole[:footer] + b"\xff" * 20 + whole[footer + 20 :])
    with pytest.raises(ValueError, match="not a file of verdicts"):
        read_verdicts(path)
    with pytest.raises(FileNotFoundError):
        read_verdicts(tmp_path / "none.parquet")


def test_pairs_are_counted():
    first = make()
    second = make(
        label=np.array([5, 5, 5, 5, 5]),  # the classes may be numbered otherwise in another model
        prediction=np.array([5, 5, 0, 0, 5]),
        broken_by={"pgd-20": column(None, None, CLEAN, CLEAN, "pgd-20")},
    )
    assert compare_pairs(first, second, None) == PairCounts(both=2, only_first=2, only_second=1, neither=0)
    assert compare_pairs(first, second, "pgd-20") == PairCounts(both=1, only_first=1, only_second=1, neither=2)
    with pytest.raises(KeyError):
        compare_pairs(first, second, "autoattack")
    for index in ([3, 10, 11, 41, 40], [3, 10, 11, 40, 42]):
        with pytest.raises(ValueError, match="same images"):
            compare_pairs(first, make(index=np.array(index)), None)


def exact_p(b, c):
    """Two-sided sign test by whole numbers: twice the smaller tail of Binomial(b + c, 1/2), at most 1."""
    n, k = b + c, min(b, c)
    return float(min(Fraction(1), Fraction(2 * sum(comb(n, i) for i in range(k + 1)), 2**n)))


def test_p_values_equal_tabled_and_exact_ones():
    # one-sided tails of the binomial with p = 1/2, as printed in tables of the sign test
    for b, c, tail in [(1, 9, 0.011), (3, 12, 0.018), (5, 15, 0.021)]:
        assert PairCounts(0, b, c, 0).p_value == pytest.approx(2 * tail, abs=0.001)
    for n in range(41):
        for b in range(n + 1):
            assert PairCounts(7, b, n - b, 9).p_value == pytest.approx(exact_p(b, n - b), rel=1e-9)
    assert PairCounts(5, 0, 0, 5).p_value == 1
    assert PairCounts(0, 4, 4, 0).p_value == 1


@pytest.mark.parametrize(("b", "c"), [(2400, 2600), (2500, 2500), (2300, 2700), (10_000, 10_300), (50_000, 50_500)])
def test_p_values_of_thousands_of_discordant_images(b, c):
    if b < 5000:
        assert PairCounts(0, b, c, 0).p_value == pytest.approx(exact_p(b, c), rel=1e-8)
    p = PairCounts(0, b, c, 0).p_value
    assert p == PairCounts(0, c, b, 0).p_value
    assert 0 < p <= 1


def test_p_values_too_small_for_a_float_are_zero():
    assert PairCounts(0, 0, 5000, 0).p_value == 0
