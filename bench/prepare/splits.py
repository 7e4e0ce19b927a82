"""Cutting a validation split from train: a published rule, the same on every machine."""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from bench.dataset import Item

CUT_RULE = (
    "Pictures of one identity form a group; a picture without identity is a group of its own. Groups are visited in ascending order "
    "of sha256(salt + newline + (identity or source)), UTF-8. The quota of a class with n pictures is floor(fraction * n + 0.5), at "
    "least 1 and at most n - 1 (0 if n = 1). A group goes to val if no class would exceed its quota. Then each class with a quota but "
    "nothing in val, in class order, sends the group that exceeds the quotas least, the earliest such, among those that leave every "
    "class a picture in train."
)
"""The rule of `stratified_cut` in words, as written into the index."""


def stratified_cut(items: Sequence[Item], *, fraction: float, salt: str) -> tuple[list[Item], list[Item]]:
    """Cut a validation split off ``items``, class by class, no person on both sides; see `CUT_RULE`.

    Without identities this is, per class, the first ``floor(fraction * n + 0.5)`` pictures in order of their hash: adding or removing
    pictures of one class moves none of another.

    Args:
        items: pictures of the training split; sources are unique.
        fraction: wanted share of val, between 0 and 1.
        salt: part of what is hashed; another salt is another cut.

    Returns:
        (train, val), both in the order of ``items``.

    Raises:
        ValueError: the fraction is not between 0 and 1, or nothing can go to val because every class has one picture or one person only.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction of the val split is {fraction}; give a number between 0 and 1, such as 0.1")
    totals = Counter(item.label for item in items)
    quota = {label: min(max(math.floor(fraction * n + 0.5), 1), n - 1) for label, n in totals.items()}
    groups: dict[tuple[bool, str], Counter[int]] = {}
    for item in items:
        groups.setdefault(_group(item), Counter())[item.label] += 1
    order = sorted(groups, key=lambda group: hashlib.sha256(f"{salt}\n{group[1]}".encode()).digest())

    taken: Counter[int] = Counter()
    chosen: set[tuple[bool, str]] = set()
    for group in order:
        if all(taken[label] + n <= quota[label] for label, n in groups[group].items()):
            taken += groups[group]
            chosen.add(group)
    for label in sorted(quota):
        if quota[label] == 0 or taken[label] > 0:
            continue
        possible = [g for g in order if groups[g][label] > 0 and all(taken[part] + n < totals[part] for part, n in groups[g].items())]
        if possible:
            best = min(possible, key=lambda g: sum(max(0, taken[part] + n - quota[part]) for part, n in groups[g].items()))
            taken += groups[best]
            chosen.add(best)
    if not chosen:
        raise ValueError("no val split can be cut from train: every class has only one picture, or one person. Provide a val folder")
    train = [item for item in items if _group(item) not in chosen]
    val = [item for item in items if _group(item) in chosen]
    return train, val


def cut_val(train: Sequence[Item], *, fraction: float, salt: str) -> tuple[list[Item], list[Item], dict[str, Any]]:
    """Cut val off train with `stratified_cut`, and say so.

    Returns:
        (train, val, what the index records about the cut).

    Raises:
        ValueError: see `stratified_cut`.
    """
    kept, val = stratified_cut(train, fraction=fraction, salt=salt)
    facts = {"sources_sha256": hash_sources(val), "cut_from_train": True, "rule": CUT_RULE, "fraction": fraction, "salt": salt}
    return kept, val, facts


def mixed(items: Iterable[Item]) -> list[Item]:
    """Items in the order of the sha256 of their source: classes are mixed in every shard."""
    return sorted(items, key=lambda item: hashlib.sha256(item.source.encode()).digest())


def hash_sources(items: Iterable[Item]) -> str:
    """sha256 of the sorted sources, newline-separated: two cuts with the same hash are the same cut."""
    return hashlib.sha256("\n".join(sorted(item.source for item in items)).encode()).hexdigest()


def _group(item: Item) -> tuple[bool, str]:
    # The flag keeps a person called like a file apart from the file.
    return (False, item.source) if item.identity is None else (True, item.identity)
