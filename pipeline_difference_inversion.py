# Copyright 2026 The Difference Inversion Authors. All rights reserved.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""Image analogies with an ordinary Stable Diffusion model: A : A' :: B : B'.

From an image *before* and an image *after* a change, the pipeline learns difference tokens: a few rows in the text
encoder's embedding space that mean what changed and nothing else. Appended to the prompt of any query image they make
the model draw that image with the same change. Nothing is fine-tuned. The method is Difference Inversion ("Interpolate
and Isolate the Difference with Token Consistency for Image Analogy Generation"); equation numbers are the paper's.

    pipe = DiffusionPipeline.from_pretrained(
        "examples/storybook/model", custom_pipeline="pipeline_difference_inversion.py", trust_remote_code=True
    )
    difference = pipe.invert_difference(before=cabin, after=castle)
    difference.save("cabin_to_castle.safetensors")
    pipe(image=another_cabin, difference=difference).images[0].save("another_castle.png")
"""

import datetime
import difflib
import hashlib
import inspect
import math
import numbers
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import groupby, islice, pairwise
from pathlib import Path
from typing import Any, Optional, Union

import diffusers
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor
from huggingface_hub import HfApi, ModelCard, ModelCardData, hf_hub_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from PIL import Image, ImageOps
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.checkpoint import checkpoint
from transformers import CLIPModel, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer


logger = logging.get_logger(__name__)

FILE_FORMAT = "difference-tokens"
FILE_FORMAT_VERSION = 1
DEFAULT_TOKEN = "<difference>"
TWO_ENCODER_TOKENS = ("clip_l", "clip_g")  # as SDXL's embeddings are named in other programs' files
NUM_PROBE_SAMPLES = 8  # noises and time steps that tokens are judged on
NUM_WORD_CANDIDATES = 8  # words of CLIP's that the UNet chooses from
NUM_REVISION_WORDS = 24  # words of CLIP's that the UNet may add to a hard prompt
NUM_REVISION_SAMPLES = 4  # noises and time steps that it judges by, and prompts that it judges at once
# How much it counts that a word draws A badly. On 48 pairs of Storybook the word was right 45 times at 0, 48 times at
# 0.25, 0.5 and 0.75, and 47 times at 1; the nearest to CLIP was right 40 times.
WORD_CONTRAST = 0.5
# Of each step's noise, with `inversion="ddpm"`. Against 1, answers on Storybook were as often right, and nearer to the right
# pictures by 0.5 ± 0.3 dB (56 analogies of three seeds).
DDPM_ETA = 0.5
LEAST_DDPM_ETA = 0.01  # below which the noises that hold the query are too large for what numbers can tell apart
NUM_MASK_STEPS = 10  # of the drawing, at which a mask is looked for
# Share of the strongest change at which a place belongs to the mask. On 30 analogies of Storybook the mask then covered
# 0.98 of the changed pixels or more in the mean of every kind, and left alone 0.72 to 0.87 of the others where the change
# was local; at 0.3 it covered 0.73 of a changed sky.
AUTO_MASK_THRESHOLD = 0.15
# Words that alone say nothing of a picture, so that captions which differ by them alone do not differ.
FUNCTION_WORDS = frozenset(
    "a an the and or of in on at by to with from for as is are was were be it its this that".split()
)
# How far out random tokens begin, in standard deviations of the vocabulary. Of rows near zero a text encoder sees, after
# its first normalisation, the positions alone, which no text has: tokens that begin there must first restore the picture
# that they break, and learn what is in it instead of what changed.
RANDOM_INIT_SCALE = 3.0
PROMPT_ARGUMENTS = ("images", "height", "width", "generator")  # of what writes prompts, which a call has of its own
QUESTION = "Describe this image in one short sentence."  # that captioners which converse are asked
# Words are nearly there, and steps that take random rows to their place in time lead them away from theirs.
LEARNING_RATE, LEARNING_RATE_FROM_WORDS = 1e-2, 1e-3

# The CLIP whose text tower is a base model's text encoder, by the width of that encoder.
MATCHING_CLIP = {
    768: "openai/clip-vit-large-patch14",
    1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    1280: "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
# Mean cosine of two models' word embeddings above which one is a copy or a fine-tune of the other.
SAME_EMBEDDINGS = 0.5

WEIGHT_NAME = "difference.safetensors"
CARD = """# {title}

{pictures}Difference tokens for {base_model}: what changed between two pictures, as a few rows of the text encoder's input
space, learned by Difference Inversion ([arXiv:2506.07750](https://arxiv.org/abs/2506.07750)).

## Use

To make the same change to another picture, with `pipe` a `DifferenceInversionPipeline` of the base model:

```python
difference = pipe.load_difference("{repo_id}")
pipe(image=picture, difference=difference).images[0]
```

In stock diffusers, and as a file in the `embeddings` folder of ComfyUI, it is a textual inversion:

```python
{stock}
pipe("a picture, <difference>").images[0]
```

## How it was learned

{settings}
"""

STOCK = """pipe.load_textual_inversion("{repo_id}", weight_name="difference.safetensors")"""
STOCK_TWO_ENCODERS = """rows = safetensors.torch.load_file(huggingface_hub.hf_hub_download("{repo_id}", "difference.safetensors"))
for name, encoder, tokenizer in (
    ("clip_l", pipe.text_encoder, pipe.tokenizer),
    ("clip_g", pipe.text_encoder_2, pipe.tokenizer_2),
):
    pipe.load_textual_inversion(rows[name], token="<difference>", text_encoder=encoder, tokenizer=tokenizer)"""

EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import load_image

        >>> # The small model that comes with the project; any Stable Diffusion 1.x, 2.x or XL checkpoint does as well.
        >>> pipe = DiffusionPipeline.from_pretrained(
        ...     "examples/storybook/model",
        ...     custom_pipeline="pipeline_difference_inversion.py",
        ...     trust_remote_code=True,
        ... )
        >>> before, after, query = (load_image(f"examples/images/{n}.png") for n in ("before", "after", "query_1"))

        >>> difference = pipe.invert_difference(before=before, after=after)
        >>> difference.save("difference.safetensors")
        >>> pipe(image=query, difference=difference).images[0].save("answer.png")
        ```
"""


# ------------------------------------------------------------------------------------------------------- maths


def slerp(start: torch.Tensor, end: torch.Tensor, fraction: float) -> torch.Tensor:
    """Spherical interpolation between two directions (equations 4 and 5).

    Args:
        start: directions of any length, shape (..., dim).
        end: directions of any length, shape (..., dim).
        fraction: 0 gives `start`, 1 gives `end`.

    Returns:
        Directions of unit length, shape (..., dim).
    """
    start, end = F.normalize(start, dim=-1), F.normalize(end, dim=-1)
    angle = torch.acos((start * end).sum(-1, keepdim=True).clamp(-1, 1))
    along_arc = (torch.sin((1 - fraction) * angle) * start + torch.sin(fraction * angle) * end) / torch.sin(angle)
    along_chord = (1 - fraction) * start + fraction * end  # where the arc has no length, or no direction
    return F.normalize(torch.where(torch.sin(angle) < 1e-4, along_chord, along_arc), dim=-1)


def interpolated_delta(image_delta: torch.Tensor, text_delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """What changed, between what the images say (alpha 0) and what their captions say (alpha 1); equations 2 to 5.

    Args:
        image_delta: CLIP's image embedding after minus before, shape (dim,).
        text_delta: CLIP's text embedding of the captions, after minus before, shape (dim,).
        alpha: 0 to 1.

    Returns:
        The delta at unit length, shape (dim,); where one of the two is zero (equal captions, say), the other.
    """
    if not text_delta.any():
        return F.normalize(image_delta, dim=-1)
    if not image_delta.any():
        return F.normalize(text_delta, dim=-1)
    return slerp(image_delta, text_delta, alpha)


def clip_loss(token_embedding: torch.Tensor, delta: torch.Tensor) -> torch.Tensor:
    """One minus the cosine between the tokens' text embedding and the delta, both (dim,); equation 6."""
    return 1 - F.cosine_similarity(token_embedding.float(), delta.float(), dim=-1)


def token_consistency_loss(prediction: torch.Tensor, target: torch.Tensor, lambda_before: float) -> torch.Tensor:
    """L_after + lambda_before * L_before (equations 7 to 9): the model's mean squared errors on A' and on A.

    Args:
        prediction: UNet outputs for A' under [P_A; +D] and for A under [P_A'; -D], (2, samples, channels, height,
            width); those for A can be left out where they have no weight.
        target: the noise or the velocity that they should be, same shape.
        lambda_before: weight of the second, at least 0; 1 in the paper.
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return errors[0] + lambda_before * errors[1:].sum()


class Vocabulary:
    """Rows (words, dim) that tokens may be, and their directions, which are too many to be found again at each step."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows.float()
        self.directions = F.normalize(self.rows, dim=-1)

    def nearest(self, rows: torch.Tensor, count: int = 1) -> torch.return_types.topk:
        """Cosines of `rows` (num_tokens, dim) with the words that point most nearly where they do, and which these are,
        both (num_tokens, count)."""
        return (F.normalize(rows.float(), dim=-1) @ self.directions.T).topk(min(count, len(self.rows)))

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The words nearest to `rows` (..., dim), and which these are (...).

        Gradients pass as if they were the given rows: the projection of "Hard Prompts Made Easy" (Wen et al., 2023).
        """
        nearest = self.nearest(rows.detach().flatten(0, -2)).indices.view(rows.shape[:-1])
        return rows + (self.rows[nearest] - rows).detach(), nearest


# ------------------------------------------------------------------------------------------------------ prompts


def changed_phrases(before: str, after: str) -> tuple[list[str], list[str]]:
    """What only one of two prompts says: the runs of words that `after` lost, and those that it gained, in order.

    Runs of nothing but signs and words like "with" and "the" are left out: they say nothing of the pictures.
    """
    # Names in angle brackets are textual inversions'.
    first, second = (re.findall(r"<[^<>\s]+>|\w+|[^\w\s]", prompt.lower()) for prompt in (before, after))
    lost, gained = [], []
    for kind, start, end, new_start, new_end in difflib.SequenceMatcher(None, first, second, False).get_opcodes():
        if kind != "equal":
            lost.append(first[start:end])
            gained.append(second[new_start:new_end])
    lost, gained = ([" ".join(run) for run in side if any(map(_says_something, run))] for side in (lost, gained))
    return lost, gained


def _says_something(word: str) -> bool:
    return word not in FUNCTION_WORDS and any(map(str.isalnum, word))


def common_phrases(phrases: Sequence[list[str]]) -> list[str]:
    """The first list's phrases, cut where a word is that another list has nowhere."""
    words = [set(" ".join(line).split()) for line in phrases]
    common = []
    for phrase in phrases[0]:
        runs = groupby(phrase.split(), key=lambda word: all(word in w for w in words))
        common += [list(run) for everywhere, run in runs if everywhere]
    return [" ".join(run) for run in common if any(map(_says_something, run))]


def _spaced(word: str, following: str) -> str:
    """A pattern for a word and the space after it, which signs do without."""
    return re.escape(word) + (r"\s+" if word.isalnum() and following.isalnum() else r"\s*")


def without_phrases(prompt: str, phrases: Sequence[str]) -> str:
    """A prompt without these phrases, wherever it has them whole."""
    for phrase in filter(str.strip, phrases):
        words = phrase.split()
        pattern = "".join(map(_spaced, words[:-1], words[1:])) + re.escape(words[-1])
        whole = rf"(?:(?<!\w)|(?=\W)){pattern}(?:(?!\w)|(?<=\W))\s*"
        prompt = re.sub(whole, "", prompt, flags=re.IGNORECASE)
    return prompt.strip()


# ------------------------------------------------------------------------------------------- difference tokens


@dataclass(repr=False, eq=False)
class DifferenceTokens:
    """A learned difference: rows of a text encoder's embedding space, and where they come from.

    Arithmetic makes new differences: `0.5 * d` is less of the change, `-d` the same rows negated (equation 8), `d + e`
    both changes (their rows one after the other).

    Attributes:
        embeddings: one tensor (num_tokens, dim) a text encoder, by name; `<difference>` where there is one encoder.
        metadata: strings that say how it was learned: prompts, settings, base model, versions.
    """

    embeddings: dict[str, torch.Tensor]
    metadata: dict[str, str] = field(default_factory=dict)

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(rows.shape)}" for name, rows in self.embeddings.items())
        story = [self.metadata[key] for key in ("before_prompt", "after_prompt") if self.metadata.get(key)]
        return f"DifferenceTokens({shapes}{'; ' + ' → '.join(story) if story else ''})"

    def __mul__(self, scale: float) -> "DifferenceTokens":
        changed = ("loss",) if scale == 1 else ("loss", "token_ids")
        metadata = {name: value for name, value in self.metadata.items() if name not in changed}
        for first, second in (("before_prompt", "after_prompt"), ("lost_phrases", "gained_phrases")):
            if scale < 0 and {first, second} <= metadata.keys():
                metadata[first], metadata[second] = metadata[second], metadata[first]
        if scale == 0:
            metadata.pop("lost_phrases", None)
            metadata.pop("gained_phrases", None)
        return DifferenceTokens({name: rows * scale for name, rows in self.embeddings.items()}, metadata)

    __rmul__ = __mul__

    def __neg__(self) -> "DifferenceTokens":
        return self * -1.0

    def negated(self) -> "DifferenceTokens":
        """The way back, `-d`, to be saved for programs that know no negative scales."""
        return -self

    def __add__(self, other: "DifferenceTokens") -> "DifferenceTokens":
        names = list(self.embeddings)
        if len(names) != len(other.embeddings) or (len(names) > 1 and set(names) != set(other.embeddings)):
            raise ValueError(f"Differences for different text encoders do not add: {self!r} and {other!r}.")
        # One encoder's tokens may have any name; those of two are told apart by theirs, and files sort them.
        others = other.embeddings if len(names) > 1 else dict(zip(names, other.embeddings.values(), strict=True))
        if any(own.shape[1:] != others[name].shape[1:] for name, own in self.embeddings.items()):
            raise ValueError(f"Differences of different base models do not add: {self!r} and {other!r}.")
        common = ("base_model", "prediction_type", "embedding_fingerprint")
        metadata = {k: v for k, v in self.metadata.items() if k in common and other.metadata.get(k) == v}
        for key in ("lost_phrases", "gained_phrases"):
            acting = (d for d in (self, other) if any(rows.any() for rows in d.embeddings.values()))
            if phrases := "\n".join(filter(None, (d.metadata.get(key) for d in acting))):
                metadata[key] = phrases
        if all("token_ids" in d.metadata for d in (self, other)):
            metadata["token_ids"] = f"{self.metadata['token_ids']} {other.metadata['token_ids']}"
        rows = {name: torch.cat([own, others[name].to(own)]) for name, own in self.embeddings.items()}
        return DifferenceTokens(rows, metadata)

    def to(self, device: Any = None, dtype: Optional[torch.dtype] = None) -> "DifferenceTokens":
        """Returns a copy on another device or in another floating-point type."""
        moved = {name: rows.to(device=device, dtype=dtype) for name, rows in self.embeddings.items()}
        return DifferenceTokens(moved, dict(self.metadata))

    def nearest_words(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, count: int = 3
    ) -> list[list[tuple[str, float]]]:
        """The vocabulary words that point most nearly where each token does, for people who ask what was learned.

        Args:
            tokenizer: the base model's.
            text_encoder: the base model's, of the tokens' width.
            count: words for each token, at least 1.

        Returns:
            For each token its words and their cosines, -1 to 1, nearest first. At 1 a token points as that word does.

        Raises:
            ValueError: if `count` is below 1, or no tokens have the text encoder's width.
        """
        if count < 1:
            raise ValueError(f"`count` is {count}; it must be at least 1.")
        table = embedding_table(text_encoder.get_input_embeddings()).float()
        fitting = [rows for rows in self.embeddings.values() if rows.shape[1] == table.shape[1]]
        if not fitting:
            raise ValueError(f"`text_encoder` has embeddings of size {table.shape[1]}, and this is {self!r}.")
        words = sorted(set(range(len(table))) - set(tokenizer.all_special_ids))
        nearest = Vocabulary(table[words]).nearest(fitting[0].to(table), count)
        names = [[_written(tokenizer, [words[i]]) for i in row] for row in nearest.indices]
        return [
            list(zip(row, cosines, strict=True)) for row, cosines in zip(names, nearest.values.tolist(), strict=True)
        ]

    def to_text(self, tokenizer: CLIPTokenizer) -> str:
        """The difference as plain words, to be put behind any prompt, also of a model that takes nothing but text.

        Args:
            tokenizer: the base model's.

        Raises:
            ValueError: if the tokens are not words: they were learned with `projection="soft"`, or scaled.
        """
        if "token_ids" not in self.metadata:
            raise ValueError(
                f'{self!r} is not made of words. Learn it with `projection="hard"`, and give it no scale; '
                "`nearest_words` says what other tokens are near."
            )
        return _written(tokenizer, [int(index) for index in self.metadata["token_ids"].split()])

    def save(self, path: Union[str, os.PathLike]) -> Path:
        """Writes one safetensors file that stock `load_textual_inversion` and ComfyUI read too.

        The file is written beside its place and then moved there, so that a crash leaves the old one or the new one.

        Args:
            path: where; `.safetensors` is added where it is not the ending.

        Returns:
            The path that was written.

        Raises:
            ValueError: if a token's name has upper-case letters, since diffusers would then use its first row only.
        """
        for name in self.embeddings:
            if name != name.lower():
                raise ValueError(
                    f"The token name {name!r} must be lower case: diffusers uses only the first of the "
                    f"vectors of an upper-case name. Rename it {name.lower()!r}."
                )
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
        path.parent.mkdir(parents=True, exist_ok=True)
        tensors = {name: rows.detach().cpu().contiguous() for name, rows in self.embeddings.items()}
        header = {**self.metadata, "format": FILE_FORMAT, "format_version": str(FILE_FORMAT_VERSION)}
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        try:
            save_file(tensors, temporary, metadata=header)
            os.chmod(temporary, 0o644)  # mkstemp's own mode would keep others from reading a file meant for sharing
            os.replace(temporary, path)
        finally:
            Path(temporary).unlink(missing_ok=True)
        return path

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> "DifferenceTokens":
        """Reads a file that `save` wrote, or another program's textual-inversion file in safetensors.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is no safetensors file, if a tensor is not a finite floating-point matrix, or if it was
                written in a newer format than this code knows.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"`difference`: there is no file {str(path)!r}. Repositories of the Hub are read by `pipe.load_difference`."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                embeddings = _as_matrices({name: file.get_tensor(name) for name in file.keys()}, metadata)
        except SafetensorError as error:
            raise ValueError(
                f"`difference`: {str(path)!r} {_what_a_file_is(path)} Give a .safetensors file written by "
                "`difference.save(...)` or a textual inversion in that format."
            ) from error
        _check_embeddings(embeddings, path)
        version = metadata.get("format_version", "1")
        if not version.isdigit() or int(version) > FILE_FORMAT_VERSION:
            raise ValueError(
                f"`difference`: {str(path)!r} has format_version {version!r}, and this code reads up to "
                f"{FILE_FORMAT_VERSION}. Update pipeline_difference_inversion.py."
            )
        return cls(embeddings, metadata)

    def save_pretrained(
        self,
        folder: Union[str, os.PathLike],
        before: Optional[Image.Image] = None,
        after: Optional[Image.Image] = None,
        repo_id: Optional[str] = None,
    ) -> Path:
        """Writes a folder as it goes to the Hub: `difference.safetensors`, a model card, and the two pictures if given.

        Args:
            folder: where; it is made if it is not there, and what else is in it stays.
            before: the picture before the change, as the card is to show it.
            after: the picture after it.
            repo_id: the repository's name in the card's examples, by default the folder's.
        """
        folder = Path(folder)
        pictures = {name: image for name, image in (("before", before), ("after", after)) if image is not None}
        for name, image in pictures.items():
            if not isinstance(image, Image.Image):
                raise TypeError(f"`{name}` must be a PIL image for the card, and is a {type(image).__name__}.")
        self.save(folder / WEIGHT_NAME)
        for name, image in pictures.items():
            flatten_image(image, name).save(folder / f"{name}.png")
        self._card(repo_id or folder.resolve().name, list(pictures)).save(folder / "README.md")
        return folder

    def push_to_hub(
        self,
        repo_id: str,
        before: Optional[Image.Image] = None,
        after: Optional[Image.Image] = None,
        private: Optional[bool] = None,
        token: Optional[str] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        commit_message: str = "Upload difference tokens",
    ) -> str:
        """Uploads what [`save_pretrained`] writes to a repository of the Hub, which is made if it is not there.

        Args:
            repo_id: "user/name".
            before, after: pictures for the card.
            private, token, revision, create_pr, commit_message: as huggingface_hub has them.

        Returns:
            The address of the commit.
        """
        api = HfApi(token=token)
        with tempfile.TemporaryDirectory() as folder:
            self.save_pretrained(folder, before, after, repo_id)
            api.create_repo(repo_id, private=private, exist_ok=True)
            if revision is not None and not create_pr and not revision.startswith("refs/"):
                api.create_branch(repo_id, branch=revision, exist_ok=True)
            options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
            return str(api.upload_folder(repo_id=repo_id, folder_path=folder, **options))

    def _card(self, repo_id: str, pictures: list[str]) -> ModelCard:
        base_model = self.metadata.get("base_model", "")
        about = ModelCardData(
            library_name="diffusers",
            pipeline_tag="image-to-image",
            base_model=base_model if "/" in base_model else None,  # a name without one is a folder's, not the Hub's
            tags=["diffusers", "textual-inversion", "difference-tokens"],
        )
        change = [self.metadata.get(f"{name}_prompt", "") for name in ("before", "after")]
        settings = [(name, value) for name, value in sorted(self.metadata.items()) if value]
        rows = "\n".join(
            f"| {name} | {' / '.join(value.splitlines()).replace('|', ' ')} |" for name, value in settings
        )
        shown = (
            f"| {' | '.join(pictures)} |\n{'|---' * len(pictures)}|\n"
            f"| {' | '.join(f'![{name}]({name}.png)' for name in pictures)} |\n\n"
        )
        text = CARD.format(
            title=" → ".join(change) if all(change) else repo_id,
            pictures=shown if pictures else "",
            base_model=base_model or "its base model",
            repo_id=repo_id,
            stock=(STOCK if len(self.embeddings) == 1 else STOCK_TWO_ENCODERS).format(repo_id=repo_id),
            settings=f"| setting | value |\n|---|---|\n{rows}",
        )
        return ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}")

    @classmethod
    def from_pretrained(
        cls,
        path_or_repo_id: Union[str, os.PathLike],
        weight_name: Optional[str] = None,
        revision: Optional[str] = None,
        token: Optional[str] = None,
        cache_dir: Union[str, os.PathLike, None] = None,
        local_files_only: bool = False,
    ) -> "DifferenceTokens":
        """Reads a difference file, or the one in a folder or in a repository of the Hub.

        Args:
            path_or_repo_id: a file, a folder, or "user/name".
            weight_name: the file's name in it: by default `difference.safetensors`, or the only safetensors file of a
                folder.
            revision, token, cache_dir, local_files_only: as huggingface_hub has them.

        Raises:
            FileNotFoundError: if there is no such file, folder or repository, or no such file in it.
            OSError: if the Hub cannot be reached.
            ValueError: if the file is not a difference; see [`load`].
        """
        path = Path(path_or_repo_id)
        if path.is_file():
            return cls.load(path)
        if path.is_dir():
            return cls.load(_file_in(path, weight_name))
        where, name = f"`path_or_repo_id`: {str(path_or_repo_id)!r}", weight_name or WEIGHT_NAME
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        try:
            return cls.load(hf_hub_download(str(path_or_repo_id), name, **options))
        except (HFValidationError, RepositoryNotFoundError) as error:
            raise FileNotFoundError(
                f"{where} is neither a file, nor a folder, nor a repository of the Hub that you may read."
            ) from error
        except RevisionNotFoundError as error:
            raise FileNotFoundError(f"{where} has no revision {revision!r}.") from error
        except LocalEntryNotFoundError as error:
            raise OSError(f"{where} is not here, and the Hub cannot be reached to fetch {name!r} from it.") from error
        except EntryNotFoundError as error:
            raise FileNotFoundError(f"{where} has no file {name!r}; give another `weight_name`.") from error


def _file_in(folder: Path, weight_name: Optional[str]) -> Path:
    """The difference file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if weight_name is None and not (folder / WEIGHT_NAME).is_file():
        if len(files) == 1:
            return files[0]
        raise FileNotFoundError(
            f"`path_or_repo_id`: the folder {str(folder)!r} has {len(files)} safetensors files and none named "
            f"{WEIGHT_NAME!r}; give its name as `weight_name`."
        )
    return folder / (weight_name or WEIGHT_NAME)


def _as_matrices(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Other programs' files as ours: a single vector is one row, and of A1111's parts only the parameters count."""
    if metadata.get("format") == FILE_FORMAT:
        return tensors
    parameters = {name: rows for name, rows in tensors.items() if name.startswith("string_to_param")}
    tensors = parameters or tensors
    return {
        name: rows[None] if rows.ndim == 1 and rows.is_floating_point() else rows for name, rows in tensors.items()
    }


def _written(tokenizer: CLIPTokenizer, ids: list[int]) -> str:
    """Tokens as text; some versions of the tokenizer leave the last word's mark of its end."""
    return tokenizer.decode(ids).replace("</w>", " ").strip()


def _what_a_file_is(path: Path) -> str:
    with open(path, "rb") as file:
        start = file.read(4)
    if start.startswith((b"PK\x03\x04", b"\x80")):
        return "is a pickle, which can run code when it is opened, and is refused."
    return "is not a safetensors file, or is damaged."


def _check_embeddings(embeddings: dict[str, torch.Tensor], source: Any, argument: str = "difference") -> None:
    if not embeddings:
        raise ValueError(f"`{argument}`: {str(source)!r} holds no tensor.")
    for name, rows in embeddings.items():
        if rows.ndim != 2 or not rows.is_floating_point():
            raise ValueError(
                f"`{argument}`: {name!r} in {str(source)!r} is {tuple(rows.shape)}, {rows.dtype}; difference "
                "tokens are floating-point matrices (num_tokens, dim)."
            )
        if not torch.isfinite(rows).all():
            raise ValueError(f"`{argument}`: {name!r} in {str(source)!r} has values that are not finite.")


def embedding_table(embedding: torch.nn.Module) -> torch.Tensor:
    """A token embedding's table (words, dim), also of a module whose weights sequential offloading has put aside."""
    weight = embedding.weight.detach()
    return embedding(torch.arange(len(weight))).detach() if weight.is_meta else weight


def _sampled(table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced rows of an embedding table, by which it is known."""
    return table[:: max(1, len(table) // 256)].cpu()


def embedding_fingerprint(text_encoder: torch.nn.Module, vocab_size: Optional[int] = None) -> str:
    """Short hash of an evenly spaced sample of a text encoder's token embeddings, the same in fp16 and fp32.

    With `vocab_size`, of the vocabulary that the model came with, whatever a textual inversion has added.
    """
    table = embedding_table(text_encoder.get_input_embeddings())
    sample = _sampled(table[:vocab_size]).to(torch.float16)
    return hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16]


def same_embeddings(own: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether a table (words, dim) is one model's `own`, or a fine-tune's of it with words added, of whatever type."""
    if own.shape[1] != table.shape[1] or len(own) > len(table):
        return False
    cosines = F.cosine_similarity(_sampled(own).float(), _sampled(table[: len(own)]).float(), dim=-1)
    return bool(cosines.mean() > SAME_EMBEDDINGS)


@dataclass
class DifferenceInversionPipelineOutput(BaseOutput):
    """
    Attributes:
        images: the answers B', query by query: PIL images, or an array or tensor by `output_type`.
        difference: the difference tokens as they were learned; or those given, as applied, with their scales in them.
    """

    images: Union[list[Image.Image], np.ndarray, torch.Tensor]
    difference: Optional[DifferenceTokens]


# ---------------------------------------------------------------------------------------------- model plumbing


@contextmanager
def inserted_rows(embedding: torch.nn.Module, slots: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While open, the token embedding gives `rows` at `slots` in place of its own.

    Gradients reach `rows`; neither the vocabulary nor the model is touched.

    Args:
        embedding: the text encoder's input embedding.
        slots: where, boolean (batch, length), as many true in each line as there are rows.
        rows: what, (batch, num_rows, dim).
    """

    def replace(module, inputs, output):
        output = output.clone()
        output[slots.to(output.device)] = rows.flatten(0, 1).to(output)
        return output

    hook = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def frozen(*modules: Optional[torch.nn.Module]) -> Iterator[None]:
    """While open, the modules are in evaluation mode and want no gradients; afterwards they are as they were."""
    modules = [module for module in modules if module is not None]
    parts = [part for module in modules for part in module.modules()]
    was_training = [part for part in parts if part.training]
    # By place: offloading layer by layer puts other parameters there.
    wanted_grad = [
        (part, name) for part in parts for name, p in part._parameters.items() if p is not None and p.requires_grad
    ]
    try:
        for module in modules:
            module.eval()
        for part, name in wanted_grad:
            part._parameters[name].requires_grad_(False)
        yield
    finally:
        for part, name in wanted_grad:
            part._parameters[name].requires_grad_(True)
        for part in was_training:
            part.training = True


def first_of(generator: Union[torch.Generator, list[torch.Generator], None]) -> Optional[torch.Generator]:
    """The generator of what is made once for all images."""
    return next(iter(generator), None) if isinstance(generator, list) else generator


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    above: float = -math.inf,
    meaning: str = "",
) -> None:
    """Raises `ValueError` for what is no finite number, or no whole one, or outside the range, which it names."""
    if not isinstance(value, numbers.Integral if whole else numbers.Real) or not np.isfinite(value):
        raise ValueError(f"`{name}` is {value!r}; it must be a {'whole' if whole else 'finite'} number.")
    if least <= value <= most and value > above:
        return
    least = f"above {above}" if math.isfinite(above) else f"at least {least}"
    most = f" and at most {most}" if math.isfinite(most) else ""
    raise ValueError(f"`{name}` is {value}; it must be {least}{most}{meaning and f': {meaning}'}.")


def check_choice(name: str, value: Any, *choices: Any) -> None:
    """Raises `ValueError` for what is none of the choices, which it names."""
    if value not in choices:
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` is {value!r}; it is {', '.join(others)} or {last}.")


def check_gradients(name: str, why: str) -> None:
    """Raises `ValueError` where gradients cannot be had."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"`{name}` {why}, which `torch.inference_mode` forbids; `torch.no_grad` does not.")


def as_list(value: Any) -> list:
    """One thing or several, as a list; batched arrays and tensors are taken apart."""
    items = []
    for part in value if isinstance(value, (list, tuple)) else [value]:
        is_batch = isinstance(part, (np.ndarray, torch.Tensor)) and part.ndim == 4
        items.extend(part if is_batch else [part])  # not +=, which arrays and tensors take for a sum
    return items


def flatten_image(image: Any, name: str, background: str = "white") -> Any:
    """Turns a PIL image of any mode upright and RGB, transparency on white; gives float arrays and tensors a batch of 1.

    Raises:
        TypeError: if it is nothing that the image processor takes.
        ValueError: if an array or a tensor has neither one channel nor three.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _flatten_array(image, name)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"`{name}` must be a PIL image, an array or a tensor, or a list of them, and is a "
            f"{type(image).__name__}. `diffusers.utils.load_image` opens paths and addresses."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode.startswith("I;16"):  # which Pillow alone would cut off at 255
        image = image.convert("I").point(lambda value: value / 256).convert("L")
    return image.convert("RGB")


def _flatten_array(image: Union[np.ndarray, torch.Tensor], name: str) -> Any:
    """Whole numbers are taken for 0 to 255 and others for 0 to 1; arrays have their channels last, tensors first."""
    channels = -1 if isinstance(image, np.ndarray) else 0
    if image.ndim == 2:
        image = image[..., None] if channels else image[None]
    transparent = bool(channels) and image.dtype == np.uint8 and image.shape[-1] in (2, 4)
    if image.ndim != 3 or not (transparent or image.shape[channels] in (1, 3)):
        order = "(height, width, 3)" if channels else "(3, height, width)"
        raise ValueError(f"`{name}` has the shape {tuple(image.shape)}; a picture of this type has {order}.")
    if channels and image.dtype == np.uint8:
        return flatten_image(Image.fromarray(image.squeeze(-1) if image.shape[-1] == 1 else image), name)
    is_floating = np.issubdtype(image.dtype, np.floating) if channels else image.is_floating_point()
    scale = 1 if is_floating or image.dtype in (np.bool_, torch.bool) else 255
    highest = float((image if channels else image.float()).max())  # of some whole numbers torch has no maximum
    if highest > (1.01 if is_floating else scale):
        kind = "floating-point pictures" if is_floating else "pictures in whole numbers"
        raise ValueError(f"`{name}` has values up to {highest:g}; of {kind} they end at {scale}.")
    if channels:
        image = np.repeat(image, 3 // image.shape[-1], axis=-1).astype(np.float32) / scale
    else:
        image = (image if is_floating else image.float()).expand(3, -1, -1) / scale
    return image[None]  # [1, height, width, 3] or [1, 3, height, width]


def as_masks(masks: Any, count: int) -> list:
    """One mask or several, as a list; a stack (masks, height, width) for as many images is taken apart."""
    stacked = isinstance(masks, (np.ndarray, torch.Tensor)) and masks.ndim == 3 and masks.shape[-1] not in (1, 3, 4)
    if stacked and (masks.shape[0] == count or masks.shape[0] not in (1, 3, 4)):
        return list(masks)
    return as_list(masks)


def flatten_mask(mask: Any) -> Any:
    """As `flatten_image`, for masks: transparency on black; they may also be matrices (height, width)."""
    if isinstance(mask, Image.Image) and mask.mode in ("F", "I"):
        mask = np.asarray(mask)
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        return flatten_image(mask, "mask_image", background="black")
    mask = torch.as_tensor(np.ascontiguousarray(mask) if isinstance(mask, np.ndarray) else mask)
    whole = not mask.is_floating_point() and bool((mask > 1).any())  # 0 to 255
    mask = mask.float() / (255 if whole else 1)
    if mask.ndim == 3:
        mask = mask.movedim(-1, 0) if mask.shape[-1] in (1, 3, 4) else mask
        mask = mask[:3].mean(0) * (mask[3] if len(mask) == 4 else 1)
    return mask[None, None]


def image_size(image: Any) -> tuple[int, int]:
    """Height and width of what `flatten_image` gives."""
    if isinstance(image, Image.Image):
        return image.height, image.width
    return tuple(image.shape[2:]) if isinstance(image, torch.Tensor) else tuple(image.shape[1:3])


@dataclass
class _Encoder:
    """A text encoder and what goes with it: the CLIP of which it is the text tower, and its tokens' name in a file."""

    token: str
    tokenizer: CLIPTokenizer
    model: torch.nn.Module
    clip: Optional[CLIPModel]
    clip_name: str

    @property
    def table(self) -> torch.Tensor:
        """Its token embeddings, (words, width), on whichever device offloading has them."""
        return embedding_table(self.model.get_input_embeddings())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., width) in float32, where the ids (...) are."""
        table = self.table
        return table[ids.to(table.device)].to(ids.device, torch.float32)

    @property
    def width(self) -> int:
        """Of its token embeddings, and so of its part of a difference."""
        return self.model.config.hidden_size


@dataclass
class _Condition:
    """What the UNet is told of a prompt: its embeddings (batch, length, dim), and SDXL's pooled ones (batch, dim)."""

    prompt_embeds: torch.Tensor
    pooled_prompt_embeds: Optional[torch.Tensor] = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "_Condition":
        """The same change made to all that there is."""
        return _Condition(*(None if embeds is None else change(embeds) for embeds in vars(self).values()))

    def repeat(self, count: int) -> "_Condition":
        """Each prompt `count` times in a row."""
        return self.each(lambda embeds: embeds.repeat_interleave(count, dim=0))

    def followed_by(self, other: "_Condition") -> "_Condition":
        """Both batches as one."""
        others = iter(vars(other).values())
        return self.each(lambda embeds: torch.cat([embeds, next(others)]))


@dataclass
class _Example:
    """One before/after pair, ready for the UNet: latents (1, 4, h, w) and prompts."""

    before_latents: torch.Tensor
    after_latents: torch.Tensor
    before_prompt: str
    after_prompt: str


@dataclass
class _Draw:
    """Noises (samples, 4, h, w) and time steps (samples,), the same for the two directions of the loss."""

    noise: torch.Tensor
    timesteps: torch.Tensor


@dataclass
class _Start:
    """Where denoising begins, and what leads down from there.

    `path` are the latents of the query itself before each step and after the last, (steps + 1, batch, ...), if there is a
    query; `noises` (steps, batch, ...) are each step's, if they are fixed.
    """

    latents: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor
    path: Optional[torch.Tensor] = None
    noises: Optional[torch.Tensor] = None


@dataclass
class _Settings:
    """How tokens are learned: the arguments of [`~DifferenceInversionPipeline.invert_difference`] of these names."""

    num_tokens: int
    num_optimization_steps: int
    learning_rate: Optional[float]
    alpha: float
    lambda_clip: float
    lambda_tc: float
    lambda_before: float
    init: str
    projection: str
    num_samples_per_step: int


@dataclass
class _Goal:
    """What the tokens are learned for (equation 10): pairs, the delta (dim,) of each CLIP if they count, and the weights;
    and, if they are to be words, those that they may be."""

    examples: list[_Example]
    deltas: list[torch.Tensor]
    settings: _Settings
    vocabulary: Optional[Vocabulary] = None


# ------------------------------------------------------------------------------------------------- the pipeline


def components_come_first(init: Callable) -> Callable:
    """Lets `__init__` look as if its optional components had no defaults.

    `DiffusionPipeline.from_pretrained(..., custom_pipeline=...)` takes what has one for a setting, and in silence prefers
    the folder's component to the one that it is given.
    """
    signature = inspect.signature(init)
    settings = ("force_zeros_for_empty_prompt",)
    parameters = [
        parameter if name in settings else parameter.replace(default=inspect.Parameter.empty)
        for name, parameter in signature.parameters.items()
    ]
    init.__signature__ = signature.replace(parameters=parameters)
    return init


class DifferenceInversionPipeline(
    DiffusionPipeline,
    StableDiffusionMixin,
    TextualInversionLoaderMixin,
    StableDiffusionXLLoraLoaderMixin,
    FromSingleFileMixin,
):
    r"""
    Learns what changed between two images and applies it to others, with an unmodified Stable Diffusion model.

    LoRAs, textual inversions and single-file checkpoints are loaded by diffusers' own methods: [`load_lora_weights`],
    [`load_textual_inversion`] and [`from_single_file`]. What is loaded counts while learning too.

    Args:
        vae ([`AutoencoderKL`]): between images and latents.
        text_encoder ([`~transformers.CLIPTextModel`]): the base model's text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): its tokenizer.
        unet ([`UNet2DConditionModel`]): denoises latents; predicts noise or velocity.
        scheduler ([`SchedulerMixin`]): draws from noise. Queries are inverted and redrawn by DDIM schedulers made from
            its configuration, which is all that they use of it.
        clip ([`~transformers.CLIPModel`], *optional*): the full CLIP of the text encoder, for learning with a CLIP
            loss. Applying a difference does without.
        clip_processor ([`~transformers.CLIPProcessor`], *optional*): prepares images for `clip` and `clip_2`.
        captioner ([`~transformers.BlipForConditionalGeneration`], *optional*): writes the prompts that are not given.
        captioner_processor ([`~transformers.BlipProcessor`], *optional*): prepares images for `captioner`.
        text_encoder_2 ([`~transformers.CLIPTextModelWithProjection`], *optional*): SDXL's second text encoder.
        tokenizer_2 ([`~transformers.CLIPTokenizer`], *optional*): its tokenizer.
        clip_2 ([`~transformers.CLIPModel`], *optional*): its full CLIP. Of `clip` and `clip_2` SDXL learns with either or
            both.
        force_zeros_for_empty_prompt (`bool`): SDXL's: without a `negative_prompt`, text to image is guided away from
            embeddings of zero.
    """

    model_cpu_offload_seq = "text_encoder->text_encoder_2->unet->vae"
    _optional_components = [
        "clip",
        "clip_processor",
        "captioner",
        "captioner_processor",
        "text_encoder_2",
        "tokenizer_2",
        "clip_2",
    ]
    _callback_tensor_inputs = [
        "latents",
        "prompt_embeds",
        "negative_prompt_embeds",
        "pooled_prompt_embeds",
        "negative_pooled_prompt_embeds",
    ]

    @components_come_first
    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        clip: Optional[CLIPModel] = None,
        clip_processor=None,
        captioner=None,
        captioner_processor=None,
        text_encoder_2: Optional[CLIPTextModelWithProjection] = None,
        tokenizer_2: Optional[CLIPTokenizer] = None,
        clip_2: Optional[CLIPModel] = None,
        force_zeros_for_empty_prompt: bool = True,
    ):
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            unet=unet,
            scheduler=scheduler,
            clip=clip,
            clip_processor=clip_processor,
            captioner=captioner,
            captioner_processor=captioner_processor,
            text_encoder_2=text_encoder_2,
            tokenizer_2=tokenizer_2,
            clip_2=clip_2,
        )
        self.register_to_config(force_zeros_for_empty_prompt=force_zeros_for_empty_prompt)
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1)
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        self._interrupt = False

    @property
    def guidance_scale(self) -> float:
        """How far the running call goes from the baseline's prediction to the changed one; callbacks may read it."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call, which `strength` makes fewer than `num_inference_steps`."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt`: the running loop ends after its step."""
        return self._interrupt

    @property
    def _encoders(self) -> list[_Encoder]:
        """The text encoders: SDXL has two, whose tokens are held side by side in one matrix."""
        first = (self.tokenizer, self.text_encoder, self.clip, "clip")
        if self.text_encoder_2 is None:
            return [_Encoder(DEFAULT_TOKEN, *first)]
        second = (self.tokenizer_2, self.text_encoder_2, self.clip_2, "clip_2")
        return [_Encoder(token, *parts) for token, parts in zip(TWO_ENCODER_TOKENS, (first, second), strict=True)]

    def _make_room(self, *models: torch.nn.Module) -> None:
        """Leaves these models alone on the device, where `enable_model_cpu_offload` has models moved.

        Its hooks act on `forward` alone, and once in a fixed order; here models take turns, and some are called by other
        methods.
        """
        hooks = getattr(self, "_all_hooks", [])
        for hook in hooks:
            if not any(hook.model is model for model in models):
                hook.offload()
        for hook in hooks:
            if any(hook.model is model for model in models):
                hook.model.to(self._execution_device)

    def enable_group_offload(self, *arguments, **options) -> None:
        """Diffusers' own; in blocks CLIP and the captioner stay on the device, since a block is fetched by a model's
        `forward`, and these are called by other methods."""
        bound = inspect.signature(super().enable_group_offload).bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        if getattr(given["offload_type"], "value", given["offload_type"]) == "block_level":
            excluded = given["exclude_modules"] or []
            excluded = [excluded] if isinstance(excluded, str) else excluded
            given["exclude_modules"] = [*excluded, "clip", "clip_2", "captioner"]
        super().enable_group_offload(**given)

    @contextmanager
    def _weights_kept(self) -> Iterator[None]:
        """While open, backward finds the weights that forward saw, though group offloading puts others in their place."""
        if not self._maybe_raise_error_if_group_offload_active():
            yield
            return
        with torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept):
            yield

    def _without_graph(self, function: Callable, *inputs: Any) -> Any:
        """A function of models that have left the device when backward needs them: where models are moved, it is called
        again then."""
        if torch.is_grad_enabled() and getattr(self, "_all_hooks", []):
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    # ------------------------------------------------------------------------------------------------- checking

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options) -> "DifferenceInversionPipeline":
        """Diffusers' own, without its trap: unless a `dtype` is given, all weights, which are shared, keep theirs.

        `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` does not come here, and wants all optional components, None
        where there is none.
        """
        options = {name: None for name in cls._optional_components if getattr(pipeline, name, None) is None} | options
        shared = [p for p in (*pipeline.components.values(), *options.values()) if isinstance(p, torch.nn.Module)]
        owners = [module for part in shared for module in part.modules()]
        # By tensor: a UNet may keep a part of itself in another type, and a quantised one may not be cast at all.
        dtypes = [
            (owner, name, tensor.dtype)
            for owner in owners
            for name, tensor in (*owner._parameters.items(), *owner._buffers.items())
            if tensor is not None
        ]
        built = super().from_pipe(pipeline, **options)
        if not {"dtype", "torch_dtype"} & options.keys():
            for owner, name, dtype in dtypes:
                tensor = getattr(owner, name)
                if tensor.dtype != dtype:
                    tensor.data = tensor.data.to(dtype)
        if getattr(pipeline, "_all_hooks", []):
            built.enable_model_cpu_offload(device=pipeline._offload_device)
        elif not pipeline.hf_device_map:
            for part in options.values():  # which may still be where they were loaded
                if isinstance(part, torch.nn.Module) and getattr(part, "hf_device_map", None) is None:
                    part.to(pipeline._execution_device)
        return built

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict, network_alphas, text_encoder, **options) -> None:
        """Diffusers' own, which is asked to load into a second text encoder too where there is none."""
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, **options)

    def _check_model(self) -> None:
        """Raises `ValueError` for a base model that this pipeline cannot tell what to draw."""
        channels, latent_channels = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"`unet` has {channels} input channels for latents of {latent_channels}: it is one for inpainting or for "
                "instructions, and an ordinary Stable Diffusion is what to load."
            )
        if self.text_encoder is None:
            raise ValueError("`text_encoder` is missing; SDXL's refiner has none, and its base model is what to load.")
        is_xl = self.unet.config.get("addition_embed_type") == "text_time"
        if is_xl and None in (self.text_encoder_2, self.tokenizer_2):
            raise ValueError("`text_encoder_2` or `tokenizer_2` is missing: SDXL's UNet needs both text encoders.")
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        known = prediction_type in ("epsilon", "v_prediction", "sample")
        if "beta_schedule" not in self.scheduler.config or not known:
            raise ValueError(
                f"`scheduler` is {type(self.scheduler).__name__} with prediction_type {prediction_type!r}: this pipeline "
                "is for models that were trained to predict noise, velocity or latents on a schedule of betas, as "
                "Stable Diffusion 1.x, 2.x and SDXL were."
            )

    def check_learning_inputs(
        self,
        before,
        after,
        before_prompt,
        after_prompt,
        prompt_method: str,
        prompt_kwargs: Optional[dict],
        settings: _Settings,
        height: Optional[int] = None,
        width: Optional[int] = None,
    ) -> None:
        """Raises `ValueError` or `TypeError`, naming the argument, for anything that learning could not use."""
        self._check_model()
        check_gradients("before", "and `after` are to be learned from by gradients")
        if before is None or after is None:
            missing = "before" if before is None else "after"
            raise ValueError(
                f"`{missing}` is missing: a difference is learned from a pair of images, `before` and "
                "`after`. To apply a learned one, give `difference`."
            )
        befores, afters = as_list(before), as_list(after)
        if not befores and not afters:
            raise ValueError("`before` and `after` are empty lists; give at least one pair.")
        if len(befores) != len(afters):
            raise ValueError(f"`before` has {len(befores)} images and `after` has {len(afters)}; give pairs.")
        for name, images in (("before", befores), ("after", afters)):
            for image in images:
                self._common_size([image], name, height, width)
        self._check_prompt_method(prompt_method, prompt_kwargs)
        self._check_prompts("before_prompt", before_prompt, len(befores), prompt_method)
        self._check_prompts("after_prompt", after_prompt, len(afters), prompt_method)
        room = "the text encoder's window has room for no more"
        check_number("num_tokens", settings.num_tokens, 1, self._room(), whole=True, meaning=room)
        check_number("num_optimization_steps", settings.num_optimization_steps, 1, whole=True)
        check_number("num_samples_per_step", settings.num_samples_per_step, 1, whole=True)
        check_number("alpha", settings.alpha, 0, 1, meaning="from the images' delta to the captions'")
        for name in ("lambda_clip", "lambda_tc", "lambda_before"):
            check_number(name, getattr(settings, name), 0)
        if settings.lambda_clip + settings.lambda_tc == 0:
            raise ValueError(
                "`lambda_clip` and `lambda_tc` are 0, and nothing would be learned; give one of them more."
            )
        if settings.learning_rate is not None:
            check_number("learning_rate", settings.learning_rate, above=0)
        check_choice("init", settings.init, "prompts", "clip", "random", "zeros")
        check_choice("projection", settings.projection, "soft", "hard")
        if settings.lambda_clip > 0:
            self._check_clip("learn with `lambda_clip=0`")
        elif settings.init == "clip":
            self._check_clip("choose another `init`")

    def _check_clip(self, way_out: str) -> None:
        encoders = self._encoders
        remedies = {
            e.clip_name: f"`{e.clip_name}=CLIPModel.from_pretrained({MATCHING_CLIP[e.width]!r})`"
            if e.width in MATCHING_CLIP
            else f"`{e.clip_name}=` the CLIP whose text tower is this text encoder (width {e.width})"
            for e in encoders
        }
        present = self._encoders_with_clip()
        if not present or self.clip_processor is None:
            name = "clip_processor" if present else "clip"
            raise ValueError(
                f"`{name}` is missing: learning compares the images by CLIP. For this base model give "
                f"{' or '.join(remedies.values())} and `clip_processor=`, its `CLIPProcessor`, to "
                f"`from_pretrained`, or {way_out}."
            )
        for encoder in present:
            table = embedding_table(encoder.clip.text_model.embeddings.token_embedding)
            if not same_embeddings(table, encoder.table):
                others = [e.clip_name for e in encoders if same_embeddings(table, e.table)]
                remedy = f"give it as `{others[0]}`" if others else f"give {remedies[encoder.clip_name]}"
                raise ValueError(
                    f"`{encoder.clip_name}` has token embeddings of shape {tuple(table.shape)}, and the text encoder "
                    f"{tuple(encoder.table.shape)} that are not the same: it is another CLIP. To match, {remedy}."
                )

    def _check_prompt_method(self, method: str, options: Optional[dict]) -> None:
        check_choice("prompt_method", method, "caption", "pez")
        write = self.hard_prompts if method == "pez" else self.caption
        known = [name for name in inspect.signature(write).parameters if name not in PROMPT_ARGUMENTS]
        unknown = [name for name in options or {} if name not in known]
        if unknown:
            raise ValueError(f"`prompt_kwargs` has {unknown}; for `prompt_method={method!r}` known are {known}.")
        if method == "pez":
            self._check_hard_prompts(**options or {})

    def _check_hard_prompts(
        self, num_tokens=1, num_steps=1, learning_rate=1.0, tolerance=None, num_revisions=0
    ) -> None:
        check_number("num_tokens", num_tokens, 1, self._room(), whole=True, meaning="words of a hard prompt")
        check_number("num_steps", num_steps, 1, whole=True)
        check_number("learning_rate", learning_rate, above=0)
        check_number("num_revisions", num_revisions, 0, whole=True)
        if tolerance is not None:
            check_number("tolerance", tolerance, 0, 2, meaning="a cosine, or `None` to keep all words")

    def _check_captioner(self, complaint: str = "There is no captioner to describe `images`: load") -> None:
        if self.captioner is None or self.captioner_processor is None:
            raise ValueError(f"{complaint} the pipeline with `captioner` and `captioner_processor`.")

    def _check_prompts(self, name: str, prompts: Any, count: int, method: str = "caption") -> None:
        if prompts is None and method == "pez":
            self._check_clip(f"give `{name}`")
            check_gradients(name, "is missing, and PEZ looks for it by gradients")
        elif prompts is None:
            self._check_captioner(
                f"`{name}` is missing, and there is no captioner to write it: give `{name}`, or load"
            )
        elif not all(isinstance(prompt, str) for prompt in as_list(prompts)):
            raise TypeError(f"`{name}` must be a string or a list of strings, and is {prompts!r}.")
        elif len(as_list(prompts)) not in (1, count):
            raise ValueError(f"`{name}` has {len(as_list(prompts))} prompts for {count} images; give one for each.")

    def check_inputs(
        self,
        image,
        before,
        after,
        prompt,
        source_prompt,
        negative_prompt,
        difference,
        difference_scale,
        negative_difference,
        height,
        width,
        num_inference_steps,
        guidance_scale,
        inversion,
        strength,
        eta,
        num_images_per_prompt,
        generator,
        latents,
        output_type,
        callback_on_step_end_tensor_inputs,
        mask_image,
        prompt_method,
        prompt_kwargs,
    ) -> None:
        """Raises `ValueError` or `TypeError`, naming the argument, for anything that applying could not use."""
        self._check_model()
        if image is None and prompt is None:
            raise ValueError(
                "`image` is missing: give the query image that the difference is applied to, or a `prompt` "
                "alone for text to image."
            )
        images = [] if image is None else as_list(image)
        if image is not None and not images:
            raise ValueError("`image` is an empty list; give at least one query image.")
        for item in images:
            self._common_size([item], "image", height, width)
        size = self._common_size(images, "image", height, width)
        if not images and not as_list(prompt):
            raise ValueError("`prompt` is an empty list; give at least one.")
        count = len(images) or len(as_list(prompt))
        self._check_prompt_method(prompt_method, prompt_kwargs)
        self._check_prompts("prompt", prompt, count, prompt_method)
        for name, prompts in (("source_prompt", source_prompt), ("negative_prompt", negative_prompt)):
            if prompts is not None:
                self._check_prompts(name, prompts, count)
        most_steps = self.scheduler.config.num_train_timesteps - 1
        check_number("num_inference_steps", num_inference_steps, 1, most_steps, whole=True)
        check_number("num_images_per_prompt", num_images_per_prompt, 1, whole=True)
        check_number("strength", strength, most=1, above=0)
        for scale in difference_scale if isinstance(difference_scale, (list, tuple)) else [difference_scale]:
            check_number("difference_scale", scale)
        if guidance_scale is not None:
            check_number("guidance_scale", guidance_scale)
        if eta is not None:
            check_number("eta", eta, 0, 1, meaning="from DDIM to DDPM")
        check_choice("output_type", output_type, "pil", "np", "pt", "latent")
        check_choice("inversion", inversion, "ddpm", "ddim", "sdedit", None)
        if source_prompt is not None and image is None:
            raise ValueError("`source_prompt` describes a query image, and `image` is missing.")
        if eta is not None and eta < LEAST_DDPM_ETA and inversion == "ddpm" and image is not None:
            raise ValueError(
                f'`eta` is {eta}, and the query is held by the noises of `inversion="ddpm"`; give at least '
                f'{LEAST_DDPM_ETA}, or `inversion="ddim"`.'
            )
        batch_size = count * num_images_per_prompt
        self._check_noise(generator, latents, batch_size, size, inverted=inversion is not None and image is not None)
        known = [name for name in self._callback_tensor_inputs if self.text_encoder_2 or "pooled" not in name]
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in known]
        if unknown:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; known are {known}.")
        if mask_image is not None:
            self._check_mask(mask_image, images, inversion)
        learns = before is not None or after is not None
        by_words_alone = image is not None and prompt is not None and source_prompt is not None
        if difference is None and negative_difference is None and not learns and not by_words_alone:
            raise ValueError(
                "`difference` is missing: give difference tokens or a difference file, or a pair of images "
                "`before` and `after` to learn it from."
            )
        if difference is not None and learns:
            raise ValueError("`difference` is given, and so is a pair to learn one from; leave out one of the two.")
        count = len(difference) if isinstance(difference, (list, tuple)) else 1
        if isinstance(difference_scale, (list, tuple)) and len(difference_scale) != count:
            raise ValueError(f"`difference_scale` has {len(difference_scale)} scales for {count} differences.")

    def _check_noise(self, generator, latents, batch_size: int, size: tuple[int, int], inverted: bool) -> None:
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)} for {batch_size} images.")
        if latents is not None and inverted:
            raise ValueError("`latents` were given and `image` would be inverted to others; set `inversion=None`.")
        shape = self._latents_shape(batch_size, size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, and {shape} is needed.")

    def _check_mask(self, mask_image, images: list, inversion: Optional[str]) -> None:
        if not images or inversion is None:
            raise ValueError("`mask_image` keeps parts of a query: give `image`, and an `inversion` that is not None.")
        if isinstance(mask_image, str):
            if mask_image != "auto":
                raise ValueError(f"`mask_image` is {mask_image!r}; it is an image or 'auto'.")
            return
        masks = as_masks(mask_image, len(images))
        for mask in masks:
            flatten_mask(mask)
        if len(masks) not in (1, len(images)):
            raise ValueError(
                f"`mask_image` has {len(masks)} masks for {len(images)} images; give one, or one for each."
            )

    def load_difference(self, path_or_repo_id: Union[str, os.PathLike], **options) -> DifferenceTokens:
        """Reads a difference from a file, a folder or a repository of the Hub, and sees that it fits this model.

        Args:
            path_or_repo_id: and all else: see [`DifferenceTokens.from_pretrained`].

        Raises:
            FileNotFoundError, OSError, ValueError: as it does, and if the difference is for another base model.
        """
        return self._check_difference(DifferenceTokens.from_pretrained(path_or_repo_id, **options), "difference")

    def _resolve_difference(
        self, difference: Any, difference_scale: Union[float, Sequence[float]], name: str = "difference"
    ) -> DifferenceTokens:
        """Files, tokens, or several of them, with their scales, as one `DifferenceTokens` that fits this model."""
        given = list(difference) if isinstance(difference, (list, tuple)) else [difference]
        if not given:
            raise ValueError(f"`{name}` is an empty list; give at least one difference, or leave it out.")
        scales = difference_scale if isinstance(difference_scale, (list, tuple)) else [difference_scale] * len(given)
        scaled = [self._check_difference(d, name) * float(s) for d, s in zip(given, scales, strict=True)]
        total = sum(scaled[1:], scaled[0])
        rows, room = self._rows(total), self._room()
        if len(rows) > room:
            raise ValueError(f"`{name}` has {len(rows)} tokens; the text encoder's window has room for {room}.")
        return total

    def _room(self) -> int:
        """How many difference tokens there is room for, beside a start and an end."""
        return min(encoder.tokenizer.model_max_length for encoder in self._encoders) - 2

    def _check_difference(self, difference: Any, name: str) -> DifferenceTokens:
        if isinstance(difference, (str, os.PathLike)):
            folder = Path(difference).is_dir()
            try:
                difference = (DifferenceTokens.from_pretrained if folder else DifferenceTokens.load)(difference)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(str(error).replace("`difference`", f"`{name}`", 1)) from error
        # Not isinstance: a module loaded twice, as custom pipelines are, has two classes of this name.
        if not (hasattr(difference, "embeddings") and hasattr(difference, "metadata")):
            raise TypeError(
                f"`{name}` must be DifferenceTokens, the path of a difference file, or a list of them, "
                f"and is a {type(difference).__name__}."
            )
        embeddings = dict(difference.embeddings)
        _check_embeddings(embeddings, "the given tokens", name)
        encoders = self._encoders
        two = len(encoders) == 2
        if len(embeddings) != len(encoders) or (two and set(embeddings) != set(TWO_ENCODER_TOKENS)):
            wanted = f"two, whose tokens are named {' and '.join(TWO_ENCODER_TOKENS)}" if two else "one"
            raise ValueError(
                f"`{name}` is for {len(embeddings)} text encoders ({', '.join(embeddings)}); this model has {wanted}."
            )
        if len({len(rows) for rows in embeddings.values()}) > 1:
            raise ValueError(f"`{name}` has not as many rows for one text encoder as for the other: {difference!r}.")
        given = [embeddings[name] for name in TWO_ENCODER_TOKENS] if two else embeddings.values()
        for rows, encoder in zip(given, encoders, strict=True):
            if rows.shape[1] != encoder.width:
                raise ValueError(
                    f"`{name}` has embeddings of size {rows.shape[1]}, and this model's text encoder has "
                    f"{encoder.width}: it was learned on another base model."
                )
        learned_on = difference.metadata.get("embedding_fingerprint")
        if learned_on and self._fingerprint() not in ("", learned_on):
            logger.warning(
                "`%s` was learned on another base model (%s) of the same size; it may still work, as fine-tuned models "
                "share their embedding space.",
                name,
                difference.metadata.get("base_model") or "not named",
            )
        return DifferenceTokens(embeddings, dict(difference.metadata))

    def _fingerprint(self) -> str:
        """Which base model's embeddings these are; nothing in bfloat16, whose rounding makes it another."""
        if any(encoder.model.dtype == torch.bfloat16 for encoder in self._encoders):
            return ""
        return " ".join(embedding_fingerprint(e.model, e.tokenizer.vocab_size) for e in self._encoders)

    # -------------------------------------------------------------------------------------------------- prompts

    def _write_prompts(
        self, method: str, options: Optional[dict], height, width, generator, *groups: tuple[list, Any]
    ) -> list[list[str]]:
        """The prompts of groups of images, one each: those that are given, or written for all the others at once."""
        write = self.caption
        if method == "pez":
            write = partial(self.hard_prompts, height=height, width=width, generator=generator)
        pictures = [image for images, prompts in groups if prompts is None for image in images]
        written = iter(write(pictures, **options or {}) if pictures else [])
        return [
            list(islice(written, len(images))) if prompts is None else self._repeated(prompts, len(images) or 1)
            for images, prompts in groups
        ]

    def _repeated(self, prompts: Union[str, list[str]], count: int) -> list[str]:
        prompts = as_list(prompts)
        return prompts * count if len(prompts) == 1 else prompts

    def _rows(self, difference: Optional[DifferenceTokens]) -> torch.Tensor:
        """A difference's rows (num_tokens, dim) in float32; none where there is no difference.

        Those of two text encoders are side by side, so that dim is the sum of their widths.
        """
        if difference is None:
            return torch.zeros(0, sum(e.width for e in self._encoders), device=self._execution_device)
        embeddings = difference.embeddings
        parts = embeddings.values() if len(embeddings) == 1 else [embeddings[name] for name in TWO_ENCODER_TOKENS]
        return torch.cat([rows.to(self._execution_device, torch.float32) for rows in parts], dim=-1)

    def _by_encoder(self, rows: torch.Tensor) -> list[tuple[_Encoder, torch.Tensor]]:
        """Each text encoder with its part of the rows (..., dim)."""
        encoders = self._encoders
        return list(zip(encoders, rows.split([encoder.width for encoder in encoders], dim=-1), strict=True))

    def _embedded(self, ids: Any) -> torch.Tensor:
        """The rows (tokens, dim) of the vocabulary's tokens, in float32."""
        ids = torch.as_tensor(ids, dtype=torch.long, device=self._execution_device)
        return torch.cat([encoder.rows(ids) for encoder in self._encoders], dim=-1)

    @torch.no_grad()
    def caption(self, images: list, question: Optional[str] = None, max_new_tokens: int = 50) -> list[str]:
        """Describes images with the captioner, one string each.

        Args:
            images: PIL images, float arrays (height, width, 3) or tensors (3, height, width) as the pipeline takes.
            question: what a captioner that converses is asked, by default for one sentence; others, such as BLIP, take it
                as the beginning of their answer.
            max_new_tokens: the most tokens of an answer.
        """
        self._check_captioner()
        pictures = [self._to_pil(image, "images") for image in as_list(images)]
        processor = self.captioner_processor
        with frozen(self.captioner):
            if not getattr(processor, "chat_template", None):
                text = {} if question is None else {"text": [question] * len(pictures)}
                return self._generated(processor(images=pictures, **text, return_tensors="pt"), max_new_tokens)
            captions = []  # one by one: answers begin where questions end, and pictures take more or less room
            for picture in pictures:
                content = [{"type": "image", "image": picture}, {"type": "text", "text": question or QUESTION}]
                options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, **options
                )
                captions += self._generated(inputs, max_new_tokens, start=inputs["input_ids"].shape[1])
        return captions

    def _generated(self, inputs: Any, max_new_tokens: int, start: int = 0) -> list[str]:
        """What the captioner says to inputs of its processor, from a token on."""
        self._make_room(self.captioner)
        inputs = inputs.to(self._execution_device, self.captioner.dtype)
        tokens = self.captioner.generate(**inputs, max_new_tokens=max_new_tokens)[:, start:]
        return [text.strip() for text in self.captioner_processor.batch_decode(tokens, skip_special_tokens=True)]

    @torch.no_grad()
    def hard_prompts(
        self,
        images: list,
        num_tokens: int = 16,
        num_steps: int = 300,
        learning_rate: float = 0.1,
        tolerance: Optional[float] = 0.01,
        num_revisions: int = 6,
        height: Optional[int] = None,
        width: Optional[int] = None,
        generator: Optional[torch.Generator] = None,
    ) -> list[str]:
        """Describes images by the words whose CLIP embedding is nearest to theirs, one string each.

        That is PEZ, of "Hard Prompts Made Easy" (Wen et al., 2023), for all images at once; the words are whole words of
        the vocabulary, which read as text give the same tokens again. Then, and beyond PEZ, words are left out that CLIP
        can do without, and the UNet adds or leaves out some: CLIP does not see all that matters in drawing.

        Args:
            images: as [`caption`] takes them.
            num_tokens: words that are sought for each.
            num_steps: optimizer steps.
            learning_rate: AdamW's.
            tolerance: words are left out as long as the cosine with the image stays within this of its highest, 0 to 2;
                `None` keeps all of them.
            num_revisions: the most words that are added or left out, one after another, as long as the UNet then predicts
                the image's noise better; 0 for none.
            height, width: in pixels, at which the UNet is shown the images; by default each image's own.
            generator: makes results repeatable.
        """
        self._check_clip("have the captioner describe `images`")
        self._check_hard_prompts(num_tokens, num_steps, learning_rate, tolerance, num_revisions)
        encoder = self._encoders_with_clip()[0]
        generator = first_of(generator)
        images = as_list(images)
        sizes = [self._common_size([image], "images", height, width) for image in images]
        check_gradients("images", "are to be described by words that PEZ finds by gradients")
        with frozen(encoder.clip, self.vae, self.unet, self.text_encoder, self.text_encoder_2):
            target = self._clip_image_features(encoder.clip, images)
            words = self._vocabulary_words()
            vocabulary = Vocabulary(encoder.rows(words))
            shape = (len(target), num_tokens)
            device = generator.device if generator else "cpu"
            start = torch.randint(len(words), shape, generator=generator, device=device).to(words.device)
            rows = vocabulary.rows[start].requires_grad_(True)  # [images, num_tokens, dim]
            optimizer = torch.optim.AdamW([rows], lr=learning_rate, weight_decay=0.1)
            best = torch.full((len(target),), -2.0, device=words.device)
            found = start
            for _ in self.progress_bar(range(num_steps)):
                with torch.enable_grad(), self._weights_kept():
                    hard, nearest = vocabulary.project(rows)
                    cosines = (self._clip_row_features(encoder, hard) * target).sum(-1)
                    (1 - cosines).sum().backward()
                better = cosines.detach() > best
                best = torch.where(better, cosines.detach(), best)
                found = torch.where(better[:, None], nearest, found)
                optimizer.step()
                optimizer.zero_grad()
            chosen = list(words[found])
            if tolerance is not None:
                chosen = [self._fewest_words(encoder, *each, tolerance) for each in zip(chosen, target, strict=True)]
            chosen = [ids.tolist() for ids in chosen]
            if num_revisions > 0:
                likeness = target @ self._word_features(encoder, words).T
                nearest = words[likeness.topk(min(NUM_REVISION_WORDS, len(words))).indices]
                chosen = [
                    self._revised_words(image, size, ids, more.tolist(), num_tokens, num_revisions)
                    for image, size, ids, more in zip(images, sizes, chosen, nearest, strict=True)
                ]
        return [_written(self.tokenizer, ids) for ids in chosen]

    def _fewest_words(
        self, encoder: _Encoder, ids: torch.Tensor, target: torch.Tensor, tolerance: float
    ) -> torch.Tensor:
        """Words (num_tokens,) without those that bring CLIP's text embedding no nearer to an image's."""
        highest = self._clip_row_features(encoder, encoder.rows(ids[None])) @ target
        while len(ids) > 1:
            shorter = torch.stack([torch.cat([ids[:i], ids[i + 1 :]]) for i in range(len(ids))])
            cosine, left_out = (self._clip_row_features(encoder, encoder.rows(shorter)) @ target).max(0)
            if cosine < highest - tolerance:
                break
            ids, highest = shorter[left_out], torch.maximum(highest, cosine)
        return ids

    def _revised_words(
        self, image: Any, size: tuple[int, int], ids: list[int], more: list[int], most: int, num_revisions: int
    ) -> list[int]:
        """Words, with some of `more`, `most` in all, and without some of their own, by which the UNet knows the image
        better."""
        latents = self._encode_images([image], "images", size).float()
        # The same noises for all images, so that it does not matter in whose company one is described.
        draw = self._draw(latents, NUM_REVISION_SAMPLES, torch.Generator().manual_seed(0), jitter=False)

        def errors(versions: list[list[int]]) -> list[float]:
            """How badly the UNet, told each version, predicts the image's noises."""
            found = []
            for start in range(0, len(versions), NUM_REVISION_SAMPLES):
                prompts = [
                    _written(self.tokenizer, version) for version in versions[start : start + NUM_REVISION_SAMPLES]
                ]
                rows = self._rows(None).expand(len(prompts), -1, -1)
                prediction, target = self._predict(latents.expand(len(prompts), -1, -1, -1), prompts, rows, draw)
                found += (prediction - target).square().flatten(1).mean(1).tolist()
            return found

        (lowest,) = errors([ids])
        for _ in range(num_revisions):
            versions = [ids[:i] + ids[i + 1 :] for i in range(len(ids))] if len(ids) > 1 else []
            versions += [[*ids, word] for word in more if word not in ids] if len(ids) < most else []
            if not versions:
                break
            error, best = min(zip(errors(versions), versions, strict=True))
            if error >= lowest:
                break
            lowest, ids = error, best
        return ids

    def _to_pil(self, image: Any, name: str) -> Image.Image:
        image = flatten_image(image, name)
        if isinstance(image, Image.Image):
            return image
        return self.image_processor.postprocess(self.image_processor.preprocess(image), output_type="pil")[0]

    def encode_prompt(
        self, prompts: Union[str, list[str]], rows: Optional[torch.Tensor] = None
    ) -> Union[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """Encodes [P; D]: each prompt, then its rows, then the end token.

        A prompt that leaves too little room is shortened; the rows never are.

        Args:
            prompts: `batch` strings.
            rows: difference tokens, (batch, num_tokens, dim), or None; of SDXL the first text encoder's and the second's
                side by side.

        Returns:
            The text encoder's hidden states, (batch, length, dim), in the UNet's dtype; of SDXL those of both encoders
            side by side, and with them the second's pooled embeddings, (batch, dim).
        """
        condition = self._condition(as_list(prompts), rows)
        if condition.pooled_prompt_embeds is None:
            return condition.prompt_embeds
        return condition.prompt_embeds, condition.pooled_prompt_embeds

    def _condition(self, prompts: list[str], rows: Optional[torch.Tensor] = None) -> _Condition:
        rows = self._rows(None).expand(len(prompts), -1, -1) if rows is None else rows
        return self._encode(prompts, rows.to(self._execution_device))

    def _encode(self, prompts: list[str], rows: torch.Tensor) -> _Condition:
        """As `_condition`, for rows that are on the device: finding it took a fifth of each step of learning."""
        outputs = []
        self._make_room(*(encoder.model for encoder in self._encoders))
        for encoder, part in self._by_encoder(rows):
            input_ids, slots = self._place_rows(encoder.tokenizer, prompts, part.shape[1], part.device)
            with inserted_rows(encoder.model.get_input_embeddings(), slots, part):
                outputs.append(encoder.model(input_ids, output_hidden_states=self.text_encoder_2 is not None))
        if self.text_encoder_2 is None:
            return _Condition(outputs[0][0].to(self.unet.dtype))
        # SDXL reads its encoders one layer early, and pools the second.
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return _Condition(prompt_embeds, outputs[1].text_embeds).each(lambda embeds: embeds.to(self.unet.dtype))

    def _read(self, tokenizer: CLIPTokenizer, prompt: str) -> list[int]:
        """All tokens of a prompt, in which the name of a textual inversion of several vectors stands for each of them."""
        # Called, the tokenizer would warn that the model cannot take so many.
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(self.maybe_convert_prompt(prompt, tokenizer)))

    def _warn_of_long_prompts(self, prompts: Sequence[str], num_rows: int) -> None:
        """Says what of the prompts the text encoder's window has no room for, beside the rows."""
        for prompt in dict.fromkeys(prompts):
            words, room = self._read(self.tokenizer, prompt), self._room() - num_rows
            if len(words) > room:
                lost = _written(self.tokenizer, words[room:])
                logger.warning("The prompt %r is shortened to %d tokens, and loses %r.", prompt, room, lost)

    def _place_rows(
        self, tokenizer: CLIPTokenizer, prompts: list[str], num_rows: int, device, vocab_size: Optional[int] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [start; P; num_rows places; end; padding] and where the places are, both (batch, length).

        Tokens beyond `vocab_size`, if that is given, are left out: a textual inversion adds them to the text encoder, and
        CLIP does not know them.
        """
        length = tokenizer.model_max_length
        room = length - 2 - num_rows
        input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
        slots = torch.zeros((len(prompts), length), dtype=torch.bool)
        for line, prompt in enumerate(prompts):
            words = self._read(tokenizer, prompt)
            if vocab_size is not None:
                words = [word for word in words if word < vocab_size]
            # The start token stands in for the rows: CLIP looks for the end token to pool at, and must find the end.
            places = [tokenizer.bos_token_id] * num_rows
            ids = [tokenizer.bos_token_id, *words[:room], *places, tokenizer.eos_token_id]
            input_ids[line, : len(ids)] = torch.tensor(ids)
            slots[line, len(ids) - 1 - num_rows : len(ids) - 1] = True
        return input_ids.to(device), slots.to(device)

    # --------------------------------------------------------------------------------------------------- images

    def _common_size(self, images: list, name: str, height: Optional[int], width: Optional[int]) -> tuple[int, int]:
        """The size that all of a batch is brought to: what is asked for, else the first image's, in whole latents."""
        factor = self.vae_scale_factor
        for side, value in (("height", height), ("width", width)):
            if value is not None:
                check_number(side, value, factor, whole=True)
        native = (self.unet.config.sample_size * factor,) * 2
        own = image_size(flatten_image(images[0], name)) if images else native
        size = tuple(asked or side for asked, side in zip((height, width), own, strict=True))
        if min(size) < factor:
            raise ValueError(
                f"`{name}` is {size[0]}×{size[1]}; it must be at least {factor} pixels high and wide. Give a larger "
                "one, or a `height` and a `width` to resize it to."
            )
        return tuple(side // factor * factor for side in size)

    def _encode_images(self, images: list, name: str, size: tuple[int, int]) -> torch.Tensor:
        """Latents (batch, channels, height / factor, width / factor) of images of any size, resized where need be."""
        for image in images:
            own = image_size(flatten_image(image, name))
            if own != size:
                logger.warning("`%s` is %d×%d (height by width) and is resized to %d×%d.", name, *own, *size)
        with self._precise_vae():
            pixels = self._pixels(images, name, size).to(self._execution_device, self.vae.dtype)
            latents = retrieve_latents(self.vae.encode(pixels), sample_mode="argmax")  # a small VAE's have no spread
        return latents.to(self.vae.dtype) * self.vae.config.scaling_factor

    def _pixels(self, images: list, name: str, size: tuple[int, int]) -> torch.Tensor:
        """Images of any kind and size as pixels (batch, 3, height, width), -1 to 1."""
        return torch.cat([self.image_processor.preprocess(flatten_image(image, name), *size) for image in images])

    @contextmanager
    def _precise_vae(self) -> Iterator[None]:
        """While open, the VAE is on the device, and SDXL's, where `force_upcast` says so, in float32 and not float16."""
        self._make_room(self.vae)
        if self.text_encoder_2 is None or self.vae.dtype != torch.float16 or not self.vae.config.get("force_upcast"):
            yield
            return
        try:
            self.vae.to(torch.float32)
            yield
        finally:
            self.vae.to(torch.float16)

    # ---------------------------------------------------------------------------------------------------- delta

    def _clip_deltas(self, examples: list[_Example], befores: list, afters: list, alpha: float) -> list[torch.Tensor]:
        """Each CLIP's interpolated delta (dim,) of the pairs, their mean if they are several; equations 2 to 5."""
        deltas = []
        for encoder in self._encoders_with_clip():
            image_delta = self._image_delta(encoder.clip, befores, afters)
            before, after = (
                self._clip_text_features(encoder, [getattr(e, name) for e in examples])
                for name in ("before_prompt", "after_prompt")
            )
            deltas.append(interpolated_delta(image_delta, (after - before).mean(0), alpha))
        if not any(delta.any() for delta in deltas):
            logger.warning(
                "CLIP sees no difference between `before` and `after`; its loss will not guide the learning."
            )
        return deltas

    def _encoders_with_clip(self) -> list[_Encoder]:
        return [encoder for encoder in self._encoders if encoder.clip is not None]

    def _image_delta(self, clip: CLIPModel, befores: list, afters: list) -> torch.Tensor:
        """How CLIP's image embeddings (dim,) differ in the mean (equation 2)."""
        return (self._clip_image_features(clip, afters) - self._clip_image_features(clip, befores)).mean(0)

    def _clip_image_features(self, clip: CLIPModel, images: list) -> torch.Tensor:
        """CLIP's image embeddings (images, dim) at unit length."""
        self._make_room(clip)
        pictures = [self._to_pil(image, "images") for image in images]
        pixel_values = self.clip_processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self._execution_device, clip.dtype)
        return F.normalize(_features(clip.get_image_features(pixel_values=pixel_values)).float(), dim=-1)

    def _clip_text_features(
        self, encoder: _Encoder, prompts: list[str], rows: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """CLIP's text embeddings (batch, dim) at unit length, of prompts that may end in the encoder's rows."""
        if rows is None:
            rows = torch.zeros(len(prompts), 0, encoder.width, device=self._execution_device)
        self._make_room(encoder.clip)
        embedding = encoder.clip.text_model.embeddings.token_embedding
        input_ids, slots = self._place_rows(
            encoder.tokenizer, prompts, rows.shape[1], rows.device, vocab_size=len(embedding.weight)
        )
        with inserted_rows(embedding, slots, rows):
            return F.normalize(_features(encoder.clip.get_text_features(input_ids=input_ids)).float(), dim=-1)

    def _clip_row_features(self, encoder: _Encoder, rows: torch.Tensor) -> torch.Tensor:
        """CLIP's text embeddings (batch, dim) at unit length, of rows (batch, num_rows, width) and nothing else.

        Without the padding to the whole window, which CLIP's end token does not see.
        """
        self._make_room(encoder.clip)
        tokenizer, (batch, num_rows, _) = encoder.tokenizer, rows.shape
        ids = [tokenizer.bos_token_id] * (num_rows + 1) + [tokenizer.eos_token_id]
        input_ids = torch.tensor(ids, device=rows.device).expand(batch, -1)
        slots = torch.ones_like(input_ids, dtype=torch.bool)
        slots[:, [0, -1]] = False
        with inserted_rows(encoder.clip.text_model.embeddings.token_embedding, slots, rows):
            return F.normalize(_features(encoder.clip.get_text_features(input_ids=input_ids)).float(), dim=-1)

    # ------------------------------------------------------------------------------------------------- learning

    @torch.no_grad()
    def invert_difference(
        self,
        before: Any,
        after: Any,
        before_prompt: Optional[Union[str, list[str]]] = None,
        after_prompt: Optional[Union[str, list[str]]] = None,
        prompt_method: str = "caption",
        prompt_kwargs: Optional[dict[str, Any]] = None,
        height: Optional[int] = None,
        width: Optional[int] = None,
        num_tokens: int = 4,
        num_optimization_steps: int = 60,
        learning_rate: Optional[float] = None,
        alpha: float = 0.8,
        lambda_clip: float = 0.5,
        lambda_tc: float = 6.0,
        lambda_before: float = 0.0,
        init: str = "prompts",
        projection: str = "soft",
        num_samples_per_step: int = 2,
        generator: Optional[Union[torch.Generator, list[torch.Generator]]] = None,
        callback_on_optimization_step: Optional[Callable[[DiffusionPipeline, int, dict], Any]] = None,
    ) -> DifferenceTokens:
        r"""
        Learns what changed from `before` to `after` (paper, section 4).

        Stopping it early loses nothing: on Ctrl-C once its steps have begun, or when a callback sets
        `pipe._interrupt = True`, the best tokens so far are returned.

        Args:
            before: the image before the change, or several; PIL images of any mode and size, arrays or tensors.
            after: the image after it, or as many.
            before_prompt: describes `before`; one for each image.
            after_prompt: describes `after`, likewise.
            prompt_method: how prompts that are left out are written: `"caption"` by the captioner, `"pez"` as the words
                that CLIP finds nearest to each image (the paper's choice). Two prompts found so differ in more than the
                change, so that no words are taken from them, and `init="prompts"` is `"clip"`; the word that the pair
                lost, too, is then the one that the images say.
            prompt_kwargs: for it; see [`caption`] and [`hard_prompts`].
            height, width: to resize the images to, in pixels; the first image's own by default, in whole latents.
            num_tokens: rows to learn, 1 to the text encoder's window less two.
            num_optimization_steps: optimizer steps, at least 1.
            learning_rate: Adam's, at its highest; a cosine takes it to zero. By default 0.001 for tokens that begin as
                words, and 0.01 for others.
            alpha: 0 trusts the images' delta, 1 the captions' (equation 5).
            lambda_clip: weight of the CLIP loss (equation 10). At 0 no CLIP is needed. The paper has 0.01, at which
                the CLIP loss hardly acted here.
            lambda_tc: weight of the token consistency loss (equation 10).
            lambda_before: weight in that loss of the way back, by the negated tokens from A' to A (equation 8). The
                paper has 1; at 0 a step needs half the UNet's work.
            init: where the tokens begin. `"prompts"`: as the words that only the prompt of A' has, or, if it has only
                lost some, as those, negated. `"clip"`: as the word that CLIP and the UNet see in the images' change,
                whatever the prompts say, for which CLIP reads its whole vocabulary; `"prompts"` does likewise where they
                do not differ, if `lambda_clip` is not 0. Rows without a word are random. `"random"`: three times as far
                out as the vocabulary's rows. `"zeros"`: the paper's, section 4.4, which worked less well here.
            projection: `"soft"` tokens may be any rows; `"hard"` ones are whole words of the vocabulary at every forward
                pass, so that `difference.to_text(pipe.tokenizer)` is the difference as plain text. Where `init` finds
                words there are no more of them than it found. They can hardly say that something has gone.
            num_samples_per_step: noises and time steps drawn at each optimizer step, for each direction of the loss.
            generator: makes learning repeatable.
            callback_on_optimization_step: called as `callback(pipe, step, values)` after each step, with `loss`,
                `clip_loss`, `token_consistency_loss` (floats) and `tokens` (num_tokens, dim).

        Returns:
            The difference tokens that were best on a fixed set of noises and time steps, of those that they began as
            and of every tenth of the way.

        Raises:
            ValueError, TypeError: for arguments that cannot be used, by name, before any model runs.
        """
        amounts = (num_tokens, num_optimization_steps, learning_rate)
        weights = (alpha, lambda_clip, lambda_tc, lambda_before)
        settings = _Settings(*amounts, *weights, init, projection, num_samples_per_step)
        self.check_learning_inputs(
            before, after, before_prompt, after_prompt, prompt_method, prompt_kwargs, settings, height, width
        )
        befores, afters = as_list(before), as_list(after)
        groups = ((befores, before_prompt), (afters, after_prompt))
        prompts = self._write_prompts(prompt_method, prompt_kwargs, height, width, generator, *groups)
        comparable = prompt_method == "caption" or None not in (before_prompt, after_prompt)
        size = self._common_size(befores, "before", height, width)
        pairs = (befores, afters, *prompts)
        return self._learn(*pairs, comparable, size, settings, generator, callback_on_optimization_step)

    def _learn(
        self,
        befores: list,
        afters: list,
        before_prompts: list[str],
        after_prompts: list[str],
        comparable: bool,
        size: tuple[int, int],
        settings: _Settings,
        generator,
        callback: Optional[Callable],
    ) -> DifferenceTokens:
        """Learns from pairs with their prompts, whose words are compared if both tell the same kind of things."""
        generator = first_of(generator)
        hard = settings.projection == "hard"
        self._interrupt = False
        with frozen(self.vae, self.unet, self.text_encoder, self.text_encoder_2, self.clip, self.clip_2):
            # 1. Latents of each pair
            before_latents = self._encode_images(befores, "before", size).float().split(1)
            after_latents = self._encode_images(afters, "after", size).float().split(1)
            parts = zip(before_latents, after_latents, before_prompts, after_prompts, strict=True)
            examples = [_Example(*part) for part in parts]
            self._warn_of_long_prompts([*before_prompts, *after_prompts], settings.num_tokens)
            # 2. What CLIP says has changed
            deltas = self._clip_deltas(examples, befores, afters, settings.alpha) if settings.lambda_clip > 0 else []
            # 3. The tokens
            allowed = self._vocabulary_words() if hard else None
            pairs = (examples, befores, afters)
            lost, gained, words = self._first_words(*pairs, comparable, settings, allowed, generator)
            if settings.learning_rate is None:
                learning_rate = LEARNING_RATE_FROM_WORDS if len(words) and not hard else LEARNING_RATE
                settings = replace(settings, learning_rate=learning_rate)
            if hard and len(words):  # random words beside them would say what nobody meant
                settings = replace(settings, num_tokens=len(words))
            vocabulary = Vocabulary(self._embedded(allowed)) if hard else None
            tokens = self._initial_tokens(settings.num_tokens, settings.init, words, generator)
            goal = _Goal(examples, deltas, settings, vocabulary)
            tokens, loss = self._optimize(tokens, goal, generator, callback)
        self.maybe_free_model_hooks()
        story = {
            **vars(settings),
            "steps": settings.num_optimization_steps,
            "loss": f"{loss:.6g}",
            "seed": "" if generator is None else generator.initial_seed(),
            "before_prompt": examples[0].before_prompt,
            "after_prompt": examples[0].after_prompt,
            "lost_phrases": "\n".join(lost),
            "gained_phrases": "\n".join(gained),
        }
        del story["num_optimization_steps"]
        if hard:
            tokens, nearest = vocabulary.project(tokens)
            story["token_ids"] = " ".join(map(str, allowed[nearest].tolist()))
        embeddings = {encoder.token: part.cpu().contiguous() for encoder, part in self._by_encoder(tokens)}
        return DifferenceTokens(embeddings, self._metadata(story))

    def _first_words(
        self,
        examples: list[_Example],
        befores: list,
        afters: list,
        comparable: bool,
        settings: _Settings,
        allowed: Optional[torch.Tensor],
        generator,
    ) -> tuple[list[str], list[str], torch.Tensor]:
        """What the pairs lost and what they gained, by their prompts or their images, and the rows that tokens begin as."""
        lost, gained = [], []
        if comparable:
            sides = zip(*(changed_phrases(e.before_prompt, e.after_prompt) for e in examples), strict=True)
            lost, gained = map(common_phrases, sides)
        room = settings.num_tokens if settings.init == "prompts" else 0
        words = self._word_rows([] if allowed is not None else lost, gained, room, allowed)
        unsaid = settings.init == "prompts" and not len(words) and (settings.lambda_clip > 0 or not comparable)
        by_images = settings.init == "clip" or unsaid
        if by_images or not comparable:
            # Prompts that do not agree on what was lost are likely to have the word for it, and the query's as well. The
            # UNet chooses better without them: 35 of the words gained and 34 of those lost by 36 pairs of Storybook, and
            # with them 30 and 31.
            told = examples if comparable else [replace(e, before_prompt="", after_prompt="") for e in examples]
            seen_lost, seen = self._seen_words(told, befores, afters, not comparable, generator)
            lost, gained = lost or seen_lost, gained or seen
            words = self._word_rows([], seen, num_tokens=1) if by_images else words
        return lost, gained, words

    def _metadata(self, story: dict[str, Any]) -> dict[str, str]:
        own = {
            "format": FILE_FORMAT,
            "format_version": FILE_FORMAT_VERSION,
            "token": DEFAULT_TOKEN,
            "base_model": self._base_model(),
            "prediction_type": self.scheduler.config.get("prediction_type", "epsilon"),
            "embedding_fingerprint": self._fingerprint(),
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
            "transformers": transformers.__version__,
            "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        }
        return {name: str(value) for name, value in (own | story).items()}

    def _base_model(self) -> str:
        """The base model's name; of a local folder only its last part, as difference files are made to be shared."""
        name = self.config.get("_name_or_path") or ""
        return Path(name).resolve().name if os.path.exists(name) else name

    def _word_rows(
        self, lost: list[str], gained: list[str], num_tokens: int, allowed: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """What the captions say has changed, in the tokens' own space, (up to num_tokens, dim).

        That is the words of A' that A's prompt does not have, or, where there are none, those that it lost, negated.
        Of more words than there is room for the last stay, because a phrase ends in its noun; of several pairs' words,
        those that all pairs have. Both kinds at once would make a difference that runs backwards as well, and runs
        forwards less well: a negated noun is often heard as a noun. Words that are not `allowed` are left out, or that
        an encoder does not have.
        """
        phrases = self.maybe_convert_prompt(" ".join(gained or lost), self.tokenizer).split()
        words = self.tokenizer(phrases, add_special_tokens=False).input_ids if phrases else []
        if allowed is not None:  # a word of several tokens is none of the vocabulary's
            words = [ids for ids in words if len(ids) == 1 and ids[0] in allowed.tolist()]
        known = min(len(encoder.table) for encoder in self._encoders)
        rows = self._embedded([index for ids in words for index in ids if index < known]) * (1 if gained else -1)
        return rows[max(0, len(rows) - num_tokens) :]

    def _seen_words(
        self, examples: list[_Example], befores: list, afters: list, both: bool, generator
    ) -> tuple[list[str], list[str]]:
        """The word of the vocabulary that the images' change leads away from, if `both`, and the one that it leads to;
        none where nothing changed.

        CLIP is quick and shortsighted, so it only proposes words, and the UNet chooses.
        """
        encoder = self._encoders_with_clip()[0]
        delta = self._image_delta(encoder.clip, befores, afters)
        words = self._vocabulary_words(fewest_letters=3, but=FUNCTION_WORDS)
        if not delta.any() or not len(words):
            return [], []
        likeness, count = self._word_features(encoder, words) @ delta, min(NUM_WORD_CANDIDATES, len(words))
        draw = self._draw(examples[0].after_latents, NUM_PROBE_SAMPLES, generator, jitter=False)
        gained = self._telling_word(words[likeness.topk(count).indices].tolist(), examples, draw)
        if not both:
            return [], gained
        nearest = words[(-likeness).topk(count).indices].tolist()
        backwards = [_Example(e.after_latents, e.before_latents, e.after_prompt, e.before_prompt) for e in examples]
        return self._telling_word(nearest, backwards, draw, must_help=True), gained

    def _word_features(self, encoder: _Encoder, words: torch.Tensor) -> torch.Tensor:
        """CLIP's text embeddings (words, dim) at unit length, each of one word."""
        parts = encoder.rows(words)[:, None].split(1024)
        return torch.cat([self._clip_row_features(encoder, part) for part in parts])

    def _telling_word(
        self, words: list[int], examples: list[_Example], draw: _Draw, must_help: bool = False
    ) -> list[str]:
        """The word with which, after the prompt of A, the UNet draws A' best and A worst; none if it `must_help` and
        A' is drawn no better with any than without."""

        def errors(word: Optional[int]) -> tuple[float, float]:
            """How badly A' is drawn with the word, and how badly A is."""
            rows = self._embedded([] if word is None else [word]).expand(2, -1, -1)
            total = torch.zeros(2, device="cpu")
            for example in examples:
                latents = torch.cat([example.after_latents, example.before_latents])
                prediction, target = self._predict(latents, [example.before_prompt] * 2, rows, draw)
                total += (prediction - target).square().flatten(1).mean(1).cpu()
            return tuple(total.tolist())

        found = {word: errors(word) for word in words}
        if must_help:
            without, _ = errors(None)
            found = {word: (after, before) for word, (after, before) in found.items() if after < without}
        best = min(found, key=lambda word: found[word][0] - WORD_CONTRAST * found[word][1], default=None)
        return [] if best is None else [_written(self.tokenizer, [best])]

    def _vocabulary_words(self, fewest_letters: int = 1, but: frozenset[str] = frozenset()) -> torch.Tensor:
        """Ids of the vocabulary's whole words, which text of them gives back."""
        pattern = re.compile(f"[a-z]{{{fewest_letters},}}</w>")
        # Sorted, since the tokenizer gives them in another order each time.
        vocab = sorted((index, token) for token, index in self.tokenizer.get_vocab().items())
        vocab = {token[:-4]: index for index, token in vocab if pattern.fullmatch(token) and token[:-4] not in but}
        read = self.tokenizer(list(vocab), add_special_tokens=False).input_ids if vocab else []
        words = [index for index, ids in zip(vocab.values(), read, strict=True) if ids == [index]]
        return torch.tensor(words, dtype=torch.long, device=self._execution_device)

    def _initial_tokens(
        self, num_tokens: int, init: str, words: torch.Tensor, generator: Optional[torch.Generator]
    ) -> torch.Tensor:
        """The tokens to start from, (num_tokens, dim), in float32 whatever the model's dtype."""
        shape, device = (num_tokens - len(words), words.shape[1]), self._execution_device
        if init == "zeros":
            return torch.zeros(shape, device=device)
        spread = torch.cat([e.table.float().std().expand(e.width) for e in self._encoders]).to(device)
        others = randn_tensor(shape, generator=generator, device=device) * RANDOM_INIT_SCALE * spread
        return torch.cat([others, words.to(device)])

    def _optimize(
        self, tokens: torch.Tensor, goal: _Goal, generator: Optional[torch.Generator], callback: Optional[Callable]
    ) -> tuple[torch.Tensor, float]:
        """Minimises equation 10; returns the best tokens, and their loss, on a fixed draw of noises and time steps.

        The loss of a step says more about the noises and time steps that it happened to draw than about the tokens.
        """
        tokens, num_steps = tokens.requires_grad_(True), goal.settings.num_optimization_steps
        optimizer, schedule = self._optimizer(tokens, goal.settings.learning_rate, num_steps)
        probe = self._draw(goal.examples[0].before_latents, NUM_PROBE_SAMPLES, generator, jitter=False)
        judge_every = max(1, num_steps // 10)
        # Gradients of single values are too small for fp16's range; those that overflow instead are left out.
        half = torch.float16 in (self.unet.dtype, *(encoder.model.dtype for encoder in self._encoders))
        scale = 1024.0 if half else 1.0
        candidates, step = [(float("inf"), tokens.detach().clone())], 0

        def judge() -> None:
            """Puts the tokens as they are now among those that may be the best."""
            losses = [float(self._losses(tokens.detach(), example, probe, goal)["loss"]) for example in goal.examples]
            candidates.append((sum(losses) / len(losses), tokens.detach().clone()))

        try:
            judge()
            progress_bar = self.progress_bar(range(num_steps))
            for step in progress_bar:
                example = goal.examples[step % len(goal.examples)]
                draw = self._draw(example.before_latents, goal.settings.num_samples_per_step, generator)
                with torch.enable_grad(), self._weights_kept():
                    losses = self._losses(tokens, example, draw, goal)
                    (losses["loss"] * scale).backward()
                tokens.grad /= scale
                if tokens.grad.isfinite().all():
                    optimizer.step()
                    schedule.step()
                optimizer.zero_grad()
                values = {name: float(value) for name, value in losses.items()}
                progress_bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                if callback is not None:
                    used = tokens if goal.vocabulary is None else goal.vocabulary.project(tokens)[0]
                    callback(self, step, {**values, "tokens": used.detach().clone()})
                if (step + 1) % judge_every == 0 or step + 1 == num_steps or self.interrupt:
                    judge()
                if self.interrupt:
                    break
        except KeyboardInterrupt:
            logger.warning(
                "Learning was interrupted at step %d of %d; the best tokens so far are kept.", step + 1, num_steps
            )
            judge()
        loss, best = min(candidates, key=lambda candidate: candidate[0])
        if not np.isfinite(loss):
            logger.warning("No loss was finite, and the tokens are those that learning began with. Use float32.")
        if not best.any():
            logger.warning(
                "No tokens were better than zeros, and the difference will change nothing. Try a lower "
                "`learning_rate`, more steps, another `init`, or float32."
            )
        return best, loss

    def _optimizer(self, tokens: torch.Tensor, learning_rate: float, num_steps: int) -> tuple:
        """What takes the steps, and what lowers the learning rate from one to the next."""
        optimizer = torch.optim.Adam([tokens], lr=learning_rate)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)

    def _losses(self, tokens: torch.Tensor, example: _Example, draw: _Draw, goal: _Goal) -> dict[str, torch.Tensor]:
        """Equation 10 and its two parts; a part of weight zero is not computed."""
        losses = {"loss": 0.0}
        if goal.vocabulary is not None:
            tokens, _ = goal.vocabulary.project(tokens)
        weights = goal.settings
        if weights.lambda_clip > 0:
            pairs = zip(self._token_features(tokens, example), goal.deltas, strict=True)
            losses["clip_loss"] = torch.stack([clip_loss(features, delta) for features, delta in pairs]).mean()
            losses["loss"] = losses["loss"] + weights.lambda_clip * losses["clip_loss"]
        if weights.lambda_tc > 0:
            loss = self._token_consistency_loss(tokens, example, draw, weights.lambda_before)
            losses["token_consistency_loss"] = loss
            losses["loss"] = losses["loss"] + weights.lambda_tc * losses["token_consistency_loss"]
        return losses

    def _token_features(self, tokens: torch.Tensor, example: _Example) -> list[torch.Tensor]:
        """What is to point where each CLIP's delta does, (dim,): its text embedding of the tokens alone (Figure 3)."""
        parts = [(encoder, part) for encoder, part in self._by_encoder(tokens) if encoder.clip is not None]
        return [self._without_graph(self._clip_text_features, encoder, [""], part[None])[0] for encoder, part in parts]

    def _draw(self, latents: torch.Tensor, samples: int, generator, jitter: bool = True) -> _Draw:
        """Noises, and time steps spread evenly over the schedule: one in each of `samples` equal stretches of it."""
        device = latents.device
        noise = randn_tensor((samples, *latents.shape[1:]), generator=generator, device=device, dtype=latents.dtype)
        places = torch.full((samples,), 0.5, device="cpu")
        if jitter:
            places = torch.rand(samples, generator=generator, device=generator.device if generator else "cpu").cpu()
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        timesteps = (torch.arange(samples, device="cpu") + places) * num_train_timesteps / samples
        return _Draw(noise, timesteps.long().clamp(max=num_train_timesteps - 1).to(device))

    def _token_consistency_loss(
        self, tokens: torch.Tensor, example: _Example, draw: _Draw, lambda_before: float
    ) -> torch.Tensor:
        """Equations 7 to 9. The prompts are crossed: A's with +D draws A', and that of A' with -D draws A."""
        prompts, latents, rows = [example.before_prompt], example.after_latents, tokens[None]
        if lambda_before > 0:
            prompts = [*prompts, example.after_prompt]
            latents = torch.cat([latents, example.before_latents])
            rows = torch.cat([rows, -rows])
        return token_consistency_loss(*self._predict(latents, prompts, rows, draw), lambda_before)

    def _predict(self, latents, prompts: list[str], rows, draw: _Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """What the UNet says of each of the latents with its prompt and rows, and what it should say.

        Both are (images, samples, channels, height, width): every image under every noise of the draw.
        """
        images, samples = len(prompts), len(draw.timesteps)
        condition = self._without_graph(self._encode, prompts, rows).repeat(samples)
        latents = latents.repeat_interleave(samples, dim=0)
        noise, timesteps = draw.noise.repeat(images, 1, 1, 1), draw.timesteps.repeat(images)
        # The user's scheduler may add noise by a convention of its own; the model was trained by this one's.
        training_schedule = DDPMScheduler.from_config(self.scheduler.config)
        noisy_latents = training_schedule.add_noise(latents, noise, timesteps)
        prediction = self._unet_output(noisy_latents, timesteps, condition)
        prediction_type = training_schedule.config.prediction_type
        target = noise if prediction_type == "epsilon" else latents
        if prediction_type == "v_prediction":
            target = training_schedule.get_velocity(latents, noise, timesteps)
        return prediction.float().unflatten(0, (images, samples)), target.unflatten(0, (images, samples))

    def _unet_output(self, latents: torch.Tensor, t: torch.Tensor, condition: _Condition) -> torch.Tensor:
        """The UNet's prediction (batch, ...); SDXL's is also told the picture's size, which it is to be drawn whole in."""
        self._make_room(self.unet)
        added, latents = None, latents.to(self.unet.dtype)
        if condition.pooled_prompt_embeds is not None:
            size = [side * self.vae_scale_factor for side in latents.shape[-2:]]
            time_ids = torch.tensor([*size, 0, 0, *size], device=latents.device, dtype=latents.dtype)
            added = {"text_embeds": condition.pooled_prompt_embeds, "time_ids": time_ids.expand(len(latents), -1)}
        embeds = condition.prompt_embeds
        return self.unet(latents, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    # ---------------------------------------------------------------------------------- inverting and denoising

    def _deterministic(self, family: type) -> Any:
        """A DDIM scheduler, or its inverse, on the model's noise schedule: two whose steps undo each other."""
        spacing = self.scheduler.config.get("timestep_spacing", "leading")
        spacing = spacing if spacing in ("leading", "trailing") else "leading"  # the inverse knows no other
        known = inspect.signature(family.__init__).parameters
        config = {name: value for name, value in self.scheduler.config.items() if name in known}
        # At these the last step, too, can be undone.
        undoable = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False}
        return family.from_config(config | undoable, timestep_spacing=spacing)

    def _latents_shape(self, batch_size: int, size: tuple[int, int]) -> tuple[int, ...]:
        return (batch_size, self.unet.config.in_channels, *(side // self.vae_scale_factor for side in size))

    def _ddim_inversion(self, latents, condition, num_inference_steps: int, num_steps: int) -> torch.Tensor:
        """Walks latents (batch, ...) up the first `num_steps` of the deterministic path on which DDIM comes down.

        Returns the path downwards, (num_steps + 1, batch, ...).
        """
        scheduler = self._deterministic(DDIMInverseScheduler)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        path = [latents]
        for t in self.progress_bar(scheduler.timesteps[:num_steps]):
            prediction = self._unet_output(path[-1], t, condition)
            path.append(scheduler.step(prediction, t, path[-1]).prev_sample)
        return torch.stack(path[::-1])

    def _ddpm_inversion(
        self, latents, condition, scheduler, timesteps, eta: float, generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A path of noised latents down to `latents` (steps + 1, batch, ...), and the noises (steps, batch, ...) with which
        DDPM, or what `eta` makes of it, takes each step of it.

        "An Edit Friendly DDPM Noise Space" (Huberman-Spiegelglas et al., 2024): the query is noised independently for
        every step, so that the noises between hold its layout, and hold it under another prompt as well.
        """
        latents = latents.float()  # noises are small differences divided by small numbers

        def noised(t: torch.Tensor) -> torch.Tensor:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            return scheduler.add_noise(latents, noise, t[None])

        noises, path = [], [*map(noised, timesteps), latents]
        for t, (here, there) in zip(self.progress_bar(timesteps), pairwise(path), strict=True):
            prediction = self._unet_output(here, t, condition).float()
            step = partial(scheduler.step, prediction, t, here, eta=eta)
            mean = step(variance_noise=torch.zeros_like(here)).prev_sample
            deviation = step(variance_noise=torch.ones_like(here)).prev_sample - mean
            noises.append(torch.where(deviation > 0, (there - mean) / deviation, 0))
        return torch.stack(path), torch.stack(noises)

    def _denoise(
        self, start: _Start, condition: _Condition, baseline: _Condition, mask, eta, generator, callback, tensor_inputs
    ) -> torch.Tensor:
        """Draws latents (batch, ...) guided from the baseline's prediction towards the condition's.

        With fixed noises each step adds its own of them, and else what the scheduler draws. Where the mask (batch, 1,
        height, width) is false, each step ends on the query's own path.
        """
        latents, scheduler, timesteps = start.latents, start.scheduler, start.timesteps
        accepted = inspect.signature(scheduler.step).parameters
        extra = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        for i, t in enumerate(self.progress_bar(timesteps)):
            if self.interrupt:
                break
            inputs = scheduler.scale_model_input(latents, t)
            prediction = self._guided(inputs, t, condition, baseline).to(latents.dtype)
            if start.noises is not None:
                extra = {"eta": eta, "variance_noise": start.noises[i]}
            latents = scheduler.step(prediction, t, latents, **extra).prev_sample
            if mask is not None:
                latents = torch.where(mask, latents, start.path[i + 1])
            if callback is not None:
                negative = {f"negative_{name}": embeds for name, embeds in vars(baseline).items()}
                known = {"latents": latents, **vars(condition), **negative}
                guidance_scale = self._guidance_scale
                known |= callback(self, i, t, {name: known[name] for name in tensor_inputs}) or {}
                if self._guidance_scale == 0 != guidance_scale:
                    # Diffusers' callbacks mean the prompt alone by 0, and not the baseline.
                    self._guidance_scale = 1.0
                latents = known["latents"]
                condition = _Condition(*(known[name] for name in vars(condition)))
                baseline = _Condition(*(known[f"negative_{name}"] for name in vars(baseline)))
        return latents.to(self.unet.dtype)

    def _guided(self, inputs, t, condition: _Condition, baseline: _Condition) -> torch.Tensor:
        """The UNet's prediction (batch, ...), as far from the baseline's as guidance says."""
        if self.guidance_scale == 1:  # at which nothing is left of the baseline's prediction
            return self._unet_output(inputs, t, condition)
        both = self._unet_output(torch.cat([inputs] * 2), t, baseline.followed_by(condition))
        unchanged, changed = both.chunk(2)
        return unchanged + self.guidance_scale * (changed - unchanged)

    def _conditions(
        self,
        prompts: list[str],
        source_prompt,
        negative_prompt,
        difference: Optional[DifferenceTokens],
        negative_difference: Optional[DifferenceTokens],
        has_query: bool,
        replace_phrases: bool,
    ) -> tuple[_Condition, _Condition, _Condition]:
        """The prompts with the difference, the queries' own, and what guidance leads away from, one a prompt each."""
        source_prompts = prompts if source_prompt is None else self._repeated(source_prompt, len(prompts))
        nothing_negative = negative_prompt is None and negative_difference is None
        if negative_prompt is None:
            negative_prompt = source_prompts if has_query else ""
        negative_prompts = self._repeated(negative_prompt, len(prompts))
        rows = self._rows(difference)
        if replace_phrases and rows.any():  # so that the tokens need not contradict what they take the place of
            phrases = difference.metadata.get("lost_phrases", "").splitlines()
            prompts = [without_phrases(prompt, phrases) for prompt in prompts]
        rows = rows.expand(len(prompts), -1, -1)  # [batch, num_tokens, dim]
        self._warn_of_long_prompts([*prompts, *source_prompts], rows.shape[1])
        # Zero rows here too: they have positions, so that without them a difference of zero would be a change.
        zeros = torch.zeros_like(rows)
        negative_rows = zeros
        if negative_difference is not None:
            negative_rows = self._rows(negative_difference).expand(len(prompts), -1, -1)
        if negative_prompt is not source_prompts:
            self._warn_of_long_prompts(negative_prompts, negative_rows.shape[1])
        baseline = self._condition(negative_prompts, negative_rows)
        is_xl = self.text_encoder_2 is not None
        if is_xl and self.config.force_zeros_for_empty_prompt and nothing_negative and not has_query:
            baseline = baseline.each(torch.zeros_like)
        return self._condition(prompts, rows), self._condition(source_prompts, zeros), baseline

    def _start(
        self, images, size, source, inversion, num_inference_steps, strength, eta, copies, generator, latents
    ) -> _Start:
        device, dtype = self._execution_device, self.unet.dtype
        # A copy, so that neither the caller's scheduler nor its time steps are touched.
        if inversion is None:
            scheduler = type(self.scheduler).from_config(self.scheduler.config)
        else:
            scheduler = self._deterministic(DDIMScheduler)
        scheduler.set_timesteps(num_inference_steps, device=device)
        timesteps = scheduler.timesteps
        if inversion is None:
            if latents is None:
                shape = self._latents_shape(len(source.prompt_embeds) * copies, size)
                latents = randn_tensor(shape, generator=generator, device=device, dtype=dtype)
            return _Start(latents.to(device, dtype) * scheduler.init_noise_sigma, scheduler, timesteps)
        num_steps = max(1, round(num_inference_steps * strength))
        timesteps = timesteps[-num_steps:]
        clean = self._encode_images(images, "image", size).to(dtype)
        if inversion == "ddim":
            path = self._ddim_inversion(clean, source, num_inference_steps, num_steps)
            path = path.repeat_interleave(copies, dim=1)
            return _Start(path[0], scheduler, timesteps, path)
        clean = clean.repeat_interleave(copies, dim=0)
        if inversion == "ddpm":
            path, noises = self._ddpm_inversion(clean, source.repeat(copies), scheduler, timesteps, eta, generator)
            return _Start(path[0], scheduler, timesteps, path, noises)
        noise = randn_tensor(clean.shape, generator=generator, device=clean.device, dtype=clean.dtype)
        path = torch.stack([*(scheduler.add_noise(clean, noise, t[None]) for t in timesteps), clean])
        return _Start(path[0], scheduler, timesteps, path)

    def _mask(
        self, mask_image, images: list, size: tuple[int, int], start: _Start, condition: _Condition, source: _Condition
    ) -> Optional[torch.Tensor]:
        """Where the queries may change, 0 or 1 for each pixel (batch, 1, height, width)."""
        if mask_image is None:
            return None
        if isinstance(mask_image, str):
            places = self._changing_places(start, condition, source) > AUTO_MASK_THRESHOLD
            return F.interpolate(places.float(), scale_factor=self.vae_scale_factor)
        masks = [
            self.mask_processor.preprocess(flatten_mask(mask), *size) for mask in as_masks(mask_image, len(images))
        ]
        mask = torch.cat(masks * len(images) if len(masks) == 1 else masks)[:, :1]
        return mask.to(self._execution_device).repeat_interleave(len(start.latents) // len(images), dim=0)

    def _changing_places(self, start: _Start, condition: _Condition, source: _Condition) -> torch.Tensor:
        """How much the difference changes what the UNet sees in the query, by place: (batch, 1, height, width), 0 to 1.

        After DiffEdit (Couairon et al., 2023), on the query's own path instead of fresh noise.
        """
        both, total = source.followed_by(condition), 0.0
        for i in torch.linspace(0, len(start.timesteps) - 1, NUM_MASK_STEPS).long().tolist():
            prediction = self._unet_output(torch.cat([start.path[i]] * 2), start.timesteps[i], both).float()
            unchanged, changed = prediction.chunk(2)
            total = total + (changed - unchanged).abs().mean(1, keepdim=True)
        smooth = F.avg_pool2d(F.pad(total, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return smooth / smooth.amax(dim=(2, 3), keepdim=True).clamp(min=1e-8)

    def _pictures(self, latents, mask: Optional[torch.Tensor], own: Optional[torch.Tensor], output_type: str) -> Any:
        """The answers as pictures, which where the mask is black are the queries' own pixels."""
        with self._precise_vae():
            pixels = self.vae.decode(latents.to(self.vae.dtype) / self.vae.config.scaling_factor).sample
        if mask is not None:
            own = own.repeat_interleave(len(pixels) // len(own), dim=0).to(pixels)
            pixels = torch.where(mask > 0, pixels, own)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    # ------------------------------------------------------------------------------------------------- the call

    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Any = None,
        before: Any = None,
        after: Any = None,
        difference: Optional[Union[DifferenceTokens, str, os.PathLike, list]] = None,
        difference_scale: Union[float, list[float]] = 1.0,
        replace_phrases: bool = True,
        prompt: Optional[Union[str, list[str]]] = None,
        source_prompt: Optional[Union[str, list[str]]] = None,
        before_prompt: Optional[Union[str, list[str]]] = None,
        after_prompt: Optional[Union[str, list[str]]] = None,
        prompt_method: str = "caption",
        prompt_kwargs: Optional[dict[str, Any]] = None,
        negative_prompt: Optional[Union[str, list[str]]] = None,
        negative_difference: Optional[Union[DifferenceTokens, str, os.PathLike, list]] = None,
        mask_image: Any = None,
        height: Optional[int] = None,
        width: Optional[int] = None,
        num_tokens: int = 4,
        num_optimization_steps: int = 60,
        learning_rate: Optional[float] = None,
        alpha: float = 0.8,
        lambda_clip: float = 0.5,
        lambda_tc: float = 6.0,
        lambda_before: float = 0.0,
        init: str = "prompts",
        projection: str = "soft",
        num_samples_per_step: int = 2,
        num_inference_steps: int = 50,
        guidance_scale: Optional[float] = None,
        inversion: Optional[str] = "ddpm",
        strength: float = 0.9,
        eta: Optional[float] = None,
        num_images_per_prompt: int = 1,
        generator: Optional[Union[torch.Generator, list[torch.Generator]]] = None,
        latents: Optional[torch.Tensor] = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_optimization_step: Optional[Callable[[DiffusionPipeline, int, dict], Any]] = None,
        callback_on_step_end: Optional[Callable[[DiffusionPipeline, int, int, dict], dict]] = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Union[DifferenceInversionPipelineOutput, tuple]:
        r"""
        Applies a difference to query images: one learned now from `before` and `after`, or a given one.

        Args:
            image: the query image B, or several; PIL images of any mode, arrays or tensors. Left out, `prompt` and the
                difference make an image from noise.
            before: A; see [`invert_difference`], which takes this and the other arguments of learning.
            after: A'.
            difference: difference tokens, the path of a difference file, or a list of them to apply together.
            difference_scale: how much of the difference, or of each. Negative asks for the way back, which tokens that
                begin as words of A' seldom know: swap `before` and `after` and learn that instead.
            replace_phrases: leave out of the query's prompt what the prompt of A says and that of A' does not, if it
                is there word for word, so that the tokens need not contradict it; of prompts that PEZ wrote, the word
                that the images say was lost. Differences remember these phrases, as `metadata["lost_phrases"]`.
            prompt: describes the query, one for each image. Left out, it is written as `prompt_method` says.
            source_prompt: describes the query where `prompt` asks for another picture; by default `prompt` describes it.
                With both, no difference is needed: the query is redrawn by the words alone.
            before_prompt, after_prompt: describe `before` and `after`.
            prompt_method: `"caption"` or `"pez"`; how prompts that are left out are written.
            prompt_kwargs: for it; see [`caption`] and [`hard_prompts`].
            negative_prompt: what guidance leads away from. By default the query's own prompt, so that guidance acts on
                the difference alone, or the empty prompt where there is no query image. Without effect at a
                `guidance_scale` of 1.
            negative_difference: difference tokens, likewise, that guidance leads away from, after the negative prompt.
            mask_image: where the query may change, white or true, and black or false where it stays to the pixel: an image,
                a matrix, or a list of one for each query, of any size. `"auto"` takes the places in which the difference changes
                most of what the UNet sees.
            height, width: of the answer, in pixels, and of the pair that is learned from; by default their own, in
                whole latents.
            num_tokens, num_optimization_steps, learning_rate, alpha, lambda_clip, lambda_tc, lambda_before, init,
                projection, num_samples_per_step, callback_on_optimization_step: of learning; see [`invert_difference`].
            num_inference_steps: steps of inversion and of denoising.
            guidance_scale: how far to go from the baseline's prediction to the changed one: 1 is as far as the model
                says, and drawn with half the UNet's work; more exaggerates. By default 1 for a query image and 7.5
                for text to image.
            inversion: how the query becomes the starting point. `"ddpm"` finds noises for each step that lead back to
                it, and keeps its layout best while the rest changes; `"ddim"` retraces DDIM's own path, without chance;
                `"sdedit"` adds noise; None starts from `latents` or from noise.
            strength: how far up the schedule the query is taken, above 0 to 1; less keeps more of it.
            eta: how much of each step is noise, 0 (DDIM) to 1 (DDPM). By default 0.5 for `inversion="ddpm"`, which
                needs some, and 0 otherwise.
            num_images_per_prompt: answers for each query; they differ where noise is drawn.
            generator: makes results repeatable; a list has one for each answer.
            latents: to start from with `inversion=None`, (batch, channels, height / factor, width / factor).
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`DifferenceInversionPipelineOutput`] or a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each denoising step; tensors
                in the dictionary that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds` and `negative_prompt_embeds` it gets,
                and of SDXL's `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`.

        Examples:

        Returns:
            [`DifferenceInversionPipelineOutput`] with `images` and `difference`, or the two as a tuple.

        Raises:
            ValueError, TypeError, FileNotFoundError: for arguments that cannot be used, by name, before any model runs.
        """
        # 1. Check everything before any model runs
        if hasattr(callback_on_step_end, "tensor_inputs"):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            image,
            before,
            after,
            prompt,
            source_prompt,
            negative_prompt,
            difference,
            difference_scale,
            negative_difference,
            height,
            width,
            num_inference_steps,
            guidance_scale,
            inversion,
            strength,
            eta,
            num_images_per_prompt,
            generator,
            latents,
            output_type,
            callback_on_step_end_tensor_inputs,
            mask_image,
            prompt_method,
            prompt_kwargs,
        )
        amounts = (num_tokens, num_optimization_steps, learning_rate)
        weights = (alpha, lambda_clip, lambda_tc, lambda_before)
        settings = _Settings(*amounts, *weights, init, projection, num_samples_per_step)
        learns = before is not None or after is not None
        if learns:
            self.check_learning_inputs(
                before, after, before_prompt, after_prompt, prompt_method, prompt_kwargs, settings, height, width
            )
        elif difference is not None:
            difference = self._resolve_difference(difference, difference_scale)
        if negative_difference is not None:
            negative_difference = self._resolve_difference(negative_difference, 1.0, "negative_difference")
        if guidance_scale is None:
            guidance_scale = 7.5 if image is None else 1.0
        self._guidance_scale = guidance_scale
        for name, given in (("negative_prompt", negative_prompt), ("negative_difference", negative_difference)):
            if guidance_scale == 1 and given is not None:
                logger.warning("`%s` has no effect at a `guidance_scale` of 1; give more.", name)
        inversion = None if image is None else inversion
        if eta is None:
            eta = DDPM_ETA if inversion == "ddpm" else 0.0

        # 2. Prompts that are not given, written all at once
        images, befores, afters = ([] if given is None else as_list(given) for given in (image, before, after))
        groups = ((images, prompt), (befores, before_prompt), (afters, after_prompt))
        prompts, *pair_prompts = self._write_prompts(prompt_method, prompt_kwargs, height, width, generator, *groups)

        # 3. Learn the difference, if it is not given
        applied = difference
        if learns:
            comparable = prompt_method == "caption" or None not in (before_prompt, after_prompt)
            pairs, pair_size = (befores, afters, *pair_prompts), self._common_size(befores, "before", height, width)
            difference = self._learn(*pairs, comparable, pair_size, settings, generator, callback_on_optimization_step)
            applied = self._resolve_difference(difference, difference_scale)
        self._interrupt = False

        # 4. What the UNet is told: the query's prompt with the difference, its own, and what guidance leads away from
        condition, source, baseline = self._conditions(
            prompts, source_prompt, negative_prompt, applied, negative_difference, bool(images), replace_phrases
        )

        # 5. Where denoising begins
        size = self._common_size(images, "image", height, width)
        way = (inversion, num_inference_steps, strength, eta)
        start = self._start(images, size, source, *way, num_images_per_prompt, generator, latents)
        self._num_timesteps = len(start.timesteps)
        condition, source, baseline = (each.repeat(num_images_per_prompt) for each in (condition, source, baseline))
        mask = self._mask(mask_image, images, size, start, condition, source)

        # 6. Denoise along the difference
        places = None if mask is None else F.max_pool2d(mask, self.vae_scale_factor) > 0
        callback = (callback_on_step_end, callback_on_step_end_tensor_inputs)
        latents = self._denoise(start, condition, baseline, places, eta, generator, *callback)

        # 7. Pixels
        answers = latents
        if output_type != "latent":
            own = None if mask is None else self._pixels(images, "image", size)
            answers = self._pictures(latents, mask, own, output_type)
        self.maybe_free_model_hooks()
        if not return_dict:
            return answers, difference
        return DifferenceInversionPipelineOutput(images=answers, difference=difference)


def _features(output: Any) -> torch.Tensor:
    """CLIP's projected features, which transformers 5 wraps in an output object and transformers 4 does not."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
