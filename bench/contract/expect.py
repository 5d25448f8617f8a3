"""Outcomes of a check that does not pass, and the comparison of tensors that most checks use."""

from __future__ import annotations

import torch
from torch import Tensor


class ContractError(AssertionError):
    """A check failed; the message is one line."""


class NotApplicable(Exception):  # noqa: N818 - an outcome, not an error
    """A check does not apply to this subject; the message is the reason."""


def expect_close(found: Tensor, expected: Tensor, problem: str, *, atol: float = 1e-5, rtol: float = 1e-4) -> None:
    """Raise ContractError, which begins with ``problem``, where two tensors differ by more than rounding."""
    try:
        torch.testing.assert_close(found, expected, atol=atol, rtol=rtol)
    except AssertionError as error:
        lines = [line.strip() for line in str(error).splitlines()]
        detail = [line for line in lines if line.startswith(("Greatest absolute", "Mismatched"))] or lines[:1]
        raise ContractError(f"{problem} ({'; '.join(detail)})") from None
