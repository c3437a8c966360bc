"""GSM8K's questions in the five wordings of appendix C.4.

    python wordings.py TEST.jsonl DIR                  writes DIR/wording-1.jsonl to DIR/wording-5.jsonl

What followed the question is not stated; here it is "\\nAnswer:".
"""

import json
import sys
from pathlib import Path

WORDINGS = ["Question: ", "Problem: ", "Let's solve this: ", "You are given the following:\n", "Here's the question: "]
END = "\nAnswer:"


def main(source: str, folder: str) -> None:
    rows = [json.loads(line) for line in Path(source).read_text(encoding="utf-8").splitlines()]
    for number, wording in enumerate(WORDINGS, 1):
        with open(Path(folder, f"wording-{number}.jsonl"), "w", encoding="utf-8") as file:
            for row in rows:
                asked = {"question": wording + row["question"] + END, "answer": row["answer"]}
                file.write(json.dumps(asked) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
