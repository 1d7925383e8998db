"""Trains a bidirectional language model to fill in masked tokens.

    python -m recipes.text_mlm fit --config configs/text/mlm_quickstart.yaml
    python -m recipes.text_mlm predict --config configs/text/mlm_quickstart.yaml \
        --model.sampling.prompts '["def __in<mask>t__(self):"]'

The same as `recipes.text_lm`, from which it inherits, but for the model and for what it predicts;
the data module masks the tokens (`data.objective: masked`).
"""

import torch

from longnet_zoo.text.generation import printable
from longnet_zoo.tokenizers import Tokenizer
from recipes.cli import run
from recipes.sampling import fill
from recipes.text_data import TextDataModule
from recipes.text_lm import TextLM
from recipes.text_packing import Objective

__all__ = ["TextMLM", "main"]


class TextMLM(TextLM):
    """A registered masked language model with its training, evaluation and filling in."""

    objective: Objective = "masked"
    default_model = "longnet_mlm_tiny"
    default_prompts = ("def __in<mask>t__(self, *args, **kwargs):\n    ret<mask>rn None\n",)

    def attach_tokenizer(self, tokenizer: Tokenizer) -> None:
        """Takes a tokenizer, which says how many bytes a token stands for.

        Raises:
            ValueError: The model has fewer token ids than the tokenizer, or the tokenizer has
                nothing to hide tokens with, or a prompt hides none.
        """
        super().attach_tokenizer(tokenizer)
        if tokenizer.mask_id is None:
            raise ValueError(
                "a masked language model needs a mask token, got a tokenizer without one. Set "
                "data.mask_token."
            )
        for prompt in self.prompts:
            if self.sampling.mask not in prompt:
                raise ValueError(
                    f"each prompt must hold {self.sampling.mask!r} to fill in, got {prompt!r}. Put "
                    "it there, or set model.sampling.mask."
                )

    def sample(self, prompt: str) -> str:
        """Returns a prompt with each `sampling.mask` in it filled in."""
        assert self.tokenizer is not None
        assert self.tokenizer.mask_id is not None
        mask_id, mask = self.tokenizer.mask_id, self.sampling.mask
        parts = self.tokenizer.encode_batch([part.encode() for part in prompt.split(mask)])
        ids = [i for part in parts for i in (mask_id, *part.tolist())][1:]
        special = {self.tokenizer.eod_id, self.tokenizer.pad_id} - {None}
        tokens = torch.tensor(ids, device=self.device)
        filled = fill(self.model, tokens, mask_id=mask_id, banned_ids=sorted(special))
        return printable(self.tokenizer.decode(filled.tolist()))


def main(args: list[str] | None = None) -> None:
    """Runs the command line."""
    run(TextMLM, TextDataModule, args=args)


if __name__ == "__main__":
    main()
