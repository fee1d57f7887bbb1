"""How much memory accelerators have, as their makers state it.

NVIDIA writes GB and builds GiB for GeForce cards; of its data centre cards about one per cent less than the GiB given
here is there (`nvidia-smi` shows 79.6, 140.4 and 179.1). That, and what drivers and the compiler take, is the margin
that callers keep (`memory.USABLE`).
"""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
    """One accelerator. Of a chip that JAX shows as two devices, `memory` is that of both."""

    name: str
    kind: str  # "tpu", "gpu" (data centre) or "consumer"
    memory: float  # GiB
    source: str
    devices: int = 1  # as how many JAX shows it


_TPU = "cloud.google.com/tpu/docs/"
CHIPS = (
    Chip(name="v5e", kind="tpu", memory=16, source=_TPU + "v5e"),
    Chip(name="v5p", kind="tpu", memory=95, source=_TPU + "tpu7x, table of specifications"),
    Chip(name="v6e", kind="tpu", memory=32, source=_TPU + "tpu7x, table of specifications"),
    Chip(name="tpu7x", kind="tpu", memory=192, devices=2, source=_TPU + "tpu7x, table of specifications"),
    Chip(name="H100", kind="gpu", memory=80, source="NVIDIA H100 data sheet (SXM)"),
    Chip(name="H200", kind="gpu", memory=141, source="NVIDIA H200 data sheet"),
    Chip(name="B200", kind="gpu", memory=180, source="NVIDIA DGX B200 user guide: 1,440 GB in 8"),
    Chip(name="RTX 3090", kind="consumer", memory=24, source="NVIDIA GeForce RTX 3090 specifications"),
    Chip(name="RTX 4090", kind="consumer", memory=24, source="NVIDIA GeForce RTX 4090 specifications"),
    Chip(name="RTX 5090", kind="consumer", memory=32, source="NVIDIA GeForce RTX 5090 specifications"),
)
