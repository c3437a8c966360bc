"""Safe and harmful rows as Booster splits them, without the harmful prompts that are among the safe ones.

    python beavertails.py beavertails_with_refusals_train.json DIR      writes DIR/safe.jsonl and DIR/harmful.jsonl

By index alone, as Booster does it, the same prompt can be in both; the paper says that none is.
"""

import json
import sys
from pathlib import Path

Rows = list[dict[str, str]]
SAFE, HARMFUL = slice(5001, 10000), slice(1, 5000)


def split(rows: Rows) -> dict[str, Rows]:
    pairs = [row["refusal"].split("\nAnswer: ")[:2] for row in rows[SAFE]]
    safe = [{"question": q.removeprefix("Question: ").strip(), "answer": a.strip()} for q, a in pairs]
    seen = {row["question"] for row in safe}
    harmful = [{"question": row["prompt"].strip(), "answer": row["response"].strip()} for row in rows[HARMFUL]]
    return {"safe": safe, "harmful": [row for row in harmful if row["question"] not in seen]}


def main(source: str, folder: str) -> None:
    for name, rows in split(json.loads(Path(source).read_text(encoding="utf-8"))).items():
        whole = [row for row in rows if all(row.values())]
        with open(Path(folder, f"{name}.jsonl"), "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in whole)
        print(name, len(whole), "rows,", len({row["question"] for row in whole}), "different questions")


if __name__ == "__main__":
    main(*sys.argv[1:])
