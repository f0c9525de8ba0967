"""Fixtures and lists that several test files share."""

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from adaptrank.allocation import ALLOCATORS
from adaptrank.parameterizations import PARAMETERIZATIONS
from adaptrank.testing import perturb

METHODS = [PARAMETERIZATIONS[name] for name in PARAMETERIZATIONS]
"""The registry at collection: what the folder defines, before any test adds a toy of its own."""

LINEAR_METHODS = [cls for cls in METHODS if cls.wraps(torch.nn.Linear(48, 24))]
"""Those that wrap linear layers; others wrap norms, attention, or a whole body."""

torch.set_num_threads(
    1
)  # several workers share two cores, and summation order must not depend on their number

__all__ = ["LINEAR_METHODS", "METHODS", "perturb"]


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _registries():
    """Allocators that a test defines leave the registry with it."""
    before = dict(ALLOCATORS._classes)
    yield
    ALLOCATORS._classes.clear()
    ALLOCATORS._classes.update(before)


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
