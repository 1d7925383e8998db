"""The command line that all recipes share: LightningCLI with its pitfalls removed.

- The command line and the configuration win over what a checkpoint remembers.
- `--ckpt_path last` finds the run's own checkpoint; `validate`, `test` and `predict` take it by
  default and never evaluate an untrained model in silence.
- A checkpoint brings its model's options, and needs no weights to start from. One that is damaged
  or of another model is one error, before any data is read.
- Everything lies in `trainer.default_root_dir`, and a recipe may run in it again (`run_folder`);
  nothing there is touched before the data has been read.
- What our own code or Lightning refuses is reported without a traceback; a bug keeps its traceback.
"""

import contextlib
import functools
import io
import linecache
import logging
import operator
import re
import signal
import sys
import traceback
import warnings
from pathlib import Path
from typing import Any, NoReturn, get_args

import lightning as L
import yaml
from lightning.pytorch.callbacks import Checkpoint, ProgressBar, Timer
from lightning.pytorch.cli import LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import ModelParallelStrategy
from lightning.pytorch.utilities import rank_zero_only
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

import longnet_zoo
from recipes.callbacks import LastCheckpoint
from recipes.checkpoints import (
    check_settings,
    check_state_dict,
    last_checkpoint,
    read_checkpoint,
)
from recipes.progress import LineProgress, StepBar
from recipes.run_folder import CurveLogger, check_resumed_folder, make_room
from recipes.sequence_parallel import SequenceParallelStrategy
from recipes.sharded_checkpoints import FolderCheckpointIO, is_sharded

