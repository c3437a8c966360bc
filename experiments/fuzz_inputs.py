"""The commands that `fuzz.py` tries, and one small file or folder of every kind that they read.

Read next: `fuzz_mistakes.py`.
"""

import json
import shutil
from pathlib import Path
from typing import Any

from experiments.children import MINI, run
from lfu.io.files import read_json, write_json, write_tensors
from lfu.io.tensors import read_all_tensors

ROWS, CHOICES = "rows-d.jsonl", "choices-d.jsonl"
PROMPT, SHORT = ["--template=question"], ["--max-new-tokens=3"]
TRAIN = [
    "--rank=2", "--lora-alpha=4", "--batch-size=2", "--micro-batch-size=2", "--epochs=1", "--warmup=0",
    "--learning-rate=0.01", "--save-every=1", "--keep=2", *PROMPT,
]  # fmt: skip
COMMAND = {
    "train": ["train", f"--data={ROWS}", "--out=out-o", "--method=sft", *TRAIN],
    "resume": ["train", f"--data={ROWS}", "--out=run-r", "--method=sft", *TRAIN, "--resume"],
    "eval": ["eval", f"--data={ROWS}", "--out=out-o", *SHORT],
    "choices": ["eval", f"--data={CHOICES}", "--out=out-o", "--score=choices", "--answer=gold"],
    "generate": ["generate", "--question=Compute 1+1.", *SHORT],
    "merge": ["merge", "--out=out-o"],
    "distill": ["distill", f"--data={ROWS}", "--out=out-o", *SHORT],
}
MODEL, SHARDS = ["--model=base-m"], ["--model=shards-s"]
OWN, BARE = ["--adapter=lora-a"], ["--adapter=peft-p"]
"""An adapter that knows its model and prompts, and one that does not care which model it meets."""

BY_MODEL = [
    ["train", *MODEL], ["eval", *MODEL, *PROMPT], ["choices", *MODEL, *PROMPT], ["generate", *MODEL],
    ["merge", *MODEL, *BARE],
]  # fmt: skip
BY_SHARDS = [["generate", *SHARDS], ["merge", *SHARDS, *BARE]]
BY_ADAPTER = [[command, *MODEL, *OWN] for command in ("train", "eval", "choices", "generate", "merge")]
BY_RESUMING = [["resume", *MODEL]]
MODEL_FILES = (
    "config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "generation_config.json",
    "lfu_config.json",
    "model.safetensors",
)
ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors", "lfu_config.json")
CHECKPOINT_FILES = ("state.json", "adapter_config.json", "adapter_model.safetensors", "optimizer.safetensors")
READERS = {
    **{f"base-m/{name}": BY_MODEL for name in MODEL_FILES},
    "shards-s/model.safetensors.index.json": BY_SHARDS,
    "shards-s/model-00002-of-00002.safetensors": BY_SHARDS,
    **{f"lora-a/{name}": BY_ADAPTER for name in ADAPTER_FILES},
    ROWS: [["train", *MODEL], ["eval", *MODEL, *PROMPT], ["distill", *MODEL]],
    CHOICES: [["choices", *MODEL, *PROMPT]],
    **{f"run-r/{name}": BY_RESUMING for name in ("settings.json", "log.jsonl")},
    **{f"run-r/checkpoints/step-1/{name}": BY_RESUMING for name in CHECKPOINT_FILES},
    "options": [*BY_MODEL, *BY_ADAPTER, *BY_RESUMING, ["distill", *MODEL]],
}
"""What a case may damage, and the commands that read it, each with what is added to COMMAND."""
OFTEN = ("base-m/config.json", "base-m/tokenizer.json", "lora-a/adapter_config.json", ROWS, "options")
"""What can be wrong in the most ways."""


def arguments(command: list[str]) -> list[str]:
    return [*COMMAND[command[0]], *command[1:]]


def build(world: Path, layers: int = 4) -> None:
    """One small file or folder of every kind, with lfu's own commands; of the model only its first blocks."""
    world.mkdir()
    build_model(world / "base-m", layers)
    build_shards(world / "base-m", world / "shards-s")
    rows = [json.loads(line) for line in (MINI / "math" / "train.jsonl").read_text().splitlines()[:4]]
    write_rows(world / ROWS, rows)
    choices = {"choices": ["4", "5", "60"], "gold": 1}
    write_rows(world / CHOICES, [{"question": row["question"]} | choices for row in rows])
    done = run(arguments(["train", *MODEL]), world)
    if done.code != 0:
        raise SystemExit(f"The undamaged files do not work: {done.err}")
    (world / "out-o").rename(world / "run-r")
    shutil.move(world / "run-r" / "adapter", world / "lora-a")
    shutil.rmtree(world / "run-r" / "checkpoints" / "step-2")
    log = world / "run-r" / "log.jsonl"
    log.write_text(log.read_text().splitlines()[0] + "\n")
    shutil.copytree(world / "lora-a", world / "peft-p")
    (world / "peft-p" / "lfu_config.json").unlink()


def build_model(folder: Path, layers: int) -> None:
    """The miniature, or its first blocks."""
    folder.mkdir()
    for file in MINI.glob("*.json"):
        shutil.copyfile(file, folder / file.name)
    write_json(folder / "config.json", read_json(MINI / "config.json") | {"num_hidden_layers": layers})
    tensors = read_all_tensors(MINI / "model.safetensors")
    kept = tuple(f"model.layers.{number}." for number in range(layers))
    held = {name: each for name, each in tensors.items() if name.startswith(kept) or ".layers." not in name}
    write_tensors(folder / "model.safetensors", held)


def build_shards(model: Path, shards: Path) -> None:
    """The same model in two files and an index."""
    shutil.copytree(model, shards)
    tensors = read_all_tensors(shards / "model.safetensors")
    (shards / "model.safetensors").unlink()
    names = sorted(tensors)
    weight_map = {name: f"model-0000{1 + (name > names[len(names) // 2])}-of-00002.safetensors" for name in names}
    for file in sorted(set(weight_map.values())):
        write_tensors(shards / file, {name: tensors[name] for name in names if weight_map[name] == file})
    write_json(shards / "model.safetensors.index.json", {"weight_map": weight_map})


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
