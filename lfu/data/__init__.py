"""Data: JSONL rows -> templates -> tokens and labels -> batches. Read `rows.py`, `tokens.py`, `batches.py`."""

from lfu.data.batches import IGNORED, Batch, Example, collate, pad, split_by_length
from lfu.data.rows import LAYOUTS, Layout, Row, columns, get_layout, read_rows
from lfu.data.tokens import (
    TEMPLATES,
    Format,
    ModelTokenizer,
    encode_row,
    encode_rows,
    load_tokenizer,
    prompt_ids,
    token_ids,
)

__all__ = [
    "IGNORED", "LAYOUTS", "TEMPLATES", "Batch", "Example", "Format", "Layout", "ModelTokenizer", "Row", "collate",
    "columns", "encode_row", "encode_rows", "get_layout", "load_tokenizer", "pad", "prompt_ids", "read_rows",
    "split_by_length", "token_ids",
]  # fmt: skip
