"""Tiny models with random weights under the names that sentence-transformers' tests load.

    python tools/peers_models.py FOLDER      FOLDER is an HF_HOME

What these tests of losses check holds for any weights, so random ones do, without a network.
"""

import string
import sys
import tempfile
from pathlib import Path

import torch
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Pooling, StaticEmbedding, Transformer
from transformers import BertConfig, BertModel, BertTokenizerFast, DistilBertConfig, DistilBertModel


def snapshot(home: Path, name: str) -> str:
    """A new folder in which Hugging Face's libraries find the cached repository of that name."""
    repo, commit = home / "hub" / f"models--{name.replace('/', '--')}", "0" * 40
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text(commit)
    (repo / "snapshots" / commit).mkdir(parents=True)
    return str(repo / "snapshots" / commit)


def main(home: Path) -> None:
    torch.manual_seed(0)
    signs = string.ascii_lowercase + string.digits + string.punctuation
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *signs, *(f"##{sign}" for sign in signs)]
    tokenizer = BertTokenizerFast(vocab={word: i for i, word in enumerate(words)})
    tokenizer.save_pretrained(snapshot(home, "google-bert/bert-base-uncased"))

    sizes = dict(hidden_size=128, num_hidden_layers=2, num_attention_heads=2, intermediate_size=512)
    with tempfile.TemporaryDirectory() as folder:
        BertModel(BertConfig(vocab_size=len(words), **sizes)).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        encoder = Transformer(folder)
    model = SentenceTransformer(modules=[encoder, Pooling(encoder.get_embedding_dimension())])
    model.save(snapshot(home, "sentence-transformers-testing/stsb-bert-tiny-safetensors"))

    folder = snapshot(home, "distilbert/distilbert-base-uncased")
    config = DistilBertConfig(vocab_size=len(words), dim=64, n_layers=2, n_heads=2, hidden_dim=128)
    DistilBertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)

    embedding = StaticEmbedding(tokenizer.backend_tokenizer, embedding_dim=1024)
    model = SentenceTransformer(modules=[embedding])
    model.save(snapshot(home, "sentence-transformers/static-retrieval-mrl-en-v1"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
