# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Other ways to learn and to apply than the pipeline's own, for `benchmark.py --config variant=NAME`.

Each is the pipeline but for a method or a few. What they were worth is in RESULTS.md.
"""

import dataclasses
import random
import re

import torch
import torch.nn.functional as F
from diffusers.utils.torch_utils import randn_tensor

from pipeline_difference_inversion import RANDOM_INIT_SCALE, DifferenceInversionPipeline


# ------------------------------------------------------------------------------------------- where the tokens are


class TokensFirst(DifferenceInversionPipeline):
    """[D; P]: the tokens stand before the prompt."""

    def _place_rows(self, *arguments, **options):
        input_ids, slots = super()._place_rows(*arguments, **options)
        rank = 2 - slots.int()
        rank[:, 0] = 0  # the start token
        order = rank.argsort(dim=1, stable=True)
        return input_ids.gather(1, order), slots.gather(1, order)


class CommaBefore(DifferenceInversionPipeline):
    """[P, ","; D], as people write tokens."""

    def _encode(self, prompts, rows):
        return super()._encode([f"{prompt}," if prompt else "" for prompt in prompts], rows)


class OutputRows(DifferenceInversionPipeline):
    """The tokens are rows of the text encoder's output, after the prompt's end token, as VISII learns its own."""

    def _encode(self, prompts, rows):
        condition = super()._encode(prompts, rows[:, :0])
        _, slots = self._place_rows(self.tokenizer, prompts, rows.shape[1], rows.device)
        hidden_states = condition.prompt_embeds.clone()
        hidden_states[slots.roll(1, dims=1)] = rows.flatten(0, 1).to(hidden_states)
        return dataclasses.replace(condition, prompt_embeds=hidden_states)

    def _token_features(self, tokens, example):
        return [F.normalize(self.clip.text_projection(tokens.mean(0)), dim=-1)]

    def _initial_tokens(self, num_tokens, init, words, generator):
        rows = super()._initial_tokens(num_tokens, init, words[:0], generator)
        table = self.text_encoder.get_input_embeddings().weight
        return (
            rows
            / (RANDOM_INIT_SCALE * table.float().std())
            * super()._encode([""], rows[None, :0]).prompt_embeds.std()
        )


class NoZeroRows(DifferenceInversionPipeline):
    """The query is inverted under its bare prompt, and guidance leads away from that."""

    def _condition(self, prompts, rows=None):
        return super()._condition(prompts, None if rows is None or not rows.any() else rows)


# ------------------------------------------------------------------------------------------ what tokens may become


class Bounded(DifferenceInversionPipeline):
    """No token is longer than a word of the vocabulary in the mean."""

    def _as_used(self, tokens):
        bound = self.text_encoder.get_input_embeddings().weight.float().norm(dim=1).mean()
        return tokens * (bound / tokens.norm(dim=1, keepdim=True)).clamp(max=1)

    def _losses(self, tokens, example, draw, goal):
        return super()._losses(self._as_used(tokens), example, draw, goal)

    def _optimize(self, *arguments):
        tokens, loss = super()._optimize(*arguments)
        return self._as_used(tokens), loss


class Decay(DifferenceInversionPipeline):
    """Adam with weight decay, as textual inversion has it."""

    weight_decay = 1e-2

    def _optimizer(self, tokens, learning_rate, num_steps):
        optimizer = torch.optim.AdamW([tokens], lr=learning_rate, weight_decay=self.weight_decay)
        return optimizer, torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, num_steps)


class StrongDecay(Decay):
    """Enough to halve a row in 60 steps at 0.01, nearly."""

    weight_decay = 1.0


class ConstantRate(DifferenceInversionPipeline):
    """The learning rate stays what it is."""

    def _optimizer(self, tokens, learning_rate, num_steps):
        optimizer, _ = super()._optimizer(tokens, learning_rate, num_steps)
        return optimizer, torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)


class WarmUp(DifferenceInversionPipeline):
    """The learning rate rises to its highest in a tenth of the steps, and falls to zero after."""

    def _optimizer(self, tokens, learning_rate, num_steps):
        optimizer, _ = super()._optimizer(tokens, learning_rate, num_steps)
        return optimizer, torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, num_steps + 1, pct_start=0.1)


# ----------------------------------------------------------------------------------------- what they are learned from


class ClipDirection(DifferenceInversionPipeline):
    """CLIP's loss is of the way from P_A to [P_A; D], in place of D alone."""

    def _token_features(self, tokens, example):
        encoder, prompts = self._encoders[0], [example.before_prompt]
        alone, with_tokens = (
            self._clip_text_features(encoder, prompts, rows[None])[0] for rows in (tokens[:0], tokens)
        )
        return [with_tokens - alone]


