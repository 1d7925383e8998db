import pytest
import torch

from longnet_zoo.models import LongNetMLM, LongNetMLMConfig

SMALL = {"vocab_size": 61, "embed_dim": 24, "num_heads": 4}
PATTERN = {"segment_lengths": (7, 16, 30), "dilation_rates": (1, 2, 3)}


@pytest.mark.parametrize("place", [0, 6, 17, 42])
def test_outputs_depend_on_the_tokens_of_the_pattern_only(place):
    config = LongNetMLMConfig(**SMALL, **PATTERN, num_layers=1)
    model = LongNetMLM(config)
    tokens = torch.randint(61, (1, 43))
    changed = tokens.clone()
    changed[0, place] = (tokens[0, place] + 1) % 61
    is_moved = (model(tokens) != model(changed)).any(-1)[0]
    sees = config.pattern.mask_counts(43, 4).any(0)[:, place]
    sees[place] = True  # the residual connection
    assert torch.equal(is_moved, sees)
    assert sees[place + 1 :].any() or place == 42


def test_loss_is_that_of_the_masked_positions():
    model = LongNetMLM(LongNetMLMConfig(**SMALL, **PATTERN, num_layers=2))
    tokens = torch.randint(61, (2, 43))
    labels = torch.full_like(tokens, -100)
    labels[0, 3], labels[1, 7], labels[1, 40] = 5, 60, 0
    logits = model(tokens)
    picked = torch.stack([logits[0, 3], logits[1, 7], logits[1, 40]])
    expected = torch.nn.functional.cross_entropy(picked, torch.tensor([5, 60, 0]))
    torch.testing.assert_close(model.loss(tokens, labels), expected, atol=1e-5, rtol=1e-5)


def test_batch_without_masked_positions_has_no_loss_and_no_gradient():
    model = LongNetMLM(LongNetMLMConfig(**SMALL, **PATTERN, num_layers=1))
    tokens = torch.randint(61, (2, 43))
    loss = model.loss(tokens, torch.full_like(tokens, -100))
    loss.backward()
    assert loss.item() == 0
    assert all(x.grad is None or not x.grad.any() for x in model.parameters())


def test_rotary_is_the_default_because_xpos_grows_for_later_keys():
    config = LongNetMLMConfig(**SMALL, **PATTERN)
    assert config.position == "rotary"
    # A segment that rotary serves and xPos refuses.
    long = {**SMALL, "num_layers": 1, "segment_lengths": (40_000,), "dilation_rates": (1,)}
    model = LongNetMLM(LongNetMLMConfig(**long, position="xpos", xpos_scale_base=1.0))
    with pytest.raises(ValueError, match=r"scale_base=1\.0 overflows"):
        model(torch.zeros(1, 200, dtype=torch.int64))
    rotary = LongNetMLM(LongNetMLMConfig(**long, xpos_scale_base=1.0))
    assert rotary(torch.zeros(1, 200, dtype=torch.int64)).isfinite().all()
