"""What an error's own words mean: those of torch 2.13 on shapes, dtypes, devices and indices."""

from __future__ import annotations

import re

from sosa_stream.agent.explain.explanation import Kind, Meaning
from sosa_stream.detect.reports import SHAPE_ERRORS

_TO_DTYPE = "convert one of them: x.float(), labels.long(); with half precision use torch.autocast"
_TO_DEVICE = "move model and batch to one device: x = x.to(device); a tensor made in forward needs device=x.device"

_TABLE: tuple[tuple[re.Pattern[str], Kind, str, str], ...] = tuple(
    (re.compile(pattern), kind, what, advice)
    for pattern, kind, what, advice in (
        (
            r"Expected all tensors to be on the same device, but found at least two devices, (\S+) and ([^\s!]+)",
            Kind.DEVICE,
            "tensors on {0} and on {1} meet",
            _TO_DEVICE,
        ),
        (
            r"Expected all tensors to be on the same device, but got (\w+) is on (\S+), different from other "
            r"tensors on ([^\s()]+)",
            Kind.DEVICE,
            "{0} is on {1}, the other tensors on {2}",
            _TO_DEVICE,
        ),
        (
            r"Tensor on device (\S+) is not on the expected device ([^\s!]+)",
            Kind.DEVICE,
            "a tensor is on {0} where {1} was expected",
            _TO_DEVICE,
        ),
        (
            r"Input type \((torch\.cuda\.\w+|torch\.\w+)\) and (weight|bias) type \((?!\1)(torch\.[\w.]+)\) should be",
            Kind.DEVICE,
            "the input is a {0}, the {1} a {2}",
            _TO_DEVICE,
        ),
        (
            r"Input type \((.+?)\) and (weight|bias) type \((.+?)\) should be the same",
            Kind.DTYPE,
            "the input is {0}, the {1} is {2}",
            _TO_DTYPE,
        ),
        (
            r"(?:must|to) have the same dtype, but got:? ?(\S+) (?:and|!=) (?:c10::)?(\w+)",
            Kind.DTYPE,
            "the factors are {0} and {1}",
            _TO_DTYPE,
        ),
        (
            r"Expected tensor for argument #\d+ '(\w+)' to have one of the following scalar types: (.+?); but got "
            r"torch\.(?:cuda\.)?(\w+)Tensor",
            Kind.DTYPE,
            "{0} must be one of {1} and is {2}",
            "indices are integers: x.long()",
        ),
        (
            r"expected target dtype to be (.+?), but got (\w+)",
            Kind.DTYPE,
            "the targets must be {0} and are {1}",
            "class labels are integers: labels.long()",
        ),
        (r"expected scalar type (\w+) but found (\w+)", Kind.DTYPE, "{1} was given where {0} is needed", _TO_DTYPE),
        (r"Found dtype (\w+) but expected (\w+)", Kind.DTYPE, "{0} was given where {1} is needed", _TO_DTYPE),
        (
            r"result type (\w+) can't be cast to the desired output type (\w+)",
            Kind.DTYPE,
            "a result of type {0} does not fit into {1}",
            _TO_DTYPE,
        ),
        (r"mixed dtype \(CPU\)", Kind.DTYPE, "input and parameters are of different types", _TO_DTYPE),
        (
            r"\"(\w+)\" not implemented for '(\w+)'",
            Kind.DTYPE,
            "{0} cannot work on {1}",
            _TO_DTYPE,
        ),
        (
            r"index out of range in self",
            Kind.INDEX,
            "an index is not below the number of embeddings, or is negative",
            "compare the vocabulary of the tokenizer with num_embeddings; mind padding and ignore values such as -100",
        ),
        (
            r"Target (-?\d+) is out of bounds",
            Kind.INDEX,
            "a label of {0} is no class",
            "labels run from 0 to the number of classes less one; leave others out by ignore_index",
        ),
        (
            r"index (-?\d+) is out of bounds for (?:dimension|axis) (\d+) with size (\d+)",
            Kind.INDEX,
            "index {0} where dimension {1} has {2} elements",
            "indices run from 0 to the size less one",
        ),
        (
            r"device-side assert triggered",
            Kind.INDEX,
            "a kernel on the GPU has found a value out of its range, most often an index or a label",
            "the guilty line may be an earlier one: CUDA_LAUNCH_BLOCKING=1, or one batch on the CPU, shows it",
        ),
    )
)

_SHAPE_ADVICE = "print the shapes before this line; the module's sizes and those of its input must agree"


_PRODUCT = re.compile(r"mat1 and mat2 shapes cannot be multiplied \((\d+)x(\d+) and (\d+)x(\d+)\)")


def meaning_of(message: str, module_class: str = "") -> Meaning | None:
    """What the words of an error, raised in a module of this class, say; None where they are not known."""
    product = _PRODUCT.search(message)
    if product is not None and "Linear" not in module_class:
        what = "{1} columns by {2} rows in a product of {0}x{1} and {2}x{3}".format(*product.groups())
        return Meaning(kind=Kind.SHAPE, what=what, advice=(_SHAPE_ADVICE,))
    for pattern, kind, what, advice in _TABLE:
        found = pattern.search(message)
        if found is not None:
            return Meaning(kind=kind, what=what.format(*found.groups()), advice=(advice,))
    for pattern, cause in SHAPE_ERRORS:
        found = pattern.search(message)
        if found is not None:
            return Meaning(kind=Kind.SHAPE, what=cause.format(*found.groups()), advice=(_SHAPE_ADVICE,))
    return None
