"""Options of BEiT-3 that make no model."""

import pytest

from longnet_zoo.models import BEiT3, LongNetLMConfig
from tests.models.beit3_draws import make_config


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 22}, "img_size=22 and patch_size=5"),
        ({"img_size": 0}, "img_size must be an integer of at least 1, got 0"),
        ({"vocab_size": 0}, "vocab_size must be an integer of at least 1 or None, got 0"),
        ({"num_classes": -1}, "num_classes must be an integer of at least 0, got -1"),
        ({"max_text_len": 0}, "max_text_len must be .*got 0"),
        ({"num_visual_tokens": 0}, "num_visual_tokens must be .*got 0"),
        ({"global_pool": "map"}, "global_pool must be one of 'token', 'avg', got 'map'"),
        ({"heads": ("vqa",)}, r"heads must be .*got \('vqa',\)"),
        ({"heads": "retrieval"}, "heads must be .*got 'retrieval'"),
        ({"heads": ("retrieval",) * 2}, r"different names .*got \('retrieval', 'retrieval'\)"),
        ({"heads": ("retrieval",), "vocab_size": None}, "retrieval.*with vocab_size=None"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make_config(**options)


def test_options_of_another_type_are_refused():
    with pytest.raises(TypeError, match="final_norm must be True or False, got 1"):
        make_config(final_norm=1)
    with pytest.raises(TypeError, match="BEiT3 takes a BEiT3Config, got LongNetLMConfig"):
        BEiT3(LongNetLMConfig())
