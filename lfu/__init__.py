"""Learning from the Undesirable (arXiv 2511.13052), written to be read.

Start with `model.py`, then `lora.py`, `steering.py`, `loss.py` and `train.py`: these five are the lesson. Then
`methods.py`, `data.py`, `layouts.py`, `generate.py`, `distill.py`, `evaluate.py`, `likelihood.py`, `checkpoint.py`,
`verbs/` and `cli.py` put it to work. Asides: `memory.py`, `baselines.py`, `anchored.py`, `released.py`, `bench.py`.
"""

__version__ = "0.1.0"


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do."""


def option_name(name: str) -> str:
    """A setting as the command line spells it, without its dashes: lambda for `lam`, batch-size for `batch_size`."""
    return {"lam": "lambda"}.get(name, name).replace("_", "-")
