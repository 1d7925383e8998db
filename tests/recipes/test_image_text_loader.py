import re
from itertools import islice

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from recipes.classification_metrics import UNLABELLED
from recipes.image_text_loader import NO_PAIR, collate_pairs, pair_source
from recipes.image_text_sources import TableColumns, load_table
from recipes.loader import fair_order
from recipes.sample_loader import EvalLoader, TrainLoader
from tests.recipes.image_text_runs import COLOURS, encoder, picture, write_table

NUMBER = 11


class Pictures:
    """Pictures that the generator changes, with captions that say what it drew."""

    names = tuple(f"picture {number}" for number in range(NUMBER))
    labels = tuple(number % 3 for number in range(NUMBER))

    def read(self, place, *, generator=None):
        draw = "" if generator is None else f" {generator.integers(10**6)}"
        return picture(list(COLOURS)[place % 3], place), f"{place}{draw}"


def random_encoder():
    transform = create_transform((3, 8, 8), is_training=True, scale=(0.3, 1.0), hflip=0.5)
    return encoder(transform=transform)


def train_loader(pairs=None, **options):
    defaults = {"batch_size": 3, "seed": 5}
    return TrainLoader(pair_source(pairs or Pictures(), random_encoder()), **(defaults | options))


def first(loader, number):
    """Returns batches across epochs."""
    found = []
    while len(found) < number:
        found += islice(iter(loader), number - len(found))
    return found


def same(a, b):
    return a["captions"] == b["captions"] and torch.equal(a["images"], b["images"])


def test_batch_holds_images_tokens_and_what_is_known_of_them():
    loader = train_loader(batch_size=NUMBER)
    (batch,) = loader
    assert batch["images"].shape == (NUMBER, 3, 8, 8)
    assert sorted(batch["names"]) == sorted(Pictures.names)
    for row, name in enumerate(batch["names"]):
        place = int(name.split()[1])
        caption = batch["captions"][row]
        assert caption.split()[0] == str(place)
        assert batch["labels"][row] == place % 3
        expected = [*caption.encode()[:11], 256]
        width = batch["tokens"].shape[1]
        assert batch["tokens"][row].tolist() == expected + [258] * (width - len(expected))
    assert batch["tokens"].shape[1] == max(len(c.encode()) for c in batch["captions"]) + 1
    assert int(batch["num_skipped"]) == int(batch["num_truncated"]) == 0


@pytest.mark.parametrize("position", [0, 1, 3, 5])
def test_it_goes_on_where_it_was_whatever_the_number_of_workers(position):
    whole = first(train_loader(), 8)
    loader = train_loader()
    first(loader, position)
    resumed = train_loader(num_workers=position % 2)
    resumed.load_state_dict(loader.state_dict())
    rest = first(resumed, 8 - position)
    assert all(same(a, b) for a, b in zip(whole[position:], rest, strict=True))


def test_what_is_drawn_depends_on_seed_and_epoch():
    loader = train_loader(batch_size=NUMBER)
    one, two = (dict(zip(b["names"], b["captions"], strict=True)) for b in first(loader, 2))
    assert one.keys() == two.keys()
    assert all(one[name] != two[name] for name in one)
    assert not same(first(loader, 1)[0], first(train_loader(seed=6, batch_size=NUMBER), 1)[0])
    plain = {
        name: image
        for b in first(loader, 2)
        for name, image in zip(b["names"], b["images"], strict=True)
    }
    (fixed,) = EvalLoader(pair_source(Pictures(), encoder()), batch_size=NUMBER)
    differs = [
        not torch.equal(plain[name], image)
        for name, image in zip(fixed["names"], fixed["images"], strict=True)
    ]
    assert any(differs)


def test_ranks_share_an_epoch_and_batches_can_be_repeated():
    both = [first(train_loader(rank=rank, world_size=2), 1)[0] for rank in (0, 1)]
    alone = first(train_loader(batch_size=6), 1)[0]
    assert both[0]["captions"] + both[1]["captions"] == alone["captions"]
    names = [tuple(batch["captions"]) for batch in first(train_loader(repeat=2), 6)]
    assert names[:2] * 3 == [names[0], names[1]] * 3
    assert len({tuple(batch["names"]) for batch in first(train_loader(repeat=1), 4)}) == 1
    with pytest.raises(ValueError, match="batch_size=6 on 2 processes takes 12 pairs, got 11"):
        train_loader(batch_size=6, world_size=2)


def test_evaluation_has_each_pair_once_as_it_always_looks():
    loader = EvalLoader(pair_source(Pictures(), encoder()), batch_size=4)
    runs = [list(loader) for _ in range(2)]
    assert all(same(a, b) for a, b in zip(*runs, strict=True))
    names = [name for batch in runs[0] for name in batch["names"]]
    assert sorted(names) == sorted(Pictures.names)
    assert names != list(Pictures.names)
    captions = [caption for batch in runs[0] for caption in batch["captions"]]
    assert names == [f"picture {caption}" for caption in captions]
    few = list(
        EvalLoader(pair_source(Pictures(), encoder()), batch_size=4, places=fair_order(NUMBER)[:5])
    )
    assert [name for batch in few for name in batch["names"]] == names[:5]


