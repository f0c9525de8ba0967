"""Images: every form of source and of file, any vision model, resumed and mirrored alike."""

import json
from functools import partial

import numpy as np
import pytest
import torch
from lightning.pytorch import Trainer
from PIL import Image
from shared_fixtures import write_image_processor

from adaptrank import Adapter, load_adapter, merge, save_adapter
from adaptrank.cli import main
from adaptrank.cli.errors import explain
from adaptrank.data import HandwrittenDigits, ImageData
from adaptrank.data.images import as_bytes, decode
from adaptrank.modules import ImageClassification
from adaptrank.parameterizations import DoRA, HyperAdapt, LoRA

QUIET = {
    "accelerator": "cpu",
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "num_sanity_val_steps": 0,
}


def picture(seed, size=8, mode="RGB"):
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    return Image.fromarray(values).convert(mode)


def folder_of_classes(root, counts, start=0):
    for name, count in counts.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for k in range(count):
            picture(start + k).save(root / name / f"{k}.png")
    return str(root)


class Processor:
    """Returns the pixels as they are, (1, 3, H, W)."""

    def __call__(self, image, return_tensors):
        return {"pixel_values": torch.tensor(np.asarray(image)).permute(2, 0, 1)[None].float()}


def ready(data, stage="fit"):
    data.image_processor = Processor()
    data.setup(stage)
    return data


def pixels(image):
    return torch.tensor(np.asarray(image.convert("RGB"))).permute(2, 0, 1).float()


# ---- sources


def test_a_folder_of_classes(tmp_path, caplog):
    path = folder_of_classes(tmp_path / "flowers", {"rose": 10, "daisy": 20})
    (tmp_path / "flowers" / "rose" / "notes.txt").write_text("no image")
    (tmp_path / "flowers" / "rose" / ".DS_Store").write_text("hidden")
    data = ready(ImageData(path, validation=0.1))
    assert data.class_names == ["daisy", "rose"]
    assert "1 files in folders of classes are no images" in caplog.text
    assert [row["label"] for row in data.rows("val")].count(0) == 2, "stratified"
    example = data.examples("train")[0]
    assert torch.equal(example["pixel_values"], pixels(picture(0)))
    assert data.count_classes().tolist() == [18, 9]
    (tmp_path / "flowers" / "labels.json").write_text('["rose", "daisy"]')
    assert ready(ImageData(path)).class_names == ["rose", "daisy"]


def test_folders_of_splits(tmp_path):
    for split, counts in (("train", {"a": 3, "b": 2}), ("validation", {"a": 1, "b": 1})):
        folder_of_classes(tmp_path / split, counts)
    data = ready(ImageData(str(tmp_path)))
    assert (len(data.rows("train")), len(data.rows("val"))) == (5, 2)
    test = ImageData(str(tmp_path), test=str(tmp_path / "validation"))
    assert len(test.rows("test")) == 2
    with pytest.raises(ValueError, match=r"no 'nothing' split. It holds \['train', 'validation'\]"):
        ready(ImageData(source(tmp_path)))


def source(path):
    from adaptrank.data import Source

    return [Source(str(path), split="nothing")]


@pytest.mark.parametrize("ending", ["csv", "jsonl"])
def test_a_folder_with_metadata(tmp_path, ending):
    rows = [{"file_name": f"x/{k}.png", "label": "ab"[k % 2], "size": k} for k in range(8)]
    (tmp_path / "x").mkdir()
    for k in range(8):
        picture(k).save(tmp_path / "x" / f"{k}.png")
    if ending == "csv":
        lines = ["file_name,label,size"]
        lines += [",".join(map(str, row.values())) for row in rows]
    else:
        lines = map(json.dumps, rows)
    (tmp_path / f"metadata.{ending}").write_text("\n".join(lines) + "\n")
    data = ready(ImageData(str(tmp_path), validation=str(tmp_path)))
    assert [row["label"] for row in data.rows("train")] == [0, 1] * 4
    assert torch.equal(data.examples("train")[3]["pixel_values"], pixels(picture(3)))
    sizes = ready(ImageData(str(tmp_path), str(tmp_path), regression=True, labels=["size"]))
    assert [row["label"] for row in sizes.rows("train")] == [float(k) for k in range(8)]


