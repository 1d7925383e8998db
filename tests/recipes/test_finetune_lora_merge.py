"""Adapters leave a run, come back by PEFT, and go into the weights of their base."""

import json

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from longnet_zoo import DilatedPattern
from longnet_zoo.interop.transformers import ATTENTION_NAME, set_pattern
from recipes.checkpoints import last_checkpoint
from recipes.finetune_lora import LoraFinetuning, main
from recipes.finetune_lora_base import quietly
from recipes.finetune_lora_merge import load_adapted, load_merged, merge_adapter
from recipes.finetune_lora_merge import main as merge
from tests.recipes.finetune_runs import PATTERN, TOY, arguments, save_toy, write_other_text

POSITIONS = {"rope_type": "linear", "rope_theta": 500.0, "factor": 2.0}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of a few large steps, with a pattern and other positions than those of the base."""
    folder = tmp_path_factory.mktemp("run")
    base = save_toy(LlamaForCausalLM, LlamaConfig(**TOY, initializer_range=0.1), folder / "base")
    text = write_other_text(folder / "text")
    model = {"pattern": PATTERN, "model_options": {"rope_parameters": POSITIONS}}
    (folder / "model.yaml").write_text(json.dumps({"model": model}))
    args = arguments(base, text, folder / "run", model__optimization__lr=0.02)
    main(["fit", f"--config={folder / 'model.yaml'}", *args])
    (base / "tokenizer.json").write_text("{}")
    return folder


@torch.no_grad()
def logits(model):
    tokens = torch.arange(60)[None] * 7 % 256
    return model.eval()(input_ids=tokens, use_cache=False).logits


def trained_logits(run):
    checkpoint = last_checkpoint(run / "run")
    return logits(LoraFinetuning.load_from_checkpoint(checkpoint, weights_only=True).model.base)


def load(folder, **options):
    with quietly():
        return AutoModelForCausalLM.from_pretrained(folder, **options)


def test_a_base_that_is_not_that_of_the_adapters_is_refused(run, tmp_path):
    config = LlamaConfig(**{**TOY, "num_hidden_layers": TOY["num_hidden_layers"] - 1})
    small = save_toy(LlamaForCausalLM, config, tmp_path / "small")
    with pytest.raises(ValueError, match=r"'.*small' has none for model.layers"):
        merge_adapter(adapter=str(run / "run" / "adapter"), output=str(tmp_path), base=str(small))
    with pytest.raises(ValueError, match=r"a base must be the folder .* got '.*none'"):
        load_adapted(run / "run" / "adapter", base=str(tmp_path / "none"))


def test_peft_loads_the_adapters_of_a_run(run):
    model = load(run / "base", attn_implementation=ATTENTION_NAME, rope_parameters=POSITIONS)
    set_pattern(model, DilatedPattern(**PATTERN))
    without = logits(model)
    with quietly():
        model = PeftModel.from_pretrained(model, run / "run" / "adapter")
    expected = trained_logits(run)
    assert torch.equal(logits(model), expected)
    assert (without - expected).abs().max() > 0.1
    assert torch.equal(logits(load_adapted(run / "run" / "adapter")), expected)


def test_a_merged_model_gives_the_logits_of_the_adapters(run, tmp_path, capsys):
    merge([f"--adapter={run / 'run' / 'adapter'}", f"--output={tmp_path}"])
    said = capsys.readouterr().out
    assert said.startswith(f"{tmp_path} gives the logits of {run / 'run' / 'adapter'}: the largest")
    assert float(said.split("difference is ")[1].split(",")[0]) < 1e-5
    expected = trained_logits(run)
    # A plain model of Transformers, with nothing of PEFT.
    model = load(tmp_path, attn_implementation=ATTENTION_NAME)
    assert type(model) is LlamaForCausalLM
    assert not any("lora" in name for name in model.state_dict())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(load_merged(tmp_path)), expected, rtol=1e-5, atol=1e-5)
    assert model.config.longnet_pattern["dilation_rates"] == PATTERN["dilation_rates"]
    assert model.config.rope_parameters["factor"] == 2.0
    assert (tmp_path / "tokenizer.json").read_text() == "{}"
    assert not (tmp_path / "adapter_config.json").exists()


def test_a_base_elsewhere_can_be_named(run, tmp_path):
    moved = (run / "base").rename(run / "moved")
    try:
        merge([f"--adapter={run / 'run' / 'adapter'}", f"--output={tmp_path}", f"--base={moved}"])
    finally:
        moved.rename(run / "base")
    expected = trained_logits(run)
    torch.testing.assert_close(logits(load_merged(tmp_path)), expected, rtol=1e-5, atol=1e-5)


def test_adapters_of_a_4_bit_base_are_merged_into_the_published_one(run, tmp_path):
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in (run / "run" / "adapter").iterdir():
        (adapter / file.name).write_bytes(file.read_bytes())
    config = json.loads((adapter / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (adapter / "config.json").write_text(json.dumps(config))
    merge([f"--adapter={adapter}", f"--output={tmp_path / 'merged'}"])
    assert not hasattr(AutoConfig.from_pretrained(tmp_path / "merged"), "quantization_config")
    expected = trained_logits(run)
    torch.testing.assert_close(
        logits(load_merged(tmp_path / "merged")), expected, rtol=1e-5, atol=1e-5
    )


def test_a_base_without_a_pattern_keeps_its_attention(tmp_path):
    base = save_toy(LlamaForCausalLM, LlamaConfig(**TOY), tmp_path / "base")
    LoraFinetuning(model_name=str(base)).model.save_adapter(tmp_path / "adapter")
    merge([f"--adapter={tmp_path / 'adapter'}", f"--output={tmp_path / 'merged'}"])
    assert load_merged(tmp_path / "merged").config._attn_implementation == "sdpa"


def test_a_folder_without_adapters_is_one_error(tmp_path, capsys):
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(SystemExit):
        merge([f"--adapter={tmp_path}", f"--output={tmp_path / 'merged'}"])
    error = capsys.readouterr().err
    assert f"got '{tmp_path}', which has no adapter_config.json and no adapter_model" in error
