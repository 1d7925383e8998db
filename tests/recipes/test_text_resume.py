"""A run that is stopped anywhere and resumed sees the batches that the unbroken run sees."""

import itertools
import json
import multiprocessing
import warnings

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from recipes.text_data import TextDataModule
from recipes.text_streaming import StreamingConfig

MAX_STEPS = 17
# Batches in an epoch of `corpus`.
EPOCH = 5


class _Recorder(L.LightningModule):
    """Remembers every batch and raises at a chosen one, as a kill would."""

    def __init__(self, *, stop_at=None):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.stop_at = stop_at
        self.batches = []

    def training_step(self, batch, batch_idx):
        if len(self.batches) == self.stop_at:
            raise KeyError("killed")
        self.batches.append(_digest(batch))
        return self.weight * batch["tokens"].float().mean()

    def validation_step(self, batch, batch_idx):
        assert batch["tokens"].shape == batch["labels"].shape

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


def _digest(batch):
    return tuple((name, tuple(part.flatten().tolist())) for name, part in batch.items())


@pytest.fixture
def corpus(tmp_path):
    for i in range(60):
        (tmp_path / f"{i:02}.txt").write_bytes(bytes([i]) * (20 + i % 7) + b"end")
    return str(tmp_path)


def _run(corpus, folder, *, data, trainer=None, stop_at=None, ckpt_path=None, callbacks=()):
    model = _Recorder(stop_at=stop_at)
    options = {"max_steps": MAX_STEPS, "max_epochs": -1, "val_check_interval": 2, **(trainer or {})}
    runner = L.Trainer(
        **options,
        default_root_dir=folder,
        callbacks=list(callbacks),
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=bool(callbacks),
    )
    module = TextDataModule(source=corpus, seq_len=16, batch_size=16, seed=3, **data)
    with warnings.catch_warnings():
        # Lightning advises many workers, whatever the data.
        warnings.simplefilter("ignore")
        try:
            runner.fit(model, module, ckpt_path=ckpt_path, weights_only=True)
        except KeyError:
            assert stop_at is not None
    # Also after an exception.
    assert not multiprocessing.active_children()
    return model, runner


def _checkpoints(folder, every):
    return ModelCheckpoint(
        folder, filename="{step}", every_n_train_steps=every, save_top_k=-1, save_last=True
    )


DATA = {
    "plain": {},
    "workers": {"num_workers": 2},
    "shuffled": {"shuffle_documents": True},
    "masked": {"objective": "masked", "confine_to_document": True},
    "streaming": {"streaming": StreamingConfig(batches_per_epoch=6, shuffle_windows=40)},
    "streaming_worker": {
        "streaming": StreamingConfig(batches_per_epoch=6, shuffle_windows=40),
        "num_workers": 1,
        "shuffle_documents": True,
    },
}
TRAINERS = {
    "plain": {},
    "limit": {"limit_train_batches": 4},
    "share": {"limit_train_batches": 0.5},
    "accumulate": {"accumulate_grad_batches": 2, "max_steps": 8},
    "no_validation": {"limit_val_batches": 0},
    "epoch_validation": {"val_check_interval": 1.0},
    "global_interval": {"check_val_every_n_epoch": None, "val_check_interval": 4},
    "reload": {"reload_dataloaders_every_n_epochs": 1},
}
# Every validation starts its workers anew, so that there are few where there are workers.
CASES = [(data, "epoch_validation" if "worker" in data else "plain") for data in DATA] + [
    (data, trainer) for trainer in list(TRAINERS)[1:] for data in ("plain", "streaming")
]


@pytest.mark.parametrize(("data", "trainer"), CASES)
@pytest.mark.parametrize("every", [1, 3])
def test_a_killed_run_continues_exactly(corpus, tmp_path, data, trainer, every):
    data, trainer = DATA[data], TRAINERS[trainer]
    whole, runner = _run(corpus, tmp_path / "a", data=data, trainer=trainer)
    assert runner.current_epoch > 1
    assert len(set(whole.batches)) == len(whole.batches)
    for stop_at in range(every * 2, len(whole.batches), 5):
        folder = tmp_path / f"b{stop_at}"
        callback = _checkpoints(folder, every)
        broken, _ = _run(
            corpus, folder, data=data, trainer=trainer, stop_at=stop_at, callbacks=[callback]
        )
        resumed, _ = _run(
            corpus, folder, data=data, trainer=trainer, ckpt_path=folder / "last.ckpt"
        )
        kept = len(whole.batches) - len(resumed.batches)
        assert 0 < kept <= stop_at
        assert broken.batches[:kept] + resumed.batches == whole.batches


