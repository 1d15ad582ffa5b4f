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

From one image before a change (A) and one after it (A'), the pipeline learns difference tokens: a few rows in the text
encoder's embedding space that encode the change and nothing else. Appended to the prompt of a query image B, they make
the model draw B with the same change. Nothing is fine-tuned. The method is Difference Inversion ("Interpolate and
Isolate the Difference with Token Consistency for Image Analogy Generation"); equation numbers are the paper's.
"""

import datetime
import hashlib
import inspect
import math
import numbers
import os
import re
import sys
import tempfile
import threading
import uuid
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, fields, replace
from functools import partial, reduce, wraps
from itertools import islice, pairwise
from pathlib import Path
from typing import Any, Optional, Union

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from huggingface_hub import HfApi, hf_hub_download
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

import diffusers
from diffusers import (
    AutoencoderKL,
    DDIMInverseScheduler,
    DDIMScheduler,
    DDPMScheduler,
    DiffusionPipeline,
    ModelMixin,
    UNet2DConditionModel,
)
from diffusers.image_processor import VaeImageProcessor
from diffusers.loaders import FromSingleFileMixin, StableDiffusionXLLoraLoaderMixin, TextualInversionLoaderMixin
from diffusers.pipelines.pipeline_utils import StableDiffusionMixin
from diffusers.pipelines.stable_diffusion.pipeline_stable_diffusion_img2img import retrieve_latents
from diffusers.schedulers import KarrasDiffusionSchedulers
from diffusers.utils import BaseOutput, logging, replace_example_docstring
from diffusers.utils.torch_utils import randn_tensor


logger = logging.get_logger(__name__)

FILE_FORMAT = "difference-tokens"
FILE_FORMAT_VERSION = 1
DEFAULT_TOKEN = "<difference>"
TWO_ENCODER_TOKENS = ("clip_l", "clip_g")  # the names that other programs use in files of SDXL embeddings
NUM_PROBE_SAMPLES = 8  # (noise, time step) pairs on which tokens are evaluated
NUM_EVIDENCE_SAMPLES = 5  # (noise, time step) pairs on which a word is evaluated
NUM_VERIFICATION_SAMPLES = 12  # fresh pairs on which the words found are verified
EVIDENCE_TIMESTEPS = (0.35, 0.95)  # part of the schedule where words matter most, as fractions
NUM_CLIP_WORDS = 5  # vocabulary words that CLIP proposes for each side (lost, gained)
NUM_LIKELY = 4  # how many of these are reconsidered at the end
NUM_CAPTION_WORDS = 4  # candidate words from each caption
NUM_SHARED_CANDIDATES = 64  # vocabulary words nearest to both pictures, from which CLIP describes what they share
MOST_SHARED_WORDS = 7  # in that description
# Each of these words must raise the description's cosine with both pictures by at least LEAST_LIKENESS_GAIN. The
# smaller gain must be at least LEAST_BALANCE of the larger: a word that helps one much more is part of the change.
LEAST_LIKENESS_GAIN, LEAST_BALANCE = 0.01, 0.5
NUM_COMPLETION_WORDS = 6  # vocabulary words that CLIP proposes for a query
NUM_COMPLETION_SAMPLES = 6  # (noise, time step) pairs on which they are evaluated
NUM_SEARCH_ROUNDS = 4  # maximum; each round accepts at most one gained, one lost and one shared word
NUM_PROMISING = 3  # near misses of each kind (gained, lost, shared) that are tried again in the next round
MOST_AT_ONCE = 12  # maximum latents per UNet call
MOST_LEARNED_AT_ONCE = 4  # the same with gradients, which need far more memory
NUM_REVISION_WORDS = 24  # words from CLIP that the UNet may add to a hard prompt
NUM_REVISION_SAMPLES = 4  # (noise, time step) pairs on which a hard prompt is revised
# All thresholds below are relative to the UNet's error without words; RESULTS.md has the measurements.
# A word is part of the change if it raises the error on the other picture by more than LEAST_CONTRAST, and the error
# on its own by less than MOST_HARM and less than MOST_HARM_SHARE of that contrast.
LEAST_CONTRAST, MOST_HARM_SHARE, MOST_HARM = 0.06, 0.02, 0.06
# Verification on fresh noises. A word is quiet if, alone, it harms the other picture by less than LOUD and by less
# than QUIET_SHARE of the loudest word's harm. One that was not quiet when chosen passes if it now helps its own
# picture by LEAST_FRESH_GAIN. Any other may harm its own by at most MOST_FRESH_HARM. If it is quiet now, it may help
# the other picture by at most MOST_FRESH_HELP, and alone it must help its own by LEAST_GAIN_ALONE.
LEAST_FRESH_GAIN, MOST_FRESH_HARM, MOST_FRESH_HELP, LEAST_GAIN_ALONE = 0.03, 0.003, 0.015, 0.06
LOUD, QUIET_SHARE = 0.7, 0.15
# Louder words may hide a likely word that, alone, harms its own picture by at most MOST_HIDDEN_HARM, and the other by
# at least LEAST_HIDDEN_CONTRAST more. Next to them it must help its own by LEAST_HIDDEN_GAIN, and the other by at most
# MOST_HIDDEN_HELP. If, alone, it is LOUD and does at most MOST_LOUD_HARM, it may harm its own by LEAST_HIDDEN_GAIN
# there.
MOST_HIDDEN_HARM, LEAST_HIDDEN_CONTRAST, LEAST_HIDDEN_GAIN, MOST_HIDDEN_HELP = 0.25, 0.1, 0.03, 0.005
MOST_LOUD_HARM = 0.1
NO_CHANGE = 1e-4  # mean squared change of the latents below which nothing is learned
CONTRAST_TIMESTEPS = (0.3, 0.98)  # part of the schedule on which the contrast is learned, as fractions
LEAST_COMPLETION_GAIN = 0.015  # relative gain on a query from which a word is added to its prompt
LEAST_SHARED_GAIN = 0.03  # relative gain on both pictures above which a word is added to their shared prompt
# With `inversion="ddpm"`. Compared with 1, answers on Storybook were right as often, and 0.5 ± 0.3 dB closer to the
# right pictures (56 analogies, three seeds).
DDPM_ETA = 0.5
LEAST_DDPM_ETA = 0.01  # below this, step noises are so large that rounding loses the query
NUM_MASK_STEPS = 10  # denoising steps from which an automatic mask is computed
# Fraction of the strongest change above which a place belongs to the mask. On 30 Storybook analogies the mask then
# covered on average at least 0.98 of the changed pixels for every kind of change, and where the change was local it
# left out 0.72 to 0.87 of the others. At 0.3 it covered 0.73 of a changed sky.
AUTO_MASK_THRESHOLD = 0.15
# Words without content of their own: captions that differ only in these do not differ.
FUNCTION_WORDS = frozenset(
    "a an the and or but of in on at by to with without from for as is are was were be it its this that there some "
    "something nothing".split()
)
NEGATIONS, ARTICLES = frozenset(("no", "not", "without")), frozenset(("a", "an", "any", "the"))
PREPOSITIONS = frozenset(("at", "by", "from", "in", "on", "to", "with"))
# Spread of random initial tokens, in standard deviations of the vocabulary. See RESULTS.md.
RANDOM_INIT_SCALE = 1.0
QUESTION = "Describe this image in one short sentence."  # asked of chat captioners
# Tokens that start as words are close to the solution; the learning rate that random rows need would make them drift.
FROM_WORDS = {"objective": "contrast", "num_optimization_steps": 8, "learning_rate": 0.003, "num_samples_per_step": 2}
FROM_ROWS = {
    "objective": "consistency",
    "num_optimization_steps": 60,
    "learning_rate": 0.02,
    "num_samples_per_step": 4,
}

# The CLIP whose text tower is the base model's text encoder, by that encoder's width.
MATCHING_CLIP = {
    768: "openai/clip-vit-large-patch14",
    1024: "laion/CLIP-ViT-H-14-laion2B-s32B-b79K",
    1280: "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
}
# Mean cosine between two models' word embeddings above which one is a copy or a fine-tune of the other.
SAME_EMBEDDINGS = 0.5

WEIGHT_NAME = "difference.safetensors"
EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> from diffusers import DiffusionPipeline
        >>> from diffusers.utils import load_image

        >>> # The small model that comes with the project. Any Stable Diffusion 1.x, 2.x or XL checkpoint works too.
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
    along_chord = (1 - fraction) * start + fraction * end  # for parallel and opposite directions
    return F.normalize(torch.where(torch.sin(angle) < 1e-4, along_chord, along_arc), dim=-1)


def interpolated_delta(image_delta: torch.Tensor, text_delta: torch.Tensor, alpha: float) -> torch.Tensor:
    """Interpolates between the images' delta (alpha 0) and the captions' (alpha 1); equations 2 to 5.

    Args:
        image_delta: CLIP's image embedding after minus before, shape (dim,).
        text_delta: CLIP's text embedding of the captions, after minus before, shape (dim,).
        alpha: 0 to 1.

    Returns:
        The delta at unit length, shape (dim,). If one of the two is zero (equal captions, say), the other.
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
    """L_after + lambda_before * L_before (equations 7 to 9): the UNet's mean squared errors on A' and on A.

    Args:
        prediction: UNet outputs for A' under [P_A; +D], then for A under [P_A'; -D], (2, samples, channels, height,
            width). The second can be left out if it has no weight.
        target: the noise or velocity to predict, same shape.
        lambda_before: weight of L_before, at least 0; 1 in the paper.
    """
    errors = (prediction.float() - target.float()).square().flatten(1).mean(1)
    return errors[0] + lambda_before * errors[1:].sum()


def change_weights(before_latents: torch.Tensor, after_latents: torch.Tensor) -> torch.Tensor:
    """Weights each place by how much it changed: the distance between the two latents there.

    Unchanged places then add hardly any noise to a comparison. Ours, not the paper's.

    Args:
        before_latents, after_latents: (batch, channels, height, width).

    Returns:
        Weights (batch, 1, height, width) with a mean of 1; all 1 if the pictures are the same.
    """
    distance = (after_latents.float() - before_latents.float()).square().mean(1, keepdim=True).sqrt()
    mean = distance.mean((-2, -1), keepdim=True)
    return torch.where(mean > 0, distance / mean.clamp(min=1e-8), torch.ones_like(distance))


def weighted_errors(prediction: torch.Tensor, target: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean squared errors (...) of predictions (..., channels, height, width), weighted by place."""
    return ((prediction.float() - target.float()).square().mean(-3) * weights.squeeze(-3)).mean((-2, -1))


def contrast_loss(after_gain: torch.Tensor, before_gain: torch.Tensor, lambda_contrast: float) -> torch.Tensor:
    """The tokens' gain on A (if positive), minus their gain on A'. Ours, in place of equation 7.

    Under L_after alone, tokens are rewarded for describing anything in A' that the prompt leaves out. Here, content
    that A and A' share earns nothing, since it helps both. Making A worse earns nothing either, so tokens stay near
    what helps A'.

    Args:
        after_gain: relative reduction of the UNet's error on A' by the tokens, (samples,).
        before_gain: the same for A, under the same prompt, noises and time steps.
        lambda_contrast: weight of the gain on A; at 1, shared content earns nothing.
    """
    return (lambda_contrast * before_gain.clamp(min=0) - after_gain).mean()


class Vocabulary:
    """Candidate rows (words, dim), and their directions, which are too many to normalise again at every step."""

    def __init__(self, rows: torch.Tensor):
        self.rows = rows.float()
        self.directions = F.normalize(self.rows, dim=-1)

    def nearest(self, rows: torch.Tensor, count: int = 1) -> torch.return_types.topk:
        """Cosines and indices (num_tokens, count) of the words closest in direction to each of `rows` (num_tokens,
        dim)."""
        return (F.normalize(rows.float(), dim=-1) @ self.directions.T).topk(min(count, len(self.rows)))

    def project(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The word nearest to each of `rows` (..., dim), as a row and as an index (...).

        Gradients pass straight through to `rows`, as in "Hard Prompts Made Easy" (Wen et al., 2023).
        """
        nearest = self.nearest(rows.detach().flatten(0, -2)).indices.view(rows.shape[:-1])
        return rows + (self.rows[nearest] - rows).detach(), nearest


# ------------------------------------------------------------------------------------------------------ prompts


def split_words(prompt: str) -> list[str]:
    """A prompt's words and punctuation in lower case; names in angle brackets are textual inversions."""
    return re.findall(r"<[^<>\s]+>|\w+|[^\w\s]", prompt.lower())


def _says_something(word: str) -> bool:
    return word not in FUNCTION_WORDS and any(map(str.isalnum, word))


def said_words(prompt: str) -> list[str]:
    """A prompt's words and signs, except what it denies: "a man without a red hat in snow" says nothing of a hat."""
    words, denied = [], False
    for word in split_words(prompt):
        denied = word in NEGATIONS or (denied and (_says_something(word) or word in ARTICLES))
        if not denied:
            words.append(word)
    return words


def unshared_words(prompt: str, other: str) -> list[str]:
    """The content words that only the first of two prompts says, once each, in its order; or else its prepositions."""
    known = set(said_words(other))
    own = [word for word in dict.fromkeys(said_words(prompt)) if word not in known]
    return [word for word in own if _says_something(word)] or [word for word in own if word in PREPOSITIONS]


def shared_prompt(before: str, after: str) -> str:
    """What two prompts share, in the first one's order. Function words and punctuation stay if the next word does."""
    words, known, shared = said_words(before), set(said_words(after)), []
    for word in reversed(words):
        follows = _says_something(word) or (shared and shared[-1] is not None)
        shared.append(word if word in known and follows else None)
    text = " ".join(word for word in reversed(shared) if word is not None)
    return re.sub(r"\s+([,.;:!?])", r"\1", text)


def _spaced(word: str, following: str) -> str:
    """A pattern for a word and the space after it, which is optional around punctuation."""
    return re.escape(word) + (r"\s+" if word.isalnum() and following.isalnum() else r"\s*")


def without_phrases(prompt: str, phrases: Sequence[str]) -> str:
    """A prompt without these phrases, wherever they occur as whole words."""
    for phrase in filter(str.strip, phrases):
        words = phrase.split()
        pattern = "".join(map(_spaced, words[:-1], words[1:])) + re.escape(words[-1])
        whole = rf"(?:(?<!\w)|(?=\W)){pattern}(?:(?!\w)|(?<=\W))\s*"
        prompt = re.sub(whole, "", prompt, flags=re.IGNORECASE)
    return prompt.strip()


# ------------------------------------------------------------------------------------------------- word search


class WordSearch:
    """Sorts words by their effect on the UNet's errors: gained by A', lost by A, or shared by both.

    A gained word makes the UNet draw A worse, and A' no worse; a lost word does the reverse; a shared word helps both.
    Each picture is judged with the words already found for it, so that a quiet change is noticed next to a loud one.
    Ours, not the paper's.

    Args:
        errors: `errors(phrases, picture)` returns the UNet's errors (phrases, samples) on A (picture 0) or A' (picture
            1), with each phrase appended to the prompt that the pair shares.
    """

    def __init__(self, errors: Callable[[list[str], int], torch.Tensor]):
        self.errors = errors
        self.shared: list[str] = []
        self.found: tuple[list[str], list[str]] = ([], [])  # lost by A, gained by A'
        without_words = torch.cat([errors([""], picture) for picture in (0, 1)])
        self._scale = without_words.mean(0)  # all errors are divided by it
        self._alone: dict[str, list[float]] = {}  # gains of words when none has been found
        self._known = {("", picture): found / self._scale for picture, found in enumerate(without_words)}

    def run(self, candidates: Sequence[str], may_be_shared: Sequence[str], most: int) -> None:
        """Fills `found` with up to `most` words per side, and `shared` with words from `may_be_shared`."""
        candidates, refused = list(dict.fromkeys(candidates)), set()
        for _ in range(NUM_SEARCH_ROUNDS):
            known = {*self.shared, *self.found[0], *self.found[1], *refused}
            candidates = [word for word in candidates if word not in known]
            if not candidates:
                return
            gains = self.gains(candidates, self.found)  # [words, 2]
            if not any(self.found):
                self._alone |= zip(candidates, gains.tolist(), strict=True)
            scores = [self.evidence(gains[:, side], gains[:, 1 - side]) for side in (0, 1)]
            accepted = False
            for side in (1, 0):
                best = int(scores[side].argmax())
                if scores[side][best].isfinite() and len(self.found[side]) < most:
                    self.found[side].append(candidates[best])
                    accepted = True
            both = gains.amin(1)
            said = torch.tensor([word in may_be_shared for word in candidates], device=both.device)
            both = torch.where(said, both, -torch.inf)
            best = int(both.argmax())
            if both[best] > LEAST_SHARED_GAIN:
                self.shared.append(candidates[best])
                accepted = True
            if not accepted:
                return
            refused |= self.drop_refuted()
            # Words that are far from passing are not tried again.
            promising = torch.stack([*(torch.minimum(gains[:, s], -gains[:, 1 - s]) for s in (0, 1)), both])
            nearest = promising.topk(min(NUM_PROMISING, len(candidates)))
            kept = set(nearest.indices[nearest.values.isfinite()].tolist())
            kept |= {i for score in scores for i in score.isfinite().nonzero().flatten().tolist()}
            candidates = [word for i, word in enumerate(candidates) if i in kept]

    def look_again(self, likely: Sequence[Sequence[str]], most: int) -> None:
        """Reconsiders rejected words that were likely lost (`likely[0]`) or gained (`likely[1]`).

        Next to louder words, a quiet one only has to help its own picture and not the other. If it clearly told the
        two apart on its own, it may even harm its own picture a little.
        """
        known = {*self.shared, *self.found[0], *self.found[1]}
        left = [[w for w in words if w not in known and self._may_be_hidden(w, i)] for i, words in enumerate(likely)]
        while True:
            best, most_gain = None, -math.inf
            for side, beside in enumerate(self.found):
                if len(beside) >= most:
                    continue
                words = left[side]
                gains = dict(zip(words, self._gains(words, beside, side).tolist(), strict=True))
                words = [word for word, gain in gains.items() if gain >= self._least_gain(word, side)]
                others = self._gains(words, self.found[1 - side], 1 - side).tolist()
                left[side] = [word for word, gain in zip(words, others, strict=True) if gain <= MOST_HIDDEN_HELP]
                for word in left[side]:
                    if gains[word] > most_gain:
                        best, most_gain = (side, word), gains[word]
            if best is None:
                return
            side, word = best
            self.found[side].append(word)
            gone = {word, *self.drop_refuted()}
            left = [[word for word in words if word not in gone] for words in left]

    def _may_be_hidden(self, word: str, side: int) -> bool:
        """Whether a word, on its own, does little harm to its picture and tells the two apart at least a little."""
        gain, other_gain = self.gains_alone(word, side)
        return gain >= -MOST_HIDDEN_HARM and gain - other_gain >= LEAST_HIDDEN_CONTRAST

    def _least_gain(self, word: str, side: int) -> float:
        """The gain on its own picture that a hidden word needs next to the others."""
        gain, other_gain = self.gains_alone(word, side)
        told_them_apart = gain >= -MOST_LOUD_HARM and -other_gain >= LOUD
        return -LEAST_HIDDEN_GAIN if told_them_apart else LEAST_HIDDEN_GAIN

    @staticmethod
    def evidence(gain: torch.Tensor, other_gain: torch.Tensor) -> torch.Tensor:
        """How strongly words (words,) speak for one picture and against the other; -inf for those that do not."""
        contrast = -other_gain
        holds = (contrast > LEAST_CONTRAST) & (gain > -MOST_HARM_SHARE * contrast) & (gain > -MOST_HARM)
        return torch.where(holds, gain + 0.25 * contrast.clamp(max=1), -torch.inf)

    def gains(self, words: Sequence[str], found: tuple[list[str], list[str]]) -> torch.Tensor:
        """How much better each picture is drawn when each word is added to those found, (words, 2)."""
        return torch.stack([self._gains(words, found[picture], picture) for picture in (0, 1)], dim=1)

    def _gains(self, words: Sequence[str], beside: list[str], picture: int) -> torch.Tensor:
        """How much better one picture is drawn when each word is added to `beside`, (words,)."""
        if not words:
            return self._scale[:0]
        phrases = [[*self.shared, *beside, *more] for more in ([], *([word] for word in words))]
        without, *with_word = self._errors([" ".join(phrase) for phrase in phrases], picture)
        return torch.stack([(without - errors).mean() for errors in with_word])

    def _gain(self, word: str, beside: list[str], picture: int) -> float:
        """As `_gains`, for one word."""
        return float(self._gains([word], beside, picture)[0])

    def _errors(self, phrases: list[str], picture: int) -> list[torch.Tensor]:
        new = [phrase for phrase in dict.fromkeys(phrases) if (phrase, picture) not in self._known]
        if new:
            found = self.errors(new, picture) / self._scale
            self._known.update({(phrase, picture): e for phrase, e in zip(new, found, strict=True)})
        return [self._known[phrase, picture] for phrase in phrases]

    def drop_refuted(self) -> set[str]:
        """Removes words that, next to the others, help the other picture too or harm their own; returns them."""
        dropped: set[str] = set()
        while True:
            worst, refuted = 0.0, None
            for side in (0, 1):
                for word in self.found[side]:
                    others = tuple([w for w in words if w != word] for words in self.found)
                    gain, other_gain = self.gains([word], others)[0, [side, 1 - side]].tolist()
                    if (gain < -MOST_HARM or other_gain > max(0.01, 0.5 * gain)) and min(gain, -other_gain) < worst:
                        worst, refuted = min(gain, -other_gain), (side, word)
            if refuted is None:
                return dropped
            self.found[refuted[0]].remove(refuted[1])
            dropped.add(refuted[1])

    def verify(self, errors: Callable[[list[str], int], torch.Tensor]) -> None:
        """Removes words that do not hold on `errors`, which come from noises that did not choose them.

        With many candidates, the best on a few noises is sometimes just the luckiest.
        """
        fresh = WordSearch(errors)
        fresh.shared = self.shared
        for side, words in enumerate(self.found):
            while words:
                doubts = [fresh._doubt(self, word, side) for word in words]
                worst = max(range(len(words)), key=doubts.__getitem__)
                if doubts[worst] <= 0:
                    break
                words.pop(worst)

    def _doubt(self, search: "WordSearch", word: str, side: int) -> float:
        """By how much a word from another search misses the requirements; above 0 it is dropped.

        It may not harm its own picture, or only a little if it harms the other a lot. Next to a much louder word it
        must also help its own and not the other: if something disappears and nothing replaces it, a word for shared
        content can seem to do a little of each.
        """
        gain = self._gain(word, [other for other in search.found[side] if other != word], side)
        if gain >= LEAST_FRESH_GAIN and search.loudness(word, side) >= search.least_loudness(search.found):
            return 0.0  # enough for most words
        loudness, least = self.loudness(word, side), self.least_loudness(search.found)
        if loudness >= least and gain >= -max(MOST_FRESH_HARM, MOST_HARM_SHARE * loudness):
            return 0.0
        contrast = -self._gain(word, search.found[1 - side], 1 - side)
        loudness = max(contrast, loudness)
        doubt = -gain - max(MOST_FRESH_HARM, MOST_HARM_SHARE * loudness)
        if loudness < least:
            gain_alone, _ = self.gains_alone(word, side)
            doubt = max(doubt, LEAST_GAIN_ALONE - gain_alone, -contrast - MOST_FRESH_HELP)
        return doubt

    def least_loudness(self, found: tuple[list[str], list[str]]) -> float:
        """The loudness below which a word is quiet, given the loudest of those found."""
        loudest = max(self.loudness(word, side) for side in (0, 1) for word in found[side])
        return min(LOUD, QUIET_SHARE * loudest)

    def loudness(self, word: str, side: int) -> float:
        """How much a word alone harms the other picture."""
        return -self.gains_alone(word, side)[1]

    def gains_alone(self, word: str, side: int) -> tuple[float, float]:
        """How much better a word alone makes the UNet draw its own picture, and the other."""
        if word not in self._alone:
            self._alone[word] = self.gains([word], ([], []))[0].tolist()
        return self._alone[word][side], self._alone[word][1 - side]

    def order(self, prompts: tuple[str, str]) -> None:
        """Sorts each side's words as in its prompt; if it lacks any, swaps neighbours where that lowers the error."""
        for side, words in enumerate(self.found):
            places = split_words(prompts[side])
            if all(word in places for word in words):
                words.sort(key=places.index)
                continue
            for i in range(len(words) - 1):
                swapped = [*words[:i], words[i + 1], words[i], *words[i + 2 :]]
                as_is, other = self._errors([" ".join([*self.shared, *order]) for order in (words, swapped)], side)
                if other.mean() < as_is.mean():
                    words[:] = swapped


# ------------------------------------------------------------------------------------------- difference tokens


@dataclass(repr=False, eq=False)
class DifferenceTokens:
    """A learned difference: rows in a text encoder's embedding space, with a record of their origin.

    Arithmetic makes new differences: `0.5 * d` is less of the change, `-d` has negated rows (equation 8), and `d + e`
    applies both changes (their rows are concatenated).

    Attributes:
        embeddings: one tensor (num_tokens, dim) per text encoder, by name. A single one is named `<difference>`, or as
            in the other program's file that it came from.
        metadata: strings that record how it was learned: prompts, settings, base model, versions.
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
        if scale < 0:
            metadata["negated"] = str(metadata.get("negated") != "True")
        if scale == 0:
            metadata.pop("lost_phrases", None)
            metadata.pop("gained_phrases", None)
        return DifferenceTokens({name: rows * scale for name, rows in self.embeddings.items()}, metadata)

    __rmul__ = __mul__

    def __neg__(self) -> "DifferenceTokens":
        return self * -1.0

    def negated(self) -> "DifferenceTokens":
        """The reverse change, `-d`, to save for programs that have no negative scales."""
        return -self

    def __add__(self, other: "DifferenceTokens") -> "DifferenceTokens":
        names = list(self.embeddings)
        if len(names) != len(other.embeddings) or (len(names) > 1 and set(names) != set(other.embeddings)):
            raise ValueError(f"Differences for different text encoders do not add: {self!r} and {other!r}.")
        # One encoder's tokens may have any name; those of two are matched by name, since files sort them.
        others = other.embeddings if len(names) > 1 else dict(zip(names, other.embeddings.values(), strict=True))
        if any(own.shape[1:] != others[name].shape[1:] for name, own in self.embeddings.items()):
            raise ValueError(f"Differences of different base models do not add: {self!r} and {other!r}.")
        common = ("base_model", "prediction_type", "embedding_fingerprint", "negated")
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
        """Returns a copy on another device or in another dtype."""
        moved = {name: rows.to(device=device, dtype=dtype) for name, rows in self.embeddings.items()}
        return DifferenceTokens(moved, dict(self.metadata))

    def nearest_words(
        self, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel, count: int = 3
    ) -> list[list[tuple[str, float]]]:
        """The vocabulary words closest in direction to each token, to see what was learned.

        Args:
            tokenizer: the base model's.
            text_encoder: the base model's, of the tokens' width.
            count: words per token, at least 1.

        Returns:
            For each token, its words and their cosines (-1 to 1), nearest first. At 1 a token points as the word does.

        Raises:
            ValueError: if `count` is below 1, or if no tokens have the text encoder's width.
        """
        if count < 1:
            raise ValueError(f"`count` is {count}; it must be at least 1.")
        table = embedding_table(text_encoder.get_input_embeddings()).float()
        fitting = [rows for rows in self.embeddings.values() if rows.shape[1] == table.shape[1]]
        if not fitting:
            raise ValueError(f"`text_encoder` has embeddings of size {table.shape[1]}, which do not fit {self!r}.")
        words = sorted(set(range(len(table))) - set(tokenizer.all_special_ids))
        nearest = Vocabulary(table[words]).nearest(fitting[0].to(table), count)
        found = zip(nearest.indices.tolist(), nearest.values.tolist(), strict=True)
        return [[(_written(tokenizer, [words[i]]), cosine) for i, cosine in zip(*each, strict=True)] for each in found]

    def to_text(self, tokenizer: CLIPTokenizer) -> str:
        """The difference as plain words to append to any prompt, even for a model that takes only text.

        Args:
            tokenizer: the base model's.

        Raises:
            ValueError: if the tokens are not words: they were learned with `projection="soft"`, or scaled.
        """
        if "token_ids" not in self.metadata:
            raise ValueError(
                f'{self!r} is not made of words. Learn it with `projection="hard"`, and do not scale it; '
                "`nearest_words` shows the words nearest to other tokens."
            )
        return _written(tokenizer, [int(index) for index in self.metadata["token_ids"].split()])

    def save(self, path: Union[str, os.PathLike], token: Optional[str] = None) -> Path:
        """Writes one safetensors file that stock `load_textual_inversion` and ComfyUI can read too.

        The file is written next to its destination, then moved there, so a crash leaves the old file or the new one.

        Args:
            path: where to write; `.safetensors` is added if it is missing.
            token: what stands for the difference in a stock pipeline's prompts. Defaults to the file's name in angle
                brackets, so that several files load into one pipeline. Rows of two text encoders (SDXL) are named
                when they are loaded instead.

        Returns:
            The path that was written.

        Raises:
            ValueError: if `token` has upper-case letters or spaces (diffusers would then use its first row only), or
                if the difference is for two text encoders.
        """
        path = Path(path)
        path = path if path.suffix == ".safetensors" else path.with_name(f"{path.name}.safetensors")
        names = list(self.embeddings)
        if len(names) == 1:
            names = [token or "<{}>".format(re.sub(r"[^\w.-]+", "-", path.stem.lower()))]
            if names[0] != names[0].lower() or names[0].split() != names:
                raise ValueError(
                    f"`token` must be one word in lower case, but is {token!r}; diffusers supports no others."
                )
        elif token is not None:
            raise ValueError("`token` names one text encoder's rows; those of two are named when they are loaded.")
        tensors = {
            n: rows.detach().cpu().contiguous() for n, rows in zip(names, self.embeddings.values(), strict=True)
        }
        own = {"token": names[0]} if len(names) == 1 else {}
        header = {**self.metadata, **own, "format": FILE_FORMAT, "format_version": FILE_FORMAT_VERSION}
        with replacing(path) as temporary:
            save_file(tensors, temporary, metadata={name: str(value) for name, value in header.items()})
        return path

    @classmethod
    def load(cls, path: Union[str, os.PathLike]) -> "DifferenceTokens":
        """Reads a file that `save` wrote, or another program's textual-inversion file in safetensors.

        Raises:
            FileNotFoundError: if there is no such file.
            ValueError: if it is not a safetensors file, if a tensor is not a finite floating-point matrix, or if its
                format is newer than this code supports.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(
                f"`difference`: there is no file {str(path)!r}. `pipe.load_difference` reads repositories of the Hub."
            )
        try:
            with safe_open(path, framework="pt") as file:
                metadata = dict(file.metadata() or {})
                # Cloned because they are memory-mapped: the process would crash if the file were truncated.
                tensors = {name: file.get_tensor(name).clone() for name in file.keys()}
                embeddings = _as_matrices(tensors, metadata)
        except SafetensorError as error:
            raise ValueError(
                f"`difference`: {str(path)!r} {_what_a_file_is(path)} Give a .safetensors file written by "
                "`difference.save(...)` or a textual inversion in that format."
            ) from error
        _check_embeddings(embeddings, path)
        version = metadata.get("format_version", "1")
        if not version.isdigit() or int(version) > FILE_FORMAT_VERSION:
            raise ValueError(
                f"`difference`: {str(path)!r} has format_version {version!r}, but this code reads only up to "
                f"{FILE_FORMAT_VERSION}. Update pipeline_difference_inversion.py."
            )
        return cls(embeddings, metadata)

    def save_pretrained(self, folder: Union[str, os.PathLike]) -> Path:
        """Writes `difference.safetensors` into a folder, creating it if needed and keeping its other files.

        `examples/publish.py difference` writes a model card with the two pictures.
        """
        return self.save(Path(folder) / WEIGHT_NAME).parent

    def push_to_hub(
        self,
        repo_id: str,
        private: Optional[bool] = None,
        token: Optional[str] = None,
        revision: Optional[str] = None,
        create_pr: bool = False,
        commit_message: str = "Upload difference tokens",
    ) -> str:
        """Uploads `difference.safetensors` to a repository of the Hub, creating it if needed.

        Args:
            repo_id: "user/name".
            private, token, revision, create_pr, commit_message: as in huggingface_hub.

        Returns:
            The URL of the commit.
        """
        api = HfApi(token=token)
        api.create_repo(repo_id, private=private, exist_ok=True)
        if revision is not None and not create_pr and not revision.startswith("refs/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        options = {"revision": revision, "create_pr": create_pr, "commit_message": commit_message}
        with tempfile.TemporaryDirectory() as folder:
            return str(api.upload_folder(repo_id=repo_id, folder_path=self.save_pretrained(folder), **options))

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
        """Reads a difference from a file, a folder, or a repository of the Hub.

        Args:
            path_or_repo_id: a file, a folder, or "user/name".
            weight_name: the file's name in it. Defaults to `difference.safetensors`, or to a folder's only safetensors
                file.
            revision, token, cache_dir, local_files_only: as in huggingface_hub.

        Raises:
            FileNotFoundError: if the file, folder or repository does not exist, or has no such file in it.
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


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a file next to `path` to write to, then moves it there, so a crash leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # from the umask; safetensors would make the file private
        yield temporary
        temporary.chmod(mode)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _file_in(folder: Path, weight_name: Optional[str]) -> Path:
    """The difference file of a folder."""
    files = sorted(folder.glob("*.safetensors"))
    if weight_name is None and not (folder / WEIGHT_NAME).is_file():
        if len(files) == 1:
            return files[0]
        raise FileNotFoundError(
            f"`path_or_repo_id`: the folder {str(folder)!r} has {len(files)} safetensors files and none named "
            f"{WEIGHT_NAME!r}; give the file's name as `weight_name`."
        )
    return folder / (weight_name or WEIGHT_NAME)


def _as_matrices(tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> dict[str, torch.Tensor]:
    """Converts other programs' files: a vector becomes one row, and of A1111's tensors only the parameters stay."""
    if metadata.get("format") == FILE_FORMAT:
        # A single tensor is stored under the name that stock pipelines will use.
        return dict(zip([DEFAULT_TOKEN], tensors.values(), strict=True)) if len(tensors) == 1 else tensors
    parameters = {name: rows for name, rows in tensors.items() if name.startswith("string_to_param")}
    tensors = parameters or tensors
    return {n: rows[None] if rows.ndim == 1 and rows.is_floating_point() else rows for n, rows in tensors.items()}


def _written(tokenizer: CLIPTokenizer, ids: list[int]) -> str:
    """Tokens as text; some tokenizer versions leave the end-of-word mark on the last word."""
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
    """A token embedding's table (words, dim), even if sequential offloading has moved its weights away."""
    weight = embedding.weight.detach()
    return embedding(torch.arange(len(weight))).detach() if weight.is_meta else weight


def _sampled(table: torch.Tensor) -> torch.Tensor:
    """Evenly spaced rows of an embedding table, used to recognise it."""
    return table[:: max(1, len(table) // 256)].cpu()


def same_embeddings(own: torch.Tensor, table: torch.Tensor) -> bool:
    """Whether a table (words, dim) is `own` or a fine-tune of it, possibly with words added, in any dtype."""
    if own.shape[1] != table.shape[1] or len(own) > len(table):
        return False
    cosines = F.cosine_similarity(_sampled(own).float(), _sampled(table[: len(own)]).float(), dim=-1)
    return bool(cosines.mean() > SAME_EMBEDDINGS)


@dataclass
class DifferenceInversionPipelineOutput(BaseOutput):
    """
    Attributes:
        images: the answers B', in the queries' order: PIL images, an array or a tensor, by `output_type`.
        difference: the difference that was applied, learned or given, without its scale. The sum if several were
            given; None if words alone changed the query.
    """

    images: Union[list[Image.Image], np.ndarray, torch.Tensor]
    difference: Optional[DifferenceTokens]


# ---------------------------------------------------------------------------------------------- model plumbing


_locks: "weakref.WeakKeyDictionary[torch.nn.Module, threading.RLock]" = weakref.WeakKeyDictionary()
_new_lock = threading.Lock()


def lock_of(model: torch.nn.Module) -> threading.RLock:
    """The lock shared by all pipelines that use this model."""
    with _new_lock:
        return _locks.setdefault(model, threading.RLock())


def taking_turns(method: Callable) -> Callable:
    """Makes a pipeline's method wait while another thread uses any of its models, since calls put hooks on them.

    The same thread may call again from inside a call, as callbacks do. The outermost call caches what stays constant.
    """

    @wraps(method)
    def wait_and_call(self, *arguments, **options):
        with ExitStack() as held:
            for model in sorted(self._models(), key=id):  # the same order everywhere, to avoid deadlock
                held.enter_context(lock_of(model))
            if self._once is None:
                self._once = {}
                held.callback(setattr, self, "_once", None)
            return method(self, *arguments, **options)

    return wait_and_call


@contextmanager
def inserted_rows(embedding: torch.nn.Module, slots: torch.Tensor, rows: torch.Tensor) -> Iterator[None]:
    """While open, the token embedding returns `rows` at `slots` instead of its own rows.

    Gradients reach `rows`; the vocabulary and the model are unchanged.

    Args:
        embedding: the text encoder's input embedding.
        slots: boolean mask (batch, length) of where to insert, with `num_rows` true entries per line.
        rows: what to insert, (batch, num_rows, dim).

    Raises:
        RuntimeError: if the embedding was not called, or its output was not replaced.
    """
    thread, replaced = threading.get_ident(), []

    @torch.compiler.disable
    def replace(module, inputs, output):
        if threading.get_ident() != thread:  # another pipeline with the same text encoder
            return output
        output = output.clone()
        output[slots.to(output.device)] = rows.flatten(0, 1).to(output)
        replaced.append(True)
        return output

    hook = embedding.register_forward_hook(replace)
    try:
        yield
    finally:
        hook.remove()
    if rows.shape[1] and not replaced:
        raise RuntimeError(
            "The text encoder took no difference tokens: it was compiled before they were inserted. Leave it "
            "uncompiled; `torch.compile` helps most for `pipe.unet`."
        )


def until_the_end(input_ids: torch.Tensor, end: int) -> torch.Tensor:
    """Attention mask (batch, length): 1 up to each prompt's first end token, 0 for the padding after it."""
    ends = (input_ids == end).int()
    return (ends.cumsum(1) - ends == 0).int()


@contextmanager
def frozen(*modules: Optional[torch.nn.Module]) -> Iterator[None]:
    """While open, the modules are in evaluation mode and require no gradients; afterwards they are restored."""
    modules = [module for module in modules if module is not None]
    parts = [part for module in modules for part in module.modules()]
    was_training = [part for part in parts if part.training]
    # By module and name: sequential offloading replaces the parameters themselves.
    wanted = [(part, n) for part in parts for n, p in part._parameters.items() if p is not None and p.requires_grad]
    try:
        for module in modules:
            module.eval()
        for part, name in wanted:
            part._parameters[name].requires_grad_(False)
        yield
    finally:
        for part, name in wanted:
            part._parameters[name].requires_grad_(True)
        for part in was_training:
            part.training = True


def first_of(generator: Union[torch.Generator, list[torch.Generator], None]) -> Optional[torch.Generator]:
    """The generator for what is made once for all images."""
    return next(iter(generator), None) if isinstance(generator, list) else generator


def check_number(
    name: str,
    value: Any,
    least: float = -math.inf,
    most: float = math.inf,
    whole: bool = False,
    above: float = -math.inf,
    meaning: str = "",
    optional: bool = False,
) -> None:
    """Raises `ValueError` unless the value is a finite (or whole) number in the range, which the message states."""
    if value is None and optional:
        return
    is_number = isinstance(value, numbers.Integral if whole else numbers.Real) and not isinstance(value, bool)
    if not is_number or not -sys.float_info.max <= value <= sys.float_info.max:
        raise ValueError(f"`{name}` is {value!r}; it must be a {'whole' if whole else 'finite'} number.")
    if least <= value <= most and value > above:
        return
    least = f"above {above}" if math.isfinite(above) else f"at least {least}"
    most = f" and at most {most}" if math.isfinite(most) else ""
    raise ValueError(f"`{name}` is {value}; it must be {least}{most}{meaning and f': {meaning}'}.")


def check_choice(name: str, value: Any, *choices: Any) -> None:
    """Raises `ValueError` unless the value is one of the choices, which the message lists."""
    # Not `in`: comparing an array with a choice gives an array.
    if not any(isinstance(value, type(choice)) and value == choice for choice in choices):
        *others, last = map(repr, choices)
        raise ValueError(f"`{name}` is {value!r}; it is {', '.join(others)} or {last}.")


def check_gradients(name: str, why: str) -> None:
    """Raises `ValueError` in inference mode, where there are no gradients."""
    if torch.is_inference_mode_enabled():
        raise ValueError(f"`{name}` {why}, which `torch.inference_mode` forbids; `torch.no_grad` does not.")


def as_list(value: Any) -> list:
    """One value or several, as a list; batched arrays and tensors are split."""
    items = []
    for part in value if isinstance(value, (list, tuple)) else [value]:
        is_batch = isinstance(part, (np.ndarray, torch.Tensor)) and part.ndim == 4
        items.extend(part if is_batch else [part])  # not +=, which arrays and tensors take as addition
    return items


def flatten_image(image: Any, name: str, background: str = "white") -> Any:
    """Makes PIL images upright RGB, on a background if transparent; makes arrays and tensors float batches of 1.

    Raises:
        TypeError: if the image processor does not take it, or it does not hold real numbers.
        ValueError: if an array or tensor has neither 1 nor 3 channels, or values out of range.
    """
    if isinstance(image, (np.ndarray, torch.Tensor)):
        return _flatten_array(image, name)
    if not isinstance(image, Image.Image):
        raise TypeError(
            f"`{name}` must be a PIL image, an array or a tensor, or a list of them, but is a "
            f"{type(image).__name__}. `diffusers.utils.load_image` opens paths and URLs."
        )
    image = ImageOps.exif_transpose(image)
    if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")  # Pillow has no direct way
        image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
    if image.mode == "F":
        return _flatten_array(np.asarray(image), name)
    if image.mode.startswith("I"):  # 16 bits, which Pillow would clip at 255; "I" may also hold 8
        levels = np.asarray(image.convert("I"))
        highest = 255 if image.mode == "I" and levels.max() <= 255 else 65535
        return _flatten_array((levels / highest).astype(np.float32), name)
    return image.convert("RGB")


def _flatten_array(image: Union[np.ndarray, torch.Tensor], name: str) -> Any:
    """As `flatten_image`, for arrays (channels last) and tensors (channels first).

    Integers are read as 0 to 255, floats as 0 to 1.
    """
    is_array = isinstance(image, np.ndarray)
    if image.ndim == 2:
        image = image[..., None] if is_array else image[None]
    channels = image.shape[-1 if is_array else 0] if image.ndim == 3 and 0 not in image.shape else 0
    transparent = is_array and image.dtype == np.uint8 and channels in (2, 4)
    if not transparent and channels not in (1, 3):
        order = "(height, width, 3)" if is_array else "(3, height, width)"
        raise ValueError(f"`{name}` has the shape {tuple(image.shape)}; a picture of this type must have {order}.")
    if is_array and image.dtype == np.uint8:
        return flatten_image(Image.fromarray(image.squeeze(-1) if channels == 1 else image), name)
    if image.dtype.kind not in "buif" if is_array else image.is_complex():
        raise TypeError(f"`{name}` holds {image.dtype}; a picture must hold whole or floating-point numbers.")
    is_floating = image.dtype.kind == "f" if is_array else image.is_floating_point()
    scale = 1 if is_floating or image.dtype in (np.bool_, torch.bool) else 255
    values = image.astype(np.float32) if is_array else image.float()
    lowest, highest = float(values.min()), float(values.max())
    # diffusers still accepts floats from -1 to 1, with a warning.
    if not (lowest >= (-1.01 if is_floating else 0) and highest <= (1.01 if is_floating else scale)):
        kind = "floating-point pictures" if is_floating else "pictures in whole numbers"
        raise ValueError(f"`{name}` has values from {lowest:g} to {highest:g}; {kind} range from 0 to {scale}.")
    values = np.repeat(values, 3 // channels, axis=-1) if is_array else values.expand(3, -1, -1)
    return values[None] / scale  # [1, height, width, 3] or [1, 3, height, width]


def as_pictures(images: Any, name: str) -> list:
    """One image or several, of any kind, as a list of `flatten_image` results.

    Raises:
        ValueError: if the list is empty, or an image does not have the shape of a picture.
        TypeError: if an item is not an image.
    """
    pictures = [flatten_image(image, name) for image in as_list(images)]
    if not pictures:
        raise ValueError(f"`{name}` is an empty list; give at least one image.")
    return pictures


def as_masks(masks: Any, count: int) -> list:
    """One mask or several, as a list; a stack (masks, height, width) with one for each image is split."""
    stacked = isinstance(masks, (np.ndarray, torch.Tensor)) and masks.ndim == 3 and masks.shape[-1] not in (1, 3, 4)
    if stacked and (masks.shape[0] == count or masks.shape[0] not in (1, 3, 4)):
        return list(masks)
    return as_list(masks)


def flatten_mask(mask: Any) -> Any:
    """As `flatten_image`, for masks: transparency becomes black, and matrices (height, width) are accepted."""
    if isinstance(mask, Image.Image) and mask.mode in ("F", "I"):
        mask = np.asarray(mask)
    if not isinstance(mask, (np.ndarray, torch.Tensor)):
        return flatten_image(mask, "mask_image", background="black")
    mask = torch.as_tensor(mask.copy() if isinstance(mask, np.ndarray) else mask)  # arrays from PIL are read-only
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
    """A text encoder, its tokenizer, the CLIP whose text tower it is, and the name of its tokens in a file."""

    token: str
    tokenizer: CLIPTokenizer
    model: torch.nn.Module
    clip: Optional[CLIPModel]
    clip_name: str

    @property
    def table(self) -> torch.Tensor:
        """Its token embeddings, (words, width), wherever offloading has put them."""
        return embedding_table(self.model.get_input_embeddings())

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Token embeddings (..., width) in float32, on the device of the ids (...)."""
        table = self.table
        return table[ids.to(table.device)].to(ids.device, torch.float32)

    @property
    def width(self) -> int:
        """Width of its token embeddings, and so of its part of a difference."""
        return self.model.config.hidden_size


@dataclass
class _Condition:
    """Conditioning for the UNet: prompt embeddings (batch, length, dim), and SDXL's pooled ones (batch, dim)."""

    prompt_embeds: Optional[torch.Tensor]
    pooled_prompt_embeds: Optional[torch.Tensor] = None

    def each(self, change: Callable[[torch.Tensor], torch.Tensor]) -> "_Condition":
        """Applies the same change to each of its tensors."""
        return _Condition(*(None if embeds is None else change(embeds) for embeds in vars(self).values()))

    def repeat(self, count: int) -> "_Condition":
        """Each prompt `count` times in a row."""
        # A copy, since `torch.compile` compiles anew for a view of another shape.
        return self.each(lambda embeds: embeds.repeat_interleave(count, dim=0).clone())

    def followed_by(self, other: "_Condition") -> "_Condition":
        """Both batches, concatenated."""
        others = iter(vars(other).values())
        return self.each(lambda embeds: torch.cat([embeds, next(others)]))


@dataclass
class _Guidance:
    """The conditions whose predictions are mixed, and their shares. Each stage applies one more change than the last.

    Attributes:
        stages: the prompts with no change, with the first, and so on up to all of them.
        shares: weight of each stage; their sum is 1.
        own: describes the query.
        baseline: what guidance leads away from.
    """

    stages: list[_Condition]
    shares: list[float]
    own: _Condition
    baseline: _Condition

    def repeat(self, count: int) -> "_Guidance":
        """Each prompt `count` times in a row."""
        repeated = {id(c): c.repeat(count) for c in (*self.stages, self.own, self.baseline)}  # keeps identity
        stages = [repeated[id(stage)] for stage in self.stages]
        return _Guidance(stages, self.shares, repeated[id(self.own)], repeated[id(self.baseline)])

    @property
    def changes_nothing(self) -> bool:
        """Whether there is nothing but the query's own prompt."""
        return len(self.stages) == 1 and self.stages[0] is self.own is self.baseline

    @property
    def lies_between(self) -> bool:
        """Whether several stages have a share, and none is negative."""
        return max(self.shares) < 1 and min(self.shares) >= 0

    def apart(self) -> list["_Guidance"]:
        """Each stage that has a share, as a guidance of its own."""
        parts = zip(self.shares, self.stages, strict=True)
        return [replace(self, stages=[stage], shares=[1.0]) for share, stage in parts if share]

    def weights(self, guidance_scale: float) -> list[tuple[float, _Condition]]:
        """The weights and conditions to mix at a guidance scale, without those of weight 0."""
        mixed = [(guidance_scale * share, stage) for share, stage in zip(self.shares, self.stages, strict=True)]
        if self.baseline is self.stages[0]:  # merged, since a second UNet call would only add rounding
            mixed[0] = (mixed[0][0] + 1 - guidance_scale, self.baseline)
        else:
            mixed.append((1 - guidance_scale, self.baseline))
        return [(weight, condition) for weight, condition in mixed if weight != 0]


@dataclass(frozen=True)
class _Way:
    """How one difference is applied: its rows (num_tokens, dim), the phrases of the prompt that they replace, and how
    far to go, at least 0."""

    rows: torch.Tensor
    phrases: list[str]
    degree: float


@dataclass(frozen=True)
class Pair:
    """Pictures before and after a change, as `as_pictures` returns them, with their prompts and, once encoded, their
    latents (1, channels, height / factor, width / factor)."""

    before: Any
    after: Any
    before_prompt: str
    after_prompt: str
    before_latents: Optional[torch.Tensor] = None
    after_latents: Optional[torch.Tensor] = None

    @property
    def prompts(self) -> tuple[str, str]:
        """The prompts of the picture before and the one after."""
        return self.before_prompt, self.after_prompt

    @property
    def latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Before and after, (1, channels, height / factor, width / factor) each."""
        return self.before_latents, self.after_latents

    @property
    def weights(self) -> torch.Tensor:
        """How much each place counts when the two are compared, (1, 1, height / factor, width / factor)."""
        return change_weights(*self.latents)


@dataclass
class _Draw:
    """Noises (samples, 4, h, w) and time steps (samples,), the same for both pictures of a pair.

    `references` (2, samples) are the UNet's errors on A and A' without tokens, for losses that compare with them.
    """

    noise: torch.Tensor
    timesteps: torch.Tensor
    references: Optional[torch.Tensor] = None

    def part(self, indices: torch.Tensor) -> "_Draw":
        """A subset of the samples."""
        references = None if self.references is None else self.references[:, indices]
        return _Draw(self.noise[indices], self.timesteps[indices], references)


@dataclass
class _Start:
    """Where denoising starts, and what guides it from there.

    `path` holds the query's own latents before each step and after the last, (steps + 1, batch, ...), if there is a
    query. `step_noises` (steps, batch, ...), if not None, are fixed: with them, denoising under its own prompt follows
    the path.
    """

    latents: torch.Tensor
    scheduler: Any
    timesteps: torch.Tensor
    path: Optional[torch.Tensor] = None
    step_noises: Optional[torch.Tensor] = None


@dataclass(frozen=True, kw_only=True)
class LearningConfig:
    """How difference tokens are learned. None stands for the value in `FROM_WORDS` if they start as words, else in
    `FROM_ROWS`.

    Args:
        num_tokens (`int`, *optional*, defaults to 4): rows to learn, from 1 to the text encoder's window minus 2. A
            maximum for tokens that start as words: fewer may be found.
        num_optimization_steps (`int`, *optional*): optimizer steps; 0 keeps the initial tokens. Defaults to 8 for
            tokens that start as words, and to 60 for others.
        learning_rate (`float`, *optional*): Adam's peak rate; a cosine schedule takes it to zero. Defaults to 0.003
            for tokens that start as words, and to 0.02 for others.
        alpha (`float`, *optional*, defaults to 0): 0 uses the images' delta, 1 the captions' (equation 5). The paper
            uses 0.8, which was no better here.
        lambda_clip (`float`, *optional*, defaults to 0.5): weight of the CLIP loss (equation 10). At 0 no CLIP is
            needed. The paper uses 0.01, at which the CLIP loss had hardly any effect here.
        lambda_tc (`float`, *optional*, defaults to 6): weight of the token consistency loss (equation 10), or of the
            contrast in its place.
        lambda_before (`float`, *optional*, defaults to 0): weight of the reverse direction in token consistency:
            negated tokens lead from A' to A (equation 8). The paper uses 1; 0 halves the UNet's work per step.
        lambda_contrast (`float`, *optional*, defaults to 1): with `objective="contrast"`, the penalty if the tokens
            help A as well. At 1, what A and A' share earns nothing. Ours, not the paper's.
        objective (`str`, *optional*): the loss that tokens are learned with. `"contrast"`, ours and the default for
            tokens that start as words: under the prompt that A and A' share, they must help A' and not A where these
            differ. `"consistency"`, the paper's equations 7 to 9 and the default for others: under A's prompt, they
            must help A'. This also rewards whatever the prompt leaves out; see `complete_prompts`.
        init (`str`, *optional*, defaults to `"words"`): how the tokens start. `"words"`, ours: as words that hold for
            A' and not for A, as judged by the UNet. Candidates come from the prompts and, if there is a CLIP, from its
            whole vocabulary; a word that only one caption happens to mention is rejected. Lost words are stored in the
            metadata as `lost_phrases`. If no word is found, rows are random. `"random"`: with the spread of the
            vocabulary's rows. `"zeros"`: as in the paper, section 4.4; this worked less well here.
        projection (`str`, *optional*, defaults to `"soft"`): `"soft"` tokens may be any rows. `"hard"` tokens are
            whole words of the vocabulary at every forward pass, so that `difference.to_text(pipe.tokenizer)` is the
            difference as plain text. If `init` finds words, they are the only tokens. Words can hardly say that
            something has gone.
        num_samples_per_step (`int`, *optional*): (noise, time step) pairs per optimizer step, for each direction of
            the loss. Defaults to 2 for tokens that start as words, and to 4 for others.
        complete_prompts (`bool`, *optional*, defaults to `True`): if the tokens do not start as words, add words to
            the prompts of A and A' for what they leave out, as a call of the pipeline does for a query; otherwise the
            tokens would have to say it. Skipped without a CLIP. Ours, in place of the paper's PEZ prompts.

    Raises:
        ValueError: if a value is out of range; the message names it.
    """

    num_tokens: int = 4
    num_optimization_steps: Optional[int] = None
    learning_rate: Optional[float] = None
    alpha: float = 0.0
    lambda_clip: float = 0.5
    lambda_tc: float = 6.0
    lambda_before: float = 0.0
    lambda_contrast: float = 1.0
    objective: Optional[str] = None
    init: str = "words"
    projection: str = "soft"
    num_samples_per_step: Optional[int] = None
    complete_prompts: bool = True

    def __post_init__(self) -> None:
        check_number("num_tokens", self.num_tokens, 1, whole=True)
        check_number("num_optimization_steps", self.num_optimization_steps, 0, whole=True, optional=True)
        check_number("num_samples_per_step", self.num_samples_per_step, 1, whole=True, optional=True)
        check_number("alpha", self.alpha, 0, 1, meaning="from the images' delta to the captions'")
        for name in ("lambda_clip", "lambda_tc", "lambda_before", "lambda_contrast"):
            check_number(name, getattr(self, name), 0)
        if self.lambda_clip + self.lambda_tc == 0:
            raise ValueError("`lambda_clip` and `lambda_tc` are both 0, so nothing would be learned; set one higher.")
        check_number("learning_rate", self.learning_rate, above=0, optional=True)
        check_choice("objective", self.objective, "contrast", "consistency", None)
        check_choice("init", self.init, "words", "random", "zeros")
        check_choice("projection", self.projection, "soft", "hard")
        check_choice("complete_prompts", self.complete_prompts, True, False)

    def for_start(self, from_words: bool) -> "LearningConfig":
        """Fills in the settings that depend on how the tokens start."""
        defaults = FROM_WORDS if from_words else FROM_ROWS
        return replace(self, **{name: value for name, value in defaults.items() if getattr(self, name) is None})


class Learner:
    """Optimises difference tokens by equation 10, and keeps the best of those that were evaluated.

    The loss of one step depends more on the noises and time steps it drew than on the tokens, so tokens are evaluated
    on a fixed set of them. The learner reaches the models only through these functions:

    - `predict(latents, prompts, rows, draw)`: the UNet's predictions for latents (images, channels, height, width),
      each with its prompt and rows (num_tokens, dim), and targets, both (images, samples, channels, height, width).
      A single prompt, with its rows, is for all of them.
    - `clip_features(tokens)`: each CLIP's text embedding (dim,) of the tokens alone.
    - `draw(latents, samples, generator, jitter, stretch)`: noises and time steps for such latents.
    - `backward(loss)`: stores the loss's gradient in the tokens.

    Args:
        tokens: the initial tokens, (num_tokens, dim), in float32.
        pairs: what to learn from, with their latents.
        deltas: the target direction (dim,) of each CLIP's features; empty if the CLIP loss has no weight.
        config: the settings, none of them None.
        vocabulary: the allowed words, if tokens must be words.
        gradient_scale: factor applied to losses before backward, and removed from the gradients after it.
    """

    def __init__(
        self,
        tokens: torch.Tensor,
        pairs: list[Pair],
        deltas: list[torch.Tensor],
        config: LearningConfig,
        *,
        predict: Callable,
        clip_features: Callable,
        draw: Callable,
        backward: Callable,
        generator: Optional[torch.Generator] = None,
        vocabulary: Optional[Vocabulary] = None,
        gradient_scale: float = 1.0,
    ):
        self.pairs, self.deltas, self.config, self.vocabulary = pairs, deltas, config, vocabulary
        self.predict, self.clip_features, self.draw, self.backward = predict, clip_features, draw, backward
        self.generator, self.gradient_scale = generator, gradient_scale
        self.tokens = tokens.requires_grad_(True)
        self.optimizer = torch.optim.Adam([self.tokens], lr=config.learning_rate)
        num_steps = max(1, config.num_optimization_steps)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, num_steps)
        self.candidates = [(math.inf, tokens.detach().clone())]  # with their losses on the probes
        self.probes: list[_Draw] = []
        self.step, self.num_overflows = 0, 0

    def prepare(self, state: Optional[dict[str, Any]] = None) -> None:
        """Resumes from a `state_dict`, or draws the noises and time steps on which tokens are evaluated."""
        if state is not None:
            self.load_state_dict(state)
        else:
            self.probes = [self._probe(pair) for pair in self.pairs]

    def take_step(self) -> dict[str, float]:
        """Takes a step, unless the loss or its gradient is not finite; returns the loss and its parts."""
        values = self._backward(*self._next_samples())
        if math.isfinite(values["loss"]):
            self.step += 1
            self.tokens.grad /= self.gradient_scale
            if self.tokens.grad.isfinite().all():
                self.optimizer.step()
                self.schedule.step()
            else:
                self.num_overflows += 1
        self.optimizer.zero_grad()
        return values

    @property
    def is_to_judge(self) -> bool:
        """Whether to evaluate now: at the end, and without a contrast also after each quarter of the steps."""
        num_steps = self.config.num_optimization_steps
        every = num_steps if self.config.objective == "contrast" else num_steps // 4
        return self.step % max(1, every) == 0 or self.step == num_steps

    def judge(self) -> None:
        """Evaluates the current tokens and adds them to the candidates for the best."""
        tokens = self.tokens.detach().clone()
        judged = zip(self.pairs, self.probes, strict=True)
        losses = [float(self.losses(tokens, pair, probe)["loss"]) for pair, probe in judged]
        self.candidates.append((sum(losses) / len(losses), tokens))

    def best(self) -> tuple[torch.Tensor, float]:
        """The tokens with the lowest loss on the fixed noises and time steps, and that loss."""
        loss, tokens = min(self.candidates, key=lambda candidate: candidate[0])
        return tokens, loss

    def used_tokens(self, tokens: torch.Tensor) -> torch.Tensor:
        """The tokens as the models get them: projected to words, if they must be words."""
        return tokens if self.vocabulary is None else self.vocabulary.project(tokens)[0]

    def losses(self, tokens: torch.Tensor, pair: Pair, draw: _Draw) -> dict[str, torch.Tensor]:
        """Equation 10 and its two parts, the second of which may be the contrast; a part of weight 0 is skipped."""
        tokens, config, losses = self.used_tokens(tokens), self.config, {"loss": 0.0}
        if config.lambda_clip > 0:
            pointed = zip(self.clip_features(tokens), self.deltas, strict=True)
            losses["clip_loss"] = torch.stack([clip_loss(features, delta) for features, delta in pointed]).mean()
            losses["loss"] = losses["loss"] + config.lambda_clip * losses["clip_loss"]
        if config.lambda_tc > 0 and config.objective == "contrast":
            losses["contrast_loss"] = self._contrast_loss(tokens, pair, draw)
            losses["loss"] = losses["loss"] + config.lambda_tc * losses["contrast_loss"]
        elif config.lambda_tc > 0:
            losses["token_consistency_loss"] = self._token_consistency_loss(tokens, pair, draw)
            losses["loss"] = losses["loss"] + config.lambda_tc * losses["token_consistency_loss"]
        return losses

    def _contrast_loss(self, tokens: torch.Tensor, pair: Pair, draw: _Draw) -> torch.Tensor:
        gains = 1 - self._contrast_errors(tokens, pair, draw) / draw.references
        return contrast_loss(gains[1], gains[0], self.config.lambda_contrast)

    def _contrast_errors(self, tokens: torch.Tensor, pair: Pair, draw: _Draw) -> torch.Tensor:
        """The UNet's errors on A and A' (2, samples), weighted by change, under the same prompt and tokens."""
        prompt = shared_prompt(*pair.prompts)
        prediction, target = self.predict(torch.cat(pair.latents), [prompt], tokens[None], draw)
        return weighted_errors(prediction, target, pair.weights)

    def _token_consistency_loss(self, tokens: torch.Tensor, pair: Pair, draw: _Draw) -> torch.Tensor:
        """Equations 7 to 9. The prompts are crossed: A's prompt with +D draws A', and that of A' with -D draws A."""
        prompts, latents, rows = [pair.before_prompt], pair.after_latents, tokens[None]
        if self.config.lambda_before > 0:
            prompts = [*prompts, pair.after_prompt]
            latents = torch.cat([latents, pair.before_latents])
            rows = torch.cat([rows, -rows])
        return token_consistency_loss(*self.predict(latents, prompts, rows, draw), self.config.lambda_before)

    def _probe(self, pair: Pair) -> _Draw:
        """Fixed noises and time steps on which tokens are evaluated, and for the contrast also learned."""
        if self.config.objective != "contrast":
            return self.draw(pair.before_latents, NUM_PROBE_SAMPLES, self.generator, jitter=False)
        draw = self.draw(pair.before_latents, NUM_PROBE_SAMPLES, self.generator, False, CONTRAST_TIMESTEPS)
        return replace(draw, references=self._contrast_errors(self.tokens.detach()[:0], pair, draw))

    def _next_samples(self) -> tuple[Pair, _Draw]:
        """The next pair in turn, with this step's noises and time steps."""
        turn, which = divmod(self.step, len(self.pairs))
        pair, probe, samples = self.pairs[which], self.probes[which], self.config.num_samples_per_step
        if self.config.objective != "contrast":
            return pair, self.draw(pair.before_latents, samples, self.generator)
        # Taken from the fixed samples, whose references are known.
        return pair, probe.part(self.samples_of_turn(turn, samples, len(probe.timesteps)))

    @staticmethod
    def samples_of_turn(turn: int, samples: int, total: int) -> torch.Tensor:
        """Indices of one step's samples: far apart in time, and shifted at each turn so that all are used."""
        samples = min(samples, total)
        return ((torch.arange(samples) * total // samples + turn) % total).sort().values

    def _backward(self, pair: Pair, draw: _Draw) -> dict[str, float]:
        """Stores the gradient of equation 10, scaled, in `tokens.grad`; returns the loss and its parts.

        Samples go through the UNet a few at a time, which gives the same gradient with less memory.
        """
        config, total, values = self.config, len(draw.timesteps), {}
        both_pictures = config.objective == "contrast" or config.lambda_before > 0
        several = max(1, MOST_LEARNED_AT_ONCE // (2 if both_pictures else 1))
        for indices in torch.arange(total, device="cpu").split(several):
            share = len(indices) / total
            with torch.enable_grad():
                losses = self.losses(self.tokens, pair, draw.part(indices))
                self.backward(losses["loss"] * share * self.gradient_scale)
            for name, value in losses.items():
                values[name] = values.get(name, 0.0) + share * float(value.detach())
        return values

    def state_dict(self) -> dict[str, Any]:
        """All that the next step depends on, as plain values that `torch.load(..., weights_only=True)` can read."""
        return {
            "tokens": self.tokens.detach(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "generator": None if self.generator is None else self.generator.get_state(),
            "candidates": self.candidates,
            "probes": [vars(probe) for probe in self.probes],
            "step": self.step,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores the state of learning, and the generator, from a `state_dict`."""
        device = self.tokens.device
        self.tokens.detach().copy_(state["tokens"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.generator is not None:
            self.generator.set_state(state["generator"])
        self.candidates = [(loss, tokens.to(device)) for loss, tokens in state["candidates"]]
        self.probes = [
            _Draw(**{name: None if value is None else value.to(device) for name, value in probe.items()})
            for probe in state["probes"]
        ]
        self.step = state["step"]


@dataclass
class _Checkpoint:
    """A file with the state of learning, written every few steps, from which the same call can resume.

    Attributes:
        path: of the file.
        every: optimizer steps between writes.
        call: a hash of the data and settings, which identifies the call.
        state: what an earlier call wrote; empty if there was none.
    """

    path: Path
    every: int
    call: str
    state: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not self.path.is_file():
            return
        try:
            self.state = torch.load(self.path, map_location="cpu", weights_only=True)
        except Exception as error:  # torch has no exception type of its own for unreadable files
            raise ValueError(
                f"`checkpoint`: {str(self.path)!r} is no checkpoint of learning, or is damaged. Give another path."
            ) from error
        if not isinstance(self.state, dict) or self.state.get("call") != self.call or "learner" not in self.state:
            raise ValueError(
                f"`checkpoint`: {str(self.path)!r} is of another call, with other pictures, prompts, settings, model "
                "or seed, or of another version of this file. Give another path, or delete it."
            )

    def write(self, learner: Learner) -> None:
        """Replaces the contents of the file."""
        with replacing(self.path) as temporary:
            torch.save({**self.state, "call": self.call, "learner": learner.state_dict()}, temporary)


# ------------------------------------------------------------------------------------------------- the pipeline


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
    [`load_textual_inversion`] and [`from_single_file`]. They are active during learning too.

    All components are required, None if absent: diffusers' loaders take an argument with a default for a setting, and
    prefer the folder's component to the one they are given.

    Args:
        vae ([`AutoencoderKL`]): encodes images to latents, and decodes them.
        text_encoder ([`~transformers.CLIPTextModel`]): the base model's text encoder.
        tokenizer ([`~transformers.CLIPTokenizer`]): its tokenizer.
        unet ([`UNet2DConditionModel`]): denoises latents; predicts noise or velocity.
        scheduler ([`SchedulerMixin`]): used to draw from noise. Queries are inverted and redrawn by DDIM, with its
            configuration.
        clip ([`~transformers.CLIPModel`], *optional*): the full CLIP of the text encoder, for learning with a CLIP
            loss. Not needed to apply a difference.
        clip_processor ([`~transformers.CLIPProcessor`], *optional*): prepares images for `clip` and `clip_2`.
        captioner ([`~transformers.BlipForConditionalGeneration`], *optional*): writes prompts that are not given.
        captioner_processor ([`~transformers.BlipProcessor`], *optional*): prepares images for `captioner`.
        text_encoder_2 ([`~transformers.CLIPTextModelWithProjection`], *optional*): SDXL's second text encoder.
        tokenizer_2 ([`~transformers.CLIPTokenizer`], *optional*): its tokenizer.
        clip_2 ([`~transformers.CLIPModel`], *optional*): its full CLIP. SDXL can learn with `clip`, `clip_2` or both.
        force_zeros_for_empty_prompt (`bool`): SDXL's: text to image without a `negative_prompt` is guided away from
            zeros.
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
    _callback_tensor_inputs = ["latents", "prompt_embeds", "negative_prompt_embeds"]
    _once: Optional[dict[str, Any]] = None  # cache of the running call; None between calls

    def __init__(
        self,
        vae: AutoencoderKL,
        text_encoder: CLIPTextModel,
        tokenizer: CLIPTokenizer,
        unet: UNet2DConditionModel,
        scheduler: KarrasDiffusionSchedulers,
        *,
        clip: Optional[CLIPModel],
        clip_processor,
        captioner,
        captioner_processor,
        text_encoder_2: Optional[CLIPTextModelWithProjection],
        tokenizer_2: Optional[CLIPTokenizer],
        clip_2: Optional[CLIPModel],
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
        self.vae_scale_factor = 2 ** (len(vae.config.block_out_channels) - 1) if vae is not None else 8
        self.image_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)
        self.mask_processor = VaeImageProcessor(
            vae_scale_factor=self.vae_scale_factor, do_normalize=False, do_binarize=True, do_convert_grayscale=True
        )
        if text_encoder_2 is not None:
            pooled = ["pooled_prompt_embeds", "negative_pooled_prompt_embeds"]
            self._callback_tensor_inputs = [*self._callback_tensor_inputs, *pooled]
        self._interrupt, self._stopped = False, False
        # Learned by a call that did not finish: Ctrl-C stopped it while learning, or anything while denoising.
        self.interrupted_difference: Optional[DifferenceTokens] = None

    @property
    def guidance_scale(self) -> float:
        """How far the running call goes from the baseline's prediction to the changed one, for callbacks."""
        return self._guidance_scale

    @property
    def num_timesteps(self) -> int:
        """Denoising steps of the running call; a `strength` below 1 makes them fewer than `num_inference_steps`."""
        return self._num_timesteps

    @property
    def interrupt(self) -> bool:
        """True once a callback has set `pipe._interrupt`; the running loop then ends after its step."""
        return self._interrupt

    @property
    def _encoders(self) -> list[_Encoder]:
        """The text encoders. SDXL has two, whose tokens are held side by side in one matrix."""
        first = (self.tokenizer, self.text_encoder, self.clip, "clip")
        if self.text_encoder_2 is None:
            return [_Encoder(DEFAULT_TOKEN, *first)]
        second = (self.tokenizer_2, self.text_encoder_2, self.clip_2, "clip_2")
        return [_Encoder(token, *parts) for token, parts in zip(TWO_ENCODER_TOKENS, (first, second), strict=True)]

    def _found_once(self, name: str, find: Callable[[], Any]) -> Any:
        """The result of `find`, cached during a call."""
        if self._once is None:
            return find()
        if name not in self._once:
            self._once[name] = find()
        return self._once[name]

    @property
    def _execution_device(self) -> torch.device:
        """Diffusers' own, cached: its search of all modules took a twentieth of an analogy on Storybook."""
        return self._found_once("device", partial(DiffusionPipeline._execution_device.fget, self))

    @property
    def _training_schedule(self) -> DDPMScheduler:
        """How noise was added in the model's training; the user's scheduler may follow another convention."""
        return self._found_once("schedule", partial(self._scheduler_like, DDPMScheduler))

    @property
    def _unet_dtype(self) -> torch.dtype:
        """The UNet's dtype, cached: diffusers looks through all of a model's modules for it."""
        return self._found_once("dtype", lambda: self.unet.dtype)

    def _models(self) -> list[torch.nn.Module]:
        return [part for part in self.components.values() if isinstance(part, torch.nn.Module)]

    def _bar(self, name: str, iterable: Optional[Iterable] = None, total: Optional[float] = None) -> Any:
        """Diffusers' progress bar with a name, which `set_progress_bar_config(desc=...)` overrides."""
        config = dict(getattr(self, "_progress_bar_config", {}))
        self.set_progress_bar_config(**{"desc": name} | config)
        try:
            return self.progress_bar(iterable, total)
        finally:
            self.set_progress_bar_config(**config)

    def _make_room(self, *models: torch.nn.Module) -> None:
        """Under `enable_model_cpu_offload`, keeps only these models on the device.

        Diffusers' hooks act only on `forward`, once and in a fixed order. Here models alternate, and some use
        other methods.
        """
        hooks = getattr(self, "_all_hooks", [])
        for hook in hooks:
            if not any(hook.model is model for model in models):
                hook.offload()
        for hook in hooks:
            if any(hook.model is model for model in models):
                hook.model.to(self._execution_device)

    def enable_group_offload(self, *arguments, **options) -> None:
        """Diffusers' own, but by blocks CLIP and the captioner stay on the device: only a model's `forward` fetches
        its blocks, and these models are called by other methods."""
        bound = inspect.signature(super().enable_group_offload).bind(*arguments, **options)
        bound.apply_defaults()
        given = bound.arguments
        if given["offload_type"] == "block_level":
            given["exclude_modules"] = [*as_list(given["exclude_modules"] or []), "clip", "clip_2", "captioner"]
        super().enable_group_offload(**given)

    def _weights_kept(self) -> AbstractContextManager:
        """While open, backward uses the weights that forward saw, although diffusers' hooks for group offloading and
        layerwise casting replace them in between."""
        if any(hasattr(module, "_diffusers_hook") for model in self._models() for module in model.modules()):
            return torch.autograd.graph.saved_tensors_hooks(torch.Tensor.detach, lambda kept: kept)
        return nullcontext()

    def _without_graph(self, function: Callable, *inputs: Any) -> Any:
        """Calls a function whose models may have left the device by the backward pass: under CPU offload it is
        recomputed."""
        if torch.is_grad_enabled() and getattr(self, "_all_hooks", []):
            return checkpoint(function, *inputs, use_reentrant=False)
        return function(*inputs)

    # ------------------------------------------------------------------------------------------------- checking

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **options) -> "DifferenceInversionPipeline":
        """Builds this pipeline from another one's components, which both then share, and from those in `options`.

        Unlike diffusers' own, it keeps the dtype of the weights unless a `dtype` is given.
        `DiffusionPipeline.from_pipe(..., custom_pipeline=...)` does not call this method, and requires every optional
        component, None if absent.
        """
        dtype = options.pop("dtype", options.pop("torch_dtype", None))
        names = cls._get_signature_keys(cls)[0]
        parts = {name: part for name, part in pipeline.components.items() if name in names} | options
        missing = sorted(names - parts.keys() - {*cls._optional_components})
        if missing:
            raise ValueError(
                f"`pipeline` is a {type(pipeline).__name__} and has no {missing}; give them too, by name."
            )
        settings = {name.removeprefix("_"): value for name, value in pipeline.config.items()}
        if "force_zeros_for_empty_prompt" in settings:
            parts.setdefault("force_zeros_for_empty_prompt", settings["force_zeros_for_empty_prompt"])
        built = cls(**dict.fromkeys(cls._optional_components) | parts)
        # As in diffusers, settings that are not ours are kept under names with a leading "_", for the way back.
        built.register_to_config(**{f"_{name}": value for name, value in settings.items() if name not in built.config})
        if dtype is not None:
            built.to(dtype=dtype)
        if getattr(pipeline, "_all_hooks", []):
            built.enable_model_cpu_offload(device=pipeline._offload_device)
        elif not isinstance(pipeline.hf_device_map, dict):  # None, or the name of one device
            for part in options.values():  # these may still be where they were loaded
                if isinstance(part, torch.nn.Module) and getattr(part, "hf_device_map", None) is None:
                    part.to(pipeline._execution_device)
        return built

    @classmethod
    def load_lora_into_text_encoder(cls, state_dict, network_alphas, text_encoder, **options) -> None:
        """Diffusers' own, which is also called for a second text encoder that does not exist."""
        if text_encoder is not None:
            super().load_lora_into_text_encoder(state_dict, network_alphas, text_encoder, **options)

    def _check_model(self) -> None:
        """Raises `ValueError` for a base model that this pipeline does not support."""
        for name in ("unet", "vae"):
            if getattr(self, name) is None:
                raise ValueError(f"`{name}` is missing: without it, only prompts can be encoded.")
        channels, latent_channels = self.unet.config.in_channels, self.vae.config.latent_channels
        if channels != latent_channels:
            raise ValueError(
                f"`unet` has {channels} input channels for latents of {latent_channels}: it is made for inpainting or "
                "instructions. Load an ordinary Stable Diffusion."
            )
        if self.text_encoder is None:
            raise ValueError("`text_encoder` is missing. If this is SDXL's refiner, load its base model instead.")
        is_xl = self.unet.config.get("addition_embed_type") == "text_time"
        if is_xl and None in (self.text_encoder_2, self.tokenizer_2):
            raise ValueError("`text_encoder_2` or `tokenizer_2` is missing: SDXL's UNet needs both text encoders.")
        self._check_unet()
        self._check_tokenizers()
        prediction_type = self.scheduler.config.get("prediction_type", "epsilon")
        known = prediction_type in ("epsilon", "v_prediction", "sample")
        if "beta_schedule" not in self.scheduler.config or not known:
            raise ValueError(
                f"`scheduler` is {type(self.scheduler).__name__} with prediction_type {prediction_type!r}: this "
                "pipeline is for models that were trained to predict noise, velocity or latents on a schedule of "
                "betas, as Stable Diffusion 1.x, 2.x and SDXL were."
            )

    def _check_unet(self) -> None:
        """Raises `ValueError` for a UNet that needs more conditioning than a prompt, or prompts of another width."""
        if isinstance(self.unet, ModelMixin) and not isinstance(self.unet, UNet2DConditionModel):
            raise ValueError(f"`unet` is a {type(self.unet).__name__}, and a UNet2DConditionModel is what to load.")
        config, width = self.unet.config, sum(encoder.width for encoder in self._encoders)
        upscaler = "it takes a class or a noise level, as upscalers do"
        adapter = (
            "it also takes images. Call `unload_ip_adapter()` of the pipeline that loaded an IP-Adapter, if one did"
        )
        known = {  # the values that are admitted, and what others mean
            "out_channels": ((config.in_channels,), "it predicts more than noise"),
            "time_cond_proj_dim": ((None,), "it was distilled, and takes a guidance scale"),
            "class_embed_type": ((None,), upscaler),
            "num_class_embeds": ((None,), upscaler),
            "addition_embed_type": ((None, "text_time"), "neither Stable Diffusion nor SDXL has that"),
            "encoder_hid_dim_type": ((None, "text_proj"), adapter),
        }
        for name, (admitted, meaning) in known.items():
            if config[name] not in admitted:
                raise ValueError(f"`unet` has {name} {config[name]!r}: {meaning}. Load an ordinary Stable Diffusion.")
        expected = config.encoder_hid_dim or config.cross_attention_dim
        if any(dim != width for dim in (expected if isinstance(expected, (list, tuple)) else [expected])):
            raise ValueError(f"`unet` attends to prompts of width {expected}, and the text encoders give {width}.")
        if config.addition_embed_type == "text_time":
            expected = config.projection_class_embeddings_input_dim
            given = 6 * config.addition_time_embed_dim + self.text_encoder_2.config.projection_dim
            if given != expected:
                raise ValueError(
                    f"`unet` is told of a picture in {expected} numbers, and SDXL's base model in {given}: its "
                    "refiner has fewer. Load the base model."
                )

    def _check_tokenizers(self) -> None:
        """Raises `ValueError` for a tokenizer whose window exceeds its text encoder's, or that cannot pad."""
        for encoder, name in zip(self._encoders, ("tokenizer", "tokenizer_2"), strict=False):
            most = encoder.model.config.max_position_embeddings
            if encoder.tokenizer.model_max_length > most:
                raise ValueError(
                    f"`{name}` has model_max_length {encoder.tokenizer.model_max_length}, but its text encoder has "
                    f"only {most} positions. Set `pipe.{name}.model_max_length = {most}`."
                )
            if encoder.tokenizer.pad_token_id is None:
                raise ValueError(f"`{name}` has no pad_token. Set `pipe.{name}.pad_token`, usually to its eos_token.")

    def check_learning_inputs(
        self,
        befores: list,
        afters: list,
        config: LearningConfig,
        *,
        before_prompt=None,
        after_prompt=None,
        height: Optional[int] = None,
        width: Optional[int] = None,
    ) -> None:
        """Raises `ValueError` or `TypeError`, naming the argument, if learning cannot use it.

        `befores` and `afters` are results of `as_pictures`.
        """
        self._check_model()
        check_gradients("before", "and `after` are learned from by gradients")
        if not befores or not afters:
            missing = "after" if befores else "before"
            raise ValueError(
                f"`{missing}` is missing: a difference is learned from a pair of images, `before` and "
                "`after`. To apply a learned one, give `difference`."
            )
        if len(befores) != len(afters):
            raise ValueError(f"`before` has {len(befores)} images and `after` has {len(afters)}; give pairs.")
        for name, images in (("before", befores), ("after", afters)):
            for image in images:
                self._common_size([image], name, height, width)
        self._check_prompts("before_prompt", before_prompt, len(befores))
        self._check_prompts("after_prompt", after_prompt, len(afters))
        room = "the text encoder's window has room for no more"
        check_number("num_tokens", config.num_tokens, 1, self._room(), whole=True, meaning=room)
        if config.lambda_clip > 0:
            self._check_clip("learn with `lambda_clip=0`")

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
                f"`{name}` is missing: learning compares the images with CLIP. For this base model give "
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

    def _check_captioner(self, complaint: str = "There is no captioner to describe `images`: load") -> None:
        if self.captioner is None or self.captioner_processor is None:
            raise ValueError(f"{complaint} the pipeline with `captioner` and `captioner_processor`.")

    def _check_prompts(self, name: str, prompts: Any, count: int) -> None:
        if prompts is None:
            self._check_captioner(
                f"`{name}` is missing, and there is no captioner to write it: give `{name}`, or load"
            )
        elif not all(isinstance(prompt, str) for prompt in as_list(prompts)):
            raise TypeError(f"`{name}` must be a string or a list of strings, but is {prompts!r}.")
        elif len(as_list(prompts)) not in (1, count):
            raise ValueError(f"`{name}` has {len(as_list(prompts))} prompts for {count} images; give one for each.")

    def check_inputs(
        self,
        images: list,
        *,
        prompt,
        source_prompt,
        negative_prompt,
        mask_image,
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
    ) -> None:
        """Raises `ValueError` or `TypeError`, naming the argument, if drawing cannot use it.

        `images` is a result of `as_pictures`; the rest are arguments of a call.
        """
        self._check_model()
        if not images and prompt is None:
            raise ValueError(
                "`image` is missing: give the query image that the difference is applied to, or a `prompt` "
                "alone for text to image."
            )
        for item in images:
            self._common_size([item], "image", height, width)
        size = self._common_size(images, "image", height, width)
        if not images and not as_list(prompt):
            raise ValueError("`prompt` is an empty list; give at least one.")
        count = len(images) or len(as_list(prompt))
        self._check_prompts("prompt", prompt, count)
        for name, prompts in (("source_prompt", source_prompt), ("negative_prompt", negative_prompt)):
            if prompts is not None:
                self._check_prompts(name, prompts, count)
        if source_prompt is not None and not images:
            raise ValueError("`source_prompt` describes a query image, but `image` is missing.")
        most_steps = self.scheduler.config.num_train_timesteps - 1
        check_number("num_inference_steps", num_inference_steps, 1, most_steps, whole=True)
        check_number("num_images_per_prompt", num_images_per_prompt, 1, whole=True)
        check_number("strength", strength, most=1, above=0)
        check_number("guidance_scale", guidance_scale, optional=True)
        check_number("eta", eta, 0, 1, meaning="from DDIM to DDPM", optional=True)
        check_choice("output_type", output_type, "pil", "np", "pt", "latent")
        check_choice("inversion", inversion, "ddpm", "ddim", "sdedit", None)
        if eta is not None and eta < LEAST_DDPM_ETA and inversion == "ddpm" and images:
            raise ValueError(
                f'`eta` is {eta}, but `inversion="ddpm"` keeps the query in its noises; give at least '
                f'{LEAST_DDPM_ETA}, or `inversion="ddim"`.'
            )
        inverted = inversion is not None and bool(images)
        self._check_noise(generator, latents, count * num_images_per_prompt, size, inverted)
        known = self._callback_tensor_inputs
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in known]
        if unknown:
            raise ValueError(f"`callback_on_step_end_tensor_inputs` has {unknown}; known are {known}.")
        if mask_image is not None:
            self._check_mask(mask_image, images, inversion)

    def _learning_options(
        self,
        befores: list,
        afters: list,
        given: Optional[dict[str, Any]],
        complete_prompts: bool,
        generator,
        asked: dict,
    ) -> dict[str, Any]:
        """Checks a call's `learning_kwargs`; returns the keywords for [`invert_difference`]."""
        if not isinstance(given, (dict, type(None))):
            raise TypeError(f"`learning_kwargs` must be a dictionary, but is a {type(given).__name__}.")
        own = ("callback_on_optimization_step", "checkpoint", "checkpointing_steps")
        settings, given = [setting.name for setting in fields(LearningConfig)], given or {}
        unknown = [name for name in given if name not in (*own, *settings)]
        if unknown:
            raise ValueError(f"`learning_kwargs` has {unknown}; known are {[*settings, *own]}.")
        config = {"complete_prompts": complete_prompts} | {name: given[name] for name in settings if name in given}
        config = LearningConfig(**config)
        if befores or afters:
            self.check_learning_inputs(befores, afters, config, **asked)
            kept = {name: given[name] for name in own[1:] if name in given}
            # Opened here only to refuse another call's file early.
            self._open_checkpoint(befores, afters, config, generator=first_of(generator), **asked, **kept)
        elif given:
            logger.warning("`learning_kwargs` has no effect without a pair, `before` and `after`, to learn from.")
        return {**asked, **given, **vars(config)}

    def _differences_to_apply(
        self, difference, difference_scale, negative_difference, *, learns: bool, by_words_alone: bool
    ) -> tuple[list[tuple[DifferenceTokens, float]], list[tuple[DifferenceTokens, float]]]:
        """The differences that a call is given, and the negative ones, each with its scale.

        Raises `ValueError` if there is nothing to apply or too much, or if scales do not match differences.
        """
        if difference is None and negative_difference is None and not learns and not by_words_alone:
            raise ValueError(
                "`difference` is missing: give difference tokens or a difference file, or a pair of images "
                "`before` and `after` to learn it from."
            )
        if difference is not None and learns:
            raise ValueError("`difference` is given, and so is a pair to learn one from; give only one of the two.")
        several = isinstance(difference_scale, (list, tuple))
        for scale in difference_scale if several else [difference_scale]:
            check_number("difference_scale", scale)
        count = len(difference) if isinstance(difference, (list, tuple)) else 1
        if several and len(difference_scale) != count:
            raise ValueError(f"`difference_scale` has {len(difference_scale)} scales for {count} differences.")
        positive = [] if difference is None else self._resolve_difference(difference, difference_scale)
        if negative_difference is None:
            return positive, []
        return positive, self._resolve_difference(negative_difference, 1.0, "negative_difference")

    def _check_noise(self, generator, latents, batch_size: int, size: tuple[int, int], inverted: bool) -> None:
        self._check_generator(generator)
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"`generator` is a list of {len(generator)} for {batch_size} images.")
        if latents is not None and inverted:
            raise ValueError("`latents` are given, but `image` would be inverted to others; set `inversion=None`.")
        shape = self._latents_shape(batch_size, size)
        if latents is not None and tuple(latents.shape) != shape:
            raise ValueError(f"`latents` has shape {tuple(latents.shape)}, and {shape} is needed.")

    @staticmethod
    def _check_generator(generator) -> None:
        for given in generator if isinstance(generator, list) else [generator]:
            if not isinstance(given, (torch.Generator, type(None))):
                raise TypeError(f"`generator` must be a torch.Generator or a list of them, but holds {given!r}.")

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
        """Reads a difference from a file, a folder or a repository of the Hub, and checks that it fits this model.

        Args:
            path_or_repo_id: and all else: see [`DifferenceTokens.from_pretrained`].

        Raises:
            FileNotFoundError, OSError, ValueError: as there, and if the difference is for another base model.
        """
        return self._check_difference(DifferenceTokens.from_pretrained(path_or_repo_id, **options), "difference")

    def _resolve_difference(
        self, difference: Any, difference_scale: Union[float, Sequence[float]], name: str = "difference"
    ) -> list[tuple[DifferenceTokens, float]]:
        """A difference, a file, or a list of them, as tokens that fit this model, each with its scale."""
        given = list(difference) if isinstance(difference, (list, tuple)) else [difference]
        if not given:
            raise ValueError(f"`{name}` is an empty list; give at least one difference, or leave it out.")
        scales = difference_scale if isinstance(difference_scale, (list, tuple)) else [difference_scale] * len(given)
        checked = [self._check_difference(d, name) for d in given]
        count, room = sum(len(self._rows(d)) for d in checked), self._room()
        if count > room:
            raise ValueError(f"`{name}` has {count} tokens; the text encoder's window has room for {room}.")
        return [(d, float(scale)) for d, scale in zip(checked, scales, strict=True)]

    def _room(self) -> int:
        """How many difference tokens fit next to a start and an end token."""
        return min(encoder.tokenizer.model_max_length for encoder in self._encoders) - 2

    def _check_difference(self, difference: Any, name: str) -> DifferenceTokens:
        if isinstance(difference, (str, os.PathLike)):
            folder = Path(difference).is_dir()
            try:
                difference = (DifferenceTokens.from_pretrained if folder else DifferenceTokens.load)(difference)
            except (FileNotFoundError, ValueError) as error:
                raise type(error)(str(error).replace("`difference`", f"`{name}`", 1)) from error
        # Not isinstance: custom pipelines may load this module twice, which makes two classes of this name.
        if not (hasattr(difference, "embeddings") and hasattr(difference, "metadata")):
            raise TypeError(
                f"`{name}` must be DifferenceTokens, the path of a difference file, or a list of them, "
                f"but is a {type(difference).__name__}."
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
                "`%s` was learned on another base model (%s) of the same size; it may still work, since fine-tuned "
                "models share their embedding space.",
                name,
                difference.metadata.get("base_model") or "not named",
            )
        return DifferenceTokens(embeddings, dict(difference.metadata))

    def _fingerprint(self) -> str:
        """Identifies the base model's embeddings, in fp16 as in fp32, without tokens that textual inversions added.

        Empty in bfloat16, whose rounding would change the hash.
        """
        if any(encoder.model.dtype == torch.bfloat16 for encoder in self._encoders):
            return ""
        samples = (_sampled(e.table[: e.tokenizer.vocab_size]).to(torch.float16) for e in self._encoders)
        return " ".join(hashlib.sha256(sample.numpy().tobytes()).hexdigest()[:16] for sample in samples)

    # -------------------------------------------------------------------------------------------------- prompts

    def _write_prompts(self, *groups: tuple[list, Any]) -> list[list[str]]:
        """A prompt for each image of each group: given ones, and captions for all the others in one batch."""
        pictures = [image for images, prompts in groups if prompts is None for image in images]
        written = iter(self.caption(pictures) if pictures else [])
        return [
            list(islice(written, len(images))) if prompts is None else self._repeated(prompts, len(images) or 1)
            for images, prompts in groups
        ]

    def _repeated(self, prompts: Union[str, list[str]], count: int) -> list[str]:
        prompts = as_list(prompts)
        return prompts * count if len(prompts) == 1 else prompts

    def _rows(self, difference: Optional[DifferenceTokens]) -> torch.Tensor:
        """A difference's rows (num_tokens, dim) in float32; no rows for None.

        Those of two text encoders are side by side, so dim is the sum of their widths.
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

    @taking_turns
    @torch.no_grad()
    def caption(self, images: list, question: Optional[str] = None, max_new_tokens: int = 50) -> list[str]:
        """Describes images with the captioner, one string each.

        Args:
            images: PIL images, float arrays (height, width, 3) or tensors (3, height, width), as the pipeline takes.
            question: the question for a chat captioner; by default it asks for one sentence. Others, such as BLIP,
                start their answer with it.
            max_new_tokens: maximum length of an answer.
        """
        self._check_captioner()
        pictures = [self._to_pil(image) for image in as_pictures(images, "images")]
        processor = self.captioner_processor
        with frozen(self.captioner), self._bar("Captioning", total=len(pictures)) as progress_bar:
            if not getattr(processor, "chat_template", None):
                text = {} if question is None else {"text": [question] * len(pictures)}
                captions = self._generated(processor(images=pictures, **text, return_tensors="pt"), max_new_tokens)
                progress_bar.update(len(pictures))
                return captions
            captions = []  # one by one: pictures differ in token count, so answers start at different places
            for picture in pictures:
                content = [{"type": "image", "image": picture}, {"type": "text", "text": question or QUESTION}]
                options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
                inputs = processor.apply_chat_template(
                    [{"role": "user", "content": content}], add_generation_prompt=True, **options
                )
                captions += self._generated(inputs, max_new_tokens, start=inputs["input_ids"].shape[1])
                progress_bar.update()
        return captions

    def _generated(self, inputs: Any, max_new_tokens: int, start: int = 0) -> list[str]:
        """The captioner's answers to inputs from its processor, from token `start` on."""
        self._make_room(self.captioner)
        inputs = inputs.to(self._execution_device, self.captioner.dtype)
        tokens = self.captioner.generate(**inputs, max_new_tokens=max_new_tokens)[:, start:]
        return [text.strip() for text in self.captioner_processor.batch_decode(tokens, skip_special_tokens=True)]

    @taking_turns
    @torch.no_grad()
    def hard_prompts(
        self,
        images: list,
        *,
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

        This is PEZ, from "Hard Prompts Made Easy" (Wen et al., 2023), for all images at once, with whole words of the
        vocabulary, so that the text gives the same tokens again. Beyond PEZ, words that CLIP can do without are then
        removed, and the UNet adds or removes a few, since CLIP does not see all that matters for drawing.

        Args:
            images: as [`caption`] takes them.
            num_tokens: words to find for each image.
            num_steps: optimizer steps.
            learning_rate: AdamW's.
            tolerance: words are removed as long as the cosine with the image stays within this of its maximum, 0 to 2;
                `None` keeps all of them.
            num_revisions: maximum number of words to add or remove, one at a time, as long as the UNet then predicts
                the image's noise better; 0 for none.
            height, width: size in pixels at which the UNet gets the images; by default each image's own.
            generator: makes results repeatable.
        """
        self._check_model()
        self._check_generator(generator)
        self._check_clip("have the captioner describe `images`")
        check_number("num_tokens", num_tokens, 1, self._room(), whole=True, meaning="words of a hard prompt")
        check_number("num_steps", num_steps, 1, whole=True)
        check_number("learning_rate", learning_rate, above=0)
        check_number("num_revisions", num_revisions, 0, whole=True)
        check_number("tolerance", tolerance, 0, 2, meaning="a cosine, or `None` to keep all words", optional=True)
        encoder = self._encoders_with_clip()[0]
        generator = first_of(generator)
        images = as_pictures(images, "images")
        sizes = [self._common_size([image], "images", height, width) for image in images]
        check_gradients("images", "are described by words that PEZ finds by gradients")
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
            for _ in self._bar("Finding hard prompts", range(num_steps)):
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
        """Words (num_tokens,) without those that CLIP's text embedding does not need to stay close to an image's."""
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
        """Adds some of `more` to the words, up to `most` in all, and removes some, while the UNet's error falls."""
        latents = self._encode_images([image], "images", size).float()
        # The same noises for all images, so that a result does not depend on the rest of the batch.
        draw = self._draw(latents, NUM_REVISION_SAMPLES, torch.Generator().manual_seed(0), jitter=False)

        def errors(versions: list[list[int]]) -> list[float]:
            """The UNet's error on the image, given each version of the words."""
            prompts = [_written(self.tokenizer, version) for version in versions]
            return self._prompt_errors(prompts, latents, draw).mean(1).tolist()

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

    def _to_pil(self, image: Any) -> Image.Image:
        if isinstance(image, Image.Image):
            return image
        return self.image_processor.postprocess(self.image_processor.preprocess(image), output_type="pil")[0]

    @taking_turns
    def encode_prompt(
        self,
        prompt: Union[str, list[str]],
        device: Optional[torch.device] = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        negative_prompt: Optional[Union[str, list[str]]] = None,
        *,
        difference: Optional[Union[DifferenceTokens, str, os.PathLike, list]] = None,
    ) -> tuple[Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor], Optional[torch.Tensor]]:
        """Encodes [P; D]: each prompt, then the difference tokens, then the end token.

        A prompt that leaves too little room is shortened; the tokens never are. The results are arguments of stock
        pipelines, so the difference works in those too.

        Args:
            prompt: one or several.
            device: of the results; defaults to the pipeline's.
            num_images_per_prompt: copies of each prompt.
            do_classifier_free_guidance: whether to return negative embeddings.
            negative_prompt: for these; defaults to the empty prompt, or to zeros if SDXL is set so.
            difference: tokens, a difference file, or a list. Leave the phrases that they replace out of the prompt.

        Returns:
            `prompt_embeds`, `negative_prompt_embeds`, (batch, length, dim) each in the UNet's dtype, and SDXL's
            `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`, (batch, dim); None for those that do not exist.
        """
        prompts, negative = as_list(prompt), _Condition(None)
        self._check_prompts("prompt", prompts, len(prompts))
        if negative_prompt is not None:
            self._check_prompts("negative_prompt", negative_prompt, len(prompts))
        given = [] if difference is None else self._resolve_difference(difference, 1.0)
        rows = torch.cat([self._rows(None), *(self._way(d, scale, False).rows for d, scale in given)])
        self._warn_of_long_prompts(prompts, len(rows))
        condition = self._condition(prompts, rows.expand(len(prompts), -1, -1)).repeat(num_images_per_prompt)
        if do_classifier_free_guidance:
            negative_prompts = self._repeated(negative_prompt or "", len(prompts))
            negative = self._condition(negative_prompts).repeat(num_images_per_prompt)
            if negative_prompt is None:
                negative = self._zeros_or_empty(negative)
        embeds = (getattr(c, name) for name in vars(condition) for c in (condition, negative))
        return tuple(None if each is None else each.to(device or each.device) for each in embeds)

    def _zeros_or_empty(self, empty: _Condition) -> _Condition:
        """The negative condition if none is asked for: the empty prompt, or zeros if SDXL is set so."""
        zeros = self.text_encoder_2 is not None and self.config.force_zeros_for_empty_prompt
        return empty.each(torch.zeros_like) if zeros else empty

    def _condition(self, prompts: list[str], rows: Optional[torch.Tensor] = None) -> _Condition:
        """Conditioning for the UNet: prompts, each followed by its rows (batch, num_tokens, dim)."""
        rows = self._rows(None).expand(len(prompts), -1, -1) if rows is None else rows.to(self._execution_device)
        outputs, is_xl = [], self.text_encoder_2 is not None
        self._make_room(*(encoder.model for encoder in self._encoders))
        for encoder, part in self._by_encoder(rows):
            input_ids, slots = self._place_rows(encoder.tokenizer, prompts, part.shape[1], part.device)
            options = {"output_hidden_states": is_xl}
            if not is_xl and getattr(encoder.model.config, "use_attention_mask", False):  # SDXL has no such setting
                options["attention_mask"] = until_the_end(input_ids, encoder.tokenizer.eos_token_id)
            with inserted_rows(encoder.model.get_input_embeddings(), slots, part):
                outputs.append(encoder.model(input_ids, **options))
        # Prompts can be encoded without a UNet.
        dtype = self.text_encoder.dtype if self.unet is None else self._unet_dtype
        if not is_xl:
            return _Condition(outputs[0][0].to(dtype))
        # SDXL takes each encoder's next-to-last layer, and the second one's pooled output.
        prompt_embeds = torch.cat([output.hidden_states[-2] for output in outputs], dim=-1)
        return _Condition(prompt_embeds, outputs[1].text_embeds).each(lambda embeds: embeds.to(dtype))

    def _read(self, tokenizer: CLIPTokenizer, prompt: str) -> list[int]:
        """All token ids of a prompt; the name of a textual inversion becomes one token for each of its vectors."""
        # Calling the tokenizer itself would warn about long prompts.
        return tokenizer.convert_tokens_to_ids(tokenizer.tokenize(self.maybe_convert_prompt(prompt, tokenizer)))

    def _warn_of_long_prompts(self, prompts: Sequence[str], num_rows: int) -> None:
        """Warns about the parts of prompts that do not fit in the text encoder's window next to the rows."""
        for prompt in dict.fromkeys(prompts):
            words, room = self._read(self.tokenizer, prompt), self._room() - num_rows
            if len(words) > room:
                lost = _written(self.tokenizer, words[room:])
                logger.warning("The prompt %r is shortened to %d tokens, and loses %r.", prompt, room, lost)

    def _place_rows(
        self, tokenizer: CLIPTokenizer, prompts: list[str], num_rows: int, device, vocab_size: Optional[int] = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids [start; P; num_rows slots; end; padding] and a mask of the slots, both (batch, length).

        Ids beyond `vocab_size`, if given, are left out: textual inversions do not add them to CLIP.
        """
        length = tokenizer.model_max_length
        room = length - 2 - num_rows
        input_ids = torch.full((len(prompts), length), tokenizer.pad_token_id)
        slots = torch.zeros((len(prompts), length), dtype=torch.bool)
        for line, prompt in enumerate(prompts):
            words = self._read(tokenizer, prompt)
            if vocab_size is not None:
                words = [word for word in words if word < vocab_size]
            # Slots hold the start token: CLIP pools at the first end token, which must be the real one.
            places = [tokenizer.bos_token_id] * num_rows
            ids = [tokenizer.bos_token_id, *words[:room], *places, tokenizer.eos_token_id]
            input_ids[line, : len(ids)] = torch.tensor(ids)
            slots[line, len(ids) - 1 - num_rows : len(ids) - 1] = True
        return input_ids.to(device), slots.to(device)

    # --------------------------------------------------------------------------------------------------- images

    def _common_size(self, images: list, name: str, height: Optional[int], width: Optional[int]) -> tuple[int, int]:
        """The common size of a batch: what is asked for, else the first image's, rounded down to whole latents."""
        factor = self.vae_scale_factor
        for side, value in (("height", height), ("width", width)):
            check_number(side, value, factor, whole=True, optional=True)
        own = image_size(images[0]) if images else self._native_size(height, width)
        size = tuple(asked or side for asked, side in zip((height, width), own, strict=True))
        if min(size) < factor:
            raise ValueError(
                f"`{name}` is {size[0]}×{size[1]}; it must be at least {factor} pixels high and wide. Give a larger "
                "one, or a `height` and a `width` to resize it to."
            )
        return tuple(side // factor * factor for side in size)

    def _native_size(self, height: Optional[int], width: Optional[int]) -> tuple[int, int]:
        """Height and width at which the UNet was trained; zeros if it does not say and both are given."""
        native = self.unet.config.sample_size
        written_by = self.unet.config.get("_diffusers_version") or ""
        if isinstance(native, int) and native < 64 and re.match(r"0\.[0-8]\.", written_by):
            native = 64  # as in stock pipelines: old configurations state it wrongly
        if native is None and None in (height, width):
            raise ValueError(
                "`height` and `width` are needed: this `unet` does not say for which size it was trained."
            )
        native = native or 0
        sides = (native, native) if isinstance(native, int) else tuple(native)
        return tuple(side * self.vae_scale_factor for side in sides)

    def _encode_images(self, images: list, name: str, size: tuple[int, int]) -> torch.Tensor:
        """Latents (batch, channels, height / factor, width / factor) of images of any size, resized if necessary."""
        for image in images:
            own = image_size(image)
            if own != size:
                logger.warning("`%s` is %d×%d (height by width) and is resized to %d×%d.", name, *own, *size)
        native = self._native_size(*size)
        if name != "after" and all(native) and not 0.5 <= math.prod(size) / math.prod(native) <= 2:
            logger.warning(
                "`%s` is used at %d×%d (height by width), and the model was trained at %d×%d: what it draws may be poor. "
                "Crop the image, or give a `height` and a `width`.",
                *(name, *size, *native),
            )
        with self._precise_vae():
            pixels = self._pixels(images, size).to(self._execution_device, self.vae.dtype)
            latents = retrieve_latents(self.vae.encode(pixels), sample_mode="argmax")  # small VAEs are deterministic
        mean, scale = self._latents_statistics(latents)
        return ((latents - mean) * scale).to(self.vae.dtype)

    def _latents_statistics(self, latents: torch.Tensor) -> tuple[Any, Any]:
        """Mean to subtract from the VAE's latents, and factor to multiply them by, for the UNet.

        SDXL's VAE may have both per channel; stock Stable Diffusion ignores these.
        """
        config, values = self.vae.config, []
        for name, neutral in (("latents_mean", 0.0), ("latents_std", 1.0)):
            given = None if self.text_encoder_2 is None else config.get(name)
            values.append(neutral if given is None else torch.tensor(given).view(1, -1, 1, 1).to(latents))
        return values[0], config.scaling_factor / values[1]

    def _pixels(self, images: list, size: tuple[int, int]) -> torch.Tensor:
        """Images of any size as pixels (batch, 3, height, width), -1 to 1."""
        return torch.cat([self.image_processor.preprocess(image, *size) for image in images])

    @contextmanager
    def _precise_vae(self) -> Iterator[None]:
        """While open, the VAE is on the device; SDXL's with `force_upcast` is in float32 instead of float16."""
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

    def _clip_deltas(self, pairs: list[Pair], alpha: float) -> list[torch.Tensor]:
        """Each CLIP's interpolated delta (dim,), the mean over the pairs; equations 2 to 5."""
        deltas, prompts = [], list(zip(*(pair.prompts for pair in pairs), strict=True))
        for encoder in self._encoders_with_clip():
            before, after = (self._clip_text_features(encoder, list(side)) for side in prompts)
            deltas.append(interpolated_delta(self._image_delta(encoder.clip, pairs), (after - before).mean(0), alpha))
        if not any(delta.any() for delta in deltas):
            logger.warning(
                "CLIP sees no difference between `before` and `after`; its loss will not guide the learning."
            )
        return deltas

    def _encoders_with_clip(self) -> list[_Encoder]:
        return [encoder for encoder in self._encoders if encoder.clip is not None]

    def _image_delta(self, clip: CLIPModel, pairs: list[Pair]) -> torch.Tensor:
        """The mean difference (dim,) between CLIP's image embeddings (equation 2)."""
        before, after = ([getattr(pair, name) for pair in pairs] for name in ("before", "after"))
        return (self._clip_image_features(clip, after) - self._clip_image_features(clip, before)).mean(0)

    def _clip_image_features(self, clip: CLIPModel, images: list) -> torch.Tensor:
        """CLIP's image embeddings (images, dim) at unit length."""
        self._make_room(clip)
        pictures = [self._to_pil(image) for image in images]
        pixel_values = self.clip_processor(images=pictures, return_tensors="pt")["pixel_values"]
        pixel_values = pixel_values.to(self._execution_device, clip.dtype)
        return F.normalize(_features(clip.get_image_features(pixel_values=pixel_values)).float(), dim=-1)

    def _clip_text_features(
        self, encoder: _Encoder, prompts: list[str], rows: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """CLIP's text embeddings (batch, dim) at unit length of prompts, followed by the encoder's rows, if any."""
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
        """CLIP's text embeddings (batch, dim) at unit length of rows (batch, num_rows, width) alone.

        There is no padding: CLIP's end token does not attend to it.
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

    @taking_turns
    @torch.no_grad()
    def invert_difference(
        self,
        before: Any,
        after: Any,
        before_prompt: Optional[Union[str, list[str]]] = None,
        after_prompt: Optional[Union[str, list[str]]] = None,
        *,
        height: Optional[int] = None,
        width: Optional[int] = None,
        generator: Optional[Union[torch.Generator, list[torch.Generator]]] = None,
        callback_on_optimization_step: Optional[Callable[[DiffusionPipeline, int, dict], Any]] = None,
        checkpoint: Union[str, os.PathLike, None] = None,
        checkpointing_steps: int = 10,
        **config,
    ) -> DifferenceTokens:
        r"""
        Learns what changed from `before` to `after` (paper, section 4).

        Stopping early loses nothing: on Ctrl-C after its first step began, or when a callback sets
        `pipe._interrupt = True`, it returns the best tokens so far. (Ctrl-C while a call of the pipeline learns ends
        that call, which keeps them as `pipe.interrupted_difference`.)

        Args:
            before: the image before the change, or several; PIL images of any mode and size, arrays or tensors.
            after: the image after it, or as many.
            before_prompt: describes `before`; one for each image. If None, the captioner writes it.
            after_prompt: describes `after`, likewise.
            height, width: size in pixels to resize the images to; defaults to the first one's, in whole latents.
            generator: makes learning repeatable.
            callback_on_optimization_step: called as `callback(pipe, step, values)` after each step. `values` has
                `loss`, those of `clip_loss`, `contrast_loss` and `token_consistency_loss` that have a weight (floats),
                and `tokens` (num_tokens, dim).
            checkpoint: a file for the state of learning. If it exists, learning resumes from it: with a `generator`,
                to the same tokens bit for bit. It is written whole or not at all, and stays when learning ends.
            checkpointing_steps: optimizer steps between writes of it, at least 1.
            config: `num_tokens`, `init` and the other arguments of [`LearningConfig`].

        Returns:
            The best difference tokens, on a fixed set of noises and time steps, of the initial and several later ones.

        Raises:
            ValueError, TypeError: for invalid arguments, by name, before any model runs.
        """
        asked = {"before_prompt": before_prompt, "after_prompt": after_prompt, "height": height, "width": width}
        config = LearningConfig(**config)
        befores, afters = (
            [] if given is None else as_pictures(given, name) for name, given in (("before", before), ("after", after))
        )
        self.check_learning_inputs(befores, afters, config, **asked)
        self._check_generator(generator)
        generator, size = first_of(generator), self._common_size(befores, "before", height, width)
        kept = {"checkpoint": checkpoint, "checkpointing_steps": checkpointing_steps}
        checkpoint = self._open_checkpoint(befores, afters, config, generator=generator, **asked, **kept)
        prompts = self._write_prompts((befores, before_prompt), (afters, after_prompt))
        self._interrupt, self._stopped = False, False
        with frozen(self.vae, self.unet, self.text_encoder, self.text_encoder_2, self.clip, self.clip_2):
            latents = (
                self._encode_images(images, name, size).float().split(1)
                for images, name in ((befores, "before"), (afters, "after"))
            )
            pairs = [Pair(*parts) for parts in zip(befores, afters, *prompts, *latents, strict=True)]
            difference = self._learn(pairs, config, generator, callback_on_optimization_step, checkpoint)
        self.maybe_free_model_hooks()
        return difference

    def _open_checkpoint(
        self,
        befores: list,
        afters: list,
        config: LearningConfig,
        *,
        before_prompt,
        after_prompt,
        height: Optional[int],
        width: Optional[int],
        generator: Optional[torch.Generator],
        checkpoint: Union[str, os.PathLike, None] = None,
        checkpointing_steps: int = 10,
    ) -> Optional[_Checkpoint]:
        """The file for the state of learning; raises `ValueError` if it exists and is of another call."""
        check_number("checkpointing_steps", checkpointing_steps, 1, whole=True)
        if checkpoint is None:
            return None
        size = self._common_size(befores, "before", height, width)
        call = self._call_hash(befores, afters, size, (before_prompt, after_prompt, config), generator)
        return _Checkpoint(Path(checkpoint), checkpointing_steps, call)

    def _call_hash(
        self, befores: list, afters: list, size: tuple[int, int], asked: tuple, generator: Optional[torch.Generator]
    ) -> str:
        """A short hash of what is learned from, by which model, and how."""
        seed = None if generator is None else generator.initial_seed()
        digest = hashlib.sha256(repr((asked, seed, self._base_model(), self._fingerprint())).encode())
        for images in (befores, afters):
            digest.update(self._pixels(images, size).float().cpu().numpy().tobytes())
        return digest.hexdigest()[:32]

    def _learn(
        self,
        pairs: list[Pair],
        config: LearningConfig,
        generator: Optional[torch.Generator],
        callback: Optional[Callable],
        checkpoint: Optional[_Checkpoint],
    ) -> DifferenceTokens:
        """Learns from encoded pairs."""
        first, hard = pairs[0], config.projection == "hard"
        self._warn_of_long_prompts([prompt for pair in pairs for prompt in pair.prompts], config.num_tokens)
        # 1. What CLIP says has changed
        deltas = self._clip_deltas(pairs, config.alpha) if config.lambda_clip > 0 else []
        # 2. The words that the pictures lost and gained
        state, alike = {} if checkpoint is None else checkpoint.state, self._look_alike(pairs)
        if state:
            logger.info("Learning goes on from %r, at step %d.", str(checkpoint.path), state["learner"]["step"])
        lost, gained = state["words"] if state else self._find_words(pairs, config, generator)
        # 3. The initial tokens
        allowed = self._vocabulary_words() if hard else None
        words = self._word_rows(gained, config.num_tokens, allowed)
        if len(words):  # random rows next to them would add arbitrary meaning
            config = replace(config, num_tokens=len(words))
        elif lost and not hard:  # leaving out what was lost is the whole change
            config = replace(config, num_tokens=1, init="zeros")
        from_words = len(words) > 0 or (bool(lost) and not hard)
        config = config.for_start(from_words)
        if state:
            pairs = [replace(pair, **prompts) for pair, prompts in zip(pairs, state["prompts"], strict=True)]
        elif config.complete_prompts and not (from_words or alike):
            pairs = self._completed_pairs(pairs, config)
        if checkpoint is not None:
            prompts = [{name: getattr(pair, name) for name in ("before_prompt", "after_prompt")} for pair in pairs]
            checkpoint.state |= {"words": (lost, gained), "prompts": prompts}
        tokens = self._initial_tokens(config.num_tokens, config.init, words, generator)
        # 4. The learned tokens
        vocabulary = Vocabulary(self._embedded(allowed)) if hard else None
        if alike:
            tokens, loss = torch.zeros_like(tokens), 0.0
        else:
            learner = Learner(
                tokens,
                pairs,
                deltas,
                config,
                predict=self._predict,
                clip_features=self._token_features,
                draw=self._draw,
                backward=self._backward,
                generator=generator,
                vocabulary=vocabulary,
                gradient_scale=self._gradient_scale,
            )
            self._optimize(learner, callback, checkpoint)
            tokens, loss = learner.best()
            if not (tokens.any() or lost):  # lost words are a change by themselves
                logger.warning(
                    "No tokens were better than zeros, so the difference will change nothing. Try a lower "
                    "`learning_rate`, more steps, another `init`, or float32."
                )
        story = {"lost_phrases": "\n".join(lost), "gained_phrases": "\n".join(gained)}
        if hard and not alike:
            tokens, nearest = vocabulary.project(tokens)
            story["token_ids"] = " ".join(map(str, allowed[nearest].tolist()))
        embeddings = {encoder.token: part.cpu().contiguous() for encoder, part in self._by_encoder(tokens)}
        return DifferenceTokens(embeddings, self._metadata(config, loss, generator, first) | story)

    def _find_words(
        self, pairs: list[Pair], config: LearningConfig, generator: Optional[torch.Generator]
    ) -> tuple[list[str], list[str]]:
        """The words that the pairs lost and gained, up to `num_tokens` of each, if tokens are to start as words.

        Prompts and CLIP propose words, and the UNet chooses. A word must hold for all the pairs together.
        """
        if self._look_alike(pairs):
            logger.warning(
                "`before` and `after` look alike: there is no difference to learn, so the tokens change nothing."
            )
            return [], []
        if config.init != "words":
            return [], []
        draws = [
            self._draw(pairs[0].before_latents, samples, generator, False, EVIDENCE_TIMESTEPS)
            for samples in (NUM_EVIDENCE_SAMPLES, NUM_VERIFICATION_SAMPLES)
        ]
        said = [
            list(dict.fromkeys(word for pair in pairs for word in unshared_words(*pair.prompts[::order])))
            for order in (1, -1)
        ]
        nearest, most = ([], []), config.num_tokens
        with self._bar("Trying words", total=math.inf) as progress_bar:
            choosing, verifying = (self._evidence(pairs, draw, progress_bar) for draw in draws)
            search = WordSearch(choosing)
            if self._encoders_with_clip() and self.clip_processor is not None:
                search.shared = self._shared_words(pairs)
                said, nearest = self._words_along_the_delta(said, pairs)
            search.run([*said[0], *said[1], *nearest[0], *nearest[1]], may_be_shared=[*said[0], *said[1]], most=most)
            search.look_again([words[:NUM_LIKELY] for words in nearest], most=most)
            if any(search.found):
                search.verify(verifying)
            search.order(pairs[0].prompts)
        return search.found

    def _shared_words(self, pairs: list[Pair]) -> list[str]:
        """Words for what CLIP sees in all pictures, but no pair's prompts mention.

        Single words are hard to judge, and captions may say little about what both pictures show. This needs no UNet
        calls: word by word, CLIP picks what brings the description closer to every picture.
        """
        encoder = self._encoders_with_clip()[0]
        images = [pair.before for pair in pairs] + [pair.after for pair in pairs]
        features = self._clip_image_features(encoder.clip, images)  # [2 * pairs, dim]
        prompts = [shared_prompt(*pair.prompts) for pair in pairs]
        room = self._room() - MOST_SHARED_WORDS
        known = [self._read(self.tokenizer, prompt)[:room] for prompt in prompts]
        pictures = features.unflatten(0, (2, len(pairs)))

        def likeness(descriptions: list[list[int]]) -> torch.Tensor:
            """Cosines (descriptions, 2 * pairs) of pictures with descriptions that follow the shared prompts."""
            cosines = []
            for ids, both in zip(known, pictures.unbind(1), strict=True):
                phrases = torch.tensor([[*ids, *more] for more in descriptions], dtype=torch.long, device=both.device)
                cosines.append(self._clip_row_features(encoder, encoder.rows(phrases)) @ both.T)
            return torch.cat(cosines, dim=1)

        said = {word for prompt in prompts for word in split_words(prompt)}
        words, of_words = self._content_words()
        nearest = words[(of_words @ features.T).amin(1).argsort(descending=True)].tolist()
        unsaid = (index for index in nearest if _written(self.tokenizer, [index]) not in said)
        candidates = list(islice(unsaid, NUM_SHARED_CANDIDATES))
        chosen, reached = [], likeness([[]])
        while candidates and len(chosen) < MOST_SHARED_WORDS:
            found = likeness([[*chosen, word] for word in candidates])
            least, most = (found - reached).aminmax(dim=1)
            gains = torch.where(least >= LEAST_BALANCE * most, least, 0)
            best = int(gains.argmax())
            if gains[best] < LEAST_LIKENESS_GAIN:
                break
            reached = found[best]
            chosen.append(candidates.pop(best))
        # A word in only one prompt of a pair may be what changed, so the UNet judges it.
        by_one = {word for pair in pairs for order in (1, -1) for word in unshared_words(*pair.prompts[::order])}
        return [word for word in (_written(self.tokenizer, [index]) for index in chosen) if word not in by_one]

    def _words_along_the_delta(
        self, said: list[list[str]], pairs: list[Pair]
    ) -> tuple[list[list[str]], list[list[str]]]:
        """The prompts' own words that best fit the images' delta, and the vocabulary's nearest to its opposite and to
        it.

        Both are pairs of lists, lost words and gained words. CLIP is fast but imprecise, so it only proposes.
        """
        encoder = self._encoders_with_clip()[0]
        delta = self._image_delta(encoder.clip, pairs)

        def likeness_of(word: str) -> float:
            return float(self._clip_text_features(encoder, [word])[0] @ delta)

        said = [
            sorted(words, key=lambda word, sign=sign: sign * likeness_of(word))[:NUM_CAPTION_WORDS]
            for words, sign in zip(said, (1, -1), strict=True)
        ]
        if not delta.any():
            return said, [[], []]
        words, of_words = self._content_words()
        likeness, count = of_words @ delta, min(NUM_CLIP_WORDS, len(words))
        nearest = (words[(sign * likeness).topk(count).indices].tolist() for sign in (-1, 1))
        return said, [[_written(self.tokenizer, [index]) for index in side] for side in nearest]

    def _evidence(self, pairs: list[Pair], draw: _Draw, progress_bar: Any) -> Callable[[list[str], int], torch.Tensor]:
        """The `errors` of a [`WordSearch`] on these pairs, weighted by change, on fixed noises and time steps."""

        def errors(phrases: list[str], picture: int) -> torch.Tensor:
            found = []
            for pair in pairs:
                context = shared_prompt(*pair.prompts)
                prompts = [f"{context} {phrase}".strip() for phrase in phrases]
                found.append(self._prompt_errors(prompts, pair.latents[picture], draw, pair.weights))
            progress_bar.update(len(phrases))
            return torch.cat(found, dim=1)

        return errors

    def _metadata(
        self, config: LearningConfig, loss: float, generator: Optional[torch.Generator], pair: Pair
    ) -> dict[str, str]:
        """What a difference file records about how it was learned."""
        settings = vars(config).copy()
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
            "steps": settings.pop("num_optimization_steps"),
            "loss": f"{loss:.6g}",
            "seed": "" if generator is None else generator.initial_seed(),
            "before_prompt": pair.before_prompt,
            "after_prompt": pair.after_prompt,
        }
        return {name: str(value) for name, value in (settings | own).items()}

    def _base_model(self) -> str:
        """The base model's name; for a local folder only its last part, since difference files are shared."""
        name = self.config.get("_name_or_path") or ""
        return Path(name).resolve().name if os.path.exists(name) else name

    def _word_rows(self, words: list[str], num_tokens: int, allowed: Optional[torch.Tensor] = None) -> torch.Tensor:
        """The embeddings of words, (up to num_tokens, dim).

        If there are too many, the last ones stay, because a phrase ends in its noun. Words that are not `allowed`,
        or that an encoder lacks, are skipped.
        """
        words = self.maybe_convert_prompt(" ".join(words), self.tokenizer).split()
        read = self.tokenizer(words, add_special_tokens=False).input_ids if words else []
        if allowed is not None:  # a word of several tokens is not a vocabulary word
            read = [ids for ids in read if len(ids) == 1 and ids[0] in allowed.tolist()]
        known = min(len(encoder.table) for encoder in self._encoders)
        rows = self._embedded([index for ids in read for index in ids if index < known])
        return rows[max(0, len(rows) - num_tokens) :]

    def _content_words(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Ids of the vocabulary's content words (words,) and the first CLIP's text embeddings of them (words, dim).

        Cached, since Stable Diffusion's tokenizer has 49,408 entries.
        """

        def find() -> tuple[torch.Tensor, torch.Tensor]:
            words = self._vocabulary_words(fewest_letters=3, but=FUNCTION_WORDS)
            return words, self._word_features(self._encoders_with_clip()[0], words)

        return self._found_once("content words", find)

    def _word_features(self, encoder: _Encoder, words: torch.Tensor) -> torch.Tensor:
        """CLIP's text embeddings (words, dim) at unit length, one for each word."""
        if not len(words):
            return torch.zeros(0, encoder.clip.config.projection_dim, device=words.device)
        parts = encoder.rows(words)[:, None].split(1024)
        return torch.cat([self._clip_row_features(encoder, part) for part in parts])

    def _completed(
        self, prompts: list[str], images: list, latents: torch.Tensor, said: Sequence[str] = ()
    ) -> list[str]:
        """Adds words to prompts for what they leave out of their images, whose latents (batch, ...) are given.

        CLIP proposes words, and the UNet takes those that lower its error on the image. A caption often names less
        than half of what is visible, and what no word describes may drift when the rest is redrawn. This replaces the
        prompt that "fully anchors" an image in the paper. Without a CLIP, prompts stay unchanged. Additions are
        logged.

        The phrases `said` also describe the images, so they are not added.
        """
        if not self._encoders_with_clip() or self.clip_processor is None:
            return prompts
        encoder = self._encoders_with_clip()[0]
        with frozen(self.unet, self.text_encoder, self.text_encoder_2, self.clip, self.clip_2):
            told = [" ".join(filter(None, [without_phrases(prompt, said), *said])) for prompt in prompts]
            proposed = self._unsaid_words(encoder, told, images)
            # The same noises for all images, so that a result does not depend on the rest of the batch.
            noise = torch.Generator().manual_seed(0)
            draw = self._draw(latents[:1].float(), NUM_COMPLETION_SAMPLES, noise, False, EVIDENCE_TIMESTEPS)
            each = list(zip(told, proposed, latents.float().split(1), strict=True))
            bar = self._bar("Completing prompts", each)
            added = [self._true_words(prompt, words, own, draw) for prompt, words, own in bar]
        completed = [" ".join(filter(None, [prompt, *words])) for prompt, words in zip(prompts, added, strict=True)]
        for prompt, longer in zip(prompts, completed, strict=True):
            if longer != prompt:
                logger.info("The prompt %r is completed to %r.", prompt, longer)
        return completed

    def _completed_pairs(self, pairs: list[Pair], config: LearningConfig) -> list[Pair]:
        """The pairs with completed prompts, so that tokens need not describe what A and A' show besides the change."""
        sides = ["before"]
        if config.objective == "contrast" or config.lambda_before > 0:  # otherwise the prompts of A' are unused
            sides.append("after")
        for side in sides:
            prompts, images, latents = (
                [getattr(pair, name) for pair in pairs] for name in (f"{side}_prompt", side, f"{side}_latents")
            )
            completed = self._completed(prompts, images, torch.cat(latents))
            pairs = [replace(p, **{f"{side}_prompt": prompt}) for p, prompt in zip(pairs, completed, strict=True)]
        return pairs

    def _unsaid_words(self, encoder: _Encoder, prompts: list[str], images: list) -> list[list[str]]:
        """The vocabulary words nearest to what CLIP sees in each image and its prompt does not say."""
        words, of_words = self._content_words()
        # Otherwise what is already said would come first, and crowd out quieter things.
        unsaid = self._clip_image_features(encoder.clip, images) - 0.5 * self._clip_text_features(encoder, prompts)
        orders = (unsaid @ of_words.T).argsort(descending=True)
        proposed = []
        for prompt, order in zip(prompts, orders, strict=True):
            said = split_words(prompt)
            ranked = (_written(self.tokenizer, [index]) for index in words[order].tolist())
            proposed.append(list(islice((word for word in ranked if word not in said), NUM_COMPLETION_WORDS)))
        return proposed

    def _true_words(self, prompt: str, words: list[str], latents: torch.Tensor, draw: _Draw) -> list[str]:
        """The words that, appended to the prompt, lower the UNet's error on the latents (1, ...), best first."""
        (reference,) = (errors,) = self._prompt_errors([prompt], latents, draw)
        chosen = []
        while words:
            found = self._prompt_errors([f"{prompt} {word}".strip() for word in words], latents, draw)
            gains = ((errors - found) / reference).mean(1)
            best = int(gains.argmax())
            if gains[best] < LEAST_COMPLETION_GAIN:
                break
            chosen.append(words[best])
            prompt, errors = f"{prompt} {words[best]}".strip(), found[best]
            words = [w for w, gain in zip(words, gains.tolist(), strict=True) if w != words[best] and gain > -0.05]
        return chosen

    def _prompt_errors(
        self, prompts: list[str], latents: torch.Tensor, draw: _Draw, weights: Optional[torch.Tensor] = None
    ) -> torch.Tensor:
        """The UNet's errors on latents (1, ...) under each prompt, weighted by place, (prompts, samples)."""
        weights = torch.ones_like(latents[:, :1]) if weights is None else weights
        found = []
        for some in _chunks(prompts, max(1, MOST_AT_ONCE // len(draw.timesteps))):
            rows = self._rows(None).expand(len(some), -1, -1)
            prediction, target = self._predict(latents, some, rows, draw)
            found.append(weighted_errors(prediction, target, weights))
        return torch.cat(found)

    def _vocabulary_words(self, fewest_letters: int = 1, but: frozenset[str] = frozenset()) -> torch.Tensor:
        """Ids of the vocabulary's whole words that tokenize back to themselves."""
        pattern = re.compile(f"[a-z]{{{fewest_letters},}}</w>")
        # Sorted, since the tokenizer's own order varies.
        vocab = sorted((index, token) for token, index in self.tokenizer.get_vocab().items())
        vocab = {token[:-4]: index for index, token in vocab if pattern.fullmatch(token) and token[:-4] not in but}
        read = self.tokenizer(list(vocab), add_special_tokens=False).input_ids if vocab else []
        words = [index for index, ids in zip(vocab.values(), read, strict=True) if ids == [index]]
        return torch.tensor(words, dtype=torch.long, device=self._execution_device)

    @staticmethod
    def _look_alike(pairs: list[Pair]) -> bool:
        """Whether no pair has a visible change (latents have a standard deviation of about 1)."""
        changes = [(pair.after_latents - pair.before_latents).square().mean() for pair in pairs]
        return max(map(float, changes)) < NO_CHANGE

    def _initial_tokens(
        self, num_tokens: int, init: str, words: torch.Tensor, generator: Optional[torch.Generator]
    ) -> torch.Tensor:
        """The initial tokens, (num_tokens, dim), in float32 whatever the model's dtype."""
        shape, device = (num_tokens - len(words), words.shape[1]), self._execution_device
        if init == "zeros" or shape[0] == 0:
            return torch.cat([torch.zeros(shape, device=device), words.to(device)])
        spread = torch.cat([e.table.float().std().expand(e.width) for e in self._encoders]).to(device)
        others = randn_tensor(shape, generator=generator, device=device) * RANDOM_INIT_SCALE * spread
        return torch.cat([others, words.to(device)])

    def _optimize(self, learner: Learner, callback: Optional[Callable], checkpoint: Optional[_Checkpoint]) -> None:
        """Runs the learner's steps, with callbacks, checkpoints and Ctrl-C in between."""
        num_steps = learner.config.num_optimization_steps
        learner.prepare(None if checkpoint is None else checkpoint.state.get("learner"))
        try:
            with self._weights_kept():
                if len(learner.candidates) == 1:
                    learner.judge()
                    if checkpoint is not None:
                        checkpoint.write(learner)
                progress_bar = self._bar("Learning", range(learner.step, num_steps))
                for step in progress_bar:
                    values = learner.take_step()
                    if not math.isfinite(values["loss"]):
                        self._warn_of_infinity(step, num_steps)
                        break
                    progress_bar.set_postfix({name: f"{value:.4f}" for name, value in values.items()})
                    if callback is not None:
                        used = learner.used_tokens(learner.tokens).detach().clone()
                        callback(self, step, {**values, "tokens": used})
                    if learner.is_to_judge or self.interrupt:
                        learner.judge()
                    if self.interrupt:
                        break
                    if checkpoint is not None and (learner.step % checkpoint.every == 0 or learner.step == num_steps):
                        checkpoint.write(learner)
        except KeyboardInterrupt:
            logger.warning(
                "Learning was interrupted after step %d of %d; the best tokens so far are kept.",
                learner.step,
                num_steps,
            )
            self._stopped = True
            learner.judge()
        if learner.num_overflows:
            logger.warning(
                "Gradients overflowed in %s at %d of %d steps, which were skipped. Use bfloat16 or float32.",
                self.unet.dtype,
                learner.num_overflows,
                num_steps,
            )
        if not math.isfinite(learner.best()[1]):
            logger.warning("No loss was finite, so the tokens are still the initial ones. Use float32.")

    @property
    def _gradient_scale(self) -> float:
        """Loss scale: single gradients are too small for fp16. Steps that overflow instead are skipped."""
        dtypes = (self.unet.dtype, *(encoder.model.dtype for encoder in self._encoders))
        return 1024.0 if torch.float16 in dtypes else 1.0

    def _warn_of_infinity(self, step: int, num_steps: int) -> None:
        cure = "Use bfloat16 or float32." if self.unet.dtype == torch.float16 else "Try a lower `learning_rate`."
        logger.warning(
            "Learning stopped at step %d of %d: its loss is not finite, in %s. The best tokens before it are kept. %s",
            step + 1,
            num_steps,
            self.unet.dtype,
            cure,
        )

    @staticmethod
    def _backward(loss: torch.Tensor) -> None:
        loss.backward()

    def _token_features(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """Each CLIP's text embedding (dim,) of the tokens alone, for the CLIP loss (Figure 3)."""
        parts = [(encoder, part) for encoder, part in self._by_encoder(tokens) if encoder.clip is not None]
        return [self._without_graph(self._clip_text_features, encoder, [""], part[None])[0] for encoder, part in parts]

    def _draw(
        self,
        latents: torch.Tensor,
        samples: int,
        generator,
        jitter: bool = True,
        stretch: tuple[float, float] = (0.0, 1.0),
    ) -> _Draw:
        """Noises, and time steps spread over a part of the schedule: one in each of `samples` equal intervals."""
        device = latents.device
        noise = randn_tensor((samples, *latents.shape[1:]), generator=generator, device=device, dtype=latents.dtype)
        places = torch.full((samples,), 0.5, device="cpu")
        if jitter:
            places = torch.rand(samples, generator=generator, device=generator.device if generator else "cpu").cpu()
        num_train_timesteps = self.scheduler.config.num_train_timesteps
        low, high = stretch
        places = low + (high - low) * (torch.arange(samples, device="cpu") + places) / samples
        timesteps = places * num_train_timesteps
        return _Draw(noise, timesteps.long().clamp(max=num_train_timesteps - 1).to(device))

    def _predict(self, latents, prompts: list[str], rows, draw: _Draw) -> tuple[torch.Tensor, torch.Tensor]:
        """The UNet's predictions for latents, each with its prompt and rows, and their targets.

        Both are (images, samples, channels, height, width): every image with every noise of the draw. A single image is
        for all prompts, and a single prompt for all images, so that it is encoded once.
        """
        images, samples = max(len(latents), len(prompts)), len(draw.timesteps)
        condition = self._without_graph(self._condition, prompts, rows).repeat(samples * images // len(prompts))
        latents = latents.expand(images, -1, -1, -1).repeat_interleave(samples, dim=0)
        noise, timesteps = draw.noise.repeat(images, 1, 1, 1), draw.timesteps.repeat(images)
        schedule = self._training_schedule
        prediction = self._unet_output(schedule.add_noise(latents, noise, timesteps), timesteps, condition)
        target = noise if schedule.config.prediction_type == "epsilon" else latents
        if schedule.config.prediction_type == "v_prediction":
            target = schedule.get_velocity(latents, noise, timesteps)
        return prediction.float().unflatten(0, (images, samples)), target.unflatten(0, (images, samples))

    def _unet_output(self, latents: torch.Tensor, t: torch.Tensor, condition: _Condition) -> torch.Tensor:
        """The UNet's prediction (batch, ...). SDXL also gets size and crop conditioning (no crop)."""
        self._make_room(self.unet)
        added, latents = None, latents.to(self._unet_dtype)
        t = t.repeat(len(latents)) if t.ndim == 0 else t  # always one for each: `torch.compile` compiles once
        if condition.pooled_prompt_embeds is not None:
            size = [side * self.vae_scale_factor for side in latents.shape[-2:]]
            time_ids = torch.tensor([*size, 0, 0, *size], device=latents.device, dtype=latents.dtype)
            added = {"text_embeds": condition.pooled_prompt_embeds, "time_ids": time_ids.expand(len(latents), -1)}
        embeds = condition.prompt_embeds
        return self.unet(latents, t, encoder_hidden_states=embeds, added_cond_kwargs=added).sample

    # ---------------------------------------------------------------------------------- inverting and denoising

    def _deterministic(self, family: type) -> Any:
        """A DDIM scheduler or its inverse, on the model's noise schedule, set so that they undo each other's steps."""
        spacing = self.scheduler.config.get("timestep_spacing", "leading")
        spacing = spacing if spacing in ("leading", "trailing") else "leading"  # the inverse supports no other
        # With these, even the last step can be undone.
        undoable = {"set_alpha_to_one": False, "steps_offset": 1, "clip_sample": False, "thresholding": False}
        return self._scheduler_like(family, **undoable, timestep_spacing=spacing)

    def _scheduler_like(self, family: type, **changes) -> Any:
        """A scheduler of another class on the model's noise schedule.

        Plain values, since `from_config` replaces those that its own class has by default with defaults of `family`.
        """
        known = inspect.signature(family.__init__).parameters
        config = {name: value for name, value in {**self.scheduler.config, **changes}.items() if name in known}
        return family.from_config(config)

    def _corrections(self) -> dict[str, Any]:
        """What stock Stable Diffusion, but not SDXL, corrects in old scheduler configurations."""
        right = {"steps_offset": 1, "clip_sample": False} if self.text_encoder_2 is None else {}
        return {name: value for name, value in right.items() if name in self.scheduler.config}

    def _latents_shape(self, batch_size: int, size: tuple[int, int]) -> tuple[int, ...]:
        return (batch_size, self.unet.config.in_channels, *(side // self.vae_scale_factor for side in size))

    def _ddim_inversion(self, latents, condition, num_inference_steps: int, num_steps: int) -> torch.Tensor:
        """Takes latents (batch, ...) up the first `num_steps` of the deterministic path that DDIM follows down.

        Returns the path downwards, (num_steps + 1, batch, ...).
        """
        scheduler = self._deterministic(DDIMInverseScheduler)
        scheduler.set_timesteps(num_inference_steps, device=latents.device)
        path = [latents]
        for t in self._bar("Inverting", scheduler.timesteps[:num_steps]):
            prediction = self._unet_output(path[-1], t, condition)
            path.append(scheduler.step(prediction, t, path[-1]).prev_sample)
        return torch.stack(path[::-1])

    def _ddpm_inversion(
        self, latents, condition, scheduler, timesteps, eta: float, generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """A path of noised latents down to `latents`, (steps + 1, batch, ...), and the noise of each step, (steps,
        batch, ...), that leads from one point of the path to the next at this `eta`.

        "An Edit Friendly DDPM Noise Space" (Huberman-Spiegelglas et al., 2024): the query is noised independently for
        every step, and each step's noise is then solved for. These noises carry its layout, even under another prompt.
        """
        latents = latents.float()  # step noises are small differences divided by small numbers

        def noised(t: torch.Tensor) -> torch.Tensor:
            noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
            return scheduler.add_noise(latents, noise, t[None])

        step_noises, path = [], [*map(noised, timesteps), latents]
        predictions = self._predictions_along(path[:-1], timesteps, condition)
        for t, prediction, (here, there) in zip(timesteps, predictions, pairwise(path), strict=True):
            step = partial(scheduler.step, prediction, t, here, eta=eta)
            mean = step(variance_noise=torch.zeros_like(here)).prev_sample
            deviation = step(variance_noise=torch.ones_like(here)).prev_sample - mean
            step_noises.append(torch.where(deviation > 0, (there - mean) / deviation, 0))
        return torch.stack(path), torch.stack(step_noises)

    def _predictions_along(
        self, path: list[torch.Tensor], timesteps: torch.Tensor, condition: _Condition
    ) -> Iterator[torch.Tensor]:
        """The UNet's predictions (batch, ...) at each point of a known path, several at a time."""
        several = max(1, MOST_AT_ONCE // len(path[0]))
        with self._bar("Inverting", total=len(path)) as progress_bar:
            for latents, t in zip(_chunks(path, several), timesteps.split(several), strict=True):
                conditions = reduce(_Condition.followed_by, [condition] * len(latents))
                predictions = self._unet_output(torch.cat(latents), t.repeat_interleave(len(path[0])), conditions)
                yield from predictions.float().chunk(len(latents))
                progress_bar.update(len(latents))

    def _denoise(
        self,
        start: _Start,
        guidance: _Guidance,
        *,
        mask: Optional[torch.Tensor],
        eta: float,
        generator,
        callback: Optional[Callable],
        tensor_inputs: Sequence[str],
    ) -> torch.Tensor:
        """Denoises latents (batch, ...) under a mixture of prompts.

        Each step adds its fixed noise if there is one, and otherwise what the scheduler draws. Where the mask (batch,
        1, height, width) is false, each step ends on the query's own path.
        """
        latents, scheduler, timesteps = start.latents, start.scheduler, start.timesteps
        accepted = inspect.signature(scheduler.step).parameters
        extra = {name: value for name, value in (("eta", eta), ("generator", generator)) if name in accepted}
        apart = start.path is not None and guidance.lies_between
        shares = [share for share in guidance.shares if share]
        drawn = [latents] * len(shares)

        def step(latents: torch.Tensor, guidance: _Guidance) -> torch.Tensor:
            if start.step_noises is not None and guidance.changes_nothing and torch.equal(latents, start.path[i]):
                return start.path[i + 1]
            inputs = scheduler.scale_model_input(latents, t)
            prediction = self._guided(inputs, t, guidance).to(latents.dtype)
            latents = scheduler.step(prediction, t, latents, **extra).prev_sample
            return latents if mask is None else torch.where(mask, latents, start.path[i + 1])

        for i, t in enumerate(self._bar("Drawing", timesteps)):
            if self.interrupt:
                break
            if start.step_noises is not None:
                extra = {"eta": eta, "variance_noise": start.step_noises[i]}
            elif apart and eta > 0:  # the same noise for all stages
                noise = randn_tensor(latents.shape, generator=generator, device=latents.device, dtype=latents.dtype)
                extra = {"eta": eta, "variance_noise": noise}
            if apart:
                drawn = [step(each, stage) for each, stage in zip(drawn, guidance.apart(), strict=True)]
                latents = sum(share * each for share, each in zip(shares, drawn, strict=True))
            else:
                latents = step(latents, guidance)
            if callback is not None:
                given, guidance = self._call_back(callback, tensor_inputs, i, t, latents, guidance)
                drawn = [each + (given - latents) for each in drawn]
                latents = given
        return latents.to(self.unet.dtype)

    def _call_back(
        self, callback: Callable, tensor_inputs: Sequence[str], i: int, t: torch.Tensor, latents, guidance: _Guidance
    ) -> tuple[torch.Tensor, _Guidance]:
        """Lets a user's callback change the latents and the prompts; returns both."""
        condition, baseline = guidance.stages[-1], guidance.baseline
        negative = {f"negative_{name}": embeds for name, embeds in vars(baseline).items()}
        known, guidance_scale = {"latents": latents, **vars(condition), **negative}, self._guidance_scale
        changed = callback(self, i, t, {name: known[name] for name in tensor_inputs}) or {}
        if self._guidance_scale == 0 != guidance_scale:
            # By 0, diffusers' callbacks mean the prompt alone, which here is 1; 0 would be the baseline.
            self._guidance_scale = 1.0
        known |= changed
        if changed.keys() & vars(condition).keys():
            condition = _Condition(*(known[name] for name in vars(condition)))
        if changed.keys() & negative.keys():
            baseline = _Condition(*(known[name] for name in negative))
        return known["latents"], replace(guidance, stages=[*guidance.stages[:-1], condition], baseline=baseline)

    def _guided(self, inputs, t, guidance: _Guidance) -> torch.Tensor:
        """The weighted sum of the UNet's predictions (batch, ...)."""
        weights, conditions = zip(*guidance.weights(self.guidance_scale), strict=True)
        together = reduce(_Condition.followed_by, conditions)
        predictions = self._unet_output(torch.cat([inputs] * len(weights)), t, together).float().chunk(len(weights))
        if len(weights) == 1:
            return predictions[0]
        return sum(weight * prediction for weight, prediction in zip(weights, predictions, strict=True))

    def _conditions(
        self,
        prompts: list[str],
        *,
        source_prompt,
        negative_prompt,
        differences: list[tuple[DifferenceTokens, float]],
        negative_differences: list[tuple[DifferenceTokens, float]],
        has_query: bool,
        replace_phrases: bool,
    ) -> _Guidance:
        """The conditions for the UNet with their shares, batched over the prompts.

        A scale says how far to move from the UNet's prediction without the difference to its prediction with it.
        (Shorter rows would not be a smaller change, because the text encoder normalises them.) Several differences
        apply by decreasing scale: the stage with the first k has a share of scale k minus scale k + 1.
        """
        ways = [self._way(difference, scale, replace_phrases) for difference, scale in differences]
        ways = sorted(ways, key=lambda way: -way.degree)
        degrees = [1.0, *(way.degree for way in ways), 0.0]
        shares = [here - there for here, there in zip(degrees, degrees[1:], strict=False)]
        stages = [self._along(prompts, ways, active) for active in range(len(ways) + 1)]
        sources = prompts if source_prompt is None else self._repeated(source_prompt, len(prompts))
        own = stages[0] if source_prompt is None else self._along(sources, [], 0)
        nothing_negative = negative_prompt is None and not negative_differences
        if nothing_negative and has_query:
            return _Guidance(stages, shares, own, own)
        by_default = sources if has_query else ""
        negative_prompts = self._repeated(by_default if negative_prompt is None else negative_prompt, len(prompts))
        negatives = [self._way(difference, scale, False) for difference, scale in negative_differences]
        baseline = self._along(negative_prompts, negatives, len(negatives))
        return _Guidance(stages, shares, own, self._zeros_or_empty(baseline) if nothing_negative else baseline)

    def _way(self, difference: DifferenceTokens, scale: float, replace_phrases: bool) -> _Way:
        """How a difference is applied at a scale; a negative scale reverses it."""
        lost, gained = (
            [phrase for phrase in difference.metadata.get(name, "").splitlines() if phrase.strip()]
            for name in ("lost_phrases", "gained_phrases")
        )
        rows = self._rows(difference)
        if scale < 0:
            lost, gained = gained, lost
        backwards = (scale < 0) != (difference.metadata.get("negated") == "True")
        if backwards and (lost or gained):  # use the known words, which negated rows express less well
            rows = self._word_rows(gained, self._room())
        elif scale < 0:
            rows = -rows
        if not rows.any():  # zero rows would still affect a text encoder
            rows = rows[:0]
        return _Way(rows, lost if replace_phrases and scale else [], abs(scale))

    def _along(self, prompts: list[str], ways: list[_Way], active: int) -> _Condition:
        """Conditioning for prompts with the first `active` changes made, and the others still to come.

        The changes' phrases are taken out of the prompts. Those of later changes are said at the end, where the tokens
        will stand.
        """
        phrases = [phrase for way in ways for phrase in way.phrases]
        still = [phrase for way in ways[active:] for phrase in way.phrases]
        told = [" ".join(filter(None, [without_phrases(prompt, phrases), *still])) for prompt in prompts]
        for prompt, changed in zip(prompts, told, strict=True):
            if changed != prompt:
                logger.info("The prompt %r is read as %r after %d of %d changes.", prompt, changed, active, len(ways))
        rows = torch.cat([self._rows(None), *(way.rows for way in ways[:active])])
        self._warn_of_long_prompts(told, len(rows))
        return self._condition(told, rows.expand(len(told), -1, -1))

    def _begin(
        self,
        queries: Optional[torch.Tensor],
        source: _Condition,
        *,
        size: tuple[int, int],
        inversion: Optional[str],
        num_inference_steps: int,
        strength: float,
        eta: float,
        copies: int,
        generator,
        latents: Optional[torch.Tensor],
    ) -> _Start:
        """Where denoising starts: at the queries, inverted or noised, or at noise."""
        device, dtype = self._execution_device, self.unet.dtype
        # A copy, so that the caller's scheduler does not change.
        if inversion is None:
            scheduler = type(self.scheduler).from_config(self.scheduler.config, **self._corrections())
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
        clean = queries.to(dtype)
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
        """Mask of where the queries may change, 0 or 1 for each pixel (batch, 1, height, width)."""
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
        """How much the difference changes the UNet's predictions by place, (batch, 1, height, width), 0 to 1.

        After DiffEdit (Couairon et al., 2023), on the query's own path instead of fresh noise.
        """
        both, total = source.followed_by(condition), 0.0
        for i in torch.linspace(0, len(start.timesteps) - 1, NUM_MASK_STEPS).long().tolist():
            prediction = self._unet_output(torch.cat([start.path[i]] * 2), start.timesteps[i], both).float()
            unchanged, changed = prediction.chunk(2)
            total = total + (changed - unchanged).abs().mean(1, keepdim=True)
        smooth = F.avg_pool2d(F.pad(total, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
        return smooth / smooth.amax(dim=(2, 3), keepdim=True).clamp(min=1e-8)

    def _pictures(
        self, latents, mask: Optional[torch.Tensor], own: Optional[torch.Tensor], output_type: str, generator
    ) -> Any:
        """Decodes the answers; where the mask is black, they get the queries' own pixels."""
        with self._precise_vae():
            latents = latents.to(self.vae.dtype)
            mean, scale = self._latents_statistics(latents)
            pixels = self.vae.decode(latents / scale + mean, generator=generator).sample  # some decoders draw noise
        if mask is not None:
            own = own.repeat_interleave(len(pixels) // len(own), dim=0).to(pixels)
            pixels = torch.where(mask > 0, pixels, own)
        return self.image_processor.postprocess(pixels, output_type=output_type)

    # ------------------------------------------------------------------------------------------------- the call

    @taking_turns
    @torch.no_grad()
    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        image: Any = None,
        before: Any = None,
        after: Any = None,
        difference: Optional[Union[DifferenceTokens, str, os.PathLike, list]] = None,
        difference_scale: Union[float, list[float]] = 1.0,
        *,
        learning_kwargs: Optional[dict[str, Any]] = None,
        replace_phrases: bool = True,
        complete_prompts: bool = True,
        prompt: Optional[Union[str, list[str]]] = None,
        source_prompt: Optional[Union[str, list[str]]] = None,
        before_prompt: Optional[Union[str, list[str]]] = None,
        after_prompt: Optional[Union[str, list[str]]] = None,
        negative_prompt: Optional[Union[str, list[str]]] = None,
        negative_difference: Optional[Union[DifferenceTokens, str, os.PathLike, list]] = None,
        mask_image: Any = None,
        height: Optional[int] = None,
        width: Optional[int] = None,
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
        callback_on_step_end: Optional[Callable[[DiffusionPipeline, int, int, dict], dict]] = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> Union[DifferenceInversionPipelineOutput, tuple]:
        r"""
        Applies a difference to query images: one learned now from `before` and `after`, or a given one.

        Args:
            image: the query image B, or several; PIL images of any mode, arrays or tensors. If None, `prompt` and the
                difference make an image from noise.
            before: A; see [`invert_difference`], which learns from it.
            after: A'.
            difference: difference tokens, the path of a difference file, or a list of them to apply together.
            difference_scale: how much of the difference, or of each: 0 returns the query, 1 is the whole change, and
                values between interpolate in latents. (Without a query image they mix the UNet's predictions, as
                values above 1 do with one, at up to twice the cost.) Negative values undo the change on an image that
                has it, with the words that the pair lost; a difference without such words is negated (equation 8).
            learning_kwargs: other arguments of [`invert_difference`]: `num_tokens`, `init` and all of
                [`LearningConfig`], and `checkpoint`, `checkpointing_steps` and `callback_on_optimization_step`.
            replace_phrases: remove the words that the pair lost from the query's prompt, so that the tokens need not
                contradict them, and use them to describe the query as it is. Differences store these words as
                `metadata["lost_phrases"]`.
            complete_prompts: add words to the query's prompt for what it leaves out, so that this stays unchanged.
                CLIP proposes them, and those with which the UNet draws the query better are taken. Skipped without a
                CLIP, or if `source_prompt` is given. Ours, in place of the paper's PEZ prompts. Learning's default.
            prompt: describes the query, one for each image. If None, the captioner writes it.
            source_prompt: describes the query if `prompt` asks for another picture; by default `prompt` describes it.
                With both, no difference is needed: the words alone change the query.
            before_prompt, after_prompt: describe `before` and `after`.
            negative_prompt: what guidance leads away from. Defaults to the query's own prompt, so that guidance acts
                on the difference alone, or to the empty prompt if there is no query image. No effect at
                `guidance_scale` 1.
            negative_difference: difference tokens that guidance leads away from, appended to the negative prompt.
            mask_image: where the query may change (white or true) and where its pixels stay (black or false): an
                image, a matrix, or a list with one for each query, of any size. `"auto"`: where the difference changes
                the UNet's predictions most.
            height, width: size of the answer and of the pair, in pixels; defaults to their own, in whole latents.
            num_inference_steps: steps of inversion and of denoising.
            guidance_scale: how far to go from the baseline's prediction to the changed one. 1 is as far as the model
                says, with half the UNet's work; more exaggerates. Defaults to 1 for a query image and 7.5 for text to
                image.
            inversion: how the query becomes the starting point. `"ddpm"` finds the noise of each step that leads back
                to it, which keeps its layout best while the rest changes. `"ddim"` follows DDIM's own path back,
                without randomness. `"sdedit"` adds noise. None starts from `latents` or from noise.
            strength: how far up the schedule the query is taken, above 0 to 1; less keeps more of it.
            eta: how much of each step is noise, 0 (DDIM) to 1 (DDPM). Defaults to 0.5 for `inversion="ddpm"`, which
                needs some, and to 0 otherwise.
            num_images_per_prompt: answers for each query; they differ if noise is drawn.
            generator: makes results repeatable; a list has one for each answer.
            latents: to start from with `inversion=None`, (batch, channels, height / factor, width / factor).
            output_type: `"pil"`, `"np"`, `"pt"` or `"latent"`.
            return_dict: whether to return a [`DifferenceInversionPipelineOutput`] or a tuple.
            callback_on_step_end: called as `callback(pipe, step, timestep, tensors)` after each denoising step;
                tensors in the dictionary that it returns replace the pipeline's.
            callback_on_step_end_tensor_inputs: which of `latents`, `prompt_embeds` and `negative_prompt_embeds` it
                gets, and of SDXL's `pooled_prompt_embeds` and `negative_pooled_prompt_embeds`.

        Examples:

        Returns:
            [`DifferenceInversionPipelineOutput`] with `images` and `difference`, or the two as a tuple.

        Raises:
            ValueError, TypeError, FileNotFoundError: for invalid arguments, by name, before any model runs.
        """
        # 1. Check everything before any model runs
        if hasattr(callback_on_step_end, "tensor_inputs"):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        images, befores, afters = (
            [] if given is None else as_pictures(given, name)
            for name, given in (("image", image), ("before", before), ("after", after))
        )
        way_up = {"inversion": inversion, "num_inference_steps": num_inference_steps, "strength": strength}
        self.check_inputs(
            images,
            **way_up,
            prompt=prompt,
            source_prompt=source_prompt,
            negative_prompt=negative_prompt,
            mask_image=mask_image,
            height=height,
            width=width,
            guidance_scale=guidance_scale,
            eta=eta,
            num_images_per_prompt=num_images_per_prompt,
            generator=generator,
            latents=latents,
            output_type=output_type,
            callback_on_step_end_tensor_inputs=callback_on_step_end_tensor_inputs,
        )
        learns, by_words_alone = bool(befores or afters), bool(images) and None not in (prompt, source_prompt)
        asked = {"before_prompt": before_prompt, "after_prompt": after_prompt, "height": height, "width": width}
        differences, negative_differences = self._differences_to_apply(
            difference, difference_scale, negative_difference, learns=learns, by_words_alone=by_words_alone
        )
        learning = self._learning_options(befores, afters, learning_kwargs, complete_prompts, generator, asked)
        if guidance_scale is None:
            guidance_scale = 1.0 if images else 7.5
        for name, led in (("negative_prompt", negative_prompt), ("negative_difference", negative_difference)):
            if guidance_scale == 1 and led is not None:
                logger.warning("`%s` has no effect at a `guidance_scale` of 1; give more.", name)
        way_up["inversion"] = inversion if images else None
        if eta is None:
            eta = DDPM_ETA if way_up["inversion"] == "ddpm" else 0.0

        # 2. The queries' prompts, if they are not given
        (prompts,) = self._write_prompts((images, prompt))

        # 3. Learn the difference, if it is not given
        self.interrupted_difference = None
        if learns:
            learned = self.invert_difference(befores, afters, generator=generator, **learning)
            self.interrupted_difference = learned  # until the call has ended
            if self._stopped:
                raise KeyboardInterrupt("The difference learned so far is `pipe.interrupted_difference`.")
            differences = self._resolve_difference(learned, difference_scale)
        applied = sum((d for d, _ in differences[1:]), differences[0][0]) if differences else None
        self._interrupt, self._guidance_scale = False, guidance_scale

        # 4. Words for what the queries' prompts leave out
        size = self._common_size(images, "image", height, width)
        queries = self._encode_images(images, "image", size) if images else None
        if images and complete_prompts and source_prompt is None:
            ways = [self._way(d, scale, replace_phrases) for d, scale in differences]
            prompts = self._completed(prompts, images, queries, [phrase for way in ways for phrase in way.phrases])

        # 5. Conditioning: the query's prompt with the difference, without it, and what guidance leads away from
        guidance = self._conditions(
            prompts,
            source_prompt=source_prompt,
            negative_prompt=negative_prompt,
            differences=differences,
            negative_differences=negative_differences,
            has_query=bool(images),
            replace_phrases=replace_phrases,
        )

        # 6. Where denoising starts
        randomness = {"eta": eta, "generator": generator}
        copies = num_images_per_prompt
        start = self._begin(queries, guidance.own, size=size, copies=copies, latents=latents, **way_up, **randomness)
        self._num_timesteps = len(start.timesteps)
        guidance = guidance.repeat(copies)
        mask = self._mask(mask_image, images, size, start, guidance.stages[-1], guidance.own)

        # 7. Denoise along the difference
        places = None if mask is None else F.max_pool2d(mask, self.vae_scale_factor) > 0
        watching = {"callback": callback_on_step_end, "tensor_inputs": callback_on_step_end_tensor_inputs}
        latents = self._denoise(start, guidance, mask=places, **randomness, **watching)

        # 8. Pixels
        own = None if mask is None or output_type == "latent" else self._pixels(images, size)
        answers = latents if output_type == "latent" else self._pictures(latents, mask, own, output_type, generator)
        self.maybe_free_model_hooks()
        self.interrupted_difference = None
        if not return_dict:
            return answers, applied
        return DifferenceInversionPipelineOutput(images=answers, difference=applied)


def _chunks(items: list, size: int) -> list[list]:
    return [items[start : start + size] for start in range(0, len(items), size)]


def _features(output: Any) -> torch.Tensor:
    """CLIP's projected features, which transformers 5 wraps in an output object and transformers 4 does not."""
    return output if isinstance(output, torch.Tensor) else output.pooler_output
