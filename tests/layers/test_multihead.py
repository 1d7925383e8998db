"""MultiheadDilatedAttention in the place of nn.MultiheadAttention, alone and in stock layers."""

import copy

import pytest
import torch
from torch import nn

from longnet_zoo.layers import MultiheadDilatedAttention
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern

DENSE = DilatedPattern(segment_lengths=(1000,), dilation_rates=(1,))
PATTERN = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
CAUSAL_MASK = nn.Transformer.generate_square_subsequent_mask


def make(**options):
    return MultiheadDilatedAttention(
        **({"embed_dim": 24, "num_heads": 4, "pattern": PATTERN} | options)
    )


def stock_and_ours(**options):
    stock = nn.MultiheadAttention(24, 4, batch_first=True)
    with torch.no_grad():
        stock.in_proj_bias.copy_(torch.randn(72))
        stock.out_proj.bias.copy_(torch.randn(24))
    ours = make(pattern=DENSE, **options)
    ours.load_state_dict(stock.state_dict())
    return stock, ours


def padding_mask(*lengths, seq_len):
    return torch.arange(seq_len) >= torch.tensor(lengths)[:, None]


@pytest.mark.parametrize("form", ["none", "bool", "float"])
@pytest.mark.parametrize("is_causal", [True, False])
def test_one_segment_is_stock_attention(form, is_causal):
    stock, ours = stock_and_ours()
    x = torch.randn(2, 13, 24)
    mask = None if form == "none" else padding_mask(13, 7, seq_len=13)
    if form == "float":
        mask = torch.zeros(2, 13).masked_fill(mask, float("-inf"))
    attn_mask = CAUSAL_MASK(13) if is_causal else None
    if form == "bool" and is_causal:
        attn_mask = attn_mask.isinf()
    options = {"key_padding_mask": mask, "attn_mask": attn_mask, "is_causal": is_causal}
    expected, _ = stock(x, x, x, need_weights=False, **options)
    out, weights = ours(x, x, x, **options)
    assert weights is None
    is_token = torch.ones(2, 13, dtype=torch.bool) if mask is None else mask == 0
    torch.testing.assert_close(out[is_token], expected[is_token], atol=1e-5, rtol=1e-5)


def test_dilated_pattern_is_the_op_between_projections():
    module = make()
    x = torch.randn(2, 17, 24)
    q, k, v = (x @ module.in_proj_weight.T + module.in_proj_bias).view(2, 17, 3, 4, 6).unbind(2)
    expected = module.out_proj(dilated_attention(q, k, v, PATTERN).flatten(2))
    torch.testing.assert_close(module(x, x, x)[0], expected, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("how", ["constructor", "call", "float mask", "bool mask"])
def test_all_ways_to_be_causal_agree(how):
    module = make(is_causal=how == "constructor")
    x = torch.randn(1, 17, 24)
    mask = {"float mask": CAUSAL_MASK(17), "bool mask": CAUSAL_MASK(17).isinf()}.get(how)
    out = module(x, x, x, attn_mask=mask, is_causal=how == "call")[0]
    changed = x.clone()
    changed[0, 9] += 1.0
    out_changed = module(changed, changed, changed, attn_mask=mask, is_causal=how == "call")[0]
    assert torch.equal(out[0, :9], out_changed[0, :9])
    assert not torch.equal(out[0, 9:], out_changed[0, 9:])


def test_unbatched_input():
    module = make()
    x = torch.randn(17, 24)
    mask = padding_mask(9, seq_len=17)
    out = module(x, x, x, mask[0])[0]
    batched = x.unsqueeze(0)
    assert torch.equal(out, module(batched, batched, batched, mask)[0][0])


@pytest.mark.parametrize("norm_first", [True, False])
@pytest.mark.parametrize("num_heads", [3, 4])
def test_stock_encoder_layer_calls_us(norm_first, num_heads):
    """In eval mode the stock layer could hand our weights to a dense kernel; it must not."""
    layer = nn.TransformerEncoderLayer(
        24, num_heads, 32, dropout=0.0, batch_first=True, norm_first=norm_first
    )
    layer.self_attn = make(num_heads=num_heads)
    x, mask = torch.randn(2, 17, 24), padding_mask(17, 9, seq_len=17)

    def by_hand(x, mask):
        def attend(y):
            return layer.self_attn(y, y, y, key_padding_mask=mask)[0]

        def feed(y):
            return layer.linear2(layer.linear1(y).relu())

        if norm_first:
            x = x + attend(layer.norm1(x))
            return x + feed(layer.norm2(x))
        x = layer.norm1(x + attend(x))
        return layer.norm2(x + feed(x))

    for is_training in (True, False):
        layer.train(is_training)
        with torch.no_grad():
            for padding in (None, mask):
                out = layer(x, src_key_padding_mask=padding)
                torch.testing.assert_close(out, by_hand(x, padding), atol=1e-6, rtol=1e-5)
    causal = layer(x, src_mask=CAUSAL_MASK(17), is_causal=True)
    short = layer(x[:, :6], src_mask=CAUSAL_MASK(6), is_causal=True)
    torch.testing.assert_close(causal[:, 0], short[:, 0], atol=1e-6, rtol=1e-5)
    assert (causal - layer(x)).abs().max() > 1e-2


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("is_training", [True, False])
@pytest.mark.parametrize("is_causal", [True, False])
def test_stock_encoder_with_replaced_attention(is_training, is_causal):
    """Equals the stock encoder for one segment; in eval mode that one uses nested tensors."""
    stock = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True), 2
    ).train(is_training)
    ours = copy.deepcopy(stock)
    for layer in ours.layers:
        attention = make(pattern=DENSE)
        attention.load_state_dict(layer.self_attn.state_dict())
        layer.self_attn = attention.train(is_training)
    x, mask = torch.randn(3, 17, 24), padding_mask(17, 9, 1, seq_len=17)
    causal_mask = CAUSAL_MASK(17).isinf() if is_causal else None
    with torch.no_grad():
        expected = stock(x, causal_mask, src_key_padding_mask=mask)
        out = ours(x, causal_mask, src_key_padding_mask=mask)
    torch.testing.assert_close(out[~mask], expected[~mask], atol=1e-5, rtol=1e-5)


