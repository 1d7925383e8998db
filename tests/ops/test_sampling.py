"""Drawing tokens from logits."""

import pytest
import torch

from longnet_zoo.ops.sampling import Sampling, draw_tokens

LOGITS = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))


def shares(sampling, logits=LOGITS, **options):
    """How often each token is drawn."""
    draws = draw_tokens(logits.expand(20_000, -1), sampling, **options)
    return torch.bincount(draws, minlength=logits.shape[-1]) / 20_000


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.5, 0.25, 0.15, 0.1)),
        ({"temperature": 0.5}, (0.7246, 0.1812, 0.0652, 0.0290)),
        ({"top_k": 2}, (2 / 3, 1 / 3, 0, 0)),
        ({"top_k": 9}, (0.5, 0.25, 0.15, 0.1)),
        # The third one is needed to reach the share, the fourth is not.
        ({"top_p": 0.8}, (0.5556, 0.2778, 0.1667, 0)),
        ({"top_p": 0.01}, (1, 0, 0, 0)),
        ({"top_p": 1.0}, (0.5, 0.25, 0.15, 0.1)),
        ({"min_p": 0.29}, (0.5556, 0.2778, 0.1667, 0)),
        ({"min_p": 1.0}, (1, 0, 0, 0)),
        # The nucleus is that of the two tokens that are left.
        ({"top_k": 2, "top_p": 0.6}, (1, 0, 0, 0)),
    ],
)
def test_tokens_are_drawn_by_their_share(options, expected):
    found = shares(Sampling(**{"temperature": 1.0, **options}))
    torch.testing.assert_close(
        found, torch.tensor(expected, dtype=torch.float32), atol=0.012, rtol=0
    )


def test_temperature_zero_takes_the_likeliest():
    assert draw_tokens(LOGITS[None], Sampling()).tolist() == [0]
    assert draw_tokens(LOGITS[None], Sampling(), banned_ids=[0, 1]).tolist() == [2]
    # Next to nothing is nothing in float32.
    assert draw_tokens(LOGITS[None], Sampling(temperature=1e-46)).tolist() == [0]


def test_penalty_divides_positive_and_multiplies_negative_logits():
    logits = torch.tensor([[2.0, 1.5, -1.0, -1.5]])
    seen = torch.tensor([[True, False, True, False]])
    found = shares(Sampling(temperature=1.0, repetition_penalty=2.0), logits, seen=seen)
    expected = torch.tensor([1.0, 1.5, -2.0, -1.5]).softmax(-1)
    torch.testing.assert_close(found, expected, atol=0.012, rtol=0)


def test_top_k_takes_no_more_among_equals():
    found = shares(Sampling(temperature=1.0, top_k=2), torch.zeros(5))
    assert (found > 0).sum() == 2


def test_next_to_no_temperature_takes_the_likeliest():
    logits = torch.tensor([[1e30, 3e30, 2e30]])
    assert draw_tokens(logits, Sampling(temperature=1e-30)).tolist() == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_nothing_to_draw_is_an_error(temperature):
    sampling = Sampling(temperature=temperature)
    with pytest.raises(ValueError, match=r"that of rows \[1\] is nan"):
        draw_tokens(torch.tensor([[0.0, 1.0], [0.0, torch.nan]]), sampling)
    with pytest.raises(ValueError, match=r"is -inf: .* all tokens are banned \(4 of 4 are\)"):
        draw_tokens(LOGITS[None], sampling, banned_ids=range(4))


def test_a_generator_repeats_its_draws():
    sampling = Sampling(temperature=1.0)
    first, second, other = (
        draw_tokens(
            LOGITS.expand(50, -1), sampling, generator=torch.Generator().manual_seed(seed)
        ).tolist()
        for seed in (1, 1, 2)
    )
    assert first == second != other


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"temperature": -0.1}, ValueError, "temperature must be finite, 0 or more, got -0.1"),
        ({"temperature": float("nan")}, ValueError, "must be finite, 0 or more, got nan"),
        ({"temperature": float("inf")}, ValueError, "must be finite, 0 or more, got inf"),
        ({"top_k": 0}, ValueError, "top_k must be None, or 1 or more, got 0"),
        ({"temperature": "0.5"}, TypeError, "temperature must be a number, got '0.5'"),
        ({"min_p": True}, TypeError, "min_p must be a number, got True"),
        ({"top_k": 1.5}, TypeError, "top_k must be None or an integer, got 1.5"),
        ({"top_p": 0.0}, ValueError, r"top_p must be None, or in \(0, 1\], got 0.0"),
        ({"min_p": 1.1}, ValueError, r"min_p must be None, or in \(0, 1\], got 1.1"),
        (
            {"repetition_penalty": 0.0},
            ValueError,
            "repetition_penalty must be finite, above 0, got 0",
        ),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        Sampling(**options)
