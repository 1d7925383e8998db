"""Bad input gets one clear error that names the rule and the values."""

import pytest
import torch

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern

PATTERN = DilatedPattern(segment_lengths=(4, 8), dilation_rates=(1, 2))
ZERO = DilatedPattern(segment_lengths=(4,), dilation_rates=(1,), padded_keys="zero")


def attend(q=(2, 9, 4, 6), k=(2, 9, 2, 6), v=(2, 9, 2, 6), pattern=PATTERN, **options):
    """Calls the op on zeros of the shapes given, or on what else is given."""
    tensors = (torch.zeros(x) if isinstance(x, tuple) else x for x in (q, k, v))
    return dilated_attention(*tensors, pattern, **options)


def test_the_call_that_all_others_spoil_is_good():
    assert attend().shape == (2, 9, 4, 6)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ({"q": (9, 4, 6)}, r"q must have the shape \(batch, seq_len.*got \(9, 4, 6\)"),
        ({"k": (9, 2, 6)}, r"k must have the shape .*got \(9, 2, 6\)"),
        ({"v": (2, 9, 2, 6, 1)}, r"v must have the shape .*got \(2, 9, 2, 6, 1\)"),
        ({"k": (3, 9, 2, 6), "v": (3, 9, 2, 6)}, r"agree in batch.*\(2, 9, 4, 6\).*\(3, 9, 2, 6\)"),
        ({"k": (2, 8, 2, 6), "v": (2, 8, 2, 6)}, r"agree in batch.*\(2, 9, 4, 6\).*\(2, 8, 2, 6\)"),
        ({"k": (2, 9, 2, 5), "v": (2, 9, 2, 5)}, r"head_dim.*\(2, 9, 4, 6\).*\(2, 9, 2, 5\)"),
        ({"v": (2, 9, 1, 6)}, r"k and v in num_heads.*k \(2, 9, 2, 6\) and v \(2, 9, 1, 6\)"),
        ({"v": (2, 9, 2, 7)}, r"head_dim.*k \(2, 9, 2, 6\) and v \(2, 9, 2, 7\)"),
        ({"k": (2, 9, 3, 6), "v": (2, 9, 3, 6)}, r"multiple of .*key heads, got 4 and 3"),
        ({"k": (2, 9, 8, 6), "v": (2, 9, 8, 6)}, r"multiple of .*key heads, got 4 and 8"),
        (
            {"q": (2, 0, 4, 6), "k": (2, 0, 2, 6), "v": (2, 0, 2, 6)},
            r"must not be empty, got q \(2, 0, 4, 6\)",
        ),
        (
            {"q": (0, 9, 4, 6), "k": (0, 9, 2, 6), "v": (0, 9, 2, 6)},
            r"must not be empty, got q \(0, 9, 4, 6\)",
        ),
        ({"k": (2, 9, 0, 6), "v": (2, 9, 0, 6)}, r"must not be empty, .*k \(2, 9, 0, 6\)"),
    ],
)
def test_shapes_that_do_not_fit(shapes, message):
    with pytest.raises(ValueError, match=message):
        attend(**shapes)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_one_tensor_of_another_dtype(name):
    shape = (2, 9, 4 if name == "q" else 2, 6)
    with pytest.raises(TypeError, match=r"share one dtype.*torch\.float16"):
        attend(**{name: torch.zeros(shape, dtype=torch.float16)})


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.complex64])
def test_dtypes_that_are_not_floating(dtype):
    x = torch.zeros(2, 9, 2, 6, dtype=dtype)
    with pytest.raises(TypeError, match=rf"float16, bfloat16, float32 and float64, got {dtype}"):
        attend(x, x, x)


@pytest.mark.parametrize("name", ["q", "k", "v"])
def test_something_else_than_a_tensor(name):
    with pytest.raises(TypeError, match=rf"{name} must be a tensor, got list"):
        attend(**{name: [[1.0]]})


def test_tensors_on_several_devices():
    with pytest.raises(ValueError, match="on one device, got cpu, meta and cpu"):
        attend(k=torch.zeros(2, 9, 2, 6, device="meta"))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("key_padding_mask", torch.zeros(1, 9, dtype=torch.bool, device="meta")),
        ("cu_seqlens", torch.zeros(2, dtype=torch.int32, device="meta")),
        ("bias", torch.zeros(1, 1, 9, 9, device="meta")),
        ("bias", lambda distances: torch.zeros(2, len(distances), device="meta")),
    ],
    ids=["mask", "bounds", "dense_bias", "table"],
)
def test_options_on_another_device_than_the_queries(name, value):
    x = torch.zeros(1, 9, 2, 4)
    with pytest.raises(ValueError, match=rf"{name}.*cpu.*meta|{name}.*meta.*cpu"):
        dilated_attention(x, x, x, PATTERN, **{name: value})


@pytest.mark.parametrize("pattern", [((4, 8), (1, 2)), None, [4]])
def test_something_else_than_a_pattern(pattern):
    with pytest.raises(TypeError, match=rf"DilatedPattern, got {type(pattern).__name__}"):
        attend(pattern=pattern)


