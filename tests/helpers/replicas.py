"""What `nn.DataParallel` runs on each of several GPUs, made where there is none."""

from torch import nn


def replica_of(module: nn.Module) -> nn.Module:
    """As `torch.nn.parallel.replicate` makes it: its parameters are plain tensors, which are attributes."""
    replicas = {one: one._replicate_for_data_parallel() for one in module.modules()}
    for one, replica in replicas.items():
        for name, child in one._modules.items():
            replica._modules[name] = None if child is None else replicas[child]
        for name, parameter in one._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:
                setattr(replica, name, parameter.detach().clone())
        for name, buffer in one._buffers.items():
            replica._buffers[name] = None if buffer is None else buffer.clone()
    return replicas[module]
