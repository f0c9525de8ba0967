"""Room for an answer of `generate` where a model has a fixed number of positions."""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from adaptrank.cli.errors import ConfigError
from adaptrank.cli.prompt_form import EncodedPrompt


class Fitted(NamedTuple):
    """A prompt that leaves room for an answer.

    Args:
        prompt: the prompt, which may have lost its first tokens.
        longest: most tokens of its answer.
        change: what became shorter, "prompt" or "answer", or "".
        sentence: what to tell about it, or "".
    """

    prompt: EncodedPrompt
    longest: int
    change: str = ""
    sentence: str = ""


@dataclass(frozen=True)
class Room:
    """Room for prompts and answers by the positions of a model, None where they are not fixed.

    Args:
        prompt: positions for a prompt.
        answer: positions for an answer: the same ones, or those of a decoder.
        is_shared: whether prompt and answer share the positions.
        most: most tokens of an answer.
    """

    prompt: int | None
    answer: int | None
    is_shared: bool
    most: int

    @classmethod
    def of(cls, model: Any, most: int) -> "Room":
        """Return the room of a causal language model, or of one with an encoder."""
        from adaptrank.backbones import position_limit

        if getattr(model.config, "is_encoder_decoder", False):
            encoder, decoder = (position_limit(model, part) for part in ("encoder", "decoder"))
            return cls(encoder, decoder, False, most)
        limit = position_limit(model)
        return cls(limit, limit, True, most)

    def fit(self, prompt: EncodedPrompt, bos: int | None = None) -> Fitted:
        """Return a prompt that fits, with the length of its longest answer.

        A prompt stays whole where it can, and its answer is shorter. A text that has more tokens
        than there are positions keeps its last ones.

        Args:
            prompt: the prompt.
            bos: id of the beginning-of-sequence token, which stays first.

        Raises:
            ConfigError: if a conversation, or what an encoder reads, has too many tokens.
        """
        from adaptrank.backbones import longest_prompt

        count = len(prompt.ids)
        change = sentence = ""
        if self.prompt is not None and count > self.prompt:
            place = prompt.place or "a prompt"
            have = f"has {count} tokens, and the model has {self.prompt} positions"
            if prompt.chat or not self.is_shared:
                raise ConfigError(f"{place[0].upper()}{place[1:]} {have}. Shorten it.")
            kept = longest_prompt(self.prompt, self.most)
            ids = prompt.ids[-kept:]
            if prompt.ids[0] == bos:
                ids[0] = prompt.ids[0]
            prompt = replace(prompt, ids=ids)
            change = "prompt"
            sentence = f"{place[0].upper()}{place[1:]} {have}. Its last {kept} tokens are read."
        if self.answer is None:
            return Fitted(prompt, self.most, change, sentence)
        # The last token of an answer is not read again.
        left = self.answer + 1 - len(prompt.ids) if self.is_shared else self.answer
        if left < self.most and not change:
            change = "answer"
            sentence = (
                f"The model has {self.answer} positions, so the answer to a prompt of {count} "
                f"tokens has at most {left} and not --max_new_tokens {self.most}."
            )
        return Fitted(prompt, min(self.most, left), change, sentence)
