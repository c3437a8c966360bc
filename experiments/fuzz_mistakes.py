"""Mistakes made in the files that `lfu` reads: each is drawn from a seeded generator and says what it did.

Of every kind of file: flipped and lost bytes, and something else in the file's place (a folder, a FIFO, a link). Of
JSON: keys that are missing, there twice, renamed or unknown, and values of other types, sizes and depths. Of tensors:
names, shapes, dtypes and values. Read next: `fuzz.py`.
"""

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load, load_file, save_file

NASTY = [
    "", " ", "x", "\x1b[31mred\x1b[0m", "a\nb", "a\r\nlfu: b", "\u202etxet", "\u2028", "\u200b", "\ud800", "\0",
    "ä" * 300, "../../etc/passwd", "/dev/zero", "/proc/self/mem", "x" * 200_000,
]  # fmt: skip
NUMBERS = [
    "0", "-1", "1", "2", "3", "7", "0.5", "64.0", "1000000000", "1" + "0" * 18, "1" + "0" * 30, "1" + "0" * 400,
    "1" + "0" * 5000, "1e-320", "1e30", "1e308", "-1e308", "1e999", "-1e999", "NaN", "Infinity", "-Infinity",
]  # fmt: skip
SHAPES = [
    "null", "true", "false", "[]", "{}", "[1]", '["1"]', "[[]]", "[null]", '{"a": 1}', '["q_proj", 1]',
    "[" * 100_000 + "]" * 100_000, '{"a":' * 50_000 + "1" + "}" * 50_000, "[" + "1," * 99_999 + "1]",
]  # fmt: skip
VALUES = [*NUMBERS, *SHAPES, *(json.dumps(text) for text in NASTY)]
"""JSON texts to stand in a value's place."""

