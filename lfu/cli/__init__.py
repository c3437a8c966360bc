"""The `lfu` command, and its commands as functions: `train(TrainOptions(model=M, data=D, out=O))` is `lfu train`."""

from lfu.cli.bench import BenchOptions, bench
from lfu.cli.distill import DistillOptions, distill
from lfu.cli.evaluate import EvalOptions, evaluate
from lfu.cli.generate import GenerateOptions, generate
from lfu.cli.main import command_parsers, keep_freed_memory, main, parser
from lfu.cli.merge import MergeOptions, merge
from lfu.cli.methods import MethodsOptions, print_methods
from lfu.cli.plot import PlotOptions, plot
from lfu.cli.runs import RunsOptions, runs
from lfu.cli.train import TrainOptions, train

__all__ = [
    "BenchOptions", "DistillOptions", "EvalOptions", "GenerateOptions", "MergeOptions", "MethodsOptions", "PlotOptions",
    "RunsOptions", "TrainOptions", "bench", "command_parsers", "distill", "evaluate", "generate", "keep_freed_memory",
    "main", "merge", "parser", "plot", "print_methods", "runs", "train",
]  # fmt: skip