@pytest.mark.parametrize("dropout_p", [-0.1, 1.0, 1.5, float("nan")])
def test_dropout_outside_of_its_range(dropout_p):
    with pytest.raises(ValueError, match=rf"dropout_p must be in \[0, 1\), got {dropout_p}"):
        attend(dropout_p=dropout_p)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.zeros(2, 9), r"bool tensor, True at padding, got torch\.float32"),
        (torch.ones(2, 9, dtype=torch.int64), r"bool tensor.*got torch\.int64.*mask == 0"),
        ([[False] * 9] * 2, "bool tensor.*got list"),
    ],
)
def test_masks_of_the_wrong_kind(mask, message):
    with pytest.raises(TypeError, match=message):
        attend(key_padding_mask=mask)


@pytest.mark.parametrize("shape", [(9,), (2, 8), (1, 9), (2, 9, 9), (2, 1, 1, 9)])
def test_masks_of_the_wrong_shape(shape):
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"\(batch, seq_len\) = \(2, 9\), got {got}"):
        attend(key_padding_mask=torch.zeros(shape, dtype=torch.bool))


@pytest.mark.parametrize("is_padding", [[1, 0, 0], [0, 1, 0], [1, 0, 1]])
def test_zero_keys_with_padding_other_than_right(is_padding):
    mask = torch.tensor([is_padding, [0, 0, 1]], dtype=torch.bool)
    shapes = {"q": (2, 3, 2, 4), "k": (2, 3, 2, 4), "v": (2, 3, 2, 4)}
    with pytest.raises(ValueError, match=r"padded_keys='zero'.*right padding.*'ignore'"):
        attend(**shapes, pattern=ZERO, key_padding_mask=mask)


def packed(bounds, **options):
    """A call on one packed row of nine tokens."""
    x = torch.zeros(1, 9, 2, 4)
    return dilated_attention(x, x, x, PATTERN, cu_seqlens=bounds, **options)


@pytest.mark.parametrize(
    ("bounds", "message"),
    [
        ([1, 9], r"from 0 to seq_len=9, got \[1, 9\]"),
        ([0, 8], r"from 0 to seq_len=9, got \[0, 8\]"),
        ([0, 10], r"from 0 to seq_len=9, got \[0, 10\]"),
        ([0, 5, 3, 9], r"rise strictly.*got \[0, 5, 3, 9\]"),
        ([0, 4, 4, 9], r"rise strictly.*got \[0, 4, 4, 9\]"),
        ([0], r"\(num_sequences \+ 1,\).*got \(1,\)"),
        ([[0, 9]], r"\(num_sequences \+ 1,\).*got \(1, 2\)"),
    ],
)
def test_bounds_of_a_pack_that_make_no_sense(bounds, message):
    with pytest.raises(ValueError, match=message):
        packed(torch.tensor(bounds, dtype=torch.int32))


def test_bounds_of_a_pack_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"int32 tensor, got torch\.int64"):
        packed(torch.tensor([0, 9]))
    with pytest.raises(TypeError, match="int32 tensor, got list"):
        packed([0, 9])


def test_a_pack_of_several_rows():
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"batch 1.*got batch=2"):
        attend(cu_seqlens=bounds)


def test_a_pack_with_padding():
    bounds = torch.tensor([0, 9], dtype=torch.int32)
    with pytest.raises(ValueError, match="either cu_seqlens or key_padding_mask, not both"):
        packed(bounds, key_padding_mask=torch.zeros(1, 9, dtype=torch.bool))


@pytest.mark.parametrize("shape", [(9, 9), (2, 9, 9), (3, 4, 9, 9), (2, 2, 9, 9), (2, 4, 9, 8)])
def test_a_dense_bias_of_the_wrong_shape(shape):
    got = str(shape).replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ValueError, match=rf"\(batch or 1, num_heads or 1.*got {got}"):
        attend(bias=torch.zeros(shape))


def test_a_bias_of_the_wrong_kind():
    with pytest.raises(TypeError, match=r"floating point.*got torch\.bool.*key_padding_mask"):
        attend(bias=torch.zeros(1, 1, 9, 9, dtype=torch.bool))
    with pytest.raises(TypeError, match="tensor or a function of distances, got float"):
        attend(bias=0.5)


def test_a_function_of_distances_that_returns_the_wrong_shape():
    with pytest.raises(ValueError, match=r"\(num_heads, m\), got \(15,\) for num_heads=4 and m=15"):
        attend(bias=lambda distances: distances.float())
    with pytest.raises(ValueError, match=r"got \(2, 15\) for num_heads=4"):
        attend(bias=lambda distances: distances.float().expand(2, -1))


def test_a_function_of_distances_that_returns_something_else():
    with pytest.raises(TypeError, match=r"bias .*NoneType"):
        attend(bias=lambda distances: None)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64])
