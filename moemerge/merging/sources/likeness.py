"""Whether whole models can be merged, as far as configs and tokenizers tell: no weights are opened.

Models stand in lists in which the base, if there is one, is the first.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Literal

from moemerge.errors import CheckpointError, UnsupportedError, few
from moemerge.models.families import family_of, known_family
from moemerge.models.families.dense import skeleton
from moemerge.models.folder import ModelFolder
from moemerge.models.heads.saved import head_field, told_head
from moemerge.models.loading import load_tokenizer
from moemerge.models.pooling import named_pad, reads_before_the_end

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Scope = Literal["all", "body", "mlp"]
# What models of one architecture may differ in without computing something else.
INCIDENTAL = {
    "_name_or_path", "architectures", "dtype", "torch_dtype", "transformers_version", "vocab_size",
    "num_labels", "id2label", "label2id", "problem_type", "use_cache", "tie_word_embeddings", "is_decoder",
    "finetuning_task", "auto_map", "model_type",
}  # fmt: skip
WHICH_MODELS = "leave it out: only reward models of one architecture, trained from one start, can be merged"
WHICH_BASE = "give as base the model that all others were trained from, or leave base out and average them"
Difference = tuple[str, str]  # what the one has, and what the other


def check_models(models: Sequence[str], base: str | None = None) -> None:
    """Refuse reward models of which no merge can be made, heads and all, or changes from `base`.

    Raises UnsupportedError for models that do not go together, CheckpointError for one that is no reward
    model or cannot be read.
    """
    has_base = bool(base)
    opened = [ModelFolder(source) for source in ([base] if base else []) + list(models)]
    for model in opened:
        model.require_dense()
    for model in opened[has_base:]:
        if model.is_base:
            raise CheckpointError(
                f"{model.source} has no reward head",
                given=f"architectures: {', '.join(model.architectures)}",
                expected="reward models; only base may be without a head",
                fix="train it first (moemerge train gives it a head), or leave it out",
            )
        model.require_one_output()
    headless = [number for number, model in enumerate(opened) if model.is_base]
    check_architectures(opened, has_base, "all", headless)
    tokenizers = [load_tokenizer(model) for model in opened]
    first = len(headless)  # a base without a head reads no score
    check_pooling(opened[first:], tokenizers[first:])
    check_vocabularies(opened, tokenizers, has_base)


def check_language_models(models: Sequence[str], language_models: Sequence[str]) -> None:
    """Refuse language models that cannot be averaged into the body of the one reward model.

    Raises as `check_models`.
    """
    if models and language_models:
        opened = [ModelFolder(source) for source in (*models, *language_models)]
        for model in opened:
            model.require_dense()
        headless = [number for number, model in enumerate(opened) if model.is_base]
        check_architectures(opened, True, "body", headless)


def names_in_scope(model: ModelFolder, scope: Scope) -> list[str]:
    """The dense names of what is merged, in the class's order."""
    own = skeleton(model.config)
    # Buffers (such as positions) are no weights: they are kept, never averaged.
    names = [name for name, _ in own.named_parameters(remove_duplicate=False)]
    if scope == "mlp":
        family_of(model.config)  # which refuses those whose MLPs are not known
        mlps = mlp_names(model)
        return [name for name in names if name in mlps]
    return [name for name in names if scope == "all" or name not in model.head_names]


def mlp_names(model: ModelFolder) -> set[str]:
    """Dense names of the tensors of MLPs; none in an architecture whose MLPs are not known."""
    if known_family(model.dense_type) is None:
        return set()
    return {tensor.dense for tensor in family_of(model.config).expert_tensors(model.config)}


def embeddings_name(model: ModelFolder) -> str:
    """The dense name of the embedding table."""
    own = skeleton(model.config)
    table = own.get_input_embeddings().weight
    return next(name for name, weight in own.named_parameters() if weight is table)


def differing_settings(model: ModelFolder, other: ModelFolder) -> list[str]:
    """Keys of the configs that differ, but for those that change nothing in what a model computes."""
    mine, theirs = (folder.config.to_dict() for folder in (model, other))
    differing = {key for key in mine.keys() | theirs.keys() if mine.get(key) != theirs.get(key)}
    return sorted(differing - INCIDENTAL)


def check_architectures(
    models: Sequence[ModelFolder], has_base: bool, scope: Scope, headless: Collection[int]
) -> None:
    """Raise UnsupportedError unless all have one type, the same tensors, and those in scope in one shape.

    Tables of embeddings may have rows of their own; heads of the `headless` are not compared.
    """

    if scope == "all":
        _check_heads([model for number, model in enumerate(models) if number not in headless])

    def differ(number: int, other: int) -> Difference | None:
        heads = scope == "all" and not {number, other} & {*headless}
        return _difference(models[number], models[other], scope, heads)

    _refuse_odd_one(models, has_base, differ)


