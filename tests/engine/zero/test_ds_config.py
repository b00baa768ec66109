"""What a ds_config says of the precision: only a loss scale that seeks its size skips updates as a matter of course."""

import pytest

from convclip.engine.zero.ds_config import adapts_loss_scale


@pytest.mark.parametrize(
    ("config", "adapts"),
    [
        ({"fp16": {"enabled": True}}, True),
        ({"fp16": {"enabled": True, "loss_scale": 0}}, True),
        ({"fp16": {"enabled": True, "loss_scale": 128}}, False),
        ({"fp16": {"enabled": False}}, False),
        ({"bf16": {"enabled": True}}, False),
        ({}, False),
    ],
)
def test_only_a_dynamic_loss_scale_skips_updates_as_a_matter_of_course(config, adapts):
    assert adapts_loss_scale(config) is adapts