def test_a_function_of_distances_that_returns_no_logits(dtype):
    with pytest.raises(TypeError, match=f"bias must return floating point.*{dtype}"):
        attend(bias=lambda distances: torch.zeros(4, len(distances), dtype=dtype))


@pytest.mark.parametrize("name", ["scale", "xpos_scale_base"])
@pytest.mark.parametrize(
    ("value", "kind"), [(torch.tensor(0.5, requires_grad=True), "Tensor"), ("0.5", "str")]
)
def test_factors_that_are_no_numbers(name, value, kind):
    with pytest.raises(TypeError, match=f"{name} must be a number, got {kind}"):
        attend(**{name: value})


@pytest.mark.parametrize("scale_base", [0.0, -512.0, float("nan")])
def test_an_xpos_base_that_is_not_positive(scale_base):
    with pytest.raises(
        ValueError, match=f"scale_base must be positive, got scale_base={scale_base}"
    ):
        attend(xpos_scale_base=scale_base)


def test_xpos_with_an_odd_head():
    x = torch.zeros(1, 9, 2, 5)
    with pytest.raises(ValueError, match=r"head_dim must be even.*head_dim=5"):
        attend(x, x, x, xpos_scale_base=512.0)


@pytest.mark.parametrize(
    ("dtype", "scale_base", "is_causal"),
    [
        (torch.float32, 8.0, True),
        (torch.float32, 16.0, False),
        (torch.bfloat16, 8.0, True),
        (torch.float16, 64.0, True),
    ],
)
def test_xpos_that_would_overflow(dtype, scale_base, is_causal):
    """The cure that the message names is enough, and finite."""
    x = torch.ones(1, 1200, 1, 4, dtype=dtype)
    pattern = DilatedPattern(segment_lengths=(64, 1200), dilation_rates=(1, 40))
    with pytest.raises(ValueError, match=f"scale_base={scale_base} overflows {dtype}") as caught:
        dilated_attention(x, x, x, pattern, is_causal=is_causal, xpos_scale_base=scale_base)
    assert ("or bfloat16" in str(caught.value)) == (dtype == torch.float16)
    cure = int(str(caught.value).rsplit("Use scale_base=", 1)[1].split()[0])
    out = dilated_attention(x, x, x, pattern, is_causal=is_causal, xpos_scale_base=cure)
    assert out.isfinite().all()


@pytest.mark.parametrize("backend", ["flash9", "", "SDPA", None])
def test_a_backend_that_does_not_exist(backend):
    with pytest.raises(ValueError, match=rf"backend must be one of .*'sdpa'.*got {backend!r}"):
        attend(backend=backend)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"bias": torch.zeros(1, 1, 9, 9)}, "a bias by pairs of positions"),
        ({"bias": lambda distances: distances.float().expand(4, -1)}, "a bias by distance"),
        ({"key_padding_mask": torch.eye(2, 9, dtype=torch.bool)}, "padding before or between"),
        ({"dropout_p": 0.1}, "attention dropout"),
    ],
)
def test_a_named_backend_that_cannot_serve_says_why(options, reason):
    with pytest.raises(NotImplementedError, match=f"'sdpa' does not support .*{reason}"):
        attend(backend="sdpa", **options)
    assert attend(backend="math", **options).isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "rates", "message"),
    [
        ((), (), r"at least one branch.*segment_lengths=\(\)"),
        ((4, 8), (1,), r"segment_lengths=\(4, 8\) and dilation_rates=\(1,\)"),
        ((8, 4), (1, 2), r"strictly increasing, got \(8, 4\)"),
        ((4, 4), (1, 2), r"strictly increasing, got \(4, 4\)"),
        ((0, 4), (1, 2), r"must be positive.*got \(0, 4\)"),
        ((-4, 4), (1, 2), r"must be positive.*got \(-4, 4\)"),
        ((4, 8), (0, 2), "got rate 0 for segment length 4"),
        ((4, 8), (1, -2), "got rate -2 for segment length 8"),
        ((4, 8), (1, 9), "got rate 9 for segment length 8"),
    ],
)
def test_branches_that_make_no_pattern(lengths, rates, message):
    with pytest.raises(ValueError, match=message):
        DilatedPattern(segment_lengths=lengths, dilation_rates=rates)


@pytest.mark.parametrize("lengths", [(4.0,), 4, ("4",), (True,), None])
def test_segment_lengths_that_are_not_integers(lengths):
    with pytest.raises(TypeError, match="segment_lengths must be a tuple of integers, got"):
        DilatedPattern(segment_lengths=lengths, dilation_rates=(1,))


def test_switches_that_do_not_exist():
    branch = {"segment_lengths": (4,), "dilation_rates": (1,)}
    with pytest.raises(ValueError, match=r"head_offset must be one of.*got 'random'"):
        DilatedPattern(**branch, head_offset="random")
    with pytest.raises(ValueError, match=r"padded_keys must be one of.*got 'mask'"):
        DilatedPattern(**branch, padded_keys="mask")
