# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Publishes the pipeline, Storybook with the pipeline beside it, or a difference with its card, to the Hugging Face Hub.

    python examples/publish.py pipeline USER/NAME
    python examples/publish.py storybook USER/NAME
    python examples/publish.py difference USER/NAME --file difference.safetensors --before a.png --after b.png
    python examples/publish.py storybook USER/NAME --dry-run FOLDER    # only writes what would go up

The first is loaded by `DiffusionPipeline.from_pretrained(BASE_MODEL, custom_pipeline="USER/NAME",
trust_remote_code=True)`, the second by `DiffusionPipeline.from_pretrained("USER/NAME", trust_remote_code=True)`, and the
third by `pipe.load_difference("USER/NAME")`. Log in first, by `hf auth login`. The card of a difference says how it was
learned, and shows the two pictures if they are given.
"""

import argparse
import json
import re
import shutil
import tempfile
from pathlib import Path

from common import STORYBOOK, loading, make_folder, read_picture, told_in_one_line
from huggingface_hub import HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from PIL import Image

from pipeline_difference_inversion import DifferenceTokens


ROOT = Path(__file__).resolve().parents[1]
PIPELINE_FILE = ROOT / "pipeline_difference_inversion.py"


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


def write_pipeline(folder: Path, repo_id: str) -> None:
    """The pipeline under the name that diffusers looks for, and the card, which then names the repository."""
    shutil.copy(PIPELINE_FILE, folder / "pipeline.py")
    shutil.copy(ROOT / "LICENSE", folder)
    card = (ROOT / "model_card.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace(f'"{PIPELINE_FILE.name}"', f'"{repo_id}"'), encoding="utf-8")


def write_storybook(folder: Path, repo_id: str) -> None:
    """The checkpoint, the pipeline, and its card, which then names the repository and has its pictures beside it."""
    shutil.copytree(STORYBOOK, folder, dirs_exist_ok=True)
    add_code(folder)
    card = (STORYBOOK / "README.md").read_text(encoding="utf-8")
    card = card.replace(f'"{STORYBOOK.relative_to(ROOT).as_posix()}"', f'"{repo_id}"')
    (folder / "README.md").write_text(bring_pictures(card, STORYBOOK, folder), encoding="utf-8")


def bring_pictures(card: str, source: Path, folder: Path) -> str:
    """A card of `source` whose pictures are copied to `folder`; of links to what else the project has, the words stay."""

    def mend(link: re.Match) -> str:
        shown, words, path = link.groups()
        if not shown:
            return words
        return f"![{words}]({Path(shutil.copy(source / path, folder)).name})"

    return re.sub(r"(!?)\[([^]]*)\]\((?!https?://|#)([^)]+)\)", mend, card)


def add_code(folder: Path) -> None:
    """Puts the pipeline beside a checkpoint, whose index then says that its class is there."""
    shutil.copy(PIPELINE_FILE, folder / "pipeline.py")
    shutil.copy(ROOT / "LICENSE", folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = ["pipeline", index["_class_name"]]
    path.write_text(json.dumps(index, indent=2) + "\n")


WRITERS = {"pipeline": write_pipeline, "storybook": write_storybook}


def write_difference(
    folder: Path, repo_id: str, difference: DifferenceTokens, pictures: dict[str, Image.Image]
) -> None:
    """The file, the pictures, and a card that says how it was learned."""
    difference.save_pretrained(folder)
    for name, image in pictures.items():
        image.save(folder / f"{name}.png")
    card_of(difference, repo_id, list(pictures)).save(folder / "README.md")


def card_of(difference: DifferenceTokens, repo_id: str, pictures: list[str]) -> ModelCard:
    metadata = difference.metadata
    base_model = metadata.get("base_model", "")
    about = ModelCardData(
        library_name="diffusers",
        pipeline_tag="image-to-image",
        base_model=base_model if "/" in base_model else None,  # a name without one is a folder's, not the Hub's
        tags=["diffusers", "textual-inversion", "difference-tokens"],
    )
    change = [metadata.get(f"{name}_prompt", "") for name in ("before", "after")]
    settings = [(name, value) for name, value in sorted(metadata.items()) if value]
    rows = "\n".join(f"| {name} | {' / '.join(value.splitlines()).replace('|', ' ')} |" for name, value in settings)
    shown = (
        f"| {' | '.join(pictures)} |\n{'|---' * len(pictures)}|\n"
        f"| {' | '.join(f'![{name}]({name}.png)' for name in pictures)} |\n\n"
    )
    text = CARD.format(
        title=" → ".join(change) if all(change) else repo_id,
        pictures=shown if pictures else "",
        base_model=base_model or "its base model",
        repo_id=repo_id,
        stock=(STOCK if len(difference.embeddings) == 1 else STOCK_TWO_ENCODERS).format(repo_id=repo_id),
        settings=f"| setting | value |\n|---|---|\n{rows}",
    )
    return ModelCard(f"---\n{about.to_yaml()}\n---\n\n{text}")


def check_repository(name: str) -> None:
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"USER/NAME: {error}") from error


def read_difference(file: Path) -> DifferenceTokens:
    with loading("--file", file, "a difference's safetensors file"):
        return DifferenceTokens.load(file)


@told_in_one_line()
def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=[*WRITERS, "difference"])
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--file", type=Path, help="the difference's")
    parser.add_argument("--before", type=Path, metavar="PICTURE", help="before the change, for its card")
    parser.add_argument("--after", type=Path, metavar="PICTURE", help="after it")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write there, and upload nothing")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    options = parser.parse_args(arguments)
    pictures = {name: getattr(options, name) for name in ("before", "after") if getattr(options, name)}
    if (options.what == "difference") != (options.file is not None) or (pictures and options.file is None):
        parser.error("--file is the difference that `difference` publishes, and --before and --after are its pictures")
    check_repository(options.repo_id)
    pictures = {name: read_picture(str(path), f"--{name}") for name, path in pictures.items()}
    difference = read_difference(options.file) if options.file else None

    def write(folder: Path) -> None:
        if difference is None:
            WRITERS[options.what](folder, options.repo_id)
        else:
            write_difference(folder, options.repo_id, difference, pictures)

    if options.dry_run:
        write(make_folder(options.dry_run, "--dry-run"))
        print(f"{options.dry_run} holds what would go to {options.repo_id}.")
        return
    api = HfApi()
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        api.create_repo(options.repo_id, private=options.private, exist_ok=True)
        print(api.upload_folder(repo_id=options.repo_id, folder_path=folder))


if __name__ == "__main__":
    main()
