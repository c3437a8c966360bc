"""Learning from the Undesirable (arXiv 2511.13052), written to be read.

Start with `model.py`, then `lora.py`, `steering.py`, `loss.py` and `train.py`: these five are the lesson. Then
`methods.py`, `data.py`, `layouts.py`, `generate.py`, `distill.py`, `evaluate.py`, `likelihood.py`, `checkpoint.py`,
`verbs/` and `cli.py` put it to work. Asides: `memory.py`, `baselines.py`, `anchored.py`, `released.py`, `bench.py`.
"""

__version__ = "0.1.0"
