"""The paper in miniature: what is chosen, what is compared, and that a run measures what it says."""

import json
import math
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from experiments import seeds
from experiments.miniature import mini, paper, plan, report, tables
from experiments.miniature.__main__ import CHOICES as STORED
from experiments.miniature.__main__ import require_same_version, run_all
from experiments.miniature.mini import SPLITS, Spec

EVERYTHING = ("scores", "prompts", "noise", "attack")
CHOICES = {row: trials[0] for row, trials in (plan.TRIALS | plan.MORE_TRIALS).items()}


def scores(task: float, kept: float) -> dict[str, float]:
    return dict.fromkeys(SPLITS, kept) | {plan.TASK: task, "nll": 1.0}


# --- the plan -------------------------------------------------------------------------------------


def test_every_method_has_the_same_number_of_trials() -> None:
    assert {len(trials) for trials in (plan.TRIALS | plan.MORE_TRIALS).values()} == {8}
    assert all(len(set(trials)) == 8 for trials in (plan.TRIALS | plan.MORE_TRIALS).values())


def test_choices_are_made_on_validation_splits_and_seeds_of_their_own() -> None:
    trials, runs = plan.choosing(plan.TRIALS | plan.MORE_TRIALS), plan.whole(CHOICES)
    assert {spec.split for spec in trials} == {"valid"}
    assert {spec.split for spec in runs} == {"test"}
    assert {spec.seed for spec in trials}.isdisjoint(spec.seed for spec in runs)


def test_the_main_table_has_ten_seeds_and_the_others_three() -> None:
    seeds = Counter((spec.data, spec.method, spec.hyper) for spec in plan.main_table(CHOICES, plan.ALL_SEEDS))
    assert all(count >= 10 for (_, method, _), count in seeds.items() if method != "base")
    assert len(seeds) == 1 + len(plan.DATAS) * len(plan.TRIALS)
    for groups in [*plan.sweeps(CHOICES).values(), *plan.epochs(CHOICES).values(), *plan.causes(CHOICES).values()]:
        assert {len({spec.seed for spec in specs}) for specs in groups.values()} == {3}


def test_the_best_trial_wins() -> None:
    rows = {"SFT": plan.TRIALS["SFT"]}
    value = {spec: 0.1 * i for i, trial in enumerate(rows["SFT"]) for spec in plan.trial_specs(trial)}
    best = rows["SFT"][5]
    for spec in plan.trial_specs(best):
        value[spec] = 0.9

    def look_up(spec: Spec) -> dict[str, Any]:
        return {"scores": scores(value[spec], 0.5)}

    assert plan.choose(look_up, rows) == {"SFT": best}


def test_balance_is_half_the_task_and_half_what_is_kept() -> None:
    assert plan.balance(scores(0.2, 0.8)) == pytest.approx(0.5)
    assert plan.average(scores(0.2, 0.8)) == pytest.approx((0.5 + 3 * 0.8) / 4)


def test_choices_survive_json() -> None:
    assert plan.choices_from(json.loads(json.dumps(CHOICES))) == CHOICES


def test_different_runs_have_different_files() -> None:
    specs = plan.whole(CHOICES) + plan.choosing(plan.TRIALS | plan.MORE_TRIALS)
    assert len({spec.path for spec in specs}) == len(set(specs))


# --- the report -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("table", "published"), [(paper.TABLE_1, paper.RANKS_1), (paper.TABLE_2, paper.RANKS_2)], ids=["1", "2"]
)
def test_ranks_are_those_of_the_paper(table: dict[str, paper.Row], published: dict[str, float]) -> None:
    found = tables.ranks({row: table[row] for row in published})
    # The paper rounds quarters to one digit, upwards.
    assert {row: int(10 * rank + 0.5) / 10 for row, rank in found.items()} == published


def test_means_and_paired_differences() -> None:
    assert str(seeds.mean([0.1, 0.2, 0.3])) == "20.0 ± 5.8"
    assert str(seeds.mean([0.1234])) == "12.3"
    # Differences 1, 2, 3 points: mean 2, standard error 1/√3, t(2) = 4.303.
    assert seeds.difference([0.11, 0.22, 0.33], [0.10, 0.20, 0.30]) == "+2.0 [-0.5, +4.5]"
    assert seeds.difference([0.2, 0.3, 0.4], [0.1, 0.2, 0.301]) == "**+10.0 [+9.8, +10.1]**"


def test_tables_are_made_from_any_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def look_up(spec: Spec) -> dict[str, Any]:
        shade = 0.01 * (spec.seed % 3) + 0.1 * (spec.method == "sft")
        training = {
            "sft": 1.0,
            "clipped": 0.5,
            "gradient_norm": 2.0,
            "last_gradient_norm": 0.1,
            "moved": 3.0,
            "steps": 60,
            "valid": [[0, 2.0], [30, 1.0], [60, 1.5]],
        }
        rest = {
            "prompts": [shade] * 5,
            "squares": [40.0, 80.0, 90.0, 170.0],
            "rewritten": 0.1,
            "noise": [0.9, 0.8, 0.7, 0.6],
            "attack": {"success": [0.0] * 21, "complied": [0.0] * 21},
        }
        return {"scores": scores(shade, 0.5), "training": training} | rest

    monkeypatch.setattr(report, "look_up_in", lambda data: look_up)
    times = {"SFT": [1.0, 1.1], "LfU (LoRA)": [2.0, 2.1]}
    for name, table in report.sections({"choices": CHOICES, "seconds of a gradient": times}).items():
        lines = [line for line in table().splitlines() if line.startswith("|")]
        assert len(lines) > 3, name
        assert "nan" not in table()


