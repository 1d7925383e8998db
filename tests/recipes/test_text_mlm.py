"""The masked language model: trained and resumed like the causal one, but it fills in."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from longnet_zoo.tokenizers import ByteTokenizer
from recipes.sampling import SamplingConfig, fill
from recipes.text_data import TextDataModule
from recipes.text_mlm import TextMLM, main
from tests.recipes.text_runs import (
    arguments,
    curve,
    last_checkpoint_every,
    model_options,
    read_rows,
)


def make_task(**options):
    return TextMLM(model_options=model_options(), **options)


def test_training_lowers_the_loss_and_resumes_exactly(corpus, tmp_path):
    args = {
        "data__objective": "masked",
        "model__optimization__lr": 0.01,
        "trainer__val_check_interval": 10,
    }
    whole = arguments(corpus, tmp_path / "whole", **args, trainer__max_steps=20)
    main(["fit", *whole, *last_checkpoint_every(10)])
    losses = curve(tmp_path / "whole", "val_loss")
    assert losses[19] < losses[9] - 0.2

    for steps in (10, 20):
        args |= {"trainer__max_steps": steps}
        half = arguments(corpus, tmp_path / "half", **args)
        main(["fit", *half, *last_checkpoint_every(10), "--ckpt_path=last"])
    assert read_rows(tmp_path / "half", ignore=["epoch"]) == read_rows(
        tmp_path / "whole", ignore=["epoch"]
    )


def test_only_hidden_tokens_count(corpus):
    data = TextDataModule(source=str(corpus), seq_len=64, batch_size=4, objective="masked")
    data.setup("fit")
    batch = next(iter(data.val_dataloader()))
    task = make_task().eval()
    task.attach_tokenizer(data.tokenizer)
    hidden = batch["labels"] >= 0
    num_tokens, num_bytes = task._count(batch["labels"])
    assert int(num_tokens) == int(num_bytes) == int(hidden.sum())
    assert 0 < int(num_tokens) < hidden.numel() / 2
    losses = task.token_losses(batch["tokens"], batch["labels"])
    assert torch.equal(losses > 0, hidden)


def test_model_sees_both_sides():
    task = make_task().eval()
    tokens = torch.randint(256, (1, 48))
    changed = tokens.clone()
    changed[0, -1] = (changed[0, -1] + 1) % 256
    with torch.no_grad():
        assert not torch.equal(task.model(tokens)[0, 40], task.model(changed)[0, 40])


def test_predict_fills_in_each_mask(corpus, tmp_path, capsys):
    args = arguments(corpus, tmp_path, data__objective="masked", trainer__max_steps=1)
    main(["fit", *args, *last_checkpoint_every(1)])
    capsys.readouterr()
    main(["predict", *args, '--model.sampling.prompts=["def f<mask>(<mask>):"]'])
    printed = capsys.readouterr().out.split("--- prompt 1 ---\n")[1].split("\n\n")[0]
    assert "<mask>" not in printed
    assert printed.startswith("def f")
    assert len(printed) == len("def f_(_):")


class Neighbour(nn.Module):
    """Predicts the token before, and for the first one 0."""

    def forward_features(self, tokens):
        return F.one_hot(F.pad(tokens[:, :-1], (1, 0)), 9).float()

    def forward_head(self, features):
        return features


def test_fill_replaces_masks_only_and_never_by_a_banned_token():
    tokens = torch.tensor([5, 8, 2, 3, 8])
    assert fill(Neighbour(), tokens, mask_id=8).tolist() == [5, 5, 2, 3, 3]
    banned = fill(Neighbour(), tokens, mask_id=8, banned_ids=[5]).tolist()
    assert banned[0] == 5
    assert banned[1] != 5


def test_a_prompt_without_a_mask_is_refused():
    task = make_task(sampling=SamplingConfig(prompts=("def f",)))
    with pytest.raises(ValueError, match="must hold '<mask>' to fill in, got 'def f'"):
        task.attach_tokenizer(ByteTokenizer())


def test_a_tokenizer_without_a_mask_is_refused():
    class NoMask(ByteTokenizer):
        mask_id = None

    with pytest.raises(ValueError, match="needs a mask token, got a tokenizer without one"):
        make_task().attach_tokenizer(NoMask())


def test_checkpoint_loads_with_weights_only(corpus, tmp_path):
    args = arguments(corpus, tmp_path, data__objective="masked", trainer__max_steps=1)
    main(["fit", *args, *last_checkpoint_every(1)])
    path = tmp_path / "checkpoints" / "last.ckpt"
    loaded = TextMLM.load_from_checkpoint(path, weights_only=True)
    assert loaded.hparams.model_name == "longnet_mlm_tiny"
    assert loaded.model.config.is_causal is False
