"""Fixtures and lists that several test files share."""

import functools
import importlib.metadata
import json

import pytest
import torch
from lightning.fabric.utilities import registry
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptrank.allocation import ALLOCATORS
from adaptrank.parameterizations import PARAMETERIZATIONS
from adaptrank.strategies import STRATEGIES
from adaptrank.testing import perturb

METHODS = [PARAMETERIZATIONS[name] for name in PARAMETERIZATIONS]
"""The registry at collection: what the folder defines, before any test adds a toy of its own."""

LINEAR_METHODS = [cls for cls in METHODS if cls.wraps(torch.nn.Linear(48, 24))]
"""Those that wrap linear layers; others wrap norms, attention, or a whole body."""

torch.set_num_threads(
    1
)  # several workers share two cores, and summation order must not depend on their number

# Without a device, PyTorch keeps every seed for later, with the whole call stack as a text.
for device in (torch.cuda, torch.xpu, torch.mtia):
    if not device.is_available():
        device.manual_seed_all = lambda seed: None

# Every Trainer asks all installed packages whether they have callbacks for it.
registry.entry_points = functools.cache(importlib.metadata.entry_points)

__all__ = ["LINEAR_METHODS", "METHODS", "perturb"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registries():
    """Allocators and strategies that a test defines leave the registry with it."""
    registries = (ALLOCATORS, STRATEGIES)
    before = [dict(known._classes) for known in registries]
    yield
    for known, classes in zip(registries, before, strict=True):
        known._classes.clear()
        known._classes.update(classes)


@pytest.fixture(params=METHODS, ids=lambda cls: cls.__name__)
def method(request: pytest.FixtureRequest):
    """Every parameterization of the folder."""
    return request.param


@pytest.fixture(params=LINEAR_METHODS, ids=lambda cls: cls.__name__)
def linear_method(request: pytest.FixtureRequest):
    """Every parameterization of linear layers."""
    return request.param


@pytest.fixture
def layer(method):
    """Every parameterization, with its default arguments, on its example in float64."""
    return method(method.example().double())


def _tokenizer(words):
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<eos>", "<pad>", *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.WhitespaceSplit(),
            pre_tokenizers.Punctuation(),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<eos>",
        pad_token="<pad>",
        model_max_length=64,
    )


WORDS = [
    *"0123456789+-*/=?.:,",
    "Question",
    "Answer",
    "How",
    "many",
    "has",
    "and",
    "more",
    "does",
    "have",
    "now",
    "the",
]


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory):
    """Folder of a random two-layer Llama with a tokenizer that splits digits."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("tiny") / "llama"
    tokenizer = _tokenizer(WORDS)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory):
    """Folder of a random two-layer BERT."""
    from transformers import BertConfig, BertModel

    folder = tmp_path_factory.mktemp("tiny") / "bert"
    tokenizer = _tokenizer(WORDS)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        pad_token_id=2,
    )
    BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_gpt2(tmp_path_factory):
    """Folder of a random two-layer GPT-2, whose query, key and value are one layer."""
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path_factory.mktemp("tiny") / "gpt2"
    tokenizer = _tokenizer(WORDS)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer),
        n_embd=32,
        n_layer=2,
        n_head=4,
        n_positions=64,
        eos_token_id=1,
        pad_token_id=2,
        bos_token_id=None,
    )
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_t5(tmp_path_factory):
    """Folder of a random T5 of two and two blocks, with a tokenizer of characters."""
    from adaptrank.backbones import dates_t5

    folder = tmp_path_factory.mktemp("tiny") / "t5"
    tokenizer = dates_t5.character_tokenizer()
    torch.manual_seed(0)
    dates_t5.build(len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_bart(tmp_path_factory):
    """Folder of a random BART of two blocks, with the tokenizer of the T5."""
    from transformers import BartConfig, BartForConditionalGeneration

    from adaptrank.backbones.dates_t5 import character_tokenizer

    folder = tmp_path_factory.mktemp("tiny") / "bart"
    tokenizer = character_tokenizer()
    torch.manual_seed(0)
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=32,
        decoder_ffn_dim=32,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=1,
        decoder_start_token_id=1,
        forced_eos_token_id=1,
    )
    BartForConditionalGeneration(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def tiny_vit(tmp_path_factory):
    """Folder of a random two-layer vision transformer of 8 x 8 pixels, with its image processor."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("tiny") / "vit"
    torch.manual_seed(0)
    config = ViTConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=8,
        patch_size=4,
    )
    ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    write_image_processor(folder)
    return str(folder)


def write_image_processor(folder, size=8):
    """Write the file of an image processor for square images."""
    contents = {
        "image_processor_type": "ViTImageProcessor",
        "do_resize": True,
        "size": {"height": size, "width": size},
        "do_rescale": True,
        "do_normalize": True,
        "image_mean": [0.5] * 3,
        "image_std": [0.5] * 3,
    }
    (folder / "preprocessor_config.json").write_text(json.dumps(contents))
