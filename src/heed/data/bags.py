"""Bags of instance features with labels: what they are, how they are split without leakage, and how they are padded.

bag: features (n, width), perhaps coordinates (n, 2) and labels (n,) of its instances; one label for the bag
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import safetensors
import safetensors.torch
import torch
from jaxtyping import Bool, Float, Int64
from torch import Tensor

from heed.checkpoint import write_atomically
from heed.data.bag_files import Instances, fingerprint, read_instances

SPLITS = ("train", "val", "test")
SHARES = (0.6, 0.15, 0.25)  # of the patients of every class, where the source has no split


@dataclass(frozen=True, eq=False)
class Bag:
    """A bag with its label.

    Args:
        name: of the slide.
        label: class.
        source: the instances, or the file that holds them.
        patient: whose it is; bags of one patient are never in two splits.
        split: "train", "val" or "test"; empty before it is in one.
    """

    name: str
    label: int
    source: Instances | Path
    patient: str = ""
    split: str = ""

    def instances(self) -> Instances:
        """The instances; a file is read anew every time.

        Raises:
            ValueError: the file cannot be read, or holds no features.
        """
        return read_instances(self.source) if isinstance(self.source, Path) else self.source


class Batch(NamedTuple):
    """Bags padded to the longest of them.

    Args:
        x: (B, N, width), 0 where there is padding.
        valid: (B, N), False where there is padding.
        labels: (B,) of the bags.
    """

    x: Float[Tensor, "B N C"]
    valid: Bool[Tensor, "B N"]
    labels: Int64[Tensor, " B"]

    def to(self, device: torch.device | str) -> Batch:
        """On another device."""
        return Batch(*(tensor.to(device) for tensor in self))


def pad_bags(bags: Sequence[Bag]) -> Batch:
    """Read bags and pad them; a `collate_fn` of torch's DataLoader.

    Raises:
        ValueError: no bags, an empty one, or widths that differ.
    """
    if not bags:
        raise ValueError("no bags to pad; give at least one")
    features = [bag.instances().features for bag in bags]
    for bag, part in zip(bags, features, strict=True):
        if len(part) == 0:
            raise ValueError(f"{bag.name} is an empty bag; leave out bags without instances")
        if part.shape[1] != features[0].shape[1]:
            raise ValueError(
                f"{bag.name} has features of width {part.shape[1]}, {bags[0].name} of width {features[0].shape[1]}; "
                "extract them with one encoder"
            )
    sizes = torch.tensor([len(part) for part in features])
    valid = torch.arange(int(sizes.max())) < sizes[:, None]
    x = torch.nn.utils.rnn.pad_sequence(features, batch_first=True)
    return Batch(x, valid, torch.tensor([bag.label for bag in bags]))


@dataclass(frozen=True)
class BagData:
    """Bags in three splits, and what they are.

    Args:
        name: where they come from.
        classes: names of the classes, in the order of the labels.
        width: of the features.
        bags: all of them.
        notes: what was done to the data that the user should know.
    """

    name: str
    classes: tuple[str, ...]
    width: int
    bags: tuple[Bag, ...]
    notes: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_splits(self.bags, self.classes, self.name)

    def part(self, split: str) -> list[Bag]:
        """The bags of "train", "val" or "test"."""
        return [bag for bag in self.bags if bag.split == split]

    def fingerprint(self) -> str:
        """A digest of classes, splits, labels and features; of large files, their size, beginning and end."""
        digest = hashlib.sha256(json.dumps([self.classes, self.width]).encode())
        for bag in self.bags:
            digest.update(repr((bag.name, bag.label, bag.patient, bag.split)).encode())
            digest.update(fingerprint(bag.source))
        return digest.hexdigest()

    def save(self, path: Path) -> None:
        """Write labels, splits and what is in memory to one safetensors file; bags in files stay where they are."""
        tensors, manifest = {}, []
        for i, bag in enumerate(self.bags):
            entry: dict[str, Any] = {"name": bag.name, "label": bag.label, "patient": bag.patient, "split": bag.split}
            if isinstance(bag.source, Path):
                entry["file"] = str(bag.source.resolve())
            else:
                named = bag.source._asdict().items()
                tensors |= {f"{i}.{key}": value.contiguous() for key, value in named if value is not None}
            manifest.append(entry)
        described = {"name": self.name, "classes": self.classes, "width": self.width, "notes": self.notes}
        metadata = {"data": json.dumps(described), "bags": json.dumps(manifest)}
        write_atomically(path, safetensors.torch.save(tensors, metadata=metadata))

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read what `save` wrote."""
        with safetensors.safe_open(path, "pt") as file:
            metadata, keys = file.metadata(), set(file.keys())
            bags = []
            for i, entry in enumerate(json.loads(metadata["bags"])):
                found = entry.pop("file", None)
                held = {name: f"{i}.{name}" for name in Instances._fields if f"{i}.{name}" in keys}
                tensors = {name: file.get_tensor(key) for name, key in held.items()}
                bags.append(Bag(source=Path(found) if found else Instances(**tensors), **entry))
        described = json.loads(metadata["data"])
        classes, notes = tuple(described["classes"]), tuple(described["notes"])
        return cls(described["name"], classes, described["width"], tuple(bags), notes)