def test_a_table_of_paths(tmp_path, monkeypatch):
    folder_of_classes(tmp_path / "img", {"a": 4})
    lines = ["path,kind", *(f"img/a/{k}.png,{'xy'[k % 2]}" for k in range(4))]
    (tmp_path / "t.csv").write_text("\n".join(lines) + "\n")
    table = str(tmp_path / "t.csv")
    data = ready(ImageData(table, table, image="path", label="kind"))
    assert data.class_names == ["x", "y"]
    by_template = ready(ImageData(table, table, image="./{path}", label="kind"))
    for k in range(4):
        expected = data.examples("train")[k]["pixel_values"]
        assert torch.equal(by_template.examples("train")[k]["pixel_values"], expected)
    with pytest.raises(ValueError, match=r"no column 'image', only \['path', 'kind'\]"):
        ready(ImageData(table, table, label="kind"))
    (tmp_path / "t.csv").write_text("path,kind\nimg/a/9.png,x\n")
    with pytest.raises(ValueError, match=r"Row 0 of .*t.csv': there is no image file .*9.png"):
        ready(ImageData(table, table, image="path", label="kind"))
    # From the working directory.
    monkeypatch.chdir(tmp_path / "img")
    (tmp_path / "t.csv").write_text("image,label\na/0.png,x\na/1.png,y\n")
    assert len(ready(ImageData(table, table)).examples("train")) == 2


def test_arrays(tmp_path):
    images = np.stack([np.asarray(picture(k)) for k in range(6)])
    np.savez(tmp_path / "a.npz", images=images, labels=np.array([0, 1, 2] * 2))
    path = str(tmp_path / "a.npz")
    data = ready(ImageData(path, path, classes=["x", "y", "z"]))
    assert torch.equal(data.examples("train")[4]["pixel_values"], pixels(picture(4)))
    assert [row["label"] for row in data.rows("train")] == [0, 1, 2] * 2
    np.savez(tmp_path / "b.npz", x_tr=images[..., 0] / 255, y_tr=np.array(["u", "v"] * 3))
    path = str(tmp_path / "b.npz")
    data = ready(ImageData(path, path, image="x_tr", label="y_tr"))
    assert data.class_names == ["u", "v"]
    gray = torch.tensor(images[1, ..., 0]).float()
    assert torch.equal(data.examples("train")[1]["pixel_values"], gray.expand(3, 8, 8))
    with pytest.raises(ValueError, match=r"no array for `image`, only \['x_tr', 'y_tr'\]"):
        ready(ImageData(path, path))
    np.savez(tmp_path / "c.npz", images=images.astype(object), labels=[0] * 6)
    with pytest.raises(ValueError, match=r"cannot be read as an .npz file"):
        ready(ImageData(str(tmp_path / "c.npz")))
    with pytest.raises(ValueError, match="values from -1 to 1"):
        as_bytes(np.array([[[-1.0, 1.0]]]), "It")


@pytest.mark.parametrize("form", ["saved", "parquet"])
def test_a_data_set_with_images(tmp_path, form):
    from datasets import ClassLabel, Dataset, Features
    from datasets import Image as ImageFeature

    features = Features({"img": ImageFeature(), "label": ClassLabel(names=["cat", "dog"])})
    rows = {"img": [picture(k) for k in range(6)], "label": [0, 1] * 3}
    dataset = Dataset.from_dict(rows, features=features)
    path = tmp_path / ("a.parquet" if form == "parquet" else "saved")
    if form == "parquet":
        dataset.to_parquet(path)
    else:
        dataset.save_to_disk(path)
    data = ready(ImageData(str(path), str(path), image="img"))
    assert data.class_names == ["cat", "dog"]
    assert torch.equal(data.examples("train")[5]["pixel_values"], pixels(picture(5)))
    assert [row["label"] for row in data.rows("train")] == [0, 1] * 3


def test_prediction_reads_a_folder_of_images_or_one(tmp_path):
    path = folder_of_classes(tmp_path / "train", {"a": 3, "b": 3})
    new = tmp_path / "new"
    new.mkdir()
    for k in range(3):
        picture(k).save(new / f"{k}.jpg")
    data = ready(ImageData(path, predict=str(new)), "predict")
    assert len(data.examples("predict")) == 3
    assert len(ImageData(path, predict=str(new / "1.jpg")).rows("predict")) == 1
    with pytest.raises(ValueError, match="holds images without a class"):
        ready(ImageData(str(new)))


# ---- files


def test_every_mode_becomes_rgb(tmp_path):
    for mode in ("RGB", "L", "P", "RGBA", "LA", "1", "CMYK"):
        file = tmp_path / f"{mode}.{'tif' if mode == 'CMYK' else 'png'}"
        picture(0, mode=mode).save(file)
        assert decode(str(file), "").mode == "RGB"
        assert decode(file.read_bytes(), "").size == (8, 8)
    gray = picture(0, mode="L")
    assert np.array_equal(np.asarray(decode(gray, "")), np.stack([np.asarray(gray)] * 3, -1))
    wide = Image.fromarray((np.asarray(gray).astype(np.uint16) << 8) + 7)
    wide.save(tmp_path / "wide.png")
    assert np.array_equal(np.asarray(decode(str(tmp_path / "wide.png"), ""))[..., 0], gray)
    first = np.moveaxis(np.asarray(picture(1)), -1, 0)
    assert np.array_equal(np.asarray(decode(first, "")), picture(1))


