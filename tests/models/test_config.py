"""Configs made of configs: changed by name, listed, saved and loaded."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import pytest
from torch import nn

import longnet_zoo as lz
from longnet_zoo import registry
from longnet_zoo.models import LongNetMLM, LongNetMLMConfig, ZooConfig, ZooModel, config_from_json
from recipes.classifiers import changed_options

SMALL = LongNetMLMConfig(
    vocab_size=7,
    embed_dim=8,
    num_layers=1,
    num_heads=2,
    segment_lengths=(4, 8),
    dilation_rates=(1, 2),
)


@dataclass(frozen=True, kw_only=True)
class PairConfig(ZooConfig):
    left: LongNetMLMConfig = SMALL
    right: LongNetMLMConfig | None = SMALL
    output_dim: int = 3
    edges: tuple[tuple[int, int], ...] = ((0, 1),)

    @property
    def pattern(self):
        return self.left.pattern


class Pair(ZooModel):
    config_class = PairConfig

    def __init__(self, config: PairConfig) -> None:
        super().__init__(config)
        self.left, self.right = LongNetMLM(config.left), LongNetMLM(config.right)
        self.proj = nn.Linear(config.left.embed_dim, config.output_dim)


@pytest.fixture
def pair(monkeypatch):
    """Registers the model for one test."""
    monkeypatch.setattr(registry, "_ENTRIES", dict(registry._ENTRIES))
    options: dict[str, Any] = {"family": "pair", "modality": "text", "description": "a pair"}
    registry.register_model("pair", config=PairConfig(), source="a test", **options)(Pair)


def test_a_mapping_changes_what_it_names_in_a_part(pair):
    model = lz.create_model("pair", left={"num_layers": 2, "ffn_dim": 5}, output_dim=4)
    assert len(model.left.stack.blocks) == 2
    assert model.config.left.embed_dim == 8
    assert model.config.left.ffn_dim == 5
    assert model.config.right == SMALL
    assert model.proj.out_features == 4
    whole = lz.create_model("pair", left=model.config.left, output_dim=4)
    assert whole.config == model.config


def test_an_unknown_option_of_a_part_is_named(pair):
    with pytest.raises(TypeError, match=r"left of pair has no option 'num_layer'.*'num_layers'"):
        lz.create_model("pair", left={"num_layer": 2})


def test_options_are_listed_with_their_part():
    options = PairConfig(right=None).options()
    assert options["left.embed_dim"] == 8
    assert options["right"] is None
    assert options["edges"] == ((0, 1),)
    assert "left" not in options


def test_a_saved_composite_comes_back(pair, tmp_path):
    model = lz.create_model("pair", left={"ffn_dim": 5}, edges=((0, 1), (1, 0)))
    model.save_pretrained(tmp_path)
    again = Pair.from_pretrained(tmp_path)
    assert again.config == model.config
    assert (again.proj.weight == model.proj.weight).all()
    other = lz.create_model("pair", pretrained=tmp_path, left={"dropout": 0.5})
    assert other.config.left.dropout == 0.5
    assert other.config.left.ffn_dim == 5


def test_a_folder_of_other_sizes_is_named_by_part(pair, tmp_path):
    lz.create_model("pair", left={"num_layers": 2}).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"must have .*left.num_layers.*1.*has .*num_layers.*2"):
        lz.create_model("pair", pretrained=tmp_path)
    lz.create_model("pair", pretrained=tmp_path, left={"num_layers": 2})


def test_json_with_an_unknown_field_of_a_part_is_refused():
    content = {"model": "Pair", "left": {**asdict(SMALL), "depth": 3}}
    with pytest.raises(ValueError, match=r"LongNetMLMConfig has no fields \['depth'\]"):
        config_from_json(Pair, content)


def test_memory_saving_reaches_every_stack(pair):
    model = lz.create_model("pair")
    model.set_grad_checkpointing()
    stacks = (model.left.stack, model.right.stack)
    assert all(block.memory_saving is not None for stack in stacks for block in stack.blocks)


def test_a_composite_must_count_its_own_flops(pair):
    with pytest.raises(NotImplementedError, match="Pair must define flops"):
        lz.create_model("pair").flops(8)


def test_a_config_without_pattern_says_so():
    with pytest.raises(NotImplementedError, match="ZooConfig must define pattern"):
        _ = ZooConfig().usual_seq_len


def test_recipes_keep_only_what_differs(pair):
    model = lz.create_model("pair", left={"dropout": 0.1})
    assert changed_options(model, "pair") == {"left": {"dropout": 0.1}}
    assert lz.create_model("pair", **changed_options(model, "pair")).config == model.config
