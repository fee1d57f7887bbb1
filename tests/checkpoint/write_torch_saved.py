"""Writes torch_saved.pth: every kind of value that Meta's files may hold. Needs torch (the extra [parity])."""

import io
import pathlib

import torch


def values() -> dict:
    """Names and what is saved under them; `test_torch_files` knows the numbers."""
    count = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    return {
        "float": count,
        "bfloat": count.bfloat16(),
        "half": count.half(),
        "parameter": torch.nn.Parameter(count.clone()),
        "transposed": count.T,
        "part": count[1:3, 2:],
        "scalar": torch.tensor(7.0),
        "empty": torch.zeros(0, 3),
        "layers.0._extra_state": io.BytesIO(b"state of a framework"),
        "integers": torch.arange(3),
        "eight_bits": count.to(torch.float8_e4m3fn),
    }


if __name__ == "__main__":
    torch.save(values(), pathlib.Path(__file__).with_name("torch_saved.pth"))