def test_ranks_get_as_many_batches_and_fillers_are_no_pairs():
    ranks = [
        list(EvalLoader(pair_source(Pictures(), encoder()), batch_size=2, rank=rank, world_size=3))
        for rank in range(3)
    ]
    assert [len(rank) for rank in ranks] == [2, 2, 2]
    batches = [batch for rank in ranks for batch in rank]
    names = [name for batch in batches for name in batch["names"]]
    assert sorted(names) == ["", *sorted(Pictures.names)]
    for batch in batches:
        for row, name in enumerate(batch["names"]):
            ids = batch["image_ids"][row].item(), batch["text_ids"][row].item()
            assert (ids == (NO_PAIR, NO_PAIR)) == (name == "")
            assert min(ids) >= 0 or name == ""
            assert name or batch["labels"][row] == UNLABELLED
        assert int(batch["num_skipped"]) == 0


def test_the_same_image_and_the_same_caption_have_the_same_id():
    make = encoder()
    red, blue = picture("red", 0), picture("blue", 0)
    samples = [
        make(image, caption, name="x")
        for image, caption in ((red, "one"), (red.copy(), "two"), (blue, "one"), (blue, "One"))
    ]
    batch = collate_pairs(samples, pad_id=258)
    images, texts = batch["image_ids"].tolist(), batch["text_ids"].tolist()
    assert images == [images[0]] * 2 + [images[2]] * 2
    assert images[0] != images[2]
    assert texts[0] == texts[2]
    assert len(set(texts)) == 3


def test_long_caption_is_cut_and_counted_or_refused_by_name():
    long = encoder()(picture("red", 0), "abcdefghijklmn", name="a.png")
    assert long["tokens"].tolist() == [*b"abcdefghijk", 256]
    fits = encoder()(picture("red", 0), "abcdefghijk", name="a.png")
    assert collate_pairs([long, fits, long], pad_id=258)["num_truncated"] == 2
    message = r"12 tokens with its end, got 14 bytes of text for a.png.*max_text_len"
    with pytest.raises(ValueError, match=message):
        encoder(long_captions="refuse")(picture("red", 0), "abcdefghijklmn", name="a.png")
    refusing = encoder(long_captions="refuse")(picture("red", 0), "abcdefghijk", name="a.png")
    assert torch.equal(refusing["tokens"], fits["tokens"])


def damaged(tmp_path, kind):
    """Returns pairs of which one is damaged, its name, and what the log says of it."""
    changes = {}
    if kind == "empty caption":
        changes = {"row2": {"caption": ""}}
    elif kind == "long caption":
        changes = {"row2": {"caption": "much too long"}}
    folder = write_table(tmp_path, per_colour=2, **changes)
    path = folder / "01.png"
    if kind == "truncated image":
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[:400])
    elif kind == "no image":
        path.write_text("none")
    elif kind == "missing file":
        path.unlink()
    elif kind == "large image":
        Image.new("RGB", (40, 40)).save(path)
    fractions = {"val_fraction": 0.0, "test_fraction": 0.0}
    return load_table(folder, columns=TableColumns(), max_pixels=300, **fractions)[1]["train"]


MESSAGES = {
    "truncated image": "cannot read .*01.png",
    "no image": "cannot read .*01.png",
    "missing file": "cannot read .*01.png",
    "large image": "max_pixels=300 pixels, got 40 x 40 = 1,600 in .*01.png",
    "empty caption": "an empty one for .*01.png in row 2 of .*pairs.jsonl",
    "long caption": "12 tokens with its end, got 13 bytes of text for .*01.png",
}


@pytest.mark.parametrize("kind", MESSAGES)
def test_damaged_pair_is_skipped_by_name_and_counted(tmp_path, caplog, kind):
    pairs = damaged(tmp_path, kind)
    make = encoder(long_captions="refuse")
    (batch,) = TrainLoader(pair_source(pairs, make), batch_size=6, on_error="skip")
    assert int(batch["num_skipped"]) == 1
    assert len(batch["names"]) == 6
    assert not any(name.endswith("01.png") for name in batch["names"])
    # The next one takes its place.
    assert sum(name.endswith("02.png") for name in batch["names"]) == 2
    in_training = caplog.text
    caplog.clear()
    (batch,) = EvalLoader(pair_source(pairs, make), batch_size=6, on_error="skip")
    assert int(batch["num_skipped"]) == 1
    assert batch["names"].count("") == 1
    assert batch["image_ids"].tolist().count(NO_PAIR) == 1
    for text in (in_training, caplog.text):
        assert text.count("skipped: ") == 1
        assert re.search(MESSAGES[kind], text)


@pytest.mark.parametrize("kind", MESSAGES)
def test_damaged_pair_stops_a_run_that_says_so(tmp_path, kind):
    pairs = damaged(tmp_path, kind)
    make = encoder(long_captions="refuse")
    for loader in (
        TrainLoader(pair_source(pairs, make), batch_size=6),
        EvalLoader(pair_source(pairs, make), batch_size=6),
    ):
        with pytest.raises(ValueError, match=f"{MESSAGES[kind]}.*--data.on_error skip"):
            next(iter(loader))
