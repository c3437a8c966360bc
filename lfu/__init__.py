"""Learning from the Undesirable (arXiv 2511.13052), written to be read.

Start with `model.py`, then `lora.py`, `steering.py`, `loss.py` and `train.py`: these five are the lesson. `methods.py`
has the methods by name. Each other job has a room of its own: `data/`, `generate.py`, `evaluation/`, `io/`, `runs.py`,
`distributed.py`, `cli/`. Asides: `remat.py`, `baselines/`, `profiling/`. `docs/code-map.md` says what stands where.
"""

__version__ = "0.1.0"
