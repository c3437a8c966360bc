"""`lfu eval` on odd rows, and its --out: no column of the data is lost, every line is JSON, and a run that was cut off
is continued by the same command."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from commands import MINI, asked_for, lfu, read_lines, refusal, sums, write_rows

from lfu import generate as generating
from lfu.data.tokens import Format, load_tokenizer, prompt_ids
from lfu.evaluation import loglikelihood as likelihood

CHOICES = {"question": "Where?", "choices": ["Vesh", "Tarn"], "answer": 1, "labels": [0, 1]}
SCORES: dict[str, dict[str, Any]] = {
    "gsm8k": {
        "data": [row | {"answer": f"#### {row['answer']}"} for row in sums(6)],
        "max_new_tokens": 4,
        "nll": False,
    },
    "f1": {"data": sums(6), "max_new_tokens": 4},
    "choices": {"data": [CHOICES | {"question": f"Where is {n}?"} for n in range(6)]},
    "perplexity": {"data": [{"text": f"Compute {n}."} for n in range(6)]},
}


def evaluated(folder: Path, score: str, **options: Any) -> int:
    """In batches of two rows."""
    how = SCORES[score] | {"out": folder / "out.jsonl", "score": score, "batch_size": 2} | options
    return lfu("eval", model=MINI, **how | {"data": write_rows(folder / "rows.jsonl", how["data"])})


# --- continuing -----------------------------------------------------------------------------------


def cut_off(monkeypatch: pytest.MonkeyPatch, after: int) -> None:
    """Both kinds of score are interrupted after so many rows."""

    def some(function: Any) -> Any:
        def results(*given: Any, **options: Any) -> Iterator[Any]:
            for number, result in enumerate(function(*given, **options)):
                if number == after:
                    raise KeyboardInterrupt
                yield result

        return results

    monkeypatch.setattr(generating, "generate", some(generating.generate))
    monkeypatch.setattr(likelihood, "likelihoods", some(likelihood.likelihoods))


def scores_printed(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("  ")]


@pytest.mark.parametrize("score", SCORES)
def test_the_same_command_continues_an_evaluation_that_was_cut_off(
    score: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert evaluated(tmp_path, score) == 0
    out, printed = tmp_path / "out.jsonl", scores_printed(capsys)
    whole = out.read_bytes()
    out.unlink()
    with monkeypatch.context() as patched:
        cut_off(patched, after=4)
        assert evaluated(tmp_path, score) == 130
    assert len(read_lines(out)) == 4
    with out.open("a") as file:
        file.write('{"question": "half a li')
    asked = asked_for(monkeypatch)[0]
    capsys.readouterr()
    assert evaluated(tmp_path, score) == 0
    assert scores_printed(capsys) == printed
    assert out.read_bytes() == whole
    assert len(asked) == (2 if "max_new_tokens" in SCORES[score] else 0)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.jsonl", "rows.jsonl"]
    assert evaluated(tmp_path, score) == 2  # what is finished is not overwritten
    assert "exists already" in refusal(capsys)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"max_new_tokens": 5}, "max-new-tokens was 4 and is 5"),
        ({"template": "question"}, "template was None and is 'question'"),
        ({"data": [*SCORES["gsm8k"]["data"], {"question": "1?", "answer": "1"}]}, "the data file differs"),
    ],
)
def test_another_evaluation_is_not_continued(
    changes: dict[str, Any],
    sentence: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    with monkeypatch.context() as patched:
        cut_off(patched, after=2)
        assert evaluated(tmp_path, "gsm8k") == 130
    before = (tmp_path / "out.jsonl").read_bytes()
    capsys.readouterr()
    assert evaluated(tmp_path, "gsm8k", **changes) == 2
    assert f"holds part of another evaluation: {sentence}" in refusal(capsys)
    assert (tmp_path / "out.jsonl").read_bytes() == before
    assert evaluated(tmp_path, "gsm8k") == 0


# --- lines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("score", "column"),
    [("gsm8k", "row"), ("gsm8k", "strict"), ("f1", "prediction"), ("choices", "acc"), ("perplexity", "words")],
)
def test_a_column_of_the_data_is_not_overwritten(
    score: str, column: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [SCORES[score]["data"][0] | {column: "mine"}]
    assert evaluated(tmp_path, score, data=rows) == 2
    assert f"line 1: --out has a column {column!r} of its own; rename that of the data." in refusal(capsys)
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]
    assert evaluated(tmp_path, score, data=rows, out=None) == 0


def test_a_row_is_one_line_for_every_reader(tmp_path: Path) -> None:
    odd = "one\u2028two\u2029three\x85four"
    assert evaluated(tmp_path, "f1", data=[row | {"note": odd} for row in sums(2)]) == 0
    lines = (tmp_path / "out.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["note"] for line in lines] == [odd, odd]


# --- odd rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer", ["#### 5 ", "#### 5%", "#### 1e3", "5 eggs"])
def test_references_that_no_number_equals_can_be_left_out(
    answer: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [*SCORES["gsm8k"]["data"][:2], {"question": "How many?", "answer": answer}]
    assert evaluated(tmp_path, "gsm8k", data=rows) == 2
    assert "line 3: the score gsm8k compares numbers" in (said := refusal(capsys))
    assert said.endswith("Rows like this one can be left out with --drop.")
    assert evaluated(tmp_path, "gsm8k", data=rows, drop=True) == 0
    shown = capsys.readouterr().out
    assert "(n = 2;" in shown
    assert f"left out: {tmp_path / 'rows.jsonl'}, line 3: the score gsm8k" in shown
    assert [row["row"] for row in read_lines(tmp_path / "out.jsonl")] == [1, 2]


def test_if_every_row_is_left_out_there_is_nothing_to_score(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert evaluated(tmp_path, "gsm8k", data=[{"question": "?", "answer": "x"}], drop=True) == 2
    assert refusal(capsys).endswith("rows.jsonl: no usable rows.")


# --- as long as the model was made for ------------------------------------------------------------


def small_model(folder: Path, positions: int) -> Path:
    """The repository's model, made for fewer positions."""
    folder.mkdir()
    for path in MINI.glob("*.*"):
        (folder / path.name).symlink_to(path)
    (folder / "config.json").unlink()
    config = json.loads((MINI / "config.json").read_text()) | {"max_position_embeddings": positions}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_what_is_longer_than_the_model_was_made_for_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    question = sums(1)[0]["question"]
    length = len(prompt_ids(load_tokenizer(MINI, 1024), Format("question"), question))
    model, data = small_model(tmp_path / "model", length + 4), write_rows(tmp_path / "rows.jsonl", sums(1))
    fitting, longer = {"max_new_tokens": 4}, {"max_new_tokens": 5}
    commands: dict[str, tuple[dict[str, Any], str]] = {
        "generate": ({"question": question}, "--question"),
        "eval": ({"data": data, "score": "f1"}, f"{data}, line 1"),
    }
    for name, (options, where) in commands.items():
        assert lfu(name, model=model, **options, **fitting) == 0
        assert lfu(name, model=model, **options, **longer) == 2
        said = f"{where}: a prompt of {length} tokens and 5 new ones are more than the model's max_position_embeddings"
        assert refusal(capsys).startswith(said)
    assert lfu("eval", model=small_model(tmp_path / "less", length), data=data, score="exact", generate=False) == 2
    assert "are more than the model's max_position_embeddings" in refusal(capsys)
    assert lfu("train", model=small_model(tmp_path / "least", length), data=data, out=tmp_path / "run") == 2
    assert "are more than the model's max_position_embeddings" in refusal(capsys)


def test_what_the_harness_would_obey_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = small_model(tmp_path / "model", 512)
    (model / "generation_config.json").unlink()
    config = {
        "repetition_penalty": 1.1,
        "no_repeat_ngram_size": 3,
        "num_beams": 1,
        "temperature": 0.6,
        "eos_token_id": 1,
    }
    (model / "generation_config.json").write_text(json.dumps(config))
    data = write_rows(tmp_path / "rows.jsonl", SCORES["gsm8k"]["data"])
    options = {"data": data, "max_new_tokens": 1, "nll": False}
    said = "would obey generation_config.json's repetition_penalty, no_repeat_ngram_size; lfu does not."
    for prompt in ("harness", "own"):
        assert lfu("eval", model=model, prompt=prompt, **options) == 0
        assert (said in capsys.readouterr().err) == (prompt == "harness")
