import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn


@pytest.fixture
def tiny_vit() -> nn.Module:
    """A timm ViT with random weights, small enough for any test."""
    torch.manual_seed(0)
    return timm.create_model(
        "vit_tiny_patch16_224", img_size=32, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=10
    ).eval()


@pytest.fixture
def pictures() -> list[torch.Tensor]:
    """Two batches of random pictures."""
    generator = torch.Generator().manual_seed(1)
    return list(torch.randn(8, 3, 32, 32, generator=generator).split(4))


@pytest.fixture(scope="session")
def model_directory(tmp_path_factory) -> Path:
    """A tiny ViT with random weights in timm's directory format, fp16."""
    directory = tmp_path_factory.mktemp("model")
    args = {"img_size": 28, "patch_size": 7, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(0)
    model = timm.create_model("vit_tiny_patch16_224", num_classes=10, **args)
    save_file({name: tensor.half() for name, tensor in model.state_dict().items()}, directory / "model.safetensors")
    cfg = {"input_size": [3, 28, 28], "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "num_classes": 10}
    config = {"architecture": "vit_tiny_patch16_224", "num_classes": 10, "model_args": args, "pretrained_cfg": cfg}
    (directory / "config.json").write_text(json.dumps(config))
    return directory


@pytest.fixture(scope="session")
def language_directory(tmp_path_factory) -> Path:
    """A tiny Llama with random weights and a tokenizer, in Hugging Face's directory format, bf16."""
    import tokenizers
    import transformers

    directory = tmp_path_factory.mktemp("language")
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    bpe.train_from_iterator(["the cat sat on the mat and said that it was the best mat of all"] * 5, trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<end>").save_pretrained(directory)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=300,
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=96,
        max_position_embeddings=128,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=0,
    )
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def browser(tmp_path_factory) -> Iterator[Any]:
    """Chromium without a window, for all tests of a process."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    binary = shutil.which("chromium") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    assert binary, "the test needs Chromium: apt-get install chromium chromium-driver"
    assert driver, "the test needs Chromium's driver: apt-get install chromium-driver"
    options = webdriver.ChromeOptions()
    options.binary_location = binary
    flags = """--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync"""
    for flag in [*flags.split(), f"--user-data-dir={tmp_path_factory.mktemp('browser')}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options=options, service=Service(driver))
    yield chrome
    chrome.quit()
