"""The loss for open_clip's training program. Tested with open_clip_torch 3.3.0; nothing of it is imported."""

from __future__ import annotations

from typing import Any

from torch import distributed

from modest_align_kernels.modules import ModestAlignLoss


def create_loss(args: Any, **options: Any) -> ModestAlignLoss:
    """The loss of a CLIP model, in the place of ``open_clip.create_loss``.

    open_clip calls it with what its models return, ``loss(image_features=[B, D], text_features=[B, D], logit_scale=...,
    output_dict=True)``, and sums the dictionary's values: it holds ``contrastive_loss`` and nothing else.

    On several ranks it is the loss of the global batch, with the gradients of ``--local-loss --gather-with-grad``,
    whether or not these are given.

    Args:
        args: what open_clip's ``parse_args`` returns. Read are ``model``, ``siglip``, ``distill``, ``world_size`` and,
            where there is one, ``horovod``.
        options: :class:`modest_align_kernels.ModestAlignLoss`'s, ``noise_std`` and ``smoothing`` among them.

    Returns:
        The module; in ``train()`` mode, as open_clip leaves it, also where it evaluates: that has a loss of its own.

    Raises:
        ValueError: the arguments ask for another loss or for Horovod, or for ranks that there are not yet.
    """
    losses = {"--siglip": args.siglip, "--distill-model": args.distill, "--horovod": getattr(args, "horovod", False)}
    losses |= {f"--model {args.model}": any(word in args.model.lower() for word in ("coca", "genlip", "genlap"))}
    for flag, is_given in losses.items():
        if is_given:
            raise ValueError(f"args: got {flag}, want a CLIP model under torch.distributed, or open_clip.create_loss")
    if args.world_size > 1 and not distributed.is_initialized():
        raise ValueError(
            f"args.world_size: got {args.world_size} without a process group, "
            "want create_loss after torch.distributed.init_process_group"
        )
    if args.world_size > 1:
        options.setdefault("process_group", distributed.group.WORLD)
    return ModestAlignLoss(**options)
