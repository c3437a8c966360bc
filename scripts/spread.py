"""Mean and deviation of the flexible score over files of predictions: a bar of Figure 5.

python spread.py NAME PREDICTIONS.jsonl...
"""

import json
import sys
from statistics import mean, pstdev


def share(path: str) -> float:
    with open(path, encoding="utf-8") as file:
        return 100 * mean(json.loads(line)["flexible"] for line in file)


def main(name: str, *paths: str) -> None:
    shares = [share(path) for path in paths]
    print(name, f"mean {mean(shares):.2f}, deviation {pstdev(shares):.2f}")


if __name__ == "__main__":
    main(*sys.argv[1:])
