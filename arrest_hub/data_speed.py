"""How fast images come without a network: whether the data keeps a GPU waiting."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any


def loader_images_per_second(loader: Iterable[Mapping[str, Any]], *, seconds: float) -> float:
    """Images per second that ``loader`` yields ("label": [B]) over about ``seconds``, or until its end.

    Starting its workers is not counted: the clock runs from the first batch. Raises ValueError when there is no second.
    """
    batches = iter(loader)
    next(batches, None)
    started = time.perf_counter()
    count = 0
    for batch in batches:
        count += len(batch["label"])
        if time.perf_counter() - started >= seconds:
            break
    if not count:
        raise ValueError("the loader has fewer than two batches")
    return count / (time.perf_counter() - started)
