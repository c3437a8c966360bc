"""The command: what each command does from its options to its files, and how it says no.

What works is compared with transformers and peft. What does not work ends in one sentence, with status 2 and nothing
half written.
"""

import errno
import json
import math
import re
import resource
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, fields
from inspect import Parameter, signature
from io import BytesIO, TextIOWrapper
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from commands import MINI, asked_for, environment, flags, lfu, read_lines, refusal, subcommands, sums, write_rows
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from tiny import LENGTH, needs_folder, random_lora, random_tokens, tiny_config
from torch import Tensor

from lfu import __version__, cli, lora, methods
from lfu import checkpoints as saving
from lfu import generate as generating
from lfu.baselines.sdft import rewrite_answers
from lfu.checkpoints import checkpoints, prune_checkpoints
from lfu.cli import DistillOptions, EvalOptions, GenerateOptions, MergeOptions, TrainOptions, main, parser
from lfu.cli.main import COMMANDS, GROUPS
from lfu.data.rows import read_rows
from lfu.data.tokens import Format, encode_row, load_tokenizer, prompt_ids
from lfu.errors import InputError
from lfu.evaluation.generative import draw_shots, harness_prompt
from lfu.evaluation.nll import answer_nll
from lfu.io import files, huggingface
from lfu.io.config import read_config
from lfu.io.huggingface import fingerprint, is_same_model
from lfu.model import forward, load
from lfu.profiling.memory import peak
from lfu.schedule import Settings
from lfu.train import sft_gradient

QUESTION = "Compute 7+5."
STOPS = {"alpaca": ("### Instruction:",), "question": ("Question:",), "plain": ()}
"""Where each template's answers end."""
REQUIRED: dict[str, dict[str, str]] = {
    "train": {"model": "M", "data": "D", "out": "O"},
    "eval": {"model": "M", "data": "D"},
    "generate": {"model": "M", "question": "Q"},
    "merge": {"model": "M", "adapter": "A", "out": "O"},
    "distill": {"model": "M", "data": "D", "out": "O"},
    "plot": {"runs": ["R", "S"], "out": "O"}, "runs": {"folder": "F"}, "methods": {}, "bench": {"model": "M"},
}  # fmt: skip


