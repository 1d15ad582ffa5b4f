# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Publishes the pipeline, or Storybook with the pipeline beside it, to the Hugging Face Hub.

    python examples/publish.py pipeline USER/NAME
    python examples/publish.py storybook USER/NAME
    python examples/publish.py storybook USER/NAME --dry-run FOLDER    # only writes what would go up

The first is loaded by `DiffusionPipeline.from_pretrained(BASE_MODEL, custom_pipeline="USER/NAME",
trust_remote_code=True)`, the second by `DiffusionPipeline.from_pretrained("USER/NAME", trust_remote_code=True)`. Log in
first, by `hf auth login`. A difference is published by its own `difference.push_to_hub("USER/NAME")`.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

from huggingface_hub import HfApi


ROOT = Path(__file__).resolve().parents[1]
PIPELINE_FILE = ROOT / "pipeline_difference_inversion.py"


def write_pipeline(folder: Path, repo_id: str) -> None:
    """The pipeline under the name that diffusers looks for, and the card, which then names the repository."""
    shutil.copy(PIPELINE_FILE, folder / "pipeline.py")
    shutil.copy(ROOT / "LICENSE", folder)
    card = (ROOT / "model_card.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(card.replace(f'"{PIPELINE_FILE.name}"', f'"{repo_id}"'), encoding="utf-8")


def write_storybook(folder: Path, repo_id: str) -> None:
    """The checkpoint, whose index says that its class is in the file beside it."""
    shutil.copytree(ROOT / "examples" / "storybook" / "model", folder, dirs_exist_ok=True)
    shutil.copy(PIPELINE_FILE, folder / "pipeline.py")
    shutil.copy(ROOT / "LICENSE", folder)
    path = folder / "model_index.json"
    index = json.loads(path.read_text())
    index["_class_name"] = ["pipeline", index["_class_name"]]
    path.write_text(json.dumps(index, indent=2) + "\n")


WRITERS = {"pipeline": write_pipeline, "storybook": write_storybook}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=list(WRITERS))
    parser.add_argument("repo_id", metavar="USER/NAME")
    parser.add_argument("--dry-run", type=Path, metavar="FOLDER", help="write there, and upload nothing")
    parser.add_argument("--private", action="store_true", help="if the repository is made now")
    options = parser.parse_args()
    if options.dry_run:
        options.dry_run.mkdir(parents=True, exist_ok=True)
        WRITERS[options.what](options.dry_run, options.repo_id)
        print(f"{options.dry_run} holds what would go to {options.repo_id}.")
        return
    api = HfApi()
    api.create_repo(options.repo_id, private=options.private, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        WRITERS[options.what](Path(folder), options.repo_id)
        print(api.upload_folder(repo_id=options.repo_id, folder_path=folder))


if __name__ == "__main__":
    main()
