"""The classes that are drawn, and what guides the network: labels, guidance and a guide, from config.sample."""

import os
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from diffusion import build, guidance, workdir
from diffusion.build import Experiment
from diffusion.limits import numbers
from diffusion.util import RunError, naming


class Guide(NamedTuple):
    """The checkpoint that config.sample.guide names."""

    exp: Experiment
    params: Any
    record: dict[str, Any]


class Conditions(NamedTuple):
    """The classes that are drawn, and what guides the network.

    Attributes:
        labels: image i is of class labels[i mod len(labels)], where −1 is no class; empty for an unconditional network.
        guide: the weak network, if it is another one.
        net_of: see `condition`.
        settings: what the images depend on; empty for an unconditional network without guidance.
    """

    labels: tuple[int, ...]
    guide: Guide | None
    net_of: Callable
    settings: dict[str, Any]

    def params(self, params: Any) -> Any:
        """Return the parameters that `net_of` takes."""
        return (params, self.guide.params) if self.guide else params

    def labels_of(self, count: int) -> list[np.ndarray]:
        """Return [the labels of the first `count` images], or [] if they have none."""
        return [np.resize(np.array(self.labels), count)] if self.labels else []


def require_conditions(config: ConfigDict, path: str) -> None:
    """Raise RunError unless the run in `path` can draw what sample.labels and sample.guidance ask for."""
    asked, num_classes = config.sample, config.model.num_classes
    if asked.guide and asked.guidance == 1:
        raise RunError('config.sample.guide has no effect with sample.guidance=1: use a larger one, such as 2')
    classifier_free = asked.guidance != 1 and not asked.guide
    if not num_classes:
        retrain = 'train with --config.data.labels=True'
        if asked.labels != 'all':
            raise RunError(f'config.sample.labels is {asked.labels!r}, but the model is unconditional: {retrain}')
        if classifier_free:
            raise RunError(
                f'config.sample.guidance is {asked.guidance:g}, but the model is unconditional: {retrain} '
                '--config.train.label_dropout=0.1, or name a weaker run by --config.sample.guide=WORKDIR'
            )
        return
    trained = (workdir.read_config(path) or {}).get('train', {})
    if not trained.get('label_dropout') and (classifier_free or asked.labels == 'none'):
        key = 'labels' if asked.labels == 'none' else 'guidance'
        raise RunError(
            f'config.sample.{key} is {asked[key]!r}, but the run was trained with train.label_dropout=0, so that it '
            'has no unconditional model: train on with --config.train.label_dropout=0.1'
            + (', or name a weaker run by --config.sample.guide=WORKDIR' if classifier_free else '')
        )
    if classifier_free and asked.labels == 'none':
        raise RunError(
            f"config.sample.guidance is {asked.guidance:g}, but sample.labels='none' draws from the unconditional "
            'model, which cannot guide itself: use guidance=1, or labels=all'
        )
    absent = [label for label in labels_asked_for(config) if label >= num_classes]
    if absent:
        raise RunError(
            f'config.sample.labels has {absent[0]}, but the model knows the classes 0 to {num_classes - 1} '
            '(config.json lists their names in images.classes)'
        )


def all_classes(config: ConfigDict) -> tuple[int, ...]:
    """Return all classes of a conditional network, or none."""
    return tuple(range(config.model.num_classes))


def labels_asked_for(config: ConfigDict) -> tuple[int, ...]:
    """Return the classes that config.sample.labels names; −1 is no class."""
    text = config.sample.labels
    return all_classes(config) if text == 'all' else (-1,) if text == 'none' else numbers(text)


def open_conditions(config: ConfigDict, exp: Experiment) -> Conditions:
    """Return what config.sample asks for; the checkpoint of a guide is read.

    Raises:
        RunError: there is no such checkpoint, or its network does not fit.
    """
    asked, labels = config.sample, labels_asked_for(config)
    guide = open_guide(config) if asked.guide else None
    interval = tuple(asked.guidance_interval)
    net_of = condition(exp, labels, scale=asked.guidance, interval=interval, guide=guide.exp if guide else None)
    settings = {}
    if labels or asked.guidance != 1:
        settings = {'labels': labels, 'guidance': asked.guidance, 'interval': interval if asked.guidance != 1 else ()}
    return Conditions(labels, guide, net_of, settings | ({'guide': guide.record} if guide else {}))


def open_guide(config: ConfigDict) -> Guide:
    """Read the checkpoint that config.sample.guide and guide_step name.

    Raises:
        RunError: there is none, or its images, schedule or kind are others.
    """
    asked, theirs = config.sample, config_of_guide(config)
    weak = build.build(theirs)
    path = os.path.abspath(os.path.expanduser(asked.guide))
    step, params = workdir.load_params(weak.abstract_state(), theirs, path, asked.weights, asked.guide_step)
    record = {'checkpoint_step': step, 'params_sha256': workdir.digest(params), 'model': theirs.model.to_dict()}
    return Guide(weak, params, record)


def config_of_guide(config: ConfigDict) -> ConfigDict:
    """Return the config with the network of the run that config.sample.guide names.

    Raises:
        RunError: there is none, or its images, schedule or kind are others.
    """
    with naming(f'config.sample.guide={config.sample.guide}'):
        theirs = workdir.config_of_run(config, os.path.abspath(os.path.expanduser(config.sample.guide)))
        same = ['data.image_size', 'data.channels', 'model.kind', *(f'schedule.{key}' for key in config.schedule)]
        same += ['model.num_classes'] if theirs.model.num_classes else []
        for key in same:
            part, name = key.split('.')
            if theirs[part][name] != config[part][name]:
                raise ValueError(
                    f'it has {key}={theirs[part][name]!r}, but this run has {config[part][name]!r}: a guide needs '
                    'the same images, classes, schedule and kind'
                )
        return theirs


def condition(
    exp: Experiment,
    labels: tuple[int, ...] = (),
    *,
    scale: float = 1.0,
    interval: tuple = (),
    guide: Experiment | None = None,
) -> Callable:
    """Return the function (params, indices) → net for the images of these numbers, see `make_sampler`.

    Args:
        exp: schedule, network and implementation.
        labels: as in `Conditions`.
        scale: of the guidance, see `guidance.guided`.
        interval: see `guidance.guided`.
        guide: the weak network; params are then a pair, and its are the second ones. None is `exp` without classes.
    """

    def net_of(params: Any, indices: jax.Array) -> Callable:
        params, weak_params = params if guide else (params, params)
        given = [jnp.asarray(labels, jnp.int32)[indices % len(labels)]] if labels else []
        net = exp.network.net(params, *given)
        if scale == 1:
            return net
        if guide:
            weak = guide.network.net(weak_params, *(given if guide.network.num_classes else []))
            return guidance.guided(
                exp.schedule, net, lambda x_t, t: (net(x_t, t), weak(x_t, t)), scale=scale, interval=interval
            )
        both = jnp.stack([*given, jnp.full_like(indices, -1)], axis=1).ravel()
        pair = guidance.halves(exp.network.net(params, both))
        return guidance.guided(exp.schedule, net, pair, scale=scale, interval=interval)

    return net_of
