"""Tasks that need a long memory: their examples, and how well models do them."""

from .associative_recall import AssociativeRecall
from .evaluation import Cell, evaluate, make_cell
from .listops import ListOps
from .models import TRAINING_FILE, Source, find_sources, load_source
from .passkey import Passkey
from .pathfinder import Pathfinder
from .reading import answer_logits, check_model, flops_per_example, options_for
from .registry import TASKS, make_task
from .score import (
    Score,
    batch_accuracy,
    binomial_interval,
    draw_examples,
    majority,
    score_batch,
    score_model,
)
from .selective_copying import SelectiveCopying
from .table import accuracy_table, draw_accuracy
from .task import IGNORE_INDEX, Example, Split, Task

__all__ = [
    "IGNORE_INDEX",
    "TASKS",
    "TRAINING_FILE",
    "AssociativeRecall",
    "Cell",
    "Example",
    "ListOps",
    "Passkey",
    "Pathfinder",
    "Score",
    "SelectiveCopying",
    "Source",
    "Split",
    "Task",
    "accuracy_table",
    "answer_logits",
    "batch_accuracy",
    "binomial_interval",
    "check_model",
    "draw_accuracy",
    "draw_examples",
    "evaluate",
    "find_sources",
    "flops_per_example",
    "load_source",
    "majority",
    "make_cell",
    "make_task",
    "options_for",
    "score_batch",
    "score_model",
]