def test_what_is_kept_is_compared_at_the_same_task_score() -> None:
    def look_up(spec: Spec) -> dict[str, Any]:
        if spec.method != "sft":
            return {"scores": scores(0.3, 0.8)}
        place = plan.SFT_RATES.index(spec.learning_rate)  # learns 0, 0.2, 0.4 ... and keeps 1, 0.8, 0.6 ...
        return {"scores": scores(0.2 * place, 1 - 0.2 * place)}

    spec = plan.tested(CHOICES, "math", "LfU (LoRA)", 0)
    assert tables.gap(look_up, CHOICES, spec) == (pytest.approx(0.8 - 0.7), True)


def test_the_best_step_is_where_the_validation_rows_say() -> None:
    """And a run that has a reference is the student's alone: it starts from the base."""
    spec = replace(SHORT, learning_rate=3e-2, epochs=3, stopped=True)
    here = mini.world("float32")
    examples = [mini.encode_row(here.tokenizer, mini.Format("question"), row) for row in mini.rows_of("math", "train")]
    task, told = mini.fine_tuned(here, spec, examples)
    steps, values = zip(*told["valid"])
    assert steps == (0, 6, 12, 18)
    assert mini.valid_nll(here, task, spec) == pytest.approx(min(values), rel=1e-6)
    whole, _ = mini.fine_tuned(here, replace(spec, stopped=False), examples)
    assert mini.valid_nll(here, whole, spec) == pytest.approx(values[-1], rel=1e-6)


def test_a_reference_is_the_run_that_the_main_table_has() -> None:
    stored = plan.choices_from(json.loads(STORED.read_text()))
    assert (stored["SFT"], stored["LfU (LoRA)"]) == (plan.BY_SFT, plan.BY_LFU)


def test_a_page_of_runs_that_were_not_made_says_so(tmp_path: Path) -> None:
    (tmp_path / "choices.json").write_text(json.dumps(CHOICES))
    data = report.gather(tmp_path)
    assert report.page(data).count("Not run yet.") == 16
    assert not (tmp_path / "runs").exists()


# --- runs -----------------------------------------------------------------------------------------

SHORT = Spec("sft", 3e-3, epochs=1, micro_batch_size=16)


def test_a_run_measures_everything_and_is_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(SHORT, measures=EVERYTHING)
    found = mini.result(tmp_path, spec)
    assert found["spec"]["seed"] == 0
    assert found["training"]["steps"] == 6
    assert set(found["scores"]) == {*SPLITS, "nll"}
    assert len(found["prompts"]) == 5
    assert [len(rates) for rates in found["attack"].values()] == [21, 21] and len(found["noise"]) == 4
    assert found["scores"][plan.TASK] == found["prompts"][0]  # the first wording is the template
    assert all(0.8 < cosine < 1 for cosine in found["noise"])
    monkeypatch.setattr(mini, "run", lambda spec: pytest.fail("run twice"))
    assert mini.result(tmp_path, spec) == found


def test_methods_that_are_not_gradients_differ_from_sft_as_they_should() -> None:
    sft, base = mini.run(SHORT)["scores"], mini.run(plan.base())["scores"]
    assert sft != base
    assert mini.run(replace(SHORT, method="ema", hyper=(("beta", 0.0),)))["scores"] == sft
    assert mini.run(replace(SHORT, method="ensemble", hyper=(("beta", 0.0),)))["scores"] == sft
    assert mini.run(replace(SHORT, method="ensemble", hyper=(("beta", 1.0),)))["scores"] == base
    for method in ("im", "sdft"):
        assert mini.run(replace(SHORT, method=method))["scores"]["nll"] != sft["nll"]


def test_a_run_that_diverges_is_a_result() -> None:
    found = mini.run(replace(SHORT, method="l1", hyper=(("lam", 1e38), ("norm", "sum"))))
    assert "not finite" in found["diverged"]
    assert found["scores"] == dict.fromkeys(SPLITS, 0.0) | {"nll": math.inf}


def test_a_run_that_diverged_has_no_place_in_a_mean() -> None:
    good, bad = replace(SHORT, seed=1), replace(SHORT, seed=2)
    runs = {good: {"scores": scores(0.5, 0.9)}, bad: {"scores": scores(0.0, 0.0), "diverged": "not finite"}}
    table = tables.difference_table(runs.__getitem__, {"bad": [bad]}, [good])
    assert tables.differences(runs.__getitem__, [good], [good]) == ["+0.0"] * len(tables.COLUMNS)
    assert "diverged" in table and "-50" not in table
    with pytest.raises(KeyError):
        tables.column(runs.__getitem__, [good, bad], plan.TASK)
    assert tables.scores_of(runs.values(), plan.TASK) == [0.5, 0.0]


def test_runs_are_made_by_several_processes(tmp_path: Path) -> None:
    specs = [plan.base(measures=("noise",)), plan.base(measures=("noise",), seed=1)]
    run_all(tmp_path, specs, workers=2)
    assert all((tmp_path / "runs" / spec.path).is_file() for spec in specs)


def test_the_choices_that_quick_runs_take_are_there() -> None:
    choices, trials = plan.choices_from(json.loads(STORED.read_text())), plan.TRIALS | plan.MORE_TRIALS
    assert choices.keys() == trials.keys()
    assert all(choices[row] in each for row, each in trials.items())


def test_a_folder_of_runs_belongs_to_one_version(tmp_path: Path) -> None:
    out = tmp_path / "miniature"
    require_same_version(out)
    require_same_version(out)
    (out / "version.json").write_text('{"sha256": "other"}')
    with pytest.raises(SystemExit, match="another version of the code: give another --out"):
        require_same_version(out)
    (out / "version.json").unlink()
    (out / "runs").mkdir()
    with pytest.raises(SystemExit, match="another version of the code"):
        require_same_version(out)