def test_encoder_built_from_our_layer():
    layer = nn.TransformerEncoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    layer.self_attn = make()
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).eval()
    x, mask = torch.randn(2, 17, 24), padding_mask(17, 9, seq_len=17)
    with torch.no_grad():
        out = encoder(x, src_key_padding_mask=mask)
        alone = encoder(x[1:, :9])
    torch.testing.assert_close(out[1, :9], alone[0], atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
def test_nested_batch_equals_one_by_one():
    module = make()
    parts = [torch.randn(length, 24) for length in (17, 4)]
    nested = torch.nested.as_nested_tensor(parts)
    for is_causal in (False, True):
        outputs = module(nested, nested, nested, is_causal=is_causal)[0].unbind()
        for part, out in zip(parts, outputs, strict=True):
            expected = module(part, part, part, is_causal=is_causal)[0]
            torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("name", ["key_padding_mask", "attn_mask"])
def test_nested_batch_with_a_mask_is_refused(name):
    nested = torch.nested.as_nested_tensor([torch.randn(7, 24), torch.randn(4, 24)])
    with pytest.raises(ValueError, match=f"neither key_padding_mask nor attn_mask, got {name}"):
        make()(nested, nested, nested, **{name: torch.zeros(7, 7)})


def test_stock_decoder_layer_calls_us():
    layer = nn.TransformerDecoderLayer(24, 4, 32, dropout=0.0, batch_first=True)
    ours = copy.deepcopy(layer)
    ours.self_attn = make(pattern=DENSE)
    ours.self_attn.load_state_dict(layer.self_attn.state_dict())
    x, memory = torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    options = {"tgt_mask": CAUSAL_MASK(9), "tgt_is_causal": True}
    torch.testing.assert_close(
        ours(x, memory, **options), layer(x, memory, **options), atol=1e-5, rtol=1e-5
    )


def test_initial_weights_are_those_of_the_stock_module():
    torch.manual_seed(5)
    stock = nn.MultiheadAttention(512, 8, batch_first=True)
    ours = make(embed_dim=512, num_heads=8)
    assert stock.state_dict().keys() == ours.state_dict().keys()
    for name, parameter in ours.state_dict().items():
        expected = stock.state_dict()[name]
        assert parameter.shape == expected.shape
        torch.testing.assert_close(parameter.std(), expected.std(), rtol=0.02, atol=0)


def test_without_bias():
    stock = nn.MultiheadAttention(24, 4, bias=False, batch_first=True)
    ours = make(pattern=DENSE, bias=False)
    ours.load_state_dict(stock.state_dict())
    x = torch.randn(2, 13, 24)
    torch.testing.assert_close(ours(x, x, x)[0], stock(x, x, x)[0], atol=1e-5, rtol=1e-5)


def test_gradients_are_those_of_the_stock_module():
    stock, ours = stock_and_ours()
    x, cotangent = torch.randn(2, 13, 24), torch.randn(2, 13, 24)
    for module in (stock, ours):
        (module(x, x, x)[0] * cotangent).sum().backward()
    theirs = dict(stock.named_parameters())
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, atol=1e-4, rtol=1e-4)


