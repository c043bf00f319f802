"""What a right answer is: the one notion that evaluation, report and search share."""

from __future__ import annotations

import unicodedata
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from modest_align_train.latents import Latents


def caption_key(caption: str) -> str:
    """What two captions that say the same have in common: their words, whatever the case and the white space."""
    return " ".join(unicodedata.normalize("NFKC", caption).casefold().split())


class Answers:
    """Which captions are right for which images.

    A caption is right for an image if any image of the same group has an equal one (`caption_key`). So all captions of
    a group's images are right for each of them, and an image that shares only one caption with another shares only
    that answer.

    Args:
        latents: Gives the groups and the captions; of one split, where only that one is searched.
    """

    def __init__(self, latents: Latents) -> None:
        self.group, self.text = latents.group, latents.caption_text
        groups, texts = int(self.group.max()) + 1, int(self.text.max()) + 1
        pairs = (self.group[latents.caption_image] * texts + self.text).unique()
        group, text = pairs // texts, pairs % texts
        self._texts_of_group = _Lists(group, text, groups)
        self._groups_of_text = _Lists(text, group, texts)
        self._captions_of_text = _Lists.of_labels(self.text)
        self._images_of_group = _Lists.of_labels(self.group)

    def captions(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Tell the right captions of images by their rows, int64 [n].

        Returns:
            Each pair's position in ``images`` and its caption, int64 [pairs] each.
        """
        return self._texts_of_group.then(self._captions_of_text, self.group[images])

    def images(self, captions: Tensor) -> tuple[Tensor, Tensor]:
        """Tell the right images of captions by their rows; see `captions`."""
        return self._groups_of_text.then(self._images_of_group, self.text[captions])

    def counts(self) -> tuple[Tensor, Tensor]:
        """Count the right captions of each image, int64 [images], and the right images of each caption [captions]."""
        return (
            self._texts_of_group.sums(self._captions_of_text.count)[self.group],
            self._groups_of_text.sums(self._images_of_group.count)[self.text],
        )

    def one_to_one(self, latents: Latents) -> tuple[Tensor, Tensor]:
        """Choose pairs of which each image has one right caption and each caption one right image.

        Of each group its first image with the first of its captions that is not right for an image chosen before; a
        group that has none, or for which a caption chosen before is right, is left out.

        Returns:
            Rows of the images and of the captions, int64 [pairs] each.
        """
        first_image = _first_of_each(self.group).tolist()
        counts = latents.caption_image.bincount(minlength=len(self.group))
        first_caption = (counts.cumsum(0) - counts).tolist()
        text, counts = self.text.tolist(), counts.tolist()
        taken: set[int] = set()  # texts that are right for an image chosen
        chosen: set[int] = set()  # texts chosen
        pairs = []
        for texts, image in zip(self._texts_of_group.split(), first_image, strict=True):
            captions = range(first_caption[image], first_caption[image] + counts[image])
            caption = next((row for row in captions if text[row] not in taken), None)
            if caption is not None and chosen.isdisjoint(texts):
                taken.update(texts)
                chosen.add(text[caption])
                pairs.append((image, caption))
        image, caption = torch.tensor(pairs, device=self.group.device).T
        return image, caption


class _Lists:
    """A list of values for each key from 0 to ``keys`` - 1, of pairs (key, value)."""

    def __init__(self, key: Tensor, value: Tensor, keys: int) -> None:
        order = key.argsort(stable=True)
        self.key, self.value = key[order], value[order]
        self.count = key.bincount(minlength=keys)
        self.first = self.count.cumsum(0) - self.count

    @classmethod
    def of_labels(cls, label: Tensor) -> _Lists:
        """The positions of each label."""
        return cls(label, torch.arange(len(label), device=label.device), int(label.max()) + 1)

    def of(self, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values of int64 [n] keys: of each its key's position in ``keys``, and itself, int64 [values] each."""
        count = self.count[keys]
        position = torch.arange(len(keys), device=keys.device).repeat_interleave(count)
        place = torch.arange(len(position), device=keys.device) + (self.first[keys] - count.cumsum(0) + count)[position]
        return position, self.value[place]

    def then(self, other: _Lists, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Values that another has for the values of keys; see `of`."""
        position, between = self.of(keys)
        place, values = other.of(between)
        return position[place], values

    def sums(self, number: Tensor) -> Tensor:
        """Sum of the values' numbers, int64 [keys]."""
        return torch.zeros_like(self.count).index_add_(0, self.key, number[self.value])

    def split(self) -> list[list[int]]:
        return [values.tolist() for values in self.value.split(self.count.tolist())]


def _first_of_each(label: Tensor) -> Tensor:
    """Position of the first 0, the first 1, ... in int64 [n]; each label from 0 must occur."""
    first = torch.full((int(label.max()) + 1,), len(label), device=label.device)
    return first.scatter_reduce(0, label, torch.arange(len(label), device=label.device), "amin")
