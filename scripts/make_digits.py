"""Write arrest_hub/digits/{train,test}.parquet: 1,797 handwritten digits for tests and the first run.

    python scripts/make_digits.py            # needs scikit-learn, which ships the data

Deterministic: the same library versions write the same bytes, and the pixels and the split never change.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
from datasets import ClassLabel, Dataset, Features, Image
from PIL import Image as PILImage
from sklearn.datasets import load_digits

SEED = 0
TEST_SIZE = 360


def png(pixels: np.ndarray) -> dict:
    buffer = io.BytesIO()
    PILImage.fromarray(pixels).save(buffer, format="PNG", optimize=True)
    return {"bytes": buffer.getvalue(), "path": None}


def main(out: Path) -> None:
    data = load_digits()
    pixels = np.round(data.images * 255 / 16).astype(np.uint8)
    rng = np.random.default_rng(SEED)
    test = np.concatenate([rng.permutation(np.flatnonzero(data.target == c))[: TEST_SIZE // 10] for c in range(10)])
    is_test = np.isin(np.arange(len(pixels)), test)
    features = Features({"image": Image(), "label": ClassLabel(names=[str(c) for c in range(10)])})
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", np.flatnonzero(~is_test)), ("test", np.flatnonzero(is_test))):
        columns = {"image": [png(pixels[i]) for i in rows], "label": data.target[rows].tolist()}
        table = Dataset.from_dict(columns, features=features).with_format("arrow")[:]
        # pyarrow rather than Dataset.to_parquet, which writes a random fingerprint into the file
        pq.write_table(table, out / f"{name}.parquet", compression="zstd")
        print(out / f"{name}.parquet", len(rows))


if __name__ == "__main__":
    default = Path(__file__).parent.parent / "arrest_hub" / "digits"
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else default)