SPECIAL: dict[str, list[tuple[str, str]]] = {
    "tokenizer.json": [
        ("normalizer", json.dumps({"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 10**6})),
        ("normalizer", json.dumps({"type": "Sequence", "normalizers": [
            {"type": "Replace", "pattern": {"String": "e"}, "content": "e" * 30}] * 6})),
        ("normalizer", json.dumps({"type": "Replace", "pattern": {"Regex": "(\\w+\\s?)*$$x"}, "content": ""})),
        ("pre_tokenizer", json.dumps({"type": "Split", "pattern": {"Regex": "(a|a|\\w|.)*\\1y"},
                                      "behavior": "Isolated", "invert": False})),
        ("post_processor", json.dumps({"type": "TemplateProcessing", "pair": [], "special_tokens": {},
                                       "single": [{"SpecialToken": {"id": "<none>", "type_id": 0}}]})),
        ("post_processor", json.dumps({"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}], "special_tokens": {
                "<s>": {"id": "<s>", "ids": [10**6], "tokens": ["<s>"]}}})),
        ("post_processor", json.dumps({"type": "TemplateProcessing", "pair": [], "single": [
            {"SpecialToken": {"id": "<s>", "type_id": 0}}], "special_tokens": {
                "<s>": {"id": "<s>", "ids": [0] * 10**6, "tokens": ["<s>"] * 10**6}}})),
        ("post_processor", "null"),
        ("model", '{"type": "BPE", "vocab": {}, "merges": []}'),
        ("model", '{"type": "WordLevel", "vocab": {"a": 5}, "unk_token": "<unk>"}'),
        ("model", '{"type": "Unigram", "vocab": [["a", 0.5]], "unk_id": null}'),
        ("added_tokens", "[]"),
    ],
    "adapter_config.json": [
        ("target_modules", '["q_proj", ["k_proj"]]'), ("target_modules", '"' + "(a|a)*" * 20 + 'b"'),
        ("lora_alpha", "1" + "0" * 400), ("lora_alpha", "1e300"), ("lora_alpha", "NaN"), ("use_rslora", "true"),
        ("r", "true"), ("r", "2.0"),
    ],
    "config.json": [
        ("num_hidden_layers", "1000000000"), ("hidden_size", "1" + "0" * 18), ("rope_scaling", '{"type": "default"}'),
        ("layer_types", "[[]]"), ("layer_types", '["full_attention", 1]'), ("rms_norm_eps", "1e999"),
        ("tie_word_embeddings", '"false"'), ("quantization_config", "{}"), ("eos_token_id", '["1"]'),
        ("max_position_embeddings", "8"), ("head_dim", "null"),
    ],
    "generation_config.json": [("eos_token_id", '["1"]'), ("eos_token_id", "[1, 5]"), ("eos_token_id", "1e999")],
    "tokenizer_config.json": [
        ("eos_token", '{"content": "</s>"}'), ("add_bos_token", "false"), ("eos_token", '"nothing"'),
    ],
}  # fmt: skip
"""File -> keys and the JSON text of a value that is bad in a way of its own."""


def mutate(path: Path, random: Random) -> str:
    """Change the file at `path`, or put something else there; returns what was done."""
    structure = {".json": change_json, ".jsonl": change_rows, ".safetensors": change_tensors}[path.suffix]
    change = random.choices([structure, change_bytes, replace_entry], [75, 15, 10])[0]
    return change(path, random)


def put(path: Path, content: bytes) -> None:
    """A new file in the old one's place: what shares the old one's bytes keeps them."""
    path.unlink()
    path.write_bytes(content)


# --- any file -------------------------------------------------------------------------------------


def change_bytes(path: Path, random: Random) -> str:
    content = path.read_bytes()
    kind = random.choice(["flip", "flip in the first KiB", "cut", "insert", "append", "nothing"])
    where = random.randrange(min(len(content), 1024 if "first" in kind else len(content)))
    if kind.startswith("flip"):
        put(path, content[:where] + bytes([content[where] ^ (1 << random.randrange(8))]) + content[where + 1 :])
    elif kind == "cut":
        put(path, content[:where])
    elif kind == "nothing":
        put(path, b"")
    else:
        strange = random.choice([b"\xff\xfe", b"\xef\xbb\xbf", b"\0", b"\n", b"}", "\u2028".encode(), b"[" * 100_000])
        put(path, content[:where] + strange + content[where:] if kind == "insert" else content + strange)
        return f"{kind} {strange[:4]!r} at {where}"
    return f"{kind} at {where}"


ENTRIES: dict[str, Callable[[Path], object]] = {
    "a folder": Path.mkdir,
    "a FIFO": os.mkfifo,
    "a link to nothing": lambda path: path.symlink_to("nowhere"),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to a folder": lambda path: path.symlink_to("."),
    "a link to /dev/zero": lambda path: path.symlink_to("/dev/zero"),
    "a link to /proc/self/mem": lambda path: path.symlink_to("/proc/self/mem"),
    "not there": lambda path: None,
}


def replace_entry(path: Path, random: Random) -> str:
    """Something else under the file's name."""
    name = random.choice(list(ENTRIES))
    path.unlink()
    ENTRIES[name](path)
    return name


# --- JSON -----------------------------------------------------------------------------------------


def change_json(path: Path, random: Random) -> str:
    """One place of a JSON object."""
    text = path.read_text(encoding="utf-8")
    special = SPECIAL.get(path.name, [])
    if path.name.endswith(".index.json") and random.random() < 0.3:
        changed, done = leave_folder(json.loads(text), path, random)
    elif special and random.random() < 0.3:
        key, raw = random.choice(special)
        changed, done = with_value(json.loads(text) | {key: MARK}, raw), f"{key} = {raw}"
    else:
        changed, done = change_object(json.loads(text), random)
    put(path, changed.encode(errors="surrogatepass"))
    return done


def leave_folder(index: dict[str, Any], path: Path, random: Random) -> tuple[str, str]:
    """The same weights by a way that leaves their folder."""
    way = random.choice([f"../{path.parent.name}", str(path.parent.absolute())])
    index["weight_map"] = {name: f"{way}/{file}" for name, file in index["weight_map"].items()}
    return json.dumps(index), f"weight_map leaves the folder by {way}"


MARK = "@here@"


def with_value(tree: Any, raw: str) -> str:
    """JSON in which MARK is replaced by a JSON text, which may be one that no library writes."""
    return json.dumps(tree).replace(json.dumps(MARK), raw)


def change_object(tree: dict[str, Any], random: Random) -> tuple[str, str]:
    """A JSON text of the object with one change, and what it is."""
    parent, key, names = choose_place(tree, random)
    kind, raw = random.choice(["value", "value", "value", "delete", "rename", "add", "twice"]), random.choice(VALUES)
    if kind == "twice" and parent is tree:
        return f"{json.dumps(tree)[:-1]}, {json.dumps(key)}: {raw}}}", f"{key} is there twice, the second time {raw}"
    if kind == "delete":
        del parent[key]
        return json.dumps(tree), f"{names} deleted"
    if isinstance(parent, dict) and kind in ("rename", "add"):
        name = random.choice(NASTY)
        parent[name] = parent.pop(key) if kind == "rename" else MARK
        return with_value(tree, raw), f"{names} {kind} {name!r}: {raw}"
    if kind == "add" and random.random() < 0.5:
        tree |= {f"column {number}": number for number in range(10_000)}
    parent[key] = MARK
    return with_value(tree, raw), f"{names} = {raw}"


def choose_place(tree: Any, random: Random) -> tuple[Any, Any, str]:
    """A place in the tree, the upper ones more often: its container, its key, and the keys that lead there."""
    names = []
    while True:
        key = random.choice(list(tree) if isinstance(tree, dict) else range(len(tree)))
        names.append(str(key))
        if not isinstance(tree[key], dict | list) or not tree[key] or random.random() < 0.3:
            return tree, key, ".".join(names)
        tree = tree[key]


def change_rows(path: Path, random: Random) -> str:
    """One line of a JSONL file."""
    lines = path.read_text(encoding="utf-8").splitlines()
    number = random.randrange(len(lines))
    kind = random.choice(["change"] * 7 + ["columns", "delete", "repeat", "separator", "value"])
    done = kind
    if kind == "change":
        lines[number], done = change_object(json.loads(lines[number]), random)
    elif kind == "columns":
        many = {f"{random.choice(NASTY)[:20]}{column}": column for column in range(10_000)}
        lines[number] = json.dumps(many if random.random() < 0.5 else json.loads(lines[number]) | many)
    elif kind == "delete":
        del lines[number]
    elif kind == "repeat":
        lines.insert(number, lines[number])
    elif kind == "separator":
        lines[number] += random.choice(["\u2028", "\r", "\x0c", "\x85", " ", "\0"])
    else:
        lines[number] = random.choice(VALUES)
    put(path, "".join(f"{line}\n" for line in lines).encode(errors="surrogatepass"))
    return f"line {number + 1}: {done}"


# --- tensors --------------------------------------------------------------------------------------


def change_tensors(path: Path, random: Random) -> str:
    """One tensor of a safetensors file, or its entry in the file's header."""
    if random.random() < 0.25:
        return change_header(path, random)
    tensors = load_file(path)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    name, value = random.choice(list(tensors.items()))
    kind = random.choice(
        ["delete", "add", "rename", "shape", "dtype", "nan", "inf", "-inf", "all nan", "large", "zero"]
    )
    done = kind
    if kind in ("delete", "rename"):
        del tensors[name]
    if kind in ("add", "rename"):
        new = random.choice([name for name in NASTY if "\ud800" not in name])
        tensors[new], done = value.clone(), f"{kind} {new!r}"
    if kind == "shape":
        flat = value.flatten()
        other = random.choice([flat, flat[:0], torch.stack([value, value]), torch.cat([flat, flat])])
        tensors[name], done = other.clone(), f"shape {list(other.shape)}"
    if kind == "dtype":
        dtype = random.choice([torch.int8, torch.int64, torch.bool, torch.float64, torch.float16, torch.float8_e4m3fn])
        tensors[name], done = value.to(dtype), str(dtype)
    if kind in ("nan", "inf", "-inf"):
        value.view(-1)[random.randrange(value.numel())] = float(kind)
    if kind in ("all nan", "large", "zero"):
        value *= {"all nan": float("nan"), "large": 1e30, "zero": 0}[kind]
    path.unlink()
    save_file(tensors, path, metadata={"format": "pt"})
    return f"{name}: {done}"


def change_header(path: Path, random: Random) -> str:
    """The JSON at the beginning of a safetensors file, or the length that is written before it."""
    content = path.read_bytes()
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    if random.random() < 0.2:
        new = random.choice([0, 1, length - 1, length + 1, 2**40, 2**63, 2**64 - 1])
        put(path, struct.pack("<Q", new) + content[8:])
        return f"header length {new}"
    name = random.choice([name for name in header if name != "__metadata__"])
    key, value = random.choice([
        ("dtype", "F99"), ("dtype", "I64"), ("dtype", "F8_E4M3"), ("shape", [10**9, 10**9, 10**9]), ("shape", []),
        ("shape", [-1]), ("shape", [0]), ("data_offsets", [0, 10**15]), ("data_offsets", [8, 4]),
        ("data_offsets", [0, 0]),
    ])  # fmt: skip
    header[name][key] = value
    text = json.dumps(header).encode()
    put(path, struct.pack("<Q", len(text)) + text + content[8 + length :])
    return f"header: {name}.{key} = {value}"


def all_finite(content: bytes) -> bool:
    """Whether every number of a safetensors file is finite; what cannot be read holds none that is not."""
    try:
        return all(bool(tensor.isfinite().all()) for tensor in load(content).values() if tensor.is_floating_point())
    except Exception:  # whatever was made of it
        return True
