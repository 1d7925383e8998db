"""DilatedAttention against an explicit composition of the op and plain matrix products."""

import pytest
import torch
from torch.nn import functional

from longnet_zoo.layers import AlibiBias, DilatedAttention, RelativeBias, RotaryEmbedding
from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.positions import apply_rotary, rotary_tables

PATTERN = DilatedPattern(segment_lengths=(5, 11), dilation_rates=(1, 3))
DENSE = DilatedPattern(segment_lengths=(1000,), dilation_rates=(1,))
POSITIONS = ["xpos", "rotary", "alibi", "relative", None]


def make(**options):
    return DilatedAttention(**({"embed_dim": 24, "num_heads": 4, "pattern": PATTERN} | options))


def randomize(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.5)
    return module


def composed(module, x, mask=None):
    """The layer written out, from its parameters and the op."""
    batch, seq_len, _ = x.shape

    def project(linear):
        return (x @ linear.weight.T + linear.bias).view(batch, seq_len, -1, module.head_dim)

    q, k, v = (project(linear) for linear in (module.q_proj, module.k_proj, module.v_proj))
    if module.q_norm is not None:
        q, k = (
            functional.layer_norm(y, (module.head_dim,), norm.weight, norm.bias, 1e-5)
            for y, norm in ((q, module.q_norm), (k, module.k_norm))
        )
    if module.position in ("xpos", "rotary"):
        tables = rotary_tables(torch.arange(seq_len), module.head_dim, base=10000.0)
        q, k = apply_rotary(q, *tables), apply_rotary(k, *tables)
    out = dilated_attention(
        q,
        k,
        v,
        module.pattern,
        is_causal=module.is_causal,
        bias=module.position_bias,
        xpos_scale_base=512.0 if module.position == "xpos" else None,
        key_padding_mask=mask,
    ).reshape(batch, seq_len, -1)
    if module.inner_norm is not None:
        norm = module.inner_norm
        out = functional.layer_norm(out, (module.embed_dim,), norm.weight, norm.bias, 1e-5)
    return out @ module.out_proj.weight.T + module.out_proj.bias


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("is_causal", [True, False])
@pytest.mark.parametrize(("qk_norm", "sub_ln"), [(False, True), (True, False)])
def test_equals_an_explicit_composition(position, is_causal, qk_norm, sub_ln):
    module = make(position=position, is_causal=is_causal, qk_norm=qk_norm, sub_ln=sub_ln)
    randomize(module)
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(module(x), composed(module, x), atol=1e-5, rtol=1e-5)
    mask = torch.zeros(2, 17, dtype=torch.bool)
    mask[1, 9:] = True
    torch.testing.assert_close(
        module(x, key_padding_mask=mask), composed(module, x, mask), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("is_causal", [True, False])
def test_dense_pattern_is_scaled_dot_product_attention(is_causal):
    module = randomize(make(pattern=DENSE, position=None, sub_ln=False, is_causal=is_causal))
    x = torch.randn(2, 13, 24)
    heads = [
        linear(x).view(2, 13, 4, 6).transpose(1, 2)
        for linear in (module.q_proj, module.k_proj, module.v_proj)
    ]
    out = functional.scaled_dot_product_attention(*heads, is_causal=is_causal)
    expected = module.out_proj(out.transpose(1, 2).flatten(2))
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", ["xpos", "alibi"])
@pytest.mark.parametrize("num_kv_heads", [1, 2])
def test_grouped_queries_are_repeated_keys_and_values(num_kv_heads, position):
    grouped = make(num_kv_heads=num_kv_heads, position=position)
    full = make(position=position)
    state = grouped.state_dict()
    for name in ("k_proj.weight", "k_proj.bias", "v_proj.weight", "v_proj.bias"):
        heads = state[name].unflatten(0, (num_kv_heads, 6))
        state[name] = heads.repeat_interleave(4 // num_kv_heads, dim=0).flatten(0, 1)
    full.load_state_dict(state)
    x = torch.randn(2, 17, 24)
    torch.testing.assert_close(grouped(x), full(x), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_padded_batch_equals_one_by_one(position):
    module = make(position=position)
    x, lengths = torch.randn(3, 19, 24), (19, 8, 1)
    mask = torch.arange(19) >= torch.tensor(lengths)[:, None]
    out = module(x, key_padding_mask=mask)
    assert out.isfinite().all()
    for row, length in enumerate(lengths):
        alone = module(x[row : row + 1, :length])
        torch.testing.assert_close(out[row, :length], alone[0], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("position", POSITIONS)
def test_packed_row_equals_one_by_one(position):
    module = make(position=position, is_causal=True)
    x, lengths = torch.randn(1, 28, 24), (19, 8, 1)
    bounds = torch.tensor([0, 19, 27, 28], dtype=torch.int32)
    out = module(x, cu_seqlens=bounds)
    expected = torch.cat([module(part) for part in x.split(lengths, dim=1)], dim=1)
    torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("position", POSITIONS)
def test_causal_layer_does_not_see_the_future(position):
    module = make(position=position, is_causal=True)
    x = torch.randn(1, 23, 24)
    changed = x.clone()
    changed[0, 12] += 1.0
    out, out_changed = module(x), module(changed)
    assert torch.equal(out[0, :12], out_changed[0, :12])
    assert not torch.equal(out[0, 12:], out_changed[0, 12:])


@pytest.mark.parametrize("position", ["xpos", "rotary"])
def test_outside_tables_stand_for_other_positions(position):
    module = make(position=position)
    x = torch.randn(1, 9, 24)
    tables = RotaryEmbedding(head_dim=6)(torch.arange(9))
    assert torch.equal(module(x, rotary=tables), module(x))
    # Only distances matter, wherever the sequence starts.
    far = RotaryEmbedding(head_dim=6)(torch.arange(9) + 1_048_576)
    torch.testing.assert_close(module(x, rotary=far), module(x), atol=1e-5, rtol=1e-5)
    stretched = RotaryEmbedding(head_dim=6)(torch.arange(9) * 3)
    assert (module(x, rotary=stretched) - module(x)).abs().max() > 1e-4


@pytest.mark.parametrize("bias", [AlibiBias(num_heads=4), RelativeBias(num_heads=4)])
def test_outside_bias_is_the_bias_of_the_layer(bias):
    position = "alibi" if isinstance(bias, AlibiBias) else "relative"
    own, shared = make(position=position), make(position=None)
    own.position_bias = bias
    shared.load_state_dict(own.state_dict(), strict=False)
    x = torch.randn(2, 17, 24)
    assert torch.equal(shared(x, position_bias=bias), own(x))
    assert not torch.equal(shared(x), own(x))


def test_causal_relative_bias_has_one_direction():
    assert make(position="relative", is_causal=True).position_bias.bidirectional is False
    assert make(position="relative", is_causal=False).position_bias.bidirectional is True


@pytest.mark.parametrize("position", POSITIONS)
def test_every_parameter_gets_a_gradient(position):
    module = randomize(make(position=position, qk_norm=True, num_kv_heads=2))
    x = torch.randn(2, 17, 24, requires_grad=True)
    out = module(x)
    (out * torch.randn_like(out)).sum().backward()
    for name, parameter in [*module.named_parameters(), ("x", x)]:
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_dropout_acts_in_training_only():
    module = make(dropout=0.5)
    x = torch.randn(1, 17, 24)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))
    no_dropout = make(dropout=0.0)
    no_dropout.load_state_dict(module.state_dict())
    assert torch.equal(module(x), no_dropout(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_module_dtype(dtype):
    module = make(qk_norm=True).to(dtype)
    x = torch.randn(2, 17, 24, dtype=dtype)
    out = module(x)
    assert out.dtype == dtype
    if dtype == torch.bfloat16:
        exact = module.double()(x.double())
        assert (out - exact).abs().max() < 0.05


@pytest.mark.parametrize("position", POSITIONS)
@pytest.mark.parametrize("qk_norm", [True, False])
def test_autocast_is_finite_and_near(position, qk_norm):
    module = make(position=position, qk_norm=qk_norm)
    x = torch.randn(2, 17, 24, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        out = module(x)
    assert out.dtype == torch.bfloat16
    assert (out.float() - module(x)).abs().max() < 0.06
    (out.float() * torch.randn(out.shape)).sum().backward()
    assert x.grad.isfinite().all()


def test_op_gets_one_dtype_though_autocast_makes_norms_float32():
    """On CUDA it does; here the norms are made to."""
    module = make(qk_norm=True).to(torch.bfloat16)
    for norm in (module.q_norm, module.k_norm):
        norm.register_forward_hook(lambda module, inputs, out: out.float())
    assert module(torch.randn(1, 9, 24).bfloat16()).dtype == torch.bfloat16


def test_xpos_out_of_range_names_the_base():
    module = make(pattern=DENSE, xpos_scale_base=4.0)
    with pytest.raises(ValueError, match=r"scale_base=4\.0 overflows"):
        module(torch.randn(1, 400, 24))


def test_op_is_an_attribute():
    module, calls = make(dropout=0.25, backend="math"), []

    def replacement(q, k, v, pattern, **options):
        calls.append((pattern, options))
        return torch.zeros_like(q)

    module.attention_op = replacement
    out = module(torch.randn(1, 3, 24))
    assert torch.equal(out, module.out_proj.bias.expand(1, 3, 24))
    ((pattern, options),) = calls
    assert pattern is PATTERN
    assert (options["dropout_p"], options["backend"]) == (0.25, "math")
    assert options["xpos_scale_base"] == 512.0


def test_a_call_may_bring_its_op():
    module, x = make(dropout=0.25, backend="math"), torch.randn(1, 13, 24)
    calls = []

    def of_this_call(q, k, v, pattern, **options):
        calls.append(options)
        return torch.zeros_like(q)

    out = module(x, attention_op=of_this_call)
    assert torch.equal(out, module.out_proj.bias.expand(1, 13, 24))
    assert calls[0]["dropout_p"] == 0.25
    assert not torch.equal(module(x), out)
    assert len(calls) == 1
    module.attention_op = of_this_call
    with pytest.raises(NotImplementedError, match=r"whose attention_op is <function .*of_this_ca"):
        module(x, attention_op=dilated_attention)


def test_state_dict_round_trip_and_names():
    module = make(qk_norm=True, position="relative")
    names = {name.rpartition(".")[0] for name in module.state_dict()}
    projections = {"q_proj", "k_proj", "v_proj", "out_proj"}
    assert names == projections | {"q_norm", "k_norm", "inner_norm", "position_bias.embedding"}
    other = make(qk_norm=True, position="relative")
    other.load_state_dict(module.state_dict())
    x = torch.randn(1, 17, 24)
    assert torch.equal(module(x), other(x))


def test_repr_names_the_options():
    text = repr(make(num_kv_heads=2, dropout=0.25))
    for part in ("num_kv_heads=2", "position='xpos'", "dropout=0.25", "segment_lengths=(5, 11)"):
        assert part in text


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_heads": 5}, ValueError, "embed_dim=24 and num_heads=5"),
        ({"num_heads": 0}, ValueError, "embed_dim=24 and num_heads=0"),
        ({"num_kv_heads": 3}, ValueError, "num_heads=4 and num_kv_heads=3"),
        ({"num_kv_heads": 0}, ValueError, "num_heads=4 and num_kv_heads=0"),
        ({"num_heads": 8}, ValueError, "head_dim=3"),
        ({"num_heads": 8, "position": "rotary"}, ValueError, "head_dim=3"),
        ({"position": "learned"}, ValueError, r"'relative'\), got 'learned'"),
        ({"xpos_scale_base": 0.0}, ValueError, r"xpos_scale_base must be positive, got 0\.0"),
        ({"dropout": 1.0}, ValueError, r"dropout must be in \[0, 1\), got 1\.0"),
        ({"backend": "fast"}, ValueError, r"backend must be one of .*got 'fast'"),
        ({"pattern": (5, 11)}, TypeError, "must be a DilatedPattern, got tuple"),
    ],
)
def test_bad_options_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        make(**options)


def test_odd_head_dim_is_fine_without_rotation():
    assert make(num_heads=8, position="alibi")(torch.randn(1, 7, 24)).shape == (1, 7, 24)


def test_bad_input_is_refused():
    module, x = make(position=None), torch.randn(2, 9, 24)
    with pytest.raises(ValueError, match=r"embed_dim=24, got \(2, 9, 23\)"):
        module(x[..., :23])
    with pytest.raises(ValueError, match=r"got \(9, 24\)"):
        module(x[0])
    with pytest.raises(ValueError, match="this layer has position=None"):
        module(x, rotary=rotary_tables(torch.arange(9), 6))
    with pytest.raises(ValueError, match="this layer has position='xpos'"):
        make()(x, position_bias=AlibiBias(num_heads=4))
    for dtype in (torch.float32, torch.uint8):
        with pytest.raises(TypeError, match=f"got {dtype}"):
            module(x, key_padding_mask=torch.zeros(2, 9, dtype=dtype))
    with pytest.raises(ValueError, match=r"\(2, 9\), got \(2, 8\)"):
        module(x, key_padding_mask=torch.zeros(2, 8, dtype=torch.bool))