def test_an_image_is_turned_as_its_orientation_says(tmp_path):
    image = picture(0)
    exif = image.getexif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "turned.png", exif=exif)
    turned = decode(str(tmp_path / "turned.png"), "")
    assert np.array_equal(np.asarray(turned), np.rot90(np.asarray(image), -1))


def test_an_unreadable_image_is_one_sentence(tmp_path):
    path = folder_of_classes(tmp_path, {"a": 3, "b": 3})
    (tmp_path / "a" / "1.png").write_bytes((tmp_path / "a" / "1.png").read_bytes()[:60])
    (tmp_path / "b" / "1.png").write_text("no image")
    data = ready(ImageData(path, path))
    for row, name in ((1, "a"), (4, "b")):
        with pytest.raises(
            ValueError, match=rf"^Row {row} of '.*': the image '.*{name}/1.png' can"
        ) as said:
            data.examples("train")[row]
        assert "\n" not in str(said.value)
    with pytest.raises(ValueError, match="it is null"):
        decode(None, "Row 3")


# ---- order and mirroring


def test_mirroring_depends_on_seed_epoch_and_image(tmp_path):
    path = folder_of_classes(tmp_path, {"a": 6, "b": 6})

    def seen(epoch, **options):
        data = ready(ImageData(path, path, horizontal_flip=0.5, batch_size=4, **options))
        loader = data.train_dataloader()
        loader.set_epoch(epoch)
        return torch.cat([batch["pixel_values"] for batch in loader])

    assert torch.equal(seen(0), seen(0))
    assert torch.equal(seen(1), seen(1, num_workers=2))
    plain = ready(ImageData(path, path)).examples("train")
    originals = [example["pixel_values"] for example in plain]
    kinds = [
        [any(torch.equal(image, one) for one in originals) for image in seen(epoch)]
        for epoch in (0, 1)
    ]
    assert 0 < sum(kinds[0]) < 12
    plain_ones = [
        {k for k, one in enumerate(originals) for image in seen(epoch) if torch.equal(image, one)}
        for epoch in (0, 1)
    ]
    assert plain_ones[0] != plain_ones[1], "each epoch mirrors others"
    mirrored = [image.flip(-1) for image in seen(0)]
    for image, is_plain in zip(mirrored, kinds[0], strict=True):
        assert is_plain != any(torch.equal(image, one) for one in originals)
    data = ready(ImageData(path, path, horizontal_flip=1.0))
    assert torch.equal(data.examples("val")[0]["pixel_values"], originals[0]), "in training only"
    with pytest.raises(ValueError, match="horizontal_flip=2"):
        ImageData(path, horizontal_flip=2)


def classifier(backbone, **options):
    options = {"adapters": [Adapter([LoRA])], **options}
    optimizer = partial(torch.optim.AdamW, lr=1e-2)
    return ImageClassification(backbone, dtype="fp32", optimizer=optimizer, **options)


def digits(**options):
    return HandwrittenDigits(train_size=16, val_size=8, batch_size=4, **options)


def test_a_resume_in_mid_epoch_is_bit_exact(tiny_vit, tmp_path):
    def run(steps, **options):
        torch.manual_seed(3)
        module, data = classifier(tiny_vit), digits(horizontal_flip=0.5)
        trainer = Trainer(**QUIET, max_steps=steps, limit_val_batches=0)
        module.schedule, module.warmup = "constant", 0
        trainer.fit(module, data, weights_only=True, **options)
        return module, trainer

    whole, _ = run(6)
    _, stopped = run(3)
    stopped.save_checkpoint(tmp_path / "half.ckpt")
    resumed, _ = run(6, ckpt_path=tmp_path / "half.ckpt")
    for name, tensor in whole.trained_state().items():
        assert torch.equal(tensor, resumed.trained_state()[name]), name


# ---- models


def folder_of(config, folder, size):
    from transformers import AutoModel

    torch.manual_seed(0)
    AutoModel.from_config(config).save_pretrained(folder)
    write_image_processor(folder, size)
    return str(folder)


