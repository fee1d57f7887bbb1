"""What a training run refuses to be configured as."""

import pytest

from llama4_jax import config as configs
from llama4_jax.config.train import QatConfig, TrainConfig


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


@pytest.mark.parametrize(
    "rounding, message",
    [
        ({"recipe": "int3"}, "QatConfig.recipe='int3'; use one of None, 'int4_all'"),
        ({"recipe": "int4_all", "ranges": "guessed"}, "ranges='guessed'; use one of 'minmax', 'learned'"),
        ({"recipe": "int8", "gradual": 5}, "gradual=5 wants a recipe in four bits, got recipe='int8'"),
        ({"recipe": "int4_all", "start": 9}, "qat.start=9 is past the last of steps=9"),
        ({"cache": "int8", "start": 9}, "qat.start=9 is past the last of steps=9"),
        ({"cache": "int4"}, "cache='int4'; use one of None, 'int8'"),
    ],
)
def test_rounding_that_could_not_be_is_refused(rounding, message):
    with pytest.raises(ValueError, match=message):
        TrainConfig(steps=9, qat=QatConfig(**rounding))


def test_rounding_is_off_by_default_and_switched_on_by_overrides():
    assert not TrainConfig(steps=9).qat.rounds
    changes = ["qat.recipe=w4a8", "qat.group=32", "qat.start=5", "qat.ranges=learned"]
    config = configs.apply(TrainConfig(steps=9), changes)
    assert config.qat == QatConfig(recipe="w4a8", group=32, start=5, ranges="learned")
