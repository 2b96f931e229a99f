"""Imported once by the fork server, so that every rank starts with it."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")

import deepspeed  # noqa: F401
import torch
import torch._dynamo
import torch.distributed  # noqa: F401