def tokens_of(*texts: str) -> Tensor:
    tokenizer = load_tokenizer(MINI, 1024)
    return torch.tensor([tokenizer.backend.encode(text).ids for text in texts])


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write_rows(tmp_path / "rows.jsonl", sums(8))


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run: few steps, but long ones. To be read, not changed."""
    folder = tmp_path_factory.mktemp("trained")
    rows = write_rows(folder / "rows.jsonl", sums(12))
    options = {"template": "plain", "bos": False, "epochs": 2, "batch_size": 4, "learning_rate": 0.01, "keep": 9}
    assert lfu("train", model=MINI, data=rows, out=folder / "run", **options) == 0
    return folder / "run"


@pytest.fixture
def adapter(run: Path) -> Path:
    return run / "adapter"


# --- the command line -----------------------------------------------------------------------------


def test_no_command_is_left_out_here() -> None:
    assert REQUIRED.keys() == COMMANDS.keys()


@pytest.mark.parametrize("command", REQUIRED)
def test_help_explains_every_option(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "500")  # argparse breaks lines at hyphens too
    with pytest.raises(SystemExit) as end:
        main([command, "--help"])
    assert end.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for each in fields(COMMANDS[command][0]):
        (action,) = (action for action in subcommands()[command]._actions if action.dest == each.name)
        assert len(each.metadata["help"].split()) > 1
        assert (action.option_strings or [each.name])[0] in shown
        assert " ".join(each.metadata["help"].split()) in shown
        if type(each.default) in (int, float, str):
            assert f"(default: {each.default})" in action.help


def typed(kind: type, options: dict[str, Any]) -> list[str]:
    """Options as they are typed, positional ones first."""
    bare = [each.name for each in fields(kind) if each.metadata.get("positional")]
    first = [value for name in bare for value in ([options[name]] if isinstance(options[name], str) else options[name])]
    return [*first, *flags(**{name: value for name, value in options.items() if name not in bare})]


@pytest.mark.parametrize("command", REQUIRED)
def test_the_command_line_is_the_options_object(command: str) -> None:
    kind = COMMANDS[command][0]
    parsed = vars(parser().parse_args([command, *typed(kind, REQUIRED[command])]))
    assert parsed.pop("command") == command
    assert kind(**parsed) == kind(**REQUIRED[command])
    assert {each.name for each in fields(kind) if each.default is MISSING} == set(REQUIRED[command])


@pytest.mark.parametrize("command", [name for name, needed in REQUIRED.items() if needed])
def test_missing_options_are_named(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main([command])
    assert end.value.code == 2
    missing = capsys.readouterr().err.split("required: ")[1].strip()
    bare = [each.name for each in fields(COMMANDS[command][0]) if each.metadata.get("positional")]
    assert missing.split(", ") == [name if name in bare else f"--{name}" for name in REQUIRED[command]]


def test_the_defaults_are_those_of_the_functions() -> None:
    options = TrainOptions(**REQUIRED["train"])
    assert Settings(**{name: getattr(options, name) for name in Settings._fields}) == Settings()
    assert Format(options.template or "alpaca", options.bos is not False, options.loss_on) == Format()
    drawn, functions = DistillOptions(**REQUIRED["distill"]), signature(rewrite_answers).parameters
    shared = [name for name, each in functions.items() if each.default is not Parameter.empty]
    assert {name: getattr(drawn, name) for name in shared} == {name: functions[name].default for name in shared}
    assert shared == ["temperature", "top_k", "top_p", "max_new_tokens", "batch_size"]


def test_values_arrive_in_their_types() -> None:
    typed = ["--lambda", "5", "--alpha", "1e-3", "--layers", "1,3-4", "--limit", "7", "--no-bos", "--drop", "--resume"]
    parsed = vars(parser().parse_args(["train", *flags(**REQUIRED["train"]), *typed]))
    changed = {"lam": 5.0, "alpha": 0.001, "layers": [1, 3, 4], "limit": 7, "bos": False, "drop": True, "resume": True}
    assert {name: parsed[name] for name in changed} == changed
    assert isinstance(parsed["lam"], float)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["train", "--method", "dpo"], "argument --method: invalid choice: 'dpo'.*lfu-reps"),
        (["train", "--template", "chatml"], "argument --template: invalid choice: 'chatml'.*alpaca"),
        (["train", "--layers", "all"], "argument --layers: 'all' is not of the form 1-11"),
        (["train", "--layers", "1-1000000000"], "argument --layers: '1-1000000000' names blocks that no model has"),
        (["train", "--norm", "l1"], "argument --norm: invalid choice: 'l1'.*mean"),
        (["train", "--model", "m", "--data", "d", "--out", "o", "--lam", "4"], "unrecognized arguments: --lam 4"),
        (["train", "--rank", "8.5"], "argument --rank: invalid int value"),
        (["eval", "--score", "bleu"], "argument --score: invalid choice: 'bleu'"),
        (["generate", "--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
        (["tune"], "invalid choice: 'tune'"),
        ([], "required: command"),
    ],
)
def test_what_cannot_be_typed(typed: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(typed)
    assert end.value.code == 2
    assert re.search(sentence, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("typed", "sentence"),
    [
        (["train", "--method", "lfu_lora"], "; did you mean lfu-lora?"),
        (["trian"], "; did you mean train?"),
        (["bench", "--model", "M", "--lenght", "3"], "unrecognized arguments: --lenght 3; did you mean --length?"),
        (["runs", "F", "--colour=red"], "unrecognized arguments: --colour=red"),
    ],
)
def test_what_was_probably_meant(typed: list[str], sentence: str, capsys: pytest.CaptureFixture[str]) -> None:
    """One line, which ends in it."""
    with pytest.raises(SystemExit) as end:
        main(typed)
    assert end.value.code == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.endswith(f"{sentence}\n")


@pytest.mark.parametrize("command", REQUIRED)
def test_help_has_groups_and_examples_that_can_be_typed(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    shown = capsys.readouterr().out
    assert shown.startswith(f"usage: lfu {command} ")
    examples = [shlex.split(line) for line in COMMANDS[command].examples.splitlines()]
    assert len(examples) == 2
    for example in examples:
        assert example[0] == "lfu"
        parser().parse_args(example[1:])


def test_every_option_of_a_group_is_one() -> None:
    known = {each.name for command in COMMANDS.values() for each in fields(command.options)}
    assert set(" ".join(GROUPS.values()).split()) <= known


def test_methods_are_listed_with_their_settings(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines()}
    assert lines.keys() == methods.METHODS.keys()
    assert lines["lfu-reps"].endswith("(--alpha 0.1 --lambda 0.1 --norm mean)")
    assert all(len(line.split()) > 4 for line in lines.values())


def test_done_says_what_is_next(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": MINI, "data": data, "template": "plain", "epochs": 1, "batch_size": 4}
    for name, folder, more in (("a", "adapter", {}), ("b", "best", {"hold_back": 2})):
        assert lfu("train", out=tmp_path / name, **options, **more) == 0
        last = capsys.readouterr().out.splitlines()[-1]
        assert last == f"Next: lfu eval --model {MINI} --adapter {tmp_path / name / folder} --data TEST.jsonl"


def test_the_folder_of_a_run_is_no_adapter(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    unfinished = shutil.copytree(run, tmp_path / "unfinished")
    shutil.rmtree(unfinished / "adapter")
    empty = shutil.copytree(unfinished, tmp_path / "empty")
    shutil.rmtree(empty / "checkpoints")
    for out, advice in (
        (run, f"give {run / 'adapter'} or {run / 'checkpoints' / 'step-3'}."),
        (unfinished, f"give {unfinished / 'checkpoints' / 'step-3'} or {unfinished / 'checkpoints' / 'step-6'}."),
        (empty, "it holds no adapter yet."),
    ):
        assert lfu("eval", model=MINI, adapter=out, data=data) == 2
        assert refusal(capsys) == f"{out} is the folder of a run: {advice}"


@pytest.mark.parametrize(("told", "threads"), [(None, 1), ("2", 2)])
def test_a_small_model_takes_one_thread(
    told: str | None, threads: int, data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if told is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", told)
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert lfu("eval", model=MINI, data=data, generate=False, limit=1) == 0
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert ("OMP_NUM_THREADS" in capsys.readouterr().out) == (told is None)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["--version"])
    assert end.value.code == 0
    assert capsys.readouterr().out == f"lfu {__version__}\n"


def command(*typed: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "lfu.cli", *typed],
        capture_output=True, text=True, timeout=300, env=environment(),
    )  # fmt: skip


def test_as_a_command_of_its_own(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": MINI, "adapter": adapter, "question": QUESTION}
    assert lfu("generate", **options) == 0
    ended = command("generate", *flags(**options))
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, capsys.readouterr().out, "")


def test_as_a_command_of_its_own_that_cannot(tmp_path: Path) -> None:
    ended = command("generate", *flags(model=tmp_path, question=QUESTION))
    assert ended.returncode == 2
    assert ended.stderr == f"lfu: {tmp_path / 'config.json'} does not exist.\n"


# --- train ----------------------------------------------------------------------------------------


def test_train_from_the_command_line_and_from_python_are_the_same(data: Path, tmp_path: Path) -> None:
    settings: dict[str, Any] = {"method": "lfu-reps", "epochs": 1, "batch_size": 4, "layers": "1-3", "rank": 2}
    assert lfu("train", model=MINI, data=data, out=tmp_path / "a", **settings) == 0
    options = TrainOptions(model=str(MINI), data=str(data), out=str(tmp_path / "b"), **settings | {"layers": [1, 2, 3]})
    assert cli.train(options) == tmp_path / "b" / "adapter"
    first, second = (load_file(tmp_path / name / "adapter" / "adapter_model.safetensors") for name in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_run_holds_its_settings_its_log_and_its_adapter(run: Path) -> None:
    settings = json.loads((run / "settings.json").read_text())
    published = {"method": "lfu-lora", "alpha": 0.1, "lam": 5.0, "norm": "mean", "layers": [1, 2, 3, 4]}
    assert settings | published | {"rank": 8, "template": "plain", "bos": False} == settings
    assert settings.keys() - {each.name for each in fields(TrainOptions)} == {
        "model_fingerprint", "data_sha256", "valid_sha256", "adapter_sha256", "reference_sha256", "tokens", "lfu",
        "torch",
    }  # fmt: skip
    log = read_lines(run / "log.jsonl")
    assert [line["step"] for line in log] == [1, 2, 3, 4, 5, 6]
    assert [line["epoch"] for line in log] == [1, 1, 1, 2, 2, 2]
    assert all(math.isfinite(line[name]) for line in log for name in ("sft", "consistency", "ascent_norm", "tokens"))
    assert sorted(path.name for path in run.iterdir()) == ["adapter", "checkpoints", "log.jsonl", "settings.json"]
    assert [path.name for path in checkpoints(run)] == ["step-3", "step-6"]  # one an epoch
    assert json.loads((run / "adapter" / "lfu_config.json").read_text()) == settings
    last = run / "checkpoints" / "step-6" / "adapter_model.safetensors"
    assert (run / "adapter" / "adapter_model.safetensors").read_bytes() == last.read_bytes()


def test_train_says_what_it_takes(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*sums(4), {"question": "word " * 60, "answer": "1"}, {"question": " ", "answer": "1"}]
    write_rows(data, rows)
    options = {"epochs": 1, "max_length": 60, "template": "plain", "method": "sft"}
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", drop=True, **options) == 0
    shown = capsys.readouterr().out
    assert re.search(r"rows\.jsonl: 4 rows, \d+ tokens with loss, 2 rows left out\.", shown)
    assert re.search(r"left out: line 5: \d+ tokens are more than the maximum of 60", shown)
    assert "left out: line 6: the question or the answer is empty" in shown
    assert re.search(r"Memory: weights 3\.3 MiB \(torch\.float32\), adapter 0\.\d MiB", shown)


def test_limit_takes_the_first_rows(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_rows(data, [*sums(5), {"question": "", "answer": ""}])
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", epochs=1, limit=5, method="sft") == 0
    assert "rows.jsonl: 5 rows" in capsys.readouterr().out


def test_an_empty_folder_may_be_the_out(data: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", epochs=1, method="sft") == 0


# --- the adapter in peft --------------------------------------------------------------------------


def peft_logits(adapter: Path, tokens: Tensor) -> Tensor:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    with torch.no_grad():
        return PeftModel.from_pretrained(base, adapter).eval()(tokens).logits


def test_the_adapter_is_the_same_in_peft(adapter: Path) -> None:
    tokens = tokens_of("Question: Compute 7+5.\nAnswer: 12")
    config, base = load(MINI)
    logits = forward(config, base, tokens, [lora.load(adapter, config)])[0]
    assert float((logits - forward(config, base, tokens)[0]).abs().max()) > 1.0
    # Measured: 0, of logits up to 20.
    torch.testing.assert_close(logits, peft_logits(adapter, tokens), rtol=0, atol=1e-5)


def test_an_adapter_by_peft_is_accepted(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It holds no settings of ours, so the prompt is the default one."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(MINI, dtype=torch.float32)
    torch.manual_seed(0)
    foreign = get_peft_model(base, LoraConfig(r=3, lora_alpha=5, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in foreign.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
    foreign.save_pretrained(tmp_path / "foreign")
    tokens = tokens_of("Question: Compute 7+5.\nAnswer: 12")
    config, params = load(MINI)
    logits = forward(config, params, tokens, [lora.load(tmp_path / "foreign", config)])[0]
    # Measured: 8e-6, of logits up to 20.
    torch.testing.assert_close(logits, foreign.eval()(tokens).logits.detach(), rtol=0, atol=1e-4)

    options = EvalOptions(model=str(MINI), adapter=str(tmp_path / "foreign"), data=str(data), generate=False)
    result = cli.evaluate(options)["nll"]
    assert "template question" in capsys.readouterr().out  # as the model says: the adapter does not
    alone = cli.evaluate(EvalOptions(model=str(MINI), data=str(data), generate=False))["nll"]
    assert result.mean != pytest.approx(alone.mean, rel=1e-2)
    assert result.n == alone.n


# --- merge ----------------------------------------------------------------------------------------


def transformers_logits(folder: Path, tokens: Tensor) -> Tensor:
    from transformers import AutoModelForCausalLM

    with torch.no_grad():
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(tokens).logits


def test_merged_is_the_model_and_its_adapter(adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "merged"
    assert lfu("merge", model=MINI, adapter=adapter, out=out) == 0
    shown = capsys.readouterr().out
    said = re.search(
        rf"^{out}: merged in torch\.bfloat16\. .* change by at most (\S+), of at most (\S+)\.$", shown, re.MULTILINE
    )
    assert shown.endswith("tells lfu to ask it with --template plain --no-bos. Tell other programs.\n")

    config, base = load(MINI)
    pairs, scale = lora.load(adapter, config)
    config, merged = load(out, dtype=torch.bfloat16)
    W, (A, B) = base.layers[2].down_proj, pairs[2]["down_proj"]
    assert torch.equal(merged.layers[2].down_proj, (W + scale * B @ A).bfloat16())
    assert torch.equal(merged.embed, base.embed.bfloat16())

    tokens = torch.randint(config.vocab_size, (1, 64), generator=torch.Generator().manual_seed(0))
    bfloat16 = load(MINI, dtype=torch.bfloat16)[1]
    beside, inside = forward(config, bfloat16, tokens, [(pairs, scale)])[0], forward(config, merged, tokens)[0]
    assert said is not None
    assert float(said[1]) == pytest.approx(float((inside - beside).abs().max()), rel=1e-2)
    assert float(said[2]) == pytest.approx(float(beside.abs().max()), rel=1e-2)


def test_transformers_reads_the_merged_folder(adapter: Path, tmp_path: Path) -> None:
    from transformers import AutoConfig, AutoTokenizer

    out = tmp_path / "merged"
    assert lfu("merge", model=MINI, adapter=adapter, out=out) == 0
    assert "lm_head.weight" not in load_file(out / "model.safetensors")  # tied, as the model is
    assert AutoConfig.from_pretrained(out).dtype == torch.bfloat16
    ids = AutoTokenizer.from_pretrained(out)(QUESTION)["input_ids"]
    assert ids == tokens_of(QUESTION)[0].tolist()
    config, merged = load(out)
    logits = forward(config, merged, torch.tensor([ids]))[0]
    # Measured: 0, of logits up to 20.
    torch.testing.assert_close(logits, transformers_logits(out, torch.tensor([ids])), rtol=0, atol=1e-5)


@pytest.fixture
def tiny(folder_of: Callable[[str], Path], tmp_path: Path) -> tuple[Path, Path]:
    """A model with scaled rotary embedding and an output layer of its own, and an adapter for it."""
    path = tmp_path / "adapter"
    path.mkdir()
    lora.save(path, (random_lora(tiny_config("llama31"), 2, seed=1, dtype=torch.float32), 2.0), base="base")
    return folder_of("llama31"), path


@pytest.mark.parametrize("shard_bytes", [10**9, 20_000])
def test_a_merged_folder_is_whole_in_one_file_and_in_many(
    tiny: tuple[Path, Path], shard_bytes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, adapter = tiny
    out = tmp_path / "merged"
    monkeypatch.setattr(huggingface, "SHARD_BYTES", shard_bytes)
    assert lfu("merge", model=source, adapter=adapter, out=out) == 0
    files = sorted(out.glob("*.safetensors"))
    assert (len(files) > 3) == (shard_bytes == 20_000)
    assert all(sum(tensor.nbytes for tensor in load_file(file).values()) <= shard_bytes for file in files)
    tokens = random_tokens(tiny_config("llama31"), 2, LENGTH)
    config, base = load(source)
    beside = forward(config, base, tokens, [lora.load(adapter, config)])[0]
    config, merged = load(out)
    inside = forward(config, merged, tokens)[0]
    # Measured: 8e-6, and 0 to transformers, of logits up to 4.
    torch.testing.assert_close(inside, beside, rtol=0, atol=1e-4)
    torch.testing.assert_close(transformers_logits(out, tokens), inside, rtol=0, atol=1e-5)


def test_merged_rope_is_written_for_transformers_4_and_5(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    source, adapter = tiny
    out = tmp_path / "merged"
    assert lfu("merge", model=source, adapter=adapter, out=out) == 0
    written = json.loads((out / "config.json").read_text())
    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    }  # fmt: skip
    assert (written["rope_theta"], written["rope_scaling"]) == (5e5, scaling)
    assert written["rope_parameters"] == scaling | {"rope_theta": 5e5}
    for kept in ("rope_scaling", "rope_parameters"):  # either form alone says the same
        alone = {key: value for key, value in written.items() if kept == "rope_scaling" or key != "rope_theta"}
        alone.pop({"rope_scaling": "rope_parameters", "rope_parameters": "rope_scaling"}[kept])
        (tmp_path / "config.json").write_text(json.dumps(alone))
        assert read_config(tmp_path / "config.json") == tiny_config("llama31")


@pytest.fixture
def source(tiny: tuple[Path, Path], tmp_path: Path) -> Path:
    """The same model, to be changed."""
    return shutil.copytree(tiny[0], tmp_path / "source")


def test_each_merged_tensor_keeps_its_dtype(
    tiny: tuple[Path, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(source / "model.safetensors")
    before["model.embed_tokens.weight"] = before["model.embed_tokens.weight"].bfloat16()
    save_file(before, source / "model.safetensors")
    (tmp_path / "zero").mkdir()
    lora.save(tmp_path / "zero", (random_lora(tiny_config("llama31"), 2, seed=1, std=0.0), 2.0), base="base")
    for adapter, most in ((tmp_path / "zero", 0.0), (tiny[1], 1e-4)):
        out = tmp_path / f"merged with {adapter.name}"
        assert lfu("merge", model=source, adapter=adapter, out=out) == 0
        said = re.search(r"merged in torch.bfloat16 and torch.float32\..* at most (\S+), of", capsys.readouterr().out)
        assert said is not None
        assert float(said[1]) <= most
        after = load_file(out / "model.safetensors")
        assert all(tensor.dtype == before[name].dtype for name, tensor in after.items())
        assert all(torch.equal(before[name], after[name]) for name in before) == (most == 0)
        assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


def test_a_merged_weight_beyond_its_dtype_is_refused(
    tiny: tuple[Path, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = load_file(source / "model.safetensors")
    save_file({name: tensor.half() for name, tensor in tensors.items()}, source / "model.safetensors")
    settings = tiny[1] / "adapter_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"lora_alpha": 1e7}))
    assert lfu("merge", model=source, adapter=tiny[1], out=tmp_path / "merged") == 2
    sentence = rf"{tiny[1]} merged into {source}: \S+layers\.0\.\S+ holds values that are not finite.*"
    assert re.fullmatch(sentence, refusal(capsys))
    assert not (tmp_path / "merged").exists()


CARRIED = ["vocab.json", "merges.txt", "chat_template.jinja", "additional_chat_templates/tools.jinja"]


def test_a_merged_folder_has_all_that_transformers_reads(
    tiny: tuple[Path, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (source / "additional_chat_templates").mkdir()
    for name in [*CARRIED, "thesis.txt"]:
        (source / name).write_text(name)
    out = tmp_path / "merged"
    assert lfu("merge", model=source, adapter=tiny[1], out=out) == 0
    assert {name: (out / name).read_text() for name in CARRIED} == {name: name for name in CARRIED}
    assert not (out / "thesis.txt").exists()
    assert capsys.readouterr().out.endswith(f"{source} has no tokenizer.json, and so {out} has none.\n")


def test_merge_follows_no_link_out_of_the_folder(
    tiny: tuple[Path, Path], source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights alone may lie elsewhere, and the files of the hub's cache in its blobs."""
    cached = tmp_path / "models--org--name" / "snapshots" / "0"
    cached.parent.mkdir(parents=True)
    source.rename(cached)
    for name, place in (("config.json", cached.parents[1] / "blobs"), ("model.safetensors", tmp_path)):
        place.mkdir(exist_ok=True)
        (cached / name).rename(place / name)
        (cached / name).symlink_to(place / name)
    assert lfu("merge", model=cached, adapter=tiny[1], out=tmp_path / "merged") == 0
    assert not (tmp_path / "merged" / "config.json").is_symlink()
    (tmp_path / "secret").write_text("{}")
    (cached / "notes.json").symlink_to(tmp_path / "secret")
    assert lfu("merge", model=cached, adapter=tiny[1], out=tmp_path / "other") == 2
    assert refusal(capsys) == f"{cached}/notes.json is a link that leads out of its folder: put the file itself there."
    assert not (tmp_path / "other").exists()


