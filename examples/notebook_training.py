"""Train with validation, look at the curves, ask, and merge: what a notebook needs, on the model in the repository.

python examples/notebook_training.py OUT
"""

import sys
from pathlib import Path

import torch

import lfu
from lfu import cli, data
from lfu.generate import generate
from lfu.validation import Validation, hold_back

out, folder = Path(sys.argv[1]), Path(__file__).parents[1] / "weights" / "mini"

# The model, and the rows: those held back are looked at between the steps.
config, base = lfu.load(folder, dtype=torch.float32)
tokenizer, form = lfu.load_tokenizer(folder, config.vocab_size), lfu.Format("question")
rows = lfu.read_rows(folder / "math" / "train.jsonl")
examples, held = hold_back(lfu.encode_rows("math", rows, tokenizer, form)[0], 16, seed=42)

# Train. OUT/run/best is the adapter of the step with the lowest NLL on the rows held back.
adapter = lfu.init(config, rank=8, generator=torch.Generator().manual_seed(42)), 2.0
method, hyper = lfu.bind("lfu-lora", config, scale=2.0)
settings = lfu.Settings(epochs=8, learning_rate=0.01)
validation = Validation(held, patience=3)
lfu.train_run(out / "run", config, base, adapter, examples, method, settings, validation=validation)

# Ask the best step.
best = lfu.lora.load(out / "run" / "best", config)
prompt = data.tokens.prompt_ids(tokenizer, form, rows[0].question)
for _, answer in generate(config, base, tokenizer, [prompt], [best], max_new_tokens=64):
    print(f"{rows[0].question}\n  {answer.text.strip()}\n  (to be: {rows[0].answer})")

# Draw, and merge into a model folder that any library loads.
cli.plot(cli.PlotOptions(runs=[str(out / "run")], out=str(out / "run.svg")))
cli.merge(cli.MergeOptions(model=str(folder), adapter=str(out / "run" / "best"), out=str(out / "merged")))
