"""The figures of the pages are what their numbers give now, and the findings in their titles are true.

matplotlib's own drawing changes with its version, which every file names: bytes are compared where it is the one here.
"""

import re
from pathlib import Path
from statistics import mean

import matplotlib
import numpy as np
import pytest

from experiments.figures import cost, gradients, miniature, smollm2
from experiments.figures.__main__ import FIGURES, draw
from experiments.figures.style import DOCS
from experiments.miniature import plan

FOLDER = DOCS / "figures"


@pytest.mark.parametrize("name", FIGURES)
def test_a_figure_is_what_its_numbers_give_now(name: str, tmp_path: Path) -> None:
    draw(name, tmp_path / "now.svg")
    now, stored = ((folder).read_text(encoding="utf-8") for folder in (tmp_path / "now.svg", FOLDER / f"{name}.svg"))
    assert len(stored) < 150_000
    (version,) = re.findall(r"Matplotlib v([\d.]+)", stored)
    if version != matplotlib.__version__:
        pytest.skip(f"{name}.svg was drawn with matplotlib {version}")
    assert now == stored, "run `make figures`"


def test_there_is_no_other_figure() -> None:
    assert {path.name for path in FOLDER.iterdir()} == {f"{name}.svg" for name in FIGURES}


# --- the titles -----------------------------------------------------------------------------------


def test_lfu_pays_where_the_steps_of_sft_are_too_large() -> None:
    choices = miniature.runs().choices
    sft = plan.sft_rates(choices)
    fast, slow = (
        miniature.spot(ours).kept.value - miniature.spot(sft[f"SFT at {rate:g}"]).kept.value
        for rate, ours in ((0.01, plan.faster(choices)["LfU (LoRA) at 0.01"]), (0.003, main_runs("LfU (LoRA)")))
    )
    assert fast > 5 and abs(slow) < 2


def main_runs(row: str) -> list[miniature.Spec]:
    """The ten of the main table on `math`."""
    return [miniature.tables.main_spec(miniature.runs().choices, "math", row, seed) for seed in plan.ALL_SEEDS]


def test_lora_keeps_a_little_and_reps_trades_the_task() -> None:
    for row, score, sign in (
        ("LfU (LoRA)", "other math", 1),
        ("LfU (RepS)", "other math", 1),
        ("LfU (RepS)", "two-step", -1),
    ):
        m = miniature.less_sft("math", row, score)
        assert sign * m.value > m.reach
    task = miniature.less_sft("math", "LfU (LoRA)", "two-step")
    assert abs(task.value) < task.reach


def test_sft_with_smaller_steps_holds_out_longest() -> None:
    ends = {
        row: mean(miniature.runs().look_up(spec)["attack"]["success"][15] for spec in specs)
        for row, specs in plan.attacks(miniature.runs().choices).items()
    }
    assert ends["SFT at 0.001"] < ends["LfU (LoRA)"] < ends["LfU (RepS)"] < ends["SFT"]


def test_more_lambda_keeps_more_and_learns_less() -> None:
    for name in ("lambda", "alpha", "RepS, lambda"):
        spots = [miniature.spot(specs) for specs in plan.sweeps(miniature.runs().choices)[name].values()]
        assert spots[-1].learned.value < spots[0].learned.value - 5 and spots[-1].kept.value > spots[0].kept.value + 3


def test_sft_overfits_and_is_best_when_stopped() -> None:
    for sft in smollm2.curves("sft", "nll"):
        assert min(sft, key=sft.__getitem__) == 16
        assert all(sft[16] < lora[40] < sft[40] and lora[40] < lora[24] for lora in smollm2.curves("lora", "nll"))


def test_a_slower_sft_gets_where_lfu_gets() -> None:
    rates = [at_best(f"sft{rate}_stopped") for rate in ("3e4", "4e4", "5e4")]
    for row in ("lora_stopped", "lora0.5_stopped", "lora5e4_stopped", "reps10_stopped"):
        drift, held = at_best(row)
        assert np.interp(drift, *zip(*rates)) < held + 0.01  # half the standard error of `held`


def at_best(row: str) -> tuple[float, float]:
    """Drift, and NLL of the rows held back."""
    scores = smollm2.stored("smollm2")["small"][row]
    return scores["drift"]["mean"], scores["held"]["mean"]


def test_only_the_default_keeps_the_gradient_at_every_alpha() -> None:
    columns = {name: gradients.by_alpha(gradients.stored("precision")[name]) for name in gradients.PRECISIONS}
    assert min(columns["difference-exact (the default)"].values()) > 0.99
    assert columns["bfloat16 throughout"][0.001] < 0.5 and columns["float32 stream, bfloat16 products"][0.001] < 0.5


def test_batch_and_side_turn_the_gradient() -> None:
    for model in ("SmolLM2", "miniature"):
        parts = gradients.stored("differences")[model]
        turned = [
            parts["LfU (LoRA)"]["the ascent direction comes from another batch"],
            parts["LfU (RepS)"]["the perturbed states are those of another batch"],
            parts["LfU (RepS)"]["the perturbed side is held constant, the clean side trained"],
        ]
        assert all(cosine < 0.5 for (cosine, _), _ in turned)


def test_a_step_takes_twice_the_time_and_a_fifth_more_memory() -> None:
    for steps in (cost.on_the_cpu(), cost.on_the_gpu()):
        for name in ("lfu-lora", "lfu-reps"):
            assert 2 < steps[name].time[0] < 2.3
            assert 1.15 < steps[name].peak_gib / steps["sft"].peak_gib < 1.25
