import itertools

import pytest
import torch
from torch.nn.functional import normalize

from recipes.image_text_loader import NO_PAIR
from recipes.image_text_scores import (
    BagOfPixels,
    Gallery,
    chance_scores,
    embed_bag_of_pixels,
    retrieval_scores,
)


def gallery(image_ids, text_ids, *, seed=0):
    draw = torch.Generator().manual_seed(seed)
    number = len(image_ids)
    images, texts = (normalize(torch.randn(number, 6, generator=draw), dim=1) for _ in range(2))
    return Gallery(
        image_features=images,
        text_features=texts,
        image_ids=torch.tensor(image_ids),
        text_ids=torch.tensor(text_ids),
        labels=torch.arange(number),
    )


def test_pairs_that_share_an_image_or_a_caption_are_each_others():
    found = gallery([1, 1, 2, 3], [7, 8, 8, 9]).positives
    expected = torch.eye(4, dtype=torch.bool)
    expected[0, 1] = expected[1, 0] = expected[1, 2] = expected[2, 1] = True
    assert torch.equal(found, expected)


def test_fillers_are_left_out():
    pairs = gallery([1, NO_PAIR, 2], [1, NO_PAIR, 2]).pairs()
    assert len(pairs) == 2
    assert pairs.labels.tolist() == [0, 2]
    assert pairs.image_features.shape == (2, 6)


def test_sample_is_by_hash_and_has_no_caption_twice():
    ids, texts = list(range(9)), [50, 40, 50, 10, 60, 40, 30, 70, 20]
    chosen = gallery(ids, texts).sample(4)
    assert [texts[row] for row in chosen.tolist()] == [10, 20, 30, 40]
    assert chosen.tolist()[-1] == 1
    assert len(gallery(ids, texts).sample(100)) == 7
    assert gallery(ids, texts).keys(chosen) == [(3, 10), (8, 20), (6, 30), (1, 40)]


def test_recall_is_the_mean_of_both_directions():
    found = gallery(range(30), range(30))
    scores = retrieval_scores(found.similarity, found.positives)
    order = found.similarity.argsort(dim=1, descending=True)
    images = (order[:, :5] == torch.arange(30)[:, None]).any(1).double().mean()
    order = found.similarity.T.argsort(dim=1, descending=True)
    texts = (order[:, :5] == torch.arange(30)[:, None]).any(1).double().mean()
    assert scores["image_to_text_recall@5"] == pytest.approx(float(images))
    assert scores["text_to_image_recall@5"] == pytest.approx(float(texts))
    assert scores["recall@5"] == pytest.approx(float(images + texts) / 2)


def test_chance_is_the_mean_over_all_orders():
    positives = gallery([1, 1, 2, 3, 4], [5, 6, 6, 7, 8]).positives
    expected = []
    for right in positives.tolist():
        orders = list(itertools.permutations(range(5)))
        expected.append(sum(right[order[0]] for order in orders) / len(orders))
    scores = chance_scores(positives)
    assert scores["image_to_text_recall@1"] == pytest.approx(sum(expected) / 5)
    # More tries than candidates.
    assert scores["recall@5"] == scores["recall@10"] == 1.0
    alone = chance_scores(torch.eye(200, dtype=torch.bool))
    assert alone["recall@1"] == pytest.approx(1 / 200)
    assert alone["recall@5"] == pytest.approx(5 / 200)
    assert alone["text_to_image_recall@10"] == pytest.approx(10 / 200)


def stripes(number, *, seed):
    """Returns batches of images with a dark part, and captions that say where it is."""
    draw = torch.Generator().manual_seed(seed)
    batches = []
    for start in range(0, number, 8):
        images, captions = torch.randn(8, 3, 32, 32, generator=draw) * 0.1 + 1, []
        for image in images:
            row, column = torch.randint(4, (2,), generator=draw).tolist()
            image[:, 8 * row : 8 * row + 8, 8 * column : 8 * column + 8] -= 2
            captions.append(f"row{row} column{column}")
        ids = torch.tensor([hash(caption) % 2**31 for caption in captions])
        batches.append(
            {
                "images": images,
                "captions": captions,
                "image_ids": torch.arange(start, start + 8),
                "text_ids": ids,
                "labels": torch.zeros(8, dtype=torch.int64),
            }
        )
    return batches


def test_bag_of_pixels_reads_words_off_an_image():
    training = stripes(400, seed=0)
    # What was not read says nothing.
    training[0]["captions"][0], training[0]["image_ids"][0] = "nonsense", NO_PAIR
    bag = BagOfPixels(training, side=8)
    assert bag.texts(["nonsense"]).count_nonzero() == 0
    found = embed_bag_of_pixels(bag, stripes(80, seed=1))
    assert len(found) == 80
    assert found.image_features.shape == found.text_features.shape == (80, 8)
    scores = retrieval_scores(found.similarity, found.positives)
    assert scores["recall@1"] > 0.9
    assert scores["recall@1"] > 5 * chance_scores(found.positives)["recall@1"]


def test_bag_of_pixels_weighs_rare_words_more():
    batch = stripes(8, seed=0)[0]
    batch["captions"] = ["often"] * 4 + ["often rare", "some", "some", "some"]
    bag = BagOfPixels([batch], side=4)
    often, rare, _ = bag.texts(["often rare unknown"])[0].tolist()
    assert rare == pytest.approx(often * torch.tensor(8.0).log() / torch.tensor(8 / 5).log())
    assert bag.texts(["often", "some"]).norm(dim=1).tolist() == pytest.approx([1, 1])
