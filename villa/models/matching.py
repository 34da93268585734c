"""Matching of weight rows by name: word-pieces and labels, from a checkpoint's order to the data's."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from villa.checkpoints.load_report import listed
from villa.errors import CheckpointError
from villa.facts import DataFacts, RowKind

#: Label names that transformers generates, and numbers, the labels of data without names.
_GENERIC, _NUMBER = re.compile(r"LABEL_(\d+)"), re.compile(r"(?:LABEL_)?(\d+)")
#: Facts of reading that must agree for the weights to be usable.
_DECISIVE = ("feature extractor", "kind of tokenizer")
_SPECIAL = ("[CLS]", "[SEP]", "[MASK]")
_WORDS: dict[RowKind, str] = {"tokens": "word-pieces", "labels": "labels"}
_FRESH = -1
#: Vocabularies are padded to a multiple of one of these.
_PADDED = (8, 16, 32, 64, 128, 256, 512)

Name = str | None


class Matching:
    """Matches the word-pieces and labels of weights to those of the data.

    Args:
        source: where the weights come from, for messages.
        given: facts stored beside the weights; with ``vocab_size``, its tokens only name that many rows.
        wanted: facts of the data.

    Raises:
        CheckpointError: the data are read in a way that makes the weights useless.
    """

    def __init__(self, source: str, given: DataFacts, wanted: DataFacts) -> None:
        self.source, self.given = source, given
        counted = _counted(given.labels, wanted.labels)
        self._numbered = counted is not None
        self.wanted = wanted = wanted if counted is None else replace(wanted, labels=counted)
        self._names: dict[RowKind, tuple[Sequence[Name] | None, Sequence[Name] | None]] = {
            "tokens": (given.tokens, wanted.tokens),
            "labels": (_usable(given.labels, wanted.labels), _usable(wanted.labels, given.labels)),
        }
        self._check()

    def names(self, kind: RowKind) -> bool:
        """Return whether both sides name their rows."""
        return None not in self._names[kind]

    def moves(self, kind: RowKind) -> bool:
        """Return whether both sides name their rows, but differently."""
        given, wanted = self._names[kind]
        return given is not None and wanted is not None and tuple(given) != tuple(wanted)

    def rows(self, kind: RowKind, given: int, wanted: int) -> Tensor | None:
        """Return the file's row for each row of the model, int64 ``[wanted]``; -1 for a fresh one.

        Rows that neither side names (of a padded vocabulary) are matched by position. None if the order does not
        change.
        """
        theirs, ours = self._names[kind]
        if theirs is None or ours is None or (given == wanted and not self.moves(kind)):
            return None
        named = self.given.vocab_size if kind == "tokens" else len(theirs)
        if named is not None and given != named and not (kind == "tokens" and _is_padded(named, given)):
            return None
        if kind == "labels" and len(ours) != wanted:
            return None
        theirs, ours = _filled(theirs, given), _filled(ours, wanted)
        places = {name: row for row, name in enumerate(theirs) if name is not None}
        found = [
            (row if row < given and theirs[row] is None else _FRESH) if name is None else places.get(name, _FRESH)
            for row, name in enumerate(ours)
        ]
        if kind == "labels":
            _match_spelling(found, theirs, ours)
        return torch.tensor(found)

    def place(
        self, weights: MutableMapping[str, Tensor], fresh: Mapping[str, Tensor], rows: Mapping[str, RowKind]
    ) -> None:
        """Reorder the rows of the weights to the model's order, in place.

        A tensor with no row for any of the model's labels is removed, so that the parameter stays fresh.

        Args:
            weights: tensors of the file under the model's names.
            fresh: the model's own values, which new rows keep.
            rows: what the rows of parameters stand for (``Model.named_rows``).

        Raises:
            CheckpointError: the two sides have no word-piece in common.
        """
        for name, kind in rows.items():
            if name not in weights or name not in fresh or not weights[name].dim():
                continue
            given, ours = weights[name], fresh[name]
            found = self.rows(kind, len(given), len(ours)) if given.shape[1:] == ours.shape[1:] else None
            if found is None:
                continue
            known = found >= 0
            if not known.any():
                if kind == "tokens":
                    raise CheckpointError(
                        f"'{self.source}' has no word-piece in common with the data; read them by its own tokenizer"
                    )
                del weights[name]
                continue
            placed = ours.clone()
            placed[known] = given[found[known]].to(ours)
            weights[name] = placed

    def notes(
        self, loaded: Mapping[str, Tensor], fresh: Mapping[str, Tensor], rows: Mapping[str, RowKind]
    ) -> tuple[str, ...]:
        """Describe how named rows were matched, and what was assumed about the others.

        Args:
            loaded: tensors of the file under the model's names, before reordering.
            fresh: the model's own values.
            rows: see ``place``.
        """
        both = [(name, kind) for name, kind in rows.items() if name in loaded and name in fresh and fresh[name].dim()]
        kinds = {kind: (len(loaded[name]), len(fresh[name])) for name, kind in both if loaded[name].dim()}
        moved = [kind for kind, sizes in kinds.items() if self.moves(kind) or self.rows(kind, *sizes) is not None]
        notes = [self._moved(kind, *kinds[kind]) for kind in moved]
        if self._numbered and "labels" in kinds:
            notes.append(f"the data's labels are numbers: 0 is taken to be '{(self.given.labels or ())[0]}', and so on")
        return (*notes, *self._assumed([kind for kind in kinds if kind not in moved]))

    def reading(self) -> tuple[str, ...]:
        """Describe what is read differently from when the weights were trained."""
        both = ((fact, self.given.reading.get(fact), value) for fact, value in self.wanted.reading.items())
        return tuple(
            f"{fact} {before} in training, {now} in the data" for fact, before, now in both if before not in (None, now)
        )

    def _check(self) -> None:
        before, now = self.given.reading, self.wanted.reading
        for fact in _DECISIVE:
            if None not in (before.get(fact), now.get(fact)) and before[fact] != now[fact]:
                raise CheckpointError(
                    f"'{self.source}' was trained with the {fact} '{before[fact]}', but the data are read with "
                    f"'{now[fact]}'; use that of the checkpoint"
                )
        theirs, ours = _special(self.given), _special(self.wanted)
        other = next((token for token in theirs if token in ours and theirs[token] != ours[token]), None)
        if other is not None and not self.moves("tokens"):
            raise CheckpointError(
                f"'{self.source}' was trained with {other} as word-piece {theirs[other]}, but it is {ours[other]} in "
                "the data: they were made with another tokenizer; make them with that of the checkpoint"
            )

    def _moved(self, kind: RowKind, given: int, wanted: int) -> str:
        theirs, ours = self._names[kind]
        assert theirs is not None
        assert ours is not None
        found = self.rows(kind, given, wanted)
        if found is None:
            return (
                f"{len(theirs)} names for {given} {_WORDS[kind]} of the file: rows are taken to be in the data's order"
            )
        ours = _filled(ours, wanted)
        named = [row for row, name in enumerate(ours) if name is not None]
        fresh = [f"'{ours[row]}'" for row in named if found[row] < 0]
        used = set(found.tolist())
        unused = [f"'{name}'" for row, name in enumerate(theirs[:given]) if name is not None and row not in used]
        pairs = zip(found.tolist(), ours, strict=True)
        changed = [f"'{theirs[row]}' as '{name}'" for row, name in pairs if _is_renamed(theirs, row, name)]
        parts = [f"{_WORDS[kind]} by name: {len(named) - len(fresh)} of {len(named)}"]
        if len(fresh) == len(named):
            parts[0] = f"no {_WORDS[kind]} in common with the file: the last layer of the head is fresh"
        elif fresh:
            parts.append(f"fresh: {listed(fresh)}")
        if unused:
            parts.append(f"not used: {listed(unused)}")
        if changed:
            parts.append(f"spelt otherwise: {listed(changed)}")
        if not self.moves(kind):
            parts.append(f"the file has {given} rows, the model {wanted}")
        elif len(parts) == 1:
            parts[0] += ", in another order"
        return "; ".join(parts)

    def _assumed(self, kinds: Sequence[RowKind]) -> list[str]:
        """Describe the assumptions about rows that are not named on both sides."""
        lacking: dict[str, list[str]] = {}
        for kind in kinds:
            theirs, ours = self._names[kind]
            if (theirs is not None and ours is not None) or self._known_alike(kind):
                continue
            where = "file" if theirs is None else "data"
            lacking.setdefault(where, []).append(_WORDS[kind])
        orders = {"file": "data's", "data": "file's"}
        return [
            f"no names in the {where}: rows of {' and '.join(what)} are taken to be in the {orders[where]} order"
            for where, what in lacking.items()
        ]

    def _known_alike(self, kind: RowKind) -> bool:
        """Return whether there is nothing to assume: no labels at all, or tokenizers of the same name."""
        if kind == "labels":
            return self.wanted.labels is None and self.given.labels is None
        named = self.given.reading.get("tokenizer")
        return named is not None and named == self.wanted.reading.get("tokenizer")


def _usable(labels: Sequence[str] | None, others: Sequence[str] | None) -> Sequence[str] | None:
    """Return the labels if their names identify them; None if they have no names or share some.

    ``LABEL_0``, ... count as names if the other side has such names too, or if one side's numbers include the other's:
    a number may mean another row where counting starts at 1.
    """
    if not labels or len(set(labels)) < len(labels):
        return None
    if not all(map(_GENERIC.fullmatch, labels)) or (others and all(map(_GENERIC.fullmatch, others))):
        return labels
    ours, theirs = _numbers(labels), _numbers(others or ())
    return labels if theirs and (ours <= theirs or theirs <= ours) else None


def _counted(given: Sequence[str] | None, wanted: Sequence[str] | None) -> tuple[str, ...] | None:
    """Return the names that the data's labels stand for if they are the numbers 0, 1, ... of the file's, else None."""
    if not given or not wanted or len(given) != len(wanted) or {*wanted} != {str(row) for row in range(len(given))}:
        return None
    named = not any(map(_NUMBER.fullmatch, given)) and len({*given}) == len(given)
    return tuple(given[int(label)] for label in wanted) if named else None


def _numbers(labels: Sequence[str]) -> set[int]:
    """Return the labels as numbers; an empty set if one of them is not a number."""
    found = [_NUMBER.fullmatch(label) for label in labels]
    return {int(match[1]) for match in found if match} if all(found) else set()


def _is_padded(rows: int, given: int) -> bool:
    """Return whether ``given`` is ``rows`` padded to a size that is fast to compute with."""
    return any(given == -(-rows // size) * size for size in _PADDED)


def _filled(names: Sequence[Name], rows: int) -> list[Name]:
    """Return one name per row, None for rows beyond the names."""
    return [*names[:rows], *[None] * (rows - len(names))]


def _match_spelling(found: list[int], theirs: Sequence[Name], ours: Sequence[Name]) -> None:
    """Match labels that differ only in case, surrounding white space or ``LABEL_``, where this is unambiguous."""
    used, alike = set(found), Counter(map(_folded, ours))
    left: dict[str, list[int]] = {}
    for row, name in enumerate(theirs):
        if name is not None and row not in used:
            left.setdefault(_folded(name), []).append(row)
    for row, name in enumerate(ours):
        if found[row] == _FRESH and name is not None and alike[_folded(name)] == 1:
            rows = left.get(_folded(name), [])
            found[row] = rows[0] if len(rows) == 1 else _FRESH


def _folded(name: Name) -> str:
    name = (name or "").strip()
    number = _GENERIC.fullmatch(name)
    return number[1] if number else name.casefold()


def _is_renamed(theirs: Sequence[Name], row: int, name: Name) -> bool:
    return 0 <= row < len(theirs) and theirs[row] is not None and theirs[row] != name


def _special(facts: DataFacts) -> dict[str, int]:
    """Return the ids of BERT's special tokens, as far as they are known."""
    if facts.tokens is not None:
        return {token: facts.tokens.index(token) for token in _SPECIAL if token in facts.tokens}
    return {token: int(facts.reading[token]) for token in _SPECIAL if token in facts.reading}


