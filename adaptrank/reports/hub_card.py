"""The card of an adapter on the Hugging Face Hub. It says what is known, and nothing else."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import yaml

from adaptrank.reports.card import layer_counts, metric_rows, rank_map
from adaptrank.reports.card_mark import mark_card
from adaptrank.reports.escaping import code_span, fence, markdown
from adaptrank.reports.rendering import render

PIPELINES = {
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForImageClassification": "image-classification",
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForTokenClassification": "token-classification",
}
"""Class of transformers -> the Hub's name of the task."""


@dataclass(frozen=True)
class HubFacts:
    """Facts about an adapter for its card.

    Args:
        name: how the adapter is named in code, `user/name` or `user/name@revision`.
        library: "adaptrank" or "peft".
        base: name of the base model on the Hub, or None if it has none.
        fingerprint: fingerprint of the base's weights, or None.
        auto_class: class of transformers that loads the base, or None.
        methods: names of the methods of each different nest, outermost first.
        allocators: titles of the allocators of the run.
        layers: path -> methods of each adapted layer.
        ranks: axis -> units.
        licence: the Hub's name of the licence, or None if it is not known.
        languages: codes of languages.
        summary: figures of the run, as in `summary.json`. Empty if there are none.
        config: configuration of the run, as YAML. Empty leaves it out.
    """

    name: str
    library: str
    base: str | None = None
    fingerprint: str | None = None
    auto_class: str | None = None
    methods: Sequence[Sequence[str]] = ()
    allocators: Sequence[str] = ()
    layers: Mapping[str, str] = field(default_factory=dict)
    ranks: Mapping[str, int] = field(default_factory=dict)
    licence: str | None = None
    languages: Sequence[str] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""


def hub_card(facts: HubFacts) -> str:
    """Return the card as Markdown, with the front matter that the Hub reads, and a mark."""
    nests = [" on ".join(nest) for nest in facts.methods]
    is_name = facts.auto_class is not None and facts.auto_class.isidentifier()
    text = render(
        "hub_card.md.j2",
        front_matter=yaml.safe_dump(_front_matter(facts), sort_keys=False),
        facts=facts,
        title=markdown(facts.name.partition("@")[0].rpartition("/")[2]),
        methods=markdown(", ".join(nests)),
        allocators=markdown(", ".join(facts.allocators)),
        base=code_span(facts.base) if facts.base else "",
        auto_class=facts.auto_class if is_name else "AutoModel",
        completes=facts.auto_class == "AutoModelForCausalLM",
        trained=_training(facts.summary),
        metrics=metric_rows(facts.summary) if facts.summary else [],
        warnings=[markdown(line) for line in facts.summary.get("warnings", [])],
        layers=layer_counts(facts.layers),
        rank_map=rank_map(facts.ranks) if facts.ranks else "",
        fence=fence(facts.config),
    )
    return mark_card(text)


def _front_matter(facts: HubFacts) -> dict[str, Any]:
    """Return what the Hub reads."""
    matter: dict[str, Any] = {}
    if facts.base is not None:
        matter["base_model"] = facts.base
        matter["base_model_relation"] = "adapter"
    matter["library_name"] = facts.library
    if facts.licence is not None:
        matter["license"] = facts.licence
    if facts.languages:
        matter["language"] = list(facts.languages)
    if facts.auto_class in PIPELINES:
        matter["pipeline_tag"] = PIPELINES[facts.auto_class]
    methods = [method for nest in facts.methods for method in nest]
    # A title may name a variant in brackets, which is no part of a tag.
    allocators = [title.partition(" (")[0] for title in facts.allocators]
    matter["tags"] = list(dict.fromkeys(["adaptrank", "adapter", *methods, *allocators]))
    return matter


def _training(summary: Mapping[str, Any]) -> str:
    """Return a sentence about the run, or "" if there are no figures."""
    if not summary:
        return ""
    trainable, parameters = summary["trainable"], summary["parameters"]
    share = f" ({trainable / parameters:.2%})" if parameters else ""
    text = (
        f"{trainable:,} of {parameters:,} parameters{share} were trained for {summary['steps']} "
        f"optimizer steps."
    )
    saved = summary.get("saved", {})
    if saved.get("weights") == "best":
        monitor = markdown(saved["monitor"])
        text += f" The weights are those of step {saved['step']}, the best by {monitor}."
    return text
