"""A run's folder: who may write into it, what it resumes from, what spoils neither; and a run without the command."""

import json
import os
import shutil
import signal
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, cut_to, lfu, read_lines, refusal, uneven_sums, write_rows

from lfu import Format, bind, encode_rows, init, load, load_tokenizer, methods, read_rows, train_run
from lfu.checkpoints import checkpoints
from lfu.io.files import sha256, write_json, write_tensors
from lfu.runs import lock
from lfu.schedule import Settings

TRAIN = {
    "model": MINI, "template": "plain", "rank": 2, "learning_rate": 0.01, "batch_size": 4, "micro_batch_size": 2,
    "epochs": 2, "method": "sft",
}  # fmt: skip
"""20 rows, so 10 steps."""


def adapter(out: Path) -> bytes:
    return (out / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("rows") / "rows.jsonl", uneven_sums(20))


@pytest.fixture(scope="module")
def finished(rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with a checkpoint after each step. To be read, not changed."""
    out = tmp_path_factory.mktemp("finished") / "run"
    assert lfu("train", data=rows, out=out, save_every=1, keep=10, **TRAIN) == 0
    return out


@pytest.fixture
def stopped(finished: Path, tmp_path: Path) -> Path:
    """The same run, stopped after step 4."""
    return cut_to(finished, tmp_path / "run", 4)


def resume(out: Path, rows: Path) -> int:
    return lfu("train", data=rows, out=out, resume=True, save_every=1, keep=10, **TRAIN)


# --- without the command --------------------------------------------------------------------------


def in_a_notebook(out: Path, rows: Path, **options: Any) -> Path:
    config, base = load(MINI, dtype=torch.float32)
    tokenizer = load_tokenizer(MINI, config.vocab_size)
    examples, _ = encode_rows(rows, read_rows(rows), tokenizer, Format("plain"))
    settings = Settings(epochs=2, batch_size=4, micro_batch_size=2, learning_rate=0.01)
    adapter = init(config, 2, generator=torch.Generator().manual_seed(42)), 8.0
    return train_run(out, config, base, adapter, examples, bind("sft", config, scale=8.0)[0], settings, **options)


def test_a_run_in_a_notebook_is_that_of_the_command(finished: Path, rows: Path, tmp_path: Path) -> None:
    assert in_a_notebook(tmp_path / "run", rows, decay=0.9) == tmp_path / "run" / "adapter"
    assert adapter(tmp_path / "run") == adapter(finished)
    assert [line["step"] for line in read_lines(tmp_path / "run" / "log.jsonl")] == list(range(1, 11))
    assert (tmp_path / "run" / "ema" / "adapter_model.safetensors").is_file()


def test_it_is_stopped_and_resumed_there(
    finished: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, compute = [], methods.METHODS["sft"].gradient

    def computing(*arguments: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 7:
            signal.raise_signal(signal.SIGINT)
        return compute(*arguments, **options)

    with monkeypatch.context() as patch:
        patch.setitem(methods.METHODS, "sft", methods.METHODS["sft"]._replace(gradient=computing))
        with pytest.raises(KeyboardInterrupt, match="Stopped after step 4 of 10"):
            in_a_notebook(tmp_path / "run", rows, save_every=100)
    with pytest.raises(ValueError, match="is not empty"):
        in_a_notebook(tmp_path / "run", rows)
    in_a_notebook(tmp_path / "run", rows, resume=True)
    assert adapter(tmp_path / "run") == adapter(finished)


# --- one writer -----------------------------------------------------------------------------------


def test_a_folder_has_one_writer(rows: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Neither a second start nor a resumption beside a living run; the lock itself leaves nothing."""
    for out, again in ((stopped, True), (tmp_path / "new", None)):
        with lock(out):
            assert lfu("train", data=rows, out=out, resume=again, **TRAIN) == 2
        assert refusal(capsys).startswith(f"{out} is in use: process {os.getpid()} trains into it.")
    assert not any((tmp_path / "new").iterdir())
    assert resume(stopped, rows) == 0


def test_a_checkpoint_of_another_run_is_refused(
    rows: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lfu("train", data=rows, out=tmp_path / "other", **TRAIN | {"seed": 1}) == 0
    copied = shutil.copytree(tmp_path / "other" / "checkpoints" / "step-10", stopped / "checkpoints" / "step-10")
    assert resume(stopped, rows) == 2
    assert refusal(capsys).startswith(f"{copied} is a checkpoint of another run: seed was 1 and is 42.")


# --- what spoils nothing --------------------------------------------------------------------------


def test_leftovers_are_no_run_and_do_not_stay(rows: Path, finished: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    (out / "lost+found").mkdir(parents=True)
    (out / "adapter.12.tmp").mkdir()
    for name in (".DS_Store", "settings.json.12.tmp", "mine.tmp"):
        (out / name).touch()
    assert lfu("train", data=rows, out=out, **TRAIN) == 0
    assert adapter(out) == adapter(finished)
    left = {path.name for path in out.iterdir()}
    assert left == {".DS_Store", "lost+found", "mine.tmp", "settings.json", "log.jsonl", "checkpoints", "adapter"}


def foreign(out: Path) -> None:
    (out / "checkpoints" / "x.tmp").touch()
    (out / "checkpoints" / "step-9").symlink_to(out / "checkpoints" / "step-2")
    (out / "checkpoints" / "step-0").mkdir()
    (out / "checkpoints" / "step-8").touch()


DAMAGES = {
    "nothing": b"", "half a line": b'{"step": 3, "sft', "no object": b"[]\n3\nnull\n", "no step": b'{"sft": 1}\n',
    "a word as step": b'{"step": "four"}\n', "bytes": b"\xff\xfe\n", "deep": b"[" * 100_000 + b"\n",
    "no number": b'{"step": NaN}\n{"step": Infinity}\n{"step": true}\n{"step": -5}\n',
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_log_stops_no_run(
    damage: str, rows: Path, stopped: Path, finished: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    first = (stopped / "log.jsonl").read_bytes().splitlines(keepends=True)[0]
    (stopped / "log.jsonl").write_bytes(first + DAMAGES[damage])
    assert resume(stopped, rows) == 0
    assert "log.jsonl lacks 3 of the 4 steps before" in capsys.readouterr().out
    assert [line["step"] for line in read_lines(stopped / "log.jsonl")] == [1, *range(5, 11)]
    assert adapter(stopped) == adapter(finished)


def test_foreign_entries_are_no_checkpoints(rows: Path, stopped: Path, finished: Path) -> None:
    foreign(stopped)
    assert [path.name for path in checkpoints(stopped)] == [f"step-{step}" for step in range(1, 5)]
    for name in ("step-9", "step-0", "step-8"):
        path = stopped / "checkpoints" / name
        path.rmdir() if name == "step-0" else path.unlink()
    assert resume(stopped, rows) == 0
    assert adapter(stopped) == adapter(finished)


def test_nobody_needs_to_see_the_progress(
    rows: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def write(self, text: str = "") -> None:
            raise OSError(28, "No space left on device")

        flush = write

    monkeypatch.setattr(sys, "stderr", Full())
    assert lfu("train", data=rows, out=tmp_path / "run", **TRAIN) == 0
    assert adapter(tmp_path / "run") == adapter(finished)


# --- what is refused ------------------------------------------------------------------------------


def test_a_link_is_no_folder_of_checkpoints(
    rows: Path, stopped: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = (stopped / "checkpoints").rename(tmp_path / "elsewhere")
    (stopped / "checkpoints").symlink_to(elsewhere)
    assert resume(stopped, rows) == 2
    assert "checkpoints is not of this run" in refusal(capsys)
    assert len(list(elsewhere.iterdir())) == 4


@pytest.mark.parametrize("step", [True, 0, 99, -5, 3])
def test_a_checkpoint_says_the_step_of_its_folder(
    step: Any, rows: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    log, path = (stopped / "log.jsonl").read_bytes(), checkpoints(stopped)[-1] / "state.json"
    write_json(path, json.loads(path.read_text()) | {"step": step})
    assert resume(stopped, rows) == 2
    assert refusal(capsys).startswith(str(path))
    assert (stopped / "log.jsonl").read_bytes() == log


@pytest.mark.parametrize("tensors", [{}, {"0.step": torch.ones(()), "0.exp_avg": torch.ones(3)}])
def test_moments_that_are_missing_do_not_start_anew(
    tensors: dict[str, torch.Tensor], rows: Path, stopped: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = checkpoints(stopped)[-1]
    write_tensors(folder / "optimizer.safetensors", tensors)
    state = json.loads((folder / "state.json").read_text())
    state["sha256"]["optimizer.safetensors"] = sha256(folder / "optimizer.safetensors")
    write_json(folder / "state.json", state)
    assert resume(stopped, rows) == 2
    assert "optimizer.safetensors does not hold the moments of this adapter" in refusal(capsys)


def test_every_tensor_file_has_its_checksum(rows: Path, stopped: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_tensors(checkpoints(stopped)[-1] / "method.safetensors", {"vectors": torch.ones(2)})
    assert resume(stopped, rows) == 2
    assert "method.safetensors is damaged" in refusal(capsys)


def test_a_run_whose_folder_is_gone_makes_no_other(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    calls, compute, out = [], methods.METHODS["sft"].gradient, tmp_path / "run"

    def computing(*arguments: Any, **options: Any) -> Any:
        calls.append(len(arguments[3].tokens) > 1)  # a row alone is how a run predicts its memory
        if sum(calls) == 5:
            out.rename(tmp_path / "moved")
        return compute(*arguments, **options)

    monkeypatch.setitem(methods.METHODS, "sft", methods.METHODS["sft"]._replace(gradient=computing))
    assert lfu("train", data=rows, out=out, save_every=1, **TRAIN) == 2
    assert "was moved or removed while the run went on" in refusal(capsys)
    assert not out.exists()
    monkeypatch.undo()
    assert resume(tmp_path / "moved", rows) == 0


def test_distill_goes_on_from_before_its_first_answer(tmp_path: Path) -> None:
    """Stopped between the options' file and the first row, it can be resumed, and started anew."""
    data = write_rows(tmp_path / "rows.jsonl", uneven_sums(2))
    options = {"model": MINI, "data": data, "max_new_tokens": 2, "recipe": "general"}
    assert lfu("distill", out=tmp_path / "whole.jsonl", **options) == 0
    for resume in (True, None):
        out = tmp_path / f"{resume}.jsonl"
        shutil.copy(tmp_path / "whole.jsonl.json", f"{out}.json")
        assert lfu("distill", out=out, resume=resume, **options) == 0
        assert out.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
