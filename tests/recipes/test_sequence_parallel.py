"""Runs whose sequences and weights are split over processes come out as those of one process."""

import json
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch
import yaml
from lightning.pytorch.plugins import HalfPrecision
from lightning.pytorch.trainer.states import TrainerFn

import longnet_zoo as lz
from recipes import sharded_checkpoints, slide_classification, text_lm, text_mlm, token_file
from recipes.context_warmup import ContextWarmup
from recipes.sequence_parallel import SequenceParallelStrategy
from recipes.token_file_writer import write_token_files
from tests.recipes.sequence_parallel_runs import run_all, strategy, text_run
from tests.recipes.slide_runs import tiny_encoder, write_labels, write_slides
from tests.recipes.text_runs import curve

METRICS = ("train_loss", "train_bits_per_byte", "grad_norm", "val_loss", "val_bits_per_byte")
OTHER_WEIGHTS = "--trainer.callbacks+=tests.recipes.sequence_parallel_runs.OtherWeights"
SHORT = {"trainer__max_steps": 4, "trainer__val_check_interval": 4}

# Runs of one process and of two, `section__name=value`.
VARIANTS = {
    # No multiple of two.
    "odd": {"data__seq_len": 61},
    "all_to_all": {"data__seq_len": 61},
    "confined": {"data__confine_to_document": "true"},
    "confined_odd": {
        "data__confine_to_document": "true",
        "data__seq_len": 61,
        "data__batch_size": 1,
    },
    "warmup": {"data__seq_len": 256, "model__context_warmup": '{"start": 16, "steps": 8}'},
    "saving": {"model__memory_saving": '{"chunk_size": 16}'},
    "accumulated": {"trainer__accumulate_grad_batches": 2, "trainer__max_steps": 2},
    "masked": {"data__objective": "masked", "data__seq_len": 61},
    "zigzag": {
        "model__model_options__segment_lengths": "[1000]",
        "model__model_options__dilation_rates": "[1]",
    },
}
STRATEGIES = {
    "all_to_all": {"method": "all_to_all"},
    "zigzag": {"method": "ring", "layout": "zigzag"},
}


def assert_close(folder, got, expected, *, steps, atol=1e-4):
    """Compares the curves of two runs at so many last steps."""
    for metric in METRICS:
        want = {step: x for step, x in curve(folder / expected, metric).items() if step in steps}
        if want:
            assert curve(folder / got, metric) == pytest.approx(want, abs=atol), metric


