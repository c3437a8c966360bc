"""The page of the paper in miniature: what was found, in words, and below it every table and figure."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path

from experiments.miniature import plan, tables
from experiments.miniature.mini import found
from lfu.io.files import write_json

FINDINGS = Path(__file__).parent / "findings.md"


def write(out: Path, page: Path) -> None:
    """`miniature.md` and `miniature.json`, and the figures where matplotlib is installed."""
    look_up = partial(found, out)
    choices = plan.choices_from(json.loads((out / "choices.json").read_text()))
    page.mkdir(parents=True, exist_ok=True)
    bodies = {name: if_there(table) for name, table in sections(look_up, choices, out).items()}
    plans = {"runs": plan.whole(choices), "trials": plan.choosing(plan.TRIALS | plan.MORE_TRIALS)}
    there = {
        name: [look_up(spec) for spec in specs if (out / "runs" / spec.path).is_file()] for name, specs in plans.items()
    }
    times = json.loads((out / "times.json").read_text()) if (out / "times.json").is_file() else {}
    write_json(page / "miniature.json", {"choices": choices} | there | {"seconds of a gradient": times})
    text = FINDINGS.read_text(encoding="utf-8") + "".join(f"\n## {name}\n\n{body}\n" for name, body in bodies.items())
    (page / "miniature.md").write_text(text, encoding="utf-8")
    try:
        from experiments.miniature import figures
    except ImportError:
        print("Figures need matplotlib: pip install '.[plot]'.")
        return
    figures.draw(look_up, choices, page)


def if_there(table: Callable[[], str]) -> str:
    """The table, or that its runs have not all been made."""
    try:
        return table()
    except FileNotFoundError:
        return "Not run yet."
    except KeyError as error:
        return f"One of its runs has no {error}: it diverged, or was made before that was measured."


def sections(look_up: plan.LookUp, choices: plan.Choices, out: Path) -> dict[str, Callable[[], str]]:
    """Title -> what makes its tables."""
    by_name = partial(tables.sweep_tables, look_up, choices)
    return {
        "Tables 1 and 2, Figure 2: the main comparison": lambda: (
            f"{tables.main_tables(look_up, choices, plan.ALL_SEEDS)}\n\n![Scores by category](miniature-scores.png)"
        ),
        "What was chosen": lambda: "\n\n".join(
            [
                tables.choices_table(choices),
                if_there(partial(tables.rewritten_line, look_up, choices)),
                "![Learning and keeping](miniature-trials.png)",
            ]
        ),
        "Table 3: time of a step": lambda: tables.table_3(json.loads((out / "times.json").read_text())),
        "Table 4, Figure 3: refusals under attack": lambda: (
            f"{tables.table_4(look_up, choices)}\n\n![Attack](miniature-attack.png)"
        ),
        "Tables 5, 14 and 15: λ, α, blocks": lambda: by_name(("lambda", "alpha", "layers")),
        "Tables 6 and 11: alternatives": lambda: tables.tables_6_and_11(look_up, choices),
        "Table 13: their hyper-parameters": lambda: by_name(("SAM", "L1", "L2", "logits", "ensemble", "EMA")),
        "Table 12: epochs": lambda: tables.table_12(look_up, choices),
        "Figure 5: five prompts": lambda: f"{tables.figure_5(look_up, choices)}\n\n![Prompts](miniature-prompts.png)",
        "Figure 6: noise on the embeddings": lambda: (
            f"{tables.figure_6(look_up, choices)}\n\n![Noise](miniature-noise.png)"
        ),
        "Causes: more than a slower SFT?": lambda: tables.frontier_tables(look_up, choices),
        "Causes: the norm": lambda: f"{by_name(('norm relative, lambda',))}\n\n{tables.squares_line(look_up)}",
        "Causes: micro-batch and precision": lambda: tables.causes_table(look_up, choices),
        "All trials": lambda: tables.trials_table(look_up, plan.TRIALS | plan.MORE_TRIALS),
    }
