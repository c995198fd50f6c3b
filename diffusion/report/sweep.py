"""A plot of metrics over the number of steps."""

from collections.abc import Mapping, Sequence

from diffusion.util import replacing


def save_sweep(path: str, curves: Mapping[str, Mapping[str, Sequence[tuple[int, float, float]]]]) -> None:
    """Plot each metric over the number of steps, with one curve for each way of sampling and standard errors.

    Args:
        path: the file; its folder is created if it does not exist.
        curves: {metric: {name of the curve: [(steps, value, standard error)]}}; if empty, nothing is written.

    Raises:
        OSError: the file cannot be written.
    """
    from matplotlib.figure import Figure  # slow to import

    if not curves:
        return
    figure = Figure(figsize=(5.5 * len(curves), 4.2), layout='constrained')
    for ax, (metric, named) in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves.items(), strict=True):
        for name, points in named.items():
            steps, values, errors = zip(*points, strict=True)
            ax.errorbar(steps, values, errors, label=name, marker='o', markersize=3, linewidth=1, capsize=2)
        positive = all(value > 0 for points in named.values() for _, value, _ in points)
        ax.set(title=metric, xlabel='steps', xscale='log', yscale='log' if positive else 'linear')
        every = sorted({steps for points in named.values() for steps, _, _ in points})
        ax.set_xticks(every, [f'{steps}' for steps in every])
        ax.set_xticks([], minor=True)
        ax.legend(fontsize='small')
    with replacing(path) as file:
        figure.savefig(file, dpi=120, format='png')
