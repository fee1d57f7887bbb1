"""The parameters of a checkpoint, rounded to few bits on their way from it: none is ever in memory whole in floats.

Rounding to nearest looks at one block of weights with one scale at a time, so that a part of a parameter which holds its
inputs whole rounds as the whole does. Better methods look at more (`quant.ptq`).
"""

from __future__ import annotations

from collections.abc import Mapping

import jax
import numpy as np

from llama4_jax.checkpoint import low_bit, mapping
from llama4_jax.checkpoint.leaves import Leaves, empty, pieces
from llama4_jax.checkpoint.low_bit import Held
from llama4_jax.config.quant import QuantRecipe
from llama4_jax.core.quantized import QuantizedArray
from llama4_jax.quant import forms, ptq, recipe


class Quantising:
    """`source` with the parameters that `rules` names in few bits (`leaves.Leaves`).

    method: "rtn", or "clip" to look for the best part of each range. Raises ValueError for rules that cannot be followed
    (`recipe.specs`) and for a source that is in few bits already.
    """

    def __init__(self, source: Leaves, rules: QuantRecipe, method: str = "rtn"):
        if source.held:
            raise ValueError(f"{next(iter(source.held))} is in few bits already; give the checkpoint it was made of")
        abstract = {path: jax.ShapeDtypeStruct(*spec) for path, spec in source.specs.items()}
        self.config = source.config
        self._source, self._method = source, method
        self.held: Mapping[str, Held] = {
            path: Held(spec, str(source.specs[path][1])) for path, spec in recipe.specs(abstract, rules).items()
        }
        stored = low_bit.in_parts({path: shape for path, (shape, _) in source.specs.items()}, self.held)
        self.specs = {name: (shape, self._dtype(name)) for name, shape in stored.items()}
        self._last: tuple[tuple, QuantizedArray] | None = None

    def window(self, name: str, box: mapping.Box) -> np.ndarray:
        """A part of a parameter, or of what one in few bits is stored in."""
        path, part = low_bit.split(name, self.held)
        if part is None:
            return self._source.window(name, box)
        axis, inputs = self.axis(name), self._inputs(path)
        shape, dtype = self._source.specs[path]
        out = empty(tuple(each.stop - each.start for each in box), self.specs[name][1])
        frame = tuple(slice(0, shape[i]) if i in inputs else each for i, each in enumerate(box))
        width = int(np.prod([each.stop - each.start for i, each in enumerate(frame) if i != axis])) * dtype.itemsize
        for piece in pieces(box[axis], width):
            made = np.asarray(getattr(self._rounded(path, mapping.with_part(frame, axis, piece)), part))
            wanted = tuple(each if i in inputs else slice(None) for i, each in enumerate(box))
            out[mapping.within(mapping.with_part(box, axis, piece), box)] = made[wanted]
        return out

    def axis(self, name: str) -> int:
        """Along which axis windows are cheap: one that no product sums over, so that groups stay whole."""
        path, part = low_bit.split(name, self.held)
        axis = self._source.axis(path)
        if part is None or axis not in self._inputs(path):
            return axis
        shape = self._source.specs[path][0]
        return max(set(range(len(shape))) - set(self._inputs(path)), key=lambda each: shape[each])

    def _rounded(self, path: str, box: mapping.Box) -> QuantizedArray:
        """A part of a parameter in few bits; the last is kept, because its values and its scales are asked for in turn."""
        asked = (path, tuple((each.start, each.stop) for each in box))
        if self._last is None or self._last[0] != asked:
            self._last = None  # makes room first
            weight = self._source.window(path, box)
            made = ptq.quantise_tensor(path, weight, self.held[path].spec, method=self._method)
            self._last = (asked, made)
        return self._last[1]

    def _inputs(self, path: str) -> tuple[int, ...]:
        return forms.inputs_of(path, len(self._source.specs[path][0]))

    def _dtype(self, name: str) -> np.dtype:
        path, part = low_bit.split(name, self.held)
        return self._source.specs[name][1] if part is None else self.held[path].part_dtype(part)