__all__ = ["RecipeCLI", "report_error", "run"]

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
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        # A name or caption that a terminal has no letters for is no reason to stop.
        sys.stdout.reconfigure(errors="backslashreplace")
    with warnings.catch_warnings():
        _quieten()
        try:
            RecipeCLI(task, data, args=args)
        except SIGTERMException:
            # Lightning's exit status is 0, and a run that was stopped would count as finished.
            raise SystemExit(128 + signal.SIGTERM) from None
        except Exception as error:
            # Where torchrun started this process, its summary names the one that failed first.
            get_error_handler().record_exception(error)
            report_error(error)


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
        self._args = sys.argv[1:] if args is None else args
        self._checkpoint: dict[str, Any] | None = None
        self._pretrained: Any = False
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
            parser_class=_Parser,
            save_config_callback=_OpenRunFolder,
            save_config_kwargs={"overwrite": True},
            auto_configure_optimizers=False,
            # A task stores plain values, the same from here and from Python.
            load_from_checkpoint_support=False,
        )

    def subcommands(self) -> dict[str, set[str]]:
        """Lists the command that is asked for, else all: each has a parser that is slow to make."""
        every = super().subcommands()
        return {name: every[name] for name in self._args[:1] if name in every} or every

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Makes a parser that takes no abbreviations: `--trainer.max_step` is a mistake."""
        _read_whole_numbers_first()
        return super().init_parser(**{"allow_abbrev": False, **kwargs})

    def _parse_ckpt_path(self) -> None:
        """Leaves the configuration alone.

        Lightning's own method overwrites it with what the checkpoint remembers, so that
        `--model.optimization.lr` and the configuration file would count for nothing.
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
        config["model"]["model_options"] = _parsed(config["model"]["model_options"])
        config["ckpt_path"] = self._find_checkpoint(config)
        path = config["ckpt_path"]
        # URLs are fetched by Lightning.
        if path is not None and "://" not in path:
            self._checkpoint = read_checkpoint(path)
            self._take_model(config["model"], self._checkpoint.get("hyper_parameters", {}))

    def after_instantiate_classes(self) -> None:
        """Compares the checkpoint with the model and its optimizer."""
        checkpoint, self._checkpoint = self._checkpoint, None
        if checkpoint is None:
            return
        if self._pretrained is not False:
            # For config.yaml, which makes the run from its beginning.
            self.config[self.subcommand]["model"]["pretrained"] = self._pretrained
        check_state_dict(self.model.state_dict(), checkpoint["state_dict"])
        saved = checkpoint.get("hyper_parameters", {}).get("optimization")
        if self.subcommand == "fit" and saved is not None:
            self.model.optimization.check_resumed(saved)

    def instantiate_trainer(self, **kwargs: Any) -> L.Trainer:
        """Adds what a training needs to be followed, unless the configuration says otherwise."""
        options = self._get(self.config_init, "trainer")
        if isinstance(options["strategy"], SequenceParallelStrategy):
            # Before Lightning, which recommends what does not train.
            options["strategy"].check_precision(options["precision"])
        callbacks = options["callbacks"] or []
        callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
        if options["logger"] in (None, True):
            run_dir = options["default_root_dir"]
            kwargs["logger"] = CurveLogger(run_dir) if self.subcommand == "fit" else False
        if options["enable_model_summary"] is None:
            # It lists a single module; a line of ours says more.
            kwargs["enable_model_summary"] = False
        has_bar = any(isinstance(callback, ProgressBar) for callback in callbacks)
        if self.subcommand == "fit" and options["enable_progress_bar"] is None and not has_bar:
            kwargs["enable_progress_bar"] = is_terminal = sys.stdout.isatty()
            # In front, so that it has ended when others print at the end.
            callbacks = [StepBar() if is_terminal else LineProgress(), *callbacks]
        saves = any(isinstance(callback, Checkpoint) for callback in callbacks)
        if self.subcommand == "fit" and options["enable_checkpointing"] is None and not saves:
            # Lightning's own has a name that `--ckpt_path last` does not find.
            callbacks = [*callbacks, LastCheckpoint()]
        kwargs["callbacks"] = callbacks
        path = self._get(self.config, "ckpt_path")
        if path and is_sharded(path) and not isinstance(options["strategy"], ModelParallelStrategy):
            plugins = options["plugins"] or []
            plugins = plugins if isinstance(plugins, list) else [plugins]
            kwargs["plugins"] = [*plugins, FolderCheckpointIO()]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Says what is going to be trained, and refuses to resume where the next run overwrites."""
        if rank_zero_only.rank != 0:
            return
        config = self.config[self.subcommand]
        run_dir = config["trainer"]["default_root_dir"]
        check_resumed_folder(run_dir, ckpt_path=config["ckpt_path"])
        name, size = self.model.hparams["model_name"], self.model.model.num_params()
        print(f"Training {name}, {size:,} parameters, in {run_dir}")

    def after_fit(self) -> None:
        """Says so where time ended the run, since a run that resumes has no time left either."""
        trainer, max_time = self.trainer, self._get(self.config, "trainer")["max_time"]
        timers = [callback for callback in trainer.callbacks if isinstance(callback, Timer)]
        is_late = max_time is not None and any((x.time_remaining() or 0) <= 0 for x in timers)
        if is_late and trainer.is_global_zero and trainer.global_step != trainer.max_steps:
            print(
                f"trainer.max_time={max_time} is used up, at step {trainer.global_step:,}. To go "
                "on, raise it and pass --ckpt_path last."
            )

    def predict(self, *, datamodule: L.LightningDataModule, **kwargs: Any) -> None:
        """Runs `Trainer.predict`.

        A task with prompts of its own takes only the tokenizer of the data, which is not read.

        Args:
            datamodule: Data module of the recipe.
            kwargs: Other arguments of `Trainer.predict`.
        """
        if hasattr(self.model, "attach_tokenizer"):
            self.model.attach_tokenizer(datamodule.tokenizer)
            self.trainer.predict(**kwargs)
        else:
            self.trainer.predict(datamodule=datamodule, **kwargs)

    def _take_model(self, model: Any, saved: dict[str, Any]) -> None:
        """Takes the model of a checkpoint for all that the configuration leaves open.

        Weights to start from are not read: they are in the checkpoint by now, and so are the
        options that came with them.
        """
        given = dict(model["model_options"] or {})
        if model.get("pretrained", False) is not False:
            self._pretrained, model["pretrained"] = model["pretrained"], False
            # It says how many classes those weights had.
            given.pop("num_classes", None)
        if model["model_name"] is None:
            model["model_name"] = saved.get("model_name")
        if model["model_name"] == saved.get("model_name"):
            model["model_options"] = _merged(saved.get("model_options") or {}, given)
        check_settings(model, saved)

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


def _parsed(options: Any) -> Any:
    """Reads the options of a part of a model, which jsonargparse leaves as text."""
    if isinstance(options, dict):
        return {name: _parsed(value) for name, value in options.items()}
    if not isinstance(options, str):
        return options
    with contextlib.suppress(ValueError):
        return float(options) if "e" in options else yaml.safe_load(options)  # YAML wants 1.0e-3
    return options


def _merged(options: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """Puts options over others, in the parts of a model too."""
    merged = {**options, **given}
    for name, value in given.items():
        if isinstance(value, dict) and isinstance(options.get(name), dict):
            merged[name] = _merged(options[name], value)
    return merged


class _Parser(LightningArgumentParser):
    """A parser whose errors are not hidden below a list of all options."""

    def format_usage(self) -> str:
        command = self.prog.replace(" [options]", "")
        return f"usage: {command} [--help] [--config FILE] [--OPTION VALUE ...]\n"


class _OpenRunFolder(SaveConfigCallback):
    """Makes room for a training, and writes config.yaml, when its data has been read."""

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        """Does nothing yet."""

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        run_dir = trainer.default_root_dir
        # Whoever resumes this run names the checkpoint that is the last by then.
        ckpt_path = self.config.pop("ckpt_path")
        if trainer.is_global_zero:
            moved = make_room(run_dir, ckpt_path=ckpt_path)
            if moved is not None:
                print(moved)
        super().setup(trainer, pl_module, "fit")
        if any(isinstance(logger, CurveLogger) for logger in trainer.loggers):
            # It opens its file at once, so it may not be there before. No version folders: the
            # run folder is the version.
            tensorboard = TensorBoardLogger(
                Path(run_dir, "tensorboard"), name="", version="", default_hp_metric=False
            )
            trainer.loggers = [*trainer.loggers, tensorboard]


def report_error(error: Exception) -> NoReturn:
    """Prints an error that our code or Lightning raised on purpose, raises any other.

    Args:
        error: The error.

    Raises:
        SystemExit: With status 2, if the error is printed.
    """
    text, file, line = _origin(error)
    is_ours = any(file.is_relative_to(folder) for folder in _OUR_FOLDERS)
    is_refusal = is_ours and linecache.getline(str(file), line).lstrip().startswith("raise ")
    if not is_refusal and not isinstance(error, MisconfigurationException):
        raise error
    print(f"error: {text} ({file.name}:{line})", file=sys.stderr)
    raise SystemExit(2) from None


def _origin(error: Exception) -> tuple[str, Path, int]:
    """Returns the message of an error, and the file and line that raised it."""
    text = str(error)
    # A loader's worker process hands its traceback over as text.
    found = _TRACE_LINE.split(text)[-3:] if _FROM_WORKER.match(text) else []
    if len(found) == 3:
        file, line, rest = found
        name = rf"^[\w.]*{re.escape(type(error).__name__)}: "
        text = re.split(name, rest, maxsplit=1, flags=re.MULTILINE)[-1].strip()
        return text, Path(file), int(line)
    frame, number = list(traceback.walk_tb(error.__traceback__))[-1]
    return text, Path(frame.f_code.co_filename), number


_FROM_WORKER = re.compile(r"Caught \w+ in DataLoader worker process")
_TRACE_LINE = re.compile(r'^  File "(.+)", line (\d+), in ', re.MULTILINE)


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
    # The checkpoints that are there move when the new run begins.
    warnings.filterwarnings("ignore", message="Checkpoint directory .* exists and is not empty")
    # Whoever holds nothing out knows that there is no validation.
    warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")


def _is_worth_reading(record: logging.LogRecord) -> bool:
    return not any(part in record.getMessage() for part in _NOISE)


def _read_whole_numbers_first() -> None:
    """Has `limit_test_batches: 1` mean one batch, not all, whatever was imported before Lightning.

    `typing` keeps one object for `Union[int, float]` and `Union[float, int]`, and its first member
    is what a number is read as. `int | float` keeps its own order.
    """
    hints = L.Trainer.__init__.__annotations__
    for name, hint in hints.items():
        if {int, float} <= set(get_args(hint)):
            kinds = sorted(get_args(hint), key=lambda kind: kind is not int)
            hints[name] = functools.reduce(operator.or_, kinds)
