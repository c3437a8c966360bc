"""One rule for tokens: what is trained on, asked and scored is the natural text, BOS once, on tokenizers of every kind.

A text's own tokens are what the `tokenizers` library makes of the whole of it. Each kind of tokenizer is built here
with every character of the texts as a token, and tokens for a word with the space before it: an answer that gets a
space too many, or a prompt that loses its own, shows.
"""

import json
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, asked_for, lfu, refusal, write_rows
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from lfu import cli
from lfu.cli.train import choose_format, read_examples
from lfu.data.rows import Row
from lfu.data.tokens import TEMPLATES, Format, load_tokenizer, prompt_ids
from lfu.evaluation.generative import harness_prompt
from lfu.evaluation.loglikelihood import EncodingOptions, encode_pair, read_choices

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
    "metaspace, first": lambda: sentencepiece(
        bpe(), None, pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    ),
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
        (example,) = read_examples(
            options, choose_format(options, model), str(data), model, load_tokenizer(model, 1024)
        )
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
    options = cli.TrainOptions(data=str(data), out="", **how)
    (example,) = read_examples(options, choose_format(options, model), str(data), model, load_tokenizer(model, 1024))
    assert [*asked, example.tokens[: example.prompt_length]] == [expected] * 3
    assert prompt_ids(load_tokenizer(model, 1024), Format("plain", bos=False), question) == expected


# --- BOS ------------------------------------------------------------------------------------------

LLAMA = {"tokenizer_class": "LlamaTokenizerFast"}


@pytest.mark.parametrize(
    ("puts", "config", "asked", "bos"),
    [
        (True, {}, None, (1,)),
        (True, {}, True, (1,)),
        (True, {"add_bos_token": True}, None, (1,)),
        (True, LLAMA, None, (1,)),
        (True, {"add_bos_token": False}, True, (1,)),
        (False, {}, None, ()),
        (False, {}, True, (1,)),  # the declared one
        (False, {"add_bos_token": False}, None, ()),
        (False, LLAMA | {"add_bos_token": False}, None, ()),
        (False, {"add_bos_token": True}, True, (1,)),
        (False, {"add_bos_token": True}, False, ()),
        (False, {"add_bos_token": True, "bos_token": None}, None, ()),  # transformers, too, puts none
    ],
)
def test_bos_is_that_of_the_folder_or_that_which_is_asked_for(
    puts: bool, config: dict[str, Any], asked: bool | None, bos: tuple[int, ...], tmp_path: Path
) -> None:
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False), puts, **config)
    assert load_tokenizer(folder, 1024, asked).bos == bos


@pytest.mark.parametrize(
    ("puts", "config", "says"),
    [
        (
            False,
            {"add_bos_token": True},
            "no BOS before a text, but add_bos_token in tokenizer_config.json is true",
        ),
        (False, LLAMA, "no BOS before a text, but add_bos_token in tokenizer_config.json is true"),
        (
            True,
            {"add_bos_token": False},
            "a BOS before a text, but add_bos_token in tokenizer_config.json is false",
        ),
        (True, {"add_bos_token": "no"}, "add_bos_token must be true or false, not 'no'"),
    ],
)
def test_files_that_disagree_about_bos_are_refused(
    puts: bool, config: dict[str, Any], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False), puts, **config)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    commands: dict[str, dict[str, Any]] = {
        "train": {"data": data, "out": tmp_path / "run"},
        "eval": {"data": data, "score": "exact"},
        "generate": {"question": QUESTION},
    }
    for name, options in commands.items():
        assert lfu(name, model=folder, **options) == 2
        assert says in refusal(capsys)
    assert not (tmp_path / "run").exists()


def test_a_bos_that_no_file_names_cannot_be_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False), False, bos_token=None)
    assert lfu("generate", model=folder, question=QUESTION, bos=True) == 2
    assert "there is no BOS token to put before a text. Leave out --bos." in refusal(capsys)
    assert lfu("generate", model=folder, question=QUESTION, max_new_tokens=1) == 0


