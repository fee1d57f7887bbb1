"""What a training run refuses to be configured as."""

import pytest

from llama4_jax.config.train import TrainConfig


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kept_in": "disk"}, "kept_in='disk'; use one of 'device', 'host'"),
        ({"kept_in": "host"}, "kept_in='host' wants a policy that says what is kept; remat='none' has none"),
    ],
)
def test_what_cannot_be_kept_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=1, **change)
