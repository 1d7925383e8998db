"""BPT inside models of Transformers: the same results and gradients in less memory."""

import copy
import inspect
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    Trainer,
    TrainingArguments,
)

from longnet_zoo.interop.transformers import (
    ATTENTION_NAME,
    patch_blockwise,
    set_pattern,
    unpatch_blockwise,
)
from longnet_zoo.ops.pattern import DilatedPattern

from .hugging_face_toys import CLOSE, CONFIGS, GPT2, SIZES, VOCAB, build

MODELS = {**CONFIGS, "gpt2": GPT2}
every_model = pytest.mark.parametrize("name", MODELS)


def draw_batch() -> tuple[Tensor, Tensor]:
    tokens = torch.randint(1, VOCAB, (3, 29))
    labels = tokens.clone()
    labels[0, :11] = labels[2, 20:] = -100
    return tokens, labels


def gradients(model: nn.Module, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {name: x.grad.clone() for name, x in model.named_parameters() if x.grad is not None}


@contextmanager
def measured_bytes() -> Iterator[list[int]]:
    """Sums the storages that the backward pass keeps, each once."""
    storages: dict[int, int] = {}
    total: list[int] = []

    def pack(x: Tensor) -> Tensor:
        if not isinstance(x, nn.Parameter):
            storages[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        yield total
    total.append(sum(storages.values()))


@every_model
@pytest.mark.parametrize("is_checkpointed", [False, True])
def test_outputs_and_gradients_are_those_of_the_unpatched_model(
    name: str, is_checkpointed: bool
) -> None:
    model = build(MODELS[name]).train()
    tokens, _ = draw_batch()
    cotangent = torch.randn(3, 29, VOCAB)
    wanted = model(tokens).logits
    wanted_grads = gradients(model, (wanted * cotangent).sum())
    patch_blockwise(model, chunk_size=20)
    if is_checkpointed:
        model.activation_checkpointing_enable()
    got = model(tokens, use_cache=False).logits
    torch.testing.assert_close(got, wanted, **CLOSE)
    grads = gradients(model, (got * cotangent).sum())
    assert grads.keys() == wanted_grads.keys()
    for key, wanted_grad in wanted_grads.items():
        torch.testing.assert_close(grads[key], wanted_grad, rtol=1e-4, atol=1e-5)


@every_model
@pytest.mark.parametrize("num_items", [None, 123, torch.tensor(77)])
def test_loss_is_that_of_the_unpatched_model(name: str, num_items: object) -> None:
    model = build(MODELS[name]).train()
    tokens, labels = draw_batch()
    options = {} if num_items is None else {"num_items_in_batch": num_items}
    wanted = model(tokens, labels=labels, **options).loss
    wanted_grads = gradients(model, wanted)
    patch_blockwise(model, chunk_size=20)
    outputs = model(tokens, labels=labels, **options)
    assert outputs.logits is None
    assert "logits" not in outputs
    torch.testing.assert_close(outputs.loss, wanted, **CLOSE)
    grads = gradients(model, outputs.loss)
    for key, wanted_grad in wanted_grads.items():
        torch.testing.assert_close(grads[key], wanted_grad, **CLOSE)


def test_shifted_labels_and_positional_labels_are_used() -> None:
    model = build(CONFIGS["llama"]).train()
    tokens, labels = draw_batch()
    shifted = torch.randint(0, VOCAB, tokens.shape)
    wanted = model(tokens, labels=labels).loss
    wanted_shifted = model(tokens, labels=labels, shift_labels=shifted).loss
    patch_blockwise(model)
    got = model(tokens, labels=labels, shift_labels=shifted).loss
    torch.testing.assert_close(got, wanted_shifted, **CLOSE)
    names = list(inspect.signature(model.forward).parameters)
    inputs = [tokens, *([None] * (names.index("labels") - 1)), labels]
    got, *others = model(*inputs, return_dict=False)
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert all(not isinstance(x, Tensor) for x in others)


def test_a_head_with_a_bias_counts_in_the_loss() -> None:
    model = build(CONFIGS["llama"]).train()
    model.lm_head.bias = nn.Parameter(torch.randn(VOCAB))
    tokens, labels = draw_batch()
    wanted = model(tokens, labels=labels).loss
    got = patch_blockwise(model)(tokens, labels=labels).loss
    torch.testing.assert_close(got, wanted, **CLOSE)


def test_logits_stay_in_evaluation_unless_not_wanted() -> None:
    model = patch_blockwise(build(CONFIGS["llama"]).train()).eval()
    tokens, labels = draw_batch()
    plain = model(tokens, labels=labels)
    assert plain.logits.shape == (3, 29, VOCAB)
    chunked = patch_blockwise(model, keep_eval_logits=False)(tokens, labels=labels)
    assert chunked.logits is None
    torch.testing.assert_close(chunked.loss, plain.loss, **CLOSE)
    # Without labels nothing changes.
    assert torch.equal(model(tokens).logits, plain.logits)
    assert patch_blockwise(model.train(), use_chunked_loss=False)(
        tokens, labels=labels
    ).logits.shape == (3, 29, VOCAB)


def test_hidden_channels_and_logits_are_not_kept_for_the_backward_pass() -> None:
    config = LlamaConfig(**SIZES | {"vocab_size": 2000, "num_hidden_layers": 1})
    model = build(config).train()
    tokens = torch.randint(1, 2000, (2, 300))
    kept = []
    no_loss = {"use_chunked_loss": False}
    for options in (None, {"chunk_size": 100, **no_loss}, no_loss, {"chunk_size": 100}):
        unpatch_blockwise(model)
        if options is not None:
            patch_blockwise(model, **options)
        with measured_bytes() as total:
            _loss = model(tokens, labels=tokens, use_cache=False).loss
        kept += total
    # Gate, its activation, the other half and their product; float32.
    assert kept[0] - kept[1] >= 4 * 600 * 80 * 4
    # One chunk of all tokens is computed again as well.
    assert kept[1] == pytest.approx(kept[2], rel=0.01)
    # Softmax of the logits.
    assert kept[1] - kept[3] >= 600 * 2000 * 4


def test_hidden_channels_exist_for_one_chunk_at_a_time() -> None:
    model = patch_blockwise(build(CONFIGS["llama"]).train(), chunk_size=30)
    tokens, labels = draw_batch()
    shapes = []
    model.model.layers[0].mlp.up_proj.register_forward_hook(
        lambda module, inputs, output: shapes.append(tuple(output.shape))
    )
    loss = model(tokens, labels=labels).loss
    chunks = [(3, 10, 80), (3, 10, 80), (3, 9, 80)]
    assert shapes == chunks
    loss.backward()
    # Again in the backward pass, from the last chunk to the first.
    assert sorted(shapes[3:]) == sorted(chunks)


def test_dropout_is_the_same_in_the_backward_pass() -> None:
    config = copy.deepcopy(GPT2)
    config.resid_pdrop = 0.5
    model = build(config).train()
    mlp = model.transformer.h[0].mlp
    x, cotangent = torch.randn(2, 2, 26, 48).unbind(0)
    x.requires_grad_()
    torch.manual_seed(3)
    wanted = torch.cat([mlp(part.contiguous()) for part in x.split(5, dim=1)], dim=1)
    (wanted_grad,) = torch.autograd.grad(wanted, x, cotangent)
    patch_blockwise(model, chunk_size=10)
    torch.manual_seed(3)
    got = mlp(x)
    torch.testing.assert_close(got, wanted)
    torch.testing.assert_close(torch.autograd.grad(got, x, cotangent)[0], wanted_grad)


def test_patching_is_idempotent_and_can_be_undone(tmp_path) -> None:
    model = build(CONFIGS["llama"]).train()
    keys = list(model.state_dict())
    signature = inspect.signature(model.forward)
    tokens, labels = draw_batch()
    wanted = model.eval()(tokens, labels=labels)
    assert patch_blockwise(model, chunk_size=7) is model
    assert inspect.signature(model.forward) == signature
    assert list(model.state_dict()) == keys
    patch_blockwise(model, chunk_size=9)
    assert model.model.layers[1].mlp.forward.chunk_size == 9
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(tokens, labels=labels).loss, wanted.loss, **CLOSE)
    assert unpatch_blockwise(unpatch_blockwise(model)) is model
    assert all("forward" not in vars(module) for module in model.modules())
    assert torch.equal(model(tokens).logits, wanted.logits)


def test_a_forward_of_others_is_called_and_comes_back() -> None:
    model = build(CONFIGS["llama"]).train()
    mlp = model.model.layers[0].mlp
    mlp.forward = lambda x: torch.zeros_like(x)
    before = mlp.forward
    patch_blockwise(model)
    assert not mlp(torch.randn(1, 5, 48)).any()
    head = model.lm_head
    head.forward = before_head = lambda x: nn.functional.linear(x, head.weight)
    tokens, labels = draw_batch()
    assert model(tokens, labels=labels).logits is None
    assert head.forward is before_head
    unpatch_blockwise(model)
    assert mlp.forward is before


def test_a_copy_refers_to_its_own_weights() -> None:
    model = patch_blockwise(build(CONFIGS["llama"]).train())
    tokens, labels = draw_batch()
    other = copy.deepcopy(model)
    before = model(tokens, labels=labels).loss
    nn.init.zeros_(other.lm_head.weight)
    for layer in other.model.layers:
        nn.init.constant_(layer.mlp.down_proj.weight, torch.nan)
    assert torch.equal(model(tokens, labels=labels).loss, before)
    assert other(tokens, labels=labels).loss.isnan()


def test_a_failing_call_leaves_the_model_as_it_was() -> None:
    model = patch_blockwise(build(CONFIGS["llama"]).train())
    tokens, _ = draw_batch()
    with pytest.raises(ValueError, match="labels must lie in"):
        model(tokens, labels=tokens + VOCAB)
    assert model(tokens).logits.shape == (3, 29, VOCAB)


def test_generation_and_dilated_attention_go_with_it() -> None:
    model = build(CONFIGS["llama"]).train()
    model.set_attn_implementation(ATTENTION_NAME)
    set_pattern(model, DilatedPattern.geometric(4, 16)).eval()
    tokens, _ = draw_batch()
    wanted = model.generate(tokens, max_new_tokens=6, do_sample=False)
    patch_blockwise(model, chunk_size=16)
    assert torch.equal(model.generate(tokens, max_new_tokens=6, do_sample=False), wanted)


# PEFT 0.21 asks Transformers by a name that it has renamed.
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
@pytest.mark.parametrize("is_first", [False, True])
def test_adapters_of_peft_get_the_same_gradients(is_first: bool) -> None:
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    model = build(CONFIGS["llama"]).train()
    tokens, labels = draw_batch()
    if is_first:
        wrapped = get_peft_model(patch_blockwise(model, chunk_size=20), config)
    else:
        wrapped = patch_blockwise(get_peft_model(model, config), chunk_size=20)
    outputs = wrapped(tokens, labels=labels)
    assert outputs.logits is None
    grads = gradients(wrapped, outputs.loss)
    unpatch_blockwise(wrapped)
    plain = wrapped(tokens, labels=labels)
    torch.testing.assert_close(outputs.loss, plain.loss, **CLOSE)
    wanted = gradients(wrapped, plain.loss)
    assert any("up_proj" in key for key in wanted)
    for key, grad in grads.items():
        torch.testing.assert_close(grad, wanted[key], **CLOSE)


def test_distributed_data_parallel_gets_the_same_gradients(tmp_path) -> None:
    model = build(CONFIGS["llama"]).train()
    tokens, labels = draw_batch()
    wanted = gradients(model, model(tokens, labels=labels).loss)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        parallel = nn.parallel.DistributedDataParallel(patch_blockwise(model, chunk_size=20))
        got = gradients(model, parallel(tokens, labels=labels).loss)
    finally:
        torch.distributed.destroy_process_group()
    assert got.keys() == wanted.keys()
    for key, wanted_grad in wanted.items():
        torch.testing.assert_close(got[key], wanted_grad, **CLOSE)


def test_trainer_takes_the_same_steps(tmp_path) -> None:
    tokens = torch.randint(1, VOCAB, (8, 29))
    data = [{"input_ids": row, "labels": row} for row in tokens]
    start = build(CONFIGS["llama"]).train()
    losses = []
    for is_patched in (False, True):
        model = copy.deepcopy(start)
        if is_patched:
            patch_blockwise(model, chunk_size=20)
        arguments = TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=3,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            logging_steps=1,
            learning_rate=0.01,
            report_to=[],
            save_strategy="no",
            use_cpu=True,
            disable_tqdm=True,
            prediction_loss_only=is_patched,
        )
        trainer = Trainer(model=model, args=arguments, train_dataset=data, eval_dataset=data)
        trainer.train()
        steps = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        losses.append([*steps, trainer.evaluate()["eval_loss"]])
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert losses[0][-1] < losses[0][0] - 0.05
