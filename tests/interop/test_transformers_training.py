"""Training our models with Transformers: losses, checkpointing, Trainer, adapters."""

import copy

import accelerate
import peft
import pytest
import torch
from torch.nn import functional
from transformers import PreTrainedModel, Trainer, TrainingArguments

from longnet_zoo.interop.transformers import LongNetForCausalLM

from .longnet_toys import HEADS, make, make_tokens, output_of


def labels_of(tokens: torch.Tensor) -> torch.Tensor:
    labels = tokens.clone()
    labels[0, :5] = -100
    labels[1, 3] = -100
    return labels


@pytest.mark.parametrize("num_items", [None, 7, torch.tensor(7)])
@pytest.mark.parametrize("model_class", HEADS)
def test_the_loss_is_the_cross_entropy_of_the_logits(model_class, num_items):
    model, tokens = make(model_class), make_tokens()
    labels = labels_of(tokens)
    outputs = model(tokens, labels=labels, num_items_in_batch=num_items)
    if model_class is LongNetForCausalLM:
        logits, targets = outputs.logits[:, :-1], labels[:, 1:]
    else:
        logits, targets = outputs.logits, labels
    reduction = "mean" if num_items is None else "sum"
    expected = functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction=reduction
    )
    torch.testing.assert_close(outputs.loss, expected if num_items is None else expected / 7)
    training = model.train()(tokens, labels=labels, num_items_in_batch=num_items)
    assert training.logits is None
    torch.testing.assert_close(training.loss, outputs.loss)


def test_logits_in_training_on_demand():
    model, tokens = make().train(), make_tokens()
    assert model(tokens).logits.shape == (2, 17, 61)
    assert model(tokens, labels=tokens, logits_to_keep=0).logits.shape == (2, 17, 61)


def test_labels_of_another_shape_are_refused():
    with pytest.raises(ValueError, match=r"labels must .* = \(2, 17\), got \(2, 16\)"):
        make()(make_tokens(), labels=make_tokens(2, 16))


def test_the_loss_goes_through_a_replaced_head():
    """Adapters and offloading replace the head, whose weight alone would be wrong then."""
    model, tokens = make(), make_tokens()

    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    head = Doubled(24, 61, bias=False)
    model.set_output_embeddings(head)
    outputs = model(tokens, labels=tokens)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        outputs.loss, functional.cross_entropy(logits, tokens[:, 1:].flatten())
    )


def test_the_loss_of_an_offloaded_model():
    model, tokens = make(), make_tokens()
    with torch.no_grad():
        expected = model(tokens, labels=tokens)
        accelerate.cpu_offload(model, execution_device="cpu")
        assert model.lm_head.weight.is_meta
        outputs = model(tokens, labels=tokens)
    torch.testing.assert_close(outputs.loss, expected.loss)
    torch.testing.assert_close(outputs.logits, expected.logits)


def gradients(model: PreTrainedModel, tokens: torch.Tensor) -> list[torch.Tensor]:
    model.zero_grad()
    model(tokens, labels=labels_of(tokens)).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    return [parameter.grad.clone() for parameter in model.parameters()]


@pytest.mark.parametrize("model_class", HEADS)
def test_checkpointing_leaves_gradients_as_they_are(model_class):
    model, tokens = make(model_class).train(), make_tokens()
    expected = gradients(model, tokens)
    stack, runs = model.base_model.network.stack, []
    for block in stack.blocks:
        block.attention.register_forward_hook(lambda *_: runs.append(1))

    def check(num_runs: int) -> None:
        runs.clear()
        torch.testing.assert_close(gradients(model, tokens), expected)
        assert len(runs) == num_runs
        assert model.is_activation_checkpointing is (num_runs > 3)

    check(3)
    model.activation_checkpointing_enable()
    check(6)
    model.activation_checkpointing_enable({"use_reentrant": False}, every_n_layers=2)
    check(5)
    model.activation_checkpointing_enable(offload=True)
    assert all(block.memory_saving.offload for block in stack.blocks)
    check(6)
    model.activation_checkpointing_disable()
    check(3)
    model.base_model.gradient_checkpointing = True
    check(6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_:FutureWarning")
def test_checkpointing_by_its_former_name():
    model = make()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert model.is_activation_checkpointing
    model.gradient_checkpointing_disable()
    assert not model.is_activation_checkpointing


def test_checkpointing_refuses_options_it_would_not_use():
    with pytest.raises(ValueError, match=r"got \{'use_reentrant': True\}"):
        make().activation_checkpointing_enable({"use_reentrant": True})


def test_results_repeat_and_dropout_acts_in_training_only():
    model, tokens = make(dropout=0.5), make_tokens()
    torch.testing.assert_close(output_of(model, tokens), output_of(model, tokens), rtol=0, atol=0)
    model.train()
    assert not torch.equal(output_of(model, tokens), output_of(model, tokens))


@pytest.mark.parametrize("model_class", HEADS)
def test_trainer_lowers_the_loss(model_class, tmp_path):
    model = make(model_class, vocab_size=13, num_layers=2)
    row = torch.arange(40) % 7 + 2
    rows = [row.roll(shift) for shift in range(8)]
    data = [{"input_ids": x, "attention_mask": torch.ones_like(x), "labels": x} for x in rows]
    options = TrainingArguments(
        tmp_path,
        max_steps=6,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        activation_checkpointing=True,
        learning_rate=1e-2,
        logging_steps=1,
        save_steps=6,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, options, train_dataset=data, eval_dataset=data)
    assert trainer.model_accepts_loss_kwargs
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert model.is_activation_checkpointing
    predicted = trainer.predict(data)
    assert predicted.metrics["test_loss"] < 0.5 * before
    assert predicted.predictions.shape == (8, 40, 13)
    # Mean over the labels of both batches of a step, however Trainer splits them.
    assert trainer.state.log_history[0]["loss"] == pytest.approx(before, rel=0.05)
    saved = model_class.from_pretrained(tmp_path / "checkpoint-6")
    torch.testing.assert_close(saved.state_dict(), model.state_dict(), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing:FutureWarning")
@pytest.mark.parametrize("targets", [["q_proj", "fc2"], "all-linear", ["lm_head", "v_proj"]])
def test_adapters_train_save_and_merge(targets, tmp_path):
    model, tokens = make(num_layers=2, tie_word_embeddings=False), make_tokens()
    options = peft.LoraConfig(
        task_type="CAUSAL_LM", target_modules=targets, init_lora_weights=False
    )
    tuned = peft.get_peft_model(copy.deepcopy(model), options).train()
    tuned.base_model.model.activation_checkpointing_enable()
    tuned(input_ids=tokens, labels=tokens).loss.backward()
    trained = [parameter for parameter in tuned.parameters() if parameter.requires_grad]
    assert len(trained) >= 4
    assert all(parameter.grad.abs().sum() > 0 for parameter in trained)

    outputs = tuned.eval()(input_ids=tokens, labels=tokens)
    assert not torch.allclose(outputs.logits, output_of(model, tokens), atol=1e-2)
    logits = outputs.logits[:, :-1].flatten(0, 1)
    torch.testing.assert_close(
        outputs.loss, functional.cross_entropy(logits, tokens[:, 1:].flatten())
    )
    tuned.save_pretrained(tmp_path, save_embedding_layers=False)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=tokens).logits, outputs.logits)
    merged = tuned.merge_and_unload().to_zoo()
    torch.testing.assert_close(merged(tokens), outputs.logits, rtol=1e-4, atol=1e-4)
