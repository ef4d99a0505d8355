"""Steps and batches of the tests of warmup."""

import torch
import triton
import triton.language as tl
from torch import nn

import mmfused
from mmfused import models
from mmfused.warmup.api import _Call

DRY = {"arch": "sm_90", "workers": 0}
CPU = torch.device("cpu")
BF16 = torch.bfloat16
NCE = ((32, 16), (32, 16))


def call_of(model, shapes, backward=True, input_gradients=False):
    return _Call(model, shapes, None, backward, input_gradients, "sm_90", 0)


def products_of(rows=8):
    return {
        "pixel_values": (rows, 3, 32, 32),
        "input_ids": ((rows, 10), torch.int64),
        "attention_mask": torch.arange(10).repeat(rows, 1) < 7,
        "image_present": ((rows,), torch.bool),
        "labels": ((rows,), torch.int64),
    }


def fluid():
    return models.FLUID(models.FLUIDConfig.preset("tiny", num_classes=5, vocab_size=50))


def uniecs():
    return models.UniECS(models.UniECSConfig.preset("tiny", vocab_size=50, image_size=32))


def pooling():
    pool = mmfused.QueryPooling(32, num_queries=4, norm_kv=True, dropout=0.1)
    return nn.Sequential(pool, nn.Flatten(), nn.Linear(128, 3))


@triton.jit
def kernel_of_a_user(x_ptr):
    tl.store(x_ptr, 1.0)
