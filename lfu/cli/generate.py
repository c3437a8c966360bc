"""`lfu generate`: one question, one answer. Read next: `merge.py`."""

from dataclasses import dataclass

from lfu import generate as generating
from lfu.cli.options import (
    InferenceOptions,
    encode_question,
    load_model,
    load_prompt_setup,
    note_template,
    option,
    require_counts,
)
from lfu.data.tokens import stop_strings
from lfu.errors import InputError


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(InferenceOptions):
    question: str = option("what to ask")
    max_new_tokens: int = option("longest answer, in tokens", 256)


def generate(options: GenerateOptions) -> str:
    """Answer one question greedily; prints and returns the answer."""
    require_counts(options, "max_new_tokens")
    setup = load_prompt_setup(options)
    note_template(options.model, setup.folder, setup.said, setup.format.template)
    try:
        prompt = encode_question(setup, options.question, options.max_new_tokens)
    except InputError as error:
        raise InputError(f"--question: {error}") from error
    loaded = load_model(options, setup)
    ((_, completion),) = generating.generate(
        loaded.config, loaded.base, setup.tokenizer, [prompt], loaded.adapters,
        max_new_tokens=options.max_new_tokens, stop=stop_strings(setup.format),
    )  # fmt: skip
    print(completion.text)
    return completion.text
