"""TransformerBlock against its three formulas written out."""

import pytest
import torch
from torch import nn
from torch.nn import functional

from longnet_zoo.layers import DilatedAttention, FeedForward, Route, TransformerBlock
from longnet_zoo.ops.pattern import DilatedPattern

PATTERN = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
NORMS = ["sub_ln", "pre_ln", "deepnorm"]


def make(norm="sub_ln", *, position="xpos", is_causal=False, activation="gelu", **options):
    sub_ln = norm == "sub_ln"
    block = TransformerBlock(
        attention=DilatedAttention(
            embed_dim=24,
            num_heads=4,
            pattern=PATTERN,
            position=position,
            is_causal=is_causal,
            sub_ln=sub_ln,
        ),
        feed_forward=FeedForward(embed_dim=24, ffn_dim=31, activation=activation, sub_ln=sub_ln),
        embed_dim=24,
        norm=norm,
        **options,
    )
    with torch.no_grad():
        for norm_module in (block.attention_norm, block.ffn_norm):
            norm_module.weight.copy_(torch.randn(24))
            norm_module.bias.copy_(torch.randn(24))
    return block


def normalize(norm, x):
    return functional.layer_norm(x, (24,), norm.weight, norm.bias, 1e-5)


@pytest.mark.parametrize("norm", ["sub_ln", "pre_ln"])
def test_pre_norm_formula(norm):
    block = make(norm)
    x = torch.randn(2, 17, 24)
    middle = x + block.attention(normalize(block.attention_norm, x))
    expected = middle + block.feed_forward(normalize(block.ffn_norm, middle))
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-6)


def test_deepnorm_formula():
    block = make("deepnorm", residual_scale=1.7)
    x = torch.randn(2, 17, 24)
    middle = normalize(block.attention_norm, 1.7 * x + block.attention(x))
    expected = normalize(block.ffn_norm, 1.7 * middle + block.feed_forward(middle))
    torch.testing.assert_close(block(x), expected, atol=1e-6, rtol=1e-6)


def test_options_reach_the_attention():
    seen = {}

    class Attention(nn.Module):
        def forward(self, x, **options):
            seen.update(options)
            return x

    block = TransformerBlock(
        attention=Attention(), feed_forward=nn.Identity(), embed_dim=24, norm="pre_ln"
    )
    options = {
        "rotary": (torch.zeros(1), torch.zeros(1)),
        "position_bias": nn.Identity(),
        "key_padding_mask": torch.zeros(1),
        "cu_seqlens": torch.ones(1),
        "route": Route.split(3),
        "attention_op": nn.Identity(),
    }
    block(torch.randn(1, 3, 24), **options)
    assert seen.keys() == options.keys()
    assert all(seen[name] is value for name, value in options.items())


@pytest.mark.parametrize("norm", NORMS)
def test_padded_batch_equals_one_by_one(norm):
    block = make(norm)
    x, lengths = torch.randn(3, 19, 24), (19, 8, 1)
    mask = torch.arange(19) >= torch.tensor(lengths)[:, None]
    out = block(x, key_padding_mask=mask)
    assert out.isfinite().all()
    for row, length in enumerate(lengths):
        alone = block(x[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("norm", NORMS)
def test_dropout_and_drop_path_act_in_training_only(norm):
    x = torch.randn(2, 17, 24)
    for option in ("dropout", "drop_path"):
        block = make(norm, **{option: 0.5})
        draws = {block(x).sum().item() for _ in range(8)}
        assert len(draws) > 1
        block.eval()
        plain = make(norm).eval()
        plain.load_state_dict(block.state_dict())
        assert torch.equal(block(x), plain(x))


def test_drop_path_skips_whole_samples():
    block = make("pre_ln", drop_path=0.5)
    x = torch.randn(64, 3, 24)
    is_skipped = (block(x) == x).all(dim=-1)
    # Both modules are skipped for a quarter of the samples, with all their positions.
    assert torch.equal(is_skipped.any(dim=1), is_skipped.all(dim=1))
    assert 4 <= is_skipped[:, 0].sum() <= 30


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_autocast_is_finite_and_near(norm, activation):
    block = make(norm, activation=activation)
    x = torch.randn(2, 17, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = block(x)
    assert (out - block(x)).abs().max() < 0.15
    (out * torch.randn_like(out)).sum().backward()
    assert x.grad.isfinite().all()
    for name, parameter in block.named_parameters():
        assert parameter.grad.isfinite().all(), name


@pytest.mark.parametrize(
    ("norm", "position", "is_causal", "backend"),
    [
        ("sub_ln", "xpos", True, "inductor"),
        ("deepnorm", "relative", False, "aot_eager"),
        ("pre_ln", "alibi", True, "aot_eager"),
    ],
)
def test_compiles_to_the_eager_result(norm, position, is_causal, backend):
    block = make(norm, position=position, is_causal=is_causal)
    x = torch.randn(2, 17, 24, requires_grad=True)
    mask = torch.arange(17) >= torch.tensor([17, 9])[:, None]
    compiled = torch.compile(block, fullgraph=True, backend=backend)
    cotangent = torch.randn_like(x)
    leaves = [x, *block.parameters()]
    out, expected = compiled(x, key_padding_mask=mask), block(x, key_padding_mask=mask)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=1e-4)


def test_repr_names_the_options():
    assert "norm='deepnorm', residual_scale=1.5" in repr(make("deepnorm", residual_scale=1.5))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "post"}, r"\('sub_ln', 'pre_ln', 'deepnorm'\), got 'post'"),
        ({"residual_scale": 2.0}, r"residual_scale=2\.0 with norm='sub_ln'"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"drop_path": -0.1}, r"drop_path must be in \[0, 1\), got -0\.1"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def test_inner_norms_must_fit_the_scheme():
    attention = DilatedAttention(embed_dim=24, num_heads=4, pattern=PATTERN, sub_ln=True)
    feed_forward = FeedForward(embed_dim=24, ffn_dim=31, sub_ln=False)
    with pytest.raises(ValueError, match="norm='pre_ln' needs attention with sub_ln=False"):
        TransformerBlock(
            attention=attention, feed_forward=feed_forward, embed_dim=24, norm="pre_ln"
        )
    with pytest.raises(ValueError, match="needs feed_forward with sub_ln=True, got one"):
        TransformerBlock(attention=attention, feed_forward=feed_forward, embed_dim=24)
