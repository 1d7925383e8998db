"""The commands of docs/scaling.md give its figures, and its programme runs."""

import json
import re
import shlex

import pytest

from longnet_zoo.cli import main
from longnet_zoo.planner.command import _rounded
from tests.forked import fork_ranks
from tests.markdown import run_programme
from tests.parallel.torchrun import ROOT

PAGE = (ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^longnet-zoo (plan .*)$", PAGE, flags=re.MULTILINE)


def row_of(plan):
    """The line of the page's table for a plan."""
    dilated, config = plan["methods"][0], plan["config"]
    sizes = dilated["memory"]
    memory = (sum(sizes.values()) - sizes["offloaded"]) / 2**30
    time = dilated["time"]["compute_s"] + dilated["time"]["exposed_s"]
    cells = [
        f"{config['seq_len']:,}",
        f"{config['gpus']}{', offload' if config['memory_saving']['offload'] else ''}",
        f"{memory:.1f} GiB{'' if dilated['fits'] else ', too much'}",
        f"{dilated['forward_bytes'] / 2**20:.1f} MiB",
        f"{dilated['flops']:.2g}",
        f"{time:.2g} s",
        f"{_rounded(dilated['longest_seq_len']):,}",
    ]
    return f"| {' | '.join(cells)} |"


@pytest.mark.parametrize("command", COMMANDS)
def test_figures_are_those_of_the_commands(command, capsys):
    main([*shlex.split(command), "--json"])
    assert row_of(json.loads(capsys.readouterr().out)) in PAGE


def test_there_are_as_many_rows_as_commands():
    assert len(COMMANDS) == len(re.findall(r"^\| [\d,]+ \|", PAGE, flags=re.MULTILINE)) == 6


def test_linked_files_exist():
    named = re.findall(r"\]\(([^)#:]+)\)", PAGE)
    named = [f"docs/{name}" for name in named] + re.findall(r"`(configs/[^`]+)`", PAGE)
    assert len(named) >= 5
    assert not [name for name in named if not (ROOT / name).exists()]


@pytest.mark.distributed
def test_programme_runs_on_two_ranks(tmp_path):
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, flags=re.DOTALL)
    ended = fork_ranks(tmp_path, run_programme, block, world_size=2)
    assert [process.status for process in ended] == [0, 0], ended
    said = "".join(process.said for process in ended)
    losses = [float(x) for x in re.findall(r"^\d+\.\d+$", said, flags=re.MULTILINE)]
    assert len(losses) == 3
    assert losses[2] < losses[0]
