"""Saving memory in whole models of every family: a mode of running, no part of the model."""

import copy
import json
import pickle
import re
from pathlib import Path

import pytest
import torch

from benchmarks import memory
from benchmarks.measure import peak_extra_mib
from benchmarks.memory import training_step_peak_mib
from longnet_zoo.factory import create_model
from longnet_zoo.layers import MemorySaving
from tests.models import beit3_draws, slides, small_audio, small_vision

SAVING = MemorySaving(chunk_size=11, keep_attention=True)
TEXT = {
    "vocab_size": 61,
    "embed_dim": 24,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_dim": 40,
    "segment_lengths": (6, 18),
    "dilation_rates": (1, 2),
}


def text_loss(name):
    model, tokens = create_model(name, **TEXT), torch.randint(61, (2, 44))
    padding = torch.arange(43) >= torch.tensor([[43], [20]])
    labels = tokens[:, 1:].masked_fill(padding, -100)
    return model, lambda: model.loss(tokens[:, :-1], labels, key_padding_mask=padding)


def image_loss():
    model, images = small_vision.make(segment_lengths=(6, 12, 36)), small_vision.draw()
    return model, lambda: model(images).square().sum()


def slide_loss():
    model, inputs = slides.make_encoder(num_classes=3), slides.draw_slides()
    return model, lambda: model(*inputs).square().sum()


def image_text_loss():
    model = beit3_draws.make(**beit3_draws.ALL_HEADS)
    inputs = beit3_draws.draw_training()
    return model, lambda: beit3_draws.total_loss(model, *inputs)


def audio_loss():
    model = small_audio.make(num_classes=5, head="ctc", chunk_seconds=0.2)
    waveform, lengths = small_audio.draw(40), torch.tensor([1675, 900])
    inputs = torch.tensor([[1, 2, 2], [3, 0, 0]]), torch.tensor([3, 1])
    return model, lambda: model.ctc_loss(waveform, lengths, *inputs)


@pytest.mark.parametrize(
    "make",
    [
        lambda: text_loss("longnet_lm_base"),
        lambda: text_loss("longnet_mlm_base"),
        image_loss,
        slide_loss,
        image_text_loss,
        audio_loss,
    ],
    ids=["lm", "mlm", "longvit", "slide", "beit3", "audio"],
)
def test_gradients_of_every_family_are_the_plain_ones(make):
    model, loss_of = make()
    expected = torch.autograd.grad(loss_of(), list(model.parameters()), allow_unused=True)
    model.set_memory_saving(SAVING)
    found = torch.autograd.grad(loss_of(), list(model.parameters()), allow_unused=True)
    for (name, _), ours, theirs in zip(model.named_parameters(), found, expected, strict=True):
        assert (ours is None) == (theirs is None), name
        if ours is not None:
            atol = 1e-5 * max(1.0, theirs.abs().max().item())
            torch.testing.assert_close(
                ours, theirs, atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
            )


def test_blocks_by_themselves_save_memory_too():
    model, images = small_vision.make(segment_lengths=(6, 12, 36)), small_vision.draw()
    plain = model.forward_intermediates(images, intermediates_only=True)
    model.set_memory_saving(SAVING)
    runs = []
    model.stack.blocks[0].feed_forward.register_forward_pre_hook(lambda *_: runs.append(1))
    saved = model.forward_intermediates(images, intermediates_only=True)
    assert len(runs) == 7  # 35 patches, 5 of each of two images at a time
    torch.testing.assert_close(saved, plain)


def test_it_is_no_part_of_the_model(tmp_path):
    model, _ = text_loss("longnet_lm_base")
    config, keys = model.config, list(model.state_dict())
    model.set_memory_saving(SAVING)
    assert model.config == config
    assert list(model.state_dict()) == keys
    for same in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert {block.memory_saving for block in same.stack.blocks} == {SAVING}
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert {block.memory_saving for block in loaded.stack.blocks} == {None}
    with pytest.raises(TypeError, match="MemorySaving or None, got 4096"):
        model.set_memory_saving(4096)


def make_long(saving=None, **options):
    sizes = {"embed_dim": 64, "num_layers": 6, "vocab_size": 61, **options}
    pattern = {"segment_lengths": (128, 512), "dilation_rates": (1, 4)}
    model = create_model("longnet_lm_tiny", **pattern, **sizes)
    model.set_memory_saving(saving)
    return model


@pytest.mark.parametrize(
    "saving",
    [None, MemorySaving(chunk_size=None), MemorySaving(chunk_size=128, keep_attention=True)],
    ids=str,
)
def test_counted_memory_is_that_of_a_real_step(saving):
    counted, real = (
        training_step_peak_mib(lambda: make_long(saving, num_layers=3), 1024, is_real=is_real)
        for is_real in (False, True)
    )
    assert counted == pytest.approx(real, rel=0.15)


@pytest.mark.slow
def test_long_decoder_takes_a_fraction_of_the_memory():
    """The sizes of the 125M model at 32,768 tokens, a third as deep, without computing anything."""

    def peak(saving, **options):
        def make():
            model = create_model("longnet_lm_base", num_layers=4, **options)
            model.set_memory_saving(saving)
            return model

        return training_step_peak_mib(make, 32768)

    plain, saved = peak(None), peak(MemorySaving())
    assert saved < 0.25 * plain
    assert peak(MemorySaving(), ffn_dim=8 * 768) < 1.1 * saved


def test_a_larger_vocabulary_costs_its_gradient_alone():
    tokens, mib = torch.randint(100, (1, 1025)), 2**-20

    def peak(vocab_size):
        model = make_long(SAVING, num_layers=1, vocab_size=vocab_size, tie_embeddings=False)
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        inputs, labels = tokens[:, :-1], tokens[:, 1:]
        return peak_extra_mib(lambda: model.loss(inputs, labels, chunk_size=64).backward())

    gradient, chunk_of_logits = 9000 * 64 * 4 * mib, 64 * 9000 * 4 * mib
    all_logits = 1024 * 9000 * 4 * mib
    allowed = gradient + 1.5 * chunk_of_logits
    assert peak(9000) - peak(100) < allowed < 0.2 * all_logits


def test_python_blocks_of_the_docs_run():
    text = Path(__file__).parents[2].joinpath("docs", "memory.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    assert len(blocks) == 2
    names = {}
    for block in blocks:
        exec(block, names)
    assert names["model"].embedding.weight.grad.abs().sum() > 0
    assert {block.memory_saving for block in names["model"].stack.blocks} == {MemorySaving()}


def test_programme_ends_in_one_json_document(monkeypatch, capsys):
    options = ["--model", "longnet_lm_tiny", "--num-layers", "1", "--seq-len", "64", "--check"]
    options += ["--ffn-factor", "4", "8", "--vocab-size", "300"]
    monkeypatch.setattr("sys.argv", ["memory", *options])
    memory.main(memory.read_options())
    lines = capsys.readouterr().out.splitlines()
    rows = json.loads(lines[-1])["rows"]
    assert len(lines) == 1 + len(rows) == 1 + 2 * len(memory.MODES)
    assert [row["of_plain"] for row in rows if row["mode"] == "plain"] == [1.0, 1.0]
    assert all(row["peak_mib"] > 0 and row["real_mib"] > 0 for row in rows)
