"""Harmful prompts from CSV files without a header, one JSON line {"question": ...} each.

python prompts.py OUT.jsonl FILE.csv...
"""

import csv
import json
import sys


def main(out: str, *paths: str) -> None:
    prompts = []
    for path in sorted(paths):
        with open(path, newline="", encoding="utf-8") as file:
            prompts += [row[0] for row in csv.reader(file) if row]
    with open(out, "w", encoding="utf-8") as file:
        file.writelines(json.dumps({"question": prompt}) + "\n" for prompt in prompts)
    print(out, len(prompts), "prompts")


if __name__ == "__main__":
    main(*sys.argv[1:])
