import pytest
import torch

from longnet_zoo.factory import create_model
from longnet_zoo.models import LongNetLM, LongNetLMConfig

SMALL = {"vocab_size": 61, "embed_dim": 24, "num_layers": 2, "num_heads": 4}
PATTERN = {"segment_lengths": (7, 16, 30), "dilation_rates": (1, 2, 3)}


@pytest.mark.parametrize("position", ["xpos", "rotary", "alibi", "relative", None])
@pytest.mark.parametrize("place", [0, 6, 17, 42])
def test_no_output_depends_on_a_later_token(position, place):
    model = LongNetLM(LongNetLMConfig(**SMALL, **PATTERN, position=position))
    tokens = torch.randint(61, (1, 43))
    changed = tokens.clone()
    changed[0, place] = (tokens[0, place] + 1) % 61
    before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :place], after[:, :place])
    assert not torch.equal(before[:, place], after[:, place])


# Embedding, layers, heads of LongNet's Tables 3 and 4; head sizes follow.
@pytest.mark.parametrize(
    ("name", "embed_dim", "num_layers", "num_heads"),
    [
        ("longnet_lm_base", 768, 12, 12),
        ("longnet_lm_350m", 1024, 24, 16),
        ("longnet_lm_760m", 1536, 24, 16),
        ("longnet_lm_2b7", 2560, 32, 32),
    ],
)
def test_sizes_are_those_of_the_paper(name, embed_dim, num_layers, num_heads):
    with torch.device("meta"):
        config = create_model(name).config
    assert (config.embed_dim, config.num_layers, config.num_heads) == (
        embed_dim,
        num_layers,
        num_heads,
    )
    assert config.segment_lengths == (2048, 4096, 8192, 16384, 32768)
    assert config.dilation_rates == (1, 2, 4, 6, 12)
    assert (config.norm, config.position, config.is_causal) == ("sub_ln", "xpos", True)
    assert (config.vocab_size, config.tie_embeddings) == (100_256, True)


def test_loss_needs_no_logits_of_the_whole_sequence():
    model = LongNetLM(LongNetLMConfig(**SMALL, **PATTERN))
    tokens = torch.randint(61, (1, 44))
    inputs, labels = tokens[:, :-1], tokens[:, 1:].clone()
    labels[0, 5:9] = -100
    rows = torch.nn.functional.cross_entropy(model(inputs)[0], labels[0], reduction="none")
    for chunk_size in (1, 10, 1000):
        losses = model.loss(inputs, labels, chunk_size=chunk_size, reduction="none")
        torch.testing.assert_close(losses[0], rows, atol=1e-5, rtol=1e-5)
        total = model.loss(inputs, labels, chunk_size=chunk_size, reduction="sum")
        torch.testing.assert_close(total, rows.sum(), atol=1e-4, rtol=1e-5)
    mean = model.loss(inputs, labels.masked_fill(labels == -100, -1), ignore_index=-1)
    torch.testing.assert_close(mean, rows.sum() / 39, atol=1e-5, rtol=1e-5)


def test_tiny_model_learns_to_copy_a_byte():
    model = create_model("longnet_lm_tiny", vocab_size=11, embed_dim=32, num_layers=1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.arange(64).remainder(11)[None]
    for _ in range(60):
        optimizer.zero_grad()
        model.loss(tokens[:, :-1], tokens[:, 1:]).backward()
        optimizer.step()
    assert model.loss(tokens[:, :-1], tokens[:, 1:]).item() < 0.1
