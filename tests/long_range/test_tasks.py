"""The rule of each task, checked against its definition or a second computation."""

import itertools
import statistics

import numpy as np
import pytest

from longnet_zoo.long_range import (
    IGNORE_INDEX,
    TASKS,
    AssociativeRecall,
    ListOps,
    Passkey,
    Pathfinder,
    SelectiveCopying,
    make_task,
)
from longnet_zoo.long_range.listops import _Draws, _grow
from longnet_zoo.long_range.pathfinder import _dots, _lay_curves, _stroke

SMALL = {
    "mqar": {"seq_len": 32, "vocab_size": 20, "num_pairs": 3},
    "listops": {"seq_len": 60},
    "passkey": {"seq_len": 331},
    "pathfinder": {"seq_len": 1024},
    "selective_copying": {"seq_len": 41, "num_data_tokens": 5},
}


def small(name):
    return make_task(name, **SMALL[name])


def evaluate(words):
    """Evaluates an expression word by word with a stack, and returns its value."""
    stack = []
    for word in words:
        if word != "]":
            stack.append(int(word) if word.isdigit() else word)
            continue
        values = list(itertools.takewhile(lambda x: isinstance(x, int), reversed(stack)))
        del stack[-len(values) :]
        rules = {
            "[MIN": min,
            "[MAX": max,
            "[MED": lambda x: int(statistics.median(x)),
            "[SM": lambda x: sum(x) % 10,
        }
        stack.append(rules[stack.pop()](values))
    (value,) = stack
    return value


def test_there_is_a_small_case_for_every_task():
    assert SMALL.keys() == TASKS.keys()


@pytest.mark.parametrize("name", TASKS)
def test_examples_have_the_length_and_ids_that_the_task_states(name):
    task = small(name)
    for index in range(6):
        tokens, labels = task.example(index, split="train")
        assert tokens.shape == labels.shape == (task.seq_len,)
        asked = labels[labels != IGNORE_INDEX]
        assert 1 <= len(asked) <= task.num_labels
        for ids in (tokens, asked):
            assert ids.min() >= 0
            assert ids.max() < task.vocab_size


@pytest.mark.parametrize("name", TASKS)
def test_an_example_depends_on_seed_split_and_index_alone(name):
    task = small(name)
    first = task.batch([3, 4], split="train", seed=1)
    again = task.batch([4], split="train", seed=1)
    assert first["tokens"].dtype == first["labels"].dtype
    for key in ("tokens", "labels"):
        assert (first[key][1] == again[key][0]).all()
    others = [
        task.example(4, split="train", seed=2),
        task.example(5, split="train", seed=1),
        task.example(4, split="val", seed=1),
    ]
    for other in others:
        assert (other.tokens != again["tokens"][0].numpy()).any()


def test_no_seed_brings_an_example_into_two_splits():
    # So few sequences are possible that every split would meet those of the others.
    task = SelectiveCopying(seq_len=6, num_data_tokens=2, vocab_size=5)
    seen = {
        split: {
            task.example(index, split=split, seed=seed).tokens.tobytes()
            for seed in (0, 1)
            for index in range(60)
        }
        for split in ("train", "val", "test")
    }
    assert min(map(len, seen.values())) > 3
    assert not seen["train"] & seen["val"]
    assert not seen["train"] & seen["test"]
    assert not seen["val"] & seen["test"]


