"""The command line that all recipes share: LightningCLI with its pitfalls removed.

- The command line and the configuration win over what a checkpoint remembers.
- `--ckpt_path last` finds the run's own checkpoint; `validate`, `test` and `predict` take it by
  default and never evaluate an untrained model in silence.
- A checkpoint that is damaged or of another model is one error, before any data is read.
- Everything lies in `trainer.default_root_dir`, and a recipe may run in it again (`run_folder`).
- What our own code or Lightning refuses is reported without a traceback; a bug keeps its traceback.
"""

import linecache
import logging
import signal
import sys
import warnings
from pathlib import Path
from typing import Any, NoReturn

import lightning as L
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import longnet_zoo
from recipes.checkpoints import check_state_dict, last_checkpoint, read_checkpoint
from recipes.progress import LineProgress, StepBar
from recipes.run_folder import CurveLogger, make_room

__all__ = ["RecipeCLI", "run"]

_OUR_FOLDERS = (Path(__file__).parent, Path(longnet_zoo.__file__).parent)


def run(
    task: type[L.LightningModule],
    data: type[L.LightningDataModule],
    *,
    args: list[str] | None = None,
) -> None:
    """Runs a recipe's command line: fit, validate, test or predict.

    Args:
        task: The recipe's LightningModule.
        data: Its data module.
        args: Arguments; None takes those of the process.
    """
    with warnings.catch_warnings():
        _quieten()
        try:
            RecipeCLI(task, data, args=args)
        except SIGTERMException:
            # Lightning's exit status is 0, and a run that was stopped would count as finished.
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:
            _report(error)


