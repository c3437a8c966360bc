"""Print the table of mistakes: `make mutants`.

First every check is run on the right code; then once for each mistake. The exit status is 1 if a mistake survives.
"""

import sys

import torch
from mutants.mutation import outcome
from mutants.table import MUTANTS

COLUMNS = "{:<11} {:<20} {:<52} {:<61} {:>9} {:>8} {:>6}"


def main() -> int:
    torch.set_num_threads(1)
    checks = {mutant.check.name: mutant.check for mutant in MUTANTS}
    for name, check in checks.items():
        if not max(check.errors()) <= check.tolerance:
            print(f"The right code does not pass: {name}.")
            return 1
    print(COLUMNS.format("file", "function", "the mistake", "the check", "tolerance", "error", "÷"))
    survivors = 0
    for mutant in MUTANTS:
        error, factor, caught = outcome(mutant)
        survivors += not caught
        tolerance = mutant.check.tolerance
        figures = [f"{tolerance:.0e}", f"{error:.1e}", f"{factor:.0e}"] if tolerance else ["equal", "unequal", "∞"]
        file, function = mutant.function.split(".", 1)
        row = COLUMNS.format(f"{file}.py", function, mutant.mistake, mutant.check.name, *figures)
        print(row if caught else row + "   SURVIVES", flush=True)
    print(f"{len(MUTANTS)} mistakes, {len(MUTANTS) - survivors} caught, by {len(checks)} checks.")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main())
