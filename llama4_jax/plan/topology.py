"""TPUs that programs are compiled for, and what their makers state of them, a device: tpu7x shows each chip as two.

The compiler knows v5e and v6e in two dimensions up to 16x16 chips, v5p and tpu7x in three, as 4x8x8 for 256.

Source: cloud.google.com/tpu/docs, pages v5e, v5p, v6e and tpu7x. `link` is the bandwidth along one axis of the torus, both
ways: the stated bidirectional bandwidth of a chip, halved for what it sends and divided by its axes. GPUs are known to
closed forms alone, as "H100:8x1": NVIDIA's data sheets of H100 and H200 (SXM) and the DGX B200 user guide, dense rates, NVLink.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence

import jax
from jax.experimental import topologies

from llama4_jax.plan.chips import CHIPS, Chip


@dataclasses.dataclass(frozen=True, kw_only=True)
class Device:
    """flops (bfloat16) a second, hbm, link and host in bytes a second; memory in GiB, as `plan.chips` has it of the chip.

    host: between a device and the memory of its host, each way by turns. Makers do not state it; this is what "How to scale
    your model" (jax-ml.github.io/scaling-book, part 2) reckons with for PCIe.
    """

    chip: Chip
    flops: float
    hbm: float
    link: float
    host: float = 15e9
    int8: float = 0.0  # operations a second; 0 where matrix units multiply no integers

    @property
    def memory(self) -> float:
        return self.chip.memory / self.chip.devices


_CHIP = {chip.name: chip for chip in CHIPS}
DEVICES = {
    "v5e": Device(chip=_CHIP["v5e"], flops=197e12, hbm=819e9, link=100e9, int8=394e12),
    "v5p": Device(chip=_CHIP["v5p"], flops=459e12, hbm=2765e9, link=200e9, int8=918e12),
    "v6e": Device(chip=_CHIP["v6e"], flops=918e12, hbm=1640e9, link=200e9, int8=1836e12),
    "tpu7x": Device(chip=_CHIP["tpu7x"], flops=1155e12, hbm=3690e9, link=100e9),
    "H100": Device(chip=_CHIP["H100"], flops=989e12, hbm=3350e9, link=450e9, int8=1979e12),
    "H200": Device(chip=_CHIP["H200"], flops=989e12, hbm=4800e9, link=450e9, int8=1979e12),
    "B200": Device(chip=_CHIP["B200"], flops=2250e12, hbm=8000e9, link=900e9, int8=4500e12),
}


def device(topology: str) -> Device:
    """What is stated of the devices of a topology such as "v5p:4x4x8". Raises ValueError for an unknown kind."""
    kind = topology.split(":")[0]
    if kind not in DEVICES or not re.fullmatch(r"\w+:\d+(x\d+)+", topology):
        raise ValueError(f"topology {topology!r} is unknown; use one of {', '.join(DEVICES)} and a shape, as v5p:4x4x8")
    return DEVICES[kind]


def size(topology: str) -> int:
    """How many devices a topology has; needs no libtpu."""
    return device(topology).chip.devices * math.prod(int(n) for n in topology.split(":")[1].split("x"))


def devices(topology: str) -> Sequence[jax.Device]:
    """The devices of a topology, none of which need exist here; needs the package libtpu.

    Raises NotImplementedError for GPUs.
    """
    if device(topology).chip.kind != "tpu":
        raise NotImplementedError(
            f"topology {topology!r}: programs are compiled for TPUs; of GPUs there is a closed form alone"
        )
    return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
