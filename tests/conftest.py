# Copyright 2026 The Difference Inversion Authors. Licensed under the Apache License, Version 2.0.
"""Small random models in Stable Diffusion's layout, with real classes throughout, and pictures to put into them."""

import functools
import io
import json
import logging
import os
import pickle
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest


# Before torch is imported: a worker has one core, and so has each process that its tests start. Two threads that wait for
# each other while another worker has their core took five times as long.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch  # noqa: E402


ROOT = Path(__file__).resolve().parent.parent
STORYBOOK = ROOT / "examples" / "storybook"
sys.path[:0] = [str(ROOT), str(ROOT / "examples"), str(STORYBOOK)]
# Set before diffusers is imported: tests ask no network, and leave no copies of the pipeline in the user's cache.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_MODULES_CACHE"] = tempfile.mkdtemp(prefix="modules_")

from hub import hub  # noqa: E402, F401, a fixture
from PIL import Image, ImageDraw  # noqa: E402
from transformers import (  # noqa: E402
    BertTokenizer,
    BlipConfig,
    BlipForConditionalGeneration,
    BlipImageProcessor,
    BlipProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTokenizer,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
)

from diffusers import AutoencoderKL, DDIMScheduler, UNet2DConditionModel  # noqa: E402
from pipeline_difference_inversion import (  # noqa: E402
    DifferenceInversionPipeline,
    DifferenceTokens,
    LearningConfig,
)


WIDTH = 16  # of the text encoder, and so of a difference
SIDE = 32  # pixels
FACTOR = 8  # pixels a latent
PIPELINE_FILE = ROOT / "pipeline_difference_inversion.py"


def build_tokenizer() -> CLIPTokenizer:
    return CLIPTokenizer.from_pretrained(STORYBOOK / "model" / "tokenizer")


def load_clip() -> CLIPModel:
    """One of `build_clip`, from a file, since other versions of transformers make other weights of the same seed."""
    return CLIPModel.from_pretrained(ROOT / "tests" / "clip").eval()


def build_clip(tokenizer: CLIPTokenizer, width: int = WIDTH, seed: int = 1) -> CLIPModel:
    torch.manual_seed(seed)
    tower = {
        "hidden_size": width,
        "intermediate_size": 2 * width,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "projection_dim": width,
    }
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": tokenizer.model_max_length,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    vision = {"image_size": SIDE, "patch_size": 8}
    clip = CLIPModel(CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=width))
    with torch.no_grad():  # as large as positions, so that words count as they do after training
        clip.text_model.embeddings.token_embedding.weight.normal_(std=0.3)
    return clip.eval()


def build_text_encoder(clip: CLIPModel) -> CLIPTextModel:
    """Clip's text tower, with the same weights, as in Stable Diffusion."""
    encoder, tower = CLIPTextModel(clip.config.text_config), clip.text_model.state_dict()
    # Before transformers 5.6 the text model's own names began with "text_model.".
    encoder.load_state_dict({name: tower[name.removeprefix("text_model.")] for name in encoder.state_dict()})
    return encoder.eval()


def build_vae(seed: int = 2) -> AutoencoderKL:
    torch.manual_seed(seed)
    return AutoencoderKL(
        block_out_channels=(4, 4, 8, 8),
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=2,
        sample_size=SIDE,
        scaling_factor=1.3,
    ).eval()


def build_unet(width: int = WIDTH, seed: int = 3) -> UNet2DConditionModel:
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=SIDE // FACTOR,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        attention_head_dim=4,
        norm_num_groups=4,
        cross_attention_dim=width,
    )
    with torch.no_grad():  # a random model hardly listens to its prompt; make this one listen
        for name, parameter in unet.named_parameters():
            if "attn2" in name and name.endswith("weight"):
                parameter.mul_(4)
    return unet.eval()


def build_scheduler(prediction_type: str = "epsilon") -> DDIMScheduler:
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        prediction_type=prediction_type,
    )


