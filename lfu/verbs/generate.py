"""`lfu generate`: one question, one answer. Read next: `verbs/merge.py`."""

from dataclasses import dataclass

from lfu import generate as generating
from lfu.data import TEMPLATES
from lfu.verbs.shared import SpeakerOptions, option, prompt_of, require_counts, speaker, wording


@dataclass(frozen=True, kw_only=True)
class GenerateOptions(SpeakerOptions):
    question: str = option("what to ask")
    max_new_tokens: int = option("longest answer, in tokens", 256)


def generate(options: GenerateOptions) -> str:
    """Answer one question greedily; prints and returns the answer."""
    require_counts(options, "max_new_tokens")
    words = wording(options)
    prompt = prompt_of(words, options.question, "--question")
    who = speaker(options, words)
    ((_, completion),) = generating.generate(
        who.config, who.base, words.codec, [prompt], who.adapters,
        max_new_tokens=options.max_new_tokens, stop=TEMPLATES[words.format.template].stops,
    )  # fmt: skip
    print(completion.text)
    return completion.text
