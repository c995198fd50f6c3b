"""The precision of parameters that are not trained."""

from flax import nnx


def round_parameters(module: nnx.Module) -> None:
    """Round the parameters of convolutions and linear layers to the type in which these layers compute.

    The layers do that themselves whenever they are called, so no output changes. (In bfloat16, the attention of
    networks/cpu multiplies its matrices before it rounds, so its last digit does.) But a sampler calls them at each
    step of a loop, where XLA leaves the rounding: on a GPU, that is one more kernel for each array.

    Args:
        module: is changed. Layers that compute in float32 stay as they are.
    """
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, nnx.Conv | nnx.Linear) and layer.dtype not in (None, layer.param_dtype):
            for param in (layer.kernel, layer.bias):
                if param is not None:
                    param.set_value(param[...].astype(layer.dtype))