#: LoRA's parts of a linear layer; the rows of the first are not those of the layer.
_ADAPTERS = ("lora_A", "lora_B")


def rows_of(module: nn.Module, words: Iterable[nn.Module], heads: Iterable[str]) -> dict[str, RowKind]:
    """Return what the rows of parameters stand for.

    Args:
        module: the module that the parameter names start from.
        words: embeddings and decoders of word-pieces.
        heads: parameter-name prefixes of the head.
    """
    found: dict[str, RowKind] = dict.fromkeys(_of_words(module, words), "tokens")
    heads = tuple(heads)
    last = [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear)
        and any(name == head or name.startswith(f"{head}.") for head in heads)
        and not {*_ADAPTERS} & {*name.split(".")}
    ]
    if last:
        found |= dict.fromkeys(_of_layer(module, last[-1]), "labels")
    return found


def _of_words(module: nn.Module, words: Iterable[nn.Module]) -> Iterator[str]:
    """Yield the parameter names of word embeddings and decoders, tied or not, and of the decoders' biases."""
    inner = {id(value): value for part in words for value in part.parameters(recurse=False)}
    named = dict(module.named_parameters(remove_duplicate=False))
    for name, value in named.items():
        if id(value) not in inner:
            continue
        yield name
        decoder = name.rpartition(".")[0]
        for beside in (f"{decoder}.bias", f"{decoder.rpartition('.')[0]}.bias"):
            if beside in named and named[beside].shape == value.shape[:1]:
                yield beside


def _of_layer(module: nn.Module, path: str) -> Iterator[str]:
    """Yield the parameter names of a linear layer, those of its LoRA adapter included."""
    whole = path.removesuffix(".base_layer")
    size = module.get_parameter(f"{path}.weight").shape[0]
    for name, value in module.named_parameters(remove_duplicate=False):
        if name.startswith(f"{whole}.") and _ADAPTERS[0] not in name.split(".") and value.shape[0] == size:
            yield name
