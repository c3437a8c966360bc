"""Self-distillation (SDFT): training answers in the model's own words.

The model that is going to be fine-tuned first rewrites each answer, given question and reference. The rewritten answer
takes the reference's place where it passes a check, and the reference stays where it does not; then comes ordinary
training, in the ordinary template. Prompts and rules are those of the repository `sail-sg/sdft` (`main.py`,
`eval/gen_distilled_data.py`, `eval/utils.py`), quirks included, with two differences: an empty text never replaces an
answer, and an answer that stays is left byte for byte, where theirs is stripped. A model with a chat template can be
asked in it instead.

The published runs drew the answers (temperature 0.95, top_p 0.7, top_k 50, at most 512 new tokens, ended by EOS alone),
so the result depends on a seed. They started from chat models. Of a model that cannot follow such a prompt few answers
pass the GSM8K check; most pass the general one, which hardly asks anything, whatever they are worth. An aside.
"""

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from lfu.data.chat import CHAT
from lfu.data.rows import Row
from lfu.data.tokens import Format, ModelTokenizer, continued_ids, piece_ids, prompt_ids
from lfu.generate import generate, make_sampler
from lfu.model import Config, Params

# --- prompts --------------------------------------------------------------------------------------


class Recipe(NamedTuple):
    """How a model is asked to rewrite an answer. The pieces are tokenised one by one."""

    pieces: tuple[str, ...]
    same_number: bool = False  # whether the last integers of the two answers must agree
    is_chat: bool = False  # whether the chat format of one family is written into it


GENERAL = (
    "Below are an instruction that describes a task along with a reference answer. "
    "Using the reference answer as a guide, write your own response."
)
GSM8K = (
    "You are an expert in math. Below are a math question and its reference answer. "
    "Refer to the reference answer and write a response that appropriately answers the question."
)
OPENING = "Great! Let's think step by step. "
"""Belongs to the prompt: what is stored as the answer comes after it."""

RECIPES = {
    # "alpaca_distill_using", for Alpaca, Dolly and LIMA.
    "general": Recipe(
        (
            f"{GENERAL}\n\n",
            "### Instruction:\n{question}\n\n### Reference Answer:\n{reference}\n\n### Response:\n",
        )
    ),
    # "gsm8k_distill" for models of no chat format: without its <<SYS>>, <</SYS>>, [INST] and [/INST].
    "gsm8k": Recipe((f"{GSM8K}\n\n", "{question}\n\n{reference}\n\n" + OPENING), same_number=True),
    # "gsm8k_distill": the system text stands outside of [INST].
    "gsm8k-llama2": Recipe(
        (f"<<SYS>>\n{GSM8K}\n<</SYS>>\n\n", "[INST] {question}\n\n{reference} [/INST] " + OPENING),
        same_number=True,
        is_chat=True,
    ),
    # "llama3_gsm8k_distill".
    "gsm8k-llama3": Recipe(
        (
            f"<|start_header_id|>system<|end_header_id|>\n\n{GSM8K}<|eot_id|>",
            "<|start_header_id|>user<|end_header_id|>\n\n{question}\n\n{reference}<|eot_id|>"
            "<|start_header_id|>assistant<|end_header_id|>\n\n" + OPENING,
        ),
        same_number=True,
        is_chat=True,
    ),
}


def distill_prompt(tokenizer: ModelTokenizer, recipe: Recipe, row: Row) -> list[int]:
    """[BOS] and the prompt that asks for this row's answer in other words.

    With a tokenizer that was loaded for the template chat it is a turn of the user, and the opening begins the answer.
    """
    texts = [piece.format(question=row.question, reference=row.answer) for piece in recipe.pieces]
    if tokenizer.chat is not None:
        opening = OPENING if recipe.pieces[-1].endswith(OPENING) else ""
        turn = "".join(texts).removesuffix(opening).strip()
        return prompt_ids(tokenizer, Format(CHAT), turn) + continued_ids(tokenizer, opening)
    return [token for piece in piece_ids(tokenizer, True, texts) for token in piece]


# --- which answers are taken ----------------------------------------------------------------------

BANNED = ("reference answer", "your response", "my response", "your own response", "now it's your turn")
NUMBER = re.compile(r"-?\d+(?:[,\s]\d+)*(?:\.\d+)?")
NO_INTEGER = "-999999999"


def rejection_reason(text: str, reference: str, recipe: Recipe) -> str | None:
    """Why a rewritten answer, stripped, does not take the reference's place, or None."""
    if not text:
        return "it is empty"
    if text.startswith("Your turn") or any(phrase in text.lower() for phrase in BANNED):
        return "it speaks of the prompt"
    if recipe.same_number and not same_integer(text, reference):
        return "it ends in another number"
    return None


def same_integer(text: str, reference: str) -> bool:
    """Whether the last integers agree. They do where neither has one, and never where one is spread over two lines."""
    try:
        return int(last_integer(text)) == int(last_integer(reference))
    except ValueError:
        return False


def last_integer(text: str) -> str:
    """The last number without its commas and spaces, if it is an integer, "18.00" being one.

    White space between digits counts as a thousands separator: "10 20" is 1020, and "5\\n6" stays as it is.
    """
    found = NUMBER.findall(text)
    whole, _, decimals = found[-1].replace(",", "").replace(" ", "").partition(".") if found else (NO_INTEGER, "", "")
    return NO_INTEGER if decimals.strip("0") else whole


# --- all rows -------------------------------------------------------------------------------------


class Answer(NamedTuple):
    text: str  # what to train on
    fault: str | None  # why that is the reference after all, where it is


def rewrite_answers(
    config: Config,
    params: Params,
    tokenizer: ModelTokenizer,
    rows: Sequence[Row],
    recipe: Recipe,
    *,
    seed: int,
    temperature: float = 0.95,
    top_k: int = 50,
    top_p: float = 0.7,
    max_new_tokens: int = 512,
    batch_size: int = 32,
) -> Iterator[list[Answer]]:
    """Yields the answers to train on, `batch_size` rows at a time, in the order of the rows; none is left out.

    What is drawn for a row depends on the seed and the row's number alone (see `generate.make_sampler`).
    """
    for start in range(0, len(rows), batch_size):
        batch = rows[start : start + batch_size]
        prompts = [distill_prompt(tokenizer, recipe, row) for row in batch]
        numbers = [row.number for row in batch]
        choose = make_sampler(seed, numbers, temperature=temperature, top_k=top_k, top_p=top_p)
        completions = generate(
            config, params, tokenizer, prompts, max_new_tokens=max_new_tokens, batch_size=batch_size, choose=choose
        )
        texts = {index: completion.text for index, completion in completions}
        yield [choose_answer(texts[index], row.answer, recipe) for index, row in enumerate(batch)]


def choose_answer(text: str, reference: str, recipe: Recipe) -> Answer:
    """The rewritten answer, stripped, or the reference as it is."""
    fault = rejection_reason(text.strip(), reference, recipe)
    return Answer(reference if fault else text.strip(), fault)
