"""One rule for tokens: what is trained on, asked and scored is the natural text, BOS once, on tokenizers of every kind.

A text's own tokens are what the `tokenizers` library makes of the whole of it. Each kind of tokenizer is built here with
every character of the texts as a token, and tokens for a word with the space before it: an answer that gets a space too
many, or a prompt that loses its own, shows.
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, asked_for, lfu, refusal, write_rows
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lfu import cli
from lfu.cli.train import read_examples
from lfu.data.rows import Row
from lfu.data.tokens import TEMPLATES, Format, load_tokenizer, prompt_ids
from lfu.evaluation.generative import harness_prompt
from lfu.evaluation.loglikelihood import EncodingOptions, encode_pair, read_choices
from lfu.io.config import read_config

QUESTION, ANSWER = "Why so?", "So it is."
SPECIAL = ["<unk>", "<s>", "</s>"]
CHARACTERS = sorted({*"".join("".join(template.pieces) for template in TEMPLATES.values()), *QUESTION, *ANSWER} - {" "})
MERGES = [("▁", "S"), ("▁S", "o"), ("▁", "i"), ("▁i", "s"), ("▁", "s"), ("▁s", "o"), ("▁", "W")]
PIECES = [*SPECIAL, "▁", *CHARACTERS, *("".join(pair) for pair in MERGES)]

# --- tokenizers -----------------------------------------------------------------------------------


def sentencepiece(model: Any, normalizer: Any = None, pre_tokenizer: Any = None) -> Tokenizer:
    made = Tokenizer(model)
    if normalizer:
        made.normalizer = normalizer
    if pre_tokenizer:
        made.pre_tokenizer = pre_tokenizer
    made.decoder = decoders.Metaspace()
    return made


def bpe() -> models.BPE:
    return models.BPE({piece: index for index, piece in enumerate(PIECES)}, MERGES, unk_token="<unk>")


def unigram() -> models.Unigram:
    return models.Unigram([(piece, -float(len(piece) < 2)) for piece in PIECES], unk_id=0)


def byte_level(**how: Any) -> Tokenizer:
    pieces = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), "ĠS", "ĠSo"]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    made = Tokenizer(models.BPE(vocabulary, [("Ġ", "S"), ("ĠS", "o")]))
    made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(**how), decoders.ByteLevel()
    return made


LLAMA2 = [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
KINDS: dict[str, Callable[[], Tokenizer]] = {
    "byte-level": lambda: byte_level(add_prefix_space=False),
    "byte-level with a space": lambda: byte_level(add_prefix_space=True),
    "metaspace, always": lambda: sentencepiece(bpe(), None, pre_tokenizers.Metaspace()),
    "metaspace, first": lambda: sentencepiece(bpe(), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)),
    "metaspace, in a sequence": lambda: sentencepiece(
        bpe(), None, pre_tokenizers.Sequence([pre_tokenizers.Metaspace(), pre_tokenizers.Digits()])
    ),
    "prepend": lambda: sentencepiece(bpe(), normalizers.Sequence(LLAMA2)),
    "unigram": lambda: sentencepiece(unigram(), None, pre_tokenizers.Metaspace()),
}


def model_folder(folder: Path, made: Tokenizer, bos: bool = True, **config: Any) -> Path:
    """The repository's weights with this tokenizer."""
    made.add_special_tokens(SPECIAL[1:])
    if bos:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    folder.mkdir(exist_ok=True)
    for name in ("config.json", "model.safetensors"):
        shutil.copy(MINI / name, folder)
    made.save(str(folder / "tokenizer.json"))
    names = {"eos_token": "</s>", "bos_token": "<s>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(names))
    return folder


@pytest.fixture(params=[(kind, bos) for kind in KINDS for bos in (True, False)], ids=str)
def model(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, bos = request.param
    return model_folder(tmp_path / "model", KINDS[kind](), bos)


def natural_ids(folder: Path, text: str) -> list[int]:
    return Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids


def whole_text(template: str, question: str = QUESTION, answer: str = ANSWER) -> tuple[str, str]:
    """The prompt, and prompt and answer."""
    pieces, before, _ = TEMPLATES[template]
    prompt = "".join(pieces).replace("{question}", question)
    return prompt, prompt + before + answer


# --- the natural text -----------------------------------------------------------------------------


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_is_trained_on_asked_and_scored_is_the_natural_text(
    model: Path, template: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    prompt, whole = (natural_ids(model, text) for text in whole_text(template))
    assert whole[: len(prompt)] == prompt  # else there would be no natural border
    row = {"question": QUESTION, "answer": ANSWER}
    data, asked = write_rows(tmp_path / "rows.jsonl", [row]), asked_for(monkeypatch)[0]
    how = {"model": str(model), "template": template, "device": "cpu"}

    for loss_on in ("answer", "instruction+answer"):
        options = cli.TrainOptions(data=str(data), out="", loss_on=loss_on, **how)
        (example,) = read_examples(options, model, read_config(model / "config.json"))
        assert (example.tokens, example.prompt_length) == ([*whole, 2], len(prompt))
    cli.generate(cli.GenerateOptions(question=QUESTION, max_new_tokens=1, **how))
    cli.evaluate(cli.EvalOptions(data=str(data), score="exact", max_new_tokens=1, nll=False, **how))
    assert asked == [prompt, prompt]

    tokenizer = load_tokenizer(model, 1024)
    item = read_choices(Row(1, QUESTION, "", row | {"choices": [ANSWER, "x"], "answer": 0}), "answer")
    choice = encode_pair(EncodingOptions(tokenizer, Format(template), True, 1, 64), item, ANSWER)
    assert (choice.tokens, choice.prompt_length) == (whole, len(prompt))
    bare = encode_pair(EncodingOptions(tokenizer, Format(template), False, 1, 64), item, ANSWER)
    assert bare.tokens == natural_ids(model, f"{QUESTION} {ANSWER}")
    if template == "question":
        assert harness_prompt(tokenizer, Row(1, QUESTION, "", {}), []) == prompt


def test_a_text_that_begins_with_bos_gets_no_second(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm_eval's rule: `tok_encode` and `tok_batch_encode` of `lm_eval/models/huggingface.py`."""
    question = f"<s>{QUESTION}"
    expected = Tokenizer.from_file(str(model / "tokenizer.json")).encode(question, add_special_tokens=False).ids
    assert expected.count(1) == 1
    row = {"question": question, "answer": ANSWER}
    data, asked = write_rows(tmp_path / "rows.jsonl", [row]), asked_for(monkeypatch)[0]
    how = {"model": str(model), "template": "plain", "device": "cpu"}
    cli.generate(cli.GenerateOptions(question=question, max_new_tokens=1, **how))
    cli.evaluate(cli.EvalOptions(data=str(data), score="exact", max_new_tokens=1, nll=False, **how))
    (example,) = read_examples(cli.TrainOptions(data=str(data), out="", **how), model, read_config(model / "config.json"))
    assert [*asked, example.tokens[: example.prompt_length]] == [expected] * 3
    assert prompt_ids(load_tokenizer(model, 1024), Format("plain", bos=False), question) == expected


# --- BOS ------------------------------------------------------------------------------------------

DECLARED = {"add_bos_token": True}
LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}
