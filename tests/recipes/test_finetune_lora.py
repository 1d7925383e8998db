"""Fine-tuning with adapters: what is learned, what stays as it is, and what resumes."""

import math
import re
from itertools import pairwise

import pytest
import torch
from torch.nn import functional as F
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from longnet_zoo import DilatedPattern
from longnet_zoo.tokenizers import ByteTokenizer
from recipes.checkpoints import last_checkpoint
from recipes.finetune_lora import LoraFinetuning, main
from recipes.finetune_lora_model import LoraOptions
from recipes.sampling import SamplingConfig
from tests.recipes.finetune_runs import (
    PATTERN,
    TOY,
    arguments,
    make_base,
    make_other_data,
    make_task,
    save_toy,
    write_other_text,
)
from tests.recipes.text_runs import curve, last_checkpoint_every, make_trainer, read_rows


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_other_text(tmp_path_factory.mktemp("text") / "other")


def validate(task, text, run_dir):
    trainer = make_trainer(run_dir, limit_val_batches=1.0)
    (logged,) = trainer.validate(task, datamodule=make_other_data(text), verbose=False)
    return logged["val_bits_per_byte"]


# Training -----------------------------------------------------------------------------------------


def test_adapters_learn_another_text_and_the_base_stays_as_it_is(base, text, tmp_path):
    task = make_task(base, pattern=DilatedPattern(**PATTERN))
    weights = {name: value.clone() for name, value in frozen(task).items()}
    before = validate(task, text, tmp_path)
    trainer = make_trainer(tmp_path, max_steps=40)
    trainer.fit(task, datamodule=make_other_data(text))
    after = validate(task, text, tmp_path)
    # Noise of one step or batch is about 0.05.
    assert after < before - 1.0
    # And below what the frequencies of single bytes come to: context counts.
    assert after < entropy(text)
    for name, value in frozen(task).items():
        assert torch.equal(value, weights[name]), name
    with task.model.without_adapters():
        assert validate(task, text, tmp_path) == pytest.approx(before, rel=1e-6)


def frozen(task):
    return {name: value for name, value in task.named_parameters() if "lora_" not in name}


def entropy(text):
    joined = b"".join(path.read_bytes() for path in text.iterdir())
    counts = torch.bincount(torch.frombuffer(bytearray(joined), dtype=torch.uint8)).double()
    shares = counts[counts > 0] / counts.sum()
    return float(-(shares * shares.log2()).sum())


def test_only_adapters_get_gradients_and_reach_the_optimizer(base, text, tmp_path):
    class Watched(LoraFinetuning):
        def on_before_optimizer_step(self, optimizer):
            super().on_before_optimizer_step(optimizer)
            seen.update(name for name, value in self.named_parameters() if value.grad is not None)
            held = {value for group in optimizer.param_groups for value in group["params"]}
            names.update(name for name, value in self.named_parameters() if value in held)

    seen, names = set(), set()
    task = Watched(model_name=str(base))
    make_trainer(tmp_path, max_steps=1).fit(task, datamodule=make_other_data(text))
    assert seen == names
    assert all(".lora_A." in name or ".lora_B." in name for name in seen)
    # Two for each of seven linear layers in each of two layers.
    assert len(seen) == 2 * 7 * 2
    assert task.model.num_params(trainable_only=True) == sum(
        value.numel() for name, value in task.named_parameters() if name in seen
    )
    assert task.model.num_params() == sum(value.numel() for value in task.model.parameters())


@pytest.mark.parametrize("confine", [False, True])
def test_bits_per_byte_are_those_of_the_logits(base, text, tmp_path, confine):
    # Documents of one row are kept apart by either attention.
    for pattern in (None, DilatedPattern(**PATTERN)):
        check_bits_per_byte(make_task(base, pattern=pattern), text, tmp_path, confine)