def build_captioner() -> tuple[BlipForConditionalGeneration, BlipProcessor]:
    """Says many words about a picture: always the same about the same one, and others about another."""
    torch.manual_seed(4)
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    words = ["a", "red", "blue", "yellow", "cabin", "castle", "boat", "on", "snow", "grass", "by", "day", "night"]
    tokenizer = BertTokenizer(vocab={word: index for index, word in enumerate(special + words)})
    tower = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {
        "vocab_size": len(tokenizer),
        "max_position_embeddings": 128,
        "encoder_hidden_size": 16,
        "bos_token_id": tokenizer.cls_token_id,
        "eos_token_id": tokenizer.sep_token_id,
        "sep_token_id": tokenizer.sep_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "initializer_range": 1.0,
    }
    vision = {"image_size": SIDE, "patch_size": 8, "initializer_range": 1.0}
    captioner = BlipForConditionalGeneration(
        BlipConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=16)
    )
    with torch.no_grad():  # words only: it goes on for as long as it may
        captioner.text_decoder.cls.predictions.bias[: len(special)] = -1e4
    processor = BlipProcessor(BlipImageProcessor(size={"height": SIDE, "width": SIDE}), tokenizer)
    return captioner.eval(), processor


CHAT = (
    "{% for message in messages %}user {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image> {% else %}{{ part['text'] }} {% endif %}{% endfor %}"
    "{% endfor %}{% if add_generation_prompt %}assistant{% endif %}"
)
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
VISION = TOWER | {"image_size": SIDE, "patch_size": 8}


