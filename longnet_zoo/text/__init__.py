"""Text in, text or a score out: what models of text are asked for."""

from .generation import generate_text
from .pieces import read_pieces
from .score import FileScore, score_file

__all__ = ["FileScore", "generate_text", "read_pieces", "score_file"]
