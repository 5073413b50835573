"""Every class can be written in the configuration of a LightningCLI."""

import jsonargparse
import pytest
import yaml

from lightning_plugins import GradientAccumulation, MicroBatching, Tokens

TOKENS = {"class_path": "lightning_plugins.Tokens", "init_args": {"key": "labels", "ignore_index": 0}}


@pytest.mark.parametrize(
    ("cls", "arguments", "attributes"),
    [
        (GradientAccumulation, {"batches": 4}, {"batches": 4, "count": "samples", "carry": False}),
        (
            GradientAccumulation,
            {"effective_batch_size": 256, "carry": True},
            {"effective_batch_size": 256, "carry": True},
        ),
        (GradientAccumulation, {"schedule": {0: 1, 1000: 4}}, {"schedule": {0: 1, 1000: 4}}),
        (GradientAccumulation, {"batches": 4, "count": TOKENS}, {"batches": 4}),
        (MicroBatching, {"size": 16}, {"size": 16}),
        (MicroBatching, {"size": "auto", "count": TOKENS}, {"size": "auto"}),
    ],
    ids=str,
)
def test_yaml_makes_the_object(cls, arguments, attributes, tmp_path):
    written = {"callback": {"class_path": f"lightning_plugins.{cls.__name__}", "init_args": arguments}}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(written))
    parser = jsonargparse.ArgumentParser()
    parser.add_argument("--config", action="config")
    parser.add_argument("--callback", type=cls)
    made = parser.instantiate(parser.parse_args(["--config", str(tmp_path / "config.yaml")])).callback
    assert type(made) is cls
    assert {name: getattr(made, name) for name in attributes} == attributes
    if "count" in arguments and arguments["count"] is TOKENS:
        assert isinstance(made.count, Tokens)
        assert (made.count.key, made.count.ignore_index) == ("labels", 0)
