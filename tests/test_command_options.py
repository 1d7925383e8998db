import pytest

from longnet_zoo.command_options import read_options


def build(name, *, device="cpu", **options):
    """Takes options, beside arguments of its own."""


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a=3", 3),
        ("a=0.5", 0.5),
        ("a=1e3", 1000),
        ("a=true", True),
        ("a=null", None),
        ("a=rotary", "rotary"),
        ("a=2048,65536", (2048, 65536)),
        ("a=2048,", (2048,)),
        ("a=[64, 256]", (64, 256)),
        ("a=relu,gelu", ("relu", "gelu")),
        ('a={"img_size": 128, "embed_dim": 64}', {"img_size": 128, "embed_dim": 64}),
        ("a=b=c", "b=c"),
    ],
)
def test_values_are_json_or_lists_or_words(text, value):
    options = read_options([text], function=build)
    assert options == {"a": value}
    assert type(options["a"]) is type(value)


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (["a"], "must be NAME=VALUE, got 'a'"),
        (["=3"], "must be NAME=VALUE, got '=3'"),
        (["a="], "must be NAME=VALUE, got 'a='"),
        (["a=1", "b=1", "a=2"], "must give a once, got it twice"),
        (["a=NaN"], "takes finite numbers, got 'NaN'"),
        (["a=1e999"], "takes finite numbers, got '1e999'"),
        (["a=[1, -Infinity]"], r"takes finite numbers, got '\[1, -Infinity\]'"),
        (["device=cpu"], "takes no device, got 'device=cpu'"),
    ],
)
def test_what_cannot_be_read_is_refused(texts, message):
    with pytest.raises(ValueError, match=message):
        read_options(texts, function=build)
