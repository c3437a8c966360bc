"""The paper in miniature: its tables and figures, made again on `weights/mini`.

    python -m experiments --quick       # one seed of the main table, with the settings chosen before: 2 minutes
    python -m experiments --main        # three seeds of it
    python -m experiments               # everything, choosing included: hours, and it continues where it stopped

Writes one JSON file for each run. The first two print their tables; everything also makes `miniature.json` with all
runs and `miniature.md` with all tables; copied to docs/, the former is what `make tables` and `make figures` show. The
settings chosen are in `choices.json` beside this file; the whole run chooses anew. A folder of runs belongs to one
version of code and weights.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import torch
from tqdm import tqdm

from experiments.miniature import plan, report, tables
from experiments.miniature.mini import MINI, Spec, result, step_times
from lfu.io.files import read_json, sha256, write_json, write_text

HERE = Path(__file__).parent
CHOICES = HERE / "choices.json"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m experiments", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="one seed of the main table")
    size.add_argument("--main", action="store_true", help="three seeds of the main table")
    size.add_argument("--report", action="store_true", help="run nothing; gather a whole run that is there")
    parser.add_argument("--out", type=Path, default=Path("runs/miniature"), help="folder of the runs")
    parser.add_argument("--workers", type=int, default=2, help="processes, of one core each")
    parsed = parser.parse_args()
    start = time.perf_counter()
    if not parsed.report:
        require_same_version(parsed.out)
    if parsed.quick or parsed.main:
        if not CHOICES.is_file():
            parser.error(f"{CHOICES} does not exist: run everything once, and put its choices.json there.")
        choices = plan.choices_from(json.loads(CHOICES.read_text()))
        seeds = plan.ALL_SEEDS[:1] if parsed.quick else plan.FEW_SEEDS
        run_all(parsed.out, plan.main_table(choices, seeds), parsed.workers)
        print(tables.main_tables(partial(result, parsed.out), choices, seeds))
    else:
        if parsed.report and not (parsed.out / "choices.json").is_file():
            parser.error(f"{parsed.out} holds no whole run: {parsed.out / 'choices.json'} does not exist.")
        if not parsed.report:
            run_whole(parsed.out, parsed.workers)
        data = report.gather(parsed.out)
        write_json(parsed.out / "miniature.json", data)
        write_text(parsed.out / "miniature.md", report.page(data))
    print(f"{(time.perf_counter() - start) / 60:.1f} minutes")


def require_same_version(out: Path) -> None:
    """SystemExit if the runs in this folder were made by other code or from other weights and rows."""
    files = [*sorted((HERE.parents[1] / "lfu").rglob("*.py")), HERE / "mini.py"]
    files += [path for path in sorted(MINI.rglob("*")) if path.is_file()]
    version = hashlib.sha256("".join(sha256(path) for path in files).encode()).hexdigest()
    record = out / "version.json"
    if not record.is_file() and not (out / "runs").is_dir():
        write_json(record, {"sha256": version})
    elif not record.is_file() or read_json(record)["sha256"] != version:
        raise SystemExit(f"The runs in {out} were made by another version of the code: give another --out.")


def run_whole(out: Path, workers: int) -> None:
    """Everything, the most telling first; what is there already is not run again."""
    run_all(out, plan.choosing(plan.TRIALS), workers)
    look_up = partial(result, out)
    choices = plan.choose(look_up, plan.TRIALS)
    run_all(out, plan.main_table(choices, plan.ALL_SEEDS), workers)
    run_all(out, plan.choosing(plan.MORE_TRIALS), workers)
    choices |= plan.choose(look_up, plan.MORE_TRIALS)
    write_json(out / "choices.json", choices)
    run_all(out, plan.whole(choices), workers)
    if not (out / "times.json").is_file():
        torch.set_num_threads(1)
        write_json(out / "times.json", step_times({row: choices[row] for row in plan.TRIALS}, rounds=50))


def run_all(out: Path, specs: Sequence[Spec], workers: int) -> None:
    """Every run that is not there yet, several at a time."""
    missing = [spec for spec in specs if not (out / "runs" / spec.path).is_file()]
    with ProcessPoolExecutor(workers, get_context("spawn"), partial(torch.set_num_threads, 1)) as pool:
        waiting = [pool.submit(result, out, spec) for spec in missing]
        try:
            for done in tqdm(as_completed(waiting), total=len(specs), initial=len(specs) - len(missing), unit="run"):
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


if __name__ == "__main__":
    main()
