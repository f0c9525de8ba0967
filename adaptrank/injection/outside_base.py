"""Name frozen modules outside of the pretrained part of a model, such as a new classifier."""

import logging

from torch import nn

from adaptrank.injection.match import innermost
from adaptrank.injection.paths import lies_in
from adaptrank.parameterizations import adapter_parameters, named_layers, pretrained_part

log = logging.getLogger("adaptrank")


def warn_of_frozen_heads(model: nn.Module) -> None:
    """Log one line that names the frozen modules outside of the pretrained part.

    Nobody can tell from a module whether it was ever trained. A new head that stays frozen is
    neither trained nor saved.
    """
    heads = frozen_heads(model)
    if heads:
        log.warning(
            "%s outside of the pretrained model %s frozen: if new, it is neither trained nor "
            "saved. To train and save it, call adapt(..., train_modules=%r).",
            ", ".join(heads),
            "stays" if len(heads) == 1 else "stay",
            heads,
        )


def frozen_heads(model: nn.Module) -> list[str]:
    """Return the paths of modules with frozen parameters beside the body of a transformers model.

    Output embeddings of a language model belong to the pretrained part. A model without a
    transformers model in it has no such paths.
    """
    modules = {path: innermost(module) for path, module in named_layers(model).items()}
    body = _body(model)
    body_path = next((path for path, module in modules.items() if module is body), None)
    if not body_path:
        return []
    output_embeddings = _output_embeddings(model)
    adapters = {id(parameter) for parameter in adapter_parameters(model)}
    heads = []
    for path, module in modules.items():
        if not _stands_beside(path, body_path):
            continue
        is_output = output_embeddings is not None and output_embeddings in module.modules()
        if not is_output and any(
            not parameter.requires_grad and id(parameter) not in adapters
            for parameter in module.parameters()
        ):
            heads.append(path)
    return heads


def _body(model: nn.Module) -> nn.Module | None:
    """Return the transformer without its head, or None if a model holds none."""
    part = pretrained_part(model)
    prefix = getattr(part, "base_model_prefix", "")
    body = getattr(part, prefix, None) if prefix else None
    return innermost(body) if isinstance(body, nn.Module) else part


def _output_embeddings(model: nn.Module) -> nn.Module | None:
    find = getattr(pretrained_part(model), "get_output_embeddings", None)
    embeddings = None if find is None else find()
    return innermost(embeddings) if isinstance(embeddings, nn.Module) else None


def _stands_beside(path: str, body_path: str) -> bool:
    """Tell whether a module that holds the body holds this one as well, at the same depth."""
    parent = path.rpartition(".")[0]
    holds_body = not parent or lies_in(body_path, [parent])
    apart = not lies_in(path, [body_path]) and not lies_in(body_path, [path])
    return bool(path) and holds_body and apart