def split_by_patient(bags: Sequence[Bag], seed: int = 0, shares: Sequence[float] = SHARES) -> list[Bag]:
    """Put bags into train, val and test so that no patient is in two of them, class by class.

    A patient counts to the class that most of its bags have, the last of equals. Every split gets at least one patient
    of every class.

    Args:
        bags: in any split.
        seed: of the order of the patients.
        shares: of the patients of a class, for train, val and test.

    Raises:
        ValueError: a class has fewer than three patients; shares are not three that sum to 1.
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-6:
        raise ValueError(f"shares={tuple(shares)}: give three numbers above 0 that sum to 1")
    labels: defaultdict[str, Counter[int]] = defaultdict(Counter)
    for bag in bags:
        labels[bag.patient][bag.label] += 1
    patients: defaultdict[int, list[str]] = defaultdict(list)
    for patient, counts in sorted(labels.items()):
        patients[max(counts, key=lambda label: (counts[label], label))].append(patient)
    shuffle = torch.Generator().manual_seed(seed)
    place = {}
    for label, members in sorted(patients.items()):
        if len(members) < 3:
            raise ValueError(
                f"class {label} has {len(members)} patient(s); at least 3 are needed for train, val and test"
            )
        order = [members[i] for i in torch.randperm(len(members), generator=shuffle)]
        val, test = (max(1, round(share * len(order))) for share in shares[1:])
        test = min(test, len(order) - val - 1)
        for i, patient in enumerate(order):
            place[patient] = SPLITS[1 if i < val else 2 if i < val + test else 0]
    return [dataclasses.replace(bag, split=place[bag.patient]) for bag in bags]


def _check_splits(bags: Sequence[Bag], classes: Sequence[str], source: str) -> None:
    """ValueError where a split misses a class, or a patient is in two splits."""
    seen: dict[str, Bag] = {}
    for bag in bags:
        if bag.split not in SPLITS:
            raise ValueError(f"{source}: {bag.name} has the split {bag.split!r}; use {', '.join(SPLITS)}")
        first = seen.setdefault(bag.patient or bag.name, bag)
        if first.split != bag.split:
            raise ValueError(
                f"{source}: patient {bag.patient!r} is in two splits, {first.name} in {first.split} and {bag.name} in "
                f"{bag.split}; put all slides of a patient into one"
            )
    if len(classes) < 2:
        raise ValueError(f"{source} has {len(classes)} class(es) of bags; at least two are needed")
    for split in SPLITS:
        present = {bag.label for bag in bags if bag.split == split}
        missing = [name for label, name in enumerate(classes) if label not in present]
        if missing:
            raise ValueError(f"{source}: split {split!r} has no bag of class {', '.join(missing)}; move one there")
