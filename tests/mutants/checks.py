"""What the suite asserts, by name: each check is the function, and the tolerance, of a test elsewhere in this folder.

Read next: `table.py`.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import test_anchored
import test_baselines
import test_bench
import test_chat
import test_data
import test_distill
import test_generate
import test_instruction
import test_lora
import test_loss
import test_memory
import test_model
import test_train
import torch
from gradients import cases
from gradients.finite import FINITE
from gradients.test_bfloat16 import LOST, lost_in_bfloat16
from gradients.test_finite_differences import consistency_slope_error
from gradients.test_invariants import partition_error
from mutants.mutation import Check
from tiny import KINDS
from torch import Tensor

from lfu.model import Params

GROUPED = tuple(kind for kind in KINDS if kind != "llama2")
QWEN3 = ("qwen3", "qwen3_untied")
UNTIED = ("llama2", "qwen3_untied")


def equal(name: str, *pairs: Callable[[], tuple[Any, Any]]) -> Check:
    """That each function returns two equal things."""

    def unequal(pair: Callable[[], tuple[Any, Any]]) -> float:
        actual, expected = pair()
        return float(actual != expected)

    return Check(name, 0.0, lambda: [unequal(pair) for pair in pairs])


def true(name: str, *facts: Callable[[], bool]) -> Check:
    """That each function returns True."""
    return Check(name, 0.0, lambda: [float(not fact()) for fact in facts])


def none(name: str, count: Callable[[], int]) -> Check:
    """That there are none."""
    return Check(name, 0.0, lambda: [float(count())])


# --- the decoder ----------------------------------------------------------------------------------


@cache
def decoder(*kinds: str) -> Check:
    which = {KINDS: "all kinds", GROUPED: "grouped heads"}.get(kinds, ", ".join(kinds))
    name = f"logits and h_l are transformers' ({which})"
    return Check(name, test_model.TOLERANCE, lambda: [test_model.transformers_error(kind) for kind in kinds])


@cache
def decoding(kind: str) -> Check:
    return Check(f"cached decoding is the forward pass ({kind})", EXACT, lambda: [test_model.decoding_error(kind)])


EXACT = test_model.EXACT
ANY = decoder(*KINDS)
FREQUENCIES = Check(
    "rotary frequencies of Llama 3.1 as published", test_model.PUBLISHED, lambda: [test_model.frequency_error()]
)
RELATIVE = Check(
    "difference-exact products are products", EXACT, lambda: [test_model.relative_error(kind) for kind in KINDS]
)
STEERED = true(
    "steering is addition after each block",
    lambda: all(torch.equal(a, b) for a, b in zip(*test_model.steered_and_by_hand(), strict=True)),
)

# --- adapters -------------------------------------------------------------------------------------


@cache
def reading(variant: str) -> Check:
    def error() -> float:
        folder, params, expected = written(variant)
        return test_lora.reading_error(Path(folder.name), params, expected)

    return Check(f"a PEFT folder gives PEFT's logits ({variant})", test_lora.TOLERANCE, lambda: [error()])


@cache
def written(variant: str) -> tuple[TemporaryDirectory, Params, Tensor]:
    """A folder that PEFT wrote, the base model's weights, and PEFT's logits."""
    folder, model = TemporaryDirectory(), test_lora.trained(variant)
    model.save_pretrained(folder.name)
    return folder, test_model.expected(test_lora.KIND, torch.float32)[0], test_lora.reference_logits(model)


STACK = Check(
    "a stack acts as its two adapters",
    test_lora.EXACT,
    lambda: [test_lora.stacking_error(halves) for halves in ("same shape", "different ranks")],
)
MERGED = Check("merged weights act as the adapter", test_lora.EXACT, lambda: [test_lora.merge_error()])
MISROUNDED = none("no merged weight is rounded twice", test_lora.misrounded)
DRAWN = none("fresh factors are drawn as PEFT draws them", test_lora.misdrawn)
FRESH = Check("a fresh adapter changes nothing", 0.0, lambda: [test_lora.fresh_error()])

# --- memory ---------------------------------------------------------------------------------------


@cache
def remat(*auxiliaries: str) -> Check:
    def gaps() -> list[float]:
        return [test_memory.remat_gap("llama31", auxiliary, torch.float64) for auxiliary in auxiliaries]

    return Check(f"remat changes no bit ({', '.join(auxiliaries)})", 0.0, gaps)


EXPECTED_PEAK = Check(
    "the expected peak is the peak", test_memory.NEAR, lambda: [test_memory.expected_peak_error("lfu-reps", 64, True)]
)
FLOPS = Check(
    "a block's arithmetic is PyTorch's count", test_bench.EQUAL, lambda: [test_bench.block_flops_error("sft")]
)
HEAD_FLOPS = Check(
    "the output layer's arithmetic is PyTorch's count", test_bench.EQUAL, lambda: [test_bench.head_flops_error("sft")]
)

# --- losses ---------------------------------------------------------------------------------------

PREDICTS = equal("the positions that predict a label", test_loss.marked_and_expected)
LAST = equal("the last position predicts nothing", test_loss.marked_and_expected_where_all_is_labelled)
SFT_LOSS = Check("the SFT loss is that of a loop", test_loss.CLOSE, lambda: [test_loss.sft_loss_error()])
LEAKS = none("no gradient flows into h", test_loss.leaks)


@cache
def consistency_loss(layers: frozenset[int] | None, norm: str) -> Check:
    name = f"the consistency loss is that of a loop ({norm}, blocks {sorted(layers) if layers else 'all'})"
    return Check(name, test_loss.CLOSE, lambda: [test_loss.consistency_loss_error(layers, norm)])


# --- what LfU is compared with --------------------------------------------------------------------

NEFTUNE = Check("NEFTune is SFT on noisy embeddings", test_baselines.EXACT, lambda: [test_baselines.neftune_error()])
NOISE = Check("noise is as strong as the formula", test_baselines.ROUNDED, lambda: [test_baselines.noise_error()])
GEM = Check(
    "GEM's value and gradient are those of its formula",
    test_baselines.EXACT,
    lambda: [test_baselines.gem_error(0.7, "logsigmoid")],
)
SAM = Check(
    "SAM's gradient is taken where the loss was raised", test_baselines.EXACT, lambda: [test_baselines.sam_error()]
)


@cache
def penalty(name: str, norm: str) -> Check:
    title = f"{name} is the penalty of Table 6 ({norm})"
    return Check(title, test_baselines.EXACT, lambda: [test_baselines.penalty_error(name, norm)])


LOGITS = Check("logit consistency is Eq. 7", test_baselines.EXACT, lambda: [test_baselines.logit_consistency_error()])
ANCHORED = Check(
    "the anchor's gradient is the oracle's",
    test_baselines.EXACT,
    lambda: [test_anchored.anchored_error(space) for space in ("logits", "probabilities")],
)
STAGES = Check("stages are runs one after the other", 0.0, lambda: [test_anchored.stages_error()])
ENSEMBLE = Check(
    "an ensemble is an average of weights", test_baselines.EXACT, lambda: [test_baselines.ensemble_error(0.25)]
)
MOVING = Check("a moving average forgets at its rate", test_baselines.EXACT, lambda: [test_baselines.ema_error()])

# --- the gradients of one batch -------------------------------------------------------------------


@cache
def part(name: str, *auxiliaries: str, kind: str = "llama31") -> Check:
    """A part of the gradient, against the oracle."""
    title = f"{name} gradient is the oracle's ({', '.join(auxiliaries)}; {kind})"
    return Check(title, cases.EXACT, lambda: [cases.oracle_error(name, kind, auxiliary) for auxiliary in auxiliaries])


BOTH = cases.AUXILIARIES
WHOLE = part("whole", *BOTH)
METRICS = Check(
    "the metrics are the oracle's",
    cases.EXACT,
    lambda: [cases.metrics_error("llama31", auxiliary) for auxiliary in BOTH],
)
CHOSEN = Check(
    "whole gradient of one block is the oracle's",
    cases.EXACT,
    lambda: [cases.oracle_error("whole", "llama31", aux, layers=frozenset({2})) for aux in BOTH],
)
BLOCKS = Check("blocks add up", cases.EXACT, lambda: [partition_error(auxiliary, [{1, 2}, {3}]) for auxiliary in BOTH])
SLOPE = Check("the consistency gradient is a slope", FINITE, lambda: [consistency_slope_error(aux) for aux in BOTH])


@cache
def bfloat16(*ways: str) -> Check:
    name = f"1 - cosine of the consistency gradient in bfloat16 ({', '.join(ways)})"
    return Check(name, max(LOST[way] for way in ways), lambda: [lost_in_bfloat16(way, 1e-4)[0] for way in ways])


# --- the loop -------------------------------------------------------------------------------------


@cache
def schedule(steps: int, warmup: float) -> Check:
    name = f"the schedule is that of transformers ({steps} steps)"
    return Check(name, test_train.SCHEDULED, lambda: [test_train.schedule_error(steps, warmup)])


@cache
def adamw(weight_decay: float) -> Check:
    name = f"updates are AdamW's (weight decay {weight_decay})"
    return Check(name, test_train.EXACT, lambda: [test_train.adamw_error(weight_decay)])


@cache
def weighted_sum(name: str) -> Check:
    title = f"an LfU step is the sum over its micro-batches ({name})"
    return Check(title, test_train.EXACT, lambda: [test_train.weighted_sum_error(name)])


ACCUMULATION = Check(
    "an SFT step does not feel its micro-batches",
    test_train.EXACT,
    lambda: [test_train.accumulation_error(size) for size in (4, 3)],
)
CLIPPING = Check("clipping is to the global norm", test_train.EXACT, lambda: [test_train.clipping_error()])
SHORT = true("a short gradient is left alone", test_train.a_short_gradient_is_left_alone)
EVERY_ROW = true("an epoch takes every row once", test_train.every_row_once_an_epoch)
ANOTHER_ORDER = true("every epoch has another order", test_train.the_order_is_another_each_epoch)
DRAWS = true("all micro-batches draw differently", test_train.all_draws_differ)

# --- data -----------------------------------------------------------------------------------------


@cache
def template(name: str) -> Check:
    return equal(f"a template is its text ({name})", lambda: test_data.text_of_a_row(name))


@cache
def bos(tokenizer: bool, format: bool) -> Check:
    wanted = {(True, True): "wanted", (True, False): "not wanted"}[tokenizer, format]
    return equal(f"the tokens of a row, BOS {wanted}", lambda: test_data.tokens_of_a_row(tokenizer, format))


BORDER = equal("prompt and answer are tokenised apart", test_data.tokens_at_the_border)
PIECES = equal("pieces of a template are tokenised apart", test_data.tokens_between_pieces)
LEARNED = equal("answer and EOS carry loss, and nothing else", test_data.learned_tokens)
INSTRUCTION = equal("instruction, answer and EOS carry loss, and nothing else", test_instruction.learned_text)
SPACE = equal("the space before a question carries loss with it", test_instruction.space_before_the_question)
EMPTY = equal("an empty instruction changes nothing", lambda: test_instruction.without_instruction("alpaca"))


def chat_turns() -> tuple[Any, Any]:
    with TemporaryDirectory() as folder:
        return test_chat.learned_turns(Path(folder), "chatml", None, 2)


CHAT = equal("answers and the tokens that end them carry loss, and nothing else", chat_turns)
INSTRUCTION_SUPERVISED = equal(
    "labels that are predicted are counted, instruction first", test_instruction.supervised_and_predicted
)
COLLATED = equal("rows are padded on the right", test_data.collated)
SUPERVISED = equal("labels that are predicted are counted", lambda: test_data.supervised_and_predicted(0))
ORDERS = true("orders differ by seed and epoch", test_data.all_orders_differ)
MICRO_BATCHES = equal("micro-batches of similar length lose no row", test_data.rows_of_micro_batches)

# --- generation -----------------------------------------------------------------------------------


@cache
def generation(kind: str) -> Check:
    return equal(f"batched is uncached ({kind})", lambda: test_generate.batched_and_uncached(kind))


STOPPING = equal("rows that end leave the others alone", lambda: test_generate.stopping_and_expected("llama31"))
EOS = equal("any EOS id ends an answer and stays out of it", lambda: test_generate.ended_by_eos(6, 3))
WARPED = Check("what is drawn from is transformers'", test_generate.WARPED, lambda: [test_generate.warper_error()])
DRAWN_APART = true("draws depend on seed, row and step", test_generate.all_draws_differ)
FREQUENT = true(
    "tokens are drawn as often as they should be", lambda: test_generate.frequency_error() < test_generate.DEVIATION
)
INTEGERS = equal("the last integer of a text", test_distill.integers)
AGREE = equal("integers agree by value", test_distill.agreements)
TAKEN = equal("answers that pass are taken", test_distill.taken)
LEFT = equal("references stay where they do not", test_distill.left)
BUDGET = equal("no more than max_new_tokens", lambda: test_generate.within_budget(6))
STOP_STRING = equal("a stop string is cut off", lambda: test_generate.cut_at_a_stop_string(4, 6))
MIDDLE = equal("a stop string may end inside a token", lambda: test_generate.cut_at_a_stop_string(0, 3))
FIRST_STOP = equal("the first stop string counts", test_generate.cut_at_the_first_of_two)