# --- what a run records ---------------------------------------------------------------------------


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A model folder whose files disagree about BOS, and a run in it with --bos."""
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False), False, add_bos_token=True)
    data = write_rows(tmp_path / "rows.jsonl", [{"question": QUESTION, "answer": ANSWER}])
    options = {"model": folder, "data": data, "out": tmp_path / "run", "method": "sft", "epochs": 1, "bos": True}
    assert lfu("train", **options) == 0
    return folder, options


def test_an_adapter_is_asked_with_the_bos_of_its_training(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, asked = tmp_path / "run" / "adapter", asked_for(monkeypatch)[0]
    tokens = json.loads((adapter / "lfu_config.json").read_text())["tokens"]
    assert tokens == {"bos": [1], "eos": 2, "stops": [1, 2]}  # 1 is the eos_token_id of mini's config.json
    for bos in (None, False):
        assert lfu("generate", model=trained[0], adapter=adapter, question=QUESTION, bos=bos, max_new_tokens=1) == 0
    assert asked[0] == [1, *asked[1]]
    assert lfu("train", **trained[1], resume=True) == 0


@pytest.mark.parametrize(
    ("file", "change", "sentence"),
    [
        ("tokenizer_config.json", {"eos_token": "<s>"}, "eos was 2 and is 1"),
        ("generation_config.json", {"eos_token_id": [2, 7]}, "stops was [1, 2] and is [1, 2, 7]"),
        ("tokenizer_config.json", {"bos_token": "</s>"}, "bos was [1] and is [2]"),
    ],
)
def test_other_special_tokens_than_those_of_the_training_are_refused(
    file: str,
    change: dict[str, Any],
    sentence: str,
    trained: tuple[Path, dict[str, Any]],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, options = trained
    path, adapter = folder / file, tmp_path / "run" / "adapter"
    path.write_text(json.dumps((json.loads(path.read_text()) if path.exists() else {}) | change))
    capsys.readouterr()
    assert lfu("generate", model=folder, adapter=adapter, question=QUESTION) == 2
    assert sentence in refusal(capsys)
    assert lfu("train", **options | {"out": tmp_path / "more", "adapter": adapter}) == 2
    assert sentence in refusal(capsys)
    assert lfu("train", **options, resume=True) == 2
    assert "holds another run: tokens was" in refusal(capsys)


def test_what_version_0_1_0_wrote_resumes_and_loads(
    trained: tuple[Path, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for path in (tmp_path / "run").rglob("*.json"):
        settings = json.loads(path.read_text())
        settings.pop("tokens", None)
        path.write_text(json.dumps(settings))
    folder, options = trained
    adapter = tmp_path / "run" / "adapter"
    assert lfu("generate", model=folder, adapter=adapter, question=QUESTION, bos=True, max_new_tokens=1) == 0
    assert lfu("generate", model=folder, adapter=adapter, question=QUESTION, max_new_tokens=1) == 2
    assert "Choose with --bos or --no-bos" in refusal(capsys)
    assert lfu("train", **options, resume=True) == 0


# --- tokenizers that fail -------------------------------------------------------------------------


def without_vocabulary() -> Tokenizer:
    return Tokenizer(models.BPE())


def without_unknown() -> Tokenizer:
    return Tokenizer(models.WordLevel({"b": 0}, unk_token="?"))


def with_endless_expression() -> Tokenizer:
    made = byte_level(add_prefix_space=False)
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"(a+)+b"), "isolated")
    return made


def with_many_tokens_first(count: int = 1000) -> Tokenizer:
    made = byte_level(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(single="<s> " * count + "$A", special_tokens=[("<s>", 1)])
    return made


def with_token_beyond() -> Tokenizer:
    made = byte_level(add_prefix_space=False)
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 5000)])
    return made


def multiplying(place: str) -> Tokenizer:
    made = byte_level(add_prefix_space=False)
    if place == "normalizer":
        made.normalizer = normalizers.Sequence([normalizers.Replace("a", "aaaa")] * 12)
    elif place == "pre_tokenizer":
        made.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.ByteLevel()] * 12)
    else:
        made.decoder = decoders.Sequence([decoders.Replace("a", "aaaa")] * 12)
    return made


@pytest.mark.parametrize(
    ("made", "sentence"),
    [
        (without_vocabulary, r"tokenizer\.json cannot tokenise a text: "),
        (without_unknown, r"tokenizer\.json cannot tokenise a text: "),
        (
            with_many_tokens_first,
            r"tokenizer\.json puts the tokens \(1, 1, 1.{60,80} before a text, which are not one BOS",
        ),
        (with_token_beyond, r"tokenizer\.json puts the tokens \(5000,\) before a text, which are not one BOS"),
        (partial(multiplying, "normalizer"), r"tokenizer\.json: its replacements can make a text more than 100 times"),
        (partial(multiplying, "pre_tokenizer"), r"tokenizer\.json: its replacements can make a text more than 100"),
        (partial(multiplying, "decoder"), r"tokenizer\.json: its replacements can make a text more than 100 times"),
        (with_endless_expression, r"--question: \S+/tokenizer\.json fails at the text 'aaa.{60,90}: "),
    ],
    ids=lambda each: getattr(each, "__name__", None),
)
def test_a_tokenizer_that_fails_is_named(
    made: Callable[[], Tokenizer], sentence: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    tokenizer = made()
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False), False)
    tokenizer.add_special_tokens(["</s>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    assert lfu("generate", model=folder, question="a" * 300, template="plain", max_new_tokens=1) == 2
    said = capfd.readouterr().err.splitlines()[-1]
    assert re.search(sentence, said)
    assert len(said) < 400


def test_a_post_processor_that_names_no_token_is_named(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = model_folder(tmp_path / "model", byte_level(add_prefix_space=False))
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    spec["post_processor"]["special_tokens"] = {}
    path.write_text(json.dumps(spec))
    assert lfu("generate", model=folder, question=QUESTION) == 2
    assert f"lfu: {path} " in capfd.readouterr().err.splitlines()[-1]