def with_image_token(tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedTokenizerBase:
    tokenizer = tokenizer or build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    return tokenizer


def build_chat_captioner(
    tokenizer: PreTrainedTokenizerBase | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """A model that converses, small and random: it answers a picture and a question with words."""
    torch.manual_seed(6)
    tokenizer = with_image_token(tokenizer)
    text = TOWER | {"vocab_size": len(tokenizer), "num_key_value_heads": 2, "initializer_range": 1.0}
    text |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    config = LlavaConfig(
        vision_config=VISION | {"model_type": "clip_vision_model"},
        text_config=text | {"model_type": "llama"},
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
        vision_feature_layer=-1,
    )
    size = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    processor = LlavaProcessor(
        image_processor,
        tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    )
    return LlavaForConditionalGeneration(config).eval(), processor


@functools.cache
def _components() -> "_Parts":
    tokenizer, clip = build_tokenizer(), load_clip()
    size = {"height": SIDE, "width": SIDE}
    image_processor = CLIPImageProcessor(size={"shortest_edge": SIDE}, crop_size=size)
    return _Parts(
        {
            "vae": build_vae(),
            "text_encoder": build_text_encoder(clip),
            "tokenizer": tokenizer,
            "unet": build_unet(),
            "clip": clip,
            "clip_processor": CLIPProcessor(image_processor, tokenizer),
        }
    )


class _Parts(pickle.Pickler):
    """Writes parts once, for `load` to make copies of; `copy.deepcopy` takes several times as long."""

    def __init__(self, parts: dict):
        self.file, self.weights = io.BytesIO(), []
        super().__init__(self.file)
        self.dump(parts)

    def persistent_id(self, value):
        if isinstance(value, torch.Tensor):
            self.weights.append(value)
            return len(self.weights) - 1

    def load(self) -> dict:
        """The parts, with weights, hooks and configuration of their own."""
        reader = pickle.Unpickler(io.BytesIO(self.file.getvalue()))
        reader.persistent_load = self._weight
        return reader.load()

    def _weight(self, index: int) -> torch.Tensor:
        weight = self.weights[index]
        own = weight.detach().clone()
        return torch.nn.Parameter(own, weight.requires_grad) if isinstance(weight, torch.nn.Parameter) else own


def build_components(prediction_type: str = "epsilon") -> dict:
    """Everything that learning and applying need, but no captioner; nothing is shared with other tests."""
    return _components().load() | {"scheduler": build_scheduler(prediction_type)}


def build_pipeline(prediction_type: str = "epsilon", **components) -> DifferenceInversionPipeline:
    optional = dict.fromkeys(DifferenceInversionPipeline._optional_components)
    pipe = DifferenceInversionPipeline(**optional | build_components(prediction_type) | components)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(color: str = "red", sky: str = "navy", size: tuple[int, int] = (SIDE, SIDE)) -> Image.Image:
    """A house on a lawn; width and height in pixels."""
    width, height = size
    image = Image.new("RGB", size, sky)
    draw = ImageDraw.Draw(image)
    draw.rectangle((0, height * 5 // 8, width, height), fill="green")
    draw.rectangle((width // 4, height // 4, width // 2, height * 3 // 4), fill=color)
    return image


def save_triplets(folder: Path, colors: Iterable[str]) -> None:
    """`triplets.jsonl`, with a line and three pictures for each colour."""
    lines = []
    for index, color in enumerate(colors):
        pictures = {"before": picture("red"), "after": picture(color), "image": picture("blue", color)}
        for name, image in pictures.items():
            image.save(folder / f"{index}_{name}.png")
        lines.append({name: f"{index}_{name}.png" for name in pictures})
    (folder / "triplets.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def random_tokens(num_tokens: int = 2, width: int = WIDTH, seed: int = 5, scale: float = 0.5) -> DifferenceTokens:
    rows = scale * torch.randn(num_tokens, width, generator=torch.Generator().manual_seed(seed))
    return DifferenceTokens({"<difference>": rows}, {"before_prompt": "a cabin", "after_prompt": "a castle"})


def rows_of(difference) -> torch.Tensor:
    (rows,) = difference.embeddings.values()
    return rows


def embedded(pipe, prompts, rows: torch.Tensor | None = None) -> torch.Tensor:
    """The text encoder's hidden states (batch, length, dim) of prompts that end in rows (num_tokens, dim), zeros too."""
    if rows is None:
        return pipe.encode_prompt(prompts, do_classifier_free_guidance=False)[0]
    prompts = [prompts] if isinstance(prompts, str) else prompts
    return pipe._condition(prompts, rows.expand(len(prompts), -1, -1)).prompt_embeds


LEARNING = {*LearningConfig.__dataclass_fields__, "callback_on_optimization_step"}


def analogy(pipe, **options):
    """Learns a difference and applies it in one call; what is of learning may stand among the other arguments."""
    learning = {name: options.pop(name) for name in LEARNING & options.keys()}
    return pipe(**options, learning_kwargs=learning)


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@contextmanager
def watched(pipe) -> Iterator[list[set[str]]]:
    """While open, which models are on the device, from one move to the next; a model that works elsewhere is an error.

    The device is a processor here, "cpu:0", and where models wait is "cpu".
    """
    models = {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}
    present, history, move = set(), [], torch.nn.Module.to

    def to(module, *arguments, **options):
        for name, model in models.items():
            if module is model and isinstance(arguments[0], (str, torch.device)):
                (present.add if torch.device(arguments[0]).index == 0 else present.discard)(name)
                history.append(set(present))
        return move(module, *arguments, **options)

    def must_be_present(name):
        def check(*_):
            assert name in present, f"{name} works while {present} are on the device"

        return check

    # Every part that has weights: before it goes forwards, and once it has been backwards.
    working = [(name, part) for name, model in models.items() for part in model.modules() if part._parameters]
    hooks = [part.register_forward_pre_hook(must_be_present(name)) for name, part in working]
    hooks += [part.register_full_backward_hook(must_be_present(name)) for name, part in working]
    torch.nn.Module.to = to
    try:
        yield history
    finally:
        torch.nn.Module.to = move
        for hook in hooks:
            hook.remove()


@contextmanager
def forward_calls(*modules: torch.nn.Module):
    """A list that grows by (module, arguments, keyword arguments, output, gradients wanted) with every call."""
    calls = []

    def note(module, arguments, keywords, output):
        calls.append((module, arguments, keywords, output, torch.is_grad_enabled()))

    hooks = [module.register_forward_hook(note, with_kwargs=True) for module in modules]
    try:
        yield calls
    finally:
        for hook in hooks:
            hook.remove()


@pytest.fixture(autouse=True)
def hear_ctrl_c():
    """Shells start background jobs deaf to it, and tests press it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@contextmanager
def logged(name: str = "pipeline_difference_inversion", level: int = logging.WARNING):
    """The pipeline's log lines, as texts; by default those that users see who set nothing."""
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger(name)
    earlier = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(earlier)


def pytest_unconfigure():
    shutil.rmtree(os.environ["HF_MODULES_CACHE"], ignore_errors=True)


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    """Models this small are slowed down by threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def pipe() -> DifferenceInversionPipeline:
    """Predicts noise; has CLIP, no captioner."""
    return build_pipeline()


@pytest.fixture(params=["epsilon", "v_prediction"])
def either_pipe(request) -> DifferenceInversionPipeline:
    """Predicts noise, then velocity."""
    return build_pipeline(request.param)


@pytest.fixture
def pair() -> dict:
    """Arguments of learning that name a before, an after and their prompts."""
    return {
        "before": picture("red"),
        "after": picture("yellow"),
        "before_prompt": "a red cabin",
        "after_prompt": "a yellow castle on snow",
    }
