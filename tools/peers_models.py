"""Create tiny random models for sentence-transformers' loss tests, in a Hugging Face cache.

    python tools/peers_models.py FOLDER      FOLDER: the cache, to be used as HF_HOME

Each model is cached under the name of the published model that the tests load. The tests pass with
any weights, so nothing needs to be downloaded.
"""

import string
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast, DistilBertConfig, DistilBertModel


def cache_folder(home: Path, name: str) -> str:
    """Create and return the folder in the cache ``home`` from which model ``name`` is loaded."""
    repo, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    return str(repo / "snapshots" / commit)


def main(home: Path) -> None:
    torch.manual_seed(0)
    chars = string.ascii_lowercase + string.digits + string.punctuation
    tokens = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *chars, *(f"##{c}" for c in chars)]
    tokenizer = BertTokenizerFast(vocab={token: i for i, token in enumerate(tokens)})
    tokenizer.save_pretrained(cache_folder(home, "google-bert/bert-base-uncased"))

    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(vocab_size=len(tokens), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = Transformer(folder)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())])
    model.save(cache_folder(home, "sentence-transformers-testing/stsb-bert-tiny-safetensors"))

    folder = cache_folder(home, "distilbert/distilbert-base-uncased")
    config = DistilBertConfig(vocab_size=len(tokens), dim=64, n_layers=2, n_heads=2, hidden_dim=128)
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    embedding = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=1024)
    model = SentenceTransformer(modules=[embedding])
    model.save(cache_folder(home, "sentence-transformers/static-retrieval-mrl-en-v1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
