"""Drawing tokens, and what of them is shown."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longnet_zoo.tokenizers import ByteTokenizer
from recipes.sampling import SamplingConfig, complete, draw, printable
from recipes.text_lm import TextLM
from tests.recipes.text_runs import model_options


class Counter(nn.Module):
    """Predicts token + 1 for sure, and everything else at equal odds."""

    def forward_features(self, tokens):
        return F.one_hot((tokens + 1) % 7, 7).float() * 50

    def forward_head(self, features):
        return features


def test_greedy_sampling_follows_the_model_and_stops():
    config = SamplingConfig(max_new_tokens=9, temperature=0)
    new = complete(Counter(), torch.tensor([1, 2]), config=config, stop_id=6)
    assert new.tolist() == [3, 4, 5, 6]


def test_banned_tokens_are_never_drawn_and_length_is_bounded():
    config = SamplingConfig(max_new_tokens=20, temperature=1.0, top_k=None)
    new = complete(Counter(), torch.tensor([1]), config=config, banned_ids=[2, 3])
    assert len(new) == 20
    assert not {2, 3} & set(new.tolist())


def test_top_k_leaves_the_likeliest_and_the_seed_repeats():
    logits = torch.tensor([0.0, 3.0, 1.0, 2.0])
    generator = torch.Generator().manual_seed(0)
    config = SamplingConfig(top_k=2, temperature=2.0)
    drawn = {int(draw(logits, config=config, generator=generator)) for _ in range(100)}
    assert drawn == {1, 3}
    uniform = SamplingConfig(max_new_tokens=15, temperature=100.0, top_k=None)
    runs = [complete(Counter(), torch.tensor([1]), config=uniform).tolist() for _ in range(2)]
    assert runs[0] == runs[1]


def test_sample_continues_the_prompt_and_shows_no_control_characters():
    sampling = SamplingConfig(max_new_tokens=30, temperature=2.0, top_k=None)
    task = TextLM(model_options=model_options(), sampling=sampling)
    task.attach_tokenizer(ByteTokenizer())
    text = task.eval().sample("import os\n")
    assert text.startswith("import os\n")
    assert len(text) > len("import os\n")
    assert text == printable(text)
    assert printable("a\x1b[2J\tb\n") == "a\ufffd[2J\tb\n"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": ()}, r"prompts must be .* not empty, got \(\)"),
        ({"prompts": ("a", "")}, r"prompts must be .* not empty, got \('a', ''\)"),
        ({"max_new_tokens": 0}, "max_new_tokens must be 1 or more, got 0"),
        ({"temperature": -1.0}, "temperature must be 0 or more, got -1.0"),
        ({"top_k": 0}, "top_k must be None or 1 or more, got 0"),
        ({"mask": ""}, "mask must not be empty, got ''"),
    ],
)
def test_bad_sampling_settings_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**options)
