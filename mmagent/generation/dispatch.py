"""A model that is larger than one device, spread by accelerate over several, the host's memory and the disk.

accelerate hangs a hook on every module that brings its weights and its arguments to where it computes, so the model is
called as ever. What it cannot know is told here: which modules read the weights of those inside them without calling
them (all of a block must then be there), and which weights are read from outside their module (the head's). Keys and
values of a layer live where the layer computes.

Weights that are offloaded are on the meta device between two forwards. They are no weights to write to: new ones are
loaded into a model anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mmagent.models.agent_model import AgentModel
from mmagent.models.decoder import DecoderBlock
from mmagent.models.mtp import MTPModule
from mmagent.ops.state import check_weights, shapes_of, unshared
from mmagent.ops.tensor_files import TensorFiles, WeightsError

Memory = Mapping[int | str, int | str]
"""How much of a device ("cpu" for the host) may be used, in bytes or as "20GiB"; by the device's number."""


def spread(
    model: AgentModel,
    max_memory: Memory | None = None,
    offload_folder: Path | str | None = None,
    weights: Path | str | None = None,
) -> AgentModel:
    """``model`` itself, dispatched by accelerate within ``max_memory`` (by default all there is): on accelerators while
    there is room, then in the host's memory, then in ``offload_folder``, a new or empty one.

    A model on the meta device is read from ``weights``, a safetensors file or a folder of them (an agent's folder is
    one), and is never whole in memory; what would go to the disk stays there, in those files, and no folder is needed.
    Encoder, projector, decoder blocks and MTP modules stay in one piece each.

    Raises ``ValueError`` without accelerate, for an ``offload_folder`` that holds something (accelerate would take it
    for this model's) or is wanted and not named, for a meta model without ``weights``, and for such that do not fit.
    """
    try:
        from accelerate import dispatch_model, infer_auto_device_map
    except ImportError as error:
        raise ValueError(
            "to spread a model over devices, install accelerate: pip install 'mmagent[serving]'"
        ) from error
    folder = None if offload_folder is None else Path(offload_folder)
    if folder is not None and folder.exists() and any(folder.iterdir()):
        raise ValueError(f"{folder} holds something: offloaded weights go to a new or empty folder")
    absent = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if absent and weights is None:
        raise ValueError(f"{absent[0]} (and {len(absent) - 1} more) has no values: name the weights to read")
    whole = units(model)
    limits = None if max_memory is None else dict(max_memory)
    # not "clean": a model that lies on the disk as a whole would have the name "", by which accelerate finds no weights
    places = infer_auto_device_map(model, limits, no_split_module_classes=whole, clean_result=False)
    if "disk" in places.values() and folder is None and weights is None:
        raise ValueError(f"the model exceeds {limits or 'the memory there is'}: name an offload_folder for the rest")
    options: dict[str, Any] = {"device_map": places, "preload_module_classes": whole}
    if weights is not None:
        options["offload_index"] = _read(model, Path(weights), places)
    dispatch_model(model, offload_dir=folder, **options)
    return model.eval()


def units(model: AgentModel) -> list[str]:
    """Names of the classes whose instances must be in one place as a whole, with all that is in them."""
    kinds: list[type] = [type(model.encoder), type(model.projector), DecoderBlock, MTPModule]
    return [kind.__name__ for kind in kinds]


def _read(model: AgentModel, weights: Path, places: Mapping[str, Any]) -> dict[str, dict[str, str]]:
    """Give values to what stays in some memory, and say, as accelerate wants it, in which file the rest is. What is no
    parameter (routers' biases) stays in any case."""
    from accelerate.utils import set_module_tensor_to_device

    wanted, away = unshared(model.state_dict()), {}
    buffers = {name for name, _ in model.named_buffers()}
    with TensorFiles(weights) as files:
        check_weights(shapes_of(wanted), {name: t.shape for name, t in files.items()}, f"{weights} does not fit")
        for name, tensor in wanted.items():
            dtype = files[name].dtype
            if dtype != tensor.dtype:  # accelerate would cast some and not others, by where they go
                raise WeightsError(f"{name} in {weights} is {dtype}, in the model {tensor.dtype}")
            place = next(place for path, place in places.items() if f"{name}.".startswith(f"{path}."))
            if place == "disk" and name not in buffers:
                file = {"safetensors_file": files[name].place, "weight_name": name}
                away[name] = file | {"dtype": str(dtype).removeprefix("torch.")}
            else:
                value = files[name].whole()
                set_module_tensor_to_device(model, name, "cpu" if place == "disk" else place, value=value)
    return away


def computes_on(module: nn.Module) -> torch.device:
    """Where ``module`` computes: where its weights are, or where accelerate brings them."""
    for hook in _hooks(module):
        if getattr(hook, "execution_device", None) is not None:
            return torch.device(hook.execution_device)
    return next(module.parameters()).device


@contextmanager
def present(module: nn.Module) -> Iterator[None]:
    """The weights of ``module`` can be read while the block runs, without calling it."""
    hooks = _hooks(module)
    for hook in hooks:
        hook.pre_forward(module)
    try:
        yield
    finally:
        for hook in hooks:
            hook.post_forward(module, None)


def stored_weights(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and persistent buffers by name, sorted; those that are offloaded are read one at a time."""
    away = {
        path: hook.weights_map
        for path, module in model.named_modules()
        for hook in _hooks(module)
        if getattr(hook, "offload", False)
    }
    for name, tensor in sorted(model.state_dict().items()):
        if not tensor.is_meta:
            yield name, tensor
            continue
        path = name.rpartition(".")[0]
        while path not in away:
            if not path:
                raise ValueError(f"{name} is on the meta device and nowhere else: it has no values")
            path = path.rpartition(".")[0]
        yield name, away[path][name[len(path) + 1 :] if path else name]


def _hooks(module: nn.Module) -> tuple[Any, ...]:
    """accelerate's, of ``module`` itself."""
    hook = getattr(module, "_hf_hook", None)
    return () if hook is None else tuple(getattr(hook, "hooks", (hook,)))
