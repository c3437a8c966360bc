"""The experiments: what makes the numbers, tables and figures of the project's pages, a module each.

The paper in miniature has a room of its own, `miniature/`, and `python -m experiments` makes it again; start there.
Then, by what is asked: is it right (`fidelity.py`, `differences.py`, `restoration.py`, `harness.py`), what does it cost
(`costs.py`, `scale.py`, `split.py`), what does a real model learn (`demo.py`, `smollm2.py`), and all of that on a GPU
(`gpu.py` and its parts; `gguf.py` makes a model folder for it). `figures/` and `tables.py` make from the stored numbers
what the pages show. `markdown.py` and `seeds.py` are what they share.
"""
