import pytest
import torch

import longnet_zoo as lz
from recipes.optimization import OptimizationConfig, layer_decay_groups
from recipes.slide_network import SlideNetwork
from tests.recipes.slide_runs import DIM, draw_slide, tiny_encoder


def make_encoder(**changes):
    return lz.create_model("gigapath_slide_enc12l768d", **tiny_encoder(**changes))


def make_network(*, changes=None, **options):
    return SlideNetwork(make_encoder(**(changes or {})), num_classes=3, **options).eval()


def make_batch():
    tiles, coords = draw_slide(0, num_tiles=7)
    return tiles[None], coords[None], torch.zeros(1, 7, dtype=torch.bool)


def trained(network):
    """Names of the parameters that get a gradient, which must be those that want one."""
    network.train()(*make_batch()).logsumexp(1).sum().backward()
    names = {name for name, p in network.named_parameters() if p.grad is not None}
    assert names == {name for name, p in network.named_parameters() if p.requires_grad}
    return names


def test_without_layers_the_head_reads_the_encoders_embedding():
    network, batch = make_network(), make_batch()
    expected = torch.nn.functional.linear(
        network.encoder(*batch), network.head.weight, network.head.bias
    )
    assert torch.equal(network(*batch), expected)
    assert trained(network) == {name for name, _ in network.named_parameters()}


def test_layers_are_concatenated_and_what_follows_is_not_trained():
    network, batch = make_network(layers=[1, 0]), make_batch()
    states = network.encoder.layer_embeddings(*batch, layers=(1, 0))
    assert torch.equal(network.embed(*batch), states.flatten(1))
    assert network.head.in_features == 32
    names = trained(network)
    assert any(name.startswith("encoder.stack.blocks.0.") for name in names)
    assert not any(
        name.startswith(("encoder.stack.blocks.1.", "encoder.stack.norm")) for name in names
    )


def test_a_frozen_encoder_stays_as_it_is_and_has_no_dropout():
    network = make_network(freeze_encoder=True, changes={"dropout": 0.5})
    assert trained(network) == {"head.weight", "head.bias"}
    network.train()
    assert torch.equal(network(*make_batch()), network(*make_batch()))
    assert network.head.training


def test_layer_decay_counts_from_the_head():
    network = make_network()
    config = OptimizationConfig(lr=1.0, layer_decay=0.5)
    rates = {}
    for group in layer_decay_groups(network, config=config):
        rates |= {id(parameter): group["lr"] for parameter in group["params"]}
    found = {name: rates[id(parameter)] for name, parameter in network.named_parameters()}
    # What follows the blocks learns like the last of them, as in timm.
    expected = {"head.weight": 0, "encoder.norm.weight": 1, "encoder.cls_token": 3}
    expected |= {"encoder.tile_embed.weight": 3}
    assert {name: found[name] for name in expected} == {
        name: 0.5**depth for name, depth in expected.items()
    }
    for number, depth in ((1, 1), (0, 2)):
        rates = {rate for name, rate in found.items() if f"blocks.{number}." in name}
        assert rates == {0.5**depth}
    assert "encoder.cls_token" in network.no_weight_decay()


@pytest.mark.parametrize("layers", [[], [3], [-1], [1, 1]])
def test_layers_that_do_not_exist_are_refused(layers):
    with pytest.raises(ValueError, match=rf"from 0 to num_layers=2, got \{str(layers)[:-1]}\]"):
        make_network(layers=layers)


def test_an_encoder_with_a_head_is_refused():
    with pytest.raises(ValueError, match=r"must have no head, got one of num_classes=4"):
        make_network(changes={"num_classes": 4})


def test_sizes_are_known():
    network = make_network()
    assert network.num_params() == network.encoder.num_params() + 16 * 3 + 3
    assert network.config.input_dim == DIM
