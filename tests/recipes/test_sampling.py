"""Drawing tokens, and what of them is shown."""

import dataclasses

import pytest

from longnet_zoo.text.generation import printable
from longnet_zoo.tokenizers import ByteTokenizer
from recipes.sampling import SamplingConfig
from recipes.text_lm import TextLM
from tests.recipes.text_runs import model_options


def test_sample_continues_the_prompt_and_shows_no_control_characters():
    sampling = SamplingConfig(max_new_tokens=30, temperature=2.0, top_k=None)
    task = TextLM(model_options=model_options(), sampling=sampling)
    task.attach_tokenizer(ByteTokenizer())
    text = task.eval().sample("import os\n")
    assert text.startswith("import os\n")
    assert len(text) > len("import os\n")
    assert text == printable(text)
    again = dataclasses.replace(sampling, stop_strings=(text[20:22],), prompts=("x",))
    task.sampling = again
    assert task.sample("import os\n") == text[: text.index(text[20:22], 10)]
    assert printable("a\x1b[2J\tb\n") == "a\ufffd[2J\tb\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, r"prompts must be .* not empty, got \(\)"),
        ({"prompts": ("a", "")}, r"prompts must be .* not empty, got \('a', ''\)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be finite, 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be None, or 1 or more, got 0"),
        ({"mask": ""}, "mask must not be empty, got ''"),
    ],
)
def test_bad_sampling_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