def test_a_vision_transformer_trains_merges_and_goes_on(tiny_vit, tmp_path):
    module = classifier(tiny_vit, metrics=["accuracy", "calibration_error"])
    trainer = Trainer(**QUIET, max_steps=3)
    trainer.fit(module, digits(digits=[7, 3]))
    trained = {name for name, p in module.model.named_parameters() if p.requires_grad}
    assert {name.partition(".")[0] for name in trained} == {"vit", "classifier"}
    assert not any("classifier.base" in name for name in trained), "the head has no adapter"
    assert module.label_names == ["3", "7"]
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    (batch, *_) = trainer.predict(module, digits(digits=[7, 3]))
    assert batch[0].keys() == {"label", "name", "probabilities"}

    warm = classifier(tiny_vit, adapters=None, adapter=str(tmp_path / "adapter"))
    (again, *_) = Trainer(**QUIET).predict(warm, digits(digits=[7, 3]))
    assert again == batch
    image = next(iter(digits_batches()))
    module.eval()
    with torch.no_grad():
        before = module(image)
        merge(module.model)
        torch.testing.assert_close(module(image), before)


def digits_batches():
    yield {"pixel_values": torch.linspace(-1, 1, 2 * 3 * 64).view(2, 3, 8, 8)}


@pytest.mark.parametrize("name", ["convnext", "swin", "resnet"])
def test_any_vision_model(tmp_path, name):
    from transformers import ConvNextConfig, ResNetConfig, SwinConfig

    config = {
        "convnext": ConvNextConfig(
            hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, patch_size=4, image_size=16
        ),
        "swin": SwinConfig(
            embed_dim=8, depths=[1, 1], num_heads=[1, 2], window_size=2, patch_size=2, image_size=16
        ),
        "resnet": ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"
        ),
    }[name]
    backbone = folder_of(config, tmp_path / name, 16)
    method = [partial(LoRA, rank=2)]
    targets = "all" if name == "resnet" else "all-linear"
    module = classifier(backbone, adapters=[Adapter(method, targets)], gradient_checkpointing=False)
    buffers = {}

    data = digits(digits=[0, 1, 2])
    trainer = Trainer(**QUIET, max_steps=2, limit_val_batches=1)
    module.configure_model = partial(first_buffers, module.configure_model, module, buffers)
    trainer.fit(module, data)
    assert {n for n, p in module.named_parameters() if p.requires_grad and "classifier" in n}
    for key, value in module.model.named_buffers():
        assert torch.equal(value, buffers[key]), f"{key} is in no adapter's file"
    save_adapter(module.model, tmp_path / "adapter", module.describe_base())
    warm = classifier(backbone, adapters=None, adapter=str(tmp_path / "adapter"))
    assert Trainer(**QUIET).predict(warm, data) == trainer.predict(module, data)


def first_buffers(configure, module, buffers):
    configure()
    if not buffers:
        buffers |= {key: value.clone() for key, value in module.model.named_buffers()}


@pytest.mark.parametrize("method", [DoRA, HyperAdapt, LoRA])
def test_a_patch_embedding_is_adapted(tiny_vit, method):
    module = classifier(tiny_vit, adapters=[Adapter([method], targets="all")], num_labels=2)
    module.configure_model()
    wrapped = module.model.vit.embeddings.patch_embeddings.projection
    assert isinstance(wrapped, method)
    batch = next(digits_batches()) | {"labels": torch.tensor([0, 1])}
    module.training_step(batch, 0).backward()
    assert any(p.grad is not None and p.grad.abs().sum() for p in wrapped.parameters())


def test_a_head_of_other_classes_starts_anew(tmp_path):
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        image_size=8, patch_size=4, num_labels=7,
    )  # fmt: skip
    ViTForImageClassification(config).save_pretrained(tmp_path)
    module = classifier(str(tmp_path), num_labels=3)
    module.configure_model()
    assert module.model.classifier.weight.shape == (3, 16)


def test_a_half_precision_backbone_reads_images(tiny_vit):
    module = ImageClassification(tiny_vit, [Adapter([LoRA])], num_labels=2, dtype="bf16")
    module.configure_model()
    output = module(next(digits_batches()))
    assert output.dtype == torch.float32
    assert module.model.classifier.weight.dtype == torch.float32


def test_what_does_not_fit_is_one_sentence(tiny_vit, tiny_bert, tmp_path):
    with pytest.raises(OSError, match=r"holds no preprocessor_config.json. Save one"):
        _ = classifier(tiny_bert).image_processor
    with pytest.raises(ValueError, match="reads images, and no text"):
        _ = classifier(tiny_vit).tokenizer
    module = classifier(tiny_vit, num_labels=2)
    module.configure_model()
    with pytest.raises(ValueError, match="The batch has no pixel_values"):
        module({"labels": torch.tensor([0])})
    with pytest.raises(ValueError, match="at least two different digits"):
        HandwrittenDigits(digits=[1, 1])
    with pytest.raises(ValueError, match="there are 360 of the digits"):
        HandwrittenDigits(digits=[0, 1], val_size=400).rows("val")