def _check_heads(models: Sequence[ModelFolder]) -> None:
    """Raise UnsupportedError unless all have heads of one kind, and those of several layers one origin.

    An average of weights is near to a function that each of them is near to only around a common start:
    units of heads that were drawn apart do not stand for the same.
    """
    first, fields = models[0], [head_field(model.config) for model in models]
    for model, field in zip(models, fields, strict=True):
        told, wanted = told_head(model.config), told_head(first.config)
        if field and fields[0] and told == wanted and field["origin"] != fields[0]["origin"]:
            told, wanted = (f"{told}, drawn as {of['origin']}" for of in (field, fields[0]))
        if told != wanted:
            raise UnsupportedError(
                f"the head of {model.source} cannot be averaged with the others",
                given=told,
                expected=f"{wanted}, as of {first.source}",
                fix="set scope to body, which keeps one head; or train all from one start, or with one "
                "head_seed; or write each as a stock model first: moemerge export --form linear",
            )


def _difference(model: ModelFolder, reference: ModelFolder, scope: Scope, heads: bool) -> Difference | None:
    if model.dense_type != reference.dense_type:
        return f"model_type {model.dense_type}", f"model_type {reference.dense_type}"
    shapes, wanted = _shapes(model, heads), _shapes(reference, heads)
    if lone := sorted(shapes.keys() ^ wanted.keys()):
        has, lacks = f"a {lone[0]}", f"no {lone[0]}"
        return (has, lacks) if lone[0] in shapes else (lacks, has)
    table = embeddings_name(reference)
    for name in names_in_scope(reference, scope):
        if name != table and name in wanted and shapes[name] != wanted[name]:
            return (
                f"{name} {shapes[name]}{_sizes(model, reference)}",
                f"{wanted[name]}{_sizes(reference, model)}",
            )
    return None


def _shapes(model: ModelFolder, head: bool) -> dict[str, tuple[int, ...]]:
    """The shapes of its tensors, those of its head only if asked for."""
    own, skipped = skeleton(model.config), set() if head else {*model.head_names}
    return {name: tuple(tensor.shape) for name, tensor in own.state_dict().items() if name not in skipped}


def _sizes(model: ModelFolder, other: ModelFolder) -> str:
    """The numbers in the model's config that are others there: what makes shapes differ."""
    values = {key: getattr(model.config, key, None) for key in differing_settings(model, other)}
    sizes = [f"{key} {value}" for key, value in values.items() if isinstance(value, int)]
    return f" ({few(sizes)})" if sizes else ""


def check_pooling(models: Sequence[ModelFolder], tokenizers: Sequence[PreTrainedTokenizerBase]) -> None:
    """All reward models must read scores at one token, or the merged head is given foreign states."""
    family = known_family(models[0].dense_type)
    if family is not None and not family.causal:  # encoders read the first token
        return
    judges = [*zip(models, tokenizers, strict=True)]
    if len({reads_before_the_end(model.config, tokenizer) for model, tokenizer in judges}) > 1:
        pads = ", ".join(f"{model.source}: {named_pad(model.config)}" for model in models)
        raise UnsupportedError(
            "the models read their scores at different tokens",
            given=f"pad_token_id in config.json: {pads}; one of them is an end token too",
            expected="models that all read the end token's state, or all the state before it",
            fix="leave out those that differ; or give them the others' pad_token_id and train them first",
        )


def check_vocabularies(
    models: Sequence[ModelFolder], tokenizers: Sequence[PreTrainedTokenizerBase], has_base: bool
) -> None:
    """Raise UnsupportedError unless tokens that nobody added have the same ids: they come from one start."""
    words = [_own_words(tokenizer) for tokenizer in tokenizers]

    def differ(number: int, other: int) -> Difference | None:
        differing = sorted({token for token, _ in words[number].items() ^ words[other].items()})
        given = f"tokens that differ: {few(map(repr, differing))}"
        return (given, "one vocabulary, up to added tokens") if differing else None

    _refuse_odd_one(models, has_base, differ, "the tokenizer of ")


def _own_words(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    """The tokens that were not added, with their ids."""
    added = {str(token) for token in tokenizer.added_tokens_decoder.values()}
    return {token: row for token, row in tokenizer.get_vocab().items() if token not in added}


def _refuse_odd_one(
    models: Sequence[ModelFolder],
    has_base: bool,
    differ: Callable[[int, int], Difference | None],
    part: str = "",
) -> None:
    """Raise UnsupportedError for the first model that differs from the one with which most agree.

    So no other is blamed for it, a wrong base say. `part`: what of a model differs.
    """
    if all(differ(number, 0) is None for number in range(1, len(models))):
        return
    agreeing = [sum(differ(other, n) is None for other in range(len(models))) for n in range(len(models))]
    reference = agreeing.index(max(agreeing))
    odd, (given, expected) = next(
        (number, found) for number in range(len(models)) if (found := differ(number, reference)) is not None
    )
    is_base = has_base and odd == 0
    raise UnsupportedError(
        f"{part}{'the base ' * is_base}{models[odd].source} does not go with the others",
        given=given,
        expected=f"{expected}, as of {models[reference].source}",
        fix=WHICH_BASE if is_base else WHICH_MODELS,
    )
