"""Awkward calls of dilated attention as small values, and their comparison with the oracle.

A `Call` is plain data, so hypothesis can shrink it and a failure prints what to repeat.
"""

from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from longnet_zoo.ops.dilated_attention import dilated_attention
from longnet_zoo.ops.pattern import DilatedPattern
from longnet_zoo.ops.reference import dilated_attention_reference

FLOAT32 = {"atol": 2e-6, "rtol": 2e-5}
FLOAT64 = {"atol": 1e-10, "rtol": 1e-10}
HALF = {"atol": 2e-2, "rtol": 2e-2}
TOLERANCES = {
    torch.float64: FLOAT64,
    torch.float32: FLOAT32,
    torch.bfloat16: HALF,
    torch.float16: HALF,
}

LAYOUTS = ("plain", "packed", "heads_first", "every_other_channel")
PADDINGS = (None, "right", "left", "random", "one_row_all")
BIASES = (None, "dense", "dense_shared", "table", "alibi")


@dataclass(frozen=True, kw_only=True)
class Call:
    """One call of the op."""

    segment_lengths: tuple[int, ...]
    dilation_rates: tuple[int, ...]
    seq_len: int
    batch: int = 1
    num_heads: int = 3
    num_kv_heads: int = 3
    head_dim: int = 4
    head_offset: str = "modulo"
    padded_keys: str = "ignore"
    is_causal: bool = False
    padding: str | None = None
    documents: tuple[int, ...] = ()
    bias: str | None = None
    xpos_scale_base: float | None = None
    scale: float | None = None
    layout: str = "plain"
    seed: int = 0
    device: str = "cpu"

    @property
    def pattern(self) -> DilatedPattern:
        return DilatedPattern(
            segment_lengths=self.segment_lengths,
            dilation_rates=self.dilation_rates,
            head_offset=self.head_offset,
            padded_keys=self.padded_keys,
        )

    @property
    def backends(self) -> tuple[str, ...]:
        """The named backends that serve the call on a CPU: fused kernels add nothing to logits."""
        adds_to_logits = self.bias is not None or self.padding in ("left", "random")
        return ("math",) if adds_to_logits else ("sdpa", "math")

    def key_padding_mask(self) -> Tensor | None:
        if self.padding is None:
            return None
        generator = torch.Generator().manual_seed(self.seed + 1)
        order = torch.arange(self.seq_len).expand(self.batch, -1)
        if self.padding == "random":
            return torch.rand(order.shape, generator=generator) < 0.4
        if self.padding == "one_row_all":
            return (torch.arange(self.batch) == self.batch - 1)[:, None].expand_as(order)
        num_padding = torch.randint(self.seq_len + 1, (self.batch, 1), generator=generator)
        is_right = order >= self.seq_len - num_padding
        return is_right if self.padding == "right" else is_right.flip(1)

    def cu_seqlens(self) -> Tensor | None:
        if not self.documents:
            return None
        return torch.tensor([0, *self.documents]).cumsum(0).to(torch.int32)

    def options(self) -> dict[str, object]:
        """Keyword arguments that hold no gradient."""
        mask, cu_seqlens = self.key_padding_mask(), self.cu_seqlens()
        return {
            "is_causal": self.is_causal,
            "scale": self.scale,
            "xpos_scale_base": self.xpos_scale_base,
            "key_padding_mask": None if mask is None else mask.to(self.device),
            "cu_seqlens": None if cu_seqlens is None else cu_seqlens.to(self.device),
        }

    def inputs(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """q, k, v in the layout asked for and the parameter of the bias, all leaves."""
        generator = torch.Generator().manual_seed(self.seed)
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        shape = (self.batch, self.seq_len, sum(heads), self.head_dim)
        packed = torch.randn(shape, generator=generator, dtype=torch.float64)
        packed = packed.to(self.device, dtype)
        parts = [_laid_out(part, self.layout) for part in packed.split(heads, dim=2)]
        inputs = dict(zip(("q", "k", "v"), parts, strict=True))
        if self.bias is not None:
            bias = 0.5 * torch.randn(self._bias_shape(), generator=generator).double()
            inputs["bias"] = bias.to(self.device, torch.promote_types(dtype, torch.float32))
        return {name: x.detach().requires_grad_() for name, x in inputs.items()}

    def as_bias(self, parameter: Tensor | None):
        """What the op takes as its bias, made of the parameter that gets the gradient."""
        if parameter is None or self.bias.startswith("dense"):
            return parameter
        if self.bias == "alibi":
            # Slopes as small as ALiBi's: their gradient is a sum weighted by distances.
            return lambda distances: -0.05 * parameter * distances.abs()
        return lambda distances: parameter[:, distances + self.seq_len]

    def _bias_shape(self) -> tuple[int, ...]:
        pairs = (self.seq_len, self.seq_len)
        return {
            "dense": (self.batch, self.num_heads, *pairs),
            "dense_shared": (1, 1, *pairs),
            "table": (self.num_heads, 2 * self.seq_len),
            "alibi": (self.num_heads, 1),
        }[self.bias]


def _laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values in another memory layout; "packed" keeps the slice of the joint tensor."""
    if layout == "heads_first":
        return x.transpose(1, 2).contiguous().transpose(1, 2)
    if layout == "every_other_channel":
        return x.repeat_interleave(2, dim=-1)[..., ::2]
    return x if layout == "packed" else x.contiguous()


def cotangents(call: Call, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Random factors of the outputs in a sum loss, for out and for lse."""
    generator = torch.Generator().manual_seed(call.seed + 2)
    shape = (call.batch, call.seq_len, call.num_heads, call.head_dim)
    out, lse = (
        torch.randn(s, generator=generator, dtype=torch.float64) for s in (shape, shape[:3])
    )
    lse_dtype = torch.promote_types(dtype, torch.float32)
    return out.to(call.device, dtype), lse.to(call.device, lse_dtype)


def sum_loss(out: Tensor, lse: Tensor | None, factors: tuple[Tensor, Tensor]) -> Tensor:
    """Sum against random factors (a mean would hide wrong gradients in its small numbers)."""
    loss = (out * factors[0].to(out.dtype)).sum()
    if lse is not None:
        loss = loss + torch.where(lse.isneginf(), 0.0, lse * factors[1].to(lse.dtype)).sum()
    return loss


def run(call: Call, inputs: dict[str, Tensor], *, attend=dilated_attention, **more):
    """Calls the op or the oracle: out and lse."""
    return attend(
        inputs["q"],
        inputs["k"],
        inputs["v"],
        call.pattern,
        bias=call.as_bias(inputs.get("bias")),
        return_lse=True,
        **call.options(),
        **more,
    )


def results(
    call: Call, inputs: dict[str, Tensor], *, with_lse_grad: bool = False, **more
) -> dict[str, Tensor]:
    """out, lse, and the gradient of each input by name: d_q, d_k, d_v, d_bias."""
    out, lse = run(call, inputs, **more)
    factors = cotangents(call, inputs["q"].dtype)
    loss = sum_loss(out, lse if with_lse_grad else None, factors)
    grads = torch.autograd.grad(loss, list(inputs.values()))
    named = {f"d_{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def oracle_results(
    call: Call, inputs: dict[str, Tensor], *, with_lse_grad: bool = False
) -> dict[str, Tensor]:
    """The same from the float64 oracle."""
    leaves = {name: x.detach().double().requires_grad_() for name, x in inputs.items()}
    out, lse = run(call, leaves, attend=dilated_attention_reference)
    # Factors of the call's own dtype, rounding included.
    factors = cotangents(call, inputs["q"].dtype)
    loss = sum_loss(out, lse if with_lse_grad else None, factors)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    named = {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
    return {"out": out.detach(), "lse": lse.detach(), **named}


def assert_close(got: Tensor, expected: Tensor, name: str, tolerance: dict[str, float]) -> None:
    torch.testing.assert_close(
        got.double(), expected, **tolerance, msg=lambda text: f"{name}: {text}"
    )


def assert_parity(
    call: Call,
    backend: str = "auto",
    dtype: torch.dtype = torch.float32,
    *,
    with_lse_grad: bool = False,
) -> None:
    """Compares out, lse and every gradient, each by itself, with the oracle."""
    inputs = call.inputs(dtype)
    got = results(call, inputs, with_lse_grad=with_lse_grad, backend=backend)
    expected = oracle_results(call, inputs, with_lse_grad=with_lse_grad)
    assert got.keys() == expected.keys()
    assert got["out"].dtype == dtype
    assert got["lse"].dtype == torch.promote_types(dtype, torch.float32)
    for name, value in got.items():
        assert_close(value, expected[name], name, TOLERANCES[dtype])


@st.composite
def patterns(draw, max_length: int = 40) -> dict[str, tuple[int, ...]]:
    """Branches whose rates need not divide anything and need not include 1."""
    lengths = sorted(draw(st.sets(st.integers(1, max_length), min_size=1, max_size=4)))
    rates = tuple(draw(st.integers(1, min(length, 9))) for length in lengths)
    if draw(st.booleans()):
        rates = (1, *rates[1:])
    return {"segment_lengths": tuple(lengths), "dilation_rates": rates}


@st.composite
def calls(draw, *, biases=(None,), paddings=PADDINGS, xpos=False) -> Call:
    """Calls of every awkward shape."""
    num_kv_heads = draw(st.integers(1, 4))
    group_size = draw(st.integers(1, 3))
    layout = draw(st.sampled_from(LAYOUTS))
    padded_keys = draw(st.sampled_from(("ignore", "zero")))
    documents = ()
    padding = draw(st.sampled_from(paddings))
    batch = draw(st.integers(1, 3))
    seq_len = draw(st.integers(1, 37))
    if padding is None and draw(st.booleans()):
        documents = tuple(draw(st.lists(st.integers(1, 12), min_size=1, max_size=5)))
        batch, seq_len = 1, sum(documents)
    if padded_keys == "zero" and padding in ("left", "random"):
        padding = "right"
    is_causal = draw(st.booleans())
    xpos_scale_base = None
    if xpos:
        # Keys ahead of their query grow with the distance, and with them float32's error.
        xpos_scale_base = draw(st.sampled_from((7.0, 64.0) if is_causal else (64.0, 512.0)))
    return Call(
        **draw(patterns()),
        seq_len=seq_len,
        batch=batch,
        num_heads=num_kv_heads * group_size,
        num_kv_heads=num_kv_heads,
        head_dim=draw(st.sampled_from((2, 4, 6))) if xpos else draw(st.integers(1, 6)),
        head_offset=draw(st.sampled_from(("modulo", "block"))),
        padded_keys=padded_keys,
        is_causal=is_causal,
        padding=padding,
        documents=documents,
        bias=draw(st.sampled_from(biases)),
        xpos_scale_base=xpos_scale_base,
        scale=draw(st.sampled_from((None, 0.3))),
        layout=layout,
        seed=draw(st.integers(0, 999)),
    )
