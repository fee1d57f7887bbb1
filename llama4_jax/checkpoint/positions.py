"""Meta's older embedding of patch positions, read as the one that the model adds.

`positional_embedding` [1 + rows * columns, d] has the class token first and one entry a patch, row by row. Meta's loader
samples it bilinearly at x / columns and y / rows of its width and height, which with the corners not aligned is half a
patch up and to the left of each entry: the mean of four neighbours, those outside counting as zero. The result,
`positional_embedding_vlm`, has the class token last.

Source: `load_hook` of `VisionEncoder` in llama_models.llama4.vision.encoder (llama-models 0.3.0).
"""

from __future__ import annotations

import math

import numpy as np

from llama4_jax.checkpoint import mapping
from llama4_jax.checkpoint.leaves import Reader

OLD = "vision_embeddings.vision_encoder.positional_embedding"
NEW = OLD + "_vlm"


class Resampled:
    """A reader of what `stored` holds, with `OLD` resampled to `NEW` where only the old one is there.

    A file with both keeps both, so that strict accounting finds one too many. Raises ValueError for an embedding that
    is not one of a square grid and a class token.
    """

    def __init__(self, stored: Reader):
        self._stored = stored
        self._old = OLD in stored.shapes and NEW not in stored.shapes
        if self._old:
            _grid(stored.shapes[OLD])
        rename = {OLD: NEW} if self._old else {}
        self.shapes = {rename.get(key, key): shape for key, shape in stored.shapes.items()}
        self.dtypes = {rename.get(key, key): dtype for key, dtype in stored.dtypes.items()}

    def read(self, key: str, rows: slice = mapping.ALL) -> np.ndarray:
        """One tensor, or those rows of it."""
        if key == NEW and self._old:
            return resample(self._stored.read(OLD))[rows]
        return self._stored.read(key, rows)


def resample(old: np.ndarray) -> np.ndarray:
    """The new embedding of an old one, [1 + n * n, d] both, summed in float32 and returned in the dtype of `old`."""
    grid = _grid(old.shape)
    entries = old[1:].astype(np.float32).reshape(grid, grid, -1)
    padded = np.pad(entries, ((1, 0), (1, 0), (0, 0)))
    means = (padded[:-1, :-1] + padded[:-1, 1:] + padded[1:, :-1] + padded[1:, 1:]) / 4  # [y x d]
    return np.concatenate([means.reshape(grid * grid, -1).astype(old.dtype), old[:1]])


def _grid(shape: tuple[int, ...]) -> int:
    """Patches along a side."""
    grid = math.isqrt(shape[0] - 1)
    if len(shape) != 2 or 1 + grid * grid != shape[0]:
        raise ValueError(f"{OLD}: wanted [1 + n * n, d], a class token and n * n patches; got {list(shape)}")
    return grid
