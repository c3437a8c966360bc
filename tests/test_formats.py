"""A model that says in its lfu_config.json how it is asked: read by every command, written by `lfu merge`."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, asked_for, lfu, refusal, sums, write_rows

from lfu import cli
from lfu.cli import EvalOptions, GenerateOptions, MergeOptions, TrainOptions
from lfu.data.tokens import Format, load_tokenizer, prompt_ids
from lfu.io.huggingface import fingerprint

QUICK: dict[str, Any] = {"method": "sft", "rank": 2, "epochs": 1, "batch_size": 2}
BOTH = "instruction+answer"


def made_for(folder: Path, said: dict[str, Any] | None) -> Path:
    """The repository's model, saying this of itself."""
    shutil.copytree(MINI, folder, ignore=shutil.ignore_patterns("*/", "lfu_config.json"))
    if said is not None:
        (folder / "lfu_config.json").write_text(json.dumps(said))
    return folder


@pytest.mark.parametrize(
    ("said", "given", "form"),
    [
        (None, {}, Format()),
        ({"template": "question"}, {}, Format("question")),
        ({"template": "plain", "bos": False}, {}, Format("plain", False)),
        ({"template": "plain", "bos": False}, {"bos": True}, Format("plain")),
        ({"template": "question"}, {"template": "plain"}, Format("plain")),
    ],
)
def test_a_model_is_asked_as_it_says(
    said: dict[str, Any] | None, given: dict[str, Any], form: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    model, data = made_for(tmp_path / "model", said), write_rows(tmp_path / "rows.jsonl", sums(2))
    choices = write_rows(tmp_path / "choices.jsonl", [{"question": "Why?", "choices": ["1", "2"], "answer": 0}])
    asked, _ = asked_for(monkeypatch)
    common = {"model": str(model), **given}
    cli.generate(GenerateOptions(**common, question=sums(1)[0]["question"], max_new_tokens=1))
    cli.evaluate(EvalOptions(**common, data=str(data), max_new_tokens=1, limit=1))
    cli.evaluate(EvalOptions(**common, data=str(choices), score="choices"))
    cli.train(TrainOptions(**common, data=str(data), out=str(tmp_path / "run"), **QUICK))
    assert asked == [prompt_ids(load_tokenizer(MINI, 1024), form, sums(1)[0]["question"])] * 2
    settings = json.loads((tmp_path / "run" / "settings.json").read_text())
    assert Format(*(settings[name] for name in Format._fields)) == form
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("The model was made for")]
    other = said is not None and said["template"] != form.template
    assert lines == ["The model was made for the template question; plain is used."] * 4 * other


def test_a_merged_model_is_asked_as_its_adapter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data, trained = write_rows(tmp_path / "rows.jsonl", sums(2)), {"template": "plain", "bos": False, "loss_on": BOTH}
    common = {"data": str(data), **QUICK}
    adapter = cli.train(TrainOptions(model=str(MINI), out=str(tmp_path / "run"), **common, **trained))
    merged = cli.merge(MergeOptions(model=str(MINI), adapter=str(adapter), out=str(tmp_path / "merged")))
    asked, _ = asked_for(monkeypatch)
    for options in ({"model": str(MINI), "adapter": str(adapter)}, {"model": str(merged)}):
        cli.generate(GenerateOptions(**options, question="Why not?", max_new_tokens=1))
    assert asked == [prompt_ids(load_tokenizer(MINI, 1024), Format(**trained), "Why not?")] * 2
    again = cli.train(TrainOptions(model=str(merged), out=str(tmp_path / "again"), **common))
    settings = json.loads((again / "lfu_config.json").read_text())
    assert (settings["template"], settings["bos"], settings["loss_on"]) == ("plain", False, "answer")


def test_a_run_that_is_resumed_keeps_its_template(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Begun before its model said anything, and without --template."""
    model, data = made_for(tmp_path / "model", None), write_rows(tmp_path / "rows.jsonl", sums(2))
    options = {"model": model, "data": data, "out": tmp_path / "run", **QUICK}
    assert lfu("train", **options) == 0
    adapter = (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run" / "adapter")
    shutil.copy(MINI / "lfu_config.json", model)
    assert fingerprint(model) == fingerprint(MINI)
    assert lfu("train", **options, resume=True) == 0
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() == adapter
    capsys.readouterr()
    assert lfu("train", **options, resume=True, template="question") == 2
    assert "template was 'alpaca' and is 'question'" in refusal(capsys)


@pytest.mark.parametrize(
    ("said", "sentence"),
    [
        ({}, "must name a template: alpaca, question, plain, chat."),
        ({"templat": "question"}, "must name a template: alpaca, question, plain, chat."),
        ({"template": "llama"}, "template, loss_on and bos are ['llama', 'answer', True]: lfu knows no such format."),
        ({"template": "plain", "bos": "no"}, "template, loss_on and bos are ['plain', 'answer', 'no']: lfu knows no"),
        ({"template": "chat", "system": 7}, "system must be a string or null, not 7."),
    ],
)
def test_what_no_model_can_say(
    said: dict[str, Any], sentence: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, data = made_for(tmp_path / "model", said), write_rows(tmp_path / "rows.jsonl", sums(2))
    for command, options in (("generate", {"question": "Why?"}), ("train", {"data": data, "out": tmp_path / "run"})):
        assert lfu(command, model=model, **options) == 2
        said_of_it = refusal(capsys)
        assert said_of_it.startswith(f"{model / 'lfu_config.json'}")
        assert sentence in said_of_it
