"""Small BEiT-3 models and inputs for them, with sizes that no segment or rate divides."""

import torch

from longnet_zoo.models import BEiT3, BEiT3Config

DILATED = {"segment_lengths": (7, 16), "dilation_rates": (1, 3)}
NUM_PATCHES, TEXT_LEN = 16, 9
NUM_IMAGE = 1 + NUM_PATCHES
NUM_VISUAL_TOKENS, NUM_CLASSES = 37, 5
ALL_HEADS = {"heads": ("masked_image", "masked_text", "retrieval"), "num_classes": NUM_CLASSES}


def make_config(**options):
    sizes = {"img_size": 20, "patch_size": 5, "vocab_size": 61, "max_text_len": 13}
    sizes |= {"embed_dim": 24, "num_layers": 2, "num_heads": 4, "ffn_dim": 40}
    return BEiT3Config(**(sizes | {"num_visual_tokens": NUM_VISUAL_TOKENS} | options))


def make(**options):
    return BEiT3(make_config(**options))


def draw(batch=3):
    image = torch.randn(batch, 3, 20, 20)
    return image, torch.randint(61, (batch, TEXT_LEN)), torch.rand(batch, NUM_PATCHES) < 0.4


def all_inputs():
    image, tokens, mask = draw()
    padding = torch.arange(TEXT_LEN) >= torch.tensor([[9], [4], [1]])
    return [
        {"image": image},
        {"image": image, "image_mask": mask},
        {"tokens": tokens},
        {"tokens": tokens, "text_padding_mask": padding},
        {"image": image, "tokens": tokens},
        {"image": image, "tokens": tokens, "image_mask": mask, "text_padding_mask": padding},
    ]


def draw_training(batch=3):
    """What `total_loss` takes after the model."""
    labels = torch.randint(NUM_VISUAL_TOKENS, (batch, NUM_PATCHES))
    return *draw(batch), labels, torch.randn(batch, NUM_CLASSES)


def total_loss(model, image, tokens, mask, labels, cotangent):
    """Everything that a model with all heads computes, as one number to differentiate."""
    logits = model(image, tokens, image_mask=mask)
    options = {"image_mask": mask, "image_labels": labels, "text_labels": tokens}
    masked_loss = model.masked_loss(image, tokens, **options)
    return (logits * cotangent).sum() + masked_loss + model.contrastive_loss(image, tokens)
