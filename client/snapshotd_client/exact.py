"""Copies and compares tensors bit by bit, whatever their layout."""

from __future__ import annotations

import torch

from snapshotd_client.leaves import local_piece


def copy_exact(target: torch.Tensor, source: torch.Tensor) -> None:
    """Copy values of the same dtype and shape into `target`, in place and off the graph."""
    with torch.no_grad():
        to, like = local_piece(target).detach(), local_piece(source).detach()
        for dim, stride in enumerate(to.stride()):
            # Elements of an expanded dimension are one: torch refuses to write it many times.
            if stride == 0 and to.shape[dim] > 1:
                to, like = to.narrow(dim, 0, 1), like.narrow(dim, 0, 1)
        to.copy_(like)


def is_expanded(tensor: torch.Tensor) -> bool:
    """Whether several elements of `tensor` are one in memory by a zero stride."""
    piece = local_piece(tensor)
    return any(s == 0 and n > 1 for n, s in zip(piece.shape, piece.stride(), strict=True))


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether dtype, shape and every bit of the elements agree: NaN equals the same NaN."""
    left, right = local_piece(a), local_piece(b)
    if left.dtype != right.dtype or left.shape != right.shape:
        return False
    return torch.equal(_bits(left), _bits(right))


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    resolved = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return resolved.reshape(-1).view(torch.uint8)