# --- eval and generate ----------------------------------------------------------------------------


def test_predictions_are_written_with_their_scores(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [row | {"level": level} for level, row in enumerate(sums(6, first=3))]
    data = write_rows(tmp_path / "test.jsonl", rows)
    out = tmp_path / "new" / "predictions.jsonl"
    options = {"model": str(MINI), "adapter": str(adapter), "data": str(data), "out": str(out), "score": "exact"}
    results = cli.evaluate(EvalOptions(**options, max_new_tokens=8, batch_size=4))
    lines = sorted(read_lines(out), key=lambda line: line["row"])
    assert [line["row"] for line in lines] == [1, 2, 3, 4, 5, 6]
    assert [{key: line[key] for key in rows[0]} for line in lines] == rows
    assert [line["exact"] for line in lines] == [line["prediction"].strip() == line["answer"] for line in lines]
    assert all(isinstance(line["finished"], bool) for line in lines)
    for line in lines:
        answer = cli.generate(
            GenerateOptions(model=str(MINI), adapter=str(adapter), question=line["question"], max_new_tokens=8)
        )
        assert answer == line["prediction"]
    hits = [line["exact"] for line in lines]
    assert results["exact"].mean == sum(hits) / 6
    assert results.keys() == {"nll", "exact"}
    shown = capsys.readouterr().out
    assert f"exact: {100 * sum(hits) / 6:.2f} % ± " in shown
    assert f"nll: {results['nll'].mean:.4f} ± {results['nll'].error:.4f} nats per answer token" in shown


@pytest.mark.parametrize(
    ("given", "format"),
    [
        ({}, Format("plain", False)),
        ({"bos": True}, Format("plain", True)),
        ({"template": "question"}, Format("question", False)),
        ({"template": "alpaca", "bos": True}, Format()),
    ],
)
def test_the_prompt_is_the_adapters_own_unless_given(
    adapter: Path, tmp_path: Path, given: dict[str, Any], format: Format, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, stops = asked_for(monkeypatch)
    data = write_rows(tmp_path / "test.jsonl", sums(3))
    own = {"model": str(MINI), "adapter": str(adapter), "max_new_tokens": 2, **given}
    tokenizer = load_tokenizer(MINI, 1024)
    cli.generate(GenerateOptions(**own, question=QUESTION))
    assert asked == [prompt_ids(tokenizer, format, QUESTION)]
    cli.evaluate(EvalOptions(**own, data=str(data), nll=False))
    assert asked[1:] == [prompt_ids(tokenizer, format, row["question"]) for row in sums(3)]
    assert stops == [STOPS[format.template]] * 2
    config, base = load(MINI)
    examples = [encode_row(tokenizer, format, row) for row in read_rows(data)]
    expected = answer_nll(config, base, examples, [lora.load(adapter, config)])
    found = cli.evaluate(EvalOptions(**own, data=str(data), generate=False))["nll"]
    assert (found.mean, found.n) == (pytest.approx(expected.mean, rel=1e-6), expected.n)


def test_the_harness_prompt_with_worked_examples(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked, stops = asked_for(monkeypatch)
    data = write_rows(tmp_path / "test.jsonl", sums(3))
    pool = write_rows(tmp_path / "train.jsonl", sums(6))
    given = {"data": data, "prompt": "harness", "shots": 2, "shots_data": pool, "seed": 7, "max_new_tokens": 2}
    assert lfu("eval", model=MINI, nll=False, **given) == 0
    tokenizer, shots = load_tokenizer(MINI, 1024), read_rows(pool)
    assert asked == [harness_prompt(tokenizer, row, draw_shots(shots, 2, 7, row)) for row in read_rows(data)]
    assert stops == [("Question:", "</s>", "<|im_end|>")]
    assert "(n = 3; harness prompt, 2-shot, greedy, at most 2 new tokens)" in capsys.readouterr().out


def test_eval_limit_and_columns(tmp_path: Path) -> None:
    rows = [{"prompt": row["question"], "target": row["answer"]} for row in sums(5)]
    data = write_rows(tmp_path / "test.jsonl", rows)
    options = EvalOptions(
        model=str(MINI), data=str(data), question="prompt", answer="target", limit=3, max_new_tokens=2, nll=False
    )
    assert {name: value.n for name, value in cli.evaluate(options).items()} == {"strict": 3, "flexible": 3}


def test_refusals_and_words_in_common(tmp_path: Path) -> None:
    """Requests that mini refuses, or not; without an answer column, and with several answers in one."""
    asked = read_lines(MINI / "safe" / "test.jsonl")[:6]
    requests = write_rows(tmp_path / "requests.jsonl", [{"question": row["question"]} for row in asked])
    golds = write_rows(tmp_path / "golds.jsonl", [row | {"answer": [row["answer"], "I'm sorry."]} for row in asked])
    out = tmp_path / "predictions.jsonl"
    shared = {"model": str(MINI), "template": "question", "max_new_tokens": 16}
    (name, value), *_ = cli.evaluate(EvalOptions(**shared, data=str(requests), score="refusal", out=str(out))).items()
    lines = read_lines(out)
    assert [line["jailbroken"] for line in lines] == ["I'm sorry" not in line["prediction"] for line in lines]
    assert (name, value.mean) == ("jailbroken", sum(line["jailbroken"] for line in lines) / 6)
    common = cli.evaluate(EvalOptions(**shared, data=str(golds), score="f1"))
    assert common.keys() == {"em", "f1"}
    assert 0 < common["f1"].mean < 1


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"layers": "9"}, r"Consistency layers must be block numbers from 1 to 4, .*not \[9\]"),
        ({"layers": "0-2"}, "Consistency layers must be block numbers from 1 to 4"),
        ({"alpha": -1}, "alpha must be at least 0 and finite, not -1.0"),
        ({"lambda": -1}, "lambda must be at least 0 and finite, not -1.0"),
        ({"method": "sft", "alpha": 0.1}, "The method sft has no alpha"),
        ({"method": "sft", "lambda": 1, "layers": "1"}, "The method sft has no lambda or layers"),
        ({"epochs": 0}, "epochs must be more than 0, not 0"),
        ({"learning_rate": "inf"}, "learning-rate must be at least 0 and finite, not inf"),
        ({"rank": 0}, "rank must be at least 1, not 0"),
        ({"lora_alpha": 0}, "lora-alpha must be more than 0 and finite, not 0.0"),
        ({"lora_alpha": "nan"}, "lora-alpha must be more than 0 and finite, not nan"),
        ({"keep": 0}, "keep must be at least 1, not 0"),
        ({"save_every": -1}, "save-every must be at least 1, not -1"),
        ({"limit": -1}, "limit must be at least 1, not -1"),
        ({"device": "abacus"}, "The device 'abacus' cannot be used here"),
        ({"device": "hpu"}, r"The device 'hpu' cannot be used here: .{,100}\.$"),
        ({"device": "meta"}, r"The device 'meta' cannot be used here: .{,100}\.$"),
        ({"limit": 2**63}, r"limit must be less than 2\^63, not 9223372036854775808"),
        ({"rank": 10**18}, "Storage size calculation overflowed .* What helps: "),
        ({"out": "\udce9"}, r"--out is not UTF-8 text without NUL: '\\udce9'"),
        ({"question": "a\0"}, r"--question is not UTF-8 text without NUL: 'a\\x00'"),
        ({"batch_size": 0}, "batch-size must be more than 0"),
        ({"warmup": 2}, "warmup is a share of the steps, from 0 to 1, not 2.0"),
        ({"max_length": 9}, r"rows\.jsonl, line 1: \d+ tokens are more than the maximum of 9\. .*--drop"),
        ({"max_length": 9, "drop": True}, r"rows\.jsonl: no usable rows; line 1: "),
        ({"question": "prompt"}, r"rows\.jsonl, line 1: no column 'prompt'; the row has 'question', 'answer'"),
        ({"model": "nowhere"}, "nowhere is neither a folder nor a hub id"),
    ],
)
def test_train_refuses_settings(
    data: Path, tmp_path: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert lfu("train", **{"model": MINI, "data": data, "out": out} | changes) == 2
    assert re.match(rf".*{sentence}", refusal(capsys))
    assert not out.exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"batch_size": 0}, "batch-size must be at least 1, not 0"),
        ({"max_new_tokens": 0}, "max-new-tokens must be at least 1, not 0"),
        ({"limit": 0}, "limit must be at least 1, not 0"),
        ({"shots": -1}, "shots must be at least 0, not -1"),
    ],
)
def test_eval_refuses_counts(
    data: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lfu("eval", **{"model": MINI, "data": data} | changes) == 2
    assert refusal(capsys) == f"{sentence}."


def test_nothing_to_continue(capsys: pytest.CaptureFixture[str]) -> None:
    assert lfu("generate", model=MINI, template="plain", bos=False, question="") == 2
    assert refusal(capsys).startswith("--question: the question is empty, and neither template nor BOS")


def test_a_row_without_a_prompt_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = write_rows(tmp_path / "test.jsonl", [*sums(1), {"question": "", "answer": "#### 4"}])
    options = {"model": MINI, "data": data, "out": tmp_path / "out.jsonl"}
    assert lfu("eval", template="plain", bos=False, **options) == 2
    assert refusal(capsys).startswith(f"{data}, line 2: the question is empty")
    assert not (tmp_path / "out.jsonl").exists()
    assert lfu("eval", template="plain", bos=True, max_new_tokens=2, **options) == 0


GOOD = json.dumps(sums(1)[0])


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (None, r"The data file \S+rows\.jsonl does not exist"),
        ("", "holds no rows"),
        (f"{GOOD}\n{GOOD[:-2]}\n", "line 2: not valid JSON"),
        (f'{GOOD}\n{{"question": "Why?"}}\n', "line 2: no column 'answer'"),
        (f'{GOOD}\n{{"question": "Why?", "answer": 4}}\n', "line 2: column 'answer' must be a string, not 4"),
        (f'{GOOD}\n{{"question": "Why?", "answer": ""}}\n', "line 2: the question or the answer is empty"),
        (f'{GOOD}\n{{"question": "A </s>?", "answer": "B"}}\n', "line 2: the text itself contains .* </s>"),
    ],
)
def test_train_refuses_data(
    data: Path, tmp_path: Path, content: str | None, sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    data.unlink() if content is None else data.write_text(content)
    assert lfu("train", model=MINI, data=data, out=out) == 2
    assert re.search(sentence, refusal(capsys))
    assert not out.exists()


def test_train_refuses_a_tokenizer_larger_than_the_model(
    data: Path, folder_of: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = tmp_path / "model", tmp_path / "run"
    shutil.copytree(folder_of("llama2"), model)
    shutil.copyfile(MINI / "tokenizer.json", model / "tokenizer.json")
    assert lfu("train", model=model, data=data, out=out) == 2
    assert re.search(r"line 1: the text has the token id \d+, but .* vocabulary holds 80\.", refusal(capsys))
    assert not out.exists()


def test_broken_weights_leave_the_folder_free_for_the_next_try(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, out = shutil.copytree(MINI, tmp_path / "model"), tmp_path / "run"
    (model / "model.safetensors").write_bytes((MINI / "model.safetensors").read_bytes()[:-1])
    options = {"model": model, "data": data, "out": out, "epochs": 1, "method": "sft"}
    assert lfu("train", **options) == 2
    assert "model.safetensors is not a complete safetensors file" in refusal(capsys)
    assert not out.exists()
    shutil.copyfile(MINI / "model.safetensors", model / "model.safetensors")
    out.mkdir()
    assert lfu("train", **options) == 0


def test_train_refuses_a_folder_in_use(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.txt").write_text("mine")
    assert lfu("train", model=MINI, data=data, out=out) == 2
    assert refusal(capsys) == f"{out} is not empty. Choose another --out, or continue the run in it with --resume."
    assert [path.name for path in out.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize("name", ["model", "data", "adapter", "out"])
def test_an_unset_shell_variable_is_no_path(name: str, data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert lfu("eval", **({"model": MINI, "data": data} | {name: ""})) == 2
    assert refusal(capsys) == f"--{name} is empty, as if from an unset shell variable: give a path."


def test_float16_is_not_compiled(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"model": MINI, "data": data, "out": tmp_path / "run", "dtype": "float16", "compile": True}
    assert lfu("train", **options) == 2
    assert refusal(capsys).startswith("--compile does not work in float16: leave it out")
    assert not (tmp_path / "run").exists()


def test_an_empty_adapter_is_not_none(data: Path) -> None:
    with pytest.raises(InputError, match=r"adapter_config\.json does not exist"):
        cli.evaluate(EvalOptions(model=str(MINI), data=str(data), adapter=""))


@pytest.mark.parametrize("command", ["eval", "generate", "merge"])
def test_an_adapter_of_another_model_is_refused(
    command: str, tiny: tuple[Path, Path], data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = {"eval": {"data": data}, "generate": {"question": QUESTION}, "merge": {}}[command]
    out = None if command == "generate" else tmp_path / "out"
    assert lfu(command, model=MINI, adapter=tiny[1], out=out, **own) == 2
    assert re.search(r"lacks 14 tensors that its configuration implies: \S+layers\.3\.", refusal(capsys))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", ["eval", "generate", "merge"])
def test_an_adapter_of_other_weights_is_refused(
    command: str, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A sibling of the same shape, such as the instruction-tuned model, would run and answer nonsense."""
    sibling = tmp_path / "sibling"
    shutil.copytree(MINI, sibling, ignore=shutil.ignore_patterns("*.jsonl"))
    tensors = load_file(sibling / "model.safetensors")
    save_file(tensors | {"model.norm.weight": 2 * tensors["model.norm.weight"]}, sibling / "model.safetensors")
    own = {"eval": {"data": data}, "generate": {"question": QUESTION}, "merge": {"out": tmp_path / "out"}}[command]
    assert lfu(command, model=sibling, adapter=adapter, **own) == 2
    assert re.search(r"was trained on .*mini, whose files differ from those of .*sibling", refusal(capsys))
    assert not (tmp_path / "out").exists()


def test_a_model_without_its_tokenizer_cannot_be_compared(tmp_path: Path) -> None:
    shutil.copy(MINI / "config.json", tmp_path)
    with pytest.raises(InputError, match=r"tokenizer\.json does not exist: a model folder holds"):
        fingerprint(tmp_path)


@pytest.mark.parametrize("name", ["template", "bos", "model_fingerprint"])
def test_an_adapter_that_does_not_know_its_training_is_refused(
    name: str, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(adapter, tmp_path / "adapter") / "lfu_config.json"
    path.write_text(json.dumps({key: value for key, value in json.loads(path.read_text()).items() if key != name}))
    assert lfu("eval", model=MINI, adapter=path.parent, data=data) == 2
    assert refusal(capsys) == f"{path} must name the template, the bos and the model_fingerprint of the training."


@pytest.mark.parametrize("changes", [{"bos": "false"}, {"template": ["plain"]}, {"loss_on": {}}])
def test_an_adapter_whose_settings_are_of_another_kind_is_refused(
    changes: dict, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = shutil.copytree(adapter, tmp_path / "adapter") / "lfu_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    assert lfu("eval", model=MINI, adapter=path.parent, data=data) == 2
    assert refusal(capsys).startswith(f"{path}: template, loss_on and bos are ")


def test_a_change_in_the_middle_of_a_file_is_another_model(tmp_path: Path) -> None:
    """Of a tensor as a whole, wherever it lies; the first and the last mebibyte do not tell."""
    shutil.copy(MINI / "config.json", tmp_path)
    shutil.copy(MINI / "tokenizer.json", tmp_path)
    tensors = {name: torch.zeros(2**18) for name in "abcdefgh"} | {"small": torch.zeros(3), "empty": torch.zeros(0)}
    save_file(tensors, tmp_path / "model.safetensors")
    before = fingerprint(tmp_path)
    assert before == fingerprint(tmp_path)
    for name in "cdef":
        save_file(tensors | {name: torch.ones(2**18)}, tmp_path / "model.safetensors")
        assert fingerprint(tmp_path)[:64] == before[:64]
        assert not is_same_model(before, fingerprint(tmp_path))
        assert is_same_model(before[:64], fingerprint(tmp_path))


def test_what_version_0_1_0_stored_of_the_model_still_counts(
    run: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first of the two checksums, in a run that is resumed and in an adapter."""
    old = shutil.copytree(run, tmp_path / "run")
    for path in (old / "settings.json", old / "adapter" / "lfu_config.json"):
        stored = json.loads(path.read_text())
        path.write_text(json.dumps(stored | {"model_fingerprint": stored["model_fingerprint"].partition(":")[0]}))
    settings = json.loads((old / "settings.json").read_text())
    assert len(settings["model_fingerprint"]) == 64
    options = {each.name: settings[each.name] for each in fields(TrainOptions)} | {"out": str(old), "resume": True}
    cli.train(TrainOptions(**options))
    assert lfu("eval", model=MINI, data=data, adapter=old / "adapter", max_new_tokens=1, limit=1) == 0


def test_files_that_are_not_read_do_not_make_another_model(tmp_path: Path) -> None:
    """Whole clones of some models hold the weights twice; a download by their name brings them once."""
    clone = tmp_path / "clone"
    shutil.copytree(MINI, clone, ignore=shutil.ignore_patterns("*.jsonl"))
    shutil.copy(clone / "model.safetensors", clone / "consolidated.safetensors")
    assert fingerprint(clone) == fingerprint(MINI)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"nll": False, "generate": False}, "--no-generate and --no-nll together leave nothing to do"),
        ({"generate": False, "out": "p.jsonl"}, "--out is for predictions; with --no-generate there are none"),
        ({"prompt": "harness", "generate": False}, "--prompt harness is for generated answers; with --no-generate"),
        ({"shots": 2}, "Worked examples belong to the harness prompt"),
        ({"shots": 2, "prompt": "harness"}, "Worked examples need a file to be drawn from"),
    ],
)
def test_eval_refuses_options_without_effect(
    data: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lfu("eval", **{"model": MINI, "data": data} | changes) == 2
    assert refusal(capsys).startswith(sentence)


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("full"), RuntimeError("can't allocate memory: 9 bytes")])
def test_out_of_memory_names_the_batch_and_what_helps(
    error: RuntimeError, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(config: Any, base: Any, task: Any, batch: Any, **named: Any) -> Any:
        if len(batch.tokens) > 1:
            raise error
        return sft_gradient(config, base, task, batch, **named)

    monkeypatch.setattr(methods, "sft_gradient", full)
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", method="sft") == 2
    message = capsys.readouterr().err
    assert re.search(r"Step 1: out of memory in a batch of 4 x \d+ tokens, the rows of lines \[\d+, ", message)
    assert (
        "What helps: --remat (also with --resume), in a new run: --dtype bfloat16 (unless the weights are in it), "
        "a lower --max-length, a lower" in message
    )


def test_out_of_memory_while_decoding_names_what_helps_there(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*given: Any, **named: Any) -> Any:
        raise torch.OutOfMemoryError("full.")

    monkeypatch.setattr(generating, "generate", full)
    assert lfu("eval", model=MINI, data=data, nll=False, dtype="bfloat16") == 2
    assert refusal(capsys) == "full. What helps: a lower --batch-size."


def test_a_terminal_that_knows_only_ascii_is_enough(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", terminal)
    assert lfu("eval", model=MINI, data=data, score="exact", generate=False) == 0
    assert rb" \xb1 " in terminal.buffer.getvalue()


def test_what_was_measured_is_printed_at_once(
    data: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Here generation fails after the likelihood."""

    def interrupted(*given: Any, **named: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(generating, "generate", interrupted)
    assert lfu("eval", model=MINI, data=data) == 130
    assert re.search(r"^  nll: \d", capsys.readouterr().out, re.MULTILINE)


def test_remat_trains_the_same_adapter(data: Path, tmp_path: Path) -> None:
    for name, options in {"plain": {}, "remat": {"remat": True}}.items():
        assert lfu("train", model=MINI, data=data, out=tmp_path / name, epochs=2, **options) == 0
    plain, remat = (tensors_in(tmp_path / name / "adapter") for name in ("plain", "remat"))
    assert all(torch.equal(plain[name], remat[name]) for name in plain)


@pytest.mark.parametrize("method", methods.METHODS)
def test_the_expected_peak_is_the_peak(
    method: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    peaks, gradient = [], methods.METHODS[method].gradient

    def measured(*arguments: Any, **bound: Any) -> Any:
        results = []
        peaks.append(peak(lambda: results.append(gradient(*arguments, **bound))))
        return results[0]

    monkeypatch.setitem(methods.METHODS, method, methods.METHODS[method]._replace(gradient=measured))
    given = needs_folder(method, read_config(MINI / "config.json"), tmp_path)
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", method=method, epochs=1, **given) == 0
    told = re.search(r"A micro-batch of 4 x \d+ tokens is expected to take (\d+) MiB", capsys.readouterr().out)
    assert told
    assert 0.8 < float(told[1]) * 2**20 / max(peaks) < 1.2


@pytest.mark.parametrize("command", ["eval", "merge"])
def test_what_exists_is_not_overwritten(
    command: str, adapter: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    out.write_text("old")
    assert lfu(command, model=MINI, adapter=adapter, out=out, data=data if command == "eval" else None) == 2
    assert re.match(rf"{out} exists already; .*[Cc]hoose another --out\.", refusal(capsys))
    assert out.read_text() == "old"


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "harness", "shots": 5}, "Worked examples need a file to be drawn from: give --shots-data"),
        (
            {"prompt": "harness", "shots": 8, "shots_data": "."},
            "8 worked examples for line 1 cannot be drawn: of 8 rows 7 ask something else",
        ),
        ({"prompt": "harness", "shots": 1, "shots_data": ".", "seed": -1}, "seed must be at least 0, not -1"),
        ({"seed": 1}, "--shots-data and --seed are without effect as long as --shots is 0"),
        ({"out": "rows.jsonl/predictions.jsonl"}, r"rows\.jsonl is not a folder that may be written in"),
        ({"adapter": "nowhere"}, r"nowhere/adapter_config\.json does not exist"),
        ({"answer": "target"}, "line 1: no column 'target'"),
    ],
)
def test_eval_refuses(
    data: Path, tmp_path: Path, changes: dict[str, Any], sentence: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = data.parent / changes.get("out", "predictions.jsonl")
    changes |= {"out": out} | ({"shots_data": data} if "shots_data" in changes else {})
    assert lfu("eval", model=MINI, data=data, **changes) == 2
    assert re.search(sentence, refusal(capsys))
    assert not out.exists()


# --- what goes wrong on the way -------------------------------------------------------------------


def tensors_in(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


@pytest.mark.parametrize("where", ["gradient", "loss"])
def test_what_is_not_finite_ends_the_run_at_its_last_good_step(
    where: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = {"model": MINI, "data": data, "method": "sft", "batch_size": 4, "micro_batch_size": 2, "save_every": 1}
    assert lfu("train", out=tmp_path / "sound", keep=9, **options) == 0
    calls, sft = [], methods.sft

    def poisoned(*arguments: Any, **bound: Any) -> Any:
        gradient, metrics = sft(*arguments, **bound)
        calls.append(arguments)
        if len(calls) == 8:  # the second micro-batch of the third step, after two calls that predict the memory
            metrics = {"sft": metrics["sft"] * math.nan} if where == "loss" else metrics
            gradient[0]["q_proj"].B.mul_(math.inf if where == "gradient" else 1.0)
        return gradient, metrics

    monkeypatch.setitem(methods.METHODS, "sft", methods.Spec(poisoned, {}))
    out = tmp_path / "run"
    assert lfu("train", out=out, **options) == 2
    sentence = refusal(capsys)
    lines = re.match(
        r"Step 3: the loss or its gradient is not finite \(sft \S+\) for the rows of lines (\[.*?\])\.", sentence
    )
    assert lines is not None
    shown = load_tokenizer(MINI, 1024).backend.decode_batch(calls[7][3].tokens.tolist())
    rows = json.loads(lines[1])
    assert len(rows) == 2
    assert all(f"Compute {row}+{row}." in text for row, text in zip(rows, shown, strict=True))
    assert "No update was made. Lower the learning rate" in sentence
    assert [path.name for path in checkpoints(out)] == ["step-2"]
    kept, expected = (tensors_in(run / "checkpoints" / "step-2") for run in (out, tmp_path / "sound"))
    assert all(torch.equal(kept[name], expected[name]) for name in expected)
    assert len(read_lines(out / "log.jsonl")) == 2
    assert not (out / "adapter").exists()


def test_a_run_that_explodes_says_so(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = {"batch_size": 4, "learning_rate": 1e30, "epochs": 3}
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", **options) == 2
    assert re.match(r"Step 3: the loss or its gradient is not finite \(sft nan, consistency nan", refusal(capsys))


def test_a_last_step_that_explodes_leaves_no_adapter(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def explode(optimizer: torch.optim.Optimizer) -> None:
        optimizer.param_groups[0]["params"][0][0] = math.inf

    monkeypatch.setattr(torch.optim.AdamW, "step", explode)
    assert lfu("train", model=MINI, data=data, out=tmp_path / "run", method="sft", epochs=1, limit=4) == 2
    assert re.match(r"adapter_model\.safetensors: \S+ holds values that are not finite", refusal(capsys))
    assert {path.name for path in (tmp_path / "run").rglob("*")} == {"settings.json", "log.jsonl", "checkpoints"}


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """While this holds, the system refuses to let a file grow beyond `size` bytes."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def tree(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.parametrize(
    ("failure", "sentence"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (SafetensorError("I/O error: No space left on device"), r"could not be written: .*Is the disk full\?"),
        (None, r"could not be written: .*File too large.*Is the disk full\?"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    failure: Exception | None, sentence: str, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """The disk is full, by the library's word or by the system's, when the second checkpoint is written."""
    options = {"model": MINI, "data": data, "method": "sft", "batch_size": 4, "save_every": 1, "epochs": 1}
    out, keep_last = tmp_path / "run", prune_checkpoints
    before: dict[str, bytes] = {}

    def after_the_first(run: Path, count: int) -> None:
        keep_last(run, count)
        before.update(tree(run / "checkpoints"))
        if failure is None:
            limit.enter_context(file_size_limit(100_000))
        else:
            monkeypatch.setattr(files, "save_file", refuse)

    def refuse(*_: Any, **__: Any) -> None:
        raise failure

    monkeypatch.setattr(saving, "prune_checkpoints", after_the_first)
    with ExitStack() as limit:
        status = lfu("train", out=out, **options)
    assert status == 2
    assert re.search(sentence, refusal(capsys))
    assert before.keys() == {
        f"step-1/{name}" for name in
        ("adapter_config.json", "adapter_model.safetensors", "lfu_config.json", "optimizer.safetensors", "state.json")
    }  # fmt: skip
    assert tree(out / "checkpoints") == before
    monkeypatch.undo()
    assert lfu("train", out=out, resume=True, **options) == 0


def test_a_full_disk_leaves_no_half_of_a_merged_model(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with file_size_limit(100_000):
        status = lfu("merge", model=MINI, adapter=adapter, out=tmp_path / "merged")
    assert status == 2
    assert re.search(r"could not be written: .*Is the disk full\?", refusal(capsys))
    assert not list(tmp_path.iterdir())


def test_merge_looks_for_room_first(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=10**6))
    assert lfu("merge", model=MINI, adapter=adapter, out=tmp_path / "merged") == 2
    assert re.fullmatch(r"\S+/merged needs \S+ GB, but only \S+ GB are free there\.", refusal(capsys))
    assert not list(tmp_path.iterdir())


def test_merge_from_python(adapter: Path, tmp_path: Path) -> None:
    options = MergeOptions(model=str(MINI), adapter=str(adapter), out=str(tmp_path / "merged"))
    assert cli.merge(options) == tmp_path / "merged"
