"""A card that is not there: fake CUDA tensors, which have shapes, types and devices, and no numbers.

torch's FakeTensorMode refuses each operation on tensors of two devices, as a card would. Its autograd engine
asks for a real card, so `backward` walks the graph itself.
"""

from __future__ import annotations

import os
import traceback
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import vitds
from vitds.batch import Mixing

CARD = torch.device("cuda", 0)
PACKAGE = f"{Path(vitds.__file__).parent}{os.sep}"


class CardKernels:
    """In the place of vitds/kernels/*_gpu.py, which cannot run: only looks at what it is given."""

    launches = 0

    @classmethod
    def find_parts(cls, *tensors: Tensor) -> None:
        """Launched once."""
        assert all(type(tensor) is FakeTensor and tensor.is_contiguous() for tensor in tensors)
        assert len({tensor.device for tensor in tensors}) == 1
        cls.launches += 1

    weigh = find_parts

    @classmethod
    def write_images(
        cls, crops: Tensor, images: Tensor, scale: Any, shift: Any, mixing: Mixing, *, chunk_images: int
    ) -> None:
        """Launched once."""
        cls.find_parts(crops, images, mixing.partner, mixing.box, mixing.lam)


class Asked(TorchFunctionMode):
    """Answers 1 where a program asks a fake tensor for its number, and notes what asked one on the card.

    Each such question lets the host wait until the card has done all it was given.
    """

    NUMBER_OF = (Tensor.__float__, Tensor.__int__, Tensor.__bool__, Tensor.item, Tensor.tolist)

    def __init__(self) -> None:
        super().__init__()
        self.asked: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in self.NUMBER_OF and isinstance(args[0], FakeTensor):
            if args[0].device.type == "cuda":
                self.asked.append(func.__name__)
            answers = {Tensor.__int__: 1, Tensor.__bool__: True, Tensor.tolist: [1.0] * args[0].numel()}
            return answers.get(func, 1.0)
        return func(*args, **(kwargs or {}))


class Brought(TorchDispatchMode):
    """Notes what is copied from the host to the card, each by where in the program it was asked for.

    The host waits for such a copy unless its memory is pinned, and memory made in a step is not.
    """

    def __init__(self) -> None:
        super().__init__()
        self.brought: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        source = {"aten::_to_copy": 0, "aten::copy_": 1}.get(func._schema.name)
        if source is not None and made.device == CARD and args[source].device.type == "cpu":
            self.brought.append(_place())
        return made


def _place() -> str:
    """The line of vitds that is running."""
    frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(PACKAGE)]
    return f"{frames[-1].filename.removeprefix(PACKAGE)}: {frames[-1].line}" if frames else "?"


@contextmanager
def fake_card() -> Iterator[Asked]:
    """Inside, tensors on CARD are fake, and so is what is computed from real ones."""
    # A fake tensor's own `tolist` asks for one number after the other, a real one's for all at once.
    with (
        patch.object(FakeTensor, "tolist", Tensor.tolist),
        # A generator of the card's needs the card; this one draws nothing of what is fake.
        patch("torch.Generator", lambda device, made=torch.Generator: made()),
        patch("vitds.heads.tiles.gpu_kernels", lambda: CardKernels),
        patch("vitds.heads.in_place.gpu_kernels", lambda: CardKernels),
        patch("vitds.augment.images.gpu_writer", lambda: CardKernels.write_images),
        FakeTensorMode(allow_non_fake_inputs=True),
        Asked() as asked,
    ):
        yield asked


def move(module: nn.Module) -> None:
    """`module.to(CARD)`, which cannot swap real for fake tensors; a later one does nothing."""
    module.to = lambda device: module
    for part in module.modules():
        for name, parameter in part._parameters.items():
            if parameter is not None:
                moved = torch.empty_like(parameter, device=CARD)
                part._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in part._buffers.items():
            if buffer is not None:
                part._buffers[name] = torch.empty_like(buffer, device=CARD)


@torch.no_grad()
def backward(loss: Tensor) -> None:
    """`loss.backward()`, a node of the graph after the other.

    Raises: AssertionError if a gradient lies on another device than what it is of.
    """
    arrived: dict[Any, dict[int, Tensor]] = defaultdict(dict)
    arrived[loss.grad_fn][loss.output_nr] = torch.ones_like(loss)
    for node in reversed(_in_order(loss.grad_fn)):
        if not arrived[node]:
            continue  # a branch that nothing was made of
        # A function of our own is called by its `apply`.
        call = node.apply if isinstance(node, BackwardCFunction) else node
        made = call(*(arrived[node].get(place) for place in range(len(node._input_metadata))))
        made = made if isinstance(made, tuple) else (made,)
        # A function of our own gives None also for its last arguments, which are no tensors.
        for gradient, (following, place) in zip(made, node.next_functions, strict=False):
            if gradient is None or following is None:
                continue
            what = following._input_metadata[place]
            assert gradient.device == what.device, (node, gradient.device, following, what.device)
            # What was broadcast forward is summed backward.
            gradient = gradient.sum_to_size(tuple(what.shape))
            before = arrived[following].get(place)
            arrived[following][place] = gradient if before is None else before + gradient


def _in_order(last: Any) -> list[Any]:
    """All nodes before `last`, and itself, each after those that it leads to in the backward pass."""
    done, seen, stack = [], {last}, [(last, iter(last.next_functions))]
    while stack:
        node, following = stack[-1]
        new = next((each for each, _ in following if each is not None and each not in seen), None)
        if new is None:
            done.append(stack.pop()[0])
        else:
            seen.add(new)
            stack.append((new, iter(new.next_functions)))
    return done