@pytest.mark.parametrize(
    ("task", "split"),
    [
        # Sequences of two and of eight kinds.
        (SelectiveCopying(seq_len=2, num_data_tokens=1, vocab_size=4), "test"),
        (AssociativeRecall(seq_len=4, vocab_size=4, num_pairs=1), "val"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_a_split_without_examples_is_refused(task, split, monkeypatch):
    monkeypatch.setattr("longnet_zoo.long_range.task._MAX_DRAWS", 300)
    words = rf"got none for '{split}' in 300 draws of \w+\(seq_len={task.seq_len}, .*Raise seq_len"
    with pytest.raises(ValueError, match=words):
        task.example(0, split=split)


def test_mqar_asks_every_key_for_the_value_beside_it():
    task = AssociativeRecall(seq_len=64, vocab_size=100, num_pairs=9)
    for index in range(20):
        tokens, labels = task.example(index, split="train")
        keys, values = tokens[0:18:2], tokens[1:18:2]
        assert len(set(keys)) == len(set(values)) == 9
        assert keys.min() >= 1
        assert keys.max() < 50 <= values.min()
        places = np.flatnonzero(labels != IGNORE_INDEX)
        assert (places >= 18).all()
        assert (places % 2 == 0).all()
        assert sorted(tokens[places]) == sorted(keys)
        pairs = dict(zip(keys, values, strict=True))
        assert [pairs[key] for key in tokens[places]] == labels[places].tolist()


def test_mqar_queries_lie_at_gaps_of_the_power_law():
    # A single query: its slot s of 30 has probability s^(a-1) / sum.
    task = AssociativeRecall(seq_len=62, vocab_size=100, num_pairs=1, power=0.3)
    rng = np.random.default_rng(0)
    places = [int(np.flatnonzero(task.draw(rng).labels >= 0)[0]) for _ in range(4000)]
    slots = (np.array(places) - 2) // 2
    weights = np.arange(1, 31) ** -0.7
    expected = weights / weights.sum()
    shares = np.bincount(slots, minlength=30) / 4000
    assert np.abs(shares - expected).max() < 4 * np.sqrt(0.25 / 4000)
    assert expected[0] > 0.15 > 4 * shares[10:].mean()


def test_mqar_can_be_drawn_at_the_largest_power():
    task = AssociativeRecall(seq_len=65536, vocab_size=9000, power=10)
    places = np.flatnonzero(task.example(0, split="train").labels != IGNORE_INDEX)
    assert len(places) == task.num_labels


def test_mqar_has_a_pair_for_sixteen_tokens_unless_told_otherwise():
    task = AssociativeRecall(seq_len=256)
    assert (task.num_labels, task.chance) == (16, 1 / 16)


def test_selective_copying_asks_for_the_data_in_order():
    task = SelectiveCopying(seq_len=50, num_data_tokens=6, vocab_size=8)
    for index in range(20):
        tokens, labels = task.example(index, split="train")
        body = tokens[:44]
        assert (tokens[44:] == 7).all()
        assert body[body != 0].tolist() == labels[44:].tolist()
        assert set(labels[44:]) <= set(range(1, 7))
        assert (labels[:44] == IGNORE_INDEX).all()
    assert task.chance == 1 / 6


@pytest.mark.parametrize("seq_len", [320, 1024, 5000])
def test_passkey_text_is_the_published_prompt(seq_len):
    task = Passkey(seq_len=seq_len)
    for index in range(10):
        tokens, labels = task.example(index, split="test")
        text = bytes(tokens.astype(np.uint8)).decode()
        key = bytes(labels[labels != IGNORE_INDEX].astype(np.uint8)).decode()
        assert 1 <= int(key) <= 50_000
        task_line, before, hint, behind, question = text.split("\n")
        assert task_line.startswith("There is an important info hidden inside a lot of irrelevant")
        assert hint == f"The pass key is {key}. Remember it. {key} is the pass key."
        # Each digit is asked where the text before it ends.
        assert question == "What is the pass key? The pass key is " + key[:-1]
        garbage = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and"
        endless = " ".join([garbage + " back again."] * 60)
        assert (before, behind) == (endless[: len(before)], endless[: len(behind)])
        assert (labels[: -len(key)] == IGNORE_INDEX).all()


@pytest.mark.parametrize("depth", [0.0, 0.25, 1.0])
def test_passkey_lies_at_the_depth_asked_for(depth):
    tokens, _ = Passkey(seq_len=4000, depth=depth).example(0, split="train")
    text = bytes(tokens.astype(np.uint8)).decode()
    _, before, _, behind, _ = text.split("\n")
    assert len(before) / len(before + behind) == pytest.approx(depth, abs=0.0005)


@pytest.mark.parametrize("seq_len", [64, 2000, 6000])
def test_listops_label_is_the_value_of_the_expression(seq_len):
    task = ListOps(seq_len=seq_len)
    for index in range(5):
        tokens, labels = task.example(index, split="train")
        (place,) = np.flatnonzero(labels != IGNORE_INDEX)
        words = task.text(tokens).split()
        assert words[-1] == "="
        assert len(words) == place + 1
        assert evaluate(words[:-1]) == labels[place]
        assert seq_len // 4 < place < seq_len
        assert (tokens[place + 1 :] == task.pad_id).all()


def test_listops_trees_follow_the_published_rule():
    task, rng = ListOps(), np.random.default_rng(0)
    assert task.depth == 10
    words = [word for _ in range(30) for word in task.text(task.draw(rng).tokens).split()[:-1]]
    depths = list(itertools.accumulate({"[": 1, "]": -1}.get(word[0], 0) for word in words))
    # An operator of the last depth but one has digits only.
    assert max(depths) == 9
    operators = [word for word in words if word[0] == "["]
    nodes = len(words) - words.count("]")
    # Each operator has 6 arguments on average; the trees that are kept say a little more.
    assert nodes / len(operators) == pytest.approx(6, abs=0.5)
    counts = np.array([operators.count(name) for name in ("[MIN", "[MAX", "[MED", "[SM")])
    assert counts / len(operators) == pytest.approx(0.25, abs=0.03)


def test_listops_nodes_are_digits_three_times_in_four():
    draws, trees = _Draws(np.random.default_rng(0)), [[] for _ in range(3000)]
    for tree in trees:
        _grow(draws, tree, limit=10**6, levels=3)
    assert sum(len(tree) == 1 for tree in trees) / 3000 == pytest.approx(0.75, abs=0.03)


def test_listops_grows_deeper_for_longer_sequences():
    assert [ListOps(seq_len=n).depth for n in (512, 2000, 3000, 128_000)] == [10, 10, 11, 21]


@pytest.mark.parametrize("side", [32, 128])
def test_pathfinder_dots_are_ends_of_one_curve_or_of_two(side):
    task, rng = Pathfinder(seq_len=side**2), np.random.default_rng(0)
    curves = next(_try_to_lay(task, rng))
    sizes = task.sizes
    assert [len(x) for x in curves[:2]] == [sizes.num_dashes] * 2
    assert [len(x) for x in curves[2:]] == [sizes.distractor_dashes] * sizes.num_distractors
    ends = [{tuple(curve[0, 0]), tuple(curve[-1, 1])} for curve in curves[:2]]
    for _ in range(8):
        yes = set(map(tuple, _dots(rng, curves, is_yes=True)))
        assert yes in ends
        no = set(map(tuple, _dots(rng, curves, is_yes=False)))
        assert [len(no & both) for both in ends] == [1, 1]


def _try_to_lay(task, rng):
    from longnet_zoo.long_range.pathfinder import _NoRoomError

    while True:
        try:
            yield _lay_curves(rng, task.sizes, task.side)
        except _NoRoomError:
            continue


def test_pathfinder_dashes_have_their_length_and_keep_clear():
    task = Pathfinder(seq_len=1024)
    curves = next(_try_to_lay(task, np.random.default_rng(1)))
    sizes = task.sizes
    for curve in curves:
        assert np.linalg.norm(curve[:, 1] - curve[:, 0], axis=1) == pytest.approx(2.0)
        assert np.linalg.norm(curve[1:, 0] - curve[:-1, 1], axis=1) == pytest.approx(1.0)
        assert curve.min() > 0
        assert curve.max() < 32
    for one, other in itertools.combinations(curves, 2):
        gaps = np.linalg.norm(one.reshape(-1, 1, 2) - other.reshape(1, -1, 2), axis=-1)
        assert gaps.min() > sizes.clearance


def test_pathfinder_curves_start_apart():
    task, rng = Pathfinder(seq_len=1024), np.random.default_rng(0)
    for curves in itertools.islice(_try_to_lay(task, rng), 15):
        assert np.linalg.norm(curves[0][0, 0] - curves[1][0, 0]) >= 7


def test_pathfinder_draws_what_lies_within_the_radius():
    image = np.zeros((9, 9))
    _stroke(image, np.array([2.5, 4.5]), np.array([6.5, 4.5]), radius=0.5, brightness=0.8)
    # One row of pixels with their centres on the line; half a pixel further nothing is left.
    assert image[4, 2:7] == pytest.approx(0.8)
    assert image[4, 1] == image[3, 4] == 0
    assert image.sum() == pytest.approx(5 * 0.8)


def test_pathfinder_answers_are_even_and_images_are_the_pixels():
    task = Pathfinder()
    batch = task.batch(range(24), split="train")
    classes = task.classes(batch["labels"][:, -1])
    assert set(classes.tolist()) == {0, 1}
    assert 5 <= int(classes.sum()) <= 19
    images = task.images(batch["tokens"])
    assert images.shape == (24, 1, 32, 32)
    assert images.min() == -1
    assert images.max() == 1
    assert images[3, 0, 2, 5] == pytest.approx(batch["tokens"][3, 2 * 32 + 5].item() / 127.5 - 1)


@pytest.mark.parametrize(
    ("make", "error", "words"),
    [
        (lambda: make_task("copying"), ValueError, "task must be one of mqar.*got 'copying'"),
        (lambda: make_task("mqar", pairs=2), TypeError, "no options pairs, it has .*num_pairs"),
        (lambda: AssociativeRecall(seq_len=64.0), TypeError, "seq_len must be an integer, got 64"),
        (lambda: AssociativeRecall(num_pairs=0), ValueError, "num_pairs must be 1 or more, got 0"),
        (
            lambda: AssociativeRecall(seq_len=30, num_pairs=8),
            ValueError,
            "seq_len must be 32 or more, got 30. Use fewer num_pairs",
        ),
        (
            lambda: AssociativeRecall(vocab_size=9, num_pairs=4),
            ValueError,
            "vocab_size must be 10 or more, got 9",
        ),
        (
            lambda: AssociativeRecall(seq_len=65),
            ValueError,
            "seq_len must be even for mqar, got 65",
        ),
        (
            lambda: AssociativeRecall(seq_len=8),
            ValueError,
            "seq_len must be 16 or more, got 8. A shorter one needs num_pairs",
        ),
        (lambda: AssociativeRecall(power=0), ValueError, "above 0 and at most 10, got 0"),
        (lambda: AssociativeRecall(power=1000), ValueError, "above 0 and at most 10, got 1000"),
        (lambda: AssociativeRecall(power="abc"), TypeError, "power must be a number, got 'abc'"),
        (lambda: AssociativeRecall(power=True), TypeError, "power must be a number, got True"),
        (lambda: ListOps(seq_len=15), ValueError, "seq_len must be 16 or more, got 15"),
        (lambda: Passkey(seq_len=319), ValueError, "seq_len must be 320 or more, got 319"),
        (lambda: Passkey(depth=1.5), ValueError, r"depth must be None or in \[0, 1\], got 1.5"),
        (lambda: Passkey(depth="abc"), TypeError, "depth must be a number, got 'abc'"),
        (lambda: Pathfinder(seq_len=1000), ValueError, r"one of \[1024, .*got 1000"),
        (lambda: Pathfinder(seq_len=1024.0), ValueError, r"one of \[1024, .*got 1024.0"),
        (lambda: SelectiveCopying(num_data_tokens=0), ValueError, "must be 1 or more, got 0"),
        (lambda: SelectiveCopying(vocab_size=3), ValueError, "vocab_size must be 4 or more, got 3"),
        (
            lambda: SelectiveCopying(seq_len=31),
            ValueError,
            "seq_len must be 32 or more, got 31. Use fewer num_data_tokens",
        ),
        (lambda: Passkey().example(0, split="dev"), ValueError, "split must be one of.*got 'dev'"),
        (
            lambda: Passkey().example(-1, split="val"),
            ValueError,
            "index and seed must be 0 or more, got index=-1 and seed=0",
        ),
    ],
)
def test_what_makes_no_task_is_refused(make, error, words):
    with pytest.raises(error, match=words):
        make()
