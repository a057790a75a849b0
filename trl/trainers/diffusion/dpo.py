"""Diffusion-DPO: preferences between two pictures of a prompt (arXiv:2311.12908).

    L = −log σ(−β/2 [(e_w − e_w,ref) − (e_l − e_l,ref)]),     e: squared error of the denoiser on a noised picture

DiffusionDPOTrainer(model="stable-diffusion-v1-5/stable-diffusion-v1-5", train_dataset=pairs).train()
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from datasets import Dataset, IterableDataset
from torch import Tensor, nn

from trl.algorithms.diffusion_dpo import diffusion_dpo, squared_error
from trl.data.multimodal import undecoded
from trl.diffusion.forward_process import Noised, NoisedBatch, NoisedPicture, noised_batch
from trl.diffusion.rollouts import IN_EVALUATION, IN_TRAINING, seed_of
from trl.errors import ConfigError, DataError, RowError
from trl.trainers.diffusion.base import DiffusionTrainer, Rows, check_prompt, check_prompts
from trl.trainers.diffusion.config import DiffusionConfig
from trl.types import Metrics
from trl.vision.images import PixelLimits, image_size, read_image

SIDES = ("chosen", "rejected")
NUMBER = "row_number"


@dataclass
class DiffusionDPOConfig(DiffusionConfig):
    """Options of `DiffusionDPOTrainer`. Batch sizes count pairs."""

    READS_PICTURES = True

    learning_rate: float = 1e-5

    beta: float = 5000.0
    """β: strength of the regularisation towards the reference; the paper has 2000 for Stable Diffusion 1.5 and 5000 for XL."""

    shuffle_dataset: bool = True
    """Take pairs in random order, a new one in each epoch."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.beta > 0:
            raise ConfigError(f"beta={self.beta}: give a number above 0, such as 2000.")


class DiffusionDPOTrainer(DiffusionTrainer):
    """Train on rows of `prompt`, `chosen` and `rejected`: a text, and two pictures of which the first is preferred.

    Pictures are Pillow images, tensors `[3,H,W]` in [0, 1], bytes, or file names (relative to `image_folder`); they are scaled
    to the model's size. Those of a dataset are checked before training, those of a stream when they are read. Arguments: see
    `DiffusionTrainer`.
    """

    config_class = DiffusionDPOConfig

    def __init__(
        self, model: Any, args: Any = None, train_dataset: Any = None, eval_dataset: Any = None, **keywords: Any
    ) -> None:
        train, evaluation = (numbered(*each) for each in ((train_dataset, "train"), (eval_dataset, "eval")))
        super().__init__(model, args, train, evaluation, **keywords)
        self.keep_reference_model()

    @staticmethod
    def check_rows(rows: Rows, name: str, args: DiffusionConfig) -> None:
        check_columns(rows, name)
        check_prompts(rows, name)
        if isinstance(rows, Dataset):
            check_pictures(rows, name, args.image_folder)

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self.args.shuffle_dataset:
            return super()._get_train_sampler(*args, **kwargs)
        return torch.utils.data.SequentialSampler(self.train_dataset)

    # ---- steps ----

    def size(self, item: NoisedPicture) -> int:
        return 2

    def items(self, rows: Sequence[Any], *, source: str) -> list[NoisedPicture]:
        stream = IN_TRAINING if source == "get_train_dataloader" else IN_EVALUATION
        step = self.state.global_step if stream == IN_TRAINING else 0
        found = []
        for row, latents in zip(rows, self._latents(rows), strict=True):
            seed = seed_of(self.args.seed, stream, step * 2**24 + row[NUMBER])
            level = float(torch.rand((), generator=torch.Generator().manual_seed(seed)))
            found.append(NoisedPicture(latents, row["prompt"], level, seed + 1))
        return found

    def _latents(self, rows: Sequence[Any]) -> list[tuple[Tensor, Tensor]]:
        """The VAE's latents of the chosen and the rejected picture of each row."""
        for row in rows:
            check_prompt(row["prompt"], f"Row {row[NUMBER] + 1}")
        stacked = torch.stack([self._picture(row, side) for side in SIDES for row in rows]).to(self.args.device)
        latents = self.denoiser.encode_images(stacked, at_once=self.args.vae_batch_size).cpu()
        return [*zip(latents[: len(rows)], latents[len(rows) :], strict=True)]

    def _picture(self, row: Mapping[str, Any], side: str) -> Tensor:
        with naming_picture(row[NUMBER], side):
            return as_tensor(row[side], (self.denoiser.height, self.denoiser.width), self.args.image_folder)

    def collate(self, items: Sequence[NoisedPicture]) -> NoisedBatch:
        return noised_batch(items, self.texts([item.prompt for item in items]))

    def describe(self, items: Sequence[NoisedPicture]) -> list[str]:
        return [f"a pair for {item.prompt!r}, at noise level {item.level:.3f}" for item in items]

    def loss(self, model: nn.Module, batch: NoisedBatch) -> tuple[Tensor, Metrics]:
        noised = batch.noised(self.denoiser)
        chosen, rejected = self._errors(model, noised)
        with torch.no_grad(), self.reference() as module:
            ref_chosen, ref_rejected = self._errors(module, noised)
        loss, metrics = diffusion_dpo(chosen, rejected, ref_chosen, ref_rejected, beta=self.args.beta)
        metrics |= {"errors/chosen": chosen.detach(), "errors/rejected": rejected.detach()}
        return loss[:, None], metrics

    def _errors(self, module: nn.Module, noised: Noised) -> tuple[Tensor, Tensor]:
        """The denoiser's squared errors `[P]` on the chosen pictures, and on the rejected ones."""
        output = self.denoiser.forward(module, noised.latents, noised.timesteps, noised.texts)
        return squared_error(output, noised.target).chunk(2)


