"""The precision of parameters that are not trained."""

from flax import nnx


def round_parameters(module: nnx.Module) -> None:
    """Round the parameters of convolutions and linear layers to the dtype in which these layers compute.

    Such layers round their parameters at every call, so rounding them beforehand does not change their outputs. In a
    sampler's loop, XLA would repeat the rounding at each step, with one more GPU kernel for each array. Code that uses
    a kernel directly gets the rounded values: the attention of networks/cpu differs in the last bfloat16 digit.

    Args:
        module: is changed. Layers that compute in float32 stay as they are.
    """
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, nnx.Conv | nnx.Linear) and layer.dtype not in (None, layer.param_dtype):
            for param in (layer.kernel, layer.bias):
                if param is not None:
                    param.set_value(param[...].astype(layer.dtype))