class RecipeCLI(LightningCLI):
    """LightningCLI with a run folder, quiet defaults and checkpoints that do not overrule.

    Args:
        task: The recipe's LightningModule.
        data: Its data module.
        args: Arguments; None takes those of the process.
    """

    def __init__(
        self,
        task: type[L.LightningModule],
        data: type[L.LightningDataModule],
        *,
        args: list[str] | None = None,
    ) -> None:
        self._checkpoint: dict[str, Any] | None = None
        super().__init__(
            task,
            data,
            args=args,
            seed_everything_default=0,
            trainer_defaults={
                "default_root_dir": f"runs/{task.__name__}",
                # Steps or time end a run here; Lightning's default is 1,000 epochs.
                "max_epochs": -1,
            },
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            # A task stores plain values, the same from here and from Python.
            load_from_checkpoint_support=False,
        )

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that takes no abbreviations: `--trainer.max_step` is a mistake."""
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone.

        Lightning's own method overwrites it with what the checkpoint remembers, so that
        `--model.lr` and the configuration file would count for nothing.
        """

    def before_instantiate_classes(self) -> None:
        """Finds the checkpoint and opens it, since that is quick and data is slow."""
        if self.subcommand != "fit":
            # The callbacks of the training are not missed.
            warnings.filterwarnings("ignore", message="Be aware that when using `ckpt_path`")
        config = self.config[self.subcommand]
        if config["trainer"]["default_root_dir"] is None:
            raise ValueError(
                "a run needs a folder, got trainer.default_root_dir=None. Pass its path."
            )
        config["ckpt_path"] = self._find_checkpoint(config)
        path = config["ckpt_path"]
        # Folders are sharded checkpoints, URLs are fetched by Lightning.
        if path is not None and "://" not in path and not Path(path).is_dir():
            self._checkpoint = read_checkpoint(path)

    def after_instantiate_classes(self) -> None:
        """Compares the checkpoint with the model."""
        if self._checkpoint is not None:
            check_state_dict(self.model.state_dict(), self._checkpoint["state_dict"])
            self._checkpoint = None

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds what a training needs to be followed, unless the configuration says otherwise."""
        options = self._get(self.config_init, "trainer")
        callbacks = options["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if options["logger"] in (None, True):
            kwargs["logger"] = self._loggers(options) if self.subcommand == "fit" else False
        if options["enable_model_summary"] is None:
            # It lists a single module; a line of ours says more.
            kwargs["enable_model_summary"] = False
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if self.subcommand == "fit" and options["enable_progress_bar"] is None and not has_bar:
            kwargs["enable_progress_bar"] = is_terminal = sys.stdout.isatty()
            # In front, so that it has ended when others print at the end.
            kwargs["callbacks"] = [StepBar() if is_terminal else LineProgress(), *callbacks]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Makes room for the run, and says what is going to be trained."""
        if rank_zero_only.rank != 0:
            return
        config = self.config[self.subcommand]
        run_dir = config["trainer"]["default_root_dir"]
        if not config["trainer"]["fast_dev_run"]:
            # Not in a callback: Lightning starts the loggers before all of them.
            previous = make_room(run_dir, ckpt_path=config["ckpt_path"])
            if previous is not None:
                print(f"The run before lies in {previous} now.")
        name, size = self.model.hparams["model_name"], self.model.model.num_params()
        print(f"Training {name}, {size:,} parameters, in {run_dir}")

    def predict(self, *, datamodule: L.LightningDataModule, **kwargs: Any) -> None:
        """Runs `Trainer.predict` on the task's own prompts; of the data only the tokenizer counts.

        Args:
            datamodule: Data module of the recipe.
            kwargs: Other arguments of `Trainer.predict`.
        """
        self.model.attach_tokenizer(datamodule.tokenizer)
        self.trainer.predict(**kwargs)

    def _find_checkpoint(self, config: Any) -> str | None:
        """Returns the path of the checkpoint to load, or None to start from new weights."""
        path, run_dir = config["ckpt_path"], config["trainer"]["default_root_dir"]
        evaluates = self.subcommand != "fit" and not config["trainer"]["fast_dev_run"]
        if path is None and not evaluates:
            return None
        if path not in (None, "last"):
            return str(path)
        found = last_checkpoint(run_dir)
        if found is not None:
            return str(found)
        if evaluates:
            raise ValueError(
                f"{self.subcommand} needs trained weights, and there is no last*.ckpt in "
                f"{Path(run_dir, 'checkpoints')}. Run fit first, or pass --ckpt_path."
            )
        if rank_zero_only.rank == 0:
            print(f"No checkpoint in {run_dir} yet: starting from new weights.")
            previous = last_checkpoint(Path(run_dir, "previous"))
            if previous is not None:
                print(f"The run before has one: {previous}")
        return None

    def _loggers(self, options: Any) -> list[L.pytorch.loggers.Logger]:
        run_dir = options["default_root_dir"]
        # No version folders: the run folder is the version (see run_folder).
        tensorboard = TensorBoardLogger(
            Path(run_dir, "tensorboard"), name="", version="", default_hp_metric=False
        )
        return [CurveLogger(run_dir), tensorboard]


class _SaveConfig(SaveConfigCallback):
    """Writes config.yaml when training, and leaves that of the training alone otherwise."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


def _report(error: Exception) -> NoReturn:
    """Prints an error that our code or Lightning raised on purpose, raises any other."""
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        raise error
    file, line = Path(traceback.tb_frame.f_code.co_filename), traceback.tb_lineno
    is_ours = any(file.is_relative_to(folder) for folder in _OUR_FOLDERS)
    is_refusal = is_ours and linecache.getline(str(file), line).lstrip().startswith("raise ")
    if not is_refusal and not isinstance(error, MisconfigurationException):
        raise error
    print(f"error: {error} ({file.name}:{line})", file=sys.stderr)
    raise SystemExit(2) from None


# Parts of messages that are advertisement, or of no concern on this machine.
_NOISE = (
    "Tip: For seamless cloud",
    "GPU available: False",
    "TPU available: False",
    "Seed set to",
)


def _quieten() -> None:
    """Silences what the user of a recipe can do nothing about."""
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
        logging.getLogger(name).addFilter(_is_worth_reading)
    # Lightning 2.6 asks PyTorch's pytrees in a way that newer PyTorch versions deprecate.
    warnings.filterwarnings("ignore", message=".*isinstance.treespec, LeafSpec.")
    # Whoever holds nothing out knows that there is no validation.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _NOISE)