def numbered(rows: Dataset | IterableDataset | None, name: str) -> Dataset | IterableDataset | None:
    """Add a column of row numbers, which seed the noise, and leave pictures undecoded.

    Raises DataError for a missing column.
    """
    if rows is None:
        return None
    check_columns(rows, name)
    rows = undecoded(rows)
    if isinstance(rows, Dataset):
        return rows.add_column(NUMBER, list(range(len(rows))))
    return rows.map(lambda row, number: {**row, NUMBER: number}, with_indices=True)


def check_columns(rows: Dataset | IterableDataset, name: str) -> None:
    """Raises DataError if a column of preference pairs is missing."""
    columns = rows.column_names or list(next(iter(rows), {}))
    for column in ("prompt", *SIDES):
        if column not in columns:
            raise DataError(
                f"{name}_dataset has no column {column!r}: rows are `prompt`, and the pictures `chosen` and `rejected`. It "
                f"has {', '.join(columns)}."
            )


def check_pictures(rows: Dataset, name: str, root: str | None = None) -> None:
    """Raises RowError for the first picture that is missing or cannot be opened; reads only the headers of files."""

    def check(batch: Mapping[str, list[Any]], numbers: list[int]) -> None:
        for side in SIDES:
            for number, picture in zip(numbers, batch[side], strict=True):
                with naming_picture(number, side, name):
                    check_picture(picture, root)

    undecoded(rows.select_columns([*SIDES])).map(
        check, batched=True, with_indices=True, desc=f"Looking at pictures of {name}"
    )


@contextmanager
def naming_picture(number: int, side: str, name: str = "") -> Iterator[None]:
    """Add row and column to the DataErrors about a picture that are raised within."""
    try:
        yield
    except DataError as error:
        raise RowError(number, f", column {side!r}: {error}", name) from error


def check_picture(picture: Any, root: str | None) -> None:
    """Raises DataError for anything that is no picture, as far as that can be told without decoding it."""
    if isinstance(picture, list | Tensor | np.ndarray):
        pixels(picture)
    else:
        image_size(picture, PixelLimits(root=root))


def as_tensor(picture: Any, size: tuple[int, int], root: str | None = None) -> Tensor:
    """Convert a picture to `[3,H,W]` in [0, 1], scaled to `size` (height, width). Relative paths start from `root`.

    Raises DataError for anything that is no picture with three channels.
    """
    if isinstance(picture, list | Tensor | np.ndarray):
        values = pixels(picture)
    else:
        image = read_image(picture, PixelLimits(root=root))
        values = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    if tuple(values.shape[1:]) == size:
        return values
    return F.interpolate(values[None], size, mode="bilinear", antialias=True, align_corners=False)[0].clamp(0, 1)


def pixels(picture: Any) -> Tensor:
    """Convert numbers to a tensor `[3,H,W]`. Raises DataError unless they have that shape and lie in [0, 1]."""
    try:
        values = torch.as_tensor(picture).float()
    except (TypeError, ValueError) as error:
        raise DataError(f"it is a {type(picture).__name__}, which is no picture.") from error
    if values.dim() != 3 or values.shape[0] != 3 or not values.numel() or not 0 <= values.min() <= values.max() <= 1:
        found = f" and values from {values.min():.3g} to {values.max():.3g}" if values.numel() else ""
        raise DataError(
            f"it has the shape {tuple(values.shape)}{found}: give a Pillow image, a tensor [3,H,W] in [0, 1], bytes, or a "
            "file name."
        )
    return values
