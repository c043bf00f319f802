"""A pytest plugin for `gpu_check --dry-run`: tests are collected as where every backend runs on a GPU."""

import torch

from modest_align_kernels import dispatch

torch.cuda.is_available = lambda: True
dispatch.why_not = lambda *args, **kwargs: None
