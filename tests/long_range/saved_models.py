"""Small models, and folders of them as a run leaves them."""

import json

import torch

import longnet_zoo as lz
from longnet_zoo.long_range import TRAINING_FILE

OPTIONS = {"embed_dim": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 16}


def make_model(seed):
    torch.manual_seed(seed)
    return lz.create_model("longnet_lm_tiny", **OPTIONS).eval()


def save_run(folder, seed, **training):
    make_model(seed).save_pretrained(folder)
    if training:
        (folder / TRAINING_FILE).write_text(json.dumps(training))
    return folder
