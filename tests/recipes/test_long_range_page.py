import pytest

from recipes.long_range_page import long_range_page

MODEL = {
    "task": "passkey",
    "model_name": "longnet_lm_tiny",
    "segment_lengths": [64, 256],
    "dilation_rates": [1, 2],
}
ENVIRONMENT = {name: ["1"] for name in ("device", "torch", "commit", "date")}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, "begins untrained; segments (length : rate) 64 : 1, 256 : 2."),
        (
            {"pretrained": True},
            "begins with its weights, trained with 4,096 : 1, 32,768 : 4; "
            "segments (length : rate) 64 : 1, 256 : 2.",
        ),
        ({"pretrained": "a.ckpt"}, "begins with `a.ckpt`; segments (length : rate) 64 : 1"),
        (
            {"segment_lengths": None, "dilation_rates": None},
            "segments (length : rate) 4,096 : 1, 32,768 : 4.",
        ),
    ],
)
def test_it_says_with_which_weights_and_segments_a_model_begins(options, words, tmp_path):
    document = {
        "command": "make",
        "seeds": 1,
        "environment": ENVIRONMENT,
        "settings": {"passkey": MODEL | options},
        "tasks": {"passkey": []},
    }
    assert words in long_range_page(document, picture=tmp_path / "a.svg", page=tmp_path / "a.md")