def fit_alone(recipe, run):
    """Runs in this process."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        # Hides pytest's own arguments; a run elsewhere leaves the best checkpoints behind.
        patch.setattr(sys, "argv", sys.argv[:1])
        warnings.filterwarnings("ignore", message="The dirpath has changed")
        recipe.main(run[2])


def token_run(corpus, folder, name, *more, **changes):
    """Returns a run on token files instead of text."""
    name, _, args = text_run(corpus, folder, name, *more, **changes)
    files = [f"--data.{split}={folder / 'tokens' / split}.npy" for split in ("train", "val")]
    args = [arg for arg in args if not arg.startswith("--data.source")]
    return name, "recipes.token_file", [*args, *files]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("runs")


@pytest.fixture(scope="module")
def alone(corpus, folder):
    """Runs of one process: of 20 steps, of its first 10, and one whose gradients are not cut."""
    options = {"trainer__devices": 1, "data__batch_size": 2}
    fit_alone(text_lm, text_run(corpus, folder, "alone", **options))
    fit_alone(text_lm, text_run(corpus, folder, "start", trainer__max_steps=10, **options))
    unclipped = {"trainer__gradient_clip_val": "null", **options}
    fit_alone(text_lm, text_run(corpus, folder, "unclipped", **unclipped))
    for precision in ("bf16-mixed", "bf16-true"):
        options |= {"trainer__precision": precision, **SHORT}
        fit_alone(text_lm, text_run(corpus, folder, f"alone_{precision}", **options))


@pytest.fixture(scope="module")
def four(corpus, folder, alone):
    """Runs of four processes, two data x two sequence or one x four."""

    def run(name, sequence_size, *more, options=None, **changes):
        grid = {"trainer__devices": 4, "data__batch_size": 1 if sequence_size == 2 else 2}
        more = [*strategy(sequence_size, **(options or {})), *more]
        return text_run(corpus, folder, name, *more, **grid, **changes)

    def last(name):
        return f"--ckpt_path={folder / name}/checkpoints/last.ckpt"

    half, more = {"trainer__max_steps": 10}, {"trainer__max_steps": 15}
    runs = [
        run("two_by_two", 2),
        run("half", 2, **half),
        run("one_by_four", 4, last("half"), **more),
        run("to_file", 4, last("half"), options={"save_distributed_checkpoint": "false"}, **more),
        run("from_file", 2, last("start")),
        run("wrong_heads", 4, options={"method": "all_to_all"}),
        run("wrong_grid", 3),
    ]
    return run_all(folder, runs, world_size=4)


@pytest.fixture(scope="module")
def two(corpus, folder, alone):
    """Runs of two processes that share every sequence."""
    write_token_files(folder=str(folder / "tokens"), source=str(corpus))
    options = {"trainer__devices": 2, "data__batch_size": 2}
    ckpt_path = f"--ckpt_path={folder / 'start/checkpoints/last.ckpt'}"
    prompt = '--model.sampling={"prompts": ["def "], "max_new_tokens": 3}'
    runs = [
        # Whatever weights the others make, all start with the first one's.
        text_run(corpus, folder, "one_by_two", *strategy(2), OTHER_WEIGHTS, **options),
        text_run(corpus, folder, "say", *strategy(2), ckpt_path, prompt, verb="predict", **options),
        token_run(corpus, folder, "tokens_two", *strategy(2), **options | SHORT),
        *(
            text_run(corpus, folder, x, *strategy(2), trainer__precision=x, **options | SHORT)
            for x in ("bf16-mixed", "bf16-true")
        ),
        ("slides", "recipes.slide_classification", slide_arguments(folder, 2)),
    ]
    for name, changes in VARIANTS.items():
        recipe, module = ("text_mlm", text_mlm) if name == "masked" else ("text_lm", text_lm)
        changes = SHORT | changes
        fit_alone(module, text_run(corpus, folder, f"alone_{name}", trainer__devices=1, **changes))
        more = strategy(2, **STRATEGIES.get(name, {}))
        changes |= {"recipe": f"recipes.{recipe}", "trainer__devices": 2}
        runs.append(text_run(corpus, folder, name, *more, **changes))
    return run_all(folder, runs, world_size=2)


def slide_arguments(folder, world_size):
    """Returns the arguments of a run on slides, whose task does not shard its batches."""
    slides = folder / "slide files"
    options = {
        "trainer.accelerator": "cpu",
        "trainer.devices": world_size,
        "trainer.max_steps": 4,
        "trainer.val_check_interval": 2,
        "trainer.log_every_n_steps": 1,
        "trainer.enable_progress_bar": "false",
        "trainer.default_root_dir": folder / f"slides_{world_size}",
        "data.source": slides if slides.exists() else write_slides(slides),
        "data.labels": write_labels(folder / "labels.csv"),
        "data.batch_size": 2,
        **{f"model.model_options.{name}": value for name, value in tiny_encoder().items()},
    }
    more = strategy(world_size) if world_size > 1 else []
    return ["fit", *(f"--{name}={value}" for name, value in options.items()), *more]


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_two_data_by_two_sequence_train_like_one_process(four, folder):
    assert four["two_by_two"] == []
    assert_close(folder, "two_by_two", "alone", steps=range(20))


@pytest.mark.distributed
@pytest.mark.timeout(200)
def test_two_processes_of_a_sequence_train_like_one(two, folder):
    assert two["one_by_two"] == []
    assert_close(folder, "one_by_two", "alone", steps=range(20))


@pytest.mark.distributed
def test_gradients_are_cut_by_their_norm_over_all_processes(two, folder):
    cut, uncut = (curve(folder / name, "train_loss") for name in ("one_by_two", "unclipped"))
    assert max(curve(folder / "unclipped", "grad_norm").values()) > 2
    assert abs(cut[19] - uncut[19]) > 1e-3


@pytest.mark.distributed
def test_a_run_resumes_on_another_layout_and_then_alone(four, corpus, folder):
    assert four["half"] == four["one_by_four"] == []
    assert_close(folder, "one_by_four", "alone", steps=range(10, 15))
    for name, source in (("end_of_folder", "one_by_four"), ("end_of_file", "to_file")):
        saved = folder / source / "checkpoints/last.ckpt"
        assert saved.is_dir() == (name == "end_of_folder")
        options = {"trainer__devices": 1, "data__batch_size": 2}
        fit_alone(text_lm, text_run(corpus, folder, name, f"--ckpt_path={saved}", **options))
        assert_close(folder, name, "alone", steps=range(15, 20))


@pytest.mark.distributed
def test_a_run_of_one_process_goes_on_with_four(four, folder):
    assert four["from_file"] == []
    assert_close(folder, "from_file", "alone", steps=range(10, 20))


@pytest.mark.distributed
def test_a_folder_becomes_a_file_for_any_model(four, folder, tmp_path):
    saved, file = folder / "one_by_four/checkpoints/last.ckpt", tmp_path / "weights.ckpt"
    sharded_checkpoints.main([str(saved), str(file)])
    model = lz.create_model("longnet_lm_tiny", pretrained=file)
    expected = torch.load(folder / "to_file/checkpoints/last.ckpt", weights_only=True)["state_dict"]
    assert model.config.embed_dim == 16
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, expected[f"model.{name}"])


@pytest.mark.distributed
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_half_precision_comes_out_as_on_one_process(two, folder, precision):
    assert two[precision] == []
    assert_close(folder, precision, f"alone_{precision}", steps=range(4), atol=2e-2)


@pytest.mark.distributed
@pytest.mark.parametrize("name", VARIANTS)
def test_variants_train_like_one_process(two, folder, name):
    assert two[name] == []
    assert_close(folder, name, f"alone_{name}", steps=range(4))


@pytest.mark.distributed
def test_parts_of_a_token_file_train_like_the_whole(two, corpus, folder):
    assert two["tokens_two"] == []
    run = token_run(corpus, folder, "tokens_one", trainer__devices=1, data__batch_size=2, **SHORT)
    fit_alone(token_file, run)
    assert_close(folder, "tokens_two", "tokens_one", steps=range(4))


@pytest.mark.distributed
def test_prompts_are_completed_with_whole_inputs(two):
    assert two["say"] == []


@pytest.mark.distributed
def test_other_recipes_share_whole_inputs(two, folder):
    assert two["slides"] == []
    fit_alone(slide_classification, ("", "", slide_arguments(folder, 1)))
    alone, shared = (
        json.loads((folder / f"slides_{size}/metrics.json").read_text()) for size in (1, 2)
    )
    figures = [run["comparison"]["val"]["this run"] for run in (shared, alone)]
    assert figures[0] == pytest.approx(figures[1], abs=1e-4)


@pytest.mark.distributed
def test_sizes_that_cannot_work_are_refused_on_every_process(four):
    for name, message in {
        "wrong_heads": "num_heads",
        "wrong_grid": "got auto x 3 and 4 processes. Nearest that work: 4 x 1, 2 x 2, 1 x 4",
    }.items():
        assert len(four[name]) == 4
        for said in four[name]:
            assert message in said


def grid(strategy, *, nodes, devices):
    strategy.num_nodes, strategy.parallel_devices = nodes, [torch.device("cpu")] * devices
    return strategy._grid_shape(nodes * devices)


def test_auto_takes_as_many_groups_as_there_are():
    assert grid(SequenceParallelStrategy(sequence_parallel_size=4), nodes=3, devices=8) == (6, 4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"sequence_parallel_size": 5},
            r"got auto x 5 and 8 processes\. .*work: 4 x 2, 2 x 4, 1 x 8",
        ),
        (
            {"sequence_parallel_size": 2, "data_parallel_size": 3},
            r"got 3 x 2 and 8 processes\. Nearest that work: 8 x 1, 4 x 2, 2 x 4",
        ),
    ],
)
def test_a_grid_that_is_not_full_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        grid(SequenceParallelStrategy(**options), nodes=1, devices=8)


@pytest.mark.parametrize("name", ["sequence_parallel_size", "data_parallel_size"])
def test_sizes_are_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be 1 or more, got 0"):
        grid(SequenceParallelStrategy(**{"sequence_parallel_size": 1, name: 0}), nodes=1, devices=1)


@pytest.mark.parametrize("precision", [None, 32, "bf16", "32-true", "bf16-mixed", "bf16-true"])
def test_precisions_that_train_are_taken(precision):
    SequenceParallelStrategy(sequence_parallel_size=1).check_precision(precision)


def test_half_precision_from_python_is_refused():
    strategy = SequenceParallelStrategy(sequence_parallel_size=1)
    strategy.precision_plugin = HalfPrecision("16-true")
    with pytest.raises(ValueError, match=r"got trainer\.precision='16-true'.* to bf16-mixed"):
        strategy.setup_environment()


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("strategy.sequence_parallel_size=0", "sequence_parallel_size must be 1 or more, got 0"),
        ("precision=16-mixed", "got trainer.precision='16-mixed'. Set trainer.precision to bf16"),
        ("precision=64-true", "got trainer.precision='64-true'"),
    ],
)
def test_what_cannot_train_is_one_line(corpus, tmp_path, capsys, monkeypatch, option, message):
    monkeypatch.setattr(sys, "argv", sys.argv[:1])
    options = {"trainer__devices": 1}
    _, _, args = text_run(corpus, tmp_path, "run", *strategy(1), f"--trainer.{option}", **options)
    with pytest.raises(SystemExit) as stop:
        text_lm.main(args)
    said = capsys.readouterr().err
    assert (stop.value.code, said.count("\n")) == (2, 1)
    assert message in said


def test_restarts_need_a_store_of_their_own(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_MAX_RESTARTS", "3")
    monkeypatch.setenv("TORCHELASTIC_USE_AGENT_STORE", "True")
    strategy = SequenceParallelStrategy(sequence_parallel_size=1)
    with pytest.raises(ValueError, match=r"got torchrun --max-restarts=3.*STORE=1"):
        strategy.setup_environment()


def test_the_command_line_makes_a_strategy_with_a_timeout(corpus, tmp_path, capsys):
    more = strategy(2, timeout="0:05:00", method="ring", layout="striped")
    _, _, args = text_run(corpus, tmp_path, "run", *more, "--print_config")
    with pytest.raises(SystemExit):
        text_lm.main(args)
    options = yaml.safe_load(capsys.readouterr().out)["trainer"]["strategy"]["init_args"]
    assert (options["timeout"], options["layout"]) == ("0:05:00", "striped")


def test_a_task_is_split_once():
    strategy = SequenceParallelStrategy(sequence_parallel_size=1)
    strategy._inputs, strategy._lightning_module = "sharded", text_lm.TextLM()
    trainer = SimpleNamespace(state=SimpleNamespace(fn=TrainerFn.PREDICTING))
    with pytest.raises(ValueError, match=r"split for inputs='sharded' that is to take .*'unsplit'"):
        strategy.setup(trainer)


def test_the_context_warmup_does_not_cut_parts():
    task = text_lm.TextLM(context_warmup=ContextWarmup(start=1, steps=1))
    task._trainer = SimpleNamespace(training=True)
    with pytest.raises(ValueError, match="got it with data of which a process reads its part"):
        task.shard_batch({"is_part": True}, None, layout="contiguous")
