"""Feed-forward against its formula, in both activations."""

import pytest
import torch
from torch.nn import functional

from longnet_zoo.layers import FeedForward
from longnet_zoo.layers import feed_forward as module_under_test


def make(**options):
    return FeedForward(embed_dim=6, ffn_dim=11, **options)


def exact_gelu(x):
    return 0.5 * x * (1 + torch.erf(x / 2**0.5))


@pytest.mark.parametrize("sub_ln", [True, False])
def test_gelu_formula(sub_ln):
    module = make(sub_ln=sub_ln)
    x = torch.randn(2, 5, 6)
    hidden = exact_gelu(x @ module.fc1.weight.T + module.fc1.bias)
    if sub_ln:
        with torch.no_grad():
            module.inner_norm.weight.copy_(torch.randn(11))
        hidden = functional.layer_norm(hidden, (11,), module.inner_norm.weight, eps=1e-5)
    torch.testing.assert_close(module(x), hidden @ module.fc2.weight.T + module.fc2.bias)
    assert (module.inner_norm is not None) == sub_ln


def test_swiglu_activates_the_gate_before_the_product():
    module = make(activation="swiglu", sub_ln=False)
    x = torch.randn(2, 5, 6)
    gate = x @ module.gate.weight.T + module.gate.bias
    up = x @ module.fc1.weight.T + module.fc1.bias
    hidden = gate * torch.sigmoid(gate) * up
    torch.testing.assert_close(module(x), hidden @ module.fc2.weight.T + module.fc2.bias)
    wrong = functional.silu(gate * up) @ module.fc2.weight.T + module.fc2.bias
    assert (module(x) - wrong).abs().max() > 1e-2


def test_inference_never_holds_all_hidden_channels(monkeypatch):
    monkeypatch.setattr(module_under_test, "_hidden_at_once", lambda x: 3 * 11)
    module, rows = make(), []
    module.fc1.register_forward_hook(lambda _, inputs, out: rows.append(len(out.reshape(-1, 11))))
    x = torch.randn(2, 5, 6)
    whole = module(x)
    assert rows == [10]
    with torch.no_grad():
        torch.testing.assert_close(module(x), whole)
    assert rows[1:] == [3, 3, 3, 1]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("activation", [functional.gelu, functional.silu])
def test_activations_of_half_types_are_computed_in_float32(dtype, activation):
    """The module relies on this property of torch's kernels."""
    x = (torch.randn(1000) * 4).to(dtype)
    whole = activation(x.float())
    # Rounded once, from a float32 whose last bits depend on the processor: gelu adds 1 and erf(x).
    torch.testing.assert_close(
        activation(x).float(), whole, atol=1e-6, rtol=0.51 * torch.finfo(dtype).eps
    )


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_dropout_acts_in_training_only(activation):
    module = make(activation=activation, dropout=0.5)
    x = torch.randn(2, 5, 6)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


def test_no_bias():
    assert not [
        name for name, _ in make(bias=False, sub_ln=False).named_parameters() if "bias" in name
    ]


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="embed_dim=0 and ffn_dim=4"):
        FeedForward(embed_dim=0, ffn_dim=4)
    with pytest.raises(ValueError, match=r"\('gelu', 'swiglu'\), got 'relu'"):
        make(activation="relu")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1\.0"):
        make(dropout=1.0)