def check_bits_per_byte(task, text, tmp_path, confine):
    data = make_other_data(text, confine_to_document=confine)
    (logged,) = make_trainer(tmp_path, limit_val_batches=1.0).validate(
        task, datamodule=data, verbose=False
    )
    task.eval()
    nats, num_bytes = 0.0, 0
    for batch in data.val_dataloader():
        tokens, labels = batch["tokens"], batch["labels"]
        bounds = batch.get("cu_seqlens", torch.tensor([0, tokens.shape[1]])).tolist()
        for start, stop in pairwise(bounds):
            with torch.no_grad():
                logits = task.model.base(input_ids=tokens[:, start:stop]).logits.flatten(0, 1)
            answers = labels[:, start:stop].flatten()
            nats += float(F.cross_entropy(logits, answers, reduction="sum"))
        num_bytes += int(((labels >= 0) & (labels < 256)).sum())
    assert logged["val_bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_saving_memory_changes_no_loss(base, text, tmp_path):
    losses = {}
    for name, options in {
        "plain": {},
        "saving": {"model__gradient_checkpointing": "true", "model__chunk_size": 24},
        # One segment over everything is the attention of the base.
        "dense": {"model__pattern": '{"segment_lengths":[64],"dilation_rates":[1]}'},
        "dilated": {"model__pattern": '{"segment_lengths":[8,64],"dilation_rates":[1,4]}'},
    }.items():
        run_dir = tmp_path / name
        main(["fit", *arguments(base, text, run_dir, model__lora__dropout=0, **options)])
        losses[name] = curve(run_dir, "train_loss")
    for name in ("saving", "dense"):
        assert losses[name] == pytest.approx(losses["plain"], rel=1e-5)
    assert abs(losses["dilated"][0] - losses["plain"][0]) > 1e-3


# Checkpoints --------------------------------------------------------------------------------------


def test_a_resumed_run_equals_an_unbroken_one(base, text, tmp_path):
    whole = arguments(base, text, tmp_path / "whole")
    main(["fit", *whole, *last_checkpoint_every(6)])
    parts = [*arguments(base, text, tmp_path / "parts"), *last_checkpoint_every(1)]
    main(["fit", *parts, "--trainer.max_steps=4"])
    main(["fit", *parts, "--ckpt_path=last"])
    assert read_rows(tmp_path / "parts") == read_rows(tmp_path / "whole")
    states = [read_state(tmp_path / name) for name in ("parts", "whole")]
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        assert torch.equal(value, states[1][name]), name


def read_state(run_dir):
    return torch.load(last_checkpoint(run_dir), weights_only=True)["state_dict"]


def test_a_checkpoint_holds_the_adapters_and_no_weight_of_the_base(base, text, tmp_path):
    main(["fit", *arguments(base, text, tmp_path), *last_checkpoint_every(6)])
    state = read_state(tmp_path)
    assert len(state) == 2 * 7 * 2
    assert all("lora_" in name for name in state)
    task = LoraFinetuning.load_from_checkpoint(last_checkpoint(tmp_path), weights_only=True)
    for name, value in task.state_dict().items():
        assert torch.equal(value, state[name])
    assert float(state[next(name for name in state if "lora_B" in name)].abs().max()) > 0
    # `validate` finds the checkpoint, and its figure is that of the training.
    main(["validate", *arguments(base, text, tmp_path)])
    assert validate_again(tmp_path, base, text) == curve(tmp_path, "val_bits_per_byte")[5]


def validate_again(run_dir, base, text):
    task = LoraFinetuning.load_from_checkpoint(last_checkpoint(run_dir), weights_only=True)
    trainer = make_trainer(run_dir, limit_val_batches=2)
    data = make_other_data(text, batch_size=2)
    (logged,) = trainer.validate(task, datamodule=data, verbose=False)
    return pytest.approx(logged["val_bits_per_byte"], rel=1e-6)


def test_other_settings_than_those_of_the_checkpoint_are_refused(base, text, tmp_path, capsys):
    args = arguments(base, text, tmp_path, trainer__max_steps=2)
    main(["fit", *args])
    for change, message in {
        "--model.lora.alpha=7": "'alpha': 7.*'alpha': 32",
        '--model.pattern={"segment_lengths":[8],"dilation_rates":[1]}': r"\[?8.*None",
        "--model.lora.rank=5": "mis-shaped",
        '--model.model_options={"rope_parameters":{"rope_type":"default","rope_theta":50.0}}': (
            "rope_theta.*None"
        ),
    }.items():
        with pytest.raises(SystemExit):
            main(["validate", *args, change])
        assert_matches(message, capsys.readouterr().err)


def assert_matches(pattern, text):
    assert re.search(pattern, text, re.DOTALL), text


def test_weights_of_something_else_are_refused_as_adapters(base):
    task = make_task(base)
    state = {name: value.clone() for name, value in task.state_dict().items()}
    lacking = dict(list(state.items())[1:])
    with pytest.raises(ValueError, match=r"1 missing: .*lora_A"):
        task.load_state_dict(lacking)
    assert not task.load_state_dict(lacking, strict=False).missing_keys
    task.load_state_dict({name: value + 1 for name, value in state.items()})
    assert all(torch.equal(value, state[name] + 1) for name, value in task.state_dict().items())


# Writing ------------------------------------------------------------------------------------------


def test_predict_writes_the_same_text_twice(base, text, tmp_path, capsys):
    args = arguments(base, text, tmp_path, model__sampling__max_new_tokens=12)
    main(["fit", *args])
    capsys.readouterr()
    for _ in range(2):
        main(["predict", *args, '--model.sampling.prompts=["nruter tr"]'])
    first, second = (
        part.split("\n")[0] for part in capsys.readouterr().out.split("--- prompt 1 ---\n")[1:]
    )
    assert first == second
    assert first.startswith("nruter tr")
    assert len(first) > len("nruter tr")


def test_likeliest_tokens_are_those_of_the_whole_text(tmp_path):
    config = LlamaConfig(**TOY, initializer_range=0.5)
    model = make_task(save_toy(LlamaForCausalLM, config, tmp_path)).model.eval()
    tokenizer, prompt = ByteTokenizer(), torch.arange(60, 90)
    new = write(model, prompt, temperature=0.0, max_new_tokens=20)
    tokens = prompt.tolist()
    for token in new:
        with torch.no_grad():
            logits = model.base(input_ids=torch.tensor([tokens])).logits[0, -1]
        logits[[tokenizer.mask_id, tokenizer.pad_id]] = -math.inf
        assert int(logits.argmax()) == token
        tokens.append(token)
    assert len(new) == 20 or new[-1] == tokenizer.eod_id
    # Another penalty and another seed write something else; a text stops it.
    assert write(model, prompt, temperature=0.0, repetition_penalty=9.0, max_new_tokens=20) != new
    drawn = [write(model, prompt, temperature=1.0, max_new_tokens=20, seed=x) for x in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    stop = tokenizer.decode(drawn[0][:4])
    short = write(model, prompt, temperature=1.0, max_new_tokens=20, stop_strings=(stop,))
    assert short == drawn[0][: len(short)]
    assert len(short) <= 4


def write(model, prompt, **options):
    return model.write(prompt, ByteTokenizer(), config=SamplingConfig(**options))


# Adapters -----------------------------------------------------------------------------------------


def test_options_of_the_adapters_reach_peft(base):
    lora = LoraOptions(
        rank=3, alpha=5, dropout=0.25, target_modules=["q_proj"], use_rslora=True, use_dora=True
    )
    task = make_task(base, lora=lora)
    config = task.model.peft.peft_config["default"]
    assert (config.r, config.lora_alpha, config.lora_dropout) == (3, 5, 0.25)
    assert (config.use_rslora, config.use_dora) == (True, True)
    trained = [name for name, value in task.named_parameters() if value.requires_grad]
    assert all(".q_proj." in name for name in trained)
    assert any("magnitude" in name for name in trained)
    # A base comes in evaluation mode, without dropout.
    assert all(module.training for module in task.modules())


def test_an_adapted_head_is_part_of_the_loss(tmp_path):
    save_toy(LlamaForCausalLM, LlamaConfig(**TOY, tie_word_embeddings=False), tmp_path)
    task = make_task(tmp_path, lora=LoraOptions(target_modules=("lm_head", "q_proj")))
    check_loss(task)


def test_a_cap_on_the_logits_is_part_of_the_loss(tmp_path):
    config = Gemma2Config(**TOY, head_dim=16, final_logit_softcapping=0.5)
    save_toy(Gemma2ForCausalLM, config, tmp_path)
    check_loss(make_task(tmp_path))


def check_loss(task):
    tokens, labels = torch.randint(256, (2, 1, 32))
    labels[0, 3] = -100
    for name, value in task.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value, std=0.3)
    expected = F.cross_entropy(task.model.base(input_ids=tokens).logits[0], labels[0])
    torch.testing.assert_close(task.model.loss(tokens, labels), expected)
    losses = task.model.loss(tokens, labels, reduction="none")
    assert losses[0, 3] == 0
    torch.testing.assert_close(losses.sum() / 31, expected)
