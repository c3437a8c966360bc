"""Scores: exact match by lm-evaluation-harness' rules, and the likelihood of the reference answers.

`gsm8k` scoring follows `lm_eval/tasks/gsm8k/gsm8k.yaml`, version 3: *strict* wants "#### n", *flexible* takes the last
number; both compare strings, so "72.00" is not "72". Its prompt, zero- or few-shot, is `harness_prompt`; by default a
model is asked in the template it was trained on. Read next: `checkpoint.py`.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from lfu.data import Codec, Example, Row, collate, token_ids
from lfu.lora import Adapter
from lfu.loss import predicts, targets
from lfu.model import Config, Params, trunk, unembed
from lfu.model import embed as embed_tokens


class Estimate(NamedTuple):
    """A mean over n items, and its standard error."""

    mean: float
    error: float
    n: int


# --- exact match -----------------------------------------------------------------------------------

STRICT = re.compile(r"#### (\-?[0-9\.\,]+)")
FLEXIBLE = re.compile(r"(-?[$0-9.,]{2,})|(-?[0-9]+)")
IGNORED_PARTS = [re.compile(pattern) for pattern in (r",", r"\$", r"(?s).*#### ", r"\.$")]
INVALID = "[invalid]"


def strict_answer(text: str) -> str:
    """The number behind the first "#### "."""
    found = STRICT.search(text)
    return found.group(1).strip() if found else INVALID


def flexible_answer(text: str) -> str:
    """The last number-like string, whatever it is."""
    found = FLEXIBLE.findall(text)
    return next(group for group in found[-1] if group).strip() if found else INVALID


def normalised(answer: str) -> str:
    """Without commas, dollar signs, everything up to "#### ", and one final full stop; lower case."""
    for pattern in IGNORED_PARTS:
        answer = pattern.sub("", answer)
    return answer.lower()


def gsm8k_scores(prediction: str, reference: str) -> dict[str, bool]:
    """Strict and flexible exact match of a whole answer with a whole reference answer."""
    gold = normalised(reference)
    extracted = {"strict": strict_answer(prediction), "flexible": flexible_answer(prediction)}
    return {name: normalised(answer) == gold for name, answer in extracted.items()}


def exact_scores(prediction: str, reference: str) -> dict[str, bool]:
    """Equality up to white space at the ends."""
    return {"exact": prediction.strip() == reference.strip()}


SCORES: dict[str, Callable[[str, str], dict[str, bool]]] = {"gsm8k": gsm8k_scores, "exact": exact_scores}


def accuracy(hits: Sequence[bool]) -> Estimate:
    """Share of hits; the standard error is the harness': sample deviation over √n."""
    n, p = len(hits), sum(hits) / len(hits)
    return Estimate(p, math.sqrt(p * (1 - p) / (n - 1)) if n > 1 else math.nan, n)


# --- the harness' prompt ---------------------------------------------------------------------------

HARNESS_STOPS = ("Question:", "</s>", "<|im_end|>")


def harness_prompt(codec: Codec, row: Row, shots: Sequence[Row], *, bos: bool = True) -> list[int]:
    """[BOS] and the harness' gsm8k prompt: worked examples, then the question, tokenised in one piece."""
    solved = "".join(f"Question: {shot.question}\nAnswer: {shot.answer}\n\n" for shot in shots)
    return [*(codec.bos if bos else ()), *token_ids(codec, f"{solved}Question: {row.question}\nAnswer:")]


def draw_shots(pool: Sequence[Row], count: int, seed: int, row: Row) -> list[Row]:
    """`count` examples, drawn anew for each row, a pure function of (seed, row); never the row's own question."""
    others = [shot for shot in pool if shot.question != row.question]
    chosen = np.random.default_rng([seed, row.number]).choice(len(others), size=count, replace=False)
    return [others[index] for index in chosen]


# --- likelihood ------------------------------------------------------------------------------------


def answer_nll(
    config: Config,
    params: Params,
    examples: Sequence[Example],
    adapters: Sequence[Adapter] = (),
    *,
    batch_size: int = 16,
) -> Estimate:
    """Mean negative log-likelihood of the labelled tokens, in nats; n counts tokens, the error is over rows."""
    ordered = sorted(examples, key=lambda example: len(example.tokens))
    totals = [
        total
        for start in range(0, len(ordered), batch_size)
        for total in row_nlls(config, params, ordered[start : start + batch_size], adapters)
    ]
    return ratio(totals, [example.supervised for example in ordered])


def ratio(sums: Sequence[float], counts: Sequence[int]) -> Estimate:
    """Σ sums / Σ counts over rows; the standard error is that of a ratio, from the rows' deviations from the mean."""
    total, n, rows = np.array(sums, dtype=np.float64), np.array(counts), len(counts)
    mean = total.sum() / n.sum()
    spread = np.sqrt(((total - mean * n) ** 2).sum() * rows / (rows - 1)) if rows > 1 else math.nan
    return Estimate(float(mean), float(spread / n.sum()), int(n.sum()))


def row_nlls(config: Config, params: Params, examples: Sequence[Example], adapters: Sequence[Adapter]) -> list[float]:
    """The summed negative log-likelihood of each row's labelled tokens; logits only where they are needed."""
    batch = collate(examples, params.embed.device)
    mask = predicts(batch.labels)
    hidden = trunk(config, params, embed_tokens(params, batch.tokens), adapters)[-1]
    logits = unembed(config, params, hidden[mask])
    return sum_rows(mask, F.cross_entropy(logits, targets(batch.labels), reduction="none"))


def sum_rows(mask: Tensor, values: Tensor) -> list[float]:  # [B,T] bool, [n] -> B
    """Sums over each row of values that stand at the positions of the mask."""
    rows = mask.nonzero()[:, 0]
    return torch.zeros(len(mask), dtype=values.dtype, device=values.device).index_add(0, rows, values).tolist()
