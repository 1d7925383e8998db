"""What models are shown, what they must not see, and what it costs."""

import pytest
import torch

import longnet_zoo as lz
from longnet_zoo.long_range import (
    IGNORE_INDEX,
    ListOps,
    Passkey,
    Pathfinder,
    SelectiveCopying,
    answer_logits,
    check_model,
    flops_per_example,
    make_task,
    options_for,
)

OPTIONS = {"embed_dim": 16, "num_layers": 1, "num_heads": 2}
PATTERN = {"segment_lengths": (16, 64), "dilation_rates": (1, 2)}


def text_model(name, task, **options):
    return lz.create_model(name, vocab_size=task.vocab_size, **OPTIONS, **PATTERN, **options).eval()


def image_model(**options):
    sizes = {"img_size": 32, "patch_size": 4, "in_chans": 1, "num_classes": 2}
    pattern = {"segment_lengths": (16, 64), "dilation_rates": (1, 2)}
    return lz.create_model("longvit_tiny_patch8_64", **OPTIONS, **pattern, **sizes | options).eval()


@pytest.mark.parametrize("name", ["longnet_lm_tiny", "longnet_mlm_tiny"])
def test_logits_are_those_of_the_whole_model_at_the_labels(name):
    task = SelectiveCopying(seq_len=37, num_data_tokens=4)
    model = text_model(name, task)
    batch = task.batch(range(3), split="train")
    logits, classes = answer_logits(model, task, batch)
    is_asked = batch["labels"] != IGNORE_INDEX
    torch.testing.assert_close(logits, model(batch["tokens"])[is_asked])
    assert classes.tolist() == batch["labels"][is_asked].tolist()


def test_a_model_that_sees_both_sides_does_not_see_the_answer():
    task = Passkey(seq_len=340)
    model = text_model("longnet_mlm_tiny", task)
    batch = task.batch([5], split="train")
    logits, classes = answer_logits(model, task, batch)
    whole = torch.cat([batch["tokens"][0], batch["labels"][0, -1:]])
    hidden = whole.clone()
    hidden[-len(classes) :] = 257
    expected = model(hidden[None, 1:])[0, -len(classes) :]
    torch.testing.assert_close(logits, expected)
    # The digits that a causal model reads on the way change nothing.
    batch["tokens"][0, -(len(classes) - 1) :] = ord("7")
    torch.testing.assert_close(answer_logits(model, task, batch)[0], expected)


def test_padding_changes_no_answer_of_a_model_that_sees_both_sides():
    task = ListOps(seq_len=50)
    model = text_model("longnet_mlm_tiny", task)
    batch = task.batch([0], split="train")
    (place,) = (batch["labels"][0] != IGNORE_INDEX).nonzero()[0].tolist()
    assert place < 49
    alone = {name: rows[:, : place + 1] for name, rows in batch.items()}
    torch.testing.assert_close(
        answer_logits(model, task, batch)[0], answer_logits(model, task, alone)[0]
    )


def test_a_model_of_images_reads_pathfinder_as_images():
    task, model = Pathfinder(), image_model()
    batch = task.batch(range(3), split="train")
    # A row without labels only fills a batch.
    batch["labels"][1] = IGNORE_INDEX
    logits, classes = answer_logits(model, task, batch)
    images = task.images(batch["tokens"])
    torch.testing.assert_close(logits, model(images)[[0, 2]])
    assert classes.tolist() == (batch["labels"][[0, 2], -1] - 256).tolist()


def test_options_make_models_that_pass_the_check():
    for name in ("mqar", "pathfinder"):
        task = make_task(name)
        model = lz.create_model("longnet_lm_tiny", **OPTIONS, **options_for(task, modality="text"))
        check_model(model, task, name="it")
    model = image_model(**options_for(Pathfinder(), modality="vision"))
    check_model(model, Pathfinder(), name="it")


@pytest.mark.parametrize(
    ("model", "task", "words"),
    [
        (lambda: text_model("longnet_lm_tiny", ListOps()), Passkey(), "least 259 .* it with 17"),
        (lambda: image_model(), Passkey(), "done by models of text .* it, a LongViT"),
        (lambda: image_model(num_classes=3), Pathfinder(), "got it with 1 and 3"),
        (lambda: torch.nn.Linear(2, 2), Pathfinder(), "also by longvit.* it, a Linear"),
    ],
)
def test_models_that_cannot_do_a_task_are_refused(model, task, words):
    with pytest.raises(ValueError, match=words):
        check_model(model(), task, name="it")


def test_modalities_that_cannot_do_a_task_are_refused():
    with pytest.raises(ValueError, match=r"mqar is done by models of text .* modality 'vision'"):
        options_for(make_task("mqar"), modality="vision")


@pytest.mark.parametrize("is_causal", [True, False])
def test_flops_are_counted_by_hand(is_causal):
    task = SelectiveCopying(seq_len=64, num_data_tokens=4)
    model = text_model("longnet_lm_tiny" if is_causal else "longnet_mlm_tiny", task)
    model = type(model)(model.config.changed({"segment_lengths": (2**30,), "dilation_rates": (1,)}))
    linear = 2 * (4 + 8) * 16**2 * 64 + 2 * 16 * 16 * 4
    pairs = 2 * (64 * 65 // 2 if is_causal else 64 * 64)
    assert flops_per_example(model, task) == linear + 4 * 8 * pairs
    training = 3 * linear + (4 + 10) * 8 * pairs
    assert flops_per_example(model, task, is_training=True) == training


def test_flops_of_an_image_model_are_those_of_its_patches():
    model = image_model()
    assert flops_per_example(model, Pathfinder()) == model.flops(64)