class SeveralPrompts(DifferenceInversionPipeline):
    """At each step the prompts have lost a phrase now and then, and their order, so that tokens lean on no wording."""

    def _token_consistency_loss(self, tokens, example, draw, lambda_before):
        rng = random.Random(float(draw.noise.flatten()[0]))  # the judge's fixed draw has fixed prompts with it
        names = ("before_prompt", "after_prompt")
        reworded = {name: reword(getattr(example, name), rng) for name in names}
        return super()._token_consistency_loss(tokens, dataclasses.replace(example, **reworded), draw, lambda_before)


def reword(prompt: str, rng: random.Random) -> str:
    """A prompt's phrases in another order, a quarter of them left out; the first, which names the subject, stays."""
    first, *phrases = re.split(r",\s*|\s+(?=(?:on|at|in|by|with|under)\b)", prompt)
    kept = [phrase for phrase in phrases if rng.random() > 0.25]
    return ", ".join([first, *rng.sample(kept, len(kept))])


class OwnNoise(DifferenceInversionPipeline):
    """A is drawn under another noise than A'."""

    def _predict(self, latents, prompts, rows, draw):
        if len(prompts) == 1:
            return super()._predict(latents, prompts, rows, draw)
        draws = (draw, dataclasses.replace(draw, noise=draw.noise.roll(draw.noise.shape[-1] // 2, dims=-1)))
        parts = [
            super(OwnNoise, self)._predict(latents[i : i + 1], prompts[i : i + 1], rows[i : i + 1], own)
            for i, own in enumerate(draws)
        ]
        return tuple(torch.cat(part) for part in zip(*parts, strict=True))


class _SomeTimeSteps(DifferenceInversionPipeline):
    stretch = (0.0, 1.0)  # of the schedule, from the clean end

    def _draw(self, latents, samples, generator, jitter=True):
        draw = super()._draw(latents, samples, generator, jitter)
        low, high = (bound * self.scheduler.config.num_train_timesteps for bound in self.stretch)
        return dataclasses.replace(draw, timesteps=(low + draw.timesteps * (self.stretch[1] - self.stretch[0])).long())


class NoisierHalf(_SomeTimeSteps):
    """Tokens are learned on the noisier half of the time steps."""

    stretch = (0.5, 1.0)


class CleanerHalf(_SomeTimeSteps):
    """Tokens are learned on the cleaner half of the time steps."""

    stretch = (0.0, 0.5)


class TellingTimeSteps(DifferenceInversionPipeline):
    """Time steps are drawn as often as the prompt of A' then changes the prediction for A', against that of A."""

    stretches = torch.linspace(0.1, 1, 10)  # which share of the draws is below each tenth of the schedule

    def _optimize(self, tokens, goal, *arguments):
        example, count = goal.examples[0], 10
        draw = super()._draw(example.after_latents, count, None, jitter=False)
        latents = torch.cat([example.after_latents] * 2)
        rows = tokens.detach()[None, :0].expand(2, -1, -1)
        prediction, _ = self._predict(latents, [example.before_prompt, example.after_prompt], rows, draw)
        telling = (prediction[1] - prediction[0]).square().flatten(1).mean(1)
        self.stretches = (telling / telling.sum()).cumsum(0).clamp(max=1)
        return super()._optimize(tokens, goal, *arguments)

    def _draw(self, latents, samples, generator, jitter=True):
        draw = super()._draw(latents, samples, generator, jitter)
        total = self.scheduler.config.num_train_timesteps
        places = draw.timesteps / total  # even in 0 to 1, then through the inverse of the stretches' share
        bounds = F.pad(self.stretches, (1, 0))
        index = torch.searchsorted(self.stretches, places).clamp(max=len(self.stretches) - 1)
        within = (places - bounds[index]) / (bounds[index + 1] - bounds[index]).clamp(min=1e-6)
        timesteps = ((index + within) / len(self.stretches) * total).long().clamp(0, total - 1)
        return dataclasses.replace(draw, timesteps=timesteps)


class NearRandom(DifferenceInversionPipeline):
    """Random rows begin as far out as the vocabulary's."""

    def _initial_tokens(self, num_tokens, init, words, generator):
        table = self.text_encoder.get_input_embeddings().weight.float()
        shape = (num_tokens - len(words), table.shape[1])
        return torch.cat([randn_tensor(shape, generator=generator, device=table.device) * table.std(), words])


VARIANTS = {
    "first": TokensFirst,
    "comma": CommaBefore,
    "output": OutputRows,
    "no_zero_rows": NoZeroRows,
    "bounded": Bounded,
    "decay": Decay,
    "strong_decay": StrongDecay,
    "constant_rate": ConstantRate,
    "warm_up": WarmUp,
    "clip_direction": ClipDirection,
    "several_prompts": SeveralPrompts,
    "own_noise": OwnNoise,
    "noisier_half": NoisierHalf,
    "cleaner_half": CleanerHalf,
    "telling_time_steps": TellingTimeSteps,
    "near_random": NearRandom,
}


def variant_of(pipe: DifferenceInversionPipeline, name: str) -> DifferenceInversionPipeline:
    """The variant with the pipeline's own components."""
    variant = VARIANTS[name](**pipe.components)
    variant.set_progress_bar_config(disable=True)
    return variant