def test_compiles_to_the_eager_result():
    module = make()
    x, cotangent = torch.randn(2, 17, 24, requires_grad=True), torch.randn(2, 17, 24)

    def attend(x):
        return module(x, x, x, is_causal=True)[0]

    leaves = [x, *module.parameters()]
    out, expected = torch.compile(attend, fullgraph=True)(x), attend(x)
    torch.testing.assert_close(out, expected, atol=1e-6, rtol=1e-5)
    for ours, theirs in zip(
        torch.autograd.grad(out, leaves, cotangent),
        torch.autograd.grad(expected, leaves, cotangent),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_dropout_acts_in_training_only():
    module, x = make(dropout=0.5), torch.randn(1, 17, 24)
    assert not torch.equal(module(x, x, x)[0], module(x, x, x)[0])
    module.eval()
    assert torch.equal(module(x, x, x)[0], module(x, x, x)[0])


def test_repr_names_the_options():
    assert "num_heads=4, pattern=DilatedPattern(" in repr(make())


def test_cross_attention_is_refused():
    module, x, y = make(), torch.randn(2, 9, 24), torch.randn(2, 5, 24)
    message = r"self-attention.*query \(2, 9, 24\), key \(2, 5, 24\).*nn\.MultiheadAttention"
    with pytest.raises(NotImplementedError, match=message):
        module(x, y, y)
    with pytest.raises(NotImplementedError, match="must be the very tensor"):
        module(x, x, x.clone())


def test_other_attention_masks_are_refused():
    module, x = make(), torch.randn(2, 9, 24)
    window = CAUSAL_MASK(9)
    window[8, 0] = float("-inf")
    with pytest.raises(NotImplementedError, match=r"float32 mask that differs from it in 1 of 81"):
        module(x, x, x, attn_mask=window, is_causal=True)
    with pytest.raises(NotImplementedError, match=r"bool mask that differs from it in 36 of 81"):
        module(x, x, x, attn_mask=torch.zeros(9, 9, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"got \(8, 8\) for seq_len=9"):
        module(x, x, x, attn_mask=CAUSAL_MASK(8))
    with pytest.raises(TypeError, match=r"attn_mask must be bool or float, got torch\.uint8"):
        module(x, x, x, attn_mask=torch.zeros(9, 9, dtype=torch.uint8))


def test_other_padding_masks_are_refused():
    module, x = make(), torch.randn(2, 9, 24)
    with pytest.raises(ValueError, match=r"-inf for padding, got 1\.0"):
        module(x, x, x, padding_mask(9, 4, seq_len=9).float())
    with pytest.raises(TypeError, match=r"bool or float, got torch\.int64"):
        module(x, x, x, padding_mask(9, 4, seq_len=9).long())
    with pytest.raises(ValueError, match=r"\(2, 9\), got \(2, 8\)"):
        module(x, x, x, padding_mask(8, 4, seq_len=8))


def test_bad_options_and_shapes_are_refused():
    with pytest.raises(ValueError, match="embed_dim=24 and num_heads=5"):
        make(num_heads=5)
    with pytest.raises(TypeError, match="got tuple"):
        make(pattern=(5, 11))
    with pytest.raises(ValueError, match=r"got -0\.5"):
        make(dropout=-0.5)
    x = torch.randn(2, 9, 23)
    with pytest.raises(ValueError, match=r"embed_dim=24, got \(2, 9, 23\)"):
        make()(x, x, x)