def test_a_run_stopped_by_max_steps_continues_exactly(corpus, tmp_path):
    whole, _ = _run(corpus, tmp_path, data={})
    for steps in (5, 9, 10):
        path = tmp_path / f"{steps}.ckpt"
        first, runner = _run(corpus, tmp_path, data={}, trainer={"max_steps": steps})
        runner.save_checkpoint(path)
        second, _ = _run(corpus, tmp_path, data={}, ckpt_path=path)
        assert first.batches + second.batches == whole.batches


def test_a_checkpoint_of_an_epoch_end_continues_exactly(corpus, tmp_path):
    whole, _ = _run(corpus, tmp_path, data={})
    for on_end in (True, False):
        # With validation at the end, a checkpoint is written after either of the two.
        callback = ModelCheckpoint(
            tmp_path / str(on_end), save_last=True, save_on_train_epoch_end=on_end
        )
        interval = {"val_check_interval": 1.0}
        broken, _ = _run(
            corpus, tmp_path, data={}, trainer=interval, stop_at=13, callbacks=[callback]
        )
        path = tmp_path / str(on_end) / "last.ckpt"
        resumed, _ = _run(corpus, tmp_path, data={}, trainer=interval, ckpt_path=path)
        kept = len(whole.batches) - len(resumed.batches)
        assert kept in (EPOCH, EPOCH * 2)
        assert broken.batches[:kept] + resumed.batches == whole.batches


def test_validation_does_not_move_the_training_data(corpus, tmp_path):
    often, _ = _run(corpus, tmp_path, data={}, trainer={"val_check_interval": 1})
    never, _ = _run(corpus, tmp_path, data={}, trainer={"limit_val_batches": 0})
    assert often.batches == never.batches


def test_overfitting_repeats_its_batches(corpus, tmp_path):
    options = {"overfit_batches": 2, "val_check_interval": 1.0, "max_steps": 6}
    model, _ = _run(corpus, tmp_path, data={}, trainer=options)
    assert model.batches == model.batches[:2] * 3


def test_a_second_fit_of_one_trainer_goes_on(corpus, tmp_path):
    for data in (DATA["plain"], DATA["streaming"]):
        model, runner = _run(corpus, tmp_path, data=data, trainer={"max_steps": 6})
        module = runner.datamodule
        runner.fit_loop.epoch_loop.max_steps = 12
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            runner.fit(model, module)
        assert len(model.batches) == 12
        assert len(set(model.batches)) == 12


class _RankRecorder(_Recorder):
    """Writes what each rank has seen to a file."""

    def __init__(self, folder):
        super().__init__()
        self.folder = str(folder)

    def on_train_end(self):
        with open(f"{self.folder}/rank{self.global_rank}.json", "w") as file:
            json.dump(self.batches, file)


def _fit_on_two_ranks(corpus, folder, *, max_steps, ckpt_path=None):
    folder.mkdir(exist_ok=True)
    runner = L.Trainer(
        max_steps=max_steps,
        max_epochs=-1,
        limit_val_batches=1,
        val_check_interval=2,
        accelerator="cpu",
        devices=2,
        # Forked processes have PyTorch at once.
        strategy="ddp_fork",
        default_root_dir=folder,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[_checkpoints(folder, 5)],
    )
    module = TextDataModule(source=corpus, seq_len=16, batch_size=3, seed=3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        runner.fit(_RankRecorder(folder), module, ckpt_path=ckpt_path, weights_only=True)
    return [json.loads((folder / f"rank{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.slow
@pytest.mark.distributed
def test_ranks_share_the_windows_and_resume(corpus, tmp_path):
    ranks = _fit_on_two_ranks(corpus, tmp_path / "whole", max_steps=14)
    assert [len(rank) for rank in ranks] == [14, 14]
    module = TextDataModule(source=corpus, seq_len=16, batch_size=6, seed=3)
    loader = module.train_dataloader()
    batches = itertools.chain.from_iterable(itertools.repeat(loader))
    for first, second, batch in zip(*ranks, batches, strict=False):
        both = [dict(first)["tokens"], dict(second)["tokens"]]
        assert [*both[0], *both[1]] == batch["tokens"].flatten().tolist()

    rest = _fit_on_two_ranks(
        corpus, tmp_path / "rest", max_steps=14, ckpt_path=tmp_path / "whole/step=10.ckpt"
    )
    assert rest == [rank[10:] for rank in ranks]
