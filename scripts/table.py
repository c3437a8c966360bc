"""Categories and ranks as in Table 1, from what lm_eval wrote.

    python table.py NAME...          names of folders in results/

prints the eleven scores of each name as a row of Table 16, then the means of the four categories and the mean rank
among the names that are ranked: neither the vanilla model nor LfU (RepS) nor the released algorithms.
"""

import json
import sys
from pathlib import Path

FLEXIBLE, ACC, NORM = "exact_match,flexible-extract", "acc,none", "acc_norm,none"
ARC, LETTERS = ("arc_challenge", ACC), ("arc_challenge_chat", "exact_match,remove_whitespace")
CATEGORIES = [
    [("gsm8k", FLEXIBLE), ("mathqa", ACC), ("asdiv_cot_llama", FLEXIBLE)],
    [("mmlu", ACC), ("piqa", NORM), ("hellaswag", NORM), ("lambada_standard", ACC)],
    [ARC, ("coqa", "f1,none")],
    [("toxigen", ACC), ("truthfulqa_mc2", ACC)],
]


def scores(name: str) -> list[list[float]]:
    """Percent, by category. ARC asks for a letter where the model is the Instruct one."""
    last = sorted(Path("results", name).rglob("results_*.json"))[-1]
    found = json.loads(last.read_text(encoding="utf-8"))["results"]
    categories = [
        [LETTERS if key == ARC and name.startswith("instruct") else key for key in each] for each in CATEGORIES
    ]
    return [[100 * found[task][metric] for task, metric in each] for each in categories]


def ranked(name: str) -> bool:
    return not name.endswith(("vanilla", "reps")) and "-released-" not in name


def main(names: list[str]) -> None:
    rows = {}
    for name in names:
        found = scores(name)
        print(name, *(f"{score:.1f}" for each in found for score in each))
        rows[name] = [round(sum(each) / len(each), 1) for each in found]
    others = [row for name, row in rows.items() if ranked(name)]
    for name, row in rows.items():
        ranks = [1 + sum(other[k] > row[k] for other in others) for k in range(4)]
        print(f"{name:24}", *row, f"rank {sum(ranks) / 4:.2f}" if ranked(name) else "")


if __name__ == "__main__":
    main(sys.argv[1:])
