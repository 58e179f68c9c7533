"""The smallest file: a reader in plain numpy gets the network's answers from it."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from mnistlib import (
    CheckpointError,
    Config,
    build,
    load_mnist,
    load_model,
    released_checkpoint,
    train,
)
from mniststudy.cli import main
from mniststudy.use.read_tiny import read
from mniststudy.use.tiny import READER, to_tiny


def network(spec: str) -> nn.Module:
    """Return a network whose BatchNorms have factors of both signs, and statistics of digits."""
    torch.manual_seed(0)
    model = build(spec, dropout=0.0)
    for norm in (m for m in model.modules() if isinstance(m, nn.BatchNorm2d)):
        norm.weight.data.uniform_(0.5, 1.5)
        norm.weight.data[0] *= -1
        norm.bias.data.uniform_(-1, 1)
    digits = load_mnist("sample").train_images
    with torch.no_grad():
        for batch in digits[:2000].split(100):
            model.train()(batch)
    return model.eval()


@pytest.mark.parametrize(
    "spec",
    ["rounded-6174", "w15 c4 p c6 p shared", "w3 c8 c8 = p w7 r1 p = shared", "w7 c5 p p p shared"],
)
def test_the_reader_gives_the_logits_of_torch_but_for_the_rounding_of_factors(spec):
    model, images = network(spec), load_mnist("sample").train_images[:200]
    raw = to_tiny(model, spec)
    with torch.no_grad():
        wanted = model(images)
    found = torch.from_numpy(read(raw, images[:, 0].numpy()))
    assert (found - wanted).square().mean() < 0.1 * wanted.var()
    assert torch.corrcoef(torch.stack([found.flatten(), wanted.flatten()]))[0, 1] > 0.97


def test_weights_take_little_more_than_their_entropy():
    model = network("rounded-6174")
    bits = 0.0
    for conv in {m for m in model.modules() if isinstance(m, nn.Conv2d)}:
        _, counts = conv.rounded()[0].unique(return_counts=True)
        bits -= float((counts * (counts / counts.sum()).log2()).sum())
    others = 94 * 2 + 10  # a factor and a shift for each channel, and a factor for each class
    assert bits / 8 < len(to_tiny(model, "rounded-6174")) < bits / 8 + others + 60


@pytest.mark.parametrize(
    "spec", ["reference", "c8 w3 r2 p shared", "w3 c8 p pooled", "w3 s8 p shared"]
)
def test_a_network_without_the_format_is_refused(spec):
    with pytest.raises(CheckpointError, match="has no tiny format; write it with rounded weights"):
        to_tiny(build(spec), spec)


def test_the_exported_files_are_read_without_torch(tmp_path, capsys):
    digits = load_mnist("sample")
    spec = "w3 c4 p c6 p shared"
    config = Config(model=spec, epochs=1, batch_size=100, epoch_images=1_000, ema_decay=0.9)
    checkpoint = train(config, digits, folder=tmp_path, verbose=False).checkpoint
    assert main(["export", str(checkpoint), "--tiny"]) == 0
    said = capsys.readouterr().out
    size = (tmp_path / "custom.tiny").stat().st_size
    assert f"custom.tiny: {size} bytes, " in said
    np.save(images := tmp_path / "images.npy", digits.train_images[:50, 0].numpy())
    wanted = read((tmp_path / "custom.tiny").read_bytes(), np.load(images)).argmax(1)
    for words in ([READER.name, "custom.tiny"], ["custom.pyz"]):
        told = [sys.executable, "-X", "importtime", *words, images.name]
        ran = subprocess.run(told, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert ran.stdout.split() == [str(k) for k in wanted]
        assert "torch" not in ran.stderr
    assert len((tmp_path / READER.name).read_text().splitlines()) <= 60


def test_the_committed_file_reads_digits_as_its_network_does_through_the_committed_reader():
    folder = released_checkpoint("tiny").parent
    assert (folder / READER.name).read_bytes() == READER.read_bytes()
    images = load_mnist("sample").train_images[:500]
    found = read((folder / "tiny.tiny").read_bytes(), images[:, 0].numpy()).argmax(1)
    with torch.no_grad():
        wanted = load_model("tiny")(images).argmax(1).numpy()
    assert (found != wanted).sum() <= 1  # factors are rounded
