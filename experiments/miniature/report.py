"""The page of tables of the paper in miniature, from the runs or from `miniature.json`, which holds them all."""

import json
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from experiments.miniature import plan, tables
from experiments.miniature.mini import Spec, found


def gather(out: Path) -> dict[str, Any]:
    """What a whole run has measured: the settings chosen, every run that was made, and the times."""
    choices = plan.choices_from(json.loads((out / "choices.json").read_text()))
    plans = {"runs": plan.whole(choices), "trials": plan.choosing(plan.TRIALS | plan.MORE_TRIALS)}
    there = {
        name: [found(out, spec) for spec in specs if (out / "runs" / spec.path).is_file()]
        for name, specs in plans.items()
    }
    times = json.loads((out / "times.json").read_text()) if (out / "times.json").is_file() else {}
    return {"choices": choices} | there | {"seconds of a gradient": times}


def page(data: dict[str, Any]) -> str:
    """Every table, each with a heading of its own."""
    bodies = {name: if_there(table) for name, table in sections(data).items()}
    return "\n".join(f"## {name}\n\n{body}\n" for name, body in bodies.items())


def look_up_in(data: dict[str, Any]) -> plan.LookUp:
    """The runs by their specs. FileNotFoundError for one that was not made."""

    def key(spec: Spec) -> str:
        return json.dumps(asdict(spec), sort_keys=True)

    runs = {key(Spec(**run["spec"])): run for run in [*data["runs"], *data["trials"]]}

    def look_up(spec: Spec) -> dict[str, Any]:
        if key(spec) not in runs:
            raise FileNotFoundError(spec.path)
        return runs[key(spec)]

    return look_up


def if_there(table: Callable[[], str]) -> str:
    """The table, or that its runs have not all been made."""
    try:
        return table()
    except FileNotFoundError:
        return "Not run yet."
    except KeyError as error:
        return f"One of its runs has no {error}: it diverged, or was made before that was measured."


def sections(data: dict[str, Any]) -> dict[str, Callable[[], str]]:
    """Title -> what makes its tables."""
    look_up, choices = look_up_in(data), plan.choices_from(data["choices"])
    by_name = partial(tables.sweep_tables, look_up, choices)
    return {
        "Tables 1 and 2, Figure 2: the main comparison": lambda: tables.main_tables(look_up, choices, plan.ALL_SEEDS),
        "What was chosen": lambda: "\n\n".join(
            [tables.choices_table(choices), if_there(partial(tables.rewritten_line, look_up, choices))]
        ),
        "Table 3: time of a step": lambda: tables.table_3(data["seconds of a gradient"]),
        "Table 4, Figure 3: refusals under attack": lambda: tables.table_4(look_up, choices),
        "Tables 5, 14 and 15: λ, α, blocks": lambda: by_name(("lambda", "alpha", "layers", "RepS, lambda")),
        "Tables 6 and 11: alternatives": lambda: tables.tables_6_and_11(look_up, choices),
        "Table 13: their hyper-parameters": lambda: by_name(("SAM", "L1", "L2", "logits", "ensemble", "EMA")),
        "Table 12: epochs": lambda: tables.table_12(look_up, choices),
        "Figure 5: five prompts": lambda: tables.figure_5(look_up, choices),
        "Figure 6: noise on the embeddings": lambda: tables.figure_6(look_up, choices),
        "More than a slower SFT?": lambda: tables.frontier_tables(look_up, choices),
        "The norm": lambda: f"{by_name(('norm relative, lambda',))}\n\n{tables.squares_table(look_up)}",
        "Micro-batch and precision": lambda: tables.causes_table(look_up, choices),
        "All trials": lambda: tables.trials_table(look_up, plan.TRIALS | plan.MORE_TRIALS),
    }
