"""The experiment on a real model, run on the miniature one: what is trained, scored, chosen and shown."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import MINI, sums, uneven_sums, write_rows

from experiments import smollm2, smollm2_runs
from experiments.smollm2_runs import FORMS, TOPICS, Paths, load_world, run_all
from lfu import model
from lfu.data.tokens import Format, encode_row
from lfu.errors import InputError
from lfu.io.files import read_json, write_json
from lfu.lora import load as load_adapter
from lfu.runs import read_history

SMALL: dict[str, Any] = {
    "TEST_ROWS": 4,
    "CURVE_ROWS": 2,
    "MATCH_ROWS": 2,
    "PROMPT_ROWS": 2,
    "HELD_BACK": slice(32, 36),
    "WINDOW": 16,
    "WINDOWS": 2,
    "TOPICS": TOPICS[:1],
    "FORMS": FORMS[:3],
    "REGIMES": {"small": {"limit": 32, "epochs": 5, "learning_rate": 0.1, "save_every": 2, "keep": 9}},
}


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
    folder = tmp_path_factory.mktemp("smollm2")
    write_rows(folder / "train.jsonl", uneven_sums(36))
    write_rows(folder / "test.jsonl", sums(6))
    (folder / "text").write_text("The sea is wide. " * 40)
    return Paths(MINI, folder, folder / "text", folder / "runs")


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setattr(smollm2_runs, name, value)
    monkeypatch.setattr(smollm2, "REGIMES", SMALL["REGIMES"])


@pytest.fixture
def out(paths: Paths) -> Path:
    run_all(paths, ["base", "small-sft-42", "small-sft_stopped-42"])
    return paths.out


def test_the_base_model_has_not_drifted_and_what_is_trained_has(out: Path) -> None:
    base, tuned = (read_json(out / name / "scores.json") for name in ("base", "small-sft-42"))
    assert base["drift"]["mean"] == base["drift"]["error"] == 0
    assert tuned["drift"]["mean"] > 0.01
    assert {name: base[name]["n"] for name in base} == {name: tuned[name]["n"] for name in tuned}


def test_drift_is_the_divergence_of_the_distributions(paths: Paths, out: Path) -> None:
    world, last = load_world(paths), out / "small-sft-42" / "adapter"
    total, tokens = 0.0, 0
    for example in world.drift:
        given = torch.tensor([example.tokens])
        base, tuned = (
            model.forward(world.config, world.base, given, adapters)[0][0, example.prompt_length - 1 : -1].softmax(-1)
            for adapters in ([], [load_adapter(last, world.config)])
        )
        total += float((base * (base / tuned).log()).sum())
        tokens += len(base)
    drift = read_json(out / "small-sft-42" / "scores.json")["drift"]
    assert drift["n"] == tokens
    assert drift["mean"] == pytest.approx(total / tokens, rel=1e-5)


def test_the_size_of_the_states_is_taken_where_an_answer_is_predicted_and_in_whole_rows(
    paths: Paths, out: Path
) -> None:
    world, answers, rows = load_world(paths), [], []
    for row in world.held:
        example = encode_row(world.tokenizer, Format(), row)
        hidden = torch.stack(model.forward(world.config, world.base, torch.tensor([example.tokens]))[1])[:, 0, :-1]
        answers.append(hidden[:, example.prompt_length - 1 :].square())
        rows.append(hidden.square())
    sizes = read_json(out / "base" / "squares.json")
    assert sizes["answers"] == pytest.approx(torch.cat(answers, 1).mean((1, 2)).tolist())
    assert sizes["rows"] == pytest.approx(torch.cat(rows, 1).mean((1, 2)).tolist())


def test_a_run_that_is_stopped_is_scored_at_the_step_that_is_best_on_the_rows_held_back(
    paths: Paths, out: Path
) -> None:
    run = out / "small-sft_stopped-42"
    step = read_json(run / "best" / "lfu_config.json")["best_step"]
    history = dict(read_history(run / "log.jsonl"))
    assert step == min(history, key=history.__getitem__)
    assert read_json(run / "held.json")["nll"]["mean"] == pytest.approx(history[step], rel=1e-5)
    whole = read_json(out / "small-sft-42" / "scores.json")
    assert read_json(run / "scores.json").keys() == whole.keys() - {"strict", "flexible"}


@pytest.mark.parametrize("epochs, stages", [(20, 5), (3, 3)])
def test_anchored_learning_takes_as_many_steps_from_the_run_before(
    epochs: int, stages: int, paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(smollm2_runs.REGIMES["small"], "epochs", epochs)
    options = smollm2_runs.options_of(paths, "small-anchored-42")
    assert (options.stages, options.epochs) == (stages, epochs // stages)
    assert Path(options.reference or "") == paths.out / "small-sft_stopped-42" / "adapter"


def test_twice_the_steps_are_twice_the_epochs(paths: Paths) -> None:
    once, twice = (smollm2_runs.options_of(paths, f"small-{name}-42") for name in ("sft_stopped", "sft_twice"))
    assert twice.epochs == 2 * once.epochs == 2 * SMALL["REGIMES"]["small"]["epochs"]


def test_a_run_that_cannot_be_made_does_not_keep_the_others_from_being_made(paths: Paths, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"small-anchored-42: .*does not exist"):
        run_all(replace(paths, out=tmp_path), ["small-anchored-42", "base"])
    assert (tmp_path / "base" / "scores.json").is_file()


def test_a_text_too_short_to_score_is_refused(paths: Paths, tmp_path: Path) -> None:
    (tmp_path / "text").write_text("The sea is wide.")
    with pytest.raises(InputError, match=r"tokens; 32 are scored\."):
        load_world(replace(paths, wikitext=tmp_path / "text"))


def test_a_second_time_nothing_is_scored_again(paths: Paths, out: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")}
    run_all(paths, ["base", "small-sft-42", "small-sft_stopped-42"])
    assert {path: path.stat().st_mtime_ns for path in out.glob("*/*.json")} == before


def test_a_run_with_other_settings_is_not_taken_for_this_one(
    paths: Paths, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(smollm2_runs.REGIMES["small"], "learning_rate", 0.01)
    with pytest.raises(InputError, match=r"learning-rate was 0\.1 and is 0\.01\."):
        run_all(paths, ["small-sft-42"])


def test_what_is_gathered_has_every_setting_and_run(out: Path) -> None:
    data = smollm2.gathered(out)
    assert list(data["small"]) == ["base", "sft", "sft_stopped"]
    tuned = read_json(out / "small-sft-42" / "scores.json")
    assert data["small"]["sft"]["nll"] == {
        "mean": tuned["nll"]["mean"],
        "error": tuned["nll"]["error"],
        "by_seed": {"42": tuned["nll"]["mean"]},
    }
    assert data["small"]["base"]["strict"]["mean"] == 100 * read_json(out / "base" / "scores.json")["strict"]["mean"]
    curve = data["curves"]["small-sft-42"]
    assert curve["nll"]["2"] == read_json(out / "small-sft-42" / "nll-step-2.json")["nll"]["mean"]
    assert list(curve["nll"]) == list(curve["held"]) == list(curve["drift"]) == ["2", "4", "6", "8", "10"]
    assert (curve["held"]["10"], curve["drift"]["10"]) == tuple(
        data["small"]["sft"][name]["mean"] for name in ("held", "drift")
    )
    assert list(data["curves"]["small-sft_stopped-42"]["valid"]) == ["0", "4", "8", "10"]
    assert curve["gradient"] > 0


def test_the_page_has_a_row_for_each_setting_and_measurement(out: Path) -> None:
    text = smollm2.page(smollm2.gathered(out))
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("|")]
    tuned = read_json(out / "small-sft-42" / "scores.json")["nll"]
    assert ["SFT", f"{tuned['mean']:.3f} ± {tuned['error']:.3f}"] in [row[:2] for row in rows]
    along = read_json(out / "small-sft-42" / "nll-step-2.json")["nll"]["mean"]
    assert f"{along:.3f}" in [cell for row in rows if row[0] == "SFT, seed 42" for cell in row]
    assert [row[0] for row in rows[-2:]] == ["answers", "rows"]
    assert "nan" not in text
    assert smollm2.LABELS.keys() == {"base", "stopped", *smollm2_runs.SETTINGS}


def test_gathering_replaces_what_is_known_and_keeps_the_rest() -> None:
    old = {"about": 1, "small": {"sft": 1, "lora": 1}, "curves": {"small-sft-42": 1}}
    new = {"small": {"sft": 2}, "full": {"sft": 2}, "curves": {"full-sft-42": 2}}
    assert smollm2.merged(old, new) == {
        "about": 1,
        "small": {"sft": 2, "lora": 1},
        "full": {"sft": 2},
        "curves": {"small-sft-42": 1, "full-sft-42": 2},
    }


def test_differences_from_sft_are_paired_by_seed(tmp_path: Path) -> None:
    for name, nll in {
        "sft-42": 1.0,
        "sft-43": 2.0,
        "lora-42": 0.9,
        "lora-43": 1.7,
        "lora-44": 9.0,
        "gem-42": 1.0,
    }.items():
        write_json(tmp_path / f"small-{name}" / "scores.json", {"nll": {"mean": nll, "error": 0.1}})
    write_json(tmp_path / "small-lora-42" / "held.json", {"nll": {"mean": 0.5, "error": 0.1}})
    write_json(tmp_path / "small-sft-42" / "held.json", {"nll": {"mean": 0.75, "error": 0.1}})
    settings = smollm2.gathered(tmp_path)["small"]
    assert "minus_sft" not in settings["gem"] and "minus_sft" not in settings["sft"]
    (cells,) = smollm2.difference_table(settings).splitlines()[2:]
    known = [cell.strip() for cell in cells.split("|")[1:-1]]
    # The mean of -0.1 and -0.3, ± 12.706 times its error of 0.1.
    assert known == ["LfU (LoRA) λ 5", "-0.200 [-1.471, +1.071]", *[""] * 5, "-0.250"]


def test_a_best_step_is_compared_with_the_best_step_of_sft(tmp_path: Path) -> None:
    for name, nll in {"sft": 1.0, "sft_stopped": 0.8, "lora_stopped": 0.7}.items():
        for seed, more in ((42, 0.0), (43, 0.1)):
            write_json(tmp_path / f"small-{name}-{seed}" / "scores.json", {"nll": {"mean": nll + more, "error": 0.1}})
    settings = smollm2.gathered(tmp_path)["small"]
    assert settings["lora_stopped"]["minus_sft"]["nll"]["mean"] == pytest.approx(-0.1)
    assert "minus_sft" not in settings["sft_stopped"]