def test_digits_are_shared_out_by_class():
    data = HandwrittenDigits(digits=[5, 6, 7, 8, 9], val_size=100, train_size=50)
    for split, size in (("train", 10), ("val", 20)):
        labels = [row["label"] for row in data.rows(split)]
        assert [labels.count(label) for label in range(5)] == [size] * 5
    places = {row["image"].index for row in data.rows("train")}
    assert not places & {row["image"].index for row in data.rows("val")}


# ---- the commands


def test_the_commands_know_images(tiny_vit, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    folder_of_classes(tmp_path / "flowers", {"daisy": 6, "rose": 6})
    config = {
        "model": {
            "class_path": "ImageClassification",
            "init_args": {
                "backbone": tiny_vit,
                "adapters": [{"parameterization": ["LoRA"]}],
                "dtype": "fp32",
                "class_weights": {"rose": 2.0},
                "metrics": ["accuracy", {"class_path": "MulticlassF1Score", "name": "macro"}],
            },
        },
        "data": {"class_path": "ImageData", "init_args": {"sources": "flowers", "validation": 0.3}},
        "trainer": {"max_steps": 2, "accelerator": "cpu", "enable_progress_bar": False},
    }
    (tmp_path / "v.json").write_text(json.dumps(config))
    main(["fit", "--config", "v.json"])
    said = capsys.readouterr().out
    assert "macro" in said
    adapter = "runs/v/0/adapter"
    assert f"predict --config runs/v/0/config.yaml --model.adapter {adapter} --data.predict" in said
    predict = ["--config", "runs/v/0/config.yaml", "--model.adapters", "null"]
    predict += ["--model.adapter", adapter]
    main(["predict", *predict, "--data.predict", "flowers/rose", "--out", "p.jsonl"])
    lines = [json.loads(line) for line in (tmp_path / "p.jsonl").read_text().splitlines()]
    assert len(lines) == 6
    assert lines[0]["probabilities"].keys() == {"daisy", "rose"}
    main(["validate", *predict])
    main(["merge", adapter, "--out", "merged"])
    assert "AutoModelForImageClassification.from_pretrained('merged')" in capsys.readouterr().out

    from transformers import AutoImageProcessor, AutoModelForImageClassification

    merged = AutoModelForImageClassification.from_pretrained("merged")
    assert merged.config.id2label == {0: "daisy", 1: "rose"}
    processor = AutoImageProcessor.from_pretrained("merged", backend="pil")
    image = Image.open(tmp_path / "flowers" / "rose" / "0.png")
    with torch.no_grad():
        logits = merged(**processor(image, return_tensors="pt")).logits[0]
    probabilities = dict(zip(["daisy", "rose"], logits.softmax(-1).tolist(), strict=True))
    assert lines[0]["probabilities"] == pytest.approx(probabilities, abs=1e-4)
    with pytest.raises(SystemExit):
        main(["generate", adapter, "--prompt", "1"])
    assert "completes no text" in capsys.readouterr().err


def test_an_adapter_of_images_loads_in_python(tiny_vit, tmp_path):
    from transformers import AutoModelForImageClassification

    module = classifier(tiny_vit)
    Trainer(**QUIET, max_steps=1, limit_val_batches=0).fit(module, digits(digits=[0, 1]))
    save_adapter(module.model, tmp_path)
    facts = json.loads((tmp_path / "adapter_config.json").read_text())["base"]
    assert facts["auto_class"] == "AutoModelForImageClassification"
    assert facts["num_labels"] == 2
    model = AutoModelForImageClassification.from_pretrained(tiny_vit, num_labels=2)
    load_adapter(model, tmp_path)
    assert model.config.id2label == {0: "0", 1: "1"}


def test_a_process_that_loads_images_ends_with_the_sentence_alone(tmp_path):
    path = folder_of_classes(tmp_path, {"a": 2, "b": 2})
    (tmp_path / "b" / "1.png").write_text("no image")
    loader = ready(ImageData(path, path, num_workers=1)).val_dataloader()
    with pytest.raises(ValueError, match="Caught") as caught:
        list(loader)
    said = explain(caught.value)
    assert said.startswith(f"Row 3 of {path!r}: the image ")
    assert "\n" not in said
